"""Column statistics that merge: count, mean and m2 of batches, streams and pieces."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastbn import _dispatch, _layout


class Moments:
    """Count, mean and sum of squared deviations of each channel.

    Two of them merge into what the whole data would give, up to rounding (Chan, Golub and LeVeque 1979), so pieces may
    be computed batch by batch, thread by thread or machine by machine.

    Parameters
    ----------
    count : int
        Values per channel, at least 0.
    mean, m2 : array_like, shape (channels,)
        The mean, and the sum of squared deviations from it.

    Attributes
    ----------
    count : int
    mean, m2 : ndarray of float64, shape (channels,)

    Examples
    --------
    >>> seen = fastbn.Moments.empty(2)
    >>> for batch in ([[1.0, 5.0], [3.0, 5.0]], [[5.0, 5.0]]):
    ...     seen.update(np.array(batch))
    >>> seen
    Moments(count=3, channels=2)
    >>> seen.mean, seen.std()
    (array([3., 5.]), array([1.63299316, 0.        ]))
    """

    __slots__ = ("_rest", "count", "m2", "mean")  # _rest: what the exact mean has beyond the float64 in mean

    def __init__(self, count: int, mean: ArrayLike, m2: ArrayLike) -> None:
        self.count = _layout.integer(count, "count")
        self.mean = np.array(_layout.real(mean, "mean"), np.float64)
        self.m2 = np.array(_layout.real(m2, "m2"), np.float64)
        self._rest = np.zeros_like(self.mean)
        if self.count < 0:
            raise ValueError(f"count must be >= 0, got {count}")
        if (self.m2 < 0).any():
            raise ValueError(f"m2 must be >= 0, got {self.m2[self.m2 < 0][0]}")
        if self.mean.ndim != 1 or self.mean.shape != self.m2.shape:
            raise ValueError(f"mean and m2 must have one shape (channels,), got {self.mean.shape} and {self.m2.shape}")

    @classmethod
    def _of(
        cls, count: int, mean: NDArray[np.float64], rest: NDArray[np.float64], m2: NDArray[np.float64],
    ) -> Moments:
        """Of arrays that nobody else has, without a check or a copy."""
        moments = cls.__new__(cls)
        moments.count, moments.mean, moments._rest, moments.m2 = count, mean, rest, m2
        return moments

    @classmethod
    def empty(cls, channels: int) -> Moments:
        """The moments of no data: the neutral element of `merge`."""
        channels = _layout.integer(channels, "channels")
        if channels < 0:
            raise ValueError(f"channels must be >= 0, got {channels}")
        return cls(0, np.zeros(channels), np.zeros(channels))

    def var(self, ddof: int = 0) -> NDArray[np.float64]:
        """The variance, ``m2 / (count - ddof)``; NaN where there are too few values."""
        n = self.count - ddof
        return self.m2 / n if n > 0 else np.full_like(self.m2, np.nan)

    def std(self, ddof: int = 0) -> NDArray[np.float64]:
        """The standard deviation, ``sqrt(var(ddof))``."""
        return np.sqrt(self.var(ddof))

    def merge(self, other: Moments) -> Moments:
        """The moments of this data and the other's together, as a new object. ``a + b`` is the same.

        Raises
        ------
        TypeError, ValueError
            If other is not a Moments, or of another number of channels.
        """
        if not isinstance(other, Moments):
            raise TypeError(f"other must be a Moments, got {type(other).__name__}")
        if other.mean.shape != self.mean.shape:
            raise ValueError(f"other must have {self.mean.size} channels, got {other.mean.size}")
        if not self.count or not other.count:
            filled = self if self.count else other
            return self._of(filled.count, filled.mean.copy(), filled._rest.copy(), filled.m2.copy())
        count = self.count + other.count
        with np.errstate(all="ignore"):  # data that is not finite gives moments that are not, without warnings
            delta = (other.mean - self.mean) + (other._rest - self._rest)
            m2 = self.m2 + other.m2 + delta * delta * (self.count * (other.count / count))
            # The mean in two floats (Knuth's sum without loss): its rounding, times delta, would add up in m2.
            shift = self._rest + delta * (other.count / count)
            mean = self.mean + shift
            added = mean - self.mean
            rest = (self.mean - (mean - added)) + (shift - added)
        return self._of(count, mean, rest, m2)

    def __add__(self, other: Moments) -> Moments:
        return self.merge(other) if isinstance(other, Moments) else NotImplemented

    def update(
        self, x: ArrayLike, *, axis: int = 1, num_threads: int | None = None, backend: str | None = None,
    ) -> None:
        """Add a batch, in place. The arguments are those of `fastbn.moments`."""
        batch = moments(x, axis=axis, num_threads=num_threads, backend=backend)
        if batch.mean.shape != self.mean.shape:
            raise ValueError(f"x must have {self.mean.size} channels along axis {axis}, got {batch.mean.size}")
        merged = self.merge(batch)
        self.count, self.mean, self.m2, self._rest = merged.count, merged.mean, merged.m2, merged._rest

    def __repr__(self) -> str:
        return f"Moments(count={self.count}, channels={self.mean.size})"


def moments(
    x: ArrayLike, *, axis: int = 1, num_threads: int | None = None, backend: str | None = None,
) -> Moments:
    """Mean and sum of squared deviations of each channel, in float64.

    Parameters
    ----------
    x : array_like, shape (batch, channels) or (batch, channels, ...)
        float32 or float64; integers and bool are computed as float64. Any memory order; what takes a copy is in
        docs/memory.md.
    axis : int
        The channel axis; the statistics run over all the others.
    num_threads : int, optional
        At most so many threads, for this call. The bits of the result do not depend on it.
    backend : {None, "auto", "cython", "numba", "numpy"}
        None and "auto" take the best that is available.

    Returns
    -------
    Moments
        ``.count``, ``.mean``, ``.m2``, ``.var(ddof)``, ``.std(ddof)``; see there for merging and streams.

    Raises
    ------
    TypeError
        If x is not real, or is float16, longdouble or masked.
    ValueError
        If x has fewer than two dimensions, axis is out of range, or a name is unknown.

    Examples
    --------
    >>> m = fastbn.moments(np.array([[1.0, 10.0], [3.0, 30.0]]))
    >>> m.mean, m.var(ddof=1)
    (array([ 2., 20.]), array([  2., 200.]))
    """
    kernels = _dispatch.kernels(backend)
    threads = _dispatch.thread_count(num_threads)
    whole = getattr(kernels, "whole_moments", None)
    done = whole and whole(x, axis, threads)
    if done:
        return Moments._of(*done)

    array: NDArray[Any] = _layout.data(x)
    layout = _layout.layout_of(array, axis)
    mean, rest, m2 = np.zeros(layout.channels), np.zeros(layout.channels), np.zeros(layout.channels)
    if array.size:
        kernels.moments(_layout.canonical(array, layout), mean, rest, m2, threads)
    return Moments._of(layout.n_values, mean, rest, m2)
