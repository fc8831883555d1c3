"""The exact answers: the reference's kernels on longdouble data, whatever the layout, and the sizes of their terms."""

import numpy as np

from fastbn.kernels import reference

WIDE = np.longdouble
HAS_WIDE = np.finfo(WIDE).eps < np.finfo(np.float64).eps / 1000


def wide(values):
    return None if values is None else np.asarray(values).astype(WIDE)


def by_channel(x, axis):
    """x as longdouble of shape (1, channels, count)."""
    moved = np.moveaxis(x, axis, 0)
    return moved.reshape(1, moved.shape[0], -1).astype(WIDE)


class Exact:
    """Batch norm of x, by the statistics of the batch or by those given, forward and backward."""

    def __init__(self, x, gamma=None, beta=None, *, axis=1, eps=1e-5, mean=None, var=None):
        self.axis, self.shape = axis, x.shape
        self.x = by_channel(x, axis)
        channels = self.x.shape[1]
        self.training = mean is None
        self.stats, self.coefs = np.empty((4, channels), WIDE), np.empty((3, channels), WIDE)
        y = np.empty_like(self.x)
        rest = wide(gamma), wide(beta), eps, False, y, self.stats, self.coefs, 1
        if self.training:
            reference.batch_norm(self.x, *rest)
        else:
            reference.batch_norm_inference(self.x, wide(mean), wide(var), *rest)
        self.mean, self.var, self.invstd, _ = self.stats
        self.std = np.sqrt(self.var)
        self.y = self.restored(y)
        offset = 0 if beta is None else wide(beta)[:, None]
        self.y_terms = self.restored(np.maximum(1, np.abs(y - offset) + np.abs(offset)))

    def restored(self, view):
        """The inverse of by_channel."""
        moved = np.moveaxis(np.empty(self.shape, np.int8), self.axis, 0).shape
        return np.moveaxis(view.reshape(moved), 0, self.axis)

    def backward(self, grad_y, on=None):
        """grad_x, grad_gamma, grad_beta and their sizes; ``on`` is where a fused ReLU let the gradient through."""
        dy = by_channel(grad_y if on is None else np.where(on, grad_y, 0), self.axis)
        grad_x = np.empty_like(dy)
        grads = np.empty((2, dy.shape[1]), WIDE)
        reference.batch_norm_backward(dy, self.x, self.stats, self.coefs, False, self.training, grad_x, grads, 1)
        return Gradients(self, dy, grad_x, *grads)


class Gradients:
    """The exact gradients, and per channel the largest value or the sum of the terms' sizes."""

    def __init__(self, exact, dy, grad_x, grad_gamma, grad_beta):
        n = dy.shape[2]
        x_hat = (exact.x - exact.mean[:, None]) * exact.invstd[:, None]
        parts = np.abs(dy) + np.abs(grad_beta / n)[:, None] + np.abs(x_hat * (grad_gamma / n)[:, None])
        column = [-1 if i == exact.axis % len(exact.shape) else 1 for i in range(len(exact.shape))]
        self.grad_x, self.grad_gamma, self.grad_beta = exact.restored(grad_x), grad_gamma, grad_beta
        self.grad_x_largest = np.abs(grad_x).max(axis=(0, 2)).reshape(column)
        self.grad_x_terms = (np.abs(exact.coefs[1]) * parts.max(axis=(0, 2))).reshape(column)
        self.grad_gamma_terms = np.abs(dy * x_hat).sum(axis=(0, 2))
        self.grad_beta_terms = np.abs(dy).sum(axis=(0, 2))
