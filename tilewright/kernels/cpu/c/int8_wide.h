/* W8A8 tiles where there is no VNNI: 16-bit numbers are multiplied (vpmaddwd). Activations are widened as they are quantised
   (widen_activations in simd.h); of the weights one segment of a panel, once for all rows of a group, and it stays in the
   first-level cache. */

enum { WIDE_ROWS = 6, SEGMENT_STEPS = 32 };

/* Of each step of four k first the even ones of all channels, then the odd ones, as load_weights splits them. */
typedef struct {
    int16_t pairs[2 * SEGMENT_STEPS][PANEL * 2] __attribute__((aligned(64)));
} segment;

static void widen_weights(const int8_t *panel, int64_t steps, segment *wide) {
    for (int64_t step = 0; step < steps; step++)
#pragma GCC unroll 2
        for (int v = 0; v < TILE_VECTORS; v++) {
            const weights w = load_weights(panel + (step * PANEL + v * LANES) * 4);
            _mm256_store_si256((__m256i *)wide->pairs[2 * step] + v, w.even);
            _mm256_store_si256((__m256i *)wide->pairs[2 * step + 1] + v, w.odd);
        }
}

/* Adds the products of one segment to the sums, or puts them there if `fresh`. `rows` is a constant wherever this is
   called: the loops over rows and vectors unroll, and the sums stay in registers. */
static inline __attribute__((always_inline)) void add_segment_rows(int rows, const uint8_t *x, int64_t x_stride,
                                                                   const segment *wide, int64_t steps, int fresh,
                                                                   vector sums[][TILE_VECTORS]) {
    vector sum[WIDE_ROWS][TILE_VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < TILE_VECTORS; v++) sum[r][v] = fresh ? vector_zero() : sums[r][v];
    for (int64_t step = 0; step < steps; step++) {
        if (step % 8 == 0) /* a line; the prefetcher does not guess that other rows follow */
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) __builtin_prefetch(x + (r + WIDE_ROWS) * x_stride + step * 8);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const __m256i *w = (const __m256i *)wide->pairs[2 * step + half];
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                const __m256i a = broadcast4(x + r * x_stride + step * 8 + half * 4);
#pragma GCC unroll 2
                for (int v = 0; v < TILE_VECTORS; v++) sum[r][v] = add_pairs(sum[r][v], a, _mm256_load_si256(w + v));
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < TILE_VECTORS; v++) sums[r][v] = sum[r][v];
}

static void add_segment(int rows, const uint8_t *x, int64_t x_stride, const segment *wide, int64_t steps, int fresh,
                        vector sums[][TILE_VECTORS]) {
    switch (rows) {
#define CASE(count)                                                                                                    \
    case count: add_segment_rows(count, x, x_stride, wide, steps, fresh, sums); return;
        UP_TO_6(CASE)
#undef CASE
    }
}

/* Sums of `rows` rows, at most ROW_GROUP, and one panel. */
static void multiply_widened(int rows, const uint8_t *x, int64_t x_stride, const int8_t *panel, int64_t steps,
                             vector sums[][TILE_VECTORS]) {
    segment wide;
    for (int64_t first = 0; first < steps; first += SEGMENT_STEPS, panel += SEGMENT_STEPS * PANEL * 4) {
        const int64_t count = steps - first < SEGMENT_STEPS ? steps - first : SEGMENT_STEPS;
        widen_weights(panel, count, &wide);
        for (int i = 0; i < rows; i += WIDE_ROWS)
            add_segment(rows - i < WIDE_ROWS ? rows - i : WIDE_ROWS, x + i * x_stride + first * 8, x_stride, &wide, count,
                        !first, sums + i);
    }
}
