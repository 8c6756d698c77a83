"""`OPIS` in torchmetrics' form: batches, reset, pickle, two processes, and the error without torchmetrics."""

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from support import batches
from torch import Tensor
from torch.multiprocessing.spawn import spawn

import tcm_fused
from tcm_fused import OPIS, opis

N, D, CLASSES = 300, 8, 12
OPTIONS: dict[str, Any] = {"far_range": (0.02, 0.2), "num_thresholds": 21, "epsilon": 0.3}


def data() -> tuple[Tensor, Tensor]:
    return batches.batch(N, D, CLASSES, seed=5)


def check(metric: OPIS) -> None:
    expected = opis(*data(), far_range=(0.02, 0.2), num_thresholds=21, epsilon=0.3)
    found = metric.compute()
    assert {name: value.item() for name, value in found.items()} == {
        "opis": pytest.approx(expected.opis, rel=1e-9),
        "eps_opis": pytest.approx(expected.eps_opis, rel=1e-9),
        "recall_at_1": pytest.approx(expected.recall_at_1),
    }
    assert metric.result is not None
    assert metric.result.class_ids.tolist() == expected.class_ids.tolist()


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric OPIS was called before")
def test_batches_and_reset() -> None:
    """Pairs across batches count; after a reset nothing is left."""
    x, y = data()
    metric = OPIS(**OPTIONS)
    for _ in range(2):
        for start in range(0, N, 77):
            metric.update(x[start : start + 77], y[start : start + 77])
        check(metric)
        metric.reset()
        assert metric.result is None
        with pytest.raises(ValueError, match="OPIS has no embeddings yet"):
            metric.compute()


def test_pickle_and_gradient() -> None:
    """A pickled metric goes on where it was, and no graph is kept alive."""
    x, y = data()
    metric = OPIS(**OPTIONS)
    metric.update(x[:100].requires_grad_(), y[:100])
    assert not metric.embeddings[0].requires_grad
    metric = pickle.loads(pickle.dumps(metric))
    metric.update(x[100:], y[100:])
    check(metric)


@pytest.mark.parametrize("on_step", [False, True])
def test_forward_scores_the_batch_and_adds_it(on_step: bool) -> None:
    """A batch without scores of its own is refused, and what came before goes on."""
    x, y = data()
    metric = OPIS(**OPTIONS, dist_sync_on_step=on_step)
    metric.update(x[:100], y[:100])
    for bad in ((x[:1], y[:1]), (x[:9], torch.arange(9)), (x[:9, :3], y[:9]), (x[:9], y[:8])):
        with pytest.raises(ValueError, match=r"labels must|no class has two|embeddings must have 8 columns|positive"):
            metric(*bad)
    assert metric._update_count == 1
    scores = metric(x[100:], y[100:])
    assert scores["opis"].item() == opis(x[100:], y[100:], **OPTIONS).opis
    check(metric)


def test_batches_are_copied() -> None:
    x, y = data()
    metric = OPIS(**OPTIONS)
    batch, labels = torch.empty(100, D), torch.empty(100, dtype=torch.int64)
    for start in range(0, N, 100):
        batch.copy_(x[start : start + 100])
        labels.copy_(y[start : start + 100])
        metric.update(batch, labels)
    check(metric)


def test_errors_come_at_once() -> None:
    x, y = data()
    metric = OPIS(**OPTIONS)
    metric.update(x[:100], y[:100])
    bad: list[tuple[Any, Any, str]] = [
        (x, y[:3], r"labels must have shape \[300\]"),
        (x[:, :3], y, "embeddings must have 8 columns as before, got 3"),
        (x[0], y[:1], r"embeddings must have shape \[N, D\]"),
        (x.numpy(), y, "embeddings must be a torch.Tensor"),
        (x, y.float(), "labels must have an integer dtype"),
    ]
    for embeddings, labels, message in bad:
        with pytest.raises((TypeError, ValueError), match=message):
            metric.update(embeddings, labels)
    metric.update(x[100:], y[100:])
    check(metric)
    options: list[tuple[dict[str, Any], str]] = [
        ({"beta": -1}, "beta must be"),
        ({"far_range": (0.1, 0.01)}, "the range is empty"),
        ({"thresholds": [0.5]}, "thresholds must be"),
        ({"num_thresholds": 1}, "num_thresholds must be at least 2"),
        ({"backend": "gpu"}, "backend='gpu' is not known"),
        ({"num_threshold": 3}, "num_threshold"),
    ]
    for chosen, message in options:
        with pytest.raises(ValueError, match=message):
            OPIS(**chosen)


def _worker(rank: int, folder: str) -> None:
    """One of two processes; each has a part of the rows, of unequal length, and so of the pairs."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    x, y = data()
    mine = slice(0, 110) if rank == 0 else slice(110, N)
    metric = OPIS(**OPTIONS)
    for start in range(mine.start, mine.stop, 64):
        part = slice(start, min(start + 64, mine.stop))
        metric.update(x[part], y[part])
    check(metric)
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    """Both see all rows: `compute` gathers them, and both return what one process would."""
    spawn(_worker, (str(tmp_path),), nprocs=2)


def test_without_torchmetrics(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchmetrics"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.delitem(sys.modules, "tcm_fused.thresholds.metric")
    with pytest.raises(ImportError, match=r"^OPIS needs torchmetrics .*: pip install torchmetrics$"):
        tcm_fused.OPIS(**OPTIONS)


def test_no_such_name() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'OPS'"):
        _ = tcm_fused.OPS
