"""How far a result may be from the exact one: one table, keyed by operation and dtype of the data, and its comparator."""

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
    ("mean", "float32"): Tolerance(0, 1e-13, "float64 sums about a pivot; scale: max(|mean|, std)"),
    ("mean", "float64"): Tolerance(0, 1e-13, "the same"),
    ("var", "float32"): Tolerance(1e-13, 0, "the pivot costs at most a factor 1 + n / k of float64's 1e-16"),
    ("var", "float64"): Tolerance(1e-13, 0, "the same"),
    ("y", "float32"): Tolerance(0, 4 * ULP32, "x - center, scale, offset and the result are rounded; scale: the terms"),
    ("y", "float64"): Tolerance(0, 8 * ULP64, "the same, and mean and invstd are rounded as well"),
    ("grad_x", "float32"): Tolerance(0, 8 * ULP32, "as y, with two products; scale: the terms, largest in the column"),
    ("grad_x", "float64"): Tolerance(0, 32 * ULP64, "the same, and the sums are rounded as well"),
    ("grad_gamma", "float32"): Tolerance(ULP32, 1e-14, "a float64 sum, rounded once; scale: the sum of |terms|"),
    ("grad_gamma", "float64"): Tolerance(0, 1e-14, "a float64 sum in blocks; scale: the sum of |terms|"),
    ("grad_beta", "float32"): Tolerance(ULP32, 1e-14, "as grad_gamma"),
    ("grad_beta", "float64"): Tolerance(0, 1e-14, "as grad_gamma"),
    ("running", "float32"): Tolerance(1e-12, 1e-12, "float64 arithmetic on float64 statistics"),
    ("running", "float64"): Tolerance(1e-12, 1e-12, "the same"),
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
    return np.divide(error, allowed, out=np.where(error == 0, np.longdouble(0), np.inf), where=(error != 0) & (allowed > 0))


def assert_close(actual, exact, operation, dtype, scale=1.0):
    """Fails unless every value is finite and within the table's tolerance of the exact one."""
    ratio = excess(actual, exact, operation, dtype, scale)
    bad = ~(np.isfinite(np.asarray(actual)) & (ratio <= 1))
    if bad.any():
        at = np.unravel_index(np.argmax(np.where(bad, np.nan_to_num(ratio, nan=np.inf), -1)), ratio.shape)
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
        raise AssertionError(f"{what}: the bits differ in {np.count_nonzero(actual != expected)} of {actual.size} values")
