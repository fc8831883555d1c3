"""States that are no states: arrays of wrong shapes, types and values by the names of the right ones, files that are
truncated, that have bytes changed, or that hold pickles. `BatchNorm.load_state_dict(np.load(path))` raises an ordinary
error and leaves the layer as it was, or the state is a good one; no code of the file ever runs."""

import io
import pickle
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np

import fastbn

CHANNELS = 5
ERRORS = (ValueError, TypeError, KeyError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


def run(tally, scale):
    rng = np.random.default_rng(6)
    layer = fastbn.BatchNorm(CHANNELS)
    layer(rng.normal(3, 2, (50, CHANNELS)))
    in_memory(tally, layer)
    with tempfile.TemporaryDirectory() as folder:
        damaged_files(tally, layer, Path(folder), rng, max(100, round(20_000 * scale)))
        pickles(tally, layer, Path(folder))


def values():
    """What may stand in the place of an array; none of it is one of five finite numbers."""
    yield from (None, "text", b"bytes", object(), {}, [], {1, 2}, 1.5, 1j, np.nan, -1, 2**70, True, [[1, 2], [3]])
    for dtype in ("complex64", "object", "U3", "S3", "M8[s]", "m8[s]", "V8", "O", [("a", "f8")]):
        yield np.zeros(CHANNELS, dtype)
    for shape in ((), (0,), (CHANNELS - 1,), (CHANNELS + 1,), (CHANNELS, 1), (1, CHANNELS), (CHANNELS,) * 5):
        yield np.ones(shape)
    for bad in (np.nan, np.inf, -np.inf):
        yield np.where(np.arange(CHANNELS) == 3, bad, 1)
    yield np.ma.masked_equal(np.arange(CHANNELS), 2)
    yield np.full(CHANNELS, 1e4000, np.longdouble) if np.finfo(np.longdouble).max > 1e308 else np.full(CHANNELS, np.inf)


def in_memory(tally, layer):
    state = layer.state_dict()
    for key in state:
        for value in values():
            refused(tally, layer, f"{key} = {value!r}", state | {key: value})
        refused(tally, layer, f"without {key}", {name: state[name] for name in state if name != key})
        refused(tally, layer, f"{key} twice", state | {key.upper(): state[key]})
    for key, value in (("running_var", -np.ones(CHANNELS)), ("weight", np.full(CHANNELS, 1e300)),
                       ("num_batches_tracked", np.uint64(2**64 - 1)), ("num_batches_tracked", np.float64(3))):
        refused(tally, layer, f"{key} = {value!r}", state | {key: value})
    for value in (None, 5, "state", [], [*state.items()], np.ones(CHANNELS), object()):
        refused(tally, layer, f"{value!r} for a state", value)


def refused(tally, layer, name, state):
    tally.count("states in memory")
    tally.expect(outcome(tally, layer, name, lambda: state) == "refused", f"{name} was taken")


def outcome(tally, layer, name, read):
    before, state = pickle.dumps(layer), None
    try:
        state = read()
        layer.load_state_dict(state)
    except ERRORS as error:
        tally.expect(state is None or bool(str(error)), f"{name}: {error!r} says nothing")
        tally.expect(pickle.dumps(layer) == before, f"{name}: the layer changed")
        return "refused"
    return "taken"


def damaged_files(tally, layer, folder, rng, n):
    """A file is cut short, or has up to eight bytes changed; zip's checksums find what does not matter to NumPy."""
    buffer = io.BytesIO()
    np.savez(buffer, **layer.state_dict())
    whole, path, good = buffer.getvalue(), folder / "state.npz", pickle.dumps(layer)
    for i in range(n):
        damaged = bytearray(whole)
        if i % 4 == 0:
            del damaged[rng.integers(len(whole)) :]
        for at in rng.integers(len(damaged), size=rng.integers(1, 9)) if damaged else ():
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged)

        def read():
            with np.load(path) as state:
                return {key: state[key] for key in state}

        found = outcome(tally, layer, f"file {i}", read)
        tally.count("damaged files refused" if found == "refused" else "damaged where nothing matters, and read right")
        tally.expect(pickle.dumps(layer) == good, f"file {i}: taken with other numbers")
        tally.progress(i / n)


class Payload:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.write_text, (self.target, "executed")


def pickles(tally, layer, folder):
    target, path = folder / "executed", folder / "state.npz"
    state = layer.state_dict()
    array = np.full(CHANNELS, Payload(target), object)
    for key in state:
        np.savez(path, **(state | {key: array}))
        tally.expect(outcome(tally, layer, key, lambda: np.load(path)) == "refused", f"a pickle as {key} was taken")
        tally.count("files with pickles")
    for bare in (pickle.dumps(state | {"weight": Payload(target)}), pickle.dumps(Payload(target))):
        path.write_bytes(bare)
        tally.expect(outcome(tally, layer, "a pickle", lambda: np.load(path)) == "refused", "a pickle was taken")
        tally.count("files with pickles")
    tally.expect(not target.exists(), "code of a file was executed")
    pickle.loads(bare)
    tally.expect(target.exists(), "the payload is harmless, so this shows nothing")
