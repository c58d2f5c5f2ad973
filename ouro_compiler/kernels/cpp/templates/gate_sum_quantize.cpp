// ouro::gate_sum_quantize: (y + other) * silu(z) * factor. y, other and z are (batch, columns, length)
// with channels next to each other; other and z may be null.
#include "quantizer.h"

typedef stored<DTYPE> number;

// One row: y, other and z are of one token, out (or null) keeps the values.
template <bool OTHER, bool GATED>
static void gate_row(const number* y, const number* other, const number* z, float factor,
                     number* out, int64_t columns, vec* row) {
    each_vector(columns, [=](int64_t v, auto lanes) {
        vec gate;
        vec value = load<DTYPE>(y + v * LANES, lanes);
        if constexpr (GATED) value *= gate = silu(load<DTYPE>(z + v * LANES, lanes));
        if constexpr (OTHER) {
            vec second = load<DTYPE>(other + v * LANES, lanes);
            if constexpr (GATED) second *= gate;
            value += second;
        }
        row[v] = round_to<DTYPE>(value * factor);
    });
    if (out)
        each_vector(columns, [=](int64_t v, auto lanes) {
            store<DTYPE>(out + v * LANES, row[v], lanes);
        });
}

extern "C" void gate_sum_quantize(
    const void* y, int64_t sy_b, int64_t sy_l, const void* other, int64_t so_b, int64_t so_l,
    const void* z, int64_t sz_b, int64_t sz_l, float factor, void* values, const void* scale,
    int64_t scale_dtype, const void* threshold, int64_t threshold_dtype, void* codes,
    void* outlier_scale, void* start, int64_t wide_start, int64_t batch, int64_t length,
    int64_t columns, int64_t window, int64_t inlier_bits, int64_t outlier_bits, int64_t reverse,
    int64_t threads) {
    const Quantizer q = {scale, scale_dtype, nullptr, 0, threshold, threshold_dtype,
                         (int8_t*)codes, (float*)outlier_scale, start, wide_start, batch, length,
                         columns, window, inlier_bits, outlier_bits, reverse};
    const auto run = other ? (z ? gate_row<true, true> : gate_row<true, false>)
                           : (z ? gate_row<false, true> : gate_row<false, false>);
    const int64_t work = batch * length * columns * 3 / 2;
    quantize_rows(q, threads, work, [&](int64_t sample, int64_t t, vec* row) {
        run((const number*)y + sample * sy_b + t * sy_l,
            (const number*)other + sample * so_b + t * so_l,
            (const number*)z + sample * sz_b + t * sz_l, factor,
            values ? (number*)values + (sample * length + t) * columns : nullptr, columns, row);
    });
}
