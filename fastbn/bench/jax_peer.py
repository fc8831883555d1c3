"""JAX's side: two-pass batch normalization, jitted."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from fastbn.bench.data import Data

EPS = 1e-5


class Jax:
    """JAX returns fresh arrays only."""

    def __init__(self, threads: int) -> None:
        os.environ["NPROC"] = str(threads)  # from which XLA takes the size of its thread pool, when that is first used
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_enable_x64", True)  # else float64 data would silently be computed as float32

    def versions(self) -> dict[str, str]:
        return {"jax": jax.__version__}

    def prepare(self, op: str, d: Data) -> Callable[[], Any] | None:
        """The call that is timed; None for what JAX does not offer."""
        if op not in ("forward", "relu", "backward", "layer", "inference", "moments"):
            return None
        x, gamma, beta = (jnp.asarray(a) for a in (d.x, d.gamma, d.beta))
        if op in ("backward", "layer"):
            arguments: tuple[Any, ...] = (x, gamma, beta, jnp.asarray(d.grad_y))
            if op == "backward":
                arguments = (*arguments, *jax.jit(_statistics)(x))
        elif op == "inference":
            arguments = (x, gamma, beta, *(jnp.asarray(a.astype(d.dtype)) for a in (d.mean, d.var)))
        else:
            arguments = (x,) if op == "moments" else (x, gamma, beta)
        compiled = jax.jit(_FUNCTIONS[op])
        return lambda: jax.block_until_ready(compiled(*arguments))

    def arrays(self, op: str, result: Any) -> list[NDArray[Any]]:
        return [np.asarray(array) for array in result]


def _batch_axes(x: Any) -> tuple[int, ...]:
    return (0, *range(2, x.ndim))


def _per_channel(values: Any, x: Any) -> Any:
    return values.reshape(-1, *[1] * (x.ndim - 2))


def _statistics(x: Any) -> tuple[Any, Any]:
    mean = x.mean(_batch_axes(x))
    return mean, ((x - _per_channel(mean, x)) ** 2).mean(_batch_axes(x))


def _normalize(x: Any, gamma: Any, beta: Any, mean: Any, var: Any) -> Any:
    scale = gamma * jax.lax.rsqrt(var + EPS)
    return (x - _per_channel(mean, x)) * _per_channel(scale, x) + _per_channel(beta, x)


def _forward(x: Any, gamma: Any, beta: Any) -> Any:
    return _normalize(x, gamma, beta, *_statistics(x))


def _backward(x: Any, gamma: Any, beta: Any, grad_y: Any, mean: Any, var: Any) -> Any:
    axes, invstd = _batch_axes(x), jax.lax.rsqrt(var + EPS)
    x_hat = (x - _per_channel(mean, x)) * _per_channel(invstd, x)
    grad_gamma, grad_beta = (grad_y * x_hat).sum(axes), grad_y.sum(axes)
    n = x.size // x.shape[1]
    centred = grad_y - _per_channel(grad_beta / n, x) - x_hat * _per_channel(grad_gamma / n, x)
    return centred * _per_channel(gamma * invstd, x), grad_gamma, grad_beta


def _layer(x: Any, gamma: Any, beta: Any, grad_y: Any) -> Any:
    y, pull = jax.vjp(_forward, x, gamma, beta)
    return y, *pull(grad_y)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "moments": _statistics,
    "forward": lambda *arguments: (_forward(*arguments),),
    "relu": lambda *arguments: (jnp.maximum(_forward(*arguments), 0),),
    "inference": lambda *arguments: (_normalize(*arguments),),
    "backward": _backward,
    "layer": _layer,
}
