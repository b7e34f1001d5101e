/* What the convolution kernels share: how values are stored, and the steps of programs (program.h) that they do.

   Images are NHWC: pixel i of a tensor begins at i * (its stride); the channels of a pixel are contiguous. */
#ifndef TILEWRIGHT_CONV_H
#define TILEWRIGHT_CONV_H

#include <stdint.h>

#include "activation.h"
#include "program.h"

#define JOIN_(name, isa) name##_##isa
#define JOIN(name, isa) JOIN_(name, isa)
#define EXPORT __attribute__((visibility("default")))

/* How a value is stored. UINT8 stands for value + 128; NONNEGATIVE is an int8 that is known to be 0 to 127. */
enum { FLOAT32, INT8, UINT8, NONNEGATIVE };
/* A part of each kernel's work: that of thread `number` of `count`. */
void JOIN(tw_float_conv, TILEWRIGHT_ISA)(const tw_step *step, int number, int count);
void JOIN(tw_float_depthwise, TILEWRIGHT_ISA)(const tw_step *step, int number, int count);
void JOIN(tw_winograd, TILEWRIGHT_ISA)(const tw_step *step, int number, int count);
/* The steps of a band from the first one on, for threads that all do this. */
void JOIN(tw_band, TILEWRIGHT_ISA)(const tw_step *steps, int number, int count);
void JOIN(tw_int8_conv, TILEWRIGHT_ISA)(const tw_step *step, int number, int count);
void JOIN(tw_int8_depthwise, TILEWRIGHT_ISA)(const tw_step *step, int number, int count);
void JOIN(tw_simple_step, TILEWRIGHT_ISA)(const tw_step *step, int number, int count);

/* What padding of float32 reads: as many zeros as the largest pixel that the kernels take has bytes. */
#define LARGEST_PIXEL 65536
extern const char tw_zeros[LARGEST_PIXEL];

#endif
