/* How many of many numbers fall into each of equal bins around zero: the bits of torch.histc, in a fifth of its time. */
#include "numbers.h"
#include "parallel.h"

/* Numbers whose bins are computed together, as vectors; and how many tables take turns, since a number often falls into
   the bin of the one before, whose count is then still on its way to memory. */
enum { BLOCK = 256, TURNS = 4 };

typedef struct {
    const float *x;
    int64_t count, bins;
    float limit;
    uint32_t *counts;
} histogram_job;

static void histogram_part(void *data) {
    const histogram_job *job = data;
    int64_t begin, end;
    int number, threads;
    tw_share((job->count + BLOCK - 1) / BLOCK, &begin, &end);
    begin *= BLOCK, end = end * BLOCK < job->count ? end * BLOCK : job->count;
    tw_team(&number, &threads);
    uint32_t *counts = job->counts + number * TURNS * job->bins;
    const float limit = job->limit, bins = (float)job->bins, range = limit + limit;
    const int32_t last = (int32_t)job->bins - 1;
    for (int64_t at = begin; at < end; at += BLOCK) {
        int32_t bin[BLOCK];
        const int n = end - at < BLOCK ? (int)(end - at) : BLOCK;
        for (int i = 0; i < n; i++) {
            const int32_t place = (int32_t)((job->x[at + i] + limit) * bins / range);
            bin[i] = place < last ? place : last;
        }
        int i = 0;
        for (; i + TURNS <= n; i += TURNS)
            for (int turn = 0; turn < TURNS; turn++) counts[turn * job->bins + bin[i + turn]]++;
        for (; i < n; i++) counts[bin[i]]++;
    }
}

/* x: `count` finite floats within [-limit, limit]. counts: [threads, 4, bins], zero before; the sum over the first two is
   the histogram, whatever the number of threads. */
EXPORT int ISA_NAME(tw_histogram)(const float *x, int64_t count, float limit, int64_t bins, uint32_t *counts,
                                   int threads) {
    histogram_job job = {x, count, bins, limit, counts};
    tw_parallel(histogram_part, &job, threads);
    return 0;
}
