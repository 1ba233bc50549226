"""Correlations and rotations of pairs: nothing is found in empty data more often than stated, and what is planted is found."""
import pytest
import torch
from scipy import stats
from test_nulls import SETS, empty, within

from reprpo.decompose.correlate import correlate, gain_over, kendall, strata
from reprpo.decompose.planted import planted_direction, planted_rotation
from reprpo.decompose.rotate import explains, in_axes, procrustes
from reprpo.decompose.similarity import same_way, unbiased_cka
from reprpo.decompose.statistics import fold_of, held_out_statistics, lens_statistics, pair_statistics
from reprpo.seeds import generator


def questions(seed: int) -> dict:
    "p of five claims about an empty data set."
    cho, rej, y, groups = empty(seed)
    asked = pair_statistics(cho, rej) | held_out_statistics(cho, rej, fold_of(groups[:, 1]))
    names = ("cosine", "magnitude", "projection")
    found = dict(zip(names, correlate({k: asked[k] for k in names}, {"y": y}, groups, draws=400, seed=seed)))
    half = groups[:, 1] % 2 == 0
    states = in_axes((cho[half], rej[half]), (cho[~half], rej[~half]), 6)
    found["rotation"] = explains("rotation", states, "rotation", groups=(groups[half], groups[~half]), draws=100, seed=seed)
    found["gain"] = gain_over("gain", asked["distance"], torch.randn(len(y), generator=generator(seed, "base")), y, groups, draws=200, seed=seed)
    return {name: h.p for name, h in found.items()}


@pytest.fixture(scope="module")
def found(): return [questions(seed) for seed in range(SETS)]


@pytest.mark.parametrize("name", ["cosine", "magnitude", "projection", "rotation"])
def test_nothing_is_found_more_often_than_stated(found, name):
    hits = sum(row[name] < .05 for row in found)
    assert within(hits, SETS, .05), f"{hits} of {SETS} empty data sets have p < .05"


def test_the_gain_of_nothing_over_nothing_is_no_finding(found):
    assert sum(row["gain"] < .05 for row in found) <= stats.binom.ppf(.999, SETS, .05)


@pytest.mark.parametrize("h", [16, 64])
def test_a_rotation_is_recovered_on_new_pairs(h):
    w = planted_rotation(h=h, seed=1)
    Q = procrustes(w.rej[:300], w.cho[:300])
    assert float((w.cho[300:].double() - w.rej[300:].double() @ Q).norm()/w.cho[300:].norm()) < 1e-3


def test_few_rows_of_logits_at_a_time_are_enough():
    g = generator(0, "lens")
    cho, rej, W = torch.randn(50, 16, generator=g), torch.randn(50, 16, generator=g), torch.randn(300, 16, generator=g)
    whole, few = lens_statistics(cho, rej, W), lens_statistics(cho, rej, W, budget=1)
    for name in whole: torch.testing.assert_close(whole[name], few[name], atol=1e-5, rtol=1e-4)


def test_alignment_of_noise_is_zero_and_of_a_rotation_one():
    g = generator(0, "alignment")
    x, y = torch.randn(2, 200, 500, generator=g)
    assert abs(unbiased_cka(x, y)) < .05
    assert unbiased_cka(x, x @ torch.linalg.qr(torch.randn(500, 500, generator=g)).Q) == pytest.approx(1, abs=1e-5)


def test_kinds_of_one_key_are_one_stratum():
    groups = torch.stack([torch.arange(30), torch.arange(30)], 1)
    assert strata(groups, 30).unique().tolist() == [0]
    x = torch.randn(30, generator=generator(0, "strata"))
    assert float(kendall(x, x, strata(groups, 30))) == pytest.approx(1)


def test_two_sets_with_one_direction_point_the_same_way():
    one, other = planted_direction(seed=1), planted_direction(seed=2)
    d = lambda w: w.cho - w.rej
    assert same_way("same", d(one)[::2], d(one)[1::2], one.groups[::2], one.groups[1::2]).p < .01
    assert same_way("not the same", d(one), d(other), one.groups, other.groups).p > .05
