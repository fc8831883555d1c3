"""Hard data: large means, outliers, mixed scales, subnormals, constants, many rows. The tests take it from here too."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastbn

ROWS = 3000  # where a case says nothing else
EPS = 1e-5
LONG = 2**25
CONSTANTS = (0.0, 1.0, 14.62, 1e7, 1e30, -1e-30)

Make = Callable[[np.random.Generator, Any], NDArray[Any]]  # (random numbers, dtype) -> (rows, columns)


def _normal(mean: float = 0, std: float = 1, rows: int = ROWS, columns: int = 5) -> Make:
    return lambda rng, dtype: rng.standard_normal((rows, columns), dtype) * dtype(std) + dtype(mean)


def _outlier(row: int | slice) -> Make:
    def make(rng: np.random.Generator, dtype: Any) -> NDArray[Any]:
        x = _normal()(rng, dtype)
        x[row] += dtype(1e6)
        return x
    return make


def _one_huge(row: int) -> Make:
    def make(rng: np.random.Generator, dtype: Any) -> NDArray[Any]:
        x = np.ones((ROWS, 5))
        x[row] = 1e30
        return x
    return make


def _alternating(rng: np.random.Generator, dtype: Any) -> NDArray[Any]:
    return np.abs(rng.normal(100, 1, (ROWS, 5))) * np.where(np.arange(ROWS) % 2, 1, -1)[:, None]


def _trend(rng: np.random.Generator, dtype: Any) -> NDArray[Any]:
    return np.arange(ROWS)[:, None] * [1.0, 10, 1e3, -1, 1e-5] + rng.standard_normal((ROWS, 5))


HARD: dict[str, Make] = {
    **{f"mean/std {ratio:g}": _normal(ratio) for ratio in (0, 1, 1e2, 1e4, 1e6, 1e7)},
    **{f"mean/std {ratio:g}, negative": _normal(-ratio) for ratio in (1e3, 1e5)},
    "mean/std 1e+06, 150 columns": _normal(1e6, rows=10_007, columns=150),
    "first row an outlier": _outlier(0),
    "second row an outlier": _outlier(1),
    "row 1717 an outlier": _outlier(1717),
    "last row an outlier": _outlier(-1),
    "40 rows of outliers first": _outlier(slice(0, 40)),
    "300 rows of outliers first": _outlier(slice(0, 300)),
    "1e30 first among ones": _one_huge(0),
    "1e30 inside among ones": _one_huge(1717),
    "1e30 last among ones": _one_huge(-1),
    "scales 1e-30 to 1e30": lambda rng, dtype: rng.normal(1, 1, (ROWS, 61)) * 10.0 ** np.arange(-30, 31),
    "squares overflow float32": _normal(1e20, 1e25),
    "subnormals of float32": lambda rng, dtype: rng.integers(-1000, 1000, (ROWS, 5)) * 2.0**-149,
    "sorted": lambda rng, dtype: np.sort(rng.normal(10, 3, (ROWS, 5)), axis=0),
    "sorted downwards": lambda rng, dtype: -np.sort(rng.normal(10, 3, (ROWS, 5)), axis=0),
    "alternating signs": _alternating,
    "a trend": _trend,
    "two values": lambda rng, dtype: rng.choice([1e6, 1e6 + 1], (ROWS, 5)),
}
ROW_COUNTS: dict[str, Make] = {
    f"{rows} rows": _normal(3, rows=rows, columns=3) for rows in (2, 3, 4, 7, 17, 129, 1025, 65537)
}
MILLION: dict[str, Make] = {
    "2^20 rows": _normal(3, rows=2**20, columns=2),
    "2^20 rows, mean/std 1e+06": _normal(1e6, rows=2**20, columns=2),
}
MANY: dict[str, Make] = {
    "2^25 rows, mean/std 1e+06": _normal(1e6, rows=LONG, columns=1),
}
BEYOND: dict[str, Make] = {  # float64 alone
    **{f"mean/std {ratio:g}": _normal(ratio) for ratio in (1e8, 1e10)},
    "mean/std 1e+08, 150 columns": _normal(1e8, rows=10_007, columns=150),
    "std 1e+150": _normal(0, 1e150),
}
OTHERS: dict[str, Make] = {
    "typical": _normal(1, rows=10_007, columns=20),
    "large": _normal(1, rows=2099, columns=513),
    **{f"in pieces, mean/std {ratio:g}": _normal(ratio, rows=40_000, columns=3) for ratio in (0, 1e3, 1e6, 1e8)},
}
CASES = HARD | ROW_COUNTS | MILLION | MANY | BEYOND | OTHERS

PIECES = [name for name in OTHERS if "pieces" in name]
N_PIECES = 1000
ORDERS: dict[str, Callable[[list[fastbn.Moments]], list[fastbn.Moments]]] = {
    "as they lie": lambda pieces: pieces,
    "smallest first": lambda pieces: sorted(pieces, key=lambda piece: piece.count),
    "largest first": lambda pieces: sorted(pieces, key=lambda piece: -piece.count),
    "shuffled": lambda pieces: [pieces[i] for i in np.random.default_rng(5).permutation(len(pieces))],
    "by mean": lambda pieces: sorted(pieces, key=lambda piece: float(piece.mean[0])),
}


def judged(dtype: str, *, quick: bool = False) -> list[str]:
    """Names of the cases that the bound is stated for; with `quick` without those of 2^20 rows and more."""
    long = {} if quick else MILLION | MANY
    return [*HARD, *ROW_COUNTS, *long, *(BEYOND if dtype == "float64" else {})]


def in_pieces(x: NDArray[Any]) -> list[NDArray[Any]]:
    """The rows in 1,000 pieces of unequal lengths."""
    inner = np.random.default_rng(6).choice(np.arange(1, len(x)), N_PIECES - 1, replace=False)
    return np.split(x, np.sort(inner))


class Data:
    """The arrays of a case, the same in every process."""

    def __init__(self, name: str, dtype: str) -> None:
        self.name = name
        self.dtype = np.dtype(dtype)
        # Values that float32 holds, whatever the dtype, where the case makes them so; else rounded once, here.
        self.x = np.ascontiguousarray(CASES[name](np.random.default_rng(11), self.dtype.type), self.dtype)

    @cached_property
    def grad_y(self) -> NDArray[Any]:
        dtype: Any = self.dtype
        grad_y: NDArray[Any] = np.random.default_rng(12).standard_normal(self.x.shape, dtype)
        grad_y += dtype.type(0.25)
        return grad_y

    @cached_property
    def gamma(self) -> NDArray[Any]:
        return self._uniform(13, 0.5, 2)

    @cached_property
    def beta(self) -> NDArray[Any]:
        return self._uniform(14, -1, 1)

    def _uniform(self, seed: int, low: float, high: float) -> NDArray[Any]:
        values: NDArray[Any] = np.random.default_rng(seed).uniform(low, high, self.x.shape[1:])
        return values.astype(self.dtype)
