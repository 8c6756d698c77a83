"""Embeddings and labels in whatever people have them: the same figures as of tensors, and errors in our words."""

import datetime
import enum
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tcm_fused import calibrate, opis, suggest_margins
from tcm_fused.thresholds.rates import Pairs
from tcm_fused.thresholds.sets import as_embeddings, as_labels

N, D, CLASSES = 120, 6, 10
_GENERATOR = torch.Generator().manual_seed(2)
Y = torch.randint(CLASSES, (N,), generator=_GENERATOR)
X = torch.randn(CLASSES, D, generator=_GENERATOR)[Y] + 0.4 * torch.randn(N, D, generator=_GENERATOR)
BIRDS = [f"bird {c}" for c in range(CLASSES)]  # in the order of the classes
TEXT = [BIRDS[y] for y in Y.tolist()]
CALLS: dict[str, Callable[..., Any]] = {
    "opis": lambda x, y: opis(x, y, far_range=(0.02, 0.3), num_thresholds=11),
    "calibrate": lambda x, y: calibrate(x, y, far=0.1),
    "suggest_margins": lambda x, y: suggest_margins(x, y, far=0.4, frr=0.6),
}
WANT = {name: call(X, Y).to_dict() for name, call in CALLS.items()}

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("one_thread")]

EMBEDDINGS: dict[str, Any] = {
    "array": X.numpy(),
    "list": X.tolist(),
    "tuples": tuple(map(tuple, X.tolist())),
    "list of arrays": list(X.numpy()),
    "list of tensors": list(X),
    "list of tensors with gradients": [row.requires_grad_() for row in X.clone()],
    "data frame": pd.DataFrame(X.numpy(), index=range(N, 0, -1)),
    "data frame of objects": pd.DataFrame(X.numpy()).astype(object),
    "nullable data frame": pd.DataFrame(X.double().numpy()).astype("Float64"),
    "Fortran order": np.asfortranarray(X.numpy()),
    "backwards": X.numpy()[::-1, ::-1].copy()[::-1, ::-1],
    "bytes of another machine": X.numpy().astype(">f4"),
    "long double": X.numpy().astype(np.longdouble),
    "within records": np.array(list(zip(X.tolist(), range(N), strict=True)), dtype=[("x", "f4", D), ("id", "u1")])["x"],
    "transposed tensor": X.T.contiguous().T,
}
LABELS: dict[str, Any] = {
    "list": Y.tolist(),
    "tuple": tuple(Y.tolist()),
    "list of tensors": list(Y),
    "list of NumPy's": list(Y.numpy()),
    "floats": Y.numpy().astype(np.float32),
    "list of floats": [float(y) for y in Y],
    "objects": Y.numpy().astype(object),
    "column": Y.numpy()[:, None],
    "series": pd.Series(Y.numpy(), index=range(N, 0, -1)),
    "column of a frame": pd.DataFrame({"label": Y.numpy()}),
    "nullable series": pd.Series(Y.numpy(), dtype="Int64"),
    "categories": pd.Series(Y.numpy()).astype("category"),
    "pyarrow": pa.array(Y.numpy()),
    "bytes of another machine": Y.numpy().astype(">i2"),
    "unsigned": Y.numpy().astype(np.uint16),
    "no mask": np.ma.masked_array(Y.numpy(), mask=False),
}
NAMED: dict[str, Any] = {
    "list": TEXT,
    "tuple": tuple(TEXT),
    "array": np.array(TEXT),
    "objects": np.array(TEXT, dtype=object),
    "any length": np.array(TEXT, dtype=np.dtypes.StringDType()),
    "bytes": np.array(TEXT, dtype="S"),
    "series": pd.Series(TEXT, index=range(N, 0, -1)),
    "series of objects": pd.Series(TEXT, dtype=object),
    "series with strings of pyarrow": pd.Series(TEXT, dtype="string[pyarrow]"),
    "categories": pd.Categorical(TEXT, categories=[*BIRDS[::-1], "never"]),
    "index": pd.Index(TEXT),
    "pyarrow": pa.chunked_array([TEXT[:50], TEXT[50:]]),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_embeddings(call: str, kind: str) -> None:
    """Python's numbers are float64, and so are some arrays: the figures are those of such a tensor."""
    dtype = as_embeddings("embeddings", EMBEDDINGS[kind]).dtype
    assert CALLS[call](EMBEDDINGS[kind], Y).to_dict() == CALLS[call](X.to(dtype), Y).to_dict()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", LABELS)
def test_integer_labels(call: str, kind: str) -> None:
    assert CALLS[call](X, LABELS[kind]).to_dict() == WANT[call]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", NAMED)
def test_text_labels(call: str, kind: str) -> None:
    """The same figures, with the classes' names beside."""
    found = CALLS[call](X.numpy(), NAMED[kind])
    names = found.to_dict().pop("class_names", None)
    assert {name: value for name, value in found.to_dict().items() if name != "class_names"} == WANT[call]
    if call != "suggest_margins":
        assert names == found.class_names.tolist() == BIRDS
        worst = found.worst(1)[0]
        assert worst.name == BIRDS[worst.class_id]
        assert f"class {worst.name} (" in repr(found)


def test_names_of_classes_that_are_left_out() -> None:
    """Names stay with their classes where some of one sample lie between."""
    found = opis(np.eye(5), ["d", "b", "a", "d", "b"], thresholds=[0.5, 1.0])
    assert found.class_names is not None
    assert (found.class_names.tolist(), found.class_ids.tolist(), found.left_out) == (["b", "d"], [1, 2], 1)
    assert sorted(str(worst.name) for worst in found.worst()) == ["b", "d"]


def test_dates_are_classes() -> None:
    days = np.datetime64("2024-02-27") + Y.numpy()
    want = [str(day) for day in np.unique(days)]
    for labels in (days, pd.Series(days), days.tolist(), pd.Series(days).dt.date, list(days)):
        found = opis(X, labels, far_range=(0.02, 0.3), num_thresholds=11)
        assert found.opis == WANT["opis"]["opis"]
        assert found.class_names is not None
        assert [name[:10] for name in found.class_names] == want
    assert opis(X, pd.Series(days).dt.tz_localize("UTC"), far_range=(0.02, 0.3), num_thresholds=11).left_out == 0


def test_truth_values_are_two_classes() -> None:
    """In a tensor, an array and a list alike."""
    truth = Y % 2 == 0
    want = opis(X, truth.long(), thresholds=[0.5, 1.0]).opis
    for labels in (truth, truth.numpy(), truth.tolist(), pd.Series(truth.numpy())):
        found = opis(X, labels, thresholds=[0.5, 1.0])
        assert found.opis == want
        assert found.class_names is not None
        assert found.class_names.tolist() == ["False", "True"]


def test_rows_with_a_negative_label_are_left_out() -> None:
    bad = X.clone()
    bad[::7] = torch.nan
    labels = [-1 if row % 7 == 0 else y for row, y in enumerate(Y.tolist())]
    keep = [row for row in range(N) if row % 7]
    assert opis(bad.tolist(), labels, thresholds=[0.5, 1.0]).opis == opis(X[keep], Y[keep], thresholds=[0.5, 1.0]).opis


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "uint8", "int32", "int64"])
def test_narrow_and_whole_numbers(dtype: str) -> None:
    """Quantised embeddings are what they stand for; bfloat16 of a tensor as of a list of tensors."""
    x = (40 * X).to(getattr(torch, dtype))
    wide = x.double() if dtype == "int64" else x.float()
    want = CALLS["opis"](wide, Y).opis
    forms: list[Any] = [x, list(x)] if dtype == "bfloat16" else [x, x.numpy(), list(x), pd.DataFrame(x.numpy())]
    for form in forms:
        assert CALLS["opis"](form, Y).opis == want


def test_read_only_arrays_are_not_copied(tmp_path: Path) -> None:
    """Of a memory map in float32 or float64 no page is touched before the work, and PyTorch does not warn."""
    np.save(tmp_path / "x.npy", X.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    frozen = X.numpy().copy()
    frozen.flags.writeable = False
    for array in (mapped, frozen, np.asfortranarray(frozen)):
        assert as_embeddings("embeddings", array).data_ptr() == array.ctypes.data
        assert CALLS["opis"](array, Y).opis == WANT["opis"]["opis"]
    labels = Y.numpy().copy()
    labels.flags.writeable = False
    assert as_labels("labels", labels).y.data_ptr() == labels.ctypes.data


class NothingOfItsSize(TorchDispatchMode):
    """An error where an operator makes a tensor as large as the embeddings."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        inputs = {value.untyped_storage().data_ptr() for value in tree_leaves(args) if isinstance(value, torch.Tensor)}
        for value in tree_leaves(made):
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in inputs:
                assert value.numel() < X.numel(), function
        return made


@pytest.mark.parametrize("form", [X, X.numpy(), X.double()], ids=["tensor", "array", "float64"])
def test_checks_take_no_memory_of_the_size_of_the_set(form: Any) -> None:
    with NothingOfItsSize():
        Pairs(form, Y, "auto", progress=False)


class Colour(enum.Enum):
    RED = 1


class NotAnArray:
    pass


MISSING = [None, float("nan"), np.nan, pd.NA, pd.NaT]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("missing", MISSING, ids=repr)
@pytest.mark.parametrize("of", ["text", "integers", "series", "text series"])
def test_missing_labels_are_named(call: str, missing: Any, of: str) -> None:
    """With their row, never a class of their own."""
    labels: Any = (TEXT if "text" in of else Y.tolist()).copy()
    labels[5] = labels[9] = missing
    if of == "integers":
        labels = np.array(labels, dtype=object)
    elif "series" in of:
        labels = pd.Series(labels, index=range(N, 0, -1))
    with pytest.raises(ValueError, match=r"labels: 2 of 120 rows are missing.*first is row 5"):
        CALLS[call](X, labels)


@pytest.mark.parametrize(
    ("labels", "row"),
    [
        (np.array([0.0, 1.0, np.nan, 0.0]), 2),
        (pd.Series([0, 1, None, 0]), 2),
        (pd.Series([0, 1, 0, None], dtype="Int64"), 3),
        (pd.Series(["a", None, "a", "b"]).astype("category"), 1),
        (np.array(["2024-01-01", "NaT", "2024-01-01", "2024-01-02"], dtype="M8[D]"), 1),
        (np.ma.masked_array([0, 1, 0, 1], mask=[False, False, False, True]), 3),
        (pa.array(["a", "b", None, "a"]), 2),
    ],
    ids=str,
)
def test_missing_labels_of_tables(labels: Any, row: int) -> None:
    with pytest.raises(ValueError, match=f"labels: 1 of 4 rows are missing.*first is row {row}"):
        opis(np.eye(4), labels)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (["a", "b", 1, "a"], TypeError, "all of one kind, but row 0 is str, row 2 is int"),
        ([True, False, 2, 0], TypeError, "all of one kind, but row 0 is bool, row 2 is int"),
        ([0, 1, "0", 1], TypeError, "all of one kind, but row 0 is int, row 2 is str"),
        ([0, 1, 0.5, 1], TypeError, "all of one kind, but row 0 is int, row 2 is float"),
        ([0.0, 1.0, 0.5, 1.0], TypeError, "floats must be whole.*row 2 is 0.5"),
        (np.array([0, np.inf, 0, 1]), TypeError, "floats must be whole.*row 1 is inf"),
        (np.array([0, 2.0**53, 0, 1]), TypeError, "small enough to be exact.*row 1"),
        ([Colour.RED] * 4, TypeError, r"row 0 is Colour.*\[str\(label\) for label in labels\]"),
        ([{}, {}, {}, {}], TypeError, "row 0 is dict"),
        ([0, 1, 2**63, 0], ValueError, "must be from -2\\*\\*63 to 2\\*\\*63 - 1, but row 2 is 9223372036854775808"),
        (np.array([0, 1, 2**63, 0], dtype=np.uint64), ValueError, "labels must be below 2"),
        (np.zeros(4, dtype=complex), TypeError, "must hold integer or text labels, got complex128"),
        (torch.zeros(4), TypeError, "labels must have an integer dtype"),
        (np.eye(4), ValueError, r"one integer or text for each row, got shape \[4, 4\]"),
        ([[1, 0], [0, 1], [1, 0], [0, 1]], ValueError, r"one integer or text for each row, got shape \[4, 2\]"),
        ([[1], [0, 1], [1], [0]], ValueError, "all rows must have one shape, but row 0 has"),
        (["a", "b"], ValueError, r"labels must have shape \[4\]"),
        ("abab", TypeError, "labels must be a tensor, an array, a series or a list of integers or text, got str"),
        (None, TypeError, "labels must be a tensor.*got NoneType"),
        ({0: 1}, TypeError, "labels must be a tensor.*got dict"),
        pytest.param(iter([0, 0, 1, 1]), TypeError, "labels must be a tensor.*got list_iterator", id="iterator"),
        (7, TypeError, "labels must be a tensor.*got int"),
        ([torch.tensor(0), torch.tensor([1, 2]), 1, 1], ValueError, "but row 0 has .*, row 1 has"),
    ],
    ids=str,
)
@pytest.mark.parametrize("call", CALLS)
def test_bad_labels(call: str, labels: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CALLS[call](torch.eye(4), labels)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([[1.0, 0.0], [1.0], [0.0, 1.0], [1.0, 1.0]], ValueError, r"row 0 has \[2\], row 1 has \[1\]"),
        ([[1.0], [[1.0], [2.0, 3.0]], [0.0], [1.0]], ValueError, "row 1 is ragged"),
        ([torch.ones(2), torch.ones(3)], ValueError, r"row 0 has \[2\] on cpu, row 1 has \[3\]"),
        ([torch.ones(2), [1.0, 2.0]], ValueError, "row 0 has .*, row 1 has list"),
        ([np.ones(2), np.ones(3)], ValueError, r"row 0 has \[2\], row 1 has \[3\]"),
        ([["a", "b"]] * 4, TypeError, "embeddings must hold numbers, got text"),
        (["a", "b", "c", "d"], TypeError, "must hold numbers, but row 0 is 'a', a str"),
        (pd.DataFrame({"x": [1.0] * 4, "name": list("abcd")}), TypeError, "row 0, column 1 is 'a', a str"),
        (pd.DataFrame({"x": [1.0] * 4, "n": ["1"] * 4}), TypeError, "row 0, column 1 is '1', a str"),
        (pd.DataFrame({"x": [1, 2, None, 3]}, dtype="Int64"), ValueError, "embeddings must be finite, but .*row 2"),
        (np.array([[1, None]] * 4, dtype=object), ValueError, "embeddings must be finite"),
        (np.ma.masked_array(np.eye(4), mask=np.eye(4, dtype=bool)), ValueError, "embeddings: 4 of 4 rows are missing"),
        (np.eye(4, dtype=bool), TypeError, "embeddings must hold numbers, got truth values"),
        (torch.eye(4).bool(), TypeError, "embeddings must be float16.*got torch.bool"),
        (np.eye(4, dtype=complex), TypeError, "embeddings must hold numbers, got complex128"),
        (np.zeros(4, dtype=[("a", "f4")]), TypeError, "embeddings must hold numbers, got"),
        ([1.0, 2.0, 3.0, 4.0], ValueError, r"embeddings must have shape \[N, D\].*got \[4\]"),
        ([], ValueError, r"embeddings must have shape \[N, D\]"),
        (np.ones(()), ValueError, r"embeddings must have shape \[N, D\]"),
        (None, TypeError, "embeddings must be a tensor, an array, a data frame or a list of numbers, got NoneType"),
        ("x.npy", TypeError, "embeddings must be a tensor.*got str"),
        ({"x": [1.0]}, TypeError, "embeddings must be a tensor.*got dict"),
        pytest.param(NotAnArray(), TypeError, "embeddings must be a tensor.*got NotAnArray", id="NotAnArray"),
    ],
    ids=lambda value: str(value)[:40].replace("\n", " "),
)
@pytest.mark.parametrize("call", CALLS)
def test_bad_embeddings(call: str, x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CALLS[call](x, [0, 0, 1, 1])


def test_no_warning_of_pytorch_is_lost_to_others() -> None:
    """Only the one about arrays that are read-only is held back, and only while one is looked at."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        as_embeddings("embeddings", np.eye(3))
        warnings.warn("of somebody else", stacklevel=1)
    assert [str(item.message) for item in caught] == ["of somebody else"]


def test_times_as_labels() -> None:
    hours = [datetime.timedelta(hours=y) for y in Y.tolist()]
    assert opis(X, hours, far_range=(0.02, 0.3), num_thresholds=11).opis >= 0
    assert opis(X, np.array(hours, dtype="m8[h]"), far_range=(0.02, 0.3), num_thresholds=11).left_out == 0
