"""OPIS, calibration and margins against a NumPy double loop in fp64, by hand, and at their borders."""

import doctest
import importlib
import json
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import batches
from support.opis_oracle import NEAR, Oracle, as_distance, clustered, scores
from support.oracle import Array

from tcm_fused import calibrate, opis, suggest_margins
from tcm_fused.thresholds.rates import BITS, HALF, Pairs

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
    rows = torch.from_numpy(x).to(dtype), torch.from_numpy(y), None, None
    progress = torch.zeros(2, dtype=torch.int64)
    counts, class_counts, best, _ = torch.ops.tcm_fused.counts(
        *rows, tables, torch.from_numpy(t).to(dtype), bits, progress
    )
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
    kernel = torch.ops.tcm_fused.counts(x, y, None, None, 90, t, 10, None)
    blocked = torch.ops.tcm_fused.counts_blocked(x, y, None, None, 90, t, 10, None)
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
    kernel = torch.ops.tcm_fused.counts(x, y, None, None, classes // 2, t, 4, None)
    blocked = torch.ops.tcm_fused.counts_blocked(x, y, None, None, classes // 2, t, 4, None)
    in_float32 = torch.ops.tcm_fused.counts(x.float(), y, None, None, classes // 2, t.float(), 4, None)
    for ours, theirs, single in zip(kernel, blocked, in_float32, strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(ours, single.to(ours.dtype))
    assert int(kernel[0].sum()) == int((y >= 0).sum()) * int((y >= 0).sum() - 1) // 2


def test_counts_beyond_2_31() -> None:
    """A collapsed set: more than 2^31 pairs in one cell of the grid and of a class."""
    n = 66_000
    y = torch.zeros(n, dtype=torch.int64).index_fill(0, torch.tensor(n - 1), 1)
    counts, class_counts, *_ = torch.ops.tcm_fused.counts(
        torch.ones(n, 1), y, None, None, 1, torch.tensor([0.5]), 3, None
    )
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
            for reference in ((None, None), (x[:7].clone(), y[:7].clone())):
                torch.library.opcheck(operator, (x, y, *reference, 6, torch.tensor([0.0, 0.5]), 5, progress))


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
