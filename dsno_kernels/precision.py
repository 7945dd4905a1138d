"""The precision of the channel mixing: what `precision=None` means, and the error each choice
promises.

Transforms and accumulation are float32 in every mode; only the operands of the products are
rounded. Budgets are relative RMS errors of y, dx and dW against float64 on N(0, 1) data:

    fp32     1e-6   float32-accurate (FFMA, or three tf32 products)
    bf16x3   1e-5   operands split into two bfloat16, three products
    tf32     6e-4   operands rounded to 10 mantissa bits
    bf16     5e-3   operands rounded to bfloat16
"""

from __future__ import annotations

import torch

BUDGETS = {"fp32": 1e-6, "bf16x3": 1e-5, "tf32": 6e-4, "bf16": 5e-3}

_OF_DTYPE = {
    torch.float64: "fp32",
    torch.float32: "",
    torch.float16: "tf32",
    torch.bfloat16: "bf16",
}
_OF_MATMUL_PRECISION = {"highest": "fp32", "high": "tf32", "medium": "bf16"}


def choose(precision: str | None, dtype: torch.dtype) -> str:
    """The precision an op is asked for, of a caller's `precision` and the dtype of its result.

    None gives fp32 for float64, bf16 for bfloat16, tf32 for float16 (whose values are exact in
    tf32), and "" for float32: PyTorch's setting at the time of each call.

    Raises:
        ValueError: an unknown name.
    """
    if precision is None:
        return _OF_DTYPE[dtype]
    if precision not in BUDGETS:
        raise ValueError(
            f"unknown precision {precision!r}; accepted: None, {', '.join(map(repr, BUDGETS))}"
        )
    return precision


def resolve(precision: str, device_type: str) -> str:
    """The precision of one call: "" follows PyTorch's float32 setting, "highest" fp32, "high" tf32,
    "medium" bf16.
    """
    if precision:
        return precision
    try:
        return _OF_MATMUL_PRECISION[torch.get_float32_matmul_precision()]
    except (
        RuntimeError
    ):  # the legacy getter refuses to answer once PyTorch's newer setting has been written
        backend = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
        setting = backend.matmul.fp32_precision
        return setting if setting in BUDGETS else "fp32"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: float64 of float64, float32 of everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32
