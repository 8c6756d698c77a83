"""A threshold on other data: `evaluate`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tcm_fused.arguments import check_choice
from tcm_fused.thresholds.frames import class_table, frame, markdown
from tcm_fused.thresholds.intervals import (
    Interval,
    binomial_intervals,
    negative_trials,
    positive_trials,
    rate_interval,
)
from tcm_fused.thresholds.pairing import NothingToMeasure
from tcm_fused.thresholds.rates import Counts, Histogram, Pairs, Worst, fields, lowest, share, worst_classes
from tcm_fused.thresholds.sets import Array
from tcm_fused.thresholds.targets import Curve, check_beta, f_beta
from tcm_fused.thresholds.threshold import Threshold, as_threshold

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_FEW = 20  # classes, of which the spread from class to class is badly known


class Groups(NamedTuple):
    """The pairs of each of G groups, where each pair is of one: within groups, or of a group's queries across them."""

    ids: Array  # [G]
    names: Array | None  # [G] where groups were text
    far: Array  # [G] NaN where a group has no negative pair
    frr: Array  # [G] NaN where it has no positive pair
    positives: Array  # [G] pairs
    negatives: Array  # [G]

    def to_markdown(self) -> str:
        """The rates of each group as a table."""
        names = self.ids if self.names is None else self.names
        return markdown({"group": names, "FAR": self.far, "FRR": self.frr})

    def __repr__(self) -> str:
        return f"Groups: {len(self.ids)}, FAR {np.nanmin(self.far):.4g} to {np.nanmax(self.far):.4g}"


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """The result of `evaluate`: rates over all pairs, each with its 95 % interval, and for each of C classes.

    An interval is for other classes of the same kind: from the spread when each class is left out in turn (see
    `tcm_fused.thresholds.intervals`). Where nothing was observed it is the rule of three, (0, 1) of fewer than
    three classes. NaN: there is no such rate. Those of a single class count what is independent for certain, pairs
    without a common row and other classes, so they are wide.
    """

    threshold: Threshold
    far: float  # false accept rate: accepted share of the negative pairs
    far_interval: Interval
    frr: float  # false reject rate: rejected share of the positive pairs
    frr_interval: Interval
    precision: float  # positive share of the accepted pairs
    precision_interval: Interval
    coverage: float  # share of the queries of which a pair is accepted
    coverage_interval: Interval
    f_beta: float  # (1 + b^2) P R / (b^2 P + R) of precision and recall, 1 - frr
    f_beta_interval: Interval
    beta: float
    detection_rate: float  # share of the queries with a positive whose nearest is one and is accepted
    detection_rate_interval: Interval
    false_alarm_rate: float  # share of the queries without a positive of which a pair is accepted
    false_alarm_rate_interval: Interval
    recall_at_1: float
    pairs: tuple[int, int]  # positive and negative
    accepted: tuple[int, int]  # of them
    queries: tuple[int, int]  # with a positive, and without
    class_ids: Array  # [C] labels of the classes with a positive pair, ascending
    class_sizes: Array  # [C] samples, of both sets
    class_far: Array  # [C] of the pairs with one sample in the class
    class_frr: Array  # [C]
    class_far_interval: Array  # [C, 2] for these samples of the class against other classes of the same kind
    class_frr_interval: Array  # [C, 2] for other samples of the class
    class_positives: Array  # [C] pairs
    class_negatives: Array  # [C]
    left_out: int  # classes without a positive pair
    histogram: Histogram
    curve: Curve  # the rates at about 500 thresholds, for pictures
    groups: Groups | None = None
    class_names: Array | None = None  # [C] text of class_ids, which are its places then; None of integer labels

    def worst(self, k: int = 10, rate: str = "frr") -> list[Worst]:
        """The k classes with the highest false reject rate (or `rate="far"`), the highest first."""
        check_choice("rate", rate, ("far", "frr"))
        values, intervals = (
            (self.class_frr, self.class_frr_interval) if rate == "frr" else (self.class_far, self.class_far_interval)
        )
        return worst_classes(self, lowest(-values, k), values, intervals)

    def __repr__(self) -> str:
        return "\n".join(self._lines())

    def report(self, worst: int = 5) -> str:
        """The result in sentences and tables, with that many of the worst classes by either rate."""
        lines = self._lines()
        for rate, name in (("frr", "rejects"), ("far", "accepts")):
            lines += ["", f"classes with the most false {name}:"]
            lines += [f"{'':14} {item}" for item in self.worst(worst, rate)]
        if self.groups is not None:
            lines += ["", *(f"{'':14} {line}" for line in self.groups.to_markdown().splitlines())]
        return "\n".join(lines)

    def _lines(self) -> list[str]:
        (positives, negatives), (tp, fp), queries = self.pairs, self.accepted, sum(self.queries)
        of = {
            "far": ("false accepts", f"{fp:,} of {negatives:,} negative pairs"),
            "frr": ("false rejects", f"{positives - tp:,} of {positives:,} positive pairs"),
            "precision": ("precision", f"{tp:,} of {tp + fp:,} accepted pairs"),
            "coverage": ("coverage", f"of {queries:,} queries"),
            "f_beta": (f"F{self.beta:g}-score", "of precision and recall"),
            "detection_rate": ("identified", f"of {self.queries[0]:,} queries with a positive"),
            "false_alarm_rate": ("false alarms", f"of {self.queries[1]:,} queries without"),
        }
        at = self.threshold
        found = "" if math.isnan(at.far) else f"; found at FAR {100 * at.far:.4g} %, FRR {100 * at.frr:.4g} %"
        lines = [f"threshold {at.similarity!r} (distance {at.distance!r}){found}"]
        for name, (text, counts) in of.items():
            value, interval = getattr(self, name), getattr(self, f"{name}_interval")
            if not math.isnan(value):
                if value in (0, 1) and interval != (0, 1):
                    counts += ", by the rule of three" + (" over the classes" if name == "frr" else "")
                lines.append(f"{text:14} {100 * value:9.4g} %   ({interval}){'':2}{counts}")
        if len(self.class_ids) < _FEW:
            lines.append(f"intervals of {len(self.class_ids)} classes hold less often than the 95 % that they are for")
        return lines

    def columns(self) -> dict[str, Any]:
        """The classes as columns of a table, with the ends of their intervals."""
        ends = {
            f"{rate}_{end}": getattr(self, f"class_{rate}_interval")[:, k]
            for rate in ("far", "frr")
            for k, end in enumerate(("low", "high"))
        }
        return class_table(self) | ends

    def to_frame(self) -> Any:
        """The classes as a pandas DataFrame."""
        return frame(self.columns())

    def to_markdown(self) -> str:
        """The rates over all pairs as a table."""
        rates = ("far", "frr", "precision", "coverage", "f_beta", "detection_rate", "false_alarm_rate")
        known = [name for name in rates if not math.isnan(getattr(self, name))]
        intervals = [getattr(self, f"{name}_interval") for name in known]
        return markdown(
            {
                "rate": known,
                "value": [getattr(self, name) for name in known],
                "low": [interval.low for interval in intervals],
                "high": [interval.high for interval in intervals],
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON knows; NaN becomes None."""
        return fields(self, ("curve", *(("class_names",) if self.class_names is None else ())))

    def plot(self, axes: "Axes | None" = None) -> "Axes":
        """Draw the similarities of positives and negatives with the threshold; needs matplotlib."""
        from tcm_fused.thresholds.plots import plot_similarities

        return plot_similarities(self, axes)


def evaluate(
    embeddings: Any,
    labels: Any,
    ref_emb: Any = None,
    ref_labels: Any = None,
    *,
    threshold: Any,
    beta: float = 1.0,
    groups: Any = None,
    ref_groups: Any = None,
    group_pairs: str = "within",
    backend: str = "auto",
    progress: bool = False,
) -> Evaluation:
    """FAR, FRR, precision, coverage and F-score of a threshold on these embeddings, with intervals, and by class.

    One pass over the pairs; rates are exact, for similarities in the precision of `opis`.

    Args:
        embeddings, labels, ref_emb, ref_labels, groups, ref_groups, group_pairs, backend, progress: as in `opis`. With
            `ref_emb` rows of `embeddings` are queries and those of `ref_emb` the gallery; queries whose class is not in
            the gallery have a false alarm rate. Without, each row is a query against all others.
        threshold: a `Threshold`, or a cosine similarity from -1 to 1.
        beta: weight of recall against precision in the F-score, above 0.

    Raises:
        TypeError, ValueError, RuntimeError: as `opis`; ValueError also if the threshold is one for other embeddings.

    Example:
        >>> x = np.array([[1, 0], [0.96, 0.28], [0, 1], [-1, 0]])
        >>> found = evaluate(x, np.array([0, 0, 1, 1]), threshold=0.5)
        >>> found.far, found.frr, found.precision, found.coverage
        (0.0, 0.5, 1.0, 0.5)
    """
    threshold, beta = as_threshold(threshold), check_beta(beta)
    pairs = Pairs(embeddings, labels, backend, progress, ref_emb, ref_labels, groups, ref_groups, group_pairs)
    threshold.check_columns(pairs.x.shape[1])
    at = threshold.above(pairs.dtype)
    counts = pairs.count(np.array([at]), all_classes=True)
    classes, counted = pairs.classes, slice(pairs.classes.counted)
    tp, fp, total = (table[..., 0] for table in counts.accepted(np.array([0])))
    rates = _rates(tp, fp, classes.positives, classes.negatives, beta) | _query_rates(pairs, counts, at)
    sizes = pairs.sizes_of_sets
    negative, positive = (
        negative_trials(classes.negatives, sizes)[counted],
        positive_trials(classes.positives, sizes)[counted],
    )
    class_far = share(fp, classes.negatives, 0.0)[counted]
    class_frr = (pairs.class_positives - tp[counted]) / pairs.class_positives
    return Evaluation(
        threshold=threshold,
        beta=beta,
        **rates,
        recall_at_1=counts.recall_at_1,
        pairs=(counts.rates.positives, counts.rates.negatives),
        accepted=(int(total[0]), int(total[1])),
        class_ids=pairs.class_ids,
        class_sizes=pairs.class_sizes,
        class_far=class_far,
        class_frr=class_frr,
        class_far_interval=binomial_intervals(class_far * negative, negative),
        class_frr_interval=binomial_intervals(class_frr * positive, positive),
        class_positives=pairs.class_positives,
        class_negatives=pairs.class_negatives,
        left_out=pairs.left_out,
        histogram=counts.rates.histogram(),
        curve=Curve.of_counts(counts).thinned(threshold=threshold.similarity),
        groups=_groups(counts, pairs.group_names),
        class_names=pairs.class_names,
    )


def rates_or_nan(embeddings: Any, labels: Any, threshold: Threshold, backend: str = "auto") -> dict[str, float]:
    """FAR and FRR at a deployed threshold, for a training run: NaN where the rows have none, and no error."""
    try:
        found = evaluate(embeddings, labels, threshold=threshold, backend=backend)
    except NothingToMeasure:
        return {"far": math.nan, "frr": math.nan}
    return {"far": found.far, "frr": found.frr}


def _rates(tp: Array, fp: Array, positives: Array, negatives: Array, beta: float) -> dict[str, Any]:
    """Rates over all pairs with their intervals, from those of each class [C]; a negative pair is of two of them."""
    every = [np.array(v) for v in (tp.sum(), fp.sum() // 2, positives.sum(), negatives.sum() // 2)]
    without = [total - of_class for total, of_class in zip(every, (tp, fp, positives, negatives), strict=True)]
    classes = int((positives > 0).sum())  # of which the positive pairs stand or fall together
    rules: dict[str, tuple[Callable[..., Array], Array, int]] = {
        "far": (lambda tp, fp, p, n: share(fp, n, math.nan), negatives > 0, int(every[3])),
        "frr": (lambda tp, fp, p, n: share(p - tp, p, math.nan), positives > 0, int(every[2])),
        "precision": (lambda tp, fp, p, n: share(tp, tp + fp, math.nan), tp + fp > 0, int(every[0] + every[1])),
        "f_beta": (lambda tp, fp, p, n: f_beta(tp, fp, p, beta), positives + fp > 0, int(every[1] + every[2])),
    }
    found: dict[str, Any] = {}
    for name, (rule, has_any, pairs) in rules.items():
        found[name] = float(rule(*every))
        independent = classes if name == "frr" else pairs
        found[f"{name}_interval"] = rate_interval(found[name], rule(*without)[has_any], pairs, independent)
    return found


def _query_rates(pairs: Pairs, counts: Counts, at: float) -> dict[str, Any]:
    """Coverage, and identification of queries with and without a positive; by the queries' classes."""
    nearest, known = counts.best.amax(0), counts.best[0] > -math.inf
    asked = nearest > -math.inf
    accepted = nearest >= at
    of = {
        "coverage": (accepted & asked, asked),
        "detection_rate": (counts.is_hit & accepted & known, known),
        "false_alarm_rate": (accepted & asked & ~known, asked & ~known),
    }
    found: dict[str, Any] = {"queries": (int(known.sum()), int((asked & ~known).sum()))}
    for name, sides in of.items():
        events, total = (
            np.bincount(pairs.y[side].cpu().numpy(), minlength=len(pairs.classes.ids)).astype(np.int64)
            for side in sides
        )
        found[name] = float(share(events.sum(), total.sum(), math.nan))
        without = share(events.sum() - events, total.sum() - total, math.nan)[total > 0]
        found[f"{name}_interval"] = rate_interval(found[name], without, int(total.sum()))
    return found


def _groups(counts: Counts, names: Array | None) -> Groups | None:
    if not counts.groups:
        return None
    ids = np.array(list(counts.groups))
    pairs = np.stack([of_group[0] for of_group in counts.groups.values()], axis=1)
    accepted = np.stack([of_group[1][:, 0] for of_group in counts.groups.values()], axis=1)
    return Groups(
        ids=ids,
        names=None if names is None else names[ids],
        far=share(accepted[1], pairs[1], math.nan),
        frr=share(pairs[0] - accepted[0], pairs[0], math.nan),
        positives=pairs[0],
        negatives=pairs[1],
    )
