/* W4A8 products of many rows by tiles (AMX); included by int4_int8_linear.c.

   The nibbles of one group of a panel are spread to bytes once for up to ROW_GROUP rows, their zero points taken off: what
   tiles then add is P itself. Where a group ends within a tile its other steps are zeros, and what stands in the rows of
   x beside them counts for nothing. */

enum { SEGMENT_BLOCKS = 4, SEGMENT_WORDS = SEGMENT_BLOCKS * AMX_BYTES / 8, HALF = PANEL / 2, TILED = 2 * AMX_ROWS };

/* Of each block of 64 k the tiles of all channels, one after the other. */
typedef struct {
    int8_t tile[SEGMENT_BLOCKS][TILE_VECTORS][AMX_ROWS][AMX_BYTES] __attribute__((aligned(64)));
} segment;

/* Sums of TILED rows and half a panel. */
typedef struct {
    int32_t sum[TILED][HALF] __attribute__((aligned(64)));
} tiled_sums;

/* zero: zero points of the group, one for each channel. */
INLINE void spread_nibbles(const uint8_t *panel, const uint8_t *zero, int64_t words, segment *wide) {
    const __m512i mask = _mm512_set1_epi8(15);
    __m512i z[TILE_VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < TILE_VECTORS; v++)
        z[v] = _mm512_mullo_epi32(load_zeros(zero + v * LANES), _mm512_set1_epi32(0x01010101));
    int64_t word = 0;
    for (; word < words; word++, panel += PANEL * 4)
#pragma GCC unroll 4
        for (int v = 0; v < TILE_VECTORS; v++) {
            const __m512i w = _mm512_loadu_si512(panel + v * LANES * 4);
            int8_t(*to)[AMX_BYTES] = wide->tile[word / 8][v] + word % 8 * 2;
            _mm512_store_si512(to[0], _mm512_sub_epi8(_mm512_and_si512(w, mask), z[v]));
            _mm512_store_si512(to[1], _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(w, 4), mask), z[v]));
        }
    for (; word % 8; word++)
        for (int v = 0; v < TILE_VECTORS; v++) memset(wide->tile[word / 8][v][word % 8 * 2], 0, 2 * AMX_BYTES);
}

/* Sums of 16 or 32 rows and half a panel, on top of those that are there unless `fresh`. below: where the second 16 rows
   begin. */
INLINE void add_tiles(int tall, int fresh, const int8_t *x, const int8_t *below, int64_t x_stride, const segment *wide,
                      int first, int64_t blocks, tiled_sums *sums) {
    const int64_t stride = HALF * 4;
    int32_t *const sum = sums->sum[0], *const second = sums->sum[AMX_ROWS];
    if (fresh) {
        _tile_zero(0);
        _tile_zero(1);
        if (tall) {
            _tile_zero(2);
            _tile_zero(3);
        }
    } else {
        _tile_loadd(0, sum, stride);
        _tile_loadd(1, sum + LANES, stride);
        if (tall) {
            _tile_loadd(2, second, stride);
            _tile_loadd(3, second + LANES, stride);
        }
    }
    for (int64_t b = 0; b < blocks; b++) {
        _tile_loadd(6, wide->tile[b][first], AMX_BYTES);
        _tile_loadd(4, x + b * AMX_BYTES, x_stride);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(7, wide->tile[b][first + 1], AMX_BYTES);
        _tile_dpbssd(1, 4, 7);
        if (tall) {
            _tile_loadd(5, below + b * AMX_BYTES, x_stride);
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        }
    }
    _tile_stored(0, sum, stride);
    _tile_stored(1, sum + LANES, stride);
    if (tall) {
        _tile_stored(2, second, stride);
        _tile_stored(3, second + LANES, stride);
    }
}

/* What a product leaves for later, so that tiles are multiplied meanwhile: its sums times the scales of their group are to
   be added to the results. */
typedef struct {
    const tiled_sums *from;
    const float *scale;
    float (*to)[PANEL];
    int rows, again; /* again: so many rows of the second 16 belong to the first, too */
} unscaled;

INLINE void scale_rows(const int32_t (*from)[HALF], const float *scale, float (*to)[PANEL], int rows) {
    const __m512 left = _mm512_loadu_ps(scale), right = _mm512_loadu_ps(scale + LANES);
    for (int r = 0; r < rows; r++) {
        float *y = to[r];
        const __m512 a = _mm512_cvtepi32_ps(_mm512_load_si512(from[r])), b = _mm512_cvtepi32_ps(_mm512_load_si512(from[r] + LANES));
        _mm512_storeu_ps(y, _mm512_fmadd_ps(a, left, _mm512_loadu_ps(y)));
        _mm512_storeu_ps(y + LANES, _mm512_fmadd_ps(b, right, _mm512_loadu_ps(y + LANES)));
    }
}

static void scale_waiting(unscaled *wait) {
    if (!wait->rows) return;
    const int upper = wait->rows < AMX_ROWS ? wait->rows : AMX_ROWS;
    scale_rows(wait->from->sum, wait->scale, wait->to, upper);
    scale_rows(wait->from->sum + AMX_ROWS + wait->again, wait->scale, wait->to + upper, wait->rows - upper);
    wait->rows = 0;
}

/* Asks for what is written when the product is done: lines of so many rows that the processor foresees none of them. */
static void prefetch_results(const output *out, int64_t row, int rows, int64_t channel) {
    const int64_t element = out->dtype == FLOAT32 ? 4 : 2;
    for (int r = 0; r < rows; r++) {
        const char *y = (const char *)out->y + ((row + r) * out->n + channel) * element;
        for (int64_t i = 0; i < PANEL * element; i += 64) __builtin_prefetch(y + i, 1);
    }
}

/* Sums of AMX_ROWS to ROW_GROUP rows and one panel. The last 16 rows are a tile, some of which the one before may have
   done already: no row is read that is not there. */
static void multiply_many(const int4_job *job, int64_t row, int rows, int64_t panel, float sums[][PANEL]) {
    const int64_t stride = job->q_stride;
    const int8_t *x = job->q + row * stride;
    const uint8_t *w = job->packed + panel * job->words * PANEL * 4;
    tiled_sums totals[ROW_GROUP / TILED][2];
    segment wide;
    unscaled wait = {.rows = 0};
    int turn = 0;
    memset(sums, 0, (size_t)rows * sizeof *sums);
    for (int64_t group = 0; group < job->groups; group++) {
        const int64_t begin = group * job->group_words, at = (panel * job->groups + group) * PANEL;
        const int64_t end = begin + job->group_words < job->words ? begin + job->group_words : job->words;
        const int alone = end - begin <= SEGMENT_WORDS; /* then two areas are enough, and stay in the cache */
        for (int64_t first = begin; first < end; first += SEGMENT_WORDS) {
            const int64_t words = end - first < SEGMENT_WORDS ? end - first : SEGMENT_WORDS, blocks = divide_up(words, 8);
            const int last = first + words == end;
            spread_nibbles(w + first * PANEL * 4, job->zero + at, words, &wide);
            AMX_WRITTEN();
            for (int i = 0; i < rows; i += TILED) {
                const int left = rows - i < TILED ? rows - i : TILED, tall = left > AMX_ROWS;
                const int from = left < AMX_ROWS ? rows - AMX_ROWS : i, below = i + left - AMX_ROWS;
                const int8_t *upper = x + from * stride + first * 8, *lower = x + below * stride + first * 8;
                for (int half = 0; half < 2; half++) {
                    tiled_sums *to = alone ? &totals[0][turn ^= 1] : &totals[i / TILED][half];
                    if (tall)
                        add_tiles(1, first == begin, upper, lower, stride, &wide, 2 * half, blocks, to);
                    else
                        add_tiles(0, first == begin, upper, lower, stride, &wide, 2 * half, blocks, to);
                    AMX_WRITTEN();
                    scale_waiting(&wait);
                    if (!last) continue;
                    wait.from = to;
                    wait.scale = job->scale + at + half * HALF;
                    wait.to = (float (*)[PANEL])(sums[i] + half * HALF);
                    wait.rows = left;
                    wait.again = tall ? TILED - left : 0;
                    if (left < AMX_ROWS) wait.from = (const tiled_sums *)to->sum[AMX_ROWS - left];
                }
            }
        }
        if (!alone) scale_waiting(&wait);
    }
    scale_waiting(&wait);
}
