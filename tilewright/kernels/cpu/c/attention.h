/* What the kernels of attention share: the description of a call, masks, and the softmax of scores.

       y[b, i, h, :] = sum_j p[i, j] v[b, h, j, :],   p[i, :] = softmax_j(scale * q[b, h, i, :] . k[b, h, j, :] + mask)

   A row whose keys are all masked gives zeros. The sink of a head is one more score, which has no value. */
#ifndef TILEWRIGHT_ATTENTION_H
#define TILEWRIGHT_ATTENTION_H

#include "numbers.h"
#include "parallel.h"
#include "program.h"
#include "vector.h"

#include <math.h>

/* Mirrored by kernels/cpu/attention.py. Strides count elements (bytes in a mask of bytes), the last dimension of q, k and
   v is contiguous, and that of a mask is contiguous or has stride 0. */
typedef struct {
    const void *q, *k, *v; /* float32, but of few queries `bfloat16` and codes, see below */
    const void *mask; /* float32, added to the scores; or bytes, 0 where a key is not to be seen; or NULL */
    void *y;          /* [batch, queries, heads, value_width], contiguous; of the type of q */
    float *scratch;   /* tw_attention_scratch floats */
    int64_t batch, heads, kv_heads, queries, keys, width, value_width;
    int64_t q_stride[3], k_stride[3], v_stride[3]; /* of batch, head, position */
    int64_t mask_stride[4];                        /* of batch, head, query, key */
    int32_t mask_is_bytes, causal;
    float scale;
    int32_t threads;
    /* Of few queries alone: the keys and values of positions `new_first` and on, `new_count` of them, which are written to
       k and v before anything is read there. */
    const void *new_k, *new_v;
    int64_t new_k_stride[3], new_v_stride[3], new_first, new_count;
    int32_t *done; /* batch * kv_heads counters, where there are several parts */
    /* Of few queries alone: not NULL where k and v hold int8 codes, each worth code * scale of its position; positions are
       contiguous, strides are of batch and head. What is new is quantised then, and `errors`, [4][batch * kv_heads][...] from
       the first new position on, takes the sums of squares of keys, of their errors, of values and of theirs. */
    float *k_scale, *v_scale, *errors;
    int64_t k_scale_stride[2], v_scale_stride[2], errors_stride[2]; /* of errors: of a kind of sum, of a head */
    const float *sinks; /* or NULL */
    int64_t sinks_stride[2]; /* of batch, head */
    int64_t bfloat16;        /* of few queries alone: q, k, v, what is new, and y, which is rounded once */
} attention;

/* Up to so many queries, keys are read as they lie: to lay them out anew would cost more than it saves. */
enum { FEW_QUERIES = 4 };

/* attention_few.c. Units are taken from the queue by each thread; `begin` comes first, before there are threads. */
int64_t ISA_NAME(tw_few_floats)(const attention *job);
void ISA_NAME(tw_few_begin)(const attention *job);
void ISA_NAME(tw_few_attend)(const attention *job, tw_queue *queue);

#ifdef LANES

/* What AVX-512 and AVX2 have different words for. */
#if defined(__AVX512F__)
static inline float v_largest(vec v) { return _mm512_reduce_max_ps(v); }
INLINE vec v_load_bfloat16(const uint16_t *p, int n) {
    const __m256i halves = n == LANES ? _mm256_loadu_si256((const void *)p) : _mm256_maskz_loadu_epi16(first_lanes(n), p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
/* `below` where the sign bit of `sign` is set, else `otherwise`. */
static inline vec v_where_negative(vec sign, vec below, vec otherwise) {
    return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(sign)), otherwise, below);
}
#else
INLINE vec v_load_bfloat16(const uint16_t *p, int n) {
    __m128i halves = _mm_setzero_si128();
    if (n == LANES)
        halves = _mm_loadu_si128((const void *)p);
    else
        memcpy(&halves, p, (size_t)n * sizeof *p);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
static inline float v_largest(vec v) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
static inline vec v_where_negative(vec sign, vec below, vec otherwise) {
    return _mm256_blendv_ps(otherwise, below, sign);
}
#endif

/* e^x for x <= 0, and 0 below -88, where n is -127 and so 2^n: what is masked must count for nothing. */
INLINE vec exp_or_zero(vec x) {
    vec n = v_round(v_max(v_set(-127.0f), v_mul(x, v_set(1.44269504f))));
    return v_exp_of_parts(n, v_max(v_set(-88.0f), x));
}

/* What is added to the scores of one query, or NULL; its keys are `step` apart. */
typedef struct {
    const float *added;
    const uint8_t *seen;
    int64_t step;
} query_mask;

static inline query_mask mask_of(const attention *job, int64_t batch, int64_t head, int64_t query) {
    int64_t at = batch * job->mask_stride[0] + head * job->mask_stride[1] + query * job->mask_stride[2];
    query_mask mask = {NULL, NULL, job->mask_stride[3]};
    if (job->mask && job->mask_is_bytes)
        mask.seen = (const uint8_t *)job->mask + at;
    else if (job->mask)
        mask.added = (const float *)job->mask + at;
    return mask;
}

/* The scores of LANES keys from j on, `count` of which are there, scaled and masked. */
INLINE vec masked(const query_mask *mask, vec score, int64_t j, int count) {
    const vec unseen = v_set(-INFINITY);
    if (mask->seen) {
        vec seen = mask->step ? v_load_uint8(mask->seen + j, count) : v_set((float)*mask->seen);
        return v_where_negative(v_sub(seen, v_set(0.5f)), unseen, score);
    }
    if (mask->added)
        return v_add(score, mask->step ? v_load_first(mask->added + j, count) : v_set(*mask->added));
    return score;
}

/* A score that counts for nothing where there are none. */
static inline float sink_of(const attention *job, int64_t batch, int64_t head) {
    return job->sinks ? job->sinks[batch * job->sinks_stride[0] + head * job->sinks_stride[1]] : -INFINITY;
}

/* e^(x - largest). */
static inline float exp_below(float x, float largest) {
    float all[LANES];
    v_store(all, exp_or_zero(v_set(x - largest)));
    return all[0];
}

/* Scores of one query become e^(score - largest), in place, those of keys beyond `last` 0; returns their sum, that of
   `sink` with it. The mask begins at the first key. */
static inline float exponentiate(const attention *job, query_mask mask, float *scores, int64_t keys, int64_t last,
                                 float sink, float *largest_score) {
    static const float count_up[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const vec scale = v_set(job->scale), unseen = v_set(-INFINITY), lane = v_load(count_up);
    vec most = v_set(sink), sum = v_zero();
    for (int64_t j = 0; j < keys; j += LANES) {
        int count = (int)(keys - j < LANES ? keys - j : LANES);
        vec score = masked(&mask, v_mul(v_load(scores + j), scale), j, count);
        if (j + LANES > last + 1) score = v_where_negative(v_sub(v_set((float)(last - j)), lane), unseen, score);
        v_store(scores + j, score);
        most = v_max(score, most);
    }
    float largest = v_largest(most);
    if (largest == -INFINITY) largest = 0.0f; /* nothing is seen, or NaN: zeros or NaN follow by themselves */
    for (int64_t j = 0; j < keys; j += LANES) {
        vec p = exp_or_zero(v_sub(v_load(scores + j), v_set(largest)));
        v_store(scores + j, p);
        sum = v_add(sum, p);
    }
    *largest_score = v_largest(most);
    return v_total(sum) + exp_below(sink, largest);
}

#endif

#endif
