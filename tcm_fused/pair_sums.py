"""Penalties and counts of a batch from which a loss is made: where one call of an operator does not give it all."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tcm_fused.reference import wide_dtype

# x [N, D], y [N], ref_x [M, D] or None, ref_y [M] or None, row_offset -> penalty [2], differentiable, and count [2]
PairOperator = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, int | None], tuple[Tensor, Tensor]]


class Rows(NamedTuple):
    """One set of embeddings with what belongs to each."""

    x: Tensor  # [N, D]
    y: Tensor  # [N] int64
    groups: Tensor | None  # [N] of integers


class PairSums(NamedTuple):
    """Of positives and of negatives, as [2] tensors; those of parts of a batch add up to those of the whole."""

    penalty: Tensor  # sum over the hard pairs, differentiable
    hard: Tensor  # int64, hard pairs
    divisor: Tensor  # int64, pairs that the penalty is divided by

    def loss(self, lambda_plus: float, lambda_minus: float) -> Tensor:
        """lambda+ penalty+ / divisor+  +  lambda- penalty- / divisor-; a side without pairs adds 0."""
        mean_plus, mean_minus = self.penalty / self.divisor.clamp_min(1)
        return lambda_plus * mean_plus + lambda_minus * mean_minus


def pair_sums(
    operator: PairOperator, rows: Rows, columns: Rows | None, row_offset: int | None, reduction: str, group_pairs: str
) -> PairSums:
    """The sums over all pairs of `rows` with `columns` (None: with the rows), or over those that `groups` leave."""
    if rows.groups is None:
        return _sums(operator, rows, columns, row_offset, reduction)
    split = _within if group_pairs == "within" else _across
    parts = [_sums(operator, r, c, offset, reduction) for r, c, offset in split(rows, columns, row_offset)]
    both_orders = 2 if columns is None and group_pairs == "across" else 1
    finite = torch.stack([x[y >= 0].isfinite().all() for x, y, _ in (rows, columns or rows)]).all()
    if not parts:
        none = torch.zeros(2, dtype=torch.int64, device=rows.x.device)
        parts = [PairSums((rows.x.sum() * 0).to(wide_dtype(rows.x)).expand(2), none, none)]
    penalty, hard, divisor = (both_orders * part for part in add(parts))
    # A factor, not a choice: so that all gradients are NaN too.
    return PairSums(penalty * torch.where(finite, 1.0, torch.nan), hard, divisor)


def add(parts: Sequence[PairSums]) -> PairSums:
    """The sums of the whole from those of its parts."""
    penalty, hard, divisor = (torch.stack(part).sum(0) for part in zip(*parts, strict=True))
    return PairSums(penalty, hard, divisor)


def _sums(operator: PairOperator, rows: Rows, columns: Rows | None, row_offset: int | None, reduction: str) -> PairSums:
    ref_x, ref_y, _ = columns or (None, None, None)
    penalty, hard = operator(rows.x, rows.y, ref_x, ref_y, row_offset)
    return PairSums(penalty, hard, hard if reduction == "violating" else count_pairs(rows.y, ref_y, row_offset))


def count_pairs(y: Tensor, ref_y: Tensor | None, row_offset: int | None) -> Tensor:
    """[2] int64: positive and negative pairs, hard or not; no wait for the device."""
    if ref_y is None:
        ref_y, row_offset = y, 0
    takes_part = y >= 0
    ordered = ref_y.sort().values
    same = torch.searchsorted(ordered, y, right=True) - torch.searchsorted(ordered, y)
    positives = torch.where(takes_part, same, 0).sum()
    pairs = takes_part.sum() * (ref_y >= 0).sum()
    if row_offset is not None:
        own = ref_y[row_offset : row_offset + len(y)]
        positives = positives - (takes_part & (own == y)).sum()
        pairs = pairs - (takes_part & (own >= 0)).sum()
    return torch.stack([positives, pairs - positives])


def _within(rows: Rows, columns: Rows | None, row_offset: int | None) -> Iterator[tuple[Rows, Rows | None, int | None]]:
    """Each group's rows with its own columns, those that are its rows first."""
    row_parts = _by_group(rows, torch.arange(len(rows.y), device=rows.y.device))
    if columns is None:
        yield from ((part, None, None) for part in row_parts.values())
        return
    index = torch.arange(len(columns.y), device=columns.y.device)
    if row_offset is not None:
        end = row_offset + len(rows.y)
        index = torch.cat([index[row_offset:end], index[:row_offset], index[end:]])
    column_parts = _by_group(columns, index)
    for group, part in row_parts.items():
        if group in column_parts:
            yield part, column_parts[group], None if row_offset is None else 0


def _across(rows: Rows, columns: Rows | None, row_offset: int | None) -> Iterator[tuple[Rows, Rows | None, int | None]]:
    """Each group's rows with the columns of all other groups; where the rows are the columns, of later groups.

    A row and the column that is the row itself are of one group, so never paired.
    """
    for group, part in _by_group(rows, torch.arange(len(rows.y), device=rows.y.device)).items():
        x, y, groups = columns or rows
        assert groups is not None
        index = (groups > group if columns is None else groups != group).nonzero().flatten()
        yield part, Rows(x[index], y[index], None), None


def _by_group(rows: Rows, index: Tensor) -> dict[int, Rows]:
    """`rows[index]` cut into groups, in ascending order; the order within a group stays."""
    assert rows.groups is not None
    groups, order = rows.groups[index].sort(stable=True)
    values, sizes = torch.unique_consecutive(groups, return_counts=True)
    index, sizes = index[order], sizes.tolist()
    parts = zip(rows.x[index].split(sizes), rows.y[index].split(sizes), strict=True)
    return {group: Rows(x, y, None) for group, (x, y) in zip(values.tolist(), parts, strict=True)}
