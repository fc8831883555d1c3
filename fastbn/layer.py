"""BatchNorm as a layer: parameters, running statistics, train and eval, backward, state."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastbn import _dispatch, _layout
from fastbn.functional import Saved, batch_norm, batch_norm_backward, normalize
from fastbn.moments import moments


class BatchNorm:
    """Batch normalization with learned scale and shift, and running statistics for inference.

    Semantics are those of ``torch.nn.BatchNorm1d``, ``2d`` and ``3d``: the biased variance normalizes, the unbiased one
    is what ``running_var`` averages.

    Parameters
    ----------
    num_features : int
        Channels.
    axis : int
        The channel axis.
    eps : float
        Added to the variance.
    momentum : float or None
        Weight of the *new* batch in the running statistics; None keeps the cumulative average.
    affine : bool
        Whether there is a gamma and a beta to learn.
    track_running_stats : bool
        Without running statistics, eval mode uses those of the batch too.
    activation : {None, "relu"}
        Fused into the same pass, forward and backward.
    dtype : {float32, float64}
        Of gamma, beta and their gradients. The data is computed in its own dtype, statistics are float64.
    skip_nonfinite : bool
        Leave the running statistics as they are where those of a training batch are not all finite, see Notes.
    backend, num_threads
        As in `fastbn.batch_norm`.

    Attributes
    ----------
    gamma, beta : ndarray, shape (num_features,), or None
    grad_gamma, grad_beta : ndarray, shape (num_features,), or None
        Set by `backward`.
    running_mean, running_var : ndarray of float64, shape (num_features,), or None
    num_batches_tracked : int
        Training batches that went into the running statistics.
    num_batches_skipped : int
        Training batches that did not, because of ``skip_nonfinite``. Part of a copy or a pickle of the layer, but not
        of `state_dict`, whose keys are PyTorch's own.
    training : bool

    Notes
    -----
    One NaN or infinite value in a training batch makes the statistics of its channel NaN or infinite, and y there too.
    The running statistics of that channel then stay so for good (with any momentum but 1, an average never forgets a
    NaN), and with them the output of eval mode; the other channels are not touched. PyTorch does the same. With
    ``skip_nonfinite=True`` such a batch changes neither running_mean nor running_var of any channel, nor
    num_batches_tracked, so that the average with ``momentum=None`` is over the finite batches; it is counted in
    num_batches_skipped, and the first one gives a RuntimeWarning. y and the gradients are what the batch gives.

    Examples
    --------
    >>> layer = fastbn.BatchNorm(64)
    >>> y = layer(x)                        # training mode: batch statistics
    >>> grad_x = layer.backward(grad_y)     # sets layer.grad_gamma, layer.grad_beta
    >>> layer.gamma -= 0.1 * layer.grad_gamma
    >>> y = layer.eval()(x)                 # running statistics
    """

    def __init__(
        self,
        num_features: int,
        *,
        axis: int = 1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: str | None = None,
        dtype: DTypeLike = np.float32,
        skip_nonfinite: bool = False,
        backend: str | None = None,
        num_threads: int | None = None,
    ) -> None:
        self.num_features = _dispatch.positive(num_features, "num_features")
        self.dtype = np.dtype(dtype)
        if dtype is None or self.dtype not in _layout.FLOATS:  # np.dtype(None) is float64
            raise TypeError(f"dtype must be float32 or float64, got {dtype and self.dtype}")
        if momentum is not None and (not isinstance(momentum, Real) or not 0 <= momentum <= 1):
            raise ValueError(f"momentum must be a number in [0, 1] or None, got {momentum!r}")
        _layout.uses_relu(activation)
        if backend is not None:
            _dispatch.kernels(backend)
        if num_threads is not None:
            _dispatch.thread_count(num_threads)
        self.axis = _layout.integer(axis, "axis")
        self.eps = _layout.epsilon(eps)
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.activation = activation
        self.skip_nonfinite = skip_nonfinite
        self.backend = backend
        self.num_threads = num_threads
        self.training = True
        self.gamma = np.ones(num_features, self.dtype) if affine else None
        self.beta = np.zeros(num_features, self.dtype) if affine else None
        self.grad_gamma: NDArray[Any] | None = None
        self.grad_beta: NDArray[Any] | None = None
        self.running_mean = np.zeros(num_features) if track_running_stats else None
        self.running_var = np.ones(num_features) if track_running_stats else None
        self.num_batches_tracked = 0
        self.num_batches_skipped = 0
        self._saved: Saved | None = None

    def __call__(self, x: ArrayLike, *, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """y, by the batch's statistics in training mode (which updates the running ones), else by the running ones.

        ``x`` is kept, not copied, for `backward`: do not write to it before. ``out`` is as in `fastbn.batch_norm`.
        """
        if not isinstance(x, np.ndarray):
            x = _layout.data(x)
        self._check_channels(x)
        if self.training or self.running_mean is None or self.running_var is None:
            y, saved = batch_norm(
                x, self.gamma, self.beta, axis=self.axis, eps=self.eps, activation=self.activation, out=out,
                num_threads=self.num_threads, backend=self.backend,
            )
            if self.training and saved.count:
                self._track(saved)
        else:
            y, saved = normalize(
                x, self.running_mean, self.running_var, self.gamma, self.beta, self.axis, self.eps, self.activation,
                out, self.num_threads, self.backend,
            )
        self._saved = saved
        return y

    def _check_channels(self, x: NDArray[Any]) -> None:
        if x.ndim < 2:
            raise ValueError(f"x must have at least 2 dimensions (batch, channels, ...), got shape {x.shape}")
        channels = x.shape[_layout.channel_axis(x, self.axis)]
        if channels != self.num_features:
            raise ValueError(
                f"x must have {self.num_features} channels along axis {self.axis}, got {channels} in shape {x.shape}"
            )

    def _track(self, saved: Saved) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        seen = self.num_batches_tracked + 1
        weight = 1 / seen if self.momentum is None else float(self.momentum)
        if self.skip_nonfinite and not np.isfinite(saved.var).all():  # nor is a variance where the mean is not
            if not self.num_batches_skipped:
                warnings.warn(
                    f"the statistics of a training batch are not finite; running_mean and running_var of {self!r} "
                    "stay as they are, here and from now on (num_batches_skipped counts such batches)",
                    RuntimeWarning,
                    stacklevel=3,
                )
            self.num_batches_skipped += 1
            return
        bessel = saved.count / (saved.count - 1)  # the running variance averages unbiased ones
        whole = getattr(_dispatch.kernels(self.backend), "whole_running", None)
        mean, var = (whole and whole(self.running_mean, self.running_var, saved.stats, weight, bessel)) or (
            self.running_mean * (1 - weight) + saved.mean * weight,
            self.running_var * (1 - weight) + saved.var * bessel * weight,
        )
        # All three together, so that an interrupt leaves no half-made update.
        self.running_mean, self.running_var, self.num_batches_tracked = mean, var, seen

    def backward(self, grad_y: ArrayLike, *, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """grad_x; sets ``grad_gamma`` and ``grad_beta``. In eval mode the statistics are constants.

        Raises
        ------
        RuntimeError
            If no forward came before, or it ran in place.
        """
        if self._saved is None:
            raise RuntimeError("backward needs a forward before it: call layer(x) first")
        grad_x, grad_gamma, grad_beta = batch_norm_backward(
            grad_y, self._saved, out=out, num_threads=self.num_threads, backend=self.backend
        )
        if self.affine:
            self.grad_gamma = grad_gamma.astype(self.dtype, copy=False)
            self.grad_beta = grad_beta.astype(self.dtype, copy=False)
        return grad_x

    def train(self, mode: bool = True) -> BatchNorm:
        """Set training mode; returns the layer."""
        self.training = bool(mode)
        return self

    def eval(self) -> BatchNorm:
        """Set eval mode; returns the layer."""
        return self.train(False)

    def set_identity(self, x: ArrayLike) -> None:
        """Set gamma = sqrt(var + eps) and beta = mean of x, so that the layer gives x back (in training mode).

        Normalization costs the network none of its expressiveness, because this point is there to be learned (Ioffe and
        Szegedy 2015, section 3).
        """
        if not self.affine:
            raise RuntimeError("set_identity needs a gamma and a beta: make the layer with affine=True")
        x = _layout.data(x)
        self._check_channels(x)
        batch = moments(x, axis=self.axis, num_threads=self.num_threads, backend=self.backend)
        if not batch.count:
            raise ValueError(f"x must not be empty, got shape {x.shape}")
        self.gamma = np.sqrt(batch.var() + self.eps).astype(self.dtype)
        self.beta = batch.mean.astype(self.dtype)

    # ---------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Parameters and running statistics as copies, under the keys of ``torch.nn.BatchNorm1d.state_dict()``.

        ``weight`` is gamma, ``bias`` is beta; then ``running_mean``, ``running_var``, ``num_batches_tracked``.
        """
        state: dict[str, NDArray[Any]] = {}
        if self.gamma is not None and self.beta is not None:
            state |= {"weight": self.gamma.copy(), "bias": self.beta.copy()}
        if self.running_mean is not None and self.running_var is not None:
            state |= {
                "running_mean": self.running_mean.copy(),
                "running_var": self.running_var.copy(),
                "num_batches_tracked": np.array(self.num_batches_tracked),
            }
        return state

    def load_state_dict(self, state: Mapping[str, ArrayLike]) -> None:
        """Take over what `state_dict` returned, or the arrays of a PyTorch module's. All of it, or nothing.

        A state may lie in a file, without pickle: ``np.savez(path, **layer.state_dict())``, then
        ``layer.load_state_dict(np.load(path))``, which refuses to run code from the file.

        Raises
        ------
        KeyError
            If a key is missing or unknown.
        TypeError, ValueError
            If state is no mapping, an array is not real, not finite or has another shape, or a variance or the count is
            negative.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a mapping of names to arrays, got {type(state).__name__}")
        expected = list(self.state_dict())
        missing = [key for key in expected if key not in state]
        unknown = [key for key in state if key not in expected]
        if missing or unknown:
            raise KeyError(f"state must have the keys {expected}; missing: {missing}, unknown: {unknown}")
        arrays = {
            key: self._state_array(state[key], key) for key in expected if key != "num_batches_tracked"
        }
        count = self.num_batches_tracked
        if self.track_running_stats:
            if (arrays["running_var"] < 0).any():
                raise ValueError(f"state['running_var'] must be >= 0, got {arrays['running_var'].min()}")
            count = _state_count(state["num_batches_tracked"])
        # From here on nothing can fail.
        self.gamma, self.beta = arrays.get("weight"), arrays.get("bias")
        self.running_mean, self.running_var = arrays.get("running_mean"), arrays.get("running_var")
        self.num_batches_tracked = count

    def _state_array(self, values: ArrayLike, key: str) -> NDArray[Any]:
        dtype = self.dtype if key in ("weight", "bias") else np.dtype(np.float64)
        with np.errstate(over="ignore"):  # what does not fit becomes infinite
            array = _layout.statistics(values, f"state[{key!r}]", self.num_features).astype(dtype)
        bad = ~np.isfinite(array)
        if bad.any():
            raise ValueError(
                f"state[{key!r}] must be finite in {dtype}, got {array[bad][0]} in {bad.sum()} of {bad.size} channels"
            )
        return array

    def __getstate__(self) -> dict[str, Any]:
        # A pickle or a deep copy is the layer, not the batch that it saw last.
        return self.__dict__ | {"_saved": None}

    def __repr__(self) -> str:
        options = "".join(f", activation={self.activation!r}" if self.activation else "")
        return (
            f"BatchNorm({self.num_features}, axis={self.axis}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, track_running_stats={self.track_running_stats}{options}, dtype={self.dtype}, "
            f"training={self.training})"
        )


def _state_count(value: ArrayLike) -> int:
    count = _layout.unmasked(value, "state['num_batches_tracked']")
    if count.shape != () or count.dtype.kind not in "iu" or not 0 <= count < 2**63:
        raise ValueError(f"state['num_batches_tracked'] must be a whole number >= 0, got {count!r}")
    return int(count)
