"""The stated bounds on hard data: large means, outliers, mixed scales, subnormals, constants, many rows."""

from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
from oracle import HAS_WIDE, Exact, Gradients
from tolerances import assert_close

import fastbn

pytestmark = pytest.mark.skipif(not HAS_WIDE, reason="longdouble is float64 here, too little for an oracle")

N = 3000  # rows, where a case says nothing else


def offset(ratio):
    return lambda rng, dtype: rng.standard_normal((N, 5)) + ratio


def outlier(row, value=1e6):
    def make(rng, dtype):
        x = rng.standard_normal((N, 5))
        x[row] += value
        return x
    return make


def one_huge(row):
    def make(rng, dtype):
        x = np.ones((N, 5))
        x[row] = 1e30
        return x
    return make


def alternating(rng, dtype):
    return np.abs(rng.normal(100, 1, (N, 5))) * np.where(np.arange(N) % 2, 1, -1)[:, None]


def rows(n, channels=3):
    return lambda rng, dtype: rng.normal(3, 1, (n, channels))


CASES = {
    **{f"mean/std {ratio:g}": offset(ratio) for ratio in (0, 1, 1e2, 1e4, 1e6)},
    **{f"mean/std {ratio:g}, negative": offset(-ratio) for ratio in (1e3, 1e5)},
    "outlier first": outlier(0),
    "outlier second": outlier(1),
    "outlier inside": outlier(1717),
    "outlier last": outlier(-1),
    "first rows all outliers": outlier(slice(0, 40)),
    "1e30 first among ones": one_huge(0),
    "1e30 inside among ones": one_huge(1717),
    "1e30 last among ones": one_huge(-1),
    "scales side by side": lambda rng, dtype: rng.normal(1, 1, (N, 61)) * 10.0 ** np.arange(-30, 31),
    "squares overflow float32": lambda rng, dtype: rng.normal(1e20, 1e25, (N, 5)),
    "subnormals of float32": lambda rng, dtype: rng.integers(-1000, 1000, (N, 5)) * 2.0**-149,
    "sorted": lambda rng, dtype: np.sort(rng.normal(10, 3, (N, 5)), axis=0),
    "sorted downwards": lambda rng, dtype: -np.sort(rng.normal(10, 3, (N, 5)), axis=0),
    "alternating signs": alternating,
    "a trend": lambda rng, dtype: np.arange(N)[:, None] * [1.0, 10, 1e3, -1, 1e-5] + rng.standard_normal((N, 5)),
    "two values": lambda rng, dtype: rng.choice([1e6, 1e6 + 1], (N, 5)),
    **{f"{n} rows": rows(n) for n in (2, 3, 7, 17, 129, 1025, 65537)},
    "1000000 rows": rows(1_000_000, 2),
}


class Case(NamedTuple):
    name: str
    x: np.ndarray
    grad_y: np.ndarray
    exact: Exact
    gradients: Gradients


@pytest.fixture(scope="module", params=CASES)
def case(request, dtype):
    """x and what is exact about it, computed once for all backends."""
    x = CASES[request.param](np.random.default_rng(11), dtype).astype(dtype)
    exact = Exact(x)
    grad_y = np.random.default_rng(12).standard_normal(x.shape).astype(dtype)
    return Case(request.param, x, grad_y, exact, exact.backward(grad_y))


def test_statistics(backend, dtype, case):
    x, exact = case.x, case.exact
    moments = fastbn.moments(x, backend=backend)
    size = np.maximum(np.abs(exact.mean), exact.std)
    assert_close(moments.mean, exact.mean, "hard mean", dtype, size)
    assert_close(moments.var(), exact.var, "hard var", dtype)


def worth(exact, dtype):
    """float64 has no second float for the mean: its rounding, 1e-16 of the mean, is an error in every deviation."""
    return 1 if dtype == np.float32 else 1 + np.abs(exact.mean) / np.sqrt(exact.var + 1e-5) / 100


def test_y(backend, dtype, case):
    x, exact = case.x, case.exact
    y, _ = fastbn.batch_norm(x, backend=backend)
    assert_close(y, exact.y, "hard y", dtype, np.maximum(1, np.abs(exact.y)) * worth(exact, dtype))


def test_gradients(backend, dtype, case):
    name, x, grad_y, exact, gradients = case
    _, saved = fastbn.batch_norm(x, backend=backend)
    grad_x, grad_gamma, grad_beta = fastbn.batch_norm_backward(grad_y, saved, backend=backend)
    # Of two rows a gradient of 0 is left, up to the rounding of the terms that cancel.
    largest = gradients.grad_x_terms if name in ("2 rows", "3 rows") else gradients.grad_x_largest
    assert_close(grad_x, gradients.grad_x, "hard grad", dtype, largest * worth(exact, dtype))
    assert_close(grad_gamma, gradients.grad_gamma, "hard grad", dtype, gradients.grad_gamma_terms * worth(exact, dtype))
    assert_close(grad_beta, gradients.grad_beta, "hard grad", dtype, gradients.grad_beta_terms)


@pytest.mark.parametrize("mean", [1e2, 1e4, 1e6])
def test_gradients_of_a_loss_with_a_large_mean(backend, dtype, mean):
    """What grad_y has in common cancels: grad_x must not lose what differs."""
    rng = np.random.default_rng(5)
    x, grad_y = rng.standard_normal((N, 5)).astype(dtype), (rng.standard_normal((N, 5)) + mean).astype(dtype)
    _, saved = fastbn.batch_norm(x, backend=backend)
    gradients = Exact(x).backward(grad_y)
    grad_x, _, _ = fastbn.batch_norm_backward(grad_y, saved, backend=backend)
    scale = gradients.grad_x_largest * (1 if dtype == np.float32 else 1 + mean / 100)
    assert_close(grad_x, gradients.grad_x, "hard grad", dtype, scale)


@pytest.mark.parametrize("axes", ["Fortran", "NCHW 32", "NCHW 49", "NCHW 5"])
@pytest.mark.parametrize("make", [offset(1e4), offset(1e6), outlier(0), outlier(slice(0, 160))],
                         ids=["1e4", "1e6", "outlier first", "outliers first"])
def test_other_sweeps(backend, dtype, make, axes):
    x = make(np.random.default_rng(11), dtype).astype(dtype)
    if axes == "Fortran":
        x = np.asfortranarray(x)
    else:
        inner = int(axes.split()[1])
        x = np.ascontiguousarray(x[: N // inner * inner].reshape(-1, inner, 5).transpose(0, 2, 1))
    exact = Exact(x)
    y, saved = fastbn.batch_norm(x, backend=backend)
    assert_close(saved.mean, exact.mean, "hard mean", dtype, np.maximum(np.abs(exact.mean), exact.std))
    assert_close(saved.var, exact.var, "hard var", dtype)
    if dtype == np.float32:
        assert_close(y, exact.y, "hard y", dtype, np.maximum(1, np.abs(exact.y)))


def test_mean_over_std_of_1e7(backend):
    """Beyond float32's own resolution: what is left of the data is still normalized exactly."""
    x = (np.random.default_rng(1).standard_normal((N, 5)) + 1e7).astype(np.float32)
    exact = Exact(x)
    y, saved = fastbn.batch_norm(x, backend=backend)
    assert_close(saved.mean, exact.mean, "hard mean", np.float32, np.abs(exact.mean))
    assert_close(saved.var, exact.var, "hard var", np.float32)
    assert_close(y, exact.y, "hard y", np.float32, np.maximum(1, np.abs(exact.y)))


@pytest.mark.parametrize("ratio", [1e8, 1e10])
def test_float64_beyond_1e6_loses_no_more_than_the_condition_number(backend, ratio):
    x = np.random.default_rng(1).standard_normal((N, 5)) + ratio
    exact, moments = Exact(x), fastbn.moments(x, backend=backend)
    assert_close(moments.mean, exact.mean, "hard mean", np.float64, np.abs(exact.mean))
    assert_close(moments.var(), exact.var, "hard var", np.float64)


def test_subnormals_of_float64(backend):
    """Their squares are 0 in float64, so the variance is, and eps alone is left to divide by."""
    x = np.random.default_rng(6).integers(1, 1000, (N, 5)) * 2.0**-1074
    y, saved = fastbn.batch_norm(x, backend=backend)
    np.testing.assert_array_equal(saved.var, np.zeros(5))
    np.testing.assert_allclose(saved.mean, x.mean(axis=0), rtol=0, atol=2.0**-1073)
    assert np.abs(y).max() < 1e-300


@pytest.mark.parametrize("shape", [(2, 3), (100, 3), (5000, 3), (40, 700), (6, 3, 5), (30, 3, 49)])
@pytest.mark.parametrize("value", [0, 1, 14.62, 1e7, 1e30, -1e-30, 0.1])
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


@pytest.mark.parametrize("order", ["as drawn", "smallest first", "largest first", "shuffled"])
def test_moments_merged_from_1000_pieces(backend, dtype, order):
    rng = np.random.default_rng(4)
    x = rng.normal([0, 1e3, 1e6], 1, (40_000, 3)).astype(dtype)
    x[12_345] += 1e6
    borders = np.sort(rng.choice(np.arange(1, len(x)), 999, replace=False))
    pieces = [fastbn.moments(piece, num_threads=1, backend=backend) for piece in np.split(x, borders)]
    pieces = {
        "as drawn": lambda: pieces,
        "smallest first": lambda: sorted(pieces, key=lambda piece: piece.count),
        "largest first": lambda: sorted(pieces, key=lambda piece: -piece.count),
        "shuffled": lambda: [pieces[i] for i in rng.permutation(1000)],
    }[order]()
    merged = sum(pieces, fastbn.Moments.empty(3))
    exact = Exact(x)
    assert merged.count == 40_000
    assert_close(merged.mean, exact.mean, "hard mean", dtype, np.maximum(np.abs(exact.mean), exact.std))
    assert_close(merged.var(), exact.var, "hard var", dtype)


@pytest.mark.parametrize("name", ["mean/std 1e+06", "outlier first", "1e30 first among ones", "alternating signs"])
def test_the_oracle_itself_against_rational_arithmetic(dtype, name):
    x = CASES[name](np.random.default_rng(11), dtype)[:200, 0].astype(dtype)
    values = [Fraction(float(value)) for value in x]
    mean = sum(values) / len(values)
    var = sum((value - mean) ** 2 for value in values) / len(values)
    exact = Exact(x[:, None])
    size = max(abs(mean), Fraction(float(exact.std[0])))
    assert abs(Fraction(*exact.mean[0].as_integer_ratio()) - mean) < Fraction(1, 10**17) * size
    assert abs(Fraction(*exact.var[0].as_integer_ratio()) - var) < Fraction(1, 10**15) * var
