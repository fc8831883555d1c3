"""The stated bounds on hard data. Cases, oracle and bounds are those of `fastbn accuracy`, which adds 2^25 rows.

Any number of threads gives the same bits (test_repeatability.py), so what holds here holds for all of them. .ci/run
repeats this file with each instruction set.
"""

import math
from fractions import Fraction
from functools import cache
from typing import NamedTuple

import numpy as np
import oracle as by_longdouble
import pytest
from tolerances import assert_close

import fastbn
from fastbn.accuracy import bounds, cases, promises, sides
from fastbn.accuracy.cases import EPS, Data
from fastbn.accuracy.oracle import Exact, exact_sum, exact_sum_of_products

IN_PYTEST = [
    (dtype, name) for dtype in ("float32", "float64") for name in cases.judged(dtype) if name not in cases.MANY
]


@cache
def exact_of(dtype, name):
    data = Data(name, dtype)
    return data, Exact(data.x, data.grad_y, data.gamma, data.beta, EPS)


@pytest.fixture(scope="module", params=IN_PYTEST, ids=" ".join)
def case(request):
    """A case and what is exact about it, computed once for all backends."""
    return exact_of(*request.param)


def assert_within_bounds(exact, data, results):
    ratios = bounds.ratios(exact, data.x, data.grad_y, results)
    assert ratios
    assert all(ratio <= 1 for ratio in ratios.values()), ratios


def test_bounds(backend, case):
    data, exact = case
    results = sides.fastbn_side(backend)(data.x, data.grad_y, data.gamma, data.beta)
    assert list(results) == list(bounds.QUANTITIES)
    assert_within_bounds(exact, data, results)


@pytest.mark.parametrize("name", [name for dtype, name in IN_PYTEST if dtype == "float64"])
def test_float64_beyond_what_is_stated(backend, name):
    data, exact = exact_of("float64", name)
    results = sides.fastbn_side(backend)(data.x, data.grad_y, data.gamma, data.beta)
    y, grad_x = exact.y(data.x.T).T, exact.grad_x(data.x.T, data.grad_y.T).T
    assert_close(results["y"], y, "hard y", data.dtype, np.maximum(1, np.abs(y)))
    two = len(data.x) == 2  # the oracle is float64 too: it sees what is left of two rows with the terms' rounding
    largest = np.abs(exact.gamma * exact.invstd * data.grad_y if two else grad_x).max(axis=0)
    assert_close(results["grad_x"], grad_x, "hard grad", data.dtype, largest)
    terms = np.abs(data.grad_y * exact.x_hat(data.x.T).T).sum(axis=0)
    assert_close(results["grad_gamma"], exact.grad_gamma, "hard grad", data.dtype, terms)
    assert_close(results["grad_beta"], exact.grad_beta, "hard grad", data.dtype, np.abs(data.grad_y).sum(axis=0))


class Turned(NamedTuple):
    """Rows and columns as another layout, and back."""

    there: object
    back: object
    axis: int = 1


def images(*inner):
    """(rows, columns) as (batch, columns, *inner)."""
    return Turned(
        lambda x: np.ascontiguousarray(np.moveaxis(x.reshape(-1, *inner, x.shape[1]), -1, 1)),
        lambda y: np.moveaxis(y, 1, -1).reshape(-1, y.shape[1]),
    )


def every_other_row(x):
    wide = np.zeros((2 * len(x), x.shape[1]), x.dtype)
    wide[::2] = x
    return wide[::2]


def some_columns(x):
    wide = np.zeros((len(x), x.shape[1] + 5), x.dtype)
    wide[:, 2:-3] = x
    return wide[:, 2:-3]


def in_64_columns(x):
    """The columns over and over."""
    return np.take(x, np.arange(64) % x.shape[1], axis=1)


LAYOUTS = {
    "64 columns": Turned(in_64_columns, np.asarray),
    "Fortran": Turned(np.asfortranarray, np.asarray),
    "NCL, 5": images(5),
    "NCHW, 4 x 10": images(4, 10),
    "NCDHW, 3 x 5 x 20": images(3, 5, 20),
    "channels last": Turned(lambda x: x.reshape(-1, 4, 10, x.shape[1]), lambda y: y.reshape(-1, y.shape[-1]), -1),
    "every other row": Turned(every_other_row, np.asarray),
    "some columns": Turned(some_columns, np.asarray),
}
IN_LAYOUTS = ["mean/std 1e+06", "first row an outlier", "300 rows of outliers first", "1e30 inside among ones",
              "scales 1e-30 to 1e30", "subnormals of float32", "alternating signs"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", IN_LAYOUTS)
def test_bounds_in_other_layouts(backend, dtype, name, layout):
    data, exact = exact_of(dtype.name, name)
    there, back, axis = LAYOUTS[layout]
    x, own = there(data.x), slice(len(data.gamma))
    columns = np.arange(x.shape[axis]) % len(data.gamma)
    y, saved = fastbn.batch_norm(x, data.gamma[columns], data.beta[columns], axis=axis, eps=EPS, backend=backend)
    grad_x, grad_gamma, grad_beta = fastbn.batch_norm_backward(there(data.grad_y), saved, backend=backend)
    assert_within_bounds(exact, data, {
        "mean": saved.mean[own], "var": saved.var[own], "y": back(y)[:, own],
        "grad_x": back(grad_x)[:, own], "grad_gamma": grad_gamma[own], "grad_beta": grad_beta[own],
    })


@pytest.mark.parametrize("mean", [1e2, 1e4, 1e6])
def test_gradients_of_a_loss_with_a_large_mean(backend, dtype, mean):
    """What grad_y has in common cancels: grad_x must not lose what differs."""
    rng = np.random.default_rng(5)
    x, grad_y = rng.standard_normal((3000, 5)).astype(dtype), (rng.standard_normal((3000, 5)) + mean).astype(dtype)
    _, saved = fastbn.batch_norm(x, eps=EPS, backend=backend)
    exact = Exact(x, grad_y, np.ones(5), np.zeros(5), EPS).grad_x(x.T, grad_y.T).T
    grad_x, _, _ = fastbn.batch_norm_backward(grad_y, saved, backend=backend)
    scale = np.abs(exact).max(axis=0) * (1 if dtype == np.float32 else 1 + mean / 100)
    assert_close(grad_x, exact, "hard grad", dtype, scale)


def test_subnormals_of_float64(backend):
    """Their squares are 0 in float64, so the variance is, and eps alone is left to divide by."""
    x = np.random.default_rng(6).integers(1, 1000, (3000, 5)) * 2.0**-1074
    y, saved = fastbn.batch_norm(x, backend=backend)
    np.testing.assert_array_equal(saved.var, np.zeros(5))
    np.testing.assert_allclose(saved.mean, x.mean(axis=0), rtol=0, atol=2.0**-1073)
    assert np.abs(y).max() < 1e-300


@pytest.mark.parametrize("scale", [1e155, 1e200, 1e300])
def test_squares_that_overflow_float64_spoil_their_column_alone(backend, scale):
    """The limit that docs/numerics.md states: never a wrong finite variance, and no word of warning."""
    clean = np.random.default_rng(7).standard_normal((3000, 5))
    x = clean.copy()
    x[:, 2] *= scale
    grad_y, others = np.ones_like(x), [0, 1, 3, 4]
    results = []
    for batch in (clean, x):
        y, saved = fastbn.batch_norm(batch, backend=backend)
        results.append((y, saved.mean, saved.var, *fastbn.batch_norm_backward(grad_y, saved, backend=backend)))
    for expected, actual in zip(*results, strict=True):
        np.testing.assert_array_equal(actual[..., others], expected[..., others])
    assert not np.isfinite(results[1][2][2])


@pytest.mark.parametrize("shape", [(2, 3), (100, 3), (5000, 3), (40, 700), (6, 3, 5), (30, 3, 49)])
@pytest.mark.parametrize("value", [*cases.CONSTANTS, 0.1])
def test_constant_columns(backend, dtype, rng, value, shape):
    x = np.full(shape, value, dtype)
    gamma, beta = (rng.uniform(-2, 2, shape[1]).astype(dtype) for _ in range(2))
    y, saved = fastbn.batch_norm(x, gamma, beta, backend=backend)
    column = beta.reshape([-1 if i == 1 else 1 for i in range(len(shape))])
    assert (saved.var == 0).all()
    assert (saved.mean == dtype.type(value)).all()
    np.testing.assert_array_equal(y, np.broadcast_to(column, shape))
    grad_x, grad_gamma, _ = fastbn.batch_norm_backward(rng.standard_normal(shape).astype(dtype), saved, backend=backend)
    assert np.isfinite(grad_x).all()
    np.testing.assert_array_equal(grad_gamma, np.zeros(shape[1], dtype))


@pytest.mark.parametrize("value", [1e150, 1e200, 1.7e308])
def test_constant_columns_whose_squares_overflow(backend, value):
    y, saved = fastbn.batch_norm(np.full((1000, 2), value), backend=backend)
    np.testing.assert_array_equal([saved.mean, saved.var], [[value, value], [0, 0]])
    np.testing.assert_array_equal(y, np.zeros((1000, 2)))


@pytest.mark.parametrize("name", cases.PIECES)
def test_moments_merged_from_1000_pieces(backend, dtype, name):
    found = promises.merged(name, dtype.name, backend)
    assert list(found) == list(cases.ORDERS)
    assert all(ratio <= 1 for ratio in found.values()), found


@pytest.mark.parametrize("name", cases.PIECES)
def test_the_order_of_merging_does_not_matter(backend, name):
    errors = promises.merged(name, "float64", backend).values()
    assert max(errors) - min(errors) <= 1


def test_the_mean_of_many_blocks_after_an_outlier(compiled):
    """The first pivot is far from the mean, which must not cost digits where a chunk has several blocks."""
    x = np.random.default_rng(3).standard_normal((2**22, 2))
    x[0] = 1e8, 8e8 / 7
    mean = fastbn.moments(x, backend=compiled).mean
    for column, value in zip(x.T, mean, strict=True):
        assert abs(Fraction(value) - exact_sum(column) / len(x)) < 1e-16 * column.std()


TWO_VALUES = {
    "(2, C)": Turned(np.ascontiguousarray, np.asarray),
    "Fortran": Turned(np.asfortranarray, np.asarray),
    "(1, C, 2)": Turned(lambda x: np.ascontiguousarray(x.T)[None], lambda y: y[0].T),
    "(2, C, 1, 1)": Turned(lambda x: x[:, :, None, None], lambda y: y[:, :, 0, 0]),
    "every other row": Turned(every_other_row, np.asarray),
}


@pytest.mark.parametrize("layout", TWO_VALUES)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("std", [1e-3, 1, 1e3, 1e10])
def test_the_gradient_of_two_values(backend, dtype, std, activation, layout):
    """Its terms cancel to eps / (var + eps) of themselves, 1e-25 of them for the last std."""
    rng = np.random.default_rng(9)
    x, dy = (rng.normal(3, 1, (2, 20)) * std).astype(dtype), rng.normal(0.25, 1, (2, 20)).astype(dtype)
    gamma, beta = rng.uniform(0.5, 2, 20).astype(dtype), rng.uniform(-1, 1, 20).astype(dtype)
    there, back, axis = TWO_VALUES[layout]
    y, saved = fastbn.batch_norm(there(x), gamma, beta, eps=EPS, axis=axis, activation=activation, backend=backend)
    grad_x, *_ = fastbn.batch_norm_backward(there(dy), saved, backend=backend)
    in_place = there(dy.copy())
    fastbn.batch_norm_backward(in_place, saved, out=in_place, backend=backend)
    np.testing.assert_array_equal(in_place, grad_x)
    if activation:
        dy = np.where(back(y) > 0, dy, 0)
    for c in range(20):
        expected = np.array(by_fractions(x[:, c], dy[:, c], gamma[c], beta[c])["grad_x"], np.float64)
        assert np.abs(back(grad_x)[:, c] - expected).max() <= 8 * np.spacing(np.abs(expected).max().astype(dtype))


# ------------------------------------------------------------------------------------------------------ the judges


RATIONAL = ["mean/std 1e+06", "first row an outlier", "1e30 first among ones", "alternating signs",
            "subnormals of float32", "2 rows"]


def fractions(values):
    return [Fraction(float(value)) for value in values]


def by_fractions(x, dy, gamma, beta):
    """One column in rational arithmetic."""
    xs, dys, n = fractions(x), fractions(dy), len(x)
    (gamma, beta), eps = fractions([gamma, beta]), Fraction(EPS)
    mean = sum(xs) / n
    var = sum((value - mean) ** 2 for value in xs) / n
    # invstd to some 290 bits, by the integer square root; the rest is exact again
    invstd = 1 / (Fraction(isqrt((var + eps) * 4**300)) / 2**300)
    x_hat = [(value - mean) * invstd for value in xs]
    grad_beta, grad_gamma = sum(dys), sum(a * b for a, b in zip(dys, x_hat, strict=True))
    return {
        "mean": mean, "var": var, "y": [gamma * value + beta for value in x_hat],
        "grad_x": [gamma * invstd * (a - grad_beta / n - b * grad_gamma / n) for a, b in zip(dys, x_hat, strict=True)],
        "grad_gamma": [grad_gamma], "grad_beta": [grad_beta],
    }


@pytest.mark.parametrize("name", RATIONAL)
def test_the_oracle_against_rational_arithmetic(dtype, name):
    data = Data(name, dtype)
    x, dy = data.x[:100, :1], data.grad_y[:100, :1]
    exact = Exact(x, dy, data.gamma[:1], data.beta[:1], EPS)
    right = by_fractions(x[:, 0], dy[:, 0], data.gamma[0], data.beta[0])
    assert (exact.means, exact.vars) == ([right["mean"]], [right["var"]])
    near = 1e-14 if len(x) > 2 else 1e-10  # of two rows next to nothing is left
    actual = {"y": exact.y(x.T)[0], "grad_x": exact.grad_x(x.T, dy.T)[0],
              "grad_gamma": exact.grad_gamma, "grad_beta": exact.grad_beta}
    for quantity, values in actual.items():
        expected = np.array(right[quantity], np.float64)
        np.testing.assert_allclose(values, expected, rtol=0, atol=near * np.abs(expected).max())


def isqrt(fraction):
    """The square root of the whole part, rounded down."""
    return math.isqrt(fraction.numerator // fraction.denominator)


def test_exact_sums_are_exact(rng):
    values = np.concatenate([rng.standard_normal(3000) * 10.0 ** rng.integers(-300, 300, 3000), [0.0, -0.0, 5e-324]])
    assert exact_sum(values) == sum(fractions(values))
    long = np.resize([1e16, 1.0, -1e16, 2.0**-60], 200_001)  # more than a piece
    assert exact_sum(long) == sum(fractions(long))
    a, b = rng.standard_normal((2, 500)) * 10.0 ** rng.integers(-60, 60, (2, 500))
    assert exact_sum_of_products(a, b) == sum(p * q for p, q in zip(fractions(a), fractions(b), strict=True))
    with pytest.raises(ValueError, match="too different"):
        exact_sum_of_products(np.array([1.0, 1e-200]), np.array([1.0, 1.0]))


@pytest.mark.parametrize("name", ["mean", "var", "y", "grad_x", "grad_gamma", "grad_beta"])
@pytest.mark.parametrize(("off", "within"), [(0.9, True), (1.1, False), (np.nan, False), (np.inf, False)])
def test_the_comparator(name, off, within):
    """Results that are off by 0.9 and by 1.1 of the bound."""
    data, exact = exact_of("float32", "mean/std 1")
    y, grad_x = exact.y(data.x.T).T, exact.grad_x(data.x.T, data.grad_y.T).T
    right = {"mean": exact.mean, "var": np.array(exact.vars, np.float64), "y": y, "grad_x": grad_x,
             "grad_gamma": exact.grad_gamma, "grad_beta": exact.grad_beta}[name].copy()
    at = (17, 3) if right.ndim == 2 else 3
    allowed = {
        "mean": 1e-7 * max(abs(exact.mean[3]), exact.std[3]), "var": 1e-7 * right[at],
        "y": 4 * np.spacing(np.float32(max(1, abs(y[17, 3])))),
        "grad_x": 8 * np.spacing(np.float32(np.abs(grad_x[:, 3]).max())),
    }.get(name, 8 * np.spacing(np.float32(abs(right[at]))))
    right[at] += off * allowed
    ratio = bounds.ratios(exact, data.x, data.grad_y, {name: right})[name]
    assert (ratio <= 1) == within
    if np.isfinite(off):
        np.testing.assert_allclose(ratio, off, rtol=1e-3)


@pytest.mark.skipif(not by_longdouble.HAS_WIDE, reason="longdouble is float64 here")
def test_the_two_oracles_agree(dtype):
    """The exact sums, and the reference's kernels on longdouble data, which the other tests use."""
    data, exact = exact_of(dtype.name, "mean/std 10000")
    other = by_longdouble.Exact(data.x, data.gamma, data.beta, eps=EPS)
    gradients = other.backward(data.grad_y)
    for actual, expected in ((exact.mean, other.mean), (exact.std, other.std), (exact.y(data.x.T).T, other.y),
                             (exact.grad_x(data.x.T, data.grad_y.T).T, gradients.grad_x),
                             (exact.grad_gamma, gradients.grad_gamma)):
        np.testing.assert_allclose(actual, expected.astype(np.float64), rtol=1e-12, atol=1e-14)
