"""Lists of trials: the peers' own numbers, LFW's protocol by hand, and files in every form."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import fbeta_score, precision_score, roc_auc_score, roc_curve
from support.oracle import Array
from torchmetrics.functional.classification import binary_eer

from tcm_fused import Threshold, evaluate_trials
from tcm_fused.thresholds.intervals import binomial_interval, rate_interval
from tcm_fused.thresholds.pairing import NothingToMeasure
from tcm_fused.thresholds.trial_files import read_trials, rows_of
from tcm_fused.thresholds.trials import fold_accuracy, trial_similarities

ONE_LIST: Any = ([1],)


def drawn(seed: int, n: int = 200, ties: bool = False) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    same = rng.random(n) < 0.4
    same[:2] = [True, False]
    scores = rng.normal(size=n) + same
    return (np.round(scores, 1) if ties else scores), same


@given(seed=st.integers(0, 2**32), n=st.integers(2, 60), ties=st.booleans())
@settings(max_examples=60)
def test_rates_are_those_of_scikit_learn(seed: int, n: int, ties: bool) -> None:
    scores, same = drawn(seed, n, ties)
    fpr, tpr, thresholds = roc_curve(same, scores, drop_intermediate=False)
    found = evaluate_trials(scores, same, eer=True)
    assert found.curve.thresholds[::-1][1:].tolist() == thresholds[1:].tolist()
    assert np.allclose(found.curve.far[::-1], fpr, rtol=0, atol=1e-15)
    assert np.allclose(1 - found.curve.frr[::-1], tpr, rtol=0, atol=1e-15)
    assert found.auc == pytest.approx(roc_auc_score(same, scores), abs=1e-12)
    for bound in (0.01, 0.2, 0.7):
        at = evaluate_trials(scores, same, far=bound)
        assert at.far <= bound
        assert at.frr == pytest.approx(1 - tpr[fpr <= bound].max())
        at = evaluate_trials(scores, same, frr=bound)
        assert at.frr <= bound
        assert at.far == pytest.approx(fpr[1 - tpr <= bound].min())


@pytest.mark.parametrize("seed", range(8))
def test_equal_error_is_that_of_torchmetrics(seed: int) -> None:
    scores, same = drawn(seed, 300)
    scores = 1 / (1 + np.exp(-scores))  # which torchmetrics wants to be probabilities
    expected = binary_eer(torch.from_numpy(scores), torch.from_numpy(same).long())
    assert evaluate_trials(scores, same, eer=True).equal_error_rate == pytest.approx(float(expected), abs=1e-6)


@given(seed=st.integers(0, 2**32), miss=st.sampled_from([1.0, 10.0]), accept=st.sampled_from([1.0, 0.5]))
@settings(max_examples=20)
def test_other_targets_by_trying_every_threshold(seed: int, miss: float, accept: float) -> None:
    scores, same = drawn(seed, 50, ties=True)
    rates = [((scores[~same] >= t).mean(), (scores[same] < t).mean()) for t in [*np.unique(scores), 99.0]]
    least = min(miss * 0.05, accept * 0.95)
    costs = [(miss * 0.05 * frr + accept * 0.95 * far) / least for far, frr in rates]
    found = evaluate_trials(scores, same, min_dcf=0.05, costs=(miss, accept))
    assert found.cost == pytest.approx(min(costs))
    assert found.cost is not None and found.cost <= 1
    accepted = [scores >= t for t in np.unique(scores)]
    at = evaluate_trials(scores, same, f_beta=2.0).threshold.similarity
    scored = [fbeta_score(same, a, beta=2) for a in accepted]
    assert fbeta_score(same, scores >= at, beta=2) == pytest.approx(max(scored))
    best = max((a & same).sum() / a.sum() for a in accepted)
    found = evaluate_trials(scores, same, precision=0.9 * best)
    assert found.precision >= 0.9 * best
    assert found.precision == pytest.approx(precision_score(same, scores >= found.threshold.similarity))


def test_given_threshold_and_intervals() -> None:
    found = evaluate_trials([0.9, 0.8, 0.3, 0.7, 0.2, 0.1], [1, 1, 1, 0, 0, 0], threshold=0.5)
    assert (found.far, found.frr, found.precision) == (1 / 3, 1 / 3, 2 / 3)
    assert found.accuracy == pytest.approx(4 / 6)
    assert found.far_interval == binomial_interval(1, 3)
    assert found.accepted == (2, 1)
    assert evaluate_trials([2, 1], [True, False], threshold=Threshold(1.5, metric="score")).far == 0
    assert found.threshold == Threshold(0.5, metric="score")
    found = evaluate_trials([0.9, 0.1], [1, 0], far=0.5, metric="cosine")
    assert found.threshold.metric == "cosine"
    for text in (repr(found), found.report()):
        assert "2 trials, 1 of them match" in text
    assert found.to_dict()["auc"] == 1
    assert list(found.to_frame()) == ["threshold", "far", "frr", "precision"]


def test_intervals_from_subject_to_subject() -> None:
    """Each left out in turn, with all trials in which it is on either side."""
    rng = np.random.default_rng(0)
    first, second = rng.integers(12, size=(2, 300))
    same = first == second
    same[:20] = True
    scores = rng.normal(size=300) + same + 0.7 * (first % 3)
    found = evaluate_trials(scores, same, threshold=0.5, subjects=(first, second))
    without = []
    for c in range(12):
        kept = (first != c) & (second != c) & ~same
        without.append((scores[kept] >= 0.5).mean())
    assert found.far_interval == pytest.approx(rate_interval(found.far, np.array(without), int((~same).sum())))
    independent = evaluate_trials(scores, same, threshold=0.5).far_interval
    assert found.far_interval.high - found.far_interval.low > independent.high - independent.low


def test_protocol_of_lfw_by_hand() -> None:
    """Three folds of two matches and two others. Of folds 1 and 2 the best threshold lies between 0.5 and 0.6, and so
    on; the third's match at 0.45 is missed by it."""
    scores = np.array([0.9, 0.6, 0.5, 0.1, 0.8, 0.7, 0.4, 0.2, 0.95, 0.45, 0.3, 0.05])
    same = np.array([1, 1, 0, 0] * 3, dtype=bool)
    found = fold_accuracy(scores, same, 3)
    # Without fold 0: matches 0.8 0.7 0.95 0.45, others 0.4 0.2 0.3 0.05: perfect between 0.4 and 0.45.
    # Without fold 1: matches 0.9 0.6 0.95 0.45, others 0.5 0.1 0.3 0.05: one error, first between 0.3 and 0.45.
    # Without fold 2: matches 0.9 0.6 0.8 0.7, others 0.5 0.1 0.4 0.2: perfect between 0.5 and 0.6.
    assert found.thresholds == pytest.approx([0.425, 0.375, 0.55])
    assert found.accuracies.tolist() == [0.75, 0.75, 0.75]
    assert (found.accuracy, found.standard_error) == (0.75, 0)
    shuffled = np.random.default_rng(0).permutation(12)
    by_name = fold_accuracy(scores[shuffled], same[shuffled], np.repeat(["a", "b", "c"], 4)[shuffled])
    assert by_name.thresholds.tolist() == found.thresholds.tolist()
    result = evaluate_trials(scores, same, far=0.2, folds=3)
    assert result.folds is not None
    assert "accuracy 75.00 +- 0.00 % over 3 folds" in result.report()
    uneven = fold_accuracy(scores, same, 2)
    assert uneven.standard_error == pytest.approx(uneven.accuracies.std(ddof=1) / math.sqrt(2))


def test_similarities_of_rows() -> None:
    x = np.array([[3.0, 0.0], [0.0, 1e-3], [1.0, 1.0]])
    assert trial_similarities(x, [0, 0, 2], [1, 2, 2]) == pytest.approx([0, math.sqrt(0.5), 1])
    with pytest.raises(ValueError, match="trials name row 3, but there are rows 0 to 2 only"):
        trial_similarities(x, [0], [3])
    with pytest.raises(ValueError, match="first: trials name row -1, but there are rows 0 to 2 only"):
        trial_similarities(x, [-1, 2], [0, 1])
    with pytest.raises(ValueError, match="one place for each trial, got 2 and 1"):
        trial_similarities(x, [0, 1], [2])
    with pytest.raises(TypeError, match="second must hold the places of rows, integers, got float64"):
        trial_similarities(x, [0], [1.0])
    with pytest.raises(ValueError, match=r"first must have shape \[P\], got \[1, 1\]"):
        trial_similarities(x, [[0]], [1])
    assert len(trial_similarities(x, [], [])) == 0
    with pytest.raises(ValueError, match="those of trial 1 are not"):
        trial_similarities(np.array([[1.0], [math.nan]]), [0, 1], [0, 1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: evaluate_trials([1, 2], [1, 1], far=0.1), NothingToMeasure, "trials must be of both kinds, got 2"),
        (lambda: evaluate_trials([], [], far=0.1), NothingToMeasure, "trials must be of both kinds, got 0"),
        (lambda: evaluate_trials([1, math.nan], [1, 0], far=0.1), ValueError, "trial 1 has none"),
        (lambda: evaluate_trials(["a", "b"], [1, 0], far=0.1), TypeError, "scores must be numbers"),
        (lambda: evaluate_trials([1, 2], [1, 2], far=0.1), ValueError, "same must be truth values, or 0 and 1"),
        (lambda: evaluate_trials([1, 2], [1], far=0.1), ValueError, r"same must have shape \[2\]"),
        (lambda: evaluate_trials([1, 2], [1, 0]), ValueError, "give exactly one of"),
        (lambda: evaluate_trials([1, 2], [1, 0], far=0.1, eer=True), ValueError, "give exactly one of"),
        (lambda: evaluate_trials([1, 2], [1, 0], threshold=1, far=0.1), ValueError, "got both: far"),
        (lambda: evaluate_trials([1, 2], [1, 0], far=1.5), ValueError, "far must lie between 0 and 1"),
        (lambda: evaluate_trials([1, 2], [1, 0], threshold=math.inf), ValueError, "threshold must be finite"),
        (lambda: evaluate_trials([1, 2], [1, 0], eer=True, folds=3), ValueError, "folds must be from 2 to"),
        (lambda: evaluate_trials([1, 2], [1, 0], eer=True, folds=[1, 1]), ValueError, "at least two folds"),
        (lambda: evaluate_trials([1, 2], [1, 0], eer=True, folds=[1]), ValueError, "one for each of 2 trials"),
        (
            lambda: evaluate_trials([1, 2], [1, 0], min_dcf=0.1, costs=(0, 1)),
            ValueError,
            "of a miss must be above",
        ),
        (lambda: evaluate_trials([1, 2], [1, 0], far=0.1, costs=(2, 1)), ValueError, "are those of min_dcf"),
        (lambda: evaluate_trials([1, 2], [1, 0], eer=True, subjects=([1], [2])), ValueError, "subjects must be two"),
        (
            lambda: evaluate_trials([1, 2], [1, 0], eer=True, subjects=ONE_LIST),
            TypeError,
            "subjects must be a pair",
        ),
        (lambda: evaluate_trials([1e308, 2], [1, 0], eer=True), ValueError, "scores must be at most 1e[+]300 in size"),
        (lambda: evaluate_trials([1, 2], [1, 0], eer=True, metric="cosine"), ValueError, "must be cosine similarities"),
        (
            lambda: evaluate_trials([0.5, 1.0], [1, 0], far=0.1, metric="cosine"),
            NothingToMeasure,
            "no threshold up to 1 meets far=0.1: a trial of no match has similarity 1",
        ),
        (
            lambda: evaluate_trials([0.5, 1.0], [1, 0], min_dcf=0.01, metric="cosine"),
            NothingToMeasure,
            "rejecting all trials is best by min_dcf=0.01, but one has similarity 1",
        ),
        (lambda: evaluate_trials([1, 2], [1, 0], threshold=1, costs=(2, 1)), ValueError, "costs=.2, 1. are those of"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_threshold_is_one_on_its_own_scale() -> None:
    with pytest.raises(ValueError, match="must be cosine similarities, from -1 to 1, got 20"):
        evaluate_trials([10, 20.0], [1, 0], threshold=Threshold(0.5))
    for metric, other in (("cosine", "score"), ("score", "cosine")):
        with pytest.raises(ValueError, match=f"one on metric='{metric}', but the scores are of metric='{other}'"):
            evaluate_trials([0.1, 0.2], [1, 0], threshold=Threshold(0.5, metric=metric), metric=other)
    with pytest.raises(ValueError, match="for embeddings of 16 columns, got 8"):
        evaluate_trials([0.1, 0.2], [1, 0], threshold=Threshold(0.5, columns=16), columns=8)
    with pytest.raises(ValueError, match="columns=8 are those of embeddings, so metric must be 'cosine'"):
        evaluate_trials([0.1, 0.2], [1, 0], eer=True, columns=8)
    assert evaluate_trials([0.9, 0.2], [1, 0], far=0.5, metric="cosine", columns=8).threshold.columns == 8
    assert evaluate_trials([0.9, 0.2], [1, 0], threshold=Threshold(0.5)).threshold.metric == "cosine"
    assert evaluate_trials([1 + 1e-7, 0.2], [1, 0], threshold=1.0, metric="cosine").frr == 0, "rounded above 1"


# Files.

LFW = "2\t1\nAnn\t1\t4\nAnn\t1\tBob Lee\t12\nBob Lee\t2\t3\nAnn\t2\tBob Lee\t1\n"
FORMS = {
    "voxceleb": "1 p1/a.wav p1/b.wav\n0 p1/a.wav p2/c.wav\n",
    "last": "p1/a.wav p1/b.wav 1\np1/a.wav p2/c.wav 0\n",
    "kaldi": "p1/a.wav p1/b.wav target\np1/a.wav p2/c.wav nontarget\n",
    "csv": "1,p1/a.wav,p1/b.wav\n0,p1/a.wav,p2/c.wav\n",
    "header": "image1;image2;is_same\np1/a.wav;p1/b.wav;1\np1/a.wav;p2/c.wav;0\n",
    "tabs": "\ufeffsame\ta\tb\nTrue\tp1/a.wav\tp1/b.wav\nFalse\tp1/a.wav\tp2/c.wav\n\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_the_same(form: str, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(FORMS[form])
    found = read_trials(tmp_path / "t.txt")
    assert found.same.tolist() == [True, False]
    assert (found.first, found.second) == (["p1/a.wav", "p1/a.wav"], ["p1/b.wav", "p2/c.wav"])
    assert found.scores is None


def test_pairs_of_lfw(tmp_path: Path) -> None:
    (tmp_path / "pairs.txt").write_text(LFW)
    found = read_trials(tmp_path / "pairs.txt")
    assert found.same.tolist() == [True, False, True, False]
    assert found.first == ["Ann_0001", "Ann_0001", "Bob Lee_0002", "Ann_0002"]
    assert found.second == ["Ann_0004", "Bob Lee_0012", "Bob Lee_0003", "Bob Lee_0001"]
    assert found.folds is not None
    assert found.folds.tolist() == [0, 0, 1, 1]
    assert found.subjects == (["Ann", "Ann", "Bob Lee", "Ann"], ["Ann", "Bob Lee", "Bob Lee", "Bob Lee"])
    (tmp_path / "dev.txt").write_text(LFW.replace("2\t1\nAnn", "2\nAnn", 1))
    assert read_trials(tmp_path / "dev.txt").folds is None


@pytest.mark.parametrize(
    ("text", "subjects"),
    [
        ("1 p1/v/a p1/w/b\n0 p1/v/a p2/v/a\n", (["p1", "p1"], ["p1", "p2"])),
        ("1 wav/p1/a wav/p1/b\n0 wav/p1/a wav/p2/a\n", (["p1", "p1"], ["p1", "p2"])),
        ("1 cam1/a cam2/b\n0 cam1/a cam1/c\n", (["cam1/a", "cam1/a"], ["cam2/b", "cam1/c"])),
        ("1 y b\n0 y d\n", (["y", "y"], ["b", "d"])),
        ("1 7 3\n1 7 9\n0 4 5\n", (["7", "7", "4"], ["3", "9", "5"])),
    ],
)
def test_subjects_are_folders_that_agree_where_trials_match(text: str, subjects: Any, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(text)
    assert read_trials(tmp_path / "t.txt").subjects == subjects


@pytest.mark.parametrize(
    "text", ["0.9 1\n0.2 0\n", "1,0.9\n0,0.2\n", "score,label,fold\n0.9,1,a\n0.2,0,b\n", "90 1\n20 0\n"]
)
def test_scores(text: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text)
    found = read_trials(tmp_path / "t.csv")
    assert found.scores is not None
    assert found.scores.tolist() == ([90, 20] if "90" in text else [0.9, 0.2])
    assert found.same.tolist() == [True, False]
    assert (found.folds is not None) == ("fold" in text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        ("a b\nc d\n", "neither the first nor the last column is 0 and 1"),
        ("1 2 1\n0 3 0\n", "both the first and the last column are 0 and 1"),
        ("1 a b\n0 a\n", "line 2 has 2 columns, the first has 3"),
        ("1 a b c\n", "line 1 has 4 columns"),
        ("a,b,same\n", "no trial below the header"),
        ("a,b,same\nx,y,2\n", "line 2 must say 0 or 1 of a match, got '2'"),
        ("x,same\n1,1\n", "must name the columns a, b and same, or score and same"),
        ("score,same\nhigh,1\n", "line 2 has no score but 'high'"),
        ("score,same\n0.5,1\n\nNaN,1\n", "line 4 has no score but 'NaN'"),
        ("0.5 1\n-inf 0\n", "line 2 has no score but '-inf'"),
        (LFW + "Ann\t1\t2\n", "tells of 2 x 2 pairs, but there are 5"),
        (LFW.replace("12", "x"), "line 3 is neither"),
    ],
)
def test_bad_files(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(ValueError, match=f"cannot read trials from .*t.txt: .*{message}"):
        read_trials(tmp_path / "t.txt")
    with pytest.raises(ValueError, match=r"cannot read trials from .*none\.txt: No such file"):
        read_trials(tmp_path / "none.txt")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="it is no text"):
        read_trials(tmp_path / "b.txt")


def test_rows_by_name_and_number() -> None:
    assert rows_of(["0", "2"], None, 3).tolist() == [0, 2]
    rows = ["lfw/Ann/Ann_0001.jpg", "lfw/Bob/Bob_0001.jpg", "other/Ann_0002.png"]
    assert rows_of(["Ann_0002", "Bob_0001", "lfw/Ann/Ann_0001.jpg"], rows, 3).tolist() == [2, 1, 0]
    with pytest.raises(ValueError, match=r"trials name 2 rows that are not there, the first is '3'.*0 to 2"):
        rows_of(["0", "3", "x", "x"], None, 3)
    with pytest.raises(ValueError, match="trials name 1 rows that are not there, the first is 'Eve_0001'"):
        rows_of(["Eve_0001"], rows, 3)
    with pytest.raises(ValueError, match="trials name 'a', which several rows are named"):
        rows_of(["a"], ["x/a.png", "y/a.png"], 2)
    with pytest.raises(ValueError, match="there are 2 names for 3 rows"):
        rows_of(["a"], ["a", "b"], 3)


@pytest.mark.parametrize(
    ("name", "rows", "place"),
    [
        ("id9/00001.wav", ["id1/00001.wav", "id2/00002.wav"], None),
        ("face.v2", ["face.v1", "face.v3"], None),
        ("face.v2", ["face.v1.png", "face.v2.png"], 1),
        ("Dr._0001", ["Dr._0002.jpg", "Dr._0001.jpg"], 1),
        ("J.R._Smith_0001", ["J.R._Smith_0001.JPEG", "J.R._Smith_0010.jpg"], 0),
        ("id2/v/00001.wav", ["/data/wav/id1/v/00001.npy", "/data/wav/id2/v/00001.npy"], 1),
        ("wav/id2/00001.wav", ["id1/00001.wav", "id2/00001.wav"], 1),
        ("./id2/00001", ["id1/00001.wav", "id2\\00001.wav"], 1),
        ("x/a.jpg", ["a.png", "a.jpg"], 1),
        ("a.jpg", ["a.png", "a.webp"], -1),
        ("a", ["b/a", "a"], 1),
        ("b/a", ["c/a", "d/a"], None),
    ],
)
def test_a_name_is_found_by_its_path_or_not_at_all(name: str, rows: list[str], place: int | None) -> None:
    if place is None or place < 0:
        with pytest.raises(ValueError, match="not there" if place is None else "which several rows are named"):
            rows_of([name], rows, len(rows))
    else:
        assert rows_of([name, name], rows, len(rows)).tolist() == [place, place]
