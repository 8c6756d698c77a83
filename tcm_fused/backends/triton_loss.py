"""The loss in Triton: the operators `tcm_fused::loss_triton` and `tcm_fused::penalties_triton`, for any GPU that Triton
knows and without a compiler.

How a call goes (`launch`):

1. Sort rows and columns by label, those that take no part last, and store them as unit vectors X^ in fp16: once, or for
   fp32 accuracy as a high and a low part, x^ = high + low / 2^11 (`normalise`). A row's positives are then one range of
   columns, and most tiles need no look at labels.
2. Cut the rows into panels. For each panel:
   a. `similarity`: tiles of s = X^ X^T (the upper triangle where rows are columns); penalty, count and class of each
      tile and side: empty, mixed or full. A mixed tile writes its 0/1 mask, in fp16, which is exact.
   b. `lists`: the mixed and the full tiles of every row and every column of tiles.
   c. `masked_sum`: G_I += M X^_J and G_J += M^T X^_I over the mixed tiles only.
   d. `collect`: a full tile adds the sum of its unit vectors, from `tile_sums`.
3. `totals`: loss, counts and w = lambda / n. `project`: dL/dx = (g - (g . x^) x^) / |x| with g = w- G- - w+ G+. The
   gradients of the two penalties are two such, with w 1 and 0.

Margins and weights are read by the kernels from the memory of the device, so that a captured CUDA graph follows them.

The host never waits for the device, and every sum has one owner and a fixed order: two runs give the same bits.

Cost for N rows = columns and D components, in 16-bit products (three times that for fp32 accuracy): N^2 D flops for the
similarities, and 2 N^2 D more where every tile is mixed. The masks are written once and read twice, 6 bytes for two
ordered pairs that cost 6 D flops: at D = 512 that is 512 flops a byte, above the 180 to 300 that sm_80 to sm_100 need.
Launches are 6 a panel and about 20 besides. A panel's masks take `panel_bytes`, 4 bytes a pair, for the upper triangle
only. At N = 65,536 and D = 512 that is 10 panels on sm_90. The first has 4096 rows: 8192 similarity tiles for some 132
multiprocessors, 1024 sums of columns, and 64 sums of rows, which are split in 4. At 790 TFLOP/s its similarities take
0.35 ms and all its masked sums 0.7 ms, which leaves the host time for the next 6 launches.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tcm_fused.backends import triton_kernels as kernels
from tcm_fused.backends.numerics import EPS
from tcm_fused.backends.problem import Problem, Result

LONGEST = 2**31  # numbers that offsets of 32 bits reach
MOST = 2**30 - 256  # rows, of which two parts are counted in 32 bits
INTERPRETED = bool(triton.knobs.runtime.interpret)  # kernels run in NumPy, on CPU tensors


@dataclass(frozen=True)
class Config:
    """How the products are cut up on one architecture."""

    rows: int  # of a similarity tile, and of a masked sum
    columns: int  # of a similarity tile, a multiple of `rows`
    narrow: int  # columns of a piece of a tile that has labels or edges to look at
    step: int  # terms of a product at a time; D is padded to a multiple of it
    width: int  # components of a masked sum
    tma: bool  # operands by descriptor, else by pointer
    warps: int
    similarity_stages: int
    sum_stages: int
    panel_bytes: int = 2**30  # memory for the masks of a panel


# Registers and shared memory as ptxas reports them for Triton 3.7.1 (test_triton_aot.py holds the rows of sm_80,
# sm_90 and sm_100 to no spill and to the limits); nothing here is measured. A block of 8 warps may have 255 registers a
# thread. In a masked sum half of the stages are buffers: the others are on the way from the list to the address.
CONFIGS = {
    # 255 and 205 to 254 registers, 72 and 48 KiB, which sm_86, sm_89 and sm_120 have too. A step of 64 spills.
    "sm_80": Config(128, 256, 32, 32, 256, False, 8, similarity_stages=4, sum_stages=5),
    # 242 and 204 registers, 192 and 144 KiB of 227. Without the narrow pieces the similarity tile spills.
    "sm_90": Config(128, 256, 64, 64, 256, True, 8, similarity_stages=4, sum_stages=5),
    # 246 and 230 to 242 registers, 192 and 144 KiB; accumulators in tensor memory. Pieces of 64 spill in Triton 3.6.
    "sm_100": Config(128, 256, 32, 64, 256, True, 8, similarity_stages=4, sum_stages=5),
    # ROCm, and GPUs older than sm_80: 64 KiB of shared memory hold two stages.
    "other": Config(128, 128, 32, 32, 128, False, 8, similarity_stages=2, sum_stages=2),
    # Small, so that small tests have many tiles and panels.
    "interpreter": Config(32, 64, 32, 32, 32, True, 1, 1, 1, panel_bytes=2**16),
}


@cache
def device_of(device: torch.device) -> tuple[str, int]:
    """The device's row of CONFIGS and its number of multiprocessors."""
    if device.type == "cpu":
        return "interpreter", 4
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None or properties.major < 8:
        return "other", properties.multi_processor_count
    # Settings for sm_80 run on every later architecture; descriptors and their tile sizes are for these two.
    name = {9: "sm_90", 10: "sm_100"}.get(properties.major, "sm_80")
    return name, properties.multi_processor_count


@dataclass
class Embeddings:
    """Rows or columns, sorted by label, with the sums for their gradient."""

    x: Tensor  # [N, D] as given
    key: Tensor  # [N] sorted labels, with the sign bit flipped: those that take no part are the largest
    order: Tensor  # [N] row of x that sorted row r is
    valid: Tensor  # [] int32, rows that take part
    unit: Tensor  # [parts * padded, d] fp16
    norm: Tensor  # [2, padded] |x| as two factors, since it may be beyond float32: largest |component|, and the rest
    sums: Tensor  # [padded / tile rows, d] sums of x^
    g: Tensor | None  # [2, padded, d] masked sums over hard positives, hard negatives

    @property
    def padded(self) -> int:
        """Rows with the padding to whole tiles."""
        return self.norm.shape[1]


def run(problem: Problem) -> Result:
    """The operator, for embeddings of 16 or 32 bits."""
    check(problem)
    device = problem.x.device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        config, processors = device_of(device)
        return launch(CONFIGS[config], processors, problem)


def check(problem: Problem) -> None:
    """RuntimeError where kernels would read out of bounds: the operators may be called without `tcm_loss`."""
    x, y, ref_x, ref_y, row_offset, margins, weights, squared, *_ = problem
    name = f"tcm_fused::{'penalties' if weights is None else 'loss'}_triton"
    if squared:
        raise RuntimeError(f"{name}: there is no squared penalty")
    if (ref_x is None) != (ref_y is None):
        raise RuntimeError(f"{name}: give both ref_x and ref_y, or neither")
    for rows, labels in ((x, y), (ref_x, ref_y)):
        if rows is None or labels is None:
            continue
        if rows.dtype not in (torch.float16, torch.bfloat16, torch.float32) or rows.dtype != x.dtype:
            raise RuntimeError(f"{name}: embeddings must be float16, bfloat16 or float32, and of one dtype")
        if labels.dtype != torch.int64:
            raise RuntimeError(f"{name}: labels must be int64")
        if rows.ndim != 2 or labels.shape != rows.shape[:1] or rows.shape[1:] != x.shape[1:] or x.shape[1] == 0:
            raise RuntimeError(f"{name}: embeddings must be [N, D] and [M, D], labels [N] and [M]")
        if rows.device != x.device or labels.device != x.device:
            raise RuntimeError(f"{name}: embeddings and labels must be on one device")
        if len(rows) > MOST:
            raise RuntimeError(f"{name}: {len(rows):,} embeddings are more than {MOST:,}; take them in several parts")
    last = 0 if ref_x is None else ref_x.shape[0] - x.shape[0]
    if row_offset is not None and not 0 <= row_offset <= last:
        raise RuntimeError(f"{name}: row_offset must put every row among the columns")
    for two in (margins,) if weights is None else (margins, weights):
        if two.shape != (2,) or two.dtype != torch.float64 or not two.is_contiguous():
            raise RuntimeError(f"{name}: margins and weights must be [2] float64, contiguous")
        if two.device.type != "cpu" and two.device != x.device:
            raise RuntimeError(f"{name}: margins and weights must be on the CPU or on the device of the embeddings")


def launch(config: Config, processors: int, problem: Problem) -> Result:
    """All steps of a call, of which everything was checked."""
    x, y, ref_x, ref_y, row_offset, margins, weights, _, fp16, grad_x, grad_ref, _ = problem
    parts = 1 if fp16 else 2
    symmetric = ref_x is None or ref_y is None
    rows = prepare(config, x, y, parts, grad_x)
    columns = rows if ref_x is None or ref_y is None else prepare(config, ref_x, ref_y, parts, grad_ref)
    margins = on_device(margins, x.device)
    walk = Walk(config, processors, rows, columns, parts, margins, symmetric, row_offset)
    walk.run()

    def new(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    penalty, count = new((2,), torch.float64), new((2,), torch.int64)
    loss = None if weights is None else new((), torch.float32)
    w = new((2, 2) if weights is None else (2,), torch.float32)
    checks = (rows.norm[1].sum(), columns.norm[1].sum())  # NaN if a row is not finite
    # More than 512 at a time spill on sm_80.
    kernels.totals[(1,)](
        walk.penalty, walk.count, *checks, loss, penalty, count, w,
        None if weights is None else on_device(weights, x.device), margins, walk.penalty.shape[1],
        BLOCK=512,
    )  # fmt: skip
    none = x.new_empty(0, dtype=torch.float32)
    return Result(
        loss,
        project(rows, w, 2.0 if symmetric else 1.0) if grad_x else none,
        project(columns, w, 1.0) if grad_ref and not symmetric else none.clone(),
        penalty,
        count,
    )


def on_device(numbers: Tensor, device: torch.device) -> Tensor:
    """[2] float64 on the device. Numbers from the CPU are filled in: a copy would wait, and break a graph's capture."""
    if numbers.device == device:
        return numbers
    plus, minus = numbers.tolist()
    filled = torch.full((2,), plus, dtype=torch.float64, device=device)
    filled[1:].fill_(minus)
    return filled


def prepare(config: Config, x: Tensor, y: Tensor, parts: int, gradient: bool) -> Embeddings:
    """Step 1."""
    n, d_given = x.shape
    padded = max(triton.cdiv(n, config.columns), 1) * config.columns
    d = triton.cdiv(d_given, config.step) * config.step
    key, order = torch.sort(y ^ torch.iinfo(torch.int64).min, stable=True)
    new = x.new_empty
    e = Embeddings(
        x=x,
        key=key,
        order=order,
        valid=(key < 0).sum(dtype=torch.int32),
        unit=new((parts * padded, d), dtype=torch.float16),
        norm=new((2, padded), dtype=torch.float32),
        sums=new((padded // config.rows, d), dtype=torch.float32),
        g=x.new_zeros((2, padded, d), dtype=torch.float32) if gradient else None,
    )
    block = min(triton.next_power_of_2(d), 1024)
    height = max(1, min(2048 // block, config.rows))
    kernels.normalise[(padded // height,)](
        x, order, e.valid, e.unit, e.norm, d_given, padded, d, *x.stride(), EPSILON=EPS, PARTS=parts, ROWS=height,
        BLOCK=block,
    )  # fmt: skip
    width = min(block, 64)
    kernels.tile_sums[(triton.cdiv(d, width) * (padded // config.rows),)](
        e.unit, e.sums, padded, d, PARTS=parts, TILE=config.rows, BLOCK=width
    )
    return e


def project(e: Embeddings, weight: Tensor, factor: float) -> Tensor:
    """dL/dx [N, D] from the masked sums and their weights [2]; with weights [2, 2] two such, [2, N, D]."""
    assert e.g is not None
    n, d = e.x.shape
    sides = weight.shape[:-1]
    out = e.x.new_empty((*sides, n, d), dtype=torch.float32)
    block = min(triton.next_power_of_2(e.g.shape[2]), 1024)
    height = max(1, min(1024 // block, 16))
    kernels.project[(triton.cdiv(n, height), sides.numel())](
        e.x, e.order, e.valid, e.norm, e.g, weight, out, n, d, e.padded, e.g.stride(0), e.g.shape[2], *e.x.stride(),
        factor, EPSILON=EPS, ROWS=height, BLOCK=block,
    )  # fmt: skip
    return out


class Walk:
    """Step 2: the panels of one call, with the sums of the loss by tile of rows."""

    def __init__(
        self,
        config: Config,
        processors: int,
        rows: Embeddings,
        columns: Embeddings,
        parts: int,
        margins: Tensor,
        symmetric: bool,
        row_offset: int | None,
    ) -> None:
        self.config, self.processors, self.parts = config, processors, parts
        # |s| is below 2, so that a margin beyond decides as 2 does; its share of the penalties is added at the end, in
        # fp64, since the sum of a tile could overflow.
        self.margins = margins.new_empty(2, dtype=torch.float32).copy_(margins.clamp(-2, 2))
        self.rows, self.columns, self.symmetric = rows, columns, symmetric
        self.d = rows.unit.shape[1]
        self.masked = rows.g is not None or columns.g is not None
        # Columns of each row's label.
        self.first = torch.searchsorted(columns.key, rows.key, out_int32=True)
        self.last = torch.searchsorted(columns.key, rows.key, out_int32=True, right=True)
        self.own, self.self_pairs = self.first, kernels.NO_SELF
        if symmetric:
            self.self_pairs = kernels.DIAGONAL
        elif row_offset is not None:
            self.self_pairs = kernels.TABLE
            position = torch.empty_like(columns.order, dtype=torch.int32)
            position[columns.order] = torch.arange(len(position), dtype=torch.int32, device=position.device)
            self.own = position[rows.order + row_offset]
        tiles = rows.padded // config.rows
        self.penalty = torch.empty((2, tiles), dtype=torch.float64, device=rows.x.device)
        self.count = torch.empty((2, tiles), dtype=torch.int64, device=rows.x.device)

    def run(self) -> None:
        """Work on all panels, one after the other."""
        panels = list(self.panels())
        pairs = max(height * width for _, height, _, width in panels)
        new = self.rows.unit.new_empty
        masks = new(2 * pairs if self.masked else 16)
        for panel in panels:
            self.one_panel(masks, *panel)

    def panels(self) -> Iterator[tuple[int, int, int, int]]:
        """First row and height, first column and width of each. Where rows are columns they grow taller as they narrow.

        A pair takes 4 bytes, 2 for each side. The masks get `panel_bytes`, or as much as one matrix of masked sums
        where that is more, or as much as one row of tiles takes (`columns` high): 1 KiB a column.
        """
        config = self.config
        pairs = max(config.panel_bytes // 4, self.rows.padded * self.d, self.columns.padded * self.d)
        row = 0
        while row < self.rows.padded:
            column = row if self.symmetric else 0
            width = self.columns.padded - column
            height = min(max(pairs // width // config.columns, 1) * config.columns, self.rows.padded - row)
            yield row, height, column, width
            row += height

    def one_panel(self, masks: Tensor, row: int, height: int, column: int, width: int) -> None:
        """Launch the kernels of one panel."""
        config, rows, columns = self.config, self.rows, self.columns
        i, j = height // config.rows, width // config.columns
        device = rows.x.device
        penalty = torch.empty((2, i, j), dtype=torch.float32, device=device)
        count, kind = torch.empty((2, 2, i, j), dtype=torch.int32, device=device)
        kernels.similarity[(i * j,)](
            self.operand(rows.unit, config.rows, config.step),
            self.operand(columns.unit, config.columns, config.step),
            self.operand(columns.unit, config.narrow, config.step),
            self.first, self.last, self.own, rows.valid, columns.valid, masks, penalty, count, kind, self.margins,
            row, column, rows.padded, columns.padded, self.d, i, j,
            PARTS=self.parts, SELF=self.self_pairs, MASKS=self.masked, ROWS=config.rows, COLUMNS=config.columns,
            NARROW=config.narrow, STEP=config.step, TMA=config.tma, num_warps=config.warps,
            num_stages=config.similarity_stages,
        )  # fmt: skip
        lists = torch.empty((2, 2 * i * j), dtype=torch.int32, device=device)
        sizes = torch.empty((2, 2, i + j), dtype=torch.int32, device=device)
        first_tile = row // config.rows
        kernels.lists[(i + j if self.masked else i, 2)](
            penalty, count, kind, self.penalty[:, first_tile:], self.count[:, first_tile:], lists, sizes, i, j,
            self.penalty.shape[1], SYMMETRIC=self.symmetric, RATIO=config.columns // config.rows, BLOCK=256,
        )  # fmt: skip
        if rows.g is not None:
            self.add(rows.g[:, row:], columns, column, masks, lists[0], sizes, i, j, transposed=False)
        g = rows.g if self.symmetric else columns.g
        if g is not None:
            self.add(g[:, column:], rows, row, masks, lists[1], sizes[:, :, i:], i, j, transposed=True)

    def add(
        self,
        g: Tensor,
        of: Embeddings,
        begin: int,
        masks: Tensor,
        lists: Tensor,
        sizes: Tensor,
        row_tiles: int,
        column_tiles: int,
        *,
        transposed: bool,
    ) -> None:
        """G += M X^, or M^T X^ if `transposed`: X^ from row `begin` of `of` on, G at the panel's first row."""
        config, d = self.config, self.d
        ratio = config.columns // config.rows
        out_tiles, length = (column_tiles * ratio, row_tiles) if transposed else (row_tiles, column_tiles)
        width = min(config.width, triton.next_power_of_2(d))
        blocks = triton.cdiv(d, width)
        # A panel has few tiles of rows, and each sums over all columns: split, they make up to two for each processor.
        splits = max(1, min(2 * self.processors // (out_tiles * blocks), length))
        parts = g
        if splits > 1:
            parts = g.new_empty((2, splits, out_tiles * config.rows, d))
        mask_rows, mask_width = row_tiles * config.rows, column_tiles * config.columns
        mask = masks[: 2 * mask_rows * mask_width].view(2 * mask_rows, mask_width)
        mask_block = (config.step, config.rows) if transposed else (config.rows, config.step)
        kernels.masked_sum[(blocks * out_tiles, 2 * splits)](
            self.operand(mask, *mask_block), self.operand(of.unit, config.step, width), lists, sizes, parts,
            parts.stride(-3), parts.stride(-2), mask_rows, mask_width, begin, of.padded, d, length, sizes.stride(1),
            splits, PARTS=self.parts, SPLIT=splits > 1, TRANSPOSED=transposed, ROWS=config.rows,
            COLUMNS=config.columns, STEP=config.step, WIDTH=width, TMA=config.tma,
            LONG=config.rows * mask_width >= LONGEST, num_warps=config.warps, num_stages=config.sum_stages,
        )  # fmt: skip
        kernels.collect[(triton.cdiv(d, min(width, 64)) * out_tiles, 2)](
            g, parts, of.sums[begin // config.rows :], lists, sizes[0], sizes[1], g.stride(0), d, length,
            sizes.stride(1), splits, SPLIT=splits > 1, TRANSPOSED=transposed, RATIO=ratio, ROWS=config.rows,
            WIDTH=min(width, 64), BLOCK=16,
        )  # fmt: skip

    def operand(self, matrix: Tensor, rows: int, columns: int) -> Any:
        """`matrix` as a kernel reads blocks [rows, columns] of it."""
        return TensorDescriptor.from_tensor(matrix, [rows, columns]) if self.config.tma else matrix
