"""The process of one side: it makes the arrays, prepares the calls, and times them when asked."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

from numpy.typing import NDArray

from fastbn.bench.cases import Case
from fastbn.bench.data import Data

PEERS = {  # label: the package that must be installed, the module and the class of its side
    "torch": ("torch", "torch_peer", "Torch"),
    "jax": ("jax", "jax_peer", "Jax"),
    "scikit-learn": ("sklearn", "array_peers", "ScikitLearn"),
    "numpy": ("numpy", "array_peers", "NumPy"),
}


def build(label: str, threads: int) -> Any:
    """The side of a label: a peer, ``fastbn-<backend>``, ``roofline``, or two of them in turn, ``a+b``."""
    if "+" in label:
        from fastbn.bench.mixing import Mixed

        return Mixed([build(part, threads) for part in label.split("+")])
    if label == "roofline":
        from fastbn.bench.roofline import Roofline

        return Roofline(threads)
    if label.startswith("fastbn-"):
        from fastbn.bench.ours import Fastbn

        return Fastbn(label.removeprefix("fastbn-"), threads)
    _, module, name = PEERS[label]
    return getattr(import_module(f"fastbn.bench.{module}"), name)(threads)


class Host:
    """The sides of one process, and what their parent may ask for."""

    def __init__(self, labels: tuple[str, ...], threads: int) -> None:
        self.sides = {label: build(label, threads) for label in labels}
        self.calls: dict[str, tuple[str, Callable[[], Any]]] = {}
        self.data: tuple[Any, Data] | None = None
        gc.disable()

    def versions(self) -> dict[str, str]:
        return {name: version for side in self.sides.values() for name, version in side.versions().items()}

    def prepare(self, label: str, case: Case) -> float | None:
        """Get a call ready and warm; about how many seconds it takes, or None where a side does not offer it."""
        call = self.sides[label].prepare(case.op, self._data_for(case))
        if call is None:
            return None
        self.calls[label] = (case.op, call)
        call()
        return min(self.run(label, 1, 2))

    def run(self, label: str, calls: int, times: int) -> list[float]:
        """Seconds per call, so many times. Each result lives until the next one is there, as in a user's loop."""
        _, call = self.calls[label]
        result = call()
        seconds = []
        for _ in range(times):
            start = time.perf_counter()
            for _ in range(calls):
                result = call()
            seconds.append((time.perf_counter() - start) / calls)
        del result
        return seconds

    def result(self, label: str) -> list[NDArray[Any]]:
        """What the call computes, for the tests."""
        op, call = self.calls[label]
        return self.sides[label].arrays(op, call())  # type: ignore[no-any-return]

    def forget(self) -> None:
        """Free the arrays."""
        self.calls, self.data = {}, None
        gc.collect()

    def _data_for(self, case: Case) -> Data:
        key = (case.shape, case.dtype, case.layout)
        if self.data is None or self.data[0] != key:
            self.forget()
            self.data = (key, Data(case))
        return self.data[1]


def serve(connection: Connection, labels: tuple[str, ...], threads: int) -> None:
    """Answer the parent until it hangs up. An answer is (True, value) or (False, what went wrong)."""
    with contextlib.suppress(EOFError, BrokenPipeError):
        host = None
        while True:
            verb, *arguments = connection.recv()
            try:
                host = host or Host(labels, threads)
                answer = (True, getattr(host, verb)(*arguments))
            except Exception as error:
                answer = (False, f"{type(error).__name__}: {error}")
            connection.send(answer)
