"""The operators in PyTorch's machinery: gradcheck, opcheck, compile, autocast, and what backward may be asked."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.batches import batch, embeddings, margins
from support.oracle import Result, check, compare, oracle_of, run, two
from torch import Tensor
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounterWithBackend

from tcm_fused import TCMLoss, tcm_loss
from tcm_fused.backends import choice
from tcm_fused.backends.operators import OPERATORS
from tcm_fused.reference import tcm_reference

FORMS = ("symmetric", "reference set", "row_offset")
OPTIONS: dict[str, dict[str, Any]] = {
    "squared": {"penalty": "squared"},
    "all": {"reduction": "all"},
    "within": {"group_pairs": "within"},
    "across": {"group_pairs": "across", "penalty": "squared", "reduction": "all"},
}


def make(form: str, n: int, m: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:
    """Arguments of `tcm_loss` with half of all pairs hard; every tenth row and column is padding."""
    rng = np.random.default_rng(seed)
    y = rng.integers(4, size=n + m)
    x = torch.from_numpy(embeddings("random", y, d, rng)).to(dtype)
    y[::10] = -1
    labels = torch.from_numpy(y)
    call: dict[str, Any] = {"embeddings": x[:n].clone(), "labels": labels[:n].clone()}
    if form != "symmetric":
        call.update(ref_emb=x[n:].clone(), ref_labels=labels[n:].clone())
        call["row_offset"] = (m - n) // 2 if form == "row_offset" else None
    call.update(margins(oracle(call), 0.5), lambda_plus=0.7, lambda_minus=1.3)
    return call


def oracle(call: dict[str, Any]) -> Any:
    names = ("embeddings", "labels", "ref_emb", "ref_labels")
    options = {name: value for name, value in call.items() if name not in names}
    return oracle_of(*(call[name] for name in names if name in call), **options)


def leaves(call: dict[str, Any]) -> list[Tensor]:
    """The embeddings of `call`, made to require gradients."""
    return [call[name].requires_grad_() for name in ("embeddings", "ref_emb") if name in call]


def result_of(loss: Tensor, call: dict[str, Any], grads: list[Tensor]) -> Result:
    """`loss` and `grads`, with counts and violations from a call of their own."""
    stats = tcm_loss(**call, backend="torch", return_stats=True)[1]
    arrays = [grad.double().numpy() for grad in grads]
    return Result(
        loss=loss.item(),
        count=torch.stack(stats[:2]).numpy(),
        violation=torch.stack(stats[2:]).double().numpy(),
        grad_x=arrays[0],
        grad_ref=arrays[1] if len(arrays) > 1 else None,
    )


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


def with_options(call: dict[str, Any], name: str) -> dict[str, Any]:
    """`call` with one of OPTIONS; where there are groups, three."""
    call = {**call, **OPTIONS[name]}
    if "group_pairs" in call:
        m = len(call.get("ref_labels", call["labels"]))
        offset = call.get("row_offset") or 0
        groups = torch.arange(m) % 3
        call["groups"] = groups[offset : offset + len(call["labels"])]
        if "ref_emb" in call:
            call["ref_groups"] = groups
    return call


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
    """What the error message sends the user to."""
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
    """What the first batch size compiles serves every other, and gives the oracle's result in each."""
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
    """Inductor checks the strides of what the operator returns."""
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
