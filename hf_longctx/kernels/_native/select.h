// Which pages the query heads of a KV head read together: those with the highest bounds.
#pragma once
#include "decode.h"

struct Pages {
    int64_t sub, width;  // parts of a page with bounds of their own; pages that are chosen
    int32_t* chosen;     // [B, n, width], ascending
    int64_t count;       // segments with the bounds, as keys of 2 D numbers, that follow
};

// The largest ``width`` of ``votes``, ascending; of equal ones the first.
static void largest(const float* votes, int64_t count, int64_t width, std::vector<float>& room, int32_t* chosen) {
    room.assign(votes, votes + count);
    std::nth_element(room.begin(), room.begin() + width - 1, room.end(), std::greater<float>());
    const float least = room[width - 1];
    int64_t equal = width - std::count_if(votes, votes + count, [&](float x) { return x > least; });
    for (int64_t i = 0; i < count; ++i)
        if (votes[i] > least || (votes[i] == least && equal-- > 0)) *chosen++ = int32_t(i);
}

template <bool BF16> static int pages(const Call& call, const Formula& formula, const int64_t* packed) {
    const Shape& s = call.shape;
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
        team[worker].votes(call.q, own.item, own.out);
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
