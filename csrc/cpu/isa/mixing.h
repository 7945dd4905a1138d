// The channel product of every mode as real products: sums of (plane of X) times (plane of W).
//
// A mode that is real on both sides is one product. Elsewhere Y = X W takes four, or Gauss' three,
//
//     P1 = (Xr + Xi) Wr,  P2 = Xr (Wi - Wr),  P3 = Xi (Wr + Wi);   Yr = P1 - P3,  Yi = P1 + P2,
//
// which cost 1.4 times the rounding error: right for float32, not for rounded operands.
#pragma once

#include "transforms.h"

namespace DSNO_ISA {

// Adds plane `x` times (real * Wr + imag * Wi of mode k) to accumulator `acc`. Operands that are
// split into a high and a low part of fewer bits name theirs.
struct Term {
    int acc, x, k;
    float real, imag;
    int x_part = 0, w_part = 0;
};

// a b = ah bh + ah bl + al bh, with a relative error of 2^-16 for bfloat16: three terms in the
// place of each.
static inline int split_terms(const Term* terms, int count, Term* out) {
    for (int j = 0; j < count; ++j) {
        for (int part = 0; part < 3; ++part) {
            *out = terms[j];
            out->x_part = part == 2;
            out->w_part = part == 1;
            ++out;
        }
    }
    return 3 * count;
}

// Planes of x: Re of k = 0 .. K-1, Im of k = 1 .. x_imag, their sums of k = 1 .. gauss.
// Accumulators: Yr of k = 0 .. K-1, Yi of k = 1 .. y_imag, P3 of k = 1 .. gauss; with Gauss P1 and
// P2 stand in the place of Yr and Yi until `combine`.
struct Mixing {
    int K, x_imag, y_imag, gauss;

    Mixing(int K_, int x_imag_, int y_imag_, bool with_gauss)
        : K(K_),
          x_imag(x_imag_),
          y_imag(y_imag_),
          gauss(with_gauss ? static_cast<int>(min64(x_imag_, y_imag_)) : 0) {}

    int real_plane(int k) const { return k; }
    int imag_plane(int k) const { return K + k - 1; }
    int sum_plane(int k) const { return K + x_imag + k - 1; }
    int planes() const { return K + x_imag + gauss; }
    int third(int k) const { return K + y_imag + k - 1; }
    int accumulators() const { return K + y_imag + gauss; }
    int max_terms() const { return 4 * K; }

    // Fills `terms`, in the order of their accumulators; returns how many.
    int list(Term* terms) const {
        Term* next = terms;
        for (int k = 0; k < K; ++k) {
            if (k >= 1 && k <= gauss) {
                *next++ = {k, sum_plane(k), k, 1, 0};
                continue;
            }
            *next++ = {k, real_plane(k), k, 1, 0};
            if (k >= 1 && k <= x_imag) *next++ = {k, imag_plane(k), k, 0, -1};
        }
        for (int k = 1; k <= y_imag; ++k) {
            const int acc = imag_plane(k);
            if (k <= gauss) {
                *next++ = {acc, real_plane(k), k, -1, 1};
                continue;
            }
            *next++ = {acc, real_plane(k), k, 0, 1};
            if (k <= x_imag) *next++ = {acc, imag_plane(k), k, 1, 0};
        }
        for (int k = 1; k <= gauss; ++k) *next++ = {third(k), imag_plane(k), k, 1, 1};
        return static_cast<int>(next - terms);
    }

    // The sums of one channel, from its Re and Im planes.
    void add_sums(float* x, int64_t plane_stride, int vecs) const {
        for (int k = 1; k <= gauss; ++k) {
            const float* re = x + real_plane(k) * plane_stride;
            const float* im = x + imag_plane(k) * plane_stride;
            float* sum = x + sum_plane(k) * plane_stride;
            for (int v = 0; v < vecs; ++v)
                store(sum + v * kLanes, load(re + v * kLanes) + load(im + v * kLanes));
        }
    }

    // Yr and Yi from P1, P2, P3, for `floats` (a multiple of kLanes) of every accumulator.
    void combine(float* acc, int64_t acc_stride, int64_t floats) const {
        for (int k = 1; k <= gauss; ++k) {
            float* first = acc + k * acc_stride;
            float* second = acc + imag_plane(k) * acc_stride;
            const float* last = acc + third(k) * acc_stride;
            for (int64_t j = 0; j < floats; j += kLanes) {
                const Vec p1 = load(first + j);
                store(second + j, p1 + load(second + j));
                store(first + j, p1 - load(last + j));
            }
        }
    }
};

}  // namespace DSNO_ISA
