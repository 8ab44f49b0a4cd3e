// Prefill: tiles of 64 queries over the rows of keys and values that each of them reads.
#pragma once
#include "decode.h"

constexpr int ROWS = W == 8 ? 6 : 8;      // rows of a register block: their sums fill 12 of 16 registers, or 16 of 32
constexpr int PANEL = 2 * W;              // queries of a register block
constexpr int64_t WORK = 1 << 22;         // multiplications that are worth making a thread, which takes 50 us
constexpr int64_t OWN_WORK = WORK / 8;    // that are worth waking one that is there
constexpr int FEW = 8;                    // queries, for fewer of which libraries sum more exactly, and so is done here

// The 64 queries of a tile lie in panels, each of them dense, so that a register block reads one cache line after the
// other (W = 8: four panels of 16 queries):
//
//     [row 0: queries 0..15][row 1: queries 0..15] ... [row 0: queries 16..31][row 1: queries 16..31] ...
//
// Where query ``i`` of row 0 lies, of arrays with ``rows`` rows.
static inline int64_t in_panels(int i, int rows) { return int64_t(i / PANEL) * PANEL * rows + i % PANEL; }

// out[row][query] = row . query for R rows and one panel. Sums run over ``run`` numbers, and then sums are summed: less
// rounding error.
template <bool Pair, int R>
static inline void score_block(const char* const* rows, const float* q, int units, int run, float* out) {
    const char* p[R];
    for (int r = 0; r < R; ++r) p[r] = rows[r];
    for (int begin = 0; begin < units; begin += run) {
        vf sum[R][2] = {};
        for (int u = begin; u < std::min(begin + run, units); ++u) {
            const vf low = load(q + u * PANEL), high = load(q + u * PANEL + W);
            for (int r = 0; r < R; ++r) {
                const vf key = splat_at(p[r] + 4 * u);
                sum[r][0] = multiply_add<Pair>(key, low, sum[r][0]);
                sum[r][1] = multiply_add<Pair>(key, high, sum[r][1]);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int l = 0; l < 2; ++l) {
                float* into = out + r * PANEL + l * W;
                store(into, begin ? load(into) + sum[r][l] : sum[r][l]);
            }
    }
}

// The same for a tile. ``count`` is ROWS or more; the last block begins early enough to be whole.
template <bool Pair>
static void scores(const char* const* rows, int count, const float* q, int units, int run, float* out) {
    for (int panel = 0; panel < TILE / PANEL; ++panel, q += units * PANEL, out += TILE * PANEL)
        for (int row = 0; row < count; row += ROWS) {
            const int at = std::min(row, count - ROWS);
            score_block<Pair, ROWS>(rows + at, q, units, run, out + at * PANEL);
        }
}

// out[d][query] = out[d][query] * decay[query] + sum over rows of row[d] * weight[row][query], for R channels from d on.
template <bool Pair, int R>
static inline void value_block(const char* const* rows, int count, const float* weight, const float* decay, int d, float* out) {
    vf sum[R][2] = {};
    for (int row = 0; row < count; ++row) {
        const vf low = load(weight + row * PANEL), high = load(weight + row * PANEL + W);
        const char* p = rows[row] + 4 * d;
        for (int r = 0; r < R; ++r) {
            const vf value = splat_at(p + 4 * r);
            sum[r][0] = multiply_add<Pair>(value, low, sum[r][0]);
            sum[r][1] = multiply_add<Pair>(value, high, sum[r][1]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int l = 0; l < 2; ++l) {
            float* into = out + (d + r) * PANEL + l * W;
            store(into, load(into) * load(decay + l * W) + sum[r][l]);
        }
}

// The same for a tile; ``weight_rows``: as many as a panel of weights has room for.
template <bool Pair>
static void values(const char* const* rows, int count, const float* weight, int weight_rows, const float* decay, int dim,
                   float* out) {
    for (int panel = 0; panel < TILE / PANEL; ++panel) {
        int d = 0;
        for (; d + ROWS <= dim; d += ROWS) value_block<Pair, ROWS>(rows, count, weight, decay, d, out);
        if (d + 4 <= dim) value_block<Pair, 4>(rows, count, weight, decay, d, out), d += 4;
        if (d < dim) value_block<Pair, 2>(rows, count, weight, decay, d, out);  // dim is even
        weight += weight_rows * PANEL, decay += PANEL, out += dim * PANEL;
    }
}

// Attention of up to 64 queries, at consecutive positions, over the rows it is given one after the other.
template <bool BF16> class Queries {
    static constexpr bool Pair = BF16 && PAIRS;
    static constexpr bool Convert = BF16 && !PAIRS;
    const int dim, units;
    const float scale, softcap;  // softcap: of scores before they are scaled, 0: none
    const Unit unit;             // of a score, in powers of two; a scaled q would be rounded once more
    Room room;
    float *const q, *const out, *const score, *const keys, *const vals, *const top, *const sum, *const decay;
    alignas(64) int32_t position[TILE];
    const char *k_row[TILE], *v_row[TILE], *v_unit[TILE];
    int32_t from[TILE], until[TILE];  // positions of the queries that see a row
    int queries = 0, count = 0, first = -1;  // first: the row of the first token
    bool edge = false;
    const char* origin = nullptr;  // where its key lies
    float first_bias = 0;          // of its scores, before they are scaled

  public:
    Queries(const Shape& shape, const Formula& formula)
        : dim(shape.dim), units(Pair ? dim / 2 : dim), scale(formula.scale), softcap(formula.softcap / formula.scale),
          unit(double(formula.scale) * LOG2E),
          room(TILE * (4 * dim + TILE + 3)), q(room.take(TILE * dim)), out(room.take(TILE * dim)),
          score(room.take(TILE * TILE)), keys(room.take(TILE * dim)), vals(room.take(TILE * dim)),
          top(room.take(TILE)), sum(room.take(TILE)), decay(room.take(TILE)) {}

    // ``key``: that of the first token, whose scores get ``bias``; null: it is not there, or gets none.
    void begin(const char* from_q, int64_t stride, int how_many, int32_t position_of_first, const char* key, float bias) {
        queries = how_many;
        count = 0, first = -1, edge = false;
        origin = key, first_bias = bias / scale;
        if (how_many < TILE) memset(q, 0, sizeof(float) * TILE * dim);
        for (int i = 0; i < how_many; ++i)
            for (int u = 0; u < units; ++u) {
                const char* p = from_q + i * stride;
                float* into_q = q + in_panels(i, units) + u * PANEL;
                if constexpr (Pair) memcpy(into_q, p + 4 * u, 4);
                else *into_q = number<BF16>(p, u);
            }
        memset(out, 0, sizeof(float) * TILE * dim);
        for (int i = 0; i < TILE; ++i) top[i] = LOWEST, sum[i] = 0, position[i] = position_of_first + std::min(i, how_many - 1);
    }

    // Rows ``pos .. pos + n`` with keys from k on; a query sees those at most ``window - 1`` before itself.
    void add(const char* k, int64_t k_stride, const char* v, int64_t v_stride, int64_t pos, int64_t n,
             int64_t window = INT_MAX) {
        for (int64_t j = 0; j < n; ++j) {
            k_row[count] = k + j * k_stride, v_row[count] = v + j * v_stride;
            from[count] = int32_t(pos + j);
            until[count] = int32_t(std::min<int64_t>(INT_MAX, pos + j + window - 1));
            if (origin && k_row[count] == origin) first = count;
            edge |= from[count] > position[0] || until[count] < position[TILE - 1];
            if (++count == TILE) flush();
        }
    }

    // ``lse``: of each query; null: not wanted.
    void end(char* into, int64_t stride, float* lse) {
        flush();
        for (int i = 0; lse && i < queries; ++i)
            lse[i] = sum[i] < 0.5f ? -__builtin_inff() : float(double(top[i]) * scale + std::log(double(sum[i])));
        for (int i = 0; i < TILE; ++i)
            if (sum[i] < 0.5f) sum[i] = __builtin_inff();  // it saw no key (what does has a sum of 1 or more): zeros
        for (int i = 0; i < queries; ++i)
            for (int d = 0; d < dim; ++d) {
                const float x = out[in_panels(i, dim) + d * PANEL] / sum[i];
                if constexpr (BF16) ((uint16_t*)(into + i * stride))[d] = to_bf16(x);
                else ((float*)(into + i * stride))[d] = x;
            }
    }

  private:
    void flush() {
        if (!count) return;
        const int whole = std::max((count + 1) / 2 * 2, ROWS);  // values are multiplied in pairs
        for (int j = count; j < whole; ++j) k_row[j] = k_row[count - 1], v_row[j] = v_row[count - 1];
        if constexpr (Convert) {
            widen_rows(k_row, keys, whole);
            widen_rows(v_row, vals, whole);
        }
        scores<Pair>(k_row, whole, q, units, queries < FEW ? TILE / 4 : TILE, score);
        if (softcap)
            each_vector(0, count, [&](float* s, int) { store(s, capped(load(s), softcap)); });
        if (first >= 0) each_vector(first, first + 1, [&](float* s, int) { store(s, load(s) + first_bias); });
        if (edge) hide();
        soften(whole);
        if constexpr (Pair) {
            pair_values(whole);
            values<true>(v_unit, whole / 2, score, TILE, decay, dim, out);
        } else {
            values<false>(v_row, count, score, TILE, decay, dim, out);
        }
        count = 0, first = -1, edge = false;
    }

    void widen_rows(const char** rows, float* into, int n) {
        for (int j = 0; j < n; ++j, into += dim) {
            for (int d = 0; d < dim; d += W) store(into + d, widen(rows[j] + 2 * d));
            rows[j] = (const char*)into;
        }
    }

    void hide() {
        const float infinite = __builtin_inff();
        for (int j = 0; j < count; ++j) {
            if (from[j] <= position[0] && until[j] >= position[TILE - 1]) continue;
            each_vector(j, j + 1, [&](float* s, int lane) {
                vi at = *(const vi*)(position + lane), seen = (at >= splat(from[j])) & (at <= splat(until[j]));
                store(s, seen ? load(s) : splat(-infinite));
            });
        }
    }

    // Calls each(scores of W queries, the first of them) for the rows low .. high.
    template <class Each> void each_vector(int low, int high, Each each) {
        for (int lane = 0; lane < TILE; lane += W)
            for (int j = low; j < high; ++j) each(score + in_panels(lane, TILE) + j * PANEL, lane);
    }

    // Scores to weights, two rows to a row of pairs where values are multiplied in pairs.
    void soften(int whole) {
        const Unit unit = this->unit;  // a copy of this function's own: stores to scores do not reach it
        for (int lane = 0; lane < TILE; lane += W) {
            float* s = score + in_panels(lane, TILE);
            vf most = load(s), old = load(top + lane), total = {};
            for (int j = 1; j < count; ++j) most = larger(load(s + j * PANEL), most);
            most = larger(most, old);
            for (int j = 0; j < whole; j += 2) {
                vf x[2] = {};
                for (int r = 0; r < 2 && j + r < count; ++r) {
                    x[r] = power(load(s + (j + r) * PANEL) - most, unit);
                    total += x[r];
                }
                if constexpr (Pair) store(s + j / 2 * PANEL, pair(x[0], x[1]));
                else store(s + j * PANEL, x[0]), store(s + (j + 1) * PANEL, x[1]);
            }
            vf fade = power(old - most, unit);
            store(decay + lane, fade);
            store(top + lane, most);
            store(sum + lane, load(sum + lane) * fade + total);
        }
    }

    static vf pair(vf a, vf b) {
#if AVX512_BF16
        alignas(64) static const uint16_t ORDER[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
        return (vf)_mm512_permutexvar_epi16(_mm512_load_si512(ORDER), both);
#else
        return a + b;  // not reached
#endif
    }

    void pair_values(int n) {
        for (int j = 0; j < n; j += 2) {
            float* into = vals + j / 2 * dim;
            for (int d = 0; d < dim; d += W) {
                vi low = (vi)widen(v_row[j] + 2 * d) >> 16, high = (vi)widen(v_row[j + 1] + 2 * d);
                store(into + d, (vf)((low & 0xffff) | high));
            }
            v_unit[j / 2] = (const char*)into;
        }
    }
};

// A tile of queries per item, the last and longest ones first; items that follow one another share a KV head. ``keys``
// is about how many a query reads.
template <bool BF16, class Tile>
static int prefill(const Shape& s, const Formula& formula, int64_t tiles, int64_t keys, Tile tile) {
    int64_t group = s.heads / s.kv_heads, items = s.batch * s.heads * tiles;
    int64_t worth = int64_t(double(items) * keys * std::min<int64_t>(s.q_len, TILE) * s.dim / (has_team() ? OWN_WORK : WORK));
    std::deque<Queries<BF16>> team;
    for (int64_t i = 0; i < std::max<int64_t>(1, std::min({s.threads, items, worth})); ++i) team.emplace_back(s, formula);
    return parallel(items, int64_t(team.size()), [&](int64_t item, int64_t worker) {
        int64_t t = tiles - 1 - item / group % tiles, head = item / group / tiles;
        tile(team[worker], head / s.kv_heads, head % s.kv_heads, head % s.kv_heads * group + item % group, t);
    });
}

// What a tile of queries begins and ends with: queries low .. high of head h, the first at ``position``.
template <bool BF16>
static void begin(Queries<BF16>& tile, const Call& call, int64_t b, int64_t h, int64_t low, int64_t high, int64_t position,
                  const char* key) {
    tile.begin(call.q.at(b, h, low), call.q.token, int(high - low), int32_t(position), call.first_bias ? key : nullptr,
               call.first_bias ? call.first_bias[h] : 0);
}
template <bool BF16> static void end(Queries<BF16>& tile, const Call& call, int64_t b, int64_t h, int64_t low) {
    const Shape& s = call.shape;
    tile.end(call.out.at(b, h, low), call.out.token, call.lse ? call.lse + (b * s.heads + h) * s.q_len + low : nullptr);
}

// Every key of all segments but the last; of the last one, where ``packed[0]`` says so, up to each query.
template <bool BF16> static int dense(const Call& call, const Formula& formula, const int64_t* packed) {
    const Shape& s = call.shape;
    const bool causal = *packed++;
    const Segment *segments = (const Segment*)(packed + 1), &own = segments[packed[0] - 1];
    auto origin = [&](int64_t b, int64_t n) { return first_key(segments, packed[0], b, n); };
    if (s.q_len <= FEW_TOKENS) {
        std::vector<Part> parts = parts_of(packed);
        if (causal) parts.back().base = 0;
        return few<BF16, 8>(call, formula, parts, {}, [&](int64_t b) { return own.of(b) - s.q_len; }, origin);
    }
    int64_t tiles = (s.q_len + TILE - 1) / TILE, keys = 0;
    for (const Segment* segment = segments; segment <= &own; ++segment) keys += segment->length;
    return prefill<BF16>(s, formula, tiles, keys, [&](Queries<BF16>& tile, int64_t b, int64_t n, int64_t h, int64_t t) {
        int64_t low = t * TILE, high = std::min(low + TILE, s.q_len);
        int64_t first = own.of(b) - s.q_len;  // slot of the first query; negative where a row is shorter
        begin(tile, call, b, h, low, high, first + low, origin(b, n));
        for (const Segment* past = segments; past != &own; ++past)
            tile.add(past->k.at(b, n), past->k.token, past->v.at(b, n), past->v.token, EARLIER, past->of(b));
        tile.add(own.k.at(b, n), own.k.token, own.v.at(b, n), own.v.token, causal ? 0 : EARLIER,
                 causal ? first + high : own.of(b));
        end(tile, call, b, h, low);
    });
}

template <bool BF16> static int streaming(const Call& call, const Formula& formula, const int64_t* packed) {
    const Shape& s = call.shape;
    const int64_t first = packed[0], recent = packed[1];
    const Segment &sinks = *(const Segment*)(packed + 2), &band = *(&sinks + 1);
    int64_t start = first + band.length - s.q_len;  // position of the first query
    auto origin = [&](int64_t b, int64_t n) -> const char* {
        return sinks.length || !first ? first_key(&sinks, 2, b, n) : nullptr;
    };
    if (s.q_len <= FEW_TOKENS) {
        int64_t oldest = std::max(first, start - recent + 1);
        std::vector<Part> parts{{&sinks, 0}, {&band, first, recent, oldest - first}};
        return few<BF16, 8>(call, formula, parts, {}, [&](int64_t) { return start; }, origin);
    }
    int64_t tiles = (s.q_len + TILE - 1) / TILE, keys = sinks.length + std::min(recent + TILE, band.length);
    return prefill<BF16>(s, formula, tiles, keys, [&](Queries<BF16>& tile, int64_t b, int64_t n, int64_t h, int64_t t) {
        int64_t low = t * TILE, high = std::min(low + TILE, s.q_len);
        begin(tile, call, b, h, low, high, start + low, origin(b, n));
        tile.add(sinks.k.at(b, n), sinks.k.token, sinks.v.at(b, n), sinks.v.token, 0,
                 std::min(sinks.length, start + high));
        int64_t oldest = std::max(first, start + low - recent + 1), skip = oldest - first;
        tile.add(band.k.at(b, n, skip), band.k.token, band.v.at(b, n, skip), band.v.token, oldest,
                 start + high - oldest, recent);
        end(tile, call, b, h, low);
    });
}

// Ranges of row positions as ranges of slots, in segments that follow one another.
class Places {
    const Segment* segments;
    std::vector<int64_t> starts{0};  // of each segment, and the end of the last

  public:
    Places(const Segment* segments, int64_t count) : segments(segments) {
        for (int64_t i = 0; i < count; ++i) starts.push_back(starts.back() + segments[i].length);
    }

    // Calls each(range) with the parts of the positions low .. high, in their order.
    template <class Each> void visit(int64_t low, int64_t high, Each each) const {
        for (size_t i = std::upper_bound(starts.begin(), starts.end(), low) - starts.begin() - 1; low < high; ++i) {
            int64_t stop = std::min(high, starts[i + 1]);
            if (low < stop) each(Range{segments + i, starts[i], low - starts[i], stop - starts[i]});
            low = stop;
        }
    }
};

// What one query block of a list reads: columns that lie before it in no listed block, then blocks, up to ``high``.
template <class Each>
static void listed(const Lists& list, int64_t b, int64_t nth, int64_t row, int64_t high, Each each) {
    const int64_t at = b * list.heads + nth, line = at * list.query_blocks + row;
    const int64_t begin = (list.first / list.block + row) * list.block;
    const int32_t *blocks = list.indices + line * list.width, *last = blocks + list.counts[line];
    const int32_t *column = list.columns + at * list.columns_width, *end = column + list.column_counts[at];
    const int32_t* block = blocks;
    for (; column < end && *column < begin; ++column) {
        while (block < last && *block < *column / list.block) ++block;
        if (block == last || *block != *column / list.block) each(*column, *column + 1);
    }
    for (; blocks < last; ++blocks) {
        int64_t pos = *blocks * list.block;
        each(pos, std::max(pos, std::min(pos + list.block, high)));
    }
}

// Few queries of one query block: no tile of 64 is filled with them. Lists by query head make each a KV head of its own.
template <bool BF16>
static int sparse_few(const Call& call, const Formula& formula, const Lists& list, const Places& places,
                      const Segment* segments, int64_t count) {
    Shape s = call.shape;
    const int64_t each = list.heads / s.kv_heads;
    s.kv_heads = list.heads;
    Work<BF16, 8> work(call, formula, s);
    for (int64_t b = 0; b < s.batch; ++b)
        for (int64_t n = 0; n < s.kv_heads; ++n) {
            work.next_head();
            listed(list, b, n, 0, list.kv_len, [&](int64_t low, int64_t high) {
                places.visit(low, high, [&](Range range) { work.add(b, n, n / each, range, INT_MAX, true); });
            });
        }
    return work.run([&](int64_t) { return list.first; },
                    [&](int64_t b, int64_t n) { return first_key(segments, count, b, n); });
}

template <bool BF16> static int sparse(const Call& call, const Formula& formula, const int64_t* packed) {
    const Shape& s = call.shape;
    const Lists& list = *(const Lists*)packed;
    const int64_t* rest = (const int64_t*)(&list + 1);
    const Segment* segments = (const Segment*)(rest + 1);
    const Places places(segments, rest[0]);
    if (list.query_blocks == 1 && s.q_len <= FEW_TOKENS)
        return sparse_few<BF16>(call, formula, list, places, segments, rest[0]);
    int64_t cuts = (list.block + TILE - 1) / TILE;  // tiles of a query block
    int64_t tiles = list.query_blocks * cuts, keys = std::min(list.kv_len, list.width * list.block + list.columns_width);
    return prefill<BF16>(s, formula, tiles, keys, [&](Queries<BF16>& tile, int64_t b, int64_t n, int64_t h, int64_t t) {
        int64_t row = t / cuts, begin_at = (list.first / list.block + row) * list.block;
        int64_t low = std::max(list.first, begin_at + t % cuts * TILE);
        int64_t high = std::min({list.kv_len, begin_at + list.block, begin_at + (t % cuts + 1) * TILE});
        if (low >= high) return;
        begin(tile, call, b, h, low - list.first, high - list.first, low, first_key(segments, rest[0], b, n));
        listed(list, b, h * list.heads / s.heads, row, high, [&](int64_t from, int64_t until) {
            places.visit(from, until, [&](Range range) {
                const Heads &k = range.segment->k, &v = range.segment->v;
                tile.add(k.at(b, n, range.low), k.token, v.at(b, n, range.low), v.token, range.base + range.low,
                         range.high - range.low);
            });
        });
        end(tile, call, b, h, low - list.first);
    });
}
