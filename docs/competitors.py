"""The comparison behind the page on competitors: run what is missing, judge, and keep a table and one bit a row.

    python docs/competitors.py [FOLDER]    runs in FOLDER (reprpo-competitors), which resumes; results in files/results
"""
import os
import sys
from pathlib import Path

import pandas as pd

from reprpo.experiments.compare import compare
from reprpo.experiments.results import read_results
from reprpo.experiments.store import pack
from reprpo.io import atomic_write, manifest, read_json, write_json
from reprpo.judge.generalise import TRANSFER

ROOT = Path(__file__).parent.parent
COMMAND = "python docs/competitors.py"
PROMPT = r'prompt:text="You are a good helper.\n"'
METHODS = ("dpo", "steer", "bipo", "loreft", PROMPT)
STEERED = ("steer:strength=30", "steer:direction=random,strength=30")
OPTIONS = dict(train="world:facts/train", seeds=3, steps=40, eval_n=60, frontier_n=60, tune_seeds=1, jobs=1, layout="shared", scales=(0.1, 0.25, 0.5, 1.0, 1.5))


def rows_of(table, found: dict) -> list[dict]:
    "The cells of one table of a comparison as plain lines."
    return [dict(method=m, set=s, value=e.value, low=e.low, high=e.high, se=e.se, df=e.df, n=e.n, seeds=e.seeds) | found
            for (m, s), e in table.cells.items()]


def main(home: Path) -> None:
    "Tune and compare; then steering at a strength that shows, and its null, a random vector of the same length; then keep."
    home.mkdir(parents=True, exist_ok=True)
    os.chdir(home)
    compare(*METHODS, out="competitors", **OPTIONS)
    compare(*STEERED, out="steered", **OPTIONS)
    results = read_results("competitors", "steered")
    judged, out = results.judgement, ROOT / "files/results"
    kl = results.kl[results.kl["scale"] == 1].groupby("method").kl_policy.mean()
    tables = [("base", "own settings", judged.base), ("dpo", "own settings", judged.own), ("dpo", "equal KL", judged.equal_kl)]
    lines = [r for against, basis, table in tables for r in rows_of(table, dict(against=against, basis=basis))]
    frame = pd.DataFrame(lines)
    frame["kl"] = frame.method.map(kl)
    atomic_write(out / "competitors.csv", frame.round(4).to_csv(index=False))
    pack(results, out / "competitors.parquet")
    tuned = {m: {k: t[k] for k in ("knob", "chosen", "edge")} for m, t in read_json(Path("competitors/tune.json"))["methods"].items()}
    write_json(out / "competitors.manifest.json", manifest(OPTIONS | {"methods": results.methods}, command=COMMAND, tuned=tuned))
    print(frame[frame["set"] == TRANSFER].to_string(index=False))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "reprpo-competitors"))
