"""The exact answers.

The sums over a column (of x, x^2, grad_y and grad_y * x) are exact: integers, without any rounding, whatever the order,
the number of rows and the sizes of the terms. Mean, variance and the sums about the mean follow as fractions, exact
too. Only then come square roots and the values of y and grad_x, in float64, from a mean in two floats: a few roundings
of 1.1e-16 each, where what is judged may be off by 1e-13 (float64) or 4 * 1.2e-7 (float32).
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

PIECE = 1 << 16  # values at a time: sums of 27 bits each stay far below 2^53, and temporaries in the cache
SPLIT = 2.0**27


def exact_sum(values: NDArray[Any]) -> Fraction:
    """The sum of finite values.

    Each is an integer of 53 bits times a power of two. The integers, cut in two halves of at most 27 bits, add up
    without rounding in float64, apart for each power; Python's integers do the rest.
    """
    total = Fraction(0)
    for start in range(0, len(values), PIECE):
        mantissas, powers = np.frexp(values[start:start + PIECE].astype(np.float64))
        lowest = int(powers.min())
        whole = np.ldexp(mantissas, 53)
        high = np.floor(whole / SPLIT)
        highs, lows = (np.bincount(powers - lowest, weights=half) for half in (high, whole - high * SPLIT))
        integer = sum(
            ((int(a) << 27) + int(b)) << shift for shift, (a, b) in enumerate(zip(highs, lows, strict=True)) if a or b
        )
        total += integer * Fraction(2) ** (lowest - 53)
    return total


def products(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """a * b without rounding, as a sum of two (Dekker 1971)."""
    product = a * b
    (a_high, a_low), (b_high, b_low) = halves(a), halves(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def halves(a: Floats) -> tuple[Floats, Floats]:
    """a as a sum of two of at most 26 bits each (Veltkamp 1968)."""
    c = a * (SPLIT + 1)
    high = c - (c - a)
    return high, a - high


def exact_sum_of_products(a: NDArray[Any], b: NDArray[Any]) -> Fraction:
    """The sum of a * b. A power of two keeps the products inside the range of float64."""
    split = max(a.itemsize, b.itemsize) > 4  # the product of two float32 fits into a float64
    (a, a_scale), (b, b_scale) = _scaled(a), _scaled(b)
    total = Fraction(0)
    for start in range(0, len(a), PIECE):
        pair = a[start:start + PIECE], b[start:start + PIECE]
        total += sum(map(exact_sum, products(*pair) if split else (pair[0] * pair[1],)))
    return total * a_scale * b_scale


def _scaled(values: NDArray[Any]) -> tuple[Floats, Fraction]:
    """values with the largest in [0.5, 1), and the power of two that undoes it."""
    values = values.astype(np.float64)
    _, power = math.frexp(np.abs(values).max())
    values = np.ldexp(values, -power)
    if (np.abs(values[values != 0]) < 2.0**-450).any():
        raise ValueError("values too different in size for exact products")
    return values, Fraction(2) ** power


class Exact:
    """What batch norm in training should give for x of shape (rows, columns): small arrays, one value a column.

    `y` and `grad_x` compute the large ones for some of the rows, turned: (columns, some rows).
    """

    def __init__(
        self, x: NDArray[Any], grad_y: NDArray[Any], gamma: NDArray[Any], beta: NDArray[Any], eps: float,
    ) -> None:
        n = len(x)
        self.means: list[Fraction] = []
        self.vars: list[Fraction] = []
        columns = []
        for column, dy in zip(x.T, grad_y.T, strict=True):
            mean = exact_sum(column) / n
            var = exact_sum_of_products(column, column) / n - mean**2
            sum_dy = exact_sum(dy)
            sum_dy_xmu = exact_sum_of_products(dy, column) - mean * sum_dy
            self.means.append(mean)
            self.vars.append(var)
            columns.append((*_two(mean), *_two(sum_dy / n), float(var + Fraction(eps)), sum_dy_xmu, sum_dy))
        self.mean, self._mean_rest, self._mean_dy, self._mean_dy_rest, var_eps, sums, sum_dys = (
            np.array(values) for values in zip(*columns, strict=True)
        )
        self.invstd = 1 / np.sqrt(var_eps)
        self.std = np.sqrt(np.array(self.vars, np.float64))
        self.gamma, self.beta = gamma.astype(np.float64), beta.astype(np.float64)
        self.grad_gamma = self.invstd * sums.astype(np.float64)
        self.grad_beta = sum_dys.astype(np.float64)
        self._slope = self.invstd * (sums / n).astype(np.float64)

    def x_hat(self, x: NDArray[Any]) -> Floats:
        return ((x - _turned(self.mean)) - _turned(self._mean_rest)) * _turned(self.invstd)

    def y(self, x: NDArray[Any]) -> Floats:
        return self.x_hat(x) * _turned(self.gamma) + _turned(self.beta)

    def grad_x(self, x: NDArray[Any], grad_y: NDArray[Any]) -> Floats:
        centred = (grad_y - _turned(self._mean_dy)) - _turned(self._mean_dy_rest)
        return (centred - self.x_hat(x) * _turned(self._slope)) * _turned(self.gamma * self.invstd)


def _turned(values: Floats) -> Floats:
    return values[:, None]


def _two(value: Fraction) -> tuple[float, float]:
    """A fraction as a float64 and what is missing from it."""
    high = float(value)
    return high, float(value - Fraction(high))
