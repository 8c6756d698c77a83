"""One run: train, checkpoint, score. A run is a folder with `checkpoint.pt`, and `result.json` when it is finished.

A run that was interrupted goes on from its last checkpoint. On a CPU, with as many threads, it reaches the same numbers
to the last bit as one that was not.
"""

import dataclasses
import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from benchmarks.retrieval.datasets import Images, Split, describe
from benchmarks.retrieval.images import BalancedBatches, CentreImages, TrainImages
from benchmarks.retrieval.losses import make_base
from benchmarks.retrieval.networks import make_network
from tcm_fused import CrossBatchMemory, TCMLoss, __version__, opis
from tcm_fused.thresholds.outputs import write_whole
from tcm_fused.thresholds.terminal import printable

HELD_OUT = "held_out.npz"  # embeddings and labels of the classes held out
_REPORT = 20  # steps between looks at the loss: each waits for the device


@dataclasses.dataclass(frozen=True)
class Margins:
    """Those of TCM, as `tcm_fused.TCMLoss` has them, and how many past embeddings it looks at."""

    margin_plus: float
    margin_minus: float
    lambda_plus: float
    lambda_minus: float
    bank: int = 0

    def make(self) -> nn.Module:
        """The loss."""
        loss = TCMLoss(
            margin_plus=self.margin_plus,
            margin_minus=self.margin_minus,
            lambda_plus=self.lambda_plus,
            lambda_minus=self.lambda_minus,
        )
        return CrossBatchMemory(loss, size=self.bank) if self.bank else loss


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that the numbers of a run depend on, beside the images and the machine."""

    dataset: str
    test_set: str
    backbone: str
    base: str
    tcm: Margins | None
    seed: int
    pretrained: bool
    dim: int
    layer_norm: bool
    batch_norm: bool
    epochs: int
    batch_classes: int
    batch_images: int
    lr: float
    loss_lr: float | None  # None where the base loss has no weights
    scale: float | None  # ArcFace's
    weight_decay: float
    warmup: float  # share of the steps
    size: int
    min_crop: float
    mirror: bool
    held_out: int  # classes
    amp: Literal["off", "bf16", "fp16"]
    device: str

    @property
    def name(self) -> str:
        """Of the run's folder."""
        parts = (self.dataset, self.test_set, self.backbone.replace("/", "_"), self.base, "tcm" if self.tcm else "")
        return "-".join(filter(None, (*parts, f"seed{self.seed}")))


Score = Callable[[Tensor, Tensor], dict[str, float]]  # of embeddings and labels


def score(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    """Recall@1, OPIS and 10%-OPIS."""
    found = opis(embeddings, labels)
    return {"recall_at_1": found.recall_at_1, "opis": found.opis, "eps_opis": found.eps_opis}


class Run:
    """A run in its folder `out / settings.name`.

    Every `score_every` steps, if it is not 0, the classes held out and those of the test are scored on the way. `more`
    scores that are wanted of the test at the end beside `score`'s.
    """

    def __init__(
        self,
        settings: Settings,
        split: Split,
        out: Path,
        workers: int = 0,
        checkpoint_every: int = 500,
        score_every: int = 0,
        more: Score | None = None,
    ) -> None:
        self.settings, self.split, self.workers, self.checkpoint_every = settings, split, workers, checkpoint_every
        self.score_every, self.more = score_every, more
        self.course: list[dict[str, Any]] = []  # scores on the way
        self.folder = out / settings.name
        self.device = torch.device(settings.device)
        self.batches = BalancedBatches(
            split.train.labels, settings.batch_classes, settings.batch_images, seed=settings.seed
        )
        self.steps = settings.epochs * self.batches.steps
        self.identity = {**dataclasses.asdict(settings), "images": split.fingerprint}
        self.step = 0  # how many are done, of all epochs
        self.seconds = 0.0  # of training, before this process
        self.last_loss = math.nan

    def go(self) -> dict[str, Any]:
        """Train from the last checkpoint on, or from the start, and score; a finished run is read.

        Raises:
            ValueError: the folder holds a run with other settings, an image cannot be read, or the test images are too
                few to be scored.
            RuntimeError: another process is at this run, or the loss is not finite.
        """
        result_file = self.folder / "result.json"
        if result_file.exists():
            return self._read(result_file)
        _check_pairs(self.split.test)  # like what follows, before the folder is made: it may refuse
        self._build()
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            self._restore()
            if self.step < self.steps:
                self._train()
            result = self._score()
            text = json.dumps(result, indent=1, allow_nan=False) + "\n"
            write_whole(result_file, lambda part: part.write_text(text, encoding="utf-8"))
        return result

    def _read(self, result_file: Path) -> dict[str, Any]:
        """The result of a finished run."""
        try:
            result: dict[str, Any] = json.loads(result_file.read_text(encoding="utf-8"))
            identity = dict(result["identity"])
            for name in ("recall_at_1", "opis", "eps_opis"):
                float(result["scores"][name])
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{result_file} is damaged ({error!r}); remove it to score the run again") from error
        self._check_identity(identity)
        print(f"{printable(self.settings.name)}: finished before, {printable(result_file)}")
        return result

    def _build(self) -> None:
        """Network, losses and optimizer, as the seed starts them; with TCM they start as without."""
        s = self.settings
        torch.manual_seed(s.seed)
        self.network = make_network(s.backbone, s.pretrained, s.dim, s.layer_norm, s.size, s.batch_norm).to(self.device)
        # Convolutions take half the time; mypy knows no module that is moved to a format alone.
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.base = make_base(s.base, len(self.split.train.classes), s.dim, s.scale or 64.0).to(self.device)
        self.tcm = s.tcm.make() if s.tcm else None
        groups = [{"params": list(self.network.parameters()), "lr": s.lr}]
        if weights := list(self.base.parameters()):
            groups.append({"params": weights, "lr": s.loss_lr})
        self.optimizer = torch.optim.AdamW(groups, weight_decay=s.weight_decay)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=s.amp == "fp16")
        self.parts: dict[str, Any] = {
            "network": self.network,
            "base": self.base,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
        }
        if s.tcm and s.tcm.bank:
            self.parts["tcm"] = self.tcm

    def _rate(self, step: int) -> float:
        """Share of the learning rate: a linear rise, then half a cosine down to 0."""
        rise = max(1, round(self.settings.warmup * self.steps))
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, self.steps - rise)))

    def _train(self) -> None:
        self.network.train()
        begin = time.perf_counter() - self.seconds
        images = TrainImages(self.split.train, self.settings.size, self.settings.min_crop, self.settings.mirror)
        bar = tqdm(total=self.steps, initial=self.step, desc=self.settings.name, unit="step", disable=None)
        with bar:
            while self.step < self.steps:
                epoch, start = divmod(self.step, self.batches.steps)
                loader: Any = DataLoader(
                    images,
                    batch_sampler=self.batches.epoch(epoch)[start:],
                    num_workers=self.workers,
                    pin_memory=self.device.type == "cuda",
                    generator=torch.Generator(),  # else it draws from the network's, once for each loader
                )
                for x, y in loader:
                    loss = self._train_step(self._images(x), y.to(self.device, non_blocking=True))
                    self.step += 1
                    bar.update()
                    if self.score_every and self.step % self.score_every == 0 and self.step < self.steps:
                        begin += self._look()
                    save = self.step % self.checkpoint_every == 0 or self.step == self.steps
                    if save or self.step % _REPORT == 0:
                        self._report(loss, bar)  # which raises where the loss is not finite, so none such is saved
                    if save:
                        self.seconds = time.perf_counter() - begin
                        self._save()

    def _images(self, x: Tensor) -> Tensor:
        return x.to(self.device, non_blocking=True, memory_format=torch.channels_last)

    def _train_step(self, x: Tensor, y: Tensor) -> Tensor:
        with self._autocast():
            embeddings = self.network(x)
        embeddings = embeddings.float()  # losses are worked in full precision
        loss: Tensor = self.base(embeddings, y)
        if self.tcm is not None:
            loss = loss + self.tcm(embeddings, y)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        return loss.detach()

    def _report(self, loss: Tensor, bar: Any) -> None:
        self.last_loss = loss.item()
        if not math.isfinite(self.last_loss):
            raise RuntimeError(
                f"{self.settings.name}: the loss is {self.last_loss} at step {self.step}; lower --lr, or try --amp off"
            )
        bar.set_postfix(loss=f"{self.last_loss:.3f}")

    def _autocast(self) -> torch.autocast:
        amp = self.settings.amp
        dtype = torch.float16 if amp == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=amp != "off")

    def test_embeddings(self) -> tuple[Tensor, Tensor]:
        """Embeddings [N, dim] of the test images by the network of the last checkpoint, and their labels."""
        self._build()
        self._restore()
        return self._embed(self.split.test)

    def _look(self) -> float:
        """Score on the way; returns the seconds that it took, which are not of the training."""
        begin = time.perf_counter()
        parts = {"held_out": self.split.held_out, "test": self.split.test}
        scores = {name: score(*self._embed(images)) for name, images in parts.items() if images is not None}
        self.course.append({"step": self.step, **scores})
        self.network.train()
        return time.perf_counter() - begin

    def _embed(self, images: Images) -> tuple[Tensor, Tensor]:
        """Embeddings [N, dim] of the middle of images, and their labels."""
        rows = []
        crops = CentreImages(images, self.settings.size)
        loader: Any = DataLoader(crops, batch_size=128, num_workers=self.workers, generator=torch.Generator())
        self.network.eval()
        with torch.inference_mode():
            for x in tqdm(loader, desc="images", unit="batch", disable=None, leave=False):
                with self._autocast():
                    rows.append(self.network(self._images(x)).float().cpu())
        return torch.cat(rows), torch.from_numpy(images.labels)

    def _score(self) -> dict[str, Any]:
        """Scores of the test images and of those held out, whose embeddings are written too."""
        x, y = self._embed(self.split.test)
        found = opis(x, y)
        held_out = None
        if self.split.held_out is not None:
            embeddings, labels = self._embed(self.split.held_out)
            held_out = {**describe(self.split.held_out), "scores": score(embeddings, labels)}
            write_whole(self.folder / HELD_OUT, lambda part: _save_embeddings(part, embeddings, labels))
        return {
            "identity": self.identity,
            "scores": {"recall_at_1": found.recall_at_1, "opis": found.opis, "eps_opis": found.eps_opis},
            "more": {} if self.more is None else self.more(x, y),
            "held_out": held_out,
            "course": self.course,
            "thresholds": [float(found.similarity.min()), float(found.similarity.max())],
            "train": describe(self.split.train),
            "test": describe(self.split.test),
            "warning": self.split.warning,
            "steps": self.step,
            "last_loss": self.last_loss,
            "train_seconds": round(self.seconds, 2),
            "made_with": {
                "tcm_fused": __version__,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            },
        }

    def _save(self) -> None:
        state = {
            "identity": self.identity,
            "step": self.step,
            "seconds": self.seconds,
            "last_loss": self.last_loss,
            "course": self.course,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            **{name: part.state_dict() for name, part in self.parts.items()},
        }
        write_whole(self.folder / "checkpoint.pt", lambda part: torch.save(state, part))

    def _restore(self) -> None:
        """From the checkpoint, if there is one."""
        for part in self.folder.glob(".*.part"):  # of a process that was killed as it wrote
            part.unlink()
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return
        with _naming_damage(path):
            state = torch.load(path, map_location="cpu", weights_only=True)
            identity = dict(state["identity"])
        self._check_identity(identity)
        with _naming_damage(path):
            self.step = int(state["step"])
            self.seconds, self.last_loss = float(state["seconds"]), float(state["last_loss"])
            self.course = list(state["course"])
            if not 0 <= self.step <= self.steps:
                raise ValueError(f"step {self.step} of {self.steps}")
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            torch.set_rng_state(state["random"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(state["random_cuda"], self.device)
        epoch, step = divmod(self.step, self.batches.steps)
        print(f"{printable(self.settings.name)}: goes on from epoch {epoch}, step {step} of {self.batches.steps}")

    def _check_identity(self, other: dict[str, Any]) -> None:
        names = [name for name in {**self.identity, **other} if self.identity.get(name) != other.get(name)]
        if names:
            changes = ", ".join(f"{name} {other.get(name)} then, {self.identity.get(name)} now" for name in names)
            raise ValueError(
                f"{self.folder} holds a run with other settings ({changes}); repeat them, give another --out, or "
                "remove the folder"
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The folder to ourselves; the lock goes with the process, however that ends."""
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RuntimeError(f"another process is at the run in {self.folder}; wait for it") from error
            yield
        finally:
            os.close(handle)


def _save_embeddings(path: Path, embeddings: Tensor, labels: Tensor) -> None:
    with path.open("wb") as file:  # by its name, numpy would add .npz to it
        np.savez(file, embeddings=embeddings.numpy(), labels=labels.numpy())


def _check_pairs(images: Images) -> None:
    """OPIS is over thresholds that 1 % to 10 % of the negative pairs pass, of which there must be one."""
    total = len(images.labels)
    same = int((np.bincount(images.labels) ** 2).sum())
    negatives = (total**2 - same) // 2
    if negatives < 10:
        raise ValueError(
            f"the test part has {negatives} pairs of images of different classes, too few for OPIS, which looks at 1 % "
            "to 10 % of them; at least 10 are needed"
        )


@contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    """An error on a checkpoint's contents says which file it is."""
    try:
        yield
    except Exception as error:  # torch and pickle raise what they like on garbage, some with advice for another case
        why = getattr(error, "strerror", None) or type(error).__name__
        raise ValueError(f"{path} is damaged or of another version ({why}); remove it to start anew") from error
