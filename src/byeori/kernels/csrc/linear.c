/* Products with a frozen matrix and its adapter in one pass, in bf16 by tiles (tiles.c); amx_linear.py calls it.

       h [rows, r] = scale x d          y [rows, n] = x [rows, k] w + h a
       w [k, n], d [k, r], a [r, n], or, transposed, [n, k], [r, k], [n, r]
       sums over rows [r, k] = scale u^T x, the gradient of an adapter's matrix

   The adapter makes the sum longer, so y is rounded once. A panel of w's columns that fits the second cache is packed
   into tiles, and every strip of 32 rows of x is multiplied with it. */

#include <omp.h>

/* Numbers of w and a in a panel, so that it stays in the second cache; with fewer columns x would be read too often. */
enum { PANEL = 327680, COLUMNS = 320 };

/* An output of this size has left the caches before it is read again. */
enum { FAR = 1 << 20 };

/* Columns [first, first + columns) of w as B: [columns / 16] times `wide` tiles of 32 rows, from the tile `at` on. */
static void panel_in(const uint16_t *w, long k, long n, int transposed, long first, long columns, long wide, long at,
                     uint16_t *to) {
    if (transposed) {
#pragma omp for schedule(static)
        for (long j = 0; j < columns; j += HALF)
            across(w + smaller(first + j, n) * k, k, larger(0, n - first - j), k, to + (j / HALF * wide + at) * TILE);
    } else {
#pragma omp for schedule(static)
        for (long q = 0; q < k; q += SIDE)
            along(w + q * n + first, n, k - q, smaller(columns, n - first), to + (q / SIDE + at) * TILE, wide * TILE);
    }
}

/* Write a strip's sums to y, or add them. far: past the caches, which otherwise read a line before it is overwritten.
   */
static inline void rows_to(const float *sums, long stride, uint16_t *y, long n, long rows, long columns, int more,
                           int far) {
    for (long i = 0; i < rows; i++) {
        uint16_t *to = y + i * n;
        const float *from = sums + i * stride;
        long whole = more ? 0 : columns / SIDE * SIDE;
        for (long j = 0; j < whole; j += SIDE) narrow_32(from + j, to + j, far);
        if (more)
            SIMD for (long j = 0; j < columns; j++) to[j] = narrow_bf16(from[j] + widen_bf16(to[j]));
        else
            for (long j = whole; j < columns; j++) to[j] = narrow_bf16(from[j]);
    }
}

/* A strip's rows of h, packed as A after those of x. down: d as B. */
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

/* As above. Without d, h is given; h and a may be null too. more: add to y. Returns 1 if there is no memory. */
int linear_bf16(const uint16_t *x, const uint16_t *w, const uint16_t *d, const uint16_t *a, uint16_t *h, uint16_t *y,
                long rows, long n, long k, long r, long transposed, long more, float scale, int threads) {
    long wide = (up(k) + up(r)) / SIDE, panels = (up(n) - 1) / larger(COLUMNS, PANEL / (wide * SIDE)) + 1;
    long columns = up((n + panels - 1) / panels), own = line(2 * SIDE * SIDE * wide + 4 * SIDE * columns);
    int far = n % SIDE == 0 && rows * n >= FAR;
    char *memory = aligned_alloc(64, line(2 * columns * wide * SIDE + 2 * up(k) * up(r) + threads * own)), *at = memory;
    if (!memory) return 1;
    uint16_t *panel = carve(&at, 2 * columns * wide * SIDE), *down = carve(&at, 2 * up(k) * up(r));
    char *owned = at;
#pragma omp parallel num_threads(threads)
    {
        char *here = owned + omp_get_thread_num() * own;
        uint16_t *strip = carve(&here, 2 * SIDE * SIDE * wide);
        float *sums = carve(&here, 4 * SIDE * columns);
        begin();
        if (d) panel_in(d, k, r, transposed, 0, up(r), up(k) / SIDE, 0, down);
        for (long first = 0; first < n; first += columns) {
            panel_in(w, k, n, transposed, first, columns, wide, 0, panel);
            if (h) panel_in(a, r, n, transposed, first, columns, wide, up(k) / SIDE, panel);
#pragma omp for schedule(static)
            for (long row = 0; row < rows; row += SIDE) {
                memset(strip, 0, rows - row < SIDE || k % SIDE || r % SIDE ? 2 * SIDE * SIDE * wide : 0);
                for (long i = 0; i < smaller(SIDE, rows - row); i++)
                    row_in(x + (row + i) * k, k, strip + i / HALF * wide * TILE + i % HALF * SIDE);
                if (h)
                    low_rank(d && !first ? down : NULL, h + row * r, smaller(SIDE, rows - row), k, r, scale, sums,
                             strip, wide);
                for (long j = 0; j < columns && first + j < n; j += SIDE) {
                    const uint16_t *right = panel + j / HALF * wide * TILE;
                    Sums held;
                    clear(&held);
                    for (long q = 0; q < wide; q++)
                        step(&held, strip + q * TILE, wide * TILE, right + q * TILE, wide * TILE);
                    store(&held, sums + j, columns, HALF, HALF * columns);
                }
                rows_to(sums, columns, y + row * n + first, n, smaller(SIDE, rows - row), smaller(columns, n - first),
                        more, far);
            }
        }
        settle();
        end();
    }
    free(memory);
    return 0;
}

/* u [rows, r] transposed, as A: for each 32 rows [2 up(r) / 32] tiles. */
static void transposed_in(const uint16_t *u, long rows, long r, uint16_t *to) {
    memset(to, 0, 2 * up(rows) * up(r));
    for (long i = 0; i < rows; i++)
        for (long j = 0; j < r; j++) to[(i / SIDE * up(r) + j) * SIDE + i % SIDE] = u[i * r + j];
}

/* out [r, k] = scale u^T x for u [rows, r] and x [rows, k]; returns 1 if there is no memory. */
int outer_bf16(const uint16_t *u, const uint16_t *x, float *out, long rows, long r, long k, float scale, int threads) {
    long bytes = line(2 * up(rows) * up(r) + 4 * up(r) * up(k) + threads * 4 * SQUARE);
    char *memory = aligned_alloc(64, bytes), *at = memory;
    if (!memory) return 1;
    uint16_t *left = carve(&at, 2 * up(rows) * up(r)), *pairs = carve(&at, threads * 4 * SQUARE);
    float *sums = carve(&at, 4 * up(r) * up(k));
    transposed_in(u, rows, r, left);
    memset(sums, 0, 4 * up(r) * up(k));
#pragma omp parallel num_threads(threads)
    {
        long wide = up(k) / SIDE, one = omp_get_thread_num(), all = omp_get_num_threads();
        uint16_t *right = pairs + one * 2 * SQUARE;
        begin();
        for (long row = 0; row < rows; row += SIDE)
            for (long j = one * wide / all; j < (one + 1) * wide / all; j++) {
                along(x + row * k + j * SIDE, k, rows - row, smaller(SIDE, k - j * SIDE), right, TILE);
                for (long i = 0; i < up(r) / SIDE; i++) {
                    float *own = sums + (j * up(r) / SIDE + i) * SQUARE;
                    Sums held;
                    load(&held, own, SIDE, HALF, HALF * SIDE);
                    step(&held, left + (row / SIDE * up(r) + i * SIDE) * SIDE, TILE, right, TILE);
                    store(&held, own, SIDE, HALF, HALF * SIDE);
                }
            }
        for (long j = one * wide / all; j < (one + 1) * wide / all; j++)
            for (long i = 0; i < r; i++)
                for (long c = 0; c < smaller(SIDE, k - j * SIDE); c++)
                    out[i * k + j * SIDE + c] = scale * sums[((j * up(r) + i) * SIDE) + c];
        end();
    }
    free(memory);
    return 0;
}
