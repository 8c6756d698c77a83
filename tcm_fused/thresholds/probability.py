"""From similarity to the probability of a match: `match_probability`, and how well it holds on other data."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tcm_fused.arguments import check_choice
from tcm_fused.thresholds.frames import frame, markdown
from tcm_fused.thresholds.rates import HALF, Pairs, Rates, check_rate, fields, percent, plain, share
from tcm_fused.thresholds.saved import Kind, load, save
from tcm_fused.thresholds.sets import Array
from tcm_fused.thresholds.threshold import as_scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_KIND = Kind("tcm_fused.probability", "match probability", "probability --save and MatchProbability.save")
_METHODS = ("isotonic", "platt")
_LEVELS = (0.5, 0.9, 0.99)  # of probability, that a report tells the similarity of


class Reliability(NamedTuple):
    """Pairs in B bins of equal width by the probability that was told for them; empty bins are left out."""

    told: Array  # [B] mean probability
    found: Array  # [B] share of them that match
    pairs: Array  # [B] weight of the bin: pairs, those of either kind weighed as the prior says
    brier: float  # mean squared error of the probability
    error: float  # mean of |told - found| over the pairs: expected calibration error

    def __repr__(self) -> str:
        return f"Reliability: Brier score {self.brier:.4g}, expected calibration error {self.error:.4g}"

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON knows."""
        return {name: plain(value) for name, value in self._asdict().items()}

    def columns(self) -> dict[str, Any]:
        """The bins as columns of a table."""
        return {"told": self.told, "found": self.found, "pairs": self.pairs}

    def to_frame(self) -> Any:
        """The bins as a pandas DataFrame."""
        return frame(self.columns())

    def to_markdown(self) -> str:
        """The bins as a table."""
        return markdown(self.columns())

    def plot(self, axes: "Axes | None" = None) -> "Axes":
        """Draw the share of matches over the probability; needs matplotlib. See `plot_reliability`."""
        from tcm_fused.thresholds.curve_plots import plot_reliability

        return plot_reliability(self, axes)


@dataclass(frozen=True, eq=False, repr=False)
class MatchProbability:
    """A map from cosine similarity to the probability that a pair matches."""

    method: str  # "isotonic" or "platt"
    prior: float  # share of matches among the pairs that it is for
    similarity: Array  # [K] ascending
    probability: Array  # [K] not falling
    reliability: Reliability  # on the pairs that it was fitted to
    columns: int | None = None  # D of the embeddings that it was fitted to

    def __post_init__(self) -> None:
        check_choice("method", self.method, _METHODS)
        check_rate("prior", self.prior)
        s, p = self.similarity, self.probability
        if s.ndim != 1 or s.shape != p.shape or len(s) == 0:
            raise ValueError(
                f"similarity and probability must be alike in length, got {list(s.shape)}, {list(p.shape)}"
            )
        if not (np.abs(s) <= 1).all() or not (np.diff(s) > 0).all():
            raise ValueError("similarity must ascend, and lie from -1 to 1")
        if not ((p >= 0) & (p <= 1)).all() or not (np.diff(p) >= 0).all():
            raise ValueError("probability must not fall, and lie from 0 to 1")

    def __call__(self, similarity: Any) -> Array:
        """Probabilities of similarities of any shape, from -1 to 1."""
        values = as_scores(similarity).cpu().numpy().astype(np.float64)
        return np.interp(values, self.similarity, self.probability)

    def evaluate(self, embeddings: Any, labels: Any, **sets: Any) -> Reliability:
        """How well it holds on other data; the sets as in `match_probability`.

        Raises:
            TypeError, ValueError, RuntimeError: as `opis`; ValueError also for embeddings of another dimension.
        """
        pairs = _pairs(embeddings, labels, sets)
        found = pairs.x.shape[1]
        if self.columns is not None and self.columns != found:
            raise ValueError(
                f"this probability is for embeddings of {self.columns} columns, got {found}: it is another model's"
            )
        cells = _cells(pairs.count(np.empty(0)).rates, self.prior)
        return _reliability(self(cells.similarity), cells)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, with all digits: whole, or not at all.

        Raises:
            ValueError: it cannot be written there; the message says why.
        """
        save(path, _KIND, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "MatchProbability":
        """One that `save` wrote.

        Raises:
            ValueError: there is no such file, or it holds something else; the message names it.
        """
        return load(path, _KIND, lambda content: cls(**_fields(content)))

    def report(self) -> str:
        """The result in sentences: where the probability reaches some values, and how well it fits."""
        lines = [f"{self.method}, for pairs of which {percent(self.prior)} match"]
        for level in _LEVELS:
            at = self._reaches(level)
            where = "nowhere" if at is None else f"from similarity {at:.4f} on"
            lines.append(f"{f'{100 * level:g} % sure':14} {where}")
        return "\n".join([*lines, f"on its own data: {self.reliability!r}"])

    def _reaches(self, level: float) -> float | None:
        """The lowest similarity from which on the probability is at least `level`."""
        s, p = self.similarity, self.probability
        k = int(np.searchsorted(p, level))
        if k == len(p):
            return None
        if k == 0:
            return -1.0
        return float(s[k - 1] + (level - p[k - 1]) / (p[k] - p[k - 1]) * (s[k] - s[k - 1]))

    def __repr__(self) -> str:
        return f"MatchProbability({self.method}, prior {self.prior:.4g}, {self.reliability!r})"

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON knows."""
        return fields(self)

    def plot(self, axes: "Axes | None" = None) -> "Axes":
        """Draw the share of matches over the probability, of the pairs that it was fitted to; needs matplotlib.

        That is how well it fits. For how well it holds draw `evaluate` of other data with `plot_reliability`.
        """
        from tcm_fused.thresholds.curve_plots import plot_reliability

        return plot_reliability(self.reliability, axes, of="its own data")


def match_probability(
    embeddings: Any, labels: Any, *, method: str = "isotonic", prior: float | None = None, **sets: Any
) -> MatchProbability:
    """The probability of a match by similarity, fitted by scikit-learn to the exact counts of all pairs.

    Fit it on data that the model was not trained on, and judge it on other data (`evaluate` of the result).

    Args:
        embeddings, labels: as in `opis`.
        method: "isotonic": any map that does not fall; "platt": a logistic curve in similarity, for few pairs.
        prior: share of matches among the pairs to come. None: that of these pairs, of which nearly all match not.
        sets: `ref_emb`, `ref_labels`, `groups`, `ref_groups`, `group_pairs`, `backend`, `progress`, as in `opis`.

    Raises:
        TypeError, ValueError, RuntimeError: as `opis`.
        ImportError: scikit-learn is not there.
    """
    check_choice("method", method, _METHODS)
    prior = None if prior is None else check_rate("prior", prior)
    pairs = _pairs(embeddings, labels, sets)
    rates = pairs.count(np.empty(0)).rates
    if prior is None:
        prior = rates.positives / (rates.positives + rates.negatives)
    cells = _cells(rates, prior)
    similarity, probability = _isotonic(cells) if method == "isotonic" else _platt(rates, prior)
    on_itself = _reliability(np.interp(cells.similarity, similarity, probability), cells)
    return MatchProbability(method, prior, similarity, probability, on_itself, pairs.x.shape[1])


class _Cells(NamedTuple):
    """The occupied cells of the grid."""

    similarity: Array  # [K] the middle of each
    positives: Array  # [K] weight of its positive pairs, by the prior
    negatives: Array  # [K]


_SETS = ("ref_emb", "ref_labels", "groups", "ref_groups", "group_pairs", "backend", "progress")


def _pairs(embeddings: Any, labels: Any, sets: dict[str, Any]) -> Pairs:
    unknown = [name for name in sets if name not in _SETS]
    if unknown:
        raise TypeError(f"{unknown[0]!r} is no argument of the sets; those are {', '.join(_SETS)}")
    return Pairs(embeddings, labels, sets.pop("backend", "auto"), sets.pop("progress", False), **sets)


def _fields(content: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `MatchProbability` in a file."""
    about = content["reliability"]
    if not isinstance(about, dict):
        raise TypeError(f"reliability must be an object, got {about!r}")
    told, found, pairs = (_numbers(name, about[name]) for name in ("told", "found", "pairs"))
    if not len(told) == len(found) == len(pairs) > 0:
        raise ValueError("told, found and pairs of the reliability must be alike in length")
    brier, error = (float(_numbers(name, [about[name]])[0]) for name in ("brier", "error"))
    columns = content["columns"]
    if columns is not None and (type(columns) is not int or columns < 1):
        raise ValueError(f"columns must be a whole number, 1 or above, or null, got {columns!r}")
    return {
        "method": content["method"],
        "prior": content["prior"],
        "similarity": _numbers("similarity", content["similarity"]),
        "probability": _numbers("probability", content["probability"]),
        "reliability": Reliability(told, found, pairs, brier, error),
        "columns": columns,
    }


def _numbers(name: str, values: Any) -> Array:
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise TypeError(f"{name} must be a list of numbers")
    return np.array(values, dtype=np.float64)


def _cells(rates: Rates, prior: float) -> _Cells:
    counts = [np.append(-np.diff(a), a[-1]) for a in (rates.accepted_positives, rates.accepted_negatives)]
    k = np.flatnonzero(counts[0] + counts[1])
    total = rates.positives + rates.negatives
    weights = prior * total / rates.positives, (1 - prior) * total / rates.negatives
    return _Cells(np.minimum((k + 0.5) / HALF - 1, 1), counts[0][k] * weights[0], counts[1][k] * weights[1])


def _isotonic(cells: _Cells) -> tuple[Array, Array]:
    try:
        from sklearn.isotonic import IsotonicRegression
    except ImportError as error:
        raise ImportError("match_probability needs scikit-learn: pip install scikit-learn") from error
    total = cells.positives + cells.negatives
    fit = IsotonicRegression(y_min=0, y_max=1).fit(cells.similarity, cells.positives / total, sample_weight=total)
    return fit.X_thresholds_, fit.y_thresholds_


def _platt(rates: Rates, prior: float) -> tuple[Array, Array]:
    try:
        from scipy.special import expit, logit
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError("match_probability needs scikit-learn: pip install scikit-learn") from error
    fitted = min(max(prior, 1e-7), 1 - 1e-7)  # nearer to 0 or 1 the prior changes the intercept alone
    cells = _cells(rates, fitted)
    x, y = np.tile(cells.similarity, 2)[:, None], np.repeat([1, 0], len(cells.similarity))
    weight = np.concatenate((cells.positives, cells.negatives))
    there = weight > 0
    # Newton's method: the gradient is small far from the optimum where the prior is, and others stop there.
    rarer = min(cells.positives.sum(), cells.negatives.sum()) / weight.sum()  # the penalty is to be small beside it
    model = LogisticRegression(C=1e6 / rarer, solver="newton-cholesky", tol=1e-10, max_iter=1000)
    model.fit(x[there], y[there], sample_weight=weight[there])
    if model.coef_[0, 0] < 0:
        raise ValueError(
            "by method='platt' a match becomes less probable the more similar its rows are: the positives are the less "
            "similar pairs here; look at the labels, or use method='isotonic'"
        )
    similarity = np.linspace(-1, 1, 2049)  # near enough for straight lines between
    return similarity, expit(model.decision_function(similarity[:, None]) + logit(prior) - logit(fitted))


def _reliability(told: Array, cells: _Cells, bins: int = 20) -> Reliability:
    total = cells.positives + cells.negatives
    at = np.minimum((told * bins).astype(int), bins - 1)
    weight, matches, mean = (np.bincount(at, w, bins) for w in (total, cells.positives, total * told))
    there = weight > 0
    mean, found = share(mean, weight, 0.0)[there], share(matches, weight, 0.0)[there]
    brier = (cells.positives * (1 - told) ** 2 + cells.negatives * told**2).sum() / total.sum()
    error = (weight[there] * np.abs(mean - found)).sum() / total.sum()
    return Reliability(mean, found, weight[there], float(brier), float(error))
