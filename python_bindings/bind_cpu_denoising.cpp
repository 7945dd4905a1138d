// CPU kernels around a network that learns to denoise. A coefficient is a number, or (address,
// dtype, stride) of one for each sample.
#ifdef DSNO_KERNELS_CPU
#include "../csrc/cpu/dispatch.h"
#include "arguments.h"
#include "bindings.h"

namespace py = pybind11;

namespace {

constexpr size_t kMaxCoefficients = 4;

// `number` keeps one that comes as it is.
PerSample per_sample(const py::handle& given, double* number) {
    if (!py::isinstance<py::tuple>(given)) {
        *number = py::cast<double>(given);
        return {reinterpret_cast<const char*>(number), kFloat64, 0};
    }
    const auto where = py::reinterpret_borrow<py::tuple>(given);
    return {pointer<const char>(integer(where, 0)), static_cast<int>(integer(where, 1)),
            integer(where, 2)};
}

// tensors: images, noise, out.  coefficients: level, scale.
void noised(int64_t samples, int64_t size, const py::tuple& tensors, int64_t seeds,
            const py::tuple& coefficients, int threads) {
    double numbers[kMaxCoefficients];
    NoisedArgs args{};
    args.samples = samples;
    args.size = size;
    args.images = dense(tensors, 0);
    args.noise = dense(tensors, 1);
    args.out = dense(tensors, 2);
    args.seeds = pointer<const int64_t>(seeds);
    args.level = per_sample(coefficients[0], &numbers[0]);
    args.scale = per_sample(coefficients[1], &numbers[1]);
    args.threads = threads;
    const py::gil_scoped_release release;
    check_memory(active_kernels().noised(args));
}

// tensors: output, images, noise, grad.  coefficients: level, c_skip, c_out, weight.
void denoising_loss(int64_t samples, int64_t size, const py::tuple& tensors, int64_t seeds,
                    const py::tuple& coefficients, double ceiling, bool mean, int64_t loss,
                    int threads) {
    double numbers[kMaxCoefficients];
    DenoisingLossArgs args{};
    args.samples = samples;
    args.size = size;
    args.output = dense(tensors, 0);
    args.images = dense(tensors, 1);
    args.noise = dense(tensors, 2);
    args.grad = dense(tensors, 3);
    args.seeds = pointer<const int64_t>(seeds);
    args.level = per_sample(coefficients[0], &numbers[0]);
    args.c_skip = per_sample(coefficients[1], &numbers[1]);
    args.c_out = per_sample(coefficients[2], &numbers[2]);
    args.weight = per_sample(coefficients[3], &numbers[3]);
    args.ceiling = ceiling;
    args.mean = mean;
    args.loss = pointer<float>(loss);
    args.threads = threads;
    const py::gil_scoped_release release;
    check_memory(active_kernels().denoising_loss(args));
}

}  // namespace

void bind_cpu_denoising(py::module_& m) {
    m.def("cpu_noised", &noised);
    m.def("cpu_denoising_loss", &denoising_loss);
}
#endif
