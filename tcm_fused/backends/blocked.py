"""The loss in blocks of plain PyTorch, in O(N D) memory: it runs on any device."""

import torch
from torch import Tensor

from tcm_fused.backends.numerics import (
    Norms,
    as_precise_as_asked,
    loss_dtype,
    product,
    project,
    unit_and_norms,
    wide_dtype,
)

BLOCK = 1024  # rows and columns of one similarity tile


def tcm_blocked(
    x: Tensor,
    y: Tensor,
    ref_x: Tensor | None,
    ref_y: Tensor | None,
    row_offset: int | None,
    margin_plus: float,
    margin_minus: float,
    lambda_plus: float,
    lambda_minus: float,
    squared: bool,
    fp16: bool,
    per_side: bool,
    grad_x: bool,
    grad_ref: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same loss tile by tile, with its gradient: O(N D + M D) memory, no wait for the device.

    The loss is piecewise linear in s, so the sums of the gradient, G+ = M+ X^ and G- = M- X^, need
    no counts: they are taken while the penalties are, and scaled at the end. With squared penalties the
    masks M are replaced by twice the violations of the hard pairs; the rest is the same.

    Arguments and results: those of the operator; with `fp16` products may be TF32 where the user allows it.
    """
    options = (margin_plus, margin_minus, lambda_plus, lambda_minus, squared, per_side)
    with as_precise_as_asked(x.device.type, fp16):
        x = x.to(loss_dtype(x)).contiguous()
        if ref_x is None or ref_y is None:  # rows are columns: each row's sum also stands for its column's
            loss, half_grad, grad_none, penalty, count = _blocked(x, y, x, y, 0, *options, grad_x, False)
            return loss, 2 * half_grad, grad_none, penalty, count
        return _blocked(x, y, ref_x.to(x.dtype).contiguous(), ref_y, row_offset, *options, grad_x, grad_ref)


def _blocked(
    x: Tensor,
    y: Tensor,
    ref_x: Tensor,
    ref_y: Tensor,
    row_offset: int | None,
    margin_plus: float,
    margin_minus: float,
    lambda_plus: float,
    lambda_minus: float,
    squared: bool,
    per_side: bool,
    grad_x: bool,
    grad_ref: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`tcm_blocked` for a reference set."""
    wide = wide_dtype(x.device)
    rows, columns = y >= 0, ref_y >= 0
    x_hat, x_norms = unit_and_norms(x, rows)
    ref_hat, ref_norms = unit_and_norms(ref_x, columns)
    penalty = torch.zeros(2, dtype=wide, device=x.device)
    count = torch.zeros(2, dtype=torch.int64, device=x.device)
    g_rows = [torch.zeros_like(x_hat) for _ in range(2 if grad_x else 0)]  # G+, G-
    g_columns = [torch.zeros_like(ref_hat) for _ in range(2 if grad_ref else 0)]
    for i in range(0, x.shape[0], BLOCK):
        block_rows = slice(i, min(i + BLOCK, x.shape[0]))
        for j in range(0, ref_x.shape[0], BLOCK):
            block_columns = slice(j, min(j + BLOCK, ref_x.shape[0]))
            s = product(x_hat[block_rows], ref_hat[block_columns].T)
            pair = rows[block_rows, None] & columns[block_columns]
            if row_offset is not None:
                own = torch.arange(i, block_rows.stop, device=x.device) + row_offset
                pair &= own[:, None] != torch.arange(j, block_columns.stop, device=x.device)
            same = y[block_rows, None] == ref_y[block_columns]
            hard_plus = pair & same & (s <= margin_plus)
            hard_minus = pair & ~same & (s >= margin_minus)
            for side, (hard, violation) in enumerate([(hard_plus, margin_plus - s), (hard_minus, s - margin_minus)]):
                excess = torch.where(hard, violation, 0)
                penalty[side] += (excess**2 if squared else excess).sum(dtype=wide)
                count[side] += hard.sum()
                slope = 2 * excess if squared else hard.to(s.dtype)
                if grad_x:
                    g_rows[side][block_rows] += product(slope, ref_hat[block_columns])
                if grad_ref:
                    g_columns[side][block_columns] += product(slope.T, x_hat[block_rows])
    finite = torch.isfinite(x_hat).all() & torch.isfinite(ref_hat).all()
    # From Python numbers, not a tensor of them: that would be copied to the device, and wait for it.
    n_plus, n_minus = count.clamp_min(1).to(wide)
    weight = torch.stack([lambda_plus / n_plus, lambda_minus / n_minus])
    weight, penalty = (torch.where(finite, t, torch.nan) for t in (weight, penalty))

    def gradient(g: list[Tensor], x_hat: Tensor, norms: Norms) -> Tensor:
        if not per_side:
            return project(weight, g, x_hat, norms)
        one = torch.where(finite, torch.ones_like(weight), torch.nan).diag()  # [side, weight]
        return torch.stack([project(one[side], g, x_hat, norms) for side in (0, 1)])

    return (
        (weight * penalty).sum().to(x.dtype),
        gradient(g_rows, x_hat, x_norms) if grad_x else x.new_empty(0),
        gradient(g_columns, ref_hat, ref_norms) if grad_ref else x.new_empty(0),
        penalty,
        count,
    )
