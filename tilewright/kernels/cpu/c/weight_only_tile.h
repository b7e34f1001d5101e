/* One tile of a product of float activations and integer weights; included once for each kind of float that is multiplied
   (weight_only.c). ELEMENT: its type in memory; STEP: how many k one instruction multiplies. */

typedef struct {
    const uint8_t *packed;
    const float *scale;
    const uint8_t *zero; /* NULL for int8, and for 8 with AVX-512 */
    int64_t n, k, words, group_words, groups;
    const void *x;
    int dtype, compute;
    int64_t m, x_stride;
    output out;
    ELEMENT *rows;
    float *row_sums;
    int64_t block;
    tw_queue *units;
    int sharing;
    int64_t at_once, rows_bytes; /* rows that a thread takes BY_ROWS; bytes of all rows of one thread */
} NAME(job);

#ifndef MOST_SHORT
#define MOST_SHORT TALL_ROWS
#endif
/* So many of `rows` rows are interleaved. */
#define HEIGHT(rows) (int)((rows) <= MOST_SHORT ? (rows) : TALL_ROWS)

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

/* bits, rows, vectors and zeros, which is 0 where there are no zero points, are constants wherever this is called. Sums of `vectors` vectors of channels from `offset` on, of
   two panels where they are more than one has: then those of the second follow after `rows` sums; each group in segments,
   so that no chain of additions is long. */
#define AT_VECTOR(v, panel_step) at + (v) / TILE_VECTORS * (panel_step) + (v) % TILE_VECTORS * LANES
INLINE void NAME(multiply)(int bits, int zeros, int rows, int vectors, const NAME(job) *job, int height, int64_t row,
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
                zero[v] = zeros_at(zeros ? bits : 8, job->zero, AT_VECTOR(v, job->groups * PANEL));
#pragma GCC unroll 16
                for (int r = 0; r < rows; r++)
                    sum[r][v] = bits == 4 && zeros && NEEDS_ROW_SUMS && first == begin && job->zero
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
                        floats b = bits == 4 ? NAME(decode4)(from + v % TILE_VECTORS * LANES * 4, t, zero[v], zeros)
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
            NAME(multiply)(bits, 1, TALL_ROWS, TILE_VECTORS / 2, job, height, row, panel, offset, sums);
        return TALL_ROWS;
    }
#endif
#if defined(__AVX512F__)
    if (bits == 4 && !job->zero && count == 1 && !NARROW(job, panel)) { /* all of its time is widening */
        NAME(multiply)(bits, 0, 1, TILE_VECTORS, job, height, row, panel, 0, sums);
        return 1;
    }
#endif
    const int left = (int)(count < TILE_ROWS ? count : TILE_ROWS);
    switch (NARROW(job, panel) ? -left : left) {
#define CASE(rows)                                                                                                     \
    case rows: NAME(multiply)(bits, 1, rows, TILE_VECTORS, job, height, row, panel, 0, sums); return rows;             \
    case -rows: NAME(multiply)(bits, 1, rows, 1, job, height, row, panel, 0, sums); return rows;
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

#define NOINLINE static __attribute__((noinline)) /* one copy for all callers */
NOINLINE void NAME(unit4)(const NAME(job) *job, int height, int64_t first, int64_t row, int64_t last, int64_t panel) {
    NAME(unit)(4, job, height, first, row, last, panel);
}
NOINLINE void NAME(unit8)(const NAME(job) *job, int height, int64_t first, int64_t row, int64_t last, int64_t panel) {
    NAME(unit)(8, job, height, first, row, last, panel);
}

#if MOST_SHORT > TALL_ROWS
/* At most MOST_SHORT rows and half a panel, from `offset` on. */
INLINE void NAME(half)(int bits, const NAME(job) *job, int64_t first, int rows, int64_t panel, int offset) {
    float sums[MOST_SHORT][PANEL];
    memset(sums, 0, (size_t)rows * sizeof *sums);
    switch (rows) {
#define CASE(rows)                                                                                                     \
    case rows: NAME(multiply)(bits, 1, rows, TILE_VECTORS / 2, job, rows, 0, panel, offset, sums); break;
        UP_TO_6(CASE)
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
    }
    for (int r = 0; r < rows; r++)
        finish_floats(&job->out, sums[r] + offset, PANEL / 2, NULL, first + r, 1, panel * PANEL + offset);
}
#endif

#if MOST_SHORT > TALL_ROWS
NOINLINE void NAME(half4)(const NAME(job) *job, int64_t first, int rows, int64_t panel, int offset) {
    NAME(half)(4, job, first, rows, panel, offset);
}
NOINLINE void NAME(half8)(const NAME(job) *job, int64_t first, int rows, int64_t panel, int offset) {
    NAME(half)(8, job, first, rows, panel, offset);
}
#endif

#if PAIRS_PANELS
/* One row and two panels: one has too few sums to keep the multipliers busy. */
INLINE void NAME(pair)(int bits, const NAME(job) *job, int64_t row, int64_t panel) {
    float sums[2][PANEL] = {{0}};
    NAME(multiply)(bits, 1, 1, 2 * TILE_VECTORS, job, 1, 0, panel, 0, sums);
    finish_floats(&job->out, sums[0], PANEL, NULL, row, 1, panel * PANEL);
    finish_floats(&job->out, sums[1], PANEL, NULL, row, 1, (panel + 1) * PANEL);
}
#endif

/* The panels that this thread takes of the converted rows, `rows` of them, the first of which is number `first`. */
INLINE void NAME(take)(int bits, const NAME(job) *job, int64_t first, int64_t rows, int64_t round, int threads) {
    const int64_t panels = divide_up(job->out.n, PANEL);
    const int height = HEIGHT(rows);
#if MOST_SHORT > TALL_ROWS
    /* Fewer rows in halves where panels would be shared out unevenly; one or two of them would have too few sums. */
    if (rows > TALL_ROWS ? rows <= MOST_SHORT : rows > 2 && panels < 4 * threads && threads > 1) {
        const int64_t halves = divide_up(job->out.n, PANEL / 2);
        for (int64_t half = tw_take(job->units, round, 1); half < halves; half = tw_take(job->units, round, 1))
            (bits == 4 ? NAME(half4) : NAME(half8))(job, first, (int)rows, half / 2, (int)(half % 2) * (PANEL / 2));
        return;
    }
#endif
#if PAIRS_PANELS
    if (rows == 1) {
        for (int64_t panel = tw_take(job->units, round, 2); panel < panels; panel = tw_take(job->units, round, 2))
            if (panel + 1 < panels)
                NAME(pair)(bits, job, first, panel);
            else
                (bits == 4 ? NAME(unit4) : NAME(unit8))(job, height, first, 0, 1, panel);
        return;
    }
#endif
    const int64_t row_groups = divide_up(rows, ROW_GROUP), units = panels * row_groups;
    const int64_t step = panels >= 8 * threads ? row_groups : 1; /* a panel stays in the cache of one core */
    for (int64_t taken = tw_take(job->units, round, step); taken < units; taken = tw_take(job->units, round, step))
        for (int64_t unit = taken; unit < taken + step; unit++) {
            const int64_t row = unit % row_groups * ROW_GROUP;
            (bits == 4 ? NAME(unit4) : NAME(unit8))(job, height, first, row, row + ROW_GROUP < rows ? row + ROW_GROUP : rows,
                       unit / row_groups);
        }
}

/* Rows `begin` to `end` of those that begin at `first`, `rows` of which are converted at a time. */
static void NAME(convert_rows)(const NAME(job) *job, int64_t first, int64_t rows, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) NAME(convert)(job, first + row, row, HEIGHT(rows));
}

/* Rows that no other thread converts or reads. */
INLINE void NAME(part_by_rows)(int bits, const NAME(job) *job) {
    const int64_t panels = divide_up(job->out.n, PANEL), parts = divide_up(job->m, job->at_once);
    for (int64_t part = tw_take(job->units, 0, 1); part < parts; part = tw_take(job->units, 0, 1)) {
        const int64_t row = part * job->at_once, last = row + job->at_once < job->m ? row + job->at_once : job->m;
        NAME(convert_rows)(job, 0, job->m, row, last);
        for (int64_t panel = 0; panel < panels; panel++) (bits == 4 ? NAME(unit4) : NAME(unit8))(job, TALL_ROWS, 0, row, last, panel);
    }
}

INLINE void NAME(part)(int bits, const NAME(job) *job) {
    int number, threads;
    tw_team(&number, &threads);
    if (job->sharing == BY_ROWS) {
        NAME(part_by_rows)(bits, job);
        return;
    }
    if (job->sharing == ALL) {
        NAME(job) mine = *job;
        mine.rows += number * (job->rows_bytes / (int64_t)sizeof *job->rows);
        mine.row_sums += number * job->m * job->groups;
        NAME(convert_rows)(&mine, 0, job->m, 0, job->m);
        NAME(take)(bits, &mine, 0, job->m, 0, threads);
        return;
    }
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
#undef NOINLINE
#undef HEIGHT
