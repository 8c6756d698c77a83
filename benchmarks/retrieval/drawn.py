"""Draws a folder of small images to try the retrieval experiment on: `python -m benchmarks.retrieval.drawn DIR`.

Each class is a glyph of its own, an irregular polygon with a hole, which its images show at random places, sizes and
turns, in random colours and under noise. Some classes are turned and squeezed more than others, so that one threshold
does not serve them all alike.
"""

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from tcm_fused.thresholds.outputs import clearing, part_name
from tcm_fused.thresholds.terminal import Parser, printable, run

SIZE = 40  # pixels of a side
_FINE = 3  # drawn larger, then reduced, for smooth edges


def draw_folder(folder: Path, classes: int, images: int, seed: int = 0) -> None:
    """`folder`/class_000/000.png and so on, which must not be there yet; it appears when all is drawn."""
    if os.path.lexists(folder):
        raise ValueError(f"{folder} is there already; give a folder that is not")
    part = folder.with_name(part_name())
    with clearing(lambda: shutil.rmtree(part, ignore_errors=True)):
        for c in range(classes):
            (part / f"class_{c:03d}").mkdir(parents=True)
            glyph = _Glyph(np.random.default_rng([seed, c]))
            for k in range(images):
                rng = np.random.default_rng([seed, c, k])
                glyph.draw(rng).save(part / f"class_{c:03d}" / f"{k:03d}.png")
        part.rename(folder)


class _Glyph:
    """The shape of a class, and how much its images differ."""

    def __init__(self, rng: np.random.Generator) -> None:
        corners = int(rng.integers(5, 9))
        angles = (np.arange(corners) + rng.uniform(-0.35, 0.35, corners)) * 2 * np.pi / corners
        radii = rng.uniform(0.35, 1, corners)
        self.outline = np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)
        self.hole = rng.uniform(-0.25, 0.25, 2)
        self.hole_radius = rng.uniform(0.1, 0.3)
        self.turn = rng.uniform(0.1, 1.2)  # radians either way
        self.squeeze = rng.uniform(0.05, 0.35)

    def draw(self, rng: np.random.Generator) -> Image.Image:
        side = SIZE * _FINE
        angle = rng.uniform(-self.turn, self.turn)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        scale = rng.uniform(0.3, 0.42) * side
        move = side / 2 + rng.uniform(-0.08, 0.08, 2) * side
        shape = turn @ np.diag([1, 1 - rng.uniform(0, self.squeeze)]) * scale
        background, ink = rng.uniform(0, 110, 3), rng.uniform(145, 255, 3)
        if rng.random() < 0.5:
            background, ink = ink, background
        paper, colour = (tuple(int(v) for v in c) for c in (background, ink))
        picture = Image.new("RGB", (side, side), paper)
        pen = ImageDraw.Draw(picture)
        pen.polygon([(float(x), float(y)) for x, y in self.outline @ shape.T + move], fill=colour)
        x, y = shape @ self.hole + move
        radius = float(self.hole_radius * scale)
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=paper)
        pixels = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float64)
        noisy = pixels + rng.normal(0, 14, pixels.shape)
        return Image.fromarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw as the command line says."""
    parser = Parser(
        prog="python -m benchmarks.retrieval.drawn",
        description=f"Draw images of {SIZE} x {SIZE} pixels, a folder a class, to try the retrieval experiment on.",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # a line that is broken cannot be copied
        epilog="then: python -m benchmarks.retrieval --dataset folder --root DIR --backbone small --base smoothap",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="made by this; must not be there yet")
    parser.add_argument("--classes", type=int, default=48, help="default: 48")
    parser.add_argument("--images", type=int, default=40, help="of each class (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn (default: 0)")
    options = parser.parse_args(arguments)
    if min(options.classes, options.images, options.seed + 1) < 1:
        parser.error("--classes and --images must be at least 1, --seed at least 0")

    def work() -> None:
        draw_folder(options.folder, options.classes, options.images, options.seed)
        print(f"drew {options.classes} classes of {options.images} images in {printable(options.folder)}")

    run(parser, parser.prog, work)


if __name__ == "__main__":
    main()
