// spectral_conv_weight_grad: products of the planes of x and g, summed over the pixels,
//
//     dWr = sum Xr Gr + Xi Gi,  dWi = sum Xr Gi - Xi Gr   (times alpha_k / n),
//
// with three products where both parts exist: D1 = (Xr + Xi)(Gr + Gi), D2 = Xr Gi, D3 = Xi Gr; dWr
// = D1 - D2 - D3. The pixels are cut into as many parts as there are threads; each part has its own
// sum, and the sums are added in order, so a result depends on the number of threads but not on
// their timing.
#include "../parallel.h"
#include "isa.h"
#include "mixing.h"

namespace DSNO_ISA {
namespace {

constexpr int64_t kPanelBytes = 512 << 10;
constexpr int kMaxTilesPerChunk = 4;

struct Product {
    int acc, x, grad;
};

struct WeightGrad {
    const WeightGradArgs& args;
    Mixing x_planes, grad_planes;
    Reader x, grad;
    Product* products;
    int product_count = 0;
    int64_t blocks, tiles, tiles_per_chunk, chunks, splits;
    int64_t part_floats, worker_bytes;
    char* workers;

    explicit WeightGrad(const WeightGradArgs& a)
        : args(a),
          x_planes(a.K, a.x_analysis->imaginary, a.grad_analysis->imaginary, true),
          grad_planes(a.K, a.grad_analysis->imaginary, a.x_analysis->imaginary, true),
          x{a.x, {nullptr, 1.0f}, a.T, a.I, 0},
          grad{a.grad, a.grad_positive, a.n, a.O, ceil_div(a.P, 8)} {}

    // Accumulators of mode k: the real part (or D1), D2 and D3.
    int first(int k) const { return k; }
    int second(int k) const { return args.K + k - 1; }
    int third(int k) const { return 2 * args.K + k - 2; }
    int accumulators() const { return 3 * args.K - 2; }
    bool has_second(int k) const { return k >= 1 && k <= grad_planes.x_imag; }
    bool has_third(int k) const { return k >= 1 && k <= x_planes.x_imag; }
    bool is_gauss(int k) const { return k >= 1 && k <= x_planes.gauss; }

    void list_products() {
        for (int k = 0; k < args.K; ++k) {
            if (is_gauss(k)) {
                products[product_count++] = {first(k), x_planes.sum_plane(k),
                                             grad_planes.sum_plane(k)};
            } else {
                products[product_count++] = {first(k), k, k};
            }
            if (has_second(k))
                products[product_count++] = {second(k), k, grad_planes.imag_plane(k)};
            if (has_third(k)) products[product_count++] = {third(k), x_planes.imag_plane(k), k};
        }
    }

    int64_t depth() const { return tiles_per_chunk * kWidth; }
    int64_t x_floats() const { return x_planes.planes() * args.I * depth(); }
    int64_t grad_floats() const { return grad_planes.planes() * blocks * depth() * kWidth; }
    int64_t buffer_floats() const { return kLanes * max64(args.T, args.n) * kWidth; }
    int64_t lines_floats() const { return grad_planes.planes() * kLanes * kWidth; }

    bool prepare() {
        blocks = ceil_div(args.O, kWidth);
        tiles = ceil_div(args.P, kWidth);
        const int64_t tile_bytes =
            4 * kWidth * (x_planes.planes() * args.I + grad_planes.planes() * blocks * kWidth);
        tiles_per_chunk = max64(1, min64(kMaxTilesPerChunk, kPanelBytes / tile_bytes));
        tiles_per_chunk = min64(tiles_per_chunk, tiles);
        chunks = args.B * ceil_div(tiles, tiles_per_chunk);
        splits = min64(args.threads, chunks);
        part_floats = accumulators() * blocks * args.I * kWidth;
        const int64_t floats = part_floats + x_floats() + grad_floats() + buffer_floats() +
                               lines_floats() + fold_floats(max64(args.T, args.n));
        worker_bytes = round_up(4 * floats, 4096) + 64;
        const int64_t product_bytes = round_up(int64_t{sizeof(Product)} * 3 * args.K, 64);
        char* memory =
            static_cast<char*>(scratch(static_cast<size_t>(product_bytes + splits * worker_bytes)));
        if (!memory) return false;
        products = reinterpret_cast<Product*>(memory);
        list_products();
        workers = memory + product_bytes;
        return true;
    }

    float* part(int64_t split) const {
        return reinterpret_cast<float*>(workers + split * worker_bytes);
    }

    static void split_task(void* context, int64_t split, int) {
        auto& self = *static_cast<WeightGrad*>(context);
        const int64_t begin = split * self.chunks / self.splits,
                      end = (split + 1) * self.chunks / self.splits;
        for (int64_t chunk = begin; chunk < end; ++chunk)
            self.run_chunk(chunk, self.part(split), chunk > begin);
    }

    void run_chunk(int64_t chunk, float* sums, bool accumulate) {
        float* x_panel = sums + part_floats;
        float* grad_panel = x_panel + x_floats();
        float* buffer = grad_panel + grad_floats();
        float* lines = buffer + buffer_floats();
        float* fold = lines + lines_floats();
        const int64_t chunks_per_batch = chunks / args.B;
        const int64_t b = chunk / chunks_per_batch,
                      begin = chunk % chunks_per_batch * tiles_per_chunk;
        const int64_t end = min64(tiles, begin + tiles_per_chunk);
        for (int64_t j = begin; j < end; ++j) {
            const PixelTile tile{b, j * kWidth,
                                 static_cast<int>(min64(kWidth, args.P - j * kWidth))};
            const int64_t p = (j - begin) * kWidth;
            fill_x(tile, x_panel + p, buffer, fold);
            fill_grad(tile, grad_panel + p * kWidth, buffer, lines, fold);
        }
        multiply(x_panel, grad_panel, (end - begin) * kWidth, sums, accumulate);
    }

    // Panel of x: [plane][i][pixel].
    void fill_x(const PixelTile& tile, float* panel, float* buffer, float* fold) {
        const int64_t stride = args.I * depth();
        x.for_each_channel(tile, 0, args.I, buffer, [&](int64_t c, const Rows& rows) {
            float* out = panel + c * depth();
            analyze(*args.x_analysis, rows, kVecs, out, stride, fold);
            x_planes.add_sums(out, stride, kVecs);
        });
    }

    // Panel of g: [plane][block][pixel][kWidth channels].
    void fill_grad(const PixelTile& tile, float* panel, float* buffer, float* lines, float* fold) {
        const int64_t stride = kLanes * kWidth;
        for (int64_t o = 0; o < blocks * kWidth; o += kLanes) {
            const int64_t channels = max64(0, min64(kLanes, args.O - o));
            if (channels < kLanes) std::memset(lines, 0, static_cast<size_t>(4 * lines_floats()));
            grad.for_each_channel(tile, o, o + channels, buffer, [&](int64_t c, const Rows& rows) {
                float* out = lines + (c - o) * kWidth;
                analyze(*args.grad_analysis, rows, kVecs, out, stride, fold);
                grad_planes.add_sums(out, stride, kVecs);
            });
            for (int plane = 0; plane < grad_planes.planes(); ++plane) {
                float* out = panel + (plane * blocks + o / kWidth) * depth() * kWidth + o % kWidth;
                for (int v = 0; v < kVecs; ++v) {
                    Vec block[kLanes];
                    for (int j = 0; j < kLanes; ++j)
                        block[j] = load(lines + plane * stride + j * kWidth + v * kLanes);
                    transpose(block);
                    for (int j = 0; j < kLanes; ++j)
                        store(out + (v * kLanes + j) * kWidth, block[j]);
                }
            }
        }
    }

    void multiply(const float* x_panel, const float* grad_panel, int64_t pixels, float* sums,
                  bool accumulate) {
        const int64_t step = ceil_div(args.I, ceil_div(args.I, kRows));
        for (int j = 0; j < product_count; ++j) {
            const bool add = accumulate || (j > 0 && products[j].acc == products[j - 1].acc);
            for (int64_t ob = 0; ob < blocks; ++ob) {
                const float* g = grad_panel + (products[j].grad * blocks + ob) * depth() * kWidth;
                for (int64_t i = 0; i < args.I; i += step) {
                    const float* rows = x_panel + (products[j].x * args.I + i) * depth();
                    float* out = sums + ((products[j].acc * blocks + ob) * args.I + i) * kWidth;
                    gemm_block<false>(static_cast<int>(min64(step, args.I - i)), kVecs, add,
                                      {rows, depth(), 1, g, kWidth, out, kWidth, pixels});
                }
            }
        }
    }

    Vec total(int acc, int64_t ob, int64_t i, int v) const {
        const int64_t offset = ((acc * blocks + ob) * args.I + i) * kWidth + v * kLanes;
        Vec sum = load(part(0) + offset);
        for (int64_t split = 1; split < splits; ++split) sum = sum + load(part(split) + offset);
        return sum;
    }

    static void finish_task(void* context, int64_t i, int) {
        const auto& self = *static_cast<const WeightGrad*>(context);
        const int K = self.args.K;
        for (int64_t o = 0; o < self.args.O; o += kLanes) {
            const int64_t ob = o / kWidth;
            const int v = static_cast<int>(o % kWidth / kLanes);
            const int count = static_cast<int>(min64(kLanes, self.args.O - o));
            for (int k = 0; k < K; ++k) {
                const Vec scale = set1(self.args.scale[k]);
                Vec re = self.total(self.first(k), ob, i, v), im = zero();
                if (self.has_second(k)) im = self.total(self.second(k), ob, i, v);
                const Vec d3 = self.has_third(k) ? self.total(self.third(k), ob, i, v) : zero();
                if (self.is_gauss(k)) re = (re - im) - d3;
                im = im - d3;
                float re_values[kLanes], im_values[kLanes];
                store(re_values, re * scale);
                store(im_values, im * scale);
                float* out = self.args.out + ((i * self.args.O + o) * K + k) * 2;
                for (int j = 0; j < count; ++j) {
                    out[j * 2 * K] = re_values[j];
                    out[j * 2 * K + 1] = im_values[j];
                }
            }
        }
    }

    bool run() {
        if (!prepare()) return false;
        parallel_for(static_cast<int>(splits), splits, split_task, this);
        parallel_for(args.threads, args.I, finish_task, this);
        return true;
    }
};

}  // namespace

bool spectral_conv_weight_grad(const WeightGradArgs& args) {
    if (rows_path_serves(args)) return spectral_conv_weight_grad_rows(args);
    return WeightGrad(args).run();
}

}  // namespace DSNO_ISA
