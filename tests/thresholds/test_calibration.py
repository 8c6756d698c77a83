"""Calibration and margins against the double loop, with ties, and with bounds finer than the data."""

import json
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import batches
from support.opis_oracle import Oracle, clustered

from tcm_fused import calibrate, opis, suggest_margins, tcm_loss
from tcm_fused.thresholds.rates import HALF

# Calibration and margins.


@pytest.mark.parametrize("bound", [0.3, 0.05, 0.004])
@pytest.mark.parametrize("name", ["far", "frr"])
def test_calibrate(backend: str, name: str, bound: float) -> None:
    """The bound holds at the threshold and not a step of the grid farther; the classes' rates are exact."""
    x, y = (t.numpy() for t in clustered(n=150, classes=12))
    x = x.astype(np.float64)
    asked: dict[str, Any] = {name: bound}
    found = calibrate(x, y, **asked, backend=backend)
    oracle = Oracle.of(x, y)
    t = found.threshold.similarity
    phi, psi, far, frr = oracle.rates(t)
    assert (found.threshold.far, found.threshold.frr) == pytest.approx((far, frr), abs=1e-12)
    assert np.allclose(found.class_frr, 1 - phi, rtol=0, atol=1e-12)
    assert np.allclose(found.class_far, 1 - psi, rtol=0, atol=1e-12)
    looser = oracle.rates(t - 1 / HALF)[2] if name == "far" else oracle.rates(t + 1 / HALF)[3]
    assert (far if name == "far" else frr) <= bound < looser
    assert found.threshold.distance == pytest.approx(math.sqrt(2 - 2 * t))
    assert found.worst(1)[0].value == found.class_frr.max()
    assert found.worst(1, "far")[0].value == found.class_far.max()
    assert found.spread()["far"]["max"] == found.class_far.max()
    for at in found.tar_at_far:
        assert at.far <= at.bound
        assert (at.far, 1 - at.tar) == pytest.approx(oracle.rates(at.similarity)[2:], abs=1e-12)
    grid = np.arange(2 * HALF + 1)[:: HALF // 512] / HALF - 1
    rates = np.array([oracle.rates(s)[2:] for s in grid])
    assert abs(found.equal_error.far - found.equal_error.frr) <= np.abs(rates[:, 0] - rates[:, 1]).min() + 1e-12
    utility = 2 * (1 - rates[:, 0]) * (1 - rates[:, 1]) / np.maximum(2 - rates.sum(1), 1e-300)
    best = found.best_utility
    assert 2 * (1 - best.far) * (1 - best.frr) / (2 - best.far - best.frr) >= utility.max() - 1e-12
    json.dumps(found.to_dict(), allow_nan=False)


def test_calibrate_with_equal_rows_of_two_classes() -> None:
    """Bounds that no threshold meets: an error if asked for, NaN in the table (None in JSON)."""
    x, y = torch.eye(3)[[0, 0, 0, 1, 1, 2]], torch.tensor([0, 0, 1, 1, 2, 2])
    with pytest.raises(ValueError, match=r"no threshold meets far=0\.1: at similarity 1 .* is still 0\.25"):
        calibrate(x, y, far=0.1)
    with pytest.raises(ValueError, match=r"no margin_minus meets far=0\.1"):
        suggest_margins(x, y, far=0.1, frr=0.5)
    found = calibrate(x, y, far=0.5)
    assert math.isnan(found.tar_at_far[0].tar)
    assert found.to_dict()["tar_at_far"][0]["tar"] is None


def test_similarity_1_is_left_to_rounding_nowhere(backend: str) -> None:
    """Equal rows of two classes in float32: whether their product reaches 1 decides no bound and no tie."""
    for d in range(2, 9):
        x, y = torch.ones(6, d), torch.tensor([0, 0, 0, 1, 1, 1])
        with pytest.raises(ValueError, match=r"no threshold meets far=0\.1"):
            calibrate(x, y, far=0.1, backend=backend)
        with pytest.raises(ValueError, match=r"no margin_minus meets far=0\.1"):
            suggest_margins(x, y, far=0.1, frr=0.5, backend=backend)
        assert calibrate(x, y, frr=0.1, backend=backend).threshold.frr == 0
    rng = np.random.default_rng(0)
    rows = np.repeat(rng.standard_normal((257, 33)).astype(np.float32), 4, axis=0)[:1027]
    order = rng.permutation(1027)
    result = opis(rows[order], np.tile([0, 0, 1, 1], 257)[order], thresholds=[0.5, 1.0], backend=backend)
    assert result.recall_at_1 == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_margins_with_ties(backend: str, dtype: torch.dtype) -> None:
    """Many pairs lie exactly at the margins: the loss mines the pairs that were counted."""
    rng = np.random.default_rng(1)
    x, y = torch.from_numpy(batches.dyadic(300, 12, rng)).to(dtype), torch.from_numpy(rng.integers(4, size=300))
    found = suggest_margins(x, y, far=0.2, frr=0.3, backend=backend)
    s = x.double() @ x.double().T
    assert bool((s == float(np.nextafter(np.float32(found.margin_plus), np.float32(1)))).any())
    margins: Any = {"margin_plus": found.margin_plus, "margin_minus": found.margin_minus}
    _, stats = tcm_loss(x, y, **margins, return_stats=True)
    assert (found.count_plus, found.count_minus) == (int(stats.count_plus), int(stats.count_minus))
    assert found.share_plus <= 0.3


def test_suggest_margins_mines_what_it_says(backend: str) -> None:
    x, y = clustered(n=700)
    found = suggest_margins(x.double(), y, far=0.03, frr=0.2, backend=backend)
    margins: Any = {"margin_plus": found.margin_plus, "margin_minus": found.margin_minus}
    _, stats = tcm_loss(x.double(), y, **margins, return_stats=True)
    assert (found.count_plus, found.count_minus) == (int(stats.count_plus), int(stats.count_minus))
    assert 0.19 < found.share_plus <= 0.2
    assert 0.0295 < found.share_minus <= 0.03
    json.dumps(found.to_dict(), allow_nan=False)


# Bounds that the data cannot tell, and margins that cross.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x, y: calibrate(x, y, far=1e-6),
            r"far=1e-06 is finer than the data: one of .* negative pairs .*above the most similar negative.*1,000,000",
        ),
        (
            lambda x, y: calibrate(x, y, frr=1e-5),
            r"frr=1e-05 is finer than the data: one of .* positive pairs .*below the least similar pos.* 100,000 pos",
        ),
        (lambda x, y: suggest_margins(x, y, far=1e-6, frr=0.9), "far=1e-06 is finer .*no negative is mined"),
        (lambda x, y: suggest_margins(x, y, far=0.9, frr=1e-6), "frr=1e-06 is finer .*no positive is mined"),
        (lambda x, y: opis(x, y, far_range=(1e-6, 0.1)), r"far_range=\(1e-06, 0.1\) begins at a rate that .* negative"),
        (lambda x, y: opis(x, y, frr_range=(1e-6, 0.1)), r"frr_range=\(1e-06, 0.1\) begins at a rate that .* positive"),
    ],
)
def test_bounds_finer_than_the_data(call: Callable[..., Any], message: str) -> None:
    """One warning, which names the bound and how many pairs it needs, shown once for each place by Python's filter."""
    x, y = clustered(n=200)
    with pytest.warns(UserWarning, match=message) as caught:
        call(x, y)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings(record=True) as shown:
        warnings.resetwarnings()
        warnings.simplefilter("default")
        for _ in range(3):
            call(x, y)
    assert len(shown) == 1


@pytest.mark.filterwarnings("error")
def test_bounds_that_the_data_can_tell() -> None:
    """Down to one pair: no warning. Of the rates that nobody asked for the result says which are too fine."""
    x, y = clustered(n=200)
    positives, negatives = calibrate(x, y, far=0.1).pairs
    found = calibrate(x, y, far=1.0001 / negatives)
    assert found.threshold.far == pytest.approx(1 / negatives)
    assert calibrate(x, y, frr=1.0001 / positives).threshold.frr == pytest.approx(1 / positives)
    opis(x, y, far_range=(1.0001 / negatives, 0.1))
    assert [at.finer for at in found.tar_at_far] == [at.bound * negatives < 1 for at in found.tar_at_far]
    assert found.tar_at_far[0].finer
    assert not found.tar_at_far[-1].finer
    assert found.report().count("fewer than one pair") == sum(at.finer for at in found.tar_at_far)


def test_margins_that_cross() -> None:
    """Of a model that tells nothing apart the shares give margins the wrong way round: said once, with the remedy."""
    x, y = batches.batch(300, 8, 12, torch.float32, seed=5)
    with pytest.warns(UserWarning, match="margin_plus=.* below margin_minus=.*larger shares") as caught:
        found = suggest_margins(x, y, far=0.01, frr=0.01)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert found.margin_plus < found.margin_minus
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = suggest_margins(x, y, far=0.6, frr=0.7)
    assert found.margin_plus > found.margin_minus
