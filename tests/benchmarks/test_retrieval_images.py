"""Batches, crops and networks of the retrieval experiment."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.retrieval import PNG, Features, fake_timm
from torch import Tensor

from benchmarks.retrieval import networks
from benchmarks.retrieval.datasets import Images
from benchmarks.retrieval.images import BalancedBatches, CentreImages, TrainImages, centre_crop, random_crop

pytestmark = pytest.mark.usefixtures("one_thread")


# Batches and crops.


@pytest.mark.parametrize(("classes", "per_class"), [(3, 4), (7, 2), (1, 9)])
def test_batches_are_balanced_and_can_be_taken_up_anywhere(classes: int, per_class: int) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(7), [1, 3, 4, 9, 20, 5, 2]))
    batches = BalancedBatches(labels, classes, per_class, seed=3)
    epoch = batches.epoch(2)
    assert len(epoch) == batches.steps == max(1, 44 // (classes * per_class))
    assert BalancedBatches(labels, classes, per_class, seed=3).epoch(2) == epoch
    assert batches.epoch(1) != epoch
    assert BalancedBatches(labels, classes, per_class, seed=4).epoch(2) != epoch
    seeds = []
    for batch in epoch:
        mine = labels[[index for index, _ in batch]].reshape(classes, per_class)
        assert (mine == mine[:, :1]).all()
        assert len(set(mine[:, 0])) == classes
        for group in np.array([index for index, _ in batch]).reshape(classes, per_class):
            times = np.bincount(group)[np.unique(group)]
            assert len(times) == min(per_class, (labels == labels[group[0]]).sum())
            assert times.max() - times.min() <= 1  # none twice before all came once
        seeds += [seed for _, seed in batch]
    assert len(set(seeds)) == len(seeds)


def test_all_classes_and_images_come() -> None:
    labels = np.repeat(np.arange(6), 5)
    batches = BalancedBatches(labels, 3, 2, seed=0)
    drawn = [index for epoch in range(30) for batch in batches.epoch(epoch) for index, _ in batch]
    assert set(drawn) == set(range(30))
    counts = np.bincount(labels[drawn], minlength=6)  # 450 images each of a class; chance gives 30 (sd)
    assert abs(counts - len(drawn) / 6).max() < 0.25 * len(drawn) / 6


def test_more_classes_than_there_are() -> None:
    with pytest.raises(ValueError, match="--batch-classes 4 is more than the 3 classes"):
        BalancedBatches(np.arange(3), 4, 2, seed=0)


def coordinates(width: int, height: int) -> Image.Image:
    """Red grows by 1 a pixel to the right, green downwards."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(pixels)


def extent(pixels: Tensor) -> tuple[float, float, bool]:
    """Width and height in pixels of the image of `coordinates` that a crop shows, and whether it is mirrored."""
    size = pixels.shape[1]
    middle = slice(size // 4, 3 * size // 4)  # resampling bends the ends
    across = 255 * pixels[0, :, middle].diff(dim=1).mean().item() * size
    down = 255 * pixels[1, middle].diff(dim=0).mean().item() * size
    return abs(across), down, across < 0


def test_random_crops() -> None:
    picture = coordinates(240, 200)
    crops = [random_crop(picture, 32, 0.3, True, np.random.default_rng(k)) for k in range(300)]
    assert crops[0].shape == (3, 32, 32) and crops[0].dtype == torch.float32
    assert torch.equal(crops[5], random_crop(picture, 32, 0.3, True, np.random.default_rng(5)))
    extents = [extent(crop) for crop in crops]
    areas = np.array([w * h for w, h, _ in extents]) / (240 * 200)
    ratios = np.array([w / h for w, h, _ in extents])
    assert 0.28 < areas.min() < 0.36 and 0.85 < areas.max() < 1.02
    assert 0.72 < ratios.min() < 0.8 and 1.25 < ratios.max() < 1.37
    assert 110 < sum(mirrored for *_, mirrored in extents) < 190  # 300 tosses, 4.6 standard deviations
    upright = [random_crop(picture, 32, 0.3, False, np.random.default_rng(k)) for k in range(300)]
    for crop, other in zip(crops, upright, strict=True):  # the same crops, none of them mirrored
        assert torch.equal(other, crop.flip(2) if extent(crop)[2] else crop)
    assert min(crop.min() for crop in crops) >= 0 and max(crop.max() for crop in crops) <= 1


def test_random_crop_of_a_long_image() -> None:
    """No crop of the shapes allowed fits; a square of its short side is taken."""
    width, height, _ = extent(random_crop(coordinates(250, 120), 32, 1.0, False, np.random.default_rng(0)))
    assert width == pytest.approx(120, rel=0.02)
    assert height == pytest.approx(120, rel=0.02)


@pytest.mark.parametrize(("width", "height"), [(240, 160), (120, 200)])
def test_centre_crop(width: int, height: int) -> None:
    pixels = centre_crop(coordinates(width, height), 35)
    side = 7 / 8 * min(width, height)
    assert extent(pixels)[:2] == pytest.approx((side, side), rel=0.02)
    assert 255 * pixels[0, 17, 17].item() == pytest.approx(width / 2 - 0.5, abs=1)
    assert 255 * pixels[1, 17, 17].item() == pytest.approx(height / 2 - 0.5, abs=1)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_images_of_other_kinds(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new("RGB", (20, 20), (255, 255, 255)).convert(mode).save(path)
    pixels = CentreImages(Images([path], np.zeros(1, np.int64), ["a"]), 16)[0]
    assert pixels.shape == (3, 16, 16)
    assert pixels.min() > 0.99


def test_unreadable_image_is_named(tmp_path: Path) -> None:
    for content in (b"nothing", (PNG + b"\r\n\x1a\n" + bytes(40))):
        (tmp_path / "a.png").write_bytes(content)
        images = TrainImages(Images([tmp_path / "a.png"], np.zeros(1, np.int64), ["a"]), 16, 0.5, False)
        with pytest.raises(ValueError, match=r"cannot read image .*a\.png"):
            images[0, 1]


def test_pixels_are_read_as_files_are(tmp_path: Path) -> None:
    grey = np.asarray(coordinates(40, 36).convert("L"))
    Image.fromarray(grey).save(tmp_path / "a.png")
    label = np.zeros(1, np.int64)
    of_file = Images([tmp_path / "a.png"], label, ["a"])
    of_pixels = Images([], label, ["a"], grey[None])
    assert torch.equal(CentreImages(of_pixels, 16)[0], CentreImages(of_file, 16)[0])
    for seed in range(4):
        crops = [TrainImages(images, 16, 0.5, True)[0, seed] for images in (of_pixels, of_file)]
        assert torch.equal(crops[0][0], crops[1][0])
        assert crops[0][1] == crops[1][1] == 0


# The networks.


def test_small_transformer() -> None:
    network = networks.make_network("small-vit", False, 24, True, 32)
    images = torch.rand(3, 3, 32, 32)
    assert network(images).shape == (3, 24)
    assert torch.allclose(network(images[:1]), network(images)[:1], atol=1e-6)  # images do not see each other
    assert not torch.allclose(network(images.flip(3)), network(images), atol=1e-3)  # places matter


def test_small_network() -> None:
    for layer_norm in (False, True):
        network = networks.make_network("small", False, 24, layer_norm, 32)
        assert network(torch.rand(2, 3, 32, 32)).shape == (2, 24)
        assert network(torch.rand(2, 3, 50, 40)).shape == (2, 24)
        assert any(isinstance(m, torch.nn.LayerNorm) for m in network.modules()) == layer_norm
    with pytest.raises(ValueError, match="leave --pretrained out"):
        networks.make_network("small", True, 24, False, 32)


def test_timm_backbones(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, through timm's own interface; the width is that of the output, whatever the model says of itself."""
    asked = fake_timm(monkeypatch)
    network = networks.make_network("resnet50", True, 5, True, 16)
    assert asked == [("resnet50", True, 0)]
    assert network.training and all(module.training for module in network.modules())
    x = torch.rand(2, 3, 16, 16)
    assert network.eval()(x).shape == (2, 5)
    means, stds = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.25, 0.125]).view(3, 1, 1)
    network.head = torch.nn.Identity()  # type: ignore[assignment]  # the attribute is declared as a linear layer; here the rows shall pass unchanged
    normal = ((x - means) / stds).flatten(1)  # and the trial of the width left the batch norm as it was
    torch.testing.assert_close(network(x), normal / (1 + 1e-5) ** 0.5)
    with pytest.raises(ValueError, match=r"no model for --backbone resnet05: Unknown model .*'small' or one of timm's"):
        networks.make_network("resnet05", False, 5, False, 16)
    with pytest.raises(ValueError, match=r"--backbone resnet50 does not take images of --size 32: .*model \(16\)"):
        networks.make_network("resnet50", False, 5, False, 32)
    monkeypatch.setattr(Features, "forward", lambda features, x: x)
    with pytest.raises(ValueError, match=r"gives \[1, 3, 32, 32\] of one image, and not one row"):
        networks.make_network("resnet50", False, 5, False, 32)


def test_timm_that_is_missing_or_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"--backbone vit needs timm.*pip install timm"):
        networks.make_network("vit", False, 5, False, 32)
    monkeypatch.delitem(sys.modules, "timm")
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match=r"does not load \(RuntimeError: operator torchvision::nms.*install the pair"):
        networks.make_network("vit", False, 5, False, 32)
