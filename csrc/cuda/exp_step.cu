#include <stdexcept>

#include "abs_rank.cuh"
#include "denoising.cuh"
#include "exp_step.cuh"
#include "launch_step.h"
#include "solver_step.cuh"

namespace dsno {
namespace {

struct Kernel {
    const char* name;
    const void* function;
    size_t bytes;  // of its parameters
};

#define DSNO_KERNEL_ROW(name, Params, function) \
    {#name, reinterpret_cast<const void*>(&name), sizeof(Params)},
const Kernel kKernels[] = {
    DSNO_EXP_STEP_KERNELS(DSNO_KERNEL_ROW) DSNO_SOLVER_STEP_KERNELS(DSNO_KERNEL_ROW)
        DSNO_ABS_RANK_KERNELS(DSNO_KERNEL_ROW) DSNO_DENOISING_KERNELS(DSNO_KERNEL_ROW)};
#undef DSNO_KERNEL_ROW

}  // namespace

std::vector<std::string> step_kernels() {
    std::vector<std::string> names;
    for (const Kernel& kernel : kKernels) names.emplace_back(kernel.name);
    return names;
}

void launch_step(int64_t kernel, int64_t grid, const char* params, size_t bytes,
                 std::uintptr_t stream) {
    const Kernel& chosen = kKernels[kernel];
    if (bytes != chosen.bytes) {
        throw std::runtime_error(std::string(chosen.name) + ": wrong parameters");
    }
    void* arguments[] = {const_cast<char*>(params)};
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

}  // namespace dsno
