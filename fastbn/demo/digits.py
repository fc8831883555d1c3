"""Part one: the same network on the same digits, with batch normalization before each sigmoid and without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from fastbn.demo.network import Array, Network, one_blas_thread

TRAIN, TEST, BATCH = 1200, 597, 60  # 20 steps an epoch
SIZES = (64, 100, 100, 100, 10)
STD = 0.1  # of the initial weights
LEARNING_RATE = 1.0  # the best of the sweep for the network *without* batch normalization, see docs/demo.md
SWEEP_RATES = (0.1, 0.3, 1.0, 3.0, 10.0)
SWEEP_STDS = (0.1, 0.3)
UNIT = 0  # of the last hidden layer, whose sigmoid input is drawn: the first, not a picked one
DRAWN_UNITS = 5  # of the last hidden layer, whose gamma and beta are drawn

Progress = Callable[[int], Any]  # told how many steps were done


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 1,797 images of 8 x 8 pixels, in [0, 1], shuffled once and split."""

    train_x: Array
    train_labels: NDArray[np.intp]
    test_x: Array
    test_labels: NDArray[np.intp]

    @classmethod
    def load(cls, seed: int) -> Digits:
        pixels, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(seed).permutation(len(labels))
        x, labels = (pixels[order] / 16).astype(np.float32), labels[order].astype(np.intp)
        return cls(x[:TRAIN], labels[:TRAIN], x[TRAIN:], labels[TRAIN:])


@dataclass
class Curve:
    """One network, and what was seen of it while it trained. All but the times has one entry for each of `steps`."""

    network: Network
    steps: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)  # on the test images
    percentiles: list[list[float]] = field(default_factory=list)  # 15th, 50th, 85th of one unit's sigmoid input
    gamma: list[list[float]] = field(default_factory=list)  # of the first DRAWN_UNITS units of the last hidden layer
    beta: list[list[float]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    norm_seconds: list[float] = field(default_factory=list)  # of each step, the part spent in fastbn

    def train(self, x: Array, labels: NDArray[np.intp], learning_rate: float) -> None:
        """One step, timed."""
        before, start = self.network.norm_seconds, perf_counter()
        self.network.step(x, labels, learning_rate)
        self.step_seconds.append(perf_counter() - start)
        self.norm_seconds.append(self.network.norm_seconds - before)

    def look(self, step: int, digits: Digits) -> None:
        """Note where the network stands, on the test images and with the running statistics."""
        self.steps.append(step)
        self.accuracy.append(self.network.accuracy(digits.test_x, digits.test_labels))
        unit = self.network.sigmoid_inputs[-1][:, UNIT]
        self.percentiles.append(np.percentile(unit, (15, 50, 85)).tolist())
        norm = self.network.hidden[-1][1]
        if norm is not None and norm.gamma is not None and norm.beta is not None:
            self.gamma.append(norm.gamma[:DRAWN_UNITS].tolist())
            self.beta.append(norm.beta[:DRAWN_UNITS].tolist())

    def steps_to(self, accuracy: float) -> int | None:
        """The first of `steps` at which the test accuracy is so high."""
        return next((step for step, seen in zip(self.steps, self.accuracy, strict=True) if seen >= accuracy), None)


def minibatches(epochs: int, seed: int) -> Iterator[NDArray[np.intp]]:
    """Row numbers of the minibatches; every epoch sees each training image once."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        yield from rng.permutation(TRAIN).reshape(-1, BATCH)


def steps_of(epochs: int) -> int:
    return epochs * (TRAIN // BATCH)


def compare(
    digits: Digits,
    *,
    epochs: int,
    seed: int,
    backend: str | None = None,
    learning_rate: float = LEARNING_RATE,
    std: float = STD,
    progress: Progress = lambda steps: None,
) -> tuple[Curve, Curve]:
    """Train both networks, on the same minibatches from the same initial weights; without and with normalization.

    They take turns step by step, so that a busy machine slows both alike.
    """
    curves = tuple(
        Curve(Network(SIZES, normalize=normalize, seed=seed, std=std, backend=backend)) for normalize in (False, True)
    )
    with one_blas_thread():
        for step, rows in enumerate(minibatches(epochs, seed)):
            for curve in curves:
                if step % steps_of(1) == 0:
                    curve.look(step, digits)
                curve.train(digits.train_x[rows], digits.train_labels[rows], learning_rate)
            progress(1)
        for curve in curves:
            curve.look(steps_of(epochs), digits)
    without, with_norm = curves
    return without, with_norm


def sweep(
    digits: Digits, *, epochs: int, seed: int, backend: str | None = None, progress: Progress = lambda steps: None
) -> list[dict[str, Any]]:
    """What either network reaches at each learning rate and size of the initial weights."""
    rows = []
    for std in SWEEP_STDS:
        for rate in SWEEP_RATES:
            curves = compare(
                digits, epochs=epochs, seed=seed, backend=backend, learning_rate=rate, std=std, progress=progress
            )
            row: dict[str, Any] = {"std": std, "learning_rate": rate}
            for name, curve in zip(("without", "with"), curves, strict=True):
                row[name] = {"accuracy": curve.accuracy[-1], "steps_to_95_percent": curve.steps_to(0.95)}
            rows.append(row)
    return rows
