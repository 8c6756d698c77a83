"""From similarity to the probability of a match: `match_probability`, and how well it holds on other data."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tcm_fused.arguments import check_choice
from tcm_fused.thresholds.frames import frame
from tcm_fused.thresholds.rates import HALF, Pairs, Rates, check_rate, fields, share
from tcm_fused.thresholds.sets import Array
from tcm_fused.thresholds.threshold import as_scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Reliability(NamedTuple):
    """Pairs in B bins of equal width by the probability that was told for them; empty bins are left out."""

    told: Array  # [B] mean probability
    found: Array  # [B] share of them that match
    pairs: Array  # [B] weight of the bin: pairs, those of either kind weighed as the prior says
    brier: float  # mean squared error of the probability
    error: float  # mean of |told - found| over the pairs: expected calibration error

    def __repr__(self) -> str:
        return f"Reliability: Brier score {self.brier:.4g}, expected calibration error {self.error:.4g}"

    def to_frame(self) -> Any:
        """The bins as a pandas DataFrame."""
        return frame({"told": self.told, "found": self.found, "pairs": self.pairs})


@dataclass(frozen=True, eq=False, repr=False)
class MatchProbability:
    """A map from cosine similarity to the probability that a pair matches."""

    method: str  # "isotonic" or "platt"
    prior: float  # share of matches among the pairs that it is for
    similarity: Array  # [K] ascending
    probability: Array  # [K] not falling
    reliability: Reliability  # on the pairs that it was fitted to

    def __call__(self, similarity: Any) -> Array:
        """Probabilities of similarities of any shape, from -1 to 1."""
        values = as_scores(similarity).cpu().numpy().astype(np.float64)
        return np.interp(values, self.similarity, self.probability)

    def evaluate(self, embeddings: Any, labels: Any, **sets: Any) -> Reliability:
        """How well it holds on other data; the sets as in `match_probability`."""
        cells = _cells(_rates(embeddings, labels, sets), self.prior)
        return _reliability(self(cells.similarity), cells)

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
    check_choice("method", method, ("isotonic", "platt"))
    prior = None if prior is None else check_rate("prior", prior)
    rates = _rates(embeddings, labels, sets)
    if prior is None:
        prior = rates.positives / (rates.positives + rates.negatives)
    cells = _cells(rates, prior)
    similarity, probability = (_isotonic if method == "isotonic" else _platt)(cells)
    on_itself = _reliability(np.interp(cells.similarity, similarity, probability), cells)
    return MatchProbability(method, prior, similarity, probability, on_itself)


class _Cells(NamedTuple):
    """The occupied cells of the grid."""

    similarity: Array  # [K] the middle of each
    positives: Array  # [K] weight of its positive pairs, by the prior
    negatives: Array  # [K]


_SETS = ("ref_emb", "ref_labels", "groups", "ref_groups", "group_pairs", "backend", "progress")


def _rates(embeddings: Any, labels: Any, sets: dict[str, Any]) -> Rates:
    unknown = [name for name in sets if name not in _SETS]
    if unknown:
        raise TypeError(f"{unknown[0]!r} is no argument of the sets; those are {', '.join(_SETS)}")
    return (
        Pairs(embeddings, labels, sets.pop("backend", "auto"), sets.pop("progress", False), **sets)
        .count(np.empty(0))
        .rates
    )


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


def _platt(cells: _Cells) -> tuple[Array, Array]:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError("match_probability needs scikit-learn: pip install scikit-learn") from error
    x, y = np.tile(cells.similarity, 2)[:, None], np.repeat([1, 0], len(cells.similarity))
    weight = np.concatenate((cells.positives, cells.negatives))
    there = weight > 0
    # Newton's method: the gradient is small far from the optimum where the prior is, and others stop there.
    rarer = min(cells.positives.sum(), cells.negatives.sum()) / weight.sum()  # the penalty is to be small beside it
    model = LogisticRegression(C=1e6 / rarer, solver="newton-cholesky", tol=1e-10, max_iter=1000)
    model.fit(x[there], y[there], sample_weight=weight[there])
    similarity = np.linspace(-1, 1, 2049)  # near enough for straight lines between
    return similarity, model.predict_proba(similarity[:, None])[:, 1]


def _reliability(told: Array, cells: _Cells, bins: int = 20) -> Reliability:
    total = cells.positives + cells.negatives
    at = np.minimum((told * bins).astype(int), bins - 1)
    weight, matches, mean = (np.bincount(at, w, bins) for w in (total, cells.positives, total * told))
    there = weight > 0
    mean, found = share(mean, weight, 0.0)[there], share(matches, weight, 0.0)[there]
    brier = (cells.positives * (1 - told) ** 2 + cells.negatives * told**2).sum() / total.sum()
    error = (weight[there] * np.abs(mean - found)).sum() / total.sum()
    return Reliability(mean, found, weight[there], float(brier), float(error))
