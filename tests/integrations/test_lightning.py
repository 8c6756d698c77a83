"""The callback of Lightning logs the figures that the losses saw and that `opis` finds."""

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support.training import BATCH, OPIS, N, Network, data, expected_pairs, expected_scores, fit, rows

from tcm_fused.integrations import lightning as for_lightning
from tcm_fused.integrations.logging import KEYS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("in_module", [True, False])
def test_lightning(tmp_path: Path, in_module: bool) -> None:
    """Every batch's hard pairs, their mean over the epoch, and OPIS of all validation batches together."""
    module = Network(in_module)
    callback = for_lightning.TCMCallback(
        criterion=None if in_module else module.criterion[0],
        embeddings=lambda outputs, batch: (outputs["embeddings"], batch[1]),
        **OPIS,
    )
    best = ModelCheckpoint(folder := tmp_path / "best", monitor="tcm/opis")
    # The first batch has no two of a class: nothing to find OPIS of in Lightning's sanity check.
    validation = data(seed=1)[0], torch.arange(N) % 24
    options = {"log_every_n_steps": 1, "num_sanity_val_steps": 1}
    trainer = fit(tmp_path, module, callback, [validation], callbacks=[best], **options)
    written = rows(trainer)
    x, y = data()
    steps = [expected_pairs(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, N, BATCH)]
    for place, key in enumerate(KEYS):
        found = [float(row[f"tcm/{key}"]) for row in written if f"tcm/{key}" in row]
        assert found == pytest.approx([step[place] for step in steps] * 2)
        mean = [float(row[f"tcm/{key}_epoch"]) for row in written if f"tcm/{key}_epoch" in row]
        assert mean == pytest.approx([sum(step[place] for step in steps) / len(steps)] * 2)
    for name, value in expected_scores(*validation).items():
        found = [float(row[f"tcm/{name}"]) for row in written if f"tcm/{name}" in row]
        assert found == pytest.approx([value] * 2, rel=1e-6)
    assert best.best_model_score is not None
    assert list(folder.iterdir())


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_lightning_with_two_validation_loaders(tmp_path: Path) -> None:
    callback = for_lightning.TCMCallback(embeddings=lambda outputs, batch: (outputs["embeddings"], batch[1]), **OPIS)
    sets = [data(seed=1), data(seed=2)]
    trainer = fit(tmp_path, Network(), callback, sets, log_every_n_steps=100)
    for index, validation in enumerate(sets):
        for name, value in expected_scores(*validation).items():
            assert trainer.callback_metrics[f"tcm/{name}/dataloader_{index}"].item() == pytest.approx(value, rel=1e-6)
    assert not any("tcm/hard_positives" in row for row in rows(trainer))  # nothing was asked for


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_lightning_with_batches_that_do_not_call_the_loss(tmp_path: Path) -> None:
    """Those have no hard pairs to log, nor of the batch before, and do not count in the means."""
    module = Network(calls=lambda batch_idx: batch_idx == 1)
    written = rows(fit(tmp_path, module, for_lightning.TCMCallback(), [data(1)], log_every_n_steps=1))
    for key, value in zip(KEYS, expected_pairs(*(t[BATCH : 2 * BATCH] for t in data())), strict=True):
        found = [float(row[f"tcm/{key}"]) for row in written if f"tcm/{key}" in row]
        assert found == pytest.approx([math.nan, value, math.nan] * 2, nan_ok=True)
        mean = [float(row[f"tcm/{key}_epoch"]) for row in written if f"tcm/{key}_epoch" in row]
        assert mean == pytest.approx([value] * 2)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_lightning_without_a_loss(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="found no TCM loss.*criterion=") as warned:
        trainer = fit(tmp_path, Network(in_module=False), for_lightning.TCMCallback(), [data(1)], log_every_n_steps=1)
    assert sum("found no TCM loss" in str(warning.message) for warning in warned) == 1
    assert not any("tcm/" in key for key in trainer.callback_metrics)
