"""Moments: by hand, against NumPy in longdouble, merged and updated."""

import copy
import pickle

import numpy as np
import pytest
from layouts import drawn
from tolerances import assert_close, assert_same_bits

import fastbn
from fastbn import Moments

X = np.array([[1.0, 10.0], [3.0, 30.0], [8.0, 20.0]])  # means 4 and 20; squared deviations 9 + 1 + 16 and 200


def test_by_hand(backend):
    moments = fastbn.moments(X, backend=backend)
    assert isinstance(moments, Moments)
    assert moments.count == 3
    np.testing.assert_array_equal(moments.mean, [4, 20])
    np.testing.assert_array_equal(moments.m2, [26, 200])
    np.testing.assert_array_equal(moments.var(), np.array([26, 200]) / 3)
    np.testing.assert_array_equal(moments.var(ddof=1), [13, 100])
    np.testing.assert_array_equal(moments.std(ddof=1), [np.sqrt(13), 10])
    assert moments.mean.dtype == moments.m2.dtype == np.float64


@pytest.mark.parametrize("convert", [np.ndarray.tolist, np.int32, np.uint8, np.float32], ids=lambda f: f.__name__)
def test_any_real_input(backend, convert):
    x = convert(X)
    moments = fastbn.moments(x, backend=backend)
    np.testing.assert_array_equal(moments.mean, [4, 20])
    np.testing.assert_array_equal(moments.m2, [26, 200])


def test_bool_counts(backend):
    moments = fastbn.moments(np.array([[True, False], [False, False], [True, False], [True, False]]), backend=backend)
    np.testing.assert_array_equal(moments.mean, [0.75, 0])
    np.testing.assert_array_equal(moments.m2, [0.75, 0])


@pytest.mark.parametrize("layout", ["1301x77", "Fortran", "NCHW", "channels first", "every other row"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_against_numpy_in_longdouble(backend, dtype, layout, ddof):
    x, _, _, _, axis = drawn(layout, dtype)
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    moments = fastbn.moments(x, axis=axis, backend=backend)
    wide = x.astype(np.longdouble)
    assert_close(moments.mean, wide.mean(axis=others), "mean", dtype, 4)
    assert_close(moments.var(ddof), wide.var(axis=others, ddof=ddof), "var", dtype)
    assert_close(moments.std(ddof), wide.std(axis=others, ddof=ddof), "var", dtype)


@pytest.mark.parametrize("layout", ["1301x77", "NCHW", "channels first", "every other row"])
def test_the_short_way_of_plain_arguments_gives_the_same_bits(backend, dtype, layout):
    x, _, _, _, axis = drawn(layout, dtype)
    x = np.ascontiguousarray(x)
    short = fastbn.moments(x, axis=axis, backend=backend)
    long = fastbn.moments(x, axis=np.int64(axis), backend=backend)
    assert short.count == long.count == x.size // x.shape[axis]
    for name in ("mean", "_rest", "m2"):
        assert_same_bits(getattr(short, name), getattr(long, name))


def test_too_few_values_for_ddof():
    one = fastbn.moments(np.array([[3.0, 5.0]]))
    np.testing.assert_array_equal(one.mean, [3, 5])
    np.testing.assert_array_equal(one.var(), [0, 0])
    assert np.isnan(one.var(ddof=1)).all()
    assert np.isnan(Moments.empty(2).std()).all()
    assert np.isnan(fastbn.moments(X).var(ddof=3)).all()


@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0)])
def test_empty_data(backend, shape):
    moments = fastbn.moments(np.empty(shape), backend=backend)
    assert moments.count == 0
    np.testing.assert_array_equal([moments.mean, moments.m2], np.zeros((2, 3)))


def test_merge_by_hand():
    a, b = fastbn.moments(X[:1]), fastbn.moments(X[1:])
    whole = a.merge(b)
    assert whole.count == 3
    np.testing.assert_allclose(whole.mean, [4, 20], rtol=1e-15)
    np.testing.assert_allclose(whole.m2, [26, 200], rtol=1e-15)
    assert (a.count, b.count) == (1, 2)  # neither was changed
    np.testing.assert_array_equal(a.mean, [1, 10])
    plus = a + b
    assert_same_bits(plus.mean, whole.mean)
    assert_same_bits(plus.m2, whole.m2)


def test_empty_is_neutral():
    whole, empty = fastbn.moments(X), Moments.empty(2)
    for merged in (whole + empty, empty + whole, whole + fastbn.moments(X[:0])):
        assert merged.count == 3
        assert_same_bits(merged.mean, whole.mean)
        assert_same_bits(merged.m2, whole.m2)
        assert not np.shares_memory(merged.mean, whole.mean)
    assert (empty + empty).count == 0


def test_merging_a_huge_and_a_small_count_keeps_both():
    big, small = Moments(10**15, [1.0], [1e15]), Moments(1, [3.0], [0.0])
    merged = small + big
    assert merged.count == 10**15 + 1
    np.testing.assert_allclose(merged.mean, 1 + 2e-15, rtol=1e-16)
    np.testing.assert_allclose(merged.m2, 1e15 + 4, rtol=1e-15)


def test_update_is_merge_in_place(backend):
    seen = Moments.empty(2)
    for rows in (X[:1], X[1:1], X[1:]):
        assert seen.update(rows, backend=backend) is None
    whole = fastbn.moments(X[:1], backend=backend) + fastbn.moments(X[1:], backend=backend)
    assert seen.count == 3
    assert_same_bits(seen.mean, whole.mean)
    assert_same_bits(seen.m2, whole.m2)
    images = np.arange(24.0).reshape(2, 3, 4)
    by_axis = Moments.empty(4)
    by_axis.update(images, axis=-1, num_threads=1, backend=backend)
    np.testing.assert_allclose(by_axis.mean, images.mean(axis=(0, 1)), rtol=1e-15)


def test_the_arrays_are_its_own():
    mean, m2 = np.zeros(2), np.ones(2)
    moments = Moments(3, mean, m2)
    mean[:] = m2[:] = 7
    np.testing.assert_array_equal([moments.mean, moments.m2], [[0, 0], [1, 1]])


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
                         ids=["copy", "deepcopy", "pickle"])
def test_copies(how):
    moments = fastbn.moments(X)
    other = how(moments)
    assert (other.count, repr(other)) == (3, "Moments(count=3, channels=2)")
    assert_same_bits(other.mean, moments.mean)
    assert_same_bits(other.m2, moments.m2)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Moments(-1, [0.0], [0.0]), ValueError, "count must be >= 0, got -1"),
        (lambda: Moments(2.5, [0.0], [0.0]), TypeError, "count must be an integer, got 2.5"),
        (lambda: Moments(1, [0.0], [0.0, 1.0]), ValueError, r"mean and m2 must have one shape .* \(1,\) and \(2,\)"),
        (lambda: Moments(1, [[0.0]], [[0.0]]), ValueError, r"mean and m2 must have one shape \(channels,\)"),
        (lambda: Moments.empty(-1), ValueError, "channels must be >= 0, got -1"),
        (lambda: Moments(3, [0.0, 0.0], [np.nan, -1.0]), ValueError, "m2 must be >= 0, got -1.0"),
        (lambda: Moments(1, ["1"], [0.0]), TypeError, "mean must be real numbers, got dtype <U1"),
        (lambda: Moments(1, [0.0], [1j]), TypeError, "m2 must be real numbers, got dtype complex128"),
        (lambda: Moments(1, np.ma.array([1.0], mask=[1]), [0.0]), TypeError, "mean must not be a masked array"),
        (lambda: fastbn.moments(X).merge(X), TypeError, "other must be a Moments, got ndarray"),
        (lambda: fastbn.moments(X) + 1, TypeError, "unsupported operand"),
        (lambda: fastbn.moments(X) + Moments.empty(3), ValueError, "other must have 2 channels, got 3"),
        (lambda: fastbn.moments(X).update(np.ones((4, 5))), ValueError, "x must have 2 channels along axis 1, got 5"),
    ],
)
def test_errors(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_a_failed_update_changes_nothing():
    moments = fastbn.moments(X)
    for bad in (np.ones((4, 5)), np.ones(2), np.ones((4, 2), complex)):
        with pytest.raises((TypeError, ValueError), match="x must"):
            moments.update(bad)
    assert moments.count == 3
    np.testing.assert_array_equal(moments.mean, [4, 20])
