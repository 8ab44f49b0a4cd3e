// Keys and values packed to 8 or 4 bits (_quantized.py), read as float32 one tile at a time.
#pragma once
#include "vectors.h"

// As `Packed` in _quantized.py: a number is least + code * step. The scales of the keys are [groups, 2, D], those of
// the values [tokens, 2], in the dtype of the call. 4 bits: the low half of a byte is channel i, the high i + D / 2.
struct Packed {
    Heads k, k_scale, v, v_scale;
    int64_t length;
    const int64_t* lengths;
    int64_t bits, group;
    int64_t of(int64_t b) const { return lengths ? std::max<int64_t>(0, std::min(length, lengths[b])) : length; }
};
static_assert(sizeof(Packed) == 20 * 8, "native.py packs int64");

// W codes of a byte each, as whole numbers.
static inline vi bytes(const char* p) {
#if AVX512
    return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif AVX
    return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
    vi x;
    for (int l = 0; l < W; ++l) x[l] = (uint8_t)p[l];
    return x;
#endif
}
static inline vf as_float(vi x) { return __builtin_convertvector(x, vf); }

// Where the codes of channels d .. d + W lie in a token.
template <int BITS> struct Channels {
    int place = 0, shift = 0;
    Channels() {}
    Channels(int d, int dim) : place(d) {
        if (BITS == 4 && d >= dim / 2) place = d - dim / 2, shift = 4;
    }
    vf codes(const char* token) const {
        if constexpr (BITS == 8) return as_float(bytes(token + place));
        else return as_float((bytes(token + place) >> shift) & 15);
    }
};

// Asks for the memory of a tile before it is needed, a line at a time: the CPU's own prefetching stops at every page.
struct Ahead {
    const char *p, *end;
    void line() {
        if (p < end) __builtin_prefetch(p), p += 64;
    }
};

// Scores of keys low .. low + count, of one group, with up to four query heads, in the layout of decode.h.
//
// q . (least + code * step) = q . least + (q * step) . code, and q * step is multiplied as three whole numbers of 7
// bits, of 21 bits together, where the CPU sums four products of bytes in one step: codes are never widened.
template <bool BF16, int BITS> class Scores {
    static constexpr int PARTS = 3;
    static constexpr float MOST = 1 << 20;  // of a whole number
    const int dim;
    Room room;
    float *const own;                // [HEADS][dim], queries
    char *const part;                // [dim / 16][PARTS][HEADS][16], of q * step
    float *const unit, *const rest;  // [HEADS][4], of what the whole numbers count; q . least

  public:
    explicit Scores(int dim)
        : dim(dim), room(HEADS * dim * (1 + PARTS) + 4 * W), own(room.take(HEADS * dim)),
          part((char*)room.take(HEADS * dim * PARTS / 4)), unit(room.take(W)), rest(room.take(W)) {}

    // Queries of ``heads`` heads from ``h`` on.
    void ask(const Heads& from, int64_t b, int64_t h, int heads) {
        memset(own, 0, sizeof(float) * HEADS * dim);
        for (int g = 0; g < heads; ++g)
            for (int d = 0; d < dim; ++d) own[g * dim + d] = number<BF16>(from.at(b, h + g), d);
    }

#if AVX512_VNNI
    void run(const Packed& x, int64_t b, int64_t n, int64_t low, int count, float* score, Ahead ahead) {
        split(x.k_scale.at(b, n, low / x.group));
        for (int j = 0; j < count; j += 4) {
            const char* row[4];
            __m512i sum[4][PARTS] = {};
            for (int r = 0; r < 4; ++r) row[r] = x.k.at(b, n, low + std::min(j + r, count - 1));
            for (int byte = 0; byte < dim * BITS / 8; byte += 16) {
                ahead.line();
                __m512i codes[4];
                for (int r = 0; r < 4; ++r)
                    codes[r] = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)(row[r] + byte)));
                if constexpr (BITS == 8) add(codes, byte / 16, sum);
                else {
                    const __m512i four = _mm512_set1_epi8(15);
                    __m512i half[4];
                    for (int r = 0; r < 4; ++r) half[r] = _mm512_and_si512(codes[r], four);
                    add(half, byte / 16, sum);
                    for (int r = 0; r < 4; ++r) half[r] = _mm512_and_si512(_mm512_srli_epi16(codes[r], 4), four);
                    add(half, (dim / 2 + byte) / 16, sum);
                }
            }
            vf whole[4];
            for (int r = 0; r < 4; ++r) {
                vf high = as_float((vi)sum[r][0]), middle = as_float((vi)sum[r][1]), low = as_float((vi)sum[r][2]);
                whole[r] = high * 16384.0f + middle * 128.0f + low;
            }
            store(score + j * HEADS, turned(sum_fours(whole[0], whole[1], whole[2], whole[3]) * load(unit) + load(rest)));
        }
    }

  private:
    void add(const __m512i* codes, int chunk, __m512i (&sum)[4][PARTS]) {
        for (int p = 0; p < PARTS; ++p) {
            __m512i y = _mm512_load_si512(part + (chunk * PARTS + p) * 64);
            for (int r = 0; r < 4; ++r) sum[r][p] = _mm512_dpbusd_epi32(sum[r][p], codes[r], y);
        }
    }

    void split(const char* steps) {
        constexpr int SIZE = BF16 ? 2 : 4;
        for (int g = 0; g < HEADS; ++g) {
            vf most = {}, known = {};
            for (int d = 0; d < dim; d += W) {
                vf y = load(own + g * dim + d), z = y * load_as_float<BF16>(steps + SIZE * d);
                most = larger(most, larger(z, -z));
                known += y * load_as_float<BF16>(steps + SIZE * (dim + d)) + z * 0.0f;  // a NaN comes through
            }
            float top = _mm512_reduce_max_ps((__m512)most), factor = top > 1e-30f ? MOST / top : 0;
            for (int d = 0; d < dim; d += W) {
                vf z = load(own + g * dim + d) * load_as_float<BF16>(steps + SIZE * d) * factor;
                __m512i whole = _mm512_cvtps_epi32((__m512)z), low = _mm512_set1_epi32(127);
                __m512i parts[] = {_mm512_srai_epi32(whole, 14), _mm512_and_si512(_mm512_srai_epi32(whole, 7), low),
                                   _mm512_and_si512(whole, low)};
                char* into = part + (d / 16 * PARTS * HEADS + g) * 16;
                for (int p = 0; p < PARTS; ++p)
                    _mm_store_si128((__m128i*)(into + p * HEADS * 16), _mm512_cvtepi32_epi8(parts[p]));
            }
            float sum = _mm512_reduce_add_ps((__m512)known);
            for (int l = 4 * g; l < 4 * g + 4; ++l) unit[l] = factor ? 1 / factor : 0, rest[l] = sum;
        }
    }
#endif
};

// Keys low .. low + count to ``into`` [count, dim], where there is no such instruction.
template <bool BF16, int BITS>
static void unpack_keys(const Packed& x, int64_t b, int64_t n, int64_t low, int count, int dim, float* into,
                        Ahead ahead) {
    constexpr int SIZE = BF16 ? 2 : 4;
    for (int done = 0, part; done < count; done += part) {
        int64_t slot = low + done;
        part = int(std::min<int64_t>(count - done, x.group - slot % x.group));
        const char *from = x.k.at(b, n, slot), *steps = x.k_scale.at(b, n, slot / x.group);
        const char* leasts = steps + SIZE * dim;
        float* to = into + done * dim;
        for (int d = 0; d < dim; d += W) {
            vf step = load_as_float<BF16>(steps + SIZE * d), least = load_as_float<BF16>(leasts + SIZE * d);
            Channels<BITS> at(d, dim);
            for (int j = 0; j < part; ++j) {
                if (!(j & 3)) ahead.line();
                store(to + j * dim + d, least + at.codes(from + j * x.k.token) * step);
            }
        }
    }
}
