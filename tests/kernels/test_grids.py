"""Launches of sizes that no test could run: grids stay within what a device can launch, on tensors without memory."""

import ctypes
from typing import Any

import pytest
import torch
from ptx_machine.kernels import LossCall, kernels

from tcm_fused.backends import triton_gradient, triton_loss, triton_prologue, triton_similarity
from tcm_fused.backends.problem import Problem

MOST = (2**31 - 1, 65_535, 65_535)  # of a grid's dimensions, on every architecture
KERNELS = {
    triton_prologue: ("normalise", "tile_sums"),
    triton_similarity: ("similarity", "lists"),
    triton_gradient: ("masked_sum", "collect", "totals", "project"),
}


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[int, ...]]]:
    """The grid of each launch of the Triton kernels, in place of it."""
    found: dict[str, list[tuple[int, ...]]] = {}

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            found[self.name].append(grid)
            return lambda *arguments, **meta: None

    for module, names in KERNELS.items():
        for name in names:
            found[name] = []
            monkeypatch.setattr(module, name, Recorder(name))
    return found


def embeddings(n: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(n, d, dtype=torch.float16, device="meta"), torch.empty(n, dtype=torch.int64, device="meta")


@pytest.mark.parametrize("config", ["sm_80", "sm_90", "sm_100", "other"])
@pytest.mark.parametrize(
    ("n", "m", "d"),
    [(300, 8_400_000, 512), (8_400_000, 300, 512), (20_000_000, None, 4096), (300, 10**9, 9), (10**6, None, 4_194_240)],
)
def test_triton_grids(config: str, n: int, m: int | None, d: int, grids: dict[str, list[tuple[int, ...]]]) -> None:
    """From 8.4 million rows on there are more tiles of rows than a grid's second dimension can have."""
    numbers = torch.empty(2, dtype=torch.float64, device="meta")
    ref_x, ref_y = (None, None) if m is None else embeddings(m, d)
    shape, gradients = triton_loss.CONFIGS[config], (True, m is not None)
    problem = Problem(*embeddings(n, d), ref_x, ref_y, None, numbers, numbers, False, True, *gradients)
    triton_loss.launch(shape, 132, problem)
    for name, launches in grids.items():
        assert launches, name
        for grid in launches:
            assert all(0 < size <= most for size, most in zip(grid, MOST, strict=False)), (name, grid)


def test_triton_refuses_more_rows_than_it_can_count() -> None:
    """Before anything is launched or allocated, with the number and the limit."""
    numbers = torch.empty(2, dtype=torch.float64, device="meta")
    x, y = embeddings(2**30, 1)
    with pytest.raises(RuntimeError, match=r"1,073,741,824 embeddings are more than 1,073,741,568"):
        triton_loss.run(Problem(x, y, None, None, None, numbers, numbers, False, True, True, False))
    few = embeddings(3, 1)
    with pytest.raises(RuntimeError, match="more than"):
        triton_loss.run(Problem(*few, x, y, None, numbers, None, False, True, True, True))


@pytest.mark.parametrize(
    ("n", "d", "words"),
    [
        (4, 4_194_241, "4,194,241 dimensions; there may be 4,194,240"),
        (2**21, 2**21 + 1, "2,097,152 embeddings of 2,097,153 dimensions are more than 4,398,046,511,104 numbers"),
    ],
)
def test_triton_refuses_what_its_grids_cannot_hold(n: int, d: int, words: str) -> None:
    numbers = torch.empty(2, dtype=torch.float64, device="meta")
    x, y = embeddings(n, d)
    with pytest.raises(RuntimeError, match=words):
        triton_loss.run(Problem(x, y, None, None, None, numbers, numbers, False, True, True, False))


@pytest.mark.parametrize(
    ("n", "d", "words"), [(2**31 - 255, 4, b"more than 2^31 - 256 embeddings"), (4, 2**22, b"4,194,240 dimensions")]
)
def test_cuda_refuses_before_a_launch(n: int, d: int, words: bytes) -> None:
    """Nothing of the problem's memory exists: whatever were launched would touch it."""
    call = LossCall(symmetric=True, n=n, m=n, d=d, sm=80, sm_count=132, rectangle=192, chunk=1024, one_chunk=4096)
    error = kernels().machine.library.loss_run(ctypes.byref(call), None)
    assert words in error
    assert not kernels().machine.take_reports()
