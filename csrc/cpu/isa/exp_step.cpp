// exp_step and its gradients: one pass over memory.

#include "../parallel.h"
#include "isa.h"
#include "steps.h"

namespace DSNO_ISA {
namespace {

struct ExpStep {
    const ExpStepArgs& args;
    Chunks chunks;
    bool streams, one_dtype = true;

    explicit ExpStep(const ExpStepArgs& a)
        : args(a), chunks(a.size), streams(can_stream(a.out, a.samples, a.size)) {
        for (int j = 0; j < a.terms; ++j) one_dtype = one_dtype && a.term[j].dtype == a.out.dtype;
    }

    static void task(void* context, int64_t task, int) {
        const auto& self = *static_cast<const ExpStep*>(context);
        const ExpStepArgs& a = self.args;
        const int64_t sample = self.chunks.sample(task), first = sample * a.size;
        Terms terms;
        for (int j = 0; j < a.terms; ++j) terms.add(row_value(a.rows, sample, j), j);
        const int64_t begin = self.chunks.begin(task), end = self.chunks.end(task);
        if (self.one_dtype && a.out.dtype != kFloat32) {
            const char* from[kMaxTerms];
            for (int k = 0; k < terms.count; ++k) {
                from[k] = step_element(a.term[terms.id[k]], first + begin);
            }
            const auto* sums =
                a.out.dtype == kFloat16 ? kSumNarrow<kFloat16> : kSumNarrow<kBFloat16>;
            sums[terms.count](from, terms.coefficient, end - begin,
                              step_element(a.out, first + begin));
            return;
        }
        const int64_t block = self.one_dtype ? kStepChunk : kStepBlock;
        alignas(64) float buffers[kMaxTerms + 1][kStepBlock];
        const float* values[kMaxTerms];
        for (int64_t i = begin; i < end; i += block) {
            const int64_t count = min64(block, end - i);
            for (int k = 0; k < terms.count; ++k) {
                const int j = terms.id[k];
                values[j] = read_block(a.term[j], first + i, count, buffers[j]);
            }
            if (a.out.dtype == kFloat32) {
                terms.sum(values, count, reinterpret_cast<float*>(step_element(a.out, first + i)),
                          self.streams);
            } else {
                terms.sum(values, count, buffers[kMaxTerms]);
                write_block(a.out, first + i, count, buffers[kMaxTerms]);
            }
        }
        if (self.streams) fence_streams();
    }
};

// Adds <x, y> of a block to `total`, a lane each: chains of kStepBlock / (4 lanes) float32 sums,
// then float64. Lanes meet at the end of a task only: adding them up takes longer than a block.
static void add_dot(const float* x, const float* y, int64_t count, double* total) {
    Vec sums[4] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
        for (int v = 0; v < 4; ++v) {
            sums[v] = fma(load(x + i + v * kLanes), load(y + i + v * kLanes), sums[v]);
        }
    }
    for (; i < count; i += kLanes) {
        const int rest = static_cast<int>(min64(kLanes, count - i));
        sums[0] = fma(load_some(reinterpret_cast<const char*>(x + i), kFloat32, rest),
                      load_some(reinterpret_cast<const char*>(y + i), kFloat32, rest), sums[0]);
    }
    alignas(64) float lanes[kLanes];
    store(lanes, (sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (int lane = 0; lane < kLanes; ++lane) total[lane] += static_cast<double>(lanes[lane]);
}

struct ExpStepBackward {
    const ExpStepBackwardArgs& args;
    Chunks chunks;
    double* partial = nullptr;  // [task][terms]
    bool streams[kMaxTerms], any_streams = false;

    explicit ExpStepBackward(const ExpStepBackwardArgs& a) : args(a), chunks(a.size) {
        for (int j = 0; j < a.terms; ++j) {
            streams[j] = a.grad[j].data && can_stream(a.grad[j], a.samples, a.size);
            any_streams = any_streams || streams[j];
        }
    }

    static void task(void* context, int64_t task, int) {
        const auto& self = *static_cast<const ExpStepBackward*>(context);
        const ExpStepBackwardArgs& a = self.args;
        const int64_t sample = self.chunks.sample(task), first = sample * a.size;
        Terms scaled[kMaxTerms];
        alignas(64) double dots[kMaxTerms][kLanes] = {};
        for (int j = 0; j < a.terms; ++j) {
            if (a.grad[j].data) scaled[j].add(row_value(a.rows, sample, j), 0);
        }
        alignas(64) float g_buffer[kStepBlock];
        alignas(64) float buffer[kStepBlock];
        const int64_t end = self.chunks.end(task);
        for (int64_t i = self.chunks.begin(task); i < end; i += kStepBlock) {
            const int64_t count = min64(kStepBlock, end - i);
            const float* g = read_block(a.g, first + i, count, g_buffer);
            for (int j = 0; j < a.terms; ++j) {
                if (a.dots && a.term[j].data) {
                    add_dot(g, read_block(a.term[j], first + i, count, buffer), count, dots[j]);
                }
                if (!a.grad[j].data) continue;
                if (a.grad[j].dtype == kFloat32) {
                    scaled[j].sum(&g, count,
                                  reinterpret_cast<float*>(step_element(a.grad[j], first + i)),
                                  self.streams[j]);
                } else {
                    scaled[j].sum(&g, count, buffer);
                    write_block(a.grad[j], first + i, count, buffer);
                }
            }
        }
        if (self.any_streams) fence_streams();
        if (!a.dots) return;
        for (int j = 0; j < a.terms; ++j) {
            double sum = 0.0;
            for (int lane = 0; lane < kLanes; ++lane) sum += dots[j][lane];
            self.partial[task * a.terms + j] = sum;
        }
    }
};

}  // namespace

bool exp_step(const ExpStepArgs& args) {
    ExpStep step(args);
    parallel_for(args.threads, args.samples * step.chunks.per_sample, ExpStep::task, &step);
    return true;
}

// The partial sums of a sample are added in the order of its chunks, whichever thread had them.
bool exp_step_backward(const ExpStepBackwardArgs& args) {
    ExpStepBackward step(args);
    const int64_t tasks = args.samples * step.chunks.per_sample;
    if (args.dots) {
        const size_t bytes = sizeof(double) * static_cast<size_t>(tasks * args.terms);
        step.partial = static_cast<double*>(scratch(bytes));
        if (!step.partial) return false;
    }
    parallel_for(args.threads, tasks, ExpStepBackward::task, &step);
    if (!args.dots) return true;
    for (int64_t i = 0; i < args.samples * args.terms; ++i) args.dots[i] = 0.0;
    for (int64_t task = 0; task < tasks; ++task) {
        double* dots = args.dots + step.chunks.sample(task) * args.terms;
        for (int j = 0; j < args.terms; ++j) dots[j] += step.partial[task * args.terms + j];
    }
    return true;
}

}  // namespace DSNO_ISA
