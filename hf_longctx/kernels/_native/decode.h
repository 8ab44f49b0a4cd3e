// Decode, and prefill of few queries: those of all heads of a group together, over SPLIT keys of one segment per item.
//
// "Heads" of a party are its queries: the tokens of this call, and for each of them the heads of the group.
// Scores are [keys][4], of up to four heads: a vector of 8 numbers holds two keys (0 and 1) with heads a to d
//
//     a0 b0 c0 d0 a1 b1 c1 d1
//
// so the softmax has few idle lanes whatever the width of a vector, and the weights of a value are neighbours.
#pragma once
#include "packed.h"

constexpr int SPLIT = 512;          // keys of an item
constexpr int64_t GRAIN = 1 << 21;  // bytes of keys and values that are worth making a thread, which takes 50 us
constexpr int64_t OWN_GRAIN = GRAIN / 32;  // that are worth waking one that is there
constexpr int FEW_TOKENS = 24;      // of which a prefill's tile of 64 queries would be mostly empty
constexpr int64_t EARLIER = INT_MIN / 2;  // position of keys that every query sees

// Slots low .. high of a segment. Slot j has the position ``base + j``.
struct Range { const Segment* segment; int64_t base, low, high; };
// A whole segment, whose keys queries see that are closer than ``window``; no query sees slots before ``begin``.
struct Part { const Segment* segment; int64_t base = EARLIER, window = INT_MAX, begin = 0; };

// What a work item of one KV head reads: ranges of segments, or slots low .. high of a packed piece.
struct Item {
    int64_t b, n, kv_head;  // n: of those whose queries are asked; kv_head: of the keys
    const Range *range, *end;
    const Packed* piece;
    int64_t low, high, window;
};

// Keys of a tile: where they lie, their positions, and what is added to their scores.
struct Rows {
    const char *k[TILE], *v[TILE];
    int64_t at[TILE];
    float bias[TILE];
    int count, ahead;  // ahead: keys that it is worth to ask the memory for, more than ``count`` where an item ends
    int first;         // the place of the first token; -1: it is not among them
    bool biased;
};

constexpr int KEYS = 8;  // of a register block

// Vectors of a value in the register block of N heads: 16 registers hold 12 sums and what they are made of. Numbers to
// convert come in two vectors at a time.
constexpr int vectors_of_block(int n, bool convert) { return W != 8 || n < 4 ? 4 : convert ? 2 : 3; }

// Calls each(an integral constant) for a number of heads from 1 to HEADS.
template <class Each> static inline void for_heads(int heads, Each each) {
    if (heads == 4) each(std::integral_constant<int, 4>());
    else if (heads == 3) each(std::integral_constant<int, 3>());
    else if (heads == 2) each(std::integral_constant<int, 2>());
    else each(std::integral_constant<int, 1>());
}

// BITS: of packed keys and values; 0 for plain ones. Packed ones are read by one token.
template <bool BF16, int BITS> class Few {
    static constexpr bool PLAIN = BITS == 0, HALF = BF16 && PLAIN;  // HALF: reads bfloat16
    static constexpr bool Pair = HALF && PAIRS;
    static constexpr bool Convert = HALF && !PAIRS;
    static constexpr int PART = W / HEADS;          // numbers, or pairs, of a key that a vector of queries has of each head
    const int dim, group, queries, parties, steps;  // parties of HEADS queries; steps of PART
    const Formula formula;
    const float factor;  // of what is stored as scores: capped ones are scaled before
    const float* first_bias;
    const Unit unit{LOG2E};
    Room room;
    float *const q, *const score, *const keys, *const weight;  // q: [parties][steps][HEADS][PART]
    float *const tops, *const sums;                            // of each query's softmax, [parties][HEADS]
    std::vector<Scores<BF16, BITS ? BITS : 8>> packed;     // of each party
    float value_steps[TILE], value_leasts[TILE], rest[HEADS];  // of packed values; sums of weight * least, by head
    Rows tiles[2];
    bool watched = false;  // whether some query of an item does not see some key: then positions are noted

    const Rows* next = nullptr;  // whose keys are asked for before they are needed

  public:
    Few(const Shape& s, const Formula& formula, const float* first_bias)
        : dim(int(s.dim)), group(int(s.heads / s.kv_heads)), queries(int(s.q_len) * group),
          parties((queries + HEADS - 1) / HEADS),
          steps((Pair ? dim / 2 : dim) / PART), formula(formula), factor(formula.softcap ? 1 : formula.scale),
          first_bias(first_bias), room(parties * (steps * W + 2 * 16) + (TILE + KEYS) * HEADS + TILE * dim + 16),
          q(room.take(parties * steps * W)), score(room.take((TILE + KEYS) * HEADS)),
          keys(room.take(PLAIN ? 0 : TILE * dim)), weight(room.take(HEADS)),
          tops(room.take(parties * HEADS)), sums(room.take(parties * HEADS)) {
        if (PLAIN) return;
        packed.reserve(parties);
        for (int party = 0; party < parties; ++party) packed.emplace_back(dim);
    }

    // Writes per query: sum over keys of weight * value, [dim], the maximum and the sum of weights. ``first``: position of
    // the first token of the call; ``origin``: where the key of a sequence's first token lies.
    void run(const Heads& from, const Item& item, int64_t first, const char* origin, float* part) {
        ask(from, item);
        for (int g = 0; g < queries; ++g) memset(part + g * (dim + 2), 0, sizeof(float) * dim);
        std::fill(tops, tops + parties * HEADS, LOWEST);
        std::fill(sums, sums + parties * HEADS, 0.0f);
        const int64_t last = first + queries / group - 1;
        watched = false;
        for (const Range* one = item.range; one != item.end; ++one)
            watched |= one->base + one->high - 1 > first || one->base + one->low + item.window <= last;
        const Range* range = item.range;
        int64_t pos = PLAIN && range != item.end ? range->low : item.low;
        Rows *rows = &tiles[0], *following = &tiles[1];
        fill(item, range, pos, origin, *rows);
        while (rows->count) {
            int64_t low = pos - rows->count;  // of a packed tile
            fill(item, range, pos, origin, *following);
            if constexpr (!PLAIN) unpack(item, low, *rows);
            const bool edge = watched && hides(*rows, first, item.window);
            for (int party = 0; party < parties; ++party) {
                int heads = std::min(HEADS, queries - party * HEADS);
                float* own = part + party * HEADS * (dim + 2);
#if AVX512_VNNI
                if constexpr (!PLAIN) multiply_codes(item, low, rows->count, party);
                else
#endif
                    multiply_keys(*rows, q + party * steps * W, PLAIN && !party);
                if (formula.softcap) cap(rows->count);
                if (edge) hide(*rows, party, first, item.window);
                if (rows->first >= 0) add_first(item.n, party, rows->first);
                soften(*rows, party);
                if constexpr (!PLAIN) weigh(rows->count);
                next = party + 1 == parties ? following : nullptr;
                for_heads(heads, [&](auto n) { add_values<n.value>(*rows, own); });
            }
            std::swap(rows, following);
        }
        for (int g = 0; g < queries; ++g) {
            float* own = part + g * (dim + 2);
            if constexpr (Convert) join_channels(own);
            own[dim] = tops[g], own[dim + 1] = sums[g];
        }
    }

    // The largest score of each key of an item, of all queries; no scale is put to it.
    void votes(const Heads& from, const Item& item, float* out) {
        ask(from, item);
        watched = false;
        const Range* range = item.range;
        int64_t pos = range->low;
        Rows *rows = &tiles[0], *following = &tiles[1];
        fill(item, range, pos, nullptr, *rows);
        while (rows->count) {
            fill(item, range, pos, nullptr, *following);
            // What is asked for with each key is the value in its place: here the key of the next tile.
            for (int j = 0; j < rows->count; ++j) rows->v[j] = following->k[std::min(j, std::max(0, following->ahead - 1))];
            for (int party = 0; party < parties; ++party) {
                multiply_keys(*rows, q + party * steps * W, !party && following->ahead);
                for_heads(std::min(HEADS, queries - party * HEADS), [&](auto n) {
                    for (int j = 0; j < rows->count; ++j) {
                        float most = party ? out[j] : score[j * HEADS];
                        for (int g = 0; g < n.value; ++g) most = std::max(most, score[j * HEADS + g]);
                        out[j] = most;
                    }
                });
            }
            out += rows->count;
            std::swap(rows, following);
        }
    }

  private:
    void ask(const Heads& from, const Item& item) {
        memset(q, 0, sizeof(float) * parties * steps * W);
        for (int g = 0; g < queries; ++g)
            for (int u = 0; u < PART * steps; ++u) {
                // Converted keys come as their even and their odd numbers.
                const int pair = u / (2 * PART) * PART + u % PART, number_of = Convert ? 2 * pair + u / PART % 2 : u;
                const char* p = from.at(item.b, item.n * group + g % group, g / group);
                float* into = q + ((g / HEADS * steps + u / PART) * HEADS + g % HEADS) * PART + u % PART;
                if constexpr (Pair) memcpy(into, p + 4 * u, 4);
                else *into = number<BF16>(p, number_of);
            }
        if (!PLAIN)
            for (int party = 0; party < parties; ++party)
                packed[party].ask(from, item.b, item.n * group + party * HEADS, std::min(HEADS, group - party * HEADS));
    }

    // The next keys, up to a tile of them, from slot ``pos`` of ``range`` on; both go on to what follows.
    void fill(const Item& item, const Range*& range, int64_t& pos, const char* origin, Rows& rows) {
        rows.count = 0, rows.biased = false, rows.first = -1;
        if constexpr (!PLAIN) {
            place(item.piece->k, item.piece->v, item, pos, int(std::min<int64_t>(TILE, item.high - pos)), EARLIER, rows);
            pos += rows.count;
        } else {
            while (range != item.end && rows.count < TILE) {
                const Segment& segment = *range->segment;
                int done = rows.count, some = int(std::min<int64_t>(TILE - done, range->high - pos));
                place(segment.k, segment.v, item, pos, some, range->base, rows);
                if (segment.bias || rows.biased) note_bias(segment, item, pos, done, some, rows);
                pos += some;
                if (pos == range->high && ++range != item.end) pos = range->low;
            }
        }
        rows.ahead = rows.count;
        if (PLAIN && !rows.count && item.range != item.end) expect(item, rows);
        if (first_bias)
            for (int j = 0; j < rows.count; ++j)
                if (rows.k[j] == origin) rows.first = j;
    }

    // After an item, the keys behind it: most often those of the next one.
    void expect(const Item& item, Rows& rows) {
        const Range& last = item.end[-1];
        const Heads& k = last.segment->k;
        for (int j = 0; j < TILE; ++j) rows.k[j] = k.at(item.b, item.kv_head, last.high + j);
        rows.ahead = TILE;
    }

    void place(const Heads& k, const Heads& v, const Item& item, int64_t pos, int some, int64_t base, Rows& rows) {
        const char *key = k.at(item.b, item.kv_head, pos), *value = v.at(item.b, item.kv_head, pos);
        const char **keys_at = rows.k + rows.count, **values_at = rows.v + rows.count;
        int64_t* at = rows.at + rows.count;
        const int64_t k_stride = k.token, v_stride = v.token;
        for (int j = 0; j < some; ++j) keys_at[j] = key + j * k_stride;
        for (int j = 0; j < some; ++j) values_at[j] = value + j * v_stride;
        for (int j = 0; watched && j < some; ++j) at[j] = base + pos + j;
        rows.count += some;
    }

    void note_bias(const Segment& segment, const Item& item, int64_t pos, int done, int some, Rows& rows) {
        if (!rows.biased) std::fill(rows.bias, rows.bias + done, 0.0f);
        rows.biased = true;
        if (!segment.bias) {
            std::fill(rows.bias + done, rows.bias + done + some, 0.0f);
            return;
        }
        const float* p = segment.bias + item.b * segment.bias_batch + item.kv_head * segment.bias_head;
        for (int j = 0; j < some; ++j) rows.bias[done + j] = p[(pos + j) * segment.bias_key];
    }

    // What the first token's score gets, by the head of each query of a party.
    void add_first(int64_t n, int party, int place) {
        for (int g = 0; g < HEADS && party * HEADS + g < queries; ++g)
            score[place * HEADS + g] += first_bias[n * group + (party * HEADS + g) % group] / factor;
    }

    void unpack(const Item& item, int64_t low, Rows& rows) {
        const Packed& piece = *item.piece;
        for (int j = 0; j < TILE; ++j) {
            const char* scale = piece.v_scale.at(item.b, item.kv_head, low + j);
            value_steps[j] = j < rows.count ? number<BF16>(scale, 0) : 0;
            value_leasts[j] = j < rows.count ? number<BF16>(scale, 1) : 0;
        }
#if !AVX512_VNNI
        const char* v = rows.v[0];
        unpack_keys<BF16, BITS>(piece, item.b, item.kv_head, low, rows.count, dim, keys, {v, v + rows.count * piece.v.token});
        for (int j = 0; j < rows.count; ++j) rows.k[j] = (const char*)(keys + j * dim);
#endif
    }

#if AVX512_VNNI
    void multiply_codes(const Item& item, int64_t low, int count, int party) {
        const Packed& piece = *item.piece;
        const char* v = piece.v.at(item.b, item.kv_head, low);
        Ahead ahead{v, party ? v : v + count * piece.v.token};
        for (int done = 0, some; done < count; done += some) {
            some = int(std::min<int64_t>(count - done, piece.group - (low + done) % piece.group));
            packed[party].run(piece, item.b, item.kv_head, low + done, some, score + done * HEADS, ahead);
        }
    }
#endif

    // Asks for rows before they are needed: the CPU's own prefetching stops at every page. One that is not there is no
    // harm. Into the second cache: more of them can be under way than to the first (measured: a quarter faster in float32).
    void fetch(const char* p) {
        const int size = PLAIN ? dim * (HALF ? 2 : 4) : dim * BITS / 8;
        for (int byte = 0; byte < size; byte += 64) __builtin_prefetch(p + byte, 0, 2);
    }

    // A part of a key in all heads' places, by a part of the queries; of those to convert, two parts one after the other.
    static inline vf multiply_part(const char* key, const float* x, vf sum) {
        if constexpr (Convert) {
            const vf both = repeat_part(key);
            sum += even_numbers(both) * load(x);
            return sum + odd_numbers(both) * load(x + W);
        }
        return multiply_add<Pair>(repeat_part(key), load(x), sum);
    }

    void multiply_keys(const Rows& rows, const float* x, bool ahead) {
        constexpr int STEP = Convert ? 2 : 1;
        for (int j = 0; j < rows.count; j += KEYS) {
            const char* row[KEYS];
            for (int k = 0; k < KEYS; ++k) {
                const int place = std::min(j + k, rows.count - 1);
                row[k] = rows.k[place];
                if (ahead) fetch(rows.v[place]);
            }
            vf sum[KEYS] = {};
            for (int u = 0; u < steps; u += STEP)
                for (int k = 0; k < KEYS; ++k) sum[k] = multiply_part(row[k] + u / STEP * W, x + u * W, sum[k]);
            for (int k = 0; k < KEYS; k += PART) store(score + (j + k) * HEADS, sum_parts(sum + k));
        }
    }

    void cap(int count) {
        for (float* s = score; s < score + count * HEADS; s += W)
            store(s, capped(load(s) * formula.scale, formula.softcap));
    }

    // Whether some query, of tokens from the position ``first`` on, does not see some key.
    bool hides(const Rows& rows, int64_t first, int64_t window) const {
        const int64_t last = first + queries / group - 1;
        for (int j = 0; j < rows.count; ++j)
            if (rows.at[j] > first || rows.at[j] + window <= last) return true;
        return false;
    }

    void hide(const Rows& rows, int party, int64_t first, int64_t window) {
        for (int j = 0; j < rows.count; ++j)
            for (int g = 0; g < HEADS; ++g) {
                int64_t token = (party * HEADS + g) / group, key = rows.at[j] - first;
                if (key > token || key + window <= token) score[j * HEADS + g] = -__builtin_inff();
            }
    }

    // Scores to weights, and what is known of each head's softmax; values added before fade by ``weight``.
    void soften(Rows& rows, int party) {
        constexpr int STRIDE = W / HEADS;  // keys of a vector
        const int count = rows.count;
        const Unit in_two = unit;  // a copy of this function's own: stores to scores do not reach it
        for (int l = count * HEADS; l % W; ++l) score[l] = -__builtin_inff();
        for (int j = count; rows.biased && j % STRIDE; ++j) rows.bias[j] = 0;
        const vf old = fours(tops + party * HEADS);
        vf most = old, total = {};
        for (int j = 0; j < count; j += STRIDE) {
            vf x = load(score + j * HEADS) * factor;
            if (rows.biased) x += spread(rows.bias + j);
            store(score + j * HEADS, x);
            most = larger(x, most);
        }
        most = over_quarters(most, larger);
        for (int j = 0; j < count; j += STRIDE) {
            vf x = power(load(score + j * HEADS) - most, in_two);
            total += x;
            store(score + j * HEADS, x);
        }
        const vf fade = power(old - most, in_two);
        store_four(weight, fade);
        store_four(tops + party * HEADS, most);
        store_four(sums + party * HEADS, fours(sums + party * HEADS) * fade + over_quarters(total, add));
    }

    // Weights of packed values to weights of their codes, and what their least numbers add.
    void weigh(int count) {
        vf sum = {};
        for (int j = 0; j < count; j += W / HEADS) {
            vf x = load(score + j * HEADS);
            sum += x * spread(value_leasts + j);
            store(score + j * HEADS, x * spread(value_steps + j));
        }
        store_four(rest, over_quarters(sum, add));
    }

    template <int N> void add_values(const Rows& rows, float* part) {
        constexpr int V = vectors_of_block(N, Convert);
        int d = 0;
        for (; d + V * W <= dim; d += V * W) add_some_values<N, V>(rows, d, part);
        for (; d + 2 * W <= dim; d += 2 * W) add_some_values<N, 2>(rows, d, part);
        if (d < dim) add_some_values<N, 1>(rows, d, part);
    }

    template <int N, int V> void add_some_values(const Rows& rows, int d, float* part) {
        vf sum[N][V] = {};
        Channels<BITS ? BITS : 8> at[V];
        if constexpr (!PLAIN) {
            for (int e = 0; e < V; ++e) at[e] = {d + e * W, dim};
            for (int g = 0; g < N; ++g)
                for (int e = 0; e < V; ++e) sum[g][e] += rest[g];
        }
        const int ahead = d == 0 && next ? next->ahead : 0;
        for (int j = 0; j < rows.count; ++j) {
            if (j < ahead) fetch(next->k[j]);
            const char* p = rows.v[j];
            const float* x = score + j * HEADS;
            vf y[V];
            if constexpr (PLAIN) load_values(p + d * (HALF ? 2 : 4), y);
            else
                for (int e = 0; e < V; ++e) y[e] = at[e].codes(p);
            for (int g = 0; g < N; ++g)
                for (int e = 0; e < V; ++e) sum[g][e] += x[g] * y[e];
        }
        for (int g = 0; g < N; ++g)
            for (int e = 0; e < V; ++e) {
                float* into = part + g * (dim + 2) + d + e * W;
                store(into, load(into) * weight[g] + sum[g][e]);
            }
    }

    // Channels of a value. Of two vectors to convert, the first has the even ones and the second the odd ones.
    template <int V> static inline void load_values(const char* p, vf (&y)[V]) {
        if constexpr (Convert && V % 2 == 0)
            for (int e = 0; e < V; e += 2) {
                const vf both = load((const float*)p + e / 2 * W);
                y[e] = even_numbers(both), y[e + 1] = odd_numbers(both);
            }
        else
            for (int e = 0; e < V; ++e) y[e] = load_as_float<HALF>(p + e * W * (HALF ? 2 : 4));
    }

    // What `load_values` took apart, put together in sums over values.
    void join_channels(float* sums) {
        for (int d = 0; d + 2 * W <= dim; d += 2 * W, sums += 2 * W) {
            const vf even = load(sums), odd = load(sums + W);
            for (int l = 0; l < W; ++l) sums[2 * l] = even[l], sums[2 * l + 1] = odd[l];
        }
    }
};

// Work items of a call, those of a KV head one after the other, and the answer joined from them. ``shape``: of the call,
// or with a KV head per query head where each reads keys of its own.
template <bool BF16, int BITS> class Work {
    const Call& call;
    const Formula formula;
    const Shape shape;
    std::vector<Item> items;
    std::vector<size_t> begin;
    std::vector<Range> ranges;                          // of items, counted until all are there
    std::vector<std::pair<size_t, size_t>> own_ranges;  // of each item
    int64_t bytes = 0;

  public:
    Work(const Call& call, const Formula& formula, const Shape& shape) : call(call), formula(formula), shape(shape) {}

    void next_head() { begin.push_back(items.size()); }

    // Slots low .. high of a segment, in items of SPLIT keys, whatever the number of threads: it does not change the
    // answer. ``more``: they go on with an item that has room.
    void add(int64_t b, int64_t n, int64_t kv_head, Range range, int64_t window, bool more = false) {
        while (range.low < range.high) {
            int64_t left = SPLIT;
            if (more && begin.back() < items.size()) left = SPLIT - items.back().high;
            if (left == 0 || !more || begin.back() == items.size()) {
                items.push_back({b, n, kv_head, nullptr, nullptr, nullptr, 0, 0, window});
                own_ranges.emplace_back(ranges.size(), ranges.size());
                left = SPLIT;
            }
            Range some = range;
            some.high = std::min(range.high, range.low + left);
            ranges.push_back(some);
            own_ranges.back().second = ranges.size();
            items.back().high += some.high - some.low;  // keys so far
            bytes += (some.high - some.low) * shape.dim * (BF16 ? 4 : 8);
            range.low = some.high;
        }
    }

    void add(int64_t b, int64_t n, const Packed* piece) {
        for (int64_t low = 0, end = piece->of(b); low < end; low += SPLIT) {
            items.push_back({b, n, n, nullptr, nullptr, piece, low, std::min<int64_t>(low + SPLIT, end), INT_MAX});
            own_ranges.emplace_back(0, 0);
            bytes += (items.back().high - low) * shape.dim * 4;  // as long as bfloat16 takes: it computes more
        }
    }

    // ``first(b)``: position of the first token of a sequence. ``origin(b, kv_head)``: the key of its first token.
    template <class First, class Origin> int run(First first, Origin origin) {
        next_head();
        for (size_t i = 0; i < items.size(); ++i)
            items[i].range = ranges.data() + own_ranges[i].first, items[i].end = ranges.data() + own_ranges[i].second;
        const int64_t group = shape.heads / shape.kv_heads, queries = group * shape.q_len, size = queries * (shape.dim + 2);
        std::vector<float> sums(items.size() * size);
        std::deque<Few<BF16, 0>> team;
        std::deque<Few<BF16, BITS>> unpackers;
        int64_t worth = bytes * ((queries + HEADS - 1) / HEADS) / (has_team() ? OWN_GRAIN : GRAIN);
        int64_t threads = std::max<int64_t>(1, std::min({shape.threads, int64_t(items.size()), worth}));
        const bool pieces = std::any_of(items.begin(), items.end(), [](const Item& item) { return item.piece; });
        for (int64_t i = 0; i < threads; ++i) {
            team.emplace_back(shape, formula, call.first_bias);
            if (pieces) unpackers.emplace_back(shape, formula, call.first_bias);
        }
        int used = parallel(int64_t(items.size()), threads, [&](int64_t i, int64_t worker) {
            const Item& item = items[i];
            const char* start = origin(item.b, item.kv_head);
            float* into = sums.data() + i * size;
            if (item.piece) unpackers[worker].run(call.q, item, first(item.b), start, into);
            else team[worker].run(call.q, item, first(item.b), start, into);
        });
        join(sums.data(), size, group);
        return used;
    }

  private:
    void join(const float* sums, int64_t size, int64_t group) {
        const Shape& s = shape;
        std::vector<float> total(s.dim);
        for (int64_t b = 0; b < s.batch; ++b)
            for (int64_t h = 0; h < s.heads; ++h)
                for (int64_t t = 0; t < s.q_len; ++t) {
                    const size_t pair = b * s.kv_heads + h / group;
                    const float* sum_of = sums + (t * group + h % group) * (s.dim + 2);
                    float top = LOWEST, sum = 0;
                    std::fill(total.begin(), total.end(), 0.0f);
                    for (size_t i = begin[pair]; i < begin[pair + 1]; ++i) top = std::max(top, sum_of[i * size + s.dim]);
                    for (size_t i = begin[pair]; i < begin[pair + 1]; ++i) {
                        float weight = std::exp(sum_of[i * size + s.dim] - top);
                        sum += weight * sum_of[i * size + s.dim + 1];
                        for (int64_t d = 0; d < s.dim; ++d) total[d] += weight * sum_of[i * size + d];
                    }
                    const bool nothing = sum < 0.5f;  // what sees a key has a sum of 1 or more
                    for (int64_t d = 0; d < s.dim; ++d) {
                        float x = nothing ? 0 : total[d] / sum;
                        if constexpr (BF16) ((uint16_t*)call.out.at(b, h, t))[d] = to_bf16(x);
                        else ((float*)call.out.at(b, h, t))[d] = x;
                    }
                    if (call.lse)
                        call.lse[(b * s.heads + h) * s.q_len + t] = nothing ? -__builtin_inff() : top + std::log(sum);
                }
    }
};

// ``first(b)``: position of the first token of the call. ``origin(b, n)``: where the key of a sequence's first token lies.
template <bool BF16, int BITS, class First, class Origin>
static int few(const Call& call, const Formula& formula, const std::vector<Part>& parts,
               const std::vector<const Packed*>& pieces, First first, Origin origin, const Ragged* ragged = nullptr,
               int64_t count = 0) {
    const Shape& s = call.shape;
    Work<BF16, BITS> work(call, formula, s);
    std::vector<Segment> own;  // of the ragged ones
    own.reserve(count * s.batch * s.kv_heads);
    for (int64_t b = 0; b < s.batch; ++b)
        for (int64_t n = 0; n < s.kv_heads; ++n) {
            work.next_head();
            for (int64_t i = 0; i < count; ++i) {
                own.push_back(ragged[i].part(b * s.kv_heads + n));
                work.add(b, n, n, {&own.back(), EARLIER, 0, own.back().length}, INT_MAX);
            }
            for (const Part& part : parts)
                work.add(b, n, n, {part.segment, part.base, part.begin, part.segment->of(b)}, part.window);
            for (const Packed* piece : pieces) work.add(b, n, piece);
        }
    return work.run(first, origin);
}

// The key of slot 0 of the first segment that is not empty.
static inline const char* first_key(const Segment* segments, int64_t count, int64_t b, int64_t n) {
    for (int64_t i = 0; i < count; ++i)
        if (segments[i].length) return segments[i].k.at(b, n);
    return nullptr;
}

static inline std::vector<Part> parts_of(const int64_t* packed) {
    const Segment* segments = (const Segment*)(packed + 1);
    std::vector<Part> parts;
    for (int64_t i = 0; i < packed[0]; ++i) parts.push_back({segments + i});
    return parts;
}

// One token, which sees every key. After the pieces: whether a piece holds the first token, where there are pieces; then
// what is ragged.
template <bool BF16> static int decode(const Call& call, const Formula& formula, const int64_t* packed) {
    const int64_t* after = packed + 1 + packed[0] * (sizeof(Segment) / 8);
    const Segment* segments = (const Segment*)(packed + 1);
    const Packed* first_piece = (const Packed*)(after + 1);
    std::vector<const Packed*> pieces;
    for (int64_t i = 0; i < after[0]; ++i) pieces.push_back(first_piece + i);
    const int64_t* last = (const int64_t*)(first_piece + after[0]);
    const bool in_piece = !pieces.empty() && last[0];
    const Ragged* ragged = (const Ragged*)(last + 2);
    for (int64_t i = 0; i < last[1]; ++i)
        if (!ragged[i].holds(call.shape.batch * call.shape.kv_heads)) return OUTSIDE;
    auto parts = parts_of(packed);
    auto first = [](int64_t) { return 0; };
    auto origin = [&](int64_t b, int64_t n) {
        return in_piece ? pieces[0]->k.at(b, n) : first_key(segments, packed[0], b, n);
    };
    bool four = !pieces.empty() && pieces[0]->bits == 4;  // all pieces of a store are alike
    return four ? few<BF16, 4>(call, formula, parts, pieces, first, origin, ragged, last[1])
                : few<BF16, 8>(call, formula, parts, pieces, first, origin, ragged, last[1]);
}

// One token of every sequence, which sees every key of its own pages.
template <bool BF16> static int paged(const Call& call, const Formula& formula, const int64_t* packed) {
    const Shape& s = call.shape;
    const HeadPages& pages = *(const HeadPages*)packed;
    if (!pages.holds(s.batch, s.kv_heads)) return OUTSIDE;
    int64_t count = 0;
    for (int64_t b = 0; b < s.batch; ++b) count += (pages.lengths[b] + pages.page - 1) / pages.page * s.kv_heads;
    std::vector<Segment> own;
    own.reserve(count);  // items point into it
    Work<BF16, 8> work(call, formula, s);
    for (int64_t b = 0; b < s.batch; ++b)
        for (int64_t n = 0; n < s.kv_heads; ++n) {
            work.next_head();
            for (int64_t i = 0; i * pages.page < pages.lengths[b]; ++i) {
                own.push_back(pages.part(b, n, i));
                work.add(b, n, n, {&own.back(), EARLIER, 0, own.back().length}, INT_MAX, i > 0);
            }
        }
    return work.run([](int64_t) { return 0; }, [&](int64_t b, int64_t n) {
        return pages.lengths[b] ? pages.part(b, n, 0).k.data : nullptr;
    });
}

// One new token of every sequence of a layer: its key and value are written to their places, and then it reads. After the
// new keys and values: how many roles, and of each the slot, how many slots are read, the buffers, what is listed of them,
// what is read before them (without lengths: nothing), and the KV heads.
struct Listed {  // of layout/segments.py; size 0: everything is read
    int64_t size, low, high, width;
    const int32_t *entries, *counts;
};
template <bool BF16> static int step(const Call& call, const Formula& formula, const int64_t* packed) {
    const Shape& s = call.shape;
    const Heads &k = *(const Heads*)packed, &v = *(&k + 1);
    const int64_t* next = (const int64_t*)(&v + 1);
    std::vector<Segment> segments(*next++);
    struct Own { const Segment* segment; const Listed* listed; const Ragged* before; int64_t head, heads, slot; };
    std::vector<Own> own(s.kv_heads);
    for (Segment& segment : segments) {
        const int64_t slot = *next++;
        segment = {*(const Heads*)(next + 1), *(const Heads*)(next + 5), *next, nullptr, nullptr, 0, 0, 0};
        const Listed* listed = (const Listed*)(next + 9);
        const Ragged* before = (const Ragged*)(listed + 1);
        next = (const int64_t*)(before + 1);
        const int64_t heads = *next++;
        if (before->lengths && !before->holds(s.batch * heads)) return OUTSIDE;
        for (int64_t i = 0; i < heads; ++i, ++next) own[*next] = {&segment, listed, before, i, heads, slot};
    }
    for (int64_t n = 0; n < s.kv_heads; ++n)
        for (int64_t b = 0; b < s.batch; ++b) {
            const Own& one = own[n];
            memcpy(one.segment->k.at(b, one.head, one.slot), k.at(b, n), s.dim * (BF16 ? 2 : 4));
            memcpy(one.segment->v.at(b, one.head, one.slot), v.at(b, n), s.dim * (BF16 ? 2 : 4));
        }
    Work<BF16, 8> work(call, formula, s);
    std::vector<Segment> parts;  // of what is read before
    parts.reserve(s.batch * s.kv_heads);
    for (int64_t b = 0; b < s.batch; ++b)
        for (const Own& one : own) {
            work.next_head();
            const int64_t n = &one - own.data(), length = one.segment->length;
            if (one.before->lengths) {
                parts.push_back(one.before->part(b * one.heads + one.head));
                work.add(b, n, one.head, {&parts.back(), EARLIER, 0, parts.back().length}, INT_MAX);
            }
            auto read = [&](int64_t low, int64_t high) {
                work.add(b, n, one.head, {one.segment, EARLIER, low, high}, INT_MAX, one.listed->size > 0);
            };
            if (!one.listed->size) {
                read(0, length);
                continue;
            }
            const Listed& list = *one.listed;
            const int64_t at = b * one.heads + one.head, count = list.counts ? list.counts[at] : list.width;
            read(0, list.low * list.size);
            for (const int32_t* entry = list.entries + at * list.width, *end = entry + count; entry < end;) {
                const int64_t first = *entry;  // neighbours are read as one
                int64_t last = first + 1;
                while (++entry < end && *entry == last) ++last;
                read(first * list.size, last * list.size);
            }
            read(list.high * list.size, length);
        }
    return work.run([](int64_t) { return 0; }, [](int64_t, int64_t) -> const char* { return nullptr; });
}
