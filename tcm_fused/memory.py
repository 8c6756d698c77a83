"""`CrossBatchMemory`: the loss of a batch against itself and a bank of past batches."""

from typing import Any

import torch
from torch import Tensor, nn

from tcm_fused.arguments import Rows, check_whole
from tcm_fused.backends.numerics import EPS, loss_dtype
from tcm_fused.loss import TCMLoss
from tcm_fused.tracing import eager_when_compiled

_NO_GROUP = torch.iinfo(torch.int64).min  # of rows stored without groups


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
    bank has the dtype of the first batch; rows are stored over a power of two that brings them near length 1, which
    changes no similarity, so that they fit. Nothing waits for the device, but for `groups`. Under torch.compile it
    runs eagerly.

    The bank is made of buffers, so it is saved, loaded and moved with the module (move it before loading; a bank that
    does not fit is not loaded at all). DistributedDataParallel overwrites the buffers of all ranks by those of rank 0:
    inside a module that it wraps, use a memory of a `DistributedTCMLoss`, which is the same on all ranks, or
    `broadcast_buffers=False`.

    Args:
        loss: a `TCMLoss`, or a `DistributedTCMLoss`: every rank then stores the whole global batch, so that the bank
            is the same on each, bit by bit, and the loss is that of the global batch. Not with ring=True.
        size: embeddings that the bank holds, at least 1.
        warm_up: calls in training mode, from the first, in which the bank is neither used nor filled: embeddings move
            fast in the beginning, and old ones mislead.
        embedding_size: D, if it is known: the bank then has its shape from the beginning, which a checkpoint that is
            loaded in place (torch.distributed.checkpoint) needs, and the dtype and device of the module: float32 on
            the CPU unless that is cast or moved.

    Raises:
        TypeError, ValueError: an argument is not as above. Calls raise the errors of `loss`, and
            ValueError if embeddings are not of the width, or on the device, of the bank.

    Source: Wang et al., Cross-Batch Memory for Embedding Learning, CVPR 2020 (arXiv 1912.06798).

    Example:
        >>> criterion = CrossBatchMemory(TCMLoss(), size=1024, warm_up=2)
        >>> for _ in range(5):
        ...     criterion(torch.randn(8, 4, requires_grad=True), torch.arange(8) % 2).backward()
        >>> criterion.filled
        24
    """

    embeddings: Tensor  # [size, D]; D is 0 before the first batch is stored, unless it was given
    labels: Tensor  # [size] int64, -1 where nothing is stored
    groups: Tensor  # [size] int64
    position: Tensor  # [] int64, the oldest slot, which is written next

    def __init__(self, loss: TCMLoss, size: int, warm_up: int = 0, embedding_size: int | None = None) -> None:
        super().__init__()
        if not isinstance(loss, TCMLoss):
            raise TypeError(f"loss must be a TCMLoss or a DistributedTCMLoss, got {type(loss).__name__}")
        width = 1 if embedding_size is None else embedding_size
        for name, value, least in (("size", size, 1), ("warm_up", warm_up, 0), ("embedding_size", width, 1)):
            check_whole(name, value, least)
        self.loss = loss
        self.size = int(size)
        self.warm_up = int(warm_up)
        self.calls = 0  # in training mode
        self.filled = 0  # no slot from here on is filled; kept here, so that no one waits for the device to tell it
        self.register_buffer("embeddings", torch.zeros(self.size, int(embedding_size or 0), dtype=torch.float32))
        self.register_buffer("labels", torch.full((self.size,), -1))
        self.register_buffer("groups", torch.full((self.size,), _NO_GROUP))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @eager_when_compiled("the number of filled slots changes from call to call")
    def forward(self, embeddings: Tensor, labels: Tensor, groups: Tensor | None = None) -> Tensor:
        """The loss of `embeddings` [N, D], `labels` [N] and, as in `tcm_loss`, `groups` [N].

        With groups, rows that were stored without any take no part.
        """
        loss, batch = self.loss.against_bank(embeddings, labels, groups, self._stored(groups is not None))
        if self.training:
            self.calls += 1
            if self.calls > self.warm_up:
                self._store(batch)
        return loss

    def _stored(self, with_groups: bool) -> Rows | None:
        """The filled slots; None before the first batch is stored."""
        if self.embeddings.shape[1] == 0:
            return None
        x, y, groups = (t[: self.filled] for t in (self.embeddings, self.labels, self.groups))
        return Rows(x, torch.where(groups == _NO_GROUP, -1, y), groups) if with_groups else Rows(x, y, None)

    @torch.inference_mode(False)  # for the buffers, which are written in calls with gradients as well
    @torch.no_grad()
    def _store(self, batch: Rows) -> None:
        """The last rows that can be stored, in their order, from `position` on, round the end of the bank.

        Only the device knows how many there are. So the slots behind them are written as well, with their own rows.
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
        for bank, new in ((self.embeddings, _near_unit(x)), (self.labels, y), (self.groups, groups)):
            written = stays[last].view(-1, *[1] * (bank.ndim - 1))
            bank[slots] = torch.where(written, new[last].to(bank.dtype), bank[slots])
        self.position.copy_((self.position + count) % self.size)
        self.filled = min(self.size, self.filled + n)

    def get_extra_state(self) -> Tensor:
        """The numbers of calls and of filled slots, for `state_dict`."""
        return torch.tensor([self.calls, self.filled], device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """The same from a `state_dict`."""
        self.calls, self.filled = state.tolist()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """All of a bank or nothing; one of another width is loaded where one of the two is empty."""
        saved = state_dict.get(prefix + "embeddings")
        if isinstance(saved, Tensor) and saved.shape != self.embeddings.shape:
            if saved.ndim != 2 or len(saved) != self.size or 0 not in (saved.shape[1], self.embeddings.shape[1]):
                error_msgs.append(
                    f"size mismatch for {prefix}embeddings: a memory of shape {list(saved.shape)} does not fit into "
                    f"one of shape {list(self.embeddings.shape)}"
                )
                return
            self.embeddings = saved.new_zeros(saved.shape, device=self.embeddings.device)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not self.labels.is_meta:  # the number of filled slots may not have been saved with them
            stored = (self.labels >= 0).nonzero()
            self.filled = min(self.size, max(self.filled, int(stored.max()) + 1 if len(stored) else 0))

    def extra_repr(self) -> str:
        """Size and warm-up, as `repr` shows them."""
        return f"size={self.size}, warm_up={self.warm_up}"


def _near_unit(x: Tensor) -> Tensor:
    """Rows of x [N, D], in the dtype of the loss, divided by a power of two: no entry is above 4, as any dtype has it.

    The power is exact, or nearly, and all entries of a row have the same. Rows so small that the loss does not make
    them unit rows stay as they are.
    """
    x = x.to(loss_dtype(x))
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)  # of a large row infinite
    peak = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True)
    return x / torch.where(norm < EPS, 1, (peak / 2).log2().floor().exp2())
