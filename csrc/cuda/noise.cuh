// Normal numbers from Philox4x32-10 and the Box-Muller transform, as csrc/cpu/isa/noise.h defines
// them: the same bits up to the uniform numbers, and the same numbers up to the rounding of log,
// sqrt, cos and sin (2e-6 in float32).
#pragma once

#include "steps.cuh"

namespace dsno {

struct PhiloxBlock {
    unsigned r0, r1, r2, r3;
};

__device__ inline PhiloxBlock philox(u64 seed, u64 offset, u64 counter) {
    unsigned key0 = static_cast<unsigned>(seed), key1 = static_cast<unsigned>(seed >> 32);
    PhiloxBlock r{static_cast<unsigned>(counter), static_cast<unsigned>(counter >> 32),
                  static_cast<unsigned>(offset), static_cast<unsigned>(offset >> 32)};
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const u64 first = u64{0xD2511F53u} * r.r0, second = u64{0xCD9E8D57u} * r.r2;
        r = {static_cast<unsigned>(second >> 32) ^ r.r1 ^ key0, static_cast<unsigned>(second),
             static_cast<unsigned>(first >> 32) ^ r.r3 ^ key1, static_cast<unsigned>(first)};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return r;
}

// In (0, 1], rounded to float32.
__device__ inline float uniform(unsigned r) { return static_cast<float>(r) * 0x1p-32f + 0x1p-33f; }

__device__ inline void box_muller(float v0, float v1, float* first, float* second) {
    const float radius = sqrtf(-2.0f * logf(v0));
    float sine, cosine;
    sincospif(2.0f * v1, &sine, &cosine);
    *first = radius * cosine;
    *second = radius * sine;
}

__device__ inline void box_muller(double v0, double v1, double* first, double* second) {
    const double radius = sqrt(-2.0 * log(v0));
    double sine, cosine;
    sincospi(2.0 * v1, &sine, &cosine);
    *first = radius * cosine;
    *second = radius * sine;
}

// Numbers i .. i + N - 1; i is a multiple of N.
template <int N, typename A>
__device__ inline void normal_numbers(u64 seed, u64 offset, i64 i, A* z) {
    if constexpr (N >= 4) {
#pragma unroll
        for (int j = 0; j < N; j += 4) {
            const PhiloxBlock r = philox(seed, offset, static_cast<u64>(i + j) / 4);
            box_muller(A(uniform(r.r0)), A(uniform(r.r1)), &z[j], &z[j + 1]);
            box_muller(A(uniform(r.r2)), A(uniform(r.r3)), &z[j + 2], &z[j + 3]);
        }
    } else {
        const PhiloxBlock r = philox(seed, offset, static_cast<u64>(i) / 4);
        const bool late = i & 2;
        A pair[2];
        box_muller(A(uniform(late ? r.r2 : r.r0)), A(uniform(late ? r.r3 : r.r1)), &pair[0],
                   &pair[1]);
        if constexpr (N == 2) z[1] = pair[1];
        z[0] = N == 1 && (i & 1) ? pair[1] : pair[0];
    }
}

}  // namespace dsno
