// Keys and values packed to 8 or 4 bits (_quantized.py), read as float32 one tile at a time.
#pragma once
#include "vectors.h"

// As `Packed` in _quantized.py: a number is least + code * step. The scales of the keys are [groups, 2, D], those of the
// values [tokens, 2], in the dtype of the call. 4 bits: the low half of a byte is channel i, the high half i + D / 2.
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

// Asks for the memory of a tile before it is needed, a line at a time: the CPU's own prefetching stops at every page.
struct Ahead {
    const char *p, *end;
    void line() {
        if (p < end) __builtin_prefetch(p), p += 64;
    }
};

// Keys low .. low + count to ``into`` [count, dim]. A channel's step and least number stay in registers for a group.
template <bool BF16>
static void unpack_keys(const Packed& x, int64_t b, int64_t n, int64_t low, int count, int dim, float* into, Ahead ahead) {
    constexpr int SIZE = BF16 ? 2 : 4;
    for (int done = 0, part; done < count; done += part) {
        int64_t slot = low + done;
        part = int(std::min<int64_t>(count - done, x.group - slot % x.group));
        const char *from = x.k.at(b, n, slot), *steps = x.k_scale.at(b, n, slot / x.group), *leasts = steps + SIZE * dim;
        float* to = into + done * dim;
        if (x.bits == 8)
            for (int d = 0; d < dim; d += W) {
                vf step = load_as_float<BF16>(steps + SIZE * d), least = load_as_float<BF16>(leasts + SIZE * d);
                for (int j = 0; j < part; ++j) {
                    if (!(j & 3)) ahead.line();
                    store(to + j * dim + d, least + as_float(bytes(from + j * x.k.token + d)) * step);
                }
            }
        else
            for (int d = 0, half = dim / 2; d < half; d += W) {
                vf step = load_as_float<BF16>(steps + SIZE * d), least = load_as_float<BF16>(leasts + SIZE * d);
                vf step_high = load_as_float<BF16>(steps + SIZE * (half + d));
                vf least_high = load_as_float<BF16>(leasts + SIZE * (half + d));
                for (int j = 0; j < part; ++j) {
                    if (!(j & 3)) ahead.line();
                    vi pair = bytes(from + j * x.k.token + d);
                    store(to + j * dim + d, least + as_float(pair & 15) * step);
                    store(to + j * dim + half + d, least_high + as_float(pair >> 4) * step_high);
                }
            }
    }
}

// The same of values.
template <bool BF16>
static void unpack_values(const Packed& x, int64_t b, int64_t n, int64_t low, int count, int dim, float* into, Ahead ahead) {
    for (int j = 0; j < count; ++j) {
        const char *from = x.v.at(b, n, low + j), *scale = x.v_scale.at(b, n, low + j);
        vf step = splat(number<BF16>(scale, 0)), least = splat(number<BF16>(scale, 1));
        float* to = into + j * dim;
        ahead.line();
        if (x.bits == 8) {
            ahead.line();
            for (int d = 0; d < dim; d += W) store(to + d, least + as_float(bytes(from + d)) * step);
        } else
            for (int d = 0, half = dim / 2; d < half; d += W) {
                vi pair = bytes(from + d);
                store(to + d, least + as_float(pair & 15) * step);
                store(to + half + d, least + as_float(pair >> 4) * step);
            }
    }
}
