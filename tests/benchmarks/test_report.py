"""The tables and pictures of `make bench`: those of a training step's parts on made-up times."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from benchmarks.speed import figures
from benchmarks.speed.figures import draw_cost
from benchmarks.speed.report import cost_table, goal_table, goals, main, opis_table, time_table

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


def figure_of(monkeypatch: pytest.MonkeyPatch, name: str) -> Figure:
    """A picture of the committed run, as it is saved."""
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "_save", lambda figure, hardware, target: drawn.append(figure))
    result = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text())
    infos = {benchmark["name"]: benchmark["extra_info"] for benchmark in result["benchmarks"]}
    getattr(figures, f"draw_{name}")(infos, "", Path("unused.png"))
    drawn[0].draw_without_rendering()
    return drawn[0]


def test_no_line_runs_through_a_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure that stands where the line of one product is breaks it, and no figure covers its bar."""
    axes = figure_of(monkeypatch, "speed").axes[0]
    (line,) = axes.lines
    height = axes.transData.transform((0, 1))[1]
    crossed = 0
    for text in axes.texts:
        box = text.get_window_extent()
        patch = text.get_bbox_patch()
        assert patch is not None and patch.get_facecolor() == (1, 1, 1, 1)
        assert text.get_zorder() > line.get_zorder()
        crossed += box.y0 < height < box.y1
        assert not any(patch.get_window_extent().overlaps(bar.get_window_extent()) for bar in axes.patches)
    assert crossed >= 1


@pytest.mark.parametrize("name", ["growth", "cost", "speed"])
def test_thousands_are_written_alike(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for axes in figure_of(monkeypatch, name).axes:
        for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
            assert not any(re.search(r"(?<![\d.])\d{4}", label.get_text()) for label in labels)


@pytest.mark.parametrize("name", ["growth", "cost", "speed"])
def test_legends_hide_nothing(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for axes in figure_of(monkeypatch, name).axes:
        legend = axes.get_legend()
        if legend is None:
            continue
        box = legend.get_window_extent()
        for line in axes.lines:
            points = axes.transData.transform(np.asarray(line.get_xydata()))
            steps = np.linspace(points[:-1], points[1:], 50).reshape(-1, 2)
            assert not any(box.contains(x, y) for x, y in steps)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"benchmarks": [3]}', '{"benchmarks": []}', b"\xff"])
def test_damaged_results(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any) -> None:
    """The file is named, and nothing is drawn."""
    path = tmp_path / "cpu.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for given, message in ((path, "holds no results of `make bench`"), (tmp_path / "none.json", "No such file")):
        with pytest.raises(SystemExit) as left:
            main([str(given)])
        assert left.value.code == 2
        said = capsys.readouterr().err
        assert str(given) in said and message in said
    assert list(tmp_path.iterdir()) == [path]


def test_page_shows_these_figures() -> None:
    """After `make bench`, its output goes into the page."""
    page = (ROOT / "docs/results.md").read_text()
    result = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())
    infos = {benchmark["name"]: benchmark["extra_info"] for benchmark in result["benchmarks"]}
    codes = result["machine_info"].get("codes", "")
    for table in (goal_table(goals(infos, codes)), time_table(infos), opis_table(infos), cost_table(infos)):
        assert table in page
