/* float32 convolution: products of tiles of pixels and output channels, and depthwise. */
#include "conv_vector.h"

#ifdef LANES
typedef float element;
#define K_STEP 1

#if LANES == 16
static inline int most_rows(int vectors) { return vectors == 3 ? 8 : 12; }
#else
static inline int most_rows(int vectors) { return vectors == 3 ? 4 : vectors == 2 ? 6 : 8; }
#endif

static void tile(const tw_step *s, int valid, int vectors, const element *const *pointers, int64_t windows,
                 int64_t length, const element *weight, int64_t pixel, int64_t group, int64_t vector);
#include "conv_tile.h"

/* Products that are added up one after the other; sums of so many are then added to each other. In one chain, 46 of 60
   random convolutions of 825 products erred by more than twice what PyTorch does, whose sums are made of parts too; with
   this none of 60 of 512 to 2304 products does, and the root mean square of the error is half of PyTorch's. */
#define SEGMENT 128

INLINE void keep_sums(const int rows, const int vectors, int first, const vec sum[12][3], float *out) {
#pragma GCC unroll 16
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) {
            float *to = out + (m * vectors + v) * LANES;
            v_store(to, first ? sum[m][v] : v_add(v_load(to), sum[m][v]));
        }
}

INLINE void tile_of(const int rows, const int vectors, int valid, const element *const *pointers, int64_t windows,
                    int64_t length, const element *weight, float *out) {
    vec sum[12][3]; /* no array of variable length: the compiler would keep it in memory */
#pragma GCC unroll 16
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) sum[m][v] = v_zero();
    int first = 1;
    int64_t left = SEGMENT;
    for (int64_t w = 0; w < windows; w++) {
        const float *x[12];
#pragma GCC unroll 16
        for (int m = 0; m < rows; m++) x[m] = pointers[(m < valid ? m : valid - 1) * windows + w];
        for (int64_t k = 0; k < length;) {
            if (!left) {
                keep_sums(rows, vectors, first, sum, out);
#pragma GCC unroll 16
                for (int m = 0; m < rows; m++)
#pragma GCC unroll 3
                    for (int v = 0; v < vectors; v++) sum[m][v] = v_zero();
                first = 0, left = SEGMENT;
            }
            const int64_t end = length - k < left ? length : k + left;
            for (left -= end - k; k < end; k++) {
                vec b[3];
#pragma GCC unroll 3
                for (int v = 0; v < vectors; v++) b[v] = v_load(weight + v * LANES);
                weight += vectors * LANES;
#pragma GCC unroll 16
                for (int m = 0; m < rows; m++) {
                    vec a = v_set(x[m][k]);
#pragma GCC unroll 3
                    for (int v = 0; v < vectors; v++) sum[m][v] = v_fma(a, b[v], sum[m][v]);
                }
            }
        }
    }
    keep_sums(rows, vectors, first, sum, out);
}

/* Rolled loops: unrolled into every tile, the epilogue would be most of the code. */
static void finish_tile(const tw_step *s, int valid, int vectors, const float *sums, int64_t pixel, int64_t group,
                        int64_t vector) {
    const int64_t group_out = s->out_channels / s->groups, all = (group_out + LANES - 1) / LANES;
    const bounds limits = bounds_of(s);
    for (int v = 0; v < vectors; v++, sums += LANES) {
        const int64_t at = (vector + v) * LANES, left = group_out - at, channel = group * group_out + at;
        const vec bias = s->bias ? v_load(s->bias + group * all * LANES + at) : v_zero();
        if (left < LANES) {
            for (int m = 0; m < valid; m++)
                finish(s, v_add(v_load(sums + m * vectors * LANES), bias), pixel + m, channel, (int)left);
            continue;
        }
        WITH_EPILOGUE(epilogue_of(s), {
            for (int m = 0; m < valid; m++)
                finish_as(EPILOGUE, &limits, s, v_add(v_load(sums + m * vectors * LANES), bias), pixel + m, channel);
        })
    }
}

/* A tile reads and writes a few lines of each of its pixels, which no prefetcher of a processor foresees. Asked for before
   the sums, they are there after them. */
INLINE void prefetch_results(const tw_step *s, int valid, int vectors, int64_t pixel, int64_t channel) {
    const float *y = (const float *)s->y + pixel * s->y_stride + channel;
    for (int m = 0; m < valid; m++)
        for (int v = 0; v < vectors; v++) __builtin_prefetch(y + m * s->y_stride + v * LANES, 1);
    if (!s->residual) return;
    const float *residual = (const float *)s->residual + pixel * s->r_stride + channel;
    for (int m = 0; m < valid; m++)
        for (int v = 0; v < vectors; v++) __builtin_prefetch(residual + m * s->r_stride + v * LANES);
}

#define TILE(rows, vectors)                                                                                            \
    static void __attribute__((noinline)) tile_##rows##_##vectors(                                                     \
        int valid, const element *const *pointers, int64_t windows, int64_t length, const element *weight, \
        float *out) { \
        tile_of(rows, vectors, valid, pointers, windows, length, weight, out); \
    }
#define CALL(rows, vectors) tile_##rows##_##vectors(valid, pointers, windows, length, weight, out)
TILE(1, 1)
TILE(4, 1)
TILE(8, 1)
TILE(1, 2)
TILE(2, 2)
TILE(4, 2)
TILE(6, 2)
TILE(1, 3)
TILE(2, 3)
TILE(4, 3)
#if LANES == 16
TILE(12, 1)
TILE(8, 2)
TILE(10, 2)
TILE(12, 2)
TILE(6, 3)
TILE(8, 3)
#endif

static void tile(const tw_step *s, int valid, int vectors, const element *const *pointers, int64_t windows,
                 int64_t length, const element *weight, int64_t pixel, int64_t group, int64_t vector) {
    _Alignas(64) float out[12 * 3 * LANES];
    prefetch_results(s, valid, vectors, pixel, group * (s->out_channels / s->groups) + vector * LANES);
    if (vectors == 1) {
        if (valid == 1) CALL(1, 1);
        else if (valid <= 4) CALL(4, 1);
        else if (valid <= 8) CALL(8, 1);
#if LANES == 16
        else CALL(12, 1);
#endif
    } else if (vectors == 2) {
        if (valid == 1) CALL(1, 2);
        else if (valid == 2) CALL(2, 2);
        else if (valid <= 4) CALL(4, 2);
        else if (valid <= 6) CALL(6, 2);
#if LANES == 16
        else if (valid <= 8) CALL(8, 2);
        else if (valid <= 10) CALL(10, 2);
        else CALL(12, 2);
#endif
    } else {
        if (valid == 1) CALL(1, 3);
        else if (valid == 2) CALL(2, 3);
        else if (valid <= 4) CALL(4, 3);
#if LANES == 16
        else if (valid <= 6) CALL(6, 3);
        else CALL(8, 3);
#endif
    }
    finish_tile(s, valid, vectors, out, pixel, group, vector);
}

void JOIN(tw_float_conv, TILEWRIGHT_ISA)(const tw_step *s, int number, int count) { convolve_part(s, number, count); }

/* One row of results for one vector of channels. The constants, where the caller inlines them, keep the weights in
   registers. */
INLINE void depthwise_row(const int epilogue, const tw_step *s, int64_t row, int64_t channel, int n,
                          const int kernel_height, const int kernel_width) {
    const int64_t image = row / s->out_height, p = row % s->out_height, step = s->dilation_width * s->x_stride;
    const int64_t top = p * s->stride_height - s->top, padded = (s->channels + LANES - 1) / LANES * LANES;
    const float *x = (const float *)s->x + image * s->height * s->width * s->x_stride + channel;
    const float *weight = (const float *)s->weight + channel;
    const vec bias = s->bias ? v_load(s->bias + channel) : v_zero();
    const bounds limits = bounds_of(s);
    const int64_t reach = (kernel_width - 1) * s->dilation_width;
    const int inside = n == LANES && top >= 0 && top + (kernel_height - 1) * s->dilation_height < s->height;
    for (int64_t q = 0; q < s->out_width; q++) {
        const int64_t left = q * s->stride_width - s->left, pixel = row * s->out_width + q;
        if (inside && left >= 0 && left + reach < s->width) {
            const float *from = x + (top * s->width + left) * s->x_stride;
            vec sum = v_zero();
#pragma GCC unroll 5
            for (int i = 0; i < kernel_height; i++) {
#pragma GCC unroll 5
                for (int j = 0; j < kernel_width; j++)
                    sum = v_fma(v_load(from + j * step), v_load(weight + (i * kernel_width + j) * padded), sum);
                from += s->dilation_height * s->width * s->x_stride;
            }
            finish_as(epilogue, &limits, s, v_add(sum, bias), pixel, channel);
            continue;
        }
        vec sum = v_zero();
        for (int i = 0; i < kernel_height; i++) {
            const int64_t y = top + i * s->dilation_height;
            if (y < 0 || y >= s->height) continue;
            for (int j = 0; j < kernel_width; j++) {
                const int64_t column = left + j * s->dilation_width;
                if (column < 0 || column >= s->width) continue;
                vec value = v_load_first(x + (y * s->width + column) * s->x_stride, n);
                sum = v_fma(value, v_load(weight + (i * kernel_width + j) * padded), sum);
            }
        }
        finish(s, v_add(sum, bias), pixel, channel, n);
    }
}

void JOIN(tw_float_depthwise, TILEWRIGHT_ISA)(const tw_step *s, int number, int count) {
    int64_t begin, end;
    share_of(s->batch * s->out_height, number, count, &begin, &end);
    const int epilogue = epilogue_of(s), size = s->kernel_height == s->kernel_width ? (int)s->kernel_height : 0;
    for (int64_t row = begin; row < end; row++)
        for (int64_t channel = 0; channel < s->channels; channel += LANES) {
            const int64_t left = s->channels - channel;
            const int n = left < LANES ? (int)left : LANES;
            if (size == 3 && n == LANES && epilogue == TO_FLOAT)
                depthwise_row(TO_FLOAT, s, row, channel, LANES, 3, 3);
            else if (size == 5 && n == LANES && epilogue == TO_FLOAT)
                depthwise_row(TO_FLOAT, s, row, channel, LANES, 5, 5);
            else if (size == 3 && n == LANES)
                depthwise_row(ANY, s, row, channel, LANES, 3, 3);
            else if (size == 5 && n == LANES)
                depthwise_row(ANY, s, row, channel, LANES, 5, 5);
            else
                depthwise_row(ANY, s, row, channel, n, (int)s->kernel_height, (int)s->kernel_width);
        }
}
#endif
