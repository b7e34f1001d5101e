/* Layer and RMS normalisation of rows, with the addition before and the quantisation after it:

       s = x + residual,   y = (s - mean(s)) / sqrt(variance(s) + epsilon) * weight + bias

   RMS: s / sqrt(mean(s^2) + epsilon) * weight. Where q is asked for, a row is quantised for the int8 products that read it
   while it is in the cache. The sums are over lanes, then of the lanes: PyTorch adds in another order, so results differ
   from its in the last bits. One thread computes a row, whatever their number. */
#include "int8_rows.h"
#include "vector.h" /* after simd.h: from here on LANES are those of float32 */

/* kernels/cpu/steps.py holds the same structure. All are float32; rows of x and residual are x_stride and r_stride
   elements apart, those of the others contiguous. Of the pointers all but x may be NULL, and one of y and q. */
typedef struct {
    const float *x, *residual, *weight, *bias, *channel_scale;
    float *sum, *y;
    uint8_t *q; /* with the rows of int8_rows.h, and their scales */
    float *scale;
    int64_t rows, columns, x_stride, r_stride;
    float epsilon;
    int32_t rms;
} norm_step;

#ifdef LANES
/* Four sums at once: an addition takes four cycles. */
enum { CHAINS = 4 };

/* Body for each vector of a row, with CHAIN a constant; `n` lanes of it are there. */
#define FOR_VECTORS(columns, body)                                                                                     \
    do {                                                                                                               \
        int64_t i = 0;                                                                                                 \
        const int n = LANES;                                                                                           \
        for (; i + CHAINS * LANES <= (columns); i += CHAINS * LANES) {                                                 \
            const int64_t first = i;                                                                                   \
            { enum { CHAIN = 0 }; const int64_t at = first; body }                                                     \
            { enum { CHAIN = 1 }; const int64_t at = first + LANES; body }                                             \
            { enum { CHAIN = 2 }; const int64_t at = first + 2 * LANES; body }                                         \
            { enum { CHAIN = 3 }; const int64_t at = first + 3 * LANES; body }                                         \
        }                                                                                                              \
        for (; i + LANES <= (columns); i += LANES) { enum { CHAIN = 0 }; const int64_t at = i; body }                  \
        if (i < (columns)) {                                                                                           \
            enum { CHAIN = 0 };                                                                                        \
            const int n = (int)((columns)-i);                                                                          \
            const int64_t at = i;                                                                                      \
            body                                                                                                       \
        }                                                                                                              \
    } while (0)

INLINE float total_of(const vec sums[CHAINS]) {
    return v_total(v_add(v_add(sums[0], sums[1]), v_add(sums[2], sums[3])));
}

/* Lanes beyond the row count for nothing. */
INLINE vec only_first(vec v, int n) {
    float lanes[LANES];
    if (n == LANES) return v;
    v_store(lanes, v);
    return v_load_first(lanes, n);
}

static void norm_row(const norm_step *s, int64_t row) {
    const float *x = s->x + row * s->x_stride, *residual = s->residual ? s->residual + row * s->r_stride : NULL;
    const int64_t columns = s->columns;
    float *y = s->y ? s->y + row * columns : (float *)tw_scratch, *sum = s->sum ? s->sum + row * columns : y;
    vec sums[CHAINS] = {v_zero(), v_zero(), v_zero(), v_zero()};
    if (residual || s->sum || !s->rms)
        FOR_VECTORS(columns, {
            vec v = v_load_first(x + at, n);
            if (residual) v = v_add(v, v_load_first(residual + at, n));
            if (residual || s->sum) v_store_first(sum + at, v, n);
            sums[CHAIN] = v_add(sums[CHAIN], v);
        });
    if (residual) x = sum; /* else it stays: y may be another's x */
    const vec mean = v_set(s->rms ? 0.0f : total_of(sums) / (float)columns);
    for (int i = 0; i < CHAINS; i++) sums[i] = v_zero();
    FOR_VECTORS(columns, {
        const vec v = only_first(v_sub(v_load_first(x + at, n), mean), n);
        sums[CHAIN] = v_fma(v, v, sums[CHAIN]);
    });
    const vec factor = v_set(1.0f / sqrtf(total_of(sums) / (float)columns + s->epsilon));
    FOR_VECTORS(columns, {
        vec v = v_mul(v_sub(v_load_first(x + at, n), mean), factor);
        if (s->weight) v = v_mul(v, v_load_first(s->weight + at, n));
        if (s->bias) v = v_add(v, v_load_first(s->bias + at, n));
        v_store_first(y + at, v, n);
    });
    if (s->q)
        quantize_for_product(y, FLOAT32, 1, columns, columns, s->channel_scale, s->q + row * int8_row_bytes(columns),
                             s->scale + row);
}

void ISA_NAME(tw_norm_step)(tw_step *step, int number, int threads) {
    const norm_step *s = step->job;
    int64_t begin, end;
    share_of(s->rows, number, threads, &begin, &end);
    for (int64_t row = begin; row < end; row++) norm_row(s, row);
}

#else
void ISA_NAME(tw_norm_step)(tw_step *step, int number, int threads) { (void)step, (void)number, (void)threads; }
#endif
