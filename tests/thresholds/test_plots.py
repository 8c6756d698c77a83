"""Pictures hold what is written in them: no name is cut off or covers another, whatever the figures and the names."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from support.opis_oracle import clustered

from tcm_fused import OPISResult, calibrate, opis, suggest_margins
from tcm_fused.thresholds.plots import plot_pareto, plot_similarities, plot_utility

_GENERATOR = torch.Generator().manual_seed(0)
Y = torch.arange(300) % 15
X = torch.randn(15, 8, generator=_GENERATOR)[Y] + 0.6 * torch.randn(300, 8, generator=_GENERATOR)
RESULT = opis(X, Y)

pytestmark = pytest.mark.filterwarnings("ignore:far=.*margin_plus")


def scored(score: float, recall: float) -> OPISResult:
    return dataclasses.replace(RESULT, opis=score, recall_at_1=recall)


LONG = "resnet50_arcface_tcm_margin_0.9_0.5_lambda_1_seed_"
MODELS: dict[str, dict[str, OPISResult]] = {
    "one": {"base": scored(0.01, 0.8)},
    "two": {"base": scored(0.01, 0.8), "with_tcm": scored(0.008, 0.82)},
    "long names": {f"{LONG}{k}": scored(0.01 * (k + 1), 0.8 + 0.01 * k) for k in range(5)},
    "very long names": {name * 150: scored(0.01 * (k + 1), 0.8 + 0.1 * k) for k, name in enumerate("xy")},
    "many": {f"model {k}": scored(0.01 * ((7 * k) % 25) / 25, 0.7 + 0.2 * ((11 * k) % 25) / 25) for k in range(25)},
    "the same": {f"same {k}": scored(0.01, 0.8) for k in range(12)},
    "zero": {name: scored(0.0, 1.0) for name in "abc"},
    "far apart": {"a": scored(0.0, 1.0), "b": scored(0.3, 0.0), "c": scored(0.1, 0.5)},
    "formulas": {"cost $5$ and $x": scored(0.01, 0.8), r"$\foo$": scored(0.02, 0.9), "new\nline": scored(0.03, 0.95)},
    "tiny": {"tiny": scored(1e-12, 0.999999), "tinier": scored(1e-13, 0.9999995)},
}


def drawn(axes: Axes) -> Figure:
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    return figure


def inside(figure: Figure, axes: Axes) -> None:
    """All text of the axes is on the figure: title, labels, legend, names."""
    page = figure.bbox
    legend = axes.get_legend()
    drawn: Any = axes  # the object of the left title has no public name
    parts: list[Any] = [axes.title, drawn._left_title, axes.xaxis.label, axes.yaxis.label, legend, *axes.texts]
    for part in parts:
        if part is None or (hasattr(part, "get_text") and not part.get_text()):
            continue
        box = part.get_window_extent()
        text = part.get_text() if hasattr(part, "get_text") else "legend"
        assert page.x0 - 1 <= box.x0, text
        assert box.x1 <= page.x1 + 1, text
        assert page.y0 - 1 <= box.y0, text
        assert box.y1 <= page.y1 + 1, text


@pytest.mark.parametrize("kind", MODELS)
def test_names_of_models(kind: str) -> None:
    """Each within the axes, clear of the axis, of all points and of all other names; or numbers, with a key below."""
    models = MODELS[kind]
    axes = plot_pareto(models)
    figure = drawn(axes)
    inside(figure, axes)
    frame = axes.get_window_extent()
    names = [
        text for text in axes.texts if isinstance(text, Annotation) and text.get_text() and text.xycoords == "data"
    ]
    assert len(names) == len(models)
    points = axes.transData.transform([(100 * (1 - r.recall_at_1), r.opis) for r in models.values()])
    boxes = [name.get_window_extent() for name in names]
    for k, box in enumerate(boxes):
        assert frame.x0 < box.x0
        assert frame.y0 < box.y0
        assert box.x1 <= frame.x1
        assert box.y1 <= frame.y1
        assert not any(box.overlaps(other) for other in boxes[:k])
        assert not any(box.contains(*point) for point in points)
    numbered = names[0].get_text() == "1"
    assert numbered == (kind == "the same")
    if numbered:
        key = "\n".join(text.get_text() for text in axes.texts if text not in names)
        assert all(name in key for name in models)


RESULTS: dict[str, Any] = {
    "opis": lambda: RESULT,
    "thresholds": lambda: opis(X, Y, thresholds=[0.5, 0.9, 1.2]),
    "cosine": lambda: opis(X, Y, distance="cosine", epsilon=1 / 3, beta=0.001),
    "narrow": lambda: opis(X, Y, far_range=(0.1, 0.102)),
    "collapsed": lambda: opis(torch.ones(9, 3), torch.arange(9) % 3, thresholds=[0, 2.0]),
    "calibration": lambda: calibrate(X, Y, far=0.01),
    "collapsed calibration": lambda: calibrate(
        torch.ones(9, 3) + 1e-3 * torch.randn(9, 3, generator=_GENERATOR), torch.arange(9) % 3, frr=0.2
    ),
    "margins": lambda: suggest_margins(X, Y, far=0.3, frr=0.35),
    "crossed margins": lambda: suggest_margins(X, Y, far=0.01, frr=0.1),
}


@pytest.mark.filterwarnings("ignore:frr=")
@pytest.mark.parametrize("kind", RESULTS)
def test_pictures_of_results(kind: str) -> None:
    """On a figure of their own, and beside others in small axes, which keep their size."""
    result = RESULTS[kind]()
    draws = (
        [result.plot] if not isinstance(result, OPISResult) else [result.plot, lambda a: plot_similarities(result, a)]
    )
    for draw in draws:
        axes = draw(None)
        inside(drawn(axes), axes)
        figure = Figure(figsize=(11, 7), layout="constrained")
        panels = figure.subplots(2, 3)
        for axes in panels.flat:
            draw(axes)
        figure.draw_without_rendering()
        for axes in panels.flat:
            inside(figure, axes)
            assert axes.get_window_extent().width > 0.2 * figure.bbox.width


def test_one_spelling() -> None:
    assert RESULT.plot().get_title(loc="left").split("   ")[1].startswith("10%-OPIS ")
    assert opis(X, Y, epsilon=0.125).plot().get_title(loc="left").split("   ")[1].startswith("12.5%-OPIS ")


def test_pictures(tmp_path: Path) -> None:
    """Each is drawn, with axes that say what they are, on axes of the caller's too."""
    result = opis(X, Y)
    found = calibrate(X, Y, far=0.1), suggest_margins(X, Y, far=0.1, frr=0.1)
    axes = [
        result.plot(),
        plot_similarities(result),
        *(f.plot() for f in found),
        plot_pareto({"a": result, "b": result}),
    ]
    for k, drawn in enumerate(axes):
        assert drawn.get_xlabel()
        assert drawn.get_ylabel()
        figure: Any = drawn.figure
        figure.savefig(tmp_path / f"{k}.png")
        assert (tmp_path / f"{k}.png").read_bytes().startswith(b"\x89PNG")
    assert plot_utility(opis(X, Y, thresholds=[0.5, 1.0], distance="cosine"), axes[0]) is axes[0]


@pytest.mark.parametrize("gap", [-0.3, -0.01, 0.0, 0.01, 0.3])
@pytest.mark.parametrize("at", [-0.4, 0.3, 0.95])
def test_names_of_the_margins_do_not_overlap(at: float, gap: float) -> None:
    found = suggest_margins(X, Y, far=0.1, frr=0.1)
    drawn = dataclasses.replace(found, margin_plus=at, margin_minus=at + gap).plot()
    figure: Any = drawn.figure
    figure.canvas.draw()
    first, second = (text.get_window_extent() for text in drawn.texts)
    assert not first.overlaps(second)
    for box in (first, second):
        assert drawn.bbox.y0 < box.y0 and box.y1 < drawn.bbox.y1


def test_utility_picture_shows_the_curves() -> None:
    """The mean line is the mean of the classes' curves, and within the range it is that of the result.

    But for the picture's thresholds being others than the result's: between two of those the curves bend by 2e-4.
    """
    result = opis(*clustered())
    lines = {line.get_label(): np.asarray(line.get_xydata()) for line in result.plot().lines}
    mean = lines["mean of all classes"]
    inside = (mean[:, 0] >= result.distance[0]) & (mean[:, 0] <= result.distance[-1])
    assert np.allclose(np.interp(mean[inside, 0], result.distance, result.mean_utility), mean[inside, 1], atol=1e-3)
    worst = lines["mean of the worst 10 %"]
    inside = (worst[:, 0] >= result.distance[0]) & (worst[:, 0] <= result.distance[-1])
    assert np.allclose(np.interp(worst[inside, 0], result.distance, result.worst_utility), worst[inside, 1], atol=1e-3)
