"""The Triton kernels in Triton's interpreter, through the public API: loss, counts and gradients against the oracle.

The interpreter runs every kernel as it is, in NumPy, one program after the other: it shows wrong arithmetic, indices
and masks, not races. Its configuration has tiles of 32 x 64 and masks of 64 KiB: 300 rows make 50 tiles in 4 panels.
tests/kernels/test_triton_aot.py compiles what the interpreter runs.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.batches import KINDS, batch, dyadic, embeddings, margins
from support.oracle import Array, check, check_sides, compare, oracle_of, run, run_sides, two
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tcm_fused import tcm_loss
from tcm_fused.backends import choice
from tcm_fused.backends.operators import OPERATORS
from tcm_fused.backends.problem import Problem
from tcm_fused.reference import tcm_reference

if os.environ["TRITON_INTERPRET"] != "1":
    pytest.skip("TRITON_INTERPRET=0: the kernels are left to the GPU", allow_module_level=True)

import triton
import triton.language as tl

from tcm_fused.backends import triton_kernels, triton_loss

SHIPPED = triton_loss.CONFIGS["interpreter"]
WIDE = replace(SHIPPED, rows=64, step=64, width=256)


@pytest.fixture(params=["descriptors", "pointers"])
def operands(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to read a tile, as on sm_90 and on sm_80, by steps that are a tile and half a tile long."""
    config = SHIPPED if request.param == "descriptors" else replace(SHIPPED, tma=False, step=16)
    monkeypatch.setitem(triton_loss.CONFIGS, "interpreter", config)


@pytest.fixture
def wide_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer steps for thousands of components."""
    monkeypatch.setitem(triton_loss.CONFIGS, "interpreter", WIDE)


def fp16_units(n: int, d: int, rng: np.random.Generator, *, centre: float = 0.0) -> Array:
    """Rows [N, D], D at least 5, whose unit vectors are exact in fp16 and whose similarities are not round at all.

    Integers of which the squares add up to 4^7; the last four see to that (every number is a sum of four squares). With
    them one product in fp16 must be as good as fp32. centre: mean of the unit vectors, so that similarities vary.
    """
    total = 4**7
    roots = np.arange(128)
    two_squares = {int(a * a + b * b): (a, b) for a in roots for b in roots if a >= b}
    sums = np.array(sorted(two_squares))
    x = np.zeros((n, d))
    for row in x:
        while True:
            row[:-4] = np.round((rng.standard_normal(d - 4) + centre) * 120 / np.sqrt((1 + centre**2) * d))
            left = total - int((row**2).sum())
            if left >= 0:
                break
        for first in rng.permutation(sums[sums <= left]):
            if left - first in two_squares:
                row[-4:] = [*two_squares[int(first)], *two_squares[int(left - first)]]
                break
        row[-4:] *= rng.choice([-1.0, 1.0], 4)
    return x * 2.0 ** rng.integers(-3, 4, size=(n, 1))


# Batches of every form.


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    sizes = st.sampled_from([1, 2, 17, 31, 32, 33, 64, 65, 129, 200])
    n, d = draw(sizes), draw(st.sampled_from([1, 2, 3, 15, 16, 17, 33, 70]))
    classes = draw(st.sampled_from([1, 2, 5, 30, 999]))
    call: dict[str, Any] = {}
    rows = [n]
    form = draw(st.sampled_from(["symmetric", "symmetric", "reference set", "row_offset"]))
    if form == "reference set":
        rows.append(draw(sizes))
    elif form == "row_offset":
        rows.append(n + draw(st.integers(0, 60)))
        call["row_offset"] = draw(st.sampled_from([0, (rows[1] - n) // 2, rows[1] - n]))
    y_all = rng.integers(classes, size=sum(rows))
    x_all = embeddings(draw(st.sampled_from(KINDS)), y_all, d, rng)
    padding = draw(st.sampled_from([0.0, 0.0, 0.3, 0.9]))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16]))
    sets = []
    for part in np.split(np.arange(sum(rows)), np.cumsum(rows)[:-1]):
        y = np.where(rng.random(len(part)) < padding, rng.integers(-9, 0, size=len(part)), y_all[part])
        sets += [torch.from_numpy(x_all[part]).to(dtype), torch.from_numpy(y)]
    call.update(zip(("x", "y", "ref_x", "ref_y"), sets, strict=False))
    if draw(st.booleans()):
        call.update(margins(oracle_of(**call), draw(st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]))))
    else:
        number = st.floats(-2, 2, allow_subnormal=False)
        call.update(margin_plus=draw(number), margin_minus=draw(number))
    weight = st.sampled_from([0.0, 0.25, 1.0, 7.0])
    call.update(lambda_plus=draw(weight), lambda_minus=draw(weight))
    call.update(precision=draw(st.sampled_from(["auto", "fp32", "fp16"])))
    return call


@settings(max_examples=25)
@given(call=calls(), penalties=st.booleans())
def test_random_batches(call: dict[str, Any], penalties: bool) -> None:
    sets = [call.pop(name) for name in ("x", "y", "ref_x", "ref_y") if name in call]
    (check_sides if penalties else check)("triton", *sets, **call)


@pytest.mark.usefixtures("operands")
@pytest.mark.parametrize(
    ("operands", "form", "precision"),
    [
        ("descriptors", "symmetric", "fp32"),
        ("descriptors", "rectangular", "fp32"),
        ("pointers", "symmetric", "fp16"),
        ("pointers", "rectangular", "fp16"),
    ],
    indirect=["operands"],
)
def test_every_kind_of_tile(form: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty, mixed and full tiles of either side, in several panels, with sums in parts; and they are exact to fp32.

    Three classes of several tiles, the first at the opposite of the others; a few rows alone, and padding. The margins
    are such that all pairs of the last class are hard and some of the first, and all across the last two.
    """
    rng = np.random.default_rng(7)
    y = np.concatenate([np.repeat([1, 3, 4], [130, 110, 150]), rng.integers(10, 90, size=23), np.full(9, -1)])
    x = fp16_units(len(y), 40, rng, centre=1.0)
    x[y == 1] = -fp16_units(130, 40, rng, centre=4.0)
    s = oracle_of(torch.from_numpy(x), torch.from_numpy(y)).s
    within, across = s[np.ix_(y == 4, y == 4)], s[np.ix_(y == 3, y == 4)]
    options: dict[str, Any] = {
        "margin_plus": within[~np.eye(150, dtype=bool)].max() + 1e-3,
        "margin_minus": across.min() - 1e-3,
    }
    order = rng.permutation(len(y))
    sets = [torch.from_numpy(x[order]).float(), torch.from_numpy(y[order])]
    if form == "rectangular":
        sets = [sets[0][:250], sets[1][:250], *sets]
    seen: set[tuple[int, int]] = set()
    panels = 0
    one_panel = triton_kernels.lists

    class Lists:
        """The kernel, with a look at what it gets."""

        def __getitem__(self, grid: Any) -> Any:
            def launch(penalty: Tensor, count: Tensor, kind: Tensor, *rest: Any, **meta: Any) -> None:
                nonlocal panels
                panels += 1
                seen.update((side, int(k)) for side in (0, 1) for k in kind[side].unique())
                one_panel[grid](penalty, count, kind, *rest, **meta)

            return launch

    monkeypatch.setattr(triton_kernels, "lists", Lists())
    result = run("triton", *sets, **options, precision=precision)
    near = compare(result, oracle_of(*sets, **options), torch.float32)
    assert near <= 20
    assert seen == {(side, kind) for side in (0, 1) for kind in (0, 1, 2)}
    assert panels >= 3


@pytest.mark.parametrize("share", [0.0, 0.003, 0.5, 0.997, 1.0])
@pytest.mark.parametrize("kind", ["random", "groups"])
def test_densities(kind: str, share: float) -> None:
    """From no hard pair to all, and as the kernel on the CPU."""
    rng = np.random.default_rng(3)
    y = rng.integers(6, size=131)
    x, labels = torch.from_numpy(embeddings(kind, y, 33, rng)).float(), torch.from_numpy(y)
    options = margins(oracle_of(x, labels), share)
    result = check("triton", x, labels, **options)
    other = run("cpu", x, labels, **options)
    assert result.count.tolist() == pytest.approx(other.count.tolist(), abs=2)
    assert result.loss == pytest.approx(other.loss, rel=1e-5, abs=1e-7)
    if result.count.tolist() == other.count.tolist():
        np.testing.assert_allclose(result.grad_x, other.grad_x, rtol=0, atol=2e-6 * np.abs(other.grad_x).max())


@pytest.mark.parametrize(("grad_x", "grad_ref"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("row_offset", [None, 0, 60])
def test_gradients_asked_for(row_offset: int | None, grad_x: bool, grad_ref: bool) -> None:
    """Either gradient alone, both, none; rows that are columns too need not have their labels."""
    sets = (*batch(70, 9, 5), *batch(135, 9, 5, seed=1))
    check("triton", *sets, margin_minus=0.2, row_offset=row_offset, grad_x=grad_x, grad_ref=grad_ref)


@pytest.mark.parametrize(("grad_x", "grad_ref"), [(True, True), (False, True)])
def test_gradients_of_the_penalties(grad_x: bool, grad_ref: bool) -> None:
    """Either's own, also where the other has no hard pair."""
    sets = (*batch(40, 9, 5), *batch(70, 9, 5, seed=1))
    for margin in ({"margin_minus": 0.2}, {"margin_plus": -2.0}, {"margin_minus": 2.0}):
        options: dict[str, Any] = {**margin, "grad_x": grad_x, "grad_ref": grad_ref}
        check_sides("triton", *sets, **options)


@pytest.mark.parametrize("n", [1, 40, 130])
@pytest.mark.parametrize("classes", [1, 9])
def test_row_offset(n: int, classes: int) -> None:
    """Every pair is hard, so the count tells which are left out."""
    ref_x, ref_y = batch(130, 7, classes)
    for offset in {0, (130 - n) // 2, 130 - n}:
        own = slice(offset, offset + n)
        options: dict[str, Any] = {"row_offset": offset, "margin_plus": 2.0, "margin_minus": -2.0}
        result = check("triton", ref_x[own], ref_y[own], ref_x, ref_y, **options)
        assert result.count.sum() == n * 130 - n


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float16, "auto"), (torch.bfloat16, "auto"), (torch.float32, "fp16"), (torch.float32, "fp32")],
)
def test_similarities_on_the_margin(dtype: torch.dtype, precision: str) -> None:
    """Multiples of 1/4 against margins that are too: both inequalities are inclusive, for zero rows as well."""
    rng = np.random.default_rng(1)
    x, y = torch.from_numpy(dyadic(70, 33, rng)).to(dtype), torch.from_numpy(rng.integers(4, size=70))
    for margin_plus, margin_minus in [(0.5, 0.25), (0.0, 0.0), (-1.0, 1.0)]:
        options: dict[str, Any] = {"margin_plus": margin_plus, "margin_minus": margin_minus}
        result = run("triton", x, y, **options, precision=precision)
        compare(result, oracle_of(x, y, **options), dtype, exact=True)


@pytest.mark.parametrize(
    ("margin_plus", "margin_minus"), [(-0.4, -0.4), (3.0, -3.0), (-3.0, 3.0), (3.0, 3.0), (1e37, -1e37)]
)
def test_margins(margin_plus: float, margin_minus: float) -> None:
    x, y = batch(67, 3, 4)
    check("triton", x, y, margin_plus=margin_plus, margin_minus=margin_minus)


@pytest.mark.parametrize(("lambda_plus", "lambda_minus"), [(0.0, 0.0), (0.0, 2.0), (1e20, 1e-20)])
def test_weights(lambda_plus: float, lambda_minus: float) -> None:
    check("triton", *batch(67, 7, 4), margin_minus=0.1, lambda_plus=lambda_plus, lambda_minus=lambda_minus)


def test_masks_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form that 17 million columns need, at a size that fits."""
    monkeypatch.setattr(triton_loss, "LONGEST", 1)
    monkeypatch.setitem(triton_loss.CONFIGS, "interpreter", replace(SHIPPED, tma=False))
    check("triton", *batch(70, 9, 5), *batch(40, 9, 5, seed=1), margin_minus=0.1)


# Precision.


@triton.jit
def _similarities(
    rows, columns, out, padded, d, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr
):
    row, column = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    s = triton_kernels._product(rows, columns, row, column, padded, padded, d, PARTS, ROWS, COLUMNS, STEP, False)
    r, c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    tl.store(out + r[:, None] * padded + c[None, :], s)


def similarity_errors(x: Array, parts: int) -> tuple[float, float]:
    """Root mean square and largest error of the kernel's similarities of rows [N, D]."""
    config = WIDE
    embedding = triton_loss.prepare(
        config, torch.from_numpy(x).float(), torch.zeros(len(x), dtype=torch.int64), parts, False
    )
    n, d = embedding.padded, embedding.unit.shape[1]
    out = torch.empty(n, n)
    grid = (n // config.rows, n // config.columns)
    _similarities[grid](
        embedding.unit,
        embedding.unit,
        out,
        n,
        d,
        PARTS=parts,
        ROWS=config.rows,
        COLUMNS=config.columns,
        STEP=config.step,
    )
    x = torch.from_numpy(x).float().double().numpy()
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    error = (out[: len(x), : len(x)].double().numpy() - x @ x.T)[~np.eye(len(x), dtype=bool)]
    return float(np.sqrt((error**2).mean())), float(np.abs(error).max())


@pytest.mark.parametrize(("d", "bound"), [(64, 3e-8), (512, 1.2e-8), (4096, 1.2e-8)])
def test_three_products_are_as_good_as_fp32(d: int, bound: float) -> None:
    """The error of similarities, which the same in one fp16 product has a thousand times.

    Also of rows whose components are almost all far below the largest, where fp16 is subnormal.
    """
    rng = np.random.default_rng(d)
    x = rng.standard_normal((64, d))
    error, largest = similarity_errors(x, 2)
    assert error < bound
    assert largest < 6 * bound
    assert similarity_errors(x, 1)[0] > 200 * error
    x *= 1e-6
    x[np.arange(64), rng.integers(d, size=64)] = 1
    assert similarity_errors(x, 2)[0] < bound


def test_fp16_error_is_that_of_rounding_the_unit_vectors() -> None:
    """D = 512: 1.3e-5, a hundred times less than the bound that holds for any rows."""
    assert 1e-5 < similarity_errors(np.random.default_rng(0).standard_normal((64, 512)), 1)[0] < 1.6e-5


@pytest.mark.usefixtures("wide_steps")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_wide_embeddings(precision: str) -> None:
    check("triton", *batch(33, 4097, 3), margin_plus=0.0, margin_minus=0.01, precision=precision)


def test_precision_follows_the_input_and_the_user() -> None:
    """One product in fp16 shows: the loss is not that of fp32, and "auto" is one of the two."""
    x, y = batch(60, 33, 5)
    losses = {precision: tcm_loss(x, y, backend="triton", precision=precision).item() for precision in ("fp32", "fp16")}
    assert losses["fp32"] != losses["fp16"]
    assert tcm_loss(x, y, backend="triton").item() == losses["fp32"]
    half, float_ = x.half(), x.half().float()
    assert torch.equal(tcm_loss(half, y, backend="triton"), tcm_loss(float_, y, backend="triton", precision="fp16"))
    assert torch.equal(
        tcm_loss(half, y, backend="triton", precision="fp32"), tcm_loss(float_, y, backend="triton", precision="fp32")
    )


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


# The same bits, no waiting, bounded memory.


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that is not initialised is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("rectangular", "precision"), [(False, "fp32"), (False, "fp16"), (True, "fp32")])
def test_same_bits_whatever_the_memory_held(rectangular: bool, precision: str, request: pytest.FixtureRequest) -> None:
    """Two runs, the second on poisoned memory; ragged in rows, columns and components."""
    sets = batch(135, 37, 9) + (batch(67, 37, 9, seed=1) if rectangular else ())
    options: dict[str, Any] = {"margin_plus": 0.0, "margin_minus": 0.0, "precision": precision}
    first = check("triton", *sets, **options)
    request.getfixturevalue("poisoned")
    again = run("triton", *sets, **options)
    assert again.loss == first.loss
    np.testing.assert_array_equal(again.count, first.count)
    np.testing.assert_array_equal(again.violation, first.violation)
    np.testing.assert_array_equal(again.grad_x, first.grad_x)
    if rectangular:
        np.testing.assert_array_equal(again.grad_ref, first.grad_ref)
    check_sides("triton", *sets, **options)


def test_inputs_stay_as_they_are() -> None:
    sets = (*batch(70, 9, 5), *batch(40, 9, 5, seed=1))
    before = [t.clone() for t in sets]
    run("triton", *sets, margin_minus=0.1)
    for now, then in zip(sets, before, strict=True):
        assert torch.equal(now, then)


class _NoWait(TorchDispatchMode):
    """Refuses what makes the host wait for a device: values read, and shapes that depend on values."""

    REFUSED = ("_local_scalar_dense", "nonzero", "_unique", "masked_select", "is_nonzero", "equal.", "_to_copy", "item")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in self.REFUSED), func
        return func(*args, **(kwargs or {}))


def test_the_host_does_not_wait() -> None:
    """Of everything the launches do in between; the kernels themselves are left out here."""
    x, y = batch(200, 9, 5)
    sets, numbers = (x, y, *batch(230, 9, 5, seed=1), 7), two(0.9, 0.5)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("normalise", "tile_sums", "similarity", "lists", "masked_sum", "collect", "totals", "project"):
            patch.setattr(triton_kernels, name, _Nothing())
        with _NoWait():
            triton_loss.run(Problem(*sets, numbers, numbers, False, False, True, True))
            triton_loss.run(Problem(x, y, None, None, None, numbers, None, False, True, True, False))


class _Nothing:
    """A kernel that is not launched."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **meta: None


@pytest.mark.parametrize(("n", "m"), [(1000, None), (4096, None), (65_536, None), (1_000_000, None), (500, 10**6)])
def test_panels(n: int, m: int | None) -> None:
    """They cover every pair once, their memory is bounded, and they are few."""
    config, d = triton_loss.CONFIGS["sm_90"], 512
    padded = [-(-rows // config.columns) * config.columns for rows in (n, m or n)]
    walk = triton_loss.Walk.__new__(triton_loss.Walk)
    walk.config, walk.d, walk.symmetric = config, d, m is None
    walk.rows, walk.columns = (_padded(rows) for rows in padded)
    row = 0
    panels = list(walk.panels())
    for begin, height, column, width in panels:
        assert begin == row
        assert column == (begin if m is None else 0)
        assert column + width == padded[1]
        assert height % config.columns == 0
        assert 4 * height * width <= max(config.panel_bytes, 4 * d * max(padded))
        row += height
    assert row == padded[0]
    pairs = padded[0] * padded[1] // (2 if m is None else 1)
    # Heights are rounded down to tiles: at the least D = 512 rows, that is to no less than half.
    assert len(panels) <= 2 + 2 * pairs / max(config.panel_bytes // 4, d * max(padded))


def _padded(rows: int) -> Any:
    """Embeddings that have nothing but their size."""
    embedding = triton_loss.Embeddings.__new__(triton_loss.Embeddings)
    embedding.norm = torch.empty((2, rows), device="meta")
    return embedding


# In PyTorch's machinery.


@pytest.mark.parametrize("form", ["symmetric", "reference set"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype, form: str) -> None:
    """Schema, fake kernel, autograd registration, and tracing with static and dynamic shapes."""
    x, y = batch(40, 5, 5, dtype)
    ref_x, ref_y = batch(50, 5, 5, dtype, seed=1) if form == "reference set" else (None, None)
    x.requires_grad_()
    operators, how = OPERATORS[choice.choose("triton", "cpu", dtype)], (False, dtype != torch.float32, True, False)
    rows = (x, y, ref_x, ref_y, None, two(0.9, 0.1))
    torch.library.opcheck(operators.loss, (*rows, two(1.0, 2.0), *how))
    torch.library.opcheck(operators.penalties, (*rows, *how))


def test_compile() -> None:
    """One graph, forward and backward; the gradient is the eager one."""
    x, y = batch(40, 9, 5)
    expected = run("triton", x, y, margin_minus=0.1).grad_x
    x.requires_grad_()
    torch._dynamo.reset()
    loss = torch.compile(tcm_loss, fullgraph=True, backend="aot_eager")(x, y, margin_minus=0.1, backend="triton")
    torch.autograd.backward(loss)
    torch._dynamo.reset()
    assert x.grad is not None
    np.testing.assert_array_equal(x.grad.double().numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_reduction_over_all_pairs(dtype: torch.dtype) -> None:
    """What is composed from the penalties: loss and gradients are those of the definition, by plain autograd."""
    sets = (*batch(70, 9, 5, dtype), *batch(135, 9, 5, dtype, seed=1))
    options: dict[str, Any] = {"margin_minus": 0.2, "lambda_plus": 3.0, "reduction": "all"}
    leaves = [t.double().requires_grad_() if t.is_floating_point() else t for t in sets]
    expected = tcm_reference(*leaves, **options)[0]
    torch.autograd.backward(expected)
    result = run("triton", *sets, **options, precision="fp32")
    assert result.loss == pytest.approx(expected.item(), rel=1e-6)
    for grad, leaf in ((result.grad_x, leaves[0]), (result.grad_ref, leaves[2])):
        assert leaf.grad is not None
        # 16-bit: the gradient's own rounding is half of that. float32: sums over up to 135 unit vectors round as well.
        atol = torch.finfo(dtype).eps * leaf.grad.abs().max().item()
        np.testing.assert_allclose(grad, leaf.grad.numpy(), rtol=0, atol=4 * atol if dtype == torch.float32 else atol)


# Which backend runs.


def test_float64_is_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match="backend='triton' has no float64 kernels; use backend='torch'"):
        tcm_loss(*batch(4, 3, 2, torch.float64), backend="triton")


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({0: torch.ones(6, 3, dtype=torch.float64)}, "embeddings must be"),
        ({1: torch.arange(5)}, "labels"),
        ({1: torch.arange(6, dtype=torch.int32)}, "labels must be int64"),
        ({2: torch.ones(8, 4)}, "embeddings must be"),
        ({2: torch.ones(8, 3).half()}, "of one dtype"),
        ({3: torch.arange(9)}, "labels"),
        ({3: None}, "both ref_x and ref_y"),
        ({4: 3}, "row_offset"),
        ({4: -1}, "row_offset"),
        ({5: two(0.9, 0.5).float()}, "margins and weights must be"),
        ({5: torch.ones(4, dtype=torch.float64)[::2]}, "margins and weights must be"),
        ({6: torch.ones((), dtype=torch.float64)}, "margins and weights must be"),
        ({7: True}, "no squared penalty"),
    ],
)
def test_operator_refuses_what_it_cannot_read(changed: dict[int, Any], word: str) -> None:
    """Called without `tcm_loss` it trusts nobody: what is wrong would be read out of bounds."""
    call: list[Any] = [torch.ones(6, 3), torch.arange(6), torch.ones(8, 3), torch.arange(8), 0, two(0.9, 0.5)]
    call += [two(1.0, 1.0), False, False, True, True]
    for index, value in changed.items():
        call[index] = value
    with pytest.raises(RuntimeError, match=word):
        torch.ops.tcm_fused.loss_triton(*call)
    if 6 not in changed:
        with pytest.raises(RuntimeError, match=word):
            torch.ops.tcm_fused.penalties_triton(*call[:6], *call[7:])


def test_gpu_tensors_are_refused_in_the_interpreter() -> None:
    x, y = batch(4, 3, 2)
    with pytest.raises(RuntimeError, match="backend='triton' needs tensors on device 'cpu', embeddings are on 'meta'"):
        tcm_loss(x.to("meta"), y.to("meta"), backend="triton")


@pytest.mark.filterwarnings("error")
def test_auto_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA kernels, else Triton, else the blocked form with one warning that says why, or without one for float64."""
    missing: dict[str, str] = {}
    monkeypatch.setattr(choice, "why_unavailable", missing.get)
    monkeypatch.setattr(triton_loss, "INTERPRETED", False)
    assert choice.choose("auto", "cuda", torch.float32) == "cuda"
    missing["cuda"] = "it was built without nvcc; build it again with nvcc on the PATH"
    assert choice.choose("auto", "cuda", torch.float16) == "triton"
    assert choice.choose("auto", "cuda", torch.float64) == "torch"
    missing["triton"] = "pip install triton"
    with pytest.warns(UserWarning, match="slower PyTorch fallback on 'cuda'.*nvcc on the PATH.*pip install triton"):
        assert choice.choose("auto", "cuda", torch.float32) == "torch"
    assert choice.choose("auto", "cuda", torch.float32) == "torch"  # and no second warning, which would be an error
    assert choice.choose("auto", "cuda", torch.float64) == "torch"


def test_without_triton() -> None:
    """The package imports and works; asked for by name the reason is told, and what to do."""
    script = """
import sys
sys.modules["triton"] = None
import torch
from tcm_fused import tcm_loss
x, y = torch.randn(9, 3), torch.arange(9) % 2
tcm_loss(x, y)
try:
    tcm_loss(x, y, backend="triton")
except RuntimeError as error:
    for words in ("backend='triton' is not available", "not be imported", "pip install triton", "backend='torch'"):
        assert words in str(error), error
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_a_gpu() -> None:
    """Outside the interpreter the reason is that there is no GPU; the kernels import all the same."""
    script = """
import torch
from tcm_fused.backends import choice
assert torch.cuda.is_available() or "torch finds no GPU" in choice.why_unavailable("triton")
import tcm_fused.backends.triton_loss
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
