"""Loss, counts and gradients of every backend against the oracle."""

import copy
import itertools
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.batches import KINDS, batch, dyadic, embeddings, margins
from support.oracle import check, compare, oracle_of, run
from torch import Tensor

from tcm_fused import TCMLoss, TCMStats, tcm_loss

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LABEL_DTYPES = (
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
)
# Around the sides of tiles, 64 to 256, and several tiles with a ragged last one.
SIZES = (1, 2, 3, 17, 63, 64, 65, 100, 127, 128, 129, 192, 193, 255, 256, 257, 300, 513)
WIDTHS = (1, 2, 3, 7, 31, 33, 64, 65, 100, 257)


# Random batches.


def options() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "penalty": st.sampled_from(["hinge", "squared"]),
            "reduction": st.sampled_from(["violating", "violating", "all"]),
        }
    )


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of one call: form, shapes, geometry, labels, margins, weights, dtype, options."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float32, *DTYPES[:2]]))
    n, d, classes = (
        draw(st.sampled_from(SIZES)),
        draw(st.sampled_from(WIDTHS)),
        draw(st.sampled_from([1, 2, 5, 30, 999])),
    )
    form = draw(st.sampled_from(["symmetric", "symmetric", "reference set", "row_offset"]))
    kind = draw(st.sampled_from(KINDS))
    padding = draw(st.sampled_from([0.0, 0.0, 0.3, 0.9]))
    call: dict[str, Any] = {}
    sizes = [n]
    if form == "reference set":
        sizes.append(draw(st.sampled_from(SIZES)))
    elif form == "row_offset":
        sizes.append(n + draw(st.integers(0, 300), label="columns more than rows"))
        call["row_offset"] = draw(st.sampled_from([0, (sizes[1] - n) // 2, sizes[1] - n]))
    sets = []
    y_all = rng.integers(classes, size=sum(sizes))
    x_all = embeddings(kind, y_all, d, rng)
    for part in np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1]):
        y = np.where(rng.random(len(part)) < padding, rng.integers(-9, 0, size=len(part)), y_all[part])
        sets += [torch.from_numpy(x_all[part]).to(dtype), torch.from_numpy(y)]
    call.update(zip(("x", "y", "ref_x", "ref_y"), sets, strict=False))
    call.update(draw(options()))
    if draw(st.sampled_from([False, False, True])):
        groups = rng.integers(draw(st.sampled_from([1, 2, 2, 5, 30])), size=sum(sizes))
        call["groups"], *rest = np.split(groups, np.cumsum(sizes)[:-1])
        if rest:
            call["ref_groups"] = rest[0]
        if "row_offset" in call:
            call["ref_groups"][call["row_offset"] :][:n] = call["groups"]
        call = {name: torch.from_numpy(value) if "groups" in name else value for name, value in call.items()}
        call["group_pairs"] = draw(st.sampled_from(["within", "across"]))
    number = st.floats(-2, 2, allow_subnormal=False)
    if draw(st.booleans()):
        share = draw(st.sampled_from([0.0, 0.001, 0.02, 0.5, 0.98, 0.999, 1.0]))
        call.update(margins(oracle_of(**call), share))
    else:
        call.update(margin_plus=draw(number), margin_minus=draw(number))
    weight = st.sampled_from([0.0, 0.25, 1.0, 7.0])
    call.update(lambda_plus=draw(weight), lambda_minus=draw(weight))
    return call


@settings(max_examples=150)
@given(call=calls())
def test_random_batches(backend: str, call: dict[str, Any]) -> None:
    check(backend, **call)


@settings(max_examples=200)
@given(data=st.data())
def test_random_small_batches(backend: str, data: st.DataObject) -> None:
    """Every number chosen by hypothesis itself, so that a failure shrinks to a batch that fits on a page."""
    n, m, d = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5)), data.draw(st.integers(1, 3))
    value = st.integers(-4, 4).map(float)
    label = st.integers(-1, 2)
    sets = []
    for rows in (n, m) if data.draw(st.booleans(), label="reference set") else (n,):
        x = data.draw(st.lists(st.lists(value, min_size=d, max_size=d), min_size=rows, max_size=rows))
        y = data.draw(st.lists(label, min_size=rows, max_size=rows))
        sets += [torch.tensor(x, dtype=torch.float64).reshape(rows, d), torch.tensor(y, dtype=torch.int64)]
    margin = st.integers(-15, 15).map(lambda k: k / 10 + 0.03)
    call: dict[str, Any] = data.draw(options())
    if data.draw(st.booleans(), label="groups"):
        names = ("groups", "ref_groups")[: len(sets) // 2]
        for name, labels in zip(names, sets[1::2], strict=True):
            drawn = data.draw(st.lists(label, min_size=len(labels), max_size=len(labels)))
            call[name] = torch.tensor(drawn, dtype=torch.int64)
        call["group_pairs"] = data.draw(st.sampled_from(["within", "across"]))
    check(backend, *sets, margin_plus=data.draw(margin), margin_minus=data.draw(margin), **call)


@pytest.mark.parametrize("share", [0.0, 0.0005, 0.01, 0.5, 0.99, 0.9995, 1.0])
@pytest.mark.parametrize(("n", "d", "classes"), [(64, 7, 3), (65, 33, 40), (257, 65, 6), (700, 31, 2), (1030, 65, 90)])
@pytest.mark.parametrize("kind", ["random", "groups"])
def test_densities(backend: str, kind: str, n: int, d: int, classes: int, share: float) -> None:
    """From no hard pair to all: tiles that are empty, hold a handful, are mixed, lack a handful, are full."""
    rng = np.random.default_rng(n)
    y = rng.integers(classes, size=n)
    x, labels = torch.from_numpy(embeddings(kind, y, d, rng)).float(), torch.from_numpy(y)
    call = margins(oracle_of(x, labels), share)
    oracle = oracle_of(x, labels, **call)
    pairs = np.array([mask.sum() for mask in oracle.pair])
    result = run(backend, x, labels, **call)
    near = compare(result, oracle, x.dtype)
    assert near <= 2 + 3e-3 * pairs.sum(), "a band that holds many of the pairs compares nothing"
    np.testing.assert_allclose(result.count, share * pairs, rtol=0, atol=2 + near)


@pytest.mark.parametrize("share", [0.0005, 0.1, 0.3, 0.99, 1.0])
@pytest.mark.parametrize(("n", "d", "classes"), [(64, 7, 3), (257, 65, 6), (1030, 300, 90)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_densities_of_squares(backend: str, dtype: torch.dtype, n: int, d: int, classes: int, share: float) -> None:
    """Tiles of few and of many weighted pairs; with a reference set too, whose last tile is ragged."""
    rng = np.random.default_rng(n)
    y = rng.integers(classes, size=n)
    x, labels = torch.from_numpy(embeddings("random", y, d, rng)).to(dtype), torch.from_numpy(y)
    call: dict[str, Any] = {**margins(oracle_of(x, labels), share), "penalty": "squared"}
    result = check(backend, x, labels, **call)
    assert result.count.sum() > 0
    check(backend, x, labels, x[: n // 3], labels[: n // 3], row_offset=None, reduction="all", **call)


@pytest.mark.parametrize("penalty", ["hinge", "squared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "d", "classes"), [(2100, 16, 30), (3000, 5, 1500)])
def test_many_tiles(backend: str, n: int, d: int, classes: int, dtype: torch.dtype, penalty: str) -> None:
    """Enough rows for tiles of 256 and more than ten of them a side, of every kind at once."""
    rng = np.random.default_rng(n)
    y = rng.integers(classes, size=n)
    x = torch.from_numpy(embeddings("groups", y, d, rng)).to(dtype)
    check(backend, x, torch.from_numpy(y), margin_plus=0.95, margin_minus=0.3, penalty=penalty)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [17, 65, 257, 700])
@pytest.mark.parametrize("negatives", [False, True])
def test_rows_without_hard_pairs_among_rows_with_all(backend: str, negatives: bool, n: int, dtype: torch.dtype) -> None:
    """Nearly full tiles: rows that no hard pair touches have gradient exactly 0, not the rest of a subtraction."""
    rng = np.random.default_rng(n)
    common, noise = np.eye(300)[0], rng.standard_normal((n, 300))
    noise[:, 0] = 0
    x = 0.7 * common + 0.7 * noise / np.linalg.norm(noise, axis=1, keepdims=True)  # s is 0.5 +- 0.03
    quiet = [3, n // 2, n - 1]
    x[quiet] = 2 * common  # s is 0.7 with the others
    labels = torch.arange(n) if negatives else torch.zeros(n, dtype=torch.int64)
    if negatives:
        x[quiet] = 2 * np.eye(300)[1] + noise[quiet]
        x[quiet, 0] = 0  # s is about 0 with the others
    sets = (torch.from_numpy(x).to(dtype), labels)
    for call, penalty in itertools.product((sets, (*sets, *sets)), ("hinge", "squared")):
        options: dict[str, Any] = {"row_offset": 0 if len(call) == 4 else None, "penalty": penalty}
        result = check(backend, *call, margin_plus=0.68, margin_minus=0.3, **options)
        assert not result.grad_x[quiet].any()
        assert result.grad_ref is None or not result.grad_ref[quiet].any()
        assert result.count.sum() == (n - 3) * (n - 4)


# Exact similarities: decisions on the margin itself.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), [(2, 1), (65, 4), (129, 33), (300, 7), (513, 100)])
def test_similarities_on_the_margin(backend: str, n: int, d: int, dtype: torch.dtype) -> None:
    """Multiples of 1/4 against margins that are too: both inequalities are inclusive, for zero rows as well."""
    rng = np.random.default_rng(n)
    x = torch.from_numpy(dyadic(n, d, rng)).to(dtype)
    y = torch.from_numpy(rng.integers(4, size=n))
    for margin_plus, margin_minus in [(0.5, 0.25), (0.0, 0.0), (-0.25, 0.75), (1.0, -1.0), (-1.0, 1.0)]:
        check(backend, x, y, margin_plus=margin_plus, margin_minus=margin_minus, exact=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("towards", [-2.0, 2.0])
def test_margin_next_to_the_similarity(backend: str, towards: float, dtype: torch.dtype) -> None:
    """One step of the dtype away from it, all pairs on the margin change sides."""
    rng = np.random.default_rng(5)
    x, y = torch.from_numpy(dyadic(200, 16, rng)).to(dtype), torch.from_numpy(rng.integers(3, size=200))
    margin = float(torch.nextafter(torch.tensor(0.5, dtype=dtype), torch.tensor(towards, dtype=dtype)))
    moved = check(backend, x, y, margin_plus=margin, margin_minus=margin, exact=True)
    on_it = check(backend, x, y, margin_plus=0.5, margin_minus=0.5, exact=True)
    lost = on_it.count - moved.count
    assert lost[0 if towards < 0 else 1] > 100
    assert lost[1 if towards < 0 else 0] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [2, 64, 65, 257])
@pytest.mark.parametrize("classes", [1, 3])
def test_all_rows_equal(backend: str, n: int, classes: int, dtype: torch.dtype) -> None:
    """A similarity of exactly 1 on both margins: every pair is hard, the loss and its gradient are 0."""
    x = torch.tensor([[0.5, -0.5, 0.5, 0.5, 0.0]], dtype=dtype).expand(n, 5)
    y = torch.arange(n) % classes
    result = check(backend, x, y, margin_plus=1.0, margin_minus=1.0, exact=True)
    assert result.count.sum() == n * (n - 1)
    assert result.loss == 0
    assert not result.grad_x.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_rows_equal_in_any_direction(backend: str, dtype: torch.dtype) -> None:
    """Inexact similarities, away from the margins: the gradient cancels to rounding."""
    x = batch(1, 31, 1, dtype)[0].expand(301, 31)
    check(backend, x, torch.arange(301) % 3, margin_plus=1.5, margin_minus=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_duplicate_rows(backend: str, dtype: torch.dtype) -> None:
    """Each row seven times, in classes that split them."""
    x = batch(40, 33, 1, dtype)[0].repeat(7, 1)
    y = torch.arange(280) % 6
    check(backend, x, y, margin_plus=0.95, margin_minus=0.2)
    check(backend, x, y, margin_plus=0.2, margin_minus=0.95)


# The edges.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(0, None), (0, 0), (0, 7), (7, 0), (1, None), (1, 1)])
def test_no_pairs(backend: str, n: int, m: int | None, dtype: torch.dtype) -> None:
    """An empty batch, an empty memory, one row: loss 0, gradient 0, and backward works."""
    x, y = batch(n, 5, 2, dtype)
    sets = (x, y) if m is None else (x, y, *batch(m, 5, 2, dtype, seed=1))
    result = check(backend, *sets, row_offset=0 if n == m else None, margin_plus=2.0, margin_minus=-2.0)
    assert result.loss == 0
    assert result.count.tolist() == [0, 0]


@pytest.mark.parametrize("n", [2, 65, 300])
def test_one_class_and_no_positives(backend: str, n: int) -> None:
    x = batch(n, 7, 1)[0]
    assert check(backend, x, torch.zeros(n, dtype=torch.int64), margin_plus=2.0).count.tolist() == [n * (n - 1), 0]
    assert check(backend, x, torch.arange(n), margin_minus=-2.0).count.tolist() == [0, n * (n - 1)]


@pytest.mark.parametrize("n", [1, 65, 300])
def test_all_padding(backend: str, n: int) -> None:
    result = check(backend, batch(n, 7, 1)[0], torch.full((n,), -1), margin_plus=2.0, margin_minus=-2.0)
    assert result.loss == 0
    assert result.count.tolist() == [0, 0]


@pytest.mark.parametrize("margin_plus", [0.9, -0.4, 3.0, -3.0, 100.0, 1e37])
@pytest.mark.parametrize("margin_minus", [0.5, -0.4, 3.0, -3.0, -100.0, -1e37])
def test_margins(backend: str, margin_plus: float, margin_minus: float) -> None:
    x, y = batch(150, 3, 4)
    check(backend, x, y, margin_plus=margin_plus, margin_minus=margin_minus)


@pytest.mark.parametrize(
    ("lambda_plus", "lambda_minus"), [(0.0, 0.0), (0.0, 2.0), (3.0, 0.0), (1e-3, 1e3), (1e20, 1e-20)]
)
def test_weights(backend: str, lambda_plus: float, lambda_minus: float) -> None:
    x, y = batch(150, 7, 4)
    check(backend, x, y, margin_minus=0.1, lambda_plus=lambda_plus, lambda_minus=lambda_minus)


def test_numbers_of_any_kind(backend: str) -> None:
    """Margins and weights may be integers or NumPy scalars."""
    x, y = batch(30, 3, 4)
    numbers: dict[str, Any] = {
        "margin_plus": 1,
        "margin_minus": np.float32(0.5),
        "lambda_plus": np.int64(2),
        "lambda_minus": np.float64(1),
    }
    check(backend, x, y, **numbers)


# Reference sets.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("n", "m", "d"),
    [(1, 1, 3), (1, 300, 7), (300, 1, 7), (63, 65, 33), (64, 128, 2), (129, 513, 65), (700, 90, 31), (300, 1030, 16)],
)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99, 1.0])
def test_reference_set(backend: str, share: float, n: int, m: int, d: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(n * m)
    y = rng.integers(9, size=n + m)
    x = torch.from_numpy(embeddings("groups", y, d, rng) + rng.standard_normal((n + m, d))).to(dtype)
    sets = (x[:n], torch.from_numpy(y[:n]), x[n:], torch.from_numpy(y[n:]))
    check(backend, *sets, **margins(oracle_of(*sets), share))


@pytest.mark.parametrize(("grad_x", "grad_ref"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("row_offset", [None, 0, 100, 200])
def test_gradients_asked_for(backend: str, row_offset: int | None, grad_x: bool, grad_ref: bool) -> None:
    """Either gradient alone, both, none: each is right whatever else is asked."""
    sets = (*batch(150, 9, 5), *batch(350, 9, 5, seed=1))
    check(backend, *sets, margin_minus=0.2, row_offset=row_offset, grad_x=grad_x, grad_ref=grad_ref)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 2), (64, 65), (65, 129), (100, 300), (300, 300), (257, 600)])
@pytest.mark.parametrize("classes", [1, 9])
def test_row_offset(backend: str, n: int, m: int, classes: int) -> None:
    """Rows that are columns too, first, in the middle and last: every pair is hard, so the count tells."""
    ref_x, ref_y = batch(m, 7, classes)
    for offset in {0, (m - n) // 2, m - n}:
        own = slice(offset, offset + n)
        result = check(
            backend, ref_x[own], ref_y[own], ref_x, ref_y, row_offset=offset, margin_plus=2.0, margin_minus=-2.0
        )
        assert result.count.sum() == n * m - n


def test_row_offset_leaves_out_by_index_not_by_value(backend: str) -> None:
    """The pair (i, row_offset + i) goes whatever the two embeddings and labels are; an equal row elsewhere stays."""
    x, y = batch(80, 7, 3)
    ref_x, ref_y = batch(200, 7, 3, seed=1)
    ref_x[150] = x[3]
    for offset in (0, 60, 120):
        check(backend, x, y, ref_x, ref_y, row_offset=offset, margin_plus=1.5, margin_minus=-1.5)


def test_symmetric_form_is_the_rows_against_themselves(backend: str) -> None:
    """Gradients to the rows and to the columns add up to that of the symmetric form."""
    x, y = batch(200, 16, 7, torch.float64)
    plain = run(backend, x, y, margin_minus=0.1)
    both = run(backend, x, y, x, y, row_offset=0, margin_minus=0.1)
    assert both.count.tolist() == plain.count.tolist()
    assert both.loss == pytest.approx(plain.loss, rel=1e-13)
    np.testing.assert_allclose(both.grad_x + both.grad_ref, plain.grad_x, rtol=0, atol=1e-14)


def test_shards_add_up(backend: str) -> None:
    """Each rank's rows against all columns: the counts and penalties add up to the whole batch's."""
    x, y = batch(300, 16, 7, torch.float64)
    whole = run(backend, x, y, margin_minus=0.1)
    shards = [run(backend, x[k : k + 100], y[k : k + 100], x, y, row_offset=k, margin_minus=0.1) for k in (0, 100, 200)]
    assert np.sum([shard.count for shard in shards], axis=0).tolist() == whole.count.tolist()
    penalty = np.sum([shard.violation * shard.count for shard in shards], axis=0)
    np.testing.assert_allclose(penalty, whole.violation * whole.count, rtol=1e-13)


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


# What is not finite.


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


# The same bits, and no trace.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rectangular", [False, True])
@pytest.mark.parametrize("options", [{}, {"penalty": "squared", "reduction": "all"}], ids=["plain", "squared"])
def test_two_runs_give_the_same_bits(
    backend: str, options: dict[str, Any], rectangular: bool, dtype: torch.dtype
) -> None:
    """Many tiles, half of the pairs hard, other work in between."""
    sets: tuple[Tensor, ...] = batch(1500, 33, 40, dtype)
    if rectangular:
        sets = (*sets, *batch(700, 33, 40, dtype, seed=1))
    first = run(backend, *sets, margin_plus=0.0, margin_minus=0.0, **options)
    for _ in range(3):
        run(backend, *batch(400, 65, 3), margin_minus=0.1)
        again = run(backend, *sets, margin_plus=0.0, margin_minus=0.0, **options)
        assert again.loss == first.loss
        np.testing.assert_array_equal(again.count, first.count)
        np.testing.assert_array_equal(again.violation, first.violation)
        np.testing.assert_array_equal(again.grad_x, first.grad_x)
        if rectangular:
            np.testing.assert_array_equal(again.grad_ref, first.grad_ref)


def test_any_number_of_threads(backend: str) -> None:
    threads = torch.get_num_threads()
    x, y = batch(700, 33, 9)
    oracle = oracle_of(x, y, margin_minus=0.05)
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            compare(run(backend, x, y, margin_minus=0.05), oracle, x.dtype)
    finally:
        torch.set_num_threads(threads)


def test_calls_at_the_same_time(backend: str) -> None:
    """From four threads of Python: nothing is shared between calls."""
    sets = [batch(n, 33, 9, seed=n) for n in (300, 257, 65, 400)]
    oracles = [oracle_of(*each, margin_minus=0.05) for each in sets]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            results = pool.map(lambda each: run(backend, *each, margin_minus=0.05), sets)
            for result, oracle in zip(results, oracles, strict=True):
                compare(result, oracle, torch.float32)


def test_inputs_stay_as_they_are(backend: str) -> None:
    sets = (*batch(130, 9, 5), *batch(70, 9, 5, seed=1))
    before = [t.clone() for t in sets]
    run(backend, *sets, margin_minus=0.1)
    run(backend, *sets[:2], margin_minus=0.1)
    for now, then in zip(sets, before, strict=True):
        assert torch.equal(now, then)


# Groups, and all pairs as the divisor.

GROUPED_FORMS = ("symmetric", "reference set", "row_offset")


def grouped(form: str, kind: str, dtype: torch.dtype = torch.float32) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Sets with a tenth of padding, and their groups: four of uneven size, one, or one for each row."""
    rng = np.random.default_rng(11)
    m, n, offset = (60, 30, 20) if kind == "single" else (330, 130, 100)
    x, y = batch(m, 9, 5, dtype)
    y[::10] = -1
    groups = {
        "four": torch.from_numpy(np.minimum(rng.integers(4, size=m), rng.integers(6, size=m))) - 1,
        "one": torch.full((m,), 7),
        "single": torch.arange(m),
    }[kind]
    if form == "symmetric":
        return (x, y), {"groups": groups}
    part = slice(offset, offset + n)
    call = {"groups": groups[part], "ref_groups": groups, "row_offset": offset if form == "row_offset" else None}
    return (x[part], y[part], x, y), call


@pytest.mark.parametrize("penalty", ["hinge", "squared"])
@pytest.mark.parametrize("group_pairs", ["within", "across"])
@pytest.mark.parametrize("kind", ["four", "one", "single"])
@pytest.mark.parametrize("form", GROUPED_FORMS)
def test_groups(backend: str, form: str, kind: str, group_pairs: str, penalty: str) -> None:
    """Against the oracle; and where all pairs are left, or none, the loss without groups, or 0."""
    sets, groups = grouped(form, kind)
    call: dict[str, Any] = {"margin_minus": 0.1, "lambda_plus": 0.3, "penalty": penalty, "row_offset": None}
    for reduction in ("violating", "all"):
        call["reduction"] = reduction
        result = check(backend, *sets, **{**call, **groups}, group_pairs=group_pairs)
        if kind == "four":
            assert result.count.min() > 0
        elif (kind == "one") == (group_pairs == "within"):
            # A row is the only one of its group: across groups, all pairs but those with itself.
            offset = groups.get("row_offset")
            if kind == "single" and form != "symmetric":
                offset = 20
            plain = run(backend, *sets, **{**call, "row_offset": offset})
            assert result.count.tolist() == plain.count.tolist()
            assert result.loss == pytest.approx(plain.loss, rel=1e-6)
        elif form != "reference set":
            assert result.count.tolist() == [0, 0]
            assert result.loss == 0
            assert not result.grad_x.any()


@pytest.mark.parametrize("dtype", LABEL_DTYPES, ids=str)
@pytest.mark.parametrize("group_pairs", ["within", "across"])
def test_group_dtypes_and_layouts(backend: str, group_pairs: str, dtype: torch.dtype) -> None:
    """Any integers, negative ones too, at any stride; labels at a stride as well."""
    sets, groups = grouped("row_offset", "four")
    if dtype == torch.bool:
        values = torch.tensor([True, False, True, False])
    else:
        info = torch.iinfo(dtype)
        values = torch.from_numpy(np.array([3, 0, info.max, info.min], dtype=str(dtype).removeprefix("torch.")))
    cast: dict[str, Any] = {name: values[groups[name] + 1] for name in ("groups", "ref_groups")}
    plain: dict[str, Any] = {name: value.long() for name, value in cast.items()}
    wide: dict[str, Any] = {name: torch.stack([value, value], 1)[:, 0] for name, value in cast.items()}
    call: dict[str, Any] = {"row_offset": 100, "margin_minus": 0.1, "reduction": "all", "group_pairs": group_pairs}
    expected = check(backend, *sets, **{**plain, **call})
    x, y, ref_x, ref_y = sets
    strided = (x, torch.stack([y, y], 1)[:, 1], ref_x, torch.stack([ref_y, ref_y], 1)[:, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for result in (run(backend, *strided, **{**cast, **call}), run(backend, *strided, **{**wide, **call})):
            assert result.loss == expected.loss
            np.testing.assert_array_equal(result.grad_x, expected.grad_x)
            np.testing.assert_array_equal(result.grad_ref, expected.grad_ref)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("group_pairs", ["within", "across"])
@pytest.mark.parametrize("form", GROUPED_FORMS)
def test_groups_with_a_row_that_is_not_finite(backend: str, form: str, group_pairs: str, value: float) -> None:
    """NaN for all rows that take part, those of other groups and of none too; padding is not looked at."""
    sets, groups = grouped(form, "four")
    if form == "reference set":
        groups["groups"][5] = 99  # a group without columns
    clean = run(backend, *sets, **groups, group_pairs=group_pairs, margin_minus=0.1)
    for padding in (True, False):
        for rows in range(0, len(sets), 2):
            spoiled = [t.clone() for t in sets]
            row = int((spoiled[rows + 1] < 0).nonzero()[3]) if padding else 5
            spoiled[rows][row, 4] = value
            result = run(backend, *spoiled, **groups, group_pairs=group_pairs, margin_minus=0.1)
            grads = [grad for grad in (result.grad_x, result.grad_ref) if grad is not None]
            if padding:
                assert result.loss == clean.loss
                np.testing.assert_array_equal(result.grad_x, clean.grad_x)
                continue
            assert np.isnan(result.loss)
            assert np.isnan(result.violation).all()
            for grad, y in zip(grads, spoiled[1::2], strict=True):
                assert np.isnan(grad[y.numpy() >= 0]).all()


@pytest.mark.parametrize("group_pairs", ["within", "across"])
@pytest.mark.parametrize(("n", "m"), [(0, None), (0, 7), (7, 0), (7, 7)])
def test_groups_without_a_pair(backend: str, n: int, m: int | None, group_pairs: str) -> None:
    """No rows, no columns, no group in common: loss 0, gradients 0 to all that want one, alone or together."""
    sets: tuple[Tensor, ...] = batch(n, 5, 2)
    groups: dict[str, Any] = {"groups": torch.zeros(n, dtype=torch.int64)}
    if m is not None:
        sets = (*sets, *batch(m, 5, 2, seed=1))
        groups["ref_groups"] = torch.full((m,), int(group_pairs == "within"))
    for grad_x, grad_ref in ((True, True), (False, m is not None), (True, False)):
        for reduction in ("violating", "all"):
            call: dict[str, Any] = {"group_pairs": group_pairs, "reduction": reduction, **groups}
            result = check(backend, *sets, grad_x=grad_x, grad_ref=grad_ref, margin_plus=2.0, margin_minus=-2.0, **call)
            assert result.loss == 0
            assert result.count.tolist() == [0, 0]


def test_groups_of_a_bank_add_up(backend: str) -> None:
    """Within and across together are all pairs."""
    sets, groups = grouped("row_offset", "four", torch.float64)
    call: dict[str, Any] = {"margin_minus": 0.1, "reduction": "all", "penalty": "squared"}
    parts = [run(backend, *sets, **{**groups, **call}, group_pairs=pairs) for pairs in ("within", "across")]
    plain = run(backend, *sets, **call, row_offset=100)
    assert (parts[0].count + parts[1].count).tolist() == plain.count.tolist()
    penalty = sum(part.count * part.violation for part in parts)
    np.testing.assert_allclose(penalty, plain.count * plain.violation, rtol=1e-13)


def test_all_pairs_as_divisor(backend: str) -> None:
    """Each side's share of the loss falls with its hard pairs: by hand, and of the same gradient's direction."""
    x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]], dtype=torch.float64)  # s01 = 0.6, s02 = 0.8, s12 = 0.96
    y = torch.tensor([0, 0, 1])
    options: dict[str, Any] = {"margin_plus": 0.9, "margin_minus": 0.9, "backend": backend}
    assert tcm_loss(x, y, **options).item() == pytest.approx(0.3 + 0.06)
    assert tcm_loss(x, y, reduction="all", **options).item() == pytest.approx(0.3 + 0.06 / 2)
    assert tcm_loss(x, y, penalty="squared", **options).item() == pytest.approx(0.09 + 0.0036)
    everything = tcm_loss(x, y, penalty="squared", reduction="all", lambda_minus=5.0, **options)
    assert everything.item() == pytest.approx(0.09 + 5 * 0.0036 / 2)
    assert tcm_loss(x, y, groups=torch.tensor([0, 1, 1]), **options).item() == pytest.approx(0.06)
    across = tcm_loss(x, y, groups=torch.tensor([0, 1, 1]), group_pairs="across", **options)
    assert across.item() == pytest.approx(0.3)


# The public forms.


def test_stats(backend: str) -> None:
    """0-d tensors without a gradient; 0 and 0 for a side without hard pairs. Without `return_stats` the loss alone."""
    x, y = batch(50, 9, 5)
    x.requires_grad_()
    loss, stats = tcm_loss(x, y, margin_minus=2.0, backend=backend, return_stats=True)
    assert isinstance(stats, TCMStats)
    assert [t.shape for t in stats] == [()] * 4
    assert [t.dtype for t in stats] == [torch.int64, torch.int64, torch.float32, torch.float32]
    assert not any(t.requires_grad for t in stats)
    assert (stats.count_minus.item(), stats.violation_minus.item()) == (0, 0.0)
    assert loss.item() == pytest.approx(stats.violation_plus.item(), rel=1e-6)
    alone = tcm_loss(x, y, margin_minus=2.0, backend=backend)
    assert isinstance(alone, Tensor)
    assert torch.equal(alone, loss)


def in_and_out_of_pickle(module: TCMLoss) -> TCMLoss:
    again = pickle.loads(pickle.dumps(module))
    assert isinstance(again, TCMLoss)
    return again


def test_module(backend: str) -> None:
    """The class is the function: also copied, pickled, and called the way pytorch-metric-learning calls."""
    options: dict[str, Any] = {"margin_plus": 0.8, "margin_minus": 0.1, "lambda_plus": 2.0, "lambda_minus": 3.0}
    options.update(precision="fp32", penalty="squared", reduction="all", group_pairs="across")
    criterion = TCMLoss(**options, backend=backend)
    x, y = batch(90, 9, 5)
    ref_x, ref_y = batch(120, 9, 5, seed=1)
    plain, stats = tcm_loss(x, y, **options, backend=backend, return_stats=True)
    rectangular = tcm_loss(x, y, ref_x, ref_y, **options, backend=backend)
    groups: dict[str, Any] = {"groups": torch.arange(90) % 3, "ref_groups": torch.arange(120) % 3}
    of_groups = tcm_loss(x, y, ref_x, ref_y, **groups, **options, backend=backend)
    assert criterion.stats is None
    used = TCMLoss(**options, backend=backend)
    used(x.requires_grad_(), y)
    assert used.stats is not None
    assert [t.item() for t in used.stats] == [t.item() for t in stats]
    used(x.detach().double(), y)
    assert used.stats.violation_plus.dtype == torch.float64
    assert not any(t.requires_grad for t in used.stats)
    for module in (
        criterion,
        *(again(m) for m in (criterion, used) for again in (copy.deepcopy, in_and_out_of_pickle)),
    ):
        assert module.options._asdict() == {**options, "backend": backend}
        assert torch.equal(module(x, y, None, ref_x, ref_y, **groups), of_groups)
        assert torch.equal(module(x, y), plain)
        assert torch.equal(module(x, y, None), plain)
        assert torch.equal(module(x, y, None, ref_x, ref_y), rectangular)
        assert torch.equal(module(x, y, indices_tuple=None, ref_emb=ref_x, ref_labels=ref_y), rectangular)
    assert not criterion.state_dict()
    assert not used.state_dict()
    for name, value in options.items():
        assert f"{name}={value!r}" in repr(criterion)


def test_defaults() -> None:
    """The defaults are the paper's."""
    criterion = TCMLoss()
    values = (criterion.margin_plus, criterion.margin_minus, criterion.lambda_plus, criterion.lambda_minus)
    assert values == (0.9, 0.5, 1.0, 1.0)
