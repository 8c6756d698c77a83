"""The oracle against numbers worked by hand and finite differences; the comparison against results that are wrong."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.batches import batch, embeddings, margins
from support.oracle import (
    Oracle,
    Result,
    compare,
    compare_sides,
    oracle_of,
    run_sides,
    similarity_error,
    tensor_core_drift,
    unit_roundoff,
)
from support.tensor_cores import tensor_core_sums

from tcm_fused.reference import tcm_reference

N, M, D = 120, 90, 20


def make(seed: int = 0, rectangular: bool = False, **options: Any) -> Oracle:
    """A batch of which half of all pairs are hard."""
    rng = np.random.default_rng(seed)
    y, ref_y = rng.integers(6, size=N), rng.integers(6, size=M)
    sets = [embeddings("random", y, D, rng), y]
    sets += [embeddings("random", ref_y, D, rng), ref_y] if rectangular else []
    return Oracle(*sets, lambda_plus=2.0, **{**margins(Oracle(*sets), 0.5), **options})


def three_groups(rectangular: bool = False) -> dict[str, Any]:
    return {"groups": np.arange(N) % 3, **({"ref_groups": np.arange(M) % 3} if rectangular else {})}


OPTIONS: list[dict[str, Any]] = [
    {},
    {"penalty": "squared"},
    {"reduction": "all"},
    {"penalty": "squared", "reduction": "all", **three_groups(True), "group_pairs": "across"},
]
OPTION_NAMES = ["plain", "squared", "all", "everything"]


def test_oracle_by_hand() -> None:
    """Rows at 0, 53.13 and 36.87 degrees: s01 = 0.6, s02 = 0.8, s12 = 0.96."""
    x = np.array([[1.0, 0.0], [1.2, 1.6], [0.8, 0.6]])
    oracle = Oracle(x, np.array([0, 0, 1]), lambda_plus=3.0)
    np.testing.assert_allclose(oracle.s, [[1, 0.6, 0.8], [0.6, 1, 0.96], [0.8, 0.96, 1]], rtol=1e-15)
    result = oracle.evaluate(oracle.hard())
    assert result.count.tolist() == [2, 4]
    np.testing.assert_allclose(result.violation, [0.3, 0.38], rtol=1e-14)
    assert result.loss == pytest.approx(3 * 0.3 + 0.38, rel=1e-14)
    # Row 0 moves only along y: g = 2 * (1/4 * 0.6 - 3/2 * 0.8)
    np.testing.assert_allclose(result.grad_x[0], [0, 2 * (0.6 / 4 - 3 * 0.8 / 2)], rtol=1e-14, atol=1e-15)


def test_oracle_options_by_hand() -> None:
    """The same rows: squares of 0.3 and of 0.3, 0.46; two positive and four negative ordered pairs; groups."""
    x, y = np.array([[1.0, 0.0], [1.2, 1.6], [0.8, 0.6]]), np.array([0, 0, 1])

    def result(**options: Any) -> Result:
        oracle = Oracle(x, y, margin_minus=0.9, **options)  # the pair (0, 2) is not hard
        return oracle.evaluate(oracle.hard())

    assert result().loss == pytest.approx(0.3 + 0.06, rel=1e-13)
    assert result(reduction="all").loss == pytest.approx(0.3 + 0.03, rel=1e-13)
    squared = result(penalty="squared")
    np.testing.assert_allclose(squared.violation, [0.09, 0.0036], rtol=1e-12)
    assert squared.loss == pytest.approx(0.0936, rel=1e-13)
    # Row 0 moves only along y: of its one hard pair, whose slope is 2 * 0.3; its component along y is 0.8.
    np.testing.assert_allclose(squared.grad_x[0], [0, -2 / 2 * 0.6 * 0.8], rtol=1e-13, atol=1e-15)
    groups = np.array([0, 1, 1])
    assert result(groups=groups).count.tolist() == [0, 2]
    assert result(groups=groups, group_pairs="across").count.tolist() == [2, 0]
    assert result(groups=groups, group_pairs="across", reduction="all").loss == pytest.approx(0.3, rel=1e-13)


@pytest.mark.parametrize("penalty", ["hinge", "squared"])
@pytest.mark.parametrize("rectangular", [False, True])
def test_oracle_gradient_by_finite_differences(rectangular: bool, penalty: str) -> None:
    """Along random directions, at pairs held fixed, within the h^2 of a central difference."""
    rng = np.random.default_rng(1)
    y, ref_y = rng.integers(3, size=10), rng.integers(3, size=8)
    x, ref_x = rng.standard_normal((10, 4)), rng.standard_normal((8, 4))

    def at(x: np.ndarray, ref_x: np.ndarray) -> Oracle:
        return Oracle(x, y, *((ref_x, ref_y) if rectangular else ()), penalty=penalty)

    result = at(x, ref_x).evaluate(at(x, ref_x).hard())
    h = 1e-5
    for _ in range(5):
        step, ref_step = h * rng.standard_normal(x.shape), h * rng.standard_normal(ref_x.shape)
        masks = at(x, ref_x).hard()
        up = at(x + step, ref_x + ref_step).evaluate(masks).loss
        down = at(x - step, ref_x - ref_step).evaluate(masks).loss
        slope = (result.grad_x * step).sum() + (0 if result.grad_ref is None else (result.grad_ref * ref_step).sum())
        assert (up - down) / 2 == pytest.approx(slope, rel=1e-7, abs=1e-13)


@pytest.mark.parametrize("penalty", ["hinge", "squared"])
@pytest.mark.parametrize("reduction", ["violating", "all"])
@pytest.mark.parametrize("form", ["symmetric", "reference set", "row_offset"])
def test_reference_is_the_definition(form: str, reduction: str, penalty: str) -> None:
    """`tcm_reference`, by autograd, is the oracle too; with padding, a zero row and a row shorter than EPS."""
    rng = np.random.default_rng(2)
    y, ref_y = torch.from_numpy(rng.integers(-1, 4, size=40)), torch.from_numpy(rng.integers(-1, 4, size=55))
    x, ref_x = (torch.from_numpy(rng.standard_normal((n, 6))) for n in (40, 55))
    x[3], x[4] = 0, x[4] * 1e-14
    y[3], y[4] = 0, 1
    sets = (x, y) if form == "symmetric" else (x, y, ref_x, ref_y)
    options: dict[str, Any] = {
        "margin_plus": 0.7,
        "margin_minus": -0.2,
        "row_offset": 9 if form == "row_offset" else None,
        "penalty": penalty,
        "reduction": reduction,
    }
    leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in sets]
    loss, sums, count = tcm_reference(*leaves, **options)
    torch.autograd.backward(loss)
    grads = [leaf.grad.numpy() for leaf in leaves[::2] if leaf.grad is not None] + [None]
    violation = (sums / count.clamp_min(1)).numpy()
    compare(Result(loss.item(), count.numpy(), violation, *grads[:2]), oracle_of(*sets, **options), x.dtype)


@pytest.mark.parametrize(("block", "extra"), [(8, 1), (16, 2)])  # sm_80, sm_90
@pytest.mark.parametrize("d", [64, 512, 4096, 16_384])
def test_tensor_core_drift(d: int, block: int, extra: int) -> None:
    """Within what is allowed, at s = 1, where it is largest; and beyond what is allowed of other sums."""
    x = np.random.default_rng(d).standard_normal((50, d))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16).astype(np.float64)
    unit = unit_roundoff(torch.float32)
    error = (x**2).sum(1) - tensor_core_sums(x**2, block, extra)
    assert (error <= tensor_core_drift(d) + similarity_error(d, unit)).all()
    assert error.mean() < 0.75 * tensor_core_drift(d)
    assert d < 4096 or (error > similarity_error(d, unit)).all()


# The comparison itself.


@pytest.mark.parametrize("rectangular", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"penalty": "squared"}, {"reduction": "all"}], ids=OPTION_NAMES[:3])
def test_compare_accepts_the_oracle(options: dict[str, Any], dtype: torch.dtype, rectangular: bool) -> None:
    oracle = make(rectangular=rectangular, **options)
    compare(oracle.evaluate(oracle.hard()), oracle, dtype, exact=True)
    near = compare(oracle.evaluate(oracle.hard()), oracle, dtype)
    assert near <= 4, "a band that holds many pairs of a random batch compares nothing"


def scale_gradient(result: Result) -> Result:
    return replace(result, grad_x=result.grad_x * (1 + 1e-4))


def scale_one_row(result: Result) -> Result:
    grad = result.grad_x.copy()
    grad[17] *= 1 + 1e-4
    return replace(result, grad_x=grad)


def forget_one_row(result: Result) -> Result:
    grad = result.grad_x.copy()
    grad[-1] = 0
    return replace(result, grad_x=grad)


def forget_one_column(result: Result) -> Result:
    grad = result.grad_ref.copy()
    grad[M // 2] = 0
    return replace(result, grad_ref=grad)


def swap_two_rows(result: Result) -> Result:
    grad = result.grad_x.copy()
    grad[[5, 6]] = grad[[6, 5]]
    return replace(result, grad_x=grad)


def poison_one_value(result: Result) -> Result:
    grad = result.grad_x.copy()
    grad[0, 0] = np.nan
    return replace(result, grad_x=grad)


def one_more_positive(result: Result) -> Result:
    return replace(result, count=result.count + np.array([1, 0]))


def one_negative_less(result: Result) -> Result:
    return replace(result, count=result.count - np.array([0, 1]))


def swap_sides(result: Result) -> Result:
    return replace(result, count=result.count[::-1], violation=result.violation[::-1])


def scale_loss(result: Result) -> Result:
    return replace(result, loss=result.loss * (1 + 1e-4))


def loss_is_nan(result: Result) -> Result:
    return replace(result, loss=np.nan)


def scale_violation(result: Result) -> Result:
    return replace(result, violation=result.violation * np.array([1, 1 + 1e-4]))


def half_gradient(result: Result) -> Result:
    return replace(result, grad_x=result.grad_x / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (scale_gradient, "grad_x"),
        (scale_one_row, "grad_x: 1 of 120 rows differ, first row 17"),
        (forget_one_row, "grad_x: 1 of 120 rows differ, first row 119"),
        (forget_one_column, "grad_ref: 1 of 90 rows differ, first row 45"),
        (swap_two_rows, "grad_x: 2 of 120 rows differ"),
        (poison_one_value, "grad_x: 1 of 120 rows differ, first row 0"),
        (one_more_positive, "counts"),
        (one_negative_less, "counts"),
        (swap_sides, "counts"),
        (scale_loss, "loss"),
        (loss_is_nan, "loss"),
        (scale_violation, "violations"),
        (half_gradient, "grad_x"),
    ],
)
@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_NAMES)
def test_compare_refuses(
    options: dict[str, Any], spoil: Callable[[Result], Result], message: str, dtype: torch.dtype
) -> None:
    oracle = make(rectangular=True, **options)
    result = spoil(oracle.evaluate(oracle.hard()))
    with pytest.raises(AssertionError, match=message):
        compare(result, oracle, dtype)


@pytest.mark.parametrize("name", ["grad_x", "grad_ref"])
def test_compare_sides(name: str) -> None:
    """Accepts an operator's gradients of the two penalties; refuses them exchanged, negated, or weighted by a count."""
    sets = (*batch(N, D, 6), *batch(M, D, 6, seed=1))
    options: dict[str, Any] = {"margin_plus": 0.2, "margin_minus": 0.1}
    result, oracle = run_sides("torch", *sets, **options), oracle_of(*sets, **options)
    compare_sides(result, oracle, torch.float32)
    grads = getattr(result, name)
    for wrong in (grads[::-1], grads * [[[1]], [[-1]]], grads / result.count[:, None, None]):
        with pytest.raises(AssertionError, match=f"{name}: .* rows differ"):
            compare_sides(replace(result, **{name: wrong}), oracle, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compare_refuses_other_options(dtype: torch.dtype) -> None:
    """Hinges for squares, a slope of s - m for 2 (s - m), a mean over all pairs, another choice of groups, none."""
    squared = make(penalty="squared")
    right = squared.evaluate(squared.hard())
    compare(right, squared, dtype)
    forgotten_two = replace(right, grad_x=right.grad_x / 2)
    for wrong in (make().evaluate(squared.hard()), forgotten_two):
        with pytest.raises(AssertionError, match=r"violations|grad_x"):
            compare(wrong, squared, dtype)
    everything = make(reduction="all")
    for given, wanted in ((everything, make()), (make(), everything)):
        with pytest.raises(AssertionError, match="loss"):
            compare(given.evaluate(given.hard()), wanted, dtype)
    within, across = (make(**three_groups(), group_pairs=pairs) for pairs in ("within", "across"))
    for given, wanted in ((within, across), (across, within), (make(), within)):
        with pytest.raises(AssertionError, match="counts"):
            compare(given.evaluate(given.hard()), wanted, dtype)


def test_compare_of_squares_refuses_coarse_slopes() -> None:
    """All violations too small by 1e-5, a few times what a similarity may be off, in the gradient alone."""
    oracle, shifted = make(penalty="squared"), make(penalty="squared")
    result = oracle.evaluate(oracle.hard())
    shifted.gap = (oracle.gap[0] - 1e-5, oracle.gap[1] - 1e-5)
    with pytest.raises(AssertionError, match="grad_x"):
        compare(replace(result, grad_x=shifted.evaluate(oracle.hard()).grad_x), oracle, torch.float32)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("exchange", [False, True])
def test_compare_refuses_a_flipped_pair(side: int, exchange: bool) -> None:
    """The pair just outside the band, consistently in count, loss and gradient; and two flips that keep the count.

    Where another pair lies in the band the count alone may pass: the row's gradient does not.
    """
    oracle = make()
    masks = oracle.hard()
    width = similarity_error(D, unit_roundoff(torch.float32)) + abs(oracle.margin[side]) * unit_roundoff(torch.float32)
    candidates = np.argwhere(oracle.pair[side] & (np.abs(oracle.gap[side]) > width))
    order = np.argsort(np.abs(oracle.gap[side])[tuple(candidates.T)])
    flipped = candidates[order]
    hard = masks[side][tuple(flipped.T)]
    chosen = [flipped[0], flipped[np.argmax(hard != hard[0])]] if exchange else [flipped[0]]
    for i, j in chosen:
        masks[side][i, j] ^= True
    with pytest.raises(AssertionError, match="grad_x" if exchange else "counts|grad_x"):
        compare(oracle.evaluate(masks), oracle, torch.float32)


def test_compare_accepts_a_flip_in_the_band() -> None:
    """And only there: the same flip is refused where similarities are exact, and at the precision of fp64."""
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((N, D)), rng.integers(6, size=N)
    i, j = np.argwhere(Oracle(x, y).pair[1])[7]
    oracle = Oracle(x, y, margin_minus=Oracle(x, y).s[i, j] + 1e-7)
    masks = oracle.hard()
    masks[1][i, j] ^= True
    flipped = oracle.evaluate(masks)
    assert compare(flipped, oracle, torch.float32) >= 1
    for dtype, exact in ((torch.float32, True), (torch.float64, False)):
        with pytest.raises(AssertionError, match="counts"):
            compare(flipped, oracle, dtype, exact=exact)


def test_compare_refuses_a_self_pair_and_a_missing_factor() -> None:
    oracle = make()
    masks = oracle.hard()
    np.fill_diagonal(masks[0], True)
    with pytest.raises(AssertionError, match="counts"):
        compare(oracle.evaluate(masks), oracle, torch.float32)
    oracle = make()
    with pytest.raises(AssertionError, match="grad_x"):
        compare(half_gradient(oracle.evaluate(oracle.hard())), oracle, torch.float32)


def rounded(oracle: Oracle, bits: int) -> Result:
    """The result of a backend that stores X^ with `bits` bits (11: fp16, 8: bf16) and is exact otherwise."""

    def stored(x: np.ndarray) -> np.ndarray:
        fraction, exponent = np.frexp(x)
        return np.ldexp(np.round(fraction * 2.0**bits), exponent - bits)

    coarse = make(rectangular=not oracle.symmetric)
    coarse.x_hat, coarse.ref_hat = stored(oracle.x_hat), stored(oracle.ref_hat)
    coarse.s = coarse.x_hat @ coarse.ref_hat.T
    coarse.gap = (coarse.margin[0] - coarse.s, coarse.s - coarse.margin[1])
    return coarse.evaluate(coarse.hard())


@pytest.mark.parametrize("rectangular", [False, True])
def test_compare_of_fp16_products(rectangular: bool) -> None:
    """X^ in fp16 is within the error that is allowed for it, not in that of fp32; X^ in bf16 is beyond both."""
    oracle = make(rectangular=rectangular)
    near = compare(rounded(oracle, 11), oracle, torch.float32, fp16=True)
    assert near <= 4e-3 * sum(pair.sum() for pair in oracle.pair), "a band that holds many pairs compares nothing"
    with pytest.raises(AssertionError):
        compare(rounded(oracle, 11), oracle, torch.float32)
    with pytest.raises(AssertionError):
        compare(rounded(oracle, 8), oracle, torch.float32, fp16=True)


@pytest.mark.parametrize("spoil", [forget_one_row, swap_two_rows, half_gradient, swap_sides, loss_is_nan])
def test_compare_of_fp16_products_refuses(spoil: Callable[[Result], Result]) -> None:
    oracle = make()
    with pytest.raises(AssertionError):
        compare(spoil(rounded(oracle, 11)), oracle, torch.float32, fp16=True)
