"""The CUDA and the Triton kernels on a GPU: same bits, streams, graphs, no waiting, PyTorch's machinery."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.batches import batch
from support.crowd import poison_freed_memory
from support.gpu import DEVICE, arithmetic, assert_same_bits, loss_and_gradients, on_gpu
from support.oracle import check, two

from tcm_fused import TCMLoss, opis, tcm_loss
from tcm_fused.backends import choice
from tcm_fused.backends.operators import OPERATORS

pytestmark = pytest.mark.cuda

ROOT = Path(__file__).parents[2]

# The same bits.


@arithmetic
@pytest.mark.parametrize("rectangular", [False, True])
def test_two_runs_give_the_same_bits(gpu_backend: str, rectangular: bool, dtype: torch.dtype, precision: str) -> None:
    sets = (*on_gpu(3000, 65, dtype), *(on_gpu(1500, 65, dtype, seed=1) if rectangular else ()))
    first = loss_and_gradients(gpu_backend, *sets, precision=precision)
    for n in (400, 1100):
        loss_and_gradients(gpu_backend, *on_gpu(n, 33))
        poison_freed_memory(n, 65, 33)
        assert_same_bits(loss_and_gradients(gpu_backend, *sets, precision=precision), first)


def test_stream_of_the_caller(gpu_backend: str) -> None:
    """On another stream, after work there that is slow to produce the input, and none of it on the default stream."""
    sets = on_gpu(1500, 64)
    expected = loss_and_gradients(gpu_backend, *sets)
    side = torch.cuda.Stream()
    late = torch.full_like(sets[0], torch.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        late.copy_(sets[0])
        got = loss_and_gradients(gpu_backend, late, sets[1])
    assert torch.cuda.current_stream().query(), "the default stream was given work"
    side.synchronize()
    assert_same_bits(got, expected)


@arithmetic
@pytest.mark.parametrize("rectangular", [False, True])
def test_cuda_graph(gpu_backend: str, rectangular: bool, dtype: torch.dtype, precision: str) -> None:
    """Forward and backward are captured; replays follow what is written into the inputs, labels among it."""
    sets = (*on_gpu(700, 64, dtype), *(on_gpu(300, 64, dtype, seed=1) if rectangular else ()))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            loss_and_gradients(gpu_backend, *sets, precision=precision)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_gradients(gpu_backend, *sets, precision=precision)
    for seed in (0, 5, 6):
        changed = (*on_gpu(700, 64, dtype, seed), *(on_gpu(300, 64, dtype, seed + 1) if rectangular else ()))
        for target, source in zip(sets, changed, strict=True):
            target.copy_(source)
        graph.replay()
        assert_same_bits(captured, loss_and_gradients(gpu_backend, *changed, precision=precision))


@pytest.mark.parametrize("options", [{}, {"reduction": "all"}], ids=["loss", "penalties"])
def test_cuda_graph_follows_margins_and_weights(gpu_backend: str, options: dict[str, Any]) -> None:
    """Tensors on the device are read there, by a captured graph too; not finite, they make NaN of loss and gradient."""
    sets = on_gpu(700, 64)
    names = ("margin_plus", "margin_minus", "lambda_plus", "lambda_minus")
    numbers = {name: torch.tensor(1.0, dtype=torch.float64, device=DEVICE) for name in names}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            loss_and_gradients(gpu_backend, *sets, **numbers, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_gradients(gpu_backend, *sets, **numbers, **options)
    for values in ((0.9, 0.1, 1.0, 1.0), (0.3, -0.1, 0.0, 2.0), (3.0, -2.5, 0.5, 1.0), (-5.0, 5.0, 1.0, 1.0)):
        for number, value in zip(numbers.values(), values, strict=True):
            number.fill_(value)
        graph.replay()
        expected = loss_and_gradients(gpu_backend, *sets, **dict(zip(names, values, strict=True)), **options)
        assert_same_bits(captured, expected)
    for number in numbers.values():
        number.fill_(torch.nan)
        graph.replay()
        assert captured[0].isnan()
        assert captured[-1].isnan().all()
        number.fill_(0.5)


def test_margins_and_weights_do_not_wait_for_the_device(gpu_backend: str) -> None:
    """Numbers, tensors on the CPU, tensors on the device, and a mixture of these."""
    sets = on_gpu(1500, 64)
    on_device = torch.tensor(0.5, device=DEVICE)
    choices: list[dict[str, Any]] = [
        {"margin_plus": 0.875, "lambda_minus": 2.0},
        {"margin_plus": torch.tensor(0.875), "lambda_minus": torch.tensor(2)},
        {"margin_plus": on_device, "lambda_minus": on_device},
        {"margin_plus": on_device, "margin_minus": torch.tensor(0.25), "lambda_minus": on_device, "lambda_plus": 3.0},
    ]

    def calls() -> None:
        for numbers in choices:
            loss_and_gradients(gpu_backend, *sets, **numbers)
            loss_and_gradients(gpu_backend, *sets, **numbers, reduction="all")

    calls()  # whatever is compiled or loaded waits
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        calls()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@arithmetic
def test_nothing_waits_for_the_device(gpu_backend: str, dtype: torch.dtype, precision: str) -> None:
    """No synchronisation that torch knows of, and forward and backward return while the device is still busy."""
    sets = (*on_gpu(1500, 64, dtype), *on_gpu(700, 64, dtype, seed=1))

    def calls() -> None:
        loss_and_gradients(gpu_backend, *sets, precision=precision)
        loss_and_gradients(gpu_backend, *sets[:2], precision=precision)
        loss_and_gradients(gpu_backend, *sets, precision=precision, reduction="all")

    calls()  # whatever is compiled or loaded waits
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(1_000_000_000)  # about 0.5 s
        calls()
        assert not torch.cuda.current_stream().query(), "a call waited for the device"
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


@pytest.mark.parametrize("share", ["few", "all"])
def test_memory_grows_with_n(gpu_backend: str, share: str) -> None:
    """N = 131,072, D = 64: less than 1 GiB, N^2 bits would be twice as much; Triton's masks alone take that."""
    x, y = on_gpu(131_072, 64, torch.bfloat16)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss_and_gradients(gpu_backend, x, y, margin_minus=0.7 if share == "few" else -2.0)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < (2**30 if gpu_backend == "cuda" else 3 * 2**29)


def test_other_device(gpu_backend: str) -> None:
    """Tensors of a GPU that is not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU: no other one could hold the tensors")
    sets = on_gpu(500, 33)
    expected = loss_and_gradients(gpu_backend, *sets)
    got = loss_and_gradients(gpu_backend, *(t.to("cuda:1") for t in sets))
    assert {t.device for t in got} == {torch.device("cuda:1")}
    assert torch.cuda.current_device() == 0
    assert_same_bits([t.cuda() for t in got], expected)
    with pytest.raises(ValueError, match="move them to one device"):
        tcm_loss(sets[0], sets[1].to("cuda:1"), backend=gpu_backend)
    if gpu_backend == "cuda":  # and its pairs, counted by a thread of their own
        bar = find_spec("tqdm") is not None
        scores = [opis(*(t.to(device) for t in sets), progress=bar, backend="cuda").opis for device in (0, 1)]
        assert scores[0] == scores[1]


# In PyTorch's machinery.


def test_auto_is_the_kernel() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert choice.choose("auto", "cuda", dtype) == "fused"
    assert choice.choose("auto", "cuda", torch.float64) == "blocked"
    with pytest.raises(RuntimeError, match=r"float64.*backend='torch'"):
        tcm_loss(torch.ones(4, 2, dtype=torch.float64, device=DEVICE), torch.arange(4, device=DEVICE), backend="cuda")


def test_cpu_tensors(gpu_backend: str) -> None:
    with pytest.raises(RuntimeError, match="needs tensors on device 'cuda', embeddings are on 'cpu'"):
        tcm_loss(torch.ones(4, 2), torch.arange(4), backend=gpu_backend)


@pytest.mark.parametrize("rectangular", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_opcheck(gpu_backend: str, rectangular: bool, dtype: torch.dtype) -> None:
    x, y = on_gpu(70, 5, dtype)
    ref_x, ref_y = on_gpu(90, 5, dtype, seed=1)
    sets = (
        (x.requires_grad_(), y, ref_x.requires_grad_(), ref_y) if rectangular else (x.requires_grad_(), y, None, None)
    )
    operators, how = OPERATORS[choice.choose(gpu_backend, "cuda", dtype)], (False, dtype != torch.float32)
    for device in ("cpu", DEVICE):
        margins, weights = two(0.9, 0.1).to(device), two(1.0, 2.0).to(device)
        torch.library.opcheck(operators.loss, (*sets, None, margins, weights, *how, True, rectangular))
        torch.library.opcheck(operators.penalties, (*sets, None, margins, *how, True, rectangular))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_compile(gpu_backend: str, dtype: torch.dtype) -> None:
    x, y = on_gpu(300, 33, dtype)
    criterion = TCMLoss(margin_minus=0.0, backend=gpu_backend)
    x.requires_grad_()
    loss = torch.compile(criterion, fullgraph=True)(x, y)
    (grad,) = torch.autograd.grad(loss, [x])
    expected = criterion(x, y)
    (expected_grad,) = torch.autograd.grad(expected, [x])
    assert torch.equal(loss, expected)
    torch.testing.assert_close(grad, expected_grad)


def test_autocast_of_a_model(gpu_backend: str, rng: np.random.Generator) -> None:
    """A layer that autocast runs in bf16 feeds the loss; the fp32 weight gets its gradient."""
    x, y = on_gpu(200, 16)
    layer = torch.nn.Linear(16, 24).to(DEVICE)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        features = layer(x)
        loss = tcm_loss(features, y, margin_minus=0.0, backend=gpu_backend)
    loss.backward()
    assert (features.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    check(gpu_backend, features.detach().cpu(), y.cpu(), margin_minus=0.0)


def test_operator_refuses_what_the_kernels_trust() -> None:
    """Called directly: an error, not memory that is read where there is none."""
    x, y = on_gpu(70, 5)
    rest: Any = (None, two(0.9, 0.1), two(1.0, 2.0), False, False, True, True)
    for sets, message in (
        ((x, y.cpu(), None, None), "labels must be .* on their device"),
        ((x, y[1:], None, None), "labels"),
        ((x, y.int(), None, None), "int64"),
        ((x.double(), y, None, None), "float16, bfloat16 or float32"),
        ((x, y, x, None), "both ref_x and ref_y"),
        ((x, y, x[:, :3], y), "one width"),
        ((x, y, x.half(), y), "one dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OPERATORS["cuda"].loss(*sets, *rest)
    for offset in (-1, 1, 2**62):
        with pytest.raises(RuntimeError, match="row_offset"):
            OPERATORS["cuda"].loss(x, y, x, y, offset, *rest[1:])


@pytest.mark.skipif("TCM_FUSED_SM" in os.environ, reason="the process that this test starts would start itself again")
def test_path_for_older_gpus() -> None:
    """The kernels for sm_80 on a later GPU, in a process of their own."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU is before Hopper: all other tests take this path")
    chosen = "test_densities or test_widths or test_gradients or test_two_runs or test_no_pairs"
    chosen += " or test_pair_counts"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "tests/kernels/test_cuda.py",
            "tests/kernels/test_cuda_counts.py",
            "tests/kernels/test_cuda_host.py",
            "-k",
            f"({chosen}) and not triton",
        ],
        cwd=ROOT,
        env={**os.environ, "TCM_FUSED_SM": "80"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.skipif("TCM_FUSED_SM" in os.environ, reason="TCM_FUSED_SM asks for the path of older GPUs")
def test_hopper_runs_its_own_kernels() -> None:
    """Nothing else tells: where the copy engine cannot be set up, the kernels for older GPUs run without a word."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("this GPU is no Hopper: it cannot run these kernels")
    x, y = batch(600, 128, 5)
    x = x.to(DEVICE).requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.autograd.backward(tcm_loss(x, y.to(DEVICE), margin_minus=0.0, backend="cuda"))
        torch.ops.tcm_fused.counts(x.detach(), y.to(DEVICE), None, None, 5, torch.zeros(1, device=DEVICE), 17, None)
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages()]
    for parts in (("similarity_sm90", "LossVisitor"), ("similarity_sm90", "CountVisitor"), ("masked_sum_sm90",)):
        assert any(all(part in name for part in parts) for name in names), (parts, names)
