"""The gate lets the right loss through, and stops losses that are wrong by a little."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.speed.gate import DENSITIES, check_fused, check_opis, check_peer
from benchmarks.speed.peers import PEERS
from tcm_fused import opis, tcm_loss


@pytest.mark.parametrize("hard", DENSITIES)
@pytest.mark.parametrize("name", [name for name in PEERS if name != "tcm_fused"])
def test_peer_computes_the_same(name: str, hard: str) -> None:
    check_peer(name, hard)


def _drops_a_row(x: Tensor, labels: Tensor, *reference: Tensor, **options: Any) -> Any:
    return tcm_loss(x, labels.index_fill(0, torch.tensor(0), -1), *reference, **options)


def _scales_loss(x: Tensor, *rest: Tensor, **options: Any) -> Any:
    loss, stats = tcm_loss(x, *rest, **options)
    return loss * (1 + 1e-5), stats


def _scales_gradient(x: Tensor, *rest: Tensor, **options: Any) -> Any:
    return tcm_loss(x + 1e-5 * (x.detach() - x), *rest, **options)


def _half_precision(x: Tensor, *rest: Tensor, **options: Any) -> Any:
    loss, stats = tcm_loss(x.half(), *(t.half() if t.is_floating_point() else t for t in rest), **options)
    return loss, stats


@pytest.mark.parametrize("wrong", [_drops_a_row, _scales_loss, _scales_gradient, _half_precision])
def test_gate_stops_a_wrong_loss(wrong: Any) -> None:
    with pytest.raises(AssertionError, match="tcm_fused, square"):
        check_fused(wrong, "half")


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_gate_lets_opis_through(backend: str) -> None:
    check_opis(partial(opis, backend=backend))


def _drops_a_sample(x: Tensor, labels: Tensor, **options: Any) -> Any:
    return opis(x, labels.index_fill(0, torch.tensor(0), -1), **options)


def _half_precision_opis(x: Tensor, labels: Tensor, **options: Any) -> Any:
    return opis(x.half(), labels, **options)


@pytest.mark.parametrize("wrong", [_drops_a_sample, _half_precision_opis])
def test_gate_stops_a_wrong_opis(wrong: Any) -> None:
    with pytest.raises(AssertionError, match=r"the utility of a class|OPIS is"):
        check_opis(wrong)
