"""The host's part of the Triton kernels: same bits, no waiting, bounded memory; PyTorch; choice of the backend."""

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from support.batches import batch
from support.oracle import assert_same_bits, check, check_sides, run, two
from torch.utils._python_dispatch import TorchDispatchMode

from tcm_fused import tcm_loss
from tcm_fused.backends import choice
from tcm_fused.backends.operators import OPERATORS
from tcm_fused.backends.problem import Problem
from tcm_fused.reference import tcm_reference

if os.environ["TRITON_INTERPRET"] != "1":
    pytest.skip("TRITON_INTERPRET=0: the kernels are left to the GPU", allow_module_level=True)

from tcm_fused.backends import triton_gradient, triton_loss, triton_prologue, triton_similarity

# The same bits, no waiting, bounded memory.


@pytest.mark.parametrize(("rectangular", "precision"), [(False, "fp32"), (False, "fp16"), (True, "fp32")])
def test_same_bits_whatever_the_memory_held(rectangular: bool, precision: str, request: pytest.FixtureRequest) -> None:
    """Two runs, the second on poisoned memory; ragged in rows, columns and components."""
    sets = batch(135, 37, 9) + (batch(67, 37, 9, seed=1) if rectangular else ())
    options: dict[str, Any] = {"margin_plus": 0.0, "margin_minus": 0.0, "precision": precision}
    first = check("triton", *sets, **options)
    request.getfixturevalue("poisoned")
    again = run("triton", *sets, **options)
    assert_same_bits(again, first)
    check_sides("triton", *sets, **options)


def test_inputs_stay_as_they_are() -> None:
    sets = (*batch(70, 9, 5), *batch(40, 9, 5, seed=1))
    before = [t.clone() for t in sets]
    run("triton", *sets, margin_minus=0.1)
    for now, then in zip(sets, before, strict=True):
        assert torch.equal(now, then)


class _NoWait(TorchDispatchMode):
    """Refuses what makes the host wait for a device: values read, and shapes that depend on values."""

    REFUSED = ("_local_scalar_dense", "nonzero", "_unique", "masked_select", "is_nonzero", "equal.", "_to_copy", "item")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in self.REFUSED), func
        return func(*args, **(kwargs or {}))


def test_the_host_does_not_wait() -> None:
    """Of everything the launches do in between; the kernels themselves are left out here."""
    x, y = batch(200, 9, 5)
    sets, numbers = (x, y, *batch(230, 9, 5, seed=1), 7), two(0.9, 0.5)
    with pytest.MonkeyPatch.context() as patch:
        leave_kernels_out(patch)
        with _NoWait():
            triton_loss.run(Problem(*sets, numbers, numbers, False, False, True, True))
            triton_loss.run(Problem(x, y, None, None, None, numbers, None, False, True, True, False))


class _Count(TorchDispatchMode):
    """How many operations there are."""

    operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("reference", "most"), [(False, 17), (True, 22)])
def test_the_host_does_little(reference: bool, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations of PyTorch beside the kernels: sorts, zeros and memory, in one panel. Each takes the host as long."""
    leave_kernels_out(monkeypatch)
    x, y = batch(200, 9, 5)
    ref_x, ref_y = batch(230, 9, 5, seed=1) if reference else (None, None)
    problem = Problem(x, y, ref_x, ref_y, None, two(0.9, 0.5), two(1.0, 1.0), False, False, True, reference)
    with _Count() as found:
        triton_loss.launch(triton_loss.CONFIGS["sm_90"], 132, problem)
    assert found.operations <= most


class _Nothing:
    """A kernel that is not launched."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **meta: None


def leave_kernels_out(patch: pytest.MonkeyPatch) -> None:
    for module, names in (
        (triton_prologue, ("normalise", "tile_sums")),
        (triton_similarity, ("similarity", "lists")),
        (triton_gradient, ("masked_sum", "collect", "totals", "project")),
    ):
        for name in names:
            patch.setattr(module, name, _Nothing())


@pytest.mark.parametrize(("n", "m"), [(1000, None), (4096, None), (65_536, None), (1_000_000, None), (500, 10**6)])
def test_panels(n: int, m: int | None) -> None:
    """They cover every pair once, their memory is bounded, and they are few."""
    config, d = triton_loss.CONFIGS["sm_90"], 512
    padded = [-(-rows // config.columns) * config.columns for rows in (n, m or n)]
    walk = triton_loss.Walk.__new__(triton_loss.Walk)
    walk.config, walk.d, walk.symmetric = config, d, m is None
    walk.rows, walk.columns = (_padded(rows) for rows in padded)
    row = 0
    panels = list(walk.panels())
    for begin, height, column, width in panels:
        assert begin == row
        assert column == (begin if m is None else 0)
        assert column + width == padded[1]
        assert height % config.columns == 0
        assert 4 * height * width <= max(config.panel_bytes, 4 * d * max(padded))
        row += height
    assert row == padded[0]
    pairs = padded[0] * padded[1] // (2 if m is None else 1)
    # Heights are rounded down to tiles: at the least D = 512 rows, that is to no less than half.
    assert len(panels) <= 2 + 2 * pairs / max(config.panel_bytes // 4, d * max(padded))


def _padded(rows: int) -> Any:
    """Embeddings that have nothing but their size."""
    embedding = triton_loss.Embeddings.__new__(triton_loss.Embeddings)
    embedding.norm = torch.empty((2, rows), device="meta")
    return embedding


# In PyTorch's machinery.


@pytest.mark.parametrize("form", ["symmetric", "reference set"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype, form: str) -> None:
    """Schema, fake kernel, autograd registration, and tracing with static and dynamic shapes."""
    x, y = batch(40, 5, 5, dtype)
    ref_x, ref_y = batch(50, 5, 5, dtype, seed=1) if form == "reference set" else (None, None)
    x.requires_grad_()
    operators, how = OPERATORS[choice.choose("triton", "cpu", dtype)], (False, dtype != torch.float32, True, False)
    rows = (x, y, ref_x, ref_y, None, two(0.9, 0.1))
    torch.library.opcheck(operators.loss, (*rows, two(1.0, 2.0), *how))
    torch.library.opcheck(operators.penalties, (*rows, *how))


def test_compile() -> None:
    """One graph, forward and backward; the gradient is the eager one."""
    x, y = batch(40, 9, 5)
    expected = run("triton", x, y, margin_minus=0.1).grad_x
    x.requires_grad_()
    torch._dynamo.reset()
    loss = torch.compile(tcm_loss, fullgraph=True, backend="aot_eager")(x, y, margin_minus=0.1, backend="triton")
    torch.autograd.backward(loss)
    torch._dynamo.reset()
    assert x.grad is not None
    np.testing.assert_array_equal(x.grad.double().numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_reduction_over_all_pairs(dtype: torch.dtype) -> None:
    """Composed from the penalties: loss and gradients are those of the definition, by plain autograd."""
    sets = (*batch(70, 9, 5, dtype), *batch(135, 9, 5, dtype, seed=1))
    options: dict[str, Any] = {"margin_minus": 0.2, "lambda_plus": 3.0, "reduction": "all"}
    leaves = [t.double().requires_grad_() if t.is_floating_point() else t for t in sets]
    expected = tcm_reference(*leaves, **options)[0]
    torch.autograd.backward(expected)
    result = run("triton", *sets, **options, precision="fp32")
    assert result.loss == pytest.approx(expected.item(), rel=1e-6)
    for grad, leaf in ((result.grad_x, leaves[0]), (result.grad_ref, leaves[2])):
        assert leaf.grad is not None
        # 16-bit: the gradient's own rounding is half of eps. float32: besides its own there is that of sums over 135
        # unit vectors and of the projection; 1.6 eps is the worst of twelve other batches.
        atol = torch.finfo(dtype).eps * leaf.grad.abs().max().item()
        np.testing.assert_allclose(grad, leaf.grad.numpy(), rtol=0, atol=2 * atol if dtype == torch.float32 else atol)


# Which backend runs.


def test_float64_is_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match="backend='triton' has no float64 kernels; use backend='torch'"):
        tcm_loss(*batch(4, 3, 2, torch.float64), backend="triton")


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({0: torch.ones(6, 3, dtype=torch.float64)}, "embeddings must be"),
        ({1: torch.arange(5)}, "labels"),
        ({1: torch.arange(6, dtype=torch.int32)}, "labels must be int64"),
        ({2: torch.ones(8, 4)}, "embeddings must be"),
        ({2: torch.ones(8, 3).half()}, "of one dtype"),
        ({3: torch.arange(9)}, "labels"),
        ({3: None}, "both ref_x and ref_y"),
        ({4: 3}, "row_offset"),
        ({4: -1}, "row_offset"),
        ({5: two(0.9, 0.5).float()}, "margins and weights must be"),
        ({5: torch.ones(4, dtype=torch.float64)[::2]}, "margins and weights must be"),
        ({6: torch.ones((), dtype=torch.float64)}, "margins and weights must be"),
        ({7: True}, "no squared penalty"),
    ],
)
def test_operator_refuses_what_it_cannot_read(changed: dict[int, Any], word: str) -> None:
    """Called without `tcm_loss` it trusts nobody: a wrong argument would be read out of bounds."""
    call: list[Any] = [torch.ones(6, 3), torch.arange(6), torch.ones(8, 3), torch.arange(8), 0, two(0.9, 0.5)]
    call += [two(1.0, 1.0), False, False, True, True]
    for index, value in changed.items():
        call[index] = value
    with pytest.raises(RuntimeError, match=word):
        torch.ops.tcm_fused.loss_triton(*call)
    if 6 not in changed:
        with pytest.raises(RuntimeError, match=word):
            torch.ops.tcm_fused.penalties_triton(*call[:6], *call[7:])


def test_gpu_tensors_are_refused_in_the_interpreter() -> None:
    x, y = batch(4, 3, 2)
    with pytest.raises(RuntimeError, match="backend='triton' needs tensors on device 'cpu', embeddings are on 'meta'"):
        tcm_loss(x.to("meta"), y.to("meta"), backend="triton")


@pytest.mark.filterwarnings("error")
def test_auto_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA kernels, else Triton, else the blocked form with one warning that says why, or without one for float64."""
    missing: dict[str, str] = {}
    monkeypatch.setattr(choice, "why_unavailable", missing.get)
    monkeypatch.setattr(triton_loss, "INTERPRETED", False)
    assert choice.choose("auto", "cuda", torch.float32) == "cuda"
    missing["cuda"] = "it was built without nvcc; build it again with nvcc on the PATH"
    assert choice.choose("auto", "cuda", torch.float16) == "triton"
    assert choice.choose("auto", "cuda", torch.float64) == "torch"
    missing["triton"] = "pip install triton"
    with pytest.warns(UserWarning, match="slower PyTorch fallback on 'cuda'.*nvcc on the PATH.*pip install triton"):
        assert choice.choose("auto", "cuda", torch.float32) == "torch"
    assert choice.choose("auto", "cuda", torch.float32) == "torch"  # and no second warning, which would be an error
    assert choice.choose("auto", "cuda", torch.float64) == "torch"


def test_without_triton() -> None:
    """The package imports and works; asked for by name it tells the reason and the remedy."""
    script = """
import sys
sys.modules["triton"] = None
import torch
from tcm_fused import tcm_loss
x, y = torch.randn(9, 3), torch.arange(9) % 2
tcm_loss(x, y)
try:
    tcm_loss(x, y, backend="triton")
except RuntimeError as error:
    for words in ("backend='triton' is not available", "not be imported", "pip install triton", "backend='torch'"):
        assert words in str(error), error
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_a_gpu() -> None:
    """Outside the interpreter the reason is that there is no GPU; the kernels import all the same."""
    script = """
import torch
from tcm_fused.backends import choice
assert torch.cuda.is_available() or "torch finds no GPU" in choice.why_unavailable("triton")
import tcm_fused.backends.triton_loss
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
