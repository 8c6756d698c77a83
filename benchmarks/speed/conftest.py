"""The gate before every figure, and a result file that is small, says what it ran on, and names no host."""

import os
import platform
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytorch_metric_learning
import torch

from benchmarks.speed.gate import DENSITIES, check_fused
from tcm_fused import __version__, tcm_loss
from tcm_fused.backends import choice

_LOAD_BEFORE = os.getloadavg()[0]  # others' work on this machine: near 0, or the times mean little


@pytest.fixture(scope="session", autouse=True)
def right_before_fast() -> None:
    """Every benchmark of the session fails if the loss is not right."""
    for hard in DENSITIES:
        check_fused(tcm_loss, hard)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What a reader needs to place the figures, instead of the host's name and every CPU flag."""
    cpu = machine_info["cpu"].get("brand_raw", platform.machine())
    build = choice.build_info() or {}
    codes = "AMX" if "amx_int8" in machine_info["cpu"].get("flags", ()) else "VNNI"
    machine_info.clear()
    machine_info.update(
        cpu=cpu,
        instruction_set=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        load_before=round(_LOAD_BEFORE, 2),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        tcm_fused=__version__,
        backend="cpu" if choice.why_unavailable("cpu") is None else "torch",
        build=build,
        codes=codes if "8 bits" in build.get("cpu_codes", "") else "",  # what multiplies them
        pytorch_metric_learning=pytorch_metric_learning.__version__,
    )


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    """The commit and whether the tree had changes; branch and project names say nothing more."""
    for name in commit_info.keys() - {"id", "time", "dirty"}:
        del commit_info[name]


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Keep name, sizes and figures of each benchmark; `extra_info` holds the times of all peers, ours among them."""
    output_json["benchmarks"] = [
        {name: benchmark[name] for name in ("group", "name", "extra_info")} for benchmark in output_json["benchmarks"]
    ]


def pytest_configure(config: pytest.Config) -> None:
    """Make the folder of the result file: pytest-benchmark opens the file before any test runs."""
    if target := config.getoption("benchmark_json", None):
        Path(getattr(target, "name", target)).parent.mkdir(parents=True, exist_ok=True)
