// What the kernels of one instruction set take and offer. Plain structs only: this header is read
// by translation units that are compiled with different instruction sets, so it must define no
// function.
#pragma once

#include <cstdint>

#include "denoising.h"
#include "steps.h"

struct Analysis;
struct Synthesis;

enum Dtype : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
enum Precision : int { kFp32 = 0, kBf16x3 = 1, kTf32 = 2, kBf16 = 3 };

// A tensor seen as [B, T, C, P]; strides in elements.
struct View {
    char* data;
    int dtype;
    int64_t stride_b, stride_t, stride_c, stride_p;
};

// Sign bits [B, T, C, ceil(P/8)] that belong to a view: its elements count `slope` times where the
// bit is 0.
struct SignBits {
    const uint8_t* data;
    float slope;
};

struct ConvArgs {
    int64_t B, P, I, O;
    int T, n, K;
    View x, y, residual;  // residual.data may be null
    SignBits x_positive;  // data may be null
    uint8_t* positive;    // sign bits of h to write; may be null
    const float* weight;  // element (i, o, k, part) at i * stride_i + o * stride_o + k * stride_k +
                          // part * stride_part
    int64_t stride_i, stride_o, stride_k, stride_part;
    const float* bias;     // [O]; may be null
    float negative_slope;  // of LeakyReLU
    bool activation;
    bool conjugate;  // multiply by conj(W)
    int precision;
    int threads;
    const Analysis* analysis;    // T -> K
    const Synthesis* synthesis;  // K -> n
};

struct WeightGradArgs {
    int64_t B, P, I, O;
    int T, n, K;
    View x, grad;
    SignBits grad_positive;  // data may be null
    float* out;              // [I, O, K, 2], contiguous
    int precision;
    int threads;
    const Analysis* x_analysis;     // T -> K
    const Analysis* grad_analysis;  // n -> K
    const float* scale;             // alpha_k / n, [K]
};

// x is seen as [B, T, P] (its channel axis is ignored); the pair (re, im) of the spectrum [B, K, P,
// 2] lies at b * stride_b + k * stride_k + p * stride_p.
struct TransformArgs {
    int64_t B, P;
    int T, K;
    View x;
    float* spectrum;
    int64_t stride_b, stride_k, stride_p;
    int threads;
    const Analysis* analysis;    // of truncated_rfft
    const Synthesis* synthesis;  // of truncated_irfft
};

// All functions return false where memory ran out, and leave the reporting to their caller.
struct Kernels {
    const char* name;
    bool (*spectral_conv)(const ConvArgs&);
    bool (*spectral_conv_weight_grad)(const WeightGradArgs&);
    // `conv` is the adjoint, from the gradient of y to that of x.
    bool (*spectral_conv_backward)(const ConvArgs& conv, const WeightGradArgs& grad);
    bool (*truncated_rfft)(const TransformArgs&);
    bool (*truncated_irfft)(const TransformArgs&);
    bool (*exp_step)(const ExpStepArgs&);
    bool (*exp_step_backward)(const ExpStepBackwardArgs&);
    bool (*solver_step)(const SolverStepArgs&);
    bool (*abs_rank)(const AbsRankArgs&);
    bool (*noised)(const NoisedArgs&);
    bool (*denoising_loss)(const DenoisingLossArgs&);
};
