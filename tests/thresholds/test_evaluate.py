"""`evaluate`, and the targets of `calibrate`, by trying every threshold on a double loop over the pairs."""

import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import fbeta_score, precision_score
from support import batches
from support.oracle import Array
from support.pair_list import PairList, arguments, oracle_of, two_sets

from tcm_fused import Threshold, calibrate, evaluate, evaluate_trials
from tcm_fused.thresholds.pairing import NothingToMeasure
from tcm_fused.thresholds.rates import HALF
from tcm_fused.thresholds.trials import trial_similarities

pytestmark = pytest.mark.usefixtures("one_thread")

X = np.array([[2.0, 0.0], [0.6, 0.8], [0.0, 0.5], [-0.6, 0.8], [0.0, -3.0]])
Y = np.array([3, 3, 7, 7, 9])


def test_by_hand() -> None:
    """Similarities: positives 0.6 and 0.8; negatives 0, -0.6, 0.8, 0.28 and to the last row 0, -0.8, -1, -0.8."""
    found = evaluate(X, Y, threshold=0.1, beta=2.0)
    assert (found.far, found.frr) == (2 / 8, 0)
    assert found.precision == 2 / 4
    assert found.f_beta == pytest.approx(5 * 0.5 / (4 * 0.5 + 1))
    assert (found.pairs, found.accepted, found.queries) == ((2, 8), (2, 2), (4, 1))
    assert found.coverage == 4 / 5
    assert found.false_alarm_rate == 0
    assert found.class_ids.tolist() == [3, 7]
    assert found.class_far.tolist() == [2 / 6, 2 / 6]
    assert found.left_out == 1
    assert found.frr_interval == (0, 1), "two positive pairs: 3 / 2 is no rate"
    assert found.false_alarm_rate_interval == (0, 1)
    at = evaluate(X, Y, threshold=0.7)
    assert (at.far, at.frr, at.precision) == (1 / 8, 0.5, 0.5)
    assert at.detection_rate == 1 / 4, "that of row 3: the nearest of row 2 is a tie"
    none = evaluate(X, Y, threshold=1.0)
    assert (none.far, none.frr) == (0, 1)
    assert math.isnan(none.precision)
    assert all(map(math.isnan, none.precision_interval))
    assert none.to_dict()["precision"] is None
    assert none.frr_interval.high == 1


@given(seed=st.integers(0, 2**32))
@settings(max_examples=15)
def test_rates_are_those_of_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    y = rng.integers(6, size=40)
    x = batches.embeddings("random", y, 5, rng)
    pairs = PairList.of(x, y)
    t = pairs.clear(rng)
    found = evaluate(x, y, threshold=t, beta=0.5)
    accepted = pairs.s >= t
    assert found.precision == pytest.approx(precision_score(pairs.same, accepted, zero_division=np.nan), nan_ok=True)
    assert found.f_beta == pytest.approx(fbeta_score(pairs.same, accepted, beta=0.5, zero_division=0))
    for name in ("far", "frr", "precision", "coverage", "f_beta"):
        value, (low, high) = getattr(found, name), getattr(found, f"{name}_interval")
        assert math.isnan(value) or 0 <= low <= value <= high <= 1


def grid_rates(pairs: PairList, two: bool) -> dict[str, Array]:
    """At each threshold of the grid at which a rate changes: just above and just below each similarity."""
    cell = np.floor(pairs.s * HALF).astype(int)
    at = np.unique(np.concatenate((cell, cell + 1, [-HALF]))).clip(-HALF, HALF - 1) / HALF
    known, nearest = np.isfinite(pairs.best(two)[0]), np.maximum(*pairs.best(two))
    asked = np.isfinite(nearest)
    accepted = pairs.s[None] >= at[:, None]
    tp, fp = (accepted & pairs.same).sum(1), (accepted & ~pairs.same).sum(1)
    return {
        "at": at,
        "far": fp / (~pairs.same).sum(),
        "frr": (pairs.same.sum() - tp) / pairs.same.sum(),
        "precision": np.where(tp + fp > 0, tp / np.maximum(tp + fp, 1), 0),
        "coverage": (nearest[None, asked] >= at[:, None]).mean(1),
        "false_alarm": (nearest[None, asked & ~known] >= at[:, None]).mean(1) if (asked & ~known).any() else at,
        "f": 5 * tp / (5 * tp + 4 * (pairs.same.sum() - tp) + fp),
    }


@pytest.mark.parametrize("form", ["one", "two"])
@given(seed=st.integers(0, 2**32))
@settings(max_examples=8)
def test_targets_by_trying_every_threshold(form: str, seed: int) -> None:
    call = arguments(form, two_sets(np.random.default_rng(seed), n=30, m=30))
    pairs = oracle_of(call)
    rates = grid_rates(pairs, form == "two")
    at = rates["at"]
    best = rates["precision"].max()
    expected = {
        "precision": (0.9 * best, at[rates["precision"] >= 0.9 * best].min()),
        "coverage": (0.6, at[rates["coverage"] >= 0.6].max()),
        "far": (0.1, at[rates["far"] <= 0.1].min()),
        "frr": (0.3, at[rates["frr"] <= 0.3].max()),
    }
    if rates["false_alarm"] is not at:
        expected["false_alarm"] = (0.5, at[rates["false_alarm"] <= 0.5].min())
    for name, (bound, threshold) in expected.items():
        found = calibrate(**call, **{name: bound})
        assert found.threshold.similarity == pytest.approx(threshold, abs=1e-12), name
        assert found.bound == {name: bound}
    found = calibrate(**call, f_beta=2.0)
    assert evaluate(**call, threshold=found.threshold, beta=2.0).f_beta == pytest.approx(rates["f"].max())
    found = calibrate(**call, eer=True)
    assert abs(found.threshold.far - found.threshold.frr) == pytest.approx(np.abs(rates["far"] - rates["frr"]).min())
    assert found.threshold.similarity == found.equal_error.similarity
    found = calibrate(**call, min_dcf=0.2, costs=(3.0, 1.0))
    cost = 3 * 0.2 * rates["frr"] + 0.8 * rates["far"]
    assert 3 * 0.2 * found.threshold.frr + 0.8 * found.threshold.far == pytest.approx(cost.min())
    assert found.bound == {"min_dcf": 0.2, "cost_miss": 3.0, "cost_accept": 1.0}


def test_targets_that_cannot_be_met() -> None:
    x, y = torch.eye(3)[[0, 0, 0, 1, 1, 2]], torch.tensor([0, 0, 1, 1, 2, 2])
    with pytest.raises(NothingToMeasure, match=r"no threshold meets precision=0\.9: the highest at any is 0.25"):
        calibrate(x, y, precision=0.9)
    with pytest.raises(NothingToMeasure, match="false_alarm needs queries without a positive"):
        calibrate(x, y, false_alarm=0.1)
    stranger = torch.cat((x, x[:1])), torch.cat((y, torch.tensor([9])))
    with pytest.raises(NothingToMeasure, match=r"no threshold meets false_alarm=0\.1: .* the rate is still 1"):
        calibrate(*stranger, false_alarm=0.1)


def test_false_alarms_finer_than_the_data() -> None:
    x, y = batches.batch(60, 4, 10)
    y[:3] = torch.tensor([20, 21, 22])
    with pytest.warns(UserWarning, match="false_alarm=0.1 is finer than the data: one of 3 queries that nothing"):
        found = calibrate(x, y, false_alarm=0.1)
    assert evaluate(x, y, threshold=found).false_alarm_rate == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "give exactly one of far and frr"),
        ({"eer": True, "far": 0.1}, ValueError, "give exactly one of"),
        ({"eer": 1}, TypeError, "eer must be True or False"),
        ({"precision": 0}, ValueError, "precision must lie between 0 and 1"),
        ({"coverage": 1.0}, ValueError, "coverage must lie between 0 and 1"),
        ({"f_beta": 0}, ValueError, "f_beta must be above 0"),
        ({"f_beta": "1"}, TypeError, "f_beta must be a number"),
        ({"min_dcf": 1.5}, ValueError, "min_dcf must lie between 0 and 1"),
        ({"min_dcf": 0.1, "costs": (1, 0)}, ValueError, "the cost of a false accept must be above 0"),
        ({"min_dcf": 0.1, "costs": 2}, TypeError, "costs must be a pair"),
        ({"far": 0.1, "costs": (2, 1)}, ValueError, "are those of min_dcf"),
    ],
)
def test_bad_targets(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        calibrate(X, Y, **options)


def test_dtypes_and_backends_agree() -> None:
    x, y = batches.batch(300, 8, 20)
    expected = evaluate(x, y, threshold=0.3)
    for form in (x.numpy(), x.tolist(), x.double()):
        assert evaluate(form, y, threshold=0.3).far == pytest.approx(expected.far, abs=1e-4)
    torch_form = evaluate(x, y, threshold=0.3, backend="torch")
    assert torch_form.far == pytest.approx(expected.far, abs=1e-4)
    half = evaluate(x.half(), y, threshold=0.3)
    assert half.far == evaluate(x.half().float(), y, threshold=0.3).far


def test_a_threshold_decides_by_all_its_digits() -> None:
    """Similarities of exactly float32(0.3), which is above 0.3, and of the number below."""
    above = float(np.float32(0.3))
    below = float(np.nextafter(np.float32(0.3), np.float32(0)))
    assert below < 0.3 < above
    x = np.array([[1.0, 0.0], [1.0, 0.0], [above, math.sqrt(1 - above**2)], [above, math.sqrt(1 - above**2)]])
    y = np.array([0, 0, 1, 1])
    for t, far in ((0.3, 1.0), (above, 1.0), (float(np.nextafter(above, 1)), 0.0)):
        assert evaluate(x, y, threshold=t).far == far or t == above  # rounding of the products decides at the edge
    found = calibrate(x, y, far=0.5)
    assert evaluate(x, y, threshold=found.threshold).far == found.threshold.far


def test_result_in_every_form() -> None:
    x, y = batches.batch(200, 8, 12)
    found = evaluate(x, [f"class {c}" for c in y.tolist()], threshold=0.3, groups=y % 2 + torch.arange(200) % 2)
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["threshold"]["similarity"] == 0.3
    assert content["far_interval"] == {"low": found.far_interval.low, "high": found.far_interval.high}
    assert pickle.loads(pickle.dumps(found)).far == found.far
    table = found.to_frame()
    ends = ["far_low", "far_high", "frr_low", "frr_high"]
    assert list(table) == ["class", "samples", "far", "frr", "positive_pairs", "negative_pairs", *ends]
    assert table["frr"].tolist() == found.class_frr.tolist()
    assert found.to_markdown().startswith("| rate | value | low | high |")
    text = str(found)
    assert len(text.splitlines()) <= 10
    assert f"{100 * found.far:.4g} %" in text
    assert text.isascii()
    assert found.report(worst=3).count("samples)") == 6
    assert "| group | FAR | FRR |" in found.report()
    assert found.worst(1, "far")[0].value == found.class_far.max()
    assert "Groups: " in repr(found.groups)


def test_rule_of_three_where_nothing_was_observed() -> None:
    x, y = np.repeat(np.eye(30), 5, axis=0), np.repeat(np.arange(30), 5)
    found = evaluate(x, y, threshold=0.5)
    positives, negatives = found.pairs
    assert found.far_interval == (0, 3 / negatives)
    assert found.frr_interval == (0, 3 / 30), "of the classes: positive pairs of one stand or fall together"
    assert found.precision_interval == (1 - 3 / positives, 1)
    assert found.coverage_interval == (1 - 3 / 150, 1)
    assert f"0 of {negatives:,} negative pairs, by the rule of three" in str(found)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_opposite_rows_at_minus_one(dtype: Any) -> None:
    """Their similarity is rounded to below -1 in part, and at -1 all pairs are accepted, in every figure."""
    x = np.random.default_rng(0).standard_normal((60, 9)).astype(dtype)
    x, y = np.concatenate((x, -x)), np.arange(120) // 2 % 30
    for threshold in (-1.0, calibrate(x, y, precision=1e-4).threshold):
        found = evaluate(x, y, threshold=threshold)
        assert (found.far, found.frr, found.coverage) == (1, 0, 1)
        assert found.class_far.min() == 1
    assert calibrate(x, y, precision=1e-4).class_far.min() == 1
    assert Threshold(-1.0).accepts(x[0], -x[0])
    assert Threshold(-1.0).accepts(torch.tensor(-1.0 - 1e-7))


def test_few_classes() -> None:
    """Two say nothing of others, whatever the rate; a few say little, and the report says so."""
    x, y = np.repeat(np.eye(12), 4, axis=0), np.repeat(np.arange(12), 4)
    two = evaluate(x[:8], y[:8], threshold=0.5)
    assert (two.far, two.far_interval, two.frr, two.frr_interval) == (0, (0, 1), 0, (0, 1))
    assert "rule of three" not in two.report()
    assert "intervals of 12 classes hold less often than the 95 %" in evaluate(x, y, threshold=0.5).report()
    many = evaluate(np.repeat(np.eye(20), 4, axis=0), np.repeat(np.arange(20), 4), threshold=0.5).report()
    assert "hold less often" not in many
    assert "positive pairs, by the rule of three over the classes" in many


@pytest.mark.parametrize("size", [1e200, 1e-9, 1e-300, 1.0])
def test_rows_of_any_length_are_decided_alike(size: float) -> None:
    """A pair by itself as in the counts; rows that are shorter than 1e-12 count as zero there and here."""
    x = size * np.array([[1.0, 0], [0.8, 0.6], [0, 1.0], [-1.0, 0]])
    found = evaluate(x, [0, 0, 1, 1], threshold=0.5)
    assert found.frr == 1 - Threshold(0.5).accepts(x[0], x[1]) * 0.5
    assert found.frr == evaluate_trials(trial_similarities(x, [0, 2, 0], [1, 3, 2]), [1, 1, 0], threshold=0.5).frr
