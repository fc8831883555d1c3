"""The bare memory passes that an operation cannot do without, on the same arrays and threads.

Each pass is cut among the threads of a pool, one contiguous piece each; NumPy releases the interpreter while it loops.
The read is ``np.max``, the fastest of NumPy's reductions and as fast as a compiled loop that only reads.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
FROM_BYTES = 16_000_000  # below, handing the work to the threads costs as much as the passes


def bytes_moved(case: Case) -> int:
    """Read and written by the passes of an operation; what GB/s counts, for every side alike."""
    return case.nbytes * sum(ARRAYS_MOVED[name] for name in PASSES[case.op])


class Roofline:
    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads)

    def versions(self) -> dict[str, str]:
        return {"numpy": np.__version__}

    def prepare(self, op: str, d: Data) -> Callable[[], Any] | None:
        """The call that is timed; None for small or strided arrays."""
        if d.layout == "rows" or d.x.nbytes < FROM_BYTES:
            return None
        passes = [one for name in PASSES[op] for one in self._pass(name, d)]

        def run() -> None:
            for function, *pieces in passes:
                list(self.pool.map(function, *pieces))

        return run

    def arrays(self, op: str, result: Any) -> list[NDArray[Any]]:
        return []

    def _pass(self, name: str, d: Data) -> list[tuple[Any, ...]]:
        """The NumPy functions of a pass, each with the pieces of its arguments."""
        if name == "read x":
            return [(np.max, self._pieces(d.x))]
        if name == "read both":
            return [(np.max, self._pieces(d.grad_y)), (np.max, self._pieces(d.x))]
        if name == "copy":
            return [(np.copyto, self._pieces(d.out), self._pieces(d.x))]
        return [(np.add, self._pieces(d.grad_y), self._pieces(d.x), self._pieces(d.out))]

    def _pieces(self, array: NDArray[Any]) -> list[NDArray[Any]]:
        return np.array_split(array.ravel("K"), self.threads)  # ravel("K") of a contiguous array is no copy
