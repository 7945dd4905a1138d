"""What training by denoising means around the network: plain PyTorch, differentiable.

    noised           s (x + l n)
    denoising_loss   min(w, ceiling) mean(r^2),  r = c_skip (x + l n) + c_out F - x

for each sample: x an image, n its noise, F the network's output, the letters a number a sample.
Both are sums as those of `exp_step`, r being `c_out F + (c_skip - 1) x + c_skip l n`, whose
coefficients are formed in float64: c_skip - 1 loses nothing where c_skip is near 1. As there, a
coefficient that is 0 hides what it multiplies. Coefficients come as tensors, `[B]` or without axes,
or None and a number in `values`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsno_kernels.backends import reference_steps


def columns(
    coefficients: Sequence[Tensor | None], values: Sequence[float], images: Tensor
) -> list[Tensor]:
    """Each coefficient as float64 `[B]`."""
    return [
        images.new_full((len(images),), value, dtype=torch.float64)
        if given is None
        else given.double().expand(len(images))
        for given, value in zip(coefficients, values, strict=True)
    ]


def flat(x: Tensor) -> Tensor:
    """`[B, size of a sample]`."""
    return x.flatten(1) if x.ndim > 1 else x[:, None]


def normal_noise(seeds: Tensor, images: Tensor) -> Tensor:
    """The noise of each sample in the shape of images, float64: the numbers of
    `reference_steps.normal_noise` of its seed and offset 0.
    """
    if images.numel() == 0:
        return images.new_empty(images.shape, dtype=torch.float64)
    size = images[0].numel()
    drawn = [
        reference_steps.normal_noise(torch.stack([seed, torch.zeros_like(seed)]), size)
        for seed in seeds.unbind()
    ]
    return torch.stack(drawn).reshape(images.shape)


def noised_rows(level: Tensor, scale: Tensor) -> Tensor:
    """The coefficients of x and n, `[B, 2]`."""
    return torch.stack([scale, scale * level], -1)


def residual_rows(level: Tensor, c_skip: Tensor, c_out: Tensor) -> Tensor:
    """The coefficients of F, x and n in r, `[B, 3]`."""
    return torch.stack([c_out, c_skip - 1, c_skip * level], -1)


def noised(
    images: Tensor,
    *,
    noise: Tensor | None,
    seeds: Tensor | None,
    coefficients: Sequence[Tensor | None],
    values: Sequence[float],
    out_dtype: torch.dtype,
) -> Tensor:
    """Coefficients: level, scale."""
    dtype = reference_steps.compute_dtype([images, noise])
    if seeds is not None:
        noise = normal_noise(seeds, images).to(dtype)
    assert noise is not None
    rows = noised_rows(*columns(coefficients, values, images))
    return reference_steps.exp_step([images, noise], coefficients=rows, out_dtype=out_dtype)


def denoising_loss(
    output: Tensor,
    images: Tensor,
    *,
    noise: Tensor | None,
    seeds: Tensor | None,
    coefficients: Sequence[Tensor | None],
    values: Sequence[float],
    ceiling: float,
    grad_dtype: torch.dtype | None,
    mean: bool,
) -> tuple[Tensor, Tensor | None]:
    """The loss of each sample, `[B]`, or their mean; and, in `grad_dtype`, the gradient of the mean
    by `output`. Coefficients: level, c_skip, c_out, weight.
    """
    dtype = reference_steps.compute_dtype([output, images, noise])
    if seeds is not None:
        noise = normal_noise(seeds, images).to(dtype)
    assert noise is not None
    level, c_skip, c_out, weight = columns(coefficients, values, images)
    rows = residual_rows(level, c_skip, c_out)
    weight = weight.clamp(max=ceiling)
    residual = reference_steps.exp_step([output, images, noise], coefficients=rows, out_dtype=dtype)
    loss = weight * flat(residual.square()).mean(1, dtype=torch.float64)
    grad = None
    if grad_dtype is not None:
        slope = 2 * weight * c_out / residual.numel()
        grad = reference_steps.exp_step(
            [residual], coefficients=slope[:, None], out_dtype=grad_dtype
        )
    return (loss.mean() if mean else loss).to(dtype), grad


def scale_rows(g: Tensor) -> Tensor:
    """What the gradient of the mean times is that of `sum of g_b loss_b`, `[B, 1]`; of an upstream
    gradient of the mean, `[1]`.
    """
    return (g.double() * (len(g) if g.ndim else 1))[..., None]


def denoising_scale_(grad: Tensor, g: Tensor) -> None:
    rows = scale_rows(g)
    grad.copy_(reference_steps.exp_step([grad], coefficients=rows, out_dtype=grad.dtype))
