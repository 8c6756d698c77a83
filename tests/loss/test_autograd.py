"""The operators in PyTorch's machinery: gradcheck, opcheck, and all that may be asked of backward."""

from typing import Any

import numpy as np
import pytest
import torch
from support.batches import batch
from support.forms import FORMS, OPTIONS, leaves, make, oracle, with_options
from support.oracle import run, two
from torch import Tensor

from tcm_fused import tcm_loss
from tcm_fused.backends import choice
from tcm_fused.backends.operators import OPERATORS
from tcm_fused.reference import tcm_reference

# Derivatives.


def far_from_the_margins(form: str, n: int, m: int, d: int) -> dict[str, Any]:
    """A batch in which a step of 1e-6, in any component, takes no pair across a margin."""
    for seed in range(100):
        call = make(form, n, m, d, seed=seed)
        exact = oracle(call)
        nearest = min(np.abs(gap[pair]).min() for gap, pair in zip(exact.gap, exact.pair, strict=True))
        shortest = min(norm[norm > 0].min() for norm in (exact.norm, exact.ref_norm))
        if nearest > 3e-6 / shortest:
            return call
    raise AssertionError("no such batch")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("n", "m", "d"), [(9, 11, 5), (70, 75, 2)])
def test_gradcheck(backend: str, form: str, n: int, m: int, d: int) -> None:
    """Against finite differences of the kernel itself in fp64, to every embedding."""
    call = far_from_the_margins(form, n, m, d)

    def loss(x: Tensor, ref_x: Tensor | None = None) -> Tensor:
        changed = {"embeddings": x} if ref_x is None else {"embeddings": x, "ref_emb": ref_x}
        arguments: dict[str, Any] = {**call, **changed}
        value: Tensor = tcm_loss(**arguments, backend=backend)
        return value

    assert torch.autograd.gradcheck(loss, tuple(leaves(call)), eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OPTIONS)
def test_options_in_autograd(backend: str, name: str, form: str) -> None:
    """Finite differences in fp64; two backward passes, a factor, no second derivative, none where none is due."""
    call = with_options(far_from_the_margins(form, 12, 14, 5), name)

    def loss(x: Tensor, ref_x: Tensor | None = None) -> Tensor:
        changed = {"embeddings": x} if ref_x is None else {"embeddings": x, "ref_emb": ref_x}
        arguments: dict[str, Any] = {**call, **changed}
        value: Tensor = tcm_loss(**arguments, backend=backend)
        return value

    assert not loss(call["embeddings"], call.get("ref_emb")).requires_grad
    inputs = tuple(leaves(call))
    assert torch.autograd.gradcheck(loss, inputs, eps=1e-6, atol=1e-8, rtol=1e-6, fast_mode=True)
    value = loss(*inputs)
    first = torch.autograd.grad(value, inputs, retain_graph=True)
    again = torch.autograd.grad(-2 * value, inputs, create_graph=True)
    for grad, twice in zip(first, again, strict=True):
        assert torch.equal(-2 * grad, twice)
        assert grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match=r"tcm_loss has no second derivative"):
        torch.stack([grad.square().sum() for grad in again]).sum().backward()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            constant = loss(*inputs)
        assert not constant.requires_grad
        assert torch.equal(constant, value)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_only_where_required(backend: str, form: str) -> None:
    call = make(form, 40, 60, 5)
    assert not tcm_loss(**call, backend=backend).requires_grad
    for name in ("embeddings", "ref_emb"):
        if name in call:
            call[name].requires_grad_()
            tcm_loss(**call, backend=backend).backward()
            assert call[name].grad.abs().sum() > 0
            call[name] = call[name].detach()


@pytest.mark.parametrize("form", FORMS)
def test_no_grad_and_inference_mode(backend: str, form: str) -> None:
    call = make(form, 40, 60, 5)
    plain = tcm_loss(**call, backend=backend)
    leaves(call)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            loss = tcm_loss(**call, backend=backend)
            inside = tcm_loss(**make(form, 40, 60, 5), backend=backend)
        assert not loss.requires_grad
        assert torch.equal(loss, plain)
        assert torch.equal(inside, plain)


@pytest.mark.parametrize("form", FORMS)
def test_retain_graph(backend: str, form: str) -> None:
    """Three backward passes through one graph give three times the same gradient, whatever is done to `.grad`."""
    call = make(form, 130, 150, 9, torch.float32)
    inputs = leaves(call)
    loss = tcm_loss(**call, backend=backend)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    kept = [grad.clone() for grad in first]
    for grad in first:
        grad.zero_()
    for _ in range(3):
        for leaf in inputs:
            leaf.grad = None
        torch.autograd.backward(loss, retain_graph=True)
        for leaf, expected in zip(inputs, kept, strict=True):
            assert leaf.grad is not None
            assert torch.equal(leaf.grad, expected)
            leaf.grad.fill_(torch.nan)
    for leaf in inputs:
        leaf.grad = None
    torch.autograd.backward(loss, retain_graph=True)
    torch.autograd.backward(loss)
    for leaf, expected in zip(inputs, kept, strict=True):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, 2 * expected)


@pytest.mark.parametrize("form", FORMS)
def test_saved_tensors_are_not_modified(backend: str, form: str) -> None:
    saved: list[tuple[Tensor, Tensor]] = []

    def pack(t: Tensor) -> Tensor:
        saved.append((t, t.clone()))
        return t

    call = make(form, 40, 60, 5)
    inputs = leaves(call)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = tcm_loss(**call, backend=backend)
    torch.autograd.grad(3 * loss, inputs, retain_graph=True)
    torch.autograd.grad(loss, inputs)
    assert saved
    for now, then in saved:
        assert torch.equal(now, then)


def test_inputs_may_change_after_forward(backend: str) -> None:
    """The gradient is that of the embeddings as they were: an optimiser's step or a reused buffer does not reach it."""
    x, y = batch(80, 9, 5, torch.float64)
    expected = run(backend, x, y, margin_minus=0.1).grad_x
    buffer = x.clone().requires_grad_()
    loss = tcm_loss(buffer, y, margin_minus=0.1, backend=backend)
    with torch.no_grad():
        buffer.fill_(torch.nan)
    torch.autograd.backward(loss)
    assert buffer.grad is not None
    np.testing.assert_array_equal(buffer.grad.numpy(), expected)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_of_a_function_of_the_loss(backend: str, form: str) -> None:
    """The chain rule: a factor that is a power of two changes no bit, a factor of 0 gives 0."""
    call = make(form, 40, 60, 5, torch.float32)
    inputs = leaves(call)
    plain = torch.autograd.grad(tcm_loss(**call, backend=backend), inputs)
    for factor in (4.0, -0.5, 0.0):
        scaled = torch.autograd.grad(factor * tcm_loss(**call, backend=backend), inputs)
        for grad, expected in zip(scaled, plain, strict=True):
            assert torch.equal(grad, factor * expected)
    loss = tcm_loss(**call, backend=backend)
    squared = torch.autograd.grad(loss.square(), inputs)
    for grad, expected in zip(squared, plain, strict=True):
        torch.testing.assert_close(grad, 2 * loss.detach() * expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [None, *OPTIONS])
def test_loss_scaling_keeps_small_fp16_gradients(backend: str, name: str | None) -> None:
    """A gradient too small for fp16 is multiplied by the loss scale before it is rounded to fp16."""
    rng = np.random.default_rng(4)
    x = torch.from_numpy(rng.standard_normal((200, 16)) * 2000).half()
    y = torch.from_numpy(rng.integers(5, size=200))
    call: dict[str, Any] = {} if name is None else with_options({"labels": y}, name)
    call = {"margin_minus": 0.0, **{key: value for key, value in call.items() if key != "labels"}}
    expected = run(backend, x.float(), y, **call).grad_x
    assert np.abs(expected).max() < 1e-6
    x.requires_grad_()
    torch.autograd.backward(tcm_loss(x, y, **call, backend=backend) * 2.0**18)
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.double().numpy(), expected * 2.0**18, rtol=1e-3, atol=1e-6)


# Second derivatives.


@pytest.mark.parametrize("form", FORMS)
def test_create_graph_gives_the_same_first_derivative(backend: str, form: str) -> None:
    call = make(form, 40, 60, 5)
    inputs = leaves(call)
    plain = torch.autograd.grad(tcm_loss(**call, backend=backend), inputs)
    graph = torch.autograd.grad(tcm_loss(**call, backend=backend), inputs, create_graph=True)
    for grad, expected in zip(graph, plain, strict=True):
        assert torch.equal(grad, expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scaled", [False, True])
def test_double_backward_raises(backend: str, scaled: bool, form: str) -> None:
    """Also where the loss itself is the root, and where another term would let a missing part pass unseen."""
    for penalty in (False, True):
        call = make(form, 40, 60, 5)
        inputs = leaves(call)
        loss = tcm_loss(**call, backend=backend)
        loss = loss.square() if scaled else loss
        grads = torch.autograd.grad(loss, inputs, create_graph=True)
        norm = torch.stack([grad.square().sum() for grad in grads]).sum()
        with pytest.raises(RuntimeError, match=r"tcm_loss has no second derivative.*tcm_reference"):
            (loss + norm if penalty else norm).backward()


@pytest.mark.parametrize("form", FORMS)
def test_reference_has_second_derivatives(form: str) -> None:
    """The remedy that the error message names."""
    call = far_from_the_margins(form, 7, 9, 3)

    def loss(x: Tensor, ref_x: Tensor | None = None) -> Tensor:
        changed = {"embeddings": x} if ref_x is None else {"embeddings": x, "ref_emb": ref_x}
        arguments: dict[str, Any] = {**call, **changed}
        return tcm_reference(**arguments)[0]

    assert torch.autograd.gradgradcheck(loss, tuple(leaves(call)))


# The operators themselves.


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("grad_x", "grad_ref"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(backend: str, dtype: torch.dtype, grad_x: bool, grad_ref: bool, form: str) -> None:
    """Schema, fake kernel, autograd registration, and tracing with static and dynamic shapes."""
    call = make(form, 70, 90, 5, dtype)
    operator = OPERATORS[choice.choose(backend, "cpu", dtype)].loss
    torch.library.opcheck(operator, operator_arguments(call, grad_x, grad_ref))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "empty"])
def test_opcheck_of_layouts(backend: str, layout: str, form: str) -> None:
    """The fake kernel tells the strides of the results too: inductor relies on them."""
    call = make(form, 70, 90, 5)
    for name in ("embeddings", "ref_emb"):
        if name in call:
            x = call[name]
            call[name] = {
                "transposed": x.T.contiguous().T,
                "strided": x.repeat(2, 2)[::2, ::2],
                "expanded": x[:1].expand_as(x),
                "empty": x[:0],
            }[layout]
            if layout == "empty":
                call["labels" if name == "embeddings" else "ref_labels"] = torch.empty(0, dtype=torch.int64)
    if layout == "empty" and form == "row_offset":
        call["row_offset"] = 0
    operator = OPERATORS[choice.choose(backend, "cpu", torch.float64)].loss
    torch.library.opcheck(operator, operator_arguments(call, True, True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("grad_x", "grad_ref"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_of_penalties(backend: str, dtype: torch.dtype, grad_x: bool, grad_ref: bool, form: str) -> None:
    """The same where the penalties are what has a gradient."""
    call = make(form, 70, 90, 5, dtype)
    operator = OPERATORS[choice.choose(backend, "cpu", dtype)].penalties
    torch.library.opcheck(operator, operator_arguments(call, grad_x, grad_ref, weights=False))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", [0, 1])
def test_penalties_have_gradients_of_their_own(backend: str, side: int, form: str) -> None:
    """Against finite differences in fp64. An upstream of 0 and the other side play no part."""
    call = far_from_the_margins(form, 9, 11, 5)
    operator = OPERATORS[choice.choose(backend, "cpu", torch.float64)].penalties

    def penalty(x: Tensor, ref_x: Tensor | None = None) -> Tensor:
        changed = {"embeddings": x} if ref_x is None else {"embeddings": x, "ref_emb": ref_x}
        arguments = operator_arguments({**call, **changed}, True, True, weights=False)
        value: Tensor = operator(x, arguments[1], ref_x, *arguments[3:])[0]
        return value

    inputs = tuple(leaves(call))
    assert torch.autograd.gradcheck(lambda *x: penalty(*x)[side], inputs, eps=1e-6, atol=1e-8, rtol=1e-6)
    grads = torch.autograd.grad(penalty(*inputs), inputs, torch.eye(2, dtype=torch.float64)[side])
    for grad, expected in zip(torch.autograd.grad(penalty(*inputs)[side], inputs), grads, strict=True):
        assert torch.equal(grad, expected)
        assert grad.abs().sum() > 0
    for grad in torch.autograd.grad(penalty(*inputs), inputs, torch.zeros(2, dtype=torch.float64)):
        assert not grad.any()
    graph = torch.autograd.grad(penalty(*inputs).square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=r"tcm_loss has no second derivative"):
        torch.stack([grad.square().sum() for grad in graph]).sum().backward()


def operator_arguments(call: dict[str, Any], grad_x: bool, grad_ref: bool, weights: bool = True) -> tuple[Any, ...]:
    ref_x = call.get("ref_emb")
    grad_ref = grad_ref and ref_x is not None
    return (
        call["embeddings"].detach().requires_grad_(grad_x),
        call["labels"],
        None if ref_x is None else ref_x.detach().requires_grad_(grad_ref),
        call.get("ref_labels"),
        call.get("row_offset"),
        two(call["margin_plus"], call["margin_minus"]),
        *([two(call["lambda_plus"], call["lambda_minus"])] if weights else []),
        False,
        False,
        grad_x,
        grad_ref,
    )


# The usual company.


def test_accumulation_with_another_loss(backend: str) -> None:
    """One graph with another term, as in training: gradients add up."""
    x, y = batch(60, 9, 5, torch.float64)
    x.requires_grad_()
    torch.autograd.backward(tcm_loss(x, y, margin_minus=0.1, backend=backend) + x.square().mean())
    expected = run(backend, x, y, margin_minus=0.1).grad_x
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), expected + 2 * x.detach().numpy() / x.numel(), rtol=1e-12, atol=1e-15)


def test_checkpointing(backend: str) -> None:
    """Forward is run again in backward and gives the same gradient."""
    x, y = batch(60, 9, 5, torch.float64)
    expected = run(backend, x, y, margin_minus=0.1).grad_x
    x.requires_grad_()
    loss = torch.utils.checkpoint.checkpoint(
        lambda t: tcm_loss(2 * t, y, margin_minus=0.1, backend=backend), x, use_reentrant=False
    )
    torch.autograd.backward(loss)
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), expected, rtol=1e-12, atol=1e-15)


def test_training_lowers_the_loss(backend: str) -> None:
    """Two hundred steps of plain descent: classes part, no pair is left hard, and then the gradient is 0."""
    x, y = batch(24, 8, 3, seed=7)
    x.requires_grad_()
    optimiser = torch.optim.Adam([x], lr=0.1)
    losses = []
    for _ in range(200):
        optimiser.zero_grad()
        loss = tcm_loss(x, y, backend=backend)
        torch.autograd.backward(loss)
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > 0.5
    assert losses[-1] == 0
    assert x.grad is not None
    assert not x.grad.any()
