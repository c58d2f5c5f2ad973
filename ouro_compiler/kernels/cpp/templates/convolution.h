// Depthwise causal convolution along time, with SiLU (ops/causal_conv1d.py), in scan order: against
// time, token and step differ and nothing else.
#pragma once
#include "rows.h"

struct Convolution {
    int64_t columns;
    Buffer<vec> taps, shift;       // (vectors, TAPS) and (vectors,)
    Buffer<stored<DTYPE>> before;  // a row of zeros: what came before the first step
    bool silu_after;

    Convolution(const void* weight, int64_t weight_dtype, const void* bias, int64_t bias_dtype,
                bool silu_after, int64_t columns)
        : columns(columns), taps(vectors(columns) * TAPS), shift(vectors(columns)),
          before(columns), silu_after(silu_after) {
        memset(before.data, 0, columns * sizeof *before.data);
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
        const int64_t row = vectors(columns);
        for (int64_t n = 0; n < count;) {
            const int64_t at = first + n, left = count - n;
            const int steps = left >= 4 ? 4 : left >= 2 ? 2 : 1;
            const auto run = steps == 4 ? (silu_after ? &Convolution::several<4, true> : &Convolution::several<4, false>)
                           : steps == 2 ? (silu_after ? &Convolution::several<2, true> : &Convolution::several<2, false>)
                                        : (silu_after ? &Convolution::several<1, true> : &Convolution::several<1, false>);
            (this->*run)(x + at * stride, stride, at, y + at * y_stride, y_stride, rows + n * row);
            n += steps;
        }
    }

  private:
    // STEPS steps from step `at` on, where x, y and rows point to.
    template <int STEPS, bool SILU>
    void several(const stored<DTYPE>* x, int64_t stride, int64_t at, stored<DTYPE>* y,
                 int64_t y_stride, vec* rows) const {
        const stored<DTYPE>* inputs[TAPS - 1 + STEPS];  // of step at - (TAPS - 1) and those after it
        for (int i = 0; i < TAPS - 1 + STEPS; i++)
            inputs[i] = at + i < TAPS - 1 ? before.data : x + (i - (TAPS - 1)) * stride;
        each_vector(columns, [&](int64_t v, auto lanes) {
            vec in[TAPS - 1 + STEPS], sum[STEPS];
#pragma GCC unroll 20
            for (int i = 0; i < TAPS - 1 + STEPS; i++)
                in[i] = load<DTYPE>(inputs[i] + v * LANES, lanes);
#pragma GCC unroll 4
            for (int n = 0; n < STEPS; n++) {
                sum[n] = shift[v];
                for (int i = 0; i < TAPS; i++) sum[n] = fma(taps[v * TAPS + i], in[n + i], sum[n]);
            }
            if constexpr (SILU) silu<STEPS>(sum);
#pragma GCC unroll 4
            for (int n = 0; n < STEPS; n++) {
                sum[n] = round_to<DTYPE>(sum[n]);
                rows[n * vectors(columns) + v] = sum[n];
                store<DTYPE>(y + n * y_stride + v * LANES, sum[n], lanes);
            }
        });
    }
};

constexpr int64_t TILE = 16;  // steps whose rows stay in the first cache
