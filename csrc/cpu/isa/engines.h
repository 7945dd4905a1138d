// How the products of a tile are computed. An engine has its own layout of the panel (the planes of
// x of one tile, `plane_bytes` each) and of the weights (one block of `step` output channels of one
// term, `block_bytes`):
//
//     Fp32Engine   float32 FMA                         panel [i][pixel],        weights [i][row]
//     DotEngine    AVX512_BF16, pairs of channels      panel [i/2][pixel][2],   weights
//     [i/2][row][2] AmxEngine    AMX tiles of 16 rows x 32 channels  panel [i/2][pixel][2], weights
//     [i/32][row/16][row%16][i%32]
#pragma once

#include "mixing.h"

namespace DSNO_ISA {

// One value of W, as terms combine it.
struct WeightView {
    const float* data;
    int64_t stride_i, stride_o, stride_k, stride_part;
    float sign;  // -1 for conj(W)

    float value(const Term& term, int64_t i, int64_t o) const {
        const float* p = data + i * stride_i + o * stride_o + term.k * stride_k;
        return term.real * p[0] + term.imag * sign * p[stride_part];
    }
};

// [first, last) of `size`.
struct Span {
    int64_t first, last, size;
};

// Output blocks of equal size, at most `limit` rows.
DSNO_INLINE int64_t block_step(int64_t O, int64_t limit) { return ceil_div(O, ceil_div(O, limit)); }

struct Fp32Engine {
    static constexpr bool kGauss = true;
    static constexpr int kParts = 1;
    static constexpr int kChannels = 1;  // channels that are packed together

    static int64_t step(int64_t O) { return block_step(O, kRows); }
    static int64_t channels(int64_t I) { return I; }
    static int64_t plane_bytes(int64_t I) { return I * kWidth * 4; }
    static int64_t block_bytes(int64_t I, int64_t step) { return I * step * 4; }

    // Channels `i` of a block of rows `o` of every term; the blocks of the terms lie block_bytes
    // apart.
    static void pack(const WeightView& w, const Term* terms, int count, const Span& o,
                     const Span& i, char* blocks, int64_t block_bytes) {
        for (int64_t c = i.first; c < i.last; ++c) {
            for (int j = 0; j < count; ++j) {
                float* out = reinterpret_cast<float*>(blocks + j * block_bytes) + c * o.size;
                for (int64_t m = 0; m < o.last - o.first; ++m)
                    out[m] = w.value(terms[j], c, o.first + m);
            }
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
            gemm_block<true>(rows, vecs, j > 0, {block, 1, step, plane, kWidth, acc, kWidth, I});
        }
    }
};

}  // namespace DSNO_ISA
