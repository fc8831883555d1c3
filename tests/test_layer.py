"""BatchNorm: train and eval, running statistics by hand, backward, set_identity, state, pickling."""

import contextlib
import copy
import pickle
from fractions import Fraction

import numpy as np
import pytest
from oracle import Exact
from tolerances import assert_close, assert_same_bits

import fastbn
from fastbn import BatchNorm

X = np.array([[1.0, 10.0], [3.0, 30.0]])  # means 2 and 20, biased variances 1 and 100, unbiased 2 and 200
STATE = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def snapshot(layer):
    """All that a call could change, as bytes."""
    return pickle.dumps({k: v for k, v in vars(layer).items() if k != "_saved"}), id(layer._saved)


def trained(backend=None, dtype=np.float32, **options):
    """A layer whose every array differs from what a new one has."""
    rng = np.random.default_rng(3)
    layer = BatchNorm(4, dtype=dtype, backend=backend, **options)
    if layer.affine:
        layer.gamma, layer.beta = rng.uniform(0.5, 2, 4).astype(dtype), rng.uniform(-1, 1, 4).astype(dtype)
    layer(rng.normal(3, 2, (50, 4)).astype(dtype))
    layer.backward(rng.standard_normal((50, 4)).astype(dtype))
    return layer


def test_a_new_layer():
    layer = BatchNorm(3)
    assert layer.training
    assert layer.num_batches_tracked == 0
    assert layer.grad_gamma is layer.grad_beta is None
    for array, expected, dtype in (
        (layer.gamma, 1, np.float32), (layer.beta, 0, np.float32),
        (layer.running_mean, 0, np.float64), (layer.running_var, 1, np.float64),
    ):
        assert_same_bits(array, np.full(3, expected, dtype))


def test_running_statistics_by_hand(backend):
    layer = BatchNorm(2, momentum=0.25, dtype=np.float64, backend=backend)
    layer(X)
    np.testing.assert_array_equal(layer.running_mean, [0.5, 5])
    np.testing.assert_array_equal(layer.running_var, [1.25, 50.75])
    layer(X + 4)
    np.testing.assert_array_equal(layer.running_mean, [0.75 * 0.5 + 0.25 * 6, 0.75 * 5 + 0.25 * 24])
    np.testing.assert_array_equal(layer.running_var, [0.75 * 1.25 + 0.5, 0.75 * 50.75 + 50])
    assert layer.num_batches_tracked == 2


def test_momentum_none_is_the_average_over_the_batches(backend, rng, dtype):
    layer = BatchNorm(5, momentum=None, backend=backend)
    batches = [rng.normal(i, 1 + i, (20 + i, 5)).astype(dtype) for i in range(6)]
    for x in batches:
        layer(x)
    exact = [Exact(x) for x in batches]
    unbiased = [e.var * n / (n - 1) for e, n in zip(exact, range(20, 26), strict=True)]
    assert_close(layer.running_mean, np.mean([e.mean for e in exact], axis=0), "running", dtype)
    assert_close(layer.running_var, np.mean(unbiased, axis=0), "running", dtype)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics_that_are_not_plain_arrays_go_the_same_way(backend, rng, momentum):
    plain, strided = (BatchNorm(37, momentum=momentum, backend=backend) for _ in range(2))
    strided.running_mean, strided.running_var = np.zeros(74)[::2], np.ones(74)[::2]
    for i in range(3):
        x = rng.normal(i, 1 + i, (20 + i, 37))
        before, kept = plain.running_var, plain.running_var.copy()
        plain(x)
        strided(x)
        assert_same_bits(before, kept)  # the new ones are new arrays
        np.testing.assert_allclose(plain.running_mean, strided.running_mean, rtol=0, atol=2e-15)  # a few roundings
        np.testing.assert_allclose(plain.running_var, strided.running_var, rtol=2e-15)


@pytest.mark.parametrize("momentum", [Fraction(1, 10), np.longdouble("0.1"), np.float32(0.1)], ids=repr)
def test_momentum_of_any_kind_leaves_float64(backend, rng, momentum):
    layer = BatchNorm(5, momentum=momentum, backend=backend)
    x = rng.normal(2, 3, (20, 5)).astype(np.float32)
    layer(x)
    assert layer.running_mean.dtype == layer.running_var.dtype == np.float64
    np.testing.assert_allclose(layer.running_mean, float(momentum) * x.mean(0, np.float64), rtol=1e-14)
    layer.eval()(x)


@pytest.mark.parametrize("momentum", [0, 1])
def test_momentum_at_its_ends(momentum):
    layer = BatchNorm(2, momentum=momentum)
    layer(X)
    np.testing.assert_array_equal(layer.running_mean, [2, 20] if momentum else [0, 0])
    np.testing.assert_array_equal(layer.running_var, [2, 200] if momentum else [1, 1])


def test_train_and_eval(backend, dtype, rng):
    layer = trained(backend, dtype)
    x = rng.normal(1, 2, (30, 4)).astype(dtype)
    before = snapshot(layer)[0]
    assert layer.eval() is layer
    assert not layer.training
    y = layer(x)
    exact = Exact(x, layer.gamma, layer.beta, mean=layer.running_mean, var=layer.running_var)
    assert_close(y, exact.y, "y", dtype, exact.y_terms)
    assert layer.train() is layer
    assert layer.training
    assert snapshot(layer)[0] == before
    assert not layer.train(False).training


def test_backward_in_eval_mode_takes_the_statistics_as_constants(backend, dtype, rng):
    layer = trained(backend, dtype).eval()
    x, grad_y = (rng.standard_normal((30, 4)).astype(dtype) for _ in range(2))
    layer(x)
    exact = Exact(x, layer.gamma, layer.beta, mean=layer.running_mean, var=layer.running_var).backward(grad_y)
    assert_close(layer.backward(grad_y), exact.grad_x, "grad_x", dtype, exact.grad_x_terms)
    assert_close(layer.grad_gamma, exact.grad_gamma, "grad_gamma", dtype, exact.grad_gamma_terms)
    assert_close(layer.grad_beta, exact.grad_beta, "grad_beta", dtype, exact.grad_beta_terms)


@pytest.mark.parametrize("training", [True, False])
def test_the_layer_is_the_functions(backend, dtype, rng, training):
    layer = trained(backend, dtype, axis=-1, eps=1e-3, activation="relu").train(training)
    mean, var = layer.running_mean, layer.running_var
    x, grad_y = (rng.normal(1, 2, (6, 5, 4)).astype(dtype) for _ in range(2))
    options = {"axis": -1, "eps": 1e-3, "activation": "relu", "backend": backend}
    y, saved = fastbn.batch_norm(x, layer.gamma, layer.beta, **options)
    if not training:
        y = fastbn.batch_norm_inference(x, mean, var, layer.gamma, layer.beta, **options)
    out = np.empty_like(x)
    assert layer(x, out=out) is out
    assert_same_bits(out, y)
    assert (y == 0).any()
    assert (y > 0).any()
    grad_x = layer.backward(grad_y, out=out)
    assert grad_x is out
    if training:
        for a, b in zip((grad_x, layer.grad_gamma, layer.grad_beta),
                        fastbn.batch_norm_backward(grad_y, saved, backend=backend), strict=True):
            assert_same_bits(a, b)


def test_without_running_statistics_eval_uses_the_batch_s():
    layer = BatchNorm(2, track_running_stats=False)
    y = layer(X)
    assert layer.running_mean is layer.running_var is None
    assert layer.num_batches_tracked == 0
    assert_same_bits(layer.eval()(X + 100), y)


def test_without_gamma_and_beta():
    layer = BatchNorm(2, affine=False, eps=0)
    np.testing.assert_array_equal(layer(X), [[-1, -1], [1, 1]])
    layer.backward(X)
    assert layer.gamma is layer.beta is layer.grad_gamma is layer.grad_beta is None
    assert list(layer.state_dict()) == STATE[2:]


def test_dtype_of_parameters_and_of_data_are_independent(dtype, rng):
    for parameters in (np.float32, np.float64):
        layer = BatchNorm(3, dtype=parameters)
        x = rng.standard_normal((9, 3)).astype(dtype)
        assert layer(x).dtype == dtype
        assert layer.backward(x).dtype == dtype
        assert layer.gamma.dtype == layer.grad_gamma.dtype == layer.grad_beta.dtype == parameters


@pytest.mark.parametrize(("shape", "axis"), [((200, 4), 1), ((20, 4, 5), 1), ((9, 5, 4), -1)])
def test_set_identity_gives_x_back(backend, dtype, rng, shape, axis):
    x = rng.normal(5, 3, shape).astype(dtype)
    layer = BatchNorm(4, axis=axis, dtype=dtype, backend=backend)
    layer.set_identity(x)
    exact = Exact(x, axis=axis)
    assert_close(layer.gamma, np.sqrt(exact.var + 1e-5), "y", dtype, np.abs(exact.std))
    assert_close(layer.beta, exact.mean, "y", dtype, np.abs(exact.mean))
    assert layer.gamma.dtype == layer.beta.dtype == dtype
    assert layer.num_batches_tracked == 0
    assert_close(layer(x), x, "y", dtype, np.abs(x).max() + np.abs(exact.mean).max())


def running(layer):
    return layer.running_mean.tobytes(), layer.running_var.tobytes(), layer.num_batches_tracked


@pytest.mark.parametrize("momentum", [0.1, 0, 1, None])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_skip_nonfinite_as_if_the_batch_had_never_been(backend, dtype, rng, value, momentum):
    batches = [rng.normal(2, 3, (20, 4)).astype(dtype) for _ in range(5)]
    layer, clean = (BatchNorm(4, momentum=momentum, backend=backend, skip_nonfinite=skip) for skip in (True, False))
    skipped = 0
    for i, x in enumerate(batches):
        if i % 2:
            bad = x.copy()
            bad[i, i % 4] = value
            before = running(layer)
            with pytest.warns(RuntimeWarning, match="not finite") if not skipped else contextlib.nullcontext():
                y = layer(bad)
            skipped += 1
            assert running(layer) == before
            assert_same_bits(y, fastbn.batch_norm(bad, layer.gamma, layer.beta, backend=backend)[0])
            assert np.isnan(y[:, i % 4]).any()
            assert layer.backward(x).shape == x.shape
        else:
            layer(x)
            clean(x)
        assert layer.num_batches_skipped == skipped
    assert running(layer) == running(clean)
    assert clean.num_batches_skipped == 0


def test_skip_nonfinite_warns_once_and_of_the_caller():
    layer = BatchNorm(2, skip_nonfinite=True)
    with pytest.warns(RuntimeWarning, match="not finite.*BatchNorm.*num_batches_skipped") as caught:
        layer(X * np.nan)
    assert [warning.filename for warning in caught] == [__file__]
    for _ in range(2):
        layer(X * np.nan)  # would raise, as warnings are errors here
    assert layer.num_batches_skipped == 3
    assert copy.deepcopy(layer).num_batches_skipped == 3
    assert list(layer.state_dict()) == STATE
    layer.load_state_dict(BatchNorm(2).state_dict())
    assert layer.num_batches_skipped == 3


def test_skip_nonfinite_with_the_warning_as_an_error_changes_nothing():
    layer = BatchNorm(2, skip_nonfinite=True)
    layer(X)
    before = snapshot(layer)
    for _ in range(2):
        with pytest.raises(RuntimeWarning, match="not finite"):
            layer(X * np.nan)
        assert snapshot(layer) == before


def test_skip_nonfinite_has_a_say_in_training_with_running_statistics_only():
    untracked = BatchNorm(2, skip_nonfinite=True, track_running_stats=False)
    for layer in (untracked, BatchNorm(2, skip_nonfinite=True).eval()):
        layer(X * np.nan)
        assert layer.num_batches_skipped == 0
    layer = BatchNorm(2, skip_nonfinite=True)
    layer(np.empty((0, 2)))
    assert layer.num_batches_skipped == 0


def test_without_skip_nonfinite_a_nan_stays_in_its_channel_for_good(backend, rng):
    layer, clean = BatchNorm(3, backend=backend), BatchNorm(3, backend=backend)
    for i in range(20):
        x = rng.standard_normal((9, 3))
        clean(x)
        x[4, 1] = np.nan if i == 1 else x[4, 1]
        layer(x)
    assert layer.num_batches_tracked == 20
    assert layer.num_batches_skipped == 0
    assert np.isnan(layer.running_mean[1])
    assert np.isnan(layer.running_var[1])
    assert_same_bits(layer.running_var[[0, 2]], clean.running_var[[0, 2]])
    y = layer.eval()(x)
    assert np.isnan(y[:, 1]).all()
    assert_same_bits(y[:, [0, 2]], clean.eval()(x)[:, [0, 2]])


def test_state_round_trip(dtype):
    layer, other = trained(dtype=dtype), BatchNorm(4, dtype=dtype)
    state = layer.state_dict()
    assert list(state) == STATE
    other.load_state_dict(state)
    for name in ("gamma", "beta", "running_mean", "running_var"):
        assert_same_bits(getattr(other, name), getattr(layer, name), name)
        assert not np.shares_memory(getattr(other, name), getattr(layer, name))
    assert other.num_batches_tracked == 1
    for array in state.values():
        array[...] = 77
    assert (layer.gamma != 77).all()
    assert (other.running_var != 77).all()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"weight": np.ones(3)}, ValueError, r"state\['weight'\] must have shape \(4,\), got \(3,\)"),
        ({"bias": np.ones((4, 1))}, ValueError, r"state\['bias'\] must have shape \(4,\)"),
        ({"running_mean": np.ones(4, complex)}, TypeError, r"state\['running_mean'\] must be real numbers.*complex"),
        ({"running_var": np.array([1, 1, -1, 1])}, ValueError, r"state\['running_var'\] must be >= 0, got -1"),
        ({"weight": None}, TypeError, r"state\['weight'\] must be an array .* got None"),
        ({"running_var": None}, TypeError, r"state\['running_var'\] must be an array .* got None"),
        ({"num_batches_tracked": -1}, ValueError, r"state\['num_batches_tracked'\] must be a whole number.*-1"),
        ({"num_batches_tracked": 2.5}, ValueError, r"state\['num_batches_tracked'\] must be a whole number"),
        ({"num_batches_tracked": np.ones(2, int)}, ValueError, r"\['num_batches_tracked'\] must be a whole number"),
        ({"num_batches_tracked": True}, ValueError, r"state\['num_batches_tracked'\] must be a whole number"),
        ({"num_batches_tracked": np.uint64(2**63)}, ValueError, r"\['num_batches_tracked'\] must be a whole number"),
        ({"num_batches_tracked": [[1], 2]}, ValueError, r"\['num_batches_tracked'\] must be an array of numbers"),
        ({"running_mean": np.array([1, np.nan, 1, 1])}, ValueError,
         r"state\['running_mean'\] must be finite in float64, got nan in 1 of 4"),
        ({"running_var": np.full(4, np.nan)}, ValueError, r"state\['running_var'\] must be finite .* nan in 4 of 4"),
        ({"bias": np.array([1, -np.inf, 1, 1])}, ValueError, r"state\['bias'\] must be finite in float32, got -inf"),
        ({"weight": np.full(4, 1e300)}, ValueError, r"state\['weight'\] must be finite in float32, got inf in 4 of 4"),
        ({"weight": np.full(4, "1")}, TypeError, r"state\['weight'\] must be real numbers, got dtype <U1"),
        ({"weight": np.full(4, 1, object)}, TypeError, r"state\['weight'\] must be real numbers, got dtype object"),
        ({"weight": np.ma.masked_equal([1, 2, 3, 4], 2)}, TypeError, r"state\['weight'\] must not be a masked array"),
        ({"momentum": 1}, KeyError, r"unknown: \['momentum'\]"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_state_that_does_not_fit_changes_nothing(change, error, words):
    layer = trained()
    before = snapshot(layer)
    state = {key: value + 1 for key, value in layer.state_dict().items()}
    with pytest.raises(error, match=words):
        layer.load_state_dict(state | change)
    assert snapshot(layer) == before


@pytest.mark.parametrize("state", [None, 5, "weight", STATE, np.ones(4)], ids=repr)
def test_a_state_that_is_no_mapping(state):
    layer = trained()
    before = snapshot(layer)
    with pytest.raises(TypeError, match="state must be a mapping of names to arrays, got "):
        layer.load_state_dict(state)
    assert snapshot(layer) == before


def test_state_in_a_file(tmp_path):
    layer, other = trained(), BatchNorm(4)
    np.savez(tmp_path / "layer.npz", **layer.state_dict())
    with np.load(tmp_path / "layer.npz") as state:
        other.load_state_dict(state)
    for key, value in layer.state_dict().items():
        assert_same_bits(other.state_dict()[key], value, key)


@pytest.mark.parametrize("key", STATE)
def test_a_missing_key_changes_nothing(key):
    layer = trained()
    before = snapshot(layer)
    state = {k: v + 1 for k, v in layer.state_dict().items() if k != key}
    with pytest.raises(KeyError, match=rf"missing: \['{key}'\]"):
        layer.load_state_dict(state)
    assert snapshot(layer) == before


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
                         ids=["copy", "deepcopy", "pickle"])
def test_copies_are_the_layer_without_the_batch(how, rng):
    layer = trained(axis=-1, eps=1e-3, momentum=None, activation="relu").eval()
    other = how(layer)
    assert repr(other) == repr(layer)
    for key, value in layer.state_dict().items():
        assert_same_bits(other.state_dict()[key], value, key)
    x = rng.standard_normal((6, 4)).astype(np.float32)
    assert_same_bits(other(x), layer(x))
    with pytest.raises(RuntimeError, match="backward needs a forward"):
        how(layer).backward(x)
    assert layer.backward(x).shape == x.shape


def test_a_deep_copy_learns_on_its_own():
    layer = trained()
    before = snapshot(layer)
    other = copy.deepcopy(layer)
    other(X.repeat(2, axis=1))
    other.gamma -= 1
    other.running_mean += 1
    assert snapshot(layer) == before


def test_repr_says_what_it_is():
    text = repr(BatchNorm(7, axis=-1, momentum=None, activation="relu", dtype=np.float64).eval())
    for part in ("(7", "axis=-1", "eps=1e-05", "momentum=None", "activation='relu'", "float64", "training=False"):
        assert part in text
    assert "activation" not in repr(BatchNorm(7))
