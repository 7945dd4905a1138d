r"""The student: a small DSNO that learns the teacher's whole trajectory from its noise, in one
evaluation.

With :math:`x_T` the noise, :math:`x_{t_1}..x_{t_4}` the teacher's states and :math:`\lambda_i`
their log-SNR, the loss is

.. math::
    \sum_i w_i\, |f(x_T)_i - x_{t_i}|, \qquad w_i \propto \mathrm{clamp}(e^{\lambda_i / 2}, 1, 10)

as in DSNO (arXiv 2211.13449): L1, with most of the weight on the last state, which is the sample.
There the upper limit is 1e4; in the few steps of a demo the other states would then not be learned.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dsno_kernels.models import DSNO, DSNOConfig

BATCH = 64
LEARNING_RATE = 2e-3
WARM_UP = 40
EMA_DECAY = 0.995


def build(channels: int, size: int, device: torch.device) -> DSNO:
    """The student with the plain PyTorch layers of the official project, for `swap_layers` to
    replace.
    """
    config = DSNOConfig(
        image_size=size,
        image_channels=channels,
        channels=32,
        channel_mult=(1, 1),
        num_res_blocks=1,
        attention_resolutions=(),
        embedding_dim=64,
    )
    return DSNO(config, kernels=False).to(device)


def frame_weights(logsnr: Tensor) -> Tensor:
    """w_i, adding up to 1."""
    weights = torch.exp(0.5 * logsnr).clamp(1.0, 10.0)
    return weights / weights.sum()


def loss_of(model: nn.Module, noise: Tensor, frames: Tensor, logsnr: Tensor) -> Tensor:
    error = (model(noise, logsnr) - frames).abs().mean(dim=(0, 2, 3, 4))  # [T]
    return (error * frame_weights(logsnr)).sum()


def train(
    model: DSNO,
    noise: Tensor,
    frames: Tensor,
    logsnr: Tensor,
    steps: int,
    report: Callable[[float], None],
) -> DSNO:
    """Adam with warm-up and a cosine decay on random batches of the trajectories.

    Args:
        model: trained in place.
        noise: ``(N, C, H, W)``.  frames: ``(N, T, C, H, W)``, the teacher's states.  logsnr:
            ``(T,)``.
        steps: optimizer steps.
        report: called after each step with the loss.

    Returns:
        The exponential moving average of the weights over the steps, in a copy of the model.
    """
    average = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99))
    warm_up = min(WARM_UP, max(1, steps // 5))
    for step in range(steps):
        rate = (
            LEARNING_RATE
            * min(1.0, (step + 1) / warm_up)
            * 0.5
            * (1 + math.cos(math.pi * step / steps))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = torch.randint(noise.shape[0], (BATCH,), device="cpu").to(noise.device)
        loss = loss_of(model, noise[batch], frames[batch], logsnr)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            # A young average must not remember the random start.
            weight = 1.0 - min(EMA_DECAY, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), weight)
        report(float(loss.detach()))
    return average


@torch.no_grad()
def sample(model: nn.Module, noise: Tensor, logsnr: Tensor, batch: int = 256) -> Tensor:
    """All T states from the noise, one evaluation a sample, ``(B, T, C, H, W)``; the last is the
    image.
    """
    return torch.cat([model(part, logsnr) for part in noise.split(batch)])
