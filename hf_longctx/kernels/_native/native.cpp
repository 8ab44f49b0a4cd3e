// Attention on the CPU for native.py: rows of keys and values, wherever they lie, in tiles, with an online softmax.
//
// Every tensor comes as a pointer and three strides in bytes (row of the batch, head, token); its last dimension is
// dense and D a multiple of 16. A prefill keeps 64 queries in the lanes of its vectors, so that it needs keys one number
// at a time and reads them where they are: blocks, columns, sinks and windows are all just rows. bfloat16 is multiplied
// in pairs where the CPU can (AVX512_BF16), else converted to float32 tile by tile. Softmax and sums are float32.
#include "decode.h"
#include "prefill.h"
#include "select.h"

// An entry point takes a Call and what its function reads, packed as int64; it returns how many threads worked, 0 where
// memory ran out, -1 where query heads are not shared out evenly among KV heads, or OUTSIDE.
#define ENTRY(name)                                                                                  \
    extern "C" int hf_longctx_##name(int bf16, double scale, double softcap, const int64_t* packed) { \
        try {                                                                                        \
            const Call& call = *(const Call*)packed;                                                 \
            if (call.shape.kv_heads < 1 || call.shape.heads % call.shape.kv_heads) return -1;        \
            const int64_t* rest = packed + sizeof(Call) / 8;                                         \
            const Formula formula{float(scale), float(softcap)};                                     \
            return bf16 ? name<true>(call, formula, rest) : name<false>(call, formula, rest);        \
        } catch (const std::exception&) {                                                            \
            return 0;                                                                                \
        }                                                                                            \
    }
ENTRY(dense)
ENTRY(decode)
ENTRY(step)
ENTRY(paged)
ENTRY(streaming)
ENTRY(sparse)
ENTRY(pages)

// In the text, so that a cache of the compiler's (ccache) that machines share never gives the object for another CPU.
#define AS_TEXT(x) #x
#define TEXT(x) AS_TEXT(x)
extern "C" const char* hf_longctx_key() { return TEXT(HF_LONGCTX_KEY); }
extern "C" int hf_longctx_width() { return W; }
extern "C" const char* hf_longctx_arch() {
#if AVX512_BF16
    return "avx512-bf16";
#elif AVX512
    return "avx512";
#else
    return W == 8 ? "avx2" : "other";
#endif
}
extern "C" void hf_longctx_share_threads(Start start) { start_team = start, team_of = getpid(); }
