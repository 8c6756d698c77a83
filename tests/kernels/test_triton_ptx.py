"""The Triton kernels as they ship, without a GPU: their PTX for sm_80 and sm_90, executed by tests/ptx_machine.

tests/kernels/triton_ptx.py does the work, in processes of its own: here Triton's kernels are the interpreter's.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ptx_machine import build

ARCHITECTURES = ("sm_80", "sm_90")


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, list[str]]]:
    """The errors of each problem on each architecture."""
    build.library()

    def run_all(name: str) -> dict[str, list[str]]:
        script = Path(__file__).with_name("triton_ptx.py")
        environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(script), name]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-5000:]
        return {row["problem"]: row["errors"] for row in map(json.loads, done.stdout.splitlines())}

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(ARCHITECTURES, pool.map(run_all, ARCHITECTURES), strict=True))


@pytest.mark.parametrize(
    "problem",
    [
        "plain",
        "split sums",
        "panels",
        "row_offset, penalties",
        "reference set",
        "full tiles",
        "one row",
        "no label",
        "no gradient",
        "on the margin",
        "on the margin, three products",
        "same bits",
    ],
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_problem(architecture: str, problem: str, reports: dict[str, dict[str, list[str]]]) -> None:
    assert reports[architecture][problem] == []


def test_all_problems_are_tested(reports: dict[str, dict[str, list[str]]]) -> None:
    """Each architecture ran the same, and nothing was left out."""
    assert {len(problems) for problems in reports.values()} == {12}
