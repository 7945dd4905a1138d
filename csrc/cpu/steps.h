// What the kernels of the integrator steps take. Plain structs only, as in kernels.h.
//
// All tensors of a call lie in memory in one order, dense, as [samples][size]: a sample is what one
// row of coefficients serves, so that a call with one row has one sample. Coefficients that are 0
// are skipped: what they would multiply is not read.
#pragma once

#include <cstdint>

constexpr int kMaxTerms = 10;  // x, eight entries of history, noise
constexpr int kMaxOrder = 8;   // entries of history of a solver step, the new one included
constexpr int kFloat64 = 3;    // of coefficients only

struct Dense {
    char* data;  // null: absent
    int dtype;
};

// Row b is row index[b * stride_index] of a table; without an index, row b itself. Strides in
// elements; 0 where samples share.
struct Coefficients {
    const char* data;
    int dtype;  // kFloat32 or kFloat64
    int64_t stride_row, stride_column;
    const int64_t* index;  // may be null
    int64_t stride_index;
};

// out = sum over j of c_j term_j; out may be a term.
struct ExpStepArgs {
    int64_t samples, size;
    int terms;
    Dense term[kMaxTerms];
    Dense out;
    Coefficients rows;
    int threads;
};

// grad_j = c_j g, and dots[b][j] = <g, term_j> over sample b.
struct ExpStepBackwardArgs {
    int64_t samples, size;
    int terms;
    Dense g;
    Dense term[kMaxTerms];  // data null: no dot product
    Dense grad[kMaxTerms];  // data null: not wanted
    Coefficients rows;      // data null where no gradient is wanted
    double* dots;           // [samples, terms]; may be null
    int threads;
};

// One row of a solver's table, K entries of history, in columns
//     A, B, a_b, c_b[0..K-1], s, a_p, c_p[0..K-1], c_in :
//     m      = u + guidance (output - u)            u the unconditional output, if there is one
//     h_0    = A point + B m                        clamped to low, high;  or to +-scale, and
//                                                   divided by scale
//     base'  = a_b base + sum of c_b[j] h_j + s noise
//     point' = a_p base' + sum of c_p[j] h_j        where the step looks ahead; else base'
//     input' = c_in point'
struct SolverStepArgs {
    int64_t samples, size;
    int order;  // K
    Dense point, output, unconditional, base, noise;
    Dense history[kMaxOrder];                       // h_1, h_2, ... ; K - 1 of them
    Dense new_base, new_point, entry, model_input;  // data null: not wanted
    Coefficients rows;
    Coefficients guidance;  // column 0
    const float* scale;     // [samples]; may be null
    float low, high;        // -inf, inf: no clamp
    const uint64_t* seed;   // seed, offset of the noise drawn here, counted in memory; may be null
    bool looks_ahead;
    int threads;
};

// indices[b] = where in sample b the |x| of ranks `rank` and min(rank + 1, size - 1) stand, the
// smallest being rank 0; the place of a NaN, twice, where there is one.
struct AbsRankArgs {
    int64_t samples, size, rank;
    Dense x;
    int64_t* indices;  // [samples, 2]
    int threads;
};
