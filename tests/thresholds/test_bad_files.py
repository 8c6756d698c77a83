"""Files that are not what they say, or larger than they say: refused, and never unpacked or copied."""

import io
import json
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from support.set_in_files import NPY_Y, RNG, D, N, X, Y, read

from tcm_fused.thresholds.files import load

# Files that are not what they say.


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.float64(3), r"must hold embeddings of shape \[N, D\], got \[\]"),
        (X[0], r"must hold embeddings of shape \[N, D\], got \[8\]"),
        (X[None], r"must hold embeddings of shape \[N, D\], got \[1, 60, 8\]"),
        (X[:0], "it is empty"),
        (X[:, :0], "it is empty"),
        (X > 0, "must hold numbers, got bool"),
        (X * 1j, "must hold numbers, got complex128"),
        (X.astype([("a", "f8")]), "must hold numbers, got"),
        (np.full((N, D), np.datetime64("2020-01-01")), "must hold numbers, got"),
    ],
)
@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_arrays_that_are_no_embeddings(tmp_path: Path, array: Any, message: str, name: str) -> None:
    def write(path: Path) -> None:
        np.savez(path, embeddings=array) if path.suffix == ".npz" else np.save(path, array)

    with pytest.raises(ValueError, match=message) as refused:
        read(tmp_path, (name, write), NPY_Y)
    assert str(tmp_path / "x" / name) in str(refused.value)


def header(shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return stream.getvalue()


def test_headers_that_claim_too_much(tmp_path: Path) -> None:
    """Petabytes that are not there: said at once, and nothing is taken for them."""
    for shape in ((10**9, 10**6), (10**4, 10**4), (2**40, 2**40)):
        (tmp_path / "x.npy").write_bytes(header(shape) + bytes(800))
        with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
            archive.writestr("embeddings.npy", header(shape) + bytes(800))
            archive.writestr("labels.npy", header((8,)) + bytes(32))
        np.save(tmp_path / "y.npy", Y)
        for name in ("x.npy", "x.npz"):
            with pytest.raises(ValueError, match=f"cannot read embeddings from .*{name}"):
                load(tmp_path / name, tmp_path / "y.npy")


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    """1.5 GiB of zeros in a file of 7 MB: refused by its header, in less memory than they take."""
    block = bytes(1 << 24)
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("embeddings.npy", "w", force_zip64=True) as stream:
            stream.write(header((96 << 10, 4096)))
            for _ in range(96):
                stream.write(block)
        archive.writestr("labels.npy", header((96 << 10,)) + bytes(4 * 96 << 10))
    script = f"""
import resource
from pathlib import Path
from tcm_fused.thresholds.files import load
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load(Path({str(tmp_path / "x.npz")!r}), None)
except ValueError as error:
    print(error)
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "x.npz" in done.stdout and "times as many" in done.stdout


def test_parquet_that_unpacks_to_more_than_there_is(tmp_path: Path) -> None:
    """One value a thousand million times takes a few bytes there."""
    one = pyarrow.table({"a": pyarrow.array(np.zeros(1 << 25, dtype=np.float32))})
    with parquet.ParquetWriter(tmp_path / "x.parquet", one.schema) as writer:
        for _ in range(8):
            writer.write_table(one)
    np.save(tmp_path / "y.npy", Y)
    with pytest.raises(ValueError, match=r"x\.parquet: .* times as many"):
        load(tmp_path / "x.parquet", tmp_path / "y.npy")


def test_a_file_is_mapped_and_not_copied(tmp_path: Path) -> None:
    x = X.astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", Y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load(tmp_path / "x.npy", tmp_path / "y.npy")
    assert isinstance(found.embeddings, np.memmap) and not found.embeddings.flags.writeable
    assert np.array_equal(found.embeddings, x)


def test_a_named_index_in_the_metadata_alone(tmp_path: Path) -> None:
    """As pandas marks it, whatever its name."""
    table = pyarrow.table({**{f"c{k}": X[:, k] for k in range(D)}, "who": np.arange(N)})
    about = {"index_columns": ["who"], "columns": [], "column_indexes": []}
    table = table.replace_schema_metadata({"pandas": json.dumps(about)})
    found = read(tmp_path, ("x.parquet", lambda path: parquet.write_table(table, path)), NPY_Y)
    assert np.array_equal(found.embeddings, X)


def test_lines_longer_than_a_block(tmp_path: Path) -> None:
    x = RNG.standard_normal((3, 5_000))
    np.save(tmp_path / "y.npy", [0, 0, 1])
    np.savetxt(tmp_path / "x.csv", x, delimiter=",", fmt="%.240f")
    assert np.array_equal(load(tmp_path / "x.csv", tmp_path / "y.npy").embeddings, x)


@pytest.mark.parametrize("name", ["none.npy", "none.npz", "none.csv", "none.parquet"])
def test_a_file_that_is_not_there(tmp_path: Path, name: str) -> None:
    """Called missing, not damaged, whatever its kind."""
    with pytest.raises(ValueError, match="No such file"):
        load(tmp_path / name, None if name.endswith(".npz") else tmp_path / "none_y.npy")
