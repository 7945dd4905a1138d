// The truncated transforms of a tile of pixels, and the coefficients that exist.
//
// A spectrum is a list of planes: Re X_k for k = 0 .. K-1, then Im X_k for k = 1 .. imaginary.
#pragma once

#include "../tables.h"
#include "gemm.h"
#include "staging.h"

namespace DSNO_ISA {

DSNO_INLINE int64_t fold_floats(int64_t T) { return (T + 2) * kWidth; }

// Re and Im planes of one channel at out + plane * plane_stride. `fold`: fold_floats(T).
static inline void analyze(const Analysis& tables, const Rows& x, int vecs, float* out,
                           int64_t plane_stride, float* fold) {
    const int T = tables.T, K = tables.K;
    if (T == 4 && K == 2) {
        for (int v = 0; v < vecs; ++v) {
            const float* p = x.data + v * kLanes;
            const Vec x0 = load(p), x1 = load(p + x.stride_t), x2 = load(p + 2 * x.stride_t),
                      x3 = load(p + 3 * x.stride_t);
            store(out + v * kLanes, (x0 + x2) + (x1 + x3));
            store(out + plane_stride + v * kLanes, x0 - x2);
            store(out + 2 * plane_stride + v * kLanes, x3 - x1);
        }
        return;
    }
    float* even = fold;
    float* odd = fold + int64_t{tables.even} * kWidth;
    for (int v = 0; v < vecs; ++v) {
        const float* p = x.data + v * kLanes;
        store(even + v * kLanes, load(p));
        for (int t = 1; t <= tables.odd; ++t) {
            const Vec a = load(p + t * x.stride_t), b = load(p + (T - t) * x.stride_t);
            store(even + int64_t{t} * kWidth + v * kLanes, a + b);
            store(odd + int64_t{t - 1} * kWidth + v * kLanes, a - b);
        }
        if (T % 2 == 0)
            store(even + int64_t{T / 2} * kWidth + v * kLanes, load(p + T / 2 * x.stride_t));
    }
    gemm(K, vecs, false,
         {tables.cosine, tables.even, 1, even, kWidth, out, plane_stride, tables.even});
    if (tables.imaginary > 0) {
        gemm(tables.imaginary, vecs, false,
             {tables.sine, tables.odd, 1, odd, kWidth, out + K * plane_stride, plane_stride,
              tables.odd});
    }
}

// h = [n][kWidth] of one channel from its planes. `fold`: fold_floats(n).
static inline void synthesize(const Synthesis& tables, const float* planes, int64_t plane_stride,
                              int vecs, float* h, float* fold) {
    const int n = tables.n, K = tables.K;
    if (n == 4 && K == 2) {
        const Vec s0 = set1(tables.cosine[0]), s1 = set1(tables.cosine[1]);
        for (int v = 0; v < vecs; ++v) {
            const float* p = planes + v * kLanes;
            const Vec mean = s0 * load(p), re = s1 * load(p + plane_stride),
                      im = s1 * load(p + 2 * plane_stride);
            store(h + v * kLanes, mean + re);
            store(h + kWidth + v * kLanes, mean - im);
            store(h + 2 * kWidth + v * kLanes, mean - re);
            store(h + 3 * kWidth + v * kLanes, mean + im);
        }
        return;
    }
    float* even = fold;
    float* odd = fold + int64_t{tables.even} * kWidth;
    gemm(tables.even, vecs, false, {tables.cosine, K, 1, planes, plane_stride, even, kWidth, K});
    if (tables.imaginary == 0) {
        for (int t = 0; t < n; ++t) {
            const int source = t < tables.even ? t : n - t;
            for (int v = 0; v < vecs; ++v) {
                store(h + int64_t{t} * kWidth + v * kLanes,
                      load(even + int64_t{source} * kWidth + v * kLanes));
            }
        }
        return;
    }
    gemm(tables.odd, vecs, false,
         {tables.sine, tables.imaginary, 1, planes + K * plane_stride, plane_stride, odd, kWidth,
          tables.imaginary});
    for (int v = 0; v < vecs; ++v) {
        store(h + v * kLanes, load(even + v * kLanes));
        for (int t = 1; t <= tables.odd; ++t) {
            const Vec e = load(even + int64_t{t} * kWidth + v * kLanes);
            const Vec o = load(odd + int64_t{t - 1} * kWidth + v * kLanes);
            store(h + int64_t{t} * kWidth + v * kLanes, e + o);
            store(h + int64_t{n - t} * kWidth + v * kLanes, e - o);
        }
        if (n % 2 == 0) {
            store(h + int64_t{n / 2} * kWidth + v * kLanes,
                  load(even + int64_t{n / 2} * kWidth + v * kLanes));
        }
    }
}

}  // namespace DSNO_ISA
