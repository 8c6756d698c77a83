"""The loss under torch.compile: one graph, the eager gradient, shapes and margins that change."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.batches import batch
from support.forms import FORMS, leaves, make, oracle, result_of, with_options
from support.oracle import compare, run
from torch import Tensor
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounterWithBackend

from tcm_fused import TCMLoss, tcm_loss

# torch.compile.


@pytest.fixture
def dynamo() -> Iterator[None]:
    """No compiled code from before, none left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("form", FORMS)
def test_compile(backend: str, form: str, compiler: str) -> None:
    """One graph, forward and backward, with work before and after; the gradient is the eager one."""

    def step(weight: Tensor, call: dict[str, Any]) -> Tensor:
        call = {**call, "embeddings": call["embeddings"] @ weight}
        loss: Tensor = tcm_loss(**call, backend=backend)
        return 2 * loss

    call = make(form, 70, 90, 5)
    weight = (torch.eye(5, dtype=torch.float64) + 0.01).requires_grad_()
    inputs = [weight, *leaves(call)]
    eager = torch.autograd.grad(step(weight, call), inputs)
    loss = torch.compile(step, fullgraph=True, backend=compiler)(weight, call)
    torch.testing.assert_close(loss, step(weight, call), rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), eager, rtol=1e-10, atol=1e-13)


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("name", ["squared", "all"])
@pytest.mark.parametrize("form", FORMS)
def test_compile_with_options(backend: str, form: str, name: str) -> None:
    """One graph as well, forward and backward."""
    call = with_options(make(form, 70, 90, 5), name)
    inputs = leaves(call)
    loss = torch.compile(tcm_loss, fullgraph=True, backend="aot_eager")(**call, backend=backend)
    eager = tcm_loss(**call, backend=backend)
    torch.testing.assert_close(loss, eager, rtol=1e-13, atol=0)
    expected = torch.autograd.grad(eager, inputs)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("form", FORMS)
def test_compile_with_groups(backend: str, form: str) -> None:
    """They are read on the host: between two graphs, and refused where only one is allowed."""
    call = with_options(make(form, 70, 90, 5), "across")
    inputs = leaves(call)
    expected = torch.autograd.grad(tcm_loss(**call, backend=backend), inputs)
    loss = torch.compile(tcm_loss, backend="aot_eager")(**call, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), expected, rtol=1e-10, atol=1e-13)
    torch._dynamo.reset()
    reason = "(?i)data.dependent" if form == "row_offset" else "the groups are read on the host"
    with pytest.raises(Unsupported, match=reason):
        torch.compile(tcm_loss, fullgraph=True, backend="aot_eager")(**call, backend=backend)


@pytest.mark.usefixtures("dynamo")
def test_compile_with_dynamic_shapes(backend: str) -> None:
    """The code compiled for the first batch size serves every other, and gives the oracle's result in each."""
    counter = CompileCounterWithBackend("aot_eager")
    criterion = torch.compile(TCMLoss(margin_minus=0.1, backend=backend), fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for n in (40, 65, 130, 257):
        x, y = batch(n, 9, 5, seed=n)
        x.requires_grad_()
        loss = criterion(x, y)
        torch.autograd.backward(loss)
        call = {"embeddings": x.detach(), "labels": y, "margin_minus": 0.1}
        assert x.grad is not None
        compare(result_of(loss, call, [x.grad]), oracle(call), x.dtype)
        compilations.append(counter.frame_count)
    assert compilations[-1] == compilations[0]


@pytest.mark.usefixtures("dynamo")
def test_compile_again_as_shapes_change(backend: str) -> None:
    """Without being told so: the second batch size is the last that compiles."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(tcm_loss, fullgraph=True, backend=counter)
    compilations = []
    for n in (40, 65, 130, 257):
        x, y = batch(n, 9, 5, seed=n)
        assert torch.equal(compiled(x, y, backend=backend), tcm_loss(x, y, backend=backend))
        compilations.append(counter.frame_count)
    assert compilations[-1] == compilations[1]


@pytest.mark.usefixtures("dynamo")
def test_compile_with_changing_margins(backend: str) -> None:
    """A schedule of margins and weights: numbers that change from call to call are still one graph each."""
    compiled = torch.compile(tcm_loss, fullgraph=True, backend="aot_eager")
    x, y = batch(70, 9, 5)
    for step in range(4):
        schedule: dict[str, Any] = {
            "margin_plus": 0.9 - 0.1 * step,
            "margin_minus": 0.1 * step,
            "lambda_plus": 1.0 + 0.5 * step,
        }
        loss = compiled(x, y, **schedule, backend=backend)
        assert torch.equal(loss, tcm_loss(x, y, **schedule, backend=backend))


@pytest.mark.usefixtures("dynamo")
def test_compile_of_a_transposed_batch(backend: str) -> None:
    """Inductor checks the strides of the tensors that the operator returns."""
    x, y = batch(70, 9, 5, torch.float64)
    expected = run(backend, x, y, margin_minus=0.1).grad_x
    leaf = x.T.contiguous().requires_grad_()
    compiled = torch.compile(lambda t: tcm_loss(t.T, y, margin_minus=0.1, backend=backend), fullgraph=True)
    torch.autograd.backward(compiled(leaf))
    assert leaf.grad is not None
    np.testing.assert_allclose(leaf.grad.T.numpy(), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.usefixtures("dynamo")
def test_compile_where_auto_falls_back() -> None:
    """On a device without a kernel "auto" warns and runs the blocked form, in one graph too."""
    x, y = batch(70, 9, 5)
    x = x.to("meta").requires_grad_()
    loss = torch.compile(tcm_loss, fullgraph=True, backend="aot_eager")(x, y.to("meta"))
    torch.autograd.backward(loss)
    assert x.grad is not None
    assert x.grad.shape == x.shape


@pytest.mark.usefixtures("dynamo")
@pytest.mark.filterwarnings("error:.*lru_cache:UserWarning")
def test_compile_does_not_warn(backend: str) -> None:
    """Of the library's own code, that is."""
    x, y = batch(70, 9, 5)
    torch.compile(tcm_loss, fullgraph=True, backend="aot_eager")(x, y, backend=backend)


@pytest.mark.usefixtures("dynamo")
def test_compile_with_stats(backend: str) -> None:
    x, y = batch(70, 9, 5)
    compiled = torch.compile(tcm_loss, fullgraph=True, backend="aot_eager")
    options: dict[str, Any] = {"margin_minus": 0.1, "backend": backend, "return_stats": True}
    loss, stats = compiled(x, y, **options)
    expected_loss, expected = tcm_loss(x, y, **options)
    assert torch.equal(loss, expected_loss)
    assert [t.item() for t in stats] == [t.item() for t in expected]
