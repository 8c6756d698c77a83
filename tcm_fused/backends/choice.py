"""Which backend runs a call, and why one cannot: both are read off one table of the backends' abilities."""

from functools import cache
from typing import Any, NamedTuple

import torch

from tcm_fused.backends import extension
from tcm_fused.backends.operators import OPERATORS
from tcm_fused.tracing import constant_when_compiled
from tcm_fused.warn import warn_once

_C, _IMPORT_ERROR = extension.load()
_WIDE = (torch.float32, torch.float64)
_NARROW = (torch.float16, torch.bfloat16, torch.float32)


class Backend(NamedTuple):
    """All that one backend can do. `why_unavailable` says whether it can do so in this process."""

    device: str | None  # type of the device of its tensors; None: any
    dtypes: tuple[torch.dtype, ...]  # of embeddings
    penalties: tuple[str, ...]
    counted: tuple[torch.dtype, ...]  # of embeddings whose pairs it counts for OPIS; none if empty
    hardest: bool = False  # whether it has `hardest_negatives`


# In the order in which "auto" takes them. GPU kernels live off 16-bit products, and weigh a pair with 0 or 1 alone.
BACKENDS = {
    "cpu": Backend("cpu", (*_NARROW, torch.float64), ("hinge", "squared"), counted=_WIDE),
    "cuda": Backend("cuda", _NARROW, ("hinge",), counted=(torch.float32,)),
    "triton": Backend("cuda", _NARROW, ("hinge",), counted=()),
    "torch": Backend(None, (*_NARROW, torch.float64), ("hinge", "squared"), counted=_WIDE, hardest=True),
}


def build_info() -> dict[str, Any] | None:
    """Compilers and architectures that the extension was built with, or None where it is not built."""
    return None if _IMPORT_ERROR else _C.build_info()


def why_unavailable(backend: str) -> str | None:
    """None if the backend can run in this process, else the reason and the remedy."""
    if backend == "torch":
        return None
    if backend == "triton":
        return _why_no_triton()
    if backend in ("cpu", "cuda") and _IMPORT_ERROR is not None:
        return f"{_IMPORT_ERROR}, or use backend='torch'"
    return _why_no_cuda() if backend == "cuda" else None


@cache
def _why_no_cuda() -> str | None:
    """None, or why not: of the extension, torch, the driver and the GPUs the first that will not do."""
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


def _runs_on(architecture: str, gpu: tuple[int, int]) -> bool:
    """Machine code ("sm_80") runs on later minor versions, unless it is "sm_90a"; PTX ("compute_80") on all later."""
    kind, name = architecture.split("_")
    version = divmod(int(name.rstrip("af")), 10)
    if kind == "compute":
        return version <= gpu
    return version == gpu if name.endswith("a") else version[0] == gpu[0] and version <= gpu


@constant_when_compiled
def choose(backend: str, device_type: str, dtype: torch.dtype, penalty: str = "hinge", hardest: bool = False) -> str:
    """Which of BACKENDS runs `backend` on embeddings of `dtype` on `device_type`; RuntimeError if none does.

    `hardest`: with `hardest_negatives`.
    """
    if backend == "auto":
        return _best(device_type, f"runs its slower PyTorch fallback on '{device_type}'", dtype, penalty, hardest)
    reason = why_unavailable(backend)
    if reason is not None:
        raise RuntimeError(f"backend={backend!r} is not available: {reason}")
    able = BACKENDS[backend]
    _check_device(backend, device_type)
    if dtype not in able.dtypes:
        raise RuntimeError(f"backend={backend!r} has no {_NO_WIDE}")
    if penalty not in able.penalties:
        raise RuntimeError(
            f"backend={backend!r} has no {penalty} penalty; use backend='torch' or penalty={able.penalties[0]!r}"
        )
    if hardest and not able.hardest:
        raise RuntimeError(f"backend={backend!r} has no hardest_negatives; use backend='torch' or leave them out")
    return backend


def choose_counter(backend: str, device_type: str, dtype: torch.dtype) -> Any:
    """The operator that counts pairs of `dtype` with `backend` on `device_type`; RuntimeError if none does."""
    if backend == "auto":
        best = _best(device_type, f"counts pairs in its slower PyTorch fallback on '{device_type}'", dtype)
        return OPERATORS[best].counts
    counters = [name for name, able in BACKENDS.items() if able.counted]
    reason = why_unavailable(backend)
    if backend not in counters:
        reason = f"pairs are counted by {', '.join(map(repr, counters[:-1]))} or {counters[-1]!r} only"
    if reason is not None:
        raise RuntimeError(f"backend={backend!r} is not available: {reason}")
    _check_device(backend, device_type)
    if dtype not in BACKENDS[backend].counted:
        raise RuntimeError(f"backend={backend!r} has no {_NO_WIDE}")
    return OPERATORS[backend].counts


_NO_WIDE = "float64 kernels; use backend='torch' for float64 embeddings, or embeddings.float()"


def _check_device(backend: str, device_type: str) -> None:
    device = BACKENDS[backend].device
    if backend == "triton" and _is_interpreted():
        device = "cpu"
    if device not in (None, device_type):
        raise RuntimeError(f"backend={backend!r} needs tensors on device '{device}', embeddings are on '{device_type}'")


def _best(
    device_type: str, fallback: str, dtype: torch.dtype, penalty: str | None = None, hardest: bool = False
) -> str:
    """The first backend that is made for such a loss (or, without a penalty, for counting) and is available.

    Where that is the last, which is slow, a warning says why no other is; but not where no kernel for the device could.
    """
    missing: dict[str, str] = {}
    for name in _able(device_type, dtype, penalty, hardest):
        reason = why_unavailable(name)
        if name == "triton" and reason is None and _is_interpreted():
            reason = "TRITON_INTERPRET is set; unset it"
        if reason is not None:
            missing[name] = reason
        elif BACKENDS[name].device is not None or (not missing and _has_kernels(device_type)):
            return name
    missing = missing or {"kernel": f"no kernel for device '{device_type}'"}
    told = [f"{name}: {reason}" if len(missing) > 1 else reason for name, reason in missing.items()]
    warn_once(f"tcm_fused {fallback}: {'; '.join(told)}")
    return name


@cache
def _able(device_type: str, dtype: torch.dtype, penalty: str | None, hardest: bool) -> tuple[str, ...]:
    """Backends that are made for it, best first; the last is plain PyTorch."""
    return tuple(
        name
        for name, able in BACKENDS.items()
        if able.device in (None, device_type)
        and able.hardest >= hardest
        and (dtype in able.counted if penalty is None else dtype in able.dtypes and penalty in able.penalties)
    )


def _has_kernels(device_type: str) -> bool:
    return any(able.device == device_type for able in BACKENDS.values())


def _is_interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors; where Triton is there."""
    from tcm_fused.backends import triton_loss

    return triton_loss.INTERPRETED
