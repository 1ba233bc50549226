"""What the judge says of stored runs: its own error rates, the prototype's trap, and the shipped verdicts made again from their bits."""
import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from reprpo.experiments.store import unpack
from reprpo.judge.error_rates import measure_errors, read_pool, summary

RESULTS = Path(__file__).parent.parent / "files/results"
STORED = RESULTS / "verdicts"


def verdicts(name):
    "What was written down."
    return json.loads((STORED / f"{name}-verdicts.json").read_text())


def test_error_rates_keep_the_promise():
    table = summary(pd.read_csv(RESULTS / "error_rates.csv")).set_index(["seeds", "planted points"])
    null, planted = table.loc[(10, 0.0)], table.loc[(10, 3.0)]
    assert null.comparisons >= 200 and null["better %"] <= 5 and null["to"] <= 9
    assert planted.comparisons >= 200 and planted["better %"] >= 80


def test_error_rates_are_those_of_the_pool():
    pool, stored = read_pool(unpack(STORED / "pool.parquet")), pd.read_csv(RESULTS / "error_rates.csv")
    assert len(pool.runs) >= 40
    for points in (0.0, 3.0):
        again = measure_errors(pool, points, n=3, seeds=10)
        known = stored[(stored.seeds == 10) & (stored.planted == points)].head(3)
        assert list(again.word) == list(known.word)
        assert again.points.to_numpy() == pytest.approx(known.points.to_numpy(), abs=1e-3)


def only(packed, *methods):
    "A packed comparison with some of its methods."
    keep = lambda f: f[f.method.isin(["base", *methods])]
    return replace(packed, scores=keep(packed.scores), frontier=keep(packed.frontier), kl=keep(packed.kl))


@pytest.mark.parametrize("name", ["facts", "kind", "facts_cue"])
def test_bits_give_the_shipped_verdict(name):
    packed = only(unpack(STORED / f"{name}.parquet"), "dpo", "hs-none-inner")
    told = replace(packed, told=packed.told | {"coherence": [c for c in packed.told["coherence"] if c["method"] in ("dpo", "hs-none-inner")]})
    found, known = told.judge().verdicts["hs-none-inner"], verdicts(name)["verdicts"]["hs-none-inner"]
    assert found.word == known["word"] and found.estimate.value == pytest.approx(known["estimate"], abs=1e-3) and found.estimate.seeds >= 10


@pytest.mark.parametrize("name", ["facts", "kind", "facts_cue", "facts-world1"])
def test_no_hidden_state_method_is_called_better(name):
    hidden = {m: v["word"] for m, v in verdicts(name)["verdicts"].items() if m.startswith(("hs-", "side-"))}
    assert hidden and "better" not in hidden.values(), hidden


def test_the_trap_does_not_catch_the_judge():
    found = verdicts("trap")
    orth = next(m for m in found["verdicts"] if "orth=1" in m)
    assert found["verdicts"][orth]["basis"] == "equal KL" and found["verdicts"][orth]["seeds"] >= 6
    assert found["verdicts"][orth]["word"] != "better", "an orthogonality penalty beside DPO at too high a rate"
