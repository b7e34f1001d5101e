/* Vectors of float32 of the instruction set. Without LANES there are none: a kernel says so. */
#ifndef TILEWRIGHT_VECTOR_H
#define TILEWRIGHT_VECTOR_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
typedef __m512 vec;
#define v_set(value) _mm512_set1_ps(value)
#define v_zero() _mm512_setzero_ps()
#define v_load(p) _mm512_loadu_ps(p)
#define v_store(p, v) _mm512_storeu_ps(p, v)
#define v_add(a, b) _mm512_add_ps(a, b)
#define v_sub(a, b) _mm512_sub_ps(a, b)
#define v_mul(a, b) _mm512_mul_ps(a, b)
#define v_div(a, b) _mm512_div_ps(a, b)
#define v_fma(a, b, c) _mm512_fmadd_ps(a, b, c)
static inline vec v_add_product(vec sum, vec a, vec b) { return v_fma(a, b, sum); }
#define v_max(a, b) _mm512_max_ps(a, b) /* NaN in b stays, as in v_min */
#define v_min(a, b) _mm512_min_ps(a, b)
#define v_round(a) _mm512_roundscale_ps(a, 0)
static inline float v_total(vec v) { return _mm512_reduce_add_ps(v); }
static inline int v_all_ordered(vec v) { return !_mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q); } /* no NaN */
static inline vec v_power_of_two(vec n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
static inline __mmask16 first_lanes(int n) { return (__mmask16)((1u << n) - 1u); }
static inline vec v_load_first(const float *p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
static inline void v_store_first(float *p, vec v, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
static inline vec v_load_int8(const int8_t *p, int n) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_lanes(n), p)));
}
static inline vec v_load_uint8(const uint8_t *p, int n) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first_lanes(n), p)));
}
/* clamp(round(v) + zero, -127, 127) of a whole number `zero`; zero for NaN. `flip` is 128 to store value + 128. */
static inline void v_store_int8(int8_t *p, vec v, vec zero, int flip, int n) {
    v = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, v, _CMP_ORD_Q), v);
    v = v_max(v_sub(v_set(-127.0f), zero), v_min(v_sub(v_set(127.0f), zero), v));
    __m128i q = _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(v), _mm512_cvtps_epi32(zero)));
    _mm_mask_storeu_epi8(p, first_lanes(n), _mm_xor_si128(q, _mm_set1_epi8((char)flip)));
}
#elif defined(__AVX2__) && defined(__FMA__)
#define LANES 8
typedef __m256 vec;
#define v_set(value) _mm256_set1_ps(value)
#define v_zero() _mm256_setzero_ps()
#define v_load(p) _mm256_loadu_ps(p)
#define v_store(p, v) _mm256_storeu_ps(p, v)
#define v_add(a, b) _mm256_add_ps(a, b)
#define v_sub(a, b) _mm256_sub_ps(a, b)
#define v_mul(a, b) _mm256_mul_ps(a, b)
#define v_div(a, b) _mm256_div_ps(a, b)
#define v_fma(a, b, c) _mm256_fmadd_ps(a, b, c)
/* For the sums of a tile, which fill most registers: from the intrinsic gcc 12 adds into the register of a or b and moves
   the sums about. */
static inline vec v_add_product(vec sum, vec a, vec b) {
    __asm__("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
    return sum;
}
#define v_max(a, b) _mm256_max_ps(a, b)
#define v_min(a, b) _mm256_min_ps(a, b)
#define v_round(a) _mm256_round_ps(a, 0)
static inline float v_total(vec v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
static inline int v_all_ordered(vec v) { return !_mm256_movemask_ps(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)); }
static inline vec v_power_of_two(vec n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
static inline vec v_load_first(const float *p, int n) {
    float lanes[LANES] = {0};
    if (n == LANES) return v_load(p);
    memcpy(lanes, p, (size_t)n * sizeof *p);
    return v_load(lanes);
}
static inline void v_store_first(float *p, vec v, int n) {
    float lanes[LANES];
    if (n == LANES) {
        v_store(p, v);
        return;
    }
    v_store(lanes, v);
    memcpy(p, lanes, (size_t)n * sizeof *p);
}
static inline __m128i eight_bytes(const void *p, int n) {
    int64_t bytes = 0;
    memcpy(&bytes, p, (size_t)n);
    return _mm_cvtsi64_si128(bytes);
}
static inline vec v_load_int8(const int8_t *p, int n) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight_bytes(p, n)));
}
static inline vec v_load_uint8(const uint8_t *p, int n) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight_bytes(p, n)));
}
static inline void v_store_int8(int8_t *p, vec v, vec zero, int flip, int n) {
    v = _mm256_and_ps(v, _mm256_cmp_ps(v, v, _CMP_ORD_Q));
    v = v_max(v_sub(v_set(-127.0f), zero), v_min(v_sub(v_set(127.0f), zero), v));
    const __m256i q = _mm256_add_epi32(_mm256_cvtps_epi32(v), _mm256_cvtps_epi32(zero));
    __m128i eight = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
    eight = _mm_xor_si128(_mm_packs_epi16(eight, eight), _mm_set1_epi8((char)flip));
    const int64_t bytes = _mm_cvtsi128_si64(eight);
    memcpy(p, &bytes, (size_t)n);
}
#endif

#ifdef LANES
#define INLINE static inline __attribute__((always_inline))

/* e^x within two units in the last place: x = n ln 2 + r, a polynomial (Cephes' coefficients) in r. */
INLINE vec v_exp_of_parts(vec n, vec x) {
    vec r = v_fma(n, v_set(-0.693359375f), x);
    r = v_fma(n, v_set(2.12194440e-4f), r);
    vec p = v_set(1.9875691500e-4f);
    p = v_fma(p, r, v_set(1.3981999507e-3f));
    p = v_fma(p, r, v_set(8.3334519073e-3f));
    p = v_fma(p, r, v_set(4.1665795894e-2f));
    p = v_fma(p, r, v_set(1.6666665459e-1f));
    p = v_fma(p, r, v_set(5.0000001201e-1f));
    p = v_add(v_fma(p, v_mul(r, r), r), v_set(1.0f));
    return v_mul(p, v_power_of_two(n));
}

/* Clamped to [-87, 89], so that 2^n is a normal number. */
INLINE vec v_exp(vec x) {
    x = v_max(v_set(-87.0f), v_min(v_set(89.0f), x));
    return v_exp_of_parts(v_round(v_mul(x, v_set(1.44269504f))), x);
}
#endif

#endif
