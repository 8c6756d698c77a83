"""The retrieval experiments: losses against plain loops, every data set's files in small, batches, crops, a run that is
killed and goes on, the table, and the command line from drawn images to the picture."""

import copy
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_metric_learning.losses import SmoothAPLoss
from scipy.io import savemat
from torch import Tensor

from benchmarks.retrieval import networks, table
from benchmarks.retrieval.__main__ import main
from benchmarks.retrieval.datasets import DATASETS, Images, load
from benchmarks.retrieval.drawn import draw_folder
from benchmarks.retrieval.drawn import main as draw
from benchmarks.retrieval.images import BalancedBatches, CentreImages, TrainImages, centre_crop, random_crop
from benchmarks.retrieval.losses import BASES, WITH_WEIGHTS, ArcFace, RecallAtK, SmoothAP, make_base
from benchmarks.retrieval.training import Run

pytestmark = pytest.mark.usefixtures("one_thread")

PNG = b"\x89PNG"
EPOCHS = 12  # of the run that is killed
STEPS = 10  # of an epoch of `command` on `glyphs`


# The base losses.


def make_batch(classes: int, per_class: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Embeddings [N, 6] float64 of any length and labels [N] in random order."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(classes).repeat(per_class)[torch.randperm(classes * per_class, generator=generator)] * 3 + 1
    centres = torch.randn(3 * classes + 1, 6, generator=generator, dtype=torch.float64)
    x = centres[y] + torch.randn(len(y), 6, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), y


def smooth_ap_by_loops(x: Tensor, y: Tensor, temperature: float) -> Tensor:
    s = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=2)
    total = x.new_zeros(())
    for q in range(len(y)):
        mine = [i for i in range(len(y)) if y[i] == y[q]]
        for i in mine:
            rank = rank_in_class = x.new_ones(())
            for j in range(len(y)):
                if j != i:
                    above = torch.sigmoid((s[q, j] - s[q, i]) / temperature)
                    rank = rank + above
                    rank_in_class = rank_in_class + above * (y[j] == y[q])
            total = total + rank_in_class / rank / len(mine)
    return 1 - total / len(y)


def recall_at_k_by_loops(x: Tensor, y: Tensor, ks: tuple[int, ...], temperature: float, cut: float) -> Tensor:
    s = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=2)
    total = x.new_zeros(())
    for k in ks:
        for q in range(len(y)):
            mine = [i for i in range(len(y)) if y[i] == y[q] and i != q]
            found = x.new_zeros(())
            for i in mine:
                rank = x.new_ones(())
                for j in range(len(y)):
                    if j not in (i, q):
                        rank = rank + torch.sigmoid((s[q, j] - s[q, i]) / temperature)
                found = found + torch.sigmoid((k - rank) / cut)
            total = total + found.clamp(max=k) / min(k, len(mine))
    return 1 - total / (len(y) * len(ks))


@pytest.mark.parametrize(("classes", "per_class"), [(2, 2), (3, 3), (5, 2), (2, 5), (1, 3)])
@pytest.mark.parametrize("loss", ["smoothap", "recallatk"])
def test_rank_losses_against_loops(loss: str, classes: int, per_class: int) -> None:
    """Value and gradient; a temperature at which neighbours in rank count in part, so that every term tells."""
    x, y = make_batch(classes, per_class, seed=10 * classes + per_class)
    z = x.detach().clone().requires_grad_()
    if loss == "smoothap":
        found, expected = SmoothAP(0.2)(x, y), smooth_ap_by_loops(z, y, 0.2)
    else:
        found, expected = RecallAtK((1, 2, 4), 0.2, 0.7)(x, y), recall_at_k_by_loops(z, y, (1, 2, 4), 0.2, 0.7)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found.backward()
    expected.backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-9, atol=1e-12)
    assert x.grad is not None and (classes == 1 or x.grad.abs().max() > 1e-4)


def test_smooth_ap_is_pytorch_metric_learnings_where_that_is_right() -> None:
    """As many classes as images of each, in order: elsewhere that takes one number for the other."""
    x, y = make_batch(4, 4)
    order = y.argsort(stable=True)
    torch.testing.assert_close(SmoothAP()(x, y), SmoothAPLoss()(x[order], y[order] // 3).to(x.dtype), rtol=1e-6, atol=0)


def test_perfect_and_hopeless_ranks() -> None:
    y = torch.arange(4).repeat_interleave(3)
    perfect = torch.eye(4)[y]
    assert SmoothAP()(perfect, y).item() == pytest.approx(0, abs=1e-6)
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    for loss in (SmoothAP(), RecallAtK()):
        assert loss(perfect, y) < loss(x, y) < 1


@pytest.mark.parametrize("loss", [SmoothAP(), RecallAtK()])
def test_classes_of_other_sizes_are_refused(loss: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match=r"equally often in a batch, got \[2, 3\]"):
        loss(torch.randn(5, 4), torch.tensor([0, 0, 1, 1, 1]))


def test_recall_needs_two_of_a_class() -> None:
    with pytest.raises(ValueError, match="raise --batch-images"):
        RecallAtK()(torch.randn(5, 4), torch.arange(5))


def test_arcface_at_a_cosine_of_one() -> None:
    loss = ArcFace(2, 2)
    x = loss.W.detach().T.clone().requires_grad_()
    loss(x, torch.arange(2)).backward()
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("name", BASES)
def test_base_losses_take_a_batch(name: str) -> None:
    x, y = make_batch(4, 3)
    base = make_base(name, 13, 6)
    base(x.float(), y).backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert bool(list(base.parameters())) == (name in WITH_WEIGHTS)


# The data sets: each written in small as its authors lay it out.


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def annotations(path: Path, rows: list[dict[str, Any]]) -> None:
    """A MATLAB structure array with the fields of `rows`, as the data set has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(rows[0])
    table = np.empty((1, len(rows)), dtype=[(name, object) for name in names])
    for k, row in enumerate(rows):
        table[0, k] = tuple(row[name] for name in names)
    savemat(path, {"annotations": table})


def lay_sop(root: Path) -> None:
    base = root / "Stanford_Online_Products"
    number = 0
    for part, classes in (("train", (1, 2)), ("test", (11319, 11320))):
        lines = ["image_id class_id super_class_id path"]
        for c in classes:
            for k in range(2):
                number += 1
                lines.append(f"{number} {c} 1 bicycle_final/{c}_{k}.JPG")
                image(base / "bicycle_final" / f"{c}_{k}.JPG")
        write(base / f"Ebay_{part}.txt", "\n".join(lines) + "\n")


def lay_cub(root: Path) -> None:
    base = root / "CUB_200_2011"
    names = [f"{c:03d}.Bird_{c}/Bird_{k}.jpg" for c in (99, 100, 101, 200) for k in range(2)]
    for name in names:
        image(base / "images" / name)
    write(base / "images.txt", "".join(f"{k + 1} {name}\n" for k, name in enumerate(names)))
    write(base / "image_class_labels.txt", "".join(f"{k + 1} {int(name[:3])}\n" for k, name in enumerate(names)))


CARS = [(1, 0), (1, 1), (98, 0), (98, 1), (99, 0), (99, 1), (196, 0), (196, 1)]  # class and image


def lay_cars_one_file(root: Path) -> None:
    rows: list[dict[str, Any]] = []
    for k, (c, _) in enumerate(CARS):
        rows.append({"relative_im_path": f"car_ims/{k + 1:06d}.jpg", "bbox_x1": 1, "class": c, "test": k % 2})
        image(root / rows[-1]["relative_im_path"])
    annotations(root / "cars_annos.mat", rows)


def lay_cars_devkit(root: Path) -> None:
    base = root / "stanford_cars"
    for part, target in ((0, "devkit/cars_train_annos.mat"), (1, "cars_test_annos_withlabels.mat")):
        rows: list[dict[str, Any]] = [{"bbox_x1": 1, "class": c, "fname": f"{c:05d}.jpg"} for c, k in CARS if k == part]
        for row in rows:
            image(base / ("cars_train", "cars_test")[part] / row["fname"])
        annotations(base / target, rows)


def lay_cars_folders(root: Path) -> None:
    for c in range(1, 197):
        for k in range(2):
            image(root / f"car {c:03d}" / f"{k}.jpg")


def lay_vehicleid(root: Path) -> None:
    base = root / "VehicleID_V1.0"
    for name, vehicles in (("train_list", (7, 8)), ("test_list_800", (21, 22)), ("test_list_2400", (21, 22, 23))):
        write(base / f"train_test_split/{name}.txt", "".join(f"{10 * v + k} {v}\n" for v in vehicles for k in range(2)))
        for v in vehicles:
            for k in range(2):
                image(base / "image" / f"{10 * v + k:07d}.jpg")


def lay_inaturalist(root: Path) -> None:
    for part, species in (("train", ("Aves/3", "Fungi/4")), ("test", ("Aves/30", "Plantae/3"))):
        paths = [f"train_val2018/{s}/{part}{k}.jpg" for s in species for k in range(2)]
        for path in paths:
            image(root / path)
        write(root / f"Inat_dataset_splits/Inaturalist_{part}_set1.txt", "\n".join(paths) + "\n")


def lay_folder(root: Path) -> None:
    for c in "edcba":
        for k in range(2):
            image(root / c / f"{k}.png")
    write(root / "a" / "notes.txt", "no image")


def lay_folder_parts(root: Path) -> None:
    for part, classes in (("train", "ab"), ("test", "cd")):
        for c in classes:
            for k in range(2):
                image(root / part / c / f"{k}.PNG")


Lay = Callable[[Path], None]
LAYOUTS: list[tuple[str, Lay, list[str], list[str]]] = [  # data set, its files, classes to train on and to test
    ("sop", lay_sop, ["1", "2"], ["11319", "11320"]),
    ("cub", lay_cub, ["099", "100"], ["101", "200"]),
    ("cars", lay_cars_one_file, ["001", "098"], ["099", "196"]),
    ("cars", lay_cars_devkit, ["001", "098"], ["099", "196"]),
    ("cars", lay_cars_folders, [f"{c:03d}" for c in range(1, 99)], [f"{c:03d}" for c in range(99, 197)]),
    ("vehicleid", lay_vehicleid, ["7", "8"], ["21", "22"]),
    ("inaturalist2018", lay_inaturalist, ["Aves/3", "Fungi/4"], ["Aves/30", "Plantae/3"]),
    ("folder", lay_folder, ["a", "b"], ["c", "d", "e"]),
    ("folder", lay_folder_parts, ["a", "b"], ["c", "d"]),
]


@pytest.mark.parametrize(("name", "lay", "train", "test"), LAYOUTS)
def test_published_splits(tmp_path: Path, name: str, lay: Lay, train: list[str], test: list[str]) -> None:
    lay(tmp_path)
    split = load(name, tmp_path, "small" if name == "vehicleid" else "")
    for part, classes in ((split.train, train), (split.test, test)):
        assert part.classes == classes
        assert np.array_equal(np.bincount(part.labels), [2] * len(classes))
        assert len(set(part.paths)) == 2 * len(classes)
        assert all(path.is_file() for path in part.paths)
        if name != "vehicleid":
            # The class that the label names is in the path: each data set has it there.
            for path, label in zip(part.paths, part.labels, strict=True):
                if lay not in (lay_cars_one_file,):
                    assert classes[label].lstrip("0").split("/")[-1] in str(path.relative_to(tmp_path))
    assert (split.warning is None) == (name in ("folder", "vehicleid"))
    assert split.warning is None or "published are" in split.warning
    inner = [path for path in tmp_path.iterdir() if path.is_dir()]
    if DATASETS[name].folders and len(inner) == 1 and inner[0].name in DATASETS[name].folders:
        assert load(name, inner[0], "small" if name == "vehicleid" else "").fingerprint == split.fingerprint


def test_vehicleid_labels_and_test_sets(tmp_path: Path) -> None:
    lay_vehicleid(tmp_path)
    small, large = load("vehicleid", tmp_path, "small"), load("vehicleid", tmp_path, "large")
    assert [int(path.stem) // 10 for path in small.test.paths] == [21, 21, 22, 22]
    assert large.test.classes == ["21", "22", "23"]
    assert small.fingerprint != large.fingerprint
    with pytest.raises(ValueError, match=r"no file .*test_list_1600\.txt"):
        load("vehicleid", tmp_path, "medium")


def test_fingerprint_tells_splits_apart(tmp_path: Path) -> None:
    lay_folder(tmp_path)
    before = load("folder", tmp_path).fingerprint
    assert load("folder", tmp_path).fingerprint == before
    (tmp_path / "c" / "0.png").rename(tmp_path / "c" / "9.png")
    renamed = load("folder", tmp_path).fingerprint
    Image.new("RGB", (9, 8), "red").save(tmp_path / "c" / "9.png")  # another image of the same name
    assert len({before, renamed, load("folder", tmp_path).fingerprint}) == 3


def remove(name: str) -> Lay:
    def change(root: Path) -> None:
        (path,) = root.rglob(name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def replace(name: str, text: str) -> Lay:
    def change(root: Path) -> None:
        (path,) = root.rglob(name)
        path.write_text(text)

    return change


@pytest.mark.parametrize(
    ("name", "lay", "change", "message"),
    [
        ("sop", lay_sop, remove("Ebay_train.txt"), "no file .*Ebay_train.txt"),
        ("sop", lay_sop, remove("Ebay_test.txt"), "no file .*Ebay_test.txt"),
        ("sop", lay_sop, remove("11319_0.JPG"), "no image .*11319_0.JPG"),
        ("sop", lay_sop, remove("2_1.JPG"), "no image .*2_1.JPG"),
        ("sop", lay_sop, replace("Ebay_test.txt", "head\n9 9 1 bicycle_final/1_0.JPG\n"), "test part has 1 classes"),
        ("sop", lay_sop, replace("Ebay_test.txt", "head\n9 1 1\n"), "line 2 of .*Ebay_test.txt has 3 columns, 4"),
        ("cub", lay_cub, remove("images.txt"), "no file .*images.txt"),
        ("cub", lay_cub, remove("image_class_labels.txt"), "no file .*image_class_labels.txt"),
        ("cub", lay_cub, replace("image_class_labels.txt", "1 99\n"), "has no class for image 2"),
        ("cub", lay_cub, remove("CUB_200_2011"), "no file .*image_class_labels.txt"),
        ("cars", lay_cars_one_file, remove("cars_annos.mat"), "neither .*cars_annos.mat nor .*withlabels.mat, nor"),
        ("cars", lay_cars_one_file, replace("cars_annos.mat", "x"), "cars_annos.mat has no annotations"),
        ("cars", lay_cars_devkit, remove("cars_train_annos.mat"), "no file .*cars_train_annos.mat"),
        ("cars", lay_cars_devkit, remove("cars_test_annos_withlabels.mat"), "no file .*annos_withlabels.mat"),
        ("cars", lay_cars_folders, remove("car 007"), "nor are there 196 folders"),
        ("vehicleid", lay_vehicleid, remove("train_list.txt"), "no file .*train_list.txt"),
        ("inaturalist2018", lay_inaturalist, remove("Inat_dataset_splits"), "no file .*Inaturalist_train_set1.txt"),
        ("inaturalist2018", lay_inaturalist, remove("train_val2018"), "no image .*Aves"),
        (
            "inaturalist2018",
            lay_inaturalist,
            replace("*_test_set1.txt", "a.jpg\n"),
            "must list images as train_val2018",
        ),
        ("folder", lay_folder, remove("e"), None),
        ("folder", lay_folder_parts, remove("d"), "test part has 1 classes"),
        ("folder", lay_folder_parts, lambda root: image(root / "test" / "a" / "0.png"), "class a is in both parts"),
        ("folder", lay_folder, lambda root: (root / "f").mkdir(), "f holds no image"),
        ("folder", lay_folder, lambda root: shutil.rmtree(root), "there is no folder"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, name: str, lay: Lay, change: Lay, message: str | None) -> None:
    """With the layout and where the data set comes from; a class less is no error of a folder of one's own."""
    root = tmp_path / "data"
    lay(root)
    change(root)
    test_set = "small" if name == "vehicleid" else ""
    if message is None:
        assert load(name, root, test_set).test.classes == ["c", "d"]
        return
    with pytest.raises(ValueError, match=message) as caught:
        load(name, root, test_set)
    assert DATASETS[name].layout in str(caught.value)
    assert DATASETS[name].source in str(caught.value)


def test_single_images_cannot_be_found_again(tmp_path: Path) -> None:
    for c in "abcd":
        image(tmp_path / c / "0.png")
    with pytest.raises(ValueError, match="no class of the test part has two images"):
        load("folder", tmp_path)


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
    counts = np.bincount(labels[drawn], minlength=6)  # 450 images each of a class; 30 (sd) is what chance gives
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
    crops = [random_crop(picture, 32, 0.3, np.random.default_rng(k)) for k in range(300)]
    assert crops[0].shape == (3, 32, 32) and crops[0].dtype == torch.float32
    assert torch.equal(crops[5], random_crop(picture, 32, 0.3, np.random.default_rng(5)))
    extents = [extent(crop) for crop in crops]
    areas = np.array([w * h for w, h, _ in extents]) / (240 * 200)
    ratios = np.array([w / h for w, h, _ in extents])
    assert 0.28 < areas.min() < 0.36 and 0.85 < areas.max() < 1.02
    assert 0.72 < ratios.min() < 0.8 and 1.25 < ratios.max() < 1.37
    assert 110 < sum(mirrored for *_, mirrored in extents) < 190  # 300 tosses, 4.6 standard deviations
    assert min(crop.min() for crop in crops) >= 0 and max(crop.max() for crop in crops) <= 1


def test_random_crop_of_a_long_image() -> None:
    """No crop of the shapes allowed fits; a square of its short side is taken."""
    width, height, _ = extent(random_crop(coordinates(250, 120), 32, 1.0, np.random.default_rng(0)))
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
        images = TrainImages(Images([tmp_path / "a.png"], np.zeros(1, np.int64), ["a"]), 16, 0.5)
        with pytest.raises(ValueError, match=r"cannot read image .*a\.png"):
            images[0, 1]


# The networks.


def test_small_network() -> None:
    for layer_norm in (False, True):
        network = networks.make_network("small", False, 24, layer_norm, 32)
        assert network(torch.rand(2, 3, 32, 32)).shape == (2, 24)
        assert network(torch.rand(2, 3, 50, 40)).shape == (2, 24)
        assert any(isinstance(m, torch.nn.LayerNorm) for m in network.modules()) == layer_norm
    with pytest.raises(ValueError, match="leave --pretrained out"):
        networks.make_network("small", True, 24, False, 32)


class Features(torch.nn.Sequential):
    """As timm's models are: they give more columns than `num_features`, and may take images of one size alone."""

    num_features = 3
    pretrained_cfg = types.MappingProxyType({"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 0.125)})

    def __init__(self) -> None:
        super().__init__(torch.nn.BatchNorm2d(3), torch.nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[2:] == (16, 16), f"Input height ({x.shape[2]}) doesn't match model (16)."
        return super().forward(x)


def fake_timm(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool, int]]:
    """A stand-in for timm, as torchvision does not load beside every torch; what it is asked for."""
    asked = []

    def create_model(name: str, pretrained: bool, num_classes: int) -> torch.nn.Module:
        asked.append((name, pretrained, num_classes))
        if name != "resnet50":
            raise RuntimeError(f"Unknown model ({name})")
        return Features()

    stand_in = types.SimpleNamespace(create_model=create_model, list_models=lambda pattern: ["resnet50"])
    monkeypatch.setitem(sys.modules, "timm", stand_in)
    return asked


def test_timm_backbones(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, through timm's own interface; the width is what comes out, whatever the model says of itself."""
    asked = fake_timm(monkeypatch)
    network = networks.make_network("resnet50", True, 5, True, 16)
    assert asked == [("resnet50", True, 0)]
    assert network.training and all(module.training for module in network.modules())
    x = torch.rand(2, 3, 16, 16)
    assert network.eval()(x).shape == (2, 5)
    means, stds = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.25, 0.125]).view(3, 1, 1)
    network.head = torch.nn.Identity()  # type: ignore[assignment]  # which is declared as what it is, linear
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


# Runs.


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 classes of 16 drawn images: 12 to train on, 12 to test."""
    folder = tmp_path_factory.mktemp("drawn") / "glyphs"
    draw_folder(folder, classes=24, images=16)
    return folder


def command(root: Path, out: Path, *more: Any) -> list[str]:
    """A small run; `more` may override."""
    small = ("--dim", 32, "--epochs", 2, "--batch-classes", 6, "--batch-images", 3, "--min-crop", 0.6)
    start = ("--dataset", "folder", "--root", root, "--base", "smoothap", "--out", out)
    return [str(a) for a in (*start, *small, *more)]


def results_in(out: Path) -> dict[str, Any]:
    """Results by the name of their run."""
    return {path.parent.name: json.loads(path.read_text()) for path in out.rglob("result.json")}


def test_drawn_folder(glyphs: Path, tmp_path: Path) -> None:
    draw_folder(tmp_path / "again", classes=3, images=4)
    for path in sorted((tmp_path / "again").rglob("*.png")):
        assert path.read_bytes() == (glyphs / path.relative_to(tmp_path / "again")).read_bytes()
    draw_folder(tmp_path / "other", classes=1, images=1, seed=1)
    first = "class_000/000.png"
    assert (tmp_path / "other" / first).read_bytes() != (glyphs / first).read_bytes()
    with pytest.raises(ValueError, match="is there already"):
        draw_folder(tmp_path / "other", classes=1, images=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "other"]


def test_from_drawn_images_to_the_picture(glyphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two seeds, without and with TCM: the networks learn, TCM tells, the table and the picture show it."""
    out = tmp_path / "out"
    learn = ("--base", "multisimilarity", "--batch-classes", 8, "--batch-images", 4)
    train = (*learn, "--epochs", 20, "--seeds", 0, 1)
    main(command(glyphs, out, *train))
    main(command(glyphs, out, *train, "--tcm", "--lambda-plus", 0.1, "--lambda-minus", 0.1))
    for more in ((), ("--tcm",)):
        main(command(glyphs, tmp_path / "still", *learn, "--lr", 0, *more))
    assert "192 images of 12 classes to train on, 192 of 12 other classes to test" in capsys.readouterr().out
    found = results_in(out)
    assert sorted(found) == [f"folder-small-multisimilarity-{t}seed{s}" for t in ("", "tcm-") for s in (0, 1)]
    still = results_in(tmp_path / "still")
    before = still["folder-small-multisimilarity-seed0"]["scores"]
    assert still["folder-small-multisimilarity-tcm-seed0"]["scores"] == before  # both start alike
    for result in found.values():
        assert result["scores"]["recall_at_1"] > 1.6 * before["recall_at_1"]
        assert result["steps"] == 20 * 6
    scores = [tuple(result["scores"].values()) for result in found.values()]
    assert len(set(scores)) == 4

    written = tmp_path / "t.md"
    both = ("--markdown", written, "--picture", tmp_path / "t.png", "--json", tmp_path / "t.json")
    main(["--table", str(out), *map(str, both)])
    printed = capsys.readouterr().out
    assert written.read_text() == printed
    assert "| folder small multisimilarity | 2 |" in printed
    assert (tmp_path / "t.png").read_bytes().startswith(PNG)
    main(["--table", str(tmp_path / "t.json"), str(out)])  # the same results twice are the same results
    assert capsys.readouterr().out == printed

    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    main(command(glyphs, out, *train))
    assert "finished before" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


class Stop(Exception):
    """The end of a process, for a test in one process."""


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, through dicts and lists."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def assert_same_run(first: Path, second: Path) -> None:
    """All but the time taken: every weight, the optimizer's state, the scores."""
    states = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (first, second)]
    results = [json.loads((folder / "result.json").read_text()) for folder in (first, second)]
    for state, result in zip(states, results, strict=True):
        del state["seconds"], result["train_seconds"]
    assert results[0] == results[1]
    for name in states[0]:
        assert same(states[0][name], states[1][name]), name


@pytest.mark.parametrize(
    ("base", "more"),
    [
        ("proxyanchor", ("--tcm", "--workers", 2)),
        ("arcface", ("--amp", "bf16", "--layer-norm")),
        ("multisimilarity", ("--amp", "fp16", "--size", 16)),
        ("recallatk", ("--tcm",)),
    ],
)
def test_stopped_at_any_step_it_goes_on(
    glyphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str, more: tuple[Any, ...]
) -> None:
    """Before the first checkpoint, after one in the middle of an epoch, and after one at its end."""
    options = ("--base", base, "--epochs", 2, "--checkpoint-every", 5, *more)
    main(command(glyphs, tmp_path / "whole", *options))
    step = Run._train_step
    done = 0

    def stopping(run: Run, x: Tensor, y: Tensor) -> Tensor:
        nonlocal done
        done += 1
        if done in (2, 10, 16):
            raise Stop
        return step(run, x, y)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_train_step", stopping)
        for _ in range(3):
            with pytest.raises(Stop):
                main(command(glyphs, tmp_path / "parts", *options))
    main(command(glyphs, tmp_path / "parts", *options))
    (name,) = results_in(tmp_path / "whole")
    assert_same_run(tmp_path / "whole" / name, tmp_path / "parts" / name)


def test_killed_in_the_middle_of_an_epoch(glyphs: Path, tmp_path: Path) -> None:
    """SIGKILL, twice; the same command then gives the same numbers to the last bit as without."""
    options = ("--base", "proxyanchor", "--tcm", "--epochs", EPOCHS, "--checkpoint-every", 1)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(out: Path) -> subprocess.Popen[str]:
        line = [sys.executable, "-m", "benchmarks.retrieval", *command(glyphs, out, *options)]
        return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True)

    whole = start(tmp_path / "whole")
    folder = tmp_path / "killed" / "folder-small-proxyanchor-tcm-seed0"
    checkpoint = folder / "checkpoint.pt"
    reached, kills = 0, 0
    while kills < 2:
        process = start(tmp_path / "killed")
        seen = {checkpoint.stat().st_mtime_ns} if checkpoint.exists() else set()
        while len(seen) < 4:  # a few steps further
            assert process.poll() is None, "finished before it could be killed"
            time.sleep(0.001)
            if checkpoint.exists():
                seen.add(checkpoint.stat().st_mtime_ns)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not (folder / "result.json").exists()
        before, reached = reached, torch.load(checkpoint, weights_only=True)["step"]
        assert before < reached < EPOCHS * STEPS
        kills += reached % STEPS > 0
    (folder / ".checkpoint.pt.1.part").write_bytes(b"half")  # as if it had been killed while it wrote
    said, _ = start(tmp_path / "killed").communicate(timeout=300)
    assert f"goes on from epoch {reached // STEPS}, step {reached % STEPS} of {STEPS}" in said
    whole.communicate(timeout=300)
    assert whole.returncode == 0
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.pt", "result.json"]
    assert_same_run(tmp_path / "whole" / folder.name, folder)


def test_dropout_goes_on_with_the_same_draws(glyphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backbone that draws at random as it trains."""
    plain = networks._small
    monkeypatch.setattr(networks, "_small", lambda: torch.nn.Sequential(*plain(), torch.nn.Dropout(0.3)))
    test_stopped_at_any_step_it_goes_on(glyphs, tmp_path, monkeypatch, "smoothap", ())


# Refusals: exit code 2, a message that names what is wrong, nothing written.


def refuse(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(arguments)
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--root", "ROOT/none"), "there is no folder"),
        (("--dataset", "sop"), "Ebay_train.txt"),
        (("--dataset", "mnist"), "invalid choice: 'mnist'"),
        (("--base", "triplet"), "invalid choice: 'triplet'"),
        (("--backbone", "resnet50"), "--backbone resnet50 needs timm"),
        (("--pretrained",), "leave --pretrained out"),
        (("--batch-classes", "13"), "more than the 12 classes"),
        (("--batch-images", "1"), "must be a whole number, 2 or above, got 1"),
        (("--epochs", "0"), "must be a whole number, 1 or above, got 0"),
        (("--seeds", "0", "-1"), "must be a whole number, 0 or above, got -1"),
        (("--lr", "fast"), "must be a number, 0 or above, got fast"),
        (("--lr", "nan"), "must be a number, 0 or above, got nan"),
        (("--margin-plus", "1.5"), "must be a number, from -1 to 1, got 1.5"),
        (("--min-crop", "0"), "must be a number, from 0.01 to 1, got 0"),
        (("--test-set", "small"), "--test-set is of vehicleid"),
        (("--markdown", "t.md"), "--markdown is of --table"),
        (("--caption", "x"), "--caption is of --table"),
        (("--table", "out"), "not allowed with argument"),
        (("--lambda-plus", "0.1"), "--lambda-plus is of --tcm"),
        (("--lambda-minus", "1"), "--lambda-minus is of --tcm"),  # its default, but asked for
        (("--margin-plus", "0.8"), "--margin-plus is of --tcm"),
        (("--margin-minus", "0.4"), "--margin-minus is of --tcm"),
        (("--loss-lr", "0.1"), "--loss-lr is of base losses with class weights, proxyanchor and arcface"),
        (("--size", "8"), "16 or above"),
    ],
)
def test_bad_input(
    glyphs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    arguments = command(glyphs, tmp_path / "out", *(text.replace("ROOT", str(tmp_path)) for text in more))
    assert message in refuse(capsys, arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error is that of a machine without a GPU")
def test_no_gpu(glyphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "this torch sees no GPU" in refuse(capsys, command(glyphs, tmp_path, "--device", "cuda"))


def test_a_size_that_the_backbone_refuses(
    glyphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_timm(monkeypatch)
    said = refuse(capsys, command(glyphs, tmp_path / "out", "--backbone", "resnet50", "--size", 32))
    assert "does not take images of --size 32" in said
    assert not list(tmp_path.iterdir())


def test_neither_task_nor_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert "one of the arguments --dataset --table is required" in refuse(capsys, [])
    assert "--dataset needs --root" in refuse(capsys, ["--dataset", "cub"])
    assert "--dataset needs --base" in refuse(capsys, ["--dataset", "cub", "--root", "."])


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    """Examples, how it goes on, and for every data set its files and where it comes from."""
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    for name, about in DATASETS.items():
        assert f"{name}: {about.source}\n{about.layout}" in said
    for word in ("examples:", "goes on", "Exit code 2", *BASES):
        assert word in said


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read(
    glyphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    root = tmp_path / "glyphs"
    shutil.copytree(glyphs, root)
    for path in (root / "class_000").iterdir():
        path.write_bytes(PNG)
    said = refuse(capsys, command(root, tmp_path / "out", "--workers", workers, "--batch-classes", 12))
    assert "cannot read image" in said and "class_000" in said
    assert len(said.strip().splitlines()) == 1
    assert not list((tmp_path / "out").rglob("*.*"))


def test_too_few_test_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 9 negative pairs none is 1 % to 10 %: refused before training; 10 can be scored."""
    draw_folder(tmp_path / "drawn", classes=4, images=5)

    def arguments(name: str, sizes: tuple[int, ...]) -> list[str]:
        for k, (target, images) in enumerate(zip(("train/a", "train/b", "test/c", "test/d"), sizes, strict=True)):
            shutil.copytree(tmp_path / "drawn" / f"class_{k:03d}", tmp_path / name / target)
            for path in sorted((tmp_path / name / target).iterdir())[images:]:
                path.unlink()
        return command(tmp_path / name, tmp_path / "out", "--batch-classes", 2, "--epochs", 1)

    said = refuse(capsys, arguments("few", (3, 3, 3, 3)))
    assert "has 9 pairs of images of different classes" in said and "at least 10" in said
    assert not (tmp_path / "out").exists()
    main(arguments("enough", (3, 3, 5, 2)))
    assert len(results_in(tmp_path / "out")) == 1


def test_a_loss_that_is_not_finite(glyphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refuse(capsys, command(glyphs, tmp_path, "--lr", 1e30, "--warmup", 0, "--epochs", 1))
    assert "the loss is nan" in said
    assert not list(tmp_path.rglob("*.*"))


def test_folders_of_other_runs(glyphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other settings, a damaged checkpoint, another process: refused, and nothing of it is lost."""
    main(command(glyphs, tmp_path))
    (folder,) = tmp_path.iterdir()
    for name in ("result.json", "checkpoint.pt"):  # finished, then with its checkpoint alone
        said = refuse(capsys, command(glyphs, tmp_path, "--epochs", 3))
        assert "holds a run with other settings (epochs 2 then, 3 now)" in said
        assert (folder / name).exists()
        (folder / "result.json").unlink(missing_ok=True)
    for text in ("{}", "{", "[]", json.dumps({"identity": {}, "scores": {"recall_at_1": 0.5}})):
        (folder / "result.json").write_text(text)
        assert "result.json is damaged" in refuse(capsys, command(glyphs, tmp_path))
    (folder / "result.json").unlink()
    whole = (folder / "checkpoint.pt").read_bytes()
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save({**state, "random": state["random"][:9]}, tmp_path / "short.pt")
    torch.save({**state, "optimizer": {**state["optimizer"], "param_groups": []}}, tmp_path / "groups.pt")
    torch.save([state], tmp_path / "list.pt")
    for name, step in (("text", "one"), ("far", 10**6), ("none", None), ("below", -1)):
        torch.save({**state, "step": step}, tmp_path / f"{name}.pt")
    names = ("short", "groups", "list", "text", "far", "none", "below")
    saved = [(tmp_path / f"{name}.pt").read_bytes() for name in names]
    for content in (whole[: len(whole) // 2], b"", b"garbage", bytes(range(1, 200)), b"\x80\x02}q\x00.", *saved):
        (folder / "checkpoint.pt").write_bytes(content)
        said = refuse(capsys, command(glyphs, tmp_path))
        assert f"{folder / 'checkpoint.pt'} is damaged or of another version" in said and "weights_only" not in said
        assert len(said.splitlines()) == 1
    (folder / "checkpoint.pt").write_bytes(whole)
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert "another process is at the run" in refuse(capsys, command(glyphs, tmp_path))
    os.close(handle)
    main(command(glyphs, tmp_path))
    assert "goes on from epoch 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("base", "more", "loss_lr"),
    [("arcface", (), 0.2), ("proxyanchor", ("--loss-lr", 0.3), 0.3), ("smoothap", (), None)],
)
def test_rate_of_class_weights(glyphs: Path, tmp_path: Path, base: str, more: tuple[Any, ...], loss_lr: Any) -> None:
    """100 times that of the network unless given; losses without such weights have none."""
    main(command(glyphs, tmp_path, "--base", base, "--epochs", 1, "--lr", 0.002, *more))
    (found,) = results_in(tmp_path).values()
    assert found["identity"]["loss_lr"] == (loss_lr if loss_lr is None else pytest.approx(loss_lr))


def test_interrupted(
    glyphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_train_step", interrupt)
    with pytest.raises(SystemExit) as left:
        main(command(glyphs, tmp_path))
    assert left.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err


# The table.


def result(base: str, tcm: bool, seed: int, recall: float, score: float, eps: float, **other: Any) -> dict[str, Any]:
    """As a run writes it, as far as the table reads it."""
    margins = {"margin_plus": 0.9, "margin_minus": 0.5, "lambda_plus": 1.0, "lambda_minus": 1.0}
    identity: dict[str, Any] = {
        "dataset": "cub",
        "test_set": "",
        "backbone": "small",
        "base": base,
        "tcm": margins if tcm else None,
    }
    identity |= {"seed": seed, "epochs": 2, "batch_classes": 4, "batch_images": 2, "dim": 8, "images": "f" * 16} | other
    part = {"images": 1234, "classes": 100}
    scores = {"recall_at_1": recall, "opis": score, "eps_opis": eps}
    return {"identity": identity, "scores": scores, "train": part, "test": part}


RESULTS = [
    result("smoothap", False, 0, 0.50, 0.010, 0.020),
    result("smoothap", False, 1, 0.54, 0.012, 0.030),
    result("smoothap", False, 2, 0.90, 0.900, 0.900),  # no other side
    result("smoothap", True, 0, 0.52, 0.007, 0.024),
    result("smoothap", True, 1, 0.55, 0.008, 0.033),
    result("arcface", False, 0, 0.60, 0.02, 0.03),
    result("arcface", True, 0, 0.60, 0.03, 0.02),
    result("recallatk", True, 5, 0.70, 0.02, 0.03),
]


def test_table_by_hand() -> None:
    text = table.markdown(table.make_experiments(RESULTS), RESULTS)
    lines = text.splitlines()
    assert lines[1].count("|") == lines[0].count("|") == lines[2].count("|")
    # Changes of OPIS x 1000: -3 and -4; of 10%-OPIS x 1000: 4 and 3; of recall@1: 2 and 1 points.
    assert lines[2] == (
        "| cub small smoothap | 2 "
        "| 11.0 +- 1.4 | 7.5 +- 0.7 | ↓ -3.5 +- 0.7, better in 2 "
        "| 25.0 +- 7.1 | 28.5 +- 6.4 | ↑ +3.5 +- 0.7, better in 0 "
        "| 52.0 +- 2.8 | 53.5 +- 2.1 | ↑ +1.5 +- 0.7, better in 2 |"
    )
    assert lines[3] == (
        "| cub small arcface | 1 | 20.0 | 30.0 | ↑ +10.0, better in 0 "
        "| 30.0 | 20.0 | ↓ -10.0, better in 1 | 60.0 | 60.0 | = +0.0, better in 0 |"
    )
    assert lines[4] == "| cub small recallatk | 0 | - | 20.0 | - | - | 30.0 | - | - | 70.0 | - |"
    assert "cub: 1,234 images of 100 classes to train on" in text
    assert "TCM with smoothap, arcface, recallatk: m+ = 0.9, m- = 0.5, lambda+ = 1" in text
    captioned = table.markdown(table.make_experiments(RESULTS), RESULTS, "Mind the gap.")
    assert captioned == text + "\nMind the gap.\n"


def test_runs_of_other_settings_are_not_mixed() -> None:
    results = copy.deepcopy(RESULTS[:2] + RESULTS[3:5])
    results[1]["identity"]["epochs"] = results[3]["identity"]["epochs"] = 9
    assert [(row.name, row.seeds()) for row in table.make_experiments(results)] == [
        ("cub small smoothap (epochs 2)", [0]),
        ("cub small smoothap (epochs 9)", [1]),
    ]
    results = copy.deepcopy(RESULTS[:2] + RESULTS[3:5])
    results[3]["identity"]["tcm"]["margin_plus"] = 0.7  # one baseline, two settings of TCM
    names = [row.name for row in table.make_experiments(results)]
    assert len(names) == 2 and "margin_plus 0.9" in names[0] and "margin_plus 0.7" in names[1]


def test_rates_of_class_weights_are_told_where_there_are_such() -> None:
    results = [result("arcface", tcm, 0, 0.5, 0.1, 0.2, loss_lr=rate) for tcm in (False, True) for rate in (0.1, 0.2)]
    results += [result("smoothap", tcm, 0, 0.5, 0.1, 0.2, loss_lr=None) for tcm in (False, True)]
    assert sorted(row.name for row in table.make_experiments(results)) == [
        "cub small arcface (loss_lr 0.1)",
        "cub small arcface (loss_lr 0.2)",
        "cub small smoothap",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none.json",), "cannot read none.json: No such file"),
        (("good.json", "--root", "empty"), "--root is of --dataset"),
        (("good.json", "--base", "smoothap"), "--base is of --dataset"),
        (("good.json", "--tcm"), "--tcm is of --dataset"),
        (("good.json", "--seeds", "0"), "--seeds is of --dataset"),
        (("good.json", "--checkpoint-every", "500"), "--checkpoint-every is of --dataset"),
        (("empty",), "there is no result.json under empty"),
        (("bad.json",), "bad.json holds no results"),
        (("list.json",), "list.json holds no results"),
        (("good.json", "other.json"), "other.json has a run that came before with other scores"),
        (("good.json", "--picture", "t.gif"), "its name must end in one of .png, .pdf, .svg"),
        (("good.json", "--markdown", "none/t.md"), "cannot write none/t.md: there is no folder"),
        (("good.json", "--markdown", "empty"), "it is a folder"),
        (("good.json", "--markdown", "t", "--json", "./t"), "it is an input or the other output"),
        (("good.json", "--json", "./good.json"), "it is an input or the other output"),
        (("strange.json",), "strange.json holds no results"),
        (("nothing.json",), "nothing.json holds no results"),
        (("parts.json",), "parts.json holds no results"),
        (("seeds.json",), "seeds.json holds no results"),
        (("one.json", "--picture", "t.png", "--markdown", "t.md"), "nothing to draw"),
    ],
)
def test_bad_tables(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    other = copy.deepcopy(RESULTS[0])
    other["scores"]["opis"] = 0.5
    files: dict[str, Any] = {"bad": "{", "list": "[3]", "good": RESULTS, "other": other, "one": RESULTS[0]}
    files["strange"] = {**RESULTS[0], "scores": {**RESULTS[0]["scores"], "opis": "high"}}
    files["nothing"] = {**RESULTS[0], "identity": []}
    files["parts"] = {name: value for name, value in RESULTS[0].items() if name != "test"}
    files["seeds"] = {**RESULTS[0], "identity": {"tcm": None}}
    for name, content in files.items():
        Path(f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    before = sorted(tmp_path.rglob("*"))
    assert message in refuse(capsys, ["--table", *arguments])
    assert sorted(tmp_path.rglob("*")) == before


def test_drawing_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tmp_path / "d"), "--classes", "4", "--images", "2", "--seed", "5"]
    draw(arguments)
    assert "drew 4 classes of 2 images" in capsys.readouterr().out
    assert [len(part.paths) for part in load("folder", tmp_path / "d")[:2]] == [4, 4]
    for bad, message in ((arguments, "is there already"), ([*arguments, "--classes", "0"], "must be at least 1")):
        with pytest.raises(SystemExit) as left:
            draw(bad)
        assert left.value.code == 2
        assert message in capsys.readouterr().err


def test_the_table_survives_terminal_and_caption(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Characters that are none, and escape sequences in captions and results: written, and harmless on the page."""
    results = copy.deepcopy(RESULTS)
    for one in results:
        one["identity"]["dataset"] = "cub\x1b[2J"
    (tmp_path / "results.json").write_text(json.dumps(results))
    arguments = ["--table", tmp_path / "results.json", "--caption", "Käse \udcff \x1b[31m"]
    main([str(a) for a in (*arguments, "--markdown", tmp_path / "t.md", "--json", tmp_path / "t.json")])
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "cub\\x1b[2J" in printed and "Käse \\udcff" in printed
    assert "Käse \\udcff" in (tmp_path / "t.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "t.json").read_text()) == results


def test_the_folder_of_runs_is_looked_at_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the data set, which is not there."""
    (tmp_path / "file").write_text("")
    call = [
        "--dataset",
        "folder",
        "--root",
        str(tmp_path / "none"),
        "--base",
        "smoothap",
        "--out",
        str(tmp_path / "file"),
    ]
    assert "cannot write into" in refuse(capsys, call)
