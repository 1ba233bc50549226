"""What a training step costs as one thing grows: pairs in a batch, length, vocabulary, layers; and what a set costs before the first step as its pairs grow.

    python bench/scaling.py --threads 1

Around one small Qwen3 with LoRA and DPO, one quantity is changed at a time. All cells run in every round, one after the other, after a round that is not
counted; steps go through `train` as anybody calls it, and the clock is read at the end of steps. Memory is what tensors take at once above the model, as
torch's profiler (on a GPU, its allocator) counts it, in a run of its own. A slope is that of a line through the logarithms: 1 is in proportion, 0 is no growth.
"""
import gc
import json
import os
import platform
import random
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import pandas as pd
import torch
import transformers
import tyro
from dpo_step import clocked, now, portable
from memory import profiled, tokenizer

from reprpo.io import manifest, write_json
from reprpo.pairs.load import load_pairs
from reprpo.pairs.tokenize import tokenize_pairs
from reprpo.states.cache import ReferenceCache
from reprpo.train.config import TrainConfig
from reprpo.train.trainer import train

CENTRE = dict(batch=8, length=128, vocabulary=8192, layers=4)
GROWS = {"batch": (2, 4, 8, 16), "length": (32, 64, 128, 256), "vocabulary": (2048, 8192, 32768, 65536), "layers": (2, 4, 8)}
SETS = (250, 500, 1000, 2000)


@dataclass(frozen=True)
class Options:
    "What to run."
    rounds: int = 5        # times that all cells run
    steps: int = 3         # optimiser steps of a run
    warm: int = 1          # of these, steps before the clock starts
    width: int = 128       # of the model
    device: str = "cpu"    # "cpu" or "cuda"
    threads: int = 0       # CPU threads; 0: torch's own choice
    clock: Literal["wall", "cpu"] = "wall" # cpu: this process's own time, for one thread of a machine that others use too
    out: Path = Path("files/results/scaling.json")

    def now(self) -> float: return now(self.device, self.clock)


def cells() -> list[dict]:
    "The centre with one thing changed, each once."
    found = [CENTRE | {name: x} for name, xs in GROWS.items() for x in xs]
    return [c for i, c in enumerate(found) if c not in found[:i]]


def rows(n: int, length: int) -> list[dict]:
    "Pairs of random words, all of one length: half of the tokens are the prompt, a quarter each answer."
    r = random.Random(0)
    text = lambda k: " ".join(f"w{r.randrange(200)}" for _ in range(k))
    return [dict(prompt=text(length // 2), chosen=" " + text(length // 4 - 1), rejected=" " + text(length // 4 - 1)) for _ in range(n)]


def build(c: dict, o: Options):
    "A random frozen Qwen3 of this shape."
    torch.manual_seed(0)
    config = transformers.Qwen3Config(vocab_size=c["vocabulary"], hidden_size=o.width, intermediate_size=3 * o.width, num_hidden_layers=c["layers"],
                                      num_attention_heads=o.width // 32, num_key_value_heads=o.width // 64, head_dim=32, max_position_embeddings=1024,
                                      tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    return transformers.Qwen3ForCausalLM(config).eval().requires_grad_(False).to(o.device)


@contextmanager
def counted(device: str):
    "The most bytes of tensors made inside the block, in a list."
    found = []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        found.append(torch.cuda.max_memory_allocated() - before)
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof: yield found
    found.append(profiled(prof))


class Cell:
    "One model and its pairs, trained again and again."
    def __init__(self, c: dict, o: Options, cache: str):
        self.c, self.o, self.model, self.tokenizer = c, o, build(c, o), tokenizer()
        self.pairs = load_pairs(rows(c["batch"] * o.steps, c["length"]))
        self.config = TrainConfig(lr=1e-4, steps=o.steps, batch_size=c["batch"], micro_batch=c["batch"], log_every=o.steps, save_every=0, reference="cache")
        self.cache = cache

    def run(self) -> float:
        "Seconds of a step."
        os.environ["REPRPO_CACHE"] = self.cache
        with clocked(self.o.now) as clock: train(self.model, self.tokenizer, "dpo", self.pairs, self.config, progress=False)
        return (clock.ends[-1] - clock.ends[self.o.warm - 1]) / (self.o.steps - self.o.warm)

    def memory(self) -> float:
        "MiB above the model in a run; the reference is stored."
        with counted(self.o.device) as found: self.run()
        return found[0] / 2**20


def before_training(n: int, model, o: Options) -> dict:
    "Seconds of reading, tokenising, storing the reference, and finding it stored, for a set of n pairs."
    given, tok, told, last = rows(n, 64), tokenizer(), {}, [o.now()]
    def lap(name):
        at = o.now()
        told[name], last[0] = at - last[0], at
    pairs = load_pairs(given); lap("read")
    tokens = tokenize_pairs(pairs, tok, 1024); lap("tokenise")
    with tempfile.TemporaryDirectory() as root:
        last[0] = o.now()
        ReferenceCache(model, tokens, root=root).fill(progress=False); lap("store the reference")
        ReferenceCache(model, tokens, root=root).states(); lap("find it stored")
    return told


def slope(x, y) -> float:
    "Of a line through the logarithms."
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def slopes(frame: pd.DataFrame, x: str, y: str) -> dict:
    "The slope through the medians, the least and the most of a round, and that of the last doubling."
    mid = frame.groupby(x)[y].median()
    each = [slope(g[x], g[y]) for _, g in frame.groupby("round")]
    return dict(grows=x, what=y, slope=slope(mid.index, mid), least=min(each), most=max(each), last=slope(mid.index[-2:], mid.iloc[-2:]))


def main(o: Options) -> None:
    transformers.logging.set_verbosity_error()
    if o.threads: torch.set_num_threads(o.threads)
    began, steps, sets = time.time(), [], []
    with tempfile.TemporaryDirectory() as cache:
        todo = [Cell(c, o, cache) for c in cells()]
        small = build(CENTRE | dict(layers=2, vocabulary=512), o)
        for r in range(-1, o.rounds):
            for cell in todo: steps.append(dict(round=r, **cell.c, seconds=cell.run()))
            for n in SETS: sets.append(dict(round=r, pairs=n, **before_training(n, small, o)))
            gc.collect()
            print(f"round {r + 1} of {o.rounds} · {time.time() - began:.0f} s", flush=True)
        memory = [dict(**cell.c, MiB=cell.memory()) for cell in todo]
    steps, sets, memory = (pd.DataFrame(x) for x in (steps, sets, memory))
    steps, sets = steps[steps["round"] >= 0], sets[sets["round"] >= 0]
    along = lambda frame, name: frame[np.logical_and.reduce([frame[k] == v for k, v in CENTRE.items() if k != name])]
    found = [slopes(along(steps, name), name, "seconds") for name in GROWS]
    found += [slopes(along(memory, name).assign(round=0), name, "MiB") for name in GROWS]
    found += [slopes(sets, "pairs", what) for what in sets.columns[2:]]
    where = dict(cpu=platform.processor() or platform.machine(), threads=torch.get_num_threads(), load=os.getloadavg(), seconds=round(time.time() - began, 1),
                 gpu=torch.cuda.get_device_name() if o.device == "cuda" else None)
    config = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(o).items()}
    tables = {k: f.to_dict("records") for k, f in dict(steps=steps, memory=memory, sets=sets, slopes=pd.DataFrame(found)).items()}
    write_json(o.out, manifest(config, centre=CENTRE, **where, **json.loads(json.dumps(tables))) | {"command": "python " + " ".join(map(portable, sys.argv))})
    print(pd.DataFrame(found).round(2).to_string(index=False))
    print(f"{where['threads']} threads, {where['seconds']:.0f} s; written to {o.out}")


if __name__ == "__main__": main(tyro.cli(Options, description=__doc__))
