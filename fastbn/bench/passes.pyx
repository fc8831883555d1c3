# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The bare memory passes: loads, stores, and no more arithmetic than keeps the loads from being left out.

The arrays are taken as 64-byte lines, those of the output where there is one, in runs of PIECE lines dealt to the
threads; the bytes before the first line and behind the last are left to the calling thread.
"""
from cython.parallel cimport prange
from libc.stdint cimport uint64_t, uintptr_t
from libc.string cimport memcpy

cdef extern from "machine.h" nogil:
    void prefetch(const void* address)
    void prefetch_write(const void* address)
    void stream_line(void* target, const void* source)
    void stream_end()

cdef enum:
    PIECE = 1024          # lines
    AHEAD = 64            # lines
    STREAM_BYTES = 1 << 24  # outputs from here on bypass the caches, as the kernels' do

cdef struct Line:
    uint64_t[8] words


cdef uint64_t read_lines(const Line* x, Py_ssize_t n) noexcept nogil:
    cdef Line found
    cdef uint64_t total = 0
    cdef Py_ssize_t i, j
    for j in range(8):
        found.words[j] = 0
    for i in range(n):
        prefetch(x + i + AHEAD)
        for j in range(8):
            found.words[j] ^= x[i].words[j]
    for j in range(8):
        total ^= found.words[j]
    return total


cdef inline void put_line(Line* out, const Line* value, bint stream) noexcept nogil:
    if stream:
        stream_line(out, value)
    else:
        prefetch_write(out + AHEAD)
        out[0] = value[0]


cdef void copy_lines(const Line* x, Line* out, Py_ssize_t n, bint stream) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        prefetch(x + i + AHEAD)
        put_line(out + i, x + i, stream)
    if stream:
        stream_end()


cdef void combine_lines(const Line* a, const Line* b, Line* out, Py_ssize_t n, bint stream) noexcept nogil:
    cdef Line value
    cdef Py_ssize_t i, j
    for i in range(n):
        prefetch(a + i + AHEAD)
        prefetch(b + i + AHEAD)
        for j in range(8):
            value.words[j] = a[i].words[j] ^ b[i].words[j]
        put_line(out + i, &value, stream)
    if stream:
        stream_end()


cdef Py_ssize_t before_line(const unsigned char[::1] out) noexcept:
    """Bytes before the first whole line."""
    return min(out.shape[0], <Py_ssize_t>(-<uintptr_t>&out[0] % sizeof(Line)))


def read(const unsigned char[::1] x, int threads):
    """Load x, but for a part of a line at its end; the exclusive or of its words."""
    cdef Py_ssize_t piece, n = x.shape[0] // sizeof(Line)
    cdef const Line* lines = <const Line*>&x[0]
    cdef uint64_t total = 0
    for piece in prange((n + PIECE - 1) // PIECE, nogil=True, num_threads=threads, schedule="static"):
        total ^= read_lines(lines + piece * PIECE, min(PIECE, n - piece * PIECE))
    return total


def copy(const unsigned char[::1] x, unsigned char[::1] out, int threads):
    """Copy x to out."""
    cdef Py_ssize_t piece, skip = before_line(out), n = (out.shape[0] - skip) // <Py_ssize_t>sizeof(Line)
    cdef Py_ssize_t done = skip + n * <Py_ssize_t>sizeof(Line)
    cdef const Line* source = <const Line*>(&x[0] + skip)
    cdef Line* target = <Line*>(&out[0] + skip)
    cdef bint stream = out.shape[0] >= STREAM_BYTES
    for piece in prange((n + PIECE - 1) // PIECE, nogil=True, num_threads=threads, schedule="static"):
        copy_lines(source + piece * PIECE, target + piece * PIECE, min(PIECE, n - piece * PIECE), stream)
    memcpy(&out[0], &x[0], skip)
    memcpy(&out[0] + done, &x[0] + done, out.shape[0] - done)


def combine(const unsigned char[::1] a, const unsigned char[::1] b, unsigned char[::1] out, int threads):
    """The exclusive or of a and b, to out."""
    cdef Py_ssize_t piece, i, skip = before_line(out), n = (out.shape[0] - skip) // <Py_ssize_t>sizeof(Line)
    cdef const Line* left = <const Line*>(&a[0] + skip)
    cdef const Line* right = <const Line*>(&b[0] + skip)
    cdef Line* target = <Line*>(&out[0] + skip)
    cdef bint stream = out.shape[0] >= STREAM_BYTES
    for piece in prange((n + PIECE - 1) // PIECE, nogil=True, num_threads=threads, schedule="static"):
        combine_lines(left + piece * PIECE, right + piece * PIECE, target + piece * PIECE,
                      min(PIECE, n - piece * PIECE), stream)
    for i in range(skip):
        out[i] = a[i] ^ b[i]
    for i in range(skip + n * <Py_ssize_t>sizeof(Line), out.shape[0]):
        out[i] = a[i] ^ b[i]
