// ouro::dequantize_weight: codes (rows, columns), int8 or two 4-bit ones a byte, -> fp32.
#include "codes.h"

// A byte's low and high nibble in two's complement (ops/packing.py).
static inline int8_t nibble(uint8_t byte, bool high) {
    return int8_t(high ? byte : byte << 4) >> 4;
}

extern "C" void dequantize_weight(const void* qweight, int64_t packed, const void* scale,
                                  int64_t scale_dtype, int64_t one_scale, const void* zero_point,
                                  int64_t zero_dtype, int64_t one_zero, int64_t bits, void* y,
                                  int64_t rows, int64_t columns, int64_t threads) {
    const int64_t half = (columns + 1) / 2, stride = packed ? half : columns;
#pragma omp parallel for schedule(static) num_threads(team(threads, rows * columns / 4))
    for (int64_t row = 0; row < rows; row++) {
        const float step = read(scale, scale_dtype, one_scale ? 0 : row);
        const float shift =
            zero_point ? float(1 << (bits - 1)) - read(zero_point, zero_dtype, one_zero ? 0 : row)
                       : 0.f;
        const auto* codes = (const uint8_t*)qweight + row * stride;
        auto* out = (float*)y + row * columns;
        if (packed) {
            for (int64_t k = 0; k < half; k++) out[k] = (nibble(codes[k], false) + shift) * step;
            for (int64_t k = half; k < columns; k++)
                out[k] = (nibble(codes[k - half], true) + shift) * step;
        } else {
            for (int64_t k = 0; k < columns; k++) out[k] = (int8_t(codes[k]) + shift) * step;
        }
    }
}
