// Which pages the query heads of a KV head read together: those with the highest bounds.
#pragma once
#include <functional>

#include "decode.h"

struct Pages {
    int64_t sub, width;  // parts of a page with bounds of their own; pages that are chosen
    int32_t* chosen;     // [B, n, width], ascending
    int64_t count;       // segments with the bounds, as keys of 2 D numbers, that follow
};

// A number whose order is that of the floats, but for -0 and 0.
static inline uint32_t in_order(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The ``width``-th largest of ``votes``: found in the one of 2048 bins, by sign, exponent and two digits, that has it.
static float least_of_largest(const float* votes, int64_t count, int64_t width, std::vector<float>& room) {
    constexpr int BINS = 2048, SHIFT = 21;
    int32_t in_bin[BINS] = {};
    for (int64_t i = 0; i < count; ++i) ++in_bin[in_order(votes[i]) >> SHIFT];
    int bin = BINS - 1;
    int64_t left = width;
    for (; in_bin[bin] < left; --bin) left -= in_bin[bin];
    room.clear();
    for (int64_t i = 0; i < count; ++i)
        if (int(in_order(votes[i]) >> SHIFT) == bin) room.push_back(votes[i]);
    std::nth_element(room.begin(), room.begin() + left - 1, room.end(), std::greater<float>());
    return room[left - 1];
}

// The largest ``width`` of ``votes``, ascending; of equal ones the first.
static void largest(const float* votes, int64_t count, int64_t width, std::vector<float>& room, int32_t* chosen) {
    const float least = least_of_largest(votes, count, width, room);
    int64_t equal = width - std::count_if(votes, votes + count, [&](float x) { return x > least; });
    for (int64_t i = 0; i < count; ++i)
        if (votes[i] > least || (votes[i] == least && equal-- > 0)) *chosen++ = int32_t(i);
}

// Each query twice: what is positive of it, for the largest numbers of a page, and what is negative, for the smallest.
template <class Number> static std::vector<Number> by_sign(const Call& call) {
    const Shape& s = call.shape;
    std::vector<Number> both(s.batch * s.heads * 2 * s.dim);
    for (int64_t b = 0; b < s.batch; ++b)
        for (int64_t h = 0; h < s.heads; ++h) {
            const Number* q = (const Number*)call.q.at(b, h);
            Number* into = both.data() + (b * s.heads + h) * 2 * s.dim;
            for (int64_t d = 0; d < s.dim; ++d) into[d + (q[d] >> (8 * sizeof(Number) - 1) ? s.dim : 0)] = q[d];
        }
    return both;
}

template <bool BF16> static int pages(const Call& call, const Formula& formula, const int64_t* packed) {
    auto both = by_sign<std::conditional_t<BF16, uint16_t, uint32_t>>(call);
    Shape s = call.shape;
    s.dim *= 2;
    const int64_t row = s.dim * int64_t(sizeof both[0]);
    const Heads queries{(char*)both.data(), s.heads * row, row, row};
    const Pages& asked = *(const Pages*)packed;
    const Segment* segments = (const Segment*)(&asked + 1);
    int64_t parts = 0;
    for (int64_t i = 0; i < asked.count; ++i) parts += segments[i].length;
    const int64_t count = parts / asked.sub, pairs = s.batch * s.kv_heads;
    struct Own { Item item; Range range; float* out; };
    std::vector<Own> items;
    std::vector<float> votes(pairs * parts);
    for (int64_t b = 0; b < s.batch; ++b)
        for (int64_t n = 0; n < s.kv_heads; ++n) {
            float* out = votes.data() + (b * s.kv_heads + n) * parts;
            for (int64_t i = 0; i < asked.count; ++i)
                for (int64_t low = 0; low < segments[i].length; low += SPLIT) {
                    const int64_t high = std::min<int64_t>(low + SPLIT, segments[i].length);
                    items.push_back({{b, n, n, nullptr, nullptr, nullptr, 0, 0, INT_MAX}, {segments + i, 0, low, high}, out});
                    out += high - low;
                }
        }
    const int64_t bytes = pairs * parts * s.dim * (BF16 ? 2 : 4);
    const int64_t worth = bytes / (has_team() ? OWN_GRAIN : GRAIN);
    const int64_t threads = std::max<int64_t>(1, std::min({s.threads, int64_t(items.size()), worth}));
    std::deque<Few<BF16, 0>> team;
    for (int64_t i = 0; i < threads; ++i) team.emplace_back(s, formula, nullptr);
    parallel(int64_t(items.size()), threads, [&](int64_t i, int64_t worker) {
        Own& own = items[i];
        own.item.range = &own.range, own.item.end = &own.range + 1;
        team[worker].votes(queries, own.item, own.out);
    });
    std::vector<std::vector<float>> rooms(threads);
    return parallel(pairs, threads, [&](int64_t pair, int64_t worker) {
        float* own = votes.data() + pair * parts;
        for (int64_t i = 0; asked.sub > 1 && i < count; ++i)
            own[i] = *std::max_element(own + i * asked.sub, own + (i + 1) * asked.sub);
        for (int64_t i = 0; i < count; ++i)
            if (std::isnan(own[i])) own[i] = -__builtin_inff();
        largest(own, count, asked.width, rooms[worker], asked.chosen + pair * asked.width);
    });
}
