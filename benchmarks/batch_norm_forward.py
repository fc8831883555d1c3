"""Training forward."""

import tracemalloc

import numpy as np

import fastbn

from .common import ARRAYS, BACKENDS, MEANS, Timed, need, need_backend, normal, ratio_to_torch, ulps

LAYOUTS = {  # array, dtype, memory order
    "plain": ("62500x64", "float32", "C"),
    "float64": ("31250x64", "float64", "C"),
    "Fortran order": ("62500x64", "float32", "F"),
    "every other row": ("125000x64", "float32", "C"),
    "3 columns": ("1333333x3", "float32", "C"),
    "77 columns": ("51948x77", "float32", "C"),
}


class Forward(Timed):
    def prepare(self, backend):
        self.out = np.full_like(self.x, np.nan)
        fastbn.batch_norm(self.x[:2], self.gamma, self.beta, backend=backend)

    def time_out(self, backend, array):
        """Into a given array."""
        return self.calls(lambda: fastbn.batch_norm(self.x, self.gamma, self.beta, out=self.out, backend=backend))

    def time_fresh(self, backend, array):
        """As users call it."""
        return self.calls(lambda: fastbn.batch_norm(self.x, self.gamma, self.beta, backend=backend))

    def time_relu(self, backend, array):
        """With the ReLU fused."""
        return self.calls(lambda: fastbn.batch_norm(self.x, self.gamma, self.beta, activation="relu", backend=backend))


class Layouts(Timed):
    """Other memory layouts, dtypes and widths of 16 MB: none is to cost much more than the first."""

    params = (BACKENDS, tuple(LAYOUTS))
    param_names = ("backend", "layout")

    def setup(self, backend, layout):
        need_backend(backend)
        array, dtype, order = LAYOUTS[layout]
        self.x = normal(array, 3, dtype, order)
        if layout == "every other row":
            self.x = self.x[::2]
        self.gamma = self.beta = np.linspace(0.5, 2, self.x.shape[1]).astype(dtype)
        self.set_calls()
        self.prepare(backend)

    def prepare(self, backend):
        self.out = np.full_like(self.x, np.nan)
        fastbn.batch_norm(self.x[:2], self.gamma, self.beta, backend=backend)

    def time_out(self, backend, layout):
        """Into a given array."""
        return self.calls(lambda: fastbn.batch_norm(self.x, self.gamma, self.beta, out=self.out, backend=backend))


class Memory:
    array = "65536x256"
    params = (BACKENDS,)
    param_names = ("backend",)
    timeout = 300

    def setup(self, backend):
        need_backend(backend)
        self.x = normal(self.array, mean=3)
        fastbn.batch_norm(self.x[:2], backend=backend)

    def peakmem_setup_alone(self, backend):
        """The whole process without the call: what to take off from the next one."""

    def peakmem_fresh(self, backend):
        fastbn.batch_norm(self.x, backend=backend)

    def track_beside_output(self, backend):
        """Bytes that Python and NumPy allocate at the peak of a call, beside y."""
        fastbn.release_memory()  # so that y is new memory, which is counted
        tracemalloc.start()
        try:
            y, _ = fastbn.batch_norm(self.x, backend=backend)
            return tracemalloc.get_traced_memory()[1] - y.nbytes
        finally:
            tracemalloc.stop()

    track_beside_output.unit = "bytes"


class Accuracy:
    """The largest error of y; the standard deviation is 1."""

    params = (BACKENDS, MEANS)
    param_names = ("backend", "mean")
    timeout = 300

    def setup(self, backend, mean):
        need_backend(backend)
        self.x = (np.random.default_rng(0).standard_normal((20_000, 16)) + mean).astype(np.float32)

    def track_error(self, backend, mean):
        y, _ = fastbn.batch_norm(self.x, backend=backend)
        exact = self.x.astype(np.longdouble)
        exact -= exact.mean(0)
        exact /= np.sqrt((exact**2).mean(0) + np.longdouble(1e-5))
        return ulps(y, exact)

    track_error.unit = "ulp"


class RatioToTorch:
    """fastbn's time over PyTorch's, the same thread count, both with an array for the result."""

    params = (BACKENDS, ARRAYS[:3])
    param_names = ("backend", "array")
    timeout = 300

    def setup(self, backend, array):
        need("torch")
        need_backend(backend)

    def track_out(self, backend, array):
        return ratio_to_torch("forward-out", backend, array)

    track_out.unit = "of PyTorch's time"
