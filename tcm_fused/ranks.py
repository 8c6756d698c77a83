"""The ranks of a process group: they agree, gather rows, pass them round a ring, and fail together."""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist  # which `import torch` has imported already
from torch import Tensor

from tcm_fused.arguments import Rows

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def member_of(group: "dist.ProcessGroup | DeviceMesh | None") -> "dist.ProcessGroup":
    """The process group; RuntimeError if there is none, or this process is not in it."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "DistributedTCMLoss needs a process group: call torch.distributed.init_process_group() first, in a "
            "program started by torchrun; in a single process use TCMLoss"
        )
    if group is None:
        group = dist.group.WORLD
    elif hasattr(group, "get_group"):  # a DeviceMesh
        group = group.get_group()
    if group is None or dist.get_rank(group) < 0:
        raise RuntimeError("this process is not in the process group of DistributedTCMLoss; call it on members only")
    return group


@dataclass
class Agreement:
    """This rank's word to the others, written inside `together`, and theirs, which are there after it."""

    number: int = 0
    terms: str = ""  # must be the same on all ranks
    device: torch.device | None = None  # of the tensors at work: tells the word where the group has no CPU backend
    numbers: list[int] = field(default_factory=list)  # of all ranks, in their order


@contextlib.contextmanager
def together(group: "dist.ProcessGroup") -> Iterator[Agreement]:
    """Around work that must be done on all ranks or on none.

    Raises on all ranks if the body raises on any: there that error, and RuntimeError, which repeats it, on the others.
    ValueError on all if their terms differ.
    """
    agreement = Agreement()
    failure: Exception | None = None
    try:
        yield agreement
    except Exception as error:  # raised below, when the others know
        failure = error
    text = agreement.terms if failure is None else f"{type(failure).__name__}: {failure}"
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], signed=True)
    header = [-1, 0] if failure is not None else [agreement.number, digest]
    headers = all_gather(torch.tensor([header], device=_telling_device(agreement, group)), group).tolist()
    if all(header[0] >= 0 and header[1] == headers[0][1] for header in headers):
        agreement.numbers = [number for number, _ in headers]
        return
    texts = [""] * len(headers)
    with _with_others():
        dist.all_gather_object(texts, text, group)
    if failure is not None:
        raise failure
    failed = [rank for rank, header in enumerate(headers) if header[0] < 0]
    if failed:
        reasons = "; ".join(f"rank {rank}: {texts[rank]}" for rank in failed)
        raise RuntimeError(f"DistributedTCMLoss cannot go on without all ranks, and of these failed: {reasons}")
    raise ValueError(
        "the ranks of DistributedTCMLoss disagree; all must pass embeddings of one width, dtype and device type, and "
        "use the same options:\n" + "\n".join(f"  rank {rank}: {text}" for rank, text in enumerate(texts))
    )


def device_types(group: "dist.ProcessGroup") -> list[str]:
    """The device types between which the group communicates."""
    return [entry.split(":")[0] for entry in dist.get_backend_config(group).split(",")]


def _telling_device(agreement: Agreement, group: "dist.ProcessGroup") -> torch.device:
    """The CPU where the group has it, so that no GPU is waited for; else that of the tensors at work."""
    devices = device_types(group)
    if "cpu" in devices:
        return torch.device("cpu")
    if agreement.device is not None and agreement.device.type in devices:
        return agreement.device
    return torch.device(devices[0])


@contextlib.contextmanager
def _with_others() -> Iterator[None]:
    """Around communication: its errors become one that says which ranks to look at."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            "DistributedTCMLoss lost the other ranks: one has failed, or did not call the loss within the group's "
            f"timeout; see its own error ({error})"
        ) from error


def all_gather(t: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """[ranks * N, ...] of t [N, ...], which has the same shape on all ranks."""
    gathered = t.new_empty((dist.get_world_size(group) * t.shape[0], *t.shape[1:]))
    if t.numel():
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before 2.13
        with _with_others():
            gather(gathered, t, group)
    return gathered


def all_sum(t: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """The sum of t, which has the same shape on all ranks."""
    if t.numel():
        with _with_others():
            dist.all_reduce(t, group=group)
    return t


@dataclass(frozen=True)
class Packed:
    """Rows as they travel: plain bytes and numbers in one layout, whatever that of the embeddings was."""

    x: Tensor  # [N, bytes of a row] uint8
    ids: Tensor  # [N, 1 or 2] int64: labels, and groups where there are any
    dtype: torch.dtype  # of the embeddings

    def padded(self, n: int) -> "Packed":
        """With n rows in all; those added take part in no pair."""
        missing = n - len(self.ids)
        if missing == 0:
            return self
        x = torch.cat([self.x, self.x.new_zeros(missing, self.x.shape[1])])
        return Packed(x, torch.cat([self.ids, self.ids.new_full((missing, self.ids.shape[1]), -1)]), self.dtype)

    def rows(self) -> Rows:
        """The rows again, without a copy."""
        y, *groups = self.ids.unbind(1)
        return Rows(self.x.view(self.dtype), y, groups[0] if groups else None)


def pack(rows: Rows) -> Packed:
    """A copy. (A view as bytes wants a last stride of 1, which a contiguous tensor of one column need not have.)"""
    x = torch.empty(rows.x.shape, dtype=rows.x.dtype, device=rows.x.device)
    x.copy_(rows.x.detach())
    ids = [rows.y] if rows.groups is None else [rows.y, rows.groups]
    return Packed(x.view(torch.uint8), torch.stack(ids, 1), x.dtype)


def gather(packed: Packed, n: int, group: "dist.ProcessGroup") -> Rows:
    """All ranks' rows, in rank order, n of each."""
    mine = packed.padded(n)
    return Packed(all_gather(mine.x, group), all_gather(mine.ids, group), mine.dtype).rows()


def ring(packed: Packed, n: int, group: "dist.ProcessGroup") -> Iterator[Rows]:
    """The rows of each rank in turn, n of each, this rank's first: those of the next arrive while these are worked on.

    All must be taken, or other ranks wait for rows that are never passed on; and none kept, or more than two ranks'
    rows are held at once.
    """
    held = packed.padded(n)
    world = dist.get_world_size(group)
    for step in range(world):
        with _passing_on(held, group) if step < world - 1 else contextlib.nullcontext(held) as arriving:
            yield held.rows()
        held = arriving


@contextlib.contextmanager
def _passing_on(held: Packed, group: "dist.ProcessGroup") -> Iterator[Packed]:
    """Inside, `held` goes to the next rank; after that, the rows of the rank before are there."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    arriving = Packed(torch.empty_like(held.x), torch.empty_like(held.ids), held.dtype)
    messages = []
    for tag, (sent, received) in enumerate(((held.x, arriving.x), (held.ids, arriving.ids))):
        if sent.numel():  # as on all ranks, or on none
            messages.append(dist.P2POp(dist.isend, sent, group=group, tag=tag, group_peer=(rank + 1) % world))
            messages.append(dist.P2POp(dist.irecv, received, group=group, tag=tag, group_peer=(rank - 1) % world))
    with _with_others():
        works = dist.batch_isend_irecv(messages) if messages else []
    try:
        yield arriving
    finally:  # after an error too, so that a later call does not receive the rows of this one
        with _with_others():
            for work in works:
                work.wait()
