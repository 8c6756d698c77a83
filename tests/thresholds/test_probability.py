"""The probability of a match: scikit-learn's own estimators on every pair one by one give the same."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss
from support import batches
from support.oracle import Array
from support.pair_list import PairList

from tcm_fused import MatchProbability, match_probability
from tcm_fused.thresholds.curve_plots import plot_reliability

pytestmark = pytest.mark.usefixtures("one_thread")


def data(seed: int, n: int = 70) -> tuple[Array, Array]:
    """Of a noise that makes positives and negatives overlap."""
    rng = np.random.default_rng(seed)
    y = rng.integers(8, size=n)
    return np.random.default_rng(5).standard_normal((8, 6))[y] + 0.8 * rng.standard_normal((n, 6)), y


def test_isotonic_of_every_pair() -> None:
    """But for the width of a cell, 7.6e-6."""
    x, y = data(0)
    pairs = PairList.of(x, y)
    found = match_probability(x, y)
    expected = IsotonicRegression(y_min=0, y_max=1).fit_transform(pairs.s, pairs.same)
    assert np.abs(found(pairs.s) - expected).mean() < 1e-3
    assert found.prior == pytest.approx(pairs.same.mean())
    assert found.reliability.brier == pytest.approx(brier_score_loss(pairs.same, expected), abs=1e-4)
    assert found.reliability.error < 1e-9, "isotonic regression is calibrated on its own data"
    assert (np.diff(found.probability) >= 0).all()


def test_platt_of_every_pair() -> None:
    x, y = data(0)
    pairs = PairList.of(x, y)
    found = match_probability(x, y, method="platt")
    model = LogisticRegression(C=1e6).fit(pairs.s[:, None], pairs.same)
    assert found(pairs.s) == pytest.approx(model.predict_proba(pairs.s[:, None])[:, 1], abs=2e-3)


@pytest.mark.parametrize("prior", [1e-30, 1e-12, 1e-6, 1e-4, 0.01, 0.5, 0.999, 1 - 1e-7, 1 - 1e-12])
def test_platt_is_fitted_to_the_end(prior: float) -> None:
    """Newton's method on every pair by itself, which weighs as the prior says."""
    x, y = data(2)
    pairs = PairList.of(x, y)
    a = np.stack((pairs.s, np.ones_like(pairs.s)), axis=1)
    weight = np.where(pairs.same, prior / pairs.same.sum(), (1 - prior) / (~pairs.same).sum())
    w = np.array([0.0, np.log(prior / (1 - prior))])
    for _ in range(60):
        p = 1 / (1 + np.exp(-a @ w))
        w -= np.linalg.solve(a.T @ (a * (weight * p * (1 - p))[:, None]), a.T @ (weight * (p - pairs.same)))
    s = np.linspace(-0.9, 0.9, 7)
    expected = 1 / (1 + np.exp(-(w[0] * s + w[1])))
    found = match_probability(x, y, method="platt", prior=prior)(s)
    assert found == pytest.approx(expected, rel=2e-3, abs=0)


def test_prior() -> None:
    """As if there were as many positive pairs as negative ones: each weighs as much as those of its kind together."""
    x, y = data(1)
    pairs = PairList.of(x, y)
    found = match_probability(x, y, prior=0.5)
    weight = np.where(pairs.same, 0.5 / pairs.same.sum(), 0.5 / (~pairs.same).sum())
    expected = IsotonicRegression(y_min=0, y_max=1).fit_transform(pairs.s, pairs.same, sample_weight=weight)
    assert np.abs(found(pairs.s) - expected).mean() < 1e-3
    assert found(0.9) > match_probability(x, y)(0.9) - 1e-12


@pytest.mark.parametrize("method", ["isotonic", "platt"])
def test_on_other_data(method: str) -> None:
    found = match_probability(*data(0, 300), method=method, prior=0.3)
    other = found.evaluate(*data(1, 300))
    assert other.error < 0.1
    assert 0 <= other.found.min() <= other.found.max() <= 1
    assert other.pairs.sum() == pytest.approx(300 * 299 / 2)
    bins = other.to_frame()
    assert list(bins) == ["told", "found", "pairs"]
    assert "calibration error" in plot_reliability(other).get_title(loc="left")
    assert found.plot().get_title(loc="left").endswith("on its own data")
    assert found.plot().get_xlabel() == "probability of a match, as told"
    assert "prior 0.3" in repr(found)
    assert found.to_dict()["method"] == method


def test_sets_and_groups() -> None:
    x, y = data(0)
    g: Any = np.arange(70) % 2
    assert match_probability(x, y, groups=g, group_pairs="across")(0.5) != match_probability(x, y)(0.5)
    assert match_probability(x[:40], y[:40], ref_emb=x[40:], ref_labels=y[40:]).reliability.pairs.sum() == 40 * 30


@pytest.mark.parametrize("method", ["isotonic", "platt"])
def test_file(method: str, tmp_path: Path) -> None:
    """It tells the same after `load`, to the bit."""
    found = match_probability(*data(0), method=method, prior=0.2)
    found.save(tmp_path / "p.json")
    again = MatchProbability.load(tmp_path / "p.json")
    s = np.linspace(-1, 1, 1001)
    assert (again(s) == found(s)).all()
    assert again.to_dict() == found.to_dict()
    assert again.evaluate(*data(1)).to_dict() == found.evaluate(*data(1)).to_dict()
    assert again.columns == 6
    with pytest.raises(ValueError, match="for embeddings of 6 columns, got 4"):
        again.evaluate(*batches.batch(20, 4, 3))


def test_report() -> None:
    """The similarity from which on a probability is reached."""
    found = match_probability(*data(0), prior=0.5)
    lines = found.report().splitlines()
    assert lines[0] == "isotonic, for pairs of which 50% match"
    at = float(lines[1].split()[-2])
    assert found(at + 1e-3) >= 0.5 > found(at - 0.02)
    never = MatchProbability("platt", 0.5, np.array([-1.0, 1.0]), np.array([0.5, 0.6]), found.reliability)
    assert "50 % sure      from similarity -1.0000 on" in never.report()
    assert "99 % sure      nowhere" in never.report()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "tcm_fused.threshold"}, "is no match probability: probability --save and"),
        ({"version": 7}, "has version 7, this program reads 1"),
        ({"version": True}, "has version True, this program reads 1"),
        ({"prior": 10**400}, "is damaged: "),
        ({"method": "beta"}, "is damaged: method='beta' is not known"),
        ({"prior": 1.5}, "is damaged: prior must lie between 0 and 1"),
        ({"similarity": [0.2, 0.1]}, "is damaged: similarity and probability must be alike in length"),
        ({"similarity": [0.2, 0.1], "probability": [0.1, 0.2]}, "is damaged: similarity must ascend"),
        ({"similarity": [0.2, 1.1], "probability": [0.1, 0.2]}, "is damaged: similarity must ascend"),
        ({"similarity": [0.1, 0.2], "probability": [0.2, 0.1]}, "is damaged: probability must not fall"),
        ({"similarity": [0.1, 0.2], "probability": [0.2, 1.1]}, "is damaged: probability must not fall"),
        ({"similarity": ["0.1"], "probability": [0.2]}, "is damaged: similarity must be a list of numbers"),
        ({"similarity": [], "probability": []}, "is damaged: similarity and probability must be alike"),
        ({"columns": 0}, "is damaged: columns must be a whole number"),
        ({"reliability": None}, "is damaged: reliability must be an object"),
        ({"reliability": {"told": [], "found": [], "pairs": [0.1], "brier": 0, "error": 0}}, "must be alike in length"),
        ({"reliability": {}}, "is damaged: it has no 'told'"),
    ],
    ids=str,
)
def test_damaged_files(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    match_probability(*data(0)).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        MatchProbability.load(path)


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = batches.batch(20, 4, 3)
    with pytest.raises(ValueError, match="method='beta' is not known"):
        match_probability(x, y, method="beta")
    with pytest.raises(ValueError, match="prior must lie between 0 and 1"):
        match_probability(x, y, prior=1.0)
    with pytest.raises(TypeError, match="'prio' is no argument of the sets; those are ref_emb"):
        match_probability(x, y, prio=0.1)
    with pytest.raises(TypeError, match="'label' is no argument of the sets"):
        match_probability(x, y).evaluate(x, y, label=y)
    with pytest.raises(ValueError, match="from -1 to 1, got 95 in size"):
        match_probability(x, y)([0.1, 95])
    with pytest.raises(TypeError, match="similarities must be numbers"):
        match_probability(x, y)(["0.9"])
    with pytest.raises(ValueError, match="similarities must be finite"):
        match_probability(x, y)(np.nan)
    assert sklearn.__version__
    for name in ("isotonic", "linear_model"):
        monkeypatch.setitem(__import__("sys").modules, f"sklearn.{name}", None)
    for method in ("isotonic", "platt"):
        with pytest.raises(ImportError, match="pip install scikit-learn"):
            match_probability(x, y, method=method)


def test_positives_that_are_the_less_similar() -> None:
    """Platt's curve would fall: the remedy is named. Isotonic regression is flat."""
    x, y = np.array([[1, 0], [-1, 0]] * 6, float), np.arange(12) // 2 % 2
    with pytest.raises(ValueError, match="look at the labels, or use method='isotonic'"):
        match_probability(x, y, method="platt")
    assert len(set(match_probability(x, y).probability)) == 1
