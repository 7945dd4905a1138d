// Transforms of long signals that lie contiguous in memory: time is in the vector lanes, and kRows
// signals at a time are multiplied by tables. Both halves of the folding (tables.h) are folded once
// more around T/4,
//
//     cos: even k sees e_t + e_{T/2-t}, odd k e_t - e_{T/2-t};   sin: even k sees o_t - o_{T/2-t},
//     odd k o_t + o_{T/2-t},
//
// so a signal costs T K products, which is what a fast transform costs, at the speed of a matrix
// product.
#pragma once

#include "../tables.h"
#include "gemm.h"
#include "staging.h"

namespace DSNO_ISA {

// The four folded parts lie in the order: cosine of even k, of odd k, sine of even k, of odd k.
constexpr int kQuarters = 4;

DSNO_INLINE bool has_rows_tables(const Analysis& tables) { return tables.quarter.length > 0; }
DSNO_INLINE bool has_rows_tables(const Synthesis& tables) { return tables.quarter.length > 0; }

// Floats of one folded signal; never a multiple of 1024, which would put all rows into the same
// sets of the cache.
DSNO_INLINE int64_t quarter_floats(const QuarterTables& tables) {
    return kQuarters * int64_t{tables.padded_length} + kLanes;
}
DSNO_INLINE int64_t lanes_floats(const QuarterTables& tables) {
    return kQuarters * int64_t{tables.lanes[0]};
}

// Interleaved pairs of K modes, padded to whole vectors.
DSNO_INLINE int64_t pair_floats(int K) { return round_up(2 * int64_t{K}, kTableLanes); }

static inline void load_signal(float* out, const char* p, int dtype, int64_t count) {
    for (int64_t t = 0; t < count; t += kLanes) {
        const int some = static_cast<int>(min64(kLanes, count - t));
        const Vec x = load_some(p + t * element_size(dtype), dtype, some);
        if (some == kLanes) {
            store(out + t, x);
        } else {
            store_some(reinterpret_cast<char*>(out + t), kFloat32, x, some);
        }
    }
}

// The four parts of a signal, each [T/4 + 1].
static inline void fold_quarters(const float* x, int T, int64_t part, float* out) {
    const int half = T / 2, quarter = T / 4;
    float *cos_even = out, *cos_odd = out + part, *sin_even = out + 2 * part,
          *sin_odd = out + 3 * part;
    int t = 1;
    for (; t + kLanes <= quarter; t += kLanes) {
        const Vec a = load(x + t), b = reverse(load(x + T - t - kLanes + 1));
        const Vec c = reverse(load(x + half - t - kLanes + 1)), d = load(x + half + t);
        const Vec even = a + b, odd = a - b, even_mirror = c + d, odd_mirror = c - d;
        store(cos_even + t, even + even_mirror);
        store(cos_odd + t, even - even_mirror);
        store(sin_even + t, odd - odd_mirror);
        store(sin_odd + t, odd + odd_mirror);
    }
    for (; t < quarter; ++t) {
        const float a = x[t], b = x[T - t], c = x[half - t], d = x[half + t];
        cos_even[t] = (a + b) + (c + d);
        cos_odd[t] = (a + b) - (c + d);
        sin_even[t] = (a - b) - (c - d);
        sin_odd[t] = (a - b) + (c - d);
    }
    cos_even[0] = x[0] + x[half];
    cos_odd[0] = x[0] - x[half];
    sin_even[0] = sin_odd[0] = 0.0f;
    cos_even[quarter] = x[quarter] + x[T - quarter];
    sin_odd[quarter] = x[quarter] - x[T - quarter];
    cos_odd[quarter] = sin_even[quarter] = 0.0f;
}

// The mirror image: a signal from its four parts.
static inline void unfold_quarters(const float* in, int n, int64_t part, float* y) {
    const int half = n / 2, quarter = n / 4;
    const float *cos_even = in, *cos_odd = in + part, *sin_even = in + 2 * part,
                *sin_odd = in + 3 * part;
    int t = 1;
    for (; t + kLanes <= quarter; t += kLanes) {
        const Vec ce = load(cos_even + t), co = load(cos_odd + t), se = load(sin_even + t),
                  so = load(sin_odd + t);
        const Vec even = ce + co, odd = se + so, even_mirror = ce - co, odd_mirror = so - se;
        store(y + t, even + odd);
        store(y + n - t - kLanes + 1, reverse(even - odd));
        store(y + half - t - kLanes + 1, reverse(even_mirror + odd_mirror));
        store(y + half + t, even_mirror - odd_mirror);
    }
    for (; t < quarter; ++t) {
        const float even = cos_even[t] + cos_odd[t], odd = sin_even[t] + sin_odd[t];
        const float even_mirror = cos_even[t] - cos_odd[t], odd_mirror = sin_odd[t] - sin_even[t];
        y[t] = even + odd;
        y[n - t] = even - odd;
        y[half - t] = even_mirror + odd_mirror;
        y[half + t] = even_mirror - odd_mirror;
    }
    y[0] = cos_even[0] + cos_odd[0];
    y[half] = cos_even[0] - cos_odd[0];
    const float even = cos_even[quarter] + cos_odd[quarter],
                odd = sin_even[quarter] + sin_odd[quarter];
    y[quarter] = even + odd;
    y[n - quarter] = even - odd;
}

// Parts of `rows` folded signals times the tables: [rows][4][lanes], lane j of mode 2 j + parity.
static inline void multiply_analysis(const QuarterTables& tables, int rows, const float* folded,
                                     float* out) {
    const int64_t a_row = quarter_floats(tables), c_row = lanes_floats(tables);
    for (int part = 0; part < kQuarters; ++part) {
        const int parity = part % 2;
        const float* table = part < 2 ? tables.cosine[parity] : tables.sine[parity];
        const int64_t lanes = tables.lanes[parity];
        gemm(rows, ceil_div(tables.depth[parity], kLanes), false,
             {folded + part * tables.padded_length, a_row, 1, table, lanes,
              out + part * tables.lanes[0], c_row, tables.length});
    }
}

// Pairs (re, im) of `rows` spectra, `row_floats` apart, times the tables: the parts of their
// signals.
static inline void multiply_synthesis(const QuarterTables& tables, int rows, const float* pairs,
                                      int64_t row_floats, float* out) {
    const int64_t c_row = quarter_floats(tables);
    for (int part = 0; part < kQuarters; ++part) {
        const int parity = part % 2;
        const float* table = part < 2 ? tables.cosine[parity] : tables.sine[parity];
        gemm(rows, tables.padded_length / kLanes, false,
             {pairs + 2 * parity + part / 2, row_floats, 4, table, tables.padded_length,
              out + part * tables.padded_length, c_row, tables.depth[parity]});
    }
}

// Mode k of one row of `multiply_analysis`.
DSNO_INLINE float lane_of(const float* lanes, int64_t part, int k, bool imaginary) {
    return lanes[(2 * imaginary + k % 2) * part + k / 2];
}

static inline void interleave(const float* lanes, int64_t part, int K, float* out) {
    for (int k = 0; k < K; ++k) {
        out[2 * k] = lane_of(lanes, part, k, false);
        out[2 * k + 1] = lane_of(lanes, part, k, true);
    }
}

#if defined(__AVX512F__)
// Both real parts twice, then both imaginary parts twice: the operands of a complex product in
// interleaved lanes.
static inline void duplicate(const float* lanes, int64_t part, int64_t floats, float* real,
                             float* imag) {
    const __m512i order = _mm512_setr_epi32(0, 0, 16, 16, 1, 1, 17, 17, 2, 2, 18, 18, 3, 3, 19, 19);
    for (int64_t j = 0; j < floats; j += kLanes) {
        const __m512i index =
            _mm512_add_epi32(order, _mm512_set1_epi32(static_cast<int>(j / 4 % 16)));
        const float* from = lanes + j / 64 * 16;
        store(real + j, _mm512_permutex2var_ps(load(from), index, load(from + part)));
        store(imag + j,
              _mm512_permutex2var_ps(load(from + 2 * part), index, load(from + 3 * part)));
    }
}
#else
static inline void duplicate(const float* lanes, int64_t part, int64_t floats, float* real,
                             float* imag) {
    for (int k = 0; k < floats / 2; ++k) {
        real[2 * k] = real[2 * k + 1] = lane_of(lanes, part, k, false);
        imag[2 * k] = imag[2 * k + 1] = lane_of(lanes, part, k, true);
    }
}
#endif

}  // namespace DSNO_ISA
