"""Two libraries in one process, called in turn: what the threads of each cost the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from fastbn.bench.data import Data

PAIRS = (("fastbn-cython", "torch"), ("fastbn-cython", "fastbn-numba"), ("fastbn-numba", "torch"))


class Mixed:
    def __init__(self, sides: list[Any]) -> None:
        self.sides = sides

    def versions(self) -> dict[str, str]:
        return {name: version for side in self.sides for name, version in side.versions().items()}

    def prepare(self, op: str, d: Data) -> Callable[[], Any] | None:
        """One call of each, one after the other."""
        if op != "mixing":
            return None
        calls = [side.prepare(op, d) for side in self.sides]
        return lambda: [call() for call in calls]

    def arrays(self, op: str, result: Any) -> list[NDArray[Any]]:
        return [array for side, part in zip(self.sides, result, strict=True) for array in side.arrays(op, part)]
