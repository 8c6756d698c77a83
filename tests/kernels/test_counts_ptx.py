"""The CUDA kernels that count pairs, as test_cuda_ptx has the loss's: against fp64, and against the blocked form."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx_machine.kernels import Knobs
from ptx_machine.problems import CountsProblem
from support.batches import KINDS, dyadic, embeddings
from support.count_oracle import Tables

from tcm_fused.backends.blocked_counts import counts_blocked

SIZES = (0, 1, 2, 31, 127, 128, 129, 200, 256, 257, 300)  # around one, two and three tiles
WIDTHS = (1, 3, 33, 64, 65, 130, 200)
PATHS = pytest.mark.parametrize("path", [Knobs(sm="80"), Knobs(sm="90")], ids=["sm_80", "sm_90"])


def blocked(problem: CountsProblem) -> Tables:
    counts, class_counts, best, ref_best = (t.numpy() for t in counts_blocked(*problem.tensors(), None))
    return counts, class_counts, best, ref_best


@st.composite
def problems(draw: st.DrawFn) -> CountsProblem:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    n, d = draw(st.sampled_from(SIZES)), draw(st.sampled_from(WIDTHS))
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
    bits = draw(st.sampled_from([0, 1, 5, 12]))
    problem = CountsProblem(x.astype(np.float32), y, tables, t.astype(np.float32), bits, exact)
    return problem.divided(rng) if draw(st.booleans()) else problem


knobs = st.builds(
    Knobs,
    sm=st.sampled_from(["80", "90", "90", "100"]),
    seed=st.integers(0, 1000),
    truncated=st.booleans(),
    sm_count=st.integers(1, 9),
    window=st.sampled_from([0, 2, 64, 2**20]),  # cells
    one_chunk=st.sampled_from([0, 4096]),
    chunk=st.sampled_from([32, 96]),
)


@settings(max_examples=20)
@given(problem=problems(), knobs=knobs)
def test_random_batches(problem: CountsProblem, knobs: Knobs) -> None:
    """Every geometry, ragged size, number of classes and thresholds; windows of every size; every order of warps."""
    tables = problem.check_on(knobs)
    theirs = blocked(problem)
    problem.check(theirs)
    if problem.exact and not knobs.truncated:
        for mine, other in zip(tables, theirs, strict=True):
            np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize(
    ("path", "shared"),
    [
        # Of a block and of a multiprocessor.
        pytest.param(Knobs(sm="90"), (227 << 10, 228 << 10), id="H100"),
        pytest.param(Knobs(sm="80", code="90"), (227 << 10, 228 << 10), id="H100 by the other path"),
        pytest.param(Knobs(sm="80"), (163 << 10, 164 << 10), id="A100"),
        pytest.param(Knobs(sm="80"), (99 << 10, 100 << 10), id="L40"),
    ],
)
def test_bits_of_opis(path: Knobs, shared: tuple[int, int]) -> None:
    """A grid of 2^-17, of which a window is all that shared memory holds; thresholds on it and between."""
    rng = np.random.default_rng(shared[0])
    y = rng.integers(40, size=400)
    x = embeddings("groups", y, 200, rng).astype(np.float32)
    t = np.unique(np.append(rng.integers(2**18, size=300) / 2**17 - 1, rng.uniform(-1, 1, 50))).astype(np.float32)
    CountsProblem(x, y, 30, t, 17).check_on(replace(path, sm_count=2), shared=shared)


@PATHS
@pytest.mark.parametrize("window", [0, 2**20])
def test_many_pairs_of_one_cell(path: Knobs, window: int) -> None:
    """A counter of 16 bits hands on what it cannot hold: 101,025 negatives of similarity 1, 450 of one block."""
    x, y = np.ones((450, 4), dtype=np.float32), np.arange(450)
    problem = CountsProblem(x, y, 3, np.array([0.5, 1.0], dtype=np.float32), 4, exact=True)
    tables = problem.check_on(replace(path, sm_count=1, window=window))
    assert tables[0][1, -1] == 450 * 449 // 2 > 3 * 2**15


@PATHS
@pytest.mark.parametrize(("n", "m"), [(1, 300), (300, 1), (128, 129), (0, 5), (5, 0)])
def test_two_sets(path: Knobs, n: int, m: int) -> None:
    """More rows than columns and fewer, to none; each pair counts once, and a row of both sets with itself too."""
    rng = np.random.default_rng(n)
    x, y = dyadic(n + m, 40, rng).astype(np.float32), rng.integers(-1, 6, size=n + m)
    x[:3] = x[-3:]
    t = np.array([-0.5, 0.25, 1.0], dtype=np.float32)
    problem = CountsProblem(x[:n], y[:n], 4, t, 5, exact=True, ref_x=x[n:], ref_y=y[n:])
    tables = problem.check_on(path)
    for mine, other in zip(tables, blocked(problem), strict=True):
        np.testing.assert_array_equal(mine, other)


@PATHS
@pytest.mark.parametrize("n", [0, 1, 2, 129])
@pytest.mark.parametrize("y", [0, -1], ids=["one class", "no class"])
def test_few_pairs(path: Knobs, n: int, y: int) -> None:
    """No row, no pair, no negative, no row that takes part: every table is written all the same."""
    x = np.random.default_rng(n).standard_normal((n, 3)).astype(np.float32)
    x[:, 0] = np.nan if y < 0 else x[:, 0]
    CountsProblem(x, np.full(n, y), 0, np.array([-2.0], dtype=np.float32), 3).check_on(path)


@PATHS
def test_extreme_norms(path: Knobs) -> None:
    """Near both ends of fp32, where squares over- and underflow; and below the smallest divisor."""
    rng = np.random.default_rng(1)
    x, y = dyadic(150, 70, rng), rng.integers(4, size=150)
    x *= 2.0 ** rng.choice([-30, 0, 100, 115], size=(150, 1))
    t = np.array([-0.25, 0.25, 0.5], dtype=np.float32)
    CountsProblem(x.astype(np.float32), y, 4, t, 6, exact=True).check_on(path)


@PATHS
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite(path: Knobs, bad: float) -> None:
    """No GPU can raise an error for it: the largest similarities are NaN. A row of no class is not looked at."""
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((150, 20)).astype(np.float32), rng.integers(3, size=150)
    y[7] = -1
    x[7, 3] = bad
    problem = CountsProblem(x, y, 3, np.array([0.1], dtype=np.float32), 6)
    assert not np.isnan(problem.run(path)[2]).any()
    x[8, 3] = bad
    assert np.isnan(problem.run(path)[2]).all()
    two = replace(problem, x=x[50:], y=y[50:], ref_x=x[:50], ref_y=y[:50])
    assert all(np.isnan(best).all() for best in two.run(path)[2:])


@PATHS
def test_same_tables(path: Knobs) -> None:
    """Any order of warps, number of blocks and width of the window gives the same."""
    rng = np.random.default_rng(4)
    y = rng.integers(12, size=390)
    t = np.linspace(-0.2, 1, 30, dtype=np.float32)
    problem = CountsProblem(embeddings("groups", y, 70, rng).astype(np.float32), y, 12, t, 10)
    first = problem.run(path)
    for seed in range(3):
        again = problem.run(replace(path, seed=seed, sm_count=seed + 1, window=128 * seed))
        for ours, theirs in zip(again, first, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_check_can_fail() -> None:
    """One pair in the next cell, in the next class, or a similarity that is a little too large."""
    rng = np.random.default_rng(6)
    y = rng.integers(5, size=60)
    t = np.linspace(-1, 0.5, 4, dtype=np.float32)
    problem = CountsProblem(embeddings("random", y, 5, rng).astype(np.float32), y, 5, t, 3)
    good = blocked(problem)
    problem.check(good)
    for table, at, to in ((0, (1, 8), (1, 9)), (1, (1, 2, 1), (1, 3, 1)), (1, (0, 1, 1), (0, 1, 2)), (2, (0, 7), None)):
        bad = (good[0].copy(), good[1].copy(), good[2].copy(), good[3])
        if to is None:
            bad[table][at] += 1e-5
        else:
            bad[table][at] -= 1
            bad[table][to] += 1
        with pytest.raises(AssertionError):
            problem.check(bad)
