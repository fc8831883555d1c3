"""Every third batch holds a NaN or an infinite value. With skip_nonfinite=True the running statistics are, to the bit,
those of a layer that never saw these batches; each is counted, and the first one warned of."""

import warnings

import numpy as np

import fastbn

BAD = (np.nan, np.inf, -np.inf)


def run(tally, scale):
    rng = np.random.default_rng(4)
    runs = max(12, round(1000 * scale))
    for i in range(runs):
        backend = fastbn.available_backends()[i % len(fastbn.available_backends())]
        options = {"momentum": (0.1, None, 0.0, 1.0)[i // 3 % 4], "axis": (1, -1)[i % 2], "backend": backend}
        layer, clean = (fastbn.BatchNorm(6, skip_nonfinite=skip, **options) for skip in (True, False))
        one_run(tally, rng, layer, clean, f"run {i}, {options}")
        tally.progress(i / runs)


def one_run(tally, rng, layer, clean, name):
    skipped = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for j in range(12):
            x = rng.normal(3, 2, (16, 6, 6)).astype((np.float32, np.float64)[j % 2])
            if j % 3 == 2:
                x[tuple(rng.integers(x.shape))] = BAD[j // 3 % 3]
                skipped += 1
                tally.count("batches that are not finite")
            else:
                clean(x)
                tally.count("batches that are")
            layer(x)
    same = all(np.array_equal(value, clean.state_dict()[key]) for key, value in layer.state_dict().items())
    tally.expect(same, f"{name}: other running statistics than without these batches")
    tally.expect(layer.num_batches_skipped == skipped, f"{name}: {layer.num_batches_skipped} counted, not {skipped}")
    tally.expect(len(caught) == 1, f"{name}: {len(caught)} warnings")
