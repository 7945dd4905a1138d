#pragma once

#include <pybind11/pybind11.h>

void bind_cpu(pybind11::module_& m);
void bind_cpu_steps(pybind11::module_& m);
void bind_cpu_denoising(pybind11::module_& m);
#ifdef DSNO_KERNELS_CUDA
void bind_cuda(pybind11::module_& m);
void bind_cuda_steps(pybind11::module_& m);
#endif
