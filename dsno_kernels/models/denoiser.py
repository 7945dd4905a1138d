r"""A DSNO network without temporal layers as a denoiser, preconditioned as in EDM.

For :math:`x = x_0 + \sigma \epsilon` and data of standard deviation :math:`\sigma_d`

.. math::
    D(x, \sigma) = c_{skip}\, x + c_{out}\, F(c_{in}\, x, \lambda), \quad
    c_{skip} = \frac{\sigma_d^2}{\sigma^2 + \sigma_d^2}, \quad
    c_{out} = \frac{\sigma \sigma_d}{\sqrt{\sigma^2 + \sigma_d^2}}, \quad
    c_{in} = \frac{1}{\sqrt{\sigma^2 + \sigma_d^2}}

with F the network, which sees the noise level as log-SNR :math:`\lambda = -2 \log \sigma`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EDMDenoiser(nn.Module):
    """The expected clean image, given the noisy one and its noise level.

    Args:
        network: ``F(x (B, C, H, W), logsnr (B, 1), y) -> (B, 1, C, H, W)``; a :class:`DSNO` with
            ``time_conv=False``.
        sigma_data: standard deviation of the data.

    Args of ``forward``:
        x: ``x0 + sigma * noise``, ``(B, C, H, W)``, any floating dtype.
        sigma: standard deviation of the noise, a number or a tensor ``()`` or ``(B,)``.
        y: classes, ``(B,)`` integers (-1 is none) or ``(B, num_classes)`` weights.

    Returns of ``forward``:
        x0, the shape and dtype of x.

    Raises:
        TypeError: a network that is no module. ValueError: sigma_data that is not positive, a sigma
        of another shape.

    Source: EDM (arXiv 2206.00364), table 1; there the network sees ``log(sigma) / 4``.

    Example:
        >>> config = dataclasses.replace(dk.models.DSNOConfig.cifar10(), time_conv=False)
        >>> denoiser = dk.models.EDMDenoiser(dk.models.DSNO(config), sigma_data=0.5)
        >>> x0 = denoiser(torch.randn(2, 3, 32, 32), sigma=1.5)
    """

    def __init__(self, network: nn.Module, sigma_data: float = 0.5) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"network must be a torch.nn.Module, got {type(network).__name__}")
        if not sigma_data > 0:
            raise ValueError(f"sigma_data must be positive, got {sigma_data}")
        self.network = network
        self.sigma_data = float(sigma_data)

    def forward(self, x: Tensor, sigma: Tensor | float, y: Tensor | None = None) -> Tensor:
        """x0; see the class."""
        wide = torch.promote_types(x.dtype, torch.float32)
        level = torch.as_tensor(sigma, dtype=wide, device=x.device)
        if level.ndim > 1 or (level.ndim == 1 and len(level) != len(x)):
            raise ValueError(
                f"sigma must be a number or have shape ({len(x)},), got {tuple(level.shape)}"
            )
        level = level.expand(len(x))[:, None, None, None]
        variance = level.square() + self.sigma_data**2
        noisy = x.to(wide)
        dtype = next(self.network.parameters()).dtype
        logsnr = -2.0 * level.log().view(-1, 1)
        out = self.network((noisy * variance.rsqrt()).to(dtype), logsnr, y)[:, 0]
        skip = self.sigma_data**2 / variance * noisy
        return (skip + level * self.sigma_data * variance.rsqrt() * out).to(x.dtype)
