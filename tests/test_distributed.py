"""The loss of a batch spread over ranks: that of one process with the whole batch, and errors instead of hangs.

Everything runs in gloo groups of 2, 3 and 4 processes. Expected values are the definition written out in fp64.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Array
from ranks import Ranks
from torch import Tensor, nn

from tcm_fused import DistributedTCMLoss

WORLDS = (2, 3, 4)
BACKENDS = ("torch",)
N, D, HIDDEN = 41, 7, 5
LAMBDA = {"lambda_plus": 1.5, "lambda_minus": 0.75}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "squared": {"penalty": "squared"},
    "all": {"reduction": "all"},
    "within": {"group_pairs": "within"},
    "across": {"group_pairs": "across", "penalty": "squared", "reduction": "all"},
}


@pytest.fixture(scope="session")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Ranks]]:
    """All processes, started at once."""
    folder = tmp_path_factory.mktemp("ranks")
    pools = {world: Ranks(world, folder) for world in WORLDS}
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture(params=WORLDS)
def ranks(request: pytest.FixtureRequest, pools: dict[int, Ranks]) -> Ranks:
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
        return torch.from_numpy(self.x[mine]).to(self.dtype), torch.from_numpy(self.y[mine]), groups

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
    options = {**OPTIONS[name], **LAMBDA, **margins(torch.from_numpy(x), y)}
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


def definition(x: Tensor, batch: Batch) -> Tensor:
    """The loss of the whole batch, every pair written out."""
    y = torch.from_numpy(batch.y)
    s = nn.functional.normalize(x) @ nn.functional.normalize(x).T
    pair = ((y >= 0)[:, None] & (y >= 0)) & ~torch.eye(len(y), dtype=torch.bool)
    if batch.groups is not None:
        groups = torch.from_numpy(batch.groups)
        same_group = groups[:, None] == groups
        pair &= same_group if batch.options["group_pairs"] == "within" else ~same_group
    same = y[:, None] == y
    loss = torch.zeros((), dtype=x.dtype)
    for side, pairs, gap in (
        ("plus", pair & same, batch.options["margin_plus"] - s),
        ("minus", pair & ~same, s - batch.options["margin_minus"]),
    ):
        hard = pairs & (gap >= 0)
        penalty = (gap[hard] ** (2 if batch.options.get("penalty") == "squared" else 1)).sum()
        divisor = hard.sum() if batch.options.get("reduction", "violating") == "violating" else pairs.sum()
        loss = loss + batch.options[f"lambda_{side}"] * penalty / max(int(divisor), 1)
    return loss


def expected(batch: Batch) -> Result:
    x = torch.from_numpy(batch.x).to(batch.dtype).double().requires_grad_()
    loss = definition(x, batch)
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
