"""PyTorch's side: the functions that its own layers call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray

from fastbn.bench.data import Data

MOMENTUM, EPS = 0.1, 1e-5


class Torch:
    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)

    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__}

    def prepare(self, op: str, d: Data) -> Callable[[], Any] | None:
        """The call that is timed; None for what PyTorch does not offer."""
        if op in ("moments", "layouts", "backward-out"):
            return None
        x, gamma, beta = (torch.from_numpy(a) for a in (d.x, d.gamma, d.beta))
        training = (x, gamma, beta, None, None, True, MOMENTUM, EPS)
        if op == "forward":
            return lambda: torch.native_batch_norm(*training)
        if op == "relu":
            return lambda: (torch.relu(torch.native_batch_norm(*training)[0]),)
        if op in ("forward-out", "mixing"):
            out = _outputs(d)
            return lambda: torch.native_batch_norm(*training, out=out)
        if op == "backward":
            return _backward(training, torch.from_numpy(d.grad_y))
        if op == "layer":
            return _layer(d, x)
        mean, var = (torch.from_numpy(a.astype(d.dtype)) for a in (d.mean, d.var))
        if op == "inference":
            return lambda: (torch.nn.functional.batch_norm(x, mean, var, gamma, beta, False, MOMENTUM, EPS),)
        out = _outputs(d, saved=0)
        return lambda: torch.native_batch_norm(x, gamma, beta, mean, var, False, MOMENTUM, EPS, out=out)

    def arrays(self, op: str, result: Any) -> list[NDArray[Any]]:
        wanted = result if op in ("layer", "backward") else result[:1]
        return [tensor.detach().numpy() for tensor in wanted]


def _outputs(d: Data, saved: int | None = None) -> Any:
    """Where y, the mean and the invstd go; in inference the last two are empty."""
    y = torch.from_numpy(d.out)
    size = d.channels if saved is None else saved
    return y, torch.zeros(size, dtype=y.dtype), torch.zeros(size, dtype=y.dtype)


def _backward(training: tuple[Any, ...], grad_y: Any) -> Callable[[], Any]:
    x, gamma = training[:2]
    _, mean, invstd = torch.native_batch_norm(*training)
    wanted = [True, True, True]
    backward = torch.ops.aten.native_batch_norm_backward
    return lambda: backward(grad_y, x, gamma, None, None, mean, invstd, True, EPS, wanted)


def _layer(d: Data, x: Any) -> Callable[[], Any]:
    """nn.BatchNorm with autograd; autograd.grad hands the gradients out, where .backward() would add them up."""
    modules = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d, 5: torch.nn.BatchNorm3d}
    layer = modules[x.ndim](d.channels, dtype=x.dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(d.gamma))
        layer.bias.copy_(torch.from_numpy(d.beta))
    x.requires_grad_()
    inputs, grad_y = (x, layer.weight, layer.bias), torch.from_numpy(d.grad_y)

    def forward_and_backward() -> Any:
        y = layer(x)
        return y, *torch.autograd.grad(y, inputs, grad_y)

    return forward_and_backward
