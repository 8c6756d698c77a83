"""`DistributedTCMLoss`: the loss of one batch whose rows lie on the ranks of a process group.

With rows i of this rank and columns j of all ranks, the penalties of the pairs (i, j) add up over ranks to those of the
whole batch, and so do the counts. The gradient by this rank's rows needs the pairs (j, i) too: s_ij = s_ji, so it is
twice that of the pairs (i, j) by their rows alone, and backward communicates nothing.
"""

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist  # which `import torch` has imported already
from torch import Tensor

from tcm_fused.arguments import Options, Rows, check_choice, check_sets, one_fp16_product
from tcm_fused.backends.choice import choose
from tcm_fused.backends.numerics import loss_dtype
from tcm_fused.backends.operators import WithGradient, wants_gradient
from tcm_fused.loss import TCMLoss
from tcm_fused.pair_sums import PairSums, add, pair_sums
from tcm_fused.tracing import eager_when_compiled

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
_REFUSED = {
    "indices_tuple": "TCM finds its hard pairs itself; leave the miner out",
    "ref_emb": "the columns are the embeddings of all ranks; for a memory bank use CrossBatchMemory",
    "ref_labels": "the columns are the embeddings of all ranks; for a memory bank use CrossBatchMemory",
    "ref_groups": "the columns are the embeddings of all ranks, whose groups are gathered with them",
}


class DistributedTCMLoss(TCMLoss):
    """The TCM loss of the global batch, exactly, where every rank of a process group passes its own part of it.

    Rank by rank the parts make up the global batch; they may differ in size, and be empty. The value is that of the
    whole batch and has the same bits on every rank; `stats` is of the whole batch as well. Every rank must call it, in
    training and evaluation alike. Works on whatever the group communicates with; tested with gloo on CPUs, written for
    but not run on NCCL. The gradient of the embeddings [n, D] of a rank is complete without any communication in
    backward.

    Args, beyond those of `TCMLoss`:
        process_group: the ranks that share the batch, as a ProcessGroup or a DeviceMesh of one dimension; None is the
            default group. A deep copy of the module shares it; with one the module cannot be pickled.
        grad_reduction: "mean", the gradient is multiplied by the number of ranks, for wrappers that average the
            parameters' gradients over ranks (DistributedDataParallel, fully_shard): the average is then that of one
            process with the global batch. "sum", the plain gradient of the global loss, for those that add them up.
        ring: embeddings go round from rank to rank, so that no rank ever holds more than two ranks' columns, while
            without it each holds them all. Same result but for the order of summation; 16-bit embeddings are made
            float32, one rank's at a time. The work is the same, and passing on overlaps with it.

    Communication, with n the largest part: 16 bytes of each rank, its sizes and terms, whose answer the host waits for;
    then n (D + 1) numbers of each rank; 16 bytes, whether its work was done, which the host waits for; and its sums,
    48 bytes. A group made with "cpu:gloo,cuda:nccl" (or without naming a backend) tells sizes and success through the
    CPU, so that the host does not wait for the GPU.

    Under torch.compile it runs eagerly, between two graphs; with fullgraph=True it is refused.

    Raises:
        TypeError, ValueError: this rank's arguments are wrong, as in `tcm_loss`. The other ranks then raise at once
            RuntimeError with the same message. So they do where this rank's work fails later, for want of memory for
            example, and all can go on after that; not if it is the memory for the columns themselves that is missing.
        ValueError: the ranks disagree in D, dtype, device type or options. Raised on all.
        RuntimeError: no process group; or another rank has failed or does not call, once the group's timeout is over.

    Example:
        >>> criterion = DistributedTCMLoss(margin_plus=0.9, margin_minus=0.5, grad_reduction="mean")
        >>> criterion
        DistributedTCMLoss(margin_plus=0.9, margin_minus=0.5, lambda_plus=1.0, lambda_minus=1.0, penalty='hinge', \
reduction='violating', group_pairs='within', precision='auto', backend='auto', grad_reduction='mean', ring=False)
    """

    def __init__(
        self,
        *args: Any,
        process_group: "dist.ProcessGroup | DeviceMesh | None" = None,
        grad_reduction: str = "mean",
        ring: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        check_choice("grad_reduction", grad_reduction, ("mean", "sum"))
        self.process_group = process_group
        self.grad_reduction = grad_reduction
        self.ring = ring

    @eager_when_compiled("the ranks tell each other their sizes")
    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        groups: Tensor | None = None,
        ref_groups: Tensor | None = None,
    ) -> Tensor:
        """The loss of the global batch, of which `embeddings` [n, D], `labels` [n] and `groups` [n] are this rank's.

        All other arguments must be None.
        """
        given = {
            "indices_tuple": indices_tuple,
            "ref_emb": ref_emb,
            "ref_labels": ref_labels,
            "ref_groups": ref_groups,
        }

        def check() -> tuple[Rows, None]:
            for name, value in given.items():
                if value is not None:
                    raise ValueError(f"{name} must be None: {_REFUSED[name]}")
            return self._check(embeddings, labels, groups), None

        return self._global(check)[0]

    def against_bank(
        self,
        embeddings: Tensor,
        labels: Tensor,
        groups: Tensor | None,
        make_bank: Callable[[Rows], Rows | None],
    ) -> tuple[Tensor, Rows]:
        """As `TCMLoss.against_bank`, for the global batch and a bank that is the same on every rank."""

        def check() -> tuple[Rows, Rows | None]:
            if self.ring:
                raise ValueError("ring=True never holds the global batch, which a memory stores; use ring=False")
            rows = self._check(embeddings, labels, groups)
            return rows, make_bank(rows)

        loss, batch = self._global(check)
        assert batch is not None
        return loss, batch

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, grad_reduction={self.grad_reduction!r}, ring={self.ring!r}"

    def __deepcopy__(self, memo: dict[int, Any]) -> "DistributedTCMLoss":
        memo[id(self.process_group)] = self.process_group  # shared: it is of the process
        memo[id(self)] = twin = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group is not None:
            raise TypeError(
                "DistributedTCMLoss with a process_group cannot be pickled: the group is of this process alone; save "
                "state_dict(), or set process_group to None before and again after loading"
            )
        return self.__dict__

    def _check(self, embeddings: Tensor, labels: Tensor, groups: Tensor | None) -> Rows:
        """All that can be wrong on this rank alone."""
        options = self._checked_options()
        check_choice("grad_reduction", self.grad_reduction, ("mean", "sum"))
        for name, value in (("embeddings", embeddings), ("labels", labels), ("groups", groups)):
            if hasattr(value, "to_local"):
                raise TypeError(f"{name} must be this rank's own rows, got {type(value).__name__}; pass .to_local()")
        rows, _ = check_sets(embeddings, labels, None, None, None, groups, None)
        options.weights(rows.x), options.margins(rows.x)
        choose(options.backend, rows.x.device.type, rows.x.dtype, options.penalty == "squared")
        # So that rows without a label have gradient 0 where that of all others is NaN.
        return rows._replace(x=torch.where((rows.y >= 0)[:, None], rows.x, 0))

    def _global(self, check: Callable[[], tuple[Rows, Rows | None]]) -> tuple[Tensor, Rows | None]:
        """The loss, and the global batch unless it went round the ring."""
        group = _member_of(self.process_group)
        options = self.options
        (rows, bank), sizes = _agree(check, self._terms, group)
        n = max(sizes)
        columns = None if self.ring else _gather(rows, n, group)
        sums = _ring_sums(rows, n, group, options) if columns is None else None

        def work() -> tuple[PairSums, Tensor]:
            batch = pair_sums(rows, columns, n * dist.get_rank(group), options) if sums is None else sums()
            if bank is None:
                return batch, 2 * batch.penalty  # the gradient of pairs (i, j), and of (j, i) on other ranks
            stored = pair_sums(rows, bank, None, options)  # of columns that are constant
            return add([batch, stored]), 2 * batch.penalty + stored.penalty

        (mine, complete), _ = _together(lambda: (work(), 0, "", rows.x.device), group)
        total = _add_up(mine, group)
        self._seen = total.penalty, total.hard, loss_dtype(rows.x)
        divisor = total.divisor.clamp_min(1).double()
        weights = options.weights(rows.x)
        weight = torch.stack([weights[0] / divisor[0], weights[1] / divisor[1]])
        if self.grad_reduction == "mean":
            weight *= len(sizes)
        # All rows' gradients are NaN then, those too that were never with the one that is not finite (in no group).
        weight = torch.where(total.penalty.isnan().any(), torch.nan, weight)
        loss = total.loss(weights).to(loss_dtype(rows.x))
        return WithGradient.apply(complete, loss, weight), columns

    def _terms(self, rows: Rows, bank: Rows | None) -> str:
        """What all ranks must agree on."""
        options = self.options
        numbers = [float(value) if not isinstance(value, str) else value for value in options]
        return (
            f"embeddings of D={rows.x.shape[1]} in {rows.x.dtype} on {rows.x.device.type}, "
            f"groups {'given' if rows.groups is not None else 'not given'}, "
            f"{'fp16' if one_fp16_product(rows.x, options.precision) else 'fp32'} products, "
            f"{0 if bank is None else len(bank.y)} rows of a memory, "
            f"{type(self).__name__}({', '.join(map(repr, numbers))}, {self.grad_reduction!r}, ring={self.ring!r})"
        )


def _member_of(group: "dist.ProcessGroup | DeviceMesh | None") -> "dist.ProcessGroup":
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


@contextlib.contextmanager
def _with_others() -> Iterator[None]:
    """Around what all ranks take part in: says what its failure means."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            "DistributedTCMLoss lost the other ranks: one has failed, or did not call the loss within the group's "
            f"timeout; see its own error ({error})"
        ) from error


def _agree(
    check: Callable[[], tuple[Rows, Rows | None]],
    terms: Callable[[Rows, Rows | None], str],
    group: "dist.ProcessGroup",
) -> tuple[tuple[Rows, Rows | None], list[int]]:
    """What `check` returns here, and the sizes of all ranks' parts; raises on all ranks if it raises on any."""

    def checked() -> tuple[tuple[Rows, Rows | None], int, str, torch.device]:
        rows, bank = check()
        devices = _devices(group)
        if rows.x.device.type not in devices:
            raise ValueError(
                f"embeddings are on {rows.x.device}, but the process group communicates between "
                f"{' and '.join(devices)} only; move them, or add a backend to init_process_group"
            )
        return (rows, bank), len(rows.y), terms(rows, bank), rows.x.device

    return _together(checked, group)


def _together(work: Callable[[], tuple[T, int, str, torch.device]], group: "dist.ProcessGroup") -> tuple[T, list[int]]:
    """What `work` returns here, and the number that it returns on each rank, if the text is the same on all.

    Raises on all ranks if it raises on any: there what it raised, and RuntimeError on the others. Of the devices that
    can tell it is the CPU that does, or else that of `work`'s tensors.
    """
    devices = _devices(group)
    device = torch.device("cpu" if "cpu" in devices else devices[0])
    failure: Exception | None = None
    try:
        result, number, text, where = work()
        header = [number, int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], signed=True)]
        if device.type != "cpu":
            device = where
    except Exception as error:  # raised below, when the others know
        failure, text, header = error, f"{type(error).__name__}: {error}", [-1, 0]
    headers = _all_gather(torch.tensor([header], device=device), group).tolist()
    if all(header[0] >= 0 and header[1] == headers[0][1] for header in headers):
        return result, [number for number, _ in headers]
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


def _devices(group: "dist.ProcessGroup") -> list[str]:
    """The device types between which the group communicates."""
    return [entry.split(":")[0] for entry in dist.get_backend_config(group).split(",")]


def _all_gather(t: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """[ranks * N, ...] of t [N, ...], which has the same shape on all ranks."""
    gathered = t.new_empty((dist.get_world_size(group) * t.shape[0], *t.shape[1:]))
    if t.numel():
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before 2.13
        with _with_others():
            gather(gathered, t, group)
    return gathered


def _pack(rows: Rows, n: int) -> tuple[Tensor, Tensor]:
    """x as bytes [n, ...] and labels and groups [n, 1 or 2], padded to n rows by such as take no part."""
    x = rows.x.detach().contiguous().view(torch.uint8)
    ids = rows.y[:, None] if rows.groups is None else torch.stack([rows.y, rows.groups], 1)
    missing = n - len(rows.y)
    pad = torch.nn.functional.pad
    return pad(x, (0, 0, 0, missing)).contiguous(), pad(ids, (0, 0, 0, missing), value=-1).contiguous()


def _unpack(packed: tuple[Tensor, Tensor], dtype: torch.dtype) -> Rows:
    x, ids = packed
    y, *groups = ids.unbind(1)
    return Rows(x.view(dtype), y, groups[0] if groups else None)


def _gather(rows: Rows, n: int, group: "dist.ProcessGroup") -> Rows:
    """All ranks' rows, in rank order, n of each."""
    x, ids = (_all_gather(t, group) for t in _pack(rows, n))
    return _unpack((x, ids), rows.x.dtype)


def _ring_sums(rows: Rows, n: int, group: "dist.ProcessGroup", options: Options) -> Callable[[], PairSums]:
    """Gives the sums over this rank's rows and the columns of all ranks, which arrive one rank after the other.

    What fails here is raised by the function that is returned: columns that others wait for are passed on first.
    """
    dtype, wide = rows.x.dtype, loss_dtype(rows.x)
    options = options._replace(precision="fp16" if one_fp16_product(rows.x, options.precision) else "fp32")
    wanted = wants_gradient(rows.x)
    failure: Exception | None = None
    parts: list[PairSums] = []
    held = _pack(rows, n)
    world = dist.get_world_size(group)
    for step in range(world):
        with _passing_on(held, group) if step < world - 1 else contextlib.nullcontext(held) as arriving:
            try:
                if step == 0:
                    x = rows.x.detach().to(wide).requires_grad_(wanted)  # gradients are added up before rounding
                    grad = x.new_zeros((2 if wanted else 0, *x.shape))
                if failure is None:
                    parts.append(_ring_part(rows._replace(x=x), _unpack(held, dtype) if step else None, grad, options))
            except Exception as error:
                failure = error
        held = arriving

    def sums() -> PairSums:
        if failure is not None:
            raise failure
        total = add(parts)
        return total._replace(penalty=WithGradient.apply(rows.x, total.penalty, grad)) if wanted else total

    return sums


def _ring_part(rows: Rows, columns: Rows | None, grad: Tensor, options: Options) -> PairSums:
    """The sums with one rank's columns (None: the rows), as constants; their gradient is added to `grad` [2, N, D].

    Nothing is left of the columns after that: the graph, which holds them, ends here.
    """
    if columns is not None:
        columns = columns._replace(x=columns.x.to(rows.x.dtype))
    part = pair_sums(rows, columns, None, options)
    for side in range(len(grad)):
        (by_side,) = torch.autograd.grad(part.penalty[side], rows.x, retain_graph=side == 0)
        # Where rows are columns it is that of the pairs (j, i) too, which a factor 2 will stand for.
        grad[side] += by_side / 2 if columns is None else by_side
    return part._replace(penalty=part.penalty.detach())


@contextlib.contextmanager
def _passing_on(held: tuple[Tensor, Tensor], group: "dist.ProcessGroup") -> Iterator[tuple[Tensor, Tensor]]:
    """Inside, `held` goes to the next rank; after that, what comes from the rank before is there."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    arriving = torch.empty_like(held[0]), torch.empty_like(held[1])
    messages = []
    for tag, (sent, received) in enumerate(zip(held, arriving, strict=True)):
        if sent.numel():  # as on all ranks, or on none
            messages.append(dist.P2POp(dist.isend, sent, group=group, tag=tag, group_peer=(rank + 1) % world))
            messages.append(dist.P2POp(dist.irecv, received, group=group, tag=tag, group_peer=(rank - 1) % world))
    with _with_others():
        works = dist.batch_isend_irecv(messages) if messages else []
    try:
        yield arriving
    finally:  # after an error too, so that a later call does not receive what was sent in this one
        with _with_others():
            for work in works:
                work.wait()


def _add_up(mine: PairSums, group: "dist.ProcessGroup") -> PairSums:
    """Over all ranks, in rank order, so that each gets the same bits: gathered, since a reduction promises no order."""
    packed = torch.cat([mine.penalty.detach().double().view(torch.int64), mine.hard, mine.divisor])
    penalty, hard, divisor = _all_gather(packed[None], group).unflatten(1, (3, 2)).unbind(1)
    return PairSums(penalty.contiguous().view(torch.float64).sum(0), hard.sum(0), divisor.sum(0))
