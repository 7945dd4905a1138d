// The fused step of a solver's row: guidance, conversion, clamp, and both sums in one pass.
#include "../parallel.h"
#include "isa.h"
#include "noise.h"
#include "steps.h"

namespace DSNO_ISA {
namespace {

// Blocks of one step, as ids of Terms.
enum Value : int { kPoint, kModel, kUnconditional, kBase, kNoise, kHistory };
constexpr int kValues = kHistory + kMaxOrder;  // kHistory is h_0

// Elements at a time. Few, so that the tensors are read side by side and memory serves all of them
// at once: with 512 a step of tensors that no cache holds takes a fifth longer.
constexpr int64_t kSolverBlock = 128;

struct SolverStep {
    const SolverStepArgs& args;
    Chunks chunks;
    bool streams_base, streams_point, streams_entry, streams_input;

    explicit SolverStep(const SolverStepArgs& a)
        : args(a),
          chunks(a.size),
          streams_base(can_stream(a.new_base, a.samples, a.size)),
          streams_point(can_stream(a.new_point, a.samples, a.size)),
          streams_entry(can_stream(a.entry, a.samples, a.size)),
          streams_input(can_stream(a.model_input, a.samples, a.size)) {}

    static void task(void* context, int64_t task, int) {
        const auto& self = *static_cast<const SolverStep*>(context);
        const SolverStepArgs& a = self.args;
        const int64_t sample = self.chunks.sample(task), first = sample * a.size;
        const int K = a.order;
        int column = 0;
        const auto next = [&] { return row_value(a.rows, sample, column++); };
        Terms guided, entry, base, point, input;
        const float guidance = a.unconditional.data ? row_value(a.guidance, sample, 0) : 1.0f;
        guided.add(1.0f - guidance, kUnconditional);
        guided.add(guidance, kModel);
        entry.add(next(), kPoint);
        entry.add(next(), kModel);
        base.add(next(), kBase);
        for (int j = 0; j < K; ++j) base.add(next(), kHistory + j);
        const float noise_size = next();
        if (a.noise.data || a.seed) base.add(noise_size, kNoise);
        point.add(next(), kBase);
        for (int j = 0; j < K; ++j) point.add(next(), kHistory + j);
        input.add(next(), kBase);
        const bool is_model =
            entry.count == 1 && entry.id[0] == kModel && entry.coefficient[0] == 1.0f;
        const float scale = a.scale ? a.scale[sample] : 1.0f;
        const float high = a.scale ? scale : a.high, low = a.scale ? -scale : a.low;
        const bool clamps = a.scale || low > -__builtin_inff() || high < __builtin_inff();

        alignas(64) float buffers[kValues][kSolverBlock];
        alignas(64) float noise[normal_room(kSolverBlock)];
        alignas(64) float next_point[kSolverBlock];
        alignas(64) float narrow[kSolverBlock];
        const float* values[kValues] = {};
        const int64_t end = self.chunks.end(task);
        for (int64_t i = self.chunks.begin(task); i < end; i += kSolverBlock) {
            const int64_t at = first + i, count = min64(kSolverBlock, end - i);
            const int64_t after = min64(kSolverBlock, end - i - count);
            const auto read = [&](const Dense& x, int id) {
                if (!x.data) return;
                prefetch_block(x, at + count, after);
                values[id] = read_block(x, at, count, buffers[id]);
            };
            read(a.point, kPoint);
            read(a.output, kModel);
            if (a.unconditional.data) {
                read(a.unconditional, kUnconditional);
                guided.sum(values, count, buffers[kModel]);
                values[kModel] = buffers[kModel];
            }
            values[kHistory] = values[kModel];
            if (!is_model || clamps) {
                entry.sum(values, count, buffers[kHistory]);
                if (clamps) clamp(buffers[kHistory], count, low, high, a.scale ? scale : 1.0f);
                values[kHistory] = buffers[kHistory];
            }
            for (int j = 1; j < K; ++j) read(a.history[j - 1], kHistory + j);
            values[kBase] = values[kPoint];
            read(a.base, kBase);
            read(a.noise, kNoise);
            if (a.seed && has(base, kNoise)) {
                values[kNoise] = normal_block(a.seed, at, count, noise);
            }
            // Results are written last: each may lie where an input lay that is read until here.
            const bool advances = a.new_base.data || a.new_point.data || a.model_input.data;
            if (advances) {
                base.sum(values, count, buffers[kBase]);
                values[kBase] = buffers[kBase];
            }
            if (a.looks_ahead && advances) {
                point.sum(values, count, next_point);
                values[kBase] = next_point;
            }
            if (a.model_input.data) {
                input.sum(values, count, narrow);
                write_block(a.model_input, at, count, narrow, self.streams_input);
            }
            // The entry first: it may be the model's output itself, where base' is to be written.
            if (a.entry.data) write_block(a.entry, at, count, values[kHistory], self.streams_entry);
            if (a.new_base.data)
                write_block(a.new_base, at, count, buffers[kBase], self.streams_base);
            if (a.new_point.data)
                write_block(a.new_point, at, count, values[kBase], self.streams_point);
        }
        fence_streams();
    }

    static bool has(const Terms& terms, int id) {
        for (int j = 0; j < terms.count; ++j) {
            if (terms.id[j] == id) return true;
        }
        return false;
    }

    // NaN stays NaN.
    static void clamp(float* x, int64_t count, float low, float high, float scale) {
        for (int64_t i = 0; i < count; ++i) {
            float value = x[i];
            value = value < low ? low : value;
            value = value > high ? high : value;
            x[i] = value / scale;
        }
    }
};

}  // namespace

bool solver_step(const SolverStepArgs& args) {
    SolverStep step(args);
    parallel_for(args.threads, args.samples * step.chunks.per_sample, SolverStep::task, &step);
    return true;
}

}  // namespace DSNO_ISA
