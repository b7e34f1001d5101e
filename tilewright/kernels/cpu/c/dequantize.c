/* Integer weights as float32 for a library's product. */
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
