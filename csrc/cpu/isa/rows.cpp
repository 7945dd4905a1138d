#include "isa.h"

namespace DSNO_ISA {

bool rows_path_serves(const ConvArgs&) { return false; }
bool spectral_conv_rows(const ConvArgs&) { return false; }
bool rows_path_serves(const WeightGradArgs&) { return false; }
bool spectral_conv_weight_grad_rows(const WeightGradArgs&) { return false; }

}  // namespace DSNO_ISA
