"""The digits experiment: the images it may look at, how it chooses, and tables that agree with the scores."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from pytorch_metric_learning.losses import ProxyAnchorLoss
from torch import Tensor

import benchmarks.digits.__main__ as digits
from benchmarks import comparison
from benchmarks.comparison import MEASURES, Experiment, Scores, compare
from benchmarks.digits.__main__ import HELD_OUT, TCM, Job, choose_tcm, score_pair, split_of
from benchmarks.digits.training import SEEN, UNSEEN, Trained, check_paired, load, make_mlp, spread, train

OPIS, RECALL = MEASURES[0], MEASURES[2]


def rows(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def upright(digits_wanted: range | list[int] | tuple[int, ...], test: bool) -> set[bytes]:
    """The images of some digits, of one side of the split."""
    images = load()
    x, y = (images.test_x, images.test_y) if test else (images.train_x, images.train_y)
    return rows(x[torch.isin(y, torch.tensor(list(digits_wanted)))])


def test_unseen_digits_are_unseen() -> None:
    split = split_of(None)
    assert rows(split.train_x) >= upright(SEEN, test=False)
    assert rows(split.test_x) >= upright(UNSEEN, test=True)
    assert not rows(split.train_x) & rows(split.test_x)
    for y in (split.train_y, split.test_y):
        assert y.unique().tolist() == list(range(10))  # upright 0 to 4, turned 5 to 9


@pytest.mark.parametrize("fold", range(len(HELD_OUT)))
def test_choosing_looks_at_training_images_of_seen_digits_alone(fold: int) -> None:
    """Scored are the two digits held out, trained are the other three; of each, half of the images is turned."""
    split, held_out = split_of(fold), HELD_OUT[fold]
    others = [digit for digit in SEEN if digit not in held_out]
    for x, y, wanted in ((split.train_x, split.train_y, others), (split.test_x, split.test_y, held_out)):
        half = len(x) // 2
        assert rows(x[:half]) == upright(wanted, test=False)
        assert torch.equal(x[half:], x[:half].rot90(1, (2, 3)))
        assert torch.equal(y[half:], y[:half] + len(wanted))
    assert len(HELD_OUT) == 10 and all(len({*pair}) == 2 for pair in HELD_OUT)


def test_pairs_start_alike_and_are_repeatable() -> None:
    job = Job("CNN", "ProxyAnchor", None, seed=3, steps=2, tcm=TCM(0.9, 0.3, 3.0))
    first, again = score_pair(job), score_pair(job)
    assert first == again
    assert first[0] != first[1], "TCM changed nothing"
    assert score_pair(job._replace(seed=4))[0] != first[0]


def test_unlike_starts_and_batches_are_noticed() -> None:
    def trained(seed: int, steps: int = 1) -> Trained:
        return train(split_of(0), lambda: make_mlp(4), lambda c: ProxyAnchorLoss(c, 4), None, seed=seed, epochs=steps)

    one = trained(0)
    check_paired(one, trained(0), 0)
    for other in (trained(1), trained(0, steps=2)):
        with pytest.raises(RuntimeError, match="seed 0 did not start alike"):
            check_paired(one, other, 0)


def test_choice_keeps_recall() -> None:
    def job(weight: float) -> Job:
        return Job("MLP", "ArcFace", None, 0, 10, TCM(0.9, 0.5, weight))

    without = Scores(0.02, 0.05, 0.98)
    tried = {
        job(1): Scores(0.015, 0.1, 0.9751),  # the best that is allowed
        job(2): Scores(0.001, 0.0, 0.9749),  # costs more than half a point of recall@1
        job(3): Scores(0.016, 0.0, 0.99),
    }
    assert choose_tcm(without, tried) == job(1)
    worse = {job(1): Scores(0.001, 0.0, 0.90), job(2): Scores(0.9, 0.9, 0.95)}
    assert choose_tcm(without, worse) == job(2), "where all cost too much it is the one that costs least"


def made_up(changes: list[float], measure: str = "opis", start: float = 0.02) -> Experiment:
    """One experiment in which TCM changes a score by these, one a seed; the base differs from seed to seed."""
    base = Scores(0.02, 0.05, 0.9)
    without = {seed: base._replace(**{measure: start + 0.001 * seed}) for seed in range(len(changes))}
    with_tcm = {
        seed: scores._replace(**{measure: getattr(scores, measure) + changes[seed]}) for seed, scores in without.items()
    }
    return Experiment("net, loss", without, with_tcm)


@pytest.mark.parametrize(
    "changes, measure, clear",
    [
        ([-0.004, -0.006] * 5, "opis", True),  # lower OPIS is better
        ([0.004, 0.006] * 5, "opis", False),
        ([0.004, 0.006] * 5, "recall_at_1", True),  # higher recall is
        ([-0.004, -0.006] * 5, "recall_at_1", False),
        ([-0.005, 0.0049] * 5, "opis", None),
        ([-0.004, -0.006] * 4, "opis", None),  # too few seeds to say
        ([0.0] * 10, "opis", None),
    ],
)
def test_clear_changes(changes: list[float], measure: str, clear: bool | None) -> None:
    column = OPIS if measure == "opis" else RECALL
    found = compare(made_up(changes, measure), column)
    assert found.clear is clear
    better = sum(change < 0 if measure == "opis" else change > 0 for change in changes)
    assert found.better == better
    assert found.change == pytest.approx([column.factor * change for change in changes])


@pytest.mark.parametrize(
    ("seeds", "quantile"),
    [(10, 2.262), (20, 2.093), (100, 1.984)],  # of Student's t, as tables have it
)
def test_limit_of_clear(seeds: int, quantile: float) -> None:
    """Changes of mean 1 and a standard error just below, and just above, what is clear at 5 %."""
    for factor, clear in ((0.999, True), (1.001, None)):
        deviation = factor * math.sqrt(seeds) / quantile
        half = deviation * math.sqrt((seeds - 1) / seeds)  # of each change's distance from the mean
        changes = [-0.001 * (1 + sign * half) for sign in (1, -1) * (seeds // 2)]
        found = compare(made_up(changes), OPIS)
        assert found.clear is clear
        assert found.bar == pytest.approx(factor, rel=5e-4)


def test_one_in_twenty_is_clear_by_chance() -> None:
    """4000 experiments of 10 seeds that change nothing but by chance: 200, to within 3 standard deviations."""
    changes = torch.randn(4000, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = [compare(made_up(row), OPIS).clear for row in (changes / 1000).tolist()]
    assert abs(sum(clear is not None for clear in found) - 200) < 3 * math.sqrt(4000 * 0.05 * 0.95)


def test_table_says_what_the_scores_say() -> None:
    text = comparison.markdown([made_up([-0.004, -0.006] * 5), made_up([0.01], "recall_at_1", 0.9)])
    lines = text.splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|") == 12
    assert lines[2].startswith(
        "| net, loss | 10 | 24.5 +- 3.0 | 19.5 +- 3.0 | ↓ **-5.0 +- 1.1**, better in 10 | 50.0 +- 0.0 |"
    )
    assert lines[2].endswith("| 90.0 +- 0.0 | 90.0 +- 0.0 | = +0.0 +- 0.0, better in 0 |")
    assert lines[3].endswith("| 90.0 | 91.0 | ↑ +1.0, better in 1 |")


def test_spread() -> None:
    assert spread([1.0, 3.0], "+.1f") == "+2.0 +- 1.4"
    assert spread([-0.01], "+.1f") == "+0.0" and spread([-0.01], ".1f") == "0.0"  # too small to be shown: no sign
    assert spread([7895.4], ",.0f") == "7,895"


def test_only_paired_seeds_are_compared() -> None:
    whole = made_up([-0.001, -0.002, -0.003])
    part = whole._replace(with_tcm={1: whole.with_tcm[1]})
    assert compare(part, OPIS).change == pytest.approx([-2])
    alone = whole._replace(without={})
    assert comparison.markdown([alone]).splitlines()[2].startswith("| net, loss | 0 | - | 19.0 +- 0.0 | - | - | 50.0")
    with pytest.raises(ValueError, match="nothing to draw"):
        comparison.draw([alone], "")
    drawn = comparison.draw([alone, part], "")
    assert [label.get_text() for label in drawn.axes[0].get_yticklabels()] == ["net, loss"]


def test_command_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One network, two base losses, small: the files hold what is printed, and a second run writes the same."""
    monkeypatch.setattr(digits, "NETWORKS", {"MLP": digits.NETWORKS["MLP"]})
    monkeypatch.setattr(digits, "BASE_LOSSES", {k: digits.BASE_LOSSES[k] for k in ("ArcFace", "MultiSimilarity")})
    monkeypatch.setattr(digits, "HELD_OUT", HELD_OUT[:2])
    grid = (TCM(0.9, 0.5, 1.0), TCM(0.7, 0.3, 3.0))
    texts = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        digits.main(["--seeds", "2", "--processes", "1", "--steps", "1", "2", "--out", str(folder)], grid)
        text = (folder / "digits.md").read_text()
        assert capsys.readouterr().out.startswith(text)
        texts.append(text + (folder / "digits.json").read_text())
        assert (folder / "digits.png").read_bytes().startswith(b"\x89PNG")
        assert sorted(path.name for path in folder.iterdir()) == ["digits.json", "digits.md", "digits.png"]
    assert texts[0] == texts[1]
    content = json.loads((tmp_path / "a" / "digits.json").read_text())
    assert [e["name"] for e in content["experiments"]] == ["MLP, ArcFace", "MLP, MultiSimilarity"]
    for experiment in content["experiments"]:
        chosen = experiment["chosen"]
        assert chosen["steps"] in (1, 2)
        assert TCM(chosen["margin_plus"], chosen["margin_minus"], chosen["weight"]) in grid
        assert experiment["without"].keys() == experiment["with_tcm"].keys() == {"0", "1"}
        before = [1000 * scores["opis"] for scores in experiment["without"].values()]
        assert spread(before, ".1f") in texts[0].split(experiment["name"])[1]


def test_pictures_with_long_names() -> None:
    """Names and the axes' text stay on the page and off each other, and a "$" begins no formula."""
    long = r"ArcFace on a ResNet-50 pretrained on ImageNet-21k, Stanford Online Products, $\foo$"
    figure = comparison.draw([made_up([-0.004, -0.006] * 5)._replace(name=long), made_up([0.01])], long * 3)
    figure.draw_without_rendering()
    labels = [axes.xaxis.label.get_window_extent() for axes in figure.axes]
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(labels))
    for box in [*labels, *(label.get_window_extent() for label in figure.axes[0].get_yticklabels())]:
        assert figure.bbox.x0 - 1 <= box.x0
        assert box.x1 <= figure.bbox.x1 + 1
    assert figure.axes[0].get_window_extent().width > 0.2 * figure.bbox.width
