"""The loss in Triton: the operators `tcm_fused::loss_triton` and `tcm_fused::penalties_triton`, for any GPU that Triton
knows and without a compiler.

How a call goes (`launch`):

1. Sort rows and columns by label, those that take no part last, and store them as unit vectors X^ in fp16: once, or for
   fp32 accuracy as a high and a low part, x^ = high + low / 2^11 (`normalise`). A row's positives are then one range of
   columns (`tile_sums` finds it), and most tiles need no look at labels.
2. Cut the rows into panels. For each panel:
   a. `similarity`: tiles of s = X^ X^T (the upper triangle where rows are columns); penalty, count and class of each
      tile and side: empty, mixed or full. A mixed tile writes its 0/1 mask, in fp16, which is exact.
      For fp32 accuracy a tile in which no pair can be hard is done with the product of the high parts.
   b. `lists`: the mixed and the full tiles of every row and every column of tiles.
   c. `masked_sum`: G_I += M X^_J and G_J += M^T X^_I over the mixed tiles only.
   d. `collect`: a full tile adds the sum of its unit vectors, from `tile_sums`.
3. `totals`: loss, counts and w = lambda / n. `project`: dL/dx = (g - (g . x^) x^) / |x| with g = w- G- - w+ G+. The
   gradients of the two penalties are two such, with w 1 and 0.

Margins and weights are read by the kernels from the memory of the device, so that a captured CUDA graph follows them;
numbers of the host come with the first launch, by their bits.

The host never waits for the device, and every sum has one owner and a fixed order: two runs give the same bits.

Cost for N rows = columns and D components, in 16-bit products (for fp32 accuracy three times that, where a tile has a
pair in question): N^2 D flops for the similarities, and 2 N^2 D more where every tile is mixed. The masks are written
once and read twice, 6 bytes for two ordered pairs that cost 6 D flops: at D = 512 that is 512 flops a byte, above the
180 to 300 that sm_80 to sm_100 need. Launches are 6 a panel and 4 besides (7 with a reference set), beside the sort.
Memory is taken piece by piece: PyTorch hands out a piece in the time in which it makes a view of a larger one. A
panel's masks take `panel_bytes`, 4 bytes a pair, for the upper triangle only. At N = 65,536 and D = 512 that is 10
panels on sm_90. The first has 4096 rows: 8192 similarity tiles for some 132 multiprocessors, 1024 sums of columns, and
64 sums of rows, which are split in 4. At 790 TFLOP/s its similarities take 0.35 ms and all its masked sums 0.7 ms,
which leaves the host time for the next 6 launches.
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

from tcm_fused.backends import triton_gradient as gradient
from tcm_fused.backends import triton_prologue as prologue
from tcm_fused.backends import triton_similarity as similarity
from tcm_fused.backends.numerics import EPS
from tcm_fused.backends.problem import Problem, Result

LONGEST = 2**31  # numbers that offsets of 32 bits reach
MOST = 2**30 - 256  # rows, of which two parts are counted in 32 bits
WIDEST = 2**22 - 64  # components: offsets within a block of 256 rows take 32 bits
MOST_NUMBERS = 2**42  # of all rows: a grid has up to 2^31 blocks, one for 128 rows and 64 components
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
    number: int  # of the set: 0 rows, 1 columns that are others
    labels: Tensor  # [N] sorted, the largest first: rows that take no part come last
    order: Tensor  # [N] row of x that sorted row r is
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
        if rows.numel() > MOST_NUMBERS:
            raise RuntimeError(
                f"{name}: {len(rows):,} embeddings of {rows.shape[1]:,} dimensions are more than {MOST_NUMBERS:,} "
                "numbers; take them in several parts"
            )
    if x.shape[1] > WIDEST:
        raise RuntimeError(f"{name}: embeddings of {x.shape[1]:,} dimensions; there may be {WIDEST:,}")
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
    new = x.new_empty
    state = x.new_zeros(prologue.STATE, dtype=torch.float64)
    rows = allocate(config, x, y, 0, parts, grad_x)
    columns = rows if ref_x is None or ref_y is None else allocate(config, ref_x, ref_y, 1, parts, grad_ref)
    symmetric = columns is rows
    self_pairs = prologue.DIAGONAL if symmetric else prologue.NO_SELF if row_offset is None else prologue.TABLE
    numbers = *on_device_or_bits(margins, x.device), *on_device_or_bits(weights, x.device)
    normalise(config, rows, parts, state, numbers)
    position = None if row_offset is None or symmetric else new(len(columns.order), dtype=torch.int32)
    if not symmetric:
        normalise(config, columns, parts, state, numbers)
        tile_sums(config, columns, parts, columns, None, position, 0, self_pairs)
    positives = new((3, len(rows.order)), dtype=torch.int32)
    tile_sums(config, rows, parts, columns, positives, position, row_offset or 0, self_pairs)
    walk = Walk(config, processors, rows, columns, parts, state, positives, self_pairs)
    walk.run()

    penalty, count = new((2,), dtype=torch.float64), new((2,), dtype=torch.int64)
    loss = None if weights is None else new((), dtype=torch.float32)
    # More than 512 at a time spill on sm_80.
    gradient.totals[(1,)](walk.panel_sums, state, loss, penalty, count, walk.panel_sums.shape[2], BLOCK=512)
    sides = 2 if weights is None else 1
    return Result(
        loss,
        project(rows, state, sides, 2.0 if symmetric else 1.0) if grad_x else new(0, dtype=torch.float32),
        project(columns, state, sides, 1.0) if grad_ref and not symmetric else new(0, dtype=torch.float32),
        penalty,
        count,
    )


def on_device_or_bits(numbers: Tensor | None, device: torch.device) -> tuple[Tensor | None, tuple[int, int]]:
    """[2] float64 where the device has them, or else their bits, which a launch can bring; None: zeros.

    A copy to the device would wait, and break the capture of a graph.
    """
    if numbers is not None and numbers.device == device:
        return numbers, (0, 0)
    plus, minus = (0, 0) if numbers is None else numbers.view(torch.int64).tolist()
    return None, (plus, minus)


def allocate(config: Config, x: Tensor, y: Tensor, number: int, parts: int, gradient: bool) -> Embeddings:
    """The sorted set, and memory for the rest."""
    n, d_given = x.shape
    padded = max(triton.cdiv(n, config.columns), 1) * config.columns
    d = triton.cdiv(d_given, config.step) * config.step
    new = x.new_empty
    labels, order = torch.sort(y, stable=True, descending=True)
    return Embeddings(
        x=x,
        number=number,
        labels=labels,
        order=order,
        unit=new((parts * padded, d), dtype=torch.float16),
        norm=new((2, padded), dtype=torch.float32),
        sums=new((padded // config.rows, d), dtype=torch.float32),
        g=x.new_zeros((2, padded, d), dtype=torch.float32) if gradient else None,
    )


def normalise(config: Config, e: Embeddings, parts: int, state: Tensor, numbers: tuple[Any, ...]) -> None:
    """x^ and |x|; with the rows, set 0, margins and weights."""
    margins, of_margins, weights, of_weights = numbers
    d = e.unit.shape[1]
    block = min(triton.next_power_of_2(d), 1024)
    height = max(1, min(2048 // block, config.rows))
    prologue.normalise[(e.padded // height,)](
        e.x, e.labels, e.order, e.unit, e.norm, state, margins, weights, *of_margins, *of_weights, *e.x.shape, e.padded,
        d, *e.x.stride(), SET=e.number, EPSILON=EPS, PARTS=parts, ROWS=height, BLOCK=block,
    )  # fmt: skip


def tile_sums(
    config: Config,
    e: Embeddings,
    parts: int,
    columns: Embeddings,
    positives: Tensor | None,
    position: Tensor | None,
    row_offset: int,
    self_pairs: Any,
) -> None:
    """Sums of x^ over tiles, and where a row's positives are among the columns."""
    d, m = e.unit.shape[1], len(columns.labels)
    width = min(triton.next_power_of_2(d), 64)
    prologue.tile_sums[(triton.cdiv(d, width) * (e.padded // config.rows),)](
        e.unit, e.sums, e.labels, columns.labels, positives, e.order, position, e.padded, d, len(e.labels), m,
        m.bit_length(), row_offset, SELF=self_pairs, PARTS=parts, TILE=config.rows, BLOCK=width,
    )  # fmt: skip


def project(e: Embeddings, state: Tensor, sides: int, factor: float) -> Tensor:
    """dL/dx [N, D] from the masked sums and their weights; with two sides the penalties' gradients, [2, N, D]."""
    assert e.g is not None
    n, d = e.x.shape
    out = e.x.new_empty((2, n, d) if sides == 2 else (n, d), dtype=torch.float32)
    block = min(triton.next_power_of_2(e.g.shape[2]), 1024)
    height = max(1, min(1024 // block, 16))
    gradient.project[(triton.cdiv(n, height), sides)](
        e.x, e.order, e.norm, e.g, state, out, n, d, e.padded, e.g.stride(0), e.g.shape[2], *e.x.stride(), factor,
        SET=e.number, EPSILON=EPS, ROWS=height, BLOCK=block,
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
        state: Tensor,
        positives: Tensor,
        self_pairs: Any,
    ) -> None:
        self.config, self.processors, self.parts = config, processors, parts
        self.rows, self.columns, self.symmetric = rows, columns, columns is rows
        self.state, self.positives, self.self_pairs = state, positives, self_pairs
        self.d = rows.unit.shape[1]
        self.masked = rows.g is not None or columns.g is not None
        # [penalties and counts, 2 sides, tiles of rows]
        self.panel_sums = state.new_empty((2, 2, rows.padded // config.rows))

    def run(self) -> None:
        """Work on all panels, one after the other."""
        panels = list(self.panels())
        new = self.rows.unit.new_empty
        pairs = max(height * width for _, height, _, width in panels)
        masks = new(2 * pairs if self.masked else 16)
        table = new(max(similarity.table_size(*self.tiles(*panel)) for panel in panels), dtype=torch.int32)
        for panel in panels:
            self.one_panel(masks, table, *panel)

    def tiles(self, _row: int, height: int, _column: int, width: int) -> tuple[int, int]:
        """Of a panel, from top to bottom and across."""
        return height // self.config.rows, width // self.config.columns

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

    def one_panel(self, masks: Tensor, table: Tensor, row: int, height: int, column: int, width: int) -> None:
        """Launch the kernels of one panel."""
        config, rows, columns = self.config, self.rows, self.columns
        i, j = self.tiles(row, height, column, width)
        similarity.similarity[(i * j,)](
            self.operand(rows.unit, config.rows, config.step),
            self.operand(columns.unit, config.columns, config.step),
            self.operand(columns.unit, config.narrow, config.step),
            self.positives, self.state, masks, table, len(rows.order), row, column, rows.padded, columns.padded, self.d,
            i, j, COLUMN_SET=columns.number, PARTS=self.parts, SELF=self.self_pairs, MASKS=self.masked,
            ROWS=config.rows, COLUMNS=config.columns, NARROW=config.narrow, STEP=config.step, TMA=config.tma,
            num_warps=config.warps, num_stages=config.similarity_stages,
        )  # fmt: skip
        similarity.lists[(i + j if self.masked else i, 2)](
            table, self.panel_sums, row // config.rows, i, j, self.panel_sums.shape[2], SYMMETRIC=self.symmetric,
            RATIO=config.columns // config.rows, BLOCK=256,
        )  # fmt: skip
        if rows.g is not None:
            self.add(rows.g, row, columns, column, masks, table, i, j, transposed=False)
        g = rows.g if self.symmetric else columns.g
        if g is not None:
            self.add(g, column, rows, row, masks, table, i, j, transposed=True)

    def add(
        self,
        g: Tensor,
        g_begin: int,
        of: Embeddings,
        begin: int,
        masks: Tensor,
        table: Tensor,
        row_tiles: int,
        column_tiles: int,
        *,
        transposed: bool,
    ) -> None:
        """G += M X^, or M^T X^ if `transposed`: to G from row `g_begin` on, X^ from row `begin` of `of` on."""
        config, d = self.config, self.d
        ratio = config.columns // config.rows
        out_tiles, length = (column_tiles * ratio, row_tiles) if transposed else (row_tiles, column_tiles)
        width = min(config.width, triton.next_power_of_2(d))
        blocks = triton.cdiv(d, width)
        # A panel has few tiles of rows, and each sums over all columns: split, they make up to two for each processor.
        splits = max(1, min(2 * self.processors // (out_tiles * blocks), length))
        parts, parts_begin = g, g_begin
        if splits > 1:
            parts, parts_begin = g.new_empty((2, splits, out_tiles * config.rows, d)), 0
        mask_rows, mask_width = row_tiles * config.rows, column_tiles * config.columns
        mask_block = (config.step, config.rows) if transposed else (config.rows, config.step)
        gradient.masked_sum[(blocks * out_tiles, 2 * splits)](
            self.operand(masks, *mask_block, (2 * mask_rows, mask_width)), self.operand(of.unit, config.step, width),
            table, parts, parts.stride(-3), parts.stride(-2), parts_begin, mask_rows, mask_width, begin, of.padded, d,
            length, splits, PARTS=self.parts, SPLIT=splits > 1, TRANSPOSED=transposed, ROWS=config.rows,
            COLUMNS=config.columns, STEP=config.step, WIDTH=width, TMA=config.tma,
            LONG=config.rows * mask_width >= LONGEST, num_warps=config.warps, num_stages=config.sum_stages,
        )  # fmt: skip
        gradient.collect[(triton.cdiv(d, min(width, 64)) * out_tiles, 2)](
            g, parts, of.sums, table, g.stride(0), g_begin, begin // config.rows, d, length, splits, SPLIT=splits > 1,
            TRANSPOSED=transposed, RATIO=ratio, ROWS=config.rows, WIDTH=min(width, 64), BLOCK=16,
        )  # fmt: skip

    def operand(self, matrix: Tensor, rows: int, columns: int, shape: tuple[int, int] | None = None) -> Any:
        """`matrix`, of its own or of another shape, as a kernel reads blocks [rows, columns] of it."""
        if not self.config.tma:
            return matrix
        height, width = shape or matrix.shape
        return TensorDescriptor(matrix, [height, width], [width, 1], [rows, columns])
