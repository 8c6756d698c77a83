"""Every CUDA kernel as ptxas compiled it, on each default architecture: no spill, and the table csrc/cuda/registers.md.

The reports are those of the build; nothing is compiled twice. `make registers` writes the table anew.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from ptx_machine.build import nvcc

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "csrc/cuda/registers.md"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")

_KERNEL = re.compile(r"Compiling entry function '(.+)' for '(\S+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers.*")
_SHARED = re.compile(r"(\d+) bytes smem")
_SERIAL = re.compile(r".*\bC75\d\d\b.*")  # wgmma is serialised, or a register hint is not taken


class Use(NamedTuple):
    """Resources of one kernel on one architecture."""

    registers: int
    shared: int  # bytes that the kernel declares; those that a launch adds are not known here
    stack: int  # bytes of local memory per thread, spilled or indexed at run time
    spilled: int  # bytes


class Report(NamedTuple):
    """ptxas' reports: each kernel on each architecture, and its complaints."""

    uses: dict[tuple[str, str], Use]
    complaints: list[str]


def read(text: str) -> Report:
    """The kernels of `text`, which nvcc printed under `-Xptxas -v`, by their names in C++ without the namespace.

    Raises:
        ValueError: a kernel's lines are not as expected: another ptxas, or two of them printing at once.
    """
    text = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout
    text = re.sub(r"\(anonymous namespace\)::|tcm::cuda::|void (?=tcm::)", "", text)
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
    """Reasons not to ship the build: spills, local memory, and ptxas' own warnings."""
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


def build() -> tuple[Report, str]:
    """The reports of the default build, compiled now if they are not there, and the compiler's name."""
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_CUDA_ARCH_LIST"}
    command = [sys.executable, "setup.py", "-q", "build_cuda"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if "no CUDA kernels: " in done.stderr and os.environ.get("TCM_FUSED_CUDA") != "1":
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    compiler, *logs = done.stdout.splitlines()
    return read("".join(Path(log).read_text() for log in logs)), compiler


@pytest.fixture(scope="module")
def built() -> tuple[Report, str]:
    return build()


def test_no_kernel_spills(built: tuple[Report, str]) -> None:
    assert complaints(built[0]) == []


def test_no_product_is_serialised(built: tuple[Report, str]) -> None:
    """Nor any other advice of ptxas' that its warnings C75xx give: each halves the speed of a product, or worse."""
    assert built[0].complaints == []


def test_every_kernel_is_there_for_every_architecture(built: tuple[Report, str]) -> None:
    kernels = {kernel for kernel, _ in built[0].uses}
    assert kernels
    assert set(built[0].uses) == {(kernel, architecture) for kernel in kernels for architecture in ARCHITECTURES}


def test_registers_are_those_of_the_table(built: tuple[Report, str]) -> None:
    """A change of a kernel and its new registers are in the same commit."""
    report, compiler = built
    recorded = TABLE.read_text()
    if compiler not in recorded:
        pytest.skip(f"{TABLE.name} was not written with this compiler, {compiler}")
    assert recorded == table(report, compiler), "if that is meant, run `make registers`"


# The gate itself.

GOOD = """
ptxas info    : Compiling entry function '_Z4goodPf' for 'sm_90a'
ptxas info    : Function properties for _Z4goodPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 512 bytes smem
"""
SERIAL = """
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized in function '_Z4goodPf'
"""


def test_gate_passes_a_good_report() -> None:
    report = read(GOOD)
    assert report.uses == {("good(float*)", "sm_90a"): Use(168, 512, 0, 0)}
    assert not complaints(report)
    assert "| `good(float*)` | 168, 512 B |" in table(report, "nvcc")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (GOOD.replace("0 bytes spill stores", "8 bytes spill stores"), "8 bytes spilled"),
        (GOOD.replace("0 bytes spill loads", "8 bytes spill loads"), "8 bytes spilled"),
        (GOOD.replace("0 bytes stack frame", "64 bytes stack frame"), "64 bytes of stack"),
        (GOOD + SERIAL, "C7510"),
        (SERIAL + GOOD, "C7510"),
    ],
)
def test_gate_stops_a_bad_report(text: str, word: str) -> None:
    assert any(word in complaint for complaint in complaints(read(text)))


@pytest.mark.parametrize("lost", [2, 3, 4])
def test_gate_stops_a_report_it_cannot_read(lost: int) -> None:
    lines = GOOD.splitlines()
    with pytest.raises(ValueError, match="not one kernel's report"):
        read("\n".join(lines[:lost] if lost < 4 else lines + lines[-1:]))


def test_gate_stops_a_kernel_that_spills(tmp_path: Path) -> None:
    """Of a real ptxas: 64 values alive in a thread that may have 16 registers."""
    report = compile_alone(
        """__global__ void hungry(float* x, int n) {
             float a[64];
             #pragma unroll
             for (int i = 0; i < 64; ++i) a[i] = x[i * n];
             for (int k = 0; k < n; ++k)
               #pragma unroll
               for (int i = 0; i < 64; ++i) a[i] = a[i] * a[(i + 1) % 64] + k;
             #pragma unroll
             for (int i = 0; i < 64; ++i) x[i * n] = a[i];
           }""",
        tmp_path,
        "-arch=sm_80",
        "-maxrregcount=16",
    )
    assert "bytes spilled" in complaints(report)[0]


def test_gate_stops_products_that_are_serialised(tmp_path: Path) -> None:
    """Of a real ptxas: an accumulator is read between two products."""
    report = compile_alone(
        """#include "ptx_sm90.cuh"
           __global__ void early(float* out, uint64_t b) {
             float d[64] = {};
             uint32_t a[4] = {1, 2, 3, 4};
             tcm::cuda::warpgroup_fence();
             tcm::cuda::warpgroup_multiply(d, a, b);
             out[threadIdx.x] = d[5];
             tcm::cuda::warpgroup_multiply(d, a, b);
             tcm::cuda::warpgroup_commit();
             tcm::cuda::warpgroup_wait<0>();
             for (int k = 0; k < 64; ++k) out[k * 128 + threadIdx.x] = d[k];
           }""",
        tmp_path,
        "-arch=sm_90a",
    )
    assert len(report.complaints) == 1
    assert "serialized" in report.complaints[0]
    assert any("C75" in complaint for complaint in complaints(report))


def compile_alone(source: str, folder: Path, *options: str) -> Report:
    """ptxas' report of one kernel's source."""
    (folder / "kernel.cu").write_text(source)
    command = [nvcc(), "-std=c++20", f"-I{ROOT / 'csrc/cuda'}", "-Xptxas=-v", "-cubin", *options, "kernel.cu"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return read(done.stdout + done.stderr)


if __name__ == "__main__":
    TABLE.write_text(table(*build()))
    print(f"wrote {TABLE}")
