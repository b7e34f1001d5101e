/* Two or three convolutions of float32 done together, some rows of the last one's results after the other: one that makes
   many channels, a depthwise one that reads these, and one by 1 x 1 that makes few of them again; or the first two, or the
   last two.

   What is in between stays in the second-level cache, and is never written to where it would lie if the steps ran one after
   the other. Each thread does rows of its own, so threads wait for each other once instead of three times; rows that two of
   them read are made by both. */
#include "conv_vector.h"
#include "parallel.h"

#ifdef LANES
/* Of what is between the convolutions. */
#define BETWEEN_BYTES (448 << 10)
/* With less between them in all, the steps one after the other stay in the second-level cache as well. */
#define FEWEST_BYTES (1 << 20)
/* Of weights, which are read again for each of the rows that are done at once, and have to stay in that cache too. */
#define MOST_WEIGHT_BYTES (256 << 10)
/* Pixels that a product by 1 x 1 is to have at least, so that its weights are read for something. */
#define FEWEST_PIXELS 96

static void run_alone(const tw_step *s, int number, int threads) {
    if (s->kind == DEPTHWISE) JOIN(tw_float_depthwise, TILEWRIGHT_ISA)(s, number, threads);
    else JOIN(tw_float_conv, TILEWRIGHT_ISA)(s, number, threads);
}

static int reads_its_pixel(const tw_step *s) {
    return s->kernel_height == 1 && s->kernel_width == 1 && s->stride_height == 1 && s->stride_width == 1 && !s->top &&
           !s->left && s->height == s->out_height && s->width == s->out_width;
}

/* The step for `rows` rows of results of one image from `row` on. */
static tw_step rows_of(const tw_step *s, int64_t image, int64_t row, int64_t rows) {
    tw_step part = *s;
    const int64_t pixel = (image * s->out_height + row) * s->out_width;
    part.batch = 1, part.out_height = rows;
    part.y = (float *)s->y + pixel * s->y_stride;
    if (s->residual) part.residual = (const float *)s->residual + pixel * s->r_stride;
    int64_t first = 0; /* row of the image that the step is given */
    if (reads_its_pixel(s)) first = row, part.height = rows;
    else part.top = s->top - row * s->stride_height;
    part.x = (const float *)s->x + (image * s->height + first) * s->width * s->x_stride;
    return part;
}

/* first, last: NULL where there is none. rows: of results that are done at once. room: rows of the first one's results that
   there is room for. */
typedef struct {
    const tw_step *first, *middle, *last;
    int64_t rows, room;
} band;

/* Rows of the image that so many rows of the depthwise convolution's results read. */
static int64_t window_of(const tw_step *s, int64_t rows) {
    return (rows - 1) * s->stride_height + (s->kernel_height - 1) * s->dilation_height + 1;
}

static int64_t weight_bytes(const tw_step *s) {
    return s ? s->channels * s->out_channels * s->kernel_height * s->kernel_width * (int64_t)sizeof(float) : 0;
}

static int64_t row_bytes(const tw_step *s) { return s->out_width * s->out_channels * (int64_t)sizeof(float); }

/* How many rows are done at once; 0 where the steps are better done one after the other. */
static int64_t plan_rows(band *b, int threads) {
    const tw_step *middle = b->middle;
    const int64_t images = middle->batch;
    int64_t all = 0;
    if (b->first) all += images * b->first->out_height * row_bytes(b->first);
    if (b->last) all += images * middle->out_height * row_bytes(middle);
    if (all < FEWEST_BYTES || weight_bytes(b->first) + weight_bytes(b->last) > MOST_WEIGHT_BYTES) return 0;
    /* Rows that threads make twice: one in twenty at most. */
    const int64_t twice = window_of(middle, 1) - middle->stride_height, height = images * middle->height;
    if (b->first && images % threads && twice > 0 && (threads - 1) * twice * 20 > height) return 0;
    int64_t rows = (FEWEST_PIXELS + middle->out_width - 1) / middle->out_width;
    if (rows > middle->out_height) rows = middle->out_height;
    for (; rows > 0; rows--) {
        const int64_t left = BETWEEN_BYTES - (b->last ? rows * row_bytes(middle) : 0);
        b->room = b->first ? left / row_bytes(b->first) : 0;
        if (left >= 0 && (!b->first || b->room >= window_of(middle, rows))) break;
    }
    return rows;
}

static void run_band(const band *b, int64_t begin, int64_t end) {
    const tw_step *middle = b->middle;
    const int64_t row = b->first ? row_bytes(b->first) / (int64_t)sizeof(float) : 0;
    float *made = (float *)tw_scratch, *between = made + b->room * row;
    /* In `made` are rows `base` to `held_to` of the results of the first one for image `held`. */
    int64_t held = -1, held_to = 0, base = 0;
    while (begin < end) {
        const int64_t image = begin / middle->out_height, p = begin % middle->out_height;
        int64_t rows = b->rows < end - begin ? b->rows : end - begin;
        if (rows > middle->out_height - p) rows = middle->out_height - p;
        tw_step part = rows_of(middle, image, p, rows);
        if (b->first) {
            int64_t from = p * middle->stride_height - middle->top, to = from + window_of(middle, rows);
            if (to > middle->height) to = middle->height;
            if (to < 0) to = 0;
            if (from < 0) from = 0;
            if (from > to) from = to;
            if (held != image || from > held_to) {
                base = held_to = from;
            } else if (to - base > b->room) {
                memmove(made, made + (from - base) * row, (size_t)((held_to - from) * row) * sizeof *made);
                base = from;
            }
            held = image;
            if (to > held_to) {
                tw_step making = rows_of(b->first, image, held_to, to - held_to);
                making.y = made + (held_to - base) * row;
                making.y_stride = making.out_channels;
                run_alone(&making, 0, 1);
                held_to = to;
            }
            part.x = made + (from - base) * row;
            part.x_stride = part.channels;
            part.height = to - from;
            part.top = middle->top - p * middle->stride_height + from;
        }
        if (!b->last) {
            run_alone(&part, 0, 1);
        } else {
            part.y = between;
            part.y_stride = part.out_channels;
            run_alone(&part, 0, 1);
            tw_step closing = rows_of(b->last, image, p, rows);
            closing.x = between;
            closing.x_stride = closing.channels;
            run_alone(&closing, 0, 1);
        }
        begin += rows;
    }
}

void JOIN(tw_band, TILEWRIGHT_ISA)(const tw_step *steps, int number, int threads) {
    const int count = steps->band, middle = steps->kind == DEPTHWISE ? 0 : 1;
    band b = {middle ? steps : NULL, steps + middle, middle + 1 < count ? steps + middle + 1 : NULL, 0, 0};
    b.rows = plan_rows(&b, threads);
    if (b.rows) {
        int64_t begin, end;
        share_of(b.middle->batch * b.middle->out_height, number, threads, &begin, &end);
        run_band(&b, begin, end);
        return;
    }
    for (int i = 0; i < count; i++) {
        if (i) tw_barrier();
        run_alone(steps + i, number, threads);
    }
}
#endif
