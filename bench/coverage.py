"""Does the judge's interval hold the truth, and how often does its rule see what is not there? Planted comparisons, cell by cell.

    python bench/coverage.py

writes files/results/coverage.csv (one line a cell, every cell) and coverage.json (how it was made); about five minutes on one core.
Truths are exact: normal differences, or answers that change (-100, 0, 100 points) by a hidden propensity cut at two thresholds.
"""
import argparse
import json
import platform
import time
from importlib import metadata
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from reprpo.judge.power import Noise, flip_p, plant
from reprpo.judge.stats import crossed_interval

KEEP = Path(__file__).parent.parent / "files" / "results"
LAYOUTS = {"100 rows": [(100, 10)], "300 rows": [(300, 20)], "1000 rows": [(1000, 40)], "four sets": [(100, 10), (200, 15), (300, 20), (400, 30)]}
SHAPES = {"normal": (0.0, None), "counts": (0.0, 0.05), "lopsided": (4.0, 0.08)}  # effect in points, share of rows changed


def uneven(rows: int, kinds: int) -> np.ndarray:
    "Kind of each row; the largest kind has about three times the rows of the smallest."
    return np.minimum((kinds * ((np.arange(rows) + 0.5) / rows) ** 1.4).astype(int), kinds - 1)


def lay_out(sets: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    "Kind and set of each row; no kind is in two sets."
    first = np.cumsum([0, *(k for _, k in sets)])
    return (np.concatenate([first[i] + uneven(n, k) for i, (n, k) in enumerate(sets)]),
            np.repeat(np.arange(len(sets)), [n for n, _ in sets]))


def measure(seeds: int, layout: str, shape: str, noise: Noise, trials: int, seed: int, n_boot: int = 400) -> dict:
    "One cell: coverage, misses on either side, and errors of the sign-flip test and of the whole rule."
    rng, (effect, changed) = np.random.default_rng(seed), SHAPES[shape]
    kind, group = lay_out(LAYOUTS[layout])
    found = [crossed_interval(plant(rng, effect, noise, seeds, kind, changed), kind, group, n_boot=n_boot) for _ in range(trials)]
    above, below = (np.array(x) for x in ([e.low > effect for e in found], [e.high < effect for e in found]))
    flips = flip_p(np.array([e.per_seed for e in found]) - effect, rng) < 0.05
    coverage = 1 - (above | below).mean()
    return dict(seeds=seeds, layout=layout, rows=len(kind), kinds=int(kind.max()) + 1, shape=shape, effect=effect, sd_seed=noise.seed, sd_kind=noise.kind,
                sd_row=noise.row, sd_rest=noise.rest, trials=trials, coverage=coverage, mc_error=(coverage * (1 - coverage) / trials) ** 0.5,
                too_high=above.mean(), too_low=below.mean(), flip=flips.mean(), better=(above & flips).mean(), worse=(below & flips).mean())


def cells() -> list[tuple[str, int, str, str, Noise]]:
    "Group, seeds, layout, shape, noise of every cell."
    grid = [("realistic", s, lay, shape, Noise(sd, 3.0, 7.0, 14.0)) for s, lay, shape, sd in product((6, 10, 20), LAYOUTS, SHAPES, (0.0, 1.0, 2.0, 4.0))
            if shape != "normal" or sd in (0.0, 2.0)]
    grid += [("few seeds", s, lay, "counts", Noise(sd, 3.0, 7.0, 14.0)) for s, lay, sd in product((2, 3), ("300 rows", "four sets"), (0.0, 1.0, 4.0))]
    grid += [("A/A: rows have no part", s, "300 rows", "counts", Noise(sd, 0.0, 0.0, 14.0)) for s, sd in product((6, 10, 20), (0.0, 2.0))]
    return grid


def main() -> int:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--trials", type=int, default=1500, help="planted comparisons in each cell")
    trials, start = args.parse_args().trials, time.time()
    lines = [dict(group=group) | measure(s, lay, shape, noise, trials, seed=1000 + i) for i, (group, s, lay, shape, noise) in enumerate(cells())]
    KEEP.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(lines).to_csv(KEEP / "coverage.csv", index=False, float_format="%.5g")
    made = {"command": f"python bench/coverage.py --trials {trials}", "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(time.time() - start, 1), "platform": f"{platform.system()} {platform.machine()}",
            "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in ("reprpo", "numpy", "scipy")}}
    (KEEP / "coverage.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
