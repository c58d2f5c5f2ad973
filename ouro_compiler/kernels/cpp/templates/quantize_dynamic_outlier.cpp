// ouro::quantize_dynamic_outlier: x (batch, length, columns), or a map of as many tokens, with
// channels next to each other.
#include "quantizer.h"

extern "C" void quantize_dynamic_outlier(
    const void* x, int64_t sx_b, int64_t width, int64_t sx_h, int64_t sx_l, const void* scale,
    int64_t scale_dtype, const void* zero_point, int64_t zero_dtype, const void* threshold,
    int64_t threshold_dtype, void* codes, void* outlier_scale, void* start, int64_t wide_start,
    int64_t batch, int64_t length, int64_t columns, int64_t window, int64_t inlier_bits,
    int64_t outlier_bits, int64_t reverse, int64_t threads) {
    const Places places = {width, sx_h, sx_l};
    const Quantizer q = {scale, scale_dtype, zero_point, zero_dtype, threshold, threshold_dtype,
                         (int8_t*)codes, (float*)outlier_scale, start, wide_start, batch, length,
                         columns, window, inlier_bits, outlier_bits, reverse};
    quantize_rows(q, threads, batch * length * columns / 2, [&](int64_t sample, int64_t t, vec* row) {
        load_row<DTYPE>((const stored<DTYPE>*)x + sample * sx_b + places.at(t), columns, row);
    });
}
