// Depthwise causal convolution along time, with SiLU (ops/causal_conv1d.py), in scan order: against
// time, token and step differ and nothing else.
#pragma once
#include "rows.h"

struct Convolution {
    int64_t columns;
    std::unique_ptr<vec[]> taps, shift;  // (vectors, TAPS) and (vectors,)
    bool silu_after;

    Convolution(const void* weight, int64_t weight_dtype, const void* bias, int64_t bias_dtype,
                bool silu_after, int64_t columns)
        : columns(columns), taps(buffer(vectors(columns) * TAPS)), shift(buffer(vectors(columns))),
          silu_after(silu_after) {
        read_row(bias, bias_dtype, columns, shift.get());
        for (int64_t v = 0; v < vectors(columns); v++)
            for (int i = 0; i < TAPS; i++)
                taps[v * TAPS + i] = read_lanes(weight, weight_dtype, v * LANES * TAPS + i, TAPS,
                                                filled(columns, v));
    }

    // Steps first .. first + count as rows of vectors. x is at step 0, the next one `stride` away;
    // y likewise.
    void operator()(const stored<DTYPE>* x, int64_t stride, int64_t first, int64_t count,
                    stored<DTYPE>* y, int64_t y_stride, vec* rows) const {
        for (int64_t v = 0; v < vectors(columns); v++) {
            const int lanes = filled(columns, v);
            const auto* from = x + first * stride + v * LANES;
            auto* to = y + first * y_stride + v * LANES;
            vec w[TAPS], past[TAPS];
            for (int i = 0; i < TAPS; i++) {
                const int64_t ago = TAPS - 1 - i;
                w[i] = taps[v * TAPS + i];
                past[i] = ago > 0 && first >= ago ? load<DTYPE>(from - ago * stride, lanes) : vec{};
            }
            for (int64_t n = 0; n < count; n++) {
                past[TAPS - 1] = load<DTYPE>(from + n * stride, lanes);
                vec sum = shift[v];
                for (int i = 0; i < TAPS; i++) sum = fma(w[i], past[i], sum);
                for (int i = 0; i < TAPS - 1; i++) past[i] = past[i + 1];
                if (silu_after) sum = silu(sum);
                sum = round_to<DTYPE>(sum);
                rows[n * vectors(columns) + v] = sum;
                store<DTYPE>(to + n * y_stride, sum, lanes);
            }
        }
    }
};

constexpr int64_t TILE = 16;  // steps whose rows stay in the first cache
