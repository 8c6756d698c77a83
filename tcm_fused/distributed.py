"""`DistributedTCMLoss`: the loss of one batch whose rows lie on the ranks of a process group.

With rows i of this rank and columns j of all ranks, the penalties of the pairs (i, j) add up over ranks to those of the
whole batch, and so do the counts. The gradient by this rank's rows needs the pairs (j, i) too: s_ij = s_ji, so it is
twice that of the pairs (i, j) by their rows alone, and backward communicates nothing.
"""

import copy
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist  # which `import torch` has imported already
from torch import Tensor

from tcm_fused import ranks
from tcm_fused.arguments import Options, Rows, check_bank, check_choice, check_sets, joined, one_fp16_product
from tcm_fused.backends.choice import choose
from tcm_fused.backends.numerics import loss_dtype
from tcm_fused.backends.operators import wants_gradient, with_gradient
from tcm_fused.loss import TCMLoss
from tcm_fused.pair_sums import PairSums, add, pair_sums
from tcm_fused.tracing import eager_when_compiled

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

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

    With `hardest_negatives` a pair counts for the row that chose it. So the ranks add up their gradients by all M
    columns as well, with or without gradients: 2 M D numbers of each rank.

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
reduction='violating', group_pairs='within', precision='auto', backend='auto', hardest_negatives=None, \
grad_reduction='mean', ring=False)
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
        return self._global(embeddings, labels, groups, None, given)[0]

    def against_bank(
        self, embeddings: Tensor, labels: Tensor, groups: Tensor | None, bank: Rows | None
    ) -> tuple[Tensor, Rows]:
        """As `TCMLoss.against_bank`, for the global batch and a bank that is the same on every rank."""
        loss, batch = self._global(embeddings, labels, groups, bank, {}, stores=True)
        assert batch is not None
        return loss, batch

    def extra_repr(self) -> str:
        """The options, as `repr` shows them."""
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

    def _global(
        self,
        embeddings: Tensor,
        labels: Tensor,
        groups: Tensor | None,
        bank: Rows | None,
        given: dict[str, Any],
        stores: bool = False,
    ) -> tuple[Tensor, Rows | None]:
        """The loss, and the global batch unless it went round the ring. All of `given` must be None."""
        group = ranks.member_of(self.process_group)
        with ranks.together(group) as agreement:  # all that can be wrong on this rank alone
            for name, value in given.items():
                if value is not None:
                    raise ValueError(f"{name} must be None: {_REFUSED[name]}")
            if self.ring and self.hardest_negatives is not None:
                raise ValueError("ring=True never holds all columns, which hardest_negatives needs; use ring=False")
            if stores and self.ring:
                raise ValueError("ring=True never holds the global batch, which a memory stores; use ring=False")
            options = self._checked_options()
            check_choice("grad_reduction", self.grad_reduction, ("mean", "sum"))
            rows = self._checked_rows(embeddings, labels, groups, group)
            bank = check_bank(rows, bank)
            packed = ranks.pack(rows)
            agreement.number, agreement.device = len(rows.y), rows.x.device
            agreement.terms = self._terms(rows, bank)
        sizes = agreement.numbers
        n = max(sizes)
        columns = None if self.ring else ranks.gather(packed, n, group)
        passed = _ring_sums(rows, packed, n, group, options) if self.ring else None

        with ranks.together(group) as agreement:
            agreement.device = rows.x.device
            if isinstance(passed, Exception):
                raise passed
            first = n * dist.get_rank(group)
            if options.hardest_negatives is not None:
                assert columns is not None
                batch, grad, grad_columns = _hardest_sums(rows, columns, first, bank, options)
                bank = None
            else:
                batch = pair_sums(rows, columns, first, options) if passed is None else passed
                complete = 2 * batch.penalty  # the gradient of pairs (i, j), and of (j, i) on other ranks
            if bank is not None:
                stored = pair_sums(rows, bank, None, options)  # of columns that are constant
                batch, complete = add([batch, stored]), complete + stored.penalty
        if options.hardest_negatives is not None:  # of pairs (j, i) the other ranks tell
            grad += ranks.all_sum(grad_columns, group)[:, first : first + len(rows.y)]
            complete = with_gradient(batch.penalty, [grad], [rows.x])
        total = _add_up(batch, group)
        self.last_call = total.penalty, total.hard, loss_dtype(rows.x)
        divisor = total.divisor.clamp_min(1).to(total.penalty.dtype)
        weights = options.weights(rows.x)
        weight = torch.stack([weights[0] / divisor[0], weights[1] / divisor[1]])
        if self.grad_reduction == "mean":
            weight *= len(sizes)
        # All rows' gradients are NaN then, those too that were never with the one that is not finite (in no group).
        weight = torch.where(total.penalty.isnan().any(), torch.nan, weight)
        loss = total.loss(weights).to(loss_dtype(rows.x))
        return with_gradient(loss, [weight], [complete]), columns

    def _checked_rows(
        self, embeddings: Tensor, labels: Tensor, groups: Tensor | None, group: dist.ProcessGroup
    ) -> Rows:
        rows, _ = check_sets(embeddings, labels, None, None, None, groups, None, self.group_pairs)
        for values in (self.options.margins, self.options.weights):
            values(rows.x)  # raises if they are on another device
        hardest = self.hardest_negatives is not None
        choose(self.backend, rows.x.device.type, rows.x.dtype, self.penalty, hardest)
        devices = ranks.device_types(group)
        if rows.x.device.type not in devices:
            raise ValueError(
                f"embeddings are on {rows.x.device}, but the process group communicates between "
                f"{' and '.join(devices)} only; move them, or add a backend to init_process_group"
            )
        # So that rows without a label have gradient 0 where that of all others is NaN.
        return rows._replace(x=torch.where((rows.y >= 0)[:, None], rows.x, 0))

    def _terms(self, rows: Rows, bank: Rows | None) -> str:
        """Everything that all ranks must agree on, as text."""
        options = self.options
        numbers = [float(value) if isinstance(value, Real | Tensor) else value for value in options]
        return (
            f"embeddings of D={rows.x.shape[1]} in {rows.x.dtype} on {rows.x.device.type}, "
            f"groups {'given' if rows.groups is not None else 'not given'}, "
            f"{_precision(rows.x, options)} products, "
            f"{0 if bank is None else len(bank.y)} rows of a memory, "
            f"{type(self).__name__}({', '.join(map(repr, numbers))}, {self.grad_reduction!r}, ring={self.ring!r})"
        )


def _precision(x: Tensor, options: Options) -> str:
    """The precision of products that the options mean for embeddings `x`."""
    return "fp16" if one_fp16_product(x.device.type, x.dtype, options.precision) else "fp32"


def _hardest_sums(
    rows: Rows, columns: Rows, first: int, bank: Rows | None, options: Options
) -> tuple[PairSums, Tensor, Tensor]:
    """The sums, as constants, and the gradients of the two penalties by these rows and by the columns of all ranks.

    [2, N, D] and [2, M, D]: a pair may count on this rank and not in its other order on the rank of its column.
    """
    wide = loss_dtype(rows.x)
    with torch.enable_grad():  # the other ranks need it whether or not this one does
        x, ref_x = (part.x.detach().to(wide).requires_grad_() for part in (rows, columns))
        against = columns._replace(x=ref_x)
        if bank is not None:
            against = joined(against, bank._replace(x=bank.x.to(wide)))
        part = pair_sums(rows._replace(x=x), against, first, options)
        sides = [torch.autograd.grad(part.penalty[side], (x, ref_x), retain_graph=side == 0) for side in (0, 1)]
    grad, grad_columns = (torch.stack(of_sides) for of_sides in zip(*sides, strict=True))
    return part._replace(penalty=part.penalty.detach()), grad, grad_columns


def _ring_sums(
    rows: Rows, packed: ranks.Packed, n: int, group: dist.ProcessGroup, options: Options
) -> PairSums | Exception:
    """The sums over this rank's rows and the columns of all ranks, which arrive one rank after the other.

    An error is returned, not raised: by then all columns have been passed on to the ranks that wait for them.
    """
    wide = loss_dtype(rows.x)
    options = options._replace(precision=_precision(rows.x, options))
    wanted = wants_gradient(rows.x)
    failure: Exception | None = None
    parts: list[PairSums] = []
    for step, columns in enumerate(ranks.ring(packed, n, group)):
        try:
            if step == 0:
                x = rows.x.detach().to(wide).requires_grad_(wanted)  # gradients are added up before rounding
                grad = x.new_zeros((2 if wanted else 0, *x.shape))
            if failure is None:
                parts.append(_ring_part(rows._replace(x=x), columns if step else None, grad, options))
        except Exception as error:
            failure = error
        del columns  # they are gone before the next but one arrive
    if failure is not None:
        return failure
    total = add(parts)
    return total._replace(penalty=with_gradient(total.penalty, [grad], [rows.x])) if wanted else total


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


def _add_up(mine: PairSums, group: dist.ProcessGroup) -> PairSums:
    """Over all ranks, in rank order, so that each gets the same bits: gathered, since a reduction promises no order."""
    dtype = mine.penalty.dtype
    bits = torch.int64 if dtype == torch.float64 else torch.int32
    packed = torch.cat([mine.penalty.detach().view(bits).long(), mine.hard, mine.divisor])
    penalty, hard, divisor = ranks.all_gather(packed[None], group).unflatten(1, (3, 2)).unbind(1)
    return PairSums(penalty.to(bits).contiguous().view(dtype).sum(0), hard.sum(0), divisor.sum(0))
