"""The counts of OPIS on a GPU, against fp64."""

import numpy as np
import pytest
import torch
from support.batches import KINDS, dyadic, embeddings
from support.count_oracle import NEAR, CountCall, Tables
from support.gpu import DEVICE, SIZES, WIDTHS, assert_same_bits, on_gpu
from support.oracle import similarity_error, tensor_core_drift

from benchmarks.speed.gate import check_opis
from tcm_fused import opis
from tcm_fused.backends import choice

pytestmark = pytest.mark.cuda


# The counts of OPIS.


def count_on_gpu(call: CountCall) -> Tables:
    found = choice.choose_counter("cuda", "cuda", torch.float32)(*call.tensors("cuda"), None)
    counts, class_counts, best, ref_best = (table.cpu().numpy() for table in found)
    return counts, class_counts, best, ref_best


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
    for one in (call, call.divided(rng)):
        one.check(count_on_gpu(one))


@pytest.mark.parametrize("n", [0, 1, 2])
def test_pair_counts_of_few_rows(n: int) -> None:
    call = CountCall(np.ones((n, 3), dtype=np.float32), np.arange(n), 2, np.array([-2.0], dtype=np.float32), 4, True)
    call.check(count_on_gpu(call))


def test_pair_counts_of_one_cell() -> None:
    """2.45e9 negatives of similarity 1, and none of a pair of zero rows: more than 31 bits, in one counter."""
    n = 70_000
    x, y = torch.ones(n, 4, device=DEVICE), torch.arange(n, device=DEVICE)
    x[-2:] = 0
    counts, class_counts, best, _ = torch.ops.tcm_fused.counts(
        x, y, None, None, 0, torch.tensor([0.5], device=DEVICE), 8, None
    )
    one, zero = (n - 2) * (n - 3) // 2, 2 * (n - 2) + 1
    assert counts[1].nonzero().flatten().tolist() == [256, 512]
    assert counts[1, [256, 512]].tolist() == [zero, one]
    assert class_counts.flatten().tolist() == [0, 2 * one]
    assert best[1, [0, n - 1]].tolist() == [1, 0]


def test_pair_counts_again_and_elsewhere() -> None:
    """The same tables on another stream, in a graph, and while nothing may wait for the device."""
    x, y = on_gpu(3000, 65)
    arguments = (x, y, None, None, 30, torch.linspace(-0.2, 1, 500, device=DEVICE), 17, None)
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
    arguments = (y, None, None, 3, torch.tensor([0.1], device=DEVICE), 6, None)
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
            torch.ops.tcm_fused.counts(*arguments[:2], None, None, *arguments[2:])


def test_opis() -> None:
    """The whole result, by name and by itself; in float64 it is the blocked form's."""
    for backend in ("cuda", "auto"):
        check_opis(
            lambda x, labels, backend=backend, **options: opis(x.cuda(), labels.cuda(), backend=backend, **options)
        )
    check_opis(lambda x, labels, **options: opis(x.cuda().double(), labels.cuda(), **options))
    with pytest.raises(RuntimeError, match="no float64 kernels"):
        opis(torch.ones(4, 2, dtype=torch.float64, device=DEVICE), torch.arange(4, device=DEVICE), backend="cuda")
