// Exact int32 products of a few rows of int8 codes with a panel of weights.
//
// KIND says how: WORDS multiplies pairs of int16; BYTES pairs of (unsigned weight, signed code) into
// int16, for weights of 4 bits; QUADS four of them at once into int32 (VNNI, emulated where the
// machine has none). Unsigned weights are stored as weight + OFFSET, so a product is too large by
// OFFSET times the sum of its row's codes.
//
// A pair is (k, k + half), half = ceil(K / 2): the two codes of one byte of packed weights.
#pragma once
#include <type_traits>
#include "memory.h"

constexpr int WORDS = 0, BYTES = 1, QUADS = 2;
constexpr int OFFSET = KIND == WORDS ? 0 : PACKED ? 8 : 128;
constexpr int VECTOR = LANES * 4;                           // bytes of a vector
constexpr int GROUP = KIND == QUADS ? 4 : 2;                // codes of a row in one step
constexpr int OUTPUTS = KIND == BYTES ? 2 * LANES : LANES;  // outputs of a vector
constexpr int WIDTH = 2;                                    // vectors of a panel
constexpr int PANEL = OUTPUTS * WIDTH;
constexpr int ROWS = LANES == 16 ? 10 : 5;  // accumulators of a panel's rows fit the registers

typedef std::conditional<KIND == WORDS, int16_t, int8_t>::type code_t;
typedef std::conditional<KIND == WORDS, int16_t, uint8_t>::type weight_t;
typedef std::conditional<KIND == BYTES, int16_t, int32_t>::type lane_t;
typedef lane_t lanes_t __attribute__((vector_size(VECTOR)));
typedef std::make_unsigned<lane_t>::type bits_t;
typedef bits_t bits_vec __attribute__((vector_size(VECTOR)));

// acc + the products of one group: `codes` holds the same group of a row's codes in every lane.
static inline lanes_t multiply_add(lanes_t acc, lanes_t weights, lanes_t codes) {
#if defined(__AVX512BW__)
    if constexpr (KIND == BYTES)
        return acc + (lanes_t)_mm512_maddubs_epi16((__m512i)weights, (__m512i)codes);
    if constexpr (KIND == WORDS)
        return acc + (lanes_t)_mm512_madd_epi16((__m512i)weights, (__m512i)codes);
#elif defined(__AVX2__)
    if constexpr (KIND == BYTES)
        return acc + (lanes_t)_mm256_maddubs_epi16((__m256i)weights, (__m256i)codes);
    if constexpr (KIND == WORDS)
        return acc + (lanes_t)_mm256_madd_epi16((__m256i)weights, (__m256i)codes);
#endif
#if defined(__AVX512VNNI__)
    if constexpr (KIND == QUADS)
        return (lanes_t)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)weights, (__m512i)codes);
#elif defined(__AVXVNNI__)
    if constexpr (KIND == QUADS)
        return (lanes_t)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)weights, (__m256i)codes);
#endif
    constexpr int BITS = 8 * sizeof(code_t), LANE = 8 * sizeof(lane_t);
    for (int shift = 0; shift < LANE; shift += BITS) {
        const lanes_t code = codes << (LANE - BITS - shift) >> (LANE - BITS);
        const lanes_t weight = KIND == WORDS
            ? weights << (LANE - BITS - shift) >> (LANE - BITS)
            : (lanes_t)((bits_vec)weights << (LANE - BITS - shift) >> (LANE - BITS));
        acc += weight * code;
    }
    return acc;
}

static inline lanes_t broadcast(const code_t* group) {
    lane_t value;
    memcpy(&value, group, sizeof value);
    lanes_t r;
#if defined(__AVX512F__)
    r = (lanes_t)(KIND == BYTES ? _mm512_set1_epi16(int16_t(value)) : _mm512_set1_epi32(value));
#elif defined(__AVX2__)
    r = (lanes_t)(KIND == BYTES ? _mm256_set1_epi16(int16_t(value)) : _mm256_set1_epi32(value));
#else
    for (unsigned i = 0; i < VECTOR / sizeof(lane_t); i++) r[i] = value;
#endif
    return r;
}

// tile = lane sums as int32, or += them.
template <bool ADD> static inline void flush(lanes_t acc, int32_t* tile) {
#pragma GCC unroll 2
    for (int part = 0; part < OUTPUTS / LANES; part++) {
        ivec sum;
        if constexpr (KIND == BYTES) {
#if defined(__AVX512BW__)
            const __m512i a = (__m512i)acc;
            sum = (ivec)_mm512_cvtepi16_epi32(part ? _mm512_extracti64x4_epi64(a, 1) : _mm512_castsi512_si256(a));
#elif defined(__AVX2__)
            const __m256i a = (__m256i)acc;
            sum = (ivec)_mm256_cvtepi16_epi32(part ? _mm256_extracti128_si256(a, 1) : _mm256_castsi256_si128(a));
#else
            for (int i = 0; i < LANES; i++) sum[i] = acc[part * LANES + i];
#endif
        } else {
            sum = (ivec)acc;
        }
        if (ADD) {
            ivec before;
            memcpy(&before, tile + part * LANES, sizeof before);
            sum += before;
        }
        memcpy(tile + part * LANES, &sum, sizeof sum);
    }
}

// Groups that an accumulator holds exactly when no code exceeds `peak`.
static inline int64_t exact_groups(int64_t peak, int64_t groups) {
    if (KIND != BYTES || peak == 0) return groups;
    return 32767 / (2 * (2 * OFFSET - 1) * peak);
}

// tile (ROWS, PANEL) = or += groups of ROWS rows of codes times the first vectors of a panel.
template <bool ADD, int VECTORS>
static inline void product_of_groups(const code_t* const* rows, const weight_t* panel, int64_t first,
                                     int64_t last, int32_t* tile) {
    lanes_t acc[ROWS][VECTORS] = {};
    for (int64_t g = first; g < last; g++) {
        lanes_t weights[VECTORS];
        for (int v = 0; v < VECTORS; v++)
            memcpy(&weights[v], (const char*)panel + (g * WIDTH + v) * VECTOR, VECTOR);
#pragma GCC unroll 10
        for (int r = 0; r < ROWS; r++) {
            const lanes_t codes = broadcast(rows[r] + g * GROUP);
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++) acc[r][v] = multiply_add(acc[r][v], weights[v], codes);
        }
    }
#pragma GCC unroll 10
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) flush<ADD>(acc[r][v], tile + r * PANEL + v * OUTPUTS);
}

template <int VECTORS>
static inline void product_of_vectors(const code_t* const* rows, const weight_t* panel,
                                      int64_t groups, int64_t exact, int32_t* tile) {
    product_of_groups<false, VECTORS>(rows, panel, 0, groups < exact ? groups : exact, tile);
    for (int64_t first = exact; first < groups; first += exact) {
        const int64_t last = first + exact < groups ? first + exact : groups;
        product_of_groups<true, VECTORS>(rows, panel, first, last, tile);
    }
}

// tile (ROWS, PANEL) = codes of ROWS rows times a panel's first `outputs` outputs, summed exactly.
static inline void product(const code_t* const* rows, const weight_t* panel, int64_t groups,
                           int64_t exact, int64_t outputs, int32_t* tile) {
    if (outputs <= OUTPUTS) product_of_vectors<1>(rows, panel, groups, exact, tile);
    else product_of_vectors<WIDTH>(rows, panel, groups, exact, tile);
}
