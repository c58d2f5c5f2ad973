// ouro::cross_merge: four orders (batch, 4, channels, height * width), contiguous, -> their sum in
// raster order (batch, channels, height * width). Each of the three additions rounds to the dtype.
#include "rows.h"

template <int DTYPE> static inline stored<DTYPE> add(stored<DTYPE> a, stored<DTYPE> b) {
    const float sum = to_float<DTYPE>(a) + to_float<DTYPE>(b);
    if constexpr (DTYPE == BF16) {  // half to even
        uint32_t w;
        memcpy(&w, &sum, 4);
        return sum == sum ? uint16_t((w + 0x7fff + ((w >> 16) & 1)) >> 16) : uint16_t(0x7fc0);
    } else {
        return stored<DTYPE>(sum);
    }
}

extern "C" void cross_merge(const void* orders, void* y, int64_t batch, int64_t channels,
                            int64_t height, int64_t width, int64_t threads) {
    typedef stored<DTYPE> element;
    const int64_t length = height * width, step = channels * length;
#pragma omp parallel num_threads(team(threads, batch * step * 2))
    {
        const Buffer<element> sums(length);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < batch * channels; task++) {
            const int64_t sample = task / channels, channel = task % channels;
            const element* rows = (const element*)orders + (sample * 4 * channels + channel) * length;
            const element *columns = rows + step, *rows_back = rows + 2 * step;
            const element* columns_back = rows + 3 * step;
            element* out = (element*)y + task * length;
            for (int64_t t = 0; t < length; t++)
                sums[t] = add<DTYPE>(columns[t], columns_back[length - 1 - t]);
            for (int64_t t = 0; t < length; t++)
                out[t] = add<DTYPE>(rows[t], rows_back[length - 1 - t]);
            for (int64_t h = 0; h < height; h++)
                for (int64_t w = 0; w < width; w++)
                    out[h * width + w] = add<DTYPE>(out[h * width + w], sums[w * height + h]);
        }
    }
}
