// The recurrence of Mamba-1 over the tokens of a block of channels, wherever delta comes from.
//
// A task owns LANES channels and walks through time, so that a result depends neither on the number
// of threads nor on the other samples. Time is cut into tiles that stay in the first cache; inside
// one, a few states at a time are kept in registers.
#pragma once
#include "scan.h"
#include <algorithm>

constexpr int TILE = 64;
#if defined(__AVX512F__)
constexpr int STATES_AT_ONCE = STATES < 4 ? STATES : 4;
#else
constexpr int STATES_AT_ONCE = STATES < 2 ? STATES : 2;  // with what 2^x needs, 16 registers
#endif

struct Scan {
    const stored<DTYPE_U>* u;
    const stored<DTYPE_U>* z;
    stored<DTYPE_U>* y;
    Places u_places;
    int64_t sz_l, sy_l;
    const stored<DTYPE_BC>*B, *C;
    int64_t sb_n, sb_l, sc_n, sc_l;
};

// INSIDE: no exponent needs a bound. Not inlined: inside `scan` its registers go to memory.
template <int COUNT, bool INSIDE>
__attribute__((noinline)) static void states(const vec* a, vec* h, const vec* dt, const vec* dx, vec* acc,
                          const float* b, int64_t sb, const float* c, int64_t sc, int count) {
    vec state[COUNT];
    for (int n = 0; n < COUNT; n++) state[n] = h[n];
    for (int i = 0; i < count; i++) {
        const int t = REVERSE ? count - 1 - i : i;
        const vec step = dt[t], input = dx[t];
        vec sum = acc[t];
        vec decay[COUNT];
#pragma GCC unroll 8
        for (int n = 0; n < COUNT; n++) decay[n] = step * a[n];
        INSIDE ? exp2_inside<COUNT>(decay) : exp2<COUNT>(decay);
#pragma GCC unroll 8
        for (int n = 0; n < COUNT; n++) {
            state[n] = fma(decay[n], state[n], input * b[t * sb + n]);
            sum = fma(state[n], all(c[t * sc + n]), sum);
        }
        acc[t] = sum;
    }
    for (int n = 0; n < COUNT; n++) h[n] = state[n];
}

template <bool INSIDE>
static void all_states(const vec* a, vec* h, const vec* dt, const vec* dx, vec* acc, const float* b,
                       int64_t sb, const float* c, int64_t sc, int count) {
    int n = 0;
    for (; n + STATES_AT_ONCE <= STATES; n += STATES_AT_ONCE)
        states<STATES_AT_ONCE, INSIDE>(a + n, h + n, dt, dx, acc, b + n, sb, c + n, sc, count);
    for (; n < STATES; n++)
        states<1, INSIDE>(a + n, h + n, dt, dx, acc, b + n, sb, c + n, sc, count);
}

// delta(first, count, to): delta plus its bias at tokens first ... first + count - 1.
template <class Delta>
static void scan(const Scan& s, const Delta& delta, const vec* a, vec skip, bool softplus_delta,
                 int64_t length, int lanes) {
    vec h[STATES] = {};
    vec dt[TILE], dx[TILE], acc[TILE];
    float b_buffer[TILE * STATES], c_buffer[TILE * STATES];
    // Exponents are step * a: between step * least and 0 for what a model usually has.
    vec least = a[0], greatest = a[0];
    for (int n = 1; n < STATES; n++) least = min(least, a[n]), greatest = max(greatest, a[n]);
    const ivec always = greatest <= 0;
    const int64_t to_row = s.u_places.row - s.u_places.width * s.u_places.token;
    const int64_t tiles = (length + TILE - 1) / TILE;
    for (int64_t i = 0; i < tiles; i++) {
        const int64_t first = (REVERSE ? tiles - 1 - i : i) * TILE;
        const int count = int(std::min<int64_t>(TILE, length - first));
        ivec inside = always;
        delta(first, count, dt);
        if (softplus_delta) {
            int t = 0;
            for (; t + 4 <= count; t += 4) softplus<4>(dt + t);
            for (; t < count; t++) dt[t] = softplus(dt[t]);
        }
        const auto* u = s.u + s.u_places.at(first);
        int64_t column = first % s.u_places.width;
        for (int t = 0; t < count; t++) {
            const vec step = dt[t], x = load<DTYPE_U>(u, lanes);
            u += s.u_places.token;
            if (++column == s.u_places.width) u += to_row, column = 0;
            inside &= (step >= 0) & (step * least >= -126);
            dx[t] = step * x;
            acc[t] = skip * x;
        }
        int64_t sb, sc;
        const float* b = rows<DTYPE_BC>(s.B, s.sb_n, s.sb_l, first, count, b_buffer, sb);
        const float* c = rows<DTYPE_BC>(s.C, s.sc_n, s.sc_l, first, count, c_buffer, sc);
        if (any(~inside))
            all_states<false>(a, h, dt, dx, acc, b, sb, c, sc, count);
        else
            all_states<true>(a, h, dt, dx, acc, b, sb, c, sc, count);
        for (int t = 0; t < count; t++) {
            vec y = acc[t];
            if (s.z) y *= silu(load<DTYPE_U>(s.z + (first + t) * s.sz_l, lanes));
            store<DTYPE_U>(s.y + (first + t) * s.sy_l, y, lanes);
        }
    }
}
