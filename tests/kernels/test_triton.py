"""The Triton kernels in Triton's interpreter, through the public API: loss, counts and gradients against the oracle.

The interpreter runs every kernel as it is, in NumPy, one program after the other: it shows wrong arithmetic, indices
and masks, not races. Its configuration has tiles of 32 x 64 and masks of 64 KiB: 300 rows make 50 tiles in 4 panels.
tests/kernels/test_triton_aot.py compiles what the interpreter runs.
"""

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx_machine.problems import at_the_bound
from support.batches import KINDS, batch, dyadic, embeddings, margins
from support.oracle import Array, check, check_sides, compare, oracle_of, run
from torch import Tensor

from tcm_fused import tcm_loss

if os.environ["TRITON_INTERPRET"] != "1":
    pytest.skip("TRITON_INTERPRET=0: the kernels are left to the GPU", allow_module_level=True)

import triton
import triton.language as tl

from tcm_fused.backends import triton_loss, triton_prologue, triton_similarity

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
    y = np.concatenate([np.repeat([99, 97, 96], [130, 110, 150]), rng.integers(10, 90, size=23), np.full(9, -1)])
    x = fp16_units(len(y), 40, rng, centre=1.0)
    x[y == 99] = -fp16_units(130, 40, rng, centre=4.0)
    s = oracle_of(torch.from_numpy(x), torch.from_numpy(y)).s
    within, across = s[np.ix_(y == 96, y == 96)], s[np.ix_(y == 97, y == 96)]
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
    one_panel = triton_similarity.lists

    class Lists:
        """The kernel, with a look at what it gets."""

        def __getitem__(self, grid: Any) -> Any:
            def launch(table: Tensor, panel_sums: Tensor, begin: int, i: int, j: int, *rest: Any, **meta: Any) -> None:
                nonlocal panels
                panels += 1
                kinds = table[4 * i * j : 6 * i * j].view(2, i * j)
                seen.update((side, int(k)) for side in (0, 1) for k in kinds[side].unique())
                one_panel[grid](table, panel_sums, begin, i, j, *rest, **meta)

            return launch

    monkeypatch.setattr(triton_similarity, "lists", Lists())
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


@pytest.mark.parametrize("violation", [1e-5, -1e-5])
@pytest.mark.parametrize("side", [0, 1])
def test_pairs_that_the_high_parts_put_on_the_other_side(side: int, violation: float) -> None:
    """By nearly as much as the bound allows: all low parts point one way. Tiles then take their low parts too."""
    problem = at_the_bound(side, violation, n=256)
    sets = torch.from_numpy(problem.x), torch.from_numpy(problem.y)
    result = check("triton", *sets, margin_plus=problem.margin[0], margin_minus=problem.margin[1])
    hard = (256 * 127, 256)[side] if violation > 0 else 0
    assert result.count.tolist() == ([hard, 0] if side == 0 else [0, hard])


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
    s = triton_similarity.high_product(rows, columns, row, column, d, ROWS, COLUMNS, STEP, False)
    if PARTS == 2:
        s = triton_similarity.with_low_parts(
            s, rows, columns, row, column, padded, padded, d, ROWS, COLUMNS, STEP, False
        )
    r, c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    tl.store(out + r[:, None] * padded + c[None, :], s)


def similarity_errors(x: Array, parts: int) -> tuple[float, float]:
    """Root mean square and largest error of the kernel's similarities of rows [N, D]."""
    config = WIDE
    y, state = torch.zeros(len(x), dtype=torch.int64), torch.zeros(triton_prologue.STATE, dtype=torch.float64)
    embedding = triton_loss.allocate(config, torch.from_numpy(x).float(), y, 0, parts, False)
    triton_loss.normalise(config, embedding, parts, state, (None, (0, 0), None, (0, 0)))
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
