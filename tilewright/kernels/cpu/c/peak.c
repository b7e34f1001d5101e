/* What this processor does at most: products from registers with the instructions that the kernels use, reading from a
   cache or from memory, and beginning and ending a parallel region. Python takes the time.

   Instructions are written out: what is measured is then no compiler's choice. */
#include "amx.h"
#include "numbers.h"
#include "parallel.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

enum { INTEGERS = 3 }; /* after the float formats of numbers.h */

/* Independent chains: as many as hide the latency of one step on two ports. */
#define TWELVE(do) do(0) do(1) do(2) do(3) do(4) do(5) do(6) do(7) do(8) do(9) do(10) do(11)

/* A function of `rounds` rounds of twelve steps, which returns the operations, a product and its addition being two. */
#define DEFINE_CHAINS(name, vector, start, one, products, STEP)                                                        \
    static int64_t name(int64_t rounds) {                                                                              \
        vector x = one, sum0 = start, sum1 = start, sum2 = start, sum3 = start, sum4 = start, sum5 = start;            \
        vector sum6 = start, sum7 = start, sum8 = start, sum9 = start, sum10 = start, sum11 = start;                   \
        for (int64_t round = 0; round < rounds; round++) {                                                             \
            TWELVE(STEP)                                                                                               \
        }                                                                                                              \
        __asm__ volatile("" : : "m"(sum0), "m"(sum11));                                                                \
        return rounds * 12 * (products) * 2;                                                                           \
    }

#if defined(__AVX512F__)
#define FLOAT_STEP(i) __asm__ volatile("vfmadd231ps %1, %1, %0" : "+v"(sum##i) : "v"(x));
DEFINE_CHAINS(chains_float, __m512, _mm512_setzero_ps(), _mm512_set1_ps(1.0f), 16, FLOAT_STEP)
#elif defined(__AVX2__)
#define FLOAT_STEP(i) __asm__ volatile("vfmadd231ps %1, %1, %0" : "+x"(sum##i) : "x"(x));
DEFINE_CHAINS(chains_float, __m256, _mm256_setzero_ps(), _mm256_set1_ps(1.0f), 8, FLOAT_STEP)
#endif

#if defined(__AVX512BF16__)
#define PAIR_STEP(i) __asm__ volatile("vdpbf16ps %1, %1, %0" : "+v"(sum##i) : "v"(x));
DEFINE_CHAINS(chains_pairs, __m512i, _mm512_setzero_si512(), _mm512_set1_epi16(0x3f80), 32, PAIR_STEP)
#endif

#if defined(__AVX512VNNI__)
#define INTEGER_STEP(i) __asm__ volatile("vpdpbusd %1, %1, %0" : "+v"(sum##i) : "v"(x));
DEFINE_CHAINS(chains_integers, __m512i, _mm512_setzero_si512(), _mm512_set1_epi8(1), 64, INTEGER_STEP)
#elif defined(__AVXVNNI__)
#define INTEGER_STEP(i) __asm__ volatile("%{vex%} vpdpbusd %1, %1, %0" : "+x"(sum##i) : "x"(x));
DEFINE_CHAINS(chains_integers, __m256i, _mm256_setzero_si256(), _mm256_set1_epi8(1), 32, INTEGER_STEP)
#elif defined(__AVX2__)
/* 16-bit numbers, in two steps: as simd.h has it. */
#define INTEGER_STEP(i)                                                                                                \
    {                                                                                                                  \
        __m256i two;                                                                                                   \
        __asm__ volatile("vpmaddwd %1, %1, %0" : "=x"(two) : "x"(x));                                                  \
        __asm__ volatile("vpaddd %1, %0, %0" : "+x"(sum##i) : "x"(two));                                               \
    }
DEFINE_CHAINS(chains_integers, __m256i, _mm256_setzero_si256(), _mm256_set1_epi16(1), 16, INTEGER_STEP)
#endif

#if defined(__AMX_TILE__)
/* Four chains of tiles. A round is a sixteenth of what the caller counts, since it takes so many times as long. */
static int64_t chains_tiles(int64_t rounds, int format) {
    uint8_t tile[AMX_TILE];
    memset(tile, 1, sizeof tile);
    amx_begin();
    AMX_WRITTEN();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, tile, AMX_BYTES);
    _tile_loadd(5, tile, AMX_BYTES);
    rounds = (rounds + 15) / 16;
    if (format == INTEGERS)
        for (int64_t round = 0; round < rounds; round++) {
            _tile_dpbusd(0, 4, 5);
            _tile_dpbusd(1, 4, 5);
            _tile_dpbusd(2, 4, 5);
            _tile_dpbusd(3, 4, 5);
        }
    else
        for (int64_t round = 0; round < rounds; round++) {
            _tile_dpbf16ps(0, 4, 5);
            _tile_dpbf16ps(1, 4, 5);
            _tile_dpbf16ps(2, 4, 5);
            _tile_dpbf16ps(3, 4, 5);
        }
    amx_end();
    return rounds * 4 * AMX_ROWS * AMX_CHANNELS * (format == INTEGERS ? 64 : 32) * 2;
}
#endif

typedef struct {
    int format;
    int64_t rounds, done;
} products;

static void multiply(void *data) {
    products *job = data;
    const int64_t rounds = job->rounds;
    int64_t done = 0;
    (void)rounds;
#if defined(__AVX2__)
    if (job->format == FLOAT32) done = chains_float(rounds);
#endif
#if defined(__AMX_TILE__)
    if (job->format != FLOAT32) done = chains_tiles(rounds, job->format);
#else
#if defined(__AVX512BF16__)
    if (job->format == BFLOAT16) done = chains_pairs(rounds);
#endif
#if defined(__AVX2__)
    if (job->format == INTEGERS) done = chains_integers(rounds);
#endif
#endif
    __atomic_fetch_add(&job->done, done, __ATOMIC_RELAXED);
}

/* Products of `format` (FLOAT32, BFLOAT16 or INTEGERS) on every thread: operations of all together, 0 where this build has
   no instruction for them. */
EXPORT int64_t ISA_NAME(tw_peak_products)(int format, int64_t rounds, int threads) {
    products job = {format, rounds, 0};
    if (format == FLOAT32 || format == BFLOAT16 || format == INTEGERS) tw_parallel(multiply, &job, threads);
    return job.done;
}

typedef struct {
    const uint8_t *from;
    int64_t bytes, times, done;
} reading;

typedef uint64_t line __attribute__((vector_size(64), aligned(64)));

static void read_lines(void *data) {
    reading *job = data;
    int number, count;
    tw_team(&number, &count);
    const line *from = (const line *)(job->from + number * job->bytes);
    const int64_t lines = job->bytes / (int64_t)sizeof(line) / 8 * 8;
    line any[4] = {{0}};
    for (int64_t time = 0; time < job->times; time++)
        for (int64_t i = 0; i < lines; i += 8) {
            for (int j = 0; j < 4; j++) any[j] |= from[i + j];
            for (int j = 0; j < 4; j++) any[j] |= from[i + 4 + j];
            __asm__ volatile("" : : : "memory"); /* else all times but one are left out */
        }
    const line all = any[0] | any[1] | any[2] | any[3];
    __asm__ volatile("" : : "m"(all));
    __atomic_fetch_add(&job->done, job->times * lines * (int64_t)sizeof(line), __ATOMIC_RELAXED);
}

/* Thread i reads the i-th `bytes` bytes of `from` so many times; `from` is at a multiple of 64 bytes, and `bytes` one.
   Returns the bytes read by all. */
EXPORT int64_t ISA_NAME(tw_peak_read)(const void *from, int64_t bytes, int64_t times, int threads) {
    reading job = {from, bytes, times, 0};
    tw_parallel(read_lines, &job, threads);
    return job.done;
}

static void nothing(void *data) { (void)data; }

/* So many parallel regions with nothing to do. */
EXPORT int ISA_NAME(tw_peak_regions)(int64_t count, int threads) {
    for (int64_t i = 0; i < count; i++) tw_parallel(nothing, NULL, threads);
    return 0;
}
