r"""The exact teacher of a finite data set, and its trajectories; nothing here is trained.

The process is variance preserving: with log-SNR :math:`\lambda`,
:math:`\alpha^2 = 1/(1+e^{-\lambda})` and :math:`\sigma^2 = 1 - \alpha^2`. If the data are the N
images :math:`x_i`, each as likely as the other, and :math:`x_t = \alpha x_i + \sigma \epsilon`,
the best denoiser is known in closed form:

.. math::
    D(x_t) = \sum_i w_i x_i, \qquad
    w = \mathrm{softmax}_i\left(-\frac{|x_t - \alpha x_i|^2}{2 \sigma^2}\right)

Its probability-flow ODE is integrated with DDIM, from time t to s < t:

.. math:: x_s = \alpha_s D(x_t) + \sigma_s\, \frac{x_t - \alpha_t D(x_t)}{\sigma_t}
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsno_kernels.models import logsnr_schedule


def exact_denoiser(x: Tensor, logsnr: Tensor, images: Tensor) -> Tensor:
    """D(x): the mean of `images` given their noisy version x.

    Args:
        x: noisy points, ``(B, D)``.
        logsnr: of the noise, one number.
        images: the data, ``(N, D)``.

    Returns:
        ``(B, D)``.
    """
    alpha, variance = torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr)
    # -|x - alpha x_i|^2 / 2 without |x|^2, which all i share.
    scores = alpha * (x @ images.T) - 0.5 * alpha**2 * images.square().sum(1)
    return torch.softmax(scores / variance, dim=1) @ images


def ddim_step(x: Tensor, denoised: Tensor, logsnr: Tensor, next_logsnr: Tensor) -> Tensor:
    """x at `next_logsnr`, from x and D(x) at `logsnr`."""
    alpha, sigma = torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()
    next_alpha, next_sigma = torch.sigmoid(next_logsnr).sqrt(), torch.sigmoid(-next_logsnr).sqrt()
    return next_alpha * denoised + next_sigma * (x - alpha * denoised) / sigma


def trajectories(
    noise: Tensor, images: Tensor, steps: int, frames: int, batch: int = 512
) -> tuple[Tensor, Tensor]:
    """The ODE's states on the way from noise to data, at `frames` evenly spaced times.

    Args:
        noise: ``(B, C, H, W)``, standard normal: the state at t = 1.
        images: the data, ``(N, C, H, W)``.
        steps: DDIM steps from t = 1 to 0, a multiple of `frames`; one evaluation of the denoiser
            each.
        frames: how many states to keep; the last is the sample.
        batch: noises integrated at a time, which bounds the memory to ``batch * N`` numbers.

    Returns:
        The states, ``(B, frames, C, H, W)``, and their log-SNR, ``(frames,)``.
    """
    data = images.flatten(1)
    logsnr = logsnr_schedule(torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)).to(noise)
    kept = noise.new_empty(noise.shape[0], frames, data.shape[1])
    for start in range(0, noise.shape[0], batch):
        x = noise[start : start + batch].flatten(1)
        for step in range(steps):
            x = ddim_step(x, exact_denoiser(x, logsnr[step], data), logsnr[step], logsnr[step + 1])
            if (step + 1) % (steps // frames) == 0:
                kept[start : start + batch, (step + 1) // (steps // frames) - 1] = x
    return kept.unflatten(2, noise.shape[1:]), logsnr[steps // frames :: steps // frames]
