/* The sums of floats in vectors of four doubles, those of AVX2, in the same bits as sums_strip and grad_sums_strip. It is
   what AVX2 has, and what a Zen 4 takes instead of AVX-512, too: it converts eight floats to doubles in one vector in 1.33
   cycles, in two of four in 1; with the rest of the moments' sums that makes 2.97 and 2.02 cycles, with that of the
   backward's 4.35 and 2.5, if accumulators fill the registers. */
#ifndef FASTBN_QUADS_H
#define FASTBN_QUADS_H

#include "machine.h"

#if defined(__GNUC__)
#define ALWAYS_INLINE static inline __attribute__((always_inline))
#else
#define ALWAYS_INLINE static inline
#endif

#if VECTOR_BYTES >= 32
enum {
    STRIP_COLUMNS = 16,
    STRIP_VECTORS = STRIP_COLUMNS / 4,
    LINE_FLOATS = 16,      /* floats of a cache line */
    /* Of HELD_COLUMNS, a part fills the registers, 16 or AVX-512's 32, so one is summed after the other: */
    HELD_COLUMNS = 64,
    PART = VECTOR_BYTES / 2,  /* columns, in ... */
    VECTORS = PART / 4,    /* ... so many vectors */
    PARTS = HELD_COLUMNS / PART,
    MOMENTS_ROWS = 64,     /* rows after which the next part's turn comes: as many as sums_strip gets at most ... */
    GRAD_ROWS_EACH = VECTOR_BYTES / 2,  /* ... and of two arrays so many, for the first cache holds no more (AVX2: of 32,
                              backward of 1000000x64 1.08 times the time) */
    ROWS_COMING = 2        /* what longer rows fetch ahead (256x512: with 1 or 4, moments 1.02 to 1.05 times the time) */
};

/* Unrolled before GCC puts arrays into registers; of a loop that it unrolls later, they would be on the stack. */
#define FOR_VECTORS(j, n) _Pragma("GCC unroll 8") for (int j = 0; j < (n); j++)
#define FOR_PARTS(i) _Pragma("GCC unroll 4") for (int i = 0; i < PARTS; i++)

/* What is fetched while rows of a part are summed, as much a row, PARTS rows a turn. */
struct coming {
    const float *first;
    ptrdiff_t each, turn;  /* how far it moves a row, and a turn */
};

/* Rows of HELD_COLUMNS are fetched row by row, during each part its share of a block of rows, so far ahead that the first
   part of the next block finds all of its rows (half as far, AVX2 took moments of 16384x64 1.08 times as long, 100352x64
   1.35); by the columns of each part, the sums of the backward of 62500x64 took twice as long. */
ALWAYS_INLINE struct coming coming(const float *x, ptrdiff_t stride, ptrdiff_t n_rows, ptrdiff_t block, ptrdiff_t part) {
    struct coming next = {x + ROWS_COMING * stride + part * PART, stride, PARTS * stride};
    if (stride == HELD_COLUMNS || VECTOR_BYTES < 64) {
        next.first = x + (block - block / PARTS + part * n_rows / PARTS) * stride;
        next.each = PART;
        next.turn = stride;
    }
    return next;
}

/* What comes in the place of a turn's row. */
ALWAYS_INLINE void fetch(struct coming next, ptrdiff_t row) {
    for (int i = 0; i < PART; i += LINE_FLOATS)
        prefetch(next.first + row * next.each + i);
}

static inline __m256d load_four(const float *x) { return _mm256_cvtps_pd(_mm_loadu_ps(x)); }

static inline void add_row(
    const float *x, int n_vectors, __m256d one, const __m256d *center, __m256d *strip1, __m256d *strip2
) {
    FOR_VECTORS(j, n_vectors) {
        __m256d d = _mm256_sub_pd(load_four(x + 4 * j), center[j]);
        strip1[j] = _mm256_fmadd_pd(d, one, strip1[j]);
        strip2[j] = _mm256_fmadd_pd(d, d, strip2[j]);
    }
}

static inline void grad_add_row(
    const float *dy, const float *x, int n_vectors, __m256d one, const __m256d *center, __m256d *sum_dy, __m256d *sum_dy_xc
) {
    FOR_VECTORS(j, n_vectors) {
        __m256d dy_j = load_four(dy + 4 * j), x_j = load_four(x + 4 * j);
        /* In turns by the multipliers and by the adders, else it would be 3 cycles instead of 2.5. */
        __m256d d = j % 2 ? _mm256_fmsub_pd(x_j, one, center[j]) : _mm256_sub_pd(x_j, center[j]);
        sum_dy[j] = _mm256_fmadd_pd(dy_j, one, sum_dy[j]);
        sum_dy_xc[j] = _mm256_fmadd_pd(dy_j, d, sum_dy_xc[j]);
    }
}

/* Strips are added to sums in turns by the adders and by the multipliers. */
static inline void add_strips(
    double *s1, double *s2, int n_vectors, __m256d one, const __m256d *strip1, const __m256d *strip2
) {
    FOR_VECTORS(j, n_vectors) {
        _mm256_storeu_pd(s1 + 4 * j, _mm256_add_pd(strip1[j], _mm256_loadu_pd(s1 + 4 * j)));
        _mm256_storeu_pd(s2 + 4 * j, _mm256_fmadd_pd(strip2[j], one, _mm256_loadu_pd(s2 + 4 * j)));
    }
}

/* The sums of a channel's run, in registers from its first value to its last. */
struct run_sums {
    __m256d one, center[STRIP_VECTORS], s1[STRIP_VECTORS], s2[STRIP_VECTORS];
};

ALWAYS_INLINE struct run_sums load_run_sums(const double *center, const double *s1, const double *s2) {
    struct run_sums sums = {_mm256_set1_pd(hidden_one())};
    FOR_VECTORS(j, STRIP_VECTORS) {
        sums.center[j] = _mm256_loadu_pd(center + 4 * j);
        sums.s1[j] = _mm256_loadu_pd(s1 + 4 * j);
        sums.s2[j] = _mm256_loadu_pd(s2 + 4 * j);
    }
    return sums;
}

ALWAYS_INLINE void store_run_sums(const struct run_sums *sums, double *s1, double *s2) {
    FOR_VECTORS(j, STRIP_VECTORS) {
        _mm256_storeu_pd(s1 + 4 * j, sums->s1[j]);
        _mm256_storeu_pd(s2 + 4 * j, sums->s2[j]);
    }
}

ALWAYS_INLINE void add_run_strips(struct run_sums *sums, const __m256d *strip1, const __m256d *strip2) {
    FOR_VECTORS(j, STRIP_VECTORS) {
        sums->s1[j] = _mm256_add_pd(strip1[j], sums->s1[j]);
        sums->s2[j] = _mm256_fmadd_pd(strip2[j], sums->one, sums->s2[j]);
    }
}

/* How many values a run has from i + 4 * j on, at most a vector. */
static inline ptrdiff_t lanes_left(ptrdiff_t length, ptrdiff_t i, int j) {
    ptrdiff_t n = length - i - 4 * j;
    return n < 4 ? n : 4;
}

/* The first n lanes of a vector, loaded and added: a run's last values. */
#if VECTOR_BYTES == 64
static inline __m256d load_lanes(const float *x, ptrdiff_t n) {
    return _mm256_cvtps_pd(_mm_maskz_loadu_ps((1 << n) - 1, x));
}

static inline __m256d add_lanes(__m256d sum, __m256d values, ptrdiff_t n) {
    return _mm256_mask_add_pd(sum, (1 << n) - 1, sum, values);
}
#else
static inline __m128i first_lanes(ptrdiff_t n) { return _mm_cmpgt_epi32(_mm_set1_epi32((int)n), _mm_setr_epi32(0, 1, 2, 3)); }

static inline __m256d load_lanes(const float *x, ptrdiff_t n) { return _mm256_cvtps_pd(_mm_maskload_ps(x, first_lanes(n))); }

static inline __m256d add_lanes(__m256d sum, __m256d values, ptrdiff_t n) {
    __m256d lanes = _mm256_castsi256_pd(_mm256_cvtepi32_epi64(first_lanes(n)));
    return _mm256_blendv_pd(sum, _mm256_add_pd(sum, values), lanes);
}
#endif

/* n_rows rows of a run from x[i] on; where the next one begins. */
ALWAYS_INLINE ptrdiff_t add_run_rows(struct run_sums *sums, const float *x, ptrdiff_t i, int n_rows) {
    __m256d strip1[STRIP_VECTORS], strip2[STRIP_VECTORS];
    x += i;
    FOR_VECTORS(j, STRIP_VECTORS) {
        strip1[j] = _mm256_sub_pd(load_four(x + 4 * j), sums->center[j]);
        strip2[j] = _mm256_mul_pd(strip1[j], strip1[j]);
    }
    for (int r = 1; r < n_rows; r++)
        add_row(x + r * STRIP_COLUMNS, STRIP_VECTORS, sums->one, sums->center, strip1, strip2);
    add_run_strips(sums, strip1, strip2);
    return i + n_rows * STRIP_COLUMNS;
}

ALWAYS_INLINE ptrdiff_t grad_add_run_rows(struct run_sums *sums, const float *dy, const float *x, ptrdiff_t i, int n_rows) {
    __m256d strip1[STRIP_VECTORS], strip2[STRIP_VECTORS];
    dy += i;
    x += i;
    FOR_VECTORS(j, STRIP_VECTORS) {
        strip1[j] = load_four(dy + 4 * j);
        strip2[j] = _mm256_mul_pd(strip1[j], _mm256_sub_pd(load_four(x + 4 * j), sums->center[j]));
    }
    for (int r = 1; r < n_rows; r++)
        grad_add_row(dy + r * STRIP_COLUMNS, x + r * STRIP_COLUMNS, STRIP_VECTORS, sums->one, sums->center, strip1, strip2);
    add_run_strips(sums, strip1, strip2);
    return i + n_rows * STRIP_COLUMNS;
}

static inline void sums_part(
    const float *x, ptrdiff_t stride, ptrdiff_t n_rows, struct coming next, const double *pivot, double *s1, double *s2
) {
    const __m256d one = _mm256_set1_pd(hidden_one());
    __m256d center[VECTORS], strip1[VECTORS], strip2[VECTORS];
    FOR_VECTORS(j, VECTORS) {
        center[j] = _mm256_loadu_pd(pivot + 4 * j);
        strip1[j] = strip2[j] = _mm256_setzero_pd();
    }
    ptrdiff_t r = 0;
    for (; r + PARTS <= n_rows; r += PARTS) {
        FOR_PARTS(i) {
            fetch(next, i);
            add_row(x + i * stride, VECTORS, one, center, strip1, strip2);
        }
        next.first += next.turn;
        x += PARTS * stride;
    }
    for (; r < n_rows; r++) {
        add_row(x, VECTORS, one, center, strip1, strip2);
        x += stride;
    }
    add_strips(s1, s2, VECTORS, one, strip1, strip2);
}

/* This one goes on from strip1 and strip2. */
static inline void grad_sums_part(
    const float *dy, ptrdiff_t dy_stride, struct coming dy_next, const float *x, ptrdiff_t x_stride, struct coming x_next,
    ptrdiff_t n_rows, const double *mean, double *strip1, double *strip2
) {
    const __m256d one = _mm256_set1_pd(hidden_one());
    __m256d center[VECTORS], sum_dy[VECTORS], sum_dy_xc[VECTORS];
    FOR_VECTORS(j, VECTORS) {
        center[j] = _mm256_loadu_pd(mean + 4 * j);
        sum_dy[j] = _mm256_loadu_pd(strip1 + 4 * j);
        sum_dy_xc[j] = _mm256_loadu_pd(strip2 + 4 * j);
    }
    ptrdiff_t r = 0;
    for (; r + PARTS <= n_rows; r += PARTS) {
        FOR_PARTS(i) {
            fetch(dy_next, i);
            fetch(x_next, i);
            grad_add_row(dy + i * dy_stride, x + i * x_stride, VECTORS, one, center, sum_dy, sum_dy_xc);
        }
        dy_next.first += dy_next.turn;
        x_next.first += x_next.turn;
        dy += PARTS * dy_stride;
        x += PARTS * x_stride;
    }
    for (; r < n_rows; r++) {
        grad_add_row(dy, x, VECTORS, one, center, sum_dy, sum_dy_xc);
        dy += dy_stride;
        x += x_stride;
    }
    FOR_VECTORS(j, VECTORS) {
        _mm256_storeu_pd(strip1 + 4 * j, sum_dy[j]);
        _mm256_storeu_pd(strip2 + 4 * j, sum_dy_xc[j]);
    }
}
#endif

/* As sums_strip, of STRIP columns. */
ALWAYS_INLINE void sums_strip_quads(
    const float *x, ptrdiff_t stride, ptrdiff_t n_rows, const double *pivot, double *s1, double *s2
) {
#if VECTOR_BYTES >= 32
    const __m256d one = _mm256_set1_pd(hidden_one());
    __m256d center[STRIP_VECTORS], strip1[STRIP_VECTORS], strip2[STRIP_VECTORS];
    FOR_VECTORS(j, STRIP_VECTORS) {
        center[j] = _mm256_loadu_pd(pivot + 4 * j);
        strip1[j] = _mm256_sub_pd(load_four(x + 4 * j), center[j]);
        strip2[j] = _mm256_mul_pd(strip1[j], strip1[j]);
    }
    for (ptrdiff_t r = 1; r < n_rows; r++)
        add_row(hidden(x + r * stride), STRIP_VECTORS, one, center, strip1, strip2);
    add_strips(s1, s2, STRIP_VECTORS, one, strip1, strip2);
#else
    (void)x, (void)stride, (void)n_rows, (void)pivot, (void)s1, (void)s2;
#endif
}

/* As grad_sums_strip, of STRIP columns, without a ReLU. */
ALWAYS_INLINE void grad_sums_strip_quads(
    const float *dy, ptrdiff_t dy_stride, const float *x, ptrdiff_t x_stride, ptrdiff_t n_rows,
    const double *mean, double *s1, double *s2
) {
#if VECTOR_BYTES >= 32
    const __m256d one = _mm256_set1_pd(hidden_one());
    __m256d center[STRIP_VECTORS], sum_dy[STRIP_VECTORS], sum_dy_xc[STRIP_VECTORS];
    FOR_VECTORS(j, STRIP_VECTORS) {
        center[j] = _mm256_loadu_pd(mean + 4 * j);
        sum_dy[j] = load_four(dy + 4 * j);
        sum_dy_xc[j] = _mm256_mul_pd(sum_dy[j], _mm256_sub_pd(load_four(x + 4 * j), center[j]));
    }
    for (ptrdiff_t r = 1; r < n_rows; r++)
        grad_add_row(hidden(dy + r * dy_stride), hidden(x + r * x_stride), STRIP_VECTORS, one, center, sum_dy, sum_dy_xc);
    add_strips(s1, s2, STRIP_VECTORS, one, sum_dy, sum_dy_xc);
#else
    (void)dy, (void)dy_stride, (void)x, (void)x_stride, (void)n_rows, (void)mean, (void)s1, (void)s2;
#endif
}

/* As sums_lanes: rows of STRIP lanes by eight, four, two, one, and what is left of the run. */
static inline void sums_run_quads(const float *x, ptrdiff_t length, const double *pivot, double *s1, double *s2) {
#if VECTOR_BYTES >= 32
    struct run_sums sums = load_run_sums(pivot, s1, s2);
    ptrdiff_t i = 0, n_rows = length / STRIP_COLUMNS;
    for (; n_rows >= 8; n_rows -= 8)
        i = add_run_rows(&sums, x, i, 8);
    if (n_rows & 4)
        i = add_run_rows(&sums, x, i, 4);
    if (n_rows & 2)
        i = add_run_rows(&sums, x, i, 2);
    if (n_rows & 1)
        i = add_run_rows(&sums, x, i, 1);
    FOR_VECTORS(j, STRIP_VECTORS)
        if (i + 4 * j < length) {
            ptrdiff_t n = lanes_left(length, i, j);
            __m256d d = _mm256_sub_pd(load_lanes(x + i + 4 * j, n), sums.center[j]);
            sums.s1[j] = add_lanes(sums.s1[j], d, n);
            sums.s2[j] = add_lanes(sums.s2[j], _mm256_mul_pd(d, d), n);
        }
    store_run_sums(&sums, s1, s2);
#else
    (void)x, (void)length, (void)pivot, (void)s1, (void)s2;
#endif
}

/* As grad_sums_lanes, without a ReLU. */
static inline void grad_sums_run_quads(
    const float *dy, const float *x, ptrdiff_t length, const double *mean, double *s1, double *s2
) {
#if VECTOR_BYTES >= 32
    struct run_sums sums = load_run_sums(mean, s1, s2);
    ptrdiff_t i = 0, n_rows = length / STRIP_COLUMNS;
    for (; n_rows >= 8; n_rows -= 8)
        i = grad_add_run_rows(&sums, dy, x, i, 8);
    if (n_rows & 4)
        i = grad_add_run_rows(&sums, dy, x, i, 4);
    if (n_rows & 2)
        i = grad_add_run_rows(&sums, dy, x, i, 2);
    if (n_rows & 1)
        i = grad_add_run_rows(&sums, dy, x, i, 1);
    FOR_VECTORS(j, STRIP_VECTORS)
        if (i + 4 * j < length) {
            ptrdiff_t n = lanes_left(length, i, j);
            __m256d dy_j = load_lanes(dy + i + 4 * j, n);
            __m256d d = _mm256_sub_pd(load_lanes(x + i + 4 * j, n), sums.center[j]);
            sums.s1[j] = add_lanes(sums.s1[j], dy_j, n);
            sums.s2[j] = add_lanes(sums.s2[j], _mm256_mul_pd(dy_j, d), n);
        }
    store_run_sums(&sums, s1, s2);
#else
    (void)dy, (void)x, (void)length, (void)mean, (void)s1, (void)s2;
#endif
}

/* As sums_strip, of HELD columns and up to HELD_ROWS rows. */
static inline void sums_held_quads(
    const float *x, ptrdiff_t stride, ptrdiff_t n_rows, const double *pivot, double *s1, double *s2
) {
#if VECTOR_BYTES >= 32
    for (ptrdiff_t part = 0; part < PARTS; part++) {
        ptrdiff_t j = part * PART;
        sums_part(x + j, stride, n_rows, coming(x, stride, n_rows, MOMENTS_ROWS, part), pivot + j, s1 + j, s2 + j);
    }
#else
    (void)x, (void)stride, (void)n_rows, (void)pivot, (void)s1, (void)s2;
#endif
}

/* As grad_sums_strip, of so many, without a ReLU. */
static inline void grad_sums_held_quads(
    const float *dy, ptrdiff_t dy_stride, const float *x, ptrdiff_t x_stride, ptrdiff_t n_rows,
    const double *mean, double *s1, double *s2
) {
#if VECTOR_BYTES >= 32
    double strip1[HELD_COLUMNS] = {0}, strip2[HELD_COLUMNS] = {0};
    for (ptrdiff_t r = 0; r < n_rows; r += GRAD_ROWS_EACH) {
        ptrdiff_t n = n_rows - r < GRAD_ROWS_EACH ? n_rows - r : GRAD_ROWS_EACH;
        for (ptrdiff_t part = 0; part < PARTS; part++) {
            ptrdiff_t j = part * PART;
            grad_sums_part(dy + j, dy_stride, coming(dy, dy_stride, n, GRAD_ROWS_EACH, part),
                           x + j, x_stride, coming(x, x_stride, n, GRAD_ROWS_EACH, part),
                           n, mean + j, strip1 + j, strip2 + j);
        }
        dy += GRAD_ROWS_EACH * dy_stride;
        x += GRAD_ROWS_EACH * x_stride;
    }
    for (int j = 0; j < HELD_COLUMNS; j++) {
        s1[j] += strip1[j];
        s2[j] += strip2[j];
    }
#else
    (void)dy, (void)dy_stride, (void)x, (void)x_stride, (void)n_rows, (void)mean, (void)s1, (void)s2;
#endif
}

#endif
