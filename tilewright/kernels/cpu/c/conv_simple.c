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

#ifdef __AVX512F__
/* Of up to 64 channels of int8. */
static void max_pool_vector(const tw_step *s, int64_t pixel) {
    const int64_t area = s->out_height * s->out_width, n = pixel / area;
    const int64_t top = pixel % area / s->out_width * s->stride_height - s->top;
    const int64_t left = pixel % s->out_width * s->stride_width - s->left;
    const __mmask64 mask = s->channels < 64 ? ((__mmask64)1 << s->channels) - 1 : ~(__mmask64)0;
    __m512i best = _mm512_set1_epi8(-128);
    for (int64_t i = 0; i < s->kernel_height; i++) {
        const int64_t row = top + i * s->dilation_height;
        if (row < 0 || row >= s->height) continue;
        for (int64_t j = 0; j < s->kernel_width; j++) {
            const int64_t column = left + j * s->dilation_width;
            if (column < 0 || column >= s->width) continue;
            const int8_t *x = (const int8_t *)s->x + ((n * s->height + row) * s->width + column) * s->x_stride;
            best = _mm512_max_epi8(best, _mm512_maskz_loadu_epi8(mask, x));
        }
    }
    _mm512_mask_storeu_epi8((int8_t *)s->y + pixel * s->y_stride, mask, best);
}
#endif

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

#ifdef __AVX512F__
/* Within 12 units in the last place of 256 of the middle between two integers a quotient is divided. */
#define DOUBT 0.4998f

/* Whether numbers become int8 and `quick_bytes` may do it: else `store_values` does. */
static inline int is_quick(const tw_step *s) { return s->y_type == INT8 && s->activation == NONE && s->y_scale >= 1e-37f; }

/* Writes `count` values, or their products with `factors`, as int8. */
INLINE void quantize_run(const bounds *b, const float *x, const float *factors, int8_t *y, int64_t count, vec *seen) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int64_t i = 0; i < count; i += 4 * LANES) {
        vec v[4], quotients[4];
        const int64_t left = count - i;
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            const int64_t n = left - j * LANES;
            const __mmask16 mask = n >= LANES ? 0xffff : n > 0 ? first_lanes((int)n) : 0;
            v[j] = _mm512_maskz_loadu_ps(mask, x + i + j * LANES);
            if (factors) v[j] = v_mul(v[j], _mm512_maskz_loadu_ps(mask, factors + i + j * LANES));
            *seen = v_unless_finite(*seen, v[j]);
            quotients[j] = v_fma(v[j], b->inverse, b->zero);
        }
        __m512i bytes;
        if (__builtin_expect(quick_bytes(b, quotients, v_set(DOUBT), &bytes), 1)) {
            const __mmask64 mask = left < 4 * LANES ? ((__mmask64)1 << left) - 1 : ~(__mmask64)0;
            _mm512_mask_storeu_epi8(y + i, mask, _mm512_permutexvar_epi32(order, bytes));
            continue;
        }
        for (int j = 0; j < 4 && j * LANES < left; j++)
            v_store_int8(y + i + j * LANES, v_div(v[j], b->scale), b->zero, 0, lanes_left(left - j * LANES));
    }
}

/* Writes `count` pixels of three planes side by side. */
INLINE void interleave_three(const tw_step *s, const bounds *b, const float *x, int8_t *y, int64_t count, vec *seen) {
    const __m512i in_lanes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11, -1, -1, -1, -1));
    const __m512i together = _mm512_setr_epi32(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 3, 7, 11, 15);
    for (int64_t q = 0; q < count; q += LANES) {
        const int n = lanes_left(count - q);
        vec v[3], quotients[4] = {v_zero(), v_zero(), v_zero(), v_zero()};
        for (int i = 0; i < 3; i++) {
            v[i] = v_load_first(x + i * s->x_channel + q, n);
            *seen = v_unless_finite(*seen, v[i]);
            quotients[i] = v_fma(v[i], b->inverse, b->zero);
        }
        __m512i bytes;
        if (__builtin_expect(!quick_bytes(b, quotients, v_set(DOUBT), &bytes), 0)) {
            int8_t planes[4][LANES] = {{0}};
            for (int i = 0; i < 3; i++) v_store_int8(planes[i], v_div(v[i], b->scale), b->zero, 0, LANES);
            for (int i = 0; i < 3 * n; i++) y[3 * q + i] = planes[i % 3][i / 3];
            continue;
        }
        bytes = _mm512_permutexvar_epi32(together, _mm512_shuffle_epi8(bytes, in_lanes));
        _mm512_mask_storeu_epi8(y + 3 * q, ((__mmask64)1 << 3 * n) - 1, bytes);
    }
}
#endif

/* A row of a float image of any strides. Returns whether it is quantised and holds a value that is not finite. */
static int convert_row(const tw_step *s, const bounds *b, int64_t row) {
    vec seen = v_zero();
    (void)b;
    const float *x = (const float *)s->x + row / s->height * s->x_image + row % s->height * s->x_row;
    const int64_t pixel = row * s->width;
    if (s->x_channel == 1 || s->channels == 1) { /* one of the two is already in order: whole vectors of it */
        const int64_t inner = s->channels == 1 && s->x_stride == 1 && s->y_stride == 1 ? s->width : s->channels;
#ifdef __AVX512F__
        if (is_quick(s)) {
            for (int64_t q = 0; q < s->width * s->channels / inner; q++)
                quantize_run(b, x + q * s->x_stride, NULL, (int8_t *)s->y + (pixel + q) * s->y_stride, inner, &seen);
            return !v_all_ordered(seen);
        }
#endif
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
#ifdef __AVX512F__
    if (s->channels == 3 && s->y_stride == 3 && is_quick(s)) {
        interleave_three(s, b, x, (int8_t *)s->y + pixel * 3, s->width, &seen);
        return !v_all_ordered(seen);
    }
#endif
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

static inline void set_mark(const tw_step *s, int64_t number) {
    float nan = __builtin_nanf("");
    __atomic_store(s->marks + number, &nan, __ATOMIC_RELAXED);
}

/* Rows begin to end. A mark has several rows, which may be those of several threads. */
static void convert_rows(const tw_step *s, int64_t begin, int64_t end) {
    const int64_t rows = s->batch * s->height;
    const bounds b = bounds_of(s);
    for (int64_t row = begin; row < end; row++)
        if (convert_row(s, &b, row) && s->marks) set_mark(s, row * s->marks_count / rows);
}

/* MULTIPLY with marks: products that are quantised as CONVERT does it, pixels begin to end. */
static void multiply_marked(const tw_step *s, int64_t begin, int64_t end) {
    const int64_t area = s->out_height * s->out_width;
#ifdef __AVX512F__
    const bounds b = bounds_of(s);
    const int quick = is_quick(s);
#endif
    for (int64_t pixel = begin; pixel < end; pixel++) {
        const float *x = (const float *)s->x + pixel * s->x_stride;
        const float *factors = (const float *)s->residual + pixel / area * s->r_stride;
        vec seen = v_zero();
#ifdef __AVX512F__
        if (quick) {
            quantize_run(&b, x, factors, (int8_t *)s->y + pixel * s->y_stride, s->channels, &seen);
            if (!v_all_ordered(seen)) set_mark(s, pixel / area);
            continue;
        }
#endif
        for (int64_t channel = 0; channel < s->channels; channel += LANES) {
            const int lanes = lanes_left(s->channels - channel);
            const vec v = v_mul(v_load_first(x + channel, lanes), v_load_first(factors + channel, lanes));
            seen = v_unless_finite(seen, v);
            store_values(s, pixel * s->y_stride + channel, lanes, v);
        }
        if (!v_all_ordered(seen)) set_mark(s, pixel / area);
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
    if (s->marks && s->kind != MARK) {
        if (!number) memset(s->marks, 0, (size_t)s->marks_count * sizeof *s->marks);
        if (count > 1) tw_barrier(); /* in a chain a thread works for itself */
    }
    if (s->kind == CONVERT && s->x_type == FLOAT32) {
        share_of(s->batch * s->height, number, count, &begin, &end);
        convert_rows(s, begin, end);
        return;
    }
    share_of(s->batch * s->out_height * s->out_width, number, count, &begin, &end);
    if (s->kind == MARK) {
        mark(s, begin, end);
        return;
    }
    if (s->kind == MULTIPLY && s->marks) {
        multiply_marked(s, begin, end);
        return;
    }
    for (int64_t pixel = begin; pixel < end; pixel++) {
        if (s->kind != MAX_POOL) combine(s, pixel);
        else if (s->x_type == FLOAT32) max_pool_float(s, pixel);
        else if (s->x_type == UINT8) max_pool_uint8(s, pixel);
#ifdef __AVX512F__
        else if (s->channels <= 64) max_pool_vector(s, pixel);
#endif
        else max_pool_int8(s, pixel);
    }
}
#endif
