/* Linear layers on integer weights and float activations (W4A16 and W8A16) in one call.

       y[m, n] = activation(sum_g scale[n, g] * sum over k in group g of x[m, k] * (u[n, k] - z[n, g]) + bias[n]) + residual

   Rows of x are rounded to the compute dtype first. The integers are exact in every float format, so the scales go to the
   sums, in float32, and a weight is widened in registers where it is multiplied, or, for many rows of float32, once for
   all of them (weight_only_wide.h). Where the processor multiplies pairs of bfloat16, bfloat16 is multiplied as such;
   everything else is multiplied in float32. In pairs a nibble stands for u - 8, and (z - 8) times the sum of the group's
   activations is taken off. With AVX-512 there is no `zero` where every z is 8.

   int8 weights are one group with one scale for each channel. Weights are packed in panels of PANEL output channels:

       int4: packed[panel][k / 8][channel] words, nibble t the column 2 t, nibble 4 + t the column 2 t + 1
       int8: packed[panel][k][channel] bytes, k rounded up to 8                       scale, zero: [panel][group][channel] */
#include "amx.h"
#include "epilogue.h"
#include "nibbles.h"
#include "parallel.h"
#include "program.h"

/* ROW_GROUP: rows for which a segment of a panel is widened once; their sums stay in the first-level cache. FEW_ROWS: so
   many are multiplied without tiles. */
#if defined(__AVX2__) && !defined(__AVX512F__)
enum { ROW_GROUP = 192 };
#else
enum { ROW_GROUP = 96 };
#endif
enum { PART = 512, FEW_ROWS = 6 };

/* How threads share the work, as in int8_linear.c. TOGETHER: each converts some rows, all wait, each takes panels. ALL: each
   converts all rows for itself. BY_ROWS: each takes rows, converts them and multiplies them by the whole weight. */
enum { TOGETHER, ALL, BY_ROWS };

static int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

#if defined(__AVX512F__)
INLINE floats floats_zero(void) { return _mm512_setzero_ps(); }
INLINE floats floats_times(floats v, float s) { return _mm512_mul_ps(v, _mm512_set1_ps(s)); }
INLINE floats floats_fma(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }
/* z - 8 */
INLINE floats centred_zeros(const uint8_t *z) {
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(load_zeros(z), _mm512_set1_epi32(8)));
}
INLINE floats widen_bytes(const uint8_t *w) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)w)));
}
/* Nibble `at` of each word, less 8. */
INLINE floats nibbles_less_8(const uint8_t *w, int at) {
    const floats table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    /* The permutation looks at the low four bits of an index and at no other. */
    return _mm512_permutexvar_ps(_mm512_srli_epi32(_mm512_loadu_si512(w), 4 * at), table);
}
/* The same less `zero`. */
INLINE floats widen_nibbles(const uint8_t *w, int at, floats zero) {
    return _mm512_sub_ps(nibbles_less_8(w, at), zero);
}
/* Written out, as for AVX2 below. */
INLINE floats add_product(floats sum, floats w, const float *x) {
    __asm__("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(w), "v"(_mm512_set1_ps(*x)));
    return sum;
}
#elif defined(__AVX2__)
INLINE floats floats_zero(void) { return _mm256_setzero_ps(); }
INLINE floats floats_fma(floats a, floats b, floats c) { return _mm256_fmadd_ps(a, b, c); }
INLINE floats centred_zeros(const uint8_t *z) { return _mm256_cvtepi32_ps(load_zeros(z)); }
INLINE floats widen_bytes(const uint8_t *w) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)w)));
}
INLINE floats widen_nibbles(const uint8_t *w, int at, floats zero) {
    __m256i nibble = _mm256_srli_epi32(_mm256_loadu_si256((const __m256i *)w), 4 * at);
    return _mm256_sub_ps(_mm256_cvtepi32_ps(_mm256_and_si256(nibble, _mm256_set1_epi32(15))), zero);
}
/* Written out: from the intrinsic gcc 12 adds into the register of w or x and moves the sum about, for lack of others. */
INLINE floats add_product(floats sum, floats w, const float *x) {
    __asm__("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(w), "x"(_mm256_set1_ps(*x)));
    return sum;
}
#else
INLINE floats floats_zero(void) { return (floats){{0}}; }
INLINE floats floats_fma(floats a, floats b, floats c) {
    for (int i = 0; i < LANES; i++) c.lane[i] += a.lane[i] * b.lane[i];
    return c;
}
INLINE floats centred_zeros(const uint8_t *z) {
    floats v;
    for (int i = 0; i < LANES; i++) v.lane[i] = z[i];
    return v;
}
INLINE floats widen_bytes(const uint8_t *w) {
    floats v;
    for (int i = 0; i < LANES; i++) v.lane[i] = (int8_t)w[i];
    return v;
}
INLINE floats widen_nibbles(const uint8_t *w, int at, floats zero) {
    floats v;
    for (int i = 0; i < LANES; i++) v.lane[i] = (float)(w[4 * i + at / 2] >> 4 * (at % 2) & 15) - zero.lane[i];
    return v;
}
INLINE floats add_product(floats sum, floats w, const float *x) {
    for (int i = 0; i < LANES; i++) sum.lane[i] += w.lane[i] * *x;
    return sum;
}
#endif

#if !defined(__AVX512F__)
INLINE floats nibbles_less_8(const uint8_t *w, int at) { return widen_nibbles(w, at, floats_zero()); } /* not called */
#endif

/* The zero points of LANES channels as widen_nibbles takes them; of int8 and of 8 there are none. */
INLINE floats zeros_at(int bits, const uint8_t *zero, int64_t at) {
    return bits == 4 && zero ? centred_zeros(zero + at) : floats_zero();
}

/* The number that multiplying x in the format `compute` multiplies. */
INLINE float rounded(float x, int compute) {
    if (compute == BFLOAT16) return from_bits((uint32_t)round_to_bfloat16(x) << 16);
    return compute == FLOAT16 ? (float)(float16)x : x;
}

#define CONVERT(load, type)                                                                                            \
    if (compute == FLOAT32)                                                                                            \
        for (int64_t i = 0; i < count; i++) STORE(to + i, load((const type *)x + at, i));                              \
    else if (compute == BFLOAT16)                                                                                      \
        for (int64_t i = 0; i < count; i++) STORE(to + i, rounded(load((const type *)x + at, i), BFLOAT16));           \
    else                                                                                                               \
        for (int64_t i = 0; i < count; i++) STORE(to + i, rounded(load((const type *)x + at, i), FLOAT16));
#define DEFINE_CONVERT(element)                                                                                        \
    static void NAME(convert_row)(const void *x, int dtype, int64_t at, int64_t count, int compute, element *to) {     \
        if (dtype == FLOAT32) {                                                                                        \
            CONVERT(load_float32, float)                                                                               \
        } else if (dtype == BFLOAT16) {                                                                                \
            CONVERT(load_bfloat16, uint16_t)                                                                           \
        } else {                                                                                                       \
            CONVERT(load_float16, float16)                                                                             \
        }                                                                                                              \
    }

/* ---- float32 */
#define NAME(name) name##_float
#define ELEMENT float
#define STEP 1
#define NEEDS_ROW_SUMS 0
#if defined(__AVX512F__)
#define MOST_SHORT 12 /* rows whose tile is half a panel wide: their products hide the widening */
#endif
#define SEGMENT_WORDS 16 /* short chains of sums, as PyTorch has them; a panel of them widened is 32 KiB at most */
#if defined(__AVX2__)
#define TALL_ROWS 6
#define WIDEN_ONCE 1 /* for many rows */
#if !defined(__AVX512F__)
#define PAIRS_PANELS 1
#endif
#else
#define TALL_ROWS 2
#endif
#define WIDEN(value) (value)
#define STORE(to, value) *(to) = (value)
#define convert_row convert_row_float
#if !defined(__AVX512F__)
INLINE floats floats_times(floats v, float s) {
    (void)s;
    return v;
}
#endif
DEFINE_CONVERT(float)
#if defined(__AVX2__)
#define SPREADS_WORDS 1
/* `words` words of eight columns of a row of float32, each `step` elements after the one before, rounded to bfloat16 where
   that is multiplied. */
#if defined(__AVX512F__)
INLINE __m512 as_bfloat16(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i up = _mm512_and_si512(sum, _mm512_set1_epi32(-0x10000)), quiet = _mm512_set1_epi32(0x7fc00000);
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q); /* as round_to_bfloat16 */
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(up, nan, quiet));
}
INLINE void spread(const float *x, int64_t words, int rounds, float *to, int64_t step) {
    int64_t i = 0;
    for (; i + 2 <= words; i += 2, to += 2 * step) {
        __m512 value = _mm512_loadu_ps(x + 8 * i);
        if (rounds) value = as_bfloat16(value);
        _mm256_storeu_ps(to, _mm512_castps512_ps256(value));
        _mm256_storeu_ps(to + step, _mm512_extractf32x8_ps(value, 1));
    }
    if (i == words) return;
    __m512 value = _mm512_castps256_ps512(_mm256_loadu_ps(x + 8 * i));
    if (rounds) value = as_bfloat16(value);
    _mm256_storeu_ps(to, _mm512_castps512_ps256(value));
}
static void spread_words(const float *x, int64_t words, int compute, float *to, int64_t step) {
    if (compute == FLOAT32)
        spread(x, words, 0, to, step);
    else
        spread(x, words, 1, to, step);
}
#else
static void spread_words(const float *x, int64_t words, int compute, float *to, int64_t step) {
    const __m256i half = _mm256_set1_epi32(0x7fff), one = _mm256_set1_epi32(1), upper = _mm256_set1_epi32(-0x10000);
    if (compute == FLOAT32)
        for (int64_t i = 0; i < words; i++, to += step) _mm256_storeu_ps(to, _mm256_loadu_ps(x + 8 * i));
    else
        for (int64_t i = 0; i < words; i++, to += step) {
            const __m256 value = _mm256_loadu_ps(x + 8 * i);
            const __m256i bits = _mm256_castps_si256(value), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
            const __m256i up = _mm256_and_si256(_mm256_add_epi32(bits, _mm256_add_epi32(half, odd)), upper);
            const __m256 nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
            const __m256 quiet = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)); /* as round_to_bfloat16 */
            _mm256_storeu_ps(to, _mm256_blendv_ps(_mm256_castsi256_ps(up), quiet, nan));
        }
}
#endif
#endif
/* Column t of the eight. */
INLINE floats decode4_float(const uint8_t *w, int t, floats zero, int zeros) {
    return zeros ? widen_nibbles(w, t / 2 + t % 2 * 4, zero) : nibbles_less_8(w, t / 2 + t % 2 * 4);
}
INLINE floats decode8_float(const uint8_t *w, int t) { return widen_bytes(w + t * PANEL); }
INLINE floats multiply_add_float(floats sum, floats w, const float *x) { return add_product(sum, w, x); }
#include "weight_only_tile.h"
#undef NAME
#undef ELEMENT
#undef STEP
#undef NEEDS_ROW_SUMS
#undef SEGMENT_WORDS
#undef TALL_ROWS
#undef WIDEN_ONCE
#undef MOST_SHORT
#undef PAIRS_PANELS
#undef SPREADS_WORDS
#undef WIDEN
#undef STORE
#undef convert_row

/* ---- pairs of bfloat16 */
#if defined(__AVX512BF16__)
#define NAME(name) name##_pairs
#define ELEMENT uint16_t
#define STEP 2
#define NEEDS_ROW_SUMS 1
#define SEGMENT_WORDS 32
#define TALL_ROWS 12 /* of a tile with half the vectors */
#define WIDEN(value) from_bits((uint32_t)(value) << 16)
#define STORE(to, value) *(to) = (uint16_t)(to_bits(value) >> 16)
#define convert_row convert_row_pairs
DEFINE_CONVERT(uint16_t)
INLINE floats decode4_pairs(const uint8_t *w, int t, floats zero, int zeros) {
    (void)zero, (void)zeros;
    /* u - 8 as bfloat16, twice: the permutation looks at five bits of an index, of which the fifth is another nibble's. */
    const __m512i table = _mm512_set_epi16(
        0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0, (short)0xbf80, (short)0xc000, (short)0xc040,
        (short)0xc080, (short)0xc0a0, (short)0xc0c0, (short)0xc0e0, (short)0xc100, 0x40e0, 0x40c0, 0x40a0, 0x4080,
        0x4040, 0x4000, 0x3f80, 0, (short)0xbf80, (short)0xc000, (short)0xc040, (short)0xc080, (short)0xc0a0,
        (short)0xc0c0, (short)0xc0e0, (short)0xc100);
    return (floats)_mm512_permutexvar_epi16(_mm512_srli_epi32(_mm512_loadu_si512(w), 4 * t), table);
}
/* An integer of eight bits fits the upper half of a float. */
INLINE floats decode8_pairs(const uint8_t *w, int t) {
    __m512i even = (__m512i)widen_bytes(w + 2 * t * PANEL), odd = (__m512i)widen_bytes(w + (2 * t + 1) * PANEL);
    return (floats)_mm512_or_si512(odd, _mm512_srli_epi32(even, 16));
}
INLINE floats multiply_add_pairs(floats sum, floats w, const uint16_t *x) {
    int32_t two;
    memcpy(&two, x, 4);
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(two));
}
#include "weight_only_tile.h"
#endif

#if defined(__AMX_BF16__)
#include "weight_only_amx.h"
#endif

/* weight: [n, k / 8 rounded up] words as in tw_int4_pack (n x k bytes where bits is 8); weight_scale: [n, groups];
   weight_zero: as there, or NULL; all contiguous. packed: `bits` bytes for each word of eight columns of each channel, n
   rounded up to PANEL; scale and zero: for as many channels. zero: NULL where bits is 8. */
EXPORT int ISA_NAME(tw_weight_only_pack)(int bits, const void *weight, const float *weight_scale,
                                         const uint32_t *weight_zero, int64_t n, int64_t k, int64_t groups,
                                         uint8_t *packed, float *scale, uint8_t *zero) {
    int64_t words = divide_up(k, 8), channels = divide_up(n, PANEL) * PANEL;
    memset(packed, 0, (size_t)(channels * words * bits));
    memset(scale, 0, (size_t)(channels * groups) * sizeof *scale);
    if (zero) memset(zero, 0, (size_t)(channels * groups));
    for (int64_t channel = 0; channel < n; channel++) {
        int64_t panel = channel / PANEL, lane = channel % PANEL;
        uint8_t *to = packed + panel * words * PANEL * bits;
        if (bits == 8)
            for (int64_t i = 0; i < k; i++) to[i * PANEL + lane] = ((const uint8_t *)weight)[channel * k + i];
        for (int64_t i = 0; bits == 4 && i < words; i++) {
            uint32_t eight = ((const uint32_t *)weight)[channel * words + i], word = 0;
            for (int t = 0; t < 4; t++)
                word |= (eight >> 8 * t & 15) << 4 * t | (eight >> (8 * t + 4) & 15) << (16 + 4 * t);
            memcpy(to + (i * PANEL + lane) * 4, &word, 4);
        }
        for (int64_t group = 0; group < groups; group++) {
            int64_t at = (panel * groups + group) * PANEL + lane;
            scale[at] = weight_scale[channel * groups + group];
            if (zero) zero[at] = weight_zero ? weight_zero[channel / 8 * groups + group] >> 4 * (channel % 8) & 15 : 8;
        }
    }
    return 0;
}

/* Bytes of a row of x in the scratch memory, where m rows are multiplied in the format `compute`. */
EXPORT int64_t ISA_NAME(tw_weight_only_row_bytes)(int compute, int64_t m, int64_t k, int64_t group) {
#if defined(__AMX_BF16__)
    if (takes_tiles(m, k, group)) return terms_of(compute) * divide_up(k, TILE_K) * AMX_BYTES;
#endif
    (void)m, (void)group;
#if defined(__AVX512BF16__)
    if (compute == BFLOAT16) return divide_up(k, 8) * 8 * 2;
#endif
    (void)compute;
    return divide_up(k, 8) * 8 * 4;
}

/* Rows of scratch memory for `rows` rows: whole tiles. */
static int64_t held_rows(int64_t rows) {
    const int64_t twelve = divide_up(rows, 12) * 12, of_amx = divide_up(rows, 32) * 32;
    return rows <= FEW_ROWS ? rows + rows % 2 : twelve > of_amx ? twelve : of_amx;
}

/* packed, scale, zero: from pack. x: [m, k] in the format `dtype`, rows x_stride elements apart; y and residual (or NULL):
   [m, n], contiguous, in the same format. group: columns that share a scale, a multiple of 8 or at least k. compute: the
   format that is multiplied. bias: float32 [n] or NULL. Scratch for `block` rows, which are converted at a time, all m
   unless `sharing` is TOGETHER: rows of held_rows(block) * tw_weight_only_row_bytes, row_sums of block * groups; for each
   thread where it is ALL. Returns 0, or 1 for a format that this build cannot read. */
EXPORT int ISA_NAME(tw_weight_only_linear)(int bits, const uint8_t *packed, const float *scale, const uint8_t *zero,
                                           int64_t n, int64_t k, int64_t group, const float *bias, const void *x,
                                           int dtype, int64_t m, int64_t x_stride, const void *residual, int activation,
                                           void *y, int compute, void *rows, float *row_sums, int64_t block,
                                           int sharing, int threads) {
    if ((dtype == FLOAT16 || compute == FLOAT16) && !HAS_FLOAT16) return 1;
    int64_t words = divide_up(k, 8), group_words = group < k ? group / 8 : words;
    int64_t groups = divide_up(words, group_words);
    output out = {bias, residual, activation, y, dtype, n};
    /* As many for each thread, or nearly. */
    const int64_t each = divide_up(m, threads), at_once = divide_up(each, divide_up(each, ROW_GROUP));
    const int64_t held_bytes = held_rows(m) * ISA_NAME(tw_weight_only_row_bytes)(compute, m, k, group);
#if defined(__AMX_BF16__)
    if (takes_tiles(m, k, group)) {
        static const tw_body parts[2][3] = {{part4_tiles1, part4_tiles2, part4_tiles3},
                                            {part8_tiles1, part8_tiles2, part8_tiles3}};
        tw_queue units = {{0, 0}};
        job_tiles job = {packed, scale, zero, k, words, group < k ? group : words * 8, groups, x, dtype, compute, m,
                         x_stride, out, rows, block, &units, sharing, divide_up(at_once, UNIT_ROWS) * UNIT_ROWS,
                         held_bytes};
        tw_parallel(parts[bits == 8][terms_of(compute) - 1], &job, threads);
        return 0;
    }
#endif
#if defined(__AVX512BF16__)
    if (compute == BFLOAT16) {
        tw_queue units = {{0, 0}};
        job_pairs job = {packed, scale, zero, n, k, words, group_words, groups, x, dtype, compute, m, x_stride, out,
                         rows, row_sums, block, &units, sharing, divide_up(at_once, 12) * 12, held_bytes};
        tw_parallel(bits == 4 ? part4_pairs : part8_pairs, &job, threads);
        return 0;
    }
#endif
    tw_queue units = {{0, 0}};
    job_float job = {packed, scale, zero, n, k, words, group_words, groups, x, dtype, compute, m, x_stride, out,
                     rows, row_sums, block, &units, sharing, divide_up(at_once, 12) * 12, held_bytes};
    tw_parallel(bits == 4 ? part4_float : part8_float, &job, threads);
    return 0;
}

/* A linear layer as steps of a program: WEIGHT_ONLY_CONVERT writes rows and row_sums, WEIGHT_ONLY_PRODUCT reads them.
   kernels/cpu/row_steps.py holds the same structure. The members are the arguments of tw_weight_only_linear; all of x,
   rows and row_sums is there. */
typedef struct {
    const uint8_t *packed, *zero;
    const float *scale, *bias;
    const void *x, *residual;
    void *y, *rows;
    float *row_sums;
    int64_t m, n, k, x_stride, group;
    int32_t bits, dtype, compute, activation;
} weight_only_step;

#define JOB_OF_STEP(type)                                                                                              \
    (type){s->packed, s->scale, s->zero, s->n, s->k, words, group_words, divide_up(words, group_words), s->x, s->dtype, \
           s->compute, s->m, s->x_stride, {s->bias, s->residual, s->activation, s->y, s->dtype, s->n}, s->rows,        \
           s->row_sums, s->m, &step->units, TOGETHER, 0, 0}

#if defined(__AMX_BF16__)
static job_tiles tiles_of_step(tw_step *step) {
    const weight_only_step *s = step->job;
    const int64_t words = divide_up(s->k, 8), group = s->group < s->k ? s->group : words * 8;
    return (job_tiles){s->packed, s->scale, s->zero, s->k, words, group, divide_up(words * 8, group), s->x, s->dtype,
                       s->compute, s->m, s->x_stride, {s->bias, s->residual, s->activation, s->y, s->dtype, s->n}, s->rows,
                       s->m, &step->units, TOGETHER, 0, 0};
}
#endif

void ISA_NAME(tw_weight_only_convert_step)(tw_step *step, int number, int threads) {
    const weight_only_step *s = step->job;
    const int64_t words = divide_up(s->k, 8), group_words = s->group < s->k ? s->group / 8 : words;
    int64_t begin, end;
    share_of(s->m, number, threads, &begin, &end);
#if defined(__AMX_BF16__)
    if (takes_tiles(s->m, s->k, s->group)) {
        static void (*const splits[3])(const job_tiles *, int64_t, int64_t) = {split1, split2, split3};
        const job_tiles job = tiles_of_step(step);
        splits[terms_of(s->compute) - 1](&job, begin, end);
        return;
    }
#endif
#if defined(__AVX512BF16__)
    if (s->compute == BFLOAT16) {
        const job_pairs job = JOB_OF_STEP(job_pairs);
        convert_rows_pairs(&job, 0, s->m, begin, end);
        return;
    }
#endif
    const job_float job = JOB_OF_STEP(job_float);
    convert_rows_float(&job, 0, s->m, begin, end);
}

void ISA_NAME(tw_weight_only_product_step)(tw_step *step, int number, int threads) {
    const weight_only_step *s = step->job;
    const int64_t words = divide_up(s->k, 8), group_words = s->group < s->k ? s->group / 8 : words;
    (void)number;
#if defined(__AMX_BF16__)
    if (takes_tiles(s->m, s->k, s->group)) {
        static void (*const products[2][3])(const job_tiles *) = {{step4_tiles1, step4_tiles2, step4_tiles3},
                                                                  {step8_tiles1, step8_tiles2, step8_tiles3}};
        const job_tiles job = tiles_of_step(step);
        products[s->bits == 8][terms_of(s->compute) - 1](&job);
        return;
    }
#endif
#if defined(__AVX512BF16__)
    if (s->compute == BFLOAT16) {
        const job_pairs job = JOB_OF_STEP(job_pairs);
        (s->bits == 4 ? take4_pairs : take8_pairs)(&job, threads);
        return;
    }
#endif
    const job_float job = JOB_OF_STEP(job_float);
    (s->bits == 4 ? take4_float : take8_float)(&job, threads);
}
