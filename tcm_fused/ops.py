"""The operators: schema, shapes, autograd and choice of backend. The only file that knows backends.

Three operators of the loss share one schema. `tcm_fused::fused` is the kernel that the extension registers for a
device, `tcm_fused::triton` that for GPUs without it, and `tcm_fused::blocked` is plain PyTorch and runs anywhere. All
return the gradient with the loss (one pass over the pairs), so that backward is a multiplication. In the same way
`tcm_fused::pair_counts` and `tcm_fused::pair_counts_blocked` count the pairs for OPIS.
"""

import sys
import warnings
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from tcm_fused.pair_counts import pair_counts_blocked
from tcm_fused.reference import loss_dtype, tcm_blocked, wide_dtype

try:
    import tcm_fused._C as _C
except ImportError as error:  # not swallowed: `why_unavailable` tells it
    _IMPORT_ERROR: str | None = str(error)
else:
    _IMPORT_ERROR = None

F = TypeVar("F", bound=Callable[..., Any])
BACKENDS = ("cpu", "cuda", "triton", "torch")

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
        x.new_empty(2, dtype=wide_dtype(x)),
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
        scale = _OnceDifferentiable.apply if torch.is_grad_enabled() else _scale
        for argument, saved, x in zip((0, 2), ctx.saved_tensors, ctx.embeddings, strict=True):
            if ctx.needs_input_grad[argument]:
                # Cast last: a gradient too small for float16 is multiplied by the loss scale before it is rounded.
                grads[argument] = scale(saved, upstream, *ctx.embeddings).to(x.dtype)
    return tuple(grads)


def _scale(saved: Tensor, upstream: Tensor, *_: Any) -> Tensor:
    """saved [N, D] times upstream [], or saved [2, N, D] by upstream [2]."""
    upstream = upstream.to(saved.dtype)
    return upstream * saved if upstream.ndim == 0 else torch.addcmul(upstream[0] * saved[0], upstream[1], saved[1])


class _OnceDifferentiable(torch.autograd.Function):
    """`_scale` with an error for its own gradient: the saved gradient is a constant only to first order.

    It takes the embeddings as well, since it is their function that is differentiated once more.
    """

    @staticmethod
    def forward(ctx: Any, saved: Tensor, upstream: Tensor, *embeddings: Tensor | None) -> Tensor:
        return _scale(saved, upstream)

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
        scale = _OnceDifferentiable.apply if torch.is_grad_enabled() else _scale
        return scale(*ctx.saved_tensors, *upstream, ctx.x).to(ctx.x.dtype), None, None


def _run_triton(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from tcm_fused.triton_loss import tcm_triton  # only here: Triton is optional, and takes a second to import

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
_COUNTERS = {
    "cpu": torch.ops.tcm_fused.pair_counts.default,
    "cuda": torch.ops.tcm_fused.pair_counts.default,
    "torch": torch.ops.tcm_fused.pair_counts_blocked.default,
}


def constant_when_compiled(function: F) -> F:
    """torch.compile calls `function` once, when it traces, and does not look inside.

    This is what `torch.compiler.assume_constant_result` does, which imports the compiler first: a second, and Triton.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a function has what it is given
    return function


def eager_when_compiled(reason: str) -> Callable[[F], F]:
    """torch.compile runs the function as it is, between two graphs; with fullgraph=True it raises, and says why.

    This is what `torch.compiler.disable` does, which imports the compiler first.
    """

    def decorate(function: F) -> F:
        @wraps(function)
        def eager(*arguments: Any, **keywords: Any) -> Any:
            if "torch._dynamo" in sys.modules:  # else nothing is compiled
                return torch.compiler.disable(function, reason=reason)(*arguments, **keywords)
            return function(*arguments, **keywords)

        # What the compiler looks for on a function; mypy knows no attributes of functions.
        eager._torchdynamo_disable = True  # type: ignore[attr-defined]
        eager._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
        return cast(F, eager)

    return decorate


def build_info() -> dict[str, Any] | None:
    """What the extension was built with, or None where it is not built."""
    return None if _IMPORT_ERROR else _C.build_info()


def why_unavailable(backend: str) -> str | None:
    """None if the backend can run in this process, else the reason and the remedy."""
    if backend == "torch":
        return None
    if backend == "triton":
        return _why_no_triton()
    if _IMPORT_ERROR is not None:
        return (
            f"the C++ extension could not be imported ({_IMPORT_ERROR}); build it with "
            "`pip install --no-build-isolation .` or use backend='torch'"
        )
    return _why_no_cuda() if backend == "cuda" else None


@cache
def _why_no_cuda() -> str | None:
    """Of the extension, torch, the driver and the GPUs, in this order, the first that does not do."""
    built = _C.build_info()
    architectures = built["cuda_architectures"].split()
    if not architectures:
        return (
            f"the extension was built without CUDA kernels ({built['cuda_compiler']}); build it again with nvcc on the "
            "PATH (`TCM_FUSED_CUDA=1 pip install --no-build-isolation .`) or use backend='torch'"
        )
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA; install a torch that has it, or use backend='torch'"
    if not torch.cuda.is_available():
        return "torch sees no GPU (torch.cuda.is_available() is False); use backend='torch'"
    error = _C.cuda_runtime_error()
    if error:
        return (
            f"the CUDA runtime of {built['cuda_compiler']} does not start ({error}); update the driver, build with an "
            "older nvcc, or use backend='torch'"
        )
    gpus = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    if not any(_runs_on(architecture, gpu) for architecture in architectures for gpu in gpus):
        capabilities = ", ".join(f"{major}.{minor}" for major, minor in gpus)
        return (
            f"the CUDA kernels were built for {' '.join(architectures)}, compute capability here is {capabilities}; "
            "build again with that in TORCH_CUDA_ARCH_LIST (8.0 is the least), or use backend='torch'"
        )
    return None


@cache
def _why_no_triton() -> str | None:
    try:
        from tcm_fused import triton_loss
    except ImportError as error:
        return f"Triton could not be imported ({error}); install it (`pip install triton`) or use backend='torch'"
    if triton_loss.INTERPRETED or torch.cuda.is_available():
        return None
    return "torch finds no GPU; use backend='torch' (or, to test, set TRITON_INTERPRET=1 before Triton is imported)"


def _triton_device() -> str:
    """Device of the tensors that Triton's kernels take in this process, where they can run."""
    from tcm_fused.triton_loss import INTERPRETED

    return "cpu" if INTERPRETED else "cuda"


def _runs_on(architecture: str, gpu: tuple[int, int]) -> bool:
    """Machine code ("sm_80") runs on later minor versions, unless it is "sm_90a"; PTX ("compute_80") on all later."""
    kind, name = architecture.split("_")
    version = divmod(int(name.rstrip("af")), 10)
    if kind == "compute":
        return version <= gpu
    return version == gpu if name.endswith("a") else version[0] == gpu[0] and version <= gpu


@constant_when_compiled
def choose(backend: str, device_type: str, dtype: torch.dtype, squared: bool = False) -> str:
    """Which of OPERATORS runs `backend` on embeddings of `dtype` on `device_type`; RuntimeError if none does."""
    if backend == "auto":
        return _choose_best(device_type, dtype, squared)
    reason = why_unavailable(backend)
    if reason is not None:
        raise RuntimeError(f"backend={backend!r} is not available: {reason}")
    if backend == "torch":
        return "blocked"
    device = backend
    if backend == "triton":
        device = _triton_device()
    if device_type != device:
        raise RuntimeError(f"backend={backend!r} needs tensors on device '{device}', embeddings are on '{device_type}'")
    if backend in ("cuda", "triton") and dtype == torch.float64:
        raise RuntimeError(
            f"backend={backend!r} has no float64 kernels; use backend='torch' for float64 embeddings, or "
            "embeddings.float()"
        )
    if squared and backend in ("cuda", "triton"):
        raise RuntimeError(f"backend={backend!r} has no squared penalty; use backend='torch' or penalty='hinge'")
    return "triton" if backend == "triton" else "fused"


def _choose_best(device_type: str, dtype: torch.dtype, squared: bool) -> str:
    """The extension's kernel, else on a GPU Triton's, else the blocked form, with a warning that says what is missing.

    Embeddings in float64 on a GPU take the blocked form without one: GPU kernels live off 16-bit products. So do
    squared penalties, whose gradient weighs pairs with more than the 0 and 1 that those kernels are made for.
    """
    if device_type == "cuda" and (dtype == torch.float64 or squared):
        return "blocked"
    reason = why_unavailable(device_type) if device_type in BACKENDS else f"no kernel for device '{device_type}'"
    if reason is None:
        return "fused"
    if device_type == "cuda":
        no_triton = why_unavailable("triton")
        if no_triton is None and _triton_device() == "cpu":
            no_triton = "TRITON_INTERPRET is set; unset it"
        if no_triton is None:
            return "triton"
        reason = f"CUDA kernels: {reason}. Triton kernels: {no_triton}"
    _warn_once(f"tcm_fused runs its slower PyTorch fallback on '{device_type}': {reason}")
    return "blocked"


def choose_counter(backend: str, device_type: str, dtype: torch.dtype) -> Any:
    """The operator that counts pairs of `dtype` with `backend` on `device_type`; RuntimeError if none does.

    "auto" takes the kernel where there is one (CPUs; CUDA devices, for float32), else the blocked PyTorch form, with a
    warning where the kernel is only missing.
    """
    if backend == "auto":
        if device_type != "cpu" and (device_type, dtype) != ("cuda", torch.float32):
            return _COUNTERS["torch"]
        reason = why_unavailable(device_type)
        if reason is not None:
            _warn_once(f"tcm_fused counts pairs in its slower PyTorch fallback on '{device_type}': {reason}")
        return _COUNTERS[device_type if reason is None else "torch"]
    reason = why_unavailable(backend) if backend in _COUNTERS else "pairs are counted by 'cpu', 'cuda' or 'torch' only"
    if reason is not None:
        raise RuntimeError(f"backend={backend!r} is not available: {reason}")
    if backend != "torch" and device_type != backend:
        raise RuntimeError(
            f"backend={backend!r} needs tensors on device {backend!r}, embeddings are on {device_type!r}"
        )
    if backend == "cuda" and dtype == torch.float64:
        raise RuntimeError(
            "backend='cuda' has no float64 kernels; use backend='torch' for float64 embeddings, or embeddings.float()"
        )
    return _COUNTERS[backend]


@cache
def _warn_once(message: str) -> None:
    level = 1
    while sys._getframe(level).f_globals.get("__name__", "").startswith("tcm_fused."):
        level += 1
    warnings.warn(message, stacklevel=level + 1)  # at the caller of `tcm_loss`
