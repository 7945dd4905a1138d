"""The real arithmetic of truncated real Fourier transforms: which coefficients exist, and their
weights.

For a real signal of length T, bin k of `rfft` is `X_k = sum_t x_t exp(-2 pi i k t / T)`. Bin 0, and
bin T/2 of an even T (Nyquist), are real. `irfft` to length n is `y_s = (1/n) sum_k alpha_k Re(Y_k
exp(2 pi i k s / n))` with `alpha_k = 1` at bin 0 and at n/2, 2 elsewhere: imaginary parts there
never reach y.
"""

from __future__ import annotations

import math


def is_self_conjugate(k: int, n: int) -> bool:
    """Whether bin k of a real signal of length n is real: k = 0, or the Nyquist bin k = n/2."""
    return k == 0 or 2 * k == n


def alpha(k: int, n: int) -> float:
    """How often bin k counts in the inverse transform to length n."""
    return 1.0 if is_self_conjugate(k, n) else 2.0


def max_modes(n: int) -> int:
    """The number of bins of `rfft` of a signal of length n."""
    return n // 2 + 1


def coefficients(n: int, modes: int) -> list[tuple[int, bool]]:
    """The real coefficients (k, is_imaginary) that describe the first `modes` bins of a real signal
    of length n.
    """
    parts = [(k, imag) for k in range(modes) for imag in (False, True)]
    return [(k, imag) for k, imag in parts if not (imag and is_self_conjugate(k, n))]


def angle(k: int, t: int, n: int) -> float:
    """2 pi k t / n, reduced to one turn with integers so that long transforms stay exact."""
    return 2.0 * math.pi * ((k * t) % n) / n
