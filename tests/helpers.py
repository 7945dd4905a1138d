"""The one assertion of the suite: relative RMS error against a float64 reference; NaN fails."""

from __future__ import annotations

import torch
from torch import Tensor

# Relative RMS error against float64 on N(0, 1) data, for each precision of the channel mixing
# (README, "Precision"). Emulated rounding of the operands gives 2.1e-7, 4.4e-6, 2.9e-4 and 2.3e-3;
# the budgets are about twice that.
BUDGETS = {"fp32": 1e-6, "bf16x3": 1e-5, "tf32": 6e-4, "bf16": 5e-3}
# Output rounded to 8 (bfloat16) or 11 (float16) bits of mantissa adds at most half a unit in the
# last place.
IO_BUDGET = 5e-3
FLOAT64 = 1e-12


def rel_rms(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64; NaN where actual holds one; 0 for two empty
    tensors.
    """
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    a, e = actual.detach(), expected.detach()
    wide = torch.complex128 if e.is_complex() else torch.float64
    a, e = a.to("cpu", wide), e.to("cpu", wide)
    error, size = (a - e).norm().item(), e.norm().item()
    return error / size if size > 0 else error


def assert_close(actual: Tensor, expected: Tensor, budget: float) -> None:
    """Fail unless `rel_rms(actual, expected) <= budget`; NaN never passes."""
    error = rel_rms(actual, expected)
    assert error <= budget, f"relative RMS error {error:.3g} over the budget of {budget:.3g}"
