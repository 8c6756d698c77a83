"""The correctness gate: no figure is taken from a loss that is wrong."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed.peers import MARGIN_MINUS, MARGIN_PLUS, PEERS, forward_backward, make_batch, make_classes
from tcm_fused import OPISResult
from tcm_fused.reference import tcm_reference

DENSITIES = ("none", "few", "half", "all")
TOLERANCE = 2e-6  # relative; one wrong pair in a batch of the gate moves the gradient by 1e-4 or more


def check_fused(
    loss_fn: Callable[..., Any], hard: str, n: int = 1100, d: int = 512, tolerance: float = TOLERANCE
) -> None:
    """Compare `loss_fn`, called like `tcm_loss`, with the definition in float64: loss, gradients and exact counts.

    Both forms are checked: rows against themselves, and a third of the rows against all as a reference set. `n` is
    no multiple of a tile, and small enough for `_clear_margin` to find a gap wider than float32's error.

    Raises:
        AssertionError: they differ; the message says in what and by how much.
    """
    x, labels = make_batch(n, d, hard, seed=1)
    options: Any = {"margin_plus": MARGIN_PLUS, "margin_minus": _clear_margin(x)}
    third = n // 3
    for form, sets in (("square", (x, labels)), ("reference set", (x[:third], labels[:third], x, labels))):
        embeddings, wide = _leaves(sets, torch.float32), _leaves(sets, torch.float64)
        loss, stats = loss_fn(*embeddings, **options, return_stats=True)
        expected, _, expected_count = tcm_reference(*wide, **options)
        loss.backward()
        expected.backward()
        where = f"tcm_fused, {form}, hard={hard!r}"
        count = [int(stats.count_plus), int(stats.count_minus)]
        assert count == expected_count.tolist(), f"{where}: counts {count}, not {expected_count.tolist()}"
        _assert_close(f"{where}: loss", loss, expected, tolerance)
        for name, ours, theirs in zip(("embeddings", "ref_emb"), embeddings[::2], wide[::2], strict=False):
            assert ours.grad is not None and theirs.grad is not None
            _assert_close(f"{where}: gradient by {name}", ours.grad, theirs.grad, tolerance)


def check_peer(name: str, hard: str, n: int = 128, d: int = 512) -> None:
    """Check that a peer computes the same loss and gradient, on a batch with no s within 5e-7 of the margin."""
    x, labels = make_batch(n, d, hard, seed=1)
    assert (_similarities(x) - MARGIN_MINUS).abs().min() > 5e-7, "choose another seed"
    wide = x.double().requires_grad_()
    expected, _, _ = tcm_reference(wide, labels)
    expected.backward()
    loss, grad = forward_backward(PEERS[name], x, labels)
    assert wide.grad is not None
    _assert_close(f"{name}, hard={hard!r}: loss", loss, expected)
    _assert_close(f"{name}, hard={hard!r}: gradient", grad, wide.grad)


def check_opis(opis_fn: Callable[..., OPISResult], n: int = 700, d: int = 64) -> None:
    """Compare `opis_fn`, called like `opis`, with the definition in float64, every pair written out, at its thresholds.

    Thresholds are moved off every pair by more than float32's error, so that counts must agree exactly.

    Raises:
        AssertionError: they differ; the message says in what.
    """
    x, labels = make_classes(n, d)
    s = _similarities(x).sort().values
    middle = (s[1:] + s[:-1])[s.diff() > 1e-6] / 2
    thresholds = middle[torch.linspace(0.85, 0.995, 41).mul(len(middle)).long()]
    result = opis_fn(x, labels, thresholds=thresholds.numpy(), distance="cosine")
    all_s = F.normalize(x.double()) @ F.normalize(x.double()).T
    same = labels[:, None] == labels
    positive, negative = same & ~torch.eye(n, dtype=torch.bool), ~same
    utility = torch.zeros(len(result.class_ids), len(thresholds), dtype=torch.float64)
    for c, label in enumerate(result.class_ids.tolist()):
        mine = labels == label
        own, other = all_s[mine][positive[mine]], all_s[mine][negative[mine]]
        phi = (own[:, None] >= thresholds).double().mean(0)
        psi = (other[:, None] < thresholds).double().mean(0)
        utility[c] = torch.nan_to_num(2 * phi * psi / (phi + psi))
    score = torch.trapezoid((utility - utility.mean(0)).square().mean(0), thresholds) / (thresholds[-1] - thresholds[0])
    assert (torch.from_numpy(result.utility) - utility).abs().max() < 1e-12, "the utility of a class is wrong"
    assert abs(result.opis - float(score)) < 1e-9, f"OPIS is {result.opis}, not {float(score)}"


def _leaves(sets: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """Embeddings as fresh leaves of `dtype` that require their gradient; labels as they are."""
    return [t.to(dtype, copy=True).requires_grad_() if t.is_floating_point() else t for t in sets]


def _clear_margin(x: Tensor) -> float:
    """A margin near 0.5 that no pair is close to: the middle of the widest gap between similarities.

    So float32 and float64 must agree on every pair, and counts are compared exactly.
    """
    s = _similarities(x)
    near = s[(s - MARGIN_MINUS).abs() < 0.01].sort().values
    if len(near) < 2:
        return MARGIN_MINUS
    widest = near.diff().argmax()
    return float(near[widest] + near[widest + 1]) / 2


def _similarities(x: Tensor) -> Tensor:
    """s of each pair once, [n (n - 1) / 2] float64."""
    x_hat = F.normalize(x.double())
    n = len(x)
    return (x_hat @ x_hat.T)[tuple(torch.triu_indices(n, n, 1))]


def _assert_close(what: str, actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """The largest error, relative to the largest expected value, is within the tolerance; NaN is not."""
    error = float((actual.detach() - expected.detach()).abs().max() / expected.detach().abs().max())
    assert error <= tolerance, f"{what} is off by {error:.1e} of its largest value; {tolerance:.0e} is allowed"
