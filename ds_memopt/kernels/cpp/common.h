// What all kernels share: the rows of `ds_memopt.kernels.work.Runs`, numbers of 16 and 32 bits, vectors, and sums.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

// As `FIELDS` has them.
struct Row {
    int64_t tensor, offset, rows, row_stride, count, width, block, block_stride, entry, size, interval, slot, outer,
        outer_stride, matrix, numel;
};

// Elements [start, start + length) of run `run`, from 0 to rows * count, of a row. sum: where its part of a sum stands.
struct Chunk {
    int64_t row, run, start, length, sum;
};

// Runs [first, last) of a row.
struct Task {
    int64_t row, first, last;
};

struct bf16 {
    uint16_t bits;
};

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

// Halves of 32 bits, and bf16 as fp32: each in one instruction, where the compiler needs up to five.
#if defined(__AVX512BW__)
typedef uint16_t Order __attribute__((vector_size(64)));
constexpr Order LOW = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}, HIGH = LOW + 1;
constexpr Order TO_HIGH = {16, 0,  16, 1,  16, 2,  16, 3,  16, 4,  16, 5,  16, 6,  16, 7,
                           16, 8,  16, 9,  16, 10, 16, 11, 16, 12, 16, 13, 16, 14, 16, 15};  // number 16 is zero

inline Halves in_order(Order order, Words values) {
    return (Halves)_mm512_castsi512_si256(_mm512_permutexvar_epi16((__m512i)order, (__m512i)values));
}
inline Halves low_halves(Words values) { return in_order(LOW, values); }
inline Halves high_halves(Words values) { return in_order(HIGH, values); }
inline Words to_high_halves(Halves values) {
    return (Words)_mm512_permutexvar_epi16((__m512i)TO_HIGH, _mm512_zextsi256_si512((__m256i)values));
}
#else
inline Halves low_halves(Words values) { return __builtin_convertvector(values, Halves); }
inline Halves high_halves(Words values) { return __builtin_convertvector(values >> 16, Halves); }
inline Words to_high_halves(Halves values) { return __builtin_convertvector(values, Words) << 16; }
#endif

inline Floats load(const float* from) {
    Floats values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

inline void store(float* to, Floats values) { std::memcpy(to, &values, sizeof values); }

inline Floats load(const bf16* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return (Floats)to_high_halves(halves);
}

// Rounds to nearest, ties to even; NaN stays NaN.
inline void store(bf16* to, Floats values) {
    Words words = (Words)values;
    Words rounded = words + 0x7fff + ((words >> 16) & 1);
    Halves halves = high_halves(values == values ? rounded : Words{} + 0x7fc00000);
    std::memcpy(to, &halves, sizeof halves);
}

// Of fewer than LANES numbers, the others 0.
template <class T>
inline Floats load_some(const T* from, int64_t count) {
    T padded[LANES] = {};
    std::memcpy(padded, from, count * sizeof(T));
    return load(padded);
}

template <class T>
inline void store_some(T* to, Floats values, int64_t count) {
    T padded[LANES];
    store(padded, values);
    std::memcpy(to, padded, count * sizeof(T));
}

// The line that a loop gets to 1 kB further on. The processor's own guesses keep fewer lines under way: 5 to 20 % of the
// time, measured on a Xeon with AVX-512.
inline void prefetch(const void* at, int64_t bytes = 1024) { __builtin_prefetch((void*)((uintptr_t)at + bytes)); }

inline void prefetch_to_write(const void* at) { __builtin_prefetch((void*)((uintptr_t)at + 1024), 1); }

inline Floats broadcast(float value) { return Floats{} + value; }

inline Floats square_root(Floats values) {
#if defined(__AVX512F__)
    return (Floats)_mm512_sqrt_ps((__m512)values);  // the loop below becomes two halves and a trip through memory
#endif
    for (int lane = 0; lane < LANES; lane++) values[lane] = __builtin_sqrtf(values[lane]);
    return values;
}

// Of COUNT numbers. Overwrites them.
template <int COUNT>
inline double sum_by_halves(double* parts) {
    if constexpr (COUNT == 1) {
        return parts[0];
    } else {
        for (int i = 0; i < COUNT / 2; i++) parts[i] += parts[i + COUNT / 2];
        return sum_by_halves<COUNT / 2>(parts);
    }
}

inline double sum_of_lanes(Floats values) {
    double parts[LANES];
    for (int lane = 0; lane < LANES; lane++) parts[lane] = values[lane];
    return sum_by_halves<LANES>(parts);
}

// In an order that depends on the length only, whatever the LANES: of up to 8192 elements, which lose little in 32 bits,
// element i goes to partial sum i % 64.
template <class T>
double sum_of_squares(const T* values, int64_t length) {
    constexpr int VECTORS = 64 / LANES;
    double sum = 0;
    for (int64_t i = 0; i < length;) {
        int64_t stop = std::min<int64_t>(length, i + 8192);
        Floats sums[VECTORS] = {};
        for (; i + 64 <= stop; i += 64)
            for (int vector = 0; vector < VECTORS; vector++) {
                Floats x = load(values + i + vector * LANES);
                sums[vector] += x * x;
            }
        for (int vector = 0; i < stop; i += LANES, vector++) {
            Floats x = load_some(values + i, std::min<int64_t>(stop - i, LANES));
            sums[vector] += x * x;
        }
        double parts[64];
        for (int vector = 0; vector < VECTORS; vector++)
            for (int lane = 0; lane < LANES; lane++) parts[vector * LANES + lane] = sums[vector][lane];
        sum += sum_by_halves<64>(parts);
    }
    return sum;
}

inline int64_t offset_of(const Row& row, int64_t run) {
    return row.offset + run / row.count * row.row_stride + run % row.count * row.width;
}

// For runs [first, last): do_run(offset, entry, block), without a division for each.
template <class Do>
inline void for_runs(const Row& row, int64_t first, int64_t last, Do do_run) {
    int64_t line = first / row.count, place = first % row.count;
    for (int64_t run = first; run < last; run++) {
        int64_t within = line * row.row_stride + place * row.width;
        do_run(row.offset + within, row.entry + within, row.block + line * row.block_stride + place);
        if (++place == row.count) line++, place = 0;
    }
}

inline int64_t entry_of(const Row& row, int64_t run) { return offset_of(row, run) - row.offset + row.entry; }

inline int64_t block_of(const Row& row, int64_t run) {
    return row.block + run / row.count * row.block_stride + run % row.count;
}
