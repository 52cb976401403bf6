// Groups of 2, 4, 8, 16 or 32 elements of a wavelet transform; see `GWTCall` in ../back_ends.py for the formulas.
//
// LANES groups are computed at once: K vectors of elements become one vector of their sums, by halves, and what is
// computed per group is spread over the elements again.
//
// Where updates are limited, most matrices stay below the limit in most steps. So parameters move at `advance` as if their
// growth were 1, in one pass, and `apply` takes back the excess of those whose growth is larger, in a second one.
// Parameters that would be rounded twice move at `apply`. States in fewer bits, whose scales are known then, are advanced
// by each pass for itself and kept by the last.

#include <algorithm>
#include <cmath>

#include "common.h"
#include "packed.h"

namespace {

struct Scalars {
    float rest1, rest2, eps, decay, step_size, inverse_root, inverse_correction;  // rest1 = 1 - beta1
};

struct Tensor {
    void *parameter, *gradient;
    float *approximations, *second_moments, *block_second_moments;  // one of the last two is null
    float* update_norms;
    uint64_t halves;  // bits 0 and 1: whether parameter and gradient are bf16
};

struct Call {
    const Row* rows;
    const Task* tasks;
    int64_t num_tasks;
    double* shares;  // of each task in its matrix's sum; at `apply` its matrix's growth
    const Tensor* tensors;
    const Scalars* scalars;
    const float* sums;  // [slots, width]
    int64_t width;
    float* norms;  // or null
    float limiter;
    int64_t advance, apply;
    const Packed* packed;  // null, or how each tensor is kept
};

template <int PARITY, int... I>
inline Floats every_second(Floats a, Floats b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (2 * I + PARITY)...);
}

// The sums of groups of K consecutive elements, in order. Overwrites x.
template <int K>
inline Floats sums_of_groups(Floats* x) {
    if constexpr (K == 1) {
        return x[0];
    } else {
        auto lanes = std::make_integer_sequence<int, LANES>();
        for (int i = 0; i < K / 2; i++)
            x[i] = every_second<0>(x[2 * i], x[2 * i + 1], lanes) + every_second<1>(x[2 * i], x[2 * i + 1], lanes);
        return sums_of_groups<K / 2>(x);
    }
}

// For each element of vector number J of K the value of its group.
template <int K, int J, int... I>
inline Floats spread(Floats per_group, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(per_group, per_group, ((J * LANES + I) / K)...);
}

// What holds for groups that are computed together: of `size` elements each, of which `width` lie on this rank.
struct Mode {
    bool given;  // mean and square
    bool advance, apply, by_block;
    bool limited;  // the norm is wanted
    bool anew;     // states are kept at `apply`
    float width, inverse_size, decay, inverse_growth;
};

// Of LANES groups. denominator: only by_block, else v.
struct Groups {
    Floats mean, square, m, v, denominator;
};

// p and g: K * LANES elements. Returns what each group adds to the norm.
template <int K, class P, class G, int... J>
inline Floats step_groups(P* p, const G* g, Groups& groups, const Mode& mode, const Scalars& step,
                          std::integer_sequence<int, J...>) {
    constexpr auto lanes = std::make_integer_sequence<int, LANES>();
    const Floats x[K] = {load(g + J * LANES)...};
    (prefetch(g + J * LANES), ...);
    if (mode.apply) (prefetch_to_write(p + J * LANES), ...);
    if (!mode.given) {
        Floats elements[K] = {x[J]...};
        groups.mean = sums_of_groups<K>(elements) * (1.0f / K);
        if (mode.advance && (!mode.by_block || mode.limited)) {
            Floats squares[K] = {(x[J] * x[J])...};
            groups.square = sums_of_groups<K>(squares) * mode.inverse_size;
        }
    }
    if (mode.advance) {
        groups.m += step.rest1 * (groups.mean - groups.m);
        if (!mode.by_block) groups.v += step.rest2 * (groups.square - groups.v);
    }
    Floats denominator =
        mode.by_block ? groups.denominator : square_root(groups.v) * step.inverse_root + step.eps;
    Floats shift = groups.m * step.inverse_correction - groups.mean;
    if (mode.apply) {
        Floats factor = step.step_size * mode.inverse_growth / denominator;
        (store(p + J * LANES, load(p + J * LANES) * mode.decay -
                                  spread<K, J>(factor, lanes) * (x[J] + spread<K, J>(shift, lanes))),
         ...);
    }
    if (!(mode.advance && mode.limited)) return Floats{};
    Floats squares = groups.square + shift * shift + shift * groups.mean * (2 * K * mode.inverse_size);
    return squares / (denominator * denominator) * mode.width;
}

// Of the block of second moments that a run lies in.
inline float denominator_of(const Call& call, const Row& row, int64_t run) {
    const Scalars& step = call.scalars[row.tensor];
    float v = call.tensors[row.tensor].block_second_moments[row.outer + run / row.count * row.outer_stride];
    return std::sqrt(v) * step.inverse_root + step.eps;
}

float norm_of(const Call& call, const Row& row) { return std::sqrt(std::max(call.norms[row.matrix], 0.0f)); }

// Runs [first, first + count) of a row, up to LANES, wherever they lie: through a copy. Adds to the norm.
template <int K, class P, class G>
void step_some(const Call& call, const Row& row, int64_t first, int64_t count, const Mode& mode, double& norm) {
    const Tensor& tensor = call.tensors[row.tensor];
    P p[K * LANES] = {};
    G g[K * LANES] = {};
    Groups groups = {};
    for (int64_t i = 0; i < count; i++) {
        int64_t run = first + i, offset = offset_of(row, run), block = block_of(row, run);
        std::memcpy(g + i * K, (const G*)tensor.gradient + offset, row.width * sizeof(G));
        if (mode.apply) std::memcpy(p + i * K, (const P*)tensor.parameter + offset, row.width * sizeof(P));
        groups.m[i] = tensor.approximations[block];
        if (mode.by_block)
            groups.denominator[i] = denominator_of(call, row, run);
        else
            groups.v[i] = tensor.second_moments[block];
    }
    if (mode.given) {
        groups.mean = broadcast(call.sums[row.slot * call.width]);
        groups.square = broadcast(call.sums[row.slot * call.width + call.width - 1]);
    }
    const Scalars& step = call.scalars[row.tensor];
    Floats norms = step_groups<K>(p, g, groups, mode, step, std::make_integer_sequence<int, K>());
    for (int64_t i = 0; i < count; i++) {
        int64_t run = first + i, block = block_of(row, run);
        if (mode.apply)
            std::memcpy((P*)tensor.parameter + offset_of(row, run), p + i * K, row.width * sizeof(P));
        if (mode.advance) {
            tensor.approximations[block] = groups.m[i];
            if (!mode.by_block) tensor.second_moments[block] = groups.v[i];
        }
        norm += norms[i];
    }
}

// Runs [first, last) of a row, one after the other, or one that is no whole group: spread out, a group of entries at a time.
// Adds to the norm of LANES whole groups, and of others.
template <int K, class G>
void step_packed(const Call& call, const Row& row, int64_t first, int64_t last, const Mode& mode, Floats& norm,
                 double& norm_of_others) {
    const Tensor& tensor = call.tensors[row.tensor];
    const Packed& packed = call.packed[row.tensor];
    const Scalars& step = call.scalars[row.tensor];
    const int64_t offset = offset_of(row, first), entry = block_of(row, first);
    const Range weights(packed.of_weights, offset, (last - first) * row.width, packed.step);
    const Range states(packed.of_states, entry, last - first, packed.step);
    alignas(64) float p[GROUP * K], m[GROUP], v[GROUP];
    G padded[K * LANES];
    RoundingBits bits;
    Groups groups = {};
    if (mode.by_block) groups.denominator = broadcast(denominator_of(call, row, first));
    if (mode.given) {
        groups.mean = broadcast(call.sums[row.slot * call.width]);
        groups.square = broadcast(call.sums[row.slot * call.width + call.width - 1]);
    }
    for (int64_t done = 0, count; first + done < last; done += count) {
        const int64_t place = states.place_in_row(entry + done), at = offset + done * K;
        count = std::min(last - first - done, GROUP - place % GROUP);
        const bool shared = mode.anew && !states.has_all(place / GROUP);
        if (!mode.apply && !call.norms && !shared) continue;  // scales are all that is wanted
        unpack(packed.m, states, entry + done, count, m);
        if (!mode.by_block) unpack(packed.v, states, entry + done, count, v);
        if (mode.apply) unpack_weights(packed, at, count * row.width, p);
        for (int64_t i = 0; i < count; i += LANES) {
            const int64_t some = std::min<int64_t>(LANES, count - i);
            const bool whole = some * row.width == K * LANES;
            const G* g = (const G*)tensor.gradient + at + i * K;
            if (!whole) {
                std::memset(padded, 0, sizeof padded);
                std::memcpy(padded, g, some * row.width * sizeof(G));
            }
            groups.m = load(m + i);
            if (!mode.by_block) groups.v = load(v + i);
            Floats norms = step_groups<K>(p + i * K, whole ? g : padded, groups, mode, step,
                                          std::make_integer_sequence<int, K>());
            store(m + i, groups.m);
            if (!mode.by_block) store(v + i, groups.v);
            if (whole) norm += norms;
            for (int64_t lane = 0; !whole && lane < some; lane++) norm_of_others += norms[lane];
        }
        if (mode.apply)
            for (int64_t i = 0, length = count * row.width; i < length; i += SPAN)
                pack_weights(packed, weights, at + i, std::min(SPAN, length - i), p + i, bits);
        if (mode.advance && (mode.apply || !mode.anew)) {
            pack(packed.m, states, entry + done, count, m, bits);
            if (!mode.by_block) pack(packed.v, states, entry + done, count, v, bits);
        } else if (shared && packed.m.new_scales) {
            const int64_t scale = states.scale_of(place / GROUP);
            raise(packed.m.new_scales[scale], largest(m, count));
            if (!mode.by_block) raise(packed.v.new_scales[scale], largest(v, count));
        }
    }
}

// Returns what the task adds to its matrix's sum of squares, or at `apply` alone the matrix's growth.
template <int K, class P, class G>
double step_task(const Call& call, const Task& task) {
    const Row& row = call.rows[task.row];
    const Tensor& tensor = call.tensors[row.tensor];
    const Scalars& step = call.scalars[row.tensor];
    const Packed* packed = call.packed ? call.packed + row.tensor : nullptr;
    const bool limited = call.norms, anew = packed && packed->m.kind != FP32;
    Mode mode = {row.slot >= 0, call.advance || anew, call.apply != 0, tensor.block_second_moments != nullptr,
                 limited && call.advance, anew, float(row.width), 1.0f / row.size, step.decay, 1.0f};
    const bool at_once = limited && !anew && (packed ? packed->exact() : sizeof(P) == sizeof(float));
    if (at_once && call.advance) mode.apply = true;
    float growth = 1;
    if (limited && !call.advance) {
        growth = norm_of(call, row) / std::max(tensor.update_norms[row.interval], 1.0f);
        growth = std::max(growth, call.limiter) / call.limiter;
        mode.inverse_growth = 1 / growth;
        if (at_once) {
            if (mode.inverse_growth == 1) return growth;
            mode.decay = 1;
            mode.inverse_growth -= 1;
        }
    }
    double norm_of_others = 0;
    Floats norm = {};
    for (int64_t run = task.first; run < task.last;) {
        const bool whole = row.width == K && row.slot < 0;
        const int64_t stop = whole ? std::min(task.last, (run / row.count + 1) * row.count) : task.last;
        if (packed) {
            if constexpr (std::is_same_v<P, float>)
                step_packed<K, G>(call, row, run, whole ? stop : run + 1, mode, norm, norm_of_others);
            run = whole ? stop : run + 1;
        } else if (whole && run + LANES <= stop) {
            P* p = (P*)tensor.parameter + offset_of(row, run);
            const G* g = (const G*)tensor.gradient + offset_of(row, run);
            float* m = tensor.approximations + block_of(row, run);
            float* v = mode.by_block ? nullptr : tensor.second_moments + block_of(row, run);
            Groups groups = {};
            if (mode.by_block)
                groups.denominator = broadcast(denominator_of(call, row, run));
            for (; run + LANES <= stop; run += LANES, p += K * LANES, g += K * LANES, m += LANES) {
                groups.m = load(m);
                if (v) groups.v = load(v);
                norm += step_groups<K>(p, g, groups, mode, step, std::make_integer_sequence<int, K>());
                if (mode.advance) store(m, groups.m);
                if (mode.advance && v) store(v, groups.v);
                if (v) v += LANES;
            }
        } else {
            int64_t count = std::min<int64_t>(LANES, stop - run);
            step_some<K, P, G>(call, row, run, count, mode, norm_of_others);
            run += count;
        }
    }
    return call.advance ? norm_of_others + sum_of_lanes(norm) : growth;
}

template <int K>
double step_task(const Call& call, const Task& task) {
    // What is packed is spread out in fp32.
    switch (call.tensors[call.rows[task.row].tensor].halves & (call.packed ? 2 : 3)) {
        case 0: return step_task<K, float, float>(call, task);
        case 1: return step_task<K, bf16, float>(call, task);
        case 2: return step_task<K, float, bf16>(call, task);
        default: return step_task<K, bf16, bf16>(call, task);
    }
}

template <int K>
void step_all(const Call& call, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < call.num_tasks; i++) {
        const Task& task = call.tasks[i];
        bool moves = call.tensors[call.rows[task.row].tensor].parameter;
        call.shares[i] = moves ? step_task<K>(call, task) : 0;
    }
}

}  // namespace

extern "C" {

void ds_gwt(const Call* call, int64_t period, int threads) {
    switch (period) {
        case 2: step_all<2>(*call, threads); break;
        case 4: step_all<4>(*call, threads); break;
        case 8: step_all<8>(*call, threads); break;
        case 16: step_all<16>(*call, threads); break;
        case 32: step_all<32>(*call, threads); break;
    }
    if (!call->norms) return;
    if (!call->advance) {
        for (int64_t i = 0; i < call->num_tasks; i++) {
            const Row& row = call->rows[call->tasks[i].row];
            const Tensor& tensor = call->tensors[row.tensor];
            if (tensor.parameter) tensor.update_norms[row.interval] = norm_of(*call, row) / float(call->shares[i]);
        }
        return;
    }
    double share = 0;
    for (int64_t i = 0; i < call->num_tasks; i++) {
        share += call->shares[i];
        const Row& row = call->rows[call->tasks[i].row];
        if (i + 1 == call->num_tasks || call->rows[call->tasks[i + 1].row].matrix != row.matrix) {
            call->norms[row.matrix] += share / row.numel;
            share = 0;
        }
    }
}

// rows: of one run each, on this rank. slots: zeros.
void ds_sum_cut_groups(const Row* rows, int64_t num_rows, const Tensor* tensors, int64_t period, float* slots,
                       int64_t width) {
    for (int64_t i = 0; i < num_rows; i++) {
        const Row& row = rows[i];
        const Tensor& tensor = tensors[row.tensor];
        if (!tensor.gradient) continue;
        double sum = 0, squares = 0;
        for (int64_t j = 0; j < row.width; j++) {
            float x = tensor.halves & 2 ? load_some((const bf16*)tensor.gradient + row.offset + j, 1)[0]
                                        : ((const float*)tensor.gradient)[row.offset + j];
            sum += x;
            squares += double(x) * x;
        }
        slots[row.slot * width] = sum / period;
        if (width > 1) slots[row.slot * width + 1] = squares / row.size;
    }
}

}  // extern "C"
