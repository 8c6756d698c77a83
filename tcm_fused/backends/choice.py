"""Which backend runs a call, and why one cannot."""

import sys
import warnings
from functools import cache
from typing import Any

import torch

from tcm_fused.backends import extension
from tcm_fused.backends.operators import COUNTERS
from tcm_fused.tracing import constant_when_compiled

_C, _IMPORT_ERROR = extension.load()
BACKENDS = ("cpu", "cuda", "triton", "torch")


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
        return f"{_IMPORT_ERROR}, or use backend='torch'"
    return _why_no_cuda() if backend == "cuda" else None


@cache
def _why_no_cuda() -> str | None:
    """Of the extension, torch, the driver and the GPUs, in this order, the first that does not do."""
    built = _C.build_info()
    architectures = built["cuda_architectures"].split()
    if not architectures:
        return (
            f"the extension was built without CUDA kernels ({built['cuda_compiler']}); build it again with nvcc on the "
            f"PATH (`TCM_FUSED_CUDA=1 {extension.BUILD}`) or use backend='torch'"
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
        from tcm_fused.backends import triton_loss
    except Exception as error:  # an old Triton lacks names: AttributeError
        return f"Triton could not be imported ({error}); install it (`pip install triton`) or use backend='torch'"
    if triton_loss.INTERPRETED or torch.cuda.is_available():
        return None
    return "torch finds no GPU; use backend='torch' (or, to test, set TRITON_INTERPRET=1 before Triton is imported)"


def _triton_device() -> str:
    """Device of the tensors that Triton's kernels take in this process, where they can run."""
    from tcm_fused.backends.triton_loss import INTERPRETED

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
            return COUNTERS["torch"]
        reason = why_unavailable(device_type)
        if reason is not None:
            _warn_once(f"tcm_fused counts pairs in its slower PyTorch fallback on '{device_type}': {reason}")
        return COUNTERS[device_type if reason is None else "torch"]
    reason = why_unavailable(backend) if backend in COUNTERS else "pairs are counted by 'cpu', 'cuda' or 'torch' only"
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
    return COUNTERS[backend]


@cache
def _warn_once(message: str) -> None:
    level = 1
    while sys._getframe(level).f_globals.get("__name__", "").startswith("tcm_fused."):
        level += 1
    warnings.warn(message, stacklevel=level + 1)  # at the caller of `tcm_loss`
