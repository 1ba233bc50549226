"""How often the judge is wrong: A/A comparisons and planted gains dealt from the stored pool of dpo runs.

    python bench/error_rates.py      writes files/results/error_rates.csv (about three minutes)
"""
from pathlib import Path

import pandas as pd

from reprpo.experiments.store import unpack
from reprpo.io import atomic_write, manifest, write_json
from reprpo.judge.error_rates import measure_errors, read_pool, summary

OUT = Path(__file__).parent.parent / "files/results"
SIZES = ((10, 0.0, 400), (10, 3.0, 200), (6, 3.0, 100))  # runs in each hand, planted points, comparisons

if __name__ == "__main__":
    pool = read_pool(unpack(OUT / "verdicts/pool.parquet"))
    table = pd.concat([measure_errors(pool, points, n, seeds) for seeds, points, n in SIZES], ignore_index=True)
    atomic_write(OUT / "error_rates.csv", table.to_csv(index=False, float_format="%.6g"))
    write_json(OUT / "error_rates.json", manifest({"sizes": SIZES, "runs": len(pool.runs)}))
    print(summary(table).round(1).to_string(index=False))
