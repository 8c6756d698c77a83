"""One set of embeddings and labels, and ways to write it into files of every kind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas

from tcm_fused.thresholds.files import Labelled, load

N, D = 60, 8
RNG = np.random.default_rng(3)
Y = RNG.integers(7, size=N)
X = RNG.standard_normal((7, D))[Y] + RNG.standard_normal((N, D))
FRAME = pandas.DataFrame(X)
NAMED = pandas.DataFrame(X, columns=[f"c{k}" for k in range(D)])
TEXT = np.array([f'bird {c}, "blue"' for c in Y])
Write = Callable[[Path], Any]


def to_npy(array: Any) -> Write:
    return lambda path: np.save(path, np.asarray(array))


def text(content: str, encoding: str = "utf-8") -> Write:
    return lambda path: path.write_bytes(content.encode(encoding))


def rows(x: Any = X, separator: str = ",") -> str:
    return "".join(separator.join(repr(float(v)) for v in row) + "\n" for row in x)


def lines(values: Any) -> str:
    return "".join(f"{v}\n" for v in values)


def read(tmp_path: Path, x: tuple[str, Write], y: tuple[str, Write]) -> Labelled:
    (tmp_path / "x").mkdir(exist_ok=True)
    (tmp_path / "y").mkdir(exist_ok=True)
    for part, (name, write) in (("x", x), ("y", y)):
        write(tmp_path / part / name)
    return load(tmp_path / "x" / x[0], tmp_path / "y" / y[0])


NPY_X, NPY_Y = ("x.npy", to_npy(X)), ("y.npy", to_npy(Y))
TEXT_WITHOUT_COMMAS = np.array([f"bird {c}" for c in Y])
