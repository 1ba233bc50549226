"""Numbers of a few short runs on a tiny model, kept from one version to the next.

    python tests/test_golden.py    makes them again, for a change that is meant to change them
"""
import json
import os
import sys
from pathlib import Path

import pytest

METHODS = ("dpo", "hs-none-inner:layers=[1,2]", "hs-none-prefvec:layers=[1,2]", "hs-none-mse:layers=[1,2]", "projgrad")
KEPT = ("loss", "grad_norm", "theta", "dnll/chosen", "q/n", "ort/n")
STORED = Path(__file__).parent / "golden.json"

pytestmark = pytest.mark.usefixtures("cache")


def measured(model, tokenizer, method: str) -> list[dict]:
    "The log of twelve steps, a line for each third."
    from tiny import tiny_rows

    from reprpo.train.trainer import train
    run = train(model, tokenizer, method, tiny_rows(48), steps=12, batch_size=8, log_every=4, lr=3e-3, seed=0, layout="concat", progress=False)
    return [{k: float(row[k]) for k in KEPT if k in row} for row in run.history.to_dict("records")]


@pytest.mark.parametrize("method", METHODS)
def test_numbers_are_those_of_before(model, tokenizer, method):
    stored, now = json.loads(STORED.read_text())[method], measured(model, tokenizer, method)
    assert len(now) == len(stored) and [set(row) for row in now] == [set(row) for row in stored]
    for row, old in zip(now, stored): assert row == pytest.approx(old, rel=1e-3, abs=1e-3 * max(abs(v) for v in old.values()))


def main() -> None:
    import tempfile

    import torch
    from tiny import tiny_model, tiny_tokenizer
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home:
        os.environ["REPRPO_CACHE"] = home
        found = {m: measured(tiny_model(), tiny_tokenizer(), m) for m in METHODS}
    STORED.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__": sys.exit(main())
