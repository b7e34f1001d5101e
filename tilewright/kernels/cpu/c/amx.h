/* Products of tiles (AMX). A tile is 16 rows of 64 bytes. C += A B takes 16 rows of A, and of B the transpose, four
   consecutive k of 16 channels in each row, and adds 16 x 16 sums of 64 products each.

   What tiles hold and how they are shaped belongs to a thread and is shared with all other code that it runs, oneDNN's
   too: each part of a job brings its own shapes and leaves none behind. */
#ifndef TILEWRIGHT_AMX_H
#define TILEWRIGHT_AMX_H

#if defined(__AMX_TILE__)

#include <immintrin.h>
#include <stdint.h>

enum { AMX_ROWS = 16, AMX_BYTES = 64, AMX_CHANNELS = 16, AMX_TILE = AMX_ROWS * AMX_BYTES };

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} amx_shapes;

static inline void amx_begin(void) {
    amx_shapes shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) shapes.row_bytes[i] = AMX_BYTES, shapes.rows[i] = AMX_ROWS;
    _tile_loadconfig(&shapes);
}

static inline void amx_end(void) { _tile_release(); }

/* Some compilers do not know that loading a tile reads memory: what was written before must be there. */
#define AMX_WRITTEN() __asm__ volatile("" ::: "memory")

#endif
#endif
