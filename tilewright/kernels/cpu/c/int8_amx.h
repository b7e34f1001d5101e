/* Products of quantised rows and int8 weights by tiles (AMX), and what follows them; included by int8_linear.c.

   The processor multiplies tiles and computes with vectors at once, so a product's sums wait until the tiles of the next
   product are multiplied, and are scaled, activated and cast meanwhile. */

/* Sums that wait for what follows the product. Two areas, since the next product needs one. */
enum { HALF = PANEL / 2 };
typedef struct unfinished unfinished;
struct unfinished {
    int32_t sums[2][ROW_GROUP][HALF] __attribute__((aligned(64)));
    int area; /* of the next product */
    const int32_t *next;
    const float *scale;
    int64_t at, channel, left;
    __mmask16 mask[2];
    void (*finish)(const linear_job *job, unfinished *wait, int64_t rows);
};

/* Asks for half a panel of a row of y, and of the residual, that is finished soon. Rows are far apart, so that the processor
   foresees none of these lines, and stores would wait for them one after the other. */
enum { ROWS_AHEAD = 8 };
static inline __attribute__((always_inline)) void prefetch_row(const output *out, int64_t at, int wide) {
    const int64_t element = wide ? 4 : 2;
    for (int64_t i = 0; i < HALF * element; i += 64) {
        __builtin_prefetch((const char *)out->y + at * element + i, 1);
        if (out->residual) __builtin_prefetch((const char *)out->residual + at * element + i);
    }
}

/* Finishes so many rows of what waits. `usual`, a constant, says that y is float32 and 32 channels are there. */
static inline __attribute__((always_inline)) void finish_rows(const linear_job *job, int usual, int activation,
                                                              unfinished *wait, int64_t rows) {
    output out = job->out;
    out.activation = activation;
    if (usual) out.dtype = FLOAT32;
    const int32_t *sums = wait->next;
    const int64_t at = wait->at, channel = wait->channel;
    __mmask16 mask[2];
    __m512 weight_scale[2], bias[2];
    __m512i correction[2];
    for (int v = 0; v < 2; v++) {
        mask[v] = usual ? 0xffff : wait->mask[v];
        correction[v] = _mm512_loadu_si512(job->correction + channel + v * LANES);
        weight_scale[v] = _mm512_maskz_loadu_ps(mask[v], job->weight_scale + channel + v * LANES);
        /* Adding -0 changes nothing. */
        bias[v] = out.bias ? _mm512_maskz_loadu_ps(mask[v], out.bias + channel + v * LANES) : _mm512_set1_ps(-0.0f);
    }
    for (int64_t r = 0; r < rows; r++, sums += HALF) {
        const __m512 row_scale = _mm512_set1_ps(wait->scale[r]);
        prefetch_row(&out, at + (r + ROWS_AHEAD) * out.n, out.dtype == FLOAT32);
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) {
            const __m512i sum = _mm512_sub_epi32(_mm512_load_si512(sums + v * LANES), correction[v]);
            __m512 y = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum), row_scale), weight_scale[v]);
            finish_vector(&out, _mm512_add_ps(y, bias[v]), at + r * out.n + v * LANES, mask[v]);
        }
    }
    wait->next = sums;
    wait->scale += rows;
    wait->at = at + rows * out.n;
    wait->left -= rows;
}

typedef void (*finish_function)(const linear_job *job, unfinished *wait, int64_t rows);
static void finish_usual(const linear_job *job, unfinished *wait, int64_t rows) {
    finish_rows(job, 1, NONE, wait, rows);
}
static void finish_gelu(const linear_job *job, unfinished *wait, int64_t rows) {
    finish_rows(job, 1, GELU, wait, rows);
}
static void finish_any(const linear_job *job, unfinished *wait, int64_t rows) {
    finish_rows(job, 0, job->out.activation, wait, rows);
}
static finish_function finish_for(const output *out, int64_t channel) {
    if (out->dtype != FLOAT32 || channel + HALF > out->n) return finish_any;
    return out->activation == NONE ? finish_usual : out->activation == GELU ? finish_gelu : finish_any;
}

/* Sums of 16 or 32 rows and half a panel, over `blocks` blocks of 64 k, on top of those that are there unless `fresh`.
   After each block, `rows` rows of what waits are finished. */
static inline __attribute__((always_inline)) void add_blocks(int tall, int fresh, const uint8_t *x,
                                                             int64_t x_stride, const int8_t *panel, int64_t blocks,
                                                             int32_t *sums, const linear_job *job, unfinished *wait,
                                                             int64_t rows) {
    const int64_t row = HALF * 4;
    int32_t *below = sums + AMX_ROWS * HALF;
    if (fresh) {
        _tile_zero(0);
        _tile_zero(1);
        if (tall) {
            _tile_zero(2);
            _tile_zero(3);
        }
    } else {
        _tile_loadd(0, sums, row);
        _tile_loadd(1, sums + AMX_CHANNELS, row);
        if (tall) {
            _tile_loadd(2, below, row);
            _tile_loadd(3, below + AMX_CHANNELS, row);
        }
    }
    for (int64_t b = 0; b < blocks; b++, x += AMX_BYTES, panel += K_STEP * PANEL) {
        _tile_loadd(6, panel, AMX_BYTES);
        _tile_loadd(4, x, x_stride);
        _tile_dpbusd(0, 4, 6);
        _tile_loadd(7, panel + AMX_TILE, AMX_BYTES);
        _tile_dpbusd(1, 4, 7);
        if (tall) {
            _tile_loadd(5, x + AMX_ROWS * x_stride, x_stride);
            _tile_dpbusd(2, 5, 6);
            _tile_dpbusd(3, 5, 7);
        }
        if (wait->left) wait->finish(job, wait, rows < wait->left ? rows : wait->left);
    }
    _tile_stored(0, sums, row);
    _tile_stored(1, sums + AMX_CHANNELS, row);
    if (tall) {
        _tile_stored(2, below, row);
        _tile_stored(3, below + AMX_CHANNELS, row);
    }
}

static void multiply_half(const linear_job *job, const uint8_t *q, int64_t rows, const int8_t *panel, unfinished *wait) {
    enum { CACHED_BLOCKS = 8 };
    const int64_t blocks = round_up(job->k, K_STEP) / K_STEP, tiles = round_up(rows, 2 * AMX_ROWS) / (2 * AMX_ROWS);
    const int64_t each = (wait->left + blocks * tiles - 1) / (blocks * tiles);
    for (int64_t first = 0; first < blocks; first += CACHED_BLOCKS) {
        const int64_t count = blocks - first < CACHED_BLOCKS ? blocks - first : CACHED_BLOCKS;
        const int8_t *w = panel + first * K_STEP * PANEL;
        for (int64_t i = 0; i < rows; i += 2 * AMX_ROWS) {
            const uint8_t *x = q + i * job->q_stride + first * K_STEP;
            int32_t *sums = wait->sums[wait->area][i];
            if (rows - i > AMX_ROWS)
                add_blocks(1, !first, x, job->q_stride, w, count, sums, job, wait, each);
            else
                add_blocks(0, !first, x, job->q_stride, w, count, sums, job, wait, each);
        }
    }
}

/* Up to ROW_GROUP rows, of which the sums then wait. Half a panel of so many k stays in the first-level cache while the
   rows pass. */
static void multiply_tiles(const linear_job *job, const uint8_t *q, const float *scale, int64_t row, int64_t rows,
                           int64_t first_channel, unfinished *wait) {
    const int8_t *panel = job->packed + first_channel * round_up(job->k, K_STEP);
    AMX_WRITTEN();
    for (int64_t channel = first_channel; channel < first_channel + PANEL && channel < job->out.n;
         channel += HALF, panel += HALF * K_STEP) {
        multiply_half(job, q, rows, panel, wait);
        const int64_t channels = job->out.n - channel;
        wait->next = wait->sums[wait->area][0];
        wait->scale = scale;
        wait->at = row * job->out.n + channel;
        wait->channel = channel;
        wait->left = rows;
        wait->mask[0] = first_channels(channels);
        wait->mask[1] = first_channels(channels < LANES ? 0 : channels - LANES);
        wait->finish = finish_for(&job->out, channel);
        wait->area ^= 1;
    }
}

static void begin_waiting(unfinished *wait) { wait->area = 0, wait->left = 0; }
static void finish_rest(const linear_job *job, unfinished *wait) {
    if (wait->left) wait->finish(job, wait, wait->left);
}
