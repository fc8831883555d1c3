"""The layer: forward and backward."""

import fastbn

from .common import Timed


class Layer(Timed):
    def prepare(self, backend):
        self.layer = fastbn.BatchNorm(self.gamma.size, backend=backend)
        self.layer.gamma, self.layer.beta = self.gamma, self.beta
        self.layer(self.x[:2])
        self.layer.backward(self.grad_y[:2])

    def time_forward(self, backend, array):
        return self.calls(lambda: self.layer(self.x))

    def time_forward_backward(self, backend, array):
        def forward_backward():
            y = self.layer(self.x)
            return y, self.layer.backward(self.grad_y)

        return self.calls(forward_backward)
