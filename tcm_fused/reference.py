"""The loss in plain PyTorch: the definition, which everything else is checked against."""

import torch
from torch import Tensor

from tcm_fused.backends.numerics import EPS, loss_dtype, wide_dtype


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

    Arguments, shapes and meaning as in `tcm_fused.tcm_loss`, which has `groups` besides; nothing is validated. Products
    are of float64, where the device has it: so no setting of the process, autocast neither, makes them less exact.

    Returns:
        loss [], penalty [2] (sums over hard positives, hard negatives) and count [2] int64 (n+, n-).
    """
    if ref_emb is None or ref_labels is None:
        ref_emb, ref_labels, row_offset = embeddings, labels, 0
    rows, columns = labels >= 0, ref_labels >= 0  # those that take part
    x_hat = _unit(torch.where(rows[:, None], embeddings, 0))
    ref_hat = _unit(torch.where(columns[:, None], ref_emb, 0))
    wide = wide_dtype(x_hat.device)
    s = (x_hat.to(wide) @ ref_hat.to(wide).T).to(x_hat.dtype)
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
    # 0, and in the gradient of each, or NaN if any embedding that takes part is not finite.
    everything = x_hat.sum() + ref_hat.sum()
    non_finite = torch.where(everything.isfinite(), torch.zeros_like(everything), torch.nan)
    return loss + non_finite * everything, total.detach(), count


def _unit(x: Tensor) -> Tensor:
    """x^ [N, D]: rows of x over max(|row|, EPS); a zero row stays zero and passes no gradient on (but NaN).

    The norm is taken in units of the largest component, for which it need not be differentiated: x^ has no unit.
    """
    x = x.to(loss_dtype(x))
    peak = x.detach().abs().amax(dim=1, keepdim=True)
    peak = torch.where(peak > 0, peak, 1)
    length = torch.linalg.vector_norm(x / peak, dim=1, keepdim=True)
    is_tiny = peak * length < EPS
    x_hat = torch.where(is_tiny, x / EPS, x / peak / torch.where(is_tiny, 1, length))
    return torch.where(length == 0, 0 * x, x_hat)
