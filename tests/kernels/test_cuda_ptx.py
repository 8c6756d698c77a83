"""The loss's CUDA kernels without a GPU: the PTX that nvcc makes of them, executed by tests/ptx_machine.

They are held to the oracle, as exactly as the formats allow; and the machine reports whatever else is wrong, from a
race to a byte that was never written.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx_machine.kernels import Knobs, kernels
from ptx_machine.problems import FORMATS, LossProblem, crowd, halves_of_tiles, one_product, problem_of, stored
from support.batches import KINDS, dyadic, embeddings
from support.oracle import Array

SIZES = (1, 2, 31, 127, 128, 129, 200, 256, 257, 300)  # around one, two and three tiles
WIDTHS = (1, 3, 33, 64, 65, 130, 200)  # around the depth of a step and the width of a slice
OLDER, HOPPER = Knobs(sm="80"), Knobs(sm="90")
PATHS = pytest.mark.parametrize("path", [OLDER, HOPPER], ids=["sm_80", "sm_90"])


@st.composite
def problems(draw: st.DrawFn) -> LossProblem:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    n, d = draw(st.sampled_from(SIZES)), draw(st.sampled_from(WIDTHS))
    classes, padding = draw(st.sampled_from([1, 2, 5, 30, 999])), draw(st.sampled_from([0.0, 0.0, 0.3, 0.9]))
    form = draw(st.sampled_from(["symmetric", "symmetric", "reference set", "row_offset"]))
    sizes, offset = [n], None
    if form == "reference set":
        sizes.append(draw(st.sampled_from(SIZES)))
    elif form == "row_offset":
        sizes.append(n + draw(st.integers(0, 150), label="columns more than rows"))
        offset = draw(st.sampled_from([0, (sizes[1] - n) // 2, sizes[1] - n]))
    y_all = rng.integers(classes, size=sum(sizes))
    x_all = embeddings(draw(st.sampled_from(KINDS)), y_all, d, rng)
    number_format = draw(st.sampled_from(FORMATS))
    sets: list[Array] = []
    for part in np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1]):
        y = np.where(rng.random(len(part)) < padding, rng.integers(-9, 0, size=len(part)), y_all[part])
        sets += [stored(x_all[part], number_format), y]
    weight = st.sampled_from([0.0, 0.25, 1.0, 7.0])
    fp16 = one_product(number_format)
    problem = problem_of(sets, row_offset=offset, weight=(draw(weight), draw(weight)), fp16=fp16)
    if draw(st.booleans()):
        return problem.at_share(draw(st.sampled_from([0.0, 0.001, 0.02, 0.5, 0.98, 1.0])))
    number = st.floats(-2, 2, allow_subnormal=False)
    return replace(problem, margin=(draw(number), draw(number)))


knobs = st.builds(
    Knobs,
    sm=st.sampled_from(["80", "90", "100"]),
    seed=st.integers(0, 1000),
    truncated=st.booleans(),
    sm_count=st.integers(1, 9),
    rectangle=st.sampled_from([1, 2, 192]),
    screen_from=st.sampled_from([0, 4]),
    one_chunk=st.sampled_from([0, 4096]),  # sorted in one go
    chunk=st.sampled_from([32, 96]),  # else merged from
    on_device=st.booleans(),
    shift=st.sampled_from([0, 0, 1, 3]),
)
wanted = st.fixed_dictionaries(
    {
        "penalties": st.booleans(),
        "grad_x": st.sampled_from([True, True, False]),
        "grad_ref": st.sampled_from([True, True, False]),
    }
)


@settings(max_examples=100)
@given(problem=problems(), knobs=knobs, options=wanted)
def test_random_batches(problem: LossProblem, knobs: Knobs, options: dict[str, Any]) -> None:
    """Every form, geometry, format and architecture, in few and in many rectangles, in every order of warps."""
    problem.check(knobs, **options)


@pytest.mark.parametrize("form", ["fp32", "fp16"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999, 1.0])
@pytest.mark.parametrize(("kind", "classes"), [("random", 3), ("groups", 6), ("groups", 300)])
def test_classes_of_tiles(kind: str, classes: int, share: float, form: str) -> None:
    """600 rows, 5 tiles a side: empty, sparse, mixed and full ones, of one side and of both; one rectangle and nine."""
    rng = np.random.default_rng(classes)
    y = rng.integers(classes, size=600)
    problem = LossProblem(stored(embeddings(kind, y, 20, rng), form), y, fp16=one_product(form)).at_share(share)
    problem.check(Knobs(sm="80" if form == "fp32" else "90", rectangle=2, sm_count=4))
    part = replace(problem, ref_x=problem.x[:300], ref_y=y[:300])
    part.check(Knobs(sm="90" if form == "fp32" else "80", truncated=True))


@PATHS
def test_sparse_tiles_of_few_rows(path: Knobs) -> None:
    """A queue of pairs that overflows: 64 of each of nine tiles, all in the rows of one warp."""
    result = crowd(1100).check(path)
    assert result.count.tolist() == [0, 16 * 36]


@PATHS
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("upper", ["all", "some", "few", "none"])
@pytest.mark.parametrize("lower", ["all", "some", "few", "none"])
def test_halves_of_tiles(upper: str, lower: str, side: int, path: Knobs) -> None:
    """Each is worked by a warpgroup of its own on Hopper, and of some no mask is written."""
    result = halves_of_tiles(upper, lower, side).check(path)
    pairs = {"all": 64 * 256, "few": 29, "none": 0}
    if "some" not in (upper, lower):
        assert result.count.tolist() == [
            (1 - side) * (pairs[upper] + pairs[lower]),
            side * (pairs[upper] + pairs[lower]),
        ]


@PATHS
def test_each_path_has_its_own_kernels(path: Knobs) -> None:
    """Nothing falls back in silence."""
    machine = kernels().machine
    names = {"80": ("similarity", "masked_sum"), "90": ("similarity_sm90", "masked_sum_sm90")}

    def launches(sm: str) -> list[int]:
        return [
            sum(use[0] for (file, kernel), use in machine.executed().items() if kernel.split("<")[0] == name)
            for name in names[sm]
        ]

    before = {sm: launches(sm) for sm in names}
    y = np.arange(150) % 9
    LossProblem(stored(embeddings("groups", y, 20, np.random.default_rng(1)), "fp32"), y).at_share(0.5).check(path)
    for sm in names:
        assert (launches(sm) == before[sm]) == (sm != path.sm)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("rectangular", [False, True])
def test_similarities_on_the_margin(form: str, rectangular: bool) -> None:
    """Multiples of 1/4 against margins that are too: both inequalities are inclusive, for zero rows as well."""
    rng = np.random.default_rng(3)
    sets = [stored(dyadic(180, 70, rng), form), rng.integers(4, size=180)]
    if rectangular:
        sets += [stored(dyadic(150, 70, rng), form), rng.integers(4, size=150)]
    for k, margin in enumerate([(0.5, 0.25), (0.0, 0.0), (1.0, -1.0), (-1.0, 1.0)]):
        path = (OLDER, HOPPER)[(k + rectangular) % 2]
        problem_of(sets, margin=margin, fp16=one_product(form)).check(path, exact=True, penalties=path is HOPPER)


def test_margin_next_to_the_similarity() -> None:
    """One fp32 step away from it, all pairs on the margin change sides."""
    rng = np.random.default_rng(5)
    problem = LossProblem(stored(dyadic(150, 16, rng), "fp32"), rng.integers(3, size=150), margin=(0.5, 0.5))
    on_it = problem.check(exact=True).count
    below, above = (float(np.nextafter(np.float32(0.5), np.float32(to))) for to in (-2, 2))
    assert (replace(problem, margin=(below, above)).check(exact=True).count < on_it - 100).all()
    assert (replace(problem, margin=(above, below)).check(exact=True).count == on_it).all()


@PATHS
@pytest.mark.parametrize("fp16", [False, True])
def test_wide_rows_of_any_size(fp16: bool, path: Knobs) -> None:
    """Many slices; norms near both ends of fp32, where squares over- and underflow, and below the smallest divisor."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((140, 1030)), rng.integers(9, size=140)
    x *= 10.0 ** rng.choice([-36, -20, -12.5, 0, 30, 36], size=(140, 1))
    LossProblem(x.astype(np.float32), y, margin=(0.01, 0.0), fp16=fp16).check(replace(path, truncated=fp16))


@pytest.mark.parametrize("rectangular", [False, True])
@pytest.mark.parametrize("penalties", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite(bad: float, penalties: bool, rectangular: bool) -> None:
    """Loss and gradients are NaN if a row that takes part is not finite; of rows that do not, none is looked at."""
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((150, 20)).astype(np.float32), rng.integers(3, size=150)
    y[::7] = -1
    x[14] = bad
    path = HOPPER if rectangular else OLDER
    reference: list[Array] = [x[:140].copy(), y[:140].copy()] if rectangular else []
    problem_of((x, y, *reference), margin=(0.9, 0.1)).check(path, penalties=penalties)
    (reference[0] if rectangular else x)[3, 5] = bad
    for margin in ((0.9, 0.1), (-2.0, 2.0)):  # with hard pairs, without
        result = problem_of((x, y, *reference), margin=margin).run(path, penalties=penalties)
        assert np.isnan(result.violation).all()
        assert np.isnan(result.loss)
        for grad, labels in ((result.grad_x, y), (result.grad_ref, y[:140])):
            if grad is not None:
                assert np.isnan(grad[..., labels >= 0, :]).all()
                assert not grad[..., labels < 0, :].any()


@pytest.mark.parametrize("penalties", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_margins_and_weights_that_are_not_finite(bad: float, penalties: bool) -> None:
    """On the device nobody looks at them before: NaN as well, but for rows that take no part."""
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((150, 20)).astype(np.float32), rng.integers(3, size=150)
    y[::7] = -1
    numbers = [((bad, 0.1), (1.0, 1.0)), ((0.9, bad), (1.0, 1.0))]
    if not penalties:
        numbers += [((0.9, 0.1), (bad, 1.0)), ((-2.0, 2.0), (1.0, bad))]
    for margin, weight in numbers:
        problem = LossProblem(x, y, margin=margin, weight=weight)
        result = problem.run(replace(OLDER, on_device=True), penalties=penalties)
        assert np.isnan(result.violation).all()
        assert np.isnan(result.loss)
        assert np.isnan(result.grad_x[..., y >= 0, :]).all()
        assert not result.grad_x[..., y < 0, :].any()


@pytest.mark.parametrize(("n", "m"), [(0, None), (1, None), (0, 5), (5, 0), (0, 0)])
def test_no_pairs(n: int, m: int | None) -> None:
    rng = np.random.default_rng(2)
    sets: list[Array] = []
    for size in (n, m):
        if size is not None:
            sets += [rng.standard_normal((size, 7)).astype(np.float32), np.arange(size)]
    for path in (OLDER, HOPPER):
        result = problem_of(sets).check(path, exact=True)
        assert result.loss == 0
        assert not result.count.any()
        problem_of(sets).check(path, exact=True, penalties=True)


@pytest.mark.parametrize("rectangular", [False, True])
def test_gradients_of_the_penalties(rectangular: bool) -> None:
    """Either's own, also where the other has no hard pair; weights have no part in them, not a bit."""
    y = np.arange(300) % 9
    x = stored(embeddings("groups", y, 70, np.random.default_rng(6)), "fp32")
    sets = (x, y, x[:170], y[:170]) if rectangular else (x, y)
    for margin in ((0.95, 0.3), (-2.0, 0.3), (0.95, 2.0), (2.0, -2.0)):
        problem = problem_of(sets, margin=margin)
        first = problem.check(OLDER, penalties=True)
        again = replace(problem, weight=(0.0, 1e30)).run(OLDER, penalties=True)
        np.testing.assert_array_equal(again.grad_x, first.grad_x)
        np.testing.assert_array_equal(again.grad_ref, first.grad_ref)


@PATHS
@pytest.mark.parametrize("fp16", [False, True])
def test_same_bits(fp16: bool, path: Knobs) -> None:
    """Any order of warps and copies gives the same result to the bit, wherever margins stand; so does a second run."""
    rng = np.random.default_rng(4)
    y = rng.integers(12, size=390)
    sets = (embeddings("groups", y, 70, rng).astype(np.float32), y)
    for problem in (problem_of(sets, fp16=fp16), problem_of((*sets, sets[0][:200], y[:200]), fp16=fp16)):
        problem = replace(problem, margin=(0.95, 0.3), weight=(0.3, 1.7))
        first = problem.run(path)
        for seed in range(3):
            again = problem.run(replace(path, seed=seed, on_device=seed == 2))
            assert again.loss == first.loss
            for name in ("count", "violation", "grad_x", "grad_ref"):
                np.testing.assert_array_equal(getattr(again, name), getattr(first, name))


def test_cut_off_sums_show() -> None:
    """Where tensor cores cut sums off, all similarities of 1 are too small, by no more than the oracle allows."""
    x = np.abs(np.random.default_rng(8).standard_normal((1, 1000))).repeat(130, 0).astype(np.float32)
    problem = LossProblem(x, np.arange(130), margin=(0.0, 0.0), fp16=True)
    for path in (OLDER, HOPPER):
        exact, cut = (problem.check(replace(path, truncated=truncated)) for truncated in (False, True))
        assert 1e-6 < exact.loss - cut.loss < 1000 * 2.0**-26


def test_code_of_another_architecture() -> None:
    """The path of sm_80 in the code that is compiled for Hopper, as with TCM_FUSED_SM=80."""
    y = np.arange(200) % 7
    x = stored(embeddings("classes", y, 40, np.random.default_rng(9)), "bf16")
    LossProblem(x, y, margin=(0.9, 0.2), fp16=True).check(Knobs(sm="80", code="90"))


def test_shipped_sizes_are_those_of_the_sources() -> None:
    """The knobs' defaults are what the launchers have."""
    from ptx_machine import kernels as shipped
    from ptx_machine.build import ROOT

    work = (ROOT / "csrc/cuda/work.h").read_text()
    for name, value in (
        ("kRectangle", shipped.RECTANGLE),
        ("kScreenFrom", shipped.SCREEN_FROM),
        ("kChunk", shipped.CHUNK),
        ("kOneChunk", shipped.ONE_CHUNK),
    ):
        assert f"constexpr int {name} = {value};" in work
