// What the kernels around a network that learns to denoise take. Tensors as in steps.h; a sample is
// one image.
#pragma once

#include "steps.h"

// One number a sample, at b * stride; of a number that all samples share, stride 0.
struct PerSample {
    const char* data;
    int dtype;  // kFloat32 or kFloat64
    int64_t stride;
};

// A sample's noise is read or, where `noise` is absent, drawn: number i of its seed and offset 0.

// out = scale (images + level noise)
struct NoisedArgs {
    int64_t samples, size;
    Dense images, noise, out;
    const int64_t* seeds;  // [samples]; null with noise
    PerSample level, scale;
    int threads;
};

// residual = c_skip (images + level noise) + c_out output - images
// loss[b]  = min(weight, ceiling) mean of residual^2 over sample b
// grad     = the gradient of the mean of loss by output
struct DenoisingLossArgs {
    int64_t samples, size;
    Dense output, images, noise, grad;  // grad may be absent
    const int64_t* seeds;
    PerSample level, c_skip, c_out, weight;
    double ceiling;
    bool mean;
    float* loss;  // [samples], or one number with `mean`
    int threads;
};
