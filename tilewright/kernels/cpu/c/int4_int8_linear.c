/* W4A8 linear layer in one call: quantise the rows of x, multiply group by group, scale, bias, activation, residual, cast.

       y[m, n] = activation(s[m] * sum_g weight_scale[n, g] * P[m, n, g] + bias[n]) + residual[m, n]
       P[m, n, g] = sum over k in group g of q[m, k] * (u[n, k] - z[n, g]) = (sum of q * u) - z[n, g] * (sum of q)

   The sums of q over each group are taken once for each row, so P is an exact integer and no zero point is subtracted from
   a weight. Groups are added in order, in float32, whatever the batch.

   Weights are packed in panels of PANEL output channels; within a panel, eight consecutive k of each channel are a word
   (nibbles.h), and the words of the channels stand side by side:

       packed[panel][k / 8][channel][k % 4] = u[k] | u[k + 4] << 4        scale, zero: [panel][group][channel] */
#include "amx.h"
#include "epilogue.h"
#include "nibbles.h"
#include "parallel.h"
#include "program.h"
#include "quantize_row.h"

static int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

/* Bytes of a quantised row in the scratch memory. */
EXPORT int64_t ISA_NAME(tw_int4_int8_row_bytes)(int64_t k) {
#if defined(__AMX_INT8__)
    return (divide_up(divide_up(k, 8) * 8 + 56, 64) | 1) * 64; /* tiles read 64 bytes from any eighth column on */
#elif WIDEN_INTEGERS
    return (divide_up(k, 64) | 1) * 64; /* odd: rows of a tile compete for no set of the cache */
#else
    return divide_up(k, 8) * 8;
#endif
}

/* Sizes in elements of what `pack` fills: bytes of `packed`; scales, which are as many as zero points. */
EXPORT int64_t ISA_NAME(tw_int4_packed_bytes)(int64_t n, int64_t k) {
    return divide_up(n, PANEL) * PANEL * divide_up(k, 8) * 4;
}
EXPORT int64_t ISA_NAME(tw_int4_scales)(int64_t n, int64_t groups) { return divide_up(n, PANEL) * PANEL * groups; }

/* weight: [n, k / 8 rounded up] words, nibble j of word i column 8 i + j; weight_scale: [n, groups]; weight_zero:
   [n / 8 rounded up, groups] words, nibble j of word i row 8 i + j, or NULL for 8 everywhere; all contiguous. Beyond n,
   everything is 0. */
EXPORT int ISA_NAME(tw_int4_pack)(const uint32_t *weight, const float *weight_scale, const uint32_t *weight_zero,
                                  int64_t n, int64_t k, int64_t groups, uint8_t *packed, float *scale, uint8_t *zero) {
    int64_t words = divide_up(k, 8);
    memset(packed, 0, (size_t)ISA_NAME(tw_int4_packed_bytes)(n, k));
    memset(scale, 0, (size_t)ISA_NAME(tw_int4_scales)(n, groups) * sizeof *scale);
    memset(zero, 0, (size_t)ISA_NAME(tw_int4_scales)(n, groups));
    for (int64_t channel = 0; channel < n; channel++) {
        int64_t panel = channel / PANEL, lane = channel % PANEL;
        for (int64_t word = 0; word < words; word++) {
            uint32_t eight = weight[channel * words + word];
            uint8_t *to = packed + ((panel * words + word) * PANEL + lane) * 4;
            for (int j = 0; j < 4; j++) to[j] = (uint8_t)((eight >> 4 * j & 15) | (eight >> (16 + 4 * j) & 15) << 4);
        }
        for (int64_t group = 0; group < groups; group++) {
            int64_t at = (panel * groups + group) * PANEL + lane;
            scale[at] = weight_scale[channel * groups + group];
            zero[at] = weight_zero ? weight_zero[channel / 8 * groups + group] >> 4 * (channel % 8) & 15 : 8;
        }
    }
    return 0;
}

typedef struct {
    const uint8_t *packed, *zero;
    const float *scale, *channel_scale;
    int64_t k, q_stride, words, group_words, groups;
    const void *x;
    int64_t m, x_stride;
    output out;
    int8_t *q;
    int32_t *q_sums;
    float *row_scale;
    int64_t block;
    int own; /* as in int8_linear.c */
    tw_queue *units;
} int4_job;

/* `rows` is a constant wherever this is called: loops over rows and vectors unroll, and the sums stay in registers. */
INLINE void multiply_rows(int rows, const int4_job *job, int64_t row, int64_t panel, float sums[][PANEL]) {
    const int64_t stride = job->q_stride;
    const int8_t *x = job->q + row * stride;
    const int32_t *q_sums = job->q_sums + row * job->groups;
    const uint8_t *w = job->packed + panel * job->words * PANEL * 4;
    for (int r = 0; r < rows; r++) memset(sums[r], 0, sizeof sums[r]);
    for (int64_t group = 0; group < job->groups; group++) {
        int64_t first = group * job->group_words, last = first + job->group_words;
        if (last > job->words) last = job->words;
        vector sum[TILE_ROWS][TILE_VECTORS];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
            for (int v = 0; v < TILE_VECTORS; v++) sum[r][v] = vector_zero();
        add_words(rows, x + first * 8, stride, w + first * PANEL * 4, last - first, sum);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
            for (int v = 0; v < TILE_VECTORS; v++) KEEP_IN_REGISTER(sum[r][v]);
        int64_t at = (panel * job->groups + group) * PANEL;
#pragma GCC unroll 8
        for (int v = 0; v < TILE_VECTORS; v++) {
            vector zero = load_zeros(job->zero + at + v * LANES);
            floats scale = load_floats(job->scale + at + v * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                float *to = sums[r] + v * LANES;
                store_floats(to, scale_sums(sum[r][v], zero, q_sums[r * job->groups + group], scale, load_floats(to)));
            }
        }
    }
}

static void multiply_tile(int rows, const int4_job *job, int64_t row, int64_t panel, float sums[][PANEL]) {
    switch (rows) {
#define CASE(count)                                                                                                    \
    case count: multiply_rows(count, job, row, panel, sums); return;
        UP_TO_TILE_ROWS(CASE)
#undef CASE
    }
}

/* MANY_ROWS: from so many on of a group of rows, the nibbles are spread once for all of them. */
#if defined(__AMX_INT8__)
enum { ROW_GROUP = 64, MANY_ROWS = AMX_ROWS };
#include "int4_int8_amx.h"
#elif WIDEN_INTEGERS
enum { ROW_GROUP = 48, MANY_ROWS = TILE_ROWS + 1 };
#include "int4_int8_wide.h"
#else
enum { ROW_GROUP = 8 * TILE_ROWS };
#endif

/* Rows `begin` to `end` of those that begin at `first`. */
static void quantize_part(const int4_job *job, int64_t first, int64_t begin, int64_t end) {
    const int64_t width = job->words * 8, stride = job->q_stride, element = job->out.dtype == FLOAT32 ? 4 : 2;
    int8_t *q = job->q + begin * stride;
    quantize_rows((const char *)job->x + (first + begin) * job->x_stride * element, job->out.dtype, end - begin,
                  job->x_stride, job->k, job->channel_scale, 0, (uint8_t *)q, stride, job->row_scale + begin);
    for (int64_t row = begin; row < end; row++, q += stride) {
        memset(q + job->k, 0, (size_t)(width - job->k));
        for (int64_t group = 0; group < job->groups; group++) {
            int64_t from = group * job->group_words * 8, to = from + job->group_words * 8;
            int32_t sum = 0;
            for (int64_t i = from; i < (to < width ? to : width); i++) sum += q[i];
            job->q_sums[row * job->groups + group] = sum;
        }
    }
}

/* Multiplies the quantised rows, `rows` of them, the first of which is number `first`, by the panels that this thread takes. */
static void multiply_taken(const int4_job *job, int64_t first, int64_t rows, int64_t round, int threads) {
    const int64_t panels = divide_up(job->out.n, PANEL), row_groups = divide_up(rows, ROW_GROUP), units = panels * row_groups;
    const int64_t step = panels >= 8 * threads ? row_groups : 1;
#if defined(__AMX_INT8__)
    if (rows >= MANY_ROWS) amx_begin();
#endif
    for (int64_t taken = tw_take(job->units, round, step); taken < units; taken = tw_take(job->units, round, step))
        for (int64_t unit = taken; unit < taken + step; unit++) {
            int64_t panel = unit / row_groups, row = unit % row_groups * ROW_GROUP;
            int64_t last = row + ROW_GROUP < rows ? row + ROW_GROUP : rows;
#if defined(__AMX_INT8__) || WIDEN_INTEGERS
            if (last - row >= MANY_ROWS) {
                float sums[ROW_GROUP][PANEL];
                const int count = (int)(last - row);
#if defined(__AMX_INT8__)
                prefetch_results(&job->out, first + row, count, panel * PANEL);
#endif
                multiply_many(job, row, count, panel, sums);
                finish_floats(&job->out, sums[0], PANEL, job->row_scale + row, first + row, count, panel * PANEL);
                continue;
            }
#endif
            for (; row < last; row += TILE_ROWS) {
                float sums[TILE_ROWS][PANEL];
                int count = (int)(last - row < TILE_ROWS ? last - row : TILE_ROWS);
                multiply_tile(count, job, row, panel, sums);
                finish_floats(&job->out, sums[0], PANEL, job->row_scale + row, first + row, count, panel * PANEL);
            }
        }
#if defined(__AMX_INT8__)
    if (rows >= MANY_ROWS) amx_end();
#endif
}

static void int4_part(void *data) {
    int4_job mine = *(const int4_job *)data;
    const int4_job *job = &mine;
    int number, threads;
    tw_team(&number, &threads);
    if (job->own) {
        mine.q += number * job->m * job->q_stride;
        mine.q_sums += number * job->m * job->groups;
        mine.row_scale += number * job->m;
    }
    for (int64_t first = 0, round = 0; first < job->m; first += job->block, round++) {
        int64_t rows = job->m - first < job->block ? job->m - first : job->block, begin = 0, end = rows;
        if (!job->own) {
            tw_share(rows, &begin, &end);
            if (!number) tw_refill(job->units, round);
        }
        quantize_part(job, first, begin, end);
        if (!job->own) tw_barrier();
        multiply_taken(job, first, rows, round, threads);
        if (first + job->block < job->m) tw_barrier(); /* the next block overwrites q */
    }
}

/* packed, scale, zero: from pack. x: [m, k] in the format `dtype`, rows x_stride elements apart; y and residual (or NULL):
   [m, n], contiguous, in the same format. group: columns that share a scale, a multiple of 8 or at least k. bias:
   float32 [n] or NULL; channel_scale: float32 [k] or NULL. Scratch for `block` rows, which are quantised at a time: q of
   block * tw_int4_int8_row_bytes(k) bytes, q_sums of block * groups, row_scale of block; if `own`, block is m and every thread
   has a part of that size. Returns 0, or 1 for a format that this build cannot read. */
EXPORT int ISA_NAME(tw_int4_int8_linear)(const uint8_t *packed, const float *scale, const uint8_t *zero, int64_t n,
                                         int64_t k, int64_t group, const float *bias, const float *channel_scale,
                                         const void *x, int dtype, int64_t m, int64_t x_stride, const void *residual,
                                         int activation, void *y, int8_t *q, int32_t *q_sums, float *row_scale,
                                         int64_t block, int own, int threads) {
    if (dtype == FLOAT16 && !HAS_FLOAT16) return 1;
    int64_t words = divide_up(k, 8), group_words = group < k ? group / 8 : words;
    tw_queue units = {{0, 0}};
    int4_job job = {packed, zero, scale, channel_scale, k, ISA_NAME(tw_int4_int8_row_bytes)(k), words, group_words, divide_up(words, group_words), x, m,
                    x_stride, {bias, residual, activation, y, dtype, n}, q, q_sums, row_scale, block, own, &units};
    tw_parallel(int4_part, &job, threads);
    return 0;
}

/* A linear layer as steps of a program: INT4_QUANTIZE writes q, q_sums and row_scale, INT4_PRODUCT reads them.
   kernels/cpu/row_steps.py holds the same structure. The members are the arguments of tw_int4_int8_linear; all of x, q,
   q_sums and row_scale is there. */
typedef struct {
    const uint8_t *packed, *zero;
    const float *scale, *bias, *channel_scale;
    const void *x, *residual;
    void *y;
    int8_t *q;
    int32_t *q_sums;
    float *row_scale;
    int64_t m, n, k, x_stride, group;
    int32_t dtype, activation;
} int4_step;

static int4_job job_of(tw_step *step) {
    const int4_step *s = step->job;
    const int64_t words = divide_up(s->k, 8), group_words = s->group < s->k ? s->group / 8 : words;
    return (int4_job){s->packed, s->zero, s->scale, s->channel_scale, s->k, ISA_NAME(tw_int4_int8_row_bytes)(s->k), words,
                      group_words, divide_up(words, group_words), s->x, s->m, s->x_stride,
                      {s->bias, s->residual, s->activation, s->y, s->dtype, s->n}, s->q, s->q_sums, s->row_scale, s->m, 0,
                      &step->units};
}

void ISA_NAME(tw_int4_quantize_step)(tw_step *step, int number, int threads) {
    const int4_job job = job_of(step);
    int64_t begin, end;
    share_of(job.m, number, threads, &begin, &end);
    quantize_part(&job, 0, begin, end);
}

void ISA_NAME(tw_int4_product_step)(tw_step *step, int number, int threads) {
    const int4_job job = job_of(step);
    (void)number;
    multiply_taken(&job, 0, job.m, 0, threads);
}
