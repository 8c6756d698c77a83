"""Every data set of the retrieval experiment, written in small as its authors lay it out."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from benchmarks.retrieval.datasets import DATASETS, load

pytestmark = pytest.mark.usefixtures("one_thread")


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
