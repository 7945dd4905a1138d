// Normal numbers from Philox4x32-10 (Salmon et al., SC 2011) and the Box-Muller transform.
//
// Elements 4q .. 4q+3 come from one block r_0 .. r_3: key = the two halves of the seed (low first),
// counter = the halves of q, then those of the offset. With v_i = float(r_i) 2^-32 + 2^-33, rounded
// to float32, elements 4q and 4q+1 are sqrt(-2 log v_0) times cos and sin of 2 pi v_1, and so on
// with r_2, r_3. The reference and every kernel draw the same numbers up to rounding.
#pragma once

#include "simd.h"

namespace DSNO_ISA {

constexpr int kPhilox = 16;  // blocks at a time: loops over them become vectors

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

// -2 log v for v in (0, 1]: v = 2^e m, m in [sqrt(1/2), sqrt(2)), and a polynomial in m - 1
// (Cephes, logf).
DSNO_INLINE float minus_two_log(float v) {
    const uint32_t bits = to_bits(v);
    const int32_t e = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;
    const float f = from_bits(bits - (static_cast<uint32_t>(e) << 23)) - 1.0f;
    const float z = f * f, power = static_cast<float>(e);
    float p = 7.0376836292e-2f;
    p = p * f - 1.1514610310e-1f;
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
DSNO_INLINE void turn(float v, float* cosine, float* sine) {
    const int32_t quarter = static_cast<int32_t>(v * 4.0f + 0.5f);
    const float x = (v - 0.25f * static_cast<float>(quarter)) * 6.28318530717958648f, z = x * x;
    float s = -1.9515295891e-4f;
    s = s * z + 8.3321608736e-3f;
    s = s * z - 1.6666654611e-1f;
    s = s * z * x + x;
    float c = 2.443315711809948e-5f;
    c = c * z - 1.388731625493765e-3f;
    c = c * z + 4.166664568298827e-2f;
    c = c * z * z - 0.5f * z + 1.0f;
    const float swapped_c = quarter & 1 ? -s : c, swapped_s = quarter & 1 ? c : s;
    *cosine = quarter & 2 ? -swapped_c : swapped_c;
    *sine = quarter & 2 ? -swapped_s : swapped_s;
}

// The kPhilox blocks of counters from q on: 4 kPhilox normal numbers.
static void normal_blocks(uint64_t seed, uint64_t offset, uint64_t q, float* out) {
    uint32_t r[4][kPhilox];
    for (int i = 0; i < kPhilox; ++i) {
        const uint64_t counter = q + static_cast<uint64_t>(i);
        r[0][i] = static_cast<uint32_t>(counter);
        r[1][i] = static_cast<uint32_t>(counter >> 32);
        r[2][i] = static_cast<uint32_t>(offset);
        r[3][i] = static_cast<uint32_t>(offset >> 32);
    }
    uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    for (int round = 0; round < 10; ++round) {
        for (int i = 0; i < kPhilox; ++i) {
            const uint64_t first = uint64_t{0xD2511F53u} * r[0][i];
            const uint64_t second = uint64_t{0xCD9E8D57u} * r[2][i];
            r[0][i] = static_cast<uint32_t>(second >> 32) ^ r[1][i] ^ key[0];
            r[1][i] = static_cast<uint32_t>(second);
            r[2][i] = static_cast<uint32_t>(first >> 32) ^ r[3][i] ^ key[1];
            r[3][i] = static_cast<uint32_t>(first);
        }
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
    for (int pair = 0; pair < 2; ++pair) {
        float radius[kPhilox], cosine[kPhilox], sine[kPhilox];
        for (int i = 0; i < kPhilox; ++i) {
            radius[i] = minus_two_log(static_cast<float>(r[2 * pair][i]) * 0x1p-32f + 0x1p-33f);
            turn(static_cast<float>(r[2 * pair + 1][i]) * 0x1p-32f + 0x1p-33f, &cosine[i],
                 &sine[i]);
        }
        for (int i = 0; i < kPhilox; i += kLanes) store(radius + i, square_root(load(radius + i)));
        for (int i = 0; i < kPhilox; ++i) {
            out[4 * i + 2 * pair] = radius[i] * cosine[i];
            out[4 * i + 2 * pair + 1] = radius[i] * sine[i];
        }
    }
}

// Room for `normal_block`: the numbers of whole calls of `normal_blocks` around a block.
constexpr int64_t normal_room(int64_t count) { return count + 8 * kPhilox; }

// The normal numbers of elements [start, start + count); returns where in `buffer` they begin.
static inline const float* normal_block(const uint64_t* seed, int64_t start, int64_t count,
                                        float* buffer) {
    const int64_t first = start / 4;
    const int64_t blocks = ceil_div(start + count, 4) - first;
    for (int64_t q = 0; q < blocks; q += kPhilox) {
        normal_blocks(seed[0], seed[1], static_cast<uint64_t>(first + q), buffer + 4 * q);
    }
    return buffer + (start - 4 * first);
}

}  // namespace DSNO_ISA
