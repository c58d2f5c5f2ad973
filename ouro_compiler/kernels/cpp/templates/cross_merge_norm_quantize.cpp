// ouro::cross_merge_norm_quantize: the orders of a map (batch, length, columns), contiguous: in raster
// order, and column after column; the second of each may be null. A row of the raster is found in
// its column by index. Each of the three additions rounds to the dtype.
#include "norm.h"
#include "quantizer.h"

typedef stored<DTYPE> number;

// One row of an order, or of the sum of two.
template <bool BOTH, class Lanes>
static inline vec order_sum(const number* a, const number* b, int64_t at, Lanes lanes) {
    const vec first = load<DTYPE>(a + at, lanes);
    if constexpr (!BOTH) return first;
    return round_to<DTYPE>(first + load<DTYPE>(b + at, lanes));
}

template <bool ROWS, bool COLUMNS>
static void merge_row(const number* rows, const number* rows_back, const number* across,
                      const number* across_back, int64_t at, int64_t turned, int64_t columns,
                      vec* row) {
    each_vector(columns, [=](int64_t v, auto lanes) {
        row[v] = round_to<DTYPE>(order_sum<ROWS>(rows, rows_back, at + v * LANES, lanes) +
                                 order_sum<COLUMNS>(across, across_back, turned + v * LANES, lanes));
    });
}

extern "C" void cross_merge_norm_quantize(
    const void* rows, const void* rows_back, const void* across, const void* across_back,
    int64_t width, const void* weight, int64_t weight_dtype, const void* bias, int64_t bias_dtype,
    float eps, int64_t rms, void* y, const void* scale, int64_t scale_dtype, const void* threshold,
    int64_t threshold_dtype, void* codes, void* outlier_scale, void* start, int64_t wide_start,
    int64_t batch, int64_t length, int64_t columns, int64_t window, int64_t inlier_bits,
    int64_t outlier_bits, int64_t reverse, int64_t threads) {
    const Quantizer q = {scale, scale_dtype, nullptr, 0, threshold, threshold_dtype,
                         (int8_t*)codes, (float*)outlier_scale, start, wide_start, batch, length,
                         columns, window, inlier_bits, outlier_bits, reverse};
    const Buffer<vec> w(vectors(columns)), b(vectors(columns));
    read_row(weight, weight_dtype, columns, w.data);
    read_row(bias, bias_dtype, columns, b.data);
    const Norm norm = {columns, w.data, b.data, eps, rms != 0};
    const Places turned = {width, 1, length / width};  // of a token of the raster in its column
    const auto merge = rows_back ? (across_back ? merge_row<true, true> : merge_row<true, false>)
                                 : (across_back ? merge_row<false, true> : merge_row<false, false>);
    const int64_t work = batch * length * columns * 3 / 2;
    quantize_rows(q, threads, work, [&](int64_t sample, int64_t t, vec* row) {
        const int64_t first = sample * length, at = (first + t) * columns;
        merge((const number*)rows, (const number*)rows_back, (const number*)across,
              (const number*)across_back, at, (first + turned.at(t)) * columns, columns, row);
        norm(row);
        emit_row(row, y ? (number*)y + at : nullptr, columns);
    });
}
