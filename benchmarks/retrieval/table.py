"""Results with and without TCM side by side, in the form of the paper's tables: Markdown and a picture."""

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Result = dict[str, Any]  # what `training.Run` writes

# Colours of Paul Tol's "muted" set, which the colour-blind can tell apart; shapes and words say the same.
BLUE, ROSE, GREY, INK = "#332288", "#CC6677", "#88929E", "#333333"
STYLES: dict[str, tuple[str, str, Any]] = {
    "better": (BLUE, "o", "-"),
    "worse": (ROSE, "X", "--"),
    "unclear": (GREY, "D", ":"),
}  # colour, mark, line


class Measure(NamedTuple):
    """A column: where its number is, how it is shown, and which way is better."""

    key: str
    title: str
    factor: float
    form: str
    higher_is_better: bool


MEASURES = (
    Measure("recall_at_1", "recall@1, %", 100, ".1f", True),
    Measure("opis", "OPIS x 1000", 1000, ".2f", False),
    Measure("eps_opis", "10%-OPIS x 1000", 1000, ".2f", False),
)


class Row(NamedTuple):
    """One experiment: scores by seed, without TCM and with."""

    name: str
    without: dict[int, Result]
    with_tcm: dict[int, Result]

    def seeds(self) -> list[int]:
        """Those that both sides have."""
        return sorted(self.without.keys() & self.with_tcm.keys())

    def change(self, measure: Measure) -> list[float]:
        """With TCM less without, of each seed."""
        return [b - a for a, b in zip(*self.values(measure), strict=True)]

    def verdict(self, measure: Measure) -> str:
        """ "better", "worse", or "unclear": the mean change is shown as 0, or is within its standard deviation."""
        change = self.change(measure)
        mean = statistics.mean(change)
        if float(format(mean, measure.form)) == 0 or (len(change) > 1 and abs(mean) <= statistics.stdev(change)):
            return "unclear"
        return "better" if (mean > 0) == measure.higher_is_better else "worse"

    def values(self, measure: Measure) -> tuple[list[float], list[float]]:
        """Without and with TCM, of the seeds that both have."""
        sides = (self.without, self.with_tcm)
        without, with_tcm = (
            [measure.factor * side[seed]["scores"][measure.key] for seed in self.seeds()] for side in sides
        )
        return without, with_tcm


def read_results(paths: Iterable[Path]) -> list[Result]:
    """All results in files, which hold one or a list, and under folders.

    Raises:
        ValueError: a path is missing, holds no results, or the same run comes twice with other numbers.
    """
    found: dict[str, Result] = {}
    for path in paths:
        files = sorted(path.rglob("result.json")) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"there is no result.json under {path}; has a run finished there?")
        for file in files:
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
                for result in content if isinstance(content, list) else [content]:
                    key = json.dumps(result["identity"], sort_keys=True)
                    for measure in MEASURES:
                        float(result["scores"][measure.key])
                    if found.setdefault(key, result)["scores"] != result["scores"]:
                        raise ValueError(f"{file} has a run that came before with other scores")
            except OSError as error:
                raise ValueError(f"cannot read {file}: {error.strerror}") from error
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{file} holds no results of this program: {error!r}") from error
    return list(found.values())


def make_rows(results: Sequence[Result]) -> list[Row]:
    """Runs that differ in nothing but the seed, and TCM, together. One without TCM stands beside each TCM setting.

    Where two rows would have one name, it says what they differ in.
    """
    bases: dict[str, dict[int, Result]] = {}
    tcms: dict[str, dict[str, dict[int, Result]]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for result in results:
        rest = {k: v for k, v in result["identity"].items() if k not in ("seed", "tcm")}
        key = json.dumps(rest, sort_keys=True)
        settings[key] = rest
        tcm, seed = result["identity"]["tcm"], result["identity"]["seed"]
        side = bases.setdefault(key, {})
        if tcm is not None:
            side = tcms.setdefault(key, {}).setdefault(json.dumps(tcm, sort_keys=True), {})
        side[seed] = result
    rows = []
    differing = _differing(list(settings.values()))
    for key, about in settings.items():
        name = " ".join(filter(None, (about["dataset"], about["test_set"], about["backbone"], about["base"])))
        extra = [f"{k} {about[k]}" for k in differing]
        variants = tcms.get(key, {"null": {}})
        for tcm, side in variants.items():
            margins = json.loads(tcm)
            more = [f"{k} {margins[k]:g}" for k in margins] if len(variants) > 1 else []
            notes = ", ".join((*extra, *more))
            rows.append(Row(f"{name} ({notes})" if notes else name, bases[key], side))
    return rows


def _differing(settings: list[dict[str, Any]]) -> list[str]:
    """Names of settings that differ between experiments that would else have one name."""
    named = ("dataset", "test_set", "backbone", "base", "images")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for about in settings:
        groups.setdefault(tuple(about[k] for k in named), []).append(about)
    names = [k for k in settings[0] if k not in named] if settings else []
    return [k for k in names if any(len({json.dumps(a[k]) for a in group}) > 1 for group in groups.values())]


def markdown(rows: Sequence[Row], results: Sequence[Result], caption: str = "") -> str:
    """The table, and below it how to read it, what was run, and the caption."""
    head = "| experiment | seeds |" + "".join(f" {m.title}: without | with TCM | change | |" for m in MEASURES)
    lines = [head, "|---|--:|" + "--:|--:|--:|---|" * len(MEASURES)]
    for row in rows:
        cells = [row.name, str(len(row.seeds()))]
        for measure in MEASURES:
            cells += _cells(row, measure)
        lines.append("| " + " | ".join(cells) + " |")
    notes = [
        "Mean and standard deviation over the seeds that both sides have; change: with TCM less without, seed by seed, "
        "mean and standard deviation. The arrow is the direction of the mean change; unclear: it is within its "
        "standard deviation.",
        *_about(results),
        *(["", caption] if caption else []),
    ]
    return "\n".join([*lines, "", *notes]) + "\n"


def _cells(row: Row, measure: Measure) -> list[str]:
    if not row.seeds():  # one side has not been run: what there is
        alone = [
            [measure.factor * r["scores"][measure.key] for r in side.values()] for side in (row.without, row.with_tcm)
        ]
        return [*(spread(side, measure.form) if side else "-" for side in alone), "-", ""]
    without, with_tcm = row.values(measure)
    change = row.change(measure)
    mean = float(format(statistics.mean(change), measure.form))
    arrow = "=" if mean == 0 else "↑" if mean > 0 else "↓"
    return [
        spread(without, measure.form),
        spread(with_tcm, measure.form),
        spread(change, "+" + measure.form),
        f"{arrow} {row.verdict(measure)}",
    ]


def spread(values: Sequence[float], form: str) -> str:
    """'mean +- standard deviation' in the format `form`; of one value just that."""
    mean = format(statistics.mean(values), form)
    if float(mean) == 0:
        mean = mean.replace("-", "+")  # a change too small to be shown has no sign
    return f"{mean} +- {format(statistics.stdev(values), form.lstrip('+'))}" if len(values) > 1 else mean


def _about(results: Sequence[Result]) -> list[str]:
    """A line for each set of images and settings that was trained on, and one for each setting of TCM."""
    trained: dict[str, None] = {}
    margins: dict[str, dict[str, None]] = {}  # and the base losses they were used with
    for result in results:
        about, train, test = (result[key] for key in ("identity", "train", "test"))
        name = " ".join(filter(None, (about["dataset"], about["test_set"])))
        trained[
            f"{name}: {train['images']:,} images of {train['classes']:,} classes to train on, {test['images']:,} of "
            f"{test['classes']:,} others to test; {about['epochs']} epochs, batches of {about['batch_classes']} "
            f"classes x {about['batch_images']} images, {about['dim']} dimensions."
        ] = None
        if (tcm := about["tcm"]) is not None:
            text = (
                f"m+ = {tcm['margin_plus']:g}, m- = {tcm['margin_minus']:g}, lambda+ = {tcm['lambda_plus']:g}, "
                f"lambda- = {tcm['lambda_minus']:g}"
            )
            margins.setdefault(text, {})[about["base"]] = None
    lines = [*trained, *(f"TCM with {', '.join(bases)}: {text}." for text, bases in margins.items())]
    return [line for text in lines for line in ("", text)]


def draw(rows: Sequence[Row]) -> Any:
    """A matplotlib figure: a panel for each measure, a line for each experiment from the mean without TCM to that with.

    Small marks are the seeds.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise ImportError("the picture needs matplotlib: pip install matplotlib, or 'tcm_fused[plots]'") from error
    rows = [row for row in rows if row.seeds()]
    if not rows:
        raise ValueError("no experiment has a seed both without TCM and with, so there is nothing to draw")
    figure = Figure(figsize=(12, 1.9 + 0.62 * len(rows)), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(MEASURES), sharey=True)
    for axes, measure in zip(panels, MEASURES, strict=True):
        for y, row in enumerate(rows):
            _draw_row(axes, measure, y, row)
        axes.set_yticks(range(len(rows)), [row.name for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.6)
        axes.set_xlabel(f"{measure.title}   ({'higher' if measure.higher_is_better else 'lower'} is better)")
        axes.grid(axis="x", color="#E5E5E5")
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.12)
    marks = [
        Line2D([], [], color=GREY, marker="o", markerfacecolor="white", linestyle="", label="without TCM"),
        *(
            Line2D([], [], color=colour, marker=mark, linestyle=line, linewidth=2.2, label=f"with TCM: {verdict}")
            for verdict, (colour, mark, line) in STYLES.items()
        ),
        Line2D([], [], color=GREY, marker="|", linestyle="", label="each seed: above without, below with"),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=5, frameon=False)
    return figure


def _draw_row(axes: Any, measure: Measure, y: int, row: Row) -> None:
    without, with_tcm = row.values(measure)
    start, end = statistics.mean(without), statistics.mean(with_tcm)
    colour, mark, line = STYLES[row.verdict(measure)]
    axes.plot([start, end], [y, y], color=colour, linewidth=2.2, linestyle=line, zorder=2)
    axes.plot(start, y, "o", color=GREY, markerfacecolor="white", markersize=9, markeredgewidth=1.8, zorder=3)
    axes.plot(end, y, mark, color=colour, markersize=8 if mark == "D" else 9.5, zorder=4)
    axes.plot(without, [y - 0.22] * len(without), "|", color=GREY, markersize=8, zorder=1)
    axes.plot(with_tcm, [y + 0.22] * len(with_tcm), "|", color=colour, markersize=8, zorder=1)
    axes.annotate(
        spread([statistics.mean(row.change(measure))], "+" + measure.form),
        ((start + end) / 2, y),
        (0, 18),  # above the seeds
        textcoords="offset points",
        ha="center",
        fontsize=9.5,
        color=INK,
    )
