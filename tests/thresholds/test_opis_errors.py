"""Bad sets and options of `opis`, `calibrate` and `suggest_margins`, and machines without this or that."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.opis_oracle import clustered
from torch import Tensor

from tcm_fused import calibrate, opis, suggest_margins, warn
from tcm_fused.backends import choice

# Bad input.

GOOD = (torch.eye(4), torch.tensor([0, 0, 1, 1]))
CALLS: dict[str, Callable[..., Any]] = {
    "opis": opis,
    "calibrate": lambda *a, **k: calibrate(*a, far=0.1, **k),
    "suggest_margins": lambda *a, **k: suggest_margins(*a, far=0.1, frr=0.1, **k),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.eye(4), torch.zeros(4, dtype=torch.int64), "labels must name at least two classes"),
        (torch.eye(4), torch.full((4,), -1), "labels must name at least two classes.*got 0"),
        (torch.empty(0, 3), torch.empty(0, dtype=torch.int64), "labels must name at least two classes"),
        (torch.eye(4), torch.arange(4), "no class has two samples"),
        (torch.eye(4).index_fill(0, torch.tensor(2), torch.nan), GOOD[1], "embeddings must be finite.*1 of 4.*row 2"),
        (torch.eye(4) * torch.inf, GOOD[1], "embeddings must be finite.*4 of 4"),
        (torch.eye(4), torch.tensor([0, 0, 1]), r"labels must have shape \[4\]"),
        (torch.ones(4), GOOD[1], r"embeddings must have shape \[N, D\]"),
    ],
)
def test_bad_sets(call: str, x: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CALLS[call](x, y)


@pytest.mark.parametrize("call", CALLS)
def test_bad_types(call: str) -> None:
    with pytest.raises(TypeError, match=r"embeddings must be a tensor, an array, .*, got dict"):
        CALLS[call]({"x": [1.0]}, GOOD[1])
    with pytest.raises(TypeError, match="labels must have an integer dtype"):
        CALLS[call](GOOD[0], GOOD[1].float())
    with pytest.raises(ValueError, match="backend='gpu' is not known"):
        CALLS[call](*GOOD, backend="gpu")
    with pytest.raises(RuntimeError, match=r"backend='cuda' (is not available|needs tensors)"):
        CALLS[call](*GOOD, backend="cuda")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"far_range": (0.0, 0.1)}, "far_range must lie between 0 and 1"),
        ({"far_range": (0.1, 1.0)}, "far_range must lie between 0 and 1"),
        ({"far_range": (0.1, 0.01)}, r"far_range must be \(low, high\).*empty"),
        ({"far_range": (0.1, 0.1)}, r"far_range must be \(low, high\).*empty"),
        ({"frr_range": (-0.1, 0.5)}, "frr_range must lie between 0 and 1"),
        ({"far_range": (0.01, 0.02)}, "the calibration range is empty.*far_range.*takes values"),
        ({"frr_range": (0.01, 0.02)}, "the calibration range is empty.*frr_range"),
        ({"thresholds": [0.5]}, "thresholds must be at least two ascending numbers"),
        ({"thresholds": [0.5, 0.4]}, "thresholds must be at least two ascending numbers"),
        ({"thresholds": [0.5, math.nan]}, "thresholds must be at least two ascending numbers"),
        ({"thresholds": [[0.5, 0.6]]}, "thresholds must be at least two ascending numbers"),
        ({"thresholds": [0.5, 2.1]}, "thresholds must lie from 0 to 2, the euclidean axis"),
        ({"thresholds": [-1.5, 0.1], "distance": "cosine"}, "thresholds must lie from -1 to 1, the cosine axis"),
        ({"num_thresholds": 1}, "num_thresholds must be at least 2"),
        ({"distance": "manhattan"}, "distance='manhattan' is not known"),
        ({"beta": 0}, "beta must be above 0"),
        ({"beta": -1}, "beta must be finite and at least 0"),
        ({"beta": 1e200}, "beta must be above 0 and at most 1e100"),
        ({"beta": math.inf}, "beta must be finite"),
        ({"epsilon": 0}, "epsilon must lie between 0 and 1"),
        ({"epsilon": 1.0}, "epsilon must lie between 0 and 1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opis(*GOOD, **options)


def test_bad_option_types() -> None:
    options: dict[str, Any]
    for options in ({"far_range": 0.1}, {"far_range": ("a", "b")}, {"num_thresholds": 10.0}, {"beta": "1"}):
        with pytest.raises(TypeError):
            opis(*GOOD, **options)


@pytest.mark.parametrize("rate", [0, 1, -0.1, 1.5, math.nan])
def test_rates_outside_0_and_1(rate: float) -> None:
    for name in ("far", "frr"):
        with pytest.raises(ValueError, match=f"{name} must lie between 0 and 1"):
            calibrate(*GOOD, far=rate) if name == "far" else calibrate(*GOOD, frr=rate)
        with pytest.raises(ValueError, match=f"{name} must lie between 0 and 1"):
            suggest_margins(*GOOD, far=rate if name == "far" else 0.1, frr=rate if name == "frr" else 0.1)


def test_one_bound() -> None:
    both: tuple[dict[str, Any], ...] = ({}, {"far": 0.1, "frr": 0.1})
    for bounds in both:
        with pytest.raises(ValueError, match="give exactly one of far and frr"):
            calibrate(*GOOD, **bounds)


def test_kernel_refuses_what_python_would_not_send() -> None:
    x, y, t = torch.eye(4), torch.tensor([0, 0, 1, 1]), torch.empty(0)
    rows, one = (x, y), (None, None)
    for bad in (
        (x * torch.nan, y, *one, 2, t, 5),
        (x, y.int(), *one, 2, t, 5),
        (*rows, *one, 2, t.double(), 5),
        (*rows, *one, 2, t, 21),
        (*rows, *one, -1, t, 5),
        (x, y[:3], *one, 2, t, 5),
        (x[0], y, *one, 2, t, 5),
        (*rows, *one, 2, t[None], 5),
        (*rows, x, None, 2, t, 5),
        (*rows, None, y, 2, t, 5),
        (*rows, x * torch.nan, y, 2, t, 5),
        (*rows, x[:, :3], y, 2, t, 5),
        (*rows, x.double(), y, 2, t, 5),
        (*rows, x[0], y, 2, t, 5),
        (*rows, x, y[:3], 2, t, 5),
        (*rows, x, y.int(), 2, t, 5),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            torch.ops.tcm_fused.counts(*bad, None)
    for progress in (torch.zeros(2), torch.zeros(1, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)[::2]):
        with pytest.raises(RuntimeError, match="progress must be two int64"):
            torch.ops.tcm_fused.counts(*rows, *one, 2, t, 5, progress)


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then "auto" is the blocked form, with a warning, and the kernel by name an error that tells why."""
    x, y = clustered(n=100)
    expected = opis(x, y, thresholds=[0.8, 1.2])
    monkeypatch.setattr(choice, "_IMPORT_ERROR", "no such file")
    monkeypatch.setattr(warn, "TOLD", set())
    with pytest.warns(UserWarning, match="slower PyTorch fallback on 'cpu'.*no such file") as warned:
        assert opis(x, y, thresholds=[0.8, 1.2]).opis == pytest.approx(expected.opis, abs=1e-4)
    assert warned[0].filename == __file__, "not at the caller"
    with pytest.raises(RuntimeError, match=r"backend='cpu' is not available.*no such file"):
        opis(x, y, backend="cpu")


def test_choice_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CUDA device the kernel for all that is float32 by then, else the blocked form; by name it runs or raises."""
    kernel, blocked = torch.ops.tcm_fused.counts.default, torch.ops.tcm_fused.counts_blocked.default
    assert choice.choose_counter("auto", "cpu", torch.float64) is kernel
    monkeypatch.setattr(choice, "why_unavailable", lambda backend: None)
    assert choice.choose_counter("auto", "cuda", torch.float32) is kernel
    assert choice.choose_counter("cuda", "cuda", torch.float32) is kernel
    for device, dtype in (("cuda", torch.float64), ("mps", torch.float32)):
        assert choice.choose_counter("auto", device, dtype) is blocked
    with pytest.raises(RuntimeError, match=r"no float64 kernels; use backend='torch'"):
        choice.choose_counter("cuda", "cuda", torch.float64)
    with pytest.raises(RuntimeError, match="needs tensors on device 'cuda', embeddings are on 'cpu'"):
        choice.choose_counter("cuda", "cpu", torch.float32)
    with pytest.raises(RuntimeError, match="'cpu', 'cuda' or 'torch' only"):
        choice.choose_counter("triton", "cuda", torch.float32)
    monkeypatch.setattr(warn, "TOLD", set())
    monkeypatch.setattr(choice, "why_unavailable", {"cuda": "a reason"}.get)
    with pytest.warns(UserWarning, match="slower PyTorch fallback on 'cuda': a reason"):
        assert choice.choose_counter("auto", "cuda", torch.float32) is blocked
