// Weighted sums of blocks of float32: what all integrator steps are made of.
#pragma once

#include "../steps.h"
#include "staging.h"

namespace DSNO_ISA {

constexpr int64_t kStepBlock = 512;   // elements that are converted at a time; a dozen fit in L1
constexpr int64_t kStepChunk = 8192;  // elements of one task
constexpr int64_t kStepStreamBytes = 4 << 20;  // outputs from this size on are written past caches
constexpr int64_t kCacheLine = 64;             // bytes
constexpr int64_t kStepAhead = 128;  // elements that are prefetched where outputs are streamed

DSNO_INLINE char* step_element(const Dense& x, int64_t i) {
    return x.data + i * element_size(x.dtype);
}

DSNO_INLINE float row_value(const Coefficients& rows, int64_t sample, int64_t column) {
    const int64_t row = rows.index ? rows.index[sample * rows.stride_index] : sample;
    const int64_t i = row * rows.stride_row + column * rows.stride_column;
    if (rows.dtype == kFloat64) {
        return static_cast<float>(reinterpret_cast<const double*>(rows.data)[i]);
    }
    return reinterpret_cast<const float*>(rows.data)[i];
}

template <int dtype>
static void widen_block(const char* from, int64_t count, float* to) {
    const auto* values = reinterpret_cast<const uint16_t*>(from);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        store(to + i, dtype == kFloat16 ? load_half(values + i) : load_bf16(values + i));
    }
    if (i < count) {
        const Vec rest = load_some(reinterpret_cast<const char*>(values + i), dtype,
                                   static_cast<int>(count - i));
        store_some(reinterpret_cast<char*>(to + i), kFloat32, rest, static_cast<int>(count - i));
    }
}

// `count` values from element `start` on as float32: in place, or converted into `buffer`.
static inline const float* read_block(const Dense& x, int64_t start, int64_t count, float* buffer) {
    const char* from = step_element(x, start);
    if (x.dtype == kFloat32) return reinterpret_cast<const float*>(from);
    if (x.dtype == kFloat16) {
        widen_block<kFloat16>(from, count, buffer);
    } else {
        widen_block<kBFloat16>(from, count, buffer);
    }
    return buffer;
}

// Has memory send what `read_block` will read.
DSNO_INLINE void prefetch_block(const Dense& x, int64_t start, int64_t count) {
    const char* line = step_element(x, start);
    const char* end = step_element(x, start + count);
    for (; line < end; line += kCacheLine) __builtin_prefetch(line);
}

template <int dtype>
static void narrow_block(const float* from, int64_t count, char* to) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        store_vec(to + i * element_size(dtype), dtype, load(from + i));
    }
    if (i < count) {
        const int rest = static_cast<int>(count - i);
        const Vec x = load_some(reinterpret_cast<const char*>(from + i), kFloat32, rest);
        store_some(to + i * element_size(dtype), dtype, x, rest);
    }
}

template <int N>
DSNO_INLINE Vec sum_vec(const Vec (&c)[N < 1 ? 1 : N], const Vec (&x)[N < 1 ? 1 : N]) {
    Vec sum = N ? c[0] * x[0] : zero();
#pragma GCC unroll 12
    for (int j = 1; j < N; ++j) sum = fma(c[j], x[j], sum);
    return sum;
}

// out = sum over j of c[j] x[j]; out may be one of the x. The same operations on each element,
// wherever it stands.
template <int N>
static void sum_block(const float* const* terms, const float* coefficients, int64_t count,
                      float* out, bool streams) {
    const float* p[N < 1 ? 1 : N];
    Vec c[N < 1 ? 1 : N], x[N < 1 ? 1 : N];
    for (int j = 0; j < N; ++j) {
        p[j] = terms[j];
        c[j] = set1(coefficients[j]);
    }
    int64_t i = 0;
    if (streams) {
        for (; i + kLanes <= count; i += kLanes) {
            const int64_t ahead = min64(i + kStepAhead, count - 1);
#pragma GCC unroll 12
            for (int j = 0; j < N; ++j) {
                __builtin_prefetch(p[j] + ahead);
                x[j] = load(p[j] + i);
            }
            stream(out + i, sum_vec<N>(c, x));
        }
    } else {
        for (; i + kLanes <= count; i += kLanes) {
#pragma GCC unroll 12
            for (int j = 0; j < N; ++j) x[j] = load(p[j] + i);
            store(out + i, sum_vec<N>(c, x));
        }
    }
    if (i < count) {
        const int rest = static_cast<int>(count - i);
        for (int j = 0; j < N; ++j) {
            x[j] = load_some(reinterpret_cast<const char*>(p[j] + i), kFloat32, rest);
        }
        store_some(reinterpret_cast<char*>(out + i), kFloat32, sum_vec<N>(c, x), rest);
    }
}

// `streams` as in `can_stream`: past the caches.
static inline void write_block(const Dense& x, int64_t start, int64_t count, const float* from,
                               bool streams = false) {
    char* to = step_element(x, start);
    if (x.dtype == kFloat16) return narrow_block<kFloat16>(from, count, to);
    if (x.dtype == kBFloat16) return narrow_block<kBFloat16>(from, count, to);
    if (!streams) return narrow_block<kFloat32>(from, count, to);
    const float one = 1.0f;
    sum_block<1>(&from, &one, count, reinterpret_cast<float*>(to), true);
}

// `sum_block` of terms and a result of one 16-bit dtype: they are converted in registers.
template <int N, int dtype>
static void sum_narrow(const char* const* terms, const float* coefficients, int64_t count,
                       char* out) {
    constexpr int kBytes = 2;
    const char* p[N < 1 ? 1 : N];
    Vec c[N < 1 ? 1 : N], x[N < 1 ? 1 : N];
    for (int j = 0; j < N; ++j) {
        p[j] = terms[j];
        c[j] = set1(coefficients[j]);
    }
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
#pragma GCC unroll 12
        for (int j = 0; j < N; ++j) x[j] = load_vec(p[j] + kBytes * i, dtype);
        store_vec(out + kBytes * i, dtype, sum_vec<N>(c, x));
    }
    if (i < count) {
        const int rest = static_cast<int>(count - i);
        for (int j = 0; j < N; ++j) x[j] = load_some(p[j] + kBytes * i, dtype, rest);
        store_some(out + kBytes * i, dtype, sum_vec<N>(c, x), rest);
    }
}

using SumNarrow = void (*)(const char* const*, const float*, int64_t, char*);
template <int dtype>
constexpr SumNarrow kSumNarrow[kMaxTerms + 1] = {
    sum_narrow<0, dtype>, sum_narrow<1, dtype>, sum_narrow<2, dtype>, sum_narrow<3, dtype>,
    sum_narrow<4, dtype>, sum_narrow<5, dtype>, sum_narrow<6, dtype>, sum_narrow<7, dtype>,
    sum_narrow<8, dtype>, sum_narrow<9, dtype>, sum_narrow<10, dtype>};

using SumBlock = void (*)(const float* const*, const float*, int64_t, float*, bool);
constexpr SumBlock kSumBlock[kMaxTerms + 1] = {
    sum_block<0>, sum_block<1>, sum_block<2>, sum_block<3>, sum_block<4>, sum_block<5>,
    sum_block<6>, sum_block<7>, sum_block<8>, sum_block<9>, sum_block<10>};

// The terms of a sum whose coefficients are not 0.
struct Terms {
    int count = 0;
    float coefficient[kMaxTerms];
    int id[kMaxTerms];  // of the caller

    void add(float c, int which) {
        if (c == 0.0f) return;
        coefficient[count] = c;
        id[count++] = which;
    }

    // values[id]: the block of each term.
    void sum(const float* const* values, int64_t n, float* out, bool streams = false) const {
        const float* p[kMaxTerms];
        for (int j = 0; j < count; ++j) p[j] = values[id[j]];
        kSumBlock[count](p, coefficient, n, out, streams);
    }
};

// Tasks cut the samples into chunks; `streams` writes them past the caches.
struct Chunks {
    int64_t size, per_sample;

    explicit Chunks(int64_t sample_size)
        : size(sample_size), per_sample(ceil_div(sample_size, kStepChunk)) {}

    int64_t sample(int64_t task) const { return task / per_sample; }
    int64_t begin(int64_t task) const { return task % per_sample * kStepChunk; }
    int64_t end(int64_t task) const { return min64(begin(task) + kStepChunk, size); }
};

// Whether every vector of a float32 output starts where vectors may be streamed to.
DSNO_INLINE bool can_stream(const Dense& out, int64_t samples, int64_t size) {
    return out.dtype == kFloat32 && 4 * samples * size >= kStepStreamBytes &&
           reinterpret_cast<uintptr_t>(out.data) % (4 * kLanes) == 0 &&
           (samples == 1 || size % kLanes == 0);
}

}  // namespace DSNO_ISA
