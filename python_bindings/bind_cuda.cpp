#include "bindings.h"

void bind_cuda(pybind11::module_& m) { (void)m; }
