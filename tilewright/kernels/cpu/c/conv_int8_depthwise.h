/* int8 depthwise convolution of 3 x 3; included by conv_int8.c.

   64 channels at a time, along one row of results or two rows that lie below each other. The bytes of a column of the
   window are interleaved once, for every result that reads them: of four rows, where two rows of results share three
   columns of four. Sums stay in the order of the interleaved bytes, which packing them to bytes undoes. */
enum { COLUMN_CHANNELS = 4 * LANES };

/* What is the same along a row, of 64 channels from `channel` on. */
typedef struct {
    const tw_step *s;
    const int8_t *row[4], *outside; /* of the image, or `outside` */
    int64_t step[4];                /* from one column to the next: 0 outside */
    const int8_t *weight;           /* of the first row of results; of the second they follow */
    quick_scale quick[4];
    vec doubt;
    vector start[4];
    int64_t channel;
    __mmask64 mask;
} depthwise_row;

/* The interleaved bytes of `column`, of 3 rows or 4. */
INLINE void read_column(const int rows, const depthwise_row *d, int64_t column, vector flip, vector bytes[4]) {
    const int inside = column >= 0 && column < d->s->width;
    vector x[4];
#pragma GCC unroll 4
    for (int r = 0; r < rows + 2; r++)
        x[r] = i_xor(_mm512_maskz_loadu_epi8(d->mask, inside ? d->row[r] + column * d->step[r] : d->outside), flip);
    if (rows == 1) x[3] = x[2]; /* times zeros */
    const vector a = I_UNPACK(lo, 8, x[0], x[1]), b = I_UNPACK(hi, 8, x[0], x[1]);
    const vector c = I_UNPACK(lo, 8, x[2], x[3]), e = I_UNPACK(hi, 8, x[2], x[3]);
    bytes[0] = I_UNPACK(lo, 16, a, c);
    bytes[1] = I_UNPACK(hi, 16, a, c);
    bytes[2] = I_UNPACK(lo, 16, b, e);
    bytes[3] = I_UNPACK(hi, 16, b, e);
}

/* All that follows the sums of one pixel. */
INLINE void finish_column(const int epilogue, const depthwise_row *d, const bounds *limits, vector sum[4], int64_t pixel) {
    const tw_step *s = d->s;
    if (epilogue == TO_INT8) {
        vec v[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) v[i] = v_fma(i_to_float(sum[i]), d->quick[i].factor, d->quick[i].offset);
        __m512i bytes;
        if (__builtin_expect(quick_bytes(limits, v, d->doubt, &bytes), 1)) {
            _mm512_mask_storeu_epi8((int8_t *)s->y + pixel * s->y_stride + d->channel, d->mask, bytes);
            return;
        }
    }
    in_order(sum);
    for (int v = 0; v < 4; v++) {
        const int64_t at = d->channel + v * LANES, left = s->channels - at;
        if (left <= 0) break;
        const vec y = v_add(v_mul(i_to_float(sum[v]), v_load(s->scale + at)), v_load(s->bias + at));
        finish(s, y, pixel, at, left < LANES ? (int)left : LANES);
    }
}

/* One row of results from `pixel` on, or, if `rows` is 2, two. */
INLINE void depthwise_along(const int rows, const int epilogue, const depthwise_row *d, const bounds *limits,
                            int64_t pixel) {
    const tw_step *s = d->s;
    const vector flip = flip_of(s);
    vector column[3][4];
    for (int i = 0; i < 12; i++) column[i / 4][i % 4] = vector_zero(); /* for compilers that cannot tell */
    /* Columns that the next result reads, too. */
    const int kept = s->dilation_width > 1 || s->stride_width > 2 ? 0 : 3 - (int)s->stride_width;
    for (int64_t q = 0; q < s->out_width; q++) {
        const int64_t left = q * s->stride_width - s->left;
        if (q && kept == 2) {
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++) column[0][v] = column[1][v], column[1][v] = column[2][v];
        } else {
            if (q && kept == 1) {
#pragma GCC unroll 4
                for (int v = 0; v < 4; v++) column[0][v] = column[2][v];
            } else {
                read_column(rows, d, left, flip, column[0]);
            }
            read_column(rows, d, left + s->dilation_width, flip, column[1]);
        }
        read_column(rows, d, left + 2 * s->dilation_width, flip, column[2]);
#pragma GCC unroll 2
        for (int r = 0; r < rows; r++) {
            vector sum[4] = {d->start[0], d->start[1], d->start[2], d->start[3]};
#pragma GCC unroll 3
            for (int j = 0; j < 3; j++)
#pragma GCC unroll 4
                for (int v = 0; v < 4; v++)
                    sum[v] = dot4(sum[v], column[j][v], load_weights(d->weight + (12 * r + 4 * j + v) * 4 * LANES));
            finish_column(epilogue, d, limits, sum, pixel + r * s->out_width + q);
        }
    }
}

/* One row of results, number p of an image, or two. */
static void depthwise_rows(const tw_step *s, int rows, int64_t image, int64_t p, const bounds *limits) {
    const int to_int8 = epilogue_of(s) == TO_INT8;
    const int64_t top = p * s->stride_height - s->top, pixel = (image * s->out_height + p) * s->out_width;
    _Alignas(64) int8_t weight[2 * 12 * 4 * LANES];
    for (int64_t channel = 0; channel < s->channels; channel += COLUMN_CHANNELS) {
        const int64_t left = s->channels - channel;
        depthwise_row d = {.s = s, .outside = (const int8_t *)s->outside + channel, .weight = weight, .channel = channel};
        d.mask = left < COLUMN_CHANNELS ? ((__mmask64)1 << left) - 1 : ~(__mmask64)0;
        for (int r = 0; r < rows + 2; r++) {
            const int64_t y = top + r * s->dilation_height;
            const int inside = y >= 0 && y < s->height;
            const int8_t *x = (const int8_t *)s->x + channel;
            d.row[r] = inside ? x + (image * s->height + y) * s->width * s->x_stride : d.outside;
            d.step[r] = inside ? s->x_stride : 0;
        }
        for (int i = 0; i < 12; i++) {
            const vector w = i_load((const int8_t *)s->weight + channel * 12 + i * 4 * LANES);
            vector_store((int32_t *)(weight + i * 4 * LANES), w);
            /* The taps of the second row of results lie one row lower. */
            vector_store((int32_t *)(weight + (12 + i) * 4 * LANES), _mm512_slli_epi32(w, 8));
        }
        vector scale[4], bias[4];
        for (int v = 0; v < 4; v++) {
            const int there = v * LANES < left;
            scale[v] = there ? i_load(s->scale + channel + v * LANES) : vector_zero();
            bias[v] = there ? i_load(s->bias + channel + v * LANES) : vector_zero();
            d.start[v] = there && s->compensation ? i_load(s->compensation + channel + v * LANES) : vector_zero();
        }
        /* A transposition, which is its own inverse. */
        in_order(scale);
        in_order(bias);
        in_order(d.start);
        vec error = v_zero();
        for (int v = 0; v < 4; v++) {
            d.quick[v] = quick_scale_of(limits, _mm512_castsi512_ps(scale[v]), _mm512_castsi512_ps(bias[v]));
            error = v_max(d.quick[v].error, error);
        }
        d.doubt = doubt_of(limits, error);
        if (rows == 2 && to_int8) depthwise_along(2, TO_INT8, &d, limits, pixel);
        else if (rows == 2) depthwise_along(2, ANY, &d, limits, pixel);
        else if (to_int8) depthwise_along(1, TO_INT8, &d, limits, pixel);
        else depthwise_along(1, ANY, &d, limits, pixel);
    }
}

static void depthwise_by_columns(const tw_step *s, int number, int count) {
    const int shared = s->stride_height == 1 && s->dilation_height == 1; /* three of four rows */
    const int64_t units = shared ? (s->out_height + 1) / 2 : s->out_height;
    const bounds limits = bounds_of(s);
    int64_t begin, end;
    share_of(s->batch * units, number, count, &begin, &end);
    for (int64_t unit = begin; unit < end; unit++) {
        const int64_t image = unit / units, p = unit % units * (shared ? 2 : 1);
        depthwise_rows(s, shared && p + 1 < s->out_height ? 2 : 1, image, p, &limits);
    }
}
