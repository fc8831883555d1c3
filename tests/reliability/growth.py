"""A million calls on a small array, then minutes of mixed shapes, sizes, layouts and options, the same ones in each
cycle: the resident memory at the end is that after the first cycles."""

import gc
import time

import numpy as np

import fastbn
from reliability import FULL, work
from reliability.system import resident_bytes

MIB = 1 << 20
ALLOWED = 3 * MIB  # half a million calls that lose 8 bytes each would lose more


def run(tally, scale):
    backends = work.compiled(scale)
    for i, backend in enumerate(backends):
        small_calls(tally, backend, round(1_000_000 * scale / len(backends)), i / 2)
    for backend in backends:
        mixed_shapes(tally, backend, 40 * scale, 60 if scale >= FULL else 8)


def resident():
    gc.collect()
    fastbn.release_memory()
    return resident_bytes()


def small_calls(tally, backend, n, done):
    layer = fastbn.BatchNorm(8, backend=backend)
    x = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)

    def calls(times):
        for i in range(times):
            layer(x)
            layer.backward(x)
            layer.eval()(x)
            layer.train()
            fastbn.moments(x, backend=backend)
            if i % 1000 == 0:
                with_errors(layer, x)
                tally.progress((done + i / n) / 4)

    calls(max(100, n // 40))
    before = resident()
    calls(n // 4)
    tally.count("small calls", n // 4 * 4)
    judge(tally, f"{backend}, small calls", resident() - before)


def with_errors(layer, x):
    """Errors must not leak either."""
    for bad in (x[:1], x[:, :3], x[0], x.astype(complex), None):
        try:
            layer(bad)
        except (TypeError, ValueError):
            continue
        raise AssertionError(f"{bad!r} was taken")


def mixed_shapes(tally, backend, seconds, n):
    start, cycles, after = time.monotonic(), 0, []
    while len(after) < 4 or time.monotonic() - start < seconds:
        rng = np.random.default_rng(9)
        for _ in range(n):
            one_shape(rng, backend)
            tally.count("mixed shapes")
        cycles += 1
        after.append(resident())
    judge(tally, f"{backend}, {cycles} cycles of mixed shapes", min(after[-2:]) - max(after[1:3]))


def one_shape(rng, backend):
    shape = [int(rng.integers(2, 400)) for _ in range(rng.integers(2, 5))]
    while np.prod(shape) > 2e6:
        shape[rng.integers(len(shape))] //= 2
    shape = [max(2, length) for length in shape]
    x = rng.standard_normal(shape, (np.float32, np.float64)[rng.integers(2)])
    x = (x, x.T, x[::2], x[..., ::2], np.asfortranarray(x))[rng.integers(5)]
    axis = int(rng.integers(x.ndim))
    if x.size == x.shape[axis]:
        return
    activation = (None, "relu")[rng.integers(2)]
    y, saved = fastbn.batch_norm(x, axis=axis, activation=activation, backend=backend)
    fastbn.batch_norm_backward(y, saved, backend=backend)
    fastbn.moments(x, axis=axis, backend=backend)


def judge(tally, name, growth):
    tally.expect(growth <= ALLOWED, f"{name}: {growth / MIB:.1f} MiB more resident memory")
    tally.note(f"{name}: {growth / MIB:+.1f} MiB of resident memory (allowed: {ALLOWED / MIB:.0f})")
