// Rows of a tensor as vectors, the last one padded with zeros, and who works on them.
#pragma once
#include "memory.h"

// x as a tensor of this dtype holds it.
template <int DTYPE> static inline vec round_to(vec x) {
    if constexpr (DTYPE == FP32) return x;
    stored<DTYPE> part[LANES];
    store<DTYPE>(part, x);
    return load<DTYPE>(part);
}

// Vectors in a row of `columns` elements; the last one may be partly filled.
static inline int64_t vectors(int64_t columns) { return (columns + LANES - 1) / LANES; }
static inline int filled(int64_t columns, int64_t v) {
    const int64_t rest = columns - v * LANES;
    return rest < LANES ? int(rest) : LANES;
}

// Uninitialised memory that is freed with its scope. (<memory> takes a tenth of a kernel's
// compilation.)
template <class T> struct Buffer {
    T* const data;

    explicit Buffer(int64_t count) : data(new T[count]) {}
    Buffer(const Buffer&) = delete;
    ~Buffer() { delete[] data; }
    T& operator[](int64_t i) const { return data[i]; }
};

// f(v, lanes) for every vector of a row. The number of lanes is a constant for all but the last, so
// that nothing is asked in the loop.
struct all_lanes {
    constexpr operator int() const { return LANES; }
};
template <class F> static inline void each_vector(int64_t columns, const F& f) {
    const int64_t whole = columns / LANES;
    for (int64_t v = 0; v < whole; v++) f(v, all_lanes{});
    if (columns % LANES) f(whole, int(columns % LANES));
}

// A row of a tensor in memory -> vectors.
template <int DTYPE>
static inline void load_row(const stored<DTYPE>* p, int64_t columns, vec* row) {
    each_vector(columns,
                [&](int64_t v, auto lanes) { row[v] = load<DTYPE>(p + v * LANES, lanes); });
}

// A parameter of `columns` elements as vectors, zero beyond the last and without a parameter.
static inline void read_row(const void* p, int64_t dtype, int64_t columns, vec* row) {
    if (!p)
        for (int64_t v = 0; v < vectors(columns); v++) row[v] = vec{};
    else if (dtype == FP32)
        load_row<FP32>((const float*)p, columns, row);
    else if (dtype == BF16)
        load_row<BF16>((const uint16_t*)p, columns, row);
    else
        load_row<FP16>((const fp16_t*)p, columns, row);
}

// Threads for this much work: all, or one where waking the others takes longer than they save.
// Nothing in between: the runtime ends threads that it does not need and starts them anew.
static inline int team(int64_t threads, int64_t nanoseconds) {
    return nanoseconds < 20000 ? 1 : int(threads);
}
