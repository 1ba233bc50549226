"""Runs per hour: seeds of a method trained one by one, and several in one forward, on the same cores.

    python bench/seeds.py
    python bench/seeds.py --model Qwen/Qwen3-0.6B --pairs FILE --processes 1 --stacks 1 4 16

Every process has one thread (on a CPU) and its own seeds; an arm's time is that of the process that is done last, from the call to the saved and
checked adapters. All arms run in every round, in turn; loading the model and storing the reference are done before.
"""
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import pandas as pd
import tyro

from reprpo.io import manifest, write_json


@dataclass(frozen=True)
class Options:
    "What to run."
    model: str = "world"                       # "world", a folder, or a hub name
    pairs: str = "world:facts/train"           # anything load_pairs reads
    methods: tuple[str, ...] = ("dpo", "hs-none-inner")
    stacks: tuple[int, ...] = (1, 2, 4)        # runs in one forward; 1: one by one
    seeds: int = 4                             # of each process
    steps: int = 60                            # optimiser steps of each run
    processes: int = 2                         # one thread each on a CPU
    rounds: int = 5                            # times that all arms run
    layout: str = "auto"                       # as for training
    device: str = "auto"                       # "cpu", "cuda", …
    out: Path = Path("files/results/seeds.json")


def serve(o: Options, which: int, pipe, cache: str) -> None:
    "One process: load, fill the cache, then do what it is told and answer with the seconds and the last losses."
    os.environ |= dict(OMP_NUM_THREADS="1", REPRPO_CACHE=cache)
    import torch
    import transformers

    from reprpo.models import load_model
    from reprpo.pairs.load import load_pairs
    from reprpo.train.many import train_many
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    model, tokenizer = load_model(o.model, device=o.device)
    pairs, seeds = load_pairs(o.pairs), range(which * o.seeds, which * o.seeds + o.seeds)
    for method in o.methods: train_many(model, tokenizer, method, pairs, seeds=seeds[:2], steps=2, stack=2, layout=o.layout, progress=False)
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        method, stack = asked
        start = time.perf_counter()
        runs = train_many(model, tokenizer, method, pairs, seeds=seeds, steps=o.steps, stack=stack, layout=o.layout, progress=False)
        if model.device.type == "cuda": torch.cuda.synchronize()
        pipe.send((time.perf_counter() - start, [float(r.history.loss.iloc[-1]) for r in runs], str(model.device)))


def main(o: Options) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    context, found, hourly = multiprocessing.get_context("spawn"), [], 3600 * o.processes * o.seeds
    with tempfile.TemporaryDirectory() as cache:
        ends = [context.Pipe() for _ in range(o.processes)]
        workers = [context.Process(target=serve, args=(o, i, end[1], cache), daemon=True) for i, end in enumerate(ends)]
        for w, (mine, _) in zip(workers, ends): # one after the other, so that one fills the cache
            w.start()
            mine.recv()
        for r in range(o.rounds):
            for method in o.methods:
                for stack in o.stacks:
                    for mine, _ in ends: mine.send((method, stack))
                    answers = [mine.recv() for mine, _ in ends]
                    seconds, losses = max(a[0] for a in answers), [x for a in answers for x in a[1]]
                    found.append(dict(round=r, method=method, stack=stack, seconds=seconds, loss=sum(losses) / len(losses), device=answers[0][2]))
                    print(f"round {r + 1} of {o.rounds} · {method} · {stack} in a forward · {hourly / seconds:.0f} runs an hour", flush=True)
        for mine, _ in ends: mine.send(None)
        for w in workers: w.join()
    runs = pd.DataFrame(found)
    wide = runs.pivot(index=["method", "round"], columns="stack", values="seconds")
    ratio = wide[[o.stacks[0]]].to_numpy() / wide
    losses = runs.groupby(["method", "stack"]).loss.median()
    table = pd.DataFrame([{"method": m, "runs in a forward": k, "runs an hour": (hourly / wide.loc[m][k]).median(), "ratio": ratio.loc[m][k].median(),
                           "least": ratio.loc[m][k].min(), "most": ratio.loc[m][k].max(), "loss": losses[m, k]} for m in o.methods for k in o.stacks])
    config = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(o).items()}
    where = dict(cpu=platform.processor() or platform.machine(), cores=os.cpu_count(), load=os.getloadavg(), device=found[0]["device"])
    tables = dict(table=table.to_dict("records"), runs=runs.drop(columns="device").to_dict("records"))
    command = " ".join(Path(w).name if w.startswith("/") else w for w in sys.argv)
    write_json(o.out, manifest(config, **where, **tables) | {"command": command})
    print(table.round(3).to_string(index=False))


if __name__ == "__main__": main(tyro.cli(Options, description=__doc__))
