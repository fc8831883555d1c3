"""PyTorch's own tests of batch norm, run against fastbn: the samples of its operators and modules (OpInfo, ModuleInfo).

Each sample's forward, gradients and running statistics must be PyTorch's. What has no counterpart is listed, with what
fastbn says to it:

- x of one dimension, shape (0,): fastbn wants (batch, channels, ...), ValueError;
- momentum outside [0, 1] in training, which extrapolates the running statistics: ValueError by the layer; the rest of
  the sample is run;
- the variant without cuDNN: the samples are the same, and there is one kernel on the CPU;
- forward-mode gradients, gradients of gradients, other devices and dtypes than float32 and float64: not offered.
"""

import numpy as np
import pytest
from tolerances import assert_close

import fastbn

torch = pytest.importorskip("torch", reason="PyTorch is not installed (pip install torch==2.13.0)")

OPERATORS = {  # names of the arguments behind x, in order
    "nn.functional.batch_norm": ["running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"],
    "native_batch_norm": ["weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"],
    "_native_batch_norm_legit": ["weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"],
    "_batch_norm_with_update": ["weight", "bias", "running_mean", "running_var", "momentum", "eps"],
}
WITHOUT_STATISTICS = ["weight", "bias", "training", "momentum", "eps"]  # _native_batch_norm_legit.no_stats
DEFAULTS = {"weight": None, "bias": None, "running_mean": None, "running_var": None, "momentum": 0.1, "eps": 1e-5}
SAMPLES = {  # how many each operator has at the least, and how many of those have no counterpart
    "nn.functional.batch_norm": (12, 2),
    "native_batch_norm": (10, 0),
    "_native_batch_norm_legit": (10, 0),
    "_batch_norm_with_update": (9, 0),
}
MODULES = {"nn.BatchNorm1d": 8, "nn.BatchNorm2d": 7, "nn.BatchNorm3d": 7}  # how many samples each has at the least


@pytest.fixture(scope="module")
def databases():
    """PyTorch's internal tables, imported late: the import takes seconds."""
    pytest.importorskip("expecttest", reason="PyTorch's samples need expecttest (pip install expecttest)")
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

    return op_db, module_db


def array(tensor):
    return None if tensor is None else tensor.detach().numpy().copy()


def assert_as_torch(actual, tensor, dtype, terms=0):
    expected = tensor.detach().numpy()
    assert_close(actual, expected, "torch", dtype, max(np.abs(expected).max(initial=0), terms))


def compare(layer, x, y, weight, bias):
    """Forward and backward of the layer beside PyTorch's y, and its gradients by autograd."""
    dtype = y.detach().numpy().dtype
    grad_y = torch.from_numpy(np.random.default_rng(3).standard_normal(tuple(y.shape)).astype(dtype))
    inputs = [tensor for tensor in (x, weight, bias) if tensor is not None]
    gradients = list(torch.autograd.grad(y, inputs, grad_y))
    assert_as_torch(layer(array(x)), y, dtype)
    # Of two values a channel a gradient of 0 is left, up to the rounding of the terms that cancel, PyTorch's too.
    two_values = y.numel() == 2 * y.shape[1]
    terms = np.abs(grad_y.numpy()).max() * np.abs(layer._saved.coefs[1]).max() if two_values else 0
    assert_as_torch(layer.backward(grad_y.numpy()), gradients.pop(0), dtype, terms)
    for ours, parameter in ((layer.grad_gamma, weight), (layer.grad_beta, bias)):
        if parameter is not None:
            assert_as_torch(ours, gradients.pop(0), dtype)


def layer_like(channels, weight, bias, running_mean, running_var, momentum, eps, dtype, backend):
    """A layer with these parameters, which may be missing."""
    layer = fastbn.BatchNorm(
        channels, eps=eps, momentum=momentum, affine=weight is not None or bias is not None,
        track_running_stats=running_mean is not None, dtype=dtype, backend=backend,
    )
    state = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    layer.load_state_dict(layer.state_dict() | {key: array(value) for key, value in state.items() if value is not None})
    return layer


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_samples(compiled, dtype, databases, name):
    info = next(info for info in databases[0] if info.name == name and not info.variant_test_name)
    n_samples = n_refused = 0
    for sample in info.sample_inputs("cpu", getattr(torch, dtype.name), requires_grad=True):
        n_samples += 1
        names = OPERATORS[name] if len(sample.args) != len(WITHOUT_STATISTICS) else WITHOUT_STATISTICS
        given = DEFAULTS | {"training": name == "_batch_norm_with_update"}
        given |= dict(zip(names, sample.args, strict=False)) | sample.kwargs
        training, momentum, x = given.pop("training"), given.pop("momentum"), sample.input
        if x.ndim < 2:
            n_refused += 1
            with pytest.raises(ValueError, match="at least 2 dimensions"):
                fastbn.batch_norm(array(x), backend=compiled)
            continue
        channels, within = x.shape[1], 0 <= momentum <= 1
        layer = layer_like(channels, **given, momentum=momentum if within else 0, dtype=dtype, backend=compiled)
        if not within:
            with pytest.raises(ValueError, match="momentum must be a number in"):
                fastbn.BatchNorm(channels, momentum=momentum)
        y = info(x, *sample.args, **sample.kwargs)  # updates the running statistics
        y = y if isinstance(y, torch.Tensor) else y[0]
        compare(layer.train(training), x, y, given["weight"], given["bias"])
        if given["running_mean"] is not None and (within or not training):
            assert_as_torch(layer.running_mean, given["running_mean"], dtype)
            assert_as_torch(layer.running_var, given["running_var"], dtype)
    assert n_samples >= SAMPLES[name][0]
    assert n_refused == SAMPLES[name][1]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_module_samples(compiled, dtype, databases, name, training):
    info = next(info for info in databases[1] if info.name == name)
    torch_dtype, n_samples = getattr(torch, dtype.name), 0
    for sample in info.module_inputs_func(info, "cpu", torch_dtype, requires_grad=True, training=training):
        n_samples += 1
        arguments = sample.constructor_input
        module = info.module_cls(*arguments.args, **arguments.kwargs, dtype=torch_dtype).train(training)
        (x,) = sample.forward_input.args
        layer = layer_like(
            module.num_features, module.weight, module.bias, module.running_mean, module.running_var,
            module.momentum, module.eps, dtype, compiled,
        )
        compare(layer.train(training), x, module(x), module.weight, module.bias)
        if module.track_running_stats:
            assert_as_torch(layer.running_mean, module.running_mean, dtype)
            assert_as_torch(layer.running_var, module.running_var, dtype)
    assert n_samples >= MODULES[name]


def test_no_operator_is_forgotten(databases):
    """The backward has no samples of its own; whatever else has must be above."""
    found = {info.name for info in databases[0] if "batch_norm" in info.name}
    assert found == set(OPERATORS)
    assert {info.name for info in databases[1] if "BatchNorm" in info.name} == set(MODULES)
