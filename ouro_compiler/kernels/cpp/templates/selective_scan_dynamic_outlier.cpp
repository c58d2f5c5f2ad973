// ouro::selective_scan_dynamic_outlier: the scan on codes (ops/scan_dynamic_outlier.py).
//
// delta is dequantized where the recurrence reads it. B and C, which all channels of a group read,
// are dequantized once a thread and group, into its own rows.
#include "dequantize.h"
#include "recurrence.h"

using Operand = Quantized<DTYPE_X>;

static void read_tokens(const Operand& q, int64_t sample, Token* tokens) {
    for (int64_t t = 0; t < q.length; t++) tokens[t] = q.token(sample, t);
}

// B or C of a group as rows (length, STATES).
static void dequantize_rows(const Operand& q, const Token* tokens, int64_t sample, int64_t group,
                            float* to) {
    each_vector(STATES, [&](int64_t v, auto lanes) {
        const int64_t row = v * LANES, first = group * STATES + row;
        const bool listing = q.lists(sample, first, lanes);
        q.each_token(tokens, listing, sample, 0, q.length, first, lanes,
                     [=](int64_t t, vec x) { store<FP32>(to + t * STATES + row, x, lanes); });
    });
}

extern "C" void selective_scan_dynamic_outlier(
    const void* u, int64_t su_b, int64_t width, int64_t su_h, int64_t su_l, const void* z,
    int64_t sz_b, int64_t sz_l, const void* A, int64_t A_dtype, const void* D, int64_t D_dtype, const void* delta_bias,
    int64_t bias_dtype, int64_t delta_softplus, const void* delta, const void* delta_scale,
    int64_t delta_scale_dtype, const void* delta_zero, int64_t delta_zero_dtype,
    const void* delta_outlier, const void* delta_start, const void* delta_x, int64_t sd_b,
    int64_t sd_l, const void* B, const void* B_scale, int64_t B_scale_dtype, const void* B_zero,
    int64_t B_zero_dtype, const void* B_outlier, const void* B_start, const void* B_x, int64_t sb_b,
    int64_t sb_l, const void* C, const void* C_scale, int64_t C_scale_dtype, const void* C_zero,
    int64_t C_zero_dtype, const void* C_outlier, const void* C_start, const void* C_x, int64_t sc_b,
    int64_t sc_l, int64_t window, int64_t inlier_bits, int64_t wide_start, void* y, int64_t batch,
    int64_t channels, int64_t groups, int64_t length, int64_t threads) {
    const Operand step = {delta, delta_scale, delta_scale_dtype, delta_zero, delta_zero_dtype,
                          delta_outlier, delta_start, delta_x, sd_b, sd_l,
                          length, channels, window, inlier_bits, REVERSE, wide_start};
    const Operand in = {B, B_scale, B_scale_dtype, B_zero, B_zero_dtype,
                        B_outlier, B_start, B_x, sb_b, sb_l,
                        length, groups * STATES, window, inlier_bits, REVERSE, wide_start};
    const Operand out = {C, C_scale, C_scale_dtype, C_zero, C_zero_dtype,
                         C_outlier, C_start, C_x, sc_b, sc_l,
                         length, groups * STATES, window, inlier_bits, REVERSE, wide_start};
    const int64_t in_group = channels / groups, blocks = (in_group + LANES - 1) / LANES;
    const int64_t tasks = batch * groups * blocks;
    if (batch * channels * length * STATES < 40000) threads = 1;  // less than waking them takes
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Buffer<Token> tokens(length);
        const Buffer<float> b(length * STATES), c(length * STATES);
        int64_t ready = -1;  // the sample and group whose rows these are
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t sample = task / (groups * blocks), group = task / blocks % groups;
            if (ready != task / blocks) {
                ready = task / blocks;
                read_tokens(in, sample, tokens.data);
                dequantize_rows(in, tokens.data, sample, group, b.data);
                read_tokens(out, sample, tokens.data);
                dequantize_rows(out, tokens.data, sample, group, c.data);
                read_tokens(step, sample, tokens.data);
            }
            const int64_t first = task % blocks * LANES, d = group * in_group + first;
            const int lanes = int(std::min<int64_t>(LANES, in_group - first));
            vec a[STATES];
            for (int n = 0; n < STATES; n++)
                a[n] = read_lanes(A, A_dtype, d * STATES + n, STATES, lanes) * LOG2E;
            Scan s = {(const stored<DTYPE_U>*)u + sample * su_b + d,
                      z ? (const stored<DTYPE_U>*)z + sample * sz_b + d : nullptr,
                      (stored<DTYPE_U>*)y + sample * length * channels + d,
                      {width, su_h, su_l}, sz_l, channels,
                      b.data, c.data, 1, STATES, 1, STATES};
            const vec bias = read_lanes(delta_bias, bias_dtype, d, 1, lanes);
            const bool listing = step.lists(sample, d, lanes);
            auto load_delta = [&](int64_t begin, int count, vec* to) {
                const int64_t end = begin + count;
                auto keep = [=](int64_t t, vec x) { to[t - begin] = x + bias; };
                if (lanes == LANES)
                    step.each_token(tokens.data, listing, sample, begin, end, d, all_lanes{}, keep);
                else
                    step.each_token(tokens.data, listing, sample, begin, end, d, lanes, keep);
            };
            const vec skip = read_lanes(D, D_dtype, d, 1, lanes);
            scan(s, load_delta, a, skip, delta_softplus, length, lanes);
        }
    }
}
