// ouro::gate_sum_quantize: (y + other) * silu(z) * factor. y, other and z are (batch, columns, length)
// with channels next to each other; other and z may be null.
#include "quantizer.h"

extern "C" void gate_sum_quantize(
    const void* y, int64_t sy_b, int64_t sy_l, const void* other, int64_t so_b, int64_t so_l,
    const void* z, int64_t sz_b, int64_t sz_l, float factor, void* values, const void* scale,
    int64_t scale_dtype, const void* threshold, int64_t threshold_dtype, void* codes,
    void* outlier_scale, void* start, int64_t wide_start, int64_t batch, int64_t length,
    int64_t columns, int64_t window, int64_t inlier_bits, int64_t outlier_bits, int64_t reverse,
    int64_t threads) {
    typedef stored<DTYPE> element;
    const Quantizer q = {scale, scale_dtype, nullptr, 0, threshold, threshold_dtype,
                         (int8_t*)codes, (float*)outlier_scale, start, wide_start, batch, length,
                         columns, window, inlier_bits, outlier_bits, reverse};
    quantize_rows(q, threads, batch * length * columns * 3 / 2,
                  [&](int64_t sample, int64_t t, vec* row) {
        const auto* y_row = (const element*)y + sample * sy_b + t * sy_l;
        const auto* other_row = (const element*)other + sample * so_b + t * so_l;
        const auto* z_row = (const element*)z + sample * sz_b + t * sz_l;
        auto* out = (element*)values + (sample * length + t) * columns;
        for (int64_t v = 0; v < vectors(columns); v++) {
            const int64_t first = v * LANES;
            const int lanes = filled(columns, v);
            const vec gate = z ? silu(load<DTYPE>(z_row + first, lanes)) : all(1.f);
            vec value = load<DTYPE>(y_row + first, lanes) * gate;
            if (other) value += load<DTYPE>(other_row + first, lanes) * gate;
            row[v] = round_to<DTYPE>(value * factor);
            if (values) store<DTYPE>(out + first, row[v], lanes);
        }
    });
}
