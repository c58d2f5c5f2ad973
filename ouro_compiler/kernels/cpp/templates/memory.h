// Element types of tensors in memory, and vectors to and from them. Everything computes in fp32.
#pragma once
#include "vector.h"

// Codes of dtypes in constants and arguments; DTYPES in kernels/cpp/launch.py.
constexpr int FP32 = 0, BF16 = 1, FP16 = 2;
constexpr int UINT8 = 3, INT32 = 4;  // zero points only

#if defined(__clang__) && defined(__x86_64__)
typedef __fp16 fp16_t;  // _Float16 needs a processor that computes in it
#else
typedef _Float16 fp16_t;
#endif

template <int DTYPE> struct element;
template <> struct element<FP32> { typedef float type; };
template <> struct element<BF16> { typedef uint16_t type; };
template <> struct element<FP16> { typedef fp16_t type; };

template <int DTYPE> using stored = typename element<DTYPE>::type;

typedef uint16_t half_bits __attribute__((vector_size(LANES * 2)));
typedef uint32_t word_bits __attribute__((vector_size(LANES * 4)));
typedef fp16_t half_vec __attribute__((vector_size(LANES * 2)));

template <int DTYPE> static inline vec load(const stored<DTYPE>* p) {
    if constexpr (DTYPE == FP32) {
        vec r;
        memcpy(&r, p, sizeof r);
        return r;
    } else if constexpr (DTYPE == BF16) {
        half_bits h;
        memcpy(&h, p, sizeof h);
        return (vec)(__builtin_convertvector(h, word_bits) << 16);
    } else {
#if defined(__AVX512F__)
        return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__) && defined(__AVX2__)
        return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
        half_vec h;
        memcpy(&h, p, sizeof h);
        return __builtin_convertvector(h, vec);
#endif
    }
}

template <int DTYPE> static inline void store(stored<DTYPE>* p, vec x) {
    if constexpr (DTYPE == FP32) {
        memcpy(p, &x, sizeof x);
    } else if constexpr (DTYPE == BF16) {  // half to even
        word_bits w = (word_bits)x;
        word_bits rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
        half_bits h = __builtin_convertvector(x == x ? rounded : word_bits{} + 0x7fc0, half_bits);
        memcpy(p, &h, sizeof h);
    } else {
#if defined(__AVX512F__)
        _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && defined(__AVX2__)
        _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
        half_vec h = __builtin_convertvector(x, half_vec);
        memcpy(p, &h, sizeof h);
#endif
    }
}

// The first `count` elements only; the other lanes are 0.
template <int DTYPE> static inline vec load(const stored<DTYPE>* p, int count) {
    if (count >= LANES) return load<DTYPE>(p);
    stored<DTYPE> part[LANES] = {};
    for (int i = 0; i < count; i++) part[i] = p[i];
    return load<DTYPE>(part);
}

template <int DTYPE> static inline void store(stored<DTYPE>* p, vec x, int count) {
    if (count >= LANES) return store<DTYPE>(p, x);
    stored<DTYPE> part[LANES];
    store<DTYPE>(part, x);
    for (int i = 0; i < count; i++) p[i] = part[i];
}

template <int DTYPE> static inline float to_float(const stored<DTYPE>& x) {
    if constexpr (DTYPE == BF16) {
        uint32_t w = uint32_t(x) << 16;
        float r;
        memcpy(&r, &w, 4);
        return r;
    } else {
        return float(x);
    }
}

// Where tokens lie: a map has `width` a row; without one, all of them are in one row.
struct Places {
    int64_t width, row, token;  // elements from row to row, and from token to token

    int64_t at(int64_t t) const {
        if (t < width) return t * token;
        const uint32_t h = uint32_t(t) / uint32_t(width);  // no map has 2^32 pixels
        return h * row + (t - h * width) * token;
    }
};

// An element of a tensor whose dtype is known only at run time: parameters, read once a block.
static inline float read(const void* p, int64_t dtype, int64_t i) {
    if (dtype == FP32) return ((const float*)p)[i];
    if (dtype == BF16) return to_float<BF16>(((const uint16_t*)p)[i]);
    if (dtype == UINT8) return ((const uint8_t*)p)[i];
    if (dtype == INT32) return float(((const int32_t*)p)[i]);
    return to_float<FP16>(((const fp16_t*)p)[i]);
}

// Lanes first, first + 1, ... of such a tensor with a stride; 0 beyond `count`, or without one.
static inline vec read_lanes(const void* p, int64_t dtype, int64_t first, int64_t stride, int count) {
    vec r = {};
    if (p)
        for (int i = 0; i < LANES && i < count; i++) r[i] = read(p, dtype, first + i * stride);
    return r;
}

// Element i of such a tensor.
static inline void write(void* p, int64_t dtype, int64_t i, float x) {
    const vec v = vec{} + x;
    if (dtype == FP32) store<FP32>((float*)p + i, v, 1);
    if (dtype == BF16) store<BF16>((uint16_t*)p + i, v, 1);
    if (dtype == FP16) store<FP16>((fp16_t*)p + i, v, 1);
}
