"""Transformers: a callback that logs hard pairs while training, and OPIS at evaluation. `SentenceTransformerTrainer` is
a Transformers trainer too.

Example:
    from tcm_fused.integrations.transformers import TCMCallback

    trainer.add_callback(TCMCallback(trainer, lambda model, batch: (model(**batch)["embeddings"], batch["labels"])))
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tcm_fused.arguments import check_set
from tcm_fused.integrations.logging import HardPairs
from tcm_fused.thresholds.evaluation import rates_or_nan
from tcm_fused.thresholds.opis import check_options, opis, scores_or_nan, warn_of_nan
from tcm_fused.thresholds.threshold import Threshold, as_threshold

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise ImportError(
        "tcm_fused.integrations.transformers needs that library: pip install 'transformers[torch]'"
    ) from error


class TCMCallback(TrainerCallback):
    """Logs the hard pairs of the TCM losses of a `Trainer`, and the OPIS of its evaluation embeddings.

    Whenever the trainer logs its loss, as means over the batches of all processes since the last time:
    "tcm/hard_positives", "tcm/hard_negatives", "tcm/violation_positives" and "tcm/violation_negatives" (mean
    violations). Until then they stay on the device. Of several losses "tcm/NAME/hard_positives" and so on, with their
    places in the trainer ("loss.DATASET.tcm"), each over the batches that called it.

    After each evaluation, of all its embeddings together and from all processes: "eval_opis", "eval_eps_opis" and
    "eval_recall_at_1", logged and added to the metrics, so that `metric_for_best_model="eval_opis"` with
    `greater_is_better=False` works. The evaluation set is embedded once more for it. A score that the embeddings do not
    have (no class twice, or embeddings that have collapsed) is NaN, which is never the best; the first time there is a
    warning with the reason.

    Args:
        trainer: the trainer, whose `log` is called; the TCM losses are those in the modules that are its attributes, or
            in dicts of its: its model, its `loss` (sentence-transformers), its `compute_loss_func`, or your own.
        embed: takes the model and an evaluation batch, and returns embeddings [N, D] and labels [N]; it is called
            without gradients, with the model in evaluation mode. None: no OPIS. For `SentenceTransformerTrainer`:
            `lambda model, batch: (model(trainer.collect_features(batch)[0][0])["sentence_embedding"], batch["label"])`.
        criterion: a module that has the TCM losses in it, if the trainer has none: where a function calls them.
        threshold: a `tcm_fused.Threshold` or a cosine similarity that is deployed: its rates are "eval_far" and
            "eval_frr".
        options: those of `tcm_fused.opis`.
    """

    def __init__(
        self,
        trainer: Trainer,
        embed: Callable[[nn.Module, Any], tuple[Tensor, Tensor]] | None = None,
        criterion: nn.Module | None = None,
        threshold: Threshold | float | None = None,
        **options: Any,
    ) -> None:
        if (options or threshold is not None) and embed is None:
            given = ", ".join([*options, *(["threshold"] if threshold is not None else [])])
            raise TypeError(f"{given}: options of OPIS, which needs embed=")
        known = inspect.signature(opis).bind(None, None, **options)  # so that a wrong option is an error here
        known.apply_defaults()
        check_options(*(known.arguments[name] for name in inspect.signature(check_options).parameters))
        self.trainer = trainer
        self.embed = embed
        self.options = options
        self.threshold = None if threshold is None else as_threshold(threshold)
        self._pairs = HardPairs({})  # of the training that is under way
        self.criterion = criterion
        self._warned = False  # of a score that is NaN

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look for the TCM losses."""
        roots: dict[str, object] = {}
        for name, value in vars(self.trainer).items():
            roots |= (
                {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
            )
        self._pairs = HardPairs({"": self.criterion} | roots)
        self._pairs.warn_if_none("give the module that has it in it as criterion=, if a function calls it")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set aside the calls before the step."""
        self._pairs.start_batch()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After each batch but the last of an optimizer step, where gradients are accumulated."""
        self._pairs.end_batch()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the last batch of a step."""
        self._pairs.end_batch()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        """Log the hard pairs beside the trainer's loss."""
        if "loss" not in logs or not self._pairs.losses:
            return
        # By every process at every such log, and of all losses: some may be called by some processes only.
        accelerator = self.trainer.accelerator
        means = self._pairs.means(accelerator.reduce(self._pairs.take_sums(accelerator.device), reduction="sum"))
        if means:
            self.trainer.log(means)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, Any], **kwargs: Any) -> None:
        """Score the evaluation set, and log it."""
        if self.embed is None:
            return
        embeddings, labels = self._embed(self.embed, kwargs["eval_dataloader"])
        found, result = scores_or_nan(embeddings, labels, **self.options)
        if isinstance(result, str) and not self._warned:
            self._warned = True
            warn_of_nan(result)
        if self.threshold is not None:
            found |= rates_or_nan(embeddings, labels, self.threshold, self.options.get("backend", "auto"))
        # Each evaluation has its own prefix, "eval", or "eval_NAME" of several sets, which callbacks are not told.
        prefix = next((key.removesuffix("_runtime") for key in metrics if key.endswith("_runtime")), "eval")
        scores = {f"{prefix}_{name}": value for name, value in found.items()}
        metrics.update(scores)
        self.trainer.log(dict(scores))

    @torch.no_grad()
    def _embed(self, embed: Callable[[nn.Module, Any], tuple[Tensor, Tensor]], batches: Any) -> tuple[Tensor, Tensor]:
        """Embeddings and labels of all evaluation batches, from all processes."""
        accelerator, model = self.trainer.accelerator, self.trainer.model
        was_training = model.training
        model.eval()
        found = []
        try:
            for batch in batches:
                with accelerator.autocast():
                    x, y = embed(model, batch)
                check_set("embeddings", x, "labels", y)
                found.append(accelerator.gather_for_metrics((x.float().contiguous(), y.contiguous())))
        finally:
            model.train(was_training)
        if not found:  # the set is empty, or, with dataloader_drop_last, smaller than one batch for every process
            return torch.empty(0, 1), torch.empty(0, dtype=torch.int64)
        return torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])
