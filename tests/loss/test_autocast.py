"""Autocast: the dtype that comes in decides, and float32 stays as precise as it is."""

import numpy as np
import pytest
import torch
from support.batches import batch
from support.forms import FORMS, leaves, make, oracle
from support.oracle import Result, check, compare, run

from tcm_fused import tcm_loss

# Autocast.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_autocast_leaves_fp32as_precise_as_it_is(backend: str, form: str, dtype: torch.dtype) -> None:
    """Autocast does not reach the operator's own products: loss, counts and gradient are those without it."""
    call = make(form, 130, 200, 33, torch.float32)
    inputs = leaves(call)
    with torch.autocast("cpu", dtype=dtype):
        loss, stats = tcm_loss(**call, backend=backend, return_stats=True)
    grads = torch.autograd.grad(loss, inputs)
    assert loss.dtype == torch.float32
    result = Result(
        loss=loss.item(),
        count=torch.stack(stats[:2]).numpy(),
        violation=torch.stack(stats[2:]).double().numpy(),
        grad_x=grads[0].double().numpy(),
        grad_ref=grads[1].double().numpy() if len(grads) > 1 else None,
    )
    compare(result, oracle(call), torch.float32)


def test_autocast_of_a_model(backend: str) -> None:
    """A layer that autocast runs in bf16 feeds the loss: that is fp32, and the fp32 weight gets its gradient."""
    x, y = batch(80, 9, 5)
    layer = torch.nn.Linear(9, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = layer(x)
        features.retain_grad()
        loss = tcm_loss(features, y, margin_minus=0.1, backend=backend)
    assert features.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    torch.autograd.backward(loss)
    expected = check(backend, features.detach(), y, margin_minus=0.1)
    assert features.grad is not None
    np.testing.assert_array_equal(features.grad.double().numpy(), expected.grad_x)
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    assert layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_autocast_mixes_dtypes(backend: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Rows in bf16 against a memory in fp32, and the reverse: each gets a gradient in its own dtype."""
    (x, y), (ref_x, ref_y) = batch(80, 9, 5, dtypes[0]), batch(120, 9, 5, dtypes[1], seed=1)
    x.requires_grad_()
    ref_x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = tcm_loss(x, y, ref_x, ref_y, margin_minus=0.1, backend=backend)
    torch.autograd.backward(loss)
    expected = run(backend, x.float(), y, ref_x.float(), ref_y, margin_minus=0.1)
    assert loss.item() == pytest.approx(expected.loss, rel=1e-6)
    for leaf, grad in ((x, expected.grad_x), (ref_x, expected.grad_ref)):
        assert leaf.grad is not None
        assert grad is not None
        assert leaf.grad.dtype == leaf.dtype
        tolerance = torch.finfo(leaf.dtype).eps
        np.testing.assert_allclose(
            leaf.grad.double().numpy(), grad, rtol=tolerance, atol=tolerance * np.abs(grad).max()
        )
