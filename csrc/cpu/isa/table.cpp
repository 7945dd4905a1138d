#include "../dispatch.h"
#include "isa.h"

#define DSNO_STRING_(x) #x
#define DSNO_STRING(x) DSNO_STRING_(x)

namespace DSNO_ISA {

extern const Kernels kernels;
const Kernels kernels = {DSNO_STRING(DSNO_ISA),
                         spectral_conv,
                         spectral_conv_weight_grad,
                         spectral_conv_backward,
                         truncated_rfft,
                         truncated_irfft,
                         exp_step,
                         exp_step_backward,
                         solver_step,
                         abs_rank,
                         noised,
                         denoising_loss};

}  // namespace DSNO_ISA
