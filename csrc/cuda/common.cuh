// What every kernel file needs. Compiled by nvcc, by NVRTC (which has no host headers) and, for the
// tests, by a C++20 compiler behind tests/cuda_shim/cuda_shim.h.
#pragma once

namespace dsno {

using i64 = long long;

constexpr int kThreads = 128;
// Blocks that fit a multiprocessor at once: 168 registers a thread, which no kernel exceeds.
constexpr int kBlocks = 3;

// 16-bit floats are carried as bits: no header of the CUDA toolkit is needed at run time.
struct Half {
    unsigned short bits;
};
struct BFloat16 {
    unsigned short bits;
};

// N values that move together: one instruction for each 16 bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
    T v[N];
};

// The type of the arithmetic.
template <typename T>
struct AccumulatorOf {
    using type = float;
};
template <>
struct AccumulatorOf<double> {
    using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(BFloat16 x) {
    return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}
__device__ inline float widen(Half x) {
    float result = 0;
#if defined(__CUDA_ARCH__)
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
#elif defined(DSNO_CUDA_SHIM)
    result = half_bits_to_float(x.bits);
#endif
    return result;
}

// To the type of storage: to the nearest number, ties to even.
template <typename T>
__device__ inline T narrow(Accumulator<T> x) {
    return x;
}
template <>
__device__ inline BFloat16 narrow<BFloat16>(float x) {
    const unsigned bits = __float_as_uint(x);
    if (x != x) return {0x7fff};
    return {static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
__device__ inline Half narrow<Half>(float x) {
    Half result{};
#if defined(__CUDA_ARCH__)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
#elif defined(DSNO_CUDA_SHIM)
    result.bits = float_to_half_bits(x);
#endif
    return result;
}

// Division of 64-bit numbers costs several times that of 32-bit ones, which most tensors allow.
__device__ inline i64 divide(i64 a, i64 b) {
    if (((a | b) >> 32) == 0) return static_cast<unsigned>(a) / static_cast<unsigned>(b);
    return a / b;
}

template <int N, typename T>
__device__ inline void load(const T* from, Accumulator<T>* to) {
    const Vector<T, N> packed = *reinterpret_cast<const Vector<T, N>*>(from);
#pragma unroll
    for (int j = 0; j < N; ++j) to[j] = widen(packed.v[j]);
}

template <int N, typename T>
__device__ inline Vector<T, N> packed(const Accumulator<T>* from) {
    Vector<T, N> result;
#pragma unroll
    for (int j = 0; j < N; ++j) result.v[j] = narrow<T>(from[j]);
    return result;
}

template <int N, typename T>
__device__ inline void store(T* to, const Accumulator<T>* from) {
    *reinterpret_cast<Vector<T, N>*>(to) = packed<N, T>(from);
}

// To global memory. The compiler splits wide stores of computed values, so the instruction is
// written out.
template <int N, typename T>
__device__ inline void store_global(T* to, const Accumulator<T>* from) {
#if defined(__CUDA_ARCH__)
    constexpr int kWords = sizeof(T) * N / 4;
    if constexpr (N > 1 && kWords >= 2) {
        const Vector<T, N> values = packed<N, T>(from);
        unsigned w[kWords];
        memcpy(w, &values, sizeof(values));
        const size_t address = __cvta_generic_to_global(to);
        if constexpr (kWords == 2) {
            asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(w[0]), "r"(w[1])
                         : "memory");
        } else {
#pragma unroll
            for (int j = 0; j < kWords; j += 4) {
                asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address + 4 * j),
                             "r"(w[j]), "r"(w[j + 1]), "r"(w[j + 2]), "r"(w[j + 3])
                             : "memory");
            }
        }
        return;
    }
#endif
    store<N>(to, from);
}

}  // namespace dsno
