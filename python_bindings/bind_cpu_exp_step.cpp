// CPU kernels of the integrator steps. Tensors are pairs (address, dtype), flat in one tuple;
// address 0 stands for none. Rows of coefficients are (address, dtype, stride_row, stride_column,
// index address, stride_index), or one row of numbers.
#ifdef DSNO_KERNELS_CPU
#include "../csrc/cpu/dispatch.h"
#include "arguments.h"
#include "bindings.h"

namespace py = pybind11;

namespace {

void fill(Dense* out, const py::tuple& tensors) {
    for (size_t i = 0; i < tensors.size() / 2; ++i) out[i] = dense(tensors, i);
}

// `numbers` keeps a row that comes as numbers.
Coefficients rows(const py::tuple& where, const py::tuple& row, double* numbers) {
    if (where.size() == 0) {
        for (size_t j = 0; j < row.size(); ++j) numbers[j] = py::cast<double>(row[j]);
        return {reinterpret_cast<const char*>(numbers), kFloat64, 0, 1, nullptr, 0};
    }
    return {pointer<const char>(integer(where, 0)),
            static_cast<int>(integer(where, 1)),
            integer(where, 2),
            integer(where, 3),
            pointer<const int64_t>(integer(where, 4)),
            integer(where, 5)};
}

void exp_step(int64_t samples, int64_t size, const py::tuple& terms, const py::tuple& out,
              const py::tuple& where, const py::tuple& row, int threads) {
    ExpStepArgs args{};
    double numbers[kMaxTerms];
    args.samples = samples;
    args.size = size;
    args.terms = static_cast<int>(terms.size() / 2);
    fill(args.term, terms);
    args.out = dense(out, 0);
    args.rows = rows(where, row, numbers);
    args.threads = threads;
    const py::gil_scoped_release release;
    check_memory(active_kernels().exp_step(args));
}

void exp_step_backward(int64_t samples, int64_t size, const py::tuple& g, const py::tuple& terms,
                       const py::tuple& grads, const py::tuple& where, const py::tuple& row,
                       int64_t dots, int threads) {
    ExpStepBackwardArgs args{};
    double numbers[kMaxTerms];
    args.samples = samples;
    args.size = size;
    args.terms = static_cast<int>(grads.size() / 2);
    args.g = dense(g, 0);
    fill(args.term, terms);
    fill(args.grad, grads);
    args.rows = rows(where, row, numbers);
    args.dots = pointer<double>(dots);
    args.threads = threads;
    const py::gil_scoped_release release;
    check_memory(active_kernels().exp_step_backward(args));
}

// inputs: point, output, unconditional, base, noise.  outputs: base, point, entry, model input.
void solver_step(int64_t samples, int64_t size, int order, const py::tuple& inputs,
                 const py::tuple& history, const py::tuple& outputs, const py::tuple& where,
                 const py::tuple& row, const py::tuple& guidance_where, double guidance,
                 int64_t scale, double low, double high, int64_t seed, bool looks_ahead,
                 int threads) {
    SolverStepArgs args{};
    double numbers[2 * kMaxOrder + 6];
    args.samples = samples;
    args.size = size;
    args.order = order;
    args.point = dense(inputs, 0);
    args.output = dense(inputs, 1);
    args.unconditional = dense(inputs, 2);
    args.base = dense(inputs, 3);
    args.noise = dense(inputs, 4);
    fill(args.history, history);
    args.new_base = dense(outputs, 0);
    args.new_point = dense(outputs, 1);
    args.entry = dense(outputs, 2);
    args.model_input = dense(outputs, 3);
    args.rows = rows(where, row, numbers);
    args.guidance = rows(guidance_where, py::tuple(), &guidance);
    args.scale = pointer<const float>(scale);
    args.low = static_cast<float>(low);
    args.high = static_cast<float>(high);
    args.seed = pointer<const uint64_t>(seed);
    args.looks_ahead = looks_ahead;
    args.threads = threads;
    const py::gil_scoped_release release;
    check_memory(active_kernels().solver_step(args));
}

void abs_rank(int64_t samples, int64_t size, int64_t rank, const py::tuple& x, int64_t indices,
              int threads) {
    const AbsRankArgs args{samples, size, rank, dense(x, 0), pointer<int64_t>(indices), threads};
    const py::gil_scoped_release release;
    check_memory(active_kernels().abs_rank(args));
}

}  // namespace

void bind_cpu_steps(py::module_& m) {
    m.def("cpu_exp_step", &exp_step);
    m.def("cpu_exp_step_backward", &exp_step_backward);
    m.def("cpu_solver_step", &solver_step);
    m.def("cpu_abs_rank", &abs_rank);
}
#endif
