"""Pictures of rates: each line drawn is the rate it stands for."""

from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy.stats import norm
from support import batches

from tcm_fused import calibrate, evaluate, evaluate_trials
from tcm_fused.thresholds.curve_plots import plot_det, plot_rates, plot_roc
from tcm_fused.thresholds.plots import plot_similarities
from tcm_fused.thresholds.rates import Pairs
from tcm_fused.thresholds.report import page
from tcm_fused.thresholds.targets import Curve

pytestmark = pytest.mark.usefixtures("one_thread")


def data(classes: int = 20) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(classes), 8)
    spread = rng.uniform(0.4, 1.2, classes)[y, None]
    return rng.standard_normal((classes, 12))[y] + spread * rng.standard_normal((len(y), 12)), y


RESULT = calibrate(*data(), far=0.01)


def test_thinned_curve_has_the_same_counts() -> None:
    """At fewer thresholds, and near every rate."""
    curve = Curve.of_counts(Pairs(*data(), "auto", False).count(np.empty(0)))
    thin = curve.thinned()
    assert len(thin.thresholds) < 1024
    where = np.searchsorted(curve.thresholds, thin.thresholds)
    assert (curve.thresholds[where] == thin.thresholds).all()
    for name in ("far", "frr", "accepted_positives", "answered"):
        assert getattr(thin, name).tolist() == getattr(curve, name)[where].tolist()
    for rate in ("far", "frr"):
        full, kept = getattr(curve, rate), np.sort(getattr(thin, rate))
        above = kept[np.searchsorted(kept, full).clip(max=len(kept) - 1)]
        assert (np.abs(above - full) <= 0.15 * full + 1e-12).all()


def test_det_is_on_probit_axes() -> None:
    axes: Any = plot_det(RESULT)
    line = axes.get_lines()[0]
    x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    inside = (RESULT.curve.far > 1e-3) & (RESULT.curve.frr > 1e-2) & (RESULT.curve.frr < 0.99)
    for far, frr in zip(RESULT.curve.far[inside], RESULT.curve.frr[inside], strict=True):
        assert np.min(np.hypot(x - norm.ppf(far), y - norm.ppf(frr))) < 1e-9
    point = next(line for line in axes.get_lines() if line.get_marker() == "o")
    assert point.get_xydata()[0] == pytest.approx(norm.ppf([RESULT.threshold.far, RESULT.threshold.frr]))
    for tick, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True):
        assert 100 * norm.cdf(tick) == pytest.approx(float(label.get_text().split()[0]), rel=1e-3)


def test_several_by_name() -> None:
    trials = evaluate_trials([0.1, 0.4, 0.3, 0.9], [0, 1, 0, 1], eer=True)
    for draw in (plot_det, plot_roc):
        axes: Any = draw({"model": RESULT, "trials": trials})
        names = [text.get_text() for text in axes.get_legend().get_texts()]
        assert {"model", "trials"} <= set(names)


def test_roc_has_its_band() -> None:
    result = evaluate(*data(), threshold=0.5)
    axes: Any = plot_roc(result)
    assert axes.get_xscale() == "log"
    assert axes.get_legend().get_texts()[0].get_text() == "95 % band"
    (band,) = axes.collections
    vertices = band.get_paths()[0].vertices
    near = np.abs(vertices[:, 0] - result.far) < 0.05 * result.far
    assert vertices[near, 1].min() <= 1 - result.frr_interval.high + 0.06
    assert vertices[near, 1].max() >= 1 - result.frr_interval.low - 0.06
    assert vertices[near, 1].min() < 1 - result.frr < vertices[near, 1].max()
    line = axes.get_lines()[0]
    assert (np.diff(line.get_ydata()) >= 0).all()


@pytest.mark.parametrize("rate", ["far", "frr"])
def test_rates_of_classes_and_groups(rate: str) -> None:
    axes: Any = plot_rates(RESULT, rate)
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == pytest.approx(sorted(100 * getattr(RESULT, f"class_{rate}"), reverse=True))
    many = calibrate(*data(60), far=0.01)
    assert plot_rates(many, rate).get_xlabel() == "60 classes, the worst first"
    x, y = data()
    found = evaluate(x, y, threshold=0.5, groups=[f"camera {k % 3}" for k in range(len(y))])
    axes = plot_rates(found, rate)
    assert axes.get_xlabel() == "group"
    assert {label.get_text() for label in axes.get_xticklabels()} == {"camera 0", "camera 1", "camera 2"}
    total = axes.get_lines()[0].get_ydata()
    assert np.asarray(total)[0] == pytest.approx(100 * getattr(found, rate))


def test_within_other_axes_and_histogram() -> None:
    axes: Any = Figure().subplots(2, 2)
    result = evaluate(*data(), threshold=0.5)
    assert plot_det(result, axes[0, 0]) is axes[0, 0]
    assert plot_roc(result, axes[0, 1]) is axes[0, 1]
    assert plot_rates(result, axes=axes[1, 0]) is axes[1, 0]
    assert result.plot(axes[1, 1]).get_title(loc="left").startswith("False accepts")
    trials = evaluate_trials([2.0, 1.0, 3.0, -1.0], [0, 1, 1, 0], eer=True)
    assert plot_similarities(trials).get_xlabel() == "score"


def test_names_are_harmless() -> None:
    """Of classes that are text with markup, in the page and in pictures."""
    x, y = batches.batch(60, 4, 3)
    result = evaluate(x, [f"<b>$a_{c}$\x1b[2J</b>" for c in y.tolist()], threshold=0.1)
    text = page(result, "a <title>")
    assert "<b>" not in text
    assert "\x1b" not in text
    assert "a &lt;title&gt;" in text
    drawn: Any = plot_rates(result).figure
    drawn.savefig("/dev/null", format="png")


def test_perfect_and_useless() -> None:
    """Rates of 0 and 1 only are drawn too."""
    x, y = np.repeat(np.eye(3), 4, axis=0), np.repeat(np.arange(3), 4)
    for result in (evaluate(x, y, threshold=0.5), evaluate(np.ones((12, 3)), y, threshold=0.5)):
        for draw in (plot_det, plot_roc, plot_rates):
            drawn: Any = draw(result).figure
            drawn.savefig("/dev/null", format="png")


def test_band_holds_its_own_curve() -> None:
    """Also at small rates, where several thresholds have the same one."""
    x, y = data()
    for result in (
        RESULT,
        evaluate(x, y, threshold=0.6),
        evaluate_trials([0.9, 0.8, 0.5, 0.4, 0.1], [1, 1, 0, 1, 0], eer=True),
    ):
        axes: Any = plot_roc(result)
        far, tar = np.asarray(axes.get_lines()[0].get_xydata()).T
        (band,) = axes.collections
        inside = (far > 0) & (tar > 0)
        just_behind = np.stack((far * (1 + 1e-7), np.minimum(tar, 1 - 1e-7)), axis=1)[inside]
        last = np.append(far[1:] > far[:-1], True)[inside]  # of several steps at one rate
        assert band.get_paths()[0].contains_points(just_behind[last & (far[inside] < 1)]).all()
    for threshold in (-0.999, 1.0):
        found = evaluate(x, y, threshold=threshold)
        assert found.frr in (0, 1)
        assert not plot_roc(found).collections, "the rates of classes tell of no spread"


def test_few_pairs_are_on_the_axes() -> None:
    result = evaluate_trials([0.9, 0.1], [1, 0], threshold=0.5)
    det: Any = plot_det(result)
    point = next(line for line in det.get_lines() if line.get_marker() == "o")
    assert point.get_xydata()[0].tolist() == [det.get_xlim()[0], det.get_ylim()[0]]
    assert point.get_xydata()[0] == pytest.approx(norm.ppf([0.05, 0.05]))
    assert not point.get_clip_on()
    assert len(det.get_xticks()) >= 3
    assert plot_roc(result).get_xlim() == (0.1, 1)
    strict: Any = plot_det(evaluate(*data(), threshold=0.99))  # FAR 0: at the end of the axis, not beyond it
    point = next(line for line in strict.get_lines() if line.get_marker() == "o")
    assert strict.get_xlim()[0] <= point.get_xdata()[0] <= strict.get_xlim()[1]
    assert strict.get_ylim()[0] <= point.get_ydata()[0] <= strict.get_ylim()[1]


@pytest.mark.parametrize("classes", [20, 47])
def test_legend_has_the_equal_error_rate_that_is_found(classes: int) -> None:
    x, y = data(classes)
    found = calibrate(x, y, eer=True)
    legend = plot_det(calibrate(x, y, far=0.01)).get_legend()
    assert legend is not None
    names = [text.get_text() for text in legend.get_texts()]
    assert f"equal error {100 * found.equal_error_rate:.3g} %" in names
    assert found.threshold.similarity in found.curve.thresholds.tolist()


def test_many_models_are_told_apart() -> None:
    trials = evaluate_trials([0.1, 0.4, 0.3, 0.9], [0, 1, 0, 1], eer=True)
    axes: Any = plot_det({f"model {k}": trials for k in range(25)})
    lines = [line for line in axes.get_lines() if line.get_label().startswith("model")]
    assert len({(line.get_color(), line._unscaled_dash_pattern) for line in lines}) == 25


def test_steps_of_many_classes_are_whole() -> None:
    axes: Any = plot_rates(calibrate(*data(60), far=0.01), "frr")
    (steps,) = axes.collections
    assert axes.get_xlim() == (-0.5, 59.5)
    assert steps.get_paths()[0].get_extents().intervalx.tolist() == [-0.5, 59.5]
