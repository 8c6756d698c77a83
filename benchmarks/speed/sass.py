"""Machine code of the CUDA kernels: instructions with their places in the source, and the cycles that they take.

`Instruction` has all that a warp's scheduler goes by: from Volta on every instruction carries the cycles to the next
one and the scoreboards that it waits for. `cycles_of` runs some of them on a scheduler with a few warps. A model:
latencies and rates of pipes are assumed (`RATES`, `LATENCIES`), branches are straight lines, and global memory is
always in L2.
"""

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

from benchmarks.speed.ptxas import ROOT, plain_names

SOURCES = ROOT / "csrc/cuda"
# Cycles for which an instruction of a warp keeps a pipe of its scheduler busy: 32 lanes over those that there are.
# NVIDIA's programming guide has the rates; of Hopper first, then of Ampere (GA100).
RATES = {
    "fma": ("FADD FMUL FFMA", 1, 2),
    "imad": ("IMAD", 2, 2),
    "double": ("DADD DMUL DFMA DSETP", 2, 4),
    "special": ("POPC FLO MUFU F2F F2I I2F BREV I2FP F2FP", 8, 8),
    "memory": ("SHFL LDS STS LDG STG LD ST ATOM ATOMS ATOMG RED LDSM LDC MATCH", 4, 4),
}
ALU = 2  # everything else with a result: integers, comparisons, minima and maxima, selections, votes
# Cycles to the result of those whose latency is not fixed.
LATENCIES = {"LDG": 500, "LD": 500, "ATOM": 600, "ATOMG": 600, "LDS": 30, "LDSM": 33, "ATOMS": 60, "SHFL": 25}
OTHER_LATENCY = 20
BARRIER = 25  # from the last arrival at a barrier to the first instruction after it


class Instruction(NamedTuple):
    """One, as it is scheduled."""

    name: str
    stall: int  # cycles until the warp's next one may start
    write: int  # scoreboard that is released when its result is there; 7: none
    read: int  # the same when its operands have been read
    wait: int  # scoreboards that it waits for, one bit each
    calls: tuple[tuple[str, str], ...]  # function and line of text that it comes from, then those that call


def nvdisasm() -> str | None:
    """The disassembler: the toolkit's, or Triton's."""
    found = shutil.which("nvdisasm")
    if found:
        return found
    try:
        import triton.backends
    except ImportError:
        return None
    path = Path(triton.backends.__file__).parent / "nvidia/bin/nvdisasm"
    return str(path) if path.exists() else None


@cache
def _functions(path: Path) -> tuple[list[str], list[str]]:
    """For each line of a source: the function that it is in (as far as its head tells), and its text."""
    names, lines, name = [], path.read_text().splitlines(), ""
    for line in lines:
        head = re.search(r"__device__.*?\b(\w+)\((?!\()", line.replace("__align__(", ""))
        if head and not line.rstrip().endswith(";"):
            name = head[1]
        names.append(name)
    return names, [line.strip() for line in lines]


def disassemble(source: Path, architecture: str, folder: Path, nvcc: str) -> dict[str, list[Instruction]]:
    """The kernels of a source by their names, template arguments included and others not."""
    cubin = folder / f"{source.stem}.{architecture}.cubin"
    # Line numbers change no instruction.
    subprocess.run(
        [nvcc, "-std=c++20", "-O3", "-lineinfo", f"-arch={architecture}", "-cubin", source, "-o", cubin], check=True
    )
    tool = nvdisasm()
    assert tool is not None
    text = subprocess.run([tool, "-hex", "-gi", "-c", cubin], capture_output=True, text=True, check=True).stdout
    kernels: dict[str, list[Instruction]] = {}
    for section in re.split(r"^\s*\.section\s+\.text\.", text, flags=re.MULTILINE)[1:]:
        name = re.sub(r"\(.*", "", plain_names(section.split(",", 1)[0])).split()[-1]
        kernels[name] = _instructions(section)
    return kernels


_PLACE = re.compile(r'//## File "([^"]+)", line (\d+)')
_CODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+).*/\* 0x[0-9a-f]{16} \*/")
_SECOND = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")


def _instructions(section: str) -> list[Instruction]:
    found: list[Instruction] = []
    calls: list[tuple[str, str]] = []
    name, fresh = "", True
    for line in section.splitlines():
        if "WARPSYNC.COLLECTIVE" in line:  # from here on: shuffles of warps that are not together, which ours are
            break
        if place := _PLACE.search(line):
            if fresh:
                calls, fresh = [], False
            calls.append(_call(Path(place[1]), int(place[2])))
        elif code := _CODE.search(line):
            name, fresh = code[1], True
        elif (second := _SECOND.match(line)) and name:
            control = int(second[1], 16) >> 41
            fields = (control & 15, control >> 5 & 7, control >> 8 & 7, control >> 11 & 63)
            found.append(Instruction(name, *fields, tuple(calls)))
            name = ""
    return found


def _call(path: Path, line: int) -> tuple[str, str]:
    if path.parent.resolve() != SOURCES:
        return "", ""
    names, lines = _functions(path.resolve())
    return names[line - 1], lines[line - 1]


def pipe_of(name: str, hopper: bool) -> tuple[str, int]:
    """The pipe of an instruction and for how long it has it."""
    base = name.split(".")[0]
    for pipe, (names, on_hopper, on_ampere) in RATES.items():
        if base in names.split():
            return pipe, on_hopper if hopper else on_ampere
    return "alu", ALU


def cycles_of(code: list[Instruction], warps: int, hopper: bool) -> int:
    """Cycles of `warps` warps on one scheduler, all beginning at once, to the last instruction or the last late result.

    Each cycle the scheduler starts one instruction: of the warp that is furthest behind among those that may go on.
    """
    at, ready, busy = [0] * warps, [0] * warps, dict.fromkeys([*RATES, "alu"], 0)
    boards = [[0] * 8 for _ in range(warps)]
    arrived: dict[int, list[int]] = {}
    now = end = 0
    while any(k < len(code) for k in at):
        issued = False
        for warp in sorted(range(warps), key=lambda w: at[w]):
            if at[warp] == len(code) or ready[warp] > now:
                continue
            one = code[at[warp]]
            pipe, cycles = pipe_of(one.name, hopper)
            if busy[pipe] > now or any(one.wait >> k & 1 and boards[warp][k] > now for k in range(6)):
                continue
            if one.name.startswith("BAR"):
                others = arrived.setdefault(at[warp], [])
                others.append(warp)
                ready[warp] = 1 << 60
                if len(others) == warps:
                    for each in others:
                        ready[each] = now + BARRIER
            else:
                ready[warp] = now + max(1, one.stall)
            busy[pipe] = now + cycles
            base = one.name.split(".")[0]
            if one.write < 6:
                boards[warp][one.write] = max(boards[warp][one.write], now + LATENCIES.get(base, OTHER_LATENCY))
            if one.read < 6:
                boards[warp][one.read] = max(boards[warp][one.read], now + OTHER_LATENCY)
            end = max(end, now + one.stall, *boards[warp][:6]) if one.write < 6 and base != "STG" else max(end, now)
            at[warp] += 1
            issued = True
            break
        now += 1
        if not issued:
            waiting = [ready[w] for w in range(warps) if at[w] < len(code) and ready[w] > now]
            if len(waiting) == sum(k < len(code) for k in at):
                now = min(waiting)
    return max(now, end)


def pipe_cycles(code: list[Instruction], warps: int, hopper: bool) -> int:
    """The least that `warps` warps take on one scheduler: an instruction a cycle, and the busiest pipe."""
    busy: dict[str, int] = {}
    for one in code:
        pipe, cycles = pipe_of(one.name, hopper)
        busy[pipe] = busy.get(pipe, 0) + cycles
    return warps * max(len(code), *busy.values()) if code else 0
