"""pytorch-metric-learning: its `ThresholdConsistentMarginLoss`, fused, and a `CrossBatchMemory` that takes it.

Example:
    from tcm_fused.integrations.pytorch_metric_learning import ThresholdConsistentMarginLoss

    loss_func = losses.MultipleLosses([losses.MultiSimilarityLoss(), ThresholdConsistentMarginLoss()])
    loss = loss_func(embeddings, labels)
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tcm_fused.arguments import Options
from tcm_fused.integrations.given_pairs import pair_loss
from tcm_fused.loss import TCMStats, tcm_loss

try:
    from pytorch_metric_learning import losses
    from pytorch_metric_learning.distances import CosineSimilarity

    # By names of their own: people put the classes below in the places of these.
    from pytorch_metric_learning.losses import CrossBatchMemory as LibraryMemory
    from pytorch_metric_learning.losses import ThresholdConsistentMarginLoss as LibraryLoss
    from pytorch_metric_learning.utils import common_functions, loss_and_miner_utils
except ImportError as error:
    raise ImportError(
        "tcm_fused.integrations.pytorch_metric_learning needs that library: pip install pytorch-metric-learning"
    ) from error


class AllPairs(NamedTuple):
    """In the place of an `indices_tuple`: every row with every column, which needs no list of them."""

    own_column: int | None  # row i is column (own_column + i) mod M, and that pair is left out; None: none is


class ThresholdConsistentMarginLoss(losses.BaseMetricLossFunction):
    """The TCM loss (see `tcm_fused.tcm_loss`) as a loss of pytorch-metric-learning.

    Called as its losses are, `loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)`:

    - Without `indices_tuple` all pairs of rows of `embeddings` and of `ref_emb` count, in one fused pass. As in the
      library, a row is not compared with itself where `ref_labels` is `labels`; here also where `ref_emb` is
      `embeddings`. A row with a negative label is left out.
    - With pairs or triplets of a miner, those count, each as often as it is given: hard are the positives up to
      `margin_plus` and the negatives from `margin_minus` on among them. Labels may be None then. Memory is that of a
      few thousand pairs beyond the indices and O(N D), in the backward pass too. Where the pairs are all that there
      are but those of a row with itself, as from `DistributedLossWrapper(efficient=True)`, the pass is the fused one.

    Args:
        lambda_plus, lambda_minus, margin_plus, margin_minus, penalty, reduction, precision, backend: as of
            `tcm_fused.tcm_loss`.
        hardest_negatives: likewise, but not with a miner.
        kwargs: those of the library's losses: `reducer` (there is one value to reduce, so any gives it back),
            `embedding_regularizer`, `embedding_reg_weight`, `collect_stats`. `distance` must be `CosineSimilarity()`.

    Attributes:
        stats: the `TCMStats` of the last call, or None.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which would.
    """

    group_pairs = "within"  # the library's losses know no groups

    def __init__(
        self,
        lambda_plus: float | Tensor = 1.0,
        lambda_minus: float | Tensor = 1.0,
        margin_plus: float | Tensor = 0.9,
        margin_minus: float | Tensor = 0.5,
        *,
        penalty: str = "hinge",
        reduction: str = "violating",
        precision: str = "auto",
        backend: str = "auto",
        hardest_negatives: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        distance = self.distance
        if not isinstance(distance, CosineSimilarity) or (distance.p, distance.power) != (2, 1):
            raise ValueError(
                f"distance must be CosineSimilarity() with p=2 and power=1, got {distance!r}: the margins of TCM are "
                "cosine similarities; leave the argument out"
            )
        self.lambda_plus = lambda_plus
        self.lambda_minus = lambda_minus
        self.margin_plus = margin_plus
        self.margin_minus = margin_minus
        self.penalty = penalty
        self.reduction = reduction
        self.precision = precision
        self.backend = backend
        self.hardest_negatives = hardest_negatives
        self.options.check()
        self.options.warn_of_crossed_margins()
        self.stats: TCMStats | None = None
        self.add_to_recordable_attributes(
            list_of_names=["lambda_plus", "lambda_minus", "margin_plus", "margin_minus"], is_stat=False
        )

    @property
    def options(self) -> Options:
        """Those of `tcm_loss` that the module holds."""
        return Options.of(self)

    def get_default_distance(self) -> CosineSimilarity:
        """Cosine similarity, the only one that TCM has."""
        return CosineSimilarity()

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: AllPairs | tuple[Tensor, ...] | None,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> dict[str, dict[str, Any]]:
        """Called by the library's `forward`, with `ref_emb` the embeddings themselves where none was given."""
        common_functions.labels_or_indices_tuple_required(labels, indices_tuple)
        if indices_tuple is None:
            own = ref_emb is embeddings or ref_labels is labels
            indices_tuple = AllPairs(0 if own else None)
        elif not isinstance(indices_tuple, AllPairs):
            pairs = loss_and_miner_utils.convert_to_pairs(indices_tuple, labels, ref_labels)
            pairs = tuple(index.to(embeddings.device, torch.int64) for index in pairs)
            indices_tuple = recognise_all_pairs(pairs, labels, ref_labels) or pairs
        if not isinstance(indices_tuple, AllPairs):
            loss, self.stats = pair_loss(embeddings, ref_emb, indices_tuple, self.options)
        elif labels is None or ref_labels is None:
            raise ValueError("ref_emb came without ref_labels; give both, or an indices_tuple")
        else:
            columns = _columns(indices_tuple, embeddings, labels, ref_emb, ref_labels)
            loss, self.stats = tcm_loss(embeddings, labels, **columns, **self.options._asdict(), return_stats=True)
        return {"loss": {"losses": loss, "indices": None, "reduction_type": "already_reduced"}}


def _columns(
    pairs: AllPairs, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor
) -> dict[str, Any]:
    """The reference set as `tcm_loss` takes it; columns that go round the end of a memory are turned back."""
    own = pairs.own_column
    if own is None:
        return {"ref_emb": ref_emb, "ref_labels": ref_labels}
    if ref_emb is embeddings and ref_labels is labels and own == 0:
        return {}
    if own + embeddings.shape[0] > ref_emb.shape[0]:
        ref_emb, ref_labels, own = ref_emb.roll(-own, 0), ref_labels.roll(-own), 0
    return {"ref_emb": ref_emb, "ref_labels": ref_labels, "row_offset": own}


def recognise_all_pairs(pairs: tuple[Tensor, ...], labels: Tensor | None, ref_labels: Tensor | None) -> AllPairs | None:
    """`AllPairs` if `pairs` are exactly those, in the order that the library lists them; else None.

    Their number tells almost all others apart. Where it is right every pair is looked at, and a GPU waited for: a few
    passes over the indices, against gathering two embeddings for each.
    """
    if labels is None or ref_labels is None or len(labels) == 0 or len(ref_labels) == 0:
        return None
    if (len(pairs[0]), len(pairs[2])) != (len(pairs[1]), len(pairs[3])):
        return None
    rows, columns = len(labels), len(ref_labels)
    left_out, remainder = divmod(rows * columns - len(pairs[0]) - len(pairs[2]), rows)
    if remainder or left_out not in (0, 1) or (left_out and rows > columns):
        return None
    a, c = torch.cat([pairs[0], pairs[2]]), torch.cat([pairs[1], pairs[3]])
    place = (a * columns + c).split([len(pairs[0]), len(pairs[2])])
    right = [
        *[(part.diff() > 0).all() for part in place],  # no pair is there twice
        ((a >= 0) & (a < rows) & (c >= 0) & (c < columns)).all(),
        (labels >= 0).all() & (ref_labels >= 0).all(),  # of others the fused pass makes no pair
    ]
    if not torch.stack(right).all():
        return None
    same = labels[a] == ref_labels[c]
    given = torch.zeros(rows, dtype=torch.int64, device=a.device).index_add_(0, a, torch.ones_like(a))
    # Each column of a row but one: their sum tells which one.
    missing = columns * (columns - 1) // 2 - torch.zeros_like(given).index_add_(0, a, c)
    own = (missing - left_out * torch.arange(rows, device=a.device)) % columns
    right = [
        same[: len(pairs[0])].all(),
        ~same[len(pairs[0]) :].any(),
        (given == columns - left_out).all(),
        (own == own[0]).all(),
    ]
    if not torch.stack(right).all():
        return None
    return AllPairs(int(own[0]) if left_out else None)


class CrossBatchMemory(LibraryMemory):
    """The library's `CrossBatchMemory`, for `ThresholdConsistentMarginLoss` too, which its own refuses by name.

    Without a miner and an `indices_tuple` the rows are compared with the memory in one fused pass, and no list of all
    pairs is made. Everything else, and every other loss, is as in the library. Note that an `indices_tuple` given to
    the call means columns of the memory, as there.

    Raises:
        TypeError: `loss` is the library's own `ThresholdConsistentMarginLoss`, which compares rows with the wrong ones.
    """

    def __init__(self, loss: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        if type(loss) is LibraryLoss:
            raise TypeError(
                "the ThresholdConsistentMarginLoss of pytorch-metric-learning ignores ref_emb, the memory: use that of "
                "tcm_fused.integrations.pytorch_metric_learning"
            )
        super().__init__(loss, *args, **kwargs)

    @staticmethod
    def supported_losses() -> list[str]:
        """The names of the library's, and that of this module's loss."""
        return [*LibraryMemory.supported_losses(), ThresholdConsistentMarginLoss.__name__]

    def create_indices_tuple(
        self,
        embeddings: Tensor,
        labels: Tensor,
        E_mem: Tensor,
        L_mem: Tensor,
        input_indices_tuple: tuple[Tensor, ...] | None,
        do_remove_self_comparisons: bool,
    ) -> Any:
        """All pairs with the memory for this module's loss, unless pairs are given; else as the library."""
        if self.miner or input_indices_tuple is not None or not isinstance(self.loss, ThresholdConsistentMarginLoss):
            return super().create_indices_tuple(
                embeddings, labels, E_mem, L_mem, input_indices_tuple, do_remove_self_comparisons
            )
        # The batch is the last that was put into the memory, whose next place is `queue_idx`.
        first = (self.queue_idx - len(embeddings)) % self.memory_size
        return AllPairs(first if do_remove_self_comparisons else None)
