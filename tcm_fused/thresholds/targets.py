"""Which threshold to take: bounds and optima over all thresholds at once, from exact counts alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from tcm_fused.arguments import check_number
from tcm_fused.thresholds.pairing import NothingToMeasure
from tcm_fused.thresholds.rates import HALF, Counts, ErrorRates, check_rate, share, utility_of
from tcm_fused.thresholds.sets import Array


@dataclass(frozen=True, eq=False)
class Curve(ErrorRates):
    """Pairs accepted at each of K ascending thresholds; a pair is accepted from its threshold on."""

    thresholds: Array  # [K]
    accepted_positives: Array  # [K] int64
    accepted_negatives: Array  # [K] int64
    positives: int
    negatives: int
    answered: Array | None = None  # [K] int64, queries of which a pair is accepted
    queries: int = 0
    alarms: Array | None = None  # [K] int64, those of them that have no positive
    strangers: int = 0  # queries that have no positive

    @property
    def precision(self) -> Array:
        """Share of the accepted pairs that match, [K]; NaN where none is accepted."""
        return share(self.accepted_positives, self.accepted_positives + self.accepted_negatives, math.nan)

    def f_beta(self, beta: float) -> Array:
        """(1 + b^2) P R / (b^2 P + R) of precision and recall, [K]."""
        return f_beta(self.accepted_positives, self.accepted_negatives, self.positives, beta)

    def cost(self, cost: "Cost") -> Array:
        """The detection cost, [K]."""
        return cost.of(self.far, self.frr)

    def thinned(self, most: int = 512, threshold: float | None = None) -> "Curve":
        """The same counts at fewer thresholds, for a picture.

        Where either rate passes one of about `most` levels, where they are equal, and on either side of `threshold`.
        """
        last = len(self.thresholds) - 1
        places = [np.array([0, equal_error(self), last])]
        if threshold is not None:
            after = int(np.searchsorted(self.thresholds, threshold))
            places.append(np.array([after - 1, after]).clip(0, last))
        for falling, total in ((self.accepted_negatives, self.negatives), (self.accepted_positives, self.positives)):
            for count in (falling, total - falling):  # both ends of the rates in detail
                levels = np.append(0, np.geomspace(1, max(total, 1), most // 4))
                ascending = count if count[-1] >= count[0] else count[::-1]
                at = np.searchsorted(ascending, levels, side="right").clip(max=len(count) - 1)
                places.append(at if ascending is count else len(count) - 1 - at)
        k = np.unique(np.concatenate(places))
        kept = [None if v is None else v[k] for v in (self.answered, self.alarms)]
        return Curve(
            self.thresholds[k],
            self.accepted_positives[k],
            self.accepted_negatives[k],
            self.positives,
            self.negatives,
            kept[0],
            self.queries,
            kept[1],
            self.strangers,
        )

    @classmethod
    def of_counts(cls, counts: Counts) -> "Curve":
        """On the grid without similarity 1, where rounding decides about equal rows."""
        rates, nearest = counts.rates, counts.best.amax(0)
        known = counts.best[0] > -math.inf
        answered, alarms = _reached(nearest), _reached(nearest[~known])
        return cls(
            np.arange(2 * HALF) / HALF - 1,
            rates.accepted_positives[:-1],
            rates.accepted_negatives[:-1],
            rates.positives,
            rates.negatives,
            answered[:-1],
            int(answered[0]),
            alarms[:-1],
            int(alarms[0]),
        )

    @classmethod
    def of_scores(cls, scores: Array, same: Array) -> "Curve":
        """At every score, and above the highest: of trials [P], each with whether it is of one identity."""
        order = np.argsort(scores, kind="stable")
        ascending, hit = scores[order], same[order].astype(np.int64)
        first = np.flatnonzero(np.append(True, ascending[1:] != ascending[:-1]))
        below = np.cumsum(hit) - hit  # positives with a lower score
        positives = np.append(hit.sum() - below[first], 0)
        accepted = np.append(len(hit) - first, 0)
        thresholds = np.append(ascending[first], np.nextafter(ascending[-1], np.inf))
        return cls(thresholds, positives, accepted - positives, int(hit.sum()), int(len(hit) - hit.sum()))


def _reached(similarities: Tensor) -> Array:
    """[2 HALF + 1] how many reach each threshold of the grid."""
    found = similarities[similarities > -math.inf]
    cell = (found * HALF).floor().long().clamp(-HALF, HALF) + HALF
    counts: Array = cell.bincount(minlength=2 * HALF + 1).flip(0).cumsum(0).flip(0).cpu().numpy()
    return counts


class Cost(NamedTuple):
    """The detection cost of NIST's evaluations, C_miss P FRR + C_accept (1 - P) FAR with the prior P of a match.

    Divided by that of the better of accepting all and rejecting all, so that 1 is worth nothing.
    """

    prior: float
    miss: float = 1.0
    accept: float = 1.0

    def of(self, far: Array, frr: Array) -> Array:
        """The cost at these rates."""
        least = min(self.miss * self.prior, self.accept * (1 - self.prior))
        return (self.miss * self.prior * frr + self.accept * (1 - self.prior) * far) / least


class Target(NamedTuple):
    """The aim of a threshold: a bound, or a measure that is to be best."""

    name: str
    value: float
    cost: Cost | None = None

    def asked(self) -> dict[str, float]:
        """As a result tells it."""
        costs = {} if self.cost is None else {"cost_miss": self.cost.miss, "cost_accept": self.cost.accept}
        return {self.name: self.value, **costs}


_BOUNDS = ("far", "frr", "precision", "coverage", "false_alarm")


def one_target(costs: Any = (1.0, 1.0), **targets: Any) -> Target:
    """The one that is given, of those that may be: the bounds, and `f_beta`, `eer` and `min_dcf` with its costs of a
    miss and of a false accept.

    Raises:
        TypeError, ValueError: not exactly one is given, or it is out of range.
    """
    given = {name: value for name, value in targets.items() if value is not None and value is not False}
    if len(given) != 1:
        shown = " and ".join(f"{name}={value}" for name, value in given.items()) or "none"
        if not set(given) - {"far", "frr"}:
            shown = f"far={targets['far']} and frr={targets['frr']}"
        others = ", ".join(name for name in targets if name not in ("far", "frr"))
        raise ValueError(f"give exactly one of far and frr (or of {others}), got {shown}")
    ((name, value),) = given.items()
    miss, accept = _costs(costs)
    if name != "min_dcf" and (miss, accept) != (1.0, 1.0):
        raise ValueError(f"costs={costs} are those of min_dcf, got {name}={value}")
    if name in _BOUNDS:
        return Target(name, check_rate(name, value))
    if name == "min_dcf":
        prior = check_rate("min_dcf", value)
        return Target(name, prior, Cost(prior, miss, accept))
    if name == "eer":
        if value is not True:
            raise TypeError(f"eer must be True or False, got {value!r}")
        return Target(name, True)
    return Target(name, check_beta(value, name))


def check_beta(value: Any, name: str = "beta") -> float:
    """A weight of recall against precision, above 0."""
    check_number(name, value, least=0.0)
    if isinstance(value, bool) or not 0 < value <= 1e100:  # its square is a number too
        raise ValueError(f"{name} must be above 0 and at most 1e100, got {value}")
    return float(value)


def _costs(costs: Any) -> tuple[float, float]:
    if not isinstance(costs, (tuple, list)) or len(costs) != 2:
        raise TypeError(f"costs must be a pair (of a miss, of a false accept), got {costs!r}")
    for name, value in zip(("of a miss", "of a false accept"), costs, strict=True):
        check_number(f"the cost {name}", value, least=0.0)
        if value == 0:
            raise ValueError(f"the cost {name} must be above 0")
    return float(costs[0]), float(costs[1])


def choose(curve: Curve, target: Target) -> int:
    """The place of the threshold on the curve.

    far, precision: the lowest that meets the bound; frr, coverage: the highest. The others: where the value is best,
    the middle of the first run of thresholds that all have it.

    Raises:
        NothingToMeasure: no threshold meets the bound.
    """
    found = _RULES[target.name](curve, target)
    if found is None:
        raise NothingToMeasure(_why_none(curve, target))
    return found


def _why_none(curve: Curve, target: Target) -> str:
    if target.name == "far":
        return (
            f"no threshold meets far={target.value}: at similarity 1 the false accept rate is still "
            f"{curve.far[-1]:.3g}; rows of different classes are the same"
        )
    if target.name == "false_alarm":
        return (
            f"no threshold meets false_alarm={target.value}: at similarity 1 the rate is still "
            f"{float(curve.alarms[-1] / curve.strangers) if curve.alarms is not None else math.nan:.3g}"
        )
    best = np.nanmax(curve.precision)
    return f"no threshold meets precision={target.value}: the highest at any is {best:.3g}"


def lowest_far(far: Array, bound: float) -> int | None:
    """The first threshold with a false accept rate of at most `bound`."""
    return int(np.argmax(far <= bound)) if far[-1] <= bound else None


def highest_frr(frr: Array, bound: float) -> int:
    """The last threshold with a false reject rate of at most `bound`; at the lowest none is rejected."""
    return int(np.flatnonzero(frr <= bound)[-1])


def middle(values: Array, best: Callable[[Array], Any]) -> int:
    """Middle of the first run that has the best value: a gap between the pairs has one value throughout."""
    start = int(np.argmax(values == best(values)))
    run = np.flatnonzero(values[start:] != values[start])
    length = int(run[0]) if len(run) else len(values) - start
    return start + (length - 1) // 2


def best_utility(curve: Curve) -> int:
    """Where the utility (b = 1) of the rates over all pairs is highest."""
    return middle(utility_of(1 - curve.frr, 1 - curve.far, 1.0), np.max)


def equal_error(curve: Curve) -> int:
    """Where the two rates are nearest to each other."""
    return middle(np.abs(curve.far - curve.frr), np.min)


def f_beta(tp: Array, fp: Array, positives: Any, beta: float) -> Array:
    """(1 + b^2) TP / ((1 + b^2) TP + b^2 FN + FP), 0 where nothing is accepted and all is missed."""
    b = beta**2
    return share((1 + b) * tp, (1 + b) * tp + b * (positives - tp) + fp, 0.0)


def _precise(curve: Curve, bound: float) -> int | None:
    enough = np.nan_to_num(curve.precision, nan=0.0) >= bound
    return int(np.argmax(enough)) if enough.any() else None


def _covering(curve: Curve, bound: float) -> int:
    if curve.answered is None:
        raise ValueError(
            "coverage is the share of queries that are answered: lists of pairs have none, give far or frr"
        )
    return int(np.flatnonzero(curve.answered / max(curve.queries, 1) >= bound)[-1])


def _without_alarms(curve: Curve, bound: float) -> int | None:
    if curve.alarms is None or curve.strangers == 0:
        raise NothingToMeasure(
            "false_alarm needs queries without a positive: all classes of queries are in the gallery"
        )
    return lowest_far(curve.alarms / curve.strangers, bound)


_RULES: dict[str, Callable[[Curve, Target], int | None]] = {
    "far": lambda curve, target: lowest_far(curve.far, target.value),
    "frr": lambda curve, target: highest_frr(curve.frr, target.value),
    "precision": lambda curve, target: _precise(curve, target.value),
    "coverage": lambda curve, target: _covering(curve, target.value),
    "false_alarm": lambda curve, target: _without_alarms(curve, target.value),
    "f_beta": lambda curve, target: middle(curve.f_beta(target.value), np.max),
    "eer": lambda curve, target: equal_error(curve),
    "min_dcf": lambda curve, target: middle(curve.cost(target.cost or Cost(target.value)), np.min),
}
