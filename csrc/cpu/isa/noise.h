// Normal numbers from Philox4x32-10 (Salmon et al., SC 2011) and the Box-Muller transform.
//
// Elements 4q .. 4q+3 come from one block r_0 .. r_3: key = the two halves of the seed (low first),
// counter = the halves of q, then those of the offset. With v_i = float(r_i) 2^-32 + 2^-33, rounded
// to float32, elements 4q and 4q+1 are sqrt(-2 log v_0) times cos and sin of 2 pi v_1, and so on
// with r_2, r_3. The reference and every kernel draw the same numbers up to rounding.
#pragma once

#include "simd.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace DSNO_ISA {

typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint64_t Wide __attribute__((vector_size(4 * kLanes)));

DSNO_INLINE Vec square_root(Vec x) {
#if defined(__AVX512F__)
    return _mm512_sqrt_ps(x);
#elif defined(__AVX2__)
    return _mm256_sqrt_ps(x);
#else
    for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}

// The products of the lower halves of 64-bit lanes with a factor.
DSNO_INLINE Wide products(Wide x, uint32_t factor) {
#if defined(__AVX512F__)
    return (Wide)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(factor));
#elif defined(__AVX2__)
    return (Wide)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(factor));
#elif defined(__SSE2__)
    return (Wide)_mm_mul_epu32((__m128i)x, _mm_set1_epi64x(factor));
#else
    for (int i = 0; i < kLanes / 2; ++i) x[i] = (x[i] & 0xffffffffu) * factor;
    return x;
#endif
}

// The upper and lower halves of the products of words with a factor.
DSNO_INLINE void multiply(Words x, uint32_t factor, Words* high, Words* low) {
    const Wide even = products((Wide)x, factor), odd = products((Wide)x >> 32, factor);
#if defined(__AVX512F__)
    // A half of one product goes into the place of a half of the other: one operation each.
    const auto a = (__m512i)even, b = (__m512i)odd;
    *high = (Words)_mm512_mask_shuffle_epi32(b, 0x5555, a, _MM_PERM_DDBB);
    *low = (Words)_mm512_mask_shuffle_epi32(a, 0xaaaa, b, _MM_PERM_CCAA);
#else
    const Wide lower = Wide{} + 0xffffffffu;
    *high = (Words)(even >> 32 | (odd & ~lower));
    *low = (Words)((even & lower) | odd << 32);
#endif
}

// In (0, 1].
DSNO_INLINE Vec uniform(Words r) { return __builtin_convertvector(r, Vec) * 0x1p-32f + 0x1p-33f; }

// -2 log v for v in (0, 1]: v = 2^e m, m in [sqrt(1/2), sqrt(2)), and a polynomial in m - 1
// (Cephes, logf).
DSNO_INLINE Vec minus_two_log(Vec v) {
    const Words bits = (Words)v;
    const Ints e = (Ints)(bits - 0x3f3504f3u) >> 23;
    const Vec f = (Vec)(bits - ((Words)e << 23)) - 1.0f;
    const Vec z = f * f, power = __builtin_convertvector(e, Vec);
    Vec p = 7.0376836292e-2f * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    p = p * f * z - 2.12194440e-4f * power - 0.5f * z;
    return -2.0f * (f + p + 0.693359375f * power);
}

// cos and sin of 2 pi v for v in (0, 1]: v = quarter / 4 + r, and polynomials in 2 pi r (Cephes,
// sinf and cosf).
DSNO_INLINE void turn(Vec v, Vec* cosine, Vec* sine) {
    const Ints quarter = __builtin_convertvector(v * 4.0f + 0.5f, Ints);
    const Vec x = (v - 0.25f * __builtin_convertvector(quarter, Vec)) * 6.28318530717958648f;
    const Vec z = x * x;
    Vec s = -1.9515295891e-4f * z + 8.3321608736e-3f;
    s = s * z - 1.6666654611e-1f;
    s = s * z * x + x;
    Vec c = 2.443315711809948e-5f * z - 1.388731625493765e-3f;
    c = c * z + 4.166664568298827e-2f;
    c = c * z * z - 0.5f * z + 1.0f;
    // An odd quarter swaps the two; the cosine is negative in quarters 1 and 2, the sine in 2, 3.
    const Words odd = (Words) - (quarter & 1), cs = (Words)c, sn = (Words)s;
    *cosine = (Vec)(((cs & ~odd) | (sn & odd)) ^ ((Words)(quarter + 1) & 2u) << 30);
    *sine = (Vec)(((sn & ~odd) | (cs & odd)) ^ ((Words)quarter & 2u) << 30);
}

// A 4 x 4 transpose within each 16 bytes of four vectors.
DSNO_INLINE void transpose_quarters(Vec (&x)[4]) {
#if defined(__AVX512F__)
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(x[0], x[1]));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(x[0], x[1]));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(x[2], x[3]));
    const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(x[2], x[3]));
    x[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    x[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    x[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    x[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
#elif defined(__AVX2__)
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(x[0], x[1]));
    const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(x[0], x[1]));
    const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(x[2], x[3]));
    const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(x[2], x[3]));
    x[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
    x[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
    x[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
    x[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
#else
    transpose(x);
#endif
}

// The kLanes blocks of counters from q on: 4 kLanes normal numbers.
DSNO_INLINE void normal_blocks(uint64_t seed, uint64_t offset, uint64_t q, float* out) {
    Words r[4], place;
    for (unsigned i = 0; i < kLanes; ++i) place[i] = i % 4 * (kLanes / 4) + i / 4;
    r[0] = place + static_cast<uint32_t>(q);
    r[1] = static_cast<uint32_t>(q >> 32) - (Words)(r[0] < place);  // a carry is a mask of -1
    r[2] = Words{} + static_cast<uint32_t>(offset);
    r[3] = Words{} + static_cast<uint32_t>(offset >> 32);
    uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    for (int round = 0; round < 10; ++round) {
        Words high[2], low[2];
        multiply(r[0], 0xD2511F53u, &high[0], &low[0]);
        multiply(r[2], 0xCD9E8D57u, &high[1], &low[1]);
        r[0] = high[1] ^ r[1] ^ key[0];
        r[1] = low[1];
        r[2] = high[0] ^ r[3] ^ key[1];
        r[3] = low[0];
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
    Vec z[4];
    for (int pair = 0; pair < 2; ++pair) {
        const Vec radius = square_root(minus_two_log(uniform(r[2 * pair])));
        Vec cosine, sine;
        turn(uniform(r[2 * pair + 1]), &cosine, &sine);
        z[2 * pair] = radius * cosine;
        z[2 * pair + 1] = radius * sine;
    }
    transpose_quarters(z);
    for (int k = 0; k < 4; ++k) store(out + k * kLanes, z[k]);
}

// Room for `normal_block`: the numbers of whole calls of `normal_blocks` around a block.
constexpr int64_t normal_room(int64_t count) { return count + 8 * kLanes; }

// The normal numbers of elements [start, start + count); returns where in `buffer` they begin.
static inline const float* normal_block(const uint64_t* seed, int64_t start, int64_t count,
                                        float* buffer) {
    const int64_t first = start / 4;
    const int64_t blocks = ceil_div(start + count, 4) - first;
    for (int64_t q = 0; q < blocks; q += kLanes) {
        normal_blocks(seed[0], seed[1], static_cast<uint64_t>(first + q), buffer + 4 * q);
    }
    return buffer + (start - 4 * first);
}

}  // namespace DSNO_ISA
