/* float32 depthwise convolution.

   Four pixels of a row at once, one vector of channels after the other: a column of the window that several of them read is
   loaded once, and so is each weight. */
#include "conv_vector.h"

#ifdef LANES
#define PIXELS 4

/* A row of results: the rows of the image that it reads, and of the window that lie in the image. */
typedef struct {
    const tw_step *step;
    int64_t first; /* pixel */
    const float *x; /* the pixel at column 0 of the first row that is read */
    int first_tap_row, tap_rows;
} row_of_results;

static row_of_results find_row(const tw_step *s, int64_t row) {
    const int64_t image = row / s->out_height, top = row % s->out_height * s->stride_height - s->top;
    int64_t begin = 0, end = s->kernel_height;
    while (begin < end && top + begin * s->dilation_height < 0) begin++;
    while (begin < end && top + (end - 1) * s->dilation_height >= s->height) end--;
    const int64_t from = begin < end ? top + begin * s->dilation_height : 0;
    const float *x = (const float *)s->x + (image * s->height + from) * s->width * s->x_stride;
    return (row_of_results){s, row * s->out_width, x, (int)begin, (int)(end - begin)};
}

/* One result for n channels, wherever its window lies. */
static void one_pixel(const row_of_results *row, int64_t q, int64_t channel, int n) {
    const tw_step *s = row->step;
    const int64_t left = q * s->stride_width - s->left, padded = (s->channels + LANES - 1) / LANES * LANES;
    const float *x = row->x + channel, *weight = (const float *)s->weight + row->first_tap_row * s->kernel_width * padded;
    vec sum = v_zero();
    for (int i = 0; i < row->tap_rows; i++, x += s->dilation_height * s->width * s->x_stride)
        for (int j = 0; j < s->kernel_width; j++, weight += padded) {
            const int64_t column = left + j * s->dilation_width;
            if (column < 0 || column >= s->width) continue;
            sum = v_fma(v_load_first(x + column * s->x_stride, n), v_load(weight + channel), sum);
        }
    const vec bias = s->bias ? v_load(s->bias + channel) : v_zero();
    finish(s, v_add(sum, bias), row->first + q, channel, n);
}

/* Results q to q + PIXELS - 1 for the whole vectors of channels first to last. inside: the windows lie between the image's
   sides; where they do not, zeros are read. */
INLINE void four_pixels(const int epilogue, const int size, const int stride, const int inside, const row_of_results *row,
                        int64_t q, int64_t first, int64_t last) {
    enum { MOST_COLUMNS = (PIXELS - 1) * 2 + 5 };
    const int columns = (PIXELS - 1) * stride + size;
    const tw_step *s = row->step;
    const int64_t padded = (s->channels + LANES - 1) / LANES * LANES;
    const int64_t down = s->dilation_height * s->width * s->x_stride, across = s->x_stride;
    const int64_t left = q * stride - s->left;
    const float *weight = (const float *)s->weight + row->first_tap_row * size * padded, *at[MOST_COLUMNS];
    int64_t below[MOST_COLUMNS]; /* from a column to where it goes on in the next row of the window */
    const bounds limits = bounds_of(s);
#pragma GCC unroll 11
    for (int j = 0; j < columns; j++) {
        const int is_image = inside || (left + j >= 0 && left + j < s->width);
        at[j] = is_image ? row->x + (left + j) * across : (const float *)tw_zeros;
        below[j] = is_image ? down : 0;
    }
    for (int64_t channel = first; channel < last; channel += LANES) {
        const float *from = row->x + left * across + channel, *w = weight + channel;
        vec sum[PIXELS] = {v_zero(), v_zero(), v_zero(), v_zero()};
        for (int i = 0; i < row->tap_rows; i++, from += down, w += size * padded) {
            vec column[MOST_COLUMNS];
#pragma GCC unroll 11
            for (int j = 0; j < columns; j++)
                column[j] = v_load(inside ? from + j * across : at[j] + i * below[j] + channel);
#pragma GCC unroll 5
            for (int j = 0; j < size; j++) {
                const vec tap = v_load(w + j * padded);
#pragma GCC unroll 4
                for (int p = 0; p < PIXELS; p++) sum[p] = v_fma(column[p * stride + j], tap, sum[p]);
            }
        }
        const vec bias = s->bias ? v_load(s->bias + channel) : v_zero();
        if (epilogue == TO_FLOAT) {
#pragma GCC unroll 4
            for (int p = 0; p < PIXELS; p++)
                finish_as(TO_FLOAT, &limits, s, v_add(sum[p], bias), row->first + q + p, channel);
        } else {
            float sums[PIXELS * LANES];
#pragma GCC unroll 4
            for (int p = 0; p < PIXELS; p++) v_store(sums + p * LANES, v_add(sum[p], bias));
#pragma GCC unroll 1
            for (int p = 0; p < PIXELS; p++) finish(s, v_load(sums + p * LANES), row->first + q + p, channel, LANES);
        }
    }
}

typedef void (*four)(const row_of_results *row, int64_t q, int inside, int64_t first, int64_t last);
#define FOUR_OF(name, epilogue, size, stride)                                                                          \
    static void name##_##size##_##stride(const row_of_results *row, int64_t q, int inside, int64_t first,              \
                                         int64_t last) {                                                               \
        if (inside) four_pixels(epilogue, size, stride, 1, row, q, first, last);                                       \
        else four_pixels(epilogue, size, stride, 0, row, q, first, last);                                              \
    }
#define FOUR(size, stride) FOUR_OF(floats, TO_FLOAT, size, stride) FOUR_OF(any, ANY, size, stride)
FOUR(3, 1)
FOUR(3, 2)
FOUR(5, 1)
FOUR(5, 2)

/* The function for four pixels of such a window at once, or NULL. */
static four four_of(const tw_step *s) {
    static const four functions[2][2][2] = {{{floats_3_1, floats_3_2}, {floats_5_1, floats_5_2}},
                                            {{any_3_1, any_3_2}, {any_5_1, any_5_2}}};
    const int64_t size = s->kernel_width, stride = s->stride_width;
    if (s->out_width < PIXELS) return NULL;
    if ((size != 3 && size != 5) || (stride != 1 && stride != 2) || s->dilation_width != 1) return NULL;
    return functions[epilogue_of(s) != TO_FLOAT][size == 5][stride == 2];
}

/* Rows begin to end for some channels: the whole vectors first to last, or fewer than a vector from `first` on. */
static void some_rows(const tw_step *s, four function, int64_t begin, int64_t end, int64_t first, int64_t last) {
    for (int64_t r = begin; r < end; r++) {
        const row_of_results row = find_row(s, r);
        if (!function || last - first < LANES) {
            for (int64_t channel = first; channel < last; channel += LANES) {
                const int n = last - channel < LANES ? (int)(last - channel) : LANES;
                for (int64_t q = 0; q < s->out_width; q++) one_pixel(&row, q, channel, n);
            }
            continue;
        }
        for (int64_t q = 0; q < s->out_width; q += PIXELS) {
            if (q > s->out_width - PIXELS) q = s->out_width - PIXELS; /* some results twice */
            const int64_t left = q * s->stride_width - s->left, right = left + (PIXELS - 1) * s->stride_width;
            function(&row, q, left >= 0 && right + s->kernel_width <= s->width, first, last);
        }
    }
}

/* Bytes of the rows that a row of results reads, which stay in a first-level cache for the next: of so many channels as
   that leaves room for. Images that are larger than a second-level cache are read in order instead. */
#define NEAR_BYTES (24 << 10)
#define IMAGE_BYTES (1 << 20)

void JOIN(tw_float_depthwise, TILEWRIGHT_ISA)(const tw_step *s, int number, int count) {
    int64_t begin, end;
    share_of(s->batch * s->out_height, number, count, &begin, &end);
    const int64_t whole = s->channels / LANES * LANES, row_bytes = s->width * s->channels * (int64_t)sizeof(float);
    const four function = four_of(s);
    int64_t some = whole;
    if (s->height * row_bytes <= IMAGE_BYTES && whole) {
        some = NEAR_BYTES / (s->kernel_height * row_bytes / s->channels * LANES) * LANES;
        if (some < LANES) some = LANES;
    }
    while (begin < end) {
        const int64_t next = (begin / s->out_height + 1) * s->out_height, last_row = next < end ? next : end; /* of the image */
        for (int64_t channel = 0; channel < whole; channel += some)
            some_rows(s, function, begin, last_row, channel, channel + some < whole ? channel + some : whole);
        if (whole < s->channels) some_rows(s, function, begin, last_row, whole, s->channels);
        begin = last_row;
    }
}
#endif
