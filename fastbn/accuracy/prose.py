"""The words of docs/numerics.md; `$names` stand for what is measured."""

PROSE = """\
# Numerics

How exact fastbn is, why, and how that was measured. The tables are written by `$command`, none of them typed. To
change the words, edit `fastbn/accuracy/prose.py`; then `make numerics`.

$verdict

## The algorithm

A column has n values x; its mean and its biased variance normalize it.

**Statistics: sums about a pivot, in float64.** The data is cut into blocks of rows. A block's pivot is the mean of
its first rows, k of its n values, itself computed as first value + mean of the differences to it. Then, in one read,

    s1 = sum(x - pivot)      s2 = sum((x - pivot)^2)      mean = pivot + s1 / n      m2 = s2 - s1^2 / n

where pivot and s1 / n stay two numbers. Blocks merge in a fixed order (Chan, Golub and LeVeque 1979):

    delta = mean_b - mean_a      mean = mean_a + delta n_b / (n_a + n_b)
    m2 = m2_a + m2_b + delta^2 n_a n_b / (n_a + n_b)

with each mean in two float64 throughout, in `Moments` too.

**Center first.** `x * scale + shift` loses all digits where the mean is large against the standard deviation, and so
does `x - mean` in float32. The mean is split into what the data's dtype holds, the center, and the rest, which goes
into the offset:

    center = float32(mean)      scale = gamma * invstd      offset = beta - (mean - center) * scale
    y = (x - center) * scale + offset

**Backward.** Both sums are float64, of exact float64 products where the data is float32:

    sum_dy = sum(dy)      sum_dy_xmu = sum(dy * (x - mean)) - lacking * sum_dy
    slope = invstd^2 * sum_dy_xmu / n      shift + rest = sum_dy / n - slope * (mean - center + lacking)
    grad_x = scale * (((dy - shift) - rest) - (x - center) * slope)
    grad_gamma = invstd * sum_dy_xmu      grad_beta = sum_dy

mean is the first float64 of the mean, lacking the second; `shift + rest` is one number in two floats, too: a mean of
dy that is large against its deviations cancels without loss.
The factor stays outside, so that nothing under- or overflows on the way.

Of two rows, where x_hat is h and -h, the terms leave 1 - h^2 = eps / (var + eps) of themselves. So it is written down:

    grad_x = scale * eps * invstd^2 * (dy - the other dy) / 2

## The bound

$bound

A ulp is the distance from a float to the next larger one. Float64 has no bound for y and the gradients beyond what
the tests check (`tests/test_exactness.py`). A constant column has a var of exactly 0, y is exactly beta, grad_x is
finite. A NaN or an infinity in one column leaves the bits of all others as they are.

## Why it holds

- *Large means.* Only differences to the pivot are summed, and the pivot is within the data: (mean - pivot)^2 <= m2 /
  k by Cauchy and Schwarz, so the subtraction s2 - s1^2 / n enlarges the rounding of s2 by at most 1 + n / k <= 33,
  whatever the data: outliers in the first rows included, which is where they hurt most.
- *Many rows.* A block adds some hundred to some thousand values to each accumulator, there are at most 64 chains of
  blocks, and those merge. Rounding grows with the length of the chains, not with n.
- *Constant columns.* The pivot is the value itself, and every difference is exactly 0.
- *Range.* The squares of float32 values, subnormal or 3e38, lie well inside the range of float64.
- *y in float32.* x - center is rounded once (and is exact near the center), scale once, the product once, the sum
  once; the offset holds what the center lacks. Four roundings of half a ulp are 2 ulp of the terms; the bound is 4 of
  the result.
- *Merging.* Where blocks or pieces merge, delta is a difference of two means. Were each rounded to one float64, its
  error, 1e-16 of |mean|, times delta, would be an error of m2: 1e-13 of it and more once |mean| / std is some 1e5 and
  many short blocks merge. In two floats the error is 1e-16 of delta, and the number and order of merges do not matter.
- *float64.* The center is the mean's first float64, and the second goes into the offset, and into the sums of the
  backward: in one float64, grad_gamma would lose a digit for each digit of |mean| / std.
- *Two rows.* Nothing cancels but dy - the other dy, and that is rounded once.

**Limits.** In float64, var and the sums behind it must stay in range: where the deviations of a column or their sum
exceed about 1e154, their squares overflow, var is not finite, and y and the gradients are NaN (or, where var is plus
infinity, y may be beta). No error is raised, and no other column is touched. Deviations below about 1e-162 have
squares of 0, and so has var; next to eps that changes nothing. In float32, what the compiled kernels hold in float32
must stay below 3.4e38: gamma / sqrt(var + eps), which a deviation below 1e-38 with an eps next to 0 exceeds (and then
mostly grad_x itself), and the distance of a value from the mean; else y and grad_x of the column are infinite or NaN.

## How it is measured

Cases, oracle and bounds are in `fastbn/accuracy/`; the tests use the same. grad_y is normal about 0.25, gamma uniform
in 0.5 to 2, beta in -1 to 1, eps 1e-5; cases have 3,000 rows where they say nothing else.

The oracle computes the sums of x, x^2, grad_y and grad_y * x exactly, as integers (products by Dekker's splitting),
then mean, var and the centred sums as fractions. Only the square root and the values of y and grad_x are rounded, in
float64 from a mean in two floats: about 1e-15, where the bound is 4e-7. The tests check it against plain
rational arithmetic.

fastbn's Cython kernels are judged once for each instruction set. PyTorch: `native_batch_norm` and its backward, var
as its layers store it. JAX: two-pass variance, and E[x^2] - E[x]^2, which flax uses by default; gradients by
`jax.vjp`. NumPy: `x.mean(0)`, `x.var(0)` and the textbook formulas in the dtype of the data. scikit-learn:
`StandardScaler().fit(x)`. A peer that rounds its statistics to float32 uses up to 0.6 of their bound by that alone,
and a var above 3e38 is infinite to it.

$facts

Figures are errors in units of the bound: up to 1 it holds; `!` marks where it does not. `-`: a side does not compute
that.

## float32

The worst of all cases:

$summary_float32

The worst quantity of each case:

$errors_float32

Constant columns:

$constants_float32

A value that is not finite, in another column:

$nonfinite_float32

## float64

The worst of all cases:

$summary_float64

The worst quantity of each case:

$errors_float64

Constant columns:

$constants_float64

A value that is not finite, in another column:

$nonfinite_float64

## Moments merged

`Moments` of 1,000 unequal pieces of 40,000 rows, merged one by one in five orders; the worst of mean and var, in
units of the bound:

$merged

## Repeatability

Promised, for each backend and instruction set: the same bits for any number of threads, for every call, for C-order
data of any alignment and row stride, with and without `out=`, in place or not. A channel is cut by shape and
dtype alone, each piece has its own partial result, and those merge in a fixed order. `tests/test_repeatability.py`
checks all of it; here is the number of threads, 1 beside each of 2 to 64, on 2,099 x 513:

$threads

In ulp of the data's dtype: of the value (mean, var), of max(1, |y|), of the largest value in the column (grad_x), of
the largest of all (grad_gamma, grad_beta).

**Not promised:** the same bits from another backend, another instruction set (the compiler may fuse a product and a
sum), another memory order (Fortran, channels last), another version. By how much they differ on 10,007 x 20, in the
same units, beside the first side of the tables above:

$between
"""
