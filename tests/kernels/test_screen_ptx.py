"""The screen of the CUDA kernels: fp32 accuracy at the price of one product, executed by tests/ptx_machine.

Which tiles are multiplied in full is decided by one product and a bound (csrc/cuda/screen.cuh). Counts and gradients
have to be those of the kernels without it, to the bit, above all where the bound is nearly reached.
"""

from dataclasses import replace

import numpy as np
import pytest
from ptx_machine.kernels import Knobs
from ptx_machine.problems import LossProblem, at_the_bound, problem_of, stored
from support.batches import embeddings
from support.oracle import Result

NEVER = 2**31 - 1  # no block of threads has so many tiles
PATHS = pytest.mark.parametrize("path", [Knobs(sm="80"), Knobs(sm="90")], ids=["sm_80", "sm_90"])


def check(problem: LossProblem, knobs: Knobs, *, penalties: bool = False) -> Result:
    """With the screen, held to the oracle and to the kernels without it.

    Only the sum of the penalties may differ, as blocks of threads add up other tiles: in fp64, by its roundings.
    """
    result = problem.check(replace(knobs, screen_from=0), penalties=penalties)
    plain = problem.run(replace(knobs, screen_from=NEVER), penalties=penalties)
    np.testing.assert_array_equal(result.count, plain.count)
    np.testing.assert_array_equal(result.grad_x, plain.grad_x)
    np.testing.assert_array_equal(result.grad_ref, plain.grad_ref)
    np.testing.assert_allclose(result.violation, plain.violation, rtol=1e-13, atol=0)
    return result


@PATHS
@pytest.mark.parametrize("violation", [1e-4, 1e-5, 3e-6, -3e-6, -1e-5, -1e-4])
@pytest.mark.parametrize("side", [0, 1])
def test_pairs_at_the_bound(side: int, violation: float, path: Knobs) -> None:
    """All low parts point one way: the high parts' product is as far off as the bound allows, but for 7 %."""
    for knobs in (path, replace(path, truncated=True, sm_count=1)):
        result = check(at_the_bound(side, violation), knobs)
        hard = (512 * 255, 512)[side] if violation > 0 else 0
        assert result.count.tolist() == ([hard, 0] if side == 0 else [0, hard])


@PATHS
def test_pairs_at_the_bound_of_wide_rows(path: Knobs) -> None:
    assert check(at_the_bound(1, 1e-5, d=512), path).count.tolist() == [0, 512]


def near(rng: np.random.Generator, distance: float) -> LossProblem:
    """Margins that far from the similarity of a pair: the fifth of its side, from the one that is hard first."""
    y = rng.integers(40, size=500)
    x = embeddings("groups", y, 70, rng)
    x[::50] = 0  # of similarity 0 to all
    x[7::50] = 1
    x[7::50, 3] = 1e30
    y[::45] = -1
    problem = LossProblem(stored(x, "fp32"), y)
    oracle = problem.oracle()
    plus, minus = (np.sort(oracle.s[pair]) for pair in oracle.pair)
    return replace(problem, margin=(float(plus[10]) + distance, float(minus[-10]) - distance))


@PATHS
@pytest.mark.parametrize("distance", [1e-3, 1e-4, 1e-5, 1e-6, 1e-7, -1e-7, -1e-6, -1e-5, -1e-4, -1e-3])
def test_similarities_near_the_margin(distance: float, path: Knobs) -> None:
    """On either side, in plain tiles and in those with labels; zero rows, and rows of one huge component."""
    check(near(np.random.default_rng(3), distance), replace(path, truncated=distance < 0, rectangle=2))


@PATHS
@pytest.mark.parametrize("sm_count", [1, 9])
@pytest.mark.parametrize("share", [0.0, 1e-4, 0.03, 1.0])
def test_few_and_many_hard_pairs(share: float, sm_count: int, path: Knobs) -> None:
    """Blocks of threads that go on to the end, and such as give up; lists of no tile, of some and of all."""
    rng = np.random.default_rng(4)
    y = rng.integers(9, size=700)
    x = stored(embeddings("groups", y, 30, rng), "fp32")
    problem = LossProblem(x, y).at_share(share)
    check(problem, replace(path, sm_count=sm_count))
    check(replace(problem, ref_x=x[:300], ref_y=y[:300]), replace(path, sm_count=sm_count, rectangle=2), penalties=True)


def test_many_tiles() -> None:
    """More of them than one word for each thread of `list_undecided`: 1,100 tiles of columns, nearly all of padding."""
    rng = np.random.default_rng(5)
    x, ref_x = (rng.standard_normal((n, 3)).astype(np.float32) for n in (100, 1100 * 128))
    ref_y = np.full(len(ref_x), -1)
    ref_y[-500:] = np.arange(500)
    problem = problem_of((x, np.arange(100) % 7, ref_x, ref_y), margin=(0.5, 0.5))
    assert check(problem, Knobs(rectangle=2000, chunk=32)).count.min() > 0


@PATHS
def test_the_screen_runs_where_it_pays(path: Knobs) -> None:
    """Not in 16 bits, nor for few tiles."""
    from ptx_machine.kernels import kernels

    def launches() -> int:
        return sum(use[0] for (_, kernel), use in kernels().machine.executed().items() if "ScreenVisitor" in kernel)

    rng = np.random.default_rng(6)
    y = np.arange(600)
    x = embeddings("random", y, 20, rng)
    for number_format, screen_from, runs in (("fp32", 0, 1), ("fp32", 4, 0), ("fp32", 1, 1), ("fp16", 0, 0)):
        problem = LossProblem(stored(x, number_format), y, fp16=number_format == "fp16")
        before = launches()
        problem.run(replace(path, screen_from=screen_from, sm_count=2))
        assert launches() - before == runs, (number_format, screen_from)
