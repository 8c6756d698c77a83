"""`python -m benchmarks.speed.ptxas`: what ptxas made of every CUDA kernel; writes csrc/cuda/registers.md.

The reports are those of the build; nothing is compiled twice. `--check FILE` writes nothing there: it records registers
and complaints in a JSON file, and fails if a kernel spills, a product is serialised (C75..), or the table tells
otherwise.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "csrc/cuda/registers.md"

_KERNEL = re.compile(r"Compiling entry function '(.+)' for '(\S+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers.*")
_SHARED = re.compile(r"(\d+) bytes smem")
_SERIAL = re.compile(r".*\bC75\d\d\b.*")  # wgmma is serialised, or a register hint is not taken


class Use(NamedTuple):
    """What one kernel takes on one architecture."""

    registers: int
    shared: int  # bytes that the kernel declares; those that a launch adds are not known here
    stack: int  # bytes of local memory per thread, spilled or indexed at run time
    spilled: int  # bytes


class Report(NamedTuple):
    """ptxas' reports: each kernel on each architecture, and what it complained about."""

    uses: dict[tuple[str, str], Use]
    complaints: list[str]


class NoKernels(RuntimeError):
    """There are to be no CUDA kernels, or they cannot be compiled."""


def plain_names(text: str) -> str:
    """`text` with the kernels' names as in C++, without the namespace."""
    text = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout
    return re.sub(r"\(anonymous namespace\)::|tcm::cuda::|void (?=tcm::)", "", text)


def read(text: str) -> Report:
    """The kernels of `text`, which nvcc printed under `-Xptxas -v`, by their names in C++ without the namespace.

    Raises:
        ValueError: a kernel's lines are not as expected: another ptxas, or two of them printing at once.
    """
    text = plain_names(text)
    uses = {}
    _, *parts = re.split(f"(?={_KERNEL.pattern.replace('(', '(?:')})", text)
    for part in parts:
        kernel, frames, used = _KERNEL.search(part), _FRAME.findall(part), _USED.findall(part)
        if kernel is None or not frames or len(used) != 1:
            raise ValueError(f"not one kernel's report:\n{part}")
        shared = _SHARED.search(part)
        uses[kernel[1], kernel[2]] = Use(
            registers=int(used[0]),
            shared=int(shared[1]) if shared else 0,
            stack=max(int(frame) for frame, _, _ in frames),
            spilled=sum(int(stores) + int(loads) for _, stores, loads in frames),
        )
    return Report(uses, _SERIAL.findall(text))


def complaints(report: Report) -> list[str]:
    """What makes the build unfit: spills, local memory, and what ptxas itself warns of."""
    found = [f"ptxas: {line.strip()}" for line in report.complaints]
    for (kernel, architecture), use in report.uses.items():
        if use.spilled or use.stack:
            found.append(f"{kernel} on {architecture}: {use.spilled} bytes spilled, {use.stack} bytes of stack")
    return found


def table(report: Report, compiler: str) -> str:
    """The report as Markdown, one row per kernel."""
    architectures = sorted(
        {architecture for _, architecture in report.uses}, key=lambda name: int(name[3:].strip("af"))
    )
    kernels = sorted({kernel for kernel, _ in report.uses})
    rows = []
    for kernel in kernels:
        cells = [_cell(report.uses.get((kernel, architecture))) for architecture in architectures]
        rows.append(f"| `{kernel}` | {' | '.join(cells)} |")
    lines = [
        "# Registers and declared shared memory of the CUDA kernels",
        "",
        f"Registers per thread, bytes per block; {compiler}. Written by `make registers`; `make test` compares.",
        "",
        f"| kernel | {' | '.join(architectures)} |",
        "|---|" + "---|" * len(architectures),
        *rows,
    ]
    return "\n".join(lines) + "\n"


def _cell(use: Use | None) -> str:
    return "-" if use is None else f"{use.registers}" + (f", {use.shared} B" if use.shared else "")


def differences(report: Report, compiler: str, recorded: str) -> list[str]:
    """Where the report is not as `recorded`, a table, tells; nothing if that is another compiler's.

    Kernels for architectures that the table does not have are not compared, nor its architectures that were not built.
    """
    if compiler not in recorded:
        return []
    lines = [line.strip("| ").split(" | ") for line in recorded.splitlines() if line.startswith(("| kernel", "| `"))]
    (_, *architectures), *rows = lines
    told = {(row[0].strip("`"), name): cell for row in rows for name, cell in zip(architectures, row[1:], strict=True)}
    found = {key: _cell(use) for key, use in report.uses.items() if key[1] in architectures}
    built = {architecture for _, architecture in found}
    told = {key: cell for key, cell in told.items() if key[1] in built}
    return [
        f"{kernel} on {architecture}: {found.get((kernel, architecture), 'not there')}, "
        f"in the table {told.get((kernel, architecture), 'not there')}"
        for kernel, architecture in sorted(found.keys() | told.keys())
        if found.get((kernel, architecture)) != told.get((kernel, architecture))
    ]


def build(architectures: str | None = None) -> tuple[Report, str, list[Path]]:
    """The reports of a build, compiled now if they are not there, the compiler's name, and the objects.

    architectures: as in TORCH_CUDA_ARCH_LIST; None: the default ones.

    Raises:
        NoKernels: with the compiler's words.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_CUDA_ARCH_LIST"}
    if architectures is not None:
        environment["TORCH_CUDA_ARCH_LIST"] = architectures
    command = [sys.executable, "setup.py", "-q", "build_cuda"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NoKernels((done.stdout + done.stderr).strip())
    # Before the compiler's name, warnings.
    compiler, *logs = done.stdout[done.stdout.rindex("nvcc ") :].splitlines()
    report = read("".join(Path(log).read_text() for log in logs))
    return report, compiler, [Path(log).with_suffix(".o") for log in logs]


def check(report: Report, compiler: str, target: Path) -> list[str]:
    """Records registers and complaints in `target`; what is wrong."""
    wrong = complaints(report)
    registers: dict[str, dict[str, int]] = {}
    for (kernel, architecture), use in sorted(report.uses.items()):
        registers.setdefault(kernel, {})[architecture] = use.registers
    record = {"compiler": compiler, "complaints": wrong, "registers": registers}
    target.write_text(json.dumps(record, indent=1) + "\n")
    return wrong + differences(report, compiler, TABLE.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.ptxas", description=__doc__.splitlines()[0])
    parser.add_argument("--check", type=Path, metavar="FILE", help="the JSON file to write; the status is 1 if unfit")
    asked = parser.parse_args()
    try:
        report, compiler, _ = build(os.environ.get("TORCH_CUDA_ARCH_LIST") if asked.check else None)
    except NoKernels as error:
        print(error, file=sys.stderr)
        return 2
    if asked.check is None:
        TABLE.write_text(table(report, compiler))
        print(f"wrote {TABLE}")
        return 0
    wrong = check(report, compiler, asked.check)
    print(table(report, compiler), *wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
