"""What all tests share. The judge is in oracle.py, its allowances in tolerances.py, the arrays in layouts.py."""

import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("NUMBA_NUM_THREADS", "8")  # read when Numba is imported: lets the tests ask for 7 threads
# Read when OpenMP is loaded. On a loaded machine waiting threads that spin make the suite take three times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside this file; importlib mode leaves it out

import hypothesis
import numpy as np
import pytest

import fastbn
from fastbn import _dispatch

hypothesis.settings.register_profile("fastbn", deadline=None, derandomize=True, database=None, print_blob=True)
hypothesis.settings.load_profile("fastbn")


def skip_unless_available(name):
    reason = _dispatch.why_unavailable(name)
    if reason:
        pytest.skip(reason)
    return name


@pytest.fixture(scope="session", params=["cython", "numba", "numpy"])
def backend(request):
    return skip_unless_available(request.param)


@pytest.fixture(scope="session", params=["cython", "numba"])
def compiled(request):
    return skip_unless_available(request.param)


@pytest.fixture(scope="session", params=["float32", "float64"])
def dtype(request):
    return np.dtype(request.param)


@pytest.fixture
def rng():
    return np.random.default_rng(20150211)


@pytest.fixture
def default_threads(monkeypatch):
    """The limits of threads as in a fresh process, restored afterwards."""
    monkeypatch.setattr(_dispatch, "_process_limit", None)
    monkeypatch.setattr(_dispatch, "_default", None)
    for name in ("FASTBN_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture
def run_python(tmp_path):
    """Runs code in a fresh interpreter that imports the same fastbn; returns what it printed."""

    def run(code, *arguments, status=0, timeout=120, **environment):
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("FASTBN_", "OMP_"))}
        process = subprocess.Popen(
            [sys.executable, *arguments] if code is None else [sys.executable, "-c", code, *arguments],
            env=inherited | {"PYTHONPATH": str(Path(fastbn.__file__).parents[1])} | environment, cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # its children, too, which may be what hangs
            process.communicate()
            raise
        assert process.returncode == status, f"exit status {process.returncode}\n{out}\n{err}"
        return subprocess.CompletedProcess(process.args, status, out, err)

    return run
