/* int4 weights times s8 activations: the nibbles, 0..15, are the u8 operand of the integer products.

   A word is the eight nibbles of one channel that stand in four bytes: the low nibble of byte j belongs to column j, the
   high one to column 4 + j. */
#ifndef TILEWRIGHT_NIBBLES_H
#define TILEWRIGHT_NIBBLES_H

#include "simd.h"

#define INLINE static inline __attribute__((always_inline))

/* Without this the compiler keeps a copy of every sum in memory and writes all of them at each step of the loop that
   makes them: 650 instead of 710 GOPS. */
#if defined(__AVX512F__)
#define KEEP_IN_REGISTER(v) __asm__("" : "+v"(v))
#elif defined(__AVX2__)
#define KEEP_IN_REGISTER(v) __asm__("" : "+x"(v))
#else
#define KEEP_IN_REGISTER(v) (void)(v)
#endif

#if defined(__AVX512VNNI__)

typedef __m512 floats;
INLINE floats load_floats(const float *from) { return _mm512_loadu_ps(from); }
INLINE void store_floats(float *to, floats v) { _mm512_storeu_ps(to, v); }
/* p - z * s, to float, times the scale, added to `to`. */
INLINE floats scale_sums(vector p, vector z, int32_t s, floats scale, floats to) {
    p = _mm512_sub_epi32(p, _mm512_mullo_epi32(z, _mm512_set1_epi32(s)));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(p), scale, to);
}
INLINE vector load_zeros(const uint8_t *from) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from)); }

#elif defined(__AVX2__)

typedef __m256 floats;
INLINE floats load_floats(const float *from) { return _mm256_loadu_ps(from); }
INLINE void store_floats(float *to, floats v) { _mm256_storeu_ps(to, v); }
INLINE floats scale_sums(vector p, vector z, int32_t s, floats scale, floats to) {
    p = _mm256_sub_epi32(p, _mm256_mullo_epi32(z, _mm256_set1_epi32(s)));
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(p), scale, to);
}
INLINE vector load_zeros(const uint8_t *from) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from)); }

#else

typedef struct {
    float lane[LANES];
} floats;
INLINE floats load_floats(const float *from) {
    floats v;
    memcpy(v.lane, from, sizeof v.lane);
    return v;
}
INLINE void store_floats(float *to, floats v) { memcpy(to, v.lane, sizeof v.lane); }
INLINE floats scale_sums(vector p, vector z, int32_t s, floats scale, floats to) {
    for (int i = 0; i < LANES; i++) to.lane[i] += (float)(p.lane[i] - z.lane[i] * s) * scale.lane[i];
    return to;
}
INLINE vector load_zeros(const uint8_t *from) {
    vector v;
    for (int i = 0; i < LANES; i++) v.lane[i] = from[i];
    return v;
}

#endif

/* sum[r][v] += nibbles times activations over `words` words of one panel. x: s8, eight bytes a word; rows x_stride bytes
   apart. `rows` is a constant wherever this is called. */
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

#if defined(__AVX512VNNI__)
#define LOAD_WORDS(from) _mm512_loadu_si512(from)
#define LOW_NIBBLES(w) _mm512_and_si512(w, _mm512_set1_epi8(15))
#define HIGH_NIBBLES(w) _mm512_and_si512(_mm512_srli_epi16(w, 4), _mm512_set1_epi8(15))
#define BROADCAST_S8(four) _mm512_set1_epi32(four)
#define DOT(sum, w, x) _mm512_dpbusd_epi32(sum, w, x)
#else
#define LOAD_WORDS(from) _mm256_loadu_si256((const __m256i *)(from))
#define LOW_NIBBLES(w) _mm256_and_si256(w, _mm256_set1_epi8(15))
#define HIGH_NIBBLES(w) _mm256_and_si256(_mm256_srli_epi16(w, 4), _mm256_set1_epi8(15))
#define BROADCAST_S8(four) _mm256_set1_epi32(four)
#define DOT(sum, w, x) _mm256_dpbusd_avx_epi32(sum, w, x)
#endif

/* One nibble of each byte of a word. */
INLINE void add_half(int half, int rows, const int8_t *x, int64_t x_stride, const uint8_t *word,
                     vector sum[][TILE_VECTORS]) {
    vector w[TILE_VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < TILE_VECTORS; v++) {
        w[v] = LOAD_WORDS(word + v * LANES * 4);
        w[v] = half ? HIGH_NIBBLES(w[v]) : LOW_NIBBLES(w[v]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        int32_t four;
        memcpy(&four, x + r * x_stride + half * 4, 4);
#pragma GCC unroll 8
        for (int v = 0; v < TILE_VECTORS; v++) sum[r][v] = DOT(sum[r][v], w[v], BROADCAST_S8(four));
    }
}

INLINE void add_words(int rows, const int8_t *x, int64_t x_stride, const uint8_t *panel, int64_t words,
                      vector sum[][TILE_VECTORS]) {
    for (int64_t word = 0; word < words; word++, x += 8, panel += PANEL * 4) {
        add_half(0, rows, x, x_stride, panel, sum);
        /* The second half loads the words anew, which the compiler must not undo: both do not fit the registers. */
        __asm__("" : "+r"(panel));
        add_half(1, rows, x, x_stride, panel, sum);
    }
}

#elif defined(__AVX2__)

/* vpmaddubsw adds two products in 16 bits. With nibbles they are at most 2 * 15 * 128 = 3840 in magnitude: eight of them,
   those of four words, stay below 2^15 and never saturate. */
INLINE void add_words(int rows, const int8_t *x, int64_t x_stride, const uint8_t *panel, int64_t words,
                      vector sum[][TILE_VECTORS]) {
    const __m256i ones = _mm256_set1_epi16(1), mask = _mm256_set1_epi8(15);
    for (int64_t first = 0; first < words; first += 4) {
        int64_t last = first + 4 < words ? first + 4 : words;
        __m256i part[TILE_ROWS][TILE_VECTORS];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
            for (int v = 0; v < TILE_VECTORS; v++) part[r][v] = _mm256_setzero_si256();
        for (int64_t word = first; word < last; word++) {
            __m256i low[TILE_VECTORS], high[TILE_VECTORS];
#pragma GCC unroll 8
            for (int v = 0; v < TILE_VECTORS; v++) {
                __m256i w = _mm256_loadu_si256((const __m256i *)(panel + (word * PANEL + v * LANES) * 4));
                low[v] = _mm256_and_si256(w, mask);
                high[v] = _mm256_and_si256(_mm256_srli_epi16(w, 4), mask);
            }
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                const uint8_t *from = (const uint8_t *)x + r * x_stride + word * 8;
                __m256i a = broadcast4(from), b = broadcast4(from + 4);
#pragma GCC unroll 8
                for (int v = 0; v < TILE_VECTORS; v++) {
                    part[r][v] = _mm256_add_epi16(part[r][v], _mm256_maddubs_epi16(low[v], a));
                    part[r][v] = _mm256_add_epi16(part[r][v], _mm256_maddubs_epi16(high[v], b));
                }
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
            for (int v = 0; v < TILE_VECTORS; v++)
                sum[r][v] = _mm256_add_epi32(sum[r][v], _mm256_madd_epi16(part[r][v], ones));
    }
}

#else

INLINE void add_words(int rows, const int8_t *x, int64_t x_stride, const uint8_t *panel, int64_t words,
                      vector sum[][TILE_VECTORS]) {
    for (int64_t word = 0; word < words; word++)
        for (int r = 0; r < rows; r++) {
            const int8_t *a = x + r * x_stride + word * 8;
            for (int v = 0; v < TILE_VECTORS; v++)
                for (int i = 0; i < LANES; i++) {
                    const uint8_t *w = panel + (word * PANEL + v * LANES + i) * 4;
                    for (int j = 0; j < 4; j++) sum[r][v].lane[i] += (w[j] & 15) * a[j] + (w[j] >> 4) * a[4 + j];
                }
        }
}

#endif
#endif
