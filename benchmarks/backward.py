"""Backward through the training forward."""

import numpy as np

import fastbn

from .common import ARRAYS, BACKENDS, MEANS, Timed, need, need_backend, normal, ratio_to_torch, ulps


class Backward(Timed):
    def prepare(self, backend):
        self.out = np.full_like(self.x, np.nan)
        self.saved = fastbn.batch_norm(self.x, self.gamma, self.beta, out=self.out, backend=backend)[1]
        few = fastbn.batch_norm(self.x[:2], self.gamma, self.beta, backend=backend)[1]
        fastbn.batch_norm_backward(self.grad_y[:2], few, backend=backend)

    def time_out(self, backend, array):
        """Into a given array."""
        return self.calls(
            lambda: fastbn.batch_norm_backward(self.grad_y, self.saved, out=self.out, backend=backend)
        )

    def time_fresh(self, backend, array):
        """As users call it."""
        return self.calls(lambda: fastbn.batch_norm_backward(self.grad_y, self.saved, backend=backend))


class Memory:
    array = "65536x256"
    params = (BACKENDS,)
    param_names = ("backend",)
    timeout = 300

    def setup(self, backend):
        need_backend(backend)
        self.grad_y = normal(self.array, mean=0)
        x = normal(self.array, mean=3)
        few = fastbn.batch_norm(x[:2], backend=backend)[1]
        fastbn.batch_norm_backward(self.grad_y[:2], few, backend=backend)
        self.saved = fastbn.batch_norm(x, out=np.full_like(x, np.nan), backend=backend)[1]

    def peakmem_setup_alone(self, backend):
        """The whole process without the call: what to take off from the next one."""

    def peakmem_fresh(self, backend):
        fastbn.batch_norm_backward(self.grad_y, self.saved, backend=backend)


class Accuracy:
    """The largest relative error of grad_gamma; the standard deviation of x is 1."""

    params = (BACKENDS, MEANS)
    param_names = ("backend", "mean")
    timeout = 300

    def setup(self, backend, mean):
        need_backend(backend)
        rng = np.random.default_rng(0)
        self.x = (rng.standard_normal((20_000, 16)) + mean).astype(np.float32)
        noise = rng.standard_normal((20_000, 16))
        self.grad_y = (noise + (self.x - mean)).astype(np.float32)  # so that grad_gamma is not near 0

    def track_grad_gamma_error(self, backend, mean):
        _, saved = fastbn.batch_norm(self.x, backend=backend)
        grad_gamma = fastbn.batch_norm_backward(self.grad_y, saved, backend=backend)[1]
        exact = self.x.astype(np.longdouble)
        exact -= exact.mean(0)
        exact /= np.sqrt((exact**2).mean(0) + np.longdouble(1e-5))
        return ulps(grad_gamma, (self.grad_y * exact).sum(0))

    track_grad_gamma_error.unit = "ulp"


class RatioToTorch:
    """fastbn's time over PyTorch's, the same thread count, both as users call them."""

    params = (BACKENDS, ARRAYS[:3])
    param_names = ("backend", "array")
    timeout = 300

    def setup(self, backend, array):
        need("torch")
        need_backend(backend)

    def track_fresh(self, backend, array):
        return ratio_to_torch("backward", backend, array)

    track_fresh.unit = "of PyTorch's time"
