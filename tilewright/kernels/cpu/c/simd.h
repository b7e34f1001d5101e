/* Vectors of 32-bit lanes and the product that all integer kernels are made of: four u8 x s8 products added to each lane.

   dot4 is exact on every instruction set. In particular it is never vpmaddubsw, whose 16-bit sums saturate. */
#ifndef TILEWRIGHT_SIMD_H
#define TILEWRIGHT_SIMD_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX512VNNI__)

#include <immintrin.h>
enum { LANES = 16, TILE_VECTORS = 4, TILE_ROWS = 6 }; /* 24 accumulators, 4 weights and 1 activation in 32 registers */
typedef __m512i vector;
typedef __m512i weights;
typedef __m512i activations;
static inline vector vector_zero(void) { return _mm512_setzero_si512(); }
static inline void vector_store(int32_t *to, vector v) { _mm512_storeu_si512(to, v); }
static inline weights load_weights(const int8_t *from) { return _mm512_loadu_si512(from); }
static inline activations as_activations(vector bytes) { return bytes; }
static inline activations broadcast_activations(const uint8_t *from) {
    int32_t four;
    memcpy(&four, from, 4);
    return _mm512_set1_epi32(four);
}
static inline vector dot4(vector sum, activations x, weights w) { return _mm512_dpbusd_epi32(sum, x, w); }

#elif defined(__AVX2__)

#include <immintrin.h>
enum { LANES = 8, TILE_VECTORS = 2, TILE_ROWS = 4 };
typedef __m256i vector;
static inline vector vector_zero(void) { return _mm256_setzero_si256(); }
static inline vector vector_load(const int32_t *from) { return _mm256_loadu_si256((const __m256i *)from); }
static inline void vector_store(int32_t *to, vector v) { _mm256_storeu_si256((__m256i *)to, v); }
static inline __m256i broadcast4(const uint8_t *from) {
    int32_t four;
    memcpy(&four, from, 4);
    return _mm256_set1_epi32(four);
}

#if defined(__AVXVNNI__)
typedef __m256i weights;
typedef __m256i activations;
static inline weights load_weights(const int8_t *from) { return _mm256_loadu_si256((const __m256i *)from); }
static inline activations as_activations(vector bytes) { return bytes; }
static inline activations broadcast_activations(const uint8_t *from) { return broadcast4(from); }
static inline vector dot4(vector sum, activations x, weights w) { return _mm256_dpbusd_avx_epi32(sum, x, w); }
#else
/* Many rows are multiplied by weights that are widened once for all of them. */
#define WIDEN_INTEGERS 1
/* Even and odd bytes as 16-bit numbers: vpmaddwd adds pairs of their products in 32 bits. */
typedef struct {
    __m256i even, odd;
} weights;
typedef struct {
    __m256i even, odd;
} activations;
static inline weights load_weights(const int8_t *from) {
    __m256i w = _mm256_loadu_si256((const __m256i *)from);
    return (weights){_mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), _mm256_srai_epi16(w, 8)};
}
static inline activations as_activations(vector bytes) {
    return (activations){_mm256_and_si256(bytes, _mm256_set1_epi16(255)), _mm256_srli_epi16(bytes, 8)};
}
/* The addition is written out: from the intrinsic gcc 12 makes one into another register and a move, for every sum that a
   tile keeps, which costs a third of its pace. */
static inline vector add_pairs(vector sum, __m256i x, __m256i w) {
    const __m256i products = _mm256_madd_epi16(x, w);
    __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(products));
    return sum;
}
/* k activations, a multiple of 4, to 16 bits, their bits changed by `flip` first. Of each four those at even places come
   first, so that eight bytes are the two operands that meet weights.even and weights.odd. `from` may be the second half of
   `to`: what is read has not been overwritten. */
static inline void widen_activations(const uint8_t *from, int64_t k, int flip, int16_t *to) {
    const __m128i order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    const __m128i flips = _mm_set1_epi8((char)flip);
    int64_t i = 0;
    for (; i + 16 <= k; i += 16) {
        const __m128i bytes = _mm_xor_si128(_mm_loadu_si128((const __m128i *)(from + i)), flips);
        _mm256_storeu_si256((__m256i *)(to + i), _mm256_cvtepu8_epi16(_mm_shuffle_epi8(bytes, order)));
    }
    for (; i < k; i += 4) {
        int32_t four;
        memcpy(&four, from + i, 4);
        const __m128i bytes = _mm_xor_si128(_mm_cvtsi32_si128(four), flips);
        _mm_storel_epi64((__m128i *)(to + i), _mm_cvtepu8_epi16(_mm_shuffle_epi8(bytes, order)));
    }
}
static inline vector dot4(vector sum, activations x, weights w) {
    return add_pairs(add_pairs(sum, x.even, w.even), x.odd, w.odd);
}
#endif

#else /* plain C, for the compiler to make of it what it can */

enum { LANES = 4, TILE_VECTORS = 4, TILE_ROWS = 2 };
typedef struct {
    int32_t lane[LANES];
} vector;
typedef struct {
    int8_t byte[4 * LANES];
} weights;
typedef struct {
    uint8_t byte[4];
} activations;
static inline vector vector_zero(void) { return (vector){{0}}; }
static inline void vector_store(int32_t *to, vector v) { memcpy(to, v.lane, sizeof v.lane); }
static inline weights load_weights(const int8_t *from) {
    weights w;
    memcpy(w.byte, from, sizeof w.byte);
    return w;
}
static inline activations broadcast_activations(const uint8_t *from) {
    activations x;
    memcpy(x.byte, from, sizeof x.byte);
    return x;
}
static inline vector dot4(vector sum, activations x, weights w) {
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < 4; j++) sum.lane[i] += x.byte[j] * w.byte[4 * i + j];
    return sum;
}

#endif

/* CASE(rows) for each number of rows that a tile takes. */
#if defined(__AVX512VNNI__)
#define UP_TO_TILE_ROWS UP_TO_6
#elif defined(__AVX2__)
#define UP_TO_TILE_ROWS(CASE) CASE(1) CASE(2) CASE(3) CASE(4)
#else
#define UP_TO_TILE_ROWS(CASE) CASE(1) CASE(2)
#endif

/* Output channels that one tile computes: weights are packed in panels of so many. */
enum { PANEL = LANES * TILE_VECTORS };

#endif
