"""Scoring pairs: reprpo's `score` in each layout, one answer at a time, and padded batches with logits of every token.

    pip install -c constraints.txt -e '.[bench]'
    python bench/evaluate.py --pairs math_6b_test.jsonl,n=16 --shape 256x8x32768 --threads 2
    python bench/evaluate.py --pairs world:facts/test,n=200

A shape is a random Qwen3 of that width, number of layers and vocabulary, with a tokenizer trained on the pairs.

All arms run in one process, one after the other in every round, after a round that is not counted; then each runs once more in a process of its own,
for its memory. The padded batch takes the rows in their order, as a data loader does, chosen above rejected, and takes the logarithm of the softmax of
all logits in float32. Every arm must give the same log-probabilities.
"""
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
import transformers
import tyro
from dpo_step import make_shape, memory_now, memory_peak, now, portable

from reprpo.io import manifest, write_json
from reprpo.models import load_model
from reprpo.pairs.load import load_pairs
from reprpo.pairs.tokenize import context_length, tokenize_pairs
from reprpo.states.score import score


@dataclass(frozen=True)
class Options:
    "What to run."
    model: str = "world"                     # "world", a folder, or a hub name
    shape: str = ""                          # WIDTHxLAYERSxVOCABULARY of a random model in its place
    pairs: str = "world:facts/test,n=200"    # anything load_pairs reads
    batch_size: int = 8                      # pairs in a forward, of all arms but the one without batches
    rounds: int = 5                          # times that all arms run
    device: str = "auto"                     # "cpu", "cuda", …
    dtype: str = "float32"                   # of the weights
    threads: int = 0                         # CPU threads; 0: torch's own choice
    clock: Literal["wall", "cpu"] = "wall"   # cpu: this process's own time, for one thread of a machine that others use too
    memory: bool = True                      # measure memory too, each arm in its own process
    out: Path = Path("files/results/evaluate.json")
    only: str = ""                           # run this arm once and print its memory (used by the script itself)


def answers(tokens) -> list[tuple[list[int], int]]:
    "Every answer with its prompt, chosen first, and where in the row its scored tokens begin."
    return [(p.prompt + ids, len(p.prompt) + start) for end in ("chosen", "rejected") for p in tokens
            for ids, start in [(getattr(p, end), getattr(p, f"{end}_start"))]]


@torch.no_grad()
def alone(model, tokens, o: Options) -> list[float]:
    "A forward for each answer, with logits of every token."
    found = []
    for ids, first in answers(tokens):
        row = torch.tensor([ids], device=model.device)
        logps = model(input_ids=row).logits[0, :-1].float().log_softmax(-1)
        found.append(logps.gather(-1, row[0, 1:, None])[first - 1:].sum())
    return torch.stack(found).tolist()


@torch.no_grad()
def padded(model, tokens, o: Options) -> list[float]:
    "A batch of pairs as rows filled up on the right, with logits of every token."
    rows, n, found = answers(tokens), len(tokens), torch.empty(2, len(tokens))
    for at in range(0, n, o.batch_size):
        some = range(at, min(at + o.batch_size, n))
        batch = [rows[i] for i in some] + [rows[n + i] for i in some]
        t = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([r + [0] * (t - len(r)) for r, _ in batch], device=model.device)
        mask = torch.tensor([[1] * len(r) + [0] * (t - len(r)) for r, _ in batch], device=model.device)
        scored = torch.tensor([[first <= k < len(r) for k in range(1, t)] for r, first in batch], device=model.device)
        logps = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        found[:, some.start:some.stop] = (logps * scored).sum(-1).reshape(2, -1).cpu()
    return found.flatten().tolist()


def ours(layout: str):
    "`score` in a layout."
    def run(model, tokens, o: Options) -> list[float]:
        frame = score(model, tokens, batch_size=o.batch_size, layout=layout)
        return [*frame.logp_cho, *frame.logp_rej]
    return run


ARMS = {"reprpo": ours("auto"), "reprpo, a pair in a row": ours("shared"), "reprpo, an answer in a row": ours("concat"),
        "padded batch, all logits": padded, "one answer at a time": alone}
BASE = list(ARMS)[-2:]  # what ratios are taken against


def work(o: Options):
    "Model, token set."
    model, tokenizer = load_model(o.model, device=o.device, dtype=o.dtype)
    return model, tokenize_pairs(load_pairs(o.pairs), tokenizer, context_length(tokenizer, model.config))


def memory(arm: str, o: Options) -> dict:
    "Peak memory of an arm in a process of its own, and how far above the loaded model that is."
    flags = [f"--{f.name.replace('_', '-')}={getattr(o, f.name)}" for f in fields(o) if f.name not in ("only", "memory", "shape")]
    done = subprocess.run([sys.executable, __file__, *flags, "--no-memory", f"--only={arm}"], capture_output=True, text=True)
    if done.returncode: raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def table(runs: pd.DataFrame, pairs: int, used: dict) -> pd.DataFrame:
    "One line for each arm; ratios are medians over rounds of times in the same round, with the least and the most."
    seconds = runs.pivot(index="round", columns="arm", values="seconds")
    lines = []
    for arm in ARMS:
        speed, line = pairs / seconds[arm], dict(arm=arm)
        line |= {"pairs/s": speed.median(), "least": speed.min(), "most": speed.max()}
        for base in BASE:
            ratio = seconds[base] / seconds[arm]
            line |= {f"× {base}": ratio.median(), f"× {base}, least": ratio.min(), f"× {base}, most": ratio.max()}
        lines.append(line | ({"peak MiB": used[arm]["peak"], "above model MiB": used[arm]["rise"]} if used else {}))
    return pd.DataFrame(lines)


def main(o: Options) -> None:
    transformers.logging.set_verbosity_error()
    if o.threads: torch.set_num_threads(o.threads)
    shaped = tempfile.TemporaryDirectory()
    asked = o
    if o.shape:
        make_shape(o.shape, o.pairs, Path(shaped.name))
        o = replace(o, model=shaped.name)
    model, tokens = work(o)
    before = memory_now(model.device)
    if o.only:
        ARMS[o.only](model, tokens, o)
        print(json.dumps(dict(peak=memory_peak(model.device), rise=memory_peak(model.device) - before)))
        return
    runs, found = [], {}
    for r in range(-1, o.rounds):
        for arm, do in ARMS.items():
            gc.collect()
            start = now(model.device, o.clock)
            found[arm] = do(model, tokens, o)
            runs.append(dict(round=r, arm=arm, seconds=now(model.device, o.clock) - start))
            if r >= 0: print(f"round {r + 1} of {o.rounds} · {arm} · {len(tokens) / runs[-1]['seconds']:.1f} pairs/s", flush=True)
    gap = max(abs(a - b) for values in found.values() for a, b in zip(values, found[BASE[1]]))
    runs = pd.DataFrame([x for x in runs if x["round"] >= 0])
    used = {arm: memory(arm, o) for arm in ARMS} if o.memory else {}
    result = table(runs, len(tokens), used)
    size = dict(pairs_scored=len(tokens), tokens=sum(len(ids) for ids, _ in answers(tokens)), largest_gap=gap,
                parameters=sum(p.numel() for p in model.parameters()))
    where = dict(device=str(model.device), cpu=platform.processor() or platform.machine(), threads=torch.get_num_threads(), load=os.getloadavg(),
                 gpu=torch.cuda.get_device_name() if model.device.type == "cuda" else None)
    config = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(asked).items()} | dict(model=asked.shape or asked.model, pairs=portable(asked.pairs))
    tables = dict(arms=result.to_dict("records"), runs=runs.to_dict("records"))
    write_json(o.out, manifest(config, **size, **where, **tables) | {"command": "python " + " ".join(map(portable, sys.argv))})
    print(result.round(2).to_string(index=False))
    print(f"log-probabilities agree to {gap:.1e} nats; {where['device']}, {where['threads']} threads; written to {o.out}")


if __name__ == "__main__": main(tyro.cli(Options, description=__doc__))
