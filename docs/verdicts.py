"""The comparisons behind the page of verdicts: run what is missing, judge, and keep one bit a row.

    python docs/verdicts.py [FOLDER]    runs in FOLDER (reprpo-verdicts), which resumes; results in files/results/verdicts
"""
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd

from reprpo.experiments.compare import compare
from reprpo.experiments.read import Run, read_runs
from reprpo.experiments.results import read_results
from reprpo.experiments.store import pack
from reprpo.io import atomic_write, write_json
from reprpo.judge.findings import summarise

ROOT = Path(__file__).parent.parent
METHODS = ("dpo", "ipo", "simper", "sft", "hs-none-inner", "hs-none-prefvec", "side-none-mse")
COMMON = dict(steps=16, layout="shared", scales=(0.5, 1.0, 1.5))
GRID = dict(lrs=(0.001, 0.003, 0.01))
FACTS = dict(train="world:facts/train", eval_n=80, frontier_n=80)
SMALL = dict(eval_n=60, frontier_n=60)
RUNS = {
    "facts": (METHODS, FACTS | GRID | dict(controls="all", seeds=10)),
    "pool": (("dpo",), FACTS | dict(seeds=24, seed=200, lr=0.003, tune_lr=False, coherence=False)),
    "kind": (METHODS, SMALL | GRID | dict(train="world:kind/train", controls="all", seeds=10)),
    "facts_cue": (METHODS, GRID | dict(train="world:facts_cue/train", eval_n=50, frontier_n=50, controls="all", seeds=10)),
    "facts-world1": (("dpo", "ipo", "hs-none-inner", "hs-none-prefvec", "side-none-mse"), FACTS | GRID | dict(seeds=6, model="world-1")),
    "trap": (("dpo", "hs-none-prefvec:proj=0,orth=1", "hs-none-retain"), SMALL | dict(train="world:facts/train", seeds=6, lr=0.01, tune_lr=False)),
}


def second_world(home: Path) -> None:
    "The base checkpoint of another pretraining seed."
    if not (home / "world-1" / "manifest.json").exists():
        from reprpo.world.model import train_world
        train_world(home / "world-1", seed=1)


def keep(home: Path, name: str, out: Path) -> None:
    "Pack a comparison and write its verdicts."
    results = read_results(home / name, ceilings=str(ROOT / "files/results/ceilings.csv") if (ROOT / "files/results/ceilings.csv").exists() else None).write()
    pack(results, out / f"{name}.parquet")
    write_json(out / f"{name}-verdicts.json", summarise(results.judgement))


def keep_pool(home: Path, out: Path) -> None:
    "All runs of dpo on facts with one learning rate, from two comparisons, under seeds of their own."
    runs = [r for r in read_runs([home / "facts"]) if r.method in ("base", "dpo", "dpo:repeat=1")]
    runs += [r for r in read_runs([home / "pool"]) if r.method == "dpo"]
    seed = iter(range(1000))
    one = read_results(home / "pool")
    pooled = [Run("base", r.seed, r.folder) if r.method == "base" else Run("dpo", next(seed), r.folder) for r in runs]
    pack(replace(one, runs=pooled, scores=pd.concat([r.frame("scores.parquet") for r in pooled], ignore_index=True)), out / "pool.parquet")


TITLES = {"facts": "facts", "kind": "kindness", "facts_cue": "facts with a cue", "facts-world1": "facts, another base"}


def write_table(out: Path) -> None:
    "The verdicts of all training sets as one Markdown table, for the first page."
    found = {title: json.loads((out / f"{name}-verdicts.json").read_text())["verdicts"] for name, title in TITLES.items()}
    broken = lambda v: f" ({v['note']})" if "broken" in v["note"] else ""
    cell = lambda v: "" if v is None else f"{v['estimate']:+.1f} [{v['interval'][0]:.1f}, {v['interval'][1]:.1f}] {v['word']}{broken(v)}"
    lines = ["| points against dpo at equal KL | " + " | ".join(found) + " |", "| --- |" + " --- |" * len(found)]
    lines += [f"| `{m}` | " + " | ".join(cell(f.get(m)) for f in found.values()) + " |" for m in found["facts"]]
    seeds = {n: max(v["seeds"] for v in f.values()) for n, f in found.items()}
    lines += ["", "Mean over the transfer sets, 95 % interval over seeds and kinds; " + ", ".join(f"{n}: {s} seeds" for n, s in seeds.items())
              + ". The last four lines are controls. `sft`, and arms with broken runs, were tuned to a higher rate than `dpo`: they meet it below their "
              "lowest strength, on a straight line from the base.", ""]
    atomic_write(out.parent / "verdicts.md", "\n".join(lines))


def main(home: Path) -> None:
    "Run, judge, keep."
    out = ROOT / "files/results/verdicts"
    home.mkdir(parents=True, exist_ok=True)
    os.chdir(home)
    second_world(Path("."))
    for name, (methods, options) in RUNS.items():
        compare(*methods, out=name, **COMMON | options)
        if name != "pool": keep(Path("."), name, out)
    keep_pool(Path("."), out)
    write_table(out)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "reprpo-verdicts"))
