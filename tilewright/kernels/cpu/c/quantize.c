/* Per-row int8 quantisation as a call of its own. */
#include "parallel.h"
#include "quantize_row.h"

typedef struct {
    const void *x;
    int dtype;
    int64_t rows, columns, row_stride;
    const float *channel_scale;
    int zero_point;
    uint8_t *q;
    float *scale;
} quantize_job;

static void quantize_part(void *data) {
    const quantize_job *job = data;
    int64_t begin, end;
    tw_share(job->rows, &begin, &end);
    const int64_t element = job->dtype == FLOAT32 ? 4 : 2;
    quantize_rows((const char *)job->x + begin * job->row_stride * element, job->dtype, end - begin, job->row_stride,
                  job->columns, job->channel_scale, job->zero_point, job->q + begin * job->columns, job->columns,
                  job->scale + begin);
}

/* x [rows, columns]: its rows lie row_stride elements apart, their columns side by side. channel_scale: [columns] or
   NULL. q: [rows, columns], scale: [rows]. Returns 0, or 1 for a format that this build cannot read. */
EXPORT int ISA_NAME(tw_quantize_rows)(const void *x, int dtype, int64_t rows, int64_t columns, int64_t row_stride,
                                      const float *channel_scale, int zero_point, uint8_t *q, float *scale,
                                      int threads) {
    if (dtype == FLOAT16 && !HAS_FLOAT16) return 1;
    quantize_job job = {x, dtype, rows, columns, row_stride, channel_scale, zero_point, q, scale};
    tw_parallel(quantize_part, &job, threads);
    return 0;
}
