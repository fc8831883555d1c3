"""The process of one side, and the parent's handle on it."""

from __future__ import annotations

import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor
from types import TracebackType
from typing import Any

from fastbn.accuracy import promises, sides
from fastbn.accuracy.bounds import ratios
from fastbn.accuracy.cases import Data
from fastbn.accuracy.oracle import Exact
from fastbn.accuracy.sides import Arrays
from fastbn.bench.process import interrupts_held_back

_label = ""
_side: sides.BatchNorm


def start(label: str) -> None:
    """Become a side."""
    global _label, _side
    warnings.simplefilter("ignore")  # peers warn of what they are here to be judged for
    _label, _side = label, sides.build(label)


def version() -> tuple[str, str]:
    return sides.version(_label)


def judged(name: str, dtype: str, exact: Exact) -> dict[str, float]:
    """Errors in units of the bound."""
    data = Data(name, dtype)
    return ratios(exact, data.x, data.grad_y, promises.of(_side, data))


def typical(dtype: str) -> Arrays:
    return promises.of(_side, Data("typical", dtype))


def constant(value: float, dtype: str) -> str:
    return promises.constant(_side, value, dtype)


def nonfinite(value: str, dtype: str) -> str:
    return promises.nonfinite(_side, value, dtype)


def threads(dtype: str) -> dict[str, float]:
    return promises.threads(_label, _side, dtype)


class Workers:
    """One process for each side: an instruction set is chosen once for a process, and so are JAX's settings."""

    def __init__(self, labels: tuple[str, ...]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pools = {
            label: ProcessPoolExecutor(1, context, initializer=start, initargs=(label,)) for label in labels
        }

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
    ) -> None:
        for pool in self.pools.values():
            pool.shutdown(cancel_futures=True)

    def ask(self, function: Any, *arguments: Any, labels: tuple[str, ...] = ()) -> dict[str, Any]:
        """The answers of all sides, or of some, which work side by side."""
        with interrupts_held_back():  # the first question starts the process
            asked = {label: self.pools[label].submit(function, *arguments) for label in labels or self.pools}
        return {label: answer.result() for label, answer in asked.items()}
