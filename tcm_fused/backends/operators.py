"""The operators: schema, shapes and autograd.

`tcm_fused::loss` and `tcm_fused::penalties` are the kernels that the extension registers for a device; with "_triton"
behind their names those for GPUs without it, with "_blocked" plain PyTorch, which runs anywhere. All return the
gradient with the value (one pass over the pairs), so that backward is a multiplication. `tcm_fused::counts` and
`tcm_fused::counts_blocked` count the pairs for OPIS.

`tcm_fused::hardest_blocked` is `penalties` of each row's hardest negatives.

`loss` and `penalties` of this file call them with autograd. Under torch.compile the operator itself stands in the
graph, with the autograd formula that is registered for it. In eager mode that registration costs ten times the kernel
of a small batch: there a `torch.autograd.Function` calls the operator below autograd.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tcm_fused.backends import blocked
from tcm_fused.backends.blocked_counts import counts_blocked
from tcm_fused.backends.numerics import loss_dtype, wide_dtype
from tcm_fused.backends.problem import Problem, Result

_LIBRARY = torch.library.Library("tcm_fused", "FRAGMENT")
# Those of the loss are told in `Problem` and `Result`. The first result is the one that can be differentiated.
_ROWS = "Tensor x, Tensor y, Tensor? ref_x, Tensor? ref_y, int? row_offset, Tensor margins, "
_OPTIONS = "bool squared, bool fp16, bool grad_x, bool grad_ref"
_SCHEMAS = {
    "loss": f"({_ROWS}Tensor weights, {_OPTIONS}) "
    "-> (Tensor loss, Tensor grad_x, Tensor grad_ref, Tensor penalty, Tensor count)",
    "penalties": f"({_ROWS}{_OPTIONS}) -> (Tensor penalty, Tensor grad_x, Tensor grad_ref, Tensor count)",
    "hardest": f"({_ROWS}{_OPTIONS}, int hardest) -> (Tensor penalty, Tensor grad_x, Tensor grad_ref, Tensor count)",
    # x [N, D] float32 or float64, finite; y [N] int64 class; thresholds [T] ascending similarities in the dtype of x.
    # counts [2, 2^(bits + 1) + 1], class_counts [2, classes + 1, T] int64, best [2, N], ref_best [2, M]: see
    # `counts_blocked`. progress [2] int64, if given: blocks done and in all, while it runs; a GPU only tells that it
    # was given the work.
    "counts": "(Tensor x, Tensor y, Tensor? ref_x, Tensor? ref_y, int classes, Tensor thresholds, int bits, "
    "Tensor(a!)? progress) -> (Tensor counts, Tensor class_counts, Tensor best, Tensor ref_best)",
}


def call(
    operator: Any, x: Tensor, y: Tensor, ref_x: Tensor | None, ref_y: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    """The results of `loss` or `penalties` but for the gradients; the first is differentiable by x and ref_x."""
    wants = wants_gradient(x), ref_x is not None and wants_gradient(ref_x)
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        value, _, _, *others = operator(x, y, ref_x, ref_y, *options, *wants)
        return value, *others
    with torch._C._AutoDispatchBelowAutograd():
        value, grad_x, grad_ref, *others = operator(x, y, ref_x, ref_y, *options, *wants)
    if wants[0] or wants[1]:
        value = with_gradient(value, (grad_x, grad_ref), (x, ref_x))
    return value, *others


def wants_gradient(x: Tensor) -> bool:
    """Whether autograd will ask for the gradient by `x`."""
    return torch.is_grad_enabled() and x.requires_grad


def with_gradient(value: Tensor, grads: Sequence[Tensor | None], by: Sequence[Tensor | None]) -> Tensor:
    """`value`, a new tensor, with the gradients that were found beside it: each of `grads` by the x in its place.

    A value [] has gradients in the shape of x, a value [2] has them [2, ...].
    """
    return _Found.apply([value], grads, *by)


class _Found(torch.autograd.Function):
    """See `with_gradient`. The value comes in a list: autograd copies a tensor that is an argument and a result."""

    @staticmethod
    def forward(ctx: Any, value: list[Tensor], grads: Sequence[Tensor | None], *by: Tensor | None) -> Tensor:
        _keep(ctx, grads, by)
        return value[0]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return None, None, *_gradients(ctx, upstream, ctx.needs_input_grad[2:])


def _keep(ctx: Any, grads: Sequence[Tensor | None], by: Sequence[Tensor | None]) -> None:
    """All that backward needs."""
    ctx.save_for_backward(*grads)
    ctx.by = by  # not saved with the others: backward does not read their values, which may change after forward


def _gradients(ctx: Any, upstream: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
    """Those by each x of `ctx.by`, in its dtype."""
    scale = _OnceDifferentiable.apply if torch.is_grad_enabled() else _scaled
    grads: list[Tensor | None] = []
    for saved, x, is_needed in zip(ctx.saved_tensors, ctx.by, needed, strict=True):
        grad = scale(saved, upstream, *ctx.by) if is_needed else None
        # Cast last: a gradient too small for float16 is multiplied by the loss scale before it is rounded.
        grads.append(grad if grad is None or grad.dtype == x.dtype else grad.to(x.dtype))
    return grads


def _scaled(saved: Tensor, upstream: Tensor, *_: Any) -> Tensor:
    """saved [N, D] times upstream [], or saved [2, N, D] by upstream [2]."""
    if upstream.dtype != saved.dtype:
        upstream = upstream.to(saved.dtype)
    return upstream * saved if upstream.ndim == 0 else torch.addcmul(upstream[0] * saved[0], upstream[1], saved[1])


class _OnceDifferentiable(torch.autograd.Function):
    """`_scaled` with an error for its own gradient: the saved gradient is a constant only to first order.

    It takes the embeddings as well, since it is their function that is differentiated once more.
    """

    @staticmethod
    def forward(ctx: Any, saved: Tensor, upstream: Tensor, *embeddings: Tensor | None) -> Tensor:
        """The gradient [N, D]."""
        return _scaled(saved, upstream)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        """RuntimeError: there is no second derivative."""
        raise RuntimeError(
            "tcm_loss has no second derivative (it was differentiated with create_graph=True and then once more); "
            "for double backward use tcm_fused.reference.tcm_reference, which is plain autograd"
        )


# Registration.


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _keep(ctx, output[1:3], (inputs[0], inputs[2]))
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    needed = ctx.needs_input_grad
    grads: list[Tensor | None] = [None] * len(needed)
    if upstream is not None:
        grads[0], grads[2] = _gradients(ctx, upstream, (needed[0], needed[2]))
    return tuple(grads)


def _fake(problem: Problem) -> Result:
    """Tensors of the shapes and dtypes of the results."""
    x, dtype = problem.x, loss_dtype(problem.x)
    sides = (2,) if problem.weights is None else ()
    grad_x, grad_ref = (
        x.new_empty((*sides, *of.shape) if wanted and of is not None else 0, dtype=dtype)
        for of, wanted in ((x, problem.grad_x), (problem.ref_x, problem.grad_ref))
    )
    penalty, hard = x.new_empty(2, dtype=wide_dtype(x.device)), x.new_empty(2, dtype=torch.int64)
    return Result(x.new_empty((), dtype=dtype), grad_x, grad_ref, penalty, hard)


def _fake_counts(
    x: Tensor,
    y: Tensor,
    ref_x: Tensor | None,
    ref_y: Tensor | None,
    classes: int,
    thresholds: Tensor,
    bits: int,
    progress: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty((2, (2 << bits) + 1), dtype=torch.int64),
        x.new_empty((2, classes + 1, thresholds.shape[0]), dtype=torch.int64),
        x.new_empty((2, x.shape[0])),
        x.new_empty((2, 0 if ref_x is None else ref_x.shape[0])),
    )


def _triton(problem: Problem) -> Result:
    from tcm_fused.backends import triton_loss  # only here: Triton is optional, and takes a second to import

    return triton_loss.run(problem)


def _loss_of(run: Callable[[Problem], Result]) -> Callable[..., Any]:
    """The operator `loss` that `run` computes."""

    def loss(*arguments: Any) -> tuple[Any, ...]:
        return tuple(run(Problem(*arguments)))

    return loss


def _penalties_of(run: Callable[[Problem], Result]) -> Callable[..., Any]:
    """The operator `penalties` that `run` computes."""

    def penalties(*arguments: Any) -> tuple[Any, ...]:
        result = run(Problem(*(*arguments[:6], None, *arguments[6:])))
        return result.penalty, result.grad_x, result.grad_ref, result.hard

    return penalties


_FAKES = {
    "loss": _loss_of(_fake),
    "penalties": _penalties_of(_fake),
    "hardest": _penalties_of(_fake),
    "counts": _fake_counts,
}


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
    hardest: Any = None  # `penalties` of the hardest negatives of each row alone; None: it has them not


_KERNELS = Operators(_register("loss"), _register("penalties"), _register("counts"))
OPERATORS = {
    "cpu": _KERNELS,
    "cuda": _KERNELS,
    "triton": Operators(_register("loss_triton"), _register("penalties_triton"), None),
    "torch": Operators(
        _register("loss_blocked"),
        _register("penalties_blocked"),
        _register("counts_blocked"),
        _register("hardest_blocked"),
    ),
}
for _name, _run, _devices in (
    ("triton", _triton, ("CUDA", "CPU")),  # torch calls ROCm CUDA, too; on CPUs Triton has its interpreter
    ("blocked", blocked.run, ("CompositeExplicitAutograd",)),
):
    for _device in _devices:
        _LIBRARY.impl(f"loss_{_name}", _loss_of(_run), _device)
        _LIBRARY.impl(f"penalties_{_name}", _penalties_of(_run), _device)
_LIBRARY.impl("hardest_blocked", _penalties_of(blocked.run), "CompositeExplicitAutograd")
_LIBRARY.impl("counts_blocked", counts_blocked, "CompositeExplicitAutograd")
