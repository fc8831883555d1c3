"""Inference: normalizing by given statistics."""

import numpy as np

import fastbn

from .common import Timed


class Inference(Timed):
    def prepare(self, backend):
        self.out = np.full_like(self.x, np.nan)
        rng = np.random.default_rng(1)
        self.mean = rng.uniform(2.9, 3.1, self.gamma.size)
        self.var = rng.uniform(0.9, 1.1, self.gamma.size)
        fastbn.batch_norm_inference(self.x[:2], self.mean, self.var, self.gamma, self.beta, backend=backend)

    def time_out(self, backend, array):
        """Into a given array."""
        return self.calls(
            lambda: fastbn.batch_norm_inference(
                self.x, self.mean, self.var, self.gamma, self.beta, out=self.out, backend=backend
            )
        )

    def time_fresh(self, backend, array):
        """As users call it."""
        return self.calls(
            lambda: fastbn.batch_norm_inference(self.x, self.mean, self.var, self.gamma, self.beta, backend=backend)
        )
