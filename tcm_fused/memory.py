"""`CrossBatchMemory`: the loss of a batch against itself and a bank of past batches."""

import numbers
from typing import Any

import torch
from torch import Tensor, nn

from tcm_fused.loss import TCMLoss
from tcm_fused.ops import eager_when_compiled
from tcm_fused.pair_sums import Rows

_NO_GROUP = torch.iinfo(torch.int64).min  # of what was stored without groups


class CrossBatchMemory(nn.Module):
    r"""TCM against the batch and the last `size` embeddings before it: many more pairs from a small batch.

    With rows i of the batch and a bank of stored embeddings, the loss is that of all ordered pairs (i, j), j in the
    batch or in the bank, j not i itself:

        L = lambda+ / n+ * sum_{H+} (m+ - s_ij)  +  lambda- / n- * sum_{H-} (s_ij - m-),

    n+ and n- the hard pairs among them. Its gradient is exact, with the bank constant: a pair of the batch acts on both
    of its embeddings, a pair with the bank on that of the batch. With an empty bank value and gradient are those of the
    loss itself. (In pytorch-metric-learning's class of this name the batch is stored first and taken from the memory as
    constant: same pairs for a memory that is one batch larger, but a pair of the batch acts half as much.)

    Then the batch is stored, detached, in place of the oldest: in training mode only, not in evaluation. Rows with a
    negative label and rows that are not finite are left out; of a batch larger than the bank the last rows stay. The
    bank has the dtype of the first batch. Nothing waits for the device, but for `groups`. Under torch.compile it runs
    eagerly.

    The bank is made of buffers, so it is saved, loaded and moved with the module (move it before loading).

    Args:
        loss: a `TCMLoss`, or a `DistributedTCMLoss`: every rank then stores the whole global batch, so that the bank
            is the same on each, bit by bit, and the loss is that of the global batch. Not with ring=True.
        size: embeddings that the bank holds, at least 1.
        warm_up: calls in training mode, from the first, in which the bank is neither used nor filled: embeddings move
            fast in the beginning, and old ones mislead.

    Raises:
        TypeError, ValueError: `loss`, `size` or `warm_up` is not as above. Calls raise what `loss` raises, and
            ValueError if embeddings are not of the width, or on the device, of the bank.

    Source: Wang et al., Cross-Batch Memory for Embedding Learning, CVPR 2020 (arXiv 1912.06798).

    Example:
        >>> criterion = CrossBatchMemory(TCMLoss(), size=1024, warm_up=2)
        >>> for _ in range(5):
        ...     criterion(torch.randn(8, 4, requires_grad=True), torch.arange(8) % 2).backward()
        >>> criterion.filled
        24
    """

    embeddings: Tensor  # [size, D]; D is 0 before the first batch is stored
    labels: Tensor  # [size] int64, -1 where nothing is stored
    groups: Tensor  # [size] int64
    position: Tensor  # [] int64, the oldest slot, which is written next

    def __init__(self, loss: TCMLoss, size: int, warm_up: int = 0) -> None:
        super().__init__()
        if not isinstance(loss, TCMLoss):
            raise TypeError(f"loss must be a TCMLoss or a DistributedTCMLoss, got {type(loss).__name__}")
        for name, value, least in (("size", size, 1), ("warm_up", warm_up, 0)):
            if not isinstance(value, numbers.Integral) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.loss = loss
        self.size = int(size)
        self.warm_up = int(warm_up)
        self.calls = 0  # in training mode
        self.filled = 0  # no slot from here on is filled; kept here, so that no one waits for the device to tell it
        self.register_buffer("embeddings", torch.empty(self.size, 0))
        self.register_buffer("labels", torch.full((self.size,), -1))
        self.register_buffer("groups", torch.full((self.size,), _NO_GROUP))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @eager_when_compiled("the number of filled slots changes from call to call")
    def forward(self, embeddings: Tensor, labels: Tensor, groups: Tensor | None = None) -> Tensor:
        """The loss of `embeddings` [N, D], `labels` [N] and, as in `tcm_loss`, `groups` [N].

        With groups, what was stored without any takes no part.
        """
        loss, batch = self.loss.against_bank(embeddings, labels, groups, self._bank)
        if self.training:
            self.calls += 1
            if self.calls > self.warm_up:
                self._store(batch)
        return loss

    def _bank(self, batch: Rows) -> Rows | None:
        """What is stored, in the dtype of the batch; None if nothing is."""
        if self.embeddings.shape[1] == 0:
            return None
        if self.embeddings.shape[1] != batch.x.shape[1]:
            raise ValueError(
                f"embeddings have D={batch.x.shape[1]}, the memory holds D={self.embeddings.shape[1]}; they must agree"
            )
        if self.embeddings.device != batch.x.device:
            raise ValueError(
                f"embeddings are on {batch.x.device}, the memory on {self.embeddings.device}; move the memory with "
                f".to({str(batch.x.device)!r})"
            )
        if self.filled == 0:
            return None
        x, y, groups = (t[: self.filled] for t in (self.embeddings, self.labels, self.groups))
        if batch.groups is None:
            return Rows(x.to(batch.x.dtype), y, None)
        return Rows(x.to(batch.x.dtype), torch.where(groups == _NO_GROUP, -1, y), groups)

    @torch.no_grad()
    def _store(self, batch: Rows) -> None:
        """The last rows that can be stored, in their order, from `position` on, round the end of the bank.

        How many there are only the device knows. So the slots behind them are written as well, with what they hold.
        """
        x, y, groups = batch
        if self.embeddings.shape[1] == 0:
            self.embeddings = x.new_zeros(self.size, x.shape[1])
            self.to(x.device)
        n = min(len(y), self.size)
        if groups is None:
            groups = y.new_full(y.shape, _NO_GROUP)
        stays = (y >= 0) & x.isfinite().all(1)
        last = stays.argsort(stable=True)[len(y) - n :]
        count = stays.sum()
        slots = (self.position + count - n + torch.arange(n, device=y.device)) % self.size
        for bank, new in ((self.embeddings, x), (self.labels, y), (self.groups, groups)):
            written = stays[last].view(-1, *[1] * (bank.ndim - 1))
            bank[slots] = torch.where(written, new[last].to(bank.dtype), bank[slots])
        self.position.copy_((self.position + count) % self.size)
        self.filled = min(self.size, self.filled + n)

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls, "filled": self.filled}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls, self.filled = state["calls"], state["filled"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """A bank of another width is loaded where one of the two is empty; torch's own message tells all else."""
        saved = state_dict.get(prefix + "embeddings")
        if isinstance(saved, Tensor) and 0 in (*saved.shape[1:], self.embeddings.shape[1]):
            self.embeddings = saved.new_zeros(self.size, *saved.shape[1:], device=self.embeddings.device)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def extra_repr(self) -> str:
        return f"size={self.size}, warm_up={self.warm_up}"
