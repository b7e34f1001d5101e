/* Sharing rows among the threads of the OpenMP runtime that PyTorch uses.

   Nothing here is linked with an OpenMP library: a process that holds two of them runs twice as many threads as it has
   cores. The entry points of PyTorch's own are handed over once, by tw_use_openmp. */
#ifndef TILEWRIGHT_PARALLEL_H
#define TILEWRIGHT_PARALLEL_H

#include <stdint.h>

typedef void (*tw_body)(void *data);

/* Runs body(data) on `threads` threads of the runtime, or once where there is none. */
void tw_parallel(tw_body body, void *data, int threads);

/* The calling thread's part [*begin, *end) of `count` items inside tw_parallel. */
void tw_share(int64_t count, int64_t *begin, int64_t *end);

/* The calling thread's number inside tw_parallel, and how many there are. */
void tw_team(int *number, int *count);

/* Inside tw_parallel: waits until every thread has come here. */
void tw_barrier(void);

#endif
