// ouro::patched_scan_backward: gradients of u, delta, B and C (ops/patched_scan.py).
//
// A task owns SLAB channels of one sample and takes LANES of them at a time: forward again, patch
// by patch for C, then back through time. A token gathers what it counts in all patches, so no
// gradients of states are kept. Sums over channels are kept for every slab and added up at the end
// in one order, so that no gradient depends on the number of threads.
#include "patched.h"

constexpr int TILE = 16;  // patches or tokens whose sums over channels are made at once
constexpr float LN2 = 0.6931471805599453f;

// Room for one thread's work.
struct Buffers {
    Lists near, within;  // tokens of an anchor, anchors of a token
    std::vector<float> b, c;
    std::vector<vec> dt, dx, states, grad;
    vec terms[TILE * STATES];

    Buffers(int64_t length, int64_t patches)
        : b(length * STATES), c(patches * STATES), dt(length), dx(length),
          states(length * STATES), grad(patches) {}
};

// out[i] += the sum over channels of terms[i].
static inline void add_sums(const vec* terms, int count, float* out) {
    int i = 0;
    for (; i + 4 <= count; i += 4) add_four_sums(out + i, terms + i);
    for (; i < count; i++) out[i] += sum(terms[i]);
}

// grad_c (P, STATES) += the gradient of C at the anchors.
static void backward_c(Buffers& m, int64_t patches, float* grad_c) {
    for (int64_t first = 0; first < patches; first += TILE) {
        const int count = int(std::min<int64_t>(TILE, patches - first));
        for (int i = 0; i < count; i++) {
            const int64_t p = first + i;
            vec* terms = m.terms + i * STATES;
            mix(m.near.begin(p), m.near.end(p), m.states.data(), terms);
            for (int n = 0; n < STATES; n++) terms[n] *= m.grad[p];
        }
        add_sums(m.terms, count * STATES, grad_c + first * STATES);
    }
}

// What a token's states n .. n + COUNT count in all patches' gradients.
template <int COUNT>
static inline void gather_some(const Weighted* in, const Weighted* end, const Buffers& m, int n,
                               vec* out) {
    vec sum[COUNT] = {};
    for (; in != end; in++) {
        const vec weight = m.grad[in->at] * in->weight;
        const float* c = m.c.data() + int64_t(in->at) * STATES + n;
#pragma GCC unroll 8
        for (int k = 0; k < COUNT; k++) sum[k] = fma(weight, all(c[k]), sum[k]);
    }
    for (int k = 0; k < COUNT; k++) out[k] = sum[k];
}

static inline void gather(const Weighted* in, const Weighted* end, const Buffers& m, vec* out) {
    int n = 0;
    for (; n + SUMS_AT_ONCE <= STATES; n += SUMS_AT_ONCE)
        gather_some<SUMS_AT_ONCE>(in, end, m, n, out + n);
    for (; n < STATES; n++) gather_some<1>(in, end, m, n, out + n);
}

// Back through time: gradients of u and delta, and grad_b (L, STATES) += that of B.
static void backward_time(const Channels& s, Buffers& m, stored<DTYPE_U>* grad_u,
                          stored<DTYPE_DELTA>* grad_delta, int64_t channels, float* grad_b) {
    const vec none[STATES] = {};
    vec carry[STATES] = {}, grad_h[STATES];
    int filled = 0;
    for (int64_t i = s.length - 1; i >= 0; i--) {
        const int64_t t = s.token(i);
        const vec step = m.dt[t], dx = m.dx[t];
        const vec* before = i ? m.states.data() + s.token(i - 1) * STATES : none;
        const float* b = s.b + t * s.sb;
        gather(m.within.begin(t), m.within.end(t), m, grad_h);
        // Tokens of a tile end up in ascending order.
        vec *terms = m.terms + (REVERSE ? filled : TILE - 1 - filled) * STATES;
        vec grad_dx = {}, to_step = {};
#pragma GCC unroll 4
        for (int n = 0; n < STATES; n++) {
            const vec total = grad_h[n] + carry[n];
            grad_dx = fma(total, all(b[n]), grad_dx);
            carry[n] = total * exp2(step * s.a[n]);
            to_step = fma(carry[n] * before[n], s.a[n], to_step);
            terms[n] = dx * total;
        }
        const vec x = load<DTYPE_U>(s.u + t * s.su_l, s.lanes);
        store<DTYPE_U>(grad_u + t * channels, grad_dx * step, s.lanes);
        store<DTYPE_DELTA>(grad_delta + t * channels, fma(grad_dx, x, to_step * LN2), s.lanes);
        if (++filled == TILE || i == 0) {
            const int64_t first = REVERSE ? t + 1 - filled : t;
            add_sums(REVERSE ? m.terms : terms, filled * STATES, grad_b + first * STATES);
            filled = 0;
        }
    }
}

// rows (L, STATES) as (STATES, L).
static void write_rows(const float* rows, int64_t length, stored<DTYPE_BC>* out) {
    for (int n = 0; n < STATES; n++)
        for (int64_t t = 0; t < length; t += LANES) {
            const int count = int(std::min<int64_t>(LANES, length - t));
            store<DTYPE_BC>(out + n * length + t,
                            read_lanes(rows, FP32, t * STATES + n, STATES, count), count);
        }
}

// slab_rows: (batch, groups, slabs, L + P, STATES), for B and behind it C at the anchors.
extern "C" void patched_scan_backward(
    const void* grad, int64_t sy_b, int64_t sy_p, const void* u, int64_t su_b, int64_t su_l,
    const void* delta, int64_t sd_b, int64_t sd_l, const void* A, int64_t A_dtype, const void* B,
    int64_t sb_b, int64_t sb_g, int64_t sb_n, int64_t sb_l, const void* C, int64_t sc_b,
    int64_t sc_g, int64_t sc_n, int64_t sc_l, const float* weights, const int64_t* anchors,
    const int64_t* neighbours, int64_t windows, int64_t patches, int64_t around, void* grad_u,
    void* grad_delta, void* grad_B, void* grad_C, float* slab_rows, int64_t batch,
    int64_t channels, int64_t groups, int64_t length, int64_t threads) {
    const int64_t in_group = channels / groups, slabs = (in_group + SLAB - 1) / SLAB;
    const int64_t tasks = batch * groups * slabs, row_size = (length + patches) * STATES;
    const Windows where = {weights, anchors, neighbours, windows, patches, around};
    if (batch * channels * length * STATES < 20000) threads = 1;  // less than waking them takes
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Buffers m(length, patches);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t sample = task / (groups * slabs), group = task / slabs % groups;
            float *grad_b = slab_rows + task * row_size, *grad_c = grad_b + length * STATES;
            std::fill_n(grad_b, row_size, 0.f);
            m.near.by_anchor(where, sample);
            m.within.by_token(where, sample, length);
            read_c((const stored<DTYPE_BC>*)C + sample * sc_b + group * sc_g, sc_n, sc_l,
                   where.anchors_of(sample), patches, m.c.data());
            Channels s;
            s.su_l = su_l, s.sd_l = sd_l, s.length = length;
            s.b = rows<DTYPE_BC>((const stored<DTYPE_BC>*)B + sample * sb_b + group * sb_g, sb_n,
                                 sb_l, 0, int(length), m.b.data(), s.sb);
            const int64_t begin = task % slabs * SLAB;
            const int64_t end = std::min<int64_t>(begin + SLAB, in_group);
            for (int64_t first = begin; first < end; first += LANES) {
                const int64_t d = group * in_group + first, out = sample * length * channels + d;
                s.lanes = int(std::min<int64_t>(LANES, end - first));
                s.u = (const stored<DTYPE_U>*)u + sample * su_b + d;
                s.delta = (const stored<DTYPE_DELTA>*)delta + sample * sd_b + d;
                for (int n = 0; n < STATES; n++)
                    s.a[n] = read_lanes(A, A_dtype, d * STATES + n, STATES, s.lanes) * LOG2E;
                const stored<DTYPE_U>* g = (const stored<DTYPE_U>*)grad + sample * sy_b + d;
                for (int64_t p = 0; p < patches; p++)
                    m.grad[p] = load<DTYPE_U>(g + p * sy_p, s.lanes);
                s.scan(m.dt.data(), m.dx.data(), m.states.data());
                backward_c(m, patches, grad_c);
                backward_time(s, m, (stored<DTYPE_U>*)grad_u + out,
                              (stored<DTYPE_DELTA>*)grad_delta + out, channels, grad_b);
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < batch * groups; i++) {
            float* rows = slab_rows + i * slabs * row_size;
            for (int64_t slab = 1; slab < slabs; slab++)
                for (int64_t j = 0; j < row_size; j++) rows[j] += rows[slab * row_size + j];
            write_rows(rows, length, (stored<DTYPE_BC>*)grad_B + i * length * STATES);
            const int64_t* anchor = where.anchors_of(i / groups);
            std::fill(m.b.begin(), m.b.end(), 0.f);
            for (int64_t j = 0; j < patches * STATES; j++) {
                const int64_t token = anchor[j / STATES];
                if (token >= 0) m.b[token * STATES + j % STATES] += rows[length * STATES + j];
            }
            write_rows(m.b.data(), length, (stored<DTYPE_BC>*)grad_C + i * length * STATES);
        }
    }
}
