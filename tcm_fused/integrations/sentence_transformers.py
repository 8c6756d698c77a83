"""sentence-transformers: TCM as one of its losses, `WithTCM`, which adds TCM to any other, and `ThresholdEvaluator`.

Example:
    from tcm_fused.integrations.sentence_transformers import WithTCM

    loss = WithTCM(losses.MultipleNegativesRankingLoss(model))
    trainer = SentenceTransformerTrainer(model=model, train_dataset=train_dataset, loss=loss)

Which pairs are positive depends on the columns of the dataset:

- one column with class labels (`BatchHardTripletLoss` and its like): sentences of one class.
- several columns without labels (`MultipleNegativesRankingLoss`, `TripletLoss` and their like): the first two of a row.
  Anchor and positive of row i are class i; each further column holds negatives, every one a class of its own. All else
  in the batch are negatives then, as for in-batch negatives: use `BatchSamplers.NO_DUPLICATES`.
- two columns with labels 0 and 1 of a `ContrastiveLoss` or `OnlineContrastiveLoss`: the two where it is 1.
- otherwise (scores, classes of pairs, teachers' embeddings) say so with `class_labels`: a function that takes the
  labels of a batch and returns for each column its sentences' classes, [B] integers, negative where one is left out.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tcm_fused.loss import TCMLoss
from tcm_fused.thresholds.calibration import calibrate
from tcm_fused.thresholds.evaluation import evaluate
from tcm_fused.thresholds.frames import csv_text
from tcm_fused.thresholds.outputs import write_whole
from tcm_fused.thresholds.pairing import NothingToMeasure
from tcm_fused.thresholds.targets import one_target
from tcm_fused.thresholds.threshold import Threshold, as_threshold

try:
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.evaluation import BaseEvaluator
except ImportError as error:
    raise ImportError(
        "tcm_fused.integrations.sentence_transformers needs that library, 6.2 or later: "
        "pip install 'sentence-transformers[train]'"
    ) from error

# As they are here and now: others may put something in their places, a class of theirs or a function.
_EVALUATES_AGAIN = losses.MatryoshkaLoss, losses.AdaptiveLayerLoss
_TAKES_SIMILAR_PAIRS = losses.ContrastiveLoss, losses.OnlineContrastiveLoss

ClassLabels = Callable[[Tensor | None], Sequence[Tensor]]
Features = dict[str, Any]  # of one column of a batch, as the encoder takes them


class ThresholdConsistentMarginLoss(nn.Module):
    """The TCM loss (see `tcm_fused.tcm_loss`) for `SentenceTransformerTrainer`.

    Args:
        model: the `SentenceTransformer` that is trained.
        class_labels: which pairs are positive, where the columns do not tell (see the module).
        options: those of `tcm_fused.TCMLoss`, which is the attribute `tcm` and has the `stats` of the last call.
    """

    def __init__(self, model: nn.Module, class_labels: ClassLabels | None = None, **options: Any) -> None:
        super().__init__()
        self.model = model
        self.class_labels = class_labels
        self.tcm = TCMLoss(**options)

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Any:
        """The loss of a batch, given as features of each column, and its labels if the dataset has some."""
        embeddings = [self.model(features)["sentence_embedding"] for features in sentence_features]
        return self.compute_loss_from_embeddings(embeddings, labels)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss of the columns' embeddings, [B, D] each."""
        classes = torch.cat(list(self._classes(embeddings, labels))).to(embeddings[0].device)
        loss: Tensor = self.tcm(torch.cat(embeddings), classes)
        return loss

    def _classes(self, embeddings: list[Tensor], labels: Tensor | None) -> Sequence[Tensor]:
        """For each column its sentences' classes [B]."""
        rows, columns = len(embeddings[0]), len(embeddings)
        if self.class_labels is not None:
            classes = self.class_labels(labels)
            shapes = [list(column.shape) for column in classes]
            if shapes != [[rows]] * columns:
                raise ValueError(f"class_labels must return {columns} tensors of shape [{rows}], got shapes {shapes}")
            return classes
        index = torch.arange(rows, device=embeddings[0].device)
        if (
            columns == 1
            and labels is not None
            and labels.shape in ((rows,), (rows, 1))
            and not labels.is_floating_point()
        ):
            return [labels.flatten()]
        if columns > 1 and labels is None:
            return [index, *(index + k * rows for k in range(columns - 1))]
        if columns == 2 and labels is not None and self._labels_tell_similar_pairs():
            return [index, torch.where(labels.flatten() == 1, index, index + rows)]
        got = "no labels" if labels is None else f"labels of {labels.dtype} and shape {list(labels.shape)}"
        raise ValueError(
            f"a batch of {columns} columns with {got} does not tell which sentences are of one class; TCM takes one "
            "column with integer class labels, or columns (anchor, positive, negatives ...) without labels; for others "
            "give class_labels=, a function from a batch's labels to the class labels of each column"
        )

    def _labels_tell_similar_pairs(self) -> bool:
        return False

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        return self.tcm.options._asdict()

    @property
    def citation(self) -> str:
        """For the model card."""
        return """
@inproceedings{zhang2024threshold,
    title = {Threshold-Consistent Margin Loss for Open-World Deep Metric Learning},
    author = {Qin Zhang and Linghan Xu and Qingming Tang and Jun Fang and Ying Nian Wu and Joe Tighe and Yifan Xing},
    booktitle = {International Conference on Learning Representations},
    year = {2024},
    url = {https://arxiv.org/abs/2307.04047}
}
"""


class WithTCM(ThresholdConsistentMarginLoss):
    """Another loss plus TCM of the same embeddings: the encoder runs as often as it does for the other loss alone.

    The embeddings are taken where the encoder returns them. Cached losses (`CachedMultipleNegativesRankingLoss` and the
    like) run their encoder in mini-batches: there they are taken where the loss gets them all, so that all rows meet.
    `MatryoshkaLoss(model, WithTCM(loss), ...)`, `AdaptiveLayerLoss` and `Matryoshka2dLoss` add TCM at each of their
    dimensions or layers.

    With several processes TCM sees the batch of each alone, also where `gather_across_devices=True` lets the other loss
    compare with the batches of all.

    Args:
        loss: a loss of sentence-transformers, or one like them: with its encoder as attribute `model` (or
            `sentence_embedder`), called once for each column. It may return a tensor or a dict of tensors; TCM is
            added to the one, and joins the other as "tcm".
        class_labels, options: as of `ThresholdConsistentMarginLoss`.

    Raises:
        TypeError: the loss is one whose embeddings cannot be seen, by name: `ContrastiveTensionLoss` (two encoders),
            `DenoisingAutoEncoderLoss` (a decoder), or one of the three above on the outside.
        ValueError: of a batch, if it does not tell the classes.
    """

    def __init__(self, loss: nn.Module, class_labels: ClassLabels | None = None, **options: Any) -> None:
        name, inner = type(loss).__name__, loss
        while isinstance(inner, _EVALUATES_AGAIN):
            inner = inner.loss
        if inner is not loss:
            raise TypeError(
                f"{name} evaluates its inner loss several times on one batch: put WithTCM inside, as in "
                f"{name}(model, WithTCM({type(inner).__name__}(model)), ...)"
            )
        if not isinstance(_encoder(loss), nn.Module):
            raise TypeError(
                f"{name} has no encoder as attribute 'model' or 'sentence_embedder', so WithTCM cannot see its "
                "embeddings; train with ThresholdConsistentMarginLoss on a dataset of its own beside it"
            )
        super().__init__(_encoder(loss), class_labels, **options)
        self.loss: Any = loss
        self._labels: Tensor | None = None  # of the batch that `forward` is at

    @property
    def uses_gradient_cache(self) -> bool:
        """Whether the loss calls its encoder in mini-batches and gets the embeddings in `calculate_loss`."""
        return getattr(self.loss, "uses_gradient_cache", False)

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Any:
        """The loss of the batch with TCM added; in a dict, if the loss gives one, under "tcm"."""
        columns = list(sentence_features)
        if self.uses_gradient_cache:
            self._labels = labels
            self.loss.calculate_loss = self.calculate_loss
            try:
                return self.loss(columns, labels)
            finally:
                del self.loss.calculate_loss
                self._labels = None
        with _seen(_encoder(self.loss)) as calls:
            value = self.loss(columns, labels)
        tcm = self.compute_loss_from_embeddings(self._columns(calls, columns), labels)
        return {**value, "tcm": tcm} if isinstance(value, dict) else value + tcm

    def calculate_loss(self, reps: list[list[Tensor]], *args: Any, with_backward: bool = False) -> Tensor:
        """In the place of the cached loss's own: the loss of mini-batches of embeddings, which get their gradients."""
        value: Tensor = type(self.loss).calculate_loss(self.loss, reps, *args, with_backward=with_backward)
        tcm = self.compute_loss_from_embeddings([torch.cat(column) for column in reps], self._labels)
        if with_backward:
            torch.autograd.backward(tcm)
            tcm = tcm.detach()
        return value + tcm

    def _columns(self, calls: list[tuple[Features, Tensor]], columns: list[Features]) -> list[Tensor]:
        """The embeddings of each column. Losses may merge columns into one call, in order, whose features are new."""
        alone = [next((x for features, x in calls if features is column), None) for column in columns]
        merged = [x for features, x in calls if not any(features is column for column in columns)]
        missing = sum(x is None for x in alone)
        rows = next((len(x) for x in alone if x is not None), len(calls[0][1]) // len(columns) if calls else 0)
        if not calls or len(calls) - len(merged) != len(columns) - missing or sum(map(len, merged)) != missing * rows:
            raise ValueError(
                f"{type(self.loss).__name__} was given {len(columns)} columns, but called its encoder "
                f"{len(calls)} times, for {[len(x) for _, x in calls]} rows: WithTCM needs each column embedded once"
            )
        rest = iter(torch.cat(merged).split(rows) if merged else ())
        return [next(rest) if x is None else x for x in alone]

    def _labels_tell_similar_pairs(self) -> bool:
        return isinstance(self.loss, _TAKES_SIMILAR_PAIRS)

    def get_config_dict(self) -> dict[str, Any]:
        """The loss and the options, as the library writes them on a model card."""
        return {"loss": self.loss, **super().get_config_dict()}


def _encoder(loss: nn.Module) -> Any:
    """The module that the loss calls: looked up each time, since trainers replace it by a wrapped one."""
    return getattr(loss, "model", None) or getattr(loss, "sentence_embedder", None)


@contextmanager
def _seen(encoder: nn.Module) -> Iterator[list[tuple[Features, Tensor]]]:
    """The features and the embeddings of each call of `encoder`."""
    calls: list[tuple[Features, Tensor]] = []

    def note(_: nn.Module, inputs: tuple[Features, ...], output: dict[str, Tensor]) -> None:
        calls.append((inputs[0], output["sentence_embedding"]))

    hook = encoder.register_forward_hook(note)
    try:
        yield calls
    finally:
        hook.remove()


class ThresholdEvaluator(BaseEvaluator):
    """The rates of one threshold on sentences of known classes, as an evaluator of the library.

    With `threshold` it is that of `tcm_fused.evaluate`: "far", "frr", "precision", "coverage", "f_beta" (by which the
    best model is chosen) and "recall_at_1". Without, each evaluation finds its own by a target of `tcm_fused.calibrate`
    (`far=1e-3`, say; none: the equal error): "threshold", "far", "frr", "equal_error_rate" and "recall_at_1"; the best
    model has the fewest false rejects at a bound on false accepts, the fewest false accepts at one on false rejects,
    and else the lowest equal error rate. A figure that the sentences do not have, as of a model that has collapsed, is
    NaN.

    Args:
        sentences: texts, or other inputs that the model encodes.
        labels: their classes, integers or text, one each.
        threshold: a `tcm_fused.Threshold`, or a cosine similarity.
        name: put before the names of the figures.
        batch_size: of the encoding.
        write_csv: append the figures to `threshold_evaluation_NAME_results.csv` in the folder that the library names.
        target: of `tcm_fused.calibrate`.
    """

    def __init__(
        self,
        sentences: Sequence[Any],
        labels: Sequence[Any],
        *,
        threshold: Threshold | float | None = None,
        name: str = "",
        batch_size: int = 32,
        write_csv: bool = True,
        **target: Any,
    ) -> None:
        super().__init__()
        if len(sentences) != len(labels):
            raise ValueError(f"labels must be as many as sentences, {len(sentences)}, got {len(labels)}")
        if threshold is not None and target:
            raise ValueError(f"give a threshold or a target to find one by, got both: {', '.join(target)}")
        if threshold is None:
            target = target or {"eer": True}
            known = set(inspect.signature(calibrate).parameters)
            if wrong := set(target) - known:
                raise TypeError(f"{', '.join(sorted(wrong))}: no target of calibrate")
            asked = one_target(**{"far": None, "frr": None} | target).name
            self.primary_metric = {"far": "frr", "frr": "far"}.get(asked, "equal_error_rate")
            self.greater_is_better = False
        else:
            self.primary_metric = "f_beta"
        self.sentences, self.labels, self.name, self.batch_size = sentences, labels, name, batch_size
        self.threshold = None if threshold is None else as_threshold(threshold)
        self.target = target
        self.write_csv = write_csv

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """The figures of a model, by name."""
        embeddings = model.encode(
            list(self.sentences), batch_size=self.batch_size, convert_to_tensor=True, show_progress_bar=False
        )
        figures = self._figures(embeddings)
        if output_path is not None and self.write_csv:
            self._append(Path(output_path), {"epoch": epoch, "steps": steps} | figures)
        metrics: dict[str, float] = self.prefix_name_to_metrics(figures, self.name)
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics

    def _figures(self, embeddings: Tensor) -> dict[str, float]:
        names: tuple[str, ...]
        if self.threshold is not None:
            names = ("far", "frr", "precision", "coverage", "f_beta", "recall_at_1")
            try:
                result = evaluate(embeddings, self.labels, threshold=self.threshold)
            except NothingToMeasure:
                return dict.fromkeys(names, math.nan)
            return {name: getattr(result, name) for name in names}
        names = ("threshold", "far", "frr", "equal_error_rate", "recall_at_1")
        try:
            found = calibrate(embeddings, self.labels, **self.target)
        except NothingToMeasure:
            return dict.fromkeys(names, math.nan)
        at = found.threshold
        values = (at.similarity, at.far, at.frr, found.equal_error_rate, found.recall_at_1)
        return dict(zip(names, values, strict=True))

    def _append(self, folder: Path, row: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"threshold_evaluation_{self.name + '_' if self.name else ''}results.csv"
        text = csv_text({name: [value] for name, value in row.items()})
        if path.exists():
            text = path.read_text(encoding="utf-8") + text.partition("\n")[2]
        write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))

    def get_config_dict(self) -> dict[str, Any]:
        """The threshold or the target, as the library writes them on a model card."""
        return self.target if self.threshold is None else {"threshold": self.threshold.similarity}
