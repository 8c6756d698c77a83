"""Scores that do not exist are NaN, with one warning, and end no training run, in each library that trains."""

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import transformers
from datasets import Dataset
from lightning.pytorch.callbacks import ModelCheckpoint
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from support import tiny_bert
from support.ranks import Ranks
from support.training import OPIS as OPTIONS
from support.training import SCORES, N, Network, Plain, arguments, data, expected_scores, fit
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import tcm_fused
from tcm_fused.integrations import lightning as for_lightning
from tcm_fused.integrations import transformers as for_transformers
from tcm_fused.integrations.sentence_transformers import ThresholdConsistentMarginLoss

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*logging interval"),
]

SETS: dict[str, tuple[Tensor, Tensor]] = {
    "no class twice": (data(1)[0], torch.arange(N)),
    "one class": (data(1)[0], torch.zeros(N, dtype=torch.int64)),
    "all left out": (data(1)[0], torch.full((N,), -1)),
    "not finite": (data(1)[0] / 0, data(1)[1]),
    "collapsed": (torch.ones_like(data(1)[0]), data(1)[1]),
    "zero": (torch.zeros_like(data(1)[0]), data(1)[1]),
}


@pytest.fixture
def one_warning() -> Iterator[None]:
    """Of scores that are NaN there is exactly one in a run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert sum("OPIS cannot be measured and is NaN" in str(warning.message) for warning in caught) == 1


def callback(**options: Any) -> for_lightning.TCMCallback:
    return for_lightning.TCMCallback(
        embeddings=lambda outputs, batch: (outputs["embeddings"], batch[1]), **OPTIONS | options
    )


@pytest.mark.usefixtures("one_warning")
@pytest.mark.parametrize("kind", SETS)
def test_lightning(tmp_path: Path, kind: str) -> None:
    """Two epochs with two validation loaders each, one of which has its scores; a checkpoint watches the other."""
    best = ModelCheckpoint(tmp_path / "best", monitor="tcm/opis/dataloader_0")
    sets = [SETS[kind], data(2)]
    trainer = fit(tmp_path, Network(), callback(), sets, callbacks=[best], log_every_n_steps=1)
    found = {name: trainer.callback_metrics[f"tcm/{name}/dataloader_0"].item() for name in SCORES}
    assert math.isnan(found["opis"])
    assert math.isnan(found["eps_opis"])
    assert found["recall_at_1"] == 0 if kind in ("collapsed", "zero") else math.isnan(found["recall_at_1"])
    for name, value in expected_scores(*data(2)).items():
        assert trainer.callback_metrics[f"tcm/{name}/dataloader_1"].item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    "options", [{"fast_dev_run": True}, {"limit_val_batches": 1}, {"num_sanity_val_steps": 2, "limit_val_batches": 1}]
)
@pytest.mark.usefixtures("one_warning")
def test_lightning_with_few_batches(tmp_path: Path, options: dict[str, Any]) -> None:
    """20 rows of 24 classes: Lightning's own ways to try a run out."""
    validation = data(1)[0], torch.arange(N) % 24
    trainer = fit(tmp_path, Network(), callback(), [validation], **options)
    assert trainer.callback_metrics["tcm/opis"].isnan()
    trainer.validate(trainer.lightning_module, DataLoader(TensorDataset(*data(1)), batch_size=20), verbose=False)


class Logs(Network):
    """Metrics as Lightning's documentation has them: attributes that are logged."""

    def __init__(self) -> None:
        super().__init__()
        self.metric = tcm_fused.OPIS(**OPTIONS)
        self.on_train = tcm_fused.OPIS(**OPTIONS)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.on_train(self.embed(batch[0]), batch[1])
        self.log("train_opis", self.on_train, on_step=True, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, _: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        found = super().validation_step(batch, _)
        self.metric.update(found["embeddings"], batch[1])
        self.log("val_opis", self.metric)
        return found


def test_lightning_logs_the_metric(tmp_path: Path) -> None:
    """`self.log("val_opis", metric)` is OPIS of all batches, and a checkpoint can watch it."""
    best = ModelCheckpoint(tmp_path / "best", monitor="val_opis")
    trainer = fit(tmp_path, Logs(), best, [data(1)], log_every_n_steps=1)
    assert trainer.callback_metrics["val_opis"].item() == pytest.approx(expected_scores(*data(1))["opis"], rel=1e-6)
    assert trainer.callback_metrics["train_opis_epoch"].item() == pytest.approx(
        expected_scores(*data())["opis"], rel=1e-6
    )
    assert best.best_model_score is not None


@pytest.mark.usefixtures("one_warning")
def test_lightning_logs_nan(tmp_path: Path) -> None:
    class OfValidation(Logs):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return 0 * self.scale

    trainer = fit(tmp_path, OfValidation(), ModelCheckpoint(tmp_path / "best", monitor="val_opis"), [SETS["collapsed"]])
    assert trainer.callback_metrics["val_opis"].isnan()


@pytest.mark.parametrize("bug", [lambda x, y: (x[0], y), lambda x, y: (x, y[:3]), lambda x, y: (x, y.float())])
def test_errors_of_the_user_still_end_the_run(tmp_path: Path, bug: Any) -> None:
    embed = for_lightning.TCMCallback(embeddings=lambda outputs, batch: bug(outputs["embeddings"], batch[1]))
    with pytest.raises((TypeError, ValueError), match=r"embeddings must have shape|labels must have"):
        fit(tmp_path, Network(), embed, [data(1)])
    with pytest.raises((TypeError, ValueError), match=r"embeddings must have shape|labels must have"):
        train(tmp_path, data(1), lambda model, batch: bug(model(batch["x"])["embeddings"], batch["labels"]))


def train(folder: Path, evaluation: tuple[Tensor, Tensor], embed: Any = None, **options: Any) -> transformers.Trainer:
    """Two epochs, with the best model by OPIS loaded at the end."""
    trainer = transformers.Trainer(
        model=Plain(),
        args=transformers.TrainingArguments(
            **arguments(
                folder,
                eval_strategy="epoch",
                metric_for_best_model="eval_opis",
                greater_is_better=False,
                load_best_model_at_end=True,
            )
            | {"save_strategy": "epoch"}
            | options
        ),
        train_dataset=[{"x": a, "labels": b} for a, b in zip(*data(), strict=True)],
        eval_dataset=[{"x": a, "labels": b} for a, b in zip(*evaluation, strict=True)],
        compute_loss_func=lambda outputs, labels, **_: outputs["embeddings"].sum() * 0,
    )
    embed = embed or (lambda model, batch: (model(batch["x"])["embeddings"], batch["labels"]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TCMCallback found no TCM loss")
        trainer.add_callback(for_transformers.TCMCallback(trainer, embed, **OPTIONS))
        trainer.train()
    return trainer


@pytest.mark.usefixtures("one_warning")
@pytest.mark.parametrize("kind", SETS)
def test_transformers(tmp_path: Path, kind: str) -> None:
    """NaN is in the log of each evaluation and never the best."""
    trainer = train(tmp_path, SETS[kind])
    found = [entry["eval_opis"] for entry in trainer.state.log_history if "eval_opis" in entry]
    assert len(found) == 2
    assert all(map(math.isnan, found))
    assert trainer.state.best_metric in (None, math.inf)
    recall = [entry["eval_recall_at_1"] for entry in trainer.state.log_history if "eval_recall_at_1" in entry]
    assert all(value == 0 if kind in ("collapsed", "zero") else math.isnan(value) for value in recall)


@pytest.mark.usefixtures("one_warning")
def test_transformers_without_a_whole_batch(tmp_path: Path) -> None:
    """With `dataloader_drop_last` a small evaluation set has no batch at all."""
    few = tuple(t[:5] for t in data(1))
    trainer = train(tmp_path, (few[0], few[1]), dataloader_drop_last=True)
    found = [entry["eval_opis"] for entry in trainer.state.log_history if "eval_opis" in entry]
    assert len(found) == 2
    assert all(map(math.isnan, found))


@pytest.mark.usefixtures("one_warning")
def test_sentence_transformers(tmp_path: Path) -> None:
    """Each sentence a class of its own."""
    model = tiny_bert.encoder(tmp_path / "model")
    texts, classes = tiny_bert.sentences(12, torch.Generator().manual_seed(1))
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(**arguments(tmp_path, eval_strategy="epoch", num_train_epochs=2)),
        train_dataset=Dataset.from_dict({"sentence": texts, "label": classes}),
        eval_dataset=Dataset.from_dict({"sentence": texts, "label": list(range(12))}),
        loss=ThresholdConsistentMarginLoss(model),
    )
    trainer.add_callback(
        for_transformers.TCMCallback(
            trainer,
            lambda model, batch: (model(trainer.collect_features(batch)[0][0])["sentence_embedding"], batch["label"]),
        )
    )
    trainer.train()
    assert [math.isnan(entry["eval_opis"]) for entry in trainer.state.log_history if "eval_opis" in entry] == [True] * 2


class OfOneRank(IterableDataset[tuple[Tensor, Tensor]]):
    """Rows for one process only, as an uneven split of files gives them."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(*data(1), strict=True) if self.rank == 1 else ())


def _worker(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    trainer = lightning.Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=folder,
        callbacks=[callback()],
    )
    trainer.validate(Network(), DataLoader(OfOneRank(rank), batch_size=20), verbose=False)
    for name, value in expected_scores(*data(1)).items():
        assert trainer.callback_metrics[f"tcm/{name}"].item() == pytest.approx(value, rel=1e-6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        few = TensorDataset(torch.eye(2), torch.arange(2))  # one row a process
        trainer.validate(Network(), DataLoader(few, batch_size=20), verbose=False)
    assert trainer.callback_metrics["tcm/opis"].isnan()
    assert sum("OPIS cannot be measured" in str(one.message) for one in caught) == (rank == 0)


def test_two_processes_of_which_one_has_nothing(tmp_path: Path) -> None:
    with closing(Ranks(2, tmp_path, patience=600)) as ranks:
        ranks.run(_worker, str(tmp_path))
