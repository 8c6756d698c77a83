"""Margins and weights that change from call to call: numbers and 0-d tensors, eager and under torch.compile."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.batches import batch
from support.oracle import two
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tcm_fused import CrossBatchMemory, TCMLoss, tcm_loss
from tcm_fused.backends.operators import OPERATORS
from tcm_fused.reference import tcm_reference

NAMES = ("margin_plus", "margin_minus", "lambda_plus", "lambda_minus")
VALUES = (0.7, -0.1, 0.5, 2.0)
OPTIONS: dict[str, dict[str, Any]] = {"plain": {}, "squared": {"penalty": "squared"}, "all": {"reduction": "all"}}


@pytest.fixture
def dynamo() -> Iterator[None]:
    """No compiled code from before, none left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def sets(rectangular: bool) -> Any:  # a tuple of tensors, as positional arguments
    x, y = batch(40, 5, 4, torch.float64)
    if not rectangular:
        return x.requires_grad_(), y
    ref_x, ref_y = batch(50, 5, 4, torch.float64, seed=1)
    return x.requires_grad_(), y, ref_x.requires_grad_(), ref_y


def loss_and_gradients(loss: Tensor, given: tuple[Tensor, ...]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, given[::2])]


# Every kind of number.


@pytest.mark.parametrize("rectangular", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int32], ids=str)
def test_tensors_are_their_values(backend: str, dtype: torch.dtype, name: str, rectangular: bool) -> None:
    """Loss and gradients to the bit, of any real dtype; those that are no integers are rounded as the dtype rounds."""
    given = sets(rectangular)
    values = (1, 0, 2, 3) if dtype == torch.int32 else VALUES
    tensors: dict[str, Any] = dict(zip(NAMES, (torch.tensor(value, dtype=dtype) for value in values), strict=True))
    numbers: dict[str, Any] = {key: value.item() for key, value in tensors.items()}
    expected = loss_and_gradients(tcm_loss(*given, **{**numbers, **OPTIONS[name], "backend": backend}), given)
    for mixed in (tensors, {**numbers, "margin_plus": tensors["margin_plus"]}, {**tensors, "lambda_minus": values[3]}):
        exact = {**mixed, "lambda_minus": mixed["lambda_minus"]}
        if exact["lambda_minus"] is values[3]:
            exact["lambda_minus"] = numbers["lambda_minus"]
        found = loss_and_gradients(tcm_loss(*given, **{**exact, **OPTIONS[name], "backend": backend}), given)
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("group_pairs", ["within", "across"])
def test_tensors_with_groups(backend: str, group_pairs: str) -> None:
    x, y = batch(40, 5, 4, torch.float64)
    call: dict[str, Any] = {"groups": torch.arange(40) % 3, "group_pairs": group_pairs, "backend": backend}
    numbers: dict[str, Any] = dict(zip(NAMES, VALUES, strict=True))
    tensors: dict[str, Any] = {key: torch.tensor(value, dtype=torch.float64) for key, value in numbers.items()}
    assert torch.equal(tcm_loss(x, y, **tensors, **call), tcm_loss(x, y, **numbers, **call))


def test_tensors_in_the_module_and_the_memory(backend: str) -> None:
    numbers: dict[str, Any] = dict(zip(NAMES, VALUES, strict=True))
    tensors: dict[str, Any] = {key: torch.tensor(value, dtype=torch.float64) for key, value in numbers.items()}
    x, y = batch(40, 5, 4, torch.float64)
    assert torch.equal(TCMLoss(**tensors, backend=backend)(x, y), TCMLoss(**numbers, backend=backend)(x, y))
    first, second = (CrossBatchMemory(TCMLoss(**options, backend=backend), 64) for options in (numbers, tensors))
    for _ in range(3):
        assert torch.equal(first(x, y), second(x, y))


def test_the_reference_takes_them() -> None:
    given = sets(True)
    numbers: dict[str, Any] = dict(zip(NAMES, VALUES, strict=True))
    tensors: dict[str, Any] = {key: torch.tensor(value, dtype=torch.float64) for key, value in numbers.items()}
    assert torch.equal(tcm_reference(*given, **tensors)[0], tcm_reference(*given, **numbers)[0])
    x, y = batch(9, 3, 2)
    assert tcm_reference(x, y, lambda_plus=torch.tensor(1.0, dtype=torch.float64))[0].dtype == torch.float32


def test_a_value_is_that_of_the_call(backend: str) -> None:
    """A tensor that changes afterwards changes neither the gradient of an earlier call nor constants of a later one."""
    x, y = sets(False)
    margin = torch.tensor(0.9, dtype=torch.float64)
    expected = [
        loss_and_gradients(tcm_loss(x, y, margin_plus=m, margin_minus=0.1, backend=backend), (x, y)) for m in (0.9, 0.2)
    ]
    loss = tcm_loss(x, y, margin_plus=margin, margin_minus=0.1, backend=backend)
    margin.fill_(0.2)
    assert all(map(torch.equal, loss_and_gradients(loss, (x, y)), expected[0]))
    again = tcm_loss(x, y, margin_plus=margin, margin_minus=0.1, backend=backend)
    assert all(map(torch.equal, loss_and_gradients(again, (x, y)), expected[1]))


def test_constants_of_inference_mode_and_of_fake_tensors(backend: str) -> None:
    """Neither is left behind for calls outside."""
    x, y = sets(False)
    options: dict[str, Any] = {"margin_plus": 0.8125, "lambda_plus": 1.375, "reduction": "all", "backend": backend}
    with torch.inference_mode():
        tcm_loss(x, y, **options)
    torch.autograd.grad(tcm_loss(x, y, **options), x)
    options.update(margin_plus=0.8375, lambda_plus=1.4375)
    with torch._subclasses.FakeTensorMode():
        fake = tcm_loss(torch.empty(40, 5), torch.zeros(40, dtype=torch.int64), **options)
    assert fake.shape == ()
    tcm_loss(x, y, **options).item()


def test_a_default_device_does_not_matter(backend: str) -> None:
    x, y = sets(False)
    options: dict[str, Any] = {"margin_plus": 0.84375, "backend": backend}
    expected = tcm_loss(x, y, **options)
    try:
        torch.set_default_device("meta")
        assert torch.equal(tcm_loss(x, y, **{**options, "margin_minus": 0.53125 - 0.03125}), expected)
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["cpu", "torch", "triton"])
def test_numbers_that_are_not_finite_where_nobody_looks(name: str, number: float) -> None:
    """On a device, and in compiled code: loss, penalties and gradients are NaN, but those of rows that take no part."""
    x, y = batch(40, 5, 4)
    y[::7] = -1
    operators = OPERATORS[name]
    for margins, weights in (
        ((number, 0.1), (1, 1)),
        ((0.9, number), (1, 1)),
        ((0.9, 0.1), (number, 1)),
        ((-5, 5), (1, number)),
    ):
        loss, grad, _, penalty, _ = operators.loss(
            x, y, None, None, None, two(*margins), two(*weights), False, False, True, False
        )
        assert loss.isnan()
        results = [grad]
        if number in margins:
            penalty, sides, _, _ = operators.penalties(x, y, None, None, None, two(*margins), False, False, True, False)
            assert penalty.isnan().all()
            results.append(sides)
        for result in results:
            assert result[..., y >= 0, :].isnan().all()
            assert not result[..., y < 0, :].any()


# Compiled: 20 values, against eager.

SCHEDULES: dict[str, Callable[..., Tensor]] = {
    "factor": lambda given, s, options: s * tcm_loss(*given, margin_plus=0.3 + 0.5 * s, margin_minus=0.1, **options),
    "all four": lambda given, s, options: tcm_loss(
        *given, margin_plus=s, margin_minus=s - 0.4, lambda_plus=s * s, lambda_minus=2 - s, **options
    ),
}
KINDS: dict[str, Callable[[float], Any]] = {
    "number": float,
    "float32": torch.tensor,
    "float64": lambda s: torch.tensor(s, dtype=torch.float64),
    "NumPy": np.float64,
}


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_compiled_schedule_is_never_stale(backend: str, schedule: str, kind: str, fullgraph: bool) -> None:
    """Of tensors one graph, of numbers two: the first value's, and that of all others."""
    assert_never_stale(backend, SCHEDULES[schedule], kind, sets(False), {}, fullgraph, "aot_eager")


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("kind", ["number", "float32"])
@pytest.mark.parametrize("name", ["plain", "squared", "all"])
def test_a_compiled_schedule_with_options(backend: str, name: str, kind: str) -> None:
    assert_never_stale(backend, SCHEDULES["all four"], kind, sets(True), OPTIONS[name], True, "aot_eager")


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("kind", ["number", "float32"])
def test_a_schedule_in_inductor(backend: str, kind: str) -> None:
    assert_never_stale(backend, SCHEDULES["factor"], kind, sets(False), {}, True, "inductor")


def assert_never_stale(
    backend: str,
    schedule: Callable[..., Tensor],
    kind: str,
    given: tuple[Tensor, ...],
    options: dict[str, Any],
    fullgraph: bool,
    compiler: str,
) -> None:
    options = {**options, "backend": backend}
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(schedule, fullgraph=fullgraph, backend=counter)
    graphs = []
    for s in np.linspace(0.9, 0.14, 20):
        value = KINDS[kind](float(s))
        expected = loss_and_gradients(schedule(given, value, options), given)
        found = loss_and_gradients(compiled(given, value, options), given)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
        graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[1 if kind == "number" else 0]
    if kind == "float32":  # of a 0-d float64 tensor PyTorch itself traces once more before it compiles
        assert graphs[-1] == 1


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("kind", ["number", "float32", "NumPy"])
def test_a_compiled_module_whose_attributes_change(backend: str, kind: str) -> None:
    given = sets(False)
    criterion = TCMLoss(backend=backend, margin_minus=0.1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(criterion, fullgraph=True, backend=counter)
    graphs = []
    for s in np.linspace(0.9, 0.14, 20):
        criterion.margin_plus, criterion.lambda_minus = KINDS[kind](float(s)), KINDS[kind](float(1 + s))
        expected = loss_and_gradients(criterion(*given), given)
        torch.testing.assert_close(loss_and_gradients(compiled(*given), given), expected, rtol=1e-7, atol=1e-9)
        graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[2 if kind == "number" else 0]
