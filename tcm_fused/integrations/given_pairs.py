"""The loss of pairs that are given one by one, as a miner gives them."""

import torch
from torch import Tensor

from tcm_fused.arguments import Options, check_differentiation
from tcm_fused.backends.numerics import loss_dtype, project, unit_and_norms, weighted, wide_dtype
from tcm_fused.backends.operators import wants_gradient, with_gradient
from tcm_fused.loss import TCMStats, stats_of

CHUNK = 4096  # pairs worked at once, in two blocks of [CHUNK, D]; on a CPU 1024 to 16,384 take the same time


def pair_loss(
    x: Tensor,
    ref_x: Tensor,
    pairs: tuple[Tensor, ...],
    options: Options,
) -> tuple[Tensor, TCMStats]:
    """The TCM loss of the given pairs in place of all: hard are the positives up to `margin_plus` and the negatives
    from `margin_minus` on among them.

    One pass gives loss and gradient. Memory is O(CHUNK D + N D) beyond the pairs; on a GPU nothing waits for the host.
    There the gradient is summed in no fixed order, unless `torch.use_deterministic_algorithms(True)` was called. A pair
    that comes k times counts k times. A row that is in no pair is not looked at.

    Args:
        x: [N, D], the rows.
        ref_x: [M, D], the columns; may be x itself.
        pairs: row and column of the positives, row and column of the negatives, int64 [P], [P], [Q], [Q].
        options: margins, weights, penalty and reduction; the rest does not matter here.

    Returns:
        The loss, in float64 for float64 embeddings and float32 otherwise, and its stats.

    Raises:
        ValueError: the lists of a side are of unequal length; on a CPU, an index is out of range. (On a GPU that is an
            error of the device.)
        RuntimeError: derivatives other than those of backward() are asked for.
    """
    options.check()
    check_differentiation(x, ref_x)
    names = ("anchors of positives", "positives", "anchors of negatives", "negatives")
    for name, index, rows in zip(names, pairs, (x.shape[0], ref_x.shape[0]) * 2, strict=True):
        if index.device.type == "cpu" and len(index) and not 0 <= index.min() <= index.max() < rows:
            raise ValueError(
                f"indices_tuple: {name} must be from 0 to {rows - 1}, got {index.min()} to {index.max()}; is it from "
                "another batch?"
            )
    for side in (0, 2):
        if len(pairs[side]) != len(pairs[side + 1]):
            raise ValueError(
                f"indices_tuple: lists must have one of each for a pair, and be of one length; got {len(pairs[side])} "
                f"{names[side]} and {len(pairs[side + 1])} {names[side + 1]}"
            )
    loss, grads, penalty, count = _loss_and_gradients(x, ref_x, pairs, options)
    if any(grad is not None for grad in grads):
        loss = with_gradient(loss, grads, (x, ref_x))
    return loss, stats_of(penalty, count, loss.dtype)


def _loss_and_gradients(
    x: Tensor, ref_x: Tensor, pairs: tuple[Tensor, ...], options: Options
) -> tuple[Tensor, list[Tensor | None], Tensor, Tensor]:
    """Loss [], its gradients by x and ref_x (None: not wanted), penalty [2] and count [2], in one pass."""
    wants = wants_gradient(x), wants_gradient(ref_x)
    x, ref_x = x.detach(), ref_x.detach()
    a1, p, a2, n = pairs
    dtype, wide = torch.promote_types(loss_dtype(x), loss_dtype(ref_x)), wide_dtype(x.device)
    x_hat, norms = unit_and_norms(x.to(dtype), _in_pairs(x, a1, a2))
    ref_hat, ref_norms = unit_and_norms(ref_x.to(dtype), _in_pairs(ref_x, p, n))
    margins, weights = options.margins(x), options.weights(x)
    squared = options.penalty == "squared"
    penalty = torch.zeros(2, dtype=wide, device=x.device)
    count = torch.zeros(2, dtype=torch.int64, device=x.device)
    g_rows = [torch.zeros_like(x_hat) for _ in range(2 if wants[0] else 0)]  # G+, G-
    g_columns = [torch.zeros_like(ref_hat) for _ in range(2 if wants[1] else 0)]
    for side, (rows, columns) in enumerate([(a1, p), (a2, n)]):
        for i, j in zip(rows.split(CHUNK), columns.split(CHUNK), strict=True):
            u, v = x_hat[i], ref_hat[j]  # [CHUNK, D]
            s = (u * v).sum(1)
            violation = s - margins[1] if side else margins[0] - s
            hard = violation >= 0
            violation = torch.where(hard, violation, 0)
            penalty[side] += (violation**2 if squared else violation).sum(dtype=wide)
            count[side] += hard.sum()
            slope = (2 * violation if squared else hard.to(dtype))[:, None]
            if g_rows:
                g_rows[side].index_add_(0, i, slope * v)
            if g_columns:
                g_columns[side].index_add_(0, j, slope * u)
    finite = torch.isfinite(x_hat).all() & torch.isfinite(ref_hat).all()
    finite &= torch.isfinite(margins).all() & torch.isfinite(weights).all()
    # Filled, not copied from the host, which would wait for the device.
    given = torch.stack([count.new_full((), len(p)), count.new_full((), len(n))])
    divisor = count if options.reduction == "violating" else given
    n_plus, n_minus = divisor.clamp_min(1).to(wide)
    weight = torch.stack([weights[0] / n_plus, weights[1] / n_minus])
    weight, penalty = (torch.where(finite, t, torch.nan) for t in (weight, penalty))
    grads = [
        project(weight, g_rows, x_hat, norms) if g_rows else None,
        project(weight, g_columns, ref_hat, ref_norms) if g_columns else None,
    ]
    return weighted(weight, penalty).sum().to(dtype), grads, penalty, count


def _in_pairs(x: Tensor, *indices: Tensor) -> Tensor:
    """[N] bool: the rows of x that are in a pair."""
    taken = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
    for index in indices:
        taken.index_fill_(0, index, True)
    return taken
