"""Batches of many rows of few kinds, whose sums are known from the kinds; and memory filled with NaN beforehand."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from support.batches import dyadic
from support.oracle import EPS, Array, Oracle, run, unit_roundoff

UNIT = unit_roundoff(torch.float32)


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


def poison_freed_memory(n: int, m: int, d: int) -> None:
    """Fill and free blocks of the sizes that come next: the allocator hands them out again as they are."""
    sizes = {1, 2, n, m, d, n * d, m * d, n * m, n * n, *(side * d for side in (64, 128, 192, 256))}
    sizes |= {side * side for side in (64, 128, 192, 256)}
    blocks = [torch.full((size,), torch.nan, dtype=dtype) for size in sizes for dtype in (torch.float32, torch.float64)]
    del blocks
