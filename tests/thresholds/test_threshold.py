"""`Threshold`: saved and loaded with all digits, applied to similarities and embeddings, and what is refused."""

import copy
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import batches

from tcm_fused import Threshold, calibrate, evaluate

X, Y = batches.batch(120, 8, 10)
WRONG: Any = Threshold  # takes arguments that a type checker would refuse


@given(st.floats(-1, 1))
def test_all_digits_survive(similarity: float) -> None:
    content = json.loads(json.dumps(Threshold(similarity).to_dict()))
    assert content["similarity"] == similarity
    assert Threshold(**{k: content[k] for k in ("similarity", "metric")}).similarity == similarity


def test_save_and_load(tmp_path: Path) -> None:
    """Whatever was found, by all its targets, and how."""
    for target in ({"far": 0.01}, {"eer": True}, {"min_dcf": 0.05, "costs": (1.0, 10.0)}, {"coverage": 0.9}):
        found = calibrate(X, Y, **target).threshold
        found.save(tmp_path / "t.json")
        loaded = Threshold.load(str(tmp_path / "t.json"))
        assert loaded == found == copy.deepcopy(found) == pickle.loads(pickle.dumps(found))
        assert hash(loaded) == hash(found)
        assert (loaded.columns, loaded.pairs) == (8, calibrate(X, Y, far=0.5).pairs)
        assert [path.name for path in tmp_path.iterdir()] == ["t.json"]
    assert loaded.target == {"coverage": 0.9}
    Threshold(0.25).save(tmp_path / "t.json")
    assert Threshold.load(tmp_path / "t.json").similarity == 0.25
    assert math.isnan(Threshold.load(tmp_path / "t.json").far)


def test_a_calibration_stands_for_its_threshold(tmp_path: Path) -> None:
    found = calibrate(X, Y, far=0.1)
    found.save(tmp_path / "t.json")
    assert Threshold.load(tmp_path / "t.json") == found.threshold
    assert (found.similarity, found.distance) == (found.threshold.similarity, found.threshold.distance)
    assert found.accepts([found.similarity, -0.9]).tolist() == [True, False]
    assert evaluate(X, Y, threshold=found).far == found.threshold.far


def test_distances() -> None:
    found = Threshold(0.5)
    assert found.distance == pytest.approx(1.0)
    assert found.cosine_distance == 0.5
    assert found.distance == calibrate(X, Y, far=0.1).threshold.__class__(0.5).distance
    assert math.isnan(Threshold(3.0, metric="score").distance)


def test_frozen_and_told_in_a_line() -> None:
    with pytest.raises(AttributeError):
        setattr(Threshold(0.5), "similarity", 0.4)  # noqa: B010  # a type checker refuses it as an assignment
    text = repr(calibrate(X, Y, far=0.1).threshold)
    assert "far=0.1" in text
    assert "\n" not in text
    assert repr(Threshold(0.5)) == "Threshold(cosine 0.5)"


def test_accepts_similarities() -> None:
    """As the counts do: in every dtype by the number itself, and not by its rounding to that dtype."""
    for t in (0.3, 0.1, -0.7, 1 / 3, 1.0, -1.0, 0.0):
        near = np.nextafter(np.float32(t), np.array([-2, 2], dtype=np.float32))
        values = np.array([near[0], np.float32(t), near[1]], dtype=np.float32)
        expected = (values.astype(np.float64).clip(-1, 1) >= t).tolist()  # at -1 all are accepted
        assert Threshold(t).accepts(values).tolist() == expected
        found = Threshold(t).accepts(torch.from_numpy(values))
        assert isinstance(found, torch.Tensor)
        assert found.tolist() == expected
        halves = torch.tensor([t - 0.01, t, t + 0.01], dtype=torch.float16).clamp(-1, 1)
        assert Threshold(t).accepts(halves).tolist() == (halves.double() >= t).tolist()
    assert Threshold(0.5).accepts(0.5) is True
    assert Threshold(0.5).accepts([[0.4, 0.6], [0.5, 0.1]]).tolist() == [[False, True], [True, False]]
    assert Threshold(0.5).accepts([]).tolist() == []


def test_accepts_pairs_of_embeddings() -> None:
    t = Threshold(0.6, columns=2)
    assert t.accepts([3.0, 0.0], [6.0, 8.0]) is True
    assert t.accepts(np.array([1, 0]), np.array([[2, 0], [0, 1], [-1, 0]])).tolist() == [True, False, False]
    rows = torch.tensor([[1.0, 0.0], [1e-6, 0.0]])
    assert t.accepts(rows, torch.tensor([[0.0, 1.0], [1e30, 0.0]])).tolist() == [False, True]
    assert t.accepts([0.0, 0.0], [1.0, 0.0]) is False


def test_accepts_as_it_was_counted() -> None:
    found = calibrate(X.double(), Y, far=0.05).threshold
    i, j = np.triu_indices(len(X), 1)
    accepted = found.accepts(X.double()[i], X.double()[j]).numpy()
    same = (Y[i] == Y[j]).numpy()
    assert accepted[~same].mean() == pytest.approx(found.far)
    assert 1 - accepted[same].mean() == pytest.approx(found.frr)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Threshold(1.5), ValueError, "from -1 to 1, got 1.5"),
        (lambda: Threshold(math.nan), ValueError, "threshold must be finite"),
        (lambda: WRONG("0.5"), TypeError, "threshold must be a number, got str"),
        (lambda: Threshold(True), TypeError, "threshold must be a number, got bool"),
        (lambda: Threshold(0.5, metric="l2"), ValueError, "metric must be 'cosine' or 'score'"),
        (lambda: evaluate(X, Y, threshold=-1.01), ValueError, "from -1 to 1"),
        (lambda: evaluate(X, Y, threshold=None), TypeError, "threshold must be a number, got NoneType"),
        (lambda: evaluate(X, Y, threshold=Threshold(0.5, columns=7)), ValueError, "for embeddings of 7 columns, got 8"),
        (lambda: evaluate(X, Y, threshold=Threshold(2.0, metric="score")), ValueError, "one on scores of trials"),
        (lambda: Threshold(0.5, columns=3).accepts([1.0, 0.0], [1.0, 0.0]), ValueError, "of 3 columns, got 2"),
        (lambda: Threshold(0.5).accepts([1.0, 0.0], [1.0, 0.0, 0.0]), ValueError, "a and b must be pairs of rows"),
        (lambda: Threshold(0.5).accepts(np.eye(3), np.eye(3)[:2]), ValueError, "a and b must be pairs of rows"),
        (lambda: Threshold(0.5).accepts([0.1, math.nan]), ValueError, "similarities must be finite"),
        (lambda: Threshold(0.5).accepts([math.nan, 0.1], [0.1, 0.1]), ValueError, "a must be finite"),
        (lambda: Threshold(0.5).accepts("high"), TypeError, "similarities must be numbers"),
        (lambda: Threshold(0.5).accepts("0.9"), TypeError, "similarities must be numbers"),
        (lambda: Threshold(0.5).accepts([True]), TypeError, "similarities must be numbers"),
        (lambda: Threshold(0.5).accepts([None, 0.9]), TypeError, "similarities must be numbers"),
        (
            lambda: Threshold(0.5).accepts(95.0),
            ValueError,
            "from -1 to 1, got 95 in size; of a percentage p it is p / 100",
        ),
        (lambda: Threshold(0.5).accepts([0.2, -1.3]), ValueError, "from -1 to 1, got 1.3 in size"),
        (lambda: Threshold(0.5).accepts(torch.tensor([2])), ValueError, "from -1 to 1, got 2 in size"),
        (lambda: Threshold(0.5, target={"far": math.inf}), ValueError, r"target\['far'\] must be finite, got inf"),
        (lambda: WRONG(0.5, target={"far": "x"}), TypeError, r"target\['far'\] must be a number"),
        (lambda: WRONG(0.5, target=[1]), TypeError, "target must be a dict"),
        (lambda: Threshold(0.5, far=math.inf), ValueError, "far must be finite and at least 0, got inf"),
        (lambda: Threshold(0.5, frr=-0.1), ValueError, "frr must be finite and at least 0, got -0.1"),
        (lambda: WRONG(0.5, columns=2.0), TypeError, "columns must be whole numbers"),
        (lambda: WRONG(0.5, pairs=(1,)), TypeError, "pairs must be two numbers"),
        (lambda: Threshold(2.0, metric="score").accepts([1.0, 0.0], [1.0, 0.0]), ValueError, "on scores of trials"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


GOOD = {"format": "tcm_fused.threshold", "version": 1, **Threshold(0.5).to_dict()}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is no threshold, since it is no JSON"),
        ("[0.5]", "is no threshold: "),
        ('{"similarity": 0.5}', "is no threshold: "),
        (json.dumps(GOOD | {"version": 2}), "has version 2"),
        (json.dumps(GOOD | {"metric": "euclidean"}), "is damaged: metric must be 'cosine' or 'score', got 'euclidean'"),
        (json.dumps(GOOD | {"similarity": 1.5}), "is damaged: threshold must be a cosine similarity"),
        (json.dumps(GOOD | {"similarity": None}), "is damaged: threshold must be a number"),
        (json.dumps(GOOD | {"columns": "8"}), "is damaged: columns must be whole numbers, got '8'"),
        (json.dumps(GOOD | {"pairs": [1]}), "is damaged: pairs must be two numbers"),
        (json.dumps(GOOD | {"far": 2}), "is damaged: far must lie from 0 to 1"),
        (json.dumps(GOOD | {"target": {"far": "x"}}), r"is damaged: target\['far'\] must be a number"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "far"}), "is damaged: it has no 'far'"),
        (json.dumps(GOOD | {"distance": 0.9}), "is damaged: distance is 0.9, but that of similarity 0.5 is 1.0"),
        (json.dumps(GOOD | {"similarity": 0.6}), "is damaged: distance is 1.0, but that of similarity 0.6 is 0.89"),
        (json.dumps(GOOD | {"cosine_distance": "x"}), "is damaged: cosine_distance is 'x'"),
        (json.dumps(GOOD | {"metric": "score"}), "is damaged: it has a distance, but metric is 'score'"),
        (json.dumps(GOOD | {"columns": True}), "is damaged: columns must be whole numbers, got True"),
        (json.dumps(GOOD | {"columns": 0}), "is damaged: columns must be at least 1, got 0"),
        (json.dumps(GOOD | {"pairs": [-1, 2]}), "is damaged: pairs must be at least 0, got -1"),
        (json.dumps(GOOD | {"pairs": [1.5, 2]}), "is damaged: pairs must be whole numbers, got 1.5"),
        (json.dumps(GOOD | {"target": {"far": math.nan}}), "NaN is no number of JSON"),
        (json.dumps(GOOD | {"target": {"far": 10**400}}), "must be finite"),
        (json.dumps(GOOD | {"similarity": 10**400}), "threshold must be finite"),
        ("[" * 100_000, "is no threshold, since it is no JSON"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        Threshold.load(tmp_path / "t.json")
    assert "t.json" in str(raised.value)


def test_fields_are_of_types_that_json_knows(tmp_path: Path) -> None:
    wide: Any = np.float32(0.25)
    made = WRONG(wide, wide, wide, {"far": wide, "eer": True}, np.int64(8), (np.int64(3), np.int32(4)))
    made.save(tmp_path / "t.json")
    assert (
        Threshold.load(tmp_path / "t.json")
        == made
        == Threshold(0.25, 0.25, 0.25, {"far": 0.25, "eer": True}, 8, (3, 4))
    )
    (tmp_path / "bom.json").write_text("\ufeff" + (tmp_path / "t.json").read_text(), encoding="utf-8")
    assert Threshold.load(tmp_path / "bom.json") == made
    with pytest.raises(ValueError, match=r"cannot read the threshold \.: Is a directory"):
        Threshold.load("")


def test_rounding_beyond_one_is_none() -> None:
    """Of the dtype that similarities come in."""
    assert Threshold(1.0).accepts(1 + 1e-7)
    assert Threshold(1.0).accepts(torch.tensor([1.0078125], dtype=torch.bfloat16)).tolist() == [True]
    assert Threshold(1.0).accepts(np.array([1.001], dtype=np.float16)).tolist() == [True]
    assert Threshold(2.0, metric="score").accepts([95.0, 1.0]).tolist() == [True, False]


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read the threshold .*none\.json: No such file"):
        Threshold.load(tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"cannot write .*: there is no folder"):
        Threshold(0.5).save(tmp_path / "none" / "t.json")
    assert not list(tmp_path.iterdir())
