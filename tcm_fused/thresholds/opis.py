"""Does one threshold serve all classes? `opis` measures it."""

import math
import numbers
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from tcm_fused.arguments import check_choice, check_number
from tcm_fused.thresholds.frames import class_columns, frame, markdown
from tcm_fused.thresholds.pairing import NothingToMeasure
from tcm_fused.thresholds.rates import (
    HALF,
    Counts,
    Histogram,
    Pairs,
    Rates,
    Worst,
    as_distance,
    as_similarity,
    check_rate,
    class_rates,
    fields,
    lowest,
    percent,
    utility_of,
    worst_classes,
)
from tcm_fused.thresholds.sets import Array
from tcm_fused.warn import warn_caller

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCORES = ("opis", "eps_opis", "recall_at_1")  # of an `OPISResult`

_CELLS = 8  # cells of the classes' counts for each step between thresholds, as far as memory allows
_RANGE_CELLS = 512  # and for the range, at least
_MOST_CELLS = 1 << 25  # of all classes together: 512 MiB, or 4 cells a threshold where that is more


class Curves(NamedTuple):
    """Utility beyond the calibration range, for pictures: thresholds [M] and utility [C, M]."""

    similarity: Array
    distance: Array
    utility: Array

    def __repr__(self) -> str:
        return f"Curves of {len(self.utility):,} classes at {len(self.similarity)} thresholds"


@dataclass(frozen=True, eq=False, repr=False)
class OPISResult:
    """The result of `opis`: C classes at K thresholds, which ascend on the axis that was asked for.

    A pair is accepted at a threshold if its similarity is at least that, that is, its distance at most.
    """

    opis: float
    eps_opis: float
    recall_at_1: float  # over the rows whose class has another; a tie with another class, but for rounding, is a miss
    axis: str  # "euclidean" or "cosine": of the integrals
    beta: float
    epsilon: float
    similarity: Array  # [K] thresholds as cosine similarity
    distance: Array  # [K] the same as Euclidean distance of unit vectors, sqrt(2 - 2 similarity)
    far: Array  # [K] share of all negative pairs that is accepted
    frr: Array  # [K] share of all positive pairs that is rejected
    class_ids: Array  # [C] labels of the classes that have at least two samples, ascending
    class_sizes: Array  # [C] their samples
    left_out: int  # classes of one sample: they have no positive pair; their rows are negatives of the others
    sensitivity: Array  # [C, K] share of the class's positive pairs that is accepted
    specificity: Array  # [C, K] share of its negative pairs (one sample in the class) that is rejected
    utility: Array  # [C, K] (1 + beta^2) phi psi / (beta^2 phi + psi) of the two
    mean_utility: Array  # [K] over all classes
    worst_utility: Array  # [K] over the epsilon share of classes with the lowest mean utility in the range
    class_utility: Array  # [C] mean over the range
    histogram: Histogram  # all pairs by similarity
    curves: Curves | None  # the utility beyond the range as well; None where the thresholds were given
    class_names: Array | None = None  # [C] text of class_ids, which are its places then; None of integer labels

    @property
    def thresholds(self) -> Array:
        """[K] on the axis that was asked for, ascending."""
        return self.distance if self.axis == "euclidean" else self.similarity

    def worst(self, k: int = 10) -> list[Worst]:
        """The k classes with the lowest mean utility in the range, the lowest first."""
        return worst_classes(self, lowest(self.class_utility, k), self.class_utility)

    def __repr__(self) -> str:
        return self.report(worst=2)

    def report(self, worst: int = 5) -> str:
        """The result in sentences, with that many of the classes of lowest utility; `print` shows two."""
        names = ("OPIS", f"{percent(self.epsilon)}-OPIS", "recall@1", "range", "false accepts", "false rejects")
        values = (
            f"{self.opis:.4g}",
            f"{self.eps_opis:.4g}",
            f"{100 * self.recall_at_1:.2f} %",
            f"similarity {_ends(self.similarity)} (distance {_ends(self.distance)}), {len(self.thresholds)} thresholds",
            f"{100 * self.far.min():.3g} % to {100 * self.far.max():.3g} % of all negative pairs",
            f"{100 * self.frr.min():.3g} % to {100 * self.frr.max():.3g} % of all positive pairs",
        )
        lines = [f"{len(self.class_ids):,} classes ({self.left_out:,} more of one sample left out)"]
        lines += [f"{name:14} {value}" for name, value in zip(names, values, strict=True)]
        lines += [f"{'utility':14} mean of all classes {self.class_utility.mean():.4f}; the lowest:"]
        return "\n".join([*lines, *(f"{'':14} {item}" for item in self.worst(worst))])

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures' extra curves, in types that JSON knows; `class_names` where there are some."""
        return fields(self, leave_out=("curves", *(("class_names",) if self.class_names is None else ())))

    def columns(self) -> dict[str, Any]:
        """The classes as columns of a table."""
        return class_columns(self, utility=self.class_utility)

    def to_frame(self) -> Any:
        """The classes as a pandas DataFrame."""
        return frame(self.columns())

    def to_markdown(self) -> str:
        """The scores as a table."""
        return markdown({"score": list(SCORES), "value": [getattr(self, name) for name in SCORES]})

    def plot(self, axes: "Axes | None" = None) -> "Axes":
        """Draw the utility of all classes over the threshold; needs matplotlib. See `plot_utility`."""
        from tcm_fused.thresholds.plots import plot_utility

        return plot_utility(self, axes)


def _ends(thresholds: Array) -> str:
    """To all their digits: typed again they decide alike."""
    return f"{float(thresholds.min())!r} to {float(thresholds.max())!r}"


def opis(
    embeddings: Any,
    labels: Any,
    ref_emb: Any = None,
    ref_labels: Any = None,
    *,
    groups: Any = None,
    ref_groups: Any = None,
    group_pairs: str = "within",
    far_range: tuple[float, float] = (1e-2, 1e-1),
    frr_range: tuple[float, float] | None = None,
    thresholds: Any = None,
    num_thresholds: int = 101,
    distance: str = "euclidean",
    beta: float = 1.0,
    epsilon: float = 0.1,
    backend: str = "auto",
    progress: bool = False,
) -> OPISResult:
    r"""Operating-Point-Inconsistency Score: how much the utility of one threshold differs from class to class.

    At threshold d class c has sensitivity phi_c (share of its positive pairs accepted), specificity psi_c (share of the
    pairs with exactly one sample in c rejected) and utility U_c = (1 + b^2) phi psi / (b^2 phi + psi), 0 where both
    are 0. Over a calibration range of thresholds, with means over classes and integrals by the trapezoid rule,

        OPIS = mean_c  1 / |range| * integral (U_c - mean_c U_c)^2 dd
        epsilon-OPIS =  1 / |range| * integral (U_worst - U_rest)^2 dd

    where "worst" are the ceil(epsilon C) classes with the lowest mean utility in the range, "rest" the others, and each
    side is averaged; it is 0 where no class is left for the rest. Both are 0 if all classes have the same curve, and
    at most 1. Classes of one sample are left out of the means (and counted), not of the others' negatives.

    One pass over the pairs of rows, O(N D + C * num_thresholds) memory. The range is first guessed from 2048 rows and
    verified afterwards; where the guess was wrong or these rows have too few pairs to tell, there is a second pass (of
    two sets and groups, always).
    Thresholds from a range are multiples of 2^-17 = 7.6e-6 in similarity, as near to even spacing on the axis as the
    cells of the counts allow, which are finer; where so few multiples lie in the range, there are fewer thresholds
    than asked for. Their first and last lie in the bounds and leave out at most 1/256 of the range at either end.
    Counts at them are exact, for similarities in float32 (float64 for float64 embeddings). On a GPU's tensor cores,
    which cut sums off instead of rounding them, similarities near 1 come out too small by up to D 2^-26.

    Args:
        embeddings: [N, D] numbers of any scale: a tensor (float16, bfloat16, float32, float64 or integers), an array, a
            data frame, or a list. An array is not copied where PyTorch can look at it, a memory map in float32 say.
        labels: [N], integers or text: a tensor (any integer dtype), an array, a series (categories, too) or a list.
            Rows with a negative label are not looked at. Nor is an index of a series or frame.
        ref_emb: [M, D], a second set, such as a gallery: then a pair is a row of `embeddings` (a query) with one of
            these, and no pair is left out. None: the rows are paired with each other, and none with itself.
        ref_labels: [M], labels of `ref_emb`, in the numbering (or the text) of `labels`.
        groups: [N], integers or text, for example the camera of each row: only pairs within a group, or only those
            across groups, count (`group_pairs`). For tens of groups rather than thousands.
        ref_groups: [M], groups of `ref_emb`.
        group_pairs: "within" or "across".
        far_range: bounds of the calibration range on the false accept rate over all pairs.
        frr_range: bounds on the false reject rate; given, they replace `far_range`.
        thresholds: [K] ascending, on the axis that `distance` names; given, they replace both ranges.
        num_thresholds: of the range, at least 2.
        distance: the axis of the integrals: "euclidean", sqrt(2 - 2 s), which is the paper's, or "cosine", s itself.
        beta: weight of sensitivity against specificity, above 0.
        epsilon: share of the classes that are "worst", between 0 and 1.
        backend: "auto", "cpu" or "cuda" (the kernels; on a GPU for all but float64) or "torch" (any device, slower).
        progress: show a bar; needs tqdm.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes or values do not fit.
        NothingToMeasure: a ValueError: an embedding is not finite, there are fewer than two classes or none with two
            samples, or fewer than two thresholds lie in the range.
        RuntimeError: the backend asked for is not available.

    Source: Zhang et al., Threshold-Consistent Margin Loss for Open-World Deep Metric Learning, ICLR 2024,
    section 3 (arXiv 2307.04047).

    Example:
        Two classes; the second is spread out, and a threshold that rejects the first's neighbours rejects its pairs.

        >>> x = np.array([[1, 0], [0.96, 0.28], [0, 1], [-0.8, 0.6]])
        >>> result = opis(x, np.array([0, 0, 1, 1]), thresholds=[0.5, 0.7, 0.9])
        >>> result.sensitivity.tolist()
        [[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]]
        >>> round(result.opis, 4), round(result.eps_opis, 4)
        (0.1875, 0.75)
    """
    options = check_options(far_range, frr_range, thresholds, num_thresholds, distance, beta, epsilon)
    name, bounds, given, num_thresholds, beta, epsilon = options
    pairs = Pairs(embeddings, labels, backend, progress, ref_emb, ref_labels, groups, ref_groups, group_pairs)

    wide = None
    if given is not None:
        ascending = given if distance == "cosine" else as_similarity(given)[::-1]
        counts, grid, index = pairs.count(np.ascontiguousarray(ascending)), ascending, np.arange(len(given))
    else:
        try:
            counts, grid, (first, last) = _count_range(pairs, name, bounds, num_thresholds, distance)
        except NothingToMeasure as error:
            error.recall_at_1 = pairs.recall_at_1
            raise
        index = _spread(grid, first, last, num_thresholds, distance)
        half = (last - first) // 2
        wide = _spread(grid, max(first - half, 0), min(last + half, len(grid) - 1), 2 * num_thresholds - 1, distance)
    if distance == "euclidean":
        index = index[::-1]
    phi, psi, accepted = class_rates(pairs, counts, index)
    utility = utility_of(phi, psi, beta)
    similarity = grid[index]
    if given is None:
        _warn_of_fine_range(name, bounds, counts.rates)
    exact = as_distance(similarity) if given is None or distance == "cosine" else given
    return OPISResult(
        **_scores(utility, exact if distance == "euclidean" else similarity, epsilon),
        recall_at_1=counts.recall_at_1,
        axis=distance,
        beta=beta,
        epsilon=epsilon,
        similarity=similarity,
        distance=exact,
        far=accepted[1] / counts.rates.negatives,
        frr=(counts.rates.positives - accepted[0]) / counts.rates.positives,
        class_ids=pairs.class_ids,
        class_sizes=pairs.class_sizes,
        left_out=pairs.left_out,
        sensitivity=phi,
        specificity=psi,
        utility=utility,
        histogram=counts.rates.histogram(),
        curves=None if wide is None else _wide_curves(pairs, counts, grid, wide, beta),
        class_names=pairs.class_names,
    )


def scores_or_nan(embeddings: Any, labels: Any, **options: Any) -> tuple[dict[str, float], OPISResult | str]:
    """The three scores for a training run, and the result of `opis`; or NaN, and the reason for a warning.

    Raises:
        TypeError, ValueError, RuntimeError: as `opis`, but for `NothingToMeasure`.
    """
    found: OPISResult | str
    try:
        found = opis(embeddings, labels, **options)
    except NothingToMeasure as error:
        return dict(zip(SCORES, (math.nan, math.nan, error.recall_at_1), strict=True)), str(error)
    return {name: getattr(found, name) for name in SCORES}, found


def warn_of_nan(reason: str) -> None:
    """That a score is NaN; from one process of several, since all find the same."""
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return
    warn_caller(f"OPIS cannot be measured and is NaN, here and, without another warning, later: {reason}")


def _count_range(
    pairs: Pairs, name: str, bounds: tuple[float, float], num_thresholds: int, axis: str
) -> tuple[Counts, Array, tuple[int, int]]:
    """Counts at similarities [T] that hold the calibration range, and the first and last of them in it.

    They reach half a range beyond either end, so that a guess of the range is good if it is roughly right.
    """
    rates, guess = pairs.sample(), True
    whole = rates.positives + rates.negatives == pairs.pairs
    if not whole and bounds[0] * (rates.negatives if name == "far_range" else rates.positives) < 32:
        rates, guess = pairs.count(np.empty(0)).rates, False  # too few pairs to tell
    while True:
        first, last = _find_range(rates, name, bounds, guess)
        points = _cells(first, last, num_thresholds, len(pairs.class_ids), axis)
        counts = pairs.count(points / HALF - 1)
        rates = counts.rates
        first, last = _find_range(rates, name, bounds, guess=False)
        inside = np.flatnonzero((points >= first) & (points <= last))
        if not guess:
            break
        if len(inside) > 1 and points[0] <= first and last <= points[-1]:
            ends, reached = (_on_axis(np.array(k), axis) for k in ((first, last), points[inside[[0, -1]]]))
            fine = len(inside) > min(last - first, 2 * num_thresholds - 2)
            if fine and np.abs(ends - reached).max() <= (ends[1] - ends[0]) / 256:
                break
        guess = False
    if len(inside) < 2:
        _refuse_range(name, bounds, rates)
    return counts, points / HALF - 1, (int(inside[0]), int(inside[-1]))


def _cells(first: int, last: int, num_thresholds: int, classes: int, axis: str) -> Array:
    """Points of the grid, ascending: `first`, `last`, and others even on the axis from half a range before to after."""
    number = 2 * max(_CELLS * (num_thresholds - 1), _RANGE_CELLS)
    number = max(min(number, _MOST_CELLS // classes - 4), 4 * num_thresholds - 4)
    low, high = _on_axis(np.array((first, last)), axis)
    half = (high - low) / 2
    even = np.linspace(low - half, high + half, number)
    similarity = even if axis == "cosine" else as_similarity(np.minimum(even, 0))
    points = np.rint((similarity + 1) * HALF).astype(np.int64).clip(0, 2 * HALF)
    slack = np.array((first - 8, first, last, last + 8)).clip(0, 2 * HALF)
    return np.unique(np.concatenate((points, slack)))


def _on_axis(points: Array, axis: str) -> Array:
    """Similarity, or distance with its sign turned: both ascend with the points of the grid."""
    similarity = points / HALF - 1
    return similarity if axis == "cosine" else -as_distance(similarity)


def _find_range(rates: Rates, name: str, bounds: tuple[float, float], guess: bool) -> tuple[int, int]:
    """First and last point of the grid whose rate lies within `bounds`; ValueError if there are none.

    A guess takes the two points around an empty range.
    """
    if name == "far_range":
        below, above = rates.far <= bounds[1], rates.far >= bounds[0]
        first = int(np.argmax(below)) if below.any() else 2 * HALF
        last = int(np.flatnonzero(above)[-1]) if above.any() else 0
    else:
        above, below = rates.frr >= bounds[0], rates.frr <= bounds[1]
        first = int(np.argmax(above)) if above.any() else 2 * HALF
        last = int(np.flatnonzero(below)[-1])
    if first > last:
        if not guess:
            _refuse_range(name, bounds, rates)
        first, last = last, first
    return first, last


def _refuse_range(name: str, bounds: tuple[float, float], rates: Rates) -> None:
    curve, total = (rates.far, rates.negatives) if name == "far_range" else (rates.frr, rates.positives)
    inside = curve[(curve > 0) & (curve < 1)]
    reached = f"from {inside.min():.3g} to {inside.max():.3g}" if len(inside) else "0 and 1 only"
    raise NothingToMeasure(
        f"the calibration range is empty: fewer than two thresholds have a rate within {name}={bounds}; over the "
        f"{total} pairs the rate takes values {reached}, at similarities {1 / HALF:.1e} apart; widen {name}"
    )


def _warn_of_fine_range(name: str, bounds: tuple[float, float], rates: Rates) -> None:
    total, kind = (rates.negatives, "negative") if name == "far_range" else (rates.positives, "positive")
    if bounds[0] * total < 1:
        warn_caller(
            f"{name}={bounds} begins at a rate that {total:,} {kind} pairs cannot tell from 0: one of them is "
            f"{1 / total:.2g}, where the range begins in fact; {bounds[0]:g} needs about {math.ceil(1 / bounds[0]):,} "
            f"{kind} pairs"
        )


def _spread(grid: Array, first: int, last: int, number: int, axis: str) -> Array:
    """Indices into ascending grid [T] from `first` to `last`, near even spacing on the axis; ascending, each once."""
    at = (grid if axis == "cosine" else -as_distance(grid))[first : last + 1]
    even = np.linspace(at[0], at[-1], number)
    right = np.searchsorted(at, even).clip(1, len(at) - 1)
    nearest = right - (even - at[right - 1] < at[right] - even)
    return np.unique(first + nearest)


def _scores(utility: Array, axis: Array, epsilon: float) -> dict[str, Any]:
    """OPIS, epsilon-OPIS and the means of utility [C, K] at ascending thresholds `axis` [K]."""
    weight = np.zeros(len(axis))  # the mean over the range by the trapezoid rule
    weight[1:] += np.diff(axis) / 2
    weight[:-1] += np.diff(axis) / 2
    weight /= axis[-1] - axis[0]
    class_utility, mean = utility @ weight, utility.mean(axis=0)
    size = math.ceil(epsilon * len(utility) - 1e-9)
    order = np.argsort(class_utility, kind="stable")
    worst = utility[order[:size]].mean(axis=0)
    rest = utility[order[size:]].mean(axis=0) if size < len(utility) else worst
    return {
        "opis": float(np.square(utility - mean).mean(axis=0) @ weight),
        "eps_opis": float(np.square(worst - rest) @ weight),
        "mean_utility": mean,
        "worst_utility": worst,
        "class_utility": class_utility,
    }


def _wide_curves(pairs: Pairs, counts: Counts, grid: Array, index: Array, beta: float) -> Curves:
    phi, psi, _ = class_rates(pairs, counts, index)
    return Curves(grid[index], as_distance(grid[index]), utility_of(phi, psi, beta).astype(np.float32))


class _Options(NamedTuple):
    name: str  # "far_range" or "frr_range"
    bounds: tuple[float, float]
    thresholds: Array | None
    num_thresholds: int
    beta: float
    epsilon: float


def check_options(
    far_range: Any, frr_range: Any, thresholds: Any, num_thresholds: Any, distance: Any, beta: Any, epsilon: Any
) -> _Options:
    """The options of `opis`, or TypeError or ValueError."""
    check_choice("distance", distance, ("euclidean", "cosine"))
    beta, epsilon = _positive("beta", beta), check_rate("epsilon", epsilon)
    if isinstance(num_thresholds, bool) or not isinstance(num_thresholds, numbers.Integral):
        raise TypeError(f"num_thresholds must be an int, got {type(num_thresholds).__name__}")
    if num_thresholds < 2:
        raise ValueError(f"num_thresholds must be at least 2, got {num_thresholds}")
    name, bounds = ("far_range", far_range) if frr_range is None else ("frr_range", frr_range)
    given = None if thresholds is None else _check_thresholds(thresholds, distance)
    return _Options(name, _check_range(name, bounds), given, int(num_thresholds), beta, epsilon)


def _check_range(name: str, bounds: Any) -> tuple[float, float]:
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise TypeError(f"{name} must be a pair of rates (low, high), got {bounds!r}")
    low, high = (check_rate(name, bound) for bound in bounds)
    if low >= high:
        raise ValueError(f"{name} must be (low, high) with low below high, got ({low}, {high}): the range is empty")
    return low, high


def _check_thresholds(thresholds: Any, axis: str) -> Array:
    values: Array = np.asarray(thresholds, dtype=np.float64)
    low, high = (0.0, 2.0) if axis == "euclidean" else (-1.0, 1.0)
    if values.ndim != 1 or len(values) < 2 or not (np.diff(values) > 0).all():
        raise ValueError(f"thresholds must be at least two ascending numbers, got shape {values.shape}: {values}")
    if not (values[0] >= low and values[-1] <= high):
        raise ValueError(
            f"thresholds must lie from {low:g} to {high:g}, the {axis} axis, got {values[0]:g} to {values[-1]:g}; "
            "distance='euclidean' or 'cosine' says which axis they are on"
        )
    return values


def _positive(name: str, value: Any) -> float:
    check_number(name, value, least=0.0)
    if not 0 < value <= 1e100:  # its square is a number too
        raise ValueError(f"{name} must be above 0 and at most 1e100, got {value}")
    return float(value)
