// CUDA kernels of the integrator steps: a kernel's id, its grid, and the bytes of its parameters.
#ifdef DSNO_KERNELS_CUDA
#include <pybind11/stl.h>

#include "bindings.h"
#include "cuda/launch_step.h"

namespace py = pybind11;

void bind_cuda_steps(py::module_& m) {
    m.def("cuda_step_kernels", &dsno::step_kernels);
    m.def("cuda_step",
          [](int64_t kernel, int64_t grid, const py::bytes& params, std::uintptr_t stream) {
              char* data = nullptr;
              py::ssize_t size = 0;
              if (PyBytes_AsStringAndSize(params.ptr(), &data, &size))
                  throw py::error_already_set();
              py::gil_scoped_release release;
              dsno::launch_step(kernel, grid, data, static_cast<size_t>(size), stream);
          });
}
#endif
