// Kernels of the sparse engine: a network is a list of steps over preallocated buffers, and engine_run() does all of them in one call.
//
// Plain C++17 with the vector extensions of GCC and Clang; AVX-512, AVX2, NEON and SSE come from the same text. All tensors are
// float32, images x channels x height x width; a tensor knows how many floats lie between two images, planes and rows. Around a plane there
// may be a border of zeros, the same for all tensors of one resolution, so that kernels read over the edge. Every buffer has SLACK readable
// floats before and after all that.
//
// The heart is the convolution. Its plain loop, for one output (image n, filter f, row y, column x):
//     sum = bias[f]
//     for every weight w != 0 of filter f, at channel c and kernel position (i, j):
//         sum += w * in[n][c][y * stride_h + i * dilation_h - pad_h][x * stride_w + j * dilation_w - pad_w]     (0 outside)
//     out[n][f][y][x] = activation(sum + residual[n][f][y][x])
// For a tile of outputs (rows, columns, and side by side several images) the inputs of some channels, a block, are first copied
// ("packed") so that the same kernel position of neighbouring outputs is contiguous: a weight is then a pair (offset, value), and
//     tile[0 .. size) += value * packed[offset .. offset + size)
// runs in vector registers, for all weights of a filter in that block. Stride, dilation, padding and groups exist in the packing alone.
// Where input and output have the same size and border nothing needs to be packed ("direct"): a weight reads the input shifted, and a tile
// is a stretch of the plane, of which only the pixels are stored. With strides the input is first split into phases (a step of its own):
// plane (a, b) holds the pixels (y * stride_h + a, x * stride_w + b), and a weight reads one of them shifted.
//
// What costs time is loading: a multiply-add needs one vector, and of two that a core can load in a cycle one that crosses a cache line takes
// both. So the packing may copy each row once for every column of the kernel ("shifted"), after which all loads are aligned; a block is as
// many channels as leave the inputs of a tile in the first cache, and all filters go over a block before the next; rows of small images lie
// side by side in a vector, several images or several strips of one. Weights lie in the order of use, filters with equally many of them
// one after the other, and what lies far away, outputs and weights of large layers, is asked for ahead.

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include <unistd.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#define TILE_VECTORS 24   // accumulators of a sparse tile; 32 registers
#define DENSE_VECTORS 6   // times DENSE_FILTERS accumulators of a dense tile
#elif defined(__AVX__)
#define LANES 8
#define TILE_VECTORS 12
#define DENSE_VECTORS 3
#elif defined(__aarch64__)
#define LANES 4
#define TILE_VECTORS 24
#define DENSE_VECTORS 6
#else
#define LANES 4
#define TILE_VECTORS 14
#define DENSE_VECTORS 3
#endif
#define DENSE_FILTERS 4
#define FAR (256 << 10)   // bytes of a layer from which on memory is asked for ahead
#define AHEAD 1024        // bytes
#define PATIENCE 2000     // pauses, some twenty microseconds, before a thread without work sleeps
#define SLACK 256         // floats around every buffer that may be read, never used

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));  // at any address

typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef int32_t loose_ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline vec load(const float *p) { return *(const loose *)p; }
static inline void store(float *p, vec v) { *(loose *)p = v; }
static inline vec all(float value) { return value - vec{}; }

// Store the lanes whose bits are set.
static inline void store_some(float *p, vec v, uint32_t bits) {
#if LANES == 16
    _mm512_mask_storeu_ps(p, (__mmask16)bits, (__m512)v);
#else
    if (bits == (1u << LANES) - 1) {
        store(p, v);
    } else {
        for (int l = 0; l < LANES; l++)
            if (bits >> l & 1) p[l] = v[l];
    }
#endif
}

// The lanes whose bits are set, zero in the others.
static inline vec load_some(const float *p, uint32_t bits) {
#if LANES == 16
    return (vec)_mm512_maskz_loadu_ps((__mmask16)bits, p);
#else
    vec v = {};
    for (int l = 0; l < LANES; l++)
        if (bits >> l & 1) v[l] = p[l];
    return v;
#endif
}

// Every second float of two vectors.
static inline vec evens(vec a, vec b) {
#if LANES == 16
    const ints pick = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
#elif LANES == 8
    const ints pick = {0, 2, 4, 6, 8, 10, 12, 14};
#else
    const ints pick = {0, 2, 4, 6};
#endif
#if defined(__clang__)
    vec out;
    for (int l = 0; l < LANES; l++) out[l] = pick[l] < LANES ? a[pick[l]] : b[pick[l] - LANES];
    return out;
#else
    return __builtin_shuffle(a, b, pick);
#endif
}

enum Kind { CONV = 0, LINEAR = 1, MAX_POOL = 2, AVERAGE_POOL = 3, MEAN = 4, POINTWISE = 5, PAD = 6, SPREAD = 7, COPY = 8, PHASES = 9 };
enum Activation { CLAMP = 0, LEAKY = 1, HARDSWISH = 2, HARDSIGMOID = 3, SIGMOID = 4, SILU = 5, GELU = 6, TANH = 7, ELU = 8, GELU_TANH = 9 };

struct Tensor {
    int64_t buffer;  // number of the buffer, -1: none
    int64_t offset;  // floats from the buffer's start to the first image
    int64_t image;   // floats between two images
    int64_t plane;   // between two channels
    int64_t pitch;   // between two rows
};

struct Step {  // mirrored by build.py, all members 8 bytes wide
    int64_t kind;
    Tensor in, out, other;
    int64_t images, channels, height, width, filters, out_height, out_width;
    int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
    int64_t mode;            // CONV: 1 if pixels are rows of a matrix (many tokens of a linear layer); POINTWISE: 0 add, 1 multiply, 2 a value a plane
    int64_t activation;
    double low, high;        // of CLAMP; low is the slope of LEAKY and alpha of ELU
    const float *weight;     // dense: filters x channels / groups x kernel_h x kernel_w; POINTWISE: scale of each channel, or null
    const float *bias;       // of each filter or channel, or null
    const int32_t *mask;     // for a plane with a border: -1 at its pixels, 0 in the border, as long as its rows; null without border
    const int32_t *rows, *columns;  // PAD: the input row and column of each output row and column, -1: fill with low
    // choices, measured by choices.py
    int64_t dense;           // 1: multiply by zeros too
    int64_t shifted;         // 1: a copy of each row for every kernel column, so that loads are aligned
    int64_t direct;          // 1: nothing is packed
    int64_t phases;          // planes of a channel of a direct convolution with strides: 1 or stride_h * stride_w; PHASES: so many
    int64_t vectors;         // at most so many vectors a tile
    int64_t block_bytes;     // inputs packed at a time
    int64_t chunks;          // filters are shared out in so many pieces
    void *prepared;          // Conv or Linear
};

// ---------------------------------------------------------------------------------------------------------------- activations

static float activate_one(float x, int64_t activation, float low, float high) {
    switch (activation) {
        case CLAMP: return x < low ? low : x > high ? high : x;
        case LEAKY: return x < 0 ? x * low : x;
        case HARDSWISH: return x * std::fmin(std::fmax(x + 3.0f, 0.0f), 6.0f) / 6.0f;
        case HARDSIGMOID: return std::fmin(std::fmax(x + 3.0f, 0.0f), 6.0f) / 6.0f;
        case SIGMOID: return 1.0f / (1.0f + std::exp(-x));
        case SILU: return x / (1.0f + std::exp(-x));
        case GELU: return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f));
        case GELU_TANH: return 0.5f * x * (1.0f + std::tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
        case TANH: return std::tanh(x);
        default: return x > 0 ? x : low * std::expm1(x);
    }
}

static inline vec clamp(vec v, float low, float high) {
    v = v < all(low) ? all(low) : v;
    return v > all(high) ? all(high) : v;
}

// out[i] = activation(in[i] + residual[i]) for i < n. With `spill`, up to LANES - 1 floats behind out[n - 1] may be overwritten.
static inline void finish(float *out, const float *in, const float *residual, int64_t n, const Step &s, bool spill) {
    const float low = s.low, high = s.high;
    for (int64_t i = 0; i < n; i += LANES) {
        vec v = load(in + i);
        if (residual) v += load(residual + i);
        if (s.activation == CLAMP) {
            v = clamp(v, low, high);
        } else {
            for (int l = 0; l < LANES; l++) v[l] = activate_one(v[l], s.activation, low, high);
        }
        if (spill || i + LANES <= n) {
            store(out + i, v);
        } else {
            for (int64_t l = 0; l < n - i; l++) out[i + l] = v[l];
        }
    }
}

// The same for a stretch of a plane with a border, in whole vectors: what lies in the border becomes zero.
static inline void finish_masked(float *out, const float *in, const float *residual, int64_t n, const int32_t *mask, const Step &s) {
    const float low = s.low, high = s.high;
    for (int64_t i = 0; i < n; i += LANES) {
        vec v = load(in + i);
        if (residual) v += load(residual + i);
        if (s.activation == CLAMP) {
            v = clamp(v, low, high);
        } else {
            for (int l = 0; l < LANES; l++) v[l] = activate_one(v[l], s.activation, low, high);
        }
        store(out + i, (vec)((ints)v & *(const loose_ints *)(mask + i)));
    }
}

// ---------------------------------------------------------------------------------------------------------- the convolution's core

struct Weight {
    int32_t offset;  // floats from the start of the packed block
    float value;
};

// sum[v] += the products of all weights with vector v of what they read. The plain loop:
//     for j: for k < V * LANES: sum[k] += weights[j].value * packed[weights[j].offset + k];
template <int V>
static inline __attribute__((always_inline)) void add_products(vec *sum, const float *packed, const Weight *weights, int64_t count) {
    constexpr int CHAINS = V <= 2 ? 4 : V <= 4 ? 2 : 1;  // sums that do not wait for one another
    vec chain[CHAINS][V];
#pragma GCC unroll 4
    for (int c = 0; c < CHAINS; c++)
#pragma GCC unroll 32
        for (int v = 0; v < V; v++) chain[c][v] = c ? vec{} : sum[v];
    int64_t j = 0;
    for (; j + CHAINS <= count; j += CHAINS)
#pragma GCC unroll 4
        for (int c = 0; c < CHAINS; c++) {
            const float *x = packed + weights[j + c].offset;
            const vec value = all(weights[j + c].value);
#pragma GCC unroll 32
            for (int v = 0; v < V; v++) chain[c][v] += value * load(x + v * LANES);
        }
    for (; CHAINS > 1 && j < count; j++) {
        const float *x = packed + weights[j].offset;
        const vec value = all(weights[j].value);
#pragma GCC unroll 32
        for (int v = 0; v < V; v++) chain[0][v] += value * load(x + v * LANES);
    }
#pragma GCC unroll 32
    for (int v = 0; v < V; v++) {
#pragma GCC unroll 4
        for (int c = 1; c < CHAINS; c++) chain[0][v] += chain[c][v];
        sum[v] = chain[0][v];
    }
}

// A tile's sums, kept in memory between blocks of channels.
template <int V>
static void accumulate(float *tile, const float *packed, const Weight *weights, int64_t count) {
    vec sum[V];
#pragma GCC unroll 32
    for (int v = 0; v < V; v++) sum[v] = load(tile + v * LANES);
    add_products<V>(sum, packed, weights, count);
#pragma GCC unroll 32
    for (int v = 0; v < V; v++) store(tile + v * LANES, sum[v]);
}

struct Row {          // of the weights: those of one filter in one block
    int32_t filter;   // within its group
    int32_t count;
};

struct Piece {        // where a vector of a tile belongs
    int32_t place;    // floats from the start of the plane
    uint32_t bits;    // its lanes that are pixels
};

struct Run {          // one tile of outputs, one block of channels, some filters of a group
    const Row *rows;
    int64_t count;    // of rows
    const Weight *weights;
    const float *packed;
    float *sums;      // of the tile for each filter, between blocks; null where there is one block
    bool first, last; // block
    bool far;         // weights or outputs are too many for the nearer caches
    const float *bias, *residual;  // or null
    float *out;
    int64_t out_plane, residual_plane;
    int64_t images;   // side by side in each vector
    int64_t out_image, residual_image;
    const Piece *pieces;  // [image][vector]
    float low, high;
};

// out = clamp(bias + products + residual) for a tile of V vectors, filter after filter. The plain loop is that of the whole convolution.
template <int V>
static void run_filters(const Run &r) {
    const Weight *weights = r.weights;
    const float low = r.low, high = r.high;
    for (int64_t k = 0; k < r.count; k++) {
        const int64_t f = r.rows[k].filter, count = r.rows[k].count;
        float *const out = r.out + f * r.out_plane, *const kept = r.sums + f * V * LANES;
        const float *const residual = r.residual ? r.residual + f * r.residual_plane : nullptr;
        if (r.far && r.images == 1) {  // what is needed when the sums are ready, and the weights of filters to come
            for (int v = 0; v < V && r.last; v++) __builtin_prefetch(out + r.pieces[v].place, 1);
            for (int v = 0; v < V && r.last && residual; v++) __builtin_prefetch(residual + r.pieces[v].place);
            for (int64_t j = 0; j < count; j += 8) __builtin_prefetch((const char *)(weights + j) + AHEAD);
        }
        vec sum[V];
        if (r.first) {
            const vec bias = all(r.bias ? r.bias[f] : 0);
#pragma GCC unroll 32
            for (int v = 0; v < V; v++) sum[v] = bias;
        } else {
#pragma GCC unroll 32
            for (int v = 0; v < V; v++) sum[v] = *(const vec *)(kept + v * LANES);
        }
        add_products<V>(sum, r.packed, weights, count);
        weights += count;
        if (!r.last) {
#pragma GCC unroll 32
            for (int v = 0; v < V; v++) *(vec *)(kept + v * LANES) = sum[v];
            continue;
        }
        if (r.images == 1) {
            if (residual) {
#pragma GCC unroll 32
                for (int v = 0; v < V; v++) sum[v] += load(residual + r.pieces[v].place);
            }
#pragma GCC unroll 32
            for (int v = 0; v < V; v++) store_some(out + r.pieces[v].place, clamp(sum[v], low, high), r.pieces[v].bits);
            continue;
        }
        for (int64_t m = 0; m < r.images && residual; m++) {
            const Piece *const pieces = r.pieces + m * V;
#pragma GCC unroll 32
            for (int v = 0; v < V; v++) sum[v] += load_some(residual + m * r.residual_image + pieces[v].place, pieces[v].bits);
        }
        for (int64_t m = 0; m < r.images; m++) {
            const Piece *const pieces = r.pieces + m * V;
#pragma GCC unroll 32
            for (int v = 0; v < V; v++) store_some(out + m * r.out_image + pieces[v].place, clamp(sum[v], low, high), pieces[v].bits);
        }
    }
}

// The same for DENSE_FILTERS filters that have weights at the same offsets: values[j * DENSE_FILTERS + f]. Tiles lie `apart` floats apart.
template <int V>
static void accumulate_dense(float *tile, int64_t apart, const float *packed, const int32_t *offsets, const float *values, int64_t count) {
    vec sum[DENSE_FILTERS][V];
#pragma GCC unroll 4
    for (int f = 0; f < DENSE_FILTERS; f++)
#pragma GCC unroll 32
        for (int v = 0; v < V; v++) sum[f][v] = load(tile + f * apart + v * LANES);
    for (int64_t j = 0; j < count; j++) {
        const float *x = packed + offsets[j];
        vec in[V];
#pragma GCC unroll 32
        for (int v = 0; v < V; v++) in[v] = load(x + v * LANES);
#pragma GCC unroll 4
        for (int f = 0; f < DENSE_FILTERS; f++) {
            const vec value = all(values[j * DENSE_FILTERS + f]);
#pragma GCC unroll 32
            for (int v = 0; v < V; v++) sum[f][v] += value * in[v];
        }
    }
#pragma GCC unroll 4
    for (int f = 0; f < DENSE_FILTERS; f++)
#pragma GCC unroll 32
        for (int v = 0; v < V; v++) store(tile + f * apart + v * LANES, sum[f][v]);
}

typedef void (*Accumulate)(float *, const float *, const Weight *, int64_t);
typedef void (*RunFilters)(const Run &);
typedef void (*AccumulateDense)(float *, int64_t, const float *, const int32_t *, const float *, int64_t);

// [number of vectors]
template <int... V>
static constexpr std::array<Accumulate, sizeof...(V) + 1> accumulates(std::integer_sequence<int, V...>) {
    return {nullptr, accumulate<V + 1>...};
}
template <int... V>
static constexpr std::array<RunFilters, sizeof...(V) + 1> runs(std::integer_sequence<int, V...>) {
    return {nullptr, run_filters<V + 1>...};
}
template <int... V>
static constexpr std::array<AccumulateDense, sizeof...(V) + 1> dense_accumulates(std::integer_sequence<int, V...>) {
    return {nullptr, accumulate_dense<V + 1>...};
}
static constexpr auto ACCUMULATE = accumulates(std::make_integer_sequence<int, TILE_VECTORS>());
static constexpr auto RUN_FILTERS = runs(std::make_integer_sequence<int, TILE_VECTORS>());
static constexpr auto ACCUMULATE_DENSE = dense_accumulates(std::make_integer_sequence<int, DENSE_VECTORS>());

// ------------------------------------------------------------------------------------------------------------ a prepared convolution

struct Slot {         // one packed piece: rows of one channel, as one kernel column (or column phase) and one row phase see them
    int32_t channel;  // within its group
    int32_t column;   // input column of output column 0
    int32_t row;      // input row of output row 0
    int32_t used;     // rows packed
};

struct Conv {
    Step view;                                     // the step; a flat one has the whole plane as its one row
    bool flat;
    bool bordered;                                 // the input has a border of zeros as wide as the kernel reads
    int64_t tile_images, tile_rows, tile_columns;  // outputs of a tile; images lie side by side
    int64_t strips, strip_rows;                    // or strips of one image do, each of so many rows
    int64_t pitch;                                 // floats between two packed rows
    int64_t rows;                                  // packed rows of a slot
    int64_t slot_size;                             // floats of a slot
    int64_t vectors;                               // of a tile: tile_rows * pitch rounded up
    int64_t blocks;                                // of channels
    int64_t most_slots;                            // in any block
    int64_t nonzero;
    std::vector<Slot> slots;                       // of all groups and blocks
    std::vector<int64_t> slot_start;               // [group * blocks + block]
    bool quick;                                    // run_filters does it
    bool far;                                      // weights and outputs are more than FAR bytes
    std::vector<Piece> pieces;                     // [tile][vector]
    std::vector<Weight> weights;                   // [group][block][row]
    std::vector<Row> row;                          // [group][block]: the filters of each chunk, those with equally many weights together
    std::vector<int64_t> start;                    // first weight of a row; dense: [(group * blocks + block) * filters of a group + filter]
    std::vector<int32_t> offsets;                  // dense: [group][block], shared by the filters
    std::vector<int64_t> offset_start;
    std::vector<float> values;                     // dense: [group][block][filters in fours][offset][DENSE_FILTERS]
    std::vector<int64_t> chunk;                    // first filter of each chunk, and the end
};

static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// A pitch of at least n floats: a multiple of the vector, or a power of two below it.
static int64_t pitch_of(int64_t n) {
    for (int64_t p = 1; p < LANES; p *= 2)
        if (n <= p) return p;
    return round_up(n, LANES);
}

// Whether run_filters can do a convolution, whatever its tiles.
static bool can_be_quick(const Step &s) {
    return !s.dense && !s.mode && s.activation == CLAMP && (s.other.buffer < 0 || s.other.pitch == s.out.pitch);
}

// Whether the input has a border of zeros as wide as the kernel reads, so that shifted rows are plain copies.
static bool is_bordered(const Step &s) {
    const int64_t border = s.in.pitch - s.width;
    const int64_t reach = most(most(s.pad_h, (s.kernel_h - 1) * s.dilation_h - s.pad_h), most(s.pad_w, (s.kernel_w - 1) * s.dilation_w - s.pad_w));
    return s.shifted && !s.direct && s.stride_h == 1 && s.stride_w == 1 && border > 0 && border >= reach;
}

static void choose_tile(const Step &s, Conv &c) {
    const int64_t room = LANES * least(s.vectors, s.dense ? DENSE_VECTORS : TILE_VECTORS);
    const int64_t reach = s.shifted || s.direct ? 0 : (s.kernel_w - 1) * s.dilation_w / s.stride_w;  // columns read beyond the tile's
    c.tile_images = 1;
    c.tile_columns = least(s.out_width, most(1, room - reach));
    if (c.tile_columns < s.out_width)  // equal parts
        c.tile_columns = least(c.tile_columns, round_up(ceil_div(s.out_width, ceil_div(s.out_width, c.tile_columns)), LANES));
    c.pitch = pitch_of(c.tile_columns + reach);
    c.strips = 1;
    if (s.shifted && s.out_width <= LANES / 2) {  // a row of several images, or of several strips of one, fills a vector
        c.tile_images = least(s.images, LANES / s.out_width);
        if (s.images == 1 && c.bordered && can_be_quick(s)) c.strips = least(s.out_height, LANES / s.out_width);
        if (c.tile_images * c.strips > 1) c.pitch = LANES;
    }
    c.strip_rows = ceil_div(s.out_height, c.strips);
    c.tile_rows = most(1, least(c.strip_rows, room / c.pitch));
    c.tile_rows = ceil_div(c.strip_rows, ceil_div(c.strip_rows, c.tile_rows));
    c.vectors = ceil_div((c.tile_rows - 1) * c.pitch + c.tile_images * c.strips * c.tile_columns, LANES);
    c.rows = c.tile_rows + (s.kernel_h - 1) * s.dilation_h / s.stride_h;
    c.slot_size = round_up(c.rows * c.pitch, LANES);
}

static int64_t floor_div(int64_t n, int64_t by) { return n >= 0 ? n / by : -ceil_div(-n, by); }

// Where a weight of a direct convolution reads, from the output's place: `row` and `column` are those of the input for output 0, 0.
static int64_t direct_offset(const Step &s, int64_t plane, int64_t row, int64_t column) {
    const int64_t y = floor_div(row, s.stride_h), x = floor_div(column, s.stride_w);
    if (s.phases > 1) plane += (row - y * s.stride_h) * s.stride_w + column - x * s.stride_w;
    return plane * s.in.plane + y * s.in.pitch + x;
}

// Chunks of filters with about equal work: one unit a weight, and a few for each filter.
static void share_out(const Step &s, Conv &c) {
    const int64_t filters = s.filters / s.groups, size = s.channels / s.groups * s.kernel_h * s.kernel_w;
    const int64_t chunks = most(1, least(s.chunks, ceil_div(filters, DENSE_FILTERS)));
    std::vector<int64_t> work(filters, 4);
    int64_t total = 0;
    for (int64_t f = 0; f < filters; f++) {
        for (int64_t g = 0; g < s.groups && !s.dense && chunks > 1; g++)
            for (int64_t j = 0; j < size; j++) work[f] += s.weight[(g * filters + f) * size + j] != 0;
        total += work[f];
    }
    int64_t sum = 0;
    c.chunk.push_back(0);
    for (int64_t f = 0; f < filters; f++) {
        if ((int64_t)c.chunk.size() < chunks && sum * chunks >= total * (int64_t)c.chunk.size() && f % DENSE_FILTERS == 0) c.chunk.push_back(f);
        sum += work[f];
    }
    c.chunk.push_back(filters);
}

// Where the vectors of each tile belong, if run_filters can do this convolution: a vector lies within one row of the output.
static void place_pieces(const Step &s, Conv &c) {
    c.quick = can_be_quick(s) && (c.flat || c.pitch % LANES == 0);
    if (!c.quick) return;
    const int64_t side = c.tile_images * c.strips;
    for (int64_t y0 = 0; y0 < c.strip_rows; y0 += c.tile_rows)
        for (int64_t x0 = 0; x0 < s.out_width; x0 += c.tile_columns)
            for (int64_t m = 0; m < side; m++)
                for (int64_t v = 0; v < c.vectors; v++) {
                    const int64_t row = c.flat ? 0 : y0 + v * LANES / c.pitch, x = x0 + (c.flat ? v * LANES : v * LANES % c.pitch);
                    const int64_t first = m * c.tile_columns, end = side > 1 ? first + s.out_width : least(s.out_width, x0 + c.tile_columns) - x;
                    const int64_t y = row + (c.strips > 1 ? m * c.strip_rows : 0);
                    Piece piece = {(int32_t)(c.flat ? x : y * s.out.pitch + x - first), 0};
                    for (int64_t l = first; l < least(LANES, end); l++)
                        if (row < c.strip_rows && y < s.out_height && (!c.flat || !s.mask || s.mask[x + l])) piece.bits |= 1u << l;
                    if (!piece.bits) piece.place = 0;
                    c.pieces.push_back(piece);
                }
}

extern "C" void *conv_prepare(const Step *step) {
    Conv *conv = new Conv;
    Conv &c = *conv;
    Step &s = c.view;
    s = *step;
    const bool pointwise = s.kernel_h * s.kernel_w * s.stride_h * s.stride_w == 1 && s.pad_h == 0 && s.pad_w == 0;
    c.flat = !s.mode && (s.direct || (pointwise && s.in.pitch == s.out.pitch && (s.other.buffer < 0 || s.other.pitch == s.out.pitch)));
    if (c.flat) {
        s.width = s.out_width = s.out_height * s.out.pitch;
        s.height = s.out_height = 1;
    }
    const int64_t planes = most(1, s.phases);  // of a channel
    c.bordered = !c.flat && is_bordered(s);
    choose_tile(s, c);
    c.bordered = c.bordered && c.pitch % LANES == 0;
    const int64_t channels = s.channels / s.groups, filters = s.filters / s.groups, taps = s.kernel_h * s.kernel_w;
    // slots of a channel: one for each row phase, times one for each kernel column (shifted) or column phase
    const int64_t copies = s.shifted ? s.kernel_w : least(s.stride_w, (s.kernel_w - 1) * s.dilation_w + 1);
    const int64_t phases = least(s.stride_h, (s.kernel_h - 1) * s.dilation_h + 1);
    const int64_t channel_bytes = 4 * copies * phases * c.slot_size;
    const int64_t block = most(1, least(channels, s.block_bytes / (s.direct ? 4 * planes * c.vectors * LANES : channel_bytes)));
    c.blocks = ceil_div(channels, block);
    c.most_slots = 0;
    c.nonzero = 0;
    share_out(s, c);
    std::vector<int32_t> slot_of(copies * phases), offset_of(block * taps);
    std::vector<char> used(taps);
    for (int64_t g = 0; g < s.groups; g++)
        for (int64_t b = 0; b < c.blocks; b++) {
            const int64_t first = b * block, last = least(channels, first + block);
            const float *weight = s.weight + g * filters * channels * taps;
            c.slot_start.push_back(c.slots.size());
            for (int64_t ch = first; ch < last; ch++) {
                for (int64_t t = 0; t < taps; t++) {
                    used[t] = s.dense != 0;
                    for (int64_t f = 0; f < filters && !used[t]; f++) used[t] = weight[(f * channels + ch) * taps + t] != 0;
                }
                for (int32_t &slot : slot_of) slot = -1;
                for (int64_t t = 0; t < taps; t++) {
                    if (!used[t]) continue;
                    const int64_t row = t / s.kernel_w * s.dilation_h, column = t % s.kernel_w * s.dilation_w;
                    const int64_t phase = row % s.stride_h, copy = s.shifted ? t % s.kernel_w : column % s.stride_w;
                    const int64_t shift = s.shifted ? 0 : column / s.stride_w;
                    int32_t &slot = slot_of[phase * copies + copy];
                    if (slot < 0) {
                        slot = c.slots.size() - c.slot_start.back();
                        c.slots.push_back({(int32_t)ch, (int32_t)((s.shifted ? column : copy) - s.pad_w), (int32_t)(phase - s.pad_h), 0});
                    }
                    Slot &packed = c.slots[c.slot_start.back() + slot];
                    packed.used = most(packed.used, c.tile_rows + row / s.stride_h);
                    offset_of[(ch - first) * taps + t] =
                        s.direct ? direct_offset(s, ch * planes, row - s.pad_h, column - s.pad_w) : slot * c.slot_size + row / s.stride_h * c.pitch + shift;
                }
            }
            c.most_slots = most(c.most_slots, c.slots.size() - c.slot_start.back());
            if (s.dense) {
                c.offset_start.push_back(c.offsets.size());
                c.offsets.insert(c.offsets.end(), offset_of.begin(), offset_of.begin() + (last - first) * taps);
            }
            std::vector<Row> rows;
            for (int64_t f = 0; f < filters; f++) {
                rows.push_back({(int32_t)f, 0});
                for (int64_t j = 0; j < (last - first) * taps; j++) rows[f].count += weight[(f * channels + first) * taps + j] != 0;
            }
            for (size_t k = 0; k + 1 < c.chunk.size() && !s.dense; k++)  // loops of equal length one after the other: their ends are predicted
                std::stable_sort(rows.begin() + c.chunk[k], rows.begin() + c.chunk[k + 1], [](Row a, Row b) { return a.count < b.count; });
            c.row.insert(c.row.end(), rows.begin(), rows.end());
            for (int64_t k = 0; k < filters; k++) {
                const int64_t f = rows[k].filter;
                c.start.push_back(s.dense ? c.values.size() : c.weights.size());
                if (s.dense && f % DENSE_FILTERS) continue;
                const int64_t together = s.dense ? least(DENSE_FILTERS, filters - f) : 1;
                for (int64_t j = 0; j < (last - first) * taps; j++) {
                    const float *value = weight + (f * channels + first) * taps + j;
                    if (s.dense)
                        for (int64_t i = 0; i < DENSE_FILTERS; i++) c.values.push_back(i < together ? value[i * channels * taps] : 0);
                    else if (*value != 0)
                        c.weights.push_back({offset_of[j], *value});
                }
            }
        }
    c.slot_start.push_back(c.slots.size());
    c.offset_start.push_back(c.offsets.size());
    c.start.push_back(s.dense ? c.values.size() : c.weights.size());
    c.nonzero = c.weights.size();
    place_pieces(s, c);
    c.far = c.weights.size() * sizeof(Weight) + s.filters * s.out.plane * sizeof(float) > FAR;
    return conv;
}

extern "C" void conv_free(void *conv) { delete (Conv *)conv; }
extern "C" int64_t conv_nonzero(void *conv) { return ((Conv *)conv)->nonzero; }

// Copy the inputs that a tile needs. The plain loop, for a slot and its packed row r and column x of image m:
//     packed[r * pitch + m * columns + x] = in[m][channel][(y0 + r) * stride_h + row][(x0 + x) * stride_w + column]     (0 outside)
static void pack_slot(const Step &s, const Conv &c, const Slot &slot, const float *in, int64_t images, int64_t y0, int64_t x0, float *packed) {
    const int64_t columns = c.tile_columns + (c.tile_images == 1 ? c.pitch - c.tile_columns : 0);  // with those that shifts reach
    const int64_t first = x0 * s.stride_w + slot.column;
    const int64_t left = least(columns, first >= 0 ? 0 : ceil_div(-first, s.stride_w));               // columns before the image
    const int64_t right = most(left, least(columns, first >= s.width ? 0 : (s.width - 1 - first) / s.stride_w + 1));  // first column behind it
    for (int64_t m = 0; m < images; m++) {
        const float *plane = in + m * s.in.image + slot.channel * s.in.plane;
        for (int64_t r = 0; r < slot.used; r++) {
            const int64_t y = (y0 + r) * s.stride_h + slot.row;
            float *row = packed + r * c.pitch + m * c.tile_columns;
            if (y < 0 || y >= s.height) {
                for (int64_t x = 0; x < columns; x++) row[x] = 0;
                continue;
            }
            const float *from = plane + y * s.in.pitch + first;
            if (s.stride_w == 1 && c.tile_images == 1 && columns % LANES == 0 && left < LANES && right + LANES > columns) {
                for (int64_t x = 0; x < columns; x += LANES) *(vec *)(row + x) = load(from + x);
            } else if (s.stride_w == 1) {
                for (int64_t x = left; x < right; x++) row[x] = from[x];
            } else if (s.stride_w == 2 && columns % LANES == 0) {
                for (int64_t x = 0; x < right; x += LANES) store(row + x, evens(load(from + 2 * x), load(from + 2 * x + LANES)));
            } else if (s.stride_w == 2) {
                for (int64_t x = left; x < right; x++) row[x] = from[2 * x];
            } else {
                for (int64_t x = left; x < right; x++) row[x] = from[s.stride_w * x];
            }
            for (int64_t x = 0; x < left; x++) row[x] = 0;
            for (int64_t x = right; x < columns; x++) row[x] = 0;
        }
    }
}

// The same for all slots of a block where the input has a border, so that all that a tile's pixels need is there. A row is W vectors,
// or, with W = 0, c.pitch floats.
template <int W>
static void pack_wide(const Step &s, const Conv &c, const Slot *slots, int64_t count, const float *in, int64_t y0, int64_t x0, float *packed) {
    const int64_t limit = s.height + s.in.pitch - s.width - y0;
    const int64_t wide = W ? W : c.pitch / LANES, apart = s.in.pitch, size = c.slot_size;
    for (int64_t k = 0; k < count; k++, packed += size) {
        const float *from = in + slots[k].channel * s.in.plane + (y0 + slots[k].row) * apart + x0 + slots[k].column;
        const int64_t rows = least(slots[k].used, limit - slots[k].row);
        float *to = packed;
        for (int64_t r = 0; r < rows; r++, from += apart)
            for (int64_t v = 0; v < wide; v++, to += LANES) *(vec *)to = load(from + v * LANES);
    }
}

// The same for small images, or strips of one, side by side, N floats of each row at a time: the next one overwrites what is too much.
template <int N>
static void pack_narrow(const Step &s, const Conv &c, const Slot *slots, int64_t count, const float *in, int64_t side, int64_t y0, float *packed) {
    const int64_t limit = s.height + s.in.pitch - s.width - y0;
    const int64_t lower = c.strips > 1 ? c.strip_rows : 0, apart = c.strips > 1 ? lower * s.in.pitch : s.in.image;
    const int64_t floats = N ? N : c.tile_columns;
    for (int64_t k = 0; k < count; k++, packed += c.slot_size) {
        const float *from = in + slots[k].channel * s.in.plane + (y0 + slots[k].row) * s.in.pitch + slots[k].column;
        for (int64_t m = 0; m < side; m++, from += apart) {
            const int64_t rows = least(slots[k].used, limit - slots[k].row - m * lower);
            float *to = packed + m * c.tile_columns;
            for (int64_t r = 0; r < rows; r++) std::memcpy(to + r * LANES, from + r * s.in.pitch, floats * sizeof(float));
        }
    }
}

static void pack_bordered(const Step &s, const Conv &c, const Slot *slots, int64_t count, const float *in, int64_t side, int64_t y0, int64_t x0,
                          float *packed) {
    if (c.tile_images * c.strips == 1) {
        const auto pack = c.pitch == LANES ? pack_wide<1> : c.pitch == 2 * LANES ? pack_wide<2> : c.pitch == 4 * LANES ? pack_wide<4> : pack_wide<0>;
        pack(s, c, slots, count, in, y0, x0, packed);
        return;
    }
    const int64_t last = LANES - (c.tile_images * c.strips - 1) * c.tile_columns;  // floats that the last one may write
    const auto pack = c.tile_columns > 4 && last >= 8 ? pack_narrow<8> : c.tile_columns <= 4 && last >= 4 ? pack_narrow<4> : pack_narrow<0>;
    pack(s, c, slots, count, in, side, y0, packed);
}

// Packing for a matrix of tokens x channels, a token every `image` floats: packed[x] = in[x0 + x][channel].
static void pack_tokens(const Step &s, const Conv &c, const Slot *slots, int64_t count, const float *in, int64_t x0, float *packed) {
    const int64_t columns = least(c.tile_columns, s.out_width - x0);
    for (int64_t x = 0; x < columns; x++) {
        const float *token = in + (x0 + x) * s.in.image;
        for (int64_t k = 0; k < count; k++) packed[k * c.slot_size + x] = token[slots[k].channel];
    }
}

struct Scratch {  // of one thread
    float *memory = nullptr;
    int64_t size = 0;
    float *floats(int64_t n) {
        if (n > size) {
            std::free(memory);
            size = round_up(n, 1024);
            memory = (float *)std::aligned_alloc(64, size * sizeof(float));
            if (!memory) throw std::bad_alloc();
            std::memset(memory, 0, size * sizeof(float));
        }
        return memory;
    }
    ~Scratch() { std::free(memory); }
};

static int64_t conv_tasks(const Step &step) {
    const Conv &c = *(const Conv *)step.prepared;
    const Step &s = c.view;
    return ceil_div(s.images, c.tile_images) * s.groups * ceil_div(c.strip_rows, c.tile_rows) * ceil_div(s.out_width, c.tile_columns) *
           (c.chunk.size() - 1);
}

static void conv_task(const Step &step, float **buffers, int64_t task, Scratch &scratch) {
    const Conv &c = *(const Conv *)step.prepared;
    const Step &s = c.view;
    const int64_t chunks = c.chunk.size() - 1;
    const int64_t wide = ceil_div(s.out_width, c.tile_columns), high = ceil_div(c.strip_rows, c.tile_rows);
    const int64_t chunk = task % chunks, x0 = task / chunks % wide * c.tile_columns, y0 = task / chunks / wide % high * c.tile_rows;
    const int64_t group = task / chunks / wide / high % s.groups, n0 = task / chunks / wide / high / s.groups * c.tile_images;
    const int64_t images = least(c.tile_images, s.images - n0);
    const int64_t channels = s.channels / s.groups, filters = s.filters / s.groups;
    const int64_t from = c.chunk[chunk], to = c.chunk[chunk + 1];
    const int64_t columns = least(c.tile_columns, s.out_width - x0), rows = least(c.tile_rows, s.out_height - y0);
    const int64_t tile = c.vectors * LANES, many = c.blocks > 1 ? round_up(to - from, DENSE_FILTERS) : DENSE_FILTERS;
    const float *in = buffers[s.in.buffer] + s.in.offset + n0 * s.in.image + (s.mode ? 0 : group * channels * most(1, s.phases) * s.in.plane);
    float *out = buffers[s.out.buffer] + s.out.offset + n0 * s.out.image;
    const float *other = s.other.buffer < 0 ? nullptr : buffers[s.other.buffer] + s.other.offset + n0 * s.other.image;
    const int64_t vectors = c.flat ? ceil_div(columns, LANES) : c.vectors;  // the last tile of a flat one is shorter
    float *sums = scratch.floats(many * tile + c.most_slots * c.slot_size + tile + 2 * SLACK);
    float *packed = sums + many * tile;
    for (int64_t b = 0; b < c.blocks; b++) {
        const int64_t index = group * c.blocks + b;
        const Slot *slots = c.slots.data() + c.slot_start[index];
        const int64_t count = c.slot_start[index + 1] - c.slot_start[index];
        const float *inputs = packed;
        if (s.direct) {
            inputs = in + x0;
        } else if (s.mode) {
            pack_tokens(s, c, slots, count, in, x0, packed);
        } else if (c.bordered) {
            pack_bordered(s, c, slots, count, in, c.strips > 1 ? c.strips : images, y0, x0, packed);
        } else {
            for (int64_t k = 0; k < count; k++) pack_slot(s, c, slots[k], in, images, y0, x0, packed + k * c.slot_size);
        }
        if (c.quick) {
            const bool clean = c.blocks == 1;
            const Run run = {c.row.data() + index * filters + from,
                             to - from,
                             c.weights.data() + c.start[index * filters + from],
                             inputs,
                             clean ? nullptr : sums - from * vectors * LANES,
                             b == 0,
                             b == c.blocks - 1,
                             c.far,
                             s.bias ? s.bias + group * filters : nullptr,
                             other ? other + group * filters * s.other.plane : nullptr,
                             out + group * filters * s.out.plane,
                             s.out.plane,
                             s.other.plane,
                             c.strips > 1 ? c.strips : images,
                             c.strips > 1 ? 0 : s.out.image,
                             c.strips > 1 ? 0 : s.other.image,
                             c.pieces.data() + (y0 / c.tile_rows * wide + x0 / c.tile_columns) * c.tile_images * c.strips * c.vectors,
                             (float)s.low,
                             (float)s.high};
            RUN_FILTERS[vectors](run);
            continue;
        }
        for (int64_t k = from; k < to; k++) {
            const int64_t f = c.row[index * filters + k].filter;
            float *sum = sums + (f - from) % many * tile;
            if (b == 0) {
                const vec bias = all(s.bias ? s.bias[group * filters + f] : 0);
                for (int64_t v = 0; v < c.vectors; v++) *(vec *)(sum + v * LANES) = bias;
            }
            if (!s.dense) {
                const int64_t weights = c.row[index * filters + k].count;
                if (weights) ACCUMULATE[vectors](sum, inputs, c.weights.data() + c.start[index * filters + k], weights);
            } else if ((f - from) % DENSE_FILTERS == DENSE_FILTERS - 1 || f == to - 1) {
                const int64_t four = f - (f - from) % DENSE_FILTERS;
                const int64_t offset = c.offset_start[index];
                for (int64_t d = four; d <= f && c.far && c.flat; d++)  // needed when the sums are ready
                    for (int64_t x = 0; x < columns; x += LANES) __builtin_prefetch(out + (group * filters + d) * s.out.plane + x0 + x, 1);
                ACCUMULATE_DENSE[vectors](sums + (four - from) % many * tile, tile, inputs, c.offsets.data() + offset,
                                            c.values.data() + c.start[index * filters + four], c.offset_start[index + 1] - offset);
            }
            if (b < c.blocks - 1 || (s.dense && (f - from) % DENSE_FILTERS != DENSE_FILTERS - 1 && f != to - 1)) continue;
            const int64_t done = s.dense ? f - (f - from) % DENSE_FILTERS : f;  // the filters that are complete now
            for (int64_t d = done; d <= f; d++) {
                const float *result = sums + (d - from) % many * tile;
                if (s.mode) {
                    for (int64_t x = 0; x < columns; x++) {
                        const float residual = other ? other[(x0 + x) * s.other.image + d] : 0;
                        out[(x0 + x) * s.out.image + d] = activate_one(result[x] + residual, s.activation, s.low, s.high);
                    }
                    continue;
                }
                for (int64_t m = 0; m < images; m++) {
                    float *target = out + m * s.out.image + (group * filters + d) * s.out.plane + y0 * s.out.pitch + x0;
                    const float *residual = other ? other + m * s.other.image + (group * filters + d) * s.other.plane + y0 * s.other.pitch + x0 : nullptr;
                    const float *source = result + m * c.tile_columns;
                    if (c.flat && s.mask) {
                        finish_masked(target, source, residual, columns, s.mask + x0, s);
                    } else if (c.flat || (c.pitch == s.out_width && s.out.pitch == c.pitch && (!residual || s.other.pitch == c.pitch))) {
                        finish(target, source, residual, rows * columns, s, false);
                    } else {
                        for (int64_t r = 0; r < rows; r++)  // a row may spill into the next one of the same tile, which is written after it
                            finish(target + r * s.out.pitch, source + r * c.pitch, residual ? residual + r * s.other.pitch : nullptr, columns, s,
                                   !s.mask && r + 1 < rows && columns == s.out_width && columns >= LANES);
                    }
                }
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------------------------ linear layers

// out[f] = bias[f] + sum over the weights != 0 of row f of value * in[column], for a few tokens. LANES rows with about equally many weights
// stand side by side (rows sorted by their numbers of weights), short ones filled up with zeros at column 0.
struct Linear {
    std::vector<int32_t> row;      // [slice * LANES + lane], -1: none
    std::vector<int64_t> start;    // of a slice
    std::vector<int32_t> column;   // [start + j][lane]
    std::vector<float> value;
};

extern "C" void *linear_prepare(const Step *step) {
    const Step &s = *step;
    Linear *linear = new Linear;
    std::vector<std::vector<int32_t>> columns(s.filters);
    for (int64_t f = 0; f < s.filters; f++)
        for (int64_t c = 0; c < s.channels; c++)
            if (s.weight[f * s.channels + c] != 0) columns[f].push_back(c);
    std::vector<std::vector<int32_t>> by_count(s.channels + 1);
    for (int64_t f = 0; f < s.filters; f++) by_count[columns[f].size()].push_back(f);
    for (auto &rows : by_count) linear->row.insert(linear->row.end(), rows.begin(), rows.end());
    linear->row.resize(round_up(s.filters, LANES), -1);
    for (size_t slice = 0; slice * LANES < linear->row.size(); slice++) {
        linear->start.push_back(linear->value.size());
        size_t longest = 0;
        for (int l = 0; l < LANES; l++) {
            const int32_t f = linear->row[slice * LANES + l];
            if (f >= 0) longest = most(longest, columns[f].size());
        }
        for (size_t j = 0; j < longest; j++)
            for (int l = 0; l < LANES; l++) {
                const int32_t f = linear->row[slice * LANES + l];
                const bool there = f >= 0 && j < columns[f].size();
                linear->column.push_back(there ? columns[f][j] : 0);
                linear->value.push_back(there ? s.weight[f * s.channels + columns[f][j]] : 0);
            }
    }
    linear->start.push_back(linear->value.size());
    return linear;
}

extern "C" void linear_free(void *linear) { delete (Linear *)linear; }

static int64_t linear_tasks(const Step &s) { return s.images * ceil_div(s.filters, LANES); }

static void linear_task(const Step &s, float **buffers, int64_t task) {
    const Linear &linear = *(const Linear *)s.prepared;
    const int64_t slices = ceil_div(s.filters, LANES), slice = task % slices, image = task / slices;
    const float *in = buffers[s.in.buffer] + s.in.offset + image * s.in.image;
    const float *other = s.other.buffer < 0 ? nullptr : buffers[s.other.buffer] + s.other.offset + image * s.other.image;
    float *out = buffers[s.out.buffer] + s.out.offset + image * s.out.image;
    float sum[LANES] = {};
    if (s.dense) {  // the plain product, a row at a time
        for (int64_t f = slice * LANES; f < least(s.filters, (slice + 1) * LANES); f++) {
            const float *weight = s.weight + f * s.channels;
            vec parts[4] = {};
            int64_t c = 0;
            for (; c + 4 * LANES <= s.channels; c += 4 * LANES)
                for (int p = 0; p < 4; p++) parts[p] += load(weight + c + p * LANES) * load(in + c + p * LANES);
            vec total = (parts[0] + parts[1]) + (parts[2] + parts[3]);
            float value = s.bias ? s.bias[f] : 0;
            for (int l = 0; l < LANES; l++) value += total[l];
            for (; c < s.channels; c++) value += weight[c] * in[c];
            out[f] = activate_one(value + (other ? other[f] : 0), s.activation, s.low, s.high);
        }
        return;
    }
    for (int64_t j = linear.start[slice]; j < linear.start[slice + 1]; j += LANES) {
        const int32_t *column = linear.column.data() + j;
        const float *value = linear.value.data() + j;
        for (int l = 0; l < LANES; l++) sum[l] += value[l] * in[column[l]];
    }
    for (int l = 0; l < LANES; l++) {
        const int32_t f = linear.row[slice * LANES + l];
        if (f < 0) continue;
        out[f] = activate_one(sum[l] + (s.bias ? s.bias[f] : 0) + (other ? other[f] : 0), s.activation, s.low, s.high);
    }
}

// ------------------------------------------------------------------------------------------------------- the other steps, a plane a task

// Maximum or sum over the kernel's positions inside the image; the sum is divided by `mode`: 0 their number, else that number.
static void pool_plane(const Step &s, const float *in, float *out, Scratch &scratch) {
    const bool maximum = s.kind == MAX_POOL;
    float *line = scratch.floats(s.width + 2 * SLACK) + SLACK;  // the kernel's rows already joined
    for (int64_t y = 0; y < s.out_height; y++) {
        bool first = true;
        int64_t rows = 0;
        for (int64_t i = 0; i < s.kernel_h; i++) {
            const int64_t row = y * s.stride_h + i * s.dilation_h - s.pad_h;
            if (row < 0 || row >= s.height) continue;
            const float *from = in + row * s.in.pitch;
            if (first)
                for (int64_t x = 0; x < s.width; x++) line[x] = from[x];
            else if (maximum)
                for (int64_t x = 0; x < s.width; x++) line[x] = from[x] > line[x] ? from[x] : line[x];
            else
                for (int64_t x = 0; x < s.width; x++) line[x] += from[x];
            first = false;
            rows++;
        }
        int64_t x = 0;
        if (maximum && s.stride_w == 2 && s.dilation_w == 1 && s.activation == CLAMP) {
            for (int64_t l = 1; l <= s.pad_w; l++) line[-l] = -INFINITY;
            for (; x + LANES <= s.out_width && (x + LANES - 1) * 2 - s.pad_w + s.kernel_w <= s.width; x += LANES) {
                vec value = all(-INFINITY);
                for (int64_t j = 0; j < s.kernel_w; j++) {
                    const float *from = line + 2 * x - s.pad_w + j;
                    const vec next = evens(load(from), load(from + LANES));
                    value = next > value ? next : value;
                }
                store(out + y * s.out.pitch + x, clamp(value, s.low, s.high));
            }
        }
        for (; x < s.out_width; x++) {
            const int64_t left = x * s.stride_w - s.pad_w;
            float value = 0;
            int64_t columns = 0;
            for (int64_t j = 0; j < s.kernel_w; j++) {
                const int64_t column = left + j * s.dilation_w;
                if (column < 0 || column >= s.width) continue;
                value = !columns ? line[column] : maximum ? (line[column] > value ? line[column] : value) : value + line[column];
                columns++;
            }
            const float result = maximum ? value : value / (s.mode ? s.mode : rows * columns);
            out[y * s.out.pitch + x] = activate_one(result, s.activation, s.low, s.high);
        }
    }
}

static void plane_task(const Step &s, float **buffers, int64_t task, Scratch &scratch) {
    const int64_t image = task / s.channels, channel = task % s.channels;
    const float *in = buffers[s.in.buffer] + s.in.offset + image * s.in.image + channel * s.in.plane;
    float *out = buffers[s.out.buffer] + s.out.offset + image * s.out.image + channel * most(1, s.phases) * s.out.plane;
    const float *other = s.other.buffer < 0 ? nullptr : buffers[s.other.buffer] + s.other.offset + image * s.other.image + channel * s.other.plane;
    if (s.kind == MAX_POOL || s.kind == AVERAGE_POOL) {
        pool_plane(s, in, out, scratch);
    } else if (s.kind == MEAN) {
        vec sum = {};
        float total = 0;
        const int64_t size = s.height * s.in.pitch;  // a border adds zeros
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES) sum += load(in + i);
        for (; i < size; i++) total += in[i];
        for (int l = 0; l < LANES; l++) total += sum[l];
        *out = activate_one(total / (s.height * s.width), s.activation, s.low, s.high);
    } else if (s.kind == POINTWISE) {  // out = activation(in * scale + bias, then + or * other)
        const float scale = s.weight ? s.weight[channel] : 1, bias = s.bias ? s.bias[channel] : 0;
        for (int64_t y = 0; y < s.height; y++)
            for (int64_t x = 0; x < s.width; x += LANES) {
                vec v = load(in + y * s.in.pitch + x) * all(scale) + all(bias);
                const float *second = other + y * s.other.pitch + x;
                if (other && s.mode == 2) v *= all(*other);
                if (other && s.mode == 1) v *= load(second);
                if (other && s.mode == 0) v += load(second);
                float part[LANES];
                store(part, v);
                finish(out + y * s.out.pitch + x, part, nullptr, least(LANES, s.width - x), s, false);
            }
    } else if (s.kind == PAD) {
        for (int64_t y = 0; y < s.out_height; y++)
            for (int64_t x = 0; x < s.out_width; x++) {
                const int32_t row = s.rows[y], column = s.columns[x];
                out[y * s.out.pitch + x] = row < 0 || column < 0 ? (float)s.low : in[row * s.in.pitch + column];
            }
    } else if (s.kind == PHASES && s.phases == 4 && s.stride_w == 2 && s.width == 2 * s.out_width && s.height == 2 * s.out_height) {
        for (int64_t y = 0; y < s.height; y++) {  // an even row has the first two phases, an odd row the others
            const float *from = in + y * s.in.pitch;
            float *row = out + y % 2 * 2 * s.out.plane + y / 2 * s.out.pitch;
            for (int64_t x = 0; x < s.out_width; x += LANES) {
                const uint32_t bits = x + LANES <= s.out_width ? (1u << LANES) - 1 : (1u << (s.out_width - x)) - 1;
                store_some(row + x, evens(load(from + 2 * x), load(from + 2 * x + LANES)), bits);
                store_some(row + s.out.plane + x, evens(load(from + 2 * x + 1), load(from + 2 * x + 1 + LANES)), bits);
            }
        }
    } else if (s.kind == PHASES) {
        for (int64_t p = 0; p < s.phases; p++) {
            const int64_t a = p / s.stride_w, b = p % s.stride_w;
            const int64_t rows = least(s.out_height, ceil_div(s.height - a, s.stride_h));
            const int64_t columns = least(s.out_width, ceil_div(s.width - b, s.stride_w));
            for (int64_t y = 0; y < s.out_height; y++) {
                const float *from = in + (y * s.stride_h + a) * s.in.pitch + b;
                float *row = out + p * s.out.plane + y * s.out.pitch;
                if (y >= rows) {
                    for (int64_t x = 0; x < s.out_width; x++) row[x] = 0;
                    continue;
                }
                const bool inside = y * s.out.pitch + round_up(s.out_width, LANES) <= s.out.plane;  // or it would spill into another task's plane
                if (s.stride_w == 2 && s.mask && inside)  // spills into the next row, which is written after it, and zeros into the border
                    for (int64_t x = 0; x < s.out_width; x += LANES) {
                        const vec even = evens(load(from + 2 * x), load(from + 2 * x + LANES));
                        store(row + x, (vec)((ints)even & *(const loose_ints *)(s.mask + y * s.out.pitch + x)));
                    }
                else
                    for (int64_t x = 0; x < columns; x++) row[x] = from[s.stride_w * x];
                for (int64_t x = columns; x < s.out_width; x++) row[x] = 0;
            }
        }
    } else if (s.kind == COPY) {  // reads nothing beyond its rows: the input of a network
        for (int64_t y = 0; y < s.height; y++) std::memcpy(out + y * s.out.pitch, in + y * s.in.pitch, s.width * sizeof(float));
    } else {  // SPREAD: the inputs stride apart, zeros between them: a transposed convolution is a plain one over this
        for (int64_t y = 0; y < s.out_height; y++)
            for (int64_t x = 0; x < s.out_width; x++) out[y * s.out.pitch + x] = 0;
        for (int64_t y = 0; y < s.height; y++)
            for (int64_t x = 0; x < s.width; x++) {
                const int64_t row = y * s.stride_h + s.pad_h, column = x * s.stride_w + s.pad_w;
                const bool inside = row >= 0 && row < s.out_height && column >= 0 && column < s.out_width;
                if (inside) out[row * s.out.pitch + column] = in[y * s.in.pitch + x];
            }
    }
}

// --------------------------------------------------------------------------------------------------------------------- running

static int64_t tasks_of(const Step &s) {
    if (s.kind == CONV) return conv_tasks(s);
    if (s.kind == LINEAR) return linear_tasks(s);
    return s.images * s.channels;
}

static void do_task(const Step &s, float **buffers, int64_t task, Scratch &scratch) {
    if (s.kind == CONV)
        conv_task(s, buffers, task, scratch);
    else if (s.kind == LINEAR)
        linear_task(s, buffers, task);
    else
        plane_task(s, buffers, task, scratch);
}

static inline void rest() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

template <class Condition>
static void spin(Condition done) {
    for (int i = 0; !done(); i++) {
        if (i < 2000)
            rest();
        else
            std::this_thread::yield();
    }
}

struct alignas(128) Counter {  // in a cache line of its own, or threads would wait for each other's lines
    std::atomic<int64_t> value{0};
};

struct Job {
    const Step *steps;
    int64_t count;
    float **buffers;
    int64_t *nanoseconds;             // of each step, or null
    int64_t threads;
    std::vector<Counter> next;     // of each step and thread, how many tasks of its share are taken; empty for one thread
    std::vector<Counter> arrived;  // of each step, threads that have finished it
    Job(const Step *s, int64_t n, float **b, int64_t *ns, int64_t t)
        : steps(s), count(n), buffers(b), nanoseconds(ns), threads(t), next(t > 1 ? n * t : 0), arrived(t > 1 ? n : 0) {}
};

// A thread's part of step i: its own share first, the same images and rows in each step, so that they are in its cache; then what
// other threads have not begun.
static void share_tasks(Job &job, int64_t i, int64_t tasks, int64_t thread, Scratch &scratch) {
    const int64_t share = ceil_div(tasks, job.threads), some = most(1, share / 8);
    for (int64_t turn = 0; turn < job.threads; turn++) {
        const int64_t owner = (thread + turn) % job.threads, end = least(tasks, (owner + 1) * share);
        for (;;) {
            const int64_t first = owner * share + job.next[i * job.threads + owner].value.fetch_add(some);
            if (first >= end) break;
            for (int64_t task = first; task < least(end, first + some); task++) do_task(job.steps[i], job.buffers, task, scratch);
        }
    }
}

static void work(Job &job, int64_t thread, Scratch &scratch) {
    for (int64_t i = 0; i < job.count; i++) {
        const Step &s = job.steps[i];
        const int64_t tasks = tasks_of(s);
        std::chrono::steady_clock::time_point began;
        if (job.nanoseconds) began = std::chrono::steady_clock::now();
        if (job.threads == 1) {
            for (int64_t task = 0; task < tasks; task++) do_task(s, job.buffers, task, scratch);
        } else {
            share_tasks(job, i, tasks, thread, scratch);
            job.arrived[i].value.fetch_add(1);
            spin([&] { return job.arrived[i].value.load() == job.threads; });
        }
        if (job.nanoseconds && thread == 0)
            job.nanoseconds[i] = std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - began).count();
    }
}

// Threads that sleep between runs. A fork loses them, so the child builds its own team.
struct Team {
    std::mutex lock;
    std::condition_variable wake;
    Job *job = nullptr;
    int64_t round = 0, wanted = 0;
    std::atomic<int64_t> announced{0};  // round, for those that still spin
    std::atomic<int64_t> finished{0};
    std::vector<std::thread> threads;
    pid_t process = getpid();

    void member(int64_t number) {
        Scratch scratch;
        int64_t seen = 0;
        for (;;) {
            Job *mine;
            for (int i = 0; i < PATIENCE && announced.load() == seen; i++) rest();  // the next call often comes at once
            {
                std::unique_lock<std::mutex> held(lock);
                wake.wait(held, [&] { return round != seen && (seen = round, number < wanted); });
                mine = job;
            }
            work(*mine, number, scratch);
            finished.fetch_add(1);
        }
    }

    void run(Job &with, Scratch &scratch) {
        while ((int64_t)threads.size() < with.threads - 1) {
            threads.emplace_back([this, number = (int64_t)threads.size() + 1] { member(number); });
            threads.back().detach();
        }
        finished = 0;
        {
            std::lock_guard<std::mutex> held(lock);
            job = &with;
            wanted = with.threads;
            round++;
        }
        announced = round;
        wake.notify_all();
        work(with, 0, scratch);
        spin([&] { return finished.load() == with.threads - 1; });
    }
};

static std::mutex running;
static Team *team = nullptr;
static Scratch *own = nullptr;

extern "C" int64_t all_finite(const float *values, int64_t count);

// Do `count` steps. Returns 0, 1 when memory is missing, or 2, and does nothing, when one of the `checked` numbers at `input` is not finite.
extern "C" int64_t engine_run(const Step *steps, int64_t count, float **buffers, int64_t threads, int64_t *nanoseconds, const float *input,
                              int64_t checked) {
    std::lock_guard<std::mutex> held(running);
    if (checked && !all_finite(input, checked)) return 2;
    try {
        if (!own) own = new Scratch;
        Job job(steps, count, buffers, nanoseconds, threads);
        if (threads == 1) {
            work(job, 0, *own);
        } else {
            if (!team || team->process != getpid()) team = new Team;
            team->run(job, *own);
        }
    } catch (const std::bad_alloc &) {
        return 1;
    }
    return 0;
}

// Whether all numbers are finite, in one pass: infinity and NaN have all bits of the exponent set.
extern "C" int64_t all_finite(const float *values, int64_t count) {
    const int32_t exponent = 0x7f800000;
    ints found = {};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const ints bits = *(const loose_ints *)(values + i);
        found |= (bits & exponent) == exponent;
    }
    int32_t any = 0;
    for (int l = 0; l < LANES; l++) any |= found[l];
    for (; i < count; i++) {
        int32_t bits;
        std::memcpy(&bits, values + i, sizeof bits);
        any |= (bits & exponent) == exponent;
    }
    return !any;
}

extern "C" int64_t lanes() { return LANES; }
extern "C" int64_t step_size() { return sizeof(Step); }

// Nanoseconds that this thread needs for `rounds` x 64 multiply-adds of vectors that stay in registers: the machine's peak.
extern "C" int64_t peak(int64_t rounds, float *result) {
    vec sum[8];
    for (int k = 0; k < 8; k++) sum[k] = all(k);
    const vec factor = all(result[0]), term = all(result[1]);
    const auto began = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < rounds; i++)
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++)
#pragma GCC unroll 8
            for (int k = 0; k < 8; k++) sum[k] = sum[k] * factor + term;
    const auto ended = std::chrono::steady_clock::now();
    for (int k = 1; k < 8; k++) sum[0] += sum[k];
    store(result, sum[0]);
    return std::chrono::duration_cast<std::chrono::nanoseconds>(ended - began).count();
}
