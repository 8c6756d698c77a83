"""The products of the CPU kernels are exact to float32, whatever the process has allowed its libraries."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

MARGINS, WEIGHTS = torch.tensor([[1.5, 0.0], [1.0, 2.0]], dtype=torch.float64)  # violations are far above rounding


@pytest.fixture(params=["", "mm", "wide"], ids=["brgemm", "mm", "wide"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the kernels' products are made."""
    if request.param:
        monkeypatch.setenv("TCM_FUSED_PRODUCTS", request.param)
    return str(request.param)


@pytest.fixture(params=["highest", "medium", "bf16", "tf32", "bf16 everywhere"])
def allowed(request: pytest.FixtureRequest) -> Iterator[None]:
    """A setting of the process that allows less than float32."""
    every: Any = torch.backends
    matmul = every.mkldnn.matmul
    before = [(owner, owner.fp32_precision) for owner in (every, every.cuda.matmul, matmul)]
    if request.param in ("highest", "medium"):
        torch.set_float32_matmul_precision(request.param)
    else:
        (every if request.param == "bf16 everywhere" else matmul).fp32_precision = request.param.split()[0]
    seen = matmul.fp32_precision
    yield
    assert matmul.fp32_precision == seen
    for owner, precision in before:
        owner.fp32_precision = precision


def batch() -> tuple[Tensor, Tensor]:
    """Similarities around 0 and 0.9, and enough rows for several threads."""
    y = torch.arange(400) // 4
    g = torch.Generator().manual_seed(0)
    return torch.randn(100, 64, generator=g)[y] + 0.3 * torch.randn(400, 64, generator=g), y


def loss(x: Tensor, y: Tensor, squared: bool) -> tuple[Tensor, ...]:
    return torch.ops.tcm_fused.loss(x, y, None, None, None, MARGINS, WEIGHTS, squared, False, True, False)


@pytest.mark.usefixtures("products", "allowed")
@pytest.mark.parametrize("squared", [False, True])
def test_loss_is_exact(squared: bool) -> None:
    """A product in bfloat16 would be off by 1e-4."""
    x, y = batch()
    value, gradient, _, penalty, count = loss(x, y, squared)
    right, right_gradient, _, right_penalty, right_count = loss(x.double(), y, squared)
    assert (count - right_count).abs().max() <= 2, "only a pair on a margin may fall to the other side"
    torch.testing.assert_close(penalty, right_penalty, rtol=2e-6, atol=0)
    torch.testing.assert_close(value.double(), right, rtol=2e-6, atol=0)
    assert (gradient - right_gradient).abs().max() < 1e-5 * right_gradient.abs().max()


@pytest.mark.usefixtures("products", "allowed")
def test_counts_are_exact() -> None:
    x, y = batch()
    for dtype in (torch.float32, torch.float64):
        best = torch.ops.tcm_fused.counts(x.to(dtype), y, None, None, 100, torch.empty(0, dtype=dtype), 10, None)[2]
        unit = torch.nn.functional.normalize(x.double())
        s = (unit[:, None] * unit[None]).sum(-1).fill_diagonal_(-2)
        same = y[:, None] == y[None]
        for got, pairs in zip(best, (same, ~same), strict=True):
            torch.testing.assert_close(got.double(), s.where(pairs, -2).amax(1), rtol=0, atol=1e-6)
