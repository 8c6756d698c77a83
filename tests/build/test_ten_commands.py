"""The ten commands of docs/thresholds.md, one after the other, from two .npy files to a deployed threshold."""

import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from test_pages import ROOT, blocks

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
PAGE = ROOT / "docs" / "thresholds.md"


def run(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -c` or `python -m`, in this process."""
    python, how, what, *arguments = shlex.split(line)
    assert python == "python"
    if how == "-c":
        exec(compile(what, line, "exec"), {})
        return
    assert how == "-m"
    monkeypatch.setattr(sys, "argv", [what, *arguments])
    runpy.run_module(what, run_name="__main__")


def test_from_two_files_to_a_threshold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(40), 10)
    np.save("embeddings.npy", (rng.normal(size=(40, 16))[y] + rng.normal(size=(400, 16))).astype(np.float32))
    np.save("labels.npy", y)
    lines = blocks(PAGE, "sh")[0].splitlines()
    assert len(lines) == 10
    for line in lines:
        before = capsys.readouterr()
        assert before.err == ""
        run(line, monkeypatch)
    assert capsys.readouterr().out.strip() in ("True", "False")
    made = {path.name for path in tmp_path.iterdir()}
    assert made >= {"threshold.json", "utility.png", "similarities.png", "det.png", "roc.png", "classes.png"}
    assert made >= {"classes.csv", "rates.md", "report.html", "calibration.npz", "test.npz"}


def test_commands_on_lists_of_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("embeddings.npy", np.random.default_rng(0).normal(size=(20, 4)))
    Path("files.txt").write_text("".join(f"Ann/Ann_{k:04d}.jpg\n" for k in range(20)))
    Path("pairs.txt").write_text("2\t1\nAnn\t1\t4\nAnn\t1\tAnn\t12\nAnn\t2\t3\nAnn\t2\tAnn\t1\n")
    Path("scores.csv").write_text("score,same\n0.9,1\n0.2,0\n0.4,1\n0.3,0\n")
    for line in blocks(PAGE, "sh")[1].splitlines():
        run(line, monkeypatch)
