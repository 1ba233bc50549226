"""What an optimiser step of each method costs, in steps of dpo: the same pairs in the same order, the same layout and batch, the reference stored.

    python bench/methods.py
    python bench/methods.py --pairs math_6b_train.jsonl,n=32 --shape 256x8x32768 --rank 16 --batch-size 2

The first line takes the embedded world, the second a random Qwen3 of that width, number of layers and vocabulary.
Each replaces its own entry of the results file.

All arms run in one process, one after the other in every round, and a ratio is of times in the same round.
Of the timed steps one in ten is logged, as in a run.
On a CPU the time is the process's own on one thread, which a neighbour on the machine disturbs less than the clock's.
On a GPU it is the clock's, with the device idle at the end of a step.
"""
import gc
import os
import platform
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import wraps
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import pandas as pd
import torch
import transformers
import tyro
from dpo_step import clocked, make_shape, now, portable

from reprpo.io import manifest, read_json, write_json
from reprpo.models import decoder_blocks, load_model
from reprpo.pairs.load import load_pairs
from reprpo.states.capture import blocks_needed
from reprpo.train.config import TrainConfig
from reprpo.train.method import Method
from reprpo.train.trainer import train

BASE = "dpo"
MIDDLE = "hs-none-inner:outer=none,layers=[0.25,0.5]"
WHOLE = " (whole forward)"  # of a method that could do with less
ARMS = (BASE, "hs-none-inner", "hs-none-prefvec", "side-none-mse", "hs-none-inner:outer=none", MIDDLE, MIDDLE + WHOLE)


@dataclass(frozen=True)
class Options:
    "What to run."
    model: str = "world"                            # "world", a folder, or a hub name
    shape: str = ""                                 # WIDTHxLAYERSxVOCABULARY of a random model in its place
    pairs: str = "world:facts/train,n=240"          # anything load_pairs reads
    methods: tuple[str, ...] = ARMS                 # method strings; the first is what the others are compared with
    steps: int = 12                                 # optimiser steps of each run; the last is not timed, as it is logged in any case
    warm: int = 1                                   # steps before the clock starts
    rounds: int = 5                                 # times that all arms run, after one run that is not counted
    batch_size: int = 8                             # pairs
    layout: str = "auto"                            # rows: concat, shared, packed, or the cheapest
    rank: int = 8                                   # of LoRA, on all linear layers but the head
    precision: str = "fp32"                         # or bf16: autocast
    device: str = "auto"                            # "cpu", "cuda", …
    threads: int = 1                                # CPU threads
    out: Path = Path("files/results/methods_cost.json")

    def config(self) -> TrainConfig:
        return TrainConfig(rank=self.rank, alpha=2.0 * self.rank, lr=1e-4, steps=self.steps, batch_size=self.batch_size, precision=self.precision,
                           layout=self.layout, reference="cache", save_every=0)


def read(arm: str) -> Method:
    "A method; `WHOLE` behind its name has it run as if it read log-probabilities."
    method = Method.parse(arm.removesuffix(WHOLE))
    if not arm.endswith(WHOLE): return method

    @wraps(method.loss)
    def loss(pi, ref, **options): return method.loss(pi, ref, **options)

    loss.needs_logps = True
    return replace(method, loss=loss)


def run(arm: str, o: Options, pairs) -> dict:
    "One run of one arm on a fresh model: seconds of a step."
    model, tokenizer = load_model(o.model, device=o.device)
    timed = "wall" if model.device.type == "cuda" else "cpu"
    with clocked(lambda: now(model.device, timed)) as clock: trained = train(model, tokenizer, read(arm), pairs, o.config(), progress=False)
    n = len(decoder_blocks(model))
    blocks = n if read(arm).needs_logps else max(blocks_needed(site, n) for site in trained.view.sites)
    found = dict(arm=arm, seconds=(clock.ends[-2] - clock.ends[o.warm - 1]) / (o.steps - 1 - o.warm), sites=len(trained.view.sites), blocks=blocks, of=n)
    del model, trained
    gc.collect()
    return found


def table(runs: pd.DataFrame, base: str) -> pd.DataFrame:
    "One line for each arm; ratios are of times in the same round."
    seconds = runs.pivot(index="round", columns="arm", values="seconds")
    ratio = seconds.div(seconds[base], axis=0)
    first = runs.drop_duplicates("arm").set_index("arm")
    return pd.DataFrame([{"arm": arm, "ms": 1e3 * seconds[arm].median(), "× dpo": ratio[arm].median(), "least": ratio[arm].min(), "most": ratio[arm].max(),
                          "sites": int(first.sites[arm]), "blocks": int(first.blocks[arm]), "of": int(first.of[arm])} for arm in runs.arm.unique()])


def main(o: Options) -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(o.threads)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["REPRPO_CACHE"] = str(Path(scratch) / "cache")
        name = o.shape or o.model
        if o.shape:
            make_shape(o.shape, o.pairs, Path(scratch) / "model")
            o = replace(o, model=str(Path(scratch) / "model"))
        pairs, runs = load_pairs(o.pairs), []
        for r in range(-1, o.rounds):
            for arm in o.methods if r >= 0 else o.methods[:1]:
                found = run(arm, o, pairs)
                if r >= 0: runs.append(found | dict(round=r))
                print(f"{f'round {r + 1} of {o.rounds}' if r >= 0 else 'warming up'} · {arm} · {1e3 * found['seconds']:.0f} ms", flush=True)
        model, tokenizer = load_model(o.model, device=o.device)
    runs = pd.DataFrame(runs)
    result = table(runs, o.methods[0])
    where = dict(cpu=platform.processor() or platform.machine(), threads=torch.get_num_threads(), load=os.getloadavg(), device=str(model.device),
                 gpu=torch.cuda.get_device_name() if model.device.type == "cuda" else None, parameters=sum(p.numel() for p in model.parameters()))
    config = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(o).items()} | dict(model=portable(name), pairs=portable(o.pairs))
    entry = manifest(config, **where, arms=result.to_dict("records"), runs=runs.to_dict("records")) | {"command": " ".join(map(portable, sys.argv))}
    write_json(o.out, (read_json(o.out) if o.out.exists() else {}) | {portable(name): entry})
    print(result.round(3).to_string(index=False))
    print(f"{where['device']}, {where['threads']} threads, load {where['load'][0]:.1f}; written to {o.out}")


if __name__ == "__main__": main(tyro.cli(Options, description=__doc__))
