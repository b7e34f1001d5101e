/* What convolutions read outside an image. */
#include "conv.h"

#include <string.h>

const char tw_zeros[LARGEST_PIXEL] __attribute__((aligned(64))) = {0};

/* Of the library and not of each instruction set, or every thread would have one for each. */
_Alignas(64) _Thread_local char tw_scratch[TW_SCRATCH_BYTES];
