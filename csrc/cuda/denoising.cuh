// noised and denoising_loss: the input and the loss of a network that learns to denoise.
//
//     noised    s (x + l n)
//     loss      min(w, ceiling) mean(r^2),  r = c_out F + (c_skip - 1) x + c_skip l n
//     grad      of the mean of all losses by F, in the same pass
//     scale     grad into that of g_b loss_b, or of g times their mean
//
// A sample is one image. Its noise is read or, where the tensor is absent, drawn: number i of the
// sample's seed and offset 0. What a coefficient of 0 multiplies is not read.
#pragma once

#include "noise.cuh"

namespace dsno {

// One number a sample, `stride` elements apart (0 where samples share); without a tensor, `value`.
struct PerSample {
    Data data;
    i64 stride;
    double value;
};

__device__ inline double number(const PerSample& x, i64 sample) {
    return x.data.data ? number(x.data, sample * x.stride) : x.value;
}

// A term c v of a sum over elements.
template <typename A>
struct Addend {
    const char* data;
    int dtype;
    A c;

    __device__ Addend(const Data& v, double coefficient)
        : data(v.data), dtype(static_cast<int>(v.dtype)), c(static_cast<A>(coefficient)) {}

    template <int DTYPE, int N>
    __device__ void fetch_from(i64 i, Raw<A, N>* raw) const {
        if (data && c != 0) fetch<DTYPE>(data, dtype, i, raw);
    }

    template <int DTYPE, int N>
    __device__ void add(const Raw<A, N>& raw, A* sum) const {
        if (!data || c == 0) return;
        A v[N];
        convert<DTYPE>(raw, dtype, v);
#pragma unroll
        for (int j = 0; j < N; ++j) sum[j] += c * v[j];
    }
};

// That of a sample's noise. Elements count from the start of the sample, so that vectors of drawn
// numbers need samples of whole blocks of four (`kind_of` in cuda_denoising.py).
template <typename A>
struct NoiseAddend : Addend<A> {
    u64 seed;
    i64 begin;

    __device__ NoiseAddend(const Data& noise, const i64* seeds, double c, i64 sample, i64 size)
        : Addend<A>(noise, c),
          seed(noise.data ? 0 : static_cast<u64>(seeds[sample])),
          begin(sample * size) {}

    template <int DTYPE, int N>
    __device__ void add(const Raw<A, N>& raw, i64 i, A* sum) const {
        if (this->data) return Addend<A>::template add<DTYPE, N>(raw, sum);
        if (this->c == 0) return;
        A z[N];
        normal_numbers<N>(seed, 0, i - begin, z);
#pragma unroll
        for (int j = 0; j < N; ++j) sum[j] += this->c * z[j];
    }
};

struct NoisedParams {
    static constexpr int kBlocks = 8;
    i64 samples, size, parts;
    Data images, noise, out;
    const i64* seeds;  // [samples]; null with noise
    PerSample level, scale;
};

template <typename A, int DTYPE>
struct NoisedSum {
    Addend<A> images;
    NoiseAddend<A> noise;
    Data out;

    template <int N>
    __device__ void run(i64 i) const {
        Raw<A, N> x, n;
        images.template fetch_from<DTYPE, N>(i, &x);
        noise.template fetch_from<DTYPE, N>(i, &n);
        A sum[N] = {};
        images.template add<DTYPE, N>(x, sum);
        noise.template add<DTYPE, N>(n, i, sum);
        write<DTYPE, N>(out, i, sum);
    }
};

template <typename A, int DTYPE, int V>
__device__ inline void noised(const NoisedParams& p) {
    for (i64 item = blockIdx.x; item < p.samples * p.parts; item += gridDim.x) {
        const i64 sample = divide(item, p.parts), part = item - sample * p.parts;
        const double scale = number(p.scale, sample), level = number(p.level, sample);
        const NoisedSum<A, DTYPE> sum{
            {p.images, scale}, {p.noise, p.seeds, scale * level, sample, p.size}, p.out};
        for_elements<V>(sample, p.size, part, p.parts, sum);
    }
}

struct DenoisingLossParams {
    static constexpr int kBlocks = 6;
    i64 samples, size, parts;
    Data output, images, noise, grad, loss;  // grad may be absent; loss [samples], or their mean
    const i64* seeds;
    double* shares;  // [samples, parts]: the sum of squares of each block
    PerSample level, c_skip, c_out, weight;
    double ceiling;
};

// NaN stays NaN.
__device__ inline double bounded_weight(const DenoisingLossParams& p, i64 sample) {
    const double weight = number(p.weight, sample);
    return weight > p.ceiling ? p.ceiling : weight;
}

template <typename A, int DTYPE>
struct Residual {
    Addend<A> output, images;
    NoiseAddend<A> noise;
    A slope;
    Data grad;
    mutable double total;  // of the squares, over the elements of this thread

    template <int N>
    __device__ void run(i64 i) const {
        Raw<A, N> f, x, n;
        output.template fetch_from<DTYPE, N>(i, &f);
        images.template fetch_from<DTYPE, N>(i, &x);
        noise.template fetch_from<DTYPE, N>(i, &n);
        A sum[N] = {};
        output.template add<DTYPE, N>(f, sum);
        images.template add<DTYPE, N>(x, sum);
        noise.template add<DTYPE, N>(n, i, sum);
        A squares = 0;
#pragma unroll
        for (int j = 0; j < N; ++j) squares += sum[j] * sum[j];
        total += squares;
        if (!grad.data) return;
#pragma unroll
        for (int j = 0; j < N; ++j) sum[j] = slope == 0 ? A(0) : slope * sum[j];
        write<DTYPE, N>(grad, i, sum);
    }
};

// The sum over a block, in its first thread. `sums` is shared memory, free again at the next call.
__device__ inline double block_sum(double x, double (&sums)[kWarps]) {
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < kWarps; ++w) x += sums[w];
    }
    return x;
}

template <typename A, int DTYPE, int V>
__device__ inline void denoising_loss(const DenoisingLossParams& p) {
    __shared__ double sums[kWarps];
    for (i64 item = blockIdx.x; item < p.samples * p.parts; item += gridDim.x) {
        const i64 sample = divide(item, p.parts), part = item - sample * p.parts;
        const double c_skip = number(p.c_skip, sample), c_out = number(p.c_out, sample);
        const double of_noise = c_skip * number(p.level, sample);
        const double elements = static_cast<double>(p.samples) * static_cast<double>(p.size);
        const double slope = 2.0 * bounded_weight(p, sample) * c_out / elements;
        const Residual<A, DTYPE> residual{{p.output, c_out},
                                          {p.images, c_skip - 1.0},
                                          {p.noise, p.seeds, of_noise, sample, p.size},
                                          static_cast<A>(slope),
                                          p.grad,
                                          0.0};
        for_elements<V>(sample, p.size, part, p.parts, residual);
        const double total = block_sum(residual.total, sums);
        if (threadIdx.x == 0) p.shares[item] = total;
    }
}

__device__ inline void write_loss(const Data& loss, i64 i, double value) {
    if (loss.dtype == kFloat64) {
        reinterpret_cast<double*>(loss.data)[i] = value;
    } else {
        reinterpret_cast<float*>(loss.data)[i] = static_cast<float>(value);
    }
}

// The second pass over the shares of blocks, in a fixed order.
__device__ inline void denoising_loss_sum(const DenoisingLossParams& p) {
    __shared__ double sums[kWarps];
    for (i64 sample = blockIdx.x; sample < p.samples; sample += gridDim.x) {
        double total = 0;
        for (i64 part = threadIdx.x; part < p.parts; part += kThreads) {
            total += p.shares[sample * p.parts + part];
        }
        total = block_sum(total, sums);
        if (threadIdx.x == 0) {
            const double mean = total / static_cast<double>(p.size);
            write_loss(p.loss, sample, bounded_weight(p, sample) * mean);
        }
    }
}

// The same where the mean over samples is wanted, in one block.
__device__ inline void denoising_loss_mean(const DenoisingLossParams& p) {
    __shared__ double sums[kWarps];
    double total = 0;
    for (i64 item = threadIdx.x; item < p.samples * p.parts; item += kThreads) {
        total += bounded_weight(p, divide(item, p.parts)) * p.shares[item];
    }
    total = block_sum(total, sums);
    const double elements = static_cast<double>(p.samples) * static_cast<double>(p.size);
    if (threadIdx.x == 0) write_loss(p.loss, 0, total / elements);
}

struct ScaleParams {
    static constexpr int kBlocks = 8;
    i64 samples, size, parts;
    Data grad;     // in place
    PerSample g;   // upstream: of the loss of each sample, or of their mean
    double count;  // of what `g` is the gradient of: samples, or 1
};

template <typename A, int DTYPE>
struct Scale {
    Data grad;
    A factor;

    template <int N>
    __device__ void run(i64 i) const {
        Raw<A, N> raw;
        fetch<DTYPE>(grad.data, static_cast<int>(grad.dtype), i, &raw);
        A x[N];
        convert<DTYPE>(raw, static_cast<int>(grad.dtype), x);
#pragma unroll
        for (int j = 0; j < N; ++j) x[j] = factor == 0 ? A(0) : factor * x[j];
        write<DTYPE, N>(grad, i, x);
    }
};

// What is the gradient of the mean already stays untouched, and costs no traffic.
template <typename A, int DTYPE, int V>
__device__ inline void denoising_scale(const ScaleParams& p) {
    const double wide = 1.0 / p.count;
    const double unit = p.g.data.dtype == kFloat64 ? wide : static_cast<float>(wide);
    for (i64 item = blockIdx.x; item < p.samples * p.parts; item += gridDim.x) {
        const i64 sample = divide(item, p.parts), part = item - sample * p.parts;
        const double g = number(p.g, sample);
        if (g == unit) continue;
        const Scale<A, DTYPE> scale{p.grad, static_cast<A>(g * p.count)};
        for_elements<V>(sample, p.size, part, p.parts, scale);
    }
}

}  // namespace dsno

// Every kernel, as in exp_step.cuh.
// clang-format off
#define DSNO_DENOISING_KERNELS(X)                                                                       \
    X(denoising_noised_f32_v4, NoisedParams, (dsno::noised<float, dsno::kFloat32, 4>))                  \
    X(denoising_noised_any_v8, NoisedParams, (dsno::noised<float, dsno::kAny, 8>))                      \
    X(denoising_noised_any_v1, NoisedParams, (dsno::noised<float, dsno::kAny, 1>))                      \
    X(denoising_noised_f64_v2, NoisedParams, (dsno::noised<double, dsno::kAny, 2>))                     \
    X(denoising_noised_f64_v1, NoisedParams, (dsno::noised<double, dsno::kAny, 1>))                     \
    X(denoising_loss_f32_v4, DenoisingLossParams, (dsno::denoising_loss<float, dsno::kFloat32, 4>))     \
    X(denoising_loss_any_v8, DenoisingLossParams, (dsno::denoising_loss<float, dsno::kAny, 8>))         \
    X(denoising_loss_any_v1, DenoisingLossParams, (dsno::denoising_loss<float, dsno::kAny, 1>))         \
    X(denoising_loss_f64_v2, DenoisingLossParams, (dsno::denoising_loss<double, dsno::kAny, 2>))        \
    X(denoising_loss_f64_v1, DenoisingLossParams, (dsno::denoising_loss<double, dsno::kAny, 1>))        \
    X(denoising_loss_sum, DenoisingLossParams, dsno::denoising_loss_sum)                                \
    X(denoising_loss_mean, DenoisingLossParams, dsno::denoising_loss_mean)                              \
    X(denoising_scale_f32_v4, ScaleParams, (dsno::denoising_scale<float, dsno::kFloat32, 4>))           \
    X(denoising_scale_any_v8, ScaleParams, (dsno::denoising_scale<float, dsno::kAny, 8>))               \
    X(denoising_scale_any_v1, ScaleParams, (dsno::denoising_scale<float, dsno::kAny, 1>))               \
    X(denoising_scale_f64_v2, ScaleParams, (dsno::denoising_scale<double, dsno::kAny, 2>))              \
    X(denoising_scale_f64_v1, ScaleParams, (dsno::denoising_scale<double, dsno::kAny, 1>))
// clang-format on

DSNO_DENOISING_KERNELS(DSNO_DEFINE_STEP_KERNEL)
