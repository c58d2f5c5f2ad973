// ouro::add_norm_quantize: x and residual (batch, length, columns).
#include "norm.h"
#include "quantizer.h"

extern "C" void add_norm_quantize(
    const void* x, int64_t sx_b, int64_t sx_l, int64_t sx_k, const void* residual, int64_t sr_b,
    int64_t sr_l, int64_t sr_k, const void* weight, int64_t weight_dtype, const void* bias,
    int64_t bias_dtype, float eps, int64_t rms, void* y, void* total, const void* scale,
    int64_t scale_dtype, const void* threshold, int64_t threshold_dtype, void* codes,
    void* outlier_scale, void* start, int64_t wide_start, int64_t batch, int64_t length,
    int64_t columns, int64_t window, int64_t inlier_bits, int64_t outlier_bits, int64_t reverse,
    int64_t threads) {
    const Quantizer q = {scale, scale_dtype, nullptr, 0, threshold, threshold_dtype,
                         (int8_t*)codes, (float*)outlier_scale, start, wide_start, batch, length,
                         columns, window, inlier_bits, outlier_bits, reverse};
    const Buffer<vec> w(vectors(columns)), b(vectors(columns));
    read_row(weight, weight_dtype, columns, w.data);
    read_row(bias, bias_dtype, columns, b.data);
    const Tokens<DTYPE> tokens = {(const stored<DTYPE>*)x, sx_b, sx_l, sx_k};
    const Tokens<DTYPE_RESIDUAL> kept = {(const stored<DTYPE_RESIDUAL>*)residual, sr_b, sr_l, sr_k};
    const Norm norm = {columns, w.data, b.data, eps, rms != 0};
    quantize_rows(q, threads, batch * length * columns, [&](int64_t sample, int64_t t, vec* row) {
        const int64_t at = (sample * length + t) * columns;
        add_row(tokens, kept, sample, t, (stored<DTYPE_TOTAL>*)total + at, columns, row);
        norm(row);
        emit_row(row, y ? (stored<DTYPE>*)y + at : nullptr, columns);
    });
}
