"""`OPIS` in torchmetrics' form: batches, reset, pickle, wrappers, plots, scores that are NaN, several processes, and
the error without torchmetrics."""

import copy
import math
import pickle
import sys
import warnings
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
import torch.distributed
from support import batches
from support.parts import Pools
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.wrappers import BootStrapper, MetricTracker, MinMaxMetric, MultitaskWrapper, Running

import tcm_fused
from tcm_fused import OPIS, opis, retrieval
from tcm_fused.thresholds import metric as metric_module

N, D, CLASSES = 300, 8, 12
OPTIONS: dict[str, Any] = {"far_range": (0.02, 0.2), "num_thresholds": 21, "epsilon": 0.3}


def data() -> tuple[Tensor, Tensor]:
    return batches.batch(N, D, CLASSES, seed=5)


def check(metric: OPIS) -> None:
    expected = opis(*data(), far_range=(0.02, 0.2), num_thresholds=21, epsilon=0.3)
    found: Any = metric.compute()
    scores = {"opis": found.item()} if not metric.details else {name: value.item() for name, value in found.items()}
    assert scores == {
        name: pytest.approx(getattr(expected, name), rel=1e-9)
        for name in (("opis", "eps_opis", "recall_at_1") if metric.details else ("opis",))
    }
    assert metric.result is not None
    assert metric.result.class_ids.tolist() == expected.class_ids.tolist()


@pytest.mark.parametrize("details", [False, True])
def test_batches_and_reset(details: bool) -> None:
    """Pairs across batches count; after a reset nothing is left, and torchmetrics' own warning says so."""
    x, y = data()
    metric = OPIS(**OPTIONS, details=details)
    for _ in range(2):
        for start in range(0, N, 77):
            metric.update(x[start : start + 77], y[start : start + 77])
        check(metric)
        metric.reset()
        assert metric.result is None
        with pytest.warns(UserWarning, match="OPIS was called before the ``update``") as caught:
            found: Any = metric.compute()
        assert len(caught) == 1
        assert all(value.isnan() for value in (found.values() if details else [found]))


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
    """A batch that does not fit is refused, one without a score of its own is NaN; the rows before count on."""
    x, y = data()
    metric = OPIS(**OPTIONS, dist_sync_on_step=on_step)
    metric.update(x[:100], y[:100])
    for bad in ((x[:9, :3], y[:9]), (x[:9], y[:8])):
        with pytest.raises(ValueError, match=r"labels must|embeddings must have 8 columns"):
            metric(*bad)
    assert metric._update_count == 1
    with pytest.warns(UserWarning, match="OPIS cannot be measured and is NaN.*two classes") as caught:
        for few in (slice(100, 101), slice(101, 102), slice(102, 102)):
            assert metric(x[few], y[few]).isnan()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert metric(x[102:], y[102:]).item() == opis(x[102:], y[102:], **OPTIONS).opis
    check(metric)


@pytest.mark.parametrize("on_step", [False, True])
def test_forward_that_fails_loses_nothing(on_step: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data()
    metric = OPIS(**OPTIONS, dist_sync_on_step=on_step)
    metric.update(x[:100], y[:100])
    with monkeypatch.context() as patch:
        patch.setattr(metric_module, "scores_or_nan", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            metric(x[100:], y[100:])
    metric.update(x[100:], y[100:])
    check(metric)


COLLAPSED = torch.ones(8, 3), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
NOTHING: dict[str, tuple[Tensor, Tensor, str]] = {
    "no rows": (torch.empty(0, 3), torch.empty(0, dtype=torch.int64), "at least two classes.*got 0"),
    "one row": (torch.ones(1, 3), torch.zeros(1, dtype=torch.int64), "at least two classes"),
    "no class twice": (torch.eye(5), torch.arange(5), "no class has two samples"),
    "one class": (torch.eye(5), torch.ones(5, dtype=torch.int64), "at least two classes"),
    "all left out": (torch.eye(5), torch.full((5,), -1), "at least two classes"),
    "not finite": (torch.eye(5).log(), torch.tensor([0, 0, 1, 1, 1]), "5 of 5 rows hold NaN or infinity"),
    "not a number": (torch.eye(5) * torch.nan, torch.tensor([0, 0, 1, 1, 1]), "5 of 5 rows hold NaN or infinity"),
    "collapsed": (*COLLAPSED, "the calibration range is empty"),
    "zero": (0 * COLLAPSED[0], COLLAPSED[1], "the calibration range is empty"),
    "few pairs": (torch.eye(4), torch.tensor([0, 0, 1, 1]), "the calibration range is empty"),
}


@pytest.mark.parametrize("details", [False, True])
@pytest.mark.parametrize("kind", NOTHING)
def test_scores_that_do_not_exist_are_nan(kind: str, details: bool) -> None:
    """With one warning, however often; recall@1 stays where the range alone is empty. Rows that come later count."""
    x, y, reason = NOTHING[kind]
    metric = OPIS(details=details, num_thresholds=21)
    with pytest.warns(UserWarning, match=f"OPIS cannot be measured and is NaN.*{reason}") as caught:
        for step in range(3):
            assert all_nan(metric(x, y), recall=reason.startswith("the calibration range"))
            metric.reset()
            metric.update(x, y)
            assert all_nan(metric.compute(), recall=reason.startswith("the calibration range")), step
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert metric.result is None
    metric.reset()
    metric.update(*data())
    assert metric.compute() is not None
    assert metric.result is not None


def all_nan(found: Any, recall: bool) -> bool:
    if isinstance(found, Tensor):
        return math.isnan(found.item()) and found.dtype == torch.float64
    return [name for name, value in found.items() if not value.isnan()] == (["recall_at_1"] if recall else [])


WRAPPERS: dict[str, Any] = {
    "BootStrapper": lambda: BootStrapper(OPIS(**OPTIONS), num_bootstraps=3),
    "MetricTracker": lambda: MetricTracker(OPIS(**OPTIONS), maximize=None),
    "MinMaxMetric": lambda: MinMaxMetric(OPIS(**OPTIONS)),
    "Running": lambda: Running(OPIS(**OPTIONS), window=2),
    "MultitaskWrapper": lambda: MultitaskWrapper({"task": OPIS(**OPTIONS)}),
    "MetricCollection": lambda: MetricCollection({"a": OPIS(**OPTIONS), "b": OPIS(**OPTIONS | {"beta": 2.0})}),
    "sum": lambda: OPIS(**OPTIONS) + 1,
}


@pytest.mark.filterwarnings("ignore:Encounted the following error when trying to get the best metric")
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_of_torchmetrics(name: str) -> None:
    x, y = data()
    metric = WRAPPERS[name]()
    if name == "MetricTracker":
        metric.increment()
    arguments = ({"task": x[:150]}, {"task": y[:150]}) if name == "MultitaskWrapper" else (x[:150], y[:150])
    rest = ({"task": x[150:]}, {"task": y[150:]}) if name == "MultitaskWrapper" else (x[150:], y[150:])
    if name not in ("sum", "BootStrapper"):
        metric(*arguments)
    else:
        metric.update(*arguments)
    metric.update(*rest)
    found = metric.compute()
    want = opis(x, y, **OPTIONS).opis
    near = pytest.approx(want, rel=1e-9)
    if name == "BootStrapper":
        assert set(found) == {"mean", "std"}
        assert 0 < found["mean"] < 1
    elif name == "MetricTracker":
        assert metric.best_metric() == near  # the lowest: higher is not better
        assert metric.maximize is False
    elif name == "MinMaxMetric":
        assert found["raw"] == near
    elif name == "MultitaskWrapper":
        assert found["task"] == near
    elif name == "MetricCollection":
        assert metric.compute_groups == {0: ["a", "b"]}  # one state for both
        assert (found["a"], found["b"]) == (near, pytest.approx(opis(x, y, **OPTIONS | {"beta": 2.0}).opis))
    else:
        assert found == pytest.approx(want + (name == "sum"), rel=1e-9)


def test_details_within_a_collection() -> None:
    x, y = data()
    metrics = MetricCollection({"set": OPIS(**OPTIONS, details=True)}, prefix="val_")
    metrics.update(x, y)
    assert set(metrics.compute()) == {"val_set_opis", "val_set_eps_opis", "val_set_recall_at_1"} or set(
        metrics.compute()
    ) == {"val_opis", "val_eps_opis", "val_recall_at_1"}


def test_plot() -> None:
    """The value, several, those of `details`, on axes of their own or given, and in a collection."""
    matplotlib.use("Agg", force=True)
    from matplotlib import pyplot

    x, y = data()
    for details in (False, True):
        metric = OPIS(**OPTIONS, details=details)
        metric.update(x, y)
        axes = metric.plot()[1]
        assert len(axes.get_lines()) >= 1
        axes = pyplot.subplots()[1]
        found = metric.plot([metric.compute(), metric.compute()], ax=axes)
        assert found[1] is axes
        assert metric.plot(metric.compute(), axes)[1] is axes
    metrics = MetricCollection({"a": OPIS(**OPTIONS)})
    metrics.update(x, y)
    assert len(metrics.plot()) == 1
    pyplot.close("all")


def test_half_precision() -> None:
    """`half()` leaves the states alone, as in torchmetrics; `set_dtype` changes embeddings, never labels."""
    x, y = data()
    labels = y + 5000  # which float16 does not hold
    metric = OPIS(**OPTIONS)
    metric.update(x, labels)
    metric.half()
    assert metric.embeddings[0].dtype == x.dtype
    metric.set_dtype(torch.float16)
    assert (metric.embeddings[0].dtype, metric.labels[0].dtype) == (torch.float16, torch.int64)
    assert torch.equal(metric.labels[0], labels)
    assert metric.compute().item() == opis(x.half(), labels, **OPTIONS).opis
    low = OPIS(**OPTIONS)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        low.update(x.to(dtype), y)
    assert 0 < low.compute() < 1


def test_merge_and_copy() -> None:
    x, y = data()
    metrics = [OPIS(**OPTIONS), OPIS(**OPTIONS)]
    metrics[0].update(x[:100], y[:100])
    metrics[1].update(x[100:], y[100:])
    copied = copy.deepcopy(metrics[0])
    metrics[0].merge_state(metrics[1])
    check(metrics[0])
    copied.merge_state(metrics[1].metric_state)
    check(copied)
    check(copy.copy(metrics[0]))


def test_labels_of_any_form_but_text() -> None:
    x, y = data()
    metric = OPIS(**OPTIONS)
    metric.update(x[:100], y[:100].tolist())
    metric.update(x[100:200], y[100:200].numpy().astype(np.uint8))
    metric.update(x[200:], y[200:].to(torch.int16))
    check(metric)
    with pytest.raises(TypeError, match="labels must be integers here, got text: number the classes"):
        metric.update(x[:2], ["a", "b"])
    with pytest.raises(ValueError, match="1 of 2 rows are missing"):
        metric.update(x[:2], [None, 1])


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
        ({"details": 1}, "details must be True or False, got int"),
    ]
    for chosen, message in options:
        with pytest.raises((TypeError, ValueError), match=message):
            OPIS(**chosen)


def _worker(rank: int) -> None:
    """One of two processes; each has a part of the rows, of unequal length, and so of the pairs."""
    x, y = data()
    # Parts of unequal length, none, and an empty batch.
    for parts in ((slice(0, 110), slice(110, N)), (None, slice(0, N)), (slice(0, N), slice(0, 0))):
        mine = parts[rank]
        metric = OPIS(**OPTIONS, details=True)
        if mine is not None:
            for start in range(mine.start, max(mine.stop, mine.start + 1), 64):
                part = slice(start, min(start + 64, mine.stop))
                metric.update(x[part], y[part])
        check(metric)
        assert (len(metric.embeddings) == 0) == (mine is None)  # each has its own again
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        metric = OPIS(**OPTIONS)
        assert metric(x[rank : rank + 1], y[rank : rank + 1]).isnan()
        metric.reset()
        metric.update(x[:3], torch.tensor([7, 8, 9]) + 3 * rank)
        assert metric.compute().isnan()
        assert OPIS(**OPTIONS).compute().isnan()
    assert sum("OPIS cannot be measured" in str(one.message) for one in caught) == (rank == 0)
    metric = OPIS(**OPTIONS)
    metric.update(x[:, : 4 + rank], y)
    with pytest.raises(ValueError, match=r"as many columns in all processes, got \[4, 5\]"):
        metric.compute()


def test_two_processes(pools: Pools) -> None:
    """Both see all rows: `compute` gathers them, and both return what one process would, also of one without rows."""
    pools[2].run(_worker)


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


def test_ranks() -> None:
    """Recall at k and the mean average precisions beside, over all batches; in a collection and after a copy too."""
    x, y = data()
    expected = retrieval(x, y, k=(1, 7)).scores
    metric = OPIS(**OPTIONS, details=True, recall_at=(7, 1))
    for part in (slice(0, 100), slice(100, N)):
        metric.update(x[part], y[part])
    collection = MetricCollection({"mine": pickle.loads(pickle.dumps(metric))}, prefix="val_")
    for found in (metric.compute(), collection.compute()):
        values = {name.removeprefix("val_"): value.item() for name, value in found.items()}
        assert {name: values[name] for name in expected} == pytest.approx(expected)
        assert "opis" in values
    assert "recall_at_7" not in OPIS(**OPTIONS, details=True)(x, y)


def test_ranks_that_are_not_there() -> None:
    metric = OPIS(details=True, recall_at=5)
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert metric.compute()["recall_at_5"].isnan()
    with pytest.warns(UserWarning, match="OPIS cannot be measured"):
        found = metric(torch.eye(3), torch.zeros(3, dtype=torch.int64))
    assert all(value.isnan() for value in found.values())
    for k, error in ((0, ValueError), ("5", TypeError), ([1, 2.0], TypeError)):
        bad: Any = k
        with pytest.raises(error, match="recall_at must be"):
            OPIS(recall_at=bad)


@pytest.mark.parametrize("options", [{"recall_at": (1, 5)}, {"threshold": 0.3}, {"threshold": -1}])
def test_needs_details(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} is told beside the score; give details=True"):
        OPIS(**options)
