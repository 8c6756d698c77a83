"""OPIS and its rates by their definitions, in NumPy loops and fp64, and a set in which OPIS has something to find."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from support.oracle import Array

NEAR = 1e-6  # pairs this near to an edge may fall on either side of it


@dataclass(frozen=True)
class Oracle:
    """Every pair once, in fp64, and everything by its definition."""

    s: Array  # [P] similarity
    first: Array  # [P] label of either row
    second: Array
    labels: Array  # [N]

    @classmethod
    def of(cls, x: Array, y: Array) -> "Oracle":
        x, y = x[y >= 0].astype(np.float64), y[y >= 0]
        unit = x / np.maximum(np.hypot.reduce(x, axis=1)[:, None], 1e-12)
        s, first, second = [], [], []
        for i in range(len(y)):
            for j in range(i + 1, len(y)):
                s.append(float(unit[i] @ unit[j]))
                first.append(y[i])
                second.append(y[j])
        return cls(np.array(s), np.array(first), np.array(second), y)

    @property
    def classes(self) -> Array:
        ids, sizes = np.unique(self.labels, return_counts=True)
        counted: Array = ids[sizes > 1]
        return counted

    def rates(self, t: float) -> tuple[Array, Array, float, float]:
        """Sensitivity and specificity of each class, false accept and false reject rate of all pairs."""
        same = self.first == self.second
        phi, psi = [], []
        for c in self.classes:
            positive, negative = same & (self.first == c), ~same & ((self.first == c) | (self.second == c))
            phi.append(float((self.s[positive] >= t).mean()))
            psi.append(float((self.s[negative] < t).mean()))
        return np.array(phi), np.array(psi), float((self.s[~same] >= t).mean()), float((self.s[same] < t).mean())

    def clear(self, thresholds: Array) -> bool:
        """No pair is too near to any of the thresholds."""
        gap = np.abs(self.s[:, None] - thresholds)
        return not bool((gap < NEAR).any())


def scores(phi: Array, psi: Array, axis: Array, beta: float, epsilon: float) -> tuple[float, float]:
    """OPIS and epsilon-OPIS from rates [C, K] at thresholds [K], in loops, as the formulas say."""
    u = np.zeros_like(phi)
    for c in range(phi.shape[0]):
        for k in range(phi.shape[1]):
            if phi[c, k] + psi[c, k] > 0:
                u[c, k] = (1 + beta**2) * phi[c, k] * psi[c, k] / (beta**2 * phi[c, k] + psi[c, k])

    def mean(values: Array) -> float:
        return float(np.trapezoid(values, axis)) / float(axis[-1] - axis[0])

    average = u.mean(axis=0)
    ranked = sorted(range(len(u)), key=lambda c: mean(u[c]))
    size = math.ceil(epsilon * len(u))
    worst, rest = u[ranked[:size]].mean(axis=0), u[ranked[size:]].mean(axis=0) if size < len(u) else None
    return float(np.mean([mean((row - average) ** 2) for row in u])), 0.0 if rest is None else mean((worst - rest) ** 2)


def as_distance(s: Any) -> Array:
    return np.sqrt(2 - 2 * np.asarray(s))


def clustered(n: int = 900, classes: int = 60, d: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Classes of very different tightness: OPIS has something to find."""
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=n)
    spread = rng.uniform(0.3, 1.2, size=classes)[y]
    x = rng.standard_normal((classes, d))[y] + spread[:, None] * rng.standard_normal((n, d))
    return torch.from_numpy(x).float(), torch.from_numpy(y)
