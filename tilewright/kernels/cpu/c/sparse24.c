/* A few float32 rows times a 2:4 weight, read in its compressed form.

       y[m, n] = activation(sum_k x[m, k] * w[n, k] + bias[n]) + residual[m, n]

   Sixteen columns of a channel hold eight kept values and a mask of 16 bits, which one expand instruction makes the
   sixteen weights of. What is not kept is a true zero there and meets its x: NaN and Inf reach their whole row.

   Weights are packed in panels of CHANNELS output channels, so that a panel is read from the first byte to the last:

       masks[panel][k / 16][channel]
       values[panel][k / 16][channel][8]              float32, or
       values[panel][k / 16][channel / 2][8][2]       bfloat16, the second of two channels first

   Two bfloat16 so lie in the 32 bits of one lane: masked off, and shifted up, they are two float32. */
#include "epilogue.h"
#include "parallel.h"

/* UNIT: channels that a thread takes at once. */
enum { CHANNELS = 4, COLUMNS = 16, KEPT = 8, UNIT = 16 };

typedef struct {
    const void *values;
    const uint16_t *masks;
    const float *bias;
    int64_t n, k;
    int32_t format, activation;
} sparse24_weight;

#if defined(__AVX512F__)

#include <immintrin.h>

/* ROWS: of a tile, whose sums fill 24 of 32 registers. CHAIN: products that a lane adds up one after the other; longer
   sums are made of such, so that the error does not grow with K. */
enum { ROWS = 6, CHAIN = 32 };

/* The weights of sixteen columns; `format` is a constant wherever this is called. */
static inline __attribute__((always_inline)) void expand_step(int format, const void *values, const uint16_t *masks,
                                                              __m512 w[CHANNELS]) {
#pragma GCC unroll 4
    for (int c = 0; c < CHANNELS; c += 2) {
        __m256 first, second;
        if (format == BFLOAT16) {
            const __m256i both = _mm256_loadu_si256((const __m256i *)((const uint16_t *)values + c * KEPT));
            first = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32((int)0xffff0000u)));
            second = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
        } else {
            first = _mm256_loadu_ps((const float *)values + c * KEPT);
            second = _mm256_loadu_ps((const float *)values + (c + 1) * KEPT);
        }
        w[c] = _mm512_maskz_expand_ps(masks[c], _mm512_castps256_ps512(first));
        w[c + 1] = _mm512_maskz_expand_ps(masks[c + 1], _mm512_castps256_ps512(second));
    }
}

/* The sum of the lanes of each of four vectors. */
static inline __m128 add_lanes(const __m512 v[CHANNELS]) {
    const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const __m512 lanes = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* `rows` rows by one panel; sums: rows UNIT floats apart. `rows` and `format` are constants wherever this is called: the
   loops over rows and channels unroll, and the sums stay in registers. */
static inline __attribute__((always_inline)) void multiply_rows(int rows, int format, const float *x, int64_t stride,
                                                                const void *values, const uint16_t *masks, int64_t k,
                                                                float *sums) {
    const int64_t whole = k / COLUMNS, steps = (k + COLUMNS - 1) / COLUMNS;
    const int64_t step_bytes = CHANNELS * KEPT * (format == BFLOAT16 ? 2 : 4);
    const __mmask16 rest = (__mmask16)((1u << (k % COLUMNS)) - 1);
    const char *from = values;
    __m512 total[ROWS][CHANNELS];
    for (int64_t begin = 0; begin < steps; begin += CHAIN) {
        const int64_t end = begin + CHAIN < whole ? begin + CHAIN : whole;
        __m512 sum[ROWS][CHANNELS], w[CHANNELS];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int c = 0; c < CHANNELS; c++) sum[r][c] = _mm512_setzero_ps();
        for (int64_t step = begin; step < end; step++) {
            expand_step(format, from + step * step_bytes, masks + step * CHANNELS, w);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                const __m512 a = _mm512_loadu_ps(x + r * stride + step * COLUMNS);
#pragma GCC unroll 4
                for (int c = 0; c < CHANNELS; c++) sum[r][c] = _mm512_fmadd_ps(a, w[c], sum[r][c]);
            }
        }
        if (rest && begin + CHAIN >= steps) {
            expand_step(format, from + whole * step_bytes, masks + whole * CHANNELS, w);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                const __m512 a = _mm512_maskz_loadu_ps(rest, x + r * stride + whole * COLUMNS);
#pragma GCC unroll 4
                for (int c = 0; c < CHANNELS; c++) sum[r][c] = _mm512_fmadd_ps(a, w[c], sum[r][c]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int c = 0; c < CHANNELS; c++)
                total[r][c] = begin ? _mm512_add_ps(total[r][c], sum[r][c]) : sum[r][c];
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) _mm_storeu_ps(sums + r * UNIT, add_lanes(total[r]));
}

static void multiply_panel(int rows, int format, const float *x, int64_t stride, const void *values,
                           const uint16_t *masks, int64_t k, float *sums) {
    switch (rows + (format == BFLOAT16 ? ROWS : 0)) {
#define CASE(count)                                                                                                    \
    case count: multiply_rows(count, FLOAT32, x, stride, values, masks, k, sums); return;                              \
    case count + ROWS: multiply_rows(count, BFLOAT16, x, stride, values, masks, k, sums); return;
        UP_TO_6(CASE)
#undef CASE
    }
}

typedef struct {
    const sparse24_weight *weight;
    const float *x;
    int64_t m, stride;
    output out;
    tw_queue *units;
} sparse24_job;

static void sparse24_part(void *data) {
    const sparse24_job *job = data;
    const sparse24_weight *weight = job->weight;
    const int64_t panel_masks = (weight->k + COLUMNS - 1) / COLUMNS * CHANNELS;
    const int64_t panel_bytes = panel_masks * KEPT * (weight->format == BFLOAT16 ? 2 : 4);
    const int64_t units = (weight->n + UNIT - 1) / UNIT;
    for (int64_t unit = tw_take(job->units, 0, 1); unit < units; unit = tw_take(job->units, 0, 1)) {
        const int64_t channel = unit * UNIT, left = weight->n - channel;
        for (int64_t row = 0; row < job->m; row += ROWS) {
            const int rows = (int)(job->m - row < ROWS ? job->m - row : ROWS);
            float sums[ROWS * UNIT];
            for (int64_t c = 0; c < UNIT && c < left; c += CHANNELS) {
                const int64_t panel = (channel + c) / CHANNELS;
                multiply_panel(rows, weight->format, job->x + row * job->stride, job->stride,
                               (const char *)weight->values + panel * panel_bytes, weight->masks + panel * panel_masks,
                               weight->k, sums + c);
            }
            finish_floats(&job->out, sums, UNIT, 0, row, rows, channel);
        }
    }
}

/* Output channels of a panel; 0 where this build has no such instruction. */
EXPORT int64_t ISA_NAME(tw_sparse24_channels)(void) { return CHANNELS; }

/* x: float32 [m, k], rows x_stride elements apart; residual (or NULL) and y: float32 [m, n], contiguous; all sizes above
   0. The weight is packed as above, its last panel filled up with zeros. Returns 0, or 1 where this build has no such
   instruction. */
EXPORT int ISA_NAME(tw_sparse24_linear)(const sparse24_weight *weight, const float *x, int64_t m, int64_t x_stride,
                                        const float *residual, float *y, int threads) {
    output out = {weight->bias, residual, weight->activation, y, FLOAT32, weight->n};
    tw_queue units = {{0, 0}};
    sparse24_job job = {weight, x, m, x_stride, out, &units};
    tw_parallel(sparse24_part, &job, threads);
    return 0;
}

#else

EXPORT int64_t ISA_NAME(tw_sparse24_channels)(void) { return 0; }

EXPORT int ISA_NAME(tw_sparse24_linear)(const sparse24_weight *weight, const float *x, int64_t m, int64_t x_stride,
                                        const float *residual, float *y, int threads) {
    (void)weight, (void)x, (void)m, (void)x_stride, (void)residual, (void)y, (void)threads;
    return 1;
}

#endif
