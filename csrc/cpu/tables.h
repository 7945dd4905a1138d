// Tables of the truncated transforms, folded: a real signal of length T is split into its even and
// its odd part,
//
//     e_t = x_t + x_{T-t},  o_t = x_t - x_{T-t}
//     Re X_k = sum over t = 0 .. T/2 of cos(2 pi k t / T) e_t,   Im X_k = -sum over t = 1 ..
//     (T-1)/2 of sin(..) o_t
//
// (e_0 = x_0, and e_{T/2} = x_{T/2} of an even T), which halves the products; the way back is the
// mirror image with the factor alpha_k / n. Bins that are real have no imaginary part here. All
// tables are float32, rounded from float64.
//
// The `quarter` tables serve a time axis of a length divisible by 4 that lies contiguous in memory:
// both parts are split once more around T/4, separately for even and odd k.
#pragma once

#include <cstdint>
#include <memory>

// Multiple to which the lanes of a table are padded: the widest vector.
constexpr int kTableLanes = 16;

struct QuarterTables {
    int length;         // T/4 + 1; 0 where there are no such tables
    int padded_length;  // that, padded
    int depth[2];       // number of even and of odd k
    int lanes[2];       // those, padded
    // For even and odd k. Analysis: [t][lane]. Synthesis: [k][t], rows of `padded_length`.
    const float *cosine[2], *sine[2];
};

struct Analysis {
    int T, K;
    int even, odd;        // lengths of e and o
    int imaginary;        // imaginary parts exist for k = 1 .. imaginary
    const float* cosine;  // [K][even]
    const float* sine;    // [imaginary][odd], negated
    QuarterTables quarter;
};

struct Synthesis {
    int n, K;
    int even, odd, imaginary;
    const float* cosine;  // [even][K]
    const float* sine;    // [odd][imaginary], negated
    QuarterTables quarter;
};

constexpr int kQuarterMin = 32;

// Plain structs above, because translation units with different instruction sets read them.
// `scale_length`: the length whose alpha_k / length scales bin k.
std::shared_ptr<const Analysis> analysis_tables(int T, int K);
std::shared_ptr<const Synthesis> synthesis_tables(int n, int K, int scale_length);
