"""Counts beyond 2^31, memory that grows with N and not with N^2, and memory that holds NaN before it is used."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import batch, dyadic
from oracle import EPS, Array, Oracle, check, run, similarity_error, unit_roundoff

UNIT = unit_roundoff(torch.float32)

# The PyTorch form takes minutes for what takes the kernel seconds.
slow_where_slow = pytest.mark.parametrize("backend", ["cpu", pytest.param("torch", marks=pytest.mark.slow)])


@pytest.fixture
def bounded_memory() -> Iterator[None]:
    """At most 1 GiB more than before: a tenth of an N x N matrix in fp32."""
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 2**30


@dataclass(frozen=True)
class Crowd:
    """Many rows of few kinds: each kind [T, D] with its label, how often it occurs, and which kind each row is."""

    kinds: Array
    labels: Array
    times: Array
    member: Array

    @staticmethod
    def make(n: int, first_label: int, seed: int) -> "Crowd":
        """Ten labels, six directions with exact similarities each, in shuffled order and uneven numbers."""
        rng = np.random.default_rng(seed)
        kinds = np.abs(dyadic(60, 8, rng))
        kinds[:6] *= -1  # a few that point the other way
        member = np.minimum(rng.integers(60, size=n), rng.integers(75, size=n))
        return Crowd(kinds, first_label + np.arange(60) % 10, np.bincount(member, minlength=60), member)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(self.kinds[self.member]).float(), torch.from_numpy(self.labels[self.member])


def compare_crowd(backend: str, rows: Crowd, columns: Crowd | None, margin_plus: float, margin_minus: float) -> Array:
    """Counts, loss and gradients from the kinds alone, each weighted by how often it occurs; returns the counts.

    Counts and sums are exact in fp32 (multiples of 1/2 below 2^23), so the tolerance is that of a few roundings.
    """
    other = rows if columns is None else columns
    oracle = Oracle(
        rows.kinds, rows.labels, other.kinds, other.labels, margin_plus=margin_plus, margin_minus=margin_minus
    )
    partners = np.tile(other.times, (60, 1)) - (np.eye(60, dtype=int) if columns is None else 0)  # [T, T] of one row
    hard = [mask * partners for mask in oracle.hard()]
    count = np.array([rows.times @ of_row.sum(1) for of_row in hard])
    penalty = np.array([rows.times @ (of_row * gap).sum(1) for of_row, gap in zip(hard, oracle.gap, strict=True)])

    result = run(
        backend,
        *rows.tensors(),
        *(() if columns is None else columns.tensors()),
        margin_plus=margin_plus,
        margin_minus=margin_minus,
    )
    assert result.count.tolist() == count.tolist()
    np.testing.assert_allclose(result.violation, penalty / count, rtol=4 * UNIT)
    assert result.loss == pytest.approx((penalty / count).sum(), rel=4 * UNIT)

    compare_kinds(result.grad_x, rows, [of_row @ oracle.ref_hat for of_row in hard], 2 if columns is None else 1, count)
    if columns is not None:
        of_column = [mask.T * rows.times for mask in oracle.hard()]
        compare_kinds(result.grad_ref, columns, [sums @ oracle.x_hat for sums in of_column], 1, count)
    return count


def compare_kinds(given: Array | None, crowd: Crowd, sums: list[Array], factor: int, count: Array) -> None:
    """All rows of a kind have its gradient, from G+ and G- [T, D]."""
    assert given is not None
    norm = np.linalg.norm(crowd.kinds, axis=1, keepdims=True)
    x_hat = crowd.kinds / np.maximum(norm, EPS)
    parts = [factor * g / n for g, n in zip(sums, count, strict=True)]
    g = parts[1] - parts[0]
    expected = np.where(norm > 0, (g - (g * x_hat).sum(1, keepdims=True) * x_hat) / np.maximum(norm, EPS), 0)
    size = sum(np.linalg.norm(part, axis=1) for part in parts) / np.maximum(norm[:, 0], EPS)
    allowed = np.where(norm[:, 0] > 0, 32 * UNIT * size, 0)
    error = np.linalg.norm(given - expected[crowd.member], axis=1)
    assert (error <= allowed[crowd.member]).all()


@slow_where_slow
@pytest.mark.usefixtures("bounded_memory")
def test_negatives_beyond_2_31(backend: str) -> None:
    """N = 55,003: 3.0e9 pairs, most of them hard, in every tile some that are not."""
    count = compare_crowd(backend, Crowd.make(55003, 0, seed=0), None, margin_plus=0.5, margin_minus=-0.25)
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


def poison_freed_memory(n: int, m: int, d: int) -> None:
    """Fill and free blocks of the sizes that come next: the allocator hands them out again as they are."""
    sizes = {1, 2, n, m, d, n * d, m * d, n * m, n * n, *(side * d for side in (64, 128, 192, 256))}
    sizes |= {side * side for side in (64, 128, 192, 256)}
    blocks = [torch.full((size,), torch.nan, dtype=dtype) for size in sizes for dtype in (torch.float32, torch.float64)]
    del blocks


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
    script = f"import test_large; test_large.check_ragged_batches({backend!r})"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
        env={**os.environ, "MALLOC_PERTURB_": "1", "GLIBC_TUNABLES": "glibc.malloc.perturb=1"},
    )
    assert done.returncode == 0, done.stderr
