// ouro::dequantize_dynamic_outlier: codes (batch, length, columns) -> fp32. Listed channels are read
// from x where there is one.
#include "codes.h"

extern "C" void dequantize_dynamic_outlier(
    const void* codes, const void* scale, int64_t scale_dtype, const void* zero_point,
    int64_t zero_dtype, const void* outlier_scale, const void* start, int64_t wide_start,
    const void* x, int64_t sx_b, int64_t sx_l, void* y, int64_t batch, int64_t length,
    int64_t columns, int64_t window, int64_t inlier_bits, int64_t reverse, int64_t threads) {
    const int64_t windows = (length + window - 1) / window;
#pragma omp parallel for schedule(static) num_threads(team(threads, batch * length * columns / 2))
    for (int64_t row = 0; row < batch * length; row++) {
        const int64_t sample = row / length, t = row % length;
        const int64_t step = reverse ? length - 1 - t : t;
        const int64_t list = (sample * windows + step / window) * columns;
        const float inlier = read(scale, scale_dtype, t);
        const float dynamic = ((const float*)outlier_scale)[row];
        const float shift =
            zero_point ? float(1 << (inlier_bits - 1)) - read(zero_point, zero_dtype, t) : 0.f;
        const auto* kept = (const stored<DTYPE>*)x + sample * sx_b + t * sx_l;
        each_vector(columns, [=](int64_t v, auto lanes) {
            const int64_t first = v * LANES;
            const vec code = load_codes((const int8_t*)codes + row * columns + first, lanes);
            const ivec listed = load_listed(start, wide_start, list + first, step % window, lanes);
            const vec outlier = x ? load<DTYPE>(kept + first, lanes) : code * dynamic;
            const vec value = listed ? outlier : (code + shift) * inlier;
            store<FP32>((float*)y + row * columns + first, value, lanes);
        });
    }
}
