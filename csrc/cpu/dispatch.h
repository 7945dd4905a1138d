// Which instruction sets this machine runs, best last, and which one the ops use.
#pragma once

#include "kernels.h"

namespace portable {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
namespace amx {
extern const Kernels kernels;
}
#endif

constexpr int kMaxIsas = 5;

// Fills `isas` with the kernels that can run here; returns how many.
int available_kernels(const Kernels* (&isas)[kMaxIsas]);

// The kernels in use: the best, unless use_kernels chose others.
const Kernels& active_kernels();

// Chooses by name; false for a name that cannot run here. For tests.
bool use_kernels(const char* name);
