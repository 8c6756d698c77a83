"""Pairs counted by similarity, in all and by class, in plain PyTorch: it runs on any device, and kernels are
checked against it."""

import torch
from torch import Tensor

from tcm_fused.backends.blocked_between import Tables, counts_between
from tcm_fused.backends.numerics import as_precise_as_asked, product, unit_and_norms

BLOCK = 1024  # rows and columns of one similarity tile


def counts_blocked(
    x: Tensor,
    y: Tensor,
    ref_x: Tensor | None,
    ref_y: Tensor | None,
    classes: int,
    thresholds: Tensor,
    bits: int,
    progress: Tensor | None,
) -> Tables:
    """Count the unordered pairs of N rows, or those of N rows and M reference rows, block by block.

    It takes O((N + M) D + 2^bits + classes * T) memory.

    A pair of rows with the same class is a positive of that class, any other a negative of both its classes. Classes
    from `classes` on share one row of counts, and a row with a negative class is in no count at all.

    Args:
        x: [N, D] float32 or float64, finite, of any scale.
        y: [N] int64 classes.
        ref_x: [M, D] in the dtype of x; None: the rows are paired with each other.
        ref_y: [M] int64 classes, in the numbering of y.
        classes: how many classes have counts of their own.
        thresholds: [T] ascending similarities, in the dtype of x.
        bits: the grid on [-1, 1] has steps of 2^-bits.
        progress: [2] int64 on the CPU, blocks done and in all, written as it goes.

    Returns:
        counts [2, 2^(bits + 1) + 1] int64: positives and negatives with floor(s 2^bits) + 2^bits = k; similarities
        beyond +-1 count as +-1.
        class_counts [2, classes + 1, T] int64: those of each class with thresholds[k] <= s < thresholds[k + 1], the
        last without an upper bound.
        best [2, N]: each row's largest similarity to a positive and to a negative, -inf where there is none.
        ref_best [2, M]: those of the reference rows; [2, 0] without.
    """
    with as_precise_as_asked(x.device.type, False):
        if ref_x is not None and ref_y is not None:
            return counts_between(x, y, ref_x, ref_y, classes, thresholds, bits, progress)
        return *_count(x, y, classes, thresholds, bits, progress), x.new_empty((2, 0))


def _count(
    x: Tensor, y: Tensor, classes: int, thresholds: Tensor, bits: int, progress: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    half, t = 1 << bits, thresholds.shape[0]
    bins = 2 * half + 1
    counts = torch.zeros(2 * bins + 1, dtype=torch.int64, device=x.device)  # the last: entries that are no pair
    class_counts = torch.zeros(2 * (classes + 1) * t, dtype=torch.int64, device=x.device)
    best = x.new_full((2, x.shape[0]), -torch.inf)
    order = torch.nonzero(y >= 0).flatten()
    x_hat, label = unit_and_norms(x, y >= 0)[0][order], y[order]
    table = label.clamp(max=classes)
    starts = range(0, len(order), BLOCK)
    if progress is not None:
        progress[0], progress[1] = 0, len(starts) * (len(starts) + 1) // 2
    for i in starts:
        for j in starts[i // BLOCK :]:
            rows, columns = slice(i, i + BLOCK), slice(j, j + BLOCK)
            s = product(x_hat[rows], x_hat[columns].T)
            negative = label[rows, None] != label[columns]
            no_pair = torch.ones_like(negative).tril() if i == j else None
            cell = (s * half).floor_().to(torch.int64).add_(half).clamp_(0, 2 * half) + bins * negative
            if no_pair is not None:
                cell[no_pair] = 2 * bins
            counts += torch.bincount(cell.flatten(), minlength=2 * bins + 1)
            for side, other in enumerate((negative, ~negative)):
                own = s.masked_fill(other if no_pair is None else other | no_pair, -torch.inf)
                for index, dim in ((order[rows], 1), (order[columns], 0)):
                    best[side, index] = torch.maximum(best[side, index], own.amax(dim))
            if t > 0:
                listed = s >= thresholds[0]
                row, column = (listed if no_pair is None else listed & ~no_pair).nonzero(as_tuple=True)
                at = torch.bucketize(s[row, column], thresholds, right=True) - 1
                is_negative = negative[row, column]
                index = (is_negative * (classes + 1) + table[rows][row]) * t + at
                index_of_columns = ((classes + 1 + table[columns][column]) * t + at)[is_negative]
                for flat in (index, index_of_columns):
                    class_counts.index_add_(0, flat, torch.ones_like(flat))  # not bincount: the table may be long
            if progress is not None:
                progress[0] += 1
    return counts[:-1].view(2, bins).clone(), class_counts.view(2, classes + 1, t), best
