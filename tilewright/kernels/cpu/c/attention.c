/* Attention of one call, for sequences whose scores fit the caches:

       y[b, i, h, :] = sum_j p[i, j] v[b, h, j, :],   p[i, :] = softmax_j(scale * q[b, h, i, :] . k[b, h, j, :] + mask)

   A unit of work is a block of queries of one head. It lays the keys out in panels, channel by channel and PANEL keys side
   by side, and copies the values, so that both products read memory from front to back; then it takes ROWS queries at a
   time from the scores to the result. A row whose keys are all masked gives zeros. */
#include "numbers.h"
#include "parallel.h"
#include "program.h"
#include "vector.h"

#include <math.h>
#include <string.h>

/* Mirrored by kernels/cpu/attention.py. Strides count elements (bytes in a mask of bytes), the last dimension of q, k and
   v is contiguous, and that of a mask is contiguous or has stride 0. */
typedef struct {
    const float *q, *k, *v;
    const void *mask; /* float32, added to the scores; or bytes, 0 where a key is not to be seen; or NULL */
    float *y;         /* [batch, queries, heads, value_width], contiguous */
    float *scratch;   /* tw_attention_scratch floats for each thread */
    int64_t batch, heads, kv_heads, queries, keys, width, value_width;
    int64_t q_stride[3], k_stride[3], v_stride[3]; /* of batch, head, position */
    int64_t mask_stride[4];                        /* of batch, head, query, key */
    int32_t mask_is_bytes, causal;
    float scale;
    int32_t threads;
} attention;

enum { QUERY_BLOCK = 128 };

#ifdef LANES

/* ROWS times VECTORS sums stay in registers, of which AVX-512 has 32 and AVX2 16. */
enum { ROWS = 6, VECTORS = LANES / 4, PANEL = VECTORS * LANES, SEGMENT = 16 };

static int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

static int64_t panel_floats(const attention *job) { return round_up(job->keys, LANES) * job->width; }
static int64_t value_floats(const attention *job) { return round_up(job->value_width, LANES) * job->keys; }

/* What AVX-512 and AVX2 have different words for. */
#if defined(__AVX512F__)
static inline float v_largest(vec v) { return _mm512_reduce_max_ps(v); }
/* `below` where the sign bit of `sign` is set, else `otherwise`. */
static inline vec v_where_negative(vec sign, vec below, vec otherwise) {
    return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(sign)), otherwise, below);
}
#else
static inline float v_largest(vec v) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
static inline vec v_where_negative(vec sign, vec below, vec otherwise) {
    return _mm256_blendv_ps(otherwise, below, sign);
}
#endif

/* Four keys at a time, which are there; the others are zeros. The panel that begins at `first` begins first * width floats
   after the first one, since all before it are whole. */
static void pack_keys(const attention *job, const float *k, float *packed) {
    const int64_t stride = job->k_stride[2], width = job->width;
    for (int64_t first = 0; first < job->keys; first += PANEL) {
        int64_t left = round_up(job->keys - first, LANES), lanes = left < PANEL ? left : PANEL;
        float *panel = packed + first * width;
        for (int64_t j = 0; j < lanes; j += 4) {
            const float *key = k + (first + j) * stride;
            const int64_t there = job->keys - first - j;
            int64_t c = 0;
            for (; there >= 4 && c + 4 <= width; c += 4) {
                __m128 a = _mm_loadu_ps(key + c), b = _mm_loadu_ps(key + stride + c);
                __m128 d = _mm_loadu_ps(key + 2 * stride + c), e = _mm_loadu_ps(key + 3 * stride + c);
                _MM_TRANSPOSE4_PS(a, b, d, e);
                _mm_storeu_ps(panel + c * lanes + j, a);
                _mm_storeu_ps(panel + (c + 1) * lanes + j, b);
                _mm_storeu_ps(panel + (c + 2) * lanes + j, d);
                _mm_storeu_ps(panel + (c + 3) * lanes + j, e);
            }
            for (; c < width; c++)
                for (int64_t i = 0; i < 4; i++) panel[c * lanes + j + i] = i < there ? key[i * stride + c] : 0.0f;
        }
    }
}

static void pack_values(const attention *job, const float *v, float *packed) {
    const int64_t width = round_up(job->value_width, LANES);
    for (int64_t j = 0; j < job->keys; j++) {
        memcpy(packed + j * width, v + j * job->v_stride[2], (size_t)job->value_width * sizeof *v);
        for (int64_t c = job->value_width; c < width; c++) packed[j * width + c] = 0.0f;
    }
}

/* to[r][0 .. vectors * LANES) = sum over `count` of from[r][i] * panel[i][...]. `rows` and `vectors` are constants wherever
   this is called: the loops unroll, and the sums stay in registers. A chain of sums is SEGMENT long at most, which keeps
   the error of the whole at that of a matrix product that has several chains. */
INLINE void multiply(int rows, int vectors, const float *const *from, int64_t count, const float *panel,
                     int64_t panel_stride, float *const *to) {
    for (int64_t begin = 0; begin < count || !begin; begin += SEGMENT) {
        const int64_t end = count - begin < SEGMENT ? count : begin + SEGMENT;
        vec sum[ROWS][VECTORS];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
            for (int i = 0; i < vectors; i++) sum[r][i] = v_zero();
        for (int64_t step = begin; step < end; step++) {
            vec b[VECTORS];
#pragma GCC unroll 8
            for (int i = 0; i < vectors; i++) b[i] = v_load(panel + step * panel_stride + i * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                vec a = v_set(from[r][step]);
#pragma GCC unroll 8
                for (int i = 0; i < vectors; i++) sum[r][i] = v_add_product(sum[r][i], a, b[i]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
            for (int i = 0; i < vectors; i++) {
                float *at = to[r] + i * LANES;
                v_store(at, begin ? v_add(v_load(at), sum[r][i]) : sum[r][i]);
            }
    }
}

static void multiply_panel(int rows, int vectors, const float *const *from, int64_t count, const float *panel,
                           int64_t panel_stride, float *const *to) {
#define CASE(height, length)                                                                                           \
    if (rows == height && vectors == length) {                                                                         \
        multiply(height, length, from, count, panel, panel_stride, to);                                                \
        return;                                                                                                        \
    }
#if defined(__AVX512F__)
    CASE(ROWS, 4)
    CASE(ROWS, 3)
    CASE(1, 4)
    CASE(1, 3)
#endif
    CASE(ROWS, 2)
    CASE(ROWS, 1)
    CASE(1, 2)
    CASE(1, 1)
#undef CASE
}

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

static query_mask mask_of(const attention *job, int64_t batch, int64_t head, int64_t query) {
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

/* Scores of one query become e^(score - largest), in place, those of keys beyond `last` 0; returns what the result is to be
   multiplied by. */
static float exponentiate(const attention *job, query_mask mask, float *scores, int64_t keys, int64_t last) {
    static const float count_up[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const vec scale = v_set(job->scale), unseen = v_set(-INFINITY), lane = v_load(count_up);
    vec most = unseen, sum = v_zero();
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
    float total = v_total(sum);
    return total == 0.0f ? 0.0f : 1.0f / total;
}

static void attend(const attention *job, int64_t batch, int64_t head, int64_t first, int64_t last, float *scratch) {
    const int64_t kv_head = head / (job->heads / job->kv_heads), padded = round_up(job->keys, LANES);
    const int64_t value_width = round_up(job->value_width, LANES);
    float *keys = scratch, *values = keys + panel_floats(job), *scores = values + value_floats(job);
    float *result = scores + ROWS * padded;
    pack_keys(job, job->k + batch * job->k_stride[0] + kv_head * job->k_stride[1], keys);
    pack_values(job, job->v + batch * job->v_stride[0] + kv_head * job->v_stride[1], values);
    for (int64_t row = first; row < last;) {
        const int rows = last - row == 1 ? 1 : ROWS;
        const int count = (int)(last - row < rows ? last - row : rows);
        const int64_t seen = job->causal && row + count < job->keys ? row + count : job->keys;
        const float *from[ROWS];
        float *to[ROWS], inverse[ROWS];
        for (int r = 0; r < rows; r++) /* beyond the last query: the last one again */
            from[r] = job->q + batch * job->q_stride[0] + head * job->q_stride[1] +
                      (row + (r < count ? r : count - 1)) * job->q_stride[2];
        for (int64_t key = 0; key < seen; key += PANEL) {
            int64_t lanes = padded - key < PANEL ? padded - key : PANEL;
            for (int r = 0; r < rows; r++) to[r] = scores + r * padded + key;
            multiply_panel(rows, (int)(lanes / LANES), from, job->width, keys + key * job->width, lanes, to);
        }
        for (int r = 0; r < rows; r++) {
            const int64_t query = row + r, last = job->causal && query < seen ? query : seen - 1;
            if (r < count)
                inverse[r] = exponentiate(job, mask_of(job, batch, head, query), scores + r * padded, seen, last);
            from[r] = scores + r * padded;
        }
        for (int64_t channel = 0; channel < value_width; channel += PANEL) {
            int64_t lanes = value_width - channel < PANEL ? value_width - channel : PANEL;
            for (int r = 0; r < rows; r++) to[r] = result + r * value_width + channel;
            multiply_panel(rows, (int)(lanes / LANES), from, seen, values + channel, value_width, to);
        }
        for (int r = 0; r < count; r++) {
            float *y = job->y + ((batch * job->queries + row + r) * job->heads + head) * job->value_width;
            for (int64_t c = 0; c < job->value_width; c++) y[c] = result[r * value_width + c] * inverse[r];
        }
        row += count;
    }
}

/* Floats of scratch memory that one thread needs. */
EXPORT int64_t ISA_NAME(tw_attention_scratch)(const attention *job) {
    return panel_floats(job) + value_floats(job) +
           ROWS * (round_up(job->keys, LANES) + round_up(job->value_width, LANES));
}

/* The units that thread `number` takes from the queue. */
static void attend_taken(const attention *job, tw_queue *queue, int number, int threads) {
    float *scratch = job->scratch + number * ISA_NAME(tw_attention_scratch)(job);
    const int64_t blocks = (job->queries + QUERY_BLOCK - 1) / QUERY_BLOCK;
    const int64_t units = job->batch * job->heads * blocks;
    /* All heads of a sequence by one thread, where there are many: they lie side by side in memory. */
    const int64_t step = job->batch >= 4 * threads ? job->heads * blocks : 1;
    for (int64_t taken = tw_take(queue, 0, step); taken < units; taken = tw_take(queue, 0, step))
        for (int64_t unit = taken; unit < taken + step; unit++) {
            int64_t head = unit / blocks, first = unit % blocks * QUERY_BLOCK;
            int64_t last = first + QUERY_BLOCK < job->queries ? first + QUERY_BLOCK : job->queries;
            attend(job, head / job->heads, head % job->heads, first, last, scratch);
        }
}

/* A step of a program; there is scratch memory for job->threads. */
void ISA_NAME(tw_attention_step)(tw_step *step, int number, int threads) {
    attend_taken(step->job, &step->units, number, threads);
}

typedef struct {
    const attention *job;
    tw_queue *units;
} attention_call;

static void attention_part(void *data) {
    const attention_call *call = data;
    int number, threads;
    tw_team(&number, &threads);
    attend_taken(call->job, call->units, number, threads);
}

/* Returns 0, or 1 where this build has no vectors. */
EXPORT int ISA_NAME(tw_attention)(const attention *job) {
    tw_queue units = {{0, 0}};
    attention_call call = {job, &units};
    tw_parallel(attention_part, &call, job->threads);
    return 0;
}

#else

EXPORT int64_t ISA_NAME(tw_attention_scratch)(const attention *job) {
    (void)job;
    return 0;
}

EXPORT int ISA_NAME(tw_attention)(const attention *job) {
    (void)job;
    return 1;
}

void ISA_NAME(tw_attention_step)(tw_step *step, int number, int threads) { (void)step, (void)number, (void)threads; }

#endif
