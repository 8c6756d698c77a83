"""The tables that `pair_counts` has to return, from pairs in fp64; without hypothesis, which tests on a GPU lack."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from support.oracle import Array

NEAR = 1e-6  # pairs this near to an edge may fall on either side of it, up to a few hundred columns
Tables = tuple[Array, Array, Array, Array]  # counts, class_counts, best, ref_best


@dataclass(frozen=True)
class CountCall:
    """One problem; `exact`: similarities are the same in any arithmetic, else they are off by `near` at most."""

    x: Array  # [N, D] float32
    y: Array
    classes: int
    thresholds: Array  # [T] float32
    bits: int
    exact: bool = False
    near: float = NEAR
    ref_x: Array | None = None  # [M, D] columns; None: the rows
    ref_y: Array | None = None

    def tensors(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int, Tensor, int]:
        """The operators' arguments, without progress."""
        x, y, thresholds = (torch.from_numpy(a).to(device) for a in (self.x, self.y, self.thresholds))
        ref_x, ref_y = (None if a is None else torch.from_numpy(a).to(device) for a in (self.ref_x, self.ref_y))
        return x, y, ref_x, ref_y, self.classes, thresholds, self.bits

    def divided(self, rng: np.random.Generator) -> Self:
        """The pairs of a part of the rows with the others."""
        at = int(rng.integers(len(self.y) + 1))
        return replace(self, x=self.x[:at], y=self.y[:at], ref_x=self.x[at:], ref_y=self.y[at:])

    def check(self, tables: Tables) -> None:
        """Every entry: the pairs that lie clearly beyond an edge, and at most those near it besides."""
        counts, class_counts, best, ref_best = tables
        rows = self.x, self.y
        columns = rows if self.ref_x is None or self.ref_y is None else (self.ref_x, self.ref_y)
        (x_hat, y), (ref_hat, ref_y) = _taking_part(*rows), _taking_part(*columns)
        s, same = x_hat @ ref_hat.T, y[:, None] == ref_y
        pair = np.triu(np.ones_like(same), 1) if self.ref_x is None else np.ones_like(same)
        i, j = pair.nonzero()
        slack = 0 if self.exact else self.near
        edges = np.arange(2 * 2**self.bits + 1) / 2.0**self.bits - 1
        edges[0] = -np.inf  # what is below -1 counts as -1
        assert counts.dtype == class_counts.dtype == np.int64
        row, column = np.minimum(y, self.classes), np.minimum(ref_y, self.classes)
        for side in range(2):
            mine = same[i, j] == (side == 0)
            values, first, second = s[i, j][mine], row[i][mine], column[j][mine]
            assert counts[side].sum() == len(values)
            assert _between(counts[side], values, edges, slack)
            members, of_pair = (first, values) if side == 0 else (np.append(first, second), np.append(values, values))
            for c in range(self.classes + 1):
                assert _between(class_counts[side, c], of_pair[members == c], self.thresholds.astype(np.float64), slack)
            taken = (same == (side == 0)) & (pair | pair.T if self.ref_x is None else pair)
            _check_best(best[side], self.y, np.where(taken, s, -np.inf).max(axis=1, initial=-np.inf), slack)
            if self.ref_y is not None:
                _check_best(ref_best[side], self.ref_y, np.where(taken, s, -np.inf).max(axis=0, initial=-np.inf), slack)


def _taking_part(x: Array, y: Array) -> tuple[Array, Array]:
    """Unit rows in fp64, and their classes."""
    rows = x[y >= 0].astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12), y[y >= 0]


def _check_best(found: Array, y: Array, want: Array, slack: float) -> None:
    part, there = y >= 0, np.isfinite(want)
    assert (found[part][~there] == -np.inf).all()
    assert (np.abs(found[part][there] - want[there]) <= slack).all()
    assert (found[~part] == -np.inf).all()


def _between(counts: Array, values: Array, edges: Array, slack: float) -> bool:
    """Whether counts [K] are those of `values` from edge k to edge k + 1 (the last unbounded), each within `slack`."""
    accepted = counts[::-1].cumsum()[::-1]
    values = np.sort(values)
    least = len(values) - np.searchsorted(values, edges + slack, side="left")
    most = len(values) - np.searchsorted(values, edges - slack, side="left")
    return bool((counts >= 0).all() and ((least <= accepted) & (accepted <= most)).all())
