/* W8A8 linear layer in one call: quantise the rows of x, multiply, scale, bias, activation, residual, cast.

       y[m, n] = activation(s[m] * weight_scale[n] * sum_k q[m, k] * w[n, k] + bias[n]) + residual[m, n]

   Rows are quantised to u8 with zero point 128, because the instructions multiply u8 by s8; 128 times the sum of each row
   of w is taken off the result. The integer sum is exact.

   Weights are packed in panels of PANEL output channels; within a panel, four consecutive k of each channel stand
   together, and the channels side by side, so that a tile reads its panel from the first byte to the last:

       packed[panel][k / 4][channel][k % 4] */
#include "epilogue.h"
#include "parallel.h"
#include "quantize_row.h"
#include "simd.h"

enum { ZERO_POINT = 128, ROW_GROUP = 8 * TILE_ROWS };

static int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

/* Sizes in bytes of what `pack` fills: weights, and one int32 for each channel. */
EXPORT int64_t ISA_NAME(tw_int8_packed_bytes)(int64_t n, int64_t k) { return round_up(n, PANEL) * round_up(k, 4); }
EXPORT int64_t ISA_NAME(tw_panel)(void) { return PANEL; }

/* weight: int8 [n, k], contiguous. packed: as above, zeros beyond n and k. correction: int32 [n rounded up to PANEL]. */
EXPORT int ISA_NAME(tw_int8_pack)(const int8_t *weight, int64_t n, int64_t k, int8_t *packed, int32_t *correction) {
    int64_t steps = round_up(k, 4) / 4;
    memset(packed, 0, (size_t)ISA_NAME(tw_int8_packed_bytes)(n, k));
    memset(correction, 0, (size_t)round_up(n, PANEL) * sizeof *correction);
    for (int64_t channel = 0; channel < n; channel++) {
        int8_t *panel = packed + channel / PANEL * steps * PANEL * 4 + channel % PANEL * 4;
        int32_t sum = 0;
        for (int64_t i = 0; i < k; i++) {
            int8_t value = weight[channel * k + i];
            panel[i / 4 * PANEL * 4 + i % 4] = value;
            sum += value;
        }
        correction[channel] = ZERO_POINT * sum;
    }
    return 0;
}

/* `rows` is a constant wherever this is called: the loops over rows and vectors unroll, and the sums stay in registers. */
static inline __attribute__((always_inline)) void multiply_rows(int rows, const uint8_t *x, int64_t x_stride,
                                                                const int8_t *panel, int64_t steps,
                                                                int32_t sums[][PANEL]) {
    vector sum[TILE_ROWS][TILE_VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < TILE_VECTORS; v++) sum[r][v] = vector_zero();
    for (int64_t step = 0; step < steps; step++) {
        weights w[TILE_VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < TILE_VECTORS; v++) w[v] = load_weights(panel + (step * PANEL + v * LANES) * 4);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            activations a = broadcast_activations(x + r * x_stride + step * 4);
#pragma GCC unroll 8
            for (int v = 0; v < TILE_VECTORS; v++) sum[r][v] = dot4(sum[r][v], a, w[v]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < TILE_VECTORS; v++) vector_store(sums[r] + v * LANES, sum[r][v]);
}

static void multiply_tile(int rows, const uint8_t *x, int64_t x_stride, const int8_t *panel, int64_t steps,
                          int32_t sums[][PANEL]) {
    switch (rows) {
#define CASE(count)                                                                                                    \
    case count: multiply_rows(count, x, x_stride, panel, steps, sums); return;
        CASE(1)
        CASE(2)
#if defined(__AVX2__)
        CASE(3)
        CASE(4)
#endif
#if defined(__AVX512VNNI__)
        CASE(5)
        CASE(6)
#endif
#undef CASE
    }
}

typedef struct {
    const int8_t *packed;
    const int32_t *correction;
    int64_t k;
    const float *weight_scale, *channel_scale;
    const void *x;
    int64_t m, x_stride;
    output out;
    uint8_t *q;
    float *scale;
    int64_t block;
    int sharing;
    tw_queue *units;
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
    for (int r = 0; r < rows; r++) {
        float y[PANEL];
        const float row_scale = scale[r];
        for (int64_t i = 0; i < channels; i++)
            y[i] = (float)(sums[r][i] - correction[i]) * row_scale * weight_scale[i];
        finish_row(&job->out, y, row + r, channel, channels);
    }
}

static void finish_tile(const linear_job *job, int32_t sums[][PANEL], int64_t row, int rows, int64_t channel,
                        const float *scale) {
    int64_t channels = job->out.n - channel;
    if (channels >= PANEL)
        finish_channels(job, sums, row, rows, channel, PANEL, scale);
    else
        finish_channels(job, sums, row, rows, channel, channels, scale);
}

static void quantize_rows(const linear_job *job, int64_t first, int64_t begin, int64_t end, uint8_t *q, float *scale) {
    const int64_t q_stride = round_up(job->k, 4);
    for (int64_t row = begin; row < end; row++) {
        uint8_t *to = q + row * q_stride;
        scale[row] = quantize_row(job->x, job->out.dtype, (first + row) * job->x_stride, job->k, job->channel_scale,
                                  ZERO_POINT, to);
        for (int64_t i = job->k; i < q_stride; i++) to[i] = ZERO_POINT; /* their weights are 0 */
    }
}

/* Multiplies `rows` rows, whose quantised form begins at q, by the panel that begins at `channel`. */
static void multiply_group(const linear_job *job, const uint8_t *q, const float *scale, int64_t row, int64_t rows,
                           int64_t channel) {
    const int64_t steps = round_up(job->k, 4) / 4, q_stride = steps * 4;
    const int8_t *panel = job->packed + channel * q_stride;
    for (int64_t i = 0; i < rows; i += TILE_ROWS) {
        int32_t sums[TILE_ROWS][PANEL];
        int count = (int)(rows - i < TILE_ROWS ? rows - i : TILE_ROWS);
        multiply_tile(count, q + i * q_stride, q_stride, panel, steps, sums);
        finish_tile(job, sums, row + i, count, channel, scale + i);
    }
}

/* The next rows of the calling thread in BY_ROWS, whole tiles: many at first, fewer when little is left, so that the threads
   end together. Returns the first row, and m or more when all are taken. */
static int64_t take_rows(const linear_job *job, int threads, int64_t *rows) {
    const int64_t tiles = (job->m + TILE_ROWS - 1) / TILE_ROWS, most = job->block / TILE_ROWS;
    int64_t first = __atomic_load_n(&job->units->taken[0], __ATOMIC_RELAXED), count;
    do {
        count = (tiles - first) / (2 * threads);
        count = count > most ? most : count < 1 ? 1 : count;
    } while (first < tiles && !__atomic_compare_exchange_n(&job->units->taken[0], &first, first + count, 1,
                                                           __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    const int64_t row = first * TILE_ROWS, left = job->m - row;
    *rows = count * TILE_ROWS < left ? count * TILE_ROWS : left;
    return row;
}

static void linear_by_rows(const linear_job *job, int number, int threads) {
    uint8_t *q = job->q + number * job->block * round_up(job->k, 4);
    float *scale = job->scale + number * job->block;
    int64_t rows;
    for (int64_t row = take_rows(job, threads, &rows); row < job->m; row = take_rows(job, threads, &rows)) {
        quantize_rows(job, row, 0, rows, q, scale);
        for (int64_t channel = 0; channel < job->out.n; channel += PANEL)
            multiply_group(job, q, scale, row, rows, channel);
    }
}

static void linear_by_panels(const linear_job *job, int number, int threads) {
    const int64_t q_stride = round_up(job->k, 4), panels = (job->out.n + PANEL - 1) / PANEL;
    const int own = job->sharing == ALL;
    uint8_t *q = job->q + (own ? number * job->m * q_stride : 0);
    float *scale = job->scale + (own ? number * job->m : 0);
    for (int64_t first = 0, round = 0; first < job->m; first += job->block, round++) {
        int64_t rows = job->m - first < job->block ? job->m - first : job->block, begin = 0, end = rows;
        if (!own) {
            tw_share(rows, &begin, &end);
            if (!number) tw_refill(job->units, round);
        }
        quantize_rows(job, first, begin, end, q, scale);
        if (!own) tw_barrier();
        const int64_t groups = (rows + ROW_GROUP - 1) / ROW_GROUP, units = panels * groups;
        const int64_t step = panels >= 8 * threads ? groups : 1; /* a panel stays in the cache of one core */
        for (int64_t taken = tw_take(job->units, round, step); taken < units; taken = tw_take(job->units, round, step))
            for (int64_t unit = taken; unit < taken + step; unit++) {
                int64_t row = unit % groups * ROW_GROUP, left = rows - row;
                multiply_group(job, q + row * q_stride, scale + row, first + row, left < ROW_GROUP ? left : ROW_GROUP,
                               unit / groups * PANEL);
            }
        if (first + job->block < job->m) tw_barrier(); /* the next block overwrites q */
    }
}

static void linear_part(void *data) {
    const linear_job *job = data;
    int number, threads;
    tw_team(&number, &threads);
    if (job->sharing == BY_ROWS)
        linear_by_rows(job, number, threads);
    else
        linear_by_panels(job, number, threads);
}

/* packed, correction: from pack. x: [m, k] in the format `dtype`, rows x_stride elements apart; y and residual (or NULL):
   [m, n], contiguous, in the same format. weight_scale, bias (or NULL): float32 [n]. channel_scale: float32 [k] or NULL.
   block: rows quantised at a time, all m if `sharing` is ALL. q: scratch of block * (k rounded up to 4) bytes, scale: scratch
   of block floats; both for each thread unless `sharing` is TOGETHER. Returns 0, or 1 for a format that this build cannot
   read. */
EXPORT int ISA_NAME(tw_int8_linear)(const int8_t *packed, const int32_t *correction, int64_t n, int64_t k,
                                    const float *weight_scale, const float *bias, const float *channel_scale,
                                    const void *x, int dtype, int64_t m, int64_t x_stride, const void *residual,
                                    int activation, void *y, uint8_t *q, float *scale, int64_t block, int sharing,
                                    int threads) {
    if (dtype == FLOAT16 && !HAS_FLOAT16) return 1;
    output out = {bias, residual, activation, y, dtype, n};
    tw_queue units = {{0, 0}};
    linear_job job = {packed, correction, k, weight_scale, channel_scale, x, m, x_stride, out, q, scale, block, sharing,
                      &units};
    tw_parallel(linear_part, &job, threads);
    return 0;
}
