"""Loss, counts and gradients of every backend against the oracle."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.batches import KINDS, batch, dyadic, embeddings, margins
from support.oracle import assert_same_bits, check, compare, oracle_of, run
from support.strategies import DTYPES, options
from torch import Tensor

# Around the sides of tiles, 64 to 256, and several tiles with a ragged last one.
SIZES = (1, 2, 3, 17, 63, 64, 65, 100, 127, 128, 129, 192, 193, 255, 256, 257, 300, 513)
WIDTHS = (1, 2, 3, 7, 31, 33, 64, 65, 100, 257)


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


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_sums_of_equal_violations(backend: str) -> None:
    """Roundings of equal terms all go one way: nine million of them leave the mean as exact as one."""
    x = torch.ones(3000, 1, dtype=torch.float64)
    violation = run(backend, x, torch.zeros(3000, dtype=torch.int64), margin_plus=1.1).violation[0]
    np.testing.assert_allclose(violation, 1.1 - 1.0, rtol=4e-16)


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
        assert_same_bits(again, first)


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
