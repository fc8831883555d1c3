"""The kernels compiled just in time. cython_kernels.pyx is this file's twin.

Read it downwards: the plan (how the data is cut); then for each kernel its strip (the hot loop, of vectors), its rows
and runs, its task (one tile of one chunk); and the workers (what one thread does in one stage of a call).
numba_calls.py starts them; what Numba has no word for is in numba_machine.py.

The loops work on bare pointers, as the twin's do: an array's index is tested for being negative, and its inner stride
is unknown.
"""

from typing import NamedTuple

import numpy as np

from fastbn.kernels.numba_machine import (
    ALIAS_BYTES,
    LINE,
    LOADS_TWO,
    VECTOR_BYTES,
    ZEN3_OR_4,
    ZEN4,
    address,
    at,
    cleared,
    helper,
    hidden_ones,
    inline,
    is_off,
    load,
    load_wide,
    loaded,
    local,
    muladd,
    outline,
    prefetch,
    prefetch_far,
    prefetch_write,
    restrict,
    rolled,
    store,
    store_past,
    stream_end,
    zeros,
)

ROWS = 8               # wide rows a step: accumulators are loaded and stored once for eight rows
MANY_ROWS = 4 * ROWS   # rows a thread from which on the elementwise passes of columns are divided by rows
GRAD_ROWS = 4          # and a step of two arrays, whose rows share the few places that a set of L1 has
STRIP = 16             # columns a step: a literal, the size of the strip's vectors
TILE = 512             # columns whose accumulators a task keeps on its stack (12 KiB of L1)
HELD = 64              # narrow rows that make up so many columns are summed with the accumulators in registers,
HELD_ROWS = 64         # for so many wide rows, as many as the buffers for rows apart hold
PARTS = HELD // STRIP  # in which AVX2 sums them, one after the other: its registers hold a strip's accumulators,
GRAD_ROWS_EACH = 16    # and of two arrays, its first cache so many rows
HELD_BYTES = 2048      # and so are, HELD columns at a time, near rows of a multiple of HELD and up to so many bytes
LANES = STRIP          # accumulators a channel where the inner axis is swept: one strip
SHORT_INNER = 64       # inner axes shorter than this are swept as columns,
FEW_ROWS = 16          # of fewer rows only those half as short
INNER_TILE = 8         # channels a tile where the inner axis is swept, at most
INNER_TILE_SIZE = 1 << 17  # and elements a tile, so that it stays in the cache
BLOCK_ROWS = 128       # wide rows a block; a block has one pivot
BLOCK_INNER = 16384    # inner elements a channel a block
PIVOT_SHARE = 32       # the pivot is the mean of a block's first values, one in so many
MAX_CHUNKS = 64        # partial results a channel, at most; so also the threads that can share a column
SERIAL_BYTES = 65536   # a thread's fair share: below it, waking the thread costs more than it saves
NARROW = 32            # rows apart of fewer columns are first copied together (20 columns: 20 % less time)
FIRST_BYTES = 1 << 15  # of an array that lies in the first cache
NEAR_BYTES = 1 << 20   # smaller arrays stay in the second caches: the elementwise passes fetch nothing ahead
FAR_BYTES = 20 << 20   # inputs from here on are fetched from further ahead: they will not be in a cache
VAST_BYTES = 96 << 20  # and from here on hardly any of them will be; see what_to_fetch
RUN_BYTES = 24 << 10   # of a channel, from which on its run may be a sweep
STREAM_BYTES = 20 << 20  # of inputs and output together: from here on the output bypasses the caches
COLUMNS_AHEAD = 128    # columns that the sums fetch ahead, or half so many of each of two arrays
ROWS_AHEAD = 2 * ROWS  # wide rows that they fetch ahead into L2
AHEAD = 512            # elements that runs and the elementwise passes fetch ahead
FAR_AHEAD = 2048       # and of two inputs, or of runs to sum, that will not be in a cache, into L2 instead
SERIAL_MERGES = 32768  # below so many partial results one thread does what is left: starting the team takes longer
BUFFER = ROWS * TILE   # elements of a task's buffers
BOTH = 2 * STRIP
SUMS_PITCH = TILE + 128  # from one of a tile's sums to the next: 4 KiB apart, stores would hold up loads
SUMS = 3 * SUMS_PITCH
WIDE = 2048            # columns whose coefficients a task of the elementwise passes keeps on its stack
# Where they lie in its one array, so that a strip takes one pointer for all of them. Behind those of a wide row lie
# those of the next one's first strip, so that a strip may run over the end of a row.
PITCH = WIDE + STRIP
CENTER = 0             # y = (x - center) * scale + offset
SCALE = PITCH
OFFSET = 2 * PITCH
FACTOR = 3 * PITCH     # grad_x = factor * (((dy - shift) - rest) - (x - center) * slope)
SLOPE = 4 * PITCH
SHIFT = 5 * PITCH
REST = 6 * PITCH
COEFS = 7 * PITCH + STRIP
# What the sums fetch ahead:
NOTHING = 0
NEAR = 1               # what is in a cache, into L1
FAR = 2                # what is not, into L2


# ---------------------------------------------------------------------------------------------------------------------
# The plan: blocks of rows (or of inner elements) make a chunk, a chunk has one partial result a channel, channels come
# in tiles; a task is one tile of one chunk. All of it follows from shape and dtype, so the bits never depend on the
# threads.
# ---------------------------------------------------------------------------------------------------------------------

class Plan(NamedTuple):
    outer: int
    channels: int
    inner: int
    by_inner: bool    # sweep along the inner axis instead of across the columns
    repeat: int       # accumulators side by side that belong to one channel
    fold: int         # rows laid side by side to make a wide row (narrow data)
    sums_fold: int    # and for the sums
    held: bool        # whether those are taken HELD columns at a time, with the accumulators in registers
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


class Band(NamedTuple):  # what one thread does of an elementwise pass
    c0: int           # of the channels from here
    c1: int           # up to here
    tile: int         # so many a task
    n_tiles: int
    first: int        # of the tasks, tile by tile and chunk by chunk, from here
    last: int         # up to here
    row: int          # the rows from here
    end: int          # up to here


@helper
def ceil_div(a, b):
    return (a + b - 1) // b


@helper
def is_avx2_float(itemsize):
    """Whether the sums are of floats, in vectors of AVX2, of which 16 registers hold STRIP columns."""
    return VECTOR_BYTES == LINE // 2 and itemsize == 4


@helper
def make_plan(
    outer, channels, inner,
    itemsize,   # IN   bytes of an element
    n_arrays,   # IN   that the sums read
):
    width, n_bytes = channels * inner, n_arrays * itemsize
    by_inner = inner >= (SHORT_INNER // 2 if outer < FEW_ROWS else SHORT_INNER)
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
        while n_tiles == 1 and 2 * fold * width <= TILE and fold * BLOCK_ROWS <= outer:
            fold *= 2
        block_inner = inner
        block_outer = fold * BLOCK_ROWS
    sums_fold = fold
    held = False
    if (VECTOR_BYTES == LINE or is_avx2_float(itemsize)) and not by_inner and fold * width >= HELD:
        if HELD % width == 0:
            sums_fold, held = HELD // width, True
        elif (VECTOR_BYTES == LINE and width % HELD == 0 and width * n_bytes <= HELD_BYTES
              and outer * width * n_bytes < NEAR_BYTES):
            sums_fold, held = 1, True
    n_segments = ceil_div(inner, block_inner)
    n_blocks = ceil_div(outer, block_outer) * n_segments
    chunk = ceil_div(n_blocks, MAX_CHUNKS)
    n_chunks = ceil_div(n_blocks, chunk)
    return Plan(outer, channels, inner, by_inner, repeat, fold, sums_fold, held, tile, n_tiles,
                block_outer, block_inner, n_segments, n_blocks, chunk, n_chunks)


@helper
def is_near(plan, itemsize):
    """Whether an array of so many bytes an element is in the second caches."""
    return plan.outer * plan.channels * plan.inner * itemsize < NEAR_BYTES


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
def lead(stride, width, far):
    """How many elements ahead to fetch, which are whole rows where short rows lie apart. Beyond their ends lies what
    other tasks want."""
    ahead = FAR_AHEAD if far else AHEAD
    return ahead if stride == width or width >= 4 * ahead else stride * max(1, ahead // width)


@inline
def size_of(x):
    return address(at(x, 1)) - address(x)


@inline
def prefetch_strip(x, far):
    for i in range(0, STRIP, LINE // size_of(x)):
        if far:
            prefetch_far(at(x, i))
        else:
            prefetch(at(x, i))


@helper
def near_or_nothing(plan, itemsize):
    """How the sums read what is in a cache."""
    return NOTHING if is_avx2_float(itemsize) and ZEN3_OR_4 and not plan.by_inner else NEAR


@helper
def what_to_fetch(
    plan, itemsize, n_arrays,
    in_line,    # IN   whether rows lie one behind the other
):
    """Of the arrays that the sums read. A Zen 3 or 4 itself finds what is read in one sweep, of float32 vast ones."""
    n_bytes = n_arrays * itemsize * plan.outer * plan.channels * plan.inner
    far = n_bytes >= FAR_BYTES
    sweep = in_line and (plan.held or not far)
    if plan.by_inner:
        sweep = plan.inner * itemsize >= (RUN_BYTES if n_arrays == 2 or itemsize == 8 else 8 * RUN_BYTES)
    if sweep and ZEN3_OR_4 and (itemsize == 8 or n_bytes >= VAST_BYTES):
        return NOTHING
    if plan.held and not in_line and ZEN3_OR_4 and itemsize == 4 and 2 * n_bytes >= FAR_BYTES:
        return NOTHING
    if is_avx2_float(itemsize) and not far and 2 * n_bytes >= FAR_BYTES:  # another's data may have driven it out
        return NEAR
    return FAR if far else near_or_nothing(plan, itemsize)


@inline
def prefetch_row(x, stride, n_columns, fetch):
    """Of rows of HELD columns: these columns of rows further on, into L1, and of far ones into L2 too, from as far as
    of wide rows."""
    for j in range(0, n_columns if fetch != NOTHING else 0, STRIP):
        prefetch_strip(at(x, AHEAD // HELD * stride + j), False)
        if fetch == FAR:
            prefetch_strip(at(x, ROWS_AHEAD * TILE // HELD * stride + j), True)


@inline
def part_following(x, stride, n_rows, block, part):
    """What to fetch while a part of HELD columns is summed: its share of a block of rows, so far ahead that the first
    part of the next block finds all of its rows."""
    return at(x, (block - block // PARTS + part * n_rows // PARTS) * stride)


@inline
def prefetch_strip_write(y):
    for i in range(0, STRIP, LINE // size_of(y)):
        prefetch_write(at(y, i))


@helper
def step_rows(plan):
    """How many rows that lie apart are summed at a time."""
    return (HELD_ROWS if plan.held else ROWS) * plan.sums_fold


@helper
def gather(x, stride, n_rows, width, buffer):
    """The rows one behind the other: x itself where they lie so already, else a copy in buffer."""
    if stride == width or n_rows == 1:
        return x
    for r in range(n_rows):
        for j in range(0, width, STRIP):
            prefetch_strip(at(x, (r + n_rows) * stride + j), False)
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
    n_rows,
    n_columns,  # a literal
    fetch,
    pivot,      # IN   (n_columns,) float64
    s1,         # INOUT
    s2,         # INOUT
):
    d = load_wide(x, n_columns) - load(pivot, n_columns)
    a = d
    b = d * d
    for r in range(1, n_rows):
        prefetch_row(at(x, r * stride), stride, n_columns, fetch)
        d = load_wide(at(x, r * stride), n_columns) - load(pivot, n_columns)
        a = a + d
        b = muladd(d, d, b)
    store(s1, load(s1, n_columns) + a)
    store(s2, load(s2, n_columns) + b)


@inline
def sums_part(
    x, stride, n_rows,
    following,  # what to fetch
    pivot, s1, s2,
):
    ones = hidden_ones(STRIP)
    a = b = zeros(STRIP)
    done = n_rows // PARTS * PARTS
    for r in range(0, done, PARTS):
        for i in range(PARTS):
            prefetch(at(following, i * STRIP))
            d = load_wide(at(x, (r + i) * stride), STRIP) - load(pivot, STRIP)
            a = muladd(d, ones, a)
            b = muladd(d, d, b)
        following = at(following, stride)
    for r in range(done, n_rows):
        d = load_wide(at(x, r * stride), STRIP) - load(pivot, STRIP)
        a = muladd(d, ones, a)
        b = muladd(d, d, b)
    store(s1, load(s1, STRIP) + a)
    store(s2, load(s2, STRIP) + b)


@inline
def sums_parts(x, stride, n_rows, pivot, s1, s2):
    """HELD columns by AVX2."""
    for part in range(PARTS):
        j = part * STRIP
        sums_part(at(x, j), stride, n_rows, part_following(x, stride, n_rows, HELD_ROWS, part),
                  at(pivot, j), at(s1, j), at(s2, j))


@inline
def coming(x, stride, n_rows, width, j, ahead):
    """What lies `ahead` columns behind column j of these rows: there, or in the next n_rows rows."""
    if stride == LANES:  # a channel's run; the next rows would be too near
        return at(x, j + ahead)
    k = j + min(width, ahead)
    return at(x, k if k < width else n_rows * stride + k - width)


@inline
def prefetch_rows(x, stride, n_rows, width, j, ahead, fetch):
    """A strip of each row of what is coming."""
    if fetch == NOTHING:
        return
    strip = coming(x, stride, n_rows, width, j, ahead)
    for r in range(n_rows):
        if stride == LANES:
            prefetch_strip(at(strip, r * stride), fetch == FAR)
        else:  # of columns, both lines of float64 would take longer
            prefetch(at(strip, r * stride))
    if fetch == FAR and stride != LANES:
        for r in range(ROWS_AHEAD, ROWS_AHEAD + n_rows):
            prefetch_strip(at(x, j + r * stride), True)


@inline
def sums_group(x, stride, n_rows, width, ahead, fetch, pivot, s1, s2):
    j = 0
    while j + STRIP <= width:
        prefetch_rows(x, stride, n_rows, width, j, ahead, fetch)
        if fetch == FAR and stride == LANES and size_of(x) == 4:  # of a run of float32, into L1 what comes next
            for r in range(n_rows, 2 * n_rows):
                prefetch(at(x, r * LANES))
        sums_strip(at(x, j), stride, n_rows, STRIP, NOTHING, at(pivot, j), at(s1, j), at(s2, j))
        j += STRIP
    if (width - j) & 8:
        sums_strip(at(x, j), stride, n_rows, 8, NOTHING, at(pivot, j), at(s1, j), at(s2, j))
        j += 8
    if (width - j) & 4:
        sums_strip(at(x, j), stride, n_rows, 4, NOTHING, at(pivot, j), at(s1, j), at(s2, j))
        j += 4
    while j < width:
        sums_strip(at(x, j), stride, n_rows, 1, NOTHING, at(pivot, j), at(s1, j), at(s2, j))
        j += 1


@inline
def sums_rows_as(x, stride, n_rows, width, ahead, fetch, pivot, s1, s2):
    done = n_rows // ROWS * ROWS
    for r in range(0, done, ROWS):
        sums_group(at(x, r * stride), stride, ROWS, width, ahead, fetch, pivot, s1, s2)
    if done < n_rows:
        sums_group(at(x, done * stride), stride, n_rows - done, width, ahead, fetch, pivot, s1, s2)


@inline
def sums_held(x, stride, n_rows, width, fetch, pivot, s1, s2):
    for j in range(0, width, HELD):
        for r in range(0, n_rows, HELD_ROWS):
            n = min(HELD_ROWS, n_rows - r)
            if VECTOR_BYTES == LINE:
                sums_strip(at(x, r * stride + j), stride, n, HELD, fetch, at(pivot, j), at(s1, j), at(s2, j))
            else:
                sums_parts(at(x, r * stride + j), stride, n, at(pivot, j), at(s1, j), at(s2, j))


@helper
def sums_rows(x, stride, n_rows, width, held, fetch, pivot, s1, s2):
    restrict()
    if held:
        sums_held(x, stride, n_rows, width, fetch, pivot, s1, s2)
    else:
        sums_rows_as(x, stride, n_rows, width, np.int64(COLUMNS_AHEAD), fetch, pivot, s1, s2)


@inline
def sums_run(x, length, width, held, fetch, pivot, s1, s2):
    """A contiguous run as rows of `width`, the last of them perhaps shorter."""
    n_rows = length // width
    sums_rows(x, width, n_rows, width, held, fetch, pivot, s1, s2)
    if n_rows * width < length:
        sums_rows(at(x, n_rows * width), width, np.int64(1), length - n_rows * width, np.bool_(False), fetch,
                  pivot, s1, s2)


@helper
def sums_lanes(x, length, ahead, fetch, pivot, s1, s2):
    """The same as rows of LANES."""
    restrict()
    lanes, one = np.int64(LANES), np.int64(1)  # no literals, lest each have its own strips
    n_rows = length // lanes
    sums_rows_as(x, lanes, n_rows, lanes, ahead, fetch, pivot, s1, s2)
    sums_group(at(x, n_rows * lanes), lanes, one, length - n_rows * lanes, ahead, fetch, pivot, s1, s2)


@inline
def sums_apart(x, stride, n_rows, width, fold, fetch, pivot, s1, s2):
    """ROWS wide rows, of `fold` rows each that lie apart (n_rows in all): summed where they lie."""
    for f in range(fold):
        j = f * width
        sums_rows(at(x, f * stride), fold * stride, n_rows // fold, width, np.bool_(False), fetch,
                  at(pivot, j), at(s1, j), at(s2, j))


@inline
def sums_block(x, stride, n_rows, length, channels, plan, buffer, pivot, s1, s2):
    width = channels * plan.repeat
    fetch = what_to_fetch(plan, size_of(x), 1, stride == plan.channels * plan.inner)
    for j in range(width * plan.sums_fold):
        s1[j] = 0
        s2[j] = 0
    if plan.by_inner:
        for r in range(n_rows):
            for c in range(channels):
                n = c * LANES
                sums_lanes(at(x, r * stride + c * plan.inner), length,
                           lead(stride, channels * plan.inner, fetch == FAR), fetch,
                           at(pivot, n), at(s1, n), at(s2, n))
    elif plan.sums_fold == 1:
        sums_rows(x, stride, n_rows, width, plan.held, fetch, pivot, s1, s2)
    elif stride == width:
        sums_run(x, n_rows * width, plan.sums_fold * width, plan.held, fetch, pivot, s1, s2)
    else:
        step = step_rows(plan)
        for r in range(0, n_rows, step):
            n = min(step, n_rows - r)
            if n == step and width >= NARROW and not plan.held:
                sums_apart(at(x, r * stride), stride, n, width, plan.sums_fold, fetch, pivot, s1, s2)
            else:
                sums_run(gather(at(x, r * stride), stride, n, width, buffer), n * width, plan.sums_fold * width,
                         plan.held, near_or_nothing(plan, size_of(x)), pivot, s1, s2)
    fold_sums(s1, channels, plan.repeat, plan.sums_fold)
    fold_sums(s2, channels, plan.repeat, plan.sums_fold)


@inline
def pivot_strip(
    x, stride, n_rows, n_columns,
    total,      # OUT  (n_columns,) float64: sum(x - the first row)
):
    first = load_wide(x, n_columns)
    a = first - first
    for r in range(1, n_rows):
        a = a + (load_wide(at(x, r * stride), n_columns) - first)
    store(total, a)


@inline
def pivot_rows(x, stride, n_rows, width, pivot):
    """The mean of a few rows, as sums_block would have it (moments of 256x512 0.94 of the time, 2048x1024 0.96)."""
    j = 0
    while j + STRIP <= width:
        pivot_strip(at(x, j), stride, n_rows, STRIP, at(pivot, j))
        j += STRIP
    while j < width:
        pivot_strip(at(x, j), stride, n_rows, 1, at(pivot, j))
        j += 1
    weight = 1 / float(n_rows)
    for j in range(width):
        pivot[j] = x[j] + pivot[j] * weight


@helper
def merge_moments(n_a, mean, rest, m2, n_b, mean_b, rest_b, m2_b, channels):
    """Chan, Golub and LeVeque (1979): delta = mean_b - mean, m2 += m2_b + delta^2 n_a n_b / (n_a + n_b)."""
    restrict()
    weight = n_b / (n_a + n_b)
    cross = n_a * (n_b / (n_a + n_b))
    for c in range(channels):
        delta = (mean_b[c] - mean[c]) + (rest_b[c] - rest[c])
        rest[c] += delta * weight
        m2[c] += m2_b[c] + delta * delta * cross


@inline
def put_moments(
    n, pivot, s1, s2, channels,
    mean,    # OUT
    rest,    # OUT  may be s1
    m2,      # OUT  may be s2
):
    """From the sums of n values a channel about a pivot."""
    weight = 1 / n  # three divisions a channel took a fifth of a block
    for c in range(channels):
        shift = s1[c] * weight
        mean[c] = pivot[c]
        m2[c] = s2[c] - s1[c] * shift
        rest[c] = shift


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
    pivot = local(SUMS, 0.0)
    s1, s2 = at(pivot, SUMS_PITCH), at(pivot, 2 * SUMS_PITCH)
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
        spreads = plan.repeat > 1 or plan.sums_fold > 1
        if not spreads:
            pivot_rows(first, stride, k_rows, channels, mean_b)
        for c in range(channels):
            if spreads:
                mean_b[c] = first[c * plan.inner]
            s1[c] = 0
        weight = 0.0
        # The first rows about the first row give the pivot, if it is not there yet (of 32 rows, the first is the pivot
        # as it is); all rows about the pivot give the sums.
        for n_rows, length in ((k_rows, k_length), (block.n_rows, block.length)):
            if (k == 1 or not spreads) and n_rows < block.n_rows:
                continue
            for c in range(channels):
                mean_b[c] += s1[c] * weight
            spread(mean_b, channels, plan.repeat, plan.sums_fold, pivot)
            sums_block(first, stride, n_rows, length, channels, plan, buffer, pivot, s1, s2)
            weight = 1 / float(n_rows * length)
        n = float(block.n_rows * block.length)
        if count == 0:
            put_moments(n, mean_b, s1, s2, channels, mean, rest, m2)
        else:
            put_moments(n, mean_b, s1, s2, channels, mean_b, s1, s2)
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
def merge_chunk(
    plan, left, right, end,
    partial,    # INOUT (n_chunks, 3, channels): mean, rest, m2
    c0, c1,
):
    """The moments of chunks right to end into those of left to right, for channels c0 to c1."""
    row = plan.channels
    a = at(partial, 3 * left * row + c0)
    b = at(partial, 3 * right * row + c0)
    before = chunk_count(plan, right)
    merge_moments(before - chunk_count(plan, left), a, at(a, row), at(a, 2 * row),
                  chunk_count(plan, end) - before, b, at(b, row), at(b, 2 * row), c1 - c0)


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
    stats,      # OUT  (4, channels) float64: mean, var, invstd, rest
    coefs,      # OUT  (3, channels): center, scale, offset
):
    """The mean in two floats: what the data's dtype holds is the center, the rest goes into the offset."""
    restrict()
    var, invstd, low = at(stats, plan.channels), at(stats, 2 * plan.channels), at(stats, 3 * plan.channels)
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
        low[c] = rest[c] if has_rest else 0.0
    for c in range(c0, c1):
        scale[c] = invstd[c] * gamma[c] if has_gamma else invstd[c]
    for c in range(c0, c1):
        offset[c] = -((mean[c] - coefs[c]) + low[c]) * scale[c]
    if has_beta:
        for c in range(c0, c1):
            offset[c] += beta[c]


@helper
def finite_or_zero(value):
    """What to take off a sum that, if it is infinite, shall stay so: infinity, or 0 times it, would make it NaN."""
    return value if value - value == 0 else 0.0


@helper
def gradient_channels(
    plan, c0, c1,
    sum_dy,     # IN   (channels,) float64
    sum_dy_xc,  # IN   (channels,) float64, about the mean's first float
    stats,      # IN   (4, channels) float64: mean, var, invstd, rest
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
    invstd, lacking = at(stats, 2 * channels), at(stats, 3 * channels)
    scale, grad_beta = at(coefs, channels), at(grads, channels)
    slope, shift, rest = at(linear, channels), at(linear, 2 * channels), at(linear, 3 * channels)
    for c in range(c0, c1):
        sum_dy_xmu = sum_dy_xc[c] - finite_or_zero(lacking[c] * sum_dy[c])
        grads[c] = invstd[c] * sum_dy_xmu
        grad_beta[c] = sum_dy[c]
        linear[c] = scale[c]
        k = invstd[c] * (invstd[c] * (sum_dy_xmu / n)) if training else 0.0
        d = sum_dy[c] / n - k * ((stats[c] - coefs[c]) + lacking[c]) if training else 0.0
        slope[c] = k
        shift[c] = d
        rest[c] = d - shift[c]


@inline
def spread_rows(
    rows,       # IN   (n, channels)
    n, plan, fold, c0, channels,
    wide,       # OUT  (n, PITCH)
):
    width = channels * plan.repeat * fold
    for i in range(n):
        row = at(wide, i * PITCH)
        spread(at(rows, i * plan.channels + c0), channels, plan.repeat, fold, row)
        if not plan.by_inner:
            for j in range(STRIP):
                row[width + j] = row[j]


# ---------------------------------------------------------------------------------------------------------------------
# Strips and runs of the elementwise passes. What goes past the caches begins with a cache line, wherever in a row that
# is: the coefficients of a row are followed by those of the next one, so a strip may run over its end.
# ---------------------------------------------------------------------------------------------------------------------

@helper
def before_line(y):
    """How many elements lie before the first whole cache line."""
    return (-address(y) & (LINE - 1)) // size_of(y)


@inline
def join(end, n, following, both):
    """A strip of a row's last n columns and the next row's first ones."""
    store(both, load(at(end, -STRIP), STRIP))
    store(at(both, STRIP), load(following, STRIP))
    return at(both, STRIP - n)


@inline
def place_coefs(memory, skip):
    """Where to put coefficients so that those behind the first `skip` columns begin with a line, as memory does."""
    return at(memory, (STRIP - skip) % STRIP)


@helper
def begin_stream(y, length, ahead):
    """How many elements at y to store through the caches. The lines that hold the ends of a run are fetched, this
    run's last and the first of one `ahead`: they are shared with other runs."""
    if before_line(at(y, length)):
        prefetch_write(at(y, length))
    if before_line(y):
        prefetch_write(at(y, ahead))
    return min(length, before_line(y))


@helper
def has_whole_lines(y, stride):
    """Whether every row begins with a line."""
    return before_line(y) == 0 and before_line(at(y, stride)) == 0


@helper
def on_lines(y, stride, length):
    """Whether strips of such rows begin with a line: where all rows begin at the same place of one, none is short."""
    return length >= 8 * STRIP and before_line(y) == before_line(at(y, stride))


@helper
def count_pairs(y, length, width, stream):
    """How many pairs of rows there are behind a run's first line, if its rows are taken two at a time: then the
    coefficients are loaded half as often. Not of wider rows than 512 columns, nor by AVX2, which has few registers."""
    if VECTOR_BYTES < LINE or stream or width > TILE or width % STRIP:
        return 0
    if LOADS_TWO and length * size_of(y) > FIRST_BYTES:
        return 0
    return max(0, length - before_line(y)) // (2 * width)


@helper
def holds_coefs(plan, width, itemsize):
    """Whether rows of `width` columns, one behind the other, make up rows of HELD and are taken as such, with the
    coefficients in registers, which only floats leave room for. Measured on a Zen 4 alone."""
    return itemsize == 4 and plan.held and HELD % width == 0 and ZEN4


@helper
def count_held(y, length):
    """How many rows of HELD columns there are behind a run's first line."""
    return max(0, length - before_line(y)) // HELD


@helper
def next_column(j, n_columns, width):
    """The column n_columns behind column j in rows of `width` that lie one behind the other."""
    j += n_columns
    while j >= width:
        j -= width
    return j


@helper
def fetches_ahead(near, stream):
    """Whether the elementwise passes do, strip by strip. A Zen 3 or 4 itself finds what lies in its caches."""
    return stream or not (near or ZEN3_OR_4)


@helper
def trails(y, x):
    """Whether y lies less than two strips behind x, not counting what the processor does not tell apart: x's next strip
    would wait for the strip of y that was just stored."""
    return (address(y) - address(x) - 1) & (ALIAS_BYTES - 1) < 2 * STRIP * size_of(y) - 1


@helper
def goes_back(y, x, each, stream):
    """Whether to take strips from the last one on; not those of images (each = 0), nor AVX2's through the caches, which
    would take longer."""
    return each != 0 and (stream or VECTOR_BYTES == LINE) and trails(y, x)


@helper
def grad_goes_back(grad_x, dy, x, each, stream):
    """The same with two inputs, of which either may be in the way."""
    return ((goes_back(grad_x, dy, each, stream) or goes_back(grad_x, x, each, stream))
            and not (trails(dy, grad_x) or trails(x, grad_x)))


@helper
def strips_ahead(j, width, length):
    """How many whole strips begin between column j and the end of its row, with `length` elements left."""
    return min(ceil_div(width - j, STRIP), length // STRIP)


# ---------------------------------------------------------------------------------------------------------------------
# affine: y = (x - center) * scale + offset, then the activation.
# ---------------------------------------------------------------------------------------------------------------------

@inline
def affine_strip(
    x,          # IN   (n_columns,)
    n_columns,  # a literal
    coefs,      # IN   at CENTER, SCALE, OFFSET
    relu,
    y,          # OUT  may be x: the strip is read before it is written
    put,        # store or store_past
):
    value = muladd(load(x, n_columns) - load(at(coefs, CENTER), n_columns),
                   load(at(coefs, SCALE), n_columns), load(at(coefs, OFFSET), n_columns))
    put(y, cleared(is_off(value, relu), value))


@helper
def affine_rest(x, n_columns, coefs, relu, y):
    """Fewer columns than a strip has."""
    j = 0
    if n_columns & 8:
        affine_strip(x, 8, coefs, relu, y, store)
        j = 8
    if n_columns & 4:
        affine_strip(at(x, j), 4, at(coefs, j), relu, at(y, j), store)
        j += 4
    if n_columns & 2:
        affine_strip(at(x, j), 2, at(coefs, j), relu, at(y, j), store)
        j += 2
    if n_columns & 1:
        affine_strip(at(x, j), 1, at(coefs, j), relu, at(y, j), store)


@inline
def affine_strips(
    x, x_ahead, n_strips, coefs, each, relu, stream, y,
    y_ahead,    # 0: fetch nothing ahead
):
    step = STRIP
    if goes_back(y, x, each, stream):
        end = (n_strips - 1) * STRIP
        x, y, coefs = at(x, end), at(y, end), at(coefs, each * end)
        step = -STRIP
    for _ in range(n_strips):
        rolled()
        if stream or y_ahead:
            prefetch_strip(at(x, x_ahead), False)
        if stream:
            affine_strip(x, STRIP, coefs, relu, y, store_past)
        else:
            if y_ahead:
                prefetch_strip_write(at(y, y_ahead))
            affine_strip(x, STRIP, coefs, relu, y, store)
        x = at(x, step)
        y = at(y, step)
        coefs = at(coefs, each * step)


@inline
def affine_runs_as(x, stride, x_ahead, n_runs, length, width, coefs, relu, stream, y, y_stride, y_ahead):
    one = np.int64(1)  # no literal: each would have a version of the loops of its own
    for run in range(n_runs):
        x_run, y_run = at(x, run * stride), at(y, run * y_stride)
        i = j = 0
        if stream:
            i = begin_stream(y_run, length, y_ahead)
        elif length > width:  # several rows
            i = min(length, before_line(y_run))
        if i:
            affine_rest(x_run, i, coefs, relu, y_run)
            j = next_column(0, i, width)
        while i + STRIP <= length:
            n = strips_ahead(j, width, length - i)
            if stream:
                affine_strips(at(x_run, i), x_ahead, n, at(coefs, j), one, relu, True, at(y_run, i), y_ahead)
            elif y_ahead:
                affine_strips(at(x_run, i), x_ahead, n, at(coefs, j), one, relu, False, at(y_run, i), y_ahead)
            else:
                affine_strips(at(x_run, i), 0, n, at(coefs, j), one, relu, False, at(y_run, i), 0)
            i += n * STRIP
            j = next_column(j, n * STRIP, width)
        affine_rest(at(x_run, i), length - i, at(coefs, j), relu, at(y_run, i))


@helper
def affine_runs(x, stride, x_ahead, n_runs, length, width, coefs, relu, stream, y, y_stride, y_ahead):
    """Runs that lie `stride` apart, each of them contiguous, as rows of `width`, the last of them perhaps shorter."""
    outline()
    if relu:
        affine_runs_as(x, stride, x_ahead, n_runs, length, width, coefs, True, stream, y, y_stride, y_ahead)
    else:
        affine_runs_as(x, stride, x_ahead, n_runs, length, width, coefs, False, stream, y, y_stride, y_ahead)


@inline
def affine_channels_as(x, x_ahead, channels, inner, coefs, relu, stream, y, y_ahead):
    none = np.int64(0)
    length = channels * inner
    i = min(length, begin_stream(y, length, none) if stream else before_line(y))
    left = inner - i  # of the channel
    affine_rest(x, i, coefs, relu, y)
    while i + STRIP <= length:
        n = left // STRIP
        if stream:
            affine_strips(at(x, i), x_ahead, n, coefs, none, relu, True, at(y, i), y_ahead)
        elif y_ahead:
            affine_strips(at(x, i), x_ahead, n, coefs, none, relu, False, at(y, i), y_ahead)
        else:
            affine_strips(at(x, i), 0, n, coefs, none, relu, False, at(y, i), 0)
        i += n * STRIP
        left -= n * STRIP
        if i + STRIP <= length:
            affine_strips(at(x, i), x_ahead, 1, at(coefs, LANES - left), none, relu, stream, at(y, i), y_ahead)
            i += STRIP
            left += inner - STRIP
            coefs = at(coefs, LANES)
    affine_rest(at(x, i), length - i, coefs, relu, at(y, i))


@helper
def affine_channels(
    x, x_ahead, channels, inner,
    coefs,      # each channel's LANES times
    relu, stream, y, y_ahead,
):
    """Channels that lie one behind the other, as one run: with the last lane of a channel's coefficients lies the next
    one's first, so a strip may run over its end."""
    outline()
    if relu and stream:
        affine_channels_as(x, x_ahead, channels, inner, coefs, True, True, y, y_ahead)
    elif relu:
        affine_channels_as(x, x_ahead, channels, inner, coefs, True, False, y, y_ahead)
    elif stream:
        affine_channels_as(x, x_ahead, channels, inner, coefs, False, True, y, y_ahead)
    else:
        affine_channels_as(x, x_ahead, channels, inner, coefs, False, False, y, y_ahead)


@inline
def affine_rows_as(x, stride, x_ahead, n_rows, width, coefs, relu, y, y_stride, y_ahead):
    begin = before_line(y) if on_lines(y, y_stride, width) else 0
    n_strips = (width - begin) // STRIP
    end = begin + n_strips * STRIP
    one = np.int64(1)
    for row in range(n_rows):
        x_row, y_row = at(x, row * stride), at(y, row * y_stride)
        if begin:
            affine_rest(x_row, begin, coefs, relu, y_row)
        if y_ahead:
            affine_strips(at(x_row, begin), x_ahead, n_strips, at(coefs, begin), one, relu, False,
                          at(y_row, begin), y_ahead)
        else:
            affine_strips(at(x_row, begin), 0, n_strips, at(coefs, begin), one, relu, False, at(y_row, begin), 0)
        if end < width:
            affine_rest(at(x_row, end), width - end, at(coefs, end), relu, at(y_row, end))


@helper
def affine_rows(x, stride, x_ahead, n_rows, width, coefs, relu, y, y_stride, y_ahead):
    """Rows that lie apart, through the caches."""
    outline()
    if relu:
        affine_rows_as(x, stride, x_ahead, n_rows, width, coefs, True, y, y_stride, y_ahead)
    else:
        affine_rows_as(x, stride, x_ahead, n_rows, width, coefs, False, y, y_stride, y_ahead)


@inline
def affine_joined_as(x, stride, x_ahead, n_rows, width, coefs, relu, y):
    both = local(BOTH, x)
    one, start, rest = np.int64(1), before_line(y), 0
    affine_rest(x, start, coefs, relu, y)
    for row in range(n_rows):
        x_row, y_row = at(x, row * stride), at(y, row * width)
        n = (width - start) // STRIP
        rest = (width - start) % STRIP
        affine_strips(at(x_row, start), x_ahead, n, at(coefs, start), one, relu, True, at(y_row, start), one)
        start += n * STRIP
        if rest and row + 1 < n_rows:
            affine_strip(join(at(x_row, width), rest, at(x_row, stride), both), STRIP, at(coefs, start), relu,
                         at(y_row, start), store_past)
            start += STRIP
        start -= width
    n = width - rest
    affine_rest(at(x, (n_rows - 1) * stride + n), rest, at(coefs, n), relu, at(y, (n_rows - 1) * width + n))


@helper
def affine_joined(x, stride, x_ahead, n_rows, width, coefs, relu, y):
    """Rows that lie apart, past the caches to rows that do not. A strip that two share is put together first."""
    outline()
    if n_rows == 0:
        return
    if relu:
        affine_joined_as(x, stride, x_ahead, n_rows, width, coefs, True, y)
    else:
        affine_joined_as(x, stride, x_ahead, n_rows, width, coefs, False, y)


@inline
def affine_loaded(x, n_columns, relu, center, scale, offset, y):
    """Where the coefficients are in registers."""
    value = muladd(load(x, n_columns) - center, scale, offset)
    store(y, cleared(is_off(value, relu), value))


@inline
def affine_pair(
    x,          # IN   a strip of two rows, one behind the other
    width, coefs, relu,
    y,          # OUT  may be x
):
    center, scale = load(at(coefs, CENTER), STRIP), load(at(coefs, SCALE), STRIP)
    offset = load(at(coefs, OFFSET), STRIP)
    affine_loaded(x, STRIP, relu, center, scale, offset, y)
    affine_loaded(at(x, width), STRIP, relu, center, scale, offset, at(y, width))


@inline
def affine_pairs_as(x, n_pairs, width, coefs, relu, near, y):
    first, step = (width - STRIP, -STRIP) if goes_back(y, x, 1, False) else (0, STRIP)
    for pair in range(n_pairs):
        for strip in range(width // STRIP):
            rolled()
            j = first + strip * step
            i = 2 * pair * width + j
            for r in range(0 if near else 2):
                prefetch_strip(at(x, i + r * width + AHEAD), False)
                prefetch_strip_write(at(y, i + r * width + AHEAD))
            affine_pair(at(x, i), width, at(coefs, j), relu, at(y, i))


@helper
def affine_pairs(x, n_pairs, width, coefs, relu, near, y):
    outline()
    if relu and near:
        affine_pairs_as(x, n_pairs, width, coefs, True, True, y)
    elif relu:
        affine_pairs_as(x, n_pairs, width, coefs, True, False, y)
    elif near:
        affine_pairs_as(x, n_pairs, width, coefs, False, True, y)
    else:
        affine_pairs_as(x, n_pairs, width, coefs, False, False, y)


@inline
def affine_held_as(x, n_rows, coefs, relu, y):
    center, scale = load(at(coefs, CENTER), HELD), load(at(coefs, SCALE), HELD)
    offset = load(at(coefs, OFFSET), HELD)
    for row in range(n_rows):
        rolled()
        affine_loaded(at(x, row * HELD), HELD, relu, center, scale, offset, at(y, row * HELD))


@helper
def affine_held(x, n_rows, coefs, relu, y):
    """Rows of HELD columns, one behind the other, with the coefficients in registers."""
    outline()
    if relu:
        affine_held_as(x, n_rows, coefs, True, y)
    else:
        affine_held_as(x, n_rows, coefs, False, y)


@inline
def affine_run(
    x, x_ahead, length, width,
    held,       # IN   whether rows of HELD columns may go through affine_held
    coefs, relu, near, stream, y, y_ahead,
):
    one = np.int64(1)
    held = held and not stream and not goes_back(y, x, 1, False)
    n = count_held(y, length) if held else count_pairs(y, length, width, stream)
    begin = before_line(y) if n > 0 else 0
    done = begin + n * (HELD if held else 2 * width)
    if n > 0:
        affine_rest(x, begin, coefs, relu, y)
    if n > 0 and held:
        affine_held(at(x, begin), n, at(coefs, begin), relu, at(y, begin))
    elif n > 0:
        affine_pairs(at(x, begin), n, width, at(coefs, begin), relu, near, at(y, begin))
    affine_runs(at(x, done), one, x_ahead, one, length - done, width, at(coefs, begin), relu, stream,
                at(y, done), one, y_ahead)


@inline
def affine_task(
    x, stride, plan, band, chunk, tile,
    channel_coefs,  # IN   (3, channels): center, scale, offset
    relu, stream,
    y, y_stride,
):
    memory = local(COEFS, x)
    x_buffer = local(BUFFER, x)
    c0 = band.c0 + tile * band.tile
    channels = min(band.tile, band.c1 - c0)
    width = channels * plan.repeat
    step = ROWS * plan.fold
    segment = channels * plan.inner if plan.by_inner else width
    x_ahead = lead(stride, segment, False) * (2 if stream else 1)  # into L1 even so: one input needs no more
    near = is_near(plan, size_of(x))
    y_ahead = lead(y_stride, segment, False) if fetches_ahead(near, stream) else 0
    stream_rows = stream and (plan.fold == 1 or has_whole_lines(y, y_stride))
    one_run = not plan.by_inner and stride == width and y_stride == width
    joined = stream and not stream_rows and y_stride == width
    held = holds_coefs(plan, width, size_of(x))
    aligned = not plan.by_inner and (one_run or joined or on_lines(y, y_stride, width))
    coefs = place_coefs(memory, before_line(y) if aligned else 0)
    spread_rows(channel_coefs, 3, plan, plan.fold, c0, channels, coefs)
    x = at(x, c0 * plan.inner)
    y = at(y, c0 * plan.inner)
    for index in range(chunk * plan.chunk, min((chunk + 1) * plan.chunk, plan.n_blocks)):
        block = block_within(plan, index, band)
        last = block.row + block.n_rows
        if plan.by_inner:
            n = channels if block.length == plan.inner else 1  # channels that lie one behind the other
            for r in range(block.row, last):
                for c in range(channels // n):
                    i = c * plan.inner + block.start
                    affine_channels(at(x, r * stride + i), x_ahead, n, block.length, at(coefs, c * LANES), relu, stream,
                                    at(y, r * y_stride + i), y_ahead)
        elif one_run:
            i = block.row * width
            affine_run(at(x, i), x_ahead, block.n_rows * width, plan.fold * width, held, coefs, relu, near,
                       stream, at(y, i), y_ahead)
        elif width < NARROW and y_stride == width:
            for r in range(block.row, last, step):
                n = min(step, last - r)
                affine_run(gather(at(x, r * stride), stride, n, width, x_buffer), np.int64(0), n * width,
                           plan.fold * width, held, coefs, relu, near, stream, at(y, r * width), y_ahead)
        elif stream_rows:
            affine_runs(at(x, block.row * stride), stride, x_ahead, block.n_rows, width, width, coefs, relu,
                        stream_rows, at(y, block.row * y_stride), y_stride, y_ahead)
        elif joined:
            affine_joined(at(x, block.row * stride), stride, x_ahead, block.n_rows, width, coefs, relu,
                          at(y, block.row * width))
        else:
            affine_rows(at(x, block.row * stride), stride, x_ahead, block.n_rows, width, coefs, relu,
                        at(y, block.row * y_stride), y_stride, y_ahead)


# ---------------------------------------------------------------------------------------------------------------------
# grad_moments: sum_dy = sum(dy), sum_dy_xmu = sum(dy * (x - mean)); where a fused ReLU was off, dy counts as 0.
# ---------------------------------------------------------------------------------------------------------------------

@inline
def gate(dy, x, n_columns, coefs, relu):
    """dy, of any dtype, where the activation was on, in the bits of affine."""
    value = muladd(load(x, n_columns) - load(at(coefs, CENTER), n_columns),
                   load(at(coefs, SCALE), n_columns), load(at(coefs, OFFSET), n_columns))
    return cleared(is_off(value, relu), dy)


@inline
def grad_sums_strip(
    dy,         # IN   (n_rows, n_columns), rows `dy_stride` apart
    dy_stride,
    x,          # IN   (n_rows, n_columns), rows `x_stride` apart
    x_stride,
    n_rows,
    n_columns,  # a literal
    fetch,
    mean,       # IN   (n_columns,) float64
    coefs,      # IN   at CENTER, SCALE, OFFSET
    relu,
    s1,         # INOUT
    s2,         # INOUT
):
    g = gate(load_wide(dy, n_columns), x, n_columns, coefs, relu)
    a = g
    b = g * (load_wide(x, n_columns) - load(mean, n_columns))
    for r in range(1, n_rows):
        prefetch_row(at(dy, r * dy_stride), dy_stride, n_columns, fetch)
        prefetch_row(at(x, r * x_stride), x_stride, n_columns, fetch)
        x_row = at(x, r * x_stride)
        g = gate(load_wide(at(dy, r * dy_stride), n_columns), x_row, n_columns, coefs, relu)
        a = a + g
        b = muladd(g, load_wide(x_row, n_columns) - load(mean, n_columns), b)
    store(s1, load(s1, n_columns) + a)
    store(s2, load(s2, n_columns) + b)


@inline
def grad_sums_part(
    dy, dy_stride,
    dy_following,  # what to fetch
    x, x_stride, x_following, n_rows, mean, s1, s2,
):
    ones = hidden_ones(STRIP)
    a = b = zeros(STRIP)
    done = n_rows // PARTS * PARTS
    for r in range(0, done, PARTS):
        for i in range(PARTS):
            prefetch(at(dy_following, i * STRIP))
            prefetch(at(x_following, i * STRIP))
            g = load_wide(at(dy, (r + i) * dy_stride), STRIP)
            a = muladd(g, ones, a)
            b = muladd(g, load_wide(at(x, (r + i) * x_stride), STRIP) - load(mean, STRIP), b)
        dy_following = at(dy_following, dy_stride)
        x_following = at(x_following, x_stride)
    for r in range(done, n_rows):
        g = load_wide(at(dy, r * dy_stride), STRIP)
        a = muladd(g, ones, a)
        b = muladd(g, load_wide(at(x, r * x_stride), STRIP) - load(mean, STRIP), b)
    store(s1, load(s1, STRIP) + a)
    store(s2, load(s2, STRIP) + b)


@inline
def grad_sums_parts(dy, dy_stride, x, x_stride, n_rows, fetch, mean, coefs, relu, s1, s2):
    """HELD columns by AVX2."""
    for part in range(PARTS):
        j = part * STRIP
        if relu:
            grad_sums_strip(at(dy, j), dy_stride, at(x, j), x_stride, n_rows, STRIP, fetch,
                            at(mean, j), at(coefs, j), relu, at(s1, j), at(s2, j))
        else:
            grad_sums_part(at(dy, j), dy_stride, part_following(dy, dy_stride, n_rows, GRAD_ROWS_EACH, part),
                           at(x, j), x_stride, part_following(x, x_stride, n_rows, GRAD_ROWS_EACH, part),
                           n_rows, at(mean, j), at(s1, j), at(s2, j))


@inline
def grad_sums_group(dy, dy_stride, x, x_stride, n_rows, width, dy_ahead, x_ahead, fetch, mean, coefs, relu, s1, s2):
    j = 0
    while j + STRIP <= width:
        prefetch_rows(dy, dy_stride, n_rows, width, j, dy_ahead, fetch)
        prefetch_rows(x, x_stride, n_rows, width, j, x_ahead, fetch)
        grad_sums_strip(at(dy, j), dy_stride, at(x, j), x_stride, n_rows, STRIP, NOTHING,
                        at(mean, j), at(coefs, j), relu, at(s1, j), at(s2, j))
        j += STRIP
    if (width - j) & 8:
        grad_sums_strip(at(dy, j), dy_stride, at(x, j), x_stride, n_rows, 8, NOTHING,
                        at(mean, j), at(coefs, j), relu, at(s1, j), at(s2, j))
        j += 8
    if (width - j) & 4:
        grad_sums_strip(at(dy, j), dy_stride, at(x, j), x_stride, n_rows, 4, NOTHING,
                        at(mean, j), at(coefs, j), relu, at(s1, j), at(s2, j))
        j += 4
    while j < width:
        grad_sums_strip(at(dy, j), dy_stride, at(x, j), x_stride, n_rows, 1, NOTHING,
                        at(mean, j), at(coefs, j), relu, at(s1, j), at(s2, j))
        j += 1


@inline
def grad_sums_rows_as(
    dy, dy_stride, x, x_stride, n_rows, step, width, dy_ahead, x_ahead, fetch, mean, coefs, relu, s1, s2,
):
    done = n_rows // step * step
    for r in range(0, done, step):
        grad_sums_group(at(dy, r * dy_stride), dy_stride, at(x, r * x_stride), x_stride, step, width,
                        dy_ahead, x_ahead, fetch, mean, coefs, relu, s1, s2)
    if done < n_rows:
        grad_sums_group(at(dy, done * dy_stride), dy_stride, at(x, done * x_stride), x_stride, n_rows - done, width,
                        dy_ahead, x_ahead, fetch, mean, coefs, relu, s1, s2)


@inline
def grad_sums_held(dy, dy_stride, x, x_stride, n_rows, width, fetch, mean, coefs, relu, s1, s2):
    if width > HELD:  # longer rows are near
        fetch = NOTHING
    step = HELD_ROWS if VECTOR_BYTES == LINE else ROWS if relu else GRAD_ROWS_EACH
    for j in range(0, width, HELD):
        for r in range(0, n_rows, step):
            n = min(step, n_rows - r)
            dy_row, x_row = at(dy, r * dy_stride + j), at(x, r * x_stride + j)
            if VECTOR_BYTES == LINE:
                grad_sums_strip(dy_row, dy_stride, x_row, x_stride, n, HELD, fetch,
                                at(mean, j), at(coefs, j), relu, at(s1, j), at(s2, j))
            else:
                grad_sums_parts(dy_row, dy_stride, x_row, x_stride, n, fetch,
                                at(mean, j), at(coefs, j), relu, at(s1, j), at(s2, j))


@helper
def grad_sums_rows(dy, dy_stride, x, x_stride, n_rows, width, held, fetch, mean, coefs, relu, s1, s2):
    restrict()
    ahead = np.int64(COLUMNS_AHEAD // 2)
    if held and relu:
        grad_sums_held(dy, dy_stride, x, x_stride, n_rows, width, fetch, mean, coefs, True, s1, s2)
    elif held:
        grad_sums_held(dy, dy_stride, x, x_stride, n_rows, width, fetch, mean, coefs, False, s1, s2)
    elif relu:
        grad_sums_rows_as(dy, dy_stride, x, x_stride, n_rows, GRAD_ROWS, width, ahead, ahead, fetch,
                          mean, coefs, True, s1, s2)
    else:
        grad_sums_rows_as(dy, dy_stride, x, x_stride, n_rows, GRAD_ROWS, width, ahead, ahead, fetch,
                          mean, coefs, False, s1, s2)


@inline
def grad_sums_run(dy, x, length, width, held, fetch, mean, coefs, relu, s1, s2):
    """A contiguous run as rows of `width`, the last of them perhaps shorter."""
    n_rows = length // width
    done = n_rows * width
    grad_sums_rows(dy, width, x, width, n_rows, width, held, fetch, mean, coefs, relu, s1, s2)
    if done < length:
        grad_sums_rows(at(dy, done), width, at(x, done), width, np.int64(1), length - done,
                       np.bool_(False), fetch, mean, coefs, relu, s1, s2)


@inline
def grad_sums_lanes_as(dy, dy_ahead, x, x_ahead, length, fetch, mean, coefs, relu, s1, s2):
    lanes, one = np.int64(LANES), np.int64(1)
    n_rows = length // lanes
    done = n_rows * lanes
    grad_sums_rows_as(dy, lanes, x, lanes, n_rows, ROWS, lanes, dy_ahead, x_ahead, fetch, mean, coefs, relu, s1, s2)
    grad_sums_group(at(dy, done), lanes, at(x, done), lanes, one, length - done, dy_ahead, x_ahead,
                    fetch, mean, coefs, relu, s1, s2)


@helper
def grad_sums_lanes(dy, dy_ahead, x, x_ahead, length, fetch, mean, coefs, relu, s1, s2):
    """The same as rows of LANES."""
    restrict()
    if relu:
        grad_sums_lanes_as(dy, dy_ahead, x, x_ahead, length, fetch, mean, coefs, True, s1, s2)
    else:
        grad_sums_lanes_as(dy, dy_ahead, x, x_ahead, length, fetch, mean, coefs, False, s1, s2)


@inline
def grad_sums_apart(dy, dy_stride, x, x_stride, n_rows, width, fold, fetch, mean, coefs, relu, s1, s2):
    """ROWS wide rows, of `fold` rows each that lie apart (n_rows in all): summed where they lie."""
    for f in range(fold):
        j = f * width
        grad_sums_rows(at(dy, f * dy_stride), fold * dy_stride, at(x, f * x_stride), fold * x_stride, n_rows // fold,
                       width, np.bool_(False), fetch, at(mean, j), at(coefs, j), relu, at(s1, j), at(s2, j))


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
    mean = local(SUMS, 0.0)
    s1, s2 = at(mean, SUMS_PITCH), at(mean, 2 * SUMS_PITCH)
    c0 = tile * plan.tile
    channels = min(plan.tile, plan.channels - c0)
    width = channels * plan.repeat
    wide = plan.sums_fold * width
    step = step_rows(plan)
    row = plan.channels * plan.inner
    fetch = what_to_fetch(plan, size_of(x), 2, dy_stride == row and x_stride == row)
    spread_rows(channel_mean, 1, plan, plan.sums_fold, c0, channels, mean)
    if relu:  # else nobody reads them
        spread_rows(channel_coefs, 3, plan, plan.sums_fold, c0, channels, coefs)
    dy = at(dy, c0 * plan.inner)
    x = at(x, c0 * plan.inner)
    sum_dy = at(sum_dy, c0)
    sum_dy_xmu = at(sum_dy_xmu, c0)
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
                    grad_sums_lanes(at(dy, r * dy_stride + i), lead(dy_stride, channels * plan.inner, fetch == FAR),
                                    at(x, r * x_stride + i), lead(x_stride, channels * plan.inner, fetch == FAR),
                                    block.length, fetch, at(mean, n), at(coefs, n), relu, at(s1, n), at(s2, n))
        elif plan.sums_fold == 1:
            grad_sums_rows(at(dy, block.row * dy_stride), dy_stride, at(x, block.row * x_stride), x_stride,
                           block.n_rows, width, plan.held, fetch, mean, coefs, relu, s1, s2)
        elif dy_stride == width and x_stride == width:
            i = block.row * width
            grad_sums_run(at(dy, i), at(x, i), block.n_rows * width, wide, plan.held, fetch, mean, coefs, relu, s1, s2)
        else:
            for r in range(block.row, last, step):
                n = min(step, last - r)
                if n == step and width >= NARROW and not plan.held:
                    grad_sums_apart(at(dy, r * dy_stride), dy_stride, at(x, r * x_stride), x_stride, n, width,
                                    plan.sums_fold, fetch, mean, coefs, relu, s1, s2)
                else:
                    grad_sums_run(gather(at(dy, r * dy_stride), dy_stride, n, width, dy_buffer),
                                  gather(at(x, r * x_stride), x_stride, n, width, x_buffer),
                                  n * width, wide, plan.held, near_or_nothing(plan, size_of(x)),
                                  mean, coefs, relu, s1, s2)
        fold_sums(s1, channels, plan.repeat, plan.sums_fold)
        fold_sums(s2, channels, plan.repeat, plan.sums_fold)
        if index == chunk * plan.chunk:
            for c in range(channels):
                sum_dy[c] = s1[c]
                sum_dy_xmu[c] = s2[c]
            continue
        for c in range(channels):
            sum_dy[c] += s1[c]
            sum_dy_xmu[c] += s2[c]


@helper
def add_chunk(
    plan, left, right,
    partial,    # INOUT (n_chunks, 2, channels): sum_dy, sum_dy_xmu
    c0, c1,
):
    """The sums of chunk `right` to those of chunk `left`, for channels c0 to c1."""
    for row in range(2):
        a = at(partial, (2 * left + row) * plan.channels)
        b = at(partial, (2 * right + row) * plan.channels)
        for c in range(c0, c1):
            a[c] += b[c]


# ---------------------------------------------------------------------------------------------------------------------
# grad_affine: grad_x = factor * (((dy - shift) - rest) - (x - center) * slope); where a fused ReLU was off, dy is 0.
# Through constant statistics (training is False) it is factor * dy, whatever x holds.
# ---------------------------------------------------------------------------------------------------------------------

@inline
def grad_affine_strip(
    dy,         # IN   (n_columns,)
    x,          # IN   (n_columns,)
    n_columns,  # a literal
    coefs,      # IN   at CENTER, SCALE, OFFSET, FACTOR, SLOPE, SHIFT, REST
    relu,
    training,
    grad_x,     # OUT  may be dy: the strip is read before it is written
    put,        # store or store_past
):
    g = gate(load(dy, n_columns), x, n_columns, coefs, relu)
    if training:
        g = muladd(load(at(coefs, CENTER), n_columns) - load(x, n_columns), load(at(coefs, SLOPE), n_columns),
                   (g - load(at(coefs, SHIFT), n_columns)) - load(at(coefs, REST), n_columns))
    put(grad_x, load(at(coefs, FACTOR), n_columns) * g)


@helper
def grad_affine_rest(dy, x, n_columns, coefs, relu, training, grad_x):
    """Fewer columns than a strip has."""
    j = 0
    if n_columns & 8:
        grad_affine_strip(dy, x, 8, coefs, relu, training, grad_x, store)
        j = 8
    if n_columns & 4:
        grad_affine_strip(at(dy, j), at(x, j), 4, at(coefs, j), relu, training, at(grad_x, j), store)
        j += 4
    if n_columns & 2:
        grad_affine_strip(at(dy, j), at(x, j), 2, at(coefs, j), relu, training, at(grad_x, j), store)
        j += 2
    if n_columns & 1:
        grad_affine_strip(at(dy, j), at(x, j), 1, at(coefs, j), relu, training, at(grad_x, j), store)


@inline
def grad_affine_strips(dy, dy_ahead, x, x_ahead, n_strips, coefs, each, relu, training, stream, grad_x, grad_x_ahead):
    step = STRIP
    if grad_goes_back(grad_x, dy, x, each, stream):
        end = (n_strips - 1) * STRIP
        dy, x, grad_x, coefs = at(dy, end), at(x, end), at(grad_x, end), at(coefs, each * end)
        step = -STRIP
    for _ in range(n_strips):
        rolled()
        if stream or grad_x_ahead:
            prefetch_strip(at(dy, dy_ahead), stream)
            prefetch_strip(at(x, x_ahead), stream)
        if stream:
            grad_affine_strip(dy, x, STRIP, coefs, relu, training, grad_x, store_past)
        else:
            if grad_x_ahead:
                prefetch_strip_write(at(grad_x, grad_x_ahead))
            grad_affine_strip(dy, x, STRIP, coefs, relu, training, grad_x, store)
        dy = at(dy, step)
        x = at(x, step)
        grad_x = at(grad_x, step)
        coefs = at(coefs, each * step)


@inline
def grad_affine_runs_as(
    dy, dy_stride, dy_ahead, x, x_stride, x_ahead, n_runs, length, width, coefs, relu, training, stream,
    grad_x, grad_x_stride, grad_x_ahead,
):
    one = np.int64(1)
    for run in range(n_runs):
        dy_run, x_run, grad_x_run = at(dy, run * dy_stride), at(x, run * x_stride), at(grad_x, run * grad_x_stride)
        i = j = 0
        if stream:
            i = begin_stream(grad_x_run, length, grad_x_ahead)
        elif length > width:  # several rows
            i = min(length, before_line(grad_x_run))
        if i:
            grad_affine_rest(dy_run, x_run, i, coefs, relu, training, grad_x_run)
            j = next_column(0, i, width)
        while i + STRIP <= length:
            n = strips_ahead(j, width, length - i)
            if stream:
                grad_affine_strips(at(dy_run, i), dy_ahead, at(x_run, i), x_ahead, n, at(coefs, j), one,
                                   relu, training, True, at(grad_x_run, i), grad_x_ahead)
            elif grad_x_ahead:
                grad_affine_strips(at(dy_run, i), dy_ahead, at(x_run, i), x_ahead, n, at(coefs, j), one,
                                   relu, training, False, at(grad_x_run, i), grad_x_ahead)
            else:
                grad_affine_strips(at(dy_run, i), 0, at(x_run, i), 0, n, at(coefs, j), one,
                                   relu, training, False, at(grad_x_run, i), 0)
            i += n * STRIP
            j = next_column(j, n * STRIP, width)
        grad_affine_rest(at(dy_run, i), at(x_run, i), length - i, at(coefs, j), relu, training, at(grad_x_run, i))


@helper
def grad_affine_runs(
    dy, dy_stride, dy_ahead, x, x_stride, x_ahead, n_runs, length, width, coefs, relu, training, stream,
    grad_x, grad_x_stride, grad_x_ahead,
):
    """Runs that lie apart, each of them contiguous, as rows of `width`, the last of them perhaps shorter."""
    outline()
    if relu:
        grad_affine_runs_as(dy, dy_stride, dy_ahead, x, x_stride, x_ahead, n_runs, length, width, coefs,
                            True, training, stream, grad_x, grad_x_stride, grad_x_ahead)
    else:
        grad_affine_runs_as(dy, dy_stride, dy_ahead, x, x_stride, x_ahead, n_runs, length, width, coefs,
                            False, training, stream, grad_x, grad_x_stride, grad_x_ahead)


@inline
def grad_affine_channels_as(
    dy, dy_ahead, x, x_ahead, channels, inner, coefs, relu, training, stream, grad_x, grad_x_ahead,
):
    none = np.int64(0)
    length = channels * inner
    i = min(length, begin_stream(grad_x, length, none) if stream else before_line(grad_x))
    left = inner - i  # of the channel
    grad_affine_rest(dy, x, i, coefs, relu, training, grad_x)
    while i + STRIP <= length:
        n = left // STRIP
        if stream:
            grad_affine_strips(at(dy, i), dy_ahead, at(x, i), x_ahead, n, coefs, none, relu, training, True,
                               at(grad_x, i), grad_x_ahead)
        elif grad_x_ahead:
            grad_affine_strips(at(dy, i), dy_ahead, at(x, i), x_ahead, n, coefs, none, relu, training, False,
                               at(grad_x, i), grad_x_ahead)
        else:
            grad_affine_strips(at(dy, i), 0, at(x, i), 0, n, coefs, none, relu, training, False, at(grad_x, i), 0)
        i += n * STRIP
        left -= n * STRIP
        if i + STRIP <= length:
            grad_affine_strips(at(dy, i), dy_ahead, at(x, i), x_ahead, 1, at(coefs, LANES - left), none, relu, training,
                               stream, at(grad_x, i), grad_x_ahead)
            i += STRIP
            left += inner - STRIP
            coefs = at(coefs, LANES)
    grad_affine_rest(at(dy, i), at(x, i), length - i, coefs, relu, training, at(grad_x, i))


@helper
def grad_affine_channels(
    dy, dy_ahead, x, x_ahead, channels, inner,
    coefs,      # each channel's LANES times
    relu, training, stream, grad_x, grad_x_ahead,
):
    """Channels that lie one behind the other, as one run: a strip may run over the end of a channel."""
    outline()
    if relu and stream:
        grad_affine_channels_as(dy, dy_ahead, x, x_ahead, channels, inner, coefs, True, training, True,
                                grad_x, grad_x_ahead)
    elif relu:
        grad_affine_channels_as(dy, dy_ahead, x, x_ahead, channels, inner, coefs, True, training, False,
                                grad_x, grad_x_ahead)
    elif stream:
        grad_affine_channels_as(dy, dy_ahead, x, x_ahead, channels, inner, coefs, False, training, True,
                                grad_x, grad_x_ahead)
    else:
        grad_affine_channels_as(dy, dy_ahead, x, x_ahead, channels, inner, coefs, False, training, False,
                                grad_x, grad_x_ahead)


@inline
def grad_affine_rows_as(
    dy, dy_stride, dy_ahead, x, x_stride, x_ahead, n_rows, width, coefs, relu, training,
    grad_x, grad_x_stride, grad_x_ahead,
):
    begin = before_line(grad_x) if on_lines(grad_x, grad_x_stride, width) else 0
    n_strips = (width - begin) // STRIP
    end = begin + n_strips * STRIP
    one = np.int64(1)
    for row in range(n_rows):
        dy_row, x_row, grad_x_row = at(dy, row * dy_stride), at(x, row * x_stride), at(grad_x, row * grad_x_stride)
        if begin:
            grad_affine_rest(dy_row, x_row, begin, coefs, relu, training, grad_x_row)
        if grad_x_ahead:
            grad_affine_strips(at(dy_row, begin), dy_ahead, at(x_row, begin), x_ahead, n_strips, at(coefs, begin), one,
                               relu, training, False, at(grad_x_row, begin), grad_x_ahead)
        else:
            grad_affine_strips(at(dy_row, begin), 0, at(x_row, begin), 0, n_strips, at(coefs, begin), one,
                               relu, training, False, at(grad_x_row, begin), 0)
        if end < width:
            grad_affine_rest(at(dy_row, end), at(x_row, end), width - end, at(coefs, end), relu, training,
                             at(grad_x_row, end))


@helper
def grad_affine_rows(
    dy, dy_stride, dy_ahead, x, x_stride, x_ahead, n_rows, width, coefs, relu, training,
    grad_x, grad_x_stride, grad_x_ahead,
):
    """Rows that lie apart, through the caches."""
    outline()
    if relu:
        grad_affine_rows_as(dy, dy_stride, dy_ahead, x, x_stride, x_ahead, n_rows, width, coefs, True, training,
                            grad_x, grad_x_stride, grad_x_ahead)
    else:
        grad_affine_rows_as(dy, dy_stride, dy_ahead, x, x_stride, x_ahead, n_rows, width, coefs, False, training,
                            grad_x, grad_x_stride, grad_x_ahead)


@inline
def grad_affine_joined_as(
    dy, dy_stride, dy_ahead, x, x_stride, x_ahead, n_rows, width, coefs, relu, training, grad_x,
):
    dy_both, x_both = local(BOTH, x), local(BOTH, x)
    one, start, rest = np.int64(1), before_line(grad_x), 0
    grad_affine_rest(dy, x, start, coefs, relu, training, grad_x)
    for row in range(n_rows):
        dy_row, x_row, grad_x_row = at(dy, row * dy_stride), at(x, row * x_stride), at(grad_x, row * width)
        n = (width - start) // STRIP
        rest = (width - start) % STRIP
        grad_affine_strips(at(dy_row, start), dy_ahead, at(x_row, start), x_ahead, n, at(coefs, start), one,
                           relu, training, True, at(grad_x_row, start), one)
        start += n * STRIP
        if rest and row + 1 < n_rows:
            grad_affine_strip(join(at(dy_row, width), rest, at(dy_row, dy_stride), dy_both),
                              join(at(x_row, width), rest, at(x_row, x_stride), x_both), STRIP, at(coefs, start),
                              relu, training, at(grad_x_row, start), store_past)
            start += STRIP
        start -= width
    n = width - rest
    grad_affine_rest(at(dy, (n_rows - 1) * dy_stride + n), at(x, (n_rows - 1) * x_stride + n), rest, at(coefs, n),
                     relu, training, at(grad_x, (n_rows - 1) * width + n))


@helper
def grad_affine_joined(
    dy, dy_stride, dy_ahead, x, x_stride, x_ahead, n_rows, width, coefs, relu, training, grad_x,
):
    """Rows that lie apart, past the caches to rows that do not."""
    outline()
    if n_rows == 0:
        return
    if relu:
        grad_affine_joined_as(dy, dy_stride, dy_ahead, x, x_stride, x_ahead, n_rows, width, coefs, True, training,
                              grad_x)
    else:
        grad_affine_joined_as(dy, dy_stride, dy_ahead, x, x_stride, x_ahead, n_rows, width, coefs, False, training,
                              grad_x)


@inline
def grad_affine_loaded(dy, x, n_columns, coefs, relu, center, slope, shift, rest, factor, grad_x):
    """In training, where the coefficients are in registers, but for those of the gate."""
    g = gate(load(dy, n_columns), x, n_columns, coefs, relu)
    store(grad_x, factor * muladd(center - load(x, n_columns), slope, (g - shift) - rest))


@inline
def grad_affine_pair(
    dy,         # IN   a strip of two rows, one behind the other
    x,          # IN   likewise
    width, coefs, relu,
    grad_x,     # OUT  may be dy
):
    center, slope = load(at(coefs, CENTER), STRIP), load(at(coefs, SLOPE), STRIP)
    shift, rest, factor = load(at(coefs, SHIFT), STRIP), load(at(coefs, REST), STRIP), load(at(coefs, FACTOR), STRIP)
    grad_affine_loaded(dy, x, STRIP, coefs, relu, center, slope, shift, rest, factor, grad_x)
    grad_affine_loaded(at(dy, width), at(x, width), STRIP, coefs, relu, center, slope, shift, rest, factor,
                       at(grad_x, width))


@inline
def grad_affine_pairs_as(dy, x, n_pairs, width, coefs, relu, near, grad_x):
    first, step = (width - STRIP, -STRIP) if grad_goes_back(grad_x, dy, x, 1, False) else (0, STRIP)
    for pair in range(n_pairs):
        for strip in range(width // STRIP):
            rolled()
            j = first + strip * step
            i = 2 * pair * width + j
            for r in range(0 if near else 2):
                prefetch_strip(at(dy, i + r * width + AHEAD), False)
                prefetch_strip(at(x, i + r * width + AHEAD), False)
                prefetch_strip_write(at(grad_x, i + r * width + AHEAD))
            grad_affine_pair(at(dy, i), at(x, i), width, at(coefs, j), relu, at(grad_x, i))


@helper
def grad_affine_pairs(dy, x, n_pairs, width, coefs, relu, near, grad_x):
    outline()
    if relu and near:
        grad_affine_pairs_as(dy, x, n_pairs, width, coefs, True, True, grad_x)
    elif relu:
        grad_affine_pairs_as(dy, x, n_pairs, width, coefs, True, False, grad_x)
    elif near:
        grad_affine_pairs_as(dy, x, n_pairs, width, coefs, False, True, grad_x)
    else:
        grad_affine_pairs_as(dy, x, n_pairs, width, coefs, False, False, grad_x)


@inline
def grad_affine_held_as(dy, x, n_rows, coefs, relu, grad_x):
    center, slope = load(at(coefs, CENTER), HELD), load(at(coefs, SLOPE), HELD)
    shift, rest, factor = load(at(coefs, SHIFT), HELD), load(at(coefs, REST), HELD), load(at(coefs, FACTOR), HELD)
    for row in range(n_rows):
        rolled()
        i = row * HELD
        grad_affine_loaded(at(dy, i), at(x, i), HELD, coefs, relu, center, slope, shift, rest, factor, at(grad_x, i))


@helper
def grad_affine_held(dy, x, n_rows, coefs, relu, grad_x):
    """Rows of HELD columns, one behind the other, with the coefficients in registers."""
    outline()
    if relu:
        grad_affine_held_as(dy, x, n_rows, coefs, True, grad_x)
    else:
        grad_affine_held_as(dy, x, n_rows, coefs, False, grad_x)


@inline
def grad_affine_run(
    dy, dy_ahead, x, x_ahead, length, width,
    held,       # IN   whether rows of HELD columns may go through grad_affine_held
    coefs, relu, training, stream, grad_x, grad_x_ahead,
):
    one = np.int64(1)
    held = held and training and not stream and not grad_goes_back(grad_x, dy, x, 1, False)
    n = count_held(grad_x, length) if held else count_pairs(grad_x, length, width, stream or not training)
    begin = before_line(grad_x) if n > 0 else 0
    done = begin + n * (HELD if held else 2 * width)
    if n > 0:
        grad_affine_rest(dy, x, begin, coefs, relu, training, grad_x)
    if n > 0 and held:
        grad_affine_held(at(dy, begin), at(x, begin), n, at(coefs, begin), relu, at(grad_x, begin))
    elif n > 0:
        grad_affine_pairs(at(dy, begin), at(x, begin), n, width, at(coefs, begin), relu, grad_x_ahead == 0,
                          at(grad_x, begin))
    grad_affine_runs(at(dy, done), one, dy_ahead, at(x, done), one, x_ahead, one, length - done, width,
                     at(coefs, begin), relu, training, stream, at(grad_x, done), one, grad_x_ahead)


@inline
def grad_affine_task(
    dy, dy_stride, x, x_stride, plan, band, chunk, tile,
    channel_coefs,  # IN   (3, channels): center, scale, offset
    linear,         # IN   (4, channels): factor, slope, shift, rest
    relu, training, stream,
    grad_x, grad_x_stride,
):
    memory = local(COEFS, x)
    dy_buffer = local(BUFFER, x)
    x_buffer = local(BUFFER, x)
    c0 = band.c0 + tile * band.tile
    channels = min(band.tile, band.c1 - c0)
    width = channels * plan.repeat
    step = ROWS * plan.fold
    segment = channels * plan.inner if plan.by_inner else width
    dy_ahead, x_ahead = lead(dy_stride, segment, stream), lead(x_stride, segment, stream)
    fetches = fetches_ahead(is_near(plan, size_of(x)), stream)
    grad_x_ahead = lead(grad_x_stride, segment, False) if fetches else 0
    stream_rows = stream and (plan.fold == 1 or has_whole_lines(grad_x, grad_x_stride))
    one_run = not plan.by_inner and dy_stride == width and x_stride == width and grad_x_stride == width
    joined = stream and not stream_rows and grad_x_stride == width
    held = holds_coefs(plan, width, size_of(x))
    aligned = not plan.by_inner and (one_run or joined or on_lines(grad_x, grad_x_stride, width))
    coefs = place_coefs(memory, before_line(grad_x) if aligned else 0)
    spread_rows(channel_coefs, 3 if relu else 1, plan, plan.fold, c0, channels, coefs)  # without a gate, the center
    spread_rows(linear, 4, plan, plan.fold, c0, channels, at(coefs, FACTOR))
    dy = at(dy, c0 * plan.inner)
    x = at(x, c0 * plan.inner)
    grad_x = at(grad_x, c0 * plan.inner)
    for index in range(chunk * plan.chunk, min((chunk + 1) * plan.chunk, plan.n_blocks)):
        block = block_within(plan, index, band)
        last = block.row + block.n_rows
        if plan.by_inner:
            n = channels if block.length == plan.inner else 1  # channels that lie one behind the other
            for r in range(block.row, last):
                for c in range(channels // n):
                    i = c * plan.inner + block.start
                    grad_affine_channels(at(dy, r * dy_stride + i), dy_ahead, at(x, r * x_stride + i), x_ahead,
                                         n, block.length, at(coefs, c * LANES), relu, training, stream,
                                         at(grad_x, r * grad_x_stride + i), grad_x_ahead)
        elif one_run:
            i = block.row * width
            grad_affine_run(at(dy, i), dy_ahead, at(x, i), x_ahead, block.n_rows * width, plan.fold * width,
                            held, coefs, relu, training, stream, at(grad_x, i), grad_x_ahead)
        elif width < NARROW and grad_x_stride == width:
            for r in range(block.row, last, step):
                n = min(step, last - r)
                grad_affine_run(gather(at(dy, r * dy_stride), dy_stride, n, width, dy_buffer), np.int64(0),
                                gather(at(x, r * x_stride), x_stride, n, width, x_buffer), np.int64(0), n * width,
                                plan.fold * width, held, coefs, relu, training, stream, at(grad_x, r * width),
                                grad_x_ahead)
        elif stream_rows:
            grad_affine_runs(at(dy, block.row * dy_stride), dy_stride, dy_ahead,
                             at(x, block.row * x_stride), x_stride, x_ahead, block.n_rows, width, width,
                             coefs, relu, training, stream_rows,
                             at(grad_x, block.row * grad_x_stride), grad_x_stride, grad_x_ahead)
        elif joined:
            grad_affine_joined(at(dy, block.row * dy_stride), dy_stride, dy_ahead,
                               at(x, block.row * x_stride), x_stride, x_ahead, block.n_rows, width,
                               coefs, relu, training, at(grad_x, block.row * width))
        else:
            grad_affine_rows(at(dy, block.row * dy_stride), dy_stride, dy_ahead,
                             at(x, block.row * x_stride), x_stride, x_ahead, block.n_rows, width,
                             coefs, relu, training,
                             at(grad_x, block.row * grad_x_stride), grad_x_stride, grad_x_ahead)


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
    """In the twin a thread may have its own columns, too. Here it would save little: of two threads, forward of 128x512
    and 256x256 took 0.8 to 1 of the time of one, moments 1.3."""
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
    c0 = part.tile * plan.tile
    c1 = min(c0 + part.n_tiles * plan.tile, plan.channels)
    if plan.by_inner or plan.outer < MANY_ROWS * part.size:
        n_tasks = plan.n_chunks * part.n_tiles
        return Band(c0, c1, plan.tile, part.n_tiles, share(n_tasks, part, 0), share(n_tasks, part, 1), 0, plan.outer)
    tile = WIDE // plan.repeat
    n_tiles = ceil_div(c1 - c0, tile)
    rows = plan.chunk * plan.block_outer
    row, end = share(plan.outer, part, 0), share(plan.outer, part, 1)
    return Band(c0, c1, tile, n_tiles, row // rows * n_tiles, ceil_div(end, rows) * n_tiles, row, end)


# Partial results merge as a binary tree: chunk 1 into 0, 3 into 2, then 2 into 0, and so on. A thread merges at once
# what it has summed itself; what is of several threads waits for all of them, in a stage of its own.

@helper
def owner(plan, part, chunk, tile):
    """Which of the part's threads sums this one of its tiles of this chunk; see share."""
    return ((chunk * part.n_tiles + tile + 1) * part.size - 1) // (plan.n_chunks * part.n_tiles)


@inline
def merge_node(plan, left, right, end, moments, partial, c0, c1):
    if moments:
        merge_chunk(plan, left, right, end, partial, c0, c1)
    else:
        add_chunk(plan, left, right, partial, c0, c1)


@helper
def merge_own(plan, part, chunk, tile, moments, partial):
    """What this chunk, just summed, completes of the tree and this thread has summed alone."""
    c0 = (part.tile + tile) * plan.tile
    c1 = min(c0 + plan.tile, plan.channels)
    n = 1
    while n < plan.n_chunks:
        left = chunk // (2 * n) * (2 * n)
        end = min(left + 2 * n, plan.n_chunks)
        if chunk + 1 < end or owner(plan, part, left, tile) < part.rank:
            return
        if left + n < end:
            merge_node(plan, left, left + n, end, moments, partial, c0, c1)
        n *= 2


@helper
def merge_others(
    plan, part,
    sums,       # IN   the part as the threads that summed divided it
    moments, partial,
):
    """The rest of the tree, for this thread's share of the channels."""
    for tile in range(part.n_tiles if sums.size > 1 else 0):
        c0 = max((part.tile + tile) * plan.tile, channel_share(plan, part, 0))
        c1 = min((part.tile + tile + 1) * plan.tile, channel_share(plan, part, 1))
        n = 1
        while c0 < c1 and n < plan.n_chunks:
            for left in range(0, plan.n_chunks - n, 2 * n):
                end = min(left + 2 * n, plan.n_chunks)
                if owner(plan, sums, left, tile) < owner(plan, sums, end - 1, tile):
                    merge_node(plan, left, left + n, end, moments, partial, c0, c1)
            n *= 2


def moments_worker(part, job):
    part = loaded(part)
    x, stride, plan, partial = loaded(job)
    n_tasks = plan.n_chunks * part.n_tiles
    for task in range(share(n_tasks, part, 0), share(n_tasks, part, 1)):
        chunk, tile = task // part.n_tiles, task % part.n_tiles
        row = at(partial, 3 * chunk * plan.channels)
        moments_task(x, stride, plan, chunk, part.tile + tile, row, at(row, plan.channels), at(row, 2 * plan.channels))
        merge_own(plan, part, chunk, tile, True, partial)


def merge_worker(part, job):
    part = loaded(part)
    plan, n_summing, partial = loaded(job)
    merge_others(plan, part, Part(part.tile, part.n_tiles, 0, n_summing), True, partial)
    c0 = channel_share(plan, part, 0)
    settle(at(partial, c0), at(partial, plan.channels + c0), channel_share(plan, part, 1) - c0)


def normalize_worker(part, job):
    part = loaded(part)
    plan, mean, rest, has_rest, m2, n, gamma, has_gamma, beta, has_beta, eps, stats, coefs = loaded(job)
    normalize_channels(plan, channel_share(plan, part, 0), channel_share(plan, part, 1), mean, rest, has_rest, m2, n,
                       gamma, has_gamma, beta, has_beta, eps, stats, coefs)


def affine_worker(part, job):
    part = loaded(part)
    x, stride, plan, coefs, relu, stream, y, y_stride = loaded(job)
    band = band_of(plan, part)
    # Backwards: what moments_worker read last is still in the cache.
    for task in range(band.last - 1, band.first - 1, -1):
        affine_task(x, stride, plan, band, task // band.n_tiles, task % band.n_tiles, coefs, relu, stream, y, y_stride)
    if stream:
        stream_end()


def grad_moments_worker(part, job):
    part = loaded(part)
    dy, dy_stride, x, x_stride, plan, mean, coefs, relu, partial = loaded(job)
    n_tasks = plan.n_chunks * part.n_tiles
    for task in range(share(n_tasks, part, 0), share(n_tasks, part, 1)):
        chunk, tile = task // part.n_tiles, task % part.n_tiles
        row = at(partial, 2 * chunk * plan.channels)
        grad_moments_task(dy, dy_stride, x, x_stride, plan, chunk, part.tile + tile, mean, coefs, relu,
                          row, at(row, plan.channels))
        merge_own(plan, part, chunk, tile, False, partial)


def add_worker(part, job):
    part = loaded(part)
    plan, n_summing, partial = loaded(job)
    merge_others(plan, part, Part(part.tile, part.n_tiles, 0, n_summing), False, partial)


def gradient_worker(part, job):
    part = loaded(part)
    plan, partial, stats, coefs, training, linear, grads = loaded(job)
    gradient_channels(plan, channel_share(plan, part, 0), channel_share(plan, part, 1),
                      partial, at(partial, plan.channels), stats, coefs, training, linear, grads)


def grad_affine_worker(part, job):
    part = loaded(part)
    dy, dy_stride, x, x_stride, plan, coefs, linear, relu, training, stream, grad_x, grad_x_stride = loaded(job)
    band = band_of(plan, part)
    for task in range(band.last - 1, band.first - 1, -1):
        grad_affine_task(dy, dy_stride, x, x_stride, plan, band, task // band.n_tiles, task % band.n_tiles,
                         coefs, linear, relu, training, stream, grad_x, grad_x_stride)
    if stream:
        stream_end()


# What a job is, b: bool, i: integer, f: float64, p: plan, x: pointer to the data's type, d: pointer to float64.
JOBS = {
    moments_worker: "xipd",
    merge_worker: "pid",
    normalize_worker: "pddbdfxbxbfdx",
    affine_worker: "xipxbbxi",
    grad_moments_worker: "xixipdxbd",
    add_worker: "pid",
    gradient_worker: "pddxbxx",
    grad_affine_worker: "xixipxxbbbxi",
}
