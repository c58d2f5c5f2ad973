// ouro::cross_scan: maps (batch, channels, height, width) of any strides -> their four orders
// (batch, 4, channels, height * width), contiguous. Elements are moved as they are.
#include "rows.h"

template <int SIZE> struct bytes;
template <> struct bytes<1> { typedef uint8_t type; };
template <> struct bytes<2> { typedef uint16_t type; };
template <> struct bytes<4> { typedef uint32_t type; };
template <> struct bytes<8> { typedef uint64_t type; };

extern "C" void cross_scan(const void* x, int64_t sx_b, int64_t sx_c, int64_t sx_h, int64_t sx_w,
                           void* orders, int64_t batch, int64_t channels, int64_t height,
                           int64_t width, int64_t threads) {
    typedef bytes<BYTES>::type element;
    const int64_t length = height * width, step = channels * length;
#pragma omp parallel for schedule(static) num_threads(team(threads, batch * step * 2))
    for (int64_t task = 0; task < batch * channels; task++) {
        const int64_t sample = task / channels, channel = task % channels;
        const auto* map = (const element*)x + sample * sx_b + channel * sx_c;
        element* rows = (element*)orders + (sample * 4 * channels + channel) * length;
        element *columns = rows + step, *rows_back = rows + 2 * step, *columns_back = rows + 3 * step;
        for (int64_t h = 0; h < height; h++)
            for (int64_t w = 0; w < width; w++) rows[h * width + w] = map[h * sx_h + w * sx_w];
        for (int64_t w = 0; w < width; w++)
            for (int64_t h = 0; h < height; h++) columns[w * height + h] = rows[h * width + w];
        for (int64_t t = 0; t < length; t++) rows_back[t] = rows[length - 1 - t];
        for (int64_t t = 0; t < length; t++) columns_back[t] = columns[length - 1 - t];
    }
}
