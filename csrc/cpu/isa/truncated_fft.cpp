// truncated_rfft and truncated_irfft: one tile of pixels at a time.
#include "../parallel.h"
#include "isa.h"
#include "transforms.h"

namespace DSNO_ISA {
namespace {

struct Transform {
    const TransformArgs& args;
    int64_t tiles, worker_floats;
    float* workers;

    bool prepare() {
        tiles = ceil_div(args.P, kWidth);
        worker_floats = round_up(2 * fold_floats(args.T) + int64_t{2} * args.K * kWidth, 16);
        workers =
            static_cast<float*>(scratch(static_cast<size_t>(4 * worker_floats * args.threads)));
        return workers != nullptr;
    }

    PixelTile tile(int64_t task) const {
        const int64_t p = task % tiles * kWidth;
        return {task / tiles, p, static_cast<int>(min64(kWidth, args.P - p))};
    }

    float* pair(const PixelTile& where, int k) const {
        return args.spectrum + where.b * args.stride_b + k * args.stride_k +
               where.p * args.stride_p;
    }

    static void forward_task(void* context, int64_t task, int worker) {
        const auto& self = *static_cast<const Transform*>(context);
        const TransformArgs& a = self.args;
        const PixelTile where = self.tile(task);
        const int vecs = static_cast<int>(ceil_div(where.count, kLanes));
        float* rows = self.workers + worker * self.worker_floats;
        float* fold = rows + fold_floats(a.T);
        float* planes = fold + fold_floats(a.T);
        const Reader reader{a.x, {nullptr, 1.0f}, a.T, 1, 0};
        if (reader.in_place(where)) {
            const float* x = reinterpret_cast<const float*>(element(a.x, where.b, 0, 0, where.p));
            analyze(*a.analysis, {x, a.x.stride_t}, vecs, planes, kWidth, fold);
        } else {
            reader.read(where, 0, rows);
            analyze(*a.analysis, {rows, kWidth}, vecs, planes, kWidth, fold);
        }
        for (int k = 0; k < a.K; ++k) {
            const bool has_imaginary = k >= 1 && k <= a.analysis->imaginary;
            const float* re = planes + k * kWidth;
            const float* im = planes + (a.K + k - 1) * kWidth;
            float* out = self.pair(where, k);
            for (int j = 0; j < where.count; ++j) {
                out[j * a.stride_p] = re[j];
                out[j * a.stride_p + 1] = has_imaginary ? im[j] : 0.0f;
            }
        }
    }

    static void inverse_task(void* context, int64_t task, int worker) {
        const auto& self = *static_cast<const Transform*>(context);
        const TransformArgs& a = self.args;
        const PixelTile where = self.tile(task);
        const int vecs = static_cast<int>(ceil_div(where.count, kLanes));
        float* rows = self.workers + worker * self.worker_floats;
        float* fold = rows + fold_floats(a.T);
        float* planes = fold + fold_floats(a.T);
        for (int k = 0; k < a.K; ++k) {
            const bool has_imaginary = k >= 1 && k <= a.synthesis->imaginary;
            const float* in = self.pair(where, k);
            float* re = planes + k * kWidth;
            float* im = planes + (a.K + k - 1) * kWidth;
            for (int j = 0; j < kWidth; ++j) re[j] = j < where.count ? in[j * a.stride_p] : 0.0f;
            if (!has_imaginary) continue;
            for (int j = 0; j < kWidth; ++j)
                im[j] = j < where.count ? in[j * a.stride_p + 1] : 0.0f;
        }
        synthesize(*a.synthesis, planes, kWidth, vecs, rows, fold);
        for (int t = 0; t < a.T; ++t) {
            scatter(element(a.x, where.b, t, 0, where.p), a.x.dtype, a.x.stride_p,
                    rows + int64_t{t} * kWidth, where.count);
        }
    }
};

}  // namespace

bool truncated_rfft(const TransformArgs& args) {
    if (rows_path_serves(args)) return truncated_rfft_rows(args);
    Transform transform{args, 0, 0, nullptr};
    if (!transform.prepare()) return false;
    parallel_for(args.threads, args.B * transform.tiles, Transform::forward_task, &transform);
    return true;
}

bool truncated_irfft(const TransformArgs& args) {
    if (rows_path_serves(args)) return truncated_irfft_rows(args);
    Transform transform{args, 0, 0, nullptr};
    if (!transform.prepare()) return false;
    parallel_for(args.threads, args.B * transform.tiles, Transform::inverse_task, &transform);
    return true;
}

}  // namespace DSNO_ISA
