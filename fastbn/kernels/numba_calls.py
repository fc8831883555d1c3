"""What Python calls of the Numba kernels; it starts the loops of numba_kernels.py. cython_calls.pyx is its twin,
kernels/__init__.py holds the contract.

Read it downwards: the teams of threads, the drivers (the stages of a call), and what Python calls. Nothing is compiled
at import, but on the first call for a dtype; warmup() compiles everything.
"""

import functools
import hashlib
import math
import threading
from pathlib import Path

import numba
import numpy as np
from numba import cfunc, njit, prange, types

from fastbn import _forks, _layout, _memory
from fastbn.kernels.numba_kernels import (
    JOBS,
    SERIAL_BYTES,
    SERIAL_MERGES,
    STREAM_BYTES,
    Part,
    Plan,
    add_worker,
    affine_worker,
    grad_affine_worker,
    grad_moments_worker,
    gradient_worker,
    has_own_tiles,
    make_plan,
    merge_worker,
    moments_worker,
    normalize_worker,
    team_wanted,
)
from fastbn.kernels.numba_machine import (
    OPTIONS,
    address,
    at,
    call_at,
    data,
    helper,
    integer_at,
    splice,
    stored,
)

# ---------------------------------------------------------------------------------------------------------------------
# Teams: a call is a few stages, each of a worker's address, its job's address, and 1 if it is worth a team, else 0.
# Where tiles divide about evenly and are not strips of many rows, a thread has its own and takes them one by one
# through all the stages: nobody waits, there is one parallel region, and a tile that fits its cache is read from memory
# once (32x256x14x14: forward 17 %, backward 23 %). Otherwise the threads share all tiles, in a region for each stage.
# Either way, if there are chunks enough, a thread gets about the same data in both passes, in the second in reverse
# order. There is no barrier inside a region: its threads may run one after the other.
# ---------------------------------------------------------------------------------------------------------------------

@helper
def run_stages(stages, first, last, part):
    for stage in range(first, last):
        call_at(integer_at(stages, 3 * stage), stored(part), integer_at(stages, 3 * stage + 1))


@helper
def run_worker(stages, first, last, n_tiles, own, rank, size):
    """What one thread does of stages `first` up to `last`."""
    if own:
        for tile in range(n_tiles * rank // size, n_tiles * (rank + 1) // size):
            run_stages(stages, first, last, Part(tile, 1, 0, 1))
    else:
        run_stages(stages, first, last, Part(0, n_tiles, rank, size))


@njit(**OPTIONS, parallel=True)
def run_team(stages, first, last, n_tiles, own, n_workers):
    for worker in prange(n_workers):
        run_worker(stages, first, last, n_tiles, own, np.int64(worker), n_workers)


@helper
def run(plan, n_workers, stages):
    n_stages = len(stages)
    own = has_own_tiles(plan, n_workers)
    at_stages = stored(stages)
    if n_workers == 1:  # enters no parallel region, which a child of fork must not
        run_worker(at_stages, 0, n_stages, plan.n_tiles, own, 0, 1)
    elif own:
        run_team(at_stages, 0, n_stages, plan.n_tiles, own, n_workers)
    else:
        for i in range(n_stages):
            if stages[i][2]:
                run_team(at_stages, i, i + 1, plan.n_tiles, own, n_workers)
            else:
                run_worker(at_stages, i, i + 1, plan.n_tiles, own, 0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Drivers: scratch memory and the stages of a call. A driver returns the size of its scratch memory, so that Numba keeps
# it so long; or False, with nothing done, where a variance is negative or the output lies partly over an input.
# ---------------------------------------------------------------------------------------------------------------------

@helper
def stride_of(x):
    return x.strides[0] // x.itemsize


@helper
def same(x, y):
    return address(data(x)) == address(data(y))


@helper
def is_contiguous(a):
    """Of an array whose axes are so but perhaps for the first, which, of length 1, may have any stride."""
    return a.shape[0] == 1 or a.shape[0] * a.strides[0] == a.size * a.itemsize


@helper
def overlap(a, b):
    """Whether contiguous arrays share memory; of others _layout.py has seen to it that they do not. NumPy, asked array
    by array, took a third of the time that Python takes around a call."""
    start_a, start_b = address(data(a)), address(data(b))
    end_a, end_b = start_a + a.size * a.itemsize, start_b + b.size * b.itemsize
    return start_a < end_b and start_b < end_a and is_contiguous(a) and is_contiguous(b)


@helper
def partly(out, x):
    """Whether they overlap and are not the same."""
    return overlap(out, x) and not same(out, x)


@helper
def streams(out, n_arrays, in_place):
    """Whether the output is to bypass the caches: with the inputs it would not fit, and it is not the input, whose
    lines are there."""
    return not in_place and n_arrays * out.size * out.itemsize >= STREAM_BYTES


@helper
def plan_of(x, n_inputs):
    outer, channels, inner = x.shape
    return make_plan(outer, channels, inner, x.itemsize, n_inputs)


# The stages, with their jobs, which lie on the driver's stack.

@splice
def moments_stage(worker, x, plan, partial):
    return worker, stored((data(x), stride_of(x), plan, data(partial))), 1


@splice
def merge_stage(worker, plan, n_workers, partial):
    n_summing = 1 if has_own_tiles(plan, n_workers) else n_workers
    return worker, stored((plan, n_summing, data(partial))), int(n_summing * plan.channels >= SERIAL_MERGES)


@splice
def normalize_stage(worker, plan, mean, rest, has_rest, m2, n, gamma, beta, eps, stats, coefs):
    return worker, stored((
        plan, mean, rest, has_rest, m2, n, data(gamma), gamma.size > 0, data(beta), beta.size > 0, eps,
        data(stats), data(coefs))), int(plan.channels >= SERIAL_MERGES)


@splice
def affine_stage(worker, x, plan, coefs, relu, out):
    return worker, stored((
        data(x), stride_of(x), plan, data(coefs), relu, streams(out, 2, same(out, x)), data(out), stride_of(out))), 1


@splice
def grad_moments_stage(worker, dy, x, plan, mean, coefs, relu, partial):
    return worker, stored((
        data(dy), stride_of(dy), data(x), stride_of(x), plan, data(mean), data(coefs), relu, data(partial))), 1


@splice
def gradient_stage(worker, plan, partial, stats, coefs, training, linear, grads):
    return worker, stored((
        plan, data(partial), data(stats), data(coefs), training, data(linear), data(grads),
    )), int(plan.channels >= SERIAL_MERGES)


@splice
def grad_affine_stage(worker, dy, x, plan, coefs, linear, relu, training, out):
    return worker, stored((
        data(dy), stride_of(dy), data(x), stride_of(x), plan, data(coefs), linear, relu, training,
        streams(out, 3, same(out, dy)), data(out), stride_of(out))), 1


def run_moments(moments, merge, x, mean, rest, m2, num_threads):
    plan = plan_of(x, 1)
    n_workers = team_wanted(plan, x.itemsize, num_threads)
    partial = np.empty((plan.n_chunks, 3, plan.channels))  # mean, rest, m2; the result ends up in chunk 0
    run(plan, n_workers, (
        moments_stage(moments, x, plan, partial),
        merge_stage(merge, plan, n_workers, partial)))
    for c in range(plan.channels):
        data(mean)[c] = partial[0, 0, c]
        data(rest)[c] = partial[0, 1, c]
        data(m2)[c] = partial[0, 2, c]
    return partial.size


def run_affine(affine, x, coefs, relu, out, num_threads):
    plan = plan_of(x, 1)
    run(plan, team_wanted(plan, x.itemsize, num_threads), (affine_stage(affine, x, plan, coefs, relu, out),))


def run_batch_norm(
    moments, merge, normalize, affine, x,
    gamma,      # IN   (channels,), or empty: ones
    beta,       # IN   (channels,), or empty: zeros
    eps, relu, out, stats, coefs, num_threads,
):
    if partly(out, x) or overlap(out, gamma) or overlap(out, beta):
        return False
    plan = plan_of(x, 1)
    n_workers = team_wanted(plan, x.itemsize, num_threads)
    partial = np.empty((plan.n_chunks, 3, plan.channels))
    mean, rest, m2 = data(partial), at(data(partial), plan.channels), at(data(partial), 2 * plan.channels)
    run(plan, n_workers, (
        moments_stage(moments, x, plan, partial),
        merge_stage(merge, plan, n_workers, partial),
        normalize_stage(normalize, plan, mean, rest, True, m2, float(plan.outer * plan.inner), gamma, beta, eps,
                        stats, coefs),
        affine_stage(affine, x, plan, coefs, relu, out)))
    return partial.size


def run_inference(normalize, affine, x, mean, var, gamma, beta, eps, relu, out, stats, coefs, num_threads):
    if partly(out, x) or overlap(out, mean) or overlap(out, var) or overlap(out, gamma) or overlap(out, beta):
        return False
    plan = plan_of(x, 1)
    for c in range(plan.channels):
        if data(var)[c] < 0:
            return False
    run(plan, team_wanted(plan, x.itemsize, num_threads), (
        normalize_stage(normalize, plan, data(mean), data(mean), False, data(var), 1.0, gamma, beta, eps,
                        stats, coefs),
        affine_stage(affine, x, plan, coefs, relu, out)))
    return True


def run_grad_moments(grad_moments, add, dy, x, mean, coefs, relu, sum_dy, sum_dy_xmu, num_threads):
    plan = plan_of(x, 2)
    n_workers = team_wanted(plan, 2 * x.itemsize, num_threads)
    partial = np.empty((plan.n_chunks, 2, plan.channels))  # sum_dy, sum_dy_xmu; likewise
    run(plan, n_workers, (
        grad_moments_stage(grad_moments, dy, x, plan, mean, coefs, relu, partial),
        merge_stage(add, plan, n_workers, partial)))
    for c in range(plan.channels):
        data(sum_dy)[c] = partial[0, 0, c]
        data(sum_dy_xmu)[c] = partial[0, 1, c]
    return partial.size


def run_grad_affine(grad_affine, dy, x, coefs, linear, relu, out, num_threads):
    plan = plan_of(x, 2)
    run(plan, team_wanted(plan, 2 * x.itemsize, num_threads), (
        grad_affine_stage(grad_affine, dy, x, plan, coefs, data(linear), relu, True, out),))


def run_batch_norm_backward(
    grad_moments, add, gradient, grad_affine, dy, x, stats, coefs, relu, training, out, grads, num_threads,
):
    if partly(out, dy) or overlap(out, x):
        return False
    plan = plan_of(x, 2)
    n_workers = team_wanted(plan, 2 * x.itemsize, num_threads)
    partial = np.empty((plan.n_chunks, 2, plan.channels))
    linear = np.empty((4, plan.channels), x.dtype)
    run(plan, n_workers, (
        grad_moments_stage(grad_moments, dy, x, plan, stats, coefs, relu, partial),
        merge_stage(add, plan, n_workers, partial),
        gradient_stage(gradient, plan, partial, stats, coefs, training, linear, grads),
        grad_affine_stage(grad_affine, dy, x, plan, coefs, data(linear), relu, training, out)))
    return partial.size + linear.size


WORKERS = {
    run_moments: (moments_worker, merge_worker),
    run_affine: (affine_worker,),
    run_batch_norm: (moments_worker, merge_worker, normalize_worker, affine_worker),
    run_inference: (normalize_worker, affine_worker),
    run_grad_moments: (grad_moments_worker, add_worker),
    run_grad_affine: (grad_affine_worker,),
    run_batch_norm_backward: (grad_moments_worker, add_worker, gradient_worker, grad_affine_worker),
}
compiled = {}  # (driver, dtype): the compiled driver, given its workers' addresses
team_lock = threading.Lock()


@functools.cache
def sources():
    """A word for the text of everything that is compiled."""
    files = [Path(__file__).with_name(f"numba_{name}.py") for name in ("machine", "kernels", "calls")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def cached(decorator, function):
    """The compiled function, from the cache or into it, where there is a folder for one."""
    try:
        # Numba looks at the age of the function's own file alone: what it is compiled from goes into the cache's names.
        function.__qualname__ = f"{function.__name__}_{sources()}"
        return decorator(cache=True)(function)
    except (RuntimeError, OSError):
        return decorator()(function)


PLAN = types.NamedTuple([types.boolean if name in ("by_inner", "held") else types.int64 for name in Plan._fields], Plan)
PART = types.NamedUniTuple(types.int64, len(Part._fields), Part)


@functools.cache
def address_of(worker, floating):
    kinds = {"b": types.boolean, "i": types.int64, "f": types.float64, "p": PLAN,
             "x": types.CPointer(floating), "d": types.CPointer(types.float64)}
    job = types.Tuple([kinds[code] for code in JOBS[worker]])
    signature = types.void(types.CPointer(PART), types.CPointer(job))
    return cached(functools.partial(cfunc, signature, error_model="numpy"), worker).address


def compile_driver(driver, dtype, args):
    """For these types of arguments; every array counts as read-only and strided, so that one version serves all."""
    numba.get_num_threads()  # starts Numba's threads: a driver that comes from the cache refers to them
    addresses = [address_of(worker, numba.from_dtype(dtype)) for worker in WORKERS[driver]]
    signature = tuple(
        types.Array(numba.from_dtype(arg.dtype), arg.ndim, "A", readonly=True) if isinstance(arg, np.ndarray)
        else numba.typeof(arg)
        for arg in (*addresses, *args)
    )
    function = cached(functools.partial(njit, [signature], **OPTIONS), driver)
    return functools.partial(function, *addresses)


def call(driver, dtype, *args):
    function = compiled.get((driver, dtype))
    if function is None:
        with _forks.first_use:  # which another thread may have held to compile the same
            function = compiled[driver, dtype] = compiled.get((driver, dtype)) or compile_driver(driver, dtype, args)
    return function(*args)


def launch(driver, n_bytes, num_threads, dtype, *args):
    """Run a driver on a team if the work is worth it and no other Python thread has the team, else on this thread."""
    # Numba's own thread pool aborts the process when two Python threads enter it at once. The bits are the same.
    if num_threads > 1 and n_bytes >= 2 * SERIAL_BYTES and team_lock.acquire(blocking=False):
        try:
            return call(driver, dtype, *args, num_threads)
        finally:
            team_lock.release()
    return call(driver, dtype, *args, 1)


# ---------------------------------------------------------------------------------------------------------------------
# What Python calls: the contract of kernels/__init__.py. The arrays were checked by _layout.py.
# ---------------------------------------------------------------------------------------------------------------------

def moments(x, mean, rest, m2, num_threads):
    launch(run_moments, x.nbytes, num_threads, x.dtype, x, mean, rest, m2)


def affine(x, coefs, relu, out, num_threads):
    launch(run_affine, x.nbytes, num_threads, x.dtype, x, coefs, relu, out)


def grad_moments(grad_y, x, mean, coefs, relu, sum_dy, sum_dy_xmu, num_threads):
    launch(run_grad_moments, 2 * x.nbytes, num_threads, x.dtype, grad_y, x, mean, coefs, relu, sum_dy, sum_dy_xmu)


def grad_affine(grad_y, x, coefs, linear, relu, out, num_threads):
    launch(run_grad_affine, 2 * x.nbytes, num_threads, x.dtype, grad_y, x, coefs, linear, relu, out)


def or_empty(values, coefs):
    """gamma or beta; for None an empty array."""
    return coefs[0, :0] if values is None else values


def batch_norm(x, gamma, beta, eps, relu, out, stats, coefs, num_threads):
    """Whether it is done: nothing is, where the output lies partly over an input."""
    return launch(run_batch_norm, x.nbytes, num_threads, x.dtype, x, or_empty(gamma, coefs), or_empty(beta, coefs),
                  float(eps), relu, out, stats, coefs)


def batch_norm_inference(x, mean, var, gamma, beta, eps, relu, out, stats, coefs, num_threads):
    """The same, and nothing is where a variance is negative."""
    return launch(run_inference, x.nbytes, num_threads, x.dtype, x, mean, var, or_empty(gamma, coefs),
                  or_empty(beta, coefs), float(eps), relu, out, stats, coefs)


def batch_norm_backward(grad_y, x, stats, coefs, relu, training, out, grads, num_threads):
    """Whether it is done: nothing is, where the output lies over x or partly over grad_y."""
    return launch(run_batch_norm_backward, 2 * x.nbytes, num_threads, x.dtype, grad_y, x, stats, coefs, relu, training,
                  out, grads)


# ---------------------------------------------------------------------------------------------------------------------
# Whole calls, for plain arguments: C-contiguous native arrays of one dtype. The general way through functional.py and
# _layout.py costs 20 us, and 90 us where a kernel has swept it out of the cache. They answer None, with nothing done,
# to whatever they do not know; the general way takes it, and raises the errors.
# ---------------------------------------------------------------------------------------------------------------------

def is_plain(x, dtypes=_layout.FLOATS):
    return type(x) is np.ndarray and x.dtype in dtypes and (flags := x.flags).aligned and flags.c_contiguous


def is_plain_vector(values, channels, dtype):
    return is_plain(values, (dtype,)) and values.shape == (channels,)


def is_plain_output(out, source):
    """out is None or a plain array; the driver sees whether it overlaps another."""
    return out is None or (is_plain(out, (source.dtype,)) and out.shape == source.shape and out.flags.writeable)


def is_in_place(out, x):
    """Whether a plain output is the input's memory, by another array perhaps: the driver refuses a partial overlap."""
    return out is not None and np.may_share_memory(out, x)


@functools.lru_cache
def view_of(shape, axis):
    """(outer, channels, inner), or None where there is nothing, or the axis is not a plain one."""
    if len(shape) < 2 or 0 in shape or not -len(shape) <= axis < len(shape):
        return None
    axis %= len(shape)
    return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1:])


def plain_view(x, axis):
    """The same of x, and None where x is not plain."""
    return view_of(x.shape, axis) if is_plain(x) and type(axis) is int else None


def are_plain_options(gamma, beta, eps, activation, channels, dtype):
    return ((gamma is None or is_plain_vector(gamma, channels, dtype))
            and (beta is None or is_plain_vector(beta, channels, dtype))
            and type(eps) is float and 0 <= eps < math.inf
            and (activation is None or (type(activation) is str and activation == "relu")))


def whole_moments(x, axis, num_threads):
    """(count, mean, rest, m2), or None."""
    view = plain_view(x, axis)
    if not view:
        return None
    mean, rest, m2 = np.empty(view[1]), np.empty(view[1]), np.empty(view[1])
    moments(x.reshape(view), mean, rest, m2, num_threads)
    return view[0] * view[2], mean, rest, m2


def whole_batch_norm(x, gamma, beta, axis, eps, activation, out, num_threads):
    """(y, count, whether in place, stats, coefs), or None."""
    view = plain_view(x, axis)
    if not (view and view[0] * view[2] > 1 and are_plain_options(gamma, beta, eps, activation, view[1], x.dtype)
            and is_plain_output(out, x)):
        return None
    y = _memory.empty(x.shape, x.dtype) if out is None else out
    stats, coefs = np.empty((4, view[1])), np.empty((3, view[1]), x.dtype)
    if not batch_norm(x.reshape(view), gamma, beta, eps, activation is not None, y.reshape(view), stats, coefs,
                      num_threads):
        return None
    return y, view[0] * view[2], is_in_place(out, x), stats, coefs


def whole_batch_norm_inference(x, mean, var, gamma, beta, axis, eps, activation, out, keep, num_threads):
    """(y, count, whether in place, stats, coefs), or None; stats even if they are not to be kept."""
    view = plain_view(x, axis)
    if not (view and are_plain_options(gamma, beta, eps, activation, view[1], x.dtype)
            and is_plain_vector(mean, view[1], np.float64) and is_plain_vector(var, view[1], np.float64)
            and is_plain_output(out, x)):
        return None
    y = _memory.empty(x.shape, x.dtype) if out is None else out
    stats, coefs = np.empty((4, view[1])), np.empty((3, view[1]), x.dtype)
    if not batch_norm_inference(x.reshape(view), mean, var, gamma, beta, eps, activation is not None, y.reshape(view),
                                stats, coefs, num_threads):
        return None
    return y, view[0] * view[2], is_in_place(out, x), stats, coefs


def whole_batch_norm_backward(grad_y, x, axis, stats, coefs, relu, training, out, num_threads):
    """(grad_x, grads), or None."""
    view = plain_view(x, axis)
    if not (view and is_plain(grad_y, (x.dtype,)) and grad_y.shape == x.shape
            and is_plain_output(out, grad_y)):
        return None
    if training and view[0] * view[2] == 2:  # functional.py has a formula for two values
        return None
    grad_x = _memory.empty(x.shape, x.dtype) if out is None else out
    grads = np.empty((2, view[1]), x.dtype)
    if not batch_norm_backward(grad_y.reshape(view), x.reshape(view), stats, coefs, relu, training,
                               grad_x.reshape(view), grads, num_threads):
        return None
    return grad_x, grads


def warmup(dtypes=(np.float32, np.float64)):
    """Compile what the layers call for the given dtypes and start the threads: the first calls would wait for it."""
    for dtype in dtypes:
        for outer, num_threads in ((1, 1), (4096, 2)):
            x = np.zeros((outer, 64, 1), dtype)
            stats, coefs, grads = np.empty((4, 64)), np.empty((3, 64), dtype), np.empty((2, 64), dtype)
            batch_norm(x, None, None, 1e-5, False, np.empty_like(x), stats, coefs, num_threads)
            batch_norm_backward(x, x, stats, coefs, False, True, np.empty_like(x), grads, num_threads)
            batch_norm_inference(x, stats[0], stats[1], None, None, 1e-5, False, np.empty_like(x), np.empty_like(stats),
                                 coefs, num_threads)
            moments(x, *np.empty((3, 64)), num_threads)


def describe():
    """Numba's version, its threading layer (None until a parallel loop ran) and its number of threads."""
    try:
        layer = numba.threading_layer()
    except ValueError:
        layer = None
    return {"numba": numba.__version__, "threading_layer": layer, "num_threads": numba.config.NUMBA_NUM_THREADS}
