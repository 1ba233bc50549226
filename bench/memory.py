"""How far is the estimate of a run's peak memory from what the run takes? Architectures, methods and layouts on the CPU, each run in its own process.

    python bench/memory.py

writes files/results/memory.csv (one line a run) and memory.json (how it was made); about half an hour on one core.
Tensors are counted twice while a run lasts, by our ledger and by torch's profiler. Runs meant to be larger than 200 MB run again in processes
without either, where resident memory is read from the kernel: once with an allocator that gives every block back, once with the default one.
"""
import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import pandas as pd

KEEP = Path(__file__).parent.parent / "files" / "results"
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}


def cell(arch, h, layers, vocab, method="dpo", pairs=8, tokens=64, tied=False, dtype="float32", large=False, **settings) -> dict:
    "One run: a model's shape, a method, the pairs, and settings of TrainConfig."
    return dict(arch=arch, h=h, layers=layers, vocab=vocab, tied=tied, dtype=dtype, method=method, pairs=pairs, tokens=tokens, large=large, settings=settings)


def cells() -> list[dict]:
    "Small runs of everything, then runs of more than 200 MB."
    small = [cell(a, 64, 4, 320, m, tokens=48, **s) for a in ("Llama", "Qwen3", "GPT2", "Gemma3")
             for m, s in (("dpo", {}), ("hs-none-inner", {"checkpointing": True}), ("side-none-mse", {"layout": "shared"}))]
    small += [cell("Llama", 128, 6, 4096, m, tied=t, dtype=d, micro_batch=k, reference=r) for m, t, d, k, r in (
        ("dpo", True, "bfloat16", None, "auto"), ("hs-none-inner", False, "bfloat16", 2, "auto"), ("dpo", False, "float32", 4, "live"),
        ("side-none-mse", True, "float32", 1, "auto"), ("hs-none-inner", True, "float32", None, "live"))]
    large = [cell(a, 256, 4, v, m, 8, 160, t, large=True, **s) for a, v, m, t, s in (
        ("Llama", 32000, "dpo", True, {}), ("Llama", 4096, "side-none-mse", False, {}),
        ("Llama", 32000, "hs-none-inner", False, {"reference": "live"}),
        ("Qwen3", 32000, "dpo", True, {"layout": "shared"}), ("GPT2", 4096, "hs-none-inner", True, {}), ("Gemma3", 32000, "dpo", True, {}),
        ("Llama", 320, "dpo", False, {"precision": "bf16"}))]
    return small + large + [cell("Llama", 512, 12, 32000, "dpo", 8, 128, True, large=True, checkpointing=True),
                            cell("Llama", 512, 8, 32000, "hs-none-inner", 4, 160, True, large=True),
                            cell("Qwen3", 512, 4, 32000, "side-none-mse", 8, 96, True, "bfloat16", large=True, micro_batch=4)]


def tokenizer():
    "Two hundred words, one token each."
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = {"<eos>": 0, "<unk>": 1} | {f"w{i}": i + 2 for i in range(200)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>", model_max_length=2048)


def make_rows(n: int, tokens: int) -> list[dict]:
    "Pairs of random words; prompts and answers between half and all of their share of the tokens."
    r = random.Random(0)
    text = lambda most: " ".join(f"w{r.randrange(200)}" for _ in range(r.randint(most // 2, most)))
    return [dict(prompt=text(tokens // 3), chosen=" " + text(tokens * 2 // 3 - 1), rejected=" " + text(tokens * 2 // 3 - 1)) for _ in range(n)]


def make_model(c: dict):
    "A random model of the shape asked for."
    import torch
    import transformers as T
    h, common = c["h"], dict(vocab_size=c["vocab"], bos_token_id=0, eos_token_id=0, pad_token_id=0, tie_word_embeddings=c["tied"])
    shape = dict(hidden_size=h, intermediate_size=3 * h, num_hidden_layers=c["layers"], num_attention_heads=8, num_key_value_heads=4, head_dim=h // 8,
                 max_position_embeddings=1024)
    config = {"Llama": lambda: T.LlamaConfig(**common, **shape), "Qwen3": lambda: T.Qwen3Config(**common, **shape),
              "Gemma3": lambda: T.Gemma3TextConfig(**common, **shape, sliding_window=64, query_pre_attn_scalar=h // 8,
                                                   layer_types=(["sliding_attention", "full_attention"] * c["layers"])[:c["layers"]]),
              "GPT2": lambda: T.GPT2Config(**common, n_embd=h, n_layer=c["layers"], n_head=8, n_positions=1024)}[c["arch"]]()
    torch.manual_seed(0)
    return T.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, c["dtype"])).eval().requires_grad_(False)


def resident() -> int:
    "Bytes of this process in memory now."
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_resident() -> int:
    "The most there have been."
    return next(int(x.split()[1]) * 1024 for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))


def profiled(prof) -> int:
    "The most bytes that the profiler saw allocated at once, above what there was at its start."
    events = sorted((e.start_ns(), e.nbytes()) for e in prof.profiler.kineto_results.events() if e.name() == "[memory]")
    now = most = 0
    for _, n in events:
        now += n
        most = max(most, now)
    return most


def one(c: dict, how: str) -> dict:
    "Estimate a run and measure it, in this process."
    import torch
    from torch._subclasses.fake_tensor import FakeTensor
    from reprpo.pairs.load import load_pairs
    from reprpo.pairs.tokenize import tokenize_pairs
    from reprpo.train.config import TrainConfig
    from reprpo.train.cost import matrix_peak
    from reprpo.train.ledger import Ledger, tensors_of, weight_bytes
    from reprpo.train.memory import estimate_memory
    from reprpo.train.trainer import train

    class Real(Ledger):
        "Leaves out the tensors without memory on which the run itself rehearses."
        def hold(self, x, kind="weights"):
            if not isinstance(x, FakeTensor): super().hold(x, kind)

    torch.set_num_threads(1)
    tok, pairs = tokenizer(), load_pairs(make_rows(48, c["tokens"]))
    config = TrainConfig(batch_size=c["pairs"], steps=2, save_every=0, layers="range(1,-1)" if c["method"] != "dpo" else None, **c["settings"])
    run = lambda model: train(model, tok, c["method"], pairs, config, progress=False)
    before = resident()
    model = make_model(c)
    if how == "resident":
        run(model)
        return dict(resident=peak_resident() - before)
    start = time.process_time()
    found = estimate_memory(model, tokenize_pairs(pairs, tok, 1024), c["method"], config)
    took = time.process_time() - start
    matrix_peak() # once in a process; the profiler would count its matrices
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof, Real() as ledger:
        for x in tensors_of(model): ledger.hold(x)
        run(model)
    measured = dict(estimate=found.tensors, estimate_process=found.peak, phase=found.phase, seconds=took, ledger=ledger.peak)
    return measured | {"profiler": profiled(prof) + weight_bytes(model)} | {f"part_{k}": v for k, v in found.parts.items()}


def child(c: dict, how: str, malloc: bool = True) -> dict:
    "One measurement in a fresh process, without a reference from an earlier one."
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | {"REPRPO_CACHE": cache, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"} | (MALLOC if malloc else {})
        done = subprocess.run([sys.executable, __file__, "--cell", json.dumps(c), "--how", how], env=env, capture_output=True, text=True, check=False)
    if done.returncode: raise RuntimeError(f"{c}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def line(c: dict, before: dict | None = None) -> dict:
    "One line of the table; `before` is the stored one, whose resident memory is taken over."
    found = child(c, "tensors")
    ratios = {"ratio": found["estimate"] / found["ledger"], "ratio_profiler": found["estimate"] / found["profiler"]}
    if c["large"]:
        for name, malloc in (("resident", True), ("resident_default", False)):
            found[name] = before[name] if before else child(c, "resident", malloc)["resident"]
            ratios[f"ratio_{name}"] = found["estimate_process"] / found[name]
    about = {k: v for k, v in c.items() if k != "settings"} | {"settings": " ".join(f"{k}={v}" for k, v in c["settings"].items() if v is not None)}
    return about | found | ratios


def main() -> int:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--cell", help=argparse.SUPPRESS)
    args.add_argument("--how", choices=("tensors", "resident"), default="tensors", help=argparse.SUPPRESS)
    args.add_argument("--only", type=int, nargs=2, metavar=("FROM", "TO"), help="some of the runs, shown and not kept")
    args.add_argument("--estimates", action="store_true", help="make estimates and tensors again; take resident memory from the stored table")
    given, start = args.parse_args(), time.time()
    if given.cell:
        print(json.dumps(one(json.loads(given.cell), given.how)))
        return 0
    lines, stored = [], pd.read_csv(KEEP / "memory.csv").to_dict("records") if given.estimates else []
    for i, c in enumerate(cells()[slice(*given.only) if given.only else slice(None)]):
        lines.append(line(c, stored[i] if stored else None))
        shown = [k for k in lines[-1] if k.startswith("ratio") or k in ("arch", "method", "settings", "phase", "resident", "seconds")]
        print(" · ".join(f"{k} {lines[-1][k]:.3g}" if isinstance(lines[-1][k], float) else str(lines[-1][k]) for k in shown), flush=True)
    if given.only: return 0
    KEEP.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(lines).to_csv(KEEP / "memory.csv", index=False, float_format="%.5g")
    made = {"command": "python bench/memory.py" + " --estimates" * given.estimates, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(time.time() - start, 1), "platform": f"{platform.system()} {platform.machine()}",
            "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in ("reprpo", "torch", "transformers", "peft")}}
    (KEEP / "memory.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
