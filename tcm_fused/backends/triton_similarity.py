"""The Triton kernels of a panel's similarities: hard pairs, penalties, masks, and lists of the tiles that have any.

A panel of `row_tiles` by `column_tiles` tiles has a table of 32-bit numbers, in this order:

    penalty [2 sides, tiles] as the bits of an fp32 number   count [2, tiles]   kind [2, tiles]: EMPTY, MIXED or FULL
    lists of rows [2, row tiles, column tiles]               lists of columns [2, column tiles, row tiles]
    sizes [2 kinds, 2 sides, row tiles + column tiles]: how many of a list are mixed, full
"""

import triton
import triton.language as tl

from tcm_fused.backends.triton_prologue import DIAGONAL, LOW_SCALE, NUMBERS, TABLE, VALID

EMPTY: tl.constexpr = tl.constexpr(0)
MIXED: tl.constexpr = tl.constexpr(1)
FULL: tl.constexpr = tl.constexpr(2)


def table_size(row_tiles: int, column_tiles: int) -> int:
    """Numbers of a panel's table."""
    return 10 * row_tiles * column_tiles + 4 * (row_tiles + column_tiles)


@triton.jit
def block(
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
def high_product(
    rows,  # [PARTS, padded_rows, d]
    columns,  # [PARTS, padded_columns, d]
    row,
    column,
    d,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    TMA: tl.constexpr,
):
    """s [ROWS, COLUMNS] in fp32, of the high parts alone."""
    s = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, d, STEP):
        a = block(rows, row, k, d, ROWS, STEP, TMA)
        b = block(columns, column, k, d, COLUMNS, STEP, TMA)
        s = tl.dot(a, tl.trans(b), s)
    return s


@triton.jit
def with_low_parts(
    s,  # of `high_product`
    rows,
    columns,
    row,
    column,
    padded_rows,
    padded_columns,
    d,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    TMA: tl.constexpr,
):
    """x.y = high.high + (low.high + high.low) / 2^11; the product of the low parts is below 2^-22 of |x||y|."""
    s *= LOW_SCALE  # exact, and undone below
    for k in range(0, 2 * d, STEP):
        swapped = k >= d
        here = k - tl.where(swapped, d, 0)
        a = block(rows, row + tl.where(swapped, 0, padded_rows), here, d, ROWS, STEP, TMA)
        b = block(columns, column + tl.where(swapped, padded_columns, 0), here, d, COLUMNS, STEP, TMA)
        s = tl.dot(a, tl.trans(b), s)
    return s / LOW_SCALE


@triton.jit
def _write_mask(mask, hard, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Writes `hard` [ROWS, COLUMNS] as 0 and 1 into a matrix `width` wide."""
    r = tl.arange(0, ROWS).to(tl.int64)
    tl.store(mask + r[:, None] * width + tl.arange(0, COLUMNS)[None, :], hard.to(tl.float16))


@triton.jit
def _write_tile(table, tiles, tile, sum_, n, class_):
    """Of one side; `tile` counts those of both."""
    tl.store(table + tile, sum_.to(tl.int32, bitcast=True))
    tl.store(table + 2 * tiles + tile, n)
    tl.store(table + 4 * tiles + tile, class_)


@triton.jit
def _write_empty(table, tiles, tile):
    for k in tl.static_range(3):
        tl.store(table + 2 * k * tiles + tile, 0)


@triton.jit(do_not_specialize=["n", "row_tiles", "column_tiles"])
def similarity(
    rows,  # [PARTS, padded_rows, d] X^ of the rows
    columns,  # [PARTS, padded_columns, d]
    narrow_columns,  # the same in blocks of NARROW
    positives,  # [3, N] from `tile_sums`
    state,  # [STATE]
    masks,  # [2, panel rows, panel columns] of 0 and 1, written where a tile is mixed
    table,  # of the panel: see above
    n,
    row_begin,  # of the panel
    column_begin,
    padded_rows,
    padded_columns,
    d,
    row_tiles,
    column_tiles,
    COLUMN_SET: tl.constexpr,
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
    rows_end = min(row + ROWS, tl.load(state + VALID).to(tl.int32))
    columns_end = min(column + COLUMNS, tl.load(state + VALID + COLUMN_SET).to(tl.int32))
    tile = i * column_tiles + j
    tiles = row_tiles * column_tiles
    # Below the diagonal the mirror image of another tile; in the padding nothing.
    skipped = (row >= rows_end) | (column >= columns_end)
    if SELF == DIAGONAL:
        skipped |= column + COLUMNS <= row
    if skipped:
        _write_empty(table, tiles, tile)
        _write_empty(table, tiles, tile + tiles)
        return

    first = positives
    last = positives + n
    own = last + n
    # |s| is below 2, so that a margin beyond decides as 2 does; its share of the penalties is added at the end, in
    # fp64, since the sum of a tile could overflow.
    margin_plus = tl.minimum(tl.maximum(tl.load(state + NUMBERS), -2.0), 2.0).to(tl.float32)
    margin_minus = tl.minimum(tl.maximum(tl.load(state + NUMBERS + 1), -2.0), 2.0).to(tl.float32)
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
        mine = tl.where(is_plus, tile, tile + tiles)
        _write_empty(table, tiles, 2 * tile + tiles - mine)
        s = high_product(rows, columns, row, column, d, ROWS, COLUMNS, STEP, TMA)
        margin = tl.where(is_plus, -margin_plus, margin_minus)
        possible = True
        if PARTS == 2:
            # By the high parts a similarity is known to within this (docs/how-it-works.md#decided-by-one-product):
            # most tiles need no more to see that they have no hard pair.
            bound = 2.0**-10 + 2.0**-19 + tl.cast(d, tl.float32) * 2.0**-21
            possible = tl.where(is_plus, -tl.min(s), tl.max(s)) >= margin - bound
            if possible:
                s = with_low_parts(
                    s, rows, columns, row, column, padded_rows, padded_columns, d, ROWS, COLUMNS, STEP, TMA
                )
        if is_plus:  # the same rule for either side: s >= margin is hard
            s = -s
        if possible & (tl.max(s) >= margin):
            class_ = tl.where(tl.min(s) >= margin, FULL, MIXED)
            if MASKS:
                if class_ == MIXED:
                    _write_mask(tl.where(is_plus, mask, minus_mask), s >= margin, width, ROWS, COLUMNS)
            sum_ = tl.sum(tl.maximum(s - margin, 0.0))
            _write_tile(table, tiles, mine, sum_, tl.sum((s >= margin).to(tl.int32)), class_)
        else:
            _write_empty(table, tiles, mine)
    else:
        # In narrow pieces: with masks for both sides a whole tile does not fit the registers.
        sum_plus = tl.zeros((ROWS,), tl.float32)
        sum_minus = tl.zeros((ROWS,), tl.float32)
        n_plus = tl.zeros((ROWS,), tl.int32)
        n_minus = tl.zeros((ROWS,), tl.int32)
        begin = tl.load(first + r, mask=r < rows_end, other=0)
        end = tl.load(last + r, mask=r < rows_end, other=0)
        for piece in range(0, COLUMNS, NARROW):
            at = column + piece
            s = high_product(rows, narrow_columns, row, at, d, ROWS, NARROW, STEP, TMA)
            if PARTS == 2:
                s = with_low_parts(
                    s, rows, narrow_columns, row, at, padded_rows, padded_columns, d, ROWS, NARROW, STEP, TMA
                )
            c = at + tl.arange(0, NARROW)
            present = (r < rows_end)[:, None] & (c < columns_end)[None, :]
            if SELF == DIAGONAL:
                present &= r[:, None] != c[None, :]
            if SELF == TABLE:  # read again: it is not worth a register all the while
                present &= tl.load(own + r, mask=r < rows_end, other=-1)[:, None] != c[None, :]
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
        hard = tl.sum(n_plus)
        _write_tile(table, tiles, tile, tl.sum(sum_plus), hard, tl.where(hard > 0, MIXED, EMPTY))
        hard = tl.sum(n_minus)
        _write_tile(table, tiles, tile + tiles, tl.sum(sum_minus), hard, tl.where(hard > 0, MIXED, EMPTY))


@triton.jit(do_not_specialize=["first_tile", "row_tiles", "column_tiles", "all_row_tiles"])
def lists(
    table,  # of the panel
    panels,  # [2, 2 sides, all row tiles] in fp64: penalties and counts, over ordered pairs
    first_tile,  # of the panel's rows
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
    target = table + 6 * tiles + tl.where(of_row, 0, 2 * tiles) + side * tiles + across * length
    n_mixed = 0
    n_full = 0
    total = tl.zeros((BLOCK,), tl.float64)
    pairs = tl.zeros((BLOCK,), tl.int64)
    for k in range(0, length, BLOCK):
        t = k + tl.arange(0, BLOCK)
        tile = side * tiles + tl.where(of_row, o * column_tiles + t, t * column_tiles + across)
        class_ = tl.load(table + 4 * tiles + tile, mask=t < length, other=EMPTY)
        times = 1
        if SYMMETRIC:
            # A tile off the diagonal stands for its mirror image too; one on it holds both orders of its pairs.
            on_diagonal = tl.where(of_row, t == o // RATIO, t // RATIO == across)
            times = tl.where(on_diagonal, 1, 2)
            class_ = tl.where(on_diagonal & (of_row == 0), EMPTY, class_)
        sum_ = tl.load(table + tile, mask=t < length, other=0).to(tl.float32, bitcast=True)
        total += sum_.to(tl.float64) * times
        pairs += tl.load(table + 2 * tiles + tile, mask=t < length, other=0).to(tl.int64) * times
        mixed = (class_ == MIXED).to(tl.int32)
        full = (class_ == FULL).to(tl.int32)
        tl.store(target + n_mixed + tl.cumsum(mixed, 0) - 1, t, mask=mixed != 0)
        tl.store(target + length - n_full - tl.cumsum(full, 0), t, mask=full != 0)
        n_mixed += tl.sum(mixed)
        n_full += tl.sum(full)
    outs = tl.num_programs(0)
    sizes = table + 10 * tiles
    tl.store(sizes + side * outs + o, n_mixed)
    tl.store(sizes + (2 + side) * outs + o, n_full)
    if of_row:
        panels += side * all_row_tiles + first_tile + o
        tl.store(panels, tl.sum(total))
        tl.store(panels + 2 * all_row_tiles, tl.sum(pairs).to(tl.float64))
