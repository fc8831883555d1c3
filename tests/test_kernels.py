"""Every backend, dtype and layout against the reference on longdouble data."""

from functools import cache

import numpy as np
import pytest
from layouts import LARGE, LAYOUTS, draw, drawn
from oracle import Exact
from tolerances import assert_close

import fastbn

ACTIVATIONS = [None, "relu"]


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


@cache
def exact_of(layout, dtype):
    x, _, gamma, beta, axis = drawn(layout, dtype)
    return Exact(x, gamma, beta, axis=axis)


@cache
def exact_gradients_of(layout, dtype):
    return exact_of(layout, dtype).backward(drawn(layout, dtype).grad_y)


@cache
def exact_inference_of(layout, dtype):
    """About some statistics, with another eps."""
    x, _, gamma, beta, axis = drawn(layout, dtype)
    channels = x.shape[axis]
    mean, var = np.linspace(-2, 2, channels), np.linspace(0.5, 3, channels)
    return mean, var, Exact(x, gamma, beta, axis=axis, eps=1e-3, mean=mean, var=var)


def check_forward(y, saved, exact, dtype, activation=None):
    exact_y = np.maximum(exact.y, 0) if activation == "relu" else exact.y
    assert y.dtype == dtype
    assert saved.count == exact.x.shape[2]
    assert_close(saved.mean, exact.mean, "mean", dtype, np.maximum(np.abs(exact.mean), exact.std))
    assert_close(saved.var, exact.var, "var", dtype)
    assert_close(saved.invstd, exact.invstd, "var", dtype)
    assert_close(y, exact_y, "y", dtype, exact.y_terms)


def check_backward(gradients, exact, dtype):
    grad_x, grad_gamma, grad_beta = gradients
    assert grad_x.dtype == grad_gamma.dtype == grad_beta.dtype == dtype
    assert_close(grad_x, exact.grad_x, "grad_x", dtype, exact.grad_x_terms)
    assert_close(grad_gamma, exact.grad_gamma, "grad_gamma", dtype, exact.grad_gamma_terms)
    assert_close(grad_beta, exact.grad_beta, "grad_beta", dtype, exact.grad_beta_terms)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_and_backward(backend, dtype, layout, activation):
    x, grad_y, gamma, beta, axis = drawn(layout, dtype)
    exact = exact_of(layout, dtype)
    y, saved = fastbn.batch_norm(x, gamma, beta, axis=axis, activation=activation, num_threads=3, backend=backend)
    check_forward(y, saved, exact, dtype, activation)
    gradients = fastbn.batch_norm_backward(grad_y, saved, num_threads=3, backend=backend)
    exact_gradients = exact.backward(grad_y, on=y > 0) if activation else exact_gradients_of(layout, dtype)
    check_backward(gradients, exact_gradients, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_inference(backend, dtype, layout, activation):
    x, _, gamma, beta, axis = drawn(layout, dtype)
    mean, var, exact = exact_inference_of(layout, dtype)
    y = fastbn.batch_norm_inference(
        x, mean, var, gamma, beta, axis=axis, eps=1e-3, activation=activation, num_threads=3, backend=backend
    )
    assert y.dtype == dtype
    assert_close(y, np.maximum(exact.y, 0) if activation else exact.y, "y", dtype, exact.y_terms)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("order", ["C", "F"])
def test_vectors_that_lie_in_out(backend, order, num_threads):
    """They are taken before anything is written: mean, var, gamma and beta, one or all, may lie where y will."""
    x = np.asarray(np.random.default_rng(0).normal(3, 2, (32, 4096)), order=order)
    vectors = np.random.default_rng(1).uniform(0.5, 2, (4, 4096))
    training = fastbn.batch_norm(x, *vectors[2:], backend=backend)[0]
    inference = fastbn.batch_norm_inference(x, *vectors, backend=backend)
    for places in ((1000, None, None, None), (None, 1000, None, None), (None, None, 1000, None),
                   (None, None, None, 1000), (1000, 90_000, 20_000, 125_000), (125_000, 1000, 60_000, 66_000)):
        for function, n, wanted in (("batch_norm", 2, training), ("batch_norm_inference", 4, inference)):
            out = np.empty_like(x)
            given = [vector if at is None else out.ravel("K")[at : at + 4096]
                     for vector, at in zip(vectors, places, strict=True)]
            for target, vector in zip(given, vectors, strict=True):
                target[:] = vector
            result = getattr(fastbn, function)(x, *given[4 - n :], backend=backend, out=out, num_threads=num_threads)
            np.testing.assert_array_equal(out, wanted)
            assert (result[0] if n == 2 else result) is out


def test_moments(backend, dtype, layout):
    x, _, _, _, axis = drawn(layout, dtype)
    exact = exact_of(layout, dtype)
    moments = fastbn.moments(x, axis=axis, num_threads=3, backend=backend)
    assert moments.count == exact.x.shape[2]
    assert_close(moments.mean, exact.mean, "mean", dtype, np.maximum(np.abs(exact.mean), exact.std))
    assert_close(moments.var(), exact.var, "var", dtype)


@pytest.mark.parametrize("given", ["neither", "gamma", "beta"])
@pytest.mark.parametrize("layout", ["1301x77", "inner 8", "inner 49"])
def test_gamma_and_beta_are_1_and_0_by_default(backend, dtype, layout, given):
    x, grad_y, gamma, beta, axis = drawn(layout, dtype)
    gamma, beta = gamma if given == "gamma" else None, beta if given == "beta" else None
    exact = Exact(x, gamma, beta, axis=axis)
    y, saved = fastbn.batch_norm(x, gamma, beta, axis=axis, backend=backend)
    check_forward(y, saved, exact, dtype)
    check_backward(fastbn.batch_norm_backward(grad_y, saved, backend=backend), exact.backward(grad_y), dtype)


@pytest.mark.parametrize("eps", [0, 1e-12, 0.1, 100.0])
def test_eps(backend, dtype, eps):
    x, grad_y, gamma, beta, axis = drawn("1000x64", dtype)
    exact = Exact(x, gamma, beta, axis=axis, eps=eps)
    y, saved = fastbn.batch_norm(x, gamma, beta, axis=axis, eps=eps, backend=backend)
    check_forward(y, saved, exact, dtype)
    check_backward(fastbn.batch_norm_backward(grad_y, saved, backend=backend), exact.backward(grad_y), dtype)


def test_the_relu_is_off_at_exactly_0(backend, dtype):
    x, grad_y = np.array([[1], [3], [5]], dtype), np.array([[1], [2], [4]], dtype)
    y, saved = fastbn.batch_norm(x, activation="relu", backend=backend)
    assert (y[:2] == 0).all()
    assert y[2] > 0
    _, grad_gamma, grad_beta = fastbn.batch_norm_backward(grad_y, saved, backend=backend)
    assert grad_beta == 4
    assert_close(grad_gamma, 4 * 2 * saved.invstd, "grad_gamma", dtype)
    constant, saved = fastbn.batch_norm(np.full((9, 2), 7, dtype), activation="relu", backend=backend)
    assert (constant == 0).all()
    for gradient in fastbn.batch_norm_backward(np.ones((9, 2), dtype), saved, backend=backend):
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_grad_y_and_x_of_different_memory_orders(backend, dtype):
    x, grad_y, gamma, beta, axis = drawn("NCHW", dtype)
    exact = Exact(x, gamma, beta, axis=axis).backward(grad_y)
    _, saved = fastbn.batch_norm(x, gamma, beta, axis=axis, backend=backend)
    for other in (np.asfortranarray(grad_y), np.ascontiguousarray(grad_y.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)):
        check_backward(fastbn.batch_norm_backward(other, saved, backend=backend), exact, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large(compiled, activation):
    dtype = np.dtype(np.float32)
    x, grad_y, gamma, beta, axis = draw(LARGE, dtype)
    columns = [0, 15, 16, 255, 256, 271, 272, 511, 512]  # at the borders of tiles and strips; the rest would take long
    exact = Exact(x[:, columns], gamma[columns], beta[columns], axis=axis)
    y, saved = fastbn.batch_norm(x, gamma, beta, axis=axis, activation=activation, num_threads=2, backend=compiled)
    on = None if activation is None else y[:, columns] > 0
    gradients = fastbn.batch_norm_backward(grad_y, saved, num_threads=2, backend=compiled)
    assert_close(saved.mean[columns], exact.mean, "mean", dtype, np.maximum(np.abs(exact.mean), exact.std))
    assert_close(saved.var[columns], exact.var, "var", dtype)
    assert_close(y[:, columns], np.maximum(exact.y, 0) if activation else exact.y, "y", dtype, exact.y_terms)
    check_backward([g[..., columns] for g in gradients], exact.backward(grad_y[:, columns], on), dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("order", ["C", "F"])
def test_vast(compiled, order, activation):
    """Of 100 MB the sums may be swept in another way; the rows of a small array again and again have its statistics."""
    small, times = np.random.default_rng(0).normal(3, 2, (2, 1000, 64)).astype(np.float32), 400
    x, grad_y = (np.asarray(np.tile(array, (times, 1)), order=order) for array in small)
    assert x.nbytes > 96 << 20
    one, all_of_them = (fastbn.batch_norm(array, activation=activation, backend=compiled)[1] for array in (small[0], x))
    np.testing.assert_allclose(all_of_them.mean, one.mean, rtol=1e-14)
    np.testing.assert_allclose(all_of_them.var, one.var, rtol=1e-13)
    of_one = fastbn.batch_norm_backward(small[1], one, backend=compiled)[1:]
    of_all = fastbn.batch_norm_backward(grad_y, all_of_them, backend=compiled)[1:]
    scales = np.abs(small[1]).sum(axis=0) * times * np.finfo(np.float32).eps
    for wanted, gradient in zip(of_one, of_all, strict=True):
        assert (np.abs(gradient - wanted.astype(float) * times) <= scales).all()


@pytest.mark.parametrize(
    "layout", [name for name, layout in LAYOUTS.items() if name not in (
        "every other column", "columns reversed", "inner step", "interleaved", "broadcast rows")])
def test_views_are_not_copied(layout):
    x, _, _, _, axis = drawn(layout, np.dtype(np.float32))
    view = fastbn._layout.canonical(x, fastbn._layout.layout_of(x, axis))
    assert np.shares_memory(view, x)


def test_y_has_the_memory_order_of_x(compiled, dtype):
    x = drawn("1301x77", dtype).x
    assert fastbn.batch_norm(np.asfortranarray(x), backend=compiled)[0].flags.f_contiguous
    assert fastbn.batch_norm(x, backend=compiled)[0].flags.c_contiguous
    nhwc = drawn("torch channels_last", dtype).x
    assert fastbn.batch_norm(nhwc, backend=compiled)[0].strides == nhwc.strides
