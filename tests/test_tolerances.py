"""The comparators let nothing wrong pass."""

import numpy as np
import pytest
from tolerances import TOLERANCES, assert_close, assert_same_bits


@pytest.mark.parametrize(("operation", "dtype"), TOLERANCES)
def test_the_border_of_each_tolerance(operation, dtype):
    rtol, atol, reason = TOLERANCES[operation, dtype]
    exact = np.array([3.0, -0.5, 1e-3])
    allowed = (rtol * np.abs(exact) + atol * 2.0).astype(np.longdouble)
    assert reason
    assert 0 < rtol + atol < 1e-4
    assert_close(exact, exact, operation, dtype, scale=2.0)
    assert_close(exact + 0.9 * allowed, exact, operation, dtype, scale=2.0)
    for sign in (1, -1):
        for i in range(3):
            wrong = exact.astype(np.longdouble)
            wrong[i] += sign * 1.1 * allowed[i]
            with pytest.raises(AssertionError, match=rf"1 of 3 values are off; the worst is at \({i},\)"):
                assert_close(wrong, exact, operation, dtype, scale=2.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_fail(bad):
    with pytest.raises(AssertionError, match="1 of 2 values are off"):
        assert_close(np.array([1.0, bad]), np.ones(2), "y", "float32", scale=1e300)
    with pytest.raises(AssertionError, match="exact values must be finite"):
        assert_close(np.array([1.0, bad]), np.array([1.0, bad]), "y", "float32")


def test_scale_is_per_value():
    exact = np.zeros((2, 3))
    wrong = np.full((2, 3), 1e-6)
    assert_close(wrong, exact, "y", "float32", scale=np.full(3, 10.0))
    with pytest.raises(AssertionError, match="2 of 6"):
        assert_close(wrong, exact, "y", "float32", scale=np.array([10.0, 1.0, 10.0]))
    with pytest.raises(AssertionError, match="6 of 6"):
        assert_close(wrong, exact, "y", "float32", scale=0)
    assert_close(exact, exact, "y", "float32", scale=0)


def test_shape_and_key_must_fit():
    with pytest.raises(AssertionError, match=r"shape \(1, 3\) instead of \(3,\)"):
        assert_close(np.ones((1, 3)), np.ones(3), "y", "float32")
    with pytest.raises(KeyError):
        assert_close(np.ones(3), np.ones(3), "y", "float16")


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (np.zeros(3), -np.zeros(3)),
        (np.array([1.0, 1.0 + 2.0**-52]), np.ones(2)),
        (np.ones(3, np.float32), np.ones(3)),
        (np.ones((1, 3)), np.ones(3)),
    ],
    ids=["sign of zero", "last bit", "dtype", "shape"],
)
def test_other_bits_fail(actual, expected):
    with pytest.raises(AssertionError):
        assert_same_bits(actual, expected)
    assert_same_bits(actual, actual.copy())


def test_nan_has_the_same_bits_as_itself():
    assert_same_bits(np.array([np.nan, 1]), np.array([np.nan, 1]))
