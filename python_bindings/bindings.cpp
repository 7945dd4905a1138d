// The one extension module, dsno_kernels._C: raw pointers, sizes, strides and a stream; no torch headers, so that one
// binary serves every torch version. Checks live in Python; launchers trust their arguments.
#include "bindings.h"

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of dsno_kernels.";
    bind_cpu(m);
#ifdef DSNO_KERNELS_CUDA
    bind_cuda(m);
#endif
}
