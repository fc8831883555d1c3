"""The asv suite: each timed call computes what its name says, and the tracked figures make sense."""

import importlib.util
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import fastbn

FOLDER = Path(__file__).parents[1] / "benchmarks"
MODULES = ("batch_norm_forward", "backward", "inference", "moments", "layer", "import_time")


def load(name):
    """A module of the suite, which is no part of the package and not on the path."""
    if "benchmarks" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "benchmarks", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
        )
        sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["benchmarks"])
    return importlib.import_module(f"benchmarks.{name}")


def benchmarks_of(kind):
    """(module, class, method) of all benchmarks of a kind, as asv discovers them."""
    return [
        (module, name, method)
        for module in MODULES
        for name, found in inspect.getmembers(load(module), inspect.isclass)
        if found.__module__ == f"benchmarks.{module}"
        for method in dir(found)
        if method.startswith(kind)
    ]


def prepared(module, name, *parameters):
    benchmark = getattr(load(module), name)()
    try:
        benchmark.setup(*parameters)
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    return benchmark


def reference(benchmark, activation=None):
    x, gamma, beta = (array.astype(np.float64) for array in (benchmark.x, benchmark.gamma, benchmark.beta))
    return fastbn.batch_norm(x, gamma, beta, activation=activation, backend="numpy")


def gradients(benchmark):
    return fastbn.batch_norm_backward(benchmark.grad_y.astype(np.float64), reference(benchmark)[1], backend="numpy")


def normalized(benchmark):
    x = benchmark.x.astype(np.float64)
    return fastbn.batch_norm_inference(
        x, benchmark.mean, benchmark.var, benchmark.gamma, benchmark.beta, backend="numpy"
    )


EXPECTED = {  # timed call: what it computes by the reference, and how to find that in what it returns
    ("batch_norm_forward", "Forward", "time_out"): (lambda b: [reference(b)[0]], lambda result: [result[0]]),
    ("batch_norm_forward", "Forward", "time_fresh"): (lambda b: [reference(b)[0]], lambda result: [result[0]]),
    ("batch_norm_forward", "Forward", "time_relu"): (lambda b: [reference(b, "relu")[0]], lambda result: [result[0]]),
    ("batch_norm_forward", "Layouts", "time_out"): (lambda b: [reference(b)[0]], lambda result: [result[0]]),
    ("backward", "Backward", "time_out"): (gradients, list),
    ("backward", "Backward", "time_fresh"): (gradients, list),
    ("inference", "Inference", "time_out"): (lambda b: [normalized(b)], lambda result: [result]),
    ("inference", "Inference", "time_fresh"): (lambda b: [normalized(b)], lambda result: [result]),
    ("layer", "Layer", "time_forward"): (lambda b: [reference(b)[0]], lambda result: [result]),
    ("layer", "Layer", "time_forward_backward"): (lambda b: [reference(b)[0], gradients(b)[0]], list),
    ("moments", "Moments", "time_moments"): (
        lambda b: [b.x.astype(np.float64).mean(0), b.x.astype(np.float64).var(0)],
        lambda result: [result.mean, result.var()],
    ),
}


def test_every_timed_call_is_checked():
    assert set(benchmarks_of("time_")) == set(EXPECTED)


@pytest.mark.parametrize("array", ["40x12", "4x6x5x3"])
@pytest.mark.parametrize("which", EXPECTED, ids=".".join)
def test_timed_call_computes_what_its_name_says(which, array, compiled, monkeypatch):
    module, name, method = which
    parameters = (compiled, array)
    if module == "moments":
        parameters = (compiled, "40x12", {"40x12": "float32, Fortran order", "4x6x5x3": "float64"}[array])
    if name == "Layouts":
        layouts = {layout: (array, *how) for layout, (_, *how) in load(module).LAYOUTS.items()}
        monkeypatch.setattr(load(module), "LAYOUTS", layouts)
        parameters = (compiled, {"40x12": "every other row", "4x6x5x3": "Fortran order"}[array])
    benchmark = prepared(module, name, *parameters)
    result = getattr(benchmark, method)(*parameters)
    expected, parts = EXPECTED[which]
    for actual, exact in zip(parts(result), expected(benchmark), strict=True):
        np.testing.assert_allclose(actual, exact, rtol=1e-5, atol=1e-5)
    if method == "time_out":
        assert parts(result)[0] is benchmark.out


def test_the_clock_shows_the_time_of_one_call():
    benchmark = prepared("batch_norm_forward", "Forward", "cython", "40x12")
    calls = []
    benchmark.calls(lambda: calls.append(None))
    scale = load("common").time.perf_counter() / benchmark.timer()
    assert len(calls) > 1
    assert scale == pytest.approx(len(calls), rel=1e-3)


@pytest.mark.parametrize("module", ["batch_norm_forward", "backward"])
def test_memory_benchmarks_run(module, compiled, monkeypatch):
    monkeypatch.setattr(load(module).Memory, "array", "4096x64")
    benchmark = prepared(module, "Memory", compiled)
    benchmark.peakmem_setup_alone(compiled)
    benchmark.peakmem_fresh(compiled)


def test_forward_allocates_little_beside_its_output(compiled, monkeypatch):
    monkeypatch.setattr(load("batch_norm_forward").Memory, "array", "16384x64")
    benchmark = prepared("batch_norm_forward", "Memory", compiled)
    benchmark.peakmem_fresh(compiled)  # Numba compiles, which allocates much
    assert 0 < benchmark.track_beside_output(compiled) < benchmark.x.nbytes / 16


@pytest.mark.parametrize("mean", [0, 1_000_000])
@pytest.mark.parametrize(
    ("module", "method", "most"),
    [
        ("batch_norm_forward", "track_error", 4),
        ("backward", "track_grad_gamma_error", 8),
        ("moments", "track_var_error", 10_000),  # ulp of float64, on float32 data
    ],
)
def test_tracked_errors_are_small(module, method, most, mean, compiled):
    benchmark = prepared(module, "Accuracy", compiled, mean)
    assert 0 <= getattr(benchmark, method)(compiled, mean) < most


@pytest.mark.parametrize(("module", "method"), [("batch_norm_forward", "track_out"), ("backward", "track_fresh")])
def test_ratios_to_torch(module, method, compiled):
    benchmark = prepared(module, "RatioToTorch", compiled, "64x16")
    assert 0 < getattr(benchmark, method)(compiled, "64x16") < np.inf


@pytest.mark.parametrize(("module", "op"), [("batch_norm_forward", "forward-out"), ("backward", "backward")])
def test_ratios_to_torch_are_our_time_over_its(module, op, monkeypatch):
    asked = []

    def bench(command, **_):
        asked.append(" ".join(command[1:]))
        return SimpleNamespace(stdout='{"results": [{"seconds": {"fastbn-numba": 0.5, "roofline": 1, "torch": 2}}]}')

    monkeypatch.setattr(load("common").subprocess, "run", bench)
    benchmark = load(module).RatioToTorch()
    track = next(getattr(benchmark, name) for name in dir(benchmark) if name.startswith("track_"))
    assert track("numba", "64x16") == 0.25
    assert asked == [f"-P -m fastbn bench --ops {op} --shapes 64x16 --backends numba --peers torch --json"]


@pytest.mark.parametrize(("name", "method"), [("RatioToNumPy", "track_mean_var"), ("RatioToScikitLearn", "track_fit")])
def test_ratios_of_moments(name, method, compiled, monkeypatch):
    monkeypatch.setattr(getattr(load("moments"), name), "array", "1000x20")
    benchmark = prepared("moments", name, compiled)
    assert 0 < getattr(benchmark, method)(compiled) < np.inf


def test_a_slower_call_has_the_larger_ratio():
    """For asv more is worse: the other way round an improvement would be a regression."""
    slow, fast = (lambda n=n: sum(range(n)) for n in (100_000, 1000))
    assert load("common").ratio(slow, fast) > 2
    assert load("common").ratio(fast, slow) < 0.5


def test_start_up_times():
    assert 0 < load("import_time").track_import_over_numpy() < 60
    benchmark = prepared("import_time", "FirstCall", "cython")
    assert 0 < benchmark.track_first_ever("cython") < 60
    assert 0 < benchmark.track_first_in_process("cython") < 60


def test_ulps_of_a_known_error():
    one = np.ones(3, np.float32)
    one[1] += np.float32(2**-22)
    assert load("common").ulps(one, np.ones(3)) == 2


def test_missing_peers_and_backends_skip(monkeypatch):
    common = load("common")
    with pytest.raises(NotImplementedError, match="no_such_peer is not installed"):
        common.need("no_such_peer")
    monkeypatch.setattr(fastbn, "available_backends", lambda: ("numpy",))
    with pytest.raises(NotImplementedError, match="cython"):
        common.need_backend("cython")
