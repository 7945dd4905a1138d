// One vector type an instruction set. Everything here has internal linkage inside a namespace of
// its own: a function shared between instruction sets could be linked from the wrong one. For the
// same reason no std:: template is used.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's AVX-512 headers initialize "undefined" registers with themselves.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define DSNO_INLINE static inline __attribute__((always_inline))

namespace DSNO_ISA {

DSNO_INLINE float from_bits(uint32_t u) {
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}
DSNO_INLINE uint32_t to_bits(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return u;
}
DSNO_INLINE uint16_t float_to_bf16(float x) {
    const uint32_t u = to_bits(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

#if defined(__AVX512F__)
constexpr int kLanes = 16;  // floats in a vector
constexpr int kRows = 12;   // rows of a register tile of the channel product
using Vec = __m512;
DSNO_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
DSNO_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
DSNO_INLINE void stream(float* p, Vec x) { _mm512_stream_ps(p, x); }
DSNO_INLINE void fence_streams() { _mm_sfence(); }
DSNO_INLINE Vec set1(float x) { return _mm512_set1_ps(x); }
DSNO_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
DSNO_INLINE unsigned positive_bits(Vec x) {
    return _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
}
DSNO_INLINE Vec scale_unless(unsigned bits, Vec x, Vec scale) {
    return _mm512_mask_mul_ps(x, static_cast<__mmask16>(~bits), x, scale);
}
DSNO_INLINE Vec load_bf16(const uint16_t* p) {
    const __m512i wide =
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
DSNO_INLINE Vec load_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
DSNO_INLINE __m512i bf16_bits(Vec x) {
    const __m512i u = _mm512_castps_si512(x);
    const __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), lsb);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_srli_epi32(_mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7fc00000)), 16);
}
DSNO_INLINE void store_bf16(uint16_t* p, Vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bf16_bits(x)));
}
DSNO_INLINE void store_half(uint16_t* p, Vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
DSNO_INLINE Vec reverse(Vec x) {
    const __m512i order = _mm512_set_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_permutexvar_ps(order, x);
}
DSNO_INLINE Vec swap_pairs(Vec x) { return _mm512_permute_ps(x, 0xb1); }

DSNO_INLINE void transpose(Vec (&r)[16]) {
    Vec t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRows = 6;
using Vec = __m256;
DSNO_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
DSNO_INLINE void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
DSNO_INLINE void stream(float* p, Vec x) { _mm256_stream_ps(p, x); }
DSNO_INLINE void fence_streams() { _mm_sfence(); }
DSNO_INLINE Vec set1(float x) { return _mm256_set1_ps(x); }
DSNO_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
DSNO_INLINE unsigned positive_bits(Vec x) {
    return static_cast<unsigned>(
        _mm256_movemask_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GT_OQ)));
}
DSNO_INLINE Vec scale_unless(unsigned bits, Vec x, Vec scale) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set =
        _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane), lane);
    return _mm256_blendv_ps(x * scale, x, _mm256_castsi256_ps(set));
}
DSNO_INLINE Vec load_bf16(const uint16_t* p) {
    const __m256i wide =
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
DSNO_INLINE Vec load_half(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
DSNO_INLINE void store_bf16(uint16_t* p, Vec x) {
    const __m256i u = _mm256_castps_si256(x);
    const __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i r = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), lsb);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i bits =
        _mm256_srli_epi32(_mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc00000), nan), 16);
    const __m128i packed =
        _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
DSNO_INLINE void store_half(uint16_t* p, Vec x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
DSNO_INLINE Vec reverse(Vec x) {
    return _mm256_permutevar8x32_ps(x, _mm256_setr_epi32(7, 6, 5, 4, 3, 2, 1, 0));
}
DSNO_INLINE Vec swap_pairs(Vec x) { return _mm256_permute_ps(x, 0xb1); }

DSNO_INLINE void transpose(Vec (&r)[8]) {
    Vec t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
        t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) r[i] = t[i];
}

#else
constexpr int kLanes = 4;
constexpr int kRows = 6;
typedef float Vec __attribute__((vector_size(16)));
typedef float UnalignedVec __attribute__((vector_size(16), aligned(4), may_alias));
DSNO_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
DSNO_INLINE void store(float* p, Vec x) { *reinterpret_cast<UnalignedVec*>(p) = x; }
DSNO_INLINE void stream(float* p, Vec x) { store(p, x); }
DSNO_INLINE void fence_streams() {}
DSNO_INLINE Vec set1(float x) { return Vec{x, x, x, x}; }
DSNO_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
DSNO_INLINE unsigned positive_bits(Vec x) {
    unsigned bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= (x[i] > 0.0f ? 1u : 0u) << i;
    return bits;
}
DSNO_INLINE Vec scale_unless(unsigned bits, Vec x, Vec scale) {
    for (int i = 0; i < kLanes; ++i) x[i] = (bits >> i & 1) ? x[i] : x[i] * scale[i];
    return x;
}
DSNO_INLINE float half_to_float(uint16_t h) {
    const uint32_t sign = (h & 0x8000u) << 16, magnitude = h & 0x7fffu;
    if (magnitude >= 0x7c00u) return from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    if (magnitude >= 0x400u) return from_bits(sign | ((magnitude << 13) + 0x38000000u));
    const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
    return sign ? -subnormal : subnormal;
}
DSNO_INLINE uint16_t float_to_half(float x) {
    const uint32_t u = to_bits(x), sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);
    // Below 2^-14 the addition of 0.5 leaves the rounded multiple of 2^-24 in the low bits.
    if (magnitude < 0x38800000u) {
        return static_cast<uint16_t>(sign | (to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u));
    }
    const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u;
    return static_cast<uint16_t>(sign | rounded >> 13);
}
DSNO_INLINE Vec load_bf16(const uint16_t* p) {
    Vec x;
    for (int i = 0; i < kLanes; ++i) x[i] = from_bits(uint32_t{p[i]} << 16);
    return x;
}
DSNO_INLINE Vec load_half(const uint16_t* p) {
    Vec x;
    for (int i = 0; i < kLanes; ++i) x[i] = half_to_float(p[i]);
    return x;
}
DSNO_INLINE void store_bf16(uint16_t* p, Vec x) {
    for (int i = 0; i < kLanes; ++i) p[i] = float_to_bf16(x[i]);
}
DSNO_INLINE void store_half(uint16_t* p, Vec x) {
    for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(x[i]);
}
DSNO_INLINE Vec reverse(Vec x) { return Vec{x[3], x[2], x[1], x[0]}; }
DSNO_INLINE Vec swap_pairs(Vec x) { return Vec{x[1], x[0], x[3], x[2]}; }
DSNO_INLINE void transpose(Vec (&r)[4]) {
    Vec t[4];
    for (int i = 0; i < 4; ++i) t[i] = Vec{r[0][i], r[1][i], r[2][i], r[3][i]};
    for (int i = 0; i < 4; ++i) r[i] = t[i];
}
#endif

constexpr int kVecs = 2;                // vectors of a register tile
constexpr int kWidth = kVecs * kLanes;  // pixels of a register tile

DSNO_INLINE Vec zero() { return set1(0.0f); }

DSNO_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
DSNO_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
DSNO_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
DSNO_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace DSNO_ISA
