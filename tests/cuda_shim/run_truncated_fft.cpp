// Runs truncated transforms on the CPU: `run_truncated_fft CASES RESULTS`; as a shared library,
// through `launch`.
//
// CASES holds, for each case, int64 numbers: the length of the kernel's name, the grid, the count
// of the fields of TruncatedFftParams behind its pointers, the offset of the input in its buffer
// and the bytes of input, output and table; then the name, the fields, and the bytes of input and
// table. Buffers have exactly that size, so that AddressSanitizer sees every access outside of
// them.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cuda_shim.h"
#include "truncated_fft.cuh"

namespace {

using Kernel = void (*)(dsno::TruncatedFftParams);

struct Row {
    const char* name;
    Kernel kernel;
};

#define DSNO_KERNEL_ROW(name, function) {#name, name},
const Row kKernels[] = {DSNO_TRUNCATED_FFT_KERNELS(DSNO_KERNEL_ROW)};
#undef DSNO_KERNEL_ROW

void read(void* to, size_t bytes, std::FILE* file) {
    if (bytes && std::fread(to, 1, bytes, file) != bytes) std::exit(3);
}

Kernel find(const std::string& name) {
    for (const Row& row : kKernels) {
        if (name == row.name) return row.kernel;
    }
    std::fprintf(stderr, "unknown kernel %s\n", name.c_str());
    std::exit(4);
}

constexpr size_t kNumbers =
    (sizeof(dsno::TruncatedFftParams) - offsetof(dsno::TruncatedFftParams, n)) / sizeof(int64_t);

}  // namespace

extern "C" int launch(const char* name, int64_t grid, const void* input, void* output,
                      const void* table, const int64_t* numbers, size_t count) {
    if (count != kNumbers) return 5;
    dsno::TruncatedFftParams params{};
    std::memcpy(&params.n, numbers, sizeof(int64_t) * kNumbers);
    params.input = input;
    params.output = output;
    params.table = table;
    run_grid(find(name), static_cast<unsigned>(grid), dsno::kThreads, params);
    return 0;
}

int main(int argc, char** argv) {
    if (argc != 3) {  // without cases: the names of all kernels
        for (const Row& row : kKernels) std::puts(row.name);
        return 0;
    }
    std::FILE* cases = std::fopen(argv[1], "rb");
    std::FILE* results = std::fopen(argv[2], "wb");
    if (!cases || !results) return 2;
    int64_t head[7];
    while (std::fread(head, sizeof(head), 1, cases) == 1) {
        const auto [name_size, grid, count, offset, in_bytes, out_bytes, table_bytes] = head;
        std::string name(name_size, ' ');
        read(name.data(), name_size, cases);
        std::vector<int64_t> numbers(count);
        read(numbers.data(), sizeof(int64_t) * count, cases);
        char* input = static_cast<char*>(std::malloc(offset + in_bytes));
        char* output = static_cast<char*>(std::malloc(out_bytes));
        char* table = static_cast<char*>(std::malloc(table_bytes));
        read(input + offset, in_bytes, cases);
        read(table, table_bytes, cases);
        std::memset(output, 0xff, out_bytes);  // NaN, where nothing is written
        if (launch(name.c_str(), grid, input + offset, output, table, numbers.data(), count)) {
            return 5;
        }
        std::fwrite(output, 1, out_bytes, results);
        std::free(input);
        std::free(output);
        std::free(table);
    }
    std::fclose(cases);
    return std::fclose(results);
}
