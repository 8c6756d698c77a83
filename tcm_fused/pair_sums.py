"""The loss of a batch from sums over pairs: of all of them in one call of an operator, or of parts, which add up."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tcm_fused.arguments import Options, Rows, one_fp16_product
from tcm_fused.backends import operators
from tcm_fused.backends.choice import choose
from tcm_fused.backends.numerics import device_type, loss_dtype, wide_dtype
from tcm_fused.backends.operators import OPERATORS, wants_gradient, with_gradient
from tcm_fused.tracing import eager_when_compiled


class PairSums(NamedTuple):
    """Of positives and of negatives, as [2] tensors; those of parts of a batch add up to those of the whole."""

    penalty: Tensor  # sum over the hard pairs, differentiable
    hard: Tensor  # int64, hard pairs
    divisor: Tensor  # int64, pairs that the penalty is divided by

    def loss(self, weights: Tensor) -> Tensor:
        """lambda+ penalty+ / divisor+  +  lambda- penalty- / divisor-, of weights [2]; a side without pairs adds 0."""
        lambda_plus, lambda_minus = weights
        mean_plus, mean_minus = self.penalty / self.divisor.clamp_min(1)
        return lambda_plus * mean_plus + lambda_minus * mean_minus


class _Call(NamedTuple):
    """How the operators are called for one batch; margins and precision are not those of its parts."""

    operators: operators.Operators
    margins: Tensor
    squared: bool
    fp16: bool

    @classmethod
    def of(cls, x: Tensor, options: Options) -> "_Call":
        kind = device_type(x), x.dtype
        hardest = options.hardest_negatives
        found = OPERATORS[choose(options.backend, *kind, options.penalty, hardest is not None)]
        if hardest is not None:
            found = found._replace(penalties=partial(found.hardest, hardest=hardest))
        fp16 = one_fp16_product(*kind, options.precision)
        return cls(found, options.margins(x), options.penalty == "squared", fp16)


def loss_and_sums(
    rows: Rows, columns: Rows | None, row_offset: int | None, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [], and without gradient the sums [2] of penalties and counts [2] of hard pairs; of checked arguments."""
    weights = options.weights(rows.x)
    if rows.groups is None and options.reduction == "violating" and options.hardest_negatives is None:
        ref_x, ref_y, _ = columns or (None, None, None)
        on, margins, squared, fp16 = _Call.of(rows.x, options)
        loss, penalty, hard = operators.call(
            on.loss, rows.x, rows.y, ref_x, ref_y, row_offset, margins, weights, squared, fp16
        )
        return loss, penalty, hard
    sums = pair_sums(rows, columns, row_offset, options)
    return sums.loss(weights).to(loss_dtype(rows.x)), sums.penalty.detach(), sums.hard


def pair_sums(rows: Rows, columns: Rows | None, row_offset: int | None, options: Options) -> PairSums:
    """The sums over all pairs of `rows` with `columns` (None: with the rows), or over those that `groups` leave."""
    call = _Call.of(rows.x, options)
    if rows.groups is not None:
        return _grouped(call, rows, columns, row_offset, options)
    ref_x, ref_y, _ = columns or (None, None, None)
    penalty, hard = operators.call(call.operators.penalties, rows.x, rows.y, ref_x, ref_y, row_offset, *call[1:])
    return PairSums(penalty, hard, _divisor(hard, rows.y, ref_y, row_offset, options.reduction))


def add(parts: Sequence[PairSums]) -> PairSums:
    """The sums of the whole from those of its parts."""
    penalty, hard, divisor = (torch.stack(part).sum(0) for part in zip(*parts, strict=True))
    return PairSums(penalty, hard, divisor)


@eager_when_compiled("the groups are read on the host")
def _grouped(call: _Call, rows: Rows, columns: Rows | None, row_offset: int | None, options: Options) -> PairSums:
    """Group by group, with the gradients of all parts added up at once: autograd would keep all columns of each."""
    grad_rows = _room(rows.x)
    grad_columns = grad_rows if columns is None else _room(columns.x)
    within = options.group_pairs == "within"
    # A pair of two groups once for both orders; but where the hardest of each row are chosen, these differ.
    once = columns is None and not within and options.hardest_negatives is None
    both_orders = 2 if once else 1
    none = torch.zeros(2, dtype=torch.int64, device=rows.x.device)
    total = PairSums(none.to(wide_dtype(rows.x.device)), none, none)
    for i, j, offset in _within(rows, columns, row_offset) if within else _across(rows, columns, once):
        x, y, _ = _take(rows, i)
        ref_x, ref_y, _ = (None, None, None) if j is None else _take(columns or rows, j)
        wants = grad_rows is not None, grad_columns is not None and j is not None
        penalty, of_rows, of_columns, hard = call.operators.penalties(x, y, ref_x, ref_y, offset, *call[1:], *wants)
        part = PairSums(penalty, hard, _divisor(hard, y, ref_y, offset, options.reduction))
        if grad_rows is not None:
            grad_rows.index_add_(1, i, of_rows, alpha=both_orders)
        if grad_columns is not None and j is not None:
            grad_columns.index_add_(1, j, of_columns, alpha=both_orders)
        total = add([total, part])
    penalty, hard, divisor = (both_orders * sums for sums in total)

    sets = [(rows, grad_rows), *([] if columns is None else [(columns, grad_columns)])]
    if not all(bool(x[y >= 0].isfinite().all()) for (x, y, _), _ in sets):  # of a row in no part, too
        penalty = torch.full_like(penalty, torch.nan)
        for (_, y, _), grad in sets:
            if grad is not None:
                grad[:, y >= 0] = torch.nan
    penalty = with_gradient(penalty, [grad for _, grad in sets], [x for (x, _, _), _ in sets])
    return PairSums(penalty, hard, divisor)


def _room(x: Tensor) -> Tensor | None:
    """Zeros [2, N, D] for the gradients of the two penalties by x [N, D], if they are wanted."""
    return torch.zeros((2, *x.shape), dtype=loss_dtype(x), device=x.device) if wants_gradient(x) else None


def _take(rows: Rows, index: Tensor) -> Rows:
    """Some of `rows`, as constants in the dtype of the loss: so their gradients are, and add up in it."""
    return Rows(rows.x.detach()[index].to(loss_dtype(rows.x)), rows.y[index], None)


def _divisor(hard: Tensor, y: Tensor, ref_y: Tensor | None, row_offset: int | None, reduction: str) -> Tensor:
    return hard if reduction == "violating" else count_pairs(y, ref_y, row_offset)


def count_pairs(y: Tensor, ref_y: Tensor | None, row_offset: int | None) -> Tensor:
    """[2] int64: positive and negative pairs, hard or not; no wait for the device."""
    if ref_y is None:
        ref_y, row_offset = y, 0
    y, ref_y = y.contiguous(), ref_y.contiguous()
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


def _within(
    rows: Rows, columns: Rows | None, row_offset: int | None
) -> Iterator[tuple[Tensor, Tensor | None, int | None]]:
    """Indices of each group's rows and of its columns (None: its rows), the columns that are rows first."""
    index = torch.arange(len(rows.y), device=rows.y.device)
    row_parts = _by_group(rows, index)
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


def _across(rows: Rows, columns: Rows | None, once: bool) -> Iterator[tuple[Tensor, Tensor, None]]:
    """Indices of each group's rows and of the columns of all others (None: the rows); `once`, of later groups only.

    A row and the column that is the row itself are of one group, so never paired.
    """
    groups = (columns or rows).groups
    assert groups is not None
    for group, part in _by_group(rows, torch.arange(len(rows.y), device=rows.y.device)).items():
        yield part, (groups > group if once else groups != group).nonzero().flatten(), None


def _by_group(rows: Rows, index: Tensor) -> dict[int, Tensor]:
    """`index` cut into that of each group, in ascending order; the order within a group stays."""
    assert rows.groups is not None
    groups, order = rows.groups[index].sort(stable=True)
    values, sizes = torch.unique_consecutive(groups, return_counts=True)
    return dict(zip(values.tolist(), index[order].split(sizes.tolist()), strict=True))
