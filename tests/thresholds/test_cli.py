"""`python -m tcm_fused opis | calibrate | margins | compare`: files in, figures, JSON and pictures out; bad input."""

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.commands import refuse, run

from tcm_fused import calibrate, opis, suggest_margins
from tcm_fused.__main__ import main
from tcm_fused.thresholds.files import load
from tcm_fused.thresholds.outputs import write_whole

PNG = b"\x89PNG\r\n\x1a\n"
N, D, CLASSES = 240, 12, 9


@pytest.fixture(scope="module")
def data() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    y = rng.integers(CLASSES, size=N)
    return rng.standard_normal((CLASSES, D))[y] + rng.uniform(0.4, 1.2, CLASSES)[y, None] * rng.standard_normal(
        (N, D)
    ), y


@pytest.fixture(scope="module")
def files(data: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same set in every form."""
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("files")
    x, y = data
    text = np.array([f"bird {c}, blue" for c in y])
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", y)
    np.save(folder / "text.npy", text)
    np.savez(folder / "both.npz", embeddings=x, labels=y)
    np.savez(folder / "other.npz", embeddings=x[:, :4], labels=y)
    np.savetxt(folder / "x.csv", x, delimiter=",", fmt="%.17g")
    np.savetxt(folder / "x_header.csv", x, delimiter=",", fmt="%.17g", header=",".join("abcdefghijkl"), comments="")
    np.savetxt(folder / "y.csv", y, fmt="%d")
    np.savetxt(folder / "y_header.csv", y, fmt="%d", header="label", comments="")
    (folder / "text.csv").write_text("".join(f"bird {c}\n" for c in y))
    (folder / "text_header.csv").write_text("species\n" + "".join(f"bird {c}\n" for c in y))
    parquet.write_table(pyarrow.table({f"c{k}": x[:, k] for k in range(D)}), folder / "x.parquet")
    parquet.write_table(pyarrow.table({"embedding": list(x)}), folder / "x_lists.parquet")
    parquet.write_table(pyarrow.table({"label": y}), folder / "y.parquet")
    parquet.write_table(pyarrow.table({"label": text}), folder / "text.parquet")
    return folder


@pytest.mark.parametrize("x", ["x.npy", "x.csv", "x_header.csv", "x.parquet", "x_lists.parquet", "both.npz"])
@pytest.mark.parametrize(
    "y",
    [
        "y.npy",
        "y.csv",
        "y_header.csv",
        "y.parquet",
        "both.npz",
        "text.npy",
        "text.csv",
        "text_header.csv",
        "text.parquet",
    ],
)
def test_every_form_reads_the_same(files: Path, data: tuple[Any, Any], x: str, y: str) -> None:
    loaded = load(files / x, files / y)
    assert np.array_equal(loaded.embeddings, data[0])
    assert np.array_equal(loaded.labels, data[1])
    assert (loaded.names is not None) == ("text" in y)
    if loaded.names is not None:
        assert loaded.names[3].startswith("bird 3")


def test_byte_order_mark(data: tuple[Any, Any], tmp_path: Path) -> None:
    """Spreadsheets write one; it makes no header of the first row."""
    x, y = data
    np.savetxt(tmp_path / "x.csv", x, delimiter=",", fmt="%.17g", encoding="utf-8-sig")
    np.savetxt(tmp_path / "y.csv", y, fmt="%d", encoding="utf-8-sig")
    assert (tmp_path / "x.csv").read_bytes().startswith(b"\xef\xbb\xbf")
    loaded = load(tmp_path / "x.csv", tmp_path / "y.csv")
    assert np.array_equal(loaded.embeddings, x)
    assert np.array_equal(loaded.labels, y)


def test_long_integer_labels(files: Path, data: tuple[Any, Any], tmp_path: Path) -> None:
    """Identifiers beyond 2^53 stay apart; floats are labels where each is an integer of its own."""
    ids = 12345678901234560 + data[1]
    for header in ("", "id\n"):
        (tmp_path / "y.csv").write_text(header + "".join(f"{i}\n" for i in ids))
        assert np.array_equal(load(files / "x.npy", tmp_path / "y.csv").labels, ids)
    np.savetxt(tmp_path / "y.csv", data[1])
    assert np.array_equal(load(files / "x.npy", tmp_path / "y.csv").labels, data[1])
    for bad in (np.float64(2.0**53), np.inf, np.nan, np.float32(2.0**24), np.float16(0.5)):
        np.save(tmp_path / "y.npy", np.full(N, bad))
        with pytest.raises(ValueError, match=r"must hold integer or text labels.*whole, finite"):
            load(files / "x.npy", tmp_path / "y.npy")


def test_index_of_pandas_is_no_embedding(data: tuple[Any, Any], tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    x = data[0]
    table = pyarrow.table({**{f"c{k}": x[:, k] for k in range(D)}, "__index_level_0__": np.arange(N)})
    about = {"index_columns": ["__index_level_0__"], "columns": [], "column_indexes": []}
    parquet.write_table(table.replace_schema_metadata({"pandas": json.dumps(about)}), tmp_path / "x.parquet")
    np.save(tmp_path / "y.npy", data[1])
    assert np.array_equal(load(tmp_path / "x.parquet", tmp_path / "y.npy").embeddings, x)


def test_one_file_of_both(files: Path, data: tuple[Any, Any]) -> None:
    loaded = load(files / "both.npz", None)
    assert np.array_equal(loaded.embeddings, data[0])
    assert np.array_equal(loaded.labels, data[1])


def test_opis(files: Path, data: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options reach the function, and its result the page, the JSON and the picture."""
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    options = (
        "--far",
        "0.02",
        "0.2",
        "--epsilon",
        "0.3",
        "--beta",
        "2",
        "--num-thresholds",
        "21",
        "--distance",
        "cosine",
    )
    printed = run(
        capsys, "opis", files / "x.npy", files / "text.npy", *options, "--worst", 2, "--json", out, "--plot", picture
    )
    expected = opis(*data, far_range=(0.02, 0.2), epsilon=0.3, beta=2, num_thresholds=21, distance="cosine")
    written = json.loads(out.read_text())
    names = written.pop("class_names")
    assert written == expected.to_dict()
    assert names == [f"bird {c}, blue" for c in range(CLASSES)]
    assert f"{expected.opis:.4g}" in printed
    assert f"30%-OPIS       {expected.eps_opis:.4g}" in printed
    worst = expected.worst(2)
    assert f"class bird {worst[0].class_id}, blue ({worst[0].size} samples): {worst[0].value:.4f}" in printed
    assert printed.count("samples)") == 2
    assert picture.read_bytes().startswith(PNG)
    assert sorted(tmp_path.iterdir()) == [out, picture]


def test_suffixes_in_capitals(
    files: Path, data: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("x.npy", "y.CSV", "both.npz"):
        (tmp_path / name.upper()).write_bytes((files / name.lower()).read_bytes())
    assert np.array_equal(load(tmp_path / "X.NPY", tmp_path / "Y.CSV").labels, data[1])
    run(capsys, "opis", tmp_path / "BOTH.NPZ", "--plot", tmp_path / "OUT.PNG")
    assert (tmp_path / "OUT.PNG").read_bytes().startswith(PNG)


def test_a_reader_that_leaves() -> None:
    """`| head -0`: neither a traceback nor a message."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "tcm_fused", "info"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize("error", [MemoryError(), FloatingPointError("overflow")])
def test_errors_of_work_have_no_traceback(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("tcm_fused.thresholds.command_line.opis", fail)
    assert (str(error) or "MemoryError") in refuse(capsys, "opis", files / "both.npz")


def test_opis_by_other_ranges(
    files: Path, data: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    run(capsys, "opis", files / "both.npz", "--frr", "0.1", "0.5", "--json", out)
    assert json.loads(out.read_text())["opis"] == opis(*data, frr_range=(0.1, 0.5)).opis
    run(capsys, "opis", files / "both.npz", "--thresholds", "0.5", "0.9", "1.3", "--backend", "torch", "--json", out)
    assert json.loads(out.read_text())["distance"] == [0.5, 0.9, 1.3]


def test_calibrate(files: Path, data: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "out.svg"
    printed = run(capsys, "calibrate", files / "both.npz", "--far", "0.01", "--json", out, "--plot", picture)
    expected = calibrate(*data, far=0.01)
    assert json.loads(out.read_text()) == expected.to_dict()
    assert f" {expected.threshold.similarity!r} " in printed
    assert "equal error" in printed
    assert "fewer than one pair" in printed
    assert "<svg" in picture.read_text()
    run(capsys, "calibrate", files / "both.npz", "--frr", "0.2", "--json", out)
    assert json.loads(out.read_text()) == calibrate(*data, frr=0.2).to_dict()


def test_margins(files: Path, data: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    printed = run(
        capsys,
        "margins",
        files / "x.npy",
        files / "y.csv",
        "--far",
        0.05,
        "--frr",
        0.3,
        "--json",
        out,
        "--plot",
        picture,
    )
    expected = suggest_margins(*data, far=0.05, frr=0.3)
    assert json.loads(out.read_text()) == expected.to_dict()
    assert f"TCMLoss(margin_plus={expected.margin_plus!r}, margin_minus={expected.margin_minus!r})" in printed
    assert f"{expected.count_plus:,} positive pairs" in printed
    assert picture.read_bytes().startswith(PNG)


def test_compare(files: Path, data: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "out.pdf"
    printed = run(capsys, "compare", files / "both.npz", files / "other.npz", "--json", out, "--plot", picture)
    written = json.loads(out.read_text())
    assert written == {"both": opis(*data).to_dict(), "other": opis(data[0][:, :4], data[1]).to_dict()}
    lines = printed.splitlines()
    first, second = sorted(written, key=lambda name: written[name]["opis"])
    assert lines[1].startswith(first)
    assert lines[2].startswith(second)
    assert picture.read_bytes().startswith(b"%PDF")


# Bad input: exit code 2, a message that names what is wrong, and nothing written.


def bad_file(folder: Path, name: str) -> Path:
    """A file of embeddings that cannot be read."""
    path = folder / name
    if name == "pickled.npy":
        path.write_bytes(pickle.dumps(np.ones((4, 2))))
    elif name == "objects.npy":
        np.save(path, np.array([{}, []], dtype=object), allow_pickle=True)
    elif name == "objects.npz":
        np.savez(path, embeddings=np.array([{}, []], dtype=object), labels=np.zeros(2, dtype=int))
    elif name == "archive.npy":
        np.savez(folder / "archive.npz", embeddings=np.ones((4, 2)), labels=np.zeros(4))
        (folder / "archive.npz").rename(path)
    elif name == "wrong.npz":
        np.savez(path, x=np.ones((4, 2)))
    elif name == "cut.npy":
        np.save(path, np.ones((400, 20)))
        path.write_bytes(path.read_bytes()[:1000])
    elif name == "flipped.npz":
        np.savez_compressed(path, embeddings=np.arange(4000.0).reshape(400, 10), labels=np.arange(400))
        content = bytearray(path.read_bytes())
        content[100:140] = bytes(255 - b for b in content[100:140])
        path.write_bytes(content)
    elif name == "huge.npy":
        with path.open("wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (10**9, 10**5)}
            np.lib.format.write_array_header_1_0(file, header)
    elif name == "header.npy":
        np.save(path, np.ones((4, 2)))
        path.write_bytes(path.read_bytes().replace(b"(4, 2)", b"(4, -2"))
    elif name == "empty.parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"e": pyarrow.array([], pyarrow.list_(pyarrow.float32()))}), path)
    elif name == "words.csv":
        path.write_text("a,b\n1,2\nthree,4\n")
    elif name == "ragged.csv":
        path.write_text("1,2\n3\n")
    elif name == "text.npy":
        np.save(path, np.array(["a", "b"]))
    elif name == "folder.npy":
        path.mkdir()
    elif name != "missing.npy":
        path.write_bytes(b"nothing that is known")
    return path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.npy", "No such file"),
        ("folder.npy", "cannot read embeddings"),
        ("unknown.npy", "damaged or pickled"),
        ("cut.npy", "cannot read embeddings"),
        ("pickled.npy", "damaged or pickled; pickles are not read"),
        ("objects.npy", "damaged or pickled; pickles are not read"),
        ("objects.npz", "damaged or pickled; pickles are not read"),
        ("archive.npy", "it is not a single array"),
        ("wrong.npz", "it has no array 'embeddings', only x"),
        ("broken.npz", "damaged or pickled"),
        ("flipped.npz", "cannot read embeddings"),
        ("huge.npy", "cannot read embeddings"),
        ("header.npy", "cannot read embeddings"),
        ("empty.parquet", "it is empty"),
        ("broken.parquet", "cannot read embeddings"),
        ("broken.csv", "it is empty"),
        ("words.csv", "cannot read embeddings"),
        ("ragged.csv", "cannot read embeddings"),
        ("text.npy", "must hold numbers, got"),
        ("x.txt", "must end in one of .npy, .npz, .csv, .parquet"),
    ],
)
@pytest.mark.filterwarnings("ignore:loadtxt")
def test_unreadable_files(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    path = bad_file(tmp_path, name)
    before = sorted(tmp_path.iterdir())
    said = refuse(capsys, "opis", path, files / "y.npy", "--json", tmp_path / "out.json")
    assert message in said
    assert str(path) in said
    assert sorted(tmp_path.iterdir()) == before


def test_tables_without_pyarrow(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("x.parquet", "x.csv"):
        said = refuse(capsys, "opis", files / name, files / "y.npy")
        assert "need pyarrow: pip install pyarrow\n" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("opis", "x.npy"), "needs a file of labels beside it"),
        (("opis", "other.npz", "y_short.npy"), f"labels must have shape [{N}]"),
        (("opis", "both.npz", "fractions.npy"), "must hold integer or text labels, got float64"),
        (("opis", "nan.npz"), "embeddings must be finite"),
        (("opis", "one_class.npz"), "labels must name at least two classes"),
        (("opis", "singles.npz"), "no class has two samples"),
        (("opis", "both.npz", "--far", "0", "0.1"), "far_range must lie between 0 and 1"),
        (("opis", "both.npz", "--far", "0.1", "0.01"), "the range is empty"),
        (("opis", "both.npz", "--far", "1e-9", "2e-9"), "the calibration range is empty"),
        (("opis", "both.npz", "--epsilon", "2"), "epsilon must lie between 0 and 1"),
        (("opis", "both.npz", "--thresholds", "0.5", "3"), "thresholds must lie from 0 to 2"),
        (("opis", "both.npz", "--beta", "1e200"), "beta must be above 0 and at most 1e100"),
        (("opis", "both.npz", "--worst", "-1"), "must be a whole number, 0 or above, got -1"),
        (("opis", "x.npy", "y.npy", "--json", "y.npy"), "it is an input or the other output"),
        (("compare", "both.npz", "other.npz", "--json", "other.npz"), "it is an input or the other output"),
        (("opis", "both.npz", "--json", "OUT/a.png", "--plot", "OUT/./a.png"), "the other output"),
        (("opis", "both.npz", "--far", "a", "b"), "invalid float value"),
        (("opis", "both.npz", "--plot", "OUT/picture.gif"), "its name must end in one of .png, .pdf, .svg"),
        (("opis", "both.npz", "--plot", "OUT/none/picture.png"), "there is no folder"),
        (("opis", "both.npz", "--json", "OUT"), "it is a folder"),
        (("calibrate", "both.npz"), "one of the arguments --far --frr is required"),
        (("calibrate", "both.npz", "--far", "0.1", "--frr", "0.1"), "not allowed with argument"),
        (("calibrate", "both.npz", "--far", "1.5"), "far must lie between 0 and 1"),
        (("calibrate", "equal.npz", "--far", "0.01"), "no threshold meets far=0.01"),
        (("margins", "both.npz", "--far", "0.1"), "the following arguments are required: --frr"),
        (("margins", "equal.npz", "--far", "0.01", "--frr", "0.1"), "no margin_minus meets far=0.01"),
        (("compare",), "the following arguments are required"),
        (("compare", "both.npz", "both.npz"), "two files are named both"),
        (("compare", "x.npy"), "needs a file of labels beside it"),
        (("opis", "both.npz", "--backend", "gpu"), "invalid choice"),
    ],
)
def test_bad_calls(
    files: Path, data: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: Any, message: str
) -> None:
    x, y = data
    if not (files / "nan.npz").exists():
        np.save(files / "y_short.npy", y[:-1])
        np.save(files / "fractions.npy", y + 0.5)
        np.savez(files / "nan.npz", embeddings=np.where(np.arange(N)[:, None] == 7, np.nan, x), labels=y)
        np.savez(files / "one_class.npz", embeddings=x, labels=0 * y)
        np.savez(files / "singles.npz", embeddings=x, labels=np.arange(N))
        np.savez(files / "equal.npz", embeddings=np.eye(2)[[0, 0, 0, 1]], labels=[0, 0, 1, 1])
    names = {p.name for p in files.iterdir()}
    call = [str(files / a) if a in names else a.replace("OUT", str(tmp_path)) for a in arguments]
    assert message in refuse(capsys, *call)
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before any work, with the name of the package to install."""
    monkeypatch.delitem(sys.modules, "tcm_fused.thresholds.plots")
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install matplotlib" in refuse(capsys, "opis", files / "both.npz", "--plot", tmp_path / "out.png")


def test_nothing_is_written_half(tmp_path: Path) -> None:
    """A failure leaves the old file as it was and no other."""
    path = tmp_path / "out.json"
    path.write_text("old")

    def fail(part: Path) -> None:
        part.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_text() == "old"
    write_whole(path, lambda part: part.write_text("new"))
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Path, target: Path) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(SystemExit) as left:
        main(["opis", str(files / "both.npz"), "--json", str(tmp_path / "out.json")])
    assert left.value.code == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["opis", "calibrate", "margins", "compare"])
def test_help_teaches(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert f"example: python -m tcm_fused {command}" in " ".join(printed.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error is that of a machine without a GPU")
@pytest.mark.parametrize("command", ["opis", "calibrate", "margins", "compare"])
def test_device_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    np.savez(tmp_path / "e.npz", embeddings=np.eye(4), labels=np.arange(4) // 2)
    rates = {"calibrate": ["--far", "0.1"], "margins": ["--far", "0.1", "--frr", "0.1"]}.get(command, [])
    assert "torch sees no GPU" in refuse(capsys, command, tmp_path / "e.npz", *rates, "--device", "cuda")
