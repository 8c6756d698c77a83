"""The loss of a batch spread over ranks: that of one process with the whole batch, and errors instead of hangs.

Everything runs in gloo groups of 2, 3 and 4 processes. Expected values are the definition written out in fp64.
"""

import copy
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.definition import Set, definition
from support.oracle import Array
from support.ranks import PATIENCE, Outcome, Ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel

from tcm_fused import CrossBatchMemory, DistributedTCMLoss, TCMLoss, distributed
from tcm_fused.arguments import Rows
from tcm_fused.pair_sums import pair_sums

WORLDS = (2, 3, 4)
BACKENDS = ("cpu", "torch")
N, D, HIDDEN = 41, 7, 5
LAMBDA = {"lambda_plus": 1.5, "lambda_minus": 0.75}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "squared": {"penalty": "squared"},
    "all": {"reduction": "all"},
    "within": {"group_pairs": "within"},
    "across": {"group_pairs": "across", "penalty": "squared", "reduction": "all"},
}


class Pools(dict[int, Ranks]):
    """By number of ranks, each started when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, world: int) -> Ranks:
        self[world] = Ranks(world, self.folder)
        return self[world]


@pytest.fixture(scope="session")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pools]:
    pools = Pools(tmp_path_factory.mktemp("ranks"))
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture(params=WORLDS)
def ranks(request: pytest.FixtureRequest, pools: Pools) -> Ranks:
    return pools[request.param]


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")  # pytest shows it where a test fails
    return np.random.default_rng(seed)


@dataclass(frozen=True)
class Batch:
    """A global batch, how it is cut into the ranks' parts, and the loss's options."""

    x: Array  # [N, D] fp64
    y: Array
    groups: Array | None
    sizes: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)  # of TCMLoss
    dtype: torch.dtype = torch.float64
    ring: bool = False
    grad_reduction: str = "sum"

    def part(self, rank: int) -> tuple[Tensor, Tensor, Tensor | None]:
        end = sum(self.sizes[: rank + 1])
        mine = slice(end - self.sizes[rank], end)
        groups = None if self.groups is None else torch.from_numpy(self.groups[mine])
        x = torch.from_numpy(self.x[mine]).to(self.dtype).t().contiguous().t()  # columns lie together, not rows
        return x, torch.from_numpy(self.y[mine]), groups

    def criterion(self, **changed: Any) -> DistributedTCMLoss:
        options = {"ring": self.ring, "grad_reduction": self.grad_reduction, **self.options, **changed}
        return DistributedTCMLoss(**options)


@dataclass(frozen=True)
class Result:
    loss: Array
    grad: Any  # [N, D]
    count: Any = None
    violation: Any = None


def draw(rng: np.random.Generator, sizes: tuple[int, ...], name: str = "plain", **changed: Any) -> Batch:
    """Clusters with some negative labels, and margins with no similarity near them."""
    n = sum(sizes)
    y = rng.integers(-1, 5, n)
    x = rng.standard_normal((6, D))[y] + 0.8 * rng.standard_normal((n, D))
    groups = rng.integers(3, size=n) if "group_pairs" in OPTIONS[name] else None
    x *= 2.0 ** rng.uniform(-3, 3, (n, 1))
    options = {
        **OPTIONS[name],
        **LAMBDA,
        **margins(torch.from_numpy(x), y),
    }
    return Batch(x, y, groups, sizes, options, **changed)


def margins(x: Tensor, y: Array) -> dict[str, float]:
    """About half of the positives and a quarter of the negatives are hard, whatever the rounding."""
    x_hat = nn.functional.normalize(x.double()).numpy()
    s = x_hat @ x_hat.T
    found = {}
    for name, pairs, share in (("plus", y[:, None] == y, 0.5), ("minus", y[:, None] != y, 0.75)):
        ordered = np.sort(s[pairs & ~np.eye(len(y), dtype=bool)])
        near = ordered[int(share * len(ordered)) :][:12]
        place = int(np.argmax(np.diff(near))) if len(near) > 1 else 0
        found[f"margin_{name}"] = float(near[place : place + 2].mean()) if len(near) else 0.3
    return found


def cut(rng: np.random.Generator, world: int, n: int = N) -> tuple[int, ...]:
    """Sizes of `world` parts, as they come."""
    edges = np.sort(rng.integers(0, n + 1, world - 1))
    return tuple(int(size) for size in np.diff([0, *edges, n]))


def all_pairs(x: Tensor, batch: Batch) -> Tensor:
    rows = Set(x, torch.from_numpy(batch.y), None if batch.groups is None else torch.from_numpy(batch.groups))
    return definition(rows, rows, batch.options)


def expected(batch: Batch) -> Result:
    x = torch.from_numpy(batch.x).to(batch.dtype).double().requires_grad_()
    loss = all_pairs(x, batch)
    loss.backward()
    assert x.grad is not None
    return Result(loss.detach().numpy(), x.grad.numpy())


def local(rank: int, batch: Batch) -> Result:
    """One rank's loss and gradient of its embeddings."""
    x, y, groups = batch.part(rank)
    x.requires_grad_()
    criterion = batch.criterion()
    loss = criterion(x, y, groups=groups)
    loss.backward()
    assert x.grad is not None and x.grad.dtype == x.dtype and criterion.stats is not None
    stats = [t.numpy() for t in criterion.stats]
    return Result(loss.detach().numpy(), x.grad.double().numpy(), np.array(stats[:2]), np.array(stats[2:]))


def joined(results: list[Result]) -> Result:
    """The global result of all ranks, whose losses have the same bits."""
    for result in results:
        assert result.loss.tobytes() == results[0].loss.tobytes()
        assert result.count.tobytes() == results[0].count.tobytes()
        assert result.violation.tobytes() == results[0].violation.tobytes()
    return replace(results[0], grad=np.concatenate([result.grad for result in results]))


def close(given: Array, wanted: Array, tolerance: float) -> None:
    """Within `tolerance` of the largest entry."""
    assert given.shape == wanted.shape
    scale = np.abs(wanted).max(initial=0)
    error = np.abs(given - wanted).max(initial=0)
    assert error <= tolerance * scale, f"off by {error / scale:.3g} of {scale:.3g}, {tolerance} allowed"


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


def refused(outcomes: list[Outcome], kind: str, *parts: str) -> None:
    """Every rank raised `kind`, with each of `parts` in the message."""
    for outcome in outcomes:
        assert outcome.kind == kind, outcome
        for part in parts:
            assert part in outcome.message, outcome.message


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
    """Those being worked on, and those arriving: what was worked on before is gone, with its graph."""
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


# Wrong arguments: an error on all ranks at once, after which the group goes on working.


def call(rank: int, arguments: dict[str, Any], options: dict[str, Any], *, on: int | None = None) -> float:
    """The loss of a good batch, but for what is changed on rank `on` (None: on all)."""
    good: dict[str, Any] = {"embeddings": torch.eye(4, 3), "labels": torch.arange(4)}
    if on is None or rank == on:
        return DistributedTCMLoss(**options)(**{**good, **arguments}).item()
    return DistributedTCMLoss()(**good).item()


def call_on_rank_1(rank: int, arguments: dict[str, Any], options: dict[str, Any]) -> float:
    return call(rank, arguments, options, on=1)


def with_dtensor(rank: int) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    DistributedTCMLoss()(distribute_tensor(torch.eye(4, 3), mesh), torch.arange(4))


def test_dtensors_are_refused(pools: Pools) -> None:
    refused(pools[2].outcomes(with_dtensor), "TypeError", "got DTensor", "to_local()")


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
            patch.setattr(distributed, "_pack", out_of_memory)
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
    """A step in which the loss stands between two pieces that are compiled, and what fullgraph=True says of it."""
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
