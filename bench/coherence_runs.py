"""How many runs of comparisons the coherence number called broken that were not: python bench/coherence_runs.py OUT...

Each OUT is the folder of a comparison on the world. Writes files/results/coherence_runs.csv, one line a run, from the texts and features that the runs stored.
"""
import sys
from pathlib import Path

import pandas as pd

from reprpo.io import read_json, read_jsonl, read_yaml
from reprpo.judge.coherence import damage, status
from reprpo.judge.planted import DAMAGED, parser_share

OUT = Path(__file__).parent.parent / "files" / "results" / "coherence_runs.csv"


def lines(home: Path):
    "One line for each run that wrote."
    base, own = read_json(home / "base" / "coherence.json"), parser_share(read_jsonl(home / "base" / "generations.jsonl"))
    for path in sorted(home.glob("runs/*/seed-*/coherence.json")):
        config, found, texts = read_yaml(path.parent / "config.yaml"), read_json(path), read_jsonl(path.parent / "generations.jsonl")
        told = {k: config[k] for k in ("method", "seed", "train", "lr")} | {"share": parser_share(texts)["share"], "base_share": own["share"]}
        yield {"comparison": home.name} | told | {"kl": found["kl_sampled"], "damage": damage(found, base), "status": status(found, base)}


if __name__ == "__main__":
    homes = [Path(o) for o in sys.argv[1:]]
    if not homes: sys.exit(__doc__)
    table = pd.DataFrame([line for home in homes for line in lines(home)])
    table.to_csv(OUT, index=False, float_format="%.6g")
    table["damaged"] = 1 - table.share / table.base_share >= DAMAGED
    print(table.groupby(["damaged", "status"]).size().to_string())
