"""Who is judged: fastbn's backends, once for each instruction set, and the peers; each as a function of a batch."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastbn
from fastbn._dispatch import INSTRUCTION_SETS, instruction_set
from fastbn.accuracy.cases import EPS

Arrays = dict[str, NDArray[Any]]
BatchNorm = Callable[[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]], Arrays]  # of x, grad_y, gamma, beta

PEERS = {"torch": "torch", "jax": "jax", "jax-fast": "jax", "numpy": "numpy", "scikit-learn": "sklearn"}
MANY_THREADS = 64


def ours() -> tuple[str, ...]:
    """Labels of fastbn's backends that run here."""
    labels: list[str] = []
    for backend in fastbn.available_backends():
        if backend == "cython":
            found = instruction_set()
            usable = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(found["found"]) + 1]
            labels += [f"fastbn-cython-{name}" for name in reversed(usable) if name in found["compiled"]]
        else:
            labels.append(f"fastbn-{backend}")
    return tuple(labels)


def peers() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Labels of the peers that are installed, and of those that are missing."""
    here = {label: importlib.util.find_spec(package) is not None for label, package in PEERS.items()}
    return tuple(label for label in here if here[label]), tuple(label for label in here if not here[label])


def build(label: str) -> BatchNorm:
    """The function of a label. An instruction set is chosen when the kernels are loaded: once for each process."""
    if label.startswith("fastbn-"):
        _, backend, *isa = label.split("-")
        os.environ["FASTBN_ISA"] = "".join(isa)
        os.environ["NUMBA_NUM_THREADS"] = str(MANY_THREADS)
        return fastbn_side(backend)
    if label in ("jax", "jax-fast"):
        return _jax(fast=label == "jax-fast")
    return _torch() if label == "torch" else {"numpy": _numpy, "scikit-learn": _scikit_learn}[label]


def fastbn_side(backend: str) -> BatchNorm:
    def batch_norm(x: NDArray[Any], grad_y: NDArray[Any], gamma: NDArray[Any], beta: NDArray[Any]) -> Arrays:
        y, saved = fastbn.batch_norm(x, gamma, beta, eps=EPS, backend=backend)
        grad_x, grad_gamma, grad_beta = fastbn.batch_norm_backward(grad_y, saved, backend=backend)
        return {"mean": saved.mean, "var": saved.var, "y": y,
                "grad_x": grad_x, "grad_gamma": grad_gamma, "grad_beta": grad_beta}

    return batch_norm


def _torch() -> BatchNorm:
    """What nn.BatchNorm calls; var as it stores it in running_var, with momentum 1 and its n / (n - 1) undone."""
    import torch

    def batch_norm(*arrays: NDArray[Any]) -> Arrays:
        x, grad_y, gamma, beta = (torch.from_numpy(array) for array in arrays)
        mean, var = torch.zeros_like(gamma), torch.zeros_like(gamma)
        y, saved_mean, invstd = torch.native_batch_norm(x, gamma, beta, mean, var, True, 1.0, EPS)
        grads = torch.ops.aten.native_batch_norm_backward(
            grad_y, x, gamma, mean, var, saved_mean, invstd, True, EPS, [True, True, True]
        )
        grad_x, grad_gamma, grad_beta = (grad.numpy() for grad in grads)
        return {"mean": mean.numpy(), "var": var.double().numpy() * (len(x) - 1) / len(x), "y": y.numpy(),
                "grad_x": grad_x, "grad_gamma": grad_gamma, "grad_beta": grad_beta}

    return batch_norm


def _jax(fast: bool) -> BatchNorm:
    """Two-pass variance, or E[x^2] - E[x]^2 (not below 0), which is flax's default; gradients by jax.vjp."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)  # else float64 data would silently be computed as float32

    def statistics(x: Any) -> Any:
        mean = x.mean(0)
        var = jnp.maximum(0, (x * x).mean(0) - mean * mean) if fast else ((x - mean) ** 2).mean(0)
        return mean, var

    def forward(x: Any, gamma: Any, beta: Any) -> Any:
        mean, var = statistics(x)
        return (x - mean) * (jax.lax.rsqrt(var + EPS) * gamma) + beta

    def everything(x: Any, grad_y: Any, gamma: Any, beta: Any) -> Any:
        y, pull = jax.vjp(forward, x, gamma, beta)
        return *statistics(x), y, *pull(grad_y)

    compiled = jax.jit(everything)

    def batch_norm(*arrays: NDArray[Any]) -> Arrays:
        names = ("mean", "var", "y", "grad_x", "grad_gamma", "grad_beta")
        results = compiled(*(jnp.asarray(array) for array in arrays))
        return {name: np.asarray(result) for name, result in zip(names, results, strict=True)}

    return batch_norm


def _numpy(x: NDArray[Any], grad_y: NDArray[Any], gamma: NDArray[Any], beta: NDArray[Any]) -> Arrays:
    """The formulas as one writes them down, in the dtype of x throughout."""
    mean, var = x.mean(0), x.var(0)
    invstd = 1 / np.sqrt(var + x.dtype.type(EPS))
    x_hat = (x - mean) * invstd
    grad_gamma, grad_beta = (grad_y * x_hat).sum(0), grad_y.sum(0)
    grad_x = gamma * invstd * (grad_y - grad_beta / len(x) - x_hat * (grad_gamma / len(x)))
    return {"mean": mean, "var": var, "y": x_hat * gamma + beta,
            "grad_x": grad_x, "grad_gamma": grad_gamma, "grad_beta": grad_beta}


def _scikit_learn(x: NDArray[Any], grad_y: NDArray[Any], gamma: NDArray[Any], beta: NDArray[Any]) -> Arrays:
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x)
    return {"mean": scaler.mean_, "var": scaler.var_}


def set_threads(label: str, n: int) -> None:
    if label == "torch":
        import torch

        torch.set_num_threads(n)
    else:
        fastbn.set_num_threads(n)


def version(label: str) -> tuple[str, str]:
    package = "numba" if label == "fastbn-numba" else PEERS.get(label, "fastbn")
    return {"sklearn": "scikit-learn"}.get(package, package), importlib.import_module(package).__version__
