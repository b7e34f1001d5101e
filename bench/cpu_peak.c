/* What this processor can do at most: integer products from registers, and reading memory. Built by cpu_peak.py with the
   same instructions that the kernels use. */
#include <immintrin.h>
#include <stdint.h>

/* Products and additions, counted apart, of one loop of twelve independent chains of u8 x s8 products. */
int64_t peak_int8(int64_t rounds) {
#if defined(__AVX512VNNI__)
    __m512i sum[12];
    const __m512i x = _mm512_set1_epi8(1);
    for (int i = 0; i < 12; i++) sum[i] = _mm512_setzero_si512();
    for (int64_t round = 0; round < rounds; round++) {
#pragma GCC unroll 12
        for (int i = 0; i < 12; i++) {
            sum[i] = _mm512_dpbusd_epi32(sum[i], x, x);
            __asm__ volatile("" : "+v"(sum[i]));
        }
    }
    return rounds * 12 * 16 * 4 * 2;
#elif defined(__AVXVNNI__)
    __m256i sum[12];
    const __m256i x = _mm256_set1_epi8(1);
    for (int i = 0; i < 12; i++) sum[i] = _mm256_setzero_si256();
    for (int64_t round = 0; round < rounds; round++) {
#pragma GCC unroll 12
        for (int i = 0; i < 12; i++) {
            sum[i] = _mm256_dpbusd_avx_epi32(sum[i], x, x);
            __asm__ volatile("" : "+x"(sum[i]));
        }
    }
    return rounds * 12 * 8 * 4 * 2;
#else
    __m256i sum[12];
    const __m256i x = _mm256_set1_epi16(1);
    for (int i = 0; i < 12; i++) sum[i] = _mm256_setzero_si256();
    for (int64_t round = 0; round < rounds; round++) {
#pragma GCC unroll 12
        for (int i = 0; i < 12; i++) {
            sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(x, x));
            __asm__ volatile("" : "+x"(sum[i]));
        }
    }
    return rounds * 12 * 8 * 2 * 2;
#endif
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
