// exp_step: y = sum over j of c_j v_j, and its derivatives, c_j g for each v_j and <g, v_j> for
// each coefficient.
//
// A block serves one part of one sample. Its first threads look up the sample's row; a coefficient
// that is 0 leaves a null in its term, which is then not read.
#pragma once

#include "steps.cuh"

namespace dsno {

struct ExpStepParams {
    static constexpr int kBlocks = 8;  // that fit a multiprocessor at once: 64 registers a thread
    i64 samples, size, parts, terms;
    i64 ring;  // with a head, terms 1 .. ring are the slots of a ring buffer
    Data head, out, term[kMaxTerms];
    Rows rows;
};

// Terms whose loads are under way together.
template <typename A>
constexpr int kGroup = sizeof(A) == 8 ? 2 : 4;
constexpr int kSlots = (kMaxTerms + 3) / 4 * 4;  // whole groups

template <typename A>
struct Term {
    const char* data;  // null: not read
    A c;
    int dtype;
};

template <typename A>
__device__ inline Term<A> term_of(const ExpStepParams& p, i64 sample, i64 column) {
    if (column >= p.terms) return {};
    const A c = static_cast<A>(coefficient(p.rows, sample, column));
    i64 place = column;
    if (p.head.data && column >= 1 && column <= p.ring) {
        place = 1 + ring_slot(p.head, column - 1, p.ring);
    }
    const Data& x = p.term[place];
    return {c == 0 ? nullptr : x.data, c, static_cast<int>(x.dtype)};
}

template <typename A, int DTYPE>
struct WeightedSum {
    const Term<A>* terms;
    i64 count;
    Data out;

    template <int N>
    __device__ void run(i64 i) const {
        A sum[N] = {};
#pragma unroll 1
        for (i64 first = 0; first < count; first += kGroup<A>) {
            Raw<A, N> raw[kGroup<A>];
#pragma unroll
            for (int t = 0; t < kGroup<A>; ++t) {
                const Term<A>& term = terms[first + t];
                if (term.data) fetch<DTYPE>(term.data, term.dtype, i, &raw[t]);
            }
#pragma unroll
            for (int t = 0; t < kGroup<A>; ++t) {
                const Term<A>& term = terms[first + t];
                if (!term.data) continue;
                A x[N];
                convert<DTYPE>(raw[t], term.dtype, x);
#pragma unroll
                for (int j = 0; j < N; ++j) sum[j] += term.c * x[j];
            }
        }
        write<DTYPE, N>(out, i, sum);
    }
};

template <typename A, int DTYPE, int V>
__device__ inline void exp_step(const ExpStepParams& p) {
    __shared__ Term<A> terms[kSlots];
    for (i64 item = blockIdx.x; item < p.samples * p.parts; item += gridDim.x) {
        const i64 sample = divide(item, p.parts), part = item - sample * p.parts;
        __syncthreads();  // the terms of the item before are read no longer
        if (threadIdx.x < kSlots) terms[threadIdx.x] = term_of<A>(p, sample, threadIdx.x);
        __syncthreads();
        const WeightedSum<A, DTYPE> sum{terms, p.terms, p.out};
        for_elements<V>(sample, p.size, part, p.parts, sum);
    }
}

struct ExpStepBackwardParams {
    static constexpr int kBlocks = 6;
    i64 samples, size, parts, terms;
    double* dots;  // [samples * parts, terms]: the share of each block; may be null
    Data g;
    Data term[kMaxTerms];  // data null: no dot product
    Data grad[kMaxTerms];  // data null: not wanted
    Rows rows;
};

// U vectors of N elements for each thread, `step` elements apart: c_j g where it is wanted, and the
// dot products of each warp. Sums are short: U N products in a thread, then 32 threads.
template <int DTYPE, int N, int U, typename A>
__device__ inline void backward_span(const ExpStepBackwardParams& p, const A* weights,
                                     A (*sums)[kWarps], i64 start, i64 step, i64 end) {
    A g[U][N] = {};
#pragma unroll
    for (int u = 0; u < U; ++u) {
        const i64 i = start + u * step;
        if (i >= end) continue;
        Raw<A, N> raw;
        const int dtype = static_cast<int>(p.g.dtype);
        fetch<DTYPE>(p.g.data, dtype, i, &raw);
        convert<DTYPE>(raw, dtype, g[u]);
    }
#pragma unroll 1
    for (i64 j = 0; j < p.terms; ++j) {
        const Data v = p.term[j], grad = p.grad[j];
        const int dtype = static_cast<int>(v.dtype);
        Raw<A, N> raw[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const i64 i = start + u * step;
            if (v.data && i < end) fetch<DTYPE>(v.data, dtype, i, &raw[u]);
        }
        A sum = 0;
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const i64 i = start + u * step;
            if (i >= end) continue;
            A x[N];
            if (grad.data) {
#pragma unroll
                for (int k = 0; k < N; ++k) x[k] = weights[j] == 0 ? A(0) : weights[j] * g[u][k];
                write<DTYPE, N>(grad, i, x);
            }
            if (v.data) {
                convert<DTYPE>(raw[u], dtype, x);
#pragma unroll
                for (int k = 0; k < N; ++k) sum += g[u][k] * x[k];
            }
        }
        if (v.data) {
            sum = warp_sum(sum);
            if (threadIdx.x % 32 == 0) sums[j][threadIdx.x / 32] = sum;
        }
    }
}

template <typename A, int DTYPE, int V, int U>
__device__ inline void exp_step_backward(const ExpStepBackwardParams& p) {
    __shared__ A weights[kMaxTerms], sums[kMaxTerms][kWarps];
    for (i64 item = blockIdx.x; item < p.samples * p.parts; item += gridDim.x) {
        const i64 sample = divide(item, p.parts), part = item - sample * p.parts;
        const i64 thread = threadIdx.x;
        __syncthreads();  // the weights of the item before are read no longer
        if (thread < p.terms && p.grad[thread].data) {
            weights[thread] = static_cast<A>(coefficient(p.rows, sample, thread));
        }
        __syncthreads();
        const bool adds = p.dots && thread < p.terms && p.term[thread].data;
        double total = 0;
        const Stretch<V> stretch(sample, p.size);
        constexpr i64 kSpan = U * kThreads;
        const i64 vectors = stretch.last > stretch.first ? stretch.last - stretch.first : 0;
        const i64 spans = (vectors + kSpan - 1) / kSpan;
        // Rounds of whole vectors; part 0 begins with the elements around them.
        for (i64 span = part == 0 ? -p.parts : part; span < spans; span += p.parts) {
            if (span < 0) {
                const i64 i = V > 1 ? stretch.edge() : stretch.end;
                backward_span<DTYPE, 1, 1>(p, weights, sums, i, 0, stretch.end);
            } else {
                const i64 start = (stretch.first + span * kSpan + thread) * V;
                backward_span<DTYPE, V, U>(p, weights, sums, start, kThreads * V, stretch.last * V);
            }
            __syncthreads();
            for (int w = 0; adds && w < kWarps; ++w) total += sums[thread][w];
            __syncthreads();
        }
        if (adds) p.dots[item * p.terms + thread] = total;
    }
}

// The second pass over the shares of blocks, in a fixed order.
struct ExpStepDotsParams {
    static constexpr int kBlocks = 8;
    const double* shares;  // [outputs, blocks, terms]
    double* dots;          // [outputs, terms]
    i64 outputs, blocks, terms;
};

__device__ inline void exp_step_dots(const ExpStepDotsParams& p) {
    __shared__ double sums[kWarps];
    for (i64 item = blockIdx.x; item < p.outputs * p.terms; item += gridDim.x) {
        const i64 output = divide(item, p.terms), j = item - output * p.terms;
        double sum = 0;
        for (i64 block = threadIdx.x; block < p.blocks; block += kThreads) {
            sum += p.shares[(output * p.blocks + block) * p.terms + j];
        }
        sum = warp_sum(sum);
        if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
        __syncthreads();
        if (threadIdx.x == 0) {
            for (int w = 1; w < kWarps; ++w) sum += sums[w];
            p.dots[item] = sum;
        }
        __syncthreads();
    }
}

}  // namespace dsno

// Every kernel: X(name, parameters, device function). `dsno_kernels/backends/cuda_steps.py` chooses
// among the names: f32 where all tensors are, f64 where one is; v elements move together.
// clang-format off
#define DSNO_EXP_STEP_KERNELS(X)                                                                               \
    X(exp_step_f32_v4, ExpStepParams, (dsno::exp_step<float, dsno::kFloat32, 4>))                              \
    X(exp_step_any_v8, ExpStepParams, (dsno::exp_step<float, dsno::kAny, 8>))                                  \
    X(exp_step_any_v1, ExpStepParams, (dsno::exp_step<float, dsno::kAny, 1>))                                  \
    X(exp_step_f64_v2, ExpStepParams, (dsno::exp_step<double, dsno::kAny, 2>))                                 \
    X(exp_step_f64_v1, ExpStepParams, (dsno::exp_step<double, dsno::kAny, 1>))                                 \
    X(exp_step_backward_f32_v4, ExpStepBackwardParams, (dsno::exp_step_backward<float, dsno::kFloat32, 4, 4>)) \
    X(exp_step_backward_any_v8, ExpStepBackwardParams, (dsno::exp_step_backward<float, dsno::kAny, 8, 2>))     \
    X(exp_step_backward_any_v1, ExpStepBackwardParams, (dsno::exp_step_backward<float, dsno::kAny, 1, 8>))     \
    X(exp_step_backward_f64_v2, ExpStepBackwardParams, (dsno::exp_step_backward<double, dsno::kAny, 2, 2>))    \
    X(exp_step_backward_f64_v1, ExpStepBackwardParams, (dsno::exp_step_backward<double, dsno::kAny, 1, 4>))    \
    X(exp_step_dots, ExpStepDotsParams, dsno::exp_step_dots)
// clang-format on

DSNO_EXP_STEP_KERNELS(DSNO_DEFINE_STEP_KERNEL)
