/* Convolution as a product without a copy: a block of pixels, for each of its tiles a list of pointers to the pixels that
   a tap reads (to padding outside the image), and for each tile a kernel that keeps rows x vectors of sums in registers.

   The file that includes this defines

       element          type of activations and weights
       K_STEP           channels multiplied at once
       most_rows(vectors)   rows of a tile of so many vectors
       tile(step, valid, vectors, pointers, windows, length, weight, pixel, group, vector)
                one tile: the windows of `valid` pixels from `pixel` on, each a list of `windows` pointers to `length`
                elements, times the weights of the output channels of `vectors` vectors from `vector` of the group on

   and, where it says COPY_WINDOWS,

       copies_windows(step) whether it wants another form of each pixel's windows than what lies in the image
       most_pixels(depth)   pixels of a block whose windows have so many elements
       copy_windows(step, pointers, count, windows, length)   writes each pixel's windows as one, for `tile`

   Limits that the caller keeps: windows <= BLOCK_POINTERS, a copied window <= GATHER_BYTES, a pixel <= LARGEST_PIXEL. */
#include "conv_vector.h"

#define BLOCK_POINTERS 4096
#define BLOCK_BYTES (400 << 10) /* of input pixels: with a panel of weights they fit a second-level cache of 1 MiB */
#define GATHER_BYTES (64 << 10)
#define GATHER_STEP 32 /* bytes copied at once */

static inline int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

/* Vectors in the block of output channels that begins where `left` vectors remain. */
static inline int block_vectors(int64_t left) { return left == 3 ? 3 : left == 1 ? 1 : 2; }

/* The input pixel that output pixel number `pixel` reads at (tap_row, tap_column), or NULL outside the image. */
static inline const element *tap_pixel(const tw_step *s, int64_t n, int64_t p, int64_t q, int64_t i, int64_t j) {
    int64_t row = p * s->stride_height + i * s->dilation_height - s->top;
    int64_t column = q * s->stride_width + j * s->dilation_width - s->left;
    if (row < 0 || row >= s->height || column < 0 || column >= s->width) return NULL;
    return (const element *)s->x + ((n * s->height + row) * s->width + column) * s->x_stride;
}

/* Whether each pixel of the result reads the pixel of the image at the same place, and no other. */
static inline int reads_one_pixel(const tw_step *s) {
    return s->kernel_height == 1 && s->kernel_width == 1 && s->stride_height == 1 && s->stride_width == 1 && !s->top &&
           !s->left && s->height == s->out_height && s->width == s->out_width;
}

/* Copies the window of each of `count` pixels to `rows`, `length` elements apart. The rest of each row is multiplied by
   zeros. */
static void gather_windows(const tw_step *s, int64_t first, int64_t count, int64_t offset, int64_t channels,
                           element *rows, int64_t length) {
    const int64_t area = s->out_height * s->out_width, run = s->kernel_width * channels;
    const int64_t reach_down = (s->kernel_height - 1) * s->dilation_height;
    /* Whole vectors are copied, and what lies behind a run is overwritten by the next; not so at the end of the image. */
    const int side_by_side = s->dilation_width == 1 && s->x_stride == channels;
    const int64_t slack = GATHER_STEP / sizeof(element);
    int64_t n = first / area, p = first % area / s->out_width, q = first % s->out_width - 1;
    for (int64_t i = 0; i < count; i++, rows += length) {
        if (++q == s->out_width) {
            q = 0;
            if (++p == s->out_height) p = 0, n++;
        }
        const int64_t column = q * s->stride_width - s->left, row = p * s->stride_height - s->top;
        const element *image = (const element *)s->x + n * s->height * s->width * s->x_stride + offset;
        const int inside = row >= 0 && column >= 0 && column + s->kernel_width <= s->width &&
                           row + reach_down + 1 < s->height; /* not the last row: there is more behind it */
        if (side_by_side && inside && s->width * channels >= run + slack) {
            const element *x = image + (row * s->width + column) * channels;
            element *to = rows;
            for (int64_t r = 0; r < s->kernel_height; r++, to += run, x += s->dilation_height * s->width * channels)
                for (int64_t k = 0; k < run; k += slack) memcpy(to + k, x + k, GATHER_STEP);
            for (; to < rows + length; to += slack) memcpy(to, tw_zeros, GATHER_STEP); /* quicker than memset of so few */
            continue;
        }
        memset(rows, s->x_type == FLOAT32 ? 0 : *(const char *)s->outside, (size_t)length * sizeof *rows);
        element *to = rows;
        for (int64_t r = 0; r < s->kernel_height; r++)
            for (int64_t j = 0; j < s->kernel_width; j++, to += channels) {
                const int64_t y = row + r * s->dilation_height, at = column + j * s->dilation_width;
                if (y >= 0 && y < s->height && at >= 0 && at < s->width)
                    for (int64_t c = 0; c < channels; c++) to[c] = image[(y * s->width + at) * s->x_stride + c];
            }
    }
}

/* Rows of the tiles that `count` pixels are cut into: as even as possible. */
static inline int64_t tile_rows(int64_t count, int64_t most) {
    int64_t tiles = (count + most - 1) / most;
    return (count + tiles - 1) / tiles;
}

/* A thread's part: pixels first to last, vectors of output channels first_block to last_block of each group. */
typedef struct {
    int64_t first, last, first_block, last_block;
} part;

/* Each thread reads half of the larger operand. */
static part part_of(const tw_step *s, int number, int threads) {
    const int64_t pixels = s->batch * s->out_height * s->out_width, taps = s->kernel_height * s->kernel_width;
    const int64_t channels = s->channels / s->groups, vectors = (s->out_channels / s->groups + LANES - 1) / LANES;
    const int64_t weight_elements = vectors * LANES * taps * channels;
    const int64_t x_elements = s->batch * s->height * s->width * channels;
    part share = {0, pixels, 0, vectors};
    if (weight_elements > x_elements && vectors >= 2 * threads) {
        share_of(vectors / 2, number, threads, &share.first_block, &share.last_block);
        share.first_block *= 2;
        share.last_block = number + 1 == threads ? vectors : 2 * share.last_block;
    } else {
        share_of(pixels, number, threads, &share.first, &share.last);
    }
    return share;
}

static void convolve_part(const tw_step *s, int number, int threads) {
    const int64_t taps = s->kernel_height * s->kernel_width;
    const int64_t channels = s->channels / s->groups, vectors = (s->out_channels / s->groups + LANES - 1) / LANES;
    /* One window tap after tap, or one copied row of all of them. */
    const int64_t windows = s->gather ? 1 : taps;
    const int64_t length = s->gather ? round_up(taps * channels, K_STEP) : channels;
    const int64_t depth = windows * length; /* of the packed weight */
    const part share = part_of(s, number, threads);
    const int64_t first = share.first, last = share.last, first_block = share.first_block, last_block = share.last_block;
    if (first >= last || first_block >= last_block) return;
    int64_t most = BLOCK_POINTERS / windows;
    if (s->gather && most > GATHER_BYTES / (int64_t)(length * sizeof(element)))
        most = GATHER_BYTES / (length * sizeof(element));
    int64_t block = BLOCK_BYTES / (int64_t)(length * sizeof(element));
    if (block > 240) block = 240;
    int64_t tile_windows = windows, tile_length = length;
#ifdef COPY_WINDOWS
    const int copies = copies_windows(s);
    if (copies) {
        tile_windows = 1, tile_length = depth;
        if (most > most_pixels(depth)) most = most_pixels(depth);
    }
#endif
    if (block > most) block = most;
    if (block < 1) block = 1;
    /* As even as possible, but of whole tiles except for the last. */
    const int64_t blocks = (last - first + block - 1) / block;
    block = round_up((last - first + blocks - 1) / blocks, most_rows(2));
    if (block > most) block = most < most_rows(2) ? most : most - most % most_rows(2);
    const element *outside = (const element *)(s->x_type == FLOAT32 ? tw_zeros : s->outside);
    const element *pointers[BLOCK_POINTERS];
    _Alignas(64) element gathered[(GATHER_BYTES + GATHER_STEP) / sizeof(element)];
    const int64_t area = s->out_height * s->out_width;
    for (int64_t group = 0; group < s->groups; group++) {
        const int64_t offset = group * channels;
        for (int64_t from = first; from < last; from += block) {
            const int64_t count = last - from < block ? last - from : block;
            /* pointers[pixel][window] */
            if (s->gather) {
                gather_windows(s, from, count, offset, channels, gathered, length);
                for (int64_t i = 0; i < count; i++) pointers[i] = gathered + i * length;
            } else if (reads_one_pixel(s)) {
                const element *x = (const element *)s->x + from * s->x_stride + offset;
                for (int64_t i = 0; i < count; i++) pointers[i] = x + i * s->x_stride;
            } else {
                const element **next = pointers;
                int64_t n = from / area, p = from % area / s->out_width, q = from % s->out_width;
                for (int64_t i = 0; i < count; i++) {
                    for (int64_t r = 0; r < s->kernel_height; r++)
                        for (int64_t c = 0; c < s->kernel_width; c++) {
                            const element *x = tap_pixel(s, n, p, q, r, c);
                            *next++ = x ? x + offset : outside;
                        }
                    if (++q == s->out_width) {
                        q = 0;
                        if (++p == s->out_height) {
                            p = 0;
                            n++;
                        }
                    }
                }
            }
#ifdef COPY_WINDOWS
            if (copies) copy_windows(s, pointers, count, windows, length);
#endif
            for (int64_t v = first_block; v < last_block;) {
                const int width = block_vectors(vectors - v);
                const element *weight = (const element *)s->weight + (group * vectors + v) * LANES * depth;
                const int64_t rows = tile_rows(count, most_rows(width));
                for (int64_t i = 0; i < count; i += rows) {
                    const int valid = (int)(count - i < rows ? count - i : rows);
#ifdef WEIGHTS_AHEAD
                    tile(s, valid, width, pointers + i * tile_windows, tile_windows, tile_length, weight, from + i, group, v,
                         i, count);
#else
                    tile(s, valid, width, pointers + i * tile_windows, tile_windows, tile_length, weight, from + i, group, v);
#endif
                }
                v += width;
            }
        }
    }
}
