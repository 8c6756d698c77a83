"""Scores without and with TCM side by side, over seeds, in the form of the paper's tables: Markdown and a picture."""

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.stats import t as student_t

from benchmarks.digits.training import spread
from benchmarks.speed.figures import GREY, LOOK

BETTER, WORSE, UNCLEAR = "#0072B2", "#D55E00", "#888888"  # Okabe and Ito's; the shapes differ as well

CLEAR_FROM = 10  # seeds; of fewer, a standard error says little


class Scores(NamedTuple):
    """What one training reached on the classes it never saw."""

    opis: float
    eps_opis: float
    recall_at_1: float


class Experiment(NamedTuple):
    """One base loss on one network: scores by seed. Only seeds that both sides have are compared, if there are any."""

    name: str
    without: Mapping[int, Scores]
    with_tcm: Mapping[int, Scores]

    def seeds(self) -> list[int]:
        """Those that both sides have."""
        return sorted(self.without.keys() & self.with_tcm.keys())


class Measure(NamedTuple):
    """A score and how it is shown."""

    field: str
    title: str
    factor: float
    form: str
    higher_is_better: bool


MEASURES = (
    Measure("opis", "OPIS x 1000", 1000, ".1f", False),
    Measure("eps_opis", "10%-OPIS x 1000", 1000, ".1f", False),
    Measure("recall_at_1", "recall@1, %", 100, ".1f", True),
)


class Change(NamedTuple):
    """A measure of one experiment, both sides and their difference, seed by seed."""

    without: list[float]
    with_tcm: list[float]
    change: list[float]  # with TCM less without
    better: int  # seeds in which TCM did better
    clear: bool | None  # True: for the better, False: for the worse, None: not told apart from no change

    @property
    def mean(self) -> float:
        return statistics.mean(self.change)

    @property
    def bar(self) -> float:
        """Half the 95 % interval of the mean change, by Student's t for so few seeds; NaN of one seed."""
        n = len(self.change)
        if n < 2:
            return math.nan
        return float(student_t.ppf(0.975, n - 1)) * statistics.stdev(self.change) / math.sqrt(n)


def change_of(without: list[float], with_tcm: list[float], measure: Measure) -> Change:
    """Both sides by seed and their difference, whose clearness is not judged."""
    change = [after - before for before, after in zip(without, with_tcm, strict=True)]
    better = sum((value > 0) == measure.higher_is_better and value != 0 for value in change)
    return Change(without, with_tcm, change, better, None)


def compare(experiment: Experiment, measure: Measure) -> Change:
    """A change is clear if the 95 % interval of its mean leaves out 0, over at least `CLEAR_FROM` seeds.

    Of an experiment that has a seed with both sides.
    """
    seeds = experiment.seeds()
    sides = [
        [measure.factor * getattr(side[seed], measure.field) for seed in seeds]
        for side in (experiment.without, experiment.with_tcm)
    ]
    found = change_of(sides[0], sides[1], measure)
    if len(seeds) < CLEAR_FROM or not abs(found.mean) > found.bar:
        return found
    return found._replace(clear=(found.mean > 0) == measure.higher_is_better)


def markdown(experiments: Sequence[Experiment]) -> str:
    """The table, and below it how to read it."""
    head = "| experiment | seeds |" + "".join(f" {m.title}: without | with TCM | change |" for m in MEASURES)
    lines = [head, "|---|--:|" + "--:|--:|--:|" * len(MEASURES)]
    for experiment in experiments:
        cells: list[str] = []
        for measure in MEASURES:
            cells += _cells(experiment, measure)
        lines.append(f"| {experiment.name} | {len(experiment.seeds())} | {' | '.join(cells)} |")
    notes = (
        "Mean and standard deviation over seeds. Change: with TCM less without, seed by seed, the direction of its "
        "mean, and the number of seeds in which TCM did better. Bold: the 95 % interval of the mean change, by "
        f"Student's t, leaves out 0 ({CLEAR_FROM} seeds or more); of twenty cells in which TCM changes nothing one "
        "would be bold by chance."
    )
    return "\n".join([*lines, "", notes]) + "\n"


def _cells(experiment: Experiment, measure: Measure) -> list[str]:
    if not experiment.seeds():  # one side has not been run: what there is
        sides = ([getattr(scores, measure.field) for scores in side.values()] for side in experiment[1:])
        return [*(spread([measure.factor * v for v in side], measure.form) if side else "-" for side in sides), "-"]
    found = compare(experiment, measure)
    change = spread(found.change, "+" + measure.form)
    mean = float(change.split()[0])
    arrow = "=" if mean == 0 else "↑" if mean > 0 else "↓"
    return [
        spread(found.without, measure.form),
        spread(found.with_tcm, measure.form),
        f"{arrow} {change if found.clear is None else f'**{change}**'}, better in {found.better}",
    ]


def draw(experiments: Sequence[Experiment], title: str) -> Figure:
    """A panel for each measure, a line for each experiment: the change of every seed, its mean and that mean's bar.

    Raises:
        ValueError: no experiment has a seed that was run both without TCM and with.
    """
    experiments = [experiment for experiment in experiments if experiment.seeds()]
    if not experiments:
        raise ValueError("no experiment has a seed both without TCM and with, so there is nothing to draw")
    with rc_context(LOOK):
        figure = Figure(figsize=(12, 2.3 + 0.55 * len(experiments)), layout="constrained")
        panels = figure.subplots(1, len(MEASURES), sharey=True)
        for axes, measure in zip(panels, MEASURES, strict=True):
            for y, experiment in enumerate(experiments):
                _draw_change(axes, y, compare(experiment, measure))
            axes.axvline(0, color="black", linewidth=1, zorder=1)
            side = "right" if measure.higher_is_better else "left"
            unit = "points" if measure.factor == 100 else "x 1000"
            axes.set(title=measure.title.split(",")[0].removesuffix(" x 1000"))
            axes.set_xlabel(f"change with TCM, {unit}\n({side} is better)")
            axes.margins(x=0.1)
            axes.set_yticks(range(len(experiments)), [_broken(experiment.name, 28) for experiment in experiments])
            axes.set_ylim(len(experiments) - 0.5, -0.5)
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="x", alpha=0.3)
            axes.spines["left"].set_visible(False)
        figure.suptitle(_broken(title, 100), x=0.008, ha="left", fontsize=13)
        marks = [
            Line2D([], [], color=BETTER, marker="o", label="clearly better (mean, its 95 % interval)"),
            Line2D([], [], color=WORSE, marker="X", label="clearly worse"),
            Line2D([], [], color=UNCLEAR, marker="D", markerfacecolor="white", label="not told apart from no change"),
            Line2D([], [], color=GREY, marker="|", linestyle="", label="each seed"),
        ]
        figure.legend(handles=marks, loc="outside lower center", ncols=4)
    return figure


def _broken(text: str, width: int) -> str:
    """On lines of at most that many characters, and no formula."""
    return textwrap.fill(text, width).replace("$", r"\$")


def _draw_change(axes: Axes, y: int, found: Change) -> None:
    colour, marker, face = {
        True: (BETTER, "o", BETTER),
        False: (WORSE, "X", WORSE),
        None: (UNCLEAR, "D", "white"),
    }[found.clear]
    axes.plot(found.change, [y] * len(found.change), "|", color=colour, alpha=0.45, markersize=13, zorder=2)
    bar = found.bar if len(found.change) > 1 else 0
    axes.errorbar(
        found.mean,
        y,
        xerr=bar,
        color=colour,
        marker=marker,
        markerfacecolor=face,
        markersize=8,
        linewidth=2.4,
        zorder=3,
    )
