/* Products of bf16 tiles for attention.c and linear.c, in AMX tile registers if the processor has them, else in
   vectors.

   A product adds A [32, 32] B [32, 32] to four float tiles of [16, 16] (`step`). A's tiles are 16 rows of 32 numbers;
   B's are 16 pairs of rows, with a number of the first row and one of the second for each of 16 columns. */

#include <stdlib.h>
#include <string.h>
#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
#include <immintrin.h>
#endif

enum { SIDE = 32, HALF = 16, TILE = SIDE * HALF, SQUARE = SIDE * SIDE };

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>

typedef struct { int none; } Sums;
#define FENCE __asm__ volatile("" ::: "memory")

static void begin(void) {
    struct { uint8_t palette, row, rest[14]; uint16_t width[16]; uint8_t height[16]; } __attribute__((aligned(64))) how;
    memset(&how, 0, sizeof how);
    how.palette = 1;
    for (int i = 0; i < 8; i++) how.width[i] = 64, how.height[i] = HALF;
    _tile_loadconfig(&how);
}
static void end(void) { _tile_release(); }
static inline void clear(Sums *sums) { FENCE; _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3); }
static inline void load(Sums *sums, const float *from, long stride, long right, long down) {
    FENCE;
    _tile_loadd(0, from, 4 * stride);
    _tile_loadd(1, from + right, 4 * stride);
    _tile_loadd(2, from + down, 4 * stride);
    _tile_loadd(3, from + down + right, 4 * stride);
}
static inline void step(Sums *sums, const uint16_t *a, long down, const uint16_t *b, long right) {
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, a + down, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, b + right, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
}
static inline void store(Sums *sums, float *to, long stride, long right, long down) {
    _tile_stored(0, to, 4 * stride);
    _tile_stored(1, to + right, 4 * stride);
    _tile_stored(2, to + down, 4 * stride);
    _tile_stored(3, to + down + right, 4 * stride);
    FENCE;
}

/* 2 if Linux lets this process use tile registers (arch_prctl ARCH_REQ_XCOMP_PERM), else 0. */
int tiles(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0 ? 2 : 0; }

#else

typedef struct { float at[2][2][HALF][HALF] __attribute__((aligned(64))); } Sums;

static void begin(void) {}
static void end(void) {}
static inline void clear(Sums *sums) { memset(sums, 0, sizeof *sums); }
static inline void load(Sums *sums, const float *from, long stride, long right, long down) {
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < HALF; j++)
            memcpy(sums->at[i / 2][i % 2][j], from + i / 2 * down + i % 2 * right + j * stride, 4 * HALF);
}
#ifdef __AVX512BF16__
static inline void step(Sums *sums, const uint16_t *a, long down, const uint16_t *b, long right) {
    for (int i = 0; i < SIDE; i += 8) { /* eight rows by two vectors of columns: sixteen sums in registers */
        const uint16_t *rows = a + i / HALF * down + i % HALF * SIDE;
        float(*one)[HALF] = sums->at[i / HALF][0] + i % HALF, (*two)[HALF] = sums->at[i / HALF][1] + i % HALF;
        __m512 left[8], other[8];
        for (int j = 0; j < 8; j++) left[j] = _mm512_load_ps(one[j]), other[j] = _mm512_load_ps(two[j]);
        for (int p = 0; p < HALF; p++) {
            __m512bh columns = (__m512bh)_mm512_loadu_si512(b + p * SIDE);
            __m512bh others = (__m512bh)_mm512_loadu_si512(b + right + p * SIDE);
            for (int j = 0; j < 8; j++) {
                int pair;
                memcpy(&pair, rows + j * SIDE + 2 * p, 4);
                __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
                left[j] = _mm512_dpbf16_ps(left[j], both, columns);
                other[j] = _mm512_dpbf16_ps(other[j], both, others);
            }
        }
        for (int j = 0; j < 8; j++) _mm512_store_ps(one[j], left[j]), _mm512_store_ps(two[j], other[j]);
    }
}
#else
static inline void step(Sums *sums, const uint16_t *a, long down, const uint16_t *b, long right) {
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < HALF; j++)
            for (int p = 0; p < HALF; p++) {
                const uint16_t *pair = a + i / 2 * down + j * SIDE + 2 * p, *other = b + i % 2 * right + p * SIDE;
                float *to = sums->at[i / 2][i % 2][j], one = widen_bf16(pair[0]), two = widen_bf16(pair[1]);
                SIMD for (int k = 0; k < HALF; k++)
                    to[k] += one * widen_bf16(other[2 * k]) + two * widen_bf16(other[2 * k + 1]);
            }
}
#endif
static inline void store(Sums *sums, float *to, long stride, long right, long down) {
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < HALF; j++)
            memcpy(to + i / 2 * down + i % 2 * right + j * stride, sums->at[i / 2][i % 2][j], 4 * HALF);
}

/* 1 if the processor multiplies pairs of bf16, else 0: then this works, but is slow. */
#ifdef __AVX512BF16__
int tiles(void) { return 1; }
#else
int tiles(void) { return 0; }
#endif
#endif

static inline long up(long number) { return (number + SIDE - 1) / SIDE * SIDE; }
static inline long larger(long a, long b) { return a > b ? a : b; }
static inline long smaller(long a, long b) { return a < b ? a : b; }

/* 32 sums, rounded. far: to a cache line, past the caches. */
static inline void narrow_32(const float *from, uint16_t *to, int far) {
#ifdef __AVX512BF16__
    __m512i found = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + HALF), _mm512_loadu_ps(from));
    if (far && (uintptr_t)to % 64 == 0) _mm512_stream_si512((void *)to, found);
    else _mm512_storeu_si512(to, found);
#else
    SIMD for (long k = 0; k < SIDE; k++) to[k] = narrow_bf16(from[k]);
#endif
}

/* 16 sums of one row and of the row below it, rounded, in pairs. */
static inline void narrow_pairs(const float *one, const float *two, uint32_t *to) {
#ifdef __AVX512BF16__
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(one)));
    __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(two)));
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#else
    SIMD for (long k = 0; k < HALF; k++) to[k] = narrow_bf16(one[k]) | (uint32_t)narrow_bf16(two[k]) << 16;
#endif
}

/* Make writes past the caches visible to other threads. */
static inline void settle(void) {
#ifdef __AVX512BF16__
    _mm_sfence();
#endif
}

/* Bytes in whole cache lines, and sixteen more: `room` rounds up each of at most so many parts. */
static inline long line(long bytes) { return (bytes / 64 + 16) * 64; }

static void *carve(char **at, long bytes) {
    char *found = *at;
    *at += (bytes + 63) / 64 * 64;
    return found;
}

/* A row of a tile, or the part of it that exists. */
static inline void some(void *to, const uint16_t *from, long left) {
    if (left >= SIDE) memcpy(to, from, 2 * SIDE);
    else memcpy(to, from, 2 * left);
}

/* A row of A's tiles, the first of which begins at `to`. */
static inline void row_in(const uint16_t *row, long size, uint16_t *to) {
    for (long k = 0; k < size; k += SIDE) some(to + k * HALF, row + k, size - k);
}

static inline void transpose_pairs(const uint32_t *from, long stride, uint32_t *to) {
    for (long i = 0; i < HALF; i++)
        for (long j = 0; j < HALF; j++) to[i * HALF + j] = from[j * stride + i];
}

/* 16 rows of `size` numbers (or what is left of 16) as B's columns: size / 32 tiles. */
static inline void across(const uint16_t *from, long stride, long left, long size, uint16_t *to) {
    for (long k = 0; k < size; k += SIDE) {
        uint32_t pairs[HALF * HALF];
        if (left < HALF || size - k < SIDE) memset(pairs, 0, sizeof pairs);
        for (long i = 0; i < smaller(HALF, left); i++) some(pairs + i * HALF, from + i * stride + k, size - k);
        transpose_pairs(pairs, HALF, (uint32_t *)(to + k * HALF));
    }
}

/* 32 rows of `size` numbers (or what is left of 32) as B's rows: size / 16 tiles, one every `next`. */
static inline void along(const uint16_t *from, long stride, long left, long size, uint16_t *to, long next) {
    static const uint16_t none[HALF];
    for (long j = 0; j < size; j += HALF)
        for (long p = 0; p < HALF; p++) {
            const uint16_t *one = 2 * p < left ? from + 2 * p * stride + j : none;
            const uint16_t *two = 2 * p + 1 < left ? from + (2 * p + 1) * stride + j : none;
            uint32_t *out = (uint32_t *)(to + j / HALF * next) + p * HALF;
            if (size - j >= HALF)
                SIMD for (long k = 0; k < HALF; k++) out[k] = one[k] | (uint32_t)two[k] << 16;
            else
                for (long k = 0; k < HALF; k++) out[k] = k < size - j ? one[k] | (uint32_t)two[k] << 16 : 0;
        }
    if (up(size) - size >= HALF) memset(to + (up(size) - HALF) / HALF * next, 0, 2 * TILE);
}
