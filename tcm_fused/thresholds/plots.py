"""Pictures of `OPISResult`, `Calibration` and `Margins`. The only file that needs matplotlib.

Each function draws on `axes`, or on those of a new figure that no window shows, and returns them:
`result.plot().figure.savefig("utility.png")`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tcm_fused.thresholds.calibration import Calibration, Margins
from tcm_fused.thresholds.opis import OPISResult

try:
    from matplotlib.axes import Axes
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError("pictures need matplotlib: pip install matplotlib") from error

# From Paul Tol's "muted" colours, which the colour-blind can tell apart; line styles differ as well.
BLUE, ROSE, GREEN, SAND = "#332288", "#CC6677", "#117733", "#999933"
GREY, INK = "#88929E", "#333333"


def plot_utility(result: OPISResult, axes: Axes | None = None) -> Axes:
    """Utility of every class over the threshold, their mean, the mean of the worst classes, and the calibration range.

    The closer the thin lines lie to their mean within the range, the better one threshold serves all classes.
    """
    axes = axes or _new_axes()
    euclidean = result.axis == "euclidean"
    x, utility = result.thresholds, result.utility
    if result.curves is not None:
        wide = result.curves.distance if euclidean else result.curves.similarity
        order = np.argsort(wide)
        x, utility = wide[order], result.curves.utility[:, order]
        axes.axvspan(result.thresholds[0], result.thresholds[-1], color=SAND, alpha=0.18, linewidth=0)
        axes.text(
            (result.thresholds[0] + result.thresholds[-1]) / 2,
            0.015,
            f"calibration range\nFAR {_rates(result.far)}",
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=9,
            color=INK,
        )
    lines = np.stack([np.broadcast_to(x, utility.shape), utility], axis=-1)
    alpha = float(np.clip(60 / len(utility), 0.03, 0.6))
    # Drawn as pixels in vector formats too: there may be thousands.
    axes.add_collection(LineCollection(list(lines), colors=GREY, linewidths=0.8, alpha=alpha, rasterized=True))
    order = np.argsort(result.class_utility, kind="stable")[: int(np.ceil(result.epsilon * len(utility) - 1e-9))]
    axes.plot(x, utility.mean(axis=0), color=BLUE, linewidth=2.4, label="mean of all classes")
    axes.plot(
        x,
        utility[order].mean(axis=0),
        color=ROSE,
        linewidth=2.4,
        linestyle="--",
        label=f"mean of the worst {_percent(result.epsilon)}",
    )
    axes.plot([], [], color=GREY, linewidth=1, label=f"each of {len(utility):,} classes")
    low = float(min(np.quantile(utility, 0.002), utility[order].mean(axis=0).min()))
    axes.set(xlim=(x[0], x[-1]), ylim=(max(0.0, low - 0.1), 1.0 + 0.03 * (1 - max(0.0, low - 0.1))))
    axes.set_xlabel("threshold: Euclidean distance of unit vectors" if euclidean else "threshold: cosine similarity")
    axes.set_ylabel(f"utility $U_c$ (F-score of the two rates, $\\beta$ = {result.beta:g})")
    axes.set_title(
        f"OPIS {result.opis:.3g}    {_percent(result.epsilon)}-OPIS {result.eps_opis:.3g}", loc="left", color=INK
    )
    _finish(axes)
    return axes


def plot_similarities(result: OPISResult | Calibration | Margins, axes: Axes | None = None) -> Axes:
    """Similarities of positive and negative pairs, with the range, the threshold or the margins that were found."""
    axes = axes or _new_axes()
    edges, *counts = result.histogram
    names = ("positive pairs", "negative pairs")
    for count, name, colour, style in zip(counts, names, (BLUE, ROSE), ("-", "--"), strict=True):
        density = count / max(count.sum(), 1) / np.diff(edges)
        axes.stairs(density, edges, fill=True, color=colour, alpha=0.25, linewidth=0)
        label = f"{name} ({_thousands(int(count.sum()))})"
        axes.stairs(density, edges, color=colour, linewidth=1.6, linestyle=style, label=label)
    marks: list[tuple[float, str, str]] = []
    if isinstance(result, Margins):
        marks.append((result.margin_minus, f"$m_-$ = {result.margin_minus:.3f}", ROSE))
        marks.append((result.margin_plus, f"$m_+$ = {result.margin_plus:.3f}", BLUE))
        axes.set_title(
            f"Mined: {_percent(result.share_plus)} of positives, {_percent(result.share_minus)} of negatives",
            loc="left",
            color=INK,
        )
    elif isinstance(result, Calibration):
        at = result.threshold
        marks.append((at.similarity, f"threshold {at.similarity:.3f}", GREEN))
        axes.set_title(f"False accepts {_percent(at.far)}, false rejects {_percent(at.frr)}", loc="left", color=INK)
    else:
        axes.axvspan(
            float(result.similarity.min()), float(result.similarity.max()), color=SAND, alpha=0.25, linewidth=0
        )
        middle = float(result.similarity.min() + result.similarity.max()) / 2
        marks.append((middle, f"range, FAR {_rates(result.far)}", INK))
    axes.set_ylim(0, axes.get_ylim()[1] * (1.1 + 0.08 * len(marks)))  # a line for each mark's name
    left, right = _extent(edges, counts, [mark for mark, _, _ in marks])
    axes.set_xlim(left, right)
    order = sorted(marks)
    for place, (x, text, colour) in enumerate(order):
        if not isinstance(result, OPISResult):
            axes.axvline(x, color=colour, linewidth=1.8, linestyle=("--", "-.")[place % 2])
        # The lower of two marks is named to its left, the higher to its right; near an end, inwards. A line lower, too:
        # they may be near each other.
        leftwards = x > left + 0.75 * (right - left) or (
            len(order) > 1 and place == 0 and x > left + 0.2 * (right - left)
        )
        centred = isinstance(result, OPISResult)
        axes.annotate(
            text,
            (x, 0.98),
            (0 if centred else -5 if leftwards else 5, -15 * place),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            ha="center" if centred else "right" if leftwards else "left",
            va="top",
            fontsize=10,
            color=colour,
        )
    axes.set_xlabel("cosine similarity")
    axes.set_ylabel("density of pairs (area 1 each)")
    _finish(axes)
    return axes


def plot_pareto(results: Mapping[str, OPISResult], axes: Axes | None = None) -> Axes:
    """OPIS against recognition error of several models, and which of them no other beats in both."""
    axes = axes or _new_axes()
    points = sorted((100 * (1 - r.recall_at_1), r.opis, name) for name, r in results.items())
    front: list[tuple[float, float, str]] = []
    for point in points:
        if not front or point[1] < front[-1][1]:
            front.append(point)
    x, y = (np.array([p[k] for p in front]) for k in (0, 1))
    axes.step(x, y, where="post", color=GREY, linewidth=1.4, linestyle="--", zorder=1, label="Pareto front")
    for error, score, name in points:
        best = (error, score, name) in front
        axes.scatter(
            error,
            score,
            s=70,
            marker="o" if best else "s",
            color=BLUE if best else "white",
            edgecolors=BLUE if best else ROSE,
            linewidths=1.8,
            zorder=2,
        )
    axes.margins(0.12)
    left, right = axes.get_xlim()
    axes.set_xlim(max(left, -1), right)
    axes.set_ylim(0, max(1.15 * max(p[1] for p in points), 1e-9))
    _name_points(axes, points)
    axes.scatter([], [], s=60, color=BLUE, label="no other is better in both")
    axes.scatter(
        [], [], s=60, color="white", marker="s", edgecolors=ROSE, linewidths=1.8, label="another is better in both"
    )
    axes.set_xlabel("recognition error, 100 % - recall@1 (%)")
    axes.set_ylabel("OPIS")
    axes.set_title("Lower left is better", loc="left", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    _finish(axes)
    return axes


def _name_points(axes: Axes, points: list[tuple[float, float, str]]) -> None:
    """Write each point's name beside it, on the first of six sides where it covers no point and no other name."""
    size, gap = 9.5, 9  # points, a 72nd of an inch
    scale = 72 / axes.figure.dpi
    # The layout is settled later and may shrink the axes a little; names are taken to be wider than they are.
    at = [tuple(scale * axes.transData.transform(p[:2])) for p in points]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in at]
    sides = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
    low, high = (scale * edge for edge in axes.get_window_extent().intervalx)
    for (x, y), point in zip(at, points, strict=True):
        width, height = 0.62 * size * len(point[2]), 1.2 * size
        for dx, dy in sides:
            left = x + dx * gap - (width if dx < 0 else width / 2 if dx == 0 else 0)
            bottom = y + dy * gap - height / 2
            box = (left, bottom, left + width, bottom + height)
            free = all(box[2] < t[0] or t[2] < box[0] or box[3] < t[1] or t[3] < box[1] for t in taken)
            if free and low <= box[0] and box[2] <= high:
                break
        taken.append(box)
        axes.annotate(
            point[2],
            point[:2],
            (dx * gap, dy * gap),
            textcoords="offset points",
            ha="left" if dx > 0 else "right" if dx < 0 else "center",
            va="center",
            fontsize=size,
            color=INK,
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        )


def _new_axes() -> Axes:
    return Figure(figsize=(7.2, 4.6), dpi=150, layout="constrained").subplots()


def _finish(axes: Axes) -> None:
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    # Below the picture, where it hides nothing.
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False, fontsize=9.5)


def _extent(edges: Any, counts: Any, marks: list[float]) -> tuple[float, float]:
    """Where nearly all pairs of both kinds lie, and the marks."""
    low, high = min(marks), max(marks)
    for count in counts:
        share = np.cumsum(count) / max(count.sum(), 1)
        low = min(low, edges[:-1][np.searchsorted(share, 0.0005)])
        high = max(high, edges[1:][min(np.searchsorted(share, 0.9995), len(count) - 1)])
    pad = 0.03 * (high - low) or 0.01
    return float(low - pad), float(high + pad)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _rates(rates: Any) -> str:
    return f"{_percent(float(rates.min()))} to {_percent(float(rates.max()))}"


def _thousands(count: int) -> str:
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if count >= size:
            return f"{count / (1e3 if unit == ' k' else size):.3g}{unit}"
    return f"{count:,}"
