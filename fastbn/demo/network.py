"""The network of the demo, in plain NumPy around fastbn: linear layers, sigmoids, softmax cross-entropy, SGD."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from threadpoolctl import threadpool_limits  # a requirement of scikit-learn

import fastbn

Array = NDArray[Any]
Parameter = tuple[Array, Array]  # a learned array, which SGD changes in place, and its gradient


def one_blas_thread() -> Any:
    """Within it, NumPy's matrix products run on one thread.

    They are small: two threads gain little, and on a busy machine, where they wait for each other, a step of 1 ms took
    60 ms. The results also no longer depend on the number of cores.
    """
    return threadpool_limits(1, user_api="blas")


class Linear:
    """``y = x @ weight + bias``, from small random Gaussian weights and a bias of zero (or none)."""

    def __init__(
        self, n_in: int, n_out: int, rng: np.random.Generator, std: float, dtype: DTypeLike, bias: bool = True
    ) -> None:
        self.weight: Array = (std * rng.standard_normal((n_in, n_out))).astype(dtype)
        self.bias: Array | None = np.zeros(n_out, dtype) if bias else None
        self.grad_weight: Array = np.zeros_like(self.weight)
        self.grad_bias: Array = np.zeros(n_out, dtype)
        self._x: Array = np.empty((0, n_in), dtype)

    def __call__(self, x: Array) -> Array:
        self._x = x
        y: Array = x @ self.weight
        if self.bias is not None:
            y += self.bias
        return y

    def backward(self, grad_y: Array) -> None:
        """Set the gradients of the weights; ``grad_y @ weight.T`` is left to who needs it."""
        self.grad_weight = self._x.T @ grad_y
        self.grad_bias = grad_y.sum(axis=0)

    def parameters(self) -> list[Parameter]:
        bias = [] if self.bias is None else [(self.bias, self.grad_bias)]
        return [(self.weight, self.grad_weight), *bias]


def sigmoid(z: Array) -> Array:
    """``1 / (1 + exp(-z))``, in a form that cannot overflow."""
    y: Array = 0.5 * (1 + np.tanh(0.5 * z))
    return y


def softmax_cross_entropy(logits: Array, labels: NDArray[np.intp]) -> tuple[float, Array]:
    """The mean loss over the rows, and its gradient with respect to the logits."""
    rows = np.arange(len(labels))
    shifted = logits - logits.max(axis=1, keepdims=True)
    total = np.exp(shifted).sum(axis=1, keepdims=True)
    loss = float((np.log(total[:, 0]) - shifted[rows, labels]).mean())
    grad: Array = np.exp(shifted) / total
    grad[rows, labels] -= 1
    return loss, grad / len(labels)


def learned(norm: fastbn.BatchNorm) -> list[Parameter]:
    """Gamma and beta of a layer, and their gradients."""
    pairs = ((norm.gamma, norm.grad_gamma), (norm.beta, norm.grad_beta))
    return [(array, grad) for array, grad in pairs if array is not None and grad is not None]


def sgd(parameters: Sequence[Parameter], learning_rate: float) -> None:
    """One step of gradient descent, in place."""
    for array, grad in parameters:
        array -= learning_rate * grad


class Network:
    """Sigmoid layers under a softmax; `normalize` puts one fastbn layer before each sigmoid.

    The linear layers under a batch normalization have no bias: it would be subtracted with the mean, and beta takes its
    place (Ioffe and Szegedy 2015, section 3.2).

    Attributes
    ----------
    hidden : list of (Linear, BatchNorm or None)
    sigmoid_inputs : list of ndarray, shape (rows, units)
        What went into the sigmoids of each hidden layer in the last forward.
    norm_seconds : float
        Time spent in fastbn so far.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        normalize: bool,
        seed: int,
        std: float = 0.1,
        dtype: DTypeLike = np.float32,
        backend: str | None = None,
    ) -> None:
        rng = np.random.default_rng(seed)  # its own, so that two networks of one seed start from the same weights
        self.hidden: list[tuple[Linear, fastbn.BatchNorm | None]] = []
        for n_in, n_out in pairwise(sizes[:-1]):
            linear = Linear(n_in, n_out, rng, std, dtype, bias=not normalize)
            # One thread: a minibatch of 60 x 100 is 24 kB, too little to share.
            norm = fastbn.BatchNorm(n_out, dtype=dtype, backend=backend, num_threads=1) if normalize else None
            self.hidden.append((linear, norm))
        self.last = Linear(sizes[-2], sizes[-1], rng, std, dtype)
        self.sigmoid_inputs: list[Array] = []
        self.norm_seconds = 0.0
        self._outputs: list[Array] = []

    def __call__(self, x: Array) -> Array:
        """The logits."""
        self.sigmoid_inputs, self._outputs = [], []
        for linear, norm in self.hidden:
            z = linear(x)
            if norm is not None:
                z = self._timed(norm, z)
            x = sigmoid(z)
            self.sigmoid_inputs.append(z)
            self._outputs.append(x)
        return self.last(x)

    def backward(self, grad_logits: Array) -> None:
        """Set the gradient of every parameter."""
        above, grad = self.last, grad_logits
        above.backward(grad)
        for (linear, norm), y in zip(reversed(self.hidden), reversed(self._outputs), strict=True):
            grad = (grad @ above.weight.T) * y * (1 - y)
            if norm is not None:
                grad = self._timed(norm.backward, grad)
            linear.backward(grad)
            above = linear

    def parameters(self) -> list[Parameter]:
        pairs = self.last.parameters()
        for linear, norm in self.hidden:
            pairs += linear.parameters()
            if norm is not None:
                pairs += learned(norm)
        return pairs

    def step(self, x: Array, labels: NDArray[np.intp], learning_rate: float) -> float:
        """One step of SGD on a minibatch; returns its loss."""
        loss, grad = softmax_cross_entropy(self(x), labels)
        self.backward(grad)
        sgd(self.parameters(), learning_rate)
        return loss

    def accuracy(self, x: Array, labels: NDArray[np.intp]) -> float:
        """The share of the rows that are classified right, with the running statistics."""
        self._train(False)
        right = self(x).argmax(axis=1) == labels
        self._train(True)
        return float(right.mean())

    def _train(self, mode: bool) -> None:
        for _, norm in self.hidden:
            if norm is not None:
                norm.train(mode)

    def _timed(self, call: Callable[[Array], Array], array: Array) -> Array:
        start = perf_counter()
        result = call(array)
        self.norm_seconds += perf_counter() - start
        return result
