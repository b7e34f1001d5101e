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

#endif
