"""The Triton kernels as ptxas compiles them: every shipped configuration, for sm_80, sm_90, sm_100, without a GPU."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from ptx_machine import build

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
PRODUCTS = {"similarity", "masked_sum"}
# Instruction of the tensor cores, of loads that run ahead of it, and shared memory a block may have. Kernels of sm_80
# also run on sm_86, sm_89 and sm_120, which have 99 KiB.
EXPECTED = {"sm_80": ("HMMA", "cp.async", 99), "sm_90": ("HGMMA", "TMA", 227), "sm_100": ("UTCHMMA", "TMA", 227)}

Report = list[dict[str, Any]]


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    """Of each architecture, compiled in processes of their own, which are not in the interpreter; two at a time.

    They are kept, for the same sources, torch and Triton.
    """
    script = Path(__file__).with_name("triton_aot.py")
    sources = [script, *sorted((build.ROOT / "tcm_fused").rglob("*.py"))]
    content = build.digest(*(path.read_text() for path in sources), *map(version, ("torch", "triton")))

    def compile_all(name: str) -> Report:
        target = build.KEPT / f"triton-{name}-{content}.jsonl"
        with build.once(target) as new:
            if new is not None:
                environment = {**os.environ, "TRITON_INTERPRET": "0"}
                done = subprocess.run(
                    [sys.executable, script, name], capture_output=True, text=True, env=environment, check=False
                )
                assert done.returncode == 0, done.stderr
                new.write_text(done.stdout)
        return [json.loads(line) for line in target.read_text().splitlines()]

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(ARCHITECTURES, pool.map(compile_all, ARCHITECTURES), strict=True))


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_every_kernel_is_there(architecture: str, reports: dict[str, Report]) -> None:
    """Both precisions, all forms of both products, and the small kernels."""
    rows = reports[architecture]
    assert {row["kernel"] for row in rows} == PRODUCTS | {
        "normalise",
        "tile_sums",
        "lists",
        "collect",
        "totals",
        "project",
    }
    forms = {(row["variant"]["PARTS"], row["variant"]["SELF"]) for row in rows if row["kernel"] == "similarity"}
    assert forms >= {(1, 0), (1, 1), (1, 2), (2, 1), (2, 2)}
    forms = {(row["variant"]["PARTS"], row["variant"]["TRANSPOSED"]) for row in rows if row["kernel"] == "masked_sum"}
    assert forms == {(parts, transposed) for parts in (1, 2) for transposed in (False, True)}
    assert {"loss" in row["variant"] for row in rows if row["kernel"] == "totals"} == {False, True}


def test_nothing_is_spilled(architecture: str, reports: dict[str, Report]) -> None:
    for row in reports[architecture]:
        assert (row["spilled"], row["local"]) == (0, 0), row


def test_no_warning(architecture: str, reports: dict[str, Report]) -> None:
    """Above all not that wgmma is serialised (C7510 to C7515)."""
    for row in reports[architecture]:
        assert not row["warnings"], row


def test_shared_memory_fits(architecture: str, reports: dict[str, Report]) -> None:
    limit = EXPECTED[architecture][2] * 1024
    for row in reports[architecture]:
        assert row["shared"] <= limit, row


def test_products_run_on_tensor_cores(architecture: str, reports: dict[str, Report]) -> None:
    """With loads that run ahead, and no other generation's instruction."""
    unit, loads, _ = EXPECTED[architecture]
    for row in reports[architecture]:
        found = {name for name in ("HMMA", "HGMMA", "UTCHMMA") if row[name]}
        assert found == ({unit} if row["kernel"] in PRODUCTS else set()), row
        assert row["kernel"] not in PRODUCTS or row[loads] > 0, row


def test_no_stub(architecture: str, reports: dict[str, Report]) -> None:
    """A kernel that cannot run on the architecture may be compiled to a trap."""
    for row in reports[architecture]:
        assert not row["trap"], row
        assert row["instructions"] > 50, row
