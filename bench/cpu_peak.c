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

#if defined(__AMX_INT8__)
/* Products and additions, counted apart, of a loop of four independent chains of products of tiles of u8 and s8. Whether
   the process may use tiles was asked when the kernels were loaded. */
int64_t peak_int8(int64_t rounds) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) shapes.row_bytes[i] = 64, shapes.rows[i] = 16;
    uint8_t tile[1024];
    for (int i = 0; i < 1024; i++) tile[i] = (uint8_t)(i % 16);
    /* Not every compiler knows that these are read from memory. */
    __asm__ volatile("" : : "r"(&shapes), "r"(tile) : "memory");
    _tile_loadconfig(&shapes);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, tile, 64);
    _tile_loadd(5, tile, 64);
    rounds /= 16; /* each takes sixteen times as long as a vector's */
    for (int64_t round = 0; round < rounds; round++) {
        _tile_dpbusd(0, 4, 5);
        _tile_dpbusd(1, 4, 5);
        _tile_dpbusd(2, 4, 5);
        _tile_dpbusd(3, 4, 5);
    }
    _tile_release();
    return rounds * 4 * 16 * 16 * 64 * 2;
}
#else
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
#endif

/* Reads `bytes` bytes, a multiple of 256. */
int64_t read_memory(const char *from, int64_t bytes) {
    __m256i any = _mm256_setzero_si256();
    for (int64_t at = 0; at < bytes; at += 256)
#pragma GCC unroll 8
        for (int i = 0; i < 256; i += 32)
            any = _mm256_or_si256(any, _mm256_loadu_si256((const __m256i *)(from + at + i)));
    return _mm256_extract_epi64(any, 0);
}
