"""The CUDA and the Triton kernels on a GPU, against the oracle.

Everything here and in test_cuda_counts.py and test_cuda_host.py is marked `cuda` and does without hypothesis:
inputs are drawn from a seed that each failure prints, and that TCM_SEED sets again. `TCM_FUSED_SM=80 pytest -m cuda`
runs the path for older GPUs on a newer one; `TRITON_INTERPRET=0 pytest -m cuda -k triton` those of Triton's.
"""

from typing import Any

import numpy as np
import pytest
import torch
from support.batches import KINDS, batch, dyadic, embeddings, margins
from support.crowd import Crowd, compare_crowd
from support.gpu import SIZES, WIDTHS, arithmetic
from support.oracle import check, check_sides, oracle_of, run, run_sides
from torch import Tensor

pytestmark = pytest.mark.cuda


def call_of(form: str, n: int, m: int, d: int, classes: int, kind: str, rng: np.random.Generator) -> dict[str, Any]:
    """Arguments of `check`: a batch of `kind` in one of the forms, a quarter of it padding in one of three."""
    sizes = [n] if form == "symmetric" else [n, m]
    y_all = rng.integers(classes, size=sum(sizes))
    x_all = embeddings(kind, y_all, d, rng)
    padding = rng.choice([0.0, 0.0, 0.25])
    sets = []
    for part in np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1]):
        y = np.where(rng.random(len(part)) < padding, -1 - rng.integers(9, size=len(part)), y_all[part])
        sets += [torch.from_numpy(x_all[part]), torch.from_numpy(y)]
    call: dict[str, Any] = dict(zip(("x", "y", "ref_x", "ref_y"), sets, strict=False))
    if form == "row_offset":
        call["row_offset"] = int(rng.integers(m - n + 1))
    return call


def in_dtype(call: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in call.items()
    }


# Against the oracle.


@arithmetic
@pytest.mark.parametrize("round_", range(24))
def test_random_batches(
    gpu_backend: str, rng: np.random.Generator, round_: int, dtype: torch.dtype, precision: str
) -> None:
    """Every form, geometry, ragged size, density of hard pairs and weight."""
    form = ("symmetric", "symmetric", "reference set", "row_offset")[round_ % 4]
    n, m, d = int(rng.choice(SIZES)), int(rng.choice(SIZES)), int(rng.choice(WIDTHS))
    m = m + n if form == "row_offset" else m
    call = in_dtype(call_of(form, n, m, d, int(rng.choice([1, 2, 5, 30, 999])), str(rng.choice(KINDS)), rng), dtype)
    if round_ % 2:
        call.update(margins(oracle_of(**call), float(rng.choice([0.0, 0.001, 0.02, 0.5, 0.98, 0.999, 1.0]))))
    else:
        call.update(margin_plus=float(rng.uniform(-2, 2)), margin_minus=float(rng.uniform(-2, 2)))
    call.update(
        lambda_plus=float(rng.choice([0.0, 0.25, 1.0, 7.0])), lambda_minus=float(rng.choice([0.0, 0.25, 1.0, 7.0]))
    )
    sets = [call.pop(name) for name in ("x", "y", "ref_x", "ref_y") if name in call]
    (check_sides if round_ % 3 == 2 else check)(gpu_backend, *sets, **call, precision=precision)


@arithmetic
@pytest.mark.parametrize("share", [0.0, 0.0005, 0.01, 0.5, 0.99, 0.9995, 1.0])
@pytest.mark.parametrize(("n", "d", "kind"), [(257, 65, "random"), (1030, 64, "groups"), (2100, 16, "random")])
def test_densities(
    gpu_backend: str,
    rng: np.random.Generator,
    n: int,
    d: int,
    kind: str,
    share: float,
    dtype: torch.dtype,
    precision: str,
) -> None:
    """From no hard pair to all: tiles that are empty, hold a handful, are mixed, lack a handful, are full."""
    y = rng.integers(n // 20 + 2, size=n)
    x, labels = torch.from_numpy(embeddings(kind, y, d, rng)).to(dtype), torch.from_numpy(y)
    check(gpu_backend, x, labels, **margins(oracle_of(x, labels), share), precision=precision)


@arithmetic
@pytest.mark.parametrize("d", [1, 8, 512, 768, 1000, 4096])
def test_widths(gpu_backend: str, rng: np.random.Generator, d: int, dtype: torch.dtype, precision: str) -> None:
    """One column to 4096, with a multiple of nothing among them; in both forms."""
    y = rng.integers(9, size=700)
    x, labels = torch.from_numpy(embeddings("classes", y, d, rng)).to(dtype), torch.from_numpy(y)
    for sets in ((x[:450], labels[:450]), (x[:450], labels[:450], x[450:], labels[450:])):
        check(gpu_backend, *sets, **margins(oracle_of(*sets), 0.3), precision=precision)


@arithmetic
def test_many_tiles(gpu_backend: str, rng: np.random.Generator, dtype: torch.dtype, precision: str) -> None:
    """Every kind of tile at once, more than twenty a side."""
    y = rng.integers(60, size=3001)
    x = torch.from_numpy(embeddings("groups", y, 40, rng)).to(dtype)
    check(gpu_backend, x, torch.from_numpy(y), margin_plus=0.95, margin_minus=0.3, precision=precision)


@arithmetic
@pytest.mark.parametrize(("n", "d"), [(2, 1), (65, 4), (129, 33), (513, 100)])
def test_similarities_on_the_margin(
    gpu_backend: str, rng: np.random.Generator, n: int, d: int, dtype: torch.dtype, precision: str
) -> None:
    """Multiples of 1/4 against margins that are too: both inequalities are inclusive, for zero rows as well."""
    x, y = torch.from_numpy(dyadic(n, d, rng)).to(dtype), torch.from_numpy(rng.integers(4, size=n))
    for margin_plus, margin_minus in [(0.5, 0.25), (0.0, 0.0), (-0.25, 0.75), (1.0, -1.0), (-1.0, 1.0)]:
        options: Any = {"margin_plus": margin_plus, "margin_minus": margin_minus, "precision": precision}
        check(gpu_backend, x, y, **options, exact=True)
        check(gpu_backend, x, y, x[: n // 2 + 1], y[: n // 2 + 1], **options, exact=True)


@arithmetic
@pytest.mark.parametrize(("n", "m"), [(0, None), (0, 0), (0, 7), (7, 0), (1, None), (1, 1)])
def test_no_pairs(gpu_backend: str, n: int, m: int | None, dtype: torch.dtype, precision: str) -> None:
    x, y = batch(n, 5, 2, dtype)
    sets = (x, y) if m is None else (x, y, *batch(m, 5, 2, dtype, seed=1))
    options: Any = {"margin_plus": 2.0, "margin_minus": -2.0, "precision": precision}
    result = check(gpu_backend, *sets, row_offset=0 if n == m else None, **options)
    assert (result.loss, result.count.tolist()) == (0, [0, 0])
    check_sides(gpu_backend, *sets, row_offset=0 if n == m else None, **options)


@arithmetic
@pytest.mark.parametrize(("grad_x", "grad_ref"), [(True, True), (False, True)])
def test_gradients_of_the_penalties(
    gpu_backend: str, grad_x: bool, grad_ref: bool, dtype: torch.dtype, precision: str
) -> None:
    """Either's own, also where the other has no hard pair."""
    sets = (*batch(300, 65, 9, dtype), *batch(413, 65, 9, dtype, seed=1))
    for margin_plus, margin_minus in [(0.9, 0.2), (-2.0, 0.2), (0.9, 2.0), (2.0, -2.0)]:
        call: dict[str, Any] = {"margin_plus": margin_plus, "margin_minus": margin_minus, "precision": precision}
        call.update(grad_x=grad_x, grad_ref=grad_ref)
        check_sides(gpu_backend, *sets, **call)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_reduction_over_all_pairs(gpu_backend: str, dtype: torch.dtype) -> None:
    """Composed from the two penalties, against the same in PyTorch; no s is within 2.9e-6 of a margin."""
    sets = (*batch(300, 65, 9, dtype), *batch(413, 65, 9, dtype, seed=1))
    options: dict[str, Any] = {"margin_minus": 0.21, "lambda_plus": 3.0, "reduction": "all", "precision": "fp32"}
    result, expected = run(gpu_backend, *sets, **options), run("torch", *sets, **options)
    np.testing.assert_array_equal(result.count, expected.count)
    assert result.loss == pytest.approx(expected.loss, rel=1e-5)
    tolerance = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    for grad, wanted in ((result.grad_x, expected.grad_x), (result.grad_ref, expected.grad_ref)):
        np.testing.assert_allclose(grad, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@arithmetic
@pytest.mark.parametrize(("grad_x", "grad_ref"), [(True, True), (True, False), (False, True), (False, False)])
def test_gradients_where_asked_for(
    gpu_backend: str, rng: np.random.Generator, grad_x: bool, grad_ref: bool, dtype: torch.dtype, precision: str
) -> None:
    for form in ("symmetric", "reference set", "row_offset"):
        call = in_dtype(call_of(form, 200, 413, 33, 5, "random", rng), dtype)
        if form == "symmetric" and grad_ref:
            continue
        check(gpu_backend, **call, margin_minus=0.05, grad_x=grad_x, grad_ref=grad_ref, precision=precision)


@arithmetic
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite(gpu_backend: str, value: float, dtype: torch.dtype, precision: str) -> None:
    """One value of one row that takes part makes all NaN; in a row with a negative label nothing."""
    x, y = batch(300, 9, 5, dtype)
    ref_x, ref_y = batch(70, 9, 5, dtype, seed=1)
    y[::10] = -1
    x[10, 3] = value
    for sets in ((x, y), (x, y, ref_x, ref_y), (ref_x, ref_y, x, y)):
        clean = check(gpu_backend, *(torch.nan_to_num(t, 0, 0, 0) for t in sets), margin_minus=0.1, precision=precision)
        padded = run(gpu_backend, *sets, margin_minus=0.1, precision=precision)
        assert padded.loss == clean.loss
        np.testing.assert_array_equal(padded.grad_x, clean.grad_x)
    x[11, 3] = value
    for sets in ((x, y), (x, y, ref_x, ref_y), (ref_x, ref_y, x, y)):
        for margin in (0.2, 5.0, -5.0):  # mixed, all, none
            result = run(gpu_backend, *sets, margin_plus=margin, margin_minus=-margin, precision=precision)
            grads = [result.grad_x] if len(sets) == 2 else [result.grad_x, result.grad_ref]
            assert np.isnan(result.loss)
            assert all(np.isnan(g[t.numpy() >= 0]).all() for g, t in zip(grads, sets[1::2], strict=True))
        sides = run_sides(gpu_backend, *sets, margin_minus=0.1, precision=precision)
        assert np.isnan(sides.violation).all()
        for grad, labels in zip([sides.grad_x, sides.grad_ref][: len(sets) // 2], sets[1::2], strict=True):
            assert np.isnan(grad[:, labels.numpy() >= 0]).all()
            assert not grad[:, labels.numpy() < 0].any()


@arithmetic
def test_zero_rows_and_scales(gpu_backend: str, dtype: torch.dtype, precision: str) -> None:
    """Similarity 0 to all and gradient 0; norms from the smallest to the largest that the dtype holds."""
    x, y = batch(300, 33, 5, torch.float64)
    x = torch.nn.functional.normalize(x)
    largest = 4e4 if dtype == torch.float16 else 1e37
    for scale in (1.0, largest, 1e-3 if dtype == torch.float16 else 1e-30):
        scaled = torch.where(torch.arange(300)[:, None] % 3 == 0, scale * x, x).to(dtype)
        scaled[::7] = 0
        result = check(gpu_backend, scaled, y, margin_plus=0.3, margin_minus=-0.1, precision=precision)
        assert not result.grad_x[::7].any()


@arithmetic
def test_layouts(gpu_backend: str, dtype: torch.dtype, precision: str) -> None:
    """Any strides and offsets: rows that begin at an odd address, columns and rows that are skipped, NaN in between."""
    x, y = batch(130, 40, 5, dtype)
    wide = torch.full((261, 121), torch.nan, dtype=dtype)
    wide[1::2, 2::3] = x
    shifted = torch.full((130 * 40 + 3,), torch.nan, dtype=dtype)[3:].view(130, 40).copy_(x)
    for strided in (x.T.contiguous().T, wide[1::2, 2::3], shifted, x[:1].expand(130, 40)):
        labels = torch.stack([y, -y - 1], 1)[:, 0]
        check(gpu_backend, strided, labels, margin_minus=0.1, precision=precision)
        check(gpu_backend, strided, labels, shifted[:70], labels[:70], margin_minus=0.1, precision=precision)


@pytest.mark.usefixtures("poisoned")
@arithmetic
def test_new_tensors_hold_nan(gpu_backend: str, rng: np.random.Generator, dtype: torch.dtype, precision: str) -> None:
    """Results are written to the last element, and nothing of the workspace is read before it is written."""
    for n, m, d in [(1, 2, 1), (65, 63, 7), (129, 300, 33), (513, 130, 65), (1030, 65, 9)]:
        for form, share in (("symmetric", 0.4), ("reference set", 0.4), ("symmetric", 1.0), ("reference set", 0.0)):
            call = in_dtype(call_of(form, n, m, d, 5, "random", rng), dtype)
            check(gpu_backend, **call, **margins(oracle_of(**call), share), precision=precision)
        check_sides(gpu_backend, *batch(n, d, 5, dtype), margin_minus=0.1, precision=precision)


def test_counts_beyond_2_31(gpu_backend: str) -> None:
    """3.0e9 pairs, most of them hard; and 2.3e9 of a reference set, all of them hard: counts and sums are exact."""
    count = compare_crowd(gpu_backend, Crowd.make(55003, 0, seed=0), None, margin_plus=0.5, margin_minus=-0.25)
    assert count[1] > 2**31
    rows, columns = Crowd.make(70001, 0, seed=1), Crowd.make(33007, 3, seed=2)
    assert compare_crowd(gpu_backend, rows, columns, margin_plus=1.0, margin_minus=-1.0).sum() == 70001 * 33007
