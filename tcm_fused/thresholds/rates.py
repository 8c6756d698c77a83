"""The pairs of a labelled set, or of two, counted by similarity, and the rates that follow: the one source of figures
for `opis`, `calibrate`, `suggest_margins` and `evaluate`. Which rows are paired is a matter of `pairing.py`."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from tcm_fused.arguments import check_choice
from tcm_fused.backends.choice import BACKENDS, choose_counter
from tcm_fused.thresholds.intervals import Interval
from tcm_fused.thresholds.pairing import Block, blocks, check_finite, number_classes, read_sides
from tcm_fused.thresholds.sets import Array, shown

BITS = 17  # the grid of similarities has steps of 2^-17 = 7.6e-6
HALF = 1 << BITS
_SAMPLE_BLOCKS, _SAMPLE_ROWS = 64, 32  # rows that the range of thresholds is guessed from


class Worst(NamedTuple):
    """A class with its size and the value that it was ranked by."""

    class_id: int
    size: int
    value: float
    name: str | None = None  # where labels were text
    interval: Interval | None = None  # of 95 %, where there is one

    def __str__(self) -> str:
        name = self.class_id if self.name is None else shown(self.name)
        within = "" if self.interval is None else f" ({self.interval})"
        return f"class {name} ({self.size:,} samples): {self.value:.4f}{within}"


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


class ErrorRates:
    """Rates of K ascending thresholds, from the pairs accepted at each and those in all."""

    accepted_positives: Array  # [K] int64
    accepted_negatives: Array
    positives: int
    negatives: int

    @property
    def far(self) -> Array:
        """False accept rate, [K]: falls."""
        return self.accepted_negatives / max(self.negatives, 1)

    @property
    def frr(self) -> Array:
        """False reject rate, [K]: rises."""
        return (self.positives - self.accepted_positives) / max(self.positives, 1)


@dataclass(frozen=True, eq=False)
class Rates(ErrorRates):
    """Pairs of a whole set, by the thresholds k / HALF - 1 of the grid, k = 0 ... 2 HALF."""

    accepted_positives: Array  # [2 HALF + 1] int64, unordered positive pairs with s >= threshold
    accepted_negatives: Array
    positives: int  # unordered positive pairs in all
    negatives: int

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
    best: Tensor  # [2, N] each query's largest similarity to a positive and to a negative, -inf where there is none
    groups: dict[int, tuple[Array, Array]]  # of each group that pairs are within: pairs [2] and accepted pairs [2, T]

    def accepted(self, index: Array) -> tuple[Array, Array, Array]:
        """Accepted pairs at thresholds `index` [K]: positives and negatives of each class [C, K], and in all [2, K]."""
        below = self.class_below
        at = torch.from_numpy(np.array(index, dtype=np.int64)).to(below.device)
        rejected = torch.where(at > 0, below[:, :, (at - 1).clamp_min(0)], 0)
        accepted = (below[:, :, -1:] - rejected).cpu().numpy()
        total = accepted.sum(axis=1)
        total[1] //= 2  # each negative is one of both its classes
        return accepted[0, :-1], accepted[1, :-1], total

    @property
    def recall_at_1(self) -> float:
        """Share of the queries with a positive whose nearest is one; a tie, but for rounding, is no hit."""
        hit = self.is_hit[self.best[0] > -torch.inf]
        return int(hit.sum()) / len(hit)

    @property
    def is_hit(self) -> Tensor:
        """[N] whether the nearest of each query is a positive."""
        return self.best[0] > self.best[1] + rounding_of(self.best.dtype)


class Pairs:
    """Embeddings with labels, checked, and ready to be counted; against a second set, or within or across groups.

    Raises:
        TypeError, ValueError: an argument is wrong, or there is no positive or no negative pair.
        RuntimeError: the backend asked for is not available.
    """

    def __init__(
        self,
        embeddings: Any,
        labels: Any,
        backend: str,
        progress: bool,
        ref_emb: Any = None,
        ref_labels: Any = None,
        groups: Any = None,
        ref_groups: Any = None,
        group_pairs: str = "within",
    ) -> None:
        check_choice("backend", backend, ("auto", *BACKENDS))
        check_choice("group_pairs", group_pairs, ("within", "across"))
        own, reference, names, self.group_names = read_sides(
            embeddings, labels, ref_emb, ref_labels, groups, ref_groups, group_pairs
        )
        sides = [own] if reference is None else [own, reference]
        self._dtype = torch.float64 if any(s.x.dtype == torch.float64 for s in sides) else torch.float32
        self._operator = choose_counter(backend, own.x.device.type, self._dtype)
        # Converted here, once; but of a memory map panel by panel.
        sides = [s if s.file is not None else s._replace(x=s.x.to(self._dtype)) for s in sides]
        for side in sides:
            check_finite(side)
        classes, self._own, self._reference = number_classes(
            sides[0], None if reference is None else sides[1], group_pairs
        )
        self._blocks = blocks(self._own, self._reference, group_pairs)
        self.classes = classes
        counted = slice(classes.counted)
        self.class_ids: Array = classes.ids[counted]
        self.class_sizes: Array = classes.sizes[counted]
        self.class_positives: Array = classes.positives[counted]  # pairs of two samples of each class, [C]
        self.class_negatives: Array = classes.negatives[counted]  # pairs of which one sample is in the class, [C]
        self.class_names: Array | None = None if names is None else names[self.class_ids]
        self.left_out = len(classes.ids) - classes.counted
        self.pairs = int(classes.positives.sum()) + int(classes.negatives.sum()) // 2
        self.recall_at_1 = math.nan  # until `count`
        self._progress = progress

    @property
    def dtype(self) -> torch.dtype:
        """Of similarities: float32, or float64 where there are such embeddings."""
        return self._dtype

    @property
    def x(self) -> Tensor:
        """[N, D] the embeddings, those of the queries."""
        return self._own.x

    @property
    def y(self) -> Tensor:
        """[N] their classes, by place; negative: of none."""
        return self._own.y

    @property
    def sizes_of_sets(self) -> list[Array]:
        """Rows of each class [all], in one set or in both."""
        sides = [self._own] if self._reference is None else [self._own, self._reference]
        classes = len(self.classes.ids)
        return [np.bincount(side.y[side.y >= 0].cpu().numpy(), minlength=classes) for side in sides]

    @property
    def is_open(self) -> bool:
        """Whether queries stand against a set of others, rather than each other."""
        return self._reference is not None

    def sample(self) -> Rates:
        """Rates of about 2000 rows: blocks of rows neighbouring in label, so that there are positives among them.

        Of two sets, groups and memory maps those of all rows.
        """
        rows = int((self.y >= 0).sum())
        if self._own.groups is not None or self._reference is not None or self._own.file is not None:
            return self.count(np.empty(0)).rates
        order = self.y.argsort(stable=True)[len(self.y) - rows :]
        last = max(rows - _SAMPLE_ROWS, 0)
        starts = torch.arange(_SAMPLE_BLOCKS, device=order.device) * last // (_SAMPLE_BLOCKS - 1)
        index = (starts[:, None] + torch.arange(_SAMPLE_ROWS, device=order.device)).flatten()
        index = order[index[index < rows].unique()]
        sampled = self.x[index], self.y[index], None, None
        return _rates(self._operator(*sampled, 0, self.x.new_empty(0), BITS, None)[0])

    def count(self, thresholds: Array, all_classes: bool = False) -> Counts:
        """One pass over all pairs, with the classes' counts at ascending similarities [T].

        Classes without a positive pair share one row of counts, unless `all_classes`.
        """
        dtype = np.float64 if self._dtype == torch.float64 else np.float32  # the device may have no float64
        # Of opposite rows rounding may lead below -1; on the grid these are in its lowest cell, and here below all.
        thresholds = np.where(thresholds <= -1, -2.0, thresholds)
        t = torch.from_numpy(thresholds.astype(dtype)).to(self.x.device)
        classes = len(self.classes.ids) if all_classes else len(self.class_ids)
        counted = _Sum(t, classes, len(self.y))
        with progress_bar(self._progress, len(self._blocks)) as bar:
            for block in self._blocks:
                counted.add(block, self._run(block, classes, t, bar), one_set=self._reference is None)
        counts = counted.counts()
        self.recall_at_1 = counts.recall_at_1
        return counts

    def _run(self, block: Block, classes: int, t: Tensor, bar: "Bar") -> tuple[Tensor, ...]:
        """The tables of one block."""
        own, other = self._own, self._own if self._reference is None else self._reference
        rows = own.x[block.rows].to(self._dtype), own.y[block.rows]
        columns: tuple[Tensor | None, Tensor | None] = None, None
        if block.columns is not None:
            columns = other.x[block.columns].to(self._dtype), other.y[block.columns]
        found: tuple[Tensor, ...] = bar.run(self._operator, own.x.device, *rows, *columns, classes, t, BITS)
        own.release()
        other.release()
        return found


class _Sum:
    """Tables of blocks, added up."""

    def __init__(self, thresholds: Tensor, classes: int, rows: int) -> None:
        self.tables: tuple[Tensor, Tensor] | None = None
        self.best = thresholds.new_full((2, rows), -torch.inf)
        self.groups: dict[int, tuple[Array, Array]] = {}

    def add(self, block: Block, tables: tuple[Tensor, ...], one_set: bool) -> None:
        """Those of one block; of one set the columns are rows of it, and queries too."""
        counts, class_counts, best, ref_best = tables
        if block.group is not None:
            self._add_group(block.group, counts, class_counts)
        if self.tables is None:
            self.tables = counts, class_counts
        else:
            self.tables[0].add_(counts)
            self.tables[1].add_(class_counts)
        self._raise(block.rows, best)
        if one_set and block.columns is not None:
            self._raise(block.columns, ref_best)

    def _raise(self, rows: Tensor | slice, best: Tensor) -> None:
        self.best[:, rows] = torch.maximum(self.best[:, rows], best)

    def _add_group(self, group: int, counts: Tensor, class_counts: Tensor) -> None:
        of_group = class_counts.sum(1)
        of_group[1] //= 2
        accepted = of_group.flip(1).cumsum(1).flip(1).cpu().numpy()
        pairs = counts.sum(1).cpu().numpy()
        before = self.groups.get(group, (0, 0))
        self.groups[group] = before[0] + pairs, before[1] + accepted

    def counts(self) -> Counts:
        """All of them."""
        assert self.tables is not None
        return Counts(_rates(self.tables[0]), self.tables[1].cumsum_(dim=2), self.best, self.groups)


class Bar:
    """Shows how far the work is, and runs operators that tell of it."""

    def __init__(self, bar: Any, blocks: int) -> None:
        self.bar, self.blocks, self.ended = bar, blocks, 0

    def run(self, operator: Any, device: torch.device, *arguments: Any) -> Any:
        """The operator's result."""
        if self.bar is None:
            return operator(*arguments, None)
        done = torch.zeros(2, dtype=torch.int64, device="cpu")
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None  # which is a matter of threads

        def work() -> Any:
            if stream is None:
                return operator(*arguments, done)
            with torch.cuda.stream(stream):
                counted = operator(*arguments, done)
            stream.synchronize()  # the bar is to last as long as the work
            return counted

        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(work)
            while wait([future], timeout=0.1).not_done:
                self._show(self.ended + float(done[0] / done[1].clamp_min(1)))
            self.advance()
            return future.result()

    def advance(self) -> None:
        """One block is done."""
        self.ended += 1
        if self.bar is not None:
            self._show(self.ended)

    def _show(self, blocks: float) -> None:
        self.bar.update(blocks / self.blocks - self.bar.n)


@contextmanager
def progress_bar(wanted: bool, blocks: int) -> Iterator[Bar]:
    """A bar over so many blocks; none is shown unless it is wanted, which needs tqdm."""
    if not wanted:
        yield Bar(None, blocks)
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from error
    with tqdm(total=1.0, desc="pairs", bar_format="{l_bar}{bar}| {elapsed}") as bar:
        yield Bar(bar, blocks)


def rounding_of(dtype: torch.dtype) -> float:
    """By which two similarities may differ that are the same but for rounding."""
    return 8 * torch.finfo(dtype).eps


def class_rates(pairs: Pairs, counts: Counts, index: Array) -> tuple[Array, Array, Array]:
    """Sensitivity and specificity [C, K] at thresholds `index` [K], and accepted pairs in all [2, K]."""
    positives, negatives, total = counts.accepted(index)
    phi = positives / pairs.class_positives[:, None]
    psi = share(pairs.class_negatives[:, None] - negatives, pairs.class_negatives[:, None], 1.0)
    return phi, psi, total


def share(part: Array, whole: Any, nothing: float) -> Array:
    """part / whole, and `nothing` where the whole is 0."""
    part, whole = np.broadcast_arrays(np.asarray(part, dtype=np.float64), whole)
    return np.divide(part, whole, out=np.full(part.shape, nothing), where=whole > 0)


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


def worst_classes(result: _OfClasses, order: Array, values: Array, intervals: Array | None = None) -> list[Worst]:
    """The classes at the places `order` with their `values`, and the `intervals` [C, 2] of these."""
    names = result.class_names
    return [
        Worst(
            class_id=int(result.class_ids[c]),
            size=int(result.class_sizes[c]),
            value=float(values[c]),
            name=None if names is None else names[c],
            interval=None if intervals is None else Interval(*map(float, intervals[c])),
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


def fields(result: Any, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of a result, each `plain`."""
    return {name: plain(getattr(result, name)) for name in result.__dataclass_fields__ if name not in leave_out}


def plain(value: Any) -> Any:
    """Results as dicts, lists and numbers; NaN as None, which JSON has."""
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: plain(item) for name, item in value._asdict().items()}
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return [plain(item) for item in value.tolist()]
    return None if isinstance(value, float) and math.isnan(value) else value
