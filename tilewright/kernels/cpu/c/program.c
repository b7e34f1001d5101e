/* Runs a list of steps, each shared by all threads, which wait for each other between two steps: one parallel region,
   and no interpreter, for a whole network.

   Steps of a chain are not shared: a thread takes an image through all of them, so that what one writes is still in its
   cache when the next reads it, and nobody waits. What only the chain itself reads lies in memory of the thread, the same
   for every image. */
#include <time.h>

#include "conv.h"
#include "parallel.h"

typedef struct {
    tw_step *steps;
    int64_t count;
} program;

void JOIN(tw_int8_quantize_step, TILEWRIGHT_ISA)(tw_step *step, int number, int threads);
void JOIN(tw_int8_product_step, TILEWRIGHT_ISA)(tw_step *step, int number, int threads);
void JOIN(tw_attention_step, TILEWRIGHT_ISA)(tw_step *step, int number, int threads);
void JOIN(tw_attention_begin, TILEWRIGHT_ISA)(const void *job);
void JOIN(tw_norm_step, TILEWRIGHT_ISA)(tw_step *step, int number, int threads);
void JOIN(tw_int4_quantize_step, TILEWRIGHT_ISA)(tw_step *step, int number, int threads);
void JOIN(tw_int4_product_step, TILEWRIGHT_ISA)(tw_step *step, int number, int threads);
void JOIN(tw_weight_only_convert_step, TILEWRIGHT_ISA)(tw_step *step, int number, int threads);
void JOIN(tw_weight_only_product_step, TILEWRIGHT_ISA)(tw_step *step, int number, int threads);
void JOIN(tw_elementwise_step, TILEWRIGHT_ISA)(tw_step *step, int number, int threads);

static void run_step(tw_step *step, int number, int threads) {
#if defined(__AVX2__) && defined(__FMA__)
    const int is_float = step->x_type == FLOAT32;
    switch (step->kind) {
        case CONV:
            if (is_float) JOIN(tw_float_conv, TILEWRIGHT_ISA)(step, number, threads);
            else JOIN(tw_int8_conv, TILEWRIGHT_ISA)(step, number, threads);
            return;
        case DEPTHWISE:
            if (is_float) JOIN(tw_float_depthwise, TILEWRIGHT_ISA)(step, number, threads);
            else JOIN(tw_int8_depthwise, TILEWRIGHT_ISA)(step, number, threads);
            return;
        case WINOGRAD: JOIN(tw_winograd, TILEWRIGHT_ISA)(step, number, threads); return;
        case INT8_QUANTIZE: JOIN(tw_int8_quantize_step, TILEWRIGHT_ISA)(step, number, threads); return;
        case INT8_PRODUCT: JOIN(tw_int8_product_step, TILEWRIGHT_ISA)(step, number, threads); return;
        case ATTENTION: JOIN(tw_attention_step, TILEWRIGHT_ISA)(step, number, threads); return;
        case NORM:
        case RMS_NORM: JOIN(tw_norm_step, TILEWRIGHT_ISA)(step, number, threads); return;
        case INT4_QUANTIZE: JOIN(tw_int4_quantize_step, TILEWRIGHT_ISA)(step, number, threads); return;
        case INT4_PRODUCT: JOIN(tw_int4_product_step, TILEWRIGHT_ISA)(step, number, threads); return;
        case WEIGHT_ONLY_CONVERT: JOIN(tw_weight_only_convert_step, TILEWRIGHT_ISA)(step, number, threads); return;
        case WEIGHT_ONLY_PRODUCT: JOIN(tw_weight_only_product_step, TILEWRIGHT_ISA)(step, number, threads); return;
        case ELEMENTWISE: JOIN(tw_elementwise_step, TILEWRIGHT_ISA)(step, number, threads); return;
        default: JOIN(tw_simple_step, TILEWRIGHT_ISA)(step, number, threads);
    }
#else
    (void)step, (void)number, (void)threads;
#endif
}

static void run_band(const tw_step *steps, int number, int threads) {
#if defined(__AVX2__) && defined(__FMA__)
    JOIN(tw_band, TILEWRIGHT_ISA)(steps, number, threads);
#else
    (void)steps, (void)number, (void)threads;
#endif
}

/* Of `step`, `image` alone, whose operands in slots are those of slot number `slot`. */
static tw_step of_image(const tw_step *step, int64_t image, int64_t slot) {
    tw_step one = *step;
    const int64_t x_size = step->x_type == FLOAT32 ? 4 : 1, y_size = step->y_type == FLOAT32 ? 4 : 1;
    const int64_t x_pixels = step->height * step->width, y_pixels = step->out_height * step->out_width;
    const int64_t x = step->kind == CONVERT && step->x_type == FLOAT32 ? step->x_image : x_pixels * step->x_stride;
    const int64_t residual = step->kind == MULTIPLY ? step->r_stride : y_pixels * step->r_stride;
#define MOVE(member, bit, bytes)                                                                                       \
    if (step->member) one.member = (void *)((char *)step->member + (step->in_slot & bit ? slot * step->slot_bytes : image * (bytes)))
    MOVE(x, X_IN_SLOT, x * x_size);
    MOVE(residual, RESIDUAL_IN_SLOT, residual * (step->r_type == FLOAT32 ? 4 : 1));
    MOVE(y, Y_IN_SLOT, y_pixels * step->y_stride * y_size);
    MOVE(marks, MARKS_IN_SLOT, (int64_t)sizeof *step->marks);
#undef MOVE
    one.batch = 1;
    if (step->marks) one.marks_count = 1;
    return one;
}

/* As many images for each thread as there are; all threads share those that are left over. */
static void run_chain(tw_step *first, int number, int threads) {
    const int64_t steps = first->chain, alone = first->batch / threads * threads;
    for (int64_t image = tw_take(&first->units, 0, 1); image < alone; image = tw_take(&first->units, 0, 1))
        for (int64_t i = 0; i < steps; i++) {
            tw_step one = of_image(first + i, image, number);
            run_step(&one, 0, 1);
        }
    for (int64_t image = alone; image < first->batch; image++)
        for (int64_t i = 0; i < steps; i++) {
            tw_barrier();
            tw_step one = of_image(first + i, image, 0);
            run_step(&one, number, threads);
        }
}

/* Counts what was begun at `begun`, if anything was, and returns the time: it begins what is next. */
static int64_t lap(tw_count *count, int64_t begun) {
    struct timespec clock;
    clock_gettime(CLOCK_MONOTONIC, &clock);
    const int64_t now = (int64_t)clock.tv_sec * 1000000000 + clock.tv_nsec;
    if (count) {
        count->nanoseconds += now - begun;
        count->calls++;
    }
    return now;
}

static void run_part(void *data) {
    program *p = data;
    int number, threads;
    tw_team(&number, &threads);
    tw_count *counted = NULL;
    int64_t begun = 0;
    for (int64_t i = 0; i < p->count; i++) {
        tw_step *step = p->steps + i;
        if (i && !step->independent) tw_barrier();
        /* By the first thread, behind the barrier: what it waits for the others is of the step before. */
        if (!number && (counted || step->count)) begun = lap(counted, begun);
        counted = step->count;
        if (step->band > 1 && i + step->band <= p->count) {
            run_band(step, number, threads);
            i += step->band - 1;
        } else if (step->chain) {
            run_chain(step, number, threads);
            i += step->chain - 1;
        } else {
            run_step(step, number, threads);
        }
    }
    if (counted) {
        tw_barrier();
        if (!number) lap(counted, begun);
    }
}

/* Lanes of float32 that weights are packed for; 0 where this build has no convolution. */
EXPORT int JOIN(tw_conv_lanes, TILEWRIGHT_ISA)(void) {
#if defined(__AVX512F__)
    return 16;
#elif defined(__AVX2__) && defined(__FMA__)
    return 8;
#else
    return 0;
#endif
}

EXPORT int64_t JOIN(tw_step_size, TILEWRIGHT_ISA)(void) { return sizeof(tw_step); }

EXPORT int JOIN(tw_run_steps, TILEWRIGHT_ISA)(tw_step *steps, int64_t count, int threads) {
    for (int64_t i = 0; i < count; i++) {
        steps[i].units.taken[0] = steps[i].units.taken[1] = 0;
        if (steps[i].kind == ATTENTION) JOIN(tw_attention_begin, TILEWRIGHT_ISA)(steps[i].job);
    }
    program p = {.steps = steps, .count = count};
    tw_parallel(run_part, &p, threads);
    return 0;
}
