"""`OPIS`: the metric as a torchmetrics class."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tcm_fused.arguments import check_choice, check_set, int64_labels
from tcm_fused.backends import choice
from tcm_fused.backends.numerics import wide_dtype
from tcm_fused.thresholds.evaluation import rates_or_nan
from tcm_fused.thresholds.opis import SCORES, OPISResult, check_options, opis, scores_or_nan, warn_of_nan
from tcm_fused.thresholds.retrieval import check_ranks, no_scores, ranks_or_nan
from tcm_fused.thresholds.sets import as_labels
from tcm_fused.thresholds.threshold import Threshold, as_threshold

try:
    from torchmetrics import Metric
    from torchmetrics.utilities import dim_zero_cat
except Exception as error:  # RuntimeError too: it imports torchvision, which may not be that of this torch
    _why_no_torchmetrics = error

    class Metric:  # type: ignore[no-redef]  # the other one is torchmetrics', which is not there
        """In its place, so that `OPIS` can be named, documented and looked for without torchmetrics, but not made."""

        def __new__(cls, *_: Any, **__: Any) -> Any:
            """ImportError, with the remedy."""
            raise ImportError(
                f"OPIS needs torchmetrics ({_why_no_torchmetrics}): pip install torchmetrics"
            ) from _why_no_torchmetrics


_DTYPES = (torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of the states


class OPIS(Metric):
    """`opis` as a torchmetrics metric: embeddings come in batches, the pairs are counted over all of them.

    The state is the embeddings themselves, moved to the CPU or not as `compute_on_cpu` says, since every pair of
    samples counts, across batches and processes: O(N D) memory. Processes gather it before `compute`; some may have
    none.

    Arguments: those of `opis`, those of `torchmetrics.Metric`, and

    details: the form of the scores that `compute` and `forward` return. False: OPIS, a scalar, as torchmetrics'
        wrappers, its plots and Lightning's `self.log` take it. True: a dict of the scalars "opis", "eps_opis" and
        "recall_at_1", with a `threshold` "far" and "frr", and with `recall_at` those of `retrieval`.
    threshold: with `details=True`, a `Threshold` or a cosine similarity that is deployed, whose error rates are told.
    recall_at: with `details=True`, ranks k, one or several, of "recall_at_<k>"; the mean average precisions, the
        R-precision and the mean reciprocal rank of `retrieval` are told beside. They take a second pass over the pairs.

    Scalars are float64, or float32 on a device without that. All else that was found is in `result`, an `OPISResult`,
    after `compute`. A score that the rows do not have (no two classes, no class twice, rows that are not finite,
    similarities that are all the same) is NaN, and `result` None; the first time there is a warning with the reason.

    Example:
        >>> metric = OPIS(thresholds=[0.5, 0.7, 0.9])
        >>> metric.update(torch.tensor([[1.0, 0.0], [0.96, 0.28]]), torch.tensor([0, 0]))
        >>> metric.update(torch.tensor([[0.0, 1.0], [-0.8, 0.6]]), torch.tensor([1, 1]))
        >>> round(metric.compute().item(), 4), metric.result.class_ids.tolist()
        (0.1875, [0, 1])
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0

    embeddings: list[Tensor]
    labels: list[Tensor]

    _OPTIONS = ("far_range", "frr_range", "thresholds", "num_thresholds", "distance", "beta", "epsilon", "backend")

    # Set aside by the base class while it scores a batch.
    _CHANGED_BY_FORWARD = (
        *("result", "compute_on_cpu", "_update_count", "_computed", "_enable_grad"),
        *("_to_sync", "_should_unsync", "_is_synced", "_cache"),
    )

    def __init__(
        self,
        *,
        details: bool = False,
        threshold: Threshold | float | None = None,
        recall_at: int | Sequence[int] = (),
        **options: Any,
    ) -> None:
        own = {name: options.pop(name) for name in self._OPTIONS if name in options}
        super().__init__(**{"dist_sync_fn": gather_rows} | options)
        defaults: dict[str, Any] = opis.__kwdefaults__ or {}
        known = {name: own.get(name, defaults[name]) for name in self._OPTIONS}
        check_choice("backend", known.pop("backend"), ("auto", *choice.BACKENDS))
        check_options(**known)
        if not isinstance(details, bool):
            raise TypeError(f"details must be True or False, got {type(details).__name__}")
        self.details = details
        self.threshold = None if threshold is None else as_threshold(threshold)
        self.recall_at = check_ranks(recall_at, "recall_at")
        for name, given in (("threshold", threshold is not None), ("recall_at", self.recall_at)):
            if given and not details:
                raise ValueError(f"{name} is told beside the score; give details=True, or leave it out")
        self.options = own
        self.result: OPISResult | None = None
        self.warned = False  # of a score that is NaN
        self.add_state("embeddings", default=[], dist_reduce_fx="cat")
        self.add_state("labels", default=[], dist_reduce_fx="cat")

    def update(self, embeddings: Tensor, labels: Any) -> None:
        """Add a copy of embeddings [N, D] and labels [N]; errors as of `opis`. Labels may also be an array or a list of
        integers; text has no numbers that all processes would agree on, so it is refused."""
        labels = self._check_batch(embeddings, labels)
        self.embeddings.append(embeddings.detach().clone())
        self.labels.append(labels.clone())

    def forward(self, embeddings: Tensor, labels: Any) -> Any:
        """Add a batch, and return the score of it alone (NaN if it has none). After an error all that was added before
        remains."""
        labels = self._check_batch(embeddings, labels)  # here too, since the batch is scored on its own
        before = {name: getattr(self, name) for name in self._CHANGED_BY_FORWARD}
        before |= {name: list(getattr(self, name)) for name in self._defaults}
        try:
            return super().forward(embeddings, labels)
        except Exception:  # whatever it was: torchmetrics has emptied the state by then
            for name, value in before.items():
                setattr(self, name, value)
            raise

    def _check_batch(self, embeddings: Tensor, labels: Any) -> Tensor:
        """Labels as int64."""
        y = labels
        if isinstance(embeddings, Tensor) and not isinstance(labels, Tensor):
            y, names = as_labels("labels", labels)
            if names is not None:
                raise TypeError("labels must be integers here, got text: number the classes, alike in all processes")
            y = y.to(embeddings.device)
        check_set("embeddings", embeddings, "labels", y)
        if len(self.embeddings) > 0 and (columns := self.embeddings[0].shape[-1]) != embeddings.shape[1]:
            raise ValueError(f"embeddings must have {columns} columns as before, got {embeddings.shape[1]}")
        return int64_labels(y, "labels")

    def compute(self) -> Any:
        """The score, or a dict of all three, of everything added since the last `reset`."""
        scores: dict[str, float] = dict.fromkeys(SCORES, math.nan)
        found: OPISResult | str = "no embeddings were added"
        if len(self.labels) > 0:  # a list of batches, or after a sync one tensor
            scores, found = scores_or_nan(dim_zero_cat(self.embeddings), dim_zero_cat(self.labels), **self.options)
        if self.threshold is not None and self.details:
            scores |= self._rates(self.threshold)
        if self.recall_at and self.details:
            scores |= self._ranks()
        if isinstance(found, str) and not self.warned and self.update_called:  # else torchmetrics warns
            self.warned = True
            warn_of_nan(found)
        self.result = None if isinstance(found, str) else found
        dtype = wide_dtype(self.device)
        values = {name: torch.tensor(value, dtype=dtype, device=self.device) for name, value in scores.items()}
        return values if self.details else values["opis"]

    def _rates(self, threshold: Threshold) -> dict[str, float]:
        if len(self.labels) == 0:
            return {"far": math.nan, "frr": math.nan}
        rows = dim_zero_cat(self.embeddings), dim_zero_cat(self.labels)
        return rates_or_nan(*rows, threshold, self.options.get("backend", "auto"))

    def _ranks(self) -> dict[str, float]:
        """Of rows that have no such score NaN."""
        if len(self.labels) == 0:
            return no_scores(self.recall_at)
        return ranks_or_nan(dim_zero_cat(self.embeddings), dim_zero_cat(self.labels), self.recall_at)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw the score, or several: of `forward` or `compute`, one or a list; None: of `compute`. Needs matplotlib.

        Returns the figure and the axes, as torchmetrics' metrics do. For the utility over the threshold there is
        `metric.result.plot()`, after `compute`.
        """
        return self._plot(val, ax)

    def set_dtype(self, dst_type: Any) -> "OPIS":
        """Embeddings are kept in another dtype; labels stay as they are."""
        labels = self.labels
        super().set_dtype(dst_type)
        self.labels = labels
        return self

    def reset(self) -> None:
        """Forget everything added."""
        self.embeddings, self.labels = [], []  # not emptied: `Running` of torchmetrics keeps the lists themselves
        super().reset()
        self.result = None


def gather_rows(state: Tensor, group: Any = None) -> list[Tensor]:
    """The rows of all processes, [N_r, D] or [N_r] each, of those that have some.

    torchmetrics' own gathers need as many dimensions and the same dtype everywhere, which a process without rows cannot
    know: it has an empty tensor of one dimension, in float32.

    Raises:
        ValueError: rows differ in their number of columns; in all processes.
    """
    columns = state.shape[1] if state.ndim > 1 else 0
    own = torch.tensor([len(state), columns, _DTYPES.index(state.dtype)], device=state.device)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, own, group)
    about = [tuple(one.tolist()) for one in found]  # rows, columns and dtype of each process
    filled = [one for one in about if one[0] > 0]
    if not filled:
        return [state]
    if len({columns for _, columns, _ in filled}) > 1:
        raise ValueError(f"embeddings must have as many columns in all processes, got {[one[1] for one in filled]}")
    most, columns = max(one[0] for one in filled), filled[0][1]
    dtype = functools.reduce(torch.promote_types, [_DTYPES[code] for _, _, code in filled])
    padded = torch.zeros((most, columns) if columns else (most,), dtype=dtype, device=state.device)
    if len(state) > 0:
        padded[: len(state)] = state
    gathered = [torch.empty_like(padded) for _ in about]
    dist.all_gather(gathered, padded, group)
    return [rows[: one[0]] for rows, one in zip(gathered, about, strict=True) if one[0] > 0]
