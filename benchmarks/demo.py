"""`make demo`: what TCM does to a small network, and what it costs on this machine.

The experiment is the one that the paper shows on MNIST, on the handwritten digits that scikit-learn carries: a network
with two outputs is trained with ArcFace, without and with TCM, and its embedding space is drawn. Then the loss is timed
against eager PyTorch and pytorch-metric-learning.

Everything that was chosen was chosen on the training images, a third of them held out: the settings of ArcFace (margin
3 to 9 degrees, scale 16 to 64) by the run without TCM, then margins and weight of TCM. The test images only measure.
"""

import argparse
import math
import os
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pytorch_metric_learning.losses import ArcFaceLoss
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks.gate import check_fused
from benchmarks.peers import PEERS, forward_backward, make_batch, time_alternating
from tcm_fused import TCMLoss, ops, tcm_loss

CLASSES = 10
# Ten classes spread evenly over a circle are 36 degrees apart. The defaults of the loss, 0.9 and 0.5, are for many
# dimensions; on the circle they would call neighbouring classes (cos 36 = 0.81) hard however compact they are.
MARGIN_PLUS = 0.99  # 8 degrees: positives farther apart are hard
MARGIN_MINUS = 0.90  # 26 degrees: negatives closer together are hard
WEIGHT = 8.0  # lambda+ and lambda-; ArcFace multiplies its cosines by ARC_SCALE, so 1 would hardly be felt
ARC_MARGIN = 6.0  # degrees
ARC_SCALE = 16.0
LEARNING_RATE = 1e-2
FALSE_ACCEPT_RATE = 0.01

SIZES = (64, 128, 256, 512, 1024, 2048, 4096)  # batch sizes of the timing
WIDTH = 128  # columns of its embeddings
LARGEST_PML = 512  # beyond, pytorch-metric-learning's gathered pairs take seconds and gigabytes
FEW, HALF, EAGER, PML = "tcm_fused, few hard", "tcm_fused, half hard", "eager PyTorch", "pytorch-metric-learning"

# Ten colours that the colour-blind can tell apart: Paul Tol's "muted", its pale grey darkened.
COLOURS = "#332288 #88CCEE #44AA99 #117733 #999933 #DDCC77 #CC6677 #882255 #AA4499 #666666".split()
INK = "#333333"


class Digits(NamedTuple):
    """Images [N, 1, 8, 8] float32 in [0, 1], labels [N] int64."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


class Run(NamedTuple):
    """One training and what it reached on the test images."""

    seed: int
    with_tcm: bool
    start: Tensor  # every weight before the first step, [P]
    draws: Tensor  # state of the random generator after the last step: equal states, equal batches
    embeddings: Tensor  # of the test images, [N, 2]
    recall: float  # recall@1
    arcface: float
    violation_plus: float  # the two terms of TCM at lambda = 1
    violation_minus: float
    count_plus: int
    count_minus: int
    threshold: float  # the similarity that FALSE_ACCEPT_RATE of all negatives pass
    accepts: Tensor  # share of each class's positives that pass it, [CLASSES]


class ArcFace(ArcFaceLoss):  # type: ignore[misc]
    """pytorch-metric-learning's ArcFace, kept off cosines of exactly 1, where the gradient of its arccos is infinite.

    In two dimensions float32 rounds the cosine to 1 for every embedding within 0.02 degrees of its class's weight.
    """

    def get_angles(self, cosine: Tensor) -> Tensor:
        """Angles in radians of cosines [N]; those within 0.08 degrees of 0 or 180 get no gradient."""
        return super().get_angles(cosine.clamp(-1 + 1e-6, 1 - 1e-6))


def load() -> Digits:
    """The 1797 digits, 70 % to train on, 30 % to test; the split is the same for every seed."""
    digits = load_digits()
    train, test = train_test_split(np.arange(len(digits.target)), test_size=0.3, stratify=digits.target, random_state=0)
    x = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    y = torch.tensor(digits.target, dtype=torch.int64)
    return Digits(x[train], y[train], x[test], y[test])


def make_network() -> nn.Sequential:
    """Images [N, 1, 8, 8] to embeddings [N, 2]. Without batch normalisation it gets stuck with classes on one spot."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in ((64, 256), (256, 128)):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, 2))


def distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image [1, 8, 8] turned by up to 5 degrees and shifted by up to half a pixel: else training is learnt by heart."""
    n = len(images)
    angle = (2 * torch.rand(n, generator=generator) - 1) * math.radians(5)
    shift = (2 * torch.rand(n, 2, 1, generator=generator) - 1) / 8  # an image is 2 units wide
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(n, 2, 2)
    grid = F.affine_grid(torch.cat([turn, shift], dim=2), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def train(digits: Digits, with_tcm: bool, seed: int, epochs: int, tick: Callable[[], object]) -> Run:
    """Train on all training images as one batch, `epochs` times, and measure. `tick` is called after each epoch.

    Everything random comes from `seed`: the weights first, then the distortion of each epoch's images.
    """
    torch.manual_seed(seed)
    network, arcface = make_network(), ArcFace(CLASSES, 2, margin=ARC_MARGIN, scale=ARC_SCALE)
    tcm = TCMLoss(MARGIN_PLUS, MARGIN_MINUS, WEIGHT, WEIGHT)
    weights = [*network.parameters(), *arcface.parameters()]
    start = nn.utils.parameters_to_vector(weights).detach().clone()
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        embeddings = network(distort(digits.train_x, generator))
        loss = arcface(embeddings, digits.train_y)
        if with_tcm:
            loss = loss + tcm(embeddings, digits.train_y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        tick()
    network.eval()
    with torch.no_grad():
        embeddings = network(digits.test_x)
        base = arcface(embeddings, digits.test_y).item()
    return measure(seed, with_tcm, start, generator.get_state(), embeddings, digits.test_y, base)


def measure(
    seed: int, with_tcm: bool, start: Tensor, draws: Tensor, embeddings: Tensor, labels: Tensor, arcface: float
) -> Run:
    """What embeddings [N, 2] of the test images are worth; both runs are measured with the same margins."""
    x_hat = F.normalize(embeddings)
    s = (x_hat @ x_hat.T).fill_diagonal_(-math.inf)
    recall = (labels[s.argmax(dim=1)] == labels).float().mean().item()
    _, stats = tcm_loss(embeddings, labels, margin_plus=MARGIN_PLUS, margin_minus=MARGIN_MINUS, return_stats=True)
    return Run(
        seed,
        with_tcm,
        start,
        draws,
        embeddings,
        recall,
        arcface,
        violation_plus=stats.violation_plus.item(),
        violation_minus=stats.violation_minus.item(),
        count_plus=int(stats.count_plus),
        count_minus=int(stats.count_minus),
        **dict(zip(("threshold", "accepts"), accept_rates(s, labels), strict=True)),
    )


def accept_rates(s: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """The one threshold that FALSE_ACCEPT_RATE of all negatives pass, and each class's true accept rate at it, [CLASSES].

    s: [N, N] similarities; the diagonal belongs to no pair.
    """
    same = labels[:, None] == labels
    threshold = torch.quantile(s[~same], 1 - FALSE_ACCEPT_RATE).item()
    positive = same.fill_diagonal_(False)
    accepted = (positive & (s > threshold)).sum(dim=1)
    by_class = torch.zeros(2, CLASSES).index_add_(1, labels, torch.stack([accepted, positive.sum(dim=1)]).float())
    return threshold, by_class[0] / by_class[1]


def train_all(digits: Digits, seeds: int, epochs: int) -> list[tuple[Run, Run]]:
    """For each seed the run without TCM and the run with it, from the same start through the same batches (checked).

    One thread: the network is too small for more, and one is not held up where other work shares the machine.
    """
    pairs = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tqdm(total=2 * seeds * epochs, unit="epoch") as bar:
        for seed in range(seeds):
            runs = []
            for with_tcm in (False, True):
                bar.set_description(f"seed {seed}, {'with TCM' if with_tcm else 'without TCM'}")
                runs.append(train(digits, with_tcm, seed, epochs, bar.update))
            without, with_ = runs
            if not (torch.equal(without.start, with_.start) and torch.equal(without.draws, with_.draws)):
                raise RuntimeError(f"the two runs of seed {seed} did not start alike or did not see the same batches")
            pairs.append((without, with_))
    torch.set_num_threads(threads)
    return pairs


def print_training(pairs: Sequence[tuple[Run, Run]]) -> None:
    """The table of both ways to train, and a line for each run on what one threshold gives each class."""
    rows: list[tuple[str, str, Callable[[Run], float]]] = [
        ("recall@1, %", ".1f", lambda run: 100 * run.recall),
        ("ArcFace loss", ".3f", lambda run: run.arcface),
        ("TCM positive term (lambda = 1)", ".4f", lambda run: run.violation_plus),
        ("TCM negative term (lambda = 1)", ".4f", lambda run: run.violation_minus),
        ("hard positive pairs n+", ",.0f", lambda run: run.count_plus),
        ("hard negative pairs n-", ",.0f", lambda run: run.count_minus),
        ("true accepts, mean of classes, %", ".1f", lambda run: 100 * run.accepts.mean().item()),
        ("true accepts, worst class, %", ".1f", lambda run: 100 * run.accepts.min().item()),
        ("true accepts, spread of classes, points", ".1f", lambda run: 100 * run.accepts.std().item()),
    ]
    print(f"\nOn the test images, mean and standard deviation of {len(pairs)} seed(s):\n")
    print(f"{'':40}{'ArcFace':>20}{'ArcFace + TCM':>20}")
    for name, form, value in rows:
        cells = [spread([value(pair[i]) for pair in pairs], form) for i in (0, 1)]
        print(f"{name:40}{cells[0]:>20}{cells[1]:>20}")
    print(f"""
Both TCM terms are means over the hard pairs alone, so a term can rise while its pairs get fewer. Pairs are ordered.
True accepts: the share of a class's positive pairs above the one threshold that {FALSE_ACCEPT_RATE:.0%} of all negative
pairs pass. The less the classes differ (spread: standard deviation), the better one threshold suits them all:
""")
    for run in (run for pair in pairs for run in pair):
        low, high, std = (100 * f(run.accepts).item() for f in (torch.min, torch.max, torch.std))
        name = "with TCM" if run.with_tcm else "without TCM"
        print(
            f"seed {run.seed}, {name:12} threshold {run.threshold:.3f}: true accepts {low:.0f} to {high:.0f} %, "
            f"spread {std:.1f} points"
        )


def spread(values: Sequence[float], form: str) -> str:
    """'mean +- standard deviation' in the format `form`; of one value just that."""
    mean = format(statistics.mean(values), form)
    return f"{mean} +- {format(statistics.stdev(values), form)}" if len(values) > 1 else mean


def time_losses() -> dict[int, dict[str, float]]:
    """Median seconds of loss and gradient for each batch size and each way to compute it, after the gate says it is right.

    Small batches are run more often: each size takes about as long as the next.
    """
    for hard in ("few", "half"):
        check_fused(tcm_loss, hard)
    medians = {}
    for n in tqdm(SIZES, desc="timing", unit="batch size"):
        few, half = make_batch(n, WIDTH, "few"), make_batch(n, WIDTH, "half")
        steps = {
            FEW: partial(forward_backward, PEERS["tcm_fused"], *few),
            HALF: partial(forward_backward, PEERS["tcm_fused"], *half),
            EAGER: partial(forward_backward, PEERS["eager"], *few),
        }
        if n <= LARGEST_PML:
            steps[PML] = partial(forward_backward, PEERS["pytorch-metric-learning"], *few)
        seconds = time_alternating(steps, runs=max(3, 2048 // n))
        medians[n] = {name: statistics.median(times) for name, times in seconds.items()}
    return medians


def print_times(medians: dict[int, dict[str, float]]) -> None:
    """The times in milliseconds, and what the others take in units of tcm_fused."""
    print(f"\nLoss and gradient, D = {WIDTH}, fp32, median, {machine()}.")
    print("Hard pairs are few (about 1 negative in 4000) but for the second column, where they are half of all.\n")
    print(f"{'':>6}{'tcm_fused':>11}{'half hard':>11}{'eager':>11}{'p-m-l':>11}{'eager /':>12}{'p-m-l /':>12}")
    print(f"{'N':>6}" + 4 * f"{'ms':>11}" + 2 * f"{'tcm_fused':>12}")
    for n, row in medians.items():
        times = "".join(f"{1e3 * row[name]:11.2f}" if name in row else f"{'-':>11}" for name in (FEW, HALF, EAGER, PML))
        ratios = "".join(f"{row[name] / row[FEW]:11.1f}x" if name in row else f"{'-':>12}" for name in (EAGER, PML))
        print(f"{n:6}{times}{ratios}")
    print(f"\np-m-l: pytorch-metric-learning, up to N = {LARGEST_PML} only; its time and memory grow with N^2 D.")


def machine() -> str:
    """What the times were taken on."""
    backend = "C++ kernel" if ops.why_unavailable("cpu") is None else "PyTorch fallback"
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"tcm_fused's {backend}, {torch.get_num_threads()} CPU threads, {instructions}, torch {torch.__version__}"


def draw_embeddings(without: Run, with_: Run, labels: Tensor, path: Path) -> None:
    """Two panels: the test images' embeddings on the plane, one arrow and one colour for each class."""
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    for axes, run, name in zip(figure.subplots(1, 2), (without, with_), ("ArcFace", "ArcFace + TCM"), strict=True):
        draw_plane(axes, run.embeddings, labels)
        axes.set_title(f"{name}\n", fontsize=15, color=INK, fontweight="bold")
        caption = f"recall@1 {100 * run.recall:.1f} %     n+ {run.count_plus:,}     n\N{MINUS SIGN} {run.count_minus:,}"
        axes.text(0.5, 1.02, caption, transform=axes.transAxes, ha="center", fontsize=11.5, color=INK)
    figure.savefig(path, dpi=160)


def draw_plane(axes: Axes, embeddings: Tensor, labels: Tensor) -> None:
    """Embeddings [N, 2] in units of their median norm, and each class's mean direction as an arrow to its digit."""
    x = embeddings / embeddings.norm(dim=1).median()
    centre = torch.stack([F.normalize(embeddings[labels == c]).mean(dim=0) for c in range(CLASSES)])
    for c, colour in enumerate(COLOURS):
        points = x[labels == c]
        axes.scatter(points[:, 0], points[:, 1], s=14, color=colour, alpha=0.6, linewidths=0)
    axes.set_aspect("equal")


def draw_times(medians: dict[int, dict[str, float]], path: Path) -> None:
    """Time against batch size, both logarithmic."""


def main(arguments: Sequence[str] | None = None) -> None:
    pass
