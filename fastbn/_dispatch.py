"""Which backend runs, and on how many threads."""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import math
import operator
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from fastbn import _forks

BACKENDS = ("cython", "numba", "numpy")
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")  # in the order of cpu_level()


class BackendUnavailableError(ImportError):
    """A backend was asked for by name and cannot run here; the message says why."""


class BadSetting(ValueError):
    """An environment variable that cannot be followed; the message says which, and what it may be."""


# ------------------------------------------------------------------------------------------------------- backends

_loaded: dict[str, ModuleType] = {}
_auto: ModuleType | None = None


def kernels(backend: str | None) -> ModuleType:
    """The kernels of a backend. None and "auto": Cython, else Numba, else (with a warning) the NumPy reference."""
    global _auto
    if backend is None or backend == "auto":
        if _auto is None:
            _auto = _choose()
        return _auto
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {backend!r}")
    return _load(backend)


def _choose() -> ModuleType:
    reasons = []
    for name in ("cython", "numba"):
        try:
            return _load(name)
        except BackendUnavailableError as error:
            reasons.append(str(error))
    warnings.warn(
        "fastbn falls back to its NumPy reference, which is many times slower: " + "; ".join(reasons),
        RuntimeWarning,
        stacklevel=4,
    )
    return _load("numpy")


def _load(name: str) -> ModuleType:
    if name not in _loaded:
        with _forks.first_use:
            module = _cython_module() if name == "cython" else {"numba": "numba_calls", "numpy": "reference"}[name]
            try:
                _loaded[name] = importlib.import_module(f"fastbn.kernels.{module}")
            except ImportError as error:
                remedy = "pip install 'fastbn[numba]'" if name == "numba" else "reinstall fastbn where a C compiler is"
                raise BackendUnavailableError(f"backend {name!r} is not available ({error}); {remedy}") from error
    return _loaded[name]


def _baseline() -> ModuleType:
    try:
        return importlib.import_module("fastbn.kernels._cython_baseline")
    except ImportError as error:
        raise BackendUnavailableError(
            f"backend 'cython' is not available ({error}); reinstall fastbn where a C compiler is"
        ) from error


def _cython_module() -> str:
    return f"_cython_{instruction_set()['chosen']}"


def instruction_set() -> dict[str, Any]:
    """The instruction sets compiled, the widest that this processor has, those that are both, and the one chosen
    (FASTBN_ISA= lowers it)."""
    folder = Path(__file__).parent / "kernels"
    compiled = [name for name in INSTRUCTION_SETS if any(folder.glob(f"_cython_{name}.*.so"))
                or any(folder.glob(f"_cython_{name}.*.pyd"))]
    found = INSTRUCTION_SETS[: _baseline().cpu_level() + 1]
    usable = [name for name in found if name in compiled]
    forced = os.environ.get("FASTBN_ISA")
    if forced and forced not in usable:
        raise BadSetting(f"FASTBN_ISA must be one of {tuple(usable)} on this machine, got {forced!r}")
    return {"compiled": compiled, "found": found[-1], "usable": usable, "chosen": forced or usable[-1],
            "forced": bool(forced)}


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run here, best first.

    Returns
    -------
    tuple of str
        A subset of ``("cython", "numba", "numpy")``; "numpy" is always there.
    """
    return tuple(name for name in BACKENDS if why_unavailable(name) is None)


def why_unavailable(name: str) -> str | None:
    """None for a backend that runs here, else the reason why it does not."""
    try:
        _load(name)
    except BackendUnavailableError as error:
        return str(error)
    return None


def warmup(backend: str | None = None) -> None:
    """Do now what the first call would have to wait for: load the kernels, compile Numba's, start the threads.

    Parameters
    ----------
    backend : {None, "auto", "cython", "numba", "numpy"}
        As in `fastbn.batch_norm`.
    """
    chosen = kernels(backend)
    if hasattr(chosen, "warmup"):
        chosen.warmup()
    x = np.ones((4096, 64, 1), np.float32)  # large enough to be shared among threads
    chosen.moments(x, *np.empty((3, 64)), thread_count())


# -------------------------------------------------------------------------------------------------------- threads

_process_limit: int | None = None  # what set_num_threads was given
_scope_limit: contextvars.ContextVar[int | None] = contextvars.ContextVar("fastbn_thread_limit", default=None)
_default: tuple[int, str] | None = None


def thread_count(num_threads: int | None = None) -> int:
    """The limit for one call: the argument, else thread_limit, else set_num_threads, else the default."""
    if num_threads is not None:
        num_threads = positive(num_threads, "num_threads")
    if _forks.in_child:
        return 1
    return num_threads or _scope_limit.get() or _process_limit or default_threads()[0]


def thread_source() -> str:
    """Where thread_count() comes from, in words."""
    if _forks.in_child:
        return "a forked child runs on one thread"
    if _scope_limit.get():
        return "thread_limit"
    return "set_num_threads" if _process_limit else default_threads()[1]


def positive(n: int, name: str) -> int:
    try:
        value = operator.index(n)
    except TypeError:
        raise TypeError(f"{name} must be an integer >= 1, got {n!r}") from None
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")
    return min(value, 2**31 - 1)  # a C int


def set_num_threads(n: int) -> None:
    """Set how many threads a call may use, for the whole process.

    Parameters
    ----------
    n : int
        At least 1. It is an upper limit: small arrays use fewer. The bits of the results do not depend on it.

    Raises
    ------
    TypeError, ValueError
        If n is not an integer >= 1.
    """
    global _process_limit
    _process_limit = positive(n, "n")


def get_num_threads() -> int:
    """How many threads a call may use here and now.

    By default the least of the processors that this process may run on (CPU affinity) and the cgroup's CPU quota,
    unless FASTBN_NUM_THREADS or OMP_NUM_THREADS is set. In a child of os.fork it is 1, see docs/threads.md.

    Returns
    -------
    int
    """
    return thread_count()


@contextlib.contextmanager
def thread_limit(n: int) -> Iterator[None]:
    """Limit the threads of the calls inside a ``with`` block, for the current thread or task only.

    Parameters
    ----------
    n : int
        At least 1.

    Examples
    --------
    >>> with fastbn.thread_limit(1):
    ...     fastbn.get_num_threads()
    1
    """
    token = _scope_limit.set(positive(n, "n"))
    try:
        yield
    finally:
        _scope_limit.reset(token)


def default_threads() -> tuple[int, str]:
    """The number of threads that the environment grants, and where it came from."""
    global _default
    if _default is None:
        _default = _environment_threads() or min(_affinity(), _cgroup_quota())
    return _default


def _environment_threads() -> tuple[int, str] | None:
    for name in ("FASTBN_NUM_THREADS", "OMP_NUM_THREADS"):
        value = os.environ.get(name, "").split(",")[0].strip()  # OMP_NUM_THREADS may list one number per nesting level
        if value.isdecimal() and int(value) > 0:
            return positive(int(value), name), name
        if value:
            warnings.warn(f"{name} must be a whole number >= 1, got {value!r}; ignored", RuntimeWarning, stacklevel=2)
    return None


def _affinity() -> tuple[int, str]:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)), "CPU affinity"
    return os.cpu_count() or 1, "CPU count"


def _cgroup_quota(root: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> tuple[int, str]:
    """The CPU quota of this process's cgroup (version 2, else 1) and of its parents, rounded up; huge without one."""
    def read(path: Path) -> str:
        try:
            return path.read_text().strip()
        except OSError:
            return ""

    least = sys.maxsize
    for line in read(process).splitlines() or ["0::/"]:
        _, controllers, group = line.split(":", 2)
        if controllers not in ("", "cpu", "cpu,cpuacct", "cpuacct,cpu"):
            continue
        folder = root / "cpu" if controllers else root
        for path in (folder / group.strip("/"), *(folder / group.strip("/")).parents):
            if controllers:
                quota, period = read(path / "cpu.cfs_quota_us"), read(path / "cpu.cfs_period_us")
            else:
                quota, _, period = read(path / "cpu.max").partition(" ")
            if quota.isdecimal() and period.isdecimal() and int(quota) > 0 and int(period) > 0:
                least = min(least, math.ceil(int(quota) / int(period)))
            if path == root:
                break
    return least, "cgroup quota"
