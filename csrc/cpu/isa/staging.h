// Rows of pixels between memory (any dtype, any strides) and float32 buffers of kWidth lanes.
#pragma once

#include "../kernels.h"
#include "simd.h"

namespace DSNO_ISA {

DSNO_INLINE int64_t element_size(int dtype) { return dtype == kFloat32 ? 4 : 2; }

DSNO_INLINE Vec load_vec(const char* p, int dtype) {
    if (dtype == kFloat32) return load(reinterpret_cast<const float*>(p));
    if (dtype == kFloat16) return load_half(reinterpret_cast<const uint16_t*>(p));
    return load_bf16(reinterpret_cast<const uint16_t*>(p));
}

DSNO_INLINE void store_vec(char* p, int dtype, Vec x) {
    if (dtype == kFloat32) {
        store(reinterpret_cast<float*>(p), x);
    } else if (dtype == kFloat16) {
        store_half(reinterpret_cast<uint16_t*>(p), x);
    } else {
        store_bf16(reinterpret_cast<uint16_t*>(p), x);
    }
}

// `count` contiguous elements; lanes behind them are 0.
DSNO_INLINE Vec load_some(const char* p, int dtype, int count) {
    if (count >= kLanes) return load_vec(p, dtype);
    char buffer[kLanes * 4] = {};
    if (count > 0) std::memcpy(buffer, p, static_cast<size_t>(count * element_size(dtype)));
    return load_vec(buffer, dtype);
}

DSNO_INLINE void store_some(char* p, int dtype, Vec x, int count) {
    if (count >= kLanes) return store_vec(p, dtype, x);
    char buffer[kLanes * 4];
    store_vec(buffer, dtype, x);
    if (count > 0) std::memcpy(p, buffer, static_cast<size_t>(count * element_size(dtype)));
}

// `count` elements at a stride, as float32; the rest of the kWidth lanes is 0.
static inline void gather(float* out, const char* p, int dtype, int64_t stride, int count) {
    if (stride == 1) {
        for (int v = 0; v < kVecs; ++v) {
            store(out + v * kLanes,
                  load_some(p + v * kLanes * element_size(dtype), dtype, count - v * kLanes));
        }
        return;
    }
    if (dtype == kFloat32) {
        const float* values = reinterpret_cast<const float*>(p);
        for (int j = 0; j < count; ++j) out[j] = values[j * stride];
        for (int j = count; j < kWidth; ++j) out[j] = 0.0f;
        return;
    }
    uint16_t values[kWidth] = {};
    for (int j = 0; j < count; ++j) values[j] = reinterpret_cast<const uint16_t*>(p)[j * stride];
    for (int v = 0; v < kVecs; ++v) {
        store(out + v * kLanes,
              load_vec(reinterpret_cast<const char*>(values + v * kLanes), dtype));
    }
}

static inline void scatter(char* p, int dtype, int64_t stride, const float* values, int count) {
    if (stride == 1) {
        for (int v = 0; v < kVecs; ++v) {
            store_some(p + v * kLanes * element_size(dtype), dtype, load(values + v * kLanes),
                       count - v * kLanes);
        }
        return;
    }
    if (dtype == kFloat32) {
        for (int j = 0; j < count; ++j) reinterpret_cast<float*>(p)[j * stride] = values[j];
        return;
    }
    uint16_t rounded[kWidth];
    for (int v = 0; v < kVecs; ++v)
        store_vec(reinterpret_cast<char*>(rounded + v * kLanes), dtype, load(values + v * kLanes));
    for (int j = 0; j < count; ++j) reinterpret_cast<uint16_t*>(p)[j * stride] = rounded[j];
}

DSNO_INLINE char* element(const View& view, int64_t b, int64_t t, int64_t c, int64_t p) {
    const int64_t offset =
        b * view.stride_b + t * view.stride_t + c * view.stride_c + p * view.stride_p;
    return view.data + offset * element_size(view.dtype);
}

// Multiplies kWidth lanes by `slope` where their bit, from bit 0 of `bytes` on, is 0.
DSNO_INLINE void apply_sign_bits(float* values, const uint8_t* bytes, int count, float slope) {
    uint32_t bits = 0;
    std::memcpy(&bits, bytes, static_cast<size_t>((count + 7) / 8));
    for (int v = 0; v < kVecs; ++v) {
        Vec x = load(values + v * kLanes);
        store(values + v * kLanes, scale_unless(bits >> (v * kLanes), x, set1(slope)));
    }
}

// A tile of at most kWidth pixels of one batch.
struct PixelTile {
    int64_t b, p;
    int count;
};

// Rows of one channel, [T][kWidth], read straight from memory where they already look like that.
struct Rows {
    const float* data;
    int64_t stride_t;
};

// Channels between a prefetch and its use.
constexpr int64_t kAhead = 6;

// Reads tiles of a tensor, applying the sign bits that belong to it.
struct Reader {
    View view;
    SignBits bits;
    int T;
    int64_t C, bytes;  // bytes: of a row of sign bits

    // Channels that are best read together: the vector's length where channels are contiguous,
    // else 1.
    int group() const { return view.stride_c == 1 && view.stride_p != 1 ? kLanes : 1; }

    // Asks for `bytes` of all rows of a channel: too short and too far apart for the hardware to
    // see them coming.
    void prefetch(const PixelTile& tile, int64_t c, int64_t bytes) const {
        if (view.stride_p != 1 || c >= C) return;
        for (int t = 0; t < T; ++t) {
            const char* row = element(view, tile.b, t, c, tile.p);
            for (int64_t j = 0; j < bytes; j += 64) __builtin_prefetch(row + j);
        }
    }

    bool in_place(const PixelTile& tile) const {
        return view.dtype == kFloat32 && view.stride_p == 1 && tile.count == kWidth && !bits.data;
    }

    // Rows of channel c in `buffer`, [T][kWidth].
    void read(const PixelTile& tile, int64_t c, float* buffer) const {
        for (int t = 0; t < T; ++t) {
            float* row = buffer + int64_t{t} * kWidth;
            gather(row, element(view, tile.b, t, c, tile.p), view.dtype, view.stride_p, tile.count);
            if (bits.data) apply_bits(tile, t, c, row);
        }
    }

    // Rows of `channels` <= kLanes contiguous channels from c on, [channels][T][kWidth]: vectors of
    // channels, transposed.
    void read_group(const PixelTile& tile, int64_t c, int channels, float* buffer) const {
        for (int t = 0; t < T; ++t) {
            for (int v = 0; v < kVecs; ++v) {
                Vec block[kLanes];
                for (int j = 0; j < kLanes; ++j) {
                    const int pixel = v * kLanes + j;
                    block[j] = pixel < tile.count
                                   ? load_some(element(view, tile.b, t, c, tile.p + pixel),
                                               view.dtype, channels)
                                   : zero();
                }
                transpose(block);
                for (int j = 0; j < channels; ++j) {
                    store(buffer + (int64_t{j} * T + t) * kWidth + v * kLanes, block[j]);
                }
            }
            if (!bits.data) continue;
            for (int j = 0; j < channels; ++j)
                apply_bits(tile, t, c + j, buffer + (int64_t{j} * T + t) * kWidth);
        }
    }

    void apply_bits(const PixelTile& tile, int t, int64_t c, float* row) const {
        const uint8_t* source = bits.data + ((tile.b * T + t) * C + c) * bytes + tile.p / 8;
        apply_sign_bits(row, source, tile.count, bits.slope);
    }

    // Calls use(channel, rows) for every channel of a tile. `buffer`: [kLanes][T][kWidth].
    template <class Use>
    void for_each_channel(const PixelTile& tile, int64_t first, int64_t last, float* buffer,
                          Use use) const {
        const bool direct = in_place(tile);
        const int step = group();
        for (int64_t c = first; c < last;) {
            if (direct) {
                use(c, Rows{reinterpret_cast<const float*>(element(view, tile.b, 0, c, tile.p)),
                            view.stride_t});
                ++c;
            } else if (step > 1) {
                const int channels = static_cast<int>(min64(step, last - c));
                read_group(tile, c, channels, buffer);
                for (int j = 0; j < channels; ++j, ++c)
                    use(c, Rows{buffer + int64_t{j} * T * kWidth, kWidth});
            } else {
                read(tile, c, buffer);
                use(c, Rows{buffer, kWidth});
                ++c;
            }
        }
    }
};

}  // namespace DSNO_ISA
