"""`tcm_loss` and `TCMLoss`, which users call."""

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor, nn

from tcm_fused.arguments import Options, Rows, check_bank, check_sets, joined
from tcm_fused.backends.numerics import loss_dtype
from tcm_fused.pair_sums import add, loss_and_sums, pair_sums

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from Python 3.11 on


class TCMStats(NamedTuple):
    """Hard pairs of a call, as 0-d tensors on its device: making them does not wait for the device, reading one does.

    Pairs are ordered: (i, j) and (j, i) count as two.
    """

    count_plus: Tensor  # int64, hard positive pairs n+; of no meaning where an embedding is not finite
    count_minus: Tensor  # int64, hard negative pairs n-; likewise
    violation_plus: Tensor  # mean penalty of them, m+ - s or its square; 0 if there are none, NaN as the loss
    violation_minus: Tensor  # mean penalty of them, s - m- or its square; likewise


class _Keywords(TypedDict, total=False):
    """The keywords of `tcm_loss` that make no difference to the type of its result."""

    margin_plus: float | Tensor
    margin_minus: float | Tensor
    lambda_plus: float | Tensor
    lambda_minus: float | Tensor
    row_offset: int | None
    penalty: str
    reduction: str
    groups: Tensor | None
    ref_groups: Tensor | None
    group_pairs: str
    precision: str
    backend: str
    hardest_negatives: int | None


@overload
def tcm_loss(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    return_stats: Literal[False] = ...,
    **keywords: "Unpack[_Keywords]",
) -> Tensor: ...


@overload
def tcm_loss(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    return_stats: Literal[True],
    **keywords: "Unpack[_Keywords]",
) -> tuple[Tensor, TCMStats]: ...


def tcm_loss(
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
    groups: Tensor | None = None,
    ref_groups: Tensor | None = None,
    group_pairs: str = "within",
    precision: str = "auto",
    backend: str = "auto",
    hardest_negatives: int | None = None,
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
        margin_plus: m+, positives up to this similarity are hard. Any finite number, or a 0-d tensor of one, see below.
        margin_minus: m-, negatives from this similarity on are hard; likewise. Where it is above `margin_plus`, a
            warning says so.
        lambda_plus: weight of the positives' term, at least 0, or a 0-d tensor.
        lambda_minus: weight of the negatives' term, likewise.
        row_offset: the column of `ref_emb` that is row 0 itself: pairs (i, row_offset + i) are left out. None:
            no row is among the columns.
        penalty: "hinge", as above, or "squared": each violation in the sums is squared. Its gradient weighs a pair by
            twice the violation, where that of the hinge has an exact 1: the weight is off by up to twice the error of
            the similarity, however small the violation (in float32 at D = 512 that error is at most 3e-7, measured:
            a violation of 1e-5 is right to 3 %, one of 0.1 to 3e-6). Margins beyond 1e18 overflow float32.
        reduction: the sums are divided by: "violating", the hard pairs of the side as above, or "all", all pairs
            of the side, so that a side's share falls with the number of its hard pairs.
        groups: [N], any integer dtype, for example the sensor or the source of each row: only pairs within a group, or
            only those across groups, take part (`group_pairs`). The work is done group by group: that reads the
            groups, so it waits for the device, and is for tens of groups rather than thousands.
        ref_groups: [M], groups of `ref_emb`.
        group_pairs: "within" or "across"; "across" needs `groups`.
        precision: the least precision of the products: "fp32", "fp16", or "auto": "fp16" for 16-bit input, under
            autocast, and where `torch.set_float32_matmul_precision` allows less than the highest; else "fp32".
            On a CPU and with backend="torch" 16-bit input is always worked in float32, and float64 in float64.
        backend: "auto", "cpu", "cuda", "triton" or "torch". One asked for by name runs or raises.
        hardest_negatives: k: of each row only the k hard negatives with the largest similarity count, so that H- has at
            most k N pairs, and n- is their number; of equal similarities the lower column is taken (of two that
            differ by rounding alone, either). It is each row's own choice: without a reference set (i, j) may be among
            the hardest of i and not of j. None: all hard negatives. With backend="torch" only, which "auto" then takes:
            all products twice, O((N + M) D + k) memory.
        return_stats: also return a `TCMStats`.

    Margins and weights that change from call to call may be numbers or tensors. Under torch.compile tensors make one
    graph for all values, numbers two (under mode="reduce-overhead" one for each value). A tensor on a GPU is read there
    by the kernels: nothing waits for it, and a captured CUDA graph follows it. So its value cannot be checked: if it is
    not finite, loss and gradient are NaN. A number, or a tensor on the CPU, is a constant of a captured graph. Margins
    and weights get no gradient; a tensor that requires one is refused.

    Returns:
        The loss, a scalar of float64 for float64 input and float32 otherwise; with `return_stats` the pair
        (loss, stats).

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, devices or values do not fit.
        RuntimeError: the backend asked for is not available; the message says why, and the remedy.

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
        penalty,
        reduction,
        group_pairs,
        precision,
        backend,
        hardest_negatives,
    )
    options.check()
    options.warn_of_crossed_margins()
    rows, columns = check_sets(embeddings, labels, ref_emb, ref_labels, row_offset, groups, ref_groups, group_pairs)
    loss, sums, count = loss_and_sums(rows, columns, row_offset, options)
    return (loss, stats_of(sums, count, loss.dtype)) if return_stats else loss


def stats_of(penalty: Tensor, count: Tensor, dtype: torch.dtype) -> TCMStats:
    """Statistics from the sums [2] of penalties and the counts [2] of hard pairs."""
    violation = (penalty / count.clamp_min(1)).to(dtype)
    return TCMStats(count[0], count[1], violation[0], violation[1])


class TCMLoss(nn.Module):
    """`tcm_loss` as a module, called like pytorch-metric-learning's `ThresholdConsistentMarginLoss`.

    Arguments: those of `tcm_loss`, by keyword. They are attributes, which may be set between calls, as a schedule of
    margins or weights does. `stats` tells of the last call, as a `TCMStats` (None before the first).

    Raises:
        TypeError, ValueError: an argument is not as `tcm_loss` takes it; here, and at a call if it was set later.

    Example:
        >>> criterion = TCMLoss(margin_plus=0.9, margin_minus=0.5)
        >>> embeddings = torch.randn(8, 4, requires_grad=True)
        >>> criterion(embeddings, torch.arange(8) % 2).backward()
    """

    _warned = False  # of crossed margins

    def __init__(
        self,
        *positional: Any,
        margin_plus: float | Tensor = 0.9,
        margin_minus: float | Tensor = 0.5,
        lambda_plus: float | Tensor = 1.0,
        lambda_minus: float | Tensor = 1.0,
        penalty: str = "hinge",
        reduction: str = "violating",
        group_pairs: str = "within",
        precision: str = "auto",
        backend: str = "auto",
        hardest_negatives: int | None = None,
    ) -> None:
        if positional:
            raise TypeError(_by_keyword(type(self).__name__, positional[0]))
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
        self.hardest_negatives = hardest_negatives
        # Penalty sums [2], counts [2] and dtype of the loss; another object after each call.
        self.last_call: tuple[Tensor, Tensor, torch.dtype] | None = None
        self._checked_options()

    @property
    def stats(self) -> TCMStats | None:
        """Of the last call, or None before the first."""
        return None if self.last_call is None else stats_of(*self.last_call)

    @property
    def options(self) -> Options:
        """Those of `tcm_loss` that the module holds."""
        return Options.of(self)

    def _checked_options(self) -> Options:
        options = self.options
        options.check()
        if not self._warned:
            self._warned = options.warn_of_crossed_margins()
        return options

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
        options = self._checked_options()
        rows, columns = check_sets(embeddings, labels, ref_emb, ref_labels, None, groups, ref_groups, self.group_pairs)
        loss, penalty, count = loss_and_sums(rows, columns, None, options)
        self.last_call = penalty, count, loss.dtype
        return loss

    def against_bank(
        self, embeddings: Tensor, labels: Tensor, groups: Tensor | None, bank: Rows | None
    ) -> tuple[Tensor, Rows]:
        """The loss of a batch against itself and a bank of constants (None: no bank); and the batch, checked."""
        options = self._checked_options()
        rows, _ = check_sets(embeddings, labels, None, None, None, groups, None, self.group_pairs)
        bank = check_bank(rows, bank)
        if bank is None:
            return self(embeddings, labels, groups=groups), rows
        if options.hardest_negatives is not None:  # of batch and bank together
            sums = pair_sums(rows, joined(rows, bank), 0, options)
        else:
            # Two sets, since the batch's own pairs need their similarities, and their gradient, once for both orders.
            sums = add([pair_sums(rows, None, None, options), pair_sums(rows, bank, None, options)])
        loss = sums.loss(options.weights(rows.x)).to(loss_dtype(rows.x))
        self.last_call = sums.penalty.detach(), sums.hard, loss.dtype
        return loss, rows

    def extra_repr(self) -> str:
        """The options, as `repr` shows them."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options._asdict().items())


def _by_keyword(name: str, first: Any) -> str:
    """The error of an option by position: how to write it."""
    if hasattr(first, "margin_plus") and hasattr(first, "margin_minus"):  # suggest_margins(...)
        return (
            f"{name} takes its options by keyword: for margins m write "
            f"{name}(margin_plus=m.margin_plus, margin_minus=m.margin_minus)"
        )
    return (
        f"{name} takes its options by keyword, as in {name}(margin_plus=0.9, margin_minus=0.5), got {first!r} by "
        "position; pytorch-metric-learning's ThresholdConsistentMarginLoss has them in another order, weights first"
    )
