"""The suite, but for the other backends, on a debug build (FASTBN_DEBUG=1): Cython's bounds checks, the assertions of
Python's and NumPy's headers, the C library's checks of buffer sizes, -O1. The kernels work on raw pointers, for which
Cython generates no checks: what is said about their memory is said by the sanitizers. tests/test_vectors.py stays out:
loops become as wide as the registers at -O3."""

from reliability import builds

SELECTED = ["-k", "not numba and not numpy", "--ignore", "tests/test_vectors.py", "tests"]


def run(tally, scale):
    target = builds.install("debug", FASTBN_DEBUG="1")
    builds.pytest(tally, "tests", target, SELECTED)
