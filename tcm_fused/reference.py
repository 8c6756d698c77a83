"""The loss in plain PyTorch: the definition, which everything else is checked against, and a blocked
form of it in O(N D) memory, which runs on any device."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

EPS = 1e-12  # smallest norm a row is divided by
BLOCK = 1024  # rows and columns of one similarity tile of the blocked form


def tcm_reference(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    margin_plus: float = 0.9,
    margin_minus: float = 0.5,
    lambda_plus: float = 1.0,
    lambda_minus: float = 1.0,
    row_offset: int | None = None,
    penalty: str = "hinge",
    reduction: str = "violating",
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of the TCM loss, with every pair written out: O(N M) memory, differentiable by autograd.

    Arguments, shapes and meaning as in `tcm_fused.tcm_loss`, which has `groups` besides; nothing is validated.

    Returns:
        loss [], penalty [2] (sums over hard positives, hard negatives) and count [2] int64 (n+, n-).
    """
    if ref_emb is None or ref_labels is None:
        ref_emb, ref_labels, row_offset = embeddings, labels, 0
    rows, columns = labels >= 0, ref_labels >= 0  # those that take part
    x_hat = _unit(torch.where(rows[:, None], embeddings, 0))
    ref_hat = _unit(torch.where(columns[:, None], ref_emb, 0))
    s = x_hat @ ref_hat.T
    pair = rows[:, None] & columns
    if row_offset is not None:
        index = torch.arange(max(s.shape), device=s.device)
        pair &= index[: s.shape[0], None] + row_offset != index[: s.shape[1]]
    same = labels[:, None] == ref_labels
    pairs = torch.stack([pair & same, pair & ~same])
    violation = torch.stack([margin_plus - s, s - margin_minus])
    hard = pairs & torch.stack([s <= margin_plus, s >= margin_minus])
    violation = torch.where(hard, violation, 0)
    total = (violation**2 if penalty == "squared" else violation).sum((1, 2))
    count = hard.sum((1, 2))
    divisor = count if reduction == "violating" else pairs.sum((1, 2))
    weight = torch.tensor([lambda_plus, lambda_minus], dtype=s.dtype, device=s.device)
    loss = (weight * total / divisor.clamp_min(1)).sum()
    non_finite = (x_hat.sum() + ref_hat.sum()) * 0  # 0, or NaN if any embedding that takes part is not finite
    return loss * (1 + non_finite), total.detach(), count


def _unit(x: Tensor) -> Tensor:
    """x^ [N, D]: rows of x over max(|row|, EPS); a zero row stays zero and passes no gradient on."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return torch.where(norm == 0, 0, x / norm.clamp_min(EPS))


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

    Arguments and results: the operator of `tcm_fused.ops`; with `fp16` products may be TF32 where the user allows it.
    """
    options = (margin_plus, margin_minus, lambda_plus, lambda_minus, squared, per_side)
    with _as_precise_as_asked(x.device.type, fp16):
        x = x.to(loss_dtype(x)).contiguous()
        if ref_x is None or ref_y is None:  # rows are columns: each row's sum also stands for its column's
            loss, half_grad, grad_none, penalty, count = _blocked(x, y, x, y, 0, *options, grad_x, False)
            return loss, 2 * half_grad, grad_none, penalty, count
        return _blocked(x, y, ref_x.to(x.dtype).contiguous(), ref_y, row_offset, *options, grad_x, grad_ref)


@contextlib.contextmanager
def _as_precise_as_asked(device_type: str, fp16: bool) -> Iterator[None]:
    """No autocast, which would make products 16-bit, and no TF32 unless `fp16` allows as little."""
    with contextlib.ExitStack() as stack:
        if torch.amp.is_autocast_available(device_type):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        if device_type == "cuda" and not fp16:
            products = torch.backends.cuda.matmul
            stack.callback(setattr, products, "fp32_precision", products.fp32_precision)
            products.fp32_precision = "ieee"
        yield


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
    wide = wide_dtype(x)
    rows, columns = y >= 0, ref_y >= 0
    x_hat, x_norm = _unit_and_norm(x, rows)
    ref_hat, ref_norm = _unit_and_norm(ref_x, columns)
    penalty = torch.zeros(2, dtype=wide, device=x.device)
    count = torch.zeros(2, dtype=torch.int64, device=x.device)
    g_rows = [torch.zeros_like(x_hat) for _ in range(2 if grad_x else 0)]  # G+, G-
    g_columns = [torch.zeros_like(ref_hat) for _ in range(2 if grad_ref else 0)]
    for i in range(0, x.shape[0], BLOCK):
        block_rows = slice(i, min(i + BLOCK, x.shape[0]))
        for j in range(0, ref_x.shape[0], BLOCK):
            block_columns = slice(j, min(j + BLOCK, ref_x.shape[0]))
            s = x_hat[block_rows] @ ref_hat[block_columns].T
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
                    g_rows[side][block_rows] += slope @ ref_hat[block_columns]
                if grad_ref:
                    g_columns[side][block_columns] += slope.T @ x_hat[block_rows]
    finite = torch.isfinite(x_hat).all() & torch.isfinite(ref_hat).all()
    # From Python numbers, not a tensor of them: that would be copied to the device, and wait for it.
    n_plus, n_minus = count.clamp_min(1).to(wide)
    weight = torch.stack([lambda_plus / n_plus, lambda_minus / n_minus])
    weight, penalty = (torch.where(finite, t, torch.nan) for t in (weight, penalty))

    def gradient(g: list[Tensor], x_hat: Tensor, norm: Tensor) -> Tensor:
        if not per_side:
            return _project(weight, g, x_hat, norm)
        one = torch.where(finite, torch.ones_like(weight), torch.nan).diag()  # [side, weight]
        return torch.stack([_project(one[side], g, x_hat, norm) for side in (0, 1)])

    return (
        (weight * penalty).sum().to(x.dtype),
        gradient(g_rows, x_hat, x_norm) if grad_x else x.new_empty(0),
        gradient(g_columns, ref_hat, ref_norm) if grad_ref else x.new_empty(0),
        penalty,
        count,
    )


def loss_dtype(x: Tensor) -> torch.dtype:
    """The dtype of loss and gradient: float64 for float64 embeddings, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype penalties are summed in: float64, but for MPS, which has none."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def _unit_and_norm(x: Tensor, takes_part: Tensor) -> tuple[Tensor, Tensor]:
    """x^ [N, D] and |x| [N, 1], with no overflow on the way; rows that take no part count as zero."""
    x = torch.where(takes_part[:, None], x, 0)
    peak = x.abs().amax(dim=1, keepdim=True)
    peak = torch.where(peak > 0, peak, 1)
    norm = torch.linalg.vector_norm(x / peak, dim=1, keepdim=True)  # in units of peak
    return torch.where(peak * norm < EPS, x / EPS, x / peak / norm), peak * norm


def _project(weight: Tensor, g: list[Tensor], x_hat: Tensor, norm: Tensor) -> Tensor:
    """dL/dx = (g - (g . x^) x^) / max(|x|, EPS) with g = w- G- - w+ G+; 0 for a zero row.

    Below EPS the divisor is a constant, so nothing is projected away.
    """
    g_plus, g_minus = g
    total = weight[1].to(x_hat.dtype) * g_minus - weight[0].to(x_hat.dtype) * g_plus
    along = (total * x_hat).sum(dim=1, keepdim=True)
    total -= torch.where(norm < EPS, 0, along) * x_hat
    return torch.where(norm == 0, 0 * total, total / norm.clamp_min(EPS))
