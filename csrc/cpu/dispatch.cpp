#include "dispatch.h"

#include <atomic>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(__x86_64__)
// Linux lends the 8 KiB of tile registers only to a process that has asked for them.
bool may_use_amx() {
#if defined(__linux__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

// CPUID leaf 7 directly: older compilers do not know these names in __builtin_cpu_supports.
unsigned leaf7_edx() {
    unsigned a = 7, b = 0, c = 0, d = 0;
    __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    return d;
}

bool has_amx_bf16() {
    constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
    const unsigned d = leaf7_edx();
    return (d & kAmxBf16) && (d & kAmxTile);
}
#endif

struct Isas {
    const Kernels* list[kMaxIsas] = {};
    int count = 0;

    void add(const Kernels& kernels) { list[count++] = &kernels; }

    Isas() {
        add(portable::kernels);
#if defined(__x86_64__)
        __builtin_cpu_init();
        if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()))
            return;
        add(avx2::kernels);
        if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))) {
            return;
        }
        add(avx512::kernels);
        if (!__builtin_cpu_supports("avx512bf16")) return;
        add(avx512_bf16::kernels);
        if (has_amx_bf16() && may_use_amx()) add(amx::kernels);
#endif
    }

#if defined(__x86_64__)
    static bool has_f16c() {
        unsigned a = 1, b = 0, c = 0, d = 0;
        __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
        return c >> 29 & 1;
    }
#endif
};

const Isas& isas() {
    static const Isas found;
    return found;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

int available_kernels(const Kernels* (&out)[kMaxIsas]) {
    for (int i = 0; i < isas().count; ++i) out[i] = isas().list[i];
    return isas().count;
}

const Kernels& active_kernels() {
    const Kernels* kernels = chosen.load(std::memory_order_relaxed);
    return kernels ? *kernels : *isas().list[isas().count - 1];
}

bool use_kernels(const char* name) {
    for (int i = 0; i < isas().count; ++i) {
        if (std::strcmp(isas().list[i]->name, name) == 0) {
            chosen.store(isas().list[i], std::memory_order_relaxed);
            return true;
        }
    }
    return false;
}
