/* Runs a list of steps, each shared by all threads, which wait for each other between two steps: one parallel region,
   and no interpreter, for a whole network. */
#include "conv.h"
#include "parallel.h"

typedef struct {
    const tw_step *steps;
    int64_t count;
} program;

static void run_step(const tw_step *step, int number, int threads) {
#if defined(__AVX2__) && defined(__FMA__)
    if (step->kind == CONV) {
        if (step->x_type == FLOAT32) JOIN(tw_float_conv, TILEWRIGHT_ISA)(step, number, threads);
        else JOIN(tw_int8_conv, TILEWRIGHT_ISA)(step, number, threads);
    } else if (step->kind == DEPTHWISE) {
        if (step->x_type == FLOAT32) JOIN(tw_float_depthwise, TILEWRIGHT_ISA)(step, number, threads);
        else JOIN(tw_int8_depthwise, TILEWRIGHT_ISA)(step, number, threads);
    } else if (step->kind == WINOGRAD) {
        JOIN(tw_winograd, TILEWRIGHT_ISA)(step, number, threads);
    } else {
        JOIN(tw_simple_step, TILEWRIGHT_ISA)(step, number, threads);
    }
#else
    (void)step, (void)number, (void)threads;
#endif
}

static void run_part(void *data) {
    program *p = data;
    int number, threads;
    tw_team(&number, &threads);
    for (int64_t i = 0; i < p->count; i++) {
        if (i) tw_barrier();
        run_step(p->steps + i, number, threads);
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

EXPORT int JOIN(tw_run_steps, TILEWRIGHT_ISA)(const tw_step *steps, int64_t count, int threads) {
    program p = {.steps = steps, .count = count};
    tw_parallel(run_part, &p, threads);
    return 0;
}
