"""The promises beside the bound: constant columns, values that are not finite, merged moments, numbers of threads.

Each function returns what is wrong, in words or in figures; nothing, or 0, where the promise holds.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import fastbn
from fastbn.accuracy import sides
from fastbn.accuracy.bounds import difference, ratios
from fastbn.accuracy.cases import ORDERS, Data, in_pieces
from fastbn.accuracy.oracle import Exact
from fastbn.accuracy.sides import Arrays, BatchNorm

THREADS = range(2, sides.MANY_THREADS + 1)
NONFINITE = ("nan", "inf", "-inf")


def of(side: BatchNorm, data: Data) -> Arrays:
    """What a side computes for a case."""
    with np.errstate(all="ignore"):
        return side(data.x, data.grad_y, data.gamma, data.beta)


def constant(side: BatchNorm, value: float, dtype: str) -> str:
    """A batch of one value: var is exactly 0, y exactly beta, grad_x finite."""
    data = Data("mean/std 0", dtype)
    data.x[:] = value
    results = of(side, data)
    if results["var"].any():
        return f"var is {np.abs(results['var']).max():.1e}"
    if "y" in results and (results["y"] != data.beta).any():
        return f"y is off by {np.abs(results['y'] - data.beta).max():.1e}"
    if "grad_x" in results and not np.isfinite(results["grad_x"]).all():
        return "grad_x is not finite"
    return ""


def nonfinite(side: BatchNorm, value: str, dtype: str) -> str:
    """One such value in the middle column leaves the bits of all other columns as they are."""
    data = Data("mean/std 0", dtype)
    clean = of(side, data)
    data.x[1717, 2] = float(value)
    try:
        spoiled = of(side, data)
    except ValueError:
        return "refused"
    others = [0, 1, 3, 4]
    return ", ".join(
        name for name in clean if clean[name][..., others].tobytes() != spoiled[name][..., others].tobytes()
    )


def threads(label: str, side: BatchNorm, dtype: str) -> dict[str, float]:
    """The largest difference of each quantity between 1 thread and 2, 3, ... 64; none where no bit differs."""
    data = Data("large", dtype)
    sides.set_threads(label, 1)
    expected = of(side, data)
    found: dict[str, float] = {}
    for n in THREADS:
        sides.set_threads(label, n)
        for name, result in of(side, data).items():
            if result.tobytes() != expected[name].tobytes():
                found[name] = max(found.get(name, 0), difference(name, result, expected[name], dtype))
    return found


def merged(name: str, dtype: str, backend: str | None = None) -> dict[str, float]:
    """Moments of 1,000 unequal pieces, merged one by one: for each order the larger error, in units of the bound."""
    data = Data(name, dtype)
    exact = Exact(data.x, data.x, data.gamma, data.beta, 0)
    pieces = [fastbn.moments(piece, num_threads=1, backend=backend) for piece in in_pieces(data.x)]
    found = {}
    for order, arrange in ORDERS.items():
        total: Any = sum(arrange(pieces), fastbn.Moments.empty(data.x.shape[1]))
        found[order] = max(ratios(exact, data.x, data.x, {"mean": total.mean, "var": total.var()}).values())
    return found
