"""Pairs of two sets counted by similarity, in all and by class, in plain PyTorch: queries against a gallery.

The part of `counts_blocked` for pairs of which one row is in each set.
"""

import torch
from torch import Tensor

from tcm_fused.backends.numerics import product, unit_and_norms

ROWS, COLUMNS = 512, 2048  # of one similarity tile: 4 MiB in float32
_CHUNK = 1 << 18  # components that are normalised together

Tables = tuple[Tensor, Tensor, Tensor, Tensor]


def counts_between(
    x: Tensor,
    y: Tensor,
    ref_x: Tensor,
    ref_y: Tensor,
    classes: int,
    thresholds: Tensor,
    bits: int,
    progress: Tensor | None,
) -> Tables:
    """The tables of `counts_blocked`, tile by tile: O((N + M) D + 2^bits + classes * T) memory."""
    rows, columns = _Sorted.of(x, y), _Sorted.of(ref_x, ref_y)
    tally = _Tally(rows, columns, classes, thresholds, bits)
    starts = range(0, len(rows.label), ROWS)
    if progress is not None:
        progress[0], progress[1] = 0, len(starts)
    for i in starts:
        for j in range(0, len(columns.label), COLUMNS):
            tally.add(slice(i, i + ROWS), slice(j, j + COLUMNS))
        if progress is not None:
            progress[0] += 1
    bins = (2 << bits) + 1
    return (
        torch.stack((tally.positives, tally.all - tally.positives)).view(2, bins),
        tally.class_counts.view(2, classes + 1, len(thresholds)),
        rows.restored(tally.best, len(x)),
        columns.restored(tally.ref_best, len(ref_x)),
    )


class _Sorted:
    """The rows that take part, as unit vectors, by ascending class: so the positives of a row stand side by side."""

    def __init__(self, x_hat: Tensor, label: Tensor, order: Tensor) -> None:
        self.x_hat, self.label, self.order = x_hat, label, order

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> "_Sorted":
        order = y.argsort(stable=True)
        order = order[y[order] >= 0]
        label = y[order]
        x_hat, step = x.new_empty((len(order), x.shape[1])), max(_CHUNK // x.shape[1], 1)
        for start in range(0, len(order), step):  # copies on the way are small
            rows = slice(start, start + step)
            x_hat[rows] = unit_and_norms(x[order[rows]], label[rows] >= 0)[0]
        return cls(x_hat, label, order)

    def restored(self, best: Tensor, n: int) -> Tensor:
        """[2, n] in the order in which the rows came."""
        found = best.new_full((2, n), -torch.inf)
        found[:, self.order] = best
        return found


class _Tally:
    """The sums over tiles."""

    def __init__(self, rows: _Sorted, columns: _Sorted, classes: int, thresholds: Tensor, bits: int) -> None:
        self.rows, self.columns, self.classes, self.thresholds, self.bits = rows, columns, classes, thresholds, bits
        device, bins = rows.x_hat.device, (2 << bits) + 1
        self.all = torch.zeros(bins, dtype=torch.int64, device=device)
        self.positives = torch.zeros_like(self.all)
        size = 2 * (classes + 1) * len(thresholds)
        self.class_counts = torch.zeros(size, dtype=torch.int64, device=device)
        self.best = rows.x_hat.new_full((2, len(rows.label)), -torch.inf)
        self.ref_best = rows.x_hat.new_full((2, len(columns.label)), -torch.inf)
        # Of which classes each tile is, looked at once, since looking waits for a device.
        self.row_ends, self.column_ends = (_ends(s.label, b) for s, b in ((rows, ROWS), (columns, COLUMNS)))

    def add(self, rows: slice, columns: slice) -> None:
        """One tile of pairs."""
        s = product(self.rows.x_hat[rows], self.columns.x_hat[columns].T)
        label, ref_label = self.rows.label[rows], self.columns.label[columns]
        if len(self.thresholds) > 0:
            self._add_listed(s, label, ref_label)
        low, high = self.row_ends[rows.start // ROWS]
        ref_low, ref_high = self.column_ends[columns.start // COLUMNS]
        if low <= ref_high and ref_low <= high:  # else no pair of the tile is positive
            positive = label[:, None] == ref_label
            self.positives += self._histogram(s[positive])
            self._raise(0, rows, columns, s.masked_fill(~positive, -torch.inf))
            self._raise(1, rows, columns, s.masked_fill(positive, -torch.inf))
        else:
            self._raise(1, rows, columns, s)
        self.all += self._histogram(s)  # the last, since it works in place

    def _raise(self, side: int, rows: slice, columns: slice, s: Tensor) -> None:
        for best, index, dim in ((self.best, rows, 1), (self.ref_best, columns, 0)):
            best[side, index] = torch.maximum(best[side, index], s.amax(dim))

    def _histogram(self, s: Tensor) -> Tensor:
        half = 1 << self.bits
        cell = s.mul_(half).floor_().clamp_(-half, half).to(torch.int32).add_(half)
        return torch.bincount(cell.flatten(), minlength=2 * half + 1)

    def _add_listed(self, s: Tensor, label: Tensor, ref_label: Tensor) -> None:
        """Pairs from the lowest threshold on, at the classes of their rows."""
        row, column = (s >= self.thresholds[0]).nonzero(as_tuple=True)
        at = torch.bucketize(s[row, column], self.thresholds, right=True) - 1
        first, second = label[row], ref_label[column]
        is_negative = first != second
        table, number = self.classes + 1, len(self.thresholds)
        mine = (is_negative * table + first.clamp(max=self.classes)) * number + at
        other = ((table + second.clamp(max=self.classes)) * number + at)[is_negative]
        for flat in (mine, other):
            self.class_counts.index_add_(0, flat, torch.ones_like(flat))


def _ends(label: Tensor, block: int) -> list[list[int]]:
    """The lowest and the highest class of each block of ascending labels."""
    if len(label) == 0:
        return []
    starts = torch.arange(0, len(label), block, device=label.device)
    ends = torch.stack((label[starts], label[(starts + block - 1).clamp_max(len(label) - 1)]), 1)
    found: list[list[int]] = ends.tolist()
    return found
