"""Characters rendered in fonts that the tests draw: each rendering counts once, and none is of a missing character."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.fonts import MISSING, draw_font, draw_fonts

from benchmarks.retrieval import glyphs
from benchmarks.retrieval.datasets import load
from benchmarks.retrieval.glyphs import SIZE, render

LETTERS = range(0x41, 0x59)  # A to X


def rendered(tmp_path: Path, **other: int) -> dict[tuple[str, str], bytes]:
    """Images by font and character, of `tmp_path`/fonts."""
    numbers = {"train": 14, "test": 10, "typefaces": 6, "least": 5} | other
    found = render(tmp_path / "images", tmp_path / "fonts", LETTERS, **numbers)
    names = [about["name"] for about in json.loads((tmp_path / "images/fonts.json").read_text())["typefaces"]]
    return {
        (names[f], str(found.characters[c])): image.tobytes()
        for image, c, f in zip(found.pixels, found.labels, found.typefaces, strict=True)
    }


def test_every_character_in_every_font(tmp_path: Path) -> None:
    draw_fonts(tmp_path / "fonts", 6, LETTERS)
    images = rendered(tmp_path)
    assert len(images) == len(set(images.values())) == 6 * 24
    for image in images.values():
        ink = np.frombuffer(image, np.uint8).reshape(SIZE, SIZE) < 255
        rows, columns = (np.flatnonzero(ink.any(axis=axis)) for axis in (1, 0))
        extents = sorted((int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1))
        assert 29 <= extents[1] <= 30  # as large as it fits, in the middle
        assert abs(rows[0] + rows[-1] - SIZE + 1) <= 2 and abs(columns[0] + columns[-1] - SIZE + 1) <= 2

    split = load("glyphs", tmp_path / "images")
    assert [part.counts() for part in split[:2]] == [[84, 14], [60, 10]]
    assert sorted([*split.train.classes, *split.test.classes]) == [chr(point) for point in LETTERS]
    assert {split.test.read(k).tobytes() for k in range(60)} == {
        image for (_, letter), image in images.items() if letter in split.test.classes
    }
    assert rendered(tmp_path) == images  # the same again
    assert load("glyphs", tmp_path / "images").fingerprint == split.fingerprint


def test_a_rendering_counts_once(tmp_path: Path) -> None:
    """Blank, drawn as a missing character, shared by two characters, and as in another font: left out."""
    draw_fonts(tmp_path / "fonts", 5, LETTERS)
    a, b, c, d, *rest = LETTERS
    shapes: dict[int, int | None] = {a: None, b: MISSING, c: 7, d: 7} | {point: point for point in rest}
    draw_font(tmp_path / "fonts/odd.ttf", "Odd", shapes, seed=50)
    images = rendered(tmp_path)
    assert {letter for name, letter in images if name == "Odd"} == {chr(point) for point in rest}
    assert len(images) == 5 * 24 + 20

    draw_font(tmp_path / "fonts/odd.ttf", "Odd", {point: point for point in LETTERS}, seed=4)  # as the fifth is
    assert len(rendered(tmp_path)) == 5 * 24


def test_fonts_are_chosen_to_differ(tmp_path: Path) -> None:
    """Of copies under other names one is taken; versions are told; what is no font is passed over."""
    draw_fonts(tmp_path / "fonts", 6, LETTERS)
    for copy in range(3):
        draw_font(tmp_path / f"fonts/copy{copy}.ttf", f"Copy {copy}", {p: p for p in LETTERS}, seed=2)
    draw_font(tmp_path / "fonts/few.ttf", "Few", {LETTERS[0]: 1}, seed=60)
    (tmp_path / "fonts/none.ttf").write_bytes(b"no font")
    assert len(rendered(tmp_path)) == 6 * 24
    about = json.loads((tmp_path / "images/fonts.json").read_text())
    assert about["found"] == 9
    assert sorted(face["version"] for face in about["typefaces"]) == [f"Version {k}" for k in range(6)]
    assert all(face["renderings"] == 24 for face in about["typefaces"])


def test_too_few_fonts_or_characters(tmp_path: Path) -> None:
    draw_fonts(tmp_path / "fonts", 6, LETTERS)
    with pytest.raises(ValueError, match=r"7 typefaces are wanted, and 6 are found .*apt-get install"):
        rendered(tmp_path, typefaces=7)
    with pytest.raises(ValueError, match="25 characters are wanted, and 24 have 5 renderings"):
        rendered(tmp_path, train=15)
    assert not (tmp_path / "images").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        glyphs.main([str(tmp_path / "images"), "--fonts", str(tmp_path)])
    assert left.value.code == 2
    assert "36 typefaces are wanted, and 0 are found" in capsys.readouterr().err
    glyphs.main(["--packages"])
    assert "fonts-noto-cjk" in capsys.readouterr().out.split()
    for wrong in ([], [str(tmp_path), "--packages"]):
        with pytest.raises(SystemExit) as left:
            glyphs.main(wrong)
        assert left.value.code == 2
        assert "either a folder or --packages" in capsys.readouterr().err


def test_missing_or_damaged_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no .*glyphs\.npz.*\n(.*\n)*.*benchmarks\.retrieval\.glyphs"):
        load("glyphs", tmp_path)
    (tmp_path / "glyphs.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"glyphs\.npz is damaged"):
        load("glyphs", tmp_path)
