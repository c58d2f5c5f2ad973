// ouro::causal_conv1d: x (batch, columns, length) with channels next to each other; y is contiguous as
// (batch, length, columns).
#include "convolution.h"

extern "C" void causal_conv1d(const void* x, int64_t sx_b, int64_t sx_l, const void* weight,
                              int64_t weight_dtype, const void* bias, int64_t bias_dtype,
                              int64_t silu, void* y, int64_t batch, int64_t length,
                              int64_t columns, int64_t reverse, int64_t threads) {
    const Convolution convolve(weight, weight_dtype, bias, bias_dtype, silu, columns);
    const int64_t tiles = (length + TILE - 1) / TILE;
    const int64_t direction = reverse ? -1 : 1, start = reverse ? length - 1 : 0;
#pragma omp parallel for schedule(static) num_threads(team(threads, batch * length * columns))
    for (int64_t task = 0; task < batch * tiles; task++) {
        const int64_t sample = task / tiles, first = task % tiles * TILE;
        const Buffer<vec> rows(TILE * vectors(columns));
        convolve((const stored<DTYPE>*)x + sample * sx_b + start * sx_l, direction * sx_l, first,
                 length - first < TILE ? length - first : TILE,
                 (stored<DTYPE>*)y + (sample * length + start) * columns, direction * columns,
                 rows.data);
    }
}
