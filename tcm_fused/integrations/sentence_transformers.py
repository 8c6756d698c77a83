"""sentence-transformers: TCM as one of its losses, and `WithTCM`, which adds TCM to any other.

Example:
    from tcm_fused.integrations.sentence_transformers import WithTCM

    loss = WithTCM(losses.MultipleNegativesRankingLoss(model))
    trainer = SentenceTransformerTrainer(model=model, train_dataset=train_dataset, loss=loss)

What is a positive pair depends on the columns of the dataset:

- one column with class labels (`BatchHardTripletLoss` and its like): sentences of one class.
- several columns without labels (`MultipleNegativesRankingLoss`, `TripletLoss` and their like): the first two of a row.
  Anchor and positive of row i are class i; each further column holds negatives, every one a class of its own. All else
  in the batch are negatives then, as for in-batch negatives: use `BatchSamplers.NO_DUPLICATES`.
- two columns with labels 0 and 1 of a `ContrastiveLoss` or `OnlineContrastiveLoss`: the two where it is 1.
- otherwise (scores, classes of pairs, teachers' embeddings) say so with `class_labels`: a function that takes the
  labels of a batch and returns for each column its sentences' classes, [B] integers, negative where one is left out.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tcm_fused.loss import TCMLoss

try:
    from sentence_transformers.sentence_transformer import losses
except ImportError as error:
    raise ImportError(
        "tcm_fused.integrations.sentence_transformers needs that library, 6.2 or later: "
        "pip install 'sentence-transformers[train]'"
    ) from error

# As they are here and now: others may put something in their places, a class of theirs or a function.
_EVALUATES_AGAIN = losses.MatryoshkaLoss, losses.AdaptiveLayerLoss
_TAKES_SIMILAR_PAIRS = losses.ContrastiveLoss, losses.OnlineContrastiveLoss

ClassLabels = Callable[[Tensor | None], Sequence[Tensor]]
Features = dict[str, Any]  # what the encoder takes for a column of a batch


class ThresholdConsistentMarginLoss(nn.Module):
    """The TCM loss (see `tcm_fused.tcm_loss`) for `SentenceTransformerTrainer`.

    Args:
        model: the `SentenceTransformer` that is trained.
        class_labels: what is a positive pair, where the columns do not tell (see the module).
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
        ValueError: of a batch, if it does not tell what the classes are.
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
