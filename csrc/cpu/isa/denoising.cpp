// The input and the loss of a network that learns to denoise: one pass over memory each.
#include "../parallel.h"
#include "isa.h"
#include "noise.h"
#include "steps.h"

namespace DSNO_ISA {
namespace {

enum Value : int { kOutput, kImages, kNoise, kValues };  // blocks, as ids of Terms

// Elements at a time. Few, so that the tensors are read side by side, as in solver_step.cpp: with
// 512 and no prefetch, tensors that no cache holds take a seventh longer.
constexpr int64_t kBlock = 256;

DSNO_INLINE double number(const PerSample& x, int64_t sample) {
    const int64_t i = sample * x.stride;
    if (x.dtype == kFloat64) return reinterpret_cast<const double*>(x.data)[i];
    return static_cast<double>(reinterpret_cast<const float*>(x.data)[i]);
}

// Has memory send the block at `start`, of the `left` elements from there on; x may be absent.
DSNO_INLINE void prefetch_next(const Dense& x, int64_t start, int64_t left) {
    if (x.data) prefetch_block(x, start, min64(kBlock, left));
}

// Elements [i, i + count) of a sample's noise.
static inline const float* noise_block(const Dense& noise, const int64_t* seeds, int64_t sample,
                                       int64_t size, int64_t i, int64_t count, float* buffer) {
    if (noise.data) return read_block(noise, sample * size + i, count, buffer);
    const uint64_t seed[2] = {static_cast<uint64_t>(seeds[sample]), 0};
    return normal_block(seed, i, count, buffer);
}

// The sum of the terms into a tensor of any dtype.
static inline void write_sum(const Terms& terms, const float* const* values, int64_t count,
                             const Dense& out, int64_t start, float* buffer, bool streams) {
    if (out.dtype == kFloat32) {
        return terms.sum(values, count, reinterpret_cast<float*>(step_element(out, start)),
                         streams);
    }
    terms.sum(values, count, buffer);
    write_block(out, start, count, buffer);
}

struct Noised {
    const NoisedArgs& args;
    Chunks chunks;
    bool streams;

    explicit Noised(const NoisedArgs& a)
        : args(a), chunks(a.size), streams(can_stream(a.out, a.samples, a.size)) {}

    static void task(void* context, int64_t task, int) {
        const auto& self = *static_cast<const Noised*>(context);
        const NoisedArgs& a = self.args;
        const int64_t sample = self.chunks.sample(task), first = sample * a.size;
        const double scale = number(a.scale, sample);
        const float of_noise = static_cast<float>(scale * number(a.level, sample));
        Terms sum;
        sum.add(static_cast<float>(scale), kImages);
        sum.add(of_noise, kNoise);
        alignas(64) float images[kBlock];
        alignas(64) float noise[normal_room(kBlock)];
        alignas(64) float narrow[kBlock];
        const float* values[kValues] = {};
        const int64_t end = self.chunks.end(task);
        for (int64_t i = self.chunks.begin(task); i < end; i += kBlock) {
            const int64_t count = min64(kBlock, end - i);
            // Two tensors read side by side come as fast without.
            if (!a.noise.data) prefetch_next(a.images, first + i + count, end - i - count);
            values[kImages] = read_block(a.images, first + i, count, images);
            if (of_noise != 0.0f)
                values[kNoise] = noise_block(a.noise, a.seeds, sample, a.size, i, count, noise);
            write_sum(sum, values, count, a.out, first + i, narrow, self.streams);
        }
        if (self.streams) fence_streams();
    }
};

typedef double Doubles __attribute__((vector_size(8 * kLanes)));

// Adds the squares of a block: kBlock / kLanes of them in float32, then float64. The block is
// filled with zeros to whole groups of four vectors.
DSNO_INLINE void add_squares(float* x, int64_t count, Doubles* total) {
    const int64_t whole = round_up(count, 4 * kLanes);
    for (int64_t i = count; i < whole; ++i) x[i] = 0.0f;
    Vec sums[4] = {zero(), zero(), zero(), zero()};
    for (int64_t i = 0; i < whole; i += 4 * kLanes) {
        for (int v = 0; v < 4; ++v) {
            const Vec value = load(x + i + v * kLanes);
            sums[v] = fma(value, value, sums[v]);
        }
    }
    *total += __builtin_convertvector((sums[0] + sums[1]) + (sums[2] + sums[3]), Doubles);
}

struct DenoisingLoss {
    const DenoisingLossArgs& args;
    Chunks chunks;
    bool streams;
    double* partial = nullptr;  // [task]

    explicit DenoisingLoss(const DenoisingLossArgs& a)
        : args(a), chunks(a.size), streams(a.grad.data && can_stream(a.grad, a.samples, a.size)) {}

    // NaN stays NaN.
    double weight(int64_t sample) const {
        const double weight = number(args.weight, sample);
        return weight > args.ceiling ? args.ceiling : weight;
    }

    static void task(void* context, int64_t task, int) {
        const auto& self = *static_cast<const DenoisingLoss*>(context);
        const DenoisingLossArgs& a = self.args;
        const int64_t sample = self.chunks.sample(task), first = sample * a.size;
        const double c_skip = number(a.c_skip, sample), c_out = number(a.c_out, sample);
        const double elements = static_cast<double>(a.samples) * static_cast<double>(a.size);
        const float of_images = static_cast<float>(c_skip - 1.0);
        const float of_noise = static_cast<float>(c_skip * number(a.level, sample));
        Terms sum, slope;
        sum.add(static_cast<float>(c_out), kOutput);
        sum.add(of_images, kImages);
        sum.add(of_noise, kNoise);
        slope.add(static_cast<float>(2.0 * self.weight(sample) * c_out / elements), 0);
        alignas(64) float output[kBlock];
        alignas(64) float images[kBlock];
        alignas(64) float noise[normal_room(kBlock)];
        alignas(64) float residual[kBlock];
        const float* values[kValues] = {};
        const float* const residuals[1] = {residual};
        Doubles total = {};
        const int64_t end = self.chunks.end(task);
        for (int64_t i = self.chunks.begin(task); i < end; i += kBlock) {
            const int64_t count = min64(kBlock, end - i);
            const int64_t next = first + i + count, left = end - i - count;
            prefetch_next(a.output, next, left);
            prefetch_next(a.images, next, left);
            prefetch_next(a.noise, next, left);
            values[kOutput] = read_block(a.output, first + i, count, output);
            values[kImages] = read_block(a.images, first + i, count, images);
            if (of_noise != 0.0f)
                values[kNoise] = noise_block(a.noise, a.seeds, sample, a.size, i, count, noise);
            sum.sum(values, count, residual);
            add_squares(residual, count, &total);
            if (a.grad.data)
                write_sum(slope, residuals, count, a.grad, first + i, output, self.streams);
        }
        double sum_of_squares = 0.0;
        for (int lane = 0; lane < kLanes; ++lane) sum_of_squares += total[lane];
        self.partial[task] = sum_of_squares;
        if (self.streams) fence_streams();
    }
};

}  // namespace

bool noised(const NoisedArgs& args) {
    Noised step(args);
    parallel_for(args.threads, args.samples * step.chunks.per_sample, Noised::task, &step);
    return true;
}

// The partial sums of a sample are added in the order of its chunks, whichever thread had them.
bool denoising_loss(const DenoisingLossArgs& args) {
    DenoisingLoss step(args);
    const int64_t per_sample = step.chunks.per_sample, tasks = args.samples * per_sample;
    step.partial = static_cast<double*>(scratch(sizeof(double) * static_cast<size_t>(tasks)));
    if (!step.partial) return false;
    parallel_for(args.threads, tasks, DenoisingLoss::task, &step);
    double all = 0.0;
    for (int64_t sample = 0; sample < args.samples; ++sample) {
        double total = 0.0;
        for (int64_t j = 0; j < per_sample; ++j) total += step.partial[sample * per_sample + j];
        const double loss = step.weight(sample) * (total / static_cast<double>(args.size));
        if (!args.mean) args.loss[sample] = static_cast<float>(loss);
        all += loss;
    }
    if (args.mean) args.loss[0] = static_cast<float>(all / static_cast<double>(args.samples));
    return true;
}

}  // namespace DSNO_ISA
