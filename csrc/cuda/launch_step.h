// The host side of the kernels of the integrator steps, as the bindings see it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace dsno {

// Names of the kernels of exp_step.cuh, solver_step.cuh, abs_rank.cuh and denoising.cuh; their
// places are the ids that launch_step takes.
std::vector<std::string> step_kernels();

// Launch one kernel on a stream of the current device. `params` holds the bytes of the kernel's
// struct. Throws std::runtime_error with the kernel, its grid and CUDA's words.
void launch_step(int64_t kernel, int64_t grid, const char* params, size_t bytes,
                 std::uintptr_t stream);

}  // namespace dsno
