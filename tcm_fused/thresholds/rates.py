"""The pairs of a labelled set, counted by similarity, and the rates that follow; for `opis` and `calibrate`."""

import math
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from tcm_fused.arguments import check_choice, check_set, int64_labels
from tcm_fused.backends.choice import BACKENDS, choose_counter
from tcm_fused.thresholds.sets import Array, as_embeddings, as_labels, shown

BITS = 17  # the grid of similarities has steps of 2^-17 = 7.6e-6
HALF = 1 << BITS
_SAMPLE_BLOCKS, _SAMPLE_ROWS = 64, 32  # rows that the range of thresholds is guessed from


class NothingToMeasure(ValueError):
    """The set has no such score, although all arguments are right: too few rows or classes, rows that are not
    finite, an empty range of thresholds. Inside a training run that is NaN and no reason to end it.
    """

    recall_at_1 = math.nan  # which can be told where it is only the range that is empty


class Worst(NamedTuple):
    """A class with its size and the value that it was ranked by."""

    class_id: int
    size: int
    value: float
    name: str | None = None  # where labels were text

    def __str__(self) -> str:
        name = self.class_id if self.name is None else shown(self.name)
        return f"class {name} ({self.size:,} samples): {self.value:.4f}"


class Histogram(NamedTuple):
    """Counts of unordered pairs between similarities `edges` [B + 1] (the last edge belongs to the last cell)."""

    edges: Array  # float64
    positives: Array  # [B] int64
    negatives: Array  # [B] int64

    def __repr__(self) -> str:
        return (
            f"Histogram of {self.positives.sum():,} positive and {self.negatives.sum():,} negative pairs in "
            f"{len(self.positives)} cells, similarity {self.edges[0]:.4f} to {self.edges[-1]:.4f}"
        )


@dataclass(frozen=True, eq=False)
class Rates:
    """Pairs of a whole set, by the thresholds k / HALF - 1 of the grid, k = 0 ... 2 HALF."""

    accepted_positives: Array  # [2 HALF + 1] int64, unordered positive pairs with s >= threshold
    accepted_negatives: Array
    positives: int  # unordered positive pairs in all
    negatives: int

    @property
    def far(self) -> Array:
        """False accept rate at each threshold of the grid: falls with k."""
        return self.accepted_negatives / max(self.negatives, 1)

    @property
    def frr(self) -> Array:
        """False reject rate at each threshold of the grid: rises with k."""
        return (self.positives - self.accepted_positives) / max(self.positives, 1)

    def histogram(self, most: int = 256) -> Histogram:
        """The pairs in at most `most` cells of one width between the lowest and the highest similarity."""
        counts = [np.append(-np.diff(a), a[-1]) for a in (self.accepted_positives, self.accepted_negatives)]
        occupied = np.flatnonzero(counts[0] + counts[1])
        first, last = int(occupied[0]), int(occupied[-1])
        width = max(1, math.ceil((last - first + 1) / most))
        starts = np.arange(first, last + 1, width)
        edges = np.append(starts, starts[-1] + width) / HALF - 1
        positives, negatives = (np.add.reduceat(c, starts) for c in counts)
        return Histogram(edges, positives, negatives)


class Counts(NamedTuple):
    """The counts of one pass over the pairs."""

    rates: Rates
    class_below: Tensor  # [2, C + 1, T] int64, pairs from threshold 0 to below threshold k + 1, summed up along T
    recall_at_1: float

    def accepted(self, index: Array) -> tuple[Array, Array, Array]:
        """Accepted pairs at thresholds `index` [K]: positives and negatives of each class [C, K], and in all [2, K]."""
        below = self.class_below
        at = torch.from_numpy(np.array(index, dtype=np.int64)).to(below.device)
        rejected = torch.where(at > 0, below[:, :, (at - 1).clamp_min(0)], 0)
        accepted = (below[:, :, -1:] - rejected).cpu().numpy()
        total = accepted.sum(axis=1)
        total[1] //= 2  # each negative is one of both its classes
        return accepted[0, :-1], accepted[1, :-1], total


class Pairs:
    """Embeddings with labels, checked, and ready to be counted.

    Raises:
        TypeError, ValueError: an argument is wrong, or the set has no positive or no negative pair.
        RuntimeError: the backend asked for is not available.
    """

    def __init__(self, embeddings: Any, labels: Any, backend: str, progress: bool) -> None:
        check_choice("backend", backend, ("auto", *BACKENDS))
        given, embeddings = labels, as_embeddings("embeddings", embeddings)
        labels, names = as_labels("labels", labels)
        if not isinstance(given, Tensor):  # it was on no device
            labels = labels.to(embeddings.device)
        check_set("embeddings", embeddings, "labels", labels)
        x = embeddings.detach()
        self.x = x if x.dtype == torch.float64 else x.float()
        self._operator = choose_counter(backend, self.x.device.type, self.x.dtype)
        labels = int64_labels(labels, "labels")
        takes_part = labels >= 0
        # By the norm, which takes no memory of the size of x as isfinite() of each component does.
        finite = torch.linalg.vector_norm(self.x, torch.inf, dim=1).isfinite() | ~takes_part
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            raise NothingToMeasure(
                f"embeddings must be finite, but {int((~finite).sum())} of {len(finite)} rows hold NaN or infinity, "
                f"the first is row {row}; a model that diverged or an overflow in float16 gives such rows"
            )
        ids, inverse, sizes = labels[takes_part].unique(return_inverse=True, return_counts=True)
        if len(ids) < 2:
            raise NothingToMeasure(
                f"labels must name at least two classes (0 or above), got {len(ids)}: no pair is negative"
            )
        counted = sizes > 1
        if not bool(counted.any()):
            raise NothingToMeasure(
                f"no class has two samples: {len(ids)} classes for {len(inverse)} rows, no pair is positive"
            )
        # Classes that are counted come first; those of one sample follow.
        index = torch.where(counted, counted.cumsum(0) - 1, counted.sum() + (~counted).cumsum(0) - 1)
        self.y = torch.full_like(labels, -1)
        self.y[takes_part] = index[inverse]
        self.class_ids: Array = ids[counted].cpu().numpy()
        self.class_sizes: Array = sizes[counted].cpu().numpy()
        self.class_names: Array | None = None if names is None else names[self.class_ids]
        self.left_out = int((~counted).sum())
        self.rows = len(inverse)
        self.recall_at_1 = math.nan  # until `count`
        self._progress = progress

    @property
    def class_positives(self) -> Array:
        """Unordered positive pairs of each class, [C]."""
        return self.class_sizes * (self.class_sizes - 1) // 2

    @property
    def class_negatives(self) -> Array:
        """Pairs of which one is in the class, [C]."""
        return self.class_sizes * (self.rows - self.class_sizes)

    def sample(self) -> Rates:
        """Rates of about 2000 rows: blocks of rows neighbouring in label, so that there are positives among them."""
        order = self.y.argsort(stable=True)[len(self.y) - self.rows :]
        last = max(self.rows - _SAMPLE_ROWS, 0)
        starts = torch.arange(_SAMPLE_BLOCKS, device=order.device) * last // (_SAMPLE_BLOCKS - 1)
        index = (starts[:, None] + torch.arange(_SAMPLE_ROWS, device=order.device)).flatten()
        index = order[index[index < self.rows].unique()]
        counts, _, _ = self._operator(self.x[index], self.y[index], 0, self.x.new_empty(0), BITS, None)
        return _rates(counts)

    def count(self, thresholds: Array) -> Counts:
        """One pass over all pairs, with the classes' counts at ascending similarities [T]."""
        dtype = np.float64 if self.x.dtype == torch.float64 else np.float32  # the device may have no float64
        t = torch.from_numpy(thresholds.astype(dtype)).to(self.x.device)
        classes = len(self.class_ids)
        counts, class_counts, best = self._run(self.x, self.y, classes, t, BITS)
        hit = (best[0] > best[1] + 8 * torch.finfo(best.dtype).eps)[(self.y >= 0) & (self.y < classes)]
        self.recall_at_1 = int(hit.sum()) / len(hit)
        return Counts(_rates(counts), class_counts.cumsum_(dim=2), self.recall_at_1)

    def _run(self, *arguments: Any) -> Any:
        """The operator, with a bar of its progress if wanted."""
        if not self._progress:
            return self._operator(*arguments, None)
        try:
            from tqdm import tqdm
        except ImportError as error:
            raise ImportError("progress=True needs tqdm: pip install tqdm") from error
        done = torch.zeros(2, dtype=torch.int64, device="cpu")
        stream = torch.cuda.current_stream(self.x.device) if self.x.is_cuda else None  # which is a matter of threads

        def work() -> Any:
            if stream is None:
                return self._operator(*arguments, done)
            with torch.cuda.stream(stream):
                counted = self._operator(*arguments, done)
            stream.synchronize()  # the bar is to last as long as the work
            return counted

        with ThreadPoolExecutor(1) as pool, tqdm(total=1.0, desc="pairs", bar_format="{l_bar}{bar}| {elapsed}") as bar:
            future = pool.submit(work)
            while wait([future], timeout=0.1).not_done:
                bar.update(float(done[0] / done[1].clamp_min(1)) - bar.n)
            bar.update(1 - bar.n)
            return future.result()


def class_rates(pairs: Pairs, counts: Counts, index: Array) -> tuple[Array, Array, Array]:
    """Sensitivity and specificity [C, K] at thresholds `index` [K], and accepted pairs in all [2, K]."""
    positives, negatives, total = counts.accepted(index)
    phi = positives / pairs.class_positives[:, None]
    psi = (pairs.class_negatives[:, None] - negatives) / pairs.class_negatives[:, None]
    return phi, psi, total


def utility_of(phi: Array, psi: Array, beta: float) -> Array:
    """(1 + b^2) phi psi / (b^2 phi + psi), 0 where both are 0."""
    below = beta**2 * phi + psi
    return np.divide((1 + beta**2) * phi * psi, below, out=np.zeros_like(below), where=below > 0)


def _rates(counts: Tensor) -> Rates:
    """From counts [2, 2 HALF + 1] of the cells."""
    accepted = counts.flip(1).cumsum(1).flip(1).cpu().numpy()
    return Rates(accepted[0], accepted[1], int(accepted[0, 0]), int(accepted[1, 0]))


class _OfClasses(Protocol):
    """A result with its classes."""

    @property
    def class_ids(self) -> Array: ...
    @property
    def class_sizes(self) -> Array: ...
    @property
    def class_names(self) -> Array | None: ...


def worst_classes(result: _OfClasses, order: Array, values: Array) -> list[Worst]:
    """The classes at the places `order` with their `values`."""
    names = result.class_names
    return [
        Worst(
            int(result.class_ids[c]), int(result.class_sizes[c]), float(values[c]), None if names is None else names[c]
        )
        for c in order
    ]


def percent(share: float) -> str:
    """As in "10%-OPIS", everywhere."""
    return f"{100 * share:.4g}%"


def lowest(values: Array, k: int) -> Array:
    """Indices of the k lowest values, the lowest first."""
    if k < 0:
        raise ValueError(f"k must be at least 0, got {k}")
    order: Array = np.argsort(values, kind="stable")[:k]
    return order


def as_distance(similarity: Array) -> Array:
    """d = sqrt(2 - 2 s) of unit vectors, float64, rounded so that `as_similarity` does not lead above s.

    So a distance that is printed and given again accepts the pairs at it, as the similarity does.
    """
    distance = np.sqrt(np.maximum(2 - 2 * np.asarray(similarity, dtype=np.float64), 0))
    above = as_similarity(distance) > similarity
    return np.where(above, np.nextafter(distance, np.inf), distance)


def as_similarity(distance: Array) -> Array:
    """s = 1 - d^2 / 2 of unit vectors."""
    return 1 - np.square(distance) / 2


def check_rate(name: str, value: Any) -> float:
    """A rate strictly between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie between 0 and 1, both excluded, got {value}")
    return float(value)


def plain(value: Any, leave_out: tuple[str, ...] = ()) -> Any:
    """Results as dicts, lists and numbers; NaN as None, which JSON has."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__ if name not in leave_out}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: plain(item) for name, item in value._asdict().items()}
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return [plain(item) for item in value.tolist()]
    return None if isinstance(value, float) and math.isnan(value) else value
