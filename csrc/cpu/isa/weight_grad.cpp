// spectral_conv_weight_grad: which kernel serves a call.
#include "weight_grad.h"

#include "isa.h"

namespace DSNO_ISA {

bool spectral_conv_weight_grad(const WeightGradArgs& args) {
    if (rows_path_serves(args)) return spectral_conv_weight_grad_rows(args);
#if defined(__AMX_BF16__)
    if (args.precision == kBf16) return WeightGrad<Unit::kAmx, 1>(args).run();
    if (args.precision != kFp32) return WeightGrad<Unit::kAmx, 2>(args).run();
#elif defined(__AVX512BF16__)
    if (args.precision == kBf16) return WeightGrad<Unit::kDot, 1>(args).run();
#endif
    return WeightGrad<Unit::kFma, 1>(args).run();
}

}  // namespace DSNO_ISA
