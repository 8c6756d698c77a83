"""The Triton kernels after a panel's similarities: the sums over hard pairs, and the loss and gradients that follow."""

import triton
import triton.language as tl

from tcm_fused.backends.triton_prologue import (
    BROKEN,
    LOW_SCALE,
    NUMBERS,
    VALID,
    WEIGHTS,
    as_float32,
    divide,
    tile_and_column,
)
from tcm_fused.backends.triton_similarity import block


@triton.jit
def _list(table, side, across, length, of_side, TRANSPOSED: tl.constexpr):
    """The list of an out tile, and where its numbers of mixed and of full tiles are: see `triton_similarity.py`."""
    tiles = length * of_side
    lists = table + 6 * tiles + (side * of_side + across) * length
    sizes = table + 10 * tiles + side * (length + of_side) + across
    if TRANSPOSED:
        lists += 2 * tiles
        sizes += length
    return lists, sizes, sizes + 2 * (length + of_side)


@triton.jit(do_not_specialize=["out_begin", "length", "splits"])
def masked_sum(
    masks,  # [2, mask_rows, width]
    x,  # [PARTS, padded, d] X^ of the rows that are summed
    table,  # of the panel
    out,  # [2, splits, out rows, d] with `out_stride` from one matrix to the next, `out_row` from one row to the next
    out_stride,
    out_row,
    out_begin,  # row of `out` that is the first out tile's
    mask_rows,
    width,
    x_begin,  # row of x that is the first of the panel
    padded,
    d,
    length,  # of a list
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
    o, column, outs_here = tile_and_column(d, WIDTH)
    z = tl.program_id(1)
    side = z // splits
    split = z % splits
    across = o // (COLUMNS // ROWS) if TRANSPOSED else o
    of_side = outs_here // (COLUMNS // ROWS) if TRANSPOSED else outs_here
    lists, mixed, _ = _list(table, side, across, length, of_side, TRANSPOSED)
    n = tl.load(mixed)
    PER_TILE: tl.constexpr = (ROWS if TRANSPOSED else COLUMNS) // STEP
    begin = n * split // splits * PER_TILE
    end = n * (split + 1) // splits * PER_TILE
    if begin == end:
        return
    mask_row = side * mask_rows
    out += z.to(tl.int64) * out_stride + tl.cast(out_begin, tl.int64) * d
    if SPLIT:
        g = tl.zeros((ROWS, WIDTH), tl.float32)
    else:
        g = block(out, o * ROWS, column, d, ROWS, WIDTH, False)
    if PARTS == 2:
        g *= LOW_SCALE  # exact, and undone below
    for part in tl.static_range(PARTS - 1, -1, -1):  # the low part of x^ first
        for t in range(begin, end):
            k = tl.load(lists + t // PER_TILE) * (PER_TILE * STEP) + t % PER_TILE * STEP
            if TRANSPOSED:
                m = tl.trans(block(masks, mask_row + k, o * ROWS, width, STEP, ROWS, TMA, LONG))
            else:
                m = block(masks, mask_row + o * ROWS, k, width, ROWS, STEP, TMA, LONG)
            g = tl.dot(m, block(x, part * padded + x_begin + k, column, d, STEP, WIDTH, TMA), g)
        if part == 1:
            g = g / LOW_SCALE
    # By `out_row`, which is d: with the same address as above the compiler keeps it for the whole sum, and spills.
    c = tl.arange(0, WIDTH)
    out += tl.cast(o * ROWS, tl.int64) * out_row + column
    tl.store(out + (tl.arange(0, ROWS)[:, None] * out_row + c[None, :]), g, mask=(column + c < d)[None, :])


@triton.jit(do_not_specialize=["g_begin", "first_tile", "length", "splits"])
def collect(
    g,  # [2, out rows, d] with `g_stride` from one matrix to the next
    parts,  # [2, splits, out rows, d] from `masked_sum`, if SPLIT
    sums,  # [tiles, d] from `tile_sums`
    table,  # as there; in a list the full tiles are at the end
    g_stride,
    g_begin,  # row of g that is the first out tile's
    first_tile,  # of `sums` in the panel
    d,
    length,
    splits,
    SPLIT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    RATIO: tl.constexpr,  # COLUMNS // ROWS
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Split sums and full tiles added to G: one program for an out tile, WIDTH columns and a side."""
    o, column, outs_here = tile_and_column(d, WIDTH)
    c = column + tl.arange(0, WIDTH)
    side = tl.program_id(1)
    across = o // RATIO if TRANSPOSED else o
    of_side = outs_here // RATIO if TRANSPOSED else outs_here
    lists, mixed, full = _list(table, side, across, length, of_side, TRANSPOSED)
    n_mixed = tl.load(mixed)
    n_full = tl.load(full)
    if not SPLIT:
        n_mixed = 0
    if n_mixed + n_full == 0:
        return
    sums += tl.cast(first_tile, tl.int64) * d
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
    target = g + side.to(tl.int64) * g_stride + tl.cast(g_begin, tl.int64) * d + place
    total = tl.load(target, mask=inside, other=0.0) + common[None, :]
    if SPLIT:
        part_stride = outs_here.to(tl.int64) * ROWS * d
        for split in range(splits):
            if n_mixed * split // splits < n_mixed * (split + 1) // splits:
                total += tl.load(parts + (side * splits + split) * part_stride + place, mask=inside, other=0.0)
    tl.store(target, total, mask=inside)


@triton.jit(do_not_specialize=["tiles"])
def totals(
    panels,  # [2, 2, tiles] from `lists`
    state,  # [STATE]; gets lambda / n, or without a loss 1 and 0, then 0 and 1; NaN if an embedding is not finite
    loss,  # [], likewise; or None
    penalty,  # [2], likewise
    count,  # [2]
    tiles,
    BLOCK: tl.constexpr,
):
    """Loss, penalties, counts and weights of the gradient, from those of the panels: one program."""
    LOSS: tl.constexpr = loss is not None
    check = tl.zeros((), tl.float64)
    for k in tl.static_range(4):  # of a number that is not finite it makes NaN
        check += 0.0 * tl.load(state + NUMBERS + k)
    broken = tl.load(state + BROKEN) + tl.load(state + BROKEN + 1)
    poison = tl.where((check == check) & (broken == 0), 0.0, float("nan")).to(tl.float64)
    value = tl.zeros((), tl.float64) + poison
    for side in tl.static_range(2):
        total = tl.zeros((BLOCK,), tl.float64)
        pairs = tl.zeros((BLOCK,), tl.int64)
        for k in range(0, tiles, BLOCK):
            t = k + tl.arange(0, BLOCK)
            total += tl.load(panels + side * tiles + t, mask=t < tiles, other=0.0)
            pairs += tl.load(panels + (2 + side) * tiles + t, mask=t < tiles, other=0.0).to(tl.int64)
        n = tl.sum(pairs)
        # Of a margin beyond +-2, which panels take as +-2, a hard pair has the rest to add.
        margin = tl.load(state + NUMBERS + side)
        excess = margin - tl.minimum(tl.maximum(margin, -2.0), 2.0)
        sum_ = tl.sum(total) + n.to(tl.float64) * (excess if side == 0 else -excess) + poison
        tl.store(penalty + side, sum_)
        tl.store(count + side, n)
        if LOSS:
            w = tl.load(state + NUMBERS + 2 + side) / tl.maximum(n, 1).to(tl.float64)
            tl.store(state + WEIGHTS + side, w + poison)
            value += w * sum_
        else:
            tl.store(state + WEIGHTS + 3 * side, 1.0 + poison)
            tl.store(state + WEIGHTS + side + 1, poison)
    if LOSS:
        tl.store(loss, value.to(tl.float32))


@triton.jit(do_not_specialize=["n"])
def project(
    x,  # [N, D] of any strides
    order,  # [N]
    norm,  # [2, padded], from `normalise`
    g,  # [2, padded, d_padded] G+, G-
    state,  # [STATE] from `totals`
    out,  # [N, D] dL/dx, contiguous, or [2, N, D] those of the penalties
    n,
    d,
    padded,
    g_stride,
    d_padded,
    x_row,
    x_column,
    factor,
    SET: tl.constexpr,
    EPSILON: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients in the order of the input, (g - (g . x^) x^) / |x|: one program for ROWS rows and a gradient."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    takes_part = r < tl.load(state + VALID + SET).to(tl.int32)
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
    w_plus = tl.load(state + WEIGHTS + 2 * side).to(tl.float32) * factor
    w_minus = tl.load(state + WEIGHTS + 2 * side + 1).to(tl.float32) * factor
    along = tl.zeros((ROWS,), tl.float32)
    for k in range(0, d, BLOCK):
        inside = takes_part[:, None] & (k + column < d)[None, :]
        here = g + r.to(tl.int64)[:, None] * d_padded + (k + column)[None, :]
        total = w_minus * tl.load(here + g_stride, inside, 0.0) - w_plus * tl.load(here, inside, 0.0)
        value = tl.load(x + (source * x_row)[:, None] + ((k + column) * x_column)[None, :], inside, 0.0)
        along += tl.sum(total * divide(as_float32(value), peak, length, ROWS, BLOCK), 1)
    along = tl.where(tiny, 0.0, along)
    for k in range(0, d, BLOCK):
        inside = takes_part[:, None] & (k + column < d)[None, :]
        here = g + r.to(tl.int64)[:, None] * d_padded + (k + column)[None, :]
        total = w_minus * tl.load(here + g_stride, inside, 0.0) - w_plus * tl.load(here, inside, 0.0)
        value = tl.load(x + (source * x_row)[:, None] + ((k + column) * x_column)[None, :], inside, 0.0)
        grad = total - along[:, None] * divide(as_float32(value), peak, length, ROWS, BLOCK)
        grad = divide(grad, length, peak, ROWS, BLOCK)
        grad = tl.where(is_zero[:, None], 0.0 * total, grad)
        grad = tl.where(takes_part[:, None], grad, 0.0)
        written = (r < n)[:, None] & (k + column < d)[None, :]
        tl.store(out + source[:, None] * d + (k + column)[None, :], grad, mask=written)
