"""Callbacks of Lightning and Transformers: they log the figures that the losses saw and that `opis` finds."""

import os
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses
from support import tiny_bert
from support.ranks import Ranks
from support.training import (
    MARGINS,
    OPIS,
    SCORES,
    D,
    N,
    Network,
    arguments,
    data,
    expected_pairs,
    expected_scores,
    fit,
    train_own_loss,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tcm_fused import TCMLoss
from tcm_fused.integrations import lightning as for_lightning
from tcm_fused.integrations import transformers as for_transformers
from tcm_fused.integrations.logging import KEYS, HardPairs, criteria
from tcm_fused.integrations.pytorch_metric_learning import CrossBatchMemory, ThresholdConsistentMarginLoss
from tcm_fused.integrations.sentence_transformers import WithTCM

pytestmark = pytest.mark.usefixtures("one_thread")


class NoSync(TorchDispatchMode):
    """An error where a value of a tensor is read, which waits for the device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_hard_pairs_are_found_and_not_waited_for() -> None:
    """Of every loss that a module holds, once; a batch counts for those that it called."""
    x, y = data()
    memory = CrossBatchMemory(ThresholdConsistentMarginLoss(**MARGINS), embedding_size=D)
    plain = TCMLoss(**MARGINS)
    model = nn.ModuleDict({"a": plain, "b": nn.Sequential(memory), "again": plain, "linear": nn.Linear(2, 2)})
    pairs = HardPairs({"": model})
    assert list(pairs.losses) == ["a", "b.0.loss"]
    plain(x[:20], y[:20])  # as in evaluation, before the batch
    callback = callback_of(model)
    with NoSync():
        callback.on_train_begin(None, None, None)
        for collected in (pairs, callback._pairs):
            collected.start_batch()
            assert collected.end_batch() == {}
    batches_of: list[tuple[int, list[Any]]] = [(20, [plain]), (30, [plain, memory]), (N, [memory])]
    for rows, losses_called in batches_of:
        with NoSync():
            pairs.start_batch()
            callback.on_step_begin(None, None, None)
            for loss in losses_called:
                loss(x[:rows], y[:rows])
            called = pairs.end_batch()
            (callback.on_step_end if rows == N else callback.on_substep_end)(None, None, None)
        assert list(called) == ["a", "b.0.loss"][plain not in losses_called : 1 + (memory in losses_called)]
        for loss, stats in zip(losses_called, called.values(), strict=True):
            last: Any = plain.stats if loss is plain else memory.loss.stats
            assert stats.tolist() == pytest.approx([float(value) for value in last])
        with pytest.raises(AssertionError), NoSync():
            stats[0].item()
    means = [(a + b) / 2 for a, b in zip(*(expected_pairs(x[:rows], y[:rows]) for rows in (20, 30)), strict=True)]
    for collected in (pairs, callback._pairs):
        found = collected.means(collected.take_sums(torch.device("cpu")))
        prefix = "" if collected is pairs else "model."
        assert list(found) == [f"tcm/{prefix}{name}/{key}" for name in ("a", "b.0.loss") for key in KEYS]
        assert list(found.values())[: len(KEYS)] == pytest.approx(means)
        assert collected.means(collected.take_sums(torch.device("cpu"))) == {}


def test_every_loss_is_found_under_a_name_of_its_own() -> None:
    first, second, third = (TCMLoss() for _ in range(3))
    compiled: Any = torch.compile(second, backend="eager")
    other = nn.Linear(1, 1)
    other.stats = torch.zeros(1)  # of something else
    roots: dict[str, object] = {
        "a": nn.ModuleDict({"tcm": first, "other": other}),
        "b": nn.ModuleDict({"tcm": compiled, "again": first}),
        "a.tcm": third,
        "none": None,
    }
    assert list(criteria(roots).values()) == [first, second, third]
    assert len(HardPairs(roots).by_key({name: [0.0] * 4 for name in criteria(roots)})) == 12
    assert list(criteria({"": first})) == ["TCMLoss"]


class Stub:
    """As much of a trainer as the callback asks for while training."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model


def callback_of(model: nn.Module) -> for_transformers.TCMCallback:
    return for_transformers.TCMCallback(Stub(model))


@pytest.mark.parametrize("library", ["lightning", "transformers"])
def test_errors(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong option is refused when the callback is made; without its library the import says what to install."""

    def make(**options: Any) -> Any:
        if library == "lightning":
            return for_lightning.TCMCallback(**options)
        return for_transformers.TCMCallback(Stub(nn.Linear(1, 1)), **options)

    embed: dict[str, Any] = {"embeddings" if library == "lightning" else "embed": lambda *_: None}
    make()
    make(**embed, **OPIS)
    with pytest.raises(TypeError, match="far_range: options of OPIS, which needs embed"):
        make(far_range=(0.1, 0.2))
    for options in ({"far_range": (0.2, 0.1)}, {"num_thresholds": 1}, {"far_rnge": (0.1, 0.2)}):
        with pytest.raises((TypeError, ValueError), match=next(iter(options))):
            make(**embed, **options)

    adapter = for_lightning if library == "lightning" else for_transformers
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, adapter.__name__)
    with pytest.raises(ImportError, match="pip install"):
        __import__(adapter.__name__)


def _worker(rank: int, folder: str) -> None:
    """One of two processes, as `torchrun` starts them; every figure is of both, and both have the same weights."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}

    model = tiny_bert.load(Path(folder, "model"))
    texts, classes = tiny_bert.sentences(36, torch.Generator().manual_seed(1))
    pairs = Dataset.from_dict({"anchor": texts, "positive": texts[6:] + texts[:6]})
    loss = WithTCM(losses.MultipleNegativesRankingLoss(model), **MARGINS)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            **arguments(Path(folder), per_device_train_batch_size=6, per_device_eval_batch_size=6, logging_steps=2),
            ddp_backend="gloo",
        ),
        train_dataset=pairs,
        eval_dataset=Dataset.from_dict({"sentence": texts, "label": classes}),
        loss=loss,
    )
    callback = for_transformers.TCMCallback(
        trainer,
        lambda model, batch: (model(trainer.collect_features(batch)[0][0])["sentence_embedding"], batch["label"]),
        **OPIS,
    )
    trainer.add_callback(callback)
    seen: list[float] = []
    loss.tcm.register_forward_hook(lambda module, *_: seen.append(float(module.stats.count_minus)))
    trainer.train()
    assert type(loss.model).__name__ == "DistributedDataParallel"
    assert loss.loss.model is loss.model
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    together = [torch.empty_like(weights) for _ in range(2)]
    torch.distributed.all_gather(together, weights)
    assert torch.equal(*together)
    logged = [entry["tcm/hard_negatives"] for entry in trainer.state.log_history if "tcm/hard_negatives" in entry]
    means = torch.tensor([sum(seen[i : i + 2]) / 2 for i in range(0, len(seen), 2)])
    torch.distributed.all_reduce(means)
    assert logged == pytest.approx((means / 2).tolist())
    metrics = {"eval_runtime": 1.0}
    callback.on_evaluate(None, None, None, metrics, eval_dataloader=trainer.get_eval_dataloader())
    expected = expected_scores(torch.from_numpy(model.encode(texts)), torch.tensor(classes))
    assert {name: metrics[f"eval_{name}"] for name in SCORES} == pytest.approx(expected, abs=1e-4)

    callback_of_lightning = for_lightning.TCMCallback(
        embeddings=lambda outputs, batch: (outputs["embeddings"], batch[1]), **OPIS
    )
    validation = data(seed=1)
    lightning_trainer = fit(
        Path(folder), Network(), callback_of_lightning, [validation], strategy="ddp", devices=2, log_every_n_steps=1
    )
    assert lightning_trainer.world_size == 2
    for name, value in expected_scores(*validation).items():
        assert lightning_trainer.callback_metrics[f"tcm/{name}"].item() == pytest.approx(value, rel=1e-6)

    # Losses that some processes call, and others do not.
    with_own_loss = train_own_loss(Path(folder))
    means = torch.tensor(with_own_loss.seen)
    together = [torch.empty_like(means) for _ in range(2)]
    torch.distributed.all_gather(together, means)
    for place, key in enumerate(KEYS):
        both = [(a[place] + b[place]).item() / 2 for a, b in zip(*together, strict=True)]
        for name, expected_of in (("criterion", both), ("second", together[1][:, place].tolist())):
            history = with_own_loss.state.log_history
            found = [entry[f"tcm/{name}/{key}"] for entry in history if f"tcm/{name}/{key}" in entry]
            assert found == pytest.approx(expected_of, rel=1e-5)
    module = Network(calls=lambda batch_idx: rank == 1 and batch_idx == 0)
    lightning_trainer = fit(
        Path(folder), module, for_lightning.TCMCallback(), [validation], strategy="ddp", devices=2, log_every_n_steps=1
    )
    of_one = torch.tensor([float(value) for value in module.criterion.stats or [0.0] * len(KEYS)])  # in the last epoch
    torch.distributed.broadcast(of_one, 1)
    assert of_one[0] > 0
    for key, value in zip(KEYS, of_one.tolist(), strict=True):
        assert lightning_trainer.callback_metrics[f"tcm/{key}_epoch"].item() == pytest.approx(value)


def test_two_processes(tmp_path: Path) -> None:
    tiny_bert.encoder(tmp_path / "model")
    with closing(Ranks(2, tmp_path, patience=600)) as ranks:
        ranks.run(_worker, str(tmp_path))
