"""Where the positives of each query are ranked among all rows: recall at k, mean average precision and others."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tcm_fused.arguments import check_whole
from tcm_fused.backends.numerics import as_precise_as_asked, product, unit_and_norms, wide_dtype
from tcm_fused.thresholds.frames import frame, markdown
from tcm_fused.thresholds.pairing import NothingToMeasure, Side, check_finite, number_classes, read_sides
from tcm_fused.thresholds.rates import fields, progress_bar, rounding_of
from tcm_fused.thresholds.sets import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROWS, _COLUMNS = 512, 4096  # of one similarity tile: 8 MiB in float32
_POSITIVES = 1 << 19  # of a block of queries, held several times over
_CHUNK = 1 << 18  # components that are normalised together

SCORES = ("mean_average_precision", "mean_average_precision_at_r", "r_precision", "mean_reciprocal_rank")


@dataclass(frozen=True, eq=False, repr=False)
class Retrieval:
    """The result of `retrieval`: Q queries that have a positive, each with R of them, of which the i-th has rank r_i.

    Rank 1 is the nearest row. Names are those of pytorch-metric-learning.
    """

    recall_at_k: dict[int, float]  # by k: see `recall_at`
    mean_average_precision: float  # mean over queries of 1 / R * sum over all positives of i / r_i
    mean_average_precision_at_r: float  # the same with a sum over those with r_i <= R
    r_precision: float  # mean over queries of the share of positives with r_i <= R
    mean_reciprocal_rank: float  # mean over queries of 1 / r_1
    query: Array  # [Q] row of each query
    first_rank: Array  # [Q] r_1
    average_precision: Array  # [Q]
    left_out: int  # queries without a positive

    def recall_at(self, k: int) -> float:
        """Share of the queries with a positive among their k nearest rows: recall@k, or the hit rate."""
        return float((self.first_rank <= check_whole("k", k, 1)).mean())

    def __repr__(self) -> str:
        return self.report()

    def report(self) -> str:
        """The result in sentences."""
        lines = [f"{len(self.query):,} queries ({self.left_out:,} more without a positive left out)"]
        lines += [f"{f'recall@{k}':14} {100 * recall:.2f} %" for k, recall in self.recall_at_k.items()]
        names = ("mAP", "mAP@R", "R-precision", "MRR")
        lines += [f"{name:14} {getattr(self, score):.4f}" for name, score in zip(names, SCORES, strict=True)]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON knows."""
        return fields(self)

    def columns(self) -> dict[str, Any]:
        """The queries as columns of a table."""
        names = ("query", "first_rank", "average_precision")
        return {name: getattr(self, name) for name in names}

    def to_frame(self) -> Any:
        """The queries as a pandas DataFrame."""
        return frame(self.columns())

    @property
    def scores(self) -> dict[str, float]:
        """All of them by name, recall too."""
        recall = {f"recall_at_{k}": value for k, value in self.recall_at_k.items()}
        return recall | {name: getattr(self, name) for name in SCORES}

    def to_markdown(self) -> str:
        """The scores as a table."""
        return markdown({"score": list(self.scores), "value": list(self.scores.values())})

    def plot(self, axes: "Axes | None" = None) -> "Axes":
        """Draw recall over k, the cumulative match characteristic; needs matplotlib."""
        from tcm_fused.thresholds.curve_plots import plot_recall

        return plot_recall(self, axes)


def retrieval(
    embeddings: Any,
    labels: Any,
    ref_emb: Any = None,
    ref_labels: Any = None,
    *,
    k: int | Sequence[int] = (1, 5, 10),
    groups: Any = None,
    ref_groups: Any = None,
    group_pairs: str = "within",
    progress: bool = False,
) -> Retrieval:
    """Rank the rows by similarity to each query, and tell where its positives are; exactly, without a sort.

    In a tile of similarities only the negatives that come before a query's last positive are looked at: each is counted
    at its place among the positives. It takes O((N + M) D) memory, and the time of the product and of these negatives:
    the worse the model and the fewer the classes, the longer; with two classes, more than sorting would take. In a tie,
    but for rounding, the negative comes first, as in `recall_at_1` elsewhere.

    Args:
        embeddings, labels, ref_emb, ref_labels, groups, ref_groups, group_pairs, progress: as in `opis`. Without
            `ref_emb` each row is a query against all others. Rows that the groups do not pair are not ranked.
        k: ranks that recall is told at, one or several.

    Raises:
        TypeError, ValueError: as `opis`.

    Example:
        >>> x = np.array([[1, 0], [0.96, 0.28], [0, 1], [0.8, 0.6]])
        >>> found = retrieval(x, np.array([0, 0, 1, 1]))
        >>> found.first_rank.tolist(), found.recall_at(1), found.recall_at(2)
        ([1, 2, 1, 3], 0.5, 0.75)
    """
    ranks = check_ranks(k)
    own, reference, _, _ = read_sides(embeddings, labels, ref_emb, ref_labels, groups, ref_groups, group_pairs)
    sides = [own] if reference is None else [own, reference]
    for side in sides:
        check_finite(side)
    _, own, reference = number_classes(own, reference, group_pairs)
    dtype = torch.float64 if any(side.x.dtype == torch.float64 for side in sides) else torch.float32
    with as_precise_as_asked(own.x.device.type, False):
        queries = _Rows(own, dtype)
        others = queries if reference is None else _Rows(reference, dtype)
        # So few rows at a time that their positives take no more memory than a tile.
        largest = int(others.label.unique_consecutive(return_counts=True)[1].max()) if len(others.label) else 0
        rows = min(max(_POSITIVES // (largest + 1), 1), _ROWS)
        starts = range(0, len(queries.label), rows)
        found = []
        with progress_bar(progress, len(starts)) as bar:
            for start in starts:
                block = _Block(queries, others, slice(start, start + rows), group_pairs == "within")
                found.append(block.scores())
                bar.advance()
    return _result(torch.cat(found, 1).cpu().numpy(), queries.order.cpu().numpy(), ranks)


def ranks_or_nan(embeddings: Any, labels: Any, k: Sequence[int]) -> dict[str, float]:
    """The scores for a training run: NaN where the rows have none, and no error."""
    try:
        return retrieval(embeddings, labels, k=k).scores
    except NothingToMeasure:
        return no_scores(k)


def no_scores(k: Sequence[int]) -> dict[str, float]:
    """All of them NaN."""
    return dict.fromkeys((*(f"recall_at_{rank}" for rank in k), *SCORES), math.nan)


def check_ranks(k: Any, name: str = "k") -> list[int]:
    """One rank or several, 1 or above, each once and ascending."""
    given = k.tolist() if isinstance(k, (np.ndarray, Tensor)) else k
    several = given if isinstance(given, Collection) and not isinstance(given, str) else [given]
    return sorted({check_whole(name, one, 1) for one in several})


def _result(scores: Array, order: Array, ranks: Sequence[int]) -> Retrieval:
    """From `_Block.scores` of all rows, in the order in which they came."""
    known = np.flatnonzero(scores[0] > 0)
    known = known[np.argsort(order[known])]
    _, first, average, at_r, r_precision = scores[:, known]
    return Retrieval(
        recall_at_k={k: float((first <= k).mean()) for k in ranks},
        mean_average_precision=float(average.mean()),
        mean_average_precision_at_r=float(at_r.mean()),
        r_precision=float(r_precision.mean()),
        mean_reciprocal_rank=float((1 / first).mean()),
        query=order[known],
        first_rank=first.astype(np.int64),
        average_precision=average,
        left_out=len(order) - len(known),
    )


class _Rows:
    """The rows of a set that take part, by ascending class: so the positives of a query stand side by side."""

    def __init__(self, side: Side, dtype: torch.dtype) -> None:
        order = side.y.argsort(stable=True)
        self.order = order[side.y[order] >= 0]
        self.label = side.y[self.order]
        self.groups = None if side.groups is None else side.groups[self.order]
        self._side, self._dtype = side, dtype
        self._unit = None if side.file is not None else self._normalised(slice(0, len(self.order)))

    def unit(self, rows: slice) -> Tensor:
        """Unit rows [n, D]; of a memory map they are read anew."""
        return self._normalised(rows) if self._unit is None else self._unit[rows]

    def _normalised(self, rows: slice) -> Tensor:
        order, x = self.order[rows], self._side.x
        found, step = x.new_empty((len(order), x.shape[1]), dtype=self._dtype), max(_CHUNK // x.shape[1], 1)
        for start in range(0, len(order), step):  # copies on the way are small
            part = x[order[start : start + step]].to(self._dtype)
            found[start : start + step] = unit_and_norms(part, part.new_ones(len(part), dtype=torch.bool))[0]
        self._side.release()
        return found


class _Block:
    """Queries [B] that stand side by side, and the ranks of their positives."""

    def __init__(self, queries: _Rows, others: _Rows, rows: slice, within: bool) -> None:
        self.others, self.within, self.same_set = others, within, queries is others
        self.unit, self.groups = queries.unit(rows), None if queries.groups is None else queries.groups[rows]
        label = queries.label[rows].contiguous()
        self.row = torch.arange(rows.start, rows.start + len(label), device=label.device)
        self.first = torch.searchsorted(others.label, label)
        self.last = torch.searchsorted(others.label, label, right=True)
        self.positives = self._find_positives()  # [B, W] their similarities, the highest first, then -inf
        self.number = (self.positives > -torch.inf).sum(1)  # [B] R

    def scores(self) -> Tensor:
        """[5, B]: R, r_1, the average precision, that at R, and the R-precision."""
        width = self.positives.shape[1]
        before = self._negatives_before()
        place = torch.arange(1, width + 1, device=before.device)
        rank = place + before[:, :width].cumsum(1)
        r, there = self.number[:, None], place <= self.number[:, None]
        wide = wide_dtype(before.device)
        precision, reached = place.to(wide) / rank, there & (rank <= r)
        share = self.number.clamp_min(1).to(wide)
        of_all, at_r = ((precision * taken).sum(1) / share for taken in (there, reached))
        nearest = rank[:, 0] if width > 0 else torch.zeros_like(self.number)
        return torch.stack((self.number.to(wide), nearest.to(wide), of_all, at_r, reached.sum(1) / share))

    def _tiles(self, first: int, last: int) -> Any:
        """Columns of the others' set in parts, with the similarities and their places."""
        for start in range(first, last, _COLUMNS):
            columns = slice(start, min(start + _COLUMNS, last))
            yield columns, product(self.unit, self.others.unit(columns).T)

    def _find_positives(self) -> Tensor:
        first, last = (int(self.first.min()), int(self.last.max())) if len(self.first) else (0, 0)
        width = int((self.last - self.first).max()) if len(self.first) else 0
        found = self.unit.new_full((len(self.first), width), -torch.inf)
        for columns, s in self._tiles(first, last):
            row, column = (self._is_positive(columns) & self._is_pair(columns)).nonzero(as_tuple=True)
            found[row, column + columns.start - self.first[row]] = s[row, column]
        return found.sort(dim=1, descending=True).values

    def _negatives_before(self) -> Tensor:
        """[B, W + 1] negatives by the number of positives that come before them; not those after all positives."""
        rows, width = self.positives.shape
        before = torch.zeros(rows * (width + 1), dtype=torch.int64, device=self.positives.device)
        if width == 0:
            return before.view(rows, 1)
        near = rounding_of(self.positives.dtype)
        lowest = self.positives.gather(1, (self.number - 1).clamp_min(0)[:, None])
        lowest = torch.where(self.number[:, None] > 0, lowest - near, torch.inf)
        for columns, s in self._tiles(0, len(self.others.label)):
            candidate = s >= lowest
            if self.groups is not None:
                candidate &= self._is_pair(columns)
            if bool((self.first < columns.stop).any()) and bool((self.last > columns.start).any()):
                candidate &= ~self._is_positive(columns)
            row, column = candidate.nonzero(as_tuple=True)
            at = row * (width + 1) + self._above(row, s[row, column] + near)
            before.index_add_(0, at, torch.ones_like(at))
        return before.view(rows, width + 1)

    def _above(self, row: Tensor, value: Tensor) -> Tensor:
        """How many of a row's positives are above a value: by bisection."""
        low, high = torch.zeros_like(row), self.number[row]
        for _ in range(self.positives.shape[1].bit_length()):
            middle = (low + high) // 2
            is_above = (middle < high) & (self.positives[row, middle.clamp_max(self.positives.shape[1] - 1)] > value)
            low, high = torch.where(is_above, middle + 1, low), torch.where(is_above, high, middle)
        return low

    def _is_positive(self, columns: slice) -> Tensor:
        """[B, columns] whether they are of the query's class; the query itself is."""
        place = torch.arange(columns.start, columns.stop, device=self.row.device)
        return (place >= self.first[:, None]) & (place < self.last[:, None])

    def _is_pair(self, columns: slice) -> Tensor:
        """[B, columns] whether they are no query itself, and paired by the groups."""
        place = torch.arange(columns.start, columns.stop, device=self.row.device)
        found = (self.row[:, None] != place) if self.same_set else torch.ones_like(self._is_positive(columns))
        if self.groups is not None and self.others.groups is not None:
            found &= (self.groups[:, None] == self.others.groups[columns]) == self.within
        return found
