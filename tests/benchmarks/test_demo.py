"""The demo: its images, its measures and its pictures, and the whole of it, small."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from support import batches
from torch import Tensor

from benchmarks import demo
from benchmarks.demo import DIGITS, ROUND, UNSEEN_DIGITS, Job, Run, Score, densities, fit, measure, split_of
from benchmarks.digits.training import SEEN, UNSEEN, check_paired, load_mnist
from tcm_fused import opis


def rows(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_images_are_those_of_mnist() -> None:
    """Each once, on one side alone, each digit as often as any other."""
    split = load_mnist()
    assert split.train_x.shape == (3500, 1, 28, 28) and split.test_x.shape == (1500, 1, 28, 28)
    assert split.train_y.bincount().tolist() == [350] * 10 and split.test_y.bincount().tolist() == [150] * 10
    assert len(rows(split.train_x) | rows(split.test_x)) == 5000
    for x in (split.train_x, split.test_x):
        assert x.min() == 0 and x.max() == 1
        ink = x.mean(dim=(0, 1))
        assert ink[4:24, 4:24].mean() > 20 * ink[0].mean(), "digits are in the middle, on nothing"


def test_unseen_digits_are_unseen() -> None:
    seen, unseen = split_of(False), split_of(True)
    for x, y, digits, source, labels in (
        (unseen.train_x, unseen.train_y, SEEN, seen.train_x, seen.train_y),
        (unseen.test_x, unseen.test_y, UNSEEN, seen.test_x, seen.test_y),
    ):
        half = len(x) // 2
        assert rows(x[:half]) == rows(source[torch.isin(labels, torch.tensor(list(digits)))])
        assert torch.equal(x[half:], x[:half].rot90(1, (2, 3)))
        assert y.unique().tolist() == list(range(10))


def test_runs_of_a_seed_start_alike() -> None:
    task = UNSEEN_DIGITS._replace(epochs=1)
    without, with_tcm, again = (fit(Job(task, tcm, 0)) for tcm in (False, True, True))
    check_paired(without, with_tcm, 0)
    assert torch.equal(with_tcm.embeddings, again.embeddings)
    assert not torch.equal(with_tcm.embeddings, without.embeddings), "TCM changed nothing"
    assert without.embeddings.shape == (1500, UNSEEN_DIGITS.width)


def on_circle(degrees: Tensor, labels: Tensor) -> Run:
    """A run whose embeddings have these directions, and lengths that must not matter."""
    angle = degrees.double().deg2rad()
    length = 1 + torch.arange(len(angle), dtype=torch.float64) % 7
    x = (length[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)).float()
    return Run(0, True, x, labels, measure(DIGITS, x, labels))


def planted(spread: float) -> Run:
    """Ten classes 36 degrees apart, images of each from -spread to spread round its centre."""
    offsets = torch.tensor([-1.0, 0.0, 1.0]) * spread
    labels = torch.arange(10).repeat_interleave(3)
    return on_circle(36.0 * labels + offsets.repeat(10), labels)


def test_measures_of_planted_directions() -> None:
    compact, wide = planted(3), planted(20)
    assert compact.score.nearest_centre == 1.0 and compact.score.spread == pytest.approx(math.sqrt(6), rel=1e-3)
    assert wide.score.nearest_centre == pytest.approx(1 / 3) and wide.score.spread == pytest.approx(
        math.sqrt(800 / 3), rel=1e-3
    )
    # 7 degrees is m+: of each class the pairs 3 degrees apart are not hard, nor those 6 apart.
    assert (compact.score.count_plus, compact.score.count_minus) == (0, 0)
    # 20 and 40 degrees apart are hard; the nearest of two neighbours are 4 degrees past each other.
    assert (wide.score.count_plus, wide.score.count_minus) == (60, 20)


def test_densities_have_area_one_and_stand_where_the_images_are() -> None:
    curves = densities(planted(1))
    assert curves.shape == (10, len(ROUND))
    area = torch.trapezoid(curves, ROUND, dim=1)
    torch.testing.assert_close(area, torch.ones(10, dtype=torch.float64), rtol=1e-6, atol=0)
    peaks = ROUND[curves.argmax(dim=1)].rad2deg()
    torch.testing.assert_close(peaks % 360, 36.0 * torch.arange(10, dtype=torch.float64), rtol=0, atol=1e-9)
    assert densities(planted(10)).max() < 0.8 * curves.max(), "compact classes stand higher"


def test_labels_and_arrows_of_the_circle(tmp_path: Path) -> None:
    """Labels within the picture and apart, also where classes lie nearly on one spot."""
    labels = torch.arange(10).repeat_interleave(3)
    crowded = on_circle(2.0 * labels + torch.tensor([-0.5, 0.0, 0.5]).repeat(10), labels)
    figure = Figure(figsize=(7.5, 7.5))  # a panel as large as in the picture
    axes = figure.subplots()
    curves = densities(crowded)
    demo.draw_circle(axes, curves / curves.max(), demo.centres_of(crowded.embeddings, labels))
    figure.draw_without_rendering()
    digits = [text for text in axes.texts if text.get_text()]
    assert [text.get_text() for text in digits] == list("0123456789")
    boxes = [text.get_window_extent() for text in digits]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    for box in boxes:
        assert axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1
    demo.draw_directions(planted(5), planted(2), tmp_path / "directions.png")
    assert (tmp_path / "directions.png").read_bytes().startswith(b"\x89PNG")


def test_one_legend_and_titles_within_their_axes() -> None:
    x, y = batches.batch(200, 8, 10, torch.float32, seed=1)
    figure = Figure(figsize=(12, 9), layout="constrained")
    for axes in figure.subplots(2, 2).flat:
        opis(x, y).plot(axes)
        axes.set_title(f"Digits unseen, ArcFace + TCM\n{demo.one_line(axes)}", loc="left", fontsize=12)
    demo.share_legend(figure)
    figure.draw_without_rendering()
    assert [axes.get_legend() for axes in figure.axes] == [None] * 4
    assert len(figure.legends) == 1
    for axes in figure.axes:
        assert "10%-OPIS" in demo.one_line(axes)
        drawn: Any = axes  # the object of the left title has no public name
        assert drawn._left_title.get_window_extent().x1 <= axes.get_window_extent().x1


def test_command_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One epoch and one seed; the losses are timed at two sizes."""
    monkeypatch.setattr(demo, "SIZES", (64, 128))
    monkeypatch.setattr(demo, "OPEN_SEEDS", 1)
    demo.main(["--epochs", "1", "--seeds", "1", "--processes", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for line in ("3,500 digits to train on, 1,500 to test", "nearest to the centre of its class, %", "half hard"):
        assert line in printed
    assert printed.count("OPIS, x 1000") == 4, "two tables, each with OPIS and 10%-OPIS"
    names = ("directions", "opis", "pareto", "similarities", "speed")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"demo_{name}.png" for name in names]
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    assert all(f"{tmp_path / f'demo_{name}.png'}" in printed for name in names)


def test_score_tells_the_worst_class() -> None:
    score: Score = planted(3).score
    assert score.accepts.shape == (10,) and score.accepts.min() == 1
