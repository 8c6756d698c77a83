"""The definition of the TCM loss in plain PyTorch, in the paper's notation: everything else is checked against it.

Zhang et al., Threshold-Consistent Margin Loss for Open-World Deep Metric Learning, ICLR 2024, section 4.
"""

import torch
from torch import Tensor

from tcm_fused.backends.numerics import EPS, loss_dtype, wide_dtype


def tcm_reference(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    margin_plus: float | Tensor = 0.9,
    margin_minus: float | Tensor = 0.5,
    lambda_plus: float | Tensor = 1.0,
    lambda_minus: float | Tensor = 1.0,
    row_offset: int | None = None,
    penalty: str = "hinge",
    reduction: str = "violating",
    hardest_negatives: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """L = lambda+ / n+ sum_{H+} (m+ - s_ij)  +  lambda- / n- sum_{H-} (s_ij - m-), with every pair written out.

    O(N M) memory, differentiable by autograd. Arguments, shapes and meaning as in `tcm_fused.tcm_loss`, which has
    `groups` besides; nothing is checked.

    Returns:
        loss [], penalty [2] (sums over hard positives, hard negatives) and count [2] int64 (n+, n-).
    """
    if ref_emb is None or ref_labels is None:
        ref_emb, ref_labels, row_offset = embeddings, labels, 0

    # s_ij = x^_i . x^_j. A row with a negative label takes part in no pair and is not looked at.
    rows, columns = labels >= 0, ref_labels >= 0
    x_hat = _unit(torch.where(rows[:, None], embeddings, 0))
    ref_hat = _unit(torch.where(columns[:, None], ref_emb, 0))
    wide = wide_dtype(x_hat.device)  # float64, whose products no setting of the process makes less exact
    s = (x_hat.to(wide) @ ref_hat.to(wide).T).to(x_hat.dtype)

    # Positives have the same label, negatives have not. Row i is column i + row_offset, which it is not compared with.
    pair = rows[:, None] & columns
    if row_offset is not None:
        index = torch.arange(max(s.shape), device=s.device)
        pair &= index[: s.shape[0], None] + row_offset != index[: s.shape[1]]
    same = labels[:, None] == ref_labels
    positives, negatives = pair & same, pair & ~same

    # H+ and H-: both inequalities are inclusive.
    hard = torch.stack([positives & (s <= margin_plus), negatives & (s >= margin_minus)])
    if hardest_negatives is not None:  # of each row so many, those with the largest s; of equal ones the lower column
        order = torch.where(hard[1], s.detach(), -torch.inf).argsort(dim=1, descending=True, stable=True)
        hard[1] &= order.argsort(dim=1) < hardest_negatives
    violation = torch.where(hard, torch.stack([margin_plus - s, s - margin_minus]), 0)
    total = (violation**2 if penalty == "squared" else violation).sum((1, 2))
    n = hard.sum((1, 2))

    # A side without a pair adds 0.
    divisor = n if reduction == "violating" else torch.stack([positives.sum(), negatives.sum()])
    mean_plus, mean_minus = total / divisor.clamp_min(1)
    loss = lambda_plus * mean_plus + lambda_minus * mean_minus

    # Loss and gradient are NaN if an embedding that takes part is not finite; else this adds 0 to both.
    everything = x_hat.sum() + ref_hat.sum()
    non_finite = torch.where(everything.isfinite(), torch.zeros_like(everything), torch.nan)
    return (loss + non_finite * everything).to(s.dtype), total.detach(), n


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
