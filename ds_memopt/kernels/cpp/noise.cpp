// The noise of ../noise.py, and the steps of weights along it, to the bit: only operations that IEEE 754 or integers
// define, in the order of the plain formulas. Compile without contraction of a * b + c to one rounding.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "philox.h"

namespace {

constexpr int64_t CHUNK = 2048;         // elements whose noise fits the first cache
constexpr int64_t PIECE = 16 * CHUNK;   // elements that a thread takes at a time
constexpr int64_t GAUSSIAN = 4, RADEMACHER = 128;  // elements of a counter

template <typename To, typename From>
inline To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    std::memcpy(&result, &value, sizeof result);
    return result;
}

// Each constant of the plain formulas is a double that is rounded to fp32 once.
inline float log_of(float u) {
    const int32_t bits = bits_as<int32_t>(u);
    const int32_t exponent = (bits - 0x3F3504F3) >> 23;
    const float x = bits_as<float>(bits - exponent * (1 << 23)) - 1.0f;
    float series = static_cast<float>(7.0376836292e-2) * x - static_cast<float>(1.1514610310e-1);
    series = series * x + static_cast<float>(1.1676998740e-1);
    series = series * x + static_cast<float>(-1.2420140846e-1);
    series = series * x + static_cast<float>(1.4249322787e-1);
    series = series * x + static_cast<float>(-1.6668057665e-1);
    series = series * x + static_cast<float>(2.0000714765e-1);
    series = series * x + static_cast<float>(-2.4999993993e-1);
    series = series * x + static_cast<float>(3.3333331174e-1);
    const float xx = x * x;
    return xx * x * series - 0.5f * xx + x + static_cast<float>(exponent) * static_cast<float>(M_LN2);
}

inline void box_muller(uint32_t v, uint32_t w, float& first, float& second) {
    // v + 1 rounded to fp32: both halves are exact in it, their sum is rounded once.
    const float halves = static_cast<float>(static_cast<int32_t>(v >> 16)) * 65536.0f;
    const float next = halves + static_cast<float>(static_cast<int32_t>((v & 0xFFFF) + 1));
    const float root = std::sqrt(-2.0f * log_of(next * 0x1p-32f));
    const float r = bits_as<float>(bits_as<uint32_t>(root) ^ (w & 0x80000000u));
    const int32_t angle = static_cast<int32_t>(w & 0x3FFFFFFFu) - (1 << 29);
    const float a = static_cast<float>(angle) * static_cast<float>(M_PI * 0x1p-31);
    const float aa = a * a;
    const float sine = ((static_cast<float>(-1.9515295891e-4) * aa + static_cast<float>(8.3321608736e-3)) * aa -
                        static_cast<float>(1.6666654611e-1)) * aa * a + a;
    const float cosine = ((static_cast<float>(2.443315711809948e-5) * aa - static_cast<float>(1.388731625493765e-3)) *
                              aa + static_cast<float>(4.166664568298827e-2)) * aa * aa - 0.5f * aa + 1.0f;
    const bool sine_first = w & 0x40000000u;
    first = r * (sine_first ? sine : cosine);
    second = r * (sine_first ? cosine : sine);
}

using Buffer = float[CHUNK + COUNTERS * RADEMACHER];

// Elements [start, start + count) of the noise, at most CHUNK, in `buffer`; returns where in it they begin.
inline const float* fill(const Noise& noise, int64_t start, int64_t count, Buffer& buffer) {
    RandomWords words;
    const int64_t skip = start % noise.per_counter, per_turn = noise.per_counter * COUNTERS;
    uint64_t counter = static_cast<uint64_t>(start / noise.per_counter);
    for (int64_t done = 0; done < skip + count; done += per_turn, counter += COUNTERS) {
        random_words(noise, counter, words);
        float* z = buffer + done;
        if (noise.per_counter == GAUSSIAN) {
#pragma omp simd
            for (int lane = 0; lane < COUNTERS; ++lane) {
                box_muller(words.of[0][lane], words.of[1][lane], z[4 * lane], z[4 * lane + 1]);
                box_muller(words.of[2][lane], words.of[3][lane], z[4 * lane + 2], z[4 * lane + 3]);
            }
        } else {
            for (int lane = 0; lane < COUNTERS; ++lane)
                for (int word = 0; word < 4; ++word)
                    for (uint32_t bit = 0; bit < 32; ++bit) {
                        const uint32_t sign = (words.of[word][lane] >> bit) << 31;
                        z[(lane * 4 + word) * 32 + bit] = bits_as<float>(0x3F800000u | sign);
                    }
        }
    }
    return buffer + skip;
}

inline float load(float value) { return value; }
inline float load(uint16_t bf16) { return bits_as<float>(uint32_t{bf16} << 16); }

inline void store(float value, float& target) { target = value; }
inline void store(float value, uint16_t& bf16) {  // rounded to the nearest, to even of two
    const uint32_t bits = bits_as<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    bf16 = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0 : rounded);
}

// Calls take(number, count) for chunks [number, number + count) of elements [0, count); the noise of the first is
// element `start`. All chunks but the first begin where a counter does.
template <typename Take>
inline void by_chunk(int64_t start, int64_t count, Take take) {
    for (int64_t number = 0, step; number < count; number += step) {
        step = std::min(count - number, CHUNK - (start + number) % CHUNK);
        take(number, step);
    }
}

template <typename T>
void add_noise(T* out, const T* weights, int64_t count, const Noise& noise, int64_t start, float scale, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (count > PIECE)
    for (int64_t piece = 0; piece < count; piece += PIECE)
        by_chunk(start + piece, std::min(PIECE, count - piece), [&](int64_t number, int64_t chunk) {
            Buffer buffer;
            const int64_t at = piece + number;
            const float* z = fill(noise, start + at, chunk, buffer);
            if (weights == nullptr) {
                for (int64_t i = 0; i < chunk; ++i) store(z[i], out[at + i]);
            } else {
#pragma omp simd
                for (int64_t i = 0; i < chunk; ++i) store(load(weights[at + i]) + scale * z[i], out[at + i]);
            }
        });
}

// What a part of the weights is and how it moves, as a row of the caller's table.
struct Part {
    int64_t weights, kept, gradient;  // addresses; kept and gradient may be 0
    int64_t count, start;             // elements, and the first one's number in the whole parameter
    int64_t weights_16, kept_16, gradient_16;  // bf16, a residual, bf16; or else fp32
    int64_t first_term, terms;
};

struct Scalars {
    float decay, lr, share;
};

struct Moved {
    double realised = 0, intended = 0;
};

struct Nothing {};

// A chunk of weights: theta <- theta * decay - lr * direction. kept: of 16-bit weights, see ../residual.py.
template <typename Weight, typename Kept>
inline void step(Weight* weights, Kept* kept, const float* direction, int64_t count, Scalars scalars, Moved& moved) {
    constexpr bool residual = std::is_same_v<Kept, int16_t>, master = std::is_same_v<Kept, float>;
    float realised = 0, intended = 0;
#pragma omp simd reduction(+ : realised, intended)
    for (int64_t i = 0; i < count; ++i) {
        float before = load(weights[i]);
        if constexpr (residual) before = bits_as<float>(bits_as<int32_t>(before) + kept[i]);
        if constexpr (master) before = kept[i];
        const float after = before * scalars.decay - scalars.lr * direction[i];
        store(after, weights[i]);
        float now = load(weights[i]);
        if constexpr (residual) {
            const int32_t rounded = bits_as<int32_t>(now);
            const int32_t beyond = std::min(bits_as<int32_t>(after) - rounded, 32767);
            kept[i] = static_cast<int16_t>(beyond);
            now = bits_as<float>(rounded + beyond);
        }
        if constexpr (master) now = kept[i] = after;
        const float wanted = after - before;
        realised += (now - before) * wanted;
        intended += wanted * wanted;
    }
    moved.realised += realised;
    moved.intended += intended;
}

template <typename Gradient>
inline void begin_direction(const Gradient* gradient, float share, int64_t count, float* direction) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) direction[i] = 0.0f + share * load(gradient[i]);
}

template <typename T>
T* at(int64_t address, int64_t element) {
    return reinterpret_cast<T*>(address) + element;
}

// Elements [first, first + count) of a part.
Moved move_piece(const Part& part, int64_t first, int64_t count, Scalars scalars, const Noise* noises,
                 const float* factors) {
    Moved moved;
    by_chunk(part.start + first, count, [&](int64_t number, int64_t chunk) {
        Buffer buffer;
        float direction[CHUNK];
        const int64_t here = first + number;
        if (part.gradient == 0)
            std::fill_n(direction, chunk, 0.0f);
        else if (part.gradient_16)
            begin_direction(at<uint16_t>(part.gradient, here), scalars.share, chunk, direction);
        else
            begin_direction(at<float>(part.gradient, here), scalars.share, chunk, direction);
        for (int64_t term = part.first_term; term < part.first_term + part.terms; ++term) {
            const float* z = fill(noises[term], part.start + here, chunk, buffer);
            const float factor = factors[term];
#pragma omp simd
            for (int64_t i = 0; i < chunk; ++i) direction[i] += factor * z[i];
        }
        Nothing* nothing = nullptr;
        if (!part.weights_16)
            step(at<float>(part.weights, here), nothing, direction, chunk, scalars, moved);
        else if (part.kept == 0)
            step(at<uint16_t>(part.weights, here), nothing, direction, chunk, scalars, moved);
        else if (part.kept_16)
            step(at<uint16_t>(part.weights, here), at<int16_t>(part.kept, here), direction, chunk, scalars, moved);
        else
            step(at<uint16_t>(part.weights, here), at<float>(part.kept, here), direction, chunk, scalars, moved);
    });
    return moved;
}

}  // namespace

extern "C" {

// out <- weights + scale * z, or z without weights; `bf16`, or else fp32. out may be weights.
void ds_add_noise(void* out, const void* weights, int bf16, int64_t count, const Noise* noise, int64_t start,
                         float scale, int threads) {
    if (bf16)
        add_noise(static_cast<uint16_t*>(out), static_cast<const uint16_t*>(weights), count, *noise, start, scale, threads);
    else
        add_noise(static_cast<float*>(out), static_cast<const float*>(weights), count, *noise, start, scale, threads);
}

// theta <- theta * decay - lr * (share * gradient + sum of factor * z) for all parts.
void ds_move(const Part* parts, const Scalars* scalars, int64_t count, const Noise* noises, const float* factors,
                    Moved* moved, int threads) {
    std::vector<int64_t> first_piece(count + 1, 0);
    for (int64_t number = 0; number < count; ++number)
        first_piece[number + 1] = first_piece[number] + (parts[number].count + PIECE - 1) / PIECE;
    std::vector<Moved> sums(first_piece[count]);
#pragma omp parallel for num_threads(threads) schedule(static) if (sums.size() > 1)
    for (int64_t task = 0; task < first_piece[count]; ++task) {
        const int64_t number = std::upper_bound(first_piece.begin(), first_piece.end(), task) - first_piece.begin() - 1;
        const int64_t first = (task - first_piece[number]) * PIECE;
        const int64_t rest = std::min(PIECE, parts[number].count - first);
        sums[task] = move_piece(parts[number], first, rest, scalars[number], noises, factors);
    }
    for (const Moved& sum : sums) {
        moved->realised += sum.realised;
        moved->intended += sum.intended;
    }
}
}
