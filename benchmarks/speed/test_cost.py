"""The share of a training step that TCM takes, beside network and base loss, fp32.

A step is cut where the embeddings are: the network forward and backward with the optimizer's step, the base loss with
its gradients, and TCM with its gradient. Each part is timed in alternation with the others, in one process; the share
is the median of TCM in the sum of the three medians. Nothing is extrapolated.

The network is small on purpose, the hard case for a share: a residual MLP, 18 MFLOP a sample forward, where a ResNet-50
has 8200. The base loss is pytorch-metric-learning's ArcFace over as many classes as Stanford Online Products trains on,
35 MFLOP a sample with its gradients. TCM gets embeddings with half of the negatives hard: of all densities the most
work for tcm_fused.
"""

from functools import partial
from typing import Any

import psutil
import pytest
import torch
from pytorch_metric_learning.losses import ArcFaceLoss
from torch import Tensor, nn

from benchmarks.speed.peers import PEERS, forward_backward, make_batch
from benchmarks.speed.test_speed import Steps, measure, short

D = 512
WIDTH, HIDDEN, BLOCKS = 1024, 2048, 2
CLASSES = 11_318
# Peak memory: eager's temporaries, measured at N = 8192; both rows of every pair, `test_speed.test_library`.
BYTES_A_PAIR = {"eager": 20, "pytorch-metric-learning": 17_000}
RUNS = {512: 3, 1024: 3, 4096: 3, 8192: 2, 16384: 2}
ONCE = {1024: ("pytorch-metric-learning",), 16384: ("eager",)}  # 20 s and 9 s a run
WARM_UP = 256  # rows
SIZES = (256, 512, 1024, 2048, 4096, 8192, 16384)


class Block(nn.Module):
    """x + W2 relu(W1 norm(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def make_network() -> nn.Sequential:
    """Features [N, WIDTH] to embeddings [N, D]."""
    return nn.Sequential(*(Block() for _ in range(BLOCKS)), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, D))


def network_step(network: nn.Module, optimizer: torch.optim.Optimizer, features: Tensor, gradient: Tensor) -> None:
    """Forward, backward from the gradient [N, D] that the losses would pass on, and the step of the optimizer."""
    network.zero_grad()
    network(features).backward(gradient)
    optimizer.step()


def base_step(base_loss: nn.Module, x: Tensor, classes: Tensor) -> None:
    """The base loss and its gradients, by the embeddings and by its own weights."""
    base_loss.zero_grad()
    forward_backward(base_loss, x, classes)


@pytest.mark.benchmark(group="cost")
@pytest.mark.parametrize("n", SIZES)
def test_cost(benchmark: Any, n: int) -> None:
    """From a batch of today's habit to one that takes the loss to its purpose."""
    torch.manual_seed(0)
    network, base_loss = make_network(), ArcFaceLoss(CLASSES, D)
    optimizer = torch.optim.AdamW([*network.parameters(), *base_loss.parameters()], fused=True)

    def steps(rows: int) -> Steps:
        x, labels = make_batch(rows, D, "half")
        features, gradient = torch.randn(rows, WIDTH), torch.randn(rows, D)
        return {
            "base loss": partial(base_step, base_loss, x, labels % CLASSES),
            "network": partial(network_step, network, optimizer, features, gradient),
            **{name: partial(forward_backward, PEERS[name], x, labels) for name in ("tcm_fused", *BYTES_A_PAIR)},
        }

    needed = {name: size * n**2 for name, size in BYTES_A_PAIR.items()}
    left_out = [name for name, size in needed.items() if size > psutil.virtual_memory().available]
    parts = {name: step for name, step in steps(64 if benchmark.disabled else n).items() if name not in left_out}
    measure(benchmark, parts, runs=RUNS.get(n, 5), once=ONCE.get(n, ()), warm_up=steps(WARM_UP))
    benchmark.extra_info.update(n=n, d=D, classes=CLASSES)
    benchmark.extra_info["left_out"] = {name: f"needs about {needed[name] / 1e9:.0f} GB" for name in left_out}
    if not benchmark.disabled:
        median = {name: reading["median"] for name, reading in benchmark.extra_info["seconds"].items()}
        rest = median.pop("network") + median.pop("base loss")
        benchmark.extra_info["share"] = {name: short(time / (rest + time)) for name, time in median.items()}
