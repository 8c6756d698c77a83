"""Fonts that a test draws itself, since machines have what fonts they have."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

MISSING = 10**6  # the shape of what stands for a character that a font lacks


def draw_font(path: Path, name: str, shapes: Mapping[int, int | None], seed: int) -> None:
    """A font whose character `point` has the shape of that number, or none at all.

    A shape is a polygon of random corners, others in each font by `seed`.
    """
    numbers = {".notdef": MISSING} | {f"g{point}": shape for point, shape in shapes.items()}
    order = list(numbers)
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(order)
    builder.setupCharacterMap({point: f"g{point}" for point in shapes})
    builder.setupGlyf({glyph: _shape(numbers[glyph], seed) for glyph in order})
    builder.setupHorizontalMetrics({glyph: (1000, 0) for glyph in order})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": name, "styleName": "Regular", "fullName": name, "version": f"Version {seed}"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


def _shape(number: int | None, seed: int) -> object:
    pen = TTGlyphPen(None)
    if number is not None:
        rng = np.random.default_rng([seed, number])
        angles = np.sort(rng.uniform(0, 2 * np.pi, 7))
        radii = rng.uniform(120, 480, 7)
        corners = [(int(500 + r * np.cos(a)), int(300 + r * np.sin(a))) for a, r in zip(angles, radii, strict=True)]
        pen.moveTo(corners[0])
        for corner in corners[1:]:
            pen.lineTo(corner)
        pen.closePath()
    return pen.glyph()


def draw_fonts(folder: Path, fonts: int, characters: range) -> None:
    """Fonts that have all of the characters, each drawn in its own way."""
    folder.mkdir(parents=True)
    for k in range(fonts):
        draw_font(folder / f"font{k:02d}.ttf", f"Font {k:02d}", {point: point for point in characters}, seed=k)
