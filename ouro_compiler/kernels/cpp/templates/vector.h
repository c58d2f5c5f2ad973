// Vectors of floats in the machine's width, and the elementary functions every kernel shares.
//
// Every operation is elementwise and rounds once, so that a result depends neither on the width nor
// on the lane: a machine with AVX-512 and one with AVX2 give the same bits.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));

// a * b + c, rounded once.
static inline vec fma(vec a, vec b, vec c) {
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && defined(__AVX2__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    vec r;
    for (int i = 0; i < LANES; i++) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return r;
#endif
}

// Not a number stays one: the second operand wins a comparison with it.
static inline vec max(vec a, vec b) {
#if defined(__AVX512F__)
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

static inline vec min(vec a, vec b) {
#if defined(__AVX512F__)
    return (vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
}

static inline vec all(float value) {
#if defined(__AVX512F__)
    return (vec)_mm512_set1_ps(value);
#elif defined(__AVX2__)
    return (vec)_mm256_set1_ps(value);
#else
    return vec{value, value, value, value};
#endif
}

// Bit i of the result: is element i of a comparison's result set?
static inline unsigned bits_of(ivec mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX2__)
    return unsigned(_mm256_movemask_ps((__m256)mask));
#else
    unsigned found = 0;
    for (int i = 0; i < LANES; i++) found |= unsigned(mask[i] & 1) << i;
    return found;
#endif
}

static inline bool any(ivec mask) { return bits_of(mask) != 0; }

// The sum of x's elements, in a fixed order.
static inline float sum(vec x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

#if defined(__AVX__)
static inline __m256 fold(vec x) {  // to eight elements
#if defined(__AVX512F__)
    return _mm256_add_ps(_mm512_castps512_ps256((__m512)x),
                         _mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)x, 1)));
#else
    return (__m256)x;
#endif
}
#endif

// sums[i] += the sum of the elements of v[i], for four vectors; in another order than sum's.
static inline void add_four_sums(float* sums, const vec* v) {
#if defined(__AVX__)
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(fold(v[0]), fold(v[1])),
                                        _mm256_hadd_ps(fold(v[2]), fold(v[3])));
    const __m128 four =
        _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
    _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), four));
#else
    for (int k = 0; k < 4; k++) sums[k] += sum(v[k]);
#endif
}

static inline vec abs(vec x) { return (vec)((ivec)x & 0x7fffffff); }

// x rounded to an integer, half to even, for |x| < 2^22.
static inline vec round_even(vec x) {
    const vec magic = all(0x1.8p23f);
    return (x + magic) - magic;
}

// 2^x for -126 <= x < 128, with a relative error of at most 2.5e-7; 2^0 is exactly 1.
static inline vec exp2_inside(vec x) {
    const vec magic = all(0x1.8p23f);
    vec shifted = x + magic;
    vec f = x - (shifted - magic);
    vec p = all(1.3264727e-3f);
    p = fma(p, f, all(9.6715126e-3f));
    p = fma(p, f, all(5.5507337e-2f));
    p = fma(p, f, all(2.4022242e-1f));
    p = fma(p, f, all(6.9314698e-1f));
    p = fma(p, f, all(1.f));
    return (vec)((ivec)p + ((ivec)shifted << 23));
}

// The same for every x: 2^-126 below the range, infinite above, and not a number stays one.
static inline vec exp2(vec x) { return exp2_inside(min(all(128.f), max(all(-126.f), x))); }

constexpr float LOG2E = 1.4426950408889634f;

// e^x with a relative error of 2.5e-7 for any x: log2(e) in two parts, the power of two in two steps
// (it may overflow to infinity and underflow to 0). Not a number stays one.
static inline vec exp(vec x) {
    x = min(all(89.f), max(all(-104.f), x));
    const vec magic = all(0x1.8p23f);
    const vec shifted = fma(x, all(LOG2E), magic);
    const vec n = shifted - magic;
    const vec f = fma(n, all(-1.42860677e-6f), fma(n, all(-0.693145752f), x)) * LOG2E;
    vec p = all(1.3264727e-3f);
    p = fma(p, f, all(9.6715126e-3f));
    p = fma(p, f, all(5.5507337e-2f));
    p = fma(p, f, all(2.4022242e-1f));
    p = fma(p, f, all(6.9314698e-1f));
    p = fma(p, f, all(1.f));
    const ivec power = (ivec)shifted - (ivec)magic, half = power >> 1;
    return p * (vec)(half + 127 << 23) * (vec)(power - half + 127 << 23);
}

// log(1 + y) for y in [0, 1].
static inline vec log1p(vec y) {
    vec s = y / (y + 2.f), s2 = s * s;
    vec p = all(0.14005994f);
    p = fma(p, s2, all(0.14000903f));
    p = fma(p, s2, all(0.20010764f));
    p = fma(p, s2, all(0.33333208f));
    p = fma(p, s2, all(1.f));
    return 2.f * s * p;
}

static inline vec sigmoid(vec x) { return 1.f / (1.f + exp(-x)); }
static inline vec silu(vec x) { return x / (1.f + exp(-x)); }
static inline vec softplus(vec x) { return max(vec{}, x) + log1p(exp(-abs(x))); }
