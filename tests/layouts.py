"""Arrays of every memory layout that a caller may bring, by name."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    shape: tuple[int, ...]  # of the array that is drawn
    axis: int = 1  # the channel axis of what `view` makes of it
    view: Callable[[np.ndarray], np.ndarray] = np.ascontiguousarray
    rows: bool = False  # whether only the stride between rows differs from a contiguous array's


LAYOUTS = {
    # one value a row and channel: columns are swept
    "2x5": Layout((2, 5)),
    "5x1": Layout((5, 1)),
    "9x16": Layout((9, 16)),
    "9001x1": Layout((9001, 1)),
    "9001x3": Layout((9001, 3)),
    "4999x20": Layout((4999, 20)),
    "1301x77": Layout((1301, 77)),
    "1000x64": Layout((1000, 64)),
    "3001x32": Layout((3001, 32)),
    "40007x2": Layout((40007, 2)),
    "300x192": Layout((300, 192)),
    "260x300": Layout((260, 300)),
    "260x512": Layout((260, 512)),
    "260x513": Layout((260, 513)),
    "70x1000": Layout((70, 1000)),
    "48x1500": Layout((48, 1500)),
    "100x2000": Layout((100, 2000)),
    "33x5000": Layout((33, 5000)),
    "140x2100": Layout((140, 2100)),
    "channels last 4-D": Layout((3, 5, 7, 20), axis=-1),
    "channels last 5-D": Layout((2, 3, 4, 5, 77), axis=4),
    "torch channels_last": Layout((4, 7, 9, 20), view=lambda x: x.transpose(0, 3, 1, 2)),
    # a step between rows
    "every other row": Layout((4001, 20), view=lambda x: x[::2], rows=True),
    "every other row of 77": Layout((4001, 77), view=lambda x: x[::2], rows=True),
    "every other row of 64": Layout((2711, 64), view=lambda x: x[::2], rows=True),
    "every other row of 32": Layout((6007, 32), view=lambda x: x[::2], rows=True),
    "every third row of 4": Layout((24_007, 4), view=lambda x: x[::3], rows=True),
    "rows reversed": Layout((2001, 20), view=lambda x: x[::-1], rows=True),
    "some columns": Layout((1201, 80), view=lambda x: x[:, 1:-2], rows=True),
    "one column": Layout((801, 9), view=lambda x: x[:, 4:5], rows=True),
    "some columns of 300": Layout((301, 300), view=lambda x: x[:, 7:-37], rows=True),
    "some columns of many": Layout((65, 1100), view=lambda x: x[5:-3:2, 7:-90], rows=True),
    "some columns of 2200": Layout((140, 2200), view=lambda x: x[:, 7:-90], rows=True),
    "every other image": Layout((9, 5, 7, 7), view=lambda x: x[::2], rows=True),
    "some channels": Layout((6, 9, 5, 3), view=lambda x: x[::-1, 2:7], rows=True),
    # several values a row and channel, few: swept as columns
    **{f"inner {n}": Layout((67, 7, n)) for n in (2, 3, 5, 8, 16, 17, 31)},
    "inner 4, wide": Layout((40, 300, 4)),
    "inner 4, wider": Layout((130, 530, 4)),
    "inner 4, 16 channels": Layout((701, 16, 4)),
    "inner 31, wide": Layout((9, 70, 31)),
    **{f"inner {n}, 41 rows": Layout((41, 12, n)) for n in (32, 49, 63)},
    # many, or of few rows: swept along the inner axis
    **{f"inner {n}": Layout((6, 40, n)) for n in (32, 33, 49, 196)},
    "inner 3136": Layout((3, 4, 3136)),
    "inner 196, tall": Layout((260, 3, 196)),
    "NCHW": Layout((5, 6, 14, 14)),
    "NCDHW": Layout((3, 5, 3, 4, 5)),
    "Fortran": Layout((3001, 5), view=np.asfortranarray),
    "Fortran, long": Layout((20001, 3), view=np.asfortranarray),
    "Fortran, short": Layout((11, 90), view=np.asfortranarray),
    "channels first": Layout((6, 901), axis=0),
    # no view fits: copied
    "every other column": Layout((501, 40), view=lambda x: x[:, ::2]),
    "columns reversed": Layout((501, 20), view=lambda x: x[:, ::-1]),
    "inner step": Layout((20, 6, 40), view=lambda x: x[:, :, ::2]),
    "interleaved": Layout((4, 5, 6, 7), view=lambda x: x.transpose(2, 1, 0, 3)),
    "broadcast rows": Layout((40, 6, 1), view=lambda x: np.broadcast_to(x, (40, 6, 9))),
}
LARGE = Layout((8300, 513))  # more blocks than chunks, and an output that bypasses the caches
PAST_THE_CACHES = {  # the outputs of all these bypass the caches
    "8300x513": LARGE,
    "56003x77": Layout((56_003, 77)),
    "1400003x3": Layout((1_400_003, 3)),
    "NCHW": Layout((11, 130, 57, 53)),
    "inner 31": Layout((2001, 70, 31)),
    "every other row": Layout((180_002, 48), view=lambda x: x[::2], rows=True),
    "rows reversed": Layout((90_001, 77), view=lambda x: x[::-1], rows=True),
    "every other row of 24": Layout((360_002, 24), view=lambda x: x[::2], rows=True),
    "every other row of 16": Layout((540_002, 16), view=lambda x: x[::2], rows=True),
    "some columns": Layout((9001, 620), view=lambda x: x[:, 1:-2], rows=True),
    "260x16385": Layout((260, 16_385)),  # a last tile of one column
}


class Drawn(NamedTuple):
    x: np.ndarray
    grad_y: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    axis: int


def draw(layout, dtype, *, frozen=True):
    """Normal data with a mean and a standard deviation of its own in each channel; the same in every call."""
    rng = np.random.default_rng(7)
    x = layout.view(rng.standard_normal(layout.shape).astype(dtype))
    grad_y = layout.view(rng.standard_normal(layout.shape).astype(dtype) + dtype.type(0.25))
    channels = x.shape[layout.axis]
    column = [-1 if i == layout.axis % x.ndim else 1 for i in range(x.ndim)]
    if x.flags.writeable:
        x *= rng.uniform(0.5, 2, channels).astype(dtype).reshape(column)
        x += rng.uniform(-3, 3, channels).astype(dtype).reshape(column)
    gamma = rng.uniform(0.5, 2, channels).astype(dtype) * rng.choice([-1, 1], channels).astype(dtype)
    beta = rng.uniform(-1, 1, channels).astype(dtype)
    for array in (x, grad_y, gamma, beta):
        array.flags.writeable = array.flags.writeable and not frozen
    return Drawn(x, grad_y, gamma, beta, layout.axis)


@cache
def drawn(name, dtype):
    """Read-only, because every test gets the same arrays."""
    return draw(LAYOUTS[name], dtype)
