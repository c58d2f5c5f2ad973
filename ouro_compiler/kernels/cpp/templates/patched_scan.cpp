// ouro::patched_scan: states of a scan, mixed over the tokens of each patch (ops/patched_scan.py).
//
// A task owns SLAB channels of one sample and takes LANES of them at a time: all states go to its
// own buffer, then each anchor adds up its neighbours' and reads them through C. A result depends
// neither on the number of threads nor on the other samples.
#include "patched.h"

extern "C" void patched_scan(
    const void* u, int64_t su_b, int64_t su_l, const void* delta, int64_t sd_b, int64_t sd_l,
    const void* A, int64_t A_dtype, const void* B, int64_t sb_b, int64_t sb_g, int64_t sb_n,
    int64_t sb_l, const void* C, int64_t sc_b, int64_t sc_g, int64_t sc_n, int64_t sc_l,
    const float* weights, const int64_t* anchors, const int64_t* neighbours, int64_t windows,
    int64_t patches, int64_t around, void* y, int64_t batch, int64_t channels, int64_t groups,
    int64_t length, int64_t threads) {
    const int64_t in_group = channels / groups, slabs = (in_group + SLAB - 1) / SLAB;
    const int64_t tasks = batch * groups * slabs;
    const Windows where = {weights, anchors, neighbours, windows, patches, around};
    if (batch * channels * length * STATES < 20000) threads = 1;  // less than waking them takes
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Lists near;
        std::vector<float> b_buffer(length * STATES), c(patches * STATES);
        std::vector<vec> dt(length), dx(length), states(length * STATES);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t sample = task / (groups * slabs), group = task / slabs % groups;
            near.by_anchor(where, sample);
            read_c((const stored<DTYPE_BC>*)C + sample * sc_b + group * sc_g, sc_n, sc_l,
                   where.anchors_of(sample), patches, c.data());
            Channels s;
            s.su_l = su_l, s.sd_l = sd_l, s.length = length;
            s.b = rows<DTYPE_BC>((const stored<DTYPE_BC>*)B + sample * sb_b + group * sb_g, sb_n,
                                 sb_l, 0, int(length), b_buffer.data(), s.sb);
            const int64_t begin = task % slabs * SLAB;
            const int64_t end = std::min<int64_t>(begin + SLAB, in_group);
            for (int64_t first = begin; first < end; first += LANES) {
                const int64_t d = group * in_group + first;
                s.lanes = int(std::min<int64_t>(LANES, end - first));
                s.u = (const stored<DTYPE_U>*)u + sample * su_b + d;
                s.delta = (const stored<DTYPE_DELTA>*)delta + sample * sd_b + d;
                for (int n = 0; n < STATES; n++)
                    s.a[n] = read_lanes(A, A_dtype, d * STATES + n, STATES, s.lanes) * LOG2E;
                s.scan(dt.data(), dx.data(), states.data());
                stored<DTYPE_U>* out = (stored<DTYPE_U>*)y + sample * patches * channels + d;
                for (int64_t p = 0; p < patches; p++) {
                    vec mixed[STATES], sum = {};
                    mix(near.begin(p), near.end(p), states.data(), mixed);
                    for (int n = 0; n < STATES; n++)
                        sum = fma(mixed[n], all(c[p * STATES + n]), sum);
                    store<DTYPE_U>(out + p * channels, sum, s.lanes);
                }
            }
        }
    }
}
