"""What must work: lists, integers, foreign memory, empty batches; and NaN and Inf, which stay in their column."""

import numpy as np
import pytest
from layouts import drawn
from oracle import Exact
from tolerances import assert_close, assert_same_bits

import fastbn
from fastbn import _layout

X = np.array([[1, 2, 3], [4, 6, 9], [5, 5, 5], [0, 8, 7]])


def both(x, grad_y, backend, **options):
    y, saved = fastbn.batch_norm(x, backend=backend, **options)
    inferred = fastbn.batch_norm_inference(x, saved.mean, saved.var, backend=backend, **options)
    return y, saved.mean, saved.var, inferred, *fastbn.batch_norm_backward(grad_y, saved, backend=backend)


@pytest.mark.parametrize(
    "convert",
    [np.ndarray.tolist, lambda x: tuple(map(tuple, x)), np.int8, np.uint64, np.int32, lambda x: x.astype(">i2")],
    ids=["list", "tuples", "int8", "uint64", "int32", "big-endian int16"],
)
def test_what_is_not_floating_is_computed_in_float64(backend, convert):
    expected = both(X.astype(np.float64), X.astype(np.float64), backend)
    for actual, exact in zip(both(convert(X), convert(X), backend), expected, strict=True):
        assert_same_bits(actual, exact)


def test_bool(backend):
    y, saved = fastbn.batch_norm(X > 4, backend=backend)
    assert y.dtype == np.float64
    np.testing.assert_array_equal(saved.mean, [0.25, 0.75, 0.75])


def unaligned(x):
    memory = np.empty(x.nbytes + 1, np.uint8)
    shifted = memory[1:].view(x.dtype).reshape(x.shape)
    shifted[...] = x
    assert not shifted.flags.aligned
    return shifted


@pytest.mark.parametrize(
    "convert",
    [lambda x: x.astype(x.dtype.newbyteorder()), unaligned, lambda x: x.view(np.recarray)],
    ids=["other byte order", "unaligned", "recarray"],
)
def test_foreign_memory(backend, dtype, convert):
    x, grad_y, gamma, beta, _ = drawn("1301x77", dtype)
    expected = both(x, grad_y, backend, gamma=gamma, beta=beta)
    actual = both(convert(x), convert(grad_y), backend, gamma=convert(gamma), beta=convert(beta))
    for a, b in zip(actual, expected, strict=True):
        assert_same_bits(a, b)


def test_kernels_get_aligned_memory_only(dtype):
    """C says that reading a float at an odd address may do anything, although x86 does it right."""
    x, _, gamma, _, axis = drawn("1301x77", dtype)
    layout = _layout.layout_of(x, axis)
    out, view = _layout.output(unaligned(x), layout, x)
    assert not out.flags.aligned
    for array in (
        view,
        _layout.canonical(unaligned(x), layout),
        _layout.data(unaligned(x)),
        _layout.per_channel(unaligned(gamma), "gamma", 77, dtype),
        _layout.statistics(unaligned(gamma.astype(np.float64)), "mean", 77),
    ):
        assert array.flags.aligned


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_matrix(backend):
    expected = both(X.astype(float), X.astype(float), backend)
    for a, b in zip(both(np.matrix(X, float), np.matrix(X, float), backend), expected, strict=True):
        assert type(a) is np.ndarray
        assert_same_bits(a, b)


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("shape", [(1000, 1), (16, 3), (2, 9)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_matrix_as_output(backend, shape, order):
    x = np.random.default_rng(shape).normal(size=shape)
    expected = both(x, x, backend)
    out = np.matrix(np.zeros(shape, order=order))
    y, saved = fastbn.batch_norm(x, out=out, backend=backend)
    assert y is out
    assert_same_bits(np.asarray(y), expected[0])
    fastbn.batch_norm_inference(x, saved.mean, saved.var, out=out, backend=backend)
    assert_same_bits(np.asarray(out), expected[3])
    fastbn.batch_norm_backward(x, saved, out=out, backend=backend)
    assert_same_bits(np.asarray(out), expected[4])


@pytest.mark.parametrize("dtypes", ["float32", "float64", "mixed"])
def test_pandas(backend, dtypes):
    pandas = pytest.importorskip("pandas")
    x = drawn("1301x77", np.dtype(np.float64)).x
    frame = pandas.DataFrame(x if dtypes == "mixed" else x.astype(dtypes))
    if dtypes == "mixed":
        frame[3] = frame[3].astype(np.int64)
    array = frame.to_numpy()
    exact = Exact(array)
    for given in (frame, array):
        y, saved = fastbn.batch_norm(given, backend=backend)
        assert_close(y, exact.y, "y", y.dtype, exact.y_terms)
        assert_close(saved.mean, exact.mean, "mean", y.dtype, np.maximum(np.abs(exact.mean), exact.std))


@pytest.mark.parametrize("layout", ["1301x77", "Fortran", "inner 49", "every other row", "every other column"])
def test_read_only_inputs_work_and_no_input_is_modified(backend, dtype, layout):
    data = drawn(layout, dtype)  # read-only
    copies = [np.array(array) for array in data[:4]]
    x, grad_y, gamma, beta, axis = data
    assert not x.flags.writeable
    y, saved = fastbn.batch_norm(x, gamma, beta, axis=axis, activation="relu", backend=backend)
    read_only = [saved.mean.copy(), saved.var.copy()]
    for array in read_only:
        array.flags.writeable = False
    fastbn.batch_norm_inference(x, *read_only, gamma, beta, axis=axis, backend=backend)
    fastbn.batch_norm_backward(grad_y, saved, backend=backend)
    fastbn.moments(x, axis=axis, backend=backend)
    assert y.flags.writeable
    for array, copy in zip(data[:4], copies, strict=True):
        assert_same_bits(array, copy)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0), (4, 0)])
def test_empty_batches(backend, dtype, shape):
    x = np.empty(shape, dtype)
    y, saved = fastbn.batch_norm(x, backend=backend)
    assert (y.shape, y.dtype) == (shape, dtype)
    grad_x, grad_gamma, grad_beta = fastbn.batch_norm_backward(x, saved, backend=backend)
    assert (grad_x.shape, grad_x.dtype) == (shape, dtype)
    for gradient in (grad_gamma, grad_beta):
        assert_same_bits(gradient, np.zeros(shape[1], dtype))
    statistics = np.zeros(shape[1]), np.ones(shape[1])
    assert fastbn.batch_norm_inference(x, *statistics, backend=backend).shape == shape
    assert fastbn.batch_norm(x, out=x, backend=backend)[0] is x


@pytest.mark.parametrize("momentum", [0.1, None])
def test_an_empty_batch_leaves_the_running_statistics(backend, momentum):
    layer = fastbn.BatchNorm(3, momentum=momentum, backend=backend)
    layer(X)
    before = layer.state_dict()
    assert layer(np.empty((0, 3))).shape == (0, 3)
    for key, value in layer.state_dict().items():
        assert_same_bits(value, before[key], key)
    assert layer.backward(np.empty((0, 3))).shape == (0, 3)
    assert_same_bits(layer.grad_gamma, np.zeros(3, np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("layout", ["1301x77", "9001x3", "33x5000", "Fortran", "inner 5", "inner 49", "some columns"])
def test_what_is_not_finite_stays_in_its_column(backend, dtype, layout, value):
    x, grad_y, *_ = drawn(layout, dtype)
    expected = both(x, grad_y, backend, activation="relu")
    for channel in (0, 2):
        for row in (0, x.shape[0] - 1):
            bad = x.copy(order="K")
            bad[row, channel] = value
            for a, b in zip(both(bad, grad_y, backend, activation="relu"), expected, strict=True):
                at = 1 if a.ndim > 1 else 0
                assert_same_bits(np.delete(a, channel, at), np.delete(b, channel, at))
            assert not np.isfinite(fastbn.moments(bad, backend=backend).m2[channel])
    bad = grad_y.copy(order="K")
    bad[1, 1] = value
    for a, b in zip(both(x, bad, backend)[4:], both(x, grad_y, backend)[4:], strict=True):
        at = 1 if a.ndim > 1 else 0
        assert_same_bits(np.delete(a, 1, at), np.delete(b, 1, at))
        assert not np.isfinite(np.take(a, 1, at)).all()


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_an_infinite_grad_y_gives_infinite_sums(backend, dtype, value):
    """Not NaN: what the mean lacks, 0 or not, times their sum is left out."""
    x = np.random.default_rng(3).standard_normal((300, 40)).astype(dtype) + dtype.type(1 / 3)
    grad_y = np.ones_like(x)
    grad_y[7] = value
    _, saved = fastbn.batch_norm(x, backend=backend)
    _, grad_gamma, grad_beta = fastbn.batch_norm_backward(grad_y, saved, backend=backend)
    np.testing.assert_array_equal(grad_gamma, value * np.sign(x[7] - saved.mean))
    np.testing.assert_array_equal(grad_beta, np.full(40, value))


def test_nan_passes_through_the_relu(backend, dtype):
    x = np.array([[np.nan], [-1], [1]], dtype)
    y = fastbn.batch_norm_inference(x, [0], [1], eps=0, activation="relu", backend=backend)
    np.testing.assert_array_equal(y, np.array([[np.nan], [0], [1]], dtype))


def test_a_gradient_through_constant_statistics_does_not_depend_on_x(backend, dtype):
    layer = fastbn.BatchNorm(1, eps=0, backend=backend, dtype=dtype).eval()
    layer(np.array([[np.nan], [np.inf], [2]], dtype))
    np.testing.assert_array_equal(layer.backward(np.array([[1], [2], [3]], dtype)), np.array([[1], [2], [3]], dtype))


def test_out_beside_x_in_the_same_memory_is_not_in_place(backend, dtype, rng):
    """What lies between the rows or columns of x may be out, and the backward still works."""
    memory = rng.standard_normal((60, 10)).astype(dtype)
    for x, out in ((memory[:, :5], memory[:, 5:]), (memory[::2], memory[1::2]), (memory[:30], memory[30:])):
        y, saved = fastbn.batch_norm(x, out=out, backend=backend)
        exact = Exact(x.copy())
        assert_close(y, exact.y, "y", dtype, exact.y_terms)
        gradients = exact.backward(y)
        grad_x, _, _ = fastbn.batch_norm_backward(y, saved, backend=backend)
        assert_close(grad_x, gradients.grad_x, "grad_x", dtype, gradients.grad_x_terms)


@pytest.mark.parametrize("layout", ["1301x77", "NCHW"])
def test_out_of_another_memory_order(backend, dtype, layout):
    x, grad_y, *_ = drawn(layout, dtype)
    y, saved = fastbn.batch_norm(x, backend=backend)
    grad_x, _, _ = fastbn.batch_norm_backward(grad_y, saved, backend=backend)
    for out in (np.empty_like(x, order="F"), np.empty((*x.shape, 2), dtype)[..., 0], unaligned(x)):
        assert fastbn.batch_norm(x, out=out, backend=backend)[0] is out
        assert_same_bits(out, y)
        assert fastbn.batch_norm_backward(grad_y, saved, out=out, backend=backend)[0] is out
        assert_same_bits(out, grad_x)
        assert fastbn.batch_norm_inference(x, saved.mean, saved.var, out=out, backend=backend) is out


def test_saved(backend):
    _, saved = fastbn.batch_norm(X, eps=0.5, backend=backend)
    assert repr(saved) == "Saved(count=4, channels=3, dtype=float64)"
    np.testing.assert_array_equal(saved.invstd, 1 / np.sqrt(saved.var + 0.5))
    for array in (saved.mean, saved.var, saved.invstd):
        assert (array.dtype, array.shape) == (np.float64, (3,))
