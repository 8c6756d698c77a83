"""The loss in plain PyTorch: the definition, which everything else is checked against."""

import torch
from torch import Tensor

EPS = 1e-12  # smallest norm a row is divided by


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
