"""The C++ kernels alone, built with their own threads: on every instruction set, and under the sanitizers."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HARNESS = ROOT / "tests/kernels/sanitize"
KERNELS = [ROOT / "csrc/cpu" / name for name in ("loss.cpp", "counts.cpp", "pair_loops.cpp")]


@pytest.mark.parametrize(
    ("flags", "cases", "batches"),
    [
        pytest.param("-O3 -fno-math-errno -fno-trapping-math", 400, 1000, id="release"),
        pytest.param("-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all", 60, 100, id="asan-ubsan"),
        pytest.param("-O1 -g1 -fsanitize=thread", 25, 20, id="tsan"),
    ],
)
def test_kernels_without_torch(tmp_path: Path, flags: str, cases: int, batches: int) -> None:
    """Random problems agree with a double loop over the pairs, run to run to the bit, and no sanitizer speaks.

    `main` draws problems of every form, `decisions` batches whose pairs are hard to decide. decisions 100000, of the
    release build, takes minutes.
    """
    compiler = [os.environ.get("CXX", "g++"), "-std=c++20", "-fopenmp-simd", "-pthread", "-Wno-psabi", *flags.split()]

    def made(source: Path) -> str:
        out = tmp_path / f"{source.stem}.o"
        subprocess.run([*compiler, "-c", str(source), "-o", str(out)], check=True)
        return str(out)

    with ThreadPoolExecutor(2) as pool:
        main, decisions, *kernels = pool.map(made, [HARNESS / "main.cpp", HARNESS / "decisions.cpp", *KERNELS])
    for harness, number, what in ((main, cases, "cases"), (decisions, batches, "batches")):
        program = tmp_path / Path(harness).stem
        subprocess.run([*compiler, harness, *kernels, "-o", str(program)], check=True)
        run = subprocess.run([str(program), str(number)], capture_output=True, text=True, timeout=600)
        assert run.returncode == 0, run.stdout + run.stderr
        assert f"{number} {what} agree" in run.stdout
