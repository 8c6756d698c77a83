"""The loss of a batch spread over ranks: that of one process with the whole batch, and errors instead of hangs.

Everything runs in gloo groups of 2, 3 and 4 processes. Expected values are the definition written out in fp64.
"""

import copy
import pickle
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.oracle import Array
from support.parts import (
    HIDDEN,
    OPTIONS,
    Batch,
    D,
    Pools,
    Result,
    all_pairs,
    close,
    cut,
    draw,
    expected,
    joined,
    local,
    margins,
    refused,
)
from support.ranks import PATIENCE, Ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel

from tcm_fused import CrossBatchMemory, DistributedTCMLoss, TCMLoss, distributed
from tcm_fused.arguments import Rows
from tcm_fused.pair_sums import pair_sums

BACKENDS = ("cpu", "torch")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("ring", [False, True], ids=["gathered", "ring"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_batch(
    ranks: Ranks, backend: str, name: str, ring: bool, dtype: torch.dtype, rng: np.random.Generator
) -> None:
    """Loss and gradient of the whole batch, the same bits on each rank and in each run, in parts of any size."""
    batch = draw(rng, cut(rng, ranks.world), name, dtype=dtype, ring=ring)
    batch.options["backend"] = backend
    result, again = (joined(ranks.run(local, batch)) for _ in range(2))
    wanted = expected(batch)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert wanted.loss > 0.01
    close(result.loss, wanted.loss, tolerance)
    close(result.grad, wanted.grad, tolerance)
    assert result.loss.tobytes() == again.loss.tobytes()
    assert result.grad.tobytes() == again.grad.tobytes()
    mean = joined(ranks.run(local, replace(batch, grad_reduction="mean")))
    assert mean.loss.tobytes() == result.loss.tobytes()
    close(mean.grad, ranks.world * result.grad, 4 * tolerance)


@pytest.mark.parametrize("ring", [False, True], ids=["gathered", "ring"])
@pytest.mark.parametrize(
    "sizes",
    [(5, 5, 5, 5), (0, 9, 0, 11), (20, 0, 0, 0), (0, 0, 0, 0), (0, 0, 1, 0)],
    ids=lambda sizes: "-".join(map(str, sizes)),
)
def test_parts_of_any_size(pools: Pools, sizes: tuple[int, ...], ring: bool, rng: np.random.Generator) -> None:
    for name in ("plain", "within", "across"):
        batch = draw(rng, sizes, name, ring=ring)
        result, wanted = joined(pools[4].run(local, batch)), expected(batch)
        assert abs(result.loss - wanted.loss) <= 1e-12
        close(result.grad, wanted.grad, 1e-12)


def test_statistics_are_of_the_whole_batch(ranks: Ranks, rng: np.random.Generator) -> None:
    for ring in (False, True):
        batch = draw(rng, cut(rng, ranks.world), ring=ring)
        result = joined(ranks.run(local, batch))
        criterion = TCMLoss(**batch.options)
        criterion(torch.from_numpy(batch.x), torch.from_numpy(batch.y))
        assert criterion.stats is not None
        assert result.count.tolist() == [criterion.stats.count_plus.item(), criterion.stats.count_minus.item()]
        np.testing.assert_allclose(result.violation, torch.stack(criterion.stats[2:]), rtol=1e-6)


@pytest.mark.parametrize("ring", [False, True], ids=["gathered", "ring"])
def test_the_order_of_rows_is_that_of_ranks(pools: Pools, ring: bool, rng: np.random.Generator) -> None:
    """Rows that change places, across ranks too, take their gradients with them."""
    batch = draw(rng, (7, 12, 10), ring=ring)
    order = rng.permutation(len(batch.y))
    plain = joined(pools[3].run(local, batch))
    moved = joined(pools[3].run(local, replace(batch, x=batch.x[order], y=batch.y[order], sizes=(11, 3, 15))))
    close(moved.loss, plain.loss, 1e-13)
    close(moved.grad, plain.grad[order], 1e-12)


@pytest.mark.parametrize("name", ["plain", "within", "across"])
@pytest.mark.parametrize("ring", [False, True], ids=["gathered", "ring"])
def test_not_finite_on_one_rank_is_nan_on_all(pools: Pools, ring: bool, name: str, rng: np.random.Generator) -> None:
    batch = draw(rng, (10, 0, 12, 9), name, ring=ring)
    if batch.groups is not None:  # 0 and 1, but 1 and 2 on the last rank: rows of group 0 have no pair there
        batch.groups[:] = rng.permutation(31) % 2
        batch.groups[22:] += 1
    rows = np.flatnonzero(batch.y >= 0)
    batch.y[30] = 0
    batch.x[30, 2] = rng.choice([np.nan, np.inf])
    result = joined(pools[4].run(local, batch))
    assert np.isnan(result.loss)
    assert np.isnan(result.grad[rows]).all()
    assert not result.grad[batch.y < 0].any()


@pytest.mark.parametrize("ring", [False, True], ids=["gathered", "ring"])
def test_rows_without_a_label_are_not_looked_at(pools: Pools, ring: bool, rng: np.random.Generator) -> None:
    batch = draw(rng, (8, 11, 6), ring=ring)
    batch.y[[3, 9, 24]] = -1
    batch = replace(batch, options={**batch.options, **margins(torch.from_numpy(batch.x), batch.y)})
    before = joined(pools[3].run(local, batch))
    batch.x[batch.y < 0] = np.nan
    after = joined(pools[3].run(local, batch))
    assert before.loss.tobytes() == after.loss.tobytes()
    assert before.grad.tobytes() == after.grad.tobytes()
    assert not after.grad[batch.y < 0].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("ring", [False, True], ids=["gathered", "ring"])
def test_gradients_in_16_bit_are_rounded_once(
    pools: Pools, ring: bool, dtype: torch.dtype, rng: np.random.Generator
) -> None:
    batch = draw(rng, (9, 14, 7), dtype=dtype, ring=ring)
    rounded = torch.from_numpy(batch.x).to(dtype).double()
    batch = replace(batch, options={**batch.options, **margins(rounded, batch.y)})
    result, wanted = joined(pools[3].run(local, batch)), expected(batch)
    assert result.loss.dtype == np.float32
    close(result.loss, wanted.loss, 1e-6)
    ulp = np.abs(wanted.grad) * torch.finfo(dtype).eps / 2 + 2.0**-25  # 2^-25: half of fp16's smallest number
    assert (np.abs(result.grad - wanted.grad) <= 1.001 * ulp + 1e-6 * np.abs(wanted.grad).max()).all()


# With an encoder, in the wrappers that reduce its gradients.


def encoder(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, D)).double().to(dtype)


def train_step(rank: int, batch: Batch, wrapper: str) -> dict[str, Array]:
    """Loss and gradients of the encoder's parameters as the wrapper leaves them."""
    model = encoder(batch.dtype)
    if wrapper == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    x, y, groups = batch.part(rank)
    wrapped = DistributedDataParallel(model) if wrapper == "ddp" else model
    loss = batch.criterion()(wrapped(x), y, groups=groups)
    loss.backward()
    found = {"loss": loss.detach().numpy()}
    for name, parameter in model.named_parameters():
        grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        assert grad is not None
        found[name] = grad.numpy()
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("ring", [False, True], ids=["gathered", "ring"])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_encoder(ranks: Ranks, wrapper: str, ring: bool, dtype: torch.dtype, rng: np.random.Generator) -> None:
    """The wrapper's average over ranks is the gradient of one process with the whole batch."""
    batch = draw(rng, cut(rng, ranks.world), "squared", dtype=dtype, ring=ring, grad_reduction="mean")
    with torch.no_grad():
        out = encoder(torch.float64)(torch.from_numpy(batch.x).to(dtype).double())
    batch.options.update(margins(out, batch.y))
    results = ranks.run(train_step, batch, wrapper)

    one = encoder(dtype)
    TCMLoss(**batch.options)(one(torch.from_numpy(batch.x).to(dtype)), torch.from_numpy(batch.y)).backward()
    wide = encoder(torch.float64)
    all_pairs(wide(torch.from_numpy(batch.x).to(dtype).double()), batch).backward()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for result in results:
        assert result["loss"].tobytes() == results[0]["loss"].tobytes()
        for model in (one, wide):
            # Together: of the largest entry of all, since in a small one larger summands have cancelled.
            names, parameters = zip(*model.named_parameters(), strict=True)
            given = np.concatenate([result[name].ravel() for name in names])
            wanted = torch.cat([parameter.grad.flatten() for parameter in parameters]).numpy()
            close(given, wanted, tolerance)


# Backward.


def backward_alone(rank: int, batch: Batch) -> Array | None:
    """Only rank 0 goes backward; the loss is used three times over."""
    x, y, _ = batch.part(rank)
    x.requires_grad_()
    loss = batch.criterion()(x, y)
    if rank:
        return None
    (3 * loss).backward()
    assert x.grad is not None
    return x.grad.numpy()


def test_backward_communicates_nothing(ranks: Ranks, rng: np.random.Generator) -> None:
    for ring in (False, True):
        batch = draw(rng, cut(rng, ranks.world), ring=ring)
        grad = ranks.run(backward_alone, batch)[0]
        close(grad, 3 * expected(batch).grad[: batch.sizes[0]], 1e-12)


def differentiate_twice(rank: int, batch: Batch) -> None:
    x, y, _ = batch.part(rank)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(batch.criterion()(x, y), x, create_graph=True)
    grad.sum().backward()


def no_gradient(rank: int, batch: Batch) -> float:
    x, y, _ = batch.part(rank)
    with torch.no_grad():
        loss = batch.criterion()(x.requires_grad_(), y)
    assert not loss.requires_grad
    assert not batch.criterion()(x.detach(), y).requires_grad
    return loss.item()


@pytest.mark.parametrize("ring", [False, True], ids=["gathered", "ring"])
def test_second_derivative_and_none(pools: Pools, ring: bool, rng: np.random.Generator) -> None:
    batch = draw(rng, (15, 8), ring=ring)
    refused(pools[2].outcomes(differentiate_twice, batch), "RuntimeError", "no second derivative")
    assert pools[2].run(no_gradient, batch) == [pytest.approx(float(expected(batch).loss), rel=1e-13)] * 2


def held_columns(rank: int, batch: Batch) -> int:
    """The most ranks' columns, as they came or in the dtype of the loss, whose storage is alive at once."""
    stored: list[StorageWeakRef] = []
    most = 0

    def spy(rows: Rows, columns: Rows | None, *others: Any) -> Any:
        nonlocal most
        if columns is not None:
            stored.append(StorageWeakRef(columns.x.untyped_storage()))
        most = max(most, sum(not storage.expired() for storage in stored))
        return pair_sums(rows, columns, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "pair_sums", spy)
        local(rank, batch)
    assert len(stored) == dist.get_world_size() - 1
    return most


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=["fp64", "fp16"])
def test_the_ring_holds_columns_of_two_ranks(pools: Pools, dtype: torch.dtype, rng: np.random.Generator) -> None:
    """Those being worked on, and those arriving: all before them is gone, with its graph."""
    assert pools[4].run(held_columns, draw(rng, (8, 8, 8, 8), dtype=dtype, ring=True)) == [1] * 4


# Groups other than the default.


def in_a_subgroup(rank: int, batch: Batch, ring: bool) -> Result | None:
    """Ranks 1 and 2 have the batch; rank 0 stays out."""
    group = dist.new_group([1, 2])
    criterion = batch.criterion(process_group=group, ring=ring)
    if rank == 0:
        with pytest.raises(RuntimeError, match="not in the process group"):
            criterion(torch.ones(3, D), torch.arange(3))
        return None
    x, y, _ = batch.part(rank)
    x.requires_grad_()
    loss = criterion(x, y)
    loss.backward()
    assert x.grad is not None
    return Result(loss.detach().numpy(), x.grad.numpy())


@pytest.mark.parametrize("ring", [False, True], ids=["gathered", "ring"])
def test_a_subgroup(pools: Pools, ring: bool, rng: np.random.Generator) -> None:
    batch = draw(rng, (0, 11, 16))
    _, one, two = pools[3].run(in_a_subgroup, batch, ring)
    wanted = expected(batch)
    close(one.loss, wanted.loss, 1e-12)
    assert one.loss.tobytes() == two.loss.tobytes()
    close(np.concatenate([one.grad, two.grad]), wanted.grad, 1e-12)


def in_a_mesh(rank: int, batch: Batch) -> Array:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return batch.criterion(process_group=mesh)(*batch.part(rank)[:2]).numpy()


def test_a_device_mesh(pools: Pools, rng: np.random.Generator) -> None:
    batch = draw(rng, (9, 14))
    for loss in pools[2].run(in_a_mesh, batch):
        close(loss, expected(batch).loss, 1e-12)


def copies(rank: int, batch: Batch) -> tuple[Array, Array]:
    """The loss of a module with a group of its own, and of its copy; without one it can be pickled."""
    group = dist.new_group([0, 1])
    criterion = nn.Sequential(batch.criterion(process_group=group))
    twin = copy.deepcopy(criterion)
    assert twin[0].process_group is group
    with pytest.raises(TypeError, match="with a process_group cannot be pickled"):
        pickle.dumps(criterion)
    plain = pickle.loads(pickle.dumps(batch.criterion()))
    x, y, _ = batch.part(rank)
    return plain(x, y).numpy(), copy.deepcopy(criterion)[0](x, y).numpy()


def test_copies_share_the_group(pools: Pools, rng: np.random.Generator) -> None:
    batch = draw(rng, (9, 14))
    for losses in pools[2].run(copies, batch):
        for loss in losses:
            close(loss, expected(batch).loss, 1e-12)


def test_without_torch_distributed() -> None:
    """Where PyTorch was built without it, all imports, and the loss says what it needs."""
    program = """
import torch, torch.distributed as dist
for name in [name for name in vars(dist) if name not in ("is_available", "ProcessGroup") and not name.startswith("_")]:
    delattr(dist, name)
dist.is_available = lambda: False
from tcm_fused.distributed import DistributedTCMLoss
try:
    DistributedTCMLoss()(torch.ones(2, 3), torch.arange(2))
except RuntimeError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
    assert run.stdout.startswith("DistributedTCMLoss needs a process group"), run.stderr


def test_no_process_group() -> None:
    with pytest.raises(RuntimeError, match=r"init_process_group\(\) first.*in a single process use TCMLoss"):
        DistributedTCMLoss()(torch.ones(2, 3), torch.arange(2))


# With a memory: every rank stores the whole batch.


def through_memory(rank: int, batches: list[Batch], size: int) -> tuple[list[Result], dict[str, Array]]:
    memory = CrossBatchMemory(batches[0].criterion(), size, warm_up=1)
    found = []
    for batch in batches:
        x, y, groups = batch.part(rank)
        x.requires_grad_()
        loss = memory(x, y, groups)
        loss.backward()
        assert x.grad is not None
        stats = np.zeros(0)
        found.append(Result(loss.detach().numpy(), x.grad.double().numpy(), stats, stats))
    return found, {name: buffer.numpy() for name, buffer in memory.named_buffers()}


@pytest.mark.parametrize("name", ["plain", "squared", "across"])
def test_every_rank_has_the_same_memory(ranks: Ranks, name: str, rng: np.random.Generator) -> None:
    """Losses and banks are those of one process with the whole batches, the bank bit by bit."""
    batches = [draw(rng, cut(rng, ranks.world, n), name) for n in (20, 13, 17, 0, 21)]
    values, buffers = zip(*ranks.run(through_memory, batches, 40), strict=True)
    one = CrossBatchMemory(TCMLoss(**batches[0].options), 40, warm_up=1)
    for step, batch in enumerate(batches):
        result = joined([value[step] for value in values])
        x = torch.from_numpy(batch.x).requires_grad_()
        loss = one(x, torch.from_numpy(batch.y), None if batch.groups is None else torch.from_numpy(batch.groups))
        loss.backward()
        assert x.grad is not None
        close(result.loss, loss.detach().numpy(), 1e-12)
        close(result.grad, x.grad.numpy(), 1e-12)
    for buffer in buffers:
        for key, wanted in one.named_buffers():
            assert buffer[key].tobytes() == wanted.numpy().tobytes()


def misused_memory(rank: int, ring: bool) -> None:
    """Rank 1 changes the width of its embeddings."""
    memory = CrossBatchMemory(DistributedTCMLoss(ring=ring), 8)
    memory(torch.eye(4, 3), torch.arange(4))
    width = 5 if rank == 1 else 3
    memory(torch.eye(4, width), torch.arange(4))


def test_misused_memory(pools: Pools) -> None:
    refused(pools[3].outcomes(misused_memory, True), "ValueError", "use ring=False")
    zero, one, two = pools[3].outcomes(misused_memory, False)
    message = "embeddings have D=5, the memory holds D=3"
    refused([one], "ValueError", message)
    refused([zero, two], "RuntimeError", "rank 1: ", message)


# torch.compile.


def compiled(rank: int, batch: Batch) -> tuple[Result, str]:
    """A step in which the loss stands between two pieces that are compiled, and the error of fullgraph=True."""
    x, y, _ = batch.part(rank)
    x.requires_grad_()
    criterion = batch.criterion()

    def step(x: Tensor, y: Tensor) -> Tensor:
        return 2 * criterion(x * 2, y) + 0

    loss = torch.compile(step, backend="eager")(x, y)
    loss.backward()
    assert x.grad is not None
    torch.compiler.reset()
    try:
        torch.compile(step, backend="eager", fullgraph=True)(x, y)
    except Exception as error:
        refusal = str(error)
    return Result(loss.detach().numpy() / 2, x.grad.numpy() / 2), refusal


def test_compile(pools: Pools, rng: np.random.Generator) -> None:
    batch = draw(rng, (9, 13))
    results = pools[2].run(compiled, batch)
    wanted = expected(batch)
    close(results[0][0].loss, wanted.loss, 1e-12)
    close(np.concatenate([result.grad for result, _ in results]), wanted.grad, 1e-12)
    assert all("the ranks tell each other their sizes" in refusal for _, refusal in results)
