"""The table and the picture of a training step's parts, on made-up times."""

import json
from pathlib import Path
from typing import Any

from benchmarks.figures import draw_cost
from benchmarks.report import cost_table, goal_table, goals, opis_table, time_table

ROOT = Path(__file__).parents[2]


def step(n: int, left_out: dict[str, str], shares: dict[str, float], **medians: float) -> dict[str, Any]:
    seconds = {name.replace("_loss", " loss"): {"median": time, "runs": 5} for name, time in medians.items()}
    return {"n": n, "classes": 7, "seconds": seconds, "share": shares, "left_out": left_out}


INFOS = {
    "test_cost[256]": step(
        256,
        {},
        {"tcm_fused": 0.0071, "eager": 0.015, "pytorch-metric-learning": 0.98},
        **{"network": 0.08, "base_loss": 0.1, "tcm_fused": 0.0013, "eager": 0.0027, "pytorch-metric-learning": 9.8},
    ),
    "test_cost[2048]": step(
        2048,
        {"pytorch-metric-learning": "needs about 71 GB"},
        {"tcm_fused": 0.0112, "eager": 0.068},
        network=0.5,
        base_loss=0.7,
        tcm_fused=0.0136,
        eager=0.0871,
    ),
    "test_opis[8192]": {"n": 8192},
    "test_cost[64]": {"n": 64, "left_out": {}},  # of a run that timed nothing
}


def test_cost_table() -> None:
    assert cost_table(INFOS).splitlines()[2:] == [
        "| 256 | 80 ms | 100 ms | 1.3 ms: 0.71 % | 2.7 ms: 1.5 % | 9,800 ms: 98 % |",
        "| 2048 | 500 ms | 700 ms | 13.6 ms: 1.1 % | 87.1 ms: 6.8 % | needs about 71 GB |",
    ]


def test_cost_picture(tmp_path: Path) -> None:
    timed = {name: info for name, info in INFOS.items() if "seconds" in info}
    draw_cost(timed, "a machine", tmp_path / "cost.png")
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_page_shows_these_figures() -> None:
    """After `make bench`, what it printed goes into the page."""
    page = (ROOT / "docs/results.md").read_text()
    benchmarks = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())["benchmarks"]
    infos = {benchmark["name"]: benchmark["extra_info"] for benchmark in benchmarks}
    for table in (goal_table(goals(infos)), time_table(infos), opis_table(infos), cost_table(infos)):
        assert table in page
