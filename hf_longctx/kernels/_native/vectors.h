// Vectors of float32, as wide as this CPU's, and what prefill.h and decode.h need of them; the interface with native.py.
#pragma once
#include <algorithm>
#include <atomic>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <thread>
#include <type_traits>
#include <unistd.h>
#include <vector>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define AVX512 1
constexpr int W = 16;  // floats of a vector
#elif defined(__AVX2__) && defined(__FMA__)
#define AVX512 0
#define AVX 1
constexpr int W = 8;
#else
#define AVX512 0
constexpr int W = 4;
#endif
#if AVX512 && defined(__AVX512VNNI__)
#define AVX512_VNNI 1  // sums products of bytes
#endif
#if AVX512 && defined(__AVX512BF16__)
#define AVX512_BF16 1
constexpr bool PAIRS = true;  // of bfloat16 are multiplied and summed in one step
#else
constexpr bool PAIRS = false;
#endif
constexpr int TILE = 64;               // queries of a tile, and keys
constexpr int LANES = W == 8 ? 2 : 4;  // vectors of a row of a register block: 16 registers hold 4 x 2, 32 hold 4 x 4
constexpr int HEADS = 4;               // of a party in decode.h: queries whose scores are neighbours
constexpr float LOWEST = -1e30f;       // maximum of no scores: finite, because -inf - -inf is NaN
constexpr double LOG2E = 1.44269504088896341;

typedef float vf __attribute__((vector_size(4 * W), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * W), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * W), may_alias));

struct Heads {  // a tensor [B, heads, tokens, D], strides in bytes
    char* data;
    int64_t batch, head, token;
    char* at(int64_t b, int64_t h, int64_t t = 0) const { return data + b * batch + h * head + t * token; }
};
struct Shape {  // of the queries; threads: at most
    int64_t batch, heads, kv_heads, q_len, dim, threads;
};
struct Call {  // what every entry point begins with
    Shape shape;
    Heads q, out;
    float* lse;               // [B, H, T]; null: not wanted
    const float* first_bias;  // [H], added to the score of the first token; null: none
};
struct Formula {  // of a score: softcap * tanh(scale * q . k / softcap); softcap 0: none
    float scale, softcap;
};
struct Segment {  // as in layout.py; ``lengths`` [B] overrides ``length``; strides of the bias in numbers
    Heads k, v;
    int64_t length;
    const int64_t* lengths;
    const float* bias;
    int64_t bias_batch, bias_head, bias_key;
    int64_t of(int64_t b) const { return lengths ? std::max<int64_t>(0, std::min(length, lengths[b])) : length; }
};
struct Ragged {  // of layout/ragged.py: tokens one after the other, in parts of each sequence and KV head; strides in bytes
    char *k, *v;
    int64_t k_token, v_token;
    const int64_t *starts, *lengths;  // [B, n]
    const float* bias;                // of each token; null: none
    int64_t tokens;
    // Whether the first ``count`` parts lie within the tokens.
    bool holds(int64_t count) const {
        bool all = true;
        for (int64_t i = 0; i < count; ++i)
            all &= starts[i] >= 0 && lengths[i] >= 0 && starts[i] <= tokens && lengths[i] <= tokens - starts[i];
        return all;
    }
    // A part by itself: whatever sequence and KV head it is asked for, it is theirs.
    Segment part(int64_t at) const {
        const int64_t start = starts[at];
        return {{k + start * k_token, 0, 0, k_token}, {v + start * v_token, 0, 0, v_token}, lengths[at], nullptr,
                bias ? bias + start : nullptr, 0, 0, 1};
    }
};
struct HeadPages {  // of layout/head_pages.py; strides in bytes
    char *k, *v;
    int64_t k_token, v_token;
    const int64_t *pages, *heads, *lengths;  // [B, width], [n], [B]
    int64_t width, page, rows;
    // Whether the pages of ``batch`` sequences and ``count`` KV heads lie within the rows.
    bool holds(int64_t batch, int64_t count) const {
        bool all = page > 0;
        int64_t high = 0;  // of the heads
        for (int64_t n = 0; n < count; ++n)
            high = std::max(high, heads[n]), all &= heads[n] >= 0 && heads[n] < rows;
        for (int64_t b = 0; all && b < batch; ++b) {
            all &= lengths[b] >= 0 && lengths[b] <= width * page;
            for (int64_t left = all ? lengths[b] : 0, i = 0; left > 0; left -= page, ++i) {
                const int64_t start = pages[b * width + i];
                all &= start >= 0 && start < rows && start + high + std::min(left, page) <= rows;
            }
        }
        return all;
    }
    // A page by itself: whatever sequence and KV head it is asked for, it is theirs.
    Segment part(int64_t b, int64_t n, int64_t i) const {
        const int64_t start = pages[b * width + i] + heads[n];
        return {{k + start * k_token, 0, 0, k_token}, {v + start * v_token, 0, 0, v_token},
                std::min(page, lengths[b] - i * page), nullptr, nullptr, 0, 0, 0};
    }
};
constexpr int OUTSIDE = -2;  // what an entry point returns where a part lies outside of its tokens
struct Lists {  // a BlockList of layout.py, contiguous
    int64_t block, first, kv_len, heads, query_blocks, width, columns_width;
    const int32_t *indices, *counts, *columns, *column_counts;
};
static_assert(sizeof(Call) == 16 * 8 && sizeof(Segment) == 14 * 8 && sizeof(Ragged) == 8 * 8 &&
                  sizeof(HeadPages) == 10 * 8 && sizeof(Lists) == 11 * 8,
              "native.py packs int64");

static inline vf load(const float* p) { vf x; memcpy(&x, p, sizeof x); return x; }
static inline void store(float* p, vf x) { memcpy(p, &x, sizeof x); }
static inline vf splat(float x) { return x - vf{}; }
static inline vi splat(int32_t x) { return x - vi{}; }
static inline vf widen(const char* p) { vh x; memcpy(&x, p, sizeof x); return (vf)(__builtin_convertvector(x, vi) << 16); }
template <bool BF16> static inline vf load_as_float(const char* p) { return BF16 ? widen(p) : load((const float*)p); }

// Of 2 W numbers of bfloat16.
static inline vf even_numbers(vf both) { return (vf)((vi)both << 16); }
static inline vf odd_numbers(vf both) { return (vf)((vi)both & splat(int32_t(0xffff0000))); }

template <bool BF16> static inline float number(const char* p, int64_t i) {
    if constexpr (!BF16) return ((const float*)p)[i];
    uint32_t bits = uint32_t(((const uint16_t*)p)[i]) << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
static inline uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static inline vf larger(vf a, vf b) {
#if AVX512
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(AVX)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

// A factor of exponents in two parts, because rounded to one it would be wrong by 1e-7 of an exponent that may be 100.
struct Unit {
    float high, low, least;  // ``least`` times the factor is the exponent below which 2^ is taken as if there
    explicit Unit(double factor)
        : high(float(factor)), low(float(factor - high)), least(float((AVX512 ? -200 : -126) / factor)) {}
};

// 2^(x * unit) for x <= 0, relative error 1e-7; below the range of float32 zero, or with the portable code 1e-38.
static inline vf power(vf x, const Unit& unit) {
    x = larger(splat(unit.least), x);  // a NaN comes through
#if AVX512
    vf n = (vf)_mm512_roundscale_ps((__m512)(x * unit.high), 8);
#else
    const vf whole = x * unit.high + 12582912.0f;  // adding 1.5 * 2^23 rounds: the number is in the lowest bits
    vf n = whole - 12582912.0f;
#endif
    vf f = x * unit.high - n + x * unit.low, y = f * 1.534593611e-4f + 1.339999028e-3f;
    y = y * f + 9.618489072e-3f;
    y = y * f + 5.550328642e-2f;
    y = y * f + 0.2402264625f;
    y = y * f + 0.6931471825f;
    y = y * f + 1.0f;
#if AVX512
    return (vf)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
    return y * (vf)(((vi)whole + 127) << 23);
#endif
}

// softcap * tanh(x / softcap), relative error 2e-7: a polynomial near 0, where 1 - e^-2x cancels.
static const Unit TWICE{2 * LOG2E};
static inline vf capped(vf x, float softcap) {
    const vf y = x * (1 / softcap), size = larger(y, -y), square = y * y;
    vf near = square * 2.059580997e-3f - 8.085626621e-3f;
    near = near * square + 2.166340315e-2f;
    near = near * square - 5.393994256e-2f;
    near = near * square + 0.1333315218f;
    near = near * square - 0.3333332944f;
    near = y + y * square * near;
    const vf fade = power(-size, TWICE), far = (1.0f - fade) / (1.0f + fade);
    const vf signed_far = y < splat(0.0f) ? -far : far;
    return softcap * (size < splat(0.65f) ? near : signed_far);
}

// sum + a * b; ``Pair``: of pairs of bfloat16.
template <bool Pair> static inline vf multiply_add(vf a, vf b, vf sum) {
#if AVX512_BF16
    if constexpr (Pair) return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
    return sum + a * b;
}

// The number, or the pair, at p in all lanes.
static inline vf splat_at(const char* p) {
    float a;
    memcpy(&a, p, 4);
    return splat(a);
}

// The four numbers at p in every quarter.
static inline vf fours(const float* p) {
#if AVX512
    return (vf)_mm512_broadcast_f32x4(_mm_loadu_ps(p));
#elif AVX
    return (vf)_mm256_broadcast_ps((const __m128*)p);
#else
    return load(p);
#endif
}

// In lane l the number l / 4 at p.
static inline vf spread(const float* p) {
#if AVX512
    const __m512i order = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    return (vf)_mm512_permutexvar_ps(order, _mm512_broadcast_f32x4(_mm_loadu_ps(p)));
#else
    vf x;
    for (int l = 0; l < W; ++l) x[l] = p[l / 4];
    return x;
#endif
}

#if AVX512
// In every quarter of four lanes: the sum of that quarter of a, of b, of c and of d.
static inline vf sum_fours(vf a, vf b, vf c, vf d) {
    __m512 x = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
    __m512 y = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
    return (vf)_mm512_add_ps(_mm512_shuffle_ps(x, y, 0x44), _mm512_shuffle_ps(x, y, 0xee));
}
#endif

static inline vf add(vf a, vf b) { return a + b; }

// Joins the quarters by ``join(vf, vf)``; every quarter holds the answer.
template <class Join> static inline vf over_quarters(vf x, Join join) {
#if AVX512
    x = join(x, (vf)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0x4e));
    return join(x, (vf)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0xb1));
#elif AVX
    return join(x, (vf)_mm256_permute2f128_ps((__m256)x, (__m256)x, 1));
#else
    return x;
#endif
}

// The first quarter.
static inline void store_four(float* p, vf x) { memcpy(p, &x, 16); }

// Four lanes of four quarters to the fourth lanes of ...: the transpose of a square of 4 x 4.
#if AVX512
static inline vf turned(vf x) {
    const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    return (vf)_mm512_permutexvar_ps(order, (__m512)x);
}
#endif

// The W / 4 numbers at p, four times.
static inline vf repeat_part(const char* p) {
#if AVX512
    return (vf)_mm512_broadcast_f32x4(_mm_loadu_ps((const float*)p));
#elif AVX
    double two;
    memcpy(&two, p, 8);
    return (vf)_mm256_set1_pd(two);
#else
    return splat_at(p);
#endif
}

// Of W / 4 vectors with W / 4 numbers of each of four heads: the sums of those, one vector's after the other's.
static inline vf sum_parts(const vf* x) {
#if AVX512
    return turned(sum_fours(x[0], x[1], x[2], x[3]));
#elif AVX
    __m256 low = _mm256_shuffle_ps((__m256)x[0], (__m256)x[1], 0x88), high = _mm256_shuffle_ps((__m256)x[0], (__m256)x[1], 0xdd);
    return (vf)_mm256_permute4x64_pd((__m256d)_mm256_add_ps(low, high), 0xd8);
#else
    return x[0];
#endif
}

// Numbers aligned to a cache line, in one piece of memory per thread.
class Room {
    std::vector<float> memory;
    size_t used = 0;

  public:
    explicit Room(size_t size) : memory(size + 16) {}
    float* take(size_t size) {
        float* start = memory.data() + (16 - (uintptr_t(memory.data()) / 4) % 16) % 16 + used;
        used += (size + 15) / 16 * 16;
        return start;
    }
};

// What runs a function in some threads at once, as compilers call it for OpenMP: start(function, data, threads, flags).
typedef void (*Start)(void (*)(void*), void*, unsigned, unsigned);
static Start start_team = nullptr;  // of the OpenMP library that torch uses; null: none
static pid_t team_of = 0;           // the process whose threads those are: a forked child has none of them

static inline bool has_team() { return start_team && team_of == getpid(); }

// Runs work(item, worker) for every item, on as many threads as were asked for or the system gives; returns how many.
//
// They are torch's own where that is known: torch's threads wait for their next work for milliseconds without a rest, and
// others would have to share the cores with them. Else they live for one call, so that a fork finds none.
template <class Work> static int parallel(int64_t items, int64_t threads, Work work) {
    std::atomic<int64_t> next{0};
    std::atomic<int> workers{0};
    auto run = [&] {
        const int worker = workers.fetch_add(1);
        for (int64_t item; (item = next.fetch_add(1)) < items;) work(item, worker);
    };
    if (threads > 1 && has_team()) {
        start_team([](void* data) { (*(decltype(run)*)data)(); }, &run, unsigned(threads), 0);
        return workers;
    }
    std::vector<std::thread> team;
    try {
        for (int64_t worker = 1; worker < threads; ++worker) team.emplace_back(run);
    } catch (const std::exception&) {
    }
    run();
    for (auto& thread : team) thread.join();
    return workers;
}
