#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "bindings.h"
#include "cuda/launch.h"

namespace py = pybind11;

namespace {

// Raised with every change of the signatures and plans below; dsno_kernels/backends/cuda.py expects
// it.
constexpr int kApi = 4;

}  // namespace

void bind_cuda(py::module_& m) {
    m.attr("cuda_api") = kApi;
    m.def("cuda_driver_version", &dsno::cuda_driver_version);
    m.def("cuda_truncated_fft_kernels", &dsno::truncated_fft_kernels);
    m.def(
        "cuda_truncated_fft",
        [](int64_t kernel, int64_t grid, std::uintptr_t input, std::uintptr_t output,
           std::uintptr_t table, const std::vector<int64_t>& numbers, std::uintptr_t stream) {
            py::gil_scoped_release release;
            dsno::launch_truncated_fft(kernel, grid, reinterpret_cast<const void*>(input),
                                       reinterpret_cast<void*>(output),
                                       reinterpret_cast<const void*>(table), numbers, stream);
        },
        py::arg("kernel"), py::arg("grid"), py::arg("input"), py::arg("output"), py::arg("table"),
        py::arg("numbers"), py::arg("stream"));
    bind_cuda_steps(m);
}
