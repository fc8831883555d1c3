"""The address space is limited (RLIMIT_AS) so that an output, or a copy of the input, may or may not fit. Each call
gives the right answer or a MemoryError; after one the layer is as it was; memory kept for reuse is given up first."""

import gc
import pickle
from functools import partial

import numpy as np

import fastbn
from fastbn import _memory
from reliability import work
from reliability.system import AddressSpace

SHAPE = (300_000, 64)  # 77 MB: more than an arena of the C library has in reserve
MIB = 1 << 20


def run(tally, scale):
    rng = np.random.default_rng(2)
    x = rng.normal(3, 2, SHAPE).astype(np.float32)
    steps = x[:, ::2]  # no view of it is canonical: copied
    for backend in work.compiled(scale):
        layer = fastbn.BatchNorm(SHAPE[1], backend=backend)
        narrow = fastbn.BatchNorm(SHAPE[1] // 2, backend=backend)
        infer = partial(fastbn.batch_norm_inference, mean=np.zeros(64), var=np.ones(64), backend=backend)
        calls = {
            "forward": (layer, partial(layer, x)),
            "forward with a copy": (narrow, partial(narrow, steps)),
            "backward": (layer, partial(layer.backward, x)),
            "inference": (layer, partial(infer, x)),
            "moments with a copy": (layer, partial(m2, steps, backend)),
        }
        expected = {name: call() for name, (_, call) in calls.items()}
        limits = np.linspace(0, 2.5 * x.nbytes / MIB, max(4, round(100 * scale)))
        for done, mib in enumerate(limits):
            for name, (own, call) in calls.items():
                one_call(tally, f"{backend}, {name}", own, call, expected[name], mib)
            tally.progress(done / len(limits))
        kept_memory_is_given_up(tally, backend, x)
    tally.expect(tally.tried.get("calls that failed", 0) > 0, "no limit was ever reached")
    tally.expect(tally.tried.get("calls that did not", 0) > 0, "no limit ever sufficed")


def m2(x, backend):
    return fastbn.moments(x, backend=backend).m2


def one_call(tally, name, layer, call, expected, mib):
    gc.collect()
    fastbn.release_memory()
    before, saved, answer = pickle.dumps(layer), layer._saved, None
    try:
        with AddressSpace(int(mib * MIB)):
            answer = call()
    except MemoryError as error:
        tally.count("calls that failed")
        tally.expect(bool(str(error)) or error.args == (), f"{name}: {error!r}")
        tally.expect(pickle.dumps(layer) == before and layer._saved is saved, f"{name}: the layer changed")
    else:
        tally.count("calls that did not")
        tally.expect(np.array_equal(answer, expected), f"{name}: wrong with {mib:.0f} MiB")


def kept_memory_is_given_up(tally, backend, x):
    """What is kept is of another size, and without giving it up the output does not fit."""
    fastbn.release_memory()
    kept = fastbn.batch_norm(x[: len(x) // 4 * 3], backend=backend)[0]
    del kept
    tally.expect(_memory.kept_bytes() > 0, "nothing was kept")
    with AddressSpace(30 * MIB):
        try:
            fastbn.batch_norm(x, backend=backend)
        except MemoryError:
            tally.expect(False, f"{backend}: what was kept was not given up")
    tally.count("outputs that fitted once what was kept was given up")
    tally.expect(_memory.kept_bytes() <= x.nbytes + 2 * MIB, f"{backend}: more is kept than the last output")
