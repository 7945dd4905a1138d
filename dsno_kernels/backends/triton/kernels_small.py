"""Few coefficients: the whole spectral convolution in one kernel, one pass over x and one over y.

A program owns a tile of pixels and output channels and holds an accumulator for each real
coefficient of y. For each block of input channels it loads the T slices of x, forms the real
coefficients z by additions in float32, rounds them, and multiplies: a bin costs one real product
where it is self-conjugate in both x and y, four where it is in neither,

    Y_re += z_re W_re - z_im W_im        Y_im += z_re W_im + z_im W_re

The epilogue turns coefficients into the n slices of y. T, n and K are compile-time, so all tables
fold into the code.
"""

# Device code: its arguments get their types from each launch, not from annotations.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from dsno_kernels.backends.triton.arithmetic import (
    add_scaled,
    analysis,
    as_operand,
    first_coefficient,
    load_slope,
    multiply_add,
    negative,
    pack_bits,
    parts,
    pixel_rows,
    split,
    store_rounded,
    synthesis,
    wide,
)


@triton.jit
def pack_weight_tile(
    pid, weight_ptr, packed_ptr, weight_i, weight_o, padded_in, padded_out,
    stride_wi, stride_wo, stride_wk, stride_wc, K,
    ADJOINT: tl.constexpr, PRODUCTS: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Weight -> operands [high, low][K, 2, out, in], zero-padded; adjoint: conj, transposed."""
    tiles_in = tl.cdiv(padded_in, BLOCK_W)
    tiles_out = tl.cdiv(padded_out, BLOCK_W)
    i = pid % tiles_in * BLOCK_W + tl.arange(0, BLOCK_W)
    o = pid // tiles_in % tiles_out * BLOCK_W + tl.arange(0, BLOCK_W)
    plane = pid // (tiles_in * tiles_out)
    k, imag = plane // 2, plane % 2
    if ADJOINT:
        offsets = o[:, None] * stride_wi + i[None, :] * stride_wo
        mask = (o < weight_i)[:, None] & (i < weight_o)[None, :]
    else:
        offsets = i[None, :] * stride_wi + o[:, None] * stride_wo
        mask = (o < weight_o)[:, None] & (i < weight_i)[None, :]
    w = tl.load(weight_ptr + k * stride_wk + imag * stride_wc + offsets, mask=mask, other=0.0).to(
        tl.float32
    )
    if ADJOINT:
        w = tl.where(imag == 1, -w, w)
    high, low = split(w, PRODUCTS)
    packed = packed_ptr + (plane * padded_out + o[:, None]) * padded_in + i[None, :]
    inside = (o < padded_out)[:, None] & (i < padded_in)[None, :]
    tl.store(packed, high.to(packed_ptr.dtype.element_ty), mask=inside)
    if PRODUCTS == "tf32x3" or PRODUCTS == "bf16x3":
        low_plane = 2 * K * padded_out.to(tl.int64) * padded_in
        tl.store(packed + low_plane, low.to(packed_ptr.dtype.element_ty), mask=inside)


@triton.jit
def pack_weight_kernel(
    weight_ptr, packed_ptr, weight_i, weight_o, padded_in, padded_out,
    stride_wi, stride_wo, stride_wk, stride_wc, K,
    ADJOINT: tl.constexpr, PRODUCTS: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """`pack_weight_tile` as a launch of its own."""
    pack_weight_tile(
        tl.program_id(0).to(tl.int64), weight_ptr, packed_ptr, weight_i, weight_o, padded_in,
        padded_out, stride_wi, stride_wo, stride_wk, stride_wc, K, ADJOINT, PRODUCTS, BLOCK_W,
    )  # fmt: skip


@triton.jit
def weight_tile(weight_ptr, i, o, I, O, stride_wi, stride_wo, ADJOINT: tl.constexpr):
    """Pointers and mask of the tile [i, o] in the real plane of bin 0, in memory order: the adjoint
    of a weight that is not packed is [o, i].
    """
    in_offsets, out_offsets = i.to(tl.int64) * stride_wi, o.to(tl.int64) * stride_wo
    if ADJOINT:
        offsets = in_offsets[None, :] + out_offsets[:, None]
        mask = (o < O)[:, None] & (i < I)[None, :]
    else:
        offsets = out_offsets[None, :] + in_offsets[:, None]
        mask = (i < I)[:, None] & (o < O)[None, :]
    return weight_ptr + offsets, mask


@triton.jit
def load_packed(tile, plane_size, PLANE: tl.constexpr, K: tl.constexpr, METHOD: tl.constexpr):
    """Operands of one plane of the packed weight; padding spares a mask."""
    high = as_operand(tl.load(tile + wide(PLANE) * plane_size))
    low = high
    if METHOD == "tf32x3" or METHOD == "bf16x3":
        low = as_operand(tl.load(tile + wide(PLANE + 2 * K) * plane_size))
    return high, low


@triton.jit
def load_weight(tile, mask, stride_part, METHOD: tl.constexpr, ADJOINT: tl.constexpr):
    """Operands [BLOCK_I, BLOCK_O] of the real and of the imaginary part of a weight that is not
    packed, in one bin. The parts are neighbors in memory: loaded together, they cost one load.
    """
    both = tile[:, :, None] + tl.arange(0, 2).to(tl.int64)[None, None, :] * stride_part
    re, im = tl.split(tl.load(both, mask=mask[:, :, None], other=0.0).to(tl.float32))
    if ADJOINT:
        re, im = tl.trans(re), tl.trans(-im)
    return split(re, METHOD), split(im, METHOD)


@triton.jit
def coefficient(xs, k: tl.constexpr, IMAG: tl.constexpr, T: tl.constexpr, METHOD: tl.constexpr):
    """Operands of the real or imaginary part of bin k of the T slices xs."""
    z = tl.zeros(xs[0].shape, tl.float32)
    for t in tl.static_range(T):
        z = add_scaled(z, xs[t], analysis(k, IMAG, t, T))
    return split(z, METHOD)


@triton.jit
def load_slices(
    x_ptr, positive_ptr, b, p, group_b, group, c, B, C, P, pixel_groups, negative_slope,
    stride_b, stride_t, stride_c, stride_p,
    T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The T slices [BLOCK_P, BLOCK_C] of x; with sign bits, times the derivative of LeakyReLU."""
    offsets = (b * stride_b + p * stride_p)[:, None] + (c * stride_c)[None, :]
    mask = ((b < B) & (p < P))[:, None] & (c < C)[None, :]
    xs = ()
    for t in tl.static_range(T):
        x = tl.load(x_ptr + offsets + wide(t) * stride_t, mask=mask, other=0.0).to(tl.float32)
        if positive_ptr is not None:
            lines = (group_b * T + t)[:, None] * C + c[None, :]
            place = lines * pixel_groups + group[:, None]
            inside = (group_b < B)[:, None] & (c < C)[None, :]
            x *= load_slope(positive_ptr + place, inside, negative_slope, BLOCK_P, BLOCK_C)
        xs += (x,)
    return xs


@triton.jit
def spectral_conv_kernel(
    x_ptr, x_positive_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, y_positive_ptr,
    B, I, O, P, padded_pixels, pixel_groups, negative_slope,
    stride_xb, stride_xt, stride_xc, stride_xp,
    stride_wi, stride_wo, stride_wk, stride_wc,
    stride_rb, stride_rt, stride_rc, stride_rp,
    stride_yb, stride_yt, stride_yc, stride_yp,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SCALE_LENGTH: tl.constexpr,
    METHOD: tl.constexpr, ACTIVATION: tl.constexpr, PACKED: tl.constexpr, ADJOINT: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """y = leaky_relu(irfft(rfft(x) W) + bias) + residual, for one tile."""
    pid = tl.program_id(0).to(tl.int64)
    # Neighbors share their pixels, so that x comes from L2 for all but the first of them.
    tiles_o = tl.cdiv(O, BLOCK_O)
    tile_p = pid // tiles_o
    o = pid % tiles_o * BLOCK_O + tl.arange(0, BLOCK_O)
    width: tl.constexpr = padded_pixels.dtype
    b, p = pixel_rows(tile_p * BLOCK_P, padded_pixels, width, BLOCK_P)
    group_b, group = pixel_rows(tile_p * (BLOCK_P // 8), pixel_groups, width, BLOCK_P // 8)

    accs = ()
    for k in tl.static_range(K):
        for _ in tl.static_range(parts(k, N)):
            accs += (tl.zeros((BLOCK_P, BLOCK_O), tl.float32),)

    for first in range(0, I, BLOCK_I):
        i = first + tl.arange(0, BLOCK_I)
        tile, w_mask = weight_tile(weight_ptr, i, o, I, O, stride_wi, stride_wo, ADJOINT)
        xs = load_slices(
            x_ptr, x_positive_ptr, b, p, group_b, group, i.to(tl.int64), B, I, P,
            pixel_groups, negative_slope,
            stride_xb, stride_xt, stride_xc, stride_xp, T, BLOCK_P, BLOCK_I,
        )  # fmt: skip
        sums = ()
        for k in tl.static_range(K):
            if PACKED:
                w_re = load_packed(tile, stride_wc, 2 * k, K, METHOD)
            else:
                bin_tile = tile + wide(k) * stride_wk
                w_re, w_im = load_weight(bin_tile, w_mask, stride_wc, METHOD, ADJOINT)
            z_re = coefficient(xs, k, False, T, METHOD)
            re = multiply_add(z_re, w_re, accs[first_coefficient(k)], METHOD)
            if parts(k, T) == 1 and parts(k, N) == 1:
                sums += (re,)
            else:
                if PACKED:
                    w_im = load_packed(tile, stride_wc, 2 * k + 1, K, METHOD)
                if parts(k, T) == 2:
                    z_im = coefficient(xs, k, True, T, METHOD)
                    re = multiply_add(negative(z_im), w_im, re, METHOD)
                sums += (re,)
                if parts(k, N) == 2:
                    im = multiply_add(z_re, w_im, accs[first_coefficient(k) + 1], METHOD)
                    if parts(k, T) == 2:
                        im = multiply_add(z_im, w_re, im, METHOD)
                    sums += (im,)
        accs = sums

    mask = ((b < B) & (p < P))[:, None] & (o < O)[None, :]
    for t in tl.static_range(N):
        h = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
        for k in tl.static_range(K):
            for imag in tl.static_range(parts(k, N)):
                h = add_scaled(
                    h, accs[first_coefficient(k) + imag], synthesis(k, imag, t, N, SCALE_LENGTH)
                )
        if bias_ptr is not None:
            # Loaded again at each time: it would keep registers that the tiles need.
            h += tl.load(bias_ptr + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
        if y_positive_ptr is not None:
            lines = (group_b * N + t)[:, None] * O + o[None, :]
            place = lines * pixel_groups + group[:, None]
            inside = (group_b < B)[:, None] & (o < O)[None, :]
            tl.store(
                y_positive_ptr + place, pack_bits((h > 0) & mask, BLOCK_P, BLOCK_O), mask=inside
            )
        if ACTIVATION:
            h = tl.where(h > 0, h, h * negative_slope)
        if residual_ptr is not None:
            rest = (
                (b * stride_rb + p * stride_rp)[:, None]
                + (o * stride_rc)[None, :]
                + wide(t) * stride_rt
            )
            h += tl.load(residual_ptr + rest, mask=mask, other=0.0).to(tl.float32)
        offsets = (
            (b * stride_yb + p * stride_yp)[:, None]
            + (o * stride_yc)[None, :]
            + wide(t) * stride_yt
        )
        store_rounded(y_ptr + offsets, h, mask)
