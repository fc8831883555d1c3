"""What Python calls of the Cython kernels; included behind cython_kernels.pyx, whose loops it starts."""
cimport numpy as cnp
from cython.parallel cimport parallel
from libc.math cimport INFINITY
from libc.stdlib cimport free, malloc

from fastbn._memory import POOLED_BYTES, take

cnp.import_array()

cdef Py_ssize_t pooled_bytes = POOLED_BYTES

cdef extern from "machine.h" nogil:
    const int fastbn_has_openmp
    int fastbn_cpu_level()
    int team_take(int wanted)
    void team_give(int taken)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers: scratch memory and the team of threads around a worker.
# ---------------------------------------------------------------------------------------------------------------------

cdef double* scratch(const Plan* plan, Py_ssize_t n_rows) except NULL:
    cdef Py_ssize_t n = plan.channels * n_rows
    cdef double* memory = <double*>malloc(max(1, n) * sizeof(double))
    if memory == NULL:
        raise MemoryError(f"no memory for the {n} partial results")
    return memory


cdef double* scratch_of(const Plan* plan, Py_ssize_t n_rows, int team) except NULL:
    """For n_rows of each chunk, and what two threads that share channels keep for themselves; they may be all that the
    system grants of a larger team."""
    return scratch(plan, n_rows * plan.n_chunks + (2 * OWN_ROWS if team > 1 and not has_own_tiles(plan, 2) else 0))


cdef inline bint streams(const Plan* plan, Py_ssize_t itemsize, bint in_place) noexcept nogil:
    """Whether the output is to bypass the caches: with the inputs (itemsize is the sum) it would not fit, and it is not
    the input, whose lines are there."""
    return not in_place and plan.outer * plan.channels * plan.inner * itemsize >= STREAM_BYTES


cdef inline bint is_alone(int team) noexcept nogil:
    """Whether the calling thread does all the work. It then enters no region of OpenMP: libgomp's take 0.3 to 0.45 us
    of one thread, too, for a system call at their end (without: 8x16 forward 0.47 of the time, 64x128 0.8). Not so in
    somebody else's region, where team_rank and team_size would be theirs."""
    return team == 1 and team_size() == 1


cdef int launch_moments(
    const floating* x, Py_ssize_t stride, Plan plan, double* mean, double* rest, double* m2, int num_threads,
) except -1:
    cdef int team = team_take(team_wanted(&plan, sizeof(floating), num_threads))
    cdef double* partial = NULL
    cdef Moments total
    total.mean, total.rest, total.m2 = mean, rest, m2
    try:
        partial = scratch(&plan, MOMENTS * plan.n_chunks)
        with nogil:
            if is_alone(team):
                moments_worker(x, stride, &plan, &total, partial)
            else:
                with parallel(num_threads=team):
                    moments_worker(x, stride, &plan, &total, partial)
    finally:
        team_give(team)
        free(partial)
    return 0


cdef int launch_affine(
    const floating* x, Py_ssize_t stride, Plan plan, const floating* coefs, bint relu,
    floating* y, Py_ssize_t y_stride, int num_threads,
) except -1:
    cdef int team = team_take(team_wanted(&plan, sizeof(floating), num_threads))
    cdef bint stream = streams(&plan, 2 * sizeof(floating), x == y)
    begin_with_lines(&plan, y, y_stride)
    with nogil:
        if is_alone(team):
            affine_worker(x, stride, &plan, coefs, relu, stream, y, y_stride)
        else:
            with parallel(num_threads=team):
                affine_worker(x, stride, &plan, coefs, relu, stream, y, y_stride)
    team_give(team)
    return 0


cdef int launch_batch_norm(
    const floating* x, Py_ssize_t stride, Plan plan, const floating* gamma, const floating* beta, double eps,
    bint relu, double* stats, floating* coefs, floating* y, Py_ssize_t y_stride, int num_threads,
) except -1:
    cdef int team = team_take(team_wanted(&plan, sizeof(floating), num_threads))
    cdef bint stream = streams(&plan, 2 * sizeof(floating), x == y)
    cdef double* partial = NULL
    begin_with_lines(&plan, y, y_stride)
    try:
        partial = scratch_of(&plan, MOMENTS, team)
        with nogil:
            if is_alone(team):
                batch_norm_worker(x, stride, &plan, gamma, beta, eps, relu, stream, partial, stats, coefs, y, y_stride)
            else:
                with parallel(num_threads=team):
                    batch_norm_worker(x, stride, &plan, gamma, beta, eps, relu, stream, partial, stats, coefs,
                                      y, y_stride)
    finally:
        team_give(team)
        free(partial)
    return 0


cdef int launch_inference(
    const floating* x, Py_ssize_t stride, Plan plan, const double* mean, const double* var,
    const floating* gamma, const floating* beta, double eps, bint relu, double* stats, floating* coefs,
    floating* y, Py_ssize_t y_stride, int num_threads,
) except -1:
    cdef int team = team_take(team_wanted(&plan, sizeof(floating), num_threads))
    cdef bint stream = streams(&plan, 2 * sizeof(floating), x == y)
    cdef double* copies = NULL
    begin_with_lines(&plan, y, y_stride)
    try:
        if team > 1:
            copies = scratch(&plan, (team - 1) * COEFFICIENTS)
        with nogil:
            if is_alone(team):
                inference_worker(x, stride, &plan, mean, var, gamma, beta, eps, relu, stream, stats, coefs,
                                 <floating*>copies, y, y_stride)
            else:
                with parallel(num_threads=team):
                    inference_worker(x, stride, &plan, mean, var, gamma, beta, eps, relu, stream, stats, coefs,
                                     <floating*>copies, y, y_stride)
    finally:
        team_give(team)
        free(copies)
    return 0


cdef int launch_grad_moments(
    const floating* dy, Py_ssize_t dy_stride, const floating* x, Py_ssize_t x_stride, Plan plan,
    const double* mean, const floating* coefs, bint relu, double* sum_dy, double* sum_dy_xmu, int num_threads,
) except -1:
    cdef int team = team_take(team_wanted(&plan, 2 * sizeof(floating), num_threads))
    cdef double* partial = NULL
    try:
        partial = scratch(&plan, SUMS * plan.n_chunks)
        with nogil:
            if is_alone(team):
                grad_moments_worker(dy, dy_stride, x, x_stride, &plan, mean, coefs, relu, partial)
            else:
                with parallel(num_threads=team):
                    grad_moments_worker(dy, dy_stride, x, x_stride, &plan, mean, coefs, relu, partial)
        memcpy(sum_dy, partial, plan.channels * sizeof(double))
        memcpy(sum_dy_xmu, partial + plan.channels, plan.channels * sizeof(double))
    finally:
        team_give(team)
        free(partial)
    return 0


cdef int launch_grad_affine(
    const floating* dy, Py_ssize_t dy_stride, const floating* x, Py_ssize_t x_stride, Plan plan,
    const floating* coefs, const floating* linear, bint relu,
    floating* grad_x, Py_ssize_t grad_x_stride, int num_threads,
) except -1:
    cdef int team = team_take(team_wanted(&plan, 2 * sizeof(floating), num_threads))
    cdef bint stream = streams(&plan, 3 * sizeof(floating), dy == grad_x)
    begin_with_lines(&plan, grad_x, grad_x_stride)
    with nogil:
        if is_alone(team):
            grad_affine_worker(dy, dy_stride, x, x_stride, &plan, coefs, linear, relu, True, stream,
                               grad_x, grad_x_stride)
        else:
            with parallel(num_threads=team):
                grad_affine_worker(dy, dy_stride, x, x_stride, &plan, coefs, linear, relu, True, stream,
                                   grad_x, grad_x_stride)
    team_give(team)
    return 0


cdef int launch_batch_norm_backward(
    const floating* dy, Py_ssize_t dy_stride, const floating* x, Py_ssize_t x_stride, Plan plan,
    const double* stats, const floating* coefs, bint relu, bint training,
    floating* grads, floating* grad_x, Py_ssize_t grad_x_stride, int num_threads,
) except -1:
    cdef int team = team_take(team_wanted(&plan, 2 * sizeof(floating), num_threads))
    cdef bint stream = streams(&plan, 3 * sizeof(floating), dy == grad_x)
    cdef double* partial = NULL
    cdef double* linear = NULL
    begin_with_lines(&plan, grad_x, grad_x_stride)
    try:
        partial = scratch_of(&plan, SUMS, team)
        linear = scratch(&plan, LINEAR)
        with nogil:
            if is_alone(team):
                batch_norm_backward_worker(dy, dy_stride, x, x_stride, &plan, stats, coefs, relu, training, stream,
                                           partial, <floating*>linear, grads, grad_x, grad_x_stride)
            else:
                with parallel(num_threads=team):
                    batch_norm_backward_worker(dy, dy_stride, x, x_stride, &plan, stats, coefs, relu, training, stream,
                                               partial, <floating*>linear, grads, grad_x, grad_x_stride)
    finally:
        team_give(team)
        free(partial)
        free(linear)
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# What Python calls: the contract of kernels/__init__.py. The arrays were checked by _layout.py.
# ---------------------------------------------------------------------------------------------------------------------

OPENMP = bool(fastbn_has_openmp)


def cpu_level():
    """The widest instruction set that this processor offers: 0 baseline, 1 AVX2 + FMA, 2 AVX-512."""
    return fastbn_cpu_level()


cdef inline Plan plan_of(cnp.ndarray x, int n_inputs) noexcept:
    return make_plan(cnp.PyArray_DIM(x, 0), cnp.PyArray_DIM(x, 1), cnp.PyArray_DIM(x, 2),
                     cnp.PyArray_ITEMSIZE(x), n_inputs)


cdef inline Py_ssize_t stride_of(cnp.ndarray x) noexcept:
    return cnp.PyArray_STRIDE(x, 0) // cnp.PyArray_ITEMSIZE(x)


cdef inline void* data_of(array) noexcept:
    return NULL if array is None else cnp.PyArray_DATA(<cnp.ndarray>array)


cdef inline bint is_float(cnp.ndarray x) noexcept:
    return cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT32


def moments(
    cnp.ndarray x not None,      # IN   (outer, channels, inner)
    cnp.ndarray mean not None,   # OUT  (channels,) float64
    cnp.ndarray rest not None,   # OUT  (channels,) float64
    cnp.ndarray m2 not None,     # OUT  (channels,) float64
    int num_threads,
):
    if is_float(x):
        launch_moments[float](<float*>data_of(x), stride_of(x), plan_of(x, 1), <double*>data_of(mean),
                              <double*>data_of(rest), <double*>data_of(m2), num_threads)
    else:
        launch_moments[double](<double*>data_of(x), stride_of(x), plan_of(x, 1), <double*>data_of(mean),
                               <double*>data_of(rest), <double*>data_of(m2), num_threads)


def affine(
    cnp.ndarray x not None,      # IN   (outer, channels, inner)
    cnp.ndarray coefs not None,  # IN   (3, channels): center, scale, offset
    bint relu,
    cnp.ndarray out not None,    # OUT  (outer, channels, inner)
    int num_threads,
):
    if is_float(x):
        launch_affine[float](<float*>data_of(x), stride_of(x), plan_of(x, 1), <float*>data_of(coefs), relu,
                             <float*>data_of(out), stride_of(out), num_threads)
    else:
        launch_affine[double](<double*>data_of(x), stride_of(x), plan_of(x, 1), <double*>data_of(coefs), relu,
                              <double*>data_of(out), stride_of(out), num_threads)


def batch_norm(
    cnp.ndarray x not None,      # IN   (outer, channels, inner)
    gamma,                       # IN   (channels,) or None
    beta,                        # IN   (channels,) or None
    double eps,
    bint relu,
    cnp.ndarray out not None,    # OUT  (outer, channels, inner)
    cnp.ndarray stats not None,  # OUT  (4, channels) float64: mean, var, invstd, rest
    cnp.ndarray coefs not None,  # OUT  (3, channels): center, scale, offset
    int num_threads,
):
    if is_float(x):
        launch_batch_norm[float](<float*>data_of(x), stride_of(x), plan_of(x, 1),
                                 <float*>data_of(gamma), <float*>data_of(beta), eps, relu,
                                 <double*>data_of(stats), <float*>data_of(coefs),
                                 <float*>data_of(out), stride_of(out), num_threads)
    else:
        launch_batch_norm[double](<double*>data_of(x), stride_of(x), plan_of(x, 1),
                                  <double*>data_of(gamma), <double*>data_of(beta), eps, relu,
                                  <double*>data_of(stats), <double*>data_of(coefs),
                                  <double*>data_of(out), stride_of(out), num_threads)


def batch_norm_inference(
    cnp.ndarray x not None,      # IN   (outer, channels, inner)
    cnp.ndarray mean not None,   # IN   (channels,) float64
    cnp.ndarray var not None,    # IN   (channels,) float64
    gamma,                       # IN   (channels,) or None
    beta,                        # IN   (channels,) or None
    double eps,
    bint relu,
    cnp.ndarray out not None,    # OUT  (outer, channels, inner)
    cnp.ndarray stats not None,  # OUT  (4, channels) float64: mean, var, invstd, rest
    cnp.ndarray coefs not None,  # OUT  (3, channels): center, scale, offset
    int num_threads,
):
    if is_float(x):
        launch_inference[float](<float*>data_of(x), stride_of(x), plan_of(x, 1),
                                <double*>data_of(mean), <double*>data_of(var),
                                <float*>data_of(gamma), <float*>data_of(beta), eps, relu,
                                <double*>data_of(stats), <float*>data_of(coefs),
                                <float*>data_of(out), stride_of(out), num_threads)
    else:
        launch_inference[double](<double*>data_of(x), stride_of(x), plan_of(x, 1),
                                 <double*>data_of(mean), <double*>data_of(var),
                                 <double*>data_of(gamma), <double*>data_of(beta), eps, relu,
                                 <double*>data_of(stats), <double*>data_of(coefs),
                                 <double*>data_of(out), stride_of(out), num_threads)


def grad_moments(
    cnp.ndarray grad_y not None,  # IN   (outer, channels, inner)
    cnp.ndarray x not None,      # IN   (outer, channels, inner)
    cnp.ndarray mean not None,   # IN   (channels,) float64
    cnp.ndarray coefs not None,  # IN   (3, channels): center, scale, offset
    bint relu,
    cnp.ndarray sum_dy not None,      # OUT  (channels,) float64
    cnp.ndarray sum_dy_xmu not None,  # OUT  (channels,) float64
    int num_threads,
):
    if is_float(x):
        launch_grad_moments[float](<float*>data_of(grad_y), stride_of(grad_y), <float*>data_of(x), stride_of(x),
                                   plan_of(x, 2), <double*>data_of(mean), <float*>data_of(coefs), relu,
                                   <double*>data_of(sum_dy), <double*>data_of(sum_dy_xmu), num_threads)
    else:
        launch_grad_moments[double](<double*>data_of(grad_y), stride_of(grad_y), <double*>data_of(x), stride_of(x),
                                    plan_of(x, 2), <double*>data_of(mean), <double*>data_of(coefs), relu,
                                    <double*>data_of(sum_dy), <double*>data_of(sum_dy_xmu), num_threads)


def grad_affine(
    cnp.ndarray grad_y not None,  # IN   (outer, channels, inner)
    cnp.ndarray x not None,      # IN   (outer, channels, inner)
    cnp.ndarray coefs not None,  # IN   (3, channels): center, scale, offset
    cnp.ndarray linear not None,  # IN   (4, channels): factor, slope, shift, rest
    bint relu,
    cnp.ndarray out not None,    # OUT  (outer, channels, inner)
    int num_threads,
):
    if is_float(x):
        launch_grad_affine[float](<float*>data_of(grad_y), stride_of(grad_y), <float*>data_of(x), stride_of(x),
                                  plan_of(x, 2), <float*>data_of(coefs), <float*>data_of(linear), relu,
                                  <float*>data_of(out), stride_of(out), num_threads)
    else:
        launch_grad_affine[double](<double*>data_of(grad_y), stride_of(grad_y), <double*>data_of(x), stride_of(x),
                                   plan_of(x, 2), <double*>data_of(coefs), <double*>data_of(linear), relu,
                                   <double*>data_of(out), stride_of(out), num_threads)


def batch_norm_backward(
    cnp.ndarray grad_y not None,  # IN   (outer, channels, inner)
    cnp.ndarray x not None,      # IN   (outer, channels, inner)
    cnp.ndarray stats not None,  # IN   (4, channels) float64: mean, var, invstd, rest
    cnp.ndarray coefs not None,  # IN   (3, channels): center, scale, offset
    bint relu,
    bint training,               # IN   False: the statistics were constants
    cnp.ndarray out not None,    # OUT  (outer, channels, inner): grad_x
    cnp.ndarray grads not None,  # OUT  (2, channels): grad_gamma, grad_beta
    int num_threads,
):
    if is_float(x):
        launch_batch_norm_backward[float](
            <float*>data_of(grad_y), stride_of(grad_y), <float*>data_of(x), stride_of(x), plan_of(x, 2),
            <double*>data_of(stats), <float*>data_of(coefs), relu, training,
            <float*>data_of(grads), <float*>data_of(out), stride_of(out), num_threads)
    else:
        launch_batch_norm_backward[double](
            <double*>data_of(grad_y), stride_of(grad_y), <double*>data_of(x), stride_of(x), plan_of(x, 2),
            <double*>data_of(stats), <double*>data_of(coefs), relu, training,
            <double*>data_of(grads), <double*>data_of(out), stride_of(out), num_threads)


# ---------------------------------------------------------------------------------------------------------------------
# Whole calls, checks and all, for plain arguments: C-contiguous native arrays of one dtype. At 64 x 128 the general way
# through functional.py and _layout.py costs 10 us, this one 1 us, the kernel 2 us (Zen 4). They answer None, with
# nothing done, to whatever they do not know; the general way takes it, and raises the errors.
# ---------------------------------------------------------------------------------------------------------------------

cdef inline bint is_plain(x) noexcept:
    return (cnp.PyArray_CheckExact(x) and cnp.PyArray_ISCARRAY_RO(<cnp.ndarray>x)
            and (cnp.PyArray_TYPE(<cnp.ndarray>x) == cnp.NPY_FLOAT32
                 or cnp.PyArray_TYPE(<cnp.ndarray>x) == cnp.NPY_FLOAT64))


cdef inline bint is_plain_like(y, cnp.ndarray x) noexcept:
    return (is_plain(y) and cnp.PyArray_TYPE(<cnp.ndarray>y) == cnp.PyArray_TYPE(x)
            and cnp.PyArray_SAMESHAPE(<cnp.ndarray>y, x))


cdef inline bint is_plain_vector(values, Py_ssize_t channels, int typenum) noexcept:
    return values is None or (
        is_plain(values) and cnp.PyArray_TYPE(<cnp.ndarray>values) == typenum
        and cnp.PyArray_NDIM(<cnp.ndarray>values) == 1 and cnp.PyArray_DIM(<cnp.ndarray>values, 0) == channels)


cdef inline bint is_plain_activation(activation) noexcept:
    return activation is None or (type(activation) is str and <str>activation == "relu")


cdef inline bint is_apart(cnp.ndarray a, cnp.ndarray b) noexcept:
    """Two contiguous arrays share no memory."""
    cdef char* start_a = <char*>cnp.PyArray_DATA(a)
    cdef char* start_b = <char*>cnp.PyArray_DATA(b)
    return start_a + cnp.PyArray_NBYTES(a) <= start_b or start_b + cnp.PyArray_NBYTES(b) <= start_a


cdef inline bint is_plain_output(out, cnp.ndarray source) noexcept:
    """out is None, source itself, or a plain array apart from it."""
    return out is None or (
        is_plain_like(out, source) and cnp.PyArray_ISWRITEABLE(<cnp.ndarray>out)
        and (cnp.PyArray_DATA(<cnp.ndarray>out) == cnp.PyArray_DATA(source) or is_apart(<cnp.ndarray>out, source)))


cdef inline bint is_apart_from(values, out) noexcept:
    """A vector shares no memory with out, which is written before all of the vector is read."""
    return values is None or out is None or is_apart(<cnp.ndarray>values, <cnp.ndarray>out)


cdef Plan plain_plan(cnp.ndarray x, axis, int n_inputs):
    """The plan, with channels = 0 where x is empty or the axis is not a plain one."""
    cdef Py_ssize_t outer = 1, inner = 1
    cdef int i, at, ndim = cnp.PyArray_NDIM(x)
    cdef Plan plan
    plan.channels = 0
    if type(axis) is not int or ndim < 2 or cnp.PyArray_SIZE(x) == 0 or not -ndim <= axis < ndim:
        return plan
    at = axis % ndim
    for i in range(at):
        outer *= cnp.PyArray_DIM(x, i)
    for i in range(at + 1, ndim):
        inner *= cnp.PyArray_DIM(x, i)
    return make_plan(outer, cnp.PyArray_DIM(x, at), inner, cnp.PyArray_ITEMSIZE(x), n_inputs)


cdef cnp.ndarray new_like(cnp.ndarray x):
    """What _memory.empty would give."""
    cdef int ndim = cnp.PyArray_NDIM(x), typenum = cnp.PyArray_TYPE(x)
    cdef cnp.ndarray y
    if cnp.PyArray_NBYTES(x) < pooled_bytes:
        return cnp.PyArray_EMPTY(ndim, cnp.PyArray_DIMS(x), typenum, 0)
    owner = take(cnp.PyArray_NBYTES(x))
    y = cnp.PyArray_SimpleNewFromData(ndim, cnp.PyArray_DIMS(x), typenum, <void*><uintptr_t>owner.address)
    cnp.set_array_base(y, owner)
    return y


cdef inline cnp.ndarray new_rows(Py_ssize_t rows, Py_ssize_t channels, int typenum):
    cdef cnp.npy_intp[2] shape
    shape[0], shape[1] = rows, channels
    return cnp.PyArray_EMPTY(2, shape, typenum, 0)


cdef inline cnp.ndarray new_vector(cnp.npy_intp channels):
    return cnp.PyArray_EMPTY(1, &channels, cnp.NPY_FLOAT64, 0)


cdef inline const double* statistics_of(values, Py_ssize_t channels, double* memory) noexcept:
    """float32 or float64 values as float64, in memory if they are not so already; NULL where they are neither."""
    cdef Py_ssize_t c
    if values is None:
        return NULL
    if is_plain_vector(values, channels, cnp.NPY_FLOAT64):
        return <const double*>data_of(values)  # copied, they are one thread's work (32x4096: 54 us instead of 41)
    if is_plain_vector(values, channels, cnp.NPY_FLOAT32):
        for c in range(channels):
            memory[c] = (<float*>data_of(values))[c]
        return memory
    return NULL


def whole_moments(
    x, axis, int num_threads,
):
    """(count, mean, rest, m2), or None."""
    cdef cnp.ndarray mean, rest, m2
    cdef Plan plan
    if not is_plain(x):
        return None
    plan = plain_plan(x, axis, 1)
    if not plan.channels:
        return None
    mean, rest, m2 = new_vector(plan.channels), new_vector(plan.channels), new_vector(plan.channels)
    if cnp.PyArray_TYPE(<cnp.ndarray>x) == cnp.NPY_FLOAT32:
        launch_moments[float](<float*>data_of(x), plan.channels * plan.inner, plan, <double*>data_of(mean),
                              <double*>data_of(rest), <double*>data_of(m2), num_threads)
    else:
        launch_moments[double](<double*>data_of(x), plan.channels * plan.inner, plan, <double*>data_of(mean),
                               <double*>data_of(rest), <double*>data_of(m2), num_threads)
    return plan.outer * plan.inner, mean, rest, m2


def whole_batch_norm(
    x, gamma, beta, axis, eps, activation, out, int num_threads,
):
    """(y, count, whether in place, stats, coefs), or None."""
    cdef cnp.ndarray y, stats, coefs
    cdef Plan plan
    cdef int typenum
    if not is_plain(x) or type(eps) is not float or not is_plain_activation(activation):
        return None
    plan = plain_plan(x, axis, 1)
    typenum = cnp.PyArray_TYPE(<cnp.ndarray>x)
    if not (plan.channels and plan.outer * plan.inner > 1 and 0 <= <double>eps < INFINITY
            and is_plain_vector(gamma, plan.channels, typenum) and is_plain_vector(beta, plan.channels, typenum)
            and is_plain_output(out, x) and is_apart_from(gamma, out) and is_apart_from(beta, out)):
        return None
    y = new_like(x) if out is None else out
    stats = new_rows(4, plan.channels, cnp.NPY_FLOAT64)
    coefs = new_rows(3, plan.channels, typenum)
    if typenum == cnp.NPY_FLOAT32:
        launch_batch_norm[float](
            <float*>data_of(x), plan.channels * plan.inner, plan, <float*>data_of(gamma), <float*>data_of(beta), eps,
            activation is not None, <double*>data_of(stats), <float*>data_of(coefs),
            <float*>data_of(y), plan.channels * plan.inner, num_threads)
    else:
        launch_batch_norm[double](
            <double*>data_of(x), plan.channels * plan.inner, plan, <double*>data_of(gamma), <double*>data_of(beta), eps,
            activation is not None, <double*>data_of(stats), <double*>data_of(coefs),
            <double*>data_of(y), plan.channels * plan.inner, num_threads)
    return y, plan.outer * plan.inner, data_of(y) == data_of(x), stats, coefs


def whole_running(
    mean, var, cnp.ndarray stats not None, double weight, double bessel,
):
    """(mean, var): a layer's running statistics after a batch of these, in new arrays; or None."""
    cdef Py_ssize_t c, channels = cnp.PyArray_DIM(stats, 1)
    cdef cnp.ndarray new_mean, new_var
    cdef const double* batch = <double*>data_of(stats)
    cdef const double* means
    cdef const double* variances
    cdef double* to_mean
    cdef double* to_var
    if mean is None or var is None or not (is_plain_vector(mean, channels, cnp.NPY_FLOAT64)
                                           and is_plain_vector(var, channels, cnp.NPY_FLOAT64)):
        return None
    new_mean, new_var = new_vector(channels), new_vector(channels)
    means, variances = <double*>data_of(mean), <double*>data_of(var)
    to_mean, to_var = <double*>data_of(new_mean), <double*>data_of(new_var)
    for c in range(channels):
        to_mean[c] = means[c] * (1 - weight) + batch[c] * weight
    for c in range(channels):
        to_var[c] = variances[c] * (1 - weight) + batch[channels + c] * bessel * weight
    return new_mean, new_var


def whole_batch_norm_inference(
    x, mean, var, gamma, beta, axis, eps, activation, out,
    bint keep,                   # whether stats are to be filled
    int num_threads,
):
    """(y, count, whether in place, stats, coefs), or None."""
    cdef cnp.ndarray y, stats, coefs
    cdef Plan plan
    cdef Py_ssize_t c, n_negative = 0
    cdef double* statistics
    cdef double* kept
    cdef const double* means
    cdef const double* variances
    cdef int typenum
    if not is_plain(x) or type(eps) is not float or not is_plain_activation(activation):
        return None
    plan = plain_plan(x, axis, 1)
    typenum = cnp.PyArray_TYPE(<cnp.ndarray>x)
    if not (plan.channels and 0 <= <double>eps < INFINITY
            and is_plain_vector(gamma, plan.channels, typenum) and is_plain_vector(beta, plan.channels, typenum)
            and is_plain_output(out, x) and is_apart_from(gamma, out) and is_apart_from(beta, out)):
        return None
    stats = new_rows(4, plan.channels, cnp.NPY_FLOAT64)
    statistics = <double*>data_of(stats)
    means = statistics_of(mean, plan.channels, statistics)
    variances = statistics_of(var, plan.channels, statistics + plan.channels)
    if means == NULL or variances == NULL or not (is_apart_from(mean, out) and is_apart_from(var, out)):
        return None
    for c in range(plan.channels):  # without a way out, so that it is vectorised
        n_negative += variances[c] < 0
    if n_negative:
        return None
    y = new_like(x) if out is None else out
    coefs = new_rows(3, plan.channels, typenum)
    kept = statistics if keep else NULL
    if typenum == cnp.NPY_FLOAT32:
        launch_inference[float](
            <float*>data_of(x), plan.channels * plan.inner, plan, means, variances,
            <float*>data_of(gamma), <float*>data_of(beta), eps, activation is not None, kept,
            <float*>data_of(coefs), <float*>data_of(y), plan.channels * plan.inner, num_threads)
    else:
        launch_inference[double](
            <double*>data_of(x), plan.channels * plan.inner, plan, means, variances,
            <double*>data_of(gamma), <double*>data_of(beta), eps, activation is not None, kept,
            <double*>data_of(coefs), <double*>data_of(y), plan.channels * plan.inner, num_threads)
    return y, plan.outer * plan.inner, data_of(y) == data_of(x), stats, coefs


def whole_batch_norm_backward(
    grad_y, x, axis, cnp.ndarray stats, cnp.ndarray coefs, bint relu, bint training, out, int num_threads,
):
    """(grad_x, grads), or None."""
    cdef cnp.ndarray grad_x, grads
    cdef Plan plan
    cdef int typenum
    if not (is_plain(x) and is_plain_like(grad_y, x) and is_plain_output(out, grad_y)
            and (out is None or is_apart(out, x))):
        return None
    plan = plain_plan(x, axis, 2)
    if not plan.channels or training and plan.outer * plan.inner == 2:  # functional.py has a formula for two values
        return None
    typenum = cnp.PyArray_TYPE(<cnp.ndarray>x)
    grad_x = new_like(x) if out is None else out
    grads = new_rows(2, plan.channels, typenum)
    if typenum == cnp.NPY_FLOAT32:
        launch_batch_norm_backward[float](
            <float*>data_of(grad_y), plan.channels * plan.inner, <float*>data_of(x), plan.channels * plan.inner, plan,
            <double*>data_of(stats), <float*>data_of(coefs), relu, training, <float*>data_of(grads),
            <float*>data_of(grad_x), plan.channels * plan.inner, num_threads)
    else:
        launch_batch_norm_backward[double](
            <double*>data_of(grad_y), plan.channels * plan.inner, <double*>data_of(x), plan.channels * plan.inner, plan,
            <double*>data_of(stats), <double*>data_of(coefs), relu, training, <double*>data_of(grads),
            <double*>data_of(grad_x), plan.channels * plan.inner, num_threads)
    return grad_x, grads
