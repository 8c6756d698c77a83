"""Dtypes, unit rows and exact products, for all forms in plain PyTorch."""

import contextlib
import os
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

EPS = 1e-12  # smallest norm a row is divided by
_CPU = torch.device("cpu")
_EXACT = ("ieee", "none")  # settings of float32 products that are float32; nothing set is the latter


@contextlib.contextmanager
def as_precise_as_asked(device_type: str, fp16: bool) -> Iterator[None]:
    """No autocast, which would make products 16-bit, and on CUDA no TF32 unless `fp16` allows as little.

    Products on other devices are made by `product`, which no setting reaches.
    """
    with contextlib.ExitStack() as stack:
        if torch.amp.is_autocast_available(device_type):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        if device_type == "cuda" and not fp16:
            stack.enter_context(_WITHOUT_TF32)
        yield


class _WithoutTF32:
    """While any thread is inside, float32 products on CUDA are float32; then the user's setting is back.

    The setting is of the process, so threads share it: who enters last sees to it that it is exact, who leaves last
    puts it back. Each saving and restoring on its own, one would restore amid the other's products.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.users: str | None = None  # setting to put back; None if it was exact

    def __enter__(self) -> None:
        products = torch.backends.cuda.matmul
        with self.lock:
            self.inside += 1
            if products.fp32_precision not in _EXACT:
                # Inherited, it is not to become one of its own, which later changes above would not reach.
                inherited = torch.backends.cudnn.fp32_precision == products.fp32_precision  # of all of CUDA
                self.users = "none" if inherited else products.fp32_precision
                products.fp32_precision = "ieee"

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0 and self.users is not None:
                torch.backends.cuda.matmul.fp32_precision = self.users
                self.users = None


_WITHOUT_TF32 = _WithoutTF32()


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b of [N, K] and [K, M], in their dtype, within `as_precise_as_asked`.

    Where the process lets oneDNN, which makes products on CPUs and Intel's GPUs, round float32 operands to bfloat16 or
    TF32, they are multiplied in float64: that has no such setting. So none is changed, for other threads to see.
    """
    if a.dtype == torch.float32 and a.device.type in ("cpu", "xpu") and _onednn_rounds() and has_float64(a.device):
        return (a.double() @ b.double()).to(a.dtype)
    return a @ b


def _onednn_rounds() -> bool:
    onednn: Any = torch.backends.mkldnn
    # The second is of Intel's GPUs alone.
    return onednn.matmul.fp32_precision not in _EXACT or bool(onednn.allow_tf32) or _onednn_rounds_by_default()


@cache
def _onednn_rounds_by_default() -> bool:
    """Whether the environment, which oneDNN reads once, says so. It is set on Arm, where oneDNN makes all products."""
    names = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")
    return any(os.environ.get(name, "STRICT").upper() != "STRICT" for name in names)


def device_type(x: Tensor) -> str:
    """`x.device.type`, which is a string that torch makes anew each time: that would take 2 % of a small call."""
    return "cpu" if x.is_cpu else x.device.type


def has_float64(device: torch.device) -> bool:
    """Apple's GPUs have none, and not all of Intel's."""
    if device == _CPU:  # see `device_type`
        return True
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type != "mps"


def loss_dtype(x: Tensor) -> torch.dtype:
    """The dtype of loss and gradient: float64 for float64 embeddings, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype penalties are summed in: float64, but where there is none."""
    return torch.float64 if has_float64(device) else torch.float32


class Norms(NamedTuple):
    """|x| of rows as two factors, since their product may be beyond the dtype."""

    takes_part: Tensor  # [N, 1] bool; of other rows the length is 0
    peak: Tensor  # [N, 1] largest |component|, 1 for a zero row
    length: Tensor  # [N, 1] |x / peak|, 0 for a zero row and NaN for one that is not finite

    @property
    def is_tiny(self) -> Tensor:
        """[N, 1] bool: below EPS, which it is divided by instead."""
        return self.peak * self.length < EPS

    def divide(self, rows: Tensor) -> Tensor:
        """rows / max(|x|, EPS), with no overflow on the way."""
        is_tiny = self.is_tiny
        return rows / torch.where(is_tiny, EPS, self.peak) / torch.where(is_tiny, 1, self.length)


def unit_and_norms(x: Tensor, takes_part: Tensor) -> tuple[Tensor, Norms]:
    """x^ [N, D] and the norms of x; rows that take no part, and are not looked at, count as zero."""
    x = torch.where(takes_part[:, None], x, 0)
    peak = x.abs().amax(dim=1, keepdim=True)
    peak = torch.where(peak > 0, peak, 1)
    norms = Norms(takes_part[:, None], peak, torch.linalg.vector_norm(x / peak, dim=1, keepdim=True))
    return norms.divide(x), norms


def weighted(weight: Tensor, value: Tensor) -> Tensor:
    """weight * value, and 0 where the weight is 0: the value of a side that does not count may be infinite."""
    return torch.where(weight == 0, 0, weight * value)


def project(weight: Tensor, g: list[Tensor], x_hat: Tensor, norms: Norms) -> Tensor:
    """dL/dx = (g - (g . x^) x^) / max(|x|, EPS) with g = w- G- - w+ G+; 0 for a zero row.

    Below EPS the divisor is a constant, so nothing is projected away. Where the weights are NaN, as they are if a row
    is not finite, so are all rows that take part, a zero row too; those that do not have 0.
    """
    g_plus, g_minus = g
    total = weighted(weight[1].to(x_hat.dtype), g_minus) - weighted(weight[0].to(x_hat.dtype), g_plus)
    along = (total * x_hat).sum(dim=1, keepdim=True)
    total -= torch.where(norms.is_tiny, 0, along) * x_hat
    total *= norms.length != 0
    return torch.where(norms.takes_part, norms.divide(total), 0)
