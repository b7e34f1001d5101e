/* float32 convolution with windows of 3 x 3 and stride 1 by Winograd's F(2 x 2, 3 x 3) (Lavin and Gray, "Fast Algorithms
   for Convolutional Neural Networks", 2015): 16 products for 4 pixels and a channel, where the definition has 36.

       y = A' [sum over channels of (G w G') * (B' x B)] A

   for each tile of 2 x 2 results, x its 4 x 4 pixels. G w G' is made when the weight is packed. For a block of tiles that
   stays in the second-level cache, B' x B is computed once; for each panel of output channels and each of the 16 points
   follows a product of matrices, [tiles, channels] by [channels, panel]; then A' m A and the epilogue.

   A pixel that is not finite reaches all results of its tiles, of which the definition leaves some alone, and sums may
   overflow here that do not there. So results that are not finite are computed once more, as the definition does. */
#include "conv_vector.h"

#ifdef LANES
#define POINTS 16
#define PANEL 2 /* vectors of output channels */
#if LANES == 16
#define MOST_ROWS 12
#else
#define MOST_ROWS 6
#endif
/* Products that are added up one after the other; see conv_float.c. */
#define SEGMENT 128
/* In a block. With more, what is transformed leaves the first-level cache sooner; 96 took 2 % longer. */
#define MOST_TILES 24
#define SUM_FLOATS (POINTS * MOST_TILES * PANEL * LANES)
#define INPUT_FLOATS (TW_SCRATCH_BYTES / (int64_t)sizeof(float) - SUM_FLOATS)

INLINE void product_of(const int rows, const int vectors, const float *x, int64_t x_row, int64_t depth,
                       const float *weight, float *sums) {
    for (int64_t begin = 0; begin < depth; begin += SEGMENT) {
        const int64_t length = depth - begin < SEGMENT ? depth - begin : SEGMENT;
        vec sum[MOST_ROWS][PANEL]; /* no array of variable length: the compiler would keep it in memory */
#pragma GCC unroll 12
        for (int m = 0; m < rows; m++)
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) sum[m][v] = v_zero();
        for (int64_t k = 0; k < length; k++, weight += vectors * LANES) {
            vec b[PANEL];
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) b[v] = v_load(weight + v * LANES);
#pragma GCC unroll 12
            for (int m = 0; m < rows; m++) {
                const vec a = v_set(x[m * x_row + k]);
#pragma GCC unroll 2
                for (int v = 0; v < vectors; v++) sum[m][v] = v_fma(a, b[v], sum[m][v]);
            }
        }
        x += length;
#pragma GCC unroll 12
        for (int m = 0; m < rows; m++)
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) {
                float *to = sums + (m * vectors + v) * LANES;
                v_store(to, begin ? v_add(v_load(to), sum[m][v]) : sum[m][v]);
            }
    }
}

typedef void (*product)(const float *x, int64_t x_row, int64_t depth, const float *weight, float *sums);
#define PRODUCT(rows, vectors)                                                                                         \
    static void product_##rows##_##vectors(const float *x, int64_t x_row, int64_t depth, const float *weight,          \
                                           float *sums) {                                                              \
        product_of(rows, vectors, x, x_row, depth, weight, sums);                                                      \
    }
#define BOTH(rows) PRODUCT(rows, 1) PRODUCT(rows, 2)
BOTH(1) BOTH(2) BOTH(3) BOTH(4) BOTH(5) BOTH(6)
#if LANES == 16
BOTH(7) BOTH(8) BOTH(9) BOTH(10) BOTH(11) BOTH(12)
#endif
#define ROW(rows) {product_##rows##_1, product_##rows##_2},
static const product products[MOST_ROWS][PANEL] = {
    ROW(1) ROW(2) ROW(3) ROW(4) ROW(5) ROW(6)
#if LANES == 16
    ROW(7) ROW(8) ROW(9) ROW(10) ROW(11) ROW(12)
#endif
};

/* The four differences and sums of B' d. */
#define B_ROWS(d0, d1, d2, d3, t0, t1, t2, t3)                                                                         \
    t0 = v_sub(d0, d2), t1 = v_add(d1, d2), t2 = v_sub(d2, d1), t3 = v_sub(d1, d3)

/* B' x B of one tile: `point` floats from one point to the next. */
static void transform_input(const float *const pixels[POINTS], int64_t channels, float *to, int64_t point) {
    for (int64_t c = 0; c < channels; c += LANES) {
        vec d[POINTS], t[POINTS];
#pragma GCC unroll 16
        for (int i = 0; i < POINTS; i++) d[i] = v_load(pixels[i] + c);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            B_ROWS(d[j], d[4 + j], d[8 + j], d[12 + j], t[j], t[4 + j], t[8 + j], t[12 + j]);
#pragma GCC unroll 4
        for (int i = 0; i < POINTS; i += 4)
            B_ROWS(t[i], t[i + 1], t[i + 2], t[i + 3], d[i], d[i + 1], d[i + 2], d[i + 3]);
#pragma GCC unroll 16
        for (int i = 0; i < POINTS; i++) v_store(to + i * point + c, d[i]);
    }
}

/* A' m A of one tile and one vector of channels. */
INLINE void transform_output(const float *m, int64_t point, vec y[4]) {
    vec t[8];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const vec m1 = v_load(m + (4 + j) * point), m2 = v_load(m + (8 + j) * point);
        t[j] = v_add(v_add(v_load(m + j * point), m1), m2);
        t[4 + j] = v_sub(v_sub(m1, m2), v_load(m + (12 + j) * point));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        y[2 * i] = v_add(v_add(t[4 * i], t[4 * i + 1]), t[4 * i + 2]);
        y[2 * i + 1] = v_sub(v_sub(t[4 * i + 1], t[4 * i + 2]), t[4 * i + 3]);
    }
}

static inline const float *pixel_or_zeros(const tw_step *s, int64_t n, int64_t row, int64_t column) {
    if (row < 0 || row >= s->height || column < 0 || column >= s->width) return (const float *)tw_zeros;
    return (const float *)s->x + ((n * s->height + row) * s->width + column) * s->x_stride;
}

/* n sums from `channel` on, as the definition has them. */
static __attribute__((noinline)) vec sums_of(const tw_step *s, int64_t image, int64_t p, int64_t q, int64_t channel,
                                             int n) {
    float sums[LANES] = {0};
    for (int lane = 0; lane < n; lane++) {
        const float *weight = s->plain + (channel + lane) * 9 * s->channels;
        vec sum = v_zero();
        for (int tap = 0; tap < 9; tap++, weight += s->channels) {
            const float *x = pixel_or_zeros(s, image, p + tap / 3 - s->top, q + tap % 3 - s->left);
            for (int64_t c = 0; c < s->channels; c += LANES) sum = v_fma(v_load(x + c), v_load(weight + c), sum);
        }
        float parts[LANES];
        v_store(parts, sum);
        for (int i = 0; i < LANES; i++) sums[lane] += parts[i];
    }
    return v_load(sums);
}

typedef struct {
    int64_t down, across; /* tiles of an image */
} grid;

/* The results of tiles first .. first + count - 1 for one vector of channels. */
INLINE void finish_tiles(const int epilogue, const tw_step *s, const grid *g, const float *sums, int64_t point,
                         int64_t stride, int64_t first, int64_t count, int64_t channel, int n) {
    const bounds limits = bounds_of(s);
    const vec bias = s->bias ? v_load(s->bias + channel) : v_zero();
    int64_t image = first / (g->down * g->across), i = first / g->across % g->down, j = first % g->across;
    for (int64_t tile = 0; tile < count; tile++, sums += stride) {
        vec y[4];
        transform_output(sums, point, y);
        vec nothing = v_zero(); /* or NaN */
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) nothing = v_add(nothing, v_sub(y[r], y[r]));
        const int finite = v_all_ordered(nothing);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            const int64_t p = 2 * i + r / 2, q = 2 * j + r % 2;
            if (p >= s->out_height || q >= s->out_width) continue;
            if (__builtin_expect(!finite, 0)) y[r] = sums_of(s, image, p, q, channel, n);
            const int64_t pixel = (image * s->out_height + p) * s->out_width + q;
            if (n == LANES) finish_as(epilogue, &limits, s, v_add(y[r], bias), pixel, channel);
            else finish(s, v_add(y[r], bias), pixel, channel, n);
        }
        if (++j == g->across) {
            j = 0;
            if (++i == g->down) i = 0, image++;
        }
    }
}

void JOIN(tw_winograd, TILEWRIGHT_ISA)(const tw_step *s, int number, int threads) {
    const grid g = {(s->out_height + 1) / 2, (s->out_width + 1) / 2};
    const int64_t tiles = s->batch * g.down * g.across, channels = s->channels;
    const int64_t vectors = (s->out_channels + LANES - 1) / LANES, panels = (vectors + PANEL - 1) / PANEL;
    int64_t first = 0, last = tiles, first_panel = 0, last_panel = panels;
    /* Few tiles: each thread reads its share of the weights, and transforms all of the input. */
    if (tiles < 2 * MOST_ROWS * threads && panels >= threads) share_of(panels, number, threads, &first_panel, &last_panel);
    else share_of(tiles, number, threads, &first, &last);
    if (first >= last || first_panel >= last_panel) return;
    float *sums = (float *)tw_scratch, *input = sums + SUM_FLOATS;
    const int64_t row = channels + LANES; /* rows of a power of two of bytes would share the sets of a cache */
    int64_t block = INPUT_FLOATS / (POINTS * row);
    if (block > MOST_TILES) block = MOST_TILES;
    const int64_t blocks = (last - first + block - 1) / block; /* as even as possible */
    for (int64_t b = 0; b < blocks; b++) {
        int64_t begin, end;
        share_of(last - first, (int)b, (int)blocks, &begin, &end);
        const int64_t count = end - begin;
        begin += first;
        for (int64_t t = 0; t < count; t++) {
            const int64_t n = (begin + t) / (g.down * g.across), i = (begin + t) / g.across % g.down, j = (begin + t) % g.across;
            const float *pixels[POINTS];
            for (int r = 0; r < POINTS; r++)
                pixels[r] = pixel_or_zeros(s, n, 2 * i - s->top + r / 4, 2 * j - s->left + r % 4);
            transform_input(pixels, channels, input + t * row, count * row);
        }
        const int64_t groups = (count + MOST_ROWS - 1) / MOST_ROWS;
        for (int64_t panel = first_panel; panel < last_panel; panel++) {
            const int width = vectors - panel * PANEL < PANEL ? 1 : PANEL;
            const float *weight = (const float *)s->weight + panel * PANEL * LANES * POINTS * channels;
            const int64_t stride = width * LANES;
            for (int point = 0; point < POINTS; point++, weight += channels * stride)
                for (int64_t group = 0; group < groups; group++) {
                    int64_t from, to;
                    share_of(count, (int)group, (int)groups, &from, &to);
                    products[to - from - 1][width - 1](input + (point * count + from) * row, row, channels, weight,
                                                       sums + (point * count + from) * stride);
                }
            for (int v = 0; v < width; v++) {
                const int64_t channel = (panel * PANEL + v) * LANES;
                const int n = s->out_channels - channel < LANES ? (int)(s->out_channels - channel) : LANES;
                WITH_EPILOGUE(epilogue_of(s), finish_tiles(EPILOGUE, s, &g, sums + v * LANES, count * stride, stride,
                                                           begin, count, channel, n);)
            }
        }
    }
}
#endif
