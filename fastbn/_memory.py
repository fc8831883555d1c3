"""Memory of large outputs, kept for reuse.

A fresh large array costs more than the kernel that fills it: the system hands out its pages one fault at a time, zeroed
(64 MiB: a fresh copy of an array takes 3.3 times as long as one into memory used before). So outputs of POOLED_BYTES
and more live in blocks that come back here when the last array on them is gone. A block is owned by the arrays that
look at it, through their `base`; it can come back only after Python has destroyed all of them, views and slices too, so
memory still referenced anywhere is never handed out again.

There is no lock: destructors run at any moment, in the middle of anything, and a lock held by another thread at a fork,
or by one that was interrupted, would never be released. Each step is one operation of a dict, which is atomic, and
``pop`` gives a block to one thread alone.
"""

from __future__ import annotations

import math
import operator
import os
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

POOLED_BYTES = 1 << 20
_GRAIN = 1 << 20  # sizes are rounded up to this, so that batches of nearly the same size share blocks
_PAGE = 4096
_PLACE = 2048 + 64  # Where outputs begin in a page: on a line, and half a page from where NumPy's large arrays begin.
# A line into a page they were so little behind x that Zen 4's loads would wait for the stores before them, or the
# kernels go back (see goes_back there).


class _Block:
    """Memory that goes from one owner to the next; from `address` on."""

    __slots__ = ("address", "memory", "nbytes")

    def __init__(self, nbytes: int) -> None:
        self.memory = np.empty(nbytes, np.uint8)
        self.nbytes = nbytes
        start = self.memory.ctypes.data
        self.address = start + (_PLACE - start) % _PAGE


_free: dict[int, _Block] = {}  # by id, oldest first


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


class Owner:
    """The owner of a block, for as long as arrays look at it."""

    __slots__ = ("__array_interface__", "address", "block")

    __array_interface__: dict[str, Any]  # set where NumPy is to read it

    def __init__(self, block: _Block) -> None:
        self.block = block
        self.address = block.address

    def __del__(self) -> None:
        _give_back(self.block)


def _give_back(block: _Block) -> None:
    if block.nbytes <= _limit:
        _free[id(block)] = block
        if len(_free) > 1:  # one alone is within the limit
            _trim(_limit)


def _trim(limit: int) -> None:
    blocks = _free.copy()
    excess = sum(block.nbytes for block in blocks.values()) - limit
    for key in blocks:
        if excess <= 0:
            break
        freed = _free.pop(key, None)
        excess -= 0 if freed is None else freed.nbytes


# While the last call's data fill the caches, each function that runs is first fetched from memory, so what is below is
# short: with a slice, a view and a reshape, `empty` took 60 to 90 us for outputs of 6 MB, in a loop of nothing else 15.


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Like np.empty, in C order; a large array comes from the pool."""
    nbytes = dtype.itemsize * math.prod(shape)
    if nbytes < POOLED_BYTES:
        return np.empty(shape, dtype)
    owner = take(nbytes)
    owner.__array_interface__ = {"version": 3, "data": (owner.address, False), "shape": shape, "typestr": dtype.str}
    return np.asarray(owner)


def take(nbytes: int) -> Owner:
    """The owner of so many bytes of memory, from the pool or new; for arrays to have as their base."""
    nbytes = -(-nbytes // _GRAIN) * _GRAIN + _PAGE
    return Owner(_kept(nbytes) or _new(nbytes))


def _kept(nbytes: int) -> _Block | None:
    """Of the free blocks one of that size; in a function of its own, lest the search still hold what _new gives up."""
    for key, block in reversed(_free.copy().items()):  # the latest is the likeliest to be in a cache
        if block.nbytes == nbytes and _free.pop(key, None) is not None:
            return block
    return None


def _new(nbytes: int) -> _Block:
    try:
        return _Block(nbytes)
    except MemoryError:
        release_memory()
        return _Block(nbytes)


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
    return sum(block.nbytes for block in _free.copy().values())
