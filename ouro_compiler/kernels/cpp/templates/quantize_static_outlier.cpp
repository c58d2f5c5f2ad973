// ouro::quantize_static_outlier: as the dynamic form, with a list of channels that is given, and
// written into every window of `start` first.
#include "quantizer.h"

static void write_list(const Quantizer& q, const int64_t* channels, int64_t count) {
    const int64_t windows = (q.length + q.window - 1) / q.window;
    for (int64_t list = 0; list < q.batch * windows * q.columns; list += q.columns) {
        if (q.wide_start)
            for (int64_t k = 0; k < q.columns; k++) ((int32_t*)q.start)[list + k] = INT32_MAX;
        else
            memset((uint8_t*)q.start + list, 255, q.columns);
        for (int64_t i = 0; i < count; i++) {
            const int64_t k = list + channels[i] + (channels[i] < 0 ? q.columns : 0);
            if (q.wide_start)
                ((int32_t*)q.start)[k] = 0;
            else
                ((uint8_t*)q.start)[k] = 0;
        }
    }
}

extern "C" void quantize_static_outlier(
    const void* x, int64_t sx_b, int64_t sx_l, const void* scale, int64_t scale_dtype,
    const void* zero_point, int64_t zero_dtype, const void* channels, int64_t channel_count,
    void* codes, void* outlier_scale, void* start,
    int64_t wide_start, int64_t batch, int64_t length, int64_t columns, int64_t window,
    int64_t inlier_bits, int64_t outlier_bits, int64_t reverse, int64_t threads) {
    const Quantizer q = {scale, scale_dtype, zero_point, zero_dtype, nullptr, 0,
                         (int8_t*)codes, (float*)outlier_scale, start, wide_start, batch, length,
                         columns, window, inlier_bits, outlier_bits, reverse};
    write_list(q, (const int64_t*)channels, channel_count);
    quantize_rows(q, threads, batch * length * columns / 2, [&](int64_t sample, int64_t t, vec* row) {
        load_row<DTYPE>((const stored<DTYPE>*)x + sample * sx_b + t * sx_l, columns, row);
    });
}
