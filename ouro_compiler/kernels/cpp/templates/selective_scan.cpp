// ouro::selective_scan: the recurrence of Mamba-1, one direction (ops/selective_scan.py). Parallel
// over (sample, group, channels).
#include "recurrence.h"

extern "C" void selective_scan(
    const void* u, int64_t su_b, int64_t width, int64_t su_h, int64_t su_l, const void* delta,
    int64_t sd_b, int64_t sd_l, const void* z, int64_t sz_b, int64_t sz_l, const void* A, int64_t A_dtype, const void* B,
    int64_t sb_b, int64_t sb_g, int64_t sb_n, int64_t sb_l, const void* C, int64_t sc_b,
    int64_t sc_g, int64_t sc_n, int64_t sc_l, const void* D, int64_t D_dtype, const void* delta_bias,
    int64_t bias_dtype, int64_t delta_softplus, void* y, int64_t batch, int64_t channels,
    int64_t groups, int64_t length, int64_t threads) {
    const int64_t in_group = channels / groups, blocks = (in_group + LANES - 1) / LANES;
    const int64_t tasks = batch * groups * blocks;
    if (batch * channels * length * STATES < 40000) threads = 1;  // less than waking them takes
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t sample = task / (groups * blocks), group = task / blocks % groups;
        const int64_t first = task % blocks * LANES, d = group * in_group + first;
        const int lanes = int(std::min<int64_t>(LANES, in_group - first));
        vec a[STATES];
        for (int n = 0; n < STATES; n++)
            a[n] = read_lanes(A, A_dtype, d * STATES + n, STATES, lanes) * LOG2E;
        Scan s = {(const stored<DTYPE_U>*)u + sample * su_b + d,
                  z ? (const stored<DTYPE_U>*)z + sample * sz_b + d : nullptr,
                  (stored<DTYPE_U>*)y + sample * length * channels + d,
                  {width, su_h, su_l}, sz_l, channels,
                  (const stored<DTYPE_BC>*)B + sample * sb_b + group * sb_g,
                  (const stored<DTYPE_BC>*)C + sample * sc_b + group * sc_g,
                  sb_n, sb_l, sc_n, sc_l};
        const auto* deltas = (const stored<DTYPE_DELTA>*)delta + sample * sd_b + d;
        const vec bias = read_lanes(delta_bias, bias_dtype, d, 1, lanes);
        auto load_delta = [=](int64_t begin, int count, vec* to) {
            for (int t = 0; t < count; t++)
                to[t] = load<DTYPE_DELTA>(deltas + (begin + t) * sd_l, lanes) + bias;
        };
        const vec skip = read_lanes(D, D_dtype, d, 1, lanes);
        scan(s, load_delta, a, skip, delta_softplus, length, lanes);
    }
}
