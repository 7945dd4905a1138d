"""Every op once on a device, forward and backward, on every backend: what compute-sanitizer runs.

    compute-sanitizer --tool memcheck python tests/gpu_sanitizer.py

Shapes are tiny and odd, so that a read or write past an edge leaves its tensor; each result is
compared with the reference on the CPU in float64. Needs torch, and no pytest.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

import dsno_kernels as dk
from dsno_kernels import backends
from tests.helpers import BUDGETS, rel_rms

NAMES = ("triton", "cuda", "cupy", "cpu")
# x and its time and channel axes, output channels, modes, precision
CONVOLUTIONS = {
    "few times": ((3, 4, 7, 5, 7), 1, 2, 5, 2, "fp32"),
    "all modes": ((2, 8, 18, 3, 5), 1, 2, 17, 5, "tf32"),
    "one time": ((2, 1, 3, 7), 1, 2, 3, 1, "fp32"),
    "three products": ((2, 4, 33, 3, 3), 1, 2, 35, 2, "bf16x3"),
    "bfloat16": ((2, 4, 33, 3, 3), 1, 2, 35, 2, "bf16"),
    "more times": ((2, 16, 7, 3, 5), 1, 2, 5, 8, "fp32"),
    "more times, bfloat16": ((2, 17, 7, 3, 5), 1, 2, 5, 9, "bf16"),
    "long": ((3, 7, 130), 2, 1, 5, 20, "fp32"),
}
# On a GPU too: enough programs for the wide tiles of the launch tables.
WIDE = {
    f"wide, {precision}": ((8, 4, 256, 32, 32), 1, 2, 256, 2, precision)
    for precision in ("tf32", "bf16", "fp32")
}
TRANSFORMS = (((3, 5, 7), 3, 1), ((7, 33), 9, 1), ((130, 4, 5), 12, 0), ((3, 2, 300), 65, 2))

Case = tuple[str, str, Callable[..., Any], list[Tensor], float]


def cases(wide: bool) -> Iterator[Case]:
    """(op, what, function of `*leaves, backend=`, leaves, budget)."""
    convolutions = CONVOLUTIONS | (WIDE if wide else {})
    for name, (shape, time_dim, channel_dim, O, K, precision) in convolutions.items():
        options: dict[str, Any] = {"time_dim": time_dim, "channel_dim": channel_dim}
        leaves = [torch.randn(shape), torch.randn(shape[channel_dim], O, K, 2), torch.randn(O)]
        out = list(shape)
        out[channel_dim] = O
        leaves.append(torch.randn(out))
        for epilogue in (False, True):

            def conv(
                x: Tensor,
                weight: Tensor,
                *rest: Tensor,
                backend: str,
                options: dict[str, Any] = options,
                precision: str = precision,
            ) -> Tensor:
                extra: dict[str, Any] = {}
                if rest:
                    extra = {"bias": rest[0], "residual": rest[1], "activation": "leaky_relu"}
                    # As good as no activation: the side of each sign bit is the backend's own.
                    extra["negative_slope"] = 0.999999
                return dk.spectral_conv(
                    x, weight, precision=precision, backend=backend, **options, **extra
                )

            what = f"{name}, {precision}" + ", epilogue" * epilogue
            used = leaves if epilogue else leaves[:2]
            yield "spectral_conv", what, conv, used, BUDGETS[precision]
    for shape, modes, dim in TRANSFORMS:

        def there_and_back(x: Tensor, backend: str, modes: int = modes, dim: int = dim) -> Tensor:
            spectrum = dk.truncated_rfft(x, modes, dim, backend=backend)
            return dk.truncated_irfft(spectrum, x.shape[dim], dim, backend=backend)

        yield "truncated_rfft", str(shape), there_and_back, [torch.randn(shape)], BUDGETS["fp32"]
    if hasattr(dk, "group_norm_silu"):
        for shape in ((2, 12, 5, 7), (1, 8, 33, 31)):
            C = shape[1]
            leaves = [torch.randn(shape), torch.randn(C), torch.randn(C)]
            leaves += [torch.randn(shape[0], C), torch.randn(shape[0], C)]

            def norm(
                x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, backend: str
            ) -> Tensor:
                return dk.group_norm_silu(
                    x, 4, weight, bias, scale=scale, shift=shift, backend=backend
                )

            yield "group_norm_silu", str(shape), norm, leaves, 2e-6
    if hasattr(dk, "exp_step"):
        for shape in ((3, 5, 7), (2, 3, 33, 31)):

            def step(x: Tensor, *history: Tensor, backend: str) -> Tensor:
                return dk.exp_step(x, history, (0.9, 0.5, -0.25, 0.125), backend=backend)

            yield "exp_step", str(shape), step, [torch.randn(shape) for _ in range(4)], 1e-6


def results(
    function: Callable[..., Any], leaves: list[Tensor], backend: str, like: Tensor | None
) -> list[Tensor]:
    """y and the gradients of the leaves, for the cotangent `like` (one drawn where it is None)."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    y = function(*leaves, backend=backend)
    g = torch.randn_like(y) if like is None else like
    return [y.detach(), *torch.autograd.grad(y, leaves, g), g]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args(argv).device)
    torch.manual_seed(0)
    ran, failed = 0, 0
    for op, what, function, leaves, budget in cases(wide=device.type == "cuda"):
        request = backends.Request(op, device, torch.float32)
        *expected, g = results(function, [leaf.double() for leaf in leaves], "reference", None)
        for name in NAMES:
            if backends.unsupported(name, request) is not None or not hasattr(
                importlib.import_module(f"dsno_kernels.backends.{name}"), op
            ):
                continue
            *actual, _ = results(
                function, [leaf.to(device) for leaf in leaves], name, g.float().to(device)
            )
            errors = [rel_rms(a.cpu(), e) for a, e in zip(actual, expected, strict=True)]
            ran += 1
            # A few gradients of few elements: their error is no average.
            if not max(errors) <= 2 * budget:
                failed += 1
                print(f"{op} ({what}) on {name}: relative RMS errors {errors}, budget {budget:.1g}")
    print(f"{ran} calls ran on {device.type}, {failed} of them wrong")
    return int(failed > 0 or ran == 0)


if __name__ == "__main__":
    sys.exit(main())
