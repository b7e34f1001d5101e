/* The epilogue that every kernel of convolutions ends with:

       v = activation(sum * scale + bias + (residual - r_zero) * r_scale)   (float: scale = 1, as does r_scale)
       q = clamp(round_half_even(v / y_scale) + y_zero, -127, 127)          (where the result is quantised; NaN gives y_zero)

   Multiplications and additions are rounded one by one, as the definition does. */
#ifndef TILEWRIGHT_CONV_VECTOR_H
#define TILEWRIGHT_CONV_VECTOR_H

#include "conv.h"
#include "vector.h"

#ifdef LANES
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

INLINE void store_values(const tw_step *step, int64_t at, int n, vec v) {
    if (step->y_type == FLOAT32)
        v_store_first((float *)step->y + at, v, n);
    else
        v_store_int8((int8_t *)step->y + at, v_div(v, v_set(step->y_scale)), v_set(step->y_zero),
                     step->y_type == UINT8 ? 128 : 0, n);
}

/* sum + bias, then all that follows, of n channels from `channel` on of the pixel numbered `pixel`. */
INLINE void finish(const tw_step *step, vec v, int64_t pixel, int64_t channel, int n) {
    if (step->residual) {
        const vec r = load_values(step->residual, step->r_type, pixel * step->r_stride + channel, n);
        v = v_add(v, v_mul(v_sub(r, v_set(step->r_zero)), v_set(step->r_scale)));
    }
    v = activate(v, step->activation, step->slope);
    store_values(step, pixel * step->y_stride + channel, n, v);
}

/* The epilogues that most layers have, without a branch: the activation cuts off at two bounds, the result and the
   residual, if there is one, are of one type. Layers of few input channels take longer for `finish` than for the sums. */
enum { ANY, TO_FLOAT, ADD_TO_FLOAT, TO_INT8, ADD_TO_INT8 };

typedef struct {
    vec low, high, inverse, scale, zero, r_scale, r_zero;
    vec least, most, shift; /* of a quotient before the zero point is added; the activation's bounds are in them */
} bounds;

static inline int epilogue_of(const tw_step *s) {
    if (s->activation > RELU6 || s->y_scale < 1e-37f) return ANY; /* of smaller ones the reciprocal is infinite */
    if (s->y_type == FLOAT32) return !s->residual ? TO_FLOAT : s->r_type == FLOAT32 ? ADD_TO_FLOAT : ANY;
    if (s->y_type == INT8) return !s->residual ? TO_INT8 : s->r_type == INT8 ? ADD_TO_INT8 : ANY;
    return ANY;
}

INLINE bounds bounds_of(const tw_step *s) {
    const float infinity = __builtin_inff(), inverse = 1.0f / s->y_scale;
    const vec low = v_set(s->activation == NONE ? -infinity : 0.0f), high = v_set(s->activation == RELU6 ? 6.0f : infinity);
    /* A product with a positive factor is rounded to the same side of a bound's product. */
    const vec least = v_max(v_mul(low, v_set(inverse)), v_set(-127.0f - s->y_zero));
    const vec most = v_min(v_mul(high, v_set(inverse)), v_set(127.0f - s->y_zero));
    return (bounds){low, high, v_set(inverse), v_set(s->y_scale), v_set(s->y_zero), v_set(s->r_scale), v_set(s->r_zero),
                    least, most, v_set(12582912.0f + s->y_zero)};
}

/* Adds the residual, if there is one, at element `at` of it. */
INLINE vec add_residual(const int epilogue, const bounds *b, const tw_step *s, vec v, int64_t at) {
    if (epilogue == ADD_TO_FLOAT) return v_add(v, v_mul(v_load((const float *)s->residual + at), b->r_scale));
    if (epilogue != ADD_TO_INT8) return v;
    const vec r = v_load_int8((const int8_t *)s->residual + at, LANES);
    return v_add(v, v_mul(v_sub(r, b->r_zero), b->r_scale));
}

#ifdef __AVX512F__
/* clamp(v / scale) + zero point, as v + 1.5 * 2^23, whose low byte is the integer.

   A product with the reciprocal is within two units in the last place of the quotient: 254 * 2^-22 < 7e-5. Only where it
   lies that close to the middle between two integers, or is NaN, may the quotient be rounded otherwise: `off` becomes the
   larger of itself and the bits of the distance to the nearest integer, of which a NaN has more than any number. */
INLINE __m512i quantized(const bounds *b, vec v, __m512i *off) {
    const vec product = v_max(b->least, v_min(b->most, v_mul(v, b->inverse)));
    const vec shifted = v_add(product, b->shift);
    const vec distance = _mm512_abs_ps(v_sub(product, v_sub(shifted, b->shift)));
    *off = _mm512_max_epu32(*off, _mm512_castps_si512(distance));
    return _mm512_castps_si512(shifted);
}
INLINE int is_doubtful(__m512i off) {
    return _mm512_cmpgt_epu32_mask(off, _mm512_castps_si512(v_set(0.49993f))) != 0;
}

/* Four vectors quantised to bytes: of each four dwords that lie together, one is of each vector. Returns 0 where some may
   be rounded otherwise. */
INLINE int quantize_four(const bounds *b, const vec v[4], __m512i *bytes) {
    __m512i q[4], off = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        q[i] = _mm512_sub_epi32(quantized(b, v[i], &off), _mm512_castps_si512(v_set(12582912.0f)));
    *bytes = _mm512_packs_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
    return !is_doubtful(off);
}

/* By division. */
INLINE void store_quotient(const bounds *b, int8_t *y, vec v) {
    v_store_int8(y, v_div(v_max(b->low, v_min(b->high, v)), b->scale), b->zero, 0, LANES);
}

/* `finish` to int8 of two vectors of one pixel, then of two of another. */
INLINE void finish_pairs(const int epilogue, const bounds *b, const tw_step *s, vec v[4], int64_t pixel, int64_t other,
                         int64_t channel) {
    const int64_t residual = pixel * s->r_stride + channel, other_residual = other * s->r_stride + channel;
    v[0] = add_residual(epilogue, b, s, v[0], residual);
    v[1] = add_residual(epilogue, b, s, v[1], residual + LANES);
    v[2] = add_residual(epilogue, b, s, v[2], other_residual);
    v[3] = add_residual(epilogue, b, s, v[3], other_residual + LANES);
    int8_t *y = (int8_t *)s->y + pixel * s->y_stride + channel, *y_other = (int8_t *)s->y + other * s->y_stride + channel;
    __m512i bytes;
    if (__builtin_expect(!quantize_four(b, v, &bytes), 0)) {
        store_quotient(b, y, v[0]);
        store_quotient(b, y + LANES, v[1]);
        store_quotient(b, y_other, v[2]);
        store_quotient(b, y_other + LANES, v[3]);
        return;
    }
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    bytes = _mm512_permutexvar_epi32(order, bytes);
    _mm256_storeu_si256((__m256i *)y, _mm512_castsi512_si256(bytes));
    _mm256_storeu_si256((__m256i *)y_other, _mm512_extracti64x4_epi64(bytes, 1));
}
#endif

/* `finish` of a whole vector; `epilogue` is a constant where this is inlined. */
INLINE void finish_as(const int epilogue, const bounds *b, const tw_step *s, vec v, int64_t pixel, int64_t channel) {
    if (epilogue == ANY) {
        finish(s, v, pixel, channel, LANES);
        return;
    }
    v = add_residual(epilogue, b, s, v, pixel * s->r_stride + channel);
    if (epilogue == TO_FLOAT || epilogue == ADD_TO_FLOAT) {
        v_store((float *)s->y + pixel * s->y_stride + channel, v_max(b->low, v_min(b->high, v)));
        return;
    }
    int8_t *y = (int8_t *)s->y + pixel * s->y_stride + channel;
#ifdef __AVX512F__
    __m512i off = _mm512_setzero_si512();
    const __m512i shifted = quantized(b, v, &off);
    if (__builtin_expect(is_doubtful(off), 0))
        store_quotient(b, y, v);
    else
        _mm_storeu_si128((__m128i *)y, _mm512_cvtepi32_epi8(shifted));
#else
    v_store_int8(y, v_div(v_max(b->low, v_min(b->high, v)), b->scale), b->zero, 0, LANES);
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
