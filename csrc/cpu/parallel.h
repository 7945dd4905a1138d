// Threads and scratch memory. Work runs on the OpenMP threads that PyTorch has already started: no
// second pool competes with them, and no OpenMP library is linked.
#pragma once

#include <cstddef>
#include <cstdint>

using Task = void (*)(void* context, int64_t task, int worker);

// Runs task(context, t, worker) for t in [0, tasks) on at most `threads` threads; each `worker` <
// `threads` is one thread. A thread calls `leave(context, worker)` (may be null) when it has no
// more to do.
void parallel_for(int threads, int64_t tasks, Task task, void* context, Task leave = nullptr);

// 64-byte aligned memory of the calling thread, kept between calls; null where there is none.
// Invalidates the last one.
void* scratch(size_t bytes);
