// spectral_conv_backward: dx and dW from one transform of the gradient g of y. In float32 both
// products read the planes of g in one layout, [plane][o][pixel]: dx takes them as rows of vectors,
// dW, whose sums are transposed for it, as scalars. So each thread goes through its share of the
// pixels once: it transforms g, writes dx, transforms x, and adds to its sum of dW.
#include "conv.h"
#include "isa.h"
#include "weight_grad.h"

namespace DSNO_ISA {
namespace {

struct Backward {
    Conv<Fp32Engine> conv;
    WeightGrad<Unit::kFma, 1> sums;
    int64_t worker_bytes;
    char* workers;

    Backward(const ConvArgs& conv_args, const WeightGradArgs& swapped)
        : conv(conv_args), sums(WeightGrad<Unit::kFma, 1>::swapped(swapped)) {}

    int64_t acc_floats() const { return sums.tiles_per_chunk * conv.acc_floats(); }

    bool prepare() {
        const int64_t conv_bytes = conv.plan(), sums_bytes = round_up(sums.plan(), 64);
        const int64_t floats = acc_floats() + conv.h_floats() + conv.channel_floats() + conv.fold();
        worker_bytes = round_up(4 * floats, 4096) + 64;
        char* memory = static_cast<char*>(
            scratch(static_cast<size_t>(conv_bytes + sums_bytes + sums.splits * worker_bytes)));
        if (!memory) return false;
        conv.use_memory(memory);
        sums.use_memory(memory + conv_bytes);
        workers = memory + conv_bytes + sums_bytes;
        return true;
    }

    static void split_task(void* context, int64_t split, int) {
        auto& self = *static_cast<Backward*>(context);
        float* memory = reinterpret_cast<float*>(self.workers + split * self.worker_bytes);
        self.sums.run_split(split, [&](int64_t b, int64_t first, int64_t last, const float* panel) {
            self.write_grad_x(b, first, last, panel, memory);
        });
        self.conv.writer.finish_task();
    }

    void write_grad_x(int64_t b, int64_t first, int64_t last, const float* panel, float* acc) {
        float* h = acc + acc_floats();
        float* buffer = h + conv.h_floats();
        float* fold_buffer = buffer + conv.channel_floats();
        for (int64_t ob = 0; ob < conv.blocks; ++ob) {
            const int rows = static_cast<int>(min64(conv.step, conv.args.O - ob * conv.step));
            for (int64_t j = first; j < last; ++j)
                conv.writer.prefetch(conv.tile(b, j), ob * conv.step, rows);
            multiply(b, first, last, ob, rows, panel, acc);
            conv.finish_block(b, first, last, ob, rows, acc, h, buffer, fold_buffer);
        }
    }

    // As Conv's, from a panel whose rows hold all tiles.
    void multiply(int64_t b, int64_t first, int64_t last, int64_t ob, int rows, const float* panel,
                  float* acc) const {
        for (int begin = 0, end; begin < conv.term_count; begin = end) {
            const int to = conv.terms[begin].acc;
            for (end = begin; end < conv.term_count && conv.terms[end].acc == to; ++end) {
            }
            for (int64_t j = first; j < last; ++j) {
                const int vecs = conv.vectors(conv.tile(b, j));
                float* out = acc + (j - first) * conv.acc_floats() + to * conv.acc_stride();
                for (int term = begin; term < end; ++term) {
                    const float* weights = reinterpret_cast<const float*>(conv.block(term, ob));
                    const float* plane =
                        panel + conv.terms[term].x * sums.x_plane() + (j - first) * kWidth;
                    gemm_chained<true>(
                        rows, vecs, term > begin, kProductChain,
                        {weights, 1, conv.step, plane, sums.depth(), out, kWidth, conv.args.I});
                }
            }
        }
    }

    bool run() {
        if (!prepare()) return false;
        conv.pack_weights();
        parallel_for(static_cast<int>(sums.splits), sums.splits, split_task, this);
        sums.finish();
        return true;
    }
};

// Weights and sums are gone through again for every few tiles. Where the two together leave the
// caches, products that take turns cost more than transforming g twice: at 256 channels and K = 2
// (2 MiB, as much as a core's second-level cache) a backward pass took 0.84 of the time of two
// kernels, at 384 (4.5 MiB) the same, at 512 (8 MiB) 1.08.
constexpr int64_t kCacheBytes = 4 << 20;

bool stays_in_cache(const ConvArgs& conv) {
    return 2 * int64_t{sizeof(float)} * (3 * conv.K - 2) * conv.I * conv.O <= kCacheBytes;
}

// The products that are computed in float32.
bool in_float32(int precision) {
#if defined(__AMX_BF16__)
    return precision == kFp32;
#elif defined(__AVX512BF16__)
    return precision != kBf16;
#else
    (void)precision;
    return true;
#endif
}

}  // namespace

bool spectral_conv_backward(const ConvArgs& conv, const WeightGradArgs& grad) {
    const bool apart = rows_path_serves(conv) || rows_path_serves(grad) || !stays_in_cache(conv);
    if (apart || !in_float32(conv.precision))
        return spectral_conv(conv) && spectral_conv_weight_grad(grad);
    WeightGradArgs swapped = grad;
    swapped.x = grad.grad;
    swapped.grad = grad.x;
    swapped.I = grad.O;
    swapped.O = grad.I;
    swapped.T = grad.n;
    swapped.n = grad.T;
    swapped.x_analysis = grad.grad_analysis;
    swapped.grad_analysis = grad.x_analysis;
    return Backward(conv, swapped).run();
}

}  // namespace DSNO_ISA
