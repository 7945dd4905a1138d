// Enough of CUDA to run csrc/cuda/*.cuh on the CPU: the threads of a block are std::threads,
// __syncthreads is a std::barrier, shared memory is static, blocks run one after another.
#pragma once

#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

#define DSNO_CUDA_SHIM
#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

struct Index {
    unsigned x;
};
inline thread_local Index threadIdx, blockIdx;
inline std::barrier<>* block_barrier = nullptr;

inline void __syncthreads() { block_barrier->arrive_and_wait(); }

inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }

inline float half_bits_to_float(unsigned short bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    float size = std::ldexp(static_cast<float>(mantissa + (exponent ? 1024 : 0)),
                            (exponent ? exponent : 1) - 25);
    if (exponent == 31) size = mantissa ? NAN : INFINITY;
    return bits & 0x8000 ? -size : size;
}

template <typename Kernel, typename Params>
void run_grid(Kernel kernel, unsigned grid, unsigned threads, const Params& params) {
    std::barrier<> barrier(threads);
    block_barrier = &barrier;
    const auto work = [&](unsigned thread) {
        threadIdx.x = thread;
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
