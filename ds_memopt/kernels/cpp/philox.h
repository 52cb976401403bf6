// Random bits of noise and of rounding: Philox 4x32-10, see ../noise_formulas.py.
#pragma once

#include <cstdint>

constexpr int COUNTERS = 16;  // at a time: loops over them become vectors

struct RandomWords {
    uint32_t of[4][COUNTERS];
};

// As rows of the caller's table. per_counter: elements that a counter gives.
struct Noise {
    int64_t per_counter, key_low, key_high, step, probe;
};

// Of the counters [first, first + COUNTERS).
inline void random_words(const Noise& noise, uint64_t first, RandomWords& words) {
    const uint32_t low = static_cast<uint32_t>(first), high = static_cast<uint32_t>(first >> 32);
#pragma omp simd
    for (uint32_t lane = 0; lane < COUNTERS; ++lane) {
        uint32_t c0 = low + lane, c1 = high + (c0 < low);
        uint32_t c2 = static_cast<uint32_t>(noise.step), c3 = static_cast<uint32_t>(noise.probe);
        uint32_t k0 = static_cast<uint32_t>(noise.key_low), k1 = static_cast<uint32_t>(noise.key_high);
        for (int round = 0; round < 10; ++round) {
            const uint64_t product0 = uint64_t{0xD2511F53} * c0, product1 = uint64_t{0xCD9E8D57} * c2;
            c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
            c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
            c1 = static_cast<uint32_t>(product1);
            c3 = static_cast<uint32_t>(product0);
            k0 += 0x9E3779B9;
            k1 += 0xBB67AE85;
        }
        words.of[0][lane] = c0;
        words.of[1][lane] = c1;
        words.of[2][lane] = c2;
        words.of[3][lane] = c3;
    }
}
