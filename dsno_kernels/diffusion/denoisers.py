r"""Denoisers ``D(x, sigma, y=None) -> x0``: the mean of the data given x = x_0 + sigma eps.

One such function serves every process: given :math:`x_t = \alpha x_0 + \sigma \epsilon` the mean
is :math:`D(x_t / \alpha, \sigma / \alpha)`, which `for_process` makes of it. sigma is a number, a
tensor without axes, or one value a sample; y are class labels, integers ``(B,)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsno_kernels.diffusion.discrete import DiscreteVP
from dsno_kernels.diffusion.preconditioning import Preconditioner
from dsno_kernels.diffusion.processes import Process, Real, as_float64, integer
from dsno_kernels.functional import checks

Denoiser = Callable[..., Tensor]

# Numbers of scores held at a time, 8 bytes each; a few rows of them stay in the cache of a CPU.
_SCORES = {"cpu": 1 << 18, "cuda": 1 << 26}
# Noise at which no image of a data set can be told from another, and at which only one is left.
_MOST, _LEAST = 1e6, 1e-30


class ExactDenoiser(nn.Module):
    r"""The best denoiser of a finite data set, in closed form; nothing is trained.

    .. math::
        D(x, \sigma) = \sum_i w_i x_i, \qquad
        w = \mathrm{softmax}_i\left(-\frac{|x - x_i|^2}{2 \sigma^2}\right)

    Scores are float64, whatever the images: they are differences of large numbers over a small
    sigma^2. At sigma = 0 it is the nearest image. Differentiable in x and sigma.

    Args:
        images: the data, each image as likely as the other, real floating point ``(N, ...)``.
        labels: integer ``(N,)``, the classes of the images.

    Raises:
        TypeError, ValueError: other dtypes or shapes; no image.

    Example:
        >>> denoiser = dk.diffusion.ExactDenoiser(torch.tensor([[-1.0], [1.0]]))
        >>> denoiser(torch.tensor([[0.5]]), 1.0)  # tanh(0.5)
        tensor([[0.4621]])
    """

    images: Tensor
    labels: Tensor | None
    _points: Tensor

    def __init__(self, images: Tensor, labels: Tensor | None = None) -> None:
        super().__init__()
        checks.real("images", images)
        if images.ndim < 2 or images.numel() == 0:
            raise ValueError(f"images must have shape (N, ...), N >= 1, got {tuple(images.shape)}")
        if labels is not None:
            _integer_labels("labels", labels, len(images))
        flat = images.detach().flatten(1)
        wide = flat.double()
        half = wide.square().sum(1, keepdim=True).div_(2)
        self.register_buffer("images", images.detach())
        self.register_buffer("labels", None if labels is None else labels.detach())
        # One product then gives x.x_i / sigma^2 - |x_i|^2 / (2 sigma^2).
        self.register_buffer("_points", torch.cat([wide, half], 1), persistent=False)

    def forward(self, x: Tensor, sigma: Real, y: Tensor | None = None) -> Tensor:
        """D(x, sigma) of the images with label y.

        Args:
            x: real floating point ``(B, ...)``, an image each.
            sigma: at least 0.
            y: ``(B,)``; -1 means all images, as does None.

        Returns:
            In the shape and dtype of x.

        Raises:
            TypeError, ValueError: arguments that do not fit, or a label that no image has.
        """
        checks.real("x", x)
        if x.shape[1:] != self.images.shape[1:] or x.ndim != self.images.ndim:
            shape = ", ".join(map(str, self.images.shape[1:]))
            raise ValueError(f"x must have shape (B, {shape}), got {tuple(x.shape)}")
        inverse = _levels(x, sigma).clamp_min(_LEAST).square().reciprocal()  # (B, 1) or (1, 1)
        queries = torch.cat([x.flatten(1).double(), x.new_full((len(x), 1), -1.0)], 1) * inverse
        allowed = None if y is None else self._allowed(y, len(x))
        limit = _SCORES.get(x.device.type, _SCORES["cpu"])
        rows = max(1, limit // len(self.images))
        dtype = torch.promote_types(x.dtype, torch.float32)
        images = self.images.flatten(1).to(dtype)
        parts = []
        for first in range(0, len(x), rows):
            scores = queries[first : first + rows] @ self._points.T
            if allowed is not None:
                scores = scores.masked_fill(~allowed[first : first + rows], -torch.inf)
            # What is left after the largest is taken away needs no more digits than the result.
            weights = (scores - scores.detach().amax(1, keepdim=True)).to(dtype).softmax(1)
            parts.append(weights @ images)
        return torch.cat(parts).reshape(x.shape).to(x.dtype) if parts else torch.zeros_like(x)

    def _allowed(self, y: Tensor, batch: int) -> Tensor:
        """Which images the samples may become, bool ``(B, N)``."""
        if self.labels is None:
            raise ValueError("y was given, but the images have no labels")
        _integer_labels("y", y, batch)
        matches = (self.labels == y[:, None]) | (y[:, None] == -1)
        if not bool(matches.any(1).all()):
            known = self.labels.unique().tolist()
            raise ValueError(f"no image has the label {y[~matches.any(1)][0]}; there are {known}")
        return matches


def for_process(denoiser: Denoiser, process: Any) -> Denoiser:
    r"""``f(x, t, **kwargs)``, the x0 prediction that `sample` wants, of a denoiser
    ``D(x, sigma, **kwargs)``.

    .. math:: f(x, t) = D(x / \alpha(t),\ \sigma(t) / \alpha(t))

    Args:
        denoiser: gets sigma as a float64 tensor without axes, or ``(B,)`` where t is.
        process: has alpha and sigma. Where alpha vanishes, sigma / alpha counts as 1e6.

    Returns:
        The function; build the plan with ``prediction="x0"``.

    Example:
        >>> process = dk.diffusion.VPCosine()
        >>> grid = dk.diffusion.time_grid(process, 20, "log_snr")
        >>> plan = dk.diffusion.SolverPlan.build(process, grid, "tab3", prediction="x0")
        >>> images = torch.rand(10, 3, 8, 8)
        >>> model = dk.diffusion.for_process(dk.diffusion.ExactDenoiser(images), process)
        >>> dk.diffusion.sample(model, torch.randn(2, 3, 8, 8), plan).shape
        torch.Size([2, 3, 8, 8])
    """

    def prediction(x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        sigma = process.sigma(t)
        alpha = torch.maximum(process.alpha(t), sigma / _MOST)
        return denoiser(x / _per_sample(alpha, x), sigma / alpha, **kwargs)

    return prediction


def from_diffusers(unet: Any, scheduler: Any) -> Denoiser:
    """The denoiser ``D(x, sigma, **kwargs)`` of a model of diffusers.

    The model is called as ``unet(z, timestep, **kwargs)`` on the state z of the variance preserving
    process of the scheduler, at a time between its integer ones; beyond them at the nearest. Class
    labels are ``class_labels`` there: ``y`` is passed as that.

    Args:
        unet: returns an object with ``sample``, a tuple, or a tensor; a learned variance is left
            out.
        scheduler: has ``alphas_cumprod``, and ``prediction_type`` "epsilon", "v_prediction" or
            "sample" in its ``config``.

    Returns:
        The denoiser; its ``process`` is the `DiscreteVP`.

    Raises:
        NotImplementedError: another prediction type. TypeError: a scheduler without alphas_cumprod.

    Example:
        >>> denoiser = dk.diffusion.from_diffusers(pipe.unet, pipe.scheduler)
        >>> model = dk.diffusion.for_process(denoiser, denoiser.process)
    """
    return _DiffusersDenoiser(unet, scheduler)


def from_edm(
    network: Callable[..., Tensor], classes: int | None = None, process: Process | None = None
) -> Denoiser:
    """The denoiser ``D(x, sigma, y=None)`` of a network of EDM's or FDM's code.

    Args:
        network: ``network(x, sigma, class_labels)`` returns x0; sigma is float32 ``(B,)`` and
            class_labels one-hot float32 ``(B, classes)``, or None. With a `process` it is the raw
            network ``F(c_in * x, c_noise, class_labels)`` inside of its preconditioner.
        classes: how many; by default what `network.label_dim` says, 0 without it.
        process: `EDM`, `VE`, a VP process or `FDM` of one: whose preconditioner is put around F.

    Returns:
        The denoiser. Samples with y = -1, or without y, have no class: a row of zeros. Another y
        outside of the classes is a ValueError; on a GPU, where the host does not look, an assertion
        of the device.

    Raises:
        TypeError: a network that cannot be called; a process without a preconditioner.
        ValueError: classes < 0.

    Source: EDM (arXiv 2206.00364), FDM (arXiv 2306.06991) and their official code.

    Example:
        >>> process = dk.diffusion.FDM(dk.diffusion.EDM(), 2.0)
        >>> denoiser = dk.diffusion.from_edm(network, process=process)
    """
    if not callable(network):
        raise TypeError(f"network must be callable, got {type(network).__name__}")
    count = getattr(network, "label_dim", 0) if classes is None else classes
    if integer("classes", count) < 0:
        raise ValueError(f"classes must be at least 0, got {count}")
    table = None if process is None else Preconditioner(process)

    def denoiser(x: Tensor, sigma: Real, y: Tensor | None = None) -> Tensor:
        checks.real("x", x)
        levels = _levels(x, sigma).reshape(-1).expand(len(x))
        labels = None
        if count:
            labels = x.new_zeros((len(x), count), dtype=torch.float32)
            if y is not None:
                _integer_labels("y", y, len(x))
                _check_classes(y, count)
                # a column for -1, which is left out
                labels = F.one_hot(y.long() + 1, count + 1)[:, 1:].to(labels)
        elif y is not None:
            raise ValueError("y was given, but the network has no classes")
        if table is None:
            return _as_large(network(x, levels.float(), labels), x)
        # Without noise c_noise may be infinite, where no network has a finite output.
        levels = torch.where(levels == 0, _LEAST, levels)
        c_skip, c_out, c_in, c_noise = table.coefficients(levels)
        output = _as_large(network(_per_sample(c_in, x) * x, c_noise.float(), labels), x)
        return _per_sample(c_skip, x) * x + _per_sample(c_out, x) * output

    return denoiser


class _DiffusersDenoiser:
    """What `from_diffusers` returns."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
        if alphas_cumprod is None:
            raise TypeError(
                f"scheduler must have alphas_cumprod, got {type(scheduler).__name__}; take the one"
                " that the model was trained with, such as DDPMScheduler"
            )
        self.unet, self.process = unet, DiscreteVP(alphas_cumprod)
        self.prediction = scheduler.config.prediction_type
        if self.prediction not in ("epsilon", "v_prediction", "sample"):
            raise NotImplementedError(
                f"prediction_type {self.prediction!r} has no denoiser; known are epsilon,"
                " v_prediction, sample"
            )

    def __call__(self, x: Tensor, sigma: Real, y: Tensor | None = None, **kwargs: Any) -> Tensor:
        rho = as_float64("sigma", sigma).to(x.device)
        alpha = (1 + rho.square()).rsqrt()
        t = self.process.inverse(-torch.log(rho)).clamp(0, self.process.t_max)
        if y is not None:
            kwargs["class_labels"] = y
        z = x * _per_sample(alpha, x)
        dtype = getattr(self.unet, "dtype", x.dtype)
        output = self.unet(z.to(dtype), t.float(), **kwargs)
        if not isinstance(output, Tensor):
            output = output[0]
        output = output[:, : x.shape[1]].to(x.dtype)
        if self.prediction == "sample":
            return output
        if self.prediction == "epsilon":
            return x - _per_sample(rho, x) * output
        return _per_sample(alpha, x) * z - _per_sample(rho * alpha, x) * output


def _levels(x: Tensor, sigma: Real) -> Tensor:
    """sigma as float64 ``(B, 1)`` or ``(1, 1)`` on the device of x."""
    levels = as_float64("sigma", sigma)
    if not isinstance(sigma, Tensor) and not bool(levels >= 0):
        raise ValueError(f"sigma must be at least 0, got {sigma}")
    if levels.ndim and tuple(levels.shape) != (len(x),):
        raise ValueError(f"sigma must have shape () or ({len(x)},), got {tuple(levels.shape)}")
    return levels.to(x.device).reshape(-1, 1)


def _per_sample(values: Tensor, x: Tensor) -> Tensor:
    """Values ``()`` or ``(B,)`` that multiply x, in its dtype."""
    return values.to(x.dtype).reshape(values.shape + (1,) * (x.ndim - 1) * values.ndim)


def _as_large(output: Tensor, x: Tensor) -> Tensor:
    """What a network returned, in the dtype of its input; refused where it has another shape."""
    checks.tensor("what the network returns", output)
    if output.shape != x.shape:
        raise ValueError(
            f"network must return the shape of x, {tuple(x.shape)}, got {tuple(output.shape)}"
        )
    return output.to(x.dtype)


def _check_classes(y: Tensor, count: int) -> None:
    """Refuse labels outside of -1 .. count - 1 where the host can read them."""
    if y.device.type == "cpu" and len(y) and not -1 <= int(y.min()) <= int(y.max()) < count:
        wrong = y[(y < -1) | (y >= count)][0]
        raise ValueError(
            f"y must be classes from 0 to {count - 1}, or -1 for none, got {int(wrong)}"
        )


def _integer_labels(name: str, labels: object, count: int) -> None:
    checks.tensor(name, labels)
    assert isinstance(labels, Tensor)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {labels.dtype}")
    if tuple(labels.shape) != (count,):
        raise ValueError(f"{name} must have shape ({count},), got {tuple(labels.shape)}")
