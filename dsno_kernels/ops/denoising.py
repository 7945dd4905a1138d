"""Ops `noised` and `denoising_loss`: what training by denoising does before and after the network.

`denoising_loss` writes the gradient of the mean loss by the network's output in the pass that sums
the loss, so that the backward of the mean has nothing left to do. Another upstream gradient scales
it, in place and once; whoever asks again, as `retain_graph` allows, gets it computed anew.

Every other derivative is that of the same formulas on `exp_step`, to any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsno_kernels import _dense
from dsno_kernels.backends import Request, reference, reference_denoising, select
from dsno_kernels.backends.reference_steps import compute_dtype
from dsno_kernels.ops import define, on_reference, under_transform
from dsno_kernels.ops._direct import runs_directly
from dsno_kernels.ops.exp_step import differentiable_exp_step, records_graph

# Of one call: a tensor for each coefficient or None, and the numbers in the places of None.
Coefficients = list[Tensor | None]


def _in_order(images: Tensor, seeds: Tensor | None) -> Tensor:
    """images, of which the kernels count the elements in memory where they draw the noise."""
    return images if seeds is None else images.contiguous()


def _as_memory(coefficients: Coefficients) -> Coefficients:
    """Without pending negations, which the dispatcher leaves to a list of optional tensors."""
    return [c.resolve_neg() if c is not None and c.is_neg() else c for c in coefficients]


def _run_noised(
    images: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    coefficients: Coefficients,
    values: list[float],
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    if images.numel() == 0:
        return _dense.output_like(images, out_dtype, per_sample=True)
    request = Request("noised", images.device, compute_dtype([images, noise]))
    module = select(backend, request)
    y: Tensor = module.noised(
        _in_order(images, seeds),
        noise=noise,
        seeds=seeds,
        coefficients=_as_memory(coefficients),
        values=values,
        out_dtype=out_dtype,
    )
    if module is not reference and images.is_contiguous():
        return y  # it lies as it should
    return _dense.laid_out_like(y, _dense.output_like(images, out_dtype, per_sample=True))


def _fake_noised(
    images: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    coefficients: Coefficients,
    values: list[float],
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return _dense.output_like(images, out_dtype, per_sample=True)


_SAMPLES = "Tensor? noise, Tensor? seeds, Tensor?[] coefficients, float[] values"

noised_op = define(
    f"noised(Tensor images, {_SAMPLES}, ScalarType out_dtype, str backend) -> Tensor",
    _run_noised,
    _fake_noised,
)


def _noised(images: Tensor, noise: Tensor | None, seeds: Tensor | None, *others: Any) -> Tensor:
    """The op, directly where that is the same."""
    direct = runs_directly([images, noise, seeds, *others[0]])
    y: Tensor = (_run_noised if direct else noised_op)(images, noise, seeds, *others)
    return y


def _grad_dtype(output: Tensor) -> torch.dtype:
    """Of the gradient before the upstream one has scaled it, which float16 may be too small for."""
    return torch.float32 if output.dtype == torch.float16 else output.dtype


def _run_loss(
    output: Tensor,
    images: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    coefficients: Coefficients,
    values: list[float],
    ceiling: float,
    with_grad: bool,
    mean: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if images.numel() == 0:
        fake = _fake_loss(
            output, images, noise, seeds, coefficients, values, ceiling, with_grad, mean, backend
        )
        return fake[0].fill_(torch.nan), fake[1]
    request = Request("denoising_loss", images.device, compute_dtype([output, images, noise]))
    module = select(backend, request)
    images = _in_order(images, seeds)
    loss, grad = module.denoising_loss(
        output,
        images,
        noise=noise,
        seeds=seeds,
        coefficients=_as_memory(coefficients),
        values=values,
        ceiling=ceiling,
        grad_dtype=_grad_dtype(output) if with_grad else None,
        mean=mean,
    )
    if grad is None:
        grad = images.new_empty(0)
    elif module is reference:
        layout = _dense.output_like(images, grad.dtype, per_sample=True)
        grad = _dense.laid_out_like(grad, layout)
    return loss, grad


def _fake_loss(
    output: Tensor,
    images: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    coefficients: Coefficients,
    values: list[float],
    ceiling: float,
    with_grad: bool,
    mean: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = () if mean else images.shape[:1]
    loss = images.new_empty(shape, dtype=compute_dtype([output, images, noise]))
    if not with_grad:
        return loss, images.new_empty(0)
    if seeds is not None:
        return loss, images.new_empty(images.shape, dtype=_grad_dtype(output))
    return loss, _dense.output_like(images, _grad_dtype(output), per_sample=True)


loss_op = define(
    f"denoising_loss(Tensor output, Tensor images, {_SAMPLES}, float ceiling, bool with_grad,"
    " bool mean, str backend) -> (Tensor, Tensor)",
    _run_loss,
    _fake_loss,
)


def _loss(
    output: Tensor,
    images: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    coefficients: Coefficients,
    *others: Any,
) -> tuple[Tensor, Tensor]:
    """The op, directly where that is the same."""
    direct = runs_directly([output, images, noise, seeds, *coefficients])
    found: tuple[Tensor, Tensor] = (_run_loss if direct else loss_op)(
        output, images, noise, seeds, coefficients, *others
    )
    return found


def _noise_of(noise: Tensor | None, seeds: Tensor | None, images: Tensor, backend: str) -> Tensor:
    """The noise as a tensor."""
    if noise is not None:
        return noise
    assert seeds is not None
    dtype = compute_dtype([images])
    if under_transform():
        drawn: Tensor = on_reference(reference_denoising.normal_noise, backend, seeds, images)
        return drawn.to(dtype)
    zeros = torch.zeros(images.shape, dtype=dtype, device=images.device)
    return _noised(zeros, None, seeds, [None, None], [1.0, 1.0], dtype, backend)


def differentiable_noised(
    images: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    coefficients: Coefficients,
    values: list[float],
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """`noised` with autograd, which is that of `exp_step`."""
    if not under_transform() and not records_graph([images, noise, *coefficients]):
        return _noised(images, noise, seeds, coefficients, values, out_dtype, backend)
    noise = _noise_of(noise, seeds, images, backend)
    rows = reference_denoising.noised_rows(
        *reference_denoising.columns(coefficients, values, images)
    )
    return differentiable_exp_step([images, noise], rows, [], None, out_dtype, backend)


def _is_that_of_the_mean(g: Tensor) -> bool:
    """Whether an upstream gradient leaves nothing to scale, where the host may look; elsewhere the
    kernel does.
    """
    if type(g) is not Tensor or g.device.type != "cpu":
        return False
    return bool((g == 1 / len(g)).all()) if g.ndim else g.item() == 1


def _run_scale(grad: Tensor, g: Tensor, backend: str) -> None:
    """The stored gradient of the mean, in place, as that of `sum of g_b loss_b`; g without axes is
    the upstream gradient of the mean.
    """
    if grad.numel():
        request = Request("denoising_loss", grad.device, compute_dtype([grad]))
        select(backend, request).denoising_scale_(grad, g)


def _fake_scale(grad: Tensor, g: Tensor, backend: str) -> None:
    return None


scale_op = define(
    "denoising_scale_(Tensor(a!) grad, Tensor g, str backend) -> ()", _run_scale, _fake_scale
)


class DenoisingLossFunction(torch.autograd.Function):
    """Autograd of `denoising_loss` by the output alone; arguments as those of the op."""

    @staticmethod
    def forward(
        ctx: Any,
        values: list[float],
        ceiling: float,
        mean: bool,
        backend: str,
        output: Tensor,
        images: Tensor,
        noise: Tensor | None,
        seeds: Tensor | None,
        *coefficients: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(output, images, noise, seeds, *coefficients)
        ctx.others = values, ceiling
        ctx.mean = mean
        ctx.backend = backend
        given = images, noise, seeds, list(coefficients), values, ceiling
        loss, ctx.grad = _loss(output, *given, True, mean, backend)
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        output, images, noise, seeds, *coefficients = ctx.saved_tensors  # once, for checkpoints
        given = images, noise, seeds, coefficients, *ctx.others
        compiling = torch.compiler.is_compiling()
        if under_transform() or (torch.is_grad_enabled() and not compiling):
            g = (g / len(images)).expand(len(images)) if ctx.mean else g
            grad = _differentiable_gradient(g, output, given, ctx.backend)
        elif compiling:
            grad = _scaled(ctx.grad, g, output.dtype, ctx.backend)
        else:
            stored, ctx.grad = ctx.grad, None
            if stored is None:
                stored = _loss(output, *given, True, ctx.mean, ctx.backend)[1]
            grad = _scaled_in_place(stored, g, output.dtype, ctx.backend)
        return None, None, None, None, grad, *[None] * (3 + len(coefficients))


def _scaled(grad: Tensor, g: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """What `_run_scale` makes of the gradient, in memory of its own."""
    rows = reference_denoising.scale_rows(g)
    return differentiable_exp_step([grad], rows, [], None, dtype, backend)


def _scaled_in_place(grad: Tensor, g: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """The same in the memory of `grad`, where the dtype is that."""
    if grad.dtype != dtype:
        return _scaled(grad, g, dtype, backend)
    if grad.numel() and _is_that_of_the_mean(g):
        return grad
    (_run_scale if runs_directly([grad, g]) else scale_op)(grad, g, backend)
    return grad


def _residual(
    output: Tensor,
    images: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    columns: Sequence[Tensor],
    backend: str,
) -> Tensor:
    """c_skip (x + l n) + c_out F - x by differentiable `exp_step`."""
    noise = _noise_of(noise, seeds, images, backend)
    tensors = [output, images, noise]
    rows = reference_denoising.residual_rows(*columns)
    return differentiable_exp_step(tensors, rows, [], None, compute_dtype(tensors), backend)


def _differentiable_gradient(
    g: Tensor, output: Tensor, given: tuple[Any, ...], backend: str
) -> Tensor:
    """The gradient of `sum of g_b loss_b` by the output, differentiable in both."""
    images, noise, seeds, coefficients, values, ceiling = given
    *columns, weight = reference_denoising.columns(coefficients, values, images)
    residual = _residual(output, images, noise, seeds, columns, backend)
    slope = 2 * weight.clamp(max=ceiling) * columns[2] / max(1, images[:1].numel())
    rows = (g.double() * slope)[:, None]
    return differentiable_exp_step([residual], rows, [], None, output.dtype, backend)


def differentiable_denoising_loss(
    output: Tensor,
    images: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    coefficients: Coefficients,
    values: list[float],
    ceiling: float,
    mean: bool,
    backend: str,
) -> Tensor:
    """`denoising_loss` with autograd."""
    if under_transform() or records_graph([images, noise, *coefficients]):
        *columns, weight = reference_denoising.columns(coefficients, values, images)
        residual = _residual(output, images, noise, seeds, columns, backend)
        squares = reference_denoising.flat(residual.square()).mean(1)
        loss = weight.clamp(max=ceiling) * squares
        return (loss.mean() if mean else loss).to(squares.dtype)
    if not records_graph([output]):
        given = output, images, noise, seeds, coefficients, values, ceiling
        return _loss(*given, False, mean, backend)[0]
    tensors = [output, images, noise, seeds, *coefficients]
    if torch.compiler.is_compiling():  # Dynamo refuses a Function that gets one tensor twice
        tensors = [
            t.view_as(t) if t is not None and any(t is other for other in tensors[:i]) else t
            for i, t in enumerate(tensors)
        ]
    found: Tensor = DenoisingLossFunction.apply(values, ceiling, mean, backend, *tensors)
    return found
