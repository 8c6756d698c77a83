"""Lightning: a callback that logs hard pairs while training, and OPIS at validation.

Example:
    from tcm_fused.integrations.lightning import TCMCallback

    trainer = Trainer(callbacks=[TCMCallback(embeddings=lambda outputs, batch: (outputs["embeddings"], batch[1]))])
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tcm_fused.integrations.logging import KEYS, HardPairs

try:
    from lightning.pytorch import Callback, LightningModule, Trainer

    from tcm_fused.thresholds.metric import OPIS
except ImportError as error:
    raise ImportError(
        "tcm_fused.integrations.lightning needs Lightning and torchmetrics: pip install lightning torchmetrics"
    ) from error


class TCMCallback(Callback):
    """Logs the hard pairs of the TCM losses of a `LightningModule`, and the OPIS of its validation embeddings.

    For each training batch of this process: "tcm/hard_positives", "tcm/hard_negatives", "tcm/violation_positives" and
    "tcm/violation_negatives" (mean violations); with "_epoch" behind their names, means over the epoch's batches of all
    processes. They stay on the device until Lightning's `log_every_n_steps` asks for them. Of several losses
    "tcm/NAME/hard_positives" and so on, nan at a batch that did not call it, and "_epoch" over those that did.

    For each validation, of all its embeddings together and from all processes: "tcm/opis", "tcm/eps_opis" and
    "tcm/recall_at_1", which `ModelCheckpoint(monitor="tcm/opis")` can watch; with the option `threshold`, the one that
    is deployed, its rates "tcm/far" and "tcm/frr" too. With several validation loaders the names
    end in "/dataloader_0", "/dataloader_1", ... A score that the embeddings do not have (no class twice, as in a run of
    one batch, or embeddings that have collapsed) is NaN; the first time there is a warning with the reason. Lightning's
    `EarlyStopping` ends a run at NaN unless it has `check_finite=False`.

    Args:
        criterion: a module that has the TCM losses in it, if they are not in the `LightningModule`.
        embeddings: takes the output of `validation_step` and the batch, and returns embeddings [N, D] and labels [N].
            None: no OPIS.
        options: those of `tcm_fused.OPIS`.
    """

    def __init__(
        self,
        criterion: nn.Module | None = None,
        embeddings: Callable[[Any, Any], tuple[Tensor, Tensor]] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if options and embeddings is None:
            raise TypeError(f"{', '.join(options)}: options of OPIS, which needs embeddings=")
        self._make_opis(options)  # so that a wrong option is an error here
        self.criterion = criterion
        self.embeddings = embeddings
        self.options = options
        self._pairs = HardPairs({})  # of the training that is under way
        self._opis: list[OPIS] = []  # of each validation loader
        self._warned = False  # of a score that is NaN

    @staticmethod
    def _make_opis(options: dict[str, Any]) -> OPIS:
        return OPIS(**options, details=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for the TCM losses."""
        self._pairs = HardPairs({"criterion": self.criterion, "": pl_module})
        self._pairs.warn_if_none("give the module that has it in it as criterion=")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set aside the calls before the batch."""
        self._pairs.start_batch()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the hard pairs of the batch."""
        # nan where a loss was not called, since Lightning would log its value of an earlier batch again.
        none = torch.full((len(KEYS),), torch.nan, dtype=torch.float32, device=pl_module.device)
        stats = dict.fromkeys(self._pairs.losses, none) | self._pairs.end_batch()
        pl_module.log_dict(self._pairs.by_key(stats), on_step=True, on_epoch=False, batch_size=1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the means over the epoch, of all processes."""
        if not self._pairs.losses:
            return
        # By every process, and of all losses: some may be called by some processes only.
        sums = trainer.strategy.reduce(self._pairs.take_sums(pl_module.device), reduce_op="sum")
        means = {f"{key}_epoch": value for key, value in self._pairs.means(sums).items()}
        pl_module.log_dict(means, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One for each loader, also where this process gets no batch of it: all processes gather at the end."""
        self._opis = []
        if self.embeddings is not None and not trainer.sanity_checking:
            loaders = len(trainer.num_val_batches)
            self._opis = [self._make_opis(self.options).to(pl_module.device) for _ in range(loaders)]

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the embeddings of the batch."""
        if self.embeddings is not None and self._opis:
            self._opis[dataloader_idx].update(*self.embeddings(outputs, batch))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the scores of each loader."""
        for index, metric in enumerate(self._opis):
            suffix = f"/dataloader_{index}" if len(self._opis) > 1 else ""
            metric.warned = self._warned
            scores = {f"tcm/{name}{suffix}": value.float() for name, value in metric.compute().items()}
            self._warned = metric.warned
            pl_module.log_dict(scores, sync_dist=True, batch_size=1)  # all processes have the same
        self._opis = []
