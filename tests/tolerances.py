"""How far a result may be from the exact one: one table, keyed by operation and dtype of the data; its comparator."""

from typing import NamedTuple

import numpy as np


class Tolerance(NamedTuple):
    """``|actual - exact| <= rtol * |exact| + atol * scale``, where scale is the size of the terms that add up."""

    rtol: float
    atol: float
    reason: str


ULP32, ULP64 = 2.0**-23, 2.0**-52

TOLERANCES = {
    # operation, dtype of the data: rtol, atol, reason
    ("mean", "float32"): Tolerance(0, 1e-14, "float64 sums about a pivot; scale: max(|mean|, std)"),
    ("mean", "float64"): Tolerance(0, 1e-14, "the same"),
    ("var", "float32"): Tolerance(1e-14, 0, "float64 sums about a pivot"),
    ("var", "float64"): Tolerance(1e-14, 0, "the same"),
    ("y", "float32"): Tolerance(0, 2 * ULP32, "x - center, scale, offset and y are rounded; scale: the terms"),
    ("y", "float64"): Tolerance(0, 64 * ULP64, "above all the mean's error of up to 1e-14; scale: the terms"),
    ("grad_x", "float32"): Tolerance(0, 3 * ULP32, "as y, with two products; scale: the terms, largest in the column"),
    ("grad_x", "float64"): Tolerance(0, 32 * ULP64, "above all the errors of the sums; scale: the same"),
    ("grad_gamma", "float32"): Tolerance(ULP32, 4e-15, "a float64 sum, rounded once; scale: the sum of |terms|"),
    ("grad_gamma", "float64"): Tolerance(0, 4e-15, "a float64 sum; scale: the sum of |terms|"),
    ("grad_beta", "float32"): Tolerance(ULP32, 4e-15, "as grad_gamma"),
    ("grad_beta", "float64"): Tolerance(0, 4e-15, "as grad_gamma"),
    ("running", "float32"): Tolerance(1e-14, 1e-14, "float64 arithmetic on float64 statistics"),
    ("running", "float64"): Tolerance(1e-14, 1e-14, "the same"),
    # On hard data (large means, outliers, mixed scales), beside the stated bounds in fastbn/accuracy/bounds.py.
    ("hard mean", "float64"): Tolerance(0, 1e-13, "up to mean / std = 1e6; scale: max(|mean|, std)"),
    ("hard var", "float64"): Tolerance(1e-13, 0, "up to mean / std = 1e6"),
    ("hard y", "float64"): Tolerance(0, 1e-13, "the statistics' own error; scale: max(1, |y|)"),
    ("hard grad", "float32"): Tolerance(0, 8 * ULP32, "8 ulp; scale: the largest value in the column"),
    ("hard grad", "float64"): Tolerance(0, 1e-12, "the statistics' own error, some times; scale: the same"),
    # PyTorch computes in the data's dtype throughout, so these are its errors rather than ours.
    ("torch", "float32"): Tolerance(2e-5, 2e-5, "PyTorch's float32 sums over some hundred rows; scale: largest value"),
    ("torch", "float64"): Tolerance(1e-12, 1e-12, "the same in float64"),
}


def excess(actual, exact, operation, dtype, scale=1.0):
    """The error of each value in units of what is allowed: at most 1 is right."""
    tolerance = TOLERANCES[operation, np.dtype(dtype).name]
    actual, exact = np.asarray(actual), np.asarray(exact)
    assert actual.shape == exact.shape, f"{operation}: shape {actual.shape} instead of {exact.shape}"
    assert np.isfinite(exact).all(), f"{operation}: the exact values must be finite"
    error = np.abs(actual.astype(np.longdouble) - exact.astype(np.longdouble))
    allowed = np.broadcast_to(tolerance.rtol * np.abs(exact) + tolerance.atol * np.asarray(scale), exact.shape)
    # A ratio only where something is wrong at all, so that 0 / 0 is right and 1 / 0 is not; NaN stays NaN.
    ratio = np.where(error == 0, np.longdouble(0), np.inf)
    return np.divide(error, allowed, out=ratio, where=(error != 0) & (allowed > 0))


def assert_close(actual, exact, operation, dtype, scale=1.0):
    """Fails unless every value is finite and within the table's tolerance of the exact one."""
    ratio = excess(actual, exact, operation, dtype, scale)
    bad = ~(np.isfinite(np.asarray(actual)) & (ratio <= 1))
    if bad.any():
        worst = np.argmax(np.where(bad, np.nan_to_num(ratio, nan=np.inf), -1))
        at = tuple(int(i) for i in np.unravel_index(worst, ratio.shape))
        raise AssertionError(
            f"{operation} of {np.dtype(dtype)}: {bad.sum()} of {bad.size} values are off; the worst is at {at}: "
            f"{np.asarray(actual)[at]!r} instead of {np.asarray(exact)[at]!r}, {float(ratio[at]):.3g} times what "
            f"is allowed ({TOLERANCES[operation, np.dtype(dtype).name].reason})"
        )


def assert_same_bits(actual, expected, what=""):
    """Fails unless both hold the same bytes in the same shape: NaN equals NaN, and 0 is not -0."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    if actual.tobytes() != expected.tobytes():
        n_other = np.count_nonzero(actual != expected)
        raise AssertionError(f"{what}: the bits differ in {n_other} of {actual.size} values")
