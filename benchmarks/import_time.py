"""What a program waits for before its first result. Each measurement is a process of its own."""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import fastbn

from .common import BACKENDS, need_backend

IMPORT = "import time, numpy; t = time.perf_counter(); import fastbn; print(time.perf_counter() - t)"
FIRST_CALL = """
import time, numpy, fastbn
x = numpy.random.default_rng(0).standard_normal((256, 64), "float32")
t = time.perf_counter()
y, saved = fastbn.batch_norm(x, backend={backend!r})
fastbn.batch_norm_backward(x, saved, backend={backend!r})
print(time.perf_counter() - t)
"""


def seconds(program, **environment):
    """What a program prints, run with the fastbn that is imported here."""
    environment = {**os.environ, "PYTHONPATH": str(Path(fastbn.__file__).parents[1]), **environment}
    command = [sys.executable, "-P", "-c", program]  # -P: not the source folder that it may be started in
    return float(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


def track_import_over_numpy():
    """Importing fastbn where NumPy is there already."""
    return statistics.median(seconds(IMPORT) for _ in range(7))


track_import_over_numpy.unit = "seconds"


class FirstCall:
    """The first forward and backward of a process."""

    params = (BACKENDS,)
    param_names = ("backend",)
    timeout = 600

    def setup(self, backend):
        need_backend(backend)

    def track_first_ever(self, backend):
        """With an empty cache of compiled code: Numba compiles."""
        with tempfile.TemporaryDirectory() as folder:
            return seconds(FIRST_CALL.format(backend=backend), NUMBA_CACHE_DIR=folder)

    def track_first_in_process(self, backend):
        """With what an earlier process left in the cache."""
        with tempfile.TemporaryDirectory() as folder:
            return [seconds(FIRST_CALL.format(backend=backend), NUMBA_CACHE_DIR=folder) for _ in range(2)][1]

    track_first_ever.unit = track_first_in_process.unit = "seconds"
