// A step on what is kept in fewer bits, see packed.h: a group of entries at a time, first its states, then its weights while
// the states are kept. So the processor makes codes while it waits for the roots and quotients of weights.
#pragma once

#include "packed.h"

template <Kind KIND>
using KindOf = std::integral_constant<Kind, KIND>;

// A state of the entries of a group: taken spread out, left in fp32 as the step makes it, and kept. Nothing if ABSENT. FP32
// stands for all that are no codes.
template <Kind KIND>
struct GroupState {
    static constexpr bool CODED = KIND == SIGNED || KIND == UNSIGNED;
    const KeptState state;
    float* const values;
    Floats old_scale{}, factor{};
    Ints most{};
    bool zero = false;  // or no number

    GroupState(const KeptState& state, float* values, int64_t scale) : state(state), values(values) {
        if constexpr (CODED) old_scale = broadcast(in_use(state.scales[scale]));
    }

    Floats take(int64_t at, int64_t lanes) const {
        if constexpr (KIND == ABSENT) return Floats{};
        if constexpr (CODED) return codes_at<KIND>(state, at, lanes, old_scale);
        prefetch_to_write((const char*)state.entries + at * (state.kind == FP32 ? sizeof(float) : sizeof(bf16)));
        return state_at(state, at, lanes);
    }

    // Number i of the group.
    void leave(int64_t i, Floats value) {
        if constexpr (KIND == ABSENT) return;
        raise(most, value);
        store(values + i, value);
    }

    Floats left(int64_t i) const {
        if constexpr (KIND == ABSENT) return Floats{};
        return load(values + i);
    }

    // all: whether all entries of the group have been left.
    void measure(int64_t scale, bool all) {
        if constexpr (CODED) {
            float& new_scale = state.new_scales[scale];
            if (all) new_scale = largest(most);
            zero = !(new_scale > 0);
            factor = factor_of<KIND>(new_scale);
        }
    }

    // random: the bits of the first are number i.
    void keep(int64_t at, int64_t lanes, Floats value, Floats random, const RoundingBits& bits, int64_t i) const {
        if constexpr (CODED)
            store_lanes((int8_t*)state.entries + at, to_bytes(zero ? Ints{} : encode<KIND>(value, factor, random)), lanes);
        else if constexpr (KIND != ABSENT)
            keep_state(state, at, lanes, value, bits, i);
    }
};

// By groups, of entries [begin, begin + count) of the ranges: move_states(i, lanes, m, v) for vectors of them, from number i
// of the ranges on; then, as their new scales are known now, move_weights(begin, count, part), which calls
// part(start, length, move) for parts of the group, which calls move(p, m, v) for vectors. The scales of groups that other
// ranges share must stand in new_scales.
template <Kind M, Kind V, class MoveStates, class MoveWeights>
void step_packed(const Ranges& ranges, MoveStates move_states, MoveWeights move_weights) {
    const auto& [packed, weights, states] = ranges;
    RoundingBits of_remainders, of_states;
    alignas(64) float values_m[GROUP + LANES], values_v[GROUP + LANES];
    for (int64_t done = 0, span; done < states.length; done += span) {
        const int64_t place = states.place(states.first + done);
        span = std::min(states.length - done, SPAN - place % SPAN);
        if (packed.remainder_bytes == 1)
            of_remainders.fill(weights, weights.place(weights.first + done), span, REMAINDER_PROBE);
        if (packed.m.kind >= BF16_AT_RANDOM || packed.v.kind >= BF16_AT_RANDOM)
            of_states.fill(states, place, span, STATE_PROBE);
        by_group(states, states.first + done, span, [&](int64_t group, int64_t first, int64_t count) {
            const int64_t begin = done + first, at = weights.first + begin, entry = states.first + begin;
            const int64_t scale = states.scale_of(group);
            GroupState<M> m(packed.m, values_m, scale);
            GroupState<V> v(packed.v, values_v, scale);
            by_lanes(count, [&](int64_t i, auto lanes) {
                Floats new_m = m.take(entry + i, lanes), new_v = v.take(entry + i, lanes);
                move_states(begin + i, lanes, new_m, new_v);
                m.leave(i, new_m);
                v.leave(i, new_v);
            });
            m.measure(scale, states.has_all(group));
            v.measure(scale, states.has_all(group));
            move_weights(begin, count, [&](int64_t start, int64_t length, auto move) {
                by_lanes(length, [&](int64_t j, auto lanes) {
                    const int64_t i = start + j;
                    Floats p = weights_at(packed, at + i, lanes), new_m = m.left(i), new_v = v.left(i);
                    move(p, new_m, new_v);
                    keep_weights(packed, at + i, lanes, p, of_remainders, first + i);
                    Floats random{};
                    if constexpr (m.CODED || v.CODED) random = to_floats(of_states(first + i));
                    m.keep(entry + i, lanes, new_m, random, of_states, first + i);
                    v.keep(entry + i, lanes, new_v, random, of_states, first + i);
                });
            });
        });
    }
}

// Raises new_scales of the groups that others share to the magnitudes of new states. move_states: as above.
template <Kind M, Kind V, class MoveStates>
void measure_shared(const Packed& packed, const Range& states, MoveStates move_states) {
    const int64_t begin = states.place_in_row(states.first), end = begin + states.length;
    const int64_t groups[] = {begin / GROUP, (end - 1) / GROUP};
    alignas(64) float values_m[GROUP + LANES], values_v[GROUP + LANES];
    for (int number = 0; number < (groups[0] == groups[1] ? 1 : 2); number++) {
        const int64_t group = groups[number], scale = states.scale_of(group);
        if (states.has_all(group)) continue;
        const int64_t first = std::max(begin, group * GROUP), last = std::min(end, (group + 1) * GROUP);
        GroupState<M> m(packed.m, values_m, scale);
        GroupState<V> v(packed.v, values_v, scale);
        by_lanes(last - first, [&](int64_t i, auto lanes) {
            const int64_t entry = states.first + first - begin + i;
            Floats new_m = m.take(entry, lanes), new_v = v.take(entry, lanes);
            move_states(first - begin + i, lanes, new_m, new_v);
            m.leave(i, new_m);
            v.leave(i, new_v);
        });
        if (m.CODED) raise(packed.m.new_scales[scale], largest(m.most));
        if (v.CODED) raise(packed.v.new_scales[scale], largest(v.most));
    }
}
