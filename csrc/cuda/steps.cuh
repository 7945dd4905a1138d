// What the kernels of the integrator steps share: tensors of any dtype, rows of coefficients, and
// the walk over samples.
//
// All tensors of a call lie in memory in one order, dense, as [samples][size]: a sample is what one
// row of coefficients serves, so that a call with one row has one sample. A tensor carries its
// dtype into the kernel: a branch that all threads take together, once for each vector of N
// elements, costs less than it saves (a kernel for each combination of dtypes would be thousands).
#pragma once

#include "common.cuh"

namespace dsno {

using u64 = unsigned long long;

constexpr int kMaxTerms = 10;  // x, eight entries of history, noise
constexpr int kMaxOrder = 8;   // entries of history of a solver step, the new one included
constexpr int kMaxColumns = 2 * kMaxOrder + 6;

enum DType : int { kAny = -1, kFloat32, kFloat16, kBFloat16, kFloat64, kInt32, kInt64 };

// Parameters are structs of 64-bit words, which the host packs.
struct Data {
    char* data;  // null: absent
    i64 dtype;
};

// Row b is row index[b * stride_index] of a table of `rows` rows, clamped into it; without an
// index, row b itself; without a table, `values`. Strides in elements; 0 where samples share.
struct Rows {
    Data table;
    i64 rows, stride_row, stride_column;
    Data index;
    i64 stride_index;
    double values[kMaxColumns];
};

// One element of a tensor of any dtype.
__device__ inline double number(const Data& x, i64 i) {
    switch (x.dtype) {
        case kFloat32:
            return reinterpret_cast<const float*>(x.data)[i];
        case kFloat16:
            return widen(reinterpret_cast<const Half*>(x.data)[i]);
        case kBFloat16:
            return widen(reinterpret_cast<const BFloat16*>(x.data)[i]);
        default:
            return reinterpret_cast<const double*>(x.data)[i];
    }
}

__device__ inline i64 integer(const Data& x, i64 i) {
    return x.dtype == kInt32 ? reinterpret_cast<const int*>(x.data)[i]
                             : reinterpret_cast<const i64*>(x.data)[i];
}

__device__ inline double coefficient(const Rows& rows, i64 sample, i64 column) {
    if (!rows.table.data) return rows.values[column];
    i64 row = sample;
    if (rows.index.data) {
        row = integer(rows.index, sample * rows.stride_index);
        row = row < 0 ? 0 : row < rows.rows ? row : rows.rows - 1;
    }
    return number(rows.table, row * rows.stride_row + column * rows.stride_column);
}

// The slot of a ring buffer that is `back` slots behind its head.
__device__ inline i64 ring_slot(const Data& head, i64 back, i64 slots) {
    const i64 slot = (integer(head, 0) - back) % slots;
    return slot < 0 ? slot + slots : slot;
}

// N elements as they lie in memory, in 32-bit words. They are fetched before any is used, so that
// the loads of several tensors are under way together.
template <typename A, int N>
struct Raw {
    unsigned words[sizeof(A) * N / 4];
};

template <int BYTES>
__device__ inline void fetch_bytes(const char* from, unsigned* words) {
#if defined(__CUDA_ARCH__)
    __builtin_assume(__isGlobal(from));  // it may come from shared memory, where that is forgotten
#endif
    if constexpr (BYTES == 2) {
        words[0] = *reinterpret_cast<const unsigned short*>(from);
    } else {
        using Words = Vector<unsigned, BYTES / 4>;
        const Words packed = *reinterpret_cast<const Words*>(from);
#pragma unroll
        for (int j = 0; j < BYTES / 4; ++j) words[j] = packed.v[j];
    }
}

template <int DTYPE, typename A, int N>
__device__ inline void fetch(const char* data, int dtype, i64 i, Raw<A, N>* raw) {
    switch (DTYPE == kAny ? dtype : DTYPE) {
        case kFloat32:
            return fetch_bytes<4 * N>(data + 4 * i, raw->words);
        case kFloat64:
            if constexpr (sizeof(A) == 8) fetch_bytes<8 * N>(data + 8 * i, raw->words);
            return;
        default:
            return fetch_bytes<2 * N>(data + 2 * i, raw->words);
    }
}

template <int DTYPE, typename A, int N>
__device__ inline void convert(const Raw<A, N>& raw, int dtype, A* x) {
    switch (DTYPE == kAny ? dtype : DTYPE) {
        case kFloat32:
#pragma unroll
            for (int j = 0; j < N; ++j) x[j] = __uint_as_float(raw.words[j]);
            return;
        case kFloat64:
            if constexpr (sizeof(A) == 8) {
#pragma unroll
                for (int j = 0; j < N; ++j) {
                    const auto high = static_cast<unsigned long long>(raw.words[2 * j + 1]) << 32;
                    const unsigned long long bits = high | raw.words[2 * j];
                    memcpy(&x[j], &bits, sizeof(bits));
                }
            }
            return;
        default:
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const auto bits = static_cast<unsigned short>(raw.words[j / 2] >> 16 * (j % 2));
                x[j] = dtype == kFloat16 ? widen(Half{bits}) : widen(BFloat16{bits});
            }
    }
}

template <typename T, int N, typename A>
__device__ inline void write_as(char* data, i64 i, const A* x) {
#if defined(__CUDA_ARCH__)
    __builtin_assume(__isGlobal(data));
#endif
    if constexpr (sizeof(T) <= sizeof(A)) {
        Accumulator<T> wide[N];
#pragma unroll
        for (int j = 0; j < N; ++j) wide[j] = static_cast<Accumulator<T>>(x[j]);
        store_global<N>(reinterpret_cast<T*>(data) + i, wide);
    }
}

template <int DTYPE, int N, typename A>
__device__ inline void write(const Data& to, i64 i, const A* x) {
    switch (DTYPE == kAny ? static_cast<int>(to.dtype) : DTYPE) {
        case kFloat32:
            return write_as<float, N>(to.data, i, x);
        case kFloat64:
            return write_as<double, N>(to.data, i, x);
        case kFloat16:
            return write_as<Half, N>(to.data, i, x);
        default:
            return write_as<BFloat16, N>(to.data, i, x);
    }
}

// The elements of one sample as whole vectors of V, [first, last) in vectors, and fewer than 2 V
// elements around them. Vectors count from the start of the tensors, which is aligned.
template <int V>
struct Stretch {
    i64 begin, end, first, last;
    __device__ Stretch(i64 sample, i64 size)
        : begin(sample * size), end(begin + size), first((begin + V - 1) / V), last(end / V) {}
    // The element around the whole vectors that falls to this thread; `end` or more: none.
    __device__ i64 edge() const {
        const i64 lead = first * V < end ? first * V : end;
        const i64 trail = last * V > lead ? last * V : lead;
        const i64 i = begin + threadIdx.x;
        return i < lead ? i : i + trail - lead;
    }
};

// work.run<N>(i) for the N elements from i on, for every element of one of the `parts` of a sample.
template <int V, typename Work>
__device__ inline void for_elements(i64 sample, i64 size, i64 part, i64 parts, const Work& work) {
    const Stretch<V> stretch(sample, size);
    for (i64 v = stretch.first + part * kThreads + threadIdx.x; v < stretch.last;
         v += parts * kThreads) {
        work.template run<V>(v * V);
    }
    if constexpr (V > 1) {
        const i64 i = stretch.edge();
        if (part == 0 && i < stretch.end) work.template run<1>(i);
    }
}

constexpr int kWarps = kThreads / 32;

template <typename A>
__device__ inline A warp_sum(A x) {
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
    return x;
}

}  // namespace dsno

#define DSNO_DEFINE_STEP_KERNEL(name, Params, function)                                 \
    extern "C" __global__ void __launch_bounds__(dsno::kThreads, dsno::Params::kBlocks) \
        name(const dsno::Params params) {                                               \
        function(params);                                                               \
    }
