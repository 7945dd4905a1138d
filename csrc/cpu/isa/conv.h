// spectral_conv for any layout: a task takes a few tiles of pixels, transforms all their channels
// into a panel that stays in the cache, multiplies the panel by one block of output channels after
// the other, and transforms each block back while it is hot, with bias, LeakyReLU, residual and
// sign bits in the last write. x is read once, y written once.
#pragma once

#include "../parallel.h"
#include "bfloat16.h"
#include "writer.h"

namespace DSNO_ISA {

template <class Engine>
struct Conv {
    static constexpr int64_t kPanelBytes =
        512 << 10;  // of the panels of one task: a part of a core's second-level cache
    static constexpr int kMaxTilesPerTask = 4;
    static constexpr int kMaxStep = 32;  // of all engines

    const ConvArgs& args;
    Mixing mixing;
    Reader reader;
    Writer writer;
    Term* terms;
    int term_count;
    int64_t step, blocks, tiles, tiles_per_task, tasks_per_batch;
    int64_t block_bytes, plane_bytes, panel_bytes, term_bytes, worker_bytes;
    char *weights, *workers;

    explicit Conv(const ConvArgs& a)
        : args(a),
          mixing(a.K, a.analysis->imaginary, a.synthesis->imaginary, Engine::kGauss),
          reader{a.x, a.x_positive, a.T, a.I, ceil_div(a.P, 8)},
          writer(a) {}

    int planes() const { return mixing.planes() * Engine::kParts; }
    int64_t acc_stride() const { return step * kWidth; }

    // Pieces of a worker's memory, in floats behind its panels.
    int64_t acc_floats() const { return mixing.accumulators() * acc_stride(); }
    int64_t channel_floats() const { return kLanes * max64(args.T, args.n) * kWidth; }
    int64_t fold() const { return fold_floats(max64(args.T, args.n)); }
    int64_t target_floats() const { return Engine::kChannels * mixing.planes() * kWidth; }
    int64_t h_floats() const { return step * args.n * kWidth; }

    // Plans; returns the bytes of terms and packed weights.
    int64_t plan() {
        step = Engine::step(args.O);
        blocks = ceil_div(args.O, step);
        plane_bytes = Engine::plane_bytes(args.I);
        block_bytes = Engine::block_bytes(args.I, step);
        panel_bytes = planes() * plane_bytes;
        tiles = ceil_div(args.P, kWidth);
        term_bytes = round_up(int64_t{sizeof(Term)} * mixing.max_terms() * (1 + 3), 64);
        const int64_t max_terms = mixing.max_terms() * (Engine::kParts == 2 ? 3 : 1);
        return term_bytes + round_up(max_terms * blocks * block_bytes, 64);
    }

    void use_memory(char* memory) {
        terms = reinterpret_cast<Term*>(memory);
        term_count = mixing.list(terms);
        if (Engine::kParts == 2) {
            Term* split = terms + mixing.max_terms();
            term_count = split_terms(terms, term_count, split);
            terms = split;
        }
        weights = memory + term_bytes;
    }

    bool prepare() {
        const int64_t shared_bytes = plan();
        tiles_per_task = max64(1, min64(kMaxTilesPerTask, kPanelBytes / panel_bytes));
        while (tiles_per_task > 1 && args.B * ceil_div(tiles, tiles_per_task) < 4 * args.threads)
            --tiles_per_task;
        tasks_per_batch = ceil_div(tiles, tiles_per_task);
        const int64_t floats = tiles_per_task * (acc_floats() + target_floats()) +
                               2 * channel_floats() + fold() + h_floats();
        worker_bytes = round_up(tiles_per_task * panel_bytes + 4 * floats, 4096) + 64;
        char* memory = static_cast<char*>(
            scratch(static_cast<size_t>(shared_bytes + worker_bytes * args.threads)));
        if (!memory) return false;
        use_memory(memory);
        workers = memory + shared_bytes;
        return true;
    }

    const char* block(int term, int64_t ob) const {
        return weights + (ob * term_count + term) * block_bytes;
    }

    // Packs kPackChannels input channels of one output block.
    static void pack_task(void* context, int64_t task, int) {
        auto& self = *static_cast<Conv*>(context);
        const ConvArgs& a = self.args;
        const int64_t chunks = ceil_div(a.I, kPackChannels);
        const int64_t ob = task / chunks, first = task % chunks * kPackChannels, o = ob * self.step;
        const int64_t channels = min64(kPackChannels, a.I - first),
                      rows = min64(self.step, a.O - o);
        // One row of channels more than there are: engines read them in pairs.
        alignas(64) float real[(kPackChannels + 2) * kMaxStep] = {},
                                                     imag[(kPackChannels + 2) * kMaxStep] = {};
        const ModeWeights w{real, imag, channels, rows, self.step};
        const float sign = a.conjugate ? -1.0f : 1.0f;
        const int64_t row_step = Engine::kRowsFirst ? kPackChannels : 1;
        const int64_t channel_step = Engine::kRowsFirst ? 1 : self.step;
        for (int k = 0; k < a.K; ++k) {
            const float* mode = a.weight + first * a.stride_i + o * a.stride_o + k * a.stride_k;
            for (int64_t c = 0; c < channels; ++c) {
                for (int64_t m = 0; m < rows; ++m) {
                    const float* from = mode + c * a.stride_i + m * a.stride_o;
                    const int64_t at = m * row_step + c * channel_step;
                    real[at] = from[0];
                    imag[at] = sign * from[a.stride_part];
                }
            }
            for (int j = 0; j < self.term_count; ++j) {
                if (self.terms[j].k == k)
                    Engine::pack(w, self.terms[j], first, const_cast<char*>(self.block(j, ob)));
            }
        }
    }

    static void tile_task(void* context, int64_t task, int worker) {
        auto& self = *static_cast<Conv*>(context);
        char* memory = self.workers + worker * self.worker_bytes;
        const int64_t first = task % self.tasks_per_batch * self.tiles_per_task;
        const int64_t last = min64(self.tiles, first + self.tiles_per_task);
        self.run_tiles(task / self.tasks_per_batch, first, last, memory);
    }

    PixelTile tile(int64_t b, int64_t index) const {
        return {b, index * kWidth, static_cast<int>(min64(kWidth, args.P - index * kWidth))};
    }

    void run_tiles(int64_t b, int64_t first, int64_t last, char* memory) {
        float* acc = reinterpret_cast<float*>(memory + tiles_per_task * panel_bytes);
        float* h = acc + tiles_per_task * acc_floats();
        float* buffer = h + h_floats();
        float* second_buffer = buffer + channel_floats();
        float* fold_buffer = second_buffer + channel_floats();
        float* target = fold_buffer + fold();
        Engine::begin();
        const PixelTile start = tile(b, first);
        const int64_t row_bytes =
            min64((last - first) * kWidth, args.P - start.p) * element_size(args.x.dtype);
        const int64_t group = reader.group();
        for (int64_t c = 0; c < args.I; c += group) {
            reader.prefetch(start, c + kAhead, row_bytes);
            for (int64_t j = first; j < last; ++j) {
                fill_panel(tile(b, j), c, min64(c + group, args.I),
                           memory + (j - first) * panel_bytes, buffer, fold_buffer,
                           target + (j - first) * target_floats());
            }
        }
        for (int64_t ob = 0; ob < blocks; ++ob) {
            const int rows = static_cast<int>(min64(step, args.O - ob * step));
            for (int64_t j = first; j < last; ++j) writer.prefetch(tile(b, j), ob * step, rows);
            multiply(b, first, last, ob, rows, memory, acc);
            finish_block(b, first, last, ob, rows, acc, h, buffer, fold_buffer);
        }
        writer.finish_task();
    }

    // From the products of one block of output channels to y.
    void finish_block(int64_t b, int64_t first, int64_t last, int64_t ob, int rows, float* acc,
                      float* h, float* buffer, float* fold_buffer) const {
        for (int64_t j = first; j < last; ++j) {
            const PixelTile where = tile(b, j);
            float* planes = acc + (j - first) * acc_floats();
            mixing.combine(planes, acc_stride(), rows * kWidth);
            for (int m = 0; m < rows; ++m) {
                synthesize(*args.synthesis, planes + m * kWidth, acc_stride(), vectors(where),
                           h + m * args.n * kWidth, fold_buffer);
            }
            writer.write(where, ob * step, rows, vectors(where), h, buffer);
        }
    }

    static int vectors(const PixelTile& where) {
        return static_cast<int>(ceil_div(where.count, kLanes));
    }

    void fill_panel(const PixelTile& where, int64_t begin, int64_t end, char* panel, float* buffer,
                    float* fold_buffer, float* target) {
        const int vecs = vectors(where);
        const int64_t stride = Engine::target_stride(args.I);
        reader.for_each_channel(where, begin, end, buffer, [&](int64_t c, const Rows& rows) {
            float* out = Engine::target(panel, target, c, mixing.planes());
            analyze(*args.analysis, rows, vecs, out, stride, fold_buffer);
            mixing.add_sums(out, stride, vecs);
            Engine::finish(panel, target, c, args.I, mixing.planes(), vecs);
        });
    }

    // One block of weights serves all tiles before the next is loaded.
    void multiply(int64_t b, int64_t first, int64_t last, int64_t ob, int rows, const char* panels,
                  float* acc) {
        for (int begin = 0; begin < term_count;) {
            int end = begin;
            while (end < term_count && terms[end].acc == terms[begin].acc) ++end;
            for (int64_t j = first; j < last; ++j) {
                Engine::multiply(
                    terms + begin, end - begin, block(begin, ob), block_bytes,
                    panels + (j - first) * panel_bytes, mixing.planes(), args.I, step, rows,
                    vectors(tile(b, j)),
                    acc + (j - first) * acc_floats() + terms[begin].acc * acc_stride());
            }
            begin = end;
        }
    }

    static void leave(void*, int64_t, int) { Engine::end(); }

    void pack_weights() {
        parallel_for(args.threads, blocks * ceil_div(args.I, kPackChannels), pack_task, this);
    }

    bool run() {
        if (!prepare()) return false;
        pack_weights();
        parallel_for(args.threads, args.B * tasks_per_batch, tile_task, this, leave);
        return true;
    }
};

}  // namespace DSNO_ISA
