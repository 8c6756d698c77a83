"""`Threshold`: found by `calibrate`, kept in a file, and applied."""

import math
import numbers
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tcm_fused.arguments import check_number
from tcm_fused.backends.numerics import unit_and_norms, wide_dtype
from tcm_fused.thresholds.rates import as_distance, plain
from tcm_fused.thresholds.saved import Kind, load, save
from tcm_fused.thresholds.sets import as_embeddings

_KIND = Kind("tcm_fused.threshold", "threshold", "calibrate --save and Threshold.save")
COSINE, SCORE = "cosine", "score"


@dataclass(frozen=True, repr=False)
class Threshold:
    """A pair is accepted if its cosine similarity is at least `similarity`.

    Numbers in files have all their digits, so a threshold decides after `load` as it did before `save`.

    Raises:
        TypeError, ValueError: the similarity is no number, or not from -1 to 1; or another field cannot be.

    Example:
        >>> Threshold(0.6).accepts([0.59, 0.6]).tolist()
        [False, True]
        >>> Threshold(0.6).accepts([1.0, 0.0], [3.0, 4.0])
        True
    """

    similarity: float
    far: float = math.nan  # false accept rate on the data that it was found on
    frr: float = math.nan  # false reject rate there
    target: dict[str, float] = field(default_factory=dict, hash=False)  # as asked for, such as {"far": 0.001}
    columns: int | None = None  # D of the embeddings that it was found on
    pairs: tuple[int, int] | None = None  # positive and negative pairs there
    metric: str = COSINE  # or "score": of trials, on whatever scale their scores have

    def __post_init__(self) -> None:
        check_number("threshold", self.similarity)
        if isinstance(self.similarity, bool):
            raise TypeError("threshold must be a number, got bool")
        if self.metric not in (COSINE, SCORE):
            raise ValueError(f"metric must be 'cosine' or 'score', got {self.metric!r}")
        if self.metric == COSINE and not -1 <= self.similarity <= 1:
            raise ValueError(
                f"threshold must be a cosine similarity, from -1 to 1, got {self.similarity}; of a Euclidean distance "
                "d of unit vectors it is 1 - d^2 / 2, of a cosine distance d it is 1 - d"
            )
        pairs = self.pairs
        if pairs is not None:
            if not isinstance(pairs, (tuple, list)) or len(pairs) != 2:
                raise TypeError(f"pairs must be two numbers, of positive and negative pairs, got {pairs!r}")
            pairs = _whole("pairs", pairs[0], 0), _whole("pairs", pairs[1], 0)
        found = {
            "similarity": float(self.similarity),
            "far": _rate("far", self.far),
            "frr": _rate("frr", self.frr),
            "target": _target(self.target),
            "columns": None if self.columns is None else _whole("columns", self.columns, 1),
            "pairs": pairs,
        }
        for name, value in found.items():
            object.__setattr__(self, name, value)

    @property
    def distance(self) -> float:
        """The Euclidean distance sqrt(2 - 2 s) of unit vectors: pairs up to it are accepted. NaN of a score."""
        return float(as_distance(np.array(self.similarity))) if self.metric == COSINE else math.nan

    @property
    def cosine_distance(self) -> float:
        """1 - s: pairs up to it are accepted. NaN of a score."""
        return 1 - self.similarity if self.metric == COSINE else math.nan

    def accepts(self, a: Any, b: Any = None) -> Any:
        """Whether pairs are accepted, by their similarities, or (with `b`) by their embeddings.

        Args:
            a: similarities of any shape, or embeddings [D] or [N, D] of any scale.
            b: embeddings [D] or [N, D], row by row those that `a` is compared with; one against many also.

        Returns:
            bool for one pair; else a tensor of bool where `a` is a tensor, and an array where it is none.

        Raises:
            TypeError, ValueError: they are no numbers, not finite, or of another dimension than the threshold's.
        """
        s = as_scores(a, self.metric) if b is None else self._similarity(a, b)
        found = s >= self.above(s.dtype)
        if found.ndim == 0:
            return bool(found)
        return found if isinstance(a, Tensor) else found.numpy()

    def above(self, dtype: torch.dtype) -> float:
        """The lowest number of a dtype that is accepted: a comparison in that dtype decides as in all digits."""
        if self.metric == COSINE and self.similarity <= -1:
            return -2.0  # of opposite rows rounding may lead below -1, and at -1 all are accepted
        if dtype == torch.float64:
            return self.similarity
        near = torch.tensor(self.similarity, dtype=dtype, device="cpu")
        is_lower = float(near) < self.similarity
        return float(torch.nextafter(near, torch.full_like(near, torch.inf)) if is_lower else near)

    def check_columns(self, columns: int) -> None:
        """ValueError unless it is one for embeddings of so many columns."""
        if self.metric != COSINE:
            raise ValueError("this threshold is one on scores of trials, and not on cosine similarity of embeddings")
        if self.columns is not None and self.columns != columns:
            raise ValueError(
                f"this threshold is for embeddings of {self.columns} columns, got {columns}: it is another model's"
            )

    def _similarity(self, a: Any, b: Any) -> Tensor:
        rows = [_rows(name, value) for name, value in (("a", a), ("b", b))]
        first, second = (unit_rows(x.reshape(-1, x.shape[-1])).reshape(x.shape) for x in rows)
        if first.shape[-1] != second.shape[-1] or (first.ndim == second.ndim == 2 and len(first) != len(second)):
            raise ValueError(f"a and b must be pairs of rows, got shapes {list(first.shape)} and {list(second.shape)}")
        self.check_columns(first.shape[-1])
        return (first * second.to(first.device)).sum(-1)

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON knows."""
        similar = {"distance": self.distance, "cosine_distance": self.cosine_distance} if self.metric == COSINE else {}
        return {
            "similarity": self.similarity,
            **similar,
            "far": plain(self.far),
            "frr": plain(self.frr),
            "target": dict(self.target),
            "columns": self.columns,
            "pairs": None if self.pairs is None else list(self.pairs),
            "metric": self.metric,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON: whole, or not at all.

        Raises:
            ValueError: it cannot be written there; the message says why.
        """
        save(path, _KIND, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Threshold":
        """One that `save` wrote.

        Raises:
            ValueError: there is no such file, or it holds something else; the message names it.
        """
        return load(path, _KIND, lambda content: cls(**_fields(content)))

    def __repr__(self) -> str:
        found = f" for {_asked(self.target)}" if self.target else ""
        rates = "" if math.isnan(self.far) else f", FAR {self.far:.4g}, FRR {self.frr:.4g}"
        return f"Threshold({self.metric} {self.similarity!r}{found}{rates})"


def as_threshold(value: Any) -> Threshold:
    """A threshold of a number, or that of a result which has one; one stays."""
    value = getattr(value, "threshold", value)
    return value if isinstance(value, Threshold) else Threshold(value)


def _asked(target: dict[str, float]) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in target.items())


def _fields(content: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `Threshold` in a file, which must agree with all else that is in it."""
    pairs = content["pairs"]
    found = {
        **{name: content[name] for name in ("similarity", "metric", "target", "columns")},
        **{name: math.nan if content[name] is None else content[name] for name in ("far", "frr")},
        "pairs": tuple(pairs) if isinstance(pairs, list) else pairs,
    }
    means = Threshold(**found)
    for name in ("distance", "cosine_distance"):
        if name not in content:
            continue
        told, value = content[name], getattr(means, name)
        if means.metric != COSINE:
            raise ValueError(f"it has a {name}, but metric is {means.metric!r}: a score has none")
        if type(told) not in (int, float) or not abs(told - value) <= 1e-9:
            raise ValueError(
                f"{name} is {told!r}, but that of similarity {means.similarity!r} is {value!r}; leave it out"
            )
    return found


def _rate(name: str, value: Any) -> float:
    """NaN, or from 0 to 1."""
    if isinstance(value, (float, np.floating)) and math.isnan(value):
        return math.nan
    check_number(name, value, least=0.0)
    if isinstance(value, bool) or value > 1:
        raise ValueError(f"{name} must lie from 0 to 1, or be NaN if it is not known, got {value}")
    return float(value)


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be whole numbers, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def _target(target: Any) -> dict[str, float]:
    """Names with finite numbers, of Python's own types, which JSON knows."""
    if not isinstance(target, dict) or not all(isinstance(name, str) for name in target):
        raise TypeError(f"target must be a dict of numbers by name, such as {{'far': 0.001}}, got {target!r}")
    for name, value in target.items():
        check_number(f"target[{name!r}]", value)
    return {name: bool(value) if isinstance(value, bool) else float(value) for name, value in target.items()}


def unit_rows(x: Tensor) -> Tensor:
    """x / |x| [N, D] in float64 where the device has it, with no overflow on the way; a zero row stays."""
    wide = x.to(torch.promote_types(x.dtype, wide_dtype(x.device)))
    return unit_and_norms(wide, x.new_ones(len(x), dtype=torch.bool))[0]


def check_cosines(name: str, values: Tensor, rounding: float = 1e-5) -> Tensor:
    """Cosine similarities, of which `rounding` may lead a little beyond 1, cut to -1 to 1.

    Raises:
        ValueError: one lies further out: it is on another scale.
    """
    most = float(values.abs().max()) if values.numel() else 0.0
    if most > 1 + rounding:
        raise ValueError(
            f"{name} must be cosine similarities, from -1 to 1, got {most:g} in size; of a percentage p it is "
            "p / 100, of a Euclidean distance d of unit vectors 1 - d^2 / 2, of a cosine distance d it is 1 - d"
        )
    return values.clamp(-1, 1)


def as_scores(values: Any, metric: str = COSINE) -> Tensor:
    """Similarities of any shape, float32 or float64: cosine ones, or scores on whatever scale.

    Raises:
        TypeError, ValueError: they are no numbers, not finite, or not on the scale.
    """
    found = _numbers("similarities", values)
    if not bool(torch.isfinite(found).all()):
        raise ValueError("similarities must be finite, but one is NaN or infinity")
    return check_cosines("similarities", found, _rounding(values)) if metric == COSINE else found


def _rounding(values: Any) -> float:
    """By which products of unit vectors may exceed 1 in the dtype that they came in."""
    dtype = values.dtype if isinstance(values, Tensor) else torch.from_numpy(np.asarray(values)).dtype
    return max(1e-5, 4 * torch.finfo(dtype).eps) if dtype.is_floating_point else 0.0


def _numbers(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        if value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} must be numbers, got {value.dtype}")
        wide = value.dtype in (torch.float32, torch.float64)
        dtype = torch.float32 if value.is_floating_point() else wide_dtype(value.device)
        return value.detach() if wide else value.detach().to(dtype)
    try:
        found = np.asarray(value)
        if found.dtype.kind not in "fiu":  # NumPy would make numbers of text and truth values
            raise TypeError(f"they are {found.dtype}")
        return torch.from_numpy(found.astype(np.float64))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be numbers, got {type(value).__name__}: {error}") from error


def _rows(name: str, value: Any) -> Tensor:
    one = np.ndim(value) == 1 if not isinstance(value, Tensor) else value.ndim == 1
    x = as_embeddings(name, value if isinstance(value, Tensor) else np.asarray(value)).detach()
    if x.ndim != (1 if one else 2):
        raise ValueError(f"{name} must be an embedding [D] or several [N, D], got shape {list(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name} must be finite, but it holds NaN or infinity")
    return x
