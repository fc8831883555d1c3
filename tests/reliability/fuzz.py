"""Shapes, axes, strides, memory orders, alignments, byte orders, dtypes, kinds of arrays (matrix, masked, pandas,
polars), memory shared by x and out in part, and arguments, right and wrong ones, drawn by hypothesis. Each example is
right against the reference in long double precision, within tests/tolerances.py, and writes nothing beside its output;
or it raises the error that the documentation names, and writes nothing at all."""

import multiprocessing
import os
from collections import Counter

import numpy as np
from hypothesis import HealthCheck, given, seed, settings
from oracle import Exact
from tolerances import assert_close, assert_same_bits

import fastbn
from reliability.examples import examples

PER_SEED = 500  # examples
BACKENDS = [None, "auto", *fastbn.available_backends()]


def run(tally, scale):
    seeds = np.random.default_rng().integers(2**31) + np.arange(round(20_000 / PER_SEED * scale))
    with multiprocessing.get_context("spawn").Pool(len(os.sched_getaffinity(0))) as pool:
        for done, (kinds, losses) in enumerate(pool.imap_unordered(examples_of_seed, seeds.tolist())):
            for kind, n in kinds.items():
                tally.count(kind, n)
            for loss in losses:
                tally.expect(False, loss)
            tally.progress(done / len(seeds))


def examples_of_seed(number):
    """How many of each kind, and what was wrong: the smallest example that hypothesis finds."""
    kinds, losses = Counter(), []
    options = settings(max_examples=PER_SEED, deadline=None, database=None, derandomize=False, print_blob=True,
                       suppress_health_check=list(HealthCheck))
    try:
        seed(number)(options(given(examples(BACKENDS))(lambda example: kinds.update([check(example)]))))()
    except Exception as error:
        notes = "; ".join(getattr(error, "__notes__", ()))
        losses.append(f"seed {number}: {type(error).__name__}: {error} {notes}"[:3000])
    return kinds, losses


def check(example):
    """What kind of example it was, when it is right."""
    x, out = example.x.copy(), example.out
    held = [root(array) for array in (example.given, out) if isinstance(array, np.ndarray)]
    before = [array.tobytes() for array in held]
    covered = np.array(out)
    try:
        y, saved = fastbn.batch_norm(example.given, **example.arguments, out=out)
    except (TypeError, ValueError) as error:
        documented = any(isinstance(error, kind) and words in str(error) for kind, words in example.faults)
        require(documented, f"{type(error).__name__}: {error}; expected one of {example.faults}")
        require([array.tobytes() for array in held] == before, "written to in spite of an error")
        return "wrong arguments, refused"
    assert not example.faults, f"taken in spite of {example.faults}"
    if out is not None:
        assert y is out
        y = y.copy()
        out[...] = covered
    assert [array.tobytes() for array in held] == before, "written to beside out"
    if not x.size:
        assert y.shape == x.shape
        return "empty arrays"
    right_answers(example, x, y, saved)
    return "right arguments, in place" if example.in_place else "right arguments"


def require(right, what):
    if not right:
        raise AssertionError(what)


def root(array):
    """All of the memory that an array looks at."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return np.asarray(array)


def right_answers(example, x, y, saved):
    dtype, options = y.dtype, {name: example.arguments[name] for name in ("num_threads", "backend")}
    gamma, beta = (
        None if vector is None else np.asarray(vector).astype(dtype)
        for vector in (example.arguments["gamma"], example.arguments["beta"])
    )
    axis, eps = example.arguments["axis"], float(example.arguments["eps"])
    relu = example.arguments["activation"] == "relu"
    exact = Exact(x, gamma, beta, axis=axis, eps=eps)
    assert_close(saved.mean, exact.mean, "mean", dtype, np.maximum(np.abs(exact.mean), exact.std))
    assert_close(y, np.maximum(exact.y, 0) if relu else exact.y, "y", dtype, exact.y_terms)
    moments = fastbn.moments(example.given, axis=axis, **options)
    assert_same_bits(moments.mean, saved.mean)
    assert_close(moments.var(), exact.var, "var", dtype)

    statistics = saved.mean, saved.var + 0.25
    constant = Exact(x, gamma, beta, axis=axis, eps=eps, mean=statistics[0], var=statistics[1])
    inferred = fastbn.batch_norm_inference(example.given, *statistics, **example.arguments)
    assert_close(inferred, np.maximum(constant.y, 0) if relu else constant.y, "y", dtype, constant.y_terms)

    if example.in_place and x.flags.aligned and example.given.flags.aligned:
        try:
            fastbn.batch_norm_backward(example.grad_y, saved, **options)
        except RuntimeError as error:
            require("the forward ran in place" in str(error), str(error))
            return
        raise AssertionError("a backward after a forward in place was taken")
    grad_y = example.grad_y.astype(dtype)
    gradients = exact.backward(grad_y, on=y > 0 if relu else None)
    grad_x, grad_gamma, grad_beta = fastbn.batch_norm_backward(example.grad_y, saved, **options)
    assert_close(grad_x, gradients.grad_x, "grad_x", dtype, gradients.grad_x_terms)
    assert_close(grad_gamma, gradients.grad_gamma, "grad_gamma", dtype, gradients.grad_gamma_terms)
    assert_close(grad_beta, gradients.grad_beta, "grad_beta", dtype, gradients.grad_beta_terms)
    if example.grad_y.dtype == dtype and example.grad_y.dtype.isnative:
        memory = root(example.grad_y)
        before, covered = memory.tobytes(), example.grad_y.copy()
        assert_same_bits(fastbn.batch_norm_backward(example.grad_y, saved, out=example.grad_y, **options)[0], grad_x)
        example.grad_y[...] = covered
        assert memory.tobytes() == before, "written to beside grad_x"
