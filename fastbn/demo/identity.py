"""Part two: does SGD undo the normalization, and what does the same function cost without gamma and beta?

The raw activations h are real ones: what the first hidden layer of part one's network without batch normalization puts
into its sigmoids for the training images. One fastbn layer normalizes them, from gamma = 1 and beta = 0. With gamma =
sqrt(var + eps) and beta = mean, per unit, it would return h itself (Ioffe and Szegedy 2015, section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastbn
from fastbn.demo.network import (
    Array,
    Linear,
    Network,
    learned,
    one_blas_thread,
    sgd,
    sigmoid,
    softmax_cross_entropy,
)

BATCH = 60
IDENTITY_RATE, IDENTITY_STEPS = 0.1, 300
LABELS_STEPS = 2000
REACHED = 1e-4  # of the loss at the start: what counts as the same function in `cost`
MOST_STEPS = 4000  # then a route counts as too long
FROZEN_STEPS = 200  # where nothing moves
STABLE = 0.9  # the learning rates in `cost`, as a part of the largest one that does not diverge

Progress = Callable[[int], Any]


@dataclass(frozen=True)
class Raw:
    """Raw activations ``h = inputs @ weight + bias``, in float64, and their statistics per unit."""

    inputs: Array
    weight: Array
    bias: Array
    h: Array
    mean: Array
    std: Array  # sqrt(var + eps)

    @classmethod
    def of(cls, network: Network, images: Array) -> Raw:
        """Of the first hidden layer, which must be one without batch normalization."""
        linear, norm = network.hidden[0]
        if norm is not None or linear.bias is None:
            raise ValueError("network must be one without batch normalization")
        x, weight, bias = (array.astype(np.float64) for array in (images, linear.weight, linear.bias))
        h = x @ weight + bias
        found = fastbn.moments(h)
        return cls(x, weight, bias, h, found.mean, np.sqrt(found.var() + 1e-5))


@dataclass(frozen=True)
class End:
    """Where SGD left gamma and beta, and how far the layer is from the identity there."""

    target: str
    batch: int
    steps: int
    gamma: Array
    beta: Array
    gamma_ratio: Array  # gamma / sqrt(var + eps) per unit: 1 at the identity
    beta_shift: Array  # (beta - mean) / sqrt(var + eps) per unit: 0 at the identity
    output_error: float  # rms(y - h) / rms(h - mean), over all values

    @classmethod
    def of(cls, raw: Raw, norm: fastbn.BatchNorm, target: str, batch: int, steps: int) -> End:
        gamma, beta = np.array(norm.gamma), np.array(norm.beta)
        y = norm(raw.h)  # in training mode: with the statistics of all rows
        error = float(np.sqrt(np.square(y - raw.h).mean() / np.square(raw.h - raw.mean).mean()))
        return cls(target, batch, steps, gamma, beta, gamma / raw.std, (beta - raw.mean) / raw.std, error)


def _layer(raw: Raw, backend: str | None) -> fastbn.BatchNorm:
    return fastbn.BatchNorm(raw.h.shape[1], dtype=np.float64, backend=backend, num_threads=1)


def to_itself(raw: Raw, *, batch: int, seed: int, backend: str | None = None, progress: Progress) -> End:
    """SGD on gamma and beta alone towards the target h itself; the loss is half the squared error of a row.

    A batch of all rows has the statistics of all rows, so the identity can be met exactly; the statistics of smaller
    ones differ from one to the next, so there it can be met on average only.
    """
    norm, rng = _layer(raw, backend), np.random.default_rng(seed)
    for _ in range(IDENTITY_STEPS):
        h = raw.h[rng.permutation(len(raw.h))[:batch]]
        norm.backward((norm(h) - h) / batch)
        sgd(learned(norm), IDENTITY_RATE)
        progress(1)
    return End.of(raw, norm, "raw activations", batch, IDENTITY_STEPS)


def to_labels(
    raw: Raw, labels: NDArray[np.intp], *, learning_rate: float, seed: int, backend: str | None = None,
    progress: Progress,
) -> End:
    """SGD on gamma, beta and a fresh softmax layer above the sigmoids; the target is the digit."""
    norm, rng = _layer(raw, backend), np.random.default_rng(seed)
    last = Linear(raw.h.shape[1], 10, rng, 0.1, np.float64)
    for _ in range(LABELS_STEPS):
        rows = rng.permutation(len(raw.h))[:BATCH]
        y = sigmoid(norm(raw.h[rows]))
        _, grad = softmax_cross_entropy(last(y), labels[rows])
        last.backward(grad)
        norm.backward((grad @ last.weight.T) * y * (1 - y))
        sgd([*learned(norm), *last.parameters()], learning_rate)
        progress(1)
    return End.of(raw, norm, "labels", BATCH, LABELS_STEPS)


@dataclass(frozen=True)
class Route:
    """One way from the normalized activations to the raw ones."""

    name: str
    numbers: int  # that SGD changes
    steps: int
    seconds: float
    loss: float  # at the end, as a part of the loss at the start

    @property
    def reached(self) -> bool:
        return self.loss <= REACHED


def _descend(
    name: str, raw: Raw, forward: Callable[[], Array], backward: Callable[[Array], object],
    parameters: Callable[[], list[tuple[Array, Array]]], learning_rate: float, most_steps: int,
) -> Route:
    """Full-batch gradient descent towards h until the loss is REACHED of the first one."""
    start, first, part, steps = perf_counter(), 0.0, 1.0, 0
    while True:
        error = forward() - raw.h
        loss = float(np.square(error).sum()) / (2 * len(raw.h))
        first = first or loss
        part = loss / first
        if part <= REACHED or steps == most_steps:
            break
        backward(error / len(raw.h))
        sgd(parameters(), learning_rate)
        steps += 1
    return Route(name, sum(array.size for array, _ in parameters()), steps, perf_counter() - start, part)


def cost(raw: Raw, *, most_steps: int, backend: str | None = None) -> list[Route]:
    """From the same start, the normalized activations, to the same target, h, by three sets of weights.

    All three start with the same outputs, so with the same loss. Each of the first two has the learning rate
    ``STABLE * 2 / (largest eigenvalue of its Hessian)``, which is 1 for gamma and beta: the normalized units have
    variance 1. The third starts where it must stay: whatever the weights, its outputs have mean 0 and variance 1, and
    of all such outputs these are the nearest to h.
    """
    norm = _layer(raw, backend)
    routes = [
        _descend("gamma and beta", raw, lambda: norm(raw.h), norm.backward, lambda: learned(norm), STABLE * 2,
                 most_steps)
    ]

    with_ones = np.column_stack([raw.inputs, np.ones(len(raw.inputs))])
    rate = STABLE * 2 / float(np.linalg.eigvalsh(with_ones.T @ with_ones / len(with_ones))[-1])
    linear = _folded(raw)
    routes.append(
        _descend("all weights, no normalization", raw, lambda: linear(raw.inputs), linear.backward, linear.parameters,
                 rate, most_steps)
    )

    below, frozen = _folded(raw), _layer(raw, backend)
    routes.append(
        _descend("all weights, gamma = 1 and beta = 0", raw, lambda: frozen(below(raw.inputs)),
                 lambda grad: below.backward(frozen.backward(grad)), below.parameters, rate, FROZEN_STEPS)
    )
    return routes


def _folded(raw: Raw) -> Linear:
    """The linear layer that puts out the normalized activations: weight / std, (bias - mean) / std."""
    n_in, n_out = raw.weight.shape
    linear = Linear(n_in, n_out, np.random.default_rng(), 0.0, np.float64)
    linear.weight, linear.bias = raw.weight / raw.std, (raw.bias - raw.mean) / raw.std
    return linear


@dataclass(frozen=True)
class PartTwo:
    raw: Raw
    start: End
    itself: End  # batches of all rows
    itself_minibatch: End  # batches of 60
    labels: End
    routes: list[Route]


def steps_in_all() -> int:
    """How often part two calls its progress."""
    return 2 * IDENTITY_STEPS + LABELS_STEPS


def part_two(
    network: Network, images: Array, labels: NDArray[np.intp], *, learning_rate: float, seed: int,
    backend: str | None = None, progress: Progress = lambda steps: None,
) -> PartTwo:
    """All of the above, on the activations of a trained network without batch normalization."""
    raw = Raw.of(network, images)
    with one_blas_thread():
        return PartTwo(
            raw,
            End.of(raw, _layer(raw, backend), "none", 0, 0),
            to_itself(raw, batch=len(raw.h), seed=seed, backend=backend, progress=progress),
            to_itself(raw, batch=BATCH, seed=seed, backend=backend, progress=progress),
            to_labels(raw, labels, learning_rate=learning_rate, seed=seed, backend=backend, progress=progress),
            cost(raw, most_steps=MOST_STEPS, backend=backend),
        )
