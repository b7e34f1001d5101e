/* Per-row int8 quantisation, bit for bit what kernels/quantize/reference.py defines:

       v = float32(x) * c,   s = max|v| / 127,   q = clamp(round_half_even(v / s), -127, 127) + zero_point

   A zero row has s = 1; a row with NaN or Inf has a non-finite s and q = zero_point. The loops are plain C that the
   compiler vectorises. */
#ifndef TILEWRIGHT_QUANTIZE_ROW_H
#define TILEWRIGHT_QUANTIZE_ROW_H

#include "numbers.h"

#include <math.h>

/* Adding 1.5 * 2^23 rounds half to even and leaves the integer in the low byte. */
#define ROUNDER 12582912.0f

/* Products with the reciprocal stand in for quotients, which take several times as long: they are within two units in the
   last place of each other, 127 * 2^-22 < 4e-5 at most. Where no product of a row lies that close to the middle between two
   integers, both round to the same ones; the few rows where one does are divided. A subnormal s may have no reciprocal. */
#define NO_TIE 0.49996f
#define SMALLEST_NORMAL 1.17549435e-38f

/* Without their sign, the bits of floats order like the numbers, infinity and NaN above all: the maximum is an integer
   reduction, which vectorises without changing what it means. */
#define DEFINE_QUANTIZE_ROW(load, type, name, SCALE)                                                                   \
    static float name(const type *x, int64_t columns, const float *c, int zero_point, uint8_t *q) {                    \
        (void)c;                                                                                                       \
        uint32_t largest = 0;                                                                                          \
        for (int64_t i = 0; i < columns; i++) {                                                                        \
            uint32_t bits = to_bits(load(x, i) SCALE) & 0x7fffffffu;                                                   \
            largest = bits > largest ? bits : largest;                                                                 \
        }                                                                                                              \
        float s = from_bits(largest) / 127.0f;                                                                         \
        if (!isfinite(s)) {                                                                                            \
            memset(q, zero_point, (size_t)columns);                                                                    \
            return s;                                                                                                  \
        }                                                                                                              \
        if (s == 0.0f) s = 1.0f;                                                                                       \
        const float rounder = ROUNDER + (float)zero_point, inverse = 1.0f / s;                                         \
        uint32_t farthest = 0; /* from an integer */                                                                   \
        for (int64_t i = 0; i < columns; i++) {                                                                        \
            float v = load(x, i) SCALE * inverse, shifted = v + rounder;                                               \
            uint32_t off = to_bits(v - (shifted - rounder)) & 0x7fffffffu;                                             \
            farthest = off > farthest ? off : farthest;                                                                \
            q[i] = (uint8_t)to_bits(shifted);                                                                          \
        }                                                                                                              \
        if (s >= SMALLEST_NORMAL && farthest < to_bits(NO_TIE)) return s;                                              \
        for (int64_t i = 0; i < columns; i++) {                                                                        \
            float v = load(x, i) SCALE / s;                                                                            \
            v = v < -127.0f ? -127.0f : v; /* beyond 127 only where s is subnormal */                                  \
            v = v > 127.0f ? 127.0f : v;                                                                               \
            q[i] = (uint8_t)to_bits(v + rounder);                                                                      \
        }                                                                                                              \
        return s;                                                                                                      \
    }

DEFINE_QUANTIZE_ROW(load_float32, float, quantize_float32, )
DEFINE_QUANTIZE_ROW(load_float32, float, quantize_float32_scaled, *c[i])
DEFINE_QUANTIZE_ROW(load_bfloat16, uint16_t, quantize_bfloat16, )
DEFINE_QUANTIZE_ROW(load_bfloat16, uint16_t, quantize_bfloat16_scaled, *c[i])
DEFINE_QUANTIZE_ROW(load_float16, float16, quantize_float16, )
DEFINE_QUANTIZE_ROW(load_float16, float16, quantize_float16_scaled, *c[i])

#if defined(__AVX512F__)
#include <immintrin.h>

/* Elements i to i + 15 as float32, those of `mask`, times c. */
static inline __attribute__((always_inline)) __m512 load_vector(const void *x, int dtype, int64_t i, const float *c,
                                                                __mmask16 mask) {
    __m512 v;
    if (dtype == FLOAT32) {
        v = _mm512_maskz_loadu_ps(mask, (const float *)x + i);
    } else {
        const __m256i halves = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)x + i);
        v = dtype == FLOAT16 ? _mm512_cvtph_ps(halves)
                             : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
    return c ? _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, c + i)) : v;
}

/* The same with vectors, in a quarter of the time: the largest magnitude of a row as an integer. In all of these, dtype and
   whether c is NULL are constants wherever they are called. */
static inline __attribute__((always_inline)) uint32_t largest_of_row(const void *x, int dtype, int64_t columns,
                                                                     const float *c) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i largest[4];
    for (int j = 0; j < 4; j++) largest[j] = _mm512_setzero_si512();
    int64_t i = 0;
#define LARGEST(j, mask)                                                                                               \
    largest[j] = _mm512_max_epu32(                                                                                     \
        largest[j], _mm512_and_si512(_mm512_castps_si512(load_vector(x, dtype, i + 16 * j, c, mask)), magnitude))
    for (; i + 64 <= columns; i += 64) {
        LARGEST(0, 0xffff);
        LARGEST(1, 0xffff);
        LARGEST(2, 0xffff);
        LARGEST(3, 0xffff);
    }
    for (; i < columns; i += 16) LARGEST(0, (__mmask16)(columns - i < 16 ? (1u << (columns - i)) - 1u : 0xffffu));
#undef LARGEST
    largest[0] = _mm512_max_epu32(_mm512_max_epu32(largest[0], largest[1]), _mm512_max_epu32(largest[2], largest[3]));
    return _mm512_reduce_max_epu32(largest[0]);
}

/* QUANTIZED elements from element i on, or, unless `all`, the first `count` of them. Where a product is close to the middle,
   all of them are divided. */
enum { QUANTIZED = 64 };
static inline __attribute__((always_inline)) void quantize_some(const void *x, int dtype, const float *c, int64_t i,
                                                                int all, int64_t count, float s, float inverse,
                                                                int zero_point, uint8_t *q) {
    const uint64_t mask = all ? ~0ull : (1ull << count) - 1ull;
    /* Where the packing instructions, which work within quarters of a vector, leave the 16 quadruples. */
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512 v[4], off = _mm512_setzero_ps();
    __m512i n[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        v[j] = load_vector(x, dtype, i + 16 * j, c, (__mmask16)(mask >> 16 * j));
        const __m512 product = _mm512_mul_ps(v[j], _mm512_set1_ps(inverse));
        n[j] = _mm512_cvtps_epi32(product);
        /* the larger magnitude of the two */
        off = _mm512_range_ps(off, _mm512_sub_ps(product, _mm512_cvtepi32_ps(n[j])), 11);
    }
    if (_mm512_cmp_ps_mask(off, _mm512_set1_ps(NO_TIE), _CMP_GE_OQ))
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) n[j] = _mm512_cvtps_epi32(_mm512_div_ps(v[j], _mm512_set1_ps(s)));
    __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(n[0], n[1]), _mm512_packs_epi32(n[2], n[3]));
    bytes = _mm512_xor_si512(_mm512_permutexvar_epi32(order, bytes), _mm512_set1_epi8((char)zero_point));
    if (~mask)
        _mm512_mask_storeu_epi8(q + i, mask, bytes);
    else
        _mm512_storeu_si512(q + i, bytes);
}

#elif defined(__AVX2__)
#include <immintrin.h>

/* Elements i to i + 7 as float32, times c. */
static inline __attribute__((always_inline)) __m256 load_vector(const void *x, int dtype, int64_t i, const float *c) {
    __m256 v;
    if (dtype == FLOAT32) {
        v = _mm256_loadu_ps((const float *)x + i);
    } else {
        const __m128i halves = _mm_loadu_si128((const __m128i *)((const uint16_t *)x + i));
        v = dtype == FLOAT16 ? _mm256_cvtph_ps(halves)
                             : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    }
    return c ? _mm256_mul_ps(v, _mm256_loadu_ps(c + i)) : v;
}

static inline __attribute__((always_inline)) float load_one(const void *x, int dtype, int64_t i, const float *c) {
    const float v = dtype == FLOAT32    ? load_float32(x, i)
                    : dtype == BFLOAT16 ? load_bfloat16(x, i)
                                        : load_float16(x, i);
    return c ? v * c[i] : v;
}

/* The same with vectors: the largest magnitude of a row as an integer. In all of these, dtype and whether c is NULL are
   constants wherever they are called. */
static inline __attribute__((always_inline)) uint32_t largest_of_row(const void *x, int dtype, int64_t columns,
                                                                     const float *c) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i vectors[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) vectors[j] = _mm256_setzero_si256();
    int64_t i = 0;
    for (; i + 32 <= columns; i += 32)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            vectors[j] = _mm256_max_epu32(
                vectors[j], _mm256_and_si256(_mm256_castps_si256(load_vector(x, dtype, i + 8 * j, c)), magnitude));
    uint32_t lanes[8], largest = 0;
    _mm256_storeu_si256((__m256i *)lanes, _mm256_max_epu32(_mm256_max_epu32(vectors[0], vectors[1]),
                                                           _mm256_max_epu32(vectors[2], vectors[3])));
    for (int j = 0; j < 8; j++) largest = lanes[j] > largest ? lanes[j] : largest;
    for (; i < columns; i++) {
        const uint32_t bits = to_bits(load_one(x, dtype, i, c)) & 0x7fffffffu;
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

/* QUANTIZED elements from element i on, or, unless `all`, the first `count` of them. Where a product is close to the middle,
   all of them are divided. */
enum { QUANTIZED = 32 };
static inline __attribute__((always_inline)) void quantize_some(const void *x, int dtype, const float *c, int64_t i,
                                                                int all, int64_t count, float s, float inverse,
                                                                int zero_point, uint8_t *q) {
    /* Where the packing instructions, which work within halves of a vector, leave the 8 quadruples. */
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256 v[4], off = _mm256_setzero_ps();
    __m256i n[4];
    float few[QUANTIZED] = {0};
    if (!all)
        for (int64_t j = 0; j < count; j++) few[j] = load_one(x, dtype, i + j, c);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        v[j] = all ? load_vector(x, dtype, i + 8 * j, c) : _mm256_loadu_ps(few + 8 * j);
        const __m256 product = _mm256_mul_ps(v[j], _mm256_set1_ps(inverse));
        n[j] = _mm256_cvtps_epi32(product);
        const __m256 distance = _mm256_sub_ps(product, _mm256_cvtepi32_ps(n[j]));
        off = _mm256_max_ps(off, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), distance));
    }
    if (_mm256_movemask_ps(_mm256_cmp_ps(off, _mm256_set1_ps(NO_TIE), _CMP_GE_OQ)))
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) n[j] = _mm256_cvtps_epi32(_mm256_div_ps(v[j], _mm256_set1_ps(s)));
    __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(n[0], n[1]), _mm256_packs_epi32(n[2], n[3]));
    bytes = _mm256_xor_si256(_mm256_permutevar8x32_epi32(bytes, order), _mm256_set1_epi8((char)zero_point));
    if (all) {
        _mm256_storeu_si256((__m256i *)(q + i), bytes);
        return;
    }
    uint8_t kept[QUANTIZED];
    _mm256_storeu_si256((__m256i *)kept, bytes);
    memcpy(q + i, kept, (size_t)count);
}
#endif

#if defined(__AVX2__)
/* Returns 0, having written nothing, where s is not a normal number. */
static inline __attribute__((always_inline)) int quantize_vectors(const void *x, int dtype, int64_t columns, const float *c,
                                                                  int zero_point, uint32_t largest, uint8_t *q,
                                                                  float *scale) {
    float s = from_bits(largest) / 127.0f;
    if (s == 0.0f) s = 1.0f;
    if (!isfinite(s) || s < SMALLEST_NORMAL) return 0;
    *scale = s;
    const float inverse = 1.0f / s;
    int64_t i = 0;
    for (; i + QUANTIZED <= columns; i += QUANTIZED)
        quantize_some(x, dtype, c, i, 1, QUANTIZED, s, inverse, zero_point, q);
    if (i < columns) quantize_some(x, dtype, c, i, 0, columns - i, s, inverse, zero_point, q);
    return 1;
}
#endif

#define QUANTIZE_ROW(name, type)                                                                                       \
    (c ? name##_scaled((const type *)x + at, columns, c, zero_point, q)                                                \
       : name((const type *)x + at, columns, NULL, zero_point, q))

/* Quantises the row that begins `at` elements after x; c is [columns] or NULL; returns s. */
static inline float quantize_row(const void *x, int dtype, int64_t at, int64_t columns, const float *c, int zero_point,
                                 uint8_t *q) {
    if (dtype == FLOAT32) return QUANTIZE_ROW(quantize_float32, float);
    if (dtype == BFLOAT16) return QUANTIZE_ROW(quantize_bfloat16, uint16_t);
    return QUANTIZE_ROW(quantize_float16, float16);
}

#if defined(__AVX2__)
/* The maximum of a row is taken before the row above is quantised: its loads and its chain of instructions pass behind. */
static inline __attribute__((always_inline)) void quantize_rows_as(const void *x, int dtype, int64_t rows, int64_t x_stride,
                                                                   int64_t columns, const float *c, int zero_point,
                                                                   uint8_t *q, int64_t q_stride, float *scale) {
    const int64_t bytes = x_stride * (dtype == FLOAT32 ? 4 : 2);
    const char *from = x;
    uint32_t largest = rows ? largest_of_row(from, dtype, columns, c) : 0, next = 0;
    for (int64_t row = 0; row < rows; row++, from += bytes, q += q_stride, largest = next) {
        if (row + 1 < rows) next = largest_of_row(from + bytes, dtype, columns, c);
        if (!quantize_vectors(from, dtype, columns, c, zero_point, largest, q, scale + row))
            scale[row] = quantize_row(from, dtype, 0, columns, c, zero_point, q);
    }
}
#define QUANTIZE_ROWS(dtype)                                                                                           \
    c ? quantize_rows_as(x, dtype, rows, x_stride, columns, c, zero_point, q, q_stride, scale)                         \
      : quantize_rows_as(x, dtype, rows, x_stride, columns, NULL, zero_point, q, q_stride, scale)

/* Quantises rows that are x_stride elements apart to rows that are q_stride bytes apart; c is [columns] or NULL. */
static void quantize_rows(const void *x, int dtype, int64_t rows, int64_t x_stride, int64_t columns, const float *c,
                          int zero_point, uint8_t *q, int64_t q_stride, float *scale) {
    if (dtype == FLOAT32)
        QUANTIZE_ROWS(FLOAT32);
    else if (dtype == BFLOAT16)
        QUANTIZE_ROWS(BFLOAT16);
    else
        QUANTIZE_ROWS(FLOAT16);
}
#else
static void quantize_rows(const void *x, int dtype, int64_t rows, int64_t x_stride, int64_t columns, const float *c,
                          int zero_point, uint8_t *q, int64_t q_stride, float *scale) {
    for (int64_t row = 0; row < rows; row++)
        scale[row] = quantize_row(x, dtype, row * x_stride, columns, c, zero_point, q + row * q_stride);
}
#endif

#endif
