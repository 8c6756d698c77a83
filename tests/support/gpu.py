"""Sets on the GPU, and the loss of them with all its gradients, for comparison bit by bit."""

from typing import Any

import pytest
import torch
from torch import Tensor

from support.batches import batch
from tcm_fused import tcm_loss

DEVICE = torch.device("cuda")


# dtype of the embeddings, and the precision asked for: one product in fp16, or three.
ARITHMETIC = (
    (torch.float16, "auto"),
    (torch.bfloat16, "auto"),
    (torch.float32, "fp16"),
    (torch.float32, "fp32"),
    (torch.bfloat16, "fp32"),
)
arithmetic = pytest.mark.parametrize(("dtype", "precision"), ARITHMETIC)


# Around the sides of tiles, 64 to 256, and several tiles with a ragged last one.
SIZES = (1, 2, 3, 17, 63, 64, 65, 127, 128, 129, 192, 255, 256, 257, 300, 513, 700)
WIDTHS = (1, 2, 3, 7, 8, 31, 33, 64, 65, 100, 128, 257, 520)


# The same bits.


def on_gpu(n: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    x, y = batch(n, d, 40, dtype, seed)
    return x.to(DEVICE), y.to(DEVICE)


def loss_and_gradients(backend: str, *sets: Tensor, **options: Any) -> list[Tensor]:
    """Loss, counts and gradients to all embeddings, on the device."""
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in sets]
    loss, stats = tcm_loss(*leaves, **{"margin_minus": 0.0, "backend": backend, **options}, return_stats=True)
    return [loss.detach(), *stats, *torch.autograd.grad(loss, leaves[::2])]


def assert_same_bits(some: list[Tensor], others: list[Tensor]) -> None:
    for one, other in zip(some, others, strict=True):
        assert torch.equal(one, other)
