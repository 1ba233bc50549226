"""The coherence number against planted damage: the stored table, judged again with the shipped formula."""
from pathlib import Path

import pandas as pd
import pytest

from reprpo.judge.coherence import damage, status
from reprpo.judge.generate import Generation
from reprpo.judge.planted import DAMAGED, area, parser_share, wilson, world_prompts
from reprpo.world.prefs import pref_set

TABLE = Path(__file__).parent.parent / "files" / "results" / "coherence.csv"


def of(line: dict) -> tuple[dict, dict]:
    "A line's features and those of its base."
    base = {k.removeprefix("base_"): v for k, v in line.items() if k.startswith(("base_", "sd_"))}
    return {k: line[k] for k in base if not k.startswith("sd_") and k in line}, base


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    found = pd.read_csv(TABLE, keep_default_na=False)
    lines = [of(line) for line in found.to_dict("records")]
    return found.assign(damage=[damage(*x) for x in lines], status=[status(*x) for x in lines], damaged=found.fall >= DAMAGED)


def test_damaged_models_are_told_from_undamaged(table):
    assert table.damaged.sum() >= 10 and (~table.damaged).sum() >= 30
    assert area(table.damage, table.damaged) >= 0.95
    made = table[table.group != "base"]
    assert area(made.damage, made.damaged) >= 0.95


def test_healthy_models_are_not_called_broken(table):
    healthy = table[table.group.isin(["base", "trained"])]
    broken = int((healthy.status == "broken").sum())
    assert broken / len(healthy) <= 0.02, wilson(broken, len(healthy))


def test_nothing_badly_damaged_is_called_coherent(table):
    bad = table[table.fall >= 0.3]
    assert len(bad) and (bad.status == "broken").all()


def test_runs_of_comparisons():
    runs = pd.read_csv(TABLE.with_name("coherence_runs.csv"))
    damaged = 1 - runs.share / runs.base_share >= DAMAGED
    broken = int((runs.status[~damaged] == "broken").sum())
    assert len(runs) >= 200 and broken / (~damaged).sum() <= 0.02, wilson(broken, int((~damaged).sum()))
    assert not (runs.status[damaged] == "coherent").any()
    if damaged.any(): assert area(runs.damage, damaged) >= 0.95


def test_the_world_writes_well():
    rows = [r for name in ("facts", "kind", "honesty", "feedback", "flattery", "arith") for r in pref_set(name, "test", n=20)]
    texts = [Generation((1,), (1,), r["prompt"], r[k], "greedy", True) for r in rows for k in ("chosen", "rejected")]
    assert parser_share(texts)["answers"] == 1
    assert len(world_prompts("kind")) == 32
