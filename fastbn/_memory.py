"""Memory of large outputs, kept for reuse.

A fresh large array costs more than the kernel that fills it: the system hands out its pages one fault at a time, zeroed
(64 MiB: a fresh copy of an array takes 3.3 times as long as one into memory used before). So outputs of POOLED_BYTES
and more live in blocks that come back here when the last array on them is gone. A block is owned by the arrays that
look at it, through their `base`; it can come back only after Python has destroyed all of them, views and slices too, so
memory still referenced anywhere is never handed out again.

There is no lock: destructors run at any moment, in the middle of anything, and a lock held by another thread at a fork,
or by one that was interrupted, would never be released. Each step is one operation of a dict, which is atomic, and
``pop`` gives a piece to one thread alone.
"""

from __future__ import annotations

import operator
import os
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

POOLED_BYTES = 1 << 20
_GRAIN = 1 << 20  # sizes are rounded up to this, so that batches of nearly the same size share blocks
_ALIGN = 64

_free: dict[int, NDArray[np.uint8]] = {}  # by id, oldest first


def _default_limit() -> int:
    text = os.environ.get("FASTBN_MEMORY_LIMIT", "")
    if text.isdecimal():
        return int(text)
    if text:
        warnings.warn(f"FASTBN_MEMORY_LIMIT must be a whole number of bytes, got {text!r}; ignored", RuntimeWarning,
                      stacklevel=2)
    try:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        physical = 8 << 30
    return min(1 << 30, physical // 8)


_limit = _default_limit()


class _Block:
    """The owner of one piece of memory, for as long as arrays look at it."""

    __slots__ = ("raw",)

    def __init__(self, raw: NDArray[np.uint8]) -> None:
        self.raw = raw

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self.raw.__array_interface__

    def __del__(self) -> None:
        _give_back(self.raw)


def _give_back(raw: NDArray[np.uint8]) -> None:
    if raw.nbytes <= _limit:
        _free[id(raw)] = raw
        _trim(_limit)


def _trim(limit: int) -> None:
    pieces = _free.copy()
    excess = sum(raw.nbytes for raw in pieces.values()) - limit
    for key in pieces:
        if excess <= 0:
            break
        freed = _free.pop(key, None)
        excess -= 0 if freed is None else freed.nbytes


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Like np.empty, in C order; a large array comes from the pool."""
    nbytes = dtype.itemsize
    for length in shape:
        nbytes *= length
    if nbytes < POOLED_BYTES or _limit == 0:
        return np.empty(shape, dtype)
    size = -(-nbytes // _GRAIN) * _GRAIN + _ALIGN
    raw = _take(size)
    if raw is None:
        try:
            raw = np.empty(size, np.uint8)
        except MemoryError:
            release_memory()
            raw = np.empty(size, np.uint8)
    start = -raw.ctypes.data % _ALIGN
    return np.asarray(_Block(raw))[start:start + nbytes].view(dtype).reshape(shape)


SOURCE = (POOLED_BYTES, empty)  # what the compiled whole calls make their outputs with


def _take(size: int) -> NDArray[np.uint8] | None:
    for key, raw in reversed(_free.copy().items()):  # the latest is the likeliest to be in a cache
        if raw.nbytes == size and _free.pop(key, None) is not None:
            return raw
    return None


def release_memory() -> None:
    """Free the memory that fastbn keeps for reuse.

    Outputs of 1 MiB and more are reused once no array refers to them, because fresh memory costs more than the kernel
    that fills it. At most `set_memory_limit` bytes are kept, by default the lesser of 1 GiB and an eighth of the
    machine's memory.
    """
    _free.clear()


def set_memory_limit(nbytes: int) -> None:
    """Limit the memory that fastbn keeps for reuse; 0 switches reuse off.

    Parameters
    ----------
    nbytes : int
        At least 0. What is kept beyond it is freed at once. FASTBN_MEMORY_LIMIT sets it at import.

    Raises
    ------
    TypeError, ValueError
        If nbytes is not an integer >= 0.
    """
    global _limit
    try:
        value = operator.index(nbytes)
    except TypeError:
        raise TypeError(f"nbytes must be an integer >= 0, got {nbytes!r}") from None
    if value < 0:
        raise ValueError(f"nbytes must be >= 0, got {value}")
    _limit = value
    _trim(value)


def kept_bytes() -> int:
    """Bytes kept now, and referenced by no array."""
    return sum(raw.nbytes for raw in _free.copy().values())
