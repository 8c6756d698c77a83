"""Labels, dtypes, layouts and scales of embeddings; rows that are not finite; padding."""

from typing import Any

import numpy as np
import pytest
import torch
from support.batches import batch
from support.oracle import check, run
from support.strategies import DTYPES, LABEL_DTYPES
from torch import Tensor

# Labels, dtypes, layouts, scales.


@pytest.mark.parametrize("dtype", LABEL_DTYPES, ids=str)
def test_label_dtypes(backend: str, dtype: torch.dtype) -> None:
    """The largest label of the dtype (of int64 where smaller), and the smallest, which is padding if negative."""
    rng = np.random.default_rng(6)
    x = torch.from_numpy(rng.standard_normal((140, 5))).float()
    if dtype == torch.bool:
        values = [0, 1]
    else:
        info = torch.iinfo(dtype)
        values = [0, 1, 2, min(info.max, 2**63 - 1), min(info.max, 2**63 - 1) - 1, info.min, max(info.min, -1)]
    y = torch.tensor(rng.choice(values, size=140).tolist(), dtype=torch.int64)
    plain = check(backend, x, y, margin_minus=0.0)
    assert (y.to(dtype).to(torch.int64) == y).all()
    cast = run(backend, x, y.to(dtype), margin_minus=0.0)
    assert cast.loss == plain.loss
    assert cast.count.tolist() == plain.count.tolist()
    mixed = check(backend, x, y.to(dtype), x[:90], y[:90], margin_minus=0.0)
    assert mixed.count.sum() > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), [(65, 64), (300, 33)])
def test_dtypes(backend: str, n: int, d: int, dtype: torch.dtype) -> None:
    """16-bit input is worked in fp32 from its exact values; the loss is fp32, the gradient of the input's dtype."""
    x, y = batch(n, d, 5, dtype)
    check(backend, x, y, margin_minus=0.05)
    check(backend, x, y, *batch(n + 9, d, 5, dtype, seed=1), margin_minus=0.05)


@pytest.mark.parametrize("precision", ["auto", "fp32", "fp16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_precision_is_never_less_on_a_cpu(backend: str, dtype: torch.dtype, precision: str) -> None:
    check(backend, *batch(150, 33, 5, dtype), margin_minus=0.05, precision=precision)


def test_float32_matmul_precision_is_never_less_on_a_cpu(backend: str) -> None:
    """A setting of the user for other products does not lower the similarities here."""
    before = torch.get_float32_matmul_precision()
    try:
        for setting in ("high", "medium"):
            torch.set_float32_matmul_precision(setting)
            check(backend, *batch(300, 65, 5), margin_minus=0.05)
    finally:
        torch.set_float32_matmul_precision(before)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The values of x [N, D] in memory of another form."""
    n, d = x.shape
    wide = torch.full((2 * n + 1, 3 * d + 1), torch.nan, dtype=x.dtype)
    wide[1::2, 2::3] = x
    storage = torch.full((n * d + 3,), torch.nan, dtype=x.dtype)
    shifted = storage[3:].view(n, d).copy_(x)
    return {
        "transposed": x.T.contiguous().T,
        "every second row, every third column": wide[1::2, 2::3],
        "columns of a wider matrix": torch.cat([x.new_full((n, 2), torch.nan), x], 1)[:, 2:],
        "shifted": shifted,
        "flipped twice": x.flip(0).contiguous().flip(0),
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(backend: str, dtype: torch.dtype) -> None:
    """Any strides and offsets, NaN in between, of embeddings, labels and reference set."""
    x, y = batch(130, 9, 5, dtype)
    ref_x, ref_y = batch(70, 9, 5, dtype, seed=1)
    y_strided, ref_y_strided = torch.stack([y, -y - 1], 1)[:, 0], torch.stack([ref_y, -ref_y - 1])[0]
    for name, strided in layouts(x).items():
        assert torch.equal(strided, x)
        check(backend, strided, y_strided, margin_minus=0.1)
        check(backend, strided, y_strided, layouts(ref_x)[name], ref_y_strided, margin_minus=0.1)


def test_expanded(backend: str) -> None:
    """Rows, columns and labels with a stride of 0."""
    y = torch.arange(70) % 3
    x = batch(1, 9, 1)[0].expand(70, 9)
    check(backend, x, y, margin_plus=2.0, margin_minus=-1.0)
    column = batch(70, 1, 1)[0].expand(70, 9)
    check(backend, column, y, margin_plus=2.0, margin_minus=-2.0)
    check(backend, batch(70, 9, 1)[0], torch.tensor([4]).expand(70), margin_plus=0.3)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, s) for s in (1e37, 1e30, 1e19, 1e-10, 1e-11, 1e-13, 1e-20, 1e-30, 1e-40)]
    + [(torch.float64, s) for s in (1e300, 1e160, 1e-10, 1e-13, 1e-160, 1e-300)]
    + [(torch.bfloat16, s) for s in (1e37, 1e20, 1e-10, 1e-30)]
    + [(torch.float16, s) for s in (1e4, 1e-3)],
)
def test_scales(backend: str, dtype: torch.dtype, scale: float) -> None:
    """Norms whose squares overflow or vanish; norms below 1e-12, which the divisor replaces; subnormal numbers."""
    x, y = batch(130, 9, 5, torch.float64)
    x = torch.nn.functional.normalize(x)
    all_scaled = (x * scale).to(dtype)
    check(backend, all_scaled, y, margin_plus=0.8, margin_minus=0.1)
    some_scaled = torch.where(torch.arange(130)[:, None] % 3 == 0, x * scale, x).to(dtype)
    check(backend, some_scaled, y, margin_plus=0.8, margin_minus=0.1)
    check(backend, some_scaled, y, all_scaled[:70], y[:70], margin_plus=0.8, margin_minus=0.1)


def test_largest_numbers(backend: str) -> None:
    """A norm beyond fp32 of finite components: similarities are right and nothing is NaN."""
    x, y = batch(130, 40, 5)
    x = torch.where(x > 0, torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max)
    result = run(backend, x, y, margin_minus=0.1)
    same = run(backend, x.sign(), y, margin_minus=0.1)
    assert result.count.tolist() == same.count.tolist()
    assert result.loss == pytest.approx(same.loss, rel=1e-6)
    assert np.isfinite(result.grad_x).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_rows(backend: str, dtype: torch.dtype) -> None:
    """Similarity 0 to all: hard or not as the margins say, and gradient exactly 0."""
    x, y = batch(130, 9, 5, dtype)
    x[::7] = 0
    x[1::7] = -0.0
    for margin_minus in (0.1, 0.0, -0.1):
        result = check(backend, x, y, margin_plus=-margin_minus, margin_minus=margin_minus)
        assert result.grad_x is not None
        assert not result.grad_x[::7].any()
        assert not result.grad_x[1::7].any()
    check(backend, x * 0, y, margin_plus=0.0, margin_minus=0.0, exact=True)


def test_row_offset_of_numpy(backend: str) -> None:
    ref_x, ref_y = batch(90, 9, 5)
    offset: Any = np.int64(30)
    check(backend, ref_x[30:70], ref_y[30:70], ref_x, ref_y, row_offset=offset)


# Rows that are not finite.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (129, 8), (64, 3)])
def test_non_finite(backend: str, row: int, column: int, value: float, dtype: torch.dtype) -> None:
    """One value of one row that takes part: loss NaN, and all of the gradient of rows that take part."""
    x, y = batch(130, 9, 5, dtype)
    ref_x, ref_y = batch(70, 9, 5, dtype, seed=1)
    y[::10] = torch.where(torch.arange(0, 130, 10) == row, y[::10], -1)
    x[row, column] = value
    for sets in ((x, y), (x, y, ref_x, ref_y), (ref_x, ref_y, x, y)):
        for margin in (0.2, 5.0, -5.0):  # mixed, all, none
            result = run(backend, *sets, margin_plus=margin, margin_minus=-margin)
            assert np.isnan(result.loss)
            grads = [result.grad_x] if len(sets) == 2 else [result.grad_x, result.grad_ref]
            for grad, labels in zip(grads, sets[1::2], strict=True):
                assert grad is not None
                assert np.isnan(grad[labels.numpy() >= 0]).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_without_a_pair(backend: str, value: float) -> None:
    """Nothing is dropped silently: no pair, or no weight, hides it."""
    x = torch.tensor([[1.0, value], [1.0, 2.0]])
    assert np.isnan(run(backend, x[:1], torch.tensor([3])).loss)
    assert np.isnan(run(backend, x, torch.tensor([3, -1])).loss)
    assert np.isnan(run(backend, x, torch.tensor([0, 1]), lambda_plus=0.0, lambda_minus=0.0).loss)
    assert np.isnan(run(backend, x[1:], torch.tensor([0]), x[:1], torch.tensor([-0])).loss)
    assert np.isnan(run(backend, x, torch.tensor([0, 1]), x[:0], torch.tensor([0])[:0]).loss)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_is_not_looked_at(backend: str, dtype: torch.dtype, value: float) -> None:
    """Whatever stands in a row with a negative label: same loss, same gradients, and its own gradient is 0."""
    x, y = batch(200, 9, 5, dtype)
    ref_x, ref_y = batch(270, 9, 5, dtype, seed=1)
    y[::3], ref_y[100:200] = -7, -1
    spoiled, ref_spoiled = x.clone(), ref_x.clone()
    spoiled[::3], ref_spoiled[100:200] = value, value
    clean = run(backend, x, y, margin_minus=0.1)
    padded = run(backend, spoiled, y, margin_minus=0.1)
    assert padded.loss == clean.loss
    np.testing.assert_array_equal(padded.grad_x, clean.grad_x)
    assert not clean.grad_x[::3].any()
    clean = run(backend, x, y, ref_x, ref_y, margin_minus=0.1, row_offset=30)
    padded = run(backend, spoiled, y, ref_spoiled, ref_y, margin_minus=0.1, row_offset=30)
    assert padded.loss == clean.loss
    np.testing.assert_array_equal(padded.grad_x, clean.grad_x)
    np.testing.assert_array_equal(padded.grad_ref, clean.grad_ref)
    assert not clean.grad_ref[100:200].any()
