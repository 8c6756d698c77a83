"""Rows of any scale, and rows beside one that is not finite: the same on every backend, in the definition and in all
that is made of them."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_metric_learning.utils import loss_and_miner_utils as miners
from support.batches import KINDS, embeddings
from support.oracle import Result, as_array, assert_same_bits, compare, oracle_of, run
from torch import Tensor

from tcm_fused import CrossBatchMemory, TCMLoss, opis, tcm_loss
from tcm_fused.integrations.pytorch_metric_learning import ThresholdConsistentMarginLoss
from tcm_fused.reference import tcm_reference

FORMS = ("cpu", "torch", "triton", "reference")
MARGINS: dict[str, Any] = {"margin_plus": 0.8, "margin_minus": 0.1}
# In Triton's interpreter; on a GPU nobody hears of it.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in multiply")
# Powers of ten, of the largest component, up to the ends of each dtype; subnormal numbers too.
SCALES = {
    torch.float32: (-45, -44, -41, -38, -30, -20, -13, -11, 10, 19, 30, 38, 38.5),
    torch.bfloat16: (-40, -39, -38, -30, -20, -13, -11, 10, 19, 30, 38, 38.5),
    torch.float16: (-4, -2, 2, 4, 4.8),
    torch.float64: (-323, -320, -308, -200, -160, -100, -13, -11, 100, 160, 300, 307.5),
}
CASES = [(dtype, scale) for dtype, scales in SCALES.items() for scale in scales]


def evaluate(form: str, x: Tensor, y: Tensor, *reference: Tensor, **options: Any) -> Result:
    if form != "reference":
        return run(form, x, y, *reference, precision="fp32", **options)
    leaves = [t.detach().clone().requires_grad_() for t in (x, *reference[:1])]
    loss, penalty, count = tcm_reference(leaves[0], y, *leaves[1:], *reference[1:], **options)
    loss.backward()
    grads = [as_array(leaf.grad) for leaf in leaves if leaf.grad is not None]
    violation = penalty / count.clamp_min(1)
    return Result(loss.item(), count.numpy(), violation.double().numpy(), grads[0], grads[1] if reference else None)


def scaled(kind: str, form: str, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """45 rows: all of one scale, every third, of one huge or tiny entry, or of both within one row."""
    rng = np.random.default_rng(7)
    y = rng.integers(5, size=45)
    x = embeddings(kind, y, 9, rng)
    x /= np.abs(x).max(axis=1, keepdims=True)
    with np.errstate(over="ignore"):
        factor = np.float64(10.0) ** math.floor(scale) * 10.0 ** (scale - math.floor(scale))
    if form == "all":
        x *= factor
    elif form == "third":
        x[::3] *= factor
    elif form == "entry":
        x[::3, 4] = factor
    else:
        x *= factor
        x[::2, :4] *= 1e-30
    largest = torch.finfo(dtype).max
    return torch.from_numpy(x.clip(-largest, largest)).to(dtype), torch.from_numpy(y)


@pytest.mark.parametrize(("dtype", "scale"), CASES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_rows_of_any_scale(form: str, dtype: torch.dtype, scale: float, one_thread: None) -> None:
    """Both gradients against fp64, of rows and of columns; several kinds of embeddings."""
    if form == "triton" and dtype == torch.float64:
        pytest.skip("Triton has no float64 kernels")
    index = CASES.index((dtype, scale))
    for k, which in enumerate(("all", "third", "entry", "mixed")):
        if form == "triton" and k != index % 4:  # in the interpreter each takes seconds
            continue
        kind = KINDS[(index + k) % len(KINDS)]
        x, y = scaled(kind, which, scale, dtype)
        ref_x, ref_y = (t[:30] for t in scaled(kind, which, 0, dtype))
        for sets in ((x, y, ref_x, ref_y), (ref_x, ref_y, x, y)):
            oracle = oracle_of(*sets, **MARGINS)
            result = evaluate(form, *sets, **MARGINS)
            if dtype == torch.float16:  # gradients beyond 65504 are infinite in it, as in any cast
                assert (np.abs(oracle.evaluate(oracle.hard()).grad_x) < 6e4).all()
            compare(result, oracle, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_norms_beyond_the_dtype(form: str, dtype: torch.dtype, one_thread: None) -> None:
    """A row 64 times as long has a 64th of the gradient, and all else is the same; also as columns.

    The weights are large, so that bfloat16 has the gradient.
    """
    if form == "triton" and dtype == torch.float64:
        pytest.skip("Triton has no float64 kernels")
    rng = np.random.default_rng(3)
    y = torch.from_numpy(rng.integers(4, size=40))
    most = torch.finfo(dtype).max / 2**6
    x = torch.from_numpy(rng.uniform(0.5, 1, (40, 30)) * rng.choice([-1, 1], (40, 30)) * most).to(dtype)
    ref_x, ref_y = x[:30].sign(), y[:30]
    for sets, long in (((x, y), (64 * x, y)), ((ref_x, ref_y, x, y), (ref_x, ref_y, 64 * x, y))):
        assert all(t.isfinite().all() for t in long)
        options = {**MARGINS, "lambda_plus": 2.0**20, "lambda_minus": 2.0**20}
        expected, found = evaluate(form, *sets, **options), evaluate(form, *long, **options)
        assert found.loss == expected.loss
        assert found.count.tolist() == expected.count.tolist()
        grads = [(found.grad_x, expected.grad_x)] if len(sets) == 2 else [(found.grad_ref, expected.grad_ref)]
        for grad, of_shorter in grads:
            assert grad.any()
            # A few roundings in the dtype of the gradient, or in its smallest numbers, which have no more bits.
            finfo = torch.finfo(dtype)
            np.testing.assert_allclose(grad, of_shorter / 64, rtol=16 * finfo.eps, atol=4 * finfo.tiny * finfo.eps)


@pytest.mark.parametrize(("dtype", "scale"), CASES, ids=str)
def test_pairs_of_a_miner_of_any_scale(dtype: torch.dtype, scale: float) -> None:
    """All pairs one by one against fp64."""
    criterion = ThresholdConsistentMarginLoss(**MARGINS)
    for which in ("all", "third", "entry", "mixed"):
        x, y = scaled("random", which, scale, dtype)
        leaf = x.clone().requires_grad_()
        loss = criterion(leaf, None, tuple(miners.get_all_pairs_indices(y)))
        loss.backward()
        assert criterion.stats is not None and leaf.grad is not None
        count, violation = (torch.stack(two) for two in (criterion.stats[:2], criterion.stats[2:]))
        result = Result(loss.item(), count.numpy(), violation.double().numpy(), as_array(leaf.grad), None)
        compare(result, oracle_of(x, y, **MARGINS), dtype)


@pytest.mark.parametrize(("dtype", "scale"), CASES, ids=str)
def test_counts_of_any_scale(dtype: torch.dtype, scale: float) -> None:
    """`opis` sees the directions only, but of rows shorter than 1e-12."""
    thresholds = [0.05, 0.3, 0.6]
    if scale < -12:
        expected = None
    else:
        x, y = scaled("classes", "third", scale, dtype)
        wide = x.double()
        wide /= wide.abs().amax(1, keepdim=True)
        expected = opis(wide, y, thresholds=thresholds, backend="torch")
    x, y = scaled("classes", "third", scale, dtype)
    found = [opis(x, y, thresholds=thresholds, backend=backend) for backend in ("cpu", "torch")]
    for result in found if expected is None else [*found, expected]:
        assert result.opis == pytest.approx(found[0].opis, rel=1e-5)
        assert result.recall_at_1 == found[0].recall_at_1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_stored_rows_of_any_scale(dtype: torch.dtype) -> None:
    """A bank of them acts as they do."""
    for scale in SCALES[dtype]:
        x, y = scaled("random", "all", 0, dtype)
        old, old_y = scaled("classes", "third", scale, dtype)
        criterion = CrossBatchMemory(TCMLoss(**MARGINS, backend="cpu"), size=45)
        criterion(old, old_y)
        leaf = x.clone().requires_grad_()
        criterion(leaf, y).backward()
        # As one batch, of which only the pairs with a row of `x` count.
        rows, columns = torch.cat([x, old]), torch.cat([y, old_y])
        _, stats = tcm_loss(x, y, rows, columns, row_offset=0, **MARGINS, backend="cpu", return_stats=True)
        assert criterion.loss.stats is not None
        assert criterion.loss.stats.count_plus == stats.count_plus
        assert criterion.loss.stats.count_minus == stats.count_minus
        for a, b in zip(criterion.loss.stats[2:], stats[2:], strict=True):
            torch.testing.assert_close(a, b)
        assert leaf.grad is not None and leaf.grad.isfinite().all()


# Beside a row that is not finite: 0 where a row is left out, NaN where it takes part, if only with a zero row.


def a_batch(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Six rows: not finite, of its class, of another, left out, zero, left out and not finite."""
    x = torch.eye(6, dtype=dtype)
    x[0, 0], x[4], x[5] = torch.nan, 0, torch.inf
    return x, torch.tensor([0, 0, 1, -1, 2, -7])


def other_rows(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Finite, the second left out, the third zero."""
    x = torch.eye(6, dtype=dtype)[:4] + 0.1
    x[2] = 0
    return x, torch.tensor([0, -1, 1, 9])


def _operator(backend: str, **options: Any) -> Callable[..., Tensor]:
    def loss(*sets: Tensor) -> Tensor:
        extra = dict(options)
        if "group_pairs" in options:
            extra["groups"] = torch.arange(len(sets[0])) % 2
            if len(sets) > 2:
                extra["ref_groups"] = torch.arange(len(sets[2])) % 2
        return tcm_loss(*sets, backend=backend, **extra)

    return loss


VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    " all": {"reduction": "all"},
    " no hard pair": {"margin_plus": -9.0, "margin_minus": 9.0},
    " squared": {"penalty": "squared"},
    " within": {"group_pairs": "within"},
    " across": {"group_pairs": "across"},
}
LOSSES: dict[str, Callable[..., Tensor]] = {
    "reference": lambda *sets: tcm_reference(*sets)[0],
    **{
        backend + name: _operator(backend, **options)
        for backend in ("cpu", "torch", "triton")
        for name, options in VARIANTS.items()
        if backend != "triton" or name != " squared"  # which it has not
    },
}


@pytest.mark.filterwarnings("ignore:margin_plus=-9 is below")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("form", LOSSES)
def test_gradients_beside_a_row_that_is_not_finite(form: str, dtype: torch.dtype) -> None:
    if form.startswith("triton") and dtype == torch.float64:
        pytest.skip("Triton has no float64 kernels")
    bad, good = a_batch(dtype), other_rows(dtype)
    for sets in (bad, (*bad, *good), (*good, *bad)):
        leaves = [x.clone().requires_grad_() for x in sets[::2]]
        arguments = [t for pair in zip(leaves, sets[1::2], strict=True) for t in pair]
        loss = LOSSES[form](*arguments)
        loss.backward()
        assert loss.isnan()
        for leaf, y in zip(leaves, sets[1::2], strict=True):
            assert leaf.grad is not None
            assert leaf.grad[y >= 0].isnan().all()
            assert not leaf.grad[y < 0].any()


@pytest.mark.parametrize("side", ["plus", "minus"])
@pytest.mark.parametrize("form", ["cpu", "torch"])
def test_a_side_of_weight_0_may_be_infinite(form: str, side: str) -> None:
    """Squared violations of 1e30 are too large for float32; with weight 0 nothing depends on them."""
    x, y = scaled("classes", "all", 0, torch.float32)
    other = scaled("random", "all", 0, torch.float32)
    for sets in ((x, y), (x, y, *other)):
        options: dict[str, Any] = {**MARGINS, f"lambda_{side}": 0.0, "penalty": "squared"}
        far: dict[str, Any] = {f"margin_{side}": 1e30 if side == "plus" else -1e30}
        results = [run(form, *sets, **{**options, **margins}) for margins in (far, {})]
        infinite, wanted = (replace(r, count=r.count[:0], violation=r.violation[:0]) for r in results)
        assert_same_bits(infinite, wanted)


def test_pairs_of_a_miner_beside_a_row_that_is_not_finite() -> None:
    """A row in no pair is left out."""
    x = a_batch(torch.float32)[0].requires_grad_()
    pairs = tuple(torch.tensor(index) for index in ([0], [1], [2, 4], [1, 2]))
    ThresholdConsistentMarginLoss()(x, None, pairs).backward()
    assert x.grad is not None
    assert x.grad[[0, 1, 2, 4]].isnan().all()
    assert not x.grad[[3, 5]].any()


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_memory_beside_a_row_that_is_not_finite(backend: str) -> None:
    criterion = CrossBatchMemory(TCMLoss(backend=backend), size=8)
    criterion(*other_rows(torch.float32))
    x, y = a_batch(torch.float32)
    x.requires_grad_()
    criterion(x, y).backward()
    assert x.grad is not None
    assert x.grad[y >= 0].isnan().all()
    assert not x.grad[y < 0].any()
