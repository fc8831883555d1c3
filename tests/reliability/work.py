"""The calls whose answers the rows compare: everything that fastbn computes, on arrays of four shapes."""

import hashlib
from functools import cache

import numpy as np

import fastbn
from reliability import FULL

SHAPES = ((9001, 64), (500, 300), (20, 8, 400), (64, 8))
ALL = range(len(SHAPES))
THREADS = 4


def compiled(scale=1.0):
    """The compiled backends; in a short run the first one, as the others take seconds to load."""
    return [name for name in fastbn.available_backends() if name != "numpy"][: None if scale >= FULL else 1]


@cache
def arrays(i):
    """x and grad_y, the same in every process; nobody can write to them."""
    rng = np.random.default_rng(i)
    pair = rng.normal(3, 2, SHAPES[i]).astype(np.float32), rng.standard_normal(SHAPES[i]).astype(np.float32)
    for array in pair:
        array.flags.writeable = False
    return pair


@cache
def layer(backend, i):
    """A layer in eval mode that all threads share."""
    shared = fastbn.BatchNorm(SHAPES[i][1], activation="relu", backend=backend)
    shared(arrays(i)[0])
    return shared.eval()


def answers(backend, i, num_threads=THREADS):
    """A digest of forward, backward, inference, moments and a shared layer on arrays i."""
    x, grad_y = arrays(i)
    options = {"num_threads": num_threads, "backend": backend}
    y, saved = fastbn.batch_norm(x, activation="relu", **options)
    moments = fastbn.moments(x, **options)
    results = (
        y, saved.mean, saved.var, *fastbn.batch_norm_backward(grad_y, saved, **options),
        fastbn.batch_norm_inference(x, saved.mean, saved.var, **options), moments.mean, moments.m2,
        layer(backend, i)(x),
    )
    digest = hashlib.blake2b(digest_size=16)
    for array in results:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def expected(backend):
    """All answers, computed on several threads."""
    return [answers(backend, i) for i in ALL]
