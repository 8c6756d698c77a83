"""The Triton kernels before the products: x^ of sorted rows, and what is known of a row and of a tile of rows.

`triton_loss.py` launches them and tells how they fit together. Rows and columns are sorted by label, the largest first,
so that those that take no part come last; and padded to whole tiles. Offsets are in 64 bits wherever they count
components; rows, columns and tiles are counted in 32.
"""

import torch
import triton
import triton.language as tl

LOW_SCALE: tl.constexpr = tl.constexpr(2.0**11)  # the low part then is of the size of x^: no fp16 subnormals
LARGEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).max)
NO_SELF: tl.constexpr = tl.constexpr(0)  # no row is among the columns
DIAGONAL: tl.constexpr = tl.constexpr(1)  # column r is row r
TABLE: tl.constexpr = tl.constexpr(2)  # column own[r] is row r

# Numbers of a call, in fp64, which are zero at first. Rows are set 0, columns set 1, or 0 if the rows are the columns.
VALID: tl.constexpr = tl.constexpr(0)  # [2 sets] rows that take part
BROKEN: tl.constexpr = tl.constexpr(2)  # [2 sets] 1 if one of these is not finite
WEIGHTS: tl.constexpr = tl.constexpr(4)  # [2 gradients, 2 sides] of G+ and G- in a gradient: from `totals`
NUMBERS: tl.constexpr = tl.constexpr(8)  # margins [2], and the lambdas [2], which are 0 where there is no loss
STATE = 12  # how many there are


@triton.jit
def as_float32(value):
    """Of embeddings."""
    if value.dtype == tl.bfloat16:  # the upper half of it: the interpreter's own conversion loses subnormal numbers
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def divide(value, first, second, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """value [ROWS, BLOCK] by first [ROWS], then by second [ROWS]."""
    value = tl.div_rn(value, tl.broadcast_to(first[:, None], (ROWS, BLOCK)))
    return tl.div_rn(value, tl.broadcast_to(second[:, None], (ROWS, BLOCK)))


@triton.jit
def tile_and_column(d, WIDTH: tl.constexpr):
    """Of this program: its tile of rows and its first column of d; and how many tiles there are.

    The grid's first dimension has them all, one tile's columns after the other: the others end at 65,535, which is 8.4
    million rows.
    """
    blocks = tl.cdiv(d, WIDTH)
    program = tl.program_id(0)
    return program // blocks, program % blocks * WIDTH, tl.num_programs(0) // blocks


@triton.jit
def _keep_numbers(target, numbers, plus, minus):
    """[2] numbers to `target`: from the device's memory, or if there are none there, by their bits."""
    if numbers is not None:
        tl.store(target, tl.load(numbers))
        tl.store(target + 1, tl.load(numbers + 1))
    else:
        tl.store(target, tl.cast(plus, tl.int64).to(tl.float64, bitcast=True))
        tl.store(target + 1, tl.cast(minus, tl.int64).to(tl.float64, bitcast=True))


@triton.jit(do_not_specialize=["n", "margin_plus", "margin_minus", "lambda_plus", "lambda_minus"])
def normalise(
    x,  # [N, D] of any strides
    labels,  # [N] sorted; a row takes part if its label is not negative
    order,  # [N] row of x that sorted row r is
    unit,  # [PARTS, padded, d_padded] X^, zero in the padding and in rows that take no part or are not finite
    norm,  # [2, padded] the largest |component|, 1 in a zero row; |x| in units of it
    state,  # [STATE]
    margins,  # [2] in fp64 on the device, or None: they are given below
    weights,
    margin_plus,  # the bits of a number in fp64, as an integer
    margin_minus,
    lambda_plus,
    lambda_minus,
    n,
    d,
    padded,
    d_padded,
    x_row,
    x_column,
    SET: tl.constexpr,
    EPSILON: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Unit rows in sorted order, and their norms: one program for ROWS rows. The first keeps margins and weights."""
    if SET == 0:
        if tl.program_id(0) == 0:
            _keep_numbers(state + NUMBERS, margins, margin_plus, margin_minus)
            _keep_numbers(state + NUMBERS + 2, weights, lambda_plus, lambda_minus)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    takes_part = tl.load(labels + r, mask=r < n, other=-1) >= 0
    last = takes_part & (tl.load(labels + r + 1, mask=r + 1 < n, other=-1) < 0)
    tl.store(state + VALID + SET + tl.zeros((ROWS,), tl.int32), (r + 1).to(tl.float64), mask=last)
    source = tl.load(order + r, mask=takes_part, other=0) * x_row
    column = tl.arange(0, BLOCK).to(tl.int64)
    # |x| in units of the largest component: no square overflows or vanishes.
    peak = tl.zeros((ROWS,), tl.float32)
    broken = tl.zeros((ROWS,), tl.int32)
    for k in range(0, d, BLOCK):
        inside = takes_part[:, None] & (k + column < d)[None, :]
        size = tl.abs(as_float32(tl.load(x + source[:, None] + ((k + column) * x_column)[None, :], inside, 0.0)))
        broken |= tl.max(tl.where(size <= LARGEST, 0, 1), 1)
        peak = tl.maximum(peak, tl.max(size, 1))
    finite = broken == 0
    # Whoever finds one writes the same.
    flag = state + BROKEN + SET + tl.zeros((ROWS,), tl.int32)
    tl.store(flag, tl.full((ROWS,), 1.0, tl.float64), mask=takes_part & (broken != 0))
    takes_part &= finite
    peak = tl.where(finite & (peak > 0), peak, 1.0)
    squares = tl.zeros((ROWS,), tl.float32)
    for k in range(0, d, BLOCK):
        inside = takes_part[:, None] & (k + column < d)[None, :]
        value = as_float32(tl.load(x + source[:, None] + ((k + column) * x_column)[None, :], inside, 0.0))
        value = tl.div_rn(value, tl.broadcast_to(peak[:, None], (ROWS, BLOCK)))
        squares += tl.sum(value * value, 1)
    length = tl.sqrt_rn(squares)
    tiny = peak * length < EPSILON
    tl.store(norm + r, peak)
    tl.store(norm + padded + r, length)
    peak = tl.where(tiny, EPSILON, peak)
    length = tl.where(tiny, 1.0, length)
    for k in range(0, d_padded, BLOCK):
        inside = takes_part[:, None] & (k + column < d)[None, :]
        value = as_float32(tl.load(x + source[:, None] + ((k + column) * x_column)[None, :], inside, 0.0))
        value = divide(value, peak, length, ROWS, BLOCK)
        high = value.to(tl.float16)
        target = unit + r.to(tl.int64)[:, None] * d_padded + (k + column)[None, :]
        written = (k + column < d_padded)[None, :]
        tl.store(target, high, mask=written)
        if PARTS == 2:
            low = (value - high.to(tl.float32)) * LOW_SCALE
            tl.store(target + tl.cast(padded, tl.int64) * d_padded, low.to(tl.float16), mask=written)


@triton.jit(do_not_specialize=["n", "m", "rounds", "row_offset"])
def tile_sums(
    unit,  # [PARTS, padded, d]
    sums,  # [padded / TILE, d] sum of x^ over each tile of rows
    labels,  # [N] sorted
    column_labels,  # [M] sorted
    positives,  # [3, N], or None: row r's are the columns from the first number on below the second, both of which grow
    # with r; the third is the column that is the row itself (SELF == TABLE)
    order,  # [N]
    position,  # [M] sorted column that a column is (SELF == TABLE): written for columns, read for rows
    padded,
    d,
    n,
    m,
    rounds,  # of a bisection: bits of m
    row_offset,
    SELF: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of unit rows: one program for a tile of rows and BLOCK columns, of which the first finds the positives."""
    tile, column, _ = tile_and_column(d, BLOCK)
    columns = column + tl.arange(0, BLOCK)
    row = (tile * TILE + tl.arange(0, TILE)).to(tl.int64)
    source = unit + row[:, None] * d + columns[None, :]
    total = tl.sum(tl.load(source, mask=(columns < d)[None, :], other=0.0).to(tl.float32), 0)
    if PARTS == 2:
        low = tl.load(source + tl.cast(padded, tl.int64) * d, mask=(columns < d)[None, :], other=0.0)
        total += tl.sum(low.to(tl.float32), 0) / LOW_SCALE
    tl.store(sums + tile.to(tl.int64) * d + columns, total, mask=columns < d)
    if column == 0:
        _find_positives(
            labels,
            column_labels,
            positives,
            order,
            position,
            tile * TILE + tl.arange(0, TILE),
            n,
            m,
            rounds,
            row_offset,
            SELF,
            TILE,
        )


@triton.jit
def _find_positives(
    labels,
    column_labels,
    positives,
    order,
    position,
    r,
    n,
    m,
    rounds,
    row_offset,
    SELF: tl.constexpr,
    TILE: tl.constexpr,
):
    """Of rows r [TILE]; see `tile_sums`."""
    inside = r < n
    if positives is not None:
        label = tl.load(labels + r, mask=inside, other=0)
        for equal in tl.static_range(2):  # columns of a larger label; then those of the same one too
            low = tl.zeros((TILE,), tl.int32)
            high = tl.zeros((TILE,), tl.int32) + m
            for _ in range(rounds):
                middle = low + (high - low) // 2
                open = low < high
                other = tl.load(column_labels + middle, mask=open, other=0)
                before = open & ((other > label) | ((other == label) & (equal == 1)))
                low = tl.where(before, middle + 1, low)
                high = tl.where(open & (before == 0), middle, high)
            tl.store(positives + tl.cast(equal * n, tl.int64) + r, low, mask=inside)
    if SELF == TABLE:
        source = tl.load(order + r, mask=inside, other=0)
        if positives is not None:
            own = tl.load(position + source + row_offset, mask=inside, other=0)
            tl.store(positives + tl.cast(n, tl.int64) * 2 + r, own, mask=inside)
        else:
            tl.store(position + source, r, mask=inside)
