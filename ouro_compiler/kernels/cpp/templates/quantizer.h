// The dynamic-outlier quantizer of ops/quantize.py: one window of one sample, row after row.
//
// Operations and their order are the reference's: codes, lists and scales equal it bit for bit.
#pragma once
#include "codes.h"

struct Quantizer {
    const void* scale;
    int64_t scale_dtype;
    const void* zero_point;  // null: symmetric
    int64_t zero_dtype;
    const void* threshold;  // null: the list is given
    int64_t threshold_dtype;
    int8_t* codes;         // (batch, length, columns)
    float* outlier_scale;  // (batch, length)
    void* start;           // (batch, windows, columns), int32 if wide, else uint8
    int64_t wide_start, batch, length, columns, window, inlier_bits, outlier_bits, reverse;

    int64_t windows() const { return (length + window - 1) / window; }
    // The token that a scan meets at a step, and the way from one to the next.
    int64_t token(int64_t step) const { return reverse ? length - 1 - step : step; }
    int64_t direction() const { return reverse ? -1 : 1; }
};

// Code = clamp(round(x / divisor) + zero, low, high) - offset; symmetric ones have neither zero nor
// offset, and whole bounds: those are clamped first.
struct Grid {
    vec divisor, zero, low, high, offset;

    template <bool SYMMETRIC> ivec encode(vec x) const {
        const vec steps = x / divisor;
        if constexpr (SYMMETRIC) return integers(min(high, max(low, steps)));
        const vec bound = all(0x1p20f);  // beyond every range, where rounding is still exact
        const vec code = round_even(min(bound, max(-bound, steps))) + zero;
        return integers(min(high, max(low, code)) - offset);
    }
};

static inline vec select(ivec mask, vec a, vec b) { return mask ? a : b; }

// Grid `a` where the mask is set, else `b`.
static inline Grid select(ivec mask, const Grid& a, const Grid& b) {
    return {select(mask, a.divisor, b.divisor), select(mask, a.zero, b.zero),
            select(mask, a.low, b.low), select(mask, a.high, b.high),
            select(mask, a.offset, b.offset)};
}

template <bool SYMMETRIC>
static inline void encode_row(int8_t* codes, const vec* x, const Grid& grid, int64_t columns) {
    int64_t v = 0;
    for (; (v + 4) * LANES <= columns; v += 4)
        store_codes(codes + v * LANES, grid.encode<SYMMETRIC>(x[v]),
                    grid.encode<SYMMETRIC>(x[v + 1]), grid.encode<SYMMETRIC>(x[v + 2]),
                    grid.encode<SYMMETRIC>(x[v + 3]));
    for (; v < vectors(columns); v++)
        store_codes(codes + v * LANES, grid.encode<SYMMETRIC>(x[v]), filled(columns, v));
}

static inline ivec lanes_below(int64_t count) {
    ivec r;
    for (int i = 0; i < LANES; i++) r[i] = i < count ? -1 : 0;
    return r;
}

// One window of one sample, and the list that grows in it.
class Window {
    const Quantizer& q;
    const int64_t list;   // where its row of `start` begins
    Buffer<vec> mask;     // which lanes are on the list; those without a channel never join
    Buffer<int64_t> hit;  // the vectors with a channel on the list
    int64_t hits = 0;

  public:
    const int64_t sample, first, count;  // steps first .. first + count

    Window(const Quantizer& q, int64_t task)
        : q(q), list(task * q.columns), mask(vectors(q.columns)), hit(vectors(q.columns)),
          sample(task / q.windows()), first(task % q.windows() * q.window),
          count(q.length - first < q.window ? q.length - first : q.window) {
        for (int64_t v = 0; v < vectors(q.columns); v++) {
            mask[v] = vec{};
            if (q.threshold) continue;
            const int lanes = filled(q.columns, v);
            mask[v] = (vec)(load_listed(q.start, q.wide_start, list + v * LANES, 0, lanes) &
                            lanes_below(lanes));
            if (any((ivec)mask[v])) hit[hits++] = v;
        }
        if (!q.threshold) return;
        if (q.wide_start)
            for (int64_t k = 0; k < q.columns; k++) ((int32_t*)q.start)[list + k] = INT32_MAX;
        else
            memset((uint8_t*)q.start + list, 255, q.columns);
    }

    // Row `position` of the window: x holds its channels, 0 beyond them.
    void quantize(const vec* x, int64_t position) {
        const int64_t t = q.token(first + position), row = sample * q.length + t;
        const float scale = read(q.scale, q.scale_dtype, t);
        const float top = float((1 << q.inlier_bits) - 1), half = float(1 << (q.inlier_bits - 1));
        const float threshold = q.threshold ? read(q.threshold, q.threshold_dtype, t) : 0.f;
        int8_t* codes = q.codes + row * q.columns;
        Grid grid;
        if (q.zero_point) {
            const float zero = read(q.zero_point, q.zero_dtype, t);
            grid = {all(scale), all(zero), vec{}, all(top), all(half)};
            if (q.threshold)
                extend(x, position, scale * (top / 2 - zero), scale * (top / 2), threshold);
            encode_row<false>(codes, x, grid, q.columns);
        } else {
            grid = {all(scale), vec{}, all(1 - half), all(half - 1), vec{}};
            if (q.threshold) extend(x, position, 0.f, scale * (half - 1), threshold);
            encode_row<true>(codes, x, grid, q.columns);
        }
        q.outlier_scale[row] = hits ? encode_outliers(codes, x, grid) : 1.f;
    }

  private:
    // Once an unlisted channel leaves the range, all at or over the threshold are listed.
    void extend(const vec* x, int64_t position, float middle, float limit, float threshold) {
        const int64_t whole = q.columns / LANES, rest = q.columns % LANES;
        ivec leaves = {}, reaches = {};
        const auto look = [&](int64_t v, ivec lanes) {
            const vec magnitude = abs(x[v] - middle);
            const ivec unlisted = ~(ivec)mask[v] & lanes;
            leaves |= unlisted & (magnitude > limit);
            reaches |= unlisted & (magnitude >= threshold);
        };
        for (int64_t v = 0; v < whole; v++) look(v, ~ivec{});
        if (rest) look(whole, lanes_below(rest));
        if (!any(leaves) || !any(reaches)) return;
        hits = 0;
        for (int64_t v = 0; v < vectors(q.columns); v++) {
            ivec joins = ~(ivec)mask[v] & (abs(x[v] - middle) >= threshold);
            if (v == whole) joins &= lanes_below(rest);
            if (any(joins)) join(v, joins, int32_t(position));
            if (any((ivec)mask[v])) hit[hits++] = v;
        }
    }

    void join(int64_t v, ivec joins, int32_t position) {
        mask[v] = (vec)((ivec)mask[v] | joins);
        for (unsigned left = bits_of(joins); left; left &= left - 1) {
            const int64_t k = list + v * LANES + __builtin_ctz(left);
            if (q.wide_start)
                ((int32_t*)q.start)[k] = position;
            else
                ((uint8_t*)q.start)[k] = uint8_t(position);
        }
    }

    // Overwrites the codes of listed channels; returns their scale.
    float encode_outliers(int8_t* codes, const vec* x, const Grid& inlier) const {
        float most = 0.f, scale = 1.f;  // outliers that stay in floating point have code 0
        if (q.outlier_bits <= 8) {
            vec peak = {};
            for (int64_t i = 0; i < hits; i++)
                peak = max(peak, (vec)((ivec)mask[hit[i]] & (ivec)abs(x[hit[i]])));
            float largest = peak[0];
            for (int i = 1; i < LANES; i++) largest = peak[i] > largest ? peak[i] : largest;
            most = float((1 << (q.outlier_bits - 1)) - 1);
            scale = largest / most;
            scale = scale < 1e-8f ? 1e-8f : scale;
        }
        const Grid outlier = {all(scale), vec{}, all(-most), all(most), vec{}};
        for (int64_t i = 0; i < hits; i++) {
            const int64_t v = hit[i];
            const Grid grid = select((ivec)mask[v], outlier, inlier);
            store_codes(codes + v * LANES, grid.encode<false>(x[v]), filled(q.columns, v));
        }
        return scale;
    }
};

// Every row of every window: make(sample, token, row) fills a row, which is then quantized.
template <class Make>
static inline void quantize_rows(const Quantizer& q, int64_t threads, int64_t nanoseconds,
                                 const Make& make) {
    const int64_t tasks = q.batch * q.windows();
#pragma omp parallel for schedule(static) num_threads(team(threads, nanoseconds))
    for (int64_t task = 0; task < tasks; task++) {
        Window window(q, task);
        const Buffer<vec> row(vectors(q.columns));
        for (int64_t i = 0; i < window.count; i++) {
            make(window.sample, q.token(window.first + i), row.data);
            window.quantize(row.data, i);
        }
    }
}
