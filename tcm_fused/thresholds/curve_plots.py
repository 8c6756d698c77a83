"""Pictures of error rates: DET and ROC curves, rates of each class or group, and how sure a probability is.

Each function draws on `axes`, or on those of a new figure that no window shows, and returns them. Needs matplotlib.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Any, Protocol

import numpy as np
from matplotlib.axes import Axes

from tcm_fused.thresholds.calibration import Calibration
from tcm_fused.thresholds.evaluation import Evaluation
from tcm_fused.thresholds.intervals import binomial_interval, effective_pairs
from tcm_fused.thresholds.plots import BLUE, GREEN, GREY, INK, ROSE, SAND, finish, new_axes, shortened, width_of
from tcm_fused.thresholds.probability import Reliability
from tcm_fused.thresholds.retrieval import Retrieval
from tcm_fused.thresholds.sets import Array, shown
from tcm_fused.thresholds.targets import Curve, equal_error
from tcm_fused.thresholds.trials import TrialResult

_TICKS = (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99)
_STYLES = ((BLUE, "-"), (ROSE, "--"), (GREEN, "-."), (SAND, ":"), (GREY, (0, (5, 1))))


class _HasCurve(Protocol):
    @property
    def curve(self) -> Curve: ...


Curves = _HasCurve | Mapping[str, _HasCurve]


def plot_det(results: Curves, axes: Axes | None = None) -> Axes:
    """Detection error trade-off: false rejects over false accepts, on probit axes, where normal scores give a line.

    Of one result, or of several by name; the lower the better. A point is the threshold, a dotted line equal errors.
    """
    own, named = axes is None, _named(results)
    axes = axes or new_axes()
    curves = [result.curve for result in named.values()]
    low = max(min(0.05, *(0.5 / max(c.negatives, c.positives) for c in curves)), 1e-7)
    seen = [_corners(curve) for curve in curves]
    lowest = [_least([side[k] for side in seen], low) for k in (0, 1)]
    for (name, result), (colour, style) in zip(named.items(), _cycle(len(named)), strict=True):
        far, frr = _corners(result.curve)
        label = name or f"equal error {_percent(_equal_error(result.curve))}"
        axes.plot(_probit(far, low), _probit(frr, low), color=colour, linestyle=style, linewidth=2, label=label)
        _mark(axes, result, _onto(lowest[0], low), _onto(lowest[1], low))
    ends = _probit(np.array([low, 1 - low]), low)
    axes.plot(ends, ends, color=GREY, linestyle=":", linewidth=1.2, label="equal errors")
    apart = 0.5 / width_of(axes)  # of the width, that ticks need
    for axis, limit, least in ((axes.xaxis, axes.set_xlim, lowest[0]), (axes.yaxis, axes.set_ylim, lowest[1])):
        first, last = _probit(np.array([least, 0.99]), low)
        limit(first, last)
        at = np.array([-np.inf])
        kept = []
        for tick in (t for t in _TICKS if least <= t <= 0.99):  # but for those too near to the one before
            here = _probit(np.array([tick]), low)
            if here[0] - at[0] > apart * (last - first):
                at = here
                kept.append(tick)
        axis.set_ticks(_probit(np.array(kept), low).tolist(), [_percent(tick) for tick in kept])
    axes.set_xlabel("false accept rate")
    axes.set_ylabel("false reject rate")
    axes.set_title("Detection errors: lower left is better", loc="left", color=INK)
    finish(axes, own, columns=2)
    return axes


def plot_roc(results: Curves, axes: Axes | None = None) -> Axes:
    """True accepts over false accepts, on a logarithmic axis, where the small rates of deployment can be seen.

    Of one result, or of several by name. Of one the band has the 95 % intervals of the true accept rate at each
    threshold, for the number of independent pairs that the classes' rates at the result's own threshold tell of.
    """
    own, named = axes is None, _named(results)
    axes = axes or new_axes()
    least = min(0.1, *(1 / max(result.curve.negatives, 1) for result in named.values()))
    for (name, result), (colour, style) in zip(named.items(), _cycle(len(named)), strict=True):
        far, frr = _corners(result.curve)
        order = np.lexsort((-frr, far))  # of several thresholds at one rate the last has the highest line
        x, y = far[order], np.maximum.accumulate(1 - frr[order])
        band = _band(result, y) if len(named) == 1 else None
        if band is not None:
            low, high = band
            axes.fill_between(x, low, high, step="post", color=colour, alpha=0.18, linewidth=0, label="95 % band")
        label = name or f"{result.curve.positives:,} positive, {result.curve.negatives:,} negative pairs"
        axes.plot(x, y, drawstyle="steps-post", color=colour, linestyle=style, linewidth=2, label=label)
        _mark(axes, result, float, lambda frr: 1 - frr, least_far=least)
    axes.set_xscale("log")
    axes.set_xlim(least, 1)
    axes.set_ylim(top=1.01)
    axes.set_xlabel("false accept rate")
    axes.set_ylabel("true accept rate, 1 - false reject rate")
    axes.set_title("True accepts: upper left is better", loc="left", color=INK)
    finish(axes, own, columns=2)
    return axes


def plot_rates(result: Calibration | Evaluation, rate: str = "far", most: int = 40, axes: Axes | None = None) -> Axes:
    """A rate ("far" or "frr") of each group, where there are some, else of each class, the highest first.

    Of more than `most` classes the curve of all and the names of none; a line is the rate over all pairs.
    """
    axes = axes or new_axes()
    groups = getattr(result, "groups", None)
    kind, names, values = _rates_of(result, groups, rate)
    known = ~np.isnan(values)
    order = np.argsort(-values[known], kind="stable")
    names, values = [name for name, is_known in zip(names, known, strict=True) if is_known], values[known][order]
    names = [names[k] for k in order]
    total = result.threshold.far if rate == "far" else result.threshold.frr
    if isinstance(result, Evaluation):
        total = result.far if rate == "far" else result.frr
    x = np.arange(len(values))
    if len(values) <= most:
        axes.bar(x, 100 * values, color=BLUE if rate == "frr" else ROSE, width=0.75)
        longest = max(map(len, names), default=0)
        fits = longest * len(names) < 45
        axes.set_xticks(x, names, rotation=0 if fits else 60, ha="center" if fits else "right")
        axes.tick_params(axis="x", labelsize=8.5)
        axes.set_xlabel(kind)
    else:
        edges, steps = np.arange(len(values) + 1) - 0.5, 100 * np.append(values, values[-1])
        axes.fill_between(edges, steps, step="post", color=BLUE if rate == "frr" else ROSE, alpha=0.6, linewidth=0)
        axes.set_xlim(-0.5, len(values) - 0.5)
        axes.set_xlabel(f"{len(values):,} {'classes' if kind == 'class' else 'groups'}, the worst first")
    axes.axhline(100 * total, color=INK, linewidth=1.6, linestyle="--", label=f"over all pairs {_percent(total)}")
    text = "false accept rate" if rate == "far" else "false reject rate"
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"{text} of the {kind} (%)")
    axes.set_title(f"{text.capitalize()} of each {kind}", loc="left", color=INK)
    finish(axes, own=False, columns=1, corner=True)  # below the picture there are names
    return axes


def _rates_of(result: Calibration | Evaluation, groups: Any, rate: str) -> tuple[str, list[str], Array]:
    if groups is not None:
        names = groups.ids if groups.names is None else groups.names
        return "group", [shortened(shown(str(name)), 20) for name in names], groups.far if rate == "far" else groups.frr
    names = result.class_ids if result.class_names is None else result.class_names
    values = result.class_far if rate == "far" else result.class_frr
    return "class", [shortened(shown(str(name)), 20) for name in names], values


def _named(results: Curves) -> dict[str, Any]:
    return dict(results) if isinstance(results, Mapping) else {"": results}


def _cycle(number: int) -> Sequence[tuple[Any, Any]]:
    """Colours with dashes: the first of each as they stand, then other dashes with each colour."""
    kinds = len(_STYLES)
    return [(_STYLES[k % kinds][0], _STYLES[(k + k // kinds) % kinds][1]) for k in range(number)]


def _corners(curve: Curve) -> tuple[Array, Array]:
    """The rates where they change: a grid has long runs of one value."""
    far, frr = curve.far, curve.frr
    changes = np.flatnonzero((np.diff(far, prepend=np.nan) != 0) | (np.diff(frr, prepend=np.nan) != 0))
    return far[changes], frr[changes]


def _least(rates: Sequence[Array], low: float) -> float:
    """Where the axis begins."""
    between = np.concatenate(rates)
    between = between[(between > 0) & (between < 1)]
    return max(low, 0.7 * float(between.min())) if len(between) else low


def _equal_error(curve: Curve) -> float:
    k = equal_error(curve)
    return float(curve.far[k] + curve.frr[k]) / 2


def _band(result: Any, rates: Array) -> tuple[Array, Array] | None:
    """The ends of the 95 % intervals of true accept rates; None where the classes' rates tell of no spread."""
    pairs = float(result.curve.positives)
    if not isinstance(result, TrialResult):
        rejected = result.class_frr * result.class_positives
        if not 0 < rejected.sum() < result.class_positives.sum():
            return None
        pairs = effective_pairs(rejected, result.class_positives)
    # Straight lines between fewer rates are near enough, and hold every rate, as their ends do.
    known = np.unique(1 - result.curve.thinned(256).frr)
    ends = [binomial_interval(min(rate * pairs, pairs), pairs) for rate in known]
    low, high = (np.interp(rates, known, [end[k] for end in ends]) for k in (0, 1))
    return low, high


def _mark(axes: Axes, result: Any, x_of: Any, y_of: Any, least_far: float = 0.0) -> None:
    """The threshold's point, where it lies on the axes; whole at their ends."""
    rates = result if isinstance(result, TrialResult | Evaluation) else result.threshold
    if rates.far < least_far:
        return
    axes.plot([x_of(rates.far)], [y_of(rates.frr)], "o", color=INK, markersize=6, zorder=4, clip_on=False)


def _onto(least: float, low: float) -> Callable[[float], float]:
    """The place of a rate on an axis from `least` to 0.99, at whose ends are all rates beyond."""
    return lambda rate: float(_probit(np.array([min(max(rate, least), 0.99)]), low)[0])


def _probit(rates: Array, low: float) -> Array:
    """Quantiles of the normal distribution; 0 and 1 lie at the axes' ends."""
    normal = NormalDist()
    return np.array([normal.inv_cdf(min(max(float(rate), low), 1 - low)) for rate in rates])


def _percent(rate: float) -> str:
    return "0 %" if rate == 0 or math.isnan(rate) else f"{100 * rate:.3g} %"


def plot_reliability(reliability: Reliability, axes: Axes | None = None, of: str | None = None) -> Axes:
    """The share of pairs that match over the probability that was told for them: on the dotted line if it holds.

    `of` says in the title which pairs they are.
    """
    own = axes is None
    axes = axes or new_axes()
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1.4, label="as told")
    size = np.log10(1 + reliability.pairs)
    sizes = 20 + 90 * size / max(size.max(), 1e-9)
    axes.plot(reliability.told, reliability.found, color=BLUE, linewidth=1.4, zorder=2)
    axes.scatter(reliability.told, reliability.found, s=sizes, color=BLUE, zorder=3, label="bins; larger of more pairs")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.set_xlabel("probability of a match, as told")
    axes.set_ylabel("share of pairs that match")
    title = f"Brier score {reliability.brier:.3g}, calibration error {reliability.error:.3g}"
    axes.set_title(title if of is None else f"{title}, on {of}", loc="left", color=INK)
    finish(axes, own, columns=2)
    return axes


def plot_recall(result: Retrieval, axes: Axes | None = None, most: int = 1000) -> Axes:
    """Recall over k up to `most`, on a logarithmic axis: the cumulative match characteristic."""
    own = axes is None
    axes = axes or new_axes()
    last = min(most, int(result.first_rank.max()))
    k = np.arange(1, max(last, 2) + 1)
    recall = np.searchsorted(np.sort(result.first_rank), k, side="right") / len(result.first_rank)
    axes.plot(k, recall, color=BLUE, linewidth=2, drawstyle="steps-post", label=f"recall@1 {_percent(recall[0])}")
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlim=(1, k[-1]), ylim=(min(0.98 * float(recall[0]), 0.9), 1.0))
    axes.set_xlabel("nearest rows that are looked at, k")
    axes.set_ylabel("share of queries with a match among them")
    axes.set_title(f"Recall at k, mAP {result.mean_average_precision:.3g}", loc="left", color=INK)
    finish(axes, own, columns=1)
    return axes
