/* Products of float activations and integer weights by tiles of bfloat16 (AMX); included by weight_only.c.

   An integer of eight bits is exact in bfloat16. A float32 is not, but it is the sum of three: the upper eight bits of its
   24, the next, and the last. A float16 is the sum of two. So each activation is multiplied once, twice or three times, all
   products are exact, and sums are float32, as without tiles. What the split leaves below 2^-126 counts as zero: a number
   below 2^-102 loses its last bits.

   Weights are widened, (u - z) or w, for half a panel and some k at a time, and multiplied by many rows before the next
   are. Sums of a group, or of a part of it, are multiplied by its scale on their way from the tiles to the sums of y. */

enum {
    TILE_K = AMX_BYTES / 2,
    HALF = PANEL / 2,
    UNIT_ROWS = 2 * AMX_ROWS,
    GROUP_ROWS = 8 * UNIT_ROWS,
    CHUNK = 512,  /* k that are widened at a time */
    SEGMENT = 128, /* k of one chain of sums */
    AHEAD = 2      /* tiles of x that are fetched before their turn */
};

typedef struct {
    const uint8_t *packed;
    const float *scale;
    const uint8_t *zero; /* NULL for int8, and for 8 */
    int64_t k, words, group, groups;
    const void *x;
    int dtype, compute;
    int64_t m, x_stride;
    output out;
    uint16_t *rows; /* [row / 16][k / 32][term] tiles of 16 rows and 32 k */
    int64_t block;
    tw_queue *units;
    int sharing;
    int64_t at_once, rows_bytes; /* as in weight_only_tile.h */
} job_tiles;

static int terms_of(int compute) { return compute == BFLOAT16 ? 1 : compute == FLOAT16 ? 2 : 3; }

/* Few rows are multiplied without tiles, and so are groups that would end within one. */
static int takes_tiles(int64_t m, int64_t k, int64_t group) { return m > FEW_ROWS && (group >= k || group % TILE_K == 0); }

/* Where the first term of 16 rows and 32 k begins. */
INLINE uint16_t *tile_of(const job_tiles *job, int terms, int64_t row, int64_t k) {
    return job->rows + (row / AMX_ROWS * divide_up(job->k, TILE_K) + k / TILE_K) * terms * (AMX_TILE / 2);
}

/* Rows begin to end of the block that begins with row `first` of x, as their terms, with zeros up to a whole tile. */
INLINE void split_rows(int terms, const job_tiles *job, int64_t first, int64_t begin, int64_t end) {
    float part[PART] __attribute__((aligned(64)));
    for (int64_t row = begin; row < end; row++)
        for (int64_t at = 0; at < job->k; at += PART) {
            const int64_t count = job->k - at < PART ? job->k - at : PART, padded = divide_up(count, TILE_K) * TILE_K;
            uint16_t *to = tile_of(job, terms, row, at) + row % AMX_ROWS * TILE_K;
            convert_row_float(job->x, job->dtype, (first + row) * job->x_stride + at, count, job->compute, part);
            for (int64_t i = count; i < padded; i++) part[i] = 0;
            for (int64_t i = 0; i < padded; i += LANES) {
                __m512 left = _mm512_load_ps(part + i);
                /* 0x99: quiet NaN, +infinity, -infinity, signalling NaN */
                const __mmask16 finite = ~_mm512_fpclass_ps_mask(left, 0x99);
                uint16_t *terms_to = to + i / TILE_K * terms * (AMX_TILE / 2) + i % TILE_K;
                for (int term = 0; term < terms; term++, terms_to += AMX_TILE / 2) {
                    __m512i upper = _mm512_srli_epi32(_mm512_castps_si512(left), 16);
                    if (!term) /* a NaN whose bits are all in the lower half is none in the upper one */
                        upper = _mm512_mask_or_epi32(upper, _mm512_fpclass_ps_mask(left, 0x81), upper,
                                                     _mm512_set1_epi32(0x40));
                    _mm256_storeu_si256((__m256i *)terms_to, _mm512_cvtepi32_epi16(upper));
                    left = _mm512_maskz_sub_ps(finite, left, _mm512_castsi512_ps(_mm512_slli_epi32(upper, 16)));
                }
            }
        }
}

/* k from `first` on, up to CHUNK of them, of half a panel: for each 32 k two tiles of pairs of k and 16 channels. */
INLINE void widen_chunk(int bits, const job_tiles *job, int64_t panel, int offset, int64_t first, int64_t count,
                        uint8_t *tiles) {
    const int64_t word_bytes = PANEL * bits;
    const uint8_t *w = job->packed + panel * job->words * word_bytes + offset * (bits == 4 ? 4 : 1);
    for (int64_t k = first; k < first + count; k += TILE_K, tiles += 2 * AMX_TILE) {
        const int64_t at = (panel * job->groups + k / job->group) * PANEL + offset;
        for (int v = 0; v < 2; v++) {
            const floats zero = zeros_at(bits, job->zero, at + v * LANES);
            for (int i = 0; i < TILE_K / 8; i++) {
                const uint8_t *word = w + (k / 8 + i) * word_bytes + v * LANES * (bits == 4 ? 4 : 1);
                uint8_t *to = tiles + v * AMX_TILE + i * 4 * AMX_BYTES;
                if (k / 8 + i >= job->words) {
                    memset(to, 0, 4 * AMX_BYTES);
                    continue;
                }
#pragma GCC unroll 4
                for (int t = 0; t < 4; t++) {
                    floats pairs;
                    if (bits == 4) {
                        __m512i even = (__m512i)widen_nibbles(word, t, zero), odd = (__m512i)widen_nibbles(word, 4 + t, zero);
                        pairs = (floats)_mm512_or_si512(odd, _mm512_srli_epi32(even, 16));
                    } else {
                        pairs = decode8_pairs(word, t);
                    }
                    _mm512_store_ps(to + t * AMX_BYTES, pairs);
                }
            }
        }
    }
}

/* sums [32][HALF] += products [32][HALF] * scale */
INLINE void add_scaled(const float *products, const float *scale, int rows, float *sums) {
    const __m512 first = _mm512_loadu_ps(scale), second = _mm512_loadu_ps(scale + LANES);
    for (int r = 0; r < rows; r++, products += HALF, sums += HALF) {
        _mm512_store_ps(sums, _mm512_fmadd_ps(_mm512_load_ps(products), first, _mm512_load_ps(sums)));
        _mm512_store_ps(sums + LANES,
                        _mm512_fmadd_ps(_mm512_load_ps(products + LANES), second, _mm512_load_ps(sums + LANES)));
    }
}

INLINE void fetch_tile(const uint16_t *tile) {
    for (int i = 0; i < AMX_ROWS; i++) _mm_prefetch((const char *)tile + i * AMX_BYTES, _MM_HINT_T0);
}

/* Up to 32 rows by widened weights. The products of one segment are scaled while the tiles of the next are multiplied. */
INLINE void multiply_chunk(int tall, int terms, const job_tiles *job, int64_t row, int64_t panel, int offset,
                           int64_t first, int64_t count, const uint8_t *tiles, float *sums) {
    float products[2][UNIT_ROWS * HALF] __attribute__((aligned(64)));
    const uint16_t *x = tile_of(job, terms, row, first), *below = tile_of(job, terms, row + AMX_ROWS, first);
    const int rows = tall ? UNIT_ROWS : AMX_ROWS;
    const float *scale = NULL;
    int area = 0;
    for (int64_t k = first; k < first + count;) {
        const int64_t group = k / job->group;
        int64_t end = (group + 1) * job->group;
        if (end > k + SEGMENT) end = k + SEGMENT;
        if (end > first + count) end = first + count;
        _tile_zero(0);
        _tile_zero(1);
        if (tall) {
            _tile_zero(2);
            _tile_zero(3);
        }
        for (; k < end; k += TILE_K) {
            const uint8_t *w = tiles + (k - first) / TILE_K * 2 * AMX_TILE;
            _tile_loadd(6, w, AMX_BYTES);
            _tile_loadd(7, w + AMX_TILE, AMX_BYTES);
#pragma GCC unroll 3
            for (int term = 0; term < terms; term++) {
                _tile_loadd(4, x, AMX_BYTES);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                fetch_tile(x + AHEAD * (AMX_TILE / 2));
                x += AMX_TILE / 2;
                if (tall) {
                    _tile_loadd(5, below, AMX_BYTES);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                    fetch_tile(below + AHEAD * (AMX_TILE / 2));
                    below += AMX_TILE / 2;
                }
            }
        }
        if (scale) add_scaled(products[area ^ 1], scale, rows, sums);
        float *to = products[area];
        _tile_stored(0, to, HALF * 4);
        _tile_stored(1, to + AMX_CHANNELS, HALF * 4);
        if (tall) {
            _tile_stored(2, to + AMX_ROWS * HALF, HALF * 4);
            _tile_stored(3, to + AMX_ROWS * HALF + AMX_CHANNELS, HALF * 4);
        }
        AMX_WRITTEN();
        scale = job->scale + (panel * job->groups + group) * PANEL + offset;
        area ^= 1;
    }
    add_scaled(products[area ^ 1], scale, rows, sums);
}

INLINE void multiply_rows_by_half(int bits, int terms, const job_tiles *job, int64_t first_row, int64_t row, int64_t rows,
                                  int64_t panel, int offset) {
    float sums[GROUP_ROWS][HALF] __attribute__((aligned(64)));
    uint8_t tiles[CHUNK / TILE_K * 2 * AMX_TILE] __attribute__((aligned(64)));
    memset(sums, 0, (size_t)divide_up(rows, AMX_ROWS) * AMX_ROWS * sizeof *sums);
    for (int64_t first = 0; first < job->k; first += CHUNK) {
        const int64_t count = job->k - first < CHUNK ? divide_up(job->k - first, TILE_K) * TILE_K : CHUNK;
        widen_chunk(bits, job, panel, offset, first, count, tiles);
        AMX_WRITTEN();
        for (int64_t i = 0; i < rows; i += UNIT_ROWS) {
            if (rows - i > AMX_ROWS)
                multiply_chunk(1, terms, job, row + i, panel, offset, first, count, tiles, sums[i]);
            else
                multiply_chunk(0, terms, job, row + i, panel, offset, first, count, tiles, sums[i]);
        }
    }
    finish_floats(&job->out, sums[0], HALF, NULL, first_row + row, (int)rows, panel * PANEL + offset);
}

/* The half panels that this thread takes of the split rows, `rows` of them, the first of which is number `first`. */
INLINE void take_tiles(int bits, int terms, const job_tiles *job, int64_t first, int64_t rows, int64_t round) {
    const int64_t halves = divide_up(job->out.n, HALF), row_groups = divide_up(rows, GROUP_ROWS), units = halves * row_groups;
    for (int64_t unit = tw_take(job->units, round, 1); unit < units; unit = tw_take(job->units, round, 1)) {
        const int64_t row = unit % row_groups * GROUP_ROWS, left = rows - row, half = unit / row_groups;
        multiply_rows_by_half(bits, terms, job, first, row, left < GROUP_ROWS ? left : GROUP_ROWS, half / 2,
                              (int)(half % 2) * HALF);
    }
}

/* Rows that no other thread splits or reads. */
INLINE void part_tiles_by_rows(int bits, int terms, const job_tiles *job) {
    const int64_t halves = divide_up(job->out.n, HALF), parts = divide_up(job->m, job->at_once);
    for (int64_t part = tw_take(job->units, 0, 1); part < parts; part = tw_take(job->units, 0, 1)) {
        const int64_t begin = part * job->at_once, end = begin + job->at_once < job->m ? begin + job->at_once : job->m;
        split_rows(terms, job, 0, begin, end);
        for (int64_t row = begin; row < end; row += GROUP_ROWS)
            for (int64_t half = 0; half < halves; half++)
                multiply_rows_by_half(bits, terms, job, 0, row, end - row < GROUP_ROWS ? end - row : GROUP_ROWS, half / 2,
                                      (int)(half % 2) * HALF);
    }
}

INLINE void part_tiles(int bits, int terms, const job_tiles *job) {
    int number, threads;
    tw_team(&number, &threads);
    amx_begin();
    if (job->sharing == BY_ROWS) {
        part_tiles_by_rows(bits, terms, job);
        amx_end();
        return;
    }
    if (job->sharing == ALL) {
        job_tiles mine = *job;
        mine.rows += number * (job->rows_bytes / (int64_t)sizeof *job->rows);
        split_rows(terms, &mine, 0, 0, job->m);
        take_tiles(bits, terms, &mine, 0, job->m, 0);
        amx_end();
        return;
    }
    for (int64_t first = 0, round = 0; first < job->m; first += job->block, round++) {
        const int64_t rows = job->m - first < job->block ? job->m - first : job->block;
        int64_t begin, end;
        tw_share(rows, &begin, &end);
        if (!number) tw_refill(job->units, round);
        split_rows(terms, job, first, begin, end);
        tw_barrier();
        take_tiles(bits, terms, job, first, rows, round);
        if (first + job->block < job->m) tw_barrier(); /* the next block overwrites the rows */
    }
    amx_end();
}

/* Of all rows, as a step of a program. */
INLINE void step_tiles(int bits, int terms, const job_tiles *job) {
    amx_begin();
    take_tiles(bits, terms, job, 0, job->m, 0);
    amx_end();
}

#define DEFINE_PART(bits, terms)                                                                                       \
    static void part##bits##_tiles##terms(void *job) { part_tiles(bits, terms, job); }                                 \
    static void step##bits##_tiles##terms(const job_tiles *job) { step_tiles(bits, terms, job); }
#define DEFINE_SPLIT(terms)                                                                                            \
    static void split##terms(const job_tiles *job, int64_t begin, int64_t end) { split_rows(terms, job, 0, begin, end); }
DEFINE_PART(4, 1)
DEFINE_PART(4, 2)
DEFINE_PART(4, 3)
DEFINE_PART(8, 1)
DEFINE_PART(8, 2)
DEFINE_PART(8, 3)
DEFINE_SPLIT(1)
DEFINE_SPLIT(2)
DEFINE_SPLIT(3)
#undef DEFINE_PART
#undef DEFINE_SPLIT
