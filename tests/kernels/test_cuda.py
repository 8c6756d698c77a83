"""The CUDA and the Triton kernels on a GPU against the oracle, and what only a GPU shows: streams, graphs, no waiting.

Everything here is marked `cuda` and does without hypothesis: inputs are drawn from a seed that each failure prints, and
that TCM_SEED sets again. `TCM_FUSED_SM=80 pytest -m cuda` runs the path for older GPUs on a newer one;
`TRITON_INTERPRET=0 pytest -m cuda -k triton` what takes Triton's kernels.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.batches import KINDS, batch, dyadic, embeddings, margins
from support.count_oracle import NEAR, CountCall, Tables
from support.crowd import Crowd, compare_crowd, poison_freed_memory
from support.oracle import check, check_sides, oracle_of, run, run_sides, similarity_error, tensor_core_drift, two
from torch import Tensor

from benchmarks.speed.gate import check_opis
from tcm_fused import TCMLoss, opis, tcm_loss
from tcm_fused.backends import choice
from tcm_fused.backends.operators import OPERATORS

pytestmark = pytest.mark.cuda

DEVICE = torch.device("cuda")
ROOT = Path(__file__).parents[2]

# dtype of the embeddings, and the precision asked for: one product in fp16, or three.
ARITHMETIC = (
    (torch.float16, "auto"),
    (torch.bfloat16, "auto"),
    (torch.float32, "fp16"),
    (torch.float32, "fp32"),
    (torch.bfloat16, "fp32"),
)
arithmetic = pytest.mark.parametrize(("dtype", "precision"), ARITHMETIC)
# Around the sides of tiles, 64 to 256, and several tiles with a ragged last one.
SIZES = (1, 2, 3, 17, 63, 64, 65, 127, 128, 129, 192, 255, 256, 257, 300, 513, 700)
WIDTHS = (1, 2, 3, 7, 8, 31, 33, 64, 65, 100, 128, 257, 520)
SEED = int(os.environ.get("TCM_SEED", time.time_ns() % 2**32))


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Fresh numbers for each test of each run."""
    print(f"TCM_SEED={SEED}")
    return np.random.default_rng([SEED, *request.node.name.encode()])


@pytest.fixture
def poisoned() -> Iterator[None]:
    """PyTorch fills each tensor it allocates, workspace and results too: floats with NaN, bytes with 255."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


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
    """What is composed from the two penalties, against the same in PyTorch; no s is within 2.9e-6 of a margin."""
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


# The counts of OPIS.


def count_on_gpu(call: CountCall) -> Tables:
    counts, class_counts, best = choice.choose_counter("cuda", "cuda", torch.float32)(*call.tensors("cuda"), None)
    return counts.cpu().numpy(), class_counts.cpu().numpy(), best.cpu().numpy()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("bits", [0, 6, 17])
@pytest.mark.parametrize("round_", range(8))
def test_pair_counts(rng: np.random.Generator, round_: int, bits: int) -> None:
    """Every geometry and ragged size, classes alone and together; thresholds on the grid, between, and outside."""
    exact = round_ % 2 == 0
    n, d, classes = int(rng.choice([*SIZES, 1500])), int(rng.choice(WIDTHS)), int(rng.choice([1, 2, 30, 10**6]))
    y = rng.integers(classes, size=n)
    x = dyadic(n, d, rng) if exact else embeddings(str(rng.choice(KINDS)), y, d, rng)
    x[rng.random(n) < 0.02] = 0
    y[rng.random(n) < rng.choice([0.0, 0.25])] = -1
    t = np.sort(rng.uniform(rng.choice([-1.5, 0.3]), 1.5, size=int(rng.choice([0, 1, 40]))))
    t = np.round(t * 8) / 8 if exact else t
    near = max(NEAR, similarity_error(d, 2**-24) + tensor_core_drift(d))
    call = CountCall(x.astype(np.float32), y, int(rng.choice([0, 1, 20])), t.astype(np.float32), bits, exact, near)
    call.check(count_on_gpu(call))


@pytest.mark.parametrize("n", [0, 1, 2])
def test_pair_counts_of_few_rows(n: int) -> None:
    call = CountCall(np.ones((n, 3), dtype=np.float32), np.arange(n), 2, np.array([-2.0], dtype=np.float32), 4, True)
    call.check(count_on_gpu(call))


def test_pair_counts_of_one_cell() -> None:
    """2.45e9 negatives of similarity 1, and none of a pair of zero rows: more than 31 bits, in one counter."""
    n = 70_000
    x, y = torch.ones(n, 4, device=DEVICE), torch.arange(n, device=DEVICE)
    x[-2:] = 0
    counts, class_counts, best = torch.ops.tcm_fused.counts(x, y, 0, torch.tensor([0.5], device=DEVICE), 8, None)
    one, zero = (n - 2) * (n - 3) // 2, 2 * (n - 2) + 1
    assert counts[1].nonzero().flatten().tolist() == [256, 512]
    assert counts[1, [256, 512]].tolist() == [zero, one]
    assert class_counts.flatten().tolist() == [0, 2 * one]
    assert best[1, [0, n - 1]].tolist() == [1, 0]


def test_pair_counts_again_and_elsewhere() -> None:
    """The same tables on another stream, in a graph, and while nothing may wait for the device."""
    x, y = on_gpu(3000, 65)
    arguments = (x, y, 30, torch.linspace(-0.2, 1, 500, device=DEVICE), 17, None)
    first = torch.ops.tcm_fused.counts(*arguments)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        late.copy_(x)
        on_side = torch.ops.tcm_fused.counts(late, *arguments[1:])
    assert torch.cuda.current_stream().query(), "the default stream was given work"
    side.synchronize()
    assert_same_bits(list(on_side), list(first))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.ops.tcm_fused.counts(*arguments)
    for seed in (5, 6):
        x_new, y_new = on_gpu(3000, 65, seed=seed)
        expected = torch.ops.tcm_fused.counts(x_new, y_new, *arguments[2:])
        x.copy_(x_new), y.copy_(y_new)
        graph.replay()
        assert_same_bits(list(captured), list(expected))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    progress = torch.zeros(2, dtype=torch.int64)
    try:
        torch.cuda._sleep(1_000_000_000)  # about 0.5 s
        torch.ops.tcm_fused.counts(*arguments[:-1], progress)
        assert not torch.cuda.current_stream().query(), "the call waited for the device"
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    assert progress.tolist() == [1, 1]


def test_pair_counts_of_non_finite_rows() -> None:
    x, y = on_gpu(300, 9)
    x[7, 3], y[7] = torch.nan, -1
    arguments = (y, 3, torch.tensor([0.1], device=DEVICE), 6, None)
    assert not torch.ops.tcm_fused.counts(x, *arguments)[2].isnan().any()
    x[8, 3] = torch.inf
    assert torch.ops.tcm_fused.counts(x, *arguments)[2].isnan().all()


def test_pair_counts_refuse_what_the_kernels_trust() -> None:
    x, y = on_gpu(70, 5)
    t, progress = torch.tensor([0.5], device=DEVICE), torch.zeros(2, dtype=torch.int64)
    for arguments, message in (
        ((x, y.cpu(), 3, t, 6, None), "classes must be .* on their device"),
        ((x, y, 3, t.cpu(), 6, None), "thresholds must be .* on the device"),
        ((x.double(), y, 3, t.double(), 6, None), "must be float32"),
        ((x, y, 3, t.double(), 6, None), "thresholds"),
        ((x, y.int(), 3, t, 6, None), "int64"),
        ((x, y[1:], 3, t, 6, None), "one for each"),
        ((x, y, 3, t, 21, None), "bits"),
        ((x, y, -1, t, 6, None), "classes"),
        ((x, y, 3, t, 6, progress.cuda()), "on the CPU"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.tcm_fused.counts(*arguments)


def test_opis() -> None:
    """The whole result, by name and by itself; in float64 it is the blocked form's."""
    for backend in ("cuda", "auto"):
        check_opis(
            lambda x, labels, backend=backend, **options: opis(x.cuda(), labels.cuda(), backend=backend, **options)
        )
    check_opis(lambda x, labels, **options: opis(x.cuda().double(), labels.cuda(), **options))
    with pytest.raises(RuntimeError, match="no float64 kernels"):
        opis(torch.ones(4, 2, dtype=torch.float64, device=DEVICE), torch.arange(4, device=DEVICE), backend="cuda")


# The same bits.


def on_gpu(n: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    x, y = batch(n, d, 40, dtype, seed)
    return x.to(DEVICE), y.to(DEVICE)


def loss_and_gradients(backend: str, *sets: Tensor, **options: Any) -> list[Tensor]:
    """Loss, counts and gradients to all embeddings, on the device."""
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in sets]
    loss, stats = tcm_loss(*leaves, **{"margin_minus": 0.0, "backend": backend, **options}, return_stats=True)
    return [loss.detach(), *stats, *torch.autograd.grad(loss, leaves[::2])]


def assert_same_bits(some: list[Tensor], others: list[Tensor]) -> None:
    for one, other in zip(some, others, strict=True):
        assert torch.equal(one, other)


@arithmetic
@pytest.mark.parametrize("rectangular", [False, True])
def test_two_runs_give_the_same_bits(gpu_backend: str, rectangular: bool, dtype: torch.dtype, precision: str) -> None:
    sets = (*on_gpu(3000, 65, dtype), *(on_gpu(1500, 65, dtype, seed=1) if rectangular else ()))
    first = loss_and_gradients(gpu_backend, *sets, precision=precision)
    for n in (400, 1100):
        loss_and_gradients(gpu_backend, *on_gpu(n, 33))
        poison_freed_memory(n, 65, 33)
        assert_same_bits(loss_and_gradients(gpu_backend, *sets, precision=precision), first)


def test_stream_of_the_caller(gpu_backend: str) -> None:
    """On another stream, after work there that is slow to produce the input, and none of it on the default stream."""
    sets = on_gpu(1500, 64)
    expected = loss_and_gradients(gpu_backend, *sets)
    side = torch.cuda.Stream()
    late = torch.full_like(sets[0], torch.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        late.copy_(sets[0])
        got = loss_and_gradients(gpu_backend, late, sets[1])
    assert torch.cuda.current_stream().query(), "the default stream was given work"
    side.synchronize()
    assert_same_bits(got, expected)


@arithmetic
@pytest.mark.parametrize("rectangular", [False, True])
def test_cuda_graph(gpu_backend: str, rectangular: bool, dtype: torch.dtype, precision: str) -> None:
    """Forward and backward are captured; replays follow what is written into the inputs, labels among it."""
    sets = (*on_gpu(700, 64, dtype), *(on_gpu(300, 64, dtype, seed=1) if rectangular else ()))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            loss_and_gradients(gpu_backend, *sets, precision=precision)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_gradients(gpu_backend, *sets, precision=precision)
    for seed in (0, 5, 6):
        changed = (*on_gpu(700, 64, dtype, seed), *(on_gpu(300, 64, dtype, seed + 1) if rectangular else ()))
        for target, source in zip(sets, changed, strict=True):
            target.copy_(source)
        graph.replay()
        assert_same_bits(captured, loss_and_gradients(gpu_backend, *changed, precision=precision))


@pytest.mark.parametrize("options", [{}, {"reduction": "all"}], ids=["loss", "penalties"])
def test_cuda_graph_follows_margins_and_weights(gpu_backend: str, options: dict[str, Any]) -> None:
    """Tensors on the device are read there, by a captured graph too; not finite, they make NaN of loss and gradient."""
    sets = on_gpu(700, 64)
    names = ("margin_plus", "margin_minus", "lambda_plus", "lambda_minus")
    numbers = {name: torch.tensor(1.0, dtype=torch.float64, device=DEVICE) for name in names}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            loss_and_gradients(gpu_backend, *sets, **numbers, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_gradients(gpu_backend, *sets, **numbers, **options)
    for values in ((0.9, 0.1, 1.0, 1.0), (0.3, -0.1, 0.0, 2.0), (3.0, -2.5, 0.5, 1.0), (-5.0, 5.0, 1.0, 1.0)):
        for number, value in zip(numbers.values(), values, strict=True):
            number.fill_(value)
        graph.replay()
        expected = loss_and_gradients(gpu_backend, *sets, **dict(zip(names, values, strict=True)), **options)
        assert_same_bits(captured, expected)
    for number in numbers.values():
        number.fill_(torch.nan)
        graph.replay()
        assert captured[0].isnan()
        assert captured[-1].isnan().all()
        number.fill_(0.5)


def test_margins_and_weights_do_not_wait_for_the_device(gpu_backend: str) -> None:
    """Numbers, tensors on the CPU, tensors on the device, and a mixture of these."""
    sets = on_gpu(1500, 64)
    on_device = torch.tensor(0.5, device=DEVICE)
    choices: list[dict[str, Any]] = [
        {"margin_plus": 0.875, "lambda_minus": 2.0},
        {"margin_plus": torch.tensor(0.875), "lambda_minus": torch.tensor(2)},
        {"margin_plus": on_device, "lambda_minus": on_device},
        {"margin_plus": on_device, "margin_minus": torch.tensor(0.25), "lambda_minus": on_device, "lambda_plus": 3.0},
    ]

    def calls() -> None:
        for numbers in choices:
            loss_and_gradients(gpu_backend, *sets, **numbers)
            loss_and_gradients(gpu_backend, *sets, **numbers, reduction="all")

    calls()  # whatever is compiled or loaded waits
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        calls()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@arithmetic
def test_nothing_waits_for_the_device(gpu_backend: str, dtype: torch.dtype, precision: str) -> None:
    """No synchronisation that torch knows of, and forward and backward return while the device is still busy."""
    sets = (*on_gpu(1500, 64, dtype), *on_gpu(700, 64, dtype, seed=1))

    def calls() -> None:
        loss_and_gradients(gpu_backend, *sets, precision=precision)
        loss_and_gradients(gpu_backend, *sets[:2], precision=precision)
        loss_and_gradients(gpu_backend, *sets, precision=precision, reduction="all")

    calls()  # whatever is compiled or loaded waits
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(1_000_000_000)  # about 0.5 s
        calls()
        assert not torch.cuda.current_stream().query(), "a call waited for the device"
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


@pytest.mark.parametrize("share", ["few", "all"])
def test_memory_grows_with_n(gpu_backend: str, share: str) -> None:
    """N = 131,072, D = 64: less than 1 GiB, N^2 bits would be twice as much; Triton's masks alone take that."""
    x, y = on_gpu(131_072, 64, torch.bfloat16)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss_and_gradients(gpu_backend, x, y, margin_minus=0.7 if share == "few" else -2.0)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < (2**30 if gpu_backend == "cuda" else 3 * 2**29)


def test_other_device(gpu_backend: str) -> None:
    """Tensors of a GPU that is not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    sets = on_gpu(500, 33)
    expected = loss_and_gradients(gpu_backend, *sets)
    got = loss_and_gradients(gpu_backend, *(t.to("cuda:1") for t in sets))
    assert {t.device for t in got} == {torch.device("cuda:1")}
    assert torch.cuda.current_device() == 0
    assert_same_bits([t.cuda() for t in got], expected)
    with pytest.raises(ValueError, match="move them to one device"):
        tcm_loss(sets[0], sets[1].to("cuda:1"), backend=gpu_backend)
    if gpu_backend == "cuda":  # and its pairs, counted by a thread of their own
        bar = find_spec("tqdm") is not None
        scores = [opis(*(t.to(device) for t in sets), progress=bar, backend="cuda").opis for device in (0, 1)]
        assert scores[0] == scores[1]


# In PyTorch's machinery.


def test_auto_is_the_kernel() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert choice.choose("auto", "cuda", dtype) == "fused"
    assert choice.choose("auto", "cuda", torch.float64) == "blocked"
    with pytest.raises(RuntimeError, match=r"float64.*backend='torch'"):
        tcm_loss(torch.ones(4, 2, dtype=torch.float64, device=DEVICE), torch.arange(4, device=DEVICE), backend="cuda")


def test_cpu_tensors(gpu_backend: str) -> None:
    with pytest.raises(RuntimeError, match="needs tensors on device 'cuda', embeddings are on 'cpu'"):
        tcm_loss(torch.ones(4, 2), torch.arange(4), backend=gpu_backend)


@pytest.mark.parametrize("rectangular", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_opcheck(gpu_backend: str, rectangular: bool, dtype: torch.dtype) -> None:
    x, y = on_gpu(70, 5, dtype)
    ref_x, ref_y = on_gpu(90, 5, dtype, seed=1)
    sets = (
        (x.requires_grad_(), y, ref_x.requires_grad_(), ref_y) if rectangular else (x.requires_grad_(), y, None, None)
    )
    operators, how = OPERATORS[choice.choose(gpu_backend, "cuda", dtype)], (False, dtype != torch.float32)
    for device in ("cpu", DEVICE):
        margins, weights = two(0.9, 0.1).to(device), two(1.0, 2.0).to(device)
        torch.library.opcheck(operators.loss, (*sets, None, margins, weights, *how, True, rectangular))
        torch.library.opcheck(operators.penalties, (*sets, None, margins, *how, True, rectangular))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_compile(gpu_backend: str, dtype: torch.dtype) -> None:
    x, y = on_gpu(300, 33, dtype)
    criterion = TCMLoss(margin_minus=0.0, backend=gpu_backend)
    x.requires_grad_()
    loss = torch.compile(criterion, fullgraph=True)(x, y)
    (grad,) = torch.autograd.grad(loss, [x])
    expected = criterion(x, y)
    (expected_grad,) = torch.autograd.grad(expected, [x])
    assert torch.equal(loss, expected)
    torch.testing.assert_close(grad, expected_grad)


def test_autocast_of_a_model(gpu_backend: str, rng: np.random.Generator) -> None:
    """A layer that autocast runs in bf16 feeds the loss; the fp32 weight gets its gradient."""
    x, y = on_gpu(200, 16)
    layer = torch.nn.Linear(16, 24).to(DEVICE)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        features = layer(x)
        loss = tcm_loss(features, y, margin_minus=0.0, backend=gpu_backend)
    loss.backward()
    assert (features.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    check(gpu_backend, features.detach().cpu(), y.cpu(), margin_minus=0.0)


def test_operator_refuses_what_the_kernels_trust() -> None:
    """Called directly: an error, not memory that is read where there is none."""
    x, y = on_gpu(70, 5)
    rest: Any = (None, two(0.9, 0.1), two(1.0, 2.0), False, False, True, True)
    for sets, message in (
        ((x, y.cpu(), None, None), "labels must be .* on their device"),
        ((x, y[1:], None, None), "labels"),
        ((x, y.int(), None, None), "int64"),
        ((x.double(), y, None, None), "float16, bfloat16 or float32"),
        ((x, y, x, None), "both ref_x and ref_y"),
        ((x, y, x[:, :3], y), "one width"),
        ((x, y, x.half(), y), "one dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OPERATORS["cuda"].loss(*sets, *rest)
    for offset in (-1, 1, 2**62):
        with pytest.raises(RuntimeError, match="row_offset"):
            OPERATORS["cuda"].loss(x, y, x, y, offset, *rest[1:])


@pytest.mark.skipif("TCM_FUSED_SM" in os.environ, reason="this is that run")
def test_path_for_older_gpus() -> None:
    """The kernels for sm_80 on a later GPU, in a process of their own."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("that is the path taken here")
    chosen = "test_densities or test_widths or test_gradients or test_two_runs or test_no_pairs"
    chosen += " or test_pair_counts"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "tests/kernels/test_cuda.py",
            "-k",
            f"({chosen}) and not triton",
        ],
        cwd=ROOT,
        env={**os.environ, "TCM_FUSED_SM": "80", "TCM_SEED": str(SEED)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.skipif("TCM_FUSED_SM" in os.environ, reason="the path for older GPUs was asked for")
def test_hopper_runs_its_own_kernels() -> None:
    """Nothing else tells: where the copy engine cannot be set up, the kernels for older GPUs run without a word."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("this GPU is no Hopper")
    x, y = batch(600, 128, 5)
    x = x.to(DEVICE).requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.autograd.backward(tcm_loss(x, y.to(DEVICE), margin_minus=0.0, backend="cuda"))
        torch.ops.tcm_fused.counts(x.detach(), y.to(DEVICE), 5, torch.zeros(1, device=DEVICE), 17, None)
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages()]
    for parts in (("similarity_sm90", "LossVisitor"), ("similarity_sm90", "CountVisitor"), ("masked_sum_sm90",)):
        assert any(all(part in name for part in parts) for name in names), (parts, names)
