// spectral_conv and its weight gradient for long signals that lie contiguous in memory: transforms
// of whole rows, and between them the complex product of every mode with the modes in the vector
// lanes, as they lie in W.
#include "rows.h"

#include "../parallel.h"
#include "isa.h"

namespace DSNO_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kBlockQ = 4;  // signals of a register tile of the product
#else
constexpr int kBlockQ = 2;
#endif
constexpr int kBlockO = 3;       // output channels of a register tile
constexpr int64_t kChunkQ = 64;  // signals of a task
constexpr int64_t kChain = 64;   // products of a mode that are summed in registers

// Signals (q, c) of a tensor, q = (b, p).
struct Signals {
    View view;
    int64_t P, C;
    int length;

    char* at(int64_t q, int64_t c) const { return element(view, q / P, 0, c, q % P); }
};

Vec alternating(float even, float odd) {
    float values[kLanes];
    for (int j = 0; j < kLanes; j += 2) {
        values[j] = even;
        values[j + 1] = odd;
    }
    return load(values);
}

// Spectra of all signals. Interleaved: [signal][pairs]; else real parts twice and imaginary parts
// twice: [signal][2][pairs].
struct AnalysisPass {
    const Analysis& tables;
    Signals signals;
    int64_t count;
    bool interleaved;
    int64_t row_floats;  // from one spectrum to the next
    float* out;
    float* workers;

    int64_t signal_floats() const { return round_up(signals.length, kLanes); }
    int64_t worker_floats() const {
        return kRows * (quarter_floats(tables.quarter) + lanes_floats(tables.quarter)) +
               signal_floats();
    }

    static void task(void* context, int64_t index, int worker) {
        const auto& self = *static_cast<const AnalysisPass*>(context);
        const QuarterTables& quarter = self.tables.quarter;
        float* folded = self.workers + worker * self.worker_floats();
        float* lanes = folded + kRows * quarter_floats(quarter);
        float* signal = lanes + kRows * lanes_floats(quarter);
        const int64_t first = index * kRows;
        const int rows = static_cast<int>(min64(kRows, self.count - first));
        for (int r = 0; r < rows; ++r) {
            const char* source =
                self.signals.at((first + r) / self.signals.C, (first + r) % self.signals.C);
            const float* x = reinterpret_cast<const float*>(source);
            if (self.signals.view.dtype != kFloat32) {
                load_signal(signal, source, self.signals.view.dtype, self.signals.length);
                x = signal;
            }
            fold_quarters(x, self.signals.length, quarter.padded_length,
                          folded + r * quarter_floats(quarter));
        }
        multiply_analysis(quarter, rows, folded, lanes);
        const int64_t pairs = pair_floats(self.tables.K), part = quarter.lanes[0];
        for (int r = 0; r < rows; ++r) {
            const float* from = lanes + r * lanes_floats(quarter);
            if (self.interleaved) {
                interleave(from, part, self.tables.K, self.out + (first + r) * self.row_floats);
            } else {
                float* out = self.out + (first + r) * self.row_floats;
                duplicate(from, part, pairs, out, out + pairs);
            }
        }
    }

    void run(int threads) { parallel_for(threads, ceil_div(count, kRows), task, this); }
};

// Products Y[q][o] = sum over i of X[q][i] W[i][o] (conj(W) with `conjugate`), interleaved pairs.
struct Product {
    const float* x;  // [q][i][2][pairs]
    const float* weight;
    int64_t stride_i, stride_o;
    int64_t Q, I, O, pairs;
    bool conjugate;
    float* y;  // [q][o][pairs]

    template <int kQ, int kO>
    void tile(int64_t q, int64_t o, int64_t j) const {
        int64_t i = 0;
        do add<kQ, kO>(q, o, j, i, min64(I, i + kChain));
        while ((i += kChain) < I);
    }

    // The input channels [begin, end); the first stores, the others add.
    template <int kQ, int kO>
    void add(int64_t q, int64_t o, int64_t j, int64_t begin, int64_t end) const {
        Vec by_real[kQ][kO], by_imag[kQ][kO];
#pragma GCC unroll 4
        for (int a = 0; a < kQ; ++a) {
#pragma GCC unroll 4
            for (int b = 0; b < kO; ++b) by_real[a][b] = by_imag[a][b] = zero();
        }
        const float* w = weight + begin * stride_i + o * stride_o + j;
        const float* from = x + (q * I + begin) * 2 * pairs + j;
        for (int64_t i = begin; i < end; ++i) {
            Vec row[kO];
#pragma GCC unroll 4
            for (int b = 0; b < kO; ++b) {
                row[b] = load(w + b * stride_o);
                __builtin_prefetch(w + b * stride_o + 8 * stride_i);
            }
#pragma GCC unroll 4
            for (int a = 0; a < kQ; ++a) {
                const Vec re = load(from + a * I * 2 * pairs),
                          im = load(from + a * I * 2 * pairs + pairs);
#pragma GCC unroll 4
                for (int b = 0; b < kO; ++b) {
                    by_real[a][b] = fma(re, row[b], by_real[a][b]);
                    by_imag[a][b] = fma(im, row[b], by_imag[a][b]);
                }
            }
            w += stride_i;
            from += 2 * pairs;
        }
        const Vec direct = alternating(1, conjugate ? -1 : 1),
                  crossed = alternating(conjugate ? 1 : -1, 1);
        for (int a = 0; a < kQ; ++a) {
            for (int b = 0; b < kO; ++b) {
                float* out = y + ((q + a) * O + o + b) * pairs + j;
                const Vec value = fma(direct, by_real[a][b], crossed * swap_pairs(by_imag[a][b]));
                store(out, begin > 0 ? load(out) + value : value);
            }
        }
    }

    template <int kQ>
    void tiles(int outputs, int64_t q, int64_t o, int64_t j) const {
        if (outputs == 3) return tile<kQ, 3>(q, o, j);
        if (outputs == 2) return tile<kQ, 2>(q, o, j);
        tile<kQ, 1>(q, o, j);
    }

    static void task(void* context, int64_t index, int) {
        const auto& self = *static_cast<const Product*>(context);
        const int64_t chunks = ceil_div(self.Q, kChunkQ);
        const int64_t o = index / chunks * kBlockO, begin = index % chunks * kChunkQ;
        const int64_t end = min64(self.Q, begin + kChunkQ);
        const int outputs = static_cast<int>(min64(kBlockO, self.O - o));
        for (int64_t q = begin; q < end; q += kBlockQ) {
            for (int64_t j = 0; j < self.pairs; j += kLanes) {
                switch (min64(kBlockQ, end - q)) {
                    case 1:
                        self.tiles<1>(outputs, q, o, j);
                        break;
                    case 2:
                        self.tiles<2>(outputs, q, o, j);
                        break;
#if defined(__AVX512F__)
                    case 3:
                        self.tiles<3>(outputs, q, o, j);
                        break;
                    default:
                        self.tiles<4>(outputs, q, o, j);
                        break;
#endif
                }
            }
        }
    }

    void run(int threads) {
        parallel_for(threads, ceil_div(O, kBlockO) * ceil_div(Q, kChunkQ), task, this);
    }
};

// W with whole vectors of pairs: [i][o][pairs].
struct Padding {
    const ConvArgs& args;
    int64_t pairs;
    float* out;

    static void task(void* context, int64_t i, int) {
        const auto& self = *static_cast<const Padding*>(context);
        const ConvArgs& a = self.args;
        for (int64_t o = 0; o < a.O; ++o) {
            const float* from = a.weight + i * a.stride_i + o * a.stride_o;
            float* to = self.out + (i * a.O + o) * self.pairs;
            for (int k = 0; k < a.K; ++k) {
                to[2 * k] = from[k * a.stride_k];
                to[2 * k + 1] = from[k * a.stride_k + a.stride_part];
            }
            for (int64_t j = 2 * int64_t{a.K}; j < self.pairs; ++j) to[j] = 0.0f;
        }
    }
};

struct SynthesisPass {
    const Synthesis& tables;
    Signals signals;
    Signals residual;  // view.data may be null
    const float* bias;
    bool activation;
    float negative_slope;
    int64_t count;
    const float* pairs;
    int64_t row_floats;
    float* workers;

    int64_t worker_floats() const {
        return kRows * quarter_floats(tables.quarter) + 2 * round_up(signals.length, kLanes);
    }

    static void task(void* context, int64_t index, int worker) {
        const auto& self = *static_cast<const SynthesisPass*>(context);
        const QuarterTables& quarter = self.tables.quarter;
        float* parts = self.workers + worker * self.worker_floats();
        float* signal = parts + kRows * quarter_floats(quarter);
        const int64_t first = index * kRows;
        const int rows = static_cast<int>(min64(kRows, self.count - first));
        multiply_synthesis(quarter, rows, self.pairs + first * self.row_floats, self.row_floats,
                           parts);
        const bool plain = self.signals.view.dtype == kFloat32 && !self.bias && !self.activation &&
                           !self.residual.view.data;
        for (int r = 0; r < rows; ++r) {
            const int64_t q = (first + r) / self.signals.C, c = (first + r) % self.signals.C;
            char* out = self.signals.at(q, c);
            float* h = plain ? reinterpret_cast<float*>(out) : signal;
            unfold_quarters(parts + r * quarter_floats(quarter), self.signals.length,
                            quarter.padded_length, h);
            if (!plain)
                self.finish(q, c, signal, signal + round_up(self.signals.length, kLanes), out);
        }
    }

    void finish(int64_t q, int64_t c, float* h, float* add, char* out) const {
        const int64_t n = signals.length;
        const Vec offset = set1(bias ? bias[c] : 0.0f), slope = set1(negative_slope);
        if (residual.view.data) {
            const char* from = residual.at(q, c);
            if (residual.view.stride_t == 1) {
                load_signal(add, from, residual.view.dtype, n);
            } else {
                for (int64_t t = 0; t < n; t += kWidth) {
                    float some[kWidth];
                    const int count_t = static_cast<int>(min64(kWidth, n - t));
                    gather(some,
                           from + t * residual.view.stride_t * element_size(residual.view.dtype),
                           residual.view.dtype, residual.view.stride_t, count_t);
                    std::memcpy(add + t, some, static_cast<size_t>(4 * count_t));
                }
            }
        }
        for (int64_t t = 0; t < n; t += kLanes) {
            Vec x = load(h + t) + offset;
            if (activation) x = scale_unless(positive_bits(x), x, slope);
            if (residual.view.data) x = x + load(add + t);
            const int some = static_cast<int>(min64(kLanes, n - t));
            store_some(out + t * element_size(signals.view.dtype), signals.view.dtype, x, some);
        }
    }

    void run(int threads) { parallel_for(threads, ceil_div(count, kRows), task, this); }
};

// dW[i][o] = scale * sum over q of conj(X[q][i]) G[q][o].
struct GradProduct {
    const float* x;      // [q][i][2][pairs]
    const float* grad;   // [q][o][pairs]
    const float* scale;  // [pairs]; 0 for parts that do not exist
    int64_t Q, I, O, pairs, modes;
    float* out;  // [i][o][modes][2]

    template <int kI, int kO>
    void tile(int64_t i, int64_t o, int64_t j) const {
        int64_t q = 0;
        do add<kI, kO>(i, o, j, q, min64(Q, q + kChain));
        while ((q += kChain) < Q);
    }

    // The signals [begin, end); the first store, the others add.
    template <int kI, int kO>
    void add(int64_t i, int64_t o, int64_t j, int64_t begin, int64_t end) const {
        Vec by_real[kI][kO], by_imag[kI][kO];
#pragma GCC unroll 4
        for (int a = 0; a < kI; ++a) {
#pragma GCC unroll 4
            for (int b = 0; b < kO; ++b) by_real[a][b] = by_imag[a][b] = zero();
        }
        const float* from = x + (begin * I + i) * 2 * pairs + j;
        const float* g = grad + (begin * O + o) * pairs + j;
        for (int64_t q = begin; q < end; ++q) {
            Vec row[kO];
#pragma GCC unroll 4
            for (int b = 0; b < kO; ++b) row[b] = load(g + b * pairs);
#pragma GCC unroll 4
            for (int a = 0; a < kI; ++a) {
                const Vec re = load(from + a * 2 * pairs), im = load(from + a * 2 * pairs + pairs);
#pragma GCC unroll 4
                for (int b = 0; b < kO; ++b) {
                    by_real[a][b] = fma(re, row[b], by_real[a][b]);
                    by_imag[a][b] = fma(im, row[b], by_imag[a][b]);
                }
            }
            from += I * 2 * pairs;
            g += O * pairs;
        }
        const Vec crossed = alternating(1, -1), factor = load(scale + j);
        const int some = static_cast<int>(min64(kLanes, 2 * modes - j));
        if (some <= 0) return;
        for (int a = 0; a < kI; ++a) {
            for (int b = 0; b < kO; ++b) {
                char* to = reinterpret_cast<char*>(out + ((i + a) * O + o + b) * 2 * modes + j);
                Vec value = factor * fma(crossed, swap_pairs(by_imag[a][b]), by_real[a][b]);
                if (begin > 0) value = load_some(to, kFloat32, some) + value;
                store_some(to, kFloat32, value, some);
            }
        }
    }

    template <int kI>
    void tiles(int outputs, int64_t i, int64_t o, int64_t j) const {
        if (outputs == 3) return tile<kI, 3>(i, o, j);
        if (outputs == 2) return tile<kI, 2>(i, o, j);
        tile<kI, 1>(i, o, j);
    }

    static void task(void* context, int64_t index, int) {
        const auto& self = *static_cast<const GradProduct*>(context);
        const int64_t i = index * kBlockQ;
        for (int64_t j = 0; j < self.pairs; j += kLanes) {
            for (int64_t o = 0; o < self.O; o += kBlockO) {
                const int outputs = static_cast<int>(min64(kBlockO, self.O - o));
                switch (min64(kBlockQ, self.I - i)) {
                    case 1:
                        self.tiles<1>(outputs, i, o, j);
                        break;
                    case 2:
                        self.tiles<2>(outputs, i, o, j);
                        break;
#if defined(__AVX512F__)
                    case 3:
                        self.tiles<3>(outputs, i, o, j);
                        break;
                    default:
                        self.tiles<4>(outputs, i, o, j);
                        break;
#endif
                }
            }
        }
    }

    void run(int threads) { parallel_for(threads, ceil_div(I, kBlockQ), task, this); }
};

float* scratch_floats(int64_t count) {
    return static_cast<float*>(scratch(static_cast<size_t>(4 * count)));
}

}  // namespace

bool rows_path_serves(const ConvArgs& a) {
    return a.x.stride_t == 1 && a.y.stride_t == 1 && !a.x_positive.data && !a.positive &&
           has_rows_tables(*a.analysis) && has_rows_tables(*a.synthesis);
}

bool rows_path_serves(const WeightGradArgs& a) {
    return a.x.stride_t == 1 && a.grad.stride_t == 1 && !a.grad_positive.data &&
           has_rows_tables(*a.x_analysis) && has_rows_tables(*a.grad_analysis);
}

bool spectral_conv_rows(const ConvArgs& a) {
    const int64_t Q = a.B * a.P, pairs = pair_floats(a.K);
    const bool padded = 2 * a.K != pairs || a.stride_part != 1 || (a.stride_k != 2 && a.K > 1);
    AnalysisPass analysis{*a.analysis, {a.x, a.P, a.I, a.T}, Q * a.I, false, 2 * pairs, nullptr,
                          nullptr};
    SynthesisPass synthesis{*a.synthesis,
                            {a.y, a.P, a.O, a.n},
                            {a.residual, a.P, a.O, a.n},
                            a.bias,
                            a.activation,
                            a.negative_slope,
                            Q * a.O,
                            nullptr,
                            pairs,
                            nullptr};
    const int64_t worker =
        round_up(max64(analysis.worker_floats(), synthesis.worker_floats()), 16) + 16;
    const int64_t x_floats = Q * a.I * 2 * pairs, y_floats = Q * a.O * pairs;
    const int64_t weight_floats = padded ? a.I * a.O * pairs : 0;
    float* memory = scratch_floats(x_floats + y_floats + weight_floats + worker * a.threads);
    if (!memory) return false;
    float *x = memory, *y = x + x_floats, *weight = y + y_floats;
    analysis.out = x;
    analysis.workers = synthesis.workers = weight + weight_floats;
    synthesis.pairs = y;
    analysis.run(a.threads);
    Product product{x, a.weight, a.stride_i, a.stride_o, Q, a.I, a.O, pairs, a.conjugate, y};
    if (padded) {
        Padding padding{a, pairs, weight};
        parallel_for(a.threads, a.I, Padding::task, &padding);
        product.weight = weight;
        product.stride_i = a.O * pairs;
        product.stride_o = pairs;
    }
    product.run(a.threads);
    synthesis.run(a.threads);
    return true;
}

bool spectral_conv_weight_grad_rows(const WeightGradArgs& a) {
    const int64_t Q = a.B * a.P, pairs = pair_floats(a.K);
    AnalysisPass of_x{*a.x_analysis, {a.x, a.P, a.I, a.T}, Q * a.I, false, 2 * pairs, nullptr,
                      nullptr};
    AnalysisPass of_grad{*a.grad_analysis, {a.grad, a.P, a.O, a.n}, Q * a.O, true, pairs, nullptr,
                         nullptr};
    const int64_t worker = round_up(max64(of_x.worker_floats(), of_grad.worker_floats()), 16) + 16;
    const int64_t x_floats = Q * a.I * 2 * pairs, grad_floats = Q * a.O * pairs;
    float* memory = scratch_floats(x_floats + grad_floats + pairs + worker * a.threads);
    if (!memory) return false;
    of_x.out = memory;
    of_grad.out = memory + x_floats;
    float* scale = of_grad.out + grad_floats;
    of_x.workers = of_grad.workers = scale + pairs;
    const int imaginary =
        static_cast<int>(max64(a.x_analysis->imaginary, a.grad_analysis->imaginary));
    for (int64_t j = 0; j < pairs; ++j) {
        const int64_t k = j / 2;
        const bool exists = k < a.K && (j % 2 == 0 || (k >= 1 && k <= imaginary));
        scale[j] = exists ? a.scale[k] : 0.0f;
    }
    // Lanes behind the last mode are multiplied too.
    if (pairs > 2 * a.K) std::memset(of_grad.out, 0, static_cast<size_t>(4 * grad_floats));
    of_x.run(a.threads);
    of_grad.run(a.threads);
    GradProduct product{of_x.out, of_grad.out, scale, Q, a.I, a.O, pairs, a.K, a.out};
    product.run(a.threads);
    return true;
}

bool rows_path_serves(const TransformArgs& a) {
    return a.B == 1 && a.x.stride_t == 1 && a.stride_k == 2 &&
           (a.analysis ? has_rows_tables(*a.analysis) : has_rows_tables(*a.synthesis));
}

bool truncated_rfft_rows(const TransformArgs& a) {
    AnalysisPass analysis{*a.analysis, {a.x, a.P, 1, a.T}, a.P,    true,
                          a.stride_p,  a.spectrum,         nullptr};
    analysis.workers = scratch_floats(analysis.worker_floats() * a.threads);
    if (!analysis.workers) return false;
    analysis.run(a.threads);
    return true;
}

bool truncated_irfft_rows(const TransformArgs& a) {
    const Signals none{{nullptr, kFloat32, 0, 0, 0, 0}, 1, 1, a.T};
    SynthesisPass synthesis{*a.synthesis, {a.x, a.P, 1, a.T}, none,       nullptr, false, 1.0f,
                            a.P,          a.spectrum,         a.stride_p, nullptr};
    synthesis.workers = scratch_floats(synthesis.worker_floats() * a.threads);
    if (!synthesis.workers) return false;
    synthesis.run(a.threads);
    return true;
}

}  // namespace DSNO_ISA
