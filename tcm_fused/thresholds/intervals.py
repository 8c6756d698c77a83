"""95 % intervals of rates over pairs that share embeddings.

Pairs are not independent: one odd class, or one bad picture, is in many. An interval that counts each pair (Clopper and
Pearson's of the binomial) is therefore too narrow. A new data set draws other classes, so the spread is that
from class to class: each class is left out in turn, with all pairs of which either row is in it (`jackknife_variance`,
the two-way form: to first order the bootstrap over classes, and exact, with nothing drawn at random). Clopper's and
Pearson's interval is then taken for the number of independent pairs that would spread as much (`rate_interval`, by
Korn and Graubard 1998): it stays within 0 and 1 and is sound for rare errors. Where nothing was observed there is no
spread, and the rule of three gives the upper end, 3 / n: of n classes for false rejects, since the positive pairs of a
class stand or fall together; else of n pairs, taken as independent, so it is the least. The spread of few classes is
badly known: of 5 in a simulation the interval of false rejects held 87 % of the time, of 20 unequal ones 90 %.
"""

import math
from functools import cache
from typing import NamedTuple

import numpy as np

from tcm_fused.thresholds.pairing import NothingToMeasure
from tcm_fused.thresholds.sets import Array

_ALPHA = 0.05
_NORMAL = 1.959963984540054  # two-sided quantile of the normal distribution
_MANY = 3000  # from where on the beta distribution is integrated around its peak


class Interval(NamedTuple):
    """Of 95 %."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.low:.3g} to {100 * self.high:.3g} %"


def binomial_interval(events: float, total: float) -> Interval:
    """Clopper's and Pearson's interval of a share of independent trials; the rule of three where it is 0 or 1.

    Raises:
        NothingToMeasure: there are no trials.
    """
    if not total > 0 or not 0 <= events <= total:
        raise NothingToMeasure(f"no interval of {events:g} events in {total:g} trials: there must be a trial")
    if events == 0:
        return Interval(0.0, min(3 / total, 1.0))
    if events == total:
        return Interval(max(1 - 3 / total, 0.0), 1.0)
    low = beta_quantile(events, total - events + 1, _ALPHA / 2)
    return Interval(low, beta_quantile(events + 1, total - events, 1 - _ALPHA / 2))


def rate_interval(rate: float, without: Array, total: int, independent: int | None = None) -> Interval:
    """The interval of a rate over `total` pairs, from its values [C] without each class in turn.

    NaN for a rate that is NaN. (0, 1) where it is known from fewer than three classes, or is that of one class alone.
    For a rate of 0 or 1 the rule of three, over `independent` pairs (default: all).
    """
    if math.isnan(rate):
        return Interval(math.nan, math.nan)
    if len(without) < 3 or np.isnan(without).any():
        return Interval(0.0, 1.0)
    if rate in (0.0, 1.0):
        units = total if independent is None else min(independent, total)
        return binomial_interval(rate * units, units)
    effective = _effective(rate, without, total)
    events = rate * effective
    low = beta_quantile(events, effective - events + 1, _ALPHA / 2)
    return Interval(low, beta_quantile(events + 1, effective - events, 1 - _ALPHA / 2))


def _effective(rate: float, without: Array, total: float) -> float:
    """As many independent pairs as spread like these; fewer for the few classes that the spread is known from."""
    variance = jackknife_variance(without)
    independent = total if variance == 0 else min(rate * (1 - rate) / variance, total)
    return independent * min((_NORMAL / student_quantile(len(without) - 1)) ** 2, 1.0)


def effective_pairs(events: Array, pairs: Array) -> float:
    """As many independent pairs as spread like those of classes [C], of which `events` [C] are of one kind."""
    rate, without = events.sum() / pairs.sum(), (events.sum() - events) / np.maximum(pairs.sum() - pairs, 1)
    if len(pairs) < 3 or rate in (0, 1):
        return float(pairs.sum())
    return _effective(float(rate), without, float(pairs.sum()))


def jackknife_variance(without: Array) -> float:
    """(C - 1) / C * sum of (value without class c - their mean)^2."""
    classes = len(without)
    return float((classes - 1) / classes * np.square(without - without.mean()).sum())


@cache
def student_quantile(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t."""
    x = beta_quantile(freedom / 2, 0.5, _ALPHA)
    return math.sqrt(freedom * (1 - x) / x)


def beta_quantile(a: float, b: float, share: float) -> float:
    """The x at which `incomplete_beta(a, b, x)` is `share`: by bisection of its logarithm's odds."""
    low, high = -745.0, 745.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if incomplete_beta(a, b, _logistic(middle)) < share else (low, middle)
    return _logistic((low + high) / 2)


def _logistic(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z > 0 else math.exp(z) / (1 + math.exp(z))


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b): the share below x of a beta distribution."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if a > _MANY and b > _MANY:
        return _around_the_peak(a, b, x)
    if x > (a + 1) / (a + b + 2):  # where the fraction below converges slowly
        return 1 - incomplete_beta(b, a, 1 - x)
    log = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(log) * _fraction(a, b, x) / a


def _fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of I_x(a, b), from the front (Lentz's method)."""
    tiny = 1e-300
    c, d = 1.0, 1 / max(1 - (a + b) * x / (a + 1), tiny)
    value = d
    for m in range(1, 100_000):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            c = 1 + numerator / c
            d = 1 + numerator * d
            c, d = (v if abs(v) > tiny else tiny for v in (c, d))
            d = 1 / d
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return value


@cache
def _nodes() -> tuple[Array, Array]:
    return np.polynomial.legendre.leggauss(64)


def _around_the_peak(a: float, b: float, x: float) -> float:
    """By quadrature of the density from x outwards, relative to its peak; it vanishes ten deviations away."""
    mean = a / (a + b)
    deviation = math.sqrt(mean * (1 - mean) / (a + b + 1))
    above = x > mean
    end = min(mean + 12 * deviation, 1.0) if above else max(mean - 12 * deviation, 0.0)
    if (end - x if above else x - end) <= 0:
        return float(above)
    nodes, weights = _nodes()
    t = x + (end - x) * (nodes + 1) / 2
    peak = (a - 1) * math.log(mean) + (b - 1) * math.log1p(-mean)
    density = np.exp((a - 1) * np.log(t) + (b - 1) * np.log1p(-t) - peak)
    area = abs(end - x) / 2 * float(weights @ density)
    log = peak + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    tail = area * math.exp(log)
    return 1 - tail if above else tail
