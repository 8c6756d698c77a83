"""Embeddings and labels from files. The same data means the same in every kind of file, or is refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tcm_fused.thresholds import arrays, csv_files, tables
from tcm_fused.thresholds.csv_files import Csv
from tcm_fused.thresholds.sets import Array, as_labels

SUFFIXES = (".npy", ".npz", ".csv", ".parquet")


class Labelled(NamedTuple):
    """Embeddings [N, D] and labels [N] int64; `names` [C] are the classes' names where labels were text."""

    embeddings: Array
    labels: Array
    names: Array | None


def load(embeddings: Path, labels: Path | None) -> Labelled:
    """Both from their files, or from one .npz with the arrays "embeddings" and "labels". Nothing is unpickled.

    Embeddings of a .npy file are a map of it: they cannot be written to, and take no memory of their own.

    Raises:
        ValueError: a file is missing, cannot be read or holds something else; the message names it.
        ImportError: a .csv or .parquet file without pyarrow.
    """
    if labels is None and embeddings.suffix.lower() != ".npz":
        raise ValueError(f"{embeddings} needs a file of labels beside it; only .npz files hold both")
    labels = labels or embeddings
    x, y = _opened(embeddings, "embeddings"), _opened(labels, "labels")
    if isinstance(x, np.ndarray):
        _check_embeddings(embeddings, x)
    if isinstance(y, np.ndarray):
        y = _column(labels, y)
    headers = _settled(embeddings, x, labels, y)
    if isinstance(x, Csv):
        with _naming(embeddings, "embeddings"):
            x = csv_files.embeddings_of(x, headers[0])
    if isinstance(y, Csv):
        with _naming(labels, "labels"):
            y = csv_files.labels_of(y, headers[1])
    dtype = np.float64 if x.dtype.itemsize > 4 else np.float16 if x.dtype.type is np.float16 else np.float32
    return Labelled(x.astype(dtype, copy=False), *_classes(labels, y))


def load_embeddings(path: Path, rows: int | None) -> Array:
    """Embeddings [N, D] alone, of their file; `rows` if their number is known, as it must be of a .csv file.

    Raises:
        ValueError, ImportError: as `load`.
    """
    x = _opened(path, "embeddings")
    if isinstance(x, Csv):
        with _naming(path, "embeddings"):
            if rows is None:
                raise ValueError("without names of its rows nothing tells whether its first line is a header")
            x = csv_files.embeddings_of(x, csv_files.settle(x, rows)[0])
    _check_embeddings(path, x)
    return x


def load_column(path: Path, rows: int) -> Array:
    """Labels or groups [rows] of a file: integers, or text.

    Raises:
        ValueError, ImportError: as `load`; also where it has another number of rows.
    """
    y = _opened(path, "labels")
    if isinstance(y, Csv):
        with _naming(path, "labels"):
            y = csv_files.labels_of(y, csv_files.settle(rows, y)[1])
    y = _column(path, y)
    if len(y) != rows:
        raise ValueError(f"{path} has {len(y):,} rows, but there are {rows:,} embeddings")
    codes, names = _classes(path, y)
    return codes if names is None else names[codes]


def _opened(path: Path, name: str) -> Array | Csv:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path} must end in one of {', '.join(SUFFIXES)}")
    with _naming(path, name):
        if suffix == ".npy":
            return arrays.read_npy(path)
        if suffix == ".npz":
            return arrays.read_npz(path, name)
        if suffix == ".csv":
            return csv_files.open_embeddings(path) if name == "embeddings" else csv_files.open_labels(path)
        return tables.read_embeddings(path) if name == "embeddings" else tables.read_labels(path)


@contextmanager
def _naming(path: Path, name: str) -> Iterator[None]:
    """Errors say of which file they are."""
    try:
        yield
    except ImportError:
        raise
    except FileNotFoundError as error:
        raise ValueError(f"cannot read {name} from {path}: {error}") from error
    except Exception as error:  # a damaged file may raise anything: zlib.error, struct.error, MemoryError, ...
        if "pickle" in str(error) or "Python objects" in str(error):
            raise ValueError(f"{path} is no plain array but damaged or pickled; pickles are not read") from error
        raise ValueError(f"cannot read {name} from {path}: {error or type(error).__name__}") from error


def _check_embeddings(path: Path, x: Array) -> None:
    if x.dtype.kind not in "fiu":
        raise ValueError(f"{path} must hold numbers, got {x.dtype}")
    if x.size == 0:
        raise ValueError(f"cannot read embeddings from {path}: it is empty")
    if x.ndim != 2:
        raise ValueError(f"{path} must hold embeddings of shape [N, D], got {list(x.shape)}")


def _column(path: Path, y: Array) -> Array:
    """Labels [N], which may come as a column [N, 1]."""
    if y.size == 0:
        raise ValueError(f"cannot read labels from {path}: it is empty")
    if y.ndim == 2 and 1 in y.shape:
        y = y.reshape(-1)
    if y.ndim != 1:
        raise ValueError(f"{path} must hold labels of shape [N], got {list(y.shape)}")
    return y


def _settled(embeddings: Path, x: Array | Csv, labels: Path, y: Array | Csv) -> tuple[bool, bool]:
    """Whether the first lines of .csv files are headers; ValueError if rows and labels are not as many."""
    try:
        return csv_files.settle(*(side if isinstance(side, Csv) else len(side) for side in (x, y)))
    except ValueError as error:
        raise ValueError(f"{embeddings} and {labels}: {error}") from error


def _classes(path: Path, y: Array) -> tuple[Array, Array | None]:
    """Labels as `opis` takes them: integers, or text, truth values and dates as numbers from 0 on with their names."""
    missing = np.isnat(y) if y.dtype.kind == "M" else np.isnan(y) if y.dtype.kind == "f" else np.zeros(1, dtype=bool)
    if missing.any():
        raise ValueError(
            f"{path} has no label in row {int(missing.argmax()) + 1}; it must hold integer or text labels, and floats "
            "must be whole, finite and small enough to be exact"
        )
    try:
        found = as_labels(str(path), y)
    except TypeError as error:
        raise ValueError(str(error)) from error
    return found.y.numpy(), found.names
