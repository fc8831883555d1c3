"""The kernels compiled just in time. cython_kernels.pyx is this file's twin.

Read it downwards: the plan (how the data is cut, by shape alone); then for each kernel its strip (the hot loop), its
rows and runs, its task (one tile of one chunk); and the workers (what one thread does in one stage of a call).
numba_calls.py starts them; what Numba has no word for is in numba_machine.py.

The loops work on bare pointers, as the twin's do: an array's index is tested for being negative, and its inner stride
is unknown, and either keeps a loop from being vectorised. Of fastmath only contraction: the rest takes NaN for a
number.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from fastbn.kernels.numba_machine import (
    INTERNAL,
    LINE,
    address,
    at,
    copy,
    helper,
    inline,
    loaded,
    local,
    prefetch,
    prefetch_write,
    restrict,
    stream_end,
    stream_line,
    wide_vectors,
    zero,
)

ROWS = 8               # wide rows a step: accumulators are loaded and stored once for eight rows
STRIP = 16             # columns a step: a literal, so that the strip is unrolled and vectorised
TILE = 512             # columns whose accumulators a task keeps on its stack (12 KiB of L1)
LANES = STRIP          # accumulators a channel where the inner axis is swept: one strip
SHORT_INNER = 32       # inner axes shorter than this are swept as columns
INNER_TILE = 8         # channels a tile where the inner axis is swept, at most
INNER_TILE_SIZE = 1 << 17  # and elements a tile, so that it stays in the cache
BLOCK_ROWS = 128       # wide rows a block; a block has one pivot
BLOCK_INNER = 8192     # inner elements a channel a block
PIVOT_SHARE = 32       # the pivot is the mean of a block's first values, one in so many
MAX_CHUNKS = 64        # partial results a channel, at most; so also the threads that can share a column
SERIAL_BYTES = 65536   # a thread's fair share: below it, waking the thread costs more than it saves
NARROW = 32            # rows apart of fewer columns are first copied together (20 columns: 20 % less time)
STREAM_BYTES = 1 << 24  # outputs from here on bypass the caches
COLUMNS_AHEAD = 128    # columns that the sums fetch ahead, or half so many of each of two arrays
AHEAD = 512            # elements that the elementwise passes fetch ahead
PIECE = 64             # and take in one step: of a shorter literal LLVM makes scalars
SERIAL_MERGES = 32768  # below so many partial results one thread merges them: starting the team takes longer
BUFFER = ROWS * TILE   # elements of a task's buffers
# Where a tile's coefficients lie in its one array, so that a strip takes one pointer for all of them. Behind those of a
# wide row lie those of the next one's first piece, so that a piece may run over the end of a row.
PITCH = TILE + PIECE
CENTER = 0             # y = (x - center) * scale + offset
SCALE = PITCH
OFFSET = 2 * PITCH
FACTOR = 3 * PITCH     # grad_x = factor * (((dy - shift) - rest) - (x - center) * slope)
SLOPE = 4 * PITCH
SHIFT = 5 * PITCH
REST = 6 * PITCH
COEFS = 7 * PITCH + PIECE
assert INNER_TILE * PIECE <= TILE
# How an output is written:
DIRECT = 0
BUFFERED = 1           # by way of a buffer: it is the input, and restrict() wants loops that write elsewhere
STREAMED = 2           # past the caches

# Fused multiply-adds, 20 % faster in the cache. Only for the sums: gate and affine must agree to the last bit.
sums_helper = njit(**INTERNAL, fastmath={"contract"})


# ---------------------------------------------------------------------------------------------------------------------
# The plan: blocks of rows (or of inner elements) make a chunk, a chunk has one partial result a channel, channels come
# in tiles; a task is one tile of one chunk. All of it follows from the shape, so the bits never depend on the threads.
# ---------------------------------------------------------------------------------------------------------------------

class Plan(NamedTuple):
    outer: int
    channels: int
    inner: int
    by_inner: bool    # sweep along the inner axis instead of across the columns
    repeat: int       # accumulators side by side that belong to one channel
    fold: int         # rows laid side by side to make a wide row (narrow data)
    tile: int         # channels a tile
    n_tiles: int
    block_outer: int  # outer rows a block
    block_inner: int  # inner elements a block
    n_segments: int   # blocks that share their outer rows
    n_blocks: int
    chunk: int        # blocks a chunk
    n_chunks: int


class Block(NamedTuple):
    row: int
    n_rows: int
    start: int        # along the inner axis
    length: int


class Band(NamedTuple):  # what one thread does of an elementwise pass: of the tasks
    first: int        # from here
    last: int         # up to here
    row: int          # the rows from here
    end: int          # up to here


@helper
def ceil_div(a, b):
    return (a + b - 1) // b


@helper
def make_plan(outer, channels, inner):
    by_inner = inner >= SHORT_INNER
    repeat = LANES if by_inner else inner
    tile = INNER_TILE if by_inner else TILE // repeat
    while by_inner and tile > 1 and tile * outer * inner > INNER_TILE_SIZE:  # halved: tiles divide among threads
        tile //= 2
    n_tiles = ceil_div(channels, tile)
    tile = ceil_div(channels, n_tiles)
    if not by_inner and n_tiles > 1:
        tile = min(ceil_div(tile, LANES) * LANES, TILE // repeat)
    n_tiles = ceil_div(channels, tile)
    fold = 1
    if by_inner:
        block_inner = min(inner, BLOCK_INNER)
        block_outer = max(1, BLOCK_INNER // inner)
    else:
        while n_tiles == 1 and 2 * fold * channels * inner <= TILE and fold * BLOCK_ROWS <= outer:
            fold *= 2
        block_inner = inner
        block_outer = fold * BLOCK_ROWS
    n_segments = ceil_div(inner, block_inner)
    n_blocks = ceil_div(outer, block_outer) * n_segments
    chunk = ceil_div(n_blocks, MAX_CHUNKS)
    n_chunks = ceil_div(n_blocks, chunk)
    return Plan(outer, channels, inner, by_inner, repeat, fold, tile, n_tiles, block_outer, block_inner,
                n_segments, n_blocks, chunk, n_chunks)


@helper
def block_at(plan, index):
    row = index // plan.n_segments * plan.block_outer
    start = index % plan.n_segments * plan.block_inner
    return Block(row, min(plan.block_outer, plan.outer - row), start, min(plan.block_inner, plan.inner - start))


@helper
def block_within(plan, index, band):
    """Of the block those rows that are in the band, perhaps none."""
    block = block_at(plan, index)
    row, end = max(block.row, band.row), min(block.row + block.n_rows, band.end)
    return Block(row, max(0, end - row), block.start, block.length)


@helper
def team_wanted(plan, itemsize, num_threads):
    """How many of num_threads are worth waking: no more than there are tasks, each with its fair share of bytes."""
    n = min(num_threads, plan.n_chunks * plan.n_tiles)
    return max(1, min(n, plan.outer * plan.channels * plan.inner * itemsize // SERIAL_BYTES))


# ---------------------------------------------------------------------------------------------------------------------
# Wide rows: n_rows rows of `width` columns are laid side by side to make rows of fold * width columns.
# ---------------------------------------------------------------------------------------------------------------------

@helper
def spread(row, channels, repeat, fold, wide):
    """wide[(f * channels + c) * repeat + i] = row[c] for each f and i."""
    width = channels * repeat
    for c in range(channels):
        for i in range(repeat):
            wide[c * repeat + i] = row[c]
    for j in range(width, fold * width):
        wide[j] = wide[j - width]


@helper
def fold_sums(wide, channels, repeat, fold):
    """The inverse of spread: wide[c] becomes the sum over each f and i, in place."""
    width = channels * repeat * fold
    while fold > 1:
        fold //= 2
        width //= 2
        for j in range(width):
            wide[j] += wide[width + j]
    if repeat > 1:
        for c in range(channels):
            total = 0.0
            for i in range(repeat):
                total += wide[c * repeat + i]
            wide[c] = total


@helper
def lead(stride, width):
    """How many elements ahead to fetch: AHEAD of them, which are whole rows where short rows lie apart. Beyond their
    ends lies what other tasks want."""
    return AHEAD if stride == width or width >= 4 * AHEAD else stride * max(1, AHEAD // width)


@inline
def prefetch_strip(x, n):
    """The lines of the n elements at x."""
    for i in range(0, n, LINE // (address(at(x, 1)) - address(x))):
        prefetch(at(x, i))


@inline
def prefetch_strip_write(y, n):
    for i in range(0, n, LINE // (address(at(y, 1)) - address(y))):
        prefetch_write(at(y, i))


@helper
def gather(x, stride, n_rows, width, buffer):
    """The rows one behind the other: x itself where they lie so already, else a copy in buffer."""
    if stride == width or n_rows == 1:
        return x
    for r in range(n_rows):
        prefetch_strip(at(x, (r + n_rows) * stride), width)
        for j in range(width):
            buffer[r * width + j] = x[r * stride + j]
    return buffer


# ---------------------------------------------------------------------------------------------------------------------
# moments: sums about a pivot near the mean, in one read of the data.
#
#     s1 = sum(x - pivot)    s2 = sum((x - pivot)^2)    mean = pivot    rest = s1 / n    m2 = s2 - s1^2 / n
#
# The pivot is the mean of the block's first rows, k of its n values, so (mean - pivot)^2 <= m2 / k, and the subtraction
# costs at most a factor 1 + n / k <= 33 of float64's 1e-16, whatever the data. It is computed as first + mean(x -
# first), so a constant column has deviations of exactly 0.
#
# The mean is mean + rest, two floats: in one, 1e-16 of a large mean, times delta, would add up in m2 as blocks merge.
# ---------------------------------------------------------------------------------------------------------------------

@inline
def sums_strip(
    x,          # IN   (n_rows, n_columns), rows `stride` apart
    stride,
    n_rows,     # a literal, so that the loop over the rows is unrolled and the one over the columns vectorised
    n_columns,
    pivot,      # IN   (n_columns,) float64
    s1,         # INOUT
    s2,         # INOUT
):
    for j in range(n_columns):
        a = 0.0
        b = 0.0
        for r in range(n_rows):
            d = x[r * stride + j] - pivot[j]
            a += d
            b += d * d
        s1[j] += a
        s2[j] += b


@inline
def coming(x, stride, n_rows, width, j, ahead):
    """What lies `ahead` columns behind column j of these rows: there, or in the next n_rows rows."""
    if stride == LANES:  # a channel's run; the next rows would be too near
        return at(x, j + ahead)
    k = j + min(width, ahead)
    return at(x, k if k < width else n_rows * stride + k - width)


@inline
def prefetch_rows(x, stride, n_rows, width, j, ahead):
    """A strip of each row of what is coming."""
    strip = coming(x, stride, n_rows, width, j, ahead)
    for r in range(n_rows):
        if stride == LANES:
            prefetch_strip(at(strip, r * stride), STRIP)
        else:  # of columns, both lines of float64 would take longer
            prefetch(at(strip, r * stride))


@inline
def sums_group(x, stride, n_rows, width, ahead, pivot, s1, s2):
    done = width // STRIP * STRIP
    for j in range(0, done, STRIP):
        prefetch_rows(x, stride, n_rows, width, j, ahead)
        # Of a literal width: with another, LLVM kept a pointer for each row, most of them on the stack (22 % longer).
        sums_strip(at(x, j), stride, n_rows, STRIP, at(pivot, j), at(s1, j), at(s2, j))
    sums_strip(at(x, done), stride, n_rows, width - done, at(pivot, done), at(s1, done), at(s2, done))


@inline
def sums_rows_as(x, stride, n_rows, width, ahead, pivot, s1, s2):
    done = n_rows // ROWS * ROWS
    for r in range(0, done, ROWS):
        sums_group(at(x, r * stride), stride, ROWS, width, ahead, pivot, s1, s2)
    if n_rows & 4:
        sums_group(at(x, done * stride), stride, 4, width, ahead, pivot, s1, s2)
        done += 4
    for r in range(done, n_rows):
        sums_strip(at(x, r * stride), stride, 1, width, pivot, s1, s2)


@sums_helper
def sums_rows(x, stride, n_rows, width, rest, pivot, s1, s2):
    """n_rows rows, and the first `rest` columns of one more."""
    restrict()
    wide_vectors()
    sums_rows_as(x, stride, n_rows, width, COLUMNS_AHEAD, pivot, s1, s2)
    sums_strip(at(x, n_rows * stride), stride, 1, rest, pivot, s1, s2)


@inline
def sums_run(x, length, width, pivot, s1, s2):
    """A contiguous run as rows of `width`, the last of them perhaps shorter."""
    sums_rows(x, width, length // width, width, length % width, pivot, s1, s2)


@sums_helper
def sums_lanes(x, length, ahead, pivot, s1, s2):
    """The same as rows of LANES: by a literal, runs of 196 take two thirds of the time."""
    restrict()
    wide_vectors()
    n_rows = length // LANES
    sums_rows_as(x, LANES, n_rows, LANES, ahead, pivot, s1, s2)
    sums_strip(at(x, n_rows * LANES), LANES, 1, length - n_rows * LANES, pivot, s1, s2)


@inline
def sums_apart(x, stride, n_rows, width, fold, pivot, s1, s2):
    """ROWS wide rows, of `fold` rows each that lie apart (n_rows in all): summed where they lie."""
    for f in range(fold):
        j = f * width
        sums_rows(at(x, f * stride), fold * stride, n_rows // fold, width, width - width,
                  at(pivot, j), at(s1, j), at(s2, j))


@inline
def sums_block(x, stride, n_rows, length, channels, plan, buffer, pivot, s1, s2):
    width = channels * plan.repeat
    for j in range(width * plan.fold):
        s1[j] = 0
        s2[j] = 0
    if plan.by_inner:
        for r in range(n_rows):
            for c in range(channels):
                n = c * LANES
                sums_lanes(at(x, r * stride + c * plan.inner), length, lead(stride, channels * plan.inner),
                           at(pivot, n), at(s1, n), at(s2, n))
    elif plan.fold == 1:
        sums_rows(x, stride, n_rows, width, width - width, pivot, s1, s2)
    elif stride == width:
        sums_run(x, n_rows * width, plan.fold * width, pivot, s1, s2)
    else:
        step = ROWS * plan.fold
        for r in range(0, n_rows, step):
            n = min(step, n_rows - r)
            if n == step and width >= NARROW:
                sums_apart(at(x, r * stride), stride, n, width, plan.fold, pivot, s1, s2)
            else:
                sums_run(gather(at(x, r * stride), stride, n, width, buffer), n * width, plan.fold * width,
                         pivot, s1, s2)
    fold_sums(s1, channels, plan.repeat, plan.fold)
    fold_sums(s2, channels, plan.repeat, plan.fold)


@helper
def merge_moments(n_a, mean, rest, m2, n_b, mean_b, rest_b, m2_b, channels):
    """Chan, Golub and LeVeque (1979): delta = mean_b - mean, m2 += m2_b + delta^2 n_a n_b / (n_a + n_b)."""
    restrict()
    weight = n_b / (n_a + n_b)
    cross = n_a * (n_b / (n_a + n_b))
    if n_a == 0:  # delta^2 could overflow
        for c in range(channels):
            mean[c] = mean_b[c]
            rest[c] = rest_b[c]
            m2[c] = m2_b[c]
        return
    for c in range(channels):
        delta = (mean_b[c] - mean[c]) + (rest_b[c] - rest[c])
        rest[c] += delta * weight
        m2[c] += m2_b[c] + delta * delta * cross


@helper
def settle(mean, rest, channels):
    """mean takes of rest what it can hold, without loss (Knuth's two-sum)."""
    restrict()
    for c in range(channels):
        total = mean[c] + rest[c]
        added = total - mean[c]
        rest[c] = (mean[c] - (total - added)) + (rest[c] - added)
        mean[c] = total


@inline
def moments_task(
    x, stride, plan, chunk, tile,
    mean,       # OUT  (channels,) of this chunk
    rest,       # OUT
    m2,         # OUT
):
    buffer = local(BUFFER, x)
    pivot = local(TILE, 0.0)
    s1 = local(TILE, 0.0)
    s2 = local(TILE, 0.0)
    mean_b = local(TILE, 0.0)
    c0 = tile * plan.tile
    channels = min(plan.tile, plan.channels - c0)
    mean, rest, m2 = at(mean, c0), at(rest, c0), at(m2, c0)
    count = n = 0.0
    for index in range(chunk * plan.chunk, min((chunk + 1) * plan.chunk, plan.n_blocks)):
        block = block_at(plan, index)
        first = at(x, block.row * stride + c0 * plan.inner + block.start)
        k = ceil_div(block.n_rows * block.length, PIVOT_SHARE)
        k_length = min(block.length, k) if plan.by_inner else block.length
        k_rows = ceil_div(k, k_length)
        for c in range(channels):
            mean_b[c] = first[c * plan.inner]
            s1[c] = 0
        weight = 0.0
        # The first rows about the first row give the pivot; all rows about the pivot give the sums.
        for n_rows, length in ((k_rows, k_length), (block.n_rows, block.length)):
            if k == 1 and n_rows < block.n_rows:  # of 32 rows, the first is the pivot as it is
                continue
            for c in range(channels):
                mean_b[c] += s1[c] * weight
            spread(mean_b, channels, plan.repeat, plan.fold, pivot)
            sums_block(first, stride, n_rows, length, channels, plan, buffer, pivot, s1, s2)
            weight = 1 / float(n_rows * length)  # multiplied by: divisions took a fifth of a block
        n = float(block.n_rows * block.length)
        for c in range(channels):
            s2[c] -= s1[c] * (s1[c] * weight)
            s1[c] *= weight
        merge_moments(count, mean, rest, m2, n, mean_b, s1, s2, channels)
        count += n
    if count > n:  # a first row far off takes the first pivot along: so large a rest would cost the mean two digits
        settle(mean, rest, channels)


@helper
def chunk_count(plan, chunk):
    """Values a channel in the first `chunk` chunks."""
    n_blocks = min(chunk * plan.chunk, plan.n_blocks)
    if n_blocks == plan.n_blocks:
        return float(plan.outer * plan.inner)
    block = block_at(plan, n_blocks)
    return float(block.row * plan.inner + block.start * min(plan.block_outer, plan.outer - block.row))


@helper
def merge_chunks(plan, mean, rest, m2, partial, c0, c1):
    """Chunks 1, 2, ... into chunk 0, in that order, for channels c0 to c1."""
    row = plan.channels
    for chunk in range(1, plan.n_chunks):
        before = chunk_count(plan, chunk)
        after = chunk_count(plan, chunk + 1)
        b = at(partial, 3 * chunk * row + c0)
        merge_moments(before, at(mean, c0), at(rest, c0), at(m2, c0), after - before,
                      b, at(b, row), at(b, 2 * row), c1 - c0)


# ---------------------------------------------------------------------------------------------------------------------
# The per-channel arithmetic between the passes, in float64.
# ---------------------------------------------------------------------------------------------------------------------

@helper
def normalize_channels(
    plan, c0, c1,
    mean,       # IN   (channels,) float64
    rest,       # IN   (channels,) float64: what mean lacks
    has_rest,   # IN   False: nothing
    m2,         # IN   (channels,) float64
    n,
    gamma,      # IN   (channels,)
    has_gamma,  # IN   False: ones
    beta,       # IN   (channels,)
    has_beta,   # IN   False: zeros
    eps,
    stats,      # OUT  (3, channels) float64: mean, var, invstd
    coefs,      # OUT  (3, channels): center, scale, offset
):
    """The mean in two floats: what the data's dtype holds is the center, the rest goes into the offset."""
    restrict()
    var, invstd = at(stats, plan.channels), at(stats, 2 * plan.channels)
    scale, offset = at(coefs, plan.channels), at(coefs, 2 * plan.channels)
    weight = 1 / n
    if int(n) & (int(n) - 1):
        for c in range(c0, c1):
            var[c] = m2[c] / n
    else:  # a power of two (at inference 1): the product is exact
        for c in range(c0, c1):
            var[c] = m2[c] * weight
    for c in range(c0, c1):
        invstd[c] = 1 / np.sqrt(var[c] + eps)
    for c in range(c0, c1):
        stats[c] = mean[c]
        coefs[c] = mean[c]
    for c in range(c0, c1):
        scale[c] = invstd[c] * gamma[c] if has_gamma else invstd[c]
    for c in range(c0, c1):
        offset[c] = -((mean[c] - coefs[c]) + (rest[c] if has_rest else 0.0)) * scale[c]
    if has_beta:
        for c in range(c0, c1):
            offset[c] += beta[c]


@helper
def gradient_channels(
    plan, c0, c1,
    sum_dy,     # IN   (channels,) float64
    sum_dy_xmu, # IN   (channels,) float64
    stats,      # IN   (3, channels) float64: mean, var, invstd
    coefs,      # IN   (3, channels): center, scale, offset
    training,   # IN   False: the statistics were constants, so they pass no gradient on
    linear,     # OUT  (4, channels): factor, slope, shift, rest
    grads,      # OUT  (2, channels): grad_gamma, grad_beta
):
    """The shift, mean(dy) less what center lacks of the mean, in two floats; the factor stays outside, so that the
    slope is about 1 / std and neither under- nor overflows."""
    restrict()
    channels = plan.channels
    n = float(plan.outer * plan.inner)
    invstd, scale, grad_beta = at(stats, 2 * channels), at(coefs, channels), at(grads, channels)
    slope, shift, rest = at(linear, channels), at(linear, 2 * channels), at(linear, 3 * channels)
    for c in range(c0, c1):
        grads[c] = invstd[c] * sum_dy_xmu[c]
        grad_beta[c] = sum_dy[c]
        linear[c] = scale[c]
        k = invstd[c] * (invstd[c] * (sum_dy_xmu[c] / n)) if training else 0.0
        d = sum_dy[c] / n - k * (stats[c] - coefs[c]) if training else 0.0
        slope[c] = k
        shift[c] = d
        rest[c] = d - shift[c]


@inline
def spread_rows(
    rows,       # IN   (n, channels)
    n, plan, c0, channels, repeat,
    wide,       # OUT  (n, PITCH)
):
    width = channels * repeat * plan.fold
    for i in range(n):
        row = at(wide, i * PITCH)
        spread(at(rows, i * plan.channels + c0), channels, repeat, plan.fold, row)
        if not plan.by_inner:
            for j in range(PIECE):
                row[width + j] = row[j]


# ---------------------------------------------------------------------------------------------------------------------
# Pieces and runs of the elementwise passes. What goes past the caches begins with a cache line, wherever in a row that
# is: the coefficients of a row are followed by those of the next one, so a piece may run over its end.
# ---------------------------------------------------------------------------------------------------------------------

@helper
def before_line(y):
    """How many elements lie before the first whole cache line."""
    return (-address(y) & (LINE - 1)) // (address(at(y, 1)) - address(y))


@inline
def place_coefs(memory, skip):
    """Where to put coefficients so that those behind the first `skip` columns begin with a line, as memory does."""
    return at(memory, (PIECE - skip) % PIECE)


@helper
def begin_stream(y, length, ahead):
    """How many elements at y to store through the caches. The lines that hold the ends of a run are fetched, this
    run's last and the first of one `ahead`: they are shared with other runs."""
    if before_line(at(y, length)):
        prefetch_write(at(y, length))
    if before_line(y):
        prefetch_write(at(y, ahead))
    return min(length, before_line(y))


@inline
def put_piece(y, piece, n):
    """Store n elements at y, which is aligned to LINE, past the caches, but for a part of a line."""
    step = LINE // (address(at(y, 1)) - address(y))
    done = n // step * step
    for i in range(0, done, step):
        stream_line(at(y, i), at(piece, i))
    for i in range(done, n):
        y[i] = piece[i]


@helper
def has_whole_lines(y, stride):
    """Whether every row begins with a line."""
    return before_line(y) == 0 and before_line(at(y, stride)) == 0


# ---------------------------------------------------------------------------------------------------------------------
# affine: y = (x - center) * scale + offset, then the activation.
# ---------------------------------------------------------------------------------------------------------------------

@inline
def affine_strip(
    x,          # IN   (n_columns,)
    n_columns,
    coefs,      # IN   at CENTER, SCALE, OFFSET
    relu,
    y,          # OUT
):
    for j in range(n_columns):
        value = (x[j] - coefs[CENTER + j]) * coefs[SCALE + j] + coefs[OFFSET + j]
        y[j] = zero(value) if relu & (value <= 0) else value


@inline
def affine_piece(x, x_ahead, n, coefs, relu, stream, y, y_ahead):
    prefetch_strip(at(x, x_ahead), n)
    if not stream:
        prefetch_strip_write(at(y, y_ahead), n)
    if stream:
        piece = local(PIECE, x)
        affine_strip(x, n, coefs, relu, piece)
        put_piece(y, piece, n)
    else:
        affine_strip(x, n, coefs, relu, y)


@inline
def affine_rows_as(x, x_ahead, length, column, width, coefs, each, relu, stream, y, y_ahead):
    i, j = 0, column
    while i + PIECE <= length:
        affine_piece(at(x, i), x_ahead, PIECE, at(coefs, j), relu, stream, at(y, i), y_ahead)
        i += PIECE
        j += PIECE * each
        while j >= width:
            j -= width
    affine_piece(at(x, i), x_ahead, length - i, at(coefs, j), relu, stream, at(y, i), y_ahead)


@helper
def affine_rows(
    x, x_ahead, length, column, width, coefs,
    each,       # 1: every column has its coefficients, 0: a channel's are there for all the columns of a piece
    relu, stream, y, y_ahead,
):
    """A contiguous run as rows of `width`, the first from `column` on, the last of them perhaps shorter."""
    restrict()
    wide_vectors()
    if stream:
        affine_rows_as(x, x_ahead, length, column, width, coefs, each, relu, True, y, y_ahead)
    else:
        affine_rows_as(x, x_ahead, length, column, width, coefs, each, relu, False, y, y_ahead)


@helper
def affine_run(x, x_ahead, length, width, coefs, each, relu, route, buffer, y, y_ahead):
    """A contiguous run, stored by its route."""
    i = none = 0 * length  # no literal: each would have a version of the loops of its own (three times the compilation)
    if route == BUFFERED:
        while i < length:
            n = min(BUFFER, length - i)
            affine_rows(at(x, i), x_ahead, n, i % width * each, width, coefs, each, relu, none, buffer, none)
            copy(at(y, i), buffer, n)
            i += n
    else:
        stream = int(route == STREAMED)
        if stream:
            i = begin_stream(y, length, each * y_ahead)
        elif each * length > width:  # several rows
            i = min(length, before_line(x))
        if i:
            affine_rows(x, x_ahead, i, none, width, coefs, each, relu, none, y, y_ahead)
        affine_rows(at(x, i), x_ahead, length - i, i % width * each, width, coefs, each, relu, stream,
                    at(y, i), y_ahead)


@inline
def affine_task(
    x, stride, plan, band, chunk, tile,
    channel_coefs,  # IN   (3, channels): center, scale, offset
    relu, route,
    y, y_stride,
):
    memory = local(COEFS, x)
    buffer = local(BUFFER, x)
    x_buffer = local(BUFFER, x)
    c0 = tile * plan.tile
    channels = min(plan.tile, plan.channels - c0)
    width = channels * plan.repeat
    step = ROWS * plan.fold
    one_run = not plan.by_inner and stride == width and y_stride == width
    coefs = place_coefs(memory, before_line(y if route == STREAMED else x) if one_run else 0)
    repeat = PIECE if plan.by_inner else plan.repeat  # a channel's coefficients, for a whole piece
    spread_rows(channel_coefs, 3, plan, c0, channels, repeat, coefs)
    x = at(x, c0 * plan.inner)
    y = at(y, c0 * plan.inner)
    each = 0 if plan.by_inner else 1
    segment = channels * plan.inner if plan.by_inner else width
    x_ahead, y_ahead = lead(stride, segment), lead(y_stride, segment)
    whole = plan.fold == 1 or has_whole_lines(y, y_stride)
    row_route = DIRECT if route == STREAMED and not whole else route
    # Backwards: the end of the chunk, read last by moments_task, is still in the cache.
    for index in range(min((chunk + 1) * plan.chunk, plan.n_blocks) - 1, chunk * plan.chunk - 1, -1):
        block = block_within(plan, index, band)
        last = block.row + block.n_rows
        if plan.by_inner:
            for r in range(block.row, last):
                for c in range(channels):
                    i = c * plan.inner + block.start
                    affine_run(at(x, r * stride + i), x_ahead, block.length, block.length,
                               at(coefs, c * PIECE), each, relu, route, buffer, at(y, r * y_stride + i), y_ahead)
        elif one_run:
            i = block.row * width
            affine_run(at(x, i), x_ahead, block.n_rows * width, plan.fold * width, coefs, each, relu,
                       route, buffer, at(y, i), y_ahead)
        elif width < NARROW and y_stride == width:
            for r in range(block.row, last, step):
                n = min(step, last - r)
                affine_run(gather(at(x, r * stride), stride, n, width, x_buffer), 0 * width, n * width,
                           plan.fold * width, coefs, each, relu, route, buffer, at(y, r * width), y_ahead)
        else:
            for r in range(block.row, last):
                affine_run(at(x, r * stride), x_ahead, width, width, coefs, each, relu,
                           row_route, buffer, at(y, r * y_stride), y_ahead)


# ---------------------------------------------------------------------------------------------------------------------
# grad_moments: sum_dy = sum(dy), sum_dy_xmu = sum(dy * (x - mean)); where a fused ReLU was off, dy counts as 0.
# ---------------------------------------------------------------------------------------------------------------------

@helper
def gate(dy, x, coefs, i, relu):
    return zero(dy) if relu & ((x - coefs[CENTER + i]) * coefs[SCALE + i] + coefs[OFFSET + i] <= 0) else dy


@inline
def grad_sums_strip(
    dy,         # IN   (n_rows, n_columns), rows `dy_stride` apart
    dy_stride,
    x,          # IN   (n_rows, n_columns), rows `x_stride` apart
    x_stride,
    n_rows,     # a literal
    n_columns,
    mean,       # IN   (n_columns,) float64
    coefs,      # IN   at CENTER, SCALE, OFFSET
    relu,
    s1,         # INOUT
    s2,         # INOUT
):
    for j in range(n_columns):
        a = 0.0
        b = 0.0
        for r in range(n_rows):
            g = float(gate(dy[r * dy_stride + j], x[r * x_stride + j], coefs, j, relu))
            a += g
            b += g * (x[r * x_stride + j] - mean[j])
        s1[j] += a
        s2[j] += b


@inline
def grad_sums_group(dy, dy_stride, x, x_stride, n_rows, width, dy_ahead, x_ahead, mean, coefs, relu, s1, s2):
    done = width // STRIP * STRIP
    for j in range(0, done, STRIP):
        prefetch_rows(dy, dy_stride, n_rows, width, j, dy_ahead)
        prefetch_rows(x, x_stride, n_rows, width, j, x_ahead)
        grad_sums_strip(at(dy, j), dy_stride, at(x, j), x_stride, n_rows, STRIP,
                        at(mean, j), at(coefs, j), relu, at(s1, j), at(s2, j))
    grad_sums_strip(at(dy, done), dy_stride, at(x, done), x_stride, n_rows, width - done,
                    at(mean, done), at(coefs, done), relu, at(s1, done), at(s2, done))


@inline
def grad_sums_rows_as(dy, dy_stride, x, x_stride, n_rows, width, dy_ahead, x_ahead, mean, coefs, relu, s1, s2):
    done = n_rows // ROWS * ROWS
    for r in range(0, done, ROWS):
        grad_sums_group(at(dy, r * dy_stride), dy_stride, at(x, r * x_stride), x_stride, ROWS, width,
                        dy_ahead, x_ahead, mean, coefs, relu, s1, s2)
    if n_rows & 4:
        grad_sums_group(at(dy, done * dy_stride), dy_stride, at(x, done * x_stride), x_stride, 4, width,
                        dy_ahead, x_ahead, mean, coefs, relu, s1, s2)
        done += 4
    for r in range(done, n_rows):
        grad_sums_strip(at(dy, r * dy_stride), dy_stride, at(x, r * x_stride), x_stride, 1, width,
                        mean, coefs, relu, s1, s2)


@sums_helper
def grad_sums_rows(dy, dy_stride, x, x_stride, n_rows, width, rest, mean, coefs, relu, s1, s2):
    """n_rows rows, and the first `rest` columns of one more."""
    restrict()
    wide_vectors()
    ahead = COLUMNS_AHEAD // 2
    grad_sums_rows_as(dy, dy_stride, x, x_stride, n_rows, width, ahead, ahead, mean, coefs, relu, s1, s2)
    grad_sums_strip(at(dy, n_rows * dy_stride), dy_stride, at(x, n_rows * x_stride), x_stride, 1, rest,
                    mean, coefs, relu, s1, s2)


@inline
def grad_sums_run(dy, x, length, width, mean, coefs, relu, s1, s2):
    """A contiguous run as rows of `width`, the last of them perhaps shorter."""
    grad_sums_rows(dy, width, x, width, length // width, width, length % width, mean, coefs, relu, s1, s2)


@sums_helper
def grad_sums_lanes(dy, dy_ahead, x, x_ahead, length, mean, coefs, relu, s1, s2):
    """The same as rows of LANES."""
    restrict()
    wide_vectors()
    n_rows = length // LANES
    done = n_rows * LANES
    grad_sums_rows_as(dy, LANES, x, LANES, n_rows, LANES, dy_ahead, x_ahead, mean, coefs, relu, s1, s2)
    grad_sums_strip(at(dy, done), LANES, at(x, done), LANES, 1, length - done, mean, coefs, relu, s1, s2)


@inline
def grad_sums_apart(dy, dy_stride, x, x_stride, n_rows, width, fold, mean, coefs, relu, s1, s2):
    """ROWS wide rows, of `fold` rows each that lie apart (n_rows in all): summed where they lie."""
    for f in range(fold):
        j = f * width
        grad_sums_rows(at(dy, f * dy_stride), fold * dy_stride, at(x, f * x_stride), fold * x_stride, n_rows // fold,
                       width, width - width, at(mean, j), at(coefs, j), relu, at(s1, j), at(s2, j))


@inline
def grad_moments_task(
    dy, dy_stride, x, x_stride, plan, chunk, tile,
    channel_mean,   # IN   (channels,) float64
    channel_coefs,  # IN   (3, channels): center, scale, offset
    relu,
    sum_dy,         # OUT  (channels,) of this chunk
    sum_dy_xmu,     # OUT
):
    dy_buffer = local(BUFFER, x)
    x_buffer = local(BUFFER, x)
    coefs = local(COEFS, x)
    mean = local(PITCH, 0.0)
    s1 = local(TILE, 0.0)
    s2 = local(TILE, 0.0)
    c0 = tile * plan.tile
    channels = min(plan.tile, plan.channels - c0)
    width = channels * plan.repeat
    wide = plan.fold * width
    step = ROWS * plan.fold
    spread_rows(channel_mean, 1, plan, c0, channels, plan.repeat, mean)
    spread_rows(channel_coefs, 3, plan, c0, channels, plan.repeat, coefs)
    dy = at(dy, c0 * plan.inner)
    x = at(x, c0 * plan.inner)
    sum_dy = at(sum_dy, c0)
    sum_dy_xmu = at(sum_dy_xmu, c0)
    for c in range(channels):
        sum_dy[c] = 0
        sum_dy_xmu[c] = 0
    for index in range(chunk * plan.chunk, min((chunk + 1) * plan.chunk, plan.n_blocks)):
        block = block_at(plan, index)
        last = block.row + block.n_rows
        for j in range(wide):
            s1[j] = 0
            s2[j] = 0
        if plan.by_inner:
            for r in range(block.row, last):
                for c in range(channels):
                    i = c * plan.inner + block.start
                    n = c * LANES
                    grad_sums_lanes(at(dy, r * dy_stride + i), lead(dy_stride, channels * plan.inner),
                                    at(x, r * x_stride + i), lead(x_stride, channels * plan.inner), block.length,
                                    at(mean, n), at(coefs, n), relu, at(s1, n), at(s2, n))
        elif plan.fold == 1:
            grad_sums_rows(at(dy, block.row * dy_stride), dy_stride, at(x, block.row * x_stride), x_stride,
                           block.n_rows, width, width - width, mean, coefs, relu, s1, s2)
        elif dy_stride == width and x_stride == width:
            i = block.row * width
            grad_sums_run(at(dy, i), at(x, i), block.n_rows * width, wide, mean, coefs, relu, s1, s2)
        else:
            for r in range(block.row, last, step):
                n = min(step, last - r)
                if n == step and width >= NARROW:
                    grad_sums_apart(at(dy, r * dy_stride), dy_stride, at(x, r * x_stride), x_stride, n, width,
                                    plan.fold, mean, coefs, relu, s1, s2)
                else:
                    grad_sums_run(gather(at(dy, r * dy_stride), dy_stride, n, width, dy_buffer),
                                  gather(at(x, r * x_stride), x_stride, n, width, x_buffer),
                                  n * width, wide, mean, coefs, relu, s1, s2)
        fold_sums(s1, channels, plan.repeat, plan.fold)
        fold_sums(s2, channels, plan.repeat, plan.fold)
        for c in range(channels):
            sum_dy[c] += s1[c]
            sum_dy_xmu[c] += s2[c]


@helper
def add_chunks(plan, sums, c0, c1):
    """Chunks 1, 2, ... into chunk 0, in that order, for channels c0 to c1."""
    for chunk in range(1, plan.n_chunks):
        for c in range(c0, c1):
            sums[c] += sums[chunk * plan.channels + c]


# ---------------------------------------------------------------------------------------------------------------------
# grad_affine: grad_x = factor * (((dy - shift) - rest) - (x - center) * slope); where a fused ReLU was off, dy is 0.
# Through constant statistics (training is False) it is factor * dy, whatever x holds.
# ---------------------------------------------------------------------------------------------------------------------

@inline
def grad_affine_strip(
    dy,         # IN   (n_columns,)
    x,          # IN   (n_columns,)
    n_columns,
    coefs,      # IN   at CENTER, SCALE, OFFSET, FACTOR, SLOPE, SHIFT, REST
    relu,
    training,
    grad_x,     # OUT
):
    for j in range(n_columns):
        g = gate(dy[j], x[j], coefs, j, relu)
        through = ((g - coefs[SHIFT + j]) - coefs[REST + j]) - (x[j] - coefs[CENTER + j]) * coefs[SLOPE + j]
        grad_x[j] = coefs[FACTOR + j] * (through if training else g)


@inline
def grad_affine_piece(dy, dy_ahead, x, x_ahead, n, coefs, relu, training, stream, grad_x, grad_x_ahead):
    prefetch_strip(at(dy, dy_ahead), n)
    prefetch_strip(at(x, x_ahead), n)
    if not stream:
        prefetch_strip_write(at(grad_x, grad_x_ahead), n)
    if stream:
        piece = local(PIECE, x)
        grad_affine_strip(dy, x, n, coefs, relu, training, piece)
        put_piece(grad_x, piece, n)
    else:
        grad_affine_strip(dy, x, n, coefs, relu, training, grad_x)


@inline
def grad_affine_rows_as(
    dy, dy_ahead, x, x_ahead, length, column, width, coefs, each, relu, training, stream, grad_x, grad_x_ahead,
):
    i, j = 0, column
    while i + PIECE <= length:
        grad_affine_piece(at(dy, i), dy_ahead, at(x, i), x_ahead, PIECE, at(coefs, j), relu, training, stream,
                          at(grad_x, i), grad_x_ahead)
        i += PIECE
        j += PIECE * each
        while j >= width:
            j -= width
    grad_affine_piece(at(dy, i), dy_ahead, at(x, i), x_ahead, length - i, at(coefs, j), relu, training, stream,
                      at(grad_x, i), grad_x_ahead)


@helper
def grad_affine_rows(
    dy, dy_ahead, x, x_ahead, length, column, width, coefs, each, relu, training, stream, grad_x, grad_x_ahead,
):
    """A contiguous run as rows of `width`, the first from `column` on, the last of them perhaps shorter."""
    restrict()
    wide_vectors()
    if stream:
        grad_affine_rows_as(dy, dy_ahead, x, x_ahead, length, column, width, coefs, each, relu, training, True,
                            grad_x, grad_x_ahead)
    elif relu:  # a literal: as a mask it took 9 to 26 % longer
        grad_affine_rows_as(dy, dy_ahead, x, x_ahead, length, column, width, coefs, each, True, training, False,
                            grad_x, grad_x_ahead)
    else:
        grad_affine_rows_as(dy, dy_ahead, x, x_ahead, length, column, width, coefs, each, False, training, False,
                            grad_x, grad_x_ahead)


@helper
def grad_affine_run(
    dy, dy_ahead, x, x_ahead, length, width, coefs, each, relu, training, route, buffer, grad_x, grad_x_ahead,
):
    """A contiguous run, stored by its route."""
    i = none = 0 * length
    if route == BUFFERED:
        while i < length:
            n = min(BUFFER, length - i)
            grad_affine_rows(at(dy, i), dy_ahead, at(x, i), x_ahead, n, i % width * each, width, coefs, each,
                             relu, training, none, buffer, none)
            copy(at(grad_x, i), buffer, n)
            i += n
    else:
        stream = int(route == STREAMED)
        if stream:
            i = begin_stream(grad_x, length, each * grad_x_ahead)
        elif each * length > width:  # several rows
            i = min(length, before_line(x))
        if i:
            grad_affine_rows(dy, dy_ahead, x, x_ahead, i, none, width, coefs, each, relu, training, none,
                             grad_x, grad_x_ahead)
        grad_affine_rows(at(dy, i), dy_ahead, at(x, i), x_ahead, length - i, i % width * each, width, coefs, each,
                         relu, training, stream, at(grad_x, i), grad_x_ahead)


@inline
def grad_affine_task(
    dy, dy_stride, x, x_stride, plan, band, chunk, tile,
    channel_coefs,  # IN   (3, channels): center, scale, offset
    linear,         # IN   (4, channels): factor, slope, shift, rest
    relu, training, route,
    grad_x, grad_x_stride,
):
    memory = local(COEFS, x)
    buffer = local(BUFFER, x)
    dy_buffer = local(BUFFER, x)
    x_buffer = local(BUFFER, x)
    c0 = tile * plan.tile
    channels = min(plan.tile, plan.channels - c0)
    width = channels * plan.repeat
    step = ROWS * plan.fold
    one_run = not plan.by_inner and dy_stride == width and x_stride == width and grad_x_stride == width
    coefs = place_coefs(memory, before_line(grad_x if route == STREAMED else x) if one_run else 0)
    repeat = PIECE if plan.by_inner else plan.repeat  # a channel's coefficients, for a whole piece
    spread_rows(channel_coefs, 3, plan, c0, channels, repeat, coefs)
    spread_rows(linear, 4, plan, c0, channels, repeat, at(coefs, FACTOR))
    dy = at(dy, c0 * plan.inner)
    x = at(x, c0 * plan.inner)
    grad_x = at(grad_x, c0 * plan.inner)
    each = 0 if plan.by_inner else 1
    segment = channels * plan.inner if plan.by_inner else width
    dy_ahead, x_ahead, grad_x_ahead = lead(dy_stride, segment), lead(x_stride, segment), lead(grad_x_stride, segment)
    whole = plan.fold == 1 or has_whole_lines(grad_x, grad_x_stride)
    row_route = DIRECT if route == STREAMED and not whole else route
    for index in range(min((chunk + 1) * plan.chunk, plan.n_blocks) - 1, chunk * plan.chunk - 1, -1):
        block = block_within(plan, index, band)
        last = block.row + block.n_rows
        if plan.by_inner:
            for r in range(block.row, last):
                for c in range(channels):
                    i = c * plan.inner + block.start
                    grad_affine_run(at(dy, r * dy_stride + i), dy_ahead, at(x, r * x_stride + i), x_ahead,
                                    block.length, block.length, at(coefs, c * PIECE), each, relu,
                                    training, route, buffer, at(grad_x, r * grad_x_stride + i), grad_x_ahead)
        elif one_run:
            i = block.row * width
            grad_affine_run(at(dy, i), dy_ahead, at(x, i), x_ahead, block.n_rows * width, plan.fold * width,
                            coefs, each, relu, training, route, buffer, at(grad_x, i), grad_x_ahead)
        elif width < NARROW and grad_x_stride == width:
            for r in range(block.row, last, step):
                n = min(step, last - r)
                grad_affine_run(gather(at(dy, r * dy_stride), dy_stride, n, width, dy_buffer), 0 * width,
                                gather(at(x, r * x_stride), x_stride, n, width, x_buffer), 0 * width, n * width,
                                plan.fold * width, coefs, each, relu, training, route, buffer,
                                at(grad_x, r * width), grad_x_ahead)
        else:
            for r in range(block.row, last):
                grad_affine_run(at(dy, r * dy_stride), dy_ahead, at(x, r * x_stride), x_ahead, width, width,
                                coefs, each, relu, training, row_route, buffer,
                                at(grad_x, r * grad_x_stride), grad_x_ahead)


# ---------------------------------------------------------------------------------------------------------------------
# Workers: one stage of a call, for one part of the tiles. Compiled as C functions and called by address, so that the
# loops are compiled once, and no driver has a copy of them.
# ---------------------------------------------------------------------------------------------------------------------

class Part(NamedTuple):
    tile: int         # the first of
    n_tiles: int      # these tiles
    rank: int         # this thread's number among the
    size: int         # threads that share the part


@helper
def has_own_tiles(plan, n_workers):
    even = plan.n_tiles % n_workers == 0 or plan.n_tiles >= 8 * n_workers
    return even and (plan.by_inner or plan.n_chunks == 1)  # one tile a thread, too: a region costs more than it saves


@helper
def share(n, part, further):
    """Where this thread's share of n things begins; with further = 1, where it ends."""
    return n * (part.rank + further) // part.size


@helper
def channel_share(plan, part, further):
    """The same for the part's channels."""
    c0 = part.tile * plan.tile
    return c0 + share(min(part.n_tiles * plan.tile, plan.channels - c0), part, further)


@helper
def band_of(plan, part):
    """Its tasks of the first pass; but of columns, with rows enough, its share of the rows: threads that write the same
    rows take lines from each other, for the processor fetches ahead over the end of a tile."""
    if plan.by_inner or plan.outer < 4 * ROWS * part.size:
        n_tasks = plan.n_chunks * part.n_tiles
        return Band(share(n_tasks, part, 0), share(n_tasks, part, 1), 0, plan.outer)
    rows = plan.chunk * plan.block_outer
    row, end = share(plan.outer, part, 0), share(plan.outer, part, 1)
    return Band(row // rows * part.n_tiles, ceil_div(end, rows) * part.n_tiles, row, end)


def moments_worker(part, job):
    part = loaded(part)
    x, stride, plan, partial = loaded(job)
    n_tasks = plan.n_chunks * part.n_tiles
    for task in range(share(n_tasks, part, 0), share(n_tasks, part, 1)):
        chunk = task // part.n_tiles
        row = at(partial, 3 * chunk * plan.channels)
        moments_task(x, stride, plan, chunk, part.tile + task % part.n_tiles,
                     row, at(row, plan.channels), at(row, 2 * plan.channels))


def merge_worker(part, job):
    part = loaded(part)
    plan, partial = loaded(job)
    c0, c1 = channel_share(plan, part, 0), channel_share(plan, part, 1)
    mean, rest, m2 = partial, at(partial, plan.channels), at(partial, 2 * plan.channels)
    merge_chunks(plan, mean, rest, m2, partial, c0, c1)
    settle(at(mean, c0), at(rest, c0), c1 - c0)


def normalize_worker(part, job):
    part = loaded(part)
    plan, mean, rest, has_rest, m2, n, gamma, has_gamma, beta, has_beta, eps, stats, coefs = loaded(job)
    normalize_channels(plan, channel_share(plan, part, 0), channel_share(plan, part, 1), mean, rest, has_rest, m2, n,
                       gamma, has_gamma, beta, has_beta, eps, stats, coefs)


def affine_worker(part, job):
    part = loaded(part)
    x, stride, plan, coefs, relu, route, y, y_stride = loaded(job)
    band = band_of(plan, part)
    for task in range(band.last - 1, band.first - 1, -1):
        affine_task(x, stride, plan, band, task // part.n_tiles, part.tile + task % part.n_tiles, coefs, relu, route,
                    y, y_stride)
    if route == STREAMED:
        stream_end()


def grad_moments_worker(part, job):
    part = loaded(part)
    dy, dy_stride, x, x_stride, plan, mean, coefs, relu, sum_dy, sum_dy_xmu = loaded(job)
    n_tasks = plan.n_chunks * part.n_tiles
    for task in range(share(n_tasks, part, 0), share(n_tasks, part, 1)):
        chunk = task // part.n_tiles
        grad_moments_task(dy, dy_stride, x, x_stride, plan, chunk, part.tile + task % part.n_tiles, mean, coefs, relu,
                          at(sum_dy, chunk * plan.channels), at(sum_dy_xmu, chunk * plan.channels))


def add_worker(part, job):
    part = loaded(part)
    plan, sum_dy, sum_dy_xmu = loaded(job)
    add_chunks(plan, sum_dy, channel_share(plan, part, 0), channel_share(plan, part, 1))
    add_chunks(plan, sum_dy_xmu, channel_share(plan, part, 0), channel_share(plan, part, 1))


def gradient_worker(part, job):
    part = loaded(part)
    plan, sum_dy, sum_dy_xmu, stats, coefs, training, linear, grads = loaded(job)
    gradient_channels(plan, channel_share(plan, part, 0), channel_share(plan, part, 1),
                      sum_dy, sum_dy_xmu, stats, coefs, training, linear, grads)


def grad_affine_worker(part, job):
    part = loaded(part)
    dy, dy_stride, x, x_stride, plan, coefs, linear, relu, training, route, grad_x, grad_x_stride = loaded(job)
    band = band_of(plan, part)
    for task in range(band.last - 1, band.first - 1, -1):
        grad_affine_task(dy, dy_stride, x, x_stride, plan, band, task // part.n_tiles,
                         part.tile + task % part.n_tiles, coefs, linear, relu, training, route, grad_x, grad_x_stride)
    if route == STREAMED:
        stream_end()


# What a job is, b: bool, i: integer, f: float64, p: plan, x: pointer to the data's type, d: pointer to float64.
JOBS = {
    moments_worker: "xipd",
    merge_worker: "pd",
    normalize_worker: "pddbdfxbxbfdx",
    affine_worker: "xipxbixi",
    grad_moments_worker: "xixipdxbdd",
    add_worker: "pdd",
    gradient_worker: "pdddxbxx",
    grad_affine_worker: "xixipxxbbixi",
}
