"""8 Python threads call at once, for a minute a backend: forward, backward, inference, moments and one shared layer, on
different and on the same arrays. The answers are the same bits, and the threads of the process stay bounded."""

import threading
import time

import numpy as np

from reliability import work
from reliability.system import thread_total

CALLERS = 8


def run(tally, scale):
    for backend in work.compiled():
        one_backend(tally, backend, time.monotonic() + 60 * scale, 60 * scale)


def one_backend(tally, backend, deadline, seconds):
    expected = work.expected(backend)
    before, most = thread_total(), 0
    rounds = [0] * CALLERS

    def call(seed):
        rng = np.random.default_rng(seed)
        while time.monotonic() < deadline:
            i = int(rng.integers(len(expected)))
            tally.expect(work.answers(backend, i) == expected[i], f"{backend}: a wrong answer on array {i}")
            rounds[seed] += 1

    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(CALLERS)]
    for caller in callers:
        caller.start()
    while any(caller.is_alive() for caller in callers):
        time.sleep(0.01)
        most = max(most, thread_total() - before)
        tally.progress(1 - (deadline - time.monotonic()) / seconds)
    for caller in callers:
        caller.join()
    tally.count("rounds of five calls", sum(rounds))
    # OpenMP keeps a team for each calling thread; most of them sleep, see docs/threads.md.
    bound = CALLERS * team(backend)
    tally.expect(most <= bound, f"{backend}: {most} threads more than before, beyond {bound}")
    tally.note(f"{backend}: at most {most} threads more than before (bound: {bound})")


def team(backend):
    """The threads that one caller may have: as many as it asked for, or all of Numba's pool."""
    if backend != "numba":
        return work.THREADS
    import numba

    return max(work.THREADS, numba.config.NUMBA_NUM_THREADS)
