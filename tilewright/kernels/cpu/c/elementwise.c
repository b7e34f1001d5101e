/* One operation on each number of float32 tensors of any strides, as a step of a program: y = a, -a, a + b, a - b, a * b.

   Steps of few numbers are done by one thread, the last, which is also the one that has a single row of other steps: one
   after the other they need no barrier. */
#include "conv_vector.h"

enum { COPY, NEGATE, SUM, DIFFERENCE, PRODUCT };

/* kernels/cpu/row_steps.py holds the same structure. Strides count elements, and are 0 where a number is repeated; those of
   y are not, and its last is 1. b: NULL for `scalar` everywhere. */
typedef struct {
    const float *a, *b;
    float *y;
    int64_t size[4], a_stride[4], b_stride[4], y_stride[4];
    float scalar;
    int32_t operation, alone; /* alone: one thread does it all */
} elementwise_step;

#ifdef LANES
INLINE vec vector_at(const float *p, int64_t stride, int n) {
    if (stride == 1) return v_load_first(p, n);
    if (!stride) return v_set(*p);
    float lanes[LANES] = {0};
    for (int i = 0; i < n; i++) lanes[i] = p[i * stride];
    return v_load(lanes);
}

/* Numbers of a row that a thread takes at once. */
enum { RUN = 2048 };

/* `operation` is a constant wherever this is called. */
INLINE void run_row(int operation, const elementwise_step *s, const float *a, const float *b, float *y, int64_t begin) {
    const int64_t a_stride = s->a_stride[3], b_stride = s->b ? s->b_stride[3] : 0;
    const int64_t end = begin + RUN < s->size[3] ? begin + RUN : s->size[3];
    for (int64_t i = begin; i < end; i += LANES) {
        const int n = end - i < LANES ? (int)(end - i) : LANES;
        const vec left = vector_at(a + i * a_stride, a_stride, n);
        vec value = left;
        if (operation == NEGATE) {
            value = v_sub(v_set(-0.0f), left);
        } else if (operation != COPY) {
            const vec right = vector_at(b + i * b_stride, b_stride, n);
            value = operation == SUM ? v_add(left, right) : operation == PRODUCT ? v_mul(left, right) : v_sub(left, right);
        }
        v_store_first(y + i, value, n);
    }
}

void JOIN(tw_elementwise_step, TILEWRIGHT_ISA)(tw_step *step, int number, int threads) {
    const elementwise_step *s = step->job;
    const int64_t runs = (s->size[3] + RUN - 1) / RUN;
    int64_t begin = 0, end = s->size[0] * s->size[1] * s->size[2] * runs;
    if (s->alone && number != threads - 1) return;
    if (!s->alone) share_of(end, number, threads, &begin, &end);
    for (int64_t unit = begin; unit < end; unit++) {
        const int64_t row = unit / runs, first = unit % runs * RUN;
        const int64_t at[3] = {row / s->size[2] / s->size[1], row / s->size[2] % s->size[1], row % s->size[2]};
        const float *a = s->a, *b = s->b ? s->b : &s->scalar;
        float *y = s->y;
        for (int i = 0; i < 3; i++) {
            a += at[i] * s->a_stride[i], y += at[i] * s->y_stride[i];
            if (s->b) b += at[i] * s->b_stride[i];
        }
        switch (s->operation) {
            case COPY: run_row(COPY, s, a, b, y, first); break;
            case NEGATE: run_row(NEGATE, s, a, b, y, first); break;
            case SUM: run_row(SUM, s, a, b, y, first); break;
            case DIFFERENCE: run_row(DIFFERENCE, s, a, b, y, first); break;
            default: run_row(PRODUCT, s, a, b, y, first);
        }
    }
}

#else
void JOIN(tw_elementwise_step, TILEWRIGHT_ISA)(tw_step *step, int number, int threads) { (void)step, (void)number, (void)threads; }
#endif
