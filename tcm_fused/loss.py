"""`tcm_loss` and `TCMLoss`: what users call."""

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from tcm_fused.arguments import Options, Rows, check_bank, check_sets, one_fp16_product
from tcm_fused.backends.choice import choose
from tcm_fused.backends.numerics import loss_dtype
from tcm_fused.backends.operators import OPERATORS
from tcm_fused.pair_sums import PairSums, add, pair_sums, wants_gradient


class TCMStats(NamedTuple):
    """What the loss saw, as 0-d tensors on its device: making them does not wait for the device, reading one does.

    Pairs are ordered: (i, j) and (j, i) count as two.
    """

    count_plus: Tensor  # int64, hard positive pairs n+; of no meaning where an embedding is not finite
    count_minus: Tensor  # int64, hard negative pairs n-; likewise
    violation_plus: Tensor  # mean penalty of them, m+ - s or its square; 0 if there are none, NaN as the loss
    violation_minus: Tensor  # mean penalty of them, s - m- or its square; likewise


@overload
def tcm_loss(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    margin_plus: float = ...,
    margin_minus: float = ...,
    lambda_plus: float = ...,
    lambda_minus: float = ...,
    row_offset: int | None = ...,
    penalty: str = ...,
    reduction: str = ...,
    groups: Tensor | None = ...,
    ref_groups: Tensor | None = ...,
    group_pairs: str = ...,
    precision: str = ...,
    backend: str = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...


@overload
def tcm_loss(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    margin_plus: float = ...,
    margin_minus: float = ...,
    lambda_plus: float = ...,
    lambda_minus: float = ...,
    row_offset: int | None = ...,
    penalty: str = ...,
    reduction: str = ...,
    groups: Tensor | None = ...,
    ref_groups: Tensor | None = ...,
    group_pairs: str = ...,
    precision: str = ...,
    backend: str = ...,
    return_stats: Literal[True],
) -> tuple[Tensor, TCMStats]: ...


def tcm_loss(
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
    groups: Tensor | None = None,
    ref_groups: Tensor | None = None,
    group_pairs: str = "within",
    precision: str = "auto",
    backend: str = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, TCMStats]:
    r"""Threshold-Consistent Margin loss, fused: one pass over the pairs, O(N D) memory, any batch size.

    With cosine similarity s_ij of rows i and columns j,

        L = lambda+ / n+ * sum_{H+} (m+ - s_ij)  +  lambda- / n- * sum_{H-} (s_ij - m-)

        H+ = {(i, j): same label,       s_ij <= m+},  n+ = |H+|
        H- = {(i, j): different labels, s_ij >= m-},  n- = |H-|

    A side without a hard pair adds 0. Without a reference set the columns are the rows and a row is never
    paired with itself. A row with a negative label takes part in no pair and is not looked at (padding, an
    unfilled memory slot). A zero row has similarity 0 to all and gradient 0. If any other embedding is not
    finite, loss and gradient are NaN.

    Args:
        embeddings: [N, D], float16, bfloat16, float32 or float64, of any scale; N may be 0.
        labels: [N], any integer dtype.
        ref_emb: [M, D], the columns, in the dtype of `embeddings` (under autocast any); it gets its gradient
            if it requires one.
        ref_labels: [M], labels of `ref_emb`.
        margin_plus: m+, positives up to this similarity are hard. Any finite number.
        margin_minus: m-, negatives from this similarity on are hard. Any finite number.
        lambda_plus: weight of the positives' term, at least 0.
        lambda_minus: weight of the negatives' term, at least 0.
        row_offset: the column of `ref_emb` that is row 0 itself: pairs (i, row_offset + i) are left out. None:
            no row is among the columns.
        penalty: "hinge", as above, or "squared": each violation in the sums is squared. Its gradient weighs a pair by
            twice the violation, where that of the hinge has an exact 1: the weight is off by up to twice the error of
            the similarity, however small the violation (in float32 at D = 512 that error is at most 3e-7, measured:
            a violation of 1e-5 is right to 3 %, one of 0.1 to 3e-6). Margins beyond 1e18 overflow float32.
        reduction: what the sums are divided by: "violating", the hard pairs of the side as above, or "all", all pairs
            of the side, so that a side's share falls with the number of its hard pairs.
        groups: [N], any integer dtype, for example the sensor or the source of each row: only pairs within a group, or
            only those across groups, take part (`group_pairs`). The work is done group by group: that reads the
            groups, so it waits for the device, and is for tens of groups rather than thousands.
        ref_groups: [M], groups of `ref_emb`.
        group_pairs: "within" or "across".
        precision: the least precision of the products: "fp32", "fp16", or "auto": "fp16" for 16-bit input, under
            autocast, and where `torch.set_float32_matmul_precision` allows less than the highest; else "fp32".
            On a CPU and with backend="torch" 16-bit input is always worked in float32, and float64 in float64.
        backend: "auto", "cpu", "cuda", "triton" or "torch". One asked for by name runs or raises.
        return_stats: also return a `TCMStats`.

    Returns:
        The loss, a scalar of float64 for float64 input and float32 otherwise; with `return_stats` the pair
        (loss, stats).

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, devices or values do not fit.
        RuntimeError: the backend asked for is not available; the message says why and what to do.

    Source: Zhang et al., Threshold-Consistent Margin Loss for Open-World Deep Metric Learning, ICLR 2024,
    section 4 (arXiv 2307.04047).

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]])
        >>> loss, stats = tcm_loss(x, torch.tensor([0, 0, 1]), return_stats=True)
        >>> round(loss.item(), 4), stats.count_plus.item(), stats.count_minus.item()
        (0.68, 2, 4)
    """
    options = Options(
        margin_plus,
        margin_minus,
        lambda_plus,
        lambda_minus,
        penalty=penalty,
        reduction=reduction,
        group_pairs=group_pairs,
        precision=precision,
        backend=backend,
    )
    loss, sums, count = _tcm(embeddings, labels, ref_emb, ref_labels, row_offset, groups, ref_groups, options)
    return (loss, stats_of(sums, count, loss.dtype)) if return_stats else loss


def stats_of(penalty: Tensor, count: Tensor, dtype: torch.dtype) -> TCMStats:
    violation = (penalty / count.clamp_min(1)).to(dtype)
    return TCMStats(count[0], count[1], violation[0], violation[1])


def _tcm(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    row_offset: int | None,
    groups: Tensor | None,
    ref_groups: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [], and without gradient the sums [2] of penalties and counts [2] of hard pairs."""
    options.check()
    rows, columns = check_sets(embeddings, labels, ref_emb, ref_labels, row_offset, groups, ref_groups)
    if groups is None and options.reduction == "violating":
        ref_x, ref_y, _ = columns or (None, None, None)
        fp16 = one_fp16_product(rows.x, options.precision)
        wants = (wants_gradient(rows.x), ref_x is not None and wants_gradient(ref_x))
        loss, _, _, penalty, count = _run(options, rows.x, rows.y, ref_x, ref_y, row_offset, fp16, False, *wants)
        return loss, penalty, count
    sums = sums_of(rows, columns, row_offset, options)
    loss = sums.loss(options.lambda_plus, options.lambda_minus).to(loss_dtype(rows.x))
    return loss, sums.penalty.detach(), sums.hard


def sums_of(rows: Rows, columns: Rows | None, row_offset: int | None, options: Options) -> PairSums:
    """The sums that the loss of `rows` and `columns` is made of; of checked arguments."""
    fp16 = one_fp16_product(rows.x, options.precision)  # not of parts, which may come in another dtype

    def penalties(
        x: Tensor, y: Tensor, ref_x: Tensor | None, ref_y: Tensor | None, row_offset: int | None, *wants: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        _, grad_x, grad_ref, penalty, count = _run(options, x, y, ref_x, ref_y, row_offset, fp16, True, *wants)
        return penalty, count, grad_x, grad_ref

    return pair_sums(penalties, rows, columns, row_offset, options.reduction, options.group_pairs)


def _run(
    options: Options,
    x: Tensor,
    y: Tensor,
    ref_x: Tensor | None,
    ref_y: Tensor | None,
    row_offset: int | None,
    fp16: bool,
    per_side: bool,
    grad_x: bool,
    grad_ref: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the chosen operator returns."""
    squared = options.penalty == "squared"
    operator = OPERATORS[choose(options.backend, x.device.type, x.dtype, squared)]
    results: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = operator(
        x,
        y,
        ref_x,
        ref_y,
        None if row_offset is None else int(row_offset),
        float(options.margin_plus),
        float(options.margin_minus),
        float(options.lambda_plus),
        float(options.lambda_minus),
        squared,
        fp16,
        per_side,
        grad_x,
        grad_ref,
    )
    return results


class TCMLoss(nn.Module):
    """`tcm_loss` as a module, called like pytorch-metric-learning's `ThresholdConsistentMarginLoss`.

    Arguments: those of `tcm_loss`; they are checked at the first call. `stats` tells what the last call saw, as a
    `TCMStats` (None before the first).

    Example:
        >>> criterion = TCMLoss(margin_plus=0.9, margin_minus=0.5)
        >>> embeddings = torch.randn(8, 4, requires_grad=True)
        >>> criterion(embeddings, torch.arange(8) % 2).backward()
    """

    def __init__(
        self,
        margin_plus: float = 0.9,
        margin_minus: float = 0.5,
        lambda_plus: float = 1.0,
        lambda_minus: float = 1.0,
        precision: str = "auto",
        backend: str = "auto",
        *,
        penalty: str = "hinge",
        reduction: str = "violating",
        group_pairs: str = "within",
    ) -> None:
        super().__init__()
        self.margin_plus = margin_plus
        self.margin_minus = margin_minus
        self.lambda_plus = lambda_plus
        self.lambda_minus = lambda_minus
        self.precision = precision
        self.backend = backend
        self.penalty = penalty
        self.reduction = reduction
        self.group_pairs = group_pairs
        # Of the last call: penalty sums [2], counts [2], dtype of the loss.
        self._seen: tuple[Tensor, Tensor, torch.dtype] | None = None

    @property
    def stats(self) -> TCMStats | None:
        """What the last call saw, or None before the first."""
        return None if self._seen is None else stats_of(*self._seen)

    @property
    def options(self) -> Options:
        """Those of `tcm_loss` that the module holds."""
        return Options(**{name: getattr(self, name) for name in Options._fields})

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        groups: Tensor | None = None,
        ref_groups: Tensor | None = None,
    ) -> Tensor:
        """The loss of `embeddings` [N, D] and `labels` [N], against `ref_emb` [M, D] and `ref_labels` [M] if given.

        `indices_tuple` must be None: the loss finds its hard pairs itself.
        """
        if indices_tuple is not None:
            raise ValueError("indices_tuple must be None: TCM finds its hard pairs itself; leave the miner out")
        loss, penalty, count = _tcm(embeddings, labels, ref_emb, ref_labels, None, groups, ref_groups, self.options)
        self._seen = penalty, count, loss.dtype
        return loss

    def against_bank(
        self, embeddings: Tensor, labels: Tensor, groups: Tensor | None, bank: Rows | None
    ) -> tuple[Tensor, Rows]:
        """The loss of a batch against itself and a bank of constants (None: no bank); and the batch, checked."""
        options = self.options
        options.check()
        rows, _ = check_sets(embeddings, labels, None, None, None, groups, None)
        bank = check_bank(rows, bank)
        if bank is None:
            return self(embeddings, labels, groups=groups), rows
        # Two sets of pairs, since the batch's own need their similarities, and their gradient, once for both orders.
        sums = add([sums_of(rows, None, None, options), sums_of(rows, bank, None, options)])
        loss = sums.loss(options.lambda_plus, options.lambda_minus).to(loss_dtype(rows.x))
        self._seen = sums.penalty.detach(), sums.hard, loss.dtype
        return loss, rows

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options._asdict().items())
