"""`truncated_rfft` and `truncated_irfft`: what they accept, what they promise, and every check."""

from __future__ import annotations

import torch
from torch import Tensor

from dsno_kernels.functional import checks
from dsno_kernels.ops import truncated_fft as _fft


def truncated_rfft(x: Tensor, modes: int, dim: int = -1, *, backend: str | None = None) -> Tensor:
    r"""The first K bins of the real Fourier transform along one axis.

    Equivalent to ``torch.fft.rfft(x, dim=dim).narrow(dim, 0, K)``.

    Args:
        x: real, floating point, any shape and strides.
        modes: K, ``1 <= K <= T//2 + 1`` for an axis of length T.
        dim: the axis.
        backend: as in :func:`spectral_conv`.

    Returns:
        complex64 (complex128 of float64), the shape of x with T -> K, contiguous.

    Raises:
        TypeError: x is not floating point. ValueError: dim or modes out of range.
        NotImplementedError: a backend that was asked for and cannot run this.

    Example:
        >>> dk.truncated_rfft(torch.randn(3, 100), 5).shape
        torch.Size([3, 5])
    """
    checks.real("x", x)
    dim = checks.dim("dim", dim, x)
    checks.length(x.shape[dim], "the axis to transform")
    checks.modes(modes, x.shape[dim], x.shape[dim])
    name = checks.backend(backend)
    return torch.view_as_complex(_fft.differentiable_rfft(x, modes, dim, name))


def truncated_irfft(
    spectrum: Tensor, n: int, dim: int = -1, *, backend: str | None = None
) -> Tensor:
    r"""The inverse real Fourier transform along one axis of K bins, the other bins zero.

    Equivalent to ``torch.fft.irfft(spectrum, n, dim=dim)``. The imaginary parts of bin 0 and of bin
    n/2 are ignored, on every backend.

    Args:
        spectrum: complex64 or complex128, K bins along dim, ``1 <= K <= n//2 + 1``.
        n: the length of the result along dim.
        dim: the axis.
        backend: as in :func:`spectral_conv`.

    Returns:
        float32 (float64 of complex128), the shape of the spectrum with K -> n, contiguous.

    Raises:
        TypeError: the spectrum is not complex. ValueError: dim or n out of range.
        NotImplementedError: a backend that was asked for and cannot run this.

    Example:
        >>> x = torch.randn(3, 100)
        >>> dk.truncated_irfft(dk.truncated_rfft(x, 51), 100).allclose(x, atol=1e-5)
        True
    """
    checks.tensor("spectrum", spectrum)
    if spectrum.dtype not in (torch.complex64, torch.complex128):
        raise TypeError(
            f"spectrum must be torch.complex64 or torch.complex128, got {spectrum.dtype}"
        )
    dim = checks.dim("dim", dim, spectrum)
    n = checks.length(n, "n")
    checks.modes(spectrum.shape[dim], n, n)
    name = checks.backend(backend)
    pairs = torch.view_as_real(spectrum.resolve_conj())
    return _fft.differentiable_irfft(pairs, n, dim, name)
