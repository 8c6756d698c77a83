"""Tables and pictures of the runs that are finished."""

import itertools
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.comparison import MEASURES, Change, Measure, change_of
from benchmarks.glyphs import plan
from benchmarks.glyphs.plan import Result
from benchmarks.speed.figures import GREY, LOOK
from tcm_fused import OPISResult

MORE = (
    Measure("tar_at_far_1e-3", "TAR at FAR 1e-3, %", 100, ".1f", True),
    Measure("opis_frr", "OPIS over FRR 5 to 30 %, x 1000", 1000, ".2f", False),
    Measure("worst_frr_at_far_1e-2", "FRR of the worst class at FAR 1e-2, %", 100, ".1f", False),
)
NETWORK = {"small": "CNN", "small-vit": "ViT"}
BASE = {"smoothap": "Smooth-AP", "arcface": "ArcFace"}
COLOUR = {"smoothap": "#0072B2", "arcface": "#D55E00"}

Pair = tuple[Result, Result]  # one seed without TCM and with


class Point(NamedTuple):
    """Where a run stands at some step."""

    held_out_recall: float
    error: float  # of the test, 1 - recall@1
    opis: float


def collect(out: Path) -> list[Result]:
    """All finished runs under a folder; each says its variant, which is the folder it lies in."""
    found = []
    for path in sorted(out.glob("*/*/result.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        found.append({"variant": path.parent.parent.name, **result})
    return found


def cells(results: Iterable[Result]) -> list[tuple[str, str]]:
    """Networks and base losses of which a pair was measured."""
    return [
        (network, base) for network in plan.NETWORKS for base in plan.BASES if pairs(results, "measured", network, base)
    ]


def pairs(results: Iterable[Result], variant: str, network: str, base: str) -> list[Pair]:
    """By seed, the runs of a variant with TCM, each beside the one without that differs from it in nothing else."""
    results = list(results)
    without = {_but_tcm(result): result for result in results if result["identity"]["tcm"] is None}
    found = [
        (without[_but_tcm(result)], result)
        for result in results
        if result["variant"] == variant
        and result["identity"]["tcm"] is not None
        and (result["identity"]["backbone"], result["identity"]["base"]) == (network, base)
        and _but_tcm(result) in without
    ]
    return sorted(found, key=lambda pair: pair[0]["identity"]["seed"])


def _but_tcm(result: Result) -> str:
    return json.dumps({k: v for k, v in result["identity"].items() if k != "tcm" and v is not None}, sort_keys=True)


def change(found: Sequence[Pair], measure: Measure) -> Change:
    """Of a measure, seed by seed."""
    where = "scores" if measure.field in ("opis", "eps_opis", "recall_at_1") else "more"
    before, after = ([measure.factor * pair[side][where][measure.field] for pair in found] for side in (0, 1))
    return change_of(before, after, measure)


UTILITY_OF = "CNN, Smooth-AP, seed 0"


def markdown(results: Sequence[Result], fonts: dict[str, Any], models: Sequence[tuple[str, OPISResult]] = ()) -> str:
    """The page of results; `models` are those that are looked at more closely."""
    there = cells(results)
    parts = [
        "# Characters in many typefaces\n",
        _counts(results, fonts),
        "## Unseen characters, without TCM and with\n",
        _table(results, there, MEASURES_HERE),
        "Mean over seeds, and the 95 % interval of the mean paired change by Student's t. Bold: it leaves out 0.\n",
        "## Other measures of the same runs\n",
        _table(results, there, MORE),
        "## At equal recall\n",
        _equal_recall(results, there),
        "## What OPIS is made of\n",
        _made_of(models),
        "## What was chosen\n",
        _choices(results),
        "## One thing changed\n",
        _variants(results, there),
    ]
    return "\n".join(parts)


MEASURES_HERE = tuple(measure._replace(form=".2f") for measure in MEASURES)


def _counts(results: Sequence[Result], fonts: dict[str, Any]) -> str:
    one = next(result for result in results if result["held_out"] is not None)
    lines = [
        f"{len(fonts['typefaces'])} typefaces, the most different of {fonts['found']}. Characters and their images: "
        f"{one['train']['classes']} ({one['train']['images']:,}) to train on, {one['held_out']['classes']} "
        f"({one['held_out']['images']:,}) held out to choose by, {one['test']['classes']} "
        f"({one['test']['images']:,}) unseen.",
        "",
        f"{len(results)} runs, of these "
        + ", ".join(f"{sum(r['variant'] == v for r in results)} {v}" for v in sorted({r["variant"] for r in results}))
        + ".\n",
    ]
    return "\n".join(lines)


def _table(results: Sequence[Result], there: Sequence[tuple[str, str]], measures: Sequence[Measure]) -> str:
    head = "| network, base loss | seeds |" + "".join(f" {m.title}: without | with TCM | change |" for m in measures)
    lines = [head, "|---|--:|" + "--:|--:|--:|" * len(measures)]
    for network, base in there:
        found = pairs(results, "measured", network, base)
        cells_ = [cell for measure in measures for cell in _cells(change(found, measure), measure)]
        lines.append(f"| {NETWORK[network]}, {BASE[base]} | {len(found)} | {' | '.join(cells_)} |")
    return "\n".join(lines) + "\n"


def _cells(found: Change, measure: Measure) -> list[str]:
    without, with_tcm = (statistics.mean(side) for side in (found.without, found.with_tcm))
    arrow = "=" if found.mean == 0 else "↑" if found.mean > 0 else "↓"
    interval = "" if math.isnan(found.bar) else f" ± {found.bar:{measure.form}}"
    text = f"{found.mean:+{measure.form}}{interval}"
    clear = not math.isnan(found.bar) and abs(found.mean) > found.bar
    return [
        f"{without:{measure.form}}",
        f"{with_tcm:{measure.form}}",
        f"{arrow} {f'**{text}**' if clear else text}, better in {found.better}",
    ]


def points(result: Result) -> list[Point]:
    """The run on its way, and at its end."""
    looks = [*result["course"], {"held_out": result["held_out"]["scores"], "test": result["scores"]}]
    return [
        Point(look["held_out"]["recall_at_1"], 1 - look["test"]["recall_at_1"], look["test"]["opis"]) for look in looks
    ]


def at_recall(result: Result, level: float, part: Literal["held_out", "test"] = "held_out") -> Point | None:
    """Where recall@1 of a part first reaches a level: between two looks, in proportion; OPIS by its logarithm.

    The first look, where it is past the level already; None where the level is not reached.
    """
    way = points(result)
    recall = [_recall(point, part) for point in way]
    if recall[0] >= level:
        return way[0]
    for k in range(1, len(way)):
        if recall[k - 1] <= level <= recall[k]:
            share = (level - recall[k - 1]) / (recall[k] - recall[k - 1]) if recall[k] > recall[k - 1] else 1.0
            mix = np.array([1 - share, share])
            held_out, error, log_opis = mix @ [
                (p.held_out_recall, p.error, math.log(p.opis)) for p in way[k - 1 : k + 1]
            ]
            return Point(float(held_out), float(error), math.exp(log_opis))
    return None


def _recall(point: Point, part: Literal["held_out", "test"]) -> float:
    return point.held_out_recall if part == "held_out" else 1 - point.error


def _equal_recall(results: Sequence[Result], there: Sequence[tuple[str, str]]) -> str:
    lines = [
        "| network, base loss | equal recall of | seeds | its level, % | OPIS x 1000: without | with TCM | change "
        "| recall@1 of the unseen, %: without | with TCM | change |",
        "|---|---|" + "--:|" * 8,
    ]
    parts: tuple[tuple[Literal["held_out", "test"], str], ...] = (("held_out", "held out"), ("test", "unseen"))
    for (network, base), (part, words) in itertools.product(there, parts):
        levels, rows = [], []
        for pair in pairs(results, "measured", network, base):
            level = min(_recall(points(result)[-1], part) for result in pair)
            without, with_tcm = (at_recall(result, level, part) for result in pair)
            if without is not None and with_tcm is not None:
                levels.append(level)
                rows.append((without, with_tcm))
        if not rows:
            continue
        opis_, recall = MEASURES_HERE[0], MEASURES_HERE[2]
        of_opis = change_of([1000 * a.opis for a, _ in rows], [1000 * b.opis for _, b in rows], opis_)
        of_recall = change_of([100 * (1 - a.error) for a, _ in rows], [100 * (1 - b.error) for _, b in rows], recall)
        cells_ = [*_cells(of_opis, opis_), *_cells(of_recall, recall)]
        lines.append(
            f"| {NETWORK[network]}, {BASE[base]} | {words} | {len(rows)} | {100 * statistics.mean(levels):.2f} "
            f"| {' | '.join(cells_)} |"
        )
    text = (
        "Each pair at the recall@1, of the characters held out or of the unseen, that the worse of the two ends with. "
        "The better passes it on the way, before its learning rate has fallen to 0, and stands there in proportion "
        "between two looks, or at the first if it is past it by then.\n"
    )
    return "\n".join([*lines, "", text])


def _made_of(models: Sequence[tuple[str, OPISResult]]) -> str:
    lines = [
        f"| {UTILITY_OF} | OPIS x 1000 | variance of the sensitivity x 1000 | of the specificity x 1000 "
        "| share of OPIS of the tenth of classes that differ most, % |",
        "|---|" + "--:|" * 4,
    ]
    for name, found in models:
        off = np.sort(((found.utility - found.utility.mean(axis=0)) ** 2).mean(axis=1))[::-1]
        worst = off[: math.ceil(len(off) / 10)].sum() / off.sum()
        spreads = (1000 * float(rate.var(axis=0).mean()) for rate in (found.sensitivity, found.specificity))
        cells_ = " | ".join(f"{value:.2f}" for value in spreads)
        lines.append(f"| {name} | {1000 * found.opis:.2f} | {cells_} | {100 * worst:.0f} |")
    return "\n".join([*lines, "", "Variance over classes, mean over the thresholds of the range.\n"])


def _choices(results: Sequence[Result]) -> str:
    lines = [
        "| network, base loss | run | learning rate | m+ | m- | weight | held-out OPIS x 1000 | held-out recall@1, % |",
        "|---|---|" + "--:|" * 6,
    ]
    for result in results:
        if not result["variant"].startswith(("rate", "weight")):
            continue
        about, scores = result["identity"], result["held_out"]["scores"]
        tcm = about["tcm"]
        margins = ["", "", ""] if tcm is None else [f"{tcm[k]:.3f}" for k in ("margin_plus", "margin_minus")]
        if tcm is not None:
            margins.append(f"{tcm['lambda_plus']:g}")
        lines.append(
            f"| {NETWORK[about['backbone']]}, {BASE[about['base']]} | {'TCM' if tcm else 'without'} | {about['lr']:g} "
            f"| {' | '.join(margins)} | {1000 * scores['opis']:.3f} | {100 * scores['recall_at_1']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def _variants(results: Sequence[Result], there: Sequence[tuple[str, str]]) -> str:
    lines = [
        "| network, base loss | changed | m+ | m- | weight | seeds (which) | OPIS x 1000: without | with TCM | change "
        "| recall@1, %: without | with TCM | change |",
        "|---|---|" + "--:|" * 10,
    ]
    names = [name for name in dict.fromkeys(r["variant"] for r in results) if name != "measured"]
    for network, base in there:
        others = {name: pairs(results, name, network, base) for name in names}
        seeds = {pair[0]["identity"]["seed"] for found in others.values() for pair in found}
        same = [p for p in pairs(results, "measured", network, base) if p[0]["identity"]["seed"] in seeds]
        for name, found in {"nothing": same, **others}.items():
            if not found:
                continue
            tcm = found[0][1]["identity"]["tcm"]
            cells_ = [c for k in (0, 2) for c in _cells(change(found, MEASURES_HERE[k]), MEASURES_HERE[k])]
            lines.append(
                f"| {NETWORK[network]}, {BASE[base]} | {name} "
                f"| {tcm['margin_plus']:.3f} | {tcm['margin_minus']:.3f} | {tcm['lambda_plus']:g} "
                f"| {len(found)} ({', '.join(str(pair[0]['identity']['seed']) for pair in found)}) "
                f"| {' | '.join(cells_)} |"
            )
    return "\n".join(lines) + "\n"


def draw_pareto(results: Sequence[Result]) -> Figure:
    """OPIS against recognition error of every run, at its end and, smaller, on the way; a panel for each network."""
    networks = [n for n in plan.NETWORKS if any(r["identity"]["backbone"] == n for r in results)]
    with rc_context(LOOK):
        figure = Figure(figsize=(5.8 * len(networks), 5), layout="constrained")
        for axes, network in zip(figure.subplots(1, len(networks), squeeze=False)[0], networks, strict=True):
            for result in results:
                if result["identity"]["backbone"] == network:
                    _draw_run(axes, result)
            axes.set(xscale="log", yscale="log", xlabel="recognition error, % (1 - recall@1)", ylabel="OPIS x 1000")
            axes.set_title(NETWORK[network])
            _plain_ticks(axes)
            axes.grid(alpha=0.3)
        figure.suptitle("Unseen characters, every run", x=0.008, ha="left", fontsize=13)
        marks = [Line2D([], [], color=COLOUR[base], marker="o", linestyle="", label=BASE[base]) for base in plan.BASES]
        marks += [
            Line2D([], [], color=GREY, marker="s", markerfacecolor="white", linestyle="", label="without TCM"),
            Line2D([], [], color=GREY, marker="o", linestyle="", label="with TCM"),
            Line2D([], [], color=GREY, marker="o", markersize=4, linestyle="", label="small: two thirds through"),
        ]
        figure.legend(handles=marks, loc="outside lower center", ncols=5)
    return figure


def _draw_run(axes: Axes, result: Result) -> None:
    way = points(result)
    colour, filled = COLOUR[result["identity"]["base"]], result["identity"]["tcm"] is not None
    x, y = [100 * point.error for point in way], [1000 * point.opis for point in way]
    axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.4)
    style: dict[str, Any] = {"color": colour, "markerfacecolor": colour if filled else "white", "linestyle": ""}
    marker = "o" if filled else "s"
    axes.plot(x[:-1], y[:-1], marker=marker, markersize=4, alpha=0.5, **style)
    axes.plot(x[-1:], y[-1:], marker=marker, markersize=7, alpha=0.9, **style)


def _plain_ticks(axes: Axes) -> None:
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for axis, low, high in ((axes.xaxis, *axes.get_xlim()), (axes.yaxis, *axes.get_ylim())):
        few = (1, 2, 3, 5) if high > 8 * low else (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
        ticks = [b * 10.0**e for e in range(-3, 4) for b in few]
        axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(plain)


def draw_utility(found: Sequence[tuple[str, OPISResult]]) -> Figure:
    """The utility of every class over the threshold, a panel for each model."""
    with rc_context(LOOK):
        figure = Figure(figsize=(12, 4.8), layout="constrained")
        for axes, (name, result) in zip(figure.subplots(1, len(found), sharey=True), found, strict=True):
            result.plot(axes)
            axes.set_title(f"{name}: OPIS x 1000 = {1000 * result.opis:.2f}")
        figure.suptitle(f"Unseen characters, {UTILITY_OF}", x=0.008, ha="left", fontsize=13)
    return figure
