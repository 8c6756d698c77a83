"""The rates of a deployed threshold in torchmetrics, Lightning, Transformers and sentence-transformers."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from support import batches, tiny_bert
from support.training import OPIS as OPTIONS
from support.training import Network, data, fit
from test_callback_scores import callback, train
from torchmetrics.wrappers import BootStrapper, MetricTracker

from tcm_fused import OPIS, Threshold, calibrate, evaluate
from tcm_fused.integrations import transformers as for_transformers
from tcm_fused.integrations.sentence_transformers import ThresholdConsistentMarginLoss, ThresholdEvaluator

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),
]


def test_metric() -> None:
    x, y = batches.batch(200, 8, 9)
    metric = OPIS(details=True, threshold=Threshold(0.3), far_range=(0.05, 0.3))
    for part in (slice(0, 90), slice(90, 200)):
        metric.update(x[part], y[part])
    scores = metric.compute()
    expected = evaluate(x, y, threshold=0.3)
    assert (scores["far"].item(), scores["frr"].item()) == (expected.far, expected.frr)
    empty = OPIS(details=True, threshold=0.3)
    empty.update(x[:0], y[:0])
    assert math.isnan(empty.compute()["far"])
    with pytest.raises(ValueError, match="from -1 to 1"):
        OPIS(threshold=2.0)


def test_wrappers_of_torchmetrics() -> None:
    x, y = batches.batch(200, 8, 9)
    bootstrapped = BootStrapper(OPIS(far_range=(0.05, 0.3)), num_bootstraps=3)
    bootstrapped.update(x, y)
    assert all(math.isfinite(value) for value in bootstrapped.compute().values())
    tracker = MetricTracker(OPIS(far_range=(0.05, 0.3)), maximize=False)
    for rows in (x, x + 1):
        tracker.increment()
        tracker.update(rows, y)
    assert tracker.best_metric() == pytest.approx(min(tracker.compute_all().tolist()))


def test_lightning(tmp_path: Path) -> None:
    trainer = fit(tmp_path, Network(), callback(threshold=0.2), [data(2)], log_every_n_steps=1)
    expected = evaluate(*data(2), threshold=0.2)
    assert trainer.callback_metrics["tcm/far"].item() == pytest.approx(expected.far, rel=1e-6)
    assert trainer.callback_metrics["tcm/frr"].item() == pytest.approx(expected.frr, rel=1e-6)


def embed(model: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return model(batch["x"])["embeddings"], batch["labels"]


def test_transformers(tmp_path: Path) -> None:
    trainer = train(tmp_path, data(2))
    trainer.callback_handler.callbacks.pop()  # the one without a threshold
    trainer.add_callback(for_transformers.TCMCallback(trainer, embed, threshold=0.2, **OPTIONS))
    found = trainer.evaluate()
    expected = evaluate(*data(2), threshold=0.2)
    assert found["eval_far"] == pytest.approx(expected.far, rel=1e-6)
    assert found["eval_frr"] == pytest.approx(expected.frr, rel=1e-6)
    assert trainer.state.log_history[-1]["eval_far"] == found["eval_far"]
    with pytest.raises(TypeError, match="threshold: options of OPIS, which needs embed="):
        for_transformers.TCMCallback(trainer, threshold=0.2)


@pytest.fixture(scope="module")
def sentences() -> tuple[list[str], list[int]]:
    return tiny_bert.sentences(60, torch.Generator().manual_seed(0))


def test_evaluator(tmp_path: Path, sentences: tuple[list[str], list[int]]) -> None:
    model = tiny_bert.encoder(tmp_path / "bert")
    embeddings = model.encode(sentences[0], convert_to_tensor=True)
    found = ThresholdEvaluator(*sentences, far=0.1, name="held")(model, str(tmp_path / "out"), 1, 10)
    expected = calibrate(embeddings, sentences[1], far=0.1)
    assert found["held_threshold"] == expected.threshold.similarity
    assert found["held_frr"] == expected.threshold.frr
    deployed = ThresholdEvaluator(*sentences, threshold=expected.threshold, name="new")
    scores = deployed(model, str(tmp_path / "out"), 1, 10)
    assert scores["new_frr"] == pytest.approx(expected.threshold.frr)
    deployed(model, str(tmp_path / "out"), 2, 20)
    rows = list(csv.DictReader((tmp_path / "out" / "threshold_evaluation_new_results.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["far"]) == scores["new_far"]
    assert (deployed.primary_metric, deployed.greater_is_better) == ("new_f_beta", True)
    assert ThresholdEvaluator(*sentences, far=0.1).primary_metric == "frr"
    assert ThresholdEvaluator(*sentences, frr=0.1).primary_metric == "far"
    assert ThresholdEvaluator(*sentences).primary_metric == "equal_error_rate"
    assert not ThresholdEvaluator(*sentences).greater_is_better
    assert ThresholdEvaluator(*sentences).get_config_dict() == {"eer": True}
    assert math.isnan(ThresholdEvaluator(sentences[0], list(range(60)))(model)["far"])
    assert math.isnan(ThresholdEvaluator(sentences[0], list(range(60)), threshold=0.5)(model)["far"])


def test_evaluator_in_a_trainer(tmp_path: Path, sentences: tuple[list[str], list[int]]) -> None:
    model = tiny_bert.encoder(tmp_path / "bert")
    dataset = Dataset.from_dict({"sentence": sentences[0], "label": sentences[1]})
    options = SentenceTransformerTrainingArguments(
        str(tmp_path), max_steps=2, eval_strategy="steps", eval_steps=1, report_to="none", save_strategy="no"
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=options,
        train_dataset=dataset,
        loss=ThresholdConsistentMarginLoss(model),
        evaluator=ThresholdEvaluator(*sentences, far=0.1, name="held"),
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_held_frr" in entry]
    assert len(logged) == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"far": 0.1, "threshold": 0.5}, ValueError, "got both: far"),
        ({"far": 0.1, "frr": 0.5}, ValueError, "give exactly one"),
        ({"distance": 0.1}, TypeError, "distance: no target of calibrate"),
        ({"threshold": 1.5}, ValueError, "from -1 to 1"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ThresholdEvaluator(["a", "b"], [0, 1], **options)
    with pytest.raises(ValueError, match="labels must be as many as sentences, 2, got 1"):
        ThresholdEvaluator(["a", "b"], [0])
