/* What the convolution kernels share: the description of one step of a network, and vectors of the instruction set.

   Images are NHWC: pixel i of a tensor begins at i * (its stride); the channels of a pixel are contiguous. */
#ifndef TILEWRIGHT_CONV_H
#define TILEWRIGHT_CONV_H

#include <stdint.h>

#include "activation.h"

#define JOIN_(name, isa) name##_##isa
#define JOIN(name, isa) JOIN_(name, isa)
#define EXPORT __attribute__((visibility("default")))

/* How a value is stored. UINT8 stands for value + 128; NONNEGATIVE is an int8 that is known to be 0 to 127. */
enum { FLOAT32, INT8, UINT8, NONNEGATIVE };
enum { CONV, DEPTHWISE, MAX_POOL, MEAN, ADD, MULTIPLY, CONVERT, ACTIVATE, WINOGRAD, MARK };

/* kernels/cpu/steps.py holds the same structure. Strides count elements from one pixel to the next. */
typedef struct {
    int32_t kind, x_type, y_type, r_type, activation, gather; /* gather: copy windows that are too ragged to read */
    int64_t batch, height, width, channels, out_height, out_width, out_channels;
    int64_t kernel_height, kernel_width, stride_height, stride_width, top, left, dilation_height, dilation_width, groups;
    int64_t x_stride, y_stride, r_stride;
    int64_t x_image, x_row, x_channel; /* CONVERT alone: strides of the source */
    int64_t marks_count;               /* CONVERT and MARK: each mark stands for as many rows, or pixels */
    const void *x, *weight, *residual;
    void *y;
    const float *scale, *bias;   /* padded to whole vectors for each group */
    const int32_t *compensation; /* likewise: the sums of the weights times -(128 + x_zero) */
    const void *outside; /* of integers: a pixel of padding, channels bytes that stand for zeros */
    const float *plain; /* WINOGRAD alone: the weight itself, OHWI */
    float *marks;       /* NaN, or 0: written by CONVERT where a value is not finite, read by MARK */
    float slope, x_scale, r_scale, y_scale;
    float x_zero, r_zero, y_zero; /* whole numbers: integers stand for (value - zero) * scale */
} tw_step;

/* A part of each kernel's work: that of thread `number` of `count`. */
void JOIN(tw_float_conv, TILEWRIGHT_ISA)(const tw_step *step, int number, int count);
void JOIN(tw_float_depthwise, TILEWRIGHT_ISA)(const tw_step *step, int number, int count);
void JOIN(tw_winograd, TILEWRIGHT_ISA)(const tw_step *step, int number, int count);
void JOIN(tw_int8_conv, TILEWRIGHT_ISA)(const tw_step *step, int number, int count);
void JOIN(tw_int8_depthwise, TILEWRIGHT_ISA)(const tw_step *step, int number, int count);
void JOIN(tw_simple_step, TILEWRIGHT_ISA)(const tw_step *step, int number, int count);

/* What padding of float32 reads: as many zeros as the largest pixel that the kernels take has bytes. */
#define LARGEST_PIXEL 65536
extern const char tw_zeros[LARGEST_PIXEL];

/* Room for each thread to work in. */
#define TW_SCRATCH_BYTES (768 << 10)
extern _Thread_local char tw_scratch[TW_SCRATCH_BYTES];

static inline void share_of(int64_t items, int number, int count, int64_t *begin, int64_t *end) {
    *begin = items * number / count;
    *end = items * (number + 1) / count;
}

#endif
