#include <cstddef>
#include <cstring>
#include <stdexcept>

#include "launch.h"
#include "truncated_fft.cuh"

namespace dsno {
namespace {

struct Kernel {
    const char* name;
    const void* function;
};

#define DSNO_KERNEL_ROW(name, function) {#name, reinterpret_cast<const void*>(&name)},
const Kernel kKernels[] = {DSNO_TRUNCATED_FFT_KERNELS(DSNO_KERNEL_ROW)};
#undef DSNO_KERNEL_ROW

constexpr size_t kPointers = offsetof(TruncatedFftParams, n);
constexpr size_t kNumbers = (sizeof(TruncatedFftParams) - kPointers) / sizeof(i64);

}  // namespace

std::vector<std::string> truncated_fft_kernels() {
    std::vector<std::string> names;
    for (const Kernel& kernel : kKernels) names.emplace_back(kernel.name);
    return names;
}

void launch_truncated_fft(int64_t kernel, int64_t grid, const void* input, void* output,
                          const void* table, const std::vector<int64_t>& numbers,
                          std::uintptr_t stream) {
    if (numbers.size() != kNumbers) throw std::runtime_error("truncated_fft: wrong plan");
    TruncatedFftParams params{input, output, table};
    std::memcpy(reinterpret_cast<char*>(&params) + kPointers, numbers.data(),
                kNumbers * sizeof(i64));
    const Kernel& chosen = kKernels[kernel];
    void* arguments[] = {&params};
    const cudaError_t error =
        cudaLaunchKernel(chosen.function, dim3(static_cast<unsigned>(grid)), dim3(kThreads),
                         arguments, 0, reinterpret_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) {
        cudaGetLastError();  // a failed launch must not show again at the next call
        throw std::runtime_error(std::string(chosen.name) + ": " + cudaGetErrorName(error) + ": " +
                                 cudaGetErrorString(error) + " (grid=" + std::to_string(grid) +
                                 ", block=" + std::to_string(kThreads) + ")");
    }
}

int cuda_driver_version() {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace dsno
