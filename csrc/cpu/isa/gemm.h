// Register-tiled products C[m][v] = sum over d of A[m][d] * B[d][v]: A broadcast, B and C rows of
// vectors.
#pragma once

#include "simd.h"

namespace DSNO_ISA {

// Where the operands of one tile lie; strides in floats.
struct Tile {
    const float* a;
    int64_t a_row, a_depth;
    const float* b;
    int64_t b_depth;
    float* c;
    int64_t c_row;
    int64_t depth;
};

struct MultiplyAdd {
    static Vec apply(Vec a, Vec b, Vec c) { return fma(a, b, c); }
};

#if defined(__AVX512BF16__)
// Lanes hold pairs of bfloat16: c += a[0] b[0] + a[1] b[1].
struct DotAdd {
    static Vec apply(Vec a, Vec b, Vec c) {
        return _mm512_dpbf16_ps(c, (__m512bh)_mm512_castps_si512(a),
                                (__m512bh)_mm512_castps_si512(b));
    }
};
#endif

// kPacked: a_row is 1.
template <class Op, int kM, int kN, bool kAccumulate, bool kPacked>
static void gemm_tile(const Tile& tile) {
    Vec acc[kM][kN];
#pragma GCC unroll 16
    for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
        for (int v = 0; v < kN; ++v) {
            acc[m][v] = zero();
        }
    }
    // One pointer for three rows: the third lies within the reach of an address mode.
    constexpr int kBases = kPacked ? 1 : (kM + 2) / 3;
    const int64_t a_row = tile.a_row, a_depth = tile.a_depth, b_depth = tile.b_depth;
    const float* base[kBases];
#pragma GCC unroll 4
    for (int j = 0; j < kBases; ++j) base[j] = tile.a + 3 * j * a_row;
    const float* b = tile.b;
    for (int64_t d = tile.depth; d > 0; --d) {
        Vec row[kN];
#pragma GCC unroll 4
        for (int v = 0; v < kN; ++v) row[v] = load(b + v * kLanes);
#pragma GCC unroll 16
        for (int m = 0; m < kM; ++m) {
            const Vec scalar = set1(kPacked ? base[0][m] : base[m / 3][m % 3 * a_row]);
#pragma GCC unroll 4
            for (int v = 0; v < kN; ++v) acc[m][v] = Op::apply(scalar, row[v], acc[m][v]);
        }
#pragma GCC unroll 4
        for (int j = 0; j < kBases; ++j) base[j] += a_depth;
        b += b_depth;
    }
#pragma GCC unroll 16
    for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
        for (int v = 0; v < kN; ++v) {
            // What C holds is added last: a chain of `depth` roundings grows no longer from call
            // to call.
            float* c = tile.c + m * tile.c_row + v * kLanes;
            store(c, kAccumulate ? load(c) + acc[m][v] : acc[m][v]);
        }
    }
}

template <class Op, int kN, bool kAccumulate, bool kPacked>
DSNO_INLINE void gemm_rows(int rows, const Tile& tile) {
    switch (rows) {
        case 1:
            return gemm_tile<Op, 1, kN, kAccumulate, kPacked>(tile);
        case 2:
            return gemm_tile<Op, 2, kN, kAccumulate, kPacked>(tile);
        case 3:
            return gemm_tile<Op, 3, kN, kAccumulate, kPacked>(tile);
        case 4:
            return gemm_tile<Op, 4, kN, kAccumulate, kPacked>(tile);
        case 5:
            return gemm_tile<Op, 5, kN, kAccumulate, kPacked>(tile);
        case 6:
            return gemm_tile<Op, 6, kN, kAccumulate, kPacked>(tile);
#if defined(__AVX512F__)
        case 7:
            return gemm_tile<Op, 7, kN, kAccumulate, kPacked>(tile);
        case 8:
            return gemm_tile<Op, 8, kN, kAccumulate, kPacked>(tile);
        case 9:
            return gemm_tile<Op, 9, kN, kAccumulate, kPacked>(tile);
        case 10:
            return gemm_tile<Op, 10, kN, kAccumulate, kPacked>(tile);
        case 11:
            return gemm_tile<Op, 11, kN, kAccumulate, kPacked>(tile);
        default:
            return gemm_tile<Op, 12, kN, kAccumulate, kPacked>(tile);
#else
        default:
            return;
#endif
    }
}

// One register tile of at most kRows rows and `vecs` (1 or 2) vectors.
template <bool kPacked, class Op = MultiplyAdd>
static void gemm_block(int rows, int vecs, bool accumulate, const Tile& tile) {
    if (vecs == 2) {
        accumulate ? gemm_rows<Op, 2, true, kPacked>(rows, tile)
                   : gemm_rows<Op, 2, false, kPacked>(rows, tile);
    } else {
        accumulate ? gemm_rows<Op, 1, true, kPacked>(rows, tile)
                   : gemm_rows<Op, 1, false, kPacked>(rows, tile);
    }
}

// Sums of float32 in blocks of this many products: the rounding error of a sum grows with the root
// of the longest chain of additions. Transforms feed every later sum, so theirs are shorter.
constexpr int64_t kProductChain = 256;
constexpr int64_t kTransformChain = 64;

// gemm_block with its depth cut into equal blocks of at most `chain`. Inlined, it slows down the
// loops of its callers.
template <bool kPacked>
__attribute__((noinline)) static void gemm_chained(int rows, int vecs, bool accumulate,
                                                   int64_t chain, Tile tile) {
    const int64_t depth = tile.depth;
    if (depth <= chain) return gemm_block<kPacked>(rows, vecs, accumulate, tile);
    const int64_t step = ceil_div(depth, ceil_div(depth, chain));
    for (int64_t d = 0; d < depth; d += step) {
        tile.depth = min64(step, depth - d);
        gemm_block<kPacked>(rows, vecs, accumulate || d > 0, tile);
        tile.a += step * tile.a_depth;
        tile.b += step * tile.b_depth;
    }
}

// A transform by a table: any number of rows and vectors.
static inline void gemm(int64_t rows, int64_t vecs, bool accumulate, Tile tile) {
    const Tile whole = tile;
    // Equal blocks: a short last one would leave the multipliers waiting for their own results.
    const int64_t blocks = ceil_div(rows, kRows), step = ceil_div(rows, blocks);
    for (int64_t v = 0; v < vecs; v += kVecs) {
        for (int64_t m = 0; m < rows; m += step) {
            tile.a = whole.a + m * whole.a_row;
            tile.b = whole.b + v * kLanes;
            tile.c = whole.c + m * whole.c_row + v * kLanes;
            gemm_chained<false>(static_cast<int>(min64(step, rows - m)),
                                static_cast<int>(min64(kVecs, vecs - v)), accumulate,
                                kTransformChain, tile);
        }
    }
}

}  // namespace DSNO_ISA
