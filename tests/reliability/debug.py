"""The suite on a debug build (FASTBN_DEBUG=1): Cython's bounds checks, the assertions of Python's and NumPy's headers,
the C library's checks of buffer sizes, -O1. The kernels work on raw pointers, which Cython's checks know nothing of, so
what is said about memory is said by the sanitizers."""

from reliability import builds

PARTS = [  # each below a few minutes
    ["tests/test_kernels.py", "tests/test_contract.py", "tests/test_repeatability.py"],
    ["tests/test_exactness.py", "tests/test_errors.py", "tests/test_inputs.py", "tests/test_layer.py"],
]


def run(tally, scale):
    target = builds.install("debug", FASTBN_DEBUG="1")
    first = [word for part in PARTS for word in part]
    parts = [*PARTS, ["tests", *(f"--ignore={word}" for word in first)]]
    for done, words in enumerate(parts):
        builds.pytest(tally, "tests", target, words)
        tally.progress((done + 1) / len(parts))
