#include "parallel.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdlib>

namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// PyTorch loads its OpenMP before this module is imported; both libgomp and libiomp5 export this
// entry point.
GompParallel find_openmp() {
    static const auto found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
}

struct Region {
    Task task, leave;
    void* context;
    int64_t tasks;
    std::atomic<int64_t> next_task{0};
    std::atomic<int> next_worker{0};
};

void run_region(void* data) {
    auto& region = *static_cast<Region*>(data);
    const int worker = region.next_worker.fetch_add(1, std::memory_order_relaxed);
    bool worked = false;
    for (;;) {
        const int64_t task = region.next_task.fetch_add(1, std::memory_order_relaxed);
        if (task >= region.tasks) break;
        region.task(region.context, task, worker);
        worked = true;
    }
    if (worked && region.leave) region.leave(region.context, 0, worker);
}

constexpr size_t kAlignment = 64;
constexpr size_t kKeptBytes = size_t{256} << 20;

struct Arena {
    void* data = nullptr;
    size_t bytes = 0;
    ~Arena() { std::free(data); }
};

}  // namespace

void parallel_for(int threads, int64_t tasks, Task task, void* context, Task leave) {
    Region region;
    region.task = task;
    region.leave = leave;
    region.context = context;
    region.tasks = tasks;
    const int64_t wanted = threads < tasks ? threads : tasks;
    const GompParallel gomp_parallel = wanted > 1 ? find_openmp() : nullptr;
    if (gomp_parallel) {
        gomp_parallel(run_region, &region, static_cast<unsigned>(wanted), 0);
    } else {
        run_region(&region);
    }
}

void* scratch(size_t bytes) {
    static thread_local Arena arena;
    if (bytes > arena.bytes || (arena.bytes > kKeptBytes && bytes <= kKeptBytes)) {
        std::free(arena.data);
        const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
        arena.data = std::aligned_alloc(kAlignment, rounded);
        arena.bytes = arena.data ? rounded : 0;
    }
    return arena.data;
}
