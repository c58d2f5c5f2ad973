// RMS and layer normalisation of a row in fp32 (ops/norm.py).
#pragma once
#include "rows.h"

// Sums run over this many lanes on every machine, so that they are the same bits on all.
constexpr int SUM_LANES = 16, SUM_VECTORS = SUM_LANES / LANES;

struct Sum {
    vec lanes[SUM_VECTORS] = {};

    float total() const {
        float s[SUM_LANES];
        memcpy(s, lanes, sizeof s);
        for (int width = SUM_LANES / 2; width > 0; width /= 2)
            for (int i = 0; i < width; i++) s[i] += s[i + width];
        return s[0];
    }
};

// All `columns` of a row, from its vectors: term(v) is one of them, 0 beyond the columns.
template <class Term> static inline float sum_row(int64_t columns, const Term& term) {
    Sum s;
    int64_t v = 0;
    for (; v + SUM_VECTORS <= vectors(columns); v += SUM_VECTORS)
        for (int i = 0; i < SUM_VECTORS; i++) s.lanes[i] = s.lanes[i] + term(v + i);
    for (int i = 0; v + i < vectors(columns); i++) s.lanes[i] = s.lanes[i] + term(v + i);
    return s.total();
}

struct Norm {
    int64_t columns;
    const vec *weight, *bias;
    float eps;
    bool rms;

    // row: fp32, 0 beyond the columns; overwritten by weight * normalised row + bias.
    void operator()(vec* row) const {
        if (!rms) {
            const float mean = sum_row(columns, [&](int64_t v) { return row[v]; }) / float(columns);
            for (int64_t v = 0; v < vectors(columns); v++) row[v] -= mean;
            for (int64_t k = columns; k < vectors(columns) * LANES; k++)
                row[k / LANES][k % LANES] = 0.f;
        }
        const float square = sum_row(columns, [&](int64_t v) { return row[v] * row[v]; });
        const float scale = 1.f / __builtin_sqrtf(square / float(columns) + eps);
        for (int64_t v = 0; v < vectors(columns); v++)
            row[v] = row[v] * scale * weight[v] + bias[v];
    }
};

template <int D> struct Tokens {  // (batch, length, columns); data may be null
    const stored<D>* data;
    int64_t sb, sl, sk;

    // f(v, what vector v of a row holds), for all of them.
    template <class F> void each(int64_t sample, int64_t token, int64_t columns, const F& f) const {
        const stored<D>* p = data + sample * sb + token * sl;
        const int64_t stride = sk;
        if (stride == 1)
            return each_vector(columns, [&](int64_t v, auto lanes) { f(v, load<D>(p + v * LANES, lanes)); });
        each_vector(columns, [&](int64_t v, auto lanes) {
            vec x = {};
            for (int i = 0; i < lanes; i++) x[i] = to_float<D>(p[(v * LANES + i) * stride]);
            f(v, x);
        });
    }
};

// x + residual of a row: kept in its dtype, and left in `row`.
static inline void add_row(const Tokens<DTYPE>& x, const Tokens<DTYPE_RESIDUAL>& residual,
                           int64_t sample, int64_t token, stored<DTYPE_TOTAL>* total,
                           int64_t columns, vec* row) {
    x.each(sample, token, columns, [=](int64_t v, vec part) { row[v] = part; });
    if (residual.data)
        residual.each(sample, token, columns, [=](int64_t v, vec part) { row[v] += part; });
    each_vector(columns, [=](int64_t v, auto lanes) {
        store<DTYPE_TOTAL>(total + v * LANES, row[v], lanes);
    });
}

// Rounds a row to x's dtype, and keeps it where there is a place for it.
static inline void emit_row(vec* row, stored<DTYPE>* y, int64_t columns) {
    if (DTYPE != FP32)
        for (int64_t v = 0; v < vectors(columns); v++) row[v] = round_to<DTYPE>(row[v]);
    if (y)
        each_vector(columns, [=](int64_t v, auto lanes) {
            store<DTYPE>(y + v * LANES, row[v], lanes);
        });
}
