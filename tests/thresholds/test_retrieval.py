"""Recall at k and mean average precision: a double loop, pytorch-metric-learning and torchmetrics say the same."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from sklearn.metrics import average_precision_score
from support import batches
from support.pair_list import FORMS, NEAR, arguments, two_sets, unit
from torchmetrics.functional.retrieval import retrieval_average_precision, retrieval_hit_rate

from tcm_fused import evaluate, retrieval
from tcm_fused.thresholds import pairing
from tcm_fused.thresholds import retrieval as module
from tcm_fused.thresholds.pairing import NothingToMeasure

pytestmark = pytest.mark.usefixtures("one_thread")


def ranked(call: dict[str, Any]) -> dict[int, list[bool]] | None:
    """Of each query whether the rows are positives, the nearest first, in a double loop; None where two tie."""
    one = "ref_emb" not in call
    x, y = unit(call["embeddings"]), call["labels"]
    ref, ref_y = (x, y) if one else (unit(call["ref_emb"]), call["ref_labels"])
    groups: Any = call.get("groups")
    ref_groups: Any = groups if one else call.get("ref_groups")
    found = {}
    for i in range(len(y)):
        rows = []
        for j in range(len(ref_y)):
            if y[i] < 0 or ref_y[j] < 0 or (one and i == j):
                continue
            if groups is None or (groups[i] == ref_groups[j]) == (call["group_pairs"] == "within"):
                rows.append((float(x[i] @ ref[j]), bool(y[i] == ref_y[j])))
        rows.sort(reverse=True)
        if any(first - second < 4 * NEAR and a != b for (first, a), (second, b) in pairwise(rows)):
            return None
        if any(positive for _, positive in rows):
            found[i] = [positive for _, positive in rows]
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tiles", [(512, 4096), (3, 7)], ids=str)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(batches.KINDS))
@settings(max_examples=8)
def test_double_loop(form: str, tiles: tuple[int, int], seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    call = arguments(form, two_sets(rng, n=25, m=30, kind=kind))
    expected = ranked(call)
    before = module._ROWS, module._COLUMNS
    module._ROWS, module._COLUMNS = tiles
    try:
        found = retrieval(**call)
    except NothingToMeasure:
        return
    finally:
        module._ROWS, module._COLUMNS = before
    if expected is None:
        return
    assert found.query.tolist() == list(expected)
    assert found.left_out == (call["labels"] >= 0).sum() - len(expected)
    ranks = {i: [k + 1 for k, positive in enumerate(rows) if positive] for i, rows in expected.items()}
    assert found.first_rank.tolist() == [rank[0] for rank in ranks.values()]
    precision = {i: [(k + 1) / r for k, r in enumerate(rank)] for i, rank in ranks.items()}
    average = [np.mean(precision[i]) for i in ranks]
    assert found.average_precision == pytest.approx(average, abs=1e-12)
    assert found.mean_average_precision == pytest.approx(np.mean(average), abs=1e-12)
    at_r = [
        sum(p for p, r in zip(precision[i], rank, strict=True) if r <= len(rank)) / len(rank)
        for i, rank in ranks.items()
    ]
    assert found.mean_average_precision_at_r == pytest.approx(np.mean(at_r), abs=1e-12)
    assert found.r_precision == pytest.approx(np.mean([np.mean(np.array(r) <= len(r)) for r in ranks.values()]))
    assert found.mean_reciprocal_rank == pytest.approx(np.mean([1 / rank[0] for rank in ranks.values()]))
    for k in (1, 2, 5):
        assert found.recall_at(k) == pytest.approx(np.mean([rank[0] <= k for rank in ranks.values()]))
    result = evaluate(**call, threshold=0.3)
    assert found.recall_at(1) == result.recall_at_1


@pytest.mark.parametrize("two", [False, True], ids=["one set", "gallery"])
def test_pytorch_metric_learning(two: bool) -> None:
    x, y = batches.batch(300, 16, 20, seed=2)
    x += 1.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    sets = (x[:120], y[:120], x[120:], y[120:]) if two else (x, y)
    names = ("precision_at_1", "mean_average_precision", "mean_average_precision_at_r", "r_precision")
    calculator = AccuracyCalculator(
        (*names, "mean_reciprocal_rank"), k=180 if two else 299, knn_func=CustomKNN(CosineSimilarity())
    )
    theirs = calculator.get_accuracy(*sets)
    found = retrieval(*sets)
    assert found.recall_at(1) == pytest.approx(theirs["precision_at_1"])
    for name in (*names[1:], "mean_reciprocal_rank"):
        assert getattr(found, name) == pytest.approx(theirs[name], abs=1e-6), name


def test_torchmetrics_and_scikit_learn() -> None:
    """The former takes no row for relevant that has a score of 0 or less, so scores are moved above."""
    x, y = batches.batch(60, 12, 6, seed=3)
    assert ranked({"embeddings": x, "labels": y.numpy()}) is not None, "no ties"
    found = retrieval(x, y)
    unit_x = torch.nn.functional.normalize(x.double())
    s = 2 + unit_x @ unit_x.T
    others = ~torch.eye(60, dtype=torch.bool)
    pairs = [(s[i, others[i]], (y == y[i])[others[i]]) for i in found.query]
    assert found.average_precision == pytest.approx([float(retrieval_average_precision(*pair)) for pair in pairs])
    assert found.average_precision == pytest.approx([average_precision_score(same, near) for near, same in pairs])
    for k in (1, 3, 10):
        assert found.recall_at(k) == pytest.approx(np.mean([float(retrieval_hit_rate(*p, top_k=k)) for p in pairs]))


def test_ties_are_no_hits() -> None:
    """In front of a positive stands each negative that is as near: in any order of rows."""
    x = np.array([[1, 0], [0, 1], [0, 1], [0, 1], [1, 0]])
    found = retrieval(x, np.array([0, 1, 0, 1, 2]))
    assert found.first_rank.tolist() == [4, 2, 4, 2]
    assert found.recall_at(1) == evaluate(x, np.array([0, 1, 0, 1, 2]), threshold=0.5).recall_at_1 == 0


def test_memory_map(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    """Read part by part, with the same ranks; rows in float16 count as what they stand for."""
    sets = two_sets(rng, n=60, m=70)
    mapped = dict(sets)
    for name in ("embeddings", "ref_emb"):
        np.save(tmp_path / f"{name}.npy", sets[name])
        mapped[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
    expected = {form: retrieval(**arguments(form, sets)).to_dict() for form in FORMS}
    monkeypatch.setattr(pairing, "room", lambda: 1)
    for form in FORMS:
        assert retrieval(**arguments(form, mapped)).to_dict() == expected[form]
    half = sets["embeddings"].astype(np.float16)
    assert retrieval(half, sets["labels"]).to_dict() == retrieval(half.astype(np.float32), sets["labels"]).to_dict()


def test_result(capsys: pytest.CaptureFixture[str]) -> None:
    x, y = batches.batch(100, 8, 9)
    found = retrieval(x, [f"bird {c}" for c in y.tolist()], progress=True, k=[2, 1])
    assert "pairs: 100%" in capsys.readouterr().err
    assert found.to_dict() == retrieval(x, y, k=(1, 2, 2)).to_dict()
    assert found.recall_at_k == {1: found.recall_at(1), 2: found.recall_at(2)}
    assert list(retrieval(x, y, k=7).recall_at_k) == [7]
    assert f"recall@1       {100 * found.recall_at(1):.2f} %" in str(found)
    assert f"mAP@R          {found.mean_average_precision_at_r:.4f}" in str(found)
    assert list(found.to_frame()) == ["query", "first_rank", "average_precision"]
    assert found.to_markdown().splitlines()[3] == f"| recall_at_2 | {found.recall_at(2):.4g} |"
    axes = found.plot()
    assert axes.get_xlabel() == "nearest rows that are looked at, k"
    curve = axes.get_lines()[0].get_xydata()
    for k, recall in np.asarray(curve):
        assert recall == pytest.approx(found.recall_at(int(k)))


def test_bad_input() -> None:
    x, y = batches.batch(20, 4, 3)
    found = retrieval(x, y)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        found.recall_at(0)
    for k in (1.0, True, "1"):
        bad: Any = k
        with pytest.raises(TypeError, match="k must be an int"):
            found.recall_at(bad)
        with pytest.raises(TypeError, match="k must be an int"):
            retrieval(x, y, k=[1, bad])
    for sets, error, message in (
        ({"ref_emb": x}, ValueError, "ref_emb came without ref_labels"),
        ({"ref_emb": x[:, :2], "ref_labels": y}, ValueError, "ref_emb has D=2"),
        ({"ref_emb": x + 1, "ref_labels": y + 9}, NothingToMeasure, "no class is in both sets"),
        ({"groups": torch.arange(20)}, NothingToMeasure, "no class has two samples, as the groups pair them"),
        ({"group_pairs": "across"}, ValueError, "across"),
        ({"group_pairs": "between", "groups": y}, ValueError, "group_pairs='between' is not known"),
    ):
        with pytest.raises(error, match=message):
            retrieval(x, y, **sets)
    with pytest.raises(NothingToMeasure, match="embeddings must be finite"):
        retrieval(x * torch.nan, y)
    with pytest.raises(NothingToMeasure, match="at least two classes"):
        retrieval(x, torch.zeros(20, dtype=torch.int64))


def test_large_classes_take_fewer_queries_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same ranks, however few rows are worked at once: down to one."""
    rng = np.random.default_rng(5)
    x, y = rng.standard_normal((90, 6)), np.arange(90) % 3
    wanted = retrieval(x, y)
    for size in (1, 100, 1000):
        monkeypatch.setattr(module, "_POSITIVES", size)
        assert retrieval(x, y).to_dict() == wanted.to_dict()


@pytest.mark.parametrize("k", [np.array([1, 5]), torch.tensor([5, 1]), {1, 5}, (5, 1, 1)], ids=str)
def test_ranks_in_any_collection(k: Any) -> None:
    assert list(retrieval(np.eye(6)[[0, 0, 1, 1, 2, 2]], np.array([0, 0, 1, 1, 2, 2]), k=k).recall_at_k) == [1, 5]
