/* int8 convolution by products of tiles (AMX); included by conv_int8.c.

   Up to 32 pixels times up to 32 output channels at once. Rows of a tile lie in the image itself where windows are single
   pixels, side by side; else windows are copied first, each followed by zeros up to a multiple of 64 bytes. Signed is
   multiplied by signed, and what stands for value + 128 by tiles of unsigned.

   The processor multiplies tiles and computes with vectors at once, so sums wait until the tiles of the next product are
   multiplied, and are finished meanwhile. */
#include "amx.h"

enum { TILE_PIXELS = 2 * AMX_ROWS };

/* Of one convolution or of one thread's part of it. bytes: of a row that one product reads. */
typedef struct {
    const tw_step *s;
    bounds limits;
    int is_signed;
    int64_t bytes, steps; /* steps * bytes >= depth */
    int64_t depth;        /* of the packed weight */
} tile_job;

/* Output channels that are multiplied at once: of one or two vectors from `vector` of a group on, whose weights lie in
   lines of 64 bytes, w_stride apart. start: what their sums start from. */
typedef struct {
    const int8_t *w;
    int64_t w_stride, group, vector;
    const int32_t *start;
    int vectors;
} tile_channels;

/* Sums that wait for what follows them: `left` pixels from `pixel` on. Two areas, since the next product needs one. */
typedef struct {
    int32_t sums[2][TILE_PIXELS * 2 * LANES] __attribute__((aligned(64)));
    int area, vectors; /* area: of the next product */
    const int32_t *next;
    int64_t pixel, group, vector, left;
} waiting_sums;

static void finish_waiting(const tile_job *job, waiting_sums *wait, int64_t pixels) {
    const int64_t count = pixels < wait->left ? pixels : wait->left;
    finish_tile(&job->limits, job->s, (int)count, wait->vectors, wait->next, wait->pixel, wait->group, wait->vector);
    wait->next += count * wait->vectors * LANES;
    wait->pixel += count;
    wait->left -= count;
}

#define TILE_PRODUCT(is_signed, sum, x, w)                                                                             \
    do {                                                                                                               \
        if (is_signed) _tile_dpbssd(sum, x, w);                                                                        \
        else _tile_dpbusd(sum, x, w);                                                                                  \
    } while (0)

/* Sums of 16 pixels, or of 32 if `tall`, and of one vector of output channels, or of two if `wide`. After each step so many
   bytes of weights are asked `ahead`, and `pixels` of those that wait are finished. */
INLINE void multiply_tile(const int is_signed, const int tall, const int wide, const tile_job *job,
                          const tile_channels *c, const int8_t *x, int64_t x_stride, int32_t *sums, waiting_sums *wait,
                          int64_t pixels, int64_t ahead) {
    const int64_t w_stride = c->w_stride;
    const int8_t *w = c->w;
    const int32_t *start = c->start;
    const int64_t row = (wide ? 2 : 1) * AMX_BYTES, step = job->bytes / 4 * w_stride;
    _tile_loadd(0, start, 0); /* each row the same */
    if (tall) _tile_loadd(2, start, 0);
    if (wide) _tile_loadd(1, start + LANES, 0);
    if (wide && tall) _tile_loadd(3, start + LANES, 0);
    for (int64_t k = 0; k < job->steps; k++, x += job->bytes, w += step) {
        _tile_loadd(4, x, x_stride);
        _tile_loadd(6, w, w_stride);
        TILE_PRODUCT(is_signed, 0, 4, 6);
        if (wide) {
            _tile_loadd(7, w + AMX_BYTES, w_stride);
            TILE_PRODUCT(is_signed, 1, 4, 7);
        }
        if (tall) {
            _tile_loadd(5, x + AMX_ROWS * x_stride, x_stride);
            TILE_PRODUCT(is_signed, 2, 5, 6);
            if (wide) TILE_PRODUCT(is_signed, 3, 5, 7);
        }
        for (int64_t line = 0; line < ahead; line += AMX_BYTES) __builtin_prefetch(w + PREFETCH_BYTES + line);
        if (wait->left) finish_waiting(job, wait, pixels);
    }
    char *to = (char *)sums;
    _tile_stored(0, to, row);
    if (wide) _tile_stored(1, to + AMX_BYTES, row);
    if (tall) _tile_stored(2, to + AMX_ROWS * row, row);
    if (tall && wide) _tile_stored(3, to + AMX_ROWS * row + AMX_BYTES, row);
}

static tile_channels channels_at(const tile_job *job, int64_t group, int64_t vector, int in_block, int block) {
    const tw_step *s = job->s;
    const int64_t group_out = s->out_channels / s->groups, begin = group * ((group_out + LANES - 1) / LANES) + vector;
    const int32_t *start = job->is_signed ? s->signed_compensation : s->compensation;
    return (tile_channels){
        .w = (const int8_t *)s->weight + begin * LANES * job->depth + in_block * AMX_BYTES,
        .w_stride = block * AMX_BYTES,
        .group = group,
        .vector = vector + in_block,
        .start = start ? start + (begin + in_block) * LANES : (const int32_t *)tw_zeros,
        .vectors = block - in_block < 2 ? 1 : 2,
    };
}

/* `valid` pixels whose rows begin at x. */
static void multiply(const tile_job *job, const tile_channels *c, int64_t valid, const int8_t *x, int64_t x_stride,
                     int64_t pixel, int64_t ahead, waiting_sums *wait) {
    const int64_t each = round_up((wait->left + job->steps - 1) / job->steps, 2);
    int32_t *sums = wait->sums[wait->area];
    prefetch_results(job->s, valid, pixel, c->group * (job->s->out_channels / job->s->groups) + c->vector * LANES);
    AMX_WRITTEN();
#define MULTIPLY(is_signed, tall, wide)                                                                                \
    multiply_tile(is_signed, tall, wide, job, c, x, x_stride, sums, wait, each, ahead)
    switch ((job->is_signed ? 4 : 0) + (valid > AMX_ROWS ? 2 : 0) + c->vectors - 1) {
        case 0: MULTIPLY(0, 0, 0); break;
        case 1: MULTIPLY(0, 0, 1); break;
        case 2: MULTIPLY(0, 1, 0); break;
        case 3: MULTIPLY(0, 1, 1); break;
        case 4: MULTIPLY(1, 0, 0); break;
        case 5: MULTIPLY(1, 0, 1); break;
        case 6: MULTIPLY(1, 1, 0); break;
        default: MULTIPLY(1, 1, 1);
    }
#undef MULTIPLY
    AMX_WRITTEN();
    wait->next = sums;
    wait->pixel = pixel, wait->left = valid;
    wait->group = c->group, wait->vector = c->vector, wait->vectors = c->vectors;
    wait->area ^= 1;
}

/* Zeros behind a window of `depth` bytes, up to its stride. */
INLINE void end_with_zeros(int8_t *row, int64_t depth, int64_t stride) {
    if (depth < stride) _mm512_mask_storeu_epi8(row + depth, ((__mmask64)1 << (stride - depth)) - 1, vector_zero());
}

/* `count` bytes, and what lies behind them up to whole lines. */
INLINE void copy_lines(int8_t *to, const int8_t *from, int64_t count) {
    for (int64_t k = 0; k < count; k += AMX_BYTES) _mm512_storeu_si512(to + k, i_load_first(from + k, count - k));
}

/* Copies the windows of `count` pixels from `pixel` on to rows `stride` apart, a multiple of 64. */
static void copy_rows(const tw_step *s, int64_t pixel, int64_t count, int64_t offset, int64_t channels, int64_t depth,
                         int8_t *rows, int64_t stride) {
    if (s->gather) {
        gather_windows(s, pixel, count, offset, channels, rows, stride);
        for (int64_t i = 0; i < count; i++) end_with_zeros(rows + i * stride, depth, stride);
        return;
    }
    const int64_t area = s->out_height * s->out_width;
    /* Inside of the image a row of a window is one run of bytes. */
    const int64_t run = s->kernel_width * channels, down = s->dilation_height * s->width * channels;
    const int64_t reach = (s->kernel_height - 1) * s->dilation_height;
    const int side_by_side = s->dilation_width == 1 && s->x_stride == channels;
    int64_t n = pixel / area, p = pixel % area / s->out_width, q = pixel % s->out_width;
    for (int64_t i = 0; i < count; i++, rows += stride) {
        int8_t *to = rows;
        const int64_t top = p * s->stride_height - s->top, left = q * s->stride_width - s->left;
        /* What is written behind a run, or a pixel's channels, is overwritten by the next. */
        if (side_by_side && top >= 0 && left >= 0 && top + reach < s->height && left + s->kernel_width <= s->width) {
            const int8_t *x = (const int8_t *)s->x + ((n * s->height + top) * s->width + left) * channels;
            for (int64_t r = 0; r < s->kernel_height; r++, to += run, x += down) copy_lines(to, x, run);
        } else {
            for (int64_t r = 0; r < s->kernel_height; r++)
                for (int64_t c = 0; c < s->kernel_width; c++, to += channels) {
                    const int8_t *x = tap_pixel(s, n, p, q, r, c);
                    copy_lines(to, x ? x + offset : (const int8_t *)s->outside, channels);
                }
        }
        end_with_zeros(rows, depth, stride);
        if (++q == s->out_width) {
            q = 0;
            if (++p == s->out_height) p = 0, n++;
        }
    }
}

/* The longest rows of at most 64 bytes, a multiple of 4, that so many channels are cut into, or 0. */
static int64_t even_rows(int64_t channels) {
    for (int64_t parts = (channels + AMX_BYTES - 1) / AMX_BYTES; parts * 16 <= channels; parts++)
        if (channels % (4 * parts) == 0) return channels / parts;
    return 0;
}

/* Fewer pixels leave most of a tile empty. */
#define FEWEST_PIXELS 8
#define LITTLE_DEPTH 384
#define WINDOW_BYTES (640 << 10) /* of copied windows: with a panel of weights they fit a cache of 2 MiB */

static inline int takes_tiles(const tw_step *s) {
    const int64_t pixels = s->batch * s->out_height * s->out_width, channels = s->channels / s->groups;
    const int64_t depth = s->kernel_height * s->kernel_width * channels;
    return pixels >= FEWEST_PIXELS && depth >= 16 && (round_up(depth, AMX_BYTES)) * TILE_PIXELS + 64 <= TW_SCRATCH_BYTES;
}

static void convolve_by_tiles(const tw_step *s, int number, int threads) {
    const int64_t pixels = s->batch * s->out_height * s->out_width, taps = s->kernel_height * s->kernel_width;
    const int64_t channels = s->channels / s->groups, vectors = (s->out_channels / s->groups + LANES - 1) / LANES;
    const part share = part_of(s, number, threads);
    if (share.first >= share.last || share.first_block >= share.last_block) return;
    const int in_place = !s->gather && reads_one_pixel(s) && even_rows(channels);
    tile_job job = {.s = s, .limits = bounds_of(s), .is_signed = s->x_type == INT8, .depth = taps * channels};
    if (s->gather) job.depth = round_up(job.depth, K_STEP);
    job.bytes = in_place ? even_rows(channels) : AMX_BYTES;
    job.steps = (job.depth + job.bytes - 1) / job.bytes;
    const int64_t stride = round_up(job.depth, AMX_BYTES);
    int64_t block = WINDOW_BYTES / stride / TILE_PIXELS * TILE_PIXELS;
    if (block < TILE_PIXELS) block = TILE_PIXELS;
    /* Two neighbouring blocks write whole lines of the result, unless their weights fill the first-level cache. */
    const int together = job.depth <= LITTLE_DEPTH ? 2 : 1;
    amx_shapes shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shapes.row_bytes[i] = i == 4 || i == 5 ? (uint16_t)job.bytes : AMX_BYTES;
        shapes.rows[i] = i > 5 ? (uint8_t)(job.bytes / 4) : AMX_ROWS;
    }
    _tile_loadconfig(&shapes);
    waiting_sums wait;
    wait.area = 0, wait.left = 0;
    int8_t *copies = (int8_t *)tw_scratch;
    for (int64_t group = 0; group < s->groups; group++) {
        const int64_t offset = group * channels;
        for (int64_t from = share.first; from < share.last; from += block) {
            const int64_t count = share.last - from < block ? share.last - from : block;
            /* Of the image, whole tiles alone: there may be nothing behind it. */
            int64_t direct = in_place ? count : 0;
            if (from + round_up(direct, TILE_PIXELS) > pixels) direct = direct / TILE_PIXELS * TILE_PIXELS;
            if (direct < count)
                copy_rows(s, from + direct, count - direct, offset, channels, job.depth, copies, stride);
            for (int64_t v = share.first_block; v < share.last_block;) {
                tile_channels blocks[3];
                int number_of_blocks = 0;
                do {
                    const int width = block_vectors(vectors - v);
                    for (int in_block = 0; in_block < width; in_block += 2)
                        blocks[number_of_blocks++] = channels_at(&job, group, v, in_block, width);
                    v += width;
                } while (number_of_blocks < together && v < share.last_block);
                for (int64_t i = 0; i < count; i += TILE_PIXELS) {
                    const int64_t valid = count - i < TILE_PIXELS ? count - i : TILE_PIXELS;
                    const int8_t *x = copies + (i - direct) * stride;
                    if (i < direct) x = (const int8_t *)s->x + (from + i) * s->x_stride + offset;
                    for (int b = 0; b < number_of_blocks; b++)
                        multiply(&job, blocks + b, valid, x, i < direct ? s->x_stride : stride, from + i,
                                 i ? 0 : job.bytes * blocks[b].vectors * LANES, &wait);
                }
            }
        }
    }
    if (wait.left) finish_waiting(&job, &wait, wait.left);
    amx_end();
}
