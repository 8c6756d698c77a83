"""Embeddings and labels in whatever people have them, as tensors: the one place for `opis`, `calibrate`,
`suggest_margins`, the metric and the files of the command line.

Rows belong together by their place: an index, such as pandas has, is not looked at.
"""

import datetime
import numbers
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tcm_fused.thresholds.terminal import printable

Array = NDArray[Any]

_TRUTH: Array = np.array(["False", "True"], dtype=object)


class Labels(NamedTuple):
    """Labels as integers, and where they were text or dates `names` [C], ascending, for which 0 ... C - 1 stand."""

    y: Tensor  # [N], an integer dtype
    names: Array | None


def as_embeddings(name: str, value: Any) -> Tensor:
    """A tensor of [N, D] numbers: of a tensor, an array, a data frame, or a list of numbers, arrays or tensors.

    Integers become float32, or float64 where they have 8 bytes; floats beyond float64 are rounded. Nothing else is
    copied, unless PyTorch cannot look at it where it is.

    Raises:
        TypeError: it is none of these, or holds something else than numbers.
        ValueError: the rows of a list differ in shape, or a number is missing.
    """
    if not isinstance(value, Tensor):
        value = _array(name, value, "a tensor, an array, a data frame or a list of numbers")
    if isinstance(value, Tensor):  # also where it was a list of tensors
        whole = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
        return value.to(torch.float64 if value.dtype.itemsize > 4 else torch.float32) if whole else value
    if value.dtype.kind == "O":
        value = _numbers(name, value)
    other = value.dtype.kind == "V" and np.can_cast(value.dtype, np.float32)  # bfloat16 and others of JAX
    if value.dtype.kind not in "fiu" and not other:
        raise TypeError(f"{name} must hold numbers, got {_kind(value)}")
    if value.dtype.type in (np.float16, np.float32, np.float64):
        return _tensor(value)
    return _tensor(value.astype(np.float64 if value.dtype.itemsize > 4 else np.float32))


def as_labels(name: str, value: Any) -> Labels:
    """Integer labels of a tensor, an array, a series (categories, too) or a list: integers, text or dates, one a row.

    Of text, dates and times each that differs is a class, in ascending order; truth values are text, too. Floats that
    are whole count as integers, since tables write integers so; a tensor must hold integers or truth values.

    Raises:
        TypeError: it is none of these, or mixes them.
        ValueError: a label is missing, or beyond int64.
    """
    if not isinstance(value, Tensor):
        value = _array(name, value, "a tensor, an array, a series or a list of integers or text")
    if isinstance(value, Tensor):
        return Labels(value.long(), _TRUTH) if value.dtype == torch.bool else Labels(value, None)
    if value.ndim == 2 and 1 in value.shape:  # a column
        value = value.reshape(-1)
    if value.ndim != 1:
        raise ValueError(f"{name} must be one integer or text for each row, got shape {list(value.shape)}")
    if value.dtype.kind == "O":
        return _objects(name, value)
    if value.dtype.kind in "US":
        return _named(value.tolist())
    if value.dtype.kind in "mM":
        _refuse_missing(name, np.isnat(value))
        return _named(
            np.datetime_as_string(value, "auto").tolist() if value.dtype.kind == "M" else value.astype(str).tolist()
        )
    if value.dtype.kind == "f":
        value = _whole(name, value)
    if value.dtype.kind == "b":
        return Labels(_tensor(value.astype(np.int64)), _TRUTH)
    if value.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integer or text labels, got {_kind(value)}")
    return Labels(_tensor(value), None)


def shown(name: str) -> str:
    """A class's name as a terminal may have it: on one line, without control characters, and not too long."""
    text = printable(name)
    return text if len(text) <= 80 else text[:77] + "..."


def _array(name: str, value: Any, wanted: str) -> Any:
    """A NumPy array, or a tensor of a list of tensors."""
    if isinstance(value, (list, tuple)):
        value = _from_list(name, value)
    elif not isinstance(value, np.ndarray):
        if not hasattr(value, "__array__"):
            raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}")
        value = np.asarray(value)
    if isinstance(value, np.ma.MaskedArray):
        missing = np.ma.getmaskarray(value)
        _refuse_missing(name, np.asarray(missing.any(axis=tuple(range(1, missing.ndim)))))
        value = np.asarray(value)
    if isinstance(value, np.ndarray) and value.dtype.kind == "T":  # NumPy's text of any length
        value = value.astype(object)
    return value


def _from_list(name: str, rows: Sequence[Any]) -> Any:
    """The tensor or array of a list; text stays as it is, and so do integers too long for NumPy's."""
    if any(isinstance(row, Tensor) for row in rows):
        _check_alike(name, rows, lambda row: _form(row) if isinstance(row, Tensor) else type(row).__name__)
        return torch.stack([row.detach() for row in rows])
    if all(isinstance(row, str | numbers.Number | None) or np.ndim(row) == 0 for row in rows):
        found = np.empty(len(rows), dtype=object)
        found[:] = rows
        return found
    _check_alike(name, rows, lambda row: list(np.shape(row)))
    return np.asarray(rows)


def _form(row: Tensor) -> str:
    return f"{list(row.shape)} on {row.device}"


def _check_alike(name: str, rows: Sequence[Any], shape: Callable[[Any], Any]) -> None:
    """All rows have one shape; NumPy and PyTorch would not say which has another."""
    for index, row in enumerate(rows):
        try:
            here, first = shape(row), shape(rows[0])
        except ValueError:
            raise ValueError(f"{name}: row {index} is ragged, its parts differ in length") from None
        if here != first:
            raise ValueError(f"{name}: all rows must have one shape, but row 0 has {first}, row {index} has {here}")


def _objects(name: str, value: Array) -> Labels:
    """Labels of Python objects."""
    items = value.tolist()
    _refuse_missing(name, np.array([_is_missing(item) for item in items], dtype=bool))
    kinds = [_label_kind(item) for item in items]
    for index, kind in enumerate(kinds):
        if kind != kinds[0] or kind not in _READERS:
            first, here = type(items[0]).__name__, type(items[index]).__name__
            other = f", row {index} is {here}" if index else ""
            raise TypeError(
                f"{name} must hold integer or text labels, all of one kind, but row 0 is {first}{other}; make text of "
                f"all of them: [str(label) for label in {name}]"
            )
    return _READERS[kinds[0]](name, items) if items else Labels(torch.empty(0, dtype=torch.int64), None)


def _label_kind(item: Any) -> str:
    if isinstance(item, (str, bytes)):
        return "text"
    if isinstance(item, (datetime.date, datetime.time, datetime.timedelta, np.datetime64, np.timedelta64)):
        return "date"
    if isinstance(item, (bool, np.bool_)):
        return "truth"
    if isinstance(item, numbers.Integral):
        return "integer"
    return "float" if isinstance(item, numbers.Real) else type(item).__name__


def _integers(name: str, items: list[Any]) -> Labels:
    try:
        return Labels(torch.from_numpy(np.fromiter((int(item) for item in items), np.int64, len(items))), None)
    except OverflowError:
        row = next(k for k, item in enumerate(items) if not -(2**63) <= int(item) < 2**63)
        raise ValueError(f"{name} must be from -2**63 to 2**63 - 1, but row {row} is {items[row]}") from None


_READERS: dict[str, Callable[[str, list[Any]], Labels]] = {
    "text": lambda name, items: _named(items),
    "date": lambda name, items: _named([str(item) for item in items]),
    "truth": lambda name, items: Labels(torch.tensor([int(item) for item in items]), _TRUTH),
    "integer": _integers,
    "float": lambda name, items: Labels(_tensor(_whole(name, np.array(items, dtype=np.float64))), None),
}


def _named(items: list[Any]) -> Labels:
    """Text, coded by its place among all that differ."""
    text = [item if isinstance(item, str) else item.decode(errors="backslashreplace") for item in items]
    names = sorted(set(text))
    code = {name: place for place, name in enumerate(names)}
    y = np.fromiter((code[name] for name in text), np.int64, len(text))
    return Labels(torch.from_numpy(y), np.array(names, dtype=object))


def _whole(name: str, value: Array) -> Array:
    """int64 of floats that each stand for one integer."""
    _refuse_missing(name, np.isnan(value))
    whole = (np.abs(value) < 2.0 ** (np.finfo(value.dtype).nmant + 1)) & (value == np.rint(value))
    if not whole.all():
        row = int(np.argmin(whole))
        raise TypeError(
            f"{name} must hold integer or text labels, got {value.dtype}; floats must be whole, finite and small "
            f"enough to be exact, but row {row} is {value[row]}"
        )
    return value.astype(np.int64)


def _is_missing(item: Any) -> bool:
    """None, NaN, and pandas' NA and NaT."""
    if item is None or type(item).__name__ in ("NAType", "NaTType"):
        return True
    return bool(item != item) if isinstance(item, (numbers.Real, np.datetime64, np.timedelta64)) else False


def _refuse_missing(name: str, missing: Array) -> None:
    if missing.any():
        raise ValueError(
            f"{name}: {int(missing.sum())} of {missing.size} rows are missing (None, NaN or masked), the first is row "
            f"{int(np.argmax(missing))}; drop these rows, or, of integer labels, put -1: such rows are not looked at"
        )


def _numbers(name: str, value: Array) -> Array:
    """float64 of Python objects; text is none, also where it could be read as a number."""
    try:
        if not any(isinstance(item, (str, bytes)) for item in value.flat):
            return value.astype(np.float64)
    except (TypeError, ValueError):
        pass
    for place, item in np.ndenumerate(value):
        if isinstance(item, (str, bytes)) or (not _is_missing(item) and not isinstance(item, numbers.Real)):
            raise TypeError(f"{name} must hold numbers, but {_place(place)} is {item!r}, a {type(item).__name__}")
    place = next(place for place, item in np.ndenumerate(value) if _is_missing(item))
    raise ValueError(f"{name} must be finite, but {_place(place)} is missing; drop such rows or fill them")


def _place(place: tuple[int, ...]) -> str:
    return ", ".join(f"{name} {index}" for name, index in zip(("row", "column", "layer"), place, strict=False))


def _kind(value: Array) -> str:
    return {"U": "text", "S": "text", "b": "truth values"}.get(value.dtype.kind, str(value.dtype))


def _tensor(value: Array) -> Tensor:
    """Over the array's own memory, be it read-only: nothing here writes into it."""
    value = value.astype(value.dtype.newbyteorder("="), copy=False)
    if any(step < 0 or step % value.itemsize for step in value.strides):  # which PyTorch does not know
        value = value.copy()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        return torch.from_numpy(value)
