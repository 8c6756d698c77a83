"""Lists of pairs, each with whether it matches, instead of labels: `evaluate_trials`."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from tcm_fused.arguments import check_choice
from tcm_fused.thresholds.frames import frame, markdown
from tcm_fused.thresholds.intervals import Interval, binomial_interval, rate_interval
from tcm_fused.thresholds.pairing import NothingToMeasure
from tcm_fused.thresholds.rates import Histogram, fields, share
from tcm_fused.thresholds.sets import Array, as_embeddings
from tcm_fused.thresholds.targets import Cost, Curve, choose, equal_error, one_target
from tcm_fused.thresholds.threshold import COSINE, SCORE, Threshold, check_cosines, unit_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_LARGEST = 1e300


class Folds(NamedTuple):
    """Accuracy by the protocol of LFW: each fold at the threshold that is best for the others."""

    accuracy: float  # mean over the folds
    standard_error: float  # of that mean: deviation of the folds / sqrt(K)
    accuracies: Array  # [K]
    thresholds: Array  # [K]

    def __repr__(self) -> str:
        return (
            f"accuracy {100 * self.accuracy:.2f} +- {100 * self.standard_error:.2f} % over {len(self.accuracies)} folds"
        )


@dataclass(frozen=True, eq=False, repr=False)
class TrialResult:
    """The result of `evaluate_trials` on P trials."""

    threshold: Threshold
    far: float  # false accept rate: accepted share of the trials that do not match
    far_interval: Interval
    frr: float  # false reject rate: rejected share of those that match
    frr_interval: Interval
    precision: float  # matching share of the accepted trials; NaN where none is accepted
    accuracy: float  # share that is decided rightly
    equal_error_rate: float  # mean of the two rates where they are nearest to each other
    equal_error_threshold: float
    auc: float  # area under the ROC curve: share of (match, no match) whose scores are in order, ties half
    cost: float | None  # the normalised detection cost at the threshold; of min_dcf
    pairs: tuple[int, int]  # that match, and that do not
    accepted: tuple[int, int]  # of them
    folds: Folds | None
    histogram: Histogram
    curve: Curve  # at all thresholds

    def __repr__(self) -> str:
        return self.report()

    def report(self) -> str:
        """The result in sentences."""
        (positives, negatives), (tp, fp) = self.pairs, self.accepted
        missed = positives - tp
        lines = [
            f"{positives + negatives:,} trials, {positives:,} of them match",
            f"threshold {self.threshold.similarity!r}",
            f"{'false accepts':14} {100 * self.far:9.4g} %   ({self.far_interval})  {fp:,} of {negatives:,}",
            f"{'false rejects':14} {100 * self.frr:9.4g} %   ({self.frr_interval})  {missed:,} of {positives:,}",
            f"{'precision':14} {100 * self.precision:9.4g} %",
            f"{'accuracy':14} {100 * self.accuracy:9.4g} %",
            f"{'equal error':14} {100 * self.equal_error_rate:9.4g} %   at {self.equal_error_threshold!r}",
            f"{'AUC':14} {self.auc:9.4g}",
        ]
        lines += (
            [] if self.cost is None else [f"{'cost':14} {self.cost:9.4g}   of the better of accepting all and none"]
        )
        return "\n".join(lines if self.folds is None else [*lines, f"{'folds':14} {self.folds!r}"])

    def columns(self) -> dict[str, Any]:
        """The curve as columns of a table."""
        curve = self.curve
        return {"threshold": curve.thresholds, "far": curve.far, "frr": curve.frr, "precision": curve.precision}

    def to_frame(self) -> Any:
        """The rates at every threshold as a pandas DataFrame."""
        return frame(self.columns())

    def to_markdown(self) -> str:
        """The rates as a table."""
        names = ("far", "frr", "precision", "accuracy", "equal_error_rate", "auc")
        return markdown({"rate": list(names), "value": [getattr(self, name) for name in names]})

    def to_dict(self) -> dict[str, Any]:
        """Everything but the curve, in types that JSON knows; NaN becomes None."""
        return fields(self, ("curve",))

    def plot(self, axes: "Axes | None" = None) -> "Axes":
        """Draw false rejects over false accepts on probit axes, with the threshold; needs matplotlib."""
        from tcm_fused.thresholds.curve_plots import plot_det

        return plot_det(self, axes)


def evaluate_trials(
    scores: Any,
    same: Any,
    *,
    threshold: Threshold | float | None = None,
    far: float | None = None,
    frr: float | None = None,
    precision: float | None = None,
    f_beta: float | None = None,
    eer: bool = False,
    min_dcf: float | None = None,
    costs: tuple[float, float] = (1.0, 1.0),
    folds: Any = None,
    subjects: tuple[Any, Any] | None = None,
    metric: str | None = None,
    columns: int | None = None,
) -> TrialResult:
    """Error rates of a list of trials, at a threshold that is given or found as `calibrate` finds it.

    A trial is accepted if its score is at least the threshold. Thresholds that are found are scores of the list (or
    just above the highest): no grid and no rounding.

    Args:
        scores: [P] numbers on any scale, higher for a better match.
        same: [P] whether each trial matches, as truth values or 0 and 1.
        threshold: a number or a `Threshold`; or, to find one, exactly one of the following, as in `calibrate`.
        far, frr, precision, f_beta, eer, min_dcf, costs: as in `calibrate`.
        folds: K, for K parts of the list as it stands, as of LFW's 10 sets of 600; or [P] the fold of each trial. Then
            `result.folds` has the accuracy by the protocol of LFW.
        subjects: (first [P], second [P]): who, or which recording, either side of a trial is. Then intervals are from
            the spread when each is left out in turn. Without, nothing is known of it, and intervals (Clopper and
            Pearson's) take trials as independent: they are too narrow where trials share recordings.
        metric: "cosine" if scores are cosine similarities, so that the threshold may be applied to embeddings, or
            "score". None: as a given `Threshold` says, else "score".
        columns: D of the embeddings that cosine similarities are of: kept with a threshold that is found, and compared
            with a given one's.

    Raises:
        TypeError, ValueError: an argument is wrong.
        NothingToMeasure: no trial matches, or all do; or no threshold meets the bound.

    Example:
        >>> found = evaluate_trials([0.9, 0.4, 0.6, 0.1], [1, 1, 0, 0], far=0.4)
        >>> found.threshold.similarity, found.far, found.frr, found.auc
        (0.9, 0.0, 0.5, 0.75)
    """
    scores, same = _check_trials(scores, same)
    metric = _metric(metric, threshold, columns)
    if metric == COSINE:
        scores = check_cosines("scores", torch.from_numpy(scores)).numpy()
    curve = Curve.of_scores(scores, same)
    at, cost = _threshold(
        curve,
        threshold,
        metric,
        columns,
        dict(costs=costs, far=far, frr=frr, precision=precision, f_beta=f_beta, eer=eer, min_dcf=min_dcf),
    )
    accepted = scores >= at.similarity
    tp, fp = int((accepted & same).sum()), int((accepted & ~same).sum())
    rates = fp / curve.negatives, (curve.positives - tp) / curve.positives
    equal = equal_error(curve)
    return TrialResult(
        threshold=at,
        far=rates[0],
        far_interval=_interval(~same, accepted, subjects),
        frr=rates[1],
        frr_interval=_interval(same, ~accepted, subjects),
        precision=tp / (tp + fp) if tp + fp else math.nan,
        accuracy=(tp + curve.negatives - fp) / len(scores),
        equal_error_rate=float(curve.far[equal] + curve.frr[equal]) / 2,
        equal_error_threshold=float(curve.thresholds[equal]),
        auc=_auc(curve),
        cost=None if cost is None else float(cost.of(np.array(rates[0]), np.array(rates[1]))),
        pairs=(curve.positives, curve.negatives),
        accepted=(tp, fp),
        folds=None if folds is None else fold_accuracy(scores, same, folds),
        histogram=_histogram(scores, same),
        curve=curve,
    )


def trial_similarities(embeddings: Any, first: Any, second: Any) -> Array:
    """Cosine similarities [P] float64 of pairs of rows, by their places [P] in embeddings [N, D].

    Raises:
        TypeError, ValueError: a place is no row, or a row is not finite.
    """
    x = as_embeddings("embeddings", embeddings).detach()
    sides = _places("first", first, len(x)), _places("second", second, len(x))
    if len(sides[0]) != len(sides[1]):
        raise ValueError(
            f"first and second must have one place for each trial, got {len(sides[0])} and {len(sides[1])}"
        )
    found = np.empty(len(sides[0]))
    for start in range(0, len(found), 4096):
        part = slice(start, start + 4096)
        a, b = (unit_rows(x[torch.from_numpy(side[part])]) for side in sides)
        found[part] = (a * b).sum(1).clamp(-1, 1).cpu().numpy()
    if not np.isfinite(found).all():
        raise ValueError(f"embeddings must be finite, but those of trial {int(np.argmin(np.isfinite(found)))} are not")
    return found


def _places(name: str, places: Any, rows: int) -> Array:
    """[P] int64, places of rows."""
    found = places.cpu().numpy() if isinstance(places, torch.Tensor) else np.asarray(places)
    if found.ndim != 1:
        raise ValueError(f"{name} must have shape [P], got {list(found.shape)}")
    if found.dtype.kind not in "iu" and len(found):
        raise TypeError(f"{name} must hold the places of rows, integers, got {found.dtype}")
    wrong = (found < 0) | (found >= rows)
    if wrong.any():
        raise ValueError(f"{name}: trials name row {found[wrong][0]}, but there are rows 0 to {rows - 1} only")
    return found.astype(np.int64)


def fold_accuracy(scores: Array, same: Array, folds: Any) -> Folds:
    """The protocol of LFW: the threshold of each fold is the one with the highest accuracy on all other folds.

    In the middle of the gap between two scores; of several as good the lowest. Where accepting all is best that is the
    lowest score of the other folds, and a lower one of this fold is rejected.
    """
    of = _fold_of(folds, len(scores))
    accuracies, thresholds = [], []
    for fold in np.unique(of):
        test = of == fold
        at = _most_accurate(Curve.of_scores(scores[~test], same[~test]))
        thresholds.append(at)
        accuracies.append(float(((scores[test] >= at) == same[test]).mean()))
    found = np.array(accuracies)
    return Folds(float(found.mean()), float(found.std(ddof=1) / math.sqrt(len(found))), found, np.array(thresholds))


def _most_accurate(curve: Curve) -> float:
    k = int(np.argmax(curve.accepted_positives + curve.negatives - curve.accepted_negatives))
    high, low = float(curve.thresholds[k]), float(curve.thresholds[max(k - 1, 0)])
    middle = low + (high - low) / 2
    return middle if middle > low else high


def _fold_of(folds: Any, trials: int) -> Array:
    if isinstance(folds, bool) or (isinstance(folds, int | np.integer) and not 2 <= folds <= trials):
        raise ValueError(f"folds must be from 2 to the number of trials, {trials}, got {folds}")
    if isinstance(folds, int | np.integer):
        return np.arange(trials) * int(folds) // trials
    of = np.asarray(folds)
    if of.shape != (trials,):
        raise ValueError(f"folds must be a number or [P], one for each of {trials} trials, got shape {list(of.shape)}")
    if len(np.unique(of)) < 2:
        raise ValueError("folds must name at least two folds")
    return of


def _check_trials(scores: Any, same: Any) -> tuple[Array, Array]:
    """[P] float64 and [P] bool."""
    if isinstance(scores, torch.Tensor):  # of any dtype, which NumPy may not have
        scores = scores.detach().cpu().double() if scores.is_floating_point() else scores.cpu()
    scores, same = (v.cpu().numpy() if isinstance(v, torch.Tensor) else np.asarray(v) for v in (scores, same))
    if scores.dtype.kind not in "fiu":
        raise TypeError(f"scores must be numbers, got {scores.dtype}")
    if scores.ndim != 1:
        raise ValueError(f"scores must have shape [P], got {list(scores.shape)}")
    scores = scores.astype(np.float64)
    if not np.isfinite(scores).all():
        raise ValueError(f"scores must be finite, but trial {int(np.argmin(np.isfinite(scores)))} has none")
    if len(scores) and np.abs(scores).max() > _LARGEST:  # the threshold above it, and gaps, would be infinite
        raise ValueError(f"scores must be at most {_LARGEST:g} in size, got {float(np.abs(scores).max())}")
    if same.shape != scores.shape:
        raise ValueError(f"same must have shape [{len(scores)}], one for each trial, got {list(same.shape)}")
    if same.dtype.kind not in "biuf" or not np.isin(same, (0, 1)).all():
        raise ValueError("same must be truth values, or 0 and 1")
    same = same.astype(bool)
    if not same.any() or same.all():
        raise NothingToMeasure(
            f"trials must be of both kinds, got {len(same)} of which {int(same.sum())} match: a rate has no pair"
        )
    return scores, same


def _metric(metric: str | None, given: Any, columns: int | None) -> str:
    """That of the scores; a threshold on another, or of embeddings of another dimension, is refused."""
    if metric is None:
        metric = given.metric if isinstance(given, Threshold) else SCORE
    check_choice("metric", metric, (COSINE, SCORE))
    if isinstance(given, Threshold) and given.metric != metric:
        raise ValueError(
            f"this threshold is one on metric={given.metric!r}, but the scores are of metric={metric!r}: their scales "
            "differ"
        )
    if columns is not None and metric != COSINE:
        raise ValueError(f"columns={columns} are those of embeddings, so metric must be 'cosine', got {metric!r}")
    if columns is not None and isinstance(given, Threshold):
        given.check_columns(columns)
    return metric


def _threshold(
    curve: Curve, given: Threshold | float | None, metric: str, columns: int | None, targets: dict[str, Any]
) -> tuple[Threshold, Cost | None]:
    if given is not None:
        others = {n: v for n, v in targets.items() if n != "costs" and v is not None and v is not False}
        if others:
            raise ValueError(f"give a threshold or a target to find one by, got both: {', '.join(others)}")
        if targets["costs"] not in ((1.0, 1.0), [1.0, 1.0]):
            raise ValueError(f"costs={targets['costs']} are those of min_dcf; with a threshold leave them out")
        return given if isinstance(given, Threshold) else Threshold(given, metric=metric, columns=columns), None
    target = one_target(**targets)
    k = choose(curve, target)
    if metric == COSINE and curve.thresholds[k] > 1:
        if target.name in ("far", "precision"):
            why = f"no threshold up to 1 meets {target.name}={target.value}: a trial of no match has similarity 1"
        else:
            why = (
                f"rejecting all trials is best by {target.name}={target.value}, but one has similarity 1, which no "
                "threshold on cosine similarity rejects; give far, frr or precision"
            )
        raise NothingToMeasure(why)
    found = Threshold(
        float(curve.thresholds[k]),
        float(curve.far[k]),
        float(curve.frr[k]),
        target.asked(),
        columns,
        pairs=(curve.positives, curve.negatives),
        metric=metric,
    )
    return found, target.cost


def _interval(kind: Array, event: Array, subjects: tuple[Any, Any] | None) -> Interval:
    """Of the share of trials of a kind that are an event; from subject to subject where they are known."""
    events, total = int((kind & event).sum()), int(kind.sum())
    if subjects is None:
        return binomial_interval(events, total)
    if not isinstance(subjects, (tuple, list)) or len(subjects) != 2:
        raise TypeError(f"subjects must be a pair (first [P], second [P]), got {type(subjects).__name__}")
    sides = [side.cpu().numpy() if isinstance(side, torch.Tensor) else np.asarray(side) for side in subjects]
    if any(side.shape != kind.shape for side in sides):
        raise ValueError(f"subjects must be two of [{len(kind)}], one for each trial")
    _, code = np.unique(np.concatenate(sides), return_inverse=True)
    first, second = np.split(code, 2)
    number = int(code.max()) + 1

    def of_subject(which: Array) -> Array:
        """Trials of each subject, once where both sides are of it."""
        both = np.bincount(second[which & (first != second)], minlength=number)
        return np.bincount(first[which], minlength=number) + both

    mine, out = of_subject(kind), of_subject(kind & event)
    without = share(events - out, total - mine, math.nan)[mine > 0]
    # Matches of one subject stand or fall together; of others each has two subjects.
    independent = len(without) if bool((first[kind] == second[kind]).all()) else total
    return rate_interval(events / total, without, total, independent)


def _auc(curve: Curve) -> float:
    """By the trapezoid rule over exact counts, which is exact."""
    far, tar = curve.far[::-1], 1 - curve.frr[::-1]
    return float(np.trapezoid(tar, far))


def _histogram(scores: Array, same: Array, most: int = 256) -> Histogram:
    edges = np.histogram_bin_edges(scores, bins=min(most, max(10, len(scores) // 8)))
    positives, negatives = (np.histogram(scores[side], edges)[0] for side in (same, ~same))
    return Histogram(edges, positives, negatives)
