"""The comparison of all named methods, and the confirmation of the best: run what is missing, judge, keep a table.

    python docs/family.py [FOLDER]           all named methods on the embedded world, five seeds; FOLDER (reprpo-family) resumes
    python docs/family.py [FOLDER] confirm   the three best hidden-state methods again, under a plan hashed first, on fresh keys and ten fresh seeds
"""
import os
import sys
from pathlib import Path

import pandas as pd

from reprpo.experiments.compare import compare
from reprpo.experiments.results import read_results
from reprpo.experiments.store import pack
from reprpo.io import atomic_write, manifest, read_json, write_json
from reprpo.judge.findings import summarise
from reprpo.judge.generalise import TRANSFER
from reprpo.train.table import NAMED, named_methods

ROOT = Path(__file__).parent.parent
OUT = ROOT / "files/results"
COMMAND = "python docs/family.py"
OPTIONS = dict(train="world:facts/train", steps=16, layout="shared", scales=(0.5, 1.0, 1.5), lrs=(0.001, 0.003, 0.01), eval_n=60, frontier_n=60)
TESTED = ("hidden", "transform", "gradient") # groups whose methods may be confirmed


def line(results, method: str, rate: float) -> dict:
    "One method's line of the table."
    judged, found = results.judgement, {}
    for name, table in (("base", judged.base), ("own", judged.own), ("equal", judged.equal_kl)):
        e = table.cells.get((method, TRANSFER)) if table else None
        found |= {name: e and e.value, f"{name}_low": e and e.low, f"{name}_high": e and e.high}
    kl = results.kl[(results.kl["scale"] == 1) & (results.kl.method == method)].kl_policy.mean()
    runs = [r for r in results.runs if r.method == method]
    broken = sum((method, r.seed) in results.broken for r in runs)
    return dict(method=method, group=next(g for g, ms in NAMED.items() if method in ms), rate=rate, kl=kl, seeds=len(runs), broken=broken) | found


def explore(home: str) -> None:
    "All named methods, each tuned on the same grid."
    compare(*named_methods(), out=home, seeds=5, **OPTIONS)
    results = read_results(home)
    tuned = read_json(Path(home) / "tune.json")["methods"]
    done = [m for m in named_methods() if m in results.methods]
    frame = pd.DataFrame([line(results, m, tuned[m]["chosen"]) for m in done]).sort_values("equal", ascending=False)
    atomic_write(OUT / "family.csv", frame.round(4).to_csv(index=False))
    edges = {m: t["edge"] for m, t in tuned.items()}
    write_json(OUT / "family.manifest.json", manifest(OPTIONS | dict(seeds=5, methods=done), command=COMMAND, edges=edges, failed=results.failed, exploratory=True))
    pack(results, OUT / "family.parquet")
    print(frame.to_string(index=False))


def best(n: int = 3) -> list[str]:
    "The methods that stand highest against dpo at equal KL, or at their own rates where they could not be met there; broken ones are left out."
    frame = pd.read_csv(OUT / "family.csv")
    frame = frame[frame.group.isin(TESTED) & (frame.broken == 0)]
    return frame.assign(stands=frame.equal.fillna(frame.own)).sort_values("stands", ascending=False).method.head(n).tolist()


def confirm(home: str) -> None:
    "The best of them, under a plan that is hashed before the first run."
    methods = best()
    options = OPTIONS | dict(seeds=10, eval_n=120, frontier_n=120)
    compare("dpo", *methods, out=home, register=True, **options)
    results = read_results(home).write()
    write_json(OUT / "family_confirmed-verdicts.json", summarise(results.judgement) | {"plan": read_json(Path(home) / "plan.json")["hash"]})
    write_json(OUT / "family_confirmed.manifest.json", manifest(options | dict(methods=["dpo", *methods]), command=f"{COMMAND} confirm"))
    pack(results, OUT / "family_confirmed.parquet")
    print(results.verdicts)


def main(home: str = "reprpo-family", what: str = "") -> None:
    Path(home).mkdir(parents=True, exist_ok=True)
    os.chdir(home)
    confirm("confirmed") if what == "confirm" else explore("family")


if __name__ == "__main__": main(*sys.argv[1:])
