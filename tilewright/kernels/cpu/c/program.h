/* A program: an array of steps, run one after the other by all threads of one parallel region.

   Each kernel offers a function of (step, number, threads): the part of thread `number` of that step. Between two steps
   the threads wait for each other, unless the second is `independent` of the first. */
#ifndef TILEWRIGHT_PROGRAM_H
#define TILEWRIGHT_PROGRAM_H

#include <stdint.h>

#include "parallel.h"

enum { CONV, DEPTHWISE, MAX_POOL, MEAN, ADD, MULTIPLY, CONVERT, ACTIVATE, WINOGRAD, MARK, INT8_QUANTIZE, INT8_PRODUCT,
       ATTENTION, NORM, INT4_QUANTIZE, INT4_PRODUCT, WEIGHT_ONLY_CONVERT, WEIGHT_ONLY_PRODUCT, RMS_NORM,
       ELEMENTWISE };

/* Bits of in_slot. */
enum { X_IN_SLOT = 1, RESIDUAL_IN_SLOT = 2, Y_IN_SLOT = 4, MARKS_IN_SLOT = 8 };

/* What a step took, for those who ask: from the moment that no thread was busy with what came before it to the moment
   that none was busy with it. */
typedef struct {
    int64_t nanoseconds, calls;
} tw_count;

/* kernels/cpu/steps.py holds the same structure. Steps of networks of images are described by what stands here (conv.h);
   those of transformers by a structure of their kernel, `job`. Strides count elements from one pixel to the next. */
typedef struct {
    int32_t kind, x_type, y_type, r_type, activation, gather; /* gather: copy windows that are too ragged to read */
    int32_t independent; /* reads nothing that the step before writes, and writes nothing that it reads or writes */
    int32_t band; /* > 1: so many steps from this one on may be done together, as conv_band.c does */
    int32_t chain;       /* so many steps from this one on are taken image by image, each by one thread; 0: this one alone */
    int32_t in_slot;     /* in a chain, which operands (IN_SLOT) are of one image, and that of the next thread lies slot_bytes on */
    int64_t batch, height, width, channels, out_height, out_width, out_channels;
    int64_t kernel_height, kernel_width, stride_height, stride_width, top, left, dilation_height, dilation_width, groups;
    int64_t x_stride, y_stride, r_stride;
    int64_t x_image, x_row, x_channel; /* CONVERT alone: strides of the source */
    int64_t marks_count;               /* each mark stands for as many rows, or pixels */
    int64_t slot_bytes;
    const void *x, *weight, *residual;
    void *y;
    const float *scale, *bias;   /* padded to whole vectors for each group */
    const int32_t *compensation; /* likewise: the sums of the weights times -(128 + x_zero) */
    const int32_t *signed_compensation; /* likewise, times -x_zero: of kernels that multiply signed by signed */
    const void *outside; /* of integers: a pixel of padding, channels bytes that stand for zeros */
    const float *plain; /* WINOGRAD alone: the weight itself, OHWI */
    float *marks; /* NaN, or 0: written by CONVERT and MULTIPLY where a value is not finite, read by MARK */
    float slope, x_scale, r_scale, y_scale;
    float x_zero, r_zero, y_zero; /* whole numbers: integers stand for (value - zero) * scale */
    const void *job; /* INT8_QUANTIZE and all after it */
    tw_queue units;  /* of those: emptied before the program runs */
    tw_count *count; /* of the step and of those that run together with it; NULL: nobody asks */
} tw_step;

/* Room for each thread to work in. */
#define TW_SCRATCH_BYTES (768 << 10)
extern _Thread_local char tw_scratch[TW_SCRATCH_BYTES];

/* The part of `items` that is thread number `number`'s. */
static inline void share_of(int64_t items, int number, int count, int64_t *begin, int64_t *end) {
    *begin = items * number / count;
    *end = items * (number + 1) / count;
}

#endif
