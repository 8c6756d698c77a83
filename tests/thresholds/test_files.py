"""The same data through every kind of file: the same result, or a refusal that says why; never another result."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow
import pytest
from pyarrow import parquet
from support.set_in_files import (
    FRAME,
    NAMED,
    NPY_X,
    NPY_Y,
    RNG,
    TEXT,
    TEXT_WITHOUT_COMMAS,
    D,
    N,
    Write,
    X,
    Y,
    lines,
    read,
    rows,
    text,
    to_npy,
)

# Embeddings: each reads as X, whether the labels are an array or a list without a header.
GOOD_X: dict[str, tuple[str, Write]] = {
    "npy": NPY_X,
    "npy, Fortran order": ("x.npy", to_npy(np.asfortranarray(X))),
    "npy, big-endian": ("x.npy", to_npy(X.astype(">f8"))),
    "npz": ("x.npz", lambda path: np.savez(path, embeddings=X)),
    "npz, packed": ("x.npz", lambda path: np.savez_compressed(path, embeddings=X, other=Y)),
    "pandas, index": ("x.csv", FRAME.to_csv),
    "pandas, index and names": ("x.csv", NAMED.to_csv),
    "pandas, index from 1": ("x.csv", FRAME.set_index(pandas.RangeIndex(1, N + 1)).to_csv),
    "pandas, shuffled index": ("x.csv", FRAME.set_index(RNG.permutation(N)).to_csv),
    "pandas, text as index": ("x.csv", NAMED.set_index(np.array([f"{k}.jpg" for k in range(N)])).to_csv),
    "pandas, two levels": ("x.csv", NAMED.set_index([np.arange(N) // 2, np.arange(N) % 2]).to_csv),
    "pandas, names": ("x.csv", lambda path: NAMED.to_csv(path, index=False)),
    "pandas, twice a name": ("x.csv", lambda path: NAMED.set_axis(["c"] * D, axis=1).to_csv(path, index=False)),
    "pandas, neither": ("x.csv", lambda path: FRAME.to_csv(path, index=False, header=False)),
    "pandas, all quoted": ("x.csv", lambda path: NAMED.to_csv(path, quoting=1)),
    "pandas, semicolons": ("x.csv", lambda path: NAMED.to_csv(path, sep=";")),
    "pandas, tabs": ("x.csv", lambda path: NAMED.to_csv(path, sep="\t", index=False)),
    "numpy, blanks": ("x.csv", lambda path: np.savetxt(path, X)),
    "numpy, commas": ("x.csv", lambda path: np.savetxt(path, X, delimiter=",")),
    "numpy, header": (
        "x.csv", lambda path: np.savetxt(path, X, delimiter=",", comments="", header="a,b,c,d,e,f,g,h")
    ),
    "R": (
        "x.csv",
        text('"",' + ",".join(f'"V{k + 1}"' for k in range(D)) + "\n"
             + "".join(f'"{k + 1}",{line}' for k, line in enumerate(rows().splitlines(keepends=True)))),
    ),
    "byte order mark": ("x.csv", text(rows(), "utf-8-sig")),
    "UTF-16": ("x.csv", text(rows(), "utf-16")),
    "UTF-32": ("x.csv", text(rows(), "utf-32")),
    "Windows": ("x.csv", text(rows().replace("\n", "\r\n"))),
    "old Macintosh": ("x.csv", text(rows().replace("\n", "\r"))),
    "blanks after commas": ("x.csv", text(rows().replace(",", ", "))),
    "blank lines at the end": ("x.csv", text(rows() + "\r\n\n\n")),
    "no line break at the end": ("x.csv", text(rows().rstrip())),
    "names that are not English": ("x.csv", text(",".join("äöüßéèêë") + "\n" + rows())),
    "parquet of pandas": ("x.parquet", NAMED.to_parquet),
    "parquet, numbers as names": ("x.parquet", FRAME.set_axis([str(k) for k in range(D)], axis=1).to_parquet),
    "parquet, index with a name": ("x.parquet", NAMED.rename_axis("id").to_parquet),
    "parquet, shuffled index": ("x.parquet", NAMED.set_index(RNG.permutation(N)).rename_axis("id").to_parquet),
    "parquet, lists": ("x.parquet", lambda path: parquet.write_table(pyarrow.table({"e": list(X)}), path)),
    "parquet, lists of fixed size": (
        "x.parquet",
        lambda path: parquet.write_table(
            pyarrow.table({"e": pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(X.ravel()), D)}), path
        ),
    ),
    "parquet, tensors": (
        "x.parquet",
        lambda path: parquet.write_table(
            pyarrow.table({"e": pyarrow.FixedShapeTensorArray.from_numpy_ndarray(X)}), path
        ),
    ),
    "parquet, lists beside an index": (
        "x.parquet", lambda path: pandas.DataFrame({"e": list(X)}, index=Y).rename_axis("id").to_parquet(path)
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", GOOD_X)
def test_embeddings_of_every_kind(tmp_path: Path, kind: str) -> None:
    for y in (NPY_Y, ("y.csv", text(lines(Y)))):
        assert np.array_equal(read(tmp_path, GOOD_X[kind], y).embeddings, X)


# Labels: each reads as Y beside an array, and beside embeddings with and without a header.
GOOD_Y: dict[str, tuple[str, Write]] = {
    "npy": NPY_Y,
    "npy, a column": ("y.npy", to_npy(Y[:, None])),
    "npy, a row": ("y.npy", to_npy(Y[None])),
    "npy, big-endian": ("y.npy", to_npy(Y.astype(">i4"))),
    "npy, uint64": ("y.npy", to_npy(Y.astype(np.uint64))),
    "npy, floats": ("y.npy", to_npy(Y.astype(np.float32))),
    "npz": ("y.npz", lambda path: np.savez(path, labels=Y)),
    "pandas, index and name": ("y.csv", pandas.Series(Y, name="y").to_csv),
    "pandas, index": ("y.csv", pandas.Series(Y).to_csv),
    "pandas, name": ("y.csv", lambda path: pandas.Series(Y, name="label").to_csv(path, index=False)),
    "pandas, neither": ("y.csv", lambda path: pandas.Series(Y).to_csv(path, index=False, header=False)),
    "pandas, floats": ("y.csv", lambda path: pandas.Series(Y * 1.0, name="y").to_csv(path)),
    "numpy": ("y.csv", lambda path: np.savetxt(path, Y)),
    "numpy, integers": ("y.csv", lambda path: np.savetxt(path, Y, fmt="%d")),
    "numpy, as wide": ("y.csv", lambda path: np.savetxt(path, Y, fmt="%3d")),
    "R": ("y.csv", text('"","y"\n' + "".join(f'"{k + 1}",{c}\n' for k, c in enumerate(Y)))),
    "quoted": ("y.csv", text('"y"\n' + "".join(f'"{c}"\n' for c in Y))),
    "byte order mark": ("y.csv", text(lines(Y), "utf-8-sig")),
    "UTF-16, header": ("y.csv", text("Größe\n" + lines(Y), "utf-16")),
    "Windows": ("y.csv", text(lines(Y).replace("\n", "\r\n"))),
    "blank lines at the end": ("y.csv", text(lines(Y) + "\n\n")),
    "tabs": ("y.csv", lambda path: pandas.Series(Y, name="y").to_csv(path, sep="\t")),
    "parquet": ("y.parquet", lambda path: pandas.DataFrame({"y": Y}).to_parquet(path)),
    "parquet, index": ("y.parquet", lambda path: pandas.DataFrame({"y": Y}, index=X[:, 0]).to_parquet(path)),
    "parquet, categories of integers": (
        "y.parquet", lambda path: pandas.DataFrame({"y": pandas.Categorical(Y)}).to_parquet(path)
    ),
    "parquet, dictionary": (
        "y.parquet",
        lambda path: parquet.write_table(pyarrow.table({"y": pyarrow.array(Y).dictionary_encode()}), path),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", GOOD_Y)
def test_labels_of_every_kind(tmp_path: Path, kind: str) -> None:
    for x in (NPY_X, GOOD_X["pandas, neither"], GOOD_X["pandas, names"], GOOD_X["pandas, index"]):
        found = read(tmp_path, x, GOOD_Y[kind])
        assert np.array_equal(found.embeddings, X)
        assert np.array_equal(found.labels, Y)
        assert found.names is None


NAMES: dict[str, list[str]] = {
    "commas and quotes": sorted(set(TEXT)),
    "like what is missing": ["NA", "null", "None", "nan", "N/A", "cat", "dog"],
    "zeros in front": ["007", "07", "7", "0", "00", "1", "2"],
    "exponents": ["1e5", "100000", "1E5", "2", "3", "4", "5"],
    "truth values": ["True", "False", "true", "false", "TRUE", "yes", "no"],
    "dates": ["2020-01-01", "2020-01-02", "01/02/2020", "12:30", "2020", "2021-01", "x"],
    "blanks": ["a", " a", "a ", "b", " ", "c d", "c  d"],
    "integers beyond 64 bits": [f"{10**20 + c}" for c in range(7)],
    "line breaks": ["a\nb", "a", "b", "a\r\nb", "c", "d", "e"],
    "separators": ["a;b", "a", "b", "a\tb", "c", "d,e", "e"],
    "versions": ["1.10", "1.1", "1.2", "1.20", "2", "2.0", "3"],
    "signs": ["+1", "1", "-0", "0", "2", "3", "4"],
    "digits of other scripts": ["\u0661", "1", "\uff12", "2", "\u4e09", "3", "\u00e9"],
    "hashes": ["#1", "#2", "a", "b", "c", "d", "e"],
    "escapes": ["\x1b[31m", "\\n", "\\x1b", "b", "c", "d", "e"],
}


@pytest.mark.parametrize("kind", NAMES)
def test_text_stays_as_it_is(tmp_path: Path, kind: str) -> None:
    """Text of each kind, through each file: the same classes with the same names."""
    names = NAMES[kind]
    order = np.array([names.index(n) for n in sorted(names)])
    expected = np.argsort(order)[Y]
    series = pandas.Series([names[c] for c in Y], name="label")
    frame = series.to_frame()
    ways: dict[str, Write] = {
        "y.npy": to_npy(series.to_numpy(dtype=str)),
        "y.parquet": frame.to_parquet,
        "categories.parquet": frame.astype("category").to_parquet,
        "large.parquet": lambda p: parquet.write_table(pyarrow.table({"y": pyarrow.array(series, "large_string")}), p),
        "y.csv": frame.to_csv,
        "alone.csv": lambda path: frame.to_csv(path, index=False),
        "tabs.csv": lambda path: frame.to_csv(path, sep="\t"),
    }
    for name, write in ways.items():
        found = read(tmp_path, NPY_X, (name, write))
        assert found.names is not None, name
        assert found.names.tolist() == sorted(names), name
        assert np.array_equal(found.labels, expected), name


def test_dates_and_truth_values(tmp_path: Path) -> None:
    """As text in a .csv file, as types of their own in the others: the same classes."""
    for values in (np.datetime64("2020-01-01") + Y, Y > 3):
        series = pandas.Series(values, name="y")
        for name, write in {
            "y.npy": to_npy(values),
            "y.csv": series.to_csv,
            "y.parquet": series.to_frame().to_parquet,
        }.items():
            found = read(tmp_path, NPY_X, (name, write))
            assert np.array_equal(found.labels, np.unique(values, return_inverse=True)[1])
            assert found.names is not None and [n[:10] for n in found.names] == [str(v) for v in np.unique(values)]


def test_long_integers(tmp_path: Path) -> None:
    """Not by way of floats, which hold no integer of 17 digits."""
    for offset in (12345678901234560, 2**63 - 10, -(2**63), 2**63 + 5):
        ids = [offset + int(c) for c in Y]
        dtype = np.uint64 if offset >= 2**63 else np.int64
        for name, write in {
            "y.npy": to_npy(np.array(ids, dtype=dtype)),
            "y.csv": text("id\n" + lines(ids)),
            "y.parquet": lambda p, ids=ids: parquet.write_table(pyarrow.table({"y": ids}), p),  # type: ignore[misc]
        }.items():
            if name == "y.parquet" and offset >= 2**63:
                continue  # pyarrow takes such for int64 unless told
            assert read(tmp_path, NPY_X, (name, write)).labels.tolist() == ids


# A first line that is a header or data.


@pytest.mark.parametrize(
    "columns",
    [
        range(D),
        range(1, D + 1),
        range(2010, 2010 + D),
        [0.5 * k for k in range(D)],
        [400.13, 402.5, 404.9, 411.2, 417.0, 420.75, 423.1, 430.6],
        [4000 - 1.93 * k for k in range(D)],
        [7, 3, 100, 2, 9, 1, 5, 4],
        ["", *range(1, D)],
        [f"{k}.0" for k in range(D)],
    ],
)
@pytest.mark.parametrize("whole", [False, True])
def test_a_header_of_numbers(tmp_path: Path, columns: Any, whole: bool) -> None:
    """`to_csv(index=False)` of a frame without names: told by the number of rows, or refused; never an embedding."""
    x = RNG.integers(-3, 200, (N, D)).astype(np.uint8 if whole else np.float64) if whole else X
    frame = pandas.DataFrame(x, columns=list(columns))
    csv = ("x.csv", lambda path: frame.to_csv(path, index=False))
    for y in (NPY_Y, GOOD_Y["pandas, name"], GOOD_Y["pandas, index"], ("y.csv", text("0\n" + lines(Y))),
              ("y.csv", text(lines(Y))), ("y.csv", text("species\n" + lines(TEXT_WITHOUT_COMMAS)))):  # fmt: skip
        try:
            found = read(tmp_path, csv, y)
        except ValueError as error:
            assert "cannot be told" in str(error) or "labels must have shape" in str(error) or "may be" in str(error)
        else:
            assert np.array_equal(found.embeddings, x.astype(found.embeddings.dtype))
            assert np.array_equal(found.labels, Y)
    if not whole and "" not in columns:
        assert np.array_equal(read(tmp_path, csv, NPY_Y).embeddings, x)


def test_rows_and_labels_that_are_not_as_many(tmp_path: Path) -> None:
    """A row or a label too many is no header, nor is one too few a reason to see one."""
    for x in (X, X[:-1], X[1:]):
        for y in (Y, Y[:-1], Y[1:]):
            if len(x) == len(y):
                continue
            for y_file in (("y.npy", to_npy(y)), ("y.csv", text(lines(y))), ("y.csv", text("y\n" + lines(y)))):
                for x_file in (("x.npy", to_npy(x)), ("x.csv", text(rows(x))), ("x.csv", pandas.DataFrame(x).to_csv)):
                    with pytest.raises(ValueError, match=r"labels must have shape|cannot be told"):
                        read(tmp_path, x_file, y_file)


def test_a_first_line_that_looks_like_a_header(tmp_path: Path) -> None:
    """Data of whole numbers that ascend: the number of rows says that it is no header."""
    x = X.copy()
    x[0] = range(D)
    content = rows(x).replace(rows(x[:1]), ",".join(map(str, range(D))) + "\n")
    assert np.array_equal(read(tmp_path, ("x.csv", text(content)), NPY_Y).embeddings, x)
    with pytest.raises(ValueError, match=r"cannot be told whether the first line of .*x\.csv.* 0, 1, 2"):
        read(tmp_path, ("x.csv", text(content)), ("y.csv", text(lines(Y))))
    with pytest.raises(ValueError, match=r"cannot be told whether the first line of .*y\.csv"):
        read(tmp_path, NPY_X, ("y.csv", text("0\n" + lines(Y))))


# An index, an identifier or labels among the columns.

WITH_LABELS = NAMED.assign(label=Y)


@pytest.mark.parametrize(
    ("frame", "options"),
    [
        (NAMED.rename_axis("id"), {}),
        (NAMED.rename_axis("row"), {}),
        (FRAME.rename_axis("row"), {}),
        (NAMED.set_index(RNG.permutation(N)).rename_axis("row"), {}),
        (NAMED.set_index(np.arange(N) % 30).rename_axis("row"), {}),
        (NAMED.set_index(np.arange(N) * 0.5).rename_axis("row"), {}),
        (NAMED.set_index(TEXT_WITHOUT_COMMAS).rename_axis("row"), {}),
        (NAMED.set_index(pandas.date_range("2020-01-01", periods=N)).rename_axis("row"), {}),
        (FRAME, {"header": False}),
        (NAMED.set_index(RNG.permutation(N)), {"header": False}),
        ((1000 * FRAME).astype(int), {"header": False}),
        ((1000 * NAMED).astype(int).rename_axis("row"), {}),
        (WITH_LABELS, {"index": False}),
        (WITH_LABELS.astype(float), {"index": False}),
        (WITH_LABELS.assign(label=TEXT_WITHOUT_COMMAS), {"index": False}),
        (WITH_LABELS.rename(columns={"label": "k"}), {"index": False}),
        (NAMED.assign(k=Y > 3), {"index": False}),
        (NAMED.assign(k=pandas.Timestamp("2020-01-01")), {"index": False}),
        (NAMED.reset_index(), {"index": False}),
        (NAMED.assign(hole=np.where(np.arange(N) == 7, np.nan, X[:, 0])), {}),
        (NAMED.assign(hole=np.where(np.arange(N) == 0, np.nan, X[:, 0])), {}),
        (FRAME, {"decimal": ",", "sep": ";"}),
        (FRAME, {"decimal": ","}),
        (NAMED, {"decimal": ",", "sep": "\t"}),
        (NAMED.rename(columns={"c3": ""}), {}),
    ],
)
def test_what_is_no_feature(tmp_path: Path, frame: pandas.DataFrame, options: dict[str, Any]) -> None:
    """Refused, and not counted among the features."""
    with pytest.raises(ValueError, match="cannot read embeddings") as refused:
        read(tmp_path, ("x.csv", lambda path: frame.to_csv(path, **options)), NPY_Y)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    "frame",
    [
        WITH_LABELS,
        WITH_LABELS.astype(float),
        WITH_LABELS.rename(columns={"label": "k"}),
        WITH_LABELS.assign(label=TEXT),
        NAMED.assign(k=Y > 3),
        NAMED.assign(k=pandas.Timestamp("2020-01-01")),
        NAMED.reset_index(),
        pandas.DataFrame({"e": list(X), "k": Y}),
        pandas.DataFrame({"e": list(X), "f": list(X)}),
        pandas.DataFrame({"e": [X[0], *([None] * (N - 1))]}),
        pandas.DataFrame({"e": [X[0, : 1 + k % 3] for k in range(N)]}),
        pandas.DataFrame({"e": [[1.0, None]] * N}),
        pandas.DataFrame({"e": [["a", "b"]] * N}),
        pandas.DataFrame({"e": TEXT}),
        NAMED.convert_dtypes().mask(NAMED > 2),
        pandas.DataFrame(index=pandas.Index(Y, name="y")),
    ],
)
def test_parquet_that_is_no_embeddings(tmp_path: Path, frame: pandas.DataFrame) -> None:
    with pytest.raises(ValueError, match="cannot read embeddings") as refused:
        read(tmp_path, ("x.parquet", frame.to_parquet), NPY_Y)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("# a comment\n" + rows(), "comment"),
        ("#" + ",".join("abcdefgh") + "\n" + rows(), "comment"),
        (rows() + "# the end\n", "cannot read embeddings"),
        (rows(X[:5]) + "\n" + rows(X[5:]), "has no value in row"),
        (rows().replace(",", ",,", 1), "Expected 9 columns, got 8"),
        (rows(X[:5]) + "," * (D - 1) + "\n" + rows(X[5:]), "has no value in row"),
        (rows().replace("\n", ",\n"), "without a number"),
        (rows().replace(rows(X[:1]).split(",")[0], "NA", 1), "without a number"),
        (rows().replace(rows(X[:1]).split(",")[0], "", 1), "labels must have shape"),
        (rows(X[:5]) + rows(X[5:, :4]), "Expected 8 columns, got 4"),
        ("\n" + rows(), "its first line is empty"),
        ("\n\n", "it is empty"),
        ("a,b\n", "empty but for a header"),
        ('"a\nb",c\n1,2\n', "a quote without a second one"),
        ("a;b,c\n1;2,3\n", "separate columns by one of them"),
        ("sep=;\n" + rows(separator=";"), "cannot read embeddings"),
    ],
)
def test_csv_that_is_no_embeddings(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        read(tmp_path, ("x.csv", text(content)), NPY_Y)
    assert str(tmp_path / "x" / "x.csv") in str(refused.value)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16-le", "cp1252"])
def test_encodings_that_cannot_be_told(tmp_path: Path, encoding: str) -> None:
    for x, y in (
        (("x.csv", text(",".join("äöüßéèêë") + "\n" + rows(), encoding)), NPY_Y),
        (NPY_X, ("y.csv", text("Maß\n" + lines(f"Käse {c}" for c in Y), encoding))),
    ):
        with pytest.raises(ValueError, match="save it as UTF-8"):
            read(tmp_path, x, y)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("y.csv", pandas.DataFrame({"id": Y, "y": Y}).to_csv, "must be one column"),
        (
            "y.csv",
            lambda path: pandas.DataFrame({"id": X[:, 0], "y": Y}).to_csv(path, index=False),
            "must be one column",
        ),
        ("y.csv", lambda path: pandas.Series(Y, name="y").rename_axis("id").to_csv(path), "must be one column"),
        ("y.csv", lambda path: pandas.Series(Y).to_csv(path, header=False), "must be one column"),
        ("y.csv", text("# labels\n" + lines(Y)), "comment"),
        ("y.csv", text("y\n" + lines(["", *Y[1:]])), "row 1 has no label"),
        ("y.csv", text("y\n" + lines([*Y[:5], "NA", *Y[6:]])), "row 6 has no label but 'NA'"),
        ("y.csv", text("y\n" + lines([*(Y[:5] * 1.0), "nan", *Y[6:]])), "row 6 has no label but 'nan'"),
        ("y.csv", text(lines(Y + 0.5)), "must hold integer or text labels"),
        ("y.csv", text("y\n" + lines(TEXT)), "Expected 1 columns"),
        ("y.npy", to_npy(np.full(N, np.nan)), "must hold integer or text labels"),
        ("y.npy", to_npy(np.full(N, np.datetime64("NaT"))), "has no label in row 1"),
        ("y.npy", to_npy(np.zeros((N, 2), dtype=int)), r"must hold labels of shape \[N\], got \[60, 2\]"),
        ("y.npy", to_npy(np.int64(3)), r"must hold labels of shape \[N\], got \[\]"),
        ("y.npy", to_npy(np.zeros(N, dtype=[("a", int), ("b", int)])), "must hold integer or text labels"),
        ("y.npy", lambda path: np.save(path, np.array(["a", 1] * 30, dtype=object)), "pickles are not read"),
        ("y.npy", to_npy(Y * 1j), "must hold integer or text labels"),
        ("y.npz", lambda path: np.savez(path, y=Y, classes=Y), "no array 'labels', only y, classes"),
        ("y.parquet", pandas.DataFrame({"y": [None, *Y[1:]]}).to_parquet, "'?y'? has no value in row 1"),
        ("y.parquet", pandas.DataFrame({"y": [None, *TEXT[1:]]}).to_parquet, "'?y'? has no value in row 1"),
        ("y.parquet", pandas.DataFrame({"y": pandas.Categorical([None, *TEXT[1:]])}).to_parquet, "no value in row 1"),
        ("y.parquet", pandas.DataFrame({"y": Y, "z": Y}).to_parquet, "must be one column, got 2: 'y', 'z'"),
        ("y.parquet", pandas.DataFrame({"y": [[1]] * N}).to_parquet, "must hold integer or text labels"),
    ],
)
def test_what_is_no_label(tmp_path: Path, name: str, write: Write, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        read(tmp_path, NPY_X, (name, write))
    assert str(tmp_path / "y" / name) in str(refused.value)
