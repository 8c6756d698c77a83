"""Time and peak memory of loss and gradient, fp32, in ratio to one similarity product and to the peers.

Every test times `tcm_fused` through pytest-benchmark and its peers in alternation with it, in one process; what the
peers took, the ratios of the medians, and peak memory go into `extra_info`. Nothing is asserted about time: goals are
reported beside the figures by `benchmarks.speed.report`. `--benchmark-disable` runs everything once on small batches.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed.gate import DENSITIES
from benchmarks.speed.peers import PEERS, eager_tcm, forward_backward, make_batch, peak_extra_bytes
from tcm_fused import tcm_loss

Steps = dict[str, Callable[[], object]]
GROWTH = (4096, 8192, 16384, 32768, 65536)
EAGER_UP_TO = 16384  # the next takes a minute a step and 16 GiB


@pytest.mark.benchmark(group="density")
@pytest.mark.parametrize("hard", ("none", "few", "1e-3", "1e-2", "half", "all"))
def test_density(benchmark: Any, hard: str) -> None:
    """From no hard pair to all."""
    x, labels = _batch(benchmark, 8192, 512, hard)
    steps = _steps(x, labels, "tcm_fused", "eager", "torch.compile") | {"product": _product(x)}
    measure(benchmark, steps)


@pytest.mark.benchmark(group="small")
@pytest.mark.parametrize("n", (64, 128, 256, 512, 1024))
def test_small(benchmark: Any, n: int) -> None:
    """Batches that fit on one device without any trick: overheads count."""
    x, labels = _batch(benchmark, n, 128, "few")
    steps = _steps(x, labels, "tcm_fused", "eager", "torch.compile") | {"product": _product(x)}
    measure(benchmark, steps, runs=51)


@pytest.mark.benchmark(group="library")
@pytest.mark.parametrize("n", (256, 1024))
def test_library(benchmark: Any, n: int) -> None:
    """The peers that users come from. At N = 1024 pytorch-metric-learning takes 17 GB: two runs to ten of ours."""
    x, labels = _batch(benchmark, n, 512, "few")
    few = n == 1024
    steps = _steps(x, labels, *PEERS)
    # 20 s a run, and the smaller batch has warmed it up
    warm_up = {name: step for name, step in steps.items() if name != "pytorch-metric-learning"} if few else steps
    measure(benchmark, steps, runs=10 if few else 5, peers_every=5 if few else 1, warm_up=warm_up)
    _measure_memory(benchmark, x, labels, *PEERS)


@pytest.mark.benchmark(group="growth")
@pytest.mark.parametrize("n", GROWTH)
def test_growth(benchmark: Any, n: int) -> None:
    """Time goes with N^2, memory with N. Eager comes along as far as it can, in two runs of each size."""
    x, labels = _batch(benchmark, n, 128, "few")
    peers = ("tcm_fused", "eager") if n <= EAGER_UP_TO else ("tcm_fused",)
    measure(benchmark, _steps(x, labels, *peers), peers_every=3)
    _measure_memory(benchmark, x, labels, *peers)


@pytest.mark.benchmark(group="memory")
@pytest.mark.parametrize("hard", ("1e-3", "1e-2", "half", "all"))
def test_memory_of_dense_pairs(benchmark: Any, hard: str) -> None:
    """The largest batch of the growth with many hard pairs, once: memory may not depend on how many there are."""
    x, labels = _batch(benchmark, GROWTH[-1], 128, hard)
    measure(benchmark, _steps(x, labels, "tcm_fused"), runs=1)
    _measure_memory(benchmark, x, labels, "tcm_fused")


@pytest.mark.benchmark(group="width")
@pytest.mark.parametrize("d", (64, 128, 256, 512, 1024))
def test_width(benchmark: Any, d: int) -> None:
    """From narrow embeddings, where looking at pairs costs most, to wide ones, where the product does."""
    x, labels = _batch(benchmark, 4096, d, "few")
    measure(benchmark, _steps(x, labels, "tcm_fused", "eager") | {"product": _product(x)})


@pytest.mark.benchmark(group="reference set")
@pytest.mark.parametrize("hard", DENSITIES)
def test_reference_set(benchmark: Any, hard: str) -> None:
    """A batch of 1024 rows against a memory of 65,536 that needs no gradient: no symmetry to use."""
    n, m = 1024, 65536
    x, labels = _batch(benchmark, n + m, 128, hard)
    n = min(n, len(x) // 2)
    sets = (x[:n], labels[:n], x[n:], labels[n:])
    steps: Steps = {
        "tcm_fused": partial(forward_backward, tcm_loss, *sets),
        "eager": partial(forward_backward, eager_tcm, *sets),
        "product": _product(x[:n], x[n:]),
    }
    measure(benchmark, steps)
    benchmark.extra_info.update(n=n, m=m)


def _batch(benchmark: Any, n: int, d: int, hard: str) -> tuple[Tensor, Tensor]:
    """The batch of a test, small under `--benchmark-disable`; its sizes and its count of hard pairs are recorded."""
    x, labels = make_batch(min(n, 256) if benchmark.disabled else n, d, hard)
    _, stats = tcm_loss(x, labels, return_stats=True)
    benchmark.extra_info.update(
        n=n, d=d, hard=hard, hard_positives=int(stats.count_plus), hard_negatives=int(stats.count_minus)
    )
    return x, labels


def _steps(x: Tensor, labels: Tensor, *names: str) -> Steps:
    """Loss and gradient by each of the named peers."""
    return {name: partial(forward_backward, PEERS[name], x, labels) for name in names}


def _product(x: Tensor, ref_x: Tensor | None = None) -> Callable[[], object]:
    """The similarities alone, into memory that is there already: the least that an N x M matrix costs."""
    x_hat = F.normalize(x)
    ref_hat = x_hat if ref_x is None else F.normalize(ref_x)
    return partial(torch.mm, x_hat, ref_hat.T, out=torch.empty(len(x_hat), len(ref_hat)))


def measure(
    benchmark: Any,
    steps: Steps,
    runs: int = 5,
    peers_every: int = 1,
    once: tuple[str, ...] = (),
    warm_up: Steps | None = None,
) -> None:
    """Time "tcm_fused" in `runs` rounds, each (or each `peers_every`-th) begun by a run of all the other steps.

    Steps named in `once` run in the first round only. `warm_up` runs before, if not the steps themselves.

    pytest-benchmark runs a set-up before each round and leaves it out of the time: the peers run there. Recorded are
    median, fastest and slowest run in seconds, and the ratio of the medians.
    """
    peers = {name: step for name, step in steps.items() if name != "tcm_fused"}
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    rounds_left = runs

    def time_peers() -> None:
        nonlocal rounds_left
        if (runs - rounds_left) % peers_every == 0:
            for name, step in peers.items():
                if seconds[name] and name in once:
                    continue
                start = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - start)
        rounds_left -= 1

    for step in (warm_up or steps).values():
        step()
    benchmark.pedantic(steps["tcm_fused"], setup=time_peers, rounds=runs)
    if benchmark.disabled:
        return
    ours = benchmark.stats.stats.data
    readings: dict[str, Callable[[list[float]], float]] = {"median": statistics.median, "fastest": min, "slowest": max}
    benchmark.extra_info["seconds"] = {
        name: {reading: short(read(times)) for reading, read in readings.items()} | {"runs": len(times)}
        for name, times in {"tcm_fused": ours, **seconds}.items()
    }
    benchmark.extra_info["ratio"] = {
        name: short(statistics.median(ours) / statistics.median(times)) for name, times in seconds.items()
    }


def short(value: float) -> float:
    """Four digits, as many as a time is good for."""
    return float(f"{value:.4g}")


def _measure_memory(benchmark: Any, x: Tensor, labels: Tensor, *names: str) -> None:
    """Peak memory of each peer's step in a process of its own, beside the bytes of the embeddings."""
    steps = _steps(x, labels, *names)
    # The compiled step is compiled first, at its own shape, so that the compiler's memory is not counted.
    benchmark.extra_info["peak_bytes"] = {
        name: peak_extra_bytes(step, warm_up=step if name == "torch.compile" else None) for name, step in steps.items()
    }
    benchmark.extra_info["embedding_bytes"] = x.nbytes
