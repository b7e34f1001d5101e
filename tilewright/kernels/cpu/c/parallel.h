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

/* Units of work that threads take one after the other: one that is held up by another process takes fewer. Two counters,
   since some threads may still ask for units of one round when others have begun the next. */
typedef struct {
    int64_t taken[2];
} tw_queue;

/* The first of `step` units that the calling thread is to do in round number `round`; beyond the last when none are
   left. */
static inline int64_t tw_take(tw_queue *queue, int64_t round, int64_t step) {
    return __atomic_fetch_add(&queue->taken[round & 1], step, __ATOMIC_RELAXED);
}

/* Makes the round after `round` possible: by one thread, before the barrier that begins `round` and after the one that
   ended the round before. */
static inline void tw_refill(tw_queue *queue, int64_t round) { queue->taken[(round + 1) & 1] = 0; }

/* Inside tw_parallel: waits until every thread has come here. */
void tw_barrier(void);

#endif
