"""The C++ kernels alone, built with its own threads: on every instruction set, and under the sanitizers."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    "tests/kernels/sanitize/main.cpp",
    "csrc/cpu/loss.cpp",
    "csrc/cpu/counts.cpp",
    "csrc/cpu/pair_loops.cpp",
]


@pytest.mark.parametrize(
    ("flags", "cases"),
    [
        pytest.param("-O3 -fno-math-errno -fno-trapping-math", 400, id="release"),
        pytest.param("-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all", 120, id="asan-ubsan"),
        pytest.param("-O1 -g1 -fsanitize=thread", 40, id="tsan"),
    ],
)
def test_kernel_without_torch(tmp_path: Path, flags: str, cases: int) -> None:
    """Random problems agree with a double loop over the pairs, run to run to the bit, and no sanitizer speaks."""
    program = tmp_path / "kernel"
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-fopenmp-simd", "-pthread", "-Wno-psabi", *flags.split()]
    subprocess.run([*command, *SOURCES, "-o", str(program)], cwd=ROOT, check=True)
    run = subprocess.run([str(program), str(cases)], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{cases} cases agree" in run.stdout
