"""A child forked after fastbn has run threads in its parent, by os.fork, by multiprocessing, and while another Python
thread is in a call, computes the same bits on one thread, and ends. The parent goes on as before."""

import multiprocessing
import os
import signal
import threading
import time
import warnings
from functools import partial

import fastbn
from reliability import work

PATIENCE = 30  # seconds for a child


def run(tally, scale):
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)  # that is the point
    rounds = max(3, round(100 * scale))
    for backend in work.compiled():
        expected = work.expected(backend)
        for i in range(rounds):
            fork(tally, backend, expected, "children of os.fork")
            tally.expect(work.answers(backend, i % 4) == expected[i % 4], f"{backend}: the parent computes otherwise")
            tally.progress(i / rounds / 2)
        pool(tally, backend, expected, rounds)
        during_calls(tally, backend, expected, rounds)


def fork(tally, backend, expected, what):
    child = os.fork()
    if child == 0:
        right = work.expected(backend) == expected and fastbn.get_num_threads() == 1
        os._exit(0 if right else 3)
    tally.count(what)
    status = ended(child)
    tally.expect(status == 0, f"{backend}: one of the {what} {'hangs' if status is None else f'ended with {status}'}")


def ended(child):
    """The exit status, negative for a signal; None, and the child is killed, where it hangs."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def pool(tally, backend, expected, rounds):
    with multiprocessing.get_context("fork").Pool(2) as children:
        jobs = children.map_async(partial(work.answers, backend), [*work.ALL] * rounds, chunksize=2)
        tally.count("jobs of a multiprocessing pool by fork", 4 * rounds)
        try:
            same = jobs.get(PATIENCE + rounds) == expected * rounds
            tally.expect(same, f"{backend}: a pool's child computes otherwise")
        except multiprocessing.TimeoutError:
            tally.expect(False, f"{backend}: a pool's children hang")


def during_calls(tally, backend, expected, rounds):
    done = threading.Event()

    def call():
        while not done.is_set():
            work.answers(backend, 0)

    busy = threading.Thread(target=call)
    busy.start()
    try:
        for _ in range(rounds):
            fork(tally, backend, expected, "children of os.fork during another thread's call")
    finally:
        done.set()
        busy.join()
