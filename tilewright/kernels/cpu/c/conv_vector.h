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

/* The activation, where it is one that `curve` knows and the result is int8 alone, or -1. */
static inline int curve_of(const tw_step *s) {
    const int known = s->activation == SILU || s->activation == HARDSWISH;
    return known && s->y_type == INT8 && !s->residual && s->y_scale >= 1e-37f ? s->activation : -1;
}

/* The epilogues that most layers have, without a branch: the activation cuts off at two bounds, the result and the
   residual, if there is one, are of one type. Layers of few input channels take longer for `finish` than for the sums. */
enum { ANY, TO_FLOAT, ADD_TO_FLOAT, TO_INT8, ADD_TO_INT8 };

typedef struct {
    vec low, high, inverse, scale, zero, r_scale, r_zero;
    vec least, most, shift; /* of a quotient before the zero point is added; the activation's bounds are in them */
#ifdef __AVX512F__
    __m512i lowest, highest; /* bytes */
    vec r_factor, r_error;   /* of `quick_bytes`: the residual's scale over the result's, and its part of the error */
#endif
} bounds;

static inline int epilogue_of(const tw_step *s) {
    if (s->activation > RELU6 || s->y_scale < 1e-37f) return ANY; /* of smaller ones the reciprocal is infinite */
    if (s->y_type == FLOAT32) return !s->residual ? TO_FLOAT : s->r_type == FLOAT32 ? ADD_TO_FLOAT : ANY;
    if (s->y_type == INT8) return !s->residual ? TO_INT8 : s->r_type == INT8 ? ADD_TO_INT8 : ANY;
    return ANY;
}

INLINE bounds bounds_of(const tw_step *s) {
    const float infinity = __builtin_inff(), inverse = 1.0f / s->y_scale;
    const int cuts = s->activation == RELU || s->activation == RELU6;
    const vec low = v_set(cuts ? 0.0f : -infinity), high = v_set(s->activation == RELU6 ? 6.0f : infinity);
    /* A product with a positive factor is rounded to the same side of a bound's product. */
    const vec least = v_max(v_mul(low, v_set(inverse)), v_set(-127.0f - s->y_zero));
    const vec most = v_min(v_mul(high, v_set(inverse)), v_set(127.0f - s->y_zero));
    bounds b = {.low = low, .high = high, .inverse = v_set(inverse), .scale = v_set(s->y_scale), .zero = v_set(s->y_zero),
                .r_scale = v_set(s->r_scale), .r_zero = v_set(s->r_zero), .least = least, .most = most,
                .shift = v_set(12582912.0f + s->y_zero)};
#ifdef __AVX512F__
    const float lowest = cuts && s->y_zero > -127.0f ? s->y_zero : -127.0f;
    const float six = __builtin_rintf(6.0f / s->y_scale) + s->y_zero;
    b.lowest = _mm512_set1_epi8((char)lowest);
    b.highest = _mm512_set1_epi8(s->activation == RELU6 && six < 127.0f ? (char)six : 127);
    b.r_factor = s->residual ? v_set(s->r_scale * inverse) : v_zero();
    b.r_error = v_mul(b.r_factor, v_set(256.0f * 12.0f));
#endif
    return b;
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

/* Four vectors of quotients, zero points included, to bytes: of each four dwords that lie together, one is of each vector.
   Whole numbers are cut off at the bounds after they are rounded, which is the same. Returns 0 where some lie so close to the middle between two
   integers, `doubt` or more from the nearest, that the quotient by division may be rounded otherwise, or are NaN. */
INLINE int quick_bytes(const bounds *b, const vec v[4], vec doubt, __m512i *bytes) {
    __m512i q[4], off = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const vec quotient = v_min(v_set(1e6f), v[i]); /* NaN stays; of what is too large to convert bytes saturate */
        q[i] = _mm512_cvtps_epi32(quotient);
        off = _mm512_max_epu32(off, _mm512_castps_si512(_mm512_abs_ps(_mm512_reduce_ps(quotient, 8))));
    }
    *bytes = _mm512_packs_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
    *bytes = _mm512_min_epi8(b->highest, _mm512_max_epi8(b->lowest, *bytes));
    return _mm512_cmpge_epu32_mask(off, _mm512_castps_si512(doubt)) == 0;
}

/* What takes a sum, and a residual's integer, to a quotient without rounding in between: their factors and what is added,
   of one vector of channels. */
typedef struct {
    vec factor, offset, error; /* error: the part of `doubt_of` that depends on the bias */
} quick_scale;

INLINE quick_scale quick_scale_of(const bounds *b, vec scale, vec bias) {
    const vec part = v_mul(bias, b->inverse);
    return (quick_scale){v_mul(scale, b->inverse),
                         v_sub(v_fma(bias, b->inverse, b->zero), v_mul(b->r_zero, b->r_factor)),
                         v_mul(_mm512_abs_ps(part), v_set(10.0f))};
}

/* From which distance on a quotient is doubtful. Both ways, counted in units of 2^-24 with S, B and R for what sum, bias
   and residual are in quotients and P for the quotient itself, are off from the real one by at most 5 S + 5 B + 7 R + 3 P
   and 4 for each of the zero point; S <= P + B + R, and where the result is not cut off P <= 256. */
INLINE vec doubt_of(const bounds *b, vec bias_error) {
    const vec error = v_add(v_add(bias_error, b->r_error), v_set(8.0f * 256.0f + 4.0f * 128.0f));
    return _mm512_max_ps(v_sub(v_set(0.5f), v_mul(error, v_set(6.3e-8f))), v_zero()); /* 0 for NaN */
}

/* By division. */
INLINE void store_quotient(const bounds *b, int8_t *y, vec v) {
    v_store_int8(y, v_div(v_max(b->low, v_min(b->high, v)), b->scale), b->zero, 0, LANES);
}

/* Writes two vectors of one pixel and two of another, quantised. */
INLINE void store_pairs(__m512i bytes, int8_t *y, int8_t *y_other) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    bytes = _mm512_permutexvar_epi32(order, bytes);
    _mm256_storeu_si256((__m256i *)y, _mm512_castsi512_si256(bytes));
    _mm256_storeu_si256((__m256i *)y_other, _mm512_extracti64x4_epi64(bytes, 1));
}

/* An activation within four units in the last place, where `activate` divides. */
INLINE vec curve(const int activation, vec x) {
    if (activation == HARDSWISH) {
        const vec ramp = v_max(v_zero(), v_min(v_set(6.0f), v_add(x, v_set(3.0f))));
        return v_mul(v_mul(x, ramp), v_set(1.0f / 6.0f));
    }
    const vec denominator = v_add(v_set(1.0f), v_exp(v_sub(v_zero(), x)));
    const vec near = _mm512_rcp14_ps(denominator); /* and one step of Newton's; NaN of infinity */
    return v_mul(x, v_mul(near, _mm512_fnmadd_ps(denominator, near, v_set(2.0f))));
}

/* `finish` to int8, without a residual, of two vectors of one pixel, then of two of another, by a curve. */
INLINE void finish_curves(const int activation, const bounds *b, const tw_step *s, const vec v[4], int64_t pixel,
                          int64_t other, int64_t channel) {
    vec quotients[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) quotients[i] = v_fma(curve(activation, v[i]), b->inverse, b->zero);
    int8_t *y = (int8_t *)s->y + pixel * s->y_stride + channel, *y_other = (int8_t *)s->y + other * s->y_stride + channel;
    __m512i bytes;
    /* 12 units in the last place of 256 */
    if (__builtin_expect(quick_bytes(b, quotients, v_set(0.4998f), &bytes), 1)) {
        store_pairs(bytes, y, y_other);
        return;
    }
    for (int i = 0; i < 4; i++)
        store_quotient(b, (i < 2 ? y : y_other) + i % 2 * LANES, activate(v[i], activation, 0.0f));
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
