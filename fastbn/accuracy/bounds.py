"""The bound that fastbn states, and errors in units of it: at most 1 holds."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.accuracy.oracle import Exact

QUANTITIES = ("mean", "var", "y", "grad_x", "grad_gamma", "grad_beta")
STATISTICS = ("mean", "var")
STATED = {  # float64 has a bound for the statistics alone
    ("float32", "mean"): "error at most 1e-7 of max(|mean|, std)",
    ("float32", "var"): "error at most 1e-7 of var",
    ("float32", "y"): "error at most 4 ulp of max(1, |y|)",
    ("float32", "grad_x"): "error at most 8 ulp of the largest value in the column",
    ("float32", "grad_gamma"): "error at most 8 ulp of its value",
    ("float32", "grad_beta"): "error at most 8 ulp of its value",
    ("float64", "mean"): "error at most 1e-13 of max(|mean|, std); beyond |mean|/std = 1e6, 1e-19 |mean|/std of it",
    ("float64", "var"): "error at most 1e-13 of var; beyond |mean|/std = 1e6, 1e-19 |mean|/std of it",
}
ROWS_AT_ONCE = 1 << 19

Results = Mapping[str, "NDArray[Any] | None"]


def ratios(exact: Exact, x: NDArray[Any], grad_y: NDArray[Any], results: Results) -> dict[str, float]:
    """The largest error of each quantity in units of its bound. What a side does not give is left out.

    All arrays are (rows, columns) or (columns,), whatever the layout was. A result that is not finite is off by
    infinity.
    """
    dtype = x.dtype
    found = {}
    for name in QUANTITIES:
        result = results.get(name)
        if result is None or (dtype.name, name) not in STATED:
            continue
        if name in STATISTICS:
            found[name] = _statistics(exact, name, result, dtype)
        elif name == "y":
            found[name] = _largest(
                _over(result[rows] - exact.y(x[rows]), 4 * _ulp(np.maximum(1, np.abs(exact.y(x[rows]))), dtype))
                for rows in _pieces(x)
            )
        elif name == "grad_x":
            largest = np.max([np.abs(exact.grad_x(x[rows], grad_y[rows])).max(axis=0) for rows in _pieces(x)], axis=0)
            found[name] = _largest(
                _over(result[rows] - exact.grad_x(x[rows], grad_y[rows]), 8 * _ulp(largest, dtype))
                for rows in _pieces(x)
            )
        else:
            right = getattr(exact, name)
            found[name] = _over(result - right, 8 * _ulp(np.abs(right), dtype))
    return found


def _statistics(exact: Exact, name: str, result: NDArray[Any], dtype: np.dtype[Any]) -> float:
    worst = 0.0
    for value, mean, var, std in zip(result, exact.means, exact.vars, exact.std, strict=True):
        condition = float(abs(mean)) / std
        bound = 1e-7 if dtype == np.float32 else 1e-13 * max(1.0, condition / 1e6)
        right, size = (mean, max(abs(mean), Fraction(std))) if name == "mean" else (var, var)
        if not np.isfinite(value):
            return np.inf
        worst = max(worst, float(abs(Fraction(float(value)) - right) / size) / bound)
    return worst


def difference(name: str, a: NDArray[Any], b: NDArray[Any]) -> float:
    """The largest difference of two results, in ulp: of max(1, |y|), of the largest value of grad_x in the column, else
    of the value itself."""
    size = np.maximum(np.abs(a), np.abs(b))
    size = {"y": np.maximum(size, 1), "grad_x": size.max(axis=0)}.get(name, size)
    return _over(a.astype(np.float64) - b, _ulp(size, a.dtype))


def _pieces(x: NDArray[Any]) -> list[slice]:
    step = max(1, ROWS_AT_ONCE // x.shape[1])
    return [slice(start, start + step) for start in range(0, len(x), step)]


def _ulp(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[np.float64]:
    """The distance from a value, rounded to the dtype, to the next larger one."""
    return np.spacing(values.astype(dtype)).astype(np.float64)


def _over(error: NDArray[Any], allowed: NDArray[np.float64]) -> float:
    return _largest([float(np.max(np.where(np.isfinite(error), np.abs(error) / allowed, np.inf)))])


def _largest(values: Any) -> float:
    return max(values)
