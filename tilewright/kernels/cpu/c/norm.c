/* Layer normalisation of rows, with the addition before and the quantisation after it:

       s = x + residual,   y = (s - mean(s)) / sqrt(variance(s) + epsilon) * weight + bias

   Where q is asked for, a row is quantised for the int8 products that read it while it is in the cache. The bits are those
   of PyTorch's own layer norm, so that a network answers the same whether its layers run one by one or as a program:
   running means and squares (Welford) of the lanes of a vector over 16 vectors, which are then merged in pairs (Chan), as
   in a cascade, and at last lane by lane. PyTorch's vectors have 8 lanes or 16, by the kernels it was built with: `lanes`
   says which order is wanted, and kernels/cpu/norms.py finds it out. One thread computes a row, whatever their number. */
#include "int8_rows.h"
#include "vector.h" /* after simd.h: from here on LANES are those of float32 */

/* kernels/cpu/row_steps.py holds the same structure. All are float32; rows of x and residual are x_stride and r_stride
   elements apart, those of the others contiguous. Of the pointers all but x may be NULL, and one of y and q. */
typedef struct {
    const float *x, *residual, *weight, *bias, *channel_scale;
    float *sum, *y;
    uint8_t *q; /* with the rows of int8_rows.h, and their scales */
    float *scale;
    int64_t rows, columns, x_stride, r_stride;
    float epsilon;
    int32_t lanes; /* 8 or 16 */
} norm_step;

#ifdef LANES
/* Vectors of 8 lanes, whatever the instruction set: 16 lanes are two. */
enum { HALF = 8, CHUNK = 16, CHAINS = 4, MOST_LEVELS = 16 };

/* Of the lanes of so many vectors: the mean, and the sum of the squared distances from it. */
typedef struct {
    int64_t count;
    __m256 mean[2], square[2];
} moments;

INLINE moments no_moments(void) {
    const __m256 zero = _mm256_setzero_ps();
    return (moments){0, {zero, zero}, {zero, zero}};
}

INLINE void merge(moments *into, const moments *more, int halves) {
    const int64_t count = into->count + more->count;
    const __m256 part = _mm256_set1_ps(count ? (float)more->count / (float)count : 0.0f);
    const __m256 before = _mm256_set1_ps((float)into->count);
    for (int h = 0; h < halves; h++) {
        const __m256 apart = _mm256_sub_ps(more->mean[h], into->mean[h]);
        const __m256 weight = _mm256_mul_ps(_mm256_mul_ps(apart, part), before);
        into->mean[h] = _mm256_add_ps(into->mean[h], _mm256_mul_ps(part, apart));
        into->square[h] = _mm256_fmadd_ps(apart, weight, _mm256_add_ps(into->square[h], more->square[h]));
    }
    into->count = count;
}

/* Of `chains` chunks of `vectors` vectors, side by side: each waits for its own last addition alone. */
INLINE void chunk_moments(const float *x, int chains, int vectors, int halves, moments *found) {
    for (int c = 0; c < chains; c++) found[c] = no_moments();
    for (int v = 0; v < vectors; v++) {
        const __m256 part = _mm256_set1_ps(1.0f / (float)(v + 1));
#pragma GCC unroll 4
        for (int c = 0; c < chains; c++)
            for (int h = 0; h < halves; h++) {
                const __m256 value = _mm256_loadu_ps(x + ((c * CHUNK + v) * halves + h) * HALF);
                const __m256 apart = _mm256_sub_ps(value, found[c].mean[h]);
                found[c].mean[h] = _mm256_fmadd_ps(apart, part, found[c].mean[h]);
                found[c].square[h] = _mm256_fmadd_ps(apart, _mm256_sub_ps(value, found[c].mean[h]), found[c].square[h]);
            }
    }
    for (int c = 0; c < chains; c++) found[c].count = vectors;
}

INLINE void moments_of(const float *x, int64_t columns, int halves, float *mean, float *variance) {
    const int lanes = HALF * halves;
    const int64_t vectors = columns / lanes, chunks = (vectors + CHUNK - 1) / CHUNK;
    int levels = 0;
    while (((int64_t)1 << levels) < chunks) levels++;
    moments sums[MOST_LEVELS];
    for (int level = 0; level < (levels ? levels : 1); level++) sums[level] = no_moments();
    for (int64_t chunk = 0; chunk < chunks;) {
        moments found[CHAINS];
        const int64_t left = vectors - chunk * CHUNK;
        const float *from = x + chunk * CHUNK * lanes;
        const int chains = left < CHUNK ? 1 : left / CHUNK < CHAINS ? (int)(left / CHUNK) : CHAINS;
        switch (chains) {
            case 4: chunk_moments(from, 4, CHUNK, halves, found); break;
            case 3: chunk_moments(from, 3, CHUNK, halves, found); break;
            case 2: chunk_moments(from, 2, CHUNK, halves, found); break;
            default: chunk_moments(from, 1, left < CHUNK ? (int)left : CHUNK, halves, found);
        }
        for (int c = 0; c < chains; c++) {
            merge(&sums[0], &found[c], halves);
            int64_t full = ++chunk;
            for (int level = 1; level < levels && !(full & 1); level++, full >>= 1) {
                merge(&sums[level], &sums[level - 1], halves);
                sums[level - 1] = no_moments();
            }
        }
    }
    for (int level = 1; level < levels; level++) merge(&sums[0], &sums[level], halves);
    float means[2 * HALF], squares[2 * HALF];
    for (int h = 0; h < halves; h++) {
        _mm256_storeu_ps(means + h * HALF, sums[0].mean[h]);
        _mm256_storeu_ps(squares + h * HALF, sums[0].square[h]);
    }
    int64_t count = 0;
    float m = 0.0f, s = 0.0f;
    for (int64_t i = vectors * lanes; i < columns; i++) {
        const float apart = x[i] - m;
        m += apart / (float)++count;
        s += apart * (x[i] - m);
    }
    for (int i = 0; i < lanes; i++) {
        const float part = count + vectors ? (float)vectors / (float)(count + vectors) : 0.0f, apart = means[i] - m;
        m = fmaf(part, apart, m);
        s += fmaf(apart * apart * part, (float)count, squares[i]);
        count += vectors;
    }
    *mean = m;
    *variance = s / (float)columns;
}

/* x + residual of one row, in `sum` or in its place; x itself where nothing is added. */
INLINE const float *summed_row(const norm_step *s, int64_t row, float *place) {
    const float *x = s->x + row * s->x_stride;
    if (!s->residual) return x;
    const float *residual = s->residual + row * s->r_stride;
    float *sum = s->sum ? s->sum + row * s->columns : place;
    int64_t i = 0;
    for (; i + LANES <= s->columns; i += LANES) v_store(sum + i, v_add(v_load(x + i), v_load(residual + i)));
    for (; i < s->columns; i++) sum[i] = x[i] + residual[i];
    return sum;
}

INLINE void quantize_normalised(const norm_step *s, int64_t row, const float *y) {
    if (s->q)
        quantize_for_product(y, FLOAT32, 1, s->columns, s->columns, s->channel_scale,
                             s->q + row * int8_row_bytes(s->columns), s->scale + row);
}

static void norm_row(const norm_step *s, int64_t row) {
    const int64_t columns = s->columns;
    float *y = s->y ? s->y + row * columns : (float *)tw_scratch;
    const float *x = summed_row(s, row, y);
    float mean, variance;
    if (s->lanes == HALF)
        moments_of(x, columns, 1, &mean, &variance);
    else
        moments_of(x, columns, 2, &mean, &variance);
    const vec m = v_set(mean), factor = v_set(1.0f / sqrtf(variance + s->epsilon)), one = v_set(1.0f), zero = v_zero();
    for (int64_t i = 0; i < columns; i += LANES) {
        const int n = columns - i < LANES ? (int)(columns - i) : LANES;
        const vec v = v_mul(v_sub(v_load_first(x + i, n), m), factor);
        const vec weight = s->weight ? v_load_first(s->weight + i, n) : one;
        v_store_first(y + i, v_fma(v, weight, s->bias ? v_load_first(s->bias + i, n) : zero), n);
    }
    quantize_normalised(s, row, y);
}

/* ---- the root of the mean square instead of mean and variance */
/* Of `vectors` vectors: STREAMS sums side by side, each in a cascade of LEVELS sums, of which one adds up `1 << power` of
   those below it; what is left over goes to the first. */
enum { STREAMS = 4, LEVELS = 4 };

INLINE void add_squares(const float *x, int streams, int halves, __m256 sum[STREAMS][2]) {
#pragma GCC unroll 4
    for (int c = 0; c < streams; c++)
        for (int h = 0; h < halves; h++) {
            const __m256 value = _mm256_loadu_ps(x + (c * halves + h) * HALF);
            sum[c][h] = _mm256_add_ps(sum[c][h], _mm256_mul_ps(value, value));
        }
}

INLINE float sum_of_squares(const float *x, int64_t columns, int halves) {
    const int lanes = HALF * halves;
    const int64_t vectors = columns / lanes, size = vectors / STREAMS;
    int power = 0;
    while (((int64_t)1 << power) < size) power++;
    power = power / LEVELS > 4 ? power / LEVELS : 4;
    const int64_t step = (int64_t)1 << power;
    __m256 sums[LEVELS][STREAMS][2];
    memset(sums, 0, sizeof sums);
    int64_t i = 0;
    while (i + step <= size) {
        for (int64_t end = i + step; i < end; i++) add_squares(x + i * STREAMS * lanes, STREAMS, halves, sums[0]);
        for (int level = 1; level < LEVELS; level++) {
            for (int c = 0; c < STREAMS; c++)
                for (int h = 0; h < halves; h++) {
                    sums[level][c][h] = _mm256_add_ps(sums[level][c][h], sums[level - 1][c][h]);
                    sums[level - 1][c][h] = _mm256_setzero_ps();
                }
            if (i & (step - 1) << (level * power)) break;
        }
    }
    for (; i < size; i++) add_squares(x + i * STREAMS * lanes, STREAMS, halves, sums[0]);
    for (int level = 1; level < LEVELS; level++)
        for (int c = 0; c < STREAMS; c++)
            for (int h = 0; h < halves; h++) sums[0][c][h] = _mm256_add_ps(sums[0][c][h], sums[level][c][h]);
    for (i = size * STREAMS; i < vectors; i++) add_squares(x + i * lanes, 1, halves, sums[0]);
    for (int c = 1; c < STREAMS; c++)
        for (int h = 0; h < halves; h++) sums[0][0][h] = _mm256_add_ps(sums[0][0][h], sums[0][c][h]);
    float parts[2 * HALF], total = 0.0f;
    for (int h = 0; h < halves; h++) _mm256_storeu_ps(parts + h * HALF, sums[0][0][h]);
    for (i = vectors * lanes; i < columns; i++) total += x[i] * x[i];
    for (int lane = 0; lane < lanes; lane++) total += parts[lane];
    return total;
}

static void rms_row(const norm_step *s, int64_t row) {
    const int64_t columns = s->columns;
    float *y = s->y ? s->y + row * columns : (float *)tw_scratch;
    const float *x = summed_row(s, row, y);
    const float square = s->lanes == HALF ? sum_of_squares(x, columns, 1) : sum_of_squares(x, columns, 2);
    const vec factor = v_set(1.0f / sqrtf(square / (float)columns + s->epsilon)), one = v_set(1.0f);
    for (int64_t i = 0; i < columns; i += LANES) {
        const int n = columns - i < LANES ? (int)(columns - i) : LANES;
        const vec weight = s->weight ? v_load_first(s->weight + i, n) : one;
        v_store_first(y + i, v_mul(v_mul(v_load_first(x + i, n), factor), weight), n);
    }
    quantize_normalised(s, row, y);
}

void ISA_NAME(tw_norm_step)(tw_step *step, int number, int threads) {
    const norm_step *s = step->job;
    int64_t begin, end;
    share_of(s->rows, number, threads, &begin, &end);
    for (int64_t row = begin; row < end; row++) {
        if (step->kind == RMS_NORM)
            rms_row(s, row);
        else
            norm_row(s, row);
    }
}

#else
void ISA_NAME(tw_norm_step)(tw_step *step, int number, int threads) { (void)step, (void)number, (void)threads; }
#endif
