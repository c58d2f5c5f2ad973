// ouro::causal_conv1d_quantize: x (batch, columns, length) with channels next to each other; y is
// contiguous as (batch, length, columns). Windows run in the convolution's direction.
#include "convolution.h"
#include "quantizer.h"

extern "C" void causal_conv1d_quantize(
    const void* x, int64_t sx_b, int64_t sx_l, const void* weight, int64_t weight_dtype,
    const void* bias, int64_t bias_dtype, int64_t silu, void* y, const void* scale,
    int64_t scale_dtype, const void* threshold, int64_t threshold_dtype, void* codes,
    void* outlier_scale, void* start, int64_t wide_start, int64_t batch, int64_t length,
    int64_t columns, int64_t window, int64_t inlier_bits, int64_t outlier_bits, int64_t reverse,
    int64_t threads) {
    const Quantizer q = {scale, scale_dtype, nullptr, 0, threshold, threshold_dtype,
                         (int8_t*)codes, (float*)outlier_scale, start, wide_start, batch, length,
                         columns, window, inlier_bits, outlier_bits, reverse};
    const Convolution convolve(weight, weight_dtype, bias, bias_dtype, silu, columns);
    const int64_t tasks = batch * q.windows(), work = batch * length * columns * 3 / 2;
#pragma omp parallel for schedule(static) num_threads(team(threads, work))
    for (int64_t task = 0; task < tasks; task++) {
        Window w(q, task);
        const Buffer<vec> rows(TILE * vectors(columns));
        const auto* from = (const stored<DTYPE>*)x + w.sample * sx_b + q.token(0) * sx_l;
        auto* to = (stored<DTYPE>*)y + (w.sample * length + q.token(0)) * columns;
        for (int64_t i = 0; i < w.count; i += TILE) {
            const int64_t count = w.count - i < TILE ? w.count - i : TILE;
            convolve(from, q.direction() * sx_l, w.first + i, count, to, q.direction() * columns,
                     rows.data);
            for (int64_t n = 0; n < count; n++)
                w.quantize(rows.data + n * vectors(columns), i + n);
        }
    }
}
