// ouro::add_norm: x and residual (batch, length, columns).
#include "norm.h"

extern "C" void add_norm(const void* x, int64_t sx_b, int64_t sx_l, int64_t sx_k,
                         const void* residual, int64_t sr_b, int64_t sr_l, int64_t sr_k,
                         const void* weight, int64_t weight_dtype, const void* bias,
                         int64_t bias_dtype, float eps, int64_t rms, void* y, void* total,
                         int64_t batch, int64_t length, int64_t columns, int64_t threads) {
    const int64_t rows = batch * length;
    const Tokens<DTYPE> tokens = {(const stored<DTYPE>*)x, sx_b, sx_l, sx_k};
    const Tokens<DTYPE_RESIDUAL> kept = {(const stored<DTYPE_RESIDUAL>*)residual, sr_b, sr_l, sr_k};
    const Buffer<vec> w(vectors(columns)), b(vectors(columns));
    read_row(weight, weight_dtype, columns, w.data);
    read_row(bias, bias_dtype, columns, b.data);
    const Norm norm = {columns, w.data, b.data, eps, rms != 0};
#pragma omp parallel num_threads(team(threads, rows * columns / 2))
    {
        const Buffer<vec> row(vectors(columns));
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            const int64_t at = r * columns;
            add_row(tokens, kept, r / length, r % length, (stored<DTYPE_TOTAL>*)total + at, columns,
                    row.data);
            norm(row.data);
            emit_row(row.data, (stored<DTYPE>*)y + at, columns);
        }
    }
}
