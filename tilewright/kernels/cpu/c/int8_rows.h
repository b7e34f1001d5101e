/* Quantised rows as the product of int8_linear.c reads them, and what is needed to write them.

   A row is k bytes and padding up to a multiple of K_STEP, whose weights are 0; without VNNI it stands in 16 bits
   (int8_wide.h). */
#ifndef TILEWRIGHT_INT8_ROWS_H
#define TILEWRIGHT_INT8_ROWS_H

#include "amx.h"
#include "program.h"
#include "quantize_row.h"
#include "simd.h"

/* K_STEP: k are packed in multiples of it. */
#if defined(__AMX_INT8__)
enum { K_STEP = AMX_BYTES };
#else
enum { K_STEP = 4 };
#endif
enum { ZERO_POINT = 128 };

static inline int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

/* Bytes of a quantised row. */
static inline int64_t int8_row_bytes(int64_t k) {
#if defined(__AMX_INT8__)
    return (round_up(k, K_STEP) / K_STEP | 1) * K_STEP; /* odd: 16 rows are in as many sets of the cache */
#elif defined(WIDEN_INTEGERS)
    return ((2 * round_up(k, K_STEP) + 63) / 64 | 1) * 64; /* odd, as above */
#else
    return round_up(k, K_STEP);
#endif
}

/* Quantises `rows` rows, x_stride elements apart and in the format `dtype`, to rows that are int8_row_bytes apart. */
static inline void quantize_for_product(const void *x, int dtype, int64_t rows, int64_t x_stride, int64_t k,
                                        const float *channel_scale, uint8_t *q, float *scale) {
    const int64_t padding = round_up(k, K_STEP) - k, q_stride = int8_row_bytes(k);
#if defined(WIDEN_INTEGERS)
    q += round_up(k, K_STEP); /* the second half of what a widened row takes */
#endif
    quantize_rows(x, dtype, rows, x_stride, k, channel_scale, ZERO_POINT, q, q_stride, scale);
    if (padding)
        for (int64_t row = 0; row < rows; row++) memset(q + row * q_stride + k, ZERO_POINT, (size_t)padding);
#if defined(WIDEN_INTEGERS)
    const int64_t bytes = round_up(k, K_STEP);
    for (int64_t row = 0; row < rows; row++, q += q_stride) widen_activations(q, bytes, 0, (int16_t *)(q - bytes));
#endif
}

#endif
