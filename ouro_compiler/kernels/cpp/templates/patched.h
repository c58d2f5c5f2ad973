// What the patched scan and its backward share: a sample's patches as lists, and all its states.
#pragma once
#include "scan.h"
#include <algorithm>
#include <vector>

#if defined(__AVX512F__)
constexpr int STATES_AT_ONCE = STATES < 8 ? STATES : 8;
#else
constexpr int STATES_AT_ONCE = STATES < 4 ? STATES : 4;
#endif
constexpr int SUMS_AT_ONCE = STATES < 8 ? STATES : 8;  // of states over patches

struct Weighted {
    int32_t at;  // a token in an anchor's list, an anchor in a token's
    float weight;
};

// The arguments that say where patches are.
struct Windows {
    const float* weights;                // (B, P, K)
    const int64_t *anchors, *neighbours;  // (W, P) and (W, P, K)
    int64_t windows, patches, around;

    const int64_t* anchors_of(int64_t sample) const { return anchors + sample % windows * patches; }

    // visit(p, token, weight) for what is there of a sample, in order.
    template <class Visit> void each(int64_t sample, Visit visit) const {
        const int64_t* anchor = anchors_of(sample);
        const int64_t* tokens = neighbours + sample % windows * patches * around;
        const float* weight = weights + sample * patches * around;
        for (int64_t p = 0; p < patches; p++)
            for (int64_t i = p * around; anchor[p] >= 0 && i < (p + 1) * around; i++)
                if (tokens[i] >= 0) visit(p, tokens[i], weight[i]);
    }
};

// Lists one behind the other: list i is entries[first[i]] .. entries[first[i + 1]].
struct Lists {
    std::vector<int32_t> first;
    std::vector<Weighted> entries;

    const Weighted* begin(int64_t i) const { return entries.data() + first[i]; }
    const Weighted* end(int64_t i) const { return entries.data() + first[i + 1]; }

    void by_anchor(const Windows& w, int64_t sample) {
        first.assign(w.patches + 1, 0);
        entries.resize(w.patches * w.around);
        int32_t count = 0;
        w.each(sample, [&](int64_t p, int64_t token, float weight) {
            entries[count++] = {int32_t(token), weight};
            first[p + 1] = count;
        });
        for (int64_t p = 0; p < w.patches; p++) first[p + 1] = std::max(first[p], first[p + 1]);
    }

    void by_token(const Windows& w, int64_t sample, int64_t length) {
        first.assign(length + 2, 0);
        w.each(sample, [&](int64_t, int64_t token, float) { first[token + 2]++; });
        for (int64_t t = 0; t < length; t++) first[t + 2] += first[t + 1];
        entries.resize(first[length + 1]);
        w.each(sample, [&](int64_t p, int64_t token, float weight) {
            entries[first[token + 1]++] = {int32_t(p), weight};
        });
    }
};

// C at every anchor, as (P, STATES); 0 where there is none.
static inline void read_c(const stored<DTYPE_BC>* C, int64_t s_n, int64_t s_l,
                          const int64_t* anchors, int64_t patches, float* out) {
    for (int64_t p = 0; p < patches; p++)
        for (int n = 0; n < STATES; n++)
            out[p * STATES + n] =
                anchors[p] < 0 ? 0 : to_float<DTYPE_BC>(C[anchors[p] * s_l + n * s_n]);
}

// LANES channels of a sample through time.
struct Channels {
    const stored<DTYPE_U>* u;
    const stored<DTYPE_DELTA>* delta;
    int64_t su_l, sd_l;
    const float* b;  // (L, STATES), a token sb apart
    int64_t sb;
    vec a[STATES];  // A times log2(e)
    int lanes;
    int64_t length;

    int64_t token(int64_t i) const { return REVERSE ? length - 1 - i : i; }

    // dt and dx: step and step * u; states: (L, STATES). All in the order of tokens.
    void scan(vec* dt, vec* dx, vec* states) const {
        for (int64_t t = 0; t < length; t++) {
            dt[t] = load<DTYPE_DELTA>(delta + t * sd_l, lanes);
            dx[t] = dt[t] * load<DTYPE_U>(u + t * su_l, lanes);
        }
        int n = 0;
        for (; n + STATES_AT_ONCE <= STATES; n += STATES_AT_ONCE)
            some<STATES_AT_ONCE>(dt, dx, states, n);
        for (; n < STATES; n++) some<1>(dt, dx, states, n);
    }

    template <int COUNT> void some(const vec* dt, const vec* dx, vec* states, int n) const {
        vec state[COUNT] = {};
        for (int64_t i = 0; i < length; i++) {
            const int64_t t = token(i);
            const vec step = dt[t], input = dx[t];
#pragma GCC unroll 8
            for (int k = 0; k < COUNT; k++) {
                state[k] = fma(exp2(step * a[n + k]), state[k], input * b[t * sb + n + k]);
                states[t * STATES + n + k] = state[k];
            }
        }
    }
};

template <int COUNT>
static inline void mix_some(const Weighted* near, const Weighted* end, const vec* states, vec* out) {
    vec sum[COUNT] = {};
    for (; near != end; near++) {
        const vec weight = all(near->weight), *state = states + int64_t(near->at) * STATES;
#pragma GCC unroll 8
        for (int k = 0; k < COUNT; k++) sum[k] = fma(weight, state[k], sum[k]);
    }
    for (int k = 0; k < COUNT; k++) out[k] = sum[k];
}

// out[n]: the states around an anchor, weighted.
static inline void mix(const Weighted* near, const Weighted* end, const vec* states, vec* out) {
    int n = 0;
    for (; n + SUMS_AT_ONCE <= STATES; n += SUMS_AT_ONCE)
        mix_some<SUMS_AT_ONCE>(near, end, states + n, out + n);
    for (; n < STATES; n++) mix_some<1>(near, end, states + n, out + n);
}
