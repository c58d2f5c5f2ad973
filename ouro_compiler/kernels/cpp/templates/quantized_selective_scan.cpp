// ouro::quantized_selective_scan: quantizers inside the recurrence (ops/quantized_scan.py).
//
// Parallel over (sample, group, channels): a task owns LANES channels and walks through time, all
// their states at a step, since a channel is judged by all of them. Every operation in front of a
// code is the reference's and rounds once; only y's sum may be rounded otherwise.
#include "elementary.h"
#include "scan.h"
#include <algorithm>

constexpr int TILE = 64;
constexpr int UNIFORM = 1, LOGARITHMIC = 2;  // DECAY; 0: in floating point

// x = divisor * clamp(round(x / divisor), low, high). A product with the reciprocal stands for the
// quotient unless some value lies near the middle of two codes, where they might differ.
static inline void to_grid(vec* x, vec divisor, vec low, vec high) {
    const vec inverse = 1.f / divisor;
    vec code[STATES], middle = {};
#pragma GCC unroll 4
    for (int n = 0; n < STATES; n++) {
        const vec steps = min(high, max(low, x[n] * inverse));
        code[n] = round_even(steps);
        middle = max(abs(steps - code[n]), middle);
    }
    const ivec invertible = (divisor > 0x1p-100f) & (divisor < 0x1p100f);
    const ivec unsafe = (middle > 0.5f - 0x1p-12f) | ~invertible;
    if (__builtin_expect(any(unsafe), 0))
        for (int n = 0; n < STATES; n++) code[n] = round_even(min(high, max(low, x[n] / divisor)));
#pragma GCC unroll 4
    for (int n = 0; n < STATES; n++) x[n] = code[n] * divisor;
}

// A symmetric quantizer, and which of a task's channels are on its list.
struct Operand {
    const void* scale;
    int64_t scale_dtype;
    const void* threshold;  // null: no channel ever
    int64_t threshold_dtype;
    float most, outlier_most;  // outlier_most 0: outliers stay in floating point
    ivec listed;

    // x: the values of token t, quantized in place.
    void quantize(vec* x, int64_t t, bool fresh) {
        if (!scale) return;
        vec divisor = all(read(scale, scale_dtype, t)), high = all(most);
        if (!threshold) return to_grid(x, divisor, -high, high);
        vec peak = abs(x[0]);
        for (int n = 1; n < STATES; n++) peak = max(peak, abs(x[n]));
        const ivec joins = peak >= read(threshold, threshold_dtype, t);
        listed = fresh ? joins : listed | joins;
        if (outlier_most > 0 || !any(listed)) {
            const vec dynamic = max(peak / outlier_most, all(1e-8f));
            divisor = listed ? dynamic : divisor;
            high = listed ? all(outlier_most) : high;
            return to_grid(x, divisor, -high, high);
        }
        vec kept[STATES];
        for (int n = 0; n < STATES; n++) kept[n] = x[n];
        to_grid(x, divisor, -high, high);
        for (int n = 0; n < STATES; n++) x[n] = listed ? kept[n] : x[n];
    }
};

struct Scan {
    const stored<DTYPE_U>* u;
    const stored<DTYPE_STEP>* step;
    const stored<DTYPE_U>* z;
    stored<DTYPE_U>* y;
    int64_t su_l, ss_l, sz_l, sy_l;
    const stored<DTYPE_BC>*B, *C;
    int64_t sb_n, sb_l, sc_n, sc_l;
    const void* decay_scale;
    int64_t decay_dtype;
    float decay_offset, decay_steps, decay_top;
    int64_t period, before_rounding, reverse;
};

// What is left of 1 - a, at every code of a logarithmic decay.
static void fill_levels(const Scan& s, float* levels) {
    for (int first = 0; first <= int(s.decay_top); first += LANES) {
        vec code;
        for (int i = 0; i < LANES; i++) code[i] = float(first + i);
        code = (s.decay_offset - code) / s.decay_steps;
        exp2_exact<1>(&code);
        memcpy(levels + first, &code, sizeof code);
    }
}

static inline vec look_up(const float* levels, vec code) {
    const ivec index = (ivec)(code + all(0x1.8p23f)) & 255;
#if defined(__AVX512F__)
    return (vec)_mm512_i32gather_ps((__m512i)index, levels, 4);
#elif defined(__AVX2__)
    return (vec)_mm256_i32gather_ps(levels, (__m256i)index, 4);
#else
    vec r;
    for (int i = 0; i < LANES; i++) r[i] = levels[index[i]];
    return r;
#endif
}

static inline vec dot(const vec* h, const float* c) {
    vec sum = {};
    for (int n = 0; n < STATES; n++) sum = fma(h[n], all(c[n]), sum);
    return sum;
}

// a: exponents on entry, decays on return, or 1 - a where they are logarithmic.
static inline void decays(const Scan& s, vec* a, int64_t t, const float* levels) {
    exp2_exact_of<STATES>(a);
    if constexpr (DECAY == UNIFORM)
        to_grid(a, all(read(s.decay_scale, s.decay_dtype, t)), vec{}, all(s.decay_top));
    if constexpr (DECAY == LOGARITHMIC) {
        for (int n = 0; n < STATES; n++) a[n] = 1.f - a[n];
        log2_exact_of<STATES>(a);
        for (int n = 0; n < STATES; n++) {
            const vec code = s.decay_offset - s.decay_steps * a[n];
            a[n] = look_up(levels, round_even(min(all(s.decay_top), max(vec{}, code))));
        }
    }
}

static void scan(const Scan& s, const vec* rate, const vec* factor, Operand input, Operand state,
                 vec skip, int64_t length, int lanes) {
    vec h[STATES] = {};
    float levels[256 + LANES], b_buffer[TILE * STATES], c_buffer[TILE * STATES];
    if (DECAY == LOGARITHMIC) fill_levels(s, levels);
    const int64_t tiles = (length + TILE - 1) / TILE;
    int64_t position = 0;  // in a window
    for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t first = (s.reverse ? tiles - 1 - tile : tile) * TILE;
        const int count = int(std::min<int64_t>(TILE, length - first));
        int64_t sb, sc;
        const float* b = rows<DTYPE_BC>(s.B, s.sb_n, s.sb_l, first, count, b_buffer, sb);
        const float* c = rows<DTYPE_BC>(s.C, s.sc_n, s.sc_l, first, count, c_buffer, sc);
        for (int i = 0; i < count; i++) {
            const int row = s.reverse ? count - 1 - i : i;
            const int64_t t = first + row;
            const vec step = load<DTYPE_STEP>(s.step + t * s.ss_l, lanes);
            const vec u = load<DTYPE_U>(s.u + t * s.su_l, lanes);
            vec a[STATES], x[STATES], sum;
            for (int n = 0; n < STATES; n++) a[n] = step * rate[n];
            decays(s, a, t, levels);
            for (int n = 0; n < STATES; n++) x[n] = step * b[row * sb + n];
            input.quantize(x, t, position == 0);
            for (int n = 0; n < STATES; n++) {
                const vec gone = a[n] * h[n], left = DECAY == LOGARITHMIC ? h[n] - gone : gone;
                h[n] = left + x[n] * u;
            }
            if (s.before_rounding) sum = dot(h, c + row * sc);
            if (factor) {
                for (int n = 0; n < STATES; n++) x[n] = h[n] / factor[n];
                state.quantize(x, t, position == 0);
                const bool kept = state.threshold && !(state.outlier_most > 0);
                for (int n = 0; n < STATES; n++) {
                    const vec back = x[n] * factor[n];
                    h[n] = kept ? state.listed ? h[n] : back : back;
                }
            } else {
                state.quantize(h, t, position == 0);
            }
            if (!s.before_rounding) sum = dot(h, c + row * sc);
            vec y = sum + skip * u;
            if (s.z) y *= silu(load<DTYPE_U>(s.z + t * s.sz_l, lanes));
            store<DTYPE_U>(s.y + t * s.sy_l, y, lanes);
            if (++position == s.period) position = 0;
        }
    }
}

extern "C" void quantized_selective_scan(
    const void* u, int64_t su_b, int64_t su_l, const void* step, int64_t ss_b, int64_t ss_l,
    const void* z, int64_t sz_b, int64_t sz_l, const void* A, int64_t A_dtype, const void* B,
    int64_t sb_b, int64_t sb_g, int64_t sb_n, int64_t sb_l, const void* C, int64_t sc_b,
    int64_t sc_g, int64_t sc_n, int64_t sc_l, const void* D, int64_t D_dtype,
    const void* decay_scale, int64_t decay_dtype, const void* input_scale, int64_t input_dtype, const void* input_threshold,
    int64_t input_threshold_dtype, const void* state_scale, int64_t state_dtype,
    const void* state_threshold, int64_t state_threshold_dtype, const void* factor,
    int64_t factor_dtype, float decay_offset, int64_t decay_steps, int64_t bits,
    int64_t outlier_bits, int64_t period, int64_t before_rounding, int64_t reverse, void* y,
    int64_t batch, int64_t channels, int64_t groups, int64_t length, int64_t threads) {
    const int64_t in_group = channels / groups, blocks = (in_group + LANES - 1) / LANES;
    const int64_t tasks = batch * groups * blocks;
    const float most = float((1 << (bits - 1)) - 1);
    const float outlier_most = outlier_bits <= 8 ? float((1 << (outlier_bits - 1)) - 1) : 0.f;
    const Operand input = {input_scale, input_dtype, input_threshold, input_threshold_dtype,
                           most, outlier_most, ivec{}};
    const Operand state = {state_scale, state_dtype, state_threshold, state_threshold_dtype,
                           most, outlier_most, ivec{}};
    if (batch * channels * length * STATES < 10000) threads = 1;  // less than waking them takes
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t sample = task / (groups * blocks), group = task / blocks % groups;
        const int64_t first = task % blocks * LANES, d = group * in_group + first;
        const int lanes = int(std::min<int64_t>(LANES, in_group - first));
        vec rate[STATES], factors[STATES];
        for (int n = 0; n < STATES; n++) {
            rate[n] = read_lanes(A, A_dtype, d * STATES + n, STATES, lanes) * LOG2E;
            factors[n] = read_lanes(factor, factor_dtype, d * STATES + n, STATES, lanes);
            for (int i = lanes; i < LANES; i++) factors[n][i] = 1;
        }
        const Scan s = {(const stored<DTYPE_U>*)u + sample * su_b + d,
                        (const stored<DTYPE_STEP>*)step + sample * ss_b + d,
                        z ? (const stored<DTYPE_U>*)z + sample * sz_b + d : nullptr,
                        (stored<DTYPE_U>*)y + sample * length * channels + d,
                        su_l, ss_l, sz_l, channels,
                        (const stored<DTYPE_BC>*)B + sample * sb_b + group * sb_g,
                        (const stored<DTYPE_BC>*)C + sample * sc_b + group * sc_g,
                        sb_n, sb_l, sc_n, sc_l, decay_scale, decay_dtype, decay_offset,
                        float(decay_steps), float((1 << bits) - 1), period,
                        before_rounding, reverse};
        scan(s, rate, factor ? factors : nullptr, input, state, read_lanes(D, D_dtype, d, 1, lanes),
             length, lanes);
    }
}
