"""Every CUDA kernel as ptxas compiled it, on each default architecture: no spill, and the table csrc/cuda/registers.md.

Once with nvcc's own ptxas, and for Hopper once with the older one that Triton brings: they differ in when they
serialise products.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from ptx_machine.build import nvcc

from benchmarks.speed import ptxas
from benchmarks.speed.ptxas import NoKernels, Report, Use, complaints, differences, read, table

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")


def build() -> tuple[Report, str]:
    """Those of the default build. Skipped where there is no nvcc, unless it was asked for."""
    try:
        return ptxas.build()[:2]
    except NoKernels as error:
        if "no CUDA kernels: " in str(error) and os.environ.get("TCM_FUSED_CUDA") != "1":
            pytest.skip(str(error))  # no nvcc: nothing was compiled that could be looked at
        raise


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
    recorded = ptxas.TABLE.read_text()
    if compiler not in recorded:
        # Another compiler gives other registers to the same kernels: that says nothing about a change of ours.
        pytest.skip(f"{ptxas.TABLE.name} was not written with this compiler, {compiler}")
    assert recorded == table(report, compiler), "if that is meant, run `make registers`"
    assert differences(report, compiler, recorded) == []


def triton_ptxas() -> Path:
    """Triton's ptxas, of CUDA 12."""
    backends = pytest.importorskip("triton.backends", reason="the second ptxas is Triton's, which is not installed")
    return Path(backends.__file__).parent / "nvidia/bin/ptxas"


@pytest.mark.parametrize("unit", ["loss", "counts"])
def test_an_older_ptxas_agrees(unit: str, tmp_path: Path) -> None:
    """No spill and no serialised product by a ptxas of CUDA 12 either, which users may have."""
    older = triton_ptxas()
    version = re.search(
        r"release (\d+)\.\d+", subprocess.run([older, "--version"], capture_output=True, text=True).stdout
    )
    assert version is not None
    assert version[1] == "12", "this Triton brings another ptxas; take one of CUDA 12 from elsewhere"
    source = tmp_path / "kernels.ptx"
    command = [nvcc(), "-std=c++20", "-O3", "-arch=compute_90a", "-ptx", f"csrc/cuda/{unit}.cu", "-o", str(source)]
    subprocess.run(command, cwd=ROOT, check=True)
    text, headers = re.subn(r"^\.version \d+\.\d+$", ".version 8.5", source.read_text(), flags=re.MULTILINE)
    assert headers == 1
    source.write_text(text)
    command = [str(older), "-v", "-arch=sm_90a", str(source), "-o", str(tmp_path / "kernels.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = read(done.stdout + done.stderr)
    assert any("_sm90" in kernel for kernel, _ in report.uses)
    assert complaints(report) == []


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


def test_differences_are_told() -> None:
    report = read(GOOD)
    recorded = table(report, "nvcc 1")
    assert differences(report, "nvcc 1", recorded) == []
    assert differences(read(GOOD.replace("168", "170")), "nvcc 1", recorded) == [
        "good(float*) on sm_90a: 170, 512 B, in the table 168, 512 B"
    ]
    assert differences(read(GOOD.replace("168", "170")), "nvcc 2", recorded) == [], "another compiler's table"
    assert differences(read(GOOD.replace("4good", "5other")), "nvcc 1", recorded) == [
        "good(float*) on sm_90a: not there, in the table 168, 512 B",
        "other(float*) on sm_90a: 168, 512 B, in the table not there",
    ]
    assert differences(read(GOOD.replace("sm_90a", "sm_120")), "nvcc 1", recorded) == [], "the table has no such column"


def test_check_records_what_it_finds(tmp_path: Path) -> None:
    wrong = ptxas.check(read(GOOD + SERIAL), "nvcc 0", tmp_path / "registers.json")
    assert len(wrong) == 1
    record = json.loads((tmp_path / "registers.json").read_text())
    assert record["registers"] == {"good(float*)": {"sm_90a": 168}}
    assert record["complaints"] == wrong
