// ouro::add_norm: rows (rows, columns) of x and residual, contiguous.
#include "norm.h"

extern "C" void add_norm(const void* x, const void* residual, const void* weight,
                         int64_t weight_dtype, const void* bias, int64_t bias_dtype, float eps,
                         int64_t rms, void* y, void* total, int64_t rows, int64_t columns,
                         int64_t threads) {
    const auto w = buffer(vectors(columns)), b = buffer(vectors(columns));
    read_row(weight, weight_dtype, columns, w.get());
    read_row(bias, bias_dtype, columns, b.get());
    const Norm norm = {columns, w.get(), b.get(), eps, rms != 0};
#pragma omp parallel num_threads(team(threads, rows * columns / 2))
    {
        const auto row = buffer(vectors(columns));
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            const int64_t at = r * columns;
            add_row((const stored<DTYPE>*)x + at,
                    residual ? (const stored<DTYPE_RESIDUAL>*)residual + at : nullptr,
                    (stored<DTYPE_TOTAL>*)total + at, columns, row.get());
            norm(row.get());
            emit_row(row.get(), (stored<DTYPE>*)y + at, columns);
        }
    }
}
