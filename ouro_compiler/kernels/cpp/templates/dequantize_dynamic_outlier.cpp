// ouro::dequantize_dynamic_outlier: codes (batch, length, columns) -> fp32. Listed channels are read
// from x where there is one.
#include "dequantize.h"

extern "C" void dequantize_dynamic_outlier(
    const void* codes, const void* scale, int64_t scale_dtype, const void* zero_point,
    int64_t zero_dtype, const void* outlier_scale, const void* start, const void* x, int64_t sx_b,
    int64_t sx_l, void* y, int64_t batch, int64_t length, int64_t columns, int64_t window,
    int64_t inlier_bits, int64_t reverse, int64_t wide_start, int64_t threads) {
    const Quantized<DTYPE> q = {codes, scale, scale_dtype, zero_point, zero_dtype, outlier_scale,
                                start, x, sx_b, sx_l, length, columns, window, inlier_bits,
                                reverse, wide_start};
#pragma omp parallel for schedule(static) num_threads(team(threads, batch * length * columns / 2))
    for (int64_t row = 0; row < batch * length; row++) {
        const int64_t sample = row / length, t = row % length;
        const Token token = q.token(sample, t);
        each_vector(columns, [=](int64_t v, auto lanes) {
            const int64_t first = v * LANES;
            const ivec at = q.starts(token, first, lanes);
            const vec value = q.values(token, at, sample, t, first, lanes);
            store<FP32>((float*)y + row * columns + first, value, lanes);
        });
    }
}
