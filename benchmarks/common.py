"""What the benchmarks share: arrays, backends, the clock.

asv runs `setup` before every timed call and then times one call, which for a call of 10 us is mostly noise. So a timed
function here makes many calls where they are short, and the clock goes slower by the same factor: what asv shows is the
time of one call.
"""

import functools
import json
import statistics
import subprocess
import sys
import time

import numpy as np

import fastbn

BACKENDS = ("cython", "numba")
ARRAYS = ("64x128", "16384x64", "65536x256", "32x64x56x56")
MEANS = (0, 100, 10_000, 1_000_000)


@functools.lru_cache(maxsize=2)
def normal(array, mean, dtype="float32", order="C"):
    """Normal random numbers, made once in a process; `array` is a shape such as 65536x256."""
    values = np.random.default_rng(abs(mean)).standard_normal(tuple(map(int, array.split("x"))), dtype)
    values += mean
    return np.asarray(values, order=order)


def arrays(array):
    """x, grad_y, gamma, beta in float32."""
    x = normal(array, mean=3)
    rng = np.random.default_rng(1)
    gamma, beta = rng.uniform(0.5, 2, x.shape[1]), rng.standard_normal(x.shape[1])
    return x, normal(array, mean=0), gamma.astype(np.float32), beta.astype(np.float32)


def need_backend(name):
    """Skip the benchmark where a backend cannot run, or where this commit does not know it yet."""
    if name not in fastbn.available_backends():
        raise NotImplementedError(f"backend {name} is not available")


def need(module):
    """Import a peer; skip the benchmark where it is not installed."""
    try:
        return __import__(module)
    except ImportError:
        raise NotImplementedError(f"{module} is not installed") from None


class Timed:
    """A benchmark over backends and arrays. Subclasses make in `prepare` what they need beside these."""

    params = (BACKENDS, ARRAYS)
    param_names = ("backend", "array")
    timeout = 300  # seconds; Numba may have to compile first
    rounds = 1  # a process for each backend and array: starting it takes longer than timing
    repeat = (3, 10, 0.5)  # samples at least, at most, seconds

    def setup(self, backend, array):
        need_backend(backend)
        self.x, self.grad_y, self.gamma, self.beta = arrays(array)
        self.set_calls()
        self.prepare(backend)

    def set_calls(self):
        """How many calls are timed as one, and the clock that goes by."""
        calls = max(1, min(100, 1_000_000 // self.x.nbytes))
        self.loop = range(calls)
        self.timer = lambda: time.perf_counter() / calls

    def prepare(self, backend):
        """Warm the JIT and make what the calls need."""

    def calls(self, call):
        """Call as a user's loop does: each result lives until the next one is there."""
        for _ in self.loop:
            result = call()
        return result


def ratio_to_torch(op, backend, array):
    """Our time over PyTorch's, as `fastbn bench` measures it: in turns, each in a process of its own. For asv, more is
    worse."""
    command = [sys.executable, "-P", "-m", "fastbn", "bench", "--ops", op, "--shapes", array,
               "--backends", backend, "--peers", "torch", "--json"]  # -P: not the source folder it may be started in
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds = json.loads(printed)["results"][0]["seconds"]
    return seconds[f"fastbn-{backend}"] / seconds["torch"]


def ratio(ours, peer, rounds=7):
    """The time of our call over a peer's: medians, in turns, in this one process."""
    samples = {ours: [], peer: []}
    calls = {call: max(1, round(0.01 / _seconds(call, 2))) for call in samples}
    for _ in range(rounds):
        for call in samples:
            samples[call].append(_seconds(call, calls[call]))
    return statistics.median(samples[ours]) / statistics.median(samples[peer])


def _seconds(call, calls):
    """Seconds per call, after one that does not count."""
    result = call()
    start = time.perf_counter()
    for _ in range(calls):
        result = call()
    stop = time.perf_counter()
    del result
    return (stop - start) / calls


def ulps(result, exact):
    """The largest error in units of the last place, those of 1 for results that are smaller than 1."""
    unit = np.spacing(np.maximum(np.abs(exact), 1).astype(result.dtype)).astype(np.longdouble)
    return float((np.abs(result - exact) / unit).max())
