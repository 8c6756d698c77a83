"""One call of the loss or of the counts: run on the machine, and held to the oracles of tests/support."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from support.batches import margins
from support.count_oracle import CountCall, Tables
from support.oracle import Array, Oracle, Result, compare, compare_sides, tensor_core_drift

from ptx_machine.kernels import SHIPPED, Kernels, Knobs, kernels

FORMATS = ("fp32", "fp32 in fp16", "fp16", "fp16 in fp32", "bf16")  # of x, and where it is not the obvious one, of x^


@dataclass(frozen=True)
class LossProblem:
    """Embeddings in the format that the kernels get; one fp16 product or fp32 accuracy."""

    x: Array
    y: Array
    ref_x: Array | None = None
    ref_y: Array | None = None
    row_offset: int | None = None
    margin: tuple[float, float] = (0.9, 0.5)
    weight: tuple[float, float] = (1.0, 1.0)
    fp16: bool = False

    def run(self, knobs: Knobs, *, on: Kernels | None = None, **options: bool) -> Result:
        """`options`: penalties, grad_x, grad_ref."""
        loss, dx, dref, penalty, count = (on or kernels()).loss(
            self.x,
            self.y,
            self.ref_x,
            self.ref_y,
            row_offset=self.row_offset,
            margin=self.margin,
            weight=self.weight,
            fp16=self.fp16,
            knobs=knobs,
            **options,
        )
        return Result(loss, count, penalty / np.maximum(count, 1), dx, dref)

    def oracle(self) -> Oracle:
        """With fp16 the kernels round x^ to halves and are exact from there on: so does the oracle."""
        reference = () if self.ref_x is None else (values(self.ref_x), self.ref_y)
        oracle = Oracle(
            values(self.x),
            self.y,
            *reference,
            row_offset=self.row_offset,
            margin_plus=float(np.float32(self.margin[0])),
            margin_minus=float(np.float32(self.margin[1])),
            lambda_plus=self.weight[0],
            lambda_minus=self.weight[1],
        )
        if self.fp16:
            oracle.x_hat, oracle.ref_hat = (
                a.astype(np.float16).astype(np.float64) for a in (oracle.x_hat, oracle.ref_hat)
            )
            oracle.s = oracle.x_hat @ oracle.ref_hat.T
            oracle.gap = (oracle.margin[0] - oracle.s, oracle.s - oracle.margin[1])
        return oracle

    def at_share(self, share: float) -> "LossProblem":
        """The same with about `share` of the positives and of the negatives hard."""
        found = margins(self.oracle(), share)
        return replace(self, margin=(found["margin_plus"], found["margin_minus"]))

    def check(
        self,
        knobs: Knobs = SHIPPED,
        *,
        exact: bool = False,
        on: Kernels | None = None,
        **options: Any,
    ) -> Result:
        """Runs it and compares; where the machine cuts sums off, with what the oracle allows tensor cores."""
        result = self.run(knobs, on=on, **options)
        how = compare_sides if options.get("penalties") else compare
        how(result, self.oracle(), torch.float32, exact=exact, tensor_cores=knobs.truncated)
        return result


def problem_of(sets: Sequence[Array], **options: Any) -> LossProblem:
    """x, y and perhaps ref_x, ref_y."""
    x, y, *reference = sets
    ref_x, ref_y = reference or (None, None)
    return LossProblem(x=x, y=y, ref_x=ref_x, ref_y=ref_y, **options)


def crowd(columns: int) -> LossProblem:
    """Sparse tiles whose 64 hard pairs are all in the same 16 rows, so that a warp has more than its queue holds."""
    rng = np.random.default_rng(22)
    x, ref_x = (0.1 * rng.standard_normal((n, 40)) for n in (100, columns))
    x[:16, 0] += 3
    ref_x[np.arange(columns) % 128 < 4, 0] += 3
    sets = (x.astype(np.float32), columns + np.arange(100), ref_x.astype(np.float32), np.arange(columns))
    return problem_of(sets, margin=(0.9, 0.7))


def halves_of_tiles(upper: str, lower: str, side: int = 1) -> LossProblem:
    """Two tiles, in whose upper and lower 64 rows all, some, few or none of the pairs of a side are hard."""
    rng = np.random.default_rng(23)
    x, ref_x = (0.02 * rng.standard_normal((n, 20)) for n in (128, 256))
    ref_x[:, 0] += 1
    ref_x[::9, 1] += 1
    for half, kind in zip((x[:64], x[64:]), (upper, lower), strict=True):
        half[:, 0] += rng.choice([-1.0, 1.0], 64) if kind == "some" else 1.0 if kind == "all" else -1.0
        if kind == "few":
            half[7, :2] = 0, 1
    if side == 0:  # a positive is hard where a negative is not
        x = -x
    sets = (x.astype(np.float32), np.arange(128) * side, ref_x.astype(np.float32), np.arange(256) * side + 128 * side)
    return problem_of(sets, margin=(-0.5, 0.5))


def rounded_one_way(n: int, d: int, up: bool) -> Array:
    """Rows [N, D] alike, D a multiple of 64, whose halves are all too large, or all too small, by nearly 2^-11.

    The product of the high parts is then as far from the similarity, 1, as it can be: by 2^-10. In each 64 components
    63 are 1/8, times the root of 64 / D, and by 0.98 of half a unit of the last place from the half that they are
    rounded to; the last makes the length 1.
    """
    spacing = 2.0**-10
    part = np.full(64, (1 + (1 - 0.49 if up else 0.49) * spacing) / 8)
    part[-1] = np.sqrt(1 - (part[:-1] ** 2).sum())
    return np.tile(part, (n, d // 64))


def at_the_bound(side: int, violation: float, d: int = 64, n: int = 512) -> LossProblem:
    """Two classes of n / 2 rows: of `side` pairs of similarity 1, violated by that much, and none else near a margin.

    By the high parts alone, by which the screen goes, they are violated by up to 2^-10 less: their halves are too small
    for negatives, too large for positives. There are n such negatives, in the last column and the last row; or all
    positives, n (n / 2 - 1).
    """
    x = rounded_one_way(n, d, up=side == 0)
    x[n // 2 : n - side] *= -1  # the last is alike to all rows of the other class
    margin = (1 + violation, 3.0) if side == 0 else (-3.0, 1 - violation)
    return LossProblem(x.astype(np.float32), np.arange(n) // (n // 2), margin=margin)


def upper_halves() -> LossProblem:
    """Four tiles a side, in whose upper 64 rows half of the pairs are hard, and in the lower ones none."""
    x = np.random.default_rng(24).standard_normal((512, 200))
    x[np.arange(512) % 128 < 64] = 1
    return LossProblem(x.astype(np.float32), np.arange(512), margin=(0.9, 0.9))


def values(x: Array) -> Array:
    """Embeddings in fp64; bfloat16 comes as its bits."""
    exact = (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x
    return exact.astype(np.float64)


def stored(x: Array, form: str) -> Array:
    """fp64 embeddings in one of FORMATS."""
    if form.startswith("bf16"):
        return torch.from_numpy(x).to(torch.bfloat16).view(torch.uint16).numpy()
    return x.astype(np.float16 if form.startswith("fp16") else np.float32)


def one_product(form: str) -> bool:
    """Whether x^ is one half of `form`."""
    return form not in ("fp32", "fp16 in fp32")


@dataclass(frozen=True)
class CountsProblem(CountCall):
    """That of the count oracle."""

    def run(self, knobs: Knobs, *, on: Kernels | None = None, shared: tuple[int, int] | None = None) -> Tables:
        arguments = self.x, self.y, self.classes, self.thresholds, self.bits, knobs, self.ref_x, self.ref_y
        return (on or kernels()).counts(*arguments, shared)

    def check_on(
        self, knobs: Knobs = SHIPPED, *, on: Kernels | None = None, shared: tuple[int, int] | None = None
    ) -> Tables:
        """Runs it and compares; where the machine cuts sums off, with what that may change a similarity by."""
        tables = self.run(knobs, on=on, shared=shared)
        allowed = tensor_core_drift(self.x.shape[1]) if knobs.truncated else 0.0
        replace(self, near=self.near + allowed, exact=self.exact and not knobs.truncated).check(tables)
        return tables
