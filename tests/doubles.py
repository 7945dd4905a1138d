"""Stand-ins for the layers that `swap_layers` knows: what they compute and how they store it; a
model of them, and a table of small ones with the shape of an input.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class DsnoSpectralConv1d(nn.Module):
    """DSNO's: x (B, T, I, H, W), weights1 (I, O, K, 2)."""

    def __init__(self, in_ch: int, out_ch: int, modes1: int) -> None:
        super().__init__()
        self.modes1 = modes1
        self.weights1 = nn.Parameter(torch.rand(in_ch, out_ch, modes1, 2) / (in_ch * out_ch) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfftn(x.float(), dim=[1])[:, : self.modes1]
        spectrum = torch.einsum("bmihw,iom->bmohw", spectrum, torch.view_as_complex(self.weights1))
        return torch.fft.irfftn(spectrum, s=[x.shape[1]], dim=[1])


class DsnoTimeConv(nn.Module):
    """DSNO's residual block around it."""

    def __init__(self, in_ch: int, out_ch: int, modes: int) -> None:
        super().__init__()
        self.with_nin = False
        self.t_conv = DsnoSpectralConv1d(in_ch, out_ch, modes)
        self.act = nn.LeakyReLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.t_conv(x))


class FnoSpectralConv1d(nn.Module):
    """FNO's: x (B, I, L), weights1 complex (I, O, K)."""

    def __init__(self, in_channels: int, out_channels: int, modes1: int) -> None:
        super().__init__()
        self.out_channels, self.modes1 = out_channels, modes1
        self.weights1 = nn.Parameter(
            torch.rand(in_channels, out_channels, modes1, dtype=torch.cfloat)
        )

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x)
        out = torch.zeros(
            x.shape[0], self.out_channels, x.shape[2] // 2 + 1, dtype=torch.cfloat, device=x.device
        )
        out[:, :, : self.modes1] = torch.einsum(
            "bix,iox->box", spectrum[:, :, : self.modes1], self.complex_weights()
        )
        return torch.fft.irfft(out, n=x.shape[2])

    def complex_weights(self) -> Tensor:
        return self.weights1


class PairsSpectralConv1d(FnoSpectralConv1d):
    """FNO's with weights1 in real pairs: the structure of DSNO's layer with the axes of FNO's."""

    def __init__(self, in_channels: int, out_channels: int, modes1: int) -> None:
        super().__init__(in_channels, out_channels, modes1)
        self.weights1 = nn.Parameter(torch.view_as_real(self.weights1.detach()).clone())

    def complex_weights(self) -> Tensor:
        return torch.view_as_complex(self.weights1)


class DenseTensor(nn.Module):
    """neuraloperator's wrapper of a weight that is not factorized."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = nn.Parameter(tensor)


class NeuralopSpectralConv(nn.Module):
    """neuraloperator's in 1-D: x (B, I, L), weight complex (I, O, K), a bias, any length of y."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        n_modes: int,
        *,
        max_n_modes: int | None = None,
        bias: bool = True,
        fft_norm: str = "forward",
        wrapped: bool = True,
        resolution_scaling_factor: float | None = None,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.order = in_channels, out_channels, 1
        self.complex_data, self.separable, self.fno_block_precision = False, False, "full"
        self.fft_norm = fft_norm
        self.n_modes = [n_modes // 2 + 1]
        self.max_n_modes = [max_n_modes or self.n_modes[0]]
        self.resolution_scaling_factor = (
            None if resolution_scaling_factor is None else [resolution_scaling_factor]
        )
        weight = torch.randn(in_channels, out_channels, self.max_n_modes[0], dtype=torch.cfloat)
        self.weight = DenseTensor(weight) if wrapped else nn.Parameter(weight)
        self.bias = nn.Parameter(torch.randn(out_channels, 1)) if bias else None

    def forward(self, x: Tensor, output_shape: tuple[int, ...] | None = None) -> Tensor:
        length = x.shape[2]
        weight = self.weight.tensor if isinstance(self.weight, DenseTensor) else self.weight
        bins = length // 2 + 1
        modes = min(bins, self.n_modes[0])
        spectrum = torch.fft.rfft(x, norm=self.fft_norm)[:, :, :modes]
        out = torch.zeros(x.shape[0], self.out_channels, bins, dtype=torch.cfloat, device=x.device)
        out[:, :, :modes] = torch.einsum("bix,iox->box", spectrum, weight[:, :, :modes])
        n = length
        if output_shape is not None:
            n = output_shape[0]
        elif self.resolution_scaling_factor is not None:
            n = round(length * self.resolution_scaling_factor[0])
        out[..., 0].imag.zero_()
        if n % 2 == 0:
            out[..., -1].imag.zero_()
        y = torch.fft.irfft(out, n=n, norm=self.fft_norm)
        return y if self.bias is None else y + self.bias


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(DsnoTimeConv(6, 6, 2), nn.Identity(), DsnoTimeConv(6, 6, 3))
        self.head = nn.Conv3d(5, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


VIDEO, SIGNAL = (2, 5, 6, 3, 5), (3, 6, 11)

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dsno_conv": (lambda: DsnoSpectralConv1d(6, 4, 3), VIDEO),
    "dsno_time_conv": (lambda: DsnoTimeConv(6, 6, 3), VIDEO),
    "fno": (lambda: FnoSpectralConv1d(6, 4, 4), SIGNAL),
    "fno_pairs": (lambda: PairsSpectralConv1d(6, 4, 4), SIGNAL),
    "neuralop": (lambda: NeuralopSpectralConv(6, 4, 7), SIGNAL),
    "neuralop_backward": (
        lambda: NeuralopSpectralConv(6, 4, 8, fft_norm="backward", bias=False),
        SIGNAL,
    ),
    "neuralop_ortho": (
        lambda: NeuralopSpectralConv(6, 4, 8, fft_norm="ortho", wrapped=False),
        SIGNAL,
    ),
    "neuralop_fewer_modes": (lambda: NeuralopSpectralConv(6, 4, 5, max_n_modes=9), SIGNAL),
    "neuralop_twice_as_long": (
        lambda: NeuralopSpectralConv(6, 4, 5, resolution_scaling_factor=2.0),
        SIGNAL,
    ),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    return make(), torch.randn(shape)
