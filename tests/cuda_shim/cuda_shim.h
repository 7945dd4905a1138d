// Enough of CUDA to run csrc/cuda/*.cuh on the CPU: the threads of a block are std::threads,
// __syncthreads is a std::barrier, shared memory is static, blocks run one after another. Shuffles
// go through an array of the warp; atomics are std::atomic_ref.
#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define DSNO_CUDA_SHIM
#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

struct Index {
    unsigned x = 0, y = 0, z = 0;
};
inline thread_local Index threadIdx, blockIdx;
inline Index blockDim{1, 1, 1}, gridDim{1, 1, 1};
constexpr int warpSize = 32;

struct Warp {
    explicit Warp(unsigned threads) : size(threads), barrier(threads) {}
    unsigned size;
    std::barrier<> barrier;
    uint64_t lanes[warpSize];
};

inline std::barrier<>* block_barrier = nullptr;
inline thread_local Warp* warp = nullptr;

inline void __syncthreads() { block_barrier->arrive_and_wait(); }

inline std::atomic<int> fence = 0;
inline void __threadfence() { fence.fetch_add(1); }  // ThreadSanitizer knows no bare fences

inline void check_mask(unsigned mask) {
    if (mask == 0xffffffffu && warp->size == warpSize) return;
    std::fprintf(stderr, "warp functions of the shim take full warps: mask %x of %u threads\n",
                 mask, warp->size);
    std::abort();
}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
    check_mask(mask);
    warp->barrier.arrive_and_wait();
}

// The value of lane `from` of the calling thread's warp.
template <typename T>
T shuffle(unsigned mask, T value, int from) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA shuffles 4 or 8 bytes");
    check_mask(mask);
    std::memcpy(&warp->lanes[threadIdx.x % warpSize], &value, sizeof(T));
    warp->barrier.arrive_and_wait();
    std::memcpy(&value, &warp->lanes[from], sizeof(T));
    warp->barrier.arrive_and_wait();  // the array may be written again
    return value;
}

// A source outside of the segment of `width` lanes gives the lane's own value, as in CUDA.
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
    const int lane = threadIdx.x % warpSize, from = lane + static_cast<int>(delta);
    return shuffle(mask, value, from / width == lane / width ? from : lane);
}

// A lane may read from an earlier segment, not from a later one.
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize) {
    const int lane = threadIdx.x % warpSize, from = lane ^ lanes;
    return shuffle(mask, value, from / width <= lane / width ? from : lane);
}

// A source beyond the segment wraps around.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
    const int lane = threadIdx.x % warpSize;
    return shuffle(mask, value, lane / width * width + (source & (width - 1)));
}

inline int atomicAdd(int* address, int value) {
    return std::atomic_ref<int>(*address).fetch_add(value);
}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
    return std::atomic_ref<unsigned>(*address).fetch_add(value);
}
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
    return std::atomic_ref<unsigned long long>(*address).fetch_add(value);
}

inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }

inline float half_bits_to_float(unsigned short bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    float size = std::ldexp(static_cast<float>(mantissa + (exponent ? 1024 : 0)),
                            (exponent ? exponent : 1) - 25);
    if (exponent == 31) size = mantissa ? NAN : INFINITY;
    return bits & 0x8000 ? -size : size;
}

// Round to nearest, ties to even; overflow gives infinity.
inline unsigned short float_to_half_bits(float value) {
    const unsigned sign = __float_as_uint(value) >> 16 & 0x8000;
    if (std::isnan(value)) return 0x7fff;
    const float size = std::fabs(value);
    if (size >= 65520.0f) return sign | 0x7c00;
    int exponent = 0;
    std::frexp(std::max(size, 0x1p-24f), &exponent);  // size = m 2^exponent, m in [0.5, 1)
    const int unit = std::max(exponent - 11, -24);
    const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, -unit)));
    return sign | (unit == -24 ? steps : ((unit + 24) << 10) + steps);
}

template <typename Kernel, typename Params>
void run_grid(Kernel kernel, unsigned grid, unsigned threads, const Params& params) {
    std::barrier<> barrier(threads);
    block_barrier = &barrier;
    blockDim.x = threads;
    gridDim.x = grid;
    std::vector<std::unique_ptr<Warp>> warps;
    for (unsigned first = 0; first < threads; first += warpSize) {
        warps.push_back(std::make_unique<Warp>(std::min<unsigned>(warpSize, threads - first)));
    }
    const auto work = [&](unsigned thread) {
        threadIdx.x = thread;
        warp = warps[thread / warpSize].get();
        for (unsigned block = 0; block < grid; ++block) {
            blockIdx.x = block;
            kernel(params);
            barrier.arrive_and_wait();  // shared memory passes to the next block
        }
    };
    std::vector<std::thread> pool;
    for (unsigned thread = 0; thread < threads; ++thread) pool.emplace_back(work, thread);
    for (std::thread& thread : pool) thread.join();
}
