// Runs kernels of the integrator steps on the CPU: `run_exp_step CASE RESULT`; as a shared library,
// through `launch`.
//
// CASE holds int64 numbers: the length of the kernel's name, the grid, the bytes of the parameters,
// and the counts of buffers and of pointers; then the name, the parameters, the bytes of each
// buffer (a count, then they), and for each pointer its place in the parameters, its buffer and its
// offset there. Buffers have exactly that size, so that AddressSanitizer sees every access outside
// of them. RESULT takes the buffers in order.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cuda_shim.h"

inline void sincospi(double x, double* sine, double* cosine) {
    *sine = std::sin(M_PI * x);
    *cosine = std::cos(M_PI * x);
}
inline void sincospif(float x, float* sine, float* cosine) {
    *sine = static_cast<float>(std::sin(M_PI * x));
    *cosine = static_cast<float>(std::cos(M_PI * x));
}

#include "abs_rank.cuh"
#include "denoising.cuh"
#include "exp_step.cuh"
#include "solver_step.cuh"

namespace {

template <typename Params, void (*kernel)(Params)>
void run(int64_t grid, const char* bytes) {
    Params params;
    std::memcpy(&params, bytes, sizeof(Params));
    run_grid(kernel, static_cast<unsigned>(grid), dsno::kThreads, params);
}

struct Row {
    const char* name;
    size_t bytes;
    void (*run)(int64_t grid, const char* params);
};

#define DSNO_KERNEL_ROW(name, Params, function) \
    {#name, sizeof(dsno::Params), run<dsno::Params, name>},
const Row kKernels[] = {
    DSNO_EXP_STEP_KERNELS(DSNO_KERNEL_ROW) DSNO_SOLVER_STEP_KERNELS(DSNO_KERNEL_ROW)
        DSNO_ABS_RANK_KERNELS(DSNO_KERNEL_ROW) DSNO_DENOISING_KERNELS(DSNO_KERNEL_ROW)};
#undef DSNO_KERNEL_ROW

void read(void* to, size_t bytes, std::FILE* file) {
    if (bytes && std::fread(to, 1, bytes, file) != bytes) std::exit(3);
}

int64_t read_number(std::FILE* file) {
    int64_t number = 0;
    read(&number, sizeof(number), file);
    return number;
}

}  // namespace

extern "C" int launch(const char* name, int64_t grid, const char* params, int64_t bytes) {
    for (const Row& row : kKernels) {
        if (std::strcmp(name, row.name)) continue;
        if (static_cast<size_t>(bytes) != row.bytes) return 5;
        row.run(grid, params);
        return 0;
    }
    return 4;
}

int main(int argc, char** argv) {
    if (argc != 3) return 2;
    std::FILE* file = std::fopen(argv[1], "rb");
    if (!file) return 2;
    int64_t head[5];
    read(head, sizeof(head), file);
    const auto [name_size, grid, bytes, buffers, pointers] = head;
    std::string name(name_size, ' '), params(bytes, ' ');
    read(name.data(), name_size, file);
    read(params.data(), bytes, file);
    std::vector<char*> data;
    std::vector<int64_t> sizes;
    for (int64_t i = 0; i < buffers; ++i) {
        sizes.push_back(read_number(file));
        data.push_back(static_cast<char*>(std::malloc(sizes.back())));
        read(data.back(), sizes.back(), file);
    }
    for (int64_t i = 0; i < pointers; ++i) {
        const int64_t place = read_number(file), buffer = read_number(file);
        char* pointer = data[buffer] + read_number(file);
        std::memcpy(params.data() + place, &pointer, sizeof(pointer));
    }
    std::fclose(file);
    if (const int error = launch(name.c_str(), grid, params.data(), bytes)) return error;
    std::FILE* result = std::fopen(argv[2], "wb");
    if (!result) return 2;
    for (int64_t i = 0; i < buffers; ++i) {
        std::fwrite(data[i], 1, sizes[i], result);
        std::free(data[i]);
    }
    return std::fclose(result);
}
