"""Files of trials in the forms that data sets have: LFW's pairs, VoxCeleb's `1 a b`, and CSV."""

import csv
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tcm_fused.thresholds.sets import Array

_SAME = {"same", "issame", "is_same", "label", "labels", "match", "y", "actual_issame", "is_match"}
_SCORE = {"score", "scores", "similarity", "cosine", "prediction"}
_FIRST = {"a", "first", "enrol", "enroll", "enrollment", "reference", "file1", "path1", "img1", "image1", "x1", "left"}
_SECOND = {"b", "second", "test", "probe", "file2", "path2", "img2", "image2", "x2", "right"}
_TRUTH = {"1": True, "0": False, "true": True, "false": False, "target": True, "nontarget": False}
# Of files; whatever else follows a dot belongs to the name, as in `face.v1` and `Dr._0001`.
_ENDING = re.compile(r"\.(jpe?g|png|bmp|webp|tiff?|wav|flac|mp3|m4a|npy|pt)$", re.IGNORECASE)
_SEVERAL = -1


class Trials(NamedTuple):
    """P trials: names of either side, or their scores."""

    same: Array  # [P] bool
    first: list[str] | None
    second: list[str] | None
    scores: Array | None  # [P] float64
    folds: Array | None  # [P], of LFW's sets
    subjects: tuple[list[str], list[str]] | None = None  # who is on either side; else, which picture or recording


def read_trials(path: Path) -> Trials:
    """Trials of a text file.

    - LFW's and XQLFW's `pairs.txt`: a first line with the number of sets and of pairs in each half of a set, then `name
      n1 n2` for a match and `name1 n1 name2 n2` for none. Row names are then `name_0001`.
    - VoxCeleb's: `1 a b`, or `0 a b`; also `a b 1`, and Kaldi's `a b target`.
    - CSV (cells end at commas, semicolons or tabs) with a header that names the columns (`a`, `b`, `same`, or `score`,
      `same`) or without one, in the orders above.

    Raises:
        ValueError: the file is missing, or a line is none of these; the message names the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ValueError(f"cannot read trials from {path}: {reason}") from error
    lines = [(k, line) for k, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"cannot read trials from {path}: it is empty")
    try:
        first = lines[0][1].split()
        # Two numbers are also a score with 0 or 1, and then all lines have two cells.
        is_lfw = len(first) == 1 or (len(first) == 2 and len(lines) > 1 and len(_lfw_cells(lines[1][1])) > 2)
        if is_lfw and all(cell.isdecimal() for cell in first):
            return _lfw(lines)
        return _table([(k, _cells(line)) for k, line in lines])
    except ValueError as error:
        raise ValueError(f"cannot read trials from {path}: {error}") from None


def rows_of(names: list[str], rows: list[str] | None, number: int) -> Array:
    """The rows that trials name: by `rows` [N], their names, or else by their numbers, from 0 on.

    A name is found as it is, or else by the end of its path: where one side has fewer folders, those that it has must
    agree. Endings of pictures and recordings count only where they tell rows apart.

    Raises:
        ValueError: one is not there; the message says which, and how many.
    """
    if rows is None:
        wrong = [name for name in names if not (name.isdecimal() and int(name) < number)]
        if wrong:
            raise ValueError(
                f"trials name {len(set(wrong)):,} rows that are not there, the first is {wrong[0]!r}: without names of "
                f"rows they are numbers from 0 to {number - 1}"
            )
        return np.array([int(name) for name in names])
    if len(rows) != number:
        raise ValueError(f"there are {len(rows):,} names for {number:,} rows of embeddings")
    exact, cut = _Names(rows, cut=False), _Names(rows, cut=True)
    place_of: dict[str, int | None] = {}
    for name in dict.fromkeys(names):
        place = exact.find(name)
        place_of[name] = cut.find(name) if place is None else place
    wrong = [name for name, place in place_of.items() if place is None]
    if wrong:
        raise ValueError(f"trials name {len(wrong):,} rows that are not there, the first is {wrong[0]!r}")
    taken = [name for name, place in place_of.items() if place == _SEVERAL]
    if taken:
        raise ValueError(f"trials name {taken[0]!r}, which several rows are named")
    return np.array([place_of[name] for name in names])


class _Names:
    """Rows by their names: as a whole, and by the ends of their paths; with endings of files cut off or not."""

    def __init__(self, rows: list[str], cut: bool) -> None:
        self._cut = cut
        self._whole: dict[str, int] = {}
        self._by_end: dict[str, int] = {}
        for place, name in enumerate(rows):
            ends = self._ends(name)
            self._whole[ends[0]] = _SEVERAL if ends[0] in self._whole else place
            for end in ends:
                self._by_end[end] = _SEVERAL if end in self._by_end else place

    def find(self, name: str) -> int | None:
        """The place of the row, `_SEVERAL`, or None of none. Paths agree from the end on, as far as both of them go."""
        ends = self._ends(name)
        if ends[0] in self._whole:
            return self._whole[ends[0]]
        found = {self._whole.get(end) for end in ends[1:]} | {self._by_end.get(ends[0])}
        found.discard(None)
        return next(iter(found), None) if len(found) < 2 else _SEVERAL

    def _ends(self, name: str) -> list[str]:
        """`a/b/c`, `b/c` and `c`."""
        parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".")] or [name]
        if self._cut:
            parts[-1] = _ENDING.sub("", parts[-1])
        return ["/".join(parts[k:]) for k in range(len(parts))]


def _cells(line: str) -> list[str]:
    separator = next((mark for mark in ",;\t" if mark in line), None)
    if separator is None:
        return line.split()
    return [cell.strip() for cell in next(csv.reader([line], delimiter=separator))]


def _lfw(lines: list[tuple[int, str]]) -> Trials:
    """A line of one number (development) or two (folds, and pairs in each half of a fold), then the pairs."""
    numbers = [int(cell) for cell in lines[0][1].split()]
    first, second, same = [], [], []
    people: tuple[list[str], list[str]] = [], []
    for k, line in lines[1:]:
        cells = _lfw_cells(line)
        if len(cells) not in (3, 4) or not all(cell.isdecimal() for cell in (cells[1], cells[-1])):
            raise ValueError(f"line {k} is neither `name n1 n2` nor `name1 n1 name2 n2`: {line.strip()!r}")
        same.append(len(cells) == 3)
        people[0].append(cells[0])
        people[1].append(cells[-2] if len(cells) == 4 else cells[0])
        first.append(f"{cells[0]}_{int(cells[1]):04d}")
        second.append(f"{people[1][-1]}_{int(cells[-1]):04d}")
    sets, of_half = numbers if len(numbers) == 2 else (1, numbers[0])
    if len(same) != 2 * sets * of_half:
        raise ValueError(
            f"its first line tells of {sets} x {2 * of_half} pairs, but there are {len(same)}: it is cut off or changed"
        )
    folds = np.repeat(np.arange(sets), 2 * of_half) if sets > 1 else None
    return Trials(np.array(same), first, second, None, folds, people)


def _lfw_cells(line: str) -> list[str]:
    return re.split(r"\t+" if "\t" in line else r"\s+", line.strip())


def _table(rows: list[tuple[int, list[str]]]) -> Trials:
    width = len(rows[0][1])
    for k, cells in rows:
        if len(cells) != width:
            raise ValueError(f"line {k} has {len(cells)} columns, the first has {width}")
    header = [cell.casefold() for cell in rows[0][1]]
    if any(cell in _SAME for cell in header) and not any(cell in ("0", "1") for cell in header):  # a row may be named y
        return _named(header, rows[1:])
    if width not in (2, 3):
        raise ValueError(f"line {rows[0][0]} has {width} columns; `1 a b`, `a b 1` or `score 1` are known, or a header")
    places = [k for k in (0, width - 1) if all(cells[k].casefold() in _TRUTH for _, cells in rows)]
    if len(places) != 1:
        which = "both the first and the last column are" if places else "neither the first nor the last column is"
        raise ValueError(f"{which} 0 and 1 throughout; a header (a,b,same) would tell the columns")
    rest = ["score"] if width == 2 else ["a", "b"]
    return _named(["same", *rest] if places == [0] else [*rest, "same"], rows)


def _named(header: list[str], rows: list[tuple[int, list[str]]]) -> Trials:
    """By the names of the columns."""
    if not rows:
        raise ValueError("there is no trial below the header")
    where = {
        name: next((k for k, cell in enumerate(header) if cell in known), None)
        for name, known in (
            ("same", _SAME),
            ("score", _SCORE),
            ("a", _FIRST),
            ("b", _SECOND),
            ("fold", {"fold", "set"}),
        )
    }
    has_names = where["a"] is not None and where["b"] is not None
    if where["same"] is None or not (has_names or where["score"] is not None):
        raise ValueError(f"the header must name the columns a, b and same, or score and same, got {', '.join(header)}")
    columns = {name: [cells[place] for _, cells in rows] for name, place in where.items() if place is not None}
    for (k, _), cell in zip(rows, columns["same"], strict=True):
        if cell.casefold() not in _TRUTH:
            raise ValueError(f"line {k} must say 0 or 1 of a match, got {cell!r}")
    scores = None
    if "score" in columns:
        scores = np.empty(len(rows))
        for index, ((k, _), cell) in enumerate(zip(rows, columns["score"], strict=True)):
            try:
                scores[index] = float(cell)
            except ValueError:
                scores[index] = np.nan
            if not np.isfinite(scores[index]):
                raise ValueError(f"line {k} has no score but {cell!r}")
    same = np.array([_TRUTH[cell.casefold()] for cell in columns["same"]])
    return Trials(
        same,
        columns["a"] if has_names else None,
        columns["b"] if has_names else None,
        scores,
        np.array(columns["fold"]) if "fold" in columns else None,
        _subjects(columns["a"], columns["b"], same) if has_names else None,
    )


def _subjects(first: list[str], second: list[str], same: Array) -> tuple[list[str], list[str]]:
    """Folders of the names, if these are of one person each, as VoxCeleb's first are: if two of them agree just where a
    trial matches. Else the names themselves."""
    parts = [[name.replace("\\", "/").split("/") for name in side] for side in (first, second)]
    depth = min(len(name) for side in parts for name in side) - 1
    for level in range(depth):
        folders = [[name[level] for name in side] for side in parts]
        if all((a == b) == is_same for a, b, is_same in zip(*folders, same.tolist(), strict=True)):
            return folders[0], folders[1]
    return first, second
