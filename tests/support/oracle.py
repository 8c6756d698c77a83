"""The TCM loss by its formulas, in NumPy and fp64, and the comparison of a backend with it.

Nothing here calls the library's own arithmetic: the formulas are those of the paper (section 4), with the
gradient in closed form. A pair whose similarity lies within the similarity error of a margin (the *band*) may
fall on either side of it in another precision: such a pair may differ, every other pair may not.
"""

import math
import os
from copy import copy
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tcm_fused import tcm_loss
from tcm_fused.backends import choice
from tcm_fused.backends.operators import OPERATORS

Array = NDArray[Any]
Masks = tuple[Array, Array]  # [N, M] of positives, of negatives
Gradient = Any  # Array, or None

EPS = 1e-12  # smallest norm a row is divided by


@dataclass(frozen=True)
class Result:
    """The result of one call; a gradient that was not asked for is None."""

    loss: float
    count: Array  # [2] int64, n+ and n-
    violation: Array  # [2] mean of m+ - s and of s - m-, or of their squares, over the hard pairs
    grad_x: Gradient  # [N, D]
    grad_ref: Gradient  # [M, D]


def assert_same_bits(given: Result, wanted: Result) -> None:
    for field in fields(Result):
        np.testing.assert_array_equal(getattr(given, field.name), getattr(wanted, field.name), strict=True)


class Oracle:
    """All pairs of one batch in fp64: similarities, masks, and from any masks the loss and its gradients."""

    def __init__(
        self,
        x: Array,
        y: Array,
        ref_x: Array | None = None,
        ref_y: Array | None = None,
        *,
        margin_plus: float = 0.9,
        margin_minus: float = 0.5,
        lambda_plus: float = 1.0,
        lambda_minus: float = 1.0,
        row_offset: int | None = None,
        penalty: str = "hinge",
        reduction: str = "violating",
        groups: Array | None = None,
        ref_groups: Array | None = None,
        group_pairs: str = "within",
        hardest_negatives: int | None = None,
    ) -> None:
        self.hardest = hardest_negatives
        self.symmetric = ref_x is None
        if ref_x is None or ref_y is None:
            ref_x, ref_y, row_offset, ref_groups = x, y, 0, groups
        self.squared = penalty == "squared"
        self.margin = np.array([margin_plus, margin_minus])
        self.weight = np.array([lambda_plus, lambda_minus])
        self.norm, self.x_hat = _normalise(x, y)
        self.ref_norm, self.ref_hat = _normalise(ref_x, ref_y)
        self.s = self.x_hat @ self.ref_hat.T
        self.gap = (margin_plus - self.s, self.s - margin_minus)  # a pair of the side is hard where gap >= 0
        valid = (y >= 0)[:, None] & (ref_y >= 0)
        if row_offset is not None:
            rows = np.arange(len(y))
            valid[rows, rows + row_offset] = False
        if groups is not None and ref_groups is not None:
            valid &= (groups[:, None] == ref_groups) == (group_pairs == "within")
        same = y[:, None] == ref_y
        self.pair: Masks = (valid & same, valid & ~same)
        self.divisor = np.array([pair.sum() for pair in self.pair]) if reduction == "all" else None

    @property
    def factor(self) -> int:
        """2 where the rows are the columns: each row's sum then stands for its column's too."""
        return 2 if self.symmetric and self.hardest is None else 1

    def hard(self) -> Masks:
        """M+ and M-, exactly by the definition."""
        plus, minus = self.pair[0] & (self.gap[0] >= 0), self.pair[1] & (self.gap[1] >= 0)
        if self.hardest is not None:
            for similarities, row in zip(self.s, minus, strict=True):
                columns = sorted(np.flatnonzero(row), key=lambda column: (-similarities[column], column))
                row[columns[self.hardest :]] = False
        return plus, minus

    def weights(self, count: Array) -> Array:
        """[2] lambda over the divisors of the penalties."""
        result: Array = self.weight / np.maximum(count if self.divisor is None else self.divisor, 1)
        return result

    def slopes(self, masks: Masks) -> Masks:
        """[N, M] of each side: derivative of each pair's penalty by its violation."""
        if not self.squared:
            return masks
        return (2 * np.where(masks[0], self.gap[0], 0.0), 2 * np.where(masks[1], self.gap[1], 0.0))

    def evaluate(self, masks: Masks, count: Array | None = None) -> Result:
        """Loss and gradients where `masks` are the hard pairs; `count` replaces n+ and n- as divisors."""
        if count is None:
            count = np.array([mask.sum() for mask in masks])
        power = 2 if self.squared else 1
        penalty = np.array([(gap[mask] ** power).sum() for gap, mask in zip(self.gap, masks, strict=True)])
        w, slope = self.weights(count), self.slopes(masks)
        g = self.factor * (w[1] * (slope[1] @ self.ref_hat) - w[0] * (slope[0] @ self.ref_hat))
        g_ref = w[1] * (slope[1].T @ self.x_hat) - w[0] * (slope[0].T @ self.x_hat)
        if self.symmetric and self.hardest is not None:  # (i, j) may be among the hardest of i, and not of j
            g = g + g_ref
        return Result(
            loss=float(w @ penalty),
            count=count,
            violation=penalty / np.maximum(count, 1),
            grad_x=_project(g, self.x_hat, self.norm),
            grad_ref=None if self.symmetric else _project(g_ref, self.ref_hat, self.ref_norm),
        )


def _normalise(x: Array, y: Array) -> tuple[Array, Array]:
    """Norms [N, 1] and x^ [N, D] of the rows that take part; the others are zero rows."""
    x = np.where((y >= 0)[:, None], x.astype(np.float64), 0.0)
    norm = np.hypot.reduce(x, axis=1)[:, None]  # neither overflows nor underflows on the way
    return norm, x / np.maximum(norm, EPS)


def _project(g: Array, x_hat: Array, norm: Array) -> Array:
    """dL/dx from the gradient g by x^. Below EPS the divisor is a constant, so nothing is projected away."""
    along = np.where(norm >= EPS, (g * x_hat).sum(axis=1, keepdims=True), 0.0)
    return np.where(norm > 0, (g - along * x_hat) / np.maximum(norm, EPS), 0.0)


def unit_roundoff(dtype: torch.dtype) -> float:
    """That of the arithmetic for input of `dtype` on a CPU: fp64 for fp64, fp32 for all others."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2


def similarity_error(d: int, unit: float) -> float:
    """Largest error of a similarity of rows [D] that is computed with unit roundoff `unit`.

    The two norms and the product are sums of D terms, whose roundings add up like a random walk: below
    sqrt(D) * unit in one deviation, of which 4 are allowed. 8 more are for the divisions and the rest.
    Measured on 1e6 pairs, D from 1 to 1000: at most half of it.
    """
    return (4 * math.sqrt(d) + 8) * unit


def tensor_core_drift(d: int) -> float:
    """How much smaller than in exact sums tensor cores make a similarity of rows [D], beyond its random error.

    They cut each product off below the last place of the sum that it is added to (Fasi et al., "Numerical behavior of
    NVIDIA tensor cores", 2021; Khattak and Mikaitis, arXiv 2512.07004). One bit below it, as is assumed for sm_80, that
    is at 2^-25 while the sum lies between 1/2 and 1; half of it is lost on average, and where all products have one
    sign, as for s near 1, that adds up: to D * 2^-26 at most. A model, in test_oracle.py, comes to two thirds of
    that, and with two bits, as is assumed for sm_90, to a third.
    """
    return d * 2.0**-26


def fp16_error(oracle: Oracle) -> Array:
    """Largest error [N, M] of similarities whose unit vectors are rounded to fp16 first.

    A component is off by at most 2^-11 of itself, or by 2^-25 where fp16 is subnormal: of x.y that is at most
    2^-10 |x|.|y| + 2^-25 (|x|_1 + |y|_1), and |x|_1 <= sqrt(D). The product of two errors is the 1 % more.
    The roundings are independent, of variance 2^-22 / 3 at most: in wide, even rows 6 deviations are much less.
    """
    x, ref_x = np.abs(oracle.x_hat), np.abs(oracle.ref_hat)
    deviation = 2**-11 * np.sqrt(2 / 3 * (x**2 @ (ref_x**2).T))
    error: Array = 1.01 * np.minimum(2**-10 * (x @ ref_x.T), 6 * deviation)
    return error + 2**-24 * math.sqrt(x.shape[1])


def compare(
    result: Result,
    oracle: Oracle,
    dtype: torch.dtype,
    *,
    exact: bool = False,
    fp16: bool = False,
    tensor_cores: bool = False,
) -> int:
    """Assert that `result`, from input of `dtype`, is the oracle's; returns the number of pairs in the band.

    A count may be larger than that of the certainly hard pairs by no more than the pairs in the band. Loss and
    gradient are compared at the counts of `result`. A row's gradient may be off by the unit vectors of its own pairs
    in the band; a row that has none is compared tightly, whatever happened elsewhere.

    exact: the similarities are exact in `dtype`, and with them all decisions: there is no band.
    fp16: unit vectors were rounded to fp16.
    tensor_cores: similarities are sums taken by those of a GPU.
    """
    unit, d = unit_roundoff(dtype), oracle.x_hat.shape[1]
    s_error = similarity_error(d, unit) + (fp16_error(oracle) if fp16 else np.zeros((1, 1)))
    s_error = s_error + (tensor_core_drift(d) if tensor_cores else 0.0)
    bands = [s_error + abs(margin) * unit for margin in oracle.margin]  # a margin is rounded to the dtype too
    if exact:
        bands = [np.full((1, 1), -1.0)] * 2
    near = [pair & (np.abs(gap) <= width) for pair, gap, width in zip(oracle.pair, oracle.gap, bands, strict=True)]
    sure = [hard & ~flips for hard, flips in zip(oracle.hard(), near, strict=True)]
    least = np.array([mask.sum() for mask in sure])
    flips = np.array([mask.sum() for mask in near])
    count = result.count
    assert count.dtype == np.int64
    assert ((least <= count) & (count <= least + flips)).all(), (
        f"counts {count.tolist()} are not between {least.tolist()} and {(least + flips).tolist()}"
    )
    expected = oracle.evaluate((sure[0], sure[1]), count)

    # Of a mean violation: each pair's similarity error, and from a flipped pair at most twice the band. Of a square:
    # twice the violation times its error, and the square of that; the squaring rounds once more.
    error = np.abs(result.violation - expected.violation)
    widest = np.array([max(band.max(initial=0), 0) for band in bands])
    of_pair = s_error.max(initial=0) + 4 * unit * np.abs(oracle.margin)
    of_flip = 2 * widest
    if oracle.squared:
        mean = np.array([gap[mask].sum() for gap, mask in zip(oracle.gap, sure, strict=True)]) / np.maximum(count, 1)
        of_pair = 2 * mean * of_pair + of_pair**2 + 4 * unit * expected.violation
        of_flip = of_flip**2
    allowed = of_pair + of_flip * flips / np.maximum(count, 1) + 4 * unit * np.abs(expected.violation)
    allowed *= count > 0
    assert (error <= allowed).all(), f"violations {result.violation} are not {expected.violation} +- {allowed}"
    w = oracle.weights(count)
    allowed_loss = (w * np.maximum(count, 1)) @ allowed + 4 * unit * abs(expected.loss)
    assert abs(result.loss - expected.loss) <= allowed_loss, (
        f"loss {result.loss} is not {expected.loss} +- {allowed_loss}"
    )

    slope = oracle.slopes((sure[0], sure[1]))
    off = [s_error.max(initial=0) + abs(margin) * unit for margin in oracle.margin]  # of a violation

    def sums_of(factor: int, hat: Array, *masks: list[Array]) -> list["_Sum"]:
        hard, weight, flips = masks
        return [
            _Sum(
                w=factor * w[k],
                g=weight[k] @ hat,
                n=hard[k].sum(1),
                spread=np.sqrt((weight[k].astype(np.float64) ** 2).sum(1)),
                alike=np.linalg.norm(hard[k] @ hat, axis=1),
                slope_error=2 * off[k] if oracle.squared else 0.0,
                flips=(4 * widest[k] if oracle.squared else 1.0) * flips[k].sum(1),
                fp16=fp16,
            )
            for k in (0, 1)
        ]

    if result.grad_x is not None:
        sums = sums_of(oracle.factor, oracle.ref_hat, sure, list(slope), near)
        _compare_gradient("grad_x", result.grad_x, expected.grad_x, sums, oracle.norm[:, 0], dtype)
    if result.grad_ref is not None:
        transposed = [[t.T for t in masks] for masks in (sure, slope, near)]
        sums = sums_of(1, oracle.x_hat, *transposed)
        _compare_gradient("grad_ref", result.grad_ref, expected.grad_ref, sums, oracle.ref_norm[:, 0], dtype)
    return int(flips.sum())


def compare_sides(result: Result, oracle: Oracle, dtype: torch.dtype, **options: bool) -> None:
    """`compare` for the gradients [2, N, D] and [2, M, D] of the two penalties, one after the other.

    A penalty is the loss whose lambda is the count, and whose other lambda is 0.
    """
    for side in (0, 1):
        one = copy(oracle)
        one.weight = np.where(np.arange(2) == side, result.count, 0)
        grad_x, grad_ref = (None if grad is None else grad[side] for grad in (result.grad_x, result.grad_ref))
        penalty = float(one.weight @ result.violation)
        compare(replace(result, loss=penalty, grad_x=grad_x, grad_ref=grad_ref), one, dtype, **options)


@dataclass(frozen=True)
class _Sum:
    """One side's part in the gradient of all rows."""

    w: float
    g: Array  # [N, D] sum of unit vectors over the row's hard pairs, each times the slope of its penalty
    n: Array  # [N] how many
    spread: Array  # [N] root of the sum of squared slopes: the size of g if the vectors point anywhere
    alike: Array  # [N] norm of the sum without the slopes: n if the vectors all point the same way
    slope_error: float  # largest error of a slope
    flips: Array  # [N] what pairs that may be hard as well may add
    fp16: bool  # the unit vectors were rounded to fp16

    def error(self, unit: float) -> Array:
        """Allowed error of w * g [N], in the 2-norm.

        16 roundings for the factors, 4 sqrt(D) for the projection, and those of the sum: n of them at partial sums of
        up to max(|g|, spread), a random walk, or a drift of unit / 2 a term where all terms are alike. In fp16 each
        unit vector is off by 2^-11: that adds up like a random walk too, or as the vectors do if alike. So does the
        error of a slope, which is that of the similarity: where squares make up the penalty a small violation is off
        by as much as a large one.
        """
        size = np.linalg.norm(self.g, axis=1)
        roundings = 16 + 4 * self.g.shape[1] ** 0.5 + 2 * self.n**0.5 + self.alike / 2
        in_fp16 = 2**-11 * (size + 3 * self.spread) if self.fp16 else 0.0
        of_slopes = self.slope_error * (self.alike + self.n**0.5)
        error: Array = self.w * (roundings * unit * np.maximum(size, self.spread) + in_fp16 + of_slopes + self.flips)
        return error


def _compare_gradient(
    name: str, given: Array, expected: Gradient, sums: list[_Sum], norm: Array, dtype: torch.dtype
) -> None:
    """Each row within its own tolerance, which is relative to |w g| before cancellation and projection."""
    assert expected is not None, f"{name} has no counterpart"
    assert given.shape == expected.shape, f"{name} has shape {given.shape}"
    finfo = torch.finfo(dtype)
    allowed = sum(part.error(unit_roundoff(dtype)) for part in sums) / np.maximum(norm, EPS)
    allowed += finfo.eps / 2 * np.linalg.norm(expected, axis=1)  # the result is rounded to the input's dtype
    allowed += given.shape[1] ** 0.5 * finfo.smallest_normal * finfo.eps  # which may underflow
    allowed *= norm > 0
    error = np.linalg.norm(given - expected, axis=1)
    wrong = ~(error <= allowed)  # a NaN is wrong
    if wrong.any():
        row = int(np.argmax(wrong))
        raise AssertionError(
            f"{name}: {wrong.sum()} of {len(wrong)} rows differ, first row {row}: off by {error[row]:.3g} with "
            f"{allowed[row]:.3g} allowed, norm {np.linalg.norm(expected[row]):.3g}"
        )


def run(
    backend: str,
    x: Tensor,
    y: Tensor,
    ref_x: Tensor | None = None,
    ref_y: Tensor | None = None,
    *,
    grad_x: bool = True,
    grad_ref: bool = True,
    **options: Any,
) -> Result:
    """One forward and backward of `tcm_loss`, with gradients to those embeddings that are named.

    A backend of a GPU gets the tensors on the current one, in whatever layout they have.
    """
    if runs_on_gpu(backend):
        x, y = on_gpu(x), on_gpu(y)
        ref_x, ref_y = (None if t is None else on_gpu(t) for t in (ref_x, ref_y))
        options = {name: on_gpu(value) if isinstance(value, Tensor) else value for name, value in options.items()}
    x = x.detach().requires_grad_(grad_x)
    ref_x = None if ref_x is None else ref_x.detach().requires_grad_(grad_ref)
    loss, stats = tcm_loss(x, y, ref_x, ref_y, backend=backend, return_stats=True, **options)
    assert loss.shape == ()
    assert loss.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    if loss.requires_grad:
        torch.autograd.backward(loss)
    return Result(
        loss=loss.item(),
        count=torch.stack([stats.count_plus, stats.count_minus]).cpu().numpy(),
        violation=torch.stack([stats.violation_plus, stats.violation_minus]).double().cpu().numpy(),
        grad_x=_gradient_of(x),
        grad_ref=None if ref_x is None else _gradient_of(ref_x),
    )


def run_sides(
    backend: str,
    x: Tensor,
    y: Tensor,
    ref_x: Tensor | None = None,
    ref_y: Tensor | None = None,
    *,
    row_offset: int | None = None,
    margin_plus: float = 0.9,
    margin_minus: float = 0.5,
    precision: str = "auto",
    squared: bool = False,
    grad_x: bool = True,
    grad_ref: bool = True,
) -> Result:
    """The operator `penalties` of `backend`: gradients [2, N, D] and [2, M, D], and no loss."""
    fp16 = one_fp16_product(backend, x.dtype, precision)
    if runs_on_gpu(backend):
        x, y = on_gpu(x), on_gpu(y)
        ref_x, ref_y = (None if t is None else on_gpu(t) for t in (ref_x, ref_y))
    grad_ref = grad_ref and ref_x is not None
    operator = OPERATORS[choice.choose(backend, x.device.type, x.dtype)].penalties
    margins = two(margin_plus, margin_minus)
    penalty, *grads, count = operator(x, y, ref_x, ref_y, row_offset, margins, squared, fp16, grad_x, grad_ref)
    for grad, of, wanted in zip(grads, (x, ref_x), (grad_x, grad_ref), strict=True):
        assert of is None or grad.shape == ((2, *of.shape) if wanted else (0,))
    counts = count.cpu().numpy()
    return Result(
        loss=math.nan,
        count=counts,
        violation=penalty.cpu().numpy() / np.maximum(counts, 1),
        grad_x=as_array(grads[0]) if grad_x else None,
        grad_ref=as_array(grads[1]) if grad_ref else None,
    )


def two(plus: float, minus: float) -> Tensor:
    """Margins or weights as the operators take them."""
    return torch.tensor([plus, minus], dtype=torch.float64)


def runs_on_gpu(backend: str) -> bool:
    """Whether its kernels take tensors on a GPU; Triton's take those on the CPU in its interpreter: see conftest.py."""
    return backend == "cuda" or (backend == "triton" and os.environ["TRITON_INTERPRET"] != "1")


def on_gpu(t: Tensor) -> Tensor:
    """`t` on the current GPU, with the strides and the offset that it has (a copy would be contiguous there)."""
    if t.is_cuda or not t.numel():
        return t.cuda()
    storage = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).cuda()
    return storage.as_strided(t.shape, t.stride(), t.storage_offset())


def _gradient_of(leaf: Tensor) -> Gradient:
    if not leaf.requires_grad:
        assert leaf.grad is None
        return None
    assert leaf.grad is not None
    assert (leaf.grad.dtype, leaf.grad.shape) == (leaf.dtype, leaf.shape)
    return as_array(leaf.grad)


def oracle_of(x: Tensor, y: Tensor, ref_x: Tensor | None = None, ref_y: Tensor | None = None, **options: Any) -> Oracle:
    """The oracle of tensors: their values as they are, in fp64."""
    reference = () if ref_x is None or ref_y is None else (as_array(ref_x), as_array(ref_y))
    options = {name: as_array(value) if isinstance(value, Tensor) else value for name, value in options.items()}
    return Oracle(as_array(x), as_array(y), *reference, **options)


def as_array(t: Tensor) -> Array:
    """Embeddings in fp64, labels in int64."""
    array: Array = t.detach().to(torch.float64 if t.is_floating_point() else torch.int64).cpu().numpy()
    return array


def check(
    backend: str,
    x: Tensor,
    y: Tensor,
    ref_x: Tensor | None = None,
    ref_y: Tensor | None = None,
    *,
    exact: bool = False,
    grad_x: bool = True,
    grad_ref: bool = True,
    precision: str = "auto",
    **options: Any,
) -> Result:
    """Run `backend` and compare it with the oracle."""
    result = run(backend, x, y, ref_x, ref_y, grad_x=grad_x, grad_ref=grad_ref, precision=precision, **options)
    how = {"exact": exact, "fp16": one_fp16_product(backend, x.dtype, precision), "tensor_cores": runs_on_gpu(backend)}
    compare(result, oracle_of(x, y, ref_x, ref_y, **options), x.dtype, **how)
    return result


def check_sides(backend: str, x: Tensor, *sets: Tensor, exact: bool = False, **options: Any) -> Result:
    """`check` for the gradients of the two penalties, which the operator of `backend` gives in fp32 (fp64 in fp64)."""
    options = {name: value for name, value in options.items() if not name.startswith("lambda_")}  # of no meaning
    result = run_sides(backend, x, *sets, **options)
    fp16 = one_fp16_product(backend, x.dtype, options.get("precision", "auto"))
    how = {"exact": exact, "fp16": fp16, "tensor_cores": runs_on_gpu(backend)}
    of_pairs = {name: options[name] for name in ("row_offset", "margin_plus", "margin_minus") if name in options}
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    compare_sides(result, oracle_of(x, *sets, **of_pairs), dtype, **how)
    return result


def one_fp16_product(backend: str, dtype: torch.dtype, precision: str) -> bool:
    """Whether similarities come from unit vectors in fp16; on a CPU there is nothing less than fp32."""
    on_cpu = backend in ("cpu", "torch")
    return not on_cpu and (precision == "fp16" or (precision == "auto" and dtype != torch.float32))
