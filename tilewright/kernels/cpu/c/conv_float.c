/* float32 convolution: products of tiles of pixels and output channels. */
#include "conv_vector.h"

#ifdef LANES
typedef float element;
#define K_STEP 1
#define WEIGHTS_AHEAD

#if LANES == 16
static inline int most_rows(int vectors) { return vectors == 3 ? 8 : 12; }
#else
static inline int most_rows(int vectors) { return vectors == 3 ? 4 : vectors == 2 ? 6 : 8; }
#endif

static void tile(const tw_step *s, int valid, int vectors, const element *const *pointers, int64_t windows,
                 int64_t length, const element *weight, int64_t pixel, int64_t group, int64_t vector, int64_t done,
                 int64_t count);
#include "conv_tile.h"

/* Products that are added up one after the other; sums of so many are then added to each other. In one chain, 46 of 60
   random convolutions of 825 products erred by more than twice what PyTorch does, whose sums are made of parts too; with
   this none of 60 of 512 to 2304 products does, and the root mean square of the error is half of PyTorch's. */
#define SEGMENT 128

/* Whether the rows of a window lie one distance apart, as pixels of one row of an image do. */
INLINE int64_t distance_of(const int rows, const float *const *pointers, int64_t windows) {
    const int64_t distance = rows > 1 ? pointers[windows] - pointers[0] : 0;
    int64_t differs = 0;
#pragma GCC unroll 16
    for (int m = 2; m < rows; m++) differs |= pointers[m * windows] - pointers[(m - 1) * windows] - distance;
    return differs ? -1 : distance;
}

/* The products of one channel of a pixel with `vectors` vectors of weights. */
INLINE void add_product(const int vectors, const float *x, const vec *b, vec *sum) {
    const vec a = v_set(*x);
#pragma GCC unroll 3
    for (int v = 0; v < vectors; v++) sum[v] = v_add_product(sum[v], a, b[v]);
}

/* The weights of one product; asks for what of the next panel lies at `ahead`. */
INLINE void load_weights(const int vectors, const float *weight, const char *ahead, vec *b) {
    __builtin_prefetch(ahead, 0, 2);
#pragma GCC unroll 3
    for (int v = 0; v < vectors; v++) b[v] = v_load(weight + v * LANES);
}

/* Where the tile finds the weights of the next panel, which of a network at batch 1 come from beyond the second-level
   cache: each tile of a block of pixels asks for its share of them, some bytes more with each product. */
typedef struct {
    const char *at;
    int64_t step;
} upcoming;

/* `count` products more of rows that lie `distance` bytes apart. The compiler would keep a pointer to each row, in more
   registers than there are, did it know what becomes of these. */
INLINE void add_even_products(const int rows, const int vectors, const float *first, int64_t distance, int64_t count,
                              const float *weight, upcoming next, vec sum[12][3]) {
    const char *x[4];
#pragma GCC unroll 4
    for (int i = 0; i < (rows + 2) / 3; i++) x[i] = (const char *)first + 3 * i * distance;
    for (const float *end = weight + count * vectors * LANES; weight != end; weight += vectors * LANES) {
        vec b[3];
        load_weights(vectors, weight, next.at, b);
        next.at += next.step;
        __asm__("" : "+r"(distance));
#pragma GCC unroll 16
        for (int m = 0; m < rows; m++) add_product(vectors, (const float *)(x[m / 3] + m % 3 * distance), b, sum[m]);
#pragma GCC unroll 4
        for (int i = 0; i < (rows + 2) / 3; i++) {
            x[i] += sizeof(float);
            __asm__("" : "+r"(x[i]));
        }
    }
}

/* The same of rows that lie anywhere. */
INLINE void add_products(const int rows, const int vectors, const float *const *pointers, int64_t windows, int64_t from,
                         int64_t count, const float *weight, upcoming next, vec sum[12][3]) {
    const float *x[12];
#pragma GCC unroll 16
    for (int m = 0; m < rows; m++) x[m] = pointers[m * windows] + from;
    for (int64_t k = 0; k < count; k++, weight += vectors * LANES) {
        vec b[3];
        load_weights(vectors, weight, next.at, b);
        next.at += next.step;
#pragma GCC unroll 16
        for (int m = 0; m < rows; m++) add_product(vectors, x[m] + k, b, sum[m]);
    }
}

INLINE void clear_sums(const int rows, const int vectors, vec sum[12][3]) {
#pragma GCC unroll 16
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) sum[m][v] = v_zero();
}

INLINE void add_kept(const int rows, const int vectors, vec sum[12][3], const float *kept) {
#pragma GCC unroll 16
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) sum[m][v] = v_add(v_load(kept + (m * vectors + v) * LANES), sum[m][v]);
}

INLINE void keep_sums(const int rows, const int vectors, const vec sum[12][3], float *kept) {
#pragma GCC unroll 16
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) v_store(kept + (m * vectors + v) * LANES, sum[m][v]);
}

/* Where a tile's results go: `direct` if the epilogue is one of those without a branch, and all vectors are whole or can
   be stored in part. */
typedef struct {
    const tw_step *step;
    int64_t pixel, channel; /* the first ones */
    const float *bias;      /* of that channel, or zeros */
    int direct, last;       /* last: channels of the last vector */
    upcoming next;
} target;

#if LANES == 16
#define CAN_STORE_PART 1
#else
#define CAN_STORE_PART 0
#endif

INLINE void finish_directly(const int rows, const int vectors, const int adds, const target *t, const vec sum[12][3]) {
    const tw_step *s = t->step;
    const float infinity = __builtin_inff();
    const vec low = v_set(s->activation == NONE ? -infinity : 0.0f), high = v_set(s->activation == RELU6 ? 6.0f : infinity);
    const vec r_scale = v_set(s->r_scale);
    float *y = (float *)s->y + t->pixel * s->y_stride + t->channel;
    const float *r = (const float *)s->residual + (adds ? t->pixel * s->r_stride + t->channel : 0);
#pragma GCC unroll 3
    for (int v = 0; v < vectors; v++) {
        const int n = CAN_STORE_PART && v == vectors - 1 ? t->last : LANES;
        const vec bias = v_load(t->bias + v * LANES);
#pragma GCC unroll 16
        for (int m = 0; m < rows; m++) {
            vec value = v_add(sum[m][v], bias);
            if (adds) value = v_add(value, v_mul(v_load_first(r + m * s->r_stride + v * LANES, n), r_scale));
            v_store_first(y + m * s->y_stride + v * LANES, v_max(low, v_min(high, value)), n);
        }
    }
}

/* The sums of a tile: to their target, or to `kept` where that is not direct. */
INLINE void tile_of(const int rows, const int vectors, const target *t, const element *const *pointers, int64_t windows,
                    int64_t length, const element *weight, float *kept) {
    vec sum[12][3]; /* no array of variable length: the compiler would keep it in memory */
    clear_sums(rows, vectors, sum);
    int first = 1;
    int64_t left = SEGMENT;
    upcoming next = t->next;
    for (int64_t w = 0; w < windows; w++, pointers++) {
        const int64_t distance = distance_of(rows, pointers, windows);
        for (int64_t k = 0; k < length;) {
            if (!left) {
                if (!first) add_kept(rows, vectors, sum, kept);
                keep_sums(rows, vectors, sum, kept);
                clear_sums(rows, vectors, sum);
                first = 0, left = SEGMENT;
            }
            const int64_t count = length - k < left ? length - k : left;
            if (LANES == 16 && distance >= 0) add_even_products(rows, vectors, pointers[0] + k, distance * (int64_t)sizeof(float), count, weight, next, sum);
            else add_products(rows, vectors, pointers, windows, k, count, weight, next, sum);
            weight += count * vectors * LANES;
            next.at += count * next.step;
            left -= count, k += count;
        }
    }
    if (!first) add_kept(rows, vectors, sum, kept);
    if (!t->direct) keep_sums(rows, vectors, sum, kept);
    else if (t->step->residual) finish_directly(rows, vectors, 1, t, sum);
    else finish_directly(rows, vectors, 0, t, sum);
}

/* Rolled loops: unrolled into every tile, the epilogue would be most of the code. */
static void finish_tile(const tw_step *s, int valid, int vectors, const float *sums, int64_t pixel, int64_t group,
                        int64_t vector) {
    const int64_t group_out = s->out_channels / s->groups, all = (group_out + LANES - 1) / LANES;
    for (int v = 0; v < vectors; v++, sums += LANES) {
        const int64_t at = (vector + v) * LANES, left = group_out - at, channel = group * group_out + at;
        const vec bias = s->bias ? v_load(s->bias + group * all * LANES + at) : v_zero();
        const int n = left < LANES ? (int)left : LANES;
        for (int m = 0; m < valid; m++)
            finish(s, v_add(v_load(sums + m * vectors * LANES), bias), pixel + m, channel, n);
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

typedef void (*tile_function)(const target *t, const element *const *pointers, int64_t windows, int64_t length,
                              const element *weight, float *kept);
#define TILE(rows, vectors)                                                                                            \
    static void tile_##rows##_##vectors(const target *t, const element *const *pointers, int64_t windows,              \
                                        int64_t length, const element *weight, float *kept) {                          \
        tile_of(rows, vectors, t, pointers, windows, length, weight, kept);                                            \
    }
#define BOTH(rows) TILE(rows, 1) TILE(rows, 2)
#define ALL(rows) BOTH(rows) TILE(rows, 3)
ALL(1) ALL(2) ALL(3) ALL(4) BOTH(5) BOTH(6) TILE(7, 1) TILE(8, 1)
#if LANES == 16
TILE(5, 3) TILE(6, 3) TILE(7, 2) TILE(7, 3) TILE(8, 2) TILE(8, 3) BOTH(9) BOTH(10) BOTH(11) BOTH(12)
#endif
#define ROW(rows) {tile_##rows##_1, tile_##rows##_2, tile_##rows##_3},
#define ROW_OF_TWO(rows) {tile_##rows##_1, tile_##rows##_2, 0},
static const tile_function tiles[][3] = {
    ROW(1) ROW(2) ROW(3) ROW(4)
#if LANES == 16
    ROW(5) ROW(6) ROW(7) ROW(8) ROW_OF_TWO(9) ROW_OF_TWO(10) ROW_OF_TWO(11) ROW_OF_TWO(12)
#else
    ROW_OF_TWO(5) ROW_OF_TWO(6) {tile_7_1, 0, 0}, {tile_8_1, 0, 0},
#endif
};

static void tile(const tw_step *s, int valid, int vectors, const element *const *pointers, int64_t windows,
                 int64_t length, const element *weight, int64_t pixel, int64_t group, int64_t vector, int64_t done,
                 int64_t count) {
    _Alignas(64) float kept[12 * 3 * LANES];
    const int64_t group_out = s->out_channels / s->groups, all = (group_out + LANES - 1) / LANES;
    const int64_t channel = group * group_out + vector * LANES;
    const int64_t last = group_out - (vector + vectors - 1) * LANES;
    const int epilogue = epilogue_of(s);
    const int64_t bytes = vectors * LANES * (int64_t)sizeof(float), panel = windows * length * bytes;
    const target to = {
        .step = s,
        .pixel = pixel,
        .channel = channel,
        .bias = s->bias ? s->bias + (group * all + vector) * LANES : (const float *)tw_zeros,
        .direct = (epilogue == TO_FLOAT || epilogue == ADD_TO_FLOAT) && (CAN_STORE_PART || last >= LANES),
        .last = last < LANES ? (int)last : LANES,
        .next = {(const char *)weight + panel + panel * done / count, bytes * valid / count},
    };
    prefetch_results(s, valid, vectors, pixel, channel);
    tiles[valid - 1][vectors - 1](&to, pointers, windows, length, weight, kept);
    if (!to.direct) finish_tile(s, valid, vectors, kept, pixel, group, vector);
}

void JOIN(tw_float_conv, TILEWRIGHT_ISA)(const tw_step *s, int number, int count) { convolve_part(s, number, count); }
#endif
