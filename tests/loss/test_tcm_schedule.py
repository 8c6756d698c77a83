"""`TCMSchedule`: the values of every step, resumption, and losses that follow it: compiled, in a memory, on ranks."""

import copy
import io
from typing import Any

import pytest
import torch
from support.batches import batch
from support.parts import Pools, refused
from torch._dynamo.testing import CompileCounterWithBackend

from tcm_fused import CrossBatchMemory, DistributedTCMLoss, TCMLoss, TCMSchedule
from tcm_fused.integrations.pytorch_metric_learning import ThresholdConsistentMarginLoss
from tcm_fused.schedule import NAMES

FULL: dict[str, Any] = {"margin_plus": 0.8, "margin_minus": 0.2, "lambda_plus": 2.0, "lambda_minus": 0.5}


def values_of(loss: Any) -> dict[str, float]:
    return {name: float(getattr(loss, name)) for name in NAMES}


def test_the_weights_warm_up() -> None:
    """0 while it is delayed, then a straight line, then the loss's own, to the bit; margins stay numbers."""
    loss = TCMLoss(**FULL)
    schedule = TCMSchedule(loss, steps=4, delay=3)
    for step in range(12):
        share = min(max((step - 3) / 4, 0), 1)
        expected = {**FULL, "lambda_plus": share * 2.0, "lambda_minus": share * 0.5}
        assert values_of(loss) == expected
        assert schedule.values() == {name: expected[name] for name in ("lambda_plus", "lambda_minus")}
        schedule.step()
    assert loss.margin_plus == 0.8 and not isinstance(loss.margin_plus, torch.Tensor)


def test_margins_from_start_to_end() -> None:
    loss = TCMLoss(margin_plus=0.9, margin_minus=0.3)
    schedule = TCMSchedule(loss, steps=10, margin_plus=0.5, margin_minus=-0.1, lambda_plus=None, lambda_minus=None)
    assert set(schedule.values()) == {"margin_plus", "margin_minus"}
    assert (float(loss.margin_plus), float(loss.margin_minus)) == (0.5, -0.1)
    for _ in range(5):
        schedule.step()
    assert values_of(loss) == pytest.approx(
        {"margin_plus": 0.7, "margin_minus": 0.1, "lambda_plus": 1, "lambda_minus": 1}
    )
    for _ in range(20):
        schedule.step()
    assert (float(loss.margin_plus), float(loss.margin_minus)) == (0.9, 0.3)


def test_two_schedules_of_one_loss() -> None:
    loss = TCMLoss(**FULL)
    weights = TCMSchedule(loss, steps=2)
    margin = TCMSchedule(loss, steps=8, margin_plus=0.4, lambda_plus=None, lambda_minus=None)
    for _ in range(4):
        weights.step()
        margin.step()
    assert values_of(loss) == pytest.approx({**FULL, "margin_plus": 0.6})


def test_the_loss_is_that_of_the_numbers(backend: str) -> None:
    """Loss and gradient at each step, to the bit, on each backend."""
    x, y = batch(40, 5, 4, torch.float64)
    x.requires_grad_()
    loss = TCMLoss(**FULL, backend=backend)
    schedule = TCMSchedule(loss, steps=3, delay=1, margin_plus=0.95, margin_minus=0.0)
    for _ in range(6):
        numbers: dict[str, Any] = values_of(loss)
        found, expected = loss(x, y), TCMLoss(**numbers, backend=backend)(x, y)
        assert torch.equal(found, expected)
        assert all(map(torch.equal, torch.autograd.grad(found, x), torch.autograd.grad(expected, x)))
        schedule.step()


def test_one_tensor_is_set_in_every_step() -> None:
    """So that what was captured with it follows; integers, which have no values between, become float64."""
    loss = TCMLoss(lambda_plus=torch.tensor(2.0), lambda_minus=torch.tensor(3))
    schedule = TCMSchedule(loss, steps=2)
    tensor = loss.lambda_plus
    assert float(tensor) == 0
    schedule.step()
    assert loss.lambda_plus is tensor and float(tensor) == 1
    assert float(loss.lambda_minus) == 1.5


@pytest.mark.parametrize("kind", ["number", "float32"])
def test_one_graph_when_compiled(backend: str, kind: str) -> None:
    torch._dynamo.reset()
    given: dict[str, Any] = FULL if kind == "number" else {name: torch.tensor(value) for name, value in FULL.items()}
    x, y = batch(40, 5, 4, torch.float64)
    loss = TCMLoss(**given, backend=backend)
    schedule = TCMSchedule(loss, steps=10, margin_plus=0.3)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    graphs = []
    for _ in range(12):
        numbers: dict[str, Any] = values_of(loss)
        torch.testing.assert_close(compiled(x, y), TCMLoss(**numbers, backend=backend)(x, y), rtol=1e-12, atol=1e-15)
        graphs.append(counter.frame_count)
        schedule.step()
    torch._dynamo.reset()
    assert graphs[-1] == graphs[0]


@pytest.mark.parametrize("count", [0, 3, 7, 100])
def test_resumption(count: int) -> None:
    """From a checkpoint that was written and read, into a new loss: the same values from there on."""

    def make() -> tuple[TCMLoss, TCMSchedule]:
        loss = TCMLoss(**FULL)
        return loss, TCMSchedule(loss, steps=6, delay=2, margin_minus=-0.4)

    loss, schedule = make()
    for _ in range(count):
        schedule.step()
    file = io.BytesIO()
    torch.save(schedule.state_dict(), file)
    file.seek(0)
    resumed_loss, resumed = make()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(5):
        assert values_of(resumed_loss) == values_of(loss)
        schedule.step()
        resumed.step()


def test_a_copy_of_the_loss_is_left_alone() -> None:
    loss = TCMLoss(**FULL)
    schedule = TCMSchedule(loss, steps=2)
    schedule.step()
    twin = copy.deepcopy(loss)
    schedule.step()
    assert float(twin.lambda_plus) == 1.0 and float(loss.lambda_plus) == 2.0


def test_a_memory_follows(backend: str) -> None:
    x, y = batch(40, 5, 4, torch.float64)
    memory = CrossBatchMemory(TCMLoss(**FULL, backend=backend), 64)
    schedule = TCMSchedule(memory.loss, steps=2)
    assert memory(x, y) == 0
    schedule.step()
    half = memory(x, y)
    numbers: dict[str, Any] = {**FULL, "lambda_plus": 1.0, "lambda_minus": 0.25}
    expected = CrossBatchMemory(TCMLoss(**numbers, backend=backend), 64)
    expected(x, y)
    assert torch.equal(half, expected(x, y))


def test_adapters_follow() -> None:
    x, y = batch(40, 5, 4)
    loss = ThresholdConsistentMarginLoss(**FULL)
    schedule = TCMSchedule(loss, steps=1)
    assert loss(x, y) == 0
    schedule.step()
    assert torch.equal(loss(x, y), ThresholdConsistentMarginLoss(**FULL)(x, y))


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no steps": ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
    "steps of a float": ({"steps": 1e3}, TypeError, "steps must be an int, got float"),
    "steps of a bool": ({"steps": True}, TypeError, "steps must be an int, got bool"),
    "negative delay": ({"steps": 1, "delay": -1}, ValueError, "delay must be at least 0, got -1"),
    "negative weight": ({"steps": 1, "lambda_plus": -1.0}, ValueError, "lambda_plus must be finite and at least 0"),
    "margin that is not finite": ({"steps": 1, "margin_plus": float("nan")}, ValueError, "margin_plus must be finite"),
    "margin of text": ({"steps": 1, "margin_minus": "0.5"}, TypeError, "margin_minus must be a number, got str"),
    "nothing to change": ({"steps": 1, "lambda_plus": None, "lambda_minus": None}, ValueError, "nothing would change"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    arguments, error, message = WRONG[name]
    loss = TCMLoss(**FULL)
    with pytest.raises(error, match=message):
        TCMSchedule(loss, **arguments)
    assert values_of(loss) == FULL, "a refused schedule changes nothing"


def test_what_is_no_loss() -> None:
    with pytest.raises(TypeError, match=r"got CrossBatchMemory, which has no margin_plus; give its \.loss"):
        TCMSchedule(CrossBatchMemory(TCMLoss(), 8), steps=1)
    with pytest.raises(TypeError, match=r"got Linear, which has no margin_plus$"):
        TCMSchedule(torch.nn.Linear(2, 2), steps=1)


@pytest.mark.parametrize("state", [{}, {"count": -1}, {"count": 1.5}, {"count": 1, "last_epoch": 2}])
def test_wrong_states(state: Any) -> None:
    schedule = TCMSchedule(TCMLoss(), steps=2)
    schedule.step()
    with pytest.raises((TypeError, ValueError), match="count"):
        schedule.load_state_dict(state)
    assert schedule.count == 1


def test_it_shows_its_arguments() -> None:
    schedule = TCMSchedule(TCMLoss(), steps=4, delay=2, margin_plus=0.5, lambda_minus=None)
    schedule.step()
    assert repr(schedule) == "TCMSchedule(steps=4, delay=2, margin_plus=0.5, lambda_plus=0.0, count=1)"


# On ranks.


def train_on_ranks(rank: int, lagging: bool) -> list[float]:
    x, y = batch(20, 5, 4, torch.float64, seed=rank)
    loss = DistributedTCMLoss(**FULL)
    schedule = TCMSchedule(loss, steps=2)
    losses = []
    for _ in range(4):
        losses.append(loss(x, y).item())
        if not (lagging and rank == 1):
            schedule.step()
    return losses


def test_ranks_step_alike(pools: Pools) -> None:
    x, y = (
        torch.cat(parts) for parts in zip(*(batch(20, 5, 4, torch.float64, seed=rank) for rank in (0, 1)), strict=True)
    )
    whole = TCMLoss(**FULL)(x, y).item()
    for losses in pools[2].run(train_on_ranks, False):
        assert losses == pytest.approx([0, whole / 2, whole, whole], rel=1e-12)


def test_ranks_that_differ_are_told(pools: Pools) -> None:
    refused(pools[2].outcomes(train_on_ranks, True), "ValueError", "DistributedTCMLoss disagree", "0.8, 0.2, 0.0, 0.0")


def test_a_loss_that_has_had_a_schedule_keeps_its_ends() -> None:
    """Made again, as by a notebook's cell, or for a loss that was saved while it warmed up."""
    loss = TCMLoss(**FULL)
    TCMSchedule(loss, steps=3).step()
    stored = io.BytesIO()
    torch.save(loss, stored)
    stored.seek(0)
    for again in (loss, copy.deepcopy(loss), torch.load(stored, weights_only=False)):
        schedule = TCMSchedule(again, steps=4)
        assert values_of(again) == {**FULL, "lambda_plus": 0.0, "lambda_minus": 0.0}
        for _ in range(4):
            schedule.step()
        assert values_of(again) == FULL
    loss.lambda_plus = 7.0  # by hand: a new end
    TCMSchedule(loss, steps=1).step()
    assert values_of(loss) == {**FULL, "lambda_plus": 7.0}


def test_a_tensor_of_several_is_left_alone() -> None:
    shared = torch.tensor(2.0)
    loss, other = TCMLoss(lambda_plus=shared, lambda_minus=shared), TCMLoss(lambda_plus=shared)
    with torch.inference_mode():
        schedule = TCMSchedule(loss, steps=4, lambda_plus=1.0, lambda_minus=None)
    schedule.step()
    assert (float(loss.lambda_plus), float(loss.lambda_minus), float(other.lambda_plus)) == (1.25, 2.0, 2.0)
    assert isinstance(loss.lambda_plus, torch.Tensor) and loss.lambda_plus.dtype == torch.float32
