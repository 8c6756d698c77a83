"""The loss in blocks of plain PyTorch, in O(N D) memory: it runs on any device."""

from typing import NamedTuple

import torch
from torch import Tensor

from tcm_fused.backends.numerics import (
    Norms,
    as_precise_as_asked,
    loss_dtype,
    product,
    project,
    unit_and_norms,
    weighted,
    wide_dtype,
)
from tcm_fused.backends.problem import Problem, Result

BLOCK = 1024  # rows and columns of one similarity tile


def run(problem: Problem) -> Result:
    """The loss tile by tile, with its gradient: O(N D + M D) memory, no wait for the device.

    The loss is piecewise linear in s, so the sums of the gradient, G+ = M+ X^ and G- = M- X^, need
    no counts: they are taken while the penalties are, and scaled at the end. With squared penalties the
    masks M are replaced by twice the violations of the hard pairs; the rest is the same.

    With `fp16` products may be TF32 where the user allows it.
    """
    weights = problem.weights
    with as_precise_as_asked(problem.x.device.type, problem.fp16):
        sums = _sums(problem)
        none = sums.penalty.new_empty(0, dtype=loss_dtype(problem.x))
        if weights is None:
            loss = None
            weight = torch.where(sums.finite, torch.ones_like(sums.penalty), torch.nan).diag()  # [penalty, side]
        else:
            n_plus, n_minus = sums.hard.clamp_min(1).to(sums.penalty.dtype)
            # Not weights / n: weights on the CPU would have to be copied to the device, and that waits for it.
            weight = torch.stack([weights[0] / n_plus, weights[1] / n_minus])
            weight = torch.where(sums.finite & torch.isfinite(weights).all(), weight, torch.nan)
            loss = weighted(weight, sums.penalty).sum().to(none.dtype)
        return Result(
            loss,
            sums.rows.gradient(weight) if problem.grad_x else none,
            sums.columns.gradient(weight) if problem.grad_ref and problem.ref_x is not None else none.clone(),
            sums.penalty,
            sums.hard,
        )


class _Rows(NamedTuple):
    """Rows or columns, with the sums for their gradient."""

    x_hat: Tensor  # [N, D]
    norms: Norms
    g: list[Tensor]  # G+ and G- [N, D], if wanted
    twice: bool  # the rows are the columns: each row's sum also stands for its column's

    def gradient(self, weight: Tensor) -> Tensor:
        """[N, D], that of w+ penalty+  +  w- penalty- with weights [2]; with weights [2, 2] two such, [2, N, D]."""
        if weight.ndim == 2:
            return torch.stack([self.gradient(one) for one in weight])
        grad = project(weight, self.g, self.x_hat, self.norms)
        return grad.mul_(2) if self.twice else grad


class _Sums(NamedTuple):
    rows: _Rows
    columns: _Rows
    penalty: Tensor  # [2]
    hard: Tensor  # [2] int64, hard pairs
    finite: Tensor  # [] bool, of all that takes part


def _sums(problem: Problem) -> _Sums:
    """One pass over the tiles."""
    x, y, ref_x, ref_y, row_offset, margins, _, squared, _, grad_x, grad_ref = problem
    wide, dtype = wide_dtype(x.device), loss_dtype(x)
    x = x.to(dtype).contiguous()
    symmetric = ref_x is None or ref_y is None
    if ref_x is None or ref_y is None:
        ref_x, ref_y, row_offset, grad_ref = x, y, 0, False
    else:
        ref_x = ref_x.to(dtype).contiguous()
    margin_plus, margin_minus = margins
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
                violation = torch.where(hard, violation, 0)
                penalty[side] += (violation**2 if squared else violation).sum(dtype=wide)
                count[side] += hard.sum()
                slope = 2 * violation if squared else hard.to(s.dtype)
                if grad_x:
                    g_rows[side][block_rows] += product(slope, ref_hat[block_columns])
                if grad_ref:
                    g_columns[side][block_columns] += product(slope.T, x_hat[block_rows])
    finite = torch.isfinite(x_hat).all() & torch.isfinite(ref_hat).all() & torch.isfinite(margins).all()
    return _Sums(
        _Rows(x_hat, x_norms, g_rows, symmetric),
        _Rows(ref_hat, ref_norms, g_columns, False),
        torch.where(finite, penalty, torch.nan),
        count,
        finite,
    )
