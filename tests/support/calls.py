"""Every public call that works on embeddings, with its gradient: for tests of rules that hold for all of them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from pytorch_metric_learning.utils import loss_and_miner_utils as miners
from torch import Tensor

from tcm_fused import (
    CrossBatchMemory,
    DistributedTCMLoss,
    TCMLoss,
    calibrate,
    evaluate,
    match_probability,
    opis,
    suggest_margins,
    tcm_loss,
)
from tcm_fused.integrations import pytorch_metric_learning as pml
from tcm_fused.reference import tcm_reference
from tcm_fused.thresholds.metric import OPIS

N, D = 96, 24  # products of this size are ones that oneDNN takes


def sets(seed: int = 0) -> tuple[Tensor, Tensor]:
    """[N, D] float32 that require a gradient, and [N] labels; tensors on the CPU, whatever the defaults are."""
    rng = np.random.default_rng(seed)
    y = rng.integers(8, size=N)
    x = rng.standard_normal((8, D))[y] + rng.standard_normal((N, D))
    return torch.from_numpy(x.astype(np.float32)).requires_grad_(), torch.from_numpy(y)


def _gradients(loss: Tensor, *embeddings: Tensor) -> list[Tensor]:
    torch.autograd.backward(loss)
    grads = [x.grad for x in embeddings]
    assert all(grad is not None for grad in grads)
    return [loss.detach(), *(grad for grad in grads if grad is not None)]


def _loss(of: Callable[..., Any] = tcm_loss, **options: Any) -> list[Tensor]:
    x, y = sets()
    result = of(x, y, **options)
    return _gradients(result if isinstance(result, Tensor) else result[0], x)


def _against(of: Callable[..., Any] = tcm_loss, **options: Any) -> list[Tensor]:
    (x, y), (ref_x, ref_y) = sets(), sets(1)
    result = of(x, y, ref_x, ref_y, **options)
    return _gradients(result if isinstance(result, Tensor) else result[0], x, ref_x)


def _memory(backend: str) -> list[Tensor]:
    with torch.device("cpu"):  # buffers of a module are on the default device
        criterion = CrossBatchMemory(TCMLoss(backend=backend), size=64)
    criterion(*sets(1))
    return _loss(criterion)


def _distributed(backend: str, **options: Any) -> list[Tensor]:
    module: Any = dist  # whose types leave this store out
    dist.init_process_group("gloo", store=module.HashStore(), rank=0, world_size=1)
    try:
        return _loss(DistributedTCMLoss(backend=backend, **options))
    finally:
        dist.destroy_process_group()


def _pairs() -> list[Tensor]:
    x, y = sets()
    pairs = miners.get_all_pairs_indices(y)
    return _gradients(pml.ThresholdConsistentMarginLoss()(x, y, tuple(t[::2] for t in pairs)), x)


def _metric(backend: str) -> list[Any]:
    metric = OPIS(backend=backend)
    metric.update(*sets())
    metric.update(*sets(1))
    metric.compute()
    assert metric.result is not None
    return [metric.result.opis, metric.result.recall_at_1]


def _opis(backend: str) -> list[Any]:
    result = opis(*sets(), backend=backend)
    return [result.opis, result.eps_opis, result.recall_at_1]


def _calibrate(backend: str) -> list[Any]:
    return [calibrate(*sets(), far=0.05, backend=backend).similarity]


def _two_sets(backend: str) -> list[Any]:
    found = calibrate(*sets(), *sets(1), far=0.05, backend=backend)
    rates = evaluate(*sets(1), *sets(2), threshold=found.threshold, backend=backend)
    return [found.similarity, rates.far, rates.frr, *rates.far_interval, *rates.frr_interval]


def _probability(backend: str) -> list[Any]:
    return [match_probability(*sets(), backend=backend)(torch.tensor(0.5, dtype=torch.float32, device="cpu"))]


def _suggest(backend: str) -> list[Any]:
    margins = suggest_margins(*sets(), far=0.1, frr=0.1, backend=backend)
    return [margins.margin_plus, margins.margin_minus]


def public_calls(backend: str) -> dict[str, Callable[[], list[Any]]]:
    """By name; each returns its results, tensors and numbers."""
    groups = torch.from_numpy(np.arange(N) % 3)
    return {
        "rows": lambda: _loss(backend=backend),
        "precision fp16": lambda: _loss(backend=backend, precision="fp16"),
        "reference set": lambda: _against(backend=backend, row_offset=0),
        "squared": lambda: _against(backend=backend, penalty="squared"),
        "all": lambda: _against(backend=backend, reduction="all"),
        "hardest": lambda: _against(hardest_negatives=3),
        "within": lambda: _against(backend=backend, groups=groups, ref_groups=groups),
        "across": lambda: _loss(backend=backend, groups=groups, group_pairs="across"),
        "module": lambda: _loss(TCMLoss(backend=backend, reduction="all")),
        "memory": lambda: _memory(backend),
        "ranks": lambda: _distributed(backend),
        "ring": lambda: _distributed(backend, ring=True),
        "pairs": _pairs,
        "adapter": lambda: _loss(pml.ThresholdConsistentMarginLoss(backend=backend)),
        "opis": lambda: _opis(backend),
        "calibrate": lambda: _calibrate(backend),
        "two sets": lambda: _two_sets(backend),
        "match_probability": lambda: _probability(backend),
        "suggest_margins": lambda: _suggest(backend),
        "OPIS": lambda: _metric(backend),
        "reference": lambda: _against(tcm_reference),
    }


CALLS = tuple(public_calls("torch"))
