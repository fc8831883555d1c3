"""Threads of Python and children of fork: right answers, no hang, and in processes of their own in case one dies."""

import os

import pytest

DATA = """
import os, sys
import numpy as np
import fastbn

backend = sys.argv[1]
rng = np.random.default_rng(5)
xs = [rng.normal(3, 2, shape).astype(np.float32) for shape in ((9001, 64), (500, 300), (20, 8, 400), (64, 8))]
gradients = [rng.standard_normal(x.shape).astype(np.float32) for x in xs]

def results(i, num_threads=4):
    options = {"num_threads": num_threads, "backend": backend}
    y, saved = fastbn.batch_norm(xs[i], activation="relu", **options)
    grad_x, grad_gamma, grad_beta = fastbn.batch_norm_backward(gradients[i], saved, **options)
    moments = fastbn.moments(xs[i], **options)
    return [a.tobytes() for a in (y, saved.mean, saved.var, grad_x, grad_gamma, grad_beta, moments.m2)]

expected = [results(i) for i in range(len(xs))]
"""

FORK = DATA + """
for _ in range(3):
    child = os.fork()
    if child == 0:
        right = all(results(i) == expected[i] for i in range(len(xs))) and fastbn.get_num_threads() == 1
        os._exit(0 if right else 3)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, status
    assert results(0) == expected[0]  # the parent's threads still work
print("right")
"""

MULTIPROCESSING = DATA + """
import multiprocessing

if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(results, range(len(xs))) == expected
    print("right")
"""

THREADS = DATA + """
from concurrent.futures import ThreadPoolExecutor

statistics = np.zeros(64), np.ones(64)

def infer():
    return fastbn.batch_norm_inference(xs[0], *statistics, backend=backend).tobytes()

inferred = infer()

def work(seed):
    for i in np.random.default_rng(seed).integers(0, len(xs), 12):
        if results(i, num_threads=1 + seed % 4) != expected[i] or infer() != inferred:
            return False
    return True

with ThreadPoolExecutor(8) as pool:
    assert all(pool.map(work, range(8)))
print("right")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("code", [FORK, MULTIPROCESSING], ids=["os.fork", "multiprocessing"])
def test_a_forked_child_computes_the_same(run_python, compiled, code):
    assert run_python(code, compiled, timeout=90).stdout == "right\n"


def test_8_python_threads_at_once(run_python, backend):
    assert run_python(THREADS, backend, timeout=90).stdout == "right\n"
