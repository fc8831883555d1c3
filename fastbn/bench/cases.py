"""What is measured: operations on shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass

OPS = {
    "forward-out": "training forward into a given array (out=)",
    "forward": "training forward as users call it: y, saved = batch_norm(x, gamma, beta)",
    "relu": "training forward + ReLU as users call it",
    "backward-out": "backward into a given array (out=)",
    "backward": "backward as users call it: grad_x, grad_gamma, grad_beta = batch_norm_backward(grad_y, saved)",
    "layer": "layer, training forward + backward",
    "inference-out": "inference into a given array (out=)",
    "inference": "inference as users call it",
    "moments": "column means and variances",
    "layouts": "training forward (out=) on other memory layouts and widths",
    "mixing": "training forward (out=) of two libraries in turn, in one process",
}
DTYPES = ("float32", "float64")
LAYOUTS = {"C": "C order", "F": "Fortran order", "rows": "every other row of a larger array"}
SHAPES = (
    "8x16", "64x128", "256x512", "32x4096", "16384x64", "4096x1024", "100352x64", "65536x256", "262144x256",
    "32x256x14x14", "32x64x56x56",
)
LAYOUT_BASES = {"62500x64": 16, "500000x64": 128}  # the plain case of each size in MB
OP_SHAPES: dict[str, tuple[str, ...]] = {
    "forward-out": SHAPES,
    "forward": SHAPES,
    "relu": ("16384x64", "100352x64", "262144x256"),
    "backward-out": SHAPES,
    "backward": SHAPES,
    "layer": ("64x128", "256x512", "16384x64", "100352x64"),
    "inference-out": SHAPES,
    "inference": ("64x128", "16384x64", "65536x256", "262144x256"),
    "moments": tuple(f"1000000x{n}{kind}" for n in (64, 20) for kind in ("", ":F", ":float64")),
    "layouts": (
        "62500x64", "31250x64:float64", "62500x64:F", "62500x64:rows",
        "1333333x3", "200000x20", "51948x77", "4000x1000",
        "500000x64", "250000x64:float64", "500000x64:F", "500000x64:rows",
        "10666666x3", "1600000x20", "415584x77", "32000x1000",
    ),
    "mixing": ("256x512", "16384x64", "4096x1024"),
}
ON_REQUEST = ("layouts", "mixing")  # not among the operations that --shapes stands for by itself


@dataclass(frozen=True)
class Case:
    """One operation on one array. The channel axis is 1."""

    op: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "C"

    @property
    def array(self) -> str:
        """The array as the user writes it, for instance ``1000000x64:float64:F``."""
        kinds = [kind for kind, usual in ((self.dtype, "float32"), (self.layout, "C")) if kind != usual]
        return ":".join(["x".join(map(str, self.shape)), *kinds])

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * (8 if self.dtype == "float64" else 4)


def parse(op: str, array: str) -> Case:
    """``65536x256``, ``32x64x56x56``, ``1000000x64:float64:F`` as a case; ValueError for anything else."""
    sizes, *kinds = array.strip().split(":")
    parts = sizes.split("x")
    if len(parts) < 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"expected sizes as in 65536x256 or 32x64x56x56, got {array!r}")
    unknown = [kind for kind in kinds if kind not in (*DTYPES, *LAYOUTS)]
    if unknown:
        raise ValueError(f"unknown kind {unknown[0]!r} in {array!r}; known: {', '.join((*DTYPES, *LAYOUTS))}")
    for known in (DTYPES, LAYOUTS):
        both = [kind for kind in kinds if kind in known]
        if len(both) > 1:
            raise ValueError(f"expected one of {both[0]!r} and {both[1]!r}, got {array!r}")
    shape = tuple(map(int, parts))
    if math.prod(shape) == shape[1]:
        raise ValueError(f"more than one value per channel is needed, got {array!r}")
    dtype = next((kind for kind in kinds if kind in DTYPES), "float32")
    layout = next((kind for kind in kinds if kind in LAYOUTS), "C")
    return Case(op, shape, dtype, layout)


def grid(ops: list[str] | None, arrays: list[str] | None, largest: float = math.inf) -> list[Case]:
    """The cases of these operations (default: all) on these arrays (default: each operation's own)."""
    if ops is None:
        ops = [op for op in OPS if arrays is None or op not in ON_REQUEST]
    return [
        case for op in ops for case in (parse(op, array) for array in arrays or OP_SHAPES[op]) if case.nbytes <= largest
    ]
