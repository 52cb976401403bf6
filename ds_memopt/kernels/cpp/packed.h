// What is kept in fewer bits, spread out on the stack for a part of a step and kept again; see ../codes.py for the
// formulas, to the bit, and ../packed.py for what lies where.
#pragma once

#include <type_traits>

#include "common.h"
#include "philox.h"

constexpr int64_t GROUP = 128;  // entries that have one scale
constexpr int64_t SPAN = 512;  // entries that are spread out at a time
constexpr uint32_t REMAINDER_PROBE = 0;

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

enum Kind : int64_t { FP32, BF16, BF16_AT_RANDOM, SIGNED, UNSIGNED };

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
inline Ints to_ints(Bytes values) { return (Ints)_mm512_cvtepi8_epi32((__m128i)values); }
inline Ints to_ints(UnsignedBytes values) { return (Ints)_mm512_cvtepu8_epi32((__m128i)values); }
inline Bytes to_bytes(Ints values) { return (Bytes)_mm512_cvtepi32_epi8((__m512i)values); }
#else
template <class Narrow>
inline Ints to_ints(Narrow values) {
    return __builtin_convertvector(values, Ints);
}
inline Bytes to_bytes(Ints values) { return __builtin_convertvector(values, Bytes); }
#endif
inline Ints to_ints(Shorts values) { return __builtin_convertvector(values, Ints); }
inline Ints to_ints(Halves values) { return __builtin_convertvector(values, Ints); }
inline void narrow(Ints values, Bytes& result) { result = to_bytes(values); }
inline void narrow(Ints values, Shorts& result) { result = __builtin_convertvector(values, Shorts); }

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
            random_words_in_turn(noise, counter, words + done / 4);
    }

    Ints operator()(int64_t i) const {
        UnsignedBytes bits;
        std::memcpy(&bits, (const uint8_t*)words + skip + i, sizeof bits);
        return to_ints(bits);
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
inline Vector load_lanes(const T* from, int64_t lanes) {
    static_assert(sizeof(Vector) == LANES * sizeof(T));
    Vector values{};
    std::memcpy(&values, from, lanes * sizeof(T));
    return values;
}

template <class Vector, class T>
inline void store_lanes(T* to, Vector values, int64_t lanes) {
    static_assert(sizeof(Vector) == LANES * sizeof(T));
    std::memcpy(to, &values, lanes * sizeof(T));
}

inline Floats to_floats(Ints values) { return __builtin_convertvector(values, Floats); }
inline Ints bits_of(Floats values) { return (Ints)values; }
inline Ints larger(Ints a, Ints b) { return a > b ? a : b; }
inline Ints add_where(Ints chosen, Ints a, Ints b) { return a + (chosen & b); }
inline Ints select(Ints chosen, Ints yes, Ints no) { return (chosen & yes) | (~chosen & no); }
inline Floats magnitude(Floats values) { return (Floats)(bits_of(values) & 0x7FFFFFFF); }

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

// To the bit, whatever is divided by `divisor`, without a division for each: the rest of a first guess corrects it.
struct Divisor {
    Floats divisor, inverse;
    bool exact;  // neither it nor its inverse is so small that rests are lost

    explicit Divisor(float divisor)
        : divisor(broadcast(divisor)), inverse(broadcast(1 / divisor)), exact(divisor > 0x1p-80f && divisor < 0x1p80f) {}

    Floats operator()(Floats values) const {
#if defined(__AVX512F__)
        if (exact) {
            Floats guess = values * inverse;
            return multiply_add(multiply_add(-guess, divisor, values), inverse, guess);
        }
#endif
        return values / divisor;
    }
};

// The whole part of the square or fourth root of the power. One too low where the root is within 1e-5 of the next number:
// rounding at random then takes the next.
template <Kind KIND>
inline Ints whole_root(Floats power) {
#if defined(__AVX512F__)
    Floats positive = (Floats)_mm512_max_ps((__m512)power, (__m512)broadcast(1e-30f));
    Floats inverse = (Floats)_mm512_rsqrt14_ps((__m512)positive), root;
    if constexpr (KIND == SIGNED) {
        root = positive * inverse;
        root = multiply_add(multiply_add(-root, root, positive), 0.5f * inverse, root);
    } else {
        root = (Floats)_mm512_rsqrt14_ps((__m512)inverse);
        Floats square = root * root;
        root = multiply_add(multiply_add(-square, square, positive) * (inverse * inverse), 0.25f * root, root);
    }
#else
    Floats root = square_root(power);
    if constexpr (KIND == UNSIGNED) root = square_root(root);
#endif
    return __builtin_convertvector(root, Ints);
}

template <Kind KIND>
inline Floats decode(Ints codes, float scale) {
    const Divisor squares(127.0f * 127.0f), most(255.0f);
    Floats code = to_floats(codes);
    if constexpr (KIND == SIGNED) return squares(code * magnitude(code)) * scale;
    Floats share = most(code), square = share * share;
    return square * square * scale;
}

template <Kind KIND>
inline Ints encode(Floats values, const Divisor& scale, Ints random) {
    Floats share = scale(magnitude(values));
    Floats power = share * (KIND == SIGNED ? 127.0f * 127.0f : 255.0f * 255.0f * 255.0f * 255.0f);
    Ints whole = whole_root<KIND>(power);
    Floats code = to_floats(whole), uniform = multiply_add(to_floats(random), broadcast(0x1p-8f), broadcast(0x1p-9f));
    if constexpr (KIND == SIGNED) {
        Floats step = multiply_add(code, broadcast(2), broadcast(1));  // to the next square; all of this is exact
        whole = add_where(uniform * step < multiply_add(-code, code, power), whole, Ints{} + 1);
        return bits_of(values) < 0 ? -whole : whole;
    }
    Floats low = code * code, high = (code + 1) * (code + 1);
    low *= low, high *= high;
    whole = add_where(uniform * (high - low) < power - low, whole, Ints{} + 1);
    return add_where((whole == 0) & (share > 0), whole, Ints{} + 1);
}

template <Kind KIND>
void decode_groups(const KeptState& state, const Range& range, int64_t at, int64_t count, float* values) {
    using Codes = std::conditional_t<KIND == SIGNED, Bytes, UnsignedBytes>;
    const int8_t* codes = (const int8_t*)state.entries + at;
    by_group(range, at, count, [&](int64_t group, int64_t first, int64_t entries) {
        const float scale = state.scales[range.scale_of(group)];
        by_lanes(entries, [&](int64_t i, auto lanes) {
            prefetch_to_write(codes + first + i);
            Codes kept = load_lanes<Codes>(codes + first + i, lanes);
            store(values + first + i, decode<KIND>(to_ints(kept), scale));
        });
    });
}

// As integers magnitudes have the same order, and what is no number is the largest.
inline uint32_t largest(const float* values, int64_t count) {
    Ints most{};
    by_lanes(count, [&](int64_t i, auto lanes) {
        Ints size = load_lanes<Ints>(values + i, lanes) & 0x7FFFFFFF;
        most = larger(size, most);
    });
#if defined(__AVX512F__)
    return _mm512_reduce_max_epi32((__m512i)most);
#else
    int32_t result = 0;
    for (int lane = 0; lane < LANES; lane++) result = std::max(result, most[lane]);
    return result;
#endif
}

template <Kind KIND>
void encode_groups(const KeptState& state, const Range& range, int64_t at, int64_t count, const float* values,
                   const RoundingBits& bits) {
    int8_t* codes = (int8_t*)state.entries + at;
    by_group(range, at, count, [&](int64_t group, int64_t first, int64_t entries) {
        float& scale = state.new_scales[range.scale_of(group)];
        if (range.has_all(group)) {
            uint32_t found = largest(values + first, entries);
            std::memcpy(&scale, &found, sizeof scale);
        }
        if (!(scale > 0)) {  // zero, or no number
            std::memset(codes + first, 0, entries);
            return;
        }
        const Divisor divisor(scale);
        by_lanes(entries, [&](int64_t i, auto lanes) {
            Ints found = encode<KIND>(load(values + first + i), divisor, bits(first + i));
            store_lanes(codes + first + i, to_bytes(found), lanes);
        });
    });
}

inline void unpack(const KeptState& state, const Range& range, int64_t at, int64_t count, float* values) {
    if (state.kind == SIGNED) return decode_groups<SIGNED>(state, range, at, count, values);
    if (state.kind == UNSIGNED) return decode_groups<UNSIGNED>(state, range, at, count, values);
    by_lanes(count, [&](int64_t i, auto lanes) {
        store(values + i, state.kind == FP32 ? load_lanes<Floats>((const float*)state.entries + at + i, lanes)
                                             : load_some((const bf16*)state.entries + at + i, lanes));
    });
}

inline void pack(const KeptState& state, const Range& range, int64_t at, int64_t count, const float* values,
                 RoundingBits& bits) {
    if (state.kind >= BF16_AT_RANDOM) bits.fill(range, range.place(at), count, state.probe);
    if (state.kind == SIGNED) return encode_groups<SIGNED>(state, range, at, count, values, bits);
    if (state.kind == UNSIGNED) return encode_groups<UNSIGNED>(state, range, at, count, values, bits);
    by_lanes(count, [&](int64_t i, auto lanes) {
        Floats value = load(values + i);
        if (state.kind == FP32) return store_lanes((float*)state.entries + at + i, value, lanes);
        bf16* entries = (bf16*)state.entries + at + i;
        if (state.kind == BF16) return store_some(entries, value, lanes);
        Ints finite = (Ints)(magnitude(value) < __builtin_inff());
        Ints rounded = select(finite, bits_of(value) + (bits(i) << 8) + 0x80, bits_of(value));
        store_lanes((int16_t*)entries, __builtin_convertvector(rounded >> 16, Shorts), lanes);
    });
}

template <class Remainder>
void join(const Packed& packed, int64_t at, int64_t count, float* masters) {
    using Remainders = std::conditional_t<std::is_same_v<Remainder, int16_t>, Shorts, Bytes>;
    const Remainder* remainders = (const Remainder*)packed.remainders + at;
    const bf16* weights = (const bf16*)packed.weights + at;
    by_lanes(count, [&](int64_t i, auto lanes) {
        prefetch_to_write(remainders + i);
        prefetch_to_write(weights + i);
        Ints rest = to_ints(load_lanes<Remainders>(remainders + i, lanes));
        if constexpr (std::is_same_v<Remainder, int8_t>) rest <<= 8;
        Ints weight = to_ints(load_lanes<Halves>((const uint16_t*)weights + i, lanes)) << 16;
        store_lanes(masters + i, (Floats)(weight + rest), LANES);
    });
}

template <class Remainder>
void split(const Packed& packed, int64_t at, int64_t count, const float* masters, const RoundingBits& bits) {
    using Remainders = std::conditional_t<std::is_same_v<Remainder, int16_t>, Shorts, Bytes>;
    Remainder* remainders = (Remainder*)packed.remainders + at;
    int16_t* weights = (int16_t*)packed.weights + at;
    by_lanes(count, [&](int64_t i, auto lanes) {
        Ints master = load_lanes<Ints>(masters + i, LANES);
        // The nearest; of two the one above, as a remainder of 2^15 does not fit. Then remainders are the low halves.
        Ints rounded = (master + 0x8000) >> 16, rest = master << 16 >> 16;
        rounded = select((master & 0x7FFFFFFF) > 0x7F800000, Ints{} + 0x7FC0, rounded);
        if constexpr (std::is_same_v<Remainder, int8_t>) {
            rest = (rest + bits(i)) >> 8;
            rest = rest < 127 ? rest : 127;
        }
        Remainders kept;
        narrow(rest, kept);
        store_lanes(weights + i, __builtin_convertvector(rounded, Shorts), lanes);
        store_lanes(remainders + i, kept, lanes);
    });
}

inline void unpack_weights(const Packed& packed, int64_t at, int64_t count, float* values) {
    if (packed.remainder_bytes == 2) return join<int16_t>(packed, at, count, values);
    if (packed.remainder_bytes == 1) return join<int8_t>(packed, at, count, values);
    by_lanes(count, [&](int64_t i, auto lanes) {
        store(values + i, packed.weights_16 ? load_some((const bf16*)packed.weights + at + i, lanes)
                                            : load_lanes<Floats>((const float*)packed.weights + at + i, lanes));
    });
}

inline void pack_weights(const Packed& packed, const Range& range, int64_t at, int64_t count, const float* values,
                         RoundingBits& bits) {
    if (packed.remainder_bytes == 2) return split<int16_t>(packed, at, count, values, bits);
    if (packed.remainder_bytes == 1) {
        bits.fill(range, range.place(at), count, REMAINDER_PROBE);
        return split<int8_t>(packed, at, count, values, bits);
    }
    by_lanes(count, [&](int64_t i, auto lanes) {
        if (!packed.weights_16) return store_lanes((float*)packed.weights + at + i, load(values + i), lanes);
        store_some((bf16*)packed.weights + at + i, load(values + i), lanes);
    });
}

// Entries in fp32: as they lie, or else here, with room for a last vector.
struct Spread {
    float *p = room[0], *m = room[1], *v = room[2];
    alignas(64) float room[3][SPAN + LANES];

    void refer_to(const Packed& packed, int64_t at, int64_t entry) {
        if (!packed.weights_16) p = (float*)packed.weights + at;
        if (packed.m.kind == FP32) m = (float*)packed.m.entries + entry;
        if (packed.v.kind == FP32) v = (float*)packed.v.entries + entry;
    }
};

// Elements in parts: update(begin, count, spread) makes the step of those from number `begin` of the ranges on. The scales
// of groups that other ranges share must stand in new_scales.
template <class Update>
void step_packed(const Ranges& ranges, Update update) {
    const auto& [packed, weights, states] = ranges;
    Spread spread;
    RoundingBits bits;
    for (int64_t begin = 0, count; begin < states.length; begin += count) {
        const int64_t at = weights.first + begin, entry = states.first + begin;
        count = std::min(states.length - begin, SPAN - states.place(entry) % SPAN);
        spread.refer_to(packed, at, entry);
        if (packed.weights_16) unpack_weights(packed, at, count, spread.p);
        if (packed.m.kind != FP32) unpack(packed.m, states, entry, count, spread.m);
        if (packed.v.kind != FP32) unpack(packed.v, states, entry, count, spread.v);
        update(begin, count, spread);
        if (packed.weights_16) pack_weights(packed, weights, at, count, spread.p, bits);
        if (packed.m.kind != FP32) pack(packed.m, states, entry, count, spread.m, bits);
        if (packed.v.kind != FP32) pack(packed.v, states, entry, count, spread.v, bits);
    }
}

inline void raise(float& scale, const float* values, int64_t count) {
    // Not below 0, or no number: ordered as integers, so that the order of threads changes nothing.
    uint32_t found = largest(values, count), *known = (uint32_t*)&scale, before = __atomic_load_n(known, __ATOMIC_RELAXED);
    while (before < found && !__atomic_compare_exchange_n(known, &before, found, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}

// Raises new_scales of the groups that others share to the magnitudes that `update` gives this range's states.
template <class Update>
void measure_shared(const Packed& packed, const Range& states, Update update) {
    const int64_t begin = states.place_in_row(states.first), end = begin + states.length;
    const int64_t groups[] = {begin / GROUP, (end - 1) / GROUP};
    for (int i = 0; i < (groups[0] == groups[1] ? 1 : 2); i++) {
        if (states.has_all(groups[i])) continue;
        const int64_t first = std::max(begin, groups[i] * GROUP), last = std::min(end, (groups[i] + 1) * GROUP);
        const int64_t entry = states.first + first - begin, count = last - first, scale = states.scale_of(groups[i]);
        Spread spread;
        std::memset(spread.p, 0, count * sizeof(float));
        unpack(packed.m, states, entry, count, spread.m);
        if (packed.v.entries) unpack(packed.v, states, entry, count, spread.v);
        update(first - begin, count, spread);
        if (packed.m.new_scales) raise(packed.m.new_scales[scale], spread.m, count);
        if (packed.v.new_scales) raise(packed.v.new_scales[scale], spread.v, count);
    }
}
