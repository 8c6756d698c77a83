"""The tables that `pair_counts` has to return, from pairs in fp64; without hypothesis, which tests on a GPU lack."""

from dataclasses import dataclass

import numpy as np
import torch

from support.oracle import Array

NEAR = 1e-6  # pairs this near to an edge may fall on either side of it, up to a few hundred columns
Tables = tuple[Array, Array, Array]  # counts, class_counts, best


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

    def tensors(self, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, int, torch.Tensor, int]:
        """The operators' arguments, without progress."""
        x, y, thresholds = (torch.from_numpy(a).to(device) for a in (self.x, self.y, self.thresholds))
        return x, y, self.classes, thresholds, self.bits

    def check(self, tables: Tables) -> None:
        """Every entry: the pairs that lie clearly beyond an edge, and at most those near it besides."""
        counts, class_counts, best = tables
        part = self.y >= 0
        x, y = self.x[part].astype(np.float64), self.y[part]
        unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        s, row = unit @ unit.T, np.minimum(y, self.classes)
        i, j = np.triu_indices(len(s), 1)
        slack = 0 if self.exact else self.near
        edges = np.arange(2 * 2**self.bits + 1) / 2.0**self.bits - 1
        edges[0] = -np.inf  # what is below -1 counts as -1
        assert counts.dtype == class_counts.dtype == np.int64
        for side in range(2):
            mine = (y[i] == y[j]) == (side == 0)
            values, first, second = s[i, j][mine], row[i][mine], row[j][mine]
            assert counts[side].sum() == len(values)
            assert _between(counts[side], values, edges, slack)
            members, of_pair = (first, values) if side == 0 else (np.append(first, second), np.append(values, values))
            for c in range(self.classes + 1):
                assert _between(class_counts[side, c], of_pair[members == c], self.thresholds.astype(np.float64), slack)
            off = np.where(((y[:, None] == y) != (side == 0)) | np.eye(len(s), dtype=bool), -np.inf, s)
            want = off.max(axis=1, initial=-np.inf)
            found = np.isfinite(want)
            assert (best[side][part][~found] == -np.inf).all()
            assert (np.abs(best[side][part][found] - want[found]) <= slack).all()
            assert (best[side][~part] == -np.inf).all()


def _between(counts: Array, values: Array, edges: Array, slack: float) -> bool:
    """Whether counts [K] are those of `values` from edge k to edge k + 1 (the last unbounded), each within `slack`."""
    accepted = counts[::-1].cumsum()[::-1]
    values = np.sort(values)
    least = len(values) - np.searchsorted(values, edges + slack, side="left")
    most = len(values) - np.searchsorted(values, edges - slack, side="left")
    return bool((counts >= 0).all() and ((least <= accepted) & (accepted <= most)).all())
