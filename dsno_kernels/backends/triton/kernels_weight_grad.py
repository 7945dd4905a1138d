"""dW_k = alpha_k / n sum over pixels of conj(X_k) (x) G_k, in two deterministic passes.

First pass: a program owns a tile of input and output channels and a range of pixels and writes its
partial sums,

    dW_re = z_re g_re + z_im g_im        dW_im = z_re g_im - z_im g_re

Second pass: partial sums are added in order, scaled and written as (I, O, K, 2). Imaginary weights
of bins that are self-conjugate in x and in y reach nothing: their gradient is written as exact
zeros.
"""

# Device code: its arguments get their types from each launch, not from annotations.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from dsno_kernels.backends.triton.arithmetic import (
    multiply_add,
    negative,
    parts,
    pixel_rows,
    transposed,
    wide,
)
from dsno_kernels.backends.triton.kernels_general import (
    load_bin,
    load_real,
    planes,
    self_conjugate,
)
from dsno_kernels.backends.triton.kernels_small import coefficient, load_slices


@triton.constexpr_function
def first_sum(k, T, N):
    """Index of the real part of dW_k among the sums that exist."""
    return sum(1 if max(parts(j, T), parts(j, N)) == 1 else 2 for j in range(k))


@triton.constexpr_function
def sum_parts(k, T, N):
    return max(parts(k, T), parts(k, N))


@triton.jit
def spectral_conv_weight_grad_kernel(
    x_ptr, grad_ptr, grad_positive_ptr, partial_ptr, B, I, O, P, padded_pixels,
    pixel_groups, rows, rows_per_split, negative_slope,
    stride_xb, stride_xt, stride_xc, stride_xp,
    stride_gb, stride_gt, stride_gc, stride_gp,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, METHOD: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Partial sums of all bins over a range of pixels, for a tile of channels."""
    pid = tl.program_id(0).to(tl.int64)
    tiles_o = tl.cdiv(O, BLOCK_O)
    tiles_i = tl.cdiv(I, BLOCK_I)
    o = pid % tiles_o * BLOCK_O + tl.arange(0, BLOCK_O)
    i = pid // tiles_o % tiles_i * BLOCK_I + tl.arange(0, BLOCK_I)
    part = pid // (tiles_o * tiles_i)
    begin = part * rows_per_split
    width: tl.constexpr = padded_pixels.dtype
    sums = ()
    for k in tl.static_range(K):
        for _ in tl.static_range(sum_parts(k, T, N)):
            sums += (tl.zeros((BLOCK_I, BLOCK_O), tl.float32),)
    for step in range(0, rows_per_split, BLOCK_R):
        start = begin + step
        b, p = pixel_rows(start, padded_pixels, width, BLOCK_R)
        group_b, group = pixel_rows(start // 8, pixel_groups, width, BLOCK_R // 8)
        xs = load_slices(
            x_ptr, None, b, p, group_b, group, i, B, I, P, pixel_groups, negative_slope,
            stride_xb, stride_xt, stride_xc, stride_xp, T, BLOCK_R, BLOCK_I,
        )  # fmt: skip
        gs = load_slices(
            grad_ptr, grad_positive_ptr, b, p, group_b, group, o, B, O, P, pixel_groups,
            negative_slope,
            stride_gb, stride_gt, stride_gc, stride_gp, N, BLOCK_R, BLOCK_O,
        )  # fmt: skip
        added = ()
        for k in tl.static_range(K):
            z_re = transposed(coefficient(xs, k, False, T, METHOD))
            g_re = coefficient(gs, k, False, N, METHOD)
            re = multiply_add(z_re, g_re, sums[first_sum(k, T, N)], METHOD)
            if sum_parts(k, T, N) == 1:
                added += (re,)
            else:
                im = sums[first_sum(k, T, N) + 1]
                if parts(k, T) == 2:
                    z_im = transposed(coefficient(xs, k, True, T, METHOD))
                    im = multiply_add(negative(z_im), g_re, im, METHOD)
                if parts(k, N) == 2:
                    g_im = coefficient(gs, k, True, N, METHOD)
                    im = multiply_add(z_re, g_im, im, METHOD)
                    if parts(k, T) == 2:
                        re = multiply_add(z_im, g_im, re, METHOD)
                added += (re, im)
        sums = added
    mask = (i < I)[:, None] & (o < O)[None, :]
    place = partial_ptr + part * 2 * K * I * O + i[:, None] * O + o[None, :]
    for k in tl.static_range(K):
        for imag in tl.static_range(sum_parts(k, T, N)):
            tl.store(place + wide(2 * k + imag) * I * O, sums[first_sum(k, T, N) + imag], mask=mask)


@triton.jit
def planes_sums(
    z_ptr, g_ptr, i, o, begin, I, O, rows, rows_per_split,
    METHOD: tl.constexpr, REAL: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Both sums of a bin from row `begin` on; REAL: of the real parts alone."""
    z_plane = rows.to(tl.int64) * I
    g_plane = rows.to(tl.int64) * O
    re = tl.zeros((BLOCK_I, BLOCK_O), tl.float32)
    im = tl.zeros((BLOCK_I, BLOCK_O), tl.float32)
    for step in range(0, rows_per_split, BLOCK_R):
        r = begin + step + tl.arange(0, BLOCK_R)
        z = z_ptr + i[:, None] * rows + r[None, :]
        g = g_ptr + o[None, :] * rows + r[:, None]
        z_mask = (i < I)[:, None] & (r < rows)[None, :]
        g_mask = (o < O)[None, :] & (r < rows)[:, None]
        if REAL:
            z_re, g_re = load_real(z, z_mask, METHOD), load_real(g, g_mask, METHOD)
            re = multiply_add(z_re, g_re, re, METHOD)
        else:
            z_re, z_im = load_bin(z, z_mask, z_plane, METHOD)
            g_re, g_im = load_bin(g, g_mask, g_plane, METHOD)
            re = multiply_add(z_re, g_re, re, METHOD)
            im = multiply_add(z_re, g_im, im, METHOD)
            re = multiply_add(z_im, g_im, re, METHOD)
            im = multiply_add(negative(z_im), g_re, im, METHOD)
    return re, im


@triton.jit
def spectral_conv_weight_grad_planes_kernel(
    z_ptr, g_ptr, partial_ptr, I, O, rows, rows_per_split, T, N,
    K: tl.constexpr, METHOD: tl.constexpr, REAL_BINS: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Partial sums of a bin over a range of rows, from planar spectra."""
    pid = tl.program_id(0).to(tl.int64)
    tiles_o = tl.cdiv(O, BLOCK_O)
    tiles_i = tl.cdiv(I, BLOCK_I)
    o = pid % tiles_o * BLOCK_O + tl.arange(0, BLOCK_O)
    i = pid // tiles_o % tiles_i * BLOCK_I + tl.arange(0, BLOCK_I)
    k = pid // (tiles_o * tiles_i) % K
    part = pid // (tiles_o * tiles_i * K)
    z = z_ptr + planes(z_ptr) * k * rows * I
    g = g_ptr + planes(g_ptr) * k * rows * O
    begin = part * rows_per_split
    mask = (i < I)[:, None] & (o < O)[None, :]
    place = partial_ptr + (part * K + k) * 2 * I * O + i[:, None] * O + o[None, :]
    real = self_conjugate(k, T, N) if REAL_BINS else False
    if real:
        re, _ = planes_sums(
            z, g, i, o, begin, I, O, rows, rows_per_split, METHOD, True, BLOCK_I, BLOCK_O, BLOCK_R
        )
        tl.store(place, re, mask=mask)
    else:
        re, im = planes_sums(
            z, g, i, o, begin, I, O, rows, rows_per_split, METHOD, False, BLOCK_I, BLOCK_O, BLOCK_R
        )
        tl.store(place, re, mask=mask)
        tl.store(place + wide(1) * I * O, im, mask=mask)


@triton.jit
def spectral_conv_weight_grad_reduce_kernel(
    partial_ptr, grad_weight_ptr, size, splits, T, N, K, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums [splits, K, 2, size] added in order, times alpha_k / n, to [size, K, 2]."""
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(size, BLOCK)
    place = pid % tiles * BLOCK + tl.arange(0, BLOCK)
    k = pid // tiles // 2
    imag = pid // tiles % 2
    at_nyquist = (2 * k == N) & (2 * k == T)
    dead = (imag == 1) & ((k == 0) | at_nyquist)
    # Dead sums were never written, and must not be read.
    mask = (place < size) & (dead == 0)
    total = tl.zeros((BLOCK,), tl.float32)
    partial = partial_ptr + (2 * k + imag) * size + place
    for s in range(splits):
        total += tl.load(partial + wide(2) * s * K * size, mask=mask, other=0.0)
    alpha = tl.where((k == 0) | (2 * k == N), 1.0, 2.0)
    tl.store(grad_weight_ptr + (place * K + k) * 2 + imag, total * alpha / N, mask=place < size)
