"""Renders characters in many typefaces as images to retrieve: `python -m benchmarks.retrieval.glyphs DIR`.

A class is a character, its images are its renderings, each in another typeface: printed, brushed, pencilled, bold.
The typefaces are found among the fonts that are installed, and chosen to differ most. A rendering counts once: those
that are blank, that stand for a missing character, that two characters of a typeface share or that another typeface has
already are left out. Pixels and labels go to DIR/glyphs.npz, the typefaces with their versions to DIR/fonts.json.
"""

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from fontTools.ttLib import TTCollection, TTFont, TTLibError
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from tcm_fused.thresholds.outputs import write_whole
from tcm_fused.thresholds.terminal import Parser, printable, run

# Of Debian 12, each with fonts- before it.
# fmt: off
PACKAGES = (
    "aoyagi-kouzan-t", "aoyagi-soseki", "arphic-bkai00mp", "arphic-bsmi00lp", "arphic-gbsn00lp", "arphic-gkai00mp",
    "arphic-ukai", "arphic-uming", "babelstone-han", "baekmuk", "cns11643-kai", "cns11643-sung", "cwtex-fs",
    "cwtex-heib", "cwtex-kai", "cwtex-ming", "cwtex-yen", "dejima-mincho", "dotgothic16", "droid-fallback",
    "hanazono", "horai-umefont", "ipaexfont-gothic", "ipaexfont-mincho", "ipafont-gothic", "ipamj-mincho", "kiloji",
    "klee", "komatuna", "konatu", "kouzan-mouhitsu", "lxgw-wenkai", "migmix", "misaki", "mona", "monapo",
    "morisawa-bizud-gothic", "morisawa-bizud-mincho", "motoya-l-cedar", "motoya-l-maruberi", "mplus", "noto-cjk",
    "noto-cjk-extra", "oradano-mincho-gsrr", "rampart", "reggae", "rocknroll", "sawarabi-gothic", "sawarabi-mincho",
    "seto", "smiley-sans", "stick", "takao-gothic", "takao-mincho", "train", "umeplus", "umeplus-cl", "unfonts-core",
    "unfonts-extra", "vlgothic", "wqy-microhei", "wqy-zenhei", "yozvox-yozfont", "yusei-magic",
)
# fmt: on
FONTS = Path("/usr/share/fonts")
HAN = range(0x4E00, 0x9FA6)  # CJK Unified Ideographs, without later additions
SIZE = 36  # pixels of a side; the centre crop of the experiment, 7/8, leaves 32
_INK = 30  # pixels of the longer side of what is drawn
_DRAWN = 64  # pixels of an em before it is reduced
_SAMPLE = 32  # characters by which typefaces are compared

Pixels = NDArray[np.uint8]


class Glyphs(NamedTuple):
    """Renderings of C characters, those of a character side by side; black on white is 0 on 255."""

    pixels: Pixels  # [N, SIZE, SIZE]
    labels: NDArray[np.int64]  # [N], 0 to C - 1
    typefaces: NDArray[np.int64]  # [N], 0 to F - 1
    characters: NDArray[np.str_]  # [C]; the first `train` are to train on
    train: int


class Face(NamedTuple):
    """A typeface: one face of a font file."""

    path: Path
    number: int  # in its file
    name: str
    version: str
    points: frozenset[int]  # the code points that it has, of those asked for


def render(
    folder: Path,
    fonts: Path = FONTS,
    characters: Iterable[int] = HAN,
    *,
    train: int = 800,
    test: int = 600,
    typefaces: int = 36,
    least: int = 30,
) -> Glyphs:
    """Render `train + test` of the characters, drawn at random, and write `folder`/glyphs.npz and fonts.json.

    Args:
        folder: made if it is not there.
        fonts: folder with font files.
        characters: code points to draw from.
        train, test: numbers of classes.
        typefaces: how many are chosen, of those that have most of the characters.
        least: renderings that a character must have.

    Raises:
        ValueError: there are too few typefaces, or characters with enough renderings.
    """
    faces = find_faces(fonts, frozenset(characters))
    common = _common(faces)
    faces = [face for face in faces if len(face.points & common) >= 0.95 * len(common)]
    if len(faces) < typefaces:
        raise ValueError(
            f"{typefaces} typefaces are wanted, and {len(faces)} are found under {fonts} that have the characters; "
            f"install more; --packages tells which (apt-get install -y --no-install-recommends NAMES)"
        )
    points = np.random.default_rng(0).permutation(sorted(common)).tolist()
    chosen = _most_different(faces, points[:_SAMPLE], typefaces)
    glyphs = _draw_classes(chosen, points, train, test, least)
    about = {
        "typefaces": [_about(face, int((glyphs.typefaces == k).sum())) for k, face in enumerate(chosen)],
        "found": len(faces),
        "pixels_sha256": hashlib.sha256(glyphs.pixels.tobytes()).hexdigest(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
    write_whole(folder / "fonts.json", lambda part: part.write_text(text, encoding="utf-8"))
    write_whole(folder / "glyphs.npz", lambda part: _save(part, glyphs))
    return glyphs


def _save(path: Path, glyphs: Glyphs) -> None:
    with path.open("wb") as file:  # by its name, numpy would add .npz to it
        np.savez(file, **glyphs._asdict())


def read(folder: Path) -> Glyphs:
    """What `render` wrote. OSError, ValueError, KeyError: it is not there, or something else."""
    with np.load(folder / "glyphs.npz") as arrays:
        pixels, labels, typefaces, characters = (arrays[name] for name in Glyphs._fields[:-1])
        return Glyphs(pixels, labels, typefaces, characters, int(arrays["train"]))


def find_faces(fonts: Path, wanted: frozenset[int]) -> list[Face]:
    """All typefaces in font files under a folder that have a tenth of the characters, in the order of their names."""
    faces: dict[tuple[str, str], Face] = {}
    paths = {path.resolve() for path in fonts.rglob("*") if path.suffix.lower() in (".ttf", ".ttc", ".otf", ".otc")}
    for path in tqdm(sorted(paths), desc="looking at fonts", unit="file", disable=None, leave=False):
        for face in _faces_in(path, wanted):
            if 10 * len(face.points) >= len(wanted):
                faces.setdefault((face.name, face.version), face)
    return [faces[key] for key in sorted(faces)]


def _faces_in(path: Path, wanted: frozenset[int]) -> Iterator[Face]:
    try:
        with path.open("rb") as file:
            many = file.read(4) == b"ttcf"
        fonts = TTCollection(path, lazy=True).fonts if many else [TTFont(path, lazy=True)]
        for index, font in enumerate(fonts):
            name = font["name"].getDebugName(4) or f"{path.stem} {index}"
            yield Face(
                path, index, name, font["name"].getDebugName(5) or "", wanted & (font.getBestCmap() or {}).keys()
            )
    except (TTLibError, OSError, KeyError, AssertionError):  # damaged, or no outlines
        return


def _common(faces: Sequence[Face]) -> frozenset[int]:
    """Characters that four of five packages have; a package is a folder of font files."""
    packages: dict[Path, set[int]] = {}
    for face in faces:
        packages.setdefault(face.path.parent, set()).update(face.points)
    counts = Counter(point for points in packages.values() for point in points)
    return frozenset(point for point, count in counts.items() if count >= 0.8 * len(packages))


class _Pen:
    """Draws the characters of a typeface."""

    def __init__(self, face: Face) -> None:
        self.face = face
        self.font = ImageFont.truetype(face.path, _DRAWN, face.number, layout_engine=ImageFont.Layout.BASIC)
        self.missing = self._draw(0x10FFFE)  # no character, so that all fonts draw their sign for one that they lack

    def draw(self, point: int) -> Pixels | None:
        """The character, as large as it fits; None where the typeface lacks it."""
        if point not in self.face.points:
            return None
        drawn = self._draw(point)
        if drawn is None or (self.missing is not None and np.array_equal(drawn, self.missing)):
            return None
        return drawn

    def _draw(self, point: int) -> Pixels | None:
        canvas = Image.new("L", (3 * _DRAWN, 3 * _DRAWN))
        try:
            ImageDraw.Draw(canvas).text((_DRAWN, _DRAWN), chr(point), fill=255, font=self.font)
        except OSError:  # some fonts have glyphs with instructions that FreeType refuses
            return None
        box = canvas.getbbox()
        if box is None:
            return None
        scale = _INK / max(box[2] - box[0], box[3] - box[1])
        width, height = (max(1, round(scale * (box[k + 2] - box[k]))) for k in (0, 1))
        ink = canvas.resize((width, height), Image.Resampling.LANCZOS, box=box)
        image = Image.new("L", (SIZE, SIZE))
        image.paste(ink, ((SIZE - width) // 2, (SIZE - height) // 2))
        return np.asarray(255 - np.asarray(image), dtype=np.uint8)


def _most_different(faces: Sequence[Face], points: Sequence[int], wanted: int) -> list[Face]:
    """Typefaces, each the farthest from those before it; the first is the nearest to all.

    Their distance is 1 less the cosine of the blurred images, a mean over characters.
    """
    images = np.zeros((len(faces), len(points), (SIZE // 3) ** 2), dtype=np.float32)
    for f, face in enumerate(tqdm(faces, desc="comparing typefaces", unit="typeface", disable=None, leave=False)):
        pen = _Pen(face)
        for p, point in enumerate(points):
            drawn = pen.draw(point)
            if drawn is not None:
                blurred = 255.0 - drawn.reshape(SIZE // 3, 3, SIZE // 3, 3).mean(axis=(1, 3)).ravel()
                images[f, p] = blurred / np.linalg.norm(blurred)
    sound = np.flatnonzero(images.any(axis=2).mean(axis=1) >= 0.9)  # the others lack what they say they have
    if len(sound) < wanted:
        raise ValueError(f"{wanted} typefaces are wanted, and {len(sound)} can be drawn; install more fonts")
    images = images[sound]
    distance = 1 - np.einsum("fpx,gpx->fg", images, images) / len(points)
    chosen = [int(distance.sum(axis=1).argmin())]
    while len(chosen) < wanted:
        nearest = distance[:, chosen].min(axis=1)
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    return [faces[sound[k]] for k in chosen]


def _draw_classes(faces: Sequence[Face], points: Sequence[int], train: int, test: int, least: int) -> Glyphs:
    """The first characters of which there are enough renderings."""
    drawn: list[dict[bytes, int]] = [{} for _ in points]  # a character's renderings, with their typefaces
    for f, face in enumerate(tqdm(faces, desc="rendering", unit="typeface", disable=None)):
        pen = _Pen(face)
        images = [pen.draw(point) for point in points]
        keys = [None if image is None else image.tobytes() for image in images]
        often = Counter(keys)
        for p, key in enumerate(keys):
            if key is not None and often[key] == 1:
                drawn[p].setdefault(key, f)
    enough = [p for p in range(len(points)) if len(drawn[p]) >= least][: train + test]
    if len(enough) < train + test:
        raise ValueError(
            f"{train + test} characters are wanted, and {len(enough)} have {least} renderings that differ in these "
            f"{len(faces)} typefaces; ask for fewer characters or renderings"
        )
    labels = np.repeat(np.arange(len(enough)), [len(drawn[p]) for p in enough])
    return Glyphs(
        np.frombuffer(b"".join(key for p in enough for key in drawn[p]), dtype=np.uint8).reshape(-1, SIZE, SIZE),
        labels,
        np.array([f for p in enough for f in drawn[p].values()], dtype=np.int64),
        np.array([chr(points[p]) for p in enough]),
        train,
    )


def _about(face: Face, renderings: int) -> dict[str, Any]:
    return {
        "name": face.name,
        "version": face.version,
        "file": face.path.name,
        "number": face.number,
        "sha256": hashlib.sha256(face.path.read_bytes()).hexdigest(),
        "renderings": renderings,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Render as the command line says."""
    parser = Parser(
        prog="python -m benchmarks.retrieval.glyphs",
        description="Render 1,400 Han characters in 36 typefaces, as images to retrieve.",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # a line that is broken cannot be copied
        epilog="fonts, of Debian 12:\n"
        "  apt-get install -y --no-install-recommends $(python -m benchmarks.retrieval.glyphs --packages)\n"
        "then: python -m benchmarks.retrieval --dataset glyphs --root DIR --base smoothap",
    )
    parser.add_argument("folder", type=Path, nargs="?", metavar="DIR", help="for glyphs.npz and fonts.json")
    parser.add_argument("--packages", action="store_true", help="print the names of the packages instead")
    parser.add_argument("--fonts", type=Path, default=FONTS, metavar="DIR", help=f"font files (default: {FONTS})")
    options = parser.parse_args(arguments)
    if (options.folder is None) != options.packages:
        parser.error("give either a folder or --packages")

    def work() -> None:
        if options.packages:
            print(*_packages())
            return
        glyphs = render(options.folder, options.fonts)
        sizes = np.bincount(glyphs.labels)
        print(
            f"rendered {len(sizes):,} characters in {int(glyphs.typefaces.max()) + 1} typefaces, {sizes.min()} to "
            f"{sizes.max()} times each: {len(glyphs.labels):,} images in {printable(options.folder)}"
        )

    run(parser, parser.prog, work)


def _packages() -> list[str]:
    return [f"fonts-{name}" for name in PACKAGES]


if __name__ == "__main__":
    main()
