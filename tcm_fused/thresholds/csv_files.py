"""Embeddings and labels of .csv files, as pandas, NumPy, R and spreadsheets write them.

Such a file does not say whether its first line names the columns, nor whether its first column numbers the rows. Where
its content, or the number of rows of the file beside it, tells, that is followed; where they do not, the file is
refused with what would make it clear: a guess would be another result without a word.
"""

import codecs
import csv
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tcm_fused.thresholds.arrays import check_memory
from tcm_fused.thresholds.sets import Array
from tcm_fused.thresholds.tables import NUMBER, as_numbers, import_pyarrow, is_missing, may_be_index, numbers

_SEPARATORS = ",;\t"
_QUOTED = re.compile(r'"(?:[^"]|"")*"')
_INTEGER = re.compile(r"\s*(0|-?[1-9][0-9]*)\s*")
_LINE = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n)?")
_MARKS = (  # of an encoding, at the start of a file; UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)


class Csv(NamedTuple):
    """A file, and the ways in which its first line can be read."""

    path: Path
    first: list[str]  # cells of the first line
    first_line: Any  # pyarrow.Table of it
    others: Any  # pyarrow.Table of the other lines; None if there are none
    header: tuple[bool, ...]  # whether the first line is a header: one of them, or both where it may be either
    is_guess: bool  # where that it is one would be known from the number of rows alone, which may also be wrong

    def rows(self, header: bool) -> int:
        """Without the header, if there is one."""
        return (0 if self.others is None else self.others.num_rows) + (not header)

    def columns(self, header: bool) -> list[Any]:
        """Columns without the header, and without those at the left that have no name in it: a written index."""
        pyarrow = import_pyarrow(".csv")
        parts = [part for part, used in ((self.first_line, not header), (self.others, self.others is not None)) if used]
        table = pyarrow.concat_tables(parts, promote_options="permissive")
        return table.columns[_unnamed(self.first) if header else 0 :]


def open_embeddings(path: Path) -> Csv:
    """A file of numbers. ValueError: it is none."""
    content, line = _read(path)
    separator = _separator(line) or _space(line) or ","
    first = _cells(line, separator)
    first_line = _table(content[: len(line)], separator, len(first))
    others = _table(content[len(line) :], separator, len(first))
    header = _header_of_numbers(first, others)
    if others is None and header == (True,):
        raise ValueError("it is empty but for a header")
    for name, column in zip(first, others.columns if others is not None else (), strict=False):
        if name or len(header) == 2:  # not an index
            numbers(column, f"the column of {name!r}")
    return Csv(path, first, first_line, others, header, False)


def open_labels(path: Path) -> Csv:
    """A file of one column of labels, perhaps beside an index without a name. ValueError: it is none."""
    content, line = _read(path)
    separator = _separator(line) or ","
    first = _cells(line, separator)
    indexed = len(first) > 1 and _unnamed(first) == len(first) - 1
    if len(first) > 1 and not indexed:
        raise ValueError(
            f"labels must be one column, but the first line has {len(first)}: {_shown(first)}; keep the labels alone "
            "(pandas: to_csv(index=False)), and put quotes around text that holds a separator"
        )
    first_line = _table(content[: len(line)], separator, len(first), text=True)
    others = _table(content[len(line) :], separator, len(first), text=True)
    header, is_guess = ((True,), False) if indexed else _header_of_labels(first[0], others)
    return Csv(path, first, first_line, others, header, is_guess)


def settle(x: Csv | int, y: Csv | int) -> tuple[bool, bool]:
    """Whether the first lines of embeddings and labels are headers; instead of a file, the number of rows may be given.

    Raises:
        ValueError: they have not as many rows, or it cannot be told.
    """
    (hx, nx), (hy, ny) = (_readings(side) for side in (x, y))
    found = [(a, b) for a, n in zip(hx, nx, strict=True) for b, m in zip(hy, ny, strict=True) if n == m]
    if not found:
        raise ValueError(
            f"labels must have shape [{nx[-1]}], one label for each row of embeddings, but those have "
            f"{_counted(hx, nx)}, and labels {_counted(hy, ny)}"
        )
    if len(found) > 1:
        raise ValueError(_unclear(x) if isinstance(x, Csv) else "")
    if found[0][1] and isinstance(y, Csv) and y.is_guess:
        raise ValueError(_unclear(y))
    return found[0]


def embeddings_of(file: Csv, header: bool) -> Array:
    """[N, D] numbers."""
    names = file.first[_unnamed(file.first) :] if header else None
    if names is not None and "" in names:
        raise ValueError(f"the column {len(file.first) - len(names) + names.index('') + 1} has no name in the header")
    found = as_numbers(file.columns(header), names)
    if names is not None and len(names) == len(file.first) - 1:
        _check_index(file.others.column(0), found)
    return found


def _check_index(column: Any, features: Array) -> None:
    """ValueError if the column without a name, which is left out, may be a feature of the same kind as the others."""
    types = import_pyarrow(".csv").types
    whole = types.is_integer(column.type) and features.dtype.kind in "iu"
    if types.is_floating(column.type) or (whole and not may_be_index([column.to_numpy(), *features.T])):
        raise ValueError(
            "the first column has no name and may be an index or a feature; name it, or leave it out (pandas: "
            "to_csv(index=False))"
        )


def labels_of(file: Csv, header: bool) -> Array:
    """[N] int64 or uint64 where all labels are integers, float64 where all are floats, text otherwise, as it stands."""
    texts: list[str] = file.columns(header)[0].to_pylist()
    if "" in texts:
        raise ValueError(f"row {texts.index('') + 1} has no label")
    missing = [is_missing(text) for text in texts]
    if any(missing) and all(m or NUMBER.fullmatch(text) for m, text in zip(missing, texts, strict=True)):
        row = missing.index(True)
        raise ValueError(f"row {row + 1} has no label but {texts[row]!r}, and all others are numbers")
    values = _integers(texts) if all(map(_INTEGER.fullmatch, texts)) else _floats(texts)
    # Text that differs stays apart: "1" and "01" are two classes.
    return np.array(texts) if values is None or len(np.unique(values)) < len(set(texts)) else values


def _integers(texts: list[str]) -> Array | None:
    """Not by way of floats, which hold no integer of 17 digits; None if one is beyond 64 bits."""
    values = [int(text) for text in texts]
    for dtype in (np.int64, np.uint64):
        if np.iinfo(dtype).min <= min(values) and max(values) <= np.iinfo(dtype).max:
            return np.array(values, dtype=dtype)
    return None


def _floats(texts: list[str]) -> Array | None:
    """None unless all are written as Python, pandas or numpy.savetxt write floats: "1e5" is a name."""
    if not all(map(NUMBER.fullmatch, texts)):
        return None
    values = [float(text) for text in texts]
    usual = all(text.strip() in (repr(v), f"{v:.18e}") for text, v in zip(texts, values, strict=True))
    return np.array(values) if usual else None


def _read(path: Path) -> tuple[bytes, bytes]:
    """The content as UTF-8, without a mark of its encoding and line breaks at its end, and its first line."""
    check_memory(path.stat().st_size, path.stat().st_size)
    content = path.read_bytes()
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), None)
    try:
        if encoding is not None:
            content = content.decode(encoding).encode()
        elif not content.isascii():
            content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"it is not in {error.encoding} ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
    if b"\0" in content[:4096]:
        raise ValueError("it is no text, or UTF-16 without a mark at its start; save it as UTF-8")
    content = content.rstrip(b"\r\n")
    line = _LINE.match(content)
    assert line is not None
    if not line[0].strip():
        raise ValueError("it is empty" if not content else "its first line is empty")
    if line[0].startswith(b"#"):
        raise ValueError("it begins with a comment, a line that starts with #; remove such lines")
    if line[0].count(b'"') % 2:
        raise ValueError("its first line has a quote without a second one")
    return content, line[0]


def _separator(line: bytes) -> str | None:
    """The one in the first line, outside of quotes; None if there is none."""
    bare = _QUOTED.sub("", line.decode())
    found = [separator for separator in _SEPARATORS if separator in bare]
    if len(found) < 2:
        return found[0] if found else None
    cells = bare.strip().split(found[1])
    if found[0] == "," and all(NUMBER.fullmatch(cell.replace(",", ".", 1)) for cell in cells):
        raise ValueError("it has decimal commas; write numbers with decimal points (R: write.csv, not write.csv2)")
    raise ValueError(
        f"its first line has {' and '.join(map(repr, found))}; separate columns by one of them, and put quotes around "
        "text that holds the other"
    )


def _space(line: bytes) -> str | None:
    """What numpy.savetxt puts between numbers unless told otherwise."""
    cells = line.decode().strip().split(" ")
    return " " if len(cells) > 1 and all(map(NUMBER.fullmatch, cells)) else None


def _cells(line: bytes, separator: str) -> list[str]:
    return next(csv.reader([line.decode()], delimiter=separator))


def _unnamed(header: list[str]) -> int:
    """Columns at the left that have no name in a header: pandas and R write an index so."""
    return next((k for k, name in enumerate(header) if name), 0)


def _table(content: bytes, separator: str, columns: int, text: bool = False) -> Any:
    """A pyarrow.Table of all lines, with the types that pyarrow finds, or with text alone; None of nothing."""
    if not content:
        return None
    pyarrow = import_pyarrow(".csv")
    from pyarrow import csv as arrow

    names = [str(k) for k in range(columns)]
    return arrow.read_csv(
        pyarrow.BufferReader(content),
        # A line must fit into a block.
        read_options=arrow.ReadOptions(column_names=names, block_size=max(1 << 20, 256 * columns)),
        parse_options=arrow.ParseOptions(delimiter=separator, ignore_empty_lines=False, newlines_in_values=text),
        convert_options=arrow.ConvertOptions(
            column_types=dict.fromkeys(names, pyarrow.string()) if text else None,
            null_values=[],  # else a missing value would be NaN without a word, and the label "NA" missing
            true_values=[],
            false_values=[],
        ),
    )


def _header_of_numbers(first: list[str], others: Any) -> tuple[bool, ...]:
    """The ways to read the first line of embeddings."""
    unnamed = _unnamed(first)
    named = [cell for cell in first[unnamed:] if not NUMBER.fullmatch(cell)]
    if any(not is_missing(cell) for cell in named) or (unnamed and not named):
        return (True,)
    if named:
        raise ValueError(f"its first line has cells without a number: {_shown(first)}")
    return (True, False) if _may_name_columns(np.array(first, dtype=float), others) else (False,)


def _may_name_columns(names: Array, others: Any) -> bool:
    """Whether they are like the names that pandas gives to columns, or years, or wavelengths, and unlike the rows."""
    types = import_pyarrow(".csv").types
    steps = np.diff(names)
    in_order = len(names) > 2 and bool((steps > 0).all() or (steps < 0).all())
    if in_order and (len(names) > 5 or bool(np.allclose(steps, steps[0], rtol=1e-6, atol=0))):
        return True  # of six components of an embedding, one in 360 are in order
    whole = bool(np.isfinite(names).all() and (names == np.rint(names)).all())
    whole_rows = others is not None and all(types.is_integer(kind) for kind in others.schema.types)
    return whole and len(np.unique(names)) == len(names) and (len(names) > 2 or not whole_rows)


def _header_of_labels(first: str, others: Any) -> tuple[tuple[bool, ...], bool]:
    """The ways to read the first line of labels, and whether the number of rows alone would say so."""
    if NUMBER.fullmatch(first):
        return (True, False), True
    rest = [] if others is None else others.column(0).to_pylist()
    if rest and not is_missing(first) and all(map(NUMBER.fullmatch, rest)):
        return (True,), False
    return ((False,), False) if first in rest else ((True, False), False)


def _readings(side: Csv | int) -> tuple[tuple[bool, ...], list[int]]:
    return ((False,), [side]) if isinstance(side, int) else (side.header, [side.rows(h) for h in side.header])


def _counted(header: tuple[bool, ...], rows: list[int]) -> str:
    if len(rows) == 1:
        return f"{rows[0]:,} rows{' below a header' if header[0] else ''}"
    return f"{max(rows):,} rows, or {min(rows):,} if the first line is a header"


def _unclear(file: Csv) -> str:
    return (
        f"it cannot be told whether the first line of {file.path} is a header or data: {_shown(file.first)}; give the "
        "columns names that are no numbers, such as c0 and label, or save both files as .npy"
    )


def _shown(cells: list[str]) -> str:
    return ", ".join(cells[:8]) + (" ..." if len(cells) > 8 else "")
