"""The Triton kernels in the interpreter, at the edges: no pairs, labels, scales, layouts, rows that are not finite."""

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from support.batches import batch
from support.oracle import check, check_sides, run, run_sides
from torch import Tensor

if os.environ["TRITON_INTERPRET"] != "1":
    pytest.skip("TRITON_INTERPRET=0: the kernels are left to the GPU", allow_module_level=True)


# The edges.


@pytest.mark.parametrize(("n", "m"), [(0, None), (0, 0), (0, 7), (7, 0), (1, None), (1, 1)])
def test_no_pairs(n: int, m: int | None) -> None:
    """An empty batch, an empty memory, one row: loss 0, gradient 0, and backward works."""
    sets = batch(n, 5, 2) if m is None else (*batch(n, 5, 2), *batch(m, 5, 2, seed=1))
    result = check("triton", *sets, row_offset=0 if n == m else None, margin_plus=2.0, margin_minus=-2.0)
    assert result.loss == 0
    assert result.count.tolist() == [0, 0]
    check_sides("triton", *sets, row_offset=0 if n == m else None, margin_plus=2.0, margin_minus=-2.0)


def test_labels() -> None:
    """The largest and the smallest; all ignored; one class; no positives."""
    x = batch(100, 7, 1)[0]
    values = torch.tensor([2**63 - 1, 2**63 - 2, 0, 1, -1, -(2**63)])
    check("triton", x, values[torch.arange(100) % 6], margin_minus=0.0)
    assert check("triton", x, torch.full((100,), -1), margin_plus=2.0, margin_minus=-2.0).loss == 0
    assert check("triton", x, torch.zeros(100, dtype=torch.int64), margin_plus=2.0).count.tolist() == [9900, 0]
    assert check("triton", x, torch.arange(100), margin_minus=-2.0).count.tolist() == [0, 9900]


@pytest.mark.parametrize(
    ("scale", "precision"),
    [
        (1e37, "fp32"),
        (1e37, "fp16"),
        (1e19, "fp32"),
        (1e-11, "fp32"),
        (1e-13, "fp16"),
        (1e-30, "fp32"),
        (1e-40, "fp32"),
    ],
)
def test_scales(scale: float, precision: str) -> None:
    """Norms whose squares overflow or vanish; norms below 1e-12, which the divisor replaces; subnormal numbers."""
    x, y = batch(70, 9, 5, torch.float64)
    x = torch.nn.functional.normalize(x)
    x = torch.where(torch.arange(70)[:, None] % 3 == 0, x * scale, x).float()
    check("triton", x, y, margin_plus=0.8, margin_minus=0.1, precision=precision)


def test_largest_numbers() -> None:
    """A norm beyond fp32 of finite components: similarities are right and nothing is NaN."""
    x, y = batch(70, 40, 5)
    x = torch.where(x > 0, torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max)
    result = run("triton", x, y, margin_minus=0.1)
    same = run("triton", x.sign(), y, margin_minus=0.1)
    assert result.count.tolist() == same.count.tolist()
    assert result.loss == pytest.approx(same.loss, rel=1e-6)
    assert np.isfinite(result.grad_x).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_zero_rows(dtype: torch.dtype) -> None:
    """Similarity 0 to all, and gradient exactly 0."""
    x, y = batch(70, 9, 5, dtype)
    x[::7], x[1::7] = 0, -0.0
    for margin_minus in (0.0, -0.1):
        result = check("triton", x, y, margin_plus=-margin_minus, margin_minus=margin_minus)
        assert not result.grad_x[::7].any()
        assert not result.grad_x[1::7].any()


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float16, torch.nan),
        (torch.bfloat16, torch.inf),
        (torch.float32, torch.nan),
        (torch.float32, torch.inf),
        (torch.float32, -torch.inf),
    ],
)
def test_non_finite(dtype: torch.dtype, value: float) -> None:
    """One value of one row that takes part: loss NaN, and all of the gradient of rows that take part."""
    x, y = batch(70, 9, 5, dtype)
    ref_x, ref_y = batch(40, 9, 5, dtype, seed=1)
    y[::10] = -1
    x[64, 3] = value
    for sets in ((x, y), (x, y, ref_x, ref_y), (ref_x, ref_y, x, y)):
        for margin, run_one in ((0.2, run), (-5.0, run), (0.2, run_sides)):
            result = run_one("triton", *sets, margin_plus=margin, margin_minus=-margin)
            assert np.isnan(result.loss)
            assert np.isnan(result.violation).all()
            grads = [result.grad_x] if len(sets) == 2 else [result.grad_x, result.grad_ref]
            for grad, labels in zip(grads, sets[1::2], strict=True):
                assert np.isnan(grad[..., labels.numpy() >= 0, :]).all()
                assert not grad[..., labels.numpy() < 0, :].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_without_a_pair(value: float) -> None:
    """Nothing is dropped silently: no pair, or no weight, hides it."""
    x = torch.tensor([[1.0, value], [1.0, 2.0]])
    assert np.isnan(run("triton", x[:1], torch.tensor([3])).loss)
    assert np.isnan(run("triton", x, torch.tensor([0, 1]), lambda_plus=0.0, lambda_minus=0.0).loss)
    assert np.isnan(run("triton", x, torch.tensor([0, 1]), x[:0], torch.tensor([0])[:0]).loss)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_padding_is_not_looked_at(value: float) -> None:
    """Whatever stands in a row with a negative label: same loss, same gradients, and its own gradient is 0."""
    x, y = batch(70, 9, 5)
    ref_x, ref_y = batch(130, 9, 5, seed=1)
    y[::3], ref_y[50:100] = -7, -1
    spoiled, ref_spoiled = x.clone(), ref_x.clone()
    spoiled[::3], ref_spoiled[50:100] = value, value
    for sets, spoiled_sets in (
        ((x, y), (spoiled, y)),
        ((x, y, ref_x, ref_y), (spoiled, y, ref_spoiled, ref_y)),
    ):
        clean = check("triton", *sets, margin_minus=0.1)
        padded = run("triton", *spoiled_sets, margin_minus=0.1)
        assert padded.loss == clean.loss
        np.testing.assert_array_equal(padded.grad_x, clean.grad_x)
        assert not clean.grad_x[::3].any()
        if len(sets) == 4:
            np.testing.assert_array_equal(padded.grad_ref, clean.grad_ref)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_layouts(dtype: torch.dtype) -> None:
    """Views inside buffers of NaN, of any strides: nothing outside the tensors is read."""

    def views(x: Tensor) -> Iterator[Tensor]:
        n, d = x.shape
        wide = torch.full((2 * n + 3, 3 * d + 1), torch.nan, dtype=x.dtype)
        wide[1 : 2 * n + 1 : 2, 2::3] = x
        yield wide[1 : 2 * n + 1 : 2, 2::3]
        middle = torch.full((3 * n * d,), torch.nan, dtype=x.dtype)
        middle[n * d : 2 * n * d] = x.flatten()
        yield middle[n * d : 2 * n * d].view(n, d)
        tall = torch.full((d, 3 * n), torch.nan, dtype=x.dtype)
        tall[:, n : 2 * n] = x.T
        yield tall[:, n : 2 * n].T

    x, y = batch(67, 19, 5, dtype)
    ref_x, ref_y = batch(41, 19, 5, dtype, seed=1)
    y_view, ref_y_view = torch.stack([y, -y - 1], 1)[:, 0], torch.stack([-ref_y, ref_y, -ref_y])[1]
    plain = check("triton", x, y, ref_x, ref_y, margin_minus=0.1)
    for view, ref_view in zip(views(x), views(ref_x), strict=True):
        assert torch.equal(view, x)
        result = run("triton", view, y_view, ref_view, ref_y_view, margin_minus=0.1)
        assert result.loss == plain.loss
        np.testing.assert_array_equal(result.grad_x, plain.grad_x)
        np.testing.assert_array_equal(result.grad_ref, plain.grad_ref)


def test_expanded() -> None:
    """Rows and columns with a stride of 0."""
    y = torch.arange(70) % 3
    check("triton", batch(1, 9, 1)[0].expand(70, 9), y, margin_plus=2.0, margin_minus=-1.0)
    check("triton", batch(70, 1, 1)[0].expand(70, 9), y, margin_plus=2.0, margin_minus=-2.0)
