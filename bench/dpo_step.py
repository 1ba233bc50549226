"""Optimiser steps of reprpo and of TRL's DPOTrainer on the same rows, in the same order, from the same LoRA weights.

    pip install -c constraints.txt -e '.[bench]'
    python bench/dpo_step.py --pairs math_6b_train.jsonl,n=32 --shape 256x8x32768 --rank 16
    python bench/dpo_step.py --pairs world:facts/train,n=240 --steps 30

A shape is a random Qwen3 of that width, number of layers and vocabulary, with a tokenizer trained on the pairs.

All arms run in one process, one after the other in every round; then each runs once more in a process of its own, for its memory.
Tokens count the prompt twice, as both libraries' plain layout feeds it, and no padding; so a layout that feeds it once is paid for what it saves.
"""
import gc
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Literal

os.environ.setdefault("TQDM_DISABLE", "1")

import pandas as pd
import psutil
import torch
import transformers
import tyro
from peft import set_peft_model_state_dict
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS

from reprpo.io import manifest, write_json
from reprpo.models import load_model
from reprpo.pairs.load import load_pairs
from reprpo.pairs.tokenize import context_length, tokenize_pairs
from reprpo.train.adapter import adapter_weights, add_adapter, lora_config
from reprpo.train.config import TrainConfig
from reprpo.train.cost import measure_peak
from reprpo.train.feed import pair_order
from reprpo.train.trainer import train

ARMS = {  # name -> options of reprpo's TrainConfig or of TRL's DPOConfig
    "reprpo": dict(reference="cache", layout="auto"),
    "reprpo, a pair in a row": dict(reference="cache", layout="shared"),
    "reprpo, an answer in a row": dict(reference="cache", layout="concat"),
    "reprpo, live reference": dict(reference="live", layout="auto"),
    "TRL, online": dict(precompute_ref_log_probs=False),
    "TRL, precomputed": dict(precompute_ref_log_probs=True),
}


@dataclass(frozen=True)
class Options:
    "What to run."
    model: str = "world"                            # "world", a folder, or a hub name
    shape: str = ""                                 # WIDTHxLAYERSxVOCABULARY of a random model in its place
    pairs: str = "world:facts/train,n=240"          # anything load_pairs reads
    steps: int = 4                                  # optimiser steps of each run
    warm: int = 1                                   # of these, steps before the clock starts
    rounds: int = 5                                 # times that all arms run
    batch_size: int = 8                             # pairs
    rank: int = 8                                   # of LoRA, on all linear layers but the head
    lr: float = 1e-3                                # peak learning rate
    precision: Literal["fp32", "bf16"] = "fp32"     # bf16: autocast, in both
    device: str = "auto"                            # "cpu", "cuda", …
    threads: int = 0                                # CPU threads; 0: torch's own choice
    memory: bool = True                             # measure memory too, each arm in its own process
    out: Path = Path("files/results/dpo_step.json")
    only: str = ""                                  # run this arm once and print its memory (used by the script itself)

    def config(self, **changes) -> TrainConfig:
        return TrainConfig(rank=self.rank, alpha=2.0 * self.rank, lr=self.lr, steps=self.steps, batch_size=self.batch_size, precision=self.precision,
                           log_every=self.steps, **changes)


def make_shape(shape: str, pairs: str, folder: Path) -> None:
    "A random Qwen3 of a shape, and a byte-level tokenizer trained on the pairs."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    h, layers, vocabulary = map(int, shape.split("x"))
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [text for p in load_pairs(re.sub(",n=.*", "", pairs)) for text in (p.prompt, p.chosen, p.rejected)]
    learn = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<eos>", "<pad>"], show_progress=False,
                                initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    inner.train_from_iterator(texts, learn)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", model_max_length=2048)
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=vocabulary, hidden_size=h, intermediate_size=3 * h, num_hidden_layers=layers, num_attention_heads=h // 32, num_key_value_heads=h // 64,
        head_dim=32, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=1))
    for part in (model, tokenizer): part.save_pretrained(folder)


def flops(model, batches: list, rank: int) -> float:
    "What the batches need with a frozen model, LoRA and a stored reference: prompts once, no padding, logits of scored tokens only."
    config = model.config.get_text_config()
    head = model.get_output_embeddings().weight.numel()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not model.get_output_embeddings()]
    trunk, lora = sum(m.weight.numel() for m in linear), rank * sum(m.in_features + m.out_features for m in linear)
    width = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    total = 0.0
    for p in (p for batch in batches for p in batch):
        n, c, r = len(p.prompt), len(p.chosen), len(p.rejected)
        seen = n * n / 2 + sum(m * (n + m / 2) for m in (c, r))             # pairs of tokens of which one looks at the other
        total += (n + c + r) * (4 * trunk + 6 * lora) + 4 * head * sum(p.scored) + 12 * width * seen
    return total


def now(device: str | torch.device, clock: str = "wall") -> float:
    "The time with the device idle: by the wall's clock, or of this process's own (cpu)."
    if torch.device(device).type == "cuda": torch.cuda.synchronize()
    return time.perf_counter() if clock == "wall" else time.process_time()


class Clock(TrainerCallback):
    "The time at the end of every step, the same for both libraries' trainers."
    def __init__(self, read): self.read, self.ends = read, []

    def on_step_end(self, args, state, control, **kwargs): self.ends.append(self.read())


@contextmanager
def clocked(read):
    "A clock, read by this function, that every trainer made inside the block has."
    clock = Clock(read)
    DEFAULT_CALLBACKS.append(clock)
    try: yield clock
    finally: DEFAULT_CALLBACKS.remove(clock)


def run_trl(model, tokenizer, rows, order, start, o: Options, config: TrainConfig, **options) -> float:
    "TRL's DPOTrainer with everything else as in reprpo; returns the last logged loss."
    import datasets
    import trl
    datasets.disable_progress_bars()

    class InOrder(trl.DPOTrainer):
        def _get_train_sampler(self, train_dataset=None): return order

    with tempfile.TemporaryDirectory() as folder:
        args = trl.DPOConfig(
            output_dir=folder, bf16=config.precision == "bf16", gradient_checkpointing=False, max_length=None, use_cpu=model.device.type == "cpu",
            loss_type=["sigmoid"], beta=0.1, learning_rate=config.lr, max_steps=config.steps, warmup_steps=config.warmup_steps, seed=config.seed,
            lr_scheduler_type=config.schedule, weight_decay=config.weight_decay, max_grad_norm=config.clip, report_to="none", disable_tqdm=True,
            per_device_train_batch_size=config.batch_size, precompute_ref_batch_size=max(config.batch_size, 32), save_strategy="no",
            logging_steps=config.steps, logging_first_step=True, dataloader_pin_memory=model.device.type == "cuda", **options)
        fresh = datasets.Dataset.from_list([row | dict(run=time.time_ns()) for row in rows])  # no reference from an earlier round
        trainer = InOrder(model, args=args, train_dataset=fresh, processing_class=tokenizer, peft_config=lora_config(config))
        trainer.remove_callback(PrinterCallback)
        set_peft_model_state_dict(trainer.model, start)
        trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row][-1]


def run(arm: str, o: Options, work) -> dict:
    "One run of one arm on a fresh model; the clock leaves out loading, `total` leaves out nothing else."
    pairs, order, start = work
    model, tokenizer = load_model(o.model, device=o.device)
    rows = [dict(prompt=p.prompt, chosen=p.chosen, rejected=p.rejected) for p in pairs]
    before, began = memory_now(model.device), time.perf_counter()
    with clocked(lambda: now(model.device)) as clock, tempfile.TemporaryDirectory() as cache:
        os.environ["REPRPO_CACHE"] = cache
        if arm.startswith("TRL"): loss = run_trl(model, tokenizer, rows, order, start, o, o.config(), **ARMS[arm])
        else: loss = train(model, tokenizer, "dpo:beta=0.1", pairs, o.config(**ARMS[arm]), progress=False).history["loss"].iloc[-1]
    total = time.perf_counter() - began
    found = dict(arm=arm, seconds=clock.ends[-1] - clock.ends[o.warm - 1], total=total, loss=float(loss))
    found |= dict(peak=memory_peak(model.device), rise=memory_peak(model.device) - before)
    del model
    gc.collect()
    return found


def memory_now(device) -> float:
    "MiB in use: of the GPU by torch, or of this process."
    return (torch.cuda.memory_allocated() if device.type == "cuda" else psutil.Process().memory_info().rss) / 2**20


def memory_peak(device) -> float:
    "The most MiB in use since the process began; ru_maxrss would start from the parent's, which Linux hands on."
    if device.type == "cuda": return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists(): return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def memory(arm: str, o: Options) -> dict:
    "Peak memory of an arm in a process of its own, and how far above the loaded model that is."
    flags = [f"--{f.name.replace('_', '-')}={getattr(o, f.name)}" for f in fields(o) if f.name not in ("only", "memory")]
    done = subprocess.run([sys.executable, __file__, *flags, "--no-memory", f"--only={arm}"], capture_output=True, text=True)
    if done.returncode: raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def prepare(o: Options):
    "Pairs, their order over the run, LoRA's start, and how many tokens the timed steps hold, without and with padding."
    model, tokenizer = load_model(o.model, device=o.device)
    found = load_pairs(o.pairs)
    tokens = tokenize_pairs(found, tokenizer, context_length(tokenizer, model.config))
    kept = {p.row for p in tokens}
    pairs = replace(found, rows=[p for p in found if p.row in kept])  # too long for reprpo: TRL does not get them either
    order = pair_order(len(tokens), o.steps * o.batch_size, o.config().seed)
    timed = [[tokens[i] for i in order[k:k + o.batch_size]] for k in range(o.warm * o.batch_size, len(order), o.batch_size)]
    full = sum(2*len(p.prompt) + len(p.chosen) + len(p.rejected) for batch in timed for p in batch)
    padded = sum(2 * len(batch) * max(p.longest for p in batch) for batch in timed)
    start = adapter_weights(add_adapter(model, o.config(), o.config().seed))
    needed = flops(model, timed, o.rank)
    return (pairs, order, start), dict(tokens=full, padded=padded, pairs=len(pairs), device=str(model.device), flops=needed,
                                       parameters=sum(p.numel() for p in model.parameters()))


def table(runs: pd.DataFrame, size: dict, used: dict) -> pd.DataFrame:
    "One line for each arm; ratios are medians over rounds of times in the same round."
    seconds = runs.pivot(index="round", columns="arm", values="seconds")
    speed, peak = size["tokens"] / seconds, runs.pivot(index="round", columns="arm", values="matrix_peak")
    ratio = lambda arm, base: (seconds[base] / seconds[arm]).median()
    return pd.DataFrame([{
        "arm": arm, "tokens/s": speed[arm].median(), "least": speed[arm].min(), "most": speed[arm].max(),
        "× TRL online": ratio(arm, "TRL, online"), "× TRL precomputed": ratio(arm, "TRL, precomputed"),
        "of matrix peak": (size["flops"] / seconds[arm] / peak[arm]).median(),
        "total s": median(runs.total[runs.arm == arm]), "loss": median(runs.loss[runs.arm == arm]),
        **({"peak MiB": used[arm]["peak"], "above model MiB": used[arm]["rise"]} if used else {}),
    } for arm in ARMS])


def portable(word: str) -> str:
    "A word of the command without the folders of this machine."
    return re.sub(r"(^|=)/\S*/", r"\1", word)


def main(o: Options) -> None:
    transformers.logging.set_verbosity_error()
    if o.threads: torch.set_num_threads(o.threads)
    shaped = tempfile.TemporaryDirectory()
    if o.shape and not o.only:
        make_shape(o.shape, o.pairs, Path(shaped.name))
        o = replace(o, model=shaped.name)
    work, size = prepare(o)
    if o.only:
        print(json.dumps(run(o.only, o, work)))
        return
    runs = []
    for r in range(o.rounds):
        for arm in ARMS:
            fast = measure_peak(size["device"], seconds=2.0)
            runs.append(run(arm, o, work) | dict(round=r, matrix_peak=fast))
            print(f"round {r + 1} of {o.rounds} · {arm} · {size['tokens'] / runs[-1]['seconds']:.0f} tokens/s", flush=True)
    runs = pd.DataFrame(runs).drop(columns=["peak", "rise"])
    used = {arm: memory(arm, o) for arm in ARMS} if o.memory else {}
    result = table(runs, size, used)
    spread = runs.loss.max() / runs.loss.min() - 1
    where = dict(cpu=platform.processor() or platform.machine(), threads=torch.get_num_threads(), load=os.getloadavg(), trl=metadata.version("trl"),
                 gpu=torch.cuda.get_device_name() if size["device"].startswith("cuda") else None)
    config = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(o).items()} | dict(model=o.shape or o.model, pairs=portable(o.pairs))
    command = " ".join(map(portable, sys.argv))
    tables = dict(arms=result.to_dict("records"), runs=runs.to_dict("records"))
    write_json(o.out, manifest(config, **size, **where, loss_spread=spread, **tables) | {"command": command})
    print(result.round(3).to_string(index=False))
    print(f"{size['tokens']} tokens in {o.steps - o.warm} timed steps, {size['padded'] / size['tokens'] - 1:.1%} padding on top; "
          f"losses agree to {spread:.1e}; {size['device']}, {where['threads']} threads, {runs.matrix_peak.median() / 1e9:.0f} GFLOP/s; written to {o.out}")


if __name__ == "__main__": main(tyro.cli(Options, description=__doc__))
