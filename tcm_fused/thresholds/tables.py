"""Columns of tables as embeddings and labels, and tables of .parquet files.

A column that may be an index, an identifier or the labels would be a feature like any other, and change the result
without a word. So what does not fit to the others is refused, with what would make it clear.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from tcm_fused.thresholds.arrays import check_memory
from tcm_fused.thresholds.sets import Array

NUMBER = re.compile(r"\s*[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|nan|inf|infinity)\s*", re.IGNORECASE | re.ASCII)
_DECIMAL_COMMA = re.compile(r"\s*[+-]?\d+,\d+\s*")
_MISSING = {"", "na", "n/a", "nan", "null", "none", "<na>", "#n/a"}
_NO_FEATURE = {"class", "class_id", "id", "index", "label", "labels", "target", "unnamed: 0"}


def import_pyarrow(kind: str) -> Any:
    """The module. ImportError, with what to install, if it is not there."""
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError(f"{kind} files need pyarrow: pip install pyarrow") from error
    return pyarrow


def is_missing(cell: str) -> bool:
    """Whether a cell is empty or holds a word that programs write where there is no value."""
    return cell.strip().casefold() in _MISSING


def read_embeddings(path: Path) -> Array:
    """[N, D] of a .parquet file: a column of lists, or columns of numbers side by side; a pandas index is left out."""
    names, columns = _read(path)
    if len(columns) == 1 and _is_list(columns[0].type):
        return _matrix(columns[0])
    for name, column in zip(names, columns, strict=True):
        if _is_list(column.type):
            raise ValueError(f"the column {name!r} of lists stands beside {len(columns) - 1} more; keep it alone")
    return as_numbers(columns, names)


def read_labels(path: Path) -> Array:
    """[N] of a .parquet file with one column beside a pandas index: numbers, text, categories or dates."""
    pyarrow = import_pyarrow(".parquet")
    names, columns = _read(path)
    if len(columns) != 1:
        raise ValueError(f"labels must be one column, got {len(columns)}: {_listed(names)}")
    column, types = columns[0], pyarrow.types
    _refuse_nulls(names[0], column)
    if types.is_string(column.type) or types.is_large_string(column.type) or types.is_string_view(column.type):
        return np.array(column.to_pylist(), dtype=str)
    found: Array = column.to_numpy()
    return found


def as_numbers(columns: list[Any], names: list[str] | None) -> Array:
    """[N, D] of columns (pyarrow.ChunkedArray); their `names` if they are known.

    Raises:
        ValueError: a value is missing or no number, or a column seems to be no feature; the message names it.
    """
    arrays = [numbers(column, _name(names, k)) for k, column in enumerate(columns)]
    _refuse_no_features(arrays, names)
    found = np.empty((len(arrays[0]), len(arrays)), np.result_type(*(a.dtype for a in arrays)))
    for k, column in enumerate(arrays):
        found[:, k] = column
    return found


def _name(names: list[str] | None, k: int) -> str:
    return f"column {k + 1}" if names is None else f"the column {names[k]!r}"


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:8])) + (" ..." if len(names) > 8 else "")


def numbers(column: Any, name: str) -> Array:
    """A column of integers or floats."""
    types = import_pyarrow("table").types
    _refuse_nulls(name, column)
    if types.is_integer(column.type) or types.is_floating(column.type):
        found: Array = column.to_numpy()
        return found
    for row, cell in enumerate(map(str, column.to_pylist()), start=1):
        if is_missing(cell):
            raise ValueError(f"{name} has no value in row {row} but {cell!r}")
        if _DECIMAL_COMMA.fullmatch(cell):
            raise ValueError(f"{name} has a decimal comma, {cell} in row {row}; write numbers with decimal points")
        if not NUMBER.fullmatch(cell) or not types.is_string(column.type):
            break
    raise ValueError(f"{name} must hold numbers, got {cell!r} in row {row}; keep columns of embeddings alone")


def _refuse_nulls(name: str, column: Any) -> None:
    if column.null_count:
        row = column.is_null().to_pylist().index(True) + 1
        raise ValueError(f"{name} has no value in row {row} ({column.null_count:,} are missing in all)")


def _refuse_no_features(columns: list[Array], names: list[str] | None) -> None:
    """ValueError if a column may be an index, an identifier or labels."""
    if len(columns) < 2:
        return
    for name in names or ():
        if name.strip().casefold() in _NO_FEATURE:
            raise ValueError(f"the column {name!r} is among the columns of embeddings; keep those alone")
    whole = [column.dtype.kind in "iu" for column in columns]
    for k, column in enumerate(columns):
        if whole[k] and not all(whole) and column.any():  # zeros are a feature that changes nothing
            raise ValueError(
                f"{_name(names, k)} holds whole numbers, others do not: it may be an index, an identifier or labels; "
                "leave it out (pandas: to_csv(index=False)), or, if it is a feature, write it like the others (1.0)"
            )
    if may_be_index(columns):
        raise ValueError(
            f"{_name(names, 0)} may be an index that numbers the rows, or a feature; leave it out (pandas: "
            "to_csv(index=False)), or save features that count up with numpy.save"
        )


def may_be_index(columns: list[Array]) -> bool:
    """Whether the first column counts up, or alone has another value in each row."""
    first, *others = columns
    if len(first) < 3:
        return False
    steps = np.diff(first.astype(np.float64))
    if first.dtype.kind == "f":
        return len(steps) > 2 and bool(steps[0] != 0 and (steps == steps[0]).all())
    alone = len(np.unique(first)) == len(first) and all(len(np.unique(c)) < len(c) for c in others)
    return alone or bool((steps == 1).mean() > 0.5)


def _read(path: Path) -> tuple[list[str], list[Any]]:
    """Names and columns of a file, without those that pandas knows to be its index; categories as their values."""
    pyarrow = import_pyarrow(".parquet")
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        about = file.metadata
        groups = [about.row_group(k) for k in range(about.num_row_groups)]
        values = sum(group.column(k).num_values for group in groups for k in range(group.num_columns))
        check_memory(8 * values, path.stat().st_size)
        table = file.read()
    index = [name for name in (table.schema.pandas_metadata or {}).get("index_columns", []) if isinstance(name, str)]
    columns = {k: table.column(k) for k, name in enumerate(table.column_names) if name not in index}
    if not columns:
        raise ValueError("it has no column beside its index")
    for k, column in columns.items():
        if pyarrow.types.is_dictionary(column.type):
            columns[k] = column.cast(column.type.value_type)
        elif isinstance(column.type, pyarrow.BaseExtensionType):
            columns[k] = column.cast(column.type.storage_type)
    return [table.column_names[k] for k in columns], list(columns.values())


def _is_list(kind: Any) -> bool:
    types = import_pyarrow(".parquet").types
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _matrix(column: Any) -> Array:
    """[N, D] of a column of lists of one length, or [N, ...] of lists of lists."""
    _refuse_nulls("the column of lists", column)
    if len(column) == 0:
        return np.empty(0)
    lengths = column.combine_chunks().value_lengths().unique().to_pylist()
    if len(lengths) > 1:
        raise ValueError(f"its lists must be of one length, but have from {min(lengths)} to {max(lengths)} numbers")
    flat = import_pyarrow(".parquet").chunked_array([chunk.flatten() for chunk in column.chunks])
    inner = _matrix(flat) if _is_list(flat.type) else numbers(flat, "the column of lists")
    return inner.reshape(len(column), lengths.pop(), *inner.shape[1:])
