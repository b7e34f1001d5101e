/* Integer weights, and the rows that they are multiplied with, as float32 for a library's product. */
#include "numbers.h"
#include "parallel.h"

#if defined(__SSE2__)
#include "vector.h"
#endif

/* Columns of a group that are spread at a time. */
enum { SPREAD = 32 };

typedef struct {
    int bits;
    const uint8_t *weight;
    const float *scale;
    const uint32_t *zero;
    int64_t first, count, k, groups, group, row_bytes;
    float *to;
} weight_job;

/* The low nibble of a byte is the even column. Written out: gcc 12 does not find the interleaving. */
static inline void spread(const uint8_t *from, uint8_t *u) {
#if defined(__SSE2__)
    const __m128i bytes = _mm_loadu_si128((const __m128i *)from), mask = _mm_set1_epi8(15);
    const __m128i even = _mm_and_si128(bytes, mask), odd = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
    _mm_storeu_si128((__m128i *)u, _mm_unpacklo_epi8(even, odd));
    _mm_storeu_si128((__m128i *)(u + 16), _mm_unpackhi_epi8(even, odd));
#else
    for (int i = 0; i < SPREAD / 2; i++) u[2 * i] = from[i] & 15, u[2 * i + 1] = from[i] >> 4;
#endif
}

static void widen_nibbles(const uint8_t *from, int64_t columns, float zero, float scale, float *to) {
    uint8_t u[SPREAD];
    for (; columns >= SPREAD; columns -= SPREAD, from += SPREAD / 2, to += SPREAD) {
        spread(from, u);
#if defined(LANES)
        for (int i = 0; i < SPREAD; i += LANES)
            v_store(to + i, v_mul(v_sub(v_load_uint8(u + i, LANES), v_set(zero)), v_set(scale)));
#else
        for (int i = 0; i < SPREAD; i++) to[i] = ((float)u[i] - zero) * scale;
#endif
    }
    for (int64_t i = 0; i < columns; i++) to[i] = ((float)(from[i / 2] >> 4 * (i % 2) & 15) - zero) * scale;
}

static void widen_bytes(const int8_t *from, int64_t columns, float scale, float *to) {
    for (int64_t i = 0; i < columns; i++) to[i] = (float)from[i] * scale;
}

static void dequantize(void *data) {
    const weight_job *job = data;
    int64_t begin, end;
    tw_share(job->count, &begin, &end);
    for (int64_t i = begin; i < end; i++) {
        const int64_t channel = job->first + i;
        const uint8_t *from = job->weight + channel * job->row_bytes;
        const float *scale = job->scale + channel * job->groups;
        float *to = job->to + i * job->k;
        for (int64_t g = 0, at = 0; at < job->k; g++, at += job->group) {
            const int64_t columns = job->k - at < job->group ? job->k - at : job->group;
            if (job->bits == 8) {
                widen_bytes((const int8_t *)from + at, columns, scale[g], to + at);
                continue;
            }
            const uint32_t *zero = job->zero ? job->zero + channel / 8 * job->groups + g : 0;
            widen_nibbles(from + at / 2, columns, zero ? (float)(*zero >> 4 * (channel % 8) & 15) : 8.0f, scale[g],
                          to + at);
        }
    }
}

/* to[i, c] = (w[first + i, c] - zero) * scale for `count` channels of a weight [., k]. bits: 8 for int8 rows, or 4 for rows
   of nibbles, `row_bytes` bytes apart. scale: float32 [., groups]; zero: for nibbles, words of eight channels
   [. / 8, groups], or NULL for 8; all contiguous. group: columns that share a scale, even or at least k. */
EXPORT int ISA_NAME(tw_dequantize)(int bits, const void *weight, const float *scale, const uint32_t *zero, int64_t first,
                                   int64_t count, int64_t k, int64_t groups, int64_t group, int64_t row_bytes, float *to,
                                   int threads) {
    weight_job job = {bits, weight, scale, zero, first, count, k, groups, group, row_bytes, to};
    tw_parallel(dequantize, &job, threads);
    return 0;
}

typedef struct {
    const void *x;
    int dtype, compute;
    int64_t m, k, x_stride;
    float *to;
} rows_job;

typedef uint32_t bits __attribute__((may_alias));

/* As round_to_bfloat16, of floats in place: in this form it is vectorised. */
static void round_upper(bits *to, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        const uint32_t value = to[i], rounded = (value + 0x7fffu + (value >> 16 & 1u)) & 0xffff0000u;
        to[i] = (value & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : rounded;
    }
}

#define ROUND_ROW(load, type)                                                                                          \
    for (int64_t i = 0; i < k; i++) to[i] = load((const type *)job->x + row * job->x_stride, i);

static void round_rows(void *data) {
    const rows_job *job = data;
    const int64_t k = job->k;
    int64_t begin, end;
    tw_share(job->m, &begin, &end);
    for (int64_t row = begin; row < end; row++) {
        float *to = job->to + row * k;
        if (job->dtype == FLOAT32) {
            ROUND_ROW(load_float32, float)
        } else if (job->dtype == BFLOAT16) {
            ROUND_ROW(load_bfloat16, uint16_t)
        } else {
            ROUND_ROW(load_float16, float16)
        }
        if (job->compute == BFLOAT16 && job->dtype != BFLOAT16) round_upper((bits *)to, k);
        if (job->compute == FLOAT16 && job->dtype != FLOAT16)
            for (int64_t i = 0; i < k; i++) to[i] = (float)(float16)to[i];
    }
}

/* Rows of x [m, k] in the format `dtype`, x_stride elements apart, rounded to `compute`, as float32 [m, k]. Returns 0, or 1
   for a format that this build cannot read. */
EXPORT int ISA_NAME(tw_round_rows)(const void *x, int dtype, int64_t m, int64_t k, int64_t x_stride, int compute,
                                   float *to, int threads) {
    if ((dtype == FLOAT16 || compute == FLOAT16) && !HAS_FLOAT16) return 1;
    rows_job job = {x, dtype, compute, m, k, x_stride, to};
    tw_parallel(round_rows, &job, threads);
    return 0;
}
