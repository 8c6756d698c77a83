"""The operators: schema, shapes and autograd.

`tcm_fused::loss` and `tcm_fused::penalties` are the kernels that the extension registers for a device; with "_triton"
behind their names those for GPUs without it, with "_blocked" plain PyTorch, which runs anywhere. All return the
gradient with the value (one pass over the pairs), so that backward is a multiplication. `tcm_fused::counts` and
`tcm_fused::counts_blocked` count the pairs for OPIS.

`loss` and `penalties` of this file call them with autograd. Under torch.compile the operator itself stands in the
graph, with the autograd formula that is registered for it. In eager mode that registration costs ten times the kernel
of a small batch: there a `torch.autograd.Function` calls the operator below autograd.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tcm_fused.backends.blocked import loss_blocked, penalties_blocked
from tcm_fused.backends.blocked_between import counts_between_blocked
from tcm_fused.backends.blocked_counts import counts_blocked
from tcm_fused.backends.numerics import loss_dtype, wide_dtype

_LIBRARY = torch.library.Library("tcm_fused", "FRAGMENT")
# x [N, D] and ref_x [M, D] of one floating dtype, y [N] and ref_y [M] int64; without a reference set the rows are the
# columns. margins [2] and weights [2]: m+ and m-, lambda+ and lambda-, contiguous, float64 (float32 for MPS); on the
# CPU, where they are read at the call, or on the device of x, whose kernels read them. squared: penalties are the
# squares of the violations. fp16: similarities may come from one product in fp16; a kernel that has nothing less than
# fp32 ignores it.
_ROWS = "Tensor x, Tensor y, Tensor? ref_x, Tensor? ref_y, int? row_offset, Tensor margins, "
_OPTIONS = "bool squared, bool fp16, bool grad_x, bool grad_ref"
# penalty [2], sums in float64, and count [2]: hard positives and hard negatives. loss [] and gradients are float64 for
# float64 embeddings and float32 otherwise; a gradient not asked for is empty. The first result is the one that can be
# differentiated. Its gradients are [N, D] and [M, D] of the loss, [2, N, D] and [2, M, D] of the two penalties.
_SCHEMAS = {
    "loss": f"({_ROWS}Tensor weights, {_OPTIONS}) "
    "-> (Tensor loss, Tensor grad_x, Tensor grad_ref, Tensor penalty, Tensor count)",
    "penalties": f"({_ROWS}{_OPTIONS}) -> (Tensor penalty, Tensor grad_x, Tensor grad_ref, Tensor count)",
    # x [N, D] float32 or float64, finite; y [N] int64 class; thresholds [T] ascending similarities in the dtype of x.
    # counts [2, 2^(bits + 1) + 1], class_counts [2, classes + 1, T] int64 and best [2, N]: see `counts_blocked`.
    # progress [2] int64, if given: blocks done and in all, while it runs; a GPU only tells that it was given the work.
    "counts": "(Tensor x, Tensor y, int classes, Tensor thresholds, int bits, Tensor(a!)? progress) "
    "-> (Tensor counts, Tensor class_counts, Tensor best)",
}


def loss(
    operator: Any,
    x: Tensor,
    y: Tensor,
    ref_x: Tensor | None,
    ref_y: Tensor | None,
    row_offset: int | None,
    margins: Tensor,
    weights: Tensor,
    squared: bool,
    fp16: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [], differentiable by x and ref_x, and without gradient penalty [2] and count [2]."""
    wants = wants_gradient(x), ref_x is not None and wants_gradient(ref_x)
    value, penalty, count = _run(operator, x, y, ref_x, ref_y, row_offset, margins, weights, squared, fp16, *wants)
    return value, penalty, count


def penalties(
    operator: Any,
    x: Tensor,
    y: Tensor,
    ref_x: Tensor | None,
    ref_y: Tensor | None,
    row_offset: int | None,
    margins: Tensor,
    squared: bool,
    fp16: bool,
) -> tuple[Tensor, Tensor]:
    """Penalty [2], differentiable by x and ref_x, and count [2]."""
    wants = wants_gradient(x), ref_x is not None and wants_gradient(ref_x)
    value, count = _run(operator, x, y, ref_x, ref_y, row_offset, margins, squared, fp16, *wants)
    return value, count


def wants_gradient(x: Tensor) -> bool:
    """Whether autograd will ask for the gradient by `x`."""
    return torch.is_grad_enabled() and x.requires_grad


def _run(operator: Any, *arguments: Any) -> tuple[Tensor, ...]:
    """The operator's results without the gradients; the first of them is differentiable."""
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        value, _, _, *others = operator(*arguments)
    elif arguments[-1] or arguments[-2]:
        value, *others = _Differentiable.apply(arguments[0], arguments[2], operator, arguments)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            value, _, _, *others = operator(*arguments)
    return value, *others


class _Differentiable(torch.autograd.Function):
    """An operator of the loss with the gradients that it returns."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, ref_x: Tensor | None, operator: Any, arguments: tuple[Any, ...]
    ) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            value, grad_x, grad_ref, *others = operator(*arguments)
        _keep(ctx, x, ref_x, grad_x, grad_ref)
        ctx.mark_non_differentiable(*others)
        return value, *others

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> Any:
        return *_gradients(ctx, upstream, ctx.needs_input_grad[:2]), None, None


def _keep(ctx: Any, x: Tensor, ref_x: Tensor | None, grad_x: Tensor, grad_ref: Tensor) -> None:
    """All that backward needs."""
    ctx.save_for_backward(grad_x, grad_ref)
    # Not saved with the others: backward does not read their values, which may change after forward.
    ctx.embeddings = x, ref_x
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, upstream: Tensor | None, needed: tuple[bool, ...]) -> list[Tensor | None]:
    """Those by x and by ref_x, in their dtypes."""
    grads: list[Tensor | None] = [None, None]
    if upstream is not None:
        scale = OnceDifferentiable.apply if torch.is_grad_enabled() else scale_saved
        saved, embeddings = ctx.saved_tensors, ctx.embeddings
        for k in (0, 1):
            if needed[k]:
                # Cast last: a gradient too small for float16 is multiplied by the loss scale before it is rounded.
                grads[k] = scale(saved[k], upstream, *embeddings).to(embeddings[k].dtype)
    return grads


def scale_saved(saved: Tensor, upstream: Tensor, *_: Any) -> Tensor:
    """saved [N, D] times upstream [], or saved [2, N, D] by upstream [2]."""
    if upstream.dtype != saved.dtype:
        upstream = upstream.to(saved.dtype)
    return upstream * saved if upstream.ndim == 0 else torch.addcmul(upstream[0] * saved[0], upstream[1], saved[1])


class OnceDifferentiable(torch.autograd.Function):
    """`scale_saved` with an error for its own gradient: the saved gradient is a constant only to first order.

    It takes the embeddings as well, since it is their function that is differentiated once more.
    """

    @staticmethod
    def forward(ctx: Any, saved: Tensor, upstream: Tensor, *embeddings: Tensor | None) -> Tensor:
        """The gradient [N, D]."""
        return scale_saved(saved, upstream)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        """RuntimeError: there is no second derivative."""
        raise RuntimeError(
            "tcm_loss has no second derivative (it was differentiated with create_graph=True and then once more); "
            "for double backward use tcm_fused.reference.tcm_reference, which is plain autograd"
        )


class WithGradient(torch.autograd.Function):
    """`value` [] with `grad`, found beside it, as its gradient by x; or value [2] with grad [2, N, D] by x [N, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, grad: Tensor) -> Tensor:
        """`value` as it is."""
        ctx.save_for_backward(grad)
        ctx.x = x  # see `_keep`
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        """The gradient by x, in its dtype; none by the others."""
        scale = OnceDifferentiable.apply if torch.is_grad_enabled() else scale_saved
        return scale(*ctx.saved_tensors, *upstream, ctx.x).to(ctx.x.dtype), None, None


# Registration.


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _keep(ctx, inputs[0], inputs[2], *output[1:3])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    needed = ctx.needs_input_grad
    grads: list[Tensor | None] = [None] * len(needed)
    grads[0], grads[2] = _gradients(ctx, upstream, (needed[0], needed[2]))
    return tuple(grads)


def _fake_loss(
    x: Tensor, y: Tensor, ref_x: Tensor | None, ref_y: Tensor | None, row_offset: int | None, *options: Any
) -> tuple[Tensor, ...]:
    grads, penalty, count = _fake_results((), x, ref_x, *options[-2:])
    return x.new_empty((), dtype=loss_dtype(x)), *grads, penalty, count


def _fake_penalties(
    x: Tensor, y: Tensor, ref_x: Tensor | None, ref_y: Tensor | None, row_offset: int | None, *options: Any
) -> tuple[Tensor, ...]:
    grads, penalty, count = _fake_results((2,), x, ref_x, *options[-2:])
    return penalty, *grads, count


def _fake_results(
    sides: tuple[int, ...], x: Tensor, ref_x: Tensor | None, grad_x: bool, grad_ref: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    dtype = loss_dtype(x)
    grads = [
        x.new_empty((*sides, *of.shape) if wanted and of is not None else 0, dtype=dtype)
        for of, wanted in ((x, grad_x), (ref_x, grad_ref))
    ]
    return grads, x.new_empty(2, dtype=wide_dtype(x.device)), x.new_empty(2, dtype=torch.int64)


def _fake_counts(
    x: Tensor, y: Tensor, classes: int, thresholds: Tensor, bits: int, progress: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty((2, (2 << bits) + 1), dtype=torch.int64),
        x.new_empty((2, classes + 1, thresholds.shape[0]), dtype=torch.int64),
        x.new_empty((2, x.shape[0])),
    )


def _loss_triton(*arguments: Any) -> tuple[Tensor, ...]:
    from tcm_fused.backends import triton_loss  # only here: Triton is optional, and takes a second to import

    return triton_loss.loss_triton(*arguments)


def _penalties_triton(*arguments: Any) -> tuple[Tensor, ...]:
    from tcm_fused.backends import triton_loss  # see above

    return triton_loss.penalties_triton(*arguments)


_FAKES: dict[str, Callable[..., Any]] = {"loss": _fake_loss, "penalties": _fake_penalties, "counts": _fake_counts}


def _register(name: str) -> Any:
    """The operator `name`, whose kernels come from elsewhere."""
    kind = name.partition("_")[0]
    _LIBRARY.define(name + _SCHEMAS[kind])
    torch.library.register_fake(f"tcm_fused::{name}", _FAKES[kind], lib=_LIBRARY)
    if kind != "counts":
        torch.library.register_autograd(f"tcm_fused::{name}", _backward, setup_context=_setup_context, lib=_LIBRARY)
    return getattr(torch.ops.tcm_fused, name).default


class Operators(NamedTuple):
    """Those of one backend."""

    loss: Any
    penalties: Any
    counts: Any  # None: it counts no pairs
    between: Any = None  # of two sets, see `counts_between_blocked`; None: it counts no pairs of two sets


_KERNELS = Operators(_register("loss"), _register("penalties"), _register("counts"))
OPERATORS = {
    "cpu": _KERNELS,
    "cuda": _KERNELS,
    "triton": Operators(_register("loss_triton"), _register("penalties_triton"), None),
    "torch": Operators(
        _register("loss_blocked"),
        _register("penalties_blocked"),
        _register("counts_blocked"),
        counts_between_blocked,
    ),
}
for _name, _function in (
    ("loss_blocked", loss_blocked),
    ("penalties_blocked", penalties_blocked),
    ("counts_blocked", counts_blocked),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
for _device in ("CUDA", "CPU"):  # torch calls ROCm CUDA, too; on CPUs Triton has its interpreter
    _LIBRARY.impl("loss_triton", _loss_triton, _device)
    _LIBRARY.impl("penalties_triton", _penalties_triton, _device)
