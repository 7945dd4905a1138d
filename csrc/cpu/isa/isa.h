// The functions that one instruction set offers.
#pragma once

#include "../kernels.h"

namespace DSNO_ISA {

bool spectral_conv(const ConvArgs& args);
bool spectral_conv_weight_grad(const WeightGradArgs& args);
bool spectral_conv_backward(const ConvArgs& conv, const WeightGradArgs& grad);
bool truncated_rfft(const TransformArgs& args);
bool truncated_irfft(const TransformArgs& args);
bool exp_step(const ExpStepArgs& args);
bool exp_step_backward(const ExpStepBackwardArgs& args);
bool solver_step(const SolverStepArgs& args);
bool abs_rank(const AbsRankArgs& args);
bool noised(const NoisedArgs& args);
bool denoising_loss(const DenoisingLossArgs& args);

// Long signals that lie contiguous in memory have kernels of their own.
bool rows_path_serves(const ConvArgs& args);
bool spectral_conv_rows(const ConvArgs& args);
bool rows_path_serves(const WeightGradArgs& args);
bool spectral_conv_weight_grad_rows(const WeightGradArgs& args);
bool rows_path_serves(const TransformArgs& args);
bool truncated_rfft_rows(const TransformArgs& args);
bool truncated_irfft_rows(const TransformArgs& args);

}  // namespace DSNO_ISA
