"""The kernels compiled just in time. kernels/__init__.py holds the contract; cython_kernels.pyx is this file's twin.

Read it downwards: what Numba has no word for; the plan (how the data is cut, by shape alone); then for each kernel its
strip (the hot loop), its rows and runs, its task (one tile of one chunk); the workers (what one thread does), the
drivers (a team of threads), and what Python calls.

Nothing is compiled at import, but on the first call for a dtype; warmup() compiles everything. The loops work on bare
pointers, as the twin's do: an array's index is tested for being negative, and its inner stride is unknown, and either
keeps a loop from being vectorised. No fastmath: it would take NaN for a number.
"""

import functools
import threading
import types as python_types
from typing import NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import cfunc, njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

ROWS = 8               # wide rows a step: accumulators are loaded and stored once for eight rows
STRIP = 32             # columns whose next rows are fetched ahead at a time
TILE = 512             # columns whose accumulators a task keeps on its stack (12 KiB of L1)
LANES = 16             # accumulators a channel where the inner axis is swept
SHORT_INNER = 32       # inner axes shorter than this are swept as columns
BLOCK_ROWS = 128       # wide rows a block; a block has one pivot
BLOCK_INNER = 8192     # inner elements a channel a block
PIVOT_ROWS = 4         # wide rows whose mean is the pivot
PIVOT_INNER = 256      # the same along the inner axis
MAX_CHUNKS = 64        # partial results a channel, at most; so also the threads that can share a column
SERIAL_BYTES = 65536   # a thread's fair share: below it, waking the thread costs more than it saves
STREAM_BYTES = 1 << 24 # outputs from here on bypass the caches
LINE = 64              # bytes of a cache line
BUFFER = ROWS * TILE   # elements of a task's buffers
# Where a tile's coefficients lie in its one array, so that a strip takes one pointer for all of them:
CENTER = 0             # y = (x - center) * scale + offset
SCALE = TILE
OFFSET = 2 * TILE
FACTOR = 3 * TILE      # grad_x = factor * (((dy - shift) - rest) - (x - center) * slope)
SLOPE = 4 * TILE
SHIFT = 5 * TILE
REST = 6 * TILE
COEFS = 7 * TILE
# How an output is written:
DIRECT = 0
BUFFERED = 1           # it is the input: a loop may be vectorised without tests only if it writes elsewhere
STREAMED = 2           # past the caches

OPTIONS = {"nogil": True, "error_model": "numpy"}
helper = njit(**OPTIONS, no_cpython_wrapper=True, no_cfunc_wrapper=True)
inline = njit(**OPTIONS, inline="always")


# ---------------------------------------------------------------------------------------------------------------------
# What Numba has no word for: pointers, arrays on the stack, prefetches and stores past the caches.
# ---------------------------------------------------------------------------------------------------------------------

@intrinsic
def data(typingctx, array):
    """The address of array[0, 0, ...]."""
    def codegen(context, builder, signature, args):
        return context.make_array(signature.args[0])(context, builder, args[0]).data
    return types.CPointer(array.dtype)(array), codegen


@intrinsic
def at(typingctx, pointer, index):
    """The address of pointer[index]."""
    def codegen(context, builder, signature, args):
        return builder.gep(args[0], [args[1]])
    return pointer(pointer, types.int64), codegen


@intrinsic
def address(typingctx, pointer):
    """The pointer as an integer."""
    def codegen(context, builder, signature, args):
        return builder.ptrtoint(args[0], ir.IntType(64))
    return types.int64(pointer), codegen


@intrinsic
def zero(typingctx, value):
    """0 in the type of value: a literal 0 would take float32 arithmetic to float64."""
    def codegen(context, builder, signature, args):
        return context.get_constant(value, 0)
    return value(value), codegen


@intrinsic(prefer_literal=True)
def local(typingctx, size, pointer):
    """An uninitialised array of `size` elements of the pointer's type (or of the type of a number) on the stack."""
    if not isinstance(size, types.IntegerLiteral):
        return None
    dtype = getattr(pointer, "dtype", pointer)
    def codegen(context, builder, signature, args):
        return cgutils.alloca_once(builder, context.get_value_type(dtype), size=size.literal_value)
    return types.CPointer(dtype)(size, pointer), codegen


@intrinsic
def restrict(typingctx):
    """Promises that the pointers passed to the calling function do not overlap (C's restrict); keeps it a function."""
    def codegen(context, builder, signature, args):
        for arg in builder.function.args:
            if isinstance(arg.type, ir.PointerType):
                arg.add_attribute("noalias")
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()
    return types.void(), codegen


@intrinsic
def prefetch(typingctx, pointer):
    """Asks for the cache line at pointer, which need not be valid."""
    def codegen(context, builder, signature, args):
        i32, byte_pointer = ir.IntType(32), ir.IntType(8).as_pointer()
        function_type = ir.FunctionType(ir.VoidType(), [byte_pointer, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch")
        builder.call(function, [builder.bitcast(args[0], byte_pointer), i32(0), i32(3), i32(1)])
        return context.get_dummy_value()
    return types.void(pointer), codegen


@intrinsic
def stream_line(typingctx, target, source):
    """Copies LINE bytes past the caches to target, which is aligned to LINE."""
    def codegen(context, builder, signature, args):
        line = ir.VectorType(ir.IntType(8), LINE).as_pointer()
        value = builder.load(builder.bitcast(args[1], line), align=1)
        store = builder.store(value, builder.bitcast(args[0], line), align=LINE)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()
    return types.void(target, source), codegen


@intrinsic
def stream_end(typingctx):
    """Orders non-temporal stores before what follows; a thread calls it once, after its last one."""
    def codegen(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()
    return types.void(), codegen


@intrinsic
def call_at(typingctx, address, arguments):
    """Calls the C function at an address; `arguments` is a tuple."""
    def codegen(context, builder, signature, args):
        values = cgutils.unpack_tuple(builder, args[1])
        function_type = ir.FunctionType(ir.VoidType(), [value.type for value in values])
        builder.call(builder.inttoptr(args[0], function_type.as_pointer()), values)
        return context.get_dummy_value()
    return types.void(address, arguments), codegen


@helper
def copy(target, source, n, stream):
    """memcpy, past the caches if `stream`: whole lines go out by non-temporal stores, ragged ends by plain ones."""
    restrict()
    i = 0
    if stream:
        itemsize = address(at(target, 1)) - address(target)
        i = min(n, (-address(target) & (LINE - 1)) // itemsize)
        for j in range(i):
            target[j] = source[j]
        while (n - i) * itemsize >= LINE:
            stream_line(at(target, i), at(source, i))
            i += LINE // itemsize
    for j in range(i, n):
        target[j] = source[j]


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


@helper
def ceil_div(a, b):
    return (a + b - 1) // b


@helper
def make_plan(outer, channels, inner):
    by_inner = inner >= SHORT_INNER
    repeat = LANES if by_inner else inner
    n_tiles = ceil_div(channels, TILE // repeat)
    tile = ceil_div(channels, n_tiles)
    if not by_inner and n_tiles > 1:
        tile = min(ceil_div(tile, STRIP) * STRIP, TILE // repeat)
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


@njit(**OPTIONS)
def team_wanted(outer, channels, inner, itemsize, num_threads):
    """How many of num_threads are worth waking: no more than there are tasks, each with its fair share of bytes."""
    plan = make_plan(outer, channels, inner)
    n = min(num_threads, plan.n_chunks * plan.n_tiles)
    return max(1, min(n, outer * channels * inner * itemsize // SERIAL_BYTES))


# ---------------------------------------------------------------------------------------------------------------------
# Wide rows: n_rows rows of `width` columns are laid side by side to make rows of fold * width columns.
# ---------------------------------------------------------------------------------------------------------------------

@helper
def spread(wide, channels, repeat, fold):
    """wide[c] becomes wide[(f * channels + c) * repeat + i] for each f and i, in place."""
    if repeat > 1:
        for c in range(channels - 1, -1, -1):
            for i in range(repeat - 1, -1, -1):
                wide[c * repeat + i] = wide[c]
    width = channels * repeat
    for j in range(width, width * fold):
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
def gather(x, stride, n_rows, width, buffer):
    """The rows one behind the other: x itself where they lie so already, else a copy in buffer."""
    if stride == width or n_rows == 1:
        return x
    for r in range(n_rows):
        for j in range(width):
            buffer[r * width + j] = x[r * stride + j]
    return buffer


# ---------------------------------------------------------------------------------------------------------------------
# moments: sums about a pivot near the mean, in one read of the data.
#
#     s1 = sum(x - pivot)    s2 = sum((x - pivot)^2)    mean = pivot + s1 / n    m2 = s2 - s1^2 / n
#
# The pivot is the mean of the block's first rows, k of its n values, so (mean - pivot)^2 <= m2 / k, and the subtraction
# costs at most a factor 1 + n / k <= 33 of float64's 1e-16, whatever the data. It is computed as first + mean(x -
# first), so a constant column has deviations of exactly 0.
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


@helper
def sums_rows(x, stride, n_rows, width, pivot, s1, s2):
    restrict()
    for i in range(n_rows // ROWS):
        rows = at(x, i * ROWS * stride)
        for j in range(0, width, STRIP):
            n = min(STRIP, width - j)
            for k in range(ROWS, 2 * ROWS):
                for line in range(j, j + n, 16):
                    prefetch(at(rows, k * stride + line))
            sums_strip(at(rows, j), stride, ROWS, n, at(pivot, j), at(s1, j), at(s2, j))
    for i in range(n_rows - n_rows % ROWS, n_rows):
        sums_strip(at(x, i * stride), stride, 1, width, pivot, s1, s2)


@inline
def sums_run(x, length, width, pivot, s1, s2):
    """A contiguous run as rows of `width`, the last of them perhaps shorter."""
    n_rows = length // width
    sums_rows(x, width, n_rows, width, pivot, s1, s2)
    if n_rows * width < length:
        sums_rows(at(x, n_rows * width), width, min(1, length), length - n_rows * width, pivot, s1, s2)


@helper
def sums_block(x, stride, n_rows, length, channels, plan, buffer, pivot, s1, s2):
    width = channels * plan.repeat
    for j in range(width * plan.fold):
        s1[j] = 0
        s2[j] = 0
    if plan.by_inner:
        for r in range(n_rows):
            for c in range(channels):
                n = c * plan.repeat
                sums_run(at(x, r * stride + c * plan.inner), length, plan.repeat, at(pivot, n), at(s1, n), at(s2, n))
    elif plan.fold == 1:
        sums_rows(x, stride, n_rows, width, pivot, s1, s2)
    elif stride == width:
        sums_run(x, n_rows * width, plan.fold * width, pivot, s1, s2)
    else:
        step = ROWS * plan.fold
        for i in range(ceil_div(n_rows, step)):
            n = min(step, n_rows - i * step)
            rows = gather(at(x, i * step * stride), stride, n, width, buffer)
            sums_run(rows, n * width, plan.fold * width, pivot, s1, s2)
    fold_sums(s1, channels, plan.repeat, plan.fold)
    fold_sums(s2, channels, plan.repeat, plan.fold)


@helper
def merge_moments(n_a, mean, m2, n_b, mean_b, m2_b, channels):
    """Chan, Golub and LeVeque (1979): delta = mean_b - mean, m2 += m2_b + delta^2 n_a n_b / (n_a + n_b)."""
    restrict()
    weight = n_b / (n_a + n_b)
    cross = n_a * (n_b / (n_a + n_b))
    if n_a == 0:  # delta^2 could overflow
        for c in range(channels):
            mean[c] = mean_b[c]
            m2[c] = m2_b[c]
        return
    for c in range(channels):
        delta = mean_b[c] - mean[c]
        mean[c] += delta * weight
        m2[c] += m2_b[c] + delta * delta * cross


@helper
def moments_task(
    x, stride, plan, chunk, tile,
    mean,              # OUT  (channels,) of this chunk
    m2,                # OUT
):
    buffer = local(BUFFER, x)
    pivot = local(TILE, 0.0)
    s1 = local(TILE, 0.0)
    s2 = local(TILE, 0.0)
    mean_b = local(TILE, 0.0)
    c0 = tile * plan.tile
    channels = min(plan.tile, plan.channels - c0)
    mean = at(mean, c0)
    m2 = at(m2, c0)
    count = 0.0
    for index in range(chunk * plan.chunk, min((chunk + 1) * plan.chunk, plan.n_blocks)):
        block = block_at(plan, index)
        first = at(x, block.row * stride + c0 * plan.inner + block.start)

        for c in range(channels):
            pivot[c] = first[c * plan.inner]
            mean_b[c] = pivot[c]
        spread(pivot, channels, plan.repeat, plan.fold)
        k_length = min(block.length, PIVOT_INNER)
        k_rows = min(block.n_rows, ceil_div(PIVOT_INNER, k_length) if plan.by_inner else PIVOT_ROWS * plan.fold)
        sums_block(first, stride, k_rows, k_length, channels, plan, buffer, pivot, s1, s2)
        for c in range(channels):
            mean_b[c] += s1[c] / (k_rows * k_length)
            pivot[c] = mean_b[c]
        spread(pivot, channels, plan.repeat, plan.fold)

        sums_block(first, stride, block.n_rows, block.length, channels, plan, buffer, pivot, s1, s2)
        n = float(block.n_rows * block.length)
        for c in range(channels):
            mean_b[c] += s1[c] / n
            s2[c] -= s1[c] * s1[c] / n
        merge_moments(count, mean, m2, n, mean_b, s2, channels)
        count += n


@helper
def chunk_count(plan, chunk):
    """Values a channel in the first `chunk` chunks."""
    n_blocks = min(chunk * plan.chunk, plan.n_blocks)
    if n_blocks == plan.n_blocks:
        return float(plan.outer * plan.inner)
    block = block_at(plan, n_blocks)
    return float(block.row * plan.inner + block.start * min(plan.block_outer, plan.outer - block.row))


@helper
def merge_chunks(plan, mean, m2, c0, c1):
    """Chunks 1, 2, ... into chunk 0, in that order, for channels c0 to c1."""
    for chunk in range(1, plan.n_chunks):
        before = chunk_count(plan, chunk)
        after = chunk_count(plan, chunk + 1)
        first = chunk * plan.channels + c0
        merge_moments(before, at(mean, c0), at(m2, c0), after - before, at(mean, first), at(m2, first), c1 - c0)


# ---------------------------------------------------------------------------------------------------------------------
# The per-channel arithmetic between the passes, in float64.
# ---------------------------------------------------------------------------------------------------------------------

@helper
def normalize_channels(
    channels,
    mean,       # IN   (channels,) float64
    m2,         # IN   (channels,) float64
    n,
    gamma,      # IN   (channels,) if has_gamma, else ones
    has_gamma,
    beta,       # IN   (channels,) if has_beta, else zeros
    has_beta,
    eps,
    stats,      # OUT  (3, channels) float64: mean, var, invstd
    coefs,      # OUT  (3, channels): center, scale, offset
):
    """The mean in two floats: what the data's dtype holds is the center, the rest goes into the offset."""
    restrict()
    var, invstd = at(stats, channels), at(stats, 2 * channels)
    scale, offset = at(coefs, channels), at(coefs, 2 * channels)
    for c in range(channels):
        stats[c] = mean[c]
        var[c] = m2[c] / n
        invstd[c] = 1 / np.sqrt(m2[c] / n + eps)
        coefs[c] = mean[c]
    for c in range(channels):
        factor = invstd[c] * gamma[c] if has_gamma else invstd[c]
        scale[c] = factor
        offset[c] = -(mean[c] - coefs[c]) * factor
    if has_beta:
        for c in range(channels):
            offset[c] += beta[c]


@helper
def gradient_channels(
    channels,
    sum_dy,     # IN   (channels,) float64
    sum_dy_xmu, # IN   (channels,) float64
    n,
    stats,      # IN   (3, channels) float64: mean, var, invstd
    coefs,      # IN   (3, channels): center, scale, offset
    training,   # IN   False: the statistics were constants, so they pass no gradient on
    linear,     # OUT  (4, channels): factor, slope, shift, rest
    grads,      # OUT  (2, channels): grad_gamma, grad_beta
):
    """The shift, mean(dy) less what center lacks of the mean, in two floats; the factor stays outside, so that the
    slope is about 1 / std and neither under- nor overflows."""
    restrict()
    invstd = at(stats, 2 * channels)
    slope, shift, rest = at(linear, channels), at(linear, 2 * channels), at(linear, 3 * channels)
    for c in range(channels):
        grads[c] = invstd[c] * sum_dy_xmu[c]
        grads[channels + c] = sum_dy[c]
        linear[c] = coefs[channels + c]
    for c in range(channels):
        k = invstd[c] * (invstd[c] * (sum_dy_xmu[c] / n)) if training else 0.0
        d = sum_dy[c] / n - k * (stats[c] - coefs[c]) if training else 0.0
        slope[c] = k
        shift[c] = d
        rest[c] = d - shift[c]


@helper
def spread_rows(
    rows,       # IN   (n, channels)
    n, plan, c0, channels,
    repeat,     # accumulators a channel; coefficients of an inner sweep stay one a channel
    wide,       # OUT  (n, TILE)
):
    for i in range(n):
        for c in range(channels):
            wide[i * TILE + c] = rows[i * plan.channels + c0 + c]
        spread(at(wide, i * TILE), channels, repeat, plan.fold)


# ---------------------------------------------------------------------------------------------------------------------
# affine: y = (x - center) * scale + offset, then the activation.
# ---------------------------------------------------------------------------------------------------------------------

@inline
def affine_strip(
    x,          # IN   (n_columns,)
    n_columns,
    coefs,      # IN   at CENTER, SCALE, OFFSET
    each,       # a literal; 1: every column has its coefficients, 0: one channel's hold for all
    relu,
    y,          # OUT
):
    for j in range(n_columns):
        i = j * each
        value = (x[j] - coefs[CENTER + i]) * coefs[SCALE + i] + coefs[OFFSET + i]
        y[j] = zero(value) if relu & (value <= 0) else value


@helper
def affine_rows(x, length, width, coefs, each, relu, y):
    restrict()
    for i in range(0, length, width):
        n = min(width, length - i)
        if each == 1:
            affine_strip(at(x, i), n, coefs, 1, relu, at(y, i))
        else:
            affine_strip(at(x, i), n, coefs, 0, relu, at(y, i))


@helper
def affine_run(x, length, width, coefs, each, relu, route, buffer, y):
    """A contiguous run as rows of `width`, the last of them perhaps shorter."""
    if route == DIRECT:
        affine_rows(x, length, width, coefs, each, relu, y)
        return
    step = BUFFER // width * width
    for i in range(0, length, step):
        n = min(step, length - i)
        affine_rows(at(x, i), n, width, coefs, each, relu, buffer)
        copy(at(y, i), buffer, n, route == STREAMED)


@helper
def affine_task(
    x, stride, plan, chunk, tile,
    channel_coefs,     # IN   (3, channels): center, scale, offset
    relu, route,
    y, y_stride,
):
    coefs = local(COEFS, x)
    buffer = local(BUFFER, x)
    c0 = tile * plan.tile
    channels = min(plan.tile, plan.channels - c0)
    width = channels * plan.repeat
    each = 0 if plan.by_inner else 1
    spread_rows(channel_coefs, 3, plan, c0, channels, 1 if plan.by_inner else plan.repeat, coefs)
    x = at(x, c0 * plan.inner)
    y = at(y, c0 * plan.inner)
    # Backwards: the end of the chunk, read last by moments_task, is still in the cache.
    for index in range(min((chunk + 1) * plan.chunk, plan.n_blocks) - 1, chunk * plan.chunk - 1, -1):
        block = block_at(plan, index)
        if plan.by_inner:
            for r in range(block.row, block.row + block.n_rows):
                for c in range(channels):
                    i = c * plan.inner + block.start
                    affine_run(at(x, r * stride + i), block.length, min(block.length, BUFFER), at(coefs, c), each, relu,
                               route, buffer, at(y, r * y_stride + i))
        elif stride == width and y_stride == width:
            i = block.row * width
            affine_run(at(x, i), block.n_rows * width, plan.fold * width, coefs, each, relu, route, buffer, at(y, i))
        else:
            for r in range(block.row, block.row + block.n_rows):
                affine_run(at(x, r * stride), width, width, coefs, each, relu, route, buffer, at(y, r * y_stride))
    if route == STREAMED:
        stream_end()


# ---------------------------------------------------------------------------------------------------------------------
# grad_moments: sum_dy = sum(dy), sum_dy_xmu = sum(dy * (x - mean)); where a fused ReLU was off, dy counts as 0.
# ---------------------------------------------------------------------------------------------------------------------

@inline
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


@helper
def grad_sums_rows(dy, dy_stride, x, x_stride, n_rows, width, mean, coefs, relu, s1, s2):
    restrict()
    for i in range(n_rows // ROWS):
        dy_rows = at(dy, i * ROWS * dy_stride)
        x_rows = at(x, i * ROWS * x_stride)
        for j in range(0, width, STRIP):
            n = min(STRIP, width - j)
            for k in range(ROWS, 2 * ROWS):
                for line in range(j, j + n, 16):
                    prefetch(at(dy_rows, k * dy_stride + line))
                    prefetch(at(x_rows, k * x_stride + line))
            grad_sums_strip(at(dy_rows, j), dy_stride, at(x_rows, j), x_stride, ROWS, n,
                            at(mean, j), at(coefs, j), relu, at(s1, j), at(s2, j))
    for i in range(n_rows - n_rows % ROWS, n_rows):
        grad_sums_strip(at(dy, i * dy_stride), dy_stride, at(x, i * x_stride), x_stride, 1, width,
                        mean, coefs, relu, s1, s2)


@inline
def grad_sums_run(dy, x, length, width, mean, coefs, relu, s1, s2):
    """A contiguous run as rows of `width`, the last of them perhaps shorter."""
    n_rows = length // width
    done = n_rows * width
    grad_sums_rows(dy, width, x, width, n_rows, width, mean, coefs, relu, s1, s2)
    if done < length:
        grad_sums_rows(at(dy, done), width, at(x, done), width, min(1, length), length - done,
                       mean, coefs, relu, s1, s2)


@helper
def grad_moments_task(
    dy, dy_stride, x, x_stride, plan, chunk, tile,
    channel_mean,      # IN   (channels,) float64
    channel_coefs,     # IN   (3, channels): center, scale, offset
    relu,
    sum_dy,            # OUT  (channels,) of this chunk
    sum_dy_xmu,        # OUT
):
    dy_buffer = local(BUFFER, x)
    x_buffer = local(BUFFER, x)
    coefs = local(COEFS, x)
    mean = local(TILE, 0.0)
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
                    n = c * plan.repeat
                    grad_sums_run(at(dy, r * dy_stride + i), at(x, r * x_stride + i), block.length, plan.repeat,
                                  at(mean, n), at(coefs, n), relu, at(s1, n), at(s2, n))
        elif plan.fold == 1:
            grad_sums_rows(at(dy, block.row * dy_stride), dy_stride, at(x, block.row * x_stride), x_stride,
                           block.n_rows, width, mean, coefs, relu, s1, s2)
        elif dy_stride == width and x_stride == width:
            i = block.row * width
            grad_sums_run(at(dy, i), at(x, i), block.n_rows * width, wide, mean, coefs, relu, s1, s2)
        else:
            for i in range(ceil_div(block.n_rows, step)):
                r = block.row + i * step
                n = min(step, last - r)
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
    each,       # a literal; 1: every column has its coefficients, 0: one channel's hold for all
    relu,
    training,
    grad_x,     # OUT
):
    for j in range(n_columns):
        i = j * each
        g = gate(dy[j], x[j], coefs, i, relu)
        through = ((g - coefs[SHIFT + i]) - coefs[REST + i]) - (x[j] - coefs[CENTER + i]) * coefs[SLOPE + i]
        grad_x[j] = coefs[FACTOR + i] * (through if training else g)


@helper
def grad_affine_rows(dy, x, length, width, coefs, each, relu, training, grad_x):
    restrict()
    for i in range(0, length, width):
        n = min(width, length - i)
        if each == 1:
            grad_affine_strip(at(dy, i), at(x, i), n, coefs, 1, relu, training, at(grad_x, i))
        else:
            grad_affine_strip(at(dy, i), at(x, i), n, coefs, 0, relu, training, at(grad_x, i))


@helper
def grad_affine_run(dy, x, length, width, coefs, each, relu, training, route, buffer, grad_x):
    """A contiguous run as rows of `width`, the last of them perhaps shorter."""
    if route == DIRECT:
        grad_affine_rows(dy, x, length, width, coefs, each, relu, training, grad_x)
        return
    step = BUFFER // width * width
    for i in range(0, length, step):
        n = min(step, length - i)
        grad_affine_rows(at(dy, i), at(x, i), n, width, coefs, each, relu, training, buffer)
        copy(at(grad_x, i), buffer, n, route == STREAMED)


@helper
def grad_affine_task(
    dy, dy_stride, x, x_stride, plan, chunk, tile,
    channel_coefs,     # IN   (3, channels): center, scale, offset
    linear,            # IN   (4, channels): factor, slope, shift, rest
    relu, training, route,
    grad_x, grad_x_stride,
):
    coefs = local(COEFS, x)
    buffer = local(BUFFER, x)
    c0 = tile * plan.tile
    channels = min(plan.tile, plan.channels - c0)
    width = channels * plan.repeat
    repeat = 1 if plan.by_inner else plan.repeat
    each = 0 if plan.by_inner else 1
    spread_rows(channel_coefs, 3, plan, c0, channels, repeat, coefs)
    spread_rows(linear, 4, plan, c0, channels, repeat, at(coefs, FACTOR))
    dy = at(dy, c0 * plan.inner)
    x = at(x, c0 * plan.inner)
    grad_x = at(grad_x, c0 * plan.inner)
    for index in range(min((chunk + 1) * plan.chunk, plan.n_blocks) - 1, chunk * plan.chunk - 1, -1):
        block = block_at(plan, index)
        if plan.by_inner:
            for r in range(block.row, block.row + block.n_rows):
                for c in range(channels):
                    i = c * plan.inner + block.start
                    grad_affine_run(at(dy, r * dy_stride + i), at(x, r * x_stride + i),
                                    block.length, min(block.length, BUFFER), at(coefs, c), each,
                                    relu, training, route, buffer, at(grad_x, r * grad_x_stride + i))
        elif dy_stride == width and x_stride == width and grad_x_stride == width:
            i = block.row * width
            grad_affine_run(at(dy, i), at(x, i), block.n_rows * width, plan.fold * width,
                            coefs, each, relu, training, route, buffer, at(grad_x, i))
        else:
            for r in range(block.row, block.row + block.n_rows):
                grad_affine_run(at(dy, r * dy_stride), at(x, r * x_stride), width, width,
                                coefs, each, relu, training, route, buffer, at(grad_x, r * grad_x_stride))
    if route == STREAMED:
        stream_end()


# ---------------------------------------------------------------------------------------------------------------------
# Workers: what one thread of the team does. Both passes give a thread the same tasks, the second in reverse order.
# Compiled as C functions and called by their addresses, so that no driver compiles the loops again.
# ---------------------------------------------------------------------------------------------------------------------

@helper
def share(n, worker, n_workers):
    """Where the share of a worker of n things begins."""
    return n * worker // n_workers


def moments_worker(worker, n_workers, x, stride, outer, channels, inner, mean, m2):
    plan = make_plan(outer, channels, inner)
    n_tasks = plan.n_chunks * plan.n_tiles
    for task in range(share(n_tasks, worker, n_workers), share(n_tasks, worker + 1, n_workers)):
        chunk = task // plan.n_tiles
        moments_task(x, stride, plan, chunk, task % plan.n_tiles, at(mean, chunk * channels), at(m2, chunk * channels))


def merge_worker(worker, n_workers, outer, channels, inner, part_mean, part_m2, mean, m2):
    plan = make_plan(outer, channels, inner)
    c0, c1 = share(channels, worker, n_workers), share(channels, worker + 1, n_workers)
    merge_chunks(plan, part_mean, part_m2, c0, c1)
    for c in range(c0, c1):
        mean[c] = part_mean[c]
        m2[c] = part_m2[c]


def affine_worker(worker, n_workers, x, stride, outer, channels, inner, coefs, relu, route, y, y_stride):
    plan = make_plan(outer, channels, inner)
    n_tasks = plan.n_chunks * plan.n_tiles
    for task in range(share(n_tasks, worker + 1, n_workers) - 1, share(n_tasks, worker, n_workers) - 1, -1):
        affine_task(x, stride, plan, task // plan.n_tiles, task % plan.n_tiles, coefs, relu, route, y, y_stride)


def grad_moments_worker(
    worker, n_workers, dy, dy_stride, x, x_stride, outer, channels, inner, mean, coefs, relu, sum_dy, sum_dy_xmu,
):
    plan = make_plan(outer, channels, inner)
    n_tasks = plan.n_chunks * plan.n_tiles
    for task in range(share(n_tasks, worker, n_workers), share(n_tasks, worker + 1, n_workers)):
        chunk = task // plan.n_tiles
        grad_moments_task(dy, dy_stride, x, x_stride, plan, chunk, task % plan.n_tiles, mean, coefs, relu,
                          at(sum_dy, chunk * channels), at(sum_dy_xmu, chunk * channels))


def add_worker(worker, n_workers, outer, channels, inner, part_dy, part_dy_xmu, sum_dy, sum_dy_xmu):
    plan = make_plan(outer, channels, inner)
    c0, c1 = share(channels, worker, n_workers), share(channels, worker + 1, n_workers)
    add_chunks(plan, part_dy, c0, c1)
    add_chunks(plan, part_dy_xmu, c0, c1)
    for c in range(c0, c1):
        sum_dy[c] = part_dy[c]
        sum_dy_xmu[c] = part_dy_xmu[c]


def grad_affine_worker(
    worker, n_workers, dy, dy_stride, x, x_stride, outer, channels, inner, coefs, linear, relu, training, route,
    grad_x, grad_x_stride,
):
    plan = make_plan(outer, channels, inner)
    n_tasks = plan.n_chunks * plan.n_tiles
    for task in range(share(n_tasks, worker + 1, n_workers) - 1, share(n_tasks, worker, n_workers) - 1, -1):
        grad_affine_task(dy, dy_stride, x, x_stride, plan, task // plan.n_tiles, task % plan.n_tiles,
                         coefs, linear, relu, training, route, grad_x, grad_x_stride)


@functools.cache
def address_of(worker, codes, dtype):
    """The address of a worker compiled for arguments i: integer, x: data's dtype pointer, d: float64 pointer."""
    pointers = {"i": types.int64, "x": types.CPointer(numba.from_dtype(dtype)), "d": types.CPointer(types.float64)}
    signature = types.void(*(pointers[code] for code in codes))
    return cached(functools.partial(cfunc, signature, error_model="numpy"), worker).address


def cached(decorator, function):
    """decorator(cache=True)(function), where a folder for the cache can be written."""
    try:
        return decorator(cache=True)(function)
    except (RuntimeError, OSError):
        return decorator()(function)


# Worker and the codes of its arguments.
MOMENTS = moments_worker, "iixiiiidd"
MERGE = merge_worker, "iiiiidddd"
AFFINE = affine_worker, "iixiiiixiixi"
GRAD_MOMENTS = grad_moments_worker, "iixixiiiidxidd"
ADD = add_worker, "iiiiidddd"
GRAD_AFFINE = grad_affine_worker, "iixixiiiixxiiixi"


# ---------------------------------------------------------------------------------------------------------------------
# Drivers: scratch memory and the team of threads around the workers at the given addresses.
# ---------------------------------------------------------------------------------------------------------------------

@helper
def stride_of(x):
    return x.strides[0] // x.itemsize


@helper
def route_to(out, in_place):
    """Past the caches if it is too large to stay there, and not the input (whose lines are there)."""
    if in_place:
        return BUFFERED
    return STREAMED if out.size * out.itemsize >= STREAM_BYTES else DIRECT


@helper
def same(x, y):
    return address(data(x)) == address(data(y))


def run_moments(work, merge, x, mean, m2, n_workers):
    outer, channels, inner = x.shape
    plan = make_plan(outer, channels, inner)
    part_mean = np.empty(plan.n_chunks * channels)
    part_m2 = np.empty(plan.n_chunks * channels)
    for worker in prange(n_workers):
        call_at(work, (np.int64(worker), n_workers, data(x), stride_of(x), outer, channels, inner,
                data(part_mean), data(part_m2)))
    for worker in prange(n_workers):
        call_at(merge, (np.int64(worker), n_workers, outer, channels, inner, data(part_mean), data(part_m2),
                        data(mean), data(m2)))


def run_affine(work, x, coefs, relu, out, n_workers):
    outer, channels, inner = x.shape
    route = route_to(out, same(out, x))
    for worker in prange(n_workers):
        call_at(work, (np.int64(worker), n_workers, data(x), stride_of(x), outer, channels, inner,
                data(coefs), np.int64(relu), route, data(out), stride_of(out)))


def run_grad_moments(work, add, dy, x, mean, coefs, relu, sum_dy, sum_dy_xmu, n_workers):
    outer, channels, inner = x.shape
    plan = make_plan(outer, channels, inner)
    part_dy = np.empty(plan.n_chunks * channels)
    part_dy_xmu = np.empty(plan.n_chunks * channels)
    for worker in prange(n_workers):
        call_at(work, (np.int64(worker), n_workers, data(dy), stride_of(dy), data(x), stride_of(x), outer, channels,
                inner, data(mean), data(coefs), np.int64(relu), data(part_dy), data(part_dy_xmu)))
    for worker in prange(n_workers):
        call_at(add, (np.int64(worker), n_workers, outer, channels, inner, data(part_dy), data(part_dy_xmu),
                      data(sum_dy), data(sum_dy_xmu)))


def run_grad_affine(work, dy, x, coefs, linear, relu, training, out, n_workers):
    outer, channels, inner = x.shape
    route = route_to(out, same(out, dy) or same(out, x))
    for worker in prange(n_workers):
        call_at(work, (np.int64(worker), n_workers, data(dy), stride_of(dy), data(x), stride_of(x), outer, channels,
                inner, data(coefs), data(linear), np.int64(relu), np.int64(training), route, data(out), stride_of(out)))


def run_normalize(mean, m2, n, gamma, beta, eps, stats, coefs):
    normalize_channels(coefs.shape[1], data(mean), data(m2), float(n), data(gamma), gamma.size > 0,
                       data(beta), beta.size > 0, eps, data(stats), data(coefs))


def run_gradient(sums, n, stats, coefs, training, linear, grads):
    channels = coefs.shape[1]
    gradient_channels(channels, data(sums), at(data(sums), channels), float(n), data(stats), data(coefs), training,
                      data(linear), data(grads))


compiled = {}  # (driver, dtype, whether for a team): the function that runs it
team_lock = threading.Lock()


def call(driver, workers, dtype, for_team, *args):
    """Run a driver, compiled for the types of args: every array counts as read-only and strided, so that one does."""
    function = compiled.get((driver, dtype, for_team))
    if function is None:
        addresses = tuple(address_of(worker, codes, dtype) for worker, codes in workers)
        kinds = tuple(
            types.Array(numba.from_dtype(arg.dtype), arg.ndim, "A", readonly=True) if isinstance(arg, np.ndarray)
            else numba.typeof(arg)
            for arg in addresses + args
        )
        options = {}
        if for_team:
            # Without fusion: it would run the second loop's merge inside the first, before the other workers are done.
            options = {"parallel": {"fusion": False}}
            # The cache tells functions apart by name and code, not by options.
            driver_copy = python_types.FunctionType(driver.__code__, driver.__globals__)
            driver_copy.__qualname__ = f"{driver.__name__}_team"
        else:
            driver_copy = driver
        function = cached(functools.partial(njit, [kinds], **options, **OPTIONS), driver_copy)
        function = functools.partial(function, *addresses)
        compiled[driver, dtype, for_team] = function
    function(*args)


def launch(driver, workers, x, bytes_per_value, num_threads, *args):
    """Run a driver on a team if the work is worth it and no other Python thread has the team, else on this thread."""
    n_workers = team_wanted(*x.shape, bytes_per_value, num_threads) if num_threads > 1 else 1
    # Numba's own thread pool aborts the process when two Python threads enter it at once. The bits are the same.
    if n_workers > 1 and team_lock.acquire(blocking=False):
        try:
            call(driver, workers, x.dtype, True, *args, n_workers)
        finally:
            team_lock.release()
    else:
        call(driver, workers, x.dtype, False, *args, 1)


# ---------------------------------------------------------------------------------------------------------------------
# What Python calls: the contract of kernels/__init__.py. The arrays were checked by _layout.py.
# ---------------------------------------------------------------------------------------------------------------------

def moments(
    x,           # IN   (outer, channels, inner)
    mean,        # OUT  (channels,) float64
    m2,          # OUT  (channels,) float64
    num_threads,
):
    launch(run_moments, (MOMENTS, MERGE), x, x.itemsize, num_threads, x, mean, m2)


def affine(
    x,           # IN   (outer, channels, inner)
    coefs,       # IN   (3, channels): center, scale, offset
    relu,
    out,         # OUT  (outer, channels, inner)
    num_threads,
):
    launch(run_affine, (AFFINE,), x, x.itemsize, num_threads, x, coefs, relu, out)


def normalize(mean, m2, n, gamma, beta, eps, stats, coefs):
    none = coefs[0, :0]
    gamma = none if gamma is None else gamma
    beta = none if beta is None else beta
    call(run_normalize, (), coefs.dtype, False, mean, m2, n, gamma, beta, eps, stats, coefs)


def batch_norm(
    x,           # IN   (outer, channels, inner)
    gamma,       # IN   (channels,) or None
    beta,        # IN   (channels,) or None
    eps,
    relu,
    out,         # OUT  (outer, channels, inner)
    stats,       # OUT  (3, channels) float64: mean, var, invstd
    coefs,       # OUT  (3, channels): center, scale, offset
    num_threads,
):
    mean, m2 = np.empty((2, x.shape[1]))
    moments(x, mean, m2, num_threads)
    normalize(mean, m2, x.shape[0] * x.shape[2], gamma, beta, eps, stats, coefs)
    affine(x, coefs, relu, out, num_threads)


def batch_norm_inference(
    x,           # IN   (outer, channels, inner)
    mean,        # IN   (channels,) float64
    var,         # IN   (channels,) float64
    gamma,       # IN   (channels,) or None
    beta,        # IN   (channels,) or None
    eps,
    relu,
    out,         # OUT  (outer, channels, inner)
    stats,       # OUT  (3, channels) float64: mean, var, invstd
    coefs,       # OUT  (3, channels): center, scale, offset
    num_threads,
):
    normalize(mean, var, 1, gamma, beta, eps, stats, coefs)
    affine(x, coefs, relu, out, num_threads)


def grad_moments(
    grad_y,      # IN   (outer, channels, inner)
    x,           # IN   (outer, channels, inner)
    mean,        # IN   (channels,) float64
    coefs,       # IN   (3, channels): center, scale, offset
    relu,
    sum_dy,      # OUT  (channels,) float64
    sum_dy_xmu,  # OUT  (channels,) float64
    num_threads,
):
    launch(run_grad_moments, (GRAD_MOMENTS, ADD), x, 2 * x.itemsize, num_threads,
           grad_y, x, mean, coefs, relu, sum_dy, sum_dy_xmu)


def grad_affine(
    grad_y,      # IN   (outer, channels, inner)
    x,           # IN   (outer, channels, inner)
    coefs,       # IN   (3, channels): center, scale, offset
    linear,      # IN   (4, channels): factor, slope, shift, rest
    relu,
    out,         # OUT  (outer, channels, inner)
    num_threads,
):
    launch(run_grad_affine, (GRAD_AFFINE,), x, 2 * x.itemsize, num_threads, grad_y, x, coefs, linear, relu, True, out)


def batch_norm_backward(
    grad_y,      # IN   (outer, channels, inner)
    x,           # IN   (outer, channels, inner)
    stats,       # IN   (3, channels) float64: mean, var, invstd
    coefs,       # IN   (3, channels): center, scale, offset
    relu,
    training,    # IN   False: the statistics were constants
    out,         # OUT  (outer, channels, inner): grad_x
    grads,       # OUT  (2, channels): grad_gamma, grad_beta
    num_threads,
):
    sums = np.empty((2, x.shape[1]))
    linear = np.empty((4, x.shape[1]), x.dtype)
    grad_moments(grad_y, x, stats[0], coefs, relu, sums[0], sums[1], num_threads)
    call(run_gradient, (), x.dtype, False, sums, x.shape[0] * x.shape[2], stats, coefs, training, linear, grads)
    launch(run_grad_affine, (GRAD_AFFINE,), x, 2 * x.itemsize, num_threads,
           grad_y, x, coefs, linear, relu, training, out)


def warmup(dtypes=(np.float32, np.float64)):
    """Compile everything for the given dtypes, so that the first real batch is not the slow one."""
    for dtype in dtypes:
        for outer, num_threads in ((1, 1), (2 * BLOCK_ROWS * TILE // 64, 2)):
            x = np.zeros((outer, 64, 1), dtype)
            stats = np.empty((3, 64))
            coefs = np.empty((3, 64), dtype)
            grads = np.empty((2, 64), dtype)
            batch_norm(x, None, None, 1e-5, False, x, stats, coefs, num_threads)
            batch_norm_backward(x, x, stats, coefs, False, True, x, grads, num_threads)


def describe():
    """Numba's version, its threading layer (None until a parallel loop ran) and its number of threads."""
    try:
        layer = numba.threading_layer()
    except ValueError:
        layer = None
    return {"numba": numba.__version__, "threading_layer": layer, "num_threads": numba.config.NUMBA_NUM_THREADS}
