// ouro::linear_dynamic_outlier: the exact product with two scales (ops/linear.py).
//
// 1. Codes are parted: a row's inliers, listed channels as 0, and the codes of channels listed
//    anywhere in a segment of rows, close together. Outliers in floating point are kept as fp32.
// 2. A task unpacks a panel of outputs and multiplies rows with it. The same product then takes the
//    outliers with the listed columns of the panel, gathered once a segment.
// 3. The epilogue follows the reference's order of rounding.
// Nothing depends on the number of threads or on other samples.
#include <memory>
#include "epilogue.h"

struct Shape {
    int64_t batch, length, columns, outputs, window, reverse;
    int64_t half, groups, row;             // pairs, groups and codes of a parted row
    int64_t segment, segments;             // rows of a segment, segments of a sample
    Shape(int64_t b, int64_t l, int64_t k, int64_t o, int64_t w, int64_t r)
        : batch(b), length(l), columns(k), outputs(o), window(w), reverse(r) {
        half = (k + 1) / 2;
        groups = (2 * half + GROUP - 1) / GROUP;
        row = groups * GROUP;
        segment = w * std::max<int64_t>(1, ROWS / w);
        segments = (l + segment - 1) / segment;
    }
    // First row and number of rows of a segment; segments count in scan order.
    int64_t first(int64_t s) const { return reverse ? std::max<int64_t>(0, length - (s + 1) * segment) : s * segment; }
    int64_t rows(int64_t s) const { return std::min(segment, length - s * segment); }
    int64_t step(int64_t token) const { return reverse ? length - 1 - token : token; }
};

struct Parted {
    std::unique_ptr<code_t[]> inliers, outliers;  // (B * L, row)
    std::unique_ptr<float[]> kept;                // (B * L, columns), FLOAT_OUTLIERS
    std::unique_ptr<int32_t[]> lists, counts;     // (B * segments, columns), (B * segments)
    std::unique_ptr<int32_t[]> sums, listed_sums; // (B * L)
    std::unique_ptr<int32_t[]> peaks;             // (B * segments): largest inlier
    std::unique_ptr<float[]> scales;              // (B * L): inlier scales
};

struct Floats {  // x (B, L, K) in any layout
    const void* data;
    int64_t dtype, sb, sl, sk;
};

static inline int32_t sum_of(const int8_t* codes, int64_t count) {
    int32_t total = 0;
    for (int64_t k = 0; k < count; k += 256) {  // 256 codes do not overflow 16 bits
        int16_t sum = 0;
        for (int64_t i = k; i < std::min(count, k + 256); i++) sum += codes[i];
        total += sum;
    }
    return total;
}

template <typename start_t>
static void part(const Shape& s, const int8_t* codes, const start_t* start, const Floats& x,
                 const Parted& to, int8_t* __restrict inliers, int64_t sample, int64_t segment) {
    const int64_t id = sample * s.segments + segment, K = s.columns, half = s.half;
    const int64_t windows = (s.length + s.window - 1) / s.window, per = s.segment / s.window;
    constexpr start_t NEVER = std::is_same<start_t, uint8_t>::value ? start_t(255) : start_t(0x7fffffff);
    int32_t* list = to.lists.get() + id * K;
    int32_t count = 0;
    const int64_t w0 = segment * per, w1 = std::min(windows, w0 + per);
    memset(inliers, 0, K);
    for (int64_t w = w0; w < w1; w++)
        for (int64_t k = 0; k < K; k++) inliers[k] |= start[(sample * windows + w) * K + k] != NEVER;
    for (int64_t k = 0; k < K; k++) {
        list[count] = int32_t(k);
        count += inliers[k];
    }
    to.counts[id] = count;
    uint8_t peak = 0;
    inliers[K] = 0;  // the second of the last pair of an odd K
    for (int64_t i = 0; i < s.rows(segment); i++) {
        const int64_t token = s.first(segment) + i, r = sample * s.length + token;
        const int64_t step = s.step(token);
        const start_t position = start_t(step % s.window);
        const start_t* __restrict since = start + (sample * windows + step / s.window) * K;
        const int8_t* __restrict from = codes + r * K;
        for (int64_t k = 0; k < K; k++) inliers[k] = from[k] & -(since[k] > position);
        for (int64_t k = 0; k < K; k++) {
            const int8_t sign = inliers[k] >> 7;
            peak = std::max(peak, uint8_t((inliers[k] ^ sign) - sign));
        }
        code_t* __restrict in = to.inliers.get() + r * s.row;
        for (int64_t k = 0; k < half; k++) {
            in[2 * k] = inliers[k];
            in[2 * k + 1] = inliers[k + half];
        }
        for (int64_t k = 2 * half; k < s.row; k++) in[k] = 0;
        to.sums[r] = sum_of(inliers, K);
        if (FLOAT_OUTLIERS) {
            float* kept = to.kept.get() + r * K;
            for (int32_t i = 0; i < count; i++) {
                const int64_t k = list[i];
                kept[i] = since[k] <= position
                    ? read(x.data, x.dtype, sample * x.sb + token * x.sl + k * x.sk) : 0.f;
            }
        } else {
            code_t* out = to.outliers.get() + r * s.row;
            const int32_t listed = count ? sum_of(from, K) - to.sums[r] : 0;
            if (count)
                for (int64_t k = 0; k < K; k++) inliers[k] ^= from[k];  // codes of listed channels now
            for (int32_t i = 0; i < count; i++) out[i] = inliers[list[i]];
            for (int32_t i = count; i % GROUP; i++) out[i] = 0;
            to.listed_sums[r] = listed;
        }
    }
    to.peaks[id] = peak;
}

// Packed weights of LANES outputs and LANES pairs, turned around: to[pair][output].
static inline void turn(const uint8_t* from, int64_t stride, uint8_t to[16][16]) {
#if defined(__SSE2__)
    __m128i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm_loadu_si128((const __m128i*)(from + i * stride));
#define OURO_INTERLEAVE(x, y)                              \
    for (int i = 0; i < 8; i++) {                          \
        y[2 * i] = _mm_unpacklo_epi8(x[i], x[i + 8]);      \
        y[2 * i + 1] = _mm_unpackhi_epi8(x[i], x[i + 8]);  \
    }
    OURO_INTERLEAVE(a, b)
    OURO_INTERLEAVE(b, a)
    OURO_INTERLEAVE(a, b)
    OURO_INTERLEAVE(b, a)
#undef OURO_INTERLEAVE
    for (int i = 0; i < 16; i++) _mm_storeu_si128((__m128i*)to[i], a[i]);
#else
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) to[j][i] = from[i * stride + j];
#endif
}

typedef uint8_t bytes16 __attribute__((vector_size(16)));
typedef uint16_t words16 __attribute__((vector_size(32)));
typedef uint32_t pairs16 __attribute__((vector_size(64)));

// Both codes of a byte of packed weights, plus 8, of 16 outputs.
static inline pairs16 codes_of(const uint8_t* packed) {
    bytes16 b;
    memcpy(&b, packed, 16);
    const words16 w = __builtin_convertvector(b, words16);
    return __builtin_convertvector(((w | w << 4) & 0x0f0f) ^ 0x0808, pairs16);
}

// Both codes of pair p for 16 outputs, to be stored `to` that pair's place in a panel.
static inline void store_pair(const uint8_t* low, const uint8_t* high, weight_t* to) {
    for (int i = 0; i < 16; i++) {
        to[i * GROUP] = PACKED ? weight_t(((low[i] & 15) ^ 8) - 8 + OFFSET) : weight_t(int8_t(low[i]) + OFFSET);
        to[i * GROUP + 1] = PACKED ? weight_t(((low[i] >> 4) ^ 8) - 8 + OFFSET) : weight_t(int8_t(high[i]) + OFFSET);
    }
}

// panel (groups, PANEL, GROUP) of outputs first ... first + PANEL - 1: codes plus OFFSET.
static void unpack(const void* qweight, const Shape& s, int64_t first, weight_t* panel) {
    constexpr int PAIRS = GROUP / 2;
    const int64_t stride = PACKED ? s.half : s.columns;
    const uint8_t* rows = (const uint8_t*)qweight;
    for (int64_t o = 0; o < PANEL; o += 16) {
        const int64_t outputs = std::min<int64_t>(16, s.outputs - first - o);
        for (int64_t pair = 0; pair < s.groups * PAIRS; pair += 16) {
            uint8_t low[16][16], high[16][16];
            auto take = [&](uint8_t to[16][16], int64_t begin) {
                const int64_t count = std::min<int64_t>(16, stride - begin);
                const uint8_t* from = rows + (first + o) * stride + begin;
                uint8_t part[16][16];
                if (outputs < 16 || count < 16) {
                    memset(part, 0, sizeof part);
                    for (int64_t i = 0; i < outputs; i++)
                        for (int64_t j = 0; j < count; j++) part[i][j] = from[i * stride + j];
                }
                if (outputs < 16 || count < 16) turn(part[0], 16, to);
                else turn(from, stride, to);
            };
            take(low, pair);
            if (!PACKED) take(high, pair + s.half);
            if constexpr (PACKED && GROUP == 4 && OFFSET == 8) {  // a whole group at a time
                for (int p = 0; p < 16 && pair + p < s.groups * PAIRS; p += 2) {
                    const pairs16 group = codes_of(low[p]) | codes_of(low[p + 1]) << 16;
                    memcpy(panel + ((pair + p) / PAIRS * PANEL + o) * GROUP, &group, sizeof group);
                }
                continue;
            }
            for (int p = 0; p < 16 && pair + p < s.groups * PAIRS; p++)
                store_pair(low[p], high[p], panel + ((pair + p) / PAIRS * PANEL + o) * GROUP + (pair + p) % PAIRS * 2);
        }
    }
}

// The panel's columns of listed channels, in groups; missing ones are whatever meets a code of 0.
static void gather(const Shape& s, const weight_t* panel, const int32_t* list, int32_t count, weight_t* to) {
    constexpr int BITS = 8 * sizeof(weight_t);
    constexpr bits_t MASK = (1u << BITS) - 1;
    for (int32_t i = 0; i < count; i += GROUP) {
        bits_vec found[WIDTH] = {};
        for (int j = 0; j < GROUP && i + j < count; j++) {
            const int64_t k = list[i + j], second = k >= s.half, pair = k - second * s.half;
            const int place = int(2 * (pair % (GROUP / 2)) + second) * BITS;
#pragma GCC unroll 4
            for (int v = 0; v < WIDTH; v++) {
                bits_vec from;
                memcpy(&from, (const char*)panel + (pair / (GROUP / 2) * WIDTH + v) * VECTOR, VECTOR);
                found[v] |= (from >> place & MASK) << j * BITS;
            }
        }
        memcpy((char*)to + i / GROUP * WIDTH * VECTOR, found, sizeof found);
    }
}

// The same columns as fp32, (count, PANEL).
static void gather_floats(const Shape& s, const weight_t* panel, const int32_t* list, int32_t count, float* to) {
    for (int32_t i = 0; i < count; i++) {
        const int64_t k = list[i], second = k >= s.half, pair = k - second * s.half;
        const weight_t* column = panel + (pair / (GROUP / 2) * PANEL) * GROUP + 2 * (pair % (GROUP / 2)) + second;
        for (int o = 0; o < PANEL; o++) to[int64_t(i) * PANEL + o] = float(int(column[o * GROUP]) - OFFSET);
    }
}

// tile (ROWS, PANEL) of fp32: kept outliers times their weights, in the order of channels.
static void product_of_floats(const float* weights, int32_t count, const float* const* kept, float* tile) {
    for (int o = 0; o < PANEL; o += 2 * LANES) {
        vec sums[ROWS][2] = {};
        for (int32_t i = 0; i < count; i++) {
            const vec low = load<FP32>(weights + int64_t(i) * PANEL + o);
            const vec high = load<FP32>(weights + int64_t(i) * PANEL + o + LANES);
#pragma GCC unroll 10
            for (int r = 0; r < ROWS; r++) {
                const vec x = all(kept[r][i]);
                sums[r][0] = fma(low, x, sums[r][0]);
                sums[r][1] = fma(high, x, sums[r][1]);
            }
        }
#pragma GCC unroll 10
        for (int r = 0; r < ROWS; r++) {
            store<FP32>(tile + r * PANEL + o, sums[r][0]);
            store<FP32>(tile + r * PANEL + o + LANES, sums[r][1]);
        }
    }
}

extern "C" void linear_dynamic_outlier(
    const void* codes, const void* inlier_scale, int64_t inlier_dtype, const void* outlier_scale,
    const void* outlier_start, int64_t start_bytes, const void* x, int64_t x_dtype, int64_t sx_b,
    int64_t sx_l, int64_t sx_k, const void* qweight, const void* weight_scale, int64_t scale_dtype,
    int64_t scales, const void* bias, int64_t bias_dtype, const void* residual,
    int64_t residual_dtype, int64_t activation, void* y, int64_t batch, int64_t length,
    int64_t columns, int64_t outputs, int64_t window, int64_t reverse, int64_t threads) {
    const Shape s(batch, length, columns, outputs, window, reverse);
    const int64_t rows = batch * length, segments = batch * s.segments;
    const int64_t panels = (outputs + PANEL - 1) / PANEL;
    if (rows * columns * outputs < 200000) threads = 1;
    Parted parted = {
        std::unique_ptr<code_t[]>(new code_t[rows * s.row]),
        std::unique_ptr<code_t[]>(FLOAT_OUTLIERS ? nullptr : new code_t[rows * s.row]),
        std::unique_ptr<float[]>(FLOAT_OUTLIERS ? new float[rows * columns] : nullptr),
        std::unique_ptr<int32_t[]>(new int32_t[segments * columns + 1]),
        std::unique_ptr<int32_t[]>(new int32_t[segments]),
        std::unique_ptr<int32_t[]>(new int32_t[rows]),
        std::unique_ptr<int32_t[]>(new int32_t[rows]),
        std::unique_ptr<int32_t[]>(new int32_t[segments]),
        std::unique_ptr<float[]>(new float[rows])};
    std::unique_ptr<float[]> scale(new float[panels * PANEL]), shift(new float[panels * PANEL]);
    for (int64_t o = 0; o < panels * PANEL; o++) {
        scale[o] = o < outputs ? read(weight_scale, scale_dtype, scales > 1 ? o : 0) : 0.f;
        shift[o] = bias && o < outputs ? read(bias, bias_dtype, o) : 0.f;
    }
    for (int64_t r = 0; r < rows; r++) parted.scales[r] = read(inlier_scale, inlier_dtype, r % length);
    const Floats floats = {x, x_dtype, sx_b, sx_l, sx_k};
    const Epilogue e = {outputs, scale.get(), bias ? shift.get() : nullptr, residual, residual_dtype, activation,
                        (stored<DTYPE_Y>*)y};
    // Every panel is unpacked once for each chunk of segments: no more chunks than keep all busy.
    const int64_t chunks = panels % threads == 0 || panels >= 8 * threads ? 1 : std::min(threads, segments);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::unique_ptr<int8_t[]> inliers(new int8_t[columns + 1]);
#pragma omp for schedule(static)
        for (int64_t id = 0; id < segments; id++) {
            if (start_bytes == 1)
                part(s, (const int8_t*)codes, (const uint8_t*)outlier_start, floats, parted,
                     inliers.get(), id / s.segments, id % s.segments);
            else
                part(s, (const int8_t*)codes, (const int32_t*)outlier_start, floats, parted,
                     inliers.get(), id / s.segments, id % s.segments);
        }
        std::unique_ptr<weight_t[]> panel(new weight_t[s.row * PANEL]);
        std::unique_ptr<weight_t[]> listed(new weight_t[FLOAT_OUTLIERS ? 0 : s.row * PANEL]);
        std::unique_ptr<float[]> listed_floats(new float[FLOAT_OUTLIERS ? s.row * PANEL : 0]);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < panels * chunks; task++) {
            const int64_t first = task / chunks * PANEL, chunk = task % chunks;
            unpack(qweight, s, first, panel.get());
            for (int64_t id = segments * chunk / chunks; id < segments * (chunk + 1) / chunks; id++) {
                const int64_t segment = id % s.segments, sample = id / s.segments;
                const int64_t begin = sample * s.length + s.first(segment), count = s.rows(segment);
                const int32_t* list = parted.lists.get() + id * columns;
                const int32_t found = parted.counts[id];
                if (FLOAT_OUTLIERS) gather_floats(s, panel.get(), list, found, listed_floats.get());
                else gather(s, panel.get(), list, found, listed.get());
                const int64_t exact = exact_groups(parted.peaks[id], s.groups);
                for (int64_t i = 0; i < count; i += ROWS) {
                    alignas(64) int32_t acc[ROWS * PANEL], acc_o[ROWS * PANEL];
                    alignas(64) float kept[ROWS * PANEL];
                    const code_t *in[ROWS], *out[ROWS];
                    const float* floats_of[ROWS];
                    auto point = [&](auto& to, const auto* from, int64_t stride) {
                        for (int r = 0; r < ROWS; r++) to[r] = from + (begin + std::min(i + r, count - 1)) * stride;
                    };
                    point(in, parted.inliers.get(), s.row);
                    if (FLOAT_OUTLIERS && found) point(floats_of, parted.kept.get(), columns);
                    else if (found) point(out, parted.outliers.get(), s.row);
                    product(in, panel.get(), s.groups, exact, outputs - first, acc);
                    if (FLOAT_OUTLIERS && found)
                        product_of_floats(listed_floats.get(), found, floats_of, kept);
                    else if (found)
                        product(out, listed.get(), (found + GROUP - 1) / GROUP, exact_groups(127, found), outputs - first, acc_o);
                    for (int r = 0; r < ROWS && i + r < count; r++) {
                        const int64_t row = begin + i + r;
                        const Sums sums = {acc + r * PANEL, found ? acc_o + r * PANEL : nullptr,
                                           found ? kept + r * PANEL : nullptr,
                                           OFFSET * parted.sums[row],
                                           FLOAT_OUTLIERS ? 0 : OFFSET * parted.listed_sums[row],
                                           parted.scales[row], ((const float*)outlier_scale)[row]};
                        finish(e, sums, row, first);
                    }
                }
            }
        }
    }
}
