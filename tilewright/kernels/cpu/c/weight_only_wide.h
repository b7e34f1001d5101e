/* Tiles of a product of float32 activations and integer weights for many rows: the integers of one segment of a panel are
   widened to floats once, for all rows of a group, and stay in the first-level cache. Sums are added up in the order of
   weight_only_tile.h, so a row does not depend on how many there are. */

/* What one widened segment holds: SEGMENT_WORDS words of PANEL channels. */
typedef struct {
    float column[SEGMENT_WORDS * 8][PANEL] __attribute__((aligned(64)));
} segment;

/* bits and vectors are constants wherever this is called: of a panel with few channels one vector is widened, and
   multiplied, in place of all. `at`: where the panel's scales and zeros of this group begin. */
INLINE void widen_segment(int bits, int vectors, const job_float *job, const uint8_t *word, int64_t words, int64_t at,
                          segment *wide) {
    floats zero[TILE_VECTORS];
    for (int v = 0; v < vectors; v++) zero[v] = zeros_at(bits, job->zero, at + v * LANES);
    for (int64_t i = 0; i < words; i++, word += PANEL * bits)
#pragma GCC unroll 8
        for (int t = 0; t < 8; t++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++)
                store_floats(wide->column[i * 8 + t] + v * LANES,
                             bits == 4 ? decode4_float(word + v * LANES * 4, t, zero[v], 1)
                                       : decode8_float(word + v * LANES, t));
}

/* `rows` and `vectors` are constants wherever this is called: the sums stay in registers. Rows beyond TALL_ROWS are those of
   the next tile. next: from these rows to those of the tile
   after them, whose lines the processor's prefetcher does not guess. */
INLINE void add_segment_rows(int rows, int vectors, const float *x, int height, const segment *wide, int64_t words,
                             const float *scale, float sums[][PANEL], int64_t next) {
    floats sum[2 * TALL_ROWS][TILE_VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sum[r][v] = floats_zero();
    const float *w = wide->column[0];
    for (int64_t i = 0; i < words; i++, x += height * 8, w += 8 * PANEL) {
        for (int r = 0; r < rows; r += 2) /* two rows of a word fill a line */
            __builtin_prefetch(x + (r / TALL_ROWS + divide_up(rows, TALL_ROWS)) * next + r % TALL_ROWS * 8);
#pragma GCC unroll 8
        for (int t = 0; t < 8; t++) {
            floats b[TILE_VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) b[v] = load_floats(w + t * PANEL + v * LANES);
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++)
                    sum[r][v] = add_product(sum[r][v], b[v], x + r / TALL_ROWS * next + r % TALL_ROWS * 8 + t);
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
        const floats s = load_floats(scale + v * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            float *to = sums[r] + v * LANES;
            store_floats(to, floats_fma(sum[r][v], s, load_floats(to)));
        }
    }
}

static void add_segment(int rows, int vectors, const float *x, int height, const segment *wide, int64_t words, const float *scale,
                        float sums[][PANEL], int64_t next) {
    switch (vectors == 1 ? -rows : rows) {
#define CASE(count)                                                                                                    \
    case count: add_segment_rows(count, TILE_VECTORS, x, height, wide, words, scale, sums, next); return;              \
    case -count: add_segment_rows(count, 1, x, height, wide, words, scale, sums, next); return;
        UP_TO_6(CASE)
#undef CASE
    }
}

/* Sums of `rows` rows, at most ROW_GROUP, and one panel. `row` is a multiple of height. */
INLINE void multiply_widened(int bits, int vectors, const job_float *job, int height, int64_t row, int64_t rows, int64_t panel,
                             float sums[][PANEL]) {
    const uint8_t *w = job->packed + panel * job->words * PANEL * bits;
    const int64_t next = job->words * 8 * height;
    segment wide;
    memset(sums, 0, (size_t)rows * sizeof *sums);
    for (int64_t group = 0; group < job->groups; group++) {
        const int64_t begin = group * job->group_words, at = (panel * job->groups + group) * PANEL;
        const int64_t end = begin + job->group_words < job->words ? begin + job->group_words : job->words;
        for (int64_t first = begin; first < end; first += SEGMENT_WORDS) {
            const int64_t words = end - first < SEGMENT_WORDS ? end - first : SEGMENT_WORDS;
            widen_segment(bits, vectors, job, w + first * PANEL * bits, words, at, &wide);
            for (int64_t i = 0, tall = vectors == 1 ? 2 * TALL_ROWS : rows + 1; i < rows; i += height) {
                const float *x = job->rows + (row + i) * job->words * 8 + first * height * 8;
                const int count = rows - i < height ? (int)(rows - i) : height;
                if (rows - i >= tall) { /* one vector of one tile has too few sums to keep the multipliers busy */
                    add_segment_rows(2 * TALL_ROWS, 1, x, height, &wide, words, job->scale + at, sums + i, next);
                    i += height;
                    continue;
                }
                add_segment(count, vectors, x, height, &wide, words, job->scale + at, sums + i, next);
            }
        }
    }
}
