/* W8A8 linear layer in one call: quantise the rows of x, multiply, scale, bias, activation, residual, cast.

       y[m, n] = activation(s[m] * weight_scale[n] * sum_k q[m, k] * w[n, k] + bias[n]) + residual[m, n]

   Rows are quantised to u8 with zero point 128, because the instructions multiply u8 by s8; 128 times the sum of each row
   of w is taken off the result. The integer sum is exact.

   Weights are packed in panels of PANEL output channels; within a panel, four consecutive k of each channel stand
   together, and the channels side by side, so that a tile reads its panel from the first byte to the last:

       packed[panel][k / 4][channel][k % 4]

   With AMX, the quadruples of 64 k and 16 channels are a tile, and tiles stand one after the other. Without VNNI a
   quantised row stands in the scratch memory in 16 bits (int8_wide.h). */
#include "epilogue.h"
#include "int8_rows.h"
#include "parallel.h"

/* UNIT_ROWS: a thread takes rows in multiples of it. FEW_ROWS: so many are
   multiplied without tiles, or without widening their weights first. */
#if defined(__AMX_INT8__)
enum { UNIT_ROWS = 2 * AMX_ROWS, ROW_GROUP = 64, FEW_ROWS = 6 };
#elif WIDEN_INTEGERS
#include "int8_wide.h"
enum { UNIT_ROWS = WIDE_ROWS, ROW_GROUP = 10 * WIDE_ROWS, FEW_ROWS = TILE_ROWS };
#else
enum { UNIT_ROWS = TILE_ROWS, ROW_GROUP = 8 * TILE_ROWS };
#endif
enum { TALLEST_TILE = 6 };

/* Where the quadruples of vector v begin within a panel. */
static inline int64_t quadruples(int64_t step, int v) {
#if defined(__AMX_INT8__)
    return step / AMX_ROWS * K_STEP * PANEL + v * AMX_TILE + step % AMX_ROWS * AMX_BYTES;
#else
    return (step * PANEL + v * LANES) * 4;
#endif
}

/* Sizes in bytes of what `pack` fills: weights, and one int32 for each channel. */
EXPORT int64_t ISA_NAME(tw_int8_packed_bytes)(int64_t n, int64_t k) { return round_up(n, PANEL) * round_up(k, K_STEP); }
EXPORT int64_t ISA_NAME(tw_panel)(void) { return PANEL; }

/* Bytes of a quantised row in the scratch memory; and how many rows are there for `rows`, since tiles are read whole. */
EXPORT int64_t ISA_NAME(tw_int8_row_bytes)(int64_t k) { return int8_row_bytes(k); }
EXPORT int64_t ISA_NAME(tw_int8_rows)(int64_t rows) {
#if defined(__AMX_INT8__)
    return round_up(rows, AMX_ROWS);
#else
    return rows;
#endif
}

/* weight: int8 [n, k], contiguous. packed: as above, zeros beyond n and k. correction: int32 [n rounded up to PANEL]. */
EXPORT int ISA_NAME(tw_int8_pack)(const int8_t *weight, int64_t n, int64_t k, int8_t *packed, int32_t *correction) {
    int64_t steps = round_up(k, K_STEP) / 4;
    memset(packed, 0, (size_t)ISA_NAME(tw_int8_packed_bytes)(n, k));
    memset(correction, 0, (size_t)round_up(n, PANEL) * sizeof *correction);
    for (int64_t channel = 0; channel < n; channel++) {
        const int lane = (int)(channel % PANEL);
        int8_t *panel = packed + channel / PANEL * steps * PANEL * 4 + lane % LANES * 4;
        int32_t sum = 0;
        for (int64_t i = 0; i < k; i++) {
            int8_t value = weight[channel * k + i];
            panel[quadruples(i / 4, lane / LANES) + i % 4] = value;
            sum += value;
        }
        correction[channel] = ZERO_POINT * sum;
    }
    return 0;
}

/* Four k of a quantised row. */
static inline activations activations_at(const uint8_t *row, int64_t step) {
#if WIDEN_INTEGERS
    return (activations){broadcast4(row + step * 8), broadcast4(row + step * 8 + 4)};
#else
    return broadcast_activations(row + step * 4);
#endif
}

/* `rows` is a constant wherever this is called: the loops over rows and vectors unroll, and the sums stay in registers. */
static inline __attribute__((always_inline)) void multiply_rows(int rows, const uint8_t *x, int64_t x_stride,
                                                                const int8_t *panel, int64_t steps,
                                                                int32_t sums[][PANEL]) {
    vector sum[TILE_ROWS][TILE_VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < TILE_VECTORS; v++) sum[r][v] = vector_zero();
    for (int64_t step = 0; step < steps; step++) {
        weights w[TILE_VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < TILE_VECTORS; v++) w[v] = load_weights(panel + quadruples(step, v));
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            activations a = activations_at(x + r * x_stride, step);
#pragma GCC unroll 8
            for (int v = 0; v < TILE_VECTORS; v++) sum[r][v] = dot4(sum[r][v], a, w[v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < TILE_VECTORS; v++) vector_store(sums[r] + v * LANES, sum[r][v]);
}

static void multiply_tile(int rows, const uint8_t *x, int64_t x_stride, const int8_t *panel, int64_t steps,
                          int32_t sums[][PANEL]) {
    switch (rows) {
#define CASE(count)                                                                                                    \
    case count: multiply_rows(count, x, x_stride, panel, steps, sums); return;
        UP_TO_TILE_ROWS(CASE)
#undef CASE
    }
}

typedef struct {
    const int8_t *packed;
    const int32_t *correction;
    int64_t k, q_stride;
    const float *weight_scale, *channel_scale;
    const void *x;
    int64_t m, x_stride;
    output out;
    uint8_t *q;
    float *scale;
    int64_t block;
    int sharing;
    tw_queue *units;
    int64_t *taken; /* in BY_ROWS: units of rows of each thread's part */
} linear_job;

/* How threads share the work. TOGETHER: they quantise `block` rows, wait for each other, and take panels of the weight. ALL:
   every thread quantises all rows for itself; for few of them that is quicker than to wait. BY_ROWS: each takes up to
   `block` rows, quantises and multiplies them; nobody waits, x and y pass through one core's cache once, and the weight has
   to stay there. */
enum { TOGETHER, ALL, BY_ROWS };

/* `channels` is a constant, PANEL, wherever that many are left: then the loops over it unroll. */
static inline __attribute__((always_inline)) void finish_channels(const linear_job *job, int32_t sums[][PANEL],
                                                                  int64_t row, int rows, int64_t channel,
                                                                  int64_t channels, const float *scale) {
    const int32_t *correction = job->correction + channel;
    const float *weight_scale = job->weight_scale + channel;
    float y[TALLEST_TILE][PANEL];
    for (int r = 0; r < rows; r++) {
        const float row_scale = scale[r];
        int64_t i = 0;
#if defined(__AVX2__) && !defined(__AVX512F__)
        for (; i + LANES <= channels; i += LANES) { /* left to itself the compiler takes one channel at a time */
            const vector sum = _mm256_sub_epi32(vector_load(sums[r] + i), vector_load(correction + i));
            const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(row_scale));
            _mm256_storeu_ps(y[r] + i, _mm256_mul_ps(scaled, _mm256_loadu_ps(weight_scale + i)));
        }
#endif
        for (; i < channels; i++) y[r][i] = (float)(sums[r][i] - correction[i]) * row_scale * weight_scale[i];
    }
    finish_floats(&job->out, y[0], PANEL, NULL, row, rows, channel);
}

/* At most TALLEST_TILE rows. */
static void finish_tile(const linear_job *job, int32_t sums[][PANEL], int64_t row, int rows, int64_t channel,
                        const float *scale) {
    int64_t channels = job->out.n - channel;
    if (channels >= PANEL)
        finish_channels(job, sums, row, rows, channel, PANEL, scale);
    else
        finish_channels(job, sums, row, rows, channel, channels, scale);
}

/* Rows `begin` to `end` of those that begin at `first`. */
static void quantize_part(const linear_job *job, int64_t first, int64_t begin, int64_t end, uint8_t *q, float *scale) {
    const int64_t element = job->out.dtype == FLOAT32 ? 4 : 2;
    quantize_for_product((const char *)job->x + (first + begin) * job->x_stride * element, job->out.dtype, end - begin,
                         job->x_stride, job->k, job->channel_scale, q + begin * job->q_stride, scale + begin);
}

#if defined(__AMX_INT8__)
#include "int8_amx.h"
#else
typedef int unfinished; /* nothing ever waits */
static void begin_waiting(unfinished *wait) { (void)wait; }
static void finish_rest(const linear_job *job, unfinished *wait) { (void)job, (void)wait; }
#endif

/* Multiplies up to ROW_GROUP rows, whose quantised form begins at q, by the panel that begins at `channel`. What waits
   then needs q no more, but `scale`. */
static void multiply_group(const linear_job *job, const uint8_t *q, const float *scale, int64_t row, int64_t rows,
                           int64_t channel, unfinished *wait) {
    const int64_t steps = round_up(job->k, 4) / 4, q_stride = job->q_stride;
    const int8_t *panel = job->packed + channel * round_up(job->k, K_STEP);
#if defined(__AMX_INT8__)
    if (rows > FEW_ROWS) {
        multiply_tiles(job, q, scale, row, rows, channel, wait);
        return;
    }
#elif WIDEN_INTEGERS
    if (rows > FEW_ROWS) {
        vector sums[ROW_GROUP][TILE_VECTORS];
        multiply_widened((int)rows, q, q_stride, panel, steps, sums);
        for (int64_t i = 0; i < rows; i += WIDE_ROWS)
            finish_tile(job, (int32_t(*)[PANEL])(sums + i), row + i, (int)(rows - i < WIDE_ROWS ? rows - i : WIDE_ROWS),
                        channel, scale + i);
        return;
    }
#endif
    (void)wait;
    for (int64_t i = 0; i < rows; i += TILE_ROWS) {
        int32_t sums[TILE_ROWS][PANEL];
        int count = (int)(rows - i < TILE_ROWS ? rows - i : TILE_ROWS);
        multiply_tile(count, q + i * q_stride, q_stride, panel, steps, sums);
        finish_tile(job, sums, row + i, count, channel, scale + i);
    }
}

/* The next rows of the calling thread in BY_ROWS, whole units. Each thread begins with its own part, which may still be in
   its cache from the operator before, and helps the others then. Many at first, fewer when little is left, so that the
   threads end together. Returns the first row, and m or more when all are taken. */
static int64_t take_rows(const linear_job *job, int number, int threads, int64_t *rows) {
    const int64_t all = (job->m + UNIT_ROWS - 1) / UNIT_ROWS, most = job->block / UNIT_ROWS;
    for (int i = 0; i < threads; i++) {
        const int whose = (number + i) % threads;
        const int64_t begin = whose * all / threads, units = (whose + 1) * all / threads - begin;
        int64_t first = __atomic_load_n(&job->taken[whose], __ATOMIC_RELAXED), count;
        do {
            count = (units - first) / 2;
            count = count > most ? most : count < 1 ? 1 : count;
        } while (first < units && !__atomic_compare_exchange_n(&job->taken[whose], &first, first + count, 1,
                                                               __ATOMIC_RELAXED, __ATOMIC_RELAXED));
        if (first >= units) continue;
        const int64_t row = (begin + first) * UNIT_ROWS, left = job->m - row;
        *rows = count * UNIT_ROWS < left ? count * UNIT_ROWS : left;
        return row;
    }
    return job->m;
}

static void linear_by_rows(const linear_job *job, int number, int threads) {
    uint8_t *q = job->q + number * ISA_NAME(tw_int8_rows)(job->block) * job->q_stride;
    float *scale = job->scale + number * job->block;
    unfinished wait;
    begin_waiting(&wait);
    int64_t rows;
    for (int64_t row = take_rows(job, number, threads, &rows); row < job->m;
         row = take_rows(job, number, threads, &rows)) {
        quantize_part(job, row, 0, rows, q, scale);
        for (int64_t channel = 0; channel < job->out.n; channel += PANEL)
            for (int64_t i = 0; i < rows; i += ROW_GROUP)
                multiply_group(job, q + i * job->q_stride, scale + i, row + i, rows - i < ROW_GROUP ? rows - i : ROW_GROUP,
                               channel, &wait);
        finish_rest(job, &wait);
    }
}

/* Multiplies `rows` quantised rows, the first of which is number `first`, by the panels that this thread takes. */
static void multiply_taken(const linear_job *job, const uint8_t *q, const float *scale, int64_t first, int64_t rows,
                           int64_t round, int threads, unfinished *wait) {
    const int64_t panels = (job->out.n + PANEL - 1) / PANEL, groups = (rows + ROW_GROUP - 1) / ROW_GROUP;
    const int64_t units = panels * groups, step = panels >= 8 * threads ? groups : 1; /* a panel stays in one cache */
    for (int64_t taken = tw_take(job->units, round, step); taken < units; taken = tw_take(job->units, round, step))
        for (int64_t unit = taken; unit < taken + step; unit++) {
            int64_t row = unit % groups * ROW_GROUP, left = rows - row;
            multiply_group(job, q + row * job->q_stride, scale + row, first + row, left < ROW_GROUP ? left : ROW_GROUP,
                           unit / groups * PANEL, wait);
        }
}

static void linear_by_panels(const linear_job *job, int number, int threads) {
    const int64_t q_stride = job->q_stride;
    const int own = job->sharing == ALL;
    uint8_t *q = job->q + (own ? number * ISA_NAME(tw_int8_rows)(job->m) * q_stride : 0);
    float *scale = job->scale + (own ? number * job->m : 0);
    unfinished wait;
    begin_waiting(&wait);
    for (int64_t first = 0, round = 0; first < job->m; first += job->block, round++) {
        int64_t rows = job->m - first < job->block ? job->m - first : job->block, begin = 0, end = rows;
        if (!own) {
            tw_share(rows, &begin, &end);
            if (!number) tw_refill(job->units, round);
        }
        quantize_part(job, first, begin, end, q, scale);
        if (!own) tw_barrier();
        multiply_taken(job, q, scale, first, rows, round, threads, &wait);
        finish_rest(job, &wait);
        if (first + job->block < job->m) tw_barrier(); /* the next block overwrites q */
    }
}

static void linear_part(void *data) {
    const linear_job *job = data;
    int number, threads;
    tw_team(&number, &threads);
#if defined(__AMX_INT8__)
    if (job->m > FEW_ROWS) amx_begin();
#endif
    if (job->sharing == BY_ROWS)
        linear_by_rows(job, number, threads);
    else
        linear_by_panels(job, number, threads);
#if defined(__AMX_INT8__)
    if (job->m > FEW_ROWS) amx_end();
#endif
}

/* packed, correction: from pack. x: [m, k] in the format `dtype`, rows x_stride elements apart; y and residual (or NULL):
   [m, n], contiguous, in the same format. weight_scale, bias (or NULL): float32 [n]. channel_scale: float32 [k] or NULL.
   block: rows quantised at a time, all m if `sharing` is ALL. q: scratch of tw_int8_rows(block) * tw_int8_row_bytes(k)
   bytes, scale: scratch of block floats; both for each thread unless `sharing` is TOGETHER. Returns 0, or 1 for a format
   that this build cannot read. */
EXPORT int ISA_NAME(tw_int8_linear)(const int8_t *packed, const int32_t *correction, int64_t n, int64_t k,
                                    const float *weight_scale, const float *bias, const float *channel_scale,
                                    const void *x, int dtype, int64_t m, int64_t x_stride, const void *residual,
                                    int activation, void *y, uint8_t *q, float *scale, int64_t block, int sharing,
                                    int threads) {
    if (dtype == FLOAT16 && !HAS_FLOAT16) return 1;
    output out = {bias, residual, activation, y, dtype, n};
    tw_queue units = {{0, 0}};
    int64_t taken[threads];
    memset(taken, 0, sizeof taken);
    linear_job job = {packed, correction, k, ISA_NAME(tw_int8_row_bytes)(k), weight_scale, channel_scale, x, m, x_stride,
                      out, q, scale, block, sharing, &units, taken};
    tw_parallel(linear_part, &job, threads);
    return 0;
}

/* A linear layer as steps of a program: INT8_QUANTIZE writes q and scale, INT8_PRODUCT reads them. kernels/cpu/steps.py
   holds the same structure. The members are the arguments of tw_int8_linear; all of x, q and scale is there. */
typedef struct {
    const int8_t *packed;
    const int32_t *correction;
    const float *weight_scale, *bias, *channel_scale;
    const void *x, *residual;
    void *y;
    uint8_t *q;
    float *scale;
    int64_t m, n, k, x_stride;
    int32_t dtype, activation;
} int8_step;

void ISA_NAME(tw_int8_quantize_step)(tw_step *step, int number, int threads) {
    const int8_step *s = step->job;
    const int64_t element = s->dtype == FLOAT32 ? 4 : 2;
    int64_t begin, end;
    share_of(s->m, number, threads, &begin, &end);
    quantize_for_product((const char *)s->x + begin * s->x_stride * element, s->dtype, end - begin, s->x_stride, s->k,
                         s->channel_scale, s->q + begin * int8_row_bytes(s->k), s->scale + begin);
}

void ISA_NAME(tw_int8_product_step)(tw_step *step, int number, int threads) {
    const int8_step *s = step->job;
    (void)number;
    output out = {s->bias, s->residual, s->activation, s->y, s->dtype, s->n};
    linear_job job = {.packed = s->packed, .correction = s->correction, .k = s->k, .q_stride = int8_row_bytes(s->k),
                      .weight_scale = s->weight_scale, .m = s->m, .out = out, .units = &step->units};
    unfinished wait;
    begin_waiting(&wait);
#if defined(__AMX_INT8__)
    if (s->m > FEW_ROWS) amx_begin();
#endif
    multiply_taken(&job, s->q, s->scale, 0, s->m, 0, threads, &wait);
    finish_rest(&job, &wait);
#if defined(__AMX_INT8__)
    if (s->m > FEW_ROWS) amx_end();
#endif
}
