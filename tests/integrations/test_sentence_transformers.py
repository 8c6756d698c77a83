"""The adapter for sentence-transformers: its losses with TCM added, and its trainer as its documentation has it."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.losses.merged_forward import merge_feature_batches
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.sentence_transformer import losses
from support import tiny_bert
from torch import Tensor, nn

from tcm_fused import TCMLoss
from tcm_fused.integrations import sentence_transformers as adapter
from tcm_fused.integrations.sentence_transformers import ThresholdConsistentMarginLoss, WithTCM

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = 12
MARGINS: dict[str, Any] = {
    "margin_plus": 0.97,
    "margin_minus": 0.8,
}  # an untrained encoder puts all sentences close together


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_bert.encoder(tmp_path_factory.mktemp("model"), torch.float64)


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_bert.encoder(tmp_path_factory.mktemp("guide"), torch.float64)


def columns(model: Any, count: int) -> list[dict[str, Any]]:
    """Features of `count` sentences of unequal length a row, of one class each but for those after the second."""
    generator = torch.Generator().manual_seed(count)
    found = []
    for k in range(count):
        texts, _ = tiny_bert.sentences(ROWS + k, generator)
        longer = [text + " " + text if i % 3 == k else text for i, text in enumerate(texts)]
        found.append(model.preprocess(longer[k if k > 1 else 0 :][:ROWS]))
    return found


INDEX = torch.arange(ROWS)
PAIRS = [INDEX, INDEX]
CLASSES = torch.arange(ROWS) % 3
SIMILAR = torch.arange(ROWS) % 2
PARTLY = [INDEX, torch.where(SIMILAR == 1, INDEX, INDEX + ROWS)]
SCORES = torch.linspace(0, 1, ROWS, dtype=torch.float64)

# Name of the loss, its arguments, number of columns, labels of the batch, and the classes that are expected.
Case = tuple[str, dict[str, Any], int, Tensor | None, list[Tensor]]
TOLD: list[Case] = [  # by the columns and the labels
    ("MultipleNegativesRankingLoss", {}, 2, None, PAIRS),
    ("MultipleNegativesRankingLoss", {}, 4, None, [INDEX, INDEX, INDEX + ROWS, INDEX + 2 * ROWS]),
    ("MultipleNegativesSymmetricRankingLoss", {}, 2, None, PAIRS),
    ("TripletLoss", {}, 3, None, [INDEX, INDEX, INDEX + ROWS]),
    ("MegaBatchMarginLoss", {"use_mini_batched_version": False}, 2, None, PAIRS),
    ("MegaBatchMarginLoss", {"mini_batch_size": 5}, 2, None, PAIRS),
    ("CachedMultipleNegativesRankingLoss", {"mini_batch_size": 5}, 3, None, [INDEX, INDEX, INDEX + ROWS]),
    ("GISTEmbedLoss", {"guide": None}, 3, None, [INDEX, INDEX, INDEX + ROWS]),
    ("CachedGISTEmbedLoss", {"guide": None, "mini_batch_size": 5}, 2, None, PAIRS),
    ("GlobalOrthogonalRegularizationLoss", {}, 2, None, PAIRS),
    ("BatchHardTripletLoss", {}, 1, CLASSES, [CLASSES]),
    ("BatchAllTripletLoss", {}, 1, CLASSES[:, None], [CLASSES]),
    ("BatchSemiHardTripletLoss", {}, 1, CLASSES, [CLASSES]),
    ("BatchHardSoftMarginTripletLoss", {}, 1, CLASSES, [CLASSES]),
    ("ContrastiveLoss", {}, 2, SIMILAR, PARTLY),
    ("OnlineContrastiveLoss", {}, 2, SIMILAR, PARTLY),
]
ASKED: list[Case] = [  # by `class_labels` alone
    ("CoSENTLoss", {}, 2, SCORES, PAIRS),
    ("AnglELoss", {}, 2, SCORES, PAIRS),
    ("CosineSimilarityLoss", {}, 2, SCORES, PARTLY),
    ("MarginMSELoss", {}, 3, SCORES, [INDEX, INDEX, INDEX * 0 - 1]),
    ("MSELoss", {}, 1, torch.zeros(ROWS, 16, dtype=torch.float64), [CLASSES]),
    ("SoftmaxLoss", {"embedding_dimension": 16, "num_labels": 3}, 2, CLASSES, PAIRS),
]


def total(value: Any) -> Tensor:
    """As the trainer does with a dict of losses."""
    summed: Tensor = torch.stack(list(value.values())).sum() if isinstance(value, dict) else value
    return summed


def gradients(model: nn.Module, value: Any) -> tuple[Tensor, list[Tensor]]:
    """The loss, and of each parameter of the encoder its gradient: cached losses make it in a hook."""
    model.zero_grad(set_to_none=False)
    torch.autograd.backward(total(value))
    return total(value).detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def calls_of(module: nn.Module, action: Callable[[], Any]) -> tuple[int, Any]:
    """How often the encoder runs, and the loss that comes of it."""
    calls: list[None] = []
    with module.register_forward_pre_hook(lambda *_: calls.append(None)):
        value = action()
    return len(calls), value


def make(name: str, options: dict[str, Any], model: Any, guide: Any) -> Any:
    options = {key: guide if key == "guide" else value for key, value in options.items()}
    return getattr(losses, name)(model, **options)


@pytest.mark.parametrize(
    ("case", "asked"),
    [(case, case in ASKED) for case in TOLD + ASKED],
    ids=[f"{case[0]}-{case[2]}" for case in TOLD + ASKED],
)
def test_any_loss_with_tcm(model: Any, guide: Any, case: Case, asked: bool) -> None:
    """The sum of both, and its gradient, from no more runs of the encoder than the loss makes alone."""
    name, options, count, labels, classes = case
    base = make(name, options, model, guide)
    tcm = TCMLoss(**MARGINS)
    embeddings = [model(features)["sentence_embedding"] for features in columns(model, count)]
    value = tcm(torch.cat(embeddings), torch.cat(classes))
    loss, tcm_gradient = gradients(model, value)
    runs, alone = calls_of(model, lambda: base(columns(model, count), labels))
    base_loss, base_gradient = gradients(model, alone)

    both = WithTCM(base, (lambda given: classes if given is labels else []) if asked else None, **MARGINS)
    assert both.model is model
    runs_with_tcm, value = calls_of(model, lambda: both(iter(columns(model, count)), labels))
    found, gradient = gradients(model, value)
    assert runs_with_tcm == runs
    torch.testing.assert_close(found, loss + base_loss, rtol=1e-12, atol=0)
    assert isinstance(value, dict) == isinstance(alone, dict)
    for given, *parts in zip(gradient, tcm_gradient, base_gradient, strict=True):
        torch.testing.assert_close(given, sum(parts), rtol=1e-9, atol=1e-13)
    assert both.tcm.stats is not None
    assert tcm.stats is not None
    assert both.tcm.stats.count_minus.item() == tcm.stats.count_minus.item() > 0

    with torch.no_grad():
        torch.testing.assert_close(total(both(columns(model, count), labels)), found, rtol=1e-12, atol=0)
    if both.uses_gradient_cache and "GIST" not in name:
        reps = [[torch.randn(ROWS, 16, dtype=torch.float64, requires_grad=True)] for _ in range(count)]
        assert not both.calculate_loss(reps, labels, with_backward=True).requires_grad  # no graph outlives it
    assert "calculate_loss" not in vars(base)  # nothing of ours stays in the other loss
    assert not model._forward_hooks
    if asked:
        with pytest.raises(ValueError, match=r"does not tell which sentences are of one class.*class_labels="):
            WithTCM(base)(columns(model, count), labels)


def test_columns_were_merged(model: Any) -> None:
    """The library embeds like columns in one call; the test above would not see if it never did."""
    features = columns(model, 4)
    assert merge_feature_batches(features[1:]) is not None
    runs, _ = calls_of(model, lambda: losses.MultipleNegativesRankingLoss(model)(features, None))
    assert runs == 2


@pytest.mark.parametrize("cached", [False, True])
def test_inside_of_matryoshka(model: Any, cached: bool) -> None:
    """TCM at each dimension, weighted as the loss is, with the encoder run as often as without."""
    name = "CachedMultipleNegativesRankingLoss" if cached else "MultipleNegativesRankingLoss"
    options = {"mini_batch_size": 5} if cached else {}

    def matryoshka(wrap: Callable[[Any], Any]) -> Any:
        return losses.MatryoshkaLoss(model, wrap(make(name, options, model, None)), [16, 8], [1.0, 0.25])

    runs, alone = calls_of(model, lambda: matryoshka(lambda loss: loss)(columns(model, 2), None))
    base_loss, base_gradient = gradients(model, alone)
    runs_with_tcm, both = calls_of(
        model, lambda: matryoshka(lambda loss: WithTCM(loss, **MARGINS))(columns(model, 2), None)
    )
    found, gradient = gradients(model, both)
    assert runs_with_tcm == runs
    embeddings = torch.cat([model(features)["sentence_embedding"] for features in columns(model, 2)])
    tcm = TCMLoss(**MARGINS)
    loss, tcm_gradient = gradients(
        model, sum(w * tcm(embeddings[:, :d], torch.cat(PAIRS)) for d, w in ((16, 1), (8, 0.25)))
    )
    torch.testing.assert_close(found, base_loss + loss, rtol=1e-12, atol=0)
    for given, *parts in zip(gradient, tcm_gradient, base_gradient, strict=True):
        torch.testing.assert_close(given, sum(parts), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", ["AdaptiveLayerLoss", "Matryoshka2dLoss"])
def test_inside_of_adaptive_layers(model: Any, name: str) -> None:
    options: dict[str, Any] = {"matryoshka_dims": [16]} if name == "Matryoshka2dLoss" else {}
    runs = []
    for inner in (losses.TripletLoss(model), WithTCM(losses.TripletLoss(model), **MARGINS)):
        outer = getattr(losses, name)(model, inner, **options)
        count, value = calls_of(model, partial(outer, columns(model, 3), None))
        runs.append((count, value.item()))
    assert runs[0][0] == runs[1][0]
    assert runs[0][1] < runs[1][1]


def test_losses_that_hide_their_embeddings_are_refused(model: Any) -> None:
    for name in ("ContrastiveTensionLoss", "ContrastiveTensionLossInBatchNegatives"):
        with pytest.raises(TypeError, match=f"{name} has no encoder as attribute"):
            WithTCM(getattr(losses, name)(model))
    for name in ("MatryoshkaLoss", "Matryoshka2dLoss"):
        with pytest.raises(
            TypeError, match=rf"put WithTCM inside, as in {name}\(model, WithTCM\(TripletLoss\(model\)\)"
        ):
            WithTCM(getattr(losses, name)(model, losses.TripletLoss(model), matryoshka_dims=[16]))

    class FirstColumn(nn.Module):
        def __init__(self, runs: int) -> None:
            super().__init__()
            self.model, self.runs = model, runs

        def forward(self, features: list[Any], labels: Any) -> Tensor:
            embeddings = [self.model(features[0])["sentence_embedding"] for _ in range(self.runs)]
            return torch.stack(embeddings).sum() if embeddings else torch.zeros(())

    for runs in (0, 1, 2):
        with pytest.raises(ValueError, match=f"given 2 columns, but called its encoder {runs} times"):
            WithTCM(FirstColumn(runs))(columns(model, 2), None)
    with pytest.raises(ValueError, match=r"class_labels must return 2 tensors of shape \[12\], got shapes \[\[12\]\]"):
        WithTCM(losses.MultipleNegativesRankingLoss(model), lambda _: [INDEX])(columns(model, 2), None)
    for labels in (None, SCORES, CLASSES[:5]):
        with pytest.raises(ValueError, match=r"1 columns with .* does not tell"):
            ThresholdConsistentMarginLoss(model)(columns(model, 1), labels)


def test_config_and_citation(model: Any) -> None:
    plain = ThresholdConsistentMarginLoss(model, margin_plus=0.8)
    assert plain.get_config_dict()["margin_plus"] == 0.8
    json.dumps(plain.get_config_dict())
    both = WithTCM(losses.TripletLoss(model), margin_plus=0.8)
    assert both.get_config_dict() == {"loss": both.loss, **plain.get_config_dict()}
    assert "2307.04047" in both.citation
    with pytest.raises(TypeError, match="margin_pluss"):
        WithTCM(losses.TripletLoss(model), margin_pluss=0.8)


def train(folder: Path, model: Any, loss: Any, dataset: Dataset, **options: Any) -> SentenceTransformerTrainer:
    """A few steps of the library's trainer."""
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder / "run"),
        num_train_epochs=6,
        per_device_train_batch_size=12,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=dataset, loss=loss)
    trainer.train()
    return trainer


def logged(trainer: SentenceTransformerTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_with_class_labels(tmp_path: Path) -> None:
    """Three lines more than without: the import, the loss, and a sampler that puts classes together."""
    model = tiny_bert.encoder(tmp_path / "model")
    texts, classes = tiny_bert.sentences(36, torch.Generator().manual_seed(1))
    dataset = Dataset.from_dict({"sentence": texts, "label": classes})
    loss = ThresholdConsistentMarginLoss(model)
    trainer = train(tmp_path, model, loss, dataset, batch_sampler=BatchSamplers.GROUP_BY_LABEL)
    found = logged(trainer)
    assert found[-1] < 0.8 * found[0]
    model.save_pretrained(str(tmp_path / "saved"))
    card = (tmp_path / "saved/README.md").read_text()
    assert "2307.04047" in card
    assert "margin_plus" in card


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_trainer_with_tcm_beside_a_loss_for_pairs(tmp_path: Path, cached: bool, bf16: bool) -> None:
    model = tiny_bert.encoder(tmp_path / "model")
    generator = torch.Generator().manual_seed(2)
    anchors, positives = (tiny_bert.sentences(24, generator)[0] for _ in range(2))
    dataset = Dataset.from_dict({"anchor": anchors, "positive": positives})
    name = "CachedMultipleNegativesRankingLoss" if cached else "MultipleNegativesRankingLoss"
    loss = WithTCM(make(name, {"mini_batch_size": 6} if cached else {}, model, None))
    wrapped = Wrapped(model)
    trainer = train(tmp_path, model, loss, dataset, bf16=bf16)
    found = logged(trainer)
    assert found[-1] < found[0]
    assert loss.tcm.stats is not None
    # As the trainer does in both losses where the model is wrapped for several processes.
    trainer.override_model_in_loss(loss, wrapped)
    assert loss.model is loss.loss.model is wrapped
    features = [model.preprocess(texts) for texts in (anchors, positives)]
    loss(features, None)
    assert wrapped.calls > 0
    card = model._model_card_text or model.model_card_data.to_dict()
    assert "WithTCM" in str(card)
    assert name in str(card)


class Wrapped(nn.Module):
    """A module around the encoder, as DistributedDataParallel is one."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, features: Any) -> Any:
        self.calls += 1
        return self.module(features)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "sentence_transformers"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, adapter.__name__)
    with pytest.raises(ImportError, match=r"pip install 'sentence-transformers\[train\]'"):
        __import__(adapter.__name__)


def test_classes_of_the_library_that_were_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function or another class in the place of a loss changes nothing about those that were made before."""
    model = tiny_bert.encoder(tmp_path)
    matryoshka = losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), matryoshka_dims=[4])
    similar = losses.ContrastiveLoss(model)
    for name in ("MatryoshkaLoss", "AdaptiveLayerLoss", "ContrastiveLoss", "OnlineContrastiveLoss"):
        monkeypatch.setattr(losses, name, lambda *arguments: None)
    with pytest.raises(TypeError, match="put WithTCM inside"):
        WithTCM(matryoshka)
    assert WithTCM(similar)._labels_tell_similar_pairs()
