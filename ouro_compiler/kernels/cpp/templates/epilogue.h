// What follows the integer product: scales, bias, activation and residual in the reference's order of
// rounding (ops/linear.py).
#pragma once
#include <algorithm>
#include "products.h"

constexpr bool FLOAT_OUTLIERS = OUTLIER_BITS == 16;
enum Activation { NONE, SILU, SOFTPLUS, GELU, GELU_TANH };  // their order is kernels/cpp/linear.py's

struct Sums {  // of one row and a panel; outliers and kept are null where nothing is listed
    const int32_t *inliers, *outliers;
    const float* kept;
    int32_t shift, listed_shift;
    float inlier_scale, outlier_scale;
};

struct Epilogue {
    int64_t outputs;
    const float *scale, *bias;  // padded to whole panels; bias is null without one
    const void* residual;
    int64_t residual_dtype, activation;
    stored<DTYPE_Y>* y;
};

template <int N> static inline void activate(int64_t activation, vec* y) {
    switch (activation) {
        case SILU: return silu<N>(y);
        case SOFTPLUS: return softplus<N>(y);
        case GELU: return gelu<N>(y);
        case GELU_TANH: return gelu_tanh<N>(y);
    }
}

// Row `row` of a panel, count <= LANES outputs from o on: scales, bias, activation, residual.
static inline void finish_vector(const Epilogue& e, const Sums& sums, int64_t row,
                                 int64_t first, int o, int count) {
    ivec acc;
    memcpy(&acc, sums.inliers + o, sizeof acc);
    const vec scale = load<FP32>(e.scale + first + o);
    vec y = __builtin_convertvector(acc - sums.shift, vec) * sums.inlier_scale;
    if (FLOAT_OUTLIERS) {
        y *= scale;
        if (sums.kept) y += load<FP32>(sums.kept + o) * scale;
    } else {
        if (sums.outliers) {
            memcpy(&acc, sums.outliers + o, sizeof acc);
            y += __builtin_convertvector(acc - sums.listed_shift, vec) * sums.outlier_scale;
        }
        y *= scale;
    }
    if (e.bias) y += load<FP32>(e.bias + first + o);
    activate<1>(e.activation, &y);
    const int64_t at = row * e.outputs + first + o;
    if (e.residual) y += read_lanes(e.residual, e.residual_dtype, at, 1, count);
    store<DTYPE_Y>(e.y + at, y, count);
}

// A whole panel of a row without a residual: nothing is asked or read twice.
template <bool LISTED, bool BIAS>
static inline void finish_panel(const Epilogue& e, const Sums& sums, int64_t row, int64_t first) {
    const float *scale = e.scale + first, *bias = BIAS ? e.bias + first : nullptr;
    const int32_t *inliers = sums.inliers, *outliers = sums.outliers;
    const float* kept = sums.kept;
    const vec inlier_scale = all(sums.inlier_scale), outlier_scale = all(sums.outlier_scale);
    const ivec shift = ivec{} + sums.shift, listed_shift = ivec{} + sums.listed_shift;
    vec values[WIDTH];
#pragma GCC unroll 4
    for (int o = 0; o < PANEL; o += LANES) {
        ivec acc;
        memcpy(&acc, inliers + o, sizeof acc);
        vec value = __builtin_convertvector(acc - shift, vec) * inlier_scale;
        if (LISTED && !FLOAT_OUTLIERS) {
            memcpy(&acc, outliers + o, sizeof acc);
            value += __builtin_convertvector(acc - listed_shift, vec) * outlier_scale;
        }
        value *= load<FP32>(scale + o);
        if (LISTED && FLOAT_OUTLIERS) value += load<FP32>(kept + o) * load<FP32>(scale + o);
        if (BIAS) value += load<FP32>(bias + o);
        values[o / LANES] = value;
    }
    if (e.activation) activate<WIDTH>(e.activation, values);
    stored<DTYPE_Y>* y = e.y + row * e.outputs + first;
#pragma GCC unroll 4
    for (int o = 0; o < PANEL; o += LANES) store<DTYPE_Y>(y + o, values[o / LANES]);
}

static inline void finish(const Epilogue& e, const Sums& sums, int64_t row, int64_t first) {
    if (first + PANEL <= e.outputs && !e.residual) {
        if (FLOAT_OUTLIERS ? (bool)sums.kept : (bool)sums.outliers) e.bias ? finish_panel<true, true>(e, sums, row, first) : finish_panel<true, false>(e, sums, row, first);
        else e.bias ? finish_panel<false, true>(e, sums, row, first) : finish_panel<false, false>(e, sums, row, first);
        return;
    }
    for (int o = 0; o < PANEL && o < e.outputs - first; o += LANES)
        finish_vector(e, sums, row, first, o, int(std::min<int64_t>(LANES, e.outputs - first - o)));
}
