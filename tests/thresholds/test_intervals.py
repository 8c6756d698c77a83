"""Intervals: those of scipy where it has them, and of the right width where pairs share embeddings."""

import math

import numpy as np
import pytest
from scipy import stats
from support import batches
from support.pair_list import PairList

from tcm_fused import evaluate
from tcm_fused.thresholds.intervals import (
    Interval,
    beta_quantile,
    binomial_interval,
    binomial_intervals,
    incomplete_beta,
    jackknife_variance,
    negative_trials,
    positive_trials,
    rate_interval,
    student_quantile,
)
from tcm_fused.thresholds.pairing import NothingToMeasure
from tcm_fused.thresholds.rates import Pairs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("n", [1, 2, 7, 50, 1_000, 7_000, 10**5, 10**7, 1_800_000_000])
def test_clopper_and_pearson_as_scipy(n: int) -> None:
    for k in {min(max(round(n * share), 1), n - 1) for share in (1e-6, 1e-3, 0.1, 0.5, 0.9)} - {0}:
        expected = stats.binomtest(k, n).proportion_ci(method="exact")
        assert binomial_interval(k, n) == pytest.approx((expected.low, expected.high), rel=1e-6)


def test_many_at_once_as_scipy() -> None:
    """Numbers of trials need not be whole; below one nothing is known."""
    rng = np.random.default_rng(0)
    total = np.exp(rng.uniform(0, 15, 500))
    events = total * rng.uniform(0, 1, 500) ** 3
    found = binomial_intervals(events, total)
    assert found[:, 0] == pytest.approx(stats.beta.ppf(0.025, events, total - events + 1), rel=1e-8)
    assert found[:, 1] == pytest.approx(stats.beta.ppf(0.975, events + 1, total - events), rel=1e-8)
    edges = binomial_intervals(np.array([0, 600, 0.4, 0]), np.array([600, 600, 0.9, 0]))
    assert edges.tolist() == [[0, 3 / 600], [1 - 3 / 600, 1], [0, 1], [0, 1]]


def test_trials_of_a_class() -> None:
    """Pairs without a common row, by hand: two at most of 4 rows, two of 5, three of 3 queries with 7 others."""
    assert positive_trials(np.array([6, 10, 1]), [np.array([4, 5, 2])]).tolist() == [2, 2, 1]
    assert positive_trials(np.array([21, 0]), [np.array([3, 0]), np.array([7, 4])]).tolist() == [3, 0]
    # Other classes, all of one size; or one that has nearly all of the pairs.
    assert negative_trials(np.array([4 * 3 * 4]), [np.full(4, 4)])[0] == 3
    alone = np.array([2, 1000, 1, 1])
    assert negative_trials(alone * (alone.sum() - alone), [alone])[0] == pytest.approx(1, abs=0.01)
    q, g = np.array([2, 3, 0, 1]), np.array([1, 0, 5, 2])
    m = np.array([[q[c] * g[j] + g[c] * q[j] if c != j else 0 for j in range(4)] for c in range(4)])
    assert negative_trials(m.sum(1), [q, g]) == pytest.approx(m.sum(1) ** 2 / (m**2).sum(1))


def test_rule_of_three() -> None:
    assert binomial_interval(0, 600) == (0, 3 / 600)
    assert binomial_interval(600, 600) == (1 - 3 / 600, 1)
    assert binomial_interval(0, 2) == (0, 1)


@pytest.mark.parametrize(("events", "total"), [(0, 0), (1, 0), (-1, 5), (6, 5), (math.nan, 5)])
def test_intervals_of_nothing(events: float, total: float) -> None:
    with pytest.raises(NothingToMeasure, match="there must be a trial"):
        binomial_interval(events, total)


def test_distributions_as_scipy() -> None:
    for a, b, x in [(0.3, 7.0, 0.01), (2.5, 0.5, 0.9), (40.0, 4_000.0, 0.011), (5e3, 5e3, 0.51), (4e3, 1e8, 4.1e-5)]:
        assert incomplete_beta(a, b, x) == pytest.approx(stats.beta.cdf(x, a, b), rel=1e-7)
    assert incomplete_beta(2, 3, [0, 1]).tolist() == [0, 1]
    for a, b in [(0.01, 3.0), (0.5, 1e6), (30.0, 2.0)]:
        assert beta_quantile(a, b, 0.025) == pytest.approx([stats.beta.ppf(0.025, a, b)], rel=1e-8)
    for freedom in (1, 2, 5, 30, 11_315):
        assert student_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-10)


def test_leaving_each_class_out_again() -> None:
    """The variance from the counts of the classes is that of doing it: without each class's rows, all over again."""
    rng = np.random.default_rng(3)
    y = rng.integers(9, size=60)
    x = batches.embeddings("groups", y, 5, rng)
    found = evaluate(x, y, threshold=0.4)
    for name in ("far", "frr"):
        without = np.array([getattr(PairList.of(x[y != c], y[y != c]), name)(0.4) for c in range(9)])
        n = found.pairs[name == "far"]
        independent = 9 if name == "frr" else n
        expected = rate_interval(getattr(found, name), without, n, independent)
        assert tuple(getattr(found, f"{name}_interval")) == pytest.approx(tuple(expected))
    assert jackknife_variance(np.array([1.0, 2.0, 3.0])) == pytest.approx(2 / 3 * 2)


def test_width_where_classes_differ() -> None:
    """Of 150 draws of 40 classes the interval holds the rate of the whole population in about 95 %; that which takes
    pairs as independent does not."""
    rng = np.random.default_rng(0)
    spread = rng.uniform(0.3, 1.5, size=2000)  # of each class of the population
    centres = rng.standard_normal((2000, 6))

    def draw(classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        y = np.repeat(classes, 4)
        return centres[y] + spread[y, None] * rng.standard_normal((len(y), 6)), y

    whole = evaluate(*draw(np.arange(2000)), threshold=0.6)
    held = np.zeros((2, 2))
    for _ in range(150):
        found = evaluate(*draw(rng.choice(2000, 40, replace=False)), threshold=0.6)
        for k, name in enumerate(("far", "frr")):
            rate, n = getattr(found, name), found.pairs[name == "far"]
            for kind, interval in enumerate((getattr(found, f"{name}_interval"), binomial_interval(rate * n, n))):
                held[kind, k] += interval.low <= getattr(whole, name) <= interval.high
    assert (held[0] >= 0.9 * 150).all(), held
    assert (held[1] <= 0.85 * 150).all(), held


def test_edges() -> None:
    assert rate_interval(0.0, np.zeros(5), 100) == (0, 0.03)
    assert rate_interval(1.0, np.ones(5), 100) == (0.97, 1)
    assert rate_interval(0.0, np.zeros(5), 100, independent=5) == (0, 0.6)
    for rate, without in ((0.5, [0.4, 0.6]), (0.0, [0.0, 0.0]), (1.0, [1.0])):
        assert rate_interval(rate, np.array(without), 100) == (0, 1), "two classes say nothing of others"
    assert rate_interval(0.5, np.array([0.4, 0.6, math.nan]), 100) == (0, 1), "without one class nothing is left"
    assert all(map(math.isnan, rate_interval(math.nan, np.ones(5), 0)))
    alike = rate_interval(0.5, np.full(10, 0.5), 100)
    assert alike.low < 0.41 < 0.59 < alike.high, "no better than so many independent pairs"
    assert str(Interval(0.01, 0.02)) == "1 to 2 %"


def test_intervals_of_one_class() -> None:
    """They hold the rates of the class in at least 95 % of the draws: of its samples, and of the other classes."""
    rng = np.random.default_rng(4)
    centre = np.array([1.0, 0, 0, 0, 0])

    def samples(n: int) -> np.ndarray:
        return centre + 0.6 * rng.standard_normal((n, 5))

    def others(classes: int) -> np.ndarray:
        return np.repeat(rng.standard_normal((classes, 5)), 3, axis=0) + 0.4 * rng.standard_normal((3 * classes, 5))

    def of_first(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """[2, 2] false accept and false reject rate of class 0, and the trials of each."""
        pairs = Pairs(x, y, "auto", progress=False)
        tp, fp, _ = (table[..., 0] for table in pairs.count(np.array([0.6]), all_classes=True).accepted(np.array([0])))
        positives, negatives, sizes = pairs.classes.positives, pairs.classes.negatives, pairs.sizes_of_sets
        trials = negative_trials(negatives, sizes)[0], positive_trials(positives, sizes)[0]
        return np.array([[fp[0] / negatives[0], 1 - tp[0] / positives[0]], trials])

    mine, y = samples(8), np.append(np.zeros(8, dtype=int), 1 + np.arange(90) // 3)
    many = np.append(np.zeros(2000, dtype=int), [1, 1, 1, 2, 2, 2])
    frr = of_first(np.append(samples(2000), others(2), 0), many)[0, 1]
    far = of_first(np.append(mine, others(3000), 0), np.append(np.zeros(8, dtype=int), 1 + np.arange(9000) // 3))[0, 0]
    assert 0.05 < frr < 0.95
    assert 0.01 < far < 0.95
    for side, rate in enumerate((far, frr)):
        draws = [of_first(np.append(samples(8) if side else mine, others(30), 0), y) for _ in range(200)]
        found, trials = np.array(draws)[:, :, side].T
        low, high = binomial_intervals(found * trials, trials).T
        assert ((low <= rate) & (rate <= high)).mean() >= 0.93


def test_intervals_of_classes_in_tables() -> None:
    x, y = batches.batch(200, 8, 9)
    found = evaluate(x, y, threshold=0.4)
    table = found.to_frame()
    for rate in ("far", "frr"):
        assert (table[f"{rate}_low"] <= table[rate]).all()
        assert (table[rate] <= table[f"{rate}_high"]).all()
        assert table[f"{rate}_high"].tolist() == getattr(found, f"class_{rate}_interval")[:, 1].tolist()
        worst = found.worst(1, rate)[0]
        assert worst.interval == tuple(
            getattr(found, f"class_{rate}_interval")[getattr(found, f"class_{rate}").argmax()]
        )
        assert str(worst).endswith(f"({worst.interval})")
