// CPU kernels. A tensor is a tuple (address, dtype, stride_b, stride_t, stride_c, stride_p);
// address 0 stands for none.
#include <memory>
#include <string>
#include <utility>

#include "../csrc/cpu/dispatch.h"
#include "../csrc/cpu/tables.h"
#include "arguments.h"
#include "bindings.h"

namespace py = pybind11;

namespace {

// Raised with every change of the signatures below; dsno_kernels/backends/cpu.py expects it.
constexpr int kApi = 4;

View view(const py::tuple& t) {
    return {pointer<char>(integer(t, 0)),
            static_cast<int>(integer(t, 1)),
            integer(t, 2),
            integer(t, 3),
            integer(t, 4),
            integer(t, 5)};
}

// sizes: B, P, I, O, T, n, K.
template <class Args>
Args sized(const py::tuple& sizes, int precision, int threads) {
    Args args{};
    args.B = integer(sizes, 0);
    args.P = integer(sizes, 1);
    args.I = integer(sizes, 2);
    args.O = integer(sizes, 3);
    args.T = static_cast<int>(integer(sizes, 4));
    args.n = static_cast<int>(integer(sizes, 5));
    args.K = static_cast<int>(integer(sizes, 6));
    args.precision = precision;
    args.threads = threads;
    return args;
}

// weight: address, stride_i, stride_o, stride_k, stride_part.
void set_weight(ConvArgs& args, const py::tuple& weight) {
    args.weight = pointer<const float>(integer(weight, 0));
    args.stride_i = integer(weight, 1);
    args.stride_o = integer(weight, 2);
    args.stride_k = integer(weight, 3);
    args.stride_part = integer(weight, 4);
}

// The tables of a call, which keep alive what its arguments point to.
struct ConvTables {
    std::shared_ptr<const Analysis> analysis;
    std::shared_ptr<const Synthesis> synthesis;

    ConvTables(ConvArgs& args, bool adjoint)
        : analysis(analysis_tables(args.T, args.K)),
          synthesis(synthesis_tables(args.n, args.K, adjoint ? args.T : args.n)) {
        args.analysis = analysis.get();
        args.synthesis = synthesis.get();
    }
};

struct WeightGradTables {
    std::shared_ptr<const Analysis> x_analysis, grad_analysis;
    std::shared_ptr<const Synthesis> synthesis;

    // The first row of the cosine table of the synthesis is cos(0) alpha_k / n.
    explicit WeightGradTables(WeightGradArgs& args)
        : x_analysis(analysis_tables(args.T, args.K)),
          grad_analysis(analysis_tables(args.n, args.K)),
          synthesis(synthesis_tables(args.n, args.K, args.n)) {
        args.x_analysis = x_analysis.get();
        args.grad_analysis = grad_analysis.get();
        args.scale = synthesis->cosine;
    }
};

void spectral_conv(const py::tuple& sizes, const py::tuple& x, const py::tuple& y,
                   const py::tuple& residual, const py::tuple& weight, int64_t bias,
                   int64_t x_positive, int64_t positive, float x_slope, float negative_slope,
                   bool activation, bool adjoint, int precision, int threads) {
    ConvArgs args = sized<ConvArgs>(sizes, precision, threads);
    args.x = view(x);
    args.y = view(y);
    args.residual = view(residual);
    args.x_positive = {pointer<const uint8_t>(x_positive), x_slope};
    args.positive = pointer<uint8_t>(positive);
    set_weight(args, weight);
    args.bias = pointer<const float>(bias);
    args.negative_slope = negative_slope;
    args.activation = activation;
    args.conjugate = adjoint;
    const py::gil_scoped_release release;
    const ConvTables tables(args, adjoint);
    check_memory(active_kernels().spectral_conv(args));
}

WeightGradArgs weight_grad_args(const py::tuple& sizes, const py::tuple& x, const py::tuple& grad,
                                int64_t out, int64_t grad_positive, float negative_slope,
                                int precision, int threads) {
    WeightGradArgs args = sized<WeightGradArgs>(sizes, precision, threads);
    args.x = view(x);
    args.grad = view(grad);
    args.grad_positive = {pointer<const uint8_t>(grad_positive), negative_slope};
    args.out = pointer<float>(out);
    return args;
}

void spectral_conv_weight_grad(const py::tuple& sizes, const py::tuple& x, const py::tuple& grad,
                               int64_t out, int64_t grad_positive, float negative_slope,
                               int precision, int threads) {
    WeightGradArgs args =
        weight_grad_args(sizes, x, grad, out, grad_positive, negative_slope, precision, threads);
    const py::gil_scoped_release release;
    const WeightGradTables tables(args);
    check_memory(active_kernels().spectral_conv_weight_grad(args));
}

// sizes are those of the forward op.
void spectral_conv_backward(const py::tuple& sizes, const py::tuple& x, const py::tuple& grad,
                            const py::tuple& weight, const py::tuple& grad_x, int64_t out,
                            int64_t grad_positive, float negative_slope, int precision,
                            int threads) {
    WeightGradArgs args =
        weight_grad_args(sizes, x, grad, out, grad_positive, negative_slope, precision, threads);
    ConvArgs conv = sized<ConvArgs>(sizes, precision, threads);
    std::swap(conv.I, conv.O);
    std::swap(conv.T, conv.n);
    conv.x = args.grad;
    conv.y = view(grad_x);
    conv.x_positive = args.grad_positive;
    set_weight(conv, weight);
    std::swap(conv.stride_i, conv.stride_o);
    conv.negative_slope = 1.0f;
    conv.conjugate = true;
    const py::gil_scoped_release release;
    const WeightGradTables tables(args);
    const ConvTables conv_tables(conv, true);
    check_memory(active_kernels().spectral_conv_backward(conv, args));
}

// sizes: B, P, T, K.  strides of the spectrum: b, k, p.
TransformArgs transform(const py::tuple& sizes, const py::tuple& x, int64_t spectrum,
                        const py::tuple& strides, int threads) {
    TransformArgs args{};
    args.B = integer(sizes, 0);
    args.P = integer(sizes, 1);
    args.T = static_cast<int>(integer(sizes, 2));
    args.K = static_cast<int>(integer(sizes, 3));
    args.x = view(x);
    args.spectrum = pointer<float>(spectrum);
    args.stride_b = integer(strides, 0);
    args.stride_k = integer(strides, 1);
    args.stride_p = integer(strides, 2);
    args.threads = threads;
    return args;
}

void truncated_rfft(const py::tuple& sizes, const py::tuple& x, int64_t spectrum,
                    const py::tuple& strides, int threads) {
    TransformArgs args = transform(sizes, x, spectrum, strides, threads);
    const py::gil_scoped_release release;
    const auto analysis = analysis_tables(args.T, args.K);
    args.analysis = analysis.get();
    check_memory(active_kernels().truncated_rfft(args));
}

void truncated_irfft(const py::tuple& sizes, const py::tuple& x, int64_t spectrum,
                     const py::tuple& strides, int threads) {
    TransformArgs args = transform(sizes, x, spectrum, strides, threads);
    const py::gil_scoped_release release;
    const auto synthesis = synthesis_tables(args.T, args.K, args.T);
    args.synthesis = synthesis.get();
    check_memory(active_kernels().truncated_irfft(args));
}

py::list isas() {
    const Kernels* found[kMaxIsas];
    const int count = available_kernels(found);
    py::list names;
    for (int i = 0; i < count; ++i) names.append(found[i]->name);
    return names;
}

void set_isa(const std::string& name) {
    if (!use_kernels(name.c_str())) {
        throw py::value_error("instruction set '" + name + "' cannot run here; accepted: " +
                              py::cast<std::string>(py::str(isas())));
    }
}

}  // namespace

void bind_cpu(py::module_& m) {
    m.attr("cpu_api") = kApi;
    m.def("cpu_spectral_conv", &spectral_conv);
    m.def("cpu_spectral_conv_weight_grad", &spectral_conv_weight_grad);
    m.def("cpu_spectral_conv_backward", &spectral_conv_backward);
    m.def("cpu_truncated_rfft", &truncated_rfft);
    m.def("cpu_truncated_irfft", &truncated_irfft);
    bind_cpu_steps(m);
    bind_cpu_denoising(m);
    m.def("cpu_isas", &isas, "Instruction sets that can run on this machine, best last.");
    m.def(
        "cpu_isa", [] { return std::string(active_kernels().name); },
        "The instruction set in use.");
    m.def("cpu_set_isa", &set_isa, "Use another instruction set; for tests.");
}
