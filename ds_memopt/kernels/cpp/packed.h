// What is kept in fewer bits, spread out on the stack for a part of a step and kept again; see ../codes.py for the
// formulas, to the bit, and ../packed.py for what lies where.
#pragma once

#include <type_traits>

#include "common.h"
#include "philox.h"

constexpr int64_t GROUP = 128;  // entries that have one scale
constexpr int64_t SPAN = 2048;  // entries whose random bits are made at a time
constexpr uint32_t REMAINDER_PROBE = 0, STATE_PROBE = 1;
constexpr float SMALLEST_SCALE = 0x1p-94f;

typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef int16_t Shorts __attribute__((vector_size(2 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));
typedef uint8_t UnsignedBytes __attribute__((vector_size(LANES)));

// As in ../packed.py.
struct Segment {
    int64_t entry, count, first, row, group, scale, key;
};

// Of one tensor, by their entries.
struct Segments {
    const Segment* first;
    int64_t count;  // 0 where nothing depends on the place

    // The one that an entry lies in.
    const Segment& at(int64_t entry) const {
        static constexpr Segment ANY{0, INT64_MAX, 0, INT64_MAX, 0, 0, 0};
        auto before = [](int64_t e, const Segment& segment) { return e < segment.entry; };
        return count ? std::upper_bound(first, first + count, entry, before)[-1] : ANY;
    }
};

enum Kind : int64_t { FP32, BF16, BF16_AT_RANDOM, SIGNED, UNSIGNED, ABSENT };

struct KeptState {
    void* entries;
    Kind kind;
    const float* scales;  // of codes
    float* new_scales;
    int64_t probe;
};

// How one tensor and its states are kept.
struct Packed {
    void* weights;
    int64_t weights_16;  // bf16, or else fp32
    void* remainders;    // or null
    int64_t remainder_bytes;
    KeptState m, v;  // no v where its entries are null
    Segments of_weights, of_states;
    int64_t step;

    // Whether weights may be kept, and spread out again, and nothing is lost.
    bool exact() const { return !weights_16 || remainder_bytes == 2; }
};

// Entries [first, first + length) of what a tensor keeps, all in one row of their parameter: where they lie in it.
struct Range {
    const Segment& segment;
    int64_t first, length, step, row;

    Range(const Segments& segments, int64_t first, int64_t length, int64_t step)
        : segment(segments.at(first)), first(first), length(length), step(step), row(place(first) / segment.row) {}

    int64_t place(int64_t at) const { return at - segment.entry + segment.first; }
    int64_t place_in_row(int64_t at) const { return place(at) - row * segment.row; }
    // group: counted from the row's first.
    int64_t scale_of(int64_t group) const {
        return row * ((segment.row - 1) / GROUP + 1) + group - segment.group + segment.scale;
    }
    // Whether no other range has entries of it.
    bool has_all(int64_t group) const {
        const int64_t begin = place_in_row(first);
        return group * GROUP >= begin && std::min((group + 1) * GROUP, segment.row) <= begin + length;
    }
};

// Of weights, and of as many states beside them.
struct Ranges {
    const Packed& packed;
    Range weights, states;

    Ranges(const Packed& packed, int64_t offset, int64_t entry, int64_t length)
        : packed(packed),
          weights(packed.of_weights, offset, length, packed.step),
          states(packed.of_states, entry, length, packed.step) {}
};

// The compiler takes 8-bit vectors apart where one instruction converts them.
#if defined(__AVX512F__)
inline Ints to_ints(Shorts values) { return (Ints)_mm512_cvtepi16_epi32((__m256i)values); }
inline Ints to_ints(Bytes values) { return (Ints)_mm512_cvtepi8_epi32((__m128i)values); }
inline Ints to_ints(UnsignedBytes values) { return (Ints)_mm512_cvtepu8_epi32((__m128i)values); }
#if defined(__AVX512VBMI__)
typedef uint8_t OrderOfBytes __attribute__((vector_size(64)));
constexpr OrderOfBytes LOWEST = {0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60};
inline Bytes to_bytes(Ints values) {
    return (Bytes)_mm512_castsi512_si128(_mm512_permutexvar_epi8((__m512i)LOWEST, (__m512i)values));
}
#else
inline Bytes to_bytes(Ints values) { return (Bytes)_mm512_cvtepi32_epi8((__m512i)values); }
#endif
#else
template <class Narrow>
inline Ints to_ints(Narrow values) {
    return __builtin_convertvector(values, Ints);
}
inline Bytes to_bytes(Ints values) { return __builtin_convertvector(values, Bytes); }
#endif

template <class Vector, class T>
inline Vector load_lanes(const T* from, int64_t lanes) {
    static_assert(sizeof(Vector) == LANES * sizeof(T));
    Vector values{};
    std::memcpy(&values, from, lanes * sizeof(T));
    return values;
}

// 8 random bits for each of entries [place, place + count) of a parameter, at most SPAN.
struct RoundingBits {
    static constexpr int64_t PER_COUNTER = 16;
    alignas(64) uint32_t words[(SPAN + PER_COUNTER * (COUNTERS + 1)) / 4];
    int64_t skip = 0;

    void fill(const Range& range, int64_t place, int64_t count, uint32_t probe) {
        const int64_t key = range.segment.key;
        const Noise noise{PER_COUNTER, key & 0xFFFFFFFF, int64_t(uint64_t(key) >> 32), range.step, probe};
        skip = place % PER_COUNTER;
        uint64_t counter = place / PER_COUNTER;
        for (int64_t done = 0; done < skip + count; done += PER_COUNTER * COUNTERS, counter += COUNTERS)
            random_words_in_turn<ROUNDS_OF_ROUNDING>(noise, counter, words + done / 4);
    }

    Ints operator()(int64_t i) const {
        return to_ints(load_lanes<UnsignedBytes>((const uint8_t*)words + skip + i, LANES));
    }
};

// act(i, lanes) for entries [i, i + lanes) of `count`: all LANES, known to the compiler, but for the last ones.
template <class Act>
inline void by_lanes(int64_t count, Act act) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) act(i, std::integral_constant<int64_t, LANES>{});
    if (i < count) act(i, count - i);
}

template <class Vector, class T>
inline void store_lanes(T* to, Vector values, int64_t lanes) {
    static_assert(sizeof(Vector) == LANES * sizeof(T));
    std::memcpy(to, &values, lanes * sizeof(T));
}

inline Floats to_floats(Ints values) { return __builtin_convertvector(values, Floats); }
inline Ints bits_of(Floats values) { return (Ints)values; }

// Not constants for the compiler: it would make them anew for each vector, by what conversions need, too.
inline Ints MAGNITUDE = Ints{} + 0x7FFFFFFF, ONES = Ints{} + 1, HALF = Ints{} + 0x8000, NO_NUMBER = Ints{} + 0x7FC00000;

inline Ints larger(Ints a, Ints b) { return a > b ? a : b; }
inline Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}
inline Floats magnitude(Floats values) { return (Floats)(bits_of(values) & MAGNITUDE); }

// In one instruction if there is one: for what is exact, or a guess.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return a * b + c;
#endif
}

// Calls take(group, at, count) for what entries [at, at + count) have of each group.
template <class Take>
inline void by_group(const Range& range, int64_t at, int64_t count, Take take) {
    for (int64_t i = 0; i < count;) {
        int64_t place = range.place_in_row(at + i);
        int64_t step = std::min(count - i, GROUP - place % GROUP);
        take(place / GROUP, i, step);
        i += step;
    }
}

// The power of the largest code.
template <Kind KIND>
constexpr float MOST = KIND == SIGNED ? 127.0f * 127.0f : 255.0f * 255.0f * 255.0f * 255.0f;

inline float in_use(float scale) { return scale < SMALLEST_SCALE ? SMALLEST_SCALE : scale; }

template <Kind KIND>
inline Floats decode(Ints codes, Floats scale) {
    Floats code = to_floats(codes), square = code * code;
    Floats power = KIND == SIGNED ? code * magnitude(code) : square * square;
    return power * (1 / MOST<KIND>) * scale;
}

// For powers from 1 on, a guess of the whole part of their fourth root less the uniform number: that, or one less. What
// rounding at random then adds makes up for it.
inline Ints whole_root(Floats power, Floats uniform) {
#if defined(__AVX512F__)
    Floats root = (Floats)_mm512_rsqrt14_ps(_mm512_rsqrt14_ps((__m512)power));
#else
    Floats root = square_root(square_root(power));
#endif
    return __builtin_convertvector(multiply_add(root, broadcast(1 + 0x1p-12f), -uniform), Ints);
}

// factor: by which a value becomes the power of a code.
template <Kind KIND>
inline Ints encode(Floats values, Floats factor, Floats random) {
    if constexpr (KIND == SIGNED) {
        Floats down = multiply_add(random, broadcast(-0x1p-8f), broadcast(1 - 0x1p-9f));
        Floats square = magnitude(values) * factor + multiply_add(down, down, -down);  // the second is exact
        Floats code = square_root(larger(square, Floats{})) + down;
        return __builtin_convertvector((Floats)(bits_of(code) | (bits_of(values) & ~MAGNITUDE)), Ints);
    }
    Floats uniform = multiply_add(random, broadcast(0x1p-8f), broadcast(0x1p-9f));
    Floats power = larger(values * factor, broadcast(1));
    Ints whole = whole_root(power, uniform);
    Floats code = to_floats(whole), square = code * code, step = multiply_add(code, broadcast(2), broadcast(1));
    Floats gap = step * multiply_add(square, broadcast(2), step);  // to the next fourth power; exact, all but the product
    return uniform * gap < power - square * square ? whole + ONES : whole;
}

// Entries [at, at + lanes).
template <Kind KIND>
inline Floats codes_at(const KeptState& state, int64_t at, int64_t lanes, Floats scale) {
    using Codes = std::conditional_t<KIND == SIGNED, Bytes, UnsignedBytes>;
    const int8_t* codes = (const int8_t*)state.entries + at;
    prefetch_to_write(codes);
    return decode<KIND>(to_ints(load_lanes<Codes>(codes, lanes)), scale);
}

template <Kind KIND>
void decode_groups(const KeptState& state, const Range& range, int64_t at, int64_t count, float* values) {
    by_group(range, at, count, [&](int64_t group, int64_t first, int64_t entries) {
        const Floats scale = broadcast(in_use(state.scales[range.scale_of(group)]));
        by_lanes(entries, [&](int64_t i, auto lanes) {
            store(values + first + i, codes_at<KIND>(state, at + first + i, lanes, scale));
        });
    });
}

// As integers magnitudes have the same order, and what is no number is the largest.
inline void raise(Ints& most, Floats values) { most = larger(bits_of(magnitude(values)), most); }

inline float largest(Ints magnitudes) {
#if defined(__AVX512F__)
    const int32_t bits = _mm512_reduce_max_epi32((__m512i)magnitudes);
#else
    int32_t bits = 0;
    for (int lane = 0; lane < LANES; lane++) bits = std::max(bits, magnitudes[lane]);
#endif
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline float largest(const float* values, int64_t count) {
    Ints most{};
    by_lanes(count, [&](int64_t i, auto lanes) { raise(most, load_lanes<Floats>(values + i, lanes)); });
    return largest(most);
}

// By which values of a group become powers of codes.
template <Kind KIND>
inline Floats factor_of(float scale) {
    return broadcast(1 / in_use(scale) * MOST<KIND>);
}

template <Kind KIND>
void encode_groups(const KeptState& state, const Range& range, int64_t at, int64_t count, const float* values,
                   const RoundingBits& bits) {
    by_group(range, at, count, [&](int64_t group, int64_t first, int64_t entries) {
        float& scale = state.new_scales[range.scale_of(group)];
        if (range.has_all(group)) scale = largest(values + first, entries);
        int8_t* codes = (int8_t*)state.entries + at + first;
        if (!(scale > 0)) {  // zero, or no number
            std::memset(codes, 0, entries);
            return;
        }
        const Floats factor = factor_of<KIND>(scale);
        by_lanes(entries, [&](int64_t i, auto lanes) {
            Ints found = encode<KIND>(load(values + first + i), factor, to_floats(bits(first + i)));
            store_lanes(codes + i, to_bytes(found), lanes);
        });
    });
}

// States that are no codes: entries [at, at + lanes).
inline Floats state_at(const KeptState& state, int64_t at, int64_t lanes) {
    if (state.kind != FP32) return load_some((const bf16*)state.entries + at, lanes);
    return load_lanes<Floats>((const float*)state.entries + at, lanes);
}

// bits: those of the first are number `i`.
inline void keep_state(const KeptState& state, int64_t at, int64_t lanes, Floats value, const RoundingBits& bits,
                       int64_t i) {
    if (state.kind == FP32) return store_lanes((float*)state.entries + at, value, lanes);
    if (state.kind == BF16) return store_some((bf16*)state.entries + at, value, lanes);
    Words words = (Words)value, rounded = words + (Words)(bits(i) << 8) + 0x80;
    rounded = magnitude(value) < __builtin_inff() ? rounded : words;
    store_lanes((uint16_t*)state.entries + at, high_halves(rounded), lanes);
}

inline void unpack(const KeptState& state, const Range& range, int64_t at, int64_t count, float* values) {
    if (state.kind == SIGNED) return decode_groups<SIGNED>(state, range, at, count, values);
    if (state.kind == UNSIGNED) return decode_groups<UNSIGNED>(state, range, at, count, values);
    by_lanes(count, [&](int64_t i, auto lanes) { store(values + i, state_at(state, at + i, lanes)); });
}

inline void pack(const KeptState& state, const Range& range, int64_t at, int64_t count, const float* values,
                 RoundingBits& bits) {
    if (state.kind >= BF16_AT_RANDOM) bits.fill(range, range.place(at), count, state.probe);
    if (state.kind == SIGNED) return encode_groups<SIGNED>(state, range, at, count, values, bits);
    if (state.kind == UNSIGNED) return encode_groups<UNSIGNED>(state, range, at, count, values, bits);
    by_lanes(count, [&](int64_t i, auto lanes) { keep_state(state, at + i, lanes, load(values + i), bits, i); });
}

template <class Remainder>
using Remainders = std::conditional_t<std::is_same_v<Remainder, int16_t>, Shorts, Bytes>;

template <class Remainder>
inline Floats join(const Packed& packed, int64_t at, int64_t lanes) {
    const Remainder* remainders = (const Remainder*)packed.remainders + at;
    const uint16_t* weights = (const uint16_t*)packed.weights + at;
    prefetch_to_write(remainders);
    prefetch_to_write(weights);
    Ints rest = to_ints(load_lanes<Remainders<Remainder>>(remainders, lanes));
    if constexpr (std::is_same_v<Remainder, int8_t>) rest <<= 8;
    return (Floats)(((Ints)to_high_halves(load_lanes<Halves>(weights, lanes))) + rest);
}

template <class Remainder>
inline void split(const Packed& packed, int64_t at, int64_t lanes, Floats master, const RoundingBits& bits, int64_t i) {
    // The nearest; of two the one above, as a remainder of 2^15 does not fit. Then remainders are the low halves.
    Words words = (Words)master, rounded = master == master ? words + (Words)HALF : (Words)NO_NUMBER;
    store_lanes((uint16_t*)packed.weights + at, high_halves(rounded), lanes);
    if constexpr (std::is_same_v<Remainder, int16_t>) {
        store_lanes((uint16_t*)packed.remainders + at, low_halves(words), lanes);
    } else {
        Ints rest = (((Ints)words << 16 >> 16) + bits(i)) >> 8;
        store_lanes((int8_t*)packed.remainders + at, to_bytes(rest < 127 ? rest : Ints{} + 127), lanes);
    }
}

// Entries [at, at + lanes).
inline Floats weights_at(const Packed& packed, int64_t at, int64_t lanes) {
    if (packed.remainder_bytes == 2) return join<int16_t>(packed, at, lanes);
    if (packed.remainder_bytes == 1) return join<int8_t>(packed, at, lanes);
    if (packed.weights_16) return load_some((const bf16*)packed.weights + at, lanes);
    prefetch_to_write((const float*)packed.weights + at);
    return load_lanes<Floats>((const float*)packed.weights + at, lanes);
}

inline void keep_weights(const Packed& packed, int64_t at, int64_t lanes, Floats values, const RoundingBits& bits,
                         int64_t i) {
    if (packed.remainder_bytes == 2) return split<int16_t>(packed, at, lanes, values, bits, i);
    if (packed.remainder_bytes == 1) return split<int8_t>(packed, at, lanes, values, bits, i);
    if (packed.weights_16) return store_some((bf16*)packed.weights + at, values, lanes);
    store_lanes((float*)packed.weights + at, values, lanes);
}

inline void unpack_weights(const Packed& packed, int64_t at, int64_t count, float* values) {
    by_lanes(count, [&](int64_t i, auto lanes) { store_lanes(values + i, weights_at(packed, at + i, lanes), lanes); });
}

inline void pack_weights(const Packed& packed, const Range& range, int64_t at, int64_t count, const float* values,
                         RoundingBits& bits) {
    if (packed.remainder_bytes == 1) bits.fill(range, range.place(at), count, REMAINDER_PROBE);
    by_lanes(count, [&](int64_t i, auto lanes) {
        keep_weights(packed, at + i, lanes, load_lanes<Floats>(values + i, lanes), bits, i);
    });
}

inline void raise(float& scale, float magnitude) {
    // Not below 0, or no number: ordered as integers, so that the order of threads changes nothing.
    uint32_t found, *known = (uint32_t*)&scale, before = __atomic_load_n(known, __ATOMIC_RELAXED);
    std::memcpy(&found, &magnitude, sizeof found);
    while (before < found && !__atomic_compare_exchange_n(known, &before, found, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}
