// ouro::selective_scan_backward: gradients of the recurrence of Mamba-1 (ops/chunked_scan.py).
//
// A task owns SLAB channels of one sample and takes LANES of them at a time: once through the tiles
// of time to keep the state at the entry of each, then back through the tiles, recomputing a few
// states of all of a tile's tokens at once. Sums over channels (B, C) are kept for every slab, sums
// over time (A, D, delta_bias) for every sample; they are added up at the end, each in one order,
// so that no gradient depends on the number of threads.
#include "scan.h"
#include <algorithm>
#include <vector>

constexpr int TILE = 64;
#if defined(__AVX512F__)
constexpr int STATES_AT_ONCE = STATES < 8 ? STATES : 8;
#else
constexpr int STATES_AT_ONCE = STATES < 4 ? STATES : 4;
#endif
constexpr int SUMS = STATES + 2;  // of a channel over time: A's row, D, delta_bias
constexpr float LN2 = 0.6931471805599453f;

// LANES channels of a sample; matrices point at their first one.
struct Channels {
    const stored<DTYPE_U>*grad, *u, *z;
    const stored<DTYPE_DELTA>* delta;
    int64_t sy_l, su_l, sz_l, sd_l;
    stored<DTYPE_U>*grad_u, *grad_z;
    stored<DTYPE_DELTA>* grad_delta;
    int64_t channels;  // what a token of these takes
    const stored<DTYPE_BC>*B, *C;
    int64_t sb_n, sb_l, sc_n, sc_l;
    vec a[STATES], skip, bias;  // a is A times log2(e)
    bool softplus_delta;
    int lanes;
    int64_t length;
    float *grad_b, *grad_c;  // (L, STATES) of the slab
    float* sums;             // (lanes, SUMS)

    vec step_before_softplus(int64_t t) const {
        return load<DTYPE_DELTA>(delta + t * sd_l, lanes) + bias;
    }
    vec input(int64_t t) const { return load<DTYPE_U>(u + t * su_l, lanes); }
    vec gate(int64_t t) const { return load<DTYPE_U>(z + t * sz_l, lanes); }
    vec gradient(int64_t t) const { return load<DTYPE_U>(grad + t * sy_l, lanes); }
};

// Tokens first .. first + count; what is indexed by i is in the scan's order.
struct Tile {
    int64_t first;
    int count;
    vec dt[TILE], dx[TILE], dy[TILE];            // step, step * u, gradient of C . h
    vec product[TILE];                           // C . h
    vec grad_dx[TILE], grad_exponents_a[TILE];   // sums over states
    const float *b, *c;
    int64_t sb, sc;
    float b_buffer[TILE * STATES], c_buffer[TILE * STATES];

    // The first tile of a scan is the short one: the last tile's states are computed once.
    Tile(const Channels& s, int64_t index, int64_t tiles) {
        const int64_t stop = s.length - (tiles - 1 - index) * TILE;  // in the scan's order
        count = int(std::min<int64_t>(TILE, stop));
        first = REVERSE ? s.length - stop : stop - count;
        b = rows<DTYPE_BC>(s.B, s.sb_n, s.sb_l, first, count, b_buffer, sb);
        for (int i = 0; i < count; i++) {
            const vec step = s.step_before_softplus(first + token(i));
            dt[i] = s.softplus_delta ? softplus(step) : step;
            dx[i] = dt[i] * s.input(first + token(i));
        }
    }

    void prepare_gradients(const Channels& s) {
        c = rows<DTYPE_BC>(s.C, s.sc_n, s.sc_l, first, count, c_buffer, sc);
        for (int i = 0; i < count; i++) {
            dy[i] = s.gradient(first + token(i));
            if (s.z) dy[i] *= silu(s.gate(first + token(i)));
            product[i] = grad_dx[i] = grad_exponents_a[i] = vec{};
        }
    }

    int token(int i) const { return REVERSE ? count - 1 - i : i; }
};

// States n .. n + COUNT through a tile; with KEEP all states and decays are written, COUNT a token.
template <int COUNT, bool KEEP>
static inline void forward(const Tile& tile, const vec* a, int n, vec* h, vec* states, vec* decays) {
    vec state[COUNT];
    for (int k = 0; k < COUNT; k++) state[k] = h[n + k];
    for (int i = 0; i < tile.count; i++) {
        const float* b = tile.b + tile.token(i) * tile.sb + n;
        const vec step = tile.dt[i], input = tile.dx[i];
#pragma GCC unroll 8
        for (int k = 0; k < COUNT; k++) {
            const vec decay = exp2(step * a[n + k]);
            state[k] = fma(decay, state[k], input * b[k]);
            if (KEEP) decays[i * COUNT + k] = decay, states[i * COUNT + k] = state[k];
        }
    }
    for (int k = 0; k < COUNT; k++) h[n + k] = state[k];
}

// Sums over channels of terms (count, COUNT), added to columns n .. n + COUNT of a tile's rows.
template <int COUNT>
static inline void add_sums(const Tile& tile, const vec* terms, int n, float* grad_rows) {
    float sums[TILE * COUNT] = {};
    const int total = tile.count * COUNT;
    for (int i = 0; i + 4 <= total; i += 4) add_four_sums(sums + i, terms + i);
    for (int i = total / 4 * 4; i < total; i++) sums[i] = sum(terms[i]);
    for (int i = 0; i < tile.count; i++) {
        float* row = grad_rows + (tile.first + tile.token(i)) * STATES + n;
        for (int k = 0; k < COUNT; k++) row[k] += sums[i * COUNT + k];
    }
}

// States n .. n + COUNT of a tile entered with h: forward again, then back. grad_h is the gradient
// of the state at the tile's end, and at its entry afterwards.
template <int COUNT>
static inline void backward(Tile& tile, const Channels& s, int n, vec* h, vec* grad_h, vec* grad_a) {
    vec states[(TILE + 1) * COUNT], decays[TILE * COUNT];  // states[0 .. COUNT] are those at entry
    vec grad[COUNT], sum_a[COUNT];
    for (int k = 0; k < COUNT; k++) {
        states[k] = h[n + k];
        grad[k] = grad_h[n + k];
        sum_a[k] = grad_a[n + k];
    }
    forward<COUNT, true>(tile, s.a, n, h, states + COUNT, decays);
    for (int i = tile.count - 1; i >= 0; i--) {
        const float* b = tile.b + tile.token(i) * tile.sb + n;
        const float* c = tile.c + tile.token(i) * tile.sc + n;
        const vec dy = tile.dy[i], dx = tile.dx[i], step = tile.dt[i];
        vec product = tile.product[i], grad_dx = tile.grad_dx[i], to_step = tile.grad_exponents_a[i];
#pragma GCC unroll 8
        for (int k = 0; k < COUNT; k++) {
            vec &state = states[(i + 1) * COUNT + k], &decay = decays[i * COUNT + k];
            const vec total = fma(dy, all(c[k]), grad[k]);
            product = fma(state, all(c[k]), product);
            grad_dx = fma(total, all(b[k]), grad_dx);
            grad[k] = total * decay;
            const vec grad_exponent = grad[k] * states[i * COUNT + k];
            to_step = fma(grad_exponent, s.a[n + k], to_step);
            sum_a[k] = fma(grad_exponent, step, sum_a[k]);
            state *= dy;  // the terms of C's gradient
            decay = dx * total;  // and of B's
        }
        tile.product[i] = product;
        tile.grad_dx[i] = grad_dx;
        tile.grad_exponents_a[i] = to_step;
    }
    add_sums<COUNT>(tile, decays, n, s.grad_b);
    add_sums<COUNT>(tile, states + COUNT, n, s.grad_c);
    for (int k = 0; k < COUNT; k++) {
        grad_h[n + k] = grad[k];
        grad_a[n + k] = sum_a[k];
    }
}

static void write_tile(const Tile& tile, const Channels& s, vec& grad_skip, vec& grad_bias) {
    for (int i = 0; i < tile.count; i++) {
        const int64_t t = tile.first + tile.token(i);
        const vec x = s.input(t), dy = tile.dy[i];
        vec grad_step = fma(tile.grad_dx[i], x, tile.grad_exponents_a[i] * LN2);
        if (s.softplus_delta) grad_step *= sigmoid(s.step_before_softplus(t));
        const vec grad_u = fma(tile.grad_dx[i], tile.dt[i], dy * s.skip);
        store<DTYPE_U>(s.grad_u + t * s.channels, grad_u, s.lanes);
        store<DTYPE_DELTA>(s.grad_delta + t * s.channels, grad_step, s.lanes);
        grad_skip = fma(dy, x, grad_skip);
        grad_bias += grad_step;
        if (s.z) {
            const vec z = s.gate(t), y = fma(s.skip, x, tile.product[i]), open = sigmoid(z);
            const vec slope = open * fma(z, 1.f - open, all(1.f));
            store<DTYPE_U>(s.grad_z + t * s.channels, s.gradient(t) * y * slope, s.lanes);
        }
    }
}

// All gradients of these channels. entries: room for STATES vectors a tile.
static void scan(const Channels& s, std::vector<vec>& entries) {
    const int64_t tiles = (s.length + TILE - 1) / TILE;
    vec h[STATES] = {}, grad_h[STATES] = {}, grad_a[STATES] = {}, grad_skip = {}, grad_bias = {};
    for (int64_t i = 0; i < tiles; i++) {
        std::copy(h, h + STATES, entries.begin() + i * STATES);
        if (i == tiles - 1) break;
        const Tile tile(s, i, tiles);
        int n = 0;
        for (; n + STATES_AT_ONCE <= STATES; n += STATES_AT_ONCE)
            forward<STATES_AT_ONCE, false>(tile, s.a, n, h, nullptr, nullptr);
        for (; n < STATES; n++) forward<1, false>(tile, s.a, n, h, nullptr, nullptr);
    }
    for (int64_t i = tiles - 1; i >= 0; i--) {
        Tile tile(s, i, tiles);
        tile.prepare_gradients(s);
        vec* entry = entries.data() + i * STATES;
        int n = 0;
        for (; n + STATES_AT_ONCE <= STATES; n += STATES_AT_ONCE)
            backward<STATES_AT_ONCE>(tile, s, n, entry, grad_h, grad_a);
        for (; n < STATES; n++) backward<1>(tile, s, n, entry, grad_h, grad_a);
        write_tile(tile, s, grad_skip, grad_bias);
    }
    for (int lane = 0; lane < s.lanes; lane++) {
        float* row = s.sums + lane * SUMS;
        for (int n = 0; n < STATES; n++) row[n] = grad_a[n][lane];
        row[STATES] = grad_skip[lane];
        row[STATES + 1] = grad_bias[lane];
    }
}

// The slabs' rows (slabs, L, STATES) of a sample's group, added up and written as (STATES, L).
static void write_group(float* rows, int64_t slabs, int64_t length, stored<DTYPE_BC>* out) {
    for (int64_t slab = 1; slab < slabs; slab++)
        for (int64_t i = 0; i < length * STATES; i++) rows[i] += rows[slab * length * STATES + i];
    for (int n = 0; n < STATES; n++)
        for (int64_t t = 0; t < length; t += LANES) {
            const int count = int(std::min<int64_t>(LANES, length - t));
            store<DTYPE_BC>(out + n * length + t,
                            read_lanes(rows, FP32, t * STATES + n, STATES, count), count);
        }
}

// slab_rows: (B and C, batch, groups, slabs, L, STATES); sums: (batch, channels, SUMS).
extern "C" void selective_scan_backward(
    const void* grad, int64_t sy_b, int64_t sy_l, const void* u, int64_t su_b, int64_t su_l,
    const void* delta, int64_t sd_b, int64_t sd_l, const void* z, int64_t sz_b, int64_t sz_l,
    const void* A, int64_t A_dtype, const void* B, int64_t sb_b, int64_t sb_g, int64_t sb_n,
    int64_t sb_l, const void* C, int64_t sc_b, int64_t sc_g, int64_t sc_n, int64_t sc_l,
    const void* D, int64_t D_dtype, const void* delta_bias, int64_t bias_dtype,
    int64_t delta_softplus, void* grad_u, void* grad_delta, void* grad_A, void* grad_B, void* grad_C,
    void* grad_D, void* grad_z, void* grad_bias, float* slab_rows, float* sums, int64_t batch,
    int64_t channels, int64_t groups, int64_t length, int64_t threads) {
    const int64_t in_group = channels / groups, slabs = (in_group + SLAB - 1) / SLAB;
    const int64_t tasks = batch * groups * slabs, tiles = (length + TILE - 1) / TILE;
    if (batch * channels * length * STATES < 20000) threads = 1;  // less than waking them takes
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<vec> entries(tiles * STATES);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t sample = task / (groups * slabs), group = task / slabs % groups;
            float* grad_b = slab_rows + task * length * STATES;
            float* grad_c = grad_b + tasks * length * STATES;
            std::fill_n(grad_b, length * STATES, 0.f);
            std::fill_n(grad_c, length * STATES, 0.f);
            const int64_t begin = task % slabs * SLAB;
            const int64_t end = std::min<int64_t>(begin + SLAB, in_group);
            for (int64_t first = begin; first < end; first += LANES) {
                const int lanes = int(std::min<int64_t>(LANES, end - first));
                const int64_t d = group * in_group + first, out = sample * length * channels + d;
                Channels s = {
                    (const stored<DTYPE_U>*)grad + sample * sy_b + d,
                    (const stored<DTYPE_U>*)u + sample * su_b + d,
                    z ? (const stored<DTYPE_U>*)z + sample * sz_b + d : nullptr,
                    (const stored<DTYPE_DELTA>*)delta + sample * sd_b + d,
                    sy_l, su_l, sz_l, sd_l,
                    (stored<DTYPE_U>*)grad_u + out,
                    z ? (stored<DTYPE_U>*)grad_z + out : nullptr,
                    (stored<DTYPE_DELTA>*)grad_delta + out, channels,
                    (const stored<DTYPE_BC>*)B + sample * sb_b + group * sb_g,
                    (const stored<DTYPE_BC>*)C + sample * sc_b + group * sc_g,
                    sb_n, sb_l, sc_n, sc_l};
                for (int n = 0; n < STATES; n++)
                    s.a[n] = read_lanes(A, A_dtype, d * STATES + n, STATES, lanes) * LOG2E;
                s.skip = read_lanes(D, D_dtype, d, 1, lanes);
                s.bias = read_lanes(delta_bias, bias_dtype, d, 1, lanes);
                s.softplus_delta = delta_softplus;
                s.lanes = lanes;
                s.length = length;
                s.grad_b = grad_b;
                s.grad_c = grad_c;
                s.sums = sums + (sample * channels + d) * SUMS;
                scan(s, entries);
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < 2 * batch * groups; i++) {
            void* out = i < batch * groups ? grad_B : grad_C;
            write_group(slab_rows + i * slabs * length * STATES, slabs, length,
                        (stored<DTYPE_BC>*)out + i % (batch * groups) * length * STATES);
        }
#pragma omp for schedule(static)
        for (int64_t d = 0; d < channels; d++) {
            float total[SUMS] = {};
            for (int64_t sample = 0; sample < batch; sample++)
                for (int i = 0; i < SUMS; i++) total[i] += sums[(sample * channels + d) * SUMS + i];
            for (int n = 0; n < STATES; n++) write(grad_A, A_dtype, d * STATES + n, total[n]);
            if (D) write(grad_D, D_dtype, d, total[STATES]);
            if (delta_bias) write(grad_bias, bias_dtype, d, total[STATES + 1]);
        }
    }
}
