"""The Triton kernels of the loss; `triton_loss.py` launches them and tells how they fit together.

Rows and columns are sorted by label and padded to whole tiles. Offsets are in 64 bits wherever they count components;
rows, columns and tiles are counted in 32.
"""

import torch
import triton
import triton.language as tl

LOW_SCALE: tl.constexpr = tl.constexpr(2.0**11)  # the low part then is of the size of x^: no fp16 subnormals
LARGEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).max)
EMPTY: tl.constexpr = tl.constexpr(0)
MIXED: tl.constexpr = tl.constexpr(1)
FULL: tl.constexpr = tl.constexpr(2)
NO_SELF: tl.constexpr = tl.constexpr(0)  # no row is among the columns
DIAGONAL: tl.constexpr = tl.constexpr(1)  # column r is row r
TABLE: tl.constexpr = tl.constexpr(2)  # column own[r] is row r


# 1. Preparation.


@triton.jit
def _as_float32(value):
    if value.dtype == tl.bfloat16:  # the upper half of it: the interpreter's own conversion loses subnormal numbers
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def _divide(value, first, second, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """value [ROWS, BLOCK] by first [ROWS], then by second [ROWS]."""
    value = tl.div_rn(value, tl.broadcast_to(first[:, None], (ROWS, BLOCK)))
    return tl.div_rn(value, tl.broadcast_to(second[:, None], (ROWS, BLOCK)))


@triton.jit
def normalise(
    x,  # [N, D] of any strides
    order,  # [N] row of x that sorted row r is
    valid,  # [] sorted rows that take part
    unit,  # [PARTS, padded, d_padded] X^, zero in the padding and in rows that take no part or are not finite
    norm,  # [2, padded] the largest |component|, 1 in a zero row; |x| in units of it, NaN if not finite
    d,
    padded,
    d_padded,
    x_row,
    x_column,
    EPSILON: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Unit rows in sorted order, and their norms: one program for ROWS rows."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    takes_part = r < tl.load(valid)
    source = tl.load(order + r, mask=takes_part, other=0) * x_row
    column = tl.arange(0, BLOCK).to(tl.int64)
    # |x| in units of the largest component: no square overflows or vanishes.
    peak = tl.zeros((ROWS,), tl.float32)
    broken = tl.zeros((ROWS,), tl.int32)
    for k in range(0, d, BLOCK):
        inside = takes_part[:, None] & (k + column < d)[None, :]
        size = tl.abs(_as_float32(tl.load(x + source[:, None] + ((k + column) * x_column)[None, :], inside, 0.0)))
        broken |= tl.max(tl.where(size <= LARGEST, 0, 1), 1)
        peak = tl.maximum(peak, tl.max(size, 1))
    finite = broken == 0
    takes_part &= finite
    peak = tl.where(finite & (peak > 0), peak, 1.0)
    squares = tl.zeros((ROWS,), tl.float32)
    for k in range(0, d, BLOCK):
        inside = takes_part[:, None] & (k + column < d)[None, :]
        value = _as_float32(tl.load(x + source[:, None] + ((k + column) * x_column)[None, :], inside, 0.0))
        value = tl.div_rn(value, tl.broadcast_to(peak[:, None], (ROWS, BLOCK)))
        squares += tl.sum(value * value, 1)
    length = tl.sqrt_rn(squares)
    tiny = peak * length < EPSILON
    tl.store(norm + r, peak)
    tl.store(norm + padded + r, tl.where(finite, length, float("nan")))
    peak = tl.where(tiny, EPSILON, peak)
    length = tl.where(tiny, 1.0, length)
    for k in range(0, d_padded, BLOCK):
        inside = takes_part[:, None] & (k + column < d)[None, :]
        value = _as_float32(tl.load(x + source[:, None] + ((k + column) * x_column)[None, :], inside, 0.0))
        value = _divide(value, peak, length, ROWS, BLOCK)
        high = value.to(tl.float16)
        target = unit + r.to(tl.int64)[:, None] * d_padded + (k + column)[None, :]
        written = (k + column < d_padded)[None, :]
        tl.store(target, high, mask=written)
        if PARTS == 2:
            low = (value - high.to(tl.float32)) * LOW_SCALE
            tl.store(target + tl.cast(padded, tl.int64) * d_padded, low.to(tl.float16), mask=written)


@triton.jit
def _tile_and_column(d, WIDTH: tl.constexpr):
    """Of this program: its tile of rows and its first column of d; and how many tiles there are.

    The grid's first dimension has them all, one tile's columns after the other: the others end at 65,535, which is 8.4
    million rows.
    """
    blocks = tl.cdiv(d, WIDTH)
    program = tl.program_id(0)
    return program // blocks, program % blocks * WIDTH, tl.num_programs(0) // blocks


@triton.jit
def tile_sums(
    unit,  # [PARTS, padded, d]
    sums,  # [padded / TILE, d] sum of x^ over each tile of rows
    padded,
    d,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of unit rows: one program for a tile of rows and BLOCK columns."""
    tile, column, _ = _tile_and_column(d, BLOCK)
    column += tl.arange(0, BLOCK)
    row = (tile * TILE + tl.arange(0, TILE)).to(tl.int64)
    source = unit + row[:, None] * d + column[None, :]
    total = tl.sum(tl.load(source, mask=(column < d)[None, :], other=0.0).to(tl.float32), 0)
    if PARTS == 2:
        low = tl.load(source + tl.cast(padded, tl.int64) * d, mask=(column < d)[None, :], other=0.0)
        total += tl.sum(low.to(tl.float32), 0) / LOW_SCALE
    tl.store(sums + tile.to(tl.int64) * d + column, total, mask=column < d)


# 2. One panel of rows.


@triton.jit
def _block(
    source, row, column, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr, LONG: tl.constexpr = False
):
    """[ROWS, COLUMNS] of a matrix `width` wide, from a descriptor or a pointer; right of the matrix anything finite.

    LONG: offsets within the block take 64 bits too, which costs registers.
    """
    if TMA:
        return source.load([row, column])
    else:
        c = tl.arange(0, COLUMNS)
        source += tl.cast(row, tl.int64) * width + column
        r = tl.arange(0, ROWS)
        if LONG:
            r = r.to(tl.int64)
        return tl.load(source + (r[:, None] * width + c[None, :]), (column + c < width)[None, :], 0.0)


@triton.jit
def _product(
    rows,  # [PARTS, padded_rows, d]
    columns,  # [PARTS, padded_columns, d]
    row,
    column,
    padded_rows,
    padded_columns,
    d,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    TMA: tl.constexpr,
):
    """s [ROWS, COLUMNS] in fp32."""
    s = tl.zeros((ROWS, COLUMNS), tl.float32)
    if PARTS == 2:
        # x.y = high.high + (low.high + high.low) / 2^11; the product of the low parts is below 2^-22 of |x||y|.
        for k in range(0, 2 * d, STEP):
            swapped = k >= d
            here = k - tl.where(swapped, d, 0)
            a = _block(rows, row + tl.where(swapped, 0, padded_rows), here, d, ROWS, STEP, TMA)
            b = _block(columns, column + tl.where(swapped, padded_columns, 0), here, d, COLUMNS, STEP, TMA)
            s = tl.dot(a, tl.trans(b), s)
        s = s / LOW_SCALE
    for k in range(0, d, STEP):
        a = _block(rows, row, k, d, ROWS, STEP, TMA)
        b = _block(columns, column, k, d, COLUMNS, STEP, TMA)
        s = tl.dot(a, tl.trans(b), s)
    return s


@triton.jit
def _write_mask(mask, hard, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Writes `hard` [ROWS, COLUMNS] as 0 and 1 into a matrix `width` wide."""
    r = tl.arange(0, ROWS).to(tl.int64)
    tl.store(mask + r[:, None] * width + tl.arange(0, COLUMNS)[None, :], hard.to(tl.float16))


@triton.jit
def _write_tile(penalty, count, kind, tile, sum_, n, class_):
    tl.store(penalty + tile, sum_)
    tl.store(count + tile, n)
    tl.store(kind + tile, class_)


@triton.jit(do_not_specialize=["row_tiles", "column_tiles"])
def similarity(
    rows,  # [PARTS, padded_rows, d] X^ of the rows
    columns,  # [PARTS, padded_columns, d]
    narrow_columns,  # the same in blocks of NARROW
    first,  # [N] columns first[r] to last[r] - 1 have the label of row r; both grow with r
    last,
    own,  # [N] column that is row r itself, -1 if none (SELF == TABLE)
    row_valid,  # [] rows that take part
    column_valid,
    masks,  # [2, panel rows, panel columns] of 0 and 1, written where a tile is mixed
    penalty,  # [2, row tiles, column tiles]
    count,
    kind,
    margins,  # [2] from -2 to 2
    row_begin,  # of the panel
    column_begin,
    padded_rows,
    padded_columns,
    d,
    row_tiles,
    column_tiles,
    PARTS: tl.constexpr,
    SELF: tl.constexpr,
    MASKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NARROW: tl.constexpr,
    STEP: tl.constexpr,
    TMA: tl.constexpr,
):
    """Similarities, hard pairs and masks of a panel: one program for a tile."""
    # Neighbours in time share columns and up to 16 tiles of rows, which stay in the L2 cache.
    t = tl.program_id(0)
    group = t // (16 * column_tiles)
    height = min(row_tiles - 16 * group, 16)
    t -= group * 16 * column_tiles
    i = 16 * group + t % height
    j = t // height
    row = row_begin + i * ROWS
    column = column_begin + j * COLUMNS
    rows_end = min(row + ROWS, tl.load(row_valid))
    columns_end = min(column + COLUMNS, tl.load(column_valid))
    tile = i * column_tiles + j
    tiles = row_tiles * column_tiles
    # Below the diagonal the mirror image of another tile; in the padding nothing.
    skipped = (row >= rows_end) | (column >= columns_end)
    if SELF == DIAGONAL:
        skipped |= column + COLUMNS <= row
    if skipped:
        _write_tile(penalty, count, kind, tile, 0.0, 0, EMPTY)
        _write_tile(penalty, count, kind, tile + tiles, 0.0, 0, EMPTY)
        return

    margin_plus = tl.load(margins)
    margin_minus = tl.load(margins + 1)
    # Most tiles are of one side: no label, no pair of a row with itself, no padding to look at.
    r = row + tl.arange(0, ROWS)
    is_plus = (tl.load(first + rows_end - 1) <= column) & (tl.load(last + row) >= columns_end)
    is_minus = (tl.load(first + row) >= columns_end) | (tl.load(last + rows_end - 1) <= column)
    plain = (is_plus | is_minus) & (rows_end == row + ROWS) & (columns_end == column + COLUMNS)
    if SELF == DIAGONAL:
        plain &= column >= row + ROWS
    if SELF == TABLE:
        self_column = tl.load(own + r, mask=r < rows_end, other=-1)
        plain &= tl.max(((self_column >= column) & (self_column < column + COLUMNS)).to(tl.int32)) == 0
    width = column_tiles * COLUMNS
    mask = masks + tl.cast(i * ROWS, tl.int64) * width + j * COLUMNS
    minus_mask = mask + tl.cast(row_tiles * ROWS, tl.int64) * width
    if plain:
        s = _product(rows, columns, row, column, padded_rows, padded_columns, d, PARTS, ROWS, COLUMNS, STEP, TMA)
        if is_plus:  # the same rule for either side: s >= margin is hard
            s = -s
        margin = tl.where(is_plus, -margin_plus, margin_minus)
        mine = tl.where(is_plus, tile, tile + tiles)
        _write_tile(penalty, count, kind, 2 * tile + tiles - mine, 0.0, 0, EMPTY)
        if tl.max(s) >= margin:
            class_ = tl.where(tl.min(s) >= margin, FULL, MIXED)
            if MASKS:
                if class_ == MIXED:
                    _write_mask(tl.where(is_plus, mask, minus_mask), s >= margin, width, ROWS, COLUMNS)
            _write_tile(
                penalty,
                count,
                kind,
                mine,
                tl.sum(tl.maximum(s - margin, 0.0)),
                tl.sum((s >= margin).to(tl.int32)),
                class_,
            )
        else:
            _write_tile(penalty, count, kind, mine, 0.0, 0, EMPTY)
    else:
        # In narrow pieces: with masks for both sides a whole tile does not fit the registers.
        sum_plus = tl.zeros((ROWS,), tl.float32)
        sum_minus = tl.zeros((ROWS,), tl.float32)
        n_plus = tl.zeros((ROWS,), tl.int32)
        n_minus = tl.zeros((ROWS,), tl.int32)
        begin = tl.load(first + r, mask=r < rows_end, other=0)
        end = tl.load(last + r, mask=r < rows_end, other=0)
        for piece in range(0, COLUMNS, NARROW):
            s = _product(
                rows,
                narrow_columns,
                row,
                column + piece,
                padded_rows,
                padded_columns,
                d,
                PARTS,
                ROWS,
                NARROW,
                STEP,
                TMA,
            )
            c = column + piece + tl.arange(0, NARROW)
            present = (r < rows_end)[:, None] & (c < columns_end)[None, :]
            if SELF == DIAGONAL:
                present &= r[:, None] != c[None, :]
            if SELF == TABLE:
                present &= self_column[:, None] != c[None, :]
            same = (c[None, :] >= begin[:, None]) & (c[None, :] < end[:, None])
            plus = present & same & (s <= margin_plus)
            minus = present & (same == 0) & (s >= margin_minus)
            if MASKS:
                _write_mask(mask + piece, plus, width, ROWS, NARROW)
                _write_mask(minus_mask + piece, minus, width, ROWS, NARROW)
            sum_plus += tl.sum(tl.where(plus, margin_plus - s, 0.0), 1)
            sum_minus += tl.sum(tl.where(minus, s - margin_minus, 0.0), 1)
            n_plus += tl.sum(plus.to(tl.int32), 1)
            n_minus += tl.sum(minus.to(tl.int32), 1)
        n = tl.sum(n_plus)
        _write_tile(penalty, count, kind, tile, tl.sum(sum_plus), n, tl.where(n > 0, MIXED, EMPTY))
        n = tl.sum(n_minus)
        _write_tile(penalty, count, kind, tile + tiles, tl.sum(sum_minus), n, tl.where(n > 0, MIXED, EMPTY))


@triton.jit(do_not_specialize=["row_tiles", "column_tiles", "all_row_tiles"])
def lists(
    penalty,  # [2, row tiles, column tiles], of this panel
    count,
    kind,
    panel_penalty,  # [2, all row tiles] sums over ordered pairs, at this panel
    panel_count,
    lists,  # [2, tiles] of rows: [2, row tiles, column tiles], then of columns: [2, column tiles, row tiles]
    sizes,  # [2 kinds, 2 sides, row tiles + column tiles] how many are mixed, full
    row_tiles,
    column_tiles,
    all_row_tiles,
    SYMMETRIC: tl.constexpr,
    RATIO: tl.constexpr,  # tiles of rows that a square with the width of a tile has
    BLOCK: tl.constexpr,
):
    """The mixed tiles of each row and column of tiles from the front of its list, the full ones from its end."""
    o = tl.program_id(0)
    side = tl.program_id(1)
    tiles = row_tiles * column_tiles
    of_row = o < row_tiles
    length = tl.where(of_row, column_tiles, row_tiles)
    across = o - tl.where(of_row, 0, row_tiles)
    target = lists + tl.where(of_row, 0, 2 * tiles) + side * tiles + across * length
    n_mixed = 0
    n_full = 0
    total = tl.zeros((BLOCK,), tl.float64)
    pairs = tl.zeros((BLOCK,), tl.int64)
    for k in range(0, length, BLOCK):
        t = k + tl.arange(0, BLOCK)
        tile = side * tiles + tl.where(of_row, o * column_tiles + t, t * column_tiles + across)
        class_ = tl.load(kind + tile, mask=t < length, other=EMPTY)
        times = 1
        if SYMMETRIC:
            # A tile off the diagonal stands for its mirror image too; one on it holds both orders of its pairs.
            on_diagonal = tl.where(of_row, t == o // RATIO, t // RATIO == across)
            times = tl.where(on_diagonal, 1, 2)
            class_ = tl.where(on_diagonal & (of_row == 0), EMPTY, class_)
        total += tl.load(penalty + tile, mask=t < length, other=0.0).to(tl.float64) * times
        pairs += tl.load(count + tile, mask=t < length, other=0).to(tl.int64) * times
        mixed = (class_ == MIXED).to(tl.int32)
        full = (class_ == FULL).to(tl.int32)
        tl.store(target + n_mixed + tl.cumsum(mixed, 0) - 1, t, mask=mixed != 0)
        tl.store(target + length - n_full - tl.cumsum(full, 0), t, mask=full != 0)
        n_mixed += tl.sum(mixed)
        n_full += tl.sum(full)
    outs = tl.num_programs(0)
    tl.store(sizes + side * outs + o, n_mixed)
    tl.store(sizes + (2 + side) * outs + o, n_full)
    if of_row:
        tl.store(panel_penalty + side * all_row_tiles + o, tl.sum(total))
        tl.store(panel_count + side * all_row_tiles + o, tl.sum(pairs))


@triton.jit(do_not_specialize=["length", "outs", "splits"])
def masked_sum(
    masks,  # [2, mask_rows, width]
    x,  # [PARTS, padded, d] X^ of the rows that are summed
    lists,  # [2, out tiles, length] mixed tiles
    sizes,  # [2, outs] how many, at the first out tile
    out,  # [2, splits, out rows, d] with `out_stride` from one matrix to the next, `out_row` from one row to the next
    out_stride,
    out_row,
    mask_rows,
    width,
    x_begin,  # row of x that is the first of the panel
    padded,
    d,
    length,
    outs,
    splits,  # of one sum
    PARTS: tl.constexpr,
    SPLIT: tl.constexpr,  # `out` takes parts of sums, which `collect` adds up; else it is G itself
    TRANSPOSED: tl.constexpr,  # M^T X^: out tiles are tiles of columns
    ROWS: tl.constexpr,  # of an out tile
    COLUMNS: tl.constexpr,  # width of a similarity tile
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
    TMA: tl.constexpr,
    LONG: tl.constexpr,  # a block of a mask spans 2^31 numbers
):
    """M X^ or M^T X^ over the mixed tiles: one program for an out tile, WIDTH columns, a side and a split."""
    o, column, outs_here = _tile_and_column(d, WIDTH)
    z = tl.program_id(1)
    side = z // splits
    split = z % splits
    across = o // (COLUMNS // ROWS) if TRANSPOSED else o
    n = tl.load(sizes + side * outs + across)
    PER_TILE: tl.constexpr = (ROWS if TRANSPOSED else COLUMNS) // STEP
    begin = n * split // splits * PER_TILE
    end = n * (split + 1) // splits * PER_TILE
    if begin == end:
        return
    of_side = outs_here // (COLUMNS // ROWS) if TRANSPOSED else outs_here
    lists += (side * of_side + across) * length
    mask_row = side * mask_rows
    out += z.to(tl.int64) * out_stride
    if SPLIT:
        g = tl.zeros((ROWS, WIDTH), tl.float32)
    else:
        g = _block(out, o * ROWS, column, d, ROWS, WIDTH, False)
    if PARTS == 2:
        g *= LOW_SCALE  # exact, and undone below
    for part in tl.static_range(PARTS - 1, -1, -1):  # the low part of x^ first
        for t in range(begin, end):
            k = tl.load(lists + t // PER_TILE) * (PER_TILE * STEP) + t % PER_TILE * STEP
            if TRANSPOSED:
                m = tl.trans(_block(masks, mask_row + k, o * ROWS, width, STEP, ROWS, TMA, LONG))
            else:
                m = _block(masks, mask_row + o * ROWS, k, width, ROWS, STEP, TMA, LONG)
            g = tl.dot(m, _block(x, part * padded + x_begin + k, column, d, STEP, WIDTH, TMA), g)
        if part == 1:
            g = g / LOW_SCALE
    # By `out_row`, which is d: with the same address as above the compiler keeps it for the whole sum, and spills.
    c = tl.arange(0, WIDTH)
    out += tl.cast(o * ROWS, tl.int64) * out_row + column
    tl.store(out + (tl.arange(0, ROWS)[:, None] * out_row + c[None, :]), g, mask=(column + c < d)[None, :])


@triton.jit(do_not_specialize=["length", "outs", "splits"])
def collect(
    g,  # [2, out rows, d] with `g_stride` from one matrix to the next
    parts,  # [2, splits, out rows, d] from `masked_sum`, if SPLIT
    sums,  # [tiles, d] from `tile_sums`, at the first of the panel
    lists,  # as there; the full tiles are at the ends
    mixed,  # [2, outs] how many are mixed
    full,
    g_stride,
    d,
    length,
    outs,
    splits,
    SPLIT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    RATIO: tl.constexpr,  # COLUMNS // ROWS
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Split sums and full tiles added to G: one program for an out tile, WIDTH columns and a side."""
    o, column, outs_here = _tile_and_column(d, WIDTH)
    c = column + tl.arange(0, WIDTH)
    side = tl.program_id(1)
    across = o // RATIO if TRANSPOSED else o
    n_mixed = tl.load(mixed + side * outs + across)
    n_full = tl.load(full + side * outs + across)
    if not SPLIT:
        n_mixed = 0
    if n_mixed + n_full == 0:
        return
    of_side = outs_here // RATIO if TRANSPOSED else outs_here
    lists += (side * of_side + across) * length
    PER_TILE: tl.constexpr = 1 if TRANSPOSED else RATIO  # tiles of `sums` in a full tile
    common = tl.zeros((WIDTH,), tl.float32)
    for k in range(0, n_full * PER_TILE, BLOCK):
        t = k + tl.arange(0, BLOCK)
        tile = (
            tl.load(lists + length - 1 - t // PER_TILE, mask=t < n_full * PER_TILE, other=0) * PER_TILE + t % PER_TILE
        )
        inside = (t < n_full * PER_TILE)[:, None] & (c < d)[None, :]
        common += tl.sum(tl.load(sums + tile.to(tl.int64)[:, None] * d + c[None, :], mask=inside, other=0.0), 0)
    r = (o * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    place = r[:, None] * d + c[None, :]
    inside = (c < d)[None, :]
    target = g + side.to(tl.int64) * g_stride + place
    total = tl.load(target, mask=inside, other=0.0) + common[None, :]
    if SPLIT:
        part_stride = outs_here.to(tl.int64) * ROWS * d
        for split in range(splits):
            if n_mixed * split // splits < n_mixed * (split + 1) // splits:
                total += tl.load(parts + (side * splits + split) * part_stride + place, mask=inside, other=0.0)
    tl.store(target, total, mask=inside)


# 3. The end.


@triton.jit(do_not_specialize=["tiles"])
def totals(
    panel_penalty,  # [2, tiles]
    panel_count,
    row_check,  # [] NaN if an embedding is not finite
    column_check,
    loss,  # [], NaN if an embedding is not finite
    penalty,  # [2], likewise
    count,  # [2]
    weight,  # [2] lambda / n, likewise; without `weights` [2, 2], 1 and 0, then 0 and 1
    weights,  # [2] lambda+ and lambda- in fp64, or None: no loss
    margins,  # [2] in fp64
    tiles,
    BLOCK: tl.constexpr,
):
    """Loss, penalties, counts and weights of the gradient, from those of the panels: one program."""
    check = (tl.load(row_check) + tl.load(column_check)).to(tl.float64)
    for side in tl.static_range(2):  # of a number that is not finite it makes NaN
        check += 0.0 * tl.load(margins + side)
    LOSS: tl.constexpr = weights is not None
    if LOSS:
        for side in tl.static_range(2):
            check += 0.0 * tl.load(weights + side)
    poison = tl.where(check == check, 0.0, float("nan"))
    value = tl.zeros((), tl.float64) + poison
    for side in tl.static_range(2):
        total = tl.zeros((BLOCK,), tl.float64)
        pairs = tl.zeros((BLOCK,), tl.int64)
        for k in range(0, tiles, BLOCK):
            t = k + tl.arange(0, BLOCK)
            total += tl.load(panel_penalty + side * tiles + t, mask=t < tiles, other=0.0)
            pairs += tl.load(panel_count + side * tiles + t, mask=t < tiles, other=0)
        n = tl.sum(pairs)
        # Of a margin beyond +-2, which panels take as +-2, a hard pair has the rest to add.
        margin = tl.load(margins + side)
        excess = margin - tl.minimum(tl.maximum(margin, -2.0), 2.0)
        sum_ = tl.sum(total) + n.to(tl.float64) * (excess if side == 0 else -excess) + poison
        tl.store(penalty + side, sum_)
        tl.store(count + side, n)
        if LOSS:
            w = tl.load(weights + side) / tl.maximum(n, 1).to(tl.float64)
            tl.store(weight + side, w.to(tl.float32) + poison)
            value += w * sum_
        else:
            tl.store(weight + 3 * side, 1.0 + poison)
            tl.store(weight + side + 1, poison)
    if LOSS:
        tl.store(loss, value.to(tl.float32))


@triton.jit(do_not_specialize=["n"])
def project(
    x,  # [N, D] of any strides
    order,  # [N]
    valid,
    norm,  # [2, padded], from `normalise`
    g,  # [2, padded, d_padded] G+, G-
    weight,  # [2] from `totals`, or [2, 2]
    out,  # [N, D] dL/dx, contiguous, or [2, N, D] those of the penalties
    n,
    d,
    padded,
    g_stride,
    d_padded,
    x_row,
    x_column,
    factor,
    EPSILON: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients in the order of the input, (g - (g . x^) x^) / |x|: one program for ROWS rows and a gradient."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    takes_part = r < tl.load(valid)
    source = tl.load(order + r, mask=r < n, other=0)
    peak = tl.load(norm + r)
    length = tl.load(norm + padded + r)
    is_zero = length == 0
    tiny = peak * length < EPSILON  # there the divisor is a constant, and nothing is projected away
    peak = tl.where(tiny, EPSILON, peak)
    length = tl.where(tiny, 1.0, length)
    column = tl.arange(0, BLOCK).to(tl.int64)
    side = tl.program_id(1)
    out += tl.cast(side, tl.int64) * n * d
    w_plus = tl.load(weight + 2 * side) * factor
    w_minus = tl.load(weight + 2 * side + 1) * factor
    along = tl.zeros((ROWS,), tl.float32)
    for k in range(0, d, BLOCK):
        inside = takes_part[:, None] & (k + column < d)[None, :]
        here = g + r.to(tl.int64)[:, None] * d_padded + (k + column)[None, :]
        total = w_minus * tl.load(here + g_stride, inside, 0.0) - w_plus * tl.load(here, inside, 0.0)
        value = tl.load(x + (source * x_row)[:, None] + ((k + column) * x_column)[None, :], inside, 0.0)
        along += tl.sum(total * _divide(_as_float32(value), peak, length, ROWS, BLOCK), 1)
    along = tl.where(tiny, 0.0, along)
    for k in range(0, d, BLOCK):
        inside = takes_part[:, None] & (k + column < d)[None, :]
        here = g + r.to(tl.int64)[:, None] * d_padded + (k + column)[None, :]
        total = w_minus * tl.load(here + g_stride, inside, 0.0) - w_plus * tl.load(here, inside, 0.0)
        value = tl.load(x + (source * x_row)[:, None] + ((k + column) * x_column)[None, :], inside, 0.0)
        grad = total - along[:, None] * _divide(_as_float32(value), peak, length, ROWS, BLOCK)
        grad = _divide(grad, length, peak, ROWS, BLOCK)
        grad = tl.where(is_zero[:, None], 0.0 * total, grad)
        grad = tl.where(takes_part[:, None], grad, 0.0)
        written = (r < n)[:, None] & (k + column < d)[None, :]
        tl.store(out + source[:, None] * d + (k + column)[None, :], grad, mask=written)
