/* int8 convolution with four products an instruction (AVX512-VNNI): tiles of pixels and output channels, and depthwise.

   The instruction multiplies unsigned by signed. Activations get their top bit flipped, which adds 128; the sums start
   from -128 times the sum of their weights (`compensation`). Padding reads 128, so every window has the same. */
#include "conv_vector.h"

#ifdef __AVX512VNNI__
typedef int8_t element;
#define K_STEP 4

static inline int most_rows(int vectors) { return vectors == 3 ? 8 : 12; }
static void tile(const tw_step *s, int valid, int vectors, const element *const *pointers, int64_t windows,
                 int64_t length, const element *weight, int64_t pixel, int64_t group, int64_t vector);
#include "conv_tile.h"

static inline __m512i flip_of(const tw_step *s) { return _mm512_set1_epi8(s->x_type == INT8 ? -128 : 0); }

INLINE void tile_of(const int rows, const int vectors, int valid, const element *const *pointers, int64_t windows,
                    int64_t length, const element *weight, __m512i flip, const int32_t *start, int32_t *out) {
    __m512i sum[12][3]; /* no array of variable length: the compiler would keep it in memory */
#pragma GCC unroll 3
    for (int v = 0; v < vectors; v++) {
        const __m512i from = _mm512_loadu_si512(start + v * LANES);
#pragma GCC unroll 16
        for (int m = 0; m < rows; m++) sum[m][v] = from;
    }
    for (int64_t w = 0; w < windows; w++) {
        const int8_t *x[12];
#pragma GCC unroll 16
        for (int m = 0; m < rows; m++) x[m] = pointers[(m < valid ? m : valid - 1) * windows + w];
        for (int64_t k = 0; k < length; k += 4) {
            __m512i b[3];
#pragma GCC unroll 3
            for (int v = 0; v < vectors; v++) b[v] = _mm512_loadu_si512(weight + v * 64);
            weight += vectors * 64;
#pragma GCC unroll 16
            for (int m = 0; m < rows; m++) {
                int32_t four;
                memcpy(&four, x[m] + k, 4);
                __m512i a = _mm512_xor_si512(_mm512_set1_epi32(four), flip);
#pragma GCC unroll 3
                for (int v = 0; v < vectors; v++) sum[m][v] = _mm512_dpbusd_epi32(sum[m][v], a, b[v]);
            }
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) _mm512_store_si512(out + (m * vectors + v) * LANES, sum[m][v]);
}

/* Rolled loops: unrolled into every tile, the epilogue would be most of the code. */
static void finish_tile(const tw_step *s, int valid, int vectors, const int32_t *sums, int64_t pixel, int64_t group,
                        int64_t vector) {
    const int64_t group_out = s->out_channels / s->groups, all = (group_out + LANES - 1) / LANES;
    const bounds limits = bounds_of(s);
    for (int v = 0; v < vectors; v++, sums += LANES) {
        const int64_t at = (vector + v) * LANES, left = group_out - at, channel = group * group_out + at;
        const vec scale = v_load(s->scale + group * all * LANES + at), bias = v_load(s->bias + group * all * LANES + at);
        if (left < LANES) {
            for (int m = 0; m < valid; m++) {
                const vec sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums + m * vectors * LANES));
                finish(s, v_add(v_mul(sum, scale), bias), pixel + m, channel, (int)left);
            }
            continue;
        }
        WITH_EPILOGUE(epilogue_of(s), {
            for (int m = 0; m < valid; m++) {
                const vec sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums + m * vectors * LANES));
                finish_as(EPILOGUE, &limits, s, v_add(v_mul(sum, scale), bias), pixel + m, channel);
            }
        })
    }
}

#define TILE(rows, vectors)                                                                                            \
    static void __attribute__((noinline)) tile_##rows##_##vectors(                                                     \
        int valid, const element *const *pointers, int64_t windows, int64_t length, const element *weight, __m512i flip, const int32_t *start, \
        int32_t *out) { \
        tile_of(rows, vectors, valid, pointers, windows, length, weight, flip, start, out); \
    }
#define CALL(rows, vectors) tile_##rows##_##vectors(valid, pointers, windows, length, weight, flip, start, out)
TILE(1, 1)
TILE(4, 1)
TILE(8, 1)
TILE(12, 1)
TILE(1, 2)
TILE(2, 2)
TILE(4, 2)
TILE(6, 2)
TILE(8, 2)
TILE(10, 2)
TILE(12, 2)
TILE(1, 3)
TILE(2, 3)
TILE(4, 3)
TILE(6, 3)
TILE(8, 3)

static void tile(const tw_step *s, int valid, int vectors, const element *const *pointers, int64_t windows,
                 int64_t length, const element *weight, int64_t pixel, int64_t group, int64_t vector) {
    _Alignas(64) int32_t out[12 * 3 * LANES];
    const int64_t all = (s->out_channels / s->groups + LANES - 1) / LANES;
    const int32_t *start = s->compensation ? s->compensation + (group * all + vector) * LANES : (const int32_t *)tw_zeros;
    const __m512i flip = flip_of(s);
    if (vectors == 1) {
        if (valid == 1) CALL(1, 1);
        else if (valid <= 4) CALL(4, 1);
        else if (valid <= 8) CALL(8, 1);
        else CALL(12, 1);
    } else if (vectors == 2) {
        if (valid == 1) CALL(1, 2);
        else if (valid == 2) CALL(2, 2);
        else if (valid <= 4) CALL(4, 2);
        else if (valid <= 6) CALL(6, 2);
        else if (valid <= 8) CALL(8, 2);
        else if (valid <= 10) CALL(10, 2);
        else CALL(12, 2);
    } else {
        if (valid == 1) CALL(1, 3);
        else if (valid == 2) CALL(2, 3);
        else if (valid <= 4) CALL(4, 3);
        else if (valid <= 6) CALL(6, 3);
        else CALL(8, 3);
    }
    finish_tile(s, valid, vectors, out, pixel, group, vector);
}

void JOIN(tw_int8_conv, TILEWRIGHT_ISA)(const tw_step *s, int number, int count) { convolve_part(s, number, count); }

/* ---- depthwise: the bytes of four taps are interleaved, so that one instruction adds four taps of 16 channels */
#define MOST_TAPS 128

/* [16 channels of four vectors, four lanes each] -> [four vectors of 16 channels in order]: a transposition of lanes. */
INLINE void in_order(__m512i sum[4]) {
    __m512i a = _mm512_shuffle_i32x4(sum[0], sum[1], 0x44), b = _mm512_shuffle_i32x4(sum[0], sum[1], 0xee);
    __m512i c = _mm512_shuffle_i32x4(sum[2], sum[3], 0x44), d = _mm512_shuffle_i32x4(sum[2], sum[3], 0xee);
    sum[0] = _mm512_shuffle_i32x4(a, c, 0x88);
    sum[1] = _mm512_shuffle_i32x4(a, c, 0xdd);
    sum[2] = _mm512_shuffle_i32x4(b, d, 0x88);
    sum[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
}

/* `taps` is a multiple of 4. The weight of 64 channels is [taps / 4][4 vectors][16 channels][4 taps]. */
INLINE void depthwise_pixel(const int epilogue, const tw_step *s, const int8_t *const *pointers, const int taps,
                            int64_t pixel, __m512i flip, const bounds *limits) {
    const int8_t *weight = s->weight;
    for (int64_t channel = 0; channel < s->channels; channel += 64, weight += taps * 64) {
        const int64_t left = s->channels - channel;
        const __mmask64 mask = left >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << left) - 1;
        __m512i sum[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(),
                          _mm512_setzero_si512()};
#pragma GCC unroll 3
        for (int t = 0; t < taps; t += 4) {
            __m512i x[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++)
                x[i] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, pointers[t + i] + channel), flip);
            __m512i a = _mm512_unpacklo_epi8(x[0], x[1]), b = _mm512_unpackhi_epi8(x[0], x[1]);
            __m512i c = _mm512_unpacklo_epi8(x[2], x[3]), d = _mm512_unpackhi_epi8(x[2], x[3]);
            const int8_t *w = weight + t * 64;
            sum[0] = _mm512_dpbusd_epi32(sum[0], _mm512_unpacklo_epi16(a, c), _mm512_loadu_si512(w));
            sum[1] = _mm512_dpbusd_epi32(sum[1], _mm512_unpackhi_epi16(a, c), _mm512_loadu_si512(w + 64));
            sum[2] = _mm512_dpbusd_epi32(sum[2], _mm512_unpacklo_epi16(b, d), _mm512_loadu_si512(w + 128));
            sum[3] = _mm512_dpbusd_epi32(sum[3], _mm512_unpackhi_epi16(b, d), _mm512_loadu_si512(w + 192));
        }
        in_order(sum);
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) {
            const int64_t at = channel + v * LANES, n = s->channels - at;
            if (n <= 0) break;
            if (s->compensation) sum[v] = _mm512_add_epi32(sum[v], _mm512_loadu_si512(s->compensation + at));
            vec y = v_add(v_mul(_mm512_cvtepi32_ps(sum[v]), v_load(s->scale + at)), v_load(s->bias + at));
            if (n >= LANES) finish_as(epilogue, limits, s, y, pixel, at);
            else finish(s, y, pixel, at, (int)n);
        }
    }
}

void JOIN(tw_int8_depthwise, TILEWRIGHT_ISA)(const tw_step *s, int number, int count) {
    const int8_t *outside = s->x_type == UINT8 ? (const int8_t *)tw_offset_zeros : (const int8_t *)tw_zeros;
    const int taps = (int)round_up(s->kernel_height * s->kernel_width, 4);
    const __m512i flip = flip_of(s);
    const int8_t *pointers[MOST_TAPS];
    for (int t = 0; t < MOST_TAPS; t++) pointers[t] = outside;
    const bounds limits = bounds_of(s);
    const int epilogue = epilogue_of(s);
    int64_t begin, end;
    share_of(s->batch * s->out_height, number, count, &begin, &end);
    for (int64_t row = begin; row < end; row++) {
        const int64_t image = row / s->out_height, p = row % s->out_height;
        const int64_t top = p * s->stride_height - s->top, reach = (s->kernel_width - 1) * s->dilation_width;
        const int inside = top >= 0 && top + (s->kernel_height - 1) * s->dilation_height < s->height;
        int moved = 0; /* whether the pointers are those of the pixel before, all inside */
        for (int64_t q = 0; q < s->out_width; q++) {
            const int64_t left = q * s->stride_width - s->left, pixel = row * s->out_width + q;
            const int whole = inside && left >= 0 && left + reach < s->width;
            int t = 0;
            if (whole && moved) {
                const int64_t step = s->stride_width * s->x_stride, real = s->kernel_height * s->kernel_width;
                for (; t < real; t++) pointers[t] += step;
            } else {
                for (int64_t i = 0; i < s->kernel_height; i++)
                    for (int64_t j = 0; j < s->kernel_width; j++, t++) {
                        const int8_t *x = tap_pixel(s, image, p, q, i, j);
                        pointers[t] = x ? x : outside;
                    }
            }
            moved = whole;
            if (taps == 12 && epilogue == TO_INT8) depthwise_pixel(TO_INT8, s, pointers, 12, pixel, flip, &limits);
            else if (epilogue == TO_INT8) depthwise_pixel(TO_INT8, s, pointers, taps, pixel, flip, &limits);
            else depthwise_pixel(ANY, s, pointers, taps, pixel, flip, &limits);
        }
    }
}
#else
void JOIN(tw_int8_conv, TILEWRIGHT_ISA)(const tw_step *s, int number, int count) { (void)s, (void)number, (void)count; }
void JOIN(tw_int8_depthwise, TILEWRIGHT_ISA)(const tw_step *s, int number, int count) {
    (void)s, (void)number, (void)count;
}
#endif
