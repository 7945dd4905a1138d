// The shim against plain loops: shuffles, shared memory, barriers, atomics; and the 16-bit floats
// of common.cuh.
// clang-format off: the shim comes first
#include "cuda_shim.h"
#include "common.cuh"
// clang-format on

namespace {

using dsno::BFloat16;
using dsno::Half;
using dsno::narrow;
using dsno::widen;

constexpr unsigned kThreads = 96, kBlocks = 5;

struct Params {
    const float* values;  // [kBlocks, kThreads]
    float* sums;          // [kBlocks], by __shfl_down_sync and shared memory
    float* total;         // the sum of `sums`, by the block that finishes last
    unsigned* finished;
    int* lane_sums;                // [kThreads], by __shfl_xor_sync, in segments of 8 lanes
    unsigned long long* neighbor;  // [kThreads], of the first lane of each segment of 16
};

void kernel(const Params p) {
    __shared__ float partial[kThreads / warpSize];
    __shared__ bool last;
    const unsigned thread = threadIdx.x, block = blockIdx.x;
    float sum = p.values[block * blockDim.x + thread];
    for (unsigned delta = warpSize / 2; delta > 0; delta /= 2) {
        sum += __shfl_down_sync(0xffffffffu, sum, delta);
    }
    if (thread % warpSize == 0) partial[thread / warpSize] = sum;
    __syncthreads();
    if (thread == 0) {
        p.sums[block] = partial[0] + partial[1] + partial[2];
        __threadfence();
        last = atomicAdd(p.finished, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (last && thread == 0) {
        for (unsigned b = 0; b < gridDim.x; ++b) *p.total += p.sums[b];
    }

    int count = static_cast<int>(thread);
    for (int lanes = 4; lanes > 0; lanes /= 2) count += __shfl_xor_sync(0xffffffffu, count, lanes);
    p.lane_sums[thread] = count;
    __syncwarp();
    p.neighbor[thread] = __shfl_sync(0xffffffffu, (1ull << 40) + thread, 16, 16);
}

bool failed = false;

void expect(bool right, const char* what, double at) {
    if (right) return;
    failed = true;
    std::fprintf(stderr, "%s is wrong at %g\n", what, at);
}

// Every 16-bit number keeps its bits, and what lies between two goes to the nearer one.
template <typename T>
void expect_rounding(unsigned infinity, unsigned largest, const char* what) {
    for (unsigned bits = 0; bits < 0x10000; ++bits) {
        const T number{static_cast<unsigned short>(bits)};
        const float value = widen(number);
        if ((bits & 0x7fff) > infinity) {
            expect(std::isnan(value) && std::isnan(widen(narrow<T>(value))), what, bits);
            continue;
        }
        expect(narrow<T>(value).bits == bits, what, value);
        if ((bits & 0x7fff) >= largest) continue;
        const T next{static_cast<unsigned short>(bits + 1)};
        const float beyond = widen(next), middle = value / 2 + beyond / 2;
        expect(narrow<T>(middle).bits == (bits & 1 ? next : number).bits, what, middle);
        expect(narrow<T>(std::nextafter(middle, beyond)).bits == next.bits, what, middle);
        expect(narrow<T>(std::nextafter(middle, value)).bits == bits, what, middle);
    }
}

}  // namespace

int main() {
    std::vector<float> values(kBlocks * kThreads), sums(kBlocks);
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i * i % 101);
    std::vector<int> lane_sums(kThreads);
    std::vector<unsigned long long> neighbor(kThreads);
    float total = 0, all = 0;
    unsigned finished = 0;
    run_grid(
        kernel, kBlocks, kThreads,
        Params{values.data(), sums.data(), &total, &finished, lane_sums.data(), neighbor.data()});
    for (unsigned block = 0; block < kBlocks; ++block) {
        float sum = 0;  // whole numbers below 2^24: exact in any order
        for (unsigned i = 0; i < kThreads; ++i) sum += values[block * kThreads + i];
        expect(sums[block] == sum, "__shfl_down_sync", block);
        all += sum;
    }
    expect(finished == kBlocks, "atomicAdd", finished);
    expect(total == all, "the block that finishes last", total);
    for (unsigned thread = 0; thread < kThreads; ++thread) {
        const int first = static_cast<int>(thread / 8 * 8);
        expect(lane_sums[thread] == 8 * first + 28, "__shfl_xor_sync", thread);
        expect(neighbor[thread] == (1ull << 40) + thread / 16 * 16, "__shfl_sync", thread);
    }

    expect_rounding<Half>(0x7c00, 0x7bff, "half");
    expect_rounding<BFloat16>(0x7f80, 0x7f7f, "bfloat16");
    expect(narrow<Half>(65519.0f).bits == 0x7bff, "largest half", 65519);
    expect(narrow<Half>(65520.0f).bits == 0x7c00, "half overflow", 65520);
    expect(narrow<Half>(-1e30f).bits == 0xfc00, "half overflow", -1e30);
    return failed;
}
