"""Comparisons with a planted truth: the interval covers, the tests keep their level, power is what was promised."""
import importlib.util
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from reprpo.judge.power import Noise, flip_p, half_widths, plant, power
from reprpo.judge.stats import crossed_interval, sign_flip

BENCH = Path(__file__).parent.parent / "bench" / "coverage.py"
TRIALS = 400
AT_LEAST, AT_MOST = 0.93, 0.97


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("coverage_bench", BENCH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def error(share: float, trials: int) -> float:
    "Three Monte-Carlo standard errors."
    return 3 * (share * (1 - share) / trials) ** 0.5


@pytest.mark.parametrize("seeds,layout,shape,sd", [
    (6, "100 rows", "counts", 2.0), (6, "300 rows", "lopsided", 1.0), (6, "four sets", "counts", 1.0), (6, "1000 rows", "counts", 4.0),
    (10, "300 rows", "counts", 0.0), (10, "four sets", "lopsided", 2.0), (20, "300 rows", "counts", 1.0), (20, "four sets", "normal", 4.0)])
def test_interval_covers_and_rule_keeps_its_level(bench, seeds, layout, shape, sd):
    cell = bench.measure(seeds, layout, shape, Noise(sd, 3.0, 7.0, 14.0), TRIALS, seed=5, n_boot=300)
    assert AT_LEAST - error(AT_LEAST, TRIALS) <= cell["coverage"] <= AT_MOST + error(AT_MOST, TRIALS), cell
    assert max(cell["better"], cell["worse"]) <= 0.025 + error(0.025, TRIALS), cell
    assert cell["better"] + cell["worse"] <= 0.05 + error(0.05, TRIALS), cell


@pytest.mark.parametrize("seeds", [6, 10])
def test_the_same_method_twice_is_seldom_called_different(bench, seeds):
    cell = bench.measure(seeds, "300 rows", "counts", Noise(1.0, 0.0, 0.0, 14.0), TRIALS, seed=6, n_boot=300)
    assert cell["flip"] <= 0.05 + error(0.05, TRIALS) and cell["better"] + cell["worse"] <= 0.05 + error(0.05, TRIALS), cell


@pytest.mark.parametrize("seeds", [5, 6, 8, 10])
def test_sign_flip_is_exact(seeds):
    "Over all sign patterns of the same sizes, p < .05 occurs in at most 5 %, and the fast version is the same test."
    sizes = np.random.default_rng(seeds).exponential(size=seeds)
    every = sizes * np.array(list(product((-1, 1), repeat=seeds)))
    p = flip_p(every, np.random.default_rng(0))
    assert (p < 0.05).mean() <= 0.05 and np.all([np.mean(p <= x) <= x + 1e-12 for x in np.unique(p)])
    np.testing.assert_allclose(p[::7], [sign_flip(x) for x in every[::7]])


def test_below_six_seeds_nothing_is_significant():
    assert [min(sign_flip(np.ones(s)), 1) < 0.05 for s in (3, 4, 5, 6, 7)] == [False, False, False, True, True]
    assert power(99.0, seeds=5) == 0.0 and power(99.0, seeds=6) == 1.0


def test_fast_half_width_is_the_interval():
    "Without the bootstrap's noise, on units of one size."
    means = np.random.default_rng(3).normal(size=(5, 8, 25)) + np.random.default_rng(4).normal(size=(5, 1, 25))
    slow = [crossed_interval(m, n_boot=20_000) for m in means]
    np.testing.assert_allclose(half_widths(means, 0.95), [(e.high - e.low) / 2 for e in slow], rtol=0.03)


@pytest.mark.parametrize("effect,changed", [(0.0, 0.05), (4.0, 0.08), (-3.0, 0.05)])
def test_planted_means_are_exact(effect, changed):
    rng, kind = np.random.default_rng(1), np.arange(300) % 30
    means = [plant(rng, effect, Noise(2.0, 3.0, 7.0, 14.0), 8, kind, changed).mean() for _ in range(400)]
    assert abs(np.mean(means) - effect) < 4 * np.std(means) / 20
    values = plant(rng, effect, Noise(2.0, 3.0, 7.0, 14.0), 8, kind, changed)
    assert set(np.unique(values)) <= {-100.0, 0.0, 100.0} and abs((values != 0).mean() - changed) < 0.03


def test_three_points_are_found_at_the_default_size(bench):
    "The judge's promise: a planted +3 is called better in at least 80 % of comparisons with 10 seeds."
    rng, (kind, group) = np.random.default_rng(8), bench.lay_out([(300, 20)] * 5)
    found = [crossed_interval(plant(rng, 3.0, Noise(2.0, 3.0, 7.0, 14.0), 10, kind, 0.05), kind, group, n_boot=300) for _ in range(120)]
    share = np.mean([e.low > 0 and sign_flip(e.per_seed) < 0.05 for e in found])
    assert share >= 0.8 and abs(share - power(3.0, 10, 1500, 100, Noise(2.0, 3.0, 7.0, 14.0))) < 0.12
