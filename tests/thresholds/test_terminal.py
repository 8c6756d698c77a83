"""Commands on a terminal: text from files cannot harm it, none of its encodings ends a run, and what is printed
to be typed again decides as it did."""

import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import benchmarks.demo
import benchmarks.digits.__main__
import benchmarks.retrieval.__main__
import benchmarks.retrieval.drawn
import benchmarks.retrieval.glyphs
import benchmarks.speed.report
from tcm_fused import calibrate, opis, suggest_margins
from tcm_fused.__main__ import main
from tcm_fused.thresholds.terminal import printable, printable_lines

RNG = np.random.default_rng(5)
Y = RNG.integers(6, size=90)
X = RNG.standard_normal((6, 8))[Y] + RNG.standard_normal((90, 8))
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
EVIL = "cat\x1b[2J\x1b]0;title\x07\r\b\x9b31m\u202egnp\n.fake line"


def save_set(path: Path, labels: Any = Y, x: Any = X) -> Path:
    np.savez(path, embeddings=x, labels=labels)
    return path


def test_printable() -> None:
    assert printable(EVIL) == "cat\\x1b[2J\\x1b]0;title\\x07\\r\\x08\\x9b31m\\u202egnp\\n.fake line"
    assert printable("Käse 猫 \U0001f408, (a b)") == "Käse 猫 \U0001f408, (a b)"
    assert printable("\udcff") == "\\udcff"
    assert printable_lines("a\tb\nc") == "a\\tb\nc"


def test_labels_and_names_are_harmless(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In pages and messages; in JSON they stay as they are."""
    names = np.array([f"{EVIL} {c}" for c in Y])
    folder = tmp_path / EVIL.replace("/", "")
    folder.mkdir()
    data, out = save_set(folder / f"{EVIL}.npz", names), folder / "out.json"
    rates: dict[str, list[str]] = {"opis": [], "calibrate": ["--far", "0.1"], "margins": ["--far", ".1", "--frr", ".1"]}
    for command, options in (*rates.items(), ("compare", [])):
        main([command, str(data), *options, "--json", str(out), "--plot", str(folder / "out.png")])
        printed = capsys.readouterr().out
        assert not CONTROL.search(printed)
        assert printable(out) in printed
        if command in ("opis", "calibrate"):
            assert f"class {printable(names[0][:-2])}" in printed
            assert json.loads(out.read_text())["class_names"] == sorted(set(names))
    missing = f"{folder}/none{EVIL}"
    for call in (
        ["opis", f"{missing}.npz"],
        ["opis", f"{missing}.npy", str(data)],
        ["opis", str(data), "--json", f"{missing}/out.json"],
        ["opis", str(data), missing, missing],
        ["compare", str(data), str(data)],
        [EVIL],
    ):
        with pytest.raises(SystemExit) as left:
            main(call)
        assert left.value.code == 2
        assert not CONTROL.search(capsys.readouterr().err)
    arrays: Any = {EVIL: X}
    np.savez(folder / "names.npz", **arrays)
    with pytest.raises(SystemExit):
        main(["opis", str(folder / "names.npz")])
    assert not CONTROL.search(capsys.readouterr().err)


def test_mathematics_in_names(tmp_path: Path) -> None:
    """Matplotlib takes text between dollars for formulas, and fails on what is none."""
    files = [str(save_set(tmp_path / name)) for name in ("a$x_$.npz", "$\\frac$.npz", "b$.npz")]
    main(["compare", *files, "--plot", str(tmp_path / "out.png")])
    assert (tmp_path / "out.png").exists()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_any_encoding(tmp_path: Path, encoding: str) -> None:
    """Characters that the terminal's encoding lacks are written as escapes; files are in UTF-8 whatever it is."""
    data = save_set(tmp_path / "Käse 猫.npz", np.array([f"Ж {c}" for c in Y]))
    environment = {
        **os.environ,
        "PYTHONIOENCODING": encoding,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tcm_fused", "opis", str(data), "--json", str(tmp_path / "ö猫.json")],
        env=environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"class \\u0416 " in done.stdout and b".json\n" in done.stdout
    assert json.loads((tmp_path / "ö猫.json").read_text(encoding="utf-8"))["class_names"][0] == "Ж 0"
    done = subprocess.run(
        [sys.executable, "-m", "tcm_fused", "opis", str(tmp_path / "猫.npz")],
        env=environment, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and b".npz" in done.stderr and b"Traceback" not in done.stderr


def test_names_of_files_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe")
    save_set(Path(name + ".npz"))
    main(["compare", name + ".npz", "--json", name + ".json"])
    assert "\\udcff\\udcfe" in capsys.readouterr().out
    assert Path(name + ".json").exists()


def test_a_reader_that_leaves_loses_no_file(tmp_path: Path) -> None:
    """`| head -0`: files are written before the page."""
    data = save_set(tmp_path / "both.npz")
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-u", "-m", "tcm_fused", "opis", str(data), "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
    assert json.loads((tmp_path / "out.json").read_text())["opis"] > 0


def test_interrupted(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Control-C: no traceback, and nothing written."""

    def interrupt(*given: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    data = save_set(tmp_path / "both.npz")
    monkeypatch.setattr("tcm_fused.thresholds.command_line.opis", interrupt)
    with pytest.raises(SystemExit) as left:
        main(["opis", str(data), "--json", str(tmp_path / "out.json")])
    assert left.value.code == 128 + signal.SIGINT
    assert capsys.readouterr().err == "\ninterrupted\n"
    assert list(tmp_path.iterdir()) == [data]


# Help.

PROGRAMS: dict[str, Callable[[Sequence[str]], Any]] = {
    "tcm_fused": main,
    "benchmarks.demo": benchmarks.demo.main,
    "benchmarks.digits": benchmarks.digits.__main__.main,
    "benchmarks.speed.report": benchmarks.speed.report.main,
    "benchmarks.retrieval": benchmarks.retrieval.__main__.main,
    "benchmarks.retrieval.drawn": benchmarks.retrieval.drawn.main,
    "benchmarks.retrieval.glyphs": benchmarks.retrieval.glyphs.main,
}
PAGES = [*((name, []) for name in PROGRAMS), *(("tcm_fused", [c]) for c in ("opis", "calibrate", "margins", "compare"))]


@pytest.mark.parametrize(("program", "command"), PAGES)
def test_examples_of_the_help_are_calls(
    program: str, command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each as it stands, lines that end in a backslash joined, is understood by the program it names."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as left:
        PROGRAMS[program]([*command, "--help"])
    assert left.value.code == 0
    page = capsys.readouterr().out
    calls = re.findall(r"(?:^|\s)python -m (\S+) (.*)", page[page.index("options:") :].replace("\\\n", " "))
    assert calls or not command
    ran: list[Any] = []
    retrieval = [f"benchmarks.retrieval.{name}" for name in ("__main__", "drawn", "glyphs")]
    for module in ("tcm_fused.__main__", *retrieval):
        monkeypatch.setattr(f"{module}.run", lambda *given: ran.append(given))
    for name, rest in calls:
        PROGRAMS[name](shlex.split(rest.split(")")[0]))
    assert len(ran) == len(calls)


def test_the_folded_example_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmarks.retrieval.__main__.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    following = [b for a, b in itertools.pairwise(lines) if a.endswith(" \\")]
    assert [line.split()[0] for line in following] == ["--tcm", "--batch-classes", "--batch-classes", "--far", "--base"]


# Numbers that somebody types again.


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", range(10))
def test_printed_thresholds_decide_as_they_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int, dtype: Any
) -> None:
    """Each threshold of the page, similarity or distance, gives the same rates again, here and by the reader's own."""
    rng = np.random.default_rng(seed)
    y = rng.integers(12, size=300)
    x = (rng.standard_normal((12, 6))[y] + 0.7 * rng.standard_normal((300, 6))).astype(dtype)
    if seed == 0:  # similarities that are multiples of 1/4, which lie on the grid of thresholds
        x = rng.choice([-1.0, 1.0], (300, 4)).astype(dtype)
    data = save_set(tmp_path / "both.npz", y, x)
    far = 0.02 if seed else 0.3
    main(["calibrate", str(data), "--far", str(far)])
    page = capsys.readouterr().out
    found = calibrate(x, y, far=far)
    for name, at in (
        ("threshold", found.threshold),
        ("equal error", found.equal_error),
        ("best utility", found.best_utility),
    ):
        line = next(line for line in page.splitlines() if line.startswith(name))
        similarity, distance = (float(number) for number in line[len(name) :].split()[:2])
        assert (similarity, distance) == (at.similarity, at.distance)
        assert float(np.float32(similarity)) == similarity  # deployed in float32 it is the same
        for axis, number in (("cosine", similarity), ("euclidean", distance)):
            again = opis(x, y, thresholds=[number, 1.9 if axis == "euclidean" else 0.9999], distance=axis)
            assert (again.far[0], again.frr[0]) == (at.far, at.frr)
    unit = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    negative = y[:, None] != y
    if seed:
        assert ((unit @ unit.T >= found.threshold.similarity) & negative).sum() / negative.sum() <= far
    printed = re.findall(r"^1e-0\d +\S+ % +(\S+)", page, re.MULTILINE)
    assert [float(number) for number in printed] == [t.similarity for t in found.tar_at_far if t.tar == t.tar]


@pytest.mark.parametrize("seed", range(5))
def test_printed_margins_and_ranges(tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int) -> None:
    x = (X + seed).astype(np.float32)
    data = save_set(tmp_path / "both.npz", Y, x)
    main(["margins", str(data), "--far", "0.05", "--frr", "0.2"])
    page = capsys.readouterr().out
    found = suggest_margins(x, Y, far=0.05, frr=0.2)
    call = re.search(r"TCMLoss\(margin_plus=(\S+), margin_minus=(\S+)\)", page)
    assert call is not None
    assert tuple(map(float, call.groups())) == (found.margin_plus, found.margin_minus)
    assert f"margin_plus    {call[1]}\n" in page and f"margin_minus   {call[2]}\n" in page
    main(["opis", str(data)])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("range"))
    result = opis(x, Y)
    ends = [array[k] for array in (result.similarity, result.distance) for k in (array.argmin(), array.argmax())]
    assert [float(number) for number in re.findall(r"-?\d\.\d+(?:e-\d+)?", line)] == ends


def test_warnings_are_lines_with_the_name_of_the_command(tmp_path: Path) -> None:
    """Bounds finer than the data and margins that cross, as in the calls; no line of our own program beside them."""
    data = str(save_set(tmp_path / "set.npz"))
    for command, message in (
        (["calibrate", data, "--far", "1e-6"], "far=1e-06 is finer than the data"),
        (["margins", data, "--far", "0.01", "--frr", "0.01"], "give margin_plus="),
        (["opis", data, "--far", "1e-6", "0.5"], "begins at a rate that"),
    ):
        done = subprocess.run([sys.executable, "-m", "tcm_fused", *command], capture_output=True, text=True)
        assert done.returncode == 0
        lines = done.stderr.splitlines()
        assert all(line.startswith(f"python -m tcm_fused {command[0]}: warning: ") for line in lines)
        assert sum(message in line for line in lines) == 1
