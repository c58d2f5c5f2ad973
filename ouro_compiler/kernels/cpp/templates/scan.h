// What the selective scan and its backward share.
#pragma once
#include "memory.h"

// B or C of tokens first .. first + count as fp32 rows of STATES; in place where it already is that.
template <int DTYPE>
static inline const float* rows(const stored<DTYPE>* m, int64_t s_n, int64_t s_l, int64_t first,
                                int count, float* buffer, int64_t& step) {
    if constexpr (DTYPE == FP32) {
        if (s_n == 1) {
            step = s_l;
            return m + first * s_l;
        }
    }
    for (int t = 0; t < count; t++)
        for (int n = 0; n < STATES; n++)
            buffer[t * STATES + n] = to_float<DTYPE>(m[(first + t) * s_l + n * s_n]);
    step = STATES;
    return buffer;
}
