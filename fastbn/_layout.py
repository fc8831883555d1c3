"""Validation and the canonical view: every argument error of the public functions is raised here.

The canonical view of an array is ``(outer, channels, inner)`` with ``[channels, inner]`` contiguous. It is found by
putting the axes in the order in which they lie in memory: those before the channel axis become ``outer``, those after
it ``inner``. So C order, Fortran order, channels last and row slices all become views without a copy; what does not
(a step along the channels, a transposition that interleaves) is copied once.
"""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastbn import _memory

ACTIVATIONS = (None, "relu")
FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


class Layout(NamedTuple):
    """How an array of ``shape`` is seen as ``view``: transposed to ``order``, then reshaped."""

    shape: tuple[int, ...]
    order: tuple[int, ...]
    view: tuple[int, int, int]
    dtype: np.dtype[Any]

    @property
    def channels(self) -> int:
        return self.view[1]

    @property
    def n_values(self) -> int:
        """Values per channel."""
        return self.view[0] * self.view[2]


def layout_of(x: NDArray[Any], axis: int) -> Layout:
    """The layout that follows the memory order of x."""
    axis = channel_axis(x, axis)
    if x.flags.c_contiguous:  # what follows would find the same, in 7 us instead of 3
        view = (math.prod(x.shape[:axis]), x.shape[axis], math.prod(x.shape[axis + 1:]))
        return Layout(x.shape, tuple(range(x.ndim)), view, x.dtype)
    # An axis of length 1 has an arbitrary stride; it takes the one that C order would give it.
    strides = list(x.strides)
    step = x.itemsize
    for i in range(x.ndim - 1, -1, -1):
        if x.shape[i] == 1:
            strides[i] = step
        step = abs(strides[i]) * x.shape[i]
    order = tuple(sorted(range(x.ndim), key=lambda i: -abs(strides[i])))
    at = order.index(axis)
    outer = math.prod(x.shape[i] for i in order[:at])
    inner = math.prod(x.shape[i] for i in order[at + 1:])
    return Layout(x.shape, order, (outer, x.shape[axis], inner), x.dtype)


def canonical(x: NDArray[Any], layout: Layout, spare: NDArray[Any] | None = None) -> NDArray[Any]:
    """x as ``layout.view``: a view where x allows it, else a copy, in spare where that is given.

    spare is the canonical view of the output. Kernels work in place, so a copy there takes no memory beside it.
    """
    if x.dtype == layout.dtype and x.flags.aligned:
        if x.flags.c_contiguous and layout.order == tuple(range(x.ndim)):
            return x.reshape(layout.view)
        if has_rows(x, layout):
            return x.transpose(layout.order).reshape(layout.view)
    if spare is None:
        spare = np.empty(layout.view, layout.dtype)
    ordered = x.transpose(layout.order)
    np.copyto(spare.reshape(ordered.shape), ordered, casting="same_kind")
    return spare


def has_rows(x: NDArray[Any], layout: Layout) -> bool:
    """Whether x lies as ``layout.view`` says: channels and inner one behind the other, the rest in equal steps."""
    row = layout.view[1] * layout.view[2]
    n, step = 1, x.itemsize  # values passed, and the bytes from where they begin to the next so many
    for i in reversed(layout.order):
        if x.shape[i] == 1:
            continue
        if n == row:  # rows may lie apart
            step = x.strides[i]
        if x.strides[i] != step or step % x.itemsize:
            return False
        n, step = n * x.shape[i], step * x.shape[i]
    return True


def empty(layout: Layout) -> tuple[NDArray[Any], NDArray[Any]]:
    """A new array of ``layout.shape`` in the memory order of the layout, and its canonical view."""
    view = _memory.empty(layout.view, layout.dtype)
    return restored(view, layout), view


def restored(view: NDArray[Any], layout: Layout) -> NDArray[Any]:
    """The inverse of canonical, for a contiguous view."""
    inverse = sorted(range(len(layout.order)), key=layout.order.__getitem__)
    return view.reshape([layout.shape[i] for i in layout.order]).transpose(inverse)


# ------------------------------------------------------------------------------------------------------ arguments


def data(x: ArrayLike, name: str = "x") -> NDArray[Any]:
    """x as an aligned, native array of float32 or float64 with at least two axes; integers and bool become float64."""
    if is_plain(x, FLOATS) and x.ndim >= 2:
        return x
    x = unmasked(x, name)
    if x.dtype.kind != "f" or x.itemsize not in (4, 8):
        if x.dtype.kind not in "biu":
            raise TypeError(
                f"{name} must be float32, float64, an integer or bool, got dtype {x.dtype}"
                + (f"; convert it with {name}.astype(np.float32)" if x.dtype.kind == "f" else "")
            )
        x = x.astype(np.float64)
    if x.ndim < 2:
        raise ValueError(f"{name} must have at least 2 dimensions (batch, channels, ...), got shape {x.shape}")
    return np.require(x, x.dtype.newbyteorder("="), "A")


def is_plain(x: ArrayLike, dtypes: tuple[np.dtype[Any], ...]) -> TypeGuard[NDArray[Any]]:
    """Whether x is an array of one of the dtypes that kernels take as it is; quicker than to convert it to itself."""
    return type(x) is np.ndarray and x.dtype in dtypes and x.flags.aligned


def unmasked(x: ArrayLike, name: str) -> NDArray[Any]:
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(
            f"{name} must not be a masked array: its mask would be ignored; "
            f"fill it ({name}.filled(value)) or drop the masked rows first"
        )
    try:
        return np.asarray(x)
    except ValueError as error:
        raise ValueError(f"{name} must be an array of numbers, got {type(x).__name__}: {error}") from None


def real(values: ArrayLike, name: str) -> NDArray[Any]:
    array = unmasked(values, name)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be real numbers, got dtype {array.dtype}")
    return array


def integer(value: int, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def channel_axis(x: NDArray[Any], axis: int) -> int:
    index = integer(axis, "axis")
    if not -x.ndim <= index < x.ndim:
        raise ValueError(f"axis must be in [-{x.ndim}, {x.ndim}) for an array of {x.ndim} dimensions, got {index}")
    return index % x.ndim


def per_channel(values: ArrayLike | None, name: str, channels: int, dtype: Any) -> NDArray[Any] | None:
    """gamma or beta as a contiguous, aligned (channels,) array; None stays None."""
    if values is None:
        return None
    if is_plain(values, (dtype,)) and values.shape == (channels,) and values.flags.c_contiguous:
        return values
    array = real(values, name)
    if array.shape != (channels,):
        raise ValueError(f"{name} must have shape ({channels},), got {array.shape}")
    array = np.ascontiguousarray(array, dtype)
    return array if array.flags.aligned else array.copy()


def statistics(values: ArrayLike | None, name: str, channels: int) -> NDArray[np.float64]:
    """mean or var as a contiguous (channels,) array of float64."""
    if values is None:
        raise TypeError(f"{name} must be an array of shape ({channels},), got None")
    array = per_channel(values, name, channels, np.float64)
    assert array is not None
    return array


def epsilon(eps: float) -> float:
    if isinstance(eps, (str, bytes, bytearray)):
        raise TypeError(f"eps must be a number >= 0, got {eps!r}")
    try:
        value = float(eps)
    except OverflowError:  # an integer beyond the floats
        value = math.inf
    except (TypeError, ValueError):
        raise TypeError(f"eps must be a number >= 0, got {eps!r}") from None
    if not 0 <= value < math.inf:
        raise ValueError(f"eps must be a finite number >= 0, got {eps!r}")
    return value


def uses_relu(activation: str | None) -> bool:
    if activation is None:
        return False
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    return True


def output(
    out: NDArray[Any] | None, layout: Layout, source: NDArray[Any], others: tuple[NDArray[Any], ...] = (),
) -> tuple[NDArray[Any], NDArray[Any]]:
    """out, checked (or a new array), and its canonical view.

    ``out`` may be ``source`` itself; beyond that it must not share memory with ``source`` or ``others``. Where it has
    no canonical view, the second array is a copy that the caller writes back (see `finish`).
    """
    if out is None:
        return empty(layout)
    if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
        raise TypeError(f"out must be a NumPy array, got {type(out).__name__}")
    if out.shape != layout.shape:
        raise ValueError(f"out must have shape {layout.shape}, got {out.shape}")
    if out.dtype != layout.dtype or not out.dtype.isnative:
        raise TypeError(f"out must have dtype {layout.dtype}, got {out.dtype}")
    if not out.flags.writeable:
        raise ValueError("out must be writeable, got a read-only array")
    if (overlap(out, source) and not same_place(out, source)) or any(overlap(out, other) for other in others):
        raise ValueError("out must be the input itself or share no memory with the inputs, got one that overlaps")
    if not out.flags.c_contiguous and overlaps_itself(out):
        raise ValueError("out must have a place of its own for each value, got an array that overlaps itself")
    return out, canonical(np.asarray(out), layout)  # np.matrix would give reshape another shape


def same_place(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Whether two arrays of one shape are the same memory; the stride of an axis of length 1 is arbitrary."""
    return a.ctypes.data == b.ctypes.data and all(
        n == 1 or s == t for n, s, t in zip(a.shape, a.strides, b.strides, strict=True))


def apart(values: Any, out: NDArray[Any]) -> Any:
    """A vector or None, copied where it may lie in out, which is written before all of the vector is read."""
    return values if values is None or not np.may_share_memory(values, out) else values.copy()


def overlap(a: NDArray[Any], b: NDArray[Any]) -> bool:
    if not np.may_share_memory(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=100_000)  # type: ignore[arg-type]  # the stubs know only -1 and 0
    except np.exceptions.TooHardError:
        return True


def overlaps_itself(x: NDArray[Any]) -> bool:
    """Whether two elements share memory (broadcast or sliding-window views)."""
    if not x.size:
        return False
    reach = x.itemsize
    for stride, length in sorted((abs(s), n) for s, n in zip(x.strides, x.shape, strict=True) if n > 1):
        if stride < reach:
            return True
        reach = stride * (length - 1) + reach
    return False


def finish(out: NDArray[Any], view: NDArray[Any], layout: Layout) -> NDArray[Any]:
    """out, after the kernel has filled view: writes it back where view was a copy."""
    if not np.may_share_memory(out, view):
        out[...] = restored(view, layout)
    return out
