"""Every way to compute a spectral convolution that is timed here, as one call `(x, weight) -> y`.

The baseline is the eager layer as the official DSNO project (axes B, T, C, H, W) and FNO-1d (axes
B, C, L) write it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

import dsno_kernels as dk
from benchmarks.shapes import Shape
from dsno_kernels import backends

Call = Callable[[Tensor, Tensor], Tensor]

BASELINE = "eager"
BACKENDS = ("cpu", "triton", "cuda", "reference")
# "bf16_io" is bf16 with x, y and their gradients in bfloat16 too; the others have them in float32.
PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("bf16_io", "tf32", "fp32", "bf16x3", "bf16")}
# The fused kernels serve short times on a GPU; the CUDA C++ path is measured beyond.
CUDA_FROM = 16

# When a peer is measured: the most important entries come first, so that a run cut short has them.
EVERYWHERE, SOME, COMPILED = range(3)


@dataclass(frozen=True)
class Peer:
    """A name in the tables, the precisions it has, and how to make the call for a shape.

    `make` raises `Unavailable` where the peer cannot run here.
    """

    name: str
    precisions: tuple[str, ...]
    make: Callable[[Shape, str, torch.device], Call]
    when: int = SOME

    def at(self, shape: Shape) -> bool:
        """Whether it is measured at a shape."""
        if self.name == "dsno_kernels[cuda]" and shape.T < CUDA_FROM:
            return False
        return self.when == EVERYWHERE or (
            shape.all_peers and (self.when < COMPILED or shape.compiled)
        )


class Unavailable(Exception):
    """Why a peer is not measured on this machine."""


def eager(x: Tensor, weight: Tensor, modes: int) -> Tensor:
    """The official DSNO layer, `(B, T, C, H, W)`."""
    X = torch.fft.rfftn(x.float(), dim=[1])[:, :modes]
    Y = torch.einsum("bmihw,iom->bmohw", X, torch.view_as_complex(weight))
    return torch.fft.irfftn(Y, s=[x.shape[1]], dim=[1])


def eager_fno(x: Tensor, weight: Tensor, modes: int) -> Tensor:
    """The FNO layer, `(B, C, L)`: the product goes into a zeroed spectrum of full length."""
    L = x.shape[-1]
    Y = torch.zeros(x.shape[0], weight.shape[1], L // 2 + 1, dtype=torch.cfloat, device=x.device)
    X = torch.fft.rfft(x)[:, :, :modes]
    Y[:, :, :modes] = torch.einsum("bix,iox->box", X, torch.view_as_complex(weight))
    return torch.fft.irfft(Y, n=L)


def _eager(shape: Shape, precision: str, device: torch.device) -> Call:
    layer = eager_fno if shape.time_dim == 2 else eager
    return functools.partial(layer, modes=shape.modes)


def _compiled(make: Callable[[Shape, str, torch.device], Call]) -> Callable[..., Call]:
    def make_compiled(shape: Shape, precision: str, device: torch.device) -> Call:
        torch._dynamo.reset()
        call: Call = torch.compile(make(shape, precision, device), dynamic=False)
        return call

    return make_compiled


def fft_bmm(x: Tensor, weight: Tensor, modes: int) -> Tensor:
    """cuFFT and cuBLAS in three calls, the products in x's order of axes: `(B, T, C, H, W)`."""
    X = torch.fft.rfft(x, dim=1)[:, :modes].flatten(3)  # [B, K, I, P]
    W = torch.view_as_complex(weight).permute(2, 1, 0)  # [K, O, I]
    return torch.fft.irfft((W @ X).unflatten(3, x.shape[3:]), n=x.shape[1], dim=1)


def fft_bmm_fno(x: Tensor, weight: Tensor, modes: int) -> Tensor:
    """The same for `(B, C, L)`; irfft pads the spectrum."""
    X = torch.fft.rfft(x)[:, :, :modes].permute(2, 0, 1)  # [K, B, I]
    W = torch.view_as_complex(weight).permute(2, 0, 1)  # [K, I, O]
    return torch.fft.irfft((X @ W).permute(1, 2, 0), n=x.shape[-1])


def _fft_bmm(shape: Shape, precision: str, device: torch.device) -> Call:
    return functools.partial(fft_bmm_fno if shape.time_dim == 2 else fft_bmm, modes=shape.modes)


def dft_tables(T: int, modes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """F `[M, T]`, x to bin 0, Nyquist, then Re, Im of each other bin; and G `[T, M]`, back to y."""
    nyquist = 2 * (modes - 1) == T
    k = torch.tensor([0, *([T // 2] if nyquist else [])], dtype=torch.float64)
    t = torch.arange(T, dtype=torch.float64)
    real = torch.cos(2 * torch.pi / T * k[:, None] * t)
    k = torch.arange(1, modes - nyquist, dtype=torch.float64)
    angle = 2 * torch.pi / T * (k[:, None] * t).remainder(T)
    pairs = torch.stack([angle.cos(), -angle.sin()], 1).flatten(0, 1)
    F = torch.cat([real, pairs])
    G = torch.cat([real, 2 * pairs]).T / T
    return F.float().to(device), G.float().contiguous().to(device)


class RealGemm(torch.autograd.Function):
    """What PyTorch alone can do: z = F x, one real block product a mode, y = G z."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, F: Tensor, G: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[no-untyped-def]
        z = _analyze(F, x).to(dtype)  # [M, I, N]
        real, blocks = _blocks(weight, z.shape[0])
        ctx.save_for_backward(z, weight, F, G)
        ctx.shape = x.shape
        return _synthesize(G, _mix(real.to(dtype), blocks.to(dtype), z), x.shape)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        z, weight, F, G = ctx.saved_tensors
        M, I, N = z.shape
        real, blocks = _blocks(weight, M)
        g = _analyze(G.T.contiguous(), grad).to(z.dtype)  # [M, O, N]
        dz = _mix(real.mT.to(z.dtype), blocks.mT.to(z.dtype), g)
        dx = _synthesize(F.T.contiguous(), dz, ctx.shape)
        n_real, O = real.shape[0], g.shape[1]
        d_real = g[:n_real] @ z[:n_real].mT
        d_blocks = g[n_real:].reshape(-1, 2 * O, N) @ z[n_real:].reshape(-1, 2 * I, N).mT
        d = d_blocks.float().view(-1, 2, O, 2, I)
        dW = torch.zeros(weight.shape[2], O, I, 2, device=z.device)
        dW[1 : 1 + d.shape[0], ..., 0] = d[:, 0, :, 0] + d[:, 1, :, 1]
        dW[1 : 1 + d.shape[0], ..., 1] = d[:, 1, :, 0] - d[:, 0, :, 1]
        dW[0, ..., 0] = d_real[0]
        if n_real == 2:
            dW[-1, ..., 0] = d_real[1]
        return dx, dW.permute(2, 1, 0, 3), None, None, None


def _analyze(F: Tensor, x: Tensor) -> Tensor:
    """[M, I, N] of x `(B, T, I, H, W)` or `(B, I, L)`."""
    if x.ndim == 3:
        return (x @ F.T).permute(2, 1, 0).contiguous()
    z = F @ x.flatten(2)  # [B, M, I * P]
    return z.unflatten(2, (x.shape[2], -1)).permute(1, 2, 0, 3).reshape(F.shape[0], x.shape[2], -1)


def _synthesize(G: Tensor, z: Tensor, like: torch.Size) -> Tensor:
    if len(like) == 3:
        return z.float().permute(2, 1, 0) @ G.T
    B, T, _, H, W = like
    z = z.float().unflatten(2, (B, H * W)).permute(2, 0, 1, 3).reshape(B, z.shape[0], -1)
    return (G @ z).view(B, T, -1, H, W)


def _blocks(weight: Tensor, M: int) -> tuple[Tensor, Tensor]:
    """Matrices of the real modes `[n_real, O, I]` and of the complex ones `[.., 2O, 2I]`."""
    K = weight.shape[2]
    nyquist = M == 2 * K - 2
    W = weight.permute(3, 2, 1, 0)  # [2, K, O, I]
    real = W[0][[0, K - 1]] if nyquist else W[0][:1]
    Wr, Wi = W[:, 1 : K - nyquist]
    blocks = torch.cat([torch.cat([Wr, -Wi], 2), torch.cat([Wi, Wr], 2)], 1)
    return real, blocks


def _mix(real: Tensor, blocks: Tensor, z: Tensor) -> Tensor:
    n_real, N = real.shape[0], z.shape[2]
    y = z.new_empty(z.shape[0], real.shape[1], N)
    torch.bmm(real, z[:n_real], out=y[:n_real])
    if blocks.shape[0]:
        pairs = z[n_real:].view(blocks.shape[0], -1, N)
        torch.bmm(blocks, pairs, out=y[n_real:].view(blocks.shape[0], -1, N))
    return y


def arithmetic(precision: str) -> tuple[str, torch.dtype, torch.dtype]:
    """The `precision` of the ops, the dtype of the products' operands in PyTorch, that of x."""
    if precision == "bf16_io":
        return "bf16", torch.bfloat16, torch.bfloat16
    return precision, torch.bfloat16 if precision == "bf16" else torch.float32, torch.float32


def _real_gemm(shape: Shape, precision: str, device: torch.device) -> Call:
    F, G = dft_tables(shape.T, shape.modes, device)
    dtype = arithmetic(precision)[1]

    def call(x: Tensor, weight: Tensor) -> Tensor:
        y: Tensor = RealGemm.apply(x, weight, F, G, dtype)
        return y

    return call


def _neuralop(shape: Shape, precision: str, device: torch.device) -> Call:
    """neuraloperator's SpectralConv. It takes `(B, C, L)`: other axes pay for a new layout."""
    try:
        from neuralop.layers.spectral_convolution import SpectralConv  # type: ignore[import-not-found]
    except ImportError as error:
        raise Unavailable(f"neuraloperator is not installed ({error})") from None
    layer = SpectralConv(shape.channels, shape.channels, (2 * (shape.modes - 1),), bias=False).to(
        device
    )
    for parameter in list(layer.parameters()):
        parameter.requires_grad_(False)

    def call(x: Tensor, weight: Tensor) -> Tensor:
        # The weight under test stands in for the layer's own, so that its gradient is computed too.
        layer.weight = torch.view_as_complex(weight)
        if shape.time_dim == 2:
            y: Tensor = layer(x)
            return y
        B, T, C, H, W = x.shape
        signals = x.permute(0, 3, 4, 2, 1).reshape(-1, C, T)
        out: Tensor = layer(signals).view(B, H, W, -1, T).permute(0, 4, 3, 1, 2).contiguous()
        return out

    del layer.weight
    return call


def _ours(backend: str) -> Peer:
    def make(shape: Shape, precision: str, device: torch.device) -> Call:
        name, _, dtype = arithmetic(precision)
        for op in ("spectral_conv", "spectral_conv_weight_grad"):
            request = backends.Request(op, device, dtype, name, shape.T, shape.modes)
            reason = backends.unsupported(backend, request)
            if reason:
                raise Unavailable(f"backend {backend}: {reason}")
        return functools.partial(
            dk.spectral_conv,
            time_dim=shape.time_dim,
            channel_dim=shape.channel_dim,
            precision=name,
            backend=backend,
        )

    # The reference computes in float32 whatever it is asked: one row is enough.
    if backend == "reference":
        return Peer("dsno_kernels[reference]", ("fp32",), make)
    return Peer(f"dsno_kernels[{backend}]", PRECISIONS["cuda"], make, EVERYWHERE)


PEERS = (
    Peer(BASELINE, ("fp32", "tf32"), _eager, EVERYWHERE),
    Peer("torch.compile(eager)", ("fp32",), _compiled(_eager), COMPILED),
    Peer("torch.fft + bmm", ("fp32", "tf32"), _fft_bmm),
    Peer("real GEMMs in PyTorch", ("fp32", "tf32", "bf16"), _real_gemm),
    Peer("torch.compile(real GEMMs)", ("fp32", "tf32"), _compiled(_real_gemm), COMPILED),
    Peer("neuraloperator", ("fp32",), _neuralop),
    *(_ours(backend) for backend in BACKENDS),
)


def cases(kind: str, shapes: Iterable[Shape]) -> list[tuple[Shape, str, Peer]]:
    """(shape, precision, peer) in the order of measuring, for a CPU ("cpu") or a GPU ("cuda").

    Every peer of a shape stands right after the eager layer. On a GPU what matters most comes
    first: this library at the shapes where every peer is measured, then at the others, then the
    peers.
    """
    found = [
        (shape, precision, peer)
        for shape in shapes
        for precision in PRECISIONS[kind]
        for peer in PEERS
        if precision in peer.precisions and peer.at(shape)
    ]
    if kind == "cuda":
        found.sort(key=lambda case: (case[2].when, not case[0].all_peers))
    return found
