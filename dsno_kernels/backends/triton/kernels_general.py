"""Any T, n and K: a thin transform, products of channels in each bin, a thin transform back.

Spectra are planar: plane 2k holds the real and plane 2k + 1 the imaginary part of bin k, each `[C,
rows]` with rows = B * padded pixels, so that rows are contiguous whatever the layout of x. Of int32
spectra, half the bytes, plane k holds both parts of bin k as words (`pack_complex`). The
transforms are matrix products whose matrix is gathered from a table of one turn, cos and -sin of 2
pi j / length with j = k t mod length. Where a part does not exist (bin 0, Nyquist) the table is
exactly zero.
"""

# Device code: its arguments get their types from each launch, not from annotations.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from dsno_kernels.backends.triton.arithmetic import (
    as_operand,
    channel_rows,
    load_slope,
    multiply_add,
    negative,
    pack_bits,
    pack_complex,
    round_bf16,
    split,
    store_rounded,
    unpack_complex,
)
from dsno_kernels.backends.triton.kernels_small import (
    load_packed,
    load_weight,
    pack_weight_tile,
    weight_tile,
)


@triton.jit
def load_twiddles(table_ptr, m, t, length, mask, WIDE: tl.constexpr):
    """Entries of the transform matrix at coefficients m and times t, broadcast together."""
    k = m // 2
    turn = (k.to(tl.int64) * t if WIDE else k * t) % length
    return tl.load(table_ptr + ((m % 2).to(tl.int64) * length + turn), mask=mask, other=0.0)


@triton.jit
def part_offsets(m, stride_k, stride_part, REGULAR: tl.constexpr):
    """Offsets of coefficients m; REGULAR: one stride leads from each to the next."""
    if REGULAR:
        offsets = m.to(tl.int64) * stride_part
    else:
        offsets = (m // 2).to(tl.int64) * stride_k + (m % 2).to(tl.int64) * stride_part
    return offsets


@triton.constexpr_function
def planes(ptr):
    """Planes of a bin in a spectrum."""
    return 1 if ptr.dtype.element_ty == tl.int32 else 2


@triton.jit
def load_bin(ptr, mask, plane, METHOD: tl.constexpr):
    """Operands of the real and of the imaginary part of a tile of a bin."""
    if planes(ptr) == 1:
        re, im = unpack_complex(tl.load(ptr, mask=mask, other=0))
        operands = (re, re), (im, im)
    else:
        re = as_operand(tl.load(ptr, mask=mask, other=0.0))
        im = as_operand(tl.load(ptr + plane, mask=mask, other=0.0))
        operands = split(re, METHOD), split(im, METHOD)
    return operands


@triton.jit
def load_real(ptr, mask, METHOD: tl.constexpr):
    """Operands of the real part of a tile of a bin."""
    if planes(ptr) == 1:
        re, _ = unpack_complex(tl.load(ptr, mask=mask, other=0))
        operands = re, re
    else:
        operands = split(as_operand(tl.load(ptr, mask=mask, other=0.0)), METHOD)
    return operands


@triton.jit
def self_conjugate(k, T, N):
    """Whether bin k is real in x and in y, so that one of the four real products is all."""
    return (k == 0) | ((2 * k == T) & (2 * k == N))


@triton.jit
def truncated_rfft_kernel(
    x_ptr, x_positive_ptr, weight_ptr, table_ptr, spectrum_ptr, packed_ptr,
    B, C, P, rows, padded_pixels, pixel_groups, T, K, negative_slope,
    stride_xb, stride_xt, stride_xc, stride_xp,
    stride_sb, stride_sk, stride_sc, stride_sp, stride_part,
    weight_i, weight_o, padded_in, padded_out, stride_wi, stride_wo, stride_wk, stride_wc,
    METHOD: tl.constexpr, WIDE: tl.constexpr, PADDED: tl.constexpr, REGULAR: tl.constexpr,
    ADJOINT: tl.constexpr, PRODUCTS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Coefficients [rows, 2K] of x; with PADDED also those of the padding, zero.

    With a weight, the first programs pack it for the products that follow.
    """
    pid = tl.program_id(0).to(tl.int64)
    if weight_ptr is not None:
        packs = tl.cdiv(padded_in, BLOCK_W) * tl.cdiv(padded_out, BLOCK_W) * 2 * K
        if pid < packs:
            pack_weight_tile(
                pid, weight_ptr, packed_ptr, weight_i, weight_o, padded_in, padded_out,
                stride_wi, stride_wo, stride_wk, stride_wc, K, ADJOINT, PRODUCTS, BLOCK_W,
            )  # fmt: skip
            return
        pid -= packs
    tiles_m = tl.cdiv(2 * K, BLOCK_M)
    tile_r = pid // tiles_m
    width: tl.constexpr = padded_pixels.dtype
    m = (pid % tiles_m).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
    c, b, p = channel_rows(tile_r * BLOCK_R, rows, padded_pixels, width, BLOCK_R)
    x_rows = c * stride_xc + b * stride_xb + p * stride_xp
    inside = (c < C) & (b < B) & (p < P)
    acc = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    for first in range(0, T, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        t64 = t.to(tl.int64)
        mask = inside[:, None] & (t < T)[None, :]
        offsets = x_rows[:, None] + (t64 * stride_xt)[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if x_positive_ptr is not None:
            gc, gb, group = channel_rows(
                tile_r * (BLOCK_R // 8), rows // 8, pixel_groups, width, BLOCK_R // 8
            )
            lines = (gb[:, None] * T + t64[None, :]) * C + gc[:, None]
            place = lines * pixel_groups + group[:, None]
            groups = ((gc < C) & (gb < B))[:, None] & (t < T)[None, :]
            x *= load_slope(x_positive_ptr + place, groups, negative_slope, BLOCK_R, BLOCK_T)
        matrix = load_twiddles(
            table_ptr, m[None, :], t[:, None], T, (m < 2 * K)[None, :] & (t < T)[:, None], WIDE
        )
        acc = multiply_add(split(x, METHOD), split(matrix, METHOD), acc, METHOD)
    if PADDED:
        inside = c < C
    spectrum = spectrum_ptr + (c * stride_sc + b * stride_sb + p * stride_sp)[:, None]
    if planes(spectrum_ptr) == 1:
        re, im = tl.split(tl.reshape(acc, (BLOCK_R, BLOCK_M // 2, 2)))
        k = (pid % tiles_m).to(tl.int32) * (BLOCK_M // 2) + tl.arange(0, BLOCK_M // 2)
        columns = (k.to(tl.int64) * stride_sk)[None, :]
        tl.store(spectrum + columns, pack_complex(re, im), mask=inside[:, None] & (k < K)[None, :])
    else:
        columns = part_offsets(m, stride_sk, stride_part, REGULAR)[None, :]
        if spectrum_ptr.dtype.element_ty == tl.bfloat16:
            acc = round_bf16(acc).to(tl.float32)
        store_rounded(spectrum + columns, acc, inside[:, None] & (m < 2 * K)[None, :])


@triton.jit
def mix_bin(
    z_ptr, weight_ptr, r, o, I, O, rows, stride_wi, stride_wo, stride_wc,
    K: tl.constexpr, METHOD: tl.constexpr, PACKED: tl.constexpr, ADJOINT: tl.constexpr,
    REAL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Real and imaginary part [r, o] of Z W in one bin; REAL: of the real parts alone."""
    z_plane = rows.to(tl.int64) * I
    re = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    im = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    for first in range(0, I, BLOCK_I):
        i = first + tl.arange(0, BLOCK_I)
        place = z_ptr + i.to(tl.int64)[None, :] * rows + r[:, None]
        mask = (r < rows)[:, None] & (i < I)[None, :]
        tile, w_mask = weight_tile(weight_ptr, i, o, I, O, stride_wi, stride_wo, ADJOINT)
        if PACKED:
            w_re = load_packed(tile, stride_wc, 0, K, METHOD)
            if not REAL:
                w_im = load_packed(tile, stride_wc, 1, K, METHOD)
        else:
            w_re, w_im = load_weight(tile, w_mask, stride_wc, METHOD, ADJOINT)
        if REAL:
            re = multiply_add(load_real(place, mask, METHOD), w_re, re, METHOD)
        else:
            z_re, z_im = load_bin(place, mask, z_plane, METHOD)
            re = multiply_add(z_re, w_re, re, METHOD)
            im = multiply_add(z_re, w_im, im, METHOD)
            re = multiply_add(negative(z_im), w_im, re, METHOD)
            im = multiply_add(z_im, w_re, im, METHOD)
    return re, im


@triton.jit
def spectral_conv_mix_kernel(
    z_ptr, weight_ptr, y_ptr, I, O, rows, T, N, stride_wi, stride_wo, stride_wk, stride_wc,
    K: tl.constexpr, METHOD: tl.constexpr, PACKED: tl.constexpr, ADJOINT: tl.constexpr,
    REAL_BINS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Y_k = Z_k W_k in one bin, for one tile: planes [C, rows] -> [O, rows]; with REAL_BINS, bins
    that are self-conjugate in x and y as one real product.
    """
    pid = tl.program_id(0).to(tl.int64)
    tiles_o = tl.cdiv(O, BLOCK_O)
    tiles_r = tl.cdiv(rows, BLOCK_R)
    o = pid % tiles_o * BLOCK_O + tl.arange(0, BLOCK_O)
    r = pid // tiles_o % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R)
    k = pid // (tiles_o * tiles_r)
    z = z_ptr + planes(z_ptr) * k * rows * I
    weight = weight_ptr + k * stride_wk
    real = self_conjugate(k, T, N) if REAL_BINS else False
    if real:  # around the loop: inside it, a branch would keep the loop from loading ahead
        re, im = mix_bin(
            z, weight, r, o, I, O, rows, stride_wi, stride_wo, stride_wc,
            K, METHOD, PACKED, ADJOINT, True, BLOCK_R, BLOCK_I, BLOCK_O,
        )  # fmt: skip
    else:
        re, im = mix_bin(
            z, weight, r, o, I, O, rows, stride_wi, stride_wo, stride_wc,
            K, METHOD, PACKED, ADJOINT, False, BLOCK_R, BLOCK_I, BLOCK_O,
        )  # fmt: skip
    mask = (r < rows)[:, None] & (o < O)[None, :]
    y_plane = rows.to(tl.int64) * O
    y = y_ptr + planes(y_ptr) * k * y_plane + o[None, :] * rows + r[:, None]
    if planes(y_ptr) == 1:
        # What does not reach the output must not set the exponent either.
        im = tl.where((k == 0) | (2 * k == N), 0.0, im)
        tl.store(y, pack_complex(re, im), mask=mask)
    else:
        store_rounded(y, re, mask)
        store_rounded(y + y_plane, im, mask)


@triton.jit
def truncated_irfft_kernel(
    spectrum_ptr, table_ptr, bias_ptr, residual_ptr, y_ptr, y_positive_ptr,
    B, C, P, rows, padded_pixels, pixel_groups, N, K, scale_length, negative_slope,
    stride_sb, stride_sk, stride_sc, stride_sp, stride_part,
    stride_rb, stride_rt, stride_rc, stride_rp,
    stride_yb, stride_yt, stride_yc, stride_yp,
    METHOD: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr, REGULAR: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """h_t = sum_k alpha_k / scale_length Re(Y_k exp(2 pi i k t / N)), then the epilogue."""
    pid = tl.program_id(0).to(tl.int64)
    tiles_t = tl.cdiv(N, BLOCK_T)
    tile_r = pid // tiles_t
    width: tl.constexpr = padded_pixels.dtype
    t = (pid % tiles_t).to(tl.int32) * BLOCK_T + tl.arange(0, BLOCK_T)
    t64 = t.to(tl.int64)
    c, b, p = channel_rows(tile_r * BLOCK_R, rows, padded_pixels, width, BLOCK_R)
    inside = (c < C) & (b < B) & (p < P)
    rows_of_spectrum = spectrum_ptr + (c * stride_sc + b * stride_sb + p * stride_sp)[:, None]
    h = tl.zeros((BLOCK_R, BLOCK_T), tl.float32)
    for first in range(0, 2 * K, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        k = m // 2
        if planes(spectrum_ptr) == 1:
            bins = first // 2 + tl.arange(0, BLOCK_M // 2)
            words = tl.load(
                rows_of_spectrum + (bins.to(tl.int64) * stride_sk)[None, :],
                mask=inside[:, None] & (bins < K)[None, :],
                other=0,
            )
            re, im = unpack_complex(words)
            spectrum = tl.reshape(tl.join(re, im), (BLOCK_R, BLOCK_M))
        else:
            spectrum = tl.load(
                rows_of_spectrum + part_offsets(m, stride_sk, stride_part, REGULAR)[None, :],
                mask=inside[:, None] & (m < 2 * K)[None, :],
                other=0.0,
            ).to(tl.float32)
        # What a part that does not exist holds may be anything, and NaN * 0 is NaN.
        exists = (m < 2 * K) & ((m % 2 == 0) | ((k != 0) & (2 * k != N)))
        spectrum = tl.where(exists[None, :], spectrum, 0.0)
        matrix = load_twiddles(
            table_ptr, m[:, None], t[None, :], N, exists[:, None] & (t < N)[None, :], WIDE
        )
        once = (k == 0) | (2 * k == scale_length)
        matrix *= tl.where(once, 1.0, 2.0)[:, None]
        h = multiply_add(split(spectrum, METHOD), split(matrix, METHOD), h, METHOD)
    h = h / scale_length
    mask = inside[:, None] & (t < N)[None, :]
    if bias_ptr is not None:
        h += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[:, None]
    if y_positive_ptr is not None:
        gc, gb, group = channel_rows(
            tile_r * (BLOCK_R // 8), rows // 8, pixel_groups, width, BLOCK_R // 8
        )
        lines = (gb[:, None] * N + t64[None, :]) * C + gc[:, None]
        place = lines * pixel_groups + group[:, None]
        groups = ((gc < C) & (gb < B))[:, None] & (t < N)[None, :]
        tl.store(y_positive_ptr + place, pack_bits((h > 0) & mask, BLOCK_R, BLOCK_T), mask=groups)
    if ACTIVATION:
        h = tl.where(h > 0, h, h * negative_slope)
    if residual_ptr is not None:
        rest = (c * stride_rc + b * stride_rb + p * stride_rp)[:, None] + (t64 * stride_rt)[None, :]
        h += tl.load(residual_ptr + rest, mask=mask, other=0.0).to(tl.float32)
    y = (c * stride_yc + b * stride_yb + p * stride_yp)[:, None] + (t64 * stride_yt)[None, :]
    store_rounded(y_ptr + y, h, mask)
