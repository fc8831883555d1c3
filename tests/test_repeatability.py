"""The same bits for any number of threads, any row stride and alignment, in place or not, and in every call."""

import numpy as np
import pytest
from layouts import LARGE, LAYOUTS, PAST_THE_CACHES, Layout, draw, drawn
from tolerances import assert_same_bits

import fastbn

NAMES = ["y", "mean", "var", "invstd", "grad_x", "grad_gamma", "grad_beta", "inferred", "moments", "m2"]
ROW_LAYOUTS = [name for name, layout in LAYOUTS.items() if layout.rows]
SOME_LAYOUTS = ["9001x3", "1301x77", "70x1000", "inner 5", "inner 49"]


def everything(x, grad_y, gamma, beta, axis, *, backend, num_threads=2, activation="relu", outs=(None, None, None)):
    """Every result of every operation; outs are for y, grad_x and the inference."""
    options = {"backend": backend, "num_threads": num_threads}
    moments = fastbn.moments(x, axis=axis, **options)
    y, saved = fastbn.batch_norm(x, gamma, beta, axis=axis, activation=activation, out=outs[0], **options)
    gradients = fastbn.batch_norm_backward(grad_y, saved, out=outs[1], **options)
    inferred = fastbn.batch_norm_inference(
        x, saved.mean, saved.var, gamma, beta, axis=axis, activation=activation, out=outs[2], **options
    )
    return y, saved.mean, saved.var, saved.invstd, *gradients, inferred, moments.mean, moments.m2


def assert_all_the_same(actual, expected):
    for name, a, b in zip(NAMES, actual, expected, strict=True):
        assert_same_bits(a, b, name)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_number_of_threads(compiled, dtype, layout, activation):
    data = drawn(layout, dtype)
    expected = everything(*data, backend=compiled, num_threads=1, activation=activation)
    for n in (2, 3, 7):
        assert_all_the_same(everything(*data, backend=compiled, num_threads=n, activation=activation), expected)


@pytest.mark.parametrize("shape", [(600, 100), (300, 516), (260, 300)])
def test_any_number_of_threads_where_nothing_hides_the_offset(compiled, dtype, shape):
    """Values equal to a large mean: y is the offset, to which the mean's rest and beta add about as much."""
    rng = np.random.default_rng(5)
    x = (1e8 + rng.standard_normal(shape)).astype(dtype)
    gamma, beta = rng.uniform(0.5, 2, shape[1]).astype(dtype), rng.uniform(-1e-8, 1e-8, shape[1]).astype(dtype)
    x[:2] = fastbn.moments(x[2:], backend=compiled, num_threads=1).mean
    expected = everything(x, x, gamma, beta, 1, backend=compiled, num_threads=1, activation=None)
    for n in (2, 3, 7):
        actual = everything(x, x, gamma, beta, 1, backend=compiled, num_threads=n, activation=None)
        assert_all_the_same(actual, expected)


@pytest.mark.parametrize("channels", [256, 520, 1100])
@pytest.mark.parametrize("n_chunks", range(2, 12))
def test_two_threads_wherever_the_border_of_their_chunks_is(compiled, n_chunks, channels):
    """In the tree of the partial results it may be left or right of a node's middle; tiles may have it elsewhere."""
    rng = np.random.default_rng(n_chunks)
    x, grad_y = rng.standard_normal((2, 128 * n_chunks - 5, channels), np.float32)
    gamma, beta = rng.standard_normal((2, channels), np.float32)
    expected = everything(x, grad_y, gamma, beta, 1, backend=compiled, num_threads=1)
    assert_all_the_same(everything(x, grad_y, gamma, beta, 1, backend=compiled, num_threads=2), expected)


def test_two_threads_of_four(run_python):
    """A limit of the system may grant fewer threads than were asked for."""
    code = """
import numpy as np, fastbn
x, grad_y = np.random.default_rng(0).standard_normal((2, 700, 520), np.float32)
for num_threads in (1, 4):
    y, saved = fastbn.batch_norm(x, num_threads=num_threads)
    grad_x, grad_gamma, _ = fastbn.batch_norm_backward(grad_y, saved, num_threads=num_threads)
    print(*(float(array.sum()) for array in (y, saved.var, grad_x, grad_gamma)))
"""
    chosen = fastbn.show_config(as_dict=True)["instruction_set"]["chosen"]
    one, four = run_python(code, OMP_THREAD_LIMIT="2", FASTBN_ISA=chosen).stdout.splitlines()
    assert four == one


def test_any_number_of_threads_for_a_large_array(compiled):
    data = draw(LARGE, np.dtype(np.float32))
    expected = everything(*data, backend=compiled, num_threads=1)
    assert_all_the_same(everything(*data, backend=compiled, num_threads=3), expected)
    moved = [at_address(array, offset) for array, offset in zip(data[:4], (4, 20, 36, 60), strict=True)]
    assert_all_the_same(everything(*moved, data.axis, backend=compiled), expected)


@pytest.mark.parametrize("layout", PAST_THE_CACHES)
def test_outputs_that_bypass_the_caches(compiled, dtype, layout):
    """At any address, also a little behind an input's place in its MiB; in place they do not bypass them."""
    x, grad_y, gamma, beta, axis = draw(PAST_THE_CACHES[layout], dtype, frozen=False)
    if x.flags.c_contiguous:
        x, grad_y = at_address(x, 0, MEBIBYTE), at_address(grad_y, 0, MEBIBYTE)
    y, inferred, grad_x = (at_address(array, 8) for array in (x, x, grad_y))
    assert y.nbytes >= 1 << 24
    options = {"axis": axis, "activation": "relu", "backend": compiled}
    _, saved = fastbn.batch_norm(x, gamma, beta, **options)
    fastbn.batch_norm(y, gamma, beta, out=y, **options)
    fastbn.batch_norm_inference(inferred, saved.mean, saved.var, gamma, beta, out=inferred, **options)
    fastbn.batch_norm_backward(grad_x, saved, out=grad_x, backend=compiled)
    for offset in (0, 8, 16, 56):
        outs = [at_address(np.full_like(x, np.nan), offset, MEBIBYTE) for _ in range(3)]
        fastbn.batch_norm(x, gamma, beta, out=outs[0], **options)
        fastbn.batch_norm_inference(x, saved.mean, saved.var, gamma, beta, out=outs[1], **options)
        fastbn.batch_norm_backward(grad_y, saved, out=outs[2], backend=compiled)
        for name, actual, expected in zip(("y", "inferred", "grad_x"), outs, (y, inferred, grad_x), strict=True):
            assert_same_bits(actual, expected, f"{name} at {offset}")
            assert is_untouched_around(actual)
    around = np.full((2 * x.shape[0], *x.shape[1:]), UNTOUCHED, dtype)
    fastbn.batch_norm(x, gamma, beta, out=around[1::2], **options)
    assert_same_bits(around[1::2], y, "y in every other row")
    assert (around[::2] == UNTOUCHED).all()


@pytest.mark.parametrize("shape", [(9, 4096), (40, 2080), (33, 1991)])
def test_outputs_that_begin_anywhere_in_a_line(compiled, dtype, shape):
    """Which decides where the tiles of wide rows begin."""
    rng = np.random.default_rng(1)
    x, grad_y = rng.standard_normal((2, *shape)).astype(dtype)
    gamma, beta = rng.standard_normal((2, shape[1])).astype(dtype)
    expected = everything(x, grad_y, gamma, beta, 1, backend=compiled, num_threads=1)
    for offset in range(0, 64, 8):
        for n in (1, 2, 3, 4):
            outs = [at_address(np.full_like(x, np.nan), offset) for _ in range(3)]
            actual = everything(x, grad_y, gamma, beta, 1, backend=compiled, num_threads=n, outs=outs)
            assert_all_the_same(actual, expected)
            assert all(is_untouched_around(out) for out in outs)


WORK_FOR_64 = {  # 64 KiB for each thread, less than which none is woken for
    "2099x513": Layout((2099, 513)),
    "360007x3": Layout((360_007, 3)),
    "40x40x28x28": Layout((40, 40, 28, 28)),
    "64x203x9x9": Layout((64, 203, 9, 9)),  # 26 tiles, which three threads share out unevenly
    "Fortran": Layout((27_001, 40), view=np.asfortranarray),
}


@pytest.mark.parametrize("layout", WORK_FOR_64)
def test_up_to_64_threads(compiled, dtype, layout):
    """Some numbers of them; `fastbn accuracy` takes all of 1 to 64."""
    data = draw(WORK_FOR_64[layout], dtype)
    assert data.x.nbytes >= 64 * 65536
    expected = everything(*data, backend=compiled, num_threads=1)
    for n in (3, 5, 13, 32, 64):
        assert_all_the_same(everything(*data, backend=compiled, num_threads=n), expected)


@pytest.mark.parametrize("layout", SOME_LAYOUTS)
def test_repeated_calls(compiled, dtype, layout):
    data = drawn(layout, dtype)
    expected = everything(*data, backend=compiled)
    for _ in range(5):
        assert_all_the_same(everything(*data, backend=compiled), expected)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("layout", ROW_LAYOUTS)
def test_any_row_stride(compiled, dtype, layout, activation):
    x, grad_y, gamma, beta, axis = drawn(layout, dtype)
    options = {"backend": compiled, "activation": activation}
    expected = everything(x.copy(), grad_y.copy(), gamma, beta, axis, **options)
    assert_all_the_same(everything(x, grad_y, gamma, beta, axis, **options), expected)
    # one strided, the other not
    assert_all_the_same(everything(x, grad_y.copy(), gamma, beta, axis, **options), expected)
    assert_all_the_same(everything(x.copy(), grad_y, gamma, beta, axis, **options), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_relu_that_is_never_off(compiled, dtype, layout):
    """Its kernels are others, their results the same."""
    x, grad_y, gamma, beta, axis = drawn(layout, dtype)
    data = x, grad_y, gamma, np.full_like(beta, 1000), axis
    expected = everything(*data, backend=compiled, activation=None)
    assert expected[0].min() > 0
    assert_all_the_same(everything(*data, backend=compiled, activation="relu"), expected)


@pytest.mark.parametrize("layout", ROW_LAYOUTS)
def test_any_row_stride_of_out(compiled, dtype, layout):
    x, grad_y, gamma, beta, axis = drawn(layout, dtype)
    expected = everything(x, grad_y, gamma, beta, axis, backend=compiled)
    around = [np.full((3 * x.shape[0], *x.shape[1:]), 99, dtype) for _ in range(3)]
    outs = [array[2::3] for array in around]
    actual = everything(x, grad_y, gamma, beta, axis, backend=compiled, outs=outs)
    assert_all_the_same(actual, expected)
    assert all(a is out for a, out in zip((actual[0], actual[4], actual[7]), outs, strict=True))
    for array in around:
        assert (array[0::3] == 99).all()
        assert (array[1::3] == 99).all()


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "broadcast rows"])
def test_in_place(backend, dtype, layout):
    x, grad_y, gamma, beta, axis = drawn(layout, dtype)
    expected = dict(zip(NAMES, everything(x, grad_y, gamma, beta, axis, backend=backend), strict=True))
    options = {"axis": axis, "activation": "relu", "backend": backend}
    _, saved = fastbn.batch_norm(x, gamma, beta, **options)

    y, grad_x, *_ = draw(LAYOUTS[layout], dtype, frozen=False)
    inferred, *_ = draw(LAYOUTS[layout], dtype, frozen=False)
    assert fastbn.batch_norm(y, gamma, beta, out=y, **options)[0] is y
    assert fastbn.batch_norm_backward(grad_x, saved, out=grad_x, backend=backend)[0] is grad_x
    result = fastbn.batch_norm_inference(inferred, saved.mean, saved.var, gamma, beta, out=inferred, **options)
    assert result is inferred
    for name, actual in (("y", y), ("grad_x", grad_x), ("inferred", inferred)):
        assert_same_bits(actual, expected[name], name)


UNTOUCHED = 99


def is_untouched_around(copy):
    """Whether what at_address left free before and behind a copy still is."""
    memory = copy.base
    start = copy.ctypes.data - memory.ctypes.data
    return (memory[:start] == UNTOUCHED).all() and (memory[start + copy.nbytes :] == UNTOUCHED).all()


LINE, MEBIBYTE = 64, 1 << 20


def at_address(values, offset, unit=LINE):
    """A copy of values that starts `offset` bytes behind a cache line, or another unit."""
    memory = np.full(values.nbytes + 2 * unit, UNTOUCHED, np.uint8)
    start = -memory.ctypes.data % unit + offset
    copy = memory[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy


@pytest.mark.parametrize("offset", [1, 2, 4, 8, 24, 60])
@pytest.mark.parametrize("layout", SOME_LAYOUTS)
def test_any_address(compiled, dtype, layout, offset):
    """Multiples of the item's size, and others."""
    *arrays, axis = (np.ascontiguousarray(a) if isinstance(a, np.ndarray) else a for a in drawn(layout, dtype))
    expected = everything(*arrays, axis, backend=compiled)
    moved = [at_address(array, offset) for array in arrays]
    outs = [at_address(arrays[0], offset) for _ in range(3)]
    assert moved[0].flags.aligned == (offset % dtype.itemsize == 0)
    assert_all_the_same(everything(*moved, axis, backend=compiled), expected)
    assert_all_the_same(everything(*arrays, axis, backend=compiled, outs=outs), expected)


@pytest.mark.parametrize("layout", ["260x513", "inner 49"])
def test_every_address(compiled, layout):
    x, grad_y, gamma, beta, axis = drawn(layout, np.dtype(np.float32))
    expected = everything(x, grad_y, gamma, beta, axis, backend=compiled)
    for offset in range(64):
        moved = [at_address(array, (offset + i) % 64) for i, array in enumerate((x, grad_y, gamma, beta))]
        assert_all_the_same(everything(*moved, axis, backend=compiled), expected)


@pytest.mark.parametrize("layout", ["260x512", "260x513", "33x5000", "inner 49"])
def test_every_distance_within_a_mebibyte(compiled, dtype, layout):
    """Where an output lies a little behind an input, its strips are written from the last one on. What processors
    do not tell apart is a page or a mebibyte."""
    x, grad_y, gamma, beta, axis = drawn(layout, dtype)
    expected = everything(x, grad_y, gamma, beta, axis, backend=compiled)
    for distance in range(-288, 289, 8):
        between_inputs = distance // 24 * 8
        moved = at_address(x, 1024, MEBIBYTE), at_address(grad_y, 1024 + between_inputs, MEBIBYTE)
        outs = [at_address(np.full_like(x, np.nan), 1024 + distance, MEBIBYTE) for _ in range(3)]
        assert_all_the_same(everything(*moved, gamma, beta, axis, backend=compiled, outs=outs), expected)
        assert all(is_untouched_around(out) for out in outs)


def padded(values, columns):
    """A copy of values whose rows are that many more columns apart; upside down in memory where columns is negative."""
    wide = np.full((len(values), values.shape[1] + abs(columns)), 99, values.dtype)
    rows = wide[::-1] if columns < 0 else wide
    rows[:, : values.shape[1]] = values
    return rows[:, : values.shape[1]]


@pytest.mark.parametrize("layout", ["260x513", "9001x3", "1301x77"])
def test_many_row_strides(compiled, dtype, layout):
    x, grad_y, gamma, beta, axis = drawn(layout, dtype)
    expected = everything(x, grad_y, gamma, beta, axis, backend=compiled)
    for columns in (*range(1, 18), 64, 511, -1, -3, -16):
        strided = padded(x, columns), padded(grad_y, -columns)
        outs = [padded(np.zeros_like(x), columns + i) for i in range(3)]
        assert_all_the_same(everything(*strided, gamma, beta, axis, backend=compiled), expected)
        assert_all_the_same(everything(*strided, gamma, beta, axis, backend=compiled, outs=outs), expected)


def test_backends_and_layouts_differ_by_rounding_alone(compiled):
    """What is not promised: other orders of summation. The difference is far below what float32 holds."""
    x = drawn("1301x77", np.dtype(np.float32)).x
    rows, columns = fastbn.moments(x, backend=compiled), fastbn.moments(np.asfortranarray(x), backend=compiled)
    np.testing.assert_allclose(rows.mean, columns.mean, rtol=0, atol=1e-14)
    np.testing.assert_allclose(rows.m2, columns.m2, rtol=1e-14)
