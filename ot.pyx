# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The compiled kernels. kernels/__init__.py holds the contract; numba_kernels.py is this file's twin.

One source, compiled once per instruction set: _cython_baseline.pyx, _cython_avx2.pyx and _cython_avx512.pyx each
include it and cython_calls.pyx. Read it downwards: the plan (how the data is cut, by shape alone), then for each
kernel its strip (the hot loop, of literal size), its rows and runs, its task (one tile of one chunk); and the workers
(what one thread does). `inline` means always here (setup.py sees to it): it is what makes the sizes literal. What is
not inline keeps the compiler from making copy after copy.
"""
from libc.math cimport sqrt
from libc.string cimport memcpy, memset

cdef extern from "machine.h" nogil:
    int team_rank()
    int team_size()
    void team_barrier()
    void prefetch(const void* address)
    void prefetch_write(const void* address)
    void stream_copy(void* target, const void* source, size_t bytes)
    void stream_end()

ctypedef fused floating:
    float
    double

cdef enum:
    ROWS = 8              # wide rows a step: accumulators are loaded and stored once for eight rows
    STRIP = 16            # columns a step: a constant, so that the compiler unrolls and vectorises the strip
    TILE = 512            # columns whose accumulators a task keeps on its stack (12 KiB of L1)
    LANES = STRIP         # accumulators a channel where the inner axis is swept: one strip
    SHORT_INNER = 32      # inner axes shorter than this are swept as columns
    INNER_TILE = 8        # channels a tile where the inner axis is swept: few, so that they stay in the cache (10 %)
    BLOCK_ROWS = 128      # wide rows a block; a block has one pivot
    BLOCK_INNER = 8192    # inner elements a channel a block
    PIVOT_ROWS = 4        # wide rows whose mean is the pivot
    PIVOT_INNER = 256     # the same along the inner axis
    AHEAD = 512           # elements that the elementwise passes fetch ahead: 10 to 25 % from 4 MB up
    MAX_CHUNKS = 64       # partial results a channel, at most; so also the threads that can share a column
    SERIAL_BYTES = 65536  # a thread's fair share: below it, waking the thread costs more than it saves
    STREAM_BYTES = 1 << 24  # outputs from here on bypass the caches
    # Where a tile's coefficients lie in its one array, so that a strip takes one pointer for all of them:
    CENTER = 0              # y = (x - center) * scale + offset
    SCALE = TILE
    OFFSET = 2 * TILE
    FACTOR = 3 * TILE       # grad_x = factor * (((dy - shift) - rest) - (x - center) * slope)
    SLOPE = 4 * TILE
    SHIFT = 5 * TILE
    REST = 6 * TILE


# ---------------------------------------------------------------------------------------------------------------------
# The plan: blocks of rows (or of inner elements) make a chunk, a chunk has one partial result a channel, channels come
# in tiles; a task is one tile of one chunk. All of it follows from the shape, so the bits never depend on the threads.
# ---------------------------------------------------------------------------------------------------------------------

cdef struct Plan:
    Py_ssize_t outer
    Py_ssize_t channels
    Py_ssize_t inner
    bint by_inner          # sweep along the inner axis instead of across the columns
    Py_ssize_t repeat      # accumulators side by side that belong to one channel
    Py_ssize_t fold        # rows laid side by side to make a wide row (narrow data)
    Py_ssize_t tile        # channels a tile
    Py_ssize_t n_tiles
    Py_ssize_t block_outer  # outer rows a block
    Py_ssize_t block_inner  # inner elements a block
    Py_ssize_t n_segments  # blocks that share their outer rows
    Py_ssize_t n_blocks
    Py_ssize_t chunk       # blocks a chunk
    Py_ssize_t n_chunks


cdef struct Block:
    Py_ssize_t row
    Py_ssize_t n_rows
    Py_ssize_t start       # along the inner axis
    Py_ssize_t length


cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef Plan make_plan(Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner) noexcept nogil:
    cdef Plan plan
    plan.outer, plan.channels, plan.inner = outer, channels, inner
    plan.by_inner = inner >= SHORT_INNER
    plan.repeat = LANES if plan.by_inner else inner
    plan.n_tiles = ceil_div(channels, INNER_TILE if plan.by_inner else TILE // plan.repeat)
    plan.tile = ceil_div(channels, plan.n_tiles)
    if not plan.by_inner and plan.n_tiles > 1:
        plan.tile = min(ceil_div(plan.tile, STRIP) * STRIP, TILE // plan.repeat)
    plan.n_tiles = ceil_div(channels, plan.tile)
    plan.fold = 1
    if plan.by_inner:
        plan.block_inner = min(inner, BLOCK_INNER)
        plan.block_outer = max(1, BLOCK_INNER // inner)
    else:
        while plan.n_tiles == 1 and 2 * plan.fold * channels * inner <= TILE and plan.fold * BLOCK_ROWS <= outer:
            plan.fold *= 2
        plan.block_inner = inner
        plan.block_outer = plan.fold * BLOCK_ROWS
    plan.n_segments = ceil_div(inner, plan.block_inner)
    plan.n_blocks = ceil_div(outer, plan.block_outer) * plan.n_segments
    plan.chunk = ceil_div(plan.n_blocks, MAX_CHUNKS)
    plan.n_chunks = ceil_div(plan.n_blocks, plan.chunk)
    return plan


cdef inline Block block_at(const Plan* plan, Py_ssize_t index) noexcept nogil:
    cdef Block block
    block.row = index // plan.n_segments * plan.block_outer
    block.n_rows = min(plan.block_outer, plan.outer - block.row)
    block.start = index % plan.n_segments * plan.block_inner
    block.length = min(plan.block_inner, plan.inner - block.start)
    return block


cdef inline int team_wanted(const Plan* plan, Py_ssize_t itemsize, int num_threads) noexcept nogil:
    """How many of num_threads are worth waking: no more than there are tasks, each with its fair share of bytes."""
    cdef Py_ssize_t n = min(<Py_ssize_t>num_threads, plan.n_chunks * plan.n_tiles)
    return <int>max(1, min(n, plan.outer * plan.channels * plan.inner * itemsize // SERIAL_BYTES))


# ---------------------------------------------------------------------------------------------------------------------
# Wide rows: n_rows rows of `width` columns are laid side by side to make rows of fold * width columns.
# ---------------------------------------------------------------------------------------------------------------------

cdef inline void spread(floating* wide, Py_ssize_t channels, Py_ssize_t repeat, Py_ssize_t fold) noexcept nogil:
    """wide[c] becomes wide[(f * channels + c) * repeat + i] for each f and i, in place."""
    cdef Py_ssize_t c, i, width = channels * repeat
    if repeat > 1:
        for c in range(channels - 1, -1, -1):
            for i in range(repeat - 1, -1, -1):
                wide[c * repeat + i] = wide[c]
    while fold > 1:
        memcpy(wide + width, wide, width * sizeof(floating))
        width *= 2
        fold //= 2


cdef inline void fold_sums(double* wide, Py_ssize_t channels, Py_ssize_t repeat, Py_ssize_t fold) noexcept nogil:
    """The inverse of spread: wide[c] becomes the sum over each f and i, in place."""
    cdef Py_ssize_t c, i, j, width = channels * repeat * fold
    cdef double total
    while fold > 1:
        fold //= 2
        width //= 2
        for j in range(width):
            wide[j] += wide[width + j]
    if repeat > 1:
        for c in range(channels):
            total = 0
            for i in range(repeat):
                total += wide[c * repeat + i]
            wide[c] = total


cdef inline const floating* gather(
    const floating* x, Py_ssize_t stride, Py_ssize_t n_rows, Py_ssize_t width, floating* buffer,
) noexcept nogil:
    """The rows one behind the other: x itself where they lie so already, else a copy in buffer."""
    cdef Py_ssize_t r, j
    if stride == width or n_rows == 1:
        return x
    for r in range(n_rows):
        for j in range(width):
            buffer[r * width + j] = x[r * stride + j]
    return buffer


# ---------------------------------------------------------------------------------------------------------------------
# moments: sums about a pivot near the mean, in one read of the data.
#
#     s1 = sum(x - pivot)    s2 = sum((x - pivot)^2)    mean + rest = pivot + s1 / n    m2 = s2 - s1^2 / n
#
# The pivot is the mean of the block's first rows, k of its n values, so (mean - pivot)^2 <= m2 / k, and the subtraction
# costs at most a factor 1 + n / k <= 33 of float64's 1e-16, whatever the data. It is computed as first + mean(x -
# first), so a constant column has deviations of exactly 0.
#
# The mean is kept in two floats: in one, 1e-16 of a large mean, times delta, would add up in m2 as blocks merge.
# ---------------------------------------------------------------------------------------------------------------------

cdef inline void sums_strip(
    const floating* x,         # IN   (n_rows, n_columns), rows `stride` apart
    Py_ssize_t stride,
    Py_ssize_t n_rows,
    Py_ssize_t n_columns,
    const double* pivot,       # IN   (n_columns,)
    double* s1,                # INOUT
    double* s2,                # INOUT
) noexcept nogil:
    cdef Py_ssize_t r, j
    cdef double d, a, b
    for j in range(n_columns):
        a = 0
        b = 0
        for r in range(n_rows):
            d = x[r * stride + j] - pivot[j]
            a += d
            b += d * d
        s1[j] += a
        s2[j] += b


cdef inline void sums_group(
    const floating* x, Py_ssize_t stride, Py_ssize_t n_rows, Py_ssize_t width,
    const double* pivot, double* s1, double* s2,
) noexcept nogil:
    cdef Py_ssize_t r, j = 0
    while j + STRIP <= width:
        # Fetching the next group's rows takes a 268 MB array from 12 to 20 GB/s on two threads.
        for r in range(n_rows, 2 * n_rows):
            prefetch(x + r * stride + j)
        sums_strip(x + j, stride, n_rows, STRIP, pivot + j, s1 + j, s2 + j)
        j += STRIP
    if (width - j) & 8:
        sums_strip(x + j, stride, n_rows, 8, pivot + j, s1 + j, s2 + j)
        j += 8
    if (width - j) & 4:
        sums_strip(x + j, stride, n_rows, 4, pivot + j, s1 + j, s2 + j)
        j += 4
    while j < width:
        sums_strip(x + j, stride, n_rows, 1, pivot + j, s1 + j, s2 + j)
        j += 1


cdef inline void sums_rows_as(
    const floating* x, Py_ssize_t stride, Py_ssize_t n_rows, Py_ssize_t width,
    const double* pivot, double* s1, double* s2,
) noexcept nogil:
    cdef Py_ssize_t _i
    for _i in range(n_rows // ROWS):
        sums_group(x, stride, ROWS, width, pivot, s1, s2)
        x += ROWS * stride
    # The rest in literal sizes, which the compiler unrolls.
    if n_rows & 4:
        sums_group(x, stride, 4, width, pivot, s1, s2)
        x += 4 * stride
    if n_rows & 2:
        sums_group(x, stride, 2, width, pivot, s1, s2)
        x += 2 * stride
    if n_rows & 1:
        sums_group(x, stride, 1, width, pivot, s1, s2)


cdef void sums_rows(
    const floating* x, Py_ssize_t stride, Py_ssize_t n_rows, Py_ssize_t width,
    const double* pivot, double* s1, double* s2,
) noexcept nogil:
    sums_rows_as(x, stride, n_rows, width, pivot, s1, s2)


cdef void sums_run(
    const floating* x, Py_ssize_t length, Py_ssize_t width, const double* pivot, double* s1, double* s2,
) noexcept nogil:
    """A contiguous run as rows of `width`, the last of them perhaps shorter."""
    cdef Py_ssize_t n_rows = length // width
    if width == LANES:  # a literal: 196 elements a run take half the time
        sums_rows_as(x, LANES, n_rows, LANES, pivot, s1, s2)
    else:
        sums_rows(x, width, n_rows, width, pivot, s1, s2)
    if n_rows * width < length:
        sums_rows(x + n_rows * width, width, 1, length - n_rows * width, pivot, s1, s2)


cdef void sums_block(
    const floating* x, Py_ssize_t stride, Py_ssize_t n_rows, Py_ssize_t length, Py_ssize_t channels,
    const Plan* plan, floating* buffer, const double* pivot, double* s1, double* s2,
) noexcept nogil:
    cdef Py_ssize_t i, r, c, n, width = channels * plan.repeat, step = ROWS * plan.fold
    memset(s1, 0, width * plan.fold * sizeof(double))
    memset(s2, 0, width * plan.fold * sizeof(double))
    if plan.by_inner:
        for r in range(n_rows):
            for c in range(channels):
                sums_run(x + r * stride + c * plan.inner, length, LANES,
                         pivot + c * LANES, s1 + c * LANES, s2 + c * LANES)
    elif plan.fold == 1:
        sums_rows(x, stride, n_rows, width, pivot, s1, s2)
    elif stride == width:
        sums_run(x, n_rows * width, plan.fold * width, pivot, s1, s2)
    else:
        for i in range(ceil_div(n_rows, step)):
            r = i * step
            n = min(step, n_rows - r)
            sums_run(gather(x + r * stride, stride, n, width, buffer), n * width, plan.fold * width, pivot, s1, s2)
    fold_sums(s1, channels, plan.repeat, plan.fold)
    fold_sums(s2, channels, plan.repeat, plan.fold)


cdef inline double lost(double a, double b, double total) noexcept nogil:
    """What total, the rounded a + b, lacks of the sum (Knuth): total + lost is a + b without loss."""
    cdef double added = total - a
    return (a - (total - added)) + (b - added)


cdef inline void merge_moments(
    double n_a, double* mean, double* rest, double* m2,
    double n_b, const double* mean_b, const double* rest_b, const double* m2_b, Py_ssize_t channels,
) noexcept nogil:
    """Chan, Golub and LeVeque (1979): delta = mean_b - mean, m2 += m2_b + delta^2 n_a n_b / (n_a + n_b)."""
    cdef Py_ssize_t c
    cdef double delta, shift, total, weight = n_b / (n_a + n_b), cross = n_a * (n_b / (n_a + n_b))
    if n_a == 0:  # delta^2 could overflow
        memcpy(mean, mean_b, channels * sizeof(double))
        memcpy(rest, rest_b, channels * sizeof(double))
        memcpy(m2, m2_b, channels * sizeof(double))
        return
    # Two loops, each of few enough arrays for the compiler to tell apart.
    for c in range(channels):
        delta = (mean_b[c] - mean[c]) + (rest_b[c] - rest[c])
        m2[c] += m2_b[c] + delta * delta * cross
    for c in range(channels):
        delta = (mean_b[c] - mean[c]) + (rest_b[c] - rest[c])
        shift = rest[c] + delta * weight
        total = mean[c] + shift
        rest[c] = lost(mean[c], shift, total)
        mean[c] = total


cdef void moments_task(
    const floating* x, Py_ssize_t stride, const Plan* plan, Py_ssize_t chunk, Py_ssize_t tile,
    double* partial,           # OUT  (3, channels) of this chunk: mean, rest, m2
) noexcept nogil:
    cdef floating buffer[ROWS * TILE]
    cdef double pivot[TILE]
    cdef double s1[TILE]
    cdef double s2[TILE]
    cdef double mean_b[TILE]
    cdef double rest_b[TILE]
    cdef Py_ssize_t c, index, c0 = tile * plan.tile
    cdef Py_ssize_t channels = min(plan.tile, plan.channels - c0)
    cdef Py_ssize_t k_rows, k_length
    cdef double n, weight, shift, total, count = 0
    cdef double* mean = partial + c0
    cdef double* rest = mean + plan.channels
    cdef double* m2 = rest + plan.channels
    cdef Block block
    cdef const floating* first
    for index in range(chunk * plan.chunk, min((chunk + 1) * plan.chunk, plan.n_blocks)):
        block = block_at(plan, index)
        first = x + block.row * stride + c0 * plan.inner + block.start

        for c in range(channels):
            pivot[c] = first[c * plan.inner]
            mean_b[c] = pivot[c]
        spread(pivot, channels, plan.repeat, plan.fold)
        k_length = min(block.length, PIVOT_INNER)
        k_rows = min(block.n_rows, ceil_div(PIVOT_INNER, k_length) if plan.by_inner else PIVOT_ROWS * plan.fold)
        sums_block(first, stride, k_rows, k_length, channels, plan, buffer, pivot, s1, s2)
        weight = 1 / (<double>k_rows * k_length)  # multiplied by: three divisions a channel took a fifth of a block
        for c in range(channels):
            mean_b[c] += s1[c] * weight
            pivot[c] = mean_b[c]
        spread(pivot, channels, plan.repeat, plan.fold)

        sums_block(first, stride, block.n_rows, block.length, channels, plan, buffer, pivot, s1, s2)
        n = <double>block.n_rows * block.length
        weight = 1 / n
        for c in range(channels):
            shift = s1[c] * weight
            total = mean_b[c] + shift
            rest_b[c] = lost(mean_b[c], shift, total)
            mean_b[c] = total
            s2[c] -= s1[c] * shift
        merge_moments(count, mean, rest, m2, n, mean_b, rest_b, s2, channels)
        count += n


cdef double chunk_count(const Plan* plan, Py_ssize_t chunk) noexcept nogil:
    """Values a channel in the first `chunk` chunks."""
    cdef Py_ssize_t n_blocks = min(chunk * plan.chunk, plan.n_blocks)
    cdef Block block
    if n_blocks == plan.n_blocks:
        return <double>plan.outer * plan.inner
    block = block_at(plan, n_blocks)
    return <double>block.row * plan.inner + <double>block.start * min(plan.block_outer, plan.outer - block.row)


cdef void merge_chunks(const Plan* plan, double* partial, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """Chunks 1, 2, ... into chunk 0, in that order, for channels c0 to c1."""
    cdef Py_ssize_t chunk, row = plan.channels
    cdef double before, after
    cdef double* a = partial + c0
    cdef double* b
    for chunk in range(1, plan.n_chunks):
        before = chunk_count(plan, chunk)
        after = chunk_count(plan, chunk + 1)
        b = a + 3 * chunk * row
        merge_moments(before, a, a + row, a + 2 * row, after - before, b, b + row, b + 2 * row, c1 - c0)


# ---------------------------------------------------------------------------------------------------------------------
# The per-channel arithmetic between the passes, in float64.
# ---------------------------------------------------------------------------------------------------------------------

cdef void normalize_channels(
    const Plan* plan, Py_ssize_t c0, Py_ssize_t c1,
    const double* mean,
    const double* rest,        # IN   what mean lacks, or NULL: nothing
    const double* m2, double n, const floating* gamma, const floating* beta, double eps,
    double* stats,             # OUT  (3, channels): mean, var, invstd
    floating* coefs,           # OUT  (3, channels): center, scale, offset
) noexcept nogil:
    """The mean in two floats: what the data's dtype holds is the center, the rest goes into the offset."""
    cdef Py_ssize_t c, channels = plan.channels
    cdef double* var = stats + channels
    cdef double* invstd = stats + 2 * channels
    cdef floating* center = coefs
    cdef floating* scale = coefs + channels
    cdef floating* offset = coefs + 2 * channels
    # Loops of few arrays, which the compiler can tell apart and so vectorises: at 4096 channels
    # they were a quarter of a call.
    for c in range(c0, c1):
        var[c] = m2[c] / n
    for c in range(c0, c1):
        invstd[c] = 1 / sqrt(var[c] + eps)
    for c in range(c0, c1):
        stats[c] = mean[c]
        center[c] = <floating>mean[c]
    if gamma != NULL:
        for c in range(c0, c1):
            scale[c] = <floating>(invstd[c] * gamma[c])
            offset[c] = <floating>(-(mean[c] - center[c]) * (invstd[c] * gamma[c]))
    else:
        for c in range(c0, c1):
            scale[c] = <floating>invstd[c]
            offset[c] = <floating>(-(mean[c] - center[c]) * invstd[c])
    if rest != NULL:
        for c in range(c0, c1):
            offset[c] -= rest[c] * scale[c]
    if beta != NULL:
        for c in range(c0, c1):
            offset[c] += beta[c]


cdef void gradient_channels(
    const Plan* plan, Py_ssize_t c0, Py_ssize_t c1,
    const double* sum_dy, const double* sum_dy_xmu, const double* stats, const floating* coefs,
    bint training,             # IN   False: the statistics were constants, so they pass no gradient on
    floating* linear,          # OUT  (4, channels): factor, slope, shift, rest
    floating* grads,           # OUT  (2, channels): grad_gamma, grad_beta
) noexcept nogil:
    """The shift, mean(dy) less what center lacks of the mean, in two floats; the factor stays outside, so that the
    slope is about 1 / std and neither under- nor overflows."""
    cdef Py_ssize_t c, channels = plan.channels
    cdef double k, d, n = <double>plan.outer * plan.inner
    cdef const double* invstd = stats + 2 * channels
    cdef floating* slope = linear + channels
    cdef floating* shift = linear + 2 * channels
    cdef floating* rest = linear + 3 * channels
    for c in range(c0, c1):
        grads[c] = <floating>(invstd[c] * sum_dy_xmu[c])
        grads[channels + c] = <floating>sum_dy[c]
        linear[c] = coefs[channels + c]
    for c in range(c0, c1):
        k = invstd[c] * (invstd[c] * (sum_dy_xmu[c] / n)) if training else 0
        d = sum_dy[c] / n - k * (stats[c] - coefs[c]) if training else 0
        slope[c] = <floating>k
        shift[c] = <floating>d
        rest[c] = <floating>(d - shift[c])


cdef inline void spread_rows(
    const floating* rows,      # IN   (n, channels)
    Py_ssize_t n, const Plan* plan, Py_ssize_t c0, Py_ssize_t channels,
    floating* wide,            # OUT  (n, TILE)
) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        memcpy(wide + i * TILE, rows + i * plan.channels + c0, channels * sizeof(floating))
        spread(wide + i * TILE, channels, plan.repeat, plan.fold)


# ---------------------------------------------------------------------------------------------------------------------
# affine: y = (x - center) * scale + offset, then the activation.
# ---------------------------------------------------------------------------------------------------------------------

cdef inline void affine_strip(
    const floating* x,         # IN   (n_columns,)
    Py_ssize_t n_columns,
    const floating* coefs,     # IN   at CENTER, SCALE, OFFSET
    bint relu,
    floating* y,               # OUT  may be x: the strip is read before it is written
) noexcept nogil:
    cdef floating strip[STRIP]
    cdef floating value
    cdef Py_ssize_t j
    for j in range(n_columns):
        value = (x[j] - coefs[CENTER + j]) * coefs[SCALE + j] + coefs[OFFSET + j]
        strip[j] = 0 if relu and value <= 0 else value
    for j in range(n_columns):
        y[j] = strip[j]


cdef inline Py_ssize_t lead(Py_ssize_t stride, Py_ssize_t width) noexcept nogil:
    """How many elements ahead to fetch: AHEAD of them, which are whole rows where the rows lie apart."""
    return AHEAD if stride == width else stride * max(1, AHEAD // width)


cdef inline void affine_rows_as(
    const floating* x, Py_ssize_t x_ahead, Py_ssize_t length, Py_ssize_t width, const floating* coefs, bint relu,
    floating* y, Py_ssize_t y_ahead,
) noexcept nogil:
    cdef Py_ssize_t row, i, j, n
    if width == STRIP:  # one channel's lanes: the coefficients stay in registers
        n = length // STRIP * STRIP
        for row in range(length // STRIP):
            prefetch(x + row * STRIP + x_ahead)
            prefetch_write(y + row * STRIP + y_ahead)
            affine_strip(x + row * STRIP, STRIP, coefs, relu, y + row * STRIP)
        affine_strip(x + n, length - n, coefs, relu, y + n)
        return
    for row in range(ceil_div(length, width)):
        i = row * width
        n = min(width, length - i)
        j = 0
        while j + STRIP <= n:
            prefetch(x + i + j + x_ahead)
            prefetch_write(y + i + j + y_ahead)
            affine_strip(x + i + j, STRIP, coefs + j, relu, y + i + j)
            j += STRIP
        affine_strip(x + i + j, n - j, coefs + j, relu, y + i + j)


cdef void affine_rows(
    const floating* x, Py_ssize_t x_ahead, Py_ssize_t length, Py_ssize_t width, const floating* coefs, bint relu,
    floating* y, Py_ssize_t y_ahead,
) noexcept nogil:
    # A literal in each branch: a flag tested inside the strip would keep it from being vectorised.
    if relu:
        affine_rows_as(x, x_ahead, length, width, coefs, True, y, y_ahead)
    else:
        affine_rows_as(x, x_ahead, length, width, coefs, False, y, y_ahead)


cdef inline void affine_run(
    const floating* x, Py_ssize_t x_ahead, Py_ssize_t length, Py_ssize_t width, const floating* coefs, bint relu,
    bint stream, floating* buffer, floating* y, Py_ssize_t y_ahead,
) noexcept nogil:
    """A contiguous run as rows of `width`, the last of them perhaps shorter."""
    cdef Py_ssize_t piece, i, n, step = ROWS * TILE // width * width
    if stream:
        y_ahead = 0
    else:
        step = length
        buffer = y
    for piece in range(ceil_div(length, step)):
        i = piece * step
        n = min(step, length - i)
        affine_rows(x + i, x_ahead, n, width, coefs, relu, buffer, y_ahead)
        if stream:
            stream_copy(y + i, buffer, n * sizeof(floating))


cdef void affine_task(
    const floating* x, Py_ssize_t stride, const Plan* plan, Py_ssize_t chunk, Py_ssize_t tile,
    const floating* channel_coefs,  # IN   (3, channels): center, scale, offset
    bint relu, bint stream,
    floating* y, Py_ssize_t y_stride,
) noexcept nogil:
    cdef floating coefs[3 * TILE]
    cdef floating buffer[ROWS * TILE]
    cdef Py_ssize_t c0 = tile * plan.tile
    cdef Py_ssize_t channels = min(plan.tile, plan.channels - c0)
    cdef Py_ssize_t width = channels * plan.repeat
    cdef Py_ssize_t index, r, c, i
    cdef Block block
    spread_rows(channel_coefs, 3, plan, c0, channels, coefs)
    x += c0 * plan.inner
    y += c0 * plan.inner
    # Backwards: the end of the chunk, read last by moments_task, is still in the cache.
    for index in range(min((chunk + 1) * plan.chunk, plan.n_blocks) - 1, chunk * plan.chunk - 1, -1):
        block = block_at(plan, index)
        if plan.by_inner:
            for r in range(block.row, block.row + block.n_rows):
                for c in range(channels):
                    i = c * plan.inner + block.start
                    affine_run(x + r * stride + i, AHEAD, block.length, LANES, coefs + c * LANES, relu,
                               stream, buffer, y + r * y_stride + i, AHEAD)
        elif stride == width and y_stride == width:
            i = block.row * width
            affine_run(x + i, AHEAD, block.n_rows * width, plan.fold * width, coefs, relu,
                       stream, buffer, y + i, AHEAD)
        else:
            for r in range(block.row, block.row + block.n_rows):
                affine_run(x + r * stride, lead(stride, width), width, width, coefs, relu,
                           stream, buffer, y + r * y_stride, lead(y_stride, width))
    if stream:
        stream_end()


# ---------------------------------------------------------------------------------------------------------------------
# grad_moments: sum_dy = sum(dy), sum_dy_xmu = sum(dy * (x - mean)); where a fused ReLU was off, dy counts as 0.
# ---------------------------------------------------------------------------------------------------------------------

cdef inline floating gate(floating dy, floating x, const floating* coefs, bint relu) noexcept nogil:
    return 0 if relu and (x - coefs[CENTER]) * coefs[SCALE] + coefs[OFFSET] <= 0 else dy


cdef inline void grad_sums_strip(
    const floating* dy,        # IN   (n_rows, n_columns), rows `dy_stride` apart
    Py_ssize_t dy_stride,
    const floating* x,         # IN   (n_rows, n_columns), rows `x_stride` apart
    Py_ssize_t x_stride,
    Py_ssize_t n_rows,
    Py_ssize_t n_columns,
    const double* mean,        # IN   (n_columns,)
    const floating* coefs,     # IN   at CENTER, SCALE, OFFSET
    bint relu,
    double* s1,                # INOUT
    double* s2,                # INOUT
) noexcept nogil:
    cdef floating gated[ROWS * STRIP]
    cdef Py_ssize_t r, j
    cdef double g, a, b
    if relu:  # in a loop of its own, which vectorises: among the sums, float64 took three times as long
        for r in range(n_rows):
            for j in range(n_columns):
                gated[r * STRIP + j] = gate(dy[r * dy_stride + j], x[r * x_stride + j], coefs + j, True)
        dy = gated
        dy_stride = STRIP
    for j in range(n_columns):
        a = 0
        b = 0
        for r in range(n_rows):
            g = dy[r * dy_stride + j]
            a += g
            b += g * (x[r * x_stride + j] - mean[j])
        s1[j] += a
        s2[j] += b


cdef inline void grad_sums_group(
    const floating* dy, Py_ssize_t dy_stride, const floating* x, Py_ssize_t x_stride,
    Py_ssize_t n_rows, Py_ssize_t width, const double* mean, const floating* coefs, bint relu,
    double* s1, double* s2,
) noexcept nogil:
    cdef Py_ssize_t r, j = 0
    while j + STRIP <= width:
        for r in range(n_rows, 2 * n_rows):
            prefetch(dy + r * dy_stride + j)
            prefetch(x + r * x_stride + j)
        grad_sums_strip(dy + j, dy_stride, x + j, x_stride, n_rows, STRIP, mean + j, coefs + j, relu, s1 + j, s2 + j)
        j += STRIP
    if (width - j) & 8:
        grad_sums_strip(dy + j, dy_stride, x + j, x_stride, n_rows, 8, mean + j, coefs + j, relu, s1 + j, s2 + j)
        j += 8
    if (width - j) & 4:
        grad_sums_strip(dy + j, dy_stride, x + j, x_stride, n_rows, 4, mean + j, coefs + j, relu, s1 + j, s2 + j)
        j += 4
    while j < width:
        grad_sums_strip(dy + j, dy_stride, x + j, x_stride, n_rows, 1, mean + j, coefs + j, relu, s1 + j, s2 + j)
        j += 1


cdef inline void grad_sums_rows_as(
    const floating* dy, Py_ssize_t dy_stride, const floating* x, Py_ssize_t x_stride,
    Py_ssize_t n_rows, Py_ssize_t width, const double* mean, const floating* coefs, bint relu,
    double* s1, double* s2,
) noexcept nogil:
    cdef Py_ssize_t _i
    for _i in range(n_rows // ROWS):
        grad_sums_group(dy, dy_stride, x, x_stride, ROWS, width, mean, coefs, relu, s1, s2)
        dy += ROWS * dy_stride
        x += ROWS * x_stride
    if n_rows & 4:
        grad_sums_group(dy, dy_stride, x, x_stride, 4, width, mean, coefs, relu, s1, s2)
        dy += 4 * dy_stride
        x += 4 * x_stride
    if n_rows & 2:
        grad_sums_group(dy, dy_stride, x, x_stride, 2, width, mean, coefs, relu, s1, s2)
        dy += 2 * dy_stride
        x += 2 * x_stride
    if n_rows & 1:
        grad_sums_group(dy, dy_stride, x, x_stride, 1, width, mean, coefs, relu, s1, s2)


cdef void grad_sums_rows(
    const floating* dy, Py_ssize_t dy_stride, const floating* x, Py_ssize_t x_stride,
    Py_ssize_t n_rows, Py_ssize_t width, const double* mean, const floating* coefs, bint relu,
    double* s1, double* s2,
) noexcept nogil:
    # A literal in each branch: a flag tested inside the strip would keep it from being vectorised.
    if relu:
        grad_sums_rows_as(dy, dy_stride, x, x_stride, n_rows, width, mean, coefs, True, s1, s2)
    else:
        grad_sums_rows_as(dy, dy_stride, x, x_stride, n_rows, width, mean, coefs, False, s1, s2)


cdef void grad_sums_run(
    const floating* dy, const floating* x, Py_ssize_t length, Py_ssize_t width,
    const double* mean, const floating* coefs, bint relu, double* s1, double* s2,
) noexcept nogil:
    """A contiguous run as rows of `width`, the last of them perhaps shorter."""
    cdef Py_ssize_t n_rows = length // width, done = n_rows * width
    if width == LANES and relu:
        grad_sums_rows_as(dy, LANES, x, LANES, n_rows, LANES, mean, coefs, True, s1, s2)
    elif width == LANES:
        grad_sums_rows_as(dy, LANES, x, LANES, n_rows, LANES, mean, coefs, False, s1, s2)
    else:
        grad_sums_rows(dy, width, x, width, n_rows, width, mean, coefs, relu, s1, s2)
    if done < length:
        grad_sums_rows(dy + done, width, x + done, width, 1, length - done, mean, coefs, relu, s1, s2)


cdef void grad_moments_task(
    const floating* dy, Py_ssize_t dy_stride, const floating* x, Py_ssize_t x_stride,
    const Plan* plan, Py_ssize_t chunk, Py_ssize_t tile,
    const double* channel_mean,     # IN   (channels,)
    const floating* channel_coefs,  # IN   (3, channels): center, scale, offset
    bint relu,
    double* sum_dy,                 # OUT  (channels,) of this chunk
    double* sum_dy_xmu,             # OUT
) noexcept nogil:
    cdef floating dy_buffer[ROWS * TILE]
    cdef floating x_buffer[ROWS * TILE]
    cdef floating coefs[3 * TILE]
    cdef double mean[TILE]
    cdef double s1[TILE]
    cdef double s2[TILE]
    cdef Py_ssize_t c0 = tile * plan.tile
    cdef Py_ssize_t channels = min(plan.tile, plan.channels - c0)
    cdef Py_ssize_t width = channels * plan.repeat, wide = plan.fold * width, step = ROWS * plan.fold
    cdef Py_ssize_t index, r, c, i, n, last
    cdef Block block
    spread_rows(channel_mean, 1, plan, c0, channels, mean)
    spread_rows(channel_coefs, 3, plan, c0, channels, coefs)
    dy += c0 * plan.inner
    x += c0 * plan.inner
    sum_dy += c0
    sum_dy_xmu += c0
    memset(sum_dy, 0, channels * sizeof(double))
    memset(sum_dy_xmu, 0, channels * sizeof(double))
    for index in range(chunk * plan.chunk, min((chunk + 1) * plan.chunk, plan.n_blocks)):
        block = block_at(plan, index)
        memset(s1, 0, wide * sizeof(double))
        memset(s2, 0, wide * sizeof(double))
        last = block.row + block.n_rows
        if plan.by_inner:
            for r in range(block.row, last):
                for c in range(channels):
                    i = c * plan.inner + block.start
                    n = c * LANES
                    grad_sums_run(dy + r * dy_stride + i, x + r * x_stride + i, block.length, LANES,
                                  mean + n, coefs + n, relu, s1 + n, s2 + n)
        elif plan.fold == 1:
            grad_sums_rows(dy + block.row * dy_stride, dy_stride, x + block.row * x_stride, x_stride,
                           block.n_rows, width, mean, coefs, relu, s1, s2)
        elif dy_stride == width and x_stride == width:
            i = block.row * width
            grad_sums_run(dy + i, x + i, block.n_rows * width, wide, mean, coefs, relu, s1, s2)
        else:
            for i in range(ceil_div(block.n_rows, step)):
                r = block.row + i * step
                n = min(step, last - r)
                grad_sums_run(gather(dy + r * dy_stride, dy_stride, n, width, dy_buffer),
                              gather(x + r * x_stride, x_stride, n, width, x_buffer),
                              n * width, wide, mean, coefs, relu, s1, s2)
        fold_sums(s1, channels, plan.repeat, plan.fold)
        fold_sums(s2, channels, plan.repeat, plan.fold)
        for c in range(channels):
            sum_dy[c] += s1[c]
            sum_dy_xmu[c] += s2[c]


cdef void add_chunks(const Plan* plan, double* sums, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """Chunks 1, 2, ... into chunk 0, in that order, for channels c0 to c1."""
    cdef Py_ssize_t chunk, c
    for chunk in range(1, plan.n_chunks):
        for c in range(c0, c1):
            sums[c] += sums[chunk * plan.channels + c]


# ---------------------------------------------------------------------------------------------------------------------
# grad_affine: grad_x = factor * (((dy - shift) - rest) - (x - center) * slope); where a fused ReLU was off, dy is 0.
# Through constant statistics (training is False) it is factor * dy, whatever x holds.
# ---------------------------------------------------------------------------------------------------------------------

cdef inline void grad_affine_strip(
    const floating* dy,        # IN   (n_columns,)
    const floating* x,         # IN   (n_columns,)
    Py_ssize_t n_columns,
    const floating* coefs,     # IN   at CENTER, SCALE, OFFSET, FACTOR, SLOPE, SHIFT, REST
    bint relu,
    bint training,
    floating* grad_x,          # OUT  may be dy: the strip is read before it is written
) noexcept nogil:
    cdef floating strip[STRIP]
    cdef floating g
    cdef Py_ssize_t j
    for j in range(n_columns):
        g = gate(dy[j], x[j], coefs + j, relu)
        if training:
            g = ((g - coefs[SHIFT + j]) - coefs[REST + j]) - (x[j] - coefs[CENTER + j]) * coefs[SLOPE + j]
        strip[j] = coefs[FACTOR + j] * g
    for j in range(n_columns):
        grad_x[j] = strip[j]


cdef inline void grad_affine_rows_as(
    const floating* dy, Py_ssize_t dy_ahead, const floating* x, Py_ssize_t x_ahead, Py_ssize_t length,
    Py_ssize_t width, const floating* coefs, bint relu, bint training, floating* grad_x, Py_ssize_t grad_x_ahead,
) noexcept nogil:
    cdef Py_ssize_t row, i, j, n
    if width == STRIP:
        n = length // STRIP * STRIP
        for row in range(length // STRIP):
            i = row * STRIP
            prefetch(dy + i + dy_ahead)
            prefetch(x + i + x_ahead)
            prefetch_write(grad_x + i + grad_x_ahead)
            grad_affine_strip(dy + i, x + i, STRIP, coefs, relu, training, grad_x + i)
        grad_affine_strip(dy + n, x + n, length - n, coefs, relu, training, grad_x + n)
        return
    for row in range(ceil_div(length, width)):
        i = row * width
        n = min(width, length - i)
        j = 0
        while j + STRIP <= n:
            prefetch(dy + i + j + dy_ahead)
            prefetch(x + i + j + x_ahead)
            prefetch_write(grad_x + i + j + grad_x_ahead)
            grad_affine_strip(dy + i + j, x + i + j, STRIP, coefs + j, relu, training, grad_x + i + j)
            j += STRIP
        grad_affine_strip(dy + i + j, x + i + j, n - j, coefs + j, relu, training, grad_x + i + j)


cdef void grad_affine_rows(
    const floating* dy, Py_ssize_t dy_ahead, const floating* x, Py_ssize_t x_ahead, Py_ssize_t length,
    Py_ssize_t width, const floating* coefs, bint relu, bint training, floating* grad_x, Py_ssize_t grad_x_ahead,
) noexcept nogil:
    if relu and training:
        grad_affine_rows_as(dy, dy_ahead, x, x_ahead, length, width, coefs, True, True, grad_x, grad_x_ahead)
    elif relu:
        grad_affine_rows_as(dy, dy_ahead, x, x_ahead, length, width, coefs, True, False, grad_x, grad_x_ahead)
    elif training:
        grad_affine_rows_as(dy, dy_ahead, x, x_ahead, length, width, coefs, False, True, grad_x, grad_x_ahead)
    else:
        grad_affine_rows_as(dy, dy_ahead, x, x_ahead, length, width, coefs, False, False, grad_x, grad_x_ahead)


cdef inline void grad_affine_run(
    const floating* dy, Py_ssize_t dy_ahead, const floating* x, Py_ssize_t x_ahead, Py_ssize_t length,
    Py_ssize_t width, const floating* coefs, bint relu, bint training, bint stream, floating* buffer,
    floating* grad_x, Py_ssize_t grad_x_ahead,
) noexcept nogil:
    """A contiguous run as rows of `width`, the last of them perhaps shorter."""
    cdef Py_ssize_t piece, i, n, step = ROWS * TILE // width * width
    if stream:
        grad_x_ahead = 0
    else:
        step = length
        buffer = grad_x
    for piece in range(ceil_div(length, step)):
        i = piece * step
        n = min(step, length - i)
        grad_affine_rows(dy + i, dy_ahead, x + i, x_ahead, n, width, coefs, relu, training, buffer, grad_x_ahead)
        if stream:
            stream_copy(grad_x + i, buffer, n * sizeof(floating))


cdef void grad_affine_task(
    const floating* dy, Py_ssize_t dy_stride, const floating* x, Py_ssize_t x_stride,
    const Plan* plan, Py_ssize_t chunk, Py_ssize_t tile,
    const floating* channel_coefs,  # IN   (3, channels): center, scale, offset
    const floating* linear,         # IN   (4, channels): factor, slope, shift, rest
    bint relu, bint training, bint stream,
    floating* grad_x, Py_ssize_t grad_x_stride,
) noexcept nogil:
    cdef floating coefs[7 * TILE]
    cdef floating buffer[ROWS * TILE]
    cdef Py_ssize_t c0 = tile * plan.tile
    cdef Py_ssize_t channels = min(plan.tile, plan.channels - c0)
    cdef Py_ssize_t width = channels * plan.repeat
    cdef Py_ssize_t index, r, c, i
    cdef Block block
    spread_rows(channel_coefs, 3, plan, c0, channels, coefs)
    spread_rows(linear, 4, plan, c0, channels, coefs + FACTOR)
    dy += c0 * plan.inner
    x += c0 * plan.inner
    grad_x += c0 * plan.inner
    for index in range(min((chunk + 1) * plan.chunk, plan.n_blocks) - 1, chunk * plan.chunk - 1, -1):
        block = block_at(plan, index)
        if plan.by_inner:
            for r in range(block.row, block.row + block.n_rows):
                for c in range(channels):
                    i = c * plan.inner + block.start
                    grad_affine_run(dy + r * dy_stride + i, AHEAD, x + r * x_stride + i, AHEAD, block.length, LANES,
                                    coefs + c * LANES, relu, training, stream, buffer,
                                    grad_x + r * grad_x_stride + i, AHEAD)
        elif dy_stride == width and x_stride == width and grad_x_stride == width:
            i = block.row * width
            grad_affine_run(dy + i, AHEAD, x + i, AHEAD, block.n_rows * width, plan.fold * width, coefs, relu,
                            training, stream, buffer, grad_x + i, AHEAD)
        else:
            for r in range(block.row, block.row + block.n_rows):
                grad_affine_run(dy + r * dy_stride, lead(dy_stride, width), x + r * x_stride, lead(x_stride, width),
                                width, width, coefs, relu, training, stream, buffer,
                                grad_x + r * grad_x_stride, lead(grad_x_stride, width))
    if stream:
        stream_end()


# ---------------------------------------------------------------------------------------------------------------------
# Workers: what one thread of the team does. Where tiles divide evenly and are not strips of many rows, a thread has its
# own and takes them one by one from the first pass to the last: nobody waits, and a tile that fits its cache is read
# from memory once (32x256x14x14: 18 %). Otherwise the threads share the tasks of all tiles, and wait for each other
# between the passes. Either way a thread gets the same tasks in both passes, in the second in reverse order.
# ---------------------------------------------------------------------------------------------------------------------

cdef struct Part:
    Py_ssize_t tile        # the first of
    Py_ssize_t n_tiles     # these tiles
    int rank               # this thread's number among the
    int size               # threads that share the part


cdef inline bint has_own_tiles(const Plan* plan) noexcept nogil:
    return plan.n_tiles % team_size() == 0 and (plan.by_inner or plan.n_chunks == 1)


cdef inline Py_ssize_t n_parts(const Plan* plan) noexcept nogil:
    """How many parts this thread takes, one after the other."""
    return plan.n_tiles // team_size() if has_own_tiles(plan) else 1


cdef inline Part part_at(const Plan* plan, Py_ssize_t index) noexcept nogil:
    cdef Part part
    if has_own_tiles(plan):
        part.tile, part.n_tiles = team_rank() * n_parts(plan) + index, 1
        part.rank, part.size = 0, 1
    else:
        part.tile, part.n_tiles = 0, plan.n_tiles
        part.rank, part.size = team_rank(), team_size()
    return part


cdef inline Py_ssize_t share(Py_ssize_t n, const Part* part, int further) noexcept nogil:
    """Where this thread's share of n things begins; with further = 1, where it ends."""
    return n * (part.rank + further) // part.size


cdef inline Py_ssize_t channel_share(const Plan* plan, const Part* part, int further) noexcept nogil:
    """The same for the part's channels."""
    cdef Py_ssize_t c0 = part.tile * plan.tile
    return c0 + share(min(part.n_tiles * plan.tile, plan.channels - c0), part, further)


cdef inline void wait_for_others(const Part* part) noexcept nogil:
    if part.size > 1:
        team_barrier()


cdef void moments_part(
    const floating* x, Py_ssize_t stride, const Plan* plan, const Part* part,
    double* partial,           # (n_chunks, 3, channels): mean, rest, m2; the result ends up in chunk 0
) noexcept nogil:
    cdef Py_ssize_t task, chunk, n_tasks = plan.n_chunks * part.n_tiles
    for task in range(share(n_tasks, part, 0), share(n_tasks, part, 1)):
        chunk = task // part.n_tiles
        moments_task(x, stride, plan, chunk, part.tile + task % part.n_tiles, partial + 3 * chunk * plan.channels)
    wait_for_others(part)
    merge_chunks(plan, partial, channel_share(plan, part, 0), channel_share(plan, part, 1))


cdef void affine_part(
    const floating* x, Py_ssize_t stride, const Plan* plan, const Part* part, const floating* coefs, bint relu,
    bint stream, floating* y, Py_ssize_t y_stride,
) noexcept nogil:
    cdef Py_ssize_t task, n_tasks = plan.n_chunks * part.n_tiles
    for task in range(share(n_tasks, part, 1) - 1, share(n_tasks, part, 0) - 1, -1):
        affine_task(x, stride, plan, task // part.n_tiles, part.tile + task % part.n_tiles, coefs, relu, stream,
                    y, y_stride)


cdef void grad_moments_part(
    const floating* dy, Py_ssize_t dy_stride, const floating* x, Py_ssize_t x_stride, const Plan* plan,
    const Part* part, const double* mean, const floating* coefs, bint relu, double* sum_dy, double* sum_dy_xmu,
) noexcept nogil:
    cdef Py_ssize_t task, chunk, n_tasks = plan.n_chunks * part.n_tiles
    for task in range(share(n_tasks, part, 0), share(n_tasks, part, 1)):
        chunk = task // part.n_tiles
        grad_moments_task(dy, dy_stride, x, x_stride, plan, chunk, part.tile + task % part.n_tiles, mean, coefs, relu,
                          sum_dy + chunk * plan.channels, sum_dy_xmu + chunk * plan.channels)
    wait_for_others(part)
    add_chunks(plan, sum_dy, channel_share(plan, part, 0), channel_share(plan, part, 1))
    add_chunks(plan, sum_dy_xmu, channel_share(plan, part, 0), channel_share(plan, part, 1))


cdef void grad_affine_part(
    const floating* dy, Py_ssize_t dy_stride, const floating* x, Py_ssize_t x_stride, const Plan* plan,
    const Part* part, const floating* coefs, const floating* linear, bint relu, bint training, bint stream,
    floating* grad_x, Py_ssize_t grad_x_stride,
) noexcept nogil:
    cdef Py_ssize_t task, n_tasks = plan.n_chunks * part.n_tiles
    for task in range(share(n_tasks, part, 1) - 1, share(n_tasks, part, 0) - 1, -1):
        grad_affine_task(dy, dy_stride, x, x_stride, plan, task // part.n_tiles, part.tile + task % part.n_tiles,
                         coefs, linear, relu, training, stream, grad_x, grad_x_stride)


cdef void moments_worker(
    const floating* x, Py_ssize_t stride, const Plan* plan, double* partial,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef Part part
    for index in range(n_parts(plan)):
        part = part_at(plan, index)
        moments_part(x, stride, plan, &part, partial)


cdef void affine_worker(
    const floating* x, Py_ssize_t stride, const Plan* plan, const floating* coefs, bint relu, bint stream,
    floating* y, Py_ssize_t y_stride,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef Part part
    for index in range(n_parts(plan)):
        part = part_at(plan, index)
        affine_part(x, stride, plan, &part, coefs, relu, stream, y, y_stride)


cdef void batch_norm_worker(
    const floating* x, Py_ssize_t stride, const Plan* plan,
    const floating* gamma, const floating* beta, double eps, bint relu, bint stream,
    double* partial, double* stats, floating* coefs, floating* y, Py_ssize_t y_stride,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef Part part
    for index in range(n_parts(plan)):
        part = part_at(plan, index)
        moments_part(x, stride, plan, &part, partial)
        normalize_channels(plan, channel_share(plan, &part, 0), channel_share(plan, &part, 1),
                           partial, partial + plan.channels, partial + 2 * plan.channels,
                           <double>plan.outer * plan.inner, gamma, beta, eps, stats, coefs)
        wait_for_others(&part)
        affine_part(x, stride, plan, &part, coefs, relu, stream, y, y_stride)


cdef void inference_worker(
    const floating* x, Py_ssize_t stride, const Plan* plan, const double* mean, const double* var,
    const floating* gamma, const floating* beta, double eps, bint relu, bint stream,
    double* stats, floating* coefs, floating* y, Py_ssize_t y_stride,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef Part part
    for index in range(n_parts(plan)):
        part = part_at(plan, index)
        normalize_channels(plan, channel_share(plan, &part, 0), channel_share(plan, &part, 1),
                           mean, NULL, var, 1, gamma, beta, eps, stats, coefs)
        wait_for_others(&part)
        affine_part(x, stride, plan, &part, coefs, relu, stream, y, y_stride)


cdef void grad_moments_worker(
    const floating* dy, Py_ssize_t dy_stride, const floating* x, Py_ssize_t x_stride, const Plan* plan,
    const double* mean, const floating* coefs, bint relu, double* sum_dy, double* sum_dy_xmu,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef Part part
    for index in range(n_parts(plan)):
        part = part_at(plan, index)
        grad_moments_part(dy, dy_stride, x, x_stride, plan, &part, mean, coefs, relu, sum_dy, sum_dy_xmu)


cdef void grad_affine_worker(
    const floating* dy, Py_ssize_t dy_stride, const floating* x, Py_ssize_t x_stride, const Plan* plan,
    const floating* coefs, const floating* linear, bint relu, bint training, bint stream,
    floating* grad_x, Py_ssize_t grad_x_stride,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef Part part
    for index in range(n_parts(plan)):
        part = part_at(plan, index)
        grad_affine_part(dy, dy_stride, x, x_stride, plan, &part, coefs, linear, relu, training, stream,
                         grad_x, grad_x_stride)


cdef void batch_norm_backward_worker(
    const floating* dy, Py_ssize_t dy_stride, const floating* x, Py_ssize_t x_stride, const Plan* plan,
    const double* stats, const floating* coefs, bint relu, bint training, bint stream,
    double* sum_dy, double* sum_dy_xmu, floating* linear, floating* grads,
    floating* grad_x, Py_ssize_t grad_x_stride,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef Part part
    for index in range(n_parts(plan)):
        part = part_at(plan, index)
        grad_moments_part(dy, dy_stride, x, x_stride, plan, &part, stats, coefs, relu, sum_dy, sum_dy_xmu)
        gradient_channels(plan, channel_share(plan, &part, 0), channel_share(plan, &part, 1),
                          sum_dy, sum_dy_xmu, stats, coefs, training, linear, grads)
        wait_for_others(&part)
        grad_affine_part(dy, dy_stride, x, x_stride, plan, &part, coefs, linear, relu, training, stream,
                         grad_x, grad_x_stride)
cimport numpy as cnp
from cython.parallel cimport parallel
from libc.math cimport INFINITY
from libc.stdlib cimport free, malloc

cnp.import_array()

cdef extern from "machine.h" nogil:
    const int fastbn_has_openmp
    int fastbn_cpu_level()
    int team_take(int wanted)
    void team_give(int taken)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers: scratch memory and the team of threads around a worker.
# ---------------------------------------------------------------------------------------------------------------------

cdef double* scratch(const Plan* plan, Py_ssize_t rows_per_chunk) except NULL:
    cdef Py_ssize_t n = plan.n_chunks * plan.channels * rows_per_chunk
    cdef double* memory = <double*>malloc(max(1, n) * sizeof(double))
    if memory == NULL:
        raise MemoryError(f"no memory for the {n} partial results")
    return memory


cdef inline bint streams(const Plan* plan, Py_ssize_t itemsize, bint in_place) noexcept nogil:
    """Whether the output is to bypass the caches: too large to stay, and not the input (whose lines are there)."""
    return not in_place and plan.outer * plan.channels * plan.inner * itemsize >= STREAM_BYTES


cdef int launch_moments(
    const floating* x, Py_ssize_t stride, Plan plan, double* mean, double* rest, double* m2, int num_threads,
) except -1:
    cdef double* partial = scratch(&plan, 3)
    cdef int team = team_take(team_wanted(&plan, sizeof(floating), num_threads))
    with nogil, parallel(num_threads=team):
        moments_worker(x, stride, &plan, partial)
    team_give(team)
    memcpy(mean, partial, plan.channels * sizeof(double))
    memcpy(rest, partial + plan.channels, plan.channels * sizeof(double))
    memcpy(m2, partial + 2 * plan.channels, plan.channels * sizeof(double))
    free(partial)
    return 0


cdef int launch_affine(
    const floating* x, Py_ssize_t stride, Plan plan, const floating* coefs, bint relu,
    floating* y, Py_ssize_t y_stride, int num_threads,
) except -1:
    cdef int team = team_take(team_wanted(&plan, sizeof(floating), num_threads))
    cdef bint stream = streams(&plan, sizeof(floating), x == y)
    with nogil, parallel(num_threads=team):
        affine_worker(x, stride, &plan, coefs, relu, stream, y, y_stride)
    team_give(team)
    return 0


cdef int launch_batch_norm(
    const floating* x, Py_ssize_t stride, Plan plan, const floating* gamma, const floating* beta, double eps,
    bint relu, double* stats, floating* coefs, floating* y, Py_ssize_t y_stride, int num_threads,
) except -1:
    cdef double* partial = scratch(&plan, 3)
    cdef int team = team_take(team_wanted(&plan, sizeof(floating), num_threads))
    cdef bint stream = streams(&plan, sizeof(floating), x == y)
    with nogil, parallel(num_threads=team):
        batch_norm_worker(x, stride, &plan, gamma, beta, eps, relu, stream, partial, stats, coefs, y, y_stride)
    team_give(team)
    free(partial)
    return 0


cdef int launch_inference(
    const floating* x, Py_ssize_t stride, Plan plan, const double* mean, const double* var,
    const floating* gamma, const floating* beta, double eps, bint relu, double* stats, floating* coefs,
    floating* y, Py_ssize_t y_stride, int num_threads,
) except -1:
    cdef int team = team_take(team_wanted(&plan, sizeof(floating), num_threads))
    cdef bint stream = streams(&plan, sizeof(floating), x == y)
    with nogil, parallel(num_threads=team):
        inference_worker(x, stride, &plan, mean, var, gamma, beta, eps, relu, stream, stats, coefs, y, y_stride)
    team_give(team)
    return 0


cdef int launch_grad_moments(
    const floating* dy, Py_ssize_t dy_stride, const floating* x, Py_ssize_t x_stride, Plan plan,
    const double* mean, const floating* coefs, bint relu, double* sum_dy, double* sum_dy_xmu, int num_threads,
) except -1:
    cdef double* memory = scratch(&plan, 2)
    cdef double* partial_xmu = memory + plan.n_chunks * plan.channels
    cdef int team = team_take(team_wanted(&plan, 2 * sizeof(floating), num_threads))
    with nogil, parallel(num_threads=team):
        grad_moments_worker(dy, dy_stride, x, x_stride, &plan, mean, coefs, relu, memory, partial_xmu)
    team_give(team)
    memcpy(sum_dy, memory, plan.channels * sizeof(double))
    memcpy(sum_dy_xmu, partial_xmu, plan.channels * sizeof(double))
    free(memory)
    return 0


cdef int launch_grad_affine(
    const floating* dy, Py_ssize_t dy_stride, const floating* x, Py_ssize_t x_stride, Plan plan,
    const floating* coefs, const floating* linear, bint relu,
    floating* grad_x, Py_ssize_t grad_x_stride, int num_threads,
) except -1:
    cdef int team = team_take(team_wanted(&plan, 2 * sizeof(floating), num_threads))
    cdef bint stream = streams(&plan, sizeof(floating), dy == grad_x)
    with nogil, parallel(num_threads=team):
        grad_affine_worker(dy, dy_stride, x, x_stride, &plan, coefs, linear, relu, True, stream, grad_x, grad_x_stride)
    team_give(team)
    return 0


cdef int launch_batch_norm_backward(
    const floating* dy, Py_ssize_t dy_stride, const floating* x, Py_ssize_t x_stride, Plan plan,
    const double* stats, const floating* coefs, bint relu, bint training,
    floating* grads, floating* grad_x, Py_ssize_t grad_x_stride, int num_threads,
) except -1:
    cdef double* sum_dy = scratch(&plan, 6)
    cdef double* sum_dy_xmu = sum_dy + plan.n_chunks * plan.channels
    cdef floating* linear = <floating*>(sum_dy_xmu + plan.n_chunks * plan.channels)
    cdef int team = team_take(team_wanted(&plan, 2 * sizeof(floating), num_threads))
    cdef bint stream = streams(&plan, sizeof(floating), dy == grad_x)
    with nogil, parallel(num_threads=team):
        batch_norm_backward_worker(dy, dy_stride, x, x_stride, &plan, stats, coefs, relu, training, stream,
                                   sum_dy, sum_dy_xmu, linear, grads, grad_x, grad_x_stride)
    team_give(team)
    free(sum_dy)
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# What Python calls: the contract of kernels/__init__.py. The arrays were checked by _layout.py.
# ---------------------------------------------------------------------------------------------------------------------

OPENMP = bool(fastbn_has_openmp)


def cpu_level():
    """The widest instruction set that this processor offers: 0 baseline, 1 AVX2 + FMA, 2 AVX-512."""
    return fastbn_cpu_level()


cdef inline Plan plan_of(cnp.ndarray x) noexcept:
    return make_plan(cnp.PyArray_DIM(x, 0), cnp.PyArray_DIM(x, 1), cnp.PyArray_DIM(x, 2))


cdef inline Py_ssize_t stride_of(cnp.ndarray x) noexcept:
    return cnp.PyArray_STRIDE(x, 0) // cnp.PyArray_ITEMSIZE(x)


cdef inline void* data_of(array) noexcept:
    return NULL if array is None else cnp.PyArray_DATA(<cnp.ndarray>array)


cdef inline bint is_float(cnp.ndarray x) noexcept:
    return cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT32


def moments(
    cnp.ndarray x not None,      # IN   (outer, channels, inner)
    cnp.ndarray mean not None,   # OUT  (channels,) float64
    cnp.ndarray rest not None,   # OUT  (channels,) float64
    cnp.ndarray m2 not None,     # OUT  (channels,) float64
    int num_threads,
):
    if is_float(x):
        launch_moments[float](<float*>data_of(x), stride_of(x), plan_of(x), <double*>data_of(mean),
                              <double*>data_of(rest), <double*>data_of(m2), num_threads)
    else:
        launch_moments[double](<double*>data_of(x), stride_of(x), plan_of(x), <double*>data_of(mean),
                               <double*>data_of(rest), <double*>data_of(m2), num_threads)


def affine(
    cnp.ndarray x not None,      # IN   (outer, channels, inner)
    cnp.ndarray coefs not None,  # IN   (3, channels): center, scale, offset
    bint relu,
    cnp.ndarray out not None,    # OUT  (outer, channels, inner)
    int num_threads,
):
    if is_float(x):
        launch_affine[float](<float*>data_of(x), stride_of(x), plan_of(x), <float*>data_of(coefs), relu,
                             <float*>data_of(out), stride_of(out), num_threads)
    else:
        launch_affine[double](<double*>data_of(x), stride_of(x), plan_of(x), <double*>data_of(coefs), relu,
                              <double*>data_of(out), stride_of(out), num_threads)


def batch_norm(
    cnp.ndarray x not None,      # IN   (outer, channels, inner)
    gamma,                       # IN   (channels,) or None
    beta,                        # IN   (channels,) or None
    double eps,
    bint relu,
    cnp.ndarray out not None,    # OUT  (outer, channels, inner)
    cnp.ndarray stats not None,  # OUT  (3, channels) float64: mean, var, invstd
    cnp.ndarray coefs not None,  # OUT  (3, channels): center, scale, offset
    int num_threads,
):
    if is_float(x):
        launch_batch_norm[float](<float*>data_of(x), stride_of(x), plan_of(x),
                                 <float*>data_of(gamma), <float*>data_of(beta), eps, relu,
                                 <double*>data_of(stats), <float*>data_of(coefs),
                                 <float*>data_of(out), stride_of(out), num_threads)
    else:
        launch_batch_norm[double](<double*>data_of(x), stride_of(x), plan_of(x),
                                  <double*>data_of(gamma), <double*>data_of(beta), eps, relu,
                                  <double*>data_of(stats), <double*>data_of(coefs),
                                  <double*>data_of(out), stride_of(out), num_threads)


def batch_norm_inference(
    cnp.ndarray x not None,      # IN   (outer, channels, inner)
    cnp.ndarray mean not None,   # IN   (channels,) float64
    cnp.ndarray var not None,    # IN   (channels,) float64
    gamma,                       # IN   (channels,) or None
    beta,                        # IN   (channels,) or None
    double eps,
    bint relu,
    cnp.ndarray out not None,    # OUT  (outer, channels, inner)
    cnp.ndarray stats not None,  # OUT  (3, channels) float64: mean, var, invstd
    cnp.ndarray coefs not None,  # OUT  (3, channels): center, scale, offset
    int num_threads,
):
    if is_float(x):
        launch_inference[float](<float*>data_of(x), stride_of(x), plan_of(x),
                                <double*>data_of(mean), <double*>data_of(var),
                                <float*>data_of(gamma), <float*>data_of(beta), eps, relu,
                                <double*>data_of(stats), <float*>data_of(coefs),
                                <float*>data_of(out), stride_of(out), num_threads)
    else:
        launch_inference[double](<double*>data_of(x), stride_of(x), plan_of(x),
                                 <double*>data_of(mean), <double*>data_of(var),
                                 <double*>data_of(gamma), <double*>data_of(beta), eps, relu,
                                 <double*>data_of(stats), <double*>data_of(coefs),
                                 <double*>data_of(out), stride_of(out), num_threads)


def grad_moments(
    cnp.ndarray grad_y not None,  # IN   (outer, channels, inner)
    cnp.ndarray x not None,      # IN   (outer, channels, inner)
    cnp.ndarray mean not None,   # IN   (channels,) float64
    cnp.ndarray coefs not None,  # IN   (3, channels): center, scale, offset
    bint relu,
    cnp.ndarray sum_dy not None,      # OUT  (channels,) float64
    cnp.ndarray sum_dy_xmu not None,  # OUT  (channels,) float64
    int num_threads,
):
    if is_float(x):
        launch_grad_moments[float](<float*>data_of(grad_y), stride_of(grad_y), <float*>data_of(x), stride_of(x),
                                   plan_of(x), <double*>data_of(mean), <float*>data_of(coefs), relu,
                                   <double*>data_of(sum_dy), <double*>data_of(sum_dy_xmu), num_threads)
    else:
        launch_grad_moments[double](<double*>data_of(grad_y), stride_of(grad_y), <double*>data_of(x), stride_of(x),
                                    plan_of(x), <double*>data_of(mean), <double*>data_of(coefs), relu,
                                    <double*>data_of(sum_dy), <double*>data_of(sum_dy_xmu), num_threads)


def grad_affine(
    cnp.ndarray grad_y not None,  # IN   (outer, channels, inner)
    cnp.ndarray x not None,      # IN   (outer, channels, inner)
    cnp.ndarray coefs not None,  # IN   (3, channels): center, scale, offset
    cnp.ndarray linear not None,  # IN   (4, channels): factor, slope, shift, rest
    bint relu,
    cnp.ndarray out not None,    # OUT  (outer, channels, inner)
    int num_threads,
):
    if is_float(x):
        launch_grad_affine[float](<float*>data_of(grad_y), stride_of(grad_y), <float*>data_of(x), stride_of(x),
                                  plan_of(x), <float*>data_of(coefs), <float*>data_of(linear), relu,
                                  <float*>data_of(out), stride_of(out), num_threads)
    else:
        launch_grad_affine[double](<double*>data_of(grad_y), stride_of(grad_y), <double*>data_of(x), stride_of(x),
                                   plan_of(x), <double*>data_of(coefs), <double*>data_of(linear), relu,
                                   <double*>data_of(out), stride_of(out), num_threads)


def batch_norm_backward(
    cnp.ndarray grad_y not None,  # IN   (outer, channels, inner)
    cnp.ndarray x not None,      # IN   (outer, channels, inner)
    cnp.ndarray stats not None,  # IN   (3, channels) float64: mean, var, invstd
    cnp.ndarray coefs not None,  # IN   (3, channels): center, scale, offset
    bint relu,
    bint training,               # IN   False: the statistics were constants
    cnp.ndarray out not None,    # OUT  (outer, channels, inner): grad_x
    cnp.ndarray grads not None,  # OUT  (2, channels): grad_gamma, grad_beta
    int num_threads,
):
    if is_float(x):
        launch_batch_norm_backward[float](
            <float*>data_of(grad_y), stride_of(grad_y), <float*>data_of(x), stride_of(x), plan_of(x),
            <double*>data_of(stats), <float*>data_of(coefs), relu, training,
            <float*>data_of(grads), <float*>data_of(out), stride_of(out), num_threads)
    else:
        launch_batch_norm_backward[double](
            <double*>data_of(grad_y), stride_of(grad_y), <double*>data_of(x), stride_of(x), plan_of(x),
            <double*>data_of(stats), <double*>data_of(coefs), relu, training,
            <double*>data_of(grads), <double*>data_of(out), stride_of(out), num_threads)


# ---------------------------------------------------------------------------------------------------------------------
# Whole calls, checks and all, for plain arguments: C-contiguous native arrays of one dtype. At 64 x 128 the general way
# through functional.py and _layout.py costs 27 us, the kernel 6 us. They answer None, with nothing done, to whatever
# they do not know; the general way takes it, and raises the errors. New outputs of `pooled` bytes and more come from
# `empty`, smaller ones are made here.
# ---------------------------------------------------------------------------------------------------------------------

cdef inline bint is_plain(x) noexcept:
    return (cnp.PyArray_CheckExact(x) and cnp.PyArray_ISCARRAY_RO(<cnp.ndarray>x)
            and (cnp.PyArray_TYPE(<cnp.ndarray>x) == cnp.NPY_FLOAT32
                 or cnp.PyArray_TYPE(<cnp.ndarray>x) == cnp.NPY_FLOAT64))


cdef inline bint is_plain_like(y, cnp.ndarray x) noexcept:
    return (is_plain(y) and cnp.PyArray_TYPE(<cnp.ndarray>y) == cnp.PyArray_TYPE(x)
            and cnp.PyArray_SAMESHAPE(<cnp.ndarray>y, x))


cdef inline bint is_plain_vector(values, Py_ssize_t channels, int typenum) noexcept:
    return values is None or (
        is_plain(values) and cnp.PyArray_TYPE(<cnp.ndarray>values) == typenum
        and cnp.PyArray_NDIM(<cnp.ndarray>values) == 1 and cnp.PyArray_DIM(<cnp.ndarray>values, 0) == channels)


cdef inline bint is_apart(cnp.ndarray a, cnp.ndarray b) noexcept:
    """Two contiguous arrays share no memory."""
    cdef char* start_a = <char*>cnp.PyArray_DATA(a)
    cdef char* start_b = <char*>cnp.PyArray_DATA(b)
    return start_a + cnp.PyArray_NBYTES(a) <= start_b or start_b + cnp.PyArray_NBYTES(b) <= start_a


cdef inline bint is_plain_output(out, cnp.ndarray source) noexcept:
    """out is None, source itself, or a plain array apart from it."""
    return out is None or (
        is_plain_like(out, source) and cnp.PyArray_ISWRITEABLE(<cnp.ndarray>out)
        and (cnp.PyArray_DATA(<cnp.ndarray>out) == cnp.PyArray_DATA(source) or is_apart(<cnp.ndarray>out, source)))


cdef Plan plain_plan(cnp.ndarray x, axis):
    """The plan, with channels = 0 where x is empty or the axis is not a plain one."""
    cdef Py_ssize_t outer = 1, inner = 1
    cdef int i, at, ndim = cnp.PyArray_NDIM(x)
    cdef Plan plan
    plan.channels = 0
    if type(axis) is not int or ndim < 2 or cnp.PyArray_SIZE(x) == 0 or not -ndim <= axis < ndim:
        return plan
    at = axis % ndim
    for i in range(at):
        outer *= cnp.PyArray_DIM(x, i)
    for i in range(at + 1, ndim):
        inner *= cnp.PyArray_DIM(x, i)
    return make_plan(outer, cnp.PyArray_DIM(x, at), inner)


cdef inline cnp.ndarray new_like(cnp.ndarray x, Py_ssize_t pooled, empty):
    if cnp.PyArray_NBYTES(x) >= pooled:
        return empty((<object>x).shape, (<object>x).dtype)
    return cnp.PyArray_EMPTY(cnp.PyArray_NDIM(x), cnp.PyArray_DIMS(x), cnp.PyArray_TYPE(x), 0)


cdef inline cnp.ndarray new_rows(Py_ssize_t rows, Py_ssize_t channels, int typenum):
    cdef cnp.npy_intp[2] shape
    shape[0], shape[1] = rows, channels
    return cnp.PyArray_EMPTY(2, shape, typenum, 0)


cdef inline bint copy_statistics(values, Py_ssize_t channels, double* target) noexcept:
    """float32 or float64 values into target; False where they are neither."""
    cdef Py_ssize_t c
    if values is None:
        return False
    if is_plain_vector(values, channels, cnp.NPY_FLOAT64):
        memcpy(target, data_of(values), channels * sizeof(double))
        return True
    if is_plain_vector(values, channels, cnp.NPY_FLOAT32):
        for c in range(channels):
            target[c] = (<float*>data_of(values))[c]
        return True
    return False


def whole_batch_norm(
    x, gamma, beta, axis, eps, activation, out, int num_threads,
    Py_ssize_t pooled, empty,
):
    """(y, count, whether in place, stats, coefs), or None."""
    cdef cnp.ndarray y, stats, coefs
    cdef Plan plan
    cdef int typenum
    if not is_plain(x) or type(eps) is not float or not (activation is None or activation == "relu"):
        return None
    plan = plain_plan(x, axis)
    typenum = cnp.PyArray_TYPE(<cnp.ndarray>x)
    if not (plan.channels and plan.outer * plan.inner > 1 and 0 <= <double>eps < INFINITY
            and is_plain_vector(gamma, plan.channels, typenum) and is_plain_vector(beta, plan.channels, typenum)
            and is_plain_output(out, x)):
        return None
    y = new_like(x, pooled, empty) if out is None else out
    stats = new_rows(3, plan.channels, cnp.NPY_FLOAT64)
    coefs = new_rows(3, plan.channels, typenum)
    if typenum == cnp.NPY_FLOAT32:
        launch_batch_norm[float](
            <float*>data_of(x), plan.channels * plan.inner, plan, <float*>data_of(gamma), <float*>data_of(beta), eps,
            activation is not None, <double*>data_of(stats), <float*>data_of(coefs),
            <float*>data_of(y), plan.channels * plan.inner, num_threads)
    else:
        launch_batch_norm[double](
            <double*>data_of(x), plan.channels * plan.inner, plan, <double*>data_of(gamma), <double*>data_of(beta), eps,
            activation is not None, <double*>data_of(stats), <double*>data_of(coefs),
            <double*>data_of(y), plan.channels * plan.inner, num_threads)
    return y, plan.outer * plan.inner, data_of(y) == data_of(x), stats, coefs


def whole_batch_norm_inference(
    x, mean, var, gamma, beta, axis, eps, activation, out, int num_threads,
    Py_ssize_t pooled, empty,
):
    """(y, count, whether in place, stats, coefs), or None."""
    cdef cnp.ndarray y, stats, coefs
    cdef Plan plan
    cdef Py_ssize_t c
    cdef double* statistics
    cdef int typenum
    if not is_plain(x) or type(eps) is not float or not (activation is None or activation == "relu"):
        return None
    plan = plain_plan(x, axis)
    typenum = cnp.PyArray_TYPE(<cnp.ndarray>x)
    if not (plan.channels and 0 <= <double>eps < INFINITY
            and is_plain_vector(gamma, plan.channels, typenum) and is_plain_vector(beta, plan.channels, typenum)
            and is_plain_output(out, x)):
        return None
    stats = new_rows(3, plan.channels, cnp.NPY_FLOAT64)
    statistics = <double*>data_of(stats)
    if not (copy_statistics(mean, plan.channels, statistics)
            and copy_statistics(var, plan.channels, statistics + plan.channels)):
        return None
    for c in range(plan.channels):
        if statistics[plan.channels + c] < 0:
            return None
    y = new_like(x, pooled, empty) if out is None else out
    coefs = new_rows(3, plan.channels, typenum)
    if typenum == cnp.NPY_FLOAT32:
        launch_inference[float](
            <float*>data_of(x), plan.channels * plan.inner, plan, statistics, statistics + plan.channels,
            <float*>data_of(gamma), <float*>data_of(beta), eps, activation is not None, statistics,
            <float*>data_of(coefs), <float*>data_of(y), plan.channels * plan.inner, num_threads)
    else:
        launch_inference[double](
            <double*>data_of(x), plan.channels * plan.inner, plan, statistics, statistics + plan.channels,
            <double*>data_of(gamma), <double*>data_of(beta), eps, activation is not None, statistics,
            <double*>data_of(coefs), <double*>data_of(y), plan.channels * plan.inner, num_threads)
    return y, plan.outer * plan.inner, data_of(y) == data_of(x), stats, coefs


def whole_batch_norm_backward(
    grad_y, x, axis, cnp.ndarray stats, cnp.ndarray coefs, bint relu, bint training, out, int num_threads,
    Py_ssize_t pooled, empty,
):
    """(grad_x, grads), or None."""
    cdef cnp.ndarray grad_x, grads
    cdef Plan plan
    cdef int typenum
    if not (is_plain(x) and is_plain_like(grad_y, x) and is_plain_output(out, grad_y)
            and (out is None or is_apart(out, x))):
        return None
    plan = plain_plan(x, axis)
    if not plan.channels or training and plan.outer * plan.inner == 2:  # functional.py has a formula for two values
        return None
    typenum = cnp.PyArray_TYPE(<cnp.ndarray>x)
    grad_x = new_like(x, pooled, empty) if out is None else out
    grads = new_rows(2, plan.channels, typenum)
    if typenum == cnp.NPY_FLOAT32:
        launch_batch_norm_backward[float](
            <float*>data_of(grad_y), plan.channels * plan.inner, <float*>data_of(x), plan.channels * plan.inner, plan,
            <double*>data_of(stats), <float*>data_of(coefs), relu, training, <float*>data_of(grads),
            <float*>data_of(grad_x), plan.channels * plan.inner, num_threads)
    else:
        launch_batch_norm_backward[double](
            <double*>data_of(grad_y), plan.channels * plan.inner, <double*>data_of(x), plan.channels * plan.inner, plan,
            <double*>data_of(stats), <double*>data_of(coefs), relu, training, <double*>data_of(grads),
            <double*>data_of(grad_x), plan.channels * plan.inner, num_threads)
    return grad_x, grads
