"""Identities of batch norm and moments, which hold for any data, by hypothesis. Any arguments: test_fuzz.py."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Exact
from tolerances import assert_close, assert_same_bits

import fastbn

seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from([np.dtype("float32"), np.dtype("float64")])


@st.composite
def batches(draw):
    """Normal data of some shape, with a mean and a standard deviation of its own in each channel."""
    rng = np.random.default_rng(draw(seeds))
    n, channels = draw(st.integers(8, 400)), draw(st.integers(1, 70))
    inner = draw(st.sampled_from([1, 1, 1, 4, 40]))
    x = rng.standard_normal((n, channels, inner))
    x = x * rng.uniform(0.5, 4, (channels, 1)) + rng.uniform(-2, 2, (channels, 1))
    return (x[..., 0] if inner == 1 else x).astype(draw(dtypes)), rng


def rounding(dtype):
    return float(np.finfo(dtype).eps)


@settings(max_examples=40)
@given(batch=batches())
def test_grad_x_sums_to_0_and_is_orthogonal_to_x_hat(backend, batch):
    x, rng = batch
    others = tuple(i for i in range(x.ndim) if i != 1)
    x_hat, saved = fastbn.batch_norm(x, eps=0, backend=backend)
    grad_y = (rng.standard_normal(x.shape) + 1).astype(x.dtype)
    grad_x, _, _ = (g.astype(np.float64) for g in fastbn.batch_norm_backward(grad_y, saved, backend=backend))
    size = saved.invstd * np.abs(grad_y).max() * saved.count * rounding(x.dtype)
    assert (np.abs(grad_x.sum(axis=others)) <= 8 * size).all()
    assert (np.abs((grad_x * x_hat).sum(axis=others)) <= 16 * np.abs(x_hat).max() ** 2 * size).all()


@settings(max_examples=40)
@given(batch=batches(), shift=st.integers(-64, 64), exponent=st.integers(-20, 20))
def test_shift_and_scale_of_x_change_nothing(backend, batch, shift, exponent):
    x, _ = batch
    y, _ = fastbn.batch_norm(x, eps=0, backend=backend)
    allowed = 16 * rounding(x.dtype) * np.abs(y).max()
    scaled, _ = fastbn.batch_norm(x * x.dtype.type(2.0**exponent), eps=0, backend=backend)
    np.testing.assert_allclose(scaled, y, rtol=0, atol=allowed)
    negated, _ = fastbn.batch_norm(-x, eps=0, backend=backend)
    np.testing.assert_allclose(negated, -y, rtol=0, atol=allowed)
    shifted, _ = fastbn.batch_norm(x + x.dtype.type(shift), eps=0, backend=backend)  # which rounds x itself
    np.testing.assert_allclose(shifted, y, rtol=0, atol=allowed * 200)


@settings(max_examples=40)
@given(batch=batches())
def test_y_has_mean_beta_and_std_gamma(backend, batch):
    x, rng = batch
    others = tuple(i for i in range(x.ndim) if i != 1)
    gamma, beta = (rng.uniform(0.1, 3, x.shape[1]).astype(x.dtype) for _ in range(2))
    y, _ = fastbn.batch_norm(x, gamma, beta, eps=0, backend=backend)
    y = y.astype(np.float64)
    allowed = 8 * rounding(x.dtype) * np.abs(y).max()
    np.testing.assert_allclose(y.mean(axis=others), beta, rtol=0, atol=allowed)
    np.testing.assert_allclose(y.std(axis=others), gamma, rtol=0, atol=4 * allowed)


@settings(max_examples=40)
@given(batch=batches())
def test_relu_is_the_maximum_with_0(backend, batch):
    x, rng = batch
    beta = rng.standard_normal(x.shape[1]).astype(x.dtype)
    y, saved = fastbn.batch_norm(x, None, beta, backend=backend)
    relu_y, relu_saved = fastbn.batch_norm(x, None, beta, activation="relu", backend=backend)
    assert_same_bits(relu_y, np.where(y <= 0, 0, y).astype(x.dtype))
    grad_y = rng.standard_normal(x.shape).astype(x.dtype)
    masked = np.where(relu_y > 0, grad_y, 0).astype(x.dtype)
    for a, b in zip(fastbn.batch_norm_backward(grad_y, relu_saved, backend=backend),
                    fastbn.batch_norm_backward(masked, saved, backend=backend), strict=True):
        np.testing.assert_array_equal(a, b)


@settings(max_examples=30)
@given(batch=batches(), borders=st.lists(st.floats(0, 1), max_size=8), order=seeds)
def test_pieces_merge_into_the_whole_in_any_order(backend, batch, borders, order):
    x, _ = batch
    pieces = np.split(x, sorted(int(b * len(x)) for b in borders))
    assert sum(len(piece) for piece in pieces) == len(x)
    parts = [fastbn.moments(piece, backend=backend) for piece in pieces]
    exact = Exact(x)
    results = [sum(parts, fastbn.Moments.empty(x.shape[1])), fastbn.moments(x, backend=backend)]
    shuffled = [parts[i] for i in np.random.default_rng(order).permutation(len(parts))]
    while len(shuffled) > 1:  # as a tree
        pairs = zip(shuffled[::2], shuffled[1::2], strict=False)
        shuffled = [a + b for a, b in pairs] + shuffled[len(shuffled) // 2 * 2 :]
    results.append(shuffled[0])
    stream = fastbn.Moments.empty(x.shape[1])
    for piece in pieces:
        stream.update(piece, backend=backend)
    results.append(stream)
    for moments in results:
        assert moments.count == exact.x.shape[2]
        assert_close(moments.mean, exact.mean, "hard mean", np.float64, np.maximum(np.abs(exact.mean), exact.std))
        assert_close(moments.var(), exact.var, "hard var", np.float64)
