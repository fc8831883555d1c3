"""The contract that every backend keeps. The backends: reference.py (NumPy), cython_calls.pyx, numba_calls.py.

Arrays arrive checked, by ``_layout.py``; kernels only loop. ``x``, ``grad_y`` and ``out`` are 3-D views
``(outer, channels, inner)``, float32 or float64 ("the data's dtype"), with ``[channels, inner]`` contiguous and any
stride along ``outer``; none of their axes is empty. ``out`` may be the very memory of the first argument, or overlaps
none. Small arrays travel between the halves of an operation:

    stats   (4, channels) float64            mean, var (biased), invstd, rest: what mean lacks
    coefs   (3, channels) the data's dtype   center, scale, offset
    linear  (4, channels) the data's dtype   factor, slope, shift, rest (the last two: one shift in two floats)

Four kernels::

    moments(x, mean, rest, m2, num_threads)                  mean + rest = sum(x) / n;  m2 = sum((x - mean - rest)^2)
    affine(x, coefs, relu, out, num_threads)                 out = (x - center) * scale + offset, then the ReLU
    grad_moments(grad_y, x, mean, coefs, relu,
                 sum_dy, sum_dy_xmu, num_threads)            sum(dy), sum(dy * (x - mean))
    grad_affine(grad_y, x, coefs, linear, relu,
                out, num_threads)                            out = factor * (dy - shift - rest - (x - center) * slope)

and three drivers, which run a pair of them around the arithmetic per channel in one call::

    batch_norm(x, gamma, beta, eps, relu, out, stats, coefs, num_threads)
    batch_norm_inference(x, mean, var, gamma, beta, eps, relu, out, stats, coefs, num_threads)
    batch_norm_backward(grad_y, x, stats, coefs, relu, training, out, grads, num_threads)

Rounding: sums are float64, about a pivot near the mean. The mean comes in two floats, mean and what it lacks, so that
merges lose nothing. It is split into what the data's dtype holds (center) and the rest, which goes into the offset, so
nothing cancels however large the mean. Where a fused ReLU was off, dy counts
as 0; whether it was off is computed again from ``x`` by ``affine``'s formula.

Threads: ``num_threads`` is an upper limit. A channel's values are cut by shape and dtype alone, and partial results
merge in a fixed order, so a backend gives the same bits for any number of threads, any row stride, in place or not.
"""
