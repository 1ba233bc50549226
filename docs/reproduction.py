"""Two claims of earlier work, run again with parts of this library: what is missing is run, judged, and kept as a table and one bit a row.

    python docs/reproduction.py [FOLDER]         all of it, in FOLDER (reprpo-reproduction), which resumes; results in files/results
    python docs/reproduction.py FOLDER PART      one part only: losses or rates, so that two may run at once, or judge
"""
import os
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch.nn.functional as F

from reprpo.experiments.compare import compare
from reprpo.experiments.results import read_results
from reprpo.experiments.store import pack, unpack
from reprpo.io import atomic_write, manifest, write_json
from reprpo.judge.equal import Curves
from reprpo.judge.frontier import frontier_frame
from reprpo.judge.generalise import TRANSFER
from reprpo.judge.rows import score_rows
from reprpo.judge.verdict import give_verdict
from reprpo.losses.margin import margin_sum
from reprpo.losses.prefvec import prefvec
from reprpo.train.method import Method

ROOT = Path(__file__).parent.parent
OUT = ROOT / "files/results"
COMMAND = "python docs/reproduction.py"
SETS = ("facts", "kind", "facts_wording", "facts_cross", "kind_cross", "honesty", "feedback", "flattery")
SEEDS = 6
RATES = (0.001, 0.003, 0.01)
OPTIONS = dict(train="world:facts/train", eval=tuple(f"world:{s}/test" for s in SETS), steps=16, layout="shared",
               scales=(0.25, 0.5, 1.0, 1.5), eval_n=40, frontier_n=40, coherence=False)
HIDDEN = "hs-none-prefvec"


def unbounded(pi, ref):
    "The output loss of the earlier work, log σ(-θ) = -softplus(θ): no β, no lower bound, and steepest where the pair is right already."
    theta = margin_sum(pi, ref)
    return F.logsigmoid(-theta), {"margin": theta}


unbounded.needs_states = False


def prefvec_unbounded(pi, ref):
    "The hidden terms of prefvec with that output loss beside them, in place of dpo."
    inner, terms = prefvec(pi, ref, outer="none")
    return inner + unbounded(pi, ref)[0], terms


LOSSES = (unbounded, prefvec_unbounded)


def at_rate(loss, rate: float) -> Method:
    "A loss function with a rate of its own, named as a method string would be."
    return replace(Method.parse(loss), label=f"{loss.__name__}:lr={rate:g}", lr=rate)


def run(part: str) -> None:
    "The runs of one part."
    if part == "losses": compare(*(at_rate(f, r) for r in RATES[1:] for f in LOSSES), out="losses", seeds=SEEDS, tune_lr=False, **OPTIONS)
    if part == "rates": compare(*(f"{m}:lr={r:g}" for r in RATES for m in ("dpo", HIDDEN)), out="rates", seeds=SEEDS, tune_lr=False, jobs=1, **OPTIONS)


def judged(packed, method: str, against: str, claim: int) -> list[dict]:
    "A method against another at own settings and at equal KL, as lines."
    keep = lambda f: f[f.method.isin(["base", method, against])]
    found = replace(packed, scores=keep(packed.scores), frontier=keep(packed.frontier), kl=keep(packed.kl)).judge(against)
    lines = []
    for basis, table in (("own", found.own), ("equal", found.equal_kl)):
        e = table.cells[method, TRANSFER]
        kl = packed.kl[(packed.kl["scale"] == 1) & (packed.kl.method == method)].kl_policy.mean() if basis == "own" else found.targets[method]["kl"]
        clamped = 0 if basis == "own" else found.targets[method]["clamped"] + found.targets[method].get("clamped_against", 0)
        lines.append(dict(claim=claim, method=method, against=against, basis=basis, value=e.value, low=e.low, high=e.high,
                          word=give_verdict(method, against, e).word, kl=kl, clamped=clamped, seeds=e.seeds))
    return lines


def judge() -> None:
    "Tables of both claims, and the frontier of every run, from the runs."
    results = read_results("rates", "losses")
    whole = [m for m in results.methods if sum(r.method == m for r in results.runs) == SEEDS]
    pack(results, OUT / "reproduction.parquet", whole)
    packed = unpack(OUT / "reproduction.parquet")
    pairs = [(f.__name__, "dpo") for f in LOSSES] + [(HIDDEN, "dpo"), ("prefvec_unbounded", "unbounded")]
    asked = [(f"{m}:lr={r:g}", f"{a}:lr={r:g}", 1) for r in RATES[1:] for m, a in pairs]
    asked += [(f"{m}:lr={r:g}", f"{m}:lr={RATES[1]:g}", 2) for m in ("dpo", HIDDEN) for r in (RATES[0], RATES[2])]
    lines = [x for m, a, claim in asked if {m, a} <= set(whole) for x in judged(packed, m, a, claim)]
    curves = Curves.make(score_rows(results.scores, results.score), results.frontier_scores, results.kl, set(), results.score)
    paths = frontier_frame(curves.rows[curves.rows.method.isin(whole)], curves.kl, curves.base, packed.sets)
    atomic_write(OUT / "reproduction.csv", pd.DataFrame(lines).round(6).to_csv(index=False))
    atomic_write(OUT / "reproduction_frontier.csv", paths.round(6).to_csv(index=False))
    family = pd.read_csv(OUT / "family.csv").set_index("method")
    tuned = {m: float(family.rate[m]) for m in ("dpo", HIDDEN)} # the same grid and steps
    told = manifest(OPTIONS | dict(seeds=SEEDS, methods=whole), command=COMMAND, tuned=tuned, failed=results.failed)
    write_json(OUT / "reproduction.manifest.json", told)
    print(pd.DataFrame(lines).round(3).to_string(index=False), tuned)


def main(home: str = "reprpo-reproduction", part: str = "") -> None:
    Path(home).mkdir(parents=True, exist_ok=True)
    os.chdir(home)
    for p in [part] if part else ("rates", "losses"): run(p)
    if part in ("", "judge"): judge()


if __name__ == "__main__": main(*sys.argv[1:])
