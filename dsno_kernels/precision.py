"""The precision of the channel mixing: what `precision=None` means, and the error each choice promises.

Transforms and accumulation are float32 in every mode; only the operands of the products are rounded. Budgets are
relative RMS errors of y, dx and dW against float64 on N(0, 1) data:

    fp32     1e-6   float32-accurate (FFMA, or three tf32 products)
    bf16x3   1e-5   operands split into two bfloat16, three products
    tf32     6e-4   operands rounded to 10 mantissa bits
    bf16     5e-3   operands rounded to bfloat16
"""

from __future__ import annotations

import torch

BUDGETS = {"fp32": 1e-6, "bf16x3": 1e-5, "tf32": 6e-4, "bf16": 5e-3}

_OF_MATMUL_PRECISION = {"highest": "fp32", "high": "tf32", "medium": "bf16"}


def check(precision: str | None) -> str:
    """The precision as ops take it: a name, or "" to follow PyTorch's setting at each call.

    Raises:
        ValueError: an unknown name.
    """
    if precision is None:
        return ""
    if precision not in BUDGETS:
        raise ValueError(f"unknown precision {precision!r}; accepted: None, {', '.join(map(repr, BUDGETS))}")
    return precision


def resolve(precision: str, dtype: torch.dtype, device_type: str) -> str:
    """The precision of one call.

    An empty name follows the dtype of x and PyTorch's float32 setting: float64 and float32 under "highest" give fp32;
    "high" gives tf32, "medium" bf16; float16 gives tf32 (its values are exact in tf32) and bfloat16 gives bf16.
    """
    if precision or dtype == torch.float64:
        return precision or "fp32"
    if dtype == torch.bfloat16:
        return "bf16"
    if dtype == torch.float16:
        return "tf32"
    try:
        return _OF_MATMUL_PRECISION[torch.get_float32_matmul_precision()]
    except RuntimeError:  # the legacy getter refuses to answer once PyTorch's newer setting has been written
        backend = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
        setting = backend.matmul.fp32_precision
        return setting if setting in BUDGETS else "fp32"
