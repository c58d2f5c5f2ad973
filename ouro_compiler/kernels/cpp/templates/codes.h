// int8 codes and outlier_start, to and from vectors.
#pragma once
#include "rows.h"

typedef int8_t byte_vec __attribute__((vector_size(LANES)));
typedef uint8_t ubyte_vec __attribute__((vector_size(LANES)));

// Conversions that compilers make one lane at a time.
static inline ivec widen(byte_vec b) {
#if defined(__AVX512F__)
    return (ivec)_mm512_cvtepi8_epi32((__m128i)b);
#elif defined(__AVX2__)
    return (ivec)_mm256_cvtepi8_epi32(_mm_set_epi64x(0, (int64_t)b));
#else
    return __builtin_convertvector(b, ivec);
#endif
}

static inline ivec widen(ubyte_vec b) { return widen((byte_vec)b) & 255; }

static inline byte_vec narrow(ivec x) {
#if defined(__AVX512F__)
    return (byte_vec)_mm512_cvtepi32_epi8((__m512i)x);
#elif defined(__AVX2__)
    const __m256i low_bytes = _mm256_set1_epi32(0x0c080400);
    const __m256i part = _mm256_shuffle_epi8((__m256i)x, low_bytes);
    const __m128i joined =
        _mm_unpacklo_epi32(_mm256_castsi256_si128(part), _mm256_extracti128_si256(part, 1));
    return (byte_vec)_mm_cvtsi128_si64(joined);
#else
    return __builtin_convertvector(x, byte_vec);
#endif
}

// The first `count` codes as floats; the other lanes are 0.
static inline vec load_codes(const int8_t* p, int count) {
    byte_vec b = {};
    if (count >= LANES)
        memcpy(&b, p, LANES);
    else
        memcpy(&b, p, count);
    return __builtin_convertvector(widen(b), vec);
}

// The nearest integers, half to even, for |x| < 2^22.
static inline ivec integers(vec x) {
#if defined(__AVX512F__)
    return (ivec)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX2__)
    return (ivec)_mm256_cvtps_epi32((__m256)x);
#else
    return __builtin_convertvector(round_even(x), ivec);
#endif
}

// The low bytes of the first `count` integers.
static inline void store_codes(int8_t* p, ivec x, int count) {
    const byte_vec b = narrow(x);
    if (count >= LANES)
        memcpy(p, &b, LANES);
    else
        memcpy(p, &b, count);
}

// The low bytes of four vectors.
static inline void store_codes(int8_t* p, ivec a, ivec b, ivec c, ivec d) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i byte = _mm256_set1_epi32(255);
    const __m256i ab = _mm256_packus_epi32(_mm256_and_si256((__m256i)a, byte),
                                           _mm256_and_si256((__m256i)b, byte));
    const __m256i cd = _mm256_packus_epi32(_mm256_and_si256((__m256i)c, byte),
                                           _mm256_and_si256((__m256i)d, byte));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256((__m256i*)p,
                        _mm256_permutevar8x32_epi32(_mm256_packus_epi16(ab, cd), order));
#else
    store_codes(p, a, LANES);
    store_codes(p + LANES, b, LANES);
    store_codes(p + 2 * LANES, c, LANES);
    store_codes(p + 3 * LANES, d, LANES);
#endif
}

// outlier_start of `count` channels: one is listed where it is at most its token's position in the
// window. The other lanes never are.
static inline ivec load_start(const void* start, int64_t wide, int64_t first, int count) {
    ivec at = ivec{} + 0x7fffffff;
    if (wide) {
        memcpy(&at, (const int32_t*)start + first, count * 4);
    } else {
        ubyte_vec b = ubyte_vec{} + 255;
        if (count >= LANES)
            memcpy(&b, (const uint8_t*)start + first, LANES);
        else
            memcpy(&b, (const uint8_t*)start + first, count);
        at = widen(b);
    }
    return at;
}
