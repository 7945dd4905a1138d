// The shim against plain loops: shuffles, shared memory, barriers, atomics, 16-bit floats.
#include "cuda_shim.h"

namespace {

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

    for (unsigned bits = 0; bits < 0x10000; ++bits) {
        const unsigned short half = static_cast<unsigned short>(bits);
        const float value = half_bits_to_float(half);
        if (std::isnan(value)) {
            expect(std::isnan(half_bits_to_float(float_to_half_bits(value))), "half NaN", bits);
            continue;
        }
        expect(float_to_half_bits(value) == half, "half", value);
        if ((bits & 0x7fff) >= 0x7bff) continue;
        // Halfway to the next number: to the even one; a little more or less: to the nearer one.
        const unsigned short next = half + 1;
        const float middle = (value + half_bits_to_float(next)) / 2;
        const float up = std::nextafter(middle, half_bits_to_float(next));
        const float down = std::nextafter(middle, value);
        expect(float_to_half_bits(middle) == (half & 1 ? next : half), "half tie", middle);
        expect(float_to_half_bits(up) == next, "half above a tie", up);
        expect(float_to_half_bits(down) == half, "half below a tie", down);
    }
    expect(half_bits_to_float(float_to_half_bits(1e6f)) == INFINITY, "half overflow", 1e6);
    expect(float_to_bfloat16_bits(1.0f) == 0x3f80, "bfloat16", 1);
    expect(float_to_bfloat16_bits(__uint_as_float(0x3f808000)) == 0x3f80, "bfloat16 tie", 0);
    expect(float_to_bfloat16_bits(__uint_as_float(0x3f818000)) == 0x3f82, "bfloat16 tie", 1);
    expect(float_to_bfloat16_bits(__uint_as_float(0x3f808001)) == 0x3f81, "bfloat16 up", 0);
    expect(float_to_bfloat16_bits(-INFINITY) == 0xff80, "bfloat16", -INFINITY);
    expect(float_to_bfloat16_bits(NAN) == 0x7fff, "bfloat16 NaN", 0);
    return failed;
}
