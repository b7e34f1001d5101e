/* An activation by itself, in the code that linear layers end in: the same bits wherever a number stands. */
#include "epilogue.h"
#include "parallel.h"

/* Numbers that a thread takes at least. */
enum { RUN = 1024 };

typedef struct {
    float *y;
    int64_t count;
    int activation;
} activate_job;

static void activate_part(void *data) {
    const activate_job *job = data;
    int64_t begin, end;
    tw_share((job->count + RUN - 1) / RUN, &begin, &end);
    begin *= RUN, end = end * RUN < job->count ? end * RUN : job->count;
#if defined(__AVX512F__)
    for (int64_t i = begin; i < end; i += 16) {
        const __mmask16 mask = first_channels(end - i);
        _mm512_mask_storeu_ps(job->y + i, mask, activate_vector(_mm512_maskz_loadu_ps(mask, job->y + i), job->activation));
    }
#else
    if (begin < end) activate(job->y + begin, end - begin, job->activation);
#endif
}

/* y: `count` floats, in place. */
EXPORT int ISA_NAME(tw_activate)(float *y, int64_t count, int activation, int threads) {
    activate_job job = {y, count, activation};
    tw_parallel(activate_part, &job, threads);
    return 0;
}
