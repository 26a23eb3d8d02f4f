/* Attention over a whole forest in bf16, by tiles (tiles.c); cpu_tiles.py calls it.

       S = Q K^T   P = exp(scale (S - most)) part   O = P V           (FlashAttention: Dao et al., arXiv:2205.14135)
       dV = P^T dO   dP = dO V^T   dS = scale P (dP - sum(P dP))   dQ = dS K   dK = dS^T Q

   A strip of 32 query rows is multiplied with the tiles of 32 keys of which one of its rows sees one (strips.c). */

#include <omp.h>

#include "strips.c"

/* Strips whose weights are stored until they are summed over rows. */
enum { STRIPS = 16 };

/* A strip's products with its tiles of keys: out [count] squares of 32 rows by 32 keys. */
static void scores(const uint16_t *rows, long size, const uint16_t *keys, const KeyTile *visible, long count,
                   float *out) {
    long wide = up(size) / SIDE;
    for (long w = 0; w < count; w++) {
        const uint16_t *right = keys + 2 * visible[w].tile * wide * TILE;
        Sums sums;
        clear(&sums);
        for (long k = 0; k < wide; k++) step(&sums, rows + k * TILE, wide * TILE, right + k * TILE, wide * TILE);
        store(&sums, out + w * SQUARE, SIDE, HALF, HALF * SIDE);
    }
}

/* Weights [2, count] tiles of a strip's rows by its keys, times these keys: out [32, size]. */
static void gathered(const uint16_t *weights, const uint16_t *keys, long size, const KeyTile *visible, long count,
                     float *out) {
    long wide = up(size) / HALF;
    for (long j = 0; j < wide; j += 2) {
        Sums sums;
        clear(&sums);
        for (long w = 0; w < count; w++)
            step(&sums, weights + w * TILE, count * TILE, keys + (visible[w].tile * wide + j) * TILE, TILE);
        store(&sums, out + j * HALF, wide * HALF, HALF, HALF * wide * HALF);
    }
}

static inline uint16_t *in_row(uint16_t *weights, long count, long row, long w) {
    return weights + ((row / HALF * count + w) * HALF + row % HALF) * SIDE;
}

/* The softmax of a strip's scores, without its denominator, as A's tiles; sums: a row's largest score and one over the
   denominator. */
static void softmax_rows(const Layer *layer, const Strip *strip, const KeyTile *visible, long count, float *scored,
                   uint16_t *weights, float *most, float *part) {
    float scale = layer->scale;
    if (strip->rows < SIDE) memset(weights, 0, 2 * count * SQUARE);
    for (long i = 0; i < strip->rows; i++) {
        long position = place(layer, strip, i);
        int from, to;
        float tops[SIDE], sums[SIDE] = {0}, top = -INFINITY, sum = 0;
        for (int k = 0; k < SIDE; k++) tops[k] = -INFINITY;
        for (long w = 0; w < count; w++) {
            float *row = scored + w * SQUARE + i * SIDE;
            seen(layer, visible + w, position, &from, &to);
            SIMD for (int k = 0; k < SIDE; k++) {
                row[k] = (k >= from) & (k < to) ? row[k] : -INFINITY;
                tops[k] = row[k] > tops[k] ? row[k] : tops[k];
            }
        }
        for (int k = 0; k < SIDE; k++) top = tops[k] > top ? tops[k] : top;
        for (long w = 0; w < count; w++) {
            float *row = scored + w * SQUARE + i * SIDE;
            uint16_t *out = in_row(weights, count, i, w);
            SIMD for (int k = 0; k < SIDE; k++) {
                float p = exp_of((row[k] - top) * scale);
                row[k] = p = row[k] == -INFINITY ? 0.0f : p;
                sums[k] += p;
            }
            narrow_32(row, out, 0);
        }
        for (int k = 0; k < SIDE; k++) sum += sums[k];
        most[i] = top, part[i] = 1.0f / sum;
    }
}

/* O and a row's sums [n, heads, 2] as above; returns 1 if there is no memory. */
int attend_bf16(const uint16_t *query, const uint16_t *key, const uint16_t *value, uint16_t *out, float *sums,
                const int64_t *nodes, long count, long tokens, long heads, long groups, long d, long e, long window,
                float scale, int threads) {
    Layer layer = {nodes, count, tokens, heads, groups, d, e, window, scale};
    long strips = strips_of(&layer, NULL), most = 0, all = up(tokens);
    Strip *strip = malloc(strips * sizeof *strip + 1);
    if (!strip) return 1;
    strips_of(&layer, strip);
    for (long i = 0; i < strips; i++) most = larger(most, visible_tiles(&layer, strip + i, NULL));
    long own = line(most * (SQUARE * 6 + sizeof(KeyTile)) + SIDE * (2 * up(d) + 4 * up(e)));
    char *memory = aligned_alloc(64, line(all * 2 * (up(d) + up(e)) + threads * own)), *at = memory;
    if (!memory) return free(strip), 1;
    uint16_t *keys = carve(&at, 2 * all * up(d)), *values = carve(&at, 2 * all * up(e));
    char *owned = at;
#pragma omp parallel num_threads(threads)
    {
        char *here = owned + omp_get_thread_num() * own;
        float *scored = carve(&here, most * SQUARE * 4), *sum = carve(&here, SIDE * up(e) * 4);
        uint16_t *weights = carve(&here, most * SQUARE * 2), *rows = carve(&here, SIDE * up(d) * 2);
        KeyTile *visible = carve(&here, most * sizeof(KeyTile));
        float top[SIDE], part[SIDE];
        begin();
        for (long g = 0; g < groups; g++) {
            keys_across(&layer, g, key, d, keys);
            keys_along(&layer, g, value, e, values);
#pragma omp for schedule(static, 1)
            for (long i = 0; i < strips; i++) {
                long visible_count = visible_tiles(&layer, strip + i, visible);
                rows_in(&layer, strip + i, g, query, d, rows);
                scores(rows, d, keys, visible, visible_count, scored);
                softmax_rows(&layer, strip + i, visible, visible_count, scored, weights, top, part);
                gathered(weights, values, e, visible, visible_count, sum);
                rows_out(&layer, strip + i, g, sum, part, e, out);
                for (long r = 0; r < strip[i].rows; r++) {
                    float *to = sums + 2 * address(&layer, strip + i, g, r, 1);
                    to[0] = top[r], to[1] = part[r];
                }
            }
        }
        end();
    }
    free(memory);
    free(strip);
    return 0;
}

/* What a block of strips stores for the sums over rows: weights and slopes [STRIPS, most, 32 rows, 32 keys] as B, the
   rows of dO and Q transposed, as A. places: strip * most + its tile, by key tile; begins: where a key tile's begin. */
typedef struct {
    uint16_t *weights, *slopes, *grads, *queries;
    KeyTile *visible;
    long *counts, *begins, *places, most;
} Block;

/* A strip's weights and the gradients of its scores, as B for the sums over rows; the latter also as A, for dQ. On
   entry, scored and back are S and dP. */
static void softmax_rows_back(const Layer *layer, const Strip *strip, const KeyTile *visible, long count,
                              const float *sums, float *scored, float *back, uint16_t *weights, uint16_t *slopes,
                              uint16_t *rows) {
    float scale = layer->scale;
    for (long i = 0; i < SIDE; i++) {
        long position = place(layer, strip, smaller(i, strip->rows - 1));
        int from, to;
        float top = sums[2 * i], part = sums[2 * i + 1], means[SIDE] = {0}, mean = 0;
        for (long w = 0; w < count; w++) {
            float *row = scored + w * SQUARE + i * SIDE, *grad = back + w * SQUARE + i * SIDE;
            seen(layer, visible + w, position, &from, &to);
            SIMD for (int k = 0; k < SIDE; k++) {
                float p = exp_of((row[k] - top) * scale) * part;
                row[k] = p = (k >= from) & (k < to) ? p : 0.0f;
                means[k] += p * grad[k];
            }
        }
        for (int k = 0; k < SIDE; k++) mean += means[k];
        for (long w = 0; w < count; w++) {
            float *row = scored + w * SQUARE + i * SIDE, *grad = back + w * SQUARE + i * SIDE;
            uint16_t *out = in_row(rows, count, i, w);
            SIMD for (long k = 0; k < SIDE; k++) grad[k] = row[k] * (grad[k] - mean) * scale;
            narrow_32(grad, out, 0);
        }
    }
    for (long w = 0; w < count; w++)
        for (long p = 0; p < HALF; p++) {
            const float *row = scored + w * SQUARE + 2 * p * SIDE, *grad = back + w * SQUARE + 2 * p * SIDE;
            uint32_t *weight = (uint32_t *)(weights + w * SQUARE), *slope = (uint32_t *)(slopes + w * SQUARE);
            for (long j = 0; j < SIDE; j += HALF) {
                long to = j * HALF + p * HALF;
                narrow_pairs(row + j, row + j + SIDE, weight + to);
                narrow_pairs(grad + j, grad + j + SIDE, slope + to);
            }
        }
}

/* Add a block's rows to the sums of a tile of keys, [size / 32] squares of 32 columns by 32 keys. */
static void sum_rows(const Block *block, long tile, const uint16_t *transposed, const uint16_t *weights, long size,
                     float *sums) {
    long wide = up(size) / HALF;
    for (long j = 0; j < wide; j += 2) {
        float *own = sums + (tile * wide / 2 + j / 2) * SQUARE;
        Sums held;
        load(&held, own, HALF, HALF * HALF, 2 * HALF * HALF);
        for (long n = block->begins[tile]; n < block->begins[tile + 1]; n++) {
            long at = block->places[n];
            step(&held, transposed + (at / block->most * wide + j) * TILE, TILE, weights + at * SQUARE, TILE);
        }
        store(&held, own, HALF, HALF * HALF, 2 * HALF * HALF);
    }
}

/* The sums over rows become the gradient of a tile's keys. */
static void keys_out(const Layer *layer, long group, long tile, const float *sums, long size, uint16_t *to) {
    const float *own = sums + tile * up(size) * SIDE;
    for (long i = 0; i < smaller(SIDE, layer->tokens - tile * SIDE); i++) {
        uint16_t *row = to + ((tile * SIDE + i) * layer->groups + group) * size;
        for (long k = 0; k < size; k++) {
            long square = k / HALF * 2 + i / HALF;
            row[k] = narrow_bf16(own[(square * HALF + k % HALF) * HALF + i % HALF]);
        }
    }
}

/* For every tile of keys, the places of a block's weights for it. */
static void index_tiles(Block *block, long strips, long tiles) {
    memset(block->begins, 0, (tiles + 1) * sizeof *block->begins);
    for (long i = 0; i < strips; i++)
        for (long w = 0; w < block->counts[i]; w++) block->begins[block->visible[i * block->most + w].tile]++;
    for (long j = 0, sum = 0; j <= tiles; j++) sum = block->begins[j] += sum;
    for (long i = strips - 1; i >= 0; i--)
        for (long w = block->counts[i] - 1; w >= 0; w--)
            block->places[--block->begins[block->visible[i * block->most + w].tile]] = i * block->most + w;
}

/* Gradients of query, key and value from that of the output; returns 1 if there is no memory. */
int attend_back_bf16(const uint16_t *grad, const uint16_t *query, const uint16_t *key, const uint16_t *value,
                     const float *sums, uint16_t *to_query, uint16_t *to_key, uint16_t *to_value, const int64_t *nodes,
                     long count, long tokens, long heads, long groups, long d, long e, long window, float scale,
                     int threads) {
    Layer layer = {nodes, count, tokens, heads, groups, d, e, window, scale};
    long strips = strips_of(&layer, NULL), most = 0, all = up(tokens), wide = up(d) + up(e);
    Strip *strip = malloc(strips * sizeof *strip + 1);
    if (!strip) return 1;
    strips_of(&layer, strip);
    for (long i = 0; i < strips; i++) most = larger(most, visible_tiles(&layer, strip + i, NULL));
    long own = line(most * SQUARE * 10 + SIDE * (2 * wide + 4 * up(d)));
    long shared = STRIPS * (most * (4 * SQUARE + sizeof(KeyTile) + sizeof(long)) + 2 * SIDE * wide + sizeof(long));
    long packs = all * (2 * (2 * up(d) + up(e)) + 4 * wide) + (all / SIDE + 1) * sizeof(long);
    char *memory = aligned_alloc(64, line(shared + packs + threads * own)), *at = memory;
    if (!memory) return free(strip), 1;
    uint16_t *across = carve(&at, 2 * all * up(d)), *along = carve(&at, 2 * all * up(d));
    uint16_t *values = carve(&at, 2 * all * up(e));
    float *in_keys = carve(&at, 4 * all * up(d)), *in_values = carve(&at, 4 * all * up(e));
    Block block = {.most = most};
    block.weights = carve(&at, STRIPS * most * 2 * SQUARE), block.slopes = carve(&at, STRIPS * most * 2 * SQUARE);
    block.grads = carve(&at, STRIPS * 2 * SIDE * up(e)), block.queries = carve(&at, STRIPS * 2 * SIDE * up(d));
    block.visible = carve(&at, STRIPS * most * sizeof(KeyTile));
    block.places = carve(&at, STRIPS * most * sizeof(long));
    block.counts = carve(&at, STRIPS * sizeof(long)), block.begins = carve(&at, (all / SIDE + 1) * sizeof(long));
    char *owned = at;
#pragma omp parallel num_threads(threads)
    {
        char *here = owned + omp_get_thread_num() * own;
        float *scored = carve(&here, most * SQUARE * 4), *back = carve(&here, most * SQUARE * 4);
        uint16_t *slopes = carve(&here, most * SQUARE * 2), *rows = carve(&here, 2 * SIDE * up(d));
        uint16_t *grads = carve(&here, 2 * SIDE * up(e));
        float *sum = carve(&here, 4 * SIDE * up(d)), known[2 * SIDE];
        begin();
        for (long g = 0; g < groups; g++) {
            keys_across(&layer, g, key, d, across);
            keys_along(&layer, g, key, d, along);
            keys_across(&layer, g, value, e, values);
#pragma omp for schedule(static)
            for (long j = 0; j < all; j++) {
                memset(in_keys + j * up(d), 0, 4 * up(d));
                memset(in_values + j * up(e), 0, 4 * up(e));
            }
            for (long first = 0; first < strips; first += STRIPS) {
                long here_strips = smaller(STRIPS, strips - first);
#pragma omp for schedule(static, 1)
                for (long i = 0; i < here_strips; i++) {
                    const Strip *mine = strip + first + i;
                    KeyTile *visible = block.visible + i * most;
                    long visible_count = block.counts[i] = visible_tiles(&layer, mine, visible);
                    memset(known, 0, sizeof known);
                    for (long r = 0; r < mine->rows; r++)
                        memcpy(known + 2 * r, sums + 2 * address(&layer, mine, g, r, 1), 8);
                    rows_in(&layer, mine, g, query, d, rows);
                    rows_in(&layer, mine, g, grad, e, grads);
                    scores(rows, d, across, visible, visible_count, scored);
                    scores(grads, e, values, visible, visible_count, back);
                    softmax_rows_back(&layer, mine, visible, visible_count, known, scored, back,
                                      block.weights + i * most * SQUARE, block.slopes + i * most * SQUARE, slopes);
                    gathered(slopes, along, d, visible, visible_count, sum);
                    rows_out(&layer, mine, g, sum, NULL, d, to_query);
                    rows_transposed(rows, d, block.queries + i * SIDE * up(d));
                    rows_transposed(grads, e, block.grads + i * SIDE * up(e));
                }
#pragma omp single
                index_tiles(&block, here_strips, all / SIDE);
#pragma omp for schedule(dynamic, 1)
                for (long j = 0; j < 2 * all / SIDE; j++) {
                    if (block.begins[j / 2] == block.begins[j / 2 + 1]) continue;
                    if (j % 2) sum_rows(&block, j / 2, block.queries, block.slopes, d, in_keys);
                    else sum_rows(&block, j / 2, block.grads, block.weights, e, in_values);
                }
            }
#pragma omp for schedule(static)
            for (long j = 0; j < all / SIDE; j++) {
                keys_out(&layer, g, j, in_keys, d, to_key);
                keys_out(&layer, g, j, in_values, e, to_value);
            }
        }
        end();
    }
    free(memory);
    free(strip);
    return 0;
}
