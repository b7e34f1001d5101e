/* From the sums of a tile of an int8 convolution to its results. Part of conv_int8.c. */

INLINE vec scaled(const int32_t *sums, vec scale, vec bias) { return v_add(v_mul(i_to_float(i_load(sums)), scale), bias); }

#ifdef __AVX512F__
/* A step of `finish_two_vectors`: sums of two pixels to int8, and how it is done where that is doubtful. */
INLINE void finish_pairs(const int epilogue, const bounds *limits, const tw_step *s, const quick_scale q[2], vec doubt,
                         const int32_t *first, const int32_t *second, const float *scale, const float *bias, int64_t pixel,
                         int64_t other, int64_t channel) {
    vec v[4] = {v_fma(i_to_float(i_load(first)), q[0].factor, q[0].offset),
                v_fma(i_to_float(i_load(first + LANES)), q[1].factor, q[1].offset),
                v_fma(i_to_float(i_load(second)), q[0].factor, q[0].offset),
                v_fma(i_to_float(i_load(second + LANES)), q[1].factor, q[1].offset)};
    if (epilogue == ADD_TO_INT8)
        for (int i = 0; i < 4; i++) {
            const int64_t at = (i < 2 ? pixel : other) * s->r_stride + channel + i % 2 * LANES;
            v[i] = v_fma(v_load_int8((const int8_t *)s->residual + at, LANES), limits->r_factor, v[i]);
        }
    int8_t *y = (int8_t *)s->y + channel;
    __m512i bytes;
    if (__builtin_expect(quick_bytes(limits, v, doubt, &bytes), 1)) {
        store_pairs(bytes, y + pixel * s->y_stride, y + other * s->y_stride);
        return;
    }
    for (int i = 0; i < 4; i++) {
        const int64_t at = i < 2 ? pixel : other, vector = i % 2 * LANES;
        const vec exact = scaled((i < 2 ? first : second) + vector, v_load(scale + vector), v_load(bias + vector));
        store_quotient(limits, y + at * s->y_stride + vector,
                       add_residual(epilogue, limits, s, exact, at * s->r_stride + channel + vector));
    }
}

/* Of pixels with two whole vectors of an int8 result, two pixels at once. `stride`: sums from one pixel to the next. */
INLINE void finish_two_vectors(const int epilogue, const bounds *limits, const tw_step *s, int valid, const int32_t *sums,
                               int64_t stride, const float *scale, const float *bias, int64_t pixel, int64_t channel) {
    const quick_scale q[2] = {quick_scale_of(limits, v_load(scale), v_load(bias)),
                              quick_scale_of(limits, v_load(scale + LANES), v_load(bias + LANES))};
    const vec doubt = doubt_of(limits, v_max(q[0].error, q[1].error));
    for (int m = 0; m < valid; m += 2) {
        const int other = m + 1 < valid ? m + 1 : m;
        finish_pairs(epilogue, limits, s, q, doubt, sums + m * stride, sums + other * stride, scale, bias, pixel + m,
                     pixel + other, channel);
    }
}

/* Likewise by a curve. */
INLINE void finish_two_curves(const int activation, const bounds *limits, const tw_step *s, int valid,
                              const int32_t *sums, int64_t stride, const float *scale, const float *bias, int64_t pixel,
                              int64_t channel) {
    const vec scale0 = v_load(scale), scale1 = v_load(scale + LANES), bias0 = v_load(bias), bias1 = v_load(bias + LANES);
    for (int m = 0; m < valid; m += 2) {
        const int other = m + 1 < valid ? m + 1 : m;
        const int32_t *first = sums + m * stride, *second = sums + other * stride;
        const vec v[4] = {scaled(first, scale0, bias0), scaled(first + LANES, scale1, bias1),
                          scaled(second, scale0, bias0), scaled(second + LANES, scale1, bias1)};
        finish_curves(activation, limits, s, v, pixel + m, pixel + other, channel);
    }
}
#endif

/* Rolled loops: unrolled into every tile, the epilogue would be most of the code. */
static void finish_tile(const bounds *limits, const tw_step *s, int valid, int vectors, const int32_t *sums, int64_t pixel, int64_t group,
                        int64_t begin) {
    const int64_t group_out = s->out_channels / s->groups, all = (group_out + LANES - 1) / LANES;
    const int epilogue = epilogue_of(s);
    for (int v = 0; v < vectors; v++, sums += LANES) {
        const int64_t at = (begin + v) * LANES, left = group_out - at, channel = group * group_out + at;
        const float *scale_at = s->scale + group * all * LANES + at, *bias_at = s->bias + group * all * LANES + at;
#ifdef __AVX512F__
        const int64_t stride = vectors * LANES;
        const int curved = curve_of(s), pairs = epilogue == TO_INT8 || epilogue == ADD_TO_INT8 || curved >= 0;
        if (v + 1 < vectors && left >= 2 * LANES && pairs) {
            if (curved == SILU)
                finish_two_curves(SILU, limits, s, valid, sums, stride, scale_at, bias_at, pixel, channel);
            else if (curved == HARDSWISH)
                finish_two_curves(HARDSWISH, limits, s, valid, sums, stride, scale_at, bias_at, pixel, channel);
            else if (epilogue == TO_INT8)
                finish_two_vectors(TO_INT8, limits, s, valid, sums, stride, scale_at, bias_at, pixel, channel);
            else
                finish_two_vectors(ADD_TO_INT8, limits, s, valid, sums, stride, scale_at, bias_at, pixel, channel);
            v++, sums += LANES;
            continue;
        }
#endif
        const vec scale = v_load(scale_at), bias = v_load(bias_at);
        if (left < LANES) {
            for (int m = 0; m < valid; m++)
                finish(s, scaled(sums + m * vectors * LANES, scale, bias), pixel + m, channel, (int)left);
            continue;
        }
        WITH_EPILOGUE(epilogue, {
            for (int m = 0; m < valid; m++)
                finish_as(EPILOGUE, limits, s, scaled(sums + m * vectors * LANES, scale, bias), pixel + m, channel);
        })
    }
}
