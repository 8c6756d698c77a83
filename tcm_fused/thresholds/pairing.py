"""Which rows are paired: one set with itself or two with each other, within or across groups, in panels of memory.

Everything here is known before a similarity is: the classes, how many pairs each has, and the blocks of pairs (`Block`)
that a counter has to walk.
"""

import mmap
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tcm_fused.arguments import check_choice, check_groups_given, check_set, int64_labels
from tcm_fused.thresholds.sets import Array, Labels, as_embeddings, as_labels
from tcm_fused.warn import warn_caller

_PANEL = 1 << 26  # bytes of a memory map that are looked at together, at most
_COPIES = 4  # of the rows, that a counter takes at most
_PANELS = 48  # that would fill the memory; a pair of them is worked on in about ten


class NothingToMeasure(ValueError):
    """The set has no such score, although all arguments are right: too few rows or classes, rows that are not
    finite, an empty range of thresholds. Inside a training run that is NaN and no reason to end it.
    """

    recall_at_1 = float("nan")  # which can be told where it is only the range that is empty


class Side(NamedTuple):
    """One set, checked."""

    name: str  # of the argument
    x: Tensor  # [N, D]
    y: Tensor  # [N] int64 labels, then classes; negative: the row takes part in no pair
    groups: Tensor | None  # [N] int64
    file: mmap.mmap | None  # that x is a map of, if it is too large to be copied

    @property
    def panel(self) -> int:
        """How many rows are looked at together: all, but of a memory map."""
        return (
            max(len(self.y), 1)
            if self.file is None
            else max(min(_PANEL, room() // _PANELS) // (4 * self.x.shape[1]), 1)
        )

    def release(self) -> None:
        """Let go of the pages of a memory map that were read; the file still has them."""
        if self.file is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.file.madvise(mmap.MADV_DONTNEED)


class Block(NamedTuple):
    """Rows of the first set against rows of the second, or (None) against each other."""

    rows: Tensor | slice
    columns: Tensor | slice | None
    group: int | None = None  # whose pairs these are, if they are of one


@dataclass(frozen=True)
class Classes:
    """The classes with a positive pair come first (C of them), then the others."""

    ids: Array  # [all] labels
    sizes: Array  # [all] rows of both sets
    positives: Array  # [all] pairs of two rows of the class
    negatives: Array  # [all] pairs of which one row is in the class
    counted: int  # C


def read_sides(
    embeddings: Any, labels: Any, ref_emb: Any, ref_labels: Any, groups: Any, ref_groups: Any, group_pairs: str
) -> tuple[Side, Side | None, Array | None, Array | None]:
    """The sets, and the names of their labels and of their groups where those are text.

    Raises:
        TypeError, ValueError: an argument is wrong, or one is missing that belongs to another.
    """
    if (ref_emb is None) != (ref_labels is None):
        there, missing = ("ref_labels", "ref_emb") if ref_emb is None else ("ref_emb", "ref_labels")
        raise ValueError(f"{there} came without {missing}; give both or neither")
    check_groups_given(groups, ref_emb, ref_groups, group_pairs)
    if ref_emb is not None and ref_emb is embeddings:
        warn_caller(
            "ref_emb is embeddings itself: each row is paired with itself too, as a match that cannot fail; leave "
            "ref_emb and ref_labels out for the pairs of one set"
        )
    x = as_embeddings("embeddings", embeddings)
    y, ref_y, names = _together("labels", labels, ref_labels)
    own = _side("embeddings", x, "labels", y, labels)._replace(file=_file_behind(embeddings, x))
    reference = None
    if ref_emb is not None and ref_y is not None:
        ref_x = as_embeddings("ref_emb", ref_emb)
        reference = _side("ref_emb", ref_x, "ref_labels", ref_y, ref_labels)
        reference = reference._replace(file=_file_behind(ref_emb, ref_x))
        _check_alike(own.x, ref_x)
    if groups is None:
        return own, reference, names, None
    g, ref_g, group_names = _together("groups", groups, ref_groups)
    own = own._replace(groups=_group_column(own, g))
    if reference is not None and ref_g is not None:
        reference = reference._replace(groups=_group_column(reference, ref_g))
    return own, reference, names, group_names


def _together(name: str, first: Any, second: Any) -> tuple[Tensor, Tensor | None, Array | None]:
    """Labels (or groups) of both sets in one numbering; TypeError if one is text and the other integers."""
    own = as_labels(name, first)
    if second is None:
        return own.y, None, own.names
    other = as_labels(f"ref_{name}", second)
    if (own.names is None) != (other.names is None):
        kinds = ["integers" if side.names is None else "text" for side in (own, other)]
        raise TypeError(
            f"{name} are {kinds[0]}, ref_{name} are {kinds[1]}; the same class must have the same name in both"
        )
    if own.names is None or other.names is None:
        return own.y, other.y, None
    names = np.array(sorted({*own.names, *other.names}), dtype=object)
    return _recoded(own, names), _recoded(other, names), names


def _recoded(labels: Labels, names: Array) -> Tensor:
    assert labels.names is not None
    code = {name: place for place, name in enumerate(names)}
    place = torch.tensor([code[name] for name in labels.names], dtype=torch.int64)
    return place.to(labels.y.device)[labels.y]


def _side(name: str, x: Tensor, labels_name: str, y: Tensor, given: Any) -> Side:
    if not isinstance(given, Tensor):  # it was on no device
        y = y.to(x.device)
    check_set(name, x, labels_name, y)
    return Side(name, x.detach(), int64_labels(y, labels_name), None, None)


def _check_alike(x: Tensor, ref_x: Tensor) -> None:
    if ref_x.shape[1] != x.shape[1]:
        raise ValueError(f"ref_emb has D={ref_x.shape[1]}, embeddings have D={x.shape[1]}; they must agree")
    if ref_x.device != x.device:
        raise ValueError(f"ref_emb is on {ref_x.device}, embeddings on {x.device}; move them to one device")


def _group_column(side: Side, groups: Tensor) -> Tensor:
    name = "groups" if side.name == "embeddings" else "ref_groups"
    if groups.is_floating_point() or groups.is_complex():
        raise TypeError(f"{name} must have an integer dtype, got {groups.dtype}; use {name}.long()")
    if groups.shape != side.y.shape:
        raise ValueError(f"{name} must have shape [{len(side.y)}], one group for each row, got {list(groups.shape)}")
    return int64_labels(groups, name).to(side.x.device)


def check_finite(side: Side) -> None:
    """NothingToMeasure if a row that takes part is not finite."""
    bad, first, step = 0, -1, side.panel
    for start in range(0, len(side.y), step):
        rows = slice(start, start + step)
        # By the norm, which takes no memory of the size of x as isfinite() of each component does.
        peak = torch.linalg.vector_norm(side.x[rows], torch.inf, dim=1)
        wrong = (~peak.isfinite() & (side.y[rows] >= 0)).nonzero()
        if len(wrong) > 0 and bad == 0:
            first = start + int(wrong[0])
        bad += len(wrong)
        side.release()
    if bad > 0:
        raise NothingToMeasure(
            f"{side.name} must be finite, but {bad} of {len(side.y)} rows hold NaN or infinity, the first is row "
            f"{first}; a model that diverged or an overflow in float16 gives such rows"
        )


def number_classes(own: Side, reference: Side | None, group_pairs: str) -> tuple[Classes, Side, Side | None]:
    """The classes, and both sets with those instead of their labels.

    Raises:
        NothingToMeasure: no pair is positive, or none negative.
    """
    check_choice("group_pairs", group_pairs, ("within", "across"))
    sides = [own] if reference is None else [own, reference]
    for side in sides:
        if reference is not None and not bool((side.y >= 0).any()):
            labels = "labels" if side is own else "ref_labels"
            raise NothingToMeasure(f"{side.name} has no row that takes part: {labels} must name one, 0 or above")
    given = [side.y[side.y >= 0] for side in sides]
    ids, inverse, sizes = torch.cat(given).unique(return_inverse=True, return_counts=True)
    if len(ids) < 2:
        raise NothingToMeasure(
            f"labels must name at least two classes (0 or above), got {len(ids)}: no pair is negative"
        )
    groups = [None if side.groups is None else side.groups[side.y >= 0].cpu().numpy() for side in sides]
    parts = [part.cpu().numpy() for part in inverse.split([len(part) for part in given])]
    positives, negatives = _pairs_of_classes(parts, groups, group_pairs, len(ids))
    counted = positives > 0
    if not counted.any():
        raise NothingToMeasure(_why_no_positive(len(ids), len(inverse), reference is not None, groups[0] is not None))
    if not negatives.any():
        raise NothingToMeasure(f"no pair is negative: {group_pairs} groups all pairs are of one class")
    order = np.concatenate((np.flatnonzero(counted), np.flatnonzero(~counted)))
    place = torch.from_numpy(np.argsort(order)).to(own.y.device)
    numbered = []
    for side, part in zip(sides, inverse.split([len(part) for part in given]), strict=True):
        y = torch.full_like(side.y, -1)
        y[side.y >= 0] = place[part]
        numbered.append(side._replace(y=y))
    classes = Classes(
        ids.cpu().numpy()[order], sizes.cpu().numpy()[order], positives[order], negatives[order], int(counted.sum())
    )
    return classes, numbered[0], None if reference is None else numbered[1]


def _why_no_positive(classes: int, rows: int, two: bool, grouped: bool) -> str:
    within = ", as the groups pair them" if grouped else ""
    if two:
        return f"no class is in both sets{within}: {classes} classes for {rows} rows, no pair is positive"
    return f"no class has two samples{within}: {classes} classes for {rows} rows, no pair is positive"


def _pairs_of_classes(
    parts: list[Array], groups: list[Array | None], group_pairs: str, classes: int
) -> tuple[Array, Array]:
    """[classes] int64 positive and negative pairs: by the classes alone, or by how many rows each has in each group."""
    nothing: list[Array | None] = [None] * len(parts)
    everything = _tables(parts, nothing, classes)
    if groups[0] is None:
        return everything
    within = _tables(parts, groups, classes)
    return within if group_pairs == "within" else (everything[0] - within[0], everything[1] - within[1])


def _tables(parts: list[Array], groups: list[Array | None], classes: int) -> tuple[Array, Array]:
    """Pairs within each group, summed up over the groups; of two parts the pairs between them."""
    if groups[0] is None:
        codes, number = [np.zeros(len(part), dtype=np.int64) for part in parts], 1
    else:
        values, inverse = np.unique(np.concatenate([g for g in groups if g is not None]), return_inverse=True)
        codes, number = np.split(inverse, np.cumsum([len(part) for part in parts])[:-1]), len(values)
    cells, where = np.unique(
        np.concatenate([part * number + code for part, code in zip(parts, codes, strict=True)]), return_inverse=True
    )
    counts = [
        np.bincount(part, minlength=len(cells)).astype(np.int64)
        for part in np.split(where, np.cumsum([len(part) for part in parts])[:-1])
    ]
    of_class, of_group = cells // number, cells % number
    totals = [np.bincount(code, minlength=number).astype(np.int64)[of_group] for code in codes]
    if len(parts) == 1:
        positive, negative = counts[0] * (counts[0] - 1) // 2, counts[0] * (totals[0] - counts[0])
    else:
        positive = counts[0] * counts[1]
        negative = counts[0] * totals[1] + counts[1] * totals[0] - 2 * positive
    found = np.zeros((2, classes), dtype=np.int64)
    for table, values in zip(found, (positive, negative), strict=True):
        np.add.at(table, of_class, values)
    return found[0], found[1]


def blocks(own: Side, reference: Side | None, group_pairs: str) -> list[Block]:
    """Every pair once, in blocks that a counter takes: a whole set, a group of it, a panel of a memory map."""
    found = []
    for block in _blocks_of_groups(own, reference, group_pairs):
        found += list(_panels(block, own, reference))
    return found


def _blocks_of_groups(own: Side, reference: Side | None, group_pairs: str) -> Iterator[Block]:
    everything = slice(None)
    if own.groups is None:
        yield Block(everything, None if reference is None else everything)
        return
    takes_part = own.y >= 0
    for group in own.groups[takes_part].unique().tolist():
        rows = ((own.groups == group) & takes_part).nonzero().flatten()
        if reference is None and group_pairs == "within":
            yield Block(rows, None, group)
        elif reference is None:  # each pair once: with the groups that follow
            columns = ((own.groups > group) & takes_part).nonzero().flatten()
            yield Block(rows, columns)
        else:
            assert reference.groups is not None
            same = (reference.groups == group) == (group_pairs == "within")
            yield Block(rows, (same & (reference.y >= 0)).nonzero().flatten(), group)


def _panels(block: Block, own: Side, reference: Side | None) -> Iterator[Block]:
    """The block, or of memory maps the blocks of its panels."""
    second = own if reference is None else reference
    rows = list(_split(block.rows, own))
    if block.columns is not None:
        for part in rows:
            for other in _split(block.columns, second):
                yield Block(part, other, block.group)
        return
    for k, part in enumerate(rows):
        yield Block(part, None, block.group)
        for other in rows[k + 1 :]:
            yield Block(part, other, block.group)


def _split(rows: Tensor | slice, side: Side) -> Iterator[Tensor | slice]:
    if side.file is None or (isinstance(rows, Tensor) and len(rows) == 0):
        yield rows
        return
    step, number = side.panel, len(side.y) if isinstance(rows, slice) else len(rows)
    for start in range(0, number, step):
        yield slice(start, min(start + step, number)) if isinstance(rows, slice) else rows[start : start + step]


def _file_behind(embeddings: Any, x: Tensor) -> mmap.mmap | None:
    """The memory map that the rows are read from; None if there is room for them as unit rows."""
    array = embeddings if _COPIES * x.nbytes > room() else None
    while isinstance(array, np.ndarray) and not array.flags.writeable:
        array = array.base
    found = isinstance(array, mmap.mmap) and x.data_ptr() == embeddings.__array_interface__["data"][0]
    return array if found else None


def room() -> int:
    """Bytes of memory that this process may take: of the machine, of its container, or as `ulimit` says."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limits = (resource.getrlimit(which)[0] for which in (resource.RLIMIT_DATA, resource.RLIMIT_AS))
    found += [limit for limit in limits if limit != resource.RLIM_INFINITY]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        found += [int(text)] if text.isdecimal() else []
    return min(found)
