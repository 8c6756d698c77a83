"""Runs of the retrieval experiment: from drawn images to the picture; killed, they go on to the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.retrieval import PNG, command, results_in
from torch import Tensor

from benchmarks.retrieval import networks
from benchmarks.retrieval.__main__ import main
from benchmarks.retrieval.drawn import draw_folder
from benchmarks.retrieval.training import Run

pytestmark = pytest.mark.usefixtures("one_thread")
EPOCHS = 12  # of the run that is killed
STEPS = 10  # of an epoch of `command` on `glyphs`


# Runs.


def test_drawn_folder(glyphs: Path, tmp_path: Path) -> None:
    draw_folder(tmp_path / "again", classes=3, images=4)
    for path in sorted((tmp_path / "again").rglob("*.png")):
        assert path.read_bytes() == (glyphs / path.relative_to(tmp_path / "again")).read_bytes()
    draw_folder(tmp_path / "other", classes=1, images=1, seed=1)
    first = "class_000/000.png"
    assert (tmp_path / "other" / first).read_bytes() != (glyphs / first).read_bytes()
    with pytest.raises(ValueError, match="is there already"):
        draw_folder(tmp_path / "other", classes=1, images=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "other"]


def test_from_drawn_images_to_the_picture(glyphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two seeds, without and with TCM: the networks learn, TCM tells, the table and the picture show it."""
    out = tmp_path / "out"
    learn = ("--base", "multisimilarity", "--batch-classes", 8, "--batch-images", 4)
    train = (*learn, "--epochs", 20, "--seeds", 0, 1)
    main(command(glyphs, out, *train))
    main(command(glyphs, out, *train, "--tcm", "--lambda-plus", 0.1, "--lambda-minus", 0.1))
    for more in ((), ("--tcm",)):
        main(command(glyphs, tmp_path / "still", *learn, "--lr", 0, *more))
    assert "192 images of 12 classes to train on, 192 of 12 other classes to test" in capsys.readouterr().out
    found = results_in(out)
    assert sorted(found) == [f"folder-small-multisimilarity-{t}seed{s}" for t in ("", "tcm-") for s in (0, 1)]
    still = results_in(tmp_path / "still")
    before = still["folder-small-multisimilarity-seed0"]["scores"]
    assert still["folder-small-multisimilarity-tcm-seed0"]["scores"] == before  # both start alike
    for result in found.values():
        assert result["scores"]["recall_at_1"] > 1.6 * before["recall_at_1"]
        assert result["steps"] == 20 * 6
    scores = [tuple(result["scores"].values()) for result in found.values()]
    assert len(set(scores)) == 4

    written = tmp_path / "t.md"
    both = ("--markdown", written, "--picture", tmp_path / "t.png", "--json", tmp_path / "t.json")
    main(["--table", str(out), *map(str, both)])
    printed = capsys.readouterr().out
    assert written.read_text() == printed
    assert "| folder small multisimilarity | 2 |" in printed
    assert (tmp_path / "t.png").read_bytes().startswith(PNG)
    main(["--table", str(tmp_path / "t.json"), str(out)])  # the same results twice are the same results
    assert capsys.readouterr().out == printed

    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    main(command(glyphs, out, *train))
    assert "finished before" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


class Stop(Exception):
    """The end of a process, for a test in one process."""


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, through dicts and lists."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def assert_same_run(first: Path, second: Path) -> None:
    """All but the time taken: every weight, the optimizer's state, the scores."""
    states = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (first, second)]
    results = [json.loads((folder / "result.json").read_text()) for folder in (first, second)]
    for state, result in zip(states, results, strict=True):
        del state["seconds"], result["train_seconds"]
    assert results[0] == results[1]
    for name in states[0]:
        assert same(states[0][name], states[1][name]), name


@pytest.mark.parametrize(
    ("base", "more"),
    [
        ("proxyanchor", ("--tcm", "--workers", 2)),
        ("arcface", ("--amp", "bf16", "--layer-norm")),
        ("multisimilarity", ("--amp", "fp16", "--size", 16)),
        ("recallatk", ("--tcm",)),
    ],
)
def test_stopped_at_any_step_it_goes_on(
    glyphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str, more: tuple[Any, ...]
) -> None:
    """Before the first checkpoint, after one in the middle of an epoch, and after one at its end."""
    options = ("--base", base, "--epochs", 2, "--checkpoint-every", 5, *more)
    main(command(glyphs, tmp_path / "whole", *options))
    step = Run._train_step
    done = 0

    def stopping(run: Run, x: Tensor, y: Tensor) -> Tensor:
        nonlocal done
        done += 1
        if done in (2, 10, 16):
            raise Stop
        return step(run, x, y)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_train_step", stopping)
        for _ in range(3):
            with pytest.raises(Stop):
                main(command(glyphs, tmp_path / "parts", *options))
    main(command(glyphs, tmp_path / "parts", *options))
    (name,) = results_in(tmp_path / "whole")
    assert_same_run(tmp_path / "whole" / name, tmp_path / "parts" / name)


def test_killed_in_the_middle_of_an_epoch(glyphs: Path, tmp_path: Path) -> None:
    """SIGKILL, twice; the same command then gives the same numbers to the last bit as without."""
    options = ("--base", "proxyanchor", "--tcm", "--epochs", EPOCHS, "--checkpoint-every", 1)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(out: Path) -> subprocess.Popen[str]:
        line = [sys.executable, "-m", "benchmarks.retrieval", *command(glyphs, out, *options)]
        return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True)

    whole = start(tmp_path / "whole")
    folder = tmp_path / "killed" / "folder-small-proxyanchor-tcm-seed0"
    checkpoint = folder / "checkpoint.pt"
    reached, kills = 0, 0
    while kills < 2:
        process = start(tmp_path / "killed")
        seen = {checkpoint.stat().st_mtime_ns} if checkpoint.exists() else set()
        while len(seen) < 4:  # a few steps further
            assert process.poll() is None, "finished before it could be killed"
            time.sleep(0.001)
            if checkpoint.exists():
                seen.add(checkpoint.stat().st_mtime_ns)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not (folder / "result.json").exists()
        before, reached = reached, torch.load(checkpoint, weights_only=True)["step"]
        assert before < reached < EPOCHS * STEPS
        kills += reached % STEPS > 0
    (folder / ".checkpoint.pt.1.part").write_bytes(b"half")  # as if it had been killed while it wrote
    said, _ = start(tmp_path / "killed").communicate(timeout=300)
    assert f"goes on from epoch {reached // STEPS}, step {reached % STEPS} of {STEPS}" in said
    whole.communicate(timeout=300)
    assert whole.returncode == 0
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.pt", "result.json"]
    assert_same_run(tmp_path / "whole" / folder.name, folder)


def test_dropout_goes_on_with_the_same_draws(glyphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backbone that draws at random as it trains."""
    plain = networks._small
    monkeypatch.setattr(networks, "_small", lambda: torch.nn.Sequential(*plain(), torch.nn.Dropout(0.3)))
    test_stopped_at_any_step_it_goes_on(glyphs, tmp_path, monkeypatch, "smoothap", ())
