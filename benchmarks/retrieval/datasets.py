"""The data sets: their published open-world splits, read from the files as their authors lay them out.

No class is in both parts of a split. Nothing is downloaded: what is missing is an error that names the file, the layout
and where the data set comes from.
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from benchmarks.retrieval import glyphs

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
TEST_SETS = {"small": 800, "medium": 1600, "large": 2400}  # VehicleID's, by their number of vehicles

Entry = tuple[Path, str]  # an image and the name of its class


class Images(NamedTuple):
    """N images of C classes."""

    paths: list[Path]
    labels: NDArray[np.int64]  # [N], 0 to C - 1
    classes: list[str]  # [C] names, in the order of the labels
    pixels: NDArray[np.uint8] | None = None  # [N, height, width] in grey, in place of the files, which are none then

    def counts(self) -> list[int]:
        """[number of images, number of classes]."""
        return [len(self.labels), len(self.classes)]

    def read(self, index: int) -> Image.Image:
        """An image, a file as RGB and pixels as grey; ValueError, with its path, if it cannot be read."""
        if self.pixels is not None:
            return Image.fromarray(self.pixels[index])
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
            raise ValueError(f"cannot read image {path}: {error}") from error

    def of_classes(self, chosen: NDArray[np.int64]) -> "Images":
        """Those of some classes, numbered anew in this order."""
        number = np.full(len(self.classes), -1)
        number[chosen] = np.arange(len(chosen))
        rows = np.flatnonzero(number[self.labels] >= 0)
        paths = [] if self.pixels is not None else [self.paths[k] for k in rows]
        pixels = None if self.pixels is None else self.pixels[rows]
        return Images(paths, number[self.labels[rows]], [self.classes[c] for c in chosen], pixels)


class Split(NamedTuple):
    """Images to train on and images to score, of other classes."""

    train: Images
    test: Images
    fingerprint: str  # of all file names, file sizes and labels: two runs of one split have the same
    warning: str | None  # where the numbers are not the published ones
    held_out: Images | None = None  # of further classes, to choose by

    def hold_out(self, classes: int) -> "Split":
        """With so many of the classes to train on, drawn at random, held out. ValueError: too few would be left."""
        if classes == 0:
            return self
        total = len(self.train.classes)
        if not 2 <= classes <= total - 2:
            raise ValueError(f"--held-out {classes}: of {total} classes to train on, 2 to {total - 2} can be held out")
        order = np.random.default_rng(0).permutation(total)
        held_out, train = (self.train.of_classes(np.sort(part)) for part in (order[:classes], order[classes:]))
        return self._replace(train=train, held_out=held_out)


class Dataset(NamedTuple):
    """How a data set is read."""

    read: Callable[[Path, str], tuple[list[Entry], list[Entry]]] | None  # root and test set to train and test
    folders: tuple[str, ...]  # its files may lie in one of these under the root, or in the root
    layout: str
    source: str
    published: dict[str, tuple[tuple[int, int], tuple[int, int]]]  # (images, classes) of train and test, by test set


class Missing(ValueError):
    """A file that is not there, or holds something else; `load` adds layout and source."""


def load(dataset: str, root: Path, test_set: str = "") -> Split:
    """The split of a data set under `root`.

    Args:
        dataset: a key of `DATASETS`.
        root: the folder that holds its files as its layout says.
        test_set: of VehicleID, a key of `TEST_SETS`.

    Raises:
        ValueError: a file is missing or not what it should be.
    """
    about = DATASETS[dataset]
    base = next((root / name for name in about.folders if (root / name).is_dir()), root)
    try:
        if not base.is_dir():
            raise Missing(f"there is no folder {base}")
        if about.read is None:
            return _glyphs(base)
        parts = about.read(base, test_set)
        shared = {name for _, name in parts[0]} & {name for _, name in parts[1]}
        if shared:
            raise Missing(f"class {min(shared)} is in both parts of the split; in the open world none may be")
        train, test = (_images(part, which) for part, which in zip(parts, ("train", "test"), strict=True))
        if np.bincount(test.labels).max() < 2:
            raise Missing("no class of the test part has two images, so none can be found again")
        fingerprint = _fingerprint(parts)
    except Missing as error:
        raise ValueError(
            f"{dataset} cannot be read: {error}\nexpected under --root ({root}):\n{about.layout}\n"
            f"source: {about.source}"
        ) from error
    expected = about.published.get(test_set)
    found = tuple(tuple(part.counts()) for part in (train, test))
    warning = None
    if expected is not None and found != expected:
        words = [
            f"{part[0][0]:,} images of {part[0][1]:,} classes to train on, {part[1][0]:,} of {part[1][1]:,} to test"
            for part in (found, expected)
        ]
        warning = f"{words[0]}; published are {words[1]}"
    return Split(train, test, fingerprint, warning)


def _glyphs(base: Path) -> Split:
    try:
        found = glyphs.read(base)
    except OSError as error:
        raise Missing(f"there is no {base / 'glyphs.npz'} ({error.strerror})") from error
    except (ValueError, LookupError, TypeError) as error:
        raise Missing(f"{base / 'glyphs.npz'} is damaged ({error!r})") from error
    everything = Images([], found.labels, found.characters.tolist(), found.pixels)
    classes = np.arange(len(found.characters))
    train, test = (everything.of_classes(part) for part in (classes[: found.train], classes[found.train :]))
    fingerprint = hashlib.sha256(found.pixels.tobytes() + found.labels.tobytes()).hexdigest()[:16]
    return Split(train, test, fingerprint, None)


def _images(entries: list[Entry], part: str) -> Images:
    """Entries with their classes numbered."""
    names = {name for _, name in entries}
    if len(names) < 2:
        raise Missing(f"the {part} part has {len(names)} classes; at least two are needed")
    number = {name: k for k, name in enumerate(sorted(names))}
    labels = np.array([number[name] for _, name in entries], dtype=np.int64)
    return Images([path for path, _ in entries], labels, list(number))


def _fingerprint(parts: Iterable[list[Entry]]) -> str:
    """Of classes, file names and sizes: contents would say more, but are 120 GB. All images must be there."""
    state = hashlib.sha256()
    for part in parts:
        state.update(b"\n")
        for path, name in part:
            try:
                size = path.stat().st_size
            except OSError as error:
                raise Missing(f"there is no image {path} ({error.strerror})") from error
            state.update(f"{name}\0{path.name}\0{size}\n".encode())
    return state.hexdigest()[:16]


def _rows(path: Path, columns: int, skip: int = 0) -> list[list[str]]:
    """The lines of a text file, split at white space into `columns`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[skip:]
    except OSError as error:
        raise Missing(f"there is no file {path}") from error
    except UnicodeDecodeError as error:
        raise Missing(f"{path} is no text file") from error
    rows = [line.split() for line in lines if line.strip()]
    for k, row in enumerate(rows):
        if len(row) != columns:
            raise Missing(f"line {k + 1 + skip} of {path} has {len(row)} columns, {columns} are wanted: {lines[k]!r}")
    return rows


def _sop(base: Path, _: str) -> tuple[list[Entry], list[Entry]]:
    parts = [_rows(base / f"Ebay_{part}.txt", 4, skip=1) for part in ("train", "test")]
    train, test = ([(base / row[3], row[1]) for row in rows] for rows in parts)
    return train, test


def _cub(base: Path, _: str) -> tuple[list[Entry], list[Entry]]:
    classes = dict(_rows(base / "image_class_labels.txt", 2))
    train: list[Entry] = []
    test: list[Entry] = []
    for image, path in _rows(base / "images.txt", 2):
        if not classes.get(image, "").isdecimal():
            raise Missing(f"{base / 'image_class_labels.txt'} has no class for image {image}")
        number = int(classes[image])
        (train if number <= 100 else test).append((base / "images" / path, f"{number:03d}"))
    return train, test


def _cars(base: Path, _: str) -> tuple[list[Entry], list[Entry]]:
    """The first 98 of 196 classes to train on, of all images: the data set's own train and test images are merged."""
    entries: list[tuple[Path, int]] = []
    annotations = base / "cars_test_annos_withlabels.mat"
    if (base / "devkit" / annotations.name).is_file():
        annotations = base / "devkit" / annotations.name
    if (base / "cars_annos.mat").is_file():
        paths, classes = _mat(base / "cars_annos.mat", "relative_im_path")
        entries = [(base / path, number) for path, number in zip(paths, classes, strict=True)]
    elif annotations.is_file() or (base / "devkit").is_dir():
        for path, folder in ((base / "devkit" / "cars_train_annos.mat", "cars_train"), (annotations, "cars_test")):
            names, classes = _mat(path, "fname")
            entries += [(base / folder / name, number) for name, number in zip(names, classes, strict=True)]
    else:
        folders = _class_folders(base)
        if len(folders) != 196:
            raise Missing(f"there is neither {base / 'cars_annos.mat'} nor {annotations}, nor are there 196 folders")
        entries = [(path, k + 1) for k, folder in enumerate(folders) for path in _folder_images(folder)]
    train, test = ([(path, f"{n:03d}") for path, n in entries if (n <= 98) == first] for first in (True, False))
    return train, test


def _mat(path: Path, name: str) -> tuple[list[str], list[int]]:
    """File names and classes, 1 to 196, of a file of annotations."""
    if not path.is_file():
        raise Missing(f"there is no file {path}")
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError(f"{path} needs scipy: pip install scipy") from error
    try:
        table = np.atleast_1d(loadmat(path, squeeze_me=True, variable_names=["annotations"])["annotations"])
        return [str(value) for value in table[name]], [int(value) for value in table["class"]]
    except Exception as error:  # scipy raises what it likes on files of another kind
        raise Missing(f"{path} has no annotations with {name!r} and 'class': {error}") from error


def _vehicleid(base: Path, test_set: str) -> tuple[list[Entry], list[Entry]]:
    lists = ("train_list.txt", f"test_list_{TEST_SETS[test_set]}.txt")
    parts = [_rows(base / "train_test_split" / name, 2) for name in lists]
    train, test = ([(base / "image" / f"{image.zfill(7)}.jpg", vehicle) for image, vehicle in rows] for rows in parts)
    return train, test


def _inaturalist(base: Path, _: str) -> tuple[list[Entry], list[Entry]]:
    """A class is a species: the two folders that an image lies in."""
    parts = []
    for part in ("train", "test"):
        name = f"Inaturalist_{part}_set1.txt"
        path = base / "Inat_dataset_splits" / name
        paths = [Path(row[0]) for row in _rows(path if path.is_file() else base / name, 1)]
        if any(len(image.parts) < 3 for image in paths):
            raise Missing(f"{name} must list images as train_val2018/<kingdom>/<species>/<image>.jpg")
        parts.append([(base / image, "/".join(image.parts[-3:-1])) for image in paths])
    return parts[0], parts[1]


def _folder(base: Path, _: str) -> tuple[list[Entry], list[Entry]]:
    if (base / "train").is_dir() and (base / "test").is_dir():
        sides = [_class_folders(base / part) for part in ("train", "test")]
    else:
        folders = _class_folders(base)
        sides = [folders[: len(folders) // 2], folders[len(folders) // 2 :]]
    train, test = ([(path, f.name) for f in side for path in _folder_images(f)] for side in sides)
    return train, test


def _class_folders(base: Path) -> list[Path]:
    return _sorted(path for path in base.iterdir() if path.is_dir() and not path.name.startswith("."))


def _folder_images(folder: Path) -> list[Path]:
    found = _sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not found:
        raise Missing(f"{folder} holds no image ({', '.join(SUFFIXES)})")
    return found


def _sorted(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: path.name)


# Layouts and splits as pytorch-metric-learning 2.9.0 and the authors of Smooth-AP and Recall@k read them; the numbers
# of images as in their papers (Oh Song et al. 2016; Brown et al. 2020; Patel et al. 2022).
DATASETS: dict[str, Dataset] = {
    "inaturalist2018": Dataset(
        _inaturalist,
        ("Inaturalist",),
        """  Inat_dataset_splits/Inaturalist_train_set1.txt   a line an image, its path as below
  Inat_dataset_splits/Inaturalist_test_set1.txt    likewise
  train_val2018/<kingdom>/<species>/<image>.jpg""",
        "images, 120 GB: github.com/visipedia/inat_comp/tree/master/2018; the two lists, 5,690 species to train\n"
        "  on and 2,452 to test: the link 'dataset splits' at github.com/Andrew-Brown1/Smooth_AP (Brown et al., ECCV\n"
        "  2020), unpacked into the folder of the data set",
        {"": ((325_846, 5_690), (136_093, 2_452))},
    ),
    "sop": Dataset(
        _sop,
        ("Stanford_Online_Products",),
        """  Ebay_train.txt, Ebay_test.txt   a header, then a line an image: number, class, super class, path
  <super class>_final/<image>.JPG""",
        "Stanford Online Products, cvgl.stanford.edu/projects/lifted_struct (Oh Song et al., CVPR 2016)",
        {"": ((59_551, 11_318), (60_502, 11_316))},
    ),
    "cub": Dataset(
        _cub,
        ("CUB_200_2011",),
        """  images.txt               a line an image: number and path under images/
  image_class_labels.txt   a line an image: number and class, 1 to 200; the first 100 are to train on
  images/<class>/<image>.jpg""",
        "CUB-200-2011, www.vision.caltech.edu/datasets/cub_200_2011 (Wah et al., 2011)",
        {"": ((5_864, 100), (5_924, 100))},
    ),
    "cars": Dataset(
        _cars,
        ("cars196", "stanford_cars"),
        """  cars_annos.mat and car_ims/<image>.jpg
or
  devkit/cars_train_annos.mat, cars_test_annos_withlabels.mat (or devkit/ that), cars_train/ and cars_test/<image>.jpg
or
  196 folders, <class>/<image>.jpg; the first 98 classes are to train on, of folders the first by name""",
        "Cars196, ai.stanford.edu/~jkrause/cars/car_dataset.html (Krause et al., 2013); copies are kept on kaggle.com",
        {"": ((8_054, 98), (8_131, 98))},
    ),
    "vehicleid": Dataset(
        _vehicleid,
        ("VehicleID_V1.0", "VehicleID"),
        """  train_test_split/train_list.txt       a line an image: its number and its vehicle
  train_test_split/test_list_800.txt    likewise; --test-set small. 1600: medium, 2400: large
  image/<number of seven digits>.jpg""",
        "PKU VehicleID, www.pkuml.org/resources/pku-vehicleid.html, by e-mail to its authors (Liu et al., CVPR 2016)",
        {},
    ),
    "glyphs": Dataset(
        None,
        (),
        """  glyphs.npz   1,400 characters in 36 typefaces; the first 800 are to train on""",
        "rendered in the fonts that are installed (python -m benchmarks.retrieval.glyphs DIR)",
        {},
    ),
    "folder": Dataset(
        _folder,
        (),
        """  <class>/<image>   the first half of the classes by name is to train on, the rest to test
or
  train/<class>/<image> and test/<class>/<image>""",
        "your own images (python -m benchmarks.retrieval.drawn DIR draws some)",
        {},
    ),
}


def describe(images: Images) -> dict[str, Any]:
    """Numbers of a part, for the result."""
    sizes = np.bincount(images.labels)
    return {
        "images": len(images.labels),
        "classes": len(images.classes),
        "images_per_class": [int(sizes.min()), float(np.median(sizes)), int(sizes.max())],
    }
