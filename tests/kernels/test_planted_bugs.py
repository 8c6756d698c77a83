"""Bugs put into the CUDA kernels one at a time: each is found, by wrong numbers or by the machine's reports."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from ptx_machine import build
from ptx_machine.kernels import Kernels, Knobs, kernels
from ptx_machine.problems import (
    CountsProblem,
    LossProblem,
    at_the_bound,
    crowd,
    halves_of_tiles,
    problem_of,
    stored,
    upper_halves,
)
from support.batches import embeddings


@dataclass(frozen=True)
class Bug:
    """Text of a kernel's source, which occurs once, and its replacement; the path that has the bug."""

    file: str
    text: str
    replacement: str
    sm: str = "80"

    @property
    def unit(self) -> str:
        """The unit that has to be compiled anew."""
        return "prologue" if "prologue" in self.file else "entry_counts" if "counts" in self.file else "entry_loss"

    @property
    def on_host(self) -> bool:
        return self.file.endswith(".cu")

    def plant(self, root: Path) -> None:
        """A copy of the sources below `root`, with the bug."""
        shutil.copytree(build.ROOT / "csrc", root / "csrc")
        path = root / "csrc/cuda" / self.file
        source = path.read_text()
        assert source.count(self.text) == 1, f"{self.file} has {source.count(self.text)} of {self.text!r}"
        path.write_text(source.replace(self.text, self.replacement))


def hopper(file: str, text: str, replacement: str) -> Bug:
    return Bug(file, text, replacement, "90")


BUGS = {
    # Similarities.
    "similarity: no wait": Bug("similarity.cuh", "      copies_wait<0>();\n", ""),
    "similarity: no barrier": Bug("similarity.cuh", "      __syncthreads();  // the stage is there for all", "//"),
    "similarity: blocks share a partial sum": Bug("tile.cuh", "w.partial[blockIdx.x]", "w.partial[0]"),
    "tile: totals added up early": Bug("tile.cuh", "  barrier_sync<kThreads>(1 + kTeams);", "  "),
    "tile: one warp's total left out": Bug(
        "tile.cuh", "k < kWarps; ++k) penalty +=", "k < kWarps - 1; ++k) penalty +="
    ),
    "tile: rows not marked": Bug("tile.cuh", "mark(w.set[0], tile_i, side, rectangle.number);", ";"),
    "tile: columns not marked": Bug("tile.cuh", "mark(w.set[1], tile_j, side, rectangle.number);", ";"),
    "tile: marked by a store": Bug(
        "tile.cuh",
        "atomicMax(set.marked + side * set.tiles + tile, rectangle);",
        "set.marked[side * set.tiles + tile] = rectangle;",
    ),
    "tile: marks of another side": Bug(
        "masked_sum.cuh", "set.marked[owner.side * set.tiles", "set.marked[0 * set.tiles"
    ),
    "loss: numbers of rectangles that fall": Bug("loss.cu", "i == j, ++number};", "i == j, --number};"),
    "prologue: marks not cleared": Bug("prologue.cuh", "set.marked[k] = 0;", "set.marked[k] |= 0;"),
    "tile: no barrier after counting": Bug("tile.cuh", "if (of.any(found)) {", "if (true) {"),
    "tile: one column too many": Bug(
        "tile.cuh", "mask_range(0, columns - 32 * k)", "mask_range(0, columns + 1 - 32 * k)"
    ),
    "tile: masks read before they are written": Bug("tile.cuh", "  of.sync();  // the masks of pairs are there\n", ""),
    "tile: masks stored before they are written": Bug("tile.cuh", "  of.sync();  // the masks are there\n", ""),
    "tile: count overwritten while it is read": Bug("tile.cuh", "    __syncwarp();  // all have read it\n", ""),
    "tile: counts never cleared": Bug("tile.cuh", "memory.count[k][thread] = 0;", "memory.count[k][thread] |= 0;"),
    "tile: bits of lanes exchanged one way": Bug("tile.cuh", "kept = upper ? ~kLow : kLow;", "kept = kLow;"),
    "tile: bits of the scan in another order": Bug("tile.cuh", "bit % 2 * 2 + bit / 4", "bit % 2 + bit / 4 * 2"),
    "tile: rows' places exchanged once": Bug("tile.cuh", "  own = exchange_places<16, 2, 0x0000cccc>(own);\n", ""),
    "sm90: teams at one barrier": hopper("tile.cuh", "barrier_sync<kSize>(1 + number)", "barrier_sync<kSize>(1)"),
    "sm90: the second team is not told to begin": hopper(
        "similarity_sm90.cuh", "      if (lead > 0 && worker<kColumns>() == 0) barrier_arrive(memory.ahead);\n", ""
    ),
    "sm90: told by every thread": hopper(
        "similarity_sm90.cuh", "&& --lead == 0 && worker<kColumns>() == 0)", "&& --lead == 0)"
    ),
    "sm90: its barrier is not ready": hopper("similarity_sm90.cuh", "    barrier_init(memory.ahead, 1);\n", ""),
    "sm90: teams vote together": hopper(
        "tile.cuh", "barrier_any<kSize>(1 + number, vote)", "barrier_any<kSize>(1, vote)"
    ),
    "sm90: a team's barrier for all": hopper(
        "tile.cuh", "barrier_sync<kThreads>(1 + kTeams)", "barrier_sync<kThreads>(1)"
    ),
    "sm90: records in one place": hopper("tile.cuh", "record[of.number] =", "record[0] ="),
    "sm90: counts of the first team alone": hopper(
        "tile.cuh", "memory.count[k][of.number * kWarps + other]", "memory.count[k][other]"
    ),
    "sm90: totals of the first team alone": hopper(
        "tile.cuh", "memory.total[0][side] + memory.total[1][side]", "memory.total[0][side]"
    ),
    "sm90: columns of the other half": hopper(
        "tile.cuh", "&columns[k][of.number * 2]", "&columns[k][2 - of.number * 2]"
    ),
    "sm90: occupied columns in one place": hopper(
        "tile.cuh", "occupied[4 + of.number * 4 + k / 32]", "occupied[4 + k / 32]"
    ),
    "masked sum: masks that nobody wrote": hopper(
        "masked_sum.cuh", "plus + minus == 0 ? kNoneIn", "plus + minus == 0 ? 0"
    ),
    "masked sum: halves taken for empty": hopper(
        "masked_sum.cuh", "minus == kPairs ? kAllIn : 0", "minus == kPairs ? kNoneIn : 0"
    ),
    "masked sum: halves of a column mixed up": hopper(
        "masked_sum.cuh", "kTransposed ? k : row / kHalf", "kTransposed ? 1 - k : row / kHalf"
    ),
    "masked sum: halves of a row mixed up": hopper(
        "masked_sum.cuh", "kTransposed ? k : row / kHalf", "kTransposed ? k : 1 - row / kHalf"
    ),
    "masked sum: occupied rows of an empty half": hopper(
        "masked_sum.cuh", "item >> 2 * (word / 2) & kNoneIn ? 0 : of[0]", "of[0]"
    ),
    "masked sum: occupied columns of one half": hopper("masked_sum.cuh", "| (item >> 2 & kNoneIn ? 0 : of[8])", ""),
    "sm90: columns' bytes exchanged": hopper("tile.cuh", "bytes[warp % 2 + 2]", "bytes[3 - warp % 2]"),
    "sm90: the second tile's labels are the first's": hopper(
        "tile.cuh", "left = (tile_j + tile) * kTile;", "left = tile_j * kTile;"
    ),
    "sm90: labels of the pair before": hopper(
        "similarity_sm90.cuh",
        "prepare<kColumns>(w, memory.tile, order.i, order.j)",
        "prepare<kColumns>(w, memory.tile, order.i, order.j + 2)",
    ),
    "sm90: copies not waited for": hopper(
        "similarity_sm90.cuh", "        barrier_wait(memory.full[ring.stage], ring.parity);\n", ""
    ),
    "sm90: stage overwritten": hopper(
        "similarity_sm90.cuh", "        barrier_wait(memory.empty[ring.stage], ring.parity ^ 1);\n", ""
    ),
    "sm90: products not waited for": hopper("similarity_sm90.cuh", "      warpgroup_finish(s);\n", ""),
    "sm90: stage given back too early": hopper("similarity_sm90.cuh", "warpgroup_wait<1>();", "warpgroup_wait<2>();"),
    "sm90: one arrival missing": hopper(
        "similarity_sm90.cuh", "memory.empty[k], kWarps)", "memory.empty[k], kWarps + 1)"
    ),
    "sm90: fewer bytes expected": hopper(
        "similarity_sm90.cuh", "sizeof memory.stage[0])", "sizeof memory.stage[0] / 3)"
    ),
    "sm90: barriers not shown to the copy engine": hopper("similarity_sm90.cuh", "    barriers_ready();\n", ""),
    # The screen.
    "screen: one term of the bound left out": Bug("loss.cu", "screen_bound(w.width)}", "screen_bound(w.width) / 2}"),
    "screen: margin of negatives raised": Bug(
        "screen.cuh", "__fadd_rd(memory.margin[kMinus], -bound)", "__fadd_rd(memory.margin[kMinus], bound)"
    ),
    "screen: margin of positives as it is": Bug(
        "screen.cuh", "-__fadd_rd(-memory.margin[kPlus], -bound)", "memory.margin[kPlus]"
    ),
    "screen: first tile forgotten": Bug(
        "screen.cuh",
        "scan_tile<kHeld>(memory, s[k], k, true, 0, hard) != 0 || found",
        "scan_tile<kHeld>(memory, s[k], k, true, 0, hard) != 0",
        "90",
    ),
    "screen: no vote": Bug("screen.cuh", "    found = of.any(found);\n", "    of.sync();\n"),
    "screen: places in another order": Bug("work.h", "return j0 + place / kGroup % (j1 - j0);", "return j0;"),
    "screen: a bit by a store": Bug(
        "screen.cuh",
        "atomicOr(w.undecided + place / 32, 1u << place % 32)",
        "w.undecided[place / 32] |= 1u << place % 32",
    ),
    "screen: others left decided": Bug(
        "similarity.cuh", "if (thread == 0 && more) visitor.leave", "if (false) visitor.leave"
    ),
    "list: bits stay": Bug("screen.cuh", "    w.undecided[k] = 0;\n", ""),
    "list: bits not cleared at first": Bug("prologue.cuh", "w.undecided[k] = 0;", "w.undecided[k] |= 0;"),
    "list: read early": Bug("screen.cuh", "  __syncthreads();\n  place -= mine;", "  place -= mine;"),
    "list: other warps' tiles overwritten": Bug(
        "screen.cuh", "k < warp; ++k) place += of_warp[k];", "k < 0; ++k) place += 0;"
    ),
    "list: too short": Bug("screen.cuh", "*w.listed_size = place;", "*w.listed_size = place - (place > 0);"),
    "list: not worked": Bug("screen.cuh", "if (number >= *w.listed_size)", "if (number >= 0)"),
    "sm90: screen: others left decided": hopper(
        "similarity_sm90.cuh", "if (worker<kColumns>() == 0 && order.next()) visitor.leave", "if (false) visitor.leave"
    ),
    "sm90: screen: the next tile left decided": hopper(
        "similarity_sm90.cuh", "order.next()) visitor.leave", "order.next() && order.next()) visitor.leave"
    ),
    "sm90: screen: verdict read early": hopper("similarity_sm90.cuh", "  barrier_wait(memory.tried, 0);\n", ""),
    "sm90: screen: no verdict": hopper(
        "similarity_sm90.cuh", "trial.failed(), barrier_arrive(memory.tried);", "trial.failed();"
    ),
    "sm90: screen: verdict's barrier is not ready": hopper(
        "similarity_sm90.cuh", "    barrier_init(memory.tried, 1);\n", ""
    ),
    "sm90: screen: copies go on": hopper(
        "similarity_sm90.cuh",
        "number++ == Trial::kTiles && trial_failed(memory)",
        "number++ < 0 && trial_failed(memory)",
    ),
    "sm90: screen: the teams' own verdicts": hopper(
        "similarity_sm90.cuh", "worker<kColumns>() < 128 ? trial.failed() : trial_failed(memory)", "trial.failed()"
    ),
    # Masked sums.
    "masked sum: no wait": Bug("masked_sum.cuh", "    copies_wait<0>();\n    if constexpr", "    if constexpr"),
    "masked sum: products not waited for": hopper("masked_sum.cuh", "  warpgroup_finish(products.sum);\n", ""),
    "masked sum: no barrier": Bug("masked_sum.cuh", "    __syncthreads();  // the stage is there for all", "//"),
    "masked sum: queue read early": Bug("masked_sum.cuh", "    __syncwarp();  // the queue is written", "//"),
    "masked sum: queue written early": Bug("masked_sum.cuh", "    __syncwarp();  // the queue has been read", "//"),
    "masked sum: marked too early": Bug("masked_sum.cuh", "  __syncthreads();  // all have read it", "//"),
    "masked sum: too little shared memory": Bug("loss.cu", "sizeof(MaskedSumMemory)", "sizeof(MaskedSumMemory) - 16"),
    "masked sum: sides mixed up": Bug("masked_sum.cuh", "side == kPlus ? 0 : ~0u", "side == kPlus ? ~0u : 0"),
    "masked sum: full tiles left out": Bug("masked_sum.cuh", "k < memory.size[kFull]; k += 2", "k < 0; k += 2"),
    "masked sum: half of the full tiles": Bug("masked_sum.cuh", "int k = half; k <", "int k = 2 * half; k <"),
    "masked sum: mixed tiles left out": Bug("masked_sum.cuh", "if (memory.size[kMixed] > 0)", "if (false)"),
    "masked sum: sparse tiles left out": Bug("masked_sum.cuh", "if (memory.size[kFew] > 0)", "if (false)"),
    "masked sum: G overwritten": Bug("masked_sum.cuh", "const bool add = *touched != 0;", "const bool add = false;"),
    # The machine's operations.
    "ptx: matrices not transposed": Bug("ptx.cuh", "m8n8.x4.trans.shared", "m8n8.x4.shared"),
    "ptx: registers of a exchanged": Bug("ptx.cuh", "{%4,%5,%6,%7}", "{%5,%4,%6,%7}"),
    "ptx: barrier of too few": Bug("ptx.cuh", '::"r"(number), "n"(kThreads)', '::"r"(number), "n"(kThreads / 2)'),
    "ptx: b read along the other dimension": hopper("ptx_sm90.cuh", "%68, 1, 1, 1, 1;", "%68, 1, 1, 1, 0;"),
    "ptx: swizzle of 64 bytes": hopper(
        "ptx_sm90.cuh",
        "uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 |\n         uint64_t{1} << 62",
        "uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 |\n         uint64_t{2} << 62",
    ),
    "ptx: half the stride": hopper(
        "ptx_sm90.cuh", "uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32", "uint64_t{1} << 16 | uint64_t{512 >> 4} << 32"
    ),
    "ptx: half the leading offset": hopper("ptx_sm90.cuh", "uint64_t{(128 * 128) >> 4} << 16", "uint64_t{512} << 16"),
    "ptx: accumulators in another order": hopper("ptx_sm90.cuh", '"%0, %1, %2,', '"%1, %0, %2,'),
    "ptx: no fence before products": hopper("ptx_sm90.cuh", '"wgmma.fence.sync.aligned;"', '""'),
    "ptx: no fence between the proxies": hopper(
        "ptx_sm90.cuh",
        'void writes_to_products() { asm volatile("fence.proxy.async.shared::cta;"',
        'void writes_to_products() { asm volatile(""',
    ),
    # Before and after.
    "prologue: a label before itself": Bug("prologue.cuh", "other == mine && j < i", "other == mine && j <= i"),
    "prologue: unstable merge": Bug("prologue.cuh", "|| (second && label[half] == mine)", ""),
    "prologue: threads gone before a barrier": Bug(
        "prologue.cuh",
        "+ pair] = sum;\n  __syncthreads();\n",
        "+ pair] = sum;\n  if (group != 0) return;\n  __syncthreads();\n",
    ),
    "epilogue: one row too many": Bug("epilogue.cuh", "k < set.n;", "k <= set.n;"),
    "epilogue: penalties exchanged": Bug("epilogue.cuh", "blockIdx.z == kPlus ?", "blockIdx.z != kPlus ?"),
    "epilogue: penalties in one place": Bug("epilogue.cuh", "blockIdx.z * set.n + ", ""),
    # Counts.
    "window: not cleared": Bug("counts.cuh", "window_of(memory)[k] = 0;", "window_of(memory)[k] |= 0;"),
    "window: carry lost": Bug("counts.cuh", "to_place + place, kCarry);", "to_place + place, 0);"),
    "window: read early": Bug(
        "counts.cuh", "    barrier_sync<kThreads>(1);\n    for (int k = worker", "    for (int k = worker"
    ),
    "window: too little shared memory": Bug(
        "counts.cu", "used + int64_t{counter.window} * 2", "used + int64_t{counter.window} * 2 - 4"
    ),
    "queue: read early": Bug("counts.cuh", "    __syncwarp();  // they are written\n", ""),
    "queue: written early": Bug("counts.cuh", "    __syncwarp();  // and read\n", ""),
    "queue: too short": Bug("counts.cuh", "kQueue = (kBatch + 1) * 32 - 1;", "kQueue = kBatch * 32;"),
    "classes: threshold not included": Bug("counts.cuh", "threshold[middle] <= value", "threshold[middle] < value"),
    "classes: only the row's": Bug(
        "counts.cuh", "if (at.side == kMinus) add(class_count", "if (column < 0) add(class_count"
    ),
    "tiles: pairs twice": Bug("counts.cuh", "note_pairs<true>(", "note_pairs<false>("),
    "two sets: classes of the rows": Bug("counts.cuh", "column = table[1][", "column = table[0]["),
    "two sets: largest of the rows": Bug("counts.cuh", "raise(best[1]", "raise(best[0]"),
    "best: raised by a store": Bug("counts.cuh", "atomicMax(best, key);", "*best = key;"),
}


@cache
def losses() -> list[tuple[LossProblem, Knobs, bool]]:
    """All kinds of tiles, all forms, runs to merge; the last: the gradients are those of the penalties."""
    rng = np.random.default_rng(20)
    y = rng.integers(5, size=400)
    x = embeddings("groups", y, 150, rng)
    x[y == 0] = rng.standard_normal((np.count_nonzero(y == 0), 150))
    y[::9] = -1
    whole = LossProblem(stored(x, "fp32"), y)
    small = Knobs(rectangle=2, sm_count=2, chunk=32, one_chunk=0)
    part = problem_of((stored(x[50:250], "fp16"), y[50:250], stored(x, "fp16"), y), row_offset=50, fp16=True)
    alike = LossProblem(stored(embeddings("cone", np.zeros(600, dtype=int), 40, rng), "fp16"), y=np.arange(600) % 3)
    five = LossProblem(stored(embeddings("groups", np.arange(520) % 9, 20, rng), "fp32"), np.arange(520) % 9)
    one, screen = Knobs(sm_count=1, screen_from=0), Knobs(rectangle=2, sm_count=2, screen_from=0)
    return [
        *((at_the_bound(side, 1e-5), one, False) for side in (0, 1)),
        (replace(at_the_bound(0, 1e-5), y=np.arange(512) // 128), one, False),
        *((five.at_share(share), knobs, False) for share in (0.5, 0.004) for knobs in (one, screen)),
        (upper_halves(), one, False),
        (whole.at_share(0.5), small, False),
        (part.at_share(0.5), small, True),
        (whole.at_share(0.004), small, False),
        (replace(alike, margin=(2.0, -2.0), fp16=True), Knobs(), False),
        (crowd(1100), Knobs(), False),
        *((halves_of_tiles(upper, lower), Knobs(), False) for upper, lower in (("all", "some"), ("none", "some"))),
        (halves_of_tiles("few", "none"), Knobs(), False),
        (halves_of_tiles("none", "few"), Knobs(), False),
    ]


@cache
def counted() -> list[tuple[CountsProblem, Knobs]]:
    rng = np.random.default_rng(21)
    y = rng.integers(12, size=300)
    x = embeddings("groups", y, 70, rng).astype(np.float32)
    t = np.linspace(-0.2, 1, 30, dtype=np.float32)
    one_cell = CountsProblem(
        np.ones((450, 4), dtype=np.float32), np.arange(450), 3, np.array([0.5, 1.0], dtype=np.float32), 4, exact=True
    )
    problem = CountsProblem(x, y, 8, t, 10)
    small = Knobs(window=64, sm_count=2)
    return [(one_cell, Knobs(sm_count=1)), (problem, small), (problem.divided(rng), small)]


def search(bug: Bug, code: str, on: Kernels | None = None) -> None:
    """Runs problems until one fails."""
    if bug.unit == "entry_counts":
        for problem, knobs in counted():
            problem.check_on(replace(knobs, sm=bug.sm, code=code), on=on)
    else:
        for loss, knobs, penalties in losses():
            loss.check(replace(knobs, sm=bug.sm, code=code), penalties=penalties, on=on)


@contextmanager
def planted(bug: Bug, root: Path) -> Iterator[str]:
    """The name of the code with the bug, planted below `root`, while the machine has it."""
    machine, code = kernels().machine, f"{bug.sm} with a bug"
    files = [build.ptx(unit, bug.sm, root if unit == bug.unit else build.ROOT) for unit in build.UNITS]
    machine.load_files(code, files)
    try:
        yield code
    finally:
        machine.unload(code.encode())


@pytest.fixture(scope="module")
def roots(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sources with each bug that this run asks for, and their PTX made, two at a time."""
    kernels()
    tests = [item for item in request.session.items if isinstance(item, pytest.Function)]
    asked = {test.callspec.params.get("name") for test in tests if hasattr(test, "callspec")}
    found = {name: tmp_path_factory.mktemp("bug") for name in BUGS if name in asked}

    def make(name: str) -> None:
        bug = BUGS[name]
        bug.plant(found[name])
        if bug.on_host:
            build.host_object(bug.unit, found[name])
        else:
            build.ptx(bug.unit, bug.sm, found[name])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(make, found))
    return found


@pytest.mark.parametrize("sm", ["80", "90"])
@pytest.mark.parametrize("file", ["loss.cu", "counts.cu"])
def test_nothing_is_found_without_a_bug(file: str, sm: str) -> None:
    search(Bug(file, "", "", sm), "")


@pytest.mark.parametrize("sm", ["80", "90"])
def test_tiles_that_the_screen_decides_are_not_worked_again(sm: str, tmp_path: Path) -> None:
    """With its list left unread, hard pairs are missed in tiles that it leaves; far from the margins there are none."""
    bug = replace(BUGS["list: not worked"], sm=sm)
    bug.plant(tmp_path)
    y = np.arange(600) % 40
    problem = LossProblem(stored(embeddings("classes", y, 200, np.random.default_rng(25)), "fp32"), y)
    plain, knobs = replace(problem, y=np.arange(600), margin=(0.0, 1.01)), Knobs(sm=sm, screen_from=0)
    with planted(bug, tmp_path) as code:
        plain.check(replace(knobs, code=code))
        with pytest.raises(AssertionError):
            problem.at_share(1e-3).check(replace(knobs, code=code))


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_found(name: str, roots: dict[str, Path]) -> None:
    bug = BUGS[name]
    if bug.on_host:
        with pytest.raises(AssertionError):
            search(bug, "", Kernels(build.ROOT, (bug.sm,), {bug.unit: roots[name]}))
        return
    with planted(bug, roots[name]) as code, pytest.raises(AssertionError):
        search(bug, code)
