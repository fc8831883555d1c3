"""The bare memory passes that an operation cannot do without, on the same arrays and threads: passes.pyx runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastbn.bench.passes as passes
from fastbn.bench import machine
from fastbn.bench.cases import Case
from fastbn.bench.data import Data

FORWARD, BACKWARD = ("read x", "copy"), ("read both", "combine")
PASSES: dict[str, tuple[str, ...]] = {
    "forward-out": FORWARD,
    "forward": FORWARD,
    "relu": FORWARD,
    "layouts": FORWARD,
    "mixing": FORWARD,
    "backward-out": BACKWARD,
    "backward": BACKWARD,
    "layer": (*FORWARD, *BACKWARD),
    "inference-out": ("copy",),
    "inference": ("copy",),
    "moments": ("read x",),
}
WITHOUT_OUT = ("forward", "relu", "backward", "layer", "inference")  # each result lives until the next one is there
ARRAYS_MOVED = {"read x": 1, "copy": 2, "read both": 2, "combine": 3}
FROM_BYTES = 250_000  # below, waking the threads takes as long as the passes
LINE_BYTES = 64  # what passes.pyx takes at a time
TRIP_SECONDS = 0.0005  # how long a line goes to and fro, each time that it is measured


def bytes_moved(case: Case) -> int:
    """Read and written by the passes of an operation; what GB/s counts, for every side alike."""
    return case.nbytes * sum(ARRAYS_MOVED[name] for name in PASSES[case.op])


def trip() -> float | None:
    """Seconds that a cache line takes from one processor to another and back; None where there is one thread. The least
    of some times: a thread that waits for its time slice is none of it."""
    return min(passes.trip(TRIP_SECONDS) for _ in range(5)) or None if machine.processors() > 1 else None


class Roofline:
    def __init__(self, threads: int) -> None:
        self.threads = threads

    def versions(self) -> dict[str, str]:
        return {}

    def prepare(self, op: str, d: Data) -> Callable[[], Any] | None:
        """The call that is timed; None for small arrays, and for rows apart that passes.pyx does not take."""
        apart = d.layout == "rows"
        if d.x.nbytes < FROM_BYTES or (apart and (d.x[0].nbytes < LINE_BYTES or "combine" in PASSES[op])):
            return None
        n_outputs = sum(name in ("copy", "combine") for name in PASSES[op])
        n_arrays = 2 * n_outputs if op in WITHOUT_OUT else min(1, n_outputs)
        outputs = cycle([_bytes(np.full_like(d.out, np.nan) if i else d.out) for i in range(n_arrays)])
        calls = [call for name in PASSES[op] for call in self._pass(name, d, outputs)]

        def run() -> None:
            for call in calls:
                call()

        return run

    def arrays(self, op: str, result: Any) -> list[NDArray[Any]]:
        return []

    def _pass(self, name: str, d: Data, outputs: Iterator[NDArray[np.uint8]]) -> list[Callable[[], Any]]:
        """The calls of a pass; it writes to the next of the outputs each time."""
        if d.layout == "rows":
            rows = d.x.reshape(len(d.x), -1).view(np.uint8)  # no copy: only the rows lie apart
            if name == "read x":
                return [partial(passes.read_rows, rows, self.threads)]
            return [lambda: passes.copy_rows(rows, next(outputs), self.threads)]
        x = _bytes(d.x)
        if name == "read x":
            return [partial(passes.read, x, self.threads)]
        if name == "read both":
            return [partial(passes.read, _bytes(array), self.threads) for array in (d.grad_y, d.x)]
        if name == "copy":
            return [lambda: passes.copy(x, next(outputs), self.threads)]
        grad_y = _bytes(d.grad_y)
        return [lambda: passes.combine(grad_y, x, next(outputs), self.threads)]


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    return array.ravel("K").view(np.uint8)  # ravel("K") of a contiguous array is no copy
