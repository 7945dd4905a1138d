// The host side of the CUDA kernels, as the bindings see it: no CUDA header is needed to call it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace dsno {

// Names of the kernels of truncated_fft.cuh; their places are the ids that launch_truncated_fft
// takes.
std::vector<std::string> truncated_fft_kernels();

// Launch one kernel on a stream of the current device. `numbers` are the fields of
// TruncatedFftParams after its three pointers, in order. Throws std::runtime_error with the kernel,
// its grid and CUDA's words.
void launch_truncated_fft(int64_t kernel, int64_t grid, const void* input, void* output,
                          const void* table, const std::vector<int64_t>& numbers,
                          std::uintptr_t stream);

// The newest CUDA version that the driver serves, such as 13000; 0 where there is no driver.
int cuda_driver_version();

}  // namespace dsno
