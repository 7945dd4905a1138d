"""What the ops mean: plain PyTorch, any float dtype and device, differentiable to any order.

Every other backend is tested against these functions in float64. They take and return tensors in
the caller's axes; `n` is the output length, K the number of kept modes, and `alpha_k` is 1 for bin
0 and the Nyquist bin, 2 elsewhere:

    spectral_conv    X = rfft(x)[:K];  Y_k = X_k W_k;  h = irfft(Y, n) + bias
                     y = leaky_relu(h) + residual
    its adjoint      X_k = sum over o of conj(W_k)[i, o] G_k[o], so that <g, S(x)> = <S^T(g), x>
    spectral_conv_weight_grad   dW_k = (alpha_k / n) sum over B, P of conj(X_k) (x) G_k
    truncated_rfft / truncated_irfft   the two transforms alone, spectra as real pairs `[..., 2]`
    group_norm_silu  in reference_norm.py
"""

from __future__ import annotations

from dsno_kernels.backends.reference_steps import abs_rank as abs_rank
from dsno_kernels.backends.reference_steps import exp_step as exp_step
from dsno_kernels.backends.reference_steps import exp_step_backward as exp_step_backward
from dsno_kernels.backends.reference_steps import solver_step as solver_step
