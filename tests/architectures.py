"""Eight tiny random architectures, and a naive reading of each: one unpadded row at a time, its modules named by hand, the adapter added into the weights."""
import copy
from dataclasses import dataclass

import torch
import transformers as T
from tiny import tiny_rows, tiny_tokenizer
from transformers.pytorch_utils import Conv1D

from reprpo.models import plain_weight
from reprpo.pairs.batch import collate
from reprpo.pairs.load import load_pairs
from reprpo.pairs.tokenize import tokenize_pairs
from reprpo.states.capture import bare, blocks_of
from reprpo.states.forward import forward_states, still
from reprpo.train.adapter import add_adapter, adapter_params
from reprpo.train.checks import nudge
from reprpo.train.config import AdapterConfig
from reprpo.train.trainer import train

COMMON = dict(vocab_size=320, bos_token_id=0, eos_token_id=0, pad_token_id=0, max_position_embeddings=128)
NORMAL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, initializer_range=0.2)
GROUPED = NORMAL | dict(num_key_value_heads=2, head_dim=8)
SPLIT = dict(reads=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"), writes=("self_attn.o_proj", "mlp.down_proj"))
WINDOW = 12  # tokens; shorter than every row
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
CAPPED = dict(attn_logit_softcapping=20.0, final_logit_softcapping=5.0)


@dataclass(frozen=True)
class Kind:
    "How to make one architecture, and what its parts are called."
    config: object                       # makes the configuration
    reads: tuple                         # modules that read the stream: their outputs are "out" sites
    writes: tuple                        # modules that write to it: their inputs are "in" sites
    blocks: str = "model.layers"
    norm: str = "model.norm"             # the final one
    about: str = ""


KINDS = {
    "Llama": Kind(lambda: T.LlamaConfig(**COMMON, **GROUPED), **SPLIT, about="grouped queries"),
    "Qwen3": Kind(lambda: T.Qwen3Config(**COMMON, **GROUPED, tie_word_embeddings=True), **SPLIT, about="query and key norms, tied embeddings"),
    "Mistral": Kind(lambda: T.MistralConfig(**COMMON, **GROUPED, sliding_window=WINDOW), **SPLIT, about=f"window of {WINDOW} tokens"),
    "Gemma3": Kind(lambda: T.Gemma3TextConfig(**COMMON, **GROUPED, **CAPPED, sliding_window=WINDOW, query_pre_attn_scalar=8, layer_types=MIXED), **SPLIT,
                   about="windows in some blocks, scaled embeddings, soft caps, four norms"),
    "Phi3": Kind(lambda: T.Phi3Config(**COMMON, **NORMAL, num_key_value_heads=2), reads=("self_attn.qkv_proj", "mlp.gate_up_proj"), writes=SPLIT["writes"],
                 about="fused projections"),
    "GPT2": Kind(lambda: T.GPT2Config(vocab_size=320, n_embd=32, n_layer=3, n_head=4, n_inner=48, n_positions=128, bos_token_id=0, eos_token_id=0,
                                      initializer_range=0.2),
                 reads=("attn.c_attn", "mlp.c_fc"), writes=("attn.c_proj", "mlp.c_proj"), blocks="transformer.h", norm="transformer.ln_f",
                 about="Conv1D, learned positions, dropout of its own"),
    "GPTNeoX": Kind(lambda: T.GPTNeoXConfig(**COMMON, **NORMAL), reads=("attention.query_key_value", "mlp.dense_h_to_4h"),
                    writes=("attention.dense", "mlp.dense_4h_to_h"), blocks="gpt_neox.layers", norm="gpt_neox.final_layer_norm",
                    about="parallel attention and MLP"),
    "Olmo2": Kind(lambda: T.Olmo2Config(**COMMON, **NORMAL, num_key_value_heads=2), **SPLIT, about="norms after the modules"),
}
SOURCES = {"hs": "hs", "in": "side", "out": "side"}


def build(kind: str, seed: int = 0, dtype=torch.float32):
    "Frozen, in eval mode; gains and biases moved off their neutral start, so that a norm left out or doubled shows."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = T.AutoModelForCausalLM.from_config(KINDS[kind].config())
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim == 1: p += 0.1 * torch.randn_like(p)
    model.generation_config.pad_token_id = 0
    return model.to(dtype).eval().requires_grad_(False)


def tokens(n: int = 8, seed: int = 0):
    "Token ids of `n` pairs of unequal lengths, all longer than the window."
    return tokenize_pairs(load_pairs(tiny_rows(n, seed)), tiny_tokenizer(), 128)


def batch_of(token_set, layout: str = "concat"): return collate(list(token_set), list(range(len(token_set))), 0, layout)


def answers(token_set):
    "Every answer as one row: its ids and the first scored position, the chosen ones first."
    for side in ("chosen", "rejected"):
        for p in token_set: yield torch.tensor([p.prompt + getattr(p, side)]), len(p.prompt) + getattr(p, f"{side}_start")


def merged(model, adapted):
    "A copy of `model` whose weights are W + scale·B·A of the adapter on `adapted`."
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for name, layer in adapted.named_modules():
            if not hasattr(layer, "lora_A"): continue
            into = plain.get_submodule(name.removeprefix("base_model.model."))
            delta = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            into.weight += delta.T if isinstance(into, Conv1D) else delta
    return plain


def decoded(quantised_model, plain):
    "A copy of `plain` with the weights that the codes of a quantised model stand for."
    copied, parts = copy.deepcopy(plain), dict(quantised_model.named_modules())
    with torch.no_grad():
        for name, module in copied.named_modules():
            if type(parts[name]).__name__ not in ("Linear4bit", "Linear8bitLt"): continue
            weight = plain_weight(parts[name]).float()
            module.weight.copy_(weight.T if isinstance(module, Conv1D) else weight)
    return copied


def affine(module, x):
    "What a linear module does, written out."
    y = x @ module.weight if isinstance(module, Conv1D) else x @ module.weight.T
    return y if module.bias is None else y + module.bias


@torch.no_grad()
def naive_row(model, kind: str, ids) -> dict:
    "Every state of one row, by site, and the log-probabilities of its tokens."
    about, kept, handles = KINDS[kind], {}, []
    blocks = model.get_submodule(about.blocks)
    keep = lambda name: lambda module, args, kwargs: kept.__setitem__(name, args[0] if args else kwargs["hidden_states"])
    for k, block in enumerate(blocks):
        for path in (*about.writes, *about.reads): handles.append(block.get_submodule(path).register_forward_pre_hook(keep(f"{k}.{path}"), with_kwargs=True))
    handles.append(model.get_submodule(about.norm).register_forward_pre_hook(keep("last"), with_kwargs=True))
    out = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    for handle in handles: handle.remove()
    n, found = len(blocks), {f"hs.{k}": h for k, h in enumerate(out.hidden_states[:-1])}
    found[f"hs.{n}"] = kept["last"]
    torch.testing.assert_close(model.get_submodule(about.norm)(kept["last"]), out.hidden_states[n])  # the tuple's last entry is after the final norm
    found |= {f"{k}.{path}.in": kept[f"{k}.{path}"] for k in range(n) for path in about.writes}
    found |= {f"{k}.{path}.out": affine(blocks[k].get_submodule(path), kept[f"{k}.{path}"]) for k in range(n) for path in about.reads}
    return {site: x[0] for site, x in found.items()} | {"logits": out.logits[0].float()}


def naive(model, kind: str, token_set) -> tuple[dict, torch.Tensor]:
    "Mean state of every answer's tokens by site, (2b, h), and the answers' summed log-probabilities, (2b)."
    states, logps = {}, []
    for ids, start in answers(token_set):
        row = naive_row(model, kind, ids)
        z = row.pop("logits").log_softmax(-1)
        logps.append(sum(z[t - 1, ids[0, t]] for t in range(start, ids.shape[1])))
        for site, x in row.items(): states.setdefault(site, []).append(x[start:].float().mean(0))
    return {site: torch.stack(xs) for site, xs in states.items()}, torch.stack(logps)


@torch.no_grad()
def token_by_token(model, ids, start: int) -> torch.Tensor:
    "Log-probabilities of one answer's tokens, each from a forward that sees only what stands before it."
    return torch.stack([model(input_ids=ids[:, :t], use_cache=False).logits[0, -1].float().log_softmax(-1)[ids[0, t]] for t in range(start, ids.shape[1])])


def expected_sites(kind: str, source: str, layers=(1, 2)) -> list[str]:
    "The sites by hand; `source` is hs, in or out."
    if source == "hs": return [f"hs.{k}" for k in layers]
    paths = KINDS[kind].writes if source == "in" else KINDS[kind].reads
    return sorted(f"{k}.{path}.{source}" for k in layers for path in paths)


MODES = ("plain", "checkpointing", "accumulation")


def adapted(model, seed: int = 0, size: float = 0.05):
    "The model with an adapter whose B is no longer zero."
    peft = add_adapter(model, AdapterConfig(rank=4), seed)
    nudge(peft, size)
    return peft


def remat(model, on: bool) -> None:
    "Turn non-reentrant checkpointing on or off; transformers has two names for it."
    name = "activation_checkpointing" if hasattr(bare(model), "activation_checkpointing_enable") else "gradient_checkpointing"
    getattr(bare(model), f"{name}_enable")({"use_reentrant": False}) if on else getattr(bare(model), f"{name}_disable")()


def captured_loss(states, sites) -> torch.Tensor:
    "A number that every captured state has a part in, a mean over pairs."
    weight = {s: torch.linspace(-1, 1, states.cho[s].shape[-1]) for s in sites}
    return sum(((states.cho[s] - 0.5 * states.rej[s]) @ weight[s]).mean() for s in sites) / len(sites)


def gradient(peft, kind: str, sites, token_set, mode: str) -> tuple[torch.Tensor, int]:
    "The adapter's gradient of `captured_loss`, and how often the first block's module ran per forward."
    params, calls, size = list(adapter_params(peft).values()), [], 2 if mode == "accumulation" else len(token_set)
    peft.zero_grad()
    peft.train()
    remat(peft, mode == "checkpointing")
    path = KINDS[kind].reads[0]
    handle = blocks_of(peft)[0].get_submodule(path).register_forward_pre_hook(lambda *_: calls.append(1))
    with still(peft):
        for i in range(0, len(token_set), size):
            part = collate(list(token_set)[i:i + size], list(range(i, i + size)), 0)
            (captured_loss(forward_states(peft, part, sites), sites) * size / len(token_set)).backward()
    handle.remove()
    remat(peft, False)
    peft.eval()
    return torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in params]), len(calls) * size // len(token_set)


METHODS = {"hs": "hs-none-inner:layers=[1,2]", "in": "side-none-inner:collect=in,layers=[1,2]", "out": "side-none-inner:collect=out,layers=[1,2]"}


def run(model, source: str, mode: str, out=None, **options):
    "Three steps of training as a user would."
    settings = dict(steps=3, batch_size=8, rank=4, lr=1e-3, log_every=1, save_every=0, progress=False, reference="live")
    settings |= dict(checkpointing=mode == "checkpointing", micro_batch=2 if mode == "accumulation" else None)
    return train(model, tiny_tokenizer(), METHODS[source], tiny_rows(16), out=out, **settings | options)


def distance(a: dict, b: dict) -> float:
    "Largest difference of two adapters' weights, relative to the largest weight."
    return max((a[k] - b[k]).abs().max().item() for k in a) / max(w.abs().max().item() for w in b.values())
