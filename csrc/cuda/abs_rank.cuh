// Where the |x| of two neighboring ranks stand in each sample: radix selection, no sort.
//
// The bits of |x| order like its values, NaN above infinity, in every floating-point format: a word
// shifted left by one, without its sign, is a key. Keys with the places of their elements behind
// them differ from each other, so that a rank is one element. Digits of eight bits of key, then
// place, are found from the highest down: each pass counts them among the elements that have the
// digits found so far, and takes the one in which the rank falls. Counts are integers, so that the
// result does not depend on the order of atomics.
#pragma once

#include "steps.cuh"

namespace dsno {

constexpr int kDigits = 256;          // values of a digit
constexpr int kCounts = kDigits + 1;  // and how many elements are NaN

// The digits of an element found so far, in their places, and its rank among those that share them.
struct Target {
    u64 key, place;
    i64 rank;
};

struct AbsRankParams {
    static constexpr int kBlocks = 8;
    i64 samples, size, parts, rank;
    i64 passes;    // digits of a key, then those of a place
    i64 pass;      // abs_rank_pass: the digit to count; `passes`: only the places are written
    u64 infinity;  // its key
    const char* x;
    u64* counts;      // abs_rank_pass: [passes][samples][2][kCounts], zeros before
    Target* targets;  // abs_rank_pass: [passes][samples][2]
    i64* places;      // [samples][2]
};

template <typename Word>
struct Digit {
    static constexpr int kOfKey = sizeof(Word);
    bool of_key;
    int shift;

    __device__ Digit(i64 pass, i64 passes) : of_key(pass < kOfKey) {
        shift = 8 * static_cast<int>((of_key ? kOfKey : passes) - 1 - pass);
    }
    // Whether an element has the digits of the target above this one.
    __device__ bool follows(const Target& target, u64 key, u64 place) const {
        if (!of_key && key != target.key) return false;
        const u64 differing = of_key ? key ^ target.key : place ^ target.place;
        return differing >> shift < kDigits;
    }
    __device__ int of(u64 key, u64 place) const {
        return static_cast<int>((of_key ? key : place) >> shift) & (kDigits - 1);
    }
};

template <typename Word>
struct CountDigits {
    const AbsRankParams& p;
    i64 pass, begin;  // begin: of the sample
    Target first, second;
    bool apart;  // their digits differ already: each has its own counts
    unsigned (*counts)[kCounts];

    template <int N>
    __device__ void run(i64 i) const {
        const Digit<Word> digit(pass, p.passes);
        const Vector<Word, N> words = reinterpret_cast<const Vector<Word, N>*>(p.x)[i / N];
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const u64 key = static_cast<Word>(words.v[j] << 1), place = i + j - begin;
            if (pass == 0 && key > p.infinity) atomicAdd(&counts[0][kDigits], 1u);
            const int value = digit.of(key, place);
            if (digit.follows(first, key, place)) atomicAdd(&counts[0][value], 1u);
            if (apart && digit.follows(second, key, place)) atomicAdd(&counts[1][value], 1u);
        }
    }
};

__device__ inline bool differ(const Target* targets) {
    return targets[0].key != targets[1].key || targets[0].place != targets[1].place;
}

// The digits of `pass` in which the ranks of the targets fall, by all threads of a block. Where
// there is a NaN, both targets become the last rank, which is one.
template <typename Word, typename Count>
__device__ inline void choose(const AbsRankParams& p, i64 pass, const Count (*counts)[kCounts],
                              Target* targets) {
    static_assert(kDigits == 2 * kThreads, "a thread has two digits");
    __shared__ i64 sums[2][kThreads];
    const Digit<Word> digit(pass, p.passes);
    const bool apart = differ(targets), has_nan = pass == 0 && counts[0][kDigits] > 0;
    const int t = static_cast<int>(threadIdx.x);
    i64 low[2], rank[2];
#pragma unroll
    for (int b = 0; b < 2; ++b) {
        const Count* count = counts[b && apart];
        rank[b] = has_nan ? p.size - 1 : targets[b].rank;
        low[b] = count[2 * t];
        sums[b][t] = low[b] + static_cast<i64>(count[2 * t + 1]);
    }
    __syncthreads();
#pragma unroll
    for (int b = 0; b < 2; ++b) {
        i64 start = 0;
        for (int i = 0; i < t; ++i) start += sums[b][i];
        if (rank[b] < start || rank[b] >= start + sums[b][t]) continue;
        // In one thread.
        const bool upper = rank[b] >= start + low[b];
        u64& found = digit.of_key ? targets[b].key : targets[b].place;
        found |= static_cast<u64>(2 * t + upper) << digit.shift;
        targets[b].rank = rank[b] - start - (upper ? low[b] : 0);
    }
    __syncthreads();
}

// Before the first digit; by the first two threads.
__device__ inline void begin_targets(const AbsRankParams& p, Target* targets) {
    const i64 rank = p.rank + threadIdx.x;
    if (threadIdx.x < 2) targets[threadIdx.x] = {0, 0, rank < p.size ? rank : p.size - 1};
}

// The counts of one part of a sample, from zero, by all threads of a block.
template <typename Word>
__device__ inline void count_digits(const AbsRankParams& p, i64 pass, i64 sample, i64 part,
                                    i64 parts, const Target* targets, unsigned (*counts)[kCounts]) {
    for (int i = threadIdx.x; i < 2 * kCounts; i += kThreads) counts[i / kCounts][i % kCounts] = 0;
    __syncthreads();
    const CountDigits<Word> count{
        p, pass, sample * p.size, targets[0], targets[1], differ(targets), counts};
    for_elements<16 / sizeof(Word)>(sample, p.size, part, parts, count);
    __syncthreads();
}

// All passes over a sample by one block.
template <typename Word>
__device__ inline void abs_rank(const AbsRankParams& p) {
    __shared__ unsigned counts[2][kCounts];
    __shared__ Target targets[2];
    for (i64 sample = blockIdx.x; sample < p.samples; sample += gridDim.x) {
        __syncthreads();  // the targets of the sample before are read no longer
        begin_targets(p, targets);
        __syncthreads();
        for (i64 pass = 0; pass < p.passes; ++pass) {
            count_digits<Word>(p, pass, sample, 0, 1, targets, counts);
            choose<Word>(p, pass, counts, targets);
        }
        if (threadIdx.x < 2) {
            p.places[2 * sample + threadIdx.x] = static_cast<i64>(targets[threadIdx.x].place);
        }
    }
}

// One pass, where several blocks share a sample: each takes the digit that the pass before has
// counted, and counts the next one in its part.
template <typename Word>
__device__ inline void abs_rank_pass(const AbsRankParams& p) {
    __shared__ unsigned counts[2][kCounts];
    __shared__ Target targets[2];
    for (i64 item = blockIdx.x; item < p.samples * p.parts; item += gridDim.x) {
        const i64 sample = divide(item, p.parts), part = item - sample * p.parts;
        const int t = static_cast<int>(threadIdx.x);
        const i64 before = (p.pass - 1) * p.samples + sample, here = before + p.samples;
        __syncthreads();  // the targets of the item before are read no longer
        if (p.pass <= 1) {
            begin_targets(p, targets);
        } else if (t < 2) {
            targets[t] = p.targets[2 * (before - p.samples) + t];
        }
        __syncthreads();
        if (p.pass > 0) {
            const auto counted = reinterpret_cast<const u64(*)[kCounts]>(p.counts) + 2 * before;
            choose<Word>(p, p.pass - 1, counted, targets);
            if (part == 0 && t < 2) p.targets[2 * before + t] = targets[t];
        }
        if (p.pass == p.passes) {
            if (part == 0 && t < 2) p.places[2 * sample + t] = static_cast<i64>(targets[t].place);
            continue;
        }
        count_digits<Word>(p, p.pass, sample, part, p.parts, targets, counts);
        u64* const total = p.counts + 2 * here * kCounts;
        for (int i = t; i < 2 * kCounts; i += kThreads) {
            const unsigned found = counts[i / kCounts][i % kCounts];
            if (found) atomicAdd(&total[i], static_cast<u64>(found));
        }
    }
}

}  // namespace dsno

// Every kernel: X(name, parameters, device function), by the bytes of an element.
// clang-format off
#define DSNO_ABS_RANK_KERNELS(X)                                                     \
    X(abs_rank_w2, AbsRankParams, dsno::abs_rank<unsigned short>)                    \
    X(abs_rank_w4, AbsRankParams, dsno::abs_rank<unsigned>)                          \
    X(abs_rank_w8, AbsRankParams, dsno::abs_rank<unsigned long long>)                \
    X(abs_rank_pass_w2, AbsRankParams, dsno::abs_rank_pass<unsigned short>)          \
    X(abs_rank_pass_w4, AbsRankParams, dsno::abs_rank_pass<unsigned>)                \
    X(abs_rank_pass_w8, AbsRankParams, dsno::abs_rank_pass<unsigned long long>)
// clang-format on

DSNO_ABS_RANK_KERNELS(DSNO_DEFINE_STEP_KERNEL)
