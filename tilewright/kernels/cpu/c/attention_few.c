/* Attention of few queries to many keys (attention.h), as in a step of a decoder: the keys and values are read once, where
   they lie, by all queries of the heads that share them.

   A unit of work is PART keys of one head of keys. Whoever does the last part of a head adds up what all parts of it have
   given, in their order: the parts are the same on any number of threads, and so is the result. */
#include "attention.h"

#include <string.h>

#ifdef LANES

/* Sums in registers, of which AVX-512 has 32 and AVX2 16: rows of queries times keys, or times vectors of values. */
#if defined(__AVX512F__)
enum { ROWS = 4, WIDE_ROWS = 3 };
#else
enum { ROWS = 2, WIDE_ROWS = 1 };
#endif
/* Keys and values come from memory, and the processor's own prefetching begins anew in each page: so many bytes ahead they
   are asked for. */
enum { AHEAD = 8192 };
/* A chain of sums of values is SEGMENT long at most, for the sake of its error. */
enum { PART = 128, SEGMENT = 32 };

static int64_t parts_of(const attention *job) { return (job->keys + PART - 1) / PART; }

/* What keys and values are. */
enum { FLOATS, CODES, BFLOATS };

static int kind_of(const attention *job) { return job->k_scale ? CODES : job->bfloat16 ? BFLOATS : FLOATS; }

/* Whether what parts give lies in scratch memory, where it is added up, and not in y. */
static int is_apart(const attention *job) { return parts_of(job) > 1 || job->bfloat16; }

/* What a part gives of a query: the values, the largest score, and the sum of the exponentials. */
static int64_t part_floats(const attention *job) { return job->value_width + 2; }

int64_t ISA_NAME(tw_few_floats)(const attention *job) {
    return is_apart(job) ? job->batch * job->heads * job->queries * parts_of(job) * part_floats(job) : 0;
}

void ISA_NAME(tw_few_begin)(const attention *job) {
    if (job->done) memset(job->done, 0, (size_t)(job->batch * job->kv_heads) * sizeof *job->done);
}

INLINE int64_t bytes_of(int kind) {
    return kind == CODES ? sizeof(int8_t) : kind == BFLOATS ? sizeof(uint16_t) : sizeof(float);
}

INLINE int64_t rows_ahead(int kind, int64_t width) { return AHEAD / bytes_of(kind) / width + 1; }

/* Element i of keys or values. */
INLINE const void *element(int kind, const void *from, int64_t i) { return (const char *)from + i * bytes_of(kind); }

/* The kind of queries, results, and of what is new. */
INLINE int kind_given(int kind) { return kind == BFLOATS ? BFLOATS : FLOATS; }

/* n numbers, a product for each code: what reads codes gives the bits that it would of numbers made of them before. */
INLINE vec load(int kind, const void *from, int n, vec scale) {
    if (kind == CODES) return v_mul(v_load_int8(from, n), scale);
    if (kind == BFLOATS) return v_load_bfloat16(from, n);
    return n == LANES ? v_load(from) : v_load_first(from, n);
}

/* scores[r][j] = q[r] . key j, of `rows` queries and `keys` keys, which are constants wherever this is called. */
INLINE void score_block(int rows, int kind, int keys, int64_t width, const void *const *q, const void *const *k,
                        const float *key_scale, int64_t ahead, float (*scores)[PART], int64_t at) {
    vec sum[ROWS][8], scale[8];
#pragma GCC unroll 8
    for (int i = 0; i < keys; i++) scale[i] = kind == CODES ? v_set(key_scale[i]) : v_zero();
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < keys; i++) sum[r][i] = v_zero();
    int64_t c = 0;
    for (; c + LANES <= width; c += LANES) {
        vec a[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) a[r] = load(kind_given(kind), element(kind_given(kind), q[r], c), LANES, v_zero());
#pragma GCC unroll 8
        for (int i = 0; i < keys; i++) {
            const vec b = load(kind, element(kind, k[i], c), LANES, scale[i]);
            __builtin_prefetch(element(kind, k[i], c + ahead));
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) sum[r][i] = v_add_product(sum[r][i], a[r], b);
        }
    }
    if (c < width) {
        const int n = (int)(width - c);
#pragma GCC unroll 8
        for (int i = 0; i < keys; i++) {
            const vec b = load(kind, element(kind, k[i], c), n, scale[i]);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                const vec a = load(kind_given(kind), element(kind_given(kind), q[r], c), n, v_zero());
                sum[r][i] = v_add_product(sum[r][i], a, b);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < keys; i++) scores[r][at + i] = v_total(sum[r][i]);
}

INLINE void score(int rows, int kind, const attention *job, const void *const *q, const void *k, const float *scales,
                  int64_t count, float (*scores)[PART]) {
    const int keys = rows == 1 ? 8 : 4;
    const int64_t ahead = rows_ahead(kind, job->width) * job->k_stride[2];
    for (int64_t j = 0; j < count; j += keys) {
        const void *at[8];
        float scale[8];
        for (int i = 0; i < keys; i++) { /* beyond the last key: the last one again */
            const int64_t key = j + i < count ? j + i : count - 1;
            at[i] = element(kind, k, key * job->k_stride[2]);
            scale[i] = kind == CODES ? scales[key] : 0.0f;
        }
        score_block(rows, kind, keys, job->width, q, at, scale, ahead, scores, j);
    }
}

/* to[r] = sum_j p[r][j] v[j], of `vectors` vectors of channels, or of the first n channels of one. */
INLINE void add_values(int rows, int kind, int vectors, int n, const float (*p)[PART], const void *v,
                       const float *scales, int64_t stride, int64_t ahead, int64_t count, float *const *to,
                       int64_t channel) {
    for (int64_t begin = 0; begin < count; begin += SEGMENT) {
        const int64_t end = count - begin < SEGMENT ? count : begin + SEGMENT;
        vec sum[ROWS][8];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
            for (int i = 0; i < vectors; i++) sum[r][i] = v_zero();
        for (int64_t j = begin; j < end; j++) {
            const void *row = element(kind, v, j * stride + channel);
            const vec scale = kind == CODES ? v_set(scales[j]) : v_zero();
            vec a[ROWS];
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) a[r] = v_set(p[r][j]);
#pragma GCC unroll 8
            for (int i = 0; i < vectors; i++) {
                const vec b = load(kind, element(kind, row, i * LANES), n, scale);
                __builtin_prefetch(element(kind, row, i * LANES + ahead));
#pragma GCC unroll 8
                for (int r = 0; r < rows; r++) sum[r][i] = v_add_product(sum[r][i], a[r], b);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
            for (int i = 0; i < vectors; i++) {
                float *at = to[r] + channel + i * LANES;
                if (n == LANES)
                    v_store(at, begin ? v_add(v_load(at), sum[r][i]) : sum[r][i]);
                else
                    v_store_first(at, begin ? v_add(v_load_first(at, n), sum[r][i]) : sum[r][i], n);
            }
    }
}

INLINE void add_all_values(int rows, int kind, const attention *job, const float (*p)[PART], const void *v,
                           const float *scales, int64_t count, float *const *to) {
    const int vectors = rows <= WIDE_ROWS ? 8 : 4;
    const int64_t width = job->value_width, stride = job->v_stride[2], ahead = rows_ahead(kind, width) * stride;
    int64_t c = 0;
    for (; c + vectors * LANES <= width; c += vectors * LANES)
        add_values(rows, kind, vectors, LANES, p, v, scales, stride, ahead, count, to, c);
    for (; c + LANES <= width; c += LANES)
        add_values(rows, kind, 1, LANES, p, v, scales, stride, ahead, count, to, c);
    if (c < width) add_values(rows, kind, 1, (int)(width - c), p, v, scales, stride, ahead, count, to, c);
}

static float *scales_of(float *scales, const int64_t *stride, int64_t batch, int64_t kv_head) {
    return scales + batch * stride[0] + kv_head * stride[1];
}

/* One part of a head of keys for queries `first` and on, `rows` of them. A query is numbered by its head, among those that
   share the keys, and its position. */
INLINE void attend_rows(int rows, int kind, const attention *job, int64_t batch, int64_t kv_head, int64_t part,
                        int64_t first) {
    const int64_t group = job->heads / job->kv_heads, parts = parts_of(job), begin = part * PART;
    const int64_t count = job->keys - begin < PART ? job->keys - begin : PART;
    const void *k = element(
        kind, job->k, batch * job->k_stride[0] + kv_head * job->k_stride[1] + begin * job->k_stride[2]);
    const void *v = element(
        kind, job->v, batch * job->v_stride[0] + kv_head * job->v_stride[1] + begin * job->v_stride[2]);
    const float *k_scale = kind == CODES ? scales_of(job->k_scale, job->k_scale_stride, batch, kv_head) + begin : NULL;
    const float *v_scale = kind == CODES ? scales_of(job->v_scale, job->v_scale_stride, batch, kv_head) + begin : NULL;
    const int given = kind_given(kind), apart = is_apart(job);
    const void *q[ROWS];
    float scores[ROWS][PART], *to[ROWS];
    for (int r = 0; r < rows; r++) {
        const int64_t head = kv_head * group + (first + r) / job->queries, query = (first + r) % job->queries;
        q[r] = element(given, job->q,
                       batch * job->q_stride[0] + head * job->q_stride[1] + query * job->q_stride[2]);
        to[r] = apart ? job->scratch + (((batch * job->heads + head) * job->queries + query) * parts + part) *
                                               part_floats(job)
                          : (float *)job->y + ((batch * job->queries + query) * job->heads + head) * job->value_width;
    }
    score(rows, kind, job, q, k, k_scale, count, scores);
    float largest[ROWS], total[ROWS];
    for (int r = 0; r < rows; r++) {
        const int64_t head = kv_head * group + (first + r) / job->queries, query = (first + r) % job->queries;
        const int64_t last = job->causal && query < begin + count ? query - begin : count - 1;
        query_mask mask = mask_of(job, batch, head, query);
        if (mask.seen) mask.seen += begin * mask.step;
        if (mask.added) mask.added += begin * mask.step;
        const float sink = apart ? -INFINITY : sink_of(job, batch, head); /* once */
        total[r] = exponentiate(job, mask, scores[r], count, last, sink, &largest[r]);
    }
    add_all_values(rows, kind, job, (const float(*)[PART])scores, v, v_scale, count, to);
    for (int r = 0; r < rows; r++) {
        if (apart) {
            to[r][job->value_width] = largest[r];
            to[r][job->value_width + 1] = total[r];
        } else {
            const float inverse = total[r] == 0.0f ? 0.0f : 1.0f / total[r];
            for (int64_t c = 0; c < job->value_width; c++) to[r][c] *= inverse;
        }
    }
}

/* What the parts of one query make together. */
static void join_parts(const attention *job, int64_t batch, int64_t head, int64_t query) {
    const int64_t parts = parts_of(job), floats = part_floats(job), width = job->value_width;
    float *part = job->scratch + ((batch * job->heads + head) * job->queries + query) * parts * floats;
    const int64_t at = ((batch * job->queries + query) * job->heads + head) * width;
    float *y = job->bfloat16 ? part : (float *)job->y + at;
    const float sink = sink_of(job, batch, head);
    float largest = sink, total = 0.0f;
    for (int64_t i = 0; i < parts; i++)
        if (part[i * floats + width] > largest) largest = part[i * floats + width];
    if (largest == -INFINITY) largest = 0.0f; /* nothing is seen, or NaN */
    for (int64_t i = 0; i < parts; i++) {
        const float *from = part + i * floats;
        const float factor = exp_below(from[width], largest);
        total += factor * from[width + 1];
        for (int64_t c = 0; c < width; c += LANES) {
            const int n = (int)(width - c < LANES ? width - c : LANES);
            const vec value = v_mul(v_set(factor), v_load_first(from + c, n));
            v_store_first(y + c, i ? v_add(v_load_first(y + c, n), value) : value, n);
        }
    }
    total += exp_below(sink, largest);
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    if (!job->bfloat16)
        for (int64_t c = 0; c < width; c++) y[c] *= inverse;
    else
        for (int64_t c = 0; c < width; c++) ((uint16_t *)job->y)[at + c] = round_to_bfloat16(y[c] * inverse);
}

/* Whether no query sees a key of the part, as in what a cache of fixed size has not been filled with. */
static int is_unseen(const attention *job, int64_t batch, int64_t kv_head, int64_t begin, int64_t count) {
    const int64_t group = job->heads / job->kv_heads;
    if (!job->mask || !job->mask_is_bytes) return 0;
    for (int64_t row = 0; row < group * job->queries; row++) {
        const query_mask mask = mask_of(job, batch, kv_head * group + row / job->queries, row % job->queries);
        for (int64_t j = 0; j < count; j++)
            if (mask.seen[(begin + j) * mask.step]) return 0;
    }
    return 1;
}

/* A part whose keys count for nothing. */
static void skip_part(const attention *job, int64_t batch, int64_t kv_head, int64_t part) {
    const int64_t group = job->heads / job->kv_heads, parts = parts_of(job), floats = part_floats(job);
    const int64_t rows = group * job->queries;
    for (int64_t row = 0; row < rows; row++) {
        const int64_t query = ((batch * job->heads + kv_head * group) * job->queries + row) * parts + part;
        memset(job->scratch + query * floats, 0, (size_t)floats * sizeof(float));
        job->scratch[query * floats + job->value_width] = -INFINITY;
    }
}

/* The codes of one position, its scale, and the sums of squares of what is given and of what the codes lose of it. What is
   not finite makes the whole position NaN. As convert/int8_cache.py does, to the bit. */
static void quantize_position(const float *from, int64_t width, int8_t *to, float *scale, float *square, float *lost) {
    float largest = 0.0f;
    int finite = 1;
    for (int64_t c = 0; c < width; c++) {
        const float size = fabsf(from[c]);
        finite &= size < INFINITY;
        largest = size > largest ? size : largest;
    }
    const float step = finite ? largest / 127.0f : NAN;
    double squares = 0, losses = 0;
    for (int64_t c = 0; c < width; c++) {
        const float code = step > 0.0f ? rintf(from[c] / step) : 0.0f;
        /* A step below the least normal number is off by much. */
        to[c] = (int8_t)(code > 127.0f ? 127.0f : code < -127.0f ? -127.0f : code);
        const double off = (double)from[c] - (double)((float)to[c] * step);
        squares += (double)from[c] * from[c];
        losses += off * off;
    }
    *scale = step, *square = (float)squares, *lost = (float)losses;
}

static void write_codes(const attention *job, int64_t batch, int64_t head, int64_t i) {
    const int64_t at = job->new_first + i;
    float *sums = job->errors + (batch * job->kv_heads + head) * job->errors_stride[1] + i;
    quantize_position((const float *)job->new_k + batch * job->new_k_stride[0] + head * job->new_k_stride[1] + i * job->new_k_stride[2],
                      job->width,
                      (int8_t *)job->k + batch * job->k_stride[0] + head * job->k_stride[1] + at * job->k_stride[2],
                      scales_of(job->k_scale, job->k_scale_stride, batch, head) + at, sums,
                      sums + job->errors_stride[0]);
    quantize_position((const float *)job->new_v + batch * job->new_v_stride[0] + head * job->new_v_stride[1] + i * job->new_v_stride[2],
                      job->value_width,
                      (int8_t *)job->v + batch * job->v_stride[0] + head * job->v_stride[1] + at * job->v_stride[2],
                      scales_of(job->v_scale, job->v_scale_stride, batch, head) + at, sums + 2 * job->errors_stride[0],
                      sums + 3 * job->errors_stride[0]);
}

/* The new keys and values of a head that fall into a part. */
static void write_new(const attention *job, int64_t batch, int64_t head, int64_t begin, int64_t count) {
    for (int64_t i = 0; i < job->new_count; i++) {
        const int64_t at = job->new_first + i;
        if (at < begin || at >= begin + count) continue;
        if (job->k_scale) {
            write_codes(job, batch, head, i);
            continue;
        }
        const int kind = kind_of(job);
        const int64_t to_k = batch * job->k_stride[0] + head * job->k_stride[1] + at * job->k_stride[2];
        const int64_t to_v = batch * job->v_stride[0] + head * job->v_stride[1] + at * job->v_stride[2];
        const int64_t new_k =
            batch * job->new_k_stride[0] + head * job->new_k_stride[1] + i * job->new_k_stride[2];
        const int64_t new_v =
            batch * job->new_v_stride[0] + head * job->new_v_stride[1] + i * job->new_v_stride[2];
        memcpy((void *)element(kind, job->k, to_k), element(kind, job->new_k, new_k),
               (size_t)(job->width * bytes_of(kind)));
        memcpy((void *)element(kind, job->v, to_v), element(kind, job->new_v, new_v),
               (size_t)(job->value_width * bytes_of(kind)));
    }
}

INLINE void attend_all_rows(int kind, const attention *job, int64_t batch, int64_t kv_head, int64_t part, int64_t rows) {
    for (int64_t first = 0; first < rows; first += ROWS) {
        switch (rows - first) {
            case 1: attend_rows(1, kind, job, batch, kv_head, part, first); break;
#if defined(__AVX512F__)
            case 2: attend_rows(2, kind, job, batch, kv_head, part, first); break;
            case 3: attend_rows(3, kind, job, batch, kv_head, part, first); break;
#endif
            default: attend_rows(ROWS, kind, job, batch, kv_head, part, first);
        }
    }
}

static void attend_part(const attention *job, int64_t batch, int64_t kv_head, int64_t part) {
    const int64_t rows = job->heads / job->kv_heads * job->queries, begin = part * PART;
    const int64_t count = job->keys - begin < PART ? job->keys - begin : PART;
    write_new(job, batch, kv_head, begin, count);
    if (parts_of(job) > 1 && is_unseen(job, batch, kv_head, begin, count)) {
        skip_part(job, batch, kv_head, part);
        return;
    }
    switch (kind_of(job)) {
        case CODES: attend_all_rows(CODES, job, batch, kv_head, part, rows); return;
        case BFLOATS: attend_all_rows(BFLOATS, job, batch, kv_head, part, rows); return;
        default: attend_all_rows(FLOATS, job, batch, kv_head, part, rows);
    }
}

void ISA_NAME(tw_few_attend)(const attention *job, tw_queue *queue) {
    const int64_t parts = parts_of(job), rows = job->heads / job->kv_heads * job->queries;
    const int64_t units = job->batch * job->kv_heads * parts;
    for (int64_t unit = tw_take(queue, 0, 1); unit < units; unit = tw_take(queue, 0, 1)) {
        const int64_t head = unit / parts, batch = head / job->kv_heads, kv_head = head % job->kv_heads;
        attend_part(job, batch, kv_head, unit % parts);
        if (!is_apart(job)) continue;
        if (parts > 1 && __atomic_add_fetch(job->done + head, 1, __ATOMIC_ACQ_REL) < parts) continue;
        for (int64_t row = 0; row < rows; row++)
            join_parts(job, batch, kv_head * (job->heads / job->kv_heads) + row / job->queries, row % job->queries);
    }
}

#else

int64_t ISA_NAME(tw_few_floats)(const attention *job) {
    (void)job;
    return 0;
}

void ISA_NAME(tw_few_begin)(const attention *job) { (void)job; }

void ISA_NAME(tw_few_attend)(const attention *job, tw_queue *queue) { (void)job, (void)queue; }

#endif
