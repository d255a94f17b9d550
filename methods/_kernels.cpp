// What Feather and ST-3 compute in each training step, in one pass over the weights instead of five to eight.
//
// All arrays are float32 and lie in memory without gaps. Compilers turn these loops into vector code (-O3 -march=native), and
// share those of large arrays among `threads`, where they know OpenMP (-fopenmp).

#include <cmath>
#include <cstdint>
#include <cstring>

static const int64_t LARGE = 20000;  // weights from which on threads gain more than they cost

// x^(-1/3) for 0 < x <= 1: a first guess from the exponent, wrong by 4 % at most, and three Newton steps, each of which
// squares it, and doubles it: 4 % -> 0.3 % -> 2e-5 -> rounding.
static inline float inverse_cube_root(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits = 0x54a2fa8c - bits / 3;
    float z;
    std::memcpy(&z, &bits, sizeof z);
    for (int step = 0; step < 3; step++) z *= 4.0f / 3.0f - 1.0f / 3.0f * x * z * z * z;
    return z;
}

// Feather with p = 3: sign(w) (|w|^3 - T^3)^(1/3) where |w| > T, else 0; that is w (1 - (T / |w|)^3)^(1/3).
// Where the division rounds it still rounds below 1, so that no kept weight becomes zero. NaN stays NaN.
extern "C" void feather_forward(const float *weight, int64_t count, float threshold, float *sparse, int threads) {
    if (threshold == 0) {
        std::memcpy(sparse, weight, count * sizeof *weight);
        return;
    }
#pragma omp parallel for num_threads(threads) if (count >= LARGE)
    for (int64_t i = 0; i < count; i++) {
        const float w = weight[i];
        const float ratio = threshold / std::fabs(w);
        const float x = 1 - ratio * ratio * ratio;
        const float z = inverse_cube_root(x);
        sparse[i] = std::fabs(w) <= threshold ? 0 : w * (x * z * z);
    }
}

// The gradient of the weight: that of the sparse weight, times theta where it is zero.
extern "C" void feather_backward(const float *grad, const float *sparse, int64_t count, float theta, float *result,
                                 int threads) {
#pragma omp parallel for num_threads(threads) if (count >= LARGE)
    for (int64_t i = 0; i < count; i++) result[i] = sparse[i] == 0 ? grad[i] * theta : grad[i];
}

// One filter of ST-3: the kept weights, less T in magnitude if soft, times 1.01 / (0.01 + share) if rescale;
// share = (mean(|w| of the kept) + 1e-6) / (mean|w| + 1e-6).
static void st3_filter(const float *weight, int64_t size, float threshold, int64_t soft, int64_t rescale, float *sparse) {
    float scale = 1;
    if (rescale) {
        float all[16] = {}, kept[16] = {};  // sums side by side, for vectors
        int64_t i = 0;
        for (; i + 16 <= size; i += 16)
            for (int k = 0; k < 16; k++) {
                const float magnitude = std::fabs(weight[i + k]);
                all[k] += magnitude;
                kept[k] += magnitude <= threshold ? 0 : magnitude;
            }
        for (; i < size; i++) {
            const float magnitude = std::fabs(weight[i]);
            all[0] += magnitude;
            kept[0] += magnitude <= threshold ? 0 : magnitude;
        }
        double sum_all = 0, sum_kept = 0;
        for (int k = 0; k < 16; k++) {
            sum_all += all[k];
            sum_kept += kept[k];
        }
        const double share = (sum_kept / size + 1e-6) / (sum_all / size + 1e-6);
        scale = (float)(1 + (1 - share) / (0.01 + share));
    }
    const float less = soft ? threshold : 0;
    for (int64_t i = 0; i < size; i++) {
        const float w = weight[i];
        const float magnitude = std::fabs(w);
        sparse[i] = magnitude <= threshold ? 0 : std::copysign((magnitude - less) * scale, w);
    }
}

extern "C" void st3_forward(const float *weight, int64_t filters, int64_t size, float threshold, int64_t soft, int64_t rescale,
                            float *sparse, int threads) {
#pragma omp parallel for num_threads(threads) if (filters * size >= LARGE)
    for (int64_t f = 0; f < filters; f++) st3_filter(weight + f * size, size, threshold, soft, rescale, sparse + f * size);
}

// How many magnitudes lie below `low`; those from `low` to `high` are appended to `inside` in any order, from place *found on, as
// far as its `room` goes, and counted in *found in any case.
extern "C" int64_t count_between(const float *weight, int64_t count, float low, float high, float *inside, int64_t room,
                                 int64_t *found, int threads) {
    const int64_t block = 256;
    int64_t below = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : below) if (count >= LARGE)
    for (int64_t start = 0; start < count; start += block) {
        const int64_t end = start + block < count ? start + block : count;
        int32_t less = 0, within = 0;
        for (int64_t i = start; i < end; i++) {
            const float magnitude = std::fabs(weight[i]);
            less += magnitude < low;
            within += magnitude >= low && magnitude <= high;
        }
        below += less;
        if (within == 0) continue;  // nearly always: brackets are narrow
#pragma omp critical
        {
            if (*found + within <= room) {
                float *next = inside + *found;
                for (int64_t i = start; i < end; i++) {
                    const float magnitude = std::fabs(weight[i]);
                    if (magnitude >= low && magnitude <= high) *next++ = magnitude;
                }
            }
            *found += within;
        }
    }
    return below;
}
