// How the products of a tile are computed. An engine has its own layout of the panel (the planes of
// x of one tile) and of the weights (a block of output rows of one term):
//
//     Fp32Engine  panel [i][pixel],       weights [i][row]
//     DotEngine   panel [i/2][pixel][2],  weights [i/2][row][2]                  AVX512_BF16
//     AmxEngine   panel [i/2][pixel][2],  weights [i/32][row/16][row%16][i%32]   AMX
//
// The last two stand in bfloat16.h; with two parts their operands are sums of two bfloat16 (Term).
#pragma once

#include "mixing.h"

namespace DSNO_ISA {

// Input channels that are packed together.
constexpr int kPackChannels = 32;

// Re and Im of one mode of W for kPackChannels input channels (or fewer, then zeros) and a block of
// `rows` output rows: [i][step], or [row][kPackChannels] where an engine has kRowsFirst.
struct ModeWeights {
    const float *real, *imag;
    int64_t channels, rows, step;
};

// Output blocks of equal size, at most `limit` rows.
DSNO_INLINE int64_t block_step(int64_t O, int64_t limit) { return ceil_div(O, ceil_div(O, limit)); }

struct Fp32Engine {
    static constexpr bool kGauss = true;
    static constexpr int kParts = 1;
    static constexpr bool kRowsFirst = false;
    static constexpr int kChannels = 1;  // whose planes are finished together

    static int64_t step(int64_t O) { return block_step(O, kRows); }
    static int64_t channels(int64_t I) { return I; }
    static int64_t plane_bytes(int64_t I) { return I * kWidth * 4; }
    static int64_t block_bytes(int64_t I, int64_t step) { return I * step * 4; }

    // The channels from `first` on of one term.
    static void pack(const ModeWeights& w, const Term& term, int64_t first, char* block) {
        float* out = reinterpret_cast<float*>(block) + first * w.step;
        const int64_t floats = w.channels * w.step;
        for (int64_t j = 0; j < floats; j += kLanes) {
            const Vec value =
                set1(term.real) * load(w.real + j) + set1(term.imag) * load(w.imag + j);
            store_some(reinterpret_cast<char*>(out + j), kFloat32, value,
                       static_cast<int>(floats - j));
        }
    }

    // Where the planes of channel c are written, target_stride floats apart.
    static float* target(char* panel, float*, int64_t c, int) {
        return reinterpret_cast<float*>(panel) + c * kWidth;
    }
    static int64_t target_stride(int64_t I) { return I * kWidth; }
    static void finish(char*, const float*, int64_t, int64_t, int, int) {}

    static void begin() {}
    static void end() {}

    // acc [rows][kWidth] = sum over terms of block times plane.
    static void multiply(const Term* terms, int count, const char* blocks, int64_t block_bytes,
                         const char* panel, int, int64_t I, int64_t step, int rows, int vecs,
                         float* acc) {
        for (int j = 0; j < count; ++j) {
            const float* block = reinterpret_cast<const float*>(blocks + j * block_bytes);
            const float* plane =
                reinterpret_cast<const float*>(panel + terms[j].x * plane_bytes(I));
            if (I <= kProductChain) {  // most layers: without the call
                gemm_block<true>(rows, vecs, j > 0,
                                 {block, 1, step, plane, kWidth, acc, kWidth, I});
                continue;
            }
            gemm_chained<true>(rows, vecs, j > 0, kProductChain,
                               {block, 1, step, plane, kWidth, acc, kWidth, I});
        }
    }
};

}  // namespace DSNO_ISA
