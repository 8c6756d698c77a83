"""Which threshold to deploy and which margins to train with: `calibrate`, `suggest_margins`."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tcm_fused.arguments import check_choice
from tcm_fused.thresholds.rates import (
    HALF,
    Histogram,
    NothingToMeasure,
    Pairs,
    Rates,
    Worst,
    as_distance,
    check_rate,
    lowest,
    plain,
    utility_of,
    worst_classes,
)
from tcm_fused.thresholds.sets import Array
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

    bound: dict[str, float]  # as asked for: {"far": ...} or {"frr": ...}
    threshold: Operation
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
    histogram: Histogram
    class_names: Array | None = None  # [C] text of class_ids, which are its places then; None of integer labels

    @property
    def equal_error_rate(self) -> float:
        """Mean of the two rates at `equal_error`."""
        return (self.equal_error.far + self.equal_error.frr) / 2

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
        leave_out = ("class_names",) if self.class_names is None else ()
        return {**plain(self, leave_out), "equal_error_rate": self.equal_error_rate, "spread": self.spread()}

    def plot(self, axes: "Axes | None" = None) -> "Axes":
        """Draw the similarities of positives and negatives with the threshold; needs matplotlib."""
        from tcm_fused.thresholds.plots import plot_similarities

        return plot_similarities(self, axes)


def calibrate(
    embeddings: Any,
    labels: Any,
    *,
    far: float | None = None,
    frr: float | None = None,
    backend: str = "auto",
    progress: bool = False,
) -> Calibration:
    """The threshold that meets a bound on one error rate, and its cost in all and for each class.

    Give one of `far` and `frr`. far: the lowest threshold whose false accept rate (share of all negative pairs with at
    least that similarity) is at most `far`. frr: the highest threshold whose false reject rate (share of all positive
    pairs below it) is at most `frr`. Thresholds are multiples of 2^-17 = 7.6e-6 in similarity, below 1; rates at them
    are exact, for similarities in the precision of `opis`.

    Two passes over the pairs. Arguments otherwise as in `opis`.

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
    name, bound = _one_bound(far, frr)
    pairs = Pairs(embeddings, labels, backend, progress)
    rates = pairs.count(np.empty(0)).rates
    curves = _curves(rates)
    chosen = _lowest_far(curves[0], bound) if name == "far" else _highest_frr(curves[1], bound)
    if chosen is None:
        raise NothingToMeasure(
            f"no threshold meets far={bound}: at similarity 1 the false accept rate is still {curves[0][-1]:.3g}; "
            "rows of different classes are the same"
        )
    where = "above the most similar negative" if name == "far" else "below the least similar positive"
    _warn_if_finer(name, bound, rates, f"the threshold lies just {where}")
    equal = _middle(np.abs(curves[0] - curves[1]), np.min)
    best = _middle(utility_of(1 - curves[1], 1 - curves[0], 1.0), np.max)
    # For each class at the chosen threshold.
    counts = pairs.count(np.array([chosen / HALF - 1]))
    positives, negatives, _ = counts.accepted(np.array([0]))
    return Calibration(
        bound={name: bound},
        threshold=_operation(curves, chosen),
        class_ids=pairs.class_ids,
        class_sizes=pairs.class_sizes,
        class_far=negatives[:, 0] / pairs.class_negatives,
        class_frr=(pairs.class_positives - positives[:, 0]) / pairs.class_positives,
        equal_error=_operation(curves, equal),
        best_utility=_operation(curves, best),
        tar_at_far=[_tar(rates, at) for at in _FARS],
        pairs=(rates.positives, rates.negatives),
        recall_at_1=counts.recall_at_1,
        left_out=pairs.left_out,
        histogram=rates.histogram(),
        class_names=pairs.class_names,
    )


def _warn_if_finer(name: str, bound: float, rates: Rates, meaning: str) -> None:
    """A bound of less than one pair: all that the data can tell is where there is none."""
    total, kind = (rates.negatives, "negative") if name == "far" else (rates.positives, "positive")
    if bound * total < 1:
        warn_caller(
            f"{name}={bound:g} is finer than the data: one of {total:,} {kind} pairs is a rate of {1 / total:.2g}. So "
            f"{meaning}, and says little about such rates; they need about {math.ceil(1 / bound):,} {kind} pairs"
        )


def _one_bound(far: float | None, frr: float | None) -> tuple[str, float]:
    if (far is None) == (frr is None):
        raise ValueError(f"give exactly one of far and frr, got far={far} and frr={frr}")
    return ("far", check_rate("far", far)) if far is not None else ("frr", check_rate("frr", frr))


def _curves(rates: Rates) -> tuple[Array, Array]:
    """False accept and reject rate on the grid without similarity 1, where rounding decides about equal rows."""
    return rates.far[:-1], rates.frr[:-1]


def _lowest_far(far: Array, bound: float) -> int | None:
    """The first point of the grid with a false accept rate of at most `bound`."""
    return int(np.argmax(far <= bound)) if far[-1] <= bound else None


def _highest_frr(frr: Array, bound: float) -> int:
    """The last point of the grid with a false reject rate of at most `bound`; at similarity -1 none is rejected."""
    return int(np.flatnonzero(frr <= bound)[-1])


def _middle(values: Array, best: Any) -> int:
    """Middle of the first run of the grid that has the best value: a gap between the pairs has one value throughout."""
    start = int(np.argmax(values == best(values)))
    run = np.flatnonzero(values[start:] != values[start])
    length = int(run[0]) if len(run) else len(values) - start
    return start + (length - 1) // 2


def _operation(curves: tuple[Array, Array], k: int) -> Operation:
    similarity = k / HALF - 1
    return Operation(similarity, float(as_distance(np.array(similarity))), float(curves[0][k]), float(curves[1][k]))


def _tar(rates: Rates, bound: float) -> TAR:
    k = _lowest_far(_curves(rates)[0], bound)
    if k is None:
        return TAR(bound, math.nan, math.nan, math.nan, bound * rates.negatives < 1)
    tar = int(rates.accepted_positives[k]) / rates.positives
    return TAR(bound, k / HALF - 1, float(rates.far[k]), tar, bound * rates.negatives < 1)


@dataclass(frozen=True, eq=False, repr=False)
class Margins:
    """The result of `suggest_margins`. Pairs are ordered here, as in the loss: (i, j) and (j, i) count as two."""

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
        return plain(self)

    def plot(self, axes: "Axes | None" = None) -> "Axes":
        """Draw the similarities of positives and negatives with the margins; needs matplotlib."""
        from tcm_fused.thresholds.plots import plot_similarities

        return plot_similarities(self, axes)


def suggest_margins(
    embeddings: Any, labels: Any, *, far: float, frr: float, backend: str = "auto", progress: bool = False
) -> Margins:
    """Margins for `tcm_loss` that bind for given shares of the pairs of held-out data.

    margin_minus is the lowest similarity that at most the share `far` of the negative pairs reach, and margin_plus the
    highest that at most the share `frr` of the positive pairs fall short of, both from the multiples of 2^-17. So the
    loss would mine these shares: margin_plus is the float32 number just below its multiple, since the loss takes a
    pair at the margin as hard. One pass over the pairs; arguments otherwise as in `opis`.

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
    rates = Pairs(embeddings, labels, backend, progress).count(np.empty(0)).rates
    curves = _curves(rates)
    minus, plus = _lowest_far(curves[0], far), _highest_frr(curves[1], frr)
    if minus is None:
        raise NothingToMeasure(
            f"no margin_minus meets far={far}: the share {curves[0][-1]:.3g} of the negative pairs has similarity 1; "
            "rows of different classes are the same"
        )
    _warn_if_finer("far", far, rates, "margin_minus lies just above the most similar negative, no negative is mined")
    _warn_if_finer("frr", frr, rates, "margin_plus lies just below the least similar positive, no positive is mined")
    count_plus = 2 * (rates.positives - int(rates.accepted_positives[plus]))
    count_minus = 2 * int(rates.accepted_negatives[minus])
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
        share_plus=count_plus / (2 * rates.positives),
        share_minus=count_minus / (2 * rates.negatives),
        histogram=rates.histogram(),
    )
