// 2^x and log2(x) as ops/elementary.py defines them: the same operations in the same order, without
// fused multiply-adds, so that what is rounded to a code is the same value bit for bit.
#pragma once
#include "vector.h"

#define OURO_EACH _Pragma("GCC unroll 8") for (int n = 0; n < N; n++)

// x = 2^x; 2^-126 below, infinite from 128 on, and not a number stays one.
template <int N> static inline void exp2_exact(vec* x) {
    vec shifted[N], p[N];
    OURO_EACH x[n] = min(all(128.f), max(all(-126.f), x[n]));
    OURO_EACH shifted[n] = x[n] + all(0x1.8p23f);
    OURO_EACH x[n] = x[n] - (shifted[n] - all(0x1.8p23f));
    OURO_EACH p[n] = all(1.3264727e-3f) * x[n] + all(9.6715126e-3f);
    OURO_EACH p[n] = p[n] * x[n] + all(5.5507337e-2f);
    OURO_EACH p[n] = p[n] * x[n] + all(2.4022242e-1f);
    OURO_EACH p[n] = p[n] * x[n] + all(6.9314698e-1f);
    OURO_EACH p[n] = p[n] * x[n] + all(1.f);
    OURO_EACH x[n] = (vec)((uvec)p[n] + ((uvec)shifted[n] << 23));
}

// x = log2(x); minus infinity under 2^-126, and where x is not a number.
template <int N> static inline void log2_exact(vec* x) {
    ivec exponent[N];
    vec rest[N], p[N];
    OURO_EACH exponent[n] = ((ivec)x[n] - 0x3f3504f3) >> 23;
    OURO_EACH rest[n] = (vec)((uvec)x[n] - ((uvec)exponent[n] << 23)) - all(1.f);
    OURO_EACH p[n] = all(-0.145989046f) * rest[n] + all(0.236745417f);
    OURO_EACH p[n] = p[n] * rest[n] + all(-0.24992393f);
    OURO_EACH p[n] = p[n] * rest[n] + all(0.286727428f);
    OURO_EACH p[n] = p[n] * rest[n] + all(-0.360103816f);
    OURO_EACH p[n] = p[n] * rest[n] + all(0.480938464f);
    OURO_EACH p[n] = p[n] * rest[n] + all(-0.72135663f);
    OURO_EACH p[n] = p[n] * rest[n] + all(1.44269478f);
    OURO_EACH p[n] = __builtin_convertvector(exponent[n], vec) + rest[n] * p[n];
    OURO_EACH x[n] = x[n] >= all(0x1p-126f) ? p[n] : all(-__builtin_inff());
}
#undef OURO_EACH

template <int COUNT> static inline void exp2_exact_of(vec* x) {
    constexpr int whole = COUNT / 4 * 4;
    for (int n = 0; n < whole; n += 4) exp2_exact<4>(x + n);
    for (int n = whole; n < COUNT; n++) exp2_exact<1>(x + n);
}

template <int COUNT> static inline void log2_exact_of(vec* x) {
    constexpr int whole = COUNT / 4 * 4;
    for (int n = 0; n < whole; n += 4) log2_exact<4>(x + n);
    for (int n = whole; n < COUNT; n++) log2_exact<1>(x + n);
}
