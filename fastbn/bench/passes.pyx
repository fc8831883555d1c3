# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The bare memory passes: loads, stores, and no more arithmetic than keeps the loads from being left out.

The arrays are taken as 64-byte lines (what is over is left alone), in runs of PIECE lines dealt to the threads.
"""
from cython.parallel cimport prange
from libc.stdint cimport uint64_t
from libc.string cimport memcpy

cdef extern from "machine.h" nogil:
    void prefetch(const void* address)
    void prefetch_write(const void* address)
    void stream_copy(void* target, const void* source, size_t bytes)
    void stream_end()

cdef enum:
    PIECE = 1024          # lines
    GROUP = 32            # lines that go out together: 2 KiB
    AHEAD = 64            # lines
    STREAM_LINES = 1 << 18  # outputs of so many lines (16 MiB) bypass the caches, as the kernels' do

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


cdef void put_lines(const Line* x, Line* out, Py_ssize_t n, bint stream) noexcept nogil:
    cdef Py_ssize_t i
    if stream:
        stream_copy(out, x, n * sizeof(Line))
    else:
        for i in range(n):
            prefetch_write(out + i + AHEAD)
        memcpy(out, x, n * sizeof(Line))


cdef void copy_lines(const Line* x, Line* out, Py_ssize_t n, bint stream) noexcept nogil:
    cdef Py_ssize_t i, j
    for i in range((n + GROUP - 1) // GROUP):
        for j in range(GROUP):
            prefetch(x + i * GROUP + j + AHEAD)
        put_lines(x + i * GROUP, out + i * GROUP, min(GROUP, n - i * GROUP), stream)
    stream_end()


cdef void combine_lines(const Line* a, const Line* b, Line* out, Py_ssize_t n, bint stream) noexcept nogil:
    cdef Line[GROUP] buffer
    cdef Py_ssize_t i, j, k, at
    for i in range((n + GROUP - 1) // GROUP):
        for j in range(min(GROUP, n - i * GROUP)):
            at = i * GROUP + j
            prefetch(a + at + AHEAD)
            prefetch(b + at + AHEAD)
            for k in range(8):
                buffer[j].words[k] = a[at].words[k] ^ b[at].words[k]
        put_lines(buffer, out + i * GROUP, min(GROUP, n - i * GROUP), stream)
    stream_end()


def read(const unsigned char[::1] x, int threads):
    """Load x; the exclusive or of its words."""
    cdef Py_ssize_t piece, n = x.shape[0] // sizeof(Line)
    cdef const Line* lines = <const Line*>&x[0]
    cdef uint64_t total = 0
    for piece in prange((n + PIECE - 1) // PIECE, nogil=True, num_threads=threads, schedule="static"):
        total ^= read_lines(lines + piece * PIECE, min(PIECE, n - piece * PIECE))
    return total


def copy(const unsigned char[::1] x, unsigned char[::1] out, int threads):
    """Copy x to out."""
    cdef Py_ssize_t piece, n = x.shape[0] // sizeof(Line)
    cdef const Line* source = <const Line*>&x[0]
    cdef Line* target = <Line*>&out[0]
    for piece in prange((n + PIECE - 1) // PIECE, nogil=True, num_threads=threads, schedule="static"):
        copy_lines(source + piece * PIECE, target + piece * PIECE, min(PIECE, n - piece * PIECE), n >= STREAM_LINES)


def combine(const unsigned char[::1] a, const unsigned char[::1] b, unsigned char[::1] out, int threads):
    """The exclusive or of a and b, to out."""
    cdef Py_ssize_t piece, n = a.shape[0] // sizeof(Line)
    cdef const Line* left = <const Line*>&a[0]
    cdef const Line* right = <const Line*>&b[0]
    cdef Line* target = <Line*>&out[0]
    for piece in prange((n + PIECE - 1) // PIECE, nogil=True, num_threads=threads, schedule="static"):
        combine_lines(left + piece * PIECE, right + piece * PIECE, target + piece * PIECE,
                      min(PIECE, n - piece * PIECE), n >= STREAM_LINES)
