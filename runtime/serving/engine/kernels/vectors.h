/* Sixteen floats at a time in GCC's vector types, for AVX-512, AVX2 and what every x86-64 has.
 *
 * A kernel is `void kernel(void *job)`, called by each of several threads: a thread takes the next task of the job
 * until none is left. __init__.py has the same structures and says what the sizes mean. NaN and infinity have to
 * come out where they went in: nothing here may be compiled with -ffast-math.
 */
#pragma once
#include <math.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#if defined(KERNEL) /* -DKERNEL=void: for the one kind of processor that the compiler is told */
#elif defined(__x86_64__)
#define KERNEL __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"))) void
#else
#define KERNEL void
#endif
#define WIDTH 16

typedef float floats __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef float half __attribute__((vector_size(32)));
typedef float quarter __attribute__((vector_size(16)));

/* Before loops whose bounds a caller knows: what they run over stays in registers. */
#define UNROLL _Pragma("GCC unroll 16")

INLINE floats load(const float *from) { return *(const floats *)from; }
INLINE void store(float *to, floats x) { *(floats *)to = x; }
INLINE floats choose(ints mask, floats yes, floats no)
{
    return (floats)((mask & (ints)yes) | (~mask & (ints)no));
}

INLINE float sum(floats x)
{
    union { floats whole; half part[2]; } halves = {x};
    union { half whole; quarter part[2]; } quarters = {halves.part[0] + halves.part[1]};
    quarter four = quarters.part[0] + quarters.part[1];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

/* e to the x, 2 ulp; NaN stays NaN. x = n ln 2 + r, a polynomial in r (Cephes' coefficients), n into the exponent. */
INLINE floats exponential(floats x)
{
    const floats min = (floats){} - 87.3f, max = (floats){} + 88.0f;
    x = choose(x < min, min, x);
    x = choose(x > max, max, x);
    const floats shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: n is in the low bits */
    const floats n = shifted - 12582912.0f;
    const floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return (floats)((ints)p + (((ints)shifted - 0x4B400000) << 23));
}

INLINE int64_t take(int64_t *next) { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }
