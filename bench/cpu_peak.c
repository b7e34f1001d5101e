/* What this processor can do at most: integer products from registers, and reading memory. Built by cpu_peak.py with the
   same instructions that the kernels use. */
#include <immintrin.h>
#include <stdint.h>

/* Twelve named sums: the compiler keeps an array that an asm statement touches in memory, and loads and stores would be
   measured. PIN makes it believe that they are looked at in every round. */
#define TWELVE(do) do(0) do(1) do(2) do(3) do(4) do(5) do(6) do(7) do(8) do(9) do(10) do(11)
#define DECLARE(i) vector sum##i = zero;
#define STEP(i) sum##i = step(sum##i, x);
#define PIN(i) __asm__ volatile("" : "+v"(sum##i));

#if defined(__AVX512VNNI__)
typedef __m512i vector;
enum { PRODUCTS = 16 * 4 };
#define zero _mm512_setzero_si512()
#define step(sum, x) _mm512_dpbusd_epi32(sum, x, x)
#define ones _mm512_set1_epi8(1)
#elif defined(__AVXVNNI__)
typedef __m256i vector;
enum { PRODUCTS = 8 * 4 };
#define zero _mm256_setzero_si256()
#define step(sum, x) _mm256_dpbusd_avx_epi32(sum, x, x)
#define ones _mm256_set1_epi8(1)
#else
typedef __m256i vector;
enum { PRODUCTS = 8 * 2 };
#define zero _mm256_setzero_si256()
#define step(sum, x) _mm256_add_epi32(sum, _mm256_madd_epi16(x, x))
#define ones _mm256_set1_epi16(1)
#endif

/* Products and additions, counted apart, of a loop of twelve independent chains of u8 x s8 products. */
int64_t peak_int8(int64_t rounds) {
    vector x = ones;
    TWELVE(DECLARE)
    for (int64_t round = 0; round < rounds; round++) {
        __asm__ volatile("" : "+v"(x)); /* else products of constants are taken out of the loop */
        TWELVE(STEP)
        TWELVE(PIN)
    }
    return rounds * 12 * PRODUCTS * 2;
}

/* Reads `bytes` bytes, a multiple of 256. */
int64_t read_memory(const char *from, int64_t bytes) {
    __m256i any = _mm256_setzero_si256();
    for (int64_t at = 0; at < bytes; at += 256)
#pragma GCC unroll 8
        for (int i = 0; i < 256; i += 32)
            any = _mm256_or_si256(any, _mm256_loadu_si256((const __m256i *)(from + at + i)));
    return _mm256_extract_epi64(any, 0);
}
