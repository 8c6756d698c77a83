"""A global batch in parts, one for each rank, and the loss that it must have."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from support.definition import Set, definition
from support.oracle import Array
from support.ranks import Outcome, Ranks
from tcm_fused import DistributedTCMLoss

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
    """About half of the positives and a quarter of the negatives are hard, whatever the rounding; a sole pair too."""
    x_hat = nn.functional.normalize(x.double()).numpy()
    s = x_hat @ x_hat.T
    found = {}
    for name, pairs, share in (("plus", y[:, None] == y, 0.5), ("minus", y[:, None] != y, 0.75)):
        ordered = np.sort(s[np.triu(pairs, 1)])
        near = np.append(ordered, ordered[-1:] + 0.1)[int(share * len(ordered)) :][:12]
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


def refused(outcomes: list[Outcome], kind: str, *parts: str) -> None:
    """Every rank raised `kind`, with each of `parts` in the message."""
    for outcome in outcomes:
        assert outcome.kind == kind, outcome
        for part in parts:
            assert part in outcome.message, outcome.message
