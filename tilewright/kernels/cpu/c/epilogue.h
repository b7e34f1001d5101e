/* What follows an integer product: activations over a run of floats, and the one cast at the end.

   exp and erf are polynomials, so that the loops vectorise and give the same bits in every lane and at every position.
   Coefficients: fits to the largest error, rounded to float32. Largest errors of the fits: exp 2e-8 relative, erfc 2e-9
   absolute on [0, 4.2]. */
#ifndef TILEWRIGHT_EPILOGUE_H
#define TILEWRIGHT_EPILOGUE_H

#include "activation.h"
#include "numbers.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define FMA __builtin_fmaf
#define ROUNDER_EXP 12582912.0f /* 1.5 * 2^23: adding it rounds to an integer */

/* Comparisons are written so that NaN passes through them. */
static inline float clamp_float(float x, float low, float high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

/* exp(x) for x in [-87, 88]. */
static inline float exp_within(float x) {
    float shifted = FMA(x, 1.44269504f, ROUNDER_EXP), n = shifted - ROUNDER_EXP;
    float r = FMA(n, -1.42860677e-6f, FMA(n, -0.693145752f, x)); /* x - n log 2, in two parts */
    float p = 0.00139411085f;
    p = FMA(p, r, 0.00837512594f);
    p = FMA(p, r, 0.0416663513f);
    p = FMA(p, r, 0.166664153f);
    p = FMA(p, r, 0.5f);
    p = FMA(p, r, 1.0f);
    p = FMA(p, r, 1.0f);
    return p * from_bits((to_bits(shifted) + 127u) << 23); /* 2^n: n stands in the low bits of `shifted` */
}

/* exp(x), x clamped to [-87, 88]: neither overflow nor a subnormal result. */
static inline float exp_clamped(float x) { return exp_within(clamp_float(x, -87.0f, 88.0f)); }

/* erfc(|z|), 0 beyond 4.2 (3e-9). */
static inline float erfc_magnitude(float z) {
    float a = from_bits(to_bits(z) & 0x7fffffffu), t = a > 4.2f ? 4.2f : a;
    float log_ratio = 8.04382398e-06f; /* log(erfc(t)) / t */
    log_ratio = FMA(log_ratio, t, -0.000106026659f);
    log_ratio = FMA(log_ratio, t, 0.000587950752f);
    log_ratio = FMA(log_ratio, t, -0.0015767602f);
    log_ratio = FMA(log_ratio, t, 5.87815775e-05f);
    log_ratio = FMA(log_ratio, t, 0.0192171428f);
    log_ratio = FMA(log_ratio, t, -0.102799207f);
    log_ratio = FMA(log_ratio, t, -0.636616111f);
    log_ratio = FMA(log_ratio, t, -1.12837934f);
    float value = exp_within(log_ratio * t);
    return a > 4.2f ? 0.0f : value;
}

static inline float gelu(float x) {
    float tail = 0.5f * erfc_magnitude(x * 0.707106781f);
    return x * (x > 0.0f ? 1.0f - tail : tail);
}

static inline float gelu_tanh(float x) {
    /* 0.5 (1 + tanh u) = 1 / (1 + exp(-2 u)); below -19 it is 0 even in float64. */
    float u = 0.797884561f * FMA(0.044715f * x * x, x, x), y = x / (1.0f + exp_clamped(-2.0f * u));
    return u < -19.0f ? 0.0f * x : y;
}

static inline float silu(float x) { return x / (1.0f + exp_clamped(-x)); }

#if defined(__AVX512F__)
/* Half of erfc(a / sqrt 2) in pieces of a that are 0.4 wide, around 0, 0.4, 0.8, ...; polynomials in the distance from the
   middle, the highest power first. Largest error 3e-8, of which the fits have 7e-9. Half as many instructions as gelu. */
static const float GELU_TAILS[6][16] __attribute__((aligned(64))) = {
    {-0.000101402911f, -6.45469408e-05f, 1.03618768e-05f, 5.85860435e-05f, 5.47066775e-05f, 2.31075246e-05f,
     -2.92167488e-06f, -1.16714518e-05f, -9.42757561e-06f, -4.88327487e-06f, -1.87714681e-06f, -5.64488687e-07f,
     -1.36292428e-07f, -2.68228924e-08f, -4.34483649e-09f, 0.0f},
    {0.0f, -0.000442048447f, -0.000578964013f, -0.000386419415f, -8.48131385e-05f, 0.000113115428f, 0.000157149901f,
     0.000114326649f, 5.91989192e-05f, 2.36534524e-05f, 7.55014935e-06f, 1.96134079e-06f, 4.19354706e-07f,
     7.43487973e-08f, 1.09874216e-08f, 0.0f},
    {0.00425531622f, 0.0032996661f, 0.00111244153f, -0.000911332027f, -0.00184569904f, -0.00172771758f,
     -0.00113706081f, -0.000577520579f, -0.000234977211f, -7.80608098e-05f, -2.14113679e-05f, -4.88402202e-06f,
     -9.31034037e-07f, -1.48846212e-07f, -2.00092742e-08f, 0.0f},
    {0.0f, 0.0117842518f, 0.0185398441f, 0.0186417364f, 0.0141980089f, 0.00863874797f, 0.00429985113f, 0.00177307019f,
     0.000610300165f, 0.000176204296f, 4.28137573e-05f, 8.77541333e-06f, 1.51992595e-06f, 2.22749676e-07f,
     2.76497545e-08f, 0.0f},
    {-0.159576908f, -0.147308052f, -0.115876622f, -0.0776744261f, -0.0443683341f, -0.021596387f, -0.00895781163f,
     -0.00316618057f, -0.000953635259f, -0.000244760799f, -5.35321124e-05f, -9.97699863e-06f, -1.58452303e-06f,
     -2.14442281e-07f, -2.47306566e-08f, 0.0f},
    {0.5f, 0.344578266f, 0.211855412f, 0.115069672f, 0.0547992885f, 0.0227501299f, 0.00819753483f, 0.00255513028f,
     0.000687138294f, 0.000159108909f, 3.16714068e-05f, 5.41260397e-06f, 7.93345009e-07f, 9.96480054e-08f,
     1.07182627e-08f, 0.0f}};

static inline __m512 gelu_vector(__m512 x) {
    const __m512 pieces = _mm512_set1_ps(2.5f), rounder = _mm512_set1_ps(ROUNDER_EXP), one = _mm512_set1_ps(1.0f);
    /* The second operand, 6, also for NaN. From 5.8 on the tail is 0. */
    __m512 a = _mm512_min_ps(_mm512_abs_ps(x), _mm512_set1_ps(6.0f));
    __m512 shifted = _mm512_fmadd_ps(a, pieces, rounder);
    __m512 u = _mm512_fmsub_ps(a, pieces, _mm512_sub_ps(shifted, rounder));
    __m512i piece = _mm512_castps_si512(shifted); /* its low four bits, which the permutation looks at */
    __m512 tail = _mm512_permutexvar_ps(piece, _mm512_load_ps(GELU_TAILS[0]));
#pragma GCC unroll 5
    for (int i = 1; i < 6; i++)
        tail = _mm512_fmadd_ps(tail, u, _mm512_permutexvar_ps(piece, _mm512_load_ps(GELU_TAILS[i])));
    __mmask16 positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
    return _mm512_mul_ps(x, _mm512_mask_sub_ps(tail, positive, one, tail));
}
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
/* A call: inlined where `count` is a constant, the loops would be unrolled instead of vectorised. */
static __attribute__((noinline))
#else
static inline
#endif
void activate(float *y, int64_t count, int activation) {
    if (activation == RELU)
        for (int64_t i = 0; i < count; i++) y[i] = y[i] < 0.0f ? 0.0f : y[i];
    else if (activation == GELU)
        for (int64_t i = 0; i < count; i++) y[i] = gelu(y[i]);
    else if (activation == GELU_TANH)
        for (int64_t i = 0; i < count; i++) y[i] = gelu_tanh(y[i]);
    else if (activation == SILU)
        for (int64_t i = 0; i < count; i++) y[i] = silu(y[i]);
    else if (activation == RELU6)
        for (int64_t i = 0; i < count; i++) y[i] = clamp_float(y[i], 0.0f, 6.0f);
    else if (activation == HARDSWISH)
        for (int64_t i = 0; i < count; i++) y[i] = y[i] * clamp_float(y[i] + 3.0f, 0.0f, 6.0f) / 6.0f;
}

static inline void add_row(float *y, const void *from, int dtype, int64_t at, int64_t count) {
    if (dtype == FLOAT32)
        for (int64_t i = 0; i < count; i++) y[i] += load_float32(from, at + i);
    else if (dtype == BFLOAT16)
        for (int64_t i = 0; i < count; i++) y[i] += load_bfloat16(from, at + i);
    else
        for (int64_t i = 0; i < count; i++) y[i] += load_float16(from, at + i);
}

static inline void store_row(void *to, int dtype, int64_t at, const float *y, int64_t count) {
    if (dtype == FLOAT32)
        memcpy((float *)to + at, y, (size_t)count * sizeof *y);
    else if (dtype == BFLOAT16)
        for (int64_t i = 0; i < count; i++) ((uint16_t *)to)[at + i] = round_to_bfloat16(y[i]);
    else
        for (int64_t i = 0; i < count; i++) ((float16 *)to)[at + i] = (float16)y[i];
}

/* What becomes of the sums of a linear layer. bias: float32 [n] or NULL; residual (or NULL) and y: [m, n], contiguous, in
   the format `dtype`. */
typedef struct {
    const float *bias;
    const void *residual;
    int activation;
    void *y;
    int dtype;
    int64_t n;
} output;

#if defined(__AVX512F__)
static inline __m512 activate_vector(__m512 y, int activation) {
    if (activation == NONE) return y;
    if (activation == GELU) return gelu_vector(y);
    if (activation == RELU)
        return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_LT_OQ), _mm512_setzero_ps());
    float lanes[16];
    _mm512_storeu_ps(lanes, y);
    activate(lanes, 16, activation);
    return _mm512_loadu_ps(lanes);
}

/* Finishes 16 channels of a row, to which the bias is already added and of which those of `mask` exist; `at` is where the
   first stands in y. */
static inline __attribute__((always_inline)) void finish_vector(const output *out, __m512 y, int64_t at, __mmask16 mask) {
    y = activate_vector(y, out->activation);
    if (out->dtype == FLOAT32) {
        if (out->residual) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, (const float *)out->residual + at));
        _mm512_mask_storeu_ps((float *)out->y + at, mask, y);
        return;
    }
    if (out->residual) {
        const __m256i halves = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)out->residual + at);
        y = _mm512_add_ps(y, out->dtype == FLOAT16 ? _mm512_cvtph_ps(halves)
                                                   : _mm512_castsi512_ps(_mm512_slli_epi32(
                                                         _mm512_cvtepu16_epi32(halves), 16)));
    }
    __m256i halves;
    if (out->dtype == FLOAT16) {
        halves = _mm512_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else { /* as round_to_bfloat16 */
        const __m512i bits = _mm512_castps_si512(y), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i rounded = _mm512_srli_epi32(
            _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
        rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
        halves = _mm512_cvtepi32_epi16(rounded);
    }
    _mm256_mask_storeu_epi16((uint16_t *)out->y + at, mask, halves);
}

static inline __mmask16 first_channels(int64_t count) { return (__mmask16)(count < 16 ? (1u << count) - 1u : 0xffffu); }

/* Finishes y, `channels` floats that are already scaled, of one row; y has as many as whole vectors hold. */
static inline __attribute__((always_inline)) void finish_row(const output *out, float *y, int64_t row, int64_t channel,
                                                             int64_t channels) {
    for (int64_t i = 0; i < channels; i += 16) {
        const __mmask16 mask = first_channels(channels - i);
        __m512 v = _mm512_loadu_ps(y + i);
        if (out->bias) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, out->bias + channel + i));
        finish_vector(out, v, row * out->n + channel + i, mask);
    }
}
#elif defined(__AVX2__)
static inline __attribute__((always_inline)) __m256 load_eight(const void *from, int dtype, int64_t at) {
    if (dtype == FLOAT32) return _mm256_loadu_ps((const float *)from + at);
    const __m128i halves = _mm_loadu_si128((const __m128i *)((const uint16_t *)from + at));
    return dtype == FLOAT16 ? _mm256_cvtph_ps(halves)
                            : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

static inline __attribute__((always_inline)) void store_eight(void *to, int dtype, int64_t at, __m256 y) {
    if (dtype == FLOAT32) {
        _mm256_storeu_ps((float *)to + at, y);
        return;
    }
    __m128i halves;
    if (dtype == FLOAT16) {
        halves = _mm256_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else { /* as round_to_bfloat16 */
        const __m256i bits = _mm256_castps_si256(y), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_srli_epi32(
            _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(y, y, _CMP_UNORD_Q));
        const __m256i whole = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
        halves = _mm_packus_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    }
    _mm_storeu_si128((__m128i *)((uint16_t *)to + at), halves);
}

/* y: float32 [rows, panel], of which `channels` exist. An activation takes all rows at once. */
static inline __attribute__((always_inline)) void finish_block(const output *out, float *y, int panel,
                                                               const float *row_scale, int64_t row, int rows,
                                                               int64_t channel, int64_t channels) {
    const int64_t whole = channels / 8 * 8;
    if (row_scale || out->bias)
        for (int r = 0; r < rows; r++) {
            float *to = y + r * panel;
            const float scale = row_scale ? row_scale[r] : 1.0f;
            for (int64_t i = 0; i < whole; i += 8) {
                __m256 v = _mm256_mul_ps(_mm256_loadu_ps(to + i), _mm256_set1_ps(scale));
                if (out->bias) v = _mm256_add_ps(v, _mm256_loadu_ps(out->bias + channel + i));
                _mm256_storeu_ps(to + i, v);
            }
            for (int64_t i = whole; i < channels; i++) to[i] = to[i] * scale + (out->bias ? out->bias[channel + i] : -0.0f);
        }
    if (out->activation != NONE && channels == panel)
        activate(y, (int64_t)rows * panel, out->activation);
    else if (out->activation != NONE)
        for (int r = 0; r < rows; r++) activate(y + r * panel, channels, out->activation);
    for (int r = 0; r < rows; r++, y += panel) {
        const int64_t at = (row + r) * out->n + channel;
        for (int64_t i = 0; i < whole; i += 8) {
            __m256 v = _mm256_loadu_ps(y + i);
            if (out->residual) v = _mm256_add_ps(v, load_eight(out->residual, out->dtype, at + i));
            store_eight(out->y, out->dtype, at + i, v);
        }
        if (whole == channels) continue;
        if (out->residual) add_row(y + whole, out->residual, out->dtype, at + whole, channels - whole);
        store_row(out->y, out->dtype, at + whole, y + whole, channels - whole);
    }
}
#else
/* Finishes y, `channels` floats that are already scaled, of one row. */
static inline __attribute__((always_inline)) void finish_row(const output *out, float *y, int64_t row, int64_t channel,
                                                             int64_t channels) {
    if (out->bias)
        for (int64_t i = 0; i < channels; i++) y[i] += out->bias[channel + i];
    activate(y, channels, out->activation);
    int64_t at = row * out->n + channel;
    if (out->residual) add_row(y, out->residual, out->dtype, at, channels);
    store_row(out->y, out->dtype, at, y, channels);
}
#endif

/* sums: `rows` rows of `panel` floats, in place: times row_scale (or NULL), then bias, activation, residual and the cast;
   channels beyond n are dropped. */
static inline __attribute__((always_inline)) void finish_floats(const output *out, float *sums, int panel, const float *row_scale, int64_t row,
                                 int rows, int64_t channel) {
    int64_t channels = out->n - channel < panel ? out->n - channel : panel;
#if defined(__AVX2__) && !defined(__AVX512F__)
    if (channels == panel)
        finish_block(out, sums, panel, row_scale, row, rows, channel, panel);
    else
        finish_block(out, sums, panel, row_scale, row, rows, channel, channels);
#else
    for (int r = 0; r < rows; r++) {
        float *y = sums + r * panel;
        if (row_scale)
            for (int i = 0; i < panel; i++) y[i] *= row_scale[r];
        if (channels == panel)
            finish_row(out, y, row + r, channel, panel);
        else
            finish_row(out, y, row + r, channel, channels);
    }
#endif
}

#endif
