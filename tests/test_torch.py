"""The same as PyTorch on the CPU: forward, backward, eval, running statistics, state; torch itself left as it was."""

import numpy as np
import pytest
from tolerances import assert_close

import fastbn

torch = pytest.importorskip("torch", reason="PyTorch is not installed (pip install torch==2.13.0)")

SHAPES = {2: (96, 20), 3: (16, 6, 25), 4: (8, 5, 7, 9), 5: (4, 3, 3, 4, 5)}
MODULES = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d, 5: torch.nn.BatchNorm3d}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread():
    """The arrays are small; more threads would only fight for the processors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batches(rng, ndim, dtype, n=3):
    return [rng.normal(0.5 * i, 1 + i, SHAPES[ndim]).astype(dtype) for i in range(n)]


def pair(ndim, dtype, rng, backend=None, **options):
    """The two layers, with the same gamma and beta."""
    channels = SHAPES[ndim][1]
    theirs = MODULES[ndim](channels, dtype=torch.float64 if dtype == np.float64 else torch.float32, **options)
    ours = fastbn.BatchNorm(channels, dtype=dtype, backend=backend, **options)
    if theirs.affine:
        ours.gamma, ours.beta = rng.uniform(0.5, 2, channels).astype(dtype), rng.uniform(-1, 1, channels).astype(dtype)
        with torch.no_grad():
            theirs.weight.copy_(torch.from_numpy(ours.gamma))
            theirs.bias.copy_(torch.from_numpy(ours.beta))
    return ours, theirs


def assert_as_torch(actual, tensor, dtype):
    expected = tensor.detach().numpy()
    assert_close(actual, expected, "torch", dtype, np.abs(expected).max())


def step(ours, theirs, x, rng, dtype, memory_format=torch.contiguous_format):
    """Forward and backward of both on one batch."""
    tensor = torch.from_numpy(x).contiguous(memory_format=memory_format)
    x = tensor.numpy()
    tensor.requires_grad_()
    grad_y = rng.standard_normal(x.shape).astype(dtype)
    y = theirs(tensor)
    theirs.zero_grad()
    y.backward(torch.from_numpy(grad_y))
    assert_as_torch(ours(x), y, dtype)
    assert_as_torch(ours.backward(grad_y), tensor.grad, dtype)
    if theirs.affine:
        assert_as_torch(ours.grad_gamma, theirs.weight.grad, dtype)
        assert_as_torch(ours.grad_beta, theirs.bias.grad, dtype)
    else:
        assert ours.grad_gamma is None
    if theirs.track_running_stats:
        assert_as_torch(ours.running_mean, theirs.running_mean, dtype)
        assert_as_torch(ours.running_var, theirs.running_var, dtype)
        assert ours.num_batches_tracked == theirs.num_batches_tracked.item()
    else:
        assert ours.running_mean is None
        assert theirs.running_mean is None


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.1, "momentum": 0.7}],
    ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()) or "defaults",
)
@pytest.mark.parametrize("ndim", SHAPES)
def test_layer(backend, dtype, rng, ndim, options, training):
    ours, theirs = pair(ndim, dtype, rng, backend, **options)
    for x in batches(rng, ndim, dtype):
        step(ours, theirs, x, rng, dtype)
    ours.train(training)
    theirs.train(training)
    for x in batches(rng, ndim, dtype, n=2):
        step(ours, theirs, x, rng, dtype)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("ndim", LAST)
def test_channels_last(backend, dtype, rng, ndim, training):
    ours, theirs = pair(ndim, dtype, rng, backend)
    ours.train(training)
    theirs.train(training)
    for x in batches(rng, ndim, dtype):
        step(ours, theirs, x, rng, dtype, memory_format=LAST[ndim])


def test_fused_relu_is_batch_norm_then_relu(backend, dtype, rng):
    ours, theirs = pair(4, dtype, rng, backend)
    ours.activation = "relu"
    theirs.register_forward_hook(lambda module, inputs, y: torch.relu(y))
    for x in batches(rng, 4, dtype):
        step(ours, theirs, x, rng, dtype)


def test_functional(backend, dtype, rng):
    x = batches(rng, 2, dtype)[0]
    mean, var = rng.standard_normal(20).astype(dtype), rng.uniform(1, 2, 20).astype(dtype)
    theirs = torch.nn.functional.batch_norm(*(torch.from_numpy(a) for a in (x, mean, var)), eps=1e-3)
    assert_as_torch(fastbn.batch_norm_inference(x, mean, var, eps=1e-3, backend=backend), theirs, dtype)


def test_state_from_torch_and_back(dtype, rng):
    ours, theirs = pair(2, dtype, rng)
    for x in batches(rng, 2, dtype):
        theirs(torch.from_numpy(x))
    state = {key: value.numpy() for key, value in theirs.state_dict().items()}
    assert list(ours.state_dict()) == list(state)
    ours.load_state_dict(state)
    assert ours.num_batches_tracked == 3
    x = batches(rng, 2, dtype, n=5)[4]
    assert_as_torch(ours.eval()(x), theirs.eval()(torch.from_numpy(x)), dtype)

    back = torch.nn.BatchNorm1d(20, dtype=theirs.weight.dtype)
    ours.train()(x)
    back.load_state_dict({key: torch.from_numpy(value) for key, value in ours.state_dict().items()})
    assert back.num_batches_tracked.item() == 4
    assert_as_torch(ours.eval()(x), back.eval()(torch.from_numpy(x)), dtype)


def test_state_may_be_tensors(rng):
    ours, theirs = pair(2, np.float32, rng)
    theirs(torch.from_numpy(batches(rng, 2, np.float32)[1]))
    ours.load_state_dict({key: value.detach() for key, value in theirs.state_dict().items()})
    np.testing.assert_array_equal(ours.running_mean, theirs.running_mean.numpy())


def test_empty_batch_as_torch(backend):
    ours, theirs = fastbn.BatchNorm(3, backend=backend), torch.nn.BatchNorm1d(3)
    assert ours(np.empty((0, 3), np.float32)).shape == tuple(theirs(torch.empty(0, 3)).shape)
    np.testing.assert_array_equal(ours.running_mean, theirs.running_mean.numpy())
    np.testing.assert_array_equal(ours.running_var, theirs.running_var.numpy())


def test_one_value_per_channel_as_torch():
    for layer, x in ((fastbn.BatchNorm(3), np.ones((1, 3))), (torch.nn.BatchNorm1d(3), torch.ones(1, 3))):
        with pytest.raises(ValueError, match=r"more than (one|1) value per channel"):
            layer(x)


def test_torch_s_thread_count_is_left_alone(backend, rng):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with fastbn.thread_limit(1):
            fastbn.batch_norm(rng.standard_normal((5000, 64)), num_threads=7, backend=backend)
            assert torch.get_num_threads() == 2
        before = fastbn.get_num_threads()
        torch.set_num_threads(1)
        assert fastbn.get_num_threads() == before
    finally:
        torch.set_num_threads(threads)
