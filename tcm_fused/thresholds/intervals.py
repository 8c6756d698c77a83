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

For a single class there is no spread from class to class. Its intervals take as many independent trials as there are
for certain (`positive_trials`, `negative_trials`), so they are wide rather than too narrow.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

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
    return _one(binomial_intervals(np.array([events]), np.array([total])))


def binomial_intervals(events: Array, total: Array) -> Array:
    """[K, 2] the same of K shares; (0, 1) of less than one trial."""
    events, total = np.asarray(events, dtype=np.float64), np.asarray(total, dtype=np.float64)
    none, every = events <= 0, events >= total
    three = np.minimum(3 / np.maximum(total, 1), 1)
    found = np.stack((np.where(every, 1 - three, 0.0), np.where(none, three, 1.0)), axis=1)
    some = ~none & ~every & (total >= 1)
    found[some] = _clopper_pearson(events[some], total[some])
    found[total < 1] = 0, 1
    return found


def _clopper_pearson(events: Array, total: Array) -> Array:
    a, b = np.stack((events, events + 1)), np.stack((total - events + 1, total - events))
    tails = np.broadcast_to([[_ALPHA / 2], [1 - _ALPHA / 2]], a.shape)
    return beta_quantile(a.ravel(), b.ravel(), tails.ravel()).reshape(a.shape).T


def _one(intervals: Array) -> Interval:
    return Interval(*map(float, intervals[0]))


def positive_trials(pairs: Array, sizes: Sequence[Array]) -> Array:
    """Independent trials among the positive pairs [C] of classes with `sizes` [C] in one set or in both.

    Pairs without a common row are independent. All pairs of n rows fall into n - 1 (n odd: n) parts of such pairs, of
    q queries with g others into max(q, g); those that groups leave, into no more. A mean over P pairs in k parts
    spreads at most as one of P / k trials (Hoeffding 1963, section 5; Janson 2004). For other samples of the class.
    """
    parts = sizes[0] - 1 + sizes[0] % 2 if len(sizes) == 1 else np.maximum(sizes[0], sizes[1])
    return np.asarray(pairs / np.maximum(parts, 1))


def negative_trials(pairs: Array, sizes: Sequence[Array]) -> Array:
    """Independent trials among the negative pairs [C] of each class, with these `sizes` [C] of all classes.

    Each other class is one, with weight by its pairs m: (sum of m)^2 / sum of m^2 of equal weight spread as much. For
    these samples of the class against other classes of the same kind.
    """
    q, g = (np.asarray(size, dtype=np.float64) for size in (sizes[0], sizes[-1]))
    if len(sizes) == 1:
        squares = q**2 * ((q**2).sum() - q**2)
    else:  # m of class j is q g_j + g q_j
        squares = q**2 * (g**2).sum() + g**2 * (q**2).sum() + 2 * q * g * (q * g).sum() - 4 * q**2 * g**2
    return np.asarray(np.square(pairs.astype(np.float64)) / np.maximum(squares, 1))


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
    effective = np.array([_effective(rate, without, total)])
    return _one(_clopper_pearson(rate * effective, effective))


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
    x = float(beta_quantile(freedom / 2, 0.5, _ALPHA)[0])
    return math.sqrt(freedom * (1 - x) / x)


def beta_quantile(a: Any, b: Any, share: Any) -> Array:
    """The x [K] at which `incomplete_beta(a, b, x)` is `share`; each [K] or one number.

    By Newton's method on the logarithm of its odds, within bounds that are halved where that leaves them.
    """
    a, b, share = (np.array(v, dtype=np.float64, ndmin=1) for v in np.broadcast_arrays(a, b, share))
    low, high, z, log_beta = np.full(a.shape, -745.0), np.full(a.shape, 745.0), np.log(a) - np.log(b), _log_beta(a, b)
    going = np.arange(len(z))
    for _ in range(100):
        p, q, at = a[going], b[going], z[going]
        x, rest = _logistic(at), _logistic(-at)
        over = incomplete_beta(p, q, x) - share[going]
        low[going], high[going] = np.where(over < 0, at, low[going]), np.where(over < 0, high[going], at)
        with np.errstate(all="ignore"):  # far out the slope is 0
            step = at - over / np.exp(p * np.log(x) + q * np.log(rest) - log_beta[going])
        inside = np.isfinite(step) & (step > low[going]) & (step < high[going])
        z[going] = np.where(inside, step, (low[going] + high[going]) / 2)
        going = going[np.abs(z[going] - at) > 1e-12 * np.maximum(np.abs(at), 1)]
        if len(going) == 0:
            break
    return _logistic(z)


def _logistic(z: Array) -> Array:
    small = np.exp(-np.abs(z))
    return np.asarray(np.where(z > 0, 1, small) / (1 + small))


_log_gamma = np.vectorize(math.lgamma, otypes=[np.float64])


def _log_beta(a: Array, b: Array) -> Array:
    return np.asarray(_log_gamma(a) + _log_gamma(b) - _log_gamma(a + b))


def incomplete_beta(a: Any, b: Any, x: Any) -> Array:
    """The regularised incomplete beta function I_x(a, b): the share below x of a beta distribution; [K] of each."""
    a, b, x = (np.asarray(v, dtype=np.float64) for v in np.broadcast_arrays(a, b, x))
    found = np.asarray(x >= 1, dtype=np.float64)
    inside = (x > 0) & (x < 1)
    many = inside & (a > _MANY) & (b > _MANY)
    found[many] = _around_the_peak(a[many], b[many], x[many])
    inside &= ~many
    found[inside] = _by_fraction(a[inside], b[inside], x[inside])
    return found


def _by_fraction(a: Array, b: Array, x: Array) -> Array:
    turned = x > (a + 1) / (a + b + 2)  # where the fraction converges slowly
    p, q, u = np.where(turned, b, a), np.where(turned, a, b), np.where(turned, 1 - x, x)
    value = np.exp(p * np.log(u) + q * np.log1p(-u) - _log_beta(p, q)) * _fraction(p, q, u) / p
    return np.asarray(np.where(turned, 1 - value, value))


def _fraction(a: Array, b: Array, x: Array) -> Array:
    """The continued fraction of I_x(a, b), from the front (Lentz's method)."""
    tiny = 1e-300
    c, d = np.ones_like(x), 1 / np.maximum(1 - (a + b) * x / (a + 1), tiny)
    value = d
    for m in range(1, 100_000):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            c, d = 1 + numerator / c, 1 + numerator * d
            c, d = (np.where(np.abs(v) > tiny, v, tiny) for v in (c, d))
            d = 1 / d
            value = value * c * d
        if (np.abs(c * d - 1) < 1e-12).all():
            break
    return value


@cache
def _nodes() -> tuple[Array, Array]:
    return np.polynomial.legendre.leggauss(64)


def _around_the_peak(a: Array, b: Array, x: Array) -> Array:
    """By quadrature of the density from x outwards, relative to its peak; it vanishes ten deviations away."""
    mean = a / (a + b)
    deviation = np.sqrt(mean * (1 - mean) / (a + b + 1))
    above = x > mean
    end = np.where(above, np.minimum(mean + 12 * deviation, 1.0), np.maximum(mean - 12 * deviation, 0.0))
    length = np.where(above, end - x, x - end).clip(0)
    nodes, weights = _nodes()
    t = (x + np.where(above, length, -length) * (nodes[:, None] + 1) / 2).clip(1e-300, 1 - 1e-16)
    peak = (a - 1) * np.log(mean) + (b - 1) * np.log1p(-mean)
    density = np.exp((a - 1) * np.log(t) + (b - 1) * np.log1p(-t) - peak)
    tail = length / 2 * (weights @ density) * np.exp(peak - _log_beta(a, b))
    return np.asarray(np.where(above, 1 - tail, tail))
