"""The drawings of a benchmark run, for the README."""

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from tcm_fused.thresholds.outputs import write_whole

Infos = dict[str, dict[str, Any]]

# Okabe and Ito's palette, which colour-blind readers can tell apart; markers differ as well.
STYLE: dict[str, dict[str, Any]] = {
    "tcm_fused": {"color": "#0072B2", "marker": "o"},
    "eager": {"color": "#E69F00", "marker": "s"},
    "torch.compile": {"color": "#009E73", "marker": "^"},
}
COST_STYLE = {name: STYLE[name] for name in ("tcm_fused", "eager")} | {
    "pytorch-metric-learning": {"color": "#CC79A7", "marker": "D"}
}
GREY = "#666666"
BOX = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
LOOK: Any = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    # White without an edge: lines of the grid end there.
    "legend.framealpha": 1,
    "legend.edgecolor": "none",
    "legend.fancybox": False,
}


def draw_speed(infos: Infos, hardware: str, target: Path) -> None:
    """Left: time relative to one similarity product, for each density. Right: time of small batches."""
    with rc_context(LOOK):
        figure = Figure(figsize=(10, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(2, 1))
        _draw_densities(left, _family(infos, "test_density"))
        _draw_small(right, _family(infos, "test_small"))
        _save(figure, hardware, target)


def draw_growth(infos: Infos, hardware: str, target: Path) -> None:
    """Time and peak memory against N on log axes, with guides of the slopes they should have."""
    with rc_context(LOOK):
        figure = Figure(figsize=(10, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        grown = _family(infos, "test_growth")
        times = {
            name: [(i["n"], i["seconds"][name]["median"]) for i in grown if name in i["seconds"]] for name in STYLE
        }
        peaks = {
            name: [(i["n"], i["peak_bytes"][name] / 2**20) for i in grown if name in i["peak_bytes"]] for name in STYLE
        }
        _draw_growing(left, times, 2)
        _draw_growing(right, peaks, 1)
        own = [(i["n"], i["embedding_bytes"] / 2**20) for i in grown]
        right.plot(
            *zip(*own, strict=True), color="black", linestyle="-.", linewidth=1, label="the embeddings themselves"
        )
        left.set(title="Time of loss and gradient, D = 128", ylabel="seconds")
        right.set(title="Peak memory beyond the start, D = 128", ylabel="MiB")
        for axes in (left, right):
            axes.set_ylim(top=20 * axes.get_ylim()[1])  # room for the legend
            axes.legend(loc="upper left", fontsize=9, borderaxespad=0.4)
        _save(figure, hardware, target)


def draw_cost(infos: Infos, hardware: str, target: Path) -> None:
    """Left: the share of a training step that TCM takes. Right: the time of the parts of the step. Log axes."""
    with rc_context(LOOK):
        figure = Figure(figsize=(10, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        family = _family(infos, "test_cost")
        for name, style in COST_STYLE.items():
            there = [info for info in family if name in info["share"]]
            left.plot([i["n"] for i in there], [100 * i["share"][name] for i in there], **style, label=name)
            right.plot(*_medians(there, name), **style)
        for name, line in (("network", "-"), ("base loss", "--")):
            right.plot(*_medians(family, name), color="black", linestyle=line, linewidth=1.2, label=name)
        left.set(title="TCM's share of a training step", ylabel="% of the step")
        right.set(title="Time of the parts, TCM in the same colours", ylabel="seconds")
        for axes in (left, right):
            _log_axes(axes, [info["n"] for info in family])
        left.set_ylim(top=130)
        left.legend(loc="center left", bbox_to_anchor=(0.02, 0.72), fontsize=10)
        right.legend(loc="lower right", fontsize=10)
        what = f"residual MLP, ArcFace of {family[0]['classes']:,} classes, D = 512, half of the negatives hard"
        _save(figure, f"{what}\n{hardware}", target)


def _medians(family: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Batch sizes and median seconds of one part of the step."""
    return [info["n"] for info in family], [info["seconds"][name]["median"] for info in family]


def _draw_densities(axes: Axes, family: list[dict[str, Any]]) -> None:
    width = 0.88 / len(STYLE)
    for k, (name, style) in enumerate(STYLE.items()):
        for place, info in enumerate(family):
            height = info["seconds"][name]["median"] / info["seconds"]["product"]["median"]
            x = place + (k - (len(STYLE) - 1) / 2) * width
            axes.bar(x, height, 0.88 * width, color=style["color"], label=name if place == 0 else None)
            shown = f"{height:.2f}" if height < 2 else f"{height:.1f}"
            # The white box breaks the line of one product where a figure stands on it.
            above: Any = {"xytext": (0, 2), "textcoords": "offset points", "ha": "center", "va": "bottom"}
            axes.annotate(shown, (x, height), **above, fontsize=8, bbox=BOX)
    axes.axhline(1, color="black", linewidth=1, linestyle="--", label=r"one product $\hat X \hat X^T$")
    axes.set_xticks(range(len(family)), [_share(info) for info in family])
    axes.margins(y=0.3)  # room for the legend
    axes.set_ylim(bottom=0)
    axes.set(xlabel="negatives that are hard", ylabel=r"time, in products $\hat X \hat X^T$")
    axes.set_title("Loss and gradient, N = 8192, D = 512")
    axes.legend(ncols=2, loc="upper left", fontsize=9)


def _share(info: dict[str, Any]) -> str:
    """ "few" and the like, with the share of the negatives that it stands for."""
    share = info["hard_negatives"] / info["n"] ** 2
    return info["hard"] if share < 1e-9 or share > 0.99 else f"{info['hard']}\n({100 * share:.2g} %)"


def _draw_small(axes: Axes, family: list[dict[str, Any]]) -> None:
    for name, style in STYLE.items():
        points = [(info["n"], 1e3 * info["seconds"][name]["median"]) for info in family]
        axes.plot(*zip(*points, strict=True), **style, label=name)
    axes.set(title="Small batches, D = 128", ylabel="milliseconds")
    _log_axes(axes, [info["n"] for info in family])


def _draw_growing(axes: Axes, curves: dict[str, list[tuple[int, float]]], power: int) -> None:
    """Curves of (N, value), and through the last point of ours the slope N^power."""
    for name, points in curves.items():
        if points:
            axes.plot(*zip(*points, strict=True), **STYLE[name], label=name)
    ours = curves["tcm_fused"]
    (first, _), (last, value) = ours[0], ours[-1]
    guide = [value * (first / last) ** power, value]
    axes.plot([first, last], guide, color=GREY, linestyle=":", label="slope $N^2$" if power == 2 else "slope $N$")
    _log_axes(axes, [n for n, _ in ours])


def _log_axes(axes: Axes, sizes: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{n:,}" for n in sizes])
    axes.yaxis.set_major_locator(LogLocator(10, numticks=12))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.set_xlabel("batch size N")


def _family(infos: Infos, test: str) -> list[dict[str, Any]]:
    """What the runs of one parametrised test recorded."""
    return [info for name, info in infos.items() if name.startswith(test + "[")]


def _save(figure: Figure, hardware: str, target: Path) -> None:
    figure.supxlabel(f"{hardware}, median of alternating runs", fontsize=9, color=GREY)
    write_whole(target, lambda part: figure.savefig(part, format="png", dpi=150))
