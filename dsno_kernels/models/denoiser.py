r"""A DSNO network without temporal layers as a denoiser, preconditioned as in EDM or FDM.

For :math:`x = x_0 + \sigma \epsilon`

.. math:: D(x, \sigma) = c_{skip}\, x + c_{out}\, F(c_{in}\, x, \lambda)

with F the network, which sees the noise level as log-SNR :math:`\lambda = -2 \log \sigma`. The
coefficients are those of :class:`dsno_kernels.diffusion.Preconditioner` for a process; for EDM and
data of standard deviation :math:`\sigma_d`

.. math::
    c_{skip} = \frac{\sigma_d^2}{\sigma^2 + \sigma_d^2}, \quad
    c_{out} = \frac{\sigma \sigma_d}{\sqrt{\sigma^2 + \sigma_d^2}}, \quad
    c_{in} = \frac{1}{\sqrt{\sigma^2 + \sigma_d^2}}
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsno_kernels.diffusion.preconditioning import Preconditioner
from dsno_kernels.diffusion.processes import EDM, Process
from dsno_kernels.functional import checks


class EDMDenoiser(nn.Module):
    """The expected clean image, given the noisy one and its noise level.

    Args:
        network: ``F(x (B, C, H, W), logsnr (B, 1), y) -> (B, 1, C, H, W)``; a :class:`DSNO` with
            ``time_conv=False``.
        sigma_data: standard deviation of the data; by default that of the process, 0.5.
        process: whose preconditioner it is: `EDM`, `VE`, a VP process, or `FDM` of one; by default
            EDM. It may be sampled along any process, see `dk.diffusion.for_process`.

    Args of ``forward``:
        x: ``x0 + sigma * noise``, ``(B, C, H, W)``, any floating dtype.
        sigma: standard deviation of the noise, a number or a tensor ``()`` or ``(B,)``.
        y: classes, ``(B,)`` integers (-1 is none) or ``(B, num_classes)`` weights.
        raw: x is ``c_in * x`` already, and what returns is F, as training wants it.

    Returns of ``forward``:
        x0, the shape and dtype of x. With `raw` F, in the dtype of the network.

    Raises:
        TypeError: a network that is no module; another process; an x that is not real floating
        point. ValueError: sigma_data that is not positive, or not that of the process; a sigma of
        another shape, or a number below 0.

    Source: EDM (arXiv 2206.00364), table 1; there the network sees ``log(sigma) / 4``. FDM (arXiv
    2306.06991).

    Example:
        >>> config = dataclasses.replace(dk.models.DSNOConfig.cifar10(), time_conv=False)
        >>> denoiser = dk.models.EDMDenoiser(dk.models.DSNO(config), sigma_data=0.5)
        >>> x0 = denoiser(torch.randn(2, 3, 32, 32), sigma=1.5)
    """

    def __init__(
        self,
        network: nn.Module,
        sigma_data: float | None = None,
        process: Process | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"network must be a torch.nn.Module, got {type(network).__name__}")
        if process is None:
            process = EDM() if sigma_data is None else EDM(sigma_data=float(sigma_data))
        self.preconditioner = Preconditioner(process)
        self.sigma_data = float(process.sigma_data)
        if sigma_data is not None and sigma_data != self.sigma_data:
            raise ValueError(
                f"sigma_data is {sigma_data}, the process has {self.sigma_data}; leave one out"
            )
        self.network = network

    @property
    def process(self) -> Process:
        """Whose preconditioner it has."""
        return self.preconditioner.process

    def forward(
        self, x: Tensor, sigma: Tensor | float, y: Tensor | None = None, raw: bool = False
    ) -> Tensor:
        """x0; see the class."""
        checks.real("x", x)
        if not isinstance(sigma, Tensor) and not sigma >= 0:
            raise ValueError(f"sigma must be at least 0, got {sigma}")
        wide = torch.promote_types(x.dtype, torch.float32)
        level = torch.as_tensor(sigma, dtype=wide, device=x.device)
        if level.ndim > 1 or (level.ndim == 1 and len(level) != len(x)):
            raise ValueError(
                f"sigma must be a number or have shape ({len(x)},), got {tuple(level.shape)}"
            )
        level = level.expand(len(x))[:, None]
        if raw:
            return self._network(x, level, y)
        coefficients = self.preconditioner.coefficients(level[:, :, None, None])
        c_skip, c_out, c_in = (value.to(wide) for value in coefficients[:3])
        noisy = x.to(wide)
        return (c_skip * noisy + c_out * self._network(c_in * noisy, level, y)).to(x.dtype)

    def _network(self, x: Tensor, level: Tensor, y: Tensor | None) -> Tensor:
        dtype = next(self.network.parameters()).dtype
        return self.network(x.to(dtype), -2.0 * level.log(), y)[:, 0]
