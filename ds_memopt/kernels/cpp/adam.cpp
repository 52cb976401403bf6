// Adam with one second moment per block or element; see `BackEnd` in ../back_ends.py for the formulas.
//
// A schedule splits the runs: small ones go together in tasks, large ones are cut into chunks, which threads share. The
// sum of a run is that of its chunks in their order, and so the same for any number of threads.

#include <cmath>

#include "common.h"

namespace {

struct Scalars {
    float beta2, eps, decay, step_size, inverse_root, rest1, rest2;  // rest1 = 1 - beta1

    float denominator(float v) const { return std::sqrt(v) * inverse_root + eps; }
};

struct Tensor {
    void *parameter, *gradient, *moment;
    float* values;    // second moments, denominators or mean squares
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

// p <- p * decay - scale * m, after m has moved.
template <class P, class G, class M>
void update(void* p_, const void* g_, void* m_, int64_t offset, int64_t entry, int64_t length, float scale,
            const Scalars& step) {
    P* p = (P*)p_ + offset;
    const G* g = (const G*)g_ + offset;
    M* m = (M*)m_ + entry;
    auto lanes = [&](Floats old_p, Floats x, Floats old_m, Floats& new_p, Floats& new_m) {
        new_m = old_m + step.rest1 * (x - old_m);
        new_p = old_p * step.decay - scale * new_m;
    };
    int64_t i = 0;
    Floats new_p, new_m;
    for (; i + LANES <= length; i += LANES) {
        prefetch_to_write(p + i);
        prefetch_to_write(m + i);
        prefetch(g + i, length * sizeof(G));  // of the next run, whose squares are summed first
        lanes(load(p + i), load(g + i), load(m + i), new_p, new_m);
        store(p + i, new_p);
        store(m + i, new_m);
    }
    if (int64_t rest = length - i) {
        lanes(load_some(p + i, rest), load_some(g + i, rest), load_some(m + i, rest), new_p, new_m);
        store_some(p + i, new_p, rest);
        store_some(m + i, new_m, rest);
    }
}

// The same with a second moment of each element, from the first one's on.
template <class P, class G, class M>
void update_by_element(void* p_, const void* g_, void* m_, float* v, int64_t offset, int64_t entry, int64_t length,
                       const Scalars& step) {
    P* p = (P*)p_ + offset;
    const G* g = (const G*)g_ + offset;
    M* m = (M*)m_ + entry;
    auto lanes = [&](Floats old_p, Floats x, Floats old_m, Floats old_v, Floats& new_p, Floats& new_m, Floats& new_v) {
        new_m = old_m + step.rest1 * (x - old_m);
        new_v = old_v * step.beta2 + step.rest2 * (x * x);
        Floats denominator = square_root(new_v) * step.inverse_root + step.eps;
        new_p = old_p * step.decay - step.step_size * new_m / denominator;
    };
    int64_t i = 0;
    Floats new_p, new_m, new_v;
    for (; i + LANES <= length; i += LANES) {
        prefetch_to_write(p + i);
        prefetch(g + i);
        prefetch_to_write(m + i);
        prefetch_to_write(v + i);
        lanes(load(p + i), load(g + i), load(m + i), load(v + i), new_p, new_m, new_v);
        store(p + i, new_p);
        store(m + i, new_m);
        store(v + i, new_v);
    }
    if (int64_t rest = length - i) {
        lanes(load_some(p + i, rest), load_some(g + i, rest), load_some(m + i, rest), load_some(v + i, rest), new_p,
              new_m, new_v);
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

void update_chunks(const Schedule& schedule, const Tensor* tensors, const Scalars* scalars) {
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < schedule.num_chunks; i++) {
        const Chunk& chunk = schedule.chunks[i];
        const Row& row = schedule.rows[chunk.row];
        const Tensor& tensor = tensors[row.tensor];
        if (tensor.parameter)
            UPDATES[tensor.halves](tensor.parameter, tensor.gradient, tensor.moment,
                                   offset_of(row, chunk.run) + chunk.start, entry_of(row, chunk.run) + chunk.start,
                                   chunk.length, schedule.scales[chunk.sum], scalars[row.tensor]);
    }
}

}  // namespace

extern "C" {

void ds_add_mean_squares(const Schedule* s, const Tensor* tensors, float* slots, int64_t width, int threads) {
#pragma omp parallel num_threads(threads)
    {
        sum_chunks(*s, tensors);
#pragma omp single
        for (int64_t i = 0; i < s->num_large; i++) {
            const Row& row = s->rows[s->large[i].row];
            if (tensors[row.tensor].gradient) slots[row.slot * width + width - 1] += mean_square(*s, i);
        }
    }
}

void ds_add_mean_squares_of_blocks(const Schedule* s, const Tensor* tensors, int threads) {
#pragma omp parallel num_threads(threads)
    {
        sum_chunks(*s, tensors);
#pragma omp single nowait
        for (int64_t i = 0; i < s->num_large; i++) {
            const Chunk& run = s->large[i];
            const Row& row = s->rows[run.row];
            const Tensor& tensor = tensors[row.tensor];
            if (tensor.gradient) tensor.values[block_of(row, run.run)] += mean_square(*s, i);
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < s->num_tasks; i++) {
            const Task& task = s->tasks[i];
            const Row& row = s->rows[task.row];
            const Tensor& tensor = tensors[row.tensor];
            if (!tensor.gradient) continue;
            for_runs(row, task.first, task.last, [&](int64_t offset, int64_t, int64_t block) {
                tensor.values[block] += float(gradient_squares(tensor, offset, row.width) / row.size);
            });
        }
    }
}

// mean_squares: null, or of each slot.
void ds_adam_mini(const Schedule* s, const Tensor* tensors, const Scalars* scalars, const float* mean_squares,
                  int threads) {
#pragma omp parallel num_threads(threads)
    {
        if (!mean_squares) sum_chunks(*s, tensors);
#pragma omp for
        for (int64_t i = 0; i < s->num_large; i++) {
            const Chunk& run = s->large[i];
            const Row& row = s->rows[run.row];
            const Tensor& tensor = tensors[row.tensor];
            const Scalars& step = scalars[row.tensor];
            if (!tensor.parameter) continue;
            float mean = mean_squares ? mean_squares[row.slot] : mean_square(*s, i);
            float v = advance(tensor.values[block_of(row, run.run)], mean, step);
            s->scales[i] = step.step_size / step.denominator(v);
        }
#pragma omp for schedule(dynamic) nowait
        for (int64_t i = 0; i < s->num_tasks; i++) {
            const Task& task = s->tasks[i];
            const Row& row = s->rows[task.row];
            const Tensor& tensor = tensors[row.tensor];
            const Scalars& step = scalars[row.tensor];
            if (!tensor.parameter) continue;
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
        update_chunks(*s, tensors, scalars);
    }
}

void ds_adam_by_denominator(const Schedule* s, const Tensor* tensors, const Scalars* scalars, int threads) {
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int64_t i = 0; i < s->num_large; i++) {
            const Row& row = s->rows[s->large[i].row];
            const Tensor& tensor = tensors[row.tensor];
            if (tensor.parameter)
                s->scales[i] = scalars[row.tensor].step_size / tensor.values[block_of(row, s->large[i].run)];
        }
#pragma omp for schedule(dynamic) nowait
        for (int64_t i = 0; i < s->num_tasks; i++) {
            const Task& task = s->tasks[i];
            const Row& row = s->rows[task.row];
            const Tensor& tensor = tensors[row.tensor];
            const Scalars& step = scalars[row.tensor];
            if (!tensor.parameter) continue;
            for_runs(row, task.first, task.last, [&](int64_t offset, int64_t entry, int64_t block) {
                UPDATES[tensor.halves](tensor.parameter, tensor.gradient, tensor.moment, offset, entry, row.width,
                                       step.step_size / tensor.values[block], step);
            });
        }
        update_chunks(*s, tensors, scalars);
    }
}

// The chunks are parts of whole lines of `count` runs.
void ds_adam_by_element(const Schedule* s, const Tensor* tensors, const Scalars* scalars, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < s->num_chunks; i++) {
        const Chunk& chunk = s->chunks[i];
        const Row& row = s->rows[chunk.row];
        const Tensor& tensor = tensors[row.tensor];
        if (!tensor.parameter) continue;
        int64_t entry = entry_of(row, chunk.run) + chunk.start;
        UPDATES_BY_ELEMENT[tensor.halves](tensor.parameter, tensor.gradient, tensor.moment, tensor.values + entry,
                                          offset_of(row, chunk.run) + chunk.start, entry, chunk.length,
                                          scalars[row.tensor]);
    }
}

// values: mean squares of a tensor's `lengths` blocks; moment: their second moments.
void ds_advance_denominators(const Tensor* tensors, const int64_t* lengths, int64_t num_tensors, const Scalars* scalars,
                             int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t number = 0; number < num_tensors; number++) {
        const Scalars& step = scalars[number];
        float *values = tensors[number].values, *v = (float*)tensors[number].moment;
        for (int64_t i = 0; i < lengths[number]; i++) values[i] = step.denominator(advance(v[i], values[i], step));
    }
}

}  // extern "C"
