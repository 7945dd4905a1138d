// A kernel without the barrier it needs; ThreadSanitizer must say so.
#include "cuda_shim.h"

namespace {

void kernel(int* out) {
    __shared__ int value;
    if (threadIdx.x == 0) value = 1;
    out[threadIdx.x] = value;
}

}  // namespace

int main() {
    int out[32];
    run_grid(kernel, 1, 32, static_cast<int*>(out));
}
