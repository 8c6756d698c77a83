"""pytorch-metric-learning's own class as a second oracle, for the plain form (its `ref_emb` is broken in 2.9.0)."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.losses import ThresholdConsistentMarginLoss
from support.batches import KINDS, embeddings
from torch import Tensor

from tcm_fused import TCMLoss


def both(backend: str, x: Tensor, y: Tensor, **options: Any) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Loss and gradient of the peer's class and of ours, called the same way with the same keywords."""
    results = []
    for criterion in (ThresholdConsistentMarginLoss(**options), TCMLoss(**options, backend=backend)):
        leaf = x.clone().requires_grad_()
        loss = criterion(leaf, y)
        torch.autograd.backward(loss)
        assert leaf.grad is not None
        results.append((loss.detach(), leaf.grad))
    return results[0], results[1]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.sampled_from([2, 3, 17, 40, 65, 70]),
    d=st.sampled_from([2, 5, 33]),
    classes=st.sampled_from([1, 2, 5, 99]),
    kind=st.sampled_from(KINDS[:4]),
    margin_plus=st.floats(-1.5, 1.5),
    margin_minus=st.floats(-1.5, 1.5),
    lambda_plus=st.floats(0, 10),
    lambda_minus=st.floats(0, 10),
)
def test_same_loss_and_gradient(
    backend: str, seed: int, n: int, d: int, classes: int, kind: str, **options: Any
) -> None:
    """In fp64, on random batches, whose pairs lie on no margin."""
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=n)
    x = torch.from_numpy(embeddings(kind, y, d, rng))
    (peer_loss, peer_grad), (loss, grad) = both(backend, x, torch.from_numpy(y), **options)
    torch.testing.assert_close(loss, peer_loss, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(grad, peer_grad, rtol=1e-11, atol=1e-12 * float(1 / x.norm(dim=1).min()))


def test_same_defaults(backend: str) -> None:
    x = torch.nn.functional.normalize(torch.randn(60, 3, dtype=torch.float64, generator=torch.manual_seed(0)))
    (peer_loss, peer_grad), (loss, grad) = both(backend, x, torch.arange(60) % 4)
    torch.testing.assert_close(loss, peer_loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(grad, peer_grad, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("classes", [1, 30])
def test_one_side_is_empty(backend: str, classes: int) -> None:
    x = torch.randn(30, 5, dtype=torch.float64, generator=torch.manual_seed(1))
    (peer_loss, peer_grad), (loss, grad) = both(backend, x, torch.arange(30) % classes, margin_minus=0.0)
    torch.testing.assert_close(loss, peer_loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(grad, peer_grad, rtol=1e-11, atol=1e-14)
