// Exact int32 products of a few rows of int8 codes with a panel of weights.
//
// KIND says how: WORDS multiplies pairs of int16. BYTES and QUADS take four (unsigned weight, signed
// code) an output: BYTES, for weights of 4 bits, adds pairs of them in two int16, QUADS all four in
// int32 (VNNI, emulated where the machine has none). Unsigned weights are stored as weight + OFFSET,
// so a product is too large by OFFSET times the sum of its row's codes.
//
// A pair is (k, k + half), half = ceil(K / 2): the two codes of one byte of packed weights.
#pragma once
#include <type_traits>
#include "memory.h"

constexpr int WORDS = 0, BYTES = 1, QUADS = 2;
constexpr int OFFSET = KIND == WORDS ? 0 : PACKED ? 8 : 128;
constexpr int VECTOR = LANES * 4;                           // bytes of a vector
constexpr int GROUP = KIND == WORDS ? 2 : 4;                // codes of a row in one step
constexpr int WIDTH = LANES == 16 ? 2 : 4;                  // vectors of a panel, multiplied two at a time
constexpr int PANEL = LANES * WIDTH;
constexpr int ROWS = LANES == 16 ? 10 : 5;  // accumulators of a panel's rows fit the registers

typedef std::conditional<KIND == WORDS, int16_t, int8_t>::type code_t;
typedef std::conditional<KIND == WORDS, int16_t, uint8_t>::type weight_t;
typedef int32_t lanes_t __attribute__((vector_size(VECTOR)));
typedef int16_t halves_t __attribute__((vector_size(VECTOR)));
typedef uint16_t bit_halves_t __attribute__((vector_size(VECTOR)));
typedef uint32_t bits_t;
typedef bits_t bits_vec __attribute__((vector_size(VECTOR)));

// acc + the products of one group: `codes` holds the same group of a row's codes in every lane.
static inline lanes_t multiply_add(lanes_t acc, lanes_t weights, lanes_t codes) {
#if defined(__AVX512BW__)
    if constexpr (KIND == BYTES)
        return (lanes_t)((halves_t)acc + (halves_t)_mm512_maddubs_epi16((__m512i)weights, (__m512i)codes));
    if constexpr (KIND == WORDS)
        return acc + (lanes_t)_mm512_madd_epi16((__m512i)weights, (__m512i)codes);
#elif defined(__AVX2__)
    if constexpr (KIND == BYTES)
        return (lanes_t)((halves_t)acc + (halves_t)_mm256_maddubs_epi16((__m256i)weights, (__m256i)codes));
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
    if constexpr (KIND == BYTES) {
        const halves_t code = (halves_t)codes;
        const bit_halves_t weight = (bit_halves_t)weights;
        return (lanes_t)((halves_t)acc + (halves_t)(weight & 255) * (code << 8 >> 8) + (halves_t)(weight >> 8) * (code >> 8));
    }
    constexpr int BITS = 8 * sizeof(code_t), LANE = 32;
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
    int32_t value;
    memcpy(&value, group, sizeof value);
#if defined(__AVX512F__)
    return (lanes_t)_mm512_set1_epi32(value);
#elif defined(__AVX2__)
    return (lanes_t)_mm256_set1_epi32(value);
#else
    lanes_t r;
    for (int i = 0; i < LANES; i++) r[i] = value;
    return r;
#endif
}

// tile = lane sums as int32, or += them.
template <bool ADD> static inline void flush(lanes_t acc, int32_t* tile) {
    ivec sum = (ivec)acc;
    if constexpr (KIND == BYTES) {
#if defined(__AVX512BW__)
        sum = (ivec)_mm512_madd_epi16((__m512i)acc, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
        sum = (ivec)_mm256_madd_epi16((__m256i)acc, _mm256_set1_epi16(1));
#else
        sum = (sum << 16 >> 16) + (sum >> 16);
#endif
    }
    if (ADD) {
        ivec before;
        memcpy(&before, tile, sizeof before);
        sum += before;
    }
    memcpy(tile, &sum, sizeof sum);
}

// Groups that an accumulator holds exactly when no code exceeds `peak`.
static inline int64_t exact_groups(int64_t peak, int64_t groups) {
    if (KIND != BYTES || peak == 0) return groups;
    return 32767 / (2 * (2 * OFFSET - 1) * peak);
}

// Says no more than that a value is in a register here. Without it GCC 12 computes all products of a
// step first, and runs out of registers for the sums.
static inline lanes_t in_register(lanes_t sum) {
#if defined(__AVX512F__)
    asm volatile("" : "+v"(sum));
#elif defined(__AVX2__)
    asm volatile("" : "+x"(sum));
#endif
    return sum;
}

// tile (ROWS, PANEL) = or += groups of ROWS rows of codes times some vectors of a panel, from `vector` on.
template <bool ADD, int VECTORS>
static inline void product_of_groups(const code_t* const* rows, const weight_t* panel, int vector,
                                     int64_t first, int64_t last, int32_t* tile) {
    lanes_t acc[ROWS][VECTORS] = {};
    for (int64_t g = first; g < last; g++) {
        lanes_t weights[VECTORS];
        for (int v = 0; v < VECTORS; v++)
            memcpy(&weights[v], (const char*)panel + (g * WIDTH + vector + v) * VECTOR, VECTOR);
#pragma GCC unroll 10
        for (int r = 0; r < ROWS; r++) {
            const lanes_t codes = broadcast(rows[r] + g * GROUP);
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++)
                acc[r][v] = in_register(multiply_add(acc[r][v], weights[v], codes));
        }
    }
#pragma GCC unroll 10
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) flush<ADD>(acc[r][v], tile + r * PANEL + (vector + v) * LANES);
}

template <int VECTORS>
static inline void product_of_vectors(const code_t* const* rows, const weight_t* panel, int vector,
                                      int64_t groups, int64_t exact, int32_t* tile) {
    product_of_groups<false, VECTORS>(rows, panel, vector, 0, groups < exact ? groups : exact, tile);
    for (int64_t first = exact; first < groups; first += exact) {
        const int64_t last = first + exact < groups ? first + exact : groups;
        product_of_groups<true, VECTORS>(rows, panel, vector, first, last, tile);
    }
}

// tile (ROWS, PANEL) = codes of ROWS rows times a panel's first `outputs` outputs, summed exactly.
static inline void product(const code_t* const* rows, const weight_t* panel, int64_t groups,
                           int64_t exact, int64_t outputs, int32_t* tile) {
    for (int vector = 0; vector < WIDTH && vector * LANES < outputs; vector += 2)
        if (outputs <= (vector + 1) * LANES) product_of_vectors<1>(rows, panel, vector, groups, exact, tile);
        else product_of_vectors<2>(rows, panel, vector, groups, exact, tile);
}
