"""The bare memory passes that an operation cannot do without, on the same arrays and threads: passes.pyx runs them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastbn.bench.passes as passes
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
ARRAYS_MOVED = {"read x": 1, "copy": 2, "read both": 2, "combine": 3}
FROM_BYTES = 250_000  # below, waking the threads takes as long as the passes
LINE_BYTES = 64  # what passes.pyx takes at a time


def bytes_moved(case: Case) -> int:
    """Read and written by the passes of an operation; what GB/s counts, for every side alike."""
    return case.nbytes * sum(ARRAYS_MOVED[name] for name in PASSES[case.op])


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
        calls = [call for name in PASSES[op] for call in self._pass(name, d)]

        def run() -> None:
            for call in calls:
                call()

        return run

    def arrays(self, op: str, result: Any) -> list[NDArray[Any]]:
        return []

    def _pass(self, name: str, d: Data) -> list[Callable[[], Any]]:
        """The calls of a pass."""
        if d.layout == "rows":
            rows = d.x.reshape(len(d.x), -1).view(np.uint8)  # no copy: only the rows lie apart
            run = {"read x": partial(passes.read_rows, rows), "copy": partial(passes.copy_rows, rows, _bytes(d.out))}
            return [partial(run[name], self.threads)]
        if name == "read x":
            return [partial(passes.read, _bytes(d.x), self.threads)]
        if name == "read both":
            return [partial(passes.read, _bytes(array), self.threads) for array in (d.grad_y, d.x)]
        if name == "copy":
            return [partial(passes.copy, _bytes(d.x), _bytes(d.out), self.threads)]
        return [partial(passes.combine, _bytes(d.grad_y), _bytes(d.x), _bytes(d.out), self.threads)]


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    return array.ravel("K").view(np.uint8)  # ravel("K") of a contiguous array is no copy
