// Channel products in bfloat16 (AVX512_BF16 or AMX), accumulated in float32. A 32-bit word holds
// the values of two neighboring channels (of pixels, in the weight gradient), the first in its low
// half.
#pragma once

#include "engines.h"

#if defined(__AVX512BF16__)

namespace DSNO_ISA {

// The bfloat16 value nearest to x, as a float.
DSNO_INLINE Vec rounded(Vec x) {
    const __m512i bits = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

// Words (low, high) of two rows.
DSNO_INLINE Vec pack_words(Vec low, Vec high) {
    const __m512i first = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(low));
    const __m512i second = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(high));
    return _mm512_castsi512_ps(_mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
}

// 32 neighboring values of one row as 16 words.
DSNO_INLINE Vec pack_row(Vec first, Vec second) {
    return _mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(second, first));
}

#if defined(__AMX_BF16__)
constexpr int kTileRows = 16;
constexpr int kTileWords = 16;
constexpr int kTileBytes = kTileRows * kTileWords * 4;

// All tiles have 16 rows of 64 bytes: 0..3 accumulate, 4 and 5 hold rows of A, 6 and 7 columns of
// B.
static inline void configure_tiles() {
    alignas(64) uint8_t config[64] = {};
    config[0] = 1;  // palette
    for (int tile = 0; tile < 8; ++tile) {
        config[16 + 2 * tile] = 64;  // bytes of a row, 16 bits
        config[48 + tile] = kTileRows;
    }
    _tile_loadconfig(config);
}

// acc [16 kA][kWidth] (+)= A B, with A of `steps` blocks of 32 values, `a_step` bytes apart, in
// tiles `a_tile` bytes apart with rows `a_row` bytes apart, and B [16 steps][kWidth] words.
template <int kA, int kB>
DSNO_INLINE void amx_accumulate(const char* a, int64_t a_row, int64_t a_tile, int64_t a_step,
                                const char* b, int64_t steps) {
    constexpr int64_t kRowBytes = kWidth * 4;
    for (int64_t s = 0; s < steps; ++s) {
        _tile_loadd(4, a, a_row);
        _tile_loadd(6, b, kRowBytes);
        _tile_dpbf16ps(0, 4, 6);
        if (kB == 2) {
            _tile_loadd(7, b + 64, kRowBytes);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (kA == 2) {
            _tile_loadd(5, a + a_tile, a_row);
            _tile_dpbf16ps(2, 5, 6);
            if (kB == 2) _tile_dpbf16ps(3, 5, 7);
        }
        a += a_step;
        b += kTileRows * kRowBytes;
    }
}

template <int kA, int kB>
DSNO_INLINE void amx_zero() {
    _tile_zero(0);
    if (kB == 2) _tile_zero(1);
    if (kA == 2) _tile_zero(2);
    if (kA == 2 && kB == 2) _tile_zero(3);
}

template <int kA, int kB>
DSNO_INLINE void amx_load(const float* acc) {
    _tile_loadd(0, acc, kWidth * 4);
    if (kB == 2) _tile_loadd(1, acc + 16, kWidth * 4);
    if (kA == 2) _tile_loadd(2, acc + kTileRows * kWidth, kWidth * 4);
    if (kA == 2 && kB == 2) _tile_loadd(3, acc + kTileRows * kWidth + 16, kWidth * 4);
}

template <int kA, int kB>
DSNO_INLINE void amx_store(float* acc) {
    _tile_stored(0, acc, kWidth * 4);
    if (kB == 2) _tile_stored(1, acc + 16, kWidth * 4);
    if (kA == 2) _tile_stored(2, acc + kTileRows * kWidth, kWidth * 4);
    if (kA == 2 && kB == 2) _tile_stored(3, acc + kTileRows * kWidth + 16, kWidth * 4);
}

// The compiler does not know that tile loads read memory.
DSNO_INLINE void finish_stores() { __asm__ volatile("" ::: "memory"); }
#endif

// What both engines share. kSplit: operands in two parts.
template <bool kSplit>
struct PairEngine {
    static constexpr bool kGauss = false;
    static constexpr int kParts = kSplit ? 2 : 1;
    static constexpr int kChannels = 2;

    static float* target(char*, float* lines, int64_t c, int planes) {
        return lines + c % 2 * planes * kWidth;
    }
    static int64_t target_stride(int64_t) { return kWidth; }

    // Packs the planes of channels c - 1 and c, or of the last one alone.
    template <class Engine>
    static void pack_channels(char* panel, const float* lines, int64_t c, int64_t I, int planes,
                              int vecs) {
        if (c % 2 == 0 && c + 1 < I) return;
        const int64_t plane_bytes = Engine::plane_bytes(I);
        for (int plane = 0; plane < planes; ++plane) {
            const float* low = lines + plane * kWidth;
            const float* high = low + planes * kWidth;
            float* out = reinterpret_cast<float*>(panel + plane * plane_bytes) + c / 2 * kWidth;
            float* out_low =
                reinterpret_cast<float*>(panel + (planes + plane) * plane_bytes) + c / 2 * kWidth;
            for (int v = 0; v < vecs; ++v) {
                const Vec first = load(low + v * kLanes),
                          second = c % 2 ? load(high + v * kLanes) : zero();
                store(out + v * kLanes, pack_words(first, second));
                if (kSplit)
                    store(out_low + v * kLanes,
                          pack_words(first - rounded(first), second - rounded(second)));
            }
        }
        if (c + 1 < I) return;
        for (int plane = 0; plane < planes * kParts; ++plane) {
            float* rows = reinterpret_cast<float*>(panel + plane * plane_bytes);
            const int64_t used = (c / 2 + 1) * kWidth;
            std::memset(rows + used, 0, static_cast<size_t>(plane_bytes - 4 * used));
        }
    }

    // The part of a combination of weights that a term names.
    static Vec value(const Term& term, const float* real, const float* imag) {
        const Vec whole = set1(term.real) * load(real) + set1(term.imag) * load(imag);
        return kSplit && term.w_part ? whole - rounded(whole) : whole;
    }
};

template <bool kSplit>
struct DotEngine : PairEngine<kSplit> {
    using Base = PairEngine<kSplit>;

    static int64_t step(int64_t O) { return block_step(O, kRows); }
    static int64_t plane_bytes(int64_t I) { return ceil_div(I, 2) * kWidth * 4; }
    static int64_t block_bytes(int64_t I, int64_t step) { return ceil_div(I, 2) * step * 4; }

    static constexpr bool kRowsFirst = false;

    static void pack(const ModeWeights& w, const Term& term, int64_t first, char* block) {
        for (int64_t c = 0; c < w.channels; c += 2) {
            float* out = reinterpret_cast<float*>(block) + (first + c) / 2 * w.step;
            for (int64_t m = 0; m < w.rows; m += kLanes) {
                const int64_t low = c * w.step + m, high = low + w.step;
                const Vec words = pack_words(Base::value(term, w.real + low, w.imag + low),
                                             Base::value(term, w.real + high, w.imag + high));
                store_some(reinterpret_cast<char*>(out + m), kFloat32, words,
                           static_cast<int>(w.rows - m));
            }
        }
    }

    static void finish(char* panel, const float* lines, int64_t c, int64_t I, int planes,
                       int vecs) {
        Base::template pack_channels<DotEngine>(panel, lines, c, I, planes, vecs);
    }

    static void begin() {}
    static void end() {}

    static void multiply(const Term* terms, int count, const char* blocks, int64_t block_bytes,
                         const char* panel, int planes, int64_t I, int64_t step, int rows, int vecs,
                         float* acc) {
        for (int j = 0; j < count; ++j) {
            const float* block = reinterpret_cast<const float*>(blocks + j * block_bytes);
            const int plane_index = terms[j].x + terms[j].x_part * planes;
            const float* plane =
                reinterpret_cast<const float*>(panel + plane_index * plane_bytes(I));
            gemm_block<true, DotAdd>(rows, vecs, j > 0,
                                     {block, 1, step, plane, kWidth, acc, kWidth, ceil_div(I, 2)});
        }
    }
};

#if defined(__AMX_BF16__)
template <bool kSplit>
struct AmxEngine : PairEngine<kSplit> {
    using Base = PairEngine<kSplit>;

    static int64_t step(int64_t O) { return O <= kTileRows ? kTileRows : 2 * kTileRows; }
    static int64_t steps(int64_t I) { return ceil_div(I, 2 * kTileWords); }
    static int64_t plane_bytes(int64_t I) { return steps(I) * kTileWords * kWidth * 4; }
    static int64_t block_bytes(int64_t I, int64_t step) {
        return steps(I) * (step / kTileRows) * kTileBytes;
    }

    static constexpr bool kRowsFirst = true;

    static void pack(const ModeWeights& w, const Term& term, int64_t first, char* block) {
        const int64_t step_bytes = w.step / kTileRows * kTileBytes;
        float* out = reinterpret_cast<float*>(block + first / kPackChannels * step_bytes);
        for (int64_t m = 0; m < w.step; ++m) {
            const int64_t at = m * kPackChannels;
            store(out + m * kTileWords,
                  pack_row(Base::value(term, w.real + at, w.imag + at),
                           Base::value(term, w.real + at + 16, w.imag + at + 16)));
        }
    }

    static void finish(char* panel, const float* lines, int64_t c, int64_t I, int planes,
                       int vecs) {
        Base::template pack_channels<AmxEngine>(panel, lines, c, I, planes, vecs);
    }

    static void begin() { configure_tiles(); }
    static void end() { _tile_release(); }

    template <int kA, int kB>
    static void multiply_tiles(const Term* terms, int count, const char* blocks,
                               int64_t block_bytes, const char* panel, int planes, int64_t I,
                               float* acc) {
        amx_zero<kA, kB>();
        for (int j = 0; j < count; ++j) {
            const char* plane = panel + (terms[j].x + terms[j].x_part * planes) * plane_bytes(I);
            amx_accumulate<kA, kB>(blocks + j * block_bytes, 64, kTileBytes, kA * kTileBytes, plane,
                                   steps(I));
        }
        amx_store<kA, kB>(acc);
    }

    static void multiply(const Term* terms, int count, const char* blocks, int64_t block_bytes,
                         const char* panel, int planes, int64_t I, int64_t step, int, int vecs,
                         float* acc) {
        finish_stores();
        if (step == kTileRows) {
            vecs == 1
                ? multiply_tiles<1, 1>(terms, count, blocks, block_bytes, panel, planes, I, acc)
                : multiply_tiles<1, 2>(terms, count, blocks, block_bytes, panel, planes, I, acc);
        } else {
            vecs == 1
                ? multiply_tiles<2, 1>(terms, count, blocks, block_bytes, panel, planes, I, acc)
                : multiply_tiles<2, 2>(terms, count, blocks, block_bytes, panel, planes, I, acc);
        }
    }
};
#endif

}  // namespace DSNO_ISA

#endif
