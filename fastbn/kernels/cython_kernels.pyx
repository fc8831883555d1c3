# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The compiled kernels. kernels/__init__.py holds the contract; numba_kernels.py is this file's twin.

One source, compiled once per instruction set: _cython_baseline.pyx, _cython_avx2.pyx and _cython_avx512.pyx each
include it and cython_calls.pyx. Read it downwards: the plan (how the data is cut), then for each kernel its strip (the
hot loop, of literal size), its rows and runs, its task (one tile of one chunk); and the workers (what one thread does).
`inline` means always here (setup.py sees to it): it is what makes the sizes literal. What is
not inline keeps the compiler from making copy after copy.
"""
from libc.math cimport sqrt
from libc.stdint cimport uintptr_t
from libc.string cimport memcpy, memset

cdef extern from "machine.h" nogil:
    const Py_ssize_t VECTOR_BYTES
    int team_rank()
    int team_size()
    void team_barrier()
    uintptr_t alias_bytes()
    int loads_two()
    int is_zen3_or_4()
    void prefetch(const void* address)
    void prefetch_far(const void* address)
    void prefetch_write(const void* address)
    void load_floats(double* row, const float* x, Py_ssize_t n)
    void load_doubles(double* row, const double* x, Py_ssize_t n)
    double hidden_one()
    double multiply_add(double x, double y, double z)
    double multiply(double x, double y)
    const void* hidden(const void* pointer)
    void stream_line(void* target, const void* source)
    void stream_end()

cdef extern from "quads.h" nogil:
    void sums_strip_quads(
        const float* x, Py_ssize_t stride, Py_ssize_t n_rows, const double* pivot, double* s1, double* s2)
    void grad_sums_strip_quads(
        const float* dy, Py_ssize_t dy_stride, const float* x, Py_ssize_t x_stride, Py_ssize_t n_rows,
        const double* mean, double* s1, double* s2)
    void sums_run_quads(const float* x, Py_ssize_t length, const double* pivot, double* s1, double* s2)
    void grad_sums_run_quads(
        const float* dy, const float* x, Py_ssize_t length, const double* mean, double* s1, double* s2)
    void sums_held_quads(
        const float* x, Py_ssize_t stride, Py_ssize_t n_rows, const double* pivot, double* s1, double* s2)
    void grad_sums_held_quads(
        const float* dy, Py_ssize_t dy_stride, const float* x, Py_ssize_t x_stride, Py_ssize_t n_rows,
        const double* mean, double* s1, double* s2)

ctypedef fused floating:
    float
    double

cdef enum:
    ROWS = 8              # wide rows a step: accumulators are loaded and stored once for eight rows
    MANY_ROWS = 4 * ROWS  # rows a thread from which on the elementwise passes of columns are divided by rows
    GRAD_ROWS = 4         # and a step of two arrays, whose rows share the few places of a set of L1: eight of each took
    # the sums of 256x512 5 % longer, of 4096x1024 twice as long (rows 4 KiB apart), of float64 1.5 times.
    STRIP = 16            # columns a step: a constant, so that the compiler unrolls and vectorises the strip
    TILE = 512            # columns whose accumulators a task keeps on its stack (12 KiB of L1)
    HELD = 64             # narrow rows that make up so many columns are summed with the accumulators in registers,
    # AVX-512's 32 (16384x64: moments 0.9 of the time, sums of the backward 0.83; float64 both 0.65), or, of floats, by
    # AVX2 a STRIP after the other (Zen 3, 16384x64: 0.77 and 0.77, every other row of 500000x64 0.8 and 0.6) ...
    HELD_ROWS = 64        # ... for so many wide rows, as many as the buffers for rows apart hold
    HELD_BYTES = 2048     # and so are, so many columns at a time, near rows of a multiple of HELD columns and up to so
    # many bytes (512x256: moments 0.95 of the time, 500x192 0.9, sums of its backward 0.85; longer ones up to 1.3)
    LANES = STRIP         # accumulators a channel where the inner axis is swept: one strip
    QUADS_INNER = 24 * LANES  # of shorter runs, the moments are not summed by quads (14x14 in L3: 1.01 to 1.05 times
    # the time, 8x8 1.1 to 1.17; in L2 0.95 to 1)
    SHORT_INNER = 64      # inner axes shorter than this are swept as columns (64x512x7x7: moments half the time,
    # forward and backward 0.7), of few rows only those half as short (2x512x7x7: 1.5 times the time)
    FEW_ROWS = 16
    INNER_TILE = 8        # channels a tile where the inner axis is swept, at most
    INNER_TILE_SIZE = 1 << 17  # and elements a tile, so that it stays in the cache (32x64x56x56 backward: 9 %)
    BLOCK_ROWS = 128      # wide rows a block; a block has one pivot
    BLOCK_INNER = 16384   # inner elements a channel a block (of 8192: moments of 32x64x56x56 1.07 times the time)
    PIVOT_SHARE = 32      # the pivot is the mean of a block's first values, one in so many
    COLUMNS_AHEAD = 128   # columns that the sums fetch ahead (of two arrays half as many); of the rows further down,
    # which they fetched before, those 4 KiB apart were too many for a set of L1: the backward took 10 to 20 % longer.
    ROWS_AHEAD = 2 * ROWS  # wide rows that they fetch ahead into L2. From memory, 65536x256 on Zen 4 and two threads:
    # without fetching, moments 1.64 times the time, the sums of the backward 1.55; in L2, with it, 1 to 10 % longer.
    AHEAD = 512           # elements that runs and the elementwise passes fetch ahead: 10 to 25 % from 4 MB up;
    # but see fetches_ahead and what_to_fetch
    FAR_AHEAD = 2048      # and of two inputs, or of runs to sum, that will not be in a cache, into L2 instead: of the
    # time, on Zen 4 and two threads, grad_affine of 4096x1024 took 0.7, moments of 32x64x56x56 as much.
    MOMENTS = 3           # a channel: mean, rest, m2
    SUMS = 2              # in the backward: sum_dy, sum_dy_xc
    COEFFICIENTS = 3      # of the affine pass: center, scale, offset
    LINEAR = 4            # of the backward's: factor, slope, shift, rest
    OWN_ROWS = 2 * SUMS + LINEAR + 2  # what each of two threads keeps for itself, at most: in the backward
    MAX_CHUNKS = 64       # partial results a channel, at most; so also the threads that can share a column
    SERIAL_BYTES = 65536  # a thread's fair share: below it, waking the thread costs more than it saves
    NARROW = 32           # rows apart of fewer columns are first copied together (20 columns: 20 % less time)
    FIRST_BYTES = 1 << 15  # of an array that lies in the first cache
    NEAR_BYTES = 1 << 20  # smaller arrays stay in the second caches: what the elementwise passes fetched ahead there,
    # not least lines that the next thread writes, took them 5 to 30 % longer (4x128x14x14, 32x4096)
    FAR_BYTES = 20 << 20  # inputs from here on are fetched from further ahead: they will not be in a cache (from 16 MiB
    # on, Zen 5 with 32 MiB of L3: moments of 4096x1024 1.15 times the time, sums of the backward of 4096x512 1.5)
    VAST_BYTES = 96 << 20  # and from here on hardly any of them will be; see what_to_fetch
    RUN_BYTES = 24 << 10  # of a channel, from which on its run may be a sweep
    STREAM_BYTES = 20 << 20  # of inputs and output together: from here on the output bypasses the caches. On Zen 4,
    # 32 MiB of L3: 64x64x28x28 forward and backward 0.6 of the time, 4096x512 backward 0.7; 2000x1000 forward 1.1.
    LINE = 64             # bytes of a cache line; a strip is one, or two of float64
    EDGE_LINES = 8        # lines behind the end of a thread's rows that its processor fetches ahead (32x4096: with 1,
    # 2, 4, 8, 32 claimed, the affine pass of the next thread's first tile took 6.4, 6.3, 6.0, 4.3, 3.6 us)
    # A tile's sums lie in one array, so far apart that a sum just stored and what is loaded next are not in the same
    # place of two pages: 4 KiB apart, the sums of the backward took up to 1.4 times as long, by where the stack was.
    SUMS_PITCH = TILE + 128
    WIDE = 2048           # columns whose coefficients a task of the elementwise passes keeps on its stack: in tasks of
    # TILE columns 4096x1024 took 1.25 times as long, 32768x1024 1.3 to 1.5 times (Sapphire Rapids, two threads)
    # Where they lie in its one array, so that a strip takes one pointer for all of them. Behind those of a wide row lie
    # those of the next one's first strip, so that a strip may run over the end of a row.
    PITCH = WIDE + STRIP
    CENTER = 0              # y = (x - center) * scale + offset
    SCALE = PITCH
    OFFSET = 2 * PITCH
    FACTOR = 3 * PITCH      # grad_x = factor * (((dy - shift) - rest) - (x - center) * slope)
    SLOPE = 4 * PITCH
    SHIFT = 5 * PITCH
    REST = 6 * PITCH

cdef enum:                 # what the sums fetch ahead, a literal wherever it is tested:
    NOTHING
    NEAR                   # what is in a cache, into L1
    FAR                    # what is not, into L2
    QUADS                  # as NEAR, but of a channel's run nothing; and they add in vectors of AVX2: see quads.h


# ---------------------------------------------------------------------------------------------------------------------
# The plan: blocks of rows (or of inner elements) make a chunk, a chunk has one partial result a channel, channels come
# in tiles; a task is one tile of one chunk. All of it follows from shape and dtype, but for where tiles of columns
# begin, which no result depends on. Where threads divide columns, each takes whole strips, so the bits never depend on
# the threads.
# ---------------------------------------------------------------------------------------------------------------------

cdef struct Plan:
    Py_ssize_t outer
    Py_ssize_t channels
    Py_ssize_t inner
    bint by_inner          # sweep along the inner axis instead of across the columns
    Py_ssize_t repeat      # accumulators side by side that belong to one channel
    Py_ssize_t fold        # rows laid side by side to make a wide row (narrow data)
    Py_ssize_t sums_fold   # and for the sums
    bint held              # whether those are taken HELD columns at a time, with the accumulators in registers
    Py_ssize_t tile        # channels a tile
    Py_ssize_t n_tiles
    Py_ssize_t early       # channels that a thread's own tiles begin before that, with a line: see begin_with_lines
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


cdef struct Band:          # what one thread does of an elementwise pass
    Py_ssize_t c0          # of the channels from here
    Py_ssize_t c1          # up to here
    Py_ssize_t tile        # so many a task
    Py_ssize_t n_tiles
    Py_ssize_t first       # of the tasks, tile by tile and chunk by chunk, from here
    Py_ssize_t last        # up to here
    Py_ssize_t row         # the rows from here
    Py_ssize_t end         # up to here


cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef inline bint is_near(const Plan* plan, Py_ssize_t itemsize) noexcept nogil:
    """Whether an array of so many bytes an element is in the second caches."""
    return plan.outer * plan.channels * plan.inner * itemsize < NEAR_BYTES


cdef inline bint is_avx2_float(Py_ssize_t itemsize) noexcept nogil:
    """Whether the sums are of floats, in vectors of AVX2, of which 16 registers hold STRIP columns."""
    return VECTOR_BYTES == LINE // 2 and itemsize == sizeof(float)


cdef Plan make_plan(
    Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner,
    Py_ssize_t itemsize,       # IN   bytes of an element
    Py_ssize_t n_arrays,       # IN   that the sums read
) noexcept nogil:
    cdef Py_ssize_t width = channels * inner, n_bytes = n_arrays * itemsize
    cdef Plan plan
    plan.outer, plan.channels, plan.inner = outer, channels, inner
    plan.by_inner = inner >= (SHORT_INNER // 2 if outer < FEW_ROWS else SHORT_INNER)
    plan.repeat = LANES if plan.by_inner else inner
    plan.tile = INNER_TILE if plan.by_inner else TILE // plan.repeat
    # Halved until it fits: then tiles divide evenly among threads (128x64x14x14: the forward took a third longer).
    while plan.by_inner and plan.tile > 1 and plan.tile * outer * inner > INNER_TILE_SIZE:
        plan.tile //= 2
    plan.n_tiles = ceil_div(channels, plan.tile)
    plan.tile = ceil_div(channels, plan.n_tiles)
    if not plan.by_inner and plan.n_tiles > 1:
        plan.tile = min(ceil_div(plan.tile, STRIP) * STRIP, TILE // plan.repeat)
    plan.n_tiles = ceil_div(channels, plan.tile)
    plan.early = 0
    plan.fold = 1
    if plan.by_inner:
        plan.block_inner = min(inner, BLOCK_INNER)
        plan.block_outer = max(1, BLOCK_INNER // inner)
    else:
        while plan.n_tiles == 1 and 2 * plan.fold * width <= TILE and plan.fold * BLOCK_ROWS <= outer:
            plan.fold *= 2
        plan.block_inner = inner
        plan.block_outer = plan.fold * BLOCK_ROWS
    plan.sums_fold = plan.fold
    plan.held = False
    if (VECTOR_BYTES == LINE or is_avx2_float(itemsize)) and not plan.by_inner and plan.fold * width >= HELD:
        if HELD % width == 0:
            plan.sums_fold = HELD // width
            plan.held = True
        elif VECTOR_BYTES == LINE and width % HELD == 0 and width * n_bytes <= HELD_BYTES and is_near(&plan, n_bytes):
            plan.sums_fold = 1
            plan.held = True
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


cdef inline Block block_within(const Plan* plan, Py_ssize_t index, const Band* band) noexcept nogil:
    """Of the block those rows that are in the band, perhaps none."""
    cdef Block block = block_at(plan, index)
    cdef Py_ssize_t end = min(block.row + block.n_rows, band.end)
    block.row = max(block.row, band.row)
    block.n_rows = max(0, end - block.row)
    return block


cdef inline bint has_own_tiles(const Plan* plan, int team) noexcept nogil:
    """Whether each thread takes whole tiles, from the sums to the last value."""
    cdef bint even = plan.n_tiles % team == 0 or plan.n_tiles >= 8 * team
    return even and (plan.by_inner or (plan.n_chunks == 1 and plan.n_tiles >= 2 * team))


cdef inline bint share_rows(const Plan* plan) noexcept nogil:
    """Whether threads read from each other what is kept a channel, in the rows of partial results and coefficients."""
    return team_size() > 1 and not has_own_tiles(plan, team_size())


cdef inline Py_ssize_t n_column_parts(const Plan* plan) noexcept nogil:
    """Among how many threads the columns can be divided for the sums: each takes HELD of them or more, and then rows
    enough of the elementwise pass (float64 32x512, by columns that begin within a line: 1.2 to 1.5 times the time)."""
    return min(plan.channels // HELD, plan.outer // MANY_ROWS) if plan.repeat == plan.sums_fold == 1 else 0


cdef inline bint divides_columns(const Plan* plan, Py_ssize_t team) noexcept nogil:
    """Whether so many threads would be idle for a third as long as they work, or more, if they shared the tasks of the
    sums. Of two threads, forward and backward of 128x512, one task, took 0.8 and 0.7 of the time by columns, the
    forward of 384x512, three, 0.9. Of 640x512, five, the backward would take 1.2 times: columns are shorter runs."""
    cdef Py_ssize_t n_tasks = plan.n_chunks * plan.n_tiles
    return n_column_parts(plan) >= team > 1 and 3 * ceil_div(n_tasks, team) * team >= 4 * n_tasks


cdef inline int team_wanted(const Plan* plan, Py_ssize_t itemsize, int num_threads) noexcept nogil:
    """How many of num_threads are worth waking: each must have something to do, and its fair share of bytes."""
    cdef Py_ssize_t fair = plan.outer * plan.channels * plan.inner * itemsize // SERIAL_BYTES
    cdef Py_ssize_t most = max(1, min(<Py_ssize_t>num_threads, fair)), by_columns = min(most, n_column_parts(plan))
    return <int>(by_columns if divides_columns(plan, by_columns) else min(most, plan.n_chunks * plan.n_tiles))


# ---------------------------------------------------------------------------------------------------------------------
# Wide rows: n_rows rows of `width` columns are laid side by side to make rows of fold * width columns.
# ---------------------------------------------------------------------------------------------------------------------

cdef inline void spread(
    const floating* row, Py_ssize_t channels, Py_ssize_t repeat, Py_ssize_t fold, floating* wide,
) noexcept nogil:
    """wide[(f * channels + c) * repeat + i] = row[c] for each f and i; where there is one of each, wide may be row."""
    cdef Py_ssize_t c, i, width = channels * repeat
    if repeat == 1 and wide != row:
        memcpy(wide, row, channels * sizeof(floating))
    elif repeat > 1:
        for c in range(channels):
            for i in range(repeat):
                wide[c * repeat + i] = row[c]
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


cdef inline Py_ssize_t before_line(const floating* y) noexcept nogil:
    """How many elements lie before the first whole cache line."""
    return <Py_ssize_t>(-<uintptr_t>y % LINE // sizeof(floating))


cdef inline floating* first_line(floating* memory) noexcept nogil:
    """Where to put what is read in vectors: a task's stack begins anywhere in a line (moments: 2 to 10 % longer)."""
    return memory + before_line(memory)


cdef inline Py_ssize_t step_rows(const Plan* plan) noexcept nogil:
    """How many rows that lie apart are summed at a time."""
    return (HELD_ROWS if plan.held else ROWS) * plan.sums_fold


cdef inline Py_ssize_t lead(Py_ssize_t stride, Py_ssize_t width, bint far) noexcept nogil:
    """How many elements ahead to fetch, which are whole rows where short rows lie apart. Beyond their ends lies what
    other tasks want (128x64x14x14: the affine pass took twice as long)."""
    cdef Py_ssize_t ahead = FAR_AHEAD if far else AHEAD
    return ahead if stride == width or width >= 4 * ahead else stride * max(1, ahead // width)


cdef inline void prefetch_strip(const floating* x, bint far) noexcept nogil:
    """A strip of float64 is two lines: with one of them, the elementwise passes took 15 to 30 % longer."""
    cdef Py_ssize_t i
    for i in range(STRIP * <Py_ssize_t>sizeof(floating) // LINE):
        if far:
            prefetch_far(<const char*>x + i * LINE)
        else:
            prefetch(<const char*>x + i * LINE)


cdef inline int near_or_quads(const Plan* plan, Py_ssize_t itemsize) noexcept nogil:
    """How the sums read what is in a cache, float32 by quads (HELD columns: see held_by_quads). Zen 4, AVX-512, two
    threads: moments of 512x512 and 500x77 0.88 of the time, 4096x256 0.92, 8x64x56x56 0.86; sums of the backward of
    256x512 0.85 to 0.9, 500x77 0.82, 4096x256 0.93, 32x256x14x14 0.9 to 0.94, 8x64x56x56 0.73. Zen 3, AVX2: moments of
    8x64x56x56 0.8 to 0.9, sums of the backward 0.77, of 32x256x14x14 0.88; but wide rows 1.02 to 1.05. Those are not
    fetched there: it took moments 1.05 to 1.15 times as long, the sums of the backward 1.05."""
    if is_avx2_float(itemsize):
        return QUADS if plan.by_inner else NOTHING if is_zen3_or_4() else NEAR
    return QUADS if VECTOR_BYTES == LINE and itemsize == sizeof(float) and is_zen3_or_4() else NEAR


cdef int what_to_fetch(
    const Plan* plan, Py_ssize_t itemsize, Py_ssize_t n_arrays,
    bint in_line,              # IN   whether rows lie one behind the other
) noexcept nogil:
    """Of the arrays that the sums read. A Zen 3 or 4 itself finds what is read in one sweep, of float32 only vast ones.
    There, without fetching, moments and sums of the backward of 1000000x64 took 0.93 and 0.96 of the time, of
    1x64x1000000 0.94 and 0.75 to 0.92, the latter of 32x64x112x112 0.86 (64x64x56x56, with shorter runs, 1.4); of
    float64 8192x64 0.94 and 0.84, 512x512 0.95 and 0.9, 8x64x56x56 0.92 and 0.88, 500000x64 0.9 and 0.96."""
    cdef Py_ssize_t n_bytes = n_arrays * itemsize * plan.outer * plan.channels * plan.inner
    cdef bint far = n_bytes >= FAR_BYTES
    cdef bint sweep = in_line and (plan.held or not far)
    if plan.by_inner:  # moments of float32, read in less time, take longer runs (32x64x112x112 1.12)
        sweep = plan.inner * itemsize >= (RUN_BYTES if n_arrays == 2 or itemsize == sizeof(double) else 8 * RUN_BYTES)
        sweep = sweep and not (n_arrays == 1 and is_avx2_float(itemsize))  # Zen 3, 1000000x64 in Fortran order: 1.06
    if sweep and is_zen3_or_4() and (itemsize == sizeof(double) or n_bytes >= VAST_BYTES):
        return NOTHING
    # So it does rows of HELD columns that lie apart, once they and what lies between them are too many for a cache.
    # Every other row, two threads and one, without fetching: moments of 500000x64 0.64 to 0.7 of the time, 100000x64
    # 0.77, sums of the backward of both 0.7 to 0.9, of 62500x64 0.75; float64 300000x64 1.3, wider rows 1.05 to 2.
    if plan.held and not in_line and itemsize == sizeof(float) and 2 * n_bytes >= FAR_BYTES and is_zen3_or_4():
        return NOTHING
    if plan.by_inner and n_arrays == 1 and plan.inner < QUADS_INNER:
        return FAR if far else NEAR
    # Of what another's data may have driven out, a Zen 3 finds too little (16 MB of 20, 77, 256 and 1000 columns on one
    # thread, not fetched: moments 1.2 to 1.5 times as long, sums of the backward 1.2 to 1.35; on two 0.98 to 1.2, 1).
    if is_avx2_float(itemsize) and not plan.by_inner and not far and 2 * n_bytes >= FAR_BYTES:
        return NEAR
    return FAR if far else near_or_quads(plan, itemsize)


cdef inline void prefetch_row(
    const floating* x, Py_ssize_t stride, Py_ssize_t n_columns, int fetch,
) noexcept nogil:
    """Of rows of HELD columns: these columns of rows further on, into L1 (from L3, 62500x64: moments 0.9 of the time,
    sums of the backward 0.95; of every other row 0.85 and 0.9), of far ones into L2 too, from as far as of wide rows
    (300000x64, of 8 instead of 128 rows: 5 % longer)."""
    cdef Py_ssize_t j
    for j in range(n_columns // STRIP if fetch else 0):
        prefetch_strip(x + AHEAD // HELD * stride + j * STRIP, False)
        if fetch == FAR:
            prefetch_strip(x + ROWS_AHEAD * TILE // HELD * stride + j * STRIP, True)


cdef inline void prefetch_strip_write(const floating* y) noexcept nogil:
    prefetch_write(y)
    if floating is double:
        prefetch_write(y + STRIP // 2)


cdef inline const floating* gather(
    const floating* x, Py_ssize_t stride, Py_ssize_t n_rows, Py_ssize_t width, floating* buffer,
) noexcept nogil:
    """The rows one behind the other: x itself where they lie so already, else a copy in buffer."""
    cdef Py_ssize_t r, j
    if stride == width or n_rows == 1:
        return x
    for r in range(n_rows):
        for j in range(ceil_div(width, STRIP)):
            prefetch_strip(x + (r + n_rows) * stride + j * STRIP, False)
        memcpy(buffer + r * width, x + r * stride, width * sizeof(floating))
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

cdef inline void load_row(const floating* x, Py_ssize_t n_columns, double* row) noexcept nogil:
    """A row of a strip, in float64; it stays in registers."""
    if floating is float:
        load_floats(row, x, n_columns)
    else:
        load_doubles(row, x, n_columns)


cdef inline void sums_strip(
    const floating* x,         # IN   (n_rows, n_columns), rows `stride` apart
    Py_ssize_t stride,
    Py_ssize_t n_rows,
    Py_ssize_t n_columns,
    int fetch,
    const double* pivot,       # IN   (n_columns,)
    double* s1,                # INOUT
    double* s2,                # INOUT
) noexcept nogil:
    # Into arrays of their own: float64 data could be s1 or s2 for all the compiler knows, and took twice as long.
    cdef double strip1[HELD]
    cdef double strip2[HELD]
    cdef double row[HELD]
    cdef Py_ssize_t r, j
    cdef double d, one = 1
    if floating is float:  # then the conversions keep the adders busy (Zen 4: 256x512 and images 4 % less time)
        one = hidden_one()
    load_row(x, n_columns, row)
    for j in range(n_columns):
        d = row[j] - pivot[j]
        strip1[j] = d
        strip2[j] = multiply(d, d)  # from zeros, 5 % longer in L2
    # Row by row, so that a row is converted just before its use (256x512: column by column took 3 to 22 % longer).
    for r in range(1, n_rows):
        prefetch_row(x + r * stride, stride, n_columns, fetch)
        load_row(x + r * stride, n_columns, row)
        for j in range(n_columns):
            d = row[j] - pivot[j]
            strip1[j] += d * one
            strip2[j] = multiply_add(d, d, strip2[j])
    for j in range(n_columns):
        s1[j] += strip1[j]
    for j in range(n_columns):
        s2[j] += strip2[j]


cdef inline const floating* coming(
    const floating* x, Py_ssize_t stride, Py_ssize_t n_rows, Py_ssize_t width, Py_ssize_t j, Py_ssize_t ahead,
) noexcept nogil:
    """What lies `ahead` columns behind column j of these rows: there, or in the next n_rows rows."""
    cdef Py_ssize_t k = j + min(width, ahead)
    if stride == LANES:  # a channel's run; the next rows would be too near (32x64x56x56: moments 9 %)
        return x + j + ahead
    return x + k if k < width else x + n_rows * stride + k - width


cdef inline void prefetch_rows(
    const floating* x, Py_ssize_t stride, Py_ssize_t n_rows, Py_ssize_t width, Py_ssize_t j, Py_ssize_t ahead,
    int fetch,
) noexcept nogil:
    """A strip of each row of what is coming. Takes a 268 MB array from 12 to 20 GB/s on two threads."""
    cdef const floating* strip
    cdef Py_ssize_t r
    if fetch == NOTHING:
        return
    strip = <const floating*>hidden(coming(x, stride, n_rows, width, j, ahead))
    for r in range(n_rows):
        if stride == LANES:
            prefetch_strip(strip + r * stride, fetch == FAR)
        else:  # with both lines of float64, the sums of columns took 5 to 10 % longer in L2
            prefetch(strip + r * stride)
    if fetch == FAR and stride != LANES:
        for r in range(ROWS_AHEAD, ROWS_AHEAD + n_rows):
            prefetch_strip(x + j + r * stride, True)


cdef inline void sums_group(
    const floating* x, Py_ssize_t stride, Py_ssize_t n_rows, Py_ssize_t width, Py_ssize_t ahead, int fetch,
    const double* pivot, double* s1, double* s2,
) noexcept nogil:
    cdef Py_ssize_t j = 0, r
    while j + STRIP <= width:
        prefetch_rows(x, stride, n_rows, width, j, ahead, fetch)
        # And of a run, what the next step reads, from L2 into L1: moments of 1x64x1000000 0.82 to 0.98 of the time, of
        # 64x64x56x56 0.9. The sums of the backward of 128x256x14x14 would take 1.15 times as long, float64 1.03.
        if floating is float and fetch == FAR and stride == LANES:
            for r in range(n_rows, 2 * n_rows):
                prefetch(x + r * LANES)
        if floating is float and fetch == QUADS:
            sums_strip_quads(<const float*>hidden(x + j), stride, n_rows, pivot + j, s1 + j, s2 + j)
        else:
            sums_strip(<const floating*>hidden(x + j), stride, n_rows, STRIP, NOTHING, pivot + j, s1 + j, s2 + j)
        j += STRIP
    if (width - j) & 8:
        sums_strip(x + j, stride, n_rows, 8, NOTHING, pivot + j, s1 + j, s2 + j)
        j += 8
    if (width - j) & 4:
        sums_strip(x + j, stride, n_rows, 4, NOTHING, pivot + j, s1 + j, s2 + j)
        j += 4
    while j < width:
        sums_strip(x + j, stride, n_rows, 1, NOTHING, pivot + j, s1 + j, s2 + j)
        j += 1


cdef inline void sums_rows_as(
    const floating* x, Py_ssize_t stride, Py_ssize_t n_rows, Py_ssize_t width, Py_ssize_t ahead, int fetch,
    const double* pivot, double* s1, double* s2,
) noexcept nogil:
    cdef Py_ssize_t _i
    for _i in range(n_rows // ROWS):
        sums_group(x, stride, ROWS, width, ahead, fetch, pivot, s1, s2)
        x += ROWS * stride
    # The rest in literal sizes, which the compiler unrolls.
    if n_rows & 4:
        sums_group(x, stride, 4, width, ahead, fetch, pivot, s1, s2)
        x += 4 * stride
    if n_rows & 2:
        sums_group(x, stride, 2, width, ahead, fetch, pivot, s1, s2)
        x += 2 * stride
    if n_rows & 1:
        sums_group(x, stride, 1, width, ahead, fetch, pivot, s1, s2)


cdef inline bint held_by_quads(int fetch, Py_ssize_t stride, Py_ssize_t width) noexcept nogil:
    """Whether by quads where HELD columns are taken at a time, too, as AVX2 always does. Zen 4, AVX-512, two threads,
    moments: 16384x64, 62500x64 0.77 of the time, 2048x32 0.75, 256x512 0.82, 512x256 0.83; sums of the backward:
    16384x64 0.87, 2048x32 0.77. Where rows of HELD columns lie apart, it took up to 1.35 times as long, in no cache
    1.3, in the backward 1.5."""
    return VECTOR_BYTES < LINE or (fetch == QUADS and (stride == HELD or width > HELD))


cdef inline void sums_held(
    const floating* x, Py_ssize_t stride, Py_ssize_t n_rows, Py_ssize_t width, int fetch,
    const double* pivot, double* s1, double* s2,
) noexcept nogil:
    cdef Py_ssize_t j = 0, r, n
    while j < width:
        r = 0
        while r < n_rows:
            n = min(HELD_ROWS, n_rows - r)
            if floating is float and fetch == QUADS:
                sums_held_quads(<const float*>x + r * stride + j, stride, n, pivot + j, s1 + j, s2 + j)
            else:
                sums_strip(x + r * stride + j, stride, n, HELD, fetch, pivot + j, s1 + j, s2 + j)
            r += HELD_ROWS
        j += HELD


cdef void sums_rows(
    const floating* x, Py_ssize_t stride, Py_ssize_t n_rows, Py_ssize_t width, bint held, int fetch,
    const double* pivot, double* s1, double* s2,
) noexcept nogil:
    if floating is float and held and held_by_quads(fetch, stride, width):
        sums_held(x, stride, n_rows, width, QUADS, pivot, s1, s2)
    elif held and fetch == FAR:
        sums_held(x, stride, n_rows, width, FAR, pivot, s1, s2)
    elif held and fetch == NOTHING:
        sums_held(x, stride, n_rows, width, NOTHING, pivot, s1, s2)
    elif held:
        sums_held(x, stride, n_rows, width, NEAR, pivot, s1, s2)
    elif fetch == FAR:  # a literal in each branch: tested in each strip, it took float64 3 to 7 % longer
        sums_rows_as(x, stride, n_rows, width, COLUMNS_AHEAD, FAR, pivot, s1, s2)
    elif fetch == NEAR:
        sums_rows_as(x, stride, n_rows, width, COLUMNS_AHEAD, NEAR, pivot, s1, s2)
    elif floating is float and fetch == QUADS:
        sums_rows_as(x, stride, n_rows, width, COLUMNS_AHEAD, QUADS, pivot, s1, s2)
    else:
        sums_rows_as(x, stride, n_rows, width, COLUMNS_AHEAD, NOTHING, pivot, s1, s2)


cdef void sums_run(
    const floating* x, Py_ssize_t length, Py_ssize_t width, bint held, int fetch,
    const double* pivot, double* s1, double* s2,
) noexcept nogil:
    """A contiguous run as rows of `width`, the last of them perhaps shorter."""
    cdef Py_ssize_t n_rows = length // width
    sums_rows(x, width, n_rows, width, held, fetch, pivot, s1, s2)
    if n_rows * width < length:
        sums_rows(x + n_rows * width, width, 1, length - n_rows * width, False, fetch, pivot, s1, s2)


cdef void sums_lanes(
    const floating* x, Py_ssize_t length, Py_ssize_t ahead, int fetch, const double* pivot, double* s1, double* s2,
) noexcept nogil:
    """The same as rows of LANES: by a literal, runs of 196 take half the time; a call for the rest takes a quarter."""
    cdef Py_ssize_t n_rows = length // LANES
    # By strips in quads, 8x64x56x56 and 16x128x28x28 took 1.03 to 1.09 times as long.
    if floating is float and fetch == QUADS:
        sums_run_quads(<const float*>x, length, pivot, s1, s2)
        return
    if fetch == FAR:  # a literal in each branch: tested in each strip, it took 32x256x14x14 10 to 20 % longer
        sums_rows_as(x, LANES, n_rows, LANES, ahead, FAR, pivot, s1, s2)
    elif fetch == NEAR:
        sums_rows_as(x, LANES, n_rows, LANES, ahead, NEAR, pivot, s1, s2)
    else:
        sums_rows_as(x, LANES, n_rows, LANES, ahead, NOTHING, pivot, s1, s2)
    if n_rows * LANES < length:
        sums_group(x + n_rows * LANES, LANES, 1, length - n_rows * LANES, ahead, NOTHING, pivot, s1, s2)


cdef void sums_apart(
    const floating* x, Py_ssize_t stride, Py_ssize_t width, Py_ssize_t fold, int fetch,
    const double* pivot, double* s1, double* s2,
) noexcept nogil:
    """ROWS wide rows, of `fold` rows each that lie apart: summed where they lie."""
    cdef Py_ssize_t f
    for f in range(fold):
        sums_rows(x + f * stride, fold * stride, ROWS, width, False, fetch,
                  pivot + f * width, s1 + f * width, s2 + f * width)


cdef void sums_block(
    const floating* x, Py_ssize_t stride, Py_ssize_t n_rows, Py_ssize_t length, Py_ssize_t channels,
    const Plan* plan, floating* buffer, const double* pivot, double* s1, double* s2,
) noexcept nogil:
    cdef Py_ssize_t i, r, c, n, width = channels * plan.repeat, step = step_rows(plan)
    cdef int fetch = what_to_fetch(plan, sizeof(floating), 1, stride == plan.channels * plan.inner)
    memset(s1, 0, width * plan.sums_fold * sizeof(double))
    memset(s2, 0, width * plan.sums_fold * sizeof(double))
    if plan.by_inner:
        for r in range(n_rows):
            for c in range(channels):
                sums_lanes(x + r * stride + c * plan.inner, length,
                           lead(stride, channels * plan.inner, fetch == FAR), fetch,
                           pivot + c * LANES, s1 + c * LANES, s2 + c * LANES)
    elif plan.sums_fold == 1:
        sums_rows(x, stride, n_rows, width, plan.held, fetch, pivot, s1, s2)
    elif stride == width:
        sums_run(x, n_rows * width, plan.sums_fold * width, plan.held, fetch, pivot, s1, s2)
    else:
        for i in range(ceil_div(n_rows, step)):
            r = i * step
            n = min(step, n_rows - r)
            if n == step and width >= NARROW and not plan.held:
                sums_apart(x + r * stride, stride, width, plan.sums_fold, fetch, pivot, s1, s2)
            else:
                sums_run(gather(x + r * stride, stride, n, width, buffer), n * width, plan.sums_fold * width,
                         plan.held, near_or_quads(plan, sizeof(floating)), pivot, s1, s2)
    fold_sums(s1, channels, plan.repeat, plan.sums_fold)
    fold_sums(s2, channels, plan.repeat, plan.sums_fold)


cdef inline void pivot_strip(
    const floating* x, Py_ssize_t stride, Py_ssize_t n_rows, Py_ssize_t n_columns, double weight,
    double* pivot,             # OUT  (n_columns,)
) noexcept nogil:
    cdef double first[STRIP]
    cdef double row[STRIP]
    cdef double total[STRIP]
    cdef Py_ssize_t r, j
    load_row(x, n_columns, first)
    for j in range(n_columns):
        total[j] = 0
    for r in range(1, n_rows):
        load_row(x + r * stride, n_columns, row)
        for j in range(n_columns):
            total[j] += row[j] - first[j]
    for j in range(n_columns):
        pivot[j] = multiply_add(total[j], weight, first[j])


cdef void pivot_rows(
    const floating* x, Py_ssize_t stride, Py_ssize_t n_rows, Py_ssize_t width, double* pivot,
) noexcept nogil:
    """The mean of a few rows, as sums_block would have it, which adds up squares, too (moments of 256x512,
    100x2000, 2048x1024, 4096x1024 0.97 of the time)."""
    cdef Py_ssize_t j = 0
    cdef double weight = 1 / <double>n_rows
    while j + STRIP <= width:
        pivot_strip(x + j, stride, n_rows, STRIP, weight, pivot + j)
        j += STRIP
    while j < width:
        pivot_strip(x + j, stride, n_rows, 1, weight, pivot + j)
        j += 1


cdef inline void merge_moments(
    double n_a, double* mean, double* rest, double* m2,
    double n_b, const double* mean_b, const double* rest_b, const double* m2_b, Py_ssize_t channels,
) noexcept nogil:
    """Chan, Golub and LeVeque (1979): delta = mean_b - mean, m2 += m2_b + delta^2 n_a n_b / (n_a + n_b)."""
    cdef Py_ssize_t c
    cdef double delta, weight = n_b / (n_a + n_b), cross = n_a * (n_b / (n_a + n_b))
    for c in range(channels):
        delta = (mean_b[c] - mean[c]) + (rest_b[c] - rest[c])
        rest[c] += delta * weight
        m2[c] += m2_b[c] + delta * delta * cross


cdef inline void put_moments(
    double n, const double* pivot, const double* s1, const double* s2, Py_ssize_t channels,
    double* mean,              # OUT
    double* rest,              # OUT  may be s1
    double* m2,                # OUT  may be s2
) noexcept nogil:
    """From the sums of n values a channel about a pivot."""
    cdef Py_ssize_t c
    cdef double shift, weight = 1 / n  # three divisions a channel took a fifth of a block
    for c in range(channels):
        shift = s1[c] * weight
        mean[c] = pivot[c]
        m2[c] = s2[c] - s1[c] * shift
        rest[c] = shift


cdef inline void settle_one(double* mean, double* rest) noexcept nogil:
    """mean takes of rest what it can hold, without loss (Knuth's two-sum)."""
    cdef double total = mean[0] + rest[0], added = total - mean[0]
    rest[0] = (mean[0] - (total - added)) + (rest[0] - added)
    mean[0] = total


cdef inline void settle(double* mean, double* rest, Py_ssize_t channels) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(channels):
        settle_one(mean + c, rest + c)


cdef inline void claim(floating* row, Py_ssize_t n) noexcept nogil:
    """Store a zero in each line of a row that other threads read in the last call, before its values are there: these
    stores wait for their lines while the sums go on. Fetched to write instead, a line that this processor has and
    others too stays theirs as well."""
    cdef Py_ssize_t i
    for i in range(ceil_div(n * sizeof(floating), LINE)):
        row[i * (LINE // sizeof(floating))] = 0


cdef void moments_task(
    const floating* x, Py_ssize_t stride, const Plan* plan, Py_ssize_t chunk, Py_ssize_t c0, Py_ssize_t channels,
    double* mean,              # OUT  of this chunk
    double* rest,              # OUT
    double* m2,                # OUT
) noexcept nogil:
    cdef floating buffer[ROWS * TILE]
    cdef double memory[3 * SUMS_PITCH + STRIP]
    cdef double* pivot = first_line(memory)
    cdef double* s1 = pivot + SUMS_PITCH
    cdef double* s2 = s1 + SUMS_PITCH
    cdef double means[TILE]
    # The pivot itself where spread has nothing to spread: moments of 8x512 0.95 of the time, 32x4096 0.97, 256x512 0.97
    # to 0.99.
    cdef double* mean_b = pivot if plan.repeat == plan.sums_fold == 1 else means
    cdef Py_ssize_t c, index, k, k_rows, k_length
    cdef double n, weight, count = 0
    cdef Block block
    cdef const floating* first
    mean += c0
    rest += c0
    m2 += c0
    if share_rows(plan):  # Zen 4, two threads: forward of 256x512 0.92 to 0.97 of the time, 256x384 0.92 to 0.98
        claim(mean, channels)
        claim(rest, channels)
        claim(m2, channels)
    for index in range(chunk * plan.chunk, min((chunk + 1) * plan.chunk, plan.n_blocks)):
        block = block_at(plan, index)
        first = x + block.row * stride + c0 * plan.inner + block.start
        k = ceil_div(block.n_rows * block.length, PIVOT_SHARE)
        k_length = min(block.length, k) if plan.by_inner else block.length
        k_rows = ceil_div(k, k_length)
        if mean_b == pivot:
            pivot_rows(first, stride, k_rows, channels, pivot)
        else:
            for c in range(channels):
                mean_b[c] = first[c * plan.inner]
            spread(mean_b, channels, plan.repeat, plan.sums_fold, pivot)
            if k > 1:  # of 32 rows, the first is the pivot as it is
                sums_block(first, stride, k_rows, k_length, channels, plan, buffer, pivot, s1, s2)
                weight = 1 / (<double>k_rows * k_length)
                for c in range(channels):
                    mean_b[c] += s1[c] * weight
                spread(mean_b, channels, plan.repeat, plan.sums_fold, pivot)

        sums_block(first, stride, block.n_rows, block.length, channels, plan, buffer, pivot, s1, s2)
        n = <double>block.n_rows * block.length
        if count == 0:  # moments of 32x4096 0.95 of the time that it took by way of s1 and s2
            put_moments(n, mean_b, s1, s2, channels, mean, rest, m2)
        else:
            put_moments(n, mean_b, s1, s2, channels, mean_b, s1, s2)
            merge_moments(count, mean, rest, m2, n, mean_b, s1, s2, channels)
        count += n
    if count > n:  # a first row far off takes the first pivot along: so large a rest would cost the mean two digits
        settle(mean, rest, channels)


cdef double chunk_count(const Plan* plan, Py_ssize_t chunk) noexcept nogil:
    """Values a channel in the first `chunk` chunks."""
    cdef Py_ssize_t n_blocks = min(chunk * plan.chunk, plan.n_blocks)
    cdef Block block
    if n_blocks == plan.n_blocks:
        return <double>plan.outer * plan.inner
    block = block_at(plan, n_blocks)
    return <double>block.row * plan.inner + <double>block.start * min(plan.block_outer, plan.outer - block.row)


cdef struct Moments:       # (channels,) each
    double* mean
    double* rest
    double* m2


cdef inline Moments moments_in(
    const Plan* plan,
    double* rows,              # (3, channels)
) noexcept nogil:
    cdef Moments own
    own.mean = rows
    own.rest = rows + plan.channels
    own.m2 = rows + 2 * plan.channels
    return own


cdef inline Moments moments_of(
    const Plan* plan, Py_ssize_t chunk, const Moments* first, double* partial,
) noexcept nogil:
    """Those of a chunk: `first` of chunk 0, which has in the end those of all, of the others in partial."""
    return moments_in(plan, partial + MOMENTS * chunk * plan.channels) if chunk > 0 else first[0]


cdef void merge_chunk(
    const Plan* plan, Py_ssize_t left, Py_ssize_t right, Py_ssize_t end,
    const Moments* a,          # INOUT of chunks left to right, then of left to end
    const Moments* b,          # IN   of chunks right to end
    Py_ssize_t c0, Py_ssize_t c1,
) noexcept nogil:
    """For channels c0 to c1."""
    cdef double before = chunk_count(plan, right)
    merge_moments(before - chunk_count(plan, left), a.mean + c0, a.rest + c0, a.m2 + c0,
                  chunk_count(plan, end) - before, b.mean + c0, b.rest + c0, b.m2 + c0, c1 - c0)


# ---------------------------------------------------------------------------------------------------------------------
# The per-channel arithmetic between the passes, in float64.
# ---------------------------------------------------------------------------------------------------------------------

cdef inline void normalize_strip(
    const double* mean,        # IN   (n_columns,)
    const double* rest,        # IN   what mean lacks; NULL: nothing
    const double* m2, double n, const floating* gamma, double eps, Py_ssize_t n_columns,
    bint keep,                 # whether anybody wants stats
    double* stats,             # OUT  mean, var, invstd, rest, `pitch` apart
    floating* coefs,           # OUT  center, scale, offset without beta, `pitch` apart
    Py_ssize_t pitch,
) noexcept nogil:
    """The mean in two floats: what the data's dtype holds is the center, the rest goes into the offset."""
    # In arrays of their own the results cannot be the inputs for all the compiler knows. In loops through all channels,
    # one for each result, 4096 of them took 1.6 times as long (32x4096: inference 1.1). put_strip stores them from
    # registers; memcpy, by way of the stack, took 1.2 times as long (Zen 3, AVX2; 32x4096: inference 1.07).
    cdef double total[STRIP]
    cdef double low[STRIP]
    cdef double var[STRIP]
    cdef double invstd[STRIP]
    cdef floating center[STRIP]
    cdef floating scale[STRIP]
    cdef floating offset[STRIP]
    cdef Py_ssize_t j
    cdef double weight = 1 / n
    if <Py_ssize_t>n & (<Py_ssize_t>n - 1):
        for j in range(n_columns):
            var[j] = m2[j] / n
    else:  # a power of two (at inference 1): the product is exact; the division was a fourth of this function
        for j in range(n_columns):
            var[j] = m2[j] * weight
    for j in range(n_columns):
        total[j] = mean[j]
        low[j] = rest[j] if rest != NULL else 0
        settle_one(&total[j], &low[j])
        invstd[j] = 1 / sqrt(var[j] + eps)
        center[j] = <floating>total[j]
        scale[j] = <floating>(invstd[j] * gamma[j] if gamma != NULL else invstd[j])
        offset[j] = <floating>(-((total[j] - center[j]) + low[j]) * scale[j])
    if keep:  # Zen 3, AVX2, without: inference of 8x4096 0.75 to 0.8 of the time, of 32x4096 0.9
        put_strip(stats, total, n_columns, False)
        put_strip(stats + pitch, var, n_columns, False)
        put_strip(stats + 2 * pitch, invstd, n_columns, False)
        put_strip(stats + 3 * pitch, low, n_columns, False)
    put_strip(coefs, center, n_columns, False)
    put_strip(coefs + pitch, scale, n_columns, False)
    put_strip(coefs + 2 * pitch, offset, n_columns, False)


cdef inline const floating* from_channel(const floating* values, Py_ssize_t c) noexcept nogil:
    """values + c, or NULL."""
    return values + c if values != NULL else NULL


cdef inline void normalize_channels_as(
    const Plan* plan, Py_ssize_t c0, Py_ssize_t c1,
    const double* mean, const double* rest, const double* m2, double n,
    const floating* gamma, const floating* beta, double eps, bint keep, double* stats, floating* coefs,
) noexcept nogil:
    cdef Py_ssize_t c = c0
    cdef floating* offset = coefs + 2 * plan.channels
    while c + STRIP <= c1:
        normalize_strip(mean + c, from_channel(rest, c), m2 + c, n, from_channel(gamma, c), eps, STRIP,
                        keep, stats + c, coefs + c, plan.channels)
        c += STRIP
    while c < c1:
        normalize_strip(mean + c, from_channel(rest, c), m2 + c, n, from_channel(gamma, c), eps, 1,
                        keep, stats + c, coefs + c, plan.channels)
        c += 1
    # In a strip the compiler could fuse product and sum, and not in one of another size: other threads, other bits.
    if beta != NULL:
        for c in range(c0, c1):
            offset[c] += beta[c]


cdef void normalize_channels(
    const Plan* plan, Py_ssize_t c0, Py_ssize_t c1,
    const double* mean, const double* rest, const double* m2, double n,
    const floating* gamma, const floating* beta, double eps,
    double* stats,             # OUT  (4, channels): mean, var, invstd, rest; NULL: nobody wants them
    floating* coefs,           # OUT  (3, channels): center, scale, offset
) noexcept nogil:
    if stats != NULL:  # a literal in each branch: tested in each strip, 256x512 forward took 1.06 times as long
        normalize_channels_as(plan, c0, c1, mean, rest, m2, n, gamma, beta, eps, True, stats, coefs)
    else:
        normalize_channels_as(plan, c0, c1, mean, rest, m2, n, gamma, beta, eps, False, stats, coefs)


cdef inline double finite_or_zero(double value) noexcept nogil:
    """What to take off a sum that, if it is infinite, shall stay so: infinity, or 0 times it, would make it NaN."""
    return value if value - value == 0 else 0


cdef void gradient_channels(
    const Plan* plan, Py_ssize_t c0, Py_ssize_t c1,
    const double* sum_dy,
    const double* sum_dy_xc,   # IN   about the mean's first float
    const double* stats, const floating* coefs,
    bint training,             # IN   False: the statistics were constants, so they pass no gradient on
    floating* linear,          # OUT  (4, channels): factor, slope, shift, rest
    floating* grads,           # OUT  (2, channels): grad_gamma, grad_beta
) noexcept nogil:
    """The shift, mean(dy) less what center lacks of the mean, in two floats; the factor stays outside, so that the
    slope is about 1 / std and neither under- nor overflows."""
    cdef Py_ssize_t c, channels = plan.channels
    cdef double k, d, sum_dy_xmu, n = <double>plan.outer * plan.inner
    cdef const double* invstd = stats + 2 * channels
    cdef const double* lacking = stats + 3 * channels
    cdef floating* slope = linear + channels
    cdef floating* shift = linear + 2 * channels
    cdef floating* rest = linear + 3 * channels
    for c in range(c0, c1):
        sum_dy_xmu = sum_dy_xc[c] - finite_or_zero(lacking[c] * sum_dy[c])
        grads[c] = <floating>(invstd[c] * sum_dy_xmu)
        grads[channels + c] = <floating>sum_dy[c]
        linear[c] = coefs[channels + c]
    for c in range(c0, c1):
        sum_dy_xmu = sum_dy_xc[c] - finite_or_zero(lacking[c] * sum_dy[c])
        k = invstd[c] * (invstd[c] * (sum_dy_xmu / n)) if training else 0
        d = sum_dy[c] / n - k * ((stats[c] - coefs[c]) + lacking[c]) if training else 0
        slope[c] = <floating>k
        shift[c] = <floating>d
        rest[c] = <floating>(d - shift[c])


cdef inline void spread_rows(
    const floating* rows,      # IN   (n, channels)
    Py_ssize_t n, const Plan* plan, Py_ssize_t fold, Py_ssize_t c0, Py_ssize_t channels,
    floating* wide,            # OUT  (n, PITCH)
) noexcept nogil:
    cdef Py_ssize_t i, j, width = channels * plan.repeat * fold
    for i in range(n):
        spread(rows + i * plan.channels + c0, channels, plan.repeat, fold, wide)
        if not plan.by_inner:
            for j in range(STRIP):
                wide[width + j] = wide[j]
        wide += PITCH


# ---------------------------------------------------------------------------------------------------------------------
# Strips and runs of the elementwise passes. A strip is stored straight from the registers, past the caches where the
# output is large (100352x64: 1.07 ms, by way of a buffer in L1 1.46). It then begins with a cache line, wherever in a
# row that is: the coefficients of a row are followed by those of the next one, so a strip may run over its end.
# ---------------------------------------------------------------------------------------------------------------------

cdef inline void put_strip(floating* y, const floating* strip, Py_ssize_t n_columns, bint stream) noexcept nogil:
    """Store a strip; past the caches it must be whole, and y aligned to LINE."""
    cdef Py_ssize_t j
    if stream:
        for j in range(n_columns * <Py_ssize_t>sizeof(floating) // LINE):
            stream_line(<char*>y + j * LINE, <const char*>strip + j * LINE)
    else:
        for j in range(n_columns):
            y[j] = strip[j]


cdef inline const floating* join(
    const floating* end, Py_ssize_t n, const floating* following, floating* both,
) noexcept nogil:
    """A strip of a row's last n columns and the next row's first ones: literal sizes of both are copied together."""
    memcpy(both, end - STRIP, STRIP * sizeof(floating))
    memcpy(both + STRIP, following, STRIP * sizeof(floating))
    return both + STRIP - n


cdef inline floating* place_coefs(floating* memory, Py_ssize_t skip) noexcept nogil:
    """Where to put coefficients so that those behind the first `skip` columns begin with a line, as the strips of the
    output then do. NumPy's arrays begin anywhere in one, and stores that cross lines cost more than loads (Sapphire
    Rapids: 256x512 affine 0.35 of the time by the output's lines instead of the input's, grad_affine half)."""
    return first_line(memory) + (STRIP - skip) % STRIP


cdef inline Py_ssize_t begin_stream(const floating* y, Py_ssize_t length, Py_ssize_t ahead) noexcept nogil:
    """How many elements at y to store through the caches. The lines that hold the ends of a run are fetched, this
    run's last and the first of one `ahead`: they are shared with other runs (4096x1024: 10 %, 128x256x14x14: 12 %)."""
    if before_line(y + length):
        prefetch_write(y + length)
    if before_line(y):
        prefetch_write(y + ahead)
    return min(length, before_line(y))


cdef inline bint has_whole_lines(const floating* y, Py_ssize_t stride) noexcept nogil:
    """Whether every row begins with a line. Past the caches, narrow rows that do not took 26 ms instead of 20."""
    return before_line(y) == 0 and before_line(y + stride) == 0


cdef inline bint on_lines(const floating* y, Py_ssize_t stride, Py_ssize_t length) noexcept nogil:
    """Whether strips of such rows begin with a line: where all rows begin at the same place of one, none is short.
    32x4096, whose rows are cut into tiles: affine 0.9 of the time, grad_affine 0.8; of other rows up to 1.4."""
    return length >= 8 * STRIP and before_line(y) == before_line(y + stride)


cdef inline Py_ssize_t count_pairs(
    const floating* y, Py_ssize_t length, Py_ssize_t width, bint stream,
) noexcept nogil:
    """How many pairs of rows there are behind a run's first line, if its rows are taken two at a time: with the
    coefficients loaded half as often, affine took 0.83 of the time in L2 and 0.89 in L3, grad_affine 0.88 and 0.95. A
    Zen 5 loads twice as much a cycle; there it is 1.06 to 1.19 from L2 on, 0.85 to 1 in L1. Not where a strip of
    coefficients is several vectors, which leaves few registers: float64 took 1.15 to 1.3 times as long, AVX2 0.92 to
    1.14, its grad_affine up to 1.24. Nor of wider rows than 512 columns: 512x768 took 0.97 to 1.17 of the time,
    256x1024 1.1 to 1.25."""
    if stream or width > TILE or width % STRIP or STRIP * <Py_ssize_t>sizeof(floating) > VECTOR_BYTES:
        return 0
    if loads_two() and length * <Py_ssize_t>sizeof(floating) > FIRST_BYTES:
        return 0
    return max(0, length - before_line(y)) // (2 * width)


cdef inline bint holds_coefs(const Plan* plan, Py_ssize_t width, Py_ssize_t itemsize) noexcept nogil:
    """Whether rows of `width` columns, one behind the other, make up rows of HELD and are taken as such, with the
    coefficients in registers, which only floats leave room for. Measured on a Zen 4 alone, two threads, times that of
    pairs: 16384x64 and 32000x32 affine 0.92 to 0.95, forward 0.98, grad_affine 0.77 to 0.88, backward 0.87 to 0.95;
    2048x64 0.96 to 1, 0.97 to 1, 0.83 to 0.95, 0.91 to 0.97."""
    return itemsize == 4 and VECTOR_BYTES == LINE and plan.held and HELD % width == 0 and is_zen3_or_4()


cdef inline Py_ssize_t count_held(const floating* y, Py_ssize_t length) noexcept nogil:
    """How many rows of HELD columns there are behind a run's first line."""
    return max(0, length - before_line(y)) // HELD


cdef inline Py_ssize_t next_column(Py_ssize_t j, Py_ssize_t n_columns, Py_ssize_t width) noexcept nogil:
    """The column n_columns behind column j in rows of `width` that lie one behind the other."""
    j += n_columns
    while j >= width:
        j -= width
    return j


cdef inline bint fetches_ahead(bint near, bint stream) noexcept nogil:
    """Whether the elementwise passes do, strip by strip. A Zen 3 or 4 itself finds what lies in its caches. Zen 4:
    forward and backward of 512x1024 took 0.97 and 0.83 of the time, of 1300x1000 0.97 and 0.9, of 32x256x14x14 0.99 and
    0.97, of float64 8192x64 0.84 and 0.75, by AVX2 0.58 to 1. Zen 3: affine of 16384x64 0.95, its gradients 0.91, of
    512x512 float64 0.87 and 0.64, of 1000x1000 0.89 and 0.8; but affine of 2000x1000 up to 1.15. Pairs of rows of
    affine fetch all the same: 0.94 to 0.98 of the time."""
    return stream or not (near or is_zen3_or_4())


cdef inline bint trails(const floating* y, const floating* x) noexcept nogil:
    """Whether y lies less than two strips behind x, not counting what the processor does not tell apart, as of two
    arrays allocated one after the other: x's next strip would wait for the strip of y that was just stored."""
    return (<uintptr_t>y - <uintptr_t>x - 1) & (alias_bytes() - 1) < 2 * STRIP * sizeof(floating) - 1


cdef inline bint goes_back(const floating* y, const floating* x, Py_ssize_t each, bint stream) noexcept nogil:
    """Whether to take strips from the last one on. Zen 4: affine of 65536x128 0.62 of the time, of 256x512 0.7 to 0.95;
    Sapphire Rapids: 512x512 half, 4096x1024 0.55 to 0.75, 65536x256 0.8 (where nothing waits, 1.25). Not those of
    images (each = 0), whose backward would take up to 20 % longer, nor AVX2's through the caches, 4 to 21 %."""
    return each and (stream or VECTOR_BYTES == LINE) and trails(y, x)


cdef inline bint grad_goes_back(
    const floating* grad_x, const floating* dy, const floating* x, Py_ssize_t each, bint stream,
) noexcept nogil:
    """The same with two inputs, of which either may be in the way: grad_affine of 4096x1024 0.6 to 0.9 of the time, of
    256x512 0.85 to 0.95."""
    return ((goes_back(grad_x, dy, each, stream) or goes_back(grad_x, x, each, stream))
            and not (trails(dy, grad_x) or trails(x, grad_x)))


cdef inline Py_ssize_t strips_ahead(Py_ssize_t j, Py_ssize_t width, Py_ssize_t length) noexcept nogil:
    """How many whole strips begin between column j and the end of its row, with `length` elements left."""
    return min(ceil_div(width - j, STRIP), length // STRIP)


# ---------------------------------------------------------------------------------------------------------------------
# affine: y = (x - center) * scale + offset, then the activation.
# ---------------------------------------------------------------------------------------------------------------------

cdef inline void affine_strip(
    const floating* x,         # IN   (n_columns,)
    Py_ssize_t n_columns,
    const floating* coefs,     # IN   at CENTER, SCALE, OFFSET
    bint relu,
    bint stream,
    floating* y,               # OUT  may be x: the strip is read before it is written
) noexcept nogil:
    cdef floating strip[STRIP]
    cdef floating value
    cdef Py_ssize_t j
    for j in range(n_columns):
        value = (x[j] - coefs[CENTER + j]) * coefs[SCALE + j] + coefs[OFFSET + j]
        strip[j] = 0 if relu and value <= 0 else value
    put_strip(y, strip, n_columns, stream)


cdef inline void affine_rest_as(
    const floating* x, Py_ssize_t n_columns, const floating* coefs, bint relu, floating* y,
) noexcept nogil:
    cdef Py_ssize_t j = 0
    if n_columns & 8:
        affine_strip(x, 8, coefs, relu, False, y)
        j = 8
    if n_columns & 4:
        affine_strip(x + j, 4, coefs + j, relu, False, y + j)
        j += 4
    if n_columns & 2:
        affine_strip(x + j, 2, coefs + j, relu, False, y + j)
        j += 2
    if n_columns & 1:
        affine_strip(x + j, 1, coefs + j, relu, False, y + j)


cdef void affine_rest(
    const floating* x, Py_ssize_t n_columns, const floating* coefs, bint relu, floating* y,
) noexcept nogil:
    """Fewer columns than a strip has, in literal sizes (2x256x14x14: a loop took 7 % longer)."""
    if relu:  # a flag tested behind each sign would make the processor guess the signs (64x512x7x7: 1.3 times the time)
        affine_rest_as(x, n_columns, coefs, True, y)
    else:
        affine_rest_as(x, n_columns, coefs, False, y)


cdef inline void affine_strips(
    const floating* x, Py_ssize_t x_ahead, Py_ssize_t n_strips, const floating* coefs, Py_ssize_t each,
    bint relu, bint stream, floating* y,
    Py_ssize_t y_ahead,        # IN   0: fetch nothing ahead
) noexcept nogil:
    cdef Py_ssize_t _strip, end = (n_strips - 1) * STRIP, step = STRIP
    if goes_back(y, x, each, stream):
        x += end
        y += end
        coefs += each * end
        step = -STRIP
    for _strip in range(n_strips):
        if stream or y_ahead:
            prefetch_strip(x + x_ahead, False)
        if y_ahead and not stream:
            prefetch_strip_write(y + y_ahead)
        affine_strip(x, STRIP, coefs, relu, stream, y)
        x += step
        y += step
        coefs += each * step


cdef inline void affine_runs_as(
    const floating* x, Py_ssize_t stride, Py_ssize_t x_ahead, Py_ssize_t n_runs, Py_ssize_t length, Py_ssize_t width,
    const floating* coefs, bint relu, bint stream, floating* y, Py_ssize_t y_stride, Py_ssize_t y_ahead,
) noexcept nogil:
    cdef Py_ssize_t i, j, n, _run
    for _run in range(n_runs):
        i = j = 0
        if stream:
            i = begin_stream(y, length, y_ahead)
        elif length > width:  # several rows
            i = min(length, before_line(y))
        if i:
            affine_rest(x, i, coefs, relu, y)
            j = next_column(0, i, width)
        while i + STRIP <= length:
            n = strips_ahead(j, width, length - i)
            if stream:
                affine_strips(x + i, x_ahead, n, coefs + j, 1, relu, True, y + i, y_ahead)
            elif y_ahead:
                affine_strips(x + i, x_ahead, n, coefs + j, 1, relu, False, y + i, y_ahead)
            else:
                affine_strips(x + i, 0, n, coefs + j, 1, relu, False, y + i, 0)
            i += n * STRIP
            j = next_column(j, n * STRIP, width)
        affine_rest(x + i, length - i, coefs + j, relu, y + i)
        x += stride
        y += y_stride


cdef void affine_runs(
    const floating* x, Py_ssize_t stride, Py_ssize_t x_ahead, Py_ssize_t n_runs, Py_ssize_t length, Py_ssize_t width,
    const floating* coefs, bint relu, bint stream, floating* y, Py_ssize_t y_stride, Py_ssize_t y_ahead,
) noexcept nogil:
    """Runs that lie `stride` apart, each of them contiguous, as rows of `width`, the last of them perhaps shorter."""
    # A literal in each branch: a flag tested inside the strip would keep it from being vectorised.
    if relu:
        affine_runs_as(x, stride, x_ahead, n_runs, length, width, coefs, True, stream, y, y_stride, y_ahead)
    else:
        affine_runs_as(x, stride, x_ahead, n_runs, length, width, coefs, False, stream, y, y_stride, y_ahead)


cdef inline void affine_channels_as(
    const floating* x, Py_ssize_t x_ahead, Py_ssize_t channels, Py_ssize_t inner, const floating* coefs,
    bint relu, bint stream, floating* y, Py_ssize_t y_ahead,
) noexcept nogil:
    cdef Py_ssize_t n, length = channels * inner
    cdef Py_ssize_t i = min(length, begin_stream(y, length, 0) if stream else before_line(y))
    cdef Py_ssize_t left = inner - i  # of the channel
    affine_rest(x, i, coefs, relu, y)
    while i + STRIP <= length:
        n = left // STRIP
        if stream:
            affine_strips(x + i, x_ahead, n, coefs, 0, relu, True, y + i, y_ahead)
        elif y_ahead:
            affine_strips(x + i, x_ahead, n, coefs, 0, relu, False, y + i, y_ahead)
        else:
            affine_strips(x + i, 0, n, coefs, 0, relu, False, y + i, 0)
        i += n * STRIP
        left -= n * STRIP
        if i + STRIP <= length:
            affine_strips(x + i, x_ahead, 1, coefs + LANES - left, 0, relu, stream, y + i, y_ahead)
            i += STRIP
            left += inner - STRIP
            coefs += LANES
    affine_rest(x + i, length - i, coefs, relu, y + i)


cdef inline void affine_channels(
    const floating* x, Py_ssize_t x_ahead, Py_ssize_t channels, Py_ssize_t inner,
    const floating* coefs,     # IN   each channel's LANES times
    bint relu, bint stream, floating* y, Py_ssize_t y_ahead,
) noexcept nogil:
    """Channels that lie one behind the other, as one run: with the last lane of a channel's coefficients lies the next
    one's first, so a strip may run over its end."""
    if relu and stream:
        affine_channels_as(x, x_ahead, channels, inner, coefs, True, True, y, y_ahead)
    elif relu:
        affine_channels_as(x, x_ahead, channels, inner, coefs, True, False, y, y_ahead)
    elif stream:
        affine_channels_as(x, x_ahead, channels, inner, coefs, False, True, y, y_ahead)
    else:
        affine_channels_as(x, x_ahead, channels, inner, coefs, False, False, y, y_ahead)


cdef inline void affine_rows_as(
    const floating* x, Py_ssize_t stride, Py_ssize_t x_ahead, Py_ssize_t n_rows, Py_ssize_t width,
    const floating* coefs, bint relu, floating* y, Py_ssize_t y_stride, Py_ssize_t y_ahead,
) noexcept nogil:
    cdef Py_ssize_t begin = before_line(y) if on_lines(y, y_stride, width) else 0
    cdef Py_ssize_t n_strips = (width - begin) // STRIP, end = begin + n_strips * STRIP, _row
    for _row in range(n_rows):
        if begin:
            affine_rest(x, begin, coefs, relu, y)
        if y_ahead:
            affine_strips(x + begin, x_ahead, n_strips, coefs + begin, 1, relu, False, y + begin, y_ahead)
        else:
            affine_strips(x + begin, 0, n_strips, coefs + begin, 1, relu, False, y + begin, 0)
        if end < width:
            affine_rest(x + end, width - end, coefs + end, relu, y + end)
        x += stride
        y += y_stride


cdef void affine_rows(
    const floating* x, Py_ssize_t stride, Py_ssize_t x_ahead, Py_ssize_t n_rows, Py_ssize_t width,
    const floating* coefs, bint relu, floating* y, Py_ssize_t y_stride, Py_ssize_t y_ahead,
) noexcept nogil:
    """Rows that lie apart, through the caches. As so many runs, 16384x64 with rows apart took 1.4 times as long."""
    if relu:
        affine_rows_as(x, stride, x_ahead, n_rows, width, coefs, True, y, y_stride, y_ahead)
    else:
        affine_rows_as(x, stride, x_ahead, n_rows, width, coefs, False, y, y_stride, y_ahead)


cdef inline void affine_joined_as(
    const floating* x, Py_ssize_t stride, Py_ssize_t x_ahead, Py_ssize_t n_rows, Py_ssize_t width,
    const floating* coefs, bint relu, floating* y,
) noexcept nogil:
    cdef floating both[2 * STRIP]
    cdef Py_ssize_t n, rest = 0, start = before_line(y), row
    if n_rows == 0:
        return
    affine_rest(x, start, coefs, relu, y)
    for row in range(1, n_rows + 1):
        n = (width - start) // STRIP
        rest = (width - start) % STRIP
        affine_strips(x + start, x_ahead, n, coefs + start, 1, relu, True, y + start, 0)
        start += n * STRIP
        if rest and row < n_rows:
            affine_strip(join(x + width, rest, x + stride, both), STRIP, coefs + start, relu, True, y + start)
            start += STRIP
        x += stride
        y += width
        start -= width
    n = width - rest
    affine_rest(x - stride + n, rest, coefs + n, relu, y - rest)


cdef void affine_joined(
    const floating* x, Py_ssize_t stride, Py_ssize_t x_ahead, Py_ssize_t n_rows, Py_ssize_t width,
    const floating* coefs, bint relu, floating* y,
) noexcept nogil:
    """Rows that lie apart, past the caches to rows that do not. A strip that two share is put together first:
    through the caches, 500000x64 with rows apart took 1.4 times as long."""
    if relu:
        affine_joined_as(x, stride, x_ahead, n_rows, width, coefs, True, y)
    else:
        affine_joined_as(x, stride, x_ahead, n_rows, width, coefs, False, y)


cdef inline void affine_loaded(
    const floating* x, bint relu, const floating* center, const floating* scale, const floating* offset, floating* y,
) noexcept nogil:
    """A strip whose coefficients are in registers."""
    cdef floating strip[STRIP]
    cdef floating value
    cdef Py_ssize_t j
    for j in range(STRIP):
        value = (x[j] - center[j]) * scale[j] + offset[j]
        strip[j] = 0 if relu and value <= 0 else value
    put_strip(y, strip, STRIP, False)


cdef inline void affine_pair(
    const floating* x,         # IN   a strip of two rows, one behind the other
    Py_ssize_t width, const floating* coefs, bint relu,
    floating* y,               # OUT  may be x
) noexcept nogil:
    cdef floating center[STRIP]
    cdef floating scale[STRIP]
    cdef floating offset[STRIP]
    cdef Py_ssize_t r, j
    for j in range(STRIP):
        center[j] = coefs[CENTER + j]
        scale[j] = coefs[SCALE + j]
        offset[j] = coefs[OFFSET + j]
    for r in range(2):
        affine_loaded(x + r * width, relu, center, scale, offset, y + r * width)


cdef inline void affine_pairs_as(
    const floating* x, Py_ssize_t n_pairs, Py_ssize_t width, const floating* coefs, bint relu, bint near, floating* y,
) noexcept nogil:
    cdef Py_ssize_t r, j, first = 0, step = STRIP, _pair, _strip
    if goes_back(y, x, 1, False):
        first, step = width - STRIP, -STRIP
    for _pair in range(n_pairs):
        j = first
        for _strip in range(width // STRIP):
            for r in range(0 if near else 2):
                prefetch_strip(x + j + r * width + AHEAD, False)
                prefetch_strip_write(y + j + r * width + AHEAD)
            affine_pair(x + j, width, coefs + j, relu, y + j)
            j += step
        x += 2 * width
        y += 2 * width


cdef void affine_pairs(
    const floating* x, Py_ssize_t n_pairs, Py_ssize_t width, const floating* coefs, bint relu, bint near, floating* y,
) noexcept nogil:
    if relu and near:
        affine_pairs_as(x, n_pairs, width, coefs, True, True, y)
    elif relu:
        affine_pairs_as(x, n_pairs, width, coefs, True, False, y)
    elif near:
        affine_pairs_as(x, n_pairs, width, coefs, False, True, y)
    else:
        affine_pairs_as(x, n_pairs, width, coefs, False, False, y)


cdef inline void affine_held_as(
    const floating* x, Py_ssize_t n_rows, const floating* coefs, bint relu, floating* y,
) noexcept nogil:
    cdef floating center[HELD]
    cdef floating scale[HELD]
    cdef floating offset[HELD]
    cdef Py_ssize_t j, k, _row
    memcpy(center, coefs + CENTER, HELD * sizeof(floating))
    memcpy(scale, coefs + SCALE, HELD * sizeof(floating))
    memcpy(offset, coefs + OFFSET, HELD * sizeof(floating))
    for _row in range(n_rows):
        for k in range(HELD // STRIP):
            j = k * STRIP
            affine_loaded(x + j, relu, center + j, scale + j, offset + j, y + j)
        x += HELD
        y += HELD


cdef void affine_held(
    const floating* x, Py_ssize_t n_rows, const floating* coefs, bint relu, floating* y,
) noexcept nogil:
    """Rows of HELD columns, one behind the other, with the coefficients in registers."""
    if relu:
        affine_held_as(x, n_rows, coefs, True, y)
    else:
        affine_held_as(x, n_rows, coefs, False, y)


cdef inline void affine_run(
    const floating* x, Py_ssize_t x_ahead, Py_ssize_t length, Py_ssize_t width,
    bint held,                 # IN   whether rows of HELD columns may go through affine_held
    const floating* coefs, bint relu, bint near, bint stream, floating* y, Py_ssize_t y_ahead,
) noexcept nogil:
    cdef Py_ssize_t n, begin, done
    held = held and not stream and not goes_back(y, x, 1, False)
    n = count_held(y, length) if held else count_pairs(y, length, width, stream)
    begin = before_line(y) if n > 0 else 0
    done = begin + n * (HELD if held else 2 * width)
    if n > 0:
        affine_rest(x, begin, coefs, relu, y)
    if n > 0 and held:
        affine_held(x + begin, n, coefs + begin, relu, y + begin)
    elif n > 0:
        affine_pairs(x + begin, n, width, coefs + begin, relu, near, y + begin)
    affine_runs(x + done, 0, x_ahead, 1, length - done, width, coefs + begin, relu, stream, y + done, 0, y_ahead)


cdef void affine_task(
    const floating* x, Py_ssize_t stride, const Plan* plan, const Band* band, Py_ssize_t chunk, Py_ssize_t tile,
    const floating* channel_coefs,  # IN   (3, channels): center, scale, offset
    bint relu, bint stream,
    floating* y, Py_ssize_t y_stride,
) noexcept nogil:
    cdef floating memory[3 * PITCH + 2 * STRIP]
    cdef floating x_buffer[ROWS * TILE]
    cdef Py_ssize_t c0 = band.c0 + tile * band.tile
    cdef Py_ssize_t channels = min(band.tile, band.c1 - c0)
    cdef Py_ssize_t width = channels * plan.repeat, step = ROWS * plan.fold
    cdef Py_ssize_t segment = channels * plan.inner if plan.by_inner else width
    # One input from memory is fetched twice as far ahead, as the bare copy does it, but into L1: from further, into L2,
    # 4096x1024 took 1.08 times as long, 32x64x56x56 1.1, 65536x256 1.04.
    cdef Py_ssize_t x_ahead = lead(stride, segment, False) * (2 if stream else 1)
    cdef bint near = is_near(plan, sizeof(floating))
    cdef Py_ssize_t y_ahead = lead(y_stride, segment, False) if fetches_ahead(near, stream) else 0
    cdef Py_ssize_t index, r, c, i, n
    cdef bint stream_rows = stream and (plan.fold == 1 or has_whole_lines(y, y_stride))
    cdef bint one_run = not plan.by_inner and stride == width and y_stride == width
    cdef bint joined = stream and not stream_rows and y_stride == width
    cdef bint held = holds_coefs(plan, width, sizeof(floating))
    cdef bint aligned = not plan.by_inner and (one_run or joined or on_lines(y, y_stride, width))
    cdef floating* coefs = place_coefs(memory, before_line(y + c0 * plan.inner) if aligned else 0)
    cdef Block block
    spread_rows(channel_coefs, 3, plan, plan.fold, c0, channels, coefs)
    x += c0 * plan.inner
    y += c0 * plan.inner
    for index in range(chunk * plan.chunk, min((chunk + 1) * plan.chunk, plan.n_blocks)):
        block = block_within(plan, index, band)
        if plan.by_inner:
            n = channels if block.length == plan.inner else 1  # channels that lie one behind the other
            for r in range(block.row, block.row + block.n_rows):
                for c in range(channels // n):
                    i = c * plan.inner + block.start
                    affine_channels(x + r * stride + i, x_ahead, n, block.length, coefs + c * LANES, relu, stream,
                                    y + r * y_stride + i, y_ahead)
        elif one_run:
            i = block.row * width
            affine_run(x + i, x_ahead, block.n_rows * width, plan.fold * width, held, coefs, relu, near, stream, y + i,
                       y_ahead)
        elif width < NARROW and y_stride == width:
            for i in range(ceil_div(block.n_rows, step)):
                r = block.row + i * step
                n = min(step, block.row + block.n_rows - r)
                affine_run(gather(x + r * stride, stride, n, width, x_buffer), 0, n * width, plan.fold * width,
                           held, coefs, relu, near, stream, y + r * width, y_ahead)
        elif stream_rows:
            affine_runs(x + block.row * stride, stride, x_ahead, block.n_rows, width, width, coefs, relu, True,
                        y + block.row * y_stride, y_stride, y_ahead)
        elif joined:
            affine_joined(x + block.row * stride, stride, x_ahead, block.n_rows, width, coefs, relu,
                          y + block.row * width)
        else:
            affine_rows(x + block.row * stride, stride, x_ahead, block.n_rows, width, coefs, relu,
                        y + block.row * y_stride, y_stride, y_ahead)


# ---------------------------------------------------------------------------------------------------------------------
# grad_moments: sum_dy = sum(dy), sum_dy_xmu = sum(dy * (x - mean)); where a fused ReLU was off, dy counts as 0.
# ---------------------------------------------------------------------------------------------------------------------

cdef inline floating gate(floating dy, floating x, const floating* coefs, bint relu) noexcept nogil:
    return 0 if relu and (x - coefs[CENTER]) * coefs[SCALE] + coefs[OFFSET] <= 0 else dy


cdef inline void grad_load_row(
    const floating* dy, const floating* x, Py_ssize_t n_columns, const floating* coefs, bint relu,
    double* dy_row, double* x_row,
) noexcept nogil:
    """A row of a strip of both, in float64."""
    cdef floating gated[HELD]
    cdef Py_ssize_t j
    if relu:  # in a loop of its own, which vectorises: among the sums, float64 took three times as long
        for j in range(n_columns):
            gated[j] = gate(dy[j], x[j], coefs + j, True)
        load_row(gated, n_columns, dy_row)
    else:
        load_row(dy, n_columns, dy_row)
    load_row(x, n_columns, x_row)


cdef inline void grad_sums_strip(
    const floating* dy,        # IN   (n_rows, n_columns), rows `dy_stride` apart
    Py_ssize_t dy_stride,
    const floating* x,         # IN   (n_rows, n_columns), rows `x_stride` apart
    Py_ssize_t x_stride,
    Py_ssize_t n_rows,
    Py_ssize_t n_columns,
    int fetch,
    const double* mean,        # IN   (n_columns,)
    const floating* coefs,     # IN   at CENTER, SCALE, OFFSET
    bint relu,
    double* s1,                # INOUT
    double* s2,                # INOUT
) noexcept nogil:
    cdef double strip1[HELD]
    cdef double strip2[HELD]
    cdef double dy_row[HELD]
    cdef double x_row[HELD]
    cdef Py_ssize_t r, j
    cdef double one = 1
    if floating is float and VECTOR_BYTES == LINE:  # as in sums_strip: up to 5 % less time; AVX2 6 to 10 % longer
        one = hidden_one()
    grad_load_row(dy, x, n_columns, coefs, relu, strip1, x_row)
    for j in range(n_columns):
        strip2[j] = multiply(strip1[j], x_row[j] * one - mean[j])  # from zeros, up to 8 % longer
    for r in range(1, n_rows):
        prefetch_row(dy + r * dy_stride, dy_stride, n_columns, fetch)
        prefetch_row(x + r * x_stride, x_stride, n_columns, fetch)
        grad_load_row(dy + r * dy_stride, x + r * x_stride, n_columns, coefs, relu, dy_row, x_row)
        for j in range(n_columns):
            strip1[j] += dy_row[j] * one
            strip2[j] = multiply_add(dy_row[j], x_row[j] * one - mean[j], strip2[j])
    for j in range(n_columns):
        s1[j] += strip1[j]
    for j in range(n_columns):
        s2[j] += strip2[j]


cdef inline void grad_sums_group(
    const floating* dy, Py_ssize_t dy_stride, const floating* x, Py_ssize_t x_stride,
    Py_ssize_t n_rows, Py_ssize_t width, Py_ssize_t dy_ahead, Py_ssize_t x_ahead, int fetch,
    const double* mean, const floating* coefs, bint relu, double* s1, double* s2,
) noexcept nogil:
    cdef Py_ssize_t j = 0
    while j + STRIP <= width:
        prefetch_rows(dy, dy_stride, n_rows, width, j, dy_ahead, fetch)
        prefetch_rows(x, x_stride, n_rows, width, j, x_ahead, fetch)
        if floating is float and fetch == QUADS:
            grad_sums_strip_quads(<const float*>hidden(dy + j), dy_stride, <const float*>hidden(x + j), x_stride,
                                  n_rows, mean + j, s1 + j, s2 + j)
        else:
            grad_sums_strip(<const floating*>hidden(dy + j), dy_stride, <const floating*>hidden(x + j), x_stride,
                            n_rows, STRIP, NOTHING, mean + j, coefs + j, relu, s1 + j, s2 + j)
        j += STRIP
    if (width - j) & 8:
        grad_sums_strip(dy + j, dy_stride, x + j, x_stride, n_rows, 8, NOTHING,
                        mean + j, coefs + j, relu, s1 + j, s2 + j)
        j += 8
    if (width - j) & 4:
        grad_sums_strip(dy + j, dy_stride, x + j, x_stride, n_rows, 4, NOTHING,
                        mean + j, coefs + j, relu, s1 + j, s2 + j)
        j += 4
    while j < width:
        grad_sums_strip(dy + j, dy_stride, x + j, x_stride, n_rows, 1, NOTHING,
                        mean + j, coefs + j, relu, s1 + j, s2 + j)
        j += 1


cdef inline void grad_sums_rows_as(
    const floating* dy, Py_ssize_t dy_stride, const floating* x, Py_ssize_t x_stride,
    Py_ssize_t n_rows, Py_ssize_t step, Py_ssize_t width, Py_ssize_t dy_ahead, Py_ssize_t x_ahead, int fetch,
    const double* mean, const floating* coefs, bint relu, double* s1, double* s2,
) noexcept nogil:
    cdef Py_ssize_t _i
    for _i in range(n_rows // step):
        grad_sums_group(dy, dy_stride, x, x_stride, step, width, dy_ahead, x_ahead, fetch,
                        mean, coefs, relu, s1, s2)
        dy += step * dy_stride
        x += step * x_stride
    if n_rows % step & 4:
        grad_sums_group(dy, dy_stride, x, x_stride, 4, width, dy_ahead, x_ahead, fetch,
                        mean, coefs, relu, s1, s2)
        dy += 4 * dy_stride
        x += 4 * x_stride
    if n_rows & 2:
        grad_sums_group(dy, dy_stride, x, x_stride, 2, width, dy_ahead, x_ahead, fetch,
                        mean, coefs, relu, s1, s2)
        dy += 2 * dy_stride
        x += 2 * x_stride
    if n_rows & 1:
        grad_sums_group(dy, dy_stride, x, x_stride, 1, width, dy_ahead, x_ahead, fetch,
                        mean, coefs, relu, s1, s2)


cdef inline void grad_sums_rows_by(
    const floating* dy, Py_ssize_t dy_stride, const floating* x, Py_ssize_t x_stride,
    Py_ssize_t n_rows, Py_ssize_t step, Py_ssize_t width, Py_ssize_t dy_ahead, Py_ssize_t x_ahead, int fetch,
    const double* mean, const floating* coefs, bint relu, double* s1, double* s2,
) noexcept nogil:
    """Literals in each branch: flags tested inside the strip would keep it from being vectorised."""
    if relu and fetch == FAR:
        grad_sums_rows_as(dy, dy_stride, x, x_stride, n_rows, step, width, dy_ahead, x_ahead, FAR,
                          mean, coefs, True, s1, s2)
    elif relu and fetch == NOTHING:
        grad_sums_rows_as(dy, dy_stride, x, x_stride, n_rows, step, width, dy_ahead, x_ahead, NOTHING,
                          mean, coefs, True, s1, s2)
    elif relu:
        grad_sums_rows_as(dy, dy_stride, x, x_stride, n_rows, step, width, dy_ahead, x_ahead, NEAR,
                          mean, coefs, True, s1, s2)
    elif fetch == FAR:
        grad_sums_rows_as(dy, dy_stride, x, x_stride, n_rows, step, width, dy_ahead, x_ahead, FAR,
                          mean, coefs, False, s1, s2)
    elif fetch == NEAR:
        grad_sums_rows_as(dy, dy_stride, x, x_stride, n_rows, step, width, dy_ahead, x_ahead, NEAR,
                          mean, coefs, False, s1, s2)
    elif floating is float and fetch == QUADS:
        grad_sums_rows_as(dy, dy_stride, x, x_stride, n_rows, step, width, dy_ahead, x_ahead, QUADS,
                          mean, coefs, False, s1, s2)
    else:
        grad_sums_rows_as(dy, dy_stride, x, x_stride, n_rows, step, width, dy_ahead, x_ahead, NOTHING,
                          mean, coefs, False, s1, s2)


cdef inline void grad_sums_held_as(
    const floating* dy, Py_ssize_t dy_stride, const floating* x, Py_ssize_t x_stride,
    Py_ssize_t n_rows, Py_ssize_t width, int fetch,
    const double* mean, const floating* coefs, bint relu, double* s1, double* s2,
) noexcept nogil:
    # With a ReLU, AVX2's registers hold a strip, and of 64 rows of it 1000000x64 took 2.3 times as long.
    cdef Py_ssize_t n_columns = HELD if VECTOR_BYTES == LINE else STRIP
    cdef Py_ssize_t step = HELD_ROWS if VECTOR_BYTES == LINE or fetch == QUADS else ROWS
    cdef Py_ssize_t i, k, r, n, j = 0
    while j < width:
        r = 0
        while r < n_rows:
            n = min(step, n_rows - r)
            if floating is float and fetch == QUADS:
                grad_sums_held_quads(<const float*>dy + r * dy_stride + j, dy_stride,
                                     <const float*>x + r * x_stride + j, x_stride, n, mean + j, s1 + j, s2 + j)
            else:
                for i in range(HELD // n_columns):
                    k = j + i * n_columns
                    grad_sums_strip(dy + r * dy_stride + k, dy_stride, x + r * x_stride + k, x_stride, n, n_columns,
                                    fetch, mean + k, coefs + k, relu, s1 + k, s2 + k)
            r += step
        j += HELD


cdef void grad_sums_held(
    const floating* dy, Py_ssize_t dy_stride, const floating* x, Py_ssize_t x_stride,
    Py_ssize_t n_rows, Py_ssize_t width, int fetch, const double* mean, const floating* coefs, bint relu,
    double* s1, double* s2,
) noexcept nogil:
    cdef bint quads = held_by_quads(fetch, dy_stride, width) and held_by_quads(fetch, x_stride, width)
    if width > HELD:  # longer rows are near (512x256: fetching took 1.1 times as long, float64 256x256 1.3 to 1.5)
        fetch = NOTHING
    if relu and fetch == FAR:
        grad_sums_held_as(dy, dy_stride, x, x_stride, n_rows, width, FAR, mean, coefs, True, s1, s2)
    elif relu and fetch == NOTHING:
        grad_sums_held_as(dy, dy_stride, x, x_stride, n_rows, width, NOTHING, mean, coefs, True, s1, s2)
    elif relu:
        grad_sums_held_as(dy, dy_stride, x, x_stride, n_rows, width, NEAR, mean, coefs, True, s1, s2)
    elif floating is float and quads:
        grad_sums_held_as(dy, dy_stride, x, x_stride, n_rows, width, QUADS, mean, coefs, False, s1, s2)
    elif fetch == FAR:
        grad_sums_held_as(dy, dy_stride, x, x_stride, n_rows, width, FAR, mean, coefs, False, s1, s2)
    elif fetch == NOTHING:
        grad_sums_held_as(dy, dy_stride, x, x_stride, n_rows, width, NOTHING, mean, coefs, False, s1, s2)
    else:
        grad_sums_held_as(dy, dy_stride, x, x_stride, n_rows, width, NEAR, mean, coefs, False, s1, s2)


cdef void grad_sums_rows(
    const floating* dy, Py_ssize_t dy_stride, const floating* x, Py_ssize_t x_stride,
    Py_ssize_t n_rows, Py_ssize_t width, bint held, int fetch, const double* mean, const floating* coefs, bint relu,
    double* s1, double* s2,
) noexcept nogil:
    cdef Py_ssize_t ahead = COLUMNS_AHEAD // 2
    if held:
        grad_sums_held(dy, dy_stride, x, x_stride, n_rows, width, fetch, mean, coefs, relu, s1, s2)
    else:
        grad_sums_rows_by(dy, dy_stride, x, x_stride, n_rows, GRAD_ROWS, width, ahead, ahead, fetch,
                          mean, coefs, relu, s1, s2)


cdef void grad_sums_run(
    const floating* dy, const floating* x, Py_ssize_t length, Py_ssize_t width, bint held, int fetch,
    const double* mean, const floating* coefs, bint relu, double* s1, double* s2,
) noexcept nogil:
    """A contiguous run as rows of `width`, the last of them perhaps shorter."""
    cdef Py_ssize_t n_rows = length // width, done = n_rows * width
    grad_sums_rows(dy, width, x, width, n_rows, width, held, fetch, mean, coefs, relu, s1, s2)
    if done < length:
        grad_sums_rows(dy + done, width, x + done, width, 1, length - done, False, fetch, mean, coefs, relu, s1, s2)


cdef void grad_sums_rest(
    const floating* dy, const floating* x, Py_ssize_t n_columns, const double* mean, const floating* coefs, bint relu,
    double* s1, double* s2,
) noexcept nogil:
    """Fewer values than a row of LANES has; by way of grad_sums_rows, 32x256x14x14 took 1.09 times as long."""
    if relu:
        grad_sums_group(dy, LANES, x, LANES, 1, n_columns, 0, 0, NOTHING, mean, coefs, True, s1, s2)
    else:
        grad_sums_group(dy, LANES, x, LANES, 1, n_columns, 0, 0, NOTHING, mean, coefs, False, s1, s2)


cdef inline void grad_sums_lanes(
    const floating* dy, Py_ssize_t dy_ahead, const floating* x, Py_ssize_t x_ahead, Py_ssize_t length, int fetch,
    const double* mean, const floating* coefs, bint relu, double* s1, double* s2,
) noexcept nogil:
    """The same as rows of LANES."""
    cdef Py_ssize_t n_rows = length // LANES, done = n_rows * LANES
    # By strips in quads, 9x9 to 14x14 took 1.1 to 1.25 times as long, 7x7 1.25, 28x28 and 56x56 as long, 8x8 0.9.
    if floating is float and fetch == QUADS and not relu:
        grad_sums_run_quads(<const float*>dy, <const float*>x, length, mean, s1, s2)
        return
    grad_sums_rows_by(dy, LANES, x, LANES, n_rows, ROWS, LANES, dy_ahead, x_ahead, fetch, mean, coefs, relu, s1, s2)
    if done < length:
        grad_sums_rest(dy + done, x + done, length - done, mean, coefs, relu, s1, s2)


cdef void grad_sums_apart(
    const floating* dy, Py_ssize_t dy_stride, const floating* x, Py_ssize_t x_stride, Py_ssize_t width,
    Py_ssize_t fold, int fetch, const double* mean, const floating* coefs, bint relu, double* s1, double* s2,
) noexcept nogil:
    """ROWS wide rows, of `fold` rows each that lie apart: summed where they lie."""
    cdef Py_ssize_t f, j
    for f in range(fold):
        j = f * width
        grad_sums_rows(dy + f * dy_stride, fold * dy_stride, x + f * x_stride, fold * x_stride, ROWS, width, False,
                       fetch, mean + j, coefs + j, relu, s1 + j, s2 + j)


cdef void grad_moments_task(
    const floating* dy, Py_ssize_t dy_stride, const floating* x, Py_ssize_t x_stride,
    const Plan* plan, Py_ssize_t chunk, Py_ssize_t c0, Py_ssize_t channels,
    const double* channel_mean,     # IN   (channels,)
    const floating* channel_coefs,  # IN   (3, channels): center, scale, offset
    bint relu,
    double* sum_dy,                 # OUT  of this chunk
    double* sum_dy_xmu,             # OUT
) noexcept nogil:
    cdef floating dy_buffer[ROWS * TILE]
    cdef floating x_buffer[ROWS * TILE]
    cdef floating coefs_memory[3 * PITCH + STRIP]
    cdef floating* coefs = first_line(coefs_memory)
    cdef double memory[3 * SUMS_PITCH + STRIP]
    cdef double* mean = first_line(memory)
    cdef double* s1 = mean + SUMS_PITCH
    cdef double* s2 = s1 + SUMS_PITCH
    cdef Py_ssize_t width = channels * plan.repeat, wide = plan.sums_fold * width, step = step_rows(plan)
    cdef Py_ssize_t index, r, c, i, n, last
    cdef Py_ssize_t row = plan.channels * plan.inner
    cdef int fetch = what_to_fetch(plan, sizeof(floating), 2, dy_stride == row and x_stride == row)
    cdef Py_ssize_t dy_ahead = lead(dy_stride, channels * plan.inner, fetch == FAR)
    cdef Py_ssize_t x_ahead = lead(x_stride, channels * plan.inner, fetch == FAR)
    cdef Block block
    spread_rows(channel_mean, 1, plan, plan.sums_fold, c0, channels, mean)
    if relu:  # else nobody reads them (8x512 and 2000x3 0.94 to 0.96 of the time, 64x128 0.98)
        spread_rows(channel_coefs, 3, plan, plan.sums_fold, c0, channels, coefs)
    dy += c0 * plan.inner
    x += c0 * plan.inner
    sum_dy += c0
    sum_dy_xmu += c0
    if share_rows(plan):  # backward of 256x512 0.94 to 0.98
        claim(sum_dy, channels)
        claim(sum_dy_xmu, channels)
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
                    grad_sums_lanes(dy + r * dy_stride + i, dy_ahead, x + r * x_stride + i, x_ahead, block.length,
                                    fetch, mean + n, coefs + n, relu, s1 + n, s2 + n)
        elif plan.sums_fold == 1:
            grad_sums_rows(dy + block.row * dy_stride, dy_stride, x + block.row * x_stride, x_stride,
                           block.n_rows, width, plan.held, fetch, mean, coefs, relu, s1, s2)
        elif dy_stride == width and x_stride == width:
            i = block.row * width
            grad_sums_run(dy + i, x + i, block.n_rows * width, wide, plan.held, fetch, mean, coefs, relu, s1, s2)
        else:
            for i in range(ceil_div(block.n_rows, step)):
                r = block.row + i * step
                n = min(step, last - r)
                if n == step and width >= NARROW and not plan.held:
                    grad_sums_apart(dy + r * dy_stride, dy_stride, x + r * x_stride, x_stride, width, plan.sums_fold,
                                    fetch, mean, coefs, relu, s1, s2)
                else:
                    grad_sums_run(gather(dy + r * dy_stride, dy_stride, n, width, dy_buffer),
                                  gather(x + r * x_stride, x_stride, n, width, x_buffer),
                                  n * width, wide, plan.held, near_or_quads(plan, sizeof(floating)),
                                  mean, coefs, relu, s1, s2)
        fold_sums(s1, channels, plan.repeat, plan.sums_fold)
        fold_sums(s2, channels, plan.repeat, plan.sums_fold)
        if index == chunk * plan.chunk:
            memcpy(sum_dy, s1, channels * sizeof(double))
            memcpy(sum_dy_xmu, s2, channels * sizeof(double))
            continue
        for c in range(channels):
            sum_dy[c] += s1[c]
            sum_dy_xmu[c] += s2[c]


cdef void add_chunk(
    const Plan* plan,
    double* a,                 # INOUT (2, channels): sum_dy, sum_dy_xmu
    const double* b,           # IN   (2, channels)
    Py_ssize_t c0, Py_ssize_t c1,
) noexcept nogil:
    """The sums b to the sums a, for channels c0 to c1."""
    cdef Py_ssize_t _row, c
    for _row in range(SUMS):
        for c in range(c0, c1):
            a[c] += b[c]
        a += plan.channels
        b += plan.channels


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
    bint stream,
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
    put_strip(grad_x, strip, n_columns, stream)


cdef void grad_affine_rest(
    const floating* dy, const floating* x, Py_ssize_t n_columns, const floating* coefs, bint relu, bint training,
    floating* grad_x,
) noexcept nogil:
    """Fewer columns than a strip has."""
    cdef Py_ssize_t j = 0
    if n_columns & 8:
        grad_affine_strip(dy, x, 8, coefs, relu, training, False, grad_x)
        j = 8
    if n_columns & 4:
        grad_affine_strip(dy + j, x + j, 4, coefs + j, relu, training, False, grad_x + j)
        j += 4
    if n_columns & 2:
        grad_affine_strip(dy + j, x + j, 2, coefs + j, relu, training, False, grad_x + j)
        j += 2
    if n_columns & 1:
        grad_affine_strip(dy + j, x + j, 1, coefs + j, relu, training, False, grad_x + j)


cdef inline void grad_affine_strips(
    const floating* dy, Py_ssize_t dy_ahead, const floating* x, Py_ssize_t x_ahead, Py_ssize_t n_strips,
    const floating* coefs, Py_ssize_t each, bint relu, bint training, bint stream,
    floating* grad_x, Py_ssize_t grad_x_ahead,
) noexcept nogil:
    cdef Py_ssize_t _strip, end = (n_strips - 1) * STRIP, step = STRIP
    if grad_goes_back(grad_x, dy, x, each, stream):
        dy += end
        x += end
        grad_x += end
        coefs += each * end
        step = -STRIP
    for _strip in range(n_strips):
        if stream or grad_x_ahead:
            prefetch_strip(dy + dy_ahead, stream)
            prefetch_strip(x + x_ahead, stream)
        if grad_x_ahead and not stream:
            prefetch_strip_write(grad_x + grad_x_ahead)
        grad_affine_strip(dy, x, STRIP, coefs, relu, training, stream, grad_x)
        dy += step
        x += step
        grad_x += step
        coefs += each * step


cdef inline void grad_affine_runs_as(
    const floating* dy, Py_ssize_t dy_stride, Py_ssize_t dy_ahead,
    const floating* x, Py_ssize_t x_stride, Py_ssize_t x_ahead, Py_ssize_t n_runs, Py_ssize_t length, Py_ssize_t width,
    const floating* coefs, bint relu, bint training, bint stream,
    floating* grad_x, Py_ssize_t grad_x_stride, Py_ssize_t grad_x_ahead,
) noexcept nogil:
    cdef Py_ssize_t i, j, n, _run
    for _run in range(n_runs):
        i = j = 0
        if stream:
            i = begin_stream(grad_x, length, grad_x_ahead)
        elif length > width:  # several rows
            i = min(length, before_line(grad_x))
        if i:
            grad_affine_rest(dy, x, i, coefs, relu, training, grad_x)
            j = next_column(0, i, width)
        while i + STRIP <= length:
            n = strips_ahead(j, width, length - i)
            if stream:
                grad_affine_strips(dy + i, dy_ahead, x + i, x_ahead, n, coefs + j, 1, relu, training, True,
                                   grad_x + i, grad_x_ahead)
            elif grad_x_ahead:
                grad_affine_strips(dy + i, dy_ahead, x + i, x_ahead, n, coefs + j, 1, relu, training, False,
                                   grad_x + i, grad_x_ahead)
            else:
                grad_affine_strips(dy + i, 0, x + i, 0, n, coefs + j, 1, relu, training, False, grad_x + i, 0)
            i += n * STRIP
            j = next_column(j, n * STRIP, width)
        grad_affine_rest(dy + i, x + i, length - i, coefs + j, relu, training, grad_x + i)
        dy += dy_stride
        x += x_stride
        grad_x += grad_x_stride


cdef void grad_affine_runs(
    const floating* dy, Py_ssize_t dy_stride, Py_ssize_t dy_ahead,
    const floating* x, Py_ssize_t x_stride, Py_ssize_t x_ahead, Py_ssize_t n_runs, Py_ssize_t length, Py_ssize_t width,
    const floating* coefs, bint relu, bint training, bint stream,
    floating* grad_x, Py_ssize_t grad_x_stride, Py_ssize_t grad_x_ahead,
) noexcept nogil:
    """Runs that lie apart, each of them contiguous, as rows of `width`, the last of them perhaps shorter."""
    if relu and training:
        grad_affine_runs_as(dy, dy_stride, dy_ahead, x, x_stride, x_ahead, n_runs, length, width, coefs, True, True,
                            stream, grad_x, grad_x_stride, grad_x_ahead)
    elif relu:
        grad_affine_runs_as(dy, dy_stride, dy_ahead, x, x_stride, x_ahead, n_runs, length, width, coefs, True, False,
                            stream, grad_x, grad_x_stride, grad_x_ahead)
    elif training:
        grad_affine_runs_as(dy, dy_stride, dy_ahead, x, x_stride, x_ahead, n_runs, length, width, coefs, False, True,
                            stream, grad_x, grad_x_stride, grad_x_ahead)
    else:
        grad_affine_runs_as(dy, dy_stride, dy_ahead, x, x_stride, x_ahead, n_runs, length, width, coefs, False, False,
                            stream, grad_x, grad_x_stride, grad_x_ahead)


cdef inline void grad_affine_channels_as(
    const floating* dy, Py_ssize_t dy_ahead, const floating* x, Py_ssize_t x_ahead,
    Py_ssize_t channels, Py_ssize_t inner, const floating* coefs, bint relu, bint training, bint stream,
    floating* grad_x, Py_ssize_t grad_x_ahead,
) noexcept nogil:
    cdef Py_ssize_t n, length = channels * inner
    cdef Py_ssize_t i = min(length, begin_stream(grad_x, length, 0) if stream else before_line(grad_x))
    cdef Py_ssize_t left = inner - i  # of the channel
    grad_affine_rest(dy, x, i, coefs, relu, training, grad_x)
    while i + STRIP <= length:
        n = left // STRIP
        if stream:
            grad_affine_strips(dy + i, dy_ahead, x + i, x_ahead, n, coefs, 0, relu, training, True,
                               grad_x + i, grad_x_ahead)
        elif grad_x_ahead:
            grad_affine_strips(dy + i, dy_ahead, x + i, x_ahead, n, coefs, 0, relu, training, False,
                               grad_x + i, grad_x_ahead)
        else:
            grad_affine_strips(dy + i, 0, x + i, 0, n, coefs, 0, relu, training, False, grad_x + i, 0)
        i += n * STRIP
        left -= n * STRIP
        if i + STRIP <= length:
            grad_affine_strips(dy + i, dy_ahead, x + i, x_ahead, 1, coefs + LANES - left, 0, relu, training, stream,
                               grad_x + i, grad_x_ahead)
            i += STRIP
            left += inner - STRIP
            coefs += LANES
    grad_affine_rest(dy + i, x + i, length - i, coefs, relu, training, grad_x + i)


cdef void grad_affine_channels(
    const floating* dy, Py_ssize_t dy_ahead, const floating* x, Py_ssize_t x_ahead,
    Py_ssize_t channels, Py_ssize_t inner,
    const floating* coefs,     # IN   each channel's LANES times
    bint relu, bint training, bint stream, floating* grad_x, Py_ssize_t grad_x_ahead,
) noexcept nogil:
    """Channels that lie one behind the other, as one run: a strip may run over the end of a channel."""
    if relu and training:
        grad_affine_channels_as(dy, dy_ahead, x, x_ahead, channels, inner, coefs, True, True, stream,
                                grad_x, grad_x_ahead)
    elif relu:
        grad_affine_channels_as(dy, dy_ahead, x, x_ahead, channels, inner, coefs, True, False, stream,
                                grad_x, grad_x_ahead)
    elif training:
        grad_affine_channels_as(dy, dy_ahead, x, x_ahead, channels, inner, coefs, False, True, stream,
                                grad_x, grad_x_ahead)
    else:
        grad_affine_channels_as(dy, dy_ahead, x, x_ahead, channels, inner, coefs, False, False, stream,
                                grad_x, grad_x_ahead)


cdef inline void grad_affine_rows_as(
    const floating* dy, Py_ssize_t dy_stride, Py_ssize_t dy_ahead, const floating* x, Py_ssize_t x_stride,
    Py_ssize_t x_ahead, Py_ssize_t n_rows, Py_ssize_t width, const floating* coefs, bint relu, bint training,
    floating* grad_x, Py_ssize_t grad_x_stride, Py_ssize_t grad_x_ahead,
) noexcept nogil:
    cdef Py_ssize_t begin = before_line(grad_x) if on_lines(grad_x, grad_x_stride, width) else 0
    cdef Py_ssize_t n_strips = (width - begin) // STRIP, end = begin + n_strips * STRIP, _row
    for _row in range(n_rows):
        if begin:
            grad_affine_rest(dy, x, begin, coefs, relu, training, grad_x)
        if grad_x_ahead:
            grad_affine_strips(dy + begin, dy_ahead, x + begin, x_ahead, n_strips, coefs + begin, 1, relu, training,
                               False, grad_x + begin, grad_x_ahead)
        else:
            grad_affine_strips(dy + begin, 0, x + begin, 0, n_strips, coefs + begin, 1, relu, training, False,
                               grad_x + begin, 0)
        if end < width:
            grad_affine_rest(dy + end, x + end, width - end, coefs + end, relu, training, grad_x + end)
        dy += dy_stride
        x += x_stride
        grad_x += grad_x_stride


cdef void grad_affine_rows(
    const floating* dy, Py_ssize_t dy_stride, Py_ssize_t dy_ahead, const floating* x, Py_ssize_t x_stride,
    Py_ssize_t x_ahead, Py_ssize_t n_rows, Py_ssize_t width, const floating* coefs, bint relu, bint training,
    floating* grad_x, Py_ssize_t grad_x_stride, Py_ssize_t grad_x_ahead,
) noexcept nogil:
    """Rows that lie apart, through the caches."""
    if relu and training:
        grad_affine_rows_as(dy, dy_stride, dy_ahead, x, x_stride, x_ahead, n_rows, width, coefs, True, True,
                            grad_x, grad_x_stride, grad_x_ahead)
    elif relu:
        grad_affine_rows_as(dy, dy_stride, dy_ahead, x, x_stride, x_ahead, n_rows, width, coefs, True, False,
                            grad_x, grad_x_stride, grad_x_ahead)
    elif training:
        grad_affine_rows_as(dy, dy_stride, dy_ahead, x, x_stride, x_ahead, n_rows, width, coefs, False, True,
                            grad_x, grad_x_stride, grad_x_ahead)
    else:
        grad_affine_rows_as(dy, dy_stride, dy_ahead, x, x_stride, x_ahead, n_rows, width, coefs, False, False,
                            grad_x, grad_x_stride, grad_x_ahead)


cdef inline void grad_affine_joined_as(
    const floating* dy, Py_ssize_t dy_stride, Py_ssize_t dy_ahead, const floating* x, Py_ssize_t x_stride,
    Py_ssize_t x_ahead, Py_ssize_t n_rows, Py_ssize_t width, const floating* coefs, bint relu, bint training,
    floating* grad_x,
) noexcept nogil:
    cdef floating dy_both[2 * STRIP]
    cdef floating x_both[2 * STRIP]
    cdef Py_ssize_t n, rest = 0, start = before_line(grad_x), row
    if n_rows == 0:
        return
    grad_affine_rest(dy, x, start, coefs, relu, training, grad_x)
    for row in range(1, n_rows + 1):
        n = (width - start) // STRIP
        rest = (width - start) % STRIP
        grad_affine_strips(dy + start, dy_ahead, x + start, x_ahead, n, coefs + start, 1, relu, training, True,
                           grad_x + start, 0)
        start += n * STRIP
        if rest and row < n_rows:
            grad_affine_strip(join(dy + width, rest, dy + dy_stride, dy_both),
                              join(x + width, rest, x + x_stride, x_both), STRIP, coefs + start,
                              relu, training, True, grad_x + start)
            start += STRIP
        dy += dy_stride
        x += x_stride
        grad_x += width
        start -= width
    n = width - rest
    grad_affine_rest(dy - dy_stride + n, x - x_stride + n, rest, coefs + n, relu, training, grad_x - rest)


cdef void grad_affine_joined(
    const floating* dy, Py_ssize_t dy_stride, Py_ssize_t dy_ahead, const floating* x, Py_ssize_t x_stride,
    Py_ssize_t x_ahead, Py_ssize_t n_rows, Py_ssize_t width, const floating* coefs, bint relu, bint training,
    floating* grad_x,
) noexcept nogil:
    """Rows that lie apart, past the caches to rows that do not."""
    if relu and training:
        grad_affine_joined_as(dy, dy_stride, dy_ahead, x, x_stride, x_ahead, n_rows, width, coefs, True, True, grad_x)
    elif relu:
        grad_affine_joined_as(dy, dy_stride, dy_ahead, x, x_stride, x_ahead, n_rows, width, coefs, True, False, grad_x)
    elif training:
        grad_affine_joined_as(dy, dy_stride, dy_ahead, x, x_stride, x_ahead, n_rows, width, coefs, False, True, grad_x)
    else:
        grad_affine_joined_as(dy, dy_stride, dy_ahead, x, x_stride, x_ahead, n_rows, width, coefs, False, False, grad_x)


cdef inline void grad_affine_loaded(
    const floating* dy, const floating* x, const floating* coefs, bint relu, const floating* center,
    const floating* slope, const floating* shift, const floating* rest, const floating* factor, floating* grad_x,
) noexcept nogil:
    """A strip in training, whose coefficients are in registers, but for those of the gate."""
    cdef floating strip[STRIP]
    cdef floating g
    cdef Py_ssize_t j
    for j in range(STRIP):
        g = gate(dy[j], x[j], coefs + j, relu)
        g = ((g - shift[j]) - rest[j]) - (x[j] - center[j]) * slope[j]
        strip[j] = factor[j] * g
    put_strip(grad_x, strip, STRIP, False)


cdef inline void grad_affine_pair(
    const floating* dy,        # IN   a strip of two rows, one behind the other
    const floating* x,         # IN   likewise
    Py_ssize_t width, const floating* coefs, bint relu,
    floating* grad_x,          # OUT  may be dy
) noexcept nogil:
    cdef floating center[STRIP]
    cdef floating slope[STRIP]
    cdef floating shift[STRIP]
    cdef floating rest[STRIP]
    cdef floating factor[STRIP]
    cdef Py_ssize_t r, j
    for j in range(STRIP):
        center[j] = coefs[CENTER + j]
        slope[j] = coefs[SLOPE + j]
        shift[j] = coefs[SHIFT + j]
        rest[j] = coefs[REST + j]
        factor[j] = coefs[FACTOR + j]
    for r in range(2):
        grad_affine_loaded(dy + r * width, x + r * width, coefs, relu, center, slope, shift, rest, factor,
                           grad_x + r * width)


cdef inline void grad_affine_pairs_as(
    const floating* dy, const floating* x, Py_ssize_t n_pairs, Py_ssize_t width, const floating* coefs, bint relu,
    bint near, floating* grad_x,
) noexcept nogil:
    cdef Py_ssize_t r, j, first = 0, step = STRIP, _pair, _strip
    if grad_goes_back(grad_x, dy, x, 1, False):
        first, step = width - STRIP, -STRIP
    for _pair in range(n_pairs):
        j = first
        for _strip in range(width // STRIP):
            for r in range(0 if near else 2):
                prefetch_strip(dy + j + r * width + AHEAD, False)
                prefetch_strip(x + j + r * width + AHEAD, False)
                prefetch_strip_write(grad_x + j + r * width + AHEAD)
            grad_affine_pair(dy + j, x + j, width, coefs + j, relu, grad_x + j)
            j += step
        dy += 2 * width
        x += 2 * width
        grad_x += 2 * width


cdef void grad_affine_pairs(
    const floating* dy, const floating* x, Py_ssize_t n_pairs, Py_ssize_t width, const floating* coefs, bint relu,
    bint near, floating* grad_x,
) noexcept nogil:
    if relu and near:
        grad_affine_pairs_as(dy, x, n_pairs, width, coefs, True, True, grad_x)
    elif relu:
        grad_affine_pairs_as(dy, x, n_pairs, width, coefs, True, False, grad_x)
    elif near:
        grad_affine_pairs_as(dy, x, n_pairs, width, coefs, False, True, grad_x)
    else:
        grad_affine_pairs_as(dy, x, n_pairs, width, coefs, False, False, grad_x)


cdef inline void grad_affine_held_as(
    const floating* dy, const floating* x, Py_ssize_t n_rows, const floating* coefs, bint relu, floating* grad_x,
) noexcept nogil:
    cdef floating center[HELD]
    cdef floating slope[HELD]
    cdef floating shift[HELD]
    cdef floating rest[HELD]
    cdef floating factor[HELD]
    cdef Py_ssize_t j, k, _row
    memcpy(center, coefs + CENTER, HELD * sizeof(floating))
    memcpy(slope, coefs + SLOPE, HELD * sizeof(floating))
    memcpy(shift, coefs + SHIFT, HELD * sizeof(floating))
    memcpy(rest, coefs + REST, HELD * sizeof(floating))
    memcpy(factor, coefs + FACTOR, HELD * sizeof(floating))
    for _row in range(n_rows):
        for k in range(HELD // STRIP):
            j = k * STRIP
            grad_affine_loaded(dy + j, x + j, coefs + j, relu, center + j, slope + j, shift + j, rest + j,
                               factor + j, grad_x + j)
        dy += HELD
        x += HELD
        grad_x += HELD


cdef void grad_affine_held(
    const floating* dy, const floating* x, Py_ssize_t n_rows, const floating* coefs, bint relu, floating* grad_x,
) noexcept nogil:
    """Rows of HELD columns, one behind the other, with the coefficients in registers."""
    if relu:
        grad_affine_held_as(dy, x, n_rows, coefs, True, grad_x)
    else:
        grad_affine_held_as(dy, x, n_rows, coefs, False, grad_x)


cdef inline void grad_affine_run(
    const floating* dy, Py_ssize_t dy_ahead, const floating* x, Py_ssize_t x_ahead, Py_ssize_t length,
    Py_ssize_t width,
    bint held,                 # IN   whether rows of HELD columns may go through grad_affine_held
    const floating* coefs, bint relu, bint training, bint stream, floating* grad_x, Py_ssize_t grad_x_ahead,
) noexcept nogil:
    cdef Py_ssize_t n, begin, done
    held = held and training and not stream and not grad_goes_back(grad_x, dy, x, 1, False)
    n = count_held(grad_x, length) if held else count_pairs(grad_x, length, width, stream or not training)
    begin = before_line(grad_x) if n > 0 else 0
    done = begin + n * (HELD if held else 2 * width)
    if n > 0:
        grad_affine_rest(dy, x, begin, coefs, relu, training, grad_x)
    if n > 0 and held:
        grad_affine_held(dy + begin, x + begin, n, coefs + begin, relu, grad_x + begin)
    elif n > 0:
        grad_affine_pairs(dy + begin, x + begin, n, width, coefs + begin, relu, grad_x_ahead == 0, grad_x + begin)
    grad_affine_runs(dy + done, 0, dy_ahead, x + done, 0, x_ahead, 1, length - done, width, coefs + begin, relu,
                     training, stream, grad_x + done, 0, grad_x_ahead)


cdef void grad_affine_task(
    const floating* dy, Py_ssize_t dy_stride, const floating* x, Py_ssize_t x_stride,
    const Plan* plan, const Band* band, Py_ssize_t chunk, Py_ssize_t tile,
    const floating* channel_coefs,  # IN   (3, channels): center, scale, offset
    const floating* linear,         # IN   (4, channels): factor, slope, shift, rest
    bint relu, bint training, bint stream,
    floating* grad_x, Py_ssize_t grad_x_stride,
) noexcept nogil:
    cdef floating memory[7 * PITCH + 2 * STRIP]
    cdef floating dy_buffer[ROWS * TILE]
    cdef floating x_buffer[ROWS * TILE]
    cdef Py_ssize_t c0 = band.c0 + tile * band.tile
    cdef Py_ssize_t channels = min(band.tile, band.c1 - c0)
    cdef Py_ssize_t width = channels * plan.repeat, step = ROWS * plan.fold
    cdef Py_ssize_t segment = channels * plan.inner if plan.by_inner else width
    cdef Py_ssize_t dy_ahead = lead(dy_stride, segment, stream), x_ahead = lead(x_stride, segment, stream)
    cdef bint fetches = fetches_ahead(is_near(plan, sizeof(floating)), stream)
    cdef Py_ssize_t grad_x_ahead = lead(grad_x_stride, segment, False) if fetches else 0
    cdef Py_ssize_t index, r, c, i, n
    cdef bint stream_rows = stream and (plan.fold == 1 or has_whole_lines(grad_x, grad_x_stride))
    cdef bint one_run = not plan.by_inner and dy_stride == width and x_stride == width and grad_x_stride == width
    cdef bint joined = stream and not stream_rows and grad_x_stride == width
    cdef bint held = holds_coefs(plan, width, sizeof(floating))
    cdef bint aligned = not plan.by_inner and (one_run or joined or on_lines(grad_x, grad_x_stride, width))
    cdef floating* coefs = place_coefs(memory, before_line(grad_x + c0 * plan.inner) if aligned else 0)
    cdef Block block
    # Without a gate, the center alone: 8x512 0.94 of the time, 64x512 and 2000x3 0.97, 256x512 0.99.
    spread_rows(channel_coefs, 3 if relu else 1, plan, plan.fold, c0, channels, coefs)
    spread_rows(linear, 4, plan, plan.fold, c0, channels, coefs + FACTOR)
    dy += c0 * plan.inner
    x += c0 * plan.inner
    grad_x += c0 * plan.inner
    for index in range(chunk * plan.chunk, min((chunk + 1) * plan.chunk, plan.n_blocks)):
        block = block_within(plan, index, band)
        if plan.by_inner:
            n = channels if block.length == plan.inner else 1  # channels that lie one behind the other
            for r in range(block.row, block.row + block.n_rows):
                for c in range(channels // n):
                    i = c * plan.inner + block.start
                    grad_affine_channels(dy + r * dy_stride + i, dy_ahead, x + r * x_stride + i, x_ahead,
                                         n, block.length, coefs + c * LANES, relu, training, stream,
                                         grad_x + r * grad_x_stride + i, grad_x_ahead)
        elif one_run:
            i = block.row * width
            grad_affine_run(dy + i, dy_ahead, x + i, x_ahead, block.n_rows * width, plan.fold * width, held, coefs,
                            relu, training, stream, grad_x + i, grad_x_ahead)
        elif width < NARROW and grad_x_stride == width:
            for i in range(ceil_div(block.n_rows, step)):
                r = block.row + i * step
                n = min(step, block.row + block.n_rows - r)
                grad_affine_run(gather(dy + r * dy_stride, dy_stride, n, width, dy_buffer), 0,
                                gather(x + r * x_stride, x_stride, n, width, x_buffer), 0, n * width,
                                plan.fold * width, held, coefs, relu, training, stream, grad_x + r * width,
                                grad_x_ahead)
        elif stream_rows:
            grad_affine_runs(dy + block.row * dy_stride, dy_stride, dy_ahead, x + block.row * x_stride, x_stride,
                             x_ahead, block.n_rows, width, width, coefs, relu, training, True,
                             grad_x + block.row * grad_x_stride, grad_x_stride, grad_x_ahead)
        elif joined:
            grad_affine_joined(dy + block.row * dy_stride, dy_stride, dy_ahead, x + block.row * x_stride, x_stride,
                               x_ahead, block.n_rows, width, coefs, relu, training, grad_x + block.row * width)
        else:
            grad_affine_rows(dy + block.row * dy_stride, dy_stride, dy_ahead, x + block.row * x_stride, x_stride,
                             x_ahead, block.n_rows, width, coefs, relu, training,
                             grad_x + block.row * grad_x_stride, grad_x_stride, grad_x_ahead)


# ---------------------------------------------------------------------------------------------------------------------
# Workers: what one thread of the team does. Where tiles divide about evenly (of columns, two a thread or more) and are
# not strips of many rows, a thread has its own and takes them one by one from the first pass to the last: nobody waits,
# and a tile that fits its cache is read from memory once (32x256x14x14: 18 %). Otherwise the threads share all tiles,
# and wait for each other between the passes, two of them once (what is between, each does for itself); but for the sums
# a thread has its own columns where tasks are too few to divide about evenly. If there are chunks enough, a thread gets
# about the same data in both passes, in the second in reverse order.
# ---------------------------------------------------------------------------------------------------------------------

cdef struct Part:
    Py_ssize_t c0          # the channels from here
    Py_ssize_t c1          # up to here
    Py_ssize_t tile        # so many a task
    Py_ssize_t n_tiles
    int rank               # this thread's number among the
    int size               # threads that share the part


cdef inline Py_ssize_t first_tile(const Plan* plan, int rank) noexcept nogil:
    return plan.n_tiles * rank // team_size()


cdef inline Py_ssize_t tile_column(const Plan* plan, Py_ssize_t tile) noexcept nogil:
    """Where a thread's own tile begins."""
    return 0 if tile == 0 else plan.channels if tile == plan.n_tiles else tile * plan.tile - plan.early


cdef inline void begin_with_lines(Plan* plan, const floating* y, Py_ssize_t stride) noexcept nogil:
    """Let a thread's own tiles of columns begin with a line of the output, if all of its rows begin at the same place
    of one: then threads share none, and a row of a tile is whole strips. Zen 3, AVX2, two threads, arrays that begin 16
    bytes into a line: affine of 32x4096 0.88 to 0.95 of the time, of 64x2048 0.86 to 0.96, inference 0.92 to 0.97,
    forward 0.95 to 0.98, backward 0.9 to 0.98."""
    if not plan.by_inner and plan.repeat == 1 and before_line(y) == before_line(y + stride):
        plan.early = <Py_ssize_t>(<uintptr_t>y % LINE // sizeof(floating))


cdef inline Py_ssize_t first_column(const Plan* plan, int rank) noexcept nogil:
    """A whole number of strips, so that the bits do not depend on the threads."""
    cdef Py_ssize_t n = HELD if plan.held else STRIP
    return min(ceil_div(plan.channels, n) * rank // team_size() * n, plan.channels)


cdef inline Py_ssize_t n_parts(const Plan* plan) noexcept nogil:
    """How many parts this thread takes, one after the other."""
    return first_tile(plan, team_rank() + 1) - first_tile(plan, team_rank()) if has_own_tiles(plan, team_size()) else 1


cdef inline Part part_of(Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t tile, int rank, int size) noexcept nogil:
    cdef Part part
    part.c0, part.c1, part.rank, part.size = c0, c1, rank, size
    part.tile, part.n_tiles = tile, ceil_div(c1 - c0, tile)
    return part


cdef inline Part part_at(const Plan* plan, Py_ssize_t index, bint sums) noexcept nogil:
    """Of the sums and what follows them channel by channel, or of an elementwise pass."""
    cdef Py_ssize_t c0, c1, tile
    if has_own_tiles(plan, team_size()):
        tile = first_tile(plan, team_rank()) + index
        c0, c1 = tile_column(plan, tile), tile_column(plan, tile + 1)
        return part_of(c0, c1, c1 - c0, 0, 1)
    if sums and divides_columns(plan, team_size()):
        return part_of(first_column(plan, team_rank()), first_column(plan, team_rank() + 1), plan.tile, 0, 1)
    return part_of(0, plan.channels, plan.tile, team_rank(), team_size())


cdef inline Py_ssize_t share(Py_ssize_t n, const Part* part, int further) noexcept nogil:
    """Where this thread's share of n things begins; with further = 1, where it ends."""
    return n * (part.rank + further) // part.size


cdef inline Py_ssize_t channel_share(const Part* part, int further) noexcept nogil:
    """The same for the part's channels."""
    return part.c0 + share(part.c1 - part.c0, part, further)


cdef inline Band band_of(const Plan* plan, const Part* part) noexcept nogil:
    """Its tasks of the first pass; but of columns, with rows enough, its share of the rows: threads that write the same
    rows take lines from each other, for the processor fetches ahead over the end of a tile (128x1024, which has two:
    46 us instead of 15, and 21 on one thread)."""
    cdef Band band
    cdef Py_ssize_t rows = plan.chunk * plan.block_outer
    band.c0, band.c1 = part.c0, part.c1
    if plan.by_inner or plan.outer < MANY_ROWS * part.size:
        band.tile, band.n_tiles = part.tile, part.n_tiles
        band.row, band.end = 0, plan.outer
        band.first = share(plan.n_chunks * part.n_tiles, part, 0)
        band.last = share(plan.n_chunks * part.n_tiles, part, 1)
    else:
        band.tile = WIDE // plan.repeat
        band.n_tiles = ceil_div(band.c1 - band.c0, band.tile)
        band.row, band.end = share(plan.outer, part, 0), share(plan.outer, part, 1)
        band.first = band.row // rows * band.n_tiles
        band.last = ceil_div(band.end, rows) * band.n_tiles
    return band


cdef inline void claim_edges(
    const floating* x, const floating* y, Py_ssize_t stride, const Plan* plan, const Part* part, Py_ssize_t index,
) noexcept nogil:
    """Where rows do not begin with a line, fetch to write the lines that hold the ends of this thread's own tile, and
    what the thread beside it fetched behind its own. On two threads: forward of 100x2000 0.8 to 0.9 of the time, of
    64x2048 0.85 to 0.98, of 32x4096 0.93 to 1.01; from 1 MB on, of the backward and at inference up to 1.1."""
    cdef Py_ssize_t r, i, n_lines
    if team_size() == 1 or plan.by_inner or not has_own_tiles(plan, team_size()) or not is_near(plan, sizeof(floating)):
        return
    n_lines = EDGE_LINES if index == 0 and not goes_back(y, x, 1, False) else 1
    for r in range(0 if has_whole_lines(y, stride) else plan.outer):
        for i in range(n_lines):
            prefetch_write(<const char*>(y + r * stride + part.c0 * plan.inner) + i * LINE)
        prefetch_write(y + r * stride + part.c1 * plan.inner - 1)


cdef inline void wait_for_others(const Part* part) noexcept nogil:
    """OpenMP's barrier, in which who waits long sleeps. With a flag of each thread's own, which others watch, 64x1024
    took 0.97 of the time, 16384x64 0.99, but beside a busy process 16384x64 2.5 times as long, 4096x1024 1.8 times."""
    if part.size > 1:
        team_barrier()


# Partial results merge as a binary tree: chunk 1 into 0, 3 into 2, then 2 into 0, and so on. A thread merges at once
# what it has summed itself; what is of several threads waits for all of them. When all merged in the order of the
# chunks, half of them came from the other core: moments of 8192x512 took 1.3 times as long, forward of 4096x256 1.16.

cdef inline Py_ssize_t owner(const Plan* plan, const Part* part, Py_ssize_t chunk, Py_ssize_t tile) noexcept nogil:
    """Which of the part's threads sums this tile of this chunk; see share."""
    return ((chunk * part.n_tiles + tile + 1) * part.size - 1) // (plan.n_chunks * part.n_tiles)


cdef inline void merge_node(
    const Plan* plan, Py_ssize_t left, Py_ssize_t right, Py_ssize_t end,
    const Moments* first,      # INOUT those of chunk 0; NULL: partial holds the sums of the backward
    double* partial, Py_ssize_t c0, Py_ssize_t c1,
) noexcept nogil:
    cdef Moments a, b
    if first != NULL:
        a, b = moments_of(plan, left, first, partial), moments_of(plan, right, first, partial)
        merge_chunk(plan, left, right, end, &a, &b, c0, c1)
    else:
        add_chunk(plan, partial + SUMS * left * plan.channels, partial + SUMS * right * plan.channels, c0, c1)


cdef void merge_own(
    const Plan* plan, const Part* part, Py_ssize_t chunk, Py_ssize_t tile, const Moments* first, double* partial,
) noexcept nogil:
    """What this chunk, just summed, completes of the tree and this thread has summed alone."""
    cdef Py_ssize_t left, end, n = 1, c0 = part.c0 + tile * part.tile, c1 = min(c0 + part.tile, part.c1)
    while n < plan.n_chunks:
        left = chunk // (2 * n) * (2 * n)
        end = min(left + 2 * n, plan.n_chunks)
        if chunk + 1 < end or owner(plan, part, left, tile) < part.rank:
            return
        if left + n < end:
            merge_node(plan, left, left + n, end, first, partial, c0, c1)
        n *= 2


cdef void merge_others(const Plan* plan, const Part* part, const Moments* first, double* partial) noexcept nogil:
    """The rest of the tree, for this thread's share of the channels."""
    cdef Py_ssize_t tile, left, end, n, c0, c1
    for tile in range(part.n_tiles if part.size > 1 else 0):
        c0 = part.c0 + tile * part.tile
        c1 = min(c0 + part.tile, channel_share(part, 1))
        c0 = max(c0, channel_share(part, 0))
        n = 1
        while c0 < c1 and n < plan.n_chunks:
            left = 0
            while left + n < plan.n_chunks:
                end = min(left + 2 * n, plan.n_chunks)
                if owner(plan, part, left, tile) < owner(plan, part, end - 1, tile):
                    merge_node(plan, left, left + n, end, first, partial, c0, c1)
                left += 2 * n
            n *= 2


cdef inline double* own_rows(const Plan* plan, const Part* part, Py_ssize_t n_rows, double* partial) noexcept nogil:
    """This thread's, behind the n_rows of each chunk, if it merges all channels and computes their coefficients for
    itself, else NULL. Of two threads neither then waits for the other again, nor writes beside it in the same rows,
    where each processor, fetching ahead, takes the other's lines: Zen 4, 256x512 and 128x1024 forward 0.87 of the time,
    backward 0.93 and 0.98, while a line takes 350 ns there and back; while it takes 140 ns, 0.98 to 1.04."""
    return partial + (n_rows * plan.n_chunks + OWN_ROWS * part.rank) * plan.channels if part.size == 2 else NULL


cdef double* merge_alone(
    const Plan* plan, const Part* part, Py_ssize_t tile,
    Py_ssize_t n_rows,         # IN   MOMENTS or SUMS
    double* partial,           # IN   (n_chunks, n_rows, channels): the other thread reads them, too
    Py_ssize_t c0, Py_ssize_t c1,
    double* own,               # (2, n_rows, channels)
) noexcept nogil:
    """Where the rows of all chunks are, for the tile's channels c0 to c1. What two threads have summed together lies on
    one way through the tree, up from the border between their chunks: its nodes go to own, in turns."""
    cdef Py_ssize_t left, right, end, row, n = 1, size = n_rows * plan.channels
    cdef Py_ssize_t border = ceil_div(plan.n_chunks * part.n_tiles // 2 - tile, part.n_tiles)
    cdef double* merged = partial
    cdef double* a = own
    cdef double* b
    cdef Moments of_a, of_b
    while n < plan.n_chunks:
        left = border // (2 * n) * (2 * n)
        right, end = left + n, min(left + 2 * n, plan.n_chunks)
        if left < border < end and right < end:
            b = merged if right < border else partial + right * size
            if right <= border:
                merged = partial + left * size
            for row in range(n_rows):
                memcpy(a + row * plan.channels + c0, merged + row * plan.channels + c0, (c1 - c0) * sizeof(double))
            if n_rows == MOMENTS:
                of_a, of_b = moments_in(plan, a), moments_in(plan, b)
                merge_chunk(plan, left, right, end, &of_a, &of_b, c0, c1)
            else:
                add_chunk(plan, a, b, c0, c1)
            merged, a = a, own + (size if a == own else 0)
        n *= 2
    return merged


cdef void moments_part(
    const floating* x, Py_ssize_t stride, const Plan* plan, const Part* part,
    const Moments* first,      # OUT  of chunk 0
    double* partial,           # (n_chunks, 3, channels): of the other chunks
) noexcept nogil:
    cdef Py_ssize_t task, chunk, tile, c0, n_tasks = plan.n_chunks * part.n_tiles
    cdef Moments own
    for task in range(share(n_tasks, part, 0), share(n_tasks, part, 1)):
        chunk, tile = task // part.n_tiles, task % part.n_tiles
        c0 = part.c0 + tile * part.tile
        own = moments_of(plan, chunk, first, partial)
        moments_task(x, stride, plan, chunk, c0, min(part.tile, part.c1 - c0), own.mean, own.rest, own.m2)
        merge_own(plan, part, chunk, tile, first, partial)
    wait_for_others(part)


cdef void affine_part(
    const floating* x, Py_ssize_t stride, const Plan* plan, const Part* part, const floating* coefs, bint relu,
    bint stream, floating* y, Py_ssize_t y_stride,
) noexcept nogil:
    cdef Py_ssize_t task
    cdef Band band = band_of(plan, part)
    # Backwards: what moments_part read last is still in the cache.
    for task in range(band.last - 1, band.first - 1, -1):
        affine_task(x, stride, plan, &band, task // band.n_tiles, task % band.n_tiles, coefs, relu, stream, y, y_stride)


cdef void grad_moments_part(
    const floating* dy, Py_ssize_t dy_stride, const floating* x, Py_ssize_t x_stride, const Plan* plan,
    const Part* part, const double* mean, const floating* coefs, bint relu,
    double* partial,           # OUT  (n_chunks, 2, channels): sum_dy, sum_dy_xmu
) noexcept nogil:
    cdef Py_ssize_t task, chunk, tile, c0, n_tasks = plan.n_chunks * part.n_tiles
    cdef double* sum_dy
    for task in range(share(n_tasks, part, 0), share(n_tasks, part, 1)):
        chunk, tile = task // part.n_tiles, task % part.n_tiles
        c0 = part.c0 + tile * part.tile
        sum_dy = partial + SUMS * chunk * plan.channels
        grad_moments_task(dy, dy_stride, x, x_stride, plan, chunk, c0, min(part.tile, part.c1 - c0), mean, coefs, relu,
                          sum_dy, sum_dy + plan.channels)
        merge_own(plan, part, chunk, tile, NULL, partial)
    wait_for_others(part)


cdef void grad_affine_part(
    const floating* dy, Py_ssize_t dy_stride, const floating* x, Py_ssize_t x_stride, const Plan* plan,
    const Part* part, const floating* coefs, const floating* linear, bint relu, bint training, bint stream,
    floating* grad_x, Py_ssize_t grad_x_stride,
) noexcept nogil:
    cdef Py_ssize_t task
    cdef Band band = band_of(plan, part)
    for task in range(band.last - 1, band.first - 1, -1):
        grad_affine_task(dy, dy_stride, x, x_stride, plan, &band, task // band.n_tiles, task % band.n_tiles,
                         coefs, linear, relu, training, stream, grad_x, grad_x_stride)


cdef void moments_worker(
    const floating* x, Py_ssize_t stride, const Plan* plan, const Moments* total, double* partial,
) noexcept nogil:
    cdef Py_ssize_t index, c0
    cdef Part part
    for index in range(n_parts(plan)):
        part = part_at(plan, index, True)
        moments_part(x, stride, plan, &part, total, partial)
        merge_others(plan, &part, total, partial)
        c0 = channel_share(&part, 0)
        settle(total.mean + c0, total.rest + c0, channel_share(&part, 1) - c0)


cdef void affine_worker(
    const floating* x, Py_ssize_t stride, const Plan* plan, const floating* coefs, bint relu, bint stream,
    floating* y, Py_ssize_t y_stride,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef Part part
    for index in range(n_parts(plan)):
        part = part_at(plan, index, False)
        affine_part(x, stride, plan, &part, coefs, relu, stream, y, y_stride)
    if stream:
        stream_end()  # after each task it took 5 % of 32x64x56x56


cdef void batch_norm_worker(
    const floating* x, Py_ssize_t stride, const Plan* plan,
    const floating* gamma, const floating* beta, double eps, bint relu, bint stream,
    double* partial, double* stats, floating* coefs, floating* y, Py_ssize_t y_stride,
) noexcept nogil:
    cdef Py_ssize_t index, row, tile, c0, c1
    cdef double n = <double>plan.outer * plan.inner
    cdef double* own
    cdef Part part
    cdef Moments merged, total = moments_in(plan, partial)
    for index in range(n_parts(plan)):
        part = part_at(plan, index, True)
        own = own_rows(plan, &part, MOMENTS, partial)
        if own == NULL:
            c0, c1 = channel_share(&part, 0), channel_share(&part, 1)
            # Of its own tiles, too: processors fetch over their ends. Zen 4, two threads: forward of 64x1024 0.9 to
            # 0.97 of the time, 32x4096 and 8x4096 0.91 to 0.98.
            for row in range(COEFFICIENTS if team_size() > 1 else 0):
                claim(coefs + row * plan.channels + c0, c1 - c0)
        elif part.rank > 0:  # the first thread writes the caller's
            stats, coefs = NULL, <floating*>(own + 2 * MOMENTS * plan.channels)
        claim_edges(x, y, y_stride, plan, &part, index)
        moments_part(x, stride, plan, &part, &total, partial)
        if own == NULL:
            merge_others(plan, &part, &total, partial)
            normalize_channels(plan, c0, c1, total.mean, total.rest, total.m2, n, gamma, beta, eps, stats, coefs)
            part = part_at(plan, index, False)
            wait_for_others(&part)
        else:
            for tile in range(part.n_tiles):
                c0, c1 = tile * plan.tile, min((tile + 1) * plan.tile, plan.channels)
                merged = moments_in(plan, merge_alone(plan, &part, tile, MOMENTS, partial, c0, c1, own))
                normalize_channels(plan, c0, c1, merged.mean, merged.rest, merged.m2, n, gamma, beta, eps, stats, coefs)
        affine_part(x, stride, plan, &part, coefs, relu, stream, y, y_stride)
    if stream:
        stream_end()


cdef void inference_worker(
    const floating* x, Py_ssize_t stride, const Plan* plan, const double* mean, const double* var,
    const floating* gamma, const floating* beta, double eps, bint relu, bint stream,
    double* stats,             # OUT  or NULL
    floating* coefs,           # OUT
    floating* copies,          # (team - 1, COEFFICIENTS, channels): of coefs
    floating* y, Py_ssize_t y_stride,
) noexcept nogil:
    """Where threads share channels, each computes the coefficients of all, the first for the caller too: to wait
    for the others and take theirs took longer (64x512 1.1 times, 256x512 1.03 to 1.2, 4096x256 and 2048x1024 1.04)."""
    cdef Py_ssize_t index
    cdef Part part
    for index in range(n_parts(plan)):
        part = part_at(plan, index, False)
        if part.rank > 0:
            stats, coefs = NULL, copies + (part.rank - 1) * COEFFICIENTS * plan.channels
        normalize_channels(plan, part.c0, part.c1, mean, NULL, var, 1, gamma, beta, eps, stats, coefs)
        affine_part(x, stride, plan, &part, coefs, relu, stream, y, y_stride)
    if stream:
        stream_end()


cdef void grad_moments_worker(
    const floating* dy, Py_ssize_t dy_stride, const floating* x, Py_ssize_t x_stride, const Plan* plan,
    const double* mean, const floating* coefs, bint relu, double* partial,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef Part part
    for index in range(n_parts(plan)):
        part = part_at(plan, index, True)
        grad_moments_part(dy, dy_stride, x, x_stride, plan, &part, mean, coefs, relu, partial)
        merge_others(plan, &part, NULL, partial)


cdef void grad_affine_worker(
    const floating* dy, Py_ssize_t dy_stride, const floating* x, Py_ssize_t x_stride, const Plan* plan,
    const floating* coefs, const floating* linear, bint relu, bint training, bint stream,
    floating* grad_x, Py_ssize_t grad_x_stride,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef Part part
    for index in range(n_parts(plan)):
        part = part_at(plan, index, False)
        grad_affine_part(dy, dy_stride, x, x_stride, plan, &part, coefs, linear, relu, training, stream,
                         grad_x, grad_x_stride)
    if stream:
        stream_end()


cdef void batch_norm_backward_worker(
    const floating* dy, Py_ssize_t dy_stride, const floating* x, Py_ssize_t x_stride, const Plan* plan,
    const double* stats, const floating* coefs, bint relu, bint training, bint stream,
    double* partial, floating* linear, floating* grads, floating* grad_x, Py_ssize_t grad_x_stride,
) noexcept nogil:
    cdef Py_ssize_t index, tile, c0, c1
    cdef double* own
    cdef double* sum_dy
    cdef Part part
    for index in range(n_parts(plan)):
        part = part_at(plan, index, True)
        own = own_rows(plan, &part, SUMS, partial)
        if own != NULL and part.rank > 0:
            linear = <floating*>(own + 2 * SUMS * plan.channels)
            grads = linear + LINEAR * plan.channels
        grad_moments_part(dy, dy_stride, x, x_stride, plan, &part, stats, coefs, relu, partial)
        if own == NULL:
            merge_others(plan, &part, NULL, partial)
            gradient_channels(plan, channel_share(&part, 0), channel_share(&part, 1),
                              partial, partial + plan.channels, stats, coefs, training, linear, grads)
            part = part_at(plan, index, False)
            wait_for_others(&part)
        else:
            for tile in range(part.n_tiles):
                c0, c1 = tile * plan.tile, min((tile + 1) * plan.tile, plan.channels)
                sum_dy = merge_alone(plan, &part, tile, SUMS, partial, c0, c1, own)
                gradient_channels(plan, c0, c1, sum_dy, sum_dy + plan.channels, stats, coefs, training, linear, grads)
        grad_affine_part(dy, dy_stride, x, x_stride, plan, &part, coefs, linear, relu, training, stream,
                         grad_x, grad_x_stride)
    if stream:
        stream_end()
