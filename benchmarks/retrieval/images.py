"""Images to tensors, and which of them make a batch. Everything random is drawn from (seed, epoch) alone, so that an
epoch can be taken up at any step and gives the same batches, pixel for pixel."""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks.retrieval.datasets import Images

Draw = tuple[int, int]  # an image's index, and the seed of its crop and flip


class TrainImages(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """`images[index, seed]`: a random crop of image `index`, perhaps mirrored, [3, size, size], and its label."""

    def __init__(self, images: Images, size: int, min_crop: float, mirror: bool) -> None:
        self.images, self.size, self.min_crop, self.mirror = images, size, min_crop, mirror

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int]:
        index, seed = draw
        rng = np.random.default_rng(seed)
        pixels = random_crop(self.images.read(index), self.size, self.min_crop, self.mirror, rng)
        return pixels, int(self.images.labels[index])


class CentreImages(torch.utils.data.Dataset[Tensor]):
    """`images[index]`: the middle of image `index`, [3, size, size]."""

    def __init__(self, images: Images, size: int) -> None:
        self.images, self.size = images, size

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitem__(self, index: int) -> Tensor:
        return centre_crop(self.images.read(index), self.size)


def random_crop(image: Image.Image, size: int, min_crop: float, mirror: bool, rng: np.random.Generator) -> Tensor:
    """A crop of `min_crop` to 1 of the area, width to height 3:4 to 4:3, resized; half of them mirrored, if asked."""
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(min_crop, 1)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = (area * ratio) ** 0.5, (area / ratio) ** 0.5
        if w <= width and h <= height:
            break
    else:  # a long image
        w = h = float(min(width, height))
    left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    pixels = _resize(image, size, (left, top, left + w, top + h))
    return pixels.flip(2) if mirror and rng.random() < 0.5 else pixels


def centre_crop(image: Image.Image, size: int) -> Tensor:
    """The middle 7/8 of the shorter side, as a square: what resizing to 256 and cropping to 224 leaves."""
    width, height = image.size
    side = min(width, height) * 7 / 8
    left, top = (width - side) / 2, (height - side) / 2
    return _resize(image, size, (left, top, left + side, top + side))


def _resize(image: Image.Image, size: int, box: tuple[float, float, float, float]) -> Tensor:
    """[3, size, size] in [0, 1]."""
    pixels = torch.from_numpy(np.array(image.resize((size, size), Image.Resampling.BICUBIC, box=box))).float() / 255
    return pixels.expand(3, -1, -1) if image.mode == "L" else pixels.permute(2, 0, 1)


class BalancedBatches:
    """Batches of K images of each of P classes: what rank losses need, and each class is as likely as any other.

    An epoch has as many steps as batches fit into the images. A class of fewer than K images gives some more than once,
    each time cropped anew.
    """

    def __init__(self, labels: NDArray[np.int64], classes: int, per_class: int, seed: int) -> None:
        members = np.argsort(labels, kind="stable")
        self.members = np.split(members, np.cumsum(np.bincount(labels))[:-1])
        if classes > len(self.members):
            raise ValueError(
                f"--batch-classes {classes} is more than the {len(self.members)} classes to train on; lower it"
            )
        self.classes, self.per_class, self.seed = classes, per_class, seed
        self.steps = max(1, len(labels) // (classes * per_class))

    def epoch(self, epoch: int) -> list[list[Draw]]:
        """All batches of an epoch; the images of a class lie side by side."""
        rng = np.random.default_rng([self.seed, epoch])
        batches = []
        for _ in range(self.steps):
            batch: list[Draw] = []
            for c in rng.choice(len(self.members), self.classes, replace=False):
                mine = self.members[c]
                rounds = [rng.permutation(mine) for _ in range(-(-self.per_class // len(mine)))]
                seeds = rng.integers(2**63, size=self.per_class)
                batch += zip(np.concatenate(rounds)[: self.per_class].tolist(), seeds.tolist(), strict=True)
            batches.append(batch)
        return batches
