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
constexpr int64_t EARLIER = INT_MIN / 2;  // position of keys that every query sees

// Where a segment's keys are: slot j has the position ``base + j``, and queries see those closer than ``window``.
struct Place { int64_t base = EARLIER, window = INT_MAX; };
struct Part { const Segment* segment; Place place; int64_t begin = 0; };  // no query sees slots before ``begin``

// BITS: of packed keys and values; 0 for plain ones. Packed ones are read by one token.
template <bool BF16, int BITS> class Few {
    using Kept = std::conditional_t<BITS == 0, Segment, Packed>;
    static constexpr bool PLAIN = BITS == 0, HALF = BF16 && PLAIN;  // HALF: reads bfloat16
    static constexpr bool Pair = HALF && PAIRS;
    static constexpr int HEADS = W / 4;
    const int dim, group, queries, parties, steps;  // parties of HEADS queries; steps of 16 bytes of a key
    const float scale;
    const Unit unit{LOG2E};
    Room room;
    float *const q, *const score, *const keys, *const bias, *const weight;
    std::vector<Scores<BF16, BITS ? BITS : 8>> packed;     // of each party
    float value_steps[TILE], value_leasts[TILE], rest[W];  // of packed values; sums of weight * least, by head

    const char* next = nullptr;
    int64_t next_stride = 0;

  public:
    Few(const Shape& s, float scale)
        : dim(int(s.dim)), group(int(s.heads / s.kv_heads)), queries(int(s.q_len) * group),
          parties((queries + HEADS - 1) / HEADS),
          steps(Pair ? dim / 8 : dim / 4), scale(scale),
          room(parties * dim * 4 + TILE * (W + dim) + TILE), q(room.take(parties * steps * W)),
          score(room.take(TILE / 4 * W)), keys(room.take(TILE * dim)), bias(room.take(TILE / 4 * W)),
          weight(room.take(W)) {
        if (PLAIN) return;
        packed.reserve(parties);
        for (int party = 0; party < parties; ++party) packed.emplace_back(dim);
    }

    // Writes per query: sum over keys of weight * value, [dim], the maximum and the sum of weights. ``first``: position of
    // the first token.
    void run(const Heads& from, int64_t b, int64_t n, const Kept& kept, Place place, int64_t low, int64_t high,
             int64_t first, float* part) {
        memset(q, 0, sizeof(float) * parties * steps * W);
        for (int g = 0; g < queries; ++g)
            for (int u = 0; u < 4 * steps; ++u) {
                float* into = q + (g / HEADS * steps + u / 4) * W + g % HEADS * 4 + u % 4;
                const char* p = from.at(b, n * group + g % group, g / group);
                if constexpr (Pair) memcpy(into, p + 4 * u, 4);
                else *into = number<BF16>(p, u);
            }
        if (!PLAIN)
            for (int party = 0; party < parties; ++party)
                packed[party].ask(from, b, n * group + party * HEADS, std::min(HEADS, group - party * HEADS));
        for (int g = 0; g < queries; ++g) {
            memset(part + g * (dim + 2), 0, sizeof(float) * (dim + 2));
            part[g * (dim + 2) + dim] = LOWEST;
        }
        for (int64_t pos = low; pos < high; pos += TILE) {
            int count = int(std::min<int64_t>(TILE, high - pos));
            const char *k = kept.k.at(b, n, pos), *v = kept.v.at(b, n, pos);
            int64_t k_stride = kept.k.token, v_stride = kept.v.token;
            bool biased = false;
            if constexpr (!PLAIN) {
                for (int j = 0; j < TILE; ++j) {
                    const char* scale = kept.v_scale.at(b, n, pos + j);
                    value_steps[j] = j < count ? number<BF16>(scale, 0) : 0;
                    value_leasts[j] = j < count ? number<BF16>(scale, 1) : 0;
                }
#if !AVX512_VNNI
                unpack_keys<BF16, BITS>(kept, b, n, pos, count, dim, keys, {v, v + count * v_stride});
                k = (const char*)keys, k_stride = 4 * dim;
#endif
            } else if (kept.bias) {
                biased = true;
                spread_bias(kept, b, n, pos, count);
            }
            if constexpr (HALF && !Pair) {
                for (int j = 0; j < count; ++j)
                    for (int d = 0; d < dim; d += W) store(keys + j * dim + d, widen(k + j * k_stride + 2 * d));
                k = (const char*)keys, k_stride = 4 * dim;
            }
            int64_t at = place.base + pos, last = first + queries / group - 1;
            bool edge = at + count - 1 > first || at + place.window <= last;
            for (int party = 0; party < parties; ++party) {
                int heads = std::min(HEADS, queries - party * HEADS);
                float* own = part + party * HEADS * (dim + 2);
#if AVX512_VNNI
                if constexpr (!PLAIN) {
                    Ahead ahead{v, party ? v : v + count * v_stride};
                    for (int done = 0, some; done < count; done += some) {
                        some = int(std::min<int64_t>(count - done, kept.group - (pos + done) % kept.group));
                        packed[party].run(kept, b, n, pos + done, some, score + done / 4 * W, ahead);
                    }
                } else
#endif
                    multiply_keys(k, k_stride, count, q + party * steps * W, PLAIN && !party ? v : nullptr, v_stride);
                if (edge) hide(count, party, at - first, place.window);
                soften(count, heads, biased, own);
                if constexpr (!PLAIN) weigh(count);
                next = party + 1 == parties && (PLAIN || pos + TILE < high) ? kept.k.at(b, n, pos + TILE) : nullptr;
                next_stride = kept.k.token;
                if (heads == 4) add_values<4>(v, v_stride, count, own);
                else if (heads == 3) add_values<3>(v, v_stride, count, own);
                else if (heads == 2) add_values<2>(v, v_stride, count, own);
                else add_values<1>(v, v_stride, count, own);
            }
        }
    }

  private:
    void spread_bias(const Segment& segment, int64_t b, int64_t n, int64_t pos, int count) {
        const float* p = segment.bias + b * segment.bias_batch + n * segment.bias_head + pos * segment.bias_key;
        for (int j = 0; j < count; ++j)
            for (int g = 0; g < HEADS; ++g) bias[j / 4 * W + 4 * g + j % 4] = p[j * segment.bias_key];
    }

    // Asks for rows before they are needed: the CPU's own prefetching stops at every page. One that is not there is no
    // harm.
    void fetch(const char* p, int64_t stride, int count) {
        const int size = PLAIN ? dim * (HALF ? 2 : 4) : dim * BITS / 8;
        for (int j = 0; j < count; ++j)
            for (int byte = 0; byte < size; byte += 64) __builtin_prefetch(p + j * stride + byte);
    }

    void multiply_keys(const char* k, int64_t stride, int count, const float* x, const char* next, int64_t next_stride) {
        for (int j = 0; j < count; j += 8) {
            const char* row[8];
            if (next) fetch(next + j * next_stride, next_stride, 8);
            for (int r = 0; r < 8; ++r) row[r] = k + std::min(j + r, count - 1) * stride;
            vf sum[8] = {};
            for (int u = 0; u < steps; ++u) {
                vf y = load(x + u * W);
                for (int r = 0; r < 8; ++r) sum[r] = multiply_add_four<Pair>(row[r] + 16 * u, y, sum[r]);
            }
            store(score + j / 4 * W, sum_fours(sum[0], sum[1], sum[2], sum[3]));
            store(score + (j / 4 + 1) * W, sum_fours(sum[4], sum[5], sum[6], sum[7]));
        }
    }

    // ``at``: position of the first key, counted from the first token.
    void hide(int count, int party, int64_t at, int64_t window) {
        for (int j = 0; j < count; ++j)
            for (int g = 0; g < HEADS; ++g) {
                int64_t token = (party * HEADS + g) / group, key = at + j;
                if (key > token || key + window <= token) score[j / 4 * W + 4 * g + j % 4] = -__builtin_inff();
            }
    }

    // Scores to weights, and what is known of each head's softmax; values added before fade by ``weight``.
    void soften(int count, int heads, bool biased, float* part) {
        int quads = (count + 3) / 4;
        vf most = splat(LOWEST), old = most, total = {};
        for (int i = 0; i < quads; ++i) {
            float* s = score + i * W;
            vf x = load(s) * scale;
            if (biased) x += load(bias + i * W);
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

    template <int N> void add_values(const char* v, int64_t stride, int count, float* part) {
        int d = 0;
        for (; d + LANES * W <= dim; d += LANES * W) add_some_values<N, LANES>(v, stride, count, d, part);
        for (; d < dim; d += W) add_some_values<N, 1>(v, stride, count, d, part);
    }

    template <int N, int V> void add_some_values(const char* v, int64_t stride, int count, int d, float* part) {
        if constexpr (N <= HEADS) {
            vf sum[N][V] = {};
            Channels<BITS ? BITS : 8> at[V];
            if constexpr (!PLAIN) {
                for (int e = 0; e < V; ++e) at[e] = {d + e * W, dim};
                for (int g = 0; g < N; ++g)
                    for (int e = 0; e < V; ++e) sum[g][e] += rest[g];
            }
            for (int j = 0; j < count; ++j) {
                if (d == 0 && next) fetch(next + j * next_stride, next_stride, 1);
                const char* p = v + j * stride;
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

// Every SPLIT keys of a KV head are an item, whatever the number of threads, so that it does not change the answer.
// ``first(b)``: position of the first token of a row.
template <bool BF16, int BITS, class First>
static int few(const Call& call, float scale, const std::vector<Part>& parts, const std::vector<const Packed*>& pieces,
               First first) {
    const Shape& s = call.shape;
    struct Item { int64_t b, n; const Part* part; const Packed* piece; int64_t low, high; };
    std::vector<Item> items;
    std::vector<int64_t> begin{0};
    int64_t bytes = 0, group = s.heads / s.kv_heads, queries = group * s.q_len, size = queries * (s.dim + 2);
    for (int64_t b = 0; b < s.batch; ++b)
        for (int64_t n = 0; n < s.kv_heads; ++n) {
            for (const Part& part : parts)
                for (int64_t low = part.begin, end = part.segment->of(b); low < end; low += SPLIT) {
                    items.push_back({b, n, &part, nullptr, low, std::min<int64_t>(low + SPLIT, end)});
                    bytes += (items.back().high - low) * s.dim * (BF16 ? 4 : 8);
                }
            for (const Packed* piece : pieces)
                for (int64_t low = 0, end = piece->of(b); low < end; low += SPLIT) {
                    items.push_back({b, n, nullptr, piece, low, std::min<int64_t>(low + SPLIT, end)});
                    bytes += (items.back().high - low) * s.dim * 4;  // as long as bfloat16 takes: it computes more
                }
            begin.push_back(int64_t(items.size()));
        }
    std::vector<float> sums(items.size() * size);
    std::deque<Few<BF16, 0>> team;
    std::deque<Few<BF16, BITS>> unpackers;
    int64_t worth = bytes * ((queries + W / 4 - 1) / (W / 4)) / GRAIN;
    int64_t threads = std::max<int64_t>(1, std::min({s.threads, int64_t(items.size()), worth}));
    for (int64_t i = 0; i < threads; ++i) {
        team.emplace_back(s, scale);
        if (!pieces.empty()) unpackers.emplace_back(s, scale);
    }
    int used = parallel(int64_t(items.size()), threads, [&](int64_t i, int64_t worker) {
        const Item& item = items[i];
        float* into = sums.data() + i * size;
        int64_t from = first(item.b);
        if (item.piece) unpackers[worker].run(call.q, item.b, item.n, *item.piece, {}, item.low, item.high, from, into);
        else team[worker].run(call.q, item.b, item.n, *item.part->segment, item.part->place, item.low, item.high, from, into);
    });
    std::vector<float> total(s.dim);
    for (int64_t b = 0; b < s.batch; ++b)
        for (int64_t h = 0; h < s.heads; ++h)
            for (int64_t t = 0; t < s.q_len; ++t) {
                int64_t pair = b * s.kv_heads + h / group;
                const float* sum_of = sums.data() + (t * group + h % group) * (s.dim + 2);
                float top = LOWEST, sum = 0;
                std::fill(total.begin(), total.end(), 0.0f);
                for (int64_t i = begin[pair]; i < begin[pair + 1]; ++i) top = std::max(top, sum_of[i * size + s.dim]);
                for (int64_t i = begin[pair]; i < begin[pair + 1]; ++i) {
                    float weight = std::exp(sum_of[i * size + s.dim] - top);
                    sum += weight * sum_of[i * size + s.dim + 1];
                    for (int64_t d = 0; d < s.dim; ++d) total[d] += weight * sum_of[i * size + d];
                }
                for (int64_t d = 0; d < s.dim; ++d) {
                    float x = sum < 0.5f ? 0 : total[d] / sum;
                    if constexpr (BF16) ((uint16_t*)call.out.at(b, h, t))[d] = to_bf16(x);
                    else ((float*)call.out.at(b, h, t))[d] = x;
                }
            }
    return used;
}

static inline std::vector<Part> parts_of(const int64_t* packed) {
    const Segment* segments = (const Segment*)(packed + 1);
    std::vector<Part> parts;
    for (int64_t i = 0; i < packed[0]; ++i) parts.push_back({segments + i, {}});
    return parts;
}

// One token, which sees every key.
template <bool BF16> static int decode(const Call& call, float scale, const int64_t* packed) {
    const int64_t* after = packed + 1 + packed[0] * (sizeof(Segment) / 8);
    std::vector<const Packed*> pieces;
    for (int64_t i = 0; i < after[0]; ++i) pieces.push_back((const Packed*)(after + 1) + i);
    auto parts = parts_of(packed);
    auto first = [](int64_t) { return 0; };
    bool four = !pieces.empty() && pieces[0]->bits == 4;  // all pieces of a store are alike
    return four ? few<BF16, 4>(call, scale, parts, pieces, first) : few<BF16, 8>(call, scale, parts, pieces, first);
}
