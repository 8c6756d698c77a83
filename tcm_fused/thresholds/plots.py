"""Pictures of `OPISResult`, `Calibration` and `Margins`. The only file that needs matplotlib.

Each function draws on `axes`, or on those of a new figure that no window shows, and returns them:
`result.plot().figure.savefig("utility.png")`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tcm_fused.thresholds.calibration import Calibration, Margins
from tcm_fused.thresholds.evaluation import Evaluation
from tcm_fused.thresholds.opis import OPISResult
from tcm_fused.thresholds.rates import percent
from tcm_fused.thresholds.threshold import SCORE
from tcm_fused.thresholds.trials import TrialResult

try:
    from matplotlib.axes import Axes
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.ticker import MaxNLocator, ScalarFormatter
    from matplotlib.transforms import Bbox
except ImportError as error:
    raise ImportError("pictures need matplotlib: pip install matplotlib") from error

# From Paul Tol's "muted" colours, which the colour-blind can tell apart; line styles differ as well.
BLUE, ROSE, GREEN, SAND = "#332288", "#CC6677", "#117733", "#999933"
GREY, INK = "#88929E", "#333333"
_PAPER: Any = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}  # behind names


def plot_utility(result: OPISResult, axes: Axes | None = None) -> Axes:
    """Utility of every class over the threshold, their mean, the mean of the worst classes, and the calibration range.

    The closer the thin lines lie to their mean within the range, the better one threshold serves all classes.
    """
    own = axes is None
    axes = axes or new_axes()
    euclidean = result.axis == "euclidean"
    x, utility = result.thresholds, result.utility
    if result.curves is not None:
        wide = result.curves.distance if euclidean else result.curves.similarity
        order = np.argsort(wide)
        x, utility = wide[order], result.curves.utility[:, order]
        _draw_range(axes, result.thresholds, result.far)
    lines = np.stack([np.broadcast_to(x, utility.shape), utility], axis=-1)
    alpha = float(np.clip(60 / len(utility), 0.03, 0.6))
    # Drawn as pixels in vector formats too: there may be thousands.
    axes.add_collection(LineCollection(list(lines), colors=GREY, linewidths=0.8, alpha=alpha, rasterized=True))
    order = np.argsort(result.class_utility, kind="stable")[: int(np.ceil(result.epsilon * len(utility) - 1e-9))]
    worst = utility[order].mean(axis=0)
    axes.plot(x, utility.mean(axis=0), color=BLUE, linewidth=2.4, label="mean of all classes")
    axes.plot(x, worst, color=ROSE, linewidth=2.4, linestyle="--", label=f"mean of the worst {_rate(result.epsilon)}")
    label = f"each of {len(utility):,} classes" if len(utility) > 1 else "the only class"
    axes.plot([], [], color=GREY, linewidth=1, label=label)
    low = max(0.0, float(min(np.quantile(utility, 0.002), worst.min())) - 0.1)
    axes.set(xlim=(x[0], x[-1]), ylim=(low, 1.0 + 0.03 * (1 - low)))
    axes.set_xlabel("threshold (Euclidean distance)" if euclidean else "threshold (cosine similarity)")
    axes.set_ylabel(f"utility $U_c$, $\\beta$ = {result.beta:g}")
    _entitle(axes, f"OPIS {result.opis:.3g}  ", f"{percent(result.epsilon)}-OPIS {result.eps_opis:.3g}")
    finish(axes, own, columns=2)
    return axes


def plot_similarities(
    result: OPISResult | Calibration | Margins | Evaluation | TrialResult, axes: Axes | None = None
) -> Axes:
    """Similarities of positive and negative pairs, with the range, the threshold or the margins that were found."""
    own = axes is None
    axes = axes or new_axes()
    edges, *counts = result.histogram
    names = ("positive pairs", "negative pairs")
    for count, name, colour, style in zip(counts, names, (BLUE, ROSE), ("-", "--"), strict=True):
        density = count / max(count.sum(), 1) / np.diff(edges)
        axes.stairs(density, edges, fill=True, color=colour, alpha=0.25, linewidth=0)
        label = f"{name} ({_thousands(int(count.sum()))})"
        axes.stairs(density, edges, color=colour, linewidth=1.6, linestyle=style, label=label)
    marks: list[tuple[float, str, str]] = []
    if isinstance(result, Margins):
        marks.append((result.margin_minus, f"$m_-$ = {_similarity(result.margin_minus)}", ROSE))
        marks.append((result.margin_plus, f"$m_+$ = {_similarity(result.margin_plus)}", BLUE))
        _entitle(axes, f"Mined: {_rate(result.share_plus)} of positives,", f"{_rate(result.share_minus)} of negatives")
    elif not isinstance(result, OPISResult):
        at, rates = result.threshold.similarity, result.threshold if isinstance(result, Calibration) else result
        marks.append((at, f"threshold {_similarity(at)}", GREEN))
        _entitle(axes, f"False accepts {_rate(rates.far)},", f"false rejects {_rate(rates.frr)}")
    else:
        _draw_range(axes, result.similarity, result.far)
    ends = result.similarity[[0, -1]].tolist() if isinstance(result, OPISResult) else [mark for mark, _, _ in marks]
    axes.set_ylim(0, axes.get_ylim()[1] * (1.1 + 0.08 * len(marks)))  # a line for each mark's name
    axes.set_xlim(*_extent(edges, counts, ends))
    _draw_marks(axes, sorted(marks), named=own)
    axes.ticklabel_format(axis="x", useOffset=False)  # similarities near 1 as they are, and therefore few
    ticks = round(1.4 * width_of(axes) * (1 if np.diff(axes.get_xlim())[0] > 0.1 else 0.4))
    axes.xaxis.set_major_locator(MaxNLocator(max(ticks, 2), steps=[1, 2, 2.5, 5, 10]))
    is_score = isinstance(result, TrialResult) and result.threshold.metric == SCORE
    axes.set_xlabel("score" if is_score else "cosine similarity")
    axes.set_ylabel("density of pairs (area 1 each)")
    finish(axes, own, columns=2)
    return axes


def _draw_range(axes: Axes, thresholds: Any, far: Any) -> None:
    """The calibration range; its edges show where it is narrower than a line."""
    label = f"calibration range, FAR {_rate(far.min())} to {_rate(far.max())}"
    low, high = float(thresholds.min()), float(thresholds.max())
    axes.axvspan(low, high, facecolor=SAND, edgecolor=SAND, alpha=0.25, linewidth=1, label=label)


def _draw_marks(axes: Axes, marks: list[tuple[float, str, str]], named: bool) -> None:
    """A line at each ascending mark, with its name beside it, or, where the legend is near, in that.

    Of two the lower's is to the left, the higher's to the right, where there is room for it, and a line of text lower,
    since they may be near each other.
    """
    left, right = axes.get_xlim()
    room = 95 / (72 * width_of(axes))  # for a name, of the width
    for place, (x, text, colour) in enumerate(marks):
        label = None if named else text
        axes.axvline(x, color=colour, linewidth=1.8, linestyle=("--", "-.")[place % 2], label=label)
        if not named:
            continue
        at = (x - left) / (right - left)
        leftwards = at > 1 - room or (len(marks) > 1 and place == 0 and at > room)
        axes.annotate(
            text,
            (x, 0.98),
            (-5 if leftwards else 5, -16 * place),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            ha="right" if leftwards else "left",
            va="top",
            fontsize=10,
            color=colour,
            bbox=_PAPER,
        ).set_in_layout(False)


def plot_pareto(results: Mapping[str, OPISResult], axes: Axes | None = None) -> Axes:
    """OPIS against recognition error of several models, and which of them no other beats in both.

    Names stand beside the points where there is room for all of them, else numbers, with a key below.
    """
    own = axes is None
    axes = axes or new_axes()
    points = sorted((100 * (1 - r.recall_at_1), r.opis, name) for name, r in results.items())
    front: list[tuple[float, float]] = []
    for error, score, _ in points:
        if not front or score < front[-1][1] or (error, score) == front[-1]:  # an equal one is as good
            front.append((error, score))
    x, y = (np.array([p[k] for p in front]) for k in (0, 1))
    axes.step(x, y, where="post", color=GREY, linewidth=1.4, linestyle="--", zorder=1, label="Pareto front")
    best: dict[str, Any] = {"marker": "o", "color": BLUE, "linewidths": 1.8}
    beaten: dict[str, Any] = {"marker": "s", "facecolors": "white", "edgecolors": ROSE, "linewidths": 1.8}
    for error, score, _ in points:  # in front of the axis, where they may lie on it
        axes.scatter(error, score, s=70, zorder=3, clip_on=False, **(best if (error, score) in front else beaten))
    axes.margins(x=0.12)
    left, right = axes.get_xlim()
    axes.set_xlim(max(left, -0.06 * right), right)
    axes.set_ylim(0, (1.15 if own else 1.6) * max(p[1] for p in points) or 0.01)  # with room for a legend within
    axes.scatter([], [], s=60, label="no other is better in both", **best)
    axes.scatter([], [], s=60, label="another is better in both", **beaten)
    axes.set_xlabel("recognition error, 100 % - recall@1 (%)")
    axes.set_ylabel("OPIS")
    axes.set_title("Lower left is better", loc="left", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    for axis, largest in ((axes.xaxis, points[-1][0]), (axes.yaxis, axes.get_ylim()[1])):
        formatter = ScalarFormatter(useOffset=False)
        # A power of ten would stand beside the axis, where the title is.
        axis.set_major_formatter(formatter if largest > 1e-3 else "{x:.4g}")
    finish(axes, own, columns=3, corner=True)
    names = [shortened(name) for _, _, name in points]
    if not _name_points(axes, points, names):
        _name_points(axes, points, [str(k + 1) for k in range(len(points))], must=True)
        _add_key(axes, own, [f"{k + 1}  {name}" for k, name in enumerate(names)])
    return axes


def _name_points(
    axes: Axes, points: Sequence[tuple[float, float, str]], names: Sequence[str], must: bool = False
) -> bool:
    """Write each name near its point, within the axes, where it covers no point, no other name and not the legend.

    False, with none written, if one has no such place, unless it `must`: then it goes beside its point.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # settles where the axes are
    inside = axes.get_window_extent()
    at = axes.transData.transform([p[:2] for p in points])
    radius = 6 / 72 * figure.dpi
    taken = [Bbox.from_extents(x - radius, y - radius, x + radius, y + radius) for x, y in at]
    legend = axes.get_legend()
    if legend is not None:
        taken.append(legend.get_window_extent())
    written: list[Annotation] = []
    for name, point in zip(names, points, strict=True):
        text, fits = _write_name(axes, name, point[:2], inside, taken, must)
        written.append(text)
        if not fits and not must:
            for text in written:
                text.remove()
            return False
        taken.append(text.get_window_extent())
    return True


def _write_name(
    axes: Axes, name: str, point: tuple[float, float], inside: Bbox, taken: list[Bbox], far: bool
) -> tuple[Annotation, bool]:
    """The name at the first of the places around its point that is free; farther away with a line to it."""
    text = axes.annotate(
        name, point, (9, 0), textcoords="offset points", va="center", fontsize=9.5, color=INK, zorder=4, bbox=_PAPER
    )
    text.set_in_layout(False)
    # To the right, left, above and below, and between; then on wider and wider rings.
    places = [(9.0, angle) for angle in (0, 180, 90, 270, 45, 135, 315, 225)]
    places += [(radius, angle) for radius in range(18, 100, 9) for angle in range(0, 360, 20)] if far else []
    for radius, angle in places:
        dx, dy = radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle))
        text.set_position((dx, dy))
        text.set_horizontalalignment("left" if dx > 1 else "right" if dx < -1 else "center")
        text.set_verticalalignment("bottom" if dy > 7 else "top" if dy < -7 else "center")
        box = text.get_window_extent()
        if not box.overlaps(inside):
            continue
        within = inside.x0 + 3 <= box.x0 and box.x1 <= inside.x1 and inside.y0 + 3 <= box.y0 and box.y1 <= inside.y1
        if within and not any(box.overlaps(other) for other in taken):
            if radius > 9:
                line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.8, "shrinkB": 4}
                axes.annotate("", point, (dx, dy), textcoords="offset points", arrowprops=line).set_in_layout(False)
            return text, True
    text.set(position=(9, 0), horizontalalignment="left", verticalalignment="center")
    return text, False


def _add_key(axes: Axes, own: bool, lines: list[str]) -> None:
    """Names by number below the picture; one of our own grows by them."""
    columns = max(1, min(3, int(10.5 * width_of(axes) / max(map(len, lines)))))
    rows = math.ceil(len(lines) / columns)
    filled = [lines[k * rows : (k + 1) * rows] for k in range(columns)]
    below = 78  # points, for the axis's own text and the legend
    if own:
        figure = axes.get_figure(root=True)
        assert figure is not None
        width, height = figure.get_size_inches()
        figure.set_size_inches(width, height + 13 * rows / 72)
    for k, column in enumerate(filled):
        axes.annotate(
            "\n".join(column),
            (k / columns, 0),
            (0, -below),
            xycoords="axes fraction",
            textcoords="offset points",
            va="top",
            fontsize=9,
            color=INK,
        )


def shortened(name: str, most: int = 44) -> str:
    """A name for a picture: on one line, without its middle where it is long, and no formula."""
    name = " ".join(name.split())
    name = name if len(name) <= most else f"{name[: most * 3 // 5]}...{name[most * 3 // 5 + 3 - most :]}"
    return name.replace("$", r"\$")


def new_axes() -> Axes:
    """Of a figure of its own, which no window shows."""
    return Figure(figsize=(7.2, 4.6), dpi=150, layout="constrained").subplots()


def width_of(axes: Axes) -> float:
    """In inches, before the layout is settled."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    return float(axes.get_position().width * figure.get_size_inches()[0])


def _entitle(axes: Axes, first: str, second: str) -> None:
    """On one line where the axes are wide enough."""
    axes.set_title(first + ("\n" if width_of(axes) < 4.2 else " ") + second, loc="left", color=INK)


def finish(axes: Axes, own: bool, columns: int, corner: bool = False) -> None:
    """Grid, frame and legend, alike in all pictures."""
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if own:  # below the picture, where it hides nothing
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns, frameon=False, fontsize=9.5)
    else:  # beside other axes there is no room for it but within
        axes.legend(loc="upper right" if corner else "best", fontsize=8, framealpha=0.85, edgecolor="none")


def _extent(edges: Any, counts: Any, marks: list[float]) -> tuple[float, float]:
    """Where nearly all pairs of both kinds lie, and the marks."""
    low, high = min(marks), max(marks)
    for count in counts:
        share = np.cumsum(count) / max(count.sum(), 1)
        low = min(low, edges[:-1][np.searchsorted(share, 0.0005)])
        high = max(high, edges[1:][min(np.searchsorted(share, 0.9995), len(count) - 1)])
    pad = 0.03 * (high - low) or 0.01
    return float(low - pad), float(high + pad)


def _rate(share: float) -> str:
    return f"{100 * share:.3g} %"


def _similarity(value: float) -> str:
    """To three digits, and to more where that would be 1 but is not."""
    near = abs(value) != 1 and round(abs(value), 3) == 1
    return f"{value:.6f}" if near else f"{value:.3f}".replace("-0.000", "0.000")


def _thousands(count: int) -> str:
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if count >= size:
            return f"{count / (1e3 if unit == ' k' else size):.3g}{unit}"
    return f"{count:,}"
