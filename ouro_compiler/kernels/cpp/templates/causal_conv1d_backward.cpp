// ouro::causal_conv1d_backward: gradients of a depthwise causal convolution (ops/causal_conv1d.py).
//
// A task owns LANES channels of one sample and walks once through time, with the last WIDTH tokens
// of the input and of the output's gradient in registers. Sums over time are kept for every sample
// and added up at the end in one order, so that no gradient depends on the number of threads.
#include "memory.h"
#include <algorithm>

constexpr int SUMS = WIDTH + 1;  // of a channel over time: the weight's row, bias

typedef stored<DTYPE> element_type;

struct Channels {
    const element_type *grad, *x;
    int64_t sy_l, sx_l;
    element_type* grad_x;
    int64_t channels;  // what a token of grad_x takes
    vec weight[WIDTH], bias;
    int lanes;
    int64_t length;
    float* sums;  // (lanes, SUMS)
};

static void walk(const Channels& s) {
    vec x[WIDTH] = {}, dy[WIDTH] = {}, grad_weight[WIDTH] = {}, grad_bias = {};  // the newest last
    for (int64_t i = 0; i < s.length + WIDTH - 1; i++) {
        for (int k = 0; k + 1 < WIDTH; k++) {
            x[k] = x[k + 1];
            dy[k] = dy[k + 1];
        }
        dy[WIDTH - 1] = vec{};
        if (i < s.length) {
            const int64_t t = REVERSE ? s.length - 1 - i : i;
            x[WIDTH - 1] = load<DTYPE>(s.x + t * s.sx_l, s.lanes);
            vec grad = load<DTYPE>(s.grad + t * s.sy_l, s.lanes);
            if (SILU) {
                vec y = s.bias;
                for (int k = 0; k < WIDTH; k++) y = fma(s.weight[k], x[k], y);
                const vec open = sigmoid(y);
                grad *= open * fma(y, 1.f - open, all(1.f));
            }
            dy[WIDTH - 1] = grad;
            grad_bias += grad;
            for (int k = 0; k < WIDTH; k++) grad_weight[k] = fma(grad, x[k], grad_weight[k]);
        }
        const int64_t oldest = i - (WIDTH - 1);  // no later output reads this token
        if (oldest >= 0) {
            vec grad = {};
            for (int k = 0; k < WIDTH; k++) grad = fma(s.weight[k], dy[WIDTH - 1 - k], grad);
            const int64_t t = REVERSE ? s.length - 1 - oldest : oldest;
            store<DTYPE>(s.grad_x + t * s.channels, grad, s.lanes);
        }
    }
    for (int lane = 0; lane < s.lanes; lane++) {
        float* row = s.sums + lane * SUMS;
        for (int k = 0; k < WIDTH; k++) row[k] = grad_weight[k][lane];
        row[WIDTH] = grad_bias[lane];
    }
}

// sums: (batch, channels, SUMS).
extern "C" void causal_conv1d_backward(
    const void* grad, int64_t sy_b, int64_t sy_l, const void* x, int64_t sx_b, int64_t sx_l,
    const void* weight, int64_t weight_dtype, const void* bias, int64_t bias_dtype, void* grad_x,
    void* grad_weight, void* grad_bias, float* sums, int64_t batch, int64_t channels, int64_t length,
    int64_t threads) {
    const int64_t blocks = (channels + LANES - 1) / LANES;
    if (batch * channels * length < 20000) threads = 1;  // less than waking them takes
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t task = 0; task < batch * blocks; task++) {
            const int64_t sample = task / blocks, d = task % blocks * LANES;
            const int lanes = int(std::min<int64_t>(LANES, channels - d));
            Channels s = {(const element_type*)grad + sample * sy_b + d,
                          (const element_type*)x + sample * sx_b + d, sy_l, sx_l,
                          (element_type*)grad_x + sample * length * channels + d, channels};
            for (int k = 0; k < WIDTH; k++)
                s.weight[k] = read_lanes(weight, weight_dtype, d * WIDTH + k, WIDTH, lanes);
            s.bias = read_lanes(bias, bias_dtype, d, 1, lanes);
            s.lanes = lanes;
            s.length = length;
            s.sums = sums + (sample * channels + d) * SUMS;
            walk(s);
        }
#pragma omp for schedule(static)
        for (int64_t d = 0; d < channels; d++) {
            float total[SUMS] = {};
            for (int64_t sample = 0; sample < batch; sample++)
                for (int i = 0; i < SUMS; i++) total[i] += sums[(sample * channels + d) * SUMS + i];
            for (int k = 0; k < WIDTH; k++) write(grad_weight, weight_dtype, d * WIDTH + k, total[k]);
            if (bias) write(grad_bias, bias_dtype, d, total[WIDTH]);
        }
    }
}
