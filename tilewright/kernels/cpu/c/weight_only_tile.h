/* One tile of a product of float activations and integer weights; included once for each kind of float that is multiplied
   (weight_only.c). ELEMENT: its type in memory; STEP: how many k one instruction multiplies. */

typedef struct {
    const uint8_t *packed;
    const float *scale;
    const uint8_t *zero; /* NULL for int8 */
    int64_t n, k, words, group_words, groups;
    const void *x;
    int dtype, compute;
    int64_t m, x_stride;
    output out;
    ELEMENT *rows;
    float *row_sums;
    int64_t block;
    tw_queue *units;
} NAME(job);

/* Rounds a row to the dtype that is multiplied, with zeros up to a whole word, and adds up each group. The rows of a tile
   are interleaved word by word: a tile reads them in one stream, whose parts never compete for one cache set. */
static void NAME(convert)(const NAME(job) *job, int64_t from, int64_t row, int height) {
    ELEMENT *to = job->rows + row / height * height * job->words * 8 + row % height * 8, part[PART];
    float sum = 0, *sums = job->row_sums + row * job->groups;
    int64_t left = job->group_words, first = 0;
#if SPREADS_WORDS
    if (job->dtype == FLOAT32 && job->compute != FLOAT16) {
        spread_words((const float *)job->x + from * job->x_stride, job->k / 8, job->compute, to, height * 8);
        first = job->k / 8 * 8, to += job->k / 8 * height * 8;
    }
#endif
    for (; first < job->words * 8; first += PART) {
        int64_t count = job->k - first < PART ? job->k - first : PART, words = divide_up(count, 8);
        convert_row(job->x, job->dtype, from * job->x_stride + first, count, job->compute, part);
        for (int64_t i = count; i < words * 8; i++) part[i] = 0;
        for (int64_t i = 0; i < words; i++, to += height * 8) {
            memcpy(to, part + i * 8, 8 * sizeof *to);
            if (!NEEDS_ROW_SUMS || !job->zero) continue;
            for (int j = 0; j < 8; j++) sum += WIDEN(part[i * 8 + j]);
            if (--left) continue;
            *sums++ = sum;
            sum = 0, left = job->group_words;
        }
    }
    if (NEEDS_ROW_SUMS && job->zero && left < job->group_words) *sums = sum;
}

/* bits, rows and vectors are constants wherever this is called. Sums of `vectors` vectors of channels from `offset` on, of
   two panels where they are more than one has: then those of the second follow after `rows` sums; each group in segments,
   so that no chain of additions is long. */
#define AT_VECTOR(v, panel_step) at + (v) / TILE_VECTORS * (panel_step) + (v) % TILE_VECTORS * LANES
INLINE void NAME(multiply)(int bits, int rows, int vectors, const NAME(job) *job, int height, int64_t row,
                           int64_t panel, int offset, float sums[][PANEL]) {
    const int64_t word_bytes = PANEL * bits, x_step = height * 8;
    const ELEMENT *x = job->rows + row / height * height * job->words * 8 + row % height * 8;
    const uint8_t *w = job->packed + panel * job->words * word_bytes + offset * (bits == 4 ? 4 : 1);
    for (int64_t group = 0; group < job->groups; group++) {
        int64_t begin = group * job->group_words, end = begin + job->group_words;
        const int64_t at = (panel * job->groups + group) * PANEL + offset;
        if (end > job->words) end = job->words;
        for (int64_t first = begin; first < end; first += SEGMENT_WORDS) {
            int64_t last = first + SEGMENT_WORDS < end ? first + SEGMENT_WORDS : end;
            floats sum[12][2 * TILE_VECTORS], zero[2 * TILE_VECTORS];
#pragma GCC unroll 16
            for (int v = 0; v < vectors; v++) {
                zero[v] = bits == 4 ? centred_zeros(job->zero + AT_VECTOR(v, job->groups * PANEL)) : floats_zero();
#pragma GCC unroll 16
                for (int r = 0; r < rows; r++)
                    sum[r][v] = bits == 4 && NEEDS_ROW_SUMS && first == begin
                                    ? floats_times(zero[v], -job->row_sums[(row + r) * job->groups + group])
                                    : floats_zero();
            }
            const ELEMENT *a = x + first * x_step;
            const uint8_t *word = w + first * word_bytes;
            for (int64_t i = first; i < last; i++, a += x_step, word += word_bytes) {
#pragma GCC unroll 8
                for (int t = 0; t < 8 / STEP; t++)
#pragma GCC unroll 4
                    for (int v = 0; v < vectors; v++) {
                        const uint8_t *from = word + v / TILE_VECTORS * job->words * word_bytes;
                        floats b = bits == 4 ? NAME(decode4)(from + v % TILE_VECTORS * LANES * 4, t, zero[v])
                                             : NAME(decode8)(from + v % TILE_VECTORS * LANES, t);
#pragma GCC unroll 16
                        for (int r = 0; r < rows; r++)
                            sum[r][v] = NAME(multiply_add)(sum[r][v], b, a + r * 8 + t * STEP);
                        __asm__("" : "+r"(a)); /* no load ahead of its turn: it would push a sum out of its register */
                    }
            }
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++) KEEP_IN_REGISTER(sum[r][v]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                floats scale = load_floats(job->scale + AT_VECTOR(v, job->groups * PANEL));
#pragma GCC unroll 16
                for (int r = 0; r < rows; r++) {
                    float *to = sums[r + v / TILE_VECTORS * rows] + offset + v % TILE_VECTORS * LANES;
                    store_floats(to, floats_fma(sum[r][v], scale, load_floats(to)));
                }
            }
        }
    }
}

#undef AT_VECTOR

/* Whether the channels of a panel fit one vector: those that are not there need not be multiplied. */
#define NARROW(job, panel) ((job)->out.n - (panel) * PANEL <= LANES)

/* As many rows as one tile takes, at most `count`; returns how many. */
INLINE int NAME(tile)(int bits, int64_t count, const NAME(job) *job, int height, int64_t row, int64_t panel,
                      float sums[][PANEL]) {
    memset(sums, 0, (size_t)(count < TALL_ROWS ? count : TALL_ROWS) * sizeof *sums);
#if TALL_ROWS > 6
    if (count >= TALL_ROWS) {
        for (int offset = 0; offset < PANEL; offset += PANEL / 2)
            NAME(multiply)(bits, TALL_ROWS, TILE_VECTORS / 2, job, height, row, panel, offset, sums);
        return TALL_ROWS;
    }
#endif
    const int left = (int)(count < TILE_ROWS ? count : TILE_ROWS);
    switch (NARROW(job, panel) ? -left : left) {
#define CASE(rows)                                                                                                     \
    case rows: NAME(multiply)(bits, rows, TILE_VECTORS, job, height, row, panel, 0, sums); return rows;                \
    case -rows: NAME(multiply)(bits, rows, 1, job, height, row, panel, 0, sums); return rows;
        UP_TO_TILE_ROWS(CASE)
#undef CASE
    }
    return 0;
}

#if WIDEN_ONCE
#include "weight_only_wide.h"
#endif

/* Rows from `row` to `last`, which are those of one group, and one panel. */
INLINE void NAME(unit)(int bits, const NAME(job) *job, int height, int64_t first, int64_t row, int64_t last,
                       int64_t panel) {
#if WIDEN_ONCE
    if (last - row > TILE_ROWS) {
        float sums[ROW_GROUP][PANEL];
        if (NARROW(job, panel))
            multiply_widened(bits, 1, job, height, row, last - row, panel, sums);
        else
            multiply_widened(bits, TILE_VECTORS, job, height, row, last - row, panel, sums);
        finish_floats(&job->out, sums[0], PANEL, NULL, first + row, (int)(last - row), panel * PANEL);
        return;
    }
#endif
    while (row < last) {
        float sums[TALL_ROWS][PANEL];
        int count = NAME(tile)(bits, last - row, job, height, row, panel, sums);
        finish_floats(&job->out, sums[0], PANEL, NULL, first + row, count, panel * PANEL);
        row += count;
    }
}

#if PAIRS_PANELS
/* One row and two panels: one has too few sums to keep the multipliers busy. */
INLINE void NAME(pair)(int bits, const NAME(job) *job, int64_t row, int64_t panel) {
    float sums[2][PANEL] = {{0}};
    NAME(multiply)(bits, 1, 2 * TILE_VECTORS, job, 1, 0, panel, 0, sums);
    finish_floats(&job->out, sums[0], PANEL, NULL, row, 1, panel * PANEL);
    finish_floats(&job->out, sums[1], PANEL, NULL, row, 1, (panel + 1) * PANEL);
}
#endif

/* The panels that this thread takes of the converted rows, `rows` of them, the first of which is number `first`. */
INLINE void NAME(take)(int bits, const NAME(job) *job, int64_t first, int64_t rows, int64_t round, int threads) {
    const int64_t panels = divide_up(job->out.n, PANEL);
    const int height = rows < TALL_ROWS ? (int)rows : TALL_ROWS;
#if PAIRS_PANELS
    if (rows == 1) {
        for (int64_t panel = tw_take(job->units, round, 2); panel < panels; panel = tw_take(job->units, round, 2))
            if (panel + 1 < panels)
                NAME(pair)(bits, job, first, panel);
            else
                NAME(unit)(bits, job, height, first, 0, 1, panel);
        return;
    }
#endif
    const int64_t row_groups = divide_up(rows, ROW_GROUP), units = panels * row_groups;
    const int64_t step = panels >= 8 * threads ? row_groups : 1; /* a panel stays in the cache of one core */
    for (int64_t taken = tw_take(job->units, round, step); taken < units; taken = tw_take(job->units, round, step))
        for (int64_t unit = taken; unit < taken + step; unit++) {
            const int64_t row = unit % row_groups * ROW_GROUP;
            NAME(unit)(bits, job, height, first, row, row + ROW_GROUP < rows ? row + ROW_GROUP : rows,
                       unit / row_groups);
        }
}

/* Rows `begin` to `end` of those that begin at `first`, `rows` of which are converted at a time. */
static void NAME(convert_rows)(const NAME(job) *job, int64_t first, int64_t rows, int64_t begin, int64_t end) {
    const int height = rows < TALL_ROWS ? (int)rows : TALL_ROWS;
    for (int64_t row = begin; row < end; row++) NAME(convert)(job, first + row, row, height);
}

INLINE void NAME(part)(int bits, const NAME(job) *job) {
    int number, threads;
    tw_team(&number, &threads);
    for (int64_t first = 0, round = 0; first < job->m; first += job->block, round++) {
        int64_t rows = job->m - first < job->block ? job->m - first : job->block, begin, end;
        tw_share(rows, &begin, &end);
        NAME(convert_rows)(job, first, rows, begin, end);
        if (!number) tw_refill(job->units, round);
        tw_barrier();
        NAME(take)(bits, job, first, rows, round, threads);
        if (first + job->block < job->m) tw_barrier(); /* the next block overwrites the rows */
    }
}

static void NAME(part4)(void *job) { NAME(part)(4, job); }
static void NAME(part8)(void *job) { NAME(part)(8, job); }
static void NAME(take4)(const NAME(job) *job, int threads) { NAME(take)(4, job, 0, job->m, 0, threads); }
static void NAME(take8)(const NAME(job) *job, int threads) { NAME(take)(8, job, 0, job->m, 0, threads); }

#undef NARROW
