"""The CUDA kernels that count pairs, on a CPU as in test_emulator: against fp64, and against the blocked form."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.batches import KINDS, dyadic, embeddings
from support.count_oracle import CountCall, Tables
from test_emulator import (
    SANITIZERS,
    SCHEDULES,
    SIZES,
    WIDTHS,
    Bug,
    assert_found,
    build,
    build_bugs,
    emulated,
    run_alone,
)

from tcm_fused.backends.blocked_counts import counts_blocked

HOPPER, OLDER = {"sm": 90}, {"sm": 80}
PATHS = pytest.mark.parametrize("path", [OLDER, HOPPER], ids=["sm_80", "sm_90"])
# Shared memory of a block and of a multiprocessor, of an H100, an A100, an L40.
SHARED = ((227 << 10, 228 << 10), (163 << 10, 164 << 10), (99 << 10, 100 << 10))


@dataclass(frozen=True)
class Call(CountCall):
    """That of the oracle, run by the emulated kernels and by the blocked form."""

    def run(self, **knobs: Any) -> Tables:
        counts, class_counts, best = emulated("counts_module.cpp", "tcm_counts_emulated").pair_counts(
            x=self.x, y=self.y, classes=self.classes, thresholds=self.thresholds, bits=self.bits, **knobs
        )
        return counts, class_counts, best

    def blocked(self) -> Tables:
        counts, class_counts, best = (t.numpy() for t in counts_blocked(*self.tensors(), None))
        return counts, class_counts, best


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


@settings(max_examples=20)
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


@PATHS
@pytest.mark.parametrize("shared", SHARED, ids=["H100", "A100", "L40"])
def test_bits_of_opis(path: dict[str, int], shared: tuple[int, int]) -> None:
    """A grid of 2^-17, of which a window is all that shared memory holds; thresholds on it and between."""
    rng = np.random.default_rng(shared[0])
    y = rng.integers(40, size=500)
    x = embeddings("groups", y, 200, rng).astype(np.float32)
    t = np.unique(np.append(rng.integers(2**18, size=300) / 2**17 - 1, rng.uniform(-1, 1, 50))).astype(np.float32)
    call = Call(x, y, 30, t, 17)
    call.check(call.run(**path, sm_count=2, shared_per_block=shared[0], shared_per_sm=shared[1]))


@PATHS
@pytest.mark.parametrize("window", [0, 2**20])
def test_many_pairs_of_one_cell(path: dict[str, int], window: int) -> None:
    """A counter of 16 bits hands on what it cannot hold: 101,025 negatives of similarity 1, 450 of one block."""
    x, y = np.ones((450, 4), dtype=np.float32), np.arange(450)
    call = Call(x, y, 3, np.array([0.5, 1.0], dtype=np.float32), 4, exact=True)
    tables = call.run(**path, sm_count=1, window=window)
    call.check(tables)
    assert tables[0][1, -1] == 450 * 449 // 2 > 3 * 2**15


@PATHS
@pytest.mark.parametrize("n", [0, 1, 2, 129])
@pytest.mark.parametrize("y", [0, -1], ids=["one class", "no class"])
def test_few_pairs(path: dict[str, int], n: int, y: int) -> None:
    """No row, no pair, no negative, no row that takes part: every table is written all the same."""
    x = np.random.default_rng(n).standard_normal((n, 3)).astype(np.float32)
    x[:, 0] = np.nan if y < 0 else x[:, 0]
    call = Call(x, np.full(n, y), 0, np.array([-2.0], dtype=np.float32), 3)
    call.check(call.run(**path))


@PATHS
def test_extreme_norms(path: dict[str, int]) -> None:
    """Near both ends of fp32, where squares over- and underflow; and below the smallest divisor."""
    rng = np.random.default_rng(1)
    x, y = dyadic(150, 70, rng), rng.integers(4, size=150)
    x *= 2.0 ** rng.choice([-30, 0, 100, 115], size=(150, 1))
    call = Call(x.astype(np.float32), y, 4, np.array([-0.25, 0.25, 0.5], dtype=np.float32), 6, exact=True)
    call.check(call.run(**path))


@PATHS
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite(path: dict[str, int], bad: float) -> None:
    """No GPU can raise an error for it: the largest similarities are NaN. A row of no class is not looked at."""
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((150, 20)).astype(np.float32), rng.integers(3, size=150)
    y[7] = -1
    x[7, 3] = bad
    call = Call(x, y, 3, np.array([0.1], dtype=np.float32), 6)
    assert not np.isnan(call.run(**path)[2]).any()
    x[8, 3] = bad
    assert np.isnan(call.run(**path)[2]).all()


@PATHS
def test_same_tables(path: dict[str, int]) -> None:
    """Any order of threads, number of blocks and width of the window gives the same."""
    rng = np.random.default_rng(4)
    y = rng.integers(12, size=420)
    t = np.linspace(-0.2, 1, 30, dtype=np.float32)
    call = Call(embeddings("groups", y, 70, rng).astype(np.float32), y, 12, t, 10)
    first = call.run(**path)
    for seed, schedule in enumerate(SCHEDULES):
        again = call.run(**path, schedule=schedule, seed=seed, sm_count=seed + 1, window=128 * seed)
        for ours, theirs in zip(again, first, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_check_can_fail() -> None:
    """One pair in the next cell, in the next class, or a similarity that is a little too large."""
    rng = np.random.default_rng(6)
    y = rng.integers(5, size=60)
    t = np.linspace(-1, 0.5, 4, dtype=np.float32)
    call = Call(embeddings("random", y, 5, rng).astype(np.float32), y, 5, t, 3)
    good = call.blocked()
    call.check(good)
    for table, at, to in ((0, (1, 8), (1, 9)), (1, (1, 2, 1), (1, 3, 1)), (1, (0, 1, 1), (0, 1, 2)), (2, (0, 7), None)):
        bad = (good[0].copy(), good[1].copy(), good[2].copy())
        if to is None:
            bad[table][at] += 1e-5
        else:
            bad[table][at] -= 1
            bad[table][to] += 1
        with pytest.raises(AssertionError):
            call.check(bad)


# Under the sanitizers.


@pytest.mark.parametrize(("sanitizer", "cases"), [("asan-ubsan", 25), ("tsan", 12)])
def test_sanitizers(sanitizer: str, cases: int) -> None:
    """Random problems agree with a double loop, and no sanitizer speaks."""
    done = run_alone(build("counts_main.cpp", SANITIZERS[sanitizer]), cases)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    assert f"{cases} cases agree" in done.stdout


def bug(line: str, replacement: str, found_by: str = "none", file: str = "pair_counts.cuh") -> Bug:
    return Bug(file, line, replacement, found_by)


BUGS = {
    "window: not cleared": bug("window_of(memory)[k] = 0;", "window_of(memory)[k] |= 0;"),
    "window: carry lost": bug("to_place + place, kCarry);", "to_place + place, 0);"),
    "window: read early": bug("    workers_sync();\n    for (int k = worker", "    for (int k = worker", "tsan"),
    "window: too little shared memory": bug(
        "used + int64_t{counter.window} * 2", "used + int64_t{counter.window} * 2 - 4", "asan", "pair_counts.cu"
    ),
    "queue: read early": bug("    __syncwarp();  // they are written\n", "", "tsan"),
    "queue: written early": bug("    __syncwarp();  // and read\n", "", "tsan"),
    "queue: too short": bug("kQueue = (kBatch + 1) * 32 - 1;", "kQueue = kBatch * 32;", "tsan"),
    "classes: threshold not included": bug("threshold[middle] <= value", "threshold[middle] < value"),
    "classes: only the row's": bug("if (at.side == kMinus) add(class_count", "if (column < 0) add(class_count"),
    "tiles: pairs twice": bug("note_pairs<kHeld, true>", "note_pairs<kHeld, false>"),
    "best: raised by a store": bug("atomicMax(best, key);", "*best = key;", "tsan"),
}


@pytest.fixture(scope="module")
def buggy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build_bugs(BUGS, "counts_main.cpp", tmp_path_factory)


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_found(name: str, buggy: dict[str, Path]) -> None:
    """The same program as in `test_sanitizers` fails, in the way it should, once the kernel has a bug."""
    assert_found(BUGS[name], buggy[name])
