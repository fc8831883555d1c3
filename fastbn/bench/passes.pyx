# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The bare memory passes: loads, stores, and no more arithmetic than keeps the loads from being left out.

The arrays are taken as 64-byte lines, those of the output where there is one, in runs of PIECE lines dealt to the
threads; the bytes before the first line and behind the last are left to the calling thread. Rows that lie apart are
taken one by one, in runs of ROWS.
"""
from cython.parallel cimport prange
from libc.stdint cimport uint64_t, uintptr_t
from libc.string cimport memcpy, memset

cdef extern from "machine.h" nogil:
    uintptr_t alias_bytes()
    void prefetch(const void* address)
    void prefetch_far(const void* address)
    void stream_line(void* target, const void* source)
    void stream_end()

# A line is four vectors, at any address. As a structure it went by way of the stack: 4 MB, in L3, took three times as
# long to read.
cdef extern from *:
    """
    #if defined(__GNUC__)
    typedef unsigned long long fastbn_part __attribute__((vector_size(16), aligned(1), may_alias));
    #else
    typedef unsigned long long fastbn_part;
    #endif
    typedef struct { fastbn_part parts[64 / sizeof(fastbn_part)]; } fastbn_line;
    enum { FASTBN_PARTS = 64 / sizeof(fastbn_part) };
    """
    ctypedef unsigned long long Part "fastbn_part"
    ctypedef struct Line "fastbn_line":
        Part[8] parts  # or four
    enum:
        PARTS "FASTBN_PARTS"

# Two threads write one word in turns, which has its line, and the one beside that, for itself.
cdef extern from *:
    """
    static double fastbn_trip(double seconds) {
        double trip = 0;
    #ifdef _OPENMP
        static volatile int memory[96];
        volatile int *turn = memory + 48;
        *turn = 0;
    #pragma omp parallel num_threads(2)
        if (omp_get_num_threads() == 2) {
            if (omp_get_thread_num() == 0) {
                double begin = omp_get_wtime(), spent;
                long n = 0;
                do {
                    *turn = 1;
                    while (*turn == 1) {}
                    n++;
                    spent = omp_get_wtime() - begin;
                } while (spent < seconds);
                *turn = -1;
                trip = spent / n;
            } else {
                int now;
                do {
                    while ((now = *turn) == 0) {}
                    if (now == 1)
                        *turn = 0;
                } while (now == 1);
            }
        }
    #endif
        return trip;
    }
    """
    double fastbn_trip(double seconds) nogil

cdef enum:
    PIECE = 1024          # lines
    GROUP = 32            # lines taken from the last one on, where loads would wait for stores
    ROWS = 128            # that lie apart, dealt to a thread at once
    AHEAD = 64            # lines fetched ahead of large inputs; of small ones none, which is faster in a cache
    FAR_AHEAD = 2 * AHEAD  # into L2, of two inputs: 262144x256 on Zen 4 10 % faster; reads and copies are not,
    # but for copies that go back
    LARGE_BYTES = 1 << 24
    STREAM_BYTES = 20 << 20  # of inputs and output: from here on the output bypasses the caches, as the kernels' does


cdef uint64_t read_lines(const Line* x, Py_ssize_t n, Py_ssize_t ahead) noexcept nogil:
    cdef Part[PARTS] found
    cdef uint64_t[8] words
    cdef uint64_t total = 0
    cdef Py_ssize_t i, j
    memset(found, 0, sizeof(found))
    for i in range(n):
        if ahead:
            prefetch(x + i + ahead)
        for j in range(PARTS):
            found[j] ^= x[i].parts[j]
    memcpy(words, found, sizeof(found))
    for j in range(8):
        total ^= words[j]
    return total


cdef inline bint trails(const void* out, const void* x) noexcept nogil:
    """Whether out lies less than two lines behind x, not counting what the processor does not tell apart: loads would
    wait for the stores before them, unless lines are taken from the last one on, of each GROUP or of all."""
    return (<uintptr_t>out - <uintptr_t>x - 1) & (alias_bytes() - 1) < 2 * sizeof(Line) - 1


cdef inline void copy_line(const Line* x, Line* out) noexcept nogil:
    """All of it is loaded before any is stored, lest loads wait for stores."""
    cdef Part[PARTS] line
    cdef Py_ssize_t j
    for j in range(PARTS):
        line[j] = x.parts[j]
    for j in range(PARTS):
        out.parts[j] = line[j]


cdef void copy_lines(const Line* x, Line* out, Py_ssize_t n, Py_ssize_t ahead, bint stream) noexcept nogil:
    cdef Py_ssize_t group, count, i, j
    cdef bint back = trails(out, x)
    if stream:
        for group in range((n + GROUP - 1) // GROUP):
            count = min(GROUP, n - group * GROUP)
            for j in range(count):
                i = group * GROUP + (count - 1 - j if back else j)
                if back:
                    prefetch_far(x + i + 2 * ahead)
                else:
                    prefetch(x + i + ahead)
                stream_line(out + i, x + i)
    elif back:  # 4 MB on a Sapphire Rapids 0.25 ms, forwards and part by part 1.1
        for i in range(n - 1, -1, -1):
            copy_line(x + i, out + i)
    else:
        for i in range(n):
            copy_line(x + i, out + i)


cdef void combine_lines(const Line* a, const Line* b, Line* out, Py_ssize_t n, bint stream) noexcept nogil:
    cdef Part[PARTS] line
    cdef Py_ssize_t group, count, i, j, k
    cdef bint back = (trails(out, a) or trails(out, b)) and not (trails(a, out) or trails(b, out))
    if stream:
        for group in range((n + GROUP - 1) // GROUP):
            count = min(GROUP, n - group * GROUP)
            for k in range(count):
                i = group * GROUP + (count - 1 - k if back else k)
                prefetch_far(a + i + FAR_AHEAD)
                prefetch_far(b + i + FAR_AHEAD)
                for j in range(PARTS):
                    line[j] = a[i].parts[j] ^ b[i].parts[j]
                stream_line(out + i, line)
        stream_end()
    else:
        for k in range(n):
            i = n - 1 - k if back else k
            for j in range(PARTS):
                line[j] = a[i].parts[j] ^ b[i].parts[j]
            memcpy(out + i, line, sizeof(Line))


cdef Py_ssize_t before_line(const unsigned char[::1] out) noexcept:
    """Bytes before the first whole line."""
    return min(out.shape[0], <Py_ssize_t>(-<uintptr_t>&out[0] % sizeof(Line)))


cdef uint64_t read_some_rows(
    const unsigned char* x, Py_ssize_t stride, Py_ssize_t width, Py_ssize_t n_rows, Py_ssize_t ahead,
) noexcept nogil:
    cdef Py_ssize_t _row
    cdef uint64_t total = 0
    for _row in range(n_rows):
        total ^= read_lines(<const Line*>x, width // <Py_ssize_t>sizeof(Line), ahead)
        x += stride
    return total


cdef inline void take_line(
    const unsigned char* x, Py_ssize_t left, const unsigned char* following, unsigned char* line,
) noexcept nogil:
    """The line that has `left` bytes in a row, and the others in the following one."""
    cdef Py_ssize_t j
    if left % 8 == 0:
        for j in range(8):
            memcpy(line + 8 * j, x + 8 * j if 8 * j < left else following + 8 * j - left, 8)
    else:
        memcpy(line, x, left)
        memcpy(line + left, following, sizeof(Line) - left)


cdef void copy_some_rows(
    const unsigned char* x, Py_ssize_t stride, Py_ssize_t width, unsigned char* out, Py_ssize_t n_rows,
    Py_ssize_t ahead, bint stream,
) noexcept nogil:
    """Rows of x, to out, where they lie one behind the other: by out's lines, which may lie across the end of a row."""
    cdef Line line
    cdef Py_ssize_t n, start = <Py_ssize_t>(-<uintptr_t>out % sizeof(Line))
    memcpy(out, x, start)
    while n_rows > 1:
        n = (width - start) // <Py_ssize_t>sizeof(Line)
        copy_lines(<const Line*>(x + start), <Line*>(out + start), n, ahead, stream)
        start += n * <Py_ssize_t>sizeof(Line)
        if start < width:
            take_line(x + start, width - start, x + stride, <unsigned char*>&line)
            if stream:
                stream_line(out + start, &line)
            else:
                memcpy(out + start, &line, sizeof(Line))
            start += sizeof(Line)
        start -= width
        x += stride
        out += width
        n_rows -= 1
    memcpy(out + start, x + start, width - start)
    if stream:
        stream_end()


cdef Py_ssize_t rows_ahead(const unsigned char[:, :] x):
    """In lines: to what is AHEAD lines further on, not counting those between the rows."""
    if x.shape[1] < <Py_ssize_t>sizeof(Line) or x.strides[1] != 1:
        raise ValueError(f"expected rows of {sizeof(Line)} bytes or more without gaps")
    return max(1, AHEAD * <Py_ssize_t>sizeof(Line) // x.shape[1]) * (x.strides[0] // <Py_ssize_t>sizeof(Line))


def read(const unsigned char[::1] x, int threads):
    """Load x, but for a part of a line at its end; the exclusive or of its words."""
    cdef Py_ssize_t piece, n = x.shape[0] // sizeof(Line), ahead = AHEAD if x.shape[0] >= LARGE_BYTES else 0
    cdef const Line* lines = <const Line*>&x[0]
    cdef uint64_t total = 0
    for piece in prange((n + PIECE - 1) // PIECE, nogil=True, num_threads=threads, schedule="static"):
        total ^= read_lines(lines + piece * PIECE, min(PIECE, n - piece * PIECE), ahead)
    return total


def copy(const unsigned char[::1] x, unsigned char[::1] out, int threads):
    """Copy x to out."""
    cdef Py_ssize_t piece, skip = before_line(out), n = (out.shape[0] - skip) // <Py_ssize_t>sizeof(Line)
    cdef Py_ssize_t done = skip + n * <Py_ssize_t>sizeof(Line)
    cdef const Line* source = <const Line*>(&x[0] + skip)
    cdef Line* target = <Line*>(&out[0] + skip)
    cdef bint stream = 2 * out.shape[0] >= STREAM_BYTES
    for piece in prange((n + PIECE - 1) // PIECE, nogil=True, num_threads=threads, schedule="static"):
        copy_lines(source + piece * PIECE, target + piece * PIECE, min(PIECE, n - piece * PIECE), AHEAD, stream)
        if stream:
            stream_end()
    memcpy(&out[0], &x[0], skip)
    memcpy(&out[0] + done, &x[0] + done, out.shape[0] - done)


def read_rows(const unsigned char[:, :] x, int threads):
    """Load the rows of x, but for a part of a line at their ends; the exclusive or of their words."""
    cdef Py_ssize_t piece, n = x.shape[0], width = x.shape[1], ahead = rows_ahead(x)
    cdef uint64_t total = 0
    for piece in prange((n + ROWS - 1) // ROWS, nogil=True, num_threads=threads, schedule="static"):
        total ^= read_some_rows(&x[piece * ROWS, 0], x.strides[0], width, min(ROWS, n - piece * ROWS), ahead)
    return total


def copy_rows(const unsigned char[:, :] x, unsigned char[::1] out, int threads):
    """Copy the rows of x, of a line or more, to out, where they lie one behind the other."""
    cdef Py_ssize_t piece, n = x.shape[0], width = x.shape[1], ahead = rows_ahead(x)
    cdef bint stream = 2 * out.shape[0] >= STREAM_BYTES
    if out.shape[0] != n * width:
        raise ValueError(f"expected an out of {n * width} bytes, got {out.shape[0]}")
    for piece in prange((n + ROWS - 1) // ROWS, nogil=True, num_threads=threads, schedule="static"):
        copy_some_rows(&x[piece * ROWS, 0], x.strides[0], width, &out[piece * ROWS * width],
                       min(ROWS, n - piece * ROWS), ahead, stream)


def combine(const unsigned char[::1] a, const unsigned char[::1] b, unsigned char[::1] out, int threads):
    """The exclusive or of a and b, to out."""
    cdef Py_ssize_t piece, i, skip = before_line(out), n = (out.shape[0] - skip) // <Py_ssize_t>sizeof(Line)
    cdef const Line* left = <const Line*>(&a[0] + skip)
    cdef const Line* right = <const Line*>(&b[0] + skip)
    cdef Line* target = <Line*>(&out[0] + skip)
    cdef bint stream = 3 * out.shape[0] >= STREAM_BYTES
    for piece in prange((n + PIECE - 1) // PIECE, nogil=True, num_threads=threads, schedule="static"):
        combine_lines(left + piece * PIECE, right + piece * PIECE, target + piece * PIECE,
                      min(PIECE, n - piece * PIECE), stream)
    for i in range(skip):
        out[i] = a[i] ^ b[i]
    for i in range(skip + n * <Py_ssize_t>sizeof(Line), out.shape[0]):
        out[i] = a[i] ^ b[i]


def trip(double seconds):
    """Seconds that a cache line takes from one processor to another and back, on average over so many seconds of it; 0
    where there is one thread."""
    with nogil:
        seconds = fastbn_trip(seconds)
    return seconds
