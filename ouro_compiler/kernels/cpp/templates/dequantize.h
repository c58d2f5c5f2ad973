// Dynamic-outlier codes back to floats (ops/quantize.py): the arithmetic, and its operands.
#pragma once
#include "codes.h"

// What the channels of one token share.
struct Token {
    float inlier, dynamic, shift;
    int32_t position;  // in its window
    int64_t list;      // where its window's outlier_start begins
};

// Codes (batch, length, columns). Listed channels are read from x, of type DTYPE, where there is one.
template <int DTYPE> struct Quantized {
    const void *codes, *scale;
    int64_t scale_dtype;
    const void* zero_point;
    int64_t zero_dtype;
    const void *outlier_scale, *start, *x;
    int64_t sx_b, sx_l;
    int64_t length, columns, window, inlier_bits, reverse, wide_start;

    Token token(int64_t sample, int64_t t) const {
        const int64_t windows = (length + window - 1) / window;
        const uint32_t step = uint32_t(reverse ? length - 1 - t : t), size = uint32_t(window);
        const float shift =
            zero_point ? float(1 << (inlier_bits - 1)) - read(zero_point, zero_dtype, t) : 0.f;
        return {read(scale, scale_dtype, t), ((const float*)outlier_scale)[sample * length + t],
                shift, int32_t(step % size), (sample * windows + step / size) * columns};
    }

    ivec starts(const Token& token, int64_t first, int count) const {
        return load_start(start, wide_start, token.list + first, count);
    }

    vec inliers(const Token& token, int64_t sample, int64_t t, int64_t first, int count) const {
        return (codes_of(sample, t, first, count) + token.shift) * token.inlier;
    }

    // Channels first ... first + count - 1 of a token; `at` is their outlier_start.
    vec values(const Token& token, ivec at, int64_t sample, int64_t t, int64_t first,
               int count) const {
        const ivec listed = at <= token.position;
        const vec inlier = inliers(token, sample, t, first, count);
        if (!x) return listed ? codes_of(sample, t, first, count) * token.dynamic : inlier;
        if (!any(listed)) return inlier;
        return listed ? load<DTYPE>((const stored<DTYPE>*)x + sample * sx_b + t * sx_l + first, count) : inlier;
    }

    // Is one of these channels ever listed?
    bool lists(int64_t sample, int64_t first, int count) const {
        const int64_t windows = (length + window - 1) / window;
        ivec listed = {};
        for (int64_t w = 0; w < windows; w++)
            listed |= load_start(start, wide_start, (sample * windows + w) * columns + first,
                                 count) < int32_t(window);
        return any(listed);
    }

    // f(t, values) for tokens begin ... end - 1, whose `tokens` are given, in memory's order.
    // listing: what `lists` says.
    template <class Count, class F>
    void each_token(const Token* tokens, bool listing, int64_t sample, int64_t begin, int64_t end,
                    int64_t first, Count count, const F& f) const {
        if (!listing) {
            for (int64_t t = begin; t < end; t++)
                f(t, inliers(tokens[t], sample, t, first, count));
            return;
        }
        for (int64_t t = begin; t < end;) {
            const int32_t position = tokens[t].position;
            const int64_t left = reverse ? position + 1 : window - position;
            const int64_t stop = t + left < end ? t + left : end;  // of the window
            const ivec at = starts(tokens[t], first, count);
            if (any(at < int32_t(window)))
                for (; t < stop; t++) f(t, values(tokens[t], at, sample, t, first, count));
            else
                for (; t < stop; t++) f(t, inliers(tokens[t], sample, t, first, count));
        }
    }

  private:
    vec codes_of(int64_t sample, int64_t t, int64_t first, int count) const {
        return load_codes((const int8_t*)codes + (sample * length + t) * columns + first, count);
    }
};
