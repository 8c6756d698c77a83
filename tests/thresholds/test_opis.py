"""OPIS, calibration and margins against a NumPy double loop in fp64, by hand, and at their borders."""

import doctest
import importlib
import json
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import batches
from support.oracle import Array
from torch import Tensor

from tcm_fused import calibrate, opis, suggest_margins, tcm_loss, warn
from tcm_fused.backends import choice
from tcm_fused.thresholds.rates import BITS, HALF, Pairs

NEAR = 1e-6  # pairs this near to an edge may fall on either side of it


@dataclass(frozen=True)
class Oracle:
    """Every pair once, in fp64, and everything by its definition."""

    s: Array  # [P] similarity
    first: Array  # [P] label of either row
    second: Array
    labels: Array  # [N]

    @classmethod
    def of(cls, x: Array, y: Array) -> "Oracle":
        x, y = x[y >= 0].astype(np.float64), y[y >= 0]
        unit = x / np.maximum(np.hypot.reduce(x, axis=1)[:, None], 1e-12)
        s, first, second = [], [], []
        for i in range(len(y)):
            for j in range(i + 1, len(y)):
                s.append(float(unit[i] @ unit[j]))
                first.append(y[i])
                second.append(y[j])
        return cls(np.array(s), np.array(first), np.array(second), y)

    @property
    def classes(self) -> Array:
        ids, sizes = np.unique(self.labels, return_counts=True)
        counted: Array = ids[sizes > 1]
        return counted

    def rates(self, t: float) -> tuple[Array, Array, float, float]:
        """Sensitivity and specificity of each class, false accept and false reject rate of all pairs."""
        same = self.first == self.second
        phi, psi = [], []
        for c in self.classes:
            positive, negative = same & (self.first == c), ~same & ((self.first == c) | (self.second == c))
            phi.append(float((self.s[positive] >= t).mean()))
            psi.append(float((self.s[negative] < t).mean()))
        return np.array(phi), np.array(psi), float((self.s[~same] >= t).mean()), float((self.s[same] < t).mean())

    def clear(self, thresholds: Array) -> bool:
        """No pair is too near to any of the thresholds."""
        gap = np.abs(self.s[:, None] - thresholds)
        return not bool((gap < NEAR).any())


def scores(phi: Array, psi: Array, axis: Array, beta: float, epsilon: float) -> tuple[float, float]:
    """OPIS and epsilon-OPIS from rates [C, K] at thresholds [K], in loops, as the formulas say."""
    u = np.zeros_like(phi)
    for c in range(phi.shape[0]):
        for k in range(phi.shape[1]):
            if phi[c, k] + psi[c, k] > 0:
                u[c, k] = (1 + beta**2) * phi[c, k] * psi[c, k] / (beta**2 * phi[c, k] + psi[c, k])

    def mean(values: Array) -> float:
        return float(np.trapezoid(values, axis)) / float(axis[-1] - axis[0])

    average = u.mean(axis=0)
    ranked = sorted(range(len(u)), key=lambda c: mean(u[c]))
    size = math.ceil(epsilon * len(u))
    worst, rest = u[ranked[:size]].mean(axis=0), u[ranked[size:]].mean(axis=0) if size < len(u) else None
    return float(np.mean([mean((row - average) ** 2) for row in u])), 0.0 if rest is None else mean((worst - rest) ** 2)


def as_distance(s: Any) -> Array:
    return np.sqrt(2 - 2 * np.asarray(s))


# By hand: (1, 0), (0.6, 0.8) of class 3; (0, 1), (-0.6, 0.8) of class 7; a class of one, (0, -1).
X = np.array([[2.0, 0.0], [0.6, 0.8], [0.0, 0.5], [-0.6, 0.8], [0.0, -3.0]])
Y = np.array([3, 3, 7, 7, 9])


def test_by_hand(backend: str) -> None:
    """Similarities: positives 0.6 (class 3) and 0.8 (class 7); negatives 0, -0.6, 0.8, 0.28 between the two classes;
    0, -0.8 (class 3) and -1, -0.8 (class 7) to the row alone."""
    result = opis(X, Y, thresholds=[-0.7, 0.1, 0.7], distance="cosine", beta=2.0, epsilon=0.5, backend=backend)
    assert result.class_ids.tolist() == [3, 7]
    assert result.class_sizes.tolist() == [2, 2]
    assert result.left_out == 1
    assert result.sensitivity.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert np.allclose(result.specificity, [[1 / 6, 4 / 6, 5 / 6], [2 / 6, 4 / 6, 5 / 6]], rtol=0, atol=1e-15)
    assert np.allclose(result.far, [5 / 8, 2 / 8, 1 / 8], rtol=0, atol=1e-15)
    assert result.frr.tolist() == [0, 0, 0.5]
    u3 = [5 / 6 / (4 + 1 / 6), 5 * 4 / 6 / (4 + 4 / 6), 0]
    u7 = [5 * 2 / 6 / (4 + 2 / 6), 5 * 4 / 6 / (4 + 4 / 6), 5 * 5 / 6 / (4 + 5 / 6)]
    assert np.allclose(result.utility, [u3, u7], rtol=0, atol=1e-15)
    # Half the squared difference, squared: the deviation of two from their mean. Two steps of 0.8 and 0.6, of 1.4.
    d = (np.array(u7) - u3) ** 2
    integral = (0.8 * (d[0] + d[1]) / 2 + 0.6 * (d[1] + d[2]) / 2) / 1.4
    assert result.opis == pytest.approx(integral / 4, rel=1e-12)
    assert result.eps_opis == pytest.approx(integral, rel=1e-12)
    # Row 0's nearest is its own class; row 1 and row 2 are nearest to each other (0.8), a tie with its own for row 2.
    assert result.recall_at_1 == 0.5
    assert [w.class_id for w in result.worst(1)] == [3]


@pytest.mark.parametrize("axis", ["euclidean", "cosine"])
@given(data=st.data())
@settings(max_examples=12)
def test_against_the_double_loop(backend: str, axis: str, data: st.DataObject) -> None:
    """Random ragged sets, of every geometry: each rate exactly, and OPIS within 1e-9."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    n, classes = data.draw(st.integers(5, 60)), data.draw(st.integers(2, 20))
    y = rng.integers(-1, classes, size=n)
    y[:4] = [0, 0, 1, 1]
    dtype = data.draw(st.sampled_from([np.float32, np.float64]))
    x = batches.embeddings(data.draw(st.sampled_from(batches.KINDS)), y, data.draw(st.integers(1, 20)), rng).astype(
        dtype
    )
    oracle = Oracle.of(x, y)
    t = np.sort(rng.uniform(-1, 1, size=data.draw(st.integers(2, 12))))
    while not oracle.clear(t) or not (np.diff(t) > 1e-4).all():
        t = np.sort(rng.uniform(-1, 1, size=len(t)))
    given_thresholds = t if axis == "cosine" else as_distance(t)[::-1]
    beta, epsilon = data.draw(st.sampled_from([0.5, 1.0, 3.0])), data.draw(st.sampled_from([0.1, 0.34, 0.9]))
    result = opis(x, y, thresholds=given_thresholds, distance=axis, beta=beta, epsilon=epsilon, backend=backend)
    expected = [oracle.rates(s) for s in result.similarity]
    assert result.class_ids.tolist() == oracle.classes.tolist()
    for name, k in (("sensitivity", 0), ("specificity", 1)):
        assert np.allclose(getattr(result, name), np.stack([e[k] for e in expected], 1), rtol=0, atol=1e-12), name
    for name, k in (("far", 2), ("frr", 3)):
        assert np.allclose(getattr(result, name), np.array([e[k] for e in expected]), rtol=0, atol=1e-12), name
    phi, psi = (np.stack([e[k] for e in expected], 1) for k in (0, 1))
    want = scores(phi, psi, np.asarray(given_thresholds), beta, epsilon)
    assert result.opis == pytest.approx(want[0], abs=1e-9)
    ranks = np.sort(result.class_utility)
    size = math.ceil(epsilon * len(ranks))
    if size == len(ranks) or ranks[size] - ranks[size - 1] > 1e-12:  # ties: which class is "worst" is left to rounding
        assert result.eps_opis == pytest.approx(want[1], abs=1e-9)


@pytest.mark.parametrize("bits", [1, 6, BITS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("n", "d", "classes"), [(2, 1, 2), (65, 3, 1), (300, 7, 40), (1100, 16, 3), (1300, 16, 500)], ids=str
)
def test_kernel_counts(n: int, d: int, classes: int, dtype: torch.dtype, bits: int) -> None:
    """The kernel's tables are the definition's: exact where similarities are, which all sides then see alike."""
    rng = np.random.default_rng(n + bits)
    x, y = batches.dyadic(n, d, rng), rng.integers(-1, classes, size=n)
    tables = max(1, 2 * classes // 3)  # the rest of the classes share a row
    t = np.unique(np.append(rng.uniform(-1.2, 1.2, 20), [-1.0, -0.25, 0.0, 0.5, 1.0]))
    arguments = (torch.from_numpy(x).to(dtype), torch.from_numpy(y), tables, torch.from_numpy(t).to(dtype), bits)
    progress = torch.zeros(2, dtype=torch.int64)
    counts, class_counts, best = torch.ops.tcm_fused.counts(*arguments, progress)
    assert progress[0] == progress[1] >= (y >= 0).any()
    part = y >= 0
    unit = x[part] / np.maximum(np.linalg.norm(x[part], axis=1, keepdims=True), 1e-12)
    s, row = unit @ unit.T, np.minimum(y[part], tables)
    same = y[part][:, None] == y[part]
    i, j = np.triu_indices(len(s), 1)
    for side, mask in enumerate((same, ~same)):
        taken = mask[i, j]
        value, a, b = s[i, j][taken], row[i][taken], row[j][taken]
        cell = np.floor(value * 2**bits).astype(int) + 2**bits
        assert np.array_equal(counts[side], np.bincount(cell, minlength=2 * 2**bits + 1))
        k = np.searchsorted(t.astype(x.dtype if dtype == torch.float64 else np.float32), value, side="right") - 1
        want = np.zeros((tables + 1, len(t)), dtype=np.int64)
        np.add.at(want, (a[k >= 0], k[k >= 0]), 1)
        if side == 1:
            np.add.at(want, (b[k >= 0], k[k >= 0]), 1)
        assert np.array_equal(class_counts[side], want)
        others = np.where(mask & ~np.eye(len(s), dtype=bool), s, -np.inf).max(axis=1, initial=-np.inf)
        assert np.array_equal(best[side][torch.from_numpy(part)].numpy(), others)
        assert bool((best[side][torch.from_numpy(~part)] == -torch.inf).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kernel_and_blocked_form_agree(dtype: torch.dtype) -> None:
    """On similarities that are not exact: a pair may move by one cell, and then only near its edge."""
    x, y = batches.batch(2100, 24, 90, dtype, seed=3)
    t = torch.linspace(-0.2, 0.8, 33, dtype=dtype)
    kernel = torch.ops.tcm_fused.counts(x, y, 90, t, 10, None)
    blocked = torch.ops.tcm_fused.counts_blocked(x, y, 90, t, 10, None)
    for ours, theirs in zip(kernel[:2], blocked[:2], strict=True):
        moved = (ours.cumsum(-1) - theirs.cumsum(-1)).abs().max()
        assert moved <= (2100**2 * 1e-6 if dtype == torch.float32 else 0)
    assert torch.equal(kernel[0].sum(1), blocked[0].sum(1))
    # Sums of 24 products in another order: 2 eps apart with one BLAS, not always the same with another. Either may be
    # off by sqrt(24) / 2 eps in one deviation, and largest values of 2100 rows are compared: 2 deviations of the two.
    assert torch.allclose(kernel[2], blocked[2], rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("classes", [3, 900, 4000])
def test_kernel_over_many_blocks(classes: int) -> None:
    """Blocks of full size, runs of several, classes within a block and across many; similarities are exact."""
    rng = np.random.default_rng(classes)
    x, y = torch.from_numpy(batches.dyadic(4700, 12, rng)), torch.from_numpy(rng.integers(-1, classes, size=4700))
    t = torch.tensor([-0.5, -0.25, 0.0, 0.25, 0.75, 1.0], dtype=torch.float64)
    kernel = torch.ops.tcm_fused.counts(x, y, classes // 2, t, 4, None)
    blocked = torch.ops.tcm_fused.counts_blocked(x, y, classes // 2, t, 4, None)
    in_float32 = torch.ops.tcm_fused.counts(x.float(), y, classes // 2, t.float(), 4, None)
    for ours, theirs, single in zip(kernel, blocked, in_float32, strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(ours, single.to(ours.dtype))
    assert int(kernel[0].sum()) == int((y >= 0).sum()) * int((y >= 0).sum() - 1) // 2


def test_counts_beyond_2_31() -> None:
    """A collapsed set: more than 2^31 pairs in one cell of the grid and of a class."""
    n = 66_000
    y = torch.zeros(n, dtype=torch.int64).index_fill(0, torch.tensor(n - 1), 1)
    counts, class_counts, _ = torch.ops.tcm_fused.counts(torch.ones(n, 1), y, 1, torch.tensor([0.5]), 3, None)
    positives = (n - 1) * (n - 2) // 2
    assert positives > 2**31
    assert counts[:, -1].tolist() == [positives, n - 1]
    assert counts[:, :-1].sum() == 0
    assert class_counts.tolist() == [[[positives], [0]], [[n - 1], [n - 1]]]


def test_arrays_of_any_layout() -> None:
    """Read-only, reversed and Fortran-ordered arrays are taken as they are, without a warning."""
    x, y = (t.numpy() for t in clustered(n=200))
    expected = opis(x, y)
    odd = np.asfortranarray(x[::-1])[::-1]
    odd.setflags(write=False)
    labels = y.copy()
    labels.setflags(write=False)
    assert opis(odd, labels).to_dict() == expected.to_dict()
    assert opis(x[::-1], y[::-1]).recall_at_1 == expected.recall_at_1


def test_opcheck() -> None:
    x, y = batches.batch(40, 5, 6)
    for name in ("counts", "counts_blocked"):
        operator = getattr(torch.ops.tcm_fused, name).default
        for progress in (None, torch.zeros(2, dtype=torch.int64)):
            torch.library.opcheck(operator, (x, y, 6, torch.tensor([0.0, 0.5]), 5, progress))


def test_counts_in_float32(backend: str) -> None:
    """512 columns in float32: each count is the exact one but for pairs within 1e-6 of the threshold."""
    x, y = clustered(n=800, classes=50, d=512, seed=4)
    t = np.linspace(-0.1, 0.9, 200)
    result = opis(x, y, thresholds=t, distance="cosine", backend=backend)
    unit = x.double().numpy()
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    s = unit @ unit.T
    for c, label in enumerate(result.class_ids):
        mine = y.numpy() == label
        pairs = s[np.ix_(mine, mine)][np.triu_indices(mine.sum(), 1)], s[np.ix_(mine, ~mine)].ravel()
        for values, share in zip(pairs, (result.sensitivity[c], 1 - result.specificity[c]), strict=True):
            values = np.sort(values)
            accepted = np.rint(share * len(values))
            assert (accepted >= len(values) - np.searchsorted(values, t + NEAR)).all()
            assert (accepted <= len(values) - np.searchsorted(values, t - NEAR)).all()


def clustered(n: int = 900, classes: int = 60, d: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Classes of very different tightness: OPIS has something to find."""
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=n)
    spread = rng.uniform(0.3, 1.2, size=classes)[y]
    x = rng.standard_normal((classes, d))[y] + spread[:, None] * rng.standard_normal((n, d))
    return torch.from_numpy(x).float(), torch.from_numpy(y)


@pytest.mark.parametrize("axis", ["euclidean", "cosine"])
@pytest.mark.parametrize("name", ["far_range", "frr_range"])
def test_calibration_range(backend: str, name: str, axis: str) -> None:
    """The thresholds fill the range of the rates, evenly but for the grid, and all figures are those at them."""
    x, y = clustered()
    bounds = (0.02, 0.2)
    asked: dict[str, Any] = {name: bounds}
    result = opis(x, y, **asked, num_thresholds=31, distance=axis, backend=backend)
    rate = result.far if name == "far_range" else result.frr
    assert bounds[0] <= rate.min() and rate.max() <= bounds[1]
    assert rate.min() < bounds[0] * 1.2 and rate.max() > bounds[1] / 1.02  # to a step of the grid
    assert len(result.thresholds) == 31
    assert (np.diff(result.thresholds) > 0).all()
    step = np.diff(result.thresholds)
    assert step.max() < 1.6 * step.mean()
    assert np.array_equal(result.similarity * HALF, np.rint(result.similarity * HALF))
    again = opis(x.double(), y, thresholds=result.thresholds, distance=axis, backend=backend)
    assert np.allclose(again.utility, result.utility, rtol=0, atol=2e-3)  # pairs on an edge
    want = scores(result.sensitivity, result.specificity, result.thresholds, 1.0, 0.1)
    assert (result.opis, result.eps_opis) == pytest.approx(want, abs=1e-12)
    assert result.curves is not None
    assert (
        result.curves.similarity.min()
        < result.similarity.min()
        < result.similarity.max()
        < result.curves.similarity.max()
    )
    shared = np.isin(result.curves.similarity, result.similarity)
    own = np.isin(result.similarity, result.curves.similarity)
    order = np.argsort(result.similarity[own])
    assert shared.any()
    assert np.allclose(result.curves.utility[:, shared], result.utility[:, own][:, order], rtol=0, atol=1e-6)


def test_a_wrong_guess_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the sample misleads, the pass is made again and the result is the same range."""
    x, y = clustered(n=2600)
    expected = opis(x, y)
    pairs = Pairs
    wrong = pairs(torch.randn(64, 3, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 4, "cpu", False)
    passes = []
    count = pairs.count
    misled = wrong.sample()

    def counted(self: Any, thresholds: Array) -> Any:
        passes.append(len(thresholds))
        return count(self, thresholds)

    monkeypatch.setattr(pairs, "sample", lambda self: misled)
    monkeypatch.setattr(pairs, "count", counted)
    result = opis(x, y)
    assert len(passes) == 2
    assert (result.similarity[0], result.similarity[-1]) == pytest.approx(
        (expected.similarity[0], expected.similarity[-1]), abs=2e-3
    )
    assert result.opis == pytest.approx(expected.opis, rel=1e-2)
    assert 0.01 <= result.far.min() <= result.far.max() <= 0.1


def distances(x: Array, y: Array) -> tuple[Array, Array]:
    """Of all positive and of all negative pairs, ascending."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    i, j = np.triu_indices(len(y), 1)
    d = as_distance(np.minimum((unit @ unit.T)[i, j], 1))
    return np.sort(d[y[i] == y[j]]), np.sort(d[y[i] != y[j]])


@pytest.mark.parametrize("low", [0.01, 0.3])
def test_range_that_reaches_distance_0(low: float) -> None:
    """Some classes have collapsed: the range is as even and as long there as anywhere, and so is the score."""
    rng = np.random.default_rng(0)
    y = np.arange(3000) % 30
    centres = rng.standard_normal((30, 64))
    spread = 10 ** np.linspace(-2.5, -0.2, 30) / 8
    x = (centres / np.linalg.norm(centres, axis=1, keepdims=True))[y] + spread[y, None] * rng.standard_normal(
        (3000, 64)
    )
    result = opis(x, y, frr_range=(low, 0.9))
    ends = np.quantile(distances(x, y)[0], [0.1, 1 - low])
    assert np.abs(result.distance[[0, -1]] - ends).max() < (ends[1] - ends[0]) / 200
    expected = opis(x, y, thresholds=np.linspace(ends[0], ends[1], 1001))
    assert result.opis == pytest.approx(expected.opis, rel=5e-3)
    assert result.eps_opis == pytest.approx(expected.eps_opis, rel=5e-3)


@pytest.mark.parametrize("axis", ["euclidean", "cosine"])
@pytest.mark.parametrize("number", [2, 5])
def test_few_thresholds_span_the_range(number: int, axis: str) -> None:
    x, y = (t.numpy() for t in clustered(n=3000))
    found = opis(x, y, num_thresholds=number, distance=axis).distance
    ends = np.quantile(distances(x.astype(np.float64), y)[1], [0.01, 0.1])
    assert len(found) == number
    assert np.abs(np.sort(found)[[0, -1]] - ends).max() < (ends[1] - ends[0]) / 200


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the sample has too few pairs to tell, the range is found first; the classes' counts keep to the bound."""
    x, y = clustered(n=3000, classes=900)
    most, passes, count = 700_000, [], Pairs.count

    def counted(self: Any, thresholds: Array) -> Any:
        passes.append(len(thresholds))
        assert len(thresholds) * len(self.class_ids) <= most
        return count(self, thresholds)

    monkeypatch.setattr(importlib.import_module("tcm_fused.thresholds.opis"), "_MOST_CELLS", most)
    monkeypatch.setattr(Pairs, "count", counted)
    cases: list[dict[str, Any]] = [{"far_range": (1e-5, 1e-4)}, {"frr_range": (1e-3, 2e-3)}, {}]
    for options in cases:
        passes.clear()
        result = opis(x, y, num_thresholds=11, **options)
        assert len(result.thresholds) == 11
        assert (passes[0] == 0) == bool(options)
        assert len(passes) == 1 + bool(options)


def test_backends_agree() -> None:
    x, y = clustered()
    ours, theirs = (opis(x.double(), y, backend=backend) for backend in ("cpu", "torch"))
    assert np.array_equal(ours.utility, theirs.utility)
    assert ours.to_dict() == theirs.to_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_worked_in_float32(dtype: torch.dtype) -> None:
    x, y = clustered(n=200)
    assert opis(x.to(dtype), y).to_dict() == opis(x.to(dtype).float(), y).to_dict()


def test_autocast_changes_nothing(backend: str) -> None:
    """Products are not made 16-bit behind the measure's back."""
    x, y = clustered(n=200)
    expected = opis(x, y, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert opis(x, y, backend=backend).to_dict() == expected.to_dict()


def test_rows_left_out_and_order_do_not_matter(backend: str) -> None:
    """Negative labels are not looked at (not even for NaN), and no order of the rows is special."""
    x, y = clustered(n=300)
    thresholds = np.linspace(0.7, 1.5, 9)
    expected = opis(x.double(), y, thresholds=thresholds, backend=backend)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    more = torch.cat([x.double(), torch.full((100, x.shape[1]), torch.nan, dtype=torch.float64)])[order]
    labels = torch.cat([y, torch.full((100,), -1)])[order]
    result = opis(more, labels, thresholds=thresholds, backend=backend)
    assert np.allclose(result.utility, expected.utility, rtol=0, atol=1e-12)
    assert result.recall_at_1 == expected.recall_at_1


def test_perfect_and_collapsed(backend: str) -> None:
    """One curve for all classes has OPIS 0. Where all rows are one point, all are as bad and none is found."""
    x = torch.eye(4).repeat_interleave(3, dim=0)
    y = torch.arange(4).repeat_interleave(3)
    result = opis(x, y, thresholds=[0.1, 0.5, 1.0], backend=backend)
    assert (result.opis, result.eps_opis, result.recall_at_1) == (0, 0, 1)
    assert (result.utility == 1).all()
    result = opis(torch.ones(12, 4), y, thresholds=[0.1, 0.5, 1.0], backend=backend)
    assert (result.opis, result.recall_at_1) == (0, 0)
    assert (result.utility == 0).all()


def test_number_of_any_integer_type_and_exact_rates() -> None:
    """And a rate is the quotient of its counts, not what is left of another."""
    x, y = clustered(n=300)
    nine: Any = np.int64(9)
    result = opis(x, y, num_thresholds=nine, frr_range=(0.1, 0.3))
    assert result.to_dict() == opis(x, y, num_thresholds=9, frr_range=(0.1, 0.3)).to_dict()
    positives = int((np.bincount(y) * (np.bincount(y) - 1)).sum()) // 2
    assert np.array_equal(result.frr, np.rint(result.frr * positives) / positives)
    found = calibrate(x, y, far=0.05)
    pairs = found.class_sizes * (found.class_sizes - 1) // 2, found.class_sizes * (300 - found.class_sizes)
    for rate, total in zip((found.class_frr, found.class_far), pairs, strict=True):
        assert np.array_equal(rate, np.rint(rate * total) / total)
    assert all(at.tar == np.rint(at.tar * positives) / positives for at in found.tar_at_far)


def test_one_counted_class() -> None:
    """No class is left for the rest: epsilon-OPIS is 0."""
    result = opis(torch.eye(3), torch.tensor([0, 0, 1]), thresholds=[0.5, 1.0])
    assert (result.opis, result.eps_opis, result.left_out) == (0, 0, 1)


def test_result_travels() -> None:
    result = opis(*clustered(n=200))
    loaded = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert loaded["opis"] == result.opis
    assert loaded["utility"] == result.utility.tolist()
    assert sum(loaded["histogram"]["positives"]) + sum(loaded["histogram"]["negatives"]) == 200 * 199 // 2
    worst = result.worst(3)
    assert [w.value for w in worst] == sorted(result.class_utility)[:3]
    for found in (result, calibrate(*clustered(n=200), far=0.1)):
        assert found.worst(0) == []
        with pytest.raises(ValueError, match="k must be at least 0, got -1"):
            found.worst(-1)


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
    """Of a model that tells nothing apart the shares give margins the wrong way round: said once, and what helps."""
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


# Results in sentences.


@pytest.mark.filterwarnings("ignore:far=.*margin_plus")
def test_results_in_ten_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the figures that matter, and the names of classes as a terminal may have them."""
    x, y = clustered(n=400, classes=30)
    bad = "\x1b[2J\n" * 90
    labels = [f"{bad}{c}" for c in y.tolist()]
    results: dict[str, Any] = {
        "opis": opis(x, labels),
        "thresholds": opis(x, y, thresholds=[0.5, 1.0], epsilon=0.125),
        "calibrate": calibrate(x, labels, far=0.01),
        "margins": suggest_margins(x, labels, far=0.01, frr=0.1),
    }
    for result in results.values():
        for text in (repr(result), str(result), f"{result}"):
            assert len(text.splitlines()) <= 10
            assert max(map(len, text.splitlines())) <= 160
            assert "\x1b" not in text
        assert text.isascii()
    found = results["opis"]
    text = str(found)
    for part in (f"{found.opis:.4g}", f"10%-OPIS       {found.eps_opis:.4g}", f"{100 * found.recall_at_1:.2f} %", "30"):
        assert part in text
    assert r"class \x1b[2J\n" in text
    assert "12.5%-OPIS" in str(results["thresholds"])
    at = results["calibrate"].threshold
    assert repr(at.similarity) in str(results["calibrate"])
    assert repr(at.distance) in results["calibrate"].report()
    margins = results["margins"]
    assert f"TCMLoss(margin_plus={margins.margin_plus!r}, margin_minus={margins.margin_minus!r})" in str(margins)
    assert results["opis"].report(worst=4).count("samples)") == 4
    for part in (found.histogram, found.curves, found.worst(1)[0], at, results["calibrate"].tar_at_far[0]):
        assert len(repr(part).splitlines()) == 1


def test_a_printed_threshold_decides_as_it_did() -> None:
    """Copied from the page it accepts the same pairs, as similarity and as distance."""
    x, y = (t.double() for t in clustered(n=150))
    unit = torch.nn.functional.normalize(x)
    s = (unit @ unit.T).numpy()[np.triu_indices(150, 1)]
    for far in (0.3, 0.05, 0.01):
        found = calibrate(x, y.long(), far=far)
        line = next(line for line in str(found).splitlines() if line.startswith("threshold"))
        similarity, distance = map(float, line.split()[1:3])
        assert np.array_equal(s >= similarity, s >= found.threshold.similarity)
        assert np.array_equal(np.sqrt(2 - 2 * s) <= distance, s >= found.threshold.similarity)


# Bad input.

GOOD = (torch.eye(4), torch.tensor([0, 0, 1, 1]))
CALLS: dict[str, Callable[..., Any]] = {
    "opis": opis,
    "calibrate": lambda *a, **k: calibrate(*a, far=0.1, **k),
    "suggest_margins": lambda *a, **k: suggest_margins(*a, far=0.1, frr=0.1, **k),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.eye(4), torch.zeros(4, dtype=torch.int64), "labels must name at least two classes"),
        (torch.eye(4), torch.full((4,), -1), "labels must name at least two classes.*got 0"),
        (torch.empty(0, 3), torch.empty(0, dtype=torch.int64), "labels must name at least two classes"),
        (torch.eye(4), torch.arange(4), "no class has two samples"),
        (torch.eye(4).index_fill(0, torch.tensor(2), torch.nan), GOOD[1], "embeddings must be finite.*1 of 4.*row 2"),
        (torch.eye(4) * torch.inf, GOOD[1], "embeddings must be finite.*4 of 4"),
        (torch.eye(4), torch.tensor([0, 0, 1]), r"labels must have shape \[4\]"),
        (torch.ones(4), GOOD[1], r"embeddings must have shape \[N, D\]"),
    ],
)
def test_bad_sets(call: str, x: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CALLS[call](x, y)


@pytest.mark.parametrize("call", CALLS)
def test_bad_types(call: str) -> None:
    with pytest.raises(TypeError, match=r"embeddings must be a tensor, an array, .*, got dict"):
        CALLS[call]({"x": [1.0]}, GOOD[1])
    with pytest.raises(TypeError, match="labels must have an integer dtype"):
        CALLS[call](GOOD[0], GOOD[1].float())
    with pytest.raises(ValueError, match="backend='gpu' is not known"):
        CALLS[call](*GOOD, backend="gpu")
    with pytest.raises(RuntimeError, match=r"backend='cuda' (is not available|needs tensors)"):
        CALLS[call](*GOOD, backend="cuda")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"far_range": (0.0, 0.1)}, "far_range must lie between 0 and 1"),
        ({"far_range": (0.1, 1.0)}, "far_range must lie between 0 and 1"),
        ({"far_range": (0.1, 0.01)}, r"far_range must be \(low, high\).*empty"),
        ({"far_range": (0.1, 0.1)}, r"far_range must be \(low, high\).*empty"),
        ({"frr_range": (-0.1, 0.5)}, "frr_range must lie between 0 and 1"),
        ({"far_range": (0.01, 0.02)}, "the calibration range is empty.*far_range.*takes values"),
        ({"frr_range": (0.01, 0.02)}, "the calibration range is empty.*frr_range"),
        ({"thresholds": [0.5]}, "thresholds must be at least two ascending numbers"),
        ({"thresholds": [0.5, 0.4]}, "thresholds must be at least two ascending numbers"),
        ({"thresholds": [0.5, math.nan]}, "thresholds must be at least two ascending numbers"),
        ({"thresholds": [[0.5, 0.6]]}, "thresholds must be at least two ascending numbers"),
        ({"thresholds": [0.5, 2.1]}, "thresholds must lie from 0 to 2, the euclidean axis"),
        ({"thresholds": [-1.5, 0.1], "distance": "cosine"}, "thresholds must lie from -1 to 1, the cosine axis"),
        ({"num_thresholds": 1}, "num_thresholds must be at least 2"),
        ({"distance": "manhattan"}, "distance='manhattan' is not known"),
        ({"beta": 0}, "beta must be above 0"),
        ({"beta": -1}, "beta must be finite and at least 0"),
        ({"beta": 1e200}, "beta must be above 0 and at most 1e100"),
        ({"beta": math.inf}, "beta must be finite"),
        ({"epsilon": 0}, "epsilon must lie between 0 and 1"),
        ({"epsilon": 1.0}, "epsilon must lie between 0 and 1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opis(*GOOD, **options)


def test_bad_option_types() -> None:
    options: dict[str, Any]
    for options in ({"far_range": 0.1}, {"far_range": ("a", "b")}, {"num_thresholds": 10.0}, {"beta": "1"}):
        with pytest.raises(TypeError):
            opis(*GOOD, **options)


@pytest.mark.parametrize("rate", [0, 1, -0.1, 1.5, math.nan])
def test_rates_outside_0_and_1(rate: float) -> None:
    for name in ("far", "frr"):
        with pytest.raises(ValueError, match=f"{name} must lie between 0 and 1"):
            calibrate(*GOOD, far=rate) if name == "far" else calibrate(*GOOD, frr=rate)
        with pytest.raises(ValueError, match=f"{name} must lie between 0 and 1"):
            suggest_margins(*GOOD, far=rate if name == "far" else 0.1, frr=rate if name == "frr" else 0.1)


def test_one_bound() -> None:
    both: tuple[dict[str, Any], ...] = ({}, {"far": 0.1, "frr": 0.1})
    for bounds in both:
        with pytest.raises(ValueError, match="give exactly one of far and frr"):
            calibrate(*GOOD, **bounds)


def test_kernel_refuses_what_python_would_not_send() -> None:
    x, y, t = torch.eye(4), torch.tensor([0, 0, 1, 1]), torch.empty(0)
    for bad in (
        (x * torch.nan, y, 2, t, 5),
        (x, y.int(), 2, t, 5),
        (x, y, 2, t.double(), 5),
        (x, y, 2, t, 21),
        (x, y, -1, t, 5),
        (x, y[:3], 2, t, 5),
        (x[0], y, 2, t, 5),
        (x, y, 2, t[None], 5),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            torch.ops.tcm_fused.counts(*bad, None)
    for progress in (torch.zeros(2), torch.zeros(1, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)[::2]):
        with pytest.raises(RuntimeError, match="progress must be two int64"):
            torch.ops.tcm_fused.counts(x, y, 2, t, 5, progress)


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then "auto" is the blocked form, with a warning, and the kernel by name an error that tells why."""
    x, y = clustered(n=100)
    expected = opis(x, y, thresholds=[0.8, 1.2])
    monkeypatch.setattr(choice, "_IMPORT_ERROR", "no such file")
    monkeypatch.setattr(warn, "TOLD", set())
    with pytest.warns(UserWarning, match="slower PyTorch fallback on 'cpu'.*no such file") as warned:
        assert opis(x, y, thresholds=[0.8, 1.2]).opis == pytest.approx(expected.opis, abs=1e-4)
    assert warned[0].filename == __file__, "not at the caller"
    with pytest.raises(RuntimeError, match=r"backend='cpu' is not available.*no such file"):
        opis(x, y, backend="cpu")


def test_choice_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CUDA device the kernel for all that is float32 by then, else the blocked form; by name it runs or raises."""
    kernel, blocked = torch.ops.tcm_fused.counts.default, torch.ops.tcm_fused.counts_blocked.default
    assert choice.choose_counter("auto", "cpu", torch.float64) is kernel
    monkeypatch.setattr(choice, "why_unavailable", lambda backend: None)
    assert choice.choose_counter("auto", "cuda", torch.float32) is kernel
    assert choice.choose_counter("cuda", "cuda", torch.float32) is kernel
    for device, dtype in (("cuda", torch.float64), ("mps", torch.float32)):
        assert choice.choose_counter("auto", device, dtype) is blocked
    with pytest.raises(RuntimeError, match=r"no float64 kernels; use backend='torch'"):
        choice.choose_counter("cuda", "cuda", torch.float64)
    with pytest.raises(RuntimeError, match="needs tensors on device 'cuda', embeddings are on 'cpu'"):
        choice.choose_counter("cuda", "cpu", torch.float32)
    with pytest.raises(RuntimeError, match="'cpu', 'cuda' or 'torch' only"):
        choice.choose_counter("triton", "cuda", torch.float32)
    monkeypatch.setattr(warn, "TOLD", set())
    monkeypatch.setattr(choice, "why_unavailable", {"cuda": "a reason"}.get)
    with pytest.warns(UserWarning, match="slower PyTorch fallback on 'cuda': a reason"):
        assert choice.choose_counter("auto", "cuda", torch.float32) is blocked


def test_progress_on_a_cpu_leaves_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking CUDA for its current device would set it up, which a forked process must not."""
    x, y = clustered(n=300)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("CUDA was touched"))
    opis(x, y, progress=True)


def test_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = clustered(n=3000)
    assert opis(x, y, progress=True).opis == opis(x, y).opis
    assert "pairs: 100%" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r"pip install tqdm$"):
        opis(x, y, progress=True)


@pytest.mark.parametrize("module", ["opis", "calibration", "metric"])
def test_documented_examples(module: str) -> None:
    found = doctest.testmod(importlib.import_module(f"tcm_fused.thresholds.{module}"))
    assert found.attempted >= 4
    assert found.failed == 0
