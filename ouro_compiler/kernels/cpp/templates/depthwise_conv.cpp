// ouro::depthwise_conv: x (batch, height, width, channels) with channels next to each other; y is
// contiguous in that order.
//
// A task is up to TILE pixels of a row. Sums run over taps in the order of the filter, whatever
// pixels are computed together.
#include "rows.h"

constexpr int64_t TILE = 16;
constexpr int BEFORE_H = (TAPS_H - 1) / 2, BEFORE_W = (TAPS_W - 1) / 2;

struct Filter {
    int64_t channels;
    Buffer<vec> taps, shift;      // (vectors, TAPS_H * TAPS_W) and (vectors,)
    Buffer<stored<DTYPE>> zeros;  // a pixel around the map

    Filter(const void* weight, int64_t weight_dtype, const void* bias, int64_t bias_dtype, int64_t channels)
        : channels(channels), taps(vectors(channels) * TAPS_H * TAPS_W), shift(vectors(channels)),
          zeros(channels) {
        constexpr int64_t TAPS = TAPS_H * TAPS_W;
        memset(zeros.data, 0, channels * sizeof *zeros.data);
        read_row(bias, bias_dtype, channels, shift.data);
        for (int64_t v = 0; v < vectors(channels); v++)
            for (int64_t i = 0; i < TAPS; i++)
                taps[v * TAPS + i] = read_lanes(weight, weight_dtype, v * LANES * TAPS + i, TAPS, filled(channels, v));
    }

    // PIXELS pixels of row h from column w on; sample and y point to the map's first pixel.
    template <int PIXELS, bool SILU>
    void several(const stored<DTYPE>* sample, int64_t sx_h, int64_t sx_w, int64_t h, int64_t w,
                 int64_t height, int64_t width, stored<DTYPE>* y) const {
        constexpr int READ = PIXELS + TAPS_W - 1;
        const stored<DTYPE>* inputs[TAPS_H][READ];
        for (int i = 0; i < TAPS_H; i++)
            for (int j = 0; j < READ; j++) {
                const int64_t at_h = h + i - BEFORE_H, at_w = w + j - BEFORE_W;
                const bool inside = at_h >= 0 && at_h < height && at_w >= 0 && at_w < width;
                inputs[i][j] = inside ? sample + at_h * sx_h + at_w * sx_w : zeros.data;
            }
        stored<DTYPE>* out = y + (h * width + w) * channels;
        each_vector(channels, [&](int64_t v, auto lanes) {
            vec sum[PIXELS];
            for (int n = 0; n < PIXELS; n++) sum[n] = shift[v];
#pragma GCC unroll 16
            for (int i = 0; i < TAPS_H; i++) {
                vec in[READ];
#pragma GCC unroll 20
                for (int j = 0; j < READ; j++) in[j] = load<DTYPE>(inputs[i][j] + v * LANES, lanes);
#pragma GCC unroll 16
                for (int j = 0; j < TAPS_W; j++) {
                    const vec tap = taps[(v * TAPS_H + i) * TAPS_W + j];
#pragma GCC unroll 4
                    for (int n = 0; n < PIXELS; n++) sum[n] = fma(tap, in[n + j], sum[n]);
                }
            }
            if constexpr (SILU) silu<PIXELS>(sum);
#pragma GCC unroll 4
            for (int n = 0; n < PIXELS; n++) store<DTYPE>(out + n * channels + v * LANES, sum[n], lanes);
        });
    }
};

extern "C" void depthwise_conv(const void* x, int64_t sx_b, int64_t sx_h, int64_t sx_w,
                               const void* weight, int64_t weight_dtype, const void* bias,
                               int64_t bias_dtype, int64_t silu_after, void* y, int64_t batch,
                               int64_t height, int64_t width, int64_t channels, int64_t threads) {
    const Filter filter(weight, weight_dtype, bias, bias_dtype, channels);
    const int64_t tiles = (width + TILE - 1) / TILE;
#pragma omp parallel for schedule(static) num_threads(team(threads, batch * height * width * channels))
    for (int64_t task = 0; task < batch * height * tiles; task++) {
        const int64_t h = task / tiles % height, sample = task / tiles / height, first = task % tiles * TILE;
        const int64_t last = first + TILE < width ? first + TILE : width;
        const stored<DTYPE>* from = (const stored<DTYPE>*)x + sample * sx_b;
        stored<DTYPE>* to = (stored<DTYPE>*)y + sample * height * width * channels;
        for (int64_t w = first; w < last;) {
            const int64_t left = last - w;
            const int pixels = left >= 4 ? 4 : left >= 2 ? 2 : 1;
            const auto run = pixels == 4 ? (silu_after ? &Filter::several<4, true> : &Filter::several<4, false>)
                           : pixels == 2 ? (silu_after ? &Filter::several<2, true> : &Filter::several<2, false>)
                                         : (silu_after ? &Filter::several<1, true> : &Filter::several<1, false>);
            (filter.*run)(from, sx_h, sx_w, h, w, height, width, to);
            w += pixels;
        }
    }
}
