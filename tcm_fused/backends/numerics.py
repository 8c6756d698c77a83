"""Dtypes, unit rows and exact products, for all forms in plain PyTorch."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from tcm_fused.reference import EPS


@contextlib.contextmanager
def as_precise_as_asked(device_type: str, fp16: bool) -> Iterator[None]:
    """No autocast, which would make products 16-bit, and no TF32 unless `fp16` allows as little."""
    with contextlib.ExitStack() as stack:
        if torch.amp.is_autocast_available(device_type):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        if device_type == "cuda" and not fp16:
            products = torch.backends.cuda.matmul
            stack.callback(setattr, products, "fp32_precision", products.fp32_precision)
            products.fp32_precision = "ieee"
        yield


def loss_dtype(x: Tensor) -> torch.dtype:
    """The dtype of loss and gradient: float64 for float64 embeddings, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype penalties are summed in: float64, but for MPS, which has none."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def unit_and_norm(x: Tensor, takes_part: Tensor) -> tuple[Tensor, Tensor]:
    """x^ [N, D] and |x| [N, 1], with no overflow on the way; rows that take no part count as zero."""
    x = torch.where(takes_part[:, None], x, 0)
    peak = x.abs().amax(dim=1, keepdim=True)
    peak = torch.where(peak > 0, peak, 1)
    norm = torch.linalg.vector_norm(x / peak, dim=1, keepdim=True)  # in units of peak
    return torch.where(peak * norm < EPS, x / EPS, x / peak / norm), peak * norm


def project(weight: Tensor, g: list[Tensor], x_hat: Tensor, norm: Tensor) -> Tensor:
    """dL/dx = (g - (g . x^) x^) / max(|x|, EPS) with g = w- G- - w+ G+; 0 for a zero row.

    Below EPS the divisor is a constant, so nothing is projected away.
    """
    g_plus, g_minus = g
    total = weight[1].to(x_hat.dtype) * g_minus - weight[0].to(x_hat.dtype) * g_plus
    along = (total * x_hat).sum(dim=1, keepdim=True)
    total -= torch.where(norm < EPS, 0, along) * x_hat
    return torch.where(norm == 0, 0 * total, total / norm.clamp_min(EPS))
