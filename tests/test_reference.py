"""The NumPy reference, the judge of the others: against numbers by hand, finite differences, longdouble."""

import numpy as np
import pytest
from oracle import HAS_WIDE, Exact
from tolerances import assert_close

import fastbn
from fastbn.kernels import reference

# Worked out by hand: columns 1, 3, 5, 7 (mean 4, var 5) and 2, 2, 2, 10 (mean 4, var 12); eps makes the var 9 and 16.
X = np.array([[1, 2], [3, 2], [5, 2], [7, 10]], np.float64)
GAMMA, BETA = np.array([3.0, 2.0]), np.array([1.0, -1.0])


def test_forward_by_hand():
    y, saved = fastbn.batch_norm(X[:, :1], GAMMA[:1], BETA[:1], eps=4.0, backend="numpy")
    np.testing.assert_array_equal(y[:, 0], [-2, 0, 2, 4])
    assert (saved.mean[0], saved.var[0], saved.invstd[0], saved.count) == (4, 5, 1 / 3, 4)
    y, saved = fastbn.batch_norm(X[:, 1:], GAMMA[1:], BETA[1:], eps=4.0, backend="numpy")
    np.testing.assert_array_equal(y[:, 0], [-2, -2, -2, 2])
    assert (saved.mean[0], saved.var[0], saved.invstd[0]) == (4, 12, 0.25)


def test_relu_by_hand():
    y, _ = fastbn.batch_norm(X, GAMMA, BETA, eps=4.0, activation="relu", backend="numpy")
    np.testing.assert_array_equal(y[:, 0], [0, 0, 2, 4])
    y, _ = fastbn.batch_norm(X[:, 1:], GAMMA[1:], BETA[1:], eps=4.0, activation="relu", backend="numpy")
    np.testing.assert_array_equal(y[:, 0], [0, 0, 0, 2])


def test_backward_by_hand():
    """x_hat = -1/2, -1/2, -1/2, 3/2 and grad_y = 1, 2, 3, 6: its mean is 3, the mean of grad_y * x_hat 3/2."""
    _, saved = fastbn.batch_norm(X[:, 1:], GAMMA[1:], BETA[1:], eps=4.0, backend="numpy")
    grad_x, grad_gamma, grad_beta = fastbn.batch_norm_backward(np.array([[1.0], [2], [3], [6]]), saved, backend="numpy")
    # 2 / 4 * (grad_y - 3 + x_hat * -3/2)
    np.testing.assert_array_equal(grad_x[:, 0], [-0.625, -0.125, 0.375, 0.375])
    assert (grad_gamma[0], grad_beta[0]) == (6, 12)


def test_backward_through_a_relu_by_hand():
    """y = -2, -2, -2, 2: only the last grad_y counts, so the means are 3/2 and 9/4."""
    _, saved = fastbn.batch_norm(X[:, 1:], GAMMA[1:], BETA[1:], eps=4.0, activation="relu", backend="numpy")
    grad_x, grad_gamma, grad_beta = fastbn.batch_norm_backward(np.array([[1.0], [2], [3], [6]]), saved, backend="numpy")
    np.testing.assert_array_equal(grad_x[:, 0], [-0.1875, -0.1875, -0.1875, 0.5625])
    assert (grad_gamma[0], grad_beta[0]) == (9, 6)


def test_inference_by_hand():
    y = fastbn.batch_norm_inference(X, [1, 4], [5, 12], GAMMA, BETA, eps=4.0, backend="numpy")
    np.testing.assert_array_equal(y[:, 1], [-2, -2, -2, 2])
    np.testing.assert_allclose(y[:, 0], [1, 3, 5, 7], rtol=1e-15)


def test_moments_by_hand():
    moments = fastbn.moments(X, backend="numpy")
    np.testing.assert_array_equal(moments.mean, [4, 4])
    np.testing.assert_array_equal(moments.m2, [20, 48])


@pytest.mark.parametrize("kernel", ["affine", "grad_affine", "grad_moments"])
def test_the_halves_by_hand(kernel):
    """x = 1, 3, 5 and y = (x - 2) * 3 - 3 = -6, 0, 6: a ReLU lets the last one through alone."""
    x, dy = np.array([1.0, 3, 5]).reshape(3, 1, 1), np.array([10.0, 20, 30]).reshape(3, 1, 1)
    coefs, out = np.array([[2.0], [3.0], [-3.0]]), np.empty((3, 1, 1))
    if kernel == "affine":
        expected = [-6, 0, 6], [0, 0, 6]
        results = [reference.affine(x, coefs, relu, out, 1) or out.ravel().copy() for relu in (False, True)]
    elif kernel == "grad_affine":  # 2 * (dy - 4 - 1 - (x - 2) * 5)
        expected = [20, 20, 20], [0, -20, 20]
        linear = np.array([[2.0], [5.0], [4.0], [1.0]])
        results = [reference.grad_affine(dy, x, coefs, linear, relu, out, 1) or out.ravel().copy()
                   for relu in (False, True)]
    else:  # about a mean of 1.5
        sums = np.empty((2, 1))
        expected = [60, 10 * -0.5 + 20 * 1.5 + 30 * 3.5], [30, 105]
        results = [reference.grad_moments(dy, x, np.array([1.5]), coefs, relu, *sums, 1) or sums.ravel().copy()
                   for relu in (False, True)]
    np.testing.assert_array_equal(results, expected)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (3, 2, 4), (2, 3)])
def test_gradients_by_finite_differences(rng, backend, shape, training, activation):
    x, weights = rng.normal(2, 3, shape), rng.standard_normal(shape)
    gamma, beta = rng.uniform(0.5, 2, shape[1]), rng.uniform(-1, 1, shape[1])
    layer = fastbn.BatchNorm(shape[1], dtype=np.float64, activation=activation, backend=backend)
    layer.running_mean, layer.running_var = rng.normal(2, 1, shape[1]), rng.uniform(5, 9, shape[1])

    def loss(x, gamma, beta):
        layer.gamma, layer.beta = gamma, beta
        return (layer.train(training)(x) * weights).sum()

    def slopes(values, f):
        """Central differences; their own error is about step^2 = 1e-10 and 1e-16 / step."""
        result, step = np.empty_like(values), 1e-5
        for i in np.ndindex(values.shape):
            sides = []
            for sign in (1, -1):
                moved = values.copy()
                moved[i] += sign * step
                sides.append(f(moved))
            result[i] = (sides[0] - sides[1]) / (2 * step)
        return result

    expected = [
        slopes(x, lambda values: loss(values, gamma, beta)),
        slopes(gamma, lambda values: loss(x, values, beta)),
        slopes(beta, lambda values: loss(x, gamma, values)),
    ]
    loss(x, gamma, beta)
    grad_x = layer.backward(weights)
    for actual, by_differences in zip((grad_x, layer.grad_gamma, layer.grad_beta), expected, strict=True):
        np.testing.assert_allclose(actual, by_differences, rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(not HAS_WIDE, reason="longdouble is float64 here")
def test_longdouble_against_a_plain_formula(rng):
    """The oracle of the other tests, against the definition in two lines, on data where float64 would be visible."""
    x = rng.normal(1e6, 1, (500, 4)).astype(np.longdouble)
    dy = rng.standard_normal((500, 4)).astype(np.longdouble)
    exact = Exact(x, eps=1e-5)
    deviation = x - x.mean(axis=0)
    deviation -= deviation.mean(axis=0)  # what the rounding of the mean left, 1e-14
    var = (deviation**2).mean(axis=0)
    x_hat = deviation / np.sqrt(var + np.longdouble(1e-5))
    assert exact.y.dtype == np.longdouble
    np.testing.assert_allclose(exact.mean, x.mean(axis=0), rtol=1e-18)
    np.testing.assert_allclose(exact.var, var, rtol=1e-16)
    np.testing.assert_allclose(exact.y, x_hat, rtol=0, atol=1e-12 * 1e-4)
    grad_x = (dy - dy.mean(axis=0) - x_hat * (dy * x_hat).mean(axis=0)) / np.sqrt(var + np.longdouble(1e-5))
    np.testing.assert_allclose(exact.backward(dy).grad_x, grad_x, rtol=0, atol=1e-17)


def test_float32_data_is_computed_in_float64(rng):
    x = rng.normal(100, 1, (2000, 3)).astype(np.float32)
    exact = Exact(x)
    moments = fastbn.moments(x, backend="numpy")
    assert_close(moments.mean, exact.mean, "mean", np.float32, np.abs(exact.mean))
    assert_close(moments.var(), exact.var, "hard var", np.float64)
