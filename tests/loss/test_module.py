"""The public forms: statistics, the module, its defaults, and the options that it refuses."""

import copy
import pickle
from typing import Any

import pytest
import torch
from support.batches import batch
from support.refusals import D, N
from torch import Tensor

from tcm_fused import DistributedTCMLoss, TCMLoss, TCMStats, suggest_margins, tcm_loss

# The public forms.


def test_stats(backend: str) -> None:
    """0-d tensors without a gradient; 0 and 0 for a side without hard pairs. Without `return_stats` the loss alone."""
    x, y = batch(50, 9, 5)
    x.requires_grad_()
    loss, stats = tcm_loss(x, y, margin_minus=2.0, backend=backend, return_stats=True)
    assert isinstance(stats, TCMStats)
    assert [t.shape for t in stats] == [()] * 4
    assert [t.dtype for t in stats] == [torch.int64, torch.int64, torch.float32, torch.float32]
    assert not any(t.requires_grad for t in stats)
    assert (stats.count_minus.item(), stats.violation_minus.item()) == (0, 0.0)
    assert loss.item() == pytest.approx(stats.violation_plus.item(), rel=1e-6)
    alone = tcm_loss(x, y, margin_minus=2.0, backend=backend)
    assert isinstance(alone, Tensor)
    assert torch.equal(alone, loss)


def in_and_out_of_pickle(module: TCMLoss) -> TCMLoss:
    again = pickle.loads(pickle.dumps(module))
    assert isinstance(again, TCMLoss)
    return again


def test_module(backend: str) -> None:
    """The class is the function: also copied, pickled, and called the way pytorch-metric-learning calls."""
    options: dict[str, Any] = {"margin_plus": 0.8, "margin_minus": 0.1, "lambda_plus": 2.0, "lambda_minus": 3.0}
    options.update(precision="fp32", penalty="squared", reduction="all", group_pairs="across", hardest_negatives=None)
    criterion = TCMLoss(**options, backend=backend)
    x, y = batch(90, 9, 5)
    ref_x, ref_y = batch(120, 9, 5, seed=1)
    own: dict[str, Any] = {"groups": torch.arange(90) % 3}
    groups = {**own, "ref_groups": torch.arange(120) % 3}
    plain, stats = tcm_loss(x, y, **own, **options, backend=backend, return_stats=True)
    rectangular = tcm_loss(x, y, ref_x, ref_y, **groups, **options, backend=backend)
    assert criterion.stats is None
    used = TCMLoss(**options, backend=backend)
    used(x.requires_grad_(), y, **own)
    assert used.stats is not None
    assert [t.item() for t in used.stats] == [t.item() for t in stats]
    used(x.detach().double(), y, **own)
    assert used.stats.violation_plus.dtype == torch.float64
    assert not any(t.requires_grad for t in used.stats)
    for module in (
        criterion,
        *(again(m) for m in (criterion, used) for again in (copy.deepcopy, in_and_out_of_pickle)),
    ):
        assert module.options._asdict() == {**options, "backend": backend}
        assert torch.equal(module(x, y, **own), plain)
        assert torch.equal(module(x, y, None, **own), plain)
        assert torch.equal(module(x, y, None, ref_x, ref_y, **groups), rectangular)
        assert torch.equal(module(x, y, indices_tuple=None, ref_emb=ref_x, ref_labels=ref_y, **groups), rectangular)
    assert not criterion.state_dict()
    assert not used.state_dict()
    for name, value in options.items():
        assert f"{name}={value!r}" in repr(criterion)


def test_defaults() -> None:
    """The defaults are the paper's."""
    criterion = TCMLoss()
    values = (criterion.margin_plus, criterion.margin_minus, criterion.lambda_plus, criterion.lambda_minus)
    assert values == (0.9, 0.5, 1.0, 1.0)


# Refused by the module.


def test_module_refuses_a_miner() -> None:
    pairs = (torch.tensor([0]),) * 4
    with pytest.raises(ValueError, match="indices_tuple must be None"):
        TCMLoss()(torch.ones(N, D), torch.arange(N), pairs)


@pytest.mark.parametrize(
    ("argument", "value", "kind"),
    [
        ("margin_plus", float("nan"), ValueError),
        ("margin_minus", "0.5", TypeError),
        ("lambda_plus", -1.0, ValueError),
        ("lambda_minus", float("inf"), ValueError),
        ("precision", "tf32", ValueError),
        ("backend", "gpu", ValueError),
        ("penalty", "square", ValueError),
        ("reduction", "mean", ValueError),
        ("group_pairs", "both", ValueError),
    ],
)
def test_module_refuses_what_the_function_does(argument: str, value: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=argument):
        TCMLoss(**{argument: value})
    criterion = TCMLoss()
    setattr(criterion, argument, value)
    with pytest.raises(kind, match=argument):
        criterion(torch.ones(N, D), torch.arange(N))


@pytest.mark.parametrize("kind", [TCMLoss, DistributedTCMLoss])
def test_options_by_position(kind: type[TCMLoss]) -> None:
    """Their order is another than in pytorch-metric-learning: the error says how to write them."""
    for options in ((0.9,), (1.0, 1.0, 0.9, 0.5)):
        with pytest.raises(TypeError, match=rf"{kind.__name__}.*by keyword.*margin_plus=0.9.*pytorch-metric-learning"):
            kind(*options)
    margins = suggest_margins(torch.randn(40, 8), torch.arange(40) % 4, frr=0.1, far=0.1)
    with pytest.raises(TypeError, match=rf"{kind.__name__}\(margin_plus=m.margin_plus, margin_minus=m.margin_minus\)"):
        kind(margins)


def test_wrong_options_of_ranks_at_construction() -> None:
    with pytest.raises(ValueError, match="grad_reduction='average' is not known"):
        DistributedTCMLoss(grad_reduction="average")
    with pytest.raises(ValueError, match="lambda_plus must be finite"):
        DistributedTCMLoss(lambda_plus=-1.0)
