"""Device functions shared by the kernels: rounding, products, tables, rows of pixels, sign bits.

`METHOD` says how one real product of float32 tiles is computed:

    ieee     float32 multiply-adds
    tf32x3   a = a_hi + a_lo, both rounded to tf32: products a_lo b_hi + a_hi b_lo + a_hi b_hi
    tf32     a_hi b_hi
    bf16x3   as tf32x3, with bfloat16 halves
    bf16     a_hi b_hi

Operands are split by hand with integer operations, so the interpreter, which knows float32 alone,
rounds as a GPU does.
"""

# Device code: its arguments get their types from each launch, not from annotations.
# mypy: ignore-errors

from __future__ import annotations

import math

import triton
import triton.language as tl

# The interpreter multiplies the bit patterns of bfloat16, so there operands stay in float32.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.constexpr_function
def parts(k, length):
    """Real coefficients of bin k of a real signal: 1 where it is self-conjugate, else 2."""
    return 1 if k == 0 or 2 * k == length else 2


@triton.constexpr_function
def first_coefficient(k):
    """Index of the real part of bin k: bin 0 has one coefficient, those between have two."""
    return 2 * k - 1 if k > 0 else 0


@triton.constexpr_function
def analysis(k, imag, t, length):
    """Weight of x_t in the real or imaginary part of bin k: cos or -sin of 2 pi k t / length."""
    turn = (k * t) % length
    if (4 * turn) % length == 0:
        quarter = (4 * turn) // length
        return (0.0, -1.0, 0.0, 1.0)[quarter] if imag else (1.0, 0.0, -1.0, 0.0)[quarter]
    angle = 2.0 * math.pi * turn / length
    return -math.sin(angle) if imag else math.cos(angle)


@triton.constexpr_function
def synthesis(k, imag, t, length, scale_length):
    """Weight of one part of bin k in y_t, with alpha_k(scale_length) / scale_length."""
    alpha = 1.0 if k == 0 or 2 * k == scale_length else 2.0
    turn = (k * t) % length
    if (4 * turn) % length == 0:
        quarter = (4 * turn) // length
        table = (0.0, -1.0, 0.0, 1.0) if imag else (1.0, 0.0, -1.0, 0.0)
        return table[quarter] * alpha / scale_length
    angle = 2.0 * math.pi * turn / length
    return (-math.sin(angle) if imag else math.cos(angle)) * alpha / scale_length


@triton.jit
def add_scaled(acc, x, FACTOR: tl.constexpr):
    """`acc + FACTOR * x`, without the multiplication where FACTOR is 0 or +-1."""
    if FACTOR == 1.0:
        acc += x
    elif FACTOR == -1.0:
        acc -= x
    elif FACTOR != 0.0:
        acc += FACTOR * x
    return acc


@triton.jit
def round_tf32(x):
    """x rounded to 10 mantissa bits; tensor cores would cut, which biases every product."""
    rounded = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    # Carried through the integers, a NaN with all bits set would come out as zero.
    return tl.where(x == x, rounded, x)


@triton.jit
def round_bf16(x):
    """x as a bfloat16 operand; in the interpreter a float32 of the same value, rounded to even."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + (0x7FFF + ((bits >> 16) & 1))) & -0x10000
        rounded = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    else:
        rounded = x.to(tl.bfloat16)
    return rounded


@triton.jit
def store_rounded(ptr, x, mask):
    """Store float32 values in the dtype of `ptr`, rounded to nearest also by the interpreter."""
    if INTERPRETED and ptr.dtype.element_ty == tl.bfloat16:
        x = round_bf16(x)
    tl.store(ptr, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def scaled_integer(x, factor):
    """x * factor, at most 2047, as the integer in the last bits of a float32, 1.5 * 2^23 + it."""
    return (tl.minimum(x * factor, 2047.0) + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def pack_complex(re, im):
    """A complex number as 32 bits: 12 of each part, in units of 2^(e - 127), and the 8 bits of e.

    The larger part keeps 11 significant bits, as in tf32, over the whole range of float32. Where a
    part is not finite, e is 255, and both come back as NaN.
    """
    re_bits = re.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    im_bits = im.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    exponent = tl.maximum(re_bits, im_bits) >> 23
    unit = tl.maximum(exponent, 11) - 10
    factor = ((254 - unit) << 23).to(tl.float32, bitcast=True)
    word = (scaled_integer(re, factor) << 20) | ((scaled_integer(im, factor) & 0xFFF) << 8) | unit
    return tl.where(exponent == 255, 255, word)


@triton.jit
def integer_part(word, SHIFT: tl.constexpr):
    """The 12 bits of a word from bit SHIFT, a signed integer, as float32."""
    bits = ((word >> SHIFT) & 0xFFF) ^ 0x4B000800
    return bits.to(tl.float32, bitcast=True) - 8390656.0


@triton.jit
def unpack_complex(word):
    """The parts of `pack_complex`, float32 with 11 significant bits: operands of tf32."""
    unit = ((word & 0xFF) << 23).to(tl.float32, bitcast=True)
    return integer_part(word, 20) * unit, integer_part(word, 8) * unit


@triton.jit
def as_operand(x):
    """A tile that was stored rounded, as an operand of `multiply_add`."""
    return x.to(tl.float32) if INTERPRETED else x


@triton.jit
def wide(value):
    """A compile-time integer in 64 bits: its product with a 32-bit stride must not overflow."""
    return tl.full((), value, tl.int64)


@triton.jit
def split(x, METHOD: tl.constexpr):
    """The operands (high, low) of a float32 tile; where the method has one, low repeats high."""
    if METHOD == "ieee":
        high, low = x, x
    elif METHOD == "tf32":
        high = round_tf32(x)
        low = high
    elif METHOD == "tf32x3":
        high = round_tf32(x)
        low = round_tf32(x - high)
    elif METHOD == "bf16":
        high = round_bf16(x.to(tl.float32))
        low = high
    else:
        high = round_bf16(x)
        low = round_bf16(x - high.to(tl.float32))
    return high, low


@triton.jit
def multiply_add(a, b, acc, METHOD: tl.constexpr):
    """acc + a @ b for split operands a = (high, low), b = (high, low)."""
    if METHOD == "ieee":
        acc = tl.dot(a[0], b[0], acc, input_precision="ieee")
    elif METHOD == "tf32x3":
        # Tensor cores truncate when they accumulate: long sums are kept in float32 registers.
        part = tl.dot(a[1], b[0], input_precision="tf32")
        part = tl.dot(a[0], b[1], part, input_precision="tf32")
        part = tl.dot(a[0], b[0], part, input_precision="tf32")
        acc += part
    elif METHOD == "bf16x3":
        acc = tl.dot(a[1], b[0], acc, input_precision="tf32")
        acc = tl.dot(a[0], b[1], acc, input_precision="tf32")
        acc = tl.dot(a[0], b[0], acc, input_precision="tf32")
    else:
        acc = tl.dot(a[0], b[0], acc, input_precision="tf32")
    return acc


@triton.jit
def negative(a):
    return -a[0], -a[1]


@triton.jit
def transposed(a):
    return tl.trans(a[0]), tl.trans(a[1])


@triton.jit
def pixel_rows(start, padded_pixels, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Batch and pixel of the rows start, start + 1, ..; b * padded_pixels + p is pixel p of b.

    The first row is divided in 64 bits, the others in WIDTH, an integer type that holds the pixels.
    For groups of 8 pixels all numbers count groups: divided by 8 afterwards, neighbors would no
    longer be neighbors to the compiler, and their bytes would move one by one.
    """
    first = start // padded_pixels
    row = (start - first * padded_pixels).to(WIDTH) + tl.arange(0, BLOCK)
    return first + (row // padded_pixels).to(tl.int64), (row % padded_pixels).to(tl.int64)


@triton.jit
def channel_rows(start, rows, padded_pixels, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Channel, batch and pixel; row c * rows + b * padded_pixels + p is pixel p of b and c.

    As in `pixel_rows`, the rows themselves are divided once: through a second division the compiler
    no longer sees that neighbors stay neighbors, and loads one element at a time.
    """
    batch = rows // padded_pixels
    first = start // padded_pixels
    row = (start - first * padded_pixels).to(WIDTH) + tl.arange(0, BLOCK)
    c = first // batch
    b = (first - c * batch).to(rows.dtype) + row // padded_pixels
    return (
        c + (b // batch).to(tl.int64),
        (b % batch).to(tl.int64),
        (row % padded_pixels).to(tl.int64),
    )


@triton.jit
def load_slope(ptr, mask, negative_slope, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Sign bits [BLOCK // 8, COLUMNS] as factors 1 or `negative_slope` [BLOCK, COLUMNS]."""
    packed = tl.load(ptr, mask=mask, other=0).to(tl.int32)
    bits = (packed[:, None, :] >> tl.arange(0, 8)[None, :, None]) & 1
    return tl.where(tl.reshape(bits, (BLOCK, COLUMNS)) != 0, 1.0, negative_slope)


@triton.jit
def pack_bits(positive, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Booleans [BLOCK, COLUMNS] -> bytes [BLOCK // 8, COLUMNS]; bit j of byte q is row 8q + j."""
    bits = (
        tl.reshape(positive.to(tl.int32), (BLOCK // 8, 8, COLUMNS))
        << tl.arange(0, 8)[None, :, None]
    )
    return tl.sum(bits, axis=1).to(tl.uint8)
