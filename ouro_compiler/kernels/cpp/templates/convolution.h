// Depthwise causal convolution along time, with SiLU (ops/causal_conv1d.py), in scan order: against
// time, token and step differ and nothing else.
#pragma once
#include "rows.h"

struct Convolution {
    int64_t columns;
    Buffer<vec> taps, shift;  // (vectors, TAPS) and (vectors,)
    bool silu_after;

    Convolution(const void* weight, int64_t weight_dtype, const void* bias, int64_t bias_dtype,
                bool silu_after, int64_t columns)
        : columns(columns), taps(vectors(columns) * TAPS), shift(vectors(columns)),
          silu_after(silu_after) {
        read_row(bias, bias_dtype, columns, shift.data);
        for (int64_t v = 0; v < vectors(columns); v++)
            for (int i = 0; i < TAPS; i++)
                taps[v * TAPS + i] = read_lanes(weight, weight_dtype, v * LANES * TAPS + i, TAPS,
                                                filled(columns, v));
    }

    // Steps first .. first + count as rows of vectors. x is at step 0, the next one `stride` away;
    // y likewise.
    void operator()(const stored<DTYPE>* x, int64_t stride, int64_t first, int64_t count,
                    stored<DTYPE>* y, int64_t y_stride, vec* rows) const {
        const int64_t whole = columns / LANES, row = vectors(columns);
        x += first * stride;
        y += first * y_stride;
        for (int64_t v = 0; v < row; v++) {
            const auto run = v < whole ? (silu_after ? channels<true, true> : channels<true, false>)
                                       : (silu_after ? channels<false, true> : channels<false, false>);
            run(taps.data + v * TAPS, shift[v], x + v * LANES, stride, first, count, y + v * LANES,
                y_stride, rows + v, row, int(columns - v * LANES));
        }
    }

  private:
    // One vector of channels: all lanes of it (WHOLE), or the first few.
    template <bool WHOLE, bool SILU>
    static void channels(const vec* taps, vec shift, const stored<DTYPE>* x, int64_t stride,
                         int64_t first, int64_t count, stored<DTYPE>* y, int64_t y_stride,
                         vec* rows, int64_t row, int lanes) {
        if constexpr (WHOLE) lanes = LANES;
        vec w[TAPS], past[TAPS];
        for (int i = 0; i < TAPS; i++) {
            const int64_t ago = TAPS - 1 - i;
            w[i] = taps[i];
            past[i] = ago > 0 && first >= ago ? load<DTYPE>(x - ago * stride, lanes) : vec{};
        }
        for (int64_t n = 0; n < count; n++) {
            past[TAPS - 1] = load<DTYPE>(x + n * stride, lanes);
            vec sum = shift;
            for (int i = 0; i < TAPS; i++) sum = fma(w[i], past[i], sum);
            for (int i = 0; i < TAPS - 1; i++) past[i] = past[i + 1];
            if constexpr (SILU) sum = silu(sum);
            sum = round_to<DTYPE>(sum);
            rows[n * row] = sum;
            store<DTYPE>(y + n * y_stride, sum, lanes);
        }
    }
};

constexpr int64_t TILE = 16;  // steps whose rows stay in the first cache
