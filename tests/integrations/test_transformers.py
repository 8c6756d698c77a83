"""The callback of Transformers, with and without Sentence Transformers, logs the figures of losses and `opis`."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.sentence_transformer import losses
from support import tiny_bert
from support.training import BATCH, MARGINS, OPIS, SCORES, Plain, arguments, data, expected_scores, train_own_loss
from torch import Tensor, nn

from tcm_fused import TCMLoss
from tcm_fused.integrations import transformers as for_transformers
from tcm_fused.integrations.logging import KEYS
from tcm_fused.integrations.sentence_transformers import ThresholdConsistentMarginLoss as SentenceLoss
from tcm_fused.integrations.sentence_transformers import WithTCM

pytestmark = pytest.mark.usefixtures("one_thread")


class Embedder(nn.Module):
    """A model as Transformers takes one: it computes its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.criterion = TCMLoss(**MARGINS)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        embeddings = self.scale * x
        return {"loss": self.criterion(embeddings, labels) + 0 * self.scale, "embeddings": embeddings}


def test_transformers(tmp_path: Path) -> None:
    """Means over the batches between two logs, with gradients accumulated, and OPIS of two evaluation sets."""
    sets = [[{"x": a, "labels": b} for a, b in zip(*data(seed), strict=True)] for seed in range(3)]
    trainer = transformers.Trainer(
        model=Embedder(),
        args=transformers.TrainingArguments(
            **arguments(
                tmp_path,
                per_device_train_batch_size=8,
                gradient_accumulation_steps=3,
                logging_steps=2,
                eval_strategy="epoch",
            )
        ),
        train_dataset=sets[0],
        eval_dataset={"one": sets[1], "two": sets[2]},
    )
    trainer.add_callback(
        for_transformers.TCMCallback(
            trainer, lambda model, batch: (model(**batch)["embeddings"], batch["labels"]), **OPIS
        )
    )
    seen: list[list[float]] = []
    criterion = trainer.model.criterion
    criterion.register_forward_hook(
        lambda module, *_: seen.append([float(value) for value in module.stats]) if trainer.model.training else None
    )
    trainer.train()
    assert len(seen) == 12
    history = trainer.state.log_history
    logged = [entry for entry in history if "tcm/hard_positives" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    for entry, batches_of in zip(logged, (seen[:6], seen[6:]), strict=True):
        for place, key in enumerate(KEYS):
            assert entry[f"tcm/{key}"] == pytest.approx(sum(stats[place] for stats in batches_of) / 6, rel=1e-5)
    for name, seed in (("one", 1), ("two", 2)):
        expected = {f"eval_{name}_{score}": value for score, value in expected_scores(*data(seed)).items()}
        found = [entry for entry in history if f"eval_{name}_opis" in entry]
        assert len(found) == 2
        for entry in found:
            assert {key: entry[key] for key in expected} == pytest.approx(expected)
    assert trainer.evaluate(sets[1])["eval_opis"] == pytest.approx(expected_scores(*data(1))["opis"])
    assert trainer.evaluate(sets[1], metric_key_prefix="held_out")["held_out_opis"] >= 0


def test_best_model_by_opis(tmp_path: Path) -> None:
    """The metrics that the trainer gets of an evaluation have OPIS, and a loss given as function is found."""
    examples = [{"x": a, "labels": b} for a, b in zip(*data(), strict=True)]
    criterion = TCMLoss(**MARGINS)

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tcm = criterion

        def forward(self, outputs: Any, labels: Tensor, **_: Any) -> Tensor:
            loss: Tensor = self.tcm(outputs["embeddings"], labels)
            return loss

    trainer = transformers.Trainer(
        model=Plain(),
        args=transformers.TrainingArguments(
            **arguments(
                tmp_path,
                per_device_train_batch_size=BATCH,
                logging_steps=1,
                eval_strategy="epoch",
                save_strategy="epoch",
                load_best_model_at_end=True,
                metric_for_best_model="eval_opis",
                greater_is_better=False,
            )
            | {"save_strategy": "epoch"}
        ),
        train_dataset=examples,
        eval_dataset=examples,
        compute_loss_func=Loss(),
    )
    trainer.add_callback(
        for_transformers.TCMCallback(
            trainer, lambda model, batch: (model(batch["x"])["embeddings"], batch["labels"]), **OPIS
        )
    )
    trainer.train()
    scores = [entry["eval_opis"] for entry in trainer.state.log_history if "eval_opis" in entry]
    assert len(scores) == 2
    assert trainer.state.best_metric == min(scores)
    assert sum("tcm/hard_negatives" in entry for entry in trainer.state.log_history) == 6


def test_loss_beside_the_model(tmp_path: Path) -> None:
    """One that is an attribute of the trainer is found, one in a function is told of; else a warning says how."""
    trainer = train_own_loss(tmp_path)
    assert len(trainer.seen) == 6
    for place, key in enumerate(KEYS):
        logged = [
            entry[f"tcm/criterion/{key}"] for entry in trainer.state.log_history if f"tcm/criterion/{key}" in entry
        ]
        assert logged == pytest.approx([stats[place] for stats in trainer.seen])
    assert not any("tcm/second" in key for entry in trainer.state.log_history for key in entry)

    criterion = TCMLoss(**MARGINS)
    function = {"compute_loss_func": lambda outputs, labels, **_: criterion(outputs["embeddings"], labels)}
    trainer = train_own_loss(tmp_path, transformers.Trainer, criterion, **function)
    assert sum("tcm/hard_negatives" in entry for entry in trainer.state.log_history) == 6
    with pytest.warns(UserWarning, match="found no TCM loss.*criterion=") as warned:
        trainer = train_own_loss(tmp_path, transformers.Trainer, **function)
    assert sum("found no TCM loss" in str(warning.message) for warning in warned) == 1
    assert not any("tcm/" in key for entry in trainer.state.log_history for key in entry)


@pytest.mark.parametrize("with_tcm", ["ab", "b"])
def test_sentence_transformers_with_two_datasets(tmp_path: Path, with_tcm: str) -> None:
    """Each dataset's loss has figures of its own, at logs after its batches only."""
    model = tiny_bert.encoder(tmp_path / "model")
    texts, _ = tiny_bert.sentences(24, torch.Generator().manual_seed(1))
    triplets = {"anchor": texts, "positive": texts[6:] + texts[:6], "negative": texts[7:] + texts[:7]}
    sets = {"a": Dataset.from_dict(dict(list(triplets.items())[:2])), "b": Dataset.from_dict(triplets)}
    of_set: dict[str, Any] = {name: losses.MultipleNegativesRankingLoss(model) for name in sets}
    of_set |= {name: WithTCM(of_set[name], **MARGINS) for name in with_tcm}
    seen: list[dict[str, float]] = []
    for name, loss in of_set.items():
        prefix = f"tcm/loss.{name}.tcm" if len(with_tcm) == 2 else "tcm"

        def note(module: Any, *_: Any, prefix: str = prefix) -> None:
            figures = zip(KEYS, module.tcm.stats, strict=True) if hasattr(module, "tcm") else ()
            seen.append({f"{prefix}/{key}": float(value) for key, value in figures})

        loss.register_forward_hook(note)
    options = arguments(tmp_path, per_device_train_batch_size=12, logging_steps=1, num_train_epochs=1)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(**options, multi_dataset_batch_sampler="round_robin"),
        train_dataset=sets,
        loss=of_set,
    )
    trainer.add_callback(for_transformers.TCMCallback(trainer))
    trainer.train()
    assert len(seen) == 4
    assert len({tuple(stats) for stats in seen}) == 2
    found: list[dict[str, float]] = [{} for _ in seen]
    for entry in trainer.state.log_history:
        found[entry["step"] - 1] |= {key: value for key, value in entry.items() if key.startswith("tcm/")}
    assert found == [pytest.approx(stats, rel=1e-5) for stats in seen]


def test_sentence_transformers(tmp_path: Path) -> None:
    """The loss is beside the model there, and batches hold columns."""
    model = tiny_bert.encoder(tmp_path / "model")
    texts, classes = tiny_bert.sentences(36, torch.Generator().manual_seed(1))
    dataset = Dataset.from_dict({"sentence": texts, "label": classes})
    options = arguments(tmp_path, per_device_train_batch_size=12, logging_steps=1, eval_strategy="epoch")
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(**options, batch_sampler=BatchSamplers.GROUP_BY_LABEL),
        train_dataset=dataset,
        eval_dataset=dataset,
        loss=SentenceLoss(model),
    )
    trainer.add_callback(
        for_transformers.TCMCallback(
            trainer,
            lambda model, batch: (model(trainer.collect_features(batch)[0][0])["sentence_embedding"], batch["label"]),
            **OPIS,
        )
    )
    trainer.train()
    history = trainer.state.log_history
    assert sum("tcm/hard_positives" in entry for entry in history) == sum("loss" in entry for entry in history) > 0
    last = [entry for entry in history if "eval_opis" in entry][-1]
    expected = expected_scores(torch.from_numpy(model.encode(texts)), torch.tensor(classes))
    assert {name: last[f"eval_{name}"] for name in SCORES} == pytest.approx(expected, abs=1e-4)
