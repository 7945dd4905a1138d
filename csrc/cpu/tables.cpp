#include "tables.h"

#include <cmath>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

namespace {

bool is_self_conjugate(int k, int n) { return k == 0 || 2 * int64_t{k} == n; }

double alpha(int k, int n) { return is_self_conjugate(k, n) ? 1.0 : 2.0; }

int imaginary_parts(int n, int K) { return K - 1 - (K > 1 && is_self_conjugate(K - 1, n) ? 1 : 0); }

int padded(int lanes) { return (lanes + kTableLanes - 1) / kTableLanes * kTableLanes; }

// cos and sin of 2 pi j / n for all j, exact at the multiples of a quarter turn.
class Circle {
  public:
    explicit Circle(int n) : n_(n), cosine_(n), sine_(n) {
        constexpr double kTwoPi = 6.283185307179586476925286766559;
        for (int j = 0; j < n; ++j) {
            const int64_t eighths = 8 * int64_t{j};
            cosine_[j] = std::cos(kTwoPi * j / n);
            sine_[j] = std::sin(kTwoPi * j / n);
            if (eighths % (2 * int64_t{n}) == 0) {
                const int quarter = static_cast<int>(eighths / (2 * int64_t{n}));
                cosine_[j] = quarter == 0 ? 1.0 : quarter == 2 ? -1.0 : 0.0;
                sine_[j] = quarter == 1 ? 1.0 : quarter == 3 ? -1.0 : 0.0;
            }
        }
    }
    double cosine(int k, int t) const { return cosine_[int64_t{k} * t % n_]; }
    double sine(int k, int t) const { return sine_[int64_t{k} * t % n_]; }

  private:
    int n_;
    std::vector<double> cosine_, sine_;
};

bool has_quarter(int T) { return T % 4 == 0 && T >= kQuarterMin; }

// Tables together with the memory that they point to.
template <class Tables>
struct Owned : Tables {
    Owned() : Tables{} {}
    std::vector<float> cosines, sines, quarters[4];
};

// `cosine(k, t)` and `sine(k, t)` give the entries; `by_time` chooses [t][lane] over [lane][t].
template <class Cosine, class Sine>
QuarterTables quarter_tables(std::vector<float> (&storage)[4], int T, int K, bool by_time,
                             Cosine cosine, Sine sine) {
    QuarterTables tables{};
    tables.length = T / 4 + 1;
    tables.padded_length = padded(tables.length);
    for (int parity = 0; parity < 2; ++parity) {
        const int depth = (K + 1 - parity) / 2;
        const int lanes = padded(depth);
        tables.depth[parity] = depth;
        tables.lanes[parity] = lanes;
        const size_t size =
            by_time ? size_t(tables.length) * lanes : size_t(depth) * tables.padded_length;
        std::vector<float>& cosines = storage[parity];
        std::vector<float>& sines = storage[2 + parity];
        cosines.assign(size, 0.0f);
        sines.assign(size, 0.0f);
        for (int j = 0; j < depth; ++j) {
            for (int t = 0; t < tables.length; ++t) {
                const size_t at =
                    by_time ? size_t(t) * lanes + j : size_t(j) * tables.padded_length + t;
                cosines[at] = static_cast<float>(cosine(2 * j + parity, t));
                sines[at] = static_cast<float>(sine(2 * j + parity, t));
            }
        }
        tables.cosine[parity] = cosines.data();
        tables.sine[parity] = sines.data();
    }
    return tables;
}

std::shared_ptr<const Analysis> make_analysis(int T, int K) {
    auto tables = std::make_shared<Owned<Analysis>>();
    const Circle circle(T);
    tables->T = T;
    tables->K = K;
    tables->even = T / 2 + 1;
    tables->odd = (T - 1) / 2;
    tables->imaginary = imaginary_parts(T, K);
    const auto minus_sine = [&](int k, int t) {
        return is_self_conjugate(k, T) ? 0.0 : -circle.sine(k, t);
    };
    for (int k = 0; k < K; ++k) {
        for (int t = 0; t < tables->even; ++t) {
            tables->cosines.push_back(static_cast<float>(circle.cosine(k, t)));
        }
    }
    for (int k = 1; k <= tables->imaginary; ++k) {
        for (int t = 1; t <= tables->odd; ++t) {
            tables->sines.push_back(static_cast<float>(minus_sine(k, t)));
        }
    }
    if (has_quarter(T)) {
        const auto cosine = [&](int k, int t) { return circle.cosine(k, t); };
        tables->quarter = quarter_tables(tables->quarters, T, K, true, cosine, minus_sine);
    }
    tables->cosine = tables->cosines.data();
    tables->sine = tables->sines.data();
    return tables;
}

std::shared_ptr<const Synthesis> make_synthesis(int n, int K, int scale_length) {
    auto tables = std::make_shared<Owned<Synthesis>>();
    const Circle circle(n);
    tables->n = n;
    tables->K = K;
    tables->even = n / 2 + 1;
    tables->odd = (n - 1) / 2;
    tables->imaginary = imaginary_parts(n, K);
    const auto scale = [&](int k) { return alpha(k, scale_length) / scale_length; };
    const auto cosine = [&](int k, int t) { return scale(k) * circle.cosine(k, t); };
    const auto minus_sine = [&](int k, int t) {
        return is_self_conjugate(k, n) ? 0.0 : -scale(k) * circle.sine(k, t);
    };
    for (int t = 0; t < tables->even; ++t) {
        for (int k = 0; k < K; ++k) tables->cosines.push_back(static_cast<float>(cosine(k, t)));
    }
    for (int t = 1; t <= tables->odd; ++t) {
        for (int k = 1; k <= tables->imaginary; ++k) {
            tables->sines.push_back(static_cast<float>(minus_sine(k, t)));
        }
    }
    if (has_quarter(n))
        tables->quarter = quarter_tables(tables->quarters, n, K, false, cosine, minus_sine);
    tables->cosine = tables->cosines.data();
    tables->sine = tables->sines.data();
    return tables;
}

// A model uses a handful of shapes; a program that keeps changing them starts over now and then.
constexpr size_t kCacheEntries = 64;

template <class Key, class Value, class Make>
std::shared_ptr<const Value> cached(std::map<Key, std::shared_ptr<const Value>>& cache,
                                    const Key& key, Make make) {
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = cache.find(key);
    if (found != cache.end()) return found->second;
    if (cache.size() >= kCacheEntries) cache.clear();
    auto value = make();
    cache.emplace(key, value);
    return value;
}

}  // namespace

std::shared_ptr<const Analysis> analysis_tables(int T, int K) {
    static std::map<std::tuple<int, int>, std::shared_ptr<const Analysis>> cache;
    return cached(cache, std::make_tuple(T, K), [&] { return make_analysis(T, K); });
}

std::shared_ptr<const Synthesis> synthesis_tables(int n, int K, int scale_length) {
    static std::map<std::tuple<int, int, int>, std::shared_ptr<const Synthesis>> cache;
    return cached(cache, std::make_tuple(n, K, scale_length),
                  [&] { return make_synthesis(n, K, scale_length); });
}
