"""Ranks with wrong arguments, unlike layouts, or that fail: an error on all at once instead of a hang."""

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.parts import Batch, Pools, Result, close, draw, expected, joined, local, refused
from support.ranks import PATIENCE, Ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from tcm_fused import CrossBatchMemory, DistributedTCMLoss, TCMLoss, calibrate, distributed, opis, tcm_loss
from tcm_fused.pair_sums import pair_sums
from tcm_fused.ranks import Packed

# Wrong arguments: an error on all ranks at once, after which the group goes on working.


def call(rank: int, arguments: dict[str, Any], options: dict[str, Any], *, on: int | None = None) -> float:
    """The loss of a good batch, but for what is changed on rank `on` (None: on all)."""
    good: dict[str, Any] = {"embeddings": torch.eye(4, 3), "labels": torch.arange(4)}
    criterion = DistributedTCMLoss()
    if on is None or rank == on:
        for name, value in options.items():  # at construction wrong ones would be refused before any rank calls
            setattr(criterion, name, value)
        good |= arguments
    return criterion(**good).item()


def call_on_rank_1(rank: int, arguments: dict[str, Any], options: dict[str, Any]) -> float:
    return call(rank, arguments, options, on=1)


def with_dtensor(rank: int) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    DistributedTCMLoss()(distribute_tensor(torch.eye(4, 3), mesh), torch.arange(4))


def elsewhere_with_dtensor(rank: int) -> list[str]:
    """The messages of all other calls."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x, y = distribute_tensor(torch.eye(4, 3), mesh), torch.arange(4)
    memory = CrossBatchMemory(TCMLoss(), 8)
    calls = [
        lambda: tcm_loss(x, y),
        lambda: tcm_loss(torch.eye(4, 3), distribute_tensor(y, mesh)),
        lambda: tcm_loss(torch.eye(4, 3), y, x, y),
        lambda: tcm_loss(torch.eye(4, 3), y, groups=distribute_tensor(y, mesh)),
        lambda: TCMLoss()(x, y),
        lambda: memory(x, y),
        lambda: opis(x, y),
        lambda: calibrate(x, y, far=0.1),
    ]
    messages = []
    for call in calls:
        with pytest.raises(TypeError) as caught:
            call()
        messages.append(str(caught.value))
    return messages


def test_dtensors_are_refused(pools: Pools) -> None:
    refused(pools[2].outcomes(with_dtensor), "TypeError", "got DTensor", "embeddings.to_local()")
    for messages in pools[2].run(elsewhere_with_dtensor):
        for message, name in zip(
            messages,
            ("embeddings", "labels", "ref_emb", "groups", "embeddings", "embeddings", "embeddings", "embeddings"),
            strict=True,
        ):
            assert message.startswith(f"{name} must be a plain tensor, got DTensor") and ".full_tensor()" in message


# Rows as they lie in memory: every layout is packed alike, so that no rank leaves the others waiting.

LAYOUTS = {
    "column-major, no row": lambda: torch.randn(8, 0).T,
    "column-major, one row": lambda: torch.randn(8, 1).T,
    "column-major": lambda: torch.randn(8, 3).T,
    "every other row and column": lambda: torch.randn(6, 16)[::2, ::2],
    "expanded": lambda: torch.randn(8).expand(3, 8),
    "negated": lambda: torch.randn(3, 8, dtype=torch.complex64).conj().imag,
    "a parameter": lambda: nn.Parameter(torch.randn(3, 8)),
    "an offset of one element": lambda: torch.randn(25)[1:].view(3, 8),
}
COLUMNS = {
    "no row": lambda: torch.randn(1, 0).T,
    "one row": lambda: torch.randn(4, 1)[1:2],
    "rows": lambda: torch.randn(1, 3).T,
}


def with_layout(rank: int, name: str, width: int, dtype: torch.dtype, ring: bool) -> tuple[float, float]:
    """The loss where rank 1 has rows in the given layout, and where it has a copy of them."""
    torch.manual_seed(rank)
    x = (LAYOUTS if width > 1 else COLUMNS)[name]().to(dtype) if rank == 1 else torch.randn(5, width, dtype=dtype)
    y = torch.arange(len(x)) % 2
    criterion = DistributedTCMLoss(margin_minus=-0.5, ring=ring)
    values = []
    for rows in (x, torch.empty(x.shape, dtype=dtype).copy_(x.detach())):
        leaf = rows.detach().requires_grad_()
        loss = criterion(leaf, y)
        loss.backward()
        assert leaf.grad is not None and leaf.grad.shape == x.shape
        values.append(loss.item())
    return values[0], values[1]


@pytest.mark.parametrize("ring", [False, True], ids=["gathered", "ring"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
@pytest.mark.parametrize(("width", "name"), [*((8, name) for name in LAYOUTS), *((1, name) for name in COLUMNS)])
def test_any_layout_of_one_rank(pools: Pools, width: int, name: str, dtype: torch.dtype, ring: bool) -> None:
    for given, copied in pools[2].run(with_layout, name, width, dtype, ring):
        assert given == copied > 0


def test_a_good_call_is_good(pools: Pools) -> None:
    # Of a row's two positives, on the other ranks, only those of the zero row are hard: 0.9 - 0. No negative is.
    assert pools[3].run(call, {}, {}) == [pytest.approx(0.9)] * 3


@pytest.mark.parametrize(
    ("kind", "message", "arguments", "options"),
    [
        ("TypeError", "labels must have an integer dtype", {"labels": torch.zeros(4)}, {}),
        ("TypeError", "embeddings must be a torch.Tensor, got list", {"embeddings": [[1.0]]}, {}),
        ("ValueError", "labels must have shape [4]", {"labels": torch.arange(5)}, {}),
        ("ValueError", "groups must have shape [4]", {"groups": torch.arange(5)}, {}),
        ("ValueError", "ref_emb must be None: ", {"ref_emb": torch.eye(4, 3)}, {}),
        ("ValueError", "indices_tuple must be None: ", {"indices_tuple": ()}, {}),
        ("TypeError", "margin_plus must be a number, got str", {}, {"margin_plus": "0.9"}),
        ("ValueError", "grad_reduction='max' is not known", {}, {"grad_reduction": "max"}),
        ("RuntimeError", "backend='cuda' ", {}, {"backend": "cuda"}),
        ("ValueError", "the process group communicates between", {"embeddings": torch.eye(4, 3, device="meta"),
                                                                  "labels": torch.arange(4, device="meta")}, {}),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)  # fmt: skip
def test_wrong_arguments_of_one_rank(
    pools: Pools, kind: str, message: str, arguments: dict[str, Any], options: dict[str, Any]
) -> None:
    zero, one, two = pools[3].outcomes(call_on_rank_1, arguments, options)
    refused([one], kind, message)
    refused([zero, two], "RuntimeError", f"rank 1: {kind}: ", message)
    refused(pools[3].outcomes(call, arguments, options), kind, message)
    pools[3].run(call, {}, {})


@pytest.mark.parametrize(
    ("here", "there", "arguments", "options"),
    [
        ("D=3", "D=5", {"embeddings": torch.ones(4, 5)}, {}),
        ("torch.float32", "torch.float16", {"embeddings": torch.ones(4, 3, dtype=torch.float16)}, {}),
        ("groups not given", "groups given", {"groups": torch.arange(4)}, {}),
        ("DistributedTCMLoss(0.9,", "DistributedTCMLoss(0.8,", {}, {"margin_plus": 0.8}),
        ("'hinge'", "'squared'", {}, {"penalty": "squared"}),
        ("fp32 products", "fp16 products", {}, {"precision": "fp16"}),
        ("ring=False", "ring=True", {}, {"ring": True}),
        ("'mean'", "'sum'", {}, {"grad_reduction": "sum"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_ranks_that_disagree(
    ranks: Ranks, here: str, there: str, arguments: dict[str, Any], options: dict[str, Any]
) -> None:
    outcomes = ranks.outcomes(call_on_rank_1, arguments, options)
    refused(outcomes, "ValueError", "the ranks of DistributedTCMLoss disagree", "rank 0: ", "rank 1: ", here, there)
    ranks.run(call, {}, {})


# Ranks that fail.

TIMEOUT = 2.0


def absent(rank: int, ring: bool) -> None:
    """Rank 1 raises before it calls the loss."""
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    criterion = DistributedTCMLoss(process_group=group, ring=ring)
    criterion(torch.eye(3), torch.arange(3))
    if rank == 1:
        raise ArithmeticError("of the user's")
    criterion(torch.eye(3), torch.arange(3))


def out_of_memory(*_: Any) -> Any:
    raise torch.OutOfMemoryError("no room")


def without_room_for_columns(rank: int, ring: bool) -> None:
    """Rank 1 cannot even take part in the exchange of embeddings."""
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(Packed, "padded", out_of_memory)
        DistributedTCMLoss(process_group=group, ring=ring)(torch.eye(3), torch.arange(3))


def without_room_to_gather(rank: int, ring: bool) -> None:
    """As above, where PyTorch allocates."""
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            plain = torch.Tensor.new_empty
            patch.setattr(
                torch.Tensor, "new_empty", lambda t, size: (plain if t.dtype != torch.uint8 else out_of_memory)(t, size)
            )
            patch.setattr(torch, "empty_like", out_of_memory)
        DistributedTCMLoss(process_group=group, ring=ring)(torch.eye(3), torch.arange(3))


@pytest.mark.parametrize("ring", [False, True], ids=["gathered", "ring"])
@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (absent, "ArithmeticError"),
        (without_room_for_columns, "OutOfMemoryError"),
        (without_room_to_gather, "OutOfMemoryError"),
    ],
)
def test_a_rank_that_fails_is_an_error_on_the_others(pools: Pools, function: Any, kind: str, ring: bool) -> None:
    start = time.monotonic()
    zero, one, two = pools[3].outcomes(function, ring)
    assert time.monotonic() - start < TIMEOUT + 20  # on a busy machine
    assert one.kind == kind
    refused([zero, two], "RuntimeError", "DistributedTCMLoss lost the other ranks", "group's timeout")
    pools[3].run(call, {}, {})  # the default group is as it was


def failing_inside(rank: int, batch: Batch, calls: int) -> tuple[str, Result]:
    """Rank 1 fails in the given call of `pair_sums`, is caught, and all go on in the same group."""
    x, y, _ = batch.part(rank)
    made = 0

    def spy(*arguments: Any) -> Any:
        nonlocal made
        made += 1
        return pair_sums(*arguments) if made < calls else out_of_memory()

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(distributed, "pair_sums", spy)
        with pytest.raises(RuntimeError) as caught:
            batch.criterion()(torch.full_like(x, torch.nan), y)
    return f"{type(caught.value).__name__}: {caught.value}", local(rank, batch)


@pytest.mark.parametrize(("ring", "calls"), [(False, 1), (True, 1), (True, 2), (True, 3)])
def test_a_failure_of_one_rank_is_one_of_all(pools: Pools, ring: bool, calls: int, rng: np.random.Generator) -> None:
    """At once, long before the timeout, and after it all go on."""
    batch = draw(rng, (7, 5, 9), ring=ring)
    start = time.monotonic()
    messages, results = zip(*pools[3].run(failing_inside, batch, calls), strict=True)
    assert time.monotonic() - start < PATIENCE / 4
    assert messages[1] == "OutOfMemoryError: no room"
    for message in (messages[0], messages[2]):
        assert message.startswith("RuntimeError: DistributedTCMLoss cannot go on") and "rank 1: OutOfMemory" in message
    wanted = expected(batch)
    close(joined(list(results)).grad, wanted.grad, 1e-12)


def failing_everywhere(rank: int, batch: Batch) -> Result:
    """All ranks fail in the middle, are caught, and go on with other embeddings in the same group."""
    x, y, _ = batch.part(rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "pair_sums", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            batch.criterion()(torch.full_like(x, torch.nan), y)
    return local(rank, batch)


@pytest.mark.parametrize("ring", [False, True], ids=["gathered", "ring"])
def test_a_failure_that_was_caught_leaves_nothing_behind(ranks: Ranks, ring: bool, rng: np.random.Generator) -> None:
    batch = draw(rng, (4,) * ranks.world, ring=ring)
    result, wanted = joined(ranks.run(failing_everywhere, batch)), expected(batch)
    assert abs(result.loss - wanted.loss) <= 1e-12
    close(result.grad, wanted.grad, 1e-12)


def ending(rank: int) -> None:
    if rank == 1:
        os._exit(1)
    call(rank, {}, {})


def test_a_rank_that_ends_is_an_error_on_the_others(tmp_path: Path) -> None:
    pool = Ranks(2, tmp_path)
    try:
        start = time.monotonic()
        zero, one = pool.outcomes(ending)
        assert time.monotonic() - start < PATIENCE / 4  # long before the timeout of the group
        assert one.kind == "dead"
        refused([zero], "RuntimeError", "DistributedTCMLoss lost the other ranks")
    finally:
        pool.close()
