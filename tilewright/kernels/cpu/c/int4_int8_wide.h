/* W4A8 tiles for many rows where there is no VNNI: the nibbles of one segment of a panel are spread to bytes once for all
   rows of a group, and stay in the first-level cache. The sums are exact, as those of nibbles.h. */

enum { WIDE_ROWS = 6, SEGMENT_WORDS = 16, FULL_WORDS = 4 };

/* What one segment holds: of each word first the low nibbles of all channels, then the high ones. */
typedef struct {
    uint8_t half[2 * SEGMENT_WORDS][PANEL * 4] __attribute__((aligned(64)));
} segment;

INLINE void spread_nibbles(const uint8_t *panel, int64_t words, segment *wide) {
    const __m256i mask = _mm256_set1_epi8(15);
    for (int64_t word = 0; word < words; word++)
#pragma GCC unroll 4
        for (int v = 0; v < TILE_VECTORS; v++) {
            const __m256i w = _mm256_loadu_si256((const __m256i *)(panel + (word * PANEL + v * LANES) * 4));
            _mm256_store_si256((__m256i *)wide->half[2 * word] + v, _mm256_and_si256(w, mask));
            _mm256_store_si256((__m256i *)wide->half[2 * word + 1] + v,
                               _mm256_and_si256(_mm256_srli_epi16(w, 4), mask));
        }
}

/* Adds the products of `halves` half words to 32-bit sums in memory, or puts them there if `fresh`. At most twice
   FULL_WORDS, so that the 16-bit sums in registers cannot saturate (nibbles.h). `rows` is a constant wherever this is
   called, and `halves` is where there are that many: then all unrolls. */
INLINE void add_halves(int rows, int halves, const int8_t *x, int64_t x_stride, const uint8_t *w, int fresh,
                       vector totals[][TILE_VECTORS]) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i part[WIDE_ROWS][TILE_VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < TILE_VECTORS; v++) part[r][v] = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int i = 0; i < halves; i++) {
        __m256i b[TILE_VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < TILE_VECTORS; v++) b[v] = _mm256_load_si256((const __m256i *)(w + i * PANEL * 4) + v);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const __m256i a = broadcast4((const uint8_t *)x + r * x_stride + i * 4);
#pragma GCC unroll 8
            for (int v = 0; v < TILE_VECTORS; v++) {
                part[r][v] = _mm256_add_epi16(part[r][v], _mm256_maddubs_epi16(b[v], a));
                KEEP_IN_REGISTER(part[r][v]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < TILE_VECTORS; v++) {
            const __m256i sum = _mm256_madd_epi16(part[r][v], ones);
            totals[r][v] = fresh ? sum : _mm256_add_epi32(totals[r][v], sum);
        }
}

INLINE void add_segment_rows(int rows, const int8_t *x, int64_t x_stride, const segment *wide, int64_t words, int fresh,
                             vector totals[][TILE_VECTORS]) {
    const uint8_t *w = wide->half[0];
    for (; words >= FULL_WORDS; words -= FULL_WORDS, x += 8 * FULL_WORDS, w += 2 * FULL_WORDS * PANEL * 4, fresh = 0)
        add_halves(rows, 2 * FULL_WORDS, x, x_stride, w, fresh, totals);
    if (words) add_halves(rows, (int)(2 * words), x, x_stride, w, fresh, totals);
}

static __attribute__((noinline)) void add_segment(int rows, const int8_t *x, int64_t x_stride, const segment *wide,
                                                  int64_t words, int fresh, vector totals[][TILE_VECTORS]) {
    switch (rows) {
#define CASE(count)                                                                                                    \
    case count: add_segment_rows(count, x, x_stride, wide, words, fresh, totals); return;
        UP_TO_6(CASE)
#undef CASE
    }
}

/* Sums of `rows` rows, at most ROW_GROUP, and one panel. */
static void multiply_many(const int4_job *job, int64_t row, int rows, int64_t panel, float sums[][PANEL]) {
    const int8_t *x = job->q + row * job->q_stride;
    const int32_t *q_sums = job->q_sums + row * job->groups;
    const uint8_t *w = job->packed + panel * job->words * PANEL * 4;
    vector totals[ROW_GROUP][TILE_VECTORS];
    segment wide;
    memset(sums, 0, (size_t)rows * sizeof *sums);
    for (int64_t group = 0; group < job->groups; group++) {
        const int64_t begin = group * job->group_words, at = (panel * job->groups + group) * PANEL;
        const int64_t end = begin + job->group_words < job->words ? begin + job->group_words : job->words;
        for (int64_t first = begin; first < end; first += SEGMENT_WORDS) {
            const int64_t words = end - first < SEGMENT_WORDS ? end - first : SEGMENT_WORDS;
            spread_nibbles(w + first * PANEL * 4, words, &wide);
            for (int i = 0; i < rows; i += WIDE_ROWS)
                add_segment(rows - i < WIDE_ROWS ? rows - i : WIDE_ROWS, x + i * job->q_stride + first * 8, job->q_stride,
                            &wide, words, first == begin, totals + i);
        }
#pragma GCC unroll 8
        for (int v = 0; v < TILE_VECTORS; v++) {
            const vector zero = load_zeros(job->zero + at + v * LANES);
            const floats scale = load_floats(job->scale + at + v * LANES);
            for (int r = 0; r < rows; r++) {
                float *to = sums[r] + v * LANES;
                store_floats(to, scale_sums(totals[r][v], zero, q_sums[r * job->groups + group], scale, load_floats(to)));
            }
        }
    }
}
