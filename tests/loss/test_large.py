"""Counts beyond 2^31, memory that grows with N and not with N^2, and memory that holds NaN before it is used."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.batches import batch
from support.crowd import UNIT, Crowd, compare_crowd, poison_freed_memory
from support.oracle import check, run, similarity_error

# The PyTorch form takes minutes where the kernel takes seconds.
slow_where_slow = pytest.mark.parametrize("backend", ["cpu", pytest.param("torch", marks=pytest.mark.slow)])


@pytest.fixture
def bounded_memory() -> Iterator[None]:
    """At most 1 GiB more than before: a tenth of an N x N matrix in fp32."""
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 2**30


@slow_where_slow
@pytest.mark.usefixtures("bounded_memory")
def test_negatives_beyond_2_31(backend: str) -> None:
    """N = 50,021: 2.5e9 pairs, most of them hard, in every tile some that are not."""
    count = compare_crowd(backend, Crowd.make(50021, 0, seed=0), None, margin_plus=0.5, margin_minus=-0.5)
    assert count[1] > 2**31
    assert count[0] > 10**7


@slow_where_slow
@pytest.mark.usefixtures("bounded_memory")
def test_reference_set_beyond_2_31(backend: str) -> None:
    """70,001 rows and 33,007 columns of other labels, every pair hard: both gradients."""
    rows, columns = Crowd.make(70001, 0, seed=1), Crowd.make(33007, 3, seed=2)
    count = compare_crowd(backend, rows, columns, margin_plus=1.0, margin_minus=-1.0)
    assert count.sum() == 70001 * 33007
    assert count.sum() > 2**31


@slow_where_slow
@pytest.mark.usefixtures("bounded_memory")
def test_positives_beyond_2_31(backend: str) -> None:
    """One class of 46,403 rows in a narrow cone: n+ = N (N - 1), and all sums in closed form."""
    n, d = 46403, 8
    rng = np.random.default_rng(3)
    x = torch.from_numpy(np.ones(d) + 0.2 * rng.standard_normal((n, d))).float()
    result = run(backend, x, torch.full((n,), 5), margin_plus=1.5)
    assert result.count.tolist() == [n * (n - 1), 0]
    assert n * (n - 1) > 2**31

    norm = np.linalg.norm(x.double().numpy(), axis=1, keepdims=True)
    x_hat = x.double().numpy() / norm
    total = x_hat.sum(0)
    loss = 1.5 - (total @ total - n) / (n * (n - 1))
    assert result.loss == pytest.approx(loss, abs=similarity_error(d, UNIT))
    g = -2 / (n * (n - 1)) * (total - x_hat)
    expected = (g - (g * x_hat).sum(1, keepdims=True) * x_hat) / norm
    error = np.linalg.norm(result.grad_x - expected, axis=1)
    # Summed tile by tile: 512 roundings, not the 46,403 of one running sum.
    assert (error <= 512 * UNIT * np.linalg.norm(g, axis=1) / norm[:, 0]).all()


@pytest.mark.usefixtures("bounded_memory")
@pytest.mark.parametrize("reference", [False, True])
def test_memory_of_the_options(reference: bool) -> None:
    """N = 17,011 in 100 groups: N x N floats, or what autograd would keep of each group's columns, are beyond 1 GiB."""
    n, d = 17011, 128
    x, y = batch(n, d, 40)
    sets = (x, y, x, y) if reference else (x, y)
    groups: dict[str, Any] = {"groups": torch.arange(n) % 100, "group_pairs": "across"}
    if reference:
        groups.update(ref_groups=groups["groups"], row_offset=0)
    call: dict[str, Any] = {"margin_plus": 0.0, "margin_minus": 0.3, "penalty": "squared", "reduction": "all"}
    result = run("cpu", *sets, **{**call, **groups})
    plain = run("cpu", *sets, **call, row_offset=groups.get("row_offset"))
    assert plain.count.min() > 10000
    # Groups go round the rows, labels are random: 99 % of 10,000 pairs or more are across, one deviation is 0.001.
    np.testing.assert_allclose(result.count / plain.count, 0.99, atol=0.005)
    same = torch.bincount(y).square().sum().item() - n
    all_pairs = np.array([same, n * (n - 1) - same])
    assert plain.loss == pytest.approx((plain.violation * plain.count / all_pairs).sum(), rel=4 * UNIT)


# Memory that was not cleared.


def check_ragged_batches(backend: str) -> None:
    """All forms, sizes that fill no tile, most margins: whatever is read must have been written."""
    for n, m, d in [(1, 2, 1), (65, 63, 7), (129, 300, 33), (257, 700, 5), (513, 130, 65), (1030, 65, 9)]:
        for dtype in (torch.float16, torch.float32, torch.float64):
            x, y = batch(n, d, 5, dtype)
            y[::9] = -1
            columns = batch(m, d, 5, dtype, seed=1)
            for margin in (-2.0, 0.02, 2.0):  # none, half, all
                poison_freed_memory(n, m, d)
                check(backend, x, y, margin_plus=margin, margin_minus=-margin)
                poison_freed_memory(n, m, d)
                check(backend, x, y, *columns, margin_plus=margin, margin_minus=-margin)


def test_freed_memory_holds_nan(backend: str) -> None:
    check_ragged_batches(backend)


def test_new_tensors_hold_nan(backend: str) -> None:
    """PyTorch itself fills each tensor it allocates: floats with NaN, integers with their largest value."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        assert torch.empty(100).isnan().all()
        check_ragged_batches(backend)
    finally:
        torch.use_deterministic_algorithms(False)


def test_all_new_memory_holds_rubbish(backend: str) -> None:
    """glibc itself fills what malloc returns, with a pattern that is -1.7e38 in fp32 and huge as an integer."""
    script = f"import loss.test_large as large; large.check_ragged_batches({backend!r})"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "MALLOC_PERTURB_": "1", "GLIBC_TUNABLES": "glibc.malloc.perturb=1"},
    )
    assert done.returncode == 0, done.stderr
