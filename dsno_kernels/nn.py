r"""The temporal layers of DSNO as modules, with parameters, keys and results of the official ones.

B batch, T time points, K modes, I/O input and output channels, H, W pixels; W_k the complex weight
of mode k, stored as real pairs:

.. math::
    S(x) = \mathrm{irfft}(\mathrm{rfft}(x)_{k<K} \cdot W_k), \qquad
    \mathrm{TimeConv}(x) = r(x) + \mathrm{LeakyReLU}_{0.01}(S(x))

with r the identity, or a 1x1 convolution (`nin`) where the channels change. The activation and the
sum ride on the last write of the spectral convolution, so a `TimeConv` reads x twice and writes y
once.
"""

from __future__ import annotations

import math
import numbers

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsno_kernels import precision as precisions
from dsno_kernels.functional.spectral_conv import spectral_conv

NEGATIVE_SLOPE = 0.01


class SpectralConv1d(nn.Module):
    r"""Spectral convolution along time: keep K Fourier modes, mix channels in each, transform back.

    .. math:: y = \mathrm{irfft}(\mathrm{rfft}(x)_{k<K} \cdot W_k)

    Args:
        in_channels, out_channels: I and O.
        modes: K; an input must have at least ``2*(K - 1)`` time points.
        time_dim, channel_dim: the axes of x that hold time and channels.
        precision: of the channel mixing, as in :func:`dsno_kernels.spectral_conv`; None follows
            the dtype of the result: PyTorch's float32 matmul setting wherever that is float32.

    Parameters:
        weights1: ``(I, O, K, 2)`` float32, real and imaginary part last; starts as U[0, 1)/(I*O).

    Returns of ``forward``:
        ``(B, T, O, H, W)`` for x ``(B, T, I, H, W)`` (or any axes that `time_dim` and `channel_dim`
        name): float32 for float16, bfloat16 and float32 x, under autocast too; float64 for float64.
        A module cast to half precision itself (``.to(torch.bfloat16)``), where the official one
        fails, stays in that dtype.

    Raises:
        TypeError: sizes that are not integers. ValueError: sizes below 1, an unknown precision; in
            ``forward``, an x that does not fit.

    Equivalent to: the official ``SpectralConv1d(in_ch, out_ch, modes1)``, with the same state dict.

    Source: DSNO (arXiv 2211.13449), temporal convolution layer.

    Example:
        >>> dk.nn.SpectralConv1d(8, 16, 2)(torch.randn(2, 4, 8, 5, 7)).shape
        torch.Size([2, 4, 16, 5, 7])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        modes: int,
        *,
        time_dim: int = 1,
        channel_dim: int = 2,
        precision: str | None = None,
    ) -> None:
        super().__init__()
        sizes = {"in_channels": in_channels, "out_channels": out_channels, "modes": modes}
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, numbers.Integral):
                raise TypeError(f"{name} must be an integer, got {size!r}")
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        precisions.choose(precision, torch.float32)
        self.in_channels, self.out_channels, self.modes = in_channels, out_channels, modes
        self.time_dim, self.channel_dim, self.precision = time_dim, channel_dim, precision
        self.weights1 = nn.Parameter(torch.empty(in_channels, out_channels, modes, 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew."""
        nn.init.uniform_(self.weights1, 0.0, 1.0 / (self.in_channels * self.out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.fused(x)

    def fused(
        self, x: Tensor, activation: str | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """The convolution with an activation and a residual, as in `dsno_kernels.spectral_conv`."""
        out_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        if self.weights1.dtype != out_dtype or out_dtype == torch.float32:
            out_dtype = torch.promote_types(out_dtype, torch.float32)
        return spectral_conv(
            x,
            self.weights1,
            time_dim=self.time_dim,
            channel_dim=self.channel_dim,
            activation=activation,
            negative_slope=NEGATIVE_SLOPE,
            residual=residual,
            out_dtype=out_dtype,
            precision=self.precision,
        )

    def extra_repr(self) -> str:
        precision = "" if self.precision is None else f", precision={self.precision!r}"
        return f"{self.in_channels}, {self.out_channels}, modes={self.modes}{precision}"


class NIN(nn.Module):
    r"""1x1 convolution ("network in network"): :math:`y_o = \sum_i W_{io} x_i + b_o`.

    Args:
        in_channels, out_channels: I and O.
        scale: of the variance-scaling initialization (fan average, uniform); b starts at zero.

    Parameters: ``W (I, O)`` and ``b (O)``. ``forward``: ``(.., I, H, W) -> (.., O, H, W)``.
    """

    def __init__(self, in_channels: int, out_channels: int, scale: float = 0.1) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.empty(in_channels, out_channels))
        self.b = nn.Parameter(torch.zeros(out_channels))
        variance_scaling_(self.W, scale)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.W.t()[:, :, None, None]
        if x.ndim <= 4:
            return F.conv2d(x, weight, self.b)
        y = F.conv2d(x.flatten(0, -4), weight, self.b)
        return y.view(*x.shape[:-3], *y.shape[-3:])


class TimeConv(nn.Module):
    r"""The temporal block of DSNO, one kernel: :math:`y = r(x) + \mathrm{LeakyReLU}_{0.01}(S(x))`.

    S is :class:`SpectralConv1d`; r is the identity or, with ``with_nin``, a 1x1 convolution.

    Args:
        in_channels, out_channels: I and O; equal unless ``with_nin``.
        modes: K; an input must have at least ``2*(K - 1)`` time points.
        act: ignored, as in the official layer, whose activation is always LeakyReLU(0.01).
        with_nin: whether r is a 1x1 convolution.
        precision: as in :class:`SpectralConv1d`.

    Parameters: ``t_conv.weights1`` and, with ``with_nin``, ``nin.W``, ``nin.b``.

    Returns of ``forward``:
        ``(B, T, O, H, W)`` for x ``(B, T, I, H, W)``, in the dtype that :class:`SpectralConv1d`
        returns.

    Raises:
        TypeError: sizes that are not integers. ValueError: sizes below 1; channels that differ
            without ``with_nin``; in ``forward``, an x that does not fit.

    Equivalent to: ``x + F.leaky_relu(t_conv(x), 0.01)``; the official ``TimeConv``, with the same
    state dict.

    Source: DSNO (arXiv 2211.13449), section 3.2.

    Example:
        >>> dk.nn.TimeConv(8, 8, 2)(torch.randn(2, 4, 8, 5, 7)).shape
        torch.Size([2, 4, 8, 5, 7])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        modes: int,
        act: object = None,
        with_nin: bool = False,
        *,
        precision: str | None = None,
    ) -> None:
        super().__init__()
        self.t_conv = SpectralConv1d(in_channels, out_channels, modes, precision=precision)
        if in_channels != out_channels and not with_nin:
            raise ValueError(
                f"the sum x + LeakyReLU(S(x)) needs as many output as input channels,"
                f" got {in_channels} and {out_channels}; pass with_nin=True to project x"
            )
        self.nin = NIN(in_channels, out_channels) if with_nin else None

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.nin is None else self.nin(x)
        return self.t_conv.fused(x, activation="leaky_relu", residual=residual)


def variance_scaling_(weight: Tensor, scale: float = 1.0) -> Tensor:
    """DDPM's initialization: uniform, variance ``scale / mean(fan_in, fan_out)``; 0 means 1e-10."""
    return nn.init.xavier_uniform_(weight, gain=math.sqrt(scale or 1e-10))
