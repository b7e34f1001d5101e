/* What stands between convolutions in a network: pooling, sums, products by channel, and changes of type or order. */
#include "conv_vector.h"
#include "parallel.h"

#ifdef LANES
/* The numbers that n stored values stand for. */
INLINE vec numbers(const void *p, int type, float scale, float zero, int64_t at, int n) {
    vec v = load_values(p, type, at, n);
    return type == FLOAT32 ? v : v_mul(v_sub(v, v_set(zero)), v_set(scale));
}

static inline int lanes_left(int64_t left) { return left < LANES ? (int)left : LANES; }

/* `window` is the place that the results of one pixel are collected in. A maximum of integers needs no scale. */
#define MAX_POOL_OF(name, type, least, REPLACES)                                                                       \
    static void name(const tw_step *s, int64_t pixel) {                                                                \
        const int64_t area = s->out_height * s->out_width, n = pixel / area, channels = s->channels;                   \
        const int64_t top = pixel % area / s->out_width * s->stride_height - s->top;                                   \
        const int64_t left = pixel % s->out_width * s->stride_width - s->left;                                         \
        type *restrict best = (type *)s->y + pixel * s->y_stride;                                                      \
        int empty = 1;                                                                                                 \
        for (int64_t i = 0; i < s->kernel_height; i++) {                                                               \
            const int64_t row = top + i * s->dilation_height;                                                          \
            if (row < 0 || row >= s->height) continue;                                                                 \
            for (int64_t j = 0; j < s->kernel_width; j++) {                                                            \
                const int64_t column = left + j * s->dilation_width;                                                   \
                if (column < 0 || column >= s->width) continue;                                                        \
                const type *x = (const type *)s->x + ((n * s->height + row) * s->width + column) * s->x_stride;        \
                if (empty) memcpy(best, x, (size_t)channels * sizeof *x);                                              \
                else                                                                                                   \
                    for (int64_t c = 0; c < channels; c++) best[c] = REPLACES ? x[c] : best[c];                        \
                empty = 0;                                                                                             \
            }                                                                                                          \
        }                                                                                                              \
        if (empty)                                                                                                     \
            for (int64_t c = 0; c < channels; c++) best[c] = least;                                                    \
    }
MAX_POOL_OF(max_pool_float, float, -__builtin_inff(), (x[c] > best[c] || x[c] != x[c]))
MAX_POOL_OF(max_pool_int8, int8_t, -128, x[c] > best[c])
MAX_POOL_OF(max_pool_uint8, uint8_t, 0, x[c] > best[c])

/* The mean over all pixels of an image: y [N, C]. */
static void mean(const tw_step *s, int64_t n, int64_t channel) {
    const int64_t area = s->height * s->width;
    const int lanes = lanes_left(s->channels - channel);
    vec sum = v_zero();
    for (int64_t i = 0; i < area; i++)
        sum = v_add(sum, load_values(s->x, s->x_type, (n * area + i) * s->x_stride + channel, lanes));
    if (s->x_type != FLOAT32) sum = v_mul(v_sub(sum, v_set(s->x_zero * (float)area)), v_set(s->x_scale));
    store_values(s, n * s->y_stride + channel, lanes, v_div(sum, v_set((float)area)));
}

/* activation(x + residual), or x times the residual's value [N, C] for its image and channel; x alone for CONVERT and ACTIVATE. */
static void combine(const tw_step *s, int64_t pixel) {
    const int64_t area = s->out_height * s->out_width;
    for (int64_t channel = 0; channel < s->channels; channel += LANES) {
        const int lanes = lanes_left(s->channels - channel);
        vec v = numbers(s->x, s->x_type, s->x_scale, s->x_zero, pixel * s->x_stride + channel, lanes);
        if (s->kind == ADD)
            v = v_add(v, numbers(s->residual, s->r_type, s->r_scale, s->r_zero, pixel * s->r_stride + channel, lanes));
        else if (s->kind == MULTIPLY)
            v = v_mul(v, numbers(s->residual, s->r_type, s->r_scale, s->r_zero, pixel / area * s->r_stride + channel, lanes));
        v = activate(v, s->activation, s->slope);
        store_values(s, pixel * s->y_stride + channel, lanes, v);
    }
}

/* 0 in every lane, and NaN where `seen` or v is not finite. */
INLINE vec v_unless_finite(vec seen, vec v) { return v_fma(v, v_zero(), seen); }

/* A row of a float image of any strides. Returns whether it is quantised and holds a value that is not finite. */
static int convert_row(const tw_step *s, int64_t row) {
    vec seen = v_zero();
    const float *x = (const float *)s->x + row / s->height * s->x_image + row % s->height * s->x_row;
    const int64_t pixel = row * s->width;
    if (s->x_channel == 1 || s->channels == 1) { /* one of the two is already in order: whole vectors of it */
        const int64_t inner = s->channels == 1 && s->x_stride == 1 && s->y_stride == 1 ? s->width : s->channels;
        for (int64_t q = 0; q < s->width * s->channels / inner; q++)
            for (int64_t i = 0; i < inner; i += LANES) {
                const int lanes = lanes_left(inner - i);
                const vec v = v_load_first(x + q * s->x_stride + i, lanes);
                seen = v_unless_finite(seen, v);
                store_values(s, (pixel + q) * s->y_stride + i, lanes, v);
            }
        return !v_all_ordered(seen);
    }
    if (s->x_stride != 1 || s->channels > LANES) {
        float values[LANES];
        for (int64_t q = 0; q < s->width; q++)
            for (int64_t channel = 0; channel < s->channels; channel += LANES) {
                const int lanes = lanes_left(s->channels - channel);
                for (int i = 0; i < lanes; i++) values[i] = x[q * s->x_stride + (channel + i) * s->x_channel];
                const vec v = v_load_first(values, lanes);
                seen = v_unless_finite(seen, v);
                store_values(s, (pixel + q) * s->y_stride + channel, lanes, v);
            }
        return !v_all_ordered(seen);
    }
    /* A few planes, as of a picture: whole vectors are rounded before they are interleaved. */
    int8_t q8[LANES];
    tw_step to_q8 = *s;
    to_q8.y = q8;
    for (int64_t channel = 0; channel < s->channels; channel++)
        for (int64_t q = 0; q < s->width; q += LANES) {
            const int lanes = lanes_left(s->width - q);
            const float *from = x + channel * s->x_channel + q;
            const int64_t to = (pixel + q) * s->y_stride + channel;
            if (s->y_type == FLOAT32) {
                for (int i = 0; i < lanes; i++) ((float *)s->y)[to + i * s->y_stride] = from[i];
            } else {
                const vec v = v_load_first(from, lanes);
                seen = v_unless_finite(seen, v);
                store_values(&to_q8, 0, lanes, v);
                for (int i = 0; i < lanes; i++) ((int8_t *)s->y)[to + i * s->y_stride] = q8[i];
            }
        }
    return !v_all_ordered(seen);
}

/* Rows begin to end. A mark has several rows, which may be those of several threads. */
static void convert_rows(const tw_step *s, int64_t begin, int64_t end) {
    const int64_t rows = s->batch * s->height;
    for (int64_t row = begin; row < end; row++)
        if (convert_row(s, row) && s->marks) {
            float nan = __builtin_nanf("");
            __atomic_store(s->marks + row * s->marks_count / rows, &nan, __ATOMIC_RELAXED);
        }
}

/* Writes NaN over all that stands under a mark, of which there is one for each image or one for all. */
static void mark(const tw_step *s, int64_t begin, int64_t end) {
    const int64_t pixels = s->batch * s->out_height * s->out_width;
    for (int64_t pixel = begin; pixel < end; pixel++) {
        const int64_t of = pixel * s->marks_count / pixels;
        if (s->marks[of] == s->marks[of]) {
            pixel = ((of + 1) * pixels + s->marks_count - 1) / s->marks_count - 1; /* the last one under that mark */
            continue;
        }
        float *y = (float *)s->y + pixel * s->y_stride;
        for (int64_t c = 0; c < s->out_channels; c++) y[c] = __builtin_nanf("");
    }
}

void JOIN(tw_simple_step, TILEWRIGHT_ISA)(const tw_step *s, int number, int count) {
    int64_t begin, end;
    if (s->kind == MEAN) {
        const int64_t vectors = (s->channels + LANES - 1) / LANES;
        share_of(s->batch * vectors, number, count, &begin, &end);
        for (int64_t i = begin; i < end; i++) mean(s, i / vectors, i % vectors * LANES);
        return;
    }
    if (s->kind == CONVERT && s->x_type == FLOAT32) {
        if (s->marks) {
            if (!number) memset(s->marks, 0, (size_t)s->marks_count * sizeof *s->marks);
            if (count > 1) tw_barrier(); /* in a chain a thread works for itself */
        }
        share_of(s->batch * s->height, number, count, &begin, &end);
        convert_rows(s, begin, end);
        return;
    }
    share_of(s->batch * s->out_height * s->out_width, number, count, &begin, &end);
    if (s->kind == MARK) {
        mark(s, begin, end);
        return;
    }
    for (int64_t pixel = begin; pixel < end; pixel++) {
        if (s->kind != MAX_POOL) combine(s, pixel);
        else if (s->x_type == FLOAT32) max_pool_float(s, pixel);
        else if (s->x_type == UINT8) max_pool_uint8(s, pixel);
        else max_pool_int8(s, pixel);
    }
}
#endif
