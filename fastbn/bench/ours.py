"""fastbn's side: its public functions, called as a user calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

import fastbn
from fastbn.bench.data import Data


class Fastbn:
    """One backend of fastbn."""

    def __init__(self, backend: str, threads: int) -> None:
        fastbn.set_num_threads(threads)
        fastbn.warmup(backend)
        self.backend = backend

    def versions(self) -> dict[str, str]:
        versions = {"fastbn": fastbn.__version__}
        if self.backend == "numba":
            import numba

            versions["numba"] = numba.__version__
        return versions

    def prepare(self, op: str, d: Data) -> Callable[[], Any]:
        """The call that is timed."""
        backend = self.backend
        if op == "moments":
            return lambda: fastbn.moments(d.x, backend=backend)
        if op == "relu":
            return lambda: fastbn.batch_norm(d.x, d.gamma, d.beta, activation="relu", backend=backend)
        if op == "forward":
            return lambda: fastbn.batch_norm(d.x, d.gamma, d.beta, backend=backend)
        if op in ("forward-out", "layouts", "mixing"):
            return lambda: fastbn.batch_norm(d.x, d.gamma, d.beta, out=d.out, backend=backend)
        if op == "inference":
            return lambda: fastbn.batch_norm_inference(d.x, d.mean, d.var, d.gamma, d.beta, backend=backend)
        if op == "inference-out":
            return lambda: fastbn.batch_norm_inference(d.x, d.mean, d.var, d.gamma, d.beta, out=d.out, backend=backend)
        if op == "layer":
            return self._layer(d)
        saved = fastbn.batch_norm(d.x, d.gamma, d.beta, backend=backend)[1]
        if op == "backward":
            return lambda: fastbn.batch_norm_backward(d.grad_y, saved, backend=backend)
        return lambda: fastbn.batch_norm_backward(d.grad_y, saved, out=d.out, backend=backend)

    def _layer(self, d: Data) -> Callable[[], Any]:
        layer = fastbn.BatchNorm(d.channels, dtype=d.dtype, backend=self.backend)
        layer.gamma, layer.beta = d.gamma, d.beta

        def forward_and_backward() -> Any:
            y = layer(d.x)
            grad_x = layer.backward(d.grad_y)
            return y, grad_x, layer.grad_gamma, layer.grad_beta

        return forward_and_backward

    def arrays(self, op: str, result: Any) -> list[NDArray[Any]]:
        """What a call returned, as arrays that the sides have in common."""
        if op == "moments":
            return [result.mean, result.var()]
        if op in ("inference", "inference-out"):
            return [result]
        return list(result) if op in ("layer", "backward", "backward-out") else [result[0]]
