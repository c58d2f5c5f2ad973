// ouro::add_norm: rows (rows, columns) of x and residual, contiguous.
#include "norm.h"

extern "C" void add_norm(const void* x, const void* residual, const void* weight,
                         int64_t weight_dtype, const void* bias, int64_t bias_dtype, float eps,
                         int64_t rms, void* y, void* total, int64_t rows, int64_t columns,
                         int64_t threads) {
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
            add_row((const stored<DTYPE>*)x + at,
                    residual ? (const stored<DTYPE_RESIDUAL>*)residual + at : nullptr,
                    (stored<DTYPE_TOTAL>*)total + at, columns, row.data);
            norm(row.data);
            emit_row(row.data, (stored<DTYPE>*)y + at, columns);
        }
    }
}
