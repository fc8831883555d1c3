"""Each module of kernels called directly, as kernels/__init__.py promises: every instruction set, strided, in place."""

import importlib
import inspect
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from oracle import Exact
from tolerances import assert_close, assert_same_bits

from fastbn import _dispatch
from fastbn.accuracy.oracle import exact_sum
from fastbn.kernels import reference

MODULES = ["reference", "numba_calls", *(f"_cython_{name}" for name in _dispatch.INSTRUCTION_SETS)]
KERNELS = [
    "moments", "affine", "grad_moments", "grad_affine", "batch_norm", "batch_norm_inference", "batch_norm_backward",
]
# (outer, channels, inner): folded rows, a tail of columns, tiles, short and long inner axes and their tails
VIEWS = [(2, 1, 1), (5000, 3, 1), (999, 77, 1), (19, 1030, 1), (50, 7, 5), (9, 40, 31), (3, 35, 50), (2, 3, 18_000)]


def load(name):
    isa = name.removeprefix("_cython_")
    # Before the import, which runs instructions of the set, too.
    if isa in _dispatch.INSTRUCTION_SETS and isa not in _dispatch.instruction_set()["usable"]:
        pytest.skip(f"{isa} is not compiled, or this processor does not have it")
    try:
        return importlib.import_module(f"fastbn.kernels.{name}")
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=MODULES)
def kernels(request):
    return load(request.param)


@pytest.fixture(params=VIEWS, ids=lambda view: "x".join(map(str, view)))
def data(request, rng, dtype):
    """x and grad_y with a step between rows, coefficients, statistics of float64, and the exact answers."""
    outer, channels, inner = request.param
    drawn = rng.standard_normal((2, 2 * outer, channels, inner))
    x, grad_y = (3 + 2 * drawn[0]).astype(dtype)[::2], drawn[1].astype(dtype)[1::2]
    coefs = np.stack([rng.uniform(2, 4, channels), rng.uniform(-2, 2, channels), rng.uniform(-1, 1, channels)])
    return x, grad_y, coefs.astype(dtype)


def column(values):
    return values.astype(np.longdouble)[:, None]


def exact_affine(x, coefs):
    """The exact y, and the sizes of its terms."""
    center, scale, offset = (column(row) for row in coefs)
    y = (x.astype(np.longdouble) - center) * scale + offset
    return y, np.abs(y - offset) + np.abs(offset) + 1


def nans(shape, dtype=np.float64):
    return np.full(shape, np.nan, dtype)


def test_every_module_has_the_contract_s_signatures(kernels):
    for name in KERNELS:
        assert list(inspect.signature(getattr(kernels, name)).parameters) == list(
            inspect.signature(getattr(reference, name)).parameters
        ), name


def test_the_contract_in_words_names_every_argument():
    words = " ".join(importlib.import_module("fastbn.kernels").__doc__.split())
    for name in KERNELS:
        assert f"{name}({', '.join(inspect.signature(getattr(reference, name)).parameters)})" in words


def test_moments(kernels, data, dtype):
    x = data[0]
    exact = Exact(x)
    mean, rest, m2 = nans((3, x.shape[1]))
    kernels.moments(x, mean, rest, m2, 2)
    assert_close(mean, exact.mean, "mean", dtype, np.maximum(np.abs(exact.mean), exact.std))
    assert_close(m2, exact.var * exact.x.shape[2], "var", dtype)


def test_the_mean_comes_in_two_floats(kernels, data, dtype):
    x = data[0] + dtype.type(1e6)  # where one float64 is off by 1e-10
    mean, rest, m2 = nans((3, x.shape[1]))
    kernels.moments(x, mean, rest, m2, 2)
    np.testing.assert_array_equal(mean + rest, mean)
    for c in range(x.shape[1]):
        exact = exact_sum(x[:, c].ravel()) / (x.shape[0] * x.shape[2])
        assert abs(Fraction(mean[c]) + Fraction(rest[c]) - exact) < 1e-14


@pytest.mark.parametrize("relu", [False, True])
def test_affine(kernels, data, dtype, relu):
    x, _, coefs = data
    y, terms = exact_affine(x, coefs)
    around = nans((3 * x.shape[0], *x.shape[1:]), dtype)
    out = around[1::3]
    kernels.affine(x, coefs, relu, out, 2)
    assert_close(out, np.maximum(y, 0) if relu else y, "y", dtype, terms)
    assert np.isnan(around[0::3]).all()
    assert np.isnan(around[2::3]).all()
    in_place = np.array(x)
    kernels.affine(in_place, coefs, relu, in_place, 2)
    assert_same_bits(in_place, out, "in place")


def gate(kernels, x, coefs):
    """Where the module's own forward is on."""
    y = np.empty(x.shape, x.dtype)
    kernels.affine(np.ascontiguousarray(x), coefs, True, y, 1)
    return y > 0


@pytest.mark.parametrize("relu", [False, True])
def test_grad_moments(kernels, data, dtype, relu):
    x, grad_y, coefs = data
    mean = np.linspace(2, 4, x.shape[1])
    sum_dy, sum_dy_xmu = nans(x.shape[1]), nans(x.shape[1])
    kernels.grad_moments(grad_y, x, mean, coefs, relu, sum_dy, sum_dy_xmu, 2)
    dy = np.where(gate(kernels, x, coefs), grad_y, 0) if relu else grad_y
    terms = dy.astype(np.longdouble)
    terms_xmu = terms * (x - column(mean))
    for actual, parts in ((sum_dy, terms), (sum_dy_xmu, terms_xmu)):
        assert_close(actual, parts.sum(axis=(0, 2)), "grad_beta", "float64", np.abs(parts).sum(axis=(0, 2)))


@pytest.mark.parametrize("relu", [False, True])
def test_grad_affine(kernels, data, rng, dtype, relu):
    x, grad_y, coefs = data
    linear = rng.uniform(-2, 2, (4, x.shape[1])).astype(dtype)
    out = nans(x.shape, dtype)
    kernels.grad_affine(grad_y, x, coefs, linear, relu, out, 2)
    factor, slope, shift, rest = (column(row) for row in linear)
    dy = np.where(gate(kernels, x, coefs), grad_y, 0) if relu else grad_y
    deviation = (x - column(coefs[0])) * slope
    terms = np.abs(factor) * (np.abs(dy) + np.abs(shift) + np.abs(rest) + np.abs(deviation))
    assert_close(out, factor * (dy - shift - rest - deviation), "grad_x", dtype, terms)
    in_place = np.array(grad_y)
    kernels.grad_affine(in_place, x, coefs, linear, relu, in_place, 2)
    assert_same_bits(in_place, out, "in place")


def test_a_gradient_is_off_exactly_where_the_relu_was(kernels, data, dtype):
    """A value of each channel meets an offset that its product rounds to: whether y is 0 depends on how one rounds."""
    x, _, coefs = data
    coefs[2] = -((x[0, :, 0] - coefs[0]) * coefs[1])
    y, grad_x, ones = np.empty(x.shape, dtype), np.empty(x.shape, dtype), np.ones(x.shape, dtype)
    sum_dy, sum_dy_xmu = np.empty((2, x.shape[1]))
    kernels.affine(x, coefs, True, y, 2)
    kernels.grad_moments(ones, x, coefs[0].astype(np.float64), coefs, True, sum_dy, sum_dy_xmu, 2)
    np.testing.assert_array_equal(sum_dy, (y > 0).sum((0, 2)))
    linear = np.zeros((4, x.shape[1]), dtype)
    linear[0] = 1
    kernels.grad_affine(ones, x, coefs, linear, True, grad_x, 2)
    np.testing.assert_array_equal(grad_x, y > 0)


@pytest.mark.parametrize("training", [True, False])
def test_drivers(kernels, data, rng, dtype, training):
    x, grad_y, _ = data
    channels = x.shape[1]
    gamma, beta = rng.uniform(0.5, 2, channels).astype(dtype), rng.uniform(-1, 1, channels).astype(dtype)
    mean, var = (None, None) if training else (np.linspace(2, 4, channels), np.linspace(1, 4, channels))
    exact = Exact(x, gamma, beta, eps=1e-3, mean=mean, var=var)
    y, stats, coefs = nans(x.shape, dtype), nans((4, channels)), nans((3, channels), dtype)
    if training:
        kernels.batch_norm(x, gamma, beta, 1e-3, False, y, stats, coefs, 2)
    else:
        kernels.batch_norm_inference(x, mean, var, gamma, beta, 1e-3, False, y, stats, coefs, 2)
    assert_close(y, exact.y, "y", dtype, exact.y_terms)
    assert_close(stats[0], exact.mean, "mean", dtype, np.maximum(np.abs(exact.mean), exact.std))
    assert_close(stats[1], exact.var, "var", dtype)
    assert_close(stats[2], exact.invstd, "var", dtype)
    again = nans(x.shape, dtype)
    kernels.affine(x, coefs, False, again, 2)
    assert_close(again, exact.y, "y", dtype, exact.y_terms)

    grad_x, grads = nans(x.shape, dtype), nans((2, channels), dtype)
    kernels.batch_norm_backward(grad_y, x, stats, coefs, False, training, grad_x, grads, 2)
    gradients = exact.backward(grad_y)
    assert_close(grad_x, gradients.grad_x, "grad_x", dtype, gradients.grad_x_terms)
    assert_close(grads[0], gradients.grad_gamma, "grad_gamma", dtype, gradients.grad_gamma_terms)
    assert_close(grads[1], gradients.grad_beta, "grad_beta", dtype, gradients.grad_beta_terms)


TAILS = [(7 + i % 9, 257 + i, 1) for i in range(17)] + [(5, 3, 2 + i) for i in range(47)]


def test_every_tail(kernels, dtype):
    """Widths and row counts that leave 0, 1, 2, ... over from the steps of the loops."""
    rng = np.random.default_rng(8)
    for shape in TAILS:
        x, grad_y = rng.standard_normal((2, *shape)).astype(dtype)
        exact = Exact(x)
        y, stats, coefs = nans(shape, dtype), nans((4, shape[1])), nans((3, shape[1]), dtype)
        kernels.batch_norm(x, None, None, 1e-5, False, y, stats, coefs, 1)
        assert_close(stats[0], exact.mean, "mean", dtype, np.maximum(np.abs(exact.mean), exact.std))
        assert_close(stats[1], exact.var, "var", dtype)
        assert_close(y, exact.y, "y", dtype, exact.y_terms)
        gradients, grads = exact.backward(grad_y), nans((2, shape[1]), dtype)
        kernels.batch_norm_backward(grad_y, x, stats, coefs, False, True, y, grads, 1)
        assert_close(y, gradients.grad_x, "grad_x", dtype, gradients.grad_x_terms)
        assert_close(grads[0], gradients.grad_gamma, "grad_gamma", dtype, gradients.grad_gamma_terms)
        assert_close(grads[1], gradients.grad_beta, "grad_beta", dtype, gradients.grad_beta_terms)


@pytest.mark.parametrize("isa", _dispatch.INSTRUCTION_SETS)
def test_a_forced_instruction_set_is_the_one_that_runs(run_python, isa):
    load(f"_cython_{isa}")
    code = """
import numpy as np, fastbn
x = np.random.default_rng(1).normal(3, 2, (500, 33))
y, saved = fastbn.batch_norm(x, backend="cython")
grad_x, _, _ = fastbn.batch_norm_backward(x, saved, backend="cython")
np.testing.assert_allclose(y, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5), rtol=0, atol=1e-13)
np.testing.assert_allclose(grad_x.sum(0), 0, rtol=0, atol=1e-12)
print(fastbn._dispatch.kernels("cython").__name__, fastbn.show_config(as_dict=True)["instruction_set"]["forced"])
"""
    assert run_python(code, FASTBN_ISA=isa).stdout.split() == [f"fastbn.kernels._cython_{isa}", "True"]


@pytest.mark.parametrize("found", [0, 1, 2])
def test_an_instruction_set_that_is_not_there_is_an_error(monkeypatch, found):
    monkeypatch.setattr(load("_cython_baseline"), "cpu_level", lambda: found)
    monkeypatch.delenv("FASTBN_ISA", raising=False)
    compiled = _dispatch.instruction_set()["compiled"]
    assert _dispatch.instruction_set()["found"] == _dispatch.INSTRUCTION_SETS[found]
    assert _dispatch.instruction_set()["chosen"] in compiled
    for name in (*_dispatch.INSTRUCTION_SETS[found + 1 :], "sse9"):
        monkeypatch.setenv("FASTBN_ISA", name)
        with pytest.raises(ValueError, match=rf"FASTBN_ISA must be one of .*baseline.* got '{name}'"):
            _dispatch.instruction_set()


@pytest.mark.parametrize("name", ["numba_machine.py", "numba_kernels.py", "numba_calls.py"])
def test_what_numba_keeps_on_disk_is_named_after_all_it_is_compiled_from(monkeypatch, tmp_path, name):
    calls = load("numba_calls")
    word_of = calls.sources.__wrapped__  # as a fresh process would ask
    for file in Path(calls.__file__).parent.glob("numba_*.py"):
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(calls, "__file__", str(tmp_path / "numba_calls.py"))
    before = word_of()
    assert before == calls.sources()
    calls.moments(np.ones((2, 1, 1)), *np.empty((3, 1)), 1)
    assert calls.compiled
    for driver, _ in calls.compiled:
        for function in (driver, *calls.WORKERS[driver]):
            assert function.__qualname__ == f"{function.__name__}_{before}"
    (tmp_path / name).write_text((tmp_path / name).read_text() + "# changed\n")
    assert word_of() != before
