"""`noised` and `denoising_loss`: what they accept, what they promise, and every check."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dsno_kernels.functional import checks, step_checks
from dsno_kernels.ops import denoising as _denoising


def noised(
    images: Tensor,
    level: float | Tensor,
    scale: float | Tensor | None = None,
    *,
    noise: Tensor | None = None,
    seeds: Tensor | Sequence[int] | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""A network's input in training: images with noise, scaled for each sample, in one pass.

    .. math:: y_b = s_b\,(x_b + l_b\,n_b)

    The sum is float32 (float64 where images or noise are). As in :func:`exp_step`, what a 0
    multiplies may hold anything, NaN included.

    Args:
        images: x, ``(B, ...)``, real, floating point, any strides.
        level: l, the noise's standard deviation: a number, a tensor without axes, or ``(B,)``, of
            any float dtype. scale: s, likewise; default 1.
        noise: n, the shape of images. Or
        seeds: int64 ``(B,)`` or integers: the noise of sample b is made in the kernel. Its element
            e, counted by its place in the sample (the last axis fastest), is number e of
            Philox4x32-10 and Box-Muller with the key ``seeds[b]`` (csrc/cpu/isa/noise.h): the same,
            up to rounding, on every backend, in every batch and for all strides. Images whose
            memory has another order cost two more passes.
        out_dtype: dtype of y; default that of images.
        backend: the name of one; None takes the fastest that can run here.

    Returns:
        y, the shape of images, dense in their memory order.

    Raises:
        TypeError: dtypes. ValueError: shapes, devices or numbers that do not fit, or not exactly
            one of noise and seeds. NotImplementedError: a backend that was asked for and cannot run
            this.

    Differentiable in images, level, scale and noise, to any order.

    Equivalent to::

        scale[:, None, None, None] * (images + level[:, None, None, None] * noise)

    Source: EDM (arXiv 2206.00364), eq. 7 and table 1; FDM (arXiv 2306.06991), whose scale is the
    momentum process's mean.

    Example:
        >>> images, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.1, 5.0])
        >>> c_in = (sigma**2 + 0.25).rsqrt()
        >>> dk.noised(images, sigma, c_in, seeds=[17, 18]).shape
        torch.Size([2, 3, 8, 8])
    """
    _images(images)
    seeds = _noise(images, noise, seeds)
    given = {"level": level, "scale": 1.0 if scale is None else scale}
    coefficients, values = _coefficients(given, images)
    if out_dtype is not None and out_dtype not in checks.REAL_DTYPES:
        raise TypeError(
            f"out_dtype must be one of {checks.names(checks.REAL_DTYPES)}, got {out_dtype}"
        )
    return _denoising.differentiable_noised(
        images,
        noise,
        seeds,
        coefficients,
        values,
        out_dtype or images.dtype,
        checks.backend(backend),
    )


def denoising_loss(
    output: Tensor,
    images: Tensor,
    level: float | Tensor,
    c_skip: float | Tensor,
    c_out: float | Tensor,
    weight: float | Tensor,
    *,
    noise: Tensor | None = None,
    seeds: Tensor | Sequence[int] | None = None,
    ceiling: float | None = None,
    reduction: str = "none",
    backend: str | None = None,
) -> Tensor:
    r"""The weighted squared error of a preconditioned denoiser, for each sample, in one pass.

    .. math::
        D_b &= c_{skip,b}\,(x_b + l_b\,n_b) + c_{out,b}\,F_b \\
        L_b &= \min(w_b, \mathrm{ceiling})\,\operatorname{mean}(D_b - x_b)^2

    The sums are float32, of squares float64 (both float64 where a tensor is), in an order that no
    number of threads changes. As in :func:`exp_step`, what a 0 multiplies may hold anything; but a
    loss that is NaN stays so with a weight of 0, whose gradient is 0.

    Where ``output`` alone requires a gradient, the same pass writes it, for the mean of L: with
    `seeds` two tensors are read and one is written, with `noise` three and one. The backward of
    that mean, by ``reduction="mean"`` or ``L.mean()``, moves no tensor; another upstream gradient
    scales it, one more read and write, as a compiled backward always does. With :func:`noised` a
    training step so moves three reads and two writes with `seeds`, five and two with `noise`, and
    at most one more of each.

    Args:
        output: F, the network's output, the shape of images, real, floating point, any strides.
        images: x, ``(B, ...)``.
        level, c_skip, c_out, weight: l, the preconditioner's two factors, and w: numbers, tensors
            without axes, or ``(B,)``, of any float dtype. c_skip - 1 is formed in float64.
        noise, seeds: n, as in :func:`noised`, which gets the same. With `seeds`, each of images and
            output whose memory is not in the order of its shape costs one more pass.
        ceiling: an upper bound of the weights, such as that of a warm-up; None for none.
        reduction: "none" returns L, "mean" its mean over the batch, in the same pass.
        backend: as in :func:`noised`.

    Returns:
        L, ``(B,)``, or its mean, ``()``; float32 (float64 where a tensor is). A sample without
        elements has the loss NaN, as the mean of nothing.

    Raises:
        TypeError, ValueError, NotImplementedError: as :func:`noised`.

    Differentiable in all tensors, to any order. Gradients other than the first one by the output
    alone run on :func:`exp_step` and plain PyTorch.

    Equivalent to::

        noisy = images + level[:, None, None, None] * noise
        denoised = c_skip[:, None, None, None] * noisy + c_out[:, None, None, None] * output
        weight.clamp(max=ceiling) * (denoised - images).square().mean((1, 2, 3))

    Source: EDM (arXiv 2206.00364), eq. 8; FDM (arXiv 2306.06991), whose weights start under a
    ceiling.

    Example:
        >>> images, sigma, seeds = torch.randn(2, 3, 8, 8), torch.tensor([0.1, 5.0]), [17, 18]
        >>> output = torch.randn(2, 3, 8, 8, requires_grad=True)  # of network(dk.noised(..), ..)
        >>> loss = dk.denoising_loss(output, images, sigma, 1.0, -sigma, sigma**-2, seeds=seeds)
        >>> loss.mean().backward()  # with reduction="mean" two small operations less
    """
    _images(images)
    step_checks.all_like(("output",), (output,), images, of="images")
    seeds = _noise(images, noise, seeds)
    given = {"level": level, "c_skip": c_skip, "c_out": c_out, "weight": weight}
    coefficients, values = _coefficients(given, images)
    if ceiling is None:
        ceiling = math.inf
    elif not step_checks.is_number(ceiling):
        raise TypeError(f"ceiling must be a number or None, got {ceiling!r}")
    elif not ceiling > 0:
        raise ValueError(f"ceiling must be greater than 0, got {ceiling!r}; None means no ceiling")
    if reduction not in ("none", "mean"):
        raise ValueError(f"reduction must be 'none' or 'mean', got {reduction!r}")
    return _denoising.differentiable_denoising_loss(
        output,
        images,
        noise,
        seeds,
        coefficients,
        values,
        float(ceiling),
        reduction == "mean",
        checks.backend(backend),
    )


def _images(images: Tensor) -> None:
    checks.real("images", images)
    if images.ndim == 0:
        raise ValueError("images must have a batch axis, shape (B, ...), got a tensor without axes")


def _noise(
    images: Tensor, noise: Tensor | None, seeds: Tensor | Sequence[int] | None
) -> Tensor | None:
    """The seeds as a tensor, once noise and seeds are checked."""
    if (noise is None) == (seeds is None):
        which = "neither" if noise is None else "both"
        raise ValueError(f"give exactly one of noise and seeds, got {which}")
    if seeds is None:
        step_checks.all_like(("noise",), (noise,), images, of="images")
        return None
    B = len(images)
    if not isinstance(seeds, Tensor):
        if not isinstance(seeds, (list, tuple)):
            raise TypeError(
                f"seeds must be a torch.int64 tensor ({B},) or integers, got {type(seeds).__name__}"
            )
        for seed in seeds:
            if not -(2**63) <= step_checks.integer("each of seeds", seed) < 2**63:
                raise ValueError(f"seeds must lie between -2^63 and 2^63 - 1, got {seed}")
        seeds = torch.tensor(seeds, dtype=torch.int64, device=images.device)
    if seeds.dtype != torch.int64:
        raise TypeError(f"seeds must be torch.int64, got {seeds.dtype}")
    if seeds.shape != (B,):
        raise ValueError(
            f"seeds must have shape ({B},), one for each sample of images, got {tuple(seeds.shape)}"
        )
    checks.same_device({"images": images, "seeds": seeds})
    return seeds


def _coefficients(
    given: dict[str, float | Tensor], images: Tensor
) -> tuple[list[Tensor | None], list[float]]:
    """Each as a tensor, or as None and a number."""
    tensors: list[Tensor | None] = []
    values: list[float] = []
    for name, value in given.items():
        if not isinstance(value, Tensor):
            tensors.append(None)
            values.append(*step_checks.numbers(name, [value]))
            continue
        if not (
            value.dtype in checks.REAL_DTYPES
            and value.layout == torch.strided
            and value.device == images.device
            and (value.ndim == 0 or value.shape == images.shape[:1])
        ):
            _refuse(name, value, images)
        tensors.append(value)
        values.append(0.0)
    return tensors, values


def _refuse(name: str, value: Tensor, images: Tensor) -> None:
    """Say what is wrong with a coefficient."""
    checks.real(name, value)
    if value.ndim and value.shape != images.shape[:1]:
        raise ValueError(
            f"{name} must be a number, have no axes, or shape ({len(images)},) for the batch of"
            f" images, {tuple(images.shape)}; got {tuple(value.shape)}"
        )
    checks.same_device({"images": images, name: value})
