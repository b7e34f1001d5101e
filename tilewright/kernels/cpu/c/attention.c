/* Attention of one call (attention.h), for sequences whose scores fit the caches.

   A unit of work is a block of queries of one head. It lays the keys out in panels, channel by channel and PANEL keys side
   by side, and copies the values, so that both products read memory from front to back; then it takes ROWS queries at a
   time from the scores to the result. Few queries go to attention_few.c. */
#include "attention.h"

#include <string.h>

enum { QUERY_BLOCK = 128 };

#ifdef LANES

/* ROWS times VECTORS sums stay in registers, of which AVX-512 has 32 and AVX2 16. */
enum { ROWS = 6, VECTORS = LANES / 4, PANEL = VECTORS * LANES, SEGMENT = 16 };

static int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

static int64_t panel_floats(const attention *job) { return round_up(job->keys, LANES) * job->width; }
static int64_t value_floats(const attention *job) { return round_up(job->value_width, LANES) * job->keys; }

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

static void attend(const attention *job, int64_t batch, int64_t head, int64_t first, int64_t last, float *scratch) {
    const int64_t kv_head = head / (job->heads / job->kv_heads), padded = round_up(job->keys, LANES);
    const int64_t value_width = round_up(job->value_width, LANES);
    float *keys = scratch, *values = keys + panel_floats(job), *scores = values + value_floats(job);
    float *result = scores + ROWS * padded;
    pack_keys(job, (const float *)job->k + batch * job->k_stride[0] + kv_head * job->k_stride[1], keys);
    pack_values(job, (const float *)job->v + batch * job->v_stride[0] + kv_head * job->v_stride[1], values);
    for (int64_t row = first; row < last;) {
        const int rows = last - row == 1 ? 1 : ROWS;
        const int count = (int)(last - row < rows ? last - row : rows);
        const int64_t seen = job->causal && row + count < job->keys ? row + count : job->keys;
        const float *from[ROWS];
        float *to[ROWS], inverse[ROWS];
        for (int r = 0; r < rows; r++) /* beyond the last query: the last one again */
            from[r] = (const float *)job->q + batch * job->q_stride[0] + head * job->q_stride[1] +
                      (row + (r < count ? r : count - 1)) * job->q_stride[2];
        for (int64_t key = 0; key < seen; key += PANEL) {
            int64_t lanes = padded - key < PANEL ? padded - key : PANEL;
            for (int r = 0; r < rows; r++) to[r] = scores + r * padded + key;
            multiply_panel(rows, (int)(lanes / LANES), from, job->width, keys + key * job->width, lanes, to);
        }
        for (int r = 0; r < rows; r++) {
            const int64_t query = row + r, last = job->causal && query < seen ? query : seen - 1;
            if (r < count) {
                float largest, total;
                total = exponentiate(job, mask_of(job, batch, head, query), scores + r * padded, seen, last,
                                     sink_of(job, batch, head), &largest);
                inverse[r] = total == 0.0f ? 0.0f : 1.0f / total;
            }
            from[r] = scores + r * padded;
        }
        for (int64_t channel = 0; channel < value_width; channel += PANEL) {
            int64_t lanes = value_width - channel < PANEL ? value_width - channel : PANEL;
            for (int r = 0; r < rows; r++) to[r] = result + r * value_width + channel;
            multiply_panel(rows, (int)(lanes / LANES), from, seen, values + channel, value_width, to);
        }
        for (int r = 0; r < count; r++) {
            float *y = (float *)job->y + ((batch * job->queries + row + r) * job->heads + head) * job->value_width;
            for (int64_t c = 0; c < job->value_width; c++) y[c] = result[r * value_width + c] * inverse[r];
        }
        row += count;
    }
}

/* Floats of scratch memory that one thread needs. */
static int64_t thread_floats(const attention *job) {
    return panel_floats(job) + value_floats(job) +
           ROWS * (round_up(job->keys, LANES) + round_up(job->value_width, LANES));
}

/* Floats of scratch memory of all threads. */
EXPORT int64_t ISA_NAME(tw_attention_scratch)(const attention *job) {
    if (job->queries <= FEW_QUERIES) return ISA_NAME(tw_few_floats)(job);
    return thread_floats(job) * job->threads;
}

/* The units that thread `number` takes from the queue. */
static void attend_taken(const attention *job, tw_queue *queue, int number, int threads) {
    if (job->queries <= FEW_QUERIES) {
        ISA_NAME(tw_few_attend)(job, queue);
        return;
    }
    float *scratch = job->scratch + number * thread_floats(job);
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

/* Before a program runs whose step does `job`. */
void ISA_NAME(tw_attention_begin)(const void *described) {
    const attention *job = described;
    if (job->queries <= FEW_QUERIES) ISA_NAME(tw_few_begin)(job);
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
    ISA_NAME(tw_attention_begin)(job);
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

void ISA_NAME(tw_attention_begin)(const void *described) {
    const attention *job = described; (void)job; }

void ISA_NAME(tw_attention_step)(tw_step *step, int number, int threads) { (void)step, (void)number, (void)threads; }

#endif
