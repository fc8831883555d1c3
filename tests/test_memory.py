"""The memory of large outputs is reused, but never while anything still looks at it."""

import threading
import tracemalloc
import weakref

import numpy as np
import pytest
from tolerances import assert_same_bits

import fastbn
from fastbn import _memory

ROWS = _memory.POOLED_BYTES // (64 * 4) + 5  # float32 rows of 64 columns: just large enough


@pytest.fixture
def pool(monkeypatch):
    """An empty pool with room, restored afterwards."""
    monkeypatch.setattr(_memory, "_limit", 1 << 30)
    fastbn.release_memory()
    yield _memory
    fastbn.release_memory()


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).standard_normal((ROWS, 64), np.float32)


def address(array):
    return array.__array_interface__["data"][0]


def stepped(x):
    """x where channels are two places apart, which has no canonical view."""
    wide = np.zeros((len(x), 2 * x.shape[1]), x.dtype)
    wide[:, ::2] = x
    return wide[:, ::2]


def every_other_row(x):
    return np.repeat(x, 2, axis=0)[::2]


LAYOUTS = {  # copies of an array in C order
    "C": np.copy, "F": lambda x: np.array(x, order="F"), "rows": every_other_row, "steps": stepped,
}


@pytest.mark.parametrize("own_out", [False, True], ids=["fresh", "out"])
@pytest.mark.parametrize(("layout", "of_out"), [*((name, name) for name in LAYOUTS), ("C", "F"), ("F", "C")])
@pytest.mark.parametrize("op", ["forward", "backward", "inference", "moments"])
def test_beside_its_output_a_call_allocates_little(compiled, monkeypatch, op, layout, of_out, own_out):
    """In units of x; the copies are those of docs/memory.md. In the backward, layout is that of grad_y, of_out of x."""
    monkeypatch.setattr(_memory, "_limit", 0)
    fastbn.release_memory()
    data = np.random.default_rng(0).standard_normal((10_000, 50), np.float32)
    x, other = LAYOUTS[layout](data), LAYOUTS[of_out](data)
    out = LAYOUTS[of_out](data) if own_out else None
    _, saved = fastbn.batch_norm(other, backend=compiled)
    call = {
        "forward": lambda: fastbn.batch_norm(x, out=out, backend=compiled),
        "backward": lambda: fastbn.batch_norm_backward(x, saved, out=out, backend=compiled),
        "inference": lambda: fastbn.batch_norm_inference(x, saved.mean, saved.var, out=out, backend=compiled),
        "moments": lambda: fastbn.moments(x, backend=compiled),
    }[op]
    call()  # Numba compiles, which allocates much
    tracemalloc.start()
    try:
        call()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    result = int(out is None and op != "moments")
    copies = {
        "forward": own_out and (of_out == "steps" or layout != of_out),
        "inference": own_out and (of_out == "steps" or layout != of_out),
        "backward": (of_out == "steps") * (1 + own_out),
        "moments": layout == "steps",
    }[op]
    assert result + copies <= peak / data.nbytes < result + copies + 1 / 10


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_grad_y_of_another_dtype_is_converted_into_the_output(compiled, monkeypatch, dtype):
    monkeypatch.setattr(_memory, "_limit", 0)
    fastbn.release_memory()
    x, grad_y = np.random.default_rng(1).standard_normal((2, 10_000, 50))
    _, saved = fastbn.batch_norm(x.astype(dtype), backend=compiled)
    for given in (grad_y, grad_y.astype(np.float32), np.asfortranarray(grad_y), grad_y[::-1][::-1]):
        expected = fastbn.batch_norm_backward(given.astype(dtype, order="C"), saved, backend=compiled)
        tracemalloc.start()
        try:
            actual = fastbn.batch_norm_backward(given, saved, backend=compiled)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert 1 <= peak / actual[0].nbytes < 1.1
        for got, wanted in zip(actual, expected, strict=True):
            assert_same_bits(got, wanted)


@pytest.mark.parametrize("order", ["C", "F"])
def test_memory_is_reused_once_nothing_looks_at_it(pool, compiled, x, order):
    x = np.asarray(x, order=order)
    y, _ = fastbn.batch_norm(x, backend=compiled)
    first, expected = address(y), y.copy()
    assert first % 4096 == 2048 + 64  # on a line, and far from where NumPy's large arrays begin in a page
    assert pool.kept_bytes() == 0
    del y
    assert pool.kept_bytes() >= x.nbytes
    y, _ = fastbn.batch_norm(x, backend=compiled)
    assert address(y) == first
    assert pool.kept_bytes() == 0
    assert_same_bits(y, expected)


@pytest.mark.parametrize(
    "look",
    [lambda y: y, lambda y: y[1:2, 3], lambda y: y.T[::-1], lambda y: y.view(np.uint8), lambda y: y.reshape(64, -1),
     memoryview, lambda y: np.lib.stride_tricks.as_strided(y, (2, 2), (4, 4)), lambda y: np.frombuffer(y, np.float32)],
    ids=["itself", "slice", "transposed", "bytes", "reshaped", "memoryview", "as_strided", "frombuffer"],
)
def test_what_is_still_looked_at_is_never_handed_out(pool, x, look):
    y, saved = fastbn.batch_norm(x)
    start, end = address(y), address(y) + y.nbytes
    kept = look(y)
    before = bytes(memoryview(kept)) if isinstance(kept, memoryview) else kept.tobytes()
    del y
    others = [fastbn.batch_norm(x + 1)[0], fastbn.batch_norm_backward(x, saved)[0],
              fastbn.batch_norm_inference(x, saved.mean, saved.var)]
    assert all(address(other) >= end or address(other) + other.nbytes <= start for other in others)
    assert (bytes(memoryview(kept)) if isinstance(kept, memoryview) else kept.tobytes()) == before
    del kept
    assert pool.kept_bytes() > 0


def test_small_outputs_do_not_come_from_the_pool(pool):
    y, _ = fastbn.batch_norm(np.arange(6000.0).reshape(1000, 6))
    del y
    assert pool.kept_bytes() == 0


def test_release_and_limits(pool, x):
    kept = []
    for _ in range(3):
        kept.append(fastbn.batch_norm(x)[0])
    kept.clear()
    held = pool.kept_bytes()
    assert held >= 3 * x.nbytes
    fastbn.set_memory_limit(held - 1)
    assert 2 * x.nbytes <= pool.kept_bytes() < held
    fastbn.release_memory()
    assert pool.kept_bytes() == 0
    fastbn.set_memory_limit(0)
    y, _ = fastbn.batch_norm(x)
    del y
    assert pool.kept_bytes() == 0


@pytest.mark.parametrize(("nbytes", "error"), [(-1, ValueError), (1.5, TypeError), (None, TypeError)])
def test_a_bad_limit_changes_nothing(pool, nbytes, error):
    with pytest.raises(error, match=r"nbytes must be .*>= 0, got"):
        fastbn.set_memory_limit(nbytes)
    assert pool._limit == 1 << 30


def test_the_environment_sets_the_limit(run_python):
    code = "import fastbn; print(fastbn._memory._limit)"
    assert run_python(code, FASTBN_MEMORY_LIMIT="12345").stdout == "12345\n"
    warned = run_python(code, FASTBN_MEMORY_LIMIT="1GB").stderr
    assert "FASTBN_MEMORY_LIMIT must be a whole number of bytes, got '1GB'; ignored" in warned


def test_out_of_memory_empties_the_pool_and_tries_once_more(pool, x, monkeypatch):
    y, _ = fastbn.batch_norm(x)
    del y
    assert pool.kept_bytes() > 0
    kept = weakref.ref(next(iter(pool._free.values())).memory)
    real, failures, freed = np.empty, [MemoryError], []

    def empty(shape, dtype=float):
        if np.dtype(dtype) == np.uint8 and failures:
            raise failures.pop()
        freed.append(kept() is None)
        return real(shape, dtype)

    monkeypatch.setattr(np, "empty", empty)
    array = _memory.empty((2 * ROWS, 64), np.dtype(np.float32))
    assert array.shape == (2 * ROWS, 64)
    assert not failures
    assert freed == [True]
    assert pool.kept_bytes() == 0
    failures += [MemoryError, MemoryError]
    with pytest.raises(MemoryError):
        _memory.empty((2 * ROWS, 64), np.dtype(np.float32))


def test_threads_never_share_an_output(pool, x):
    rng = np.random.default_rng(1)
    shifts = rng.integers(1, 9, 4).tolist()
    expected = {shift: fastbn.batch_norm_inference(x[:, :], [shift] * 64, [1] * 64).copy() for shift in shifts}
    wrong = []

    def work(shift):
        previous = None
        for _ in range(5):
            y = fastbn.batch_norm_inference(x, [shift] * 64, [1] * 64)
            if previous is not None and np.shares_memory(previous, y):
                wrong.append("shared")
            if not np.array_equal(y, expected[shift]):
                wrong.append("other values")
            previous = y[::1000]  # a slice of the last output stays

    threads = [threading.Thread(target=work, args=(shift,)) for shift in shifts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_output_alive_at_exit_is_no_trouble(run_python):
    code = f"import numpy as np, fastbn; y = fastbn.batch_norm(np.ones(({ROWS}, 64), np.float32))[0]; print(y.sum())"
    result = run_python(code)
    assert (result.stdout, result.stderr) == ("0.0\n", "")
