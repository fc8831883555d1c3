"""The NumPy backend: the textbook, in float64, slow and plain. It judges the other backends.

Longdouble data (the tests' own) is computed in longdouble. ``num_threads`` is accepted and not used.
"""

import numpy as np

_quiet = np.errstate(all="ignore")  # non-finite data gives non-finite results and no warnings, as in the other backends


def _wide(x):
    return x.astype(np.result_type(x.dtype, np.float64))


def _sum(x):
    """Over all but the channels; one contiguous row each, which NumPy sums in pairs, with the smaller error."""
    return np.ascontiguousarray(x.transpose(1, 0, 2)).reshape(x.shape[1], -1).sum(axis=1)


def _column(per_channel):
    return np.asarray(per_channel)[:, None]


def _moments(x):
    x = _wide(x)
    first = x[0, :, 0]
    # About the first value rather than 0, so that a constant channel has deviations of exactly 0.
    n = x.shape[0] * x.shape[2]
    mean = first + _sum(x - _column(first)) / n
    deviation = x - _column(mean)
    lacking = _sum(deviation)  # 0, but for the rounding of the mean
    return mean, lacking / n, _sum(deviation**2) - lacking**2 / n


def _affine(x, center, scale, offset, relu):
    y = (_wide(x) - _column(center)) * _column(scale) + _column(offset)
    return np.where(y <= 0, 0, y) if relu else y


def _gate(grad_y, x, coefs, relu):
    dy = _wide(grad_y)
    return np.where(_affine(x, *coefs, relu=False) <= 0, 0, dy) if relu else dy


def _normalize(x, mean, rest, var, gamma, beta, eps, relu, out, stats, coefs):
    invstd = 1 / np.sqrt(var + eps)
    scale = invstd if gamma is None else gamma * invstd
    offset = (0 if beta is None else beta) - rest * scale
    stats[:3], stats[3] = (mean, var, invstd), rest
    coefs[0] = mean
    coefs[1:] = scale, offset - (mean - coefs[0]) * scale
    out[...] = _affine(x, mean, scale, offset, relu)


@_quiet
def moments(x, mean, rest, m2, num_threads):
    """mean + rest = sum(x) / n; m2 = sum((x - mean - rest)^2)."""
    mean[:], rest[:], m2[:] = _moments(x)


@_quiet
def affine(x, coefs, relu, out, num_threads):
    """out = (x - center) * scale + offset, then the activation."""
    out[...] = _affine(x, *coefs, relu)


@_quiet
def batch_norm(x, gamma, beta, eps, relu, out, stats, coefs, num_threads):
    """y = gamma * (x - mean) / sqrt(var + eps) + beta (Ioffe and Szegedy 2015, algorithm 1)."""
    mean, rest, m2 = _moments(x)
    var = m2 / (x.shape[0] * x.shape[2])
    _normalize(x, mean, rest, var, gamma, beta, eps, relu, out, stats, coefs)


@_quiet
def batch_norm_inference(x, mean, var, gamma, beta, eps, relu, out, stats, coefs, num_threads):
    """The same about given statistics."""
    _normalize(x, mean, 0, var, gamma, beta, eps, relu, out, stats, coefs)


@_quiet
def grad_moments(grad_y, x, mean, coefs, relu, sum_dy, sum_dy_xmu, num_threads):
    """sum(dy), sum(dy * (x - mean))."""
    dy = _gate(grad_y, x, coefs, relu)
    sum_dy[:], sum_dy_xmu[:] = _sum(dy), _sum(dy * (_wide(x) - _column(mean)))


@_quiet
def grad_affine(grad_y, x, coefs, linear, relu, out, num_threads):
    """out = factor * (((dy - shift) - rest) - (x - center) * slope)."""
    factor, slope, shift, rest = (_column(row) for row in linear)
    dy = _gate(grad_y, x, coefs, relu)
    out[...] = factor * (((dy - shift) - rest) - (_wide(x) - _column(coefs[0])) * slope)


@_quiet
def batch_norm_backward(grad_y, x, stats, coefs, relu, training, out, grads, num_threads):
    """x_hat = (x - mean) * invstd; grad_x = scale * (dy - mean(dy) - x_hat * mean(dy * x_hat)) in training."""
    mean, _, invstd, rest = stats
    xmu = (_wide(x) - _column(mean)) - _column(rest)
    dy = _gate(grad_y, x, coefs, relu)
    sum_dy, sum_dy_xmu = _sum(dy), _sum(dy * xmu)
    grads[:] = invstd * sum_dy_xmu, sum_dy
    grad_x = dy
    if training:
        n = x.shape[0] * x.shape[2]
        x_hat = xmu * _column(invstd)
        grad_x = dy - _column(sum_dy / n) - x_hat * _column(invstd * sum_dy_xmu / n)
    out[...] = _column(coefs[1].astype(grad_x.dtype)) * grad_x
