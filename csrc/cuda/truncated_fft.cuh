// truncated_rfft and truncated_irfft: the first K bins of a real transform of length n, and back.
//
// Times t and n - t share their cosines, and their sines up to the sign. A transform therefore
// works on pairs t = 0 .. n/2: forward on u = x_t + x_{n-t} and v = x_t - x_{n-t}, backward on e =
// sum_k c Re Y_k and o = sum_k s Im Y_k with x_t = e + o and x_{n-t} = e - o. Both directions are
// one reduction
//
//     first[j] = sum_i c[i, j] u[i],    second[j] = sum_i s[i, j] v[i]
//
// over i = pairs, j = bins (forward) or i = bins, j = pairs (inverse). The table of (c, s) comes
// from the host in float64 precision, [i][j] with rows of `table_pitch` entries; c = cos and s =
// -sin of 2 pi k t / n, times a factor of each bin (alpha_k / n in the inverse).
//
// T is the type of the signal; spectra are pairs of its accumulator.
#pragma once

#include "common.cuh"

namespace dsno {

// Strides count elements: of the input, and of the output (its (re, im) pairs in the forward
// direction). The transforms form three axes, of which the columns are closest in memory.
struct TruncatedFftParams {
    const void* input;
    void* output;
    const void* table;
    i64 n, modes, table_pitch;
    i64 outers, middles, columns;
    i64 in_outer, in_middle, in_column;
    i64 in_step, in_part;  // step: along the transform; part: from re to im
    i64 out_outer, out_middle, out_column, out_step;
    i64 splits;  // neighboring blocks that have the same columns and different outputs j
    i64 lanes;   // rows kernel: threads of a block over j, a power of two; the others share i
};

// Sums this long keep the error of float32 accumulation below 6e-7; longer ones are summed in
// parts.
constexpr i64 kSegment = 512;

template <typename A>
using Pair = Vector<A, 2>;

template <bool INVERSE, typename T>
struct Types {
    using Input = T;
    using Output = Accumulator<T>;
};
template <typename T>
struct Types<true, T> {
    using Input = Accumulator<T>;
    using Output = T;
};

// Where the first element of transform `index` lies, in groups of V columns.
struct Place {
    i64 in, out;
};
template <bool INVERSE, int V>
__device__ inline Place place_of(const TruncatedFftParams& p, i64 index) {
    const i64 groups = p.columns / V;
    const i64 rest = divide(index, groups), column = (index - rest * groups) * V;
    const i64 outer = divide(rest, p.middles), middle = rest - outer * p.middles;
    const i64 out = outer * p.out_outer + middle * p.out_middle + column * p.out_column;
    return {outer * p.in_outer + middle * p.in_middle + column * p.in_column,
            INVERSE ? out : 2 * out};
}

__device__ inline bool is_self_conjugate(i64 k, i64 n) { return k == 0 || 2 * k == n; }

// u and v of N neighboring columns: a folded pair of times, or a bin without an imaginary part that
// cannot reach the result.
template <bool INVERSE, int N, typename I, typename A>
__device__ inline void load_terms(const TruncatedFftParams& p, const I* from, i64 i, A* u, A* v) {
    const bool alone = is_self_conjugate(i, p.n);
    if constexpr (INVERSE) {
        const I* bin = from + i * p.in_step;
        if constexpr (N > 1) {
            A parts[2 * N];
            load<2 * N>(bin, parts);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                u[j] = parts[2 * j];
                v[j] = alone ? A(0) : parts[2 * j + 1];
            }
        } else {
            u[0] = widen(bin[0]);
            v[0] = alone ? A(0) : widen(bin[p.in_part]);
        }
    } else {
        A near[N], far[N] = {};
        load<N>(from + i * p.in_step, near);
        if (!alone) load<N>(from + (p.n - i) * p.in_step, far);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            u[j] = near[j] + far[j];
            v[j] = alone ? A(0) : near[j] - far[j];
        }
    }
}

// The results of output j of N neighboring columns; `add` for all but the first part of a long sum.
template <bool INVERSE, int N, typename O, typename A>
__device__ inline void store_terms(const TruncatedFftParams& p, O* to, i64 j, bool add,
                                   const A* first, const A* second) {
    const bool alone = is_self_conjugate(j, p.n);
    if constexpr (INVERSE) {
        A near[N], far[N];
#pragma unroll
        for (int q = 0; q < N; ++q) {
            near[q] = first[q] + second[q];
            far[q] = first[q] - second[q];
        }
        store_global<N>(to + j * p.out_step, near);
        if (!alone) store_global<N>(to + (p.n - j) * p.out_step, far);
    } else {
        O* at = to + 2 * j * p.out_step;
        A parts[2 * N] = {};
        if (add) load<2 * N>(at, parts);
#pragma unroll
        for (int q = 0; q < N; ++q) {
            parts[2 * q] += first[q];
            parts[2 * q + 1] = alone ? A(0) : parts[2 * q + 1] + second[q];
        }
        store_global<2 * N>(at, parts);
    }
}

// One thread a group of V neighboring columns, C outputs at a time in registers. The input comes
// from memory once, and from a cache where there are more than C outputs.
template <bool INVERSE, typename T, int V, int C>
__device__ inline void truncated_fft_columns(const TruncatedFftParams& p) {
    using A = Accumulator<T>;
    using Input = typename Types<INVERSE, T>::Input;
    using Output = typename Types<INVERSE, T>::Output;
    const i64 pairs = p.n / 2 + 1;
    const i64 terms = INVERSE ? p.modes : pairs, outputs = INVERSE ? pairs : p.modes;
    const i64 split = blockIdx.x % p.splits, tile = blockIdx.x / p.splits;
    const i64 group = tile * kThreads + threadIdx.x;
    if (group >= p.outers * p.middles * (p.columns / V)) return;
    const Place place = place_of<INVERSE, V>(p, group);
    const Input* from = static_cast<const Input*>(p.input) + place.in;
    Output* to = static_cast<Output*>(p.output) + place.out;

    for (i64 chunk = split * C; chunk < outputs; chunk += p.splits * C) {
        const Pair<A>* table = static_cast<const Pair<A>*>(p.table) + chunk;
        const i64 segment = INVERSE ? terms : kSegment;
        for (i64 begin = 0; begin < terms; begin += segment) {
            const i64 end = begin + segment < terms ? begin + segment : terms;
            A first[C][V] = {}, second[C][V] = {};
#pragma unroll 2
            for (i64 i = begin; i < end; ++i) {
                A u[V], v[V];
                load_terms<INVERSE, V>(p, from, i, u, v);
                const auto row =
                    *reinterpret_cast<const Vector<A, 2 * C>*>(table + i * p.table_pitch);
#pragma unroll
                for (int c = 0; c < C; ++c) {
#pragma unroll
                    for (int j = 0; j < V; ++j) {
                        first[c][j] += row.v[2 * c] * u[j];
                        second[c][j] += row.v[2 * c + 1] * v[j];
                    }
                }
            }
#pragma unroll
            for (int c = 0; c < C; ++c) {
                if (chunk + c < outputs) {
                    store_terms<INVERSE, V>(p, to, chunk + c, begin > 0, first[c], second[c]);
                }
            }
        }
    }
}

// A block transforms R rows whose time (forward) or result (inverse) is contiguous. The terms of
// all rows are staged in shared memory, [i][R]; a thread owns one output j of every row, so the
// table is read coalesced and once, and each staged value serves a whole warp. Where outputs are
// fewer than threads, groups of threads take every `groups`-th term, and their sums are added in
// order.
template <bool INVERSE, typename T>
__device__ inline void truncated_fft_rows(const TruncatedFftParams& p) {
    using A = Accumulator<T>;
    using Input = typename Types<INVERSE, T>::Input;
    using Output = typename Types<INVERSE, T>::Output;
    constexpr int kWidth = 16 / sizeof(A);         // rows in a 16-byte word
    constexpr int kRows = 2 * kWidth;              // R
    constexpr int kPitch = kRows + kWidth;         // spreads the stores of a warp over all banks
    constexpr int kStage = 256;                    // terms in shared memory
    constexpr int kReduce = kThreads * 2 * kRows;  // partial sums, in the same memory
    static_assert(kReduce <= 2 * kStage * kPitch, "partial sums must fit the staging memory");
    alignas(16) __shared__ A staged[2 * kStage * kPitch];
    __shared__ i64 in_offset[kRows], out_offset[kRows];

    const int thread = threadIdx.x, lanes = static_cast<int>(p.lanes);
    const int lane = thread % lanes, group = thread / lanes, groups = kThreads / lanes;
    const i64 pairs = p.n / 2 + 1;
    const i64 terms = INVERSE ? p.modes : pairs, outputs = INVERSE ? pairs : p.modes;
    const i64 rows = p.outers * p.middles * p.columns;
    const i64 first_row = blockIdx.x / p.splits * kRows;
    const i64 first_output = blockIdx.x % p.splits * lanes;
    const i64 j = first_output + lane;
    const Input* input = static_cast<const Input*>(p.input);
    Output* output = static_cast<Output*>(p.output);

    if (thread < kRows) {
        const Place place = place_of<INVERSE, 1>(p, first_row + thread);
        in_offset[thread] = place.in;
        out_offset[thread] = place.out;
    }

    A first[kRows] = {}, second[kRows] = {};
    for (i64 begin = 0; begin < terms; begin += kStage) {
        const int count = static_cast<int>(terms - begin < kStage ? terms - begin : kStage);
        __syncthreads();
        for (int item = thread; item < 2 * count; item += kThreads) {
            const int slot = item < count ? item : item - count, part = item < count ? 0 : kWidth;
            A u[kWidth], v[kWidth];
#pragma unroll
            for (int r = 0; r < kWidth; ++r) {
                A u_row[1] = {A(0)}, v_row[1] = {A(0)};
                if (first_row + part + r < rows) {
                    load_terms<INVERSE, 1>(p, input + in_offset[part + r], begin + slot, u_row,
                                           v_row);
                }
                u[r] = u_row[0];
                v[r] = v_row[0];
            }
            store<kWidth>(staged + slot * kPitch + part, u);
            store<kWidth>(staged + (kStage + slot) * kPitch + part, v);
        }
        __syncthreads();
        if (j < outputs) {
            // A sum of its own for each stage: shorter sums, smaller rounding errors.
            A stage_first[kRows] = {}, stage_second[kRows] = {};
            const Pair<A>* table = static_cast<const Pair<A>*>(p.table) + begin * p.table_pitch + j;
#pragma unroll 2
            for (int slot = group; slot < count; slot += groups) {
                const Pair<A> w = table[slot * p.table_pitch];
                A u[kRows], v[kRows];
                load<kRows>(staged + slot * kPitch, u);
                load<kRows>(staged + (kStage + slot) * kPitch, v);
#pragma unroll
                for (int r = 0; r < kRows; ++r) {
                    stage_first[r] += w.v[0] * u[r];
                    stage_second[r] += w.v[1] * v[r];
                }
            }
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                first[r] += stage_first[r];
                second[r] += stage_second[r];
            }
        }
    }

    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        staged[(2 * r) * kThreads + thread] = first[r];
        staged[(2 * r + 1) * kThreads + thread] = second[r];
    }
    __syncthreads();
    for (int item = thread; item < lanes * kRows; item += kThreads) {
        const int r = item / lanes, column = item % lanes;
        if (first_row + r >= rows || first_output + column >= outputs) continue;
        A sum_first[1] = {A(0)}, sum_second[1] = {A(0)};
        for (int g = 0; g < groups; ++g) {
            sum_first[0] += staged[(2 * r) * kThreads + g * lanes + column];
            sum_second[0] += staged[(2 * r + 1) * kThreads + g * lanes + column];
        }
        store_terms<INVERSE, 1>(p, output + out_offset[r], first_output + column, false, sum_first,
                                sum_second);
    }
}

}  // namespace dsno

// Every kernel: X(name, device function). `dsno_kernels/backends/_transforms.py` chooses among the
// names; v is the number of columns and c the number of outputs of a thread.
// clang-format off
#define DSNO_TRUNCATED_FFT_KERNELS(X)                                                                \
    X(truncated_rfft_columns_f32_v4_c4, (dsno::truncated_fft_columns<false, float, 4, 4>))           \
    X(truncated_rfft_columns_f32_v4_c8, (dsno::truncated_fft_columns<false, float, 4, 8>))           \
    X(truncated_rfft_columns_f32_v1_c8, (dsno::truncated_fft_columns<false, float, 1, 8>))           \
    X(truncated_rfft_columns_f16_v8_c4, (dsno::truncated_fft_columns<false, dsno::Half, 8, 4>))      \
    X(truncated_rfft_columns_f16_v4_c8, (dsno::truncated_fft_columns<false, dsno::Half, 4, 8>))      \
    X(truncated_rfft_columns_f16_v1_c8, (dsno::truncated_fft_columns<false, dsno::Half, 1, 8>))      \
    X(truncated_rfft_columns_bf16_v8_c4, (dsno::truncated_fft_columns<false, dsno::BFloat16, 8, 4>)) \
    X(truncated_rfft_columns_bf16_v4_c8, (dsno::truncated_fft_columns<false, dsno::BFloat16, 4, 8>)) \
    X(truncated_rfft_columns_bf16_v1_c8, (dsno::truncated_fft_columns<false, dsno::BFloat16, 1, 8>)) \
    X(truncated_rfft_columns_f64_v2_c8, (dsno::truncated_fft_columns<false, double, 2, 8>))          \
    X(truncated_rfft_columns_f64_v1_c8, (dsno::truncated_fft_columns<false, double, 1, 8>))          \
    X(truncated_rfft_rows_f32, (dsno::truncated_fft_rows<false, float>))                             \
    X(truncated_rfft_rows_f16, (dsno::truncated_fft_rows<false, dsno::Half>))                        \
    X(truncated_rfft_rows_bf16, (dsno::truncated_fft_rows<false, dsno::BFloat16>))                   \
    X(truncated_rfft_rows_f64, (dsno::truncated_fft_rows<false, double>))                            \
    X(truncated_irfft_columns_f32_v4_c4, (dsno::truncated_fft_columns<true, float, 4, 4>))           \
    X(truncated_irfft_columns_f32_v4_c8, (dsno::truncated_fft_columns<true, float, 4, 8>))           \
    X(truncated_irfft_columns_f32_v1_c8, (dsno::truncated_fft_columns<true, float, 1, 8>))           \
    X(truncated_irfft_columns_f16_v4_c4, (dsno::truncated_fft_columns<true, dsno::Half, 4, 4>))      \
    X(truncated_irfft_columns_f16_v4_c8, (dsno::truncated_fft_columns<true, dsno::Half, 4, 8>))      \
    X(truncated_irfft_columns_f16_v1_c8, (dsno::truncated_fft_columns<true, dsno::Half, 1, 8>))      \
    X(truncated_irfft_columns_bf16_v4_c4, (dsno::truncated_fft_columns<true, dsno::BFloat16, 4, 4>)) \
    X(truncated_irfft_columns_bf16_v4_c8, (dsno::truncated_fft_columns<true, dsno::BFloat16, 4, 8>)) \
    X(truncated_irfft_columns_bf16_v1_c8, (dsno::truncated_fft_columns<true, dsno::BFloat16, 1, 8>)) \
    X(truncated_irfft_columns_f64_v2_c8, (dsno::truncated_fft_columns<true, double, 2, 8>))          \
    X(truncated_irfft_columns_f64_v1_c8, (dsno::truncated_fft_columns<true, double, 1, 8>))          \
    X(truncated_irfft_rows_f32, (dsno::truncated_fft_rows<true, float>))                             \
    X(truncated_irfft_rows_f16, (dsno::truncated_fft_rows<true, dsno::Half>))                        \
    X(truncated_irfft_rows_bf16, (dsno::truncated_fft_rows<true, dsno::BFloat16>))                   \
    X(truncated_irfft_rows_f64, (dsno::truncated_fft_rows<true, double>))
// clang-format on

#define DSNO_DEFINE_KERNEL(name, function)                                      \
    extern "C" __global__ void __launch_bounds__(dsno::kThreads, dsno::kBlocks) \
        name(const dsno::TruncatedFftParams params) {                           \
        function(params);                                                       \
    }
DSNO_TRUNCATED_FFT_KERNELS(DSNO_DEFINE_KERNEL)
#undef DSNO_DEFINE_KERNEL
