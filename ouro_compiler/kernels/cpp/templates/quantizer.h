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
    vec inverse, least, most;  // bounds of x * inverse
    ivec shift;                // what is added to it then
    // Are x * inverse and x / divisor less than 2^-12 apart where their codes differ, and zero whole?
    bool invertible;

    Grid(float d, float zero, float low, float high, float offset)
        : divisor(all(d)), zero(all(zero)), low(all(low)), high(all(high)), offset(all(offset)),
          inverse(all(1.f / d)), least(all(low - zero)), most(all(high - zero)),
          invertible(d > 0x1p-100f && d < 0x1p100f && zero >= -256 && zero <= 256 &&
                     zero == float(int(zero))) {
        shift = ivec{} + (invertible ? int(zero - offset) : 0);
    }
};

static inline vec select(ivec mask, vec a, vec b) { return mask ? a : b; }

// Grid `a` where the mask is set, else `b`.
static inline Grid select(ivec mask, const Grid& a, const Grid& b) {
    Grid r = b;
    r.divisor = select(mask, a.divisor, b.divisor);
    r.zero = select(mask, a.zero, b.zero);
    r.low = select(mask, a.low, b.low);
    r.high = select(mask, a.high, b.high);
    r.offset = select(mask, a.offset, b.offset);
    r.inverse = select(mask, a.inverse, b.inverse);
    r.least = select(mask, a.least, b.least);
    r.most = select(mask, a.most, b.most);
    r.shift = mask ? a.shift : b.shift;
    return r;
}

// The codes of x, in the low bytes of the result, from x / divisor: correctly rounded.
template <bool SYMMETRIC> static inline ivec encode(vec x, const Grid& g) {
    const vec steps = x / g.divisor;
    if constexpr (SYMMETRIC) return integers(min(g.high, max(g.low, steps)));
    const vec bound = all(0x1p20f);  // beyond every range, where rounding is still exact
    const vec code = round_even(min(bound, max(-bound, steps))) + g.zero;
    // Towards zero, as the reference: it matters where zero is not whole.
    return __builtin_convertvector(min(g.high, max(g.low, code)) - g.offset, ivec);
}

// The same from x * inverse, where it cannot make a difference: far enough from the middle of two
// codes. `middle` grows to the largest distance from a code.
template <bool SYMMETRIC> static inline ivec encode_fast(vec x, const Grid& g, vec& middle) {
    const vec steps = min(g.most, max(g.least, x * g.inverse));
    const ivec code = integers(steps);
    middle = max(abs(steps - __builtin_convertvector(code, vec)), middle);
    return SYMMETRIC ? code : code + g.shift;
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
    Buffer<vec> mask;     // which lanes are on the list; those without a channel are from the start
    bool listed = false;  // is a channel?

  public:
    const int64_t sample, first, count;  // steps first .. first + count

    Window(const Quantizer& q, int64_t task)
        : q(q), list(task * q.columns), mask(vectors(q.columns)), sample(task / q.windows()),
          first(task % q.windows() * q.window),
          count(q.length - first < q.window ? q.length - first : q.window) {
        for (int64_t v = 0; v < vectors(q.columns); v++) {
            const int lanes = filled(q.columns, v);
            const ivec inside = lanes == LANES ? ~ivec{} : lanes_below(lanes);
            ivec given = {};
            if (!q.threshold)
                given = (load_start(q.start, q.wide_start, list + v * LANES, lanes) <= 0) & inside;
            listed = listed || any(given);
            mask[v] = (vec)(given | ~inside);
        }
        if (!q.threshold) return;
        if (q.wide_start)
            for (int64_t k = 0; k < q.columns; k++) ((int32_t*)q.start)[list + k] = INT32_MAX;
        else
            memset((uint8_t*)q.start + list, 255, q.columns);
    }

    // Row `position` of the window: x holds its channels, 0 beyond them.
    void quantize(const vec* x, int64_t position) {
        q.zero_point ? quantize_row<false>(x, position) : quantize_row<true>(x, position);
    }

  private:
    template <bool SYMMETRIC> void quantize_row(const vec* x, int64_t position) {
        const int64_t t = q.token(first + position), row = sample * q.length + t;
        const float scale = read(q.scale, q.scale_dtype, t);
        const float top = float((1 << q.inlier_bits) - 1), half = float(1 << (q.inlier_bits - 1));
        const float zero = SYMMETRIC ? 0.f : read(q.zero_point, q.zero_dtype, t);
        const Grid inlier = SYMMETRIC ? Grid(scale, 0.f, 1 - half, half - 1, 0.f)
                                      : Grid(scale, zero, 0.f, top, half);
        if (q.threshold) {
            const float threshold = read(q.threshold, q.threshold_dtype, t);
            if (SYMMETRIC) extend<true>(x, position, 0.f, scale * (half - 1), threshold);
            else extend<false>(x, position, scale * (top / 2 - zero), scale * (top / 2), threshold);
        }
        float dynamic = 1.f, most = 0.f;  // outliers that stay in floating point have code 0
        if (listed && q.outlier_bits <= 8) {
            most = float((1 << (q.outlier_bits - 1)) - 1);
            dynamic = peak(x) / most;
            dynamic = dynamic < 1e-8f ? 1e-8f : dynamic;
        }
        q.outlier_scale[row] = dynamic;
        const Grid outlier(dynamic, 0.f, -most, most, 0.f);
        int8_t* codes = q.codes + row * q.columns;
        if (listed) encode_row<SYMMETRIC, true>(codes, x, inlier, outlier);
        else encode_row<SYMMETRIC, false>(codes, x, inlier, outlier);
    }

    // Once an unlisted channel leaves the range, all at or over the threshold are listed.
    template <bool SYMMETRIC>
    void extend(const vec* x, int64_t position, float middle, float limit, float threshold) {
        const auto magnitude = [&](int64_t v) { return abs(SYMMETRIC ? x[v] : x[v] - middle); };
        vec most = all(-1.f);  // of unlisted channels
        for (int64_t v = 0; v < vectors(q.columns); v++)
            most = max(select((ivec)mask[v], all(-1.f), magnitude(v)), most);
        if (!any(most > limit) || !any(most >= threshold)) return;
        for (int64_t v = 0; v < vectors(q.columns); v++) {
            const ivec joins = ~(ivec)mask[v] & (magnitude(v) >= threshold);
            if (any(joins)) join(v, joins, int32_t(position));
        }
    }

    void join(int64_t v, ivec joins, int32_t position) {
        listed = true;
        mask[v] = (vec)((ivec)mask[v] | joins);
        for (unsigned left = bits_of(joins); left; left &= left - 1) {
            const int64_t k = list + v * LANES + __builtin_ctz(left);
            if (q.wide_start)
                ((int32_t*)q.start)[k] = position;
            else
                ((uint8_t*)q.start)[k] = uint8_t(position);
        }
    }

    // The largest magnitude of a listed channel.
    float peak(const vec* x) const {
        vec most = {};
        for (int64_t v = 0; v < vectors(q.columns); v++)
            most = max(most, (vec)((ivec)mask[v] & (ivec)abs(x[v])));
        float largest = most[0];
        for (int i = 1; i < LANES; i++) largest = most[i] > largest ? most[i] : largest;
        return largest;
    }

    template <bool SYMMETRIC, bool LISTED>
    void encode_row(int8_t* codes, const vec* x, const Grid& inlier, const Grid& outlier) const {
        int64_t v = 0;
        ivec found[4];
        for (; (v + 4) * LANES <= q.columns; v += 4) {
            encode_vectors<SYMMETRIC, LISTED, 4>(found, x, v, inlier, outlier);
            store_codes(codes + v * LANES, found[0], found[1], found[2], found[3]);
        }
        for (; v < vectors(q.columns); v++) {
            encode_vectors<SYMMETRIC, LISTED, 1>(found, x, v, inlier, outlier);
            store_codes(codes + v * LANES, found[0], filled(q.columns, v));
        }
    }

    // Codes of vectors v, v + 1, ... of x. Outliers have neither zero nor offset.
    template <bool SYMMETRIC, bool LISTED, int COUNT>
    void encode_vectors(ivec* to, const vec* x, int64_t v, const Grid& inlier,
                        const Grid& outlier) const {
        const auto grid = [&](int n) {
            return LISTED ? select((ivec)mask[v + n], outlier, inlier) : inlier;
        };
        if (inlier.invertible && outlier.invertible) {
            vec middle = {};
#pragma GCC unroll 4
            for (int n = 0; n < COUNT; n++) to[n] = encode_fast<SYMMETRIC>(x[v + n], grid(n), middle);
            if (!any(middle > 0.5f - 0x1p-12f)) return;
        }
        for (int n = 0; n < COUNT; n++)
            to[n] = encode<SYMMETRIC>(x[v + n], grid(n));
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
