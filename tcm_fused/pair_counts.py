"""Pairs counted by similarity, in all and by class, in plain PyTorch: it runs on any device, and kernels are
checked against it."""

import torch
from torch import Tensor

from tcm_fused.reference import _unit_and_norm

BLOCK = 1024  # rows and columns of one similarity tile


def pair_counts_blocked(
    x: Tensor, y: Tensor, classes: int, thresholds: Tensor, bits: int, progress: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Count the unordered pairs of N rows, block by block: O(N D + 2^bits + classes * T) memory.

    A pair of rows with the same class is a positive of that class, any other a negative of both its classes. Classes
    from `classes` on share one row of counts, and a row with a negative class is in no count at all.

    Args:
        x: [N, D] float32 or float64, finite, of any scale.
        y: [N] int64 classes.
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
    """
    half, t = 1 << bits, thresholds.shape[0]
    counts = torch.zeros(2, 2 * half + 1, dtype=torch.int64, device=x.device)
    class_counts = torch.zeros(2, classes + 1, t, dtype=torch.int64, device=x.device)
    best = x.new_full((2, x.shape[0]), -torch.inf)
    order = torch.nonzero(y >= 0).flatten()
    (x_hat, _), label = _unit_and_norm(x, y >= 0), y[order]
    x_hat = x_hat[order]
    table = label.clamp(max=classes)
    starts = range(0, len(order), BLOCK)
    if progress is not None:
        progress[0], progress[1] = 0, len(starts) * (len(starts) + 1) // 2
    for i in starts:
        for j in starts[i // BLOCK :]:
            rows, columns = slice(i, i + BLOCK), slice(j, j + BLOCK)
            s = x_hat[rows] @ x_hat[columns].T
            pair = torch.ones_like(s, dtype=torch.bool)
            if i == j:
                pair = pair.triu(1)
            same = label[rows, None] == label[columns]
            for side, mask in enumerate((pair & same, pair & ~same)):
                row, column = mask.nonzero(as_tuple=True)
                value = s[row, column]
                cell = ((value * half).floor().to(torch.int64) + half).clamp(0, 2 * half)
                counts[side] += torch.bincount(cell, minlength=2 * half + 1)
                masked = torch.where(mask, s, -torch.inf)
                for index, dim in ((order[rows], 1), (order[columns], 0)):
                    best[side, index] = torch.maximum(best[side, index], masked.amax(dim))
                threshold = torch.bucketize(value, thresholds, right=True) - 1
                listed = threshold >= 0
                for index in (table[rows][row],) if side == 0 else (table[rows][row], table[columns][column]):
                    flat = (index * t + threshold)[listed]
                    class_counts[side] += torch.bincount(flat, minlength=(classes + 1) * t).view(classes + 1, t)
            if progress is not None:
                progress[0] += 1
    return counts, class_counts, best
