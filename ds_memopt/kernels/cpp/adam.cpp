// Adam with one second moment per block or element; see `BackEnd` in ../back_ends.py for the formulas.
//
// A schedule splits the runs: small ones go together in tasks, large ones are cut into chunks, which threads share. The
// sum of a run is that of its chunks in their order, and so the same for any number of threads.

#include <cmath>

#include "common.h"
#include "packed_step.h"

namespace {

struct Scalars {
    float beta2, eps, decay, step_size, inverse_root, rest1, rest2;  // rest1 = 1 - beta1

    float denominator(float v) const { return std::sqrt(v) * inverse_root + eps; }
};

struct Tensor {
    void *parameter, *gradient, *moment;
    float* values;    // second moments
    uint64_t halves;  // bits 0 to 2: whether parameter, gradient and moment are bf16
};

struct Schedule {
    const Row* rows;
    const Task* tasks;
    int64_t num_tasks;
    const Chunk* large;  // one for each large run
    int64_t num_large;
    const Chunk* chunks;
    int64_t num_chunks;
    double* sums;   // of each chunk
    float* scales;  // of each large run
};

inline void move_moment(Floats& m, Floats x, const Scalars& step) { m = m + step.rest1 * (x - m); }

inline void move_second_moment(Floats& v, Floats x, const Scalars& step) { v = v * step.beta2 + step.rest2 * (x * x); }

// By the new moments. scale: of all elements.
inline void move(Floats& p, Floats m, float scale, const Scalars& step) { p = p * step.decay - scale * m; }

inline void move_by_element(Floats& p, Floats m, Floats v, const Scalars& step) {
    p = p * step.decay - step.step_size * m / (square_root(v) * step.inverse_root + step.eps);
}

template <class P, class G, class M>
void update(void* p_, const void* g_, void* m_, int64_t offset, int64_t entry, int64_t length, float scale,
            const Scalars& step) {
    P* p = (P*)p_ + offset;
    const G* g = (const G*)g_ + offset;
    M* m = (M*)m_ + entry;
    int64_t i = 0;
    for (; i + LANES <= length; i += LANES) {
        prefetch_to_write(p + i);
        prefetch_to_write(m + i);
        prefetch(g + i, length * sizeof(G));  // of the next run, whose squares are summed first
        Floats new_p = load(p + i), new_m = load(m + i);
        move_moment(new_m, load(g + i), step);
        move(new_p, new_m, scale, step);
        store(p + i, new_p);
        store(m + i, new_m);
    }
    if (int64_t rest = length - i) {
        Floats new_p = load_some(p + i, rest), new_m = load_some(m + i, rest);
        move_moment(new_m, load_some(g + i, rest), step);
        move(new_p, new_m, scale, step);
        store_some(p + i, new_p, rest);
        store_some(m + i, new_m, rest);
    }
}

// v: from the first one's on.
template <class P, class G, class M>
void update_by_element(void* p_, const void* g_, void* m_, float* v, int64_t offset, int64_t entry, int64_t length,
                       const Scalars& step) {
    P* p = (P*)p_ + offset;
    const G* g = (const G*)g_ + offset;
    M* m = (M*)m_ + entry;
    int64_t i = 0;
    for (; i + LANES <= length; i += LANES) {
        prefetch_to_write(p + i);
        prefetch(g + i);
        prefetch_to_write(m + i);
        prefetch_to_write(v + i);
        Floats new_p = load(p + i), new_m = load(m + i), new_v = load(v + i);
        Floats x = load(g + i);
        move_moment(new_m, x, step);
        move_second_moment(new_v, x, step);
        move_by_element(new_p, new_m, new_v, step);
        store(p + i, new_p);
        store(m + i, new_m);
        store(v + i, new_v);
    }
    if (int64_t rest = length - i) {
        Floats new_p = load_some(p + i, rest), new_m = load_some(m + i, rest), new_v = load_some(v + i, rest);
        Floats x = load_some(g + i, rest);
        move_moment(new_m, x, step);
        move_second_moment(new_v, x, step);
        move_by_element(new_p, new_m, new_v, step);
        store_some(p + i, new_p, rest);
        store_some(m + i, new_m, rest);
        store_some(v + i, new_v, rest);
    }
}

using Update = void (*)(void*, const void*, void*, int64_t, int64_t, int64_t, float, const Scalars&);
using UpdateByElement = void (*)(void*, const void*, void*, float*, int64_t, int64_t, int64_t, const Scalars&);

// By `halves`.
const Update UPDATES[8] = {
    update<float, float, float>, update<bf16, float, float>, update<float, bf16, float>, update<bf16, bf16, float>,
    update<float, float, bf16>,  update<bf16, float, bf16>,  update<float, bf16, bf16>,  update<bf16, bf16, bf16>,
};
const UpdateByElement UPDATES_BY_ELEMENT[8] = {
    update_by_element<float, float, float>, update_by_element<bf16, float, float>,
    update_by_element<float, bf16, float>,  update_by_element<bf16, bf16, float>,
    update_by_element<float, float, bf16>,  update_by_element<bf16, float, bf16>,
    update_by_element<float, bf16, bf16>,   update_by_element<bf16, bf16, bf16>,
};

double gradient_squares(const Tensor& tensor, int64_t offset, int64_t length) {
    if (tensor.halves & 2) return sum_of_squares((const bf16*)tensor.gradient + offset, length);
    return sum_of_squares((const float*)tensor.gradient + offset, length);
}

inline Floats gradients_at(const Tensor& tensor, int64_t at, int64_t lanes, int64_t ahead) {
    if (tensor.halves & 2) {
        const bf16* g = (const bf16*)tensor.gradient + at;
        prefetch(g, ahead * sizeof(bf16));
        return load_some(g, lanes);
    }
    const float* g = (const float*)tensor.gradient + at;
    prefetch(g, ahead * sizeof(float));
    return load_lanes<Floats>(g, lanes);
}

// Calls act(m, v) with the kinds of a tensor's states as constants, as `GroupState` has them.
template <class Act>
void by_kinds(const Packed& packed, Act act) {
    auto with = [&](auto m) {
        if (!packed.v.entries) return act(m, KindOf<ABSENT>{});
        if (packed.v.kind == UNSIGNED) return act(m, KindOf<UNSIGNED>{});
        act(m, KindOf<FP32>{});
    };
    if (packed.m.kind == SIGNED) return with(KindOf<SIGNED>{});
    with(KindOf<FP32>{});
}

// offset: of the first. ahead: elements to the gradient that is fetched meanwhile.
inline auto states_mover(const Tensor& tensor, int64_t offset, int64_t ahead, const Scalars step) {
    return [&tensor, offset, ahead, step](int64_t i, int64_t lanes, Floats& m, Floats& v) {
        Floats x = gradients_at(tensor, offset + i, lanes, ahead);
        move_moment(m, x, step);
        move_second_moment(v, x, step);
    };
}

// Elements that have second moments of their own.
void step_elements(const Ranges& ranges, const Tensor& tensor, const Scalars step) {
    auto move_weights = [step](int64_t, int64_t count, auto part) {
        part(0, count, [step](Floats& p, Floats m, Floats v) { move_by_element(p, m, v, step); });
    };
    by_kinds(ranges.packed, [&](auto m, auto v) {
        step_packed<m, v>(ranges, states_mover(tensor, ranges.weights.first, SPAN, step), move_weights);
    });
}

// Part of a run.
void step_chunk(const Ranges& ranges, const Tensor& tensor, float scale, const Scalars step) {
    auto move_weights = [step, scale](int64_t, int64_t count, auto part) {
        part(0, count, [step, scale](Floats& p, Floats m, Floats) { move(p, m, scale, step); });
    };
    by_kinds(ranges.packed, [&](auto m, auto) {
        step_packed<m, ABSENT>(ranges, states_mover(tensor, ranges.weights.first, SPAN, step), move_weights);
    });
}

float advance(float& v, float mean_square, const Scalars& step) {
    return v = v * step.beta2 + step.rest2 * mean_square;
}

void sum_chunks(const Schedule& schedule, const Tensor* tensors) {
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < schedule.num_chunks; i++) {
        const Chunk& chunk = schedule.chunks[i];
        const Row& row = schedule.rows[chunk.row];
        const Tensor& tensor = tensors[row.tensor];
        if (tensor.gradient)
            schedule.sums[i] = gradient_squares(tensor, offset_of(row, chunk.run) + chunk.start, chunk.length);
    }
}

// Of large run number i.
float mean_square(const Schedule& schedule, int64_t i) {
    const Chunk& run = schedule.large[i];
    int64_t last = i + 1 < schedule.num_large ? schedule.large[i + 1].sum : schedule.num_chunks;
    double sum = 0;
    for (int64_t chunk = run.sum; chunk < last; chunk++) sum += schedule.sums[chunk];
    return sum / schedule.rows[run.row].size;
}

// Large runs, and what their updates are divided by. mean_squares: null, or of each slot.
void advance_large(const Schedule& schedule, const Tensor* tensors, const Scalars* scalars, const float* mean_squares) {
    if (!mean_squares) sum_chunks(schedule, tensors);
#pragma omp for
    for (int64_t i = 0; i < schedule.num_large; i++) {
        const Chunk& run = schedule.large[i];
        const Row& row = schedule.rows[run.row];
        const Tensor& tensor = tensors[row.tensor];
        const Scalars& step = scalars[row.tensor];
        if (!tensor.gradient) continue;
        float mean = mean_squares ? mean_squares[row.slot] : mean_square(schedule, i);
        float v = advance(tensor.values[block_of(row, run.run)], mean, step);
        schedule.scales[i] = step.step_size / step.denominator(v);
    }
}

// packed: null, or how each tensor is kept.
void update_chunks(const Schedule& schedule, const Tensor* tensors, const Scalars* scalars, const Packed* packed) {
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < schedule.num_chunks; i++) {
        const Chunk& chunk = schedule.chunks[i];
        const Row& row = schedule.rows[chunk.row];
        const Tensor& tensor = tensors[row.tensor];
        if (!tensor.parameter) continue;
        const int64_t offset = offset_of(row, chunk.run) + chunk.start;
        const float scale = schedule.scales[chunk.sum];
        const Scalars& step = scalars[row.tensor];
        const int64_t entry = entry_of(row, chunk.run) + chunk.start;
        if (packed)
            step_chunk(Ranges(packed[row.tensor], offset, entry, chunk.length), tensor, scale, step);
        else
            UPDATES[tensor.halves](tensor.parameter, tensor.gradient, tensor.moment, offset, entry, chunk.length, scale,
                                   step);
    }
}

// Runs of a task, which lie one after the other. advanced: the second moments are those of this step already.
void step_runs(const Packed& packed, const Tensor& tensor, const Row& row, const Task& task, const Scalars& step,
               bool advanced) {
    const int64_t first = offset_of(row, task.first);
    float* v = tensor.values + block_of(row, task.first);
    float scale = 0;
    const int64_t entry = entry_of(row, task.first), length = (task.last - task.first) * row.width;
    if (row.width == 1 && !advanced) {
        Packed of_elements = packed;
        of_elements.v = {v - entry, FP32, nullptr, nullptr, 0};
        return step_elements(Ranges(of_elements, first, entry, length), tensor, step);
    }
    auto move_weights = [&, step](int64_t begin, int64_t count, auto part) {
        for (int64_t start = 0, length; start < count; start += length) {
            const int64_t run = (begin + start) / row.width, within = (begin + start) % row.width;
            if (within == 0) {
                if (!advanced)
                    advance(v[run], gradient_squares(tensor, first + begin + start, row.width) / row.size, step);
                scale = step.step_size / step.denominator(v[run]);
            }
            length = std::min(count - start, row.width - within);
            part(start, length, [step, scale](Floats& p, Floats m, Floats) { move(p, m, scale, step); });
        }
    };
    by_kinds(packed, [&](auto m, auto) {
        step_packed<m, ABSENT>(Ranges(packed, first, entry, length), states_mover(tensor, first, row.width, step),
                               move_weights);
    });
}

// Of new states in the groups that a range shares with others.
void measure(const Packed& packed, const Tensor& tensor, int64_t offset, int64_t entry, int64_t length,
             const Scalars& step) {
    by_kinds(packed, [&](auto m, auto v) {
        const Range states(packed.of_states, entry, length, packed.step);
        measure_shared<m, v>(packed, states, states_mover(tensor, offset, SPAN, step));
    });
}

}  // namespace

extern "C" {

// slots: zeros.
void ds_sum_cut_squares(const Schedule* s, const Tensor* tensors, float* slots, int threads) {
#pragma omp parallel num_threads(threads)
    {
        sum_chunks(*s, tensors);
#pragma omp single
        for (int64_t i = 0; i < s->num_large; i++) {
            const Row& row = s->rows[s->large[i].row];
            if (tensors[row.tensor].gradient) slots[row.slot] = mean_square(*s, i);
        }
    }
}

// new_scales: zeros, raised in groups that runs, or chunks of them, share to the largest magnitude of their new states.
void ds_measure_shared_groups(const Schedule* s, const Tensor* tensors, const Scalars* scalars, const Packed* packed,
                              int threads) {
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic) nowait
        for (int64_t i = 0; i < s->num_tasks; i++) {
            const Task& task = s->tasks[i];
            const Row& row = s->rows[task.row];
            const Tensor& tensor = tensors[row.tensor];
            if (tensor.parameter)
                measure(packed[row.tensor], tensor, offset_of(row, task.first), entry_of(row, task.first),
                        (task.last - task.first) * row.width, scalars[row.tensor]);
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < s->num_chunks; i++) {
            const Chunk& chunk = s->chunks[i];
            const Row& row = s->rows[chunk.row];
            const Tensor& tensor = tensors[row.tensor];
            if (tensor.parameter)
                measure(packed[row.tensor], tensor, offset_of(row, chunk.run) + chunk.start,
                        entry_of(row, chunk.run) + chunk.start, chunk.length, scalars[row.tensor]);
        }
    }
}

// mean_squares: null, or of each slot. packed: null, or how each tensor is kept.
void ds_adam_mini(const Schedule* s, const Tensor* tensors, const Scalars* scalars, const float* mean_squares,
                  const Packed* packed, int threads) {
#pragma omp parallel num_threads(threads)
    {
        advance_large(*s, tensors, scalars, mean_squares);
#pragma omp for schedule(dynamic) nowait
        for (int64_t i = 0; i < s->num_tasks; i++) {
            const Task& task = s->tasks[i];
            const Row& row = s->rows[task.row];
            const Tensor& tensor = tensors[row.tensor];
            const Scalars& step = scalars[row.tensor];
            if (!tensor.parameter) continue;
            if (packed) {
                step_runs(packed[row.tensor], tensor, row, task, step, false);
                continue;
            }
            if (row.width == 1 && row.rows == 1) {
                UPDATES_BY_ELEMENT[tensor.halves](tensor.parameter, tensor.gradient, tensor.moment,
                                                  tensor.values + block_of(row, task.first),
                                                  offset_of(row, task.first), entry_of(row, task.first),
                                                  task.last - task.first, step);
                continue;
            }
            for_runs(row, task.first, task.last, [&](int64_t offset, int64_t entry, int64_t block) {
                float mean = gradient_squares(tensor, offset, row.width) / row.size;
                float v = advance(tensor.values[block], mean, step);
                UPDATES[tensor.halves](tensor.parameter, tensor.gradient, tensor.moment, offset, entry, row.width,
                                       step.step_size / step.denominator(v), step);
            });
        }
        update_chunks(*s, tensors, scalars, packed);
    }
}

void ds_advance_second_moments(const Schedule* s, const Tensor* tensors, const Scalars* scalars,
                               const float* mean_squares, int threads) {
#pragma omp parallel num_threads(threads)
    {
        advance_large(*s, tensors, scalars, mean_squares);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < s->num_tasks; i++) {
            const Task& task = s->tasks[i];
            const Row& row = s->rows[task.row];
            const Tensor& tensor = tensors[row.tensor];
            const Scalars& step = scalars[row.tensor];
            if (!tensor.gradient) continue;
            for_runs(row, task.first, task.last, [&](int64_t offset, int64_t, int64_t block) {
                advance(tensor.values[block], gradient_squares(tensor, offset, row.width) / row.size, step);
            });
        }
    }
}

// Second moments have advanced. packed: null, or how each tensor is kept.
void ds_adam_by_second_moment(const Schedule* s, const Tensor* tensors, const Scalars* scalars, const Packed* packed,
                              int threads) {
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int64_t i = 0; i < s->num_large; i++) {
            const Row& row = s->rows[s->large[i].row];
            const Tensor& tensor = tensors[row.tensor];
            if (tensor.parameter)
                s->scales[i] = scalars[row.tensor].step_size /
                               scalars[row.tensor].denominator(tensor.values[block_of(row, s->large[i].run)]);
        }
#pragma omp for schedule(dynamic) nowait
        for (int64_t i = 0; i < s->num_tasks; i++) {
            const Task& task = s->tasks[i];
            const Row& row = s->rows[task.row];
            const Tensor& tensor = tensors[row.tensor];
            const Scalars& step = scalars[row.tensor];
            if (!tensor.parameter) continue;
            if (packed) {
                step_runs(packed[row.tensor], tensor, row, task, step, true);
                continue;
            }
            for_runs(row, task.first, task.last, [&](int64_t offset, int64_t entry, int64_t block) {
                UPDATES[tensor.halves](tensor.parameter, tensor.gradient, tensor.moment, offset, entry, row.width,
                                       step.step_size / step.denominator(tensor.values[block]), step);
            });
        }
        update_chunks(*s, tensors, scalars, packed);
    }
}

// The chunks are parts of whole lines of `count` runs. packed: null, or how each tensor is kept.
void ds_adam_by_element(const Schedule* s, const Tensor* tensors, const Scalars* scalars, const Packed* packed,
                        int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < s->num_chunks; i++) {
        const Chunk& chunk = s->chunks[i];
        const Row& row = s->rows[chunk.row];
        const Tensor& tensor = tensors[row.tensor];
        if (!tensor.parameter) continue;
        const int64_t offset = offset_of(row, chunk.run) + chunk.start, entry = entry_of(row, chunk.run) + chunk.start;
        const Scalars& step = scalars[row.tensor];
        if (packed)
            step_elements(Ranges(packed[row.tensor], offset, entry, chunk.length), tensor, step);
        else
            UPDATES_BY_ELEMENT[tensor.halves](tensor.parameter, tensor.gradient, tensor.moment, tensor.values + entry,
                                              offset, entry, chunk.length, step);
    }
}

}  // extern "C"
