"""The bound that fastbn states, and errors in units of it: at most 1 holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
VALUES_AT_ONCE = 1 << 16  # so that temporaries stay in the cache

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
            found[name] = max(_y(exact, *piece) for piece in _pieces(x, result))
        elif name == "grad_x":
            found[name] = _grad_x(exact, x, grad_y, result)
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


def _y(exact: Exact, x: NDArray[Any], result: NDArray[Any]) -> float:
    right = exact.y(x)
    return _over(result - right, 4 * _ulp(np.maximum(1, np.abs(right)), x.dtype))


def _grad_x(exact: Exact, x: NDArray[Any], grad_y: NDArray[Any], result: NDArray[Any]) -> float:
    largest = error = np.zeros(x.shape[1])
    for some_x, some_grad_y, some_result in _pieces(x, grad_y, result):
        right = exact.grad_x(some_x, some_grad_y)
        largest = np.maximum(largest, np.abs(right).max(axis=1))
        error = np.maximum(error, np.abs(some_result - right).max(axis=1))  # NaN stays
    return _over(error, 8 * _ulp(largest, x.dtype))


def difference(name: str, a: NDArray[Any], b: NDArray[Any], dtype: str) -> float:
    """The largest difference of two results in ulp of the data's dtype.

    Of the value (mean, var), of max(1, |y|), of the largest value in the column (grad_x) or of all (the others).
    """
    size = np.maximum(np.abs(a), np.abs(b))
    if name == "y":
        size = np.maximum(size, 1)
    elif name not in STATISTICS:
        size = size.max(axis=0)
    return _over(a.astype(np.float64) - b, _ulp(size, np.dtype(dtype)))


def _pieces(*arrays: NDArray[Any]) -> Iterator[list[NDArray[Any]]]:
    """Some rows of each array at a time, turned to (columns, some rows): NumPy is slow on rows of few columns."""
    step = max(1, VALUES_AT_ONCE // arrays[0].shape[1])
    for start in range(0, len(arrays[0]), step):
        yield [np.ascontiguousarray(array[start:start + step].T) for array in arrays]


def _ulp(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[np.float64]:
    """The distance from a value, rounded to the dtype, to the next larger one."""
    spacing: NDArray[np.float64] = np.spacing(values.astype(dtype)).astype(np.float64)
    return spacing


def _over(error: NDArray[Any], allowed: NDArray[np.float64]) -> float:
    return float(np.max(np.where(np.isfinite(error), np.abs(error) / allowed, np.inf)))
