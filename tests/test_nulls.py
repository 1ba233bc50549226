"""How often the decompositions find something where there is nothing: 200 empty data sets, with kinds and keys as real ones have."""
import numpy as np
import pytest
import torch
from scipy import stats

from reprpo.decompose.hypothesis import Battery, hypothesis
from reprpo.decompose.nulls import jackknife, permutation_test
from reprpo.decompose.planted import planted_direction
from reprpo.seeds import generator

SETS, KEYS, ROWS = 200, 100, 3


def pearson(x, y):
    x, y = (z - z.mean(-1, keepdim=True) for z in (x, y))
    return (x*y).sum(-1)/(x.norm(dim=-1)*y.norm(dim=-1)).clamp(min=1e-30)


def mean_gap(c, r): return (c - r).mean(-1)


def empty(seed: int):
    "States, log-ratios and groups of pairs in which preference is nowhere, every question in three wordings."
    some, g = planted_direction(KEYS, 32, strength=0, seed=seed), generator(seed, "wordings")
    key = torch.arange(KEYS).repeat_interleave(ROWS)
    noise = lambda *shape: torch.randn(*shape, generator=g)
    cho, rej = (x[key] + .5*noise(len(key), 32) for x in (some.cho, some.rej))
    y = noise(20)[some.groups[key]] + noise(KEYS)[key] + noise(len(key))
    return cho, rej, y, torch.stack([some.groups[key], key], 1)


def questions(seed: int) -> list:
    cho, rej, y, groups = empty(seed)
    d, options = cho - rej, dict(groups=groups, batched=True, n=200, seed=seed, alternative="two-sided")
    u = torch.randn(32, generator=generator(seed, "direction"))
    return [hypothesis("cosine with the log-ratio", "r", pearson, torch.cosine_similarity(cho, rej), y, **options),
            hypothesis("norm of the difference with the log-ratio", "r", pearson, d.norm(dim=1), y, **options),
            hypothesis("a projection with the log-ratio", "r", pearson, d @ u, y, **options),
            hypothesis("chosen is higher", "mean gap", mean_gap, cho @ u, rej @ u, "swap", **options)]


@pytest.fixture(scope="module")
def found(): return [questions(seed) for seed in range(SETS)]


def within(hits: int, trials: int, rate: float) -> bool:
    "Not more often than stated, and not a test that never fires: 99.9 % of binomial draws lie inside."
    low, high = stats.binom.interval(.999, trials, rate)
    return low <= hits <= high


@pytest.mark.parametrize("i", range(4), ids=["cosine", "norm", "projection", "swap"])
def test_each_question_errs_as_often_as_it_says(found, i):
    hits = sum(row[i].p < .05 for row in found)
    assert within(hits, SETS, .05), f"{hits} of {SETS} empty data sets have p < .05"


def test_p_values_are_uniform_where_nothing_is(found):
    ps = np.array([h.p for row in found for h in row])
    assert stats.kstest(ps, "uniform").statistic < .08


def test_a_battery_claims_something_in_no_more_than_five_percent(found):
    hits = sum(any(h.verdict == "holds" for h in Battery(row)) for row in found)
    assert hits <= stats.binom.ppf(.999, SETS, .05), f"{hits} of {SETS} batteries of empty data claim something"


def test_intervals_cover():
    "A mean over rows in kinds and keys: the jackknife over kinds covers the truth in about 95 % of data sets."
    hits = 0
    for seed in range(SETS):
        _, _, y, groups = empty(seed)
        low, high = jackknife(lambda v: v.mean(), y, groups=groups)
        hits += low <= 0 <= high
    assert stats.binom.ppf(.0005, SETS, .95) <= hits, f"{hits} of {SETS} intervals hold 0"


def test_free_shuffles_are_caught_by_this_test():
    "The instrument can fail: rows that are shuffled as if they were independent err far more often."
    hits = 0
    for seed in range(60):
        g = generator(seed, "kinds")
        kind = torch.arange(20).repeat_interleave(15)
        x, y = (torch.randn(20, generator=g)[kind] + torch.randn(300, generator=g) for _ in range(2))
        hits += permutation_test(pearson, x, y, 200, seed=seed, batched=True).p < .05
    assert not within(hits, 60, .05)
