"""What the benchmarks measure: batches of a known density of hard pairs, the ways to compute the loss on them,
and honest readings of time and peak memory."""

import ctypes
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tcm_fused import tcm_loss

MARGIN_PLUS = 0.9  # the defaults of tcm_fused and of pytorch-metric-learning; each lambda is 1
MARGIN_MINUS = 0.5
# Two rows share a centre, and so are a hard pair, with probability 1 / centres.
_CENTRES = {"few": 4096, "1e-4": 10_000, "1e-3": 1000, "1e-2": 100}

# cos^2 between a row and the direction common to all: the mean similarity of the batch.
_MEAN_SIMILARITY = {"half": MARGIN_MINUS, "all": 0.75}


def make_batch(n: int, d: int, hard: str = "few", seed: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Embeddings [n, d] float32 of uneven norms and labels [n] int64: classes of four rows, in shuffled order.

    `hard` sets how many of the negatives have s >= 0.5. Hard pairs lie anywhere, in no block of the matrix.

        none   random directions: s is about normal around 0 with deviation 1 / sqrt(d). None at d = 128 and up
               (5.7 deviations); at d = 64 about 1e-5 of the pairs stray over the margin
        1e-4   rows drawn to one of 10,000 random centres, whatever their label: 1e-4 of the pairs, at any n
        1e-3   of 1000: 1e-3 of the pairs
        1e-2   of 100: 1e-2 of the pairs
        few    of 4096: 2.4e-4 of the pairs
        half   a common direction at 45 degrees to every row: s is symmetric around 0.5
        all    a common direction, closer: s is 0.75 +- 0.25 / sqrt(d)

    All positives have s <= 0.9, so each of them is hard.
    """
    generator = torch.Generator(device).manual_seed(seed)
    random = partial(torch.randn, generator=generator, device=device)
    noise = F.normalize(random(n, d))
    if hard == "none":
        x_hat = noise
    elif hard in _CENTRES:
        centres = F.normalize(random(_CENTRES[hard], d))
        mine = torch.randint(_CENTRES[hard], (n,), generator=generator, device=device)
        x_hat = 0.7**0.5 * centres[mine] + 0.3**0.5 * noise  # s is 0.7 within a centre
    elif hard in _MEAN_SIMILARITY:
        # Noise orthogonal to the common direction, of one length: no row is harder than another.
        common = F.normalize(random(1, d))
        noise = F.normalize(noise - (noise @ common.T) * common)
        share = _MEAN_SIMILARITY[hard]
        x_hat = share**0.5 * common + (1 - share) ** 0.5 * noise
    else:
        raise ValueError(
            f"hard={hard!r} is not known; choose one of 'none', '1e-4', 'few', '1e-3', '1e-2', 'half', 'all'"
        )
    length = 0.5 + torch.rand(n, 1, generator=generator, device=device)
    labels = torch.randperm(n, generator=generator, device=device) // 4
    return x_hat * length, labels


def make_classes(n: int, d: int, seed: int = 0, classes: int | None = None) -> tuple[Tensor, Tensor]:
    """Embeddings [n, d] float32 and labels [n] int64 in classes of 5.3 rows, as Stanford Online Products has, unless
    told how many.

    They vary in 64 directions, and classes differ in how far they spread, so their accept rates differ.
    """
    generator = torch.Generator().manual_seed(seed)
    classes = max(2, n * 11316 // 60000 if classes is None else classes)
    labels = torch.arange(n) % classes
    spread = 0.5 + torch.rand(classes, 1, generator=generator)
    inner = torch.randn(classes, 64, generator=generator)[labels]
    inner += spread[labels] * torch.randn(n, 64, generator=generator)
    order = torch.randperm(n, generator=generator)
    return (inner @ torch.randn(64, d, generator=generator))[order], labels[order]


def symmetric_product(x: Tensor, rows: int = 1024) -> None:
    """Similarities of every pair of rows of x [N, D] once, in strips that are thrown away: N^2 D flop, no more."""
    x_hat = F.normalize(x)
    strip = torch.empty(rows * len(x))
    for i in range(0, len(x), rows):
        block = x_hat[i : i + rows]
        torch.mm(block, x_hat[i:].T, out=strip[: len(block) * (len(x) - i)].view(len(block), len(x) - i))


def eager_tcm(x: Tensor, labels: Tensor, ref_x: Tensor | None = None, ref_labels: Tensor | None = None) -> Tensor:
    """The loss as one would write it in PyTorch: one product, boolean masks, autograd; O(N M) memory.

    Positives are few, so they are taken out; negatives are masked where they are. Measured at N = 4096, D = 512
    against masking both and taking both out: fastest or close to it at every density.
    """
    s, same, positive = _pairs(x, labels, ref_x, ref_labels)
    s_plus = s[positive]
    hard_plus = s_plus <= MARGIN_PLUS
    hard_minus = ~same & (s >= MARGIN_MINUS)
    return _mean_over(hard_plus, MARGIN_PLUS - s_plus) + _mean_over(hard_minus, s - MARGIN_MINUS)


def masked_tcm(x: Tensor, labels: Tensor, ref_x: Tensor | None = None, ref_labels: Tensor | None = None) -> Tensor:
    """The same with both sides masked: no shape depends on the data, so it compiles to one graph."""
    s, same, positive = _pairs(x, labels, ref_x, ref_labels)
    hard_plus = positive & (s <= MARGIN_PLUS)
    hard_minus = ~same & (s >= MARGIN_MINUS)
    return _mean_over(hard_plus, MARGIN_PLUS - s) + _mean_over(hard_minus, s - MARGIN_MINUS)


def compiled_tcm(x: Tensor, labels: Tensor, ref_x: Tensor | None = None, ref_labels: Tensor | None = None) -> Tensor:
    """`masked_tcm` through torch.compile, specialised to each shape at the first call: so it is fastest."""
    return _compiled()(x, labels, ref_x, ref_labels)


def _pairs(x: Tensor, labels: Tensor, ref_x: Tensor | None, ref_labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Similarities [N, M], which pairs share a label, and which of those are positives: a row is not its own."""
    x_hat = F.normalize(x)
    if ref_x is None or ref_labels is None:
        same = labels[:, None] == labels
        return x_hat @ x_hat.T, same, same.clone().fill_diagonal_(False)
    same = labels[:, None] == ref_labels
    return x_hat @ F.normalize(ref_x).T, same, same


def _mean_over(hard: Tensor, violation: Tensor) -> Tensor:
    """Mean of `violation` where `hard`, 0 if nowhere."""
    return torch.where(hard, violation, 0).sum() / hard.sum().clamp_min(1)


def pml_tcm(x: Tensor, labels: Tensor) -> Tensor:
    """pytorch-metric-learning's `ThresholdConsistentMarginLoss`: gathers both rows of every pair, O(N^2 D) memory."""
    return _pml()(x, labels)


PEERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "tcm_fused": tcm_loss,
    "eager": eager_tcm,
    "torch.compile": compiled_tcm,
    "pytorch-metric-learning": pml_tcm,
}


@cache
def _compiled() -> Callable[..., Tensor]:
    torch._dynamo.config.recompile_limit = 64  # more than the benchmarks have shapes
    return torch.compile(masked_tcm, fullgraph=True, dynamic=False)


@cache
def _pml() -> Any:
    from pytorch_metric_learning.losses import ThresholdConsistentMarginLoss  # slow to import; not always needed

    return ThresholdConsistentMarginLoss(margin_plus=MARGIN_PLUS, margin_minus=MARGIN_MINUS)


def forward_backward(
    loss_fn: Callable[..., Tensor], x: Tensor, labels: Tensor, *reference: Tensor
) -> tuple[Tensor, Tensor]:
    """One training step's share of the loss: its value [] and its gradient by `x` [N, D]."""
    x = x.detach().requires_grad_()
    loss = loss_fn(x, labels, *reference)
    loss.backward()
    assert x.grad is not None
    return loss.detach(), x.grad


def time_alternating(callables: dict[str, Callable[[], object]], runs: int = 5) -> dict[str, list[float]]:
    """Seconds of each callable in `runs` rounds of A B C A B C ..., after a warm-up of each.

    Alternating gives a slow spell of the machine to all of them, so that ratios of medians hold where times drift.
    """
    for function in callables.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in callables}
    for _ in range(runs):
        for name, function in callables.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_extra_bytes(fn: Callable[[], object], warm_up: Callable[[], object] | None = None) -> int:
    """Peak resident memory of `fn()` beyond what its process held before, in bytes (Linux).

    A fresh process runs it: a used one has freed memory to hand out unseen. What `fn` closes over counts as held
    before, so both callables travel pickled: use `functools.partial` over module-level functions. `warm_up` runs
    first and pays for what a process needs once (thread pools, BLAS buffers); the default is a small `tcm_fused`
    and a small eager step.
    """
    child = subprocess.run(
        [sys.executable, "-c", "from benchmarks.speed.peers import measure_own_peak; measure_own_peak()"],
        input=pickle.dumps((warm_up or _small_steps, fn)),
        stdout=subprocess.PIPE,
        cwd=Path(__file__).resolve().parents[2],
        check=True,
    )
    return int(child.stdout.split()[-1])


def _small_steps() -> None:
    x, labels = make_batch(1024, 128)
    for name in ("tcm_fused", "eager"):
        forward_backward(PEERS[name], x, labels)


def measure_own_peak() -> None:
    """The child of `peak_extra_bytes`: callables in through stdin, bytes out through stdout."""
    warm_up, fn = pickle.load(sys.stdin.buffer)
    warm_up()
    ctypes.CDLL(None).malloc_trim(0)  # free memory goes back, else `fn` could reuse it without being seen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = _status_bytes("VmRSS")
    result = fn()
    print(_status_bytes("VmHWM") - before)
    del result


def _status_bytes(field: str) -> int:
    """A memory reading of this process from /proc, which gives kibibytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")
