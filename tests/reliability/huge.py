"""Arrays of more than 2**31 elements, in C and Fortran order, of one channel, and images. They are zero but for some
values, most of them beyond element 2**31, so the exact answer is known, and every element of the output is looked at.
And views of one number that pretend to be arrays which no machine holds: a MemoryError."""

from fractions import Fraction

import numpy as np

import fastbn
from reliability import FULL, work
from reliability.system import available_bytes

N = 2**31 + 2**11
LAYOUTS = [  # shape, order, axis
    ((N // 1024, 1024), "C", 1),
    ((N // 4, 4), "F", 1),
    ((N, 1), "C", 1),
    ((4, 2, 2**14 + 1, 2**14), "C", 1),
]
LARGEST = max(int(np.prod(shape)) for shape, _, _ in LAYOUTS)
VALUES = {5: 1.0, 2**31 - 1: 2.0, 2**31 + 7: 3.0, -1: 4.0}  # by place in memory
EPS = 1e-5


def run(tally, scale):
    too_large(tally)
    if scale < FULL:
        one_array(tally, work.compiled()[0], *LAYOUTS[0], None)
        return
    out = None
    if available_bytes() > 5 * LARGEST:
        out = np.empty(LARGEST, np.float32)
    else:
        tally.note("too little memory for an output: only moments were tried")
    for i, layout in enumerate(LAYOUTS):
        for j, backend in enumerate(work.compiled()):
            one_array(tally, backend, *layout, out)
            tally.progress((i + j / 2) / len(LAYOUTS))


def too_large(tally):
    for shape in ((2**40, 4), (4, 2**40), (2**20, 2**20, 2**20)):
        x = np.broadcast_to(np.float32(1), shape)
        for backend in work.compiled():
            for call in (fastbn.batch_norm, fastbn.moments):
                tally.count("arrays that no machine holds")
                try:
                    call(x, backend=backend)
                except MemoryError:
                    continue
                tally.expect(False, f"{backend}: {call.__name__} of {shape} gave no MemoryError")


def one_array(tally, backend, shape, order, axis, out):
    x = np.zeros(shape, np.float32, order)  # what is never written to takes no memory
    places = {np.unravel_index(at % x.size, shape, order): value for at, value in VALUES.items()}
    for place, value in places.items():
        x[place] = value
    mean, var, count = exact(shape, axis, places)
    name = f"{backend}, {shape}, order {order}"

    moments = fastbn.moments(x, axis=axis, backend=backend)
    tally.count("moments of more than 2**31 elements")
    allowed = 1e-13 * np.maximum(np.abs(mean), np.sqrt(var))  # the bound of docs/numerics.md
    tally.expect(bool((np.abs(moments.mean - mean) <= allowed).all()), f"{name}: wrong mean")
    tally.expect(np.allclose(moments.m2, var * count, rtol=1e-13, atol=0), f"{name}: wrong m2")
    if out is None:
        return
    y = out[: x.size].reshape(shape, order=order)
    scale = 1 / np.sqrt(var + EPS)
    _, saved = fastbn.batch_norm(x, axis=axis, eps=EPS, out=y, backend=backend)
    tally.count("forward of more than 2**31 elements")
    tally.expect(is_affine(y, order, axis, places, mean, scale), f"{name}: wrong y")
    fastbn.batch_norm_backward(x, saved, out=y, backend=backend)  # with grad_y = x it is affine, too
    tally.count("backward of more than 2**31 elements")
    tally.expect(is_affine(y, order, axis, places, mean, scale * EPS / (var + EPS)), f"{name}: wrong grad_x")


def exact(shape, axis, places):
    """Mean, variance and count of each channel, by rational numbers."""
    count = int(np.prod(shape)) // shape[axis]
    sums = [[Fraction(0), Fraction(0)] for _ in range(shape[axis])]
    for place, value in places.items():
        sums[place[axis]][0] += Fraction(value)
        sums[place[axis]][1] += Fraction(value) ** 2
    mean = np.array([float(s1 / count) for s1, _ in sums])
    var = np.array([float(s2 / count - (s1 / count) ** 2) for s1, s2 in sums])
    return mean, var, count


def is_affine(y, order, axis, places, mean, scale):
    """y is (x - mean) * scale: one number a channel wherever x is 0, and right there and at the places."""
    zero = [1] * y.ndim
    zero[axis] = slice(None)
    zeros = y[tuple(zero)].ravel()
    allowed = 1e-6 * max(1, np.abs(scale).max())
    right = np.allclose(zeros, -mean * scale, rtol=0, atol=allowed)
    for place, value in places.items():
        c = place[axis]
        right = right and abs(y[place] - (value - mean[c]) * scale[c]) <= allowed * value
    if order == "F":
        y, axis = y.T, y.ndim - 1 - axis
    column = [1] * y.ndim
    column[axis] = -1
    zeros = zeros.reshape(column)
    step = max(1, 2**24 // (y.size // len(y)))
    parts = [slice(i, i + step) for i in range(0, len(y), step)]
    equal = sum(np.count_nonzero(y[part] == (zeros[part] if axis == 0 else zeros)) for part in parts)
    return right and equal == y.size - len(places)
