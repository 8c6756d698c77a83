"""`python -m benchmarks.speed.cycles`: time of the loss on an H100 and an A100, predicted; writes csrc/cuda/cycles.md.

A model, not a measurement: no GPU is used. The machine code of the kernels goes, phase by phase, through a model of a
multiprocessor's scheduler (`benchmarks/speed/sass.py`), and the cycles are put beside those that the tensor cores need
for the product. A test shows when a prediction gets worse by 3 %.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.speed.ptxas import ROOT
from benchmarks.speed.sass import Instruction, cycles_of, disassemble, nvdisasm, pipe_cycles

TABLE = ROOT / "csrc/cuda/cycles.md"
WIDTHS = (64, 128, 256, 512, 768, 1024, 2048)
HARD = ("few", "all", "half")
# A tile's functions in the order in which they run, and which of them run where few, all or half of the pairs are hard.
PHASES = {
    "few": ("largest", "examine"),
    "all": ("examine", "scan", "scan_tile", "count_of_warp", "keep_tiles", "write_record", "mark"),
}
PHASES["half"] = (*PHASES["all"], "write_masks", "mask_of_rows", "mask_of_columns", "store_masks")
HIDDEN = ("note_pairs",)  # on Hopper, while the last products are under way
SCREEN = ("largest", "visit")  # of a tile that the screen decides
LISTED = {*PHASES["few"], *PHASES["half"], *HIDDEN, *SCREEN, "write_pairs"}
STEP = 64  # columns of x^ in one step of a product
L2 = 5120  # bytes a cycle of the whole cache, as NVIDIA says of GA100; of Hopper nothing is said
RING = 4  # stages of copies
LEAD = 2  # steps by which one team is ahead of the other
COPY = 800  # cycles from an empty stage to a full one
RAMP = 150  # cycles from the last product to its result, and from the first instruction of the next to full rate


class Card(NamedTuple):
    """A GPU, as far as the model knows it."""

    name: str
    architecture: str
    multiprocessors: int
    flops: int  # of a multiprocessor in a cycle, 16-bit products with 32-bit sums
    hopper: bool


H100 = Card("H100", "sm_90a", 132, 4096, True)
A100 = Card("A100", "sm_80", 108, 2048, False)


class Kernels(NamedTuple):
    """The machine code of a card's kernels."""

    card: Card
    similarity: list[Instruction]
    screen: list[Instruction]  # that of one product which comes before, for fp32 accuracy
    masked_sum: list[Instruction]

    def phase(self, functions: tuple[str, ...]) -> list[Instruction]:
        """The instructions of these functions, without the scan of tiles that have positives: they are few."""
        found = []
        for one in self.screen if functions == SCREEN else self.similarity:
            names = [name for name, _ in one.calls]
            special = any("false>" in line for name, line in one.calls if name == "scan_tile")
            name = next((name for name in names if name in LISTED), None)  # the innermost
            if name in functions and not special:
                found.append(one)
        return found

    def step(self) -> list[Instruction]:
        """The instructions of one step of the product by mma.sync."""
        names = {"similarity", "load_operand", "load_step", "load_matrices", "multiply_add", "copy_16"}
        return [one for one in self.similarity if one.calls and one.calls[0][0] in names]

    def item(self) -> list[Instruction]:
        """The instructions of one tile of a masked sum by products."""
        names = {"load_item", "multiply_tile", "multiply_tile_sm90"}
        found = []
        for one in self.masked_sum:
            calls = {name for name, _ in one.calls}
            if names & calls and "load_mask" not in calls:  # which is for halves of tiles that are empty or complete
                found.append(one)
        return found


def compiled(card: Card, nvcc: str = "nvcc") -> Kernels:
    """The kernels of the loss for a card."""
    with tempfile.TemporaryDirectory() as folder:
        code = disassemble(ROOT / "csrc/cuda/loss.cu", card.architecture, Path(folder), nvcc)
    ending = "_sm90" if card.hopper else ""
    similarity, screen = (code[f"similarity{ending}<{visitor}Visitor>"] for visitor in ("Loss", "Screen"))
    return Kernels(card, similarity, screen, code[f"masked_sum{ending}"])


def product_cycles(card: Card, d: int) -> float:
    """Of the tensor cores for the product of 128 x 256 similarities: two tiles."""
    return 2 * 128 * 256 * -(-d // STEP) * STEP / card.flops


def similarity_cycles(kernels: Kernels, phases: tuple[str, ...], d: int, products: int = 1) -> float:
    """Of a multiprocessor for two tiles. `products`: 3 for fp32 accuracy."""
    card = kernels.card
    code = kernels.phase(phases)
    tensor = products * product_cycles(card, d)
    if card.hopper:  # two teams, each with a warp on a scheduler
        step = product_cycles(card, STEP) / 2  # of one team
        late = max(0, cycles_of(kernels.phase(HIDDEN), 1, True) - step)
        return teams_cycles(products * -(-d // STEP), step, RAMP + cycles_of(code, 1, True) + late)
    # Two blocks of threads, four warps on a scheduler: one block multiplies while the other looks.
    looks = pipe_cycles([*code, *kernels.phase(HIDDEN)], 4, False)
    issued = products * -(-d // STEP) * pipe_cycles(kernels.step(), 4, False) + looks
    return max(tensor, issued)


def teams_cycles(steps: int, step: float, looks: float, lead: int = LEAD, pairs: int = 60) -> float:
    """Of two teams for a pair of tiles in the long run; each has half of every step and then looks at its half.

    The tensor cores take the products of both teams in turns, four to a step. A stage of the ring is filled anew when
    both teams are done with it. The second team begins `lead` steps after the first.
    """
    total, lead = pairs * steps, min(lead, steps)
    done: tuple[list[float], list[float]] = ([], [])  # when a team's steps were
    free, begun, quarters, tensor, turn = [0.0, 0.0], [0.0, 0.0], [0, 0], 0.0, 0
    while any(len(one) < total for one in done):
        asking = []
        for team, mine in enumerate(done):
            n = len(mine)
            if n == total or n >= RING + min(map(len, done)) or (team == 1 and len(done[0]) < lead):
                continue
            filled = (max(one[n - RING] for one in done) if n >= RING else 0) + COPY
            before = done[0][lead - 1] if team == 1 and lead > 0 else 0
            first = max(free[team], filled, before, mine[n - 2] if n % steps >= 2 else 0)
            asking.append((begun[team] if quarters[team] else first, team != turn, team))
        waiting = [one for one in asking if one[0] <= tensor]
        start, _, team = min(waiting, key=lambda one: one[1]) if waiting else min(asking)
        begun[team], turn = start, 1 - team
        begins = max(start, tensor)
        tensor = begins + step / 4
        quarters[team] = (quarters[team] + 1) % 4
        if quarters[team] == 0:
            last = len(done[team]) % steps == steps - 1
            done[team].append(tensor)
            free[team] = tensor + looks if last else begins
    ends = [max(one[n] for one in done) for n in (total // 2 - 1, total - 1)]
    return (ends[1] - ends[0]) / (pairs / 2)


def masked_sum_cycles(kernels: Kernels, d: int) -> float:
    """Of a multiprocessor for all products of two mixed tiles with x^: both ways, two blocks of threads at once."""
    card, items = kernels.card, 2 * 2 * -(-d // 128)
    tensor = 2 * 128**3 / card.flops
    code = kernels.item()
    if card.hopper:
        return items / 2 * max(2 * tensor, tensor + RAMP + cycles_of(code, 2, True))
    return items / 2 * max(2 * tensor, pipe_cycles(code, 4, False))


def ratio(kernels: Kernels, hard: str, d: int) -> float:
    """Predicted time of all pairs over that of N^2 D flop at the product's full rate; 3 N^2 D where half are hard."""
    cycles = similarity_cycles(kernels, PHASES[hard], d)
    if hard == "half":
        return (cycles + masked_sum_cycles(kernels, d)) / (3 * product_cycles(kernels.card, d))
    return cycles / product_cycles(kernels.card, d)


def predictions(kernels: Kernels) -> dict[str, float]:
    """Every figure of a card's column, by the row's name."""
    found = {f"D = {d}, few hard": ratio(kernels, "few", d) for d in WIDTHS}
    found["D = 512, all hard"] = ratio(kernels, "all", 512)
    found["D = 512, half hard, of 3 N^2 D"] = ratio(kernels, "half", 512)
    half, screen = (similarity_cycles(kernels, phases, 512) for phases in (PHASES["few"], SCREEN))
    exact, mixed = (similarity_cycles(kernels, PHASES[hard], 512, products=3) for hard in ("few", "half"))
    found["D = 512, few hard, fp32-accurate: of the 16-bit time"] = screen / half
    found["the same, the screen leaves a tenth of the tiles"] = (screen + mixed / 10) / half
    found["the same, no screen"] = exact / half
    card = kernels.card
    step_bytes = (128 + 256) * STEP * 2 if card.hopper else 2 * (128 + 128) * STEP * 2
    found["L2 bytes a cycle and multiprocessor"] = step_bytes / product_cycles(card, STEP)
    found["all that L2 has to give, if 5,120 a cycle"] = L2 / card.multiprocessors
    for name, phases in (*((f"{hard} hard", PHASES[hard]) for hard in HARD), ("screen", SCREEN)):
        found[f"cycles after the product of two tiles, {name}"] = (
            cycles_of(kernels.phase(phases), 1, True) if card.hopper else pipe_cycles(kernels.phase(phases), 4, False)
        )
    return found


def table(columns: dict[str, dict[str, float]], compiler: str) -> str:
    """The predictions as Markdown."""
    rows = list(next(iter(columns.values())))
    lines = [
        "# Predicted times of the CUDA kernels",
        "",
        "A model, not a measurement: cycles counted from the machine code by `python -m benchmarks.speed.cycles`, for",
        "the kernels of the pairs alone. Times are over that of N^2 D flop (3 N^2 D where it says so) at the full rate",
        f"of the tensor cores; L2 is taken not to bind. {compiler}. Written by `make registers`; `make test` compares.",
        "",
        f"| | {' | '.join(columns)} |",
        "|---|" + "---:|" * len(columns),
    ]
    for name in rows:
        cells = [f"{column[name]:,.0f}" if "cycles" in name else f"{column[name]:.2f}" for column in columns.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def recorded(text: str) -> dict[str, list[float]]:
    """The rows of a table."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| \w", line)]
    return {name: [float(cell.replace(",", "")) for cell in cells] for name, *cells in rows}


def worse(found: dict[str, list[float]], before: dict[str, list[float]], by: float = 1.03) -> list[str]:
    """The rows in which a prediction is worse than before by more than that."""
    return [
        f"{name}: {cells}, was {before[name]}"
        for name, cells in found.items()
        if any(cell > by * old for cell, old in zip(cells, before.get(name, cells), strict=True))
    ]


def main() -> int:
    argparse.ArgumentParser(prog="python -m benchmarks.speed.cycles", description=__doc__.splitlines()[0]).parse_args()
    if nvdisasm() is None:
        print("nvdisasm is neither on the PATH nor in Triton; install one of them", file=sys.stderr)
        return 2
    TABLE.write_text(whole_table())
    print(f"{TABLE.read_text()}\nwrote {TABLE}")
    return 0


def whole_table(nvcc: str = "nvcc") -> str:
    """The table of the kernels as they are."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"V([\d.]+)", said)
    columns = {card.name: predictions(compiled(card, nvcc)) for card in (H100, A100)}
    return table(columns, f"nvcc {version[1] if version else 'unknown'}")


if __name__ == "__main__":
    sys.exit(main())
