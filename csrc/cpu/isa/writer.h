// The last step: bias, sign bits, LeakyReLU, residual, rounding, and the one write of y.
#pragma once

#include "staging.h"

namespace DSNO_ISA {

// Outputs from this size on outlive no cache, so they are written past it: without reading first.
constexpr int64_t kStreamBytes = 8 << 20;

struct Writer {
    View y;
    Reader residual;
    uint8_t* positive;
    const float* bias;
    float negative_slope;
    bool activation, streams;
    int n;
    int64_t O, bytes;

    explicit Writer(const ConvArgs& a)
        : y(a.y),
          residual{a.residual, {nullptr, 1.0f}, a.n, a.O, 0},
          positive(a.positive),
          bias(a.bias),
          negative_slope(a.negative_slope),
          activation(a.activation),
          streams(a.y.dtype == kFloat32 && a.y.stride_p == 1 && is_aligned(a.y) &&
                  4 * a.B * a.n * a.O * a.P >= kStreamBytes),
          n(a.n),
          O(a.O),
          bytes(ceil_div(a.P, 8)) {}

    // Asks for the memory of a block, to be written after the products that come first.
    void prefetch(const PixelTile& tile, int64_t o, int rows) const {
        if (y.stride_p != 1 || streams) return;
        for (int m = 0; m < rows; ++m) {
            for (int t = 0; t < n; ++t) {
                const char* row = element(y, tile.b, t, o + m, tile.p);
                for (int64_t j = 0; j < tile.count * element_size(y.dtype); j += 64)
                    __builtin_prefetch(row + j, 1);
            }
        }
    }

    // h: [rows][n][kWidth], overwritten. buffer: [kLanes][n][kWidth].
    void write(const PixelTile& tile, int64_t o, int rows, int vecs, float* h,
               float* buffer) const {
        const bool direct = y.stride_p == 1;
        const bool direct_residual = residual.view.data && residual.view.stride_p == 1;
        for (int m = 0; m < rows; ++m) {
            for (int t = 0; t < n; ++t) {
                const char* add =
                    direct_residual ? element(residual.view, tile.b, t, o + m, tile.p) : nullptr;
                finish(tile, o + m, t, vecs, h + (int64_t{m} * n + t) * kWidth, add,
                       direct && (direct_residual || !residual.view.data));
            }
        }
        if (residual.view.data && !direct_residual) {
            residual.for_each_channel(tile, o, o + rows, buffer, [&](int64_t c, const Rows& add) {
                for (int t = 0; t < n; ++t) {
                    float* row = h + ((c - o) * n + t) * kWidth;
                    for (int v = 0; v < vecs; ++v) {
                        store(row + v * kLanes, load(row + v * kLanes) +
                                                    load(add.data + t * add.stride_t + v * kLanes));
                    }
                }
            });
        } else if (direct) {
            return;
        }
        if (y.stride_c == 1 && y.stride_p != 1) return write_transposed(tile, o, rows, h);
        for (int m = 0; m < rows; ++m) {
            for (int t = 0; t < n; ++t) {
                scatter(element(y, tile.b, t, o + m, tile.p), y.dtype, y.stride_p,
                        h + (int64_t{m} * n + t) * kWidth, tile.count);
            }
        }
    }

    // Streamed writes have a queue of their own, which other threads do not see in order.
    void finish_task() const {
        if (streams) fence_streams();
    }

  private:
    // Whether every full vector of y starts where vectors may be streamed to.
    static bool is_aligned(const View& y) {
        const int64_t strides = y.stride_b | y.stride_t | y.stride_c;
        return reinterpret_cast<uintptr_t>(y.data) % (4 * kLanes) == 0 && strides % kLanes == 0;
    }

    // One row of kWidth lanes: to memory, or back to h.
    void finish(const PixelTile& tile, int64_t o, int t, int vecs, float* h, const char* add,
                bool direct) const {
        const Vec offset = set1(bias ? bias[o] : 0.0f), slope = set1(negative_slope);
        uint32_t bits = 0;
        char* out = element(y, tile.b, t, o, tile.p);
        for (int v = 0; v < vecs; ++v) {
            const int count = tile.count - v * kLanes;
            Vec x = load(h + v * kLanes) + offset;
            if (positive || activation) {
                const unsigned mask = positive_bits(x);
                bits |= mask << (v * kLanes);
                if (activation) x = scale_unless(mask, x, slope);
            }
            if (add)
                x = x + load_some(add + v * kLanes * element_size(residual.view.dtype),
                                  residual.view.dtype, count);
            if (direct && streams && count >= kLanes) {
                stream(reinterpret_cast<float*>(out) + v * kLanes, x);
            } else if (direct) {
                store_some(out + v * kLanes * element_size(y.dtype), y.dtype, x, count);
            } else {
                store(h + v * kLanes, x);
            }
        }
        if (positive) {
            if (tile.count < 32) bits &= (1u << tile.count) - 1;
            std::memcpy(positive + ((tile.b * n + t) * O + o) * bytes + tile.p / 8, &bits,
                        static_cast<size_t>((tile.count + 7) / 8));
        }
    }

    void write_transposed(const PixelTile& tile, int64_t o, int rows, const float* h) const {
        for (int t = 0; t < n; ++t) {
            for (int p = 0; p < tile.count; p += kLanes) {
                for (int m = 0; m < rows; m += kLanes) {
                    Vec block[kLanes];
                    for (int j = 0; j < kLanes; ++j) {
                        block[j] =
                            m + j < rows ? load(h + (int64_t{m + j} * n + t) * kWidth + p) : zero();
                    }
                    transpose(block);
                    const int pixels = static_cast<int>(min64(kLanes, tile.count - p));
                    for (int j = 0; j < pixels; ++j) {
                        store_some(element(y, tile.b, t, o + m, tile.p + p + j), y.dtype, block[j],
                                   rows - m);
                    }
                }
            }
        }
    }
};

}  // namespace DSNO_ISA
