// solver_step: guidance, conversion, clamp and both sums of a solver's row in one pass; the
// formulas stand in csrc/cpu/steps.h. Columns of a row: A, B, a_b, c_b[0..K-1], s, a_p,
// c_p[0..K-1], c_in.
//
// What the row does not need is not read: its source is null.
#pragma once

#include "noise.cuh"

namespace dsno {

struct SolverStepParams {
    static constexpr int kBlocks = 4;  // 128 registers a thread
    i64 samples, size, parts, order, looks_ahead;
    i64 ring;         // with a head, the slots of the ring buffer `history`
    i64 entry_slots;  // bytes from slot to slot where h_0 goes behind the head; 0: to `entry`
                      // itself
    i64 guidance_stride;
    Data head, point, output, unconditional, base, noise, history[kMaxOrder];
    Data new_base, new_point, entry, model_input;
    Data seed, guidance, scale;
    Rows rows;
    double guidance_value, low, high;
};

enum Source : int { kPoint, kOutput, kUnconditional, kBase, kNoise, kSources };

// The row of one sample, in shared memory.
template <typename A>
struct SolverRow {
    A column[kMaxColumns];
    A guidance, scale;
    u64 seed, offset;
    char* entry;
    Data source[kSources];
    struct Entry {
        Data data;
        A base, point;  // its coefficients in base' and point'
    } history[kMaxOrder];
};

template <typename A>
__device__ inline A column_of(const SolverStepParams& p, i64 sample, i64 column) {
    return static_cast<A>(coefficient(p.rows, sample, column));
}

// Several threads at once, each its own part of the row.
template <typename A>
__device__ inline void look_up(const SolverStepParams& p, i64 sample, SolverRow<A>* row) {
    const i64 K = p.order, t = threadIdx.x;
    if (t < 2 * K + 6) row->column[t] = column_of<A>(p, sample, t);
    if (t >= 32 && t < 32 + K - 1) {
        const i64 j = t - 31;  // h_j
        const A base = column_of<A>(p, sample, 3 + j);
        const A point = p.looks_ahead ? column_of<A>(p, sample, 5 + K + j) : A(0);
        Data data = p.history[p.head.data ? ring_slot(p.head, j - 1, p.ring) : j - 1];
        if (base == 0 && point == 0) data.data = nullptr;
        row->history[j - 1] = {data, base, point};
    }
    if (t == 64) {
        const A a = column_of<A>(p, sample, 0), b = column_of<A>(p, sample, 1);
        const A a_b = column_of<A>(p, sample, 2), s = column_of<A>(p, sample, 3 + K);
        A guidance = static_cast<A>(p.guidance_value);
        if (p.guidance.data)
            guidance = static_cast<A>(number(p.guidance, sample * p.guidance_stride));
        row->guidance = guidance;
        const bool guided = p.unconditional.data;
        const bool needed[kSources] = {a != 0 || (a_b != 0 && !p.base.data),
                                       b != 0 && !(guided && guidance == 0),
                                       b != 0 && guidance != 1, a_b != 0, s != 0};
        const Data given[kSources] = {p.point, p.output, p.unconditional, p.base, p.noise};
#pragma unroll
        for (int i = 0; i < kSources; ++i) {
            row->source[i] = {needed[i] ? given[i].data : nullptr, given[i].dtype};
        }
    }
    if (t == 96) {
        row->scale = p.scale.data ? static_cast<A>(number(p.scale, sample)) : A(0);
        row->seed = p.seed.data ? static_cast<u64>(integer(p.seed, 0)) : 0;
        row->offset = p.seed.data ? static_cast<u64>(integer(p.seed, 1)) : 0;
        row->entry = p.entry.data;
        if (p.entry_slots) row->entry += p.entry_slots * ring_slot(p.head, -1, p.ring);
    }
}

// c x, and 0 where c is 0, whatever x holds.
template <typename A>
__device__ inline A times(A c, A x) {
    return c == 0 ? A(0) : c * x;
}

template <typename A, int DTYPE>
struct Solver {
    const SolverStepParams& p;
    const SolverRow<A>& row;

    // The elements of a tensor, or zeros where it is not read.
    template <int N>
    __device__ void widened(const Data& x, const Raw<A, N>& raw, A* values) const {
        if (x.data) {
            convert<DTYPE>(raw, static_cast<int>(x.dtype), values);
        } else {
#pragma unroll
            for (int j = 0; j < N; ++j) values[j] = 0;
        }
    }

    template <int N>
    __device__ void run(i64 i) const {
        const i64 K = p.order;
        const A* c = row.column;
        Raw<A, N> raw[kNoise];
#pragma unroll
        for (int s = 0; s < kNoise; ++s) {
            const Data x = row.source[s];
            if (x.data) fetch<DTYPE>(x.data, static_cast<int>(x.dtype), i, &raw[s]);
        }
        A point[N], h[N], total[N], ahead[N];
        widened<N>(row.source[kPoint], raw[kPoint], point);
        {
            A m[N], u[N];
            widened<N>(row.source[kOutput], raw[kOutput], m);
            widened<N>(row.source[kUnconditional], raw[kUnconditional], u);
            const bool guided = p.unconditional.data;
            const A g = row.guidance;
#pragma unroll
            for (int j = 0; j < N; ++j) {
                if (guided) m[j] = (1 - g) * u[j] + g * m[j];
                h[j] = times(c[0], point[j]) + c[1] * m[j];
            }
        }
        if (p.scale.data) {
            const A s = row.scale;
#pragma unroll
            for (int j = 0; j < N; ++j) h[j] = (h[j] < -s ? -s : h[j] > s ? s : h[j]) / s;
        } else {
            const A low = static_cast<A>(p.low), high = static_cast<A>(p.high);
#pragma unroll
            for (int j = 0; j < N; ++j) h[j] = h[j] < low ? low : h[j] > high ? high : h[j];
        }
        if (p.base.data) widened<N>(row.source[kBase], raw[kBase], point);
        const A c_b = c[3], c_p = p.looks_ahead ? c[5 + K] : A(0);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            total[j] = times(c[2], point[j]) + times(c_b, h[j]);
            ahead[j] = times(c_p, h[j]);
        }
#pragma unroll 1
        for (i64 first = 0; first < K - 1; first += 2) {
            Raw<A, N> pair[2];
#pragma unroll
            for (int t = 0; t < 2; ++t) {
                const Data x = row.history[first + t].data;
                if (first + t < K - 1 && x.data) {
                    fetch<DTYPE>(x.data, static_cast<int>(x.dtype), i, &pair[t]);
                }
            }
#pragma unroll
            for (int t = 0; t < 2; ++t) {
                const typename SolverRow<A>::Entry& entry = row.history[first + t];
                if (first + t >= K - 1 || !entry.data.data) continue;
                A x[N];
                convert<DTYPE>(pair[t], static_cast<int>(entry.data.dtype), x);
#pragma unroll
                for (int j = 0; j < N; ++j) {
                    total[j] += times(entry.base, x[j]);
                    ahead[j] += times(entry.point, x[j]);
                }
            }
        }
        add_noise<N>(i, total);
        if (p.new_base.data) write<DTYPE, N>(p.new_base, i, total);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            ahead[j] = p.looks_ahead ? ahead[j] + times(c[4 + K], total[j]) : total[j];
        }
        if (p.new_point.data) write<DTYPE, N>(p.new_point, i, ahead);
        if (row.entry) write<DTYPE, N>({row.entry, p.entry.dtype}, i, h);
        if (p.model_input.data) {
#pragma unroll
            for (int j = 0; j < N; ++j) ahead[j] = times(c[5 + 2 * K], ahead[j]);
            write<DTYPE, N>(p.model_input, i, ahead);
        }
    }

    template <int N>
    __device__ void add_noise(i64 i, A* total) const {
        const A s = row.column[3 + p.order];
        const Data given = row.source[kNoise];
        if (s == 0 || !(given.data || p.seed.data)) return;
        A z[N];
        if (given.data) {
            Raw<A, N> raw;
            fetch<DTYPE>(given.data, static_cast<int>(given.dtype), i, &raw);
            convert<DTYPE>(raw, static_cast<int>(given.dtype), z);
        } else {
            normal_numbers<N>(row.seed, row.offset, i, z);
        }
#pragma unroll
        for (int j = 0; j < N; ++j) total[j] += s * z[j];
    }
};

template <typename A, int DTYPE, int V>
__device__ inline void solver_step(const SolverStepParams& p) {
    __shared__ SolverRow<A> row;
    for (i64 item = blockIdx.x; item < p.samples * p.parts; item += gridDim.x) {
        const i64 sample = divide(item, p.parts), part = item - sample * p.parts;
        __syncthreads();  // the row of the item before is read no longer
        look_up(p, sample, &row);
        __syncthreads();
        const Solver<A, DTYPE> solver{p, row};
        for_elements<V>(sample, p.size, part, p.parts, solver);
    }
}

}  // namespace dsno

// Every kernel: X(name, parameters, device function), named as those of exp_step.cuh.
// clang-format off
#define DSNO_SOLVER_STEP_KERNELS(X)                                                       \
    X(solver_step_f32_v4, SolverStepParams, (dsno::solver_step<float, dsno::kFloat32, 4>)) \
    X(solver_step_any_v8, SolverStepParams, (dsno::solver_step<float, dsno::kAny, 8>))     \
    X(solver_step_any_v1, SolverStepParams, (dsno::solver_step<float, dsno::kAny, 1>))     \
    X(solver_step_f64_v2, SolverStepParams, (dsno::solver_step<double, dsno::kAny, 2>))    \
    X(solver_step_f64_v1, SolverStepParams, (dsno::solver_step<double, dsno::kAny, 1>))
// clang-format on

DSNO_SOLVER_STEP_KERNELS(DSNO_DEFINE_STEP_KERNEL)
