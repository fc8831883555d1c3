"""The arrays of a case: normal random numbers about a mean that is not 0."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.bench.cases import Case


class Data:
    """The arrays that a case needs, each made when it is first asked for and the same in every process."""

    def __init__(self, case: Case) -> None:
        self.shape = case.shape
        self.dtype = np.dtype(case.dtype)
        self.layout = case.layout
        self.channels = case.shape[1]
        rng = np.random.default_rng(0)
        self.gamma = rng.uniform(0.5, 2, self.channels).astype(self.dtype)
        self.beta = rng.standard_normal(self.channels).astype(self.dtype)
        self.mean = rng.uniform(2.9, 3.1, self.channels)
        self.var = rng.uniform(0.9, 1.1, self.channels)

    @cached_property
    def x(self) -> NDArray[Any]:
        x = self._normal(seed=1)
        x += 3
        return x

    @cached_property
    def grad_y(self) -> NDArray[Any]:
        return self._normal(seed=2)

    @cached_property
    def out(self) -> NDArray[Any]:
        return np.full_like(self.x, np.nan)

    def _normal(self, seed: int) -> NDArray[Any]:
        rng = np.random.default_rng(seed)
        dtype: Any = self.dtype
        if self.layout == "F":
            return rng.standard_normal(self.shape[::-1], dtype).T
        rows = self.shape[0] * (2 if self.layout == "rows" else 1)
        return rng.standard_normal((rows, *self.shape[1:]), dtype)[:: rows // self.shape[0]]
