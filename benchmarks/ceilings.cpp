// What the machine can do: loops of independent operations, compiled after templates/vector.h.
#include <type_traits>

constexpr int CHAINS = 12;  // two units, latencies of up to six cycles

// `threads` threads each copy their part of `count` floats, `times` over.
extern "C" void copy(const float* from, float* to, int64_t count, int64_t times, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t part = 0; part < threads; part++) {
        const int64_t size = count / threads / LANES * LANES;
        const float* source = from + part * size;
        float* target = to + part * size;
        for (int64_t time = 0; time < times; time++) {
            for (int64_t i = 0; i < size; i += LANES) {
                vec value;
                memcpy(&value, source + i, sizeof value);
                memcpy(target + i, &value, sizeof value);
            }
            asm volatile("" ::: "memory");  // the next time is not the same as this one
        }
    }
}

// A step for each of CHAINS vectors, `times` over, on every thread; the sums keep the compiler
// from dropping them.
template <class Vector, class Step>
static void chains(float* sums, int64_t times, int64_t threads, Vector first, Step step) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t part = 0; part < threads; part++) {
        Vector values[CHAINS];
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++) values[i] = first + (typename std::decay<decltype(first[0])>::type)i;
        for (int64_t time = 0; time < times; time++) {
#pragma GCC unroll 12
            for (int i = 0; i < CHAINS; i++) values[i] = step(values[i]);
        }
        Vector sum = {};
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++) sum += values[i];
        sums[part] = float(sum[0]);
    }
}

extern "C" void multiply_add(float* sums, int64_t times, int64_t threads) {
    const vec factor = all(0.5f), term = all(0.25f);
    chains(sums, times, threads, vec{}, [=](vec x) { return fma(x, factor, term); });
}

extern "C" void exponentials(float* sums, int64_t times, int64_t threads) {
    chains(sums, times, threads, vec{}, [](vec x) { return exp2_inside(-x); });
}

// Products that depend on the chain itself, as nothing else keeps them inside the loop.
#if defined(__AVX512BW__)
typedef __m512i bytes;
static inline bytes pairs8(bytes a, bytes b) { return _mm512_maddubs_epi16(a, b); }
static inline bytes pairs16(bytes a, bytes b) { return _mm512_madd_epi16(a, b); }
static inline bytes add16(bytes a, bytes b) { return _mm512_add_epi16(a, b); }
static inline bytes add32(bytes a, bytes b) { return _mm512_add_epi32(a, b); }
static inline bytes ones() { return _mm512_set1_epi8(1); }
#elif defined(__AVX2__)
typedef __m256i bytes;
static inline bytes pairs8(bytes a, bytes b) { return _mm256_maddubs_epi16(a, b); }
static inline bytes pairs16(bytes a, bytes b) { return _mm256_madd_epi16(a, b); }
static inline bytes add16(bytes a, bytes b) { return _mm256_add_epi16(a, b); }
static inline bytes add32(bytes a, bytes b) { return _mm256_add_epi32(a, b); }
static inline bytes ones() { return _mm256_set1_epi8(1); }
#endif

#if defined(__AVX2__)
extern "C" void products_maddubs(float* sums, int64_t times, int64_t threads) {
    const bytes codes = ones();
    chains(sums, times, threads, ones(), [=](bytes x) { return add16(x, pairs8(x, codes)); });
}

extern "C" void products_madd(float* sums, int64_t times, int64_t threads) {
    const bytes codes = ones();
    chains(sums, times, threads, ones(), [=](bytes x) { return add32(x, pairs16(x, codes)); });
}
#endif

#if defined(__AVX512VNNI__)
extern "C" void products_dpbusd(float* sums, int64_t times, int64_t threads) {
    const bytes codes = ones();
    chains(sums, times, threads, ones(),
           [=](bytes x) { return _mm512_dpbusd_epi32(x, codes, codes); });
}
#elif defined(__AVXVNNI__)
extern "C" void products_dpbusd(float* sums, int64_t times, int64_t threads) {
    const bytes codes = ones();
    chains(sums, times, threads, ones(),
           [=](bytes x) { return _mm256_dpbusd_avx_epi32(x, codes, codes); });
}
#endif

extern "C" int64_t lanes() { return LANES; }
