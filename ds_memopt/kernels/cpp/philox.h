// Random bits of noise, Philox 4x32-10, and of rounding, Philox 4x32-7: see ../noise_formulas.py.
#pragma once

#include <cstdint>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

constexpr int COUNTERS = 16;  // at a time: loops over them become vectors
constexpr int ROUNDS = 10, ROUNDS_OF_ROUNDING = 7;

// As rows of the caller's table. per_counter: elements that a counter gives.
struct Noise {
    int64_t per_counter, key_low, key_high, step, probe;
};

struct RandomWords {
    uint32_t of[4][COUNTERS];
};

#if defined(__AVX512F__)
// Words of 8 counters, each the low half of 64 bits. What the high halves hold changes nothing.
template <int ROUNDS>
struct WideWords {
    __m512i of[4];

    WideWords(const Noise& noise, uint64_t first) {
        __m512i c0 = _mm512_add_epi64(_mm512_set1_epi64(first), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
        __m512i c1 = _mm512_srli_epi64(c0, 32), c2 = _mm512_set1_epi64(noise.step), c3 = _mm512_set1_epi64(noise.probe);
        const __m512i factor0 = _mm512_set1_epi64(0xD2511F53), factor1 = _mm512_set1_epi64(0xCD9E8D57);
        uint32_t k0 = static_cast<uint32_t>(noise.key_low), k1 = static_cast<uint32_t>(noise.key_high);
        for (int round = 0; round < ROUNDS; ++round) {
            const __m512i product0 = _mm512_mul_epu32(c0, factor0), product1 = _mm512_mul_epu32(c2, factor1);
            c0 = either_or(_mm512_srli_epi64(product1, 32), c1, _mm512_set1_epi64(k0));
            c2 = either_or(_mm512_srli_epi64(product0, 32), c3, _mm512_set1_epi64(k1));
            c1 = product1;
            c3 = product0;
            k0 += 0x9E3779B9;
            k1 += 0xBB67AE85;
        }
        of[0] = c0, of[1] = c1, of[2] = c2, of[3] = c3;
    }

    static __m512i either_or(__m512i a, __m512i b, __m512i c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }

    // The words of two as one of 64 bits.
    __m512i pair(int low, int high) const {
        return _mm512_mask_blend_epi32(0xAAAA, of[low], _mm512_slli_epi64(of[high], 32));
    }
};
#endif

// Of the counters [first, first + COUNTERS).
template <int ROUNDS = ::ROUNDS>
inline void random_words(const Noise& noise, uint64_t first, RandomWords& words) {
#if defined(__AVX512F__)
    const WideWords<ROUNDS> low(noise, first), high(noise, first + COUNTERS / 2);
    for (int word = 0; word < 4; ++word) {
        _mm256_storeu_si256((__m256i*)words.of[word], _mm512_cvtepi64_epi32(low.of[word]));
        _mm256_storeu_si256((__m256i*)words.of[word] + 1, _mm512_cvtepi64_epi32(high.of[word]));
    }
#else
    const uint32_t low = static_cast<uint32_t>(first), high = static_cast<uint32_t>(first >> 32);
#pragma omp simd
    for (uint32_t lane = 0; lane < COUNTERS; ++lane) {
        uint32_t c0 = low + lane, c1 = high + (c0 < low);
        uint32_t c2 = static_cast<uint32_t>(noise.step), c3 = static_cast<uint32_t>(noise.probe);
        uint32_t k0 = static_cast<uint32_t>(noise.key_low), k1 = static_cast<uint32_t>(noise.key_high);
        for (int round = 0; round < ROUNDS; ++round) {
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
#endif
}

// The same, counter by counter.
template <int ROUNDS>
inline void random_words_in_turn(const Noise& noise, uint64_t first, uint32_t* words) {
#if defined(__AVX512F__)
    const WideWords<ROUNDS> parts[] = {{noise, first}, {noise, first + COUNTERS / 2}};
    const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    for (const auto& part : parts) {
        const __m512i front = part.pair(0, 1), back = part.pair(2, 3);
        _mm512_storeu_si512(words, _mm512_permutex2var_epi64(front, low, back));
        _mm512_storeu_si512(words + 16, _mm512_permutex2var_epi64(front, high, back));
        words += 32;
    }
#else
    RandomWords by_word;
    random_words<ROUNDS>(noise, first, by_word);
    for (int lane = 0; lane < COUNTERS; ++lane)
        for (int word = 0; word < 4; ++word) words[4 * lane + word] = by_word.of[word][lane];
#endif
}
