/* Linear layers that are called again and again: whatever stays the same from call to call is in one array of numbers. To
   hand over nineteen arguments takes ctypes two microseconds, four take half of one.

   given: the kernel's arguments from its weight to its factors for channels, then the format of x, its rows, its columns,
   the activation, the bytes of each scratch area, and what follows those in the kernel's list. x: contiguous rows; y: the
   result, in the same format; there is no residual. scratch: room for all areas and 64 bytes for each, or NULL: then they
   are on the stack. Returns what the kernel does. */
#include <stddef.h>

#include "numbers.h"

#define KERNEL(name) ISA_NAME(tw_##name)
#define AT(i) ((void *)(intptr_t)given[i])

int KERNEL(int8_linear)(const int8_t *, const int32_t *, int64_t, int64_t, const float *, const float *, const float *,
                        const void *, int, int64_t, int64_t, const void *, int, void *, uint8_t *, float *, int64_t, int,
                        int);
int KERNEL(int4_int8_linear)(const uint8_t *, const float *, const uint8_t *, int64_t, int64_t, int64_t, const float *,
                             const float *, const void *, int, int64_t, int64_t, const void *, int, void *, int8_t *,
                             int32_t *, float *, int64_t, int, int);
int KERNEL(weight_only_linear)(int, const uint8_t *, const float *, const uint8_t *, int64_t, int64_t, int64_t,
                               const float *, const void *, int, int64_t, int64_t, const void *, int, void *, int, void *,
                               float *, int64_t, int, int);

static int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

/* areas[i]: `bytes[i]` bytes, from the beginning of a line on. */
#define AREAS(count, bytes)                                                                                            \
    int64_t total = 64;                                                                                                \
    for (int i = 0; i < (count) && !scratch; i++) total += whole_lines((bytes)[i]);                                    \
    uint8_t memory[total], *areas[count], *next = scratch ? scratch : memory;                                          \
    next += -(uintptr_t)next & 63;                                                                                     \
    for (int i = 0; i < (count); i++) areas[i] = next, next += whole_lines((bytes)[i]);

EXPORT int ISA_NAME(tw_call_int8_linear)(const int64_t *given, const void *x, void *y, uint8_t *scratch) {
    AREAS(2, given + 11)
    return KERNEL(int8_linear)(AT(0), AT(1), given[2], given[3], AT(4), AT(5), AT(6), x, (int)given[7], given[8],
                               given[9], NULL, (int)given[10], y, areas[0], (float *)areas[1], given[13],
                               (int)given[14], (int)given[15]);
}

EXPORT int ISA_NAME(tw_call_int4_int8_linear)(const int64_t *given, const void *x, void *y, uint8_t *scratch) {
    AREAS(3, given + 12)
    return KERNEL(int4_int8_linear)(AT(0), AT(1), AT(2), given[3], given[4], given[5], AT(6), AT(7), x, (int)given[8],
                                    given[9], given[10], NULL, (int)given[11], y, (int8_t *)areas[0],
                                    (int32_t *)areas[1], (float *)areas[2], given[15], (int)given[16], (int)given[17]);
}

EXPORT int ISA_NAME(tw_call_weight_only_linear)(const int64_t *given, const void *x, void *y, uint8_t *scratch) {
    AREAS(2, given + 12)
    return KERNEL(weight_only_linear)((int)given[0], AT(1), AT(2), AT(3), given[4], given[5], given[6], AT(7), x,
                                      (int)given[8], given[9], given[10], NULL, (int)given[11], y, (int)given[14],
                                      areas[0], (float *)areas[1], given[15], (int)given[16], (int)given[17]);
}
