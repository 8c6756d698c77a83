"""The CUDA kernels that count pairs, on a CPU as in test_emulator: against fp64, and against the blocked form."""

import importlib.machinery
import importlib.util
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import KINDS, dyadic, embeddings
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Array
from test_emulator import SANITIZERS, SCHEDULES, SIZES, WIDTHS, Bug, assert_found, build, build_bugs, run_alone

from tcm_fused.pair_counts import pair_counts_blocked

NEAR = 1e-6  # pairs this near to an edge may fall on either side of it
HOPPER, OLDER = {"sm": 90}, {"sm": 80}
PATHS = pytest.mark.parametrize("path", [OLDER, HOPPER], ids=["sm_80", "sm_90"])
# Shared memory of a block and of a multiprocessor, of an H100, an A100, an L40.
SHARED = ((227 << 10, 228 << 10), (163 << 10, 164 << 10), (99 << 10, 100 << 10))
Tables = tuple[Array, Array, Array]


@cache
def emulated() -> Any:
    """The module of the emulated kernels."""
    pybind11 = pytest.importorskip("pybind11", reason="the emulated kernels are bound with pybind11")
    include = f"-I {pybind11.get_include()} -I {sysconfig.get_paths()['include']}"
    path = build("counts_module.cpp", f"-O3 -fPIC -shared -fvisibility=hidden {include}", suffix=".so")
    loader = importlib.machinery.ExtensionFileLoader("tcm_counts_emulated", str(path))
    spec = importlib.util.spec_from_loader("tcm_counts_emulated", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Call:
    """One problem; similarities are exact on `exact` embeddings, whatever the arithmetic."""

    x: Array  # [N, D] float32
    y: Array
    classes: int
    thresholds: Array  # [T] float32
    bits: int
    exact: bool = False

    def run(self, **knobs: Any) -> Tables:
        counts, class_counts, best = emulated().pair_counts(
            x=self.x, y=self.y, classes=self.classes, thresholds=self.thresholds, bits=self.bits, **knobs
        )
        return counts, class_counts, best

    def blocked(self) -> Tables:
        tensors = (torch.from_numpy(a) for a in (self.x, self.y, self.thresholds))
        x, y, thresholds = tensors
        tables = pair_counts_blocked(x, y, self.classes, thresholds, self.bits, None)
        return tuple(t.numpy() for t in tables)  # type: ignore[return-value]

    def check(self, tables: Tables) -> None:
        """Every entry, by pairs in fp64: those that lie clearly beyond an edge, and at most those near it besides."""
        counts, class_counts, best = tables
        part = self.y >= 0
        x, y = self.x[part].astype(np.float64), self.y[part]
        unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        s, row = unit @ unit.T, np.minimum(y, self.classes)
        i, j = np.triu_indices(len(s), 1)
        slack = 0 if self.exact else NEAR
        edges = np.arange(2 * 2**self.bits + 1) / 2.0**self.bits - 1
        edges[0] = -np.inf  # what is below -1 counts as -1
        for side in range(2):
            mine = (y[i] == y[j]) == (side == 0)
            values, first, second = s[i, j][mine], row[i][mine], row[j][mine]
            assert counts.dtype == class_counts.dtype == np.int64
            assert counts[side].sum() == len(values)
            assert (counts[side] >= 0).all()
            assert between(counts[side], values, edges, slack)
            members = [first] if side == 0 else [first, second]
            for c in range(self.classes + 1):
                of_class = np.concatenate([values[m == c] for m in members])
                assert between(class_counts[side, c], of_class, self.thresholds.astype(np.float64), slack)
            off = s.copy()
            off[((y[:, None] == y) != (side == 0)) | np.eye(len(s), dtype=bool)] = -np.inf
            want = off.max(axis=1, initial=-np.inf)
            assert np.array_equal(np.isinf(best[side][part]), np.isinf(want))
            found = np.isfinite(want)
            assert (np.abs(best[side][part][found] - want[found]) <= slack).all()
            assert (best[side][~part] == -np.inf).all()


def between(counts: Array, values: Array, edges: Array, slack: float) -> bool:
    """Counts [K] of `values` from edge k to edge k + 1, the last without an upper bound; `slack` at each edge."""
    accepted = counts[::-1].cumsum()[::-1]
    values = np.sort(values)
    least = len(values) - np.searchsorted(values, edges + slack, side="left")
    most = len(values) - np.searchsorted(values, edges - slack, side="left")
    return bool(((least <= accepted) & (accepted <= most)).all())


# Against fp64.


@st.composite
def calls(draw: st.DrawFn) -> Call:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    n, d = draw(st.sampled_from((0, *SIZES))), draw(st.sampled_from(WIDTHS))
    classes = draw(st.sampled_from([1, 2, 5, 30, 10**6]))
    y = rng.integers(classes, size=n)
    exact = draw(st.booleans())
    x = dyadic(n, d, rng) if exact else embeddings(draw(st.sampled_from(KINDS)), y, d, rng)
    x[rng.random(n) < draw(st.sampled_from([0.0, 0.1]))] = 0
    y = np.where(rng.random(n) < draw(st.sampled_from([0.0, 0.0, 0.3, 0.95])), -1 - y, y)
    tables = draw(st.sampled_from([0, 1, 3, 40]))
    low, high = draw(st.sampled_from([(-1.5, 1.5), (0.3, 0.9), (1.1, 1.4), (-1.4, -1.1)]))
    t = np.sort(rng.uniform(low, high, size=draw(st.sampled_from([0, 1, 7, 500]))))
    if exact:
        t = np.round(t * 8) / 8  # on similarities, many times
    return Call(x.astype(np.float32), y, tables, t.astype(np.float32), draw(st.sampled_from([0, 1, 5, 12])), exact)


knobs = st.fixed_dictionaries(
    {
        "schedule": st.sampled_from(SCHEDULES),
        "seed": st.integers(0, 1000),
        "sm": st.sampled_from([80, 90, 90, 100]),
        "sm_count": st.integers(1, 9),
        "window": st.sampled_from([0, 2, 64, 2**20]),  # cells
        "one_chunk": st.sampled_from([0, 4096]),
        "chunk": st.sampled_from([32, 96]),
    }
)


@settings(max_examples=60)
@given(call=calls(), options=knobs)
def test_random_batches(call: Call, options: dict[str, Any]) -> None:
    """Every geometry, ragged size, number of classes and thresholds; windows of every size; every order of threads."""
    tables = call.run(**options)
    call.check(tables)
    blocked = call.blocked()
    call.check(blocked)
    if call.exact:
        for ours, theirs in zip(tables, blocked, strict=True):
            np.testing.assert_array_equal(ours, theirs)
