"""Every pair of one set, or of two, in a double loop in fp64; within or across groups."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from support import batches
from support.oracle import Array

NEAR = 1e-6  # pairs this near to a threshold may fall on either side of it


@dataclass(frozen=True)
class PairList:
    """P pairs: similarity, label of either row, and the rows."""

    s: Array  # [P]
    first: Array
    second: Array
    i: Array
    j: Array
    queries: Array  # [N] labels of the rows, or of the queries

    @classmethod
    def of(
        cls,
        x: Any,
        y: Any,
        ref: Any = None,
        ref_y: Any = None,
        groups: Any = None,
        ref_groups: Any = None,
        group_pairs: str = "within",
    ) -> "PairList":
        found = []
        rows, columns = unit(x), unit(x if ref is None else ref)
        labels, groups_of_columns = (y, groups) if ref is None else (ref_y, ref_groups)
        for i in range(len(rows)):
            for j in range(i + 1 if ref is None else 0, len(columns)):
                if y[i] < 0 or labels[j] < 0:
                    continue
                if groups is None or (groups[i] == groups_of_columns[j]) == (group_pairs == "within"):
                    found.append((float(rows[i] @ columns[j]), y[i], labels[j], i, j))
        s, *rest = np.array(found).reshape(-1, 5).T
        first, second, i_, j_ = (part.astype(np.int64) for part in rest)
        return cls(s, first, second, i_, j_, np.asarray(y))

    @property
    def same(self) -> Array:
        return np.asarray(self.first == self.second)

    @property
    def classes(self) -> Array:
        """Those with a positive pair."""
        return np.unique(self.first[self.same])

    def far(self, t: float) -> float:
        return float((self.s[~self.same] >= t).mean())

    def frr(self, t: float) -> float:
        return float((self.s[self.same] < t).mean())

    def of_class(self, c: int) -> tuple[Array, Array]:
        """Similarities of its positive pairs, and of the pairs with one row in it."""
        one = (self.first == c) != (self.second == c)
        return self.s[self.same & (self.first == c)], self.s[one]

    def best(self, two: bool) -> tuple[Array, Array]:
        """Each query's largest similarity to a positive and to a negative."""
        found = np.full((2, len(self.queries)), -np.inf)
        for s, i, j, same in zip(self.s, self.i, self.j, self.same, strict=True):
            for row in (i,) if two else (i, j):
                side = 0 if same else 1
                found[side, row] = max(found[side, row], s)
        return found[0], found[1]

    def clear(self, rng: np.random.Generator, low: float = -1.0, high: float = 1.0) -> float:
        """A threshold with no pair near to it."""
        while True:
            t = float(rng.uniform(low, high))
            if not bool((np.abs(self.s - t) < NEAR).any()):
                return t


def unit(x: Any) -> Array:
    rows = np.asarray(x.numpy() if isinstance(x, torch.Tensor) else x, dtype=np.float64)
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))


def two_sets(rng: np.random.Generator, n: int = 40, m: int = 60, d: int = 6, kind: str = "random") -> dict[str, Any]:
    """Queries and a gallery, with rows of no class, and classes that only one of them has; three groups."""
    y, ref_y = rng.integers(-1, 8, size=n), rng.integers(-1, 7, size=m)
    y[:4], ref_y[:4] = (0, 0, 1, 7), (0, 1, 1, 2)
    x = batches.embeddings(kind, np.append(y, ref_y), d, rng)
    return {
        "embeddings": x[:n],
        "labels": y,
        "ref_emb": x[n:],
        "ref_labels": ref_y,
        "groups": np.append([0, 1, 2, 0], rng.integers(3, size=n - 4)),
        "ref_groups": np.append([0, 1, 2, 1], rng.integers(3, size=m - 4)),
    }


FORMS = ("one", "one within", "one across", "two", "two within", "two across")


def arguments(form: str, sets: dict[str, Any]) -> dict[str, Any]:
    """Those of a call, by the form of its sets."""
    names = ["embeddings", "labels"]
    if form.startswith("two"):
        names += ["ref_emb", "ref_labels"]
    how = form.partition(" ")[2]
    if how:
        names += ["groups"] + (["ref_groups"] if form.startswith("two") else [])
    found = {name: sets[name] for name in names}
    return found | ({"group_pairs": how} if how else {})


def oracle_of(call: dict[str, Any]) -> PairList:
    names = {"embeddings": "x", "labels": "y", "ref_emb": "ref", "ref_labels": "ref_y"}
    return PairList.of(**{names.get(name, name): value for name, value in call.items()})
