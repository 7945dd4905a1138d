// The one extension module, dsno_kernels._C: raw pointers, sizes, strides and a stream; no torch
// headers, so that one binary serves every torch version. Checks live in Python; launchers trust
// their arguments.
#include "bindings.h"

#include "build_config.h"

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of dsno_kernels.";
    m.attr("build_info") = DSNO_BUILD_INFO;
    m.attr("cuda_version") = DSNO_CUDA_VERSION;  // "" where CUDA was not built
    m.attr("cuda_archs") = DSNO_CUDA_ARCHS;      // TORCH_CUDA_ARCH_LIST of the build
#ifdef DSNO_KERNELS_CPU
    bind_cpu(m);
#endif
#ifdef DSNO_KERNELS_CUDA
    bind_cuda(m);
#endif
}
