"""`OPIS`: the metric as a torchmetrics class."""

from typing import Any

import torch
from torch import Tensor

from tcm_fused.arguments import check_choice, check_set, int64_labels
from tcm_fused.backends import choice
from tcm_fused.backends.numerics import wide_dtype
from tcm_fused.thresholds.opis import OPISResult, check_options, opis

try:
    from torchmetrics import Metric
    from torchmetrics.utilities import dim_zero_cat
except Exception as error:  # RuntimeError too: it imports torchvision, which may not be that of this torch
    _why_no_torchmetrics = error

    class Metric:  # type: ignore[no-redef]
        """In its place, so that `OPIS` can be named, documented and looked for without torchmetrics, but not made."""

        def __new__(cls, *_: Any, **__: Any) -> Any:
            raise ImportError(
                f"OPIS needs torchmetrics ({_why_no_torchmetrics}): pip install torchmetrics"
            ) from _why_no_torchmetrics


class OPIS(Metric):
    """`opis` as a torchmetrics metric: embeddings come in batches, the pairs are counted over all of them.

    The state is the embeddings themselves, moved to the CPU or not as `compute_on_cpu` says, since every pair of
    samples counts, across batches and processes: O(N D) memory. Processes gather it before `compute`.

    Arguments: those of `opis`, and those of `torchmetrics.Metric`.

    `compute` returns a dict of float64 scalars (float32 on a device that has no float64), "opis", "eps_opis" and
    "recall_at_1"; all else that was found is in `result`, an `OPISResult`.

    Example:
        >>> metric = OPIS(thresholds=[0.5, 0.7, 0.9])
        >>> metric.update(torch.tensor([[1.0, 0.0], [0.96, 0.28]]), torch.tensor([0, 0]))
        >>> metric.update(torch.tensor([[0.0, 1.0], [-0.8, 0.6]]), torch.tensor([1, 1]))
        >>> round(metric.compute()["opis"].item(), 4), metric.result.class_ids.tolist()
        (0.1875, [0, 1])
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    embeddings: list[Tensor]
    labels: list[Tensor]

    _OPTIONS = ("far_range", "frr_range", "thresholds", "num_thresholds", "distance", "beta", "epsilon", "backend")

    # What the base class sets aside while it scores a batch.
    _CHANGED_BY_FORWARD = (
        *("result", "compute_on_cpu", "_update_count", "_computed", "_enable_grad"),
        *("_to_sync", "_should_unsync", "_is_synced", "_cache"),
    )

    def __init__(self, **options: Any) -> None:
        own = {name: options.pop(name) for name in self._OPTIONS if name in options}
        super().__init__(**options)
        defaults: dict[str, Any] = opis.__kwdefaults__ or {}
        known = {name: own.get(name, defaults[name]) for name in self._OPTIONS}
        check_choice("backend", known.pop("backend"), ("auto", *choice.BACKENDS))
        check_options(**known)
        self.options = own
        self.result: OPISResult | None = None
        self.add_state("embeddings", default=[], dist_reduce_fx="cat")
        self.add_state("labels", default=[], dist_reduce_fx="cat")

    def update(self, embeddings: Tensor, labels: Tensor) -> None:
        """Add a copy of embeddings [N, D] and labels [N]; errors as of `opis`."""
        self._check_batch(embeddings, labels)
        self.embeddings.append(embeddings.detach().clone())
        self.labels.append(labels.clone())

    def forward(self, embeddings: Tensor, labels: Tensor) -> Any:
        """Add a batch, and return the scores of it alone; a batch that has none (no positive pair) is an error, and
        all that was added before remains."""
        self._check_batch(embeddings, labels)  # here too, since the batch is scored on its own
        before = {name: getattr(self, name) for name in self._CHANGED_BY_FORWARD}
        before |= {name: list(getattr(self, name)) for name in self._defaults}
        try:
            return super().forward(embeddings, labels)
        except Exception:  # whatever it was: torchmetrics has emptied the state by then
            for name, value in before.items():
                setattr(self, name, value)
            raise

    def _check_batch(self, embeddings: Tensor, labels: Tensor) -> None:
        check_set("embeddings", embeddings, "labels", labels)
        int64_labels(labels, "labels")
        if len(self.embeddings) > 0 and (columns := self.embeddings[0].shape[-1]) != embeddings.shape[1]:
            raise ValueError(f"embeddings must have {columns} columns as before, got {embeddings.shape[1]}")

    def compute(self) -> dict[str, Tensor]:
        """The scores of everything added since the last `reset`."""
        if len(self.labels) == 0:  # a list of batches, or after a sync one tensor
            raise ValueError("OPIS has no embeddings yet: call update(embeddings, labels) before compute()")
        self.result = opis(dim_zero_cat(self.embeddings), dim_zero_cat(self.labels), **self.options)
        scores = {name: getattr(self.result, name) for name in ("opis", "eps_opis", "recall_at_1")}
        dtype = wide_dtype(self.device)
        return {name: torch.tensor(value, dtype=dtype, device=self.device) for name, value in scores.items()}

    def reset(self) -> None:
        """Forget everything added."""
        super().reset()
        self.result = None
