/* int8 convolution with four products an instruction, or what stands for it (simd.h): tiles of pixels and output channels,
   and depthwise.

   Unsigned is multiplied by signed. Activations get their top bit flipped, which adds 128; the sums start from -(128 + the
   zero point) times the sum of their weights (`compensation`). Padding reads the zero point, so every window has the
   same. */
#include "simd.h" /* first: vector.h makes a macro of LANES */

#include "conv_vector.h"

#ifdef __AVX2__
typedef int8_t element;
#define K_STEP 4

#if defined(__AVX512VNNI__)
enum { MOST_ROWS = 12, MOST_ROWS_OF_THREE = 8 };
INLINE vector i_load(const void *p) { return _mm512_loadu_si512(p); }
INLINE vector i_load_first(const void *p, int64_t n) {
    return n >= 64 ? i_load(p) : _mm512_maskz_loadu_epi8(((__mmask64)1 << n) - 1, p);
}
INLINE vector i_add(vector a, vector b) { return _mm512_add_epi32(a, b); }
INLINE vector i_xor(vector a, vector b) { return _mm512_xor_si512(a, b); }
INLINE vector i_set_bytes(char value) { return _mm512_set1_epi8(value); }
INLINE vec i_to_float(vector v) { return _mm512_cvtepi32_ps(v); }
#define I_UNPACK(half, bits, a, b) _mm512_unpack##half##_epi##bits(a, b)
#else
#if WIDEN_INTEGERS
enum { MOST_ROWS = 6, MOST_ROWS_OF_THREE = 3 };
#else
enum { MOST_ROWS = 4, MOST_ROWS_OF_THREE = 2 };
#endif
INLINE vector i_load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE vector i_load_first(const void *p, int64_t n) {
    if (n >= 32) return i_load(p);
    int8_t bytes[32] = {0};
    memcpy(bytes, p, (size_t)n);
    return i_load(bytes);
}
INLINE vector i_add(vector a, vector b) { return _mm256_add_epi32(a, b); }
INLINE vector i_xor(vector a, vector b) { return _mm256_xor_si256(a, b); }
INLINE vector i_set_bytes(char value) { return _mm256_set1_epi8(value); }
INLINE vec i_to_float(vector v) { return _mm256_cvtepi32_ps(v); }
#define I_UNPACK(half, bits, a, b) _mm256_unpack##half##_epi##bits(a, b)
#endif

/* How far ahead weights are asked for: those of the next block of channels may lie in memory still. */
#define PREFETCH_BYTES 8192

static inline int most_rows(int vectors) { return vectors == 3 ? MOST_ROWS_OF_THREE : MOST_ROWS; }
static void tile(const tw_step *s, int valid, int vectors, const element *const *pointers, int64_t windows,
                 int64_t length, const element *weight, int64_t pixel, int64_t group, int64_t begin);

static inline vector flip_of(const tw_step *s) { return i_set_bytes(s->x_type == INT8 ? -128 : 0); }

/* Windows are copied before they are multiplied: to 16 bits, or with their top bit flipped, which would be done for each
   vector of output channels otherwise and take half as long as the products. */
#define COPY_WINDOWS
#if WIDEN_INTEGERS
enum { COPIED_BYTES = 192 << 10, ELEMENT_BYTES = 2 }; /* half of a small second-level cache; one of the deepest fits */
static inline int copies_windows(const tw_step *s) { return s != NULL; }
#else
enum { COPIED_BYTES = 400 << 10, ELEMENT_BYTES = 1 };
static inline int copies_windows(const tw_step *s) { return s->x_type == INT8; }
#endif

/* Pixels whose windows are copied together. */
static int64_t most_pixels(int64_t depth) {
    const int64_t most = COPIED_BYTES / (ELEMENT_BYTES * depth);
    return most < 1 ? 1 : most;
}

/* Copies the windows of `count` pixels side by side, and puts into `pointers`, instead of those to its windows, one for each
   pixel. */
static void copy_windows(const tw_step *s, const element **pointers, int64_t count, int64_t windows, int64_t length) {
#if WIDEN_INTEGERS
    const int flip = s->x_type == INT8 ? 128 : 0;
#else
    const vector flip = flip_of(s);
#endif
    int8_t *to = (int8_t *)tw_scratch;
    for (int64_t i = 0; i < count; i++) {
        const element *row = to;
        for (int64_t w = 0; w < windows; w++, to += ELEMENT_BYTES * length) {
            const element *x = pointers[i * windows + w];
#if WIDEN_INTEGERS
            widen_activations((const uint8_t *)x, length, flip, (int16_t *)to);
#else
            /* What is written behind a window is overwritten by the next. */
            for (int64_t k = 0; k < length; k += 4 * LANES)
                vector_store((int32_t *)(to + k), i_xor(i_load_first(x + k, length - k), flip));
#endif
        }
        pointers[i] = row;
    }
}

#if WIDEN_INTEGERS
/* One window, widened. */
INLINE void add_window(const int rows, const int vectors, const element *const *x, int64_t length, const element *weight,
                       vector sum[MOST_ROWS][3]) {
    for (int64_t k = 0; k < length; k += 4, weight += vectors * LANES * 4)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            vector b[3];
#pragma GCC unroll 3
            for (int v = 0; v < vectors; v++) {
                const weights w = load_weights(weight + v * LANES * 4);
                b[v] = half ? w.odd : w.even;
            }
#pragma GCC unroll 16
            for (int m = 0; m < rows; m++) {
                const vector a = broadcast4((const uint8_t *)x[m] + 2 * k + 4 * half);
#pragma GCC unroll 3
                for (int v = 0; v < vectors; v++) sum[m][v] = add_pairs(sum[m][v], a, b[v]);
            }
        }
}
#else
INLINE void add_window(const int rows, const int vectors, const element *const *x, int64_t length, const element *weight,
                       vector sum[MOST_ROWS][3]) {
    for (int64_t k = 0; k < length; k += 4, weight += vectors * LANES * 4) {
        weights b[3];
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) {
            b[v] = load_weights(weight + v * LANES * 4);
            __builtin_prefetch(weight + v * LANES * 4 + PREFETCH_BYTES);
        }
#pragma GCC unroll 16
        for (int m = 0; m < rows; m++) {
            const activations a = broadcast_activations((const uint8_t *)x[m] + k);
#pragma GCC unroll 3
            for (int v = 0; v < vectors; v++) sum[m][v] = dot4(sum[m][v], a, b[v]);
        }
    }
}
#endif
#include "conv_tile.h"

INLINE void tile_of(const int rows, const int vectors, int valid, const element *const *pointers, int64_t windows,
                    int64_t length, const element *weight, const int32_t *start, int32_t *out) {
    vector sum[MOST_ROWS][3]; /* no array of variable length: the compiler would keep it in memory */
#pragma GCC unroll 3
    for (int v = 0; v < vectors; v++) {
        const vector from = i_load(start + v * LANES);
#pragma GCC unroll 16
        for (int m = 0; m < rows; m++) sum[m][v] = from;
    }
    for (int64_t w = 0; w < windows; w++) {
        const int8_t *x[MOST_ROWS];
#pragma GCC unroll 16
        for (int m = 0; m < rows; m++) x[m] = pointers[(m < valid ? m : valid - 1) * windows + w];
        add_window(rows, vectors, x, length, weight, sum);
        weight += length * vectors * LANES;
    }
#pragma GCC unroll 16
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) vector_store(out + (m * vectors + v) * LANES, sum[m][v]);
}

#include "conv_int8_finish.h"

/* A tile reads and writes a few lines of each of its pixels, which no prefetcher of a processor foresees. Asked for before
   the sums, they are there after them. */
static void prefetch_results(const tw_step *s, int64_t valid, int64_t pixel, int64_t channel) {
    if (s->y_type != FLOAT32) {
        const char *y = (const char *)s->y + pixel * s->y_stride + channel;
        for (int64_t m = 0; m < valid; m++) __builtin_prefetch(y + m * s->y_stride, 1);
    }
    if (s->residual && s->r_type != FLOAT32) {
        const char *residual = (const char *)s->residual + pixel * s->r_stride + channel;
        for (int64_t m = 0; m < valid; m++) __builtin_prefetch(residual + m * s->r_stride);
    }
}

#define TILE(rows, vectors)                                                                                            \
    static void __attribute__((noinline)) tile_##rows##_##vectors(                                                     \
        int valid, const element *const *pointers, int64_t windows, int64_t length, const element *weight, const int32_t *start, \
        int32_t *out) { \
        tile_of(rows, vectors, valid, pointers, windows, length, weight, start, out); \
    }
#define CALL(rows, vectors) tile_##rows##_##vectors(valid, pointers, windows, length, weight, start, out)
TILE(1, 1)
TILE(1, 2)
TILE(2, 2)
TILE(4, 2)
TILE(1, 3)
TILE(2, 3)
#if defined(__AVX512VNNI__)
TILE(4, 1)
TILE(8, 1)
TILE(12, 1)
TILE(6, 2)
TILE(8, 2)
TILE(10, 2)
TILE(12, 2)
TILE(4, 3)
TILE(6, 3)
TILE(8, 3)
#else
TILE(2, 1)
TILE(4, 1)
TILE(3, 2)
#if WIDEN_INTEGERS
TILE(6, 1)
TILE(5, 2)
TILE(6, 2)
TILE(3, 3)
#endif
#endif

static void tile(const tw_step *s, int valid, int vectors, const element *const *pointers, int64_t windows,
                 int64_t length, const element *weight, int64_t pixel, int64_t group, int64_t begin) {
    _Alignas(64) int32_t out[MOST_ROWS * 3 * LANES];
    const int64_t all = (s->out_channels / s->groups + LANES - 1) / LANES;
    const int32_t *start = s->compensation ? s->compensation + (group * all + begin) * LANES : (const int32_t *)tw_zeros;
    prefetch_results(s, valid, pixel, group * (s->out_channels / s->groups) + begin * LANES);
#if defined(__AVX512VNNI__)
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
#else
    if (vectors == 1) {
        if (valid == 1) CALL(1, 1);
        else if (valid == 2) CALL(2, 1);
        else if (valid <= 4) CALL(4, 1);
#if WIDEN_INTEGERS
        else CALL(6, 1);
#endif
    } else if (vectors == 2) {
        if (valid == 1) CALL(1, 2);
        else if (valid == 2) CALL(2, 2);
        else if (valid == 3) CALL(3, 2);
        else if (valid == 4) CALL(4, 2);
#if WIDEN_INTEGERS
        else if (valid == 5) CALL(5, 2);
        else CALL(6, 2);
#endif
    } else {
        if (valid == 1) CALL(1, 3);
        else if (valid == 2) CALL(2, 3);
#if WIDEN_INTEGERS
        else CALL(3, 3);
#endif
    }
#endif
    const bounds limits = bounds_of(s);
    finish_tile(&limits, s, valid, vectors, out, pixel, group, begin);
}

#ifdef __AMX_INT8__
#include "conv_int8_amx.h"
#endif

void JOIN(tw_int8_conv, TILEWRIGHT_ISA)(const tw_step *s, int number, int count) {
#ifdef __AMX_INT8__
    if (takes_tiles(s)) {
        convolve_by_tiles(s, number, count);
        return;
    }
#endif
    convolve_part(s, number, count);
}

/* ---- depthwise: the bytes of four taps are interleaved, so that one instruction adds four taps of 16 channels */
#define MOST_TAPS 128

/* Four vectors, whose lanes of 128 bits hold four channels each, to four vectors of channels in order: a transposition of
   lanes. */
#if defined(__AVX512VNNI__)
INLINE void in_order(vector sum[4]) {
    vector a = _mm512_shuffle_i32x4(sum[0], sum[1], 0x44), b = _mm512_shuffle_i32x4(sum[0], sum[1], 0xee);
    vector c = _mm512_shuffle_i32x4(sum[2], sum[3], 0x44), d = _mm512_shuffle_i32x4(sum[2], sum[3], 0xee);
    sum[0] = _mm512_shuffle_i32x4(a, c, 0x88);
    sum[1] = _mm512_shuffle_i32x4(a, c, 0xdd);
    sum[2] = _mm512_shuffle_i32x4(b, d, 0x88);
    sum[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
}
#else
INLINE void in_order(vector sum[4]) {
    vector a = _mm256_permute2x128_si256(sum[0], sum[1], 0x20), b = _mm256_permute2x128_si256(sum[2], sum[3], 0x20);
    vector c = _mm256_permute2x128_si256(sum[0], sum[1], 0x31), d = _mm256_permute2x128_si256(sum[2], sum[3], 0x31);
    sum[0] = a, sum[1] = b, sum[2] = c, sum[3] = d;
}
#endif

/* Windows of 3 x 3 are taken column by column, each with a fourth tap of zeros; others row by row, with zeros at the end. */
static inline int by_columns(const tw_step *s) { return s->kernel_height == 3 && s->kernel_width == 3; }

/* `taps` is a multiple of 4. The weight of four vectors of channels is [taps / 4][4 vectors][LANES channels][4 taps]. */
INLINE void depthwise_pixel(const int epilogue, const tw_step *s, const int8_t *const *pointers, const int taps,
                            int64_t pixel, vector flip, const bounds *limits) {
    enum { CHANNELS = 4 * LANES };
    const int8_t *weight = s->weight;
    for (int64_t channel = 0; channel < s->channels; channel += CHANNELS, weight += taps * CHANNELS) {
        const int64_t left = s->channels - channel;
        vector sum[4] = {vector_zero(), vector_zero(), vector_zero(), vector_zero()};
#pragma GCC unroll 3
        for (int t = 0; t < taps; t += 4) {
            vector x[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) x[i] = i_xor(i_load_first(pointers[t + i] + channel, left), flip);
            const vector a = I_UNPACK(lo, 8, x[0], x[1]), b = I_UNPACK(hi, 8, x[0], x[1]);
            const vector c = I_UNPACK(lo, 8, x[2], x[3]), d = I_UNPACK(hi, 8, x[2], x[3]);
            const int8_t *w = weight + t * CHANNELS;
            sum[0] = dot4(sum[0], as_activations(I_UNPACK(lo, 16, a, c)), load_weights(w));
            sum[1] = dot4(sum[1], as_activations(I_UNPACK(hi, 16, a, c)), load_weights(w + CHANNELS));
            sum[2] = dot4(sum[2], as_activations(I_UNPACK(lo, 16, b, d)), load_weights(w + 2 * CHANNELS));
            sum[3] = dot4(sum[3], as_activations(I_UNPACK(hi, 16, b, d)), load_weights(w + 3 * CHANNELS));
        }
        in_order(sum);
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) {
            const int64_t at = channel + v * LANES, n = s->channels - at;
            if (n <= 0) break;
            if (s->compensation) sum[v] = i_add(sum[v], i_load(s->compensation + at));
            vec y = v_add(v_mul(i_to_float(sum[v]), v_load(s->scale + at)), v_load(s->bias + at));
            if (n >= LANES) finish_as(epilogue, limits, s, y, pixel, at);
            else finish(s, y, pixel, at, (int)n);
        }
    }
}

#ifdef __AVX512VNNI__
#include "conv_int8_depthwise.h"
#endif

void JOIN(tw_int8_depthwise, TILEWRIGHT_ISA)(const tw_step *s, int number, int count) {
#ifdef __AVX512VNNI__
    if (by_columns(s)) {
        depthwise_by_columns(s, number, count);
        return;
    }
#endif
    const int8_t *outside = s->outside;
    const int taps = (int)round_up(s->kernel_height * s->kernel_width, 4), columns = by_columns(s);
    const vector flip = flip_of(s);
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
            for (int64_t i = 0; i < s->kernel_height; i++)
                for (int64_t j = 0; j < s->kernel_width; j++) {
                    const int8_t **pointer = pointers + (columns ? 4 * j + i : i * s->kernel_width + j);
                    if (whole && moved) {
                        *pointer += s->stride_width * s->x_stride;
                        continue;
                    }
                    const int8_t *x = tap_pixel(s, image, p, q, i, j);
                    *pointer = x ? x : outside;
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
