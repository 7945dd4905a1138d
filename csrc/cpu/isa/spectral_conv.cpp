// spectral_conv: which kernel serves a call.
#include "conv.h"
#include "isa.h"

namespace DSNO_ISA {

bool spectral_conv(const ConvArgs& args) {
    if (rows_path_serves(args)) return spectral_conv_rows(args);
#if defined(__AMX_BF16__)
    // With tiles, the three products of split operands cost less than one in float32.
    if (args.precision == kBf16) return Conv<AmxEngine<false>>(args).run();
    if (args.precision != kFp32) return Conv<AmxEngine<true>>(args).run();
#elif defined(__AVX512BF16__)
    if (args.precision == kBf16) return Conv<DotEngine<false>>(args).run();
#endif
    return Conv<Fp32Engine>(args).run();
}

}  // namespace DSNO_ISA
