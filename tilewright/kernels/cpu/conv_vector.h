/* Vectors of float32 of the instruction set, and the epilogue that every kernel ends with:

       v = activation(sum * scale + bias + residual * r_scale)      (float: scale = 1, as does r_scale)
       q = clamp(round_half_even(v / y_scale), -127, 127)           (where the result is quantised; NaN gives 0)

   Multiplications and additions are rounded one by one, as the definition does. */
#ifndef TILEWRIGHT_CONV_VECTOR_H
#define TILEWRIGHT_CONV_VECTOR_H

#include "conv.h"

#include <immintrin.h>
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
#define v_max(a, b) _mm512_max_ps(a, b) /* NaN in b stays, as in v_min */
#define v_min(a, b) _mm512_min_ps(a, b)
#define v_round(a) _mm512_roundscale_ps(a, 0)
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
/* Rounded to int8, 0 for NaN. `flip` is 128 to store value + 128. */
static inline void v_store_int8(int8_t *p, vec v, int flip, int n) {
    v = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, v, _CMP_ORD_Q), v);
    v = v_max(v_set(-127.0f), v_min(v_set(127.0f), v));
    __m128i q = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v));
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
#define v_max(a, b) _mm256_max_ps(a, b)
#define v_min(a, b) _mm256_min_ps(a, b)
#define v_round(a) _mm256_round_ps(a, 0)
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
static inline void v_store_int8(int8_t *p, vec v, int flip, int n) {
    v = _mm256_and_ps(v, _mm256_cmp_ps(v, v, _CMP_ORD_Q));
    v = v_max(v_set(-127.0f), v_min(v_set(127.0f), v));
    int32_t lanes[LANES];
    _mm256_storeu_si256((__m256i *)lanes, _mm256_cvtps_epi32(v));
    for (int i = 0; i < n; i++) p[i] = (int8_t)(lanes[i] ^ flip);
}
#endif

#ifdef LANES
#define INLINE static inline __attribute__((always_inline))

/* e^x within two units in the last place: x = n ln 2 + r, a polynomial (Cephes' coefficients) in r. */
INLINE vec v_exp(vec x) {
    x = v_max(v_set(-87.0f), v_min(v_set(89.0f), x));
    vec n = v_round(v_mul(x, v_set(1.44269504f)));
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

INLINE vec activate(vec x, int activation, float slope) {
    switch (activation) {
        case RELU: return v_max(v_zero(), x);
        case RELU6: return v_max(v_zero(), v_min(v_set(6.0f), x));
        case HARDSWISH: {
            vec ramp = v_max(v_zero(), v_min(v_set(6.0f), v_add(x, v_set(3.0f))));
            return v_div(v_mul(x, ramp), v_set(6.0f));
        }
        case SILU: return v_div(x, v_add(v_set(1.0f), v_exp(v_sub(v_zero(), x))));
        case SIGMOID: return v_div(v_set(1.0f), v_add(v_set(1.0f), v_exp(v_sub(v_zero(), x))));
        case LEAKY_RELU: return v_add(v_max(v_zero(), x), v_mul(v_set(slope), v_min(v_zero(), x)));
        default: return x;
    }
}

/* n <= LANES values at element `at` of a tensor, as the numbers they stand for but for the scale. */
INLINE vec load_values(const void *p, int type, int64_t at, int n) {
    if (type == FLOAT32) return v_load_first((const float *)p + at, n);
    if (type == UINT8) return v_sub(v_load_uint8((const uint8_t *)p + at, n), v_set(128.0f));
    return v_load_int8((const int8_t *)p + at, n);
}

INLINE void store_values(void *p, int type, int64_t at, int n, vec v, vec scale) {
    if (type == FLOAT32)
        v_store_first((float *)p + at, v, n);
    else
        v_store_int8((int8_t *)p + at, v_div(v, scale), type == UINT8 ? 128 : 0, n);
}

/* sum + bias, then all that follows, of n channels from `channel` on of the pixel numbered `pixel`. */
INLINE void finish(const tw_step *step, vec v, int64_t pixel, int64_t channel, int n) {
    if (step->residual) {
        const vec r = load_values(step->residual, step->r_type, pixel * step->r_stride + channel, n);
        v = v_add(v, v_mul(r, v_set(step->r_scale)));
    }
    v = activate(v, step->activation, step->slope);
    store_values(step->y, step->y_type, pixel * step->y_stride + channel, n, v, v_set(step->y_scale));
}

/* The epilogues that most layers have, without a branch: the activation cuts off at two bounds, the result and the
   residual, if there is one, are of one type. Layers of few input channels take longer for `finish` than for the sums. */
enum { ANY, TO_FLOAT, ADD_TO_FLOAT, TO_INT8, ADD_TO_INT8 };

typedef struct {
    vec low, high, inverse, scale, r_scale;
} bounds;

static inline int epilogue_of(const tw_step *s) {
    if (s->activation > RELU6) return ANY;
    if (s->y_type == FLOAT32) return !s->residual ? TO_FLOAT : s->r_type == FLOAT32 ? ADD_TO_FLOAT : ANY;
    if (s->y_type == INT8) return !s->residual ? TO_INT8 : s->r_type == INT8 ? ADD_TO_INT8 : ANY;
    return ANY;
}

INLINE bounds bounds_of(const tw_step *s) {
    const float infinity = __builtin_inff();
    return (bounds){v_set(s->activation == NONE ? -infinity : 0.0f), v_set(s->activation == RELU6 ? 6.0f : infinity),
                    v_set(1.0f / s->y_scale), v_set(s->y_scale), v_set(s->r_scale)};
}

/* `finish` of a whole vector; `epilogue` is a constant where this is inlined. */
INLINE void finish_as(const int epilogue, const bounds *b, const tw_step *s, vec v, int64_t pixel, int64_t channel) {
    if (epilogue == ANY) {
        finish(s, v, pixel, channel, LANES);
        return;
    }
    if (epilogue == ADD_TO_FLOAT)
        v = v_add(v, v_mul(v_load((const float *)s->residual + pixel * s->r_stride + channel), b->r_scale));
    if (epilogue == ADD_TO_INT8)
        v = v_add(v, v_mul(v_load_int8((const int8_t *)s->residual + pixel * s->r_stride + channel, LANES), b->r_scale));
    v = v_max(b->low, v_min(b->high, v));
    if (epilogue == TO_FLOAT || epilogue == ADD_TO_FLOAT) {
        v_store((float *)s->y + pixel * s->y_stride + channel, v);
        return;
    }
    int8_t *y = (int8_t *)s->y + pixel * s->y_stride + channel;
#ifdef __AVX512F__
    /* A product with the reciprocal is within two units in the last place of the quotient: 127 * 2^-22 < 4e-5. Only where
       it lies that close to the middle between two integers, or is NaN, may the quotient be rounded otherwise. Adding
       1.5 * 2^23 rounds half to even and leaves the integer in the low byte. */
    const vec product = v_max(v_set(-127.0f), v_min(v_set(127.0f), v_mul(v, b->inverse)));
    const vec shifted = v_add(product, v_set(12582912.0f));
    const vec off = _mm512_abs_ps(v_sub(product, v_sub(shifted, v_set(12582912.0f))));
    if (__builtin_expect(_mm512_cmp_ps_mask(off, v_set(0.49996f), _CMP_NLE_UQ), 0))
        v_store_int8(y, v_div(v, b->scale), 0, LANES);
    else
        _mm_storeu_si128((__m128i *)y, _mm512_cvtepi32_epi8(_mm512_castps_si512(shifted)));
#else
    v_store_int8(y, v_div(v, b->scale), 0, LANES);
#endif
}

/* Runs `body` with EPILOGUE as a constant for each of the epilogues. */
#define WITH_EPILOGUE(value, body)                                                                                     \
    switch (value) {                                                                                                   \
        case TO_FLOAT: { enum { EPILOGUE = TO_FLOAT }; body } break;                                                   \
        case ADD_TO_FLOAT: { enum { EPILOGUE = ADD_TO_FLOAT }; body } break;                                           \
        case TO_INT8: { enum { EPILOGUE = TO_INT8 }; body } break;                                                     \
        case ADD_TO_INT8: { enum { EPILOGUE = ADD_TO_INT8 }; body } break;                                             \
        default: { enum { EPILOGUE = ANY }; body } break;                                                              \
    }
#endif

#endif
