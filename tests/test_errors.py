"""Bad arguments: an error that names the argument and what it was, with nothing written and no state changed."""

import pickle
import re

import numpy as np
import pytest

import fastbn
from fastbn import BatchNorm

X = np.array([[1, 2, 3], [4, 6, 9], [5, 5, 5], [0, 8, 7]], np.float32)
MEAN, VAR = np.zeros(3), np.ones(3)


def train(x=X, *args, **kwargs):
    return fastbn.batch_norm(x, *args, **kwargs)


def infer(x=X, mean=MEAN, var=VAR, *args, **kwargs):
    return fastbn.batch_norm_inference(x, mean, var, *args, **kwargs)


def moments(x=X, **kwargs):
    return fastbn.moments(x, **kwargs)


def layer(x=X, **kwargs):
    options = {k: kwargs.pop(k) for k in ("axis", "eps", "activation", "num_threads", "backend") if k in kwargs}
    return BatchNorm(3, **options)(x, **kwargs)


def assert_fails(error, words, call, *args, **kwargs):
    """The call raises the error and has not written to its out."""
    out = np.full(X.shape, 77, X.dtype)
    if call is not moments:
        kwargs["out"] = out
    with pytest.raises(error, match=words):
        call(*args, **kwargs)
    assert (out == 77).all()


def read_only(x):
    x.flags.writeable = False
    return x


def misplaced(x, shift):
    """A copy of x, and an array of its shape that begins `shift` values behind it in the same memory."""
    memory = np.empty(x.size + 100, x.dtype)
    inside = memory[50 : 50 + x.size].reshape(x.shape)
    inside[...] = x
    return inside, memory[50 + shift : 50 + shift + x.size].reshape(x.shape)


BAD_X = [
    ("complex", X.astype(complex), TypeError, "x must be float32, float64, an integer or bool, got dtype complex128"),
    ("object", X.astype(object), TypeError, "x must be .* got dtype object"),
    ("string", X.astype(str), TypeError, "x must be .* got dtype <U"),
    ("time", X.astype("m8[s]"), TypeError, "x must be .* got dtype timedelta64"),
    ("float16", X.astype(np.float16), TypeError, r"got dtype float16; convert it with x.astype\(np.float32\)"),
    ("longdouble", X.astype(np.longdouble), TypeError, "x must be .* got dtype (longdouble|float128|float96)"),
    ("masked", np.ma.masked_less(X, 2), TypeError, r"x must not be a masked array: .*x.filled\(value\)"),
    ("0-d", np.float32(1), ValueError, r"x must have at least 2 dimensions .* got shape \(\)"),
    ("1-d", X[0], ValueError, r"x must have at least 2 dimensions .* got shape \(3,\)"),
    ("ragged", [[1, 2], [3]], ValueError, "x must be an array of numbers, got list"),
    ("None", None, TypeError, "x must be .* got dtype object"),
]


@pytest.mark.parametrize(("x", "error", "words"), [row[1:] for row in BAD_X], ids=[row[0] for row in BAD_X])
@pytest.mark.parametrize("call", [train, infer, moments, layer], ids=lambda call: call.__name__)
def test_bad_x(backend, call, x, error, words):
    assert_fails(error, words, call, x, backend=backend)


OPTIONS = [
    ("axis", 2, ValueError, r"axis must be in \[-2, 2\) for an array of 2 dimensions, got 2"),
    ("axis", -3, ValueError, r"axis must be in \[-2, 2\) .* got -3"),
    ("axis", 1.0, TypeError, "axis must be an integer, got 1.0"),
    ("axis", None, TypeError, "axis must be an integer, got None"),
    ("eps", -1e-5, ValueError, "eps must be a finite number >= 0, got -1e-05"),
    ("eps", np.nan, ValueError, "eps must be a finite number >= 0, got nan"),
    ("eps", np.inf, ValueError, "eps must be a finite number >= 0, got inf"),
    ("eps", "1e-5", TypeError, "eps must be a number >= 0, got '1e-5'"),
    ("eps", 10**400, ValueError, "eps must be a finite number >= 0, got 1000"),
    ("eps", b"1", TypeError, "eps must be a number >= 0, got b'1'"),
    ("eps", None, TypeError, "eps must be a number >= 0, got None"),
    ("activation", "gelu", ValueError, r"activation must be one of \(None, 'relu'\), got 'gelu'"),
    ("activation", np.array(["relu", "gelu"]), ValueError, r"activation must be one of .* got array"),
    ("backend", "cuda", ValueError, "backend must be one of .*'auto', 'cython', 'numba', 'numpy'.* got 'cuda'"),
    ("num_threads", 0, ValueError, "num_threads must be >= 1, got 0"),
    ("num_threads", -2, ValueError, "num_threads must be >= 1, got -2"),
    ("num_threads", 2.0, TypeError, "num_threads must be an integer >= 1, got 2.0"),
]


@pytest.mark.parametrize(
    ("call", "name", "value", "error", "words"),
    [
        pytest.param(call, *option, id=f"{call.__name__}-{option[0]}={option[1]}")
        for call in (train, infer, moments, layer)
        for option in OPTIONS
        if call is not moments or option[0] not in ("eps", "activation")
    ],
)
def test_bad_options(backend, call, name, value, error, words):
    assert_fails(error, words, call, **({"backend": backend} | {name: value}))


@pytest.mark.parametrize("name", ["gamma", "beta"])
@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (np.ones(2), ValueError, r"must have shape \(3,\), got \(2,\)"),
        (np.ones((3, 1)), ValueError, r"must have shape \(3,\), got \(3, 1\)"),
        (1.0, ValueError, r"must have shape \(3,\), got \(\)"),
        (np.ones(3, complex), TypeError, "must be real numbers, got dtype complex128"),
        (["a", "b", "c"], TypeError, "must be real numbers, got dtype <U1"),
        (np.ma.array([1.0, 2, 3], mask=[0, 1, 0]), TypeError, "must not be a masked array"),
    ],
    ids=["short", "2-d", "scalar", "complex", "string", "masked"],
)
@pytest.mark.parametrize("call", [train, infer], ids=lambda call: call.__name__)
def test_bad_gamma_and_beta(backend, call, name, value, error, words):
    assert_fails(error, f"{name} {words}", call, **{name: value}, backend=backend)


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("mean", np.ones(2), ValueError, r"mean must have shape \(3,\), got \(2,\)"),
        ("mean", None, TypeError, r"mean must be an array of shape \(3,\), got None"),
        ("var", np.ones((1, 3)), ValueError, r"var must have shape \(3,\), got \(1, 3\)"),
        ("var", np.array([1, -0.5, 1]), ValueError, "var must be >= 0, got -0.5"),
        ("var", np.array([np.nan, -0.5, 1]), ValueError, "var must be >= 0, got -0.5"),
        ("var", np.ones(3, object), TypeError, "var must be real numbers, got dtype object"),
    ],
)
def test_bad_statistics(backend, name, value, error, words):
    assert_fails(error, words, infer, **{name: value}, backend=backend)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)])
@pytest.mark.parametrize("call", [train, layer], ids=lambda call: call.__name__)
def test_one_value_per_channel_in_training(backend, call, shape):
    words = f"x must have more than one value per channel in training, got shape {shape} with axis=1"
    with pytest.raises(ValueError, match=re.escape(words)):
        call(np.ones(shape), backend=backend)


def bad_outs(x):
    """Every kind of wrong out for x: (name, x, out, error, words)."""
    n, c = x.shape
    inside, ahead = misplaced(x, 1)
    behind = misplaced(x, -1)
    row_ahead = misplaced(x, c)
    other = "float64" if x.dtype == np.float32 else "float32"
    return [
        ("shape", x, np.zeros((n, c + 1), x.dtype), ValueError, rf"out must have shape .*{c}\), got .*{c + 1}\)"),
        ("transposed", x, np.zeros((c, n), x.dtype), ValueError, rf"out must have shape \({n}, .* got \({c}, {n}\)"),
        ("dtype", x, np.zeros((n, c), other), TypeError, f"out must have dtype {x.dtype}, got {other}"),
        ("byte order", x, np.zeros((n, c), x.dtype.newbyteorder()), TypeError, "out must have dtype"),
        ("read-only", x, read_only(np.zeros((n, c), x.dtype)), ValueError, "out must be writeable, got a read-only"),
        ("list", x, x.tolist(), TypeError, "out must be a NumPy array, got list"),
        ("masked", x, np.ma.zeros((n, c), x.dtype), TypeError, "out must be a NumPy array, got MaskedArray"),
        ("one value ahead", inside, ahead, ValueError, "out must be the input itself or share no memory"),
        ("one value behind", *behind, ValueError, "out must be the input itself or share no memory"),
        ("one row ahead", *row_ahead, ValueError, "out must be the input itself or share no memory"),
        ("reversed", x, x[::-1], ValueError, "out must be the input itself or share no memory"),
        ("itself twice", x, np.lib.stride_tricks.as_strided(np.zeros(n * c, x.dtype), (n, c), (x.itemsize, x.itemsize)),
         ValueError, "out must have a place of its own for each value"),
    ]


@pytest.mark.parametrize("kind", [row[0] for row in bad_outs(X.copy())])
@pytest.mark.parametrize("call", [train, infer, layer, "backward"], ids=lambda call: getattr(call, "__name__", call))
def test_bad_out_is_not_written_to(backend, dtype, call, kind):
    x, out, error, words = next(row[1:] for row in bad_outs(X.astype(dtype)) if row[0] == kind)
    before = np.array(x), np.array(out)
    if call == "backward":
        _, saved = fastbn.batch_norm(X.astype(dtype), backend=backend)

        def call(x, **options):
            return fastbn.batch_norm_backward(x, saved, **options)

    with pytest.raises(error, match=words):
        call(x, out=out, backend=backend)
    np.testing.assert_array_equal(x, before[0])
    np.testing.assert_array_equal(out, before[1])


def test_backward_errors(backend):
    y, saved = fastbn.batch_norm(X, backend=backend)
    for bad, error, words in (
        (y[:3], ValueError, r"grad_y must have the shape of y, \(4, 3\), got \(3, 3\)"),
        (y.T, ValueError, r"grad_y must have the shape of y, \(4, 3\), got \(3, 4\)"),
        (y.astype(complex), TypeError, "grad_y must be float32, .* got dtype complex128"),
        (np.ma.masked_less(y, 0), TypeError, "grad_y must not be a masked array"),
        (y[0], ValueError, "grad_y must have at least 2 dimensions"),
    ):
        with pytest.raises(error, match=words):
            fastbn.batch_norm_backward(bad, saved, backend=backend)
    with pytest.raises(TypeError, match="saved must be what batch_norm returned beside y, got tuple"):
        fastbn.batch_norm_backward(y, (y, saved), backend=backend)
    with pytest.raises(ValueError, match=r"out must .* share no memory"):
        fastbn.batch_norm_backward(y, saved, out=saved.x, backend=backend)
    for name, value in (("num_threads", 0), ("backend", "cuda")):
        with pytest.raises(ValueError, match=f"{name} must"):
            fastbn.batch_norm_backward(y, saved, **{"backend": backend, name: value})


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[:]], ids=["itself", "another array on its memory"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_backward_after_a_forward_in_place(backend, order, view):
    x = np.array(X, order=order)
    _, saved = fastbn.batch_norm(x, out=view(x), backend=backend)
    with pytest.raises(RuntimeError, match="the forward ran in place"):
        fastbn.batch_norm_backward(X, saved, backend=backend)
    for own in (BatchNorm(3, backend=backend), BatchNorm(3, backend=backend).eval()):
        x = np.array(X, order=order)
        own(x, out=view(x))
        with pytest.raises(RuntimeError, match="the forward ran in place"):
            own.backward(X)


def test_an_axis_of_length_1_has_any_stride(backend):
    """So its stride tells neither whether arrays overlap nor whether they are the same memory."""
    memory = np.arange(900.0)
    x = memory[:800].reshape(4, 4, 50)[::2][:1]
    assert x.flags.c_contiguous
    assert x.strides[0] != x.nbytes
    y, saved = fastbn.batch_norm(x, backend=backend)
    for out in (memory[20:220].reshape(x.shape), memory[190:390].reshape(x.shape)):
        before = out.copy()
        with pytest.raises(ValueError, match="out must be the input itself or share no memory"):
            fastbn.batch_norm(x, out=out, backend=backend)
        with pytest.raises(ValueError, match="out must be the input itself or share no memory"):
            fastbn.batch_norm_inference(x, MEAN[[0, 0, 0, 0]], VAR[[0, 0, 0, 0]], out=out, backend=backend)
        with pytest.raises(ValueError, match="out must be the input itself or share no memory"):
            fastbn.batch_norm_backward(y, saved, out=out, backend=backend)
        np.testing.assert_array_equal(out, before)
    base = memory[:60].reshape(5, 4, 3)
    expected, _ = fastbn.batch_norm(base[:, :1].copy(), backend=backend)
    actual, saved = fastbn.batch_norm(base[:, :1], out=base[:, 0][:, None], backend=backend)
    np.testing.assert_array_equal(actual, expected)
    assert saved.overwritten


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"num_features": 0}, ValueError, "num_features must be >= 1, got 0"),
        ({"num_features": 2.5}, TypeError, "num_features must be an integer >= 1, got 2.5"),
        ({"momentum": 1.5}, ValueError, r"momentum must be .*\[0, 1\] or None, got 1.5"),
        ({"momentum": np.nan}, ValueError, "momentum must be .* got nan"),
        ({"momentum": "a"}, (TypeError, ValueError), "momentum must be .* got 'a'"),
        ({"axis": 1.5}, TypeError, "axis must be an integer, got 1.5"),
        ({"eps": -1}, ValueError, "eps must be a finite number >= 0, got -1"),
        ({"activation": "tanh"}, ValueError, "activation must be one of .* got 'tanh'"),
        ({"dtype": np.float16}, TypeError, "dtype must be float32 or float64, got float16"),
        ({"dtype": int}, TypeError, "dtype must be float32 or float64, got int64"),
        ({"dtype": None}, TypeError, "dtype must be float32 or float64, got None"),
        ({"backend": "cuda"}, ValueError, "backend must be one of .* got 'cuda'"),
        ({"num_threads": 0}, ValueError, "num_threads must be >= 1, got 0"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else None,
)
def test_a_layer_that_cannot_be(options, error, words):
    with pytest.raises(error, match=words):
        BatchNorm(**({"num_features": 3} | options))


def test_a_failed_call_leaves_the_layer_as_it_was(backend):
    own = BatchNorm(3, backend=backend)
    with pytest.raises(RuntimeError, match=r"backward needs a forward before it"):
        own.backward(X)
    own(X)
    own.backward(X)
    saved, before = own._saved, pickle.dumps(own)
    for bad, error, words in (
        (X[:, :2], ValueError, r"x must have 3 channels along axis 1, got 2 in shape \(4, 2\)"),
        (X[:1], ValueError, "more than one value per channel"),
        (X[0], ValueError, "at least 2 dimensions"),
        (X.astype(complex), TypeError, "x must be float32"),
        (np.ma.array(X), TypeError, "masked array"),
    ):
        with pytest.raises(error, match=words):
            own(bad)
    with pytest.raises(ValueError, match="grad_y must have the shape of y"):
        own.backward(X[:2])
    with pytest.raises(ValueError, match="x must have 3 channels"):
        own.set_identity(X[:, :2])
    with pytest.raises(ValueError, match=r"x must not be empty, got shape \(0, 3\)"):
        own.set_identity(X[:0])
    assert pickle.dumps(own) == before
    assert own._saved is saved
    with pytest.raises(RuntimeError, match="affine=True"):
        BatchNorm(3, affine=False).set_identity(X)
