// Decode, and prefill of few queries: those of all heads of a group together, over SPLIT keys of one segment per item.
//
// "Heads" of a party are its queries: the tokens of this call, and for each of them the heads of the group.
// Scores come with a head per quarter of a vector and four keys in it, [keys / 4][head][4]: no sum across more than such
// a quarter is needed, and the softmax has few idle lanes.
#pragma once
#include "packed.h"

constexpr int SPLIT = 512;          // keys of an item
constexpr int64_t GRAIN = 1 << 21;  // bytes of keys and values that are worth a thread: making one takes 50 us
constexpr int FEW_TOKENS = 24;      // of which a prefill's tile of 64 queries would be mostly empty
constexpr int RUN = 32;             // products summed one after the other: longer sums round more
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

// BITS: of packed keys and values; 0 for plain ones. Packed ones are read by one token.
template <bool BF16, int BITS> class Few {
    static constexpr bool PLAIN = BITS == 0, HALF = BF16 && PLAIN;  // HALF: reads bfloat16
    static constexpr bool Pair = HALF && PAIRS;
    static constexpr int HEADS = W / 4;
    const int dim, group, queries, parties, steps;  // parties of HEADS queries; steps of 16 bytes of a key
    const Formula formula;
    const float factor;  // of what is stored as scores: capped ones are scaled before
    const float* first_bias;
    const Unit unit{LOG2E};
    Room room;
    float *const q, *const score, *const keys, *const bias, *const weight, *const extra;
    std::vector<Scores<BF16, BITS ? BITS : 8>> packed;     // of each party
    float value_steps[TILE], value_leasts[TILE], rest[W];  // of packed values; sums of weight * least, by head
    Rows tiles[2];
    bool watched = false;  // whether some query of an item does not see some key: then positions are noted

    const Rows* next = nullptr;  // whose keys are asked for before they are needed

  public:
    Few(const Shape& s, const Formula& formula, const float* first_bias)
        : dim(int(s.dim)), group(int(s.heads / s.kv_heads)), queries(int(s.q_len) * group),
          parties((queries + HEADS - 1) / HEADS),
          steps(Pair ? dim / 8 : dim / 4), formula(formula), factor(formula.softcap ? 1 : formula.scale),
          first_bias(first_bias),
          room(parties * dim * 4 + TILE * (W + dim) + TILE + W), q(room.take(parties * steps * W)),
          score(room.take(TILE / 4 * W)), keys(room.take(TILE * dim)), bias(room.take(TILE / 4 * W)),
          weight(room.take(W)), extra(room.take(W)) {
        if (PLAIN) return;
        packed.reserve(parties);
        for (int party = 0; party < parties; ++party) packed.emplace_back(dim);
    }

    // Writes per query: sum over keys of weight * value, [dim], the maximum and the sum of weights. ``first``: position of
    // the first token of the call; ``origin``: where the key of a sequence's first token lies.
    void run(const Heads& from, const Item& item, int64_t first, const char* origin, float* part) {
        ask(from, item);
        for (int g = 0; g < queries; ++g) {
            memset(part + g * (dim + 2), 0, sizeof(float) * (dim + 2));
            part[g * (dim + 2) + dim] = LOWEST;
        }
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
            if constexpr (HALF && !Pair) widen_keys(*rows);
            if (rows->biased) spread_bias(*rows);
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
                soften(*rows, heads, own);
                if constexpr (!PLAIN) weigh(rows->count);
                next = party + 1 == parties ? following : nullptr;
                if (heads == 4) add_values<4>(*rows, own);
                else if (heads == 3) add_values<3>(*rows, own);
                else if (heads == 2) add_values<2>(*rows, own);
                else add_values<1>(*rows, own);
            }
            std::swap(rows, following);
        }
    }

  private:
    void ask(const Heads& from, const Item& item) {
        memset(q, 0, sizeof(float) * parties * steps * W);
        for (int g = 0; g < queries; ++g)
            for (int u = 0; u < 4 * steps; ++u) {
                float* into = q + (g / HEADS * steps + u / 4) * W + g % HEADS * 4 + u % 4;
                const char* p = from.at(item.b, item.n * group + g % group, g / group);
                if constexpr (Pair) memcpy(into, p + 4 * u, 4);
                else *into = number<BF16>(p, u);
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

    void spread_bias(const Rows& rows) {
        for (int j = 0; j < rows.count; ++j)
            for (int g = 0; g < HEADS; ++g) bias[j / 4 * W + 4 * g + j % 4] = rows.bias[j];
    }

    // What the first token's score gets, by the head of each query of a party, in the lanes of the key at ``place``.
    void add_first(int64_t n, int party, int place) {
        memset(extra, 0, sizeof(float) * W);
        for (int g = 0; g < HEADS && party * HEADS + g < queries; ++g)
            extra[4 * g + place % 4] = first_bias[n * group + (party * HEADS + g) % group];
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
            packed[party].run(piece, item.b, item.kv_head, low + done, some, score + done / 4 * W, ahead);
        }
    }
#endif

    void widen_keys(Rows& rows) {
        for (int j = 0; j < rows.count; ++j) {
            for (int d = 0; d < dim; d += W) store(keys + j * dim + d, widen(rows.k[j] + 2 * d));
            rows.k[j] = (const char*)(keys + j * dim);
        }
    }

    // Asks for rows before they are needed: the CPU's own prefetching stops at every page. One that is not there is no
    // harm.
    void fetch(const char* p) {
        const int size = PLAIN ? dim * (HALF ? 2 : 4) : dim * BITS / 8;
        for (int byte = 0; byte < size; byte += 64) __builtin_prefetch(p + byte);
    }

    void multiply_keys(const Rows& rows, const float* x, bool ahead) {
        for (int j = 0; j < rows.count; j += 8) {
            const char* row[8];
            for (int r = 0; r < 8; ++r) {
                int place = std::min(j + r, rows.count - 1);
                row[r] = rows.k[place];
                if (ahead) fetch(rows.v[place]);
            }
            float* into = score + j / 4 * W;
            for (int begin = 0; begin < steps; begin += RUN) {
                vf sum[8] = {};
                for (int u = begin; u < std::min(begin + RUN, steps); ++u) {
                    vf y = load(x + u * W);
                    for (int r = 0; r < 8; ++r) sum[r] = multiply_add_four<Pair>(row[r] + 16 * u, y, sum[r]);
                }
                vf low = sum_fours(sum[0], sum[1], sum[2], sum[3]), high = sum_fours(sum[4], sum[5], sum[6], sum[7]);
                store(into, begin ? load(into) + low : low);
                store(into + W, begin ? load(into + W) + high : high);
            }
        }
    }

    void cap(int count) {
        for (float* s = score; s < score + (count + 3) / 4 * W; s += W)
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
                if (key > token || key + window <= token) score[j / 4 * W + 4 * g + j % 4] = -__builtin_inff();
            }
    }

    // Scores to weights, and what is known of each head's softmax; values added before fade by ``weight``.
    void soften(const Rows& rows, int heads, float* part) {
        int count = rows.count, quads = (count + 3) / 4, special = rows.first < 0 ? -1 : rows.first / 4;
        vf most = splat(LOWEST), old = most, total = {};
        for (int i = 0; i < quads; ++i) {
            float* s = score + i * W;
            vf x = load(s) * factor;
            if (rows.biased) x += load(bias + i * W);
            if (i == special) x += load(extra);
            if (4 * i + 4 > count)
                for (int l = 0; l < W; ++l)
                    if (4 * i + l % 4 >= count) x[l] = -__builtin_inff();
            store(s, x);
            most = larger(x, most);
        }
        for (int g = 0; g < W / 4; ++g) {
            float before = g < heads ? part[g * (dim + 2) + dim] : LOWEST;
            float now = std::max({before, most[4 * g], most[4 * g + 1], most[4 * g + 2], most[4 * g + 3]});
            for (int l = 4 * g; l < 4 * g + 4; ++l) old[l] = before, most[l] = now;
        }
        for (int i = 0; i < quads; ++i) {
            vf x = power(load(score + i * W) - most, unit);
            total += x;
            store(score + i * W, x);
        }
        vf fade = power(old - most, unit);
        store(weight, fade);
        for (int g = 0; g < heads; ++g) {
            float *top = part + g * (dim + 2) + dim, *sum = top + 1;
            *top = most[4 * g];
            *sum = *sum * fade[4 * g] + total[4 * g] + total[4 * g + 1] + total[4 * g + 2] + total[4 * g + 3];
        }
    }

    // Weights of packed values to weights of their codes, and what their least numbers add.
    void weigh(int count) {
        vf sum = {};
        for (int j = 0; j < count; j += 4) {
            vf x = load(score + j / 4 * W);
            sum += x * fours(value_leasts + j);
            store(score + j / 4 * W, x * fours(value_steps + j));
        }
        for (int g = 0; g < HEADS; ++g) rest[g] = sum[4 * g] + sum[4 * g + 1] + sum[4 * g + 2] + sum[4 * g + 3];
    }

    template <int N> void add_values(const Rows& rows, float* part) {
        int d = 0;
        for (; d + LANES * W <= dim; d += LANES * W) add_some_values<N, LANES>(rows, d, part);
        for (; d < dim; d += W) add_some_values<N, 1>(rows, d, part);
    }

    template <int N, int V> void add_some_values(const Rows& rows, int d, float* part) {
        if constexpr (N <= HEADS) {
            vf sum[N][V] = {};
            Channels<BITS ? BITS : 8> at[V];
            if constexpr (!PLAIN) {
                for (int e = 0; e < V; ++e) at[e] = {d + e * W, dim};
                for (int g = 0; g < N; ++g)
                    for (int e = 0; e < V; ++e) sum[g][e] += rest[g];
            }
            for (int j = 0; j < rows.count; ++j) {
                if (d == 0 && next && j < next->ahead) fetch(next->k[j]);
                const char* p = rows.v[j];
                const float* x = score + j / 4 * W + j % 4;
                vf y[V];
                for (int e = 0; e < V; ++e)
                    if constexpr (PLAIN) y[e] = load_as_float<HALF>(p + (d + e * W) * (HALF ? 2 : 4));
                    else y[e] = at[e].codes(p);
                for (int g = 0; g < N; ++g)
                    for (int e = 0; e < V; ++e) sum[g][e] += x[4 * g] * y[e];
            }
            for (int g = 0; g < N; ++g)
                for (int e = 0; e < V; ++e) {
                    float* into = part + g * (dim + 2) + d + e * W;
                    store(into, load(into) * weight[4 * g] + sum[g][e]);
                }
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
        int64_t worth = bytes * ((queries + W / 4 - 1) / (W / 4)) / GRAIN;
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
               const std::vector<const Packed*>& pieces, First first, Origin origin) {
    const Shape& s = call.shape;
    Work<BF16, BITS> work(call, formula, s);
    for (int64_t b = 0; b < s.batch; ++b)
        for (int64_t n = 0; n < s.kv_heads; ++n) {
            work.next_head();
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

// One token, which sees every key. After the pieces: whether a piece holds the first token, where there are pieces.
template <bool BF16> static int decode(const Call& call, const Formula& formula, const int64_t* packed) {
    const int64_t* after = packed + 1 + packed[0] * (sizeof(Segment) / 8);
    const Segment* segments = (const Segment*)(packed + 1);
    const Packed* first_piece = (const Packed*)(after + 1);
    std::vector<const Packed*> pieces;
    for (int64_t i = 0; i < after[0]; ++i) pieces.push_back(first_piece + i);
    const bool in_piece = !pieces.empty() && *(const int64_t*)(first_piece + after[0]);
    auto parts = parts_of(packed);
    auto first = [](int64_t) { return 0; };
    auto origin = [&](int64_t b, int64_t n) {
        return in_piece ? pieces[0]->k.at(b, n) : first_key(segments, packed[0], b, n);
    };
    bool four = !pieces.empty() && pieces[0]->bits == 4;  // all pieces of a store are alike
    return four ? few<BF16, 4>(call, formula, parts, pieces, first, origin)
                : few<BF16, 8>(call, formula, parts, pieces, first, origin);
}
