"""Small models and trainers of Lightning and Transformers, with the figures that a callback is to log of them."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
import transformers
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from support import batches
from tcm_fused import TCMLoss, opis, tcm_loss
from tcm_fused.integrations import transformers as for_transformers

N, D, CLASSES, BATCH = 48, 6, 4, 16
MARGINS: dict[str, Any] = {"margin_plus": 0.9, "margin_minus": 0.1}
OPIS: dict[str, Any] = {"far_range": (0.1, 0.5), "num_thresholds": 11}
SCORES = ("opis", "eps_opis", "recall_at_1")


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
    """The rows that the logger has written, without empty cells."""
    trainer.logger.save()
    with Path(trainer.logger.log_dir, "metrics.csv").open() as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


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
