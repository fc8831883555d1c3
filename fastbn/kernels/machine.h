/* What the kernels need of the compiler and the machine, and Cython has no word for. */
#ifndef FASTBN_MACHINE_H
#define FASTBN_MACHINE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#ifdef _OPENMP
#include <omp.h>
#define fastbn_has_openmp 1
static inline int team_rank(void) { return omp_get_thread_num(); }
static inline int team_size(void) { return omp_get_num_threads(); }
/* An orphaned barrier binds to the parallel region that called us. */
static inline void team_barrier(void) {
#pragma omp barrier
}
#else
#define fastbn_has_openmp 0
static inline int team_rank(void) { return 0; }
static inline int team_size(void) { return 1; }
static inline void team_barrier(void) {}
#endif

/* Threads at work in all the calls now in flight (from several Python threads). A call takes what its own limit leaves
   beside the others', and at least itself, so together they do not oversubscribe; the bits do not depend on it. */
#if defined(_OPENMP) && defined(__GNUC__)
static int team_busy;
static inline int team_take(int wanted) {
    int busy = __atomic_load_n(&team_busy, __ATOMIC_RELAXED);
    while (wanted - busy > 1)
        if (__atomic_compare_exchange_n(&team_busy, &busy, wanted, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
            return wanted - busy;
    return 1;
}
static inline void team_give(int taken) {
    if (taken > 1)
        __atomic_fetch_sub(&team_busy, taken, __ATOMIC_RELAXED);
}
#else
static inline int team_take(int wanted) { return wanted > 1 ? wanted : 1; }
static inline void team_give(int taken) { (void)taken; }
#endif

/* The widest instruction set that this processor and its system offer: 0 baseline, 1 AVX2 + FMA, 2 AVX-512. */
static inline int fastbn_cpu_level(void) {
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
        return 0;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
        return 2;
    return 1;
#else
    return 0;
#endif
}

/* Whether it loads two whole vectors of AVX-512 a cycle, as an AMD does that has this instruction set (from Zen 5 on); a
   Zen 4 loads one. */
static inline int loads_two(void) {
#if defined(__x86_64__) && defined(__GNUC__)
    return __builtin_cpu_is("amd") && __builtin_cpu_supports("avx512vp2intersect");
#else
    return 0;
#endif
}

/* Whether it is a Zen 3 or 4, by what it has. They find by themselves what lies in their caches. */
static inline int is_zen3_or_4(void) {
#if defined(__x86_64__) && defined(__GNUC__)
    return __builtin_cpu_is("amd") && __builtin_cpu_supports("vpclmulqdq") && !loads_two();
#else
    return 0;
#endif
}

/* A load waits for a store before it whose address differs by a multiple of this: of a page on Zen 4, on a Sapphire Rapids
   of 1 MiB of physical memory (in huge pages, which NumPy asks for, of virtual memory as well). On a Zen 5 going back to be
   out of the way took 65536x256 affine 1.27 times as long as to wait, the gradients of 4096x1024 1.14; so there, of none. */
static inline uintptr_t alias_bytes(void) {
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
    if (loads_two())
        return UINTPTR_MAX / 2 + 1;
    if (__builtin_cpu_is("amd"))
        return 4096;
#endif
    return 1 << 20;
}

/* Bytes of a vector of the instruction set that this is compiled for. */
#if defined(__AVX512F__) && defined(__FMA__)
#define VECTOR_BYTES 64
#elif defined(__AVX2__) && defined(__FMA__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

static inline void prefetch(const void *address) {
#if defined(__GNUC__)
    __builtin_prefetch(address);
#else
    (void)address;
#endif
}

/* Into the second cache. */
static inline void prefetch_far(const void *address) {
#if defined(__GNUC__)
    __builtin_prefetch(address, 0, 2);
#else
    (void)address;
#endif
}

static inline void prefetch_write(const void *address) {
#if defined(__GNUC__)
    __builtin_prefetch(address, 1);
#else
    (void)address;
#endif
}

/* row[j] = x[j] for j < n, in whole vectors. Floats are converted as they are loaded: the compiler would load a line and
   take it apart, and the sums of 256x512, on one thread, took 9 to 24 % longer. Of doubles it would take some columns in
   vectors across the rows, and so round otherwise there. */
static inline void load_floats(double *row, const float *x, ptrdiff_t n) {
    ptrdiff_t j = 0;
#if defined(__AVX512F__)
    for (; j + 8 <= n; j += 8)
        _mm512_storeu_pd(row + j, _mm512_cvtps_pd(_mm256_loadu_ps(x + j)));
#endif
#if defined(__AVX__)
    for (; j + 4 <= n; j += 4)
        _mm256_storeu_pd(row + j, _mm256_cvtps_pd(_mm_loadu_ps(x + j)));
#endif
    for (; j < n; j++)
        row[j] = x[j];
}

static inline void load_doubles(double *row, const double *x, ptrdiff_t n) {
    ptrdiff_t j = 0;
#if defined(__AVX512F__)
    for (; j + 8 <= n; j += 8)
        _mm512_storeu_pd(row + j, _mm512_loadu_pd(x + j));
#endif
#if defined(__AVX__)
    for (; j + 4 <= n; j += 4)
        _mm256_storeu_pd(row + j, _mm256_loadu_pd(x + j));
#elif defined(__GNUC__)
    typedef double pair __attribute__((vector_size(16), aligned(8), may_alias));
    for (; j + 2 <= n; j += 2)
        *(pair *)(row + j) = *(const pair *)(x + j);
#endif
    for (; j < n; j++)
        row[j] = x[j];
}

/* 1, which the compiler does not know: x * hidden_one() + y is a fused multiply-add, in the bits of the addition. */
static inline double hidden_one(void) {
    double one = 1;
#if defined(__FMA__) && defined(__GNUC__)
    __asm__("" : "+x"(one));
#endif
    return one;
}

/* x * y + z, in one rounding where the instruction set can: whatever else a compiler fuses, sums have the same bits. */
static inline double multiply_add(double x, double y, double z) {
#if defined(__FMA__) && defined(__GNUC__)
    return __builtin_fma(x, y, z);
#else
    return x * y + z;
#endif
}

/* x * y, in a rounding of its own: a compiler for x86's FMA would fuse it with an addition that follows. */
static inline double multiply(double x, double y) {
#if defined(__FMA__) && defined(__GNUC__)
    return __builtin_fma(x, y, 0);
#else
    return x * y;
#endif
}

/* The pointer, of which the compiler does not know that it moves by a step each time: for the rows of a step and for what
   they fetch ahead it would keep 16 pointers, move each, and spill some. Sums of the backward: float64 0.81 to 0.93 of the
   time, images 0.9 to 0.96, float32 columns 0.94 to 1; moments of 64x512x7x7 0.91, the others as before. */
static inline const void *hidden(const void *pointer) {
#if defined(__GNUC__)
    __asm__("" : "+r"(pointer));
#endif
    return pointer;
}

/* Copies the 64 bytes of a cache line past the caches to target, which is aligned to them. All are loaded before the first
   is stored, lest loads wait for stores (see alias_bytes). */
static inline void stream_line(void *target, const void *source) {
#if defined(__AVX512F__)
    _mm512_stream_si512(target, _mm512_loadu_si512(source));
#elif defined(__AVX__)
    __m256i part[2];
    for (int i = 0; i < 2; i++)
        part[i] = _mm256_loadu_si256((const __m256i *)source + i);
    for (int i = 0; i < 2; i++)
        _mm256_stream_si256((__m256i *)target + i, part[i]);
#elif defined(__SSE2__)
    __m128i part[4];
    for (int i = 0; i < 4; i++)
        part[i] = _mm_loadu_si128((const __m128i *)source + i);
    for (int i = 0; i < 4; i++)
        _mm_stream_si128((__m128i *)target + i, part[i]);
#else
    memcpy(target, source, 64);
#endif
}

/* Orders non-temporal stores before what follows; a thread calls it after its last one. */
static inline void stream_end(void) {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

#endif
