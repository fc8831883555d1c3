"""Called by the workers of joblib (loky and threading), concurrent.futures (threads and processes), dask's threaded
scheduler and a torch DataLoader: the same bits everywhere, no more threads than the limits say (those that joblib sets
for its processes; thread_limit(1) in threads, which starts none at all), and torch's own number of threads stays."""

import importlib.util
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import fastbn
from reliability import FULL, work
from reliability.system import thread_total

WORKERS = 4


def run(tally, scale):
    rounds = max(1, round(50 * scale))
    jobs = [(backend, i) for backend in work.compiled(scale) for i in work.ALL] * rounds
    expected = {(backend, i): work.answers(backend, i) for backend, i in dict.fromkeys(jobs)}
    before = torch_threads()
    for done, (name, package, call, granted) in enumerate(PLACES):
        if package and importlib.util.find_spec(package) is None:
            tally.note(f"{package} is not installed: not tried")
            continue
        if package == "torch" and scale < FULL:  # which takes seconds to import, in each worker
            continue
        bound = thread_total() + WORKERS + 4  # joblib and dask have threads of their own
        for job, (answer, limit, total) in zip(jobs, call(jobs), strict=True):
            tally.expect(answer == expected[job], f"{name}: a wrong answer to {job}")
            tally.expect(limit <= granted, f"{name}: {limit} threads a call where {granted} are granted")
            tally.expect("process" in name or total <= bound, f"{name}: {total} threads, beyond {bound}")
        tally.count(f"jobs in {name}", len(jobs))
        tally.progress((done + 1) / len(PLACES))
    tally.expect(torch_threads() == before, "torch's number of threads changed")
    tally.note(f"torch.get_num_threads() was {before} before and after" if before else "torch is not installed")


def torch_threads():
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return torch.get_num_threads()


def job(task):
    """The answers, on as many threads as are granted here; how many that are; and how many the process has."""
    return work.answers(*task, num_threads=None), fastbn.get_num_threads(), thread_total()


def limited_job(task):
    with fastbn.thread_limit(1):
        return job(task)


def joblib_threads(jobs):
    import joblib

    return joblib.Parallel(WORKERS, backend="threading")(joblib.delayed(limited_job)(task) for task in jobs)


def joblib_processes(jobs):
    import joblib
    from joblib.externals.loky import get_reusable_executor

    try:
        return joblib.Parallel(WORKERS, backend="loky")(joblib.delayed(job)(task) for task in jobs)
    finally:
        get_reusable_executor().shutdown(wait=True)


def futures_threads(jobs):
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(limited_job, jobs))


def futures_processes(jobs):
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(job, jobs, chunksize=4))


def dask_threads(jobs):
    import dask

    return dask.compute([dask.delayed(limited_job)(task) for task in jobs], scheduler="threads", num_workers=WORKERS)[0]


def data_loader(jobs):
    import torch

    return list(torch.utils.data.DataLoader(jobs, batch_size=None, num_workers=2, collate_fn=job))


CPUS = len(os.sched_getaffinity(0))
PLACES = [  # name, what must be installed, how, threads that a call may have there
    ("joblib, threads", "joblib", joblib_threads, 1),
    ("joblib, processes by loky", "joblib", joblib_processes, max(1, CPUS // WORKERS)),  # which shares out the CPUs
    ("concurrent.futures, threads", None, futures_threads, 1),
    ("concurrent.futures, spawned processes", None, futures_processes, CPUS),
    ("dask, threads", "dask", dask_threads, 1),
    ("torch DataLoader, forked processes", "torch", data_loader, 1),
]
