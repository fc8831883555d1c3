"""NumPy's and scikit-learn's side: column means and variances."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.bench.data import Data


class NumPy:
    def __init__(self, threads: int) -> None:
        pass

    def versions(self) -> dict[str, str]:
        return {"numpy": np.__version__}

    def prepare(self, op: str, d: Data) -> Callable[[], Any] | None:
        """The call that is timed; None for what NumPy does not offer."""
        if op != "moments":
            return None
        axes = (0, *range(2, len(d.shape)))
        return lambda: (d.x.mean(axes), d.x.var(axes))

    def arrays(self, op: str, result: Any) -> list[NDArray[Any]]:
        return list(result)


class ScikitLearn:
    def __init__(self, threads: int) -> None:
        from sklearn.preprocessing import StandardScaler

        self.scaler = StandardScaler()

    def versions(self) -> dict[str, str]:
        import sklearn

        return {"scikit-learn": sklearn.__version__}

    def prepare(self, op: str, d: Data) -> Callable[[], Any] | None:
        """The call that is timed; None for what StandardScaler does not offer."""
        if op != "moments" or len(d.shape) != 2:
            return None
        return lambda: self.scaler.fit(d.x)

    def arrays(self, op: str, result: Any) -> list[NDArray[Any]]:
        return [result.mean_, result.var_]
