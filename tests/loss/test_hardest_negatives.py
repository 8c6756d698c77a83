"""`hardest_negatives`: of each row only so many, against the oracle in each form; ties, ranks, banks, refusals."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.batches import batch
from support.definition import Set, definition
from support.forms import FORMS, OPTIONS, leaves, make, oracle, with_options
from support.parts import Pools, close, cut, draw, expected, joined, local, refused
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tcm_fused import CrossBatchMemory, TCMLoss, tcm_loss
from tcm_fused.backends import blocked
from tcm_fused.integrations.pytorch_metric_learning import ThresholdConsistentMarginLoss
from tcm_fused.reference import tcm_reference

NAMES = ("embeddings", "labels", "ref_emb", "ref_labels")


def compare_with_oracle(call: dict[str, Any], tolerance: float) -> None:
    """Loss, counts, violations and both gradients, with exactly the pairs that the definition chooses."""
    wanted = oracle(call)
    found = wanted.evaluate(wanted.hard())
    given = leaves(call)
    loss, stats = tcm_loss(**call, return_stats=True)
    grads = torch.autograd.grad(loss, given)
    assert [int(stats.count_plus), int(stats.count_minus)] == found.count.tolist()
    close(loss.detach().double().numpy(), np.array(found.loss), tolerance)
    close(torch.stack(stats[2:]).double().numpy(), found.violation, tolerance)
    for grad, of in zip(grads, (found.grad_x, found.grad_ref), strict=False):
        close(grad.double().numpy(), of, tolerance)


@pytest.mark.parametrize("k", [1, 3, 1000])
@pytest.mark.parametrize("option", [None, *OPTIONS])
@pytest.mark.parametrize("form", FORMS)
def test_against_the_oracle(form: str, option: str | None, k: int) -> None:
    call = make(form, 40, 90, 6)
    if option is not None:
        call = with_options(call, option)
    compare_with_oracle({**call, "hardest_negatives": k}, 1e-12)


@pytest.mark.parametrize("k", [1, 5, 40])
@pytest.mark.parametrize("form", FORMS)
def test_across_tiles(monkeypatch: pytest.MonkeyPatch, form: str, k: int) -> None:
    """The hardest of a row lie in several tiles, and there may be more of them than a tile has columns."""
    monkeypatch.setattr(blocked, "BLOCK", 16)
    compare_with_oracle({**make(form, 50, 120, 5, seed=1), "hardest_negatives": k}, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    """No two similarities are nearer to each other than float32 rounds, so that all choose the same."""
    call = {**make("row_offset", 12, 30, 4, dtype=dtype), "hardest_negatives": 2}
    s = np.sort(oracle(call).s, axis=1)
    assert np.diff(s)[np.diff(s) > 0].min() > 1e-6
    compare_with_oracle(call, 1e-2 if dtype != torch.float32 else 1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k", [1, 2, 7])
def test_the_reference_chooses_the_same(form: str, k: int) -> None:
    call = {**make(form, 30, 60, 5), "hardest_negatives": k}
    given = leaves(call)
    loss, _, count = tcm_reference(**call)
    found, stats = tcm_loss(**call, return_stats=True)
    torch.testing.assert_close(found, loss, rtol=1e-12, atol=0)
    assert count.tolist() == [int(stats.count_plus), int(stats.count_minus)]
    for a, b in zip(torch.autograd.grad(found, given), torch.autograd.grad(loss, given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_as_many_as_there_are_is_all(backend: str) -> None:
    """Then it is the loss without the option, also that of the kernels."""
    call = make("symmetric", 60, 0, 6)
    given = leaves(call)
    losses = [tcm_loss(**call, backend=backend), tcm_loss(**call, hardest_negatives=60)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, given)[0] for loss in losses), rtol=1e-10, atol=1e-14)


def test_each_row_chooses_for_itself() -> None:
    """Row 2 is the nearest to both others, so it is chosen twice, and chooses one."""
    angle = torch.tensor([0.0, 50.0, 20.0], dtype=torch.float64).deg2rad()
    x = torch.stack([angle.cos(), angle.sin()], dim=1).requires_grad_()
    loss, stats = tcm_loss(x, torch.arange(3), margin_minus=0.0, hardest_negatives=1, return_stats=True)
    assert int(stats.count_minus) == 3
    near, far = np.cos(np.deg2rad(20)), np.cos(np.deg2rad(30))
    assert loss.item() == pytest.approx((2 * near + far) / 3, rel=1e-12)
    (grad,) = torch.autograd.grad(loss, x)
    tangent = torch.stack([-angle.sin(), angle.cos()], dim=1)
    by_angle = (grad * tangent).sum(1).numpy() * 3  # d cos(a_i - a_j) / d a_i = -sin(a_i - a_j)
    near, far = np.sin(np.deg2rad(20)), np.sin(np.deg2rad(30))
    assert by_angle == pytest.approx([2 * near, -far, -2 * near + far], rel=1e-12)


@pytest.mark.parametrize("block", [2, 3, 1024])
def test_of_equal_similarities_the_lower_column(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Products of these rows with 0.6, 0.8 are equal to the bit; the gradient tells which were chosen."""
    monkeypatch.setattr(blocked, "BLOCK", block)
    x, y = torch.tensor([[0.6, 0.8]], dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    labels = torch.ones(6, dtype=torch.int64)
    nearer, farther = [0.0, 1.0], [1.0, 0.0]
    for k, chosen in ((1, [0]), (2, [0, 2]), (3, [0, 2, 3]), (4, [0, 2, 3, 5]), (5, [0, 1, 2, 3, 5])):
        rows = [nearer, farther, nearer, nearer, farther, nearer]
        for of in (tcm_loss, tcm_reference):
            ref = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
            found: Any = of(x, y, ref, labels, margin_minus=-0.5, hardest_negatives=k)
            (grad,) = torch.autograd.grad(found if of is tcm_loss else found[0], ref)
            assert grad.any(dim=1).nonzero().flatten().tolist() == chosen


def test_padding_and_rows_that_are_not_finite() -> None:
    call = {**make("symmetric", 40, 0, 5), "hardest_negatives": 2}
    x = call["embeddings"]
    x[call["labels"] < 0] = torch.nan
    x.requires_grad_()
    (grad,) = torch.autograd.grad(tcm_loss(**call), x)
    assert grad.isfinite().all() and not grad[call["labels"] < 0].any()
    x = x.detach().clone()
    x[call["labels"].argmax()] = torch.inf
    call["embeddings"] = x.requires_grad_()
    loss = tcm_loss(**call)
    (grad,) = torch.autograd.grad(loss, x)
    assert loss.isnan() and grad[call["labels"] >= 0].isnan().all() and not grad[call["labels"] < 0].any()


@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_rows(n: int) -> None:
    x = torch.eye(3)[:n].requires_grad_()
    loss = tcm_loss(x, torch.arange(n), margin_minus=-1.0, hardest_negatives=4)
    loss.backward()
    assert loss.item() == (1.0 if n == 2 else 0.0)


def test_module_schedule_and_compiled() -> None:
    torch._dynamo.reset()
    call = make("symmetric", 40, 0, 5)
    x, y = call["embeddings"].requires_grad_(), call["labels"]
    options: dict[str, Any] = {name: call[name] for name in ("margin_plus", "margin_minus")}
    criterion = TCMLoss(**options, hardest_negatives=3)
    assert "hardest_negatives=3" in repr(criterion)
    counter = CompileCounterWithBackend("aot_eager")
    found = torch.compile(criterion, fullgraph=True, backend=counter)(x, y)
    expected = tcm_loss(x, y, **options, hardest_negatives=3)
    assert counter.frame_count == 1
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(found, x), torch.autograd.grad(expected, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    torch._dynamo.reset()


# Banks and ranks: of all columns together.


@pytest.mark.parametrize("option", ["plain", "squared", "all", "within", "across"])
def test_a_bank_and_the_batch_together(option: str) -> None:
    drawn = draw(np.random.default_rng(3), (20, 15), option)
    options = {**drawn.options, "hardest_negatives": 2}
    memory = CrossBatchMemory(TCMLoss(**options), 64)
    batches = [drawn.part(rank) for rank in (0, 1)]
    memory(batches[0][0], batches[0][1], groups=batches[0][2])
    x, y, groups = batches[1]
    x.requires_grad_()
    loss = memory(x, y, groups=groups)
    (grad,) = torch.autograd.grad(loss, x)
    wanted_x = x.detach().clone().requires_grad_()
    stored = batches[0][2]
    together = None if groups is None or stored is None else torch.cat([groups, stored])
    columns = Set(torch.cat([wanted_x, batches[0][0]]), torch.cat([y, batches[0][1]]), together)
    wanted = definition(Set(wanted_x, y, groups), columns, options)
    torch.testing.assert_close(loss.detach(), wanted.detach(), rtol=1e-10, atol=0)
    close(grad.numpy(), torch.autograd.grad(wanted, wanted_x)[0].numpy(), 1e-10)


@pytest.mark.parametrize("option", ["plain", "squared", "all", "within", "across"])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks(pools: Pools, world: int, option: str) -> None:
    """The loss and gradient of the whole batch; each rank's rows choose among all columns."""
    rng = np.random.default_rng(world)
    drawn = draw(rng, cut(rng, world), option)
    drawn = replace(drawn, options={**drawn.options, "hardest_negatives": 2})
    result, wanted = joined(pools[world].run(local, drawn)), expected(drawn)
    close(result.loss, wanted.loss, 1e-12)
    close(result.grad, wanted.grad, 1e-10)


def memory_on_rank(rank: int, drawn: Any, later: Any) -> tuple[float, Tensor]:
    memory = CrossBatchMemory(drawn.criterion(), 64)
    x, y, _ = drawn.part(rank)
    memory(x, y)
    x, y, _ = later.part(rank)
    x.requires_grad_()
    loss = memory(x, y)
    return loss.item(), torch.autograd.grad(loss, x)[0]


def test_a_bank_on_ranks(pools: Pools) -> None:
    rng = np.random.default_rng(5)
    first, later = draw(rng, (12, 9)), draw(rng, (10, 13))
    options = {**later.options, "hardest_negatives": 2}
    first, later = replace(first, options=options), replace(later, options=options)
    results = pools[2].run(memory_on_rank, first, later)
    x = torch.from_numpy(later.x).requires_grad_()
    rows = Set(x, torch.from_numpy(later.y))
    columns = Set(torch.cat([x, torch.from_numpy(first.x)]), torch.cat([rows.y, torch.from_numpy(first.y)]))
    wanted = definition(rows, columns, options)
    assert [loss for loss, _ in results] == pytest.approx([wanted.item()] * 2, rel=1e-10)
    grad = torch.cat([grad for _, grad in results])
    close(grad.numpy(), torch.autograd.grad(wanted, x)[0].numpy(), 1e-10)


def test_no_ring(pools: Pools) -> None:
    drawn = draw(np.random.default_rng(0), (5, 5), ring=True)
    drawn = replace(drawn, options={**drawn.options, "hardest_negatives": 2})
    message = "ring=True never holds all columns, which hardest_negatives needs; use ring=False"
    refused(pools[2].outcomes(local, drawn), "ValueError", message)


# Refusals.


@pytest.mark.parametrize("name", ["cpu", "cuda", "triton"])
def test_other_backends_refuse_it_by_name(name: str) -> None:
    x, y = batch(8, 3, 2)
    with pytest.raises(RuntimeError, match=f"backend='{name}' (is not available|has no hardest_negatives)"):
        tcm_loss(x, y, hardest_negatives=1, backend=name)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "hardest_negatives must be at least 1, got 0; None: all hard negatives count"),
        (-3, ValueError, "hardest_negatives must be at least 1, got -3"),
        (1.0, TypeError, "hardest_negatives must be an int, got float"),
        (True, TypeError, "hardest_negatives must be an int, got bool"),
        ("all", TypeError, "hardest_negatives must be an int, got str"),
    ],
)
def test_wrong_values(value: Any, error: type[Exception], message: str) -> None:
    x, y = batch(8, 3, 2)
    with pytest.raises(error, match=message):
        tcm_loss(x, y, hardest_negatives=value)
    with pytest.raises(error, match=message):
        TCMLoss(hardest_negatives=value)


def test_adapters() -> None:
    """All pairs as the loss has them; not those of a miner."""
    x, y = batch(20, 4, 3)
    loss = ThresholdConsistentMarginLoss(margin_minus=0.0, hardest_negatives=2)
    assert torch.equal(loss(x, y), tcm_loss(x, y, margin_minus=0.0, hardest_negatives=2))
    pairs = tuple(torch.tensor([index]) for index in (0, 3, 0, 1))
    with pytest.raises(ValueError, match="hardest_negatives=2 chooses among all pairs, but a miner gave its own"):
        loss(x, y, pairs)
