/* Runs a list of steps, each shared by all threads, which wait for each other between two steps: one parallel region,
   and no interpreter, for a whole network. */
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

static void run_part(void *data) {
    program *p = data;
    int number, threads;
    tw_team(&number, &threads);
    for (int64_t i = 0; i < p->count; i++) {
        if (i && !p->steps[i].independent) tw_barrier();
        const int64_t band = p->steps[i].band;
        if (band > 1 && i + band <= p->count) {
            run_band(p->steps + i, number, threads);
            i += band - 1;
        } else {
            run_step(p->steps + i, number, threads);
        }
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
