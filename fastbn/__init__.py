"""fastbn: batch normalization for multicore CPUs.

The way of an array through the package, and where to look::

    caller's array (any memory order)
      -> functional.py, moments.py, layer.py   the public functions and the layer: the algorithm, no loops over data
      -> _layout.py                            validation, and the canonical view (outer, channels, inner)
      -> _memory.py                            large outputs, reused
      -> _dispatch.py, _forks.py               which backend, how many threads; what a fork asks of them
      -> kernels/                              cython_calls.pyx -> cython_kernels.pyx, and its twin: numba_calls.py ->
                                               numba_kernels.py; reference.py
      -> back up: y, gradients, statistics

``python -m fastbn`` (or ``fastbn``) is the command line: info, demo, bench, accuracy.
"""

from pathlib import Path as _Path

_here = _Path(__file__).parent
if (_here.parent / "setup.py").exists() and not any((_here / "kernels").glob("_cython_baseline.*[do]")):
    raise ImportError(
        f"this is fastbn's source tree ({_here.parent}), and its kernels are not compiled. To use fastbn, run "
        "'pip install .' there and start Python from another folder; to work on it, run 'pip install -e .'"
    )

from fastbn._config import show_config  # noqa: E402  (after the check above)
from fastbn._dispatch import (  # noqa: E402
    BackendUnavailableError,
    available_backends,
    get_num_threads,
    set_num_threads,
    thread_limit,
    warmup,
)
from fastbn._memory import release_memory, set_memory_limit  # noqa: E402
from fastbn.functional import Saved, batch_norm, batch_norm_backward, batch_norm_inference  # noqa: E402
from fastbn.layer import BatchNorm  # noqa: E402
from fastbn.moments import Moments, moments  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "BatchNorm",
    "Moments",
    "Saved",
    "available_backends",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_inference",
    "get_num_threads",
    "moments",
    "release_memory",
    "set_memory_limit",
    "set_num_threads",
    "show_config",
    "thread_limit",
    "warmup",
]
