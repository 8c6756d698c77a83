"""Which threshold to deploy and which margins to train with: `calibrate`, `suggest_margins`."""

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tcm_fused.arguments import check_choice
from tcm_fused.thresholds.frames import class_table, frame, markdown
from tcm_fused.thresholds.pairing import NothingToMeasure
from tcm_fused.thresholds.rates import (
    HALF,
    Histogram,
    Pairs,
    Worst,
    as_distance,
    check_rate,
    fields,
    lowest,
    share,
    worst_classes,
)
from tcm_fused.thresholds.sets import Array
from tcm_fused.thresholds.targets import (
    Curve,
    best_utility,
    choose,
    equal_error,
    highest_frr,
    lowest_far,
    one_target,
)
from tcm_fused.thresholds.threshold import Threshold
from tcm_fused.warn import warn_caller

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FARS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


class Operation(NamedTuple):
    """A threshold with the rates over all pairs that it gives."""

    similarity: float
    distance: float
    far: float  # false accept rate
    frr: float  # false reject rate


class TAR(NamedTuple):
    """True accept rate at a bound on the false accept rate; NaN where no threshold meets the bound."""

    bound: float
    similarity: float
    far: float  # the false accept rate reached
    tar: float
    finer: bool = False  # the bound is less than one negative pair: this is the rate where none at all is accepted


@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """The result of `calibrate`: a threshold, and its rates for all pairs and for each of C classes."""

    bound: dict[str, float]  # as asked for: {"far": ...}, {"frr": ...} and so on
    threshold: Threshold
    class_ids: Array  # [C] labels of the classes that have at least two samples, ascending
    class_sizes: Array  # [C]
    class_far: Array  # [C] false accept rate of each class: of the pairs with one sample in it
    class_frr: Array  # [C] false reject rate of each class
    equal_error: Operation  # where the two rates are nearest to each other; the error is their mean
    best_utility: Operation  # where the utility (b = 1) of the rates over all pairs is highest
    tar_at_far: list[TAR]  # at FAR 1e-6 ... 1e-1
    pairs: tuple[int, int]  # unordered positive and negative pairs: rates below 1 / pairs cannot be told from 0
    recall_at_1: float
    left_out: int  # classes of one sample
    class_positives: Array  # [C] pairs of two samples of each class
    class_negatives: Array  # [C] pairs of which one sample is in the class
    histogram: Histogram
    curve: Curve  # the rates at about 500 thresholds, for pictures
    class_names: Array | None = None  # [C] text of class_ids, which are its places then; None of integer labels

    @property
    def equal_error_rate(self) -> float:
        """Mean of the two rates at `equal_error`."""
        return (self.equal_error.far + self.equal_error.frr) / 2

    @property
    def similarity(self) -> float:
        """That of `threshold`."""
        return self.threshold.similarity

    @property
    def distance(self) -> float:
        """The Euclidean distance of `threshold`."""
        return self.threshold.distance

    def accepts(self, a: Any, b: Any = None) -> Any:
        """Whether `threshold` accepts pairs, by their similarities or by their embeddings: see `Threshold.accepts`."""
        return self.threshold.accepts(a, b)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `threshold` into a file, for `Threshold.load`."""
        self.threshold.save(path)

    def spread(self) -> dict[str, dict[str, float]]:
        """Mean, standard deviation, lowest and highest of the classes' rates."""
        return {
            name: {
                "mean": float(rate.mean()),
                "std": float(rate.std()),
                "min": float(rate.min()),
                "max": float(rate.max()),
            }
            for name, rate in (("far", self.class_far), ("frr", self.class_frr))
        }

    def worst(self, k: int = 10, rate: str = "frr") -> list[Worst]:
        """The k classes with the highest false reject rate (or `rate="far"`), the highest first."""
        check_choice("rate", rate, ("far", "frr"))
        values = self.class_frr if rate == "frr" else self.class_far
        return worst_classes(self, lowest(-values, k), values)

    def __repr__(self) -> str:
        return "\n".join([*self._operations(), *self._spread(), f"{'most false rejects':22} {self.worst(1)[0]}"])

    def report(self, worst: int = 5) -> str:
        """The result in sentences and tables, with that many of the classes with the most false rejects; `print` shows
        the first two tables."""
        lines = [*self._operations(), "", *self._spread(), "", "classes with the most false rejects:"]
        lines += [f"{'':14} {item}" for item in self.worst(worst)]
        lines += ["", f"{'false accepts at most':22}{'true accepts':>14}{'similarity':>22}"]
        for at in self.tar_at_far:
            text = f"{'no threshold':>14}" if math.isnan(at.tar) else f"{100 * at.tar:12.2f} %{at.similarity!r:>22}"
            lines.append(f"{at.bound:<22.0e}{text}{'   fewer than one pair' if at.finer else ''}")
        return "\n".join(lines)

    def _operations(self) -> list[str]:
        """Thresholds to all their digits, so that they decide as here wherever they are copied to."""
        lines = [
            f"{self.pairs[0]:,} positive and {self.pairs[1]:,} negative pairs, {len(self.class_ids):,} classes "
            f"({self.left_out:,} more of one sample left out)",
            f"{'':22}{'similarity':>22}{'distance':>22}{'false accepts':>16}{'false rejects':>16}",
        ]
        for name, at in (
            ("threshold", self.threshold),
            ("equal error", self.equal_error),
            ("best utility", self.best_utility),
        ):
            rates = f"{100 * at.far:14.4g} %{100 * at.frr:14.4g} %"
            lines.append(f"{name:22}{at.similarity!r:>22}{at.distance!r:>22}{rates}")
        return lines

    def _spread(self) -> list[str]:
        lines = [f"{'at the threshold':22}{'mean':>12}{'spread':>12}{'lowest':>12}{'highest':>12}"]
        for name, text in (("far", "class's false accepts"), ("frr", "class's false rejects")):
            spread = self.spread()[name]
            lines.append(f"{text:22}" + "".join(f"{100 * spread[k]:10.4g} %" for k in ("mean", "std", "min", "max")))
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON knows; NaN becomes None. `class_names` where there are some."""
        leave_out = ("curve", *(("class_names",) if self.class_names is None else ()))
        return {**fields(self, leave_out), "equal_error_rate": self.equal_error_rate, "spread": self.spread()}

    def columns(self) -> dict[str, Any]:
        """The classes as columns of a table."""
        return class_table(self)

    def to_frame(self) -> Any:
        """The classes as a pandas DataFrame."""
        return frame(self.columns())

    def to_markdown(self) -> str:
        """The thresholds with their rates as a table."""
        rows = {"threshold": self.threshold, "equal error": self.equal_error, "best utility": self.best_utility}
        values = {
            name: [getattr(at, name) for at in rows.values()] for name in ("similarity", "distance", "far", "frr")
        }
        return markdown({"": list(rows), **values})

    def plot(self, axes: "Axes | None" = None) -> "Axes":
        """Draw the similarities of positives and negatives with the threshold; needs matplotlib."""
        from tcm_fused.thresholds.plots import plot_similarities

        return plot_similarities(self, axes)


def calibrate(
    embeddings: Any,
    labels: Any,
    ref_emb: Any = None,
    ref_labels: Any = None,
    *,
    far: float | None = None,
    frr: float | None = None,
    precision: float | None = None,
    coverage: float | None = None,
    false_alarm: float | None = None,
    f_beta: float | None = None,
    eer: bool = False,
    min_dcf: float | None = None,
    costs: tuple[float, float] = (1.0, 1.0),
    groups: Any = None,
    ref_groups: Any = None,
    group_pairs: str = "within",
    backend: str = "auto",
    progress: bool = False,
) -> Calibration:
    """The threshold that meets a bound on one rate, or is best by a measure, and its cost in all and for each class.

    Give exactly one of these. Bounds:

    far: the lowest threshold whose false accept rate (share of all negative pairs with at least that similarity) is at
        most `far`.
    frr: the highest threshold whose false reject rate (share of all positive pairs below it) is at most `frr`.
    precision: the lowest threshold at which at least this share of the accepted pairs is positive.
    coverage: the highest threshold at which at least this share of the queries (of the rows, without `ref_emb`) has an
        accepted pair.
    false_alarm: the lowest threshold at which at most this share of the queries without a positive (whose class is not
        in the gallery; without `ref_emb`, classes of one sample) has an accepted pair.

    And measures, of which the best threshold is taken (in the middle, where a gap between the pairs has several):

    f_beta: the F-score (1 + b^2) P R / (b^2 P + R) of precision and recall, with this b.
    eer: True: the equal error, where false accept and false reject rate are nearest to each other.
    min_dcf: the least detection cost C_miss P FRR + C_accept (1 - P) FAR, with this prior P of a match and
        `costs` (C_miss, C_accept).

    Thresholds are multiples of 2^-17 = 7.6e-6 in similarity, below 1; rates at them are exact, for similarities in the
    precision of `opis`. Two passes over the pairs. Sets, groups and other arguments as in `opis`.

    A bound finer than the data (of fewer than one pair) gives the threshold at which no pair at all is wrong, with a
    warning: such a rate needs about 1 / bound pairs.

    Raises:
        TypeError, ValueError, RuntimeError: as `opis`; NothingToMeasure also where no threshold meets the bound.

    Example:
        >>> x = np.array([[1, 0], [0.96, 0.28], [0, 1], [-1, 0]])
        >>> found = calibrate(x, np.array([0, 0, 1, 1]), far=0.25)
        >>> found.threshold.far, found.threshold.frr, found.class_frr.tolist()
        (0.25, 0.5, [0.0, 1.0])
    """
    target = one_target(
        costs,
        far=far,
        frr=frr,
        precision=precision,
        coverage=coverage,
        false_alarm=false_alarm,
        f_beta=f_beta,
        eer=eer,
        min_dcf=min_dcf,
    )
    pairs = Pairs(embeddings, labels, backend, progress, ref_emb, ref_labels, groups, ref_groups, group_pairs)
    first = pairs.count(np.empty(0))
    rates, curve = first.rates, Curve.of_counts(first)
    chosen = choose(curve, target)
    if target.name in _JUST:
        _warn_if_finer(target.name, target.value, curve, f"the threshold lies just {_JUST[target.name]}")
    # For each class at the chosen threshold.
    counts = pairs.count(curve.thresholds[[chosen]])
    positives, negatives, _ = counts.accepted(np.array([0]))
    return Calibration(
        bound=target.asked(),
        threshold=Threshold(
            similarity=float(curve.thresholds[chosen]),
            far=float(curve.far[chosen]),
            frr=float(curve.frr[chosen]),
            target=target.asked(),
            columns=pairs.x.shape[1],
            pairs=(rates.positives, rates.negatives),
        ),
        class_ids=pairs.class_ids,
        class_sizes=pairs.class_sizes,
        class_far=share(negatives[:, 0], pairs.class_negatives, 0.0),
        class_frr=(pairs.class_positives - positives[:, 0]) / pairs.class_positives,
        equal_error=_operation(curve, equal_error(curve)),
        best_utility=_operation(curve, best_utility(curve)),
        tar_at_far=[_tar(curve, at) for at in _FARS],
        pairs=(rates.positives, rates.negatives),
        recall_at_1=counts.recall_at_1,
        left_out=pairs.left_out,
        class_positives=pairs.class_positives,
        class_negatives=pairs.class_negatives,
        histogram=rates.histogram(),
        curve=curve.thinned(threshold=float(curve.thresholds[chosen])),
        class_names=pairs.class_names,
    )


_JUST = {
    "far": "above the most similar negative",
    "frr": "below the least similar positive",
    "false_alarm": "above all queries that nothing matches",
}


def _warn_if_finer(name: str, bound: float, curve: Curve, meaning: str) -> None:
    """A bound of less than one pair: all that the data can tell is where there is none."""
    total, kind = {
        "far": (curve.negatives, "negative pairs"),
        "frr": (curve.positives, "positive pairs"),
        "false_alarm": (curve.strangers, "queries that nothing matches"),
    }[name]
    if bound * total < 1:
        warn_caller(
            f"{name}={bound:g} is finer than the data: one of {total:,} {kind} is a rate of {1 / total:.2g}. So "
            f"{meaning}, and says little about such rates; they need about {math.ceil(1 / bound):,} {kind}"
        )


def _operation(curve: Curve, k: int) -> Operation:
    similarity = curve.thresholds[k]
    return Operation(float(similarity), float(as_distance(similarity)), float(curve.far[k]), float(curve.frr[k]))


def _tar(curve: Curve, bound: float) -> TAR:
    k, finer = lowest_far(curve.far, bound), bound * curve.negatives < 1
    if k is None:
        return TAR(bound, math.nan, math.nan, math.nan, finer)
    tar = int(curve.accepted_positives[k]) / curve.positives
    return TAR(bound, float(curve.thresholds[k]), float(curve.far[k]), tar, finer)


@dataclass(frozen=True, eq=False, repr=False)
class Margins:
    """The result of `suggest_margins`. Pairs are ordered here, as in the loss: of one set both orders count."""

    margin_plus: float
    margin_minus: float
    count_plus: int  # positive pairs below margin_plus: those the loss would mine
    count_minus: int  # negative pairs from margin_minus on
    share_plus: float  # of all positive pairs
    share_minus: float  # of all negative pairs
    histogram: Histogram

    def __repr__(self) -> str:
        return "\n".join(
            (
                f"{'margin_plus':14} {self.margin_plus!r}",
                f"{'':14} {self.count_plus:,} positive pairs lie below it, {100 * self.share_plus:.3g} % of all",
                f"{'margin_minus':14} {self.margin_minus!r}",
                f"{'':14} {self.count_minus:,} negative pairs reach it, {100 * self.share_minus:.3g} % of all",
                f"TCMLoss(margin_plus={self.margin_plus!r}, margin_minus={self.margin_minus!r})",
            )
        )

    def report(self) -> str:
        """The result in sentences, as `print` shows it."""
        return repr(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON knows."""
        return fields(self)

    def plot(self, axes: "Axes | None" = None) -> "Axes":
        """Draw the similarities of positives and negatives with the margins; needs matplotlib."""
        from tcm_fused.thresholds.plots import plot_similarities

        return plot_similarities(self, axes)


def suggest_margins(
    embeddings: Any,
    labels: Any,
    ref_emb: Any = None,
    ref_labels: Any = None,
    *,
    far: float,
    frr: float,
    groups: Any = None,
    ref_groups: Any = None,
    group_pairs: str = "within",
    backend: str = "auto",
    progress: bool = False,
) -> Margins:
    """Margins for `tcm_loss` that bind for given shares of the pairs of held-out data.

    margin_minus is the lowest similarity that at most the share `far` of the negative pairs reach, and margin_plus the
    highest that at most the share `frr` of the positive pairs fall short of, both from the multiples of 2^-17. So the
    loss would mine these shares: margin_plus is the float32 number just below its multiple, since the loss takes a
    pair at the margin as hard. One pass over the pairs; sets, groups and other arguments as in `opis`, and as in
    `tcm_loss`: so the pairs are those that the loss will see.

    Warns where margin_plus lies below margin_minus: the two kinds overlap more than the shares allow for, as in a model
    that separates them badly; and where a share is less than one pair, so that none is mined.

    Raises:
        TypeError, ValueError, RuntimeError: as `calibrate`.

    Example:
        >>> x = np.array([[1, 0], [0.96, 0.28], [0, 1], [-0.8, 0.6]])
        >>> found = suggest_margins(x, np.array([0, 0, 1, 1]), far=0.3, frr=0.5)
        >>> round(found.margin_plus, 4), round(found.margin_minus, 4), found.count_plus, found.count_minus
        (0.96, 0.0, 2, 2)
    """
    far, frr = check_rate("far", far), check_rate("frr", frr)
    pairs = Pairs(embeddings, labels, backend, progress, ref_emb, ref_labels, groups, ref_groups, group_pairs)
    counts = pairs.count(np.empty(0))
    rates, curve = counts.rates, Curve.of_counts(counts)
    minus, plus = lowest_far(curve.far, far), highest_frr(curve.frr, frr)
    if minus is None:
        raise NothingToMeasure(
            f"no margin_minus meets far={far}: the share {curve.far[-1]:.3g} of the negative pairs has similarity 1; "
            "rows of different classes are the same"
        )
    _warn_if_finer("far", far, curve, "margin_minus lies just above the most similar negative, no negative is mined")
    _warn_if_finer("frr", frr, curve, "margin_plus lies just below the least similar positive, no positive is mined")
    orders = 1 if pairs.is_open else 2  # in which the loss sees a pair
    count_plus = orders * (rates.positives - int(rates.accepted_positives[plus]))
    count_minus = orders * int(rates.accepted_negatives[minus])
    # Just below the point of the grid, since the loss takes a pair at the margin as hard.
    margin_plus, margin_minus = float(np.nextafter(np.float32(plus / HALF - 1), np.float32(-2))), minus / HALF - 1
    if margin_plus < margin_minus:
        warn_caller(
            f"far={far:g} and frr={frr:g} give margin_plus={margin_plus:.6g} below margin_minus={margin_minus:.6g}: "
            "positives and negatives overlap by more than these shares. A loss with such margins leaves the overlap as "
            "it is, so that no threshold need separate the two; take larger shares until margin_plus is above, or "
            "begin with the defaults, 0.9 and 0.5"
        )
    return Margins(
        margin_plus=margin_plus,
        margin_minus=margin_minus,
        count_plus=count_plus,
        count_minus=count_minus,
        share_plus=count_plus / (orders * rates.positives),
        share_minus=count_minus / (orders * rates.negatives),
        histogram=rates.histogram(),
    )
