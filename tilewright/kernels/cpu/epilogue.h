/* What follows an integer product: activations over a run of floats, and the one cast at the end.

   exp and erf are polynomials, so that the loops vectorise and give the same bits in every lane and at every position.
   Coefficients: fits to the largest error, rounded to float32. Largest errors of the fits: exp 2e-8 relative, erfc 2e-9
   absolute on [0, 4.2]. */
#ifndef TILEWRIGHT_EPILOGUE_H
#define TILEWRIGHT_EPILOGUE_H

#include "numbers.h"

enum { ACT_NONE, ACT_RELU, ACT_GELU, ACT_GELU_TANH, ACT_SILU };

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

static inline void activate(float *y, int64_t count, int activation) {
    if (activation == ACT_RELU)
        for (int64_t i = 0; i < count; i++) y[i] = y[i] < 0.0f ? 0.0f : y[i];
    else if (activation == ACT_GELU)
        for (int64_t i = 0; i < count; i++) y[i] = gelu(y[i]);
    else if (activation == ACT_GELU_TANH)
        for (int64_t i = 0; i < count; i++) y[i] = gelu_tanh(y[i]);
    else if (activation == ACT_SILU)
        for (int64_t i = 0; i < count; i++) y[i] = silu(y[i]);
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

/* sums: `rows` rows of `panel` floats, in place: times row_scale (or NULL), then as finish_row; channels beyond n are
   dropped. */
static inline __attribute__((always_inline)) void finish_floats(const output *out, float *sums, int panel, const float *row_scale, int64_t row,
                                 int rows, int64_t channel) {
    int64_t channels = out->n - channel < panel ? out->n - channel : panel;
    for (int r = 0; r < rows; r++) {
        float *y = sums + r * panel;
        if (row_scale)
            for (int i = 0; i < panel; i++) y[i] *= row_scale[r];
        if (channels == panel)
            finish_row(out, y, row + r, channel, panel);
        else
            finish_row(out, y, row + r, channel, channels);
    }
}

#endif
