"""The drawings of a benchmark run, for the README."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Infos = dict[str, dict[str, Any]]

# Okabe and Ito's palette, which colour-blind readers can tell apart; markers differ as well.
STYLE = {
    "tcm_fused": {"color": "#0072B2", "marker": "o"},
    "eager": {"color": "#E69F00", "marker": "s"},
    "torch.compile": {"color": "#009E73", "marker": "^"},
}
GREY = "#666666"
BYTES_PER_MIB = 2**20

matplotlib.rcParams.update(
    {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "legend.frameon": False,
    }
)


def draw_speed(infos: Infos, hardware: str, target: Path) -> None:
    """Left: time relative to one similarity product, for each density. Right: time of small batches."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_densities(left, infos)
    _draw_small(right, infos)
    _save(figure, hardware, target)


def draw_growth(infos: Infos, hardware: str, target: Path) -> None:
    """Time and peak memory against N on log axes, with guides of the slopes they should have."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    grown = _family(infos, "test_growth")
    for axes, title, power, divisor in (
        (left, "Time grows with N²", 2, 1.0),
        (right, "Peak memory grows with N", 1, BYTES_PER_MIB),
    ):
        for name in ("tcm_fused", "eager"):
            points = [
                (info["n"], (info["seconds"][name]["median"] if power == 2 else info["peak_bytes"][name]) / divisor)
                for info in grown
                if name in info["seconds"]
            ]
            if points:
                axes.plot(*zip(*points, strict=True), **STYLE[name], label=name, linewidth=2)
        axes.set_title(title)
        _log_axes(axes, [info["n"] for info in grown])
    left.set_ylabel("loss and gradient, seconds")
    right.set_ylabel("beyond the embeddings, MiB")
    _save(figure, hardware, target)


def _draw_densities(axes: Axes, infos: Infos) -> None:
    grown = _family(infos, "test_density")
    names = [name for name in STYLE if all(name in info["ratio"] or name == "tcm_fused" for info in grown)]
    width = 0.8 / len(names)
    for k, name in enumerate(names):
        for place, info in enumerate(grown):
            product = info["seconds"]["product"]["median"]
            reading = info["seconds"][name]
            height = reading["median"] / product
            x = place + (k - (len(names) - 1) / 2) * width
            axes.bar(x, height, 0.92 * width, color=STYLE[name]["color"], label=name if place == 0 else None)
            axes.text(x, height, f"{height:.2f}" if height < 2 else f"{height:.1f}", ha="center", va="bottom", fontsize=9)
    axes.axhline(1, color="black", linewidth=1, linestyle="--")
    axes.set_xticks(range(len(grown)), [info["hard"] for info in grown])
    axes.set_xlabel("hard negatives")
    axes.set_ylabel("time / time of one product")
    axes.set_title("Loss and gradient, N = 8192, D = 512")
    axes.legend()


def _draw_small(axes: Axes, infos: Infos) -> None:
    grown = _family(infos, "test_small")
    for name, style in STYLE.items():
        axes.plot(
            [info["n"] for info in grown], [1e3 * info["seconds"][name]["median"] for info in grown], **style, label=name
        )
    axes.set_title("Small batches, D = 128")
    axes.set_ylabel("loss and gradient, ms")
    _log_axes(axes, [info["n"] for info in grown])


def _family(infos: Infos, test: str) -> list[dict[str, Any]]:
    return [info for name, info in infos.items() if name.startswith(test + "[")]


def _log_axes(axes: Axes, sizes: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{n:,}" for n in sizes])
    axes.set_xlabel("batch size N")
    axes.grid(alpha=0.3)


def _save(figure: Figure, hardware: str, target: Path) -> None:
    figure.supxlabel(hardware, fontsize=8, color=GREY)
    figure.savefig(target, dpi=150)
