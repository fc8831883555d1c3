"""Batch normalization as functions. Each reads top-down as the algorithm; the loops over the data are in kernels/."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastbn import _dispatch, _layout


class Saved:
    """What `batch_norm` hands to `batch_norm_backward`.

    The input itself is kept, not a copy: do not write to it before the backward.

    Attributes
    ----------
    mean, var, invstd : ndarray of float64, shape (channels,)
        The batch mean, the biased batch variance, and ``1 / sqrt(var + eps)``.
    count : int
        Values per channel.
    """

    __slots__ = ("axis", "coefs", "count", "eps", "overwritten", "relu", "stats", "training", "x")

    def __init__(
        self, x: Any, axis: int, count: int, eps: float, relu: bool, training: bool, overwritten: bool,
        stats: NDArray[np.float64], coefs: NDArray[Any],
    ) -> None:
        self.x = x
        self.axis = axis
        self.count = count
        self.eps = eps
        self.relu = relu
        self.training = training
        self.overwritten = overwritten
        self.stats = stats
        self.coefs = coefs

    @property
    def mean(self) -> NDArray[np.float64]:
        mean: NDArray[np.float64] = self.stats[0]
        return mean

    @property
    def var(self) -> NDArray[np.float64]:
        var: NDArray[np.float64] = self.stats[1]
        return var

    @property
    def invstd(self) -> NDArray[np.float64]:
        invstd: NDArray[np.float64] = self.stats[2]
        return invstd

    def __repr__(self) -> str:
        return f"Saved(count={self.count}, channels={self.stats.shape[1]}, dtype={self.coefs.dtype})"


def batch_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    activation: str | None = None,
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> tuple[NDArray[Any], Saved]:
    """Normalize each channel by the statistics of the batch, then scale and shift it.

    ``y = gamma * (x - mean) / sqrt(var + eps) + beta``, with the mean and the biased variance taken over every axis but
    the channel axis (Ioffe and Szegedy 2015, algorithm 1, https://arxiv.org/abs/1502.03167).

    Parameters
    ----------
    x : array_like, shape (batch, channels) or (batch, channels, ...)
        float32 or float64; integers and bool are computed as float64. Any memory order; what takes a copy is in
        docs/memory.md.
    gamma, beta : array_like, shape (channels,), optional
        Scale and shift; 1 and 0 by default.
    axis : int
        The channel axis.
    eps : float
        Added to the variance, at least 0.
    activation : {None, "relu"}
        Applied to y in the same pass.
    out : ndarray, optional
        Where y goes: the shape and dtype of x. It may be x itself; a backward is then no longer possible.
    num_threads : int, optional
        At most so many threads, for this call. The bits of the result do not depend on it.
    backend : {None, "auto", "cython", "numba", "numpy"}
        None and "auto" take the best that is available.

    Returns
    -------
    y : ndarray
        The shape, dtype and memory order of x.
    saved : Saved
        The batch statistics, and what `batch_norm_backward` needs.

    Raises
    ------
    TypeError
        If x, gamma or beta is not real, x is float16 or longdouble or masked, or out has another dtype.
    ValueError
        If there is one value per channel, a shape does not fit, eps is negative or not finite, out is read-only or
        partly overlaps an input, or a name is unknown.

    Examples
    --------
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> y, saved = fastbn.batch_norm(x, eps=0)
    >>> y
    array([[-1., -1.],
           [ 1.,  1.]])
    >>> saved.mean, saved.var
    (array([ 2., 20.]), array([  1., 100.]))
    """
    kernels = _dispatch.kernels(backend)
    threads = _dispatch.thread_count(num_threads)
    whole = getattr(kernels, "whole_batch_norm", None)
    done = whole and whole(x, gamma, beta, axis, eps, activation, out, threads)
    if done:
        y, count, in_place, stats, coefs = done
        return y, Saved(x, axis, count, eps, activation is not None, True, in_place, stats, coefs)

    x = _layout.data(x)
    layout = _layout.layout_of(x, axis)
    gamma = _layout.per_channel(gamma, "gamma", layout.channels, x.dtype)
    beta = _layout.per_channel(beta, "beta", layout.channels, x.dtype)
    eps = _layout.epsilon(eps)
    relu = _layout.uses_relu(activation)
    y, y_view = _layout.output(out, layout, x)
    gamma, beta = _layout.apart(gamma, y), _layout.apart(beta, y)
    if layout.n_values == 1 and layout.channels:
        raise ValueError(
            f"x must have more than one value per channel in training, got shape {x.shape} with axis={axis}; "
            "use batch_norm_inference, or a larger batch"
        )

    stats = np.full((4, layout.channels), np.nan)
    coefs = np.full((3, layout.channels), np.nan, x.dtype)
    if x.size:
        x_view = _layout.canonical(x, layout, y_view)
        kernels.batch_norm(x_view, gamma, beta, eps, relu, y_view, stats, coefs, threads)
        _layout.finish(y, y_view, layout)
    overwritten = out is not None and _layout.overlap(y, x)
    return y, Saved(x, axis, layout.n_values, eps, relu, True, overwritten, stats, coefs)


def batch_norm_inference(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    activation: str | None = None,
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> NDArray[Any]:
    """Normalize each channel by given statistics, then scale and shift it.

    ``y = gamma * (x - mean) / sqrt(var + eps) + beta`` (Ioffe and Szegedy 2015, algorithm 2).

    Parameters
    ----------
    x : array_like, shape (batch, channels) or (batch, channels, ...)
        As in `batch_norm`; one value per channel is enough.
    mean, var : array_like, shape (channels,)
        For instance the running statistics of a layer.
    gamma, beta, axis, eps, activation, out, num_threads, backend
        As in `batch_norm`.

    Returns
    -------
    y : ndarray
        The shape, dtype and memory order of x.

    Raises
    ------
    TypeError, ValueError
        As in `batch_norm`; and if a variance is negative.
    """
    return normalize(x, mean, var, gamma, beta, axis, eps, activation, out, num_threads, backend, keep=False)[0]


def normalize(
    x: ArrayLike, mean: ArrayLike, var: ArrayLike, gamma: ArrayLike | None, beta: ArrayLike | None,
    axis: int, eps: float, activation: str | None, out: NDArray[Any] | None,
    num_threads: int | None, backend: str | None, keep: bool = True,
) -> tuple[NDArray[Any], Saved]:
    """batch_norm_inference, and, if it is to be kept, what a backward through constant statistics needs (for the layer
    in eval mode)."""
    kernels = _dispatch.kernels(backend)
    threads = _dispatch.thread_count(num_threads)
    whole = getattr(kernels, "whole_batch_norm_inference", None)
    done = whole and whole(x, mean, var, gamma, beta, axis, eps, activation, out, keep, threads)
    if done:
        y, count, in_place, stats, coefs = done
        return y, Saved(x, axis, count, eps, activation is not None, False, in_place, stats, coefs)

    x = _layout.data(x)
    layout = _layout.layout_of(x, axis)
    mean = _layout.statistics(mean, "mean", layout.channels)
    var = _layout.statistics(var, "var", layout.channels)
    gamma = _layout.per_channel(gamma, "gamma", layout.channels, x.dtype)
    beta = _layout.per_channel(beta, "beta", layout.channels, x.dtype)
    eps = _layout.epsilon(eps)
    relu = _layout.uses_relu(activation)
    if (var < 0).any():
        raise ValueError(f"var must be >= 0, got {var[var < 0][0]}")
    y, y_view = _layout.output(out, layout, x)
    mean, var, gamma, beta = (_layout.apart(values, y) for values in (mean, var, gamma, beta))

    stats = np.full((4, layout.channels), np.nan)
    coefs = np.full((3, layout.channels), np.nan, x.dtype)
    if x.size:
        x_view = _layout.canonical(x, layout, y_view)
        kernels.batch_norm_inference(x_view, mean, var, gamma, beta, eps, relu, y_view, stats, coefs, threads)
        _layout.finish(y, y_view, layout)
    overwritten = out is not None and _layout.overlap(y, x)
    return y, Saved(x, axis, layout.n_values, eps, relu, False, overwritten, stats, coefs)


def batch_norm_backward(
    grad_y: ArrayLike,
    saved: Saved,
    *,
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Gradients of a loss through `batch_norm` (and its fused activation).

    With ``x_hat = (x - mean) * invstd`` and means over the batch (Ioffe and Szegedy 2015, section 3)::

        grad_x     = gamma * invstd * (grad_y - mean(grad_y) - x_hat * mean(grad_y * x_hat))
        grad_gamma = sum(grad_y * x_hat)
        grad_beta  = sum(grad_y)

    Parameters
    ----------
    grad_y : array_like, the shape of y
        Gradient of the loss with respect to y, in any memory order. Computed in the dtype of x.
    saved : Saved
        From `batch_norm`.
    out : ndarray, optional
        Where grad_x goes; it may be grad_y itself.
    num_threads, backend
        As in `batch_norm`.

    Returns
    -------
    grad_x : ndarray, the shape and dtype of x
    grad_gamma, grad_beta : ndarray, shape (channels,), the dtype of x

    Raises
    ------
    TypeError, ValueError
        If grad_y or out does not fit, see `batch_norm`.
    RuntimeError
        If the forward ran in place, so that its input is gone.
    """
    if not isinstance(saved, Saved):
        raise TypeError(f"saved must be what batch_norm returned beside y, got {type(saved).__name__}")
    if saved.overwritten:
        raise RuntimeError("the forward ran in place (out=x), so its input, which the backward needs, is gone; "
                           "call batch_norm with another out, or none")
    kernels = _dispatch.kernels(backend)
    threads = _dispatch.thread_count(num_threads)
    x = saved.x
    whole = getattr(kernels, "whole_batch_norm_backward", None)
    done = whole and whole(
        grad_y, x, saved.axis, saved.stats, saved.coefs, saved.relu, saved.training, out, threads
    )
    if done:
        grad_x, grads = done
        return grad_x, grads[0], grads[1]

    grad_y = _layout.data(grad_y, "grad_y")
    if grad_y.shape != x.shape:
        raise ValueError(f"grad_y must have the shape of y, {x.shape}, got {grad_y.shape}")
    layout = _layout.layout_of(x, saved.axis)
    grad_x, grad_x_view = _layout.output(out, layout, grad_y, others=(x,))

    grads = np.zeros((2, layout.channels), x.dtype)
    if x.size:
        grad_y_view = _layout.canonical(grad_y, layout, grad_x_view)
        x_view = _layout.canonical(x, layout)
        two = saved.training and layout.n_values == 2
        of_two = _grad_x_of_two(kernels, grad_y_view, x_view, saved) if two else None
        kernels.batch_norm_backward(
            grad_y_view, x_view, saved.stats, saved.coefs, saved.relu, saved.training, grad_x_view, grads, threads
        )
        if of_two is not None:
            grad_x_view[...] = of_two
        _layout.finish(grad_x, grad_x_view, layout)
    return grad_x, grads[0], grads[1]


def _grad_x_of_two(kernels: ModuleType, dy: NDArray[Any], x: NDArray[Any], saved: Saved) -> NDArray[Any]:
    """grad_x of two values a channel in training, whose terms cancel to so little that not even float64 holds it.

    With g and -g for dy less its mean, h and -h for x_hat: ``g - h * (g * h)``, where ``1 - h**2 = eps / (var + eps)``.
    """
    if saved.relu:
        y = np.empty(x.shape, x.dtype)
        kernels.affine(x, saved.coefs, True, y, 1)  # the forward's own bits say where it was off
        dy = np.where(y == 0, 0, dy)
    with np.errstate(all="ignore"):
        factor = saved.coefs[1] * (saved.eps * saved.invstd * saved.invstd)
        half = dy.astype(np.float64) / 2
        grad_x: NDArray[Any] = ((half - half[::-1, :, ::-1]) * factor[:, None]).astype(x.dtype)
    return grad_x
