// Where the |x| of two neighboring ranks stand in each sample: radix selection, no sort.
//
// The bits of |x| order like its values, NaN above infinity. Three passes count digits of 11, 10
// and 10 bits, each among the values that share the digits before; a last pass finds the places.
#include "../parallel.h"
#include "isa.h"
#include "steps.h"

namespace DSNO_ISA {
namespace {

constexpr uint32_t kInfinity = 0x7f800000u;

struct AbsRank {
    const AbsRankArgs& args;

    static void task(void* context, int64_t sample, int) {
        const AbsRankArgs& a = static_cast<const AbsRank*>(context)->args;
        int64_t* places = a.indices + 2 * sample;
        int64_t rank = a.rank;  // among the values that share the digits found so far
        uint32_t key = 0, largest = 0;
        constexpr int kShift[] = {20, 10, 0}, kBits[] = {11, 10, 10};
        int64_t equal = 0;  // how many values have all the digits
        for (int digit = 0; digit < 3; ++digit) {
            const int shift = kShift[digit], above = shift + kBits[digit];
            const uint32_t mask = (1u << kBits[digit]) - 1;
            int64_t counts[2048] = {};
            each(a, sample, [&](int64_t, uint32_t bits) {
                if (digit == 0 && bits > largest) largest = bits;
                if (uint64_t{bits ^ key} >> above == 0) ++counts[bits >> shift & mask];
            });
            uint32_t value = 0;
            while (rank >= counts[value]) rank -= counts[value++];
            key |= value << shift;
            equal = counts[value];
        }
        const bool has_nan = largest > kInfinity;
        if (has_nan) key = largest;
        find(a, sample, key, has_nan ? 0 : rank, !has_nan && equal > rank + 1, places);
        if (has_nan || a.rank + 1 >= a.size) places[1] = places[0];
    }

    // The place of occurrence `skip` of `key`; then that of the next one (`again`) or of the next
    // larger key.
    static void find(const AbsRankArgs& a, int64_t sample, uint32_t key, int64_t skip, bool again,
                     int64_t* places) {
        int64_t seen = 0;
        uint32_t larger = 0xffffffffu;
        places[0] = places[1] = 0;
        each(a, sample, [&](int64_t i, uint32_t bits) {
            if (bits == key) {
                if (seen == skip) places[0] = i;
                if (again && seen == skip + 1) places[1] = i;
                ++seen;
            } else if (!again && bits > key && bits < larger) {
                larger = bits;
                places[1] = i;
            }
        });
    }

    template <class Visit>
    static void each(const AbsRankArgs& a, int64_t sample, const Visit& visit) {
        alignas(64) float buffer[kStepBlock];
        for (int64_t start = 0; start < a.size; start += kStepBlock) {
            const int64_t count = min64(kStepBlock, a.size - start);
            const float* x = read_block(a.x, sample * a.size + start, count, buffer);
            for (int64_t i = 0; i < count; ++i) visit(start + i, to_bits(x[i]) & 0x7fffffffu);
        }
    }
};

}  // namespace

bool abs_rank(const AbsRankArgs& args) {
    AbsRank rank{args};
    parallel_for(args.threads, args.samples, AbsRank::task, &rank);
    return true;
}

}  // namespace DSNO_ISA
