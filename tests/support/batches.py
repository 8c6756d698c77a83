"""Batches to test with: embeddings of different geometry, labels, and margins for a wanted density of hard pairs."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from support.oracle import Array, Oracle

KINDS = ("random", "cone", "classes", "groups", "duplicates", "line")


def embeddings(kind: str, y: Array, d: int, rng: np.random.Generator) -> Array:
    """[N, D] fp64 for labels y [N], of uneven norms.

    random      all directions
    cone        all near one direction: every similarity is high
    classes     each class near a centre of its own
    groups      each three classes near one centre: whole blocks of hard negatives, whole blocks without
    duplicates  few distinct directions: many similarities are 1
    line        one direction and its opposite: every similarity is 1 or -1
    """
    n = len(y)
    noise = rng.standard_normal((n, d))
    if kind == "random":
        x = noise
    elif kind == "cone":
        x = rng.standard_normal(d) + 0.2 * noise
    elif kind in ("classes", "groups"):
        group = np.unique(y, return_inverse=True)[1] // (1 if kind == "classes" else 3)
        x = rng.standard_normal((n + 1, d))[group] + 0.1 * noise
    elif kind == "duplicates":
        x = rng.standard_normal((5, d))[rng.integers(5, size=n)]
    else:
        x = rng.standard_normal(d) * rng.choice([-1.0, 1.0], size=(n, 1))
    return x * 2.0 ** rng.uniform(-3, 3, size=(n, 1))


def margins(oracle: Oracle, share: float) -> dict[str, Any]:
    """Margins at which about `share` of the positives and of the negatives are hard; 0 and 1 are none and all."""
    found = {}
    for name, pair, below in (("plus", oracle.pair[0], share), ("minus", oracle.pair[1], 1 - share)):
        s = np.sort(oracle.s[pair])
        split = int(below * len(s))
        low = s[split - 1] if split else -2.0
        above = s[s > low + 1e-9]  # half way to the next value, which is not that of the pair's mirror image
        found[f"margin_{name}"] = float(low + (above[0] if len(above) else 2.0)) / 2
    return found


def dyadic(n: int, d: int, rng: np.random.Generator) -> Array:
    """Rows [N, D] whose norms are powers of two and whose similarities are multiples of 1/4, exactly in any dtype.

    Four components of +-1/2 or one of +-1, at random places, times a power of two; one row in ten is zero.
    """
    x = np.zeros((n, d))
    for row in x:
        k = 4 if d >= 4 and rng.random() < 0.8 else 1
        row[rng.choice(d, k, replace=False)] = rng.choice([-1.0, 1.0], k) / k**0.5
    x *= 2.0 ** rng.integers(-3, 4, size=(n, 1))
    return x * (rng.random((n, 1)) >= 0.1)


def batch(n: int, d: int, classes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random embeddings [N, D] and labels [N] int64."""
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=n)
    return torch.from_numpy(embeddings("random", y, d, rng)).to(dtype), torch.from_numpy(y)
