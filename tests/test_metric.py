"""`OPIS` in torchmetrics' form: batches, reset, pickle, two processes, and the error without torchmetrics."""

import pickle
import sys
from pathlib import Path

import batches
import pytest
import torch
import torch.distributed
from torch import Tensor
from torch.multiprocessing.spawn import spawn

import tcm_fused
from tcm_fused import OPIS, opis

N, D, CLASSES = 300, 8, 12
OPTIONS = {"far_range": (0.02, 0.2), "num_thresholds": 21, "epsilon": 0.3}


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
    monkeypatch.delitem(sys.modules, "tcm_fused.metric")
    with pytest.raises(ImportError, match=r"tcm_fused\[metrics\]"):
        _ = tcm_fused.OPIS


def test_no_such_name() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'OPS'"):
        _ = tcm_fused.OPS
