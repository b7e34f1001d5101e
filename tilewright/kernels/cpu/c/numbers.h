/* Reading and writing the three float formats, and the bits of a float. */
#ifndef TILEWRIGHT_NUMBERS_H
#define TILEWRIGHT_NUMBERS_H

#include <stdint.h>
#include <string.h>

enum { FLOAT32, BFLOAT16, FLOAT16 };

#ifdef __FLT16_MAX__
#define HAS_FLOAT16 1
typedef _Float16 float16;
#else
#define HAS_FLOAT16 0
typedef uint16_t float16; /* never read: the entry points refuse the format */
#endif

#define JOIN_(name, isa) name##_##isa
#define JOIN(name, isa) JOIN_(name, isa)
/* A symbol of this build: name_<instruction set>. */
#define ISA_NAME(name) JOIN(name, TILEWRIGHT_ISA)
#define EXPORT __attribute__((visibility("default")))
/* For switches over the rows of a tile, whose loops unroll when the number is known. */
#define UP_TO_6(CASE) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)

static inline float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float load_float32(const float *x, int64_t i) { return x[i]; }
static inline float load_bfloat16(const uint16_t *x, int64_t i) { return from_bits((uint32_t)x[i] << 16); }
static inline float load_float16(const float16 *x, int64_t i) { return (float)x[i]; }

/* Half to even; a NaN stays one, whatever its low bits. */
static inline uint16_t round_to_bfloat16(float value) {
    uint32_t bits = to_bits(value);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

#endif
