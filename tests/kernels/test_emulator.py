"""The CUDA kernels on a CPU: the same source, compiled with g++ and run thread by thread (tests/kernels/emulator).

They are held to the oracle. With fp16=True the kernels round x^ to halves and are exact from there on: so does the
oracle, and the comparison is as tight as in fp32.
"""

import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.batches import KINDS, dyadic, embeddings, margins
from support.oracle import Array, Oracle, Result, compare, compare_sides

ROOT = Path(__file__).parents[2]
PARTS = ("csrc/cuda", "tests/kernels/emulator")
SIZES = (1, 2, 31, 127, 128, 129, 200, 256, 257, 300)  # around one, two and three tiles
WIDTHS = (1, 3, 33, 64, 65, 130, 200)  # around the depth of a step and the width of a slice
SCHEDULES = ("in order", "greedy", "backward", "shuffled")
FORMATS = ("fp32", "fp32 in fp16", "fp16", "fp16 in fp32", "bf16")  # of x, and where it is not the obvious one, of x^


# Building.


def build(source: str, flags: str, *, suffix: str = "", root: Path = ROOT) -> Path:
    """Compiles one of the emulator, once for each content of the sources: build/emulator keeps the result."""
    compiler = os.environ.get("CXX", "g++")
    digest = hashlib.sha256(f"{compiler} {source} {flags}".encode())
    for part in PARTS:
        for path in sorted((root / part).iterdir()):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    target = ROOT / "build" / "emulator" / f"{Path(source).stem}-{digest.hexdigest()[:16]}{suffix}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        new = target.with_name(f"{os.getpid()}-{target.name}")
        command = [
            compiler,
            "-std=c++20",
            "-Wall",
            "-Wextra",
            "-Wno-unknown-pragmas",
            "-I",
            str(root / "tests/kernels/emulator"),
        ]
        done = subprocess.run(
            [*command, *flags.split(), "-x", "c++", str(root / "tests/kernels/emulator" / source), "-o", str(new)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr, done.stderr
        new.rename(target)
    return target


@cache
def emulated(source: str = "module.cpp", name: str = "tcm_emulated") -> Any:
    """The module `name` of emulated kernels, bound in `source`: the loss's, if nothing else is said."""
    pybind11 = pytest.importorskip("pybind11", reason="the emulated kernels are bound with pybind11")
    include = f"-I {pybind11.get_include()} -I {sysconfig.get_paths()['include']}"
    path = build(source, f"-O3 -fPIC -shared -fvisibility=hidden {include}", suffix=".so")
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


# Calling.


@dataclass(frozen=True)
class Call:
    """One problem: embeddings in the format that the kernels get."""

    x: Array
    y: Array
    ref_x: Array | None = None
    ref_y: Array | None = None
    row_offset: int | None = None
    margin: tuple[float, float] = (0.9, 0.5)
    weight: tuple[float, float] = (1.0, 1.0)
    fp16: bool = False

    def run(self, *, per_side: bool = False, grad_x: bool = True, grad_ref: bool = True, **knobs: Any) -> Result:
        loss, dx, dref, penalty, count = emulated().tcm_loss(
            x=self.x,
            y=self.y,
            ref_x=self.ref_x,
            ref_y=self.ref_y,
            row_offset=self.row_offset,
            margin=self.margin,
            lambda_=self.weight,
            fp16=self.fp16,
            per_side=per_side,
            grad_x=grad_x,
            grad_ref=grad_ref and self.ref_x is not None,
            **knobs,
        )
        counts = np.array(count, dtype=np.int64)
        return Result(loss, counts, np.array(penalty) / np.maximum(counts, 1), dx, dref)

    def oracle(self) -> Oracle:
        reference = () if self.ref_x is None else (values(self.ref_x), self.ref_y)
        oracle = Oracle(
            values(self.x),
            self.y,
            *reference,
            row_offset=self.row_offset,
            margin_plus=float(np.float32(self.margin[0])),
            margin_minus=float(np.float32(self.margin[1])),
            lambda_plus=self.weight[0],
            lambda_minus=self.weight[1],
        )
        if self.fp16:
            oracle.x_hat, oracle.ref_hat = (
                a.astype(np.float16).astype(np.float64) for a in (oracle.x_hat, oracle.ref_hat)
            )
            oracle.s = oracle.x_hat @ oracle.ref_hat.T
            oracle.gap = (oracle.margin[0] - oracle.s, oracle.s - oracle.margin[1])
        return oracle

    def check(self, *, exact: bool = False, per_side: bool = False, **options: Any) -> Result:
        result = self.run(per_side=per_side, **options)
        (compare_sides if per_side else compare)(result, self.oracle(), torch.float32, exact=exact)
        return result


def call_of(sets: Sequence[Array], **options: Any) -> Call:
    """x, y and perhaps ref_x, ref_y."""
    x, y, *reference = sets
    ref_x, ref_y = reference or (None, None)
    return Call(x=x, y=y, ref_x=ref_x, ref_y=ref_y, **options)


def values(x: Array) -> Array:
    """Embeddings in fp64; bfloat16 comes as its bits."""
    return (
        (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        if x.dtype == np.uint16
        else x.astype(np.float64)
    )


def stored(x: Array, form: str) -> Array:
    """fp64 embeddings in one of FORMATS."""
    if form.startswith("bf16"):
        return torch.from_numpy(x).to(torch.bfloat16).view(torch.uint16).numpy()
    return x.astype(np.float16 if form.startswith("fp16") else np.float32)


def one_product(form: str) -> bool:
    return form not in ("fp32", "fp16 in fp32")


# Against the oracle.


@st.composite
def calls(draw: st.DrawFn) -> Call:
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
    call = call_of(sets, row_offset=offset, weight=(draw(weight), draw(weight)), fp16=one_product(number_format))
    if draw(st.booleans()):
        share = margins(call.oracle(), draw(st.sampled_from([0.0, 0.001, 0.02, 0.5, 0.98, 1.0])))
        margin = (share["margin_plus"], share["margin_minus"])
    else:
        number = st.floats(-2, 2, allow_subnormal=False)
        margin = (draw(number), draw(number))
    return call_of(sets, row_offset=offset, weight=call.weight, fp16=call.fp16, margin=margin)


knobs = st.fixed_dictionaries(
    {
        "schedule": st.sampled_from(SCHEDULES),
        "seed": st.integers(0, 1000),
        "sm": st.sampled_from([80, 90, 100]),  # the path: by mma.sync, or on 90 by warpgroups
        "sm_count": st.integers(1, 9),
        "block": st.sampled_from([1, 2, 192]),  # tiles a side
        "one_chunk": st.sampled_from([0, 4096]),  # sorted in one go
        "chunk": st.sampled_from([32, 96]),  # else merged from
        "per_side": st.booleans(),
        "grad_x": st.sampled_from([True, True, False]),
        "grad_ref": st.sampled_from([True, True, False]),
    }
)


@settings(max_examples=100)
@given(call=calls(), options=knobs)
def test_random_batches(call: Call, options: dict[str, Any]) -> None:
    """Every form, geometry and format, in few and in many blocks of tiles, in every order of threads."""
    call.check(**options)


@pytest.mark.parametrize("form", ["fp32", "fp16"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999, 1.0])
@pytest.mark.parametrize(("kind", "classes"), [("random", 3), ("groups", 6), ("groups", 300)])
def test_classes_of_tiles(kind: str, classes: int, share: float, form: str) -> None:
    """700 rows, 6 tiles a side: empty, sparse, mixed and full ones, of one side and of both; one block and nine."""
    rng = np.random.default_rng(classes)
    y = rng.integers(classes, size=700)
    call = Call(stored(embeddings(kind, y, 20, rng), form), y, fp16=one_product(form))
    margin = margins(call.oracle(), share)
    call = Call(call.x, y, fp16=call.fp16, margin=(margin["margin_plus"], margin["margin_minus"]))
    call.check(block=2, sm_count=4)
    call.check(block=4, sm=90)
    Call(call.x, y, call.x[:400], y[:400], fp16=call.fp16, margin=call.margin).check(block=192)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("rectangular", [False, True])
def test_similarities_on_the_margin(form: str, rectangular: bool) -> None:
    """Multiples of 1/4 against margins that are too: both inequalities are inclusive, for zero rows as well."""
    rng = np.random.default_rng(3)
    sets = [stored(dyadic(180, 70, rng), form), rng.integers(4, size=180)]
    if rectangular:
        sets += [stored(dyadic(150, 70, rng), form), rng.integers(4, size=150)]
    for margin in [(0.5, 0.25), (0.0, 0.0), (1.0, -1.0), (-1.0, 1.0)]:
        for sm in (80, 90):
            call_of(sets, margin=margin, fp16=one_product(form)).check(exact=True, sm=sm, per_side=sm == 90)


def test_margin_next_to_the_similarity() -> None:
    """One fp32 step away from it, all pairs on the margin change sides."""
    rng = np.random.default_rng(5)
    x, y = stored(dyadic(150, 16, rng), "fp32"), rng.integers(3, size=150)
    on_it = Call(x, y, margin=(0.5, 0.5)).check(exact=True).count
    below, above = (float(np.nextafter(np.float32(0.5), np.float32(to))) for to in (-2, 2))
    assert (Call(x, y, margin=(below, above)).check(exact=True).count < on_it - 100).all()
    assert (Call(x, y, margin=(above, below)).check(exact=True).count == on_it).all()


@pytest.mark.parametrize("fp16", [False, True])
def test_wide_rows_of_any_size(fp16: bool) -> None:
    """Many slices; norms near both ends of fp32, where squares over- and underflow, and below the smallest divisor."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((140, 1030)), rng.integers(9, size=140)
    x *= 10.0 ** rng.choice([-36, -20, -12.5, 0, 30, 36], size=(140, 1))
    for sm in (80, 90):
        Call(x.astype(np.float32), y, margin=(0.01, 0.0), fp16=fp16).check(sm=sm)


@pytest.mark.parametrize("rectangular", [False, True])
@pytest.mark.parametrize("per_side", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite(bad: float, per_side: bool, rectangular: bool) -> None:
    """Loss and gradients are NaN if a row that takes part is not finite; of rows that do not, none is looked at."""
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((150, 20)).astype(np.float32), rng.integers(3, size=150)
    y[::7] = -1
    x[14] = bad
    reference: list[Array] = [x[:140].copy(), y[:140].copy()] if rectangular else []
    call_of((x, y, *reference), margin=(0.9, 0.1)).check(per_side=per_side)
    (reference[0] if rectangular else x)[3, 5] = bad
    for margin in ((0.9, 0.1), (-2.0, 2.0)):  # with hard pairs, without
        result = call_of((x, y, *reference), margin=margin).run(per_side=per_side)
        assert np.isnan(result.violation).all()
        assert per_side or np.isnan(result.loss)
        for grad, labels in ((result.grad_x, y), (result.grad_ref, y[:140])):
            if grad is not None:
                assert np.isnan(grad[..., labels >= 0, :]).all()
                assert not grad[..., labels < 0, :].any()


@pytest.mark.parametrize(("n", "m"), [(0, None), (1, None), (0, 5), (5, 0), (0, 0)])
def test_no_pairs(n: int, m: int | None) -> None:
    rng = np.random.default_rng(2)
    sets: list[Array] = []
    for size in (n, m):
        if size is not None:
            sets += [rng.standard_normal((size, 7)).astype(np.float32), np.arange(size)]
    result = call_of(sets).check(exact=True)
    assert result.loss == 0
    assert not result.count.any()
    call_of(sets).check(exact=True, per_side=True)


@pytest.mark.parametrize("rectangular", [False, True])
def test_gradients_of_the_penalties(rectangular: bool) -> None:
    """Either's own, also where the other has no hard pair; lambda has no part in them, not a bit."""
    y = np.arange(300) % 9
    x = stored(embeddings("groups", y, 70, np.random.default_rng(6)), "fp32")
    sets = (x, y, x[:170], y[:170]) if rectangular else (x, y)
    for margin in ((0.95, 0.3), (-2.0, 0.3), (0.95, 2.0), (2.0, -2.0)):
        first = call_of(sets, margin=margin).check(per_side=True)
        for weight in ((0.0, 1e30), (7.0, 0.0)):
            again = call_of(sets, margin=margin, weight=weight).run(per_side=True)
            np.testing.assert_array_equal(again.grad_x, first.grad_x)
            np.testing.assert_array_equal(again.grad_ref, first.grad_ref)


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("fp16", [False, True])
def test_same_bits(fp16: bool, sm: int) -> None:
    """Any order of threads gives the same result to the bit, and so does a second run."""
    rng = np.random.default_rng(4)
    y = rng.integers(12, size=420)
    sets = (embeddings("groups", y, 70, rng).astype(np.float32), y)
    for call in (
        call_of(sets, fp16=fp16, margin=(0.95, 0.3)),
        call_of((*sets, sets[0][:200], y[:200]), fp16=fp16, margin=(0.95, 0.3)),
    ):
        first = call.run(sm=sm)
        for seed, schedule in enumerate((*SCHEDULES, "shuffled")):
            again = call.run(sm=sm, schedule=schedule, seed=seed)
            assert again.loss == first.loss
            for name in ("count", "violation", "grad_x", "grad_ref"):
                np.testing.assert_array_equal(getattr(again, name), getattr(first, name))


# Under the sanitizers.

SANITIZERS = {
    "asan-ubsan": "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all",
    "tsan": "-O1 -g -fsanitize=thread",
}


def run_alone(program: Path, cases: int) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([str(program), str(cases)], capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.parametrize(("sanitizer", "cases"), [("asan-ubsan", 25), ("tsan", 12)])
def test_sanitizers(sanitizer: str, cases: int) -> None:
    """Random problems agree with a double loop, and no sanitizer speaks."""
    done = run_alone(build("main.cpp", SANITIZERS[sanitizer]), cases)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    assert f"{cases} cases agree" in done.stdout


FINDERS = {"none": "-O1", "asan": "-O0 -fsanitize=address", "tsan": "-O1 -fsanitize=thread"}  # fast to compile


@dataclass(frozen=True)
class Bug:
    """A line of a kernel and what it is replaced with; the sanitizer that is to find it, or none is needed."""

    file: str
    line: str
    replacement: str
    found_by: str = "none"


BUGS = {
    "similarity: no wait": Bug("similarity.cuh", "      copies_wait<0>();\n", ""),
    "similarity: no barrier": Bug(
        "similarity.cuh", "      __syncthreads();  // the stage is there for all", "//", "tsan"
    ),
    "similarity: blocks share a partial sum": Bug("tile.cuh", "w.partial[blockIdx.x]", "w.partial[0]", "tsan"),
    "tile: no barrier after counting": Bug("tile.cuh", "if (!workers_any(both != 0)) {\n", "if (false) {\n", "tsan"),
    "tile: one column too many": Bug("tile.cuh", "valid ? columns - 32 * k : 0", "valid ? columns + 1 - 32 * k : 0"),
    "sm90: copies not waited for": Bug(
        "similarity_sm90.cuh", "        barrier_wait(memory.full[ring.stage], ring.parity);\n", ""
    ),
    "sm90: stage overwritten": Bug(
        "similarity_sm90.cuh", "        barrier_wait(memory.empty[ring.stage], ring.parity ^ 1);\n", "", "tsan"
    ),
    "sm90: products not waited for": Bug("similarity_sm90.cuh", "      warpgroup_wait<0>();\n", ""),
    "sm90: stage given back too early": Bug(
        "similarity_sm90.cuh", "warpgroup_wait<1>();", "warpgroup_wait<2>();", "tsan"
    ),
    "sm90: one arrival missing": Bug("similarity_sm90.cuh", "memory.empty[k], kWarps)", "memory.empty[k], kWarps + 1)"),
    "masked sum: no wait": Bug("masked_sum.cuh", "    copies_wait<0>();\n    if constexpr", "    if constexpr"),
    "masked sum: products not waited for": Bug("masked_sum.cuh", "  warpgroup_wait<0>();\n", ""),
    "masked sum: no barrier": Bug(
        "masked_sum.cuh", "    __syncthreads();  // the stage is there for all", "//", "tsan"
    ),
    "masked sum: queue read early": Bug("masked_sum.cuh", "    __syncwarp();  // the queue is written", "//", "tsan"),
    "masked sum: marked too early": Bug("masked_sum.cuh", "  __syncthreads();  // all have read it", "//", "tsan"),
    "masked sum: too little shared memory": Bug(
        "tcm_loss.cu", "sizeof(MaskedSumMemory)", "sizeof(MaskedSumMemory) - 16", "asan"
    ),
    "masked sum: sides mixed up": Bug("masked_sum.cuh", "side == kPlus ? 0 : ~0u", "side == kPlus ? ~0u : 0"),
    "prologue: a label before itself": Bug("prologue.cuh", "other == mine && j < i", "other == mine && j <= i", "asan"),
    "prologue: unstable merge": Bug("prologue.cuh", "|| (second && label[half] == mine)", "", "asan"),
    "prologue: threads gone before a barrier": Bug(
        "prologue.cuh",
        "+ pair] = sum;\n  __syncthreads();\n",
        "+ pair] = sum;\n  if (group != 0) return;\n  __syncthreads();\n",
    ),
    "epilogue: one row too many": Bug("epilogue.cuh", "k < set.n;", "k <= set.n;", "asan"),
    "epilogue: penalties exchanged": Bug("epilogue.cuh", "blockIdx.z == kPlus ?", "blockIdx.z != kPlus ?"),
    "epilogue: penalties in one place": Bug("epilogue.cuh", "blockIdx.z * set.n + ", ""),
}


def build_bugs(bugs: dict[str, Bug], program: str, factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A program for each bug, two compilations at a time."""

    def compiled(name: str, root: Path) -> Path:
        bug = bugs[name]
        for part in PARTS:
            shutil.copytree(ROOT / part, root / part)
        path = root / "csrc/cuda" / bug.file
        source = path.read_text()
        assert source.count(bug.line) == 1, f"{bug.file} has {source.count(bug.line)} of {bug.line!r}"
        path.write_text(source.replace(bug.line, bug.replacement))
        return build(program, FINDERS[bug.found_by], root=root)

    roots = [factory.mktemp("bug") for _ in bugs]  # here: two threads would make pytest's folder twice
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(bugs, pool.map(compiled, bugs, roots), strict=True))


def assert_found(bug: Bug, program: Path) -> None:
    """The program fails, in the way it should."""
    done = run_alone(program, 40)
    assert done.returncode != 0
    said = {"none": done.stdout, "asan": "AddressSanitizer", "tsan": "ThreadSanitizer: data race"}[bug.found_by]
    assert said, "nothing said"
    assert said in done.stdout + done.stderr


@pytest.fixture(scope="module")
def buggy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build_bugs(BUGS, "main.cpp", tmp_path_factory)


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_found(name: str, buggy: dict[str, Path]) -> None:
    """The same program as in `test_sanitizers` fails, in the way it should, once the kernel has a bug."""
    assert_found(BUGS[name], buggy[name])
