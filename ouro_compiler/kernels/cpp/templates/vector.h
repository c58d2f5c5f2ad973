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
typedef uint32_t uvec __attribute__((vector_size(LANES * 4)));  // sums of bits may wrap around

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

// Elementary functions of N vectors at a time, an operation of all of them after the other: a
// processor does not look far enough ahead to overlap whole functions.
#define OURO_EACH _Pragma("GCC unroll 8") for (int n = 0; n < N; n++)

// p = 2^f * 2^(the integer in the low bits of `shifted`), for |f| <= 0.5, with a relative error of
// at most 2.5e-7; 2^0 is exactly 1.
template <int N> static inline void scaled_exp2(const vec* f, const vec* shifted, vec* p) {
    OURO_EACH p[n] = fma(all(1.3264727e-3f), f[n], all(9.6715126e-3f));
    OURO_EACH p[n] = fma(p[n], f[n], all(5.5507337e-2f));
    OURO_EACH p[n] = fma(p[n], f[n], all(2.4022242e-1f));
    OURO_EACH p[n] = fma(p[n], f[n], all(6.9314698e-1f));
    OURO_EACH p[n] = fma(p[n], f[n], all(1.f));
    OURO_EACH p[n] = (vec)((uvec)p[n] + ((uvec)shifted[n] << 23));
}

// x = 2^x for -126 <= x < 128. Beyond: see exp2.
template <int N> static inline void exp2_inside(vec* x) {
    vec shifted[N], p[N];
    OURO_EACH shifted[n] = x[n] + all(0x1.8p23f);
    OURO_EACH x[n] = x[n] - (shifted[n] - all(0x1.8p23f));
    scaled_exp2<N>(x, shifted, p);
    OURO_EACH x[n] = p[n];
}

// The same for every x: 2^-126 below the range, infinite above, and not a number stays one.
template <int N> static inline void exp2(vec* x) {
    OURO_EACH x[n] = min(all(128.f), max(all(-126.f), x[n]));
    exp2_inside<N>(x);
}

static inline vec exp2_inside(vec x) { return exp2_inside<1>(&x), x; }
static inline vec exp2(vec x) { return exp2<1>(&x), x; }

constexpr float LOG2E = 1.4426950408889634f, LOG2E_REST = 1.92596299e-8f;

// x = e^-|x|, with a relative error of 3e-7; 0 below e^-86.5, and where x is not a number.
template <int N> static inline void exp_negative(vec* x) {
    vec shifted[N], f[N], p[N];
    OURO_EACH x[n] = (vec)((ivec)x[n] | ivec(all(-0.f)));
    OURO_EACH shifted[n] = fma(x[n], all(LOG2E), all(0x1.8p23f));
    OURO_EACH f[n] = fma(x[n], all(LOG2E), all(0x1.8p23f) - shifted[n]);
    OURO_EACH f[n] = fma(x[n], all(LOG2E_REST), f[n]);
    scaled_exp2<N>(f, shifted, p);
    OURO_EACH x[n] = (vec)((ivec)p[n] & (x[n] > all(-86.5f)));
}

// Lanes of `a` where x is negative, else of `b`.
static inline vec where_negative(vec x, vec a, vec b) { return x < 0 ? a : b; }

template <int N> static inline void sigmoid(vec* x) {
    vec e[N];
    OURO_EACH e[n] = x[n];
    exp_negative<N>(e);
    OURO_EACH x[n] = x[n] == x[n] ? where_negative(x[n], e[n], all(1.f)) / (1.f + e[n]) : x[n];
}

template <int N> static inline void silu(vec* x) {
    vec e[N];
    OURO_EACH e[n] = x[n];
    exp_negative<N>(e);
    OURO_EACH x[n] = x[n] * where_negative(x[n], e[n], all(1.f));
    OURO_EACH x[n] = x[n] / (1.f + e[n]);
}

// max(0, x) + log(1 + e^-|x|)
template <int N> static inline void softplus(vec* x) {
    vec s[N], s2[N], p[N];
    OURO_EACH s[n] = x[n];
    exp_negative<N>(s);
    OURO_EACH s[n] = s[n] / (s[n] + 2.f);
    OURO_EACH s2[n] = s[n] * s[n];
    OURO_EACH p[n] = fma(all(2 * 0.14005994f), s2[n], all(2 * 0.14000903f));
    OURO_EACH p[n] = fma(p[n], s2[n], all(2 * 0.20010764f));
    OURO_EACH p[n] = fma(p[n], s2[n], all(2 * 0.33333208f));
    OURO_EACH p[n] = fma(p[n], s2[n], all(2.f));
    OURO_EACH x[n] = fma(p[n], s[n], max(vec{}, x[n]));
}

// max(0, x) - |x| H(|x|), H the normal distribution's upper tail: 2^polynomial up to 5.7, 0 beyond
// (6e-9). Off by at most 2e-7 |x|; ATen's, 1 + erf in fp32, by 2.9e-7 |x|.
template <int N> static inline void gelu(vec* x) {
    vec t[N], p[N];
    OURO_EACH t[n] = min(all(5.7f), abs(x[n]));
    OURO_EACH p[n] = fma(all(-7.339626e-07f), t[n], all(1.2875381e-05f));
    OURO_EACH p[n] = fma(p[n], t[n], all(-5.5606753e-05f));
    OURO_EACH p[n] = fma(p[n], t[n], all(-0.00045615603f));
    OURO_EACH p[n] = fma(p[n], t[n], all(0.0074718976f));
    OURO_EACH p[n] = fma(p[n], t[n], all(-0.052761342f));
    OURO_EACH p[n] = fma(p[n], t[n], all(-0.45913106f));
    OURO_EACH p[n] = fma(p[n], t[n], all(-1.1511123f));
    OURO_EACH p[n] = fma(p[n], t[n], all(-1.f));
    exp2_inside<N>(p);
    OURO_EACH p[n] = (vec)((ivec)p[n] & (t[n] < all(5.7f)));
    OURO_EACH x[n] = fma(-t[n], p[n], max(vec{}, x[n]));
}

// x times the sigmoid of 2 sqrt(2 / pi) (x + 0.044715 x^3)
template <int N> static inline void gelu_tanh(vec* x) {
    vec inner[N];
    OURO_EACH inner[n] = fma(all(0.071354814f), x[n] * x[n], all(1.5957691f)) * x[n];
    sigmoid<N>(inner);
    OURO_EACH x[n] = x[n] * inner[n];
}
#undef OURO_EACH

static inline vec sigmoid(vec x) { return sigmoid<1>(&x), x; }
static inline vec silu(vec x) { return silu<1>(&x), x; }
static inline vec softplus(vec x) { return softplus<1>(&x), x; }
