/* Products with a frozen matrix and its adapter in one pass, in bf16 by tiles (tiles.c); linear.py calls it.

       h [rows, r] = scale x d          y [rows, n] = x [rows, k] w + h a
       w [k, n], d [k, r], a [r, n], or, turned, [n, k], [r, k], [n, r]

   The adapter is a longer sum, so y is rounded once. A panel of w's columns that fits the second cache is brought into
   tiles at a time, and every strip of 32 rows of x passes by it. */

#include <omp.h>

/* Numbers of w and a in a panel, so that it stays in the second cache; but no fewer columns, or x is read too often. */
enum { PANEL = 327680, COLUMNS = 320 };

/* Columns [first, first + columns) of w as B: [columns / 16] times `wide` tiles of 32 rows, from the tile `at` on. */
static void panel_in(const uint16_t *w, long k, long n, int turned, long first, long columns, long wide, long at,
                     uint16_t *to) {
    if (turned) {
#pragma omp for schedule(static)
        for (long j = 0; j < columns; j += HALF)
            across(w + smaller(first + j, n) * k, k, larger(0, n - first - j), k, to + (j / HALF * wide + at) * TILE);
    } else {
#pragma omp for schedule(static)
        for (long q = 0; q < k; q += SIDE)
            along(w + q * n + first, n, k - q, smaller(columns, n - first), to + (q / SIDE + at) * TILE, wide * TILE);
    }
}

/* A strip's sums, rounded or added, to y: whole rows at once, since lines far from each other are slow to come by. */
static inline void rows_to(const float *sums, long stride, uint16_t *y, long n, long rows, long columns, int more) {
    for (long i = 0; i < rows; i++) {
        uint16_t *to = y + i * n;
        const float *from = sums + i * stride;
        long whole = more ? 0 : columns / SIDE * SIDE;
        for (long j = 0; j < whole; j += SIDE) narrow_32(from + j, to + j);
        if (more)
            SIMD for (long j = 0; j < columns; j++) to[j] = narrow_bf16(from[j] + widen_bf16(to[j]));
        else
            for (long j = whole; j < columns; j++) to[j] = narrow_bf16(from[j]);
    }
}

/* A strip's rows of h, and those as A behind x's. down: d as B. */
static void low_rank(const uint16_t *down, uint16_t *h, long rows, long k, long r, float scale, float *sums,
                     uint16_t *strip, long wide) {
    long deep = up(k) / SIDE;
    for (long j = 0; down && j < r; j += SIDE) {
        Sums held;
        clear(&held);
        for (long q = 0; q < deep; q++)
            step(&held, strip + q * TILE, wide * TILE, down + (j / HALF * deep + q) * TILE, deep * TILE);
        store(&held, sums, SIDE, HALF, HALF * SIDE);
        for (long i = 0; i < rows; i++)
            for (long c = 0; c < smaller(SIDE, r - j); c++) h[i * r + j + c] = narrow_bf16(scale * sums[i * SIDE + c]);
    }
    for (long i = 0; i < rows; i++) row_in(h + i * r, r, strip + (i / HALF * wide + deep) * TILE + i % HALF * SIDE);
}

/* As above; d may be null, then h is given, and so may h and a. more: y is added to. 1 where there is no memory. */
int linear_bf16(const uint16_t *x, const uint16_t *w, const uint16_t *d, const uint16_t *a, uint16_t *h, uint16_t *y,
                long rows, long n, long k, long r, long turned, long more, float scale, int threads) {
    long wide = (up(k) + up(r)) / SIDE, panels = (up(n) - 1) / larger(COLUMNS, PANEL / (wide * SIDE)) + 1;
    long columns = up((n + panels - 1) / panels), own = line(2 * SIDE * SIDE * wide + 4 * SIDE * columns);
    char *memory = aligned_alloc(64, line(2 * columns * wide * SIDE + 2 * up(k) * up(r) + threads * own)), *at = memory;
    if (!memory) return 1;
    uint16_t *panel = room(&at, 2 * columns * wide * SIDE), *down = room(&at, 2 * up(k) * up(r));
    char *owned = at;
#pragma omp parallel num_threads(threads)
    {
        char *here = owned + omp_get_thread_num() * own;
        uint16_t *strip = room(&here, 2 * SIDE * SIDE * wide);
        float *sums = room(&here, 4 * SIDE * columns);
        begin();
        if (d) panel_in(d, k, r, turned, 0, up(r), up(k) / SIDE, 0, down);
        for (long first = 0; first < n; first += columns) {
            panel_in(w, k, n, turned, first, columns, wide, 0, panel);
            if (h) panel_in(a, r, n, turned, first, columns, wide, up(k) / SIDE, panel);
#pragma omp for schedule(static)
            for (long row = 0; row < rows; row += SIDE) {
                memset(strip, 0, rows - row < SIDE || k % SIDE || r % SIDE ? 2 * SIDE * SIDE * wide : 0);
                for (long i = 0; i < smaller(SIDE, rows - row); i++)
                    row_in(x + (row + i) * k, k, strip + i / HALF * wide * TILE + i % HALF * SIDE);
                if (h)
                    low_rank(d && !first ? down : NULL, h + row * r, smaller(SIDE, rows - row), k, r, scale, sums, strip,
                             wide);
                for (long j = 0; j < columns && first + j < n; j += SIDE) {
                    const uint16_t *right = panel + j / HALF * wide * TILE;
                    Sums held;
                    clear(&held);
                    for (long q = 0; q < wide; q++)
                        step(&held, strip + q * TILE, wide * TILE, right + q * TILE, wide * TILE);
                    store(&held, sums + j, columns, HALF, HALF * columns);
                }
                rows_to(sums, columns, y + row * n + first, n, smaller(SIDE, rows - row), smaller(columns, n - first),
                        more);
            }
        }
        end();
    }
    free(memory);
    return 0;
}
