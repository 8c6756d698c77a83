"""The operators: schema, shapes and autograd.

Three operators of the loss share one schema. `tcm_fused::fused` is the kernel that the extension registers for a
device, `tcm_fused::triton` that for GPUs without it, and `tcm_fused::blocked` is plain PyTorch and runs anywhere. All
return the gradient with the loss (one pass over the pairs), so that backward is a multiplication. In the same way
`tcm_fused::pair_counts` and `tcm_fused::pair_counts_blocked` count the pairs for OPIS.
"""

from typing import Any

import torch
from torch import Tensor

from tcm_fused.backends.blocked import tcm_blocked
from tcm_fused.backends.blocked_counts import pair_counts_blocked
from tcm_fused.backends.numerics import loss_dtype, wide_dtype

_LIBRARY = torch.library.Library("tcm_fused", "FRAGMENT")
# x [N, D] and ref_x [M, D] of one floating dtype, y [N] and ref_y [M] int64; without a reference set the rows are the
# columns. fp16: similarities may come from one product in fp16; a kernel that has nothing less than fp32 ignores it.
# squared: penalties are the squares of the violations. penalty [2], sums in float64, and count [2]: hard positives and
# hard negatives. loss [] and gradients are float64 for float64 embeddings and float32 otherwise; a gradient not asked
# for is empty. It is that of the loss, [N, D] and [M, D], and the loss is what can be differentiated; with per_side it
# is that of either penalty, [2, N, D] and [2, M, D], and penalty is what can be differentiated (the loss is then of no
# meaning).
_SCHEMA = (
    "(Tensor x, Tensor y, Tensor? ref_x, Tensor? ref_y, int? row_offset, float margin_plus, float margin_minus, "
    "float lambda_plus, float lambda_minus, bool squared, bool fp16, bool per_side, bool grad_x, bool grad_ref) "
    "-> (Tensor loss, Tensor grad_x, Tensor grad_ref, Tensor penalty, Tensor count)"
)


def _fake(
    x: Tensor, y: Tensor, ref_x: Tensor | None, ref_y: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *_, per_side, grad_x, grad_ref = options
    dtype = loss_dtype(x)
    sides = (2,) if per_side else ()
    return (
        x.new_empty((), dtype=dtype),
        x.new_empty((*sides, *x.shape) if grad_x else 0, dtype=dtype),
        x.new_empty((*sides, *ref_x.shape) if grad_ref and ref_x is not None else 0, dtype=dtype),
        x.new_empty(2, dtype=wide_dtype(x.device)),
        x.new_empty(2, dtype=torch.int64),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    loss, grad_x, grad_ref, penalty, count = output
    ctx.save_for_backward(grad_x, grad_ref)
    # Not saved with the others: backward does not read their values, which may change after forward.
    ctx.embeddings = inputs[0], inputs[2]
    ctx.per_side = inputs[-3]
    ctx.mark_non_differentiable(grad_x, grad_ref, loss if ctx.per_side else penalty, count)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_loss: Tensor | None, grad_x: None, grad_ref: None, grad_penalty: Tensor | None, grad_count: None
) -> tuple[Any, ...]:
    grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    upstream = grad_penalty if ctx.per_side else grad_loss
    if upstream is not None:
        scale = OnceDifferentiable.apply if torch.is_grad_enabled() else scale_saved
        for argument, saved, x in zip((0, 2), ctx.saved_tensors, ctx.embeddings, strict=True):
            if ctx.needs_input_grad[argument]:
                # Cast last: a gradient too small for float16 is multiplied by the loss scale before it is rounded.
                grads[argument] = scale(saved, upstream, *ctx.embeddings).to(x.dtype)
    return tuple(grads)


def scale_saved(saved: Tensor, upstream: Tensor, *_: Any) -> Tensor:
    """saved [N, D] times upstream [], or saved [2, N, D] by upstream [2]."""
    upstream = upstream.to(saved.dtype)
    return upstream * saved if upstream.ndim == 0 else torch.addcmul(upstream[0] * saved[0], upstream[1], saved[1])


class OnceDifferentiable(torch.autograd.Function):
    """`scale_saved` with an error for its own gradient: the saved gradient is a constant only to first order.

    It takes the embeddings as well, since it is their function that is differentiated once more.
    """

    @staticmethod
    def forward(ctx: Any, saved: Tensor, upstream: Tensor, *embeddings: Tensor | None) -> Tensor:
        return scale_saved(saved, upstream)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "tcm_loss has no second derivative (it was differentiated with create_graph=True and then once more); "
            "for double backward use tcm_fused.reference.tcm_reference, which is plain autograd"
        )


class WithGradient(torch.autograd.Function):
    """`value` [] with `grad`, found beside it, as its gradient by x; or value [2] with grad [2, N, D] by x [N, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        ctx.x = x  # see `_setup_context`
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        scale = OnceDifferentiable.apply if torch.is_grad_enabled() else scale_saved
        return scale(*ctx.saved_tensors, *upstream, ctx.x).to(ctx.x.dtype), None, None


def _run_triton(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from tcm_fused.backends.triton_loss import tcm_triton  # only here: Triton is optional, and takes a second to import

    return tcm_triton(*arguments)


for _name in ("fused", "triton", "blocked"):
    _LIBRARY.define(_name + _SCHEMA)
    torch.library.register_fake(f"tcm_fused::{_name}", _fake, lib=_LIBRARY)
    torch.library.register_autograd(f"tcm_fused::{_name}", _backward, setup_context=_setup_context, lib=_LIBRARY)
_LIBRARY.impl("blocked", tcm_blocked, "CompositeExplicitAutograd")
_LIBRARY.impl("triton", _run_triton, "CUDA")  # which is also what torch calls ROCm
_LIBRARY.impl("triton", _run_triton, "CPU")  # in Triton's interpreter
OPERATORS = {name: getattr(torch.ops.tcm_fused, name).default for name in ("fused", "triton", "blocked")}

# x [N, D] float32 or float64, finite; y [N] int64 class; thresholds [T] ascending similarities in the dtype of x.
# counts [2, 2^(bits + 1) + 1], class_counts [2, classes + 1, T] int64 and best [2, N]: see `pair_counts_blocked`.
# progress [2] int64, if given: blocks done and in all, while it runs; a GPU only tells that it was given the work.
_COUNT_SCHEMA = (
    "(Tensor x, Tensor y, int classes, Tensor thresholds, int bits, Tensor(a!)? progress) "
    "-> (Tensor counts, Tensor class_counts, Tensor best)"
)


def _fake_counts(
    x: Tensor, y: Tensor, classes: int, thresholds: Tensor, bits: int, progress: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty((2, (2 << bits) + 1), dtype=torch.int64),
        x.new_empty((2, classes + 1, thresholds.shape[0]), dtype=torch.int64),
        x.new_empty((2, x.shape[0])),
    )


for _name in ("pair_counts", "pair_counts_blocked"):
    _LIBRARY.define(_name + _COUNT_SCHEMA)
    torch.library.register_fake(f"tcm_fused::{_name}", _fake_counts, lib=_LIBRARY)
_LIBRARY.impl("pair_counts_blocked", pair_counts_blocked, "CompositeExplicitAutograd")
COUNTERS = {
    "cpu": torch.ops.tcm_fused.pair_counts.default,
    "cuda": torch.ops.tcm_fused.pair_counts.default,
    "torch": torch.ops.tcm_fused.pair_counts_blocked.default,
}
