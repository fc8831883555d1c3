"""Column means and variances."""

import numpy as np

import fastbn

from .common import BACKENDS, MEANS, Timed, need, need_backend, normal, ratio, ulps

KINDS = ("float32", "float64", "float32, Fortran order")


class Moments(Timed):
    params = (BACKENDS, ("1000000x20", "1000000x64"), KINDS)
    param_names = ("backend", "array", "kind")

    def setup(self, backend, array, kind):
        need_backend(backend)
        self.x = normal(array, 3, kind.split(",")[0], "F" if "Fortran" in kind else "C")
        self.set_calls()
        fastbn.moments(self.x[:2], backend=backend)

    def time_moments(self, backend, array, kind):
        return self.calls(lambda: fastbn.moments(self.x, backend=backend))


class Accuracy:
    """The largest error of the variance; the standard deviation is 1."""

    params = (BACKENDS, MEANS)
    param_names = ("backend", "mean")
    timeout = 300

    def setup(self, backend, mean):
        need_backend(backend)
        self.x = (np.random.default_rng(0).standard_normal((20_000, 16)) + mean).astype(np.float32)

    def track_var_error(self, backend, mean):
        exact = self.x.astype(np.longdouble)
        return ulps(fastbn.moments(self.x, backend=backend).var(), exact.var(0))

    track_var_error.unit = "ulp of float64"


class RatioToNumPy:
    """fastbn's time over NumPy's."""

    array = "1000000x20"
    params = (BACKENDS,)
    param_names = ("backend",)
    timeout = 300

    def setup(self, backend):
        need_backend(backend)
        self.x = normal(self.array, mean=3)

    def track_mean_var(self, backend):
        return ratio(
            lambda: fastbn.moments(self.x, backend=backend), lambda: (self.x.mean(0), self.x.var(0)), rounds=3
        )

    track_mean_var.unit = "of NumPy's time"


class RatioToScikitLearn:
    """fastbn's time over StandardScaler's."""

    array = "1000000x20"
    params = (BACKENDS,)
    param_names = ("backend",)
    timeout = 300

    def setup(self, backend):
        need("sklearn.preprocessing")
        need_backend(backend)
        self.x = normal(self.array, mean=3)

    def track_fit(self, backend):
        from sklearn.preprocessing import StandardScaler

        scaler = StandardScaler()
        return ratio(lambda: fastbn.moments(self.x, backend=backend), lambda: scaler.fit(self.x), rounds=3)

    track_fit.unit = "of scikit-learn's time"
