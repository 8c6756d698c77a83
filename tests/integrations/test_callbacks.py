"""Callbacks of Lightning and Transformers: what they log is what the losses saw and what `opis` finds."""

import csv
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import transformers
from datasets import Dataset
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.sentence_transformer import losses
from support import batches, tiny_bert
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from tcm_fused import TCMLoss, opis, tcm_loss
from tcm_fused.integrations import lightning as for_lightning
from tcm_fused.integrations import transformers as for_transformers
from tcm_fused.integrations.logging import KEYS, HardPairs, criteria
from tcm_fused.integrations.pytorch_metric_learning import CrossBatchMemory, ThresholdConsistentMarginLoss
from tcm_fused.integrations.sentence_transformers import ThresholdConsistentMarginLoss as SentenceLoss
from tcm_fused.integrations.sentence_transformers import WithTCM

N, D, CLASSES, BATCH = 48, 6, 4, 16
MARGINS: dict[str, Any] = {"margin_plus": 0.9, "margin_minus": 0.1}
OPIS: dict[str, Any] = {"far_range": (0.1, 0.5), "num_thresholds": 11}
SCORES = ("opis", "eps_opis", "recall_at_1")

pytestmark = pytest.mark.usefixtures("one_thread")


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    return batches.batch(N, D, CLASSES, torch.float32, seed)


def expected_pairs(x: Tensor, y: Tensor) -> list[float]:
    _, stats = tcm_loss(x, y, return_stats=True, **MARGINS)
    return [float(value) for value in stats]


def expected_scores(x: Tensor, y: Tensor) -> dict[str, float]:
    found = opis(x, y, **OPIS)
    return {name: getattr(found, name) for name in SCORES}


class Network(lightning.LightningModule):
    """Embeddings are the input itself times a weight: cosine similarities, and with them all figures, stay the same."""

    def __init__(self, in_module: bool = True, calls: Callable[[int], bool] = lambda batch_idx: True) -> None:
        super().__init__()
        self.calls = calls
        self.scale = nn.Parameter(torch.ones(()))
        criterion = TCMLoss(**MARGINS)
        self.criterion: Any = criterion if in_module else [criterion]  # a list, which Lightning does not look into

    def embed(self, x: Tensor) -> Tensor:
        return self.scale * x

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not self.calls(batch_idx):
            return 0 * self.scale
        criterion = self.criterion if isinstance(self.criterion, TCMLoss) else self.criterion[0]
        loss: Tensor = criterion(self.embed(batch[0]), batch[1]) + 0 * self.scale
        return loss

    def validation_step(self, batch: Any, _: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        return {"embeddings": self.embed(batch[0])}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(folder: Path, module: Network, callback: Any, validation: list[tuple[Tensor, Tensor]], **options: Any) -> Any:
    """Two epochs over `data()`, as Lightning's documentation trains."""
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[callback, *options.pop("callbacks", [])],
        logger=CSVLogger(folder),
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    loaders = [DataLoader(TensorDataset(*sets), batch_size=20) for sets in validation]
    trainer.fit(module, DataLoader(TensorDataset(*data()), batch_size=BATCH), loaders)
    return trainer


def rows(trainer: Any) -> list[dict[str, str]]:
    """What the logger has written, without what is empty."""
    trainer.logger.save()
    with Path(trainer.logger.log_dir, "metrics.csv").open() as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


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


class NoSync(TorchDispatchMode):
    """An error where a value of a tensor is read: what waits for the device."""

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


class Embedder(nn.Module):
    """A model as Transformers takes one: it computes its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.criterion = TCMLoss(**MARGINS)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        embeddings = self.scale * x
        return {"loss": self.criterion(embeddings, labels) + 0 * self.scale, "embeddings": embeddings}


def arguments(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "num_train_epochs": 2,
        "per_device_eval_batch_size": 20,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        **options,
    }


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
    """What the trainer is told of an evaluation has OPIS in it, and a loss given as function is found."""
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


class Plain(nn.Module):
    """A model that leaves the loss to the trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"embeddings": self.scale * x}


class OwnLoss(transformers.Trainer):
    """As Transformers' documentation has it: the loss is an attribute of the trainer. Rank 0 calls one loss of two."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.criterion = TCMLoss(**MARGINS)
        self.second = TCMLoss(**MARGINS)
        self.seen: list[list[float]] = []

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        embeddings = model(**inputs)["embeddings"]
        used = [self.criterion] if self.args.process_index == 0 else [self.criterion, self.second]
        loss: Tensor = sum(criterion(embeddings, inputs["labels"]) for criterion in used)
        stats: Any = used[-1].stats
        self.seen.append([float(value) for value in stats])
        return loss


def train_own_loss(folder: Path, make: Any = OwnLoss, criterion: Any = None, **options: Any) -> Any:
    examples = [{"x": a, "labels": b} for a, b in zip(*data(), strict=True)]
    backend = {"ddp_backend": "gloo"} if torch.distributed.is_initialized() else {}
    training = transformers.TrainingArguments(
        **arguments(folder, per_device_train_batch_size=BATCH, logging_steps=1), **backend
    )
    trainer = make(model=Plain(), args=training, train_dataset=examples, **options)
    trainer.add_callback(for_transformers.TCMCallback(trainer, criterion=criterion))
    trainer.train()
    return trainer


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
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
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
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    tiny_bert.encoder(tmp_path / "model")
    spawn(_worker, (str(tmp_path),), nprocs=2)
