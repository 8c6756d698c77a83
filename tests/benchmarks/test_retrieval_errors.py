"""The retrieval experiment refuses with exit code 2, a message that names what is wrong, and nothing written."""

import fcntl
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.retrieval import PNG, command, fake_timm, refuse, results_in

from benchmarks.retrieval.__main__ import main
from benchmarks.retrieval.datasets import DATASETS
from benchmarks.retrieval.drawn import draw_folder
from benchmarks.retrieval.losses import BASES
from benchmarks.retrieval.training import Run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--root", "ROOT/none"), "there is no folder"),
        (("--dataset", "sop"), "Ebay_train.txt"),
        (("--dataset", "mnist"), "invalid choice: 'mnist'"),
        (("--base", "triplet"), "invalid choice: 'triplet'"),
        (("--backbone", "resnet50"), "--backbone resnet50 needs timm"),
        (("--pretrained",), "leave --pretrained out"),
        (("--batch-classes", "13"), "more than the 12 classes"),
        (("--batch-images", "1"), "must be a whole number, 2 or above, got 1"),
        (("--epochs", "0"), "must be a whole number, 1 or above, got 0"),
        (("--seeds", "0", "-1"), "must be a whole number, 0 or above, got -1"),
        (("--lr", "fast"), "must be a number, 0 or above, got fast"),
        (("--lr", "nan"), "must be a number, 0 or above, got nan"),
        (("--margin-plus", "1.5"), "must be a number, from -1 to 1, got 1.5"),
        (("--min-crop", "0"), "must be a number, from 0.01 to 1, got 0"),
        (("--test-set", "small"), "--test-set is of vehicleid"),
        (("--markdown", "t.md"), "--markdown is of --table"),
        (("--caption", "x"), "--caption is of --table"),
        (("--table", "out"), "not allowed with argument"),
        (("--lambda-plus", "0.1"), "--lambda-plus is of --tcm"),
        (("--lambda-minus", "1"), "--lambda-minus is of --tcm"),  # its default, but asked for
        (("--margin-plus", "0.8"), "--margin-plus is of --tcm"),
        (("--margin-minus", "0.4"), "--margin-minus is of --tcm"),
        (("--loss-lr", "0.1"), "--loss-lr is of base losses with class weights, proxyanchor and arcface"),
        (("--size", "8"), "16 or above"),
    ],
)
def test_bad_input(
    glyphs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    arguments = command(glyphs, tmp_path / "out", *(text.replace("ROOT", str(tmp_path)) for text in more))
    assert message in refuse(capsys, arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error is that of a machine without a GPU")
def test_no_gpu(glyphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "this torch sees no GPU" in refuse(capsys, command(glyphs, tmp_path, "--device", "cuda"))


def test_a_size_that_the_backbone_refuses(
    glyphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_timm(monkeypatch)
    said = refuse(capsys, command(glyphs, tmp_path / "out", "--backbone", "resnet50", "--size", 32))
    assert "does not take images of --size 32" in said
    assert not list(tmp_path.iterdir())


def test_neither_task_nor_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert "one of the arguments --dataset --table is required" in refuse(capsys, [])
    assert "--dataset needs --root" in refuse(capsys, ["--dataset", "cub"])
    assert "--dataset needs --base" in refuse(capsys, ["--dataset", "cub", "--root", "."])


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    """Examples, how it goes on, and for every data set its files and where it comes from."""
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    for name, about in DATASETS.items():
        assert f"{name}: {about.source}\n{about.layout}" in said
    for word in ("examples:", "goes on", "Exit code 2", *BASES):
        assert word in said


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read(
    glyphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    root = tmp_path / "glyphs"
    shutil.copytree(glyphs, root)
    for path in (root / "class_000").iterdir():
        path.write_bytes(PNG)
    said = refuse(capsys, command(root, tmp_path / "out", "--workers", workers, "--batch-classes", 12))
    assert "cannot read image" in said and "class_000" in said
    assert len(said.strip().splitlines()) == 1
    assert not list((tmp_path / "out").rglob("*.*"))


def test_too_few_test_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 9 negative pairs none is 1 % to 10 %: refused before training; 10 can be scored."""
    draw_folder(tmp_path / "drawn", classes=4, images=5)

    def arguments(name: str, sizes: tuple[int, ...]) -> list[str]:
        for k, (target, images) in enumerate(zip(("train/a", "train/b", "test/c", "test/d"), sizes, strict=True)):
            shutil.copytree(tmp_path / "drawn" / f"class_{k:03d}", tmp_path / name / target)
            for path in sorted((tmp_path / name / target).iterdir())[images:]:
                path.unlink()
        return command(tmp_path / name, tmp_path / "out", "--batch-classes", 2, "--epochs", 1)

    said = refuse(capsys, arguments("few", (3, 3, 3, 3)))
    assert "has 9 pairs of images of different classes" in said and "at least 10" in said
    assert not (tmp_path / "out").exists()
    main(arguments("enough", (3, 3, 5, 2)))
    assert len(results_in(tmp_path / "out")) == 1


def test_a_loss_that_is_not_finite(glyphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refuse(capsys, command(glyphs, tmp_path, "--lr", 1e30, "--warmup", 0, "--epochs", 1))
    assert "the loss is nan" in said
    assert not list(tmp_path.rglob("*.*"))


def test_folders_of_other_runs(glyphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other settings, a damaged checkpoint, another process: refused, and nothing of it is lost."""
    main(command(glyphs, tmp_path))
    (folder,) = tmp_path.iterdir()
    for name in ("result.json", "checkpoint.pt"):  # finished, then with its checkpoint alone
        said = refuse(capsys, command(glyphs, tmp_path, "--epochs", 3))
        assert "holds a run with other settings (epochs 2 then, 3 now)" in said
        assert (folder / name).exists()
        (folder / "result.json").unlink(missing_ok=True)
    for text in ("{}", "{", "[]", json.dumps({"identity": {}, "scores": {"recall_at_1": 0.5}})):
        (folder / "result.json").write_text(text)
        assert "result.json is damaged" in refuse(capsys, command(glyphs, tmp_path))
    (folder / "result.json").unlink()
    whole = (folder / "checkpoint.pt").read_bytes()
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save({**state, "random": state["random"][:9]}, tmp_path / "short.pt")
    torch.save({**state, "optimizer": {**state["optimizer"], "param_groups": []}}, tmp_path / "groups.pt")
    torch.save([state], tmp_path / "list.pt")
    for name, step in (("text", "one"), ("far", 10**6), ("none", None), ("below", -1)):
        torch.save({**state, "step": step}, tmp_path / f"{name}.pt")
    names = ("short", "groups", "list", "text", "far", "none", "below")
    saved = [(tmp_path / f"{name}.pt").read_bytes() for name in names]
    for content in (whole[: len(whole) // 2], b"", b"garbage", bytes(range(1, 200)), b"\x80\x02}q\x00.", *saved):
        (folder / "checkpoint.pt").write_bytes(content)
        said = refuse(capsys, command(glyphs, tmp_path))
        assert f"{folder / 'checkpoint.pt'} is damaged or of another version" in said and "weights_only" not in said
        assert len(said.splitlines()) == 1
    (folder / "checkpoint.pt").write_bytes(whole)
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert "another process is at the run" in refuse(capsys, command(glyphs, tmp_path))
    os.close(handle)
    main(command(glyphs, tmp_path))
    assert "goes on from epoch 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("base", "more", "loss_lr"),
    [("arcface", (), 0.2), ("proxyanchor", ("--loss-lr", 0.3), 0.3), ("smoothap", (), None)],
)
def test_rate_of_class_weights(glyphs: Path, tmp_path: Path, base: str, more: tuple[Any, ...], loss_lr: Any) -> None:
    """100 times that of the network unless given; losses without such weights have none."""
    main(command(glyphs, tmp_path, "--base", base, "--epochs", 1, "--lr", 0.002, *more))
    (found,) = results_in(tmp_path).values()
    assert found["identity"]["loss_lr"] == (loss_lr if loss_lr is None else pytest.approx(loss_lr))


def test_interrupted(
    glyphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_train_step", interrupt)
    with pytest.raises(SystemExit) as left:
        main(command(glyphs, tmp_path))
    assert left.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_the_folder_of_runs_is_looked_at_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the data set, which is not there."""
    (tmp_path / "file").write_text("")
    call = [
        "--dataset",
        "folder",
        "--root",
        str(tmp_path / "none"),
        "--base",
        "smoothap",
        "--out",
        str(tmp_path / "file"),
    ]
    assert "cannot write into" in refuse(capsys, call)
