"""Group normalization with scale, shift and SiLU; one program for each sample and group.

A group that fits one tile stays on chip, so x (and dy) are read once. A larger one is walked twice:
once for its sums, once to write. The mean and variance of tiles are combined by Chan's formula, and
no sum depends on the order in which programs run.

With xhat = (x - mean) rstd, u = xhat a + d, a = w (1 + scale), d = b (1 + scale) + shift and
h = dy silu'(u):

    dx = rstd (a h - mean(a h) - xhat mean(a h xhat))

and the sums of h and of h xhat over the pixels, S1 and S2, are left for
`group_norm_silu_parameters_kernel`.
"""

# Device code: its arguments get their types from each launch, not from annotations.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def offsets_of(c, p, stride_c, stride_p, WIDE: tl.constexpr):
    """Offsets from the first element of a group; in 32 bits they take half the registers."""
    if WIDE:
        c, p = c.to(tl.int64), p.to(tl.int64)
    return c[:, None] * stride_c + p[None, :] * stride_p


@triton.jit
def load_tile(ptr, c, p, size, P, stride_c, stride_p, WIDE: tl.constexpr):
    """The channels c and pixels p of a group, as float32 with zeros outside, and what is inside."""
    mask = (c < size)[:, None] & (p < P)[None, :]
    offsets = offsets_of(c, p, stride_c, stride_p, WIDE)
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32), mask


@triton.jit
def store_tile(ptr, value, c, p, mask, stride_c, stride_p, WIDE: tl.constexpr):
    offsets = offsets_of(c, p, stride_c, stride_p, WIDE)
    tl.store(ptr + offsets, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_channels(ptr, c, first, size, stride):
    """One number a channel, as float32; zeros outside the group."""
    offsets = (first + c).to(tl.int64) * stride
    return tl.load(ptr + offsets, mask=c < size, other=0.0).to(tl.float32)


@triton.jit
def modulation(
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, c, first, size, stride_sc, stride_hc
):  # fmt: skip
    """a and d of `u = xhat a + d`, for the channels c of a group."""
    a = load_channels(weight_ptr, c, first, size, 1)
    d = load_channels(bias_ptr, c, first, size, 1)
    if scale_ptr is not None:
        gain = load_channels(scale_ptr, c, first, size, stride_sc) + 1.0
        a *= gain
        d *= gain
    if shift_ptr is not None:
        d += load_channels(shift_ptr, c, first, size, stride_hc)
    return a, d


@triton.jit
def activated(xhat, a, d, SILU: tl.constexpr):
    u = xhat * a[:, None] + d[:, None]
    if SILU:
        u *= tl.sigmoid(u)
    return u


@triton.jit
def before_activation(grad, xhat, a, d, SILU: tl.constexpr):
    """h: the gradient of u from that of y."""
    if SILU:
        u = xhat * a[:, None] + d[:, None]
        sigmoid = tl.sigmoid(u)
        grad *= sigmoid * (1.0 + u * (1.0 - sigmoid))
    return grad


@triton.jit
def group_norm_silu_kernel(
    x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, y_ptr, mean_ptr, rstd_ptr,
    T, C, P, groups, eps,
    stride_xb, stride_xt, stride_xc, stride_xp,
    stride_yb, stride_yt, stride_yc, stride_yp,
    stride_sb, stride_st, stride_sc, stride_hb, stride_ht, stride_hc,
    SILU: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """y, mean and rstd of one group of one sample."""
    pid = tl.program_id(0).to(tl.int64)
    b, t = pid // groups // T, pid // groups % T
    size = C // groups
    first = pid % groups * size
    x_ptr += b * stride_xb + t * stride_xt + first * stride_xc
    y_ptr += b * stride_yb + t * stride_yt + first * stride_yc
    if scale_ptr is not None:
        scale_ptr += b * stride_sb + t * stride_st
    if shift_ptr is not None:
        shift_ptr += b * stride_hb + t * stride_ht
    if WHOLE:
        c, p = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
        x, mask = load_tile(x_ptr, c, p, size, P, stride_xc, stride_xp, WIDE)
        count = 1.0 * size * P  # in float32: a group may have more than 2^31 elements
        mean = tl.sum(x) / count
        centered = tl.where(mask, x - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centered * centered) / count + eps)
        a, d = modulation(
            weight_ptr, bias_ptr, scale_ptr, shift_ptr, c, first, size, stride_sc, stride_hc
        )
        y = activated(centered * rstd, a, d, SILU)
        store_tile(y_ptr, y, c, p, mask, stride_yc, stride_yp, WIDE)
    else:
        count, mean, squares = 0.0, 0.0, 0.0
        for c0 in range(0, size, BLOCK_C):
            for p0 in range(0, P, BLOCK_P):
                c, p = c0 + tl.arange(0, BLOCK_C), p0 + tl.arange(0, BLOCK_P)
                x, mask = load_tile(x_ptr, c, p, size, P, stride_xc, stride_xp, WIDE)
                inside = (tl.minimum(BLOCK_C, size - c0) * tl.minimum(BLOCK_P, P - p0)) * 1.0
                tile_mean = tl.sum(x) / inside
                centered = tl.where(mask, x - tile_mean, 0.0)
                delta = tile_mean - mean
                share = inside / (count + inside)
                squares += tl.sum(centered * centered) + delta * delta * count * share
                mean += delta * share
                count += inside
        rstd = 1.0 / tl.sqrt(squares / count + eps)
        for c0 in range(0, size, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            a, d = modulation(
                weight_ptr, bias_ptr, scale_ptr, shift_ptr, c, first, size, stride_sc, stride_hc
            )
            for p0 in range(0, P, BLOCK_P):
                p = p0 + tl.arange(0, BLOCK_P)
                x, mask = load_tile(x_ptr, c, p, size, P, stride_xc, stride_xp, WIDE)
                y = activated((x - mean) * rstd, a, d, SILU)
                store_tile(y_ptr, y, c, p, mask, stride_yc, stride_yp, WIDE)
    tl.store(mean_ptr + pid, mean)
    tl.store(rstd_ptr + pid, rstd)


@triton.jit
def group_norm_silu_backward_kernel(
    grad_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    grad_x_ptr, sums_ptr, samples, T, C, P, groups,
    stride_gb, stride_gt, stride_gc, stride_gp,
    stride_xb, stride_xt, stride_xc, stride_xp,
    stride_yb, stride_yt, stride_yc, stride_yp,
    stride_sb, stride_st, stride_sc, stride_hb, stride_ht, stride_hc,
    SILU: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dx of one group of one sample, and S1, S2 of its channels into `sums [2, samples, C]`."""
    pid = tl.program_id(0).to(tl.int64)
    sample = pid // groups
    b, t = sample // T, sample % T
    size = C // groups
    first = pid % groups * size
    grad_ptr += b * stride_gb + t * stride_gt + first * stride_gc
    x_ptr += b * stride_xb + t * stride_xt + first * stride_xc
    grad_x_ptr += b * stride_yb + t * stride_yt + first * stride_yc
    sums_ptr += sample * C + first
    second_ptr = sums_ptr + tl.cast(samples, tl.int64) * C
    if scale_ptr is not None:
        scale_ptr += b * stride_sb + t * stride_st
    if shift_ptr is not None:
        shift_ptr += b * stride_hb + t * stride_ht
    mean, rstd = tl.load(mean_ptr + pid), tl.load(rstd_ptr + pid)
    count = 1.0 * size * P  # in float32: a group may have more than 2^31 elements
    if WHOLE:
        c, p = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
        a, d = modulation(
            weight_ptr, bias_ptr, scale_ptr, shift_ptr, c, first, size, stride_sc, stride_hc
        )
        x, mask = load_tile(x_ptr, c, p, size, P, stride_xc, stride_xp, WIDE)
        grad, _ = load_tile(grad_ptr, c, p, size, P, stride_gc, stride_gp, WIDE)
        xhat = (x - mean) * rstd
        h = before_activation(grad, xhat, a, d, SILU)
        sum_h, sum_h_xhat = tl.sum(h, 1), tl.sum(h * xhat, 1)
        tl.store(sums_ptr + c.to(tl.int64), sum_h, mask=c < size)
        tl.store(second_ptr + c.to(tl.int64), sum_h_xhat, mask=c < size)
        mean_h, mean_h_xhat = tl.sum(a * sum_h) / count, tl.sum(a * sum_h_xhat) / count
        grad_x = rstd * (a[:, None] * h - mean_h - xhat * mean_h_xhat)
        store_tile(grad_x_ptr, grad_x, c, p, mask, stride_yc, stride_yp, WIDE)
    else:
        mean_h, mean_h_xhat = 0.0, 0.0
        for c0 in range(0, size, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            a, d = modulation(
                weight_ptr, bias_ptr, scale_ptr, shift_ptr, c, first, size, stride_sc, stride_hc
            )
            # Reduced once, behind the loop: Triton 3.7 fails on a loop that sums what it reduces.
            tile_h = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
            tile_h_xhat = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
            for p0 in range(0, P, BLOCK_P):
                p = p0 + tl.arange(0, BLOCK_P)
                x, _ = load_tile(x_ptr, c, p, size, P, stride_xc, stride_xp, WIDE)
                grad, _ = load_tile(grad_ptr, c, p, size, P, stride_gc, stride_gp, WIDE)
                xhat = (x - mean) * rstd
                h = before_activation(grad, xhat, a, d, SILU)
                tile_h += h
                tile_h_xhat += h * xhat
            sum_h, sum_h_xhat = tl.sum(tile_h, 1), tl.sum(tile_h_xhat, 1)
            tl.store(sums_ptr + c.to(tl.int64), sum_h, mask=c < size)
            tl.store(second_ptr + c.to(tl.int64), sum_h_xhat, mask=c < size)
            mean_h += tl.sum(a * sum_h) / count
            mean_h_xhat += tl.sum(a * sum_h_xhat) / count
        for c0 in range(0, size, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            a, d = modulation(
                weight_ptr, bias_ptr, scale_ptr, shift_ptr, c, first, size, stride_sc, stride_hc
            )
            for p0 in range(0, P, BLOCK_P):
                p = p0 + tl.arange(0, BLOCK_P)
                x, mask = load_tile(x_ptr, c, p, size, P, stride_xc, stride_xp, WIDE)
                grad, _ = load_tile(grad_ptr, c, p, size, P, stride_gc, stride_gp, WIDE)
                xhat = (x - mean) * rstd
                h = before_activation(grad, xhat, a, d, SILU)
                grad_x = rstd * (a[:, None] * h - mean_h - xhat * mean_h_xhat)
                store_tile(grad_x_ptr, grad_x, c, p, mask, stride_yc, stride_yp, WIDE)


@triton.jit
def group_norm_silu_parameters_kernel(
    sums_ptr, weight_ptr, bias_ptr, scale_ptr, grad_weight_ptr, grad_bias_ptr, grad_scale_ptr,
    grad_shift_ptr, samples, T, C, stride_sb, stride_st, stride_sc,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dw, db, dscale and dshift of some channels, from S1 and S2 of all samples, in order."""
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    grad_weight = tl.zeros((BLOCK_C,), tl.float32)
    grad_bias = tl.zeros((BLOCK_C,), tl.float32)
    w = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    b = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    for begin in range(0, samples, BLOCK_N):
        n = (begin + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask = (n < samples)[:, None] & (c < C)[None, :]
        place = n[:, None] * C + c[None, :]
        sum_h = tl.load(sums_ptr + place, mask=mask, other=0.0)
        sum_h_xhat = tl.load(
            sums_ptr + tl.cast(samples, tl.int64) * C + place, mask=mask, other=0.0
        )
        if grad_shift_ptr is not None:
            tl.store(grad_shift_ptr + place, sum_h.to(grad_shift_ptr.dtype.element_ty), mask=mask)
        if scale_ptr is not None:
            grad_scale = w[None, :] * sum_h_xhat + b[None, :] * sum_h
            tl.store(
                grad_scale_ptr + place, grad_scale.to(grad_scale_ptr.dtype.element_ty), mask=mask
            )
            rows = (n // T * stride_sb + n % T * stride_st)[:, None] + c[None, :] * stride_sc
            gain = tl.load(scale_ptr + rows, mask=mask, other=0.0).to(tl.float32) + 1.0
            sum_h *= gain
            sum_h_xhat *= gain
        grad_weight += tl.sum(sum_h_xhat, 0)
        grad_bias += tl.sum(sum_h, 0)
    tl.store(grad_weight_ptr + c, grad_weight.to(grad_weight_ptr.dtype.element_ty), mask=c < C)
    tl.store(grad_bias_ptr + c, grad_bias.to(grad_bias_ptr.dtype.element_ty), mask=c < C)
