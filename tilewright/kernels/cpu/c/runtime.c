/* What every build of the library has once: the OpenMP runtime it was given, and what this processor can do. */
#include "parallel.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <stddef.h>
#include <stdio.h>
#include <string.h>

typedef void (*parallel_function)(tw_body body, void *data, unsigned threads, unsigned flags);
typedef int (*count_function)(void);
typedef void (*barrier_function)(void);

static parallel_function run_parallel = NULL;
static count_function thread_number = NULL;
static count_function team_size = NULL;
static barrier_function barrier = NULL;

#define EXPORT __attribute__((visibility("default")))

EXPORT const char *tw_source_hash(void) { return TILEWRIGHT_SOURCE_HASH; }

/* parallel: GOMP_parallel; number, size: omp_get_thread_num, omp_get_num_threads; wait: GOMP_barrier; all of one library. */
EXPORT void tw_use_openmp(void *parallel, void *number, void *size, void *wait) {
    run_parallel = (parallel_function)parallel;
    thread_number = (count_function)number;
    team_size = (count_function)size;
    barrier = (barrier_function)wait;
}

/* Whether the library has the build called `isa`: a compiler that is too old for it has left it out. */
EXPORT int tw_has(const char *isa) {
    char name[32];
    snprintf(name, sizeof name, " %s ", isa);
    return strstr(TILEWRIGHT_ISAS, name) != NULL;
}

#if defined(__x86_64__) && defined(__linux__)
/* Whether the processor has tiles with products of int8 and of bfloat16, the system keeps them when it changes threads, and
   it lets this process use them: it makes room for 8 KiB a thread only for those who ask. Leave is given once and to all
   threads; to ask again costs a system call. */
static int has_tiles(void) {
    enum { INT8_BF16_TILES = 1 << 25 | 1 << 24 | 1 << 22, XSAVE_IN_USE = 1 << 27, CONFIG_AND_DATA = 3 << 17 };
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    unsigned eax, ebx, ecx, edx, low, high;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & INT8_BF16_TILES) != INT8_BF16_TILES) return 0;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & XSAVE_IN_USE)) return 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & CONFIG_AND_DATA) == CONFIG_AND_DATA && !syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA);
}
#else
static int has_tiles(void) { return 0; }
#endif

/* Whether this processor, and the system it runs, can execute the build called `isa`, and the library has it. */
EXPORT int tw_supports(const char *isa) {
    if (!tw_has(isa)) return 0;
    if (!strcmp(isa, "portable")) return 1;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!strcmp(isa, "avx2"))
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (!strcmp(isa, "avx512_vnni"))
        return tw_supports("avx2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vnni");
    if (!strcmp(isa, "amx")) return tw_supports("avx512_bf16") && has_tiles();
    if (!strcmp(isa, "avx512_bf16")) return tw_supports("avx512_vnni") && __builtin_cpu_supports("avx512bf16");
    if (!strcmp(isa, "avx_vnni")) {
        /* By number, since not every compiler knows it by name: leaf 7.1, EAX bit 4. */
        unsigned eax, ebx, ecx, edx;
        return tw_supports("avx2") && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1);
    }
#endif
    return 0;
}

void tw_parallel(tw_body body, void *data, int threads) {
    if (threads > 1 && run_parallel)
        run_parallel(body, data, (unsigned)threads, 0);
    else
        body(data);
}

void tw_share(int64_t count, int64_t *begin, int64_t *end) {
    int64_t number = run_parallel ? thread_number() : 0, size = run_parallel ? team_size() : 1;
    int64_t each = count / size, rest = count % size;
    *begin = number * each + (number < rest ? number : rest);
    *end = *begin + each + (number < rest);
}

void tw_team(int *number, int *count) {
    *number = run_parallel ? thread_number() : 0;
    *count = run_parallel ? team_size() : 1;
}

void tw_barrier(void) {
    if (run_parallel && team_size() > 1) barrier();
}
