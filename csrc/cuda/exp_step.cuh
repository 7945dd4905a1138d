// exp_step: y = sum over j of c_j v_j, and its derivatives, c_j g for each v_j and <g, v_j> for
// each coefficient.
//
// A block serves one part of one sample. Its first threads look up the sample's row; a coefficient
// that is 0 leaves a null in its term, which is then not read.
#pragma once

#include "steps.cuh"

namespace dsno {

struct ExpStepParams {
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

}  // namespace dsno

// Every kernel: X(name, parameters, device function). `dsno_kernels/backends/cuda_steps.py` chooses
// among the names: f32 where all tensors are, f64 where one is; v elements move together.
// clang-format off
#define DSNO_EXP_STEP_KERNELS(X)                                                           \
    X(exp_step_f32_v4, ExpStepParams, (dsno::exp_step<float, dsno::kFloat32, 4>))          \
    X(exp_step_any_v8, ExpStepParams, (dsno::exp_step<float, dsno::kAny, 8>))              \
    X(exp_step_any_v1, ExpStepParams, (dsno::exp_step<float, dsno::kAny, 1>))              \
    X(exp_step_f64_v2, ExpStepParams, (dsno::exp_step<double, dsno::kAny, 2>))             \
    X(exp_step_f64_v1, ExpStepParams, (dsno::exp_step<double, dsno::kAny, 1>))
// clang-format on

DSNO_EXP_STEP_KERNELS(DSNO_DEFINE_STEP_KERNEL)
