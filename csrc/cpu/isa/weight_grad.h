// spectral_conv_weight_grad: products of the planes of x and g, summed over the pixels,
//
//     dWr = sum Xr Gr + Xi Gi,  dWi = sum Xr Gi - Xi Gr   (times alpha_k / n),
//
// with three products where both parts exist: D1 = (Xr + Xi)(Gr + Gi), D2 = Xr Gi, D3 = Xi Gr; dWr
// = D1 - D2 - D3. The pixels are cut into as many parts as there are threads; each part has its own
// sum, and the sums are added in order, so a result depends on the number of threads but not on
// their timing.
#pragma once

#include "../parallel.h"
#include "bfloat16.h"

namespace DSNO_ISA {

struct Product {
    int acc, x, grad;
};

// How products are computed (engines.h). Words of panels hold one float32 or two bfloat16, of
// neighboring pixels.
enum class Unit { kFma, kDot, kAmx };

template <Unit kUnit, int kParts>
struct WeightGrad {
    static constexpr bool kPairs = kUnit != Unit::kFma;
    static constexpr int kPixels = kPairs ? 2 : 1;  // of a word
    static constexpr int kMaxTiles = kPairs ? 8 : 4;
    static constexpr int64_t kPanelBytes = 1024 << 10;
    // Chunks whose products are added one after the other; longer sums are sums of such sums.
    static constexpr int64_t kGroup = 64;

    const WeightGradArgs& args;
    Mixing x_planes, grad_planes;
    Reader x, grad;
    Product* products;
    int product_count = 0;
    int64_t blocks, tiles, tiles_per_chunk, chunks, splits;
    int64_t part_floats, worker_bytes;
    int64_t total_floats;  // of the sum over all groups of a part; 0 where there is one group only
    int64_t product_bytes;
    bool is_swapped = false;  // whether the sums are those of conj(dW), transposed
    char* workers;

    explicit WeightGrad(const WeightGradArgs& a)
        : args(a),
          x_planes(a.K, a.x_analysis->imaginary, a.grad_analysis->imaginary, !kPairs),
          grad_planes(a.K, a.grad_analysis->imaginary, a.x_analysis->imaginary, !kPairs),
          x{a.x, {nullptr, 1.0f}, a.T, a.I, 0},
          grad{a.grad, a.grad_positive, a.n, a.O, ceil_div(a.P, 8)} {}

    // With the two tensors in each other's place, as they are in `a`; the sign bits belong to x.
    static WeightGrad swapped(const WeightGradArgs& a) {
        WeightGrad sums(a);
        sums.x.bits = sums.grad.bits;
        sums.x.bytes = sums.grad.bytes;
        sums.grad.bits = {nullptr, 1.0f};
        sums.grad.bytes = 0;
        sums.is_swapped = true;
        return sums;
    }

    // Accumulators of mode k: the real part (or D1), D2 and D3.
    int first(int k) const { return k; }
    int second(int k) const { return args.K + k - 1; }
    int third(int k) const { return 2 * args.K + k - 2; }
    int accumulators() const { return 3 * args.K - 2; }
    bool has_second(int k) const { return k >= 1 && k <= grad_planes.x_imag; }
    bool has_third(int k) const { return k >= 1 && k <= x_planes.x_imag; }
    bool is_gauss(int k) const { return k >= 1 && k <= x_planes.gauss; }

    void add_product(int acc, int x_plane, int grad_plane) {
        for (int part = 0; part < (kParts == 2 ? 3 : 1); ++part) {
            const int x_part = part == 2, grad_part = part == 1;
            products[product_count++] = {acc, x_plane + x_part * x_planes.planes(),
                                         grad_plane + grad_part * grad_planes.planes()};
        }
    }

    void list_products() {
        for (int k = 0; k < args.K; ++k) {
            if (is_gauss(k)) {
                add_product(first(k), x_planes.sum_plane(k), grad_planes.sum_plane(k));
            } else {
                add_product(first(k), k, k);
                if (has_second(k) && has_third(k)) {
                    add_product(first(k), x_planes.imag_plane(k), grad_planes.imag_plane(k));
                }
            }
            if (has_second(k)) add_product(second(k), k, grad_planes.imag_plane(k));
            if (has_third(k)) add_product(third(k), x_planes.imag_plane(k), k);
        }
    }

    // Rows of a sum; with tiles, those behind I are never read.
    int64_t rows() const { return kUnit == Unit::kAmx ? round_up(args.I, 32) : args.I; }
    // Words of a row of x.
    int64_t depth() const { return tiles_per_chunk * kWidth / kPixels; }
    int64_t x_plane() const { return rows() * depth(); }
    int64_t grad_plane() const { return blocks * depth() * kWidth; }
    int64_t x_floats() const { return kParts * x_planes.planes() * x_plane(); }
    int64_t grad_floats() const { return kParts * grad_planes.planes() * grad_plane(); }
    int64_t buffer_floats() const { return kLanes * max64(args.T, args.n) * kWidth; }
    int64_t lines_floats() const {
        return max64(grad_planes.planes(), x_planes.planes()) * kLanes * kWidth;
    }

    // Plans; returns the bytes it needs.
    int64_t plan() {
        blocks = ceil_div(args.O, kWidth);
        tiles = ceil_div(args.P, kWidth);
        const int64_t tile_words = kWidth / kPixels;
        const int64_t tile_bytes =
            4 * tile_words * kParts *
            (x_planes.planes() * rows() + grad_planes.planes() * blocks * kWidth);
        tiles_per_chunk = max64(1, min64(kMaxTiles, kPanelBytes / tile_bytes));
        tiles_per_chunk = min64(tiles_per_chunk, tiles);
        // A chunk is one thread's: where there are few pixels, no thread waits for another's tiles.
        while (tiles_per_chunk > 1 && args.B * ceil_div(tiles, tiles_per_chunk) < args.threads)
            --tiles_per_chunk;
        chunks = args.B * ceil_div(tiles, tiles_per_chunk);
        splits = min64(args.threads, chunks);
        part_floats = accumulators() * blocks * rows() * kWidth;
        total_floats = ceil_div(chunks, splits) > kGroup ? part_floats : 0;
        const int64_t floats = part_floats + total_floats + x_floats() + grad_floats() +
                               buffer_floats() + lines_floats() +
                               fold_floats(max64(args.T, args.n));
        worker_bytes = round_up(4 * floats, 4096) + 64;
        product_bytes = round_up(int64_t{sizeof(Product)} * 12 * args.K, 64);
        return product_bytes + splits * worker_bytes;
    }

    void use_memory(char* memory) {
        products = reinterpret_cast<Product*>(memory);
        list_products();
        workers = memory + product_bytes;
    }

    float* part(int64_t split) const {
        return reinterpret_cast<float*>(workers + split * worker_bytes);
    }

    static void split_task(void* context, int64_t split, int) {
        auto& self = *static_cast<WeightGrad*>(context);
#if defined(__AMX_BF16__)
        if (kUnit == Unit::kAmx) configure_tiles();
#endif
        self.run_split(split, [](int64_t, int64_t, int64_t, const float*) {});
#if defined(__AMX_BF16__)
        if (kUnit == Unit::kAmx) _tile_release();
#endif
    }

    // Sums one part. use(b, first, last, panel) is called once for all tiles, with the panel of x.
    template <class Use>
    void run_split(int64_t split, Use use) {
        const int64_t begin = split * chunks / splits, end = (split + 1) * chunks / splits;
        for (int64_t chunk = begin; chunk < end; ++chunk) {
            const int64_t index = chunk - begin;
            run_chunk(chunk, part(split), index % kGroup > 0, use);
            const bool last = chunk + 1 == end || index % kGroup == kGroup - 1;
            if (total_floats > 0 && last) add_group(split, index >= kGroup);
        }
    }

    void add_group(int64_t split, bool accumulate) {
        const float* from = part(split);
        float* to = part(split) + total_floats;
        for (int64_t j = 0; j < part_floats; j += kLanes)
            store(to + j, accumulate ? load(to + j) + load(from + j) : load(from + j));
    }

    template <class Use>
    void run_chunk(int64_t chunk, float* sums, bool accumulate, Use use) {
        float* x_panel = sums + part_floats + total_floats;
        float* grad_panel = x_panel + x_floats();
        float* buffer = grad_panel + grad_floats();
        float* lines = buffer + buffer_floats();
        float* fold = lines + lines_floats();
        const int64_t chunks_per_batch = chunks / args.B;
        const int64_t b = chunk / chunks_per_batch,
                      begin = chunk % chunks_per_batch * tiles_per_chunk;
        const int64_t end = min64(tiles, begin + tiles_per_chunk);
        const int64_t pixels = min64((end - begin) * kWidth, args.P - begin * kWidth);
        for (int64_t c = 0; c < args.I; c += x.group()) {
            x.prefetch(tile(b, begin), c + kAhead, pixels * element_size(args.x.dtype));
            for (int64_t j = begin; j < end; ++j) {
                fill_x(tile(b, j), c, x_panel + (j - begin) * kWidth / kPixels, buffer, lines,
                       fold);
            }
        }
        use(b, begin, end, x_panel);
        for (int64_t o = 0; o < blocks * kWidth; o += kLanes) {
            for (int64_t c = o; c < o + kLanes; ++c) {
                grad.prefetch(tile(b, begin), c, pixels * element_size(args.grad.dtype));
            }
            for (int64_t j = begin; j < end; ++j) {
                fill_grad(tile(b, j), o, grad_panel + (j - begin) * kWidth / kPixels * kWidth,
                          buffer, lines, fold);
            }
        }
        multiply(x_panel, grad_panel, (end - begin) * kWidth / kPixels, sums, accumulate);
    }

    PixelTile tile(int64_t b, int64_t index) const {
        return {b, index * kWidth, static_cast<int>(min64(kWidth, args.P - index * kWidth))};
    }

    // A group of channels in the panel of x: [plane][i][pixel].
    void fill_x(const PixelTile& where, int64_t begin, float* panel, float* buffer, float* lines,
                float* fold) {
        const int64_t end = min64(args.I, begin + x.group());
        x.for_each_channel(where, begin, end, buffer, [&](int64_t c, const Rows& rows) {
            float* out = kPairs ? lines : panel + c * depth();
            const int64_t stride = kPairs ? kWidth : x_plane();
            analyze(*args.x_analysis, rows, kVecs, out, stride, fold);
            x_planes.add_sums(out, stride, kVecs);
#if defined(__AVX512BF16__)
            if (!kPairs) return;
            for (int plane = 0; plane < x_planes.planes(); ++plane) {
                const Vec low = load(lines + plane * kWidth),
                          high = load(lines + plane * kWidth + kLanes);
                float* words = panel + plane * x_plane() + c * depth();
                store(words, pack_row(low, high));
                if (kParts == 2) {
                    store(words + x_planes.planes() * x_plane(),
                          pack_row(low - rounded(low), high - rounded(high)));
                }
            }
#endif
        });
    }

    // A group of kLanes channels in the panel of g: [plane][block][pixel][kWidth channels].
    void fill_grad(const PixelTile& where, int64_t o, float* panel, float* buffer, float* lines,
                   float* fold) {
        const int64_t stride = kLanes * kWidth;
        const int64_t channels = max64(0, min64(kLanes, args.O - o));
        if (channels < kLanes) std::memset(lines, 0, static_cast<size_t>(4 * lines_floats()));
        grad.for_each_channel(where, o, o + channels, buffer, [&](int64_t c, const Rows& rows) {
            float* out = lines + (c - o) * kWidth;
            analyze(*args.grad_analysis, rows, kVecs, out, stride, fold);
            grad_planes.add_sums(out, stride, kVecs);
        });
        for (int plane = 0; plane < grad_planes.planes(); ++plane) {
            const float* from = lines + plane * stride;
            float* out = panel + plane * grad_plane() + o / kWidth * depth() * kWidth + o % kWidth;
            if (kPairs) {
                transpose_words(from, 0, out);
                if (kParts == 2)
                    transpose_words(from, 1, out + grad_planes.planes() * grad_plane());
                continue;
            }
            for (int v = 0; v < kVecs; ++v) {
                Vec block[kLanes];
                for (int j = 0; j < kLanes; ++j) block[j] = load(from + j * kWidth + v * kLanes);
                transpose(block);
                for (int j = 0; j < kLanes; ++j) store(out + (v * kLanes + j) * kWidth, block[j]);
            }
        }
    }

    // [kLanes channels][kWidth pixels] to [kWidth / 2 words][kLanes channels].
    void transpose_words(const float* from, int part, float* out) const {
#if defined(__AVX512BF16__)
        Vec block[kLanes];
        for (int j = 0; j < kLanes; ++j) {
            const Vec low = load(from + j * kWidth), high = load(from + j * kWidth + kLanes);
            block[j] =
                part ? pack_row(low - rounded(low), high - rounded(high)) : pack_row(low, high);
        }
        transpose(block);
        for (int j = 0; j < kLanes; ++j) store(out + j * kWidth, block[j]);
#else
        (void)from, (void)part, (void)out;
#endif
    }

    void multiply(const float* x_panel, const float* grad_panel, int64_t words, float* sums,
                  bool accumulate) {
        for (int begin = 0; begin < product_count;) {
            int end = begin;
            while (end < product_count && products[end].acc == products[begin].acc) ++end;
            for (int64_t ob = 0; ob < blocks; ++ob) {
                float* out = sums + (products[begin].acc * blocks + ob) * rows() * kWidth;
                const float* g = grad_panel + ob * depth() * kWidth;
                multiply_block(begin, end, x_panel, g, words, out, accumulate);
            }
            begin = end;
        }
    }

    // The products [begin, end) of one accumulator and one block of output channels.
    void multiply_block(int begin, int end, const float* x_panel, const float* g, int64_t words,
                        float* out, bool accumulate) {
#if defined(__AMX_BF16__)
        if (kUnit == Unit::kAmx) {
            finish_stores();
            for (int64_t i = 0; i < rows(); i += 2 * kTileRows) {
                accumulate ? amx_load<2, 2>(out + i * kWidth) : amx_zero<2, 2>();
                for (int j = begin; j < end; ++j) {
                    const float* a = x_panel + products[j].x * x_plane() + i * depth();
                    const float* b = g + products[j].grad * grad_plane();
                    amx_accumulate<2, 2>(reinterpret_cast<const char*>(a), 4 * depth(),
                                         4 * kTileRows * depth(), 4 * kTileWords,
                                         reinterpret_cast<const char*>(b), words / kTileWords);
                }
                amx_store<2, 2>(out + i * kWidth);
            }
            return;
        }
#endif
#if defined(__AVX512BF16__)
        if (kUnit == Unit::kDot)
            return multiply_rows<DotAdd>(begin, end, x_panel, g, words, out, accumulate);
#endif
        multiply_rows<MultiplyAdd>(begin, end, x_panel, g, words, out, accumulate);
    }

    template <class Op>
    void multiply_rows(int begin, int end, const float* x_panel, const float* g, int64_t words,
                       float* out, bool accumulate) {
        const int64_t step = ceil_div(args.I, ceil_div(args.I, kRows));
        for (int64_t i = 0; i < args.I; i += step) {
            for (int j = begin; j < end; ++j) {
                const float* a = x_panel + products[j].x * x_plane() + i * depth();
                const float* b = g + products[j].grad * grad_plane();
                gemm_block<false, Op>(static_cast<int>(min64(step, args.I - i)), kVecs,
                                      accumulate || j > begin,
                                      {a, depth(), 1, b, kWidth, out + i * kWidth, kWidth, words});
            }
        }
    }

    Vec total(int acc, int64_t ob, int64_t i, int v) const {
        const int64_t offset = ((acc * blocks + ob) * rows() + i) * kWidth + v * kLanes;
        Vec sum = load(part(0) + total_floats + offset);
        for (int64_t split = 1; split < splits; ++split)
            sum = sum + load(part(split) + total_floats + offset);
        return sum;
    }

    // dW of mode k, one row, and the columns from o on.
    void gradient(int k, int64_t i, int64_t o, Vec& re, Vec& im) const {
        const int64_t ob = o / kWidth;
        const int v = static_cast<int>(o % kWidth / kLanes);
        const Vec scale = set1(args.scale[k]);
        const Vec d2 = has_second(k) ? total(second(k), ob, i, v) : zero();
        const Vec d3 = has_third(k) ? total(third(k), ob, i, v) : zero();
        re = total(first(k), ob, i, v);
        if (is_gauss(k)) re = (re - d2) - d3;
        re = re * scale;
        im = (is_swapped ? d3 - d2 : d2 - d3) * scale;
    }

    // Some neighbors in the last axis of channels of dW, in mode k.
    void write(int64_t place, int k, Vec re, Vec im, int count) const {
        float re_values[kLanes], im_values[kLanes];
        store(re_values, re);
        store(im_values, im);
        float* out = args.out + (place * args.K + k) * 2;
        for (int j = 0; j < count; ++j) {
            out[j * 2 * args.K] = re_values[j];
            out[j * 2 * args.K + 1] = im_values[j];
        }
    }

    static void finish_row(void* context, int64_t i, int) {
        const auto& self = *static_cast<const WeightGrad*>(context);
        for (int64_t o = 0; o < self.args.O; o += kLanes) {
            const int count = static_cast<int>(min64(kLanes, self.args.O - o));
            for (int k = 0; k < self.args.K; ++k) {
                Vec re, im;
                self.gradient(k, i, o, re, im);
                self.write(i * self.args.O + o, k, re, im, count);
            }
        }
    }

    // kLanes columns, as rows of dW.
    static void finish_columns(void* context, int64_t block, int) {
        const auto& self = *static_cast<const WeightGrad*>(context);
        const int64_t o = block * kLanes, columns = min64(kLanes, self.args.O - o);
        for (int64_t i = 0; i < self.args.I; i += kLanes) {
            const int count = static_cast<int>(min64(kLanes, self.args.I - i));
            for (int k = 0; k < self.args.K; ++k) {
                Vec re[kLanes], im[kLanes];
                for (int j = 0; j < kLanes; ++j)
                    self.gradient(k, min64(i + j, self.args.I - 1), o, re[j], im[j]);
                transpose(re);
                transpose(im);
                for (int64_t c = 0; c < columns; ++c)
                    self.write((o + c) * self.args.I + i, k, re[c], im[c], count);
            }
        }
    }

    void finish() {
        if (is_swapped) {
            parallel_for(args.threads, ceil_div(args.O, kLanes), finish_columns, this);
        } else {
            parallel_for(args.threads, args.I, finish_row, this);
        }
    }

    bool run() {
        char* memory = static_cast<char*>(scratch(static_cast<size_t>(plan())));
        if (!memory) return false;
        use_memory(memory);
        parallel_for(static_cast<int>(splits), splits, split_task, this);
        finish();
        return true;
    }
};

}  // namespace DSNO_ISA
