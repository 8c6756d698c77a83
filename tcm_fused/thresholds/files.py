"""Embeddings and labels from files, and files that are whole or not there at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tcm_fused.thresholds.rates import Array

SUFFIXES = (".npy", ".npz", ".csv", ".parquet")


class Labelled(NamedTuple):
    """Embeddings [N, D] and labels [N] int64; `names` [C] are the classes' names where labels were text."""

    embeddings: Array
    labels: Array
    names: Array | None


def load(embeddings: Path, labels: Path | None) -> Labelled:
    """Both from their files, or from one .npz with the arrays "embeddings" and "labels". Nothing is unpickled.

    Raises:
        ValueError: a file is missing, cannot be read or holds something else; the message names it.
        ImportError: a .parquet file without pyarrow.
    """
    if labels is None and embeddings.suffix.lower() != ".npz":
        raise ValueError(f"{embeddings} needs a file of labels beside it; only .npz files hold both")
    x = _read(embeddings, "embeddings")
    if x.dtype.kind not in "fiu":
        raise ValueError(f"{embeddings} must hold numbers, got {x.dtype}")
    y = _read(labels or embeddings, "labels", rows=len(x))
    if y.ndim == 2 and 1 in y.shape:
        y = y.reshape(-1)
    names = None
    if y.dtype.kind in "US":
        names, y = np.unique(y, return_inverse=True)
    elif y.dtype.kind == "f":
        whole = (np.abs(y) < 2.0 ** (np.finfo(y.dtype).nmant + 1)) & (y == np.rint(y))  # each stands for one integer
        y = y.astype(np.int64) if whole.all() else y
    if y.dtype.kind not in "iu":
        what = "; floats must be whole, finite and small enough to be exact" if y.dtype.kind == "f" else ""
        raise ValueError(f"{labels or embeddings} must hold integer or text labels, got {y.dtype}{what}")
    dtype = np.float64 if x.dtype.itemsize > 4 else np.float16 if x.dtype == np.float16 else np.float32
    return Labelled(x.astype(dtype, copy=False), y, names)


def _read(path: Path, name: str, rows: int | None = None) -> Array:
    """One array, of labels if the `rows` that it should have are given: they tell a header line from a label."""
    readers: dict[str, Callable[[], Array]] = {
        ".npy": lambda: np.load(path, allow_pickle=False),
        ".npz": lambda: _read_npz(path, name),
        ".csv": lambda: _read_csv(path) if rows is None else _read_csv_labels(path, rows),
        ".parquet": lambda: _read_parquet(path),
    }
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise ValueError(f"{path} must end in one of {', '.join(SUFFIXES)}")
    try:
        array = readers[suffix]()
    except ImportError:
        raise
    except Exception as error:  # a damaged file may raise anything: zlib.error, struct.error, MemoryError, ...
        if "pickle" in str(error):
            raise ValueError(f"{path} is no plain array but damaged or pickled; pickles are not read") from error
        raise ValueError(f"cannot read {name} from {path}: {error}") from error
    if not isinstance(array, np.ndarray):  # an .npz by another name
        raise ValueError(f"cannot read {name} from {path}: it is not a single array")
    if array.size == 0:
        raise ValueError(f"cannot read {name} from {path}: it is empty")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _read_npz(path: Path, name: str) -> Array:
    with np.load(path, allow_pickle=False) as arrays:
        if name not in arrays:
            raise ValueError(f"it has no array '{name}', only {', '.join(arrays.files) or 'none'}")
        return arrays[name]


def _read_csv(path: Path) -> Array:
    """Comma-separated numbers, a row a line, with or without a header."""
    with path.open(encoding="utf-8-sig") as lines:  # with or without a byte order mark
        header = not all(_is_number(cell) for cell in lines.readline().strip().split(","))
    return np.loadtxt(path, delimiter=",", skiprows=int(header), ndmin=2, comments=None, encoding="utf-8-sig")


def _read_csv_labels(path: Path, rows: int) -> Array:
    """Labels, one a line, with or without a header: int64 or float64 if they are numbers, text otherwise."""
    text = np.loadtxt(path, delimiter=",", ndmin=2, dtype=str, comments=None, encoding="utf-8-sig")
    if len(text) == rows + 1 and not _is_number(text[0, 0]):
        text = text[1:]
    for dtype in (np.int64, np.float64):  # not by way of floats, which hold no integer of 17 digits
        try:
            return text.astype(dtype)
        except (ValueError, OverflowError):
            pass
    return text


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _read_parquet(path: Path) -> Array:
    """A column of lists, or columns of numbers, side by side; one column of labels. A pandas index is left out."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("parquet files need pyarrow: pip install pyarrow") from error
    try:
        table = parquet.read_table(path)
        index = (table.schema.pandas_metadata or {}).get("index_columns", [])
        table = table.drop_columns([name for name in index if name in table.column_names])
        columns = [column.combine_chunks().to_numpy(zero_copy_only=False) for column in table.columns]
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from error
    if table.num_rows == 0:
        return np.empty(0)
    if len(columns) == 1:
        column = columns[0]
        if column.dtype != object:
            return column
        return np.array(column.tolist()) if isinstance(column[0], str) else np.stack(list(column))
    return np.stack(columns, axis=1)


def write_whole(path: Path, save: Callable[[Path], Any]) -> None:
    """Let `save` write a file beside `path`, and give it that name when it is whole; nothing remains of a failure."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
